"""A real Kubernetes for tests: a private one, and what to ask it directly.

``kube`` is started when the first test wants it and kept for all of them (tests/real/conftest.py).
MCP_TEST_KUBECONFIG names a cluster that runs already; its nodes need the image ``mcp-fixtures:1``
(tests/real/engines/image.py).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from engines import FOLDER, IMAGE, image

PREFIX = os.environ.get("MCP_TEST_NAMESPACES", "test")


class Kube:
    """A running cluster. ``config`` is the administrator's kubeconfig."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.environ = {"KUBECONFIG": str(config), "PATH": os.environ["PATH"]}

    def kubectl(self, *args: str, given: Any = None, check: bool = True) -> str:
        """What it prints. ``given`` are objects to stand on its stdin."""
        text = None if given is None else json.dumps(given)
        command = ["kubectl", f"--kubeconfig={self.config}", *args]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, (args, done.stdout, done.stderr)
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", given={"apiVersion": "v1", "kind": "List", "items": list(objects)})

    def items(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """All objects of a kind."""
        args = ["-n", namespace, "get", kind, "-o", "json"] + (["-l", selector] if selector else [])
        return list(json.loads(self.kubectl(*args))["items"])

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """What it is when it is true. Blocks."""
        until = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
            time.sleep(0.2)
        return found

    def user_config(self, folder: Path, fields: dict[str, Any], *, server: str = "", **cluster: Any) -> Path:
        """A kubeconfig of one context, ``test``, for another user, or another way to the same API."""
        own = json.loads(self.kubectl("config", "view", "--raw", "-o", "json"))
        entry = {**own["clusters"][0]["cluster"], **cluster, **({"server": server} if server else {})}
        path = folder / f"{token_hex(4)}.conf"
        whole = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {name: value for name, value in entry.items() if value is not None}}],
            "users": [{"name": "u", "user": fields or own["users"][0]["user"]}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(whole))
        return path

    def token(self, namespace: str, account: str) -> str:
        """A fresh token of a service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        made = json.loads(self.kubectl("create", "--raw", path, "-f", "-", given=body))
        return str(made["status"]["token"])

    def evict(self, namespace: str, pod: str) -> None:
        """As a node that is drained does it."""
        meta = {"name": pod, "namespace": namespace}
        eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": meta}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", given=eviction)

    def kill_pod(self, namespace: str, pod: str) -> None:
        """Delete it without any grace."""
        self.kubectl("-n", namespace, "delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")

    def job(self, namespace: str, /, *args: str, **keys: Any) -> dict[str, Any]:
        """An entry's ``runtime`` for a fixture in a Job here; by default the echo server."""
        runtime: dict[str, Any] = {"type": "k8s-job", "namespace": namespace, "image": IMAGE, "user": 1000}
        runtime |= {"image_pull_policy": "IfNotPresent"}
        return {**runtime, **({"args": list(args)} if args else {}), **keys}


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def _missing(cache: Path) -> str:
    if os.geteuid() != 0:
        return "a cluster of our own needs root"
    if not (cache / "bin" / "kubelet").exists():
        return f"there is no Kubernetes in {cache}: build it with KUBE_CACHE={cache} {FOLDER / 'kube-engine'} build"
    return ""


@pytest.fixture(scope="session")
def kube() -> Iterator[Kube]:
    """The cluster, with the fixtures' image on its node."""
    given = os.environ.get("MCP_TEST_KUBECONFIG")
    if given:
        yield Kube(Path(given))
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = os.environ.get("MCP_TEST_CACHE") or str(home / "open-mcp-gateway-tests")
    cache = Path(parts) / "kube-engine"
    if missing := _missing(cache):
        if os.environ.get("MCP_GATEWAY_REAL") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="kube.", dir="/tmp"))
    variables = {**os.environ, "ENGINE_NET": "bridge", "KUBE_CACHE": str(cache), "KUBE_PORT": str(_free_ports(4))}

    def run(script: str, *args: str, check: bool = True) -> None:
        command = [str(FOLDER / script), *args]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 or not check, (command, done.stdout[-2000:], done.stderr[-2000:])

    try:
        run("docker-engine", "start", str(folder))
        image.build(f"unix://{folder}/docker.sock")
        run("kube-engine", "start", str(folder))
        yield Kube(folder / "kube" / "admin.conf")
    finally:
        run("kube-engine", "stop", str(folder), check=False)
        run("docker-engine", "purge", str(folder), check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def namespace(kube: Kube) -> Iterator[str]:
    """One for all tests of a session, gone after."""
    name = f"{PREFIX}-{token_hex(4)}"
    kube.kubectl("create", "namespace", name)
    kube.wait_for(lambda: kube.items("serviceaccounts", name), "the namespace's service account")
    yield name
    kube.kubectl("delete", "namespace", name, "--wait=false", check=False)
