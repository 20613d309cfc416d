"""Row E6 for Services, RB61, RB63 and RB64: a real Kubernetes whose API fails, behind a TLS proxy that makes it fail.

From outside the cluster all calls go through the API; from inside only what is known of the pods does. The gateways
run with the rights that ``emit`` gives them, and a token of their own.
"""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from running import RunningGateway, echo_entry
from services import Cluster, account, call, in_pod, rule, service, spoken_to, until, workload

from gateway.errors import GatewayError
from gateway.protocol.eras import Era
from gateway.runtimes.base import Surroundings
from gateway.runtimes.k8s_service import K8sServiceSpec, open_service
from tests.clusters import Kube
from tests.fixtures.api_proxy import ApiProxy, kubeconfig

pytestmark = pytest.mark.real

PATIENCE = 120.0
AWAY = 60.0
"""Seconds for which the API is away (row E6)."""
RIGHTS = [
    rule("services", "get"),
    rule("endpoints", "get", "list", "watch"),
    rule("pods", "get", "list"),
    rule("pods/portforward", "get", "create"),
    rule("deployments", "get", "patch", group="apps"),
    rule("leases", "get", "create", "update", group="coordination.k8s.io"),
]
WATCH = "watch=true"


@pytest.fixture(scope="module")
def cluster(kube: Kube) -> Cluster:
    return Cluster(kube)


@attrs.frozen
class Place:
    """A namespace with the Service "tools", its Deployment at ``replicas``, and the API as a gateway reaches it."""

    cluster: Cluster
    namespace: str
    folder: Path
    proxy: ApiProxy
    token: str

    def entry(self, *, scale: bool = False, **keys: Any) -> dict[str, Any]:
        runtime = {"type": "k8s-service", "namespace": self.namespace, "service_name": "tools", "port": "mcp"}
        more = {"scale": {"kind": "Deployment", "name": "tools"}} if scale else {}
        return {"id": "s", "runtime": {**runtime, **more}, "start_timeout_seconds": 90, **keys}

    def gateway(self, *entries: dict[str, Any], user: dict[str, Any] | None = None) -> RunningGateway:
        path = kubeconfig(self.proxy.url, self.proxy.authority, user or {"token": self.token}, str(self.folder))
        config = {"request_timeout_seconds": 90}
        return RunningGateway(self.folder, list(entries), config=config, env={"KUBECONFIG": str(path)})

    def scale(self, replicas: int) -> None:
        self.cluster.kubectl("-n", self.namespace, "scale", "deployment", "tools", f"--replicas={replicas}")
        until(lambda: self.cluster.ready(self.namespace, "tools") == replicas, PATIENCE, f"{replicas} pods")

    @property
    def replicas(self) -> int:
        return self.cluster.replicas(self.namespace, "tools")


@pytest.fixture
def home(cluster: Cluster) -> Iterator[str]:
    with cluster.namespace() as namespace:
        cluster.apply(
            workload(namespace, "tools", 0), service(namespace, "tools"), *account(namespace, "gateway", *RIGHTS)
        )
        yield namespace


@pytest.fixture
def place(cluster: Cluster, home: str, tmp_path: Path) -> Iterator[Place]:
    whole = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json"))
    with ApiProxy(whole) as proxy:
        yield Place(cluster, home, tmp_path, proxy, cluster.token(home, "gateway"))


def answers(gateway: RunningGateway, text: str = "x") -> bool:
    found = gateway.rest("s", "tools/call", {"name": "echo", "arguments": {"text": text}}, timeout=120)
    return bool(found.get("result", {}).get("content", [{}])[0].get("text") == text)


def pods_of(gateway: RunningGateway) -> list[str]:
    """The pods that the gateway knows."""
    (shown,) = gateway.json("GET", "/servers/s")["instances"]
    return [each.partition(" ")[0] for each in shown["pods"]]


def test_E6_RB63_watches_are_cut_expire_and_are_refused(place: Place) -> None:
    """No call notices, and what happens to the pods meanwhile is not missed."""
    place.scale(1)
    proxy = place.proxy
    with place.gateway(place.entry()) as gateway:
        assert answers(gateway)
        until(lambda: proxy.times(WATCH), why="no watch")
        for fault in (410, 500, 429, 401):
            first, second = proxy.refuse_watch(fault, **({"Retry_After": "2"} if fault == 429 else {}))
            assert fault != 429 or second - first >= 2
            assert answers(gateway, "kept")
        (old,) = pods_of(gateway)
        proxy.answer(WATCH, 410)
        proxy.cut(WATCH)
        place.cluster.kube.kill_pod(place.namespace, old)
        begun = time.monotonic()
        until(lambda: answers(gateway, "again"), PATIENCE)
        assert time.monotonic() - begun <= 30
        # So many failures in a row have made the pauses long: 5 s and a fifth, twice.
        until(lambda: pods_of(gateway) and old not in pods_of(gateway), 20, "the old pod is believed to live")
        assert "Server stopped" not in "\n".join(gateway.lines), "one pod's end is not the Service's"


