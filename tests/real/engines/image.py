#!/usr/bin/env python3
"""Build the image of the container tests, ``mcp-fixtures:1``, without any image registry.

    image.py unix:///DIR/docker.sock

Its root file system is this machine's own python3 with the standard library and the shared libraries it needs, busybox
(``sh``, ``sleep``, ...) and tests/fixtures in /app. It starts the echo server; ``args: [/app/peer.py]`` another
fixture, ``[/app/anywhere.py, /app/peer_server.py, ...]`` one that would listen on 127.0.0.1 only. An image is made by
the engine's import call, so Podman will do as well. It is built anew when what goes into it has changed.
"""

import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.parse

TAG = "mcp-fixtures:1"
HERE = pathlib.Path(__file__).resolve()
FIXTURES = HERE.parents[2] / "fixtures"
SKIP = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data"}
SKIP |= {"site-packages", "dist-packages", "config", "__pycache__"}
APPLETS = [
    "sh",
    "cat",
    "ls",
    "sleep",
    "env",
    "echo",
    "kill",
    "ps",
    "wget",
    "true",
    "false",
    "id",
    "mkdir",
    "dd",
    "touch",
]
PYTHON = os.path.realpath(os.path.join(sys.base_prefix, "bin", f"python3.{sys.version_info[1]}"))
LIBRARY = sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix})
ANYWHERE = """\
import os, runpy, socket, sys, zlib
# A server that binds 127.0.0.1 can't be reached from outside its container.
class Socket(socket.socket):
    def bind(self, address):
        super().bind(("0.0.0.0", address[1]) if address[0] == "127.0.0.1" else address)
socket.socket = Socket
# Every container has a process 7: what servers write down together tells them apart by their hosts.
number = zlib.crc32(socket.gethostname().encode())
os.getpid = lambda: number
sys.argv = sys.argv[1:]
sys.path.insert(0, "/app")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path, timeout=300):
        super().__init__("docker", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def api(host, method, path, body=None, headers=None, timeout=300):
    """One request to the engine: status and body."""
    connection = Unix(host.removeprefix("unix://"), timeout)
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        connection.request(method, path, body=body, headers=headers or {}, encode_chunked=hasattr(body, "read"))
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def ldd(files):
    """Every shared library that the files need, by the path that the loader would use."""
    out = subprocess.run(["ldd", *files], capture_output=True, text=True).stdout
    return {os.path.abspath(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", out, re.M)}


def copy(root, path, to=None):
    target = pathlib.Path(root, (to or str(path)).lstrip("/"))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)  # follows links: a plain file under each name


def fill(root):
    for folder in ("tmp", "root", "proc", "sys", "dev", "etc", "bin", "app", "usr/bin", "home/mcp"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o1777)
    pathlib.Path(root, "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nmcp:x:1000:1000::/home/mcp:/bin/sh\n")
    pathlib.Path(root, "etc/group").write_text("root:x:0:\nmcp:x:1000:\n")
    copy(root, os.path.realpath(shutil.which("busybox")), "/bin/busybox")
    for applet in APPLETS:
        os.symlink("busybox", f"{root}/bin/{applet}")
    for top, folders, names in os.walk(LIBRARY):
        folders[:] = [name for name in folders if name not in SKIP and not name.startswith("config-")]
        for name in names:
            if not name.endswith((".a", ".exe")) and not re.match(r"_(ctypes_)?test|_tkinter|xxlimited", name):
                copy(root, os.path.join(top, name))
    copy(root, PYTHON)
    for name in ("python3", "python"):
        os.symlink(PYTHON, f"{root}/usr/bin/{name}")
    for path in sorted(FIXTURES.glob("*.py")):
        copy(root, path, f"/app/{path.name}")
    pathlib.Path(root, "app/anywhere.py").write_text(ANYWHERE)
    for library in ldd([PYTHON, *map(str, pathlib.Path(root).rglob("*.so"))]):
        if not library.startswith(str(root)):
            copy(root, library)
    # For what is mounted: compiled modules of the SDK.
    for library in ("libgcc_s.so.1", "libstdc++.so.6", "librt.so.1", "libdl.so.2", "libpthread.so.0", "libutil.so.1"):
        for folder in pathlib.Path("/usr/lib").glob("*-linux-gnu*"):
            if (folder / library).exists():
                copy(root, str(folder / library))
    # Without compiled files every container would compile the library anew.
    command = [sys.executable, "-m", "compileall", "-qq", "-j2", "--invalidation-mode", "unchecked-hash", "-s", root]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([*command, root + LIBRARY], env=variables)


def cache():
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = pathlib.Path(os.environ.get("MCP_TEST_CACHE") or home / "open-mcp-gateway-tests") / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(host, digest):
    changes = ['ENTRYPOINT ["/usr/bin/python3", "-s"]', 'CMD ["/app/echo_server.py"]', "WORKDIR /app", "USER mcp"]
    changes += ["ENV PATH=/usr/bin:/bin", "ENV PYTHONDONTWRITEBYTECODE=1", f"LABEL mcp.inputs={digest}"]
    # The tag goes into repo: podman ignores the separate parameter.
    query = urllib.parse.urlencode([("fromSrc", "-"), ("repo", TAG), *(("changes", change) for change in changes)])

    def own(info):
        info.uid = info.gid = 1000 if info.name.startswith("./home/mcp") else 0
        info.uname = info.gname = ""
        return info

    archive = cache() / f"fixtures-{digest}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(prefix="mcp-image.") as folder:
            root = os.path.join(folder, "root")
            os.mkdir(root, 0o755)
            fill(root)
            new = archive.with_suffix(f".{os.getpid()}")
            with tarfile.open(new, mode="w", format=tarfile.GNU_FORMAT) as tar:
                tar.add(root, ".", filter=own)
            for old in cache().glob("fixtures-*.tar"):
                old.unlink()
            new.rename(archive)
    with open(archive, "rb") as file:
        headers = {"Content-Type": "application/x-tar", "Transfer-Encoding": "chunked"}
        status, body = api(host, "POST", "/images/create?" + query, file, headers)
    if status != 200 or b'"error"' in body:
        raise SystemExit(f"image.py: import failed: {status} {body.decode(errors='replace')}")


def build(host):
    """Have the image on an engine."""
    inputs = hashlib.sha256(f"{sys.version}{PYTHON}".encode())
    for path in (HERE, *sorted(FIXTURES.glob("*.py"))):
        inputs.update(path.read_bytes())
    digest = inputs.hexdigest()[:16]
    status, body = api(host, "GET", f"/images/{TAG}/json")
    if status == 200 and (json.loads(body)["Config"].get("Labels") or {}).get("mcp.inputs") == digest:
        return
    load(host, digest)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("unix://"):
        raise SystemExit(__doc__)
    build(sys.argv[1])
