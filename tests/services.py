"""What tests of Services need on the cluster of ``clusters.kube``: images, accounts with few rights, workloads."""

from __future__ import annotations

import base64
import functools
import http.client
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from clusters import PREFIX, Kube
from engines import image

from gateway.errors import LinkLost
from gateway.protocol.eras import Era
from gateway.runtimes.base import Origin
from gateway.runtimes.kubernetes import access as cluster_access
from gateway.runtimes.kubernetes import api as kube_api
from gateway.upstream.connect import Terms, UpstreamLink, connect

SDK_IMAGE: str = image.SDK.tag

Json = dict[str, Any]


class Cluster:
    """The cluster, as an administrator and as accounts of its own see it. Its engine's socket is beside its files."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.folder = kube.config.parent.parent
        self.kubeconfig = kube.config
        self.docker_host = f"unix://{self.folder}/docker.sock"
        cluster = json.loads(kube.kubectl("config", "view", "--raw", "-o", "json"))["clusters"][0]["cluster"]
        self.server: str = cluster["server"]
        self.ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=self.ca)
        image.build(self.docker_host, image.SDK)

    def gateway_image(self, pyz: Path) -> str:
        """An image whose entry point is this archive, as the released one's is ``gateway-http``."""
        return str(image.build(self.docker_host, image.gateway(pyz)))

    # ------------------------------------------------------------------------------------------- as an administrator
    def kubectl(self, *words: str, given: Any = None, check: bool = True) -> str:
        """What kubectl prints."""
        return self.kube.kubectl(*words, given=given, check=check)

    def apply(self, *objects: Json) -> None:
        """Make these objects be so."""
        self.kube.apply(*objects)

    def get(self, namespace: str, kind: str, name: str) -> Json:
        """One object."""
        return dict(json.loads(self.kubectl("-n", namespace, "get", kind, name, "-o", "json")))

    def list(self, namespace: str, kind: str) -> list[Json]:
        """All of a kind."""
        return list(json.loads(self.kubectl("-n", namespace, "get", kind, "-o", "json"))["items"])

    def ready(self, namespace: str, service: str) -> int:
        """Ready addresses behind a Service."""
        found = self.get(namespace, "endpoints", service)
        return sum(len(subset.get("addresses") or []) for subset in found.get("subsets") or [])

    def replicas(self, namespace: str, deployment: str) -> int:
        """How many it is to have."""
        return int(self.get(namespace, "deployment", deployment)["spec"]["replicas"])

    @contextmanager
    def namespace(self, name: str | None = None) -> Iterator[str]:
        """A namespace of one's own; nobody waits for its end."""
        name = name or f"{PREFIX}-{uuid4().hex[:8]}"
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false", check=False)

    # ---------------------------------------------------------------------------------------------- as somebody else
    def token(self, namespace: str, account: str) -> str:
        """A fresh token of a service account."""
        return self.kube.token(namespace, account)

    def request(self, token: str, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """One request with a token: the status and the answer."""
        parts = urlsplit(self.server)
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=self._tls, timeout=30)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            data = reply.read()
            try:
                return reply.status, json.loads(data)
            except ValueError:
                return reply.status, {"text": data.decode(errors="replace")}
        finally:
            connection.close()

    def kubeconfig_for(self, folder: Path, namespace: str, account: str) -> Path:
        """A kubeconfig with nothing but a token."""
        path = folder / f"{account}.conf"
        cluster = {"server": self.server, "certificate-authority-data": base64.b64encode(self.ca.encode()).decode()}
        made = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": namespace}}],
            "clusters": [{"name": "x", "cluster": cluster}],
            "users": [{"name": "x", "user": {"token": self.token(namespace, account)}}],
        }
        path.write_text(json.dumps(made))
        return path

    def pod_folder(self, folder: Path, namespace: str, account: str) -> Path:
        """What a pod of this account finds in /var/run/secrets/kubernetes.io/serviceaccount."""
        made = folder / f"{account}.pod"
        made.mkdir()
        (made / "token").write_text(self.token(namespace, account))
        (made / "ca.crt").write_text(self.ca)
        (made / "namespace").write_text(namespace)
        return made

    # --------------------------------------------------------------------------------------------- for pods to see it
    @contextmanager
    def reachable_from_pods(self) -> Iterator[tuple[str, int]]:
        """An address at which pods get to the API, which listens on 127.0.0.1 only."""
        bridge = (self.folder / "bridge").read_text().strip()
        shown = subprocess.run(["ip", "-4", "-o", "addr", "show", bridge], capture_output=True, text=True, check=True)
        address = shown.stdout.split()[3].partition("/")[0]
        with socket.socket() as free:
            free.bind((address, 0))
            port = int(free.getsockname()[1])
        goal = urlsplit(self.server).netloc
        relay = subprocess.Popen(["socat", f"TCP-LISTEN:{port},bind={address},fork,reuseaddr", f"TCP:{goal}"])
        try:
            yield address, port
        finally:
            relay.terminate()
            relay.wait(10)


