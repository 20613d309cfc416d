"""Servers behind Services, and the gateway itself, on a real Kubernetes cluster (rows E1, E2, E5, E6 of Services)."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from ruamel.yaml import YAML
from running import RunningGateway, command
from services import SDK_IMAGE, Cluster, account, call, in_pod, rule, service, spoken_to, until, workload

from gateway.errors import GatewayError, StartFailed
from gateway.protocol.eras import Era
from gateway.runtimes.base import Surroundings
from gateway.runtimes.k8s_service import K8sServiceSpec, Scale, open_service
from gateway.upstream.connect import UpstreamLink
from tests.clusters import Kube

pytestmark = pytest.mark.real

PATIENCE = 120.0
READ = [rule("services", "get"), rule("endpoints", "get", "list", "watch")]
WAYS = {
    "pod proxy of the API": [*READ, rule("pods/proxy", "get", "create", "delete")],
    "port-forward": [*READ, rule("pods/portforward", "get", "create")],
    "service proxy of the API": [*READ, rule("services/proxy", "get", "create", "delete")],
    "pod address": READ,
}


@pytest.fixture(scope="module")
def cluster(kube: Kube) -> Cluster:
    return Cluster(kube)


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A namespace with the Service "tools" and two pods behind it."""
    with cluster.namespace() as namespace:
        cluster.apply(workload(namespace, "tools", 2), service(namespace, "tools"))
        for number, rules in enumerate(WAYS.values()):
            cluster.apply(*account(namespace, f"way-{number}", *rules))
        until(lambda: cluster.ready(namespace, "tools") == 2, PATIENCE)
        yield Place(cluster, namespace, tmp_path_factory.mktemp("accounts"))


