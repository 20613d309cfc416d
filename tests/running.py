"""Real gateways and small real clients for tests: processes, sockets, no library between."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ECHO = Path(__file__).resolve().parent / "fixtures" / "echo_server.py"
ACCEPT = "application/json, text/event-stream"


def command(pyz: Path | None = None) -> list[str]:
    """How to run the gateway: the archive, or the sources."""
    return [sys.executable, str(pyz or ROOT / "gateway")]


def echo_entry(id: str, *, env: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """A catalog entry for tests/fixtures/echo_server.py."""
    runtime = {"type": "local-process", "command": sys.executable, "args": ["-E", "-s", str(ECHO)]}
    return {"id": id, "runtime": runtime, "env": env or {}, **more}


class RunningGateway:
    """``gateway http`` on a free loopback port, with a catalog given as entries (JSON is YAML)."""

    def __init__(
        self,
        folder: Path,
        servers: Sequence[dict[str, Any]] = (),
        *,
        config: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        pyz: Path | None = None,
        catalog: Path | None = None,
        listen: str = "127.0.0.1:0",
        views: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.folder = folder
        self.catalog = catalog or folder / "catalog.yaml"
        if catalog is None:
            self.write(servers, views)
        config_path = folder / "config.yaml"
        said = {"catalog_path": str(self.catalog), "state_dir": str(folder / "state"), **(config or {})}
        config_path.write_text(json.dumps(said))
        variables = {k: v for k, v in os.environ.items() if k not in ("MCP_GATEWAY_API_KEY", "RUST_LOG")}
        variables.update(env or {})
        self.process = subprocess.Popen(
            [*command(pyz), "http", "--config", str(config_path), "--listen-addr", listen],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=variables,
            cwd=folder,
        )
        self.lines: list[str] = []
        self.port = 0
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(30) or not self.port:
            self.process.kill()
            raise AssertionError("the gateway did not start:\n" + "\n".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            self.lines.append(line)
            found = re.search(r"Listening on \S*:(\d+)", line)
            if found:
                self.port = int(found[1])
                self._listening.set()
        self._listening.set()

    def write(self, servers: Sequence[dict[str, Any]], views: Sequence[dict[str, Any]] = ()) -> None:
        """Replace the catalog as an editor does: a new file, renamed over the old."""
        new = self.catalog.with_suffix(".new")
        new.write_text(json.dumps({"servers": list(servers), **({"views": list(views)} if views else {})}))
        new.replace(self.catalog)

    def wait_for_line(self, text: str, *, count: int = 1, seconds: float = 10) -> str:
        """The newest line with this text, once there are ``count``."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = [line for line in list(self.lines) if text in line]
            if len(found) >= count:
                return found[-1]
            time.sleep(0.02)
        raise AssertionError(f"no line with {text!r} in:\n" + "\n".join(self.lines[-40:]))

    def http(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (lower case), body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {
            "Accept": ACCEPT,
            **({"Content-Type": "application/json"} if data is not None else {}),
            **(headers or {}),
        }
        try:
            connection.request(method, path, data, sent)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """The decoded JSON of a 200."""
        status, _, data = self.http(method, path, body, **more)
        assert status == 200, (status, data)
        return json.loads(data)

    def rest(self, server_id: str, method: str, params: Any = None, **more: Any) -> Any:
        """A plain call through POST /mcp: the JSON-RPC reply."""
        body = {"server_id": server_id, "jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            body["params"] = params
        return json.loads(self.http("POST", "/mcp", body, **more)[2])

    def call(self, server_id: str, tool: str, arguments: dict[str, Any] | None = None) -> str:
        """A tool's text through POST /mcp."""
        reply = self.rest(server_id, "tools/call", {"name": tool, "arguments": arguments or {}})
        return str(reply["result"]["content"][0]["text"])

    def failing(self, server_id: str, tool: str = "echo", **arguments: Any) -> str:
        """What a call of a tool through POST /mcp that must fail with 502 is told."""
        body = {"server_id": server_id, "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
        body["params"] = {"name": tool, "arguments": arguments or {"text": "x"}}
        status, _, data = self.http("POST", "/mcp", body, timeout=120)
        assert status == 502, (status, data, "\n".join(self.lines[-60:]))
        return str(json.loads(data)["message"])

    def stop(self, seconds: float = 50) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> RunningGateway:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def events(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON messages of an event stream."""
    for block in data.decode().replace("\r\n", "\n").split("\n\n"):
        text = "\n".join(line[5:].lstrip() for line in block.split("\n") if line.startswith("data:"))
        if text:
            yield json.loads(text)


class HttpClient:
    """The smallest legacy Streamable HTTP client."""

    def __init__(self, gateway: RunningGateway, path: str, version: str = "2025-06-18") -> None:
        self.gateway, self.path = gateway, path
        self.session: dict[str, str] = {}
        self._id = 0
        status, headers, data = gateway.http(
            "POST",
            path,
            {
                "jsonrpc": "2.0",
                "id": 0,
                "method": "initialize",
                "params": {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
            },
        )
        assert status == 200, (status, data)
        reply = json.loads(data) if "json" in headers["content-type"] else next(events(data))
        assert "result" in reply, reply
        self.facts = reply["result"]
        self.session = {
            "Mcp-Session-Id": headers["mcp-session-id"],
            "MCP-Protocol-Version": self.facts["protocolVersion"],
        }
        assert self.post({"jsonrpc": "2.0", "method": "notifications/initialized"})[0] == 202

    def post(self, message: Any) -> tuple[int, dict[str, str], bytes]:
        """POST one message."""
        return self.gateway.http("POST", self.path, message, self.session)

    def request(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply to one request, whichever way it comes."""
        self._id += 1
        message = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params or {}}
        status, headers, data = self.post(message)
        assert status == 200, (status, data)
        if "json" in headers["content-type"]:
            return dict(json.loads(data))
        (reply,) = [m for m in events(data) if m.get("id") == self._id and "method" not in m]
        return reply


class StdioClient:
    """The smallest stdio client: a child process, one message a line."""

    def __init__(self, argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=cwd
        )
        self._id = 0
        self.notes: list[dict[str, Any]] = []
        self.facts = self.request(
            "initialize",
            {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
        )["result"]
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def request(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply to one request; what else arrives is kept in ``notes``."""
        self._id += 1
        self.send({"jsonrpc": "2.0", "id": self._id, "method": method, "params": params or {}})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if message.get("id") == self._id and "method" not in message:
                return dict(message)
            self.notes.append(message)
        raise AssertionError("the server closed its output")

    def close(self) -> int:
        """Close its input and wait."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.process.stdout.close()