def test_E6_RB63_the_api_is_away_for_a_minute(place: Place) -> None:
    """From outside, calls go through it: they fail, saying so, and are served again when it is back. The workload is
    brought up once, and goes down afterwards."""
    proxy = place.proxy
    with place.gateway(place.entry(scale=True, idle_timeout_seconds=10), echo_entry("here")) as gateway:
        assert answers(gateway)
        proxy.away = True
        begun = time.monotonic()
        # One that was sent over a connection just when that was cut is told just so.
        until(lambda: proxy.url.removeprefix("https://") in gateway.failing("s"), 30, "nobody is told what is away")
        assert time.monotonic() - begun < 30, "the caller is told when nothing can be reached"
        assert gateway.call("here", "echo", {"text": "unharmed"}) == "unharmed"
        time.sleep(max(0.0, begun + AWAY - time.monotonic()))
        assert place.replicas == 1, "idle meanwhile, and nobody could take it down"
        proxy.away = False
        begun = time.monotonic()
        until(lambda: answers(gateway, "back"), 90)
        assert place.replicas == 1
        until(lambda: place.replicas == 0, 60, "it is not taken down when it can be")


def test_E6_RB63_a_slow_and_busy_api_is_waited_for(place: Place) -> None:
    place.proxy.delay = 1.0
    place.proxy.answer("PATCH", 429, "slow down", Retry_After="2")
    place.proxy.answer("PATCH", 409, "somebody else was quicker")
    with place.gateway(place.entry(scale=True)) as gateway:
        assert answers(gateway, "slowly")
        first, second = place.proxy.times("PATCH")[:2]
        assert second - first >= 2
        assert place.replicas == 1
        assert gateway.stop() == 0
    assert place.replicas == 0, "\n".join(gateway.lines[-20:])


def test_E6_RB63_a_rotated_token_is_read_again(place: Place) -> None:
    place.scale(1)
    path = place.folder / "token"
    path.write_text("expired")
    with place.gateway(place.entry(), user={"tokenFile": str(path)}) as gateway:
        assert "401 Unauthorized" in gateway.failing("s")
        path.write_text(place.token)
        until(lambda: answers(gateway, "in"), 60, "the new token")
        # It expires while the server is up: the watch is told 401, the new one is read, and nobody notices.
        path.write_text("expired again")
        place.proxy.cut(WATCH)
        time.sleep(1)
        path.write_text(place.token)
        until(lambda: answers(gateway, "still"), 60)


@pytest.mark.parametrize("end", ["evicted", "killed", "out of memory"])
def test_E6_RB64_callers_of_a_pod_that_ends_are_told_and_the_next_has_another(place: Place, end: str) -> None:
    place.scale(1)
    with place.gateway(place.entry()) as gateway:
        assert answers(gateway)
        (pod,) = pods_of(gateway)
        before = _identity(place, pod)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            slow = {"name": "wait", "arguments": {"seconds": 60}}
            told = pool.submit(gateway.rest, "s", "tools/call", slow, timeout=120)
            until(lambda: "waiting" in place.cluster.kubectl("-n", place.namespace, "logs", pod), 20)
            begun = time.monotonic()
            if end == "out of memory":
                pool.submit(gateway.rest, "s", "tools/call", {"name": "fill", "arguments": {"megabytes": 400}})
            elif end == "evicted":
                place.cluster.kube.evict(place.namespace, pod)
            else:
                place.cluster.kube.kill_pod(place.namespace, pod)
            reply = told.result(60)
        assert "error" in reply, reply
        assert time.monotonic() - begun <= 20, "the call did not just end"
        until(lambda: answers(gateway, "again"), 60)
        assert time.monotonic() - begun <= 45, "another pod, in 30 s on a quiet machine"
        (pod,) = pods_of(gateway)
        assert _identity(place, pod) != before
        assert place.replicas == 1


def _identity(place: Place, pod: str) -> tuple[str, int]:
    """Of what runs in the pod: the kubelet starts a container again in the same one."""
    found = place.cluster.get(place.namespace, "pod", pod)
    return found["metadata"]["uid"], int(found["status"]["containerStatuses"][0]["restartCount"])


# ------------------------------------------------------------------------------------------------- inside the cluster
@pytest.mark.parametrize("era", [Era.LEGACY, Era.MODERN], ids=lambda era: era.value)
async def test_E6_RB63_inside_the_cluster_calls_go_on_while_the_api_is_away(
    place: Place, era: Era, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a minute, in which one pod's place is taken by another: calls go to the one that is left, and the new one is
    known when the API is back."""
    await trio.to_thread.run_sync(place.scale, 2)
    folder = place.cluster.pod_folder(place.folder, place.namespace, "gateway")
    (folder / "ca.crt").write_text(Path(place.proxy.authority).read_text())
    around = Surroundings("s", {}, environ=in_pod(folder, monkeypatch, place.proxy.url))
    spec = K8sServiceSpec(place.namespace, "tools", "mcp")
    with trio.fail_after(AWAY + PATIENCE):
        async with open_service(spec, around) as origin, spoken_to(origin, era) as link:
            assert await call(link, "echo", text="before") == "before"
            await trio.to_thread.run_sync(setattr, place.proxy, "away", True)
            old = [each.partition(" ")[0] for each in origin.details["pods"]]
            await trio.to_thread.run_sync(place.cluster.kube.kill_pod, place.namespace, old[0])
            end = trio.current_time() + AWAY
            failed = 0
            while trio.current_time() < end:
                try:
                    assert await call(link, "echo", text="meanwhile") == "meanwhile"
                except GatewayError:
                    failed += 1  # on its way to the pod that was killed
                await trio.sleep(0.5)
            assert failed <= 2
            assert origin.details["pods"], "what was known of the pods is not forgotten"
            await trio.to_thread.run_sync(setattr, place.proxy, "away", False)
            while {each.partition(" ")[0] for each in origin.details["pods"]} & {old[0]} or (
                len(origin.details["pods"]) < 2
            ):
                await trio.sleep(0.2)
            assert await call(link, "echo", text="after") == "after"
