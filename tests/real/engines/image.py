#!/usr/bin/env python3
"""Build the images of tests in containers on an engine, without any image registry.

    image.py unix:///DIR/docker.sock [fixtures | sdk | gateway ARCHIVE]

    fixtures  mcp-fixtures:1 (this one by default), tests/fixtures in /app. It starts the echo server; ``args:
              [/app/peer.py]`` another fixture, ``[/app/anywhere.py, /app/peer_server.py, ...]`` one that would listen
              on 127.0.0.1 only
    sdk       mcp-sdk:1, servers/sdk_server.py with the official SDK, which pip gets from PyPI
    gateway   mcp-gateway-under-test:1, whose entry point is this gateway.pyz, as the released image's is gateway-http

Their root file system is this machine's own python3 with the standard library and the shared libraries it needs, and
busybox (``sh``, ``sleep``, ...). An image is made by the engine's import call, so Podman will do as well. It is built
anew when what goes into it has changed.
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
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve()
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


class Image(NamedTuple):
    """What an image has besides Python and busybox, and what it starts."""

    tag: str
    files: dict[str, pathlib.Path]
    """What lies in /app, by the names there."""
    script: tuple[str, ...] = ()
    """Arguments of Python, before those of the container."""
    default: tuple[str, ...] = ()
    """Those of a container that has none."""
    package: str = ""
    """What pip installs in /app/lib."""


FIXTURES = Image(
    "mcp-fixtures:1",
    {path.name: path for path in sorted((HERE.parents[2] / "fixtures").glob("*.py"))},
    default=("/app/echo_server.py",),
)
SDK = Image(
    "mcp-sdk:1",
    {"server.py": HERE.parent / "servers" / "sdk_server.py"},
    script=("/app/server.py",),
    package="mcp==2.3.0",
)


def gateway(archive):
    """The image of this gateway.pyz."""
    files = {"gateway-http": pathlib.Path(archive)}
    return Image("mcp-gateway-under-test:1", files, script=("/app/gateway-http",))


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


def install(package, folder):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
    command += ["--root-user-action=ignore", "--target", folder, package]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"image.py: pip could not install {package}: {done.stderr}")


def fill(root, image):
    for folder in ("tmp", "root", "proc", "sys", "dev", "etc", "bin", "app", "usr/bin", "home/mcp"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o1777)
    pathlib.Path(root, "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nmcp:x:1000:1000::/home/mcp:/bin/sh\n")
    pathlib.Path(root, "etc/group").write_text("root:x:0:\nmcp:x:1000:\n")
    # Without it the C library asks a name server first, and /etc/hosts only when there is none.
    pathlib.Path(root, "etc/nsswitch.conf").write_text("hosts: files dns\n")
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
    for name, path in image.files.items():
        copy(root, path, f"/app/{name}")
    if image.package:
        install(image.package, f"{root}/app/lib")
    for library in ldd([PYTHON, *map(str, pathlib.Path(root).rglob("*.so"))]):
        if not library.startswith(str(root)):
            copy(root, library)
    # For what is mounted, compiled modules of the SDK, and for older C libraries, which load the last two by name.
    libraries = ["libgcc_s.so.1", "libstdc++.so.6", "librt.so.1", "libdl.so.2", "libpthread.so.0", "libutil.so.1"]
    for library in (*libraries, "libnss_files.so.2", "libnss_dns.so.2"):
        for folder in pathlib.Path("/usr/lib").glob("*-linux-gnu*"):
            if (folder / library).exists():
                copy(root, str(folder / library))
    # Without compiled files every container would compile the library anew.
    command = [sys.executable, "-m", "compileall", "-qq", "-j2", "--invalidation-mode", "unchecked-hash", "-s", root]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([*command, root + LIBRARY, *([f"{root}/app/lib"] if image.package else [])], env=variables)


def cache():
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = pathlib.Path(os.environ.get("MCP_TEST_CACHE") or home / "open-mcp-gateway-tests") / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(host, image, digest):
    changes = [f"ENTRYPOINT {json.dumps(['/usr/bin/python3', '-s', *image.script])}", "WORKDIR /app", "USER mcp"]
    changes += ["ENV PATH=/usr/bin:/bin", "ENV PYTHONDONTWRITEBYTECODE=1", f"LABEL mcp.inputs={digest}"]
    changes += [f"CMD {json.dumps(image.default)}"] if image.default else []
    changes += ["ENV PYTHONPATH=/app/lib"] if image.package else []
    # The tag goes into repo: podman ignores the separate parameter.
    query = urllib.parse.urlencode([("fromSrc", "-"), ("repo", image.tag), *(("changes", each) for each in changes)])

    def own(info):
        info.uid = info.gid = 1000 if info.name.startswith("./home/mcp") else 0
        info.uname = info.gname = ""
        return info

    name = image.tag.removeprefix("mcp-").partition(":")[0]
    archive = cache() / f"{name}-{digest}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(prefix="mcp-image.") as folder:
            root = os.path.join(folder, "root")
            os.mkdir(root, 0o755)
            fill(root, image)
            new = archive.with_suffix(f".{os.getpid()}")
            with tarfile.open(new, mode="w", format=tarfile.GNU_FORMAT) as tar:
                tar.add(root, ".", filter=own)
            for old in cache().glob(f"{name}-*.tar"):
                old.unlink()
            new.rename(archive)
    with open(archive, "rb") as file:
        headers = {"Content-Type": "application/x-tar", "Transfer-Encoding": "chunked"}
        status, body = api(host, "POST", "/images/create?" + query, file, headers)
    if status != 200 or b'"error"' in body:
        raise SystemExit(f"image.py: import of {image.tag} failed: {status} {body.decode(errors='replace')}")


def build(host, image=FIXTURES):
    """Have an image on an engine; its tag."""
    inputs = hashlib.sha256(f"{sys.version}{PYTHON}{[*image.files]}".encode())
    for path in (HERE, *image.files.values()):
        inputs.update(path.read_bytes())
    digest = inputs.hexdigest()[:16]
    status, body = api(host, "GET", f"/images/{image.tag}/json")
    if status != 200 or (json.loads(body)["Config"].get("Labels") or {}).get("mcp.inputs") != digest:
        load(host, image, digest)
    return image.tag


if __name__ == "__main__":
    match sys.argv[1:]:
        case [host] | [host, "fixtures"] if host.startswith("unix://"):
            print(build(host))
        case [host, "sdk"] if host.startswith("unix://"):
            print(build(host, SDK))
        case [host, "gateway", archive] if host.startswith("unix://"):
            print(build(host, gateway(archive)))
        case _:
            raise SystemExit(__doc__)