def until(what: Callable[[], Any], seconds: float = 60.0, why: str = "") -> Any:
    """The first true value of something that takes its time."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, why or what
        time.sleep(0.2)
    return found


# ------------------------------------------------------------------------------------------------------------- objects
def workload(namespace: str, name: str, replicas: int, **changes: Any) -> Json:
    """A Deployment of the SDK's server on Streamable HTTP; ``changes`` go to its container."""
    container = {
        "name": "server",
        "image": SDK_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": ["http", "8000"],
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 1},
        "resources": {"limits": {"memory": "200Mi"}, "requests": {"cpu": "10m", "memory": "50Mi"}},
        **changes,
    }
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
            },
        },
    }


def service(namespace: str, name: str) -> Json:
    """The Service before it: port 80, named mcp."""
    spec = {"selector": {"app": name}, "ports": [{"name": "mcp", "port": 80, "targetPort": 8000}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def account(namespace: str, name: str, *rules: Json) -> list[Json]:
    """A service account with these rights in its namespace."""
    group = "rbac.authorization.k8s.io"
    meta = {"name": name, "namespace": namespace}
    subjects = [{"kind": "ServiceAccount", **meta}]
    reference = {"apiGroup": group, "kind": "Role", "name": name}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": list(rules)},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": reference,
            "subjects": subjects,
        },
    ]


def rule(resource: str, *verbs: str, group: str = "") -> Json:
    """One rule of a Role."""
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}


# ----------------------------------------------------------------------------------------------------------- gateways
def in_pod(folder: Path, monkeypatch: pytest.MonkeyPatch, api: str) -> dict[str, str]:
    """Have the runtime believe that it runs in a pod with this service account, and that the API is at this URL.

    Pods' addresses are reachable here.
    """
    find = functools.partial(cluster_access.find_access, service_account=folder)
    monkeypatch.setattr(kube_api, "find_access", find)
    host, _, port = api.removeprefix("https://").partition(":")
    return {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}


@asynccontextmanager
async def spoken_to(origin: Origin, *eras: Era) -> AsyncIterator[UpstreamLink]:
    """A link to it, of one of these eras."""
    info = {"name": "test", "version": "1"}
    terms = Terms("s", lambda message: None, lambda ask: False, info, eras=eras or (Era.MODERN, Era.LEGACY), timeout=30)
    async with connect(origin, terms) as link:
        yield link


async def call(link: UpstreamLink, tool: str, *, tries: int = 1, **arguments: Any) -> str:
    """A tool's text. ``tries``: the proxies of this old API cut one event stream in a hundred short, which is told."""
    while True:
        try:
            reply = await link.request("tools/call", json.dumps({"name": tool, "arguments": arguments}), timeout=60)
            break
        except LinkLost as error:
            tries -= 1
            if not tries or "dropped the connection" not in error.message:
                raise
    assert "content" in reply.result, reply.text
    return str(reply.result["content"][0]["text"])