@attrs.frozen
class Place:
    """A namespace of the cluster, and a folder for credentials."""

    cluster: Cluster
    namespace: str
    folder: Path

    def spec(self, **keys: Any) -> K8sServiceSpec:
        return K8sServiceSpec(self.namespace, **{"service_name": "tools", "port": "mcp", **keys})

    def environ(self, way: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """What a gateway sees that has the rights of one way only, in a pod or outside."""
        name = f"way-{list(WAYS).index(way)}"
        if way != "pod address":
            path = self.folder / f"{name}.conf"
            return {
                "KUBECONFIG": str(
                    path if path.exists() else self.cluster.kubeconfig_for(self.folder, self.namespace, name)
                )
            }
        folder = self.folder / f"{name}.pod"
        return in_pod(
            folder if folder.exists() else self.cluster.pod_folder(self.folder, self.namespace, name),
            monkeypatch,
            self.cluster.server,
        )


async def host(link: UpstreamLink, tries: int = 1) -> str:
    """The pod that answers."""
    return str(json.loads(await call(link, "whoami", tries=tries))["host"])


# --------------------------------------------------------------------------------------------------- ways and eras
@pytest.mark.parametrize("era", [Era.LEGACY, Era.MODERN], ids=lambda era: era.value)
@pytest.mark.parametrize("way", WAYS)
async def test_E1_K27_every_way_serves_both_eras(
    place: Place, way: str, era: Era, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no more rights than that way needs."""
    environ = place.environ(way, monkeypatch)
    letters = "".join(random.choices(string.ascii_letters, k=1000)) * 2000
    with trio.fail_after(PATIENCE):
        async with open_service(place.spec(), Surroundings("s", {}, environ=environ)) as origin:
            assert origin.details["via"] == way
            # The API's proxy of Services takes any pod for each request, so sessions need a stateless server there.
            if way.startswith("service proxy") and era is Era.LEGACY:
                return
            async with spoken_to(origin, era) as link:
                assert link.era is era
                tries = 5 if "proxy" in way else 1
                assert await call(link, "echo", tries=tries, text="hi") == "hi"
                assert await call(link, "echo", tries=tries, text=letters) == letters
                seen = {await host(link, tries) for _ in range(8)}
            if era is Era.LEGACY:
                assert len(seen) == 1, "a session stays at its pod"
            elif not way.startswith("service proxy"):
                assert len(seen) == 2, "requests without a session go to all pods"


OVER_TLS = """
import runpy, sys
sys.path.insert(0, "/app/lib")
import uvicorn
from mcp.server.transport_security import TransportSecuritySettings
server = runpy.run_path("/app/server.py", run_name="server")["server"]
open_to_all = TransportSecuritySettings(enable_dns_rebinding_protection=False)
app = server.streamable_http_app(transport_security=open_to_all)
uvicorn.run(app, host="0.0.0.0", port=8000, ssl_keyfile="/tls/tls.key", ssl_certfile="/tls/tls.crt")
"""


@pytest.mark.parametrize("way", ["port-forward", "pod address"])
async def test_K27_pods_that_speak_https_are_checked_for_the_service_s_name(
    place: Place, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, namespace = place.cluster, place.namespace
    safe, false = f"safe-{way[:3]}", f"false-{way[:3]}"
    for name, host in ((safe, f"{safe}.{namespace}.svc"), (false, "somebody.else.example")):
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        words += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", f"{name}.key", "-out", f"{name}.crt"]
        subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
        files = {"tls.crt": (tmp_path / f"{name}.crt").read_text(), "tls.key": (tmp_path / f"{name}.key").read_text()}
        meta = {"name": name, "namespace": namespace}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": files}
        mounts = [{"name": "tls", "mountPath": "/tls"}]
        command = ["/usr/bin/python3", "-I", "-c", OVER_TLS]
        made = workload(namespace, name, 1, command=command, args=[], volumeMounts=mounts)
        made["spec"]["template"]["spec"]["volumes"] = [{"name": "tls", "secret": {"secretName": name}}]
        cluster.apply(secret, made, service(namespace, name))
    trusted = tmp_path / "trusted.pem"
    trusted.write_text((tmp_path / f"{safe}.crt").read_text() + (tmp_path / f"{false}.crt").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    environ = place.environ(way, monkeypatch)
    await trio.to_thread.run_sync(
        until, lambda: cluster.ready(namespace, safe) == cluster.ready(namespace, false) == 1, PATIENCE
    )
    with trio.fail_after(PATIENCE):
        around = Surroundings("s", {}, environ=environ)
        async with open_service(place.spec(service_name=safe, scheme="https"), around) as origin:
            assert origin.details["via"] == way
            async with spoken_to(origin, Era.LEGACY) as link:
                assert await call(link, "echo", text="hi") == "hi"
        async with open_service(place.spec(service_name=false, scheme="https"), around) as origin:
            with pytest.raises(GatewayError, match="TLS certificate refused: Hostname mismatch"):
                async with spoken_to(origin, Era.LEGACY):
                    raise AssertionError("it connected")


async def test_E1_sessions_spread_over_the_pods(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = place.environ("pod address", monkeypatch)
    seen = set()
    with trio.fail_after(PATIENCE):
        async with open_service(place.spec(port=80), Surroundings("s", {}, environ=environ)) as origin:
            for _ in range(4):
                async with spoken_to(origin, Era.LEGACY) as link:
                    seen.add(await host(link))
    assert len(seen) == 2


@pytest.mark.parametrize("way", ["pod proxy of the API", "port-forward", "pod address"])
async def test_E6_RB64_a_session_whose_pod_is_killed_goes_on_at_another(
    place: Place, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = place.environ(way, monkeypatch)
    with trio.fail_after(PATIENCE):
        around = Surroundings("s", {}, environ=environ)
        async with open_service(place.spec(), around) as origin, spoken_to(origin, Era.LEGACY) as link:
            home = await host(link)
            await trio.to_thread.run_sync(place.cluster.kube.kill_pod, place.namespace, home)
            began = trio.current_time()
            while True:
                # What is sent before the cluster knows that the pod is gone may fail, and says why.
                try:
                    now = await host(link)
                    break
                except GatewayError:
                    await trio.sleep(0.2)
            assert now != home
            assert trio.current_time() - began <= 30
    until(lambda: place.cluster.ready(place.namespace, "tools") == 2, PATIENCE)


async def test_K27_E6_what_is_not_there_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = place.environ("pod address", monkeypatch)

    async def failure(environ: dict[str, str] = environ, **keys: Any) -> str:
        with pytest.raises(StartFailed) as caught, trio.fail_after(PATIENCE):
            async with open_service(place.spec(**keys), Surroundings("s", {}, environ=environ)):
                raise AssertionError("it opened")
        return caught.value.message

    assert 'services "nothing" not found (404 NotFound)' in await failure(service_name="nothing")
    assert "has no port 81; it has 80 (mcp)" in await failure(port=81)
    nobody = place.cluster.kubeconfig_for(place.folder, place.namespace, "default")
    assert "cannot get resource" in await failure({"KUBECONFIG": str(nobody)})
    place.cluster.apply(*account(place.namespace, "reader", *READ))
    reader = place.cluster.kubeconfig_for(place.folder, place.namespace, "reader")
    assert "needs the right to get pods/portforward, or create and get pods/proxy" in await failure(
        {"KUBECONFIG": str(reader)}
    )
    place.cluster.apply(service(place.namespace, "empty"))
    assert "has no pods" in await failure(service_name="empty")


# -------------------------------------------------------------------------------------------------- scale from zero
class Scaled:
    """A Service whose workload is at zero, and gateways in front of it, which run as an administrator outside."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, folder: Path) -> None:
        self.cluster, self.namespace, self.name, self.folder = cluster, namespace, name, folder
        self.gateways: list[RunningGateway] = []
        cluster.apply(workload(namespace, name, 0), service(namespace, name))

    def gateway(self, number: int, **keys: Any) -> RunningGateway:
        """Number N has a folder of its own, which remembers what a killed one has left."""
        runtime = {
            "type": "k8s-service",
            "namespace": self.namespace,
            "service_name": self.name,
            "port": "mcp",
            "scale": {"kind": "Deployment", "name": self.name},
        }
        entry = {"id": "s", "runtime": runtime, "idle_timeout_seconds": 3, "start_timeout_seconds": 90, **keys}
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        config = {"request_timeout_seconds": 90}
        made = RunningGateway(folder, [entry], config=config, env={"KUBECONFIG": str(self.cluster.kubeconfig)})
        self.gateways.append(made)
        return made

    @property
    def replicas(self) -> int:
        return self.cluster.replicas(self.namespace, self.name)

    def down(self, seconds: float = 30) -> None:
        until(lambda: self.replicas == 0, seconds, "it is not taken down")


@pytest.fixture
def scaled(cluster: Cluster, tmp_path: Path) -> Iterator[Scaled]:
    with cluster.namespace() as namespace:
        made = Scaled(cluster, namespace, "lazy", tmp_path)
        try:
            yield made
        finally:
            for gateway in made.gateways:
                gateway.kill()


def test_E5_the_first_call_brings_one_replica_and_idleness_takes_it_away(scaled: Scaled) -> None:
    gateway = scaled.gateway(1)
    assert gateway.call("s", "echo", {"text": "hi"}) == "hi"
    assert scaled.replicas == 1
    instance = gateway.json("GET", "/servers/s")["instances"][0]
    assert instance["via"] == "port-forward" and instance["scales"] == "Deployment 'lazy'"
    assert len(instance["pods"]) == 1
    scaled.down()
    assert gateway.call("s", "echo", {"text": "again"}) == "again"
    assert gateway.stop() == 0
    assert scaled.replicas == 0, "a gateway that stops leaves nothing up"
    assert not any("open-mcp-gateway" in name for name in annotations(scaled))


def annotations(scaled: Scaled) -> dict[str, str]:
    return dict(scaled.cluster.get(scaled.namespace, "deployment", scaled.name)["metadata"]["annotations"])


def test_E5_P7_two_gateways_share_it_and_a_killed_one_s_is_taken_down_later(scaled: Scaled) -> None:
    one, two = scaled.gateway(1, idle_timeout_seconds=300), scaled.gateway(2)
    assert one.call("s", "echo", {"text": "1"}) == "1"
    assert two.call("s", "echo", {"text": "2"}) == "2"
    two.wait_for_line("Server stopped")
    assert scaled.replicas == 1, "the other one uses it still"
    one.kill()
    assert two.call("s", "echo", {"text": "3"}) == "3"
    two.wait_for_line("Server stopped", count=2)
    assert scaled.replicas == 1, "the killed one may be alive for all that anybody knows"
    scaled.gateway(1)  # started again where the killed one ran
    scaled.down()


def test_E5_a_hand_that_changes_the_replicas_wins(scaled: Scaled) -> None:
    gateway = scaled.gateway(1)
    assert gateway.call("s", "echo", {"text": "1"}) == "1"
    scaled.cluster.kubectl("-n", scaled.namespace, "scale", "deployment", scaled.name, "--replicas=2")
    gateway.wait_for_line("Server stopped", seconds=30)
    assert scaled.replicas == 2
    assert gateway.call("s", "echo", {"text": "2"}) == "2"
    gateway.wait_for_line("Server stopped", count=2, seconds=30)
    assert scaled.replicas == 2


def test_E5_an_autoscaler_that_changes_the_replicas_wins(scaled: Scaled) -> None:
    """It lets alone what is at zero, and then wants two at least."""
    made = {
        "apiVersion": "autoscaling/v1",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": scaled.name, "namespace": scaled.namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": scaled.name},
            "minReplicas": 2,
            "maxReplicas": 3,
            "targetCPUUtilizationPercentage": 80,
        },
    }
    scaled.cluster.apply(made)
    gateway = scaled.gateway(1, idle_timeout_seconds=25)
    assert scaled.replicas == 0
    assert gateway.call("s", "echo", {"text": "1"}) == "1"
    until(lambda: scaled.replicas == 2, 60, "the autoscaler does nothing here")
    gateway.wait_for_line("Server stopped", seconds=60)
    assert scaled.replicas == 2
    assert not any("open-mcp-gateway/scaled" in name for name in annotations(scaled)), "it is not ours any more"
    assert gateway.call("s", "echo", {"text": "2"}) == "2"


