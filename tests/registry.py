"""A small image registry (the distribution API's pulls) that serves images made on the spot, slowly or with a login."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
SERVER = r"""#!/bin/sh
# An MCP server in a shell: enough for one tool.
while read -r line; do
  id=$(echo "$line" | sed -n 's/.*"id": *\([0-9]*\).*/\1/p')
  [ -n "$id" ] || continue
  case "$line" in
    *'"initialize"'*)
      info='{"name":"sh","version":"1"}'
      result='{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},"serverInfo":'$info'}' ;;
    *'"tools/list"'*) result='{"tools":[{"name":"hello","inputSchema":{"type":"object"}}]}' ;;
    *'"tools/call"'*) result='{"content":[{"type":"text","text":"hello from a pulled image"}]}' ;;
    *) echo "{\"jsonrpc\":\"2.0\",\"id\":$id,\"error\":{\"code\":-32601,\"message\":\"Method not found\"}}"; continue ;;
  esac
  echo "{\"jsonrpc\":\"2.0\",\"id\":$id,\"result\":$result}"
done
"""


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Registry:
    """``with Registry() as registry``: serves ``add``ed images at ``127.0.0.1:PORT``, which engines trust without TLS.

    ``password`` is asked for if set (user "ada"); ``seconds`` is how long the padding layer takes.
    """

    def __init__(self) -> None:
        self.password = ""
        self.seconds = 0.0
        self.asked: list[str] = []
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, tuple[str, bytes]] = {}
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                registry._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Registry:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(path)
        data = b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
        status, kind = 404, "application/json"
        wanted = "Basic " + base64.b64encode(f"ada:{self.password}".encode()).decode()
        if self.password and handler.headers.get("Authorization") != wanted:
            status, data = 401, b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
        elif path == "/v2/":
            status, data = 200, b"{}"
        elif "/manifests/" in path and (found := self._manifests.get(path)):
            status, (kind, data) = 200, found
        elif "/blobs/" in path and (blob := self._blobs.get(path.rpartition("/")[2])):
            status, kind, data = 200, "application/octet-stream", blob
        handler.send_response(status)
        if status == 401:
            handler.send_header("WWW-Authenticate", 'Basic realm="test"')
        handler.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        handler.send_header("Content-Type", kind)
        handler.send_header("Docker-Content-Digest", _digest(data))
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        pieces = 40 if self.seconds and len(data) > 1_000_000 and kind.endswith("octet-stream") else 1
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            handler.wfile.write(data[at : at + size])
            if pieces > 1:
                time.sleep(self.seconds / pieces)

    def _blob(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = _digest(data)
        self._blobs[digest] = data
        return {"mediaType": kind, "size": len(data), "digest": digest}

    def add(self, name: str, *, random: int = 0, zeros: int = 0, architecture: str = "") -> str:
        """An image with a shell server and layers of padding; its full name. ``architecture``: listed for only that."""
        layers = [self._tar({"bin/busybox": _busybox(), "server.sh": SERVER.encode()}, ("sh", "sed"))]
        for size, make in ((random, os.urandom), (zeros, bytes)):
            if size:
                layers.append(self._tar({f"padding-{size}": make(size)}))
        config = {
            "architecture": architecture or "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh", "/server.sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            "history": [{"created_by": "test"} for _ in layers],
        }
        layer_type = "application/vnd.docker.image.rootfs.diff.tar.gzip"
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._blob(json.dumps(config).encode(), "application/vnd.docker.container.image.v1+json"),
            "layers": [self._blob(gzip.compress(layer, 1, mtime=0), layer_type) for layer in layers],
        }
        kind, data = MANIFEST, json.dumps(manifest).encode()
        repository, _, tag = name.partition(":")
        self._manifests[f"/v2/{repository}/manifests/{_digest(data)}"] = (kind, data)
        if architecture:
            platform = {"architecture": architecture, "os": "linux"}
            each = {"mediaType": kind, "size": len(data), "digest": _digest(data), "platform": platform}
            listed = {"schemaVersion": 2, "mediaType": MANIFEST_LIST, "manifests": [each]}
            kind, data = MANIFEST_LIST, json.dumps(listed).encode()
            self._manifests[f"/v2/{repository}/manifests/{_digest(data)}"] = (kind, data)
        self._manifests[f"/v2/{repository}/manifests/{tag}"] = (kind, data)
        return f"{self.host}/{name}"

    @staticmethod
    def _tar(files: dict[str, bytes], applets: tuple[str, ...] = ()) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o755
                tar.addfile(info, io.BytesIO(data))
            for name in applets:
                info = tarfile.TarInfo(f"bin/{name}")
                info.type, info.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(info)
        return buffer.getvalue()


def _busybox() -> bytes:
    path = shutil.which("busybox")
    assert path is not None
    with open(path, "rb") as file:
        return file.read()
