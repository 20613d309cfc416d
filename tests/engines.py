"""Real container engines for tests: private ones, each in a folder of its own, and what to ask them directly."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

FOLDER = Path(__file__).resolve().parent / "real" / "engines"
PODMAN_CONF = """\
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
events_logger="file"
compat_api_enforce_docker_hub=false
[containers]
default_ulimits=["nofile=1024:1024","nproc=1024:1024"]
"""
REGISTRIES_CONF = """\
unqualified-search-registries = ["docker.io"]
[[registry]]
location = "127.0.0.1"
insecure = true
"""
"""As Docker does by itself: what listens on this machine, at any port, needs no TLS."""


def _image_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("container_image", FOLDER / "image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


image = _image_module()
IMAGE: str = image.FIXTURES.tag


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it is not just unreaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Engine:
    """A running engine with the tests' image. ``type`` is the catalog's; ``host`` its address."""

    def __init__(self, type: str, host: str, *, build: bool = True) -> None:
        self.type = type
        self.host = host
        if build:
            image.build(host)

    def remove_containers(self) -> None:
        """All of them, running or not."""
        for container in self.api("GET", "/containers/json?all=1"):
            self.api("DELETE", f"/containers/{container['Id']}?force=1&v=1")

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer of a request that must succeed."""
        status, data = image.api(self.host, method, path, body, timeout=60)
        assert status < 400, (method, path, status, data)
        return json.loads(data) if data.strip() else None

    def containers(self, label: str = "open-mcp-gateway.instance") -> list[dict[str, Any]]:
        """All that have a label, running or not."""
        return list(self.api("GET", "/containers/json?all=1&filters=" + quote(json.dumps({"label": [label]}))))

    def inspect(self, id: str) -> dict[str, Any]:
        """The engine's word about a container."""
        return dict(self.api("GET", f"/containers/{id}/json"))

    def runtime(self, *args: str, **keys: Any) -> dict[str, Any]:
        """An entry's ``runtime`` for a fixture in a container here."""
        return {"type": self.type, "image": IMAGE, "args": list(args), "host": self.host, "pull": "never", **keys}

    def entry(self, id: str, *args: str, runtime: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """A catalog entry for a fixture in a container here; by default the echo server."""
        return {"id": id, "runtime": self.runtime(*args, **(runtime or {})), **more}


class DockerEngine(Engine):
    """dockerd of its own, in a folder of its own under a short path. ``bin`` is the folder of another release."""

    def __init__(self, bin: Path | None = None, *, disk: str = "", build: bool = True, **settings: str) -> None:
        """``disk``: its storage is of this size ("64m") and in memory."""
        self.folder = Path(tempfile.mkdtemp(prefix="eng.", dir="/tmp"))
        self.variables = {**os.environ, **settings, **({"ENGINE_BIN": str(bin)} if bin else {})}
        if disk:
            (self.folder / "data").mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={disk}", "tmpfs", str(self.folder / "data")]
            subprocess.run(command, check=True)
        self.start()
        super().__init__("docker", f"unix://{self.folder}/docker.sock", build=build)

    def run(self, verb: str) -> None:
        """The script beside this, which ends exactly what it has started."""
        command = [str(FOLDER / "docker-engine"), verb, str(self.folder)]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start it, or start it again."""
        self.run("start")

    def stop(self) -> None:
        """Stop it as an administrator does: it stops its containers first."""
        self.run("stop")

    def kill(self) -> None:
        """End it without a word, and its containerd with it, as it is when the daemon's service is killed."""
        pidfile = self.folder / "exec" / "containerd" / "containerd.pid"
        pids = [int((self.folder / "dockerd.pid").read_text()), int(pidfile.read_text())]
        for pid in pids:
            with suppress(ProcessLookupError):  # the second may end by itself
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 20
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < until, "the engine survives SIGKILL"
            time.sleep(0.02)
        pidfile.unlink()  # a process that nobody reaps counts as a running containerd

    def close(self) -> None:
        """Remove all of it."""
        self.run("purge")


def _podman_service(
    folder: Path, variables: dict[str, str], address: str, ready: Callable[[], bool], *options: str, **user: Any
) -> subprocess.Popen[bytes]:
    """``podman system service`` at an address, once it is ready; ``user`` is Popen's, to run it as another one."""
    process = subprocess.Popen(
        ["podman", *options, "system", "service", "-t", "0", address],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,  # conmon leaves files there
        start_new_session=True,
        **user,
    )
    until = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < until, "podman did not start"
        time.sleep(0.05)
    return process


class PodmanEngine(Engine):
    """``podman system service`` of its own."""

    def __init__(self) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="pod.", dir="/tmp"))
        (folder / "containers.conf").write_text(PODMAN_CONF)
        (folder / "registries.conf").write_text(REGISTRIES_CONF)
        files = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_REGISTRIES_CONF": "registries.conf"}
        self.socket = folder / "p.sock"
        self.variables = {**os.environ, **{name: str(folder / file) for name, file in files.items()}}
        self.process = self._serve(f"unix://{self.socket}", self.socket.exists)
        super().__init__("podman", f"unix://{self.socket}")

    def _serve(self, address: str, ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
        own = ("--root", f"{self.folder}/r", "--runroot", f"{self.folder}/rr")
        return _podman_service(self.folder, self.variables, address, ready, *own)

    @contextmanager
    def at_port(self, host: str) -> Iterator[str]:
        """The same engine at a port of that address, too."""
        with socket.create_server((host, 0)) as listening:
            port = listening.getsockname()[1]

        def ready() -> bool:
            with socket.socket() as one:
                return one.connect_ex((host, port)) == 0

        process = self._serve(f"tcp://{host}:{port}", ready)
        try:
            yield f"tcp://{host}:{port}"
        finally:
            process.terminate()
            process.wait(30)

    def close(self) -> None:
        """End it and remove all of it."""
        self.remove_containers()
        self.process.terminate()
        self.process.wait(30)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


class RootlessPodman(Engine):
    """Podman of a user without rights, who has no other ids to give away: containers run as root there, or not at all.

    ``runtime`` is that user's XDG_RUNTIME_DIR.
    """

    def __init__(self) -> None:
        if Path("/sys/fs/cgroup/cgroup.controllers").exists():
            pytest.skip("with cgroups v2 a user needs a session of systemd's")
        self.folder = folder = Path(tempfile.mkdtemp(prefix="rls.", dir="/tmp"))
        self.runtime = folder / "run"
        socket = self.runtime / "podman" / "podman.sock"
        socket.parent.mkdir(parents=True)
        (folder / "containers.conf").write_text(PODMAN_CONF)
        storage = '[storage]\ndriver="vfs"\n[storage.options.vfs]\nignore_chown_errors="true"\n'
        (folder / "storage.conf").write_text(storage)
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, "nobody")
        variables = {"HOME": str(folder), "XDG_RUNTIME_DIR": str(self.runtime), "PATH": os.environ["PATH"]}
        variables["CONTAINERS_CONF"] = f"{folder}/containers.conf"
        variables["CONTAINERS_STORAGE_CONF"] = f"{folder}/storage.conf"
        nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        self.process = _podman_service(folder, variables, f"unix://{socket}", socket.exists, **nobody)
        super().__init__("podman", f"unix://{socket}")

    def close(self) -> None:
        """End it, and the process that holds its namespace, and remove all of it."""
        self.remove_containers()
        os.killpg(self.process.pid, signal.SIGTERM)  # what serves is a child of it, in the user's namespace
        self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for file in self.runtime.rglob("pause.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def open_engine(name: str, part: Callable[[str], Path]) -> DockerEngine | PodmanEngine:
    """An engine by the name of its release; skips, or fails, where it is not installed (see tests/conftest.py)."""
    part("engines/docker")
    if os.getuid() != 0:
        pytest.skip("an engine of one's own needs root")
    if name == "podman":
        part("engines/podman")
        return PodmanEngine()
    return DockerEngine(None if name == "20.10" else part(f"engines/{name}") / "bin")