def test_E5_a_stateful_set_is_scaled_like_a_deployment(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.namespace() as namespace:
        made = workload(namespace, "lazy", 0)
        cluster.apply({**made, "kind": "StatefulSet", "spec": {**made["spec"], "serviceName": "lazy"}})
        cluster.apply(service(namespace, "lazy"))
        runtime = {"type": "k8s-service", "namespace": namespace, "service_name": "lazy", "port": 80}
        runtime["scale"] = {"kind": "StatefulSet", "name": "lazy", "max": 2}
        entry = {"id": "s", "runtime": runtime, "idle_timeout_seconds": 5, "start_timeout_seconds": 90}

        def wanted() -> int:
            return int(cluster.get(namespace, "statefulset", "lazy")["spec"]["replicas"])

        environ = {"KUBECONFIG": str(cluster.kubeconfig)}
        with RunningGateway(tmp_path, [entry], config={"request_timeout_seconds": 90}, env=environ) as gateway:
            assert gateway.call("s", "echo", {"text": "hi"}) == "hi"
            assert wanted() == 2
            (shown,) = gateway.json("GET", "/servers/s")["instances"]
            assert shown["scales"] == "StatefulSet 'lazy'" and shown["pods"][0].startswith("lazy-0 (")
            until(lambda: wanted() == 0, 30, "it is not taken down")


@pytest.mark.parametrize("trouble", ["quota", "image"])
def test_E6_RB61_what_keeps_it_down_is_told_in_kubernetes_words(scaled: Scaled, trouble: str) -> None:
    if trouble == "quota":
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q", "namespace": scaled.namespace}}
        scaled.cluster.apply({**quota, "spec": {"hard": {"pods": "0"}}})
        expected = "exceeded quota: q"
    else:
        scaled.cluster.apply(
            workload(scaled.namespace, scaled.name, 0, image="no-such-image:1", imagePullPolicy="Never")
        )
        expected = "ErrImageNeverPull"
    gateway = scaled.gateway(1, start_timeout_seconds=8)
    reply = gateway.rest("s", "tools/list")
    assert expected in reply["error"]["message"], reply
    scaled.down()


# ------------------------------------------------------------------------------------------------- emit kubernetes
def emitted(folder: Path, namespace: str, *words: str) -> list[dict[str, Any]]:
    environ = {name: text for name, text in os.environ.items() if name != "MCP_GATEWAY_API_KEY"}
    argv = [*command(), "emit", "kubernetes", "-n", namespace, "--replicas", "1", *words]
    argv += ["--catalog", str(folder / "catalog.yaml")]
    done = subprocess.run(
        argv, cwd=folder, env={**environ, "HOME": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [made for made in YAML(typ="safe", pure=True).load_all(done.stdout) if made is not None]


def fitting(made: dict[str, Any]) -> dict[str, Any]:
    """As this old cluster knows it: policy/v1 came with 1.21."""
    return {**made, "apiVersion": "policy/v1beta1"} if made["kind"] == "PodDisruptionBudget" else made


def catalog(namespace: str) -> list[dict[str, Any]]:
    runtime = {"type": "k8s-service", "namespace": namespace, "service_name": "lazy", "port": 80}
    return [
        {"id": "s", "runtime": {**runtime, "scale": {"kind": "Deployment", "name": "lazy"}}, "idle_timeout_seconds": 3}
    ]


async def test_E2_D13_the_account_can_do_all_that_its_servers_take_and_nothing_else(
    cluster: Cluster, scaled: Scaled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = scaled.namespace
    (tmp_path / "catalog.yaml").write_text(json.dumps({"servers": catalog(namespace)}))
    for made in emitted(tmp_path, namespace, "--namespaces", "none"):
        if made["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
            cluster.apply(made)
    environ = in_pod(cluster.pod_folder(tmp_path, namespace, "mcp-gateway"), monkeypatch, cluster.server)
    spec = K8sServiceSpec(namespace, "lazy", 80, scale=Scale("Deployment", "lazy"))
    said: list[str] = []
    around = Surroundings("s", {}, environ=environ, progress=lambda text, extend=False: said.append(text))
    with trio.fail_after(PATIENCE):
        async with open_service(spec, around) as origin, spoken_to(origin) as link:
            assert await call(link, "echo", text="hi") == "hi"
            assert origin.details["via"] == "pod address"
    assert scaled.replicas == 0
    assert not [text for text in said if "cannot" in text], "not even the reasons why it waits were refused"

    token = cluster.token(namespace, "mcp-gateway")
    core, apps = f"/api/v1/namespaces/{namespace}", f"/apis/apps/v1/namespaces/{namespace}"
    cluster.apply(workload(namespace, "other", 0))
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "x"}]},
    }
    for method, path, body in (
        ("GET", f"{core}/secrets", None),
        ("GET", f"{core}/configmaps", None),
        ("POST", f"{core}/pods", pod),
        ("GET", f"{core}/services/other", None),
        ("GET", f"{core}/services", None),
        ("GET", f"{apps}/deployments", None),
        ("GET", f"{apps}/deployments/other", None),
        ("PATCH", f"{apps}/deployments/other", {"spec": {"replicas": 1}}),
        ("DELETE", f"{apps}/deployments/lazy", None),
        ("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs", None),
        ("GET", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases", None),
        ("GET", "/api/v1/namespaces/kube-system/pods", None),
        ("GET", "/api/v1/nodes", None),
    ):
        status, answer = cluster.request(token, method, path, body)
        assert (status, answer.get("reason")) == (403, "Forbidden"), (method, path, answer)


@pytest.fixture(scope="module")
def image(cluster: Cluster, gateway_pyz: Path) -> str:
    return cluster.gateway_image(gateway_pyz)


def asked(pod: str, body: Any, key: str = "the-key") -> tuple[int, Any]:
    """One plain call to a gateway's pod, from a process of its own as a client is."""
    script = (
        "import http.client, sys\n"
        "connection = http.client.HTTPConnection(sys.argv[1], 4444, timeout=100)\n"
        "headers = {'Authorization': 'Bearer ' + sys.argv[3], 'Content-Type': 'application/json'}\n"
        "connection.request('POST', '/mcp', sys.argv[2], headers)\n"
        "reply = connection.getresponse()\n"
        "print(reply.status)\n"
        "print(reply.read().decode())\n"
    )
    argv = [sys.executable, "-c", script, pod, json.dumps(body), key]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    status, _, text = done.stdout.partition("\n")
    return int(status), json.loads(text)


@pytest.fixture
def running_inside(
    cluster: Cluster, image: str, scaled: Scaled, tmp_path: Path
) -> Iterator[Callable[[list[dict[str, Any]]], str]]:
    """``running_inside(servers)`` applies what emit prints for them and returns the address of the gateway's pod."""
    namespace = scaled.namespace
    with cluster.reachable_from_pods() as (address, port):

        def run(servers: list[dict[str, Any]]) -> str:
            (tmp_path / "catalog.yaml").write_text(json.dumps({"servers": servers}))
            words = ("--namespaces", "none", "--image", image, "--image-pull-policy", "IfNotPresent")
            objects = emitted(tmp_path, namespace, *words)
            # This cluster has no route to the API's own Service, and no DNS.
            for made in objects:
                if made["kind"] == "Deployment":
                    pod = made["spec"]["template"]["spec"]
                    pod["hostAliases"] = [{"ip": address, "hostnames": ["kubernetes.default.svc"]}]
                    pod["containers"][0]["env"] += [
                        {"name": "KUBERNETES_SERVICE_HOST", "value": "kubernetes.default.svc"},
                        {"name": "KUBERNETES_SERVICE_PORT", "value": str(port)},
                    ]
            words = (
                "create",
                "secret",
                "generic",
                "mcp-gateway",
                "--from-literal=api-key=the-key",
                "--from-literal=WHO=me",
            )
            cluster.kubectl("-n", namespace, *words)
            cluster.apply(*map(fitting, objects))
            until(lambda: cluster.ready(namespace, "mcp-gateway") == 1, PATIENCE, "the gateway's pod is not ready")
            (pod,) = [p for p in cluster.list(namespace, "pods") if "mcp-gateway" in p["metadata"]["name"]]
            return str(pod["status"]["podIP"])

        yield run


def test_E2_D7_D8_what_is_emitted_applies_and_runs_and_serves_from_inside(
    scaled: Scaled, running_inside: Callable[[list[dict[str, Any]]], str]
) -> None:
    job = {"type": "k8s-job", "namespace": scaled.namespace, "image": SDK_IMAGE, "image_pull_policy": "IfNotPresent"}
    job |= {"user": 1000, "args": ["stdio"]}
    servers = [*catalog(scaled.namespace), {"id": "j", "runtime": job, "env": {"SDK_NAME": "${WHO}"}}]
    pod = running_inside(servers)
    body = {"server_id": "s", "method": "tools/call", "params": {"name": "echo", "arguments": {"text": "hi"}}}
    status, reply = asked(pod, body)
    assert (status, reply["result"]["content"][0]["text"]) == (200, "hi"), reply
    assert asked(pod, body, key="wrong")[0] == 403
    status, reply = asked(pod, {**body, "server_id": "j"})
    assert (status, reply["result"]["content"][0]["text"]) == (200, "hi"), reply
    cluster, namespace = scaled.cluster, scaled.namespace
    (running,) = cluster.list(namespace, "jobs")
    (owner,) = running["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"][:12]) == ("Pod", "mcp-gateway-"), "the cluster collects it with the gateway"
    scaled.down()
    (name,) = [p["metadata"]["name"] for p in cluster.list(namespace, "pods") if "mcp-gateway" in p["metadata"]["name"]]
    lines = cluster.kubectl("-n", namespace, "logs", name).splitlines()
    assert all(json.loads(line) for line in lines), "logs are JSON"
    cluster.kubectl("-n", namespace, "scale", "deployment", "mcp-gateway", "--replicas=0")
    until(lambda: not cluster.list(namespace, "jobs"), 60, "the Job outlives the gateway")
