"""Services as servers without a cluster: what is read out of Kubernetes' objects, where requests go, who scales what.

The cluster here is a small one in memory (``Store``), with versions and conflicts as the real one has them; the clock
is virtual. The real cluster is tests/real/test_services.py's business.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpcore
import httpx
import pytest
import trio
import trio.testing

from gateway.config.model import Secret, StringMap
from gateway.errors import StartFailed
from gateway.runtimes import k8s_service
from gateway.runtimes.base import Surroundings
from gateway.runtimes.k8s_service import K8sServiceSpec, Scale, open_service
from gateway.runtimes.kubernetes import scale as scaling
from gateway.runtimes.kubernetes.access import Access
from gateway.runtimes.kubernetes.api import Refused
from gateway.runtimes.kubernetes.endpoints import Endpoint, Endpoints, in_endpoints, in_slice, port_of
from gateway.runtimes.kubernetes.routes import (
    AVOIDED,
    Balanced,
    DirectRoute,
    ForwardRoute,
    Load,
    ProxyRoute,
    _Forwarded,
    choose_route,
)
from gateway.runtimes.kubernetes.scale import (
    EXPIRY,
    LEASE_SECONDS,
    REFRESH,
    Scaler,
    Target,
    enter,
    leave,
    why_not_ready,
)
from gateway.runtimes.kubernetes.websocket import BINARY, CONTINUATION, Broken

Object = dict[str, Any]


# --------------------------------------------------------------------------------------------------- reading objects
def test_K27_a_port_is_a_number_or_a_name() -> None:
    service = {"spec": {"ports": [{"name": "mcp", "port": 80}, {"name": "metrics", "port": 9090}]}}
    assert port_of(service, "mcp", "Service 'x'") == port_of(service, 80, "Service 'x'") == ("mcp", 80)
    assert port_of({"spec": {"ports": [{"port": 8080}]}}, 8080, "") == ("", 8080)
    with pytest.raises(StartFailed, match=r"Service 'x' has no port http; it has 80 \(mcp\), 9090 \(metrics\)"):
        port_of(service, "http", "Service 'x'")
    with pytest.raises(StartFailed, match=r"ExternalName for 'example.com': use type remote-sse"):
        port_of({"spec": {"type": "ExternalName", "externalName": "example.com"}}, 80, "Service 'x'")


def test_K27_endpoints_are_those_of_the_port_ready_or_not() -> None:
    def pod(name: str) -> Object:
        return {"kind": "Pod", "name": name, "uid": name}

    found = {
        "subsets": [
            {
                "addresses": [{"ip": "10.0.0.1", "targetRef": pod("a")}, {"ip": "10.0.0.9"}],
                "notReadyAddresses": [{"ip": "10.0.0.2", "targetRef": pod("b")}],
                "ports": [{"name": "mcp", "port": 8000}, {"name": "metrics", "port": 9090}],
            }
        ]
    }
    made = in_endpoints(found, "mcp")
    assert [(e.address, e.port, e.pod, e.ready) for e in made] == [
        ("10.0.0.1", 8000, "a", True),
        ("10.0.0.9", 8000, "", True),
        ("10.0.0.2", 8000, "b", False),
    ]
    assert in_endpoints(found, "") == in_endpoints({}, "mcp") == []


def test_K27_slices_leave_out_what_is_being_deleted() -> None:
    def endpoint(address: str, **conditions: bool) -> Object:
        return {
            "addresses": [address],
            "conditions": conditions,
            "targetRef": {"kind": "Pod", "name": address, "uid": "u"},
        }

    found = {
        "addressType": "IPv6",
        "ports": [{"name": "", "port": 8000}],
        "endpoints": [
            endpoint("fd00::1"),
            endpoint("fd00::2", ready=False, serving=False),
            endpoint("fd00::3", ready=False, serving=True, terminating=True),
        ],
    }
    assert [(e.address, e.ready) for e in in_slice(found, "")] == [("fd00::1", True), ("fd00::2", False)]
    assert in_slice({**found, "addressType": "FQDN"}, "") == []
    assert in_slice(found, "")[0].shown == "fd00::1 ([fd00::1]:8000)"


def test_RB61_what_a_workload_waits_for_is_told_in_kubernetes_words() -> None:
    def pod(name: str = "p", **status: Any) -> Object:
        return {"metadata": {"name": name}, "status": status}

    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "no:1"'}}}
    assert why_not_ready({}, [pod(containerStatuses=[waiting])]) == (
        'pod p: ImagePullBackOff: Back-off pulling image "no:1"'
    )
    killed = {
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"reason": "OOMKilled"}},
    }
    assert why_not_ready({}, [pod(containerStatuses=[killed])]) == "pod p: CrashLoopBackOff (last ended: OOMKilled)"
    nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: cpu"}
    assert why_not_ready({}, [pod(conditions=[nowhere])]) == "pod p: Unschedulable: 0/1 nodes: cpu"
    quota = {"type": "ReplicaFailure", "status": "True", "message": 'pods "x" is forbidden: exceeded quota: q'}
    assert "exceeded quota: q" in why_not_ready({"status": {"conditions": [quota]}}, [])
    assert why_not_ready({}, [pod(phase="Running")]) == "pod p: its readiness probe does not pass yet"
    assert why_not_ready({}, []) == ""


# ------------------------------------------------------------------------------------------------ where requests go
class FakeEndpoints:
    """As Endpoints, set by hand."""

    def __init__(self, *every: Endpoint) -> None:
        self.all = every
        self.changed = trio.Event()
        self.trouble = ""

    @property
    def ready(self) -> list[Endpoint]:
        return [each for each in self.all if each.ready]

    def become(self, *every: Endpoint) -> None:
        self.all = every
        changed, self.changed = self.changed, trio.Event()
        changed.set()


class Body(httpx.AsyncByteStream):
    """An answer on its way."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


class FakeRoute:
    """Hands requests to a function of the pod's name. ``refusing`` are pods at which nobody listens."""

    via = "nothing"
    direct = True

    def __init__(self, answer: Callable[[str, httpx.Request], httpx.Response]) -> None:
        self.refusing: set[str] = set()
        self.answer = answer
        self.log: list[str] = []

    def transport(self) -> httpx.AsyncBaseTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            pod = request.url.host
            self.log.append(pod)
            if pod in self.refusing:
                raise httpx.ConnectError("connection refused")
            made = self.answer(pod, request)
            # As it comes from a socket: not read yet.
            return httpx.Response(made.status_code, headers=made.headers, stream=Body(made.content))

        return httpx.MockTransport(handle)

    def aim(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Request:
        return httpx.Request(
            request.method, request.url.copy_with(host=endpoint.pod), headers=request.headers, stream=request.stream
        )

    async def judge(self, response: httpx.Response) -> httpx.Response:
        return response


def pods(*names: str, ready: bool = True) -> list[Endpoint]:
    return [Endpoint(f"10.0.0.{i}", 80, name, f"uid-{name}", ready) for i, name in enumerate(names)]


def open_session(pod: str, request: httpx.Request) -> httpx.Response:
    """``initialize`` gives a session named by its pod; all else says which pod it reached."""
    if json.loads(request.content or b"{}").get("method") == "initialize":
        return httpx.Response(200, headers={"mcp-session-id": f"session-of-{pod}-{len(request.content)}"}, text=pod)
    return httpx.Response(200, text=pod)


class Client:
    """A link's requests, without the link."""

    def __init__(self, endpoints: Any, route: Any, url: str = "http://x.ns.svc:80/mcp") -> None:
        self.transport = Balanced(route, endpoints, url, Load(), "Service 'x'")
        self.url = url

    async def post(self, method: str = "tools/call", session: str = "", url: str = "") -> httpx.Response:
        headers = {"mcp-session-id": session} if session else {}
        request = httpx.Request(
            "POST", url or self.url, headers=headers, content=json.dumps({"method": method}).encode()
        )
        response = await self.transport.handle_async_request(request)
        await response.aread()
        await response.aclose()
        return response


async def test_E5_requests_without_a_session_go_to_all_pods_alike() -> None:
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b", "c")), route)
    for _ in range(30):
        await client.post()
    assert {pod: route.log.count(pod) for pod in "abc"} == {"a": 10, "b": 10, "c": 10}


async def test_E5_a_busy_pod_gets_no_more_than_the_others() -> None:
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b")), route)
    held = await client.transport.handle_async_request(httpx.Request("POST", client.url, content=b"{}"))
    (busy,) = route.log
    for _ in range(4):
        assert (await client.post()).text != busy
    await held.aclose()
    seen = {(await client.post()).text for _ in range(4)}
    assert seen == {"a", "b"}


async def test_E5_a_pod_that_is_listened_to_is_not_busy() -> None:
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b")), route)
    headers = {"mcp-method": "subscriptions/listen"}
    for request in (
        httpx.Request("POST", client.url, headers=headers, content=b"{}"),
        httpx.Request(
            "GET", client.url, headers={"mcp-session-id": (await client.post("initialize")).headers["mcp-session-id"]}
        ),
    ):
        await client.transport.handle_async_request(request)  # and stays open
    for _ in range(6):
        await client.post()
    assert abs(route.log.count("a") - route.log.count("b")) <= 1


async def in_session() -> tuple[FakeRoute, FakeEndpoints, Client, str, str]:
    """A client in front of the pods "a" and "b", the one at which its session is, and the session."""
    route, endpoints = FakeRoute(open_session), FakeEndpoints(*pods("a", "b"))
    client = Client(endpoints, route)
    opened = await client.post("initialize")
    return route, endpoints, client, opened.text, opened.headers["mcp-session-id"]


async def test_E1_a_session_stays_at_its_pod_and_ends_with_it() -> None:
    route, endpoints, client, home, session = await in_session()
    other = "b" if home == "a" else "a"
    assert {(await client.post(session=session)).text for _ in range(6)} == {home}
    # Not ready is not gone: the session lives on there, while other requests go elsewhere.
    endpoints.become(*pods(home, ready=False), *pods(other))
    assert (await client.post(session=session)).text == home
    assert {(await client.post()).text for _ in range(3)} == {other}
    # Gone: 404 without a question to anybody, so that the link opens another session.
    endpoints.become(*pods(other))
    asked = len(route.log)
    assert (await client.post(session=session)).status_code == 404
    assert len(route.log) == asked
    again = await client.post("initialize")
    assert (await client.post(session=again.headers["mcp-session-id"])).text == other
    assert (await client.post(session="never seen")).status_code == 404


async def test_E1_a_replaced_pod_of_the_same_name_and_address_is_another() -> None:
    route = FakeRoute(open_session)
    endpoints = FakeEndpoints(Endpoint("10.0.0.1", 80, "db-0", "first"))
    client = Client(endpoints, route)
    session = (await client.post("initialize")).headers["mcp-session-id"]
    endpoints.become(Endpoint("10.0.0.1", 80, "db-0", "second"))
    assert (await client.post(session=session)).status_code == 404


async def test_E1_the_older_transport_posts_to_where_its_stream_is() -> None:
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b", "c")), route, "http://x.ns.svc:80/sse")
    stream = await client.transport.handle_async_request(httpx.Request("GET", client.url))
    await stream.aread()
    home = route.log[0]
    for _ in range(6):
        assert (await client.post(url="http://x.ns.svc:80/messages?id=7")).text == home


async def test_E6_nobody_listens_at_one_pod_so_another_is_asked() -> None:
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b")), route)
    route.refusing = {"a"}
    assert [(await client.post()).text for _ in range(4)] == ["b"] * 4
    route.refusing = {"a", "b"}
    with pytest.raises(httpx.ConnectError, match="connection refused"):
        await client.post()


async def test_E6_who_takes_no_connection_comes_last_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    """A pod of a lost node stays in the list for most of a minute, and each try of it may take seconds."""
    route = FakeRoute(open_session)
    client = Client(FakeEndpoints(*pods("a", "b")), route)
    route.refusing = {"a"}
    for _ in range(6):
        await client.post()
    assert route.log.count("a") == 1
    route.refusing = set()
    await trio.sleep(AVOIDED)
    assert {(await client.post()).text for _ in range(4)} == {"a", "b"}


async def test_E6_RB63_a_session_whose_pod_is_silent_ends_only_if_nobody_can_say_whether_it_is_there() -> None:
    route, endpoints, client, home, session = await in_session()
    route.refusing = {home}
    with pytest.raises(httpx.ConnectError):
        await client.post(session=session)  # the cluster says that it is there
    endpoints.trouble = "Kubernetes can't be reached"
    route.direct = False
    with pytest.raises(httpx.ConnectError):
        await client.post(session=session)  # it is the API that is not there
    route.direct = True
    endpoints.become(*pods(home))
    with pytest.raises(httpx.ConnectError):
        await client.post(session=session)  # and where else should it go?
    endpoints.become(*pods("a", "b"))
    assert (await client.post(session=session)).status_code == 404
    again = await client.post("initialize")
    assert again.text != home
    assert (await client.post(session=again.headers["mcp-session-id"])).text == again.text


async def test_E6_a_request_that_may_have_been_seen_is_never_sent_again() -> None:
    def answer(pod: str, request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("connection reset")

    route = FakeRoute(answer)
    client = Client(FakeEndpoints(*pods("a", "b")), route)
    with pytest.raises(httpx.ReadError):
        await client.post()
    assert len(route.log) == 1


async def test_RB64_a_request_waits_for_a_pod_that_comes_up(autojump_clock: trio.testing.MockClock) -> None:
    route = FakeRoute(open_session)
    endpoints = FakeEndpoints(*pods("a", ready=False))
    client = Client(endpoints, route)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.post)
        await trio.sleep(20)
        assert route.log == []
        endpoints.become(*pods("a"))
    assert route.log == ["a"]
    endpoints.become(*pods("a", "b", ready=False))
    began = trio.current_time()
    with pytest.raises(httpx.ConnectError, match="Service 'x': none of its 2 pods is ready"):
        await client.post()
    assert trio.current_time() - began <= 30
    endpoints.become()
    with pytest.raises(httpx.ConnectError, match="Service 'x': it has no pods"):
        await client.post()


# ------------------------------------------------------------------------------------------------- a small cluster
IN_POD = Access("https://10.96.0.1:443", "default", "the pod's service account")
OUTSIDE = Access("https://127.0.0.1:6443", "default", "context 'dev' of ~/.kube/config", "dev", "/home/u/.kube/config")


class Store:
    """A cluster in memory: objects by path, versions, conflicts, merge patches, watches.

    ``on_change`` is told of each changed object, so that a test can be the controllers. ``may`` are rights as
    "verb resource/sub". ``asked`` logs changes as (verb, path).
    """

    def __init__(self, access: Access = IN_POD) -> None:
        self.access = access
        self.objects: dict[str, Object] = {}
        self.version = 0
        self.asked: list[tuple[str, str]] = []
        self.may: set[str] = set()
        self.down = False
        self.on_change: Callable[[str, Object], None] = lambda path, found: None
        self.changes: list[tuple[str, Object]] = []
        self.changed = trio.Event()

    def put(self, path: str, body: Object) -> Object:
        self.version += 1
        meta = {**body.get("metadata", {}), "resourceVersion": str(self.version)}
        meta.setdefault("name", path.rpartition("/")[2])
        found = self.objects[path] = {**body, "metadata": meta}
        self.changes.append((path, found))
        changed, self.changed = self.changed, trio.Event()
        changed.set()
        self.on_change(path, found)
        return json.loads(json.dumps(found))

    def refuse(self, status: int, reason: str) -> Refused:
        return Refused(f"Kubernetes refused: {reason}", status, reason, reason, None)

    async def _asked(self, verb: str, path: str) -> None:
        await trio.sleep(0.01)
        if self.down:
            raise StartFailed("Kubernetes can't be reached: connection refused")
        if verb != "get":
            self.asked.append((verb, path))

    async def get(self, path: str, params: Any = None, **_: Any) -> Object:
        await self._asked("get", path)
        if params is not None:  # a list
            return {"items": self._items(path)}
        if path not in self.objects:
            raise self.refuse(404, "NotFound")
        return json.loads(json.dumps(self.objects[path]))

    def _items(self, path: str) -> list[Object]:
        if "discovery.k8s.io" in path:
            raise self.refuse(404, "NotFound")
        return [found for at, found in self.objects.items() if at.rpartition("/")[0] == path]

    async def list_all(self, path: str, params: Any = None) -> tuple[list[Object], str]:
        await self._asked("get", path)
        return self._items(path), str(self.version)

    async def create(self, path: str, body: Object, **_: Any) -> Object:
        await self._asked("create", path)
        if body.get("kind") == "SelfSubjectAccessReview":
            asked = body["spec"]["resourceAttributes"]
            wanted = f"{asked['verb']} {asked['resource']}/{asked['subresource']}"
            return {"status": {"allowed": wanted in self.may}}
        at = f"{path}/{body['metadata']['name']}"
        if at in self.objects:
            raise self.refuse(409, "AlreadyExists")
        return self.put(at, body)

    async def replace(self, path: str, body: Object) -> Object:
        await self._asked("replace", path)
        if body["metadata"]["resourceVersion"] != self.objects[path]["metadata"]["resourceVersion"]:
            raise self.refuse(409, "Conflict")
        return self.put(path, body)

    async def patch(self, path: str, body: Object, **_: Any) -> Object:
        await self._asked("patch", path)
        found = json.loads(json.dumps(self.objects[path]))
        wanted = body["metadata"].get("resourceVersion")
        if wanted is not None and wanted != found["metadata"]["resourceVersion"]:
            raise self.refuse(409, "Conflict")
        annotations = {**found["metadata"].get("annotations", {}), **body["metadata"].get("annotations", {})}
        found["metadata"]["annotations"] = {name: text for name, text in annotations.items() if text is not None}
        found["spec"] = {**found.get("spec", {}), **body.get("spec", {})}
        return self.put(path, found)

    async def watch(self, path: str, on_event: Any, params: Any = None, *, on_trouble: Any = None) -> None:
        for found in self._items(path):
            on_event("ADDED", found)
        on_event("SYNCED", {})
        seen = len(self.changes)
        while True:
            for at, found in self.changes[seen:]:
                if at.rpartition("/")[0] == path:
                    on_event("MODIFIED", found)
            seen = len(self.changes)
            await self.changed.wait()


TARGET = Target("ns", "Deployment", "app", 0, 1, "open-mcp-gateway-deployment-app")
LEASE = "/apis/coordination.k8s.io/v1/namespaces/ns/leases/open-mcp-gateway-deployment-app"


def workload(replicas: int, **annotations: str) -> Object:
    return {"metadata": {"annotations": annotations}, "spec": {"replicas": replicas}}


def scaler(store: Store, user: str, target: Target = TARGET) -> Scaler:
    @asynccontextmanager
    async def reopen() -> AsyncIterator[Any]:
        yield store

    return Scaler(store, target, user, reopen)  # type: ignore[arg-type]


def quiet(text: str) -> None:
    """A progress that nobody reads."""


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wall time goes with the virtual clock."""
    monkeypatch.setattr(scaling.time, "time", lambda: 1_000_000 + trio.current_time())
    yield


# -------------------------------------------------------------------------------------------------------- decisions
def test_E5_only_what_is_down_is_brought_up() -> None:
    def replicas(has: int, least: int = 0, most: int = 1) -> int | None:
        return enter(workload(has), Target("ns", "Deployment", "app", least, most, "l"), "me", 1000).replicas

    assert replicas(0) == 1 and replicas(0, 0, 3) == 3 and replicas(1, 1, 3) == 3 and replicas(0, 1, 1) == 1
    assert replicas(1) is None and replicas(2, 0, 3) is None and replicas(5, 1, 3) is None and replicas(1, 1, 1) is None


def test_E5_only_our_own_change_is_undone_and_only_by_the_last() -> None:
    claim = {scaling.CLAIM: '{"to": 1, "back": 0}'}
    mine, theirs = {scaling.USER + "me": "990"}, {scaling.USER + "they": "990"}
    assert leave(workload(1, **claim, **mine), "me", 1000).replicas == 0
    assert leave(workload(1, **mine), "me", 1000).replicas is None, "nobody of us has brought it up"
    for changed in (0, 2, 3):
        made = leave(workload(changed, **claim, **mine), "me", 1000)
        assert made.replicas is None, "somebody else has changed it"
        assert made.annotations[scaling.CLAIM] is None, "and it is theirs from now on"
    used = leave(workload(1, **claim, **mine, **theirs), "me", 1000)
    assert used.replicas is None and scaling.CLAIM not in used.annotations
    assert list(used.others) == ["they"]
    dead = leave(workload(1, **claim, **mine, **theirs), "me", 991 + EXPIRY)
    assert (dead.replicas, dead.annotations[scaling.USER + "they"]) == (0, None)


def test_E5_nonsense_in_annotations_harms_nobody() -> None:
    odd = {scaling.CLAIM: "{", scaling.USER + "they": "soon", "other": "x"}
    assert leave(workload(1, **odd), "me", 1000).replicas is None
    assert leave({}, "me", 1000).replicas is None
    assert enter(workload(0, **odd), TARGET, "me", 1000).replicas == 1


# ----------------------------------------------------------------------------------------------- several gateways
async def test_E5_two_gateways_never_flap(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    """Twenty of them come and go as they like: it goes up once, and down when the last has gone."""
    store = Store()
    store.put(TARGET.path, workload(0))
    seen: list[int] = []
    store.on_change = lambda path, found: seen.append(found["spec"]["replicas"]) if path == TARGET.path else None
    most = 0
    inside = 0

    async def gateway(number: int) -> None:
        nonlocal inside, most
        await trio.sleep(number * 0.3)
        each = scaler(store, f"gateway-{number}")
        await each.enter(quiet)
        inside += 1
        most = max(most, inside)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(each.beat)
            await trio.sleep(100)
            nursery.cancel_scope.cancel()
        inside -= 1
        await each.leave()

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(gateway, number)
    assert most == 20
    assert [now for now, before in zip(seen, [None, *seen], strict=False) if now != before] == [1, 0]
    assert store.objects[TARGET.path]["metadata"]["annotations"] == {}
    assert store.objects[LEASE]["spec"]["holderIdentity"] == ""


async def test_E5_a_gateway_begins_while_another_takes_it_down(
    autojump_clock: trio.testing.MockClock, wall: None
) -> None:
    """However their requests fall between each other, who uses it finds it up."""
    for shift in range(12):
        store = Store()
        store.put(TARGET.path, workload(0))
        first, second = scaler(store, f"first-{shift}"), scaler(store, f"second-{shift}")
        await first.enter(quiet)

        async def later(seconds: float, act: Callable[[], Any]) -> None:
            await trio.sleep(seconds)
            await act()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.leave)
            nursery.start_soon(later, shift * 0.01, lambda: second.enter(quiet))  # noqa: B023
        assert store.objects[TARGET.path]["spec"]["replicas"] == 1, shift
        await second.leave()
        assert store.objects[TARGET.path]["spec"]["replicas"] == 0, shift


async def test_E5_a_hand_that_changes_it_meanwhile_wins(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    each = scaler(store, "me")
    await each.enter(quiet)
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    by_hand = store.objects[TARGET.path]
    store.put(TARGET.path, {**by_hand, "spec": {"replicas": 3}})
    await each.leave()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 3
    # And from now on it is theirs: back at one, it is not taken down either.
    store.put(TARGET.path, {**store.objects[TARGET.path], "spec": {"replicas": 1}})
    await each.enter(quiet)
    await each.leave()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1


async def test_E5_units_of_one_gateway_are_one_user(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    units = [scaler(store, "me") for _ in range(5)]
    async with trio.open_nursery() as nursery:
        for unit in units:
            nursery.start_soon(unit.enter, quiet)
    for unit in units[1:]:
        await unit.leave()
        assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    await units[0].leave()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 0


async def test_E5_use_is_said_again_at_a_bounded_rate(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    units = [scaler(store, "me") for _ in range(5)]
    for unit in units:
        await unit.enter(quiet)
    store.asked.clear()
    async with trio.open_nursery() as nursery:
        for unit in units:
            nursery.start_soon(unit.beat)
        await trio.sleep(600)
        nursery.cancel_scope.cancel()
    assert 600 / REFRESH - 2 <= len(store.asked) <= 600 / REFRESH + 1
    stamp = float(store.objects[TARGET.path]["metadata"]["annotations"][scaling.USER + "me"])
    assert 1_000_000 + trio.current_time() - stamp <= REFRESH + 1


# ------------------------------------------------------------------------------------------------------- the killed
async def test_P7_what_a_killed_gateway_left_up_goes_down_when_a_later_one_sweeps(
    autojump_clock: trio.testing.MockClock, wall: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(OUTSIDE)
    store.put(TARGET.path, workload(0))
    killed = scaler(store, "killed")
    await killed.enter(quiet)
    opened: list[tuple[str | None, str]] = []

    @asynccontextmanager
    async def open_cluster(context: str | None, environ: Mapping[str, str]) -> AsyncIterator[Any]:
        opened.append((context, environ["KUBECONFIG"]))
        yield store

    monkeypatch.setattr("gateway.runtimes.kubernetes.api.open_cluster", open_cluster)
    assert "\n" not in killed.where
    await k8s_service.sweep(killed.where, "killed", {})
    assert store.objects[TARGET.path]["spec"]["replicas"] == 0
    assert opened == [("dev", "/home/u/.kube/config")]
    # Again, and of a workload that is gone: nothing to do, nothing wrong.
    await k8s_service.sweep(killed.where, "killed", {})
    del store.objects[TARGET.path]
    await k8s_service.sweep(killed.where, "killed", {})
    store.down = True
    with pytest.raises(StartFailed, match="can't be reached"):
        await k8s_service.sweep(killed.where, "killed", {})
    with pytest.raises(StartFailed, match="can't be read"):
        await k8s_service.sweep("nonsense", "killed", {})


async def test_P7_sweeping_leaves_what_another_still_uses(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    killed, alive = scaler(store, "killed"), scaler(store, "alive")
    await killed.enter(quiet)
    await alive.enter(quiet)
    await scaler(store, "killed").clear()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    await alive.leave()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 0


async def test_P7_another_replica_takes_down_what_a_dead_one_used(
    autojump_clock: trio.testing.MockClock, wall: None
) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    killed, alive = scaler(store, "killed"), scaler(store, "alive")
    await alive.enter(quiet)
    await killed.enter(quiet)  # and is never heard of again
    await alive.leave()
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    await trio.sleep(EXPIRY / 2)
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    await trio.sleep(EXPIRY)
    assert store.objects[TARGET.path]["spec"]["replicas"] == 0


async def test_P7_a_lease_that_a_dead_gateway_holds_ends(autojump_clock: trio.testing.MockClock, wall: None) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    spec = {"holderIdentity": "dead", "leaseDurationSeconds": LEASE_SECONDS, "renewTime": "2020-01-01T00:00:00.000000Z"}
    store.put(LEASE, {"spec": spec})
    said: list[str] = []
    began = trio.current_time()
    await scaler(store, "me").enter(said.append)
    assert LEASE_SECONDS <= trio.current_time() - began <= LEASE_SECONDS + 2
    assert "waiting for another gateway (dead) to finish scaling" in said
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1


async def test_RB63_conflicts_with_the_controllers_are_tried_again(
    autojump_clock: trio.testing.MockClock, wall: None
) -> None:
    """The Deployment controller writes its status just when we patch."""
    store = Store()
    store.put(TARGET.path, workload(0))
    left = 5
    get = store.get

    async def get_and_change(path: str, params: Any = None, **more: Any) -> Object:
        nonlocal left
        found = await get(path, params, **more)
        if path == TARGET.path and left:
            left -= 1
            store.put(path, store.objects[path])
        return found

    store.get = get_and_change  # type: ignore[method-assign]
    await scaler(store, "me").enter(quiet)
    assert store.objects[TARGET.path]["spec"]["replicas"] == 1
    left = 1000
    with pytest.raises(StartFailed, match="Deployment 'app' could not be changed"):
        await scaler(store, "you").enter(quiet)


async def test_a_failed_beat_is_only_logged(
    autojump_clock: trio.testing.MockClock, wall: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.put(TARGET.path, workload(0))
    each = scaler(store, "me")
    await each.enter(quiet)
    store.down = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(each.beat)
        await trio.sleep(REFRESH * 2.5)
        store.down = False
        await trio.sleep(REFRESH)
        nursery.cancel_scope.cancel()
    assert "does not know that it is used" in caplog.text
    stamp = float(store.objects[TARGET.path]["metadata"]["annotations"][scaling.USER + "me"])
    assert 1_000_000 + trio.current_time() - stamp <= REFRESH + 1


# -------------------------------------------------------------------------------------------------------- the ways
@pytest.mark.parametrize(
    ("may", "scheme", "headers", "via"),
    [
        ({"create pods/proxy", "get pods/proxy", "get pods/portforward"}, "http", (), "port-forward"),
        ({"get pods/portforward"}, "https", (("Authorization", "x"),), "port-forward"),
        ({"create pods/proxy", "get pods/proxy", "create services/proxy"}, "http", (), "pod proxy of the API"),
        ({"create pods/proxy", "create services/proxy"}, "http", (), "service proxy of the API"),
        ({"create services/proxy"}, "http", (), "service proxy of the API"),
    ],
)
async def test_K27_from_outside_the_way_follows_from_rights_and_needs(
    may: set[str], scheme: str, headers: tuple[tuple[str, str], ...], via: str
) -> None:
    store = Store(OUTSIDE)
    store.may = may
    route = await choose_route(store, "ns", "x", "http", scheme, headers)  # type: ignore[arg-type]
    assert route.via == via


async def test_K27_inside_pods_are_reached_at_their_addresses() -> None:
    store = Store(IN_POD)
    route = await choose_route(store, "ns", "x", "http", "https", ())  # type: ignore[arg-type]
    assert type(route) is DirectRoute and store.asked == []
    request = httpx.Request("POST", "https://x.ns.svc:443/mcp?a=1", content=b"{}")
    moved = route.aim(request, Endpoint("fd00::7", 8443, "pod-1", "u"))
    assert str(moved.url) == "https://[fd00::7]:8443/mcp?a=1"
    assert (moved.headers["host"], moved.extensions["sni_hostname"]) == ("x.ns.svc", "x.ns.svc")


async def test_K27_without_any_right_the_missing_ones_are_named() -> None:
    store = Store(OUTSIDE)
    with pytest.raises(StartFailed, match=r"get pods/portf.*, or create and get pods/proxy, or create services/proxy"):
        await choose_route(store, "ns", "x", "http", "http", ())  # type: ignore[arg-type]
    store.may = {"create pods/proxy", "get pods/proxy", "create services/proxy"}
    for scheme, headers in (("https", ()), ("http", (("authorization", "x"),))):
        with pytest.raises(StartFailed, match=r"the right to get pods/portforward in namespace 'ns'"):
            await choose_route(store, "ns", "x", "http", scheme, headers)  # type: ignore[arg-type]
    with pytest.raises(StartFailed, match=r"the right to get pods/portforward in namespace 'ns' \(context 'dev'"):
        await choose_route(store, "ns", "x", "http", "https", ())  # type: ignore[arg-type]


async def test_K27_the_api_s_proxy_is_asked_for_one_pod() -> None:
    request = httpx.Request("POST", "http://x.ns.svc:80/mcp?a=1", headers={"mcp-session-id": "s"}, content=b"{}")
    pod = Endpoint("10.0.0.7", 8000, "pod-1", "u")
    moved = ProxyRoute(Store(OUTSIDE), "ns").aim(request, pod)  # type: ignore[arg-type]
    assert str(moved.url) == "https://127.0.0.1:6443/api/v1/namespaces/ns/pods/pod-1%3A8000/proxy/mcp?a=1"
    assert (moved.headers["host"], moved.headers["mcp-session-id"]) == ("127.0.0.1:6443", "s")
    moved = ProxyRoute(Store(OUTSIDE), "ns", "x", "http").aim(request, pod)  # type: ignore[arg-type]
    assert "/services/x%3Ahttp/proxy/mcp?a=1" in str(moved.url)


async def test_K27_the_api_s_own_words_are_not_the_server_s() -> None:
    route = ProxyRoute(Store(OUTSIDE), "ns")  # type: ignore[arg-type]

    def answer(status: int, body: Object) -> httpx.Response:
        return httpx.Response(status, json=body, request=httpx.Request("POST", "http://x/"))

    own = await route.judge(answer(404, {"jsonrpc": "2.0", "error": {"code": -32001}}))
    assert (own.status_code, json.loads(await own.aread())["error"]["code"]) == (404, -32001)

    def status(code: int, said: str) -> httpx.Response:
        return answer(code, {"kind": "Status", "apiVersion": "v1", "message": said, "code": code})

    with pytest.raises(httpx.ConnectError, match="Kubernetes says: error trying to reach service: dial tcp"):
        await route.judge(status(503, "error trying to reach service: dial tcp 10.0.0.7:80: connection refused"))
    with pytest.raises(httpx.ConnectError, match='pods "pod-1" not found'):
        await route.judge(status(404, 'pods "pod-1" not found'))
    with pytest.raises(httpx.ReadError, match="EOF"):
        await route.judge(status(502, "error trying to reach service: EOF"))


class FakeSocket:
    """A WebSocket's frames, in and out."""

    def __init__(self, *frames: list[tuple[int, bytes]]) -> None:
        self.frames = list(frames)
        self.sent = b""
        self.messages = 0
        self.full = False

    async def receive(self) -> list[tuple[int, bytes]]:
        await trio.lowlevel.checkpoint()
        if not self.frames:
            raise Broken("the API closed the connection")
        return self.frames.pop(0)

    def send_nowait(self, opcode: int, *parts: bytes) -> None:
        assert opcode == BINARY and parts[0] == b"\0"
        self.sent += b"".join(bytes(part) for part in parts[1:])
        self.messages += 1

    def close(self) -> None:
        pass


async def test_K27_forwarded_frames_become_one_stream() -> None:
    socket = FakeSocket(
        [(BINARY, b"\0\x40\x1f"), (BINARY, b"\1\x40\x1f")],  # the port, on both channels
        [(BINARY, b"\0HTTP/1.1 200"), (CONTINUATION, b" OK\r\n")],
        [(BINARY, b"\0\r\n")],
    )
    stream = _Forwarded(socket)  # type: ignore[arg-type]
    got = b""
    while piece := await stream.receive_some(5):
        got += piece
    assert got == b"HTTP/1.1 200 OK\r\n\r\n"
    # What is little goes with what follows, at the latest when an answer is waited for.
    await stream.send_all(b"head ")
    await stream.send_all(b"body")
    assert socket.sent == b""
    await stream.receive_some()
    assert (socket.sent, socket.messages) == (b"head body", 1)
    await stream.send_all(b"x" * 200_000)
    assert socket.sent == b"head body" + b"x" * 200_000


async def test_K27_nobody_listens_at_a_forwarded_port() -> None:
    socket = FakeSocket(
        [(BINARY, b"\0\x40\x1f"), (BINARY, b"\1\x40\x1f"), (BINARY, b"\1error forwarding port 8000: refused")]
    )
    with pytest.raises(trio.BrokenResourceError, match="error forwarding port 8000: refused"):
        await _Forwarded(socket).receive_some()  # type: ignore[arg-type]


def test_private_names_that_are_used_exist() -> None:
    assert httpcore.AsyncConnectionPool and issubclass(ForwardRoute, DirectRoute)
    assert hasattr(httpx.AsyncHTTPTransport(verify=False), "_pool")


# ------------------------------------------------------------------------------------------------------ the whole
SPEC = K8sServiceSpec("ns", "x", 80, scale=Scale("Deployment", "app"))
ENDPOINTS = "/api/v1/namespaces/ns/endpoints/x"
READY = {"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 8000}]}]}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A cluster with the Service, its workload at zero, and a controller that needs 5 seconds for a pod."""
    made = Store()
    made.put("/api/v1/namespaces/ns/services/x", {"spec": {"ports": [{"port": 80, "targetPort": 8000}]}})
    made.put(TARGET.path, workload(0))
    made.put(ENDPOINTS, {})

    @asynccontextmanager
    async def open_cluster(context: str | None, environ: Mapping[str, str]) -> AsyncIterator[Any]:
        yield made

    monkeypatch.setattr("gateway.runtimes.kubernetes.api.open_cluster", open_cluster)
    return made


async def controller(store: Store) -> None:
    up = 0
    while True:
        wanted = store.objects[TARGET.path]["spec"]["replicas"]
        if wanted != up:
            await trio.sleep(5)
            up = wanted
            store.put(ENDPOINTS, READY if up else {})
        await store.changed.wait()


async def test_E5_open_brings_it_up_tells_why_it_waits_and_takes_it_down(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store
) -> None:
    said: list[str] = []
    surroundings = Surroundings("s", {}, progress=lambda text, extend=False: said.append(text))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller, store)
        async with open_service(SPEC, surroundings) as origin:
            assert trio.current_time() >= 5
            assert origin.starting and origin.url == "http://x.ns.svc:80/mcp"
            assert origin.details["via"] == "pod address" and origin.details["pods"] == ["10.0.0.1:8000"]
            assert json.dumps(dict(origin.details)) and origin.remark() == ""
            assert store.objects[TARGET.path]["spec"]["replicas"] == 1
        assert store.objects[TARGET.path]["spec"]["replicas"] == 0
        nursery.cancel_scope.cancel()
    assert said[0] == "scaling Deployment 'app' from 0 to 1"
    assert "waiting for Deployment 'app': 0 of 1 pods ready" in said


async def test_E5_a_start_that_is_given_up_leaves_nothing_up(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store
) -> None:
    for seconds in (0.005, 0.035, 0.06, 0.065, 0.085, 0.2, 3.0, 60.0):
        with trio.move_on_after(seconds) as scope:
            async with open_service(SPEC, Surroundings("s", {})):
                raise AssertionError("no pod ever comes")
        assert scope.cancelled_caught
        found = store.objects[TARGET.path]
        assert (found["spec"]["replicas"], found["metadata"]["annotations"]) == (0, {}), seconds


async def test_E6_all_pods_gone_is_told_when_nobody_waits_for_an_answer(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store
) -> None:
    store.put(ENDPOINTS, READY)
    spec = K8sServiceSpec("ns", "x", 80)
    async with open_service(spec, Surroundings("s", {})) as origin:
        assert origin.ended is not None and not origin.starting
        with trio.move_on_after(100) as waited:
            await origin.ended()
        assert waited.cancelled_caught
        store.put(ENDPOINTS, {})
        began = trio.current_time()
        assert await origin.ended() == "Service 'x' in namespace 'ns' has no pods any more"
        assert trio.current_time() - began < 1
        assert origin.remark() == "there are no pods"


async def test_K27_sessions_that_can_not_stay_at_a_pod_are_warned_about_once(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.access, store.may = OUTSIDE, {"create services/proxy"}
    store.put(ENDPOINTS, READY)
    two = {"subsets": [{"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}], "ports": [{"port": 8000}]}]}
    async with open_service(K8sServiceSpec("ns", "x", 80), Surroundings("s", {})):
        await trio.sleep(1)
        assert "several pods" not in caplog.text
        for body in (two, READY, two):
            store.put(ENDPOINTS, body)
            await trio.sleep(1)
    assert caplog.text.count("has several pods") == 1
    assert "Service 'x' in namespace 'ns', reached by the service proxy of the API" in caplog.text


async def test_K27_what_is_wrong_is_one_error_with_a_name(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store
) -> None:
    async def failure(spec: K8sServiceSpec) -> str:
        with pytest.raises(StartFailed) as caught:
            async with open_service(spec, Surroundings("s", {})):
                raise AssertionError("it opened")
        return caught.value.message

    assert "has no pods: is its workload scaled to zero" in await failure(K8sServiceSpec("ns", "x", 80))
    assert "has no port 81; it has 80" in await failure(K8sServiceSpec("ns", "x", 81))
    assert "NotFound" in await failure(K8sServiceSpec("ns", "y", 80))
    assert "NotFound" in await failure(K8sServiceSpec("ns", "x", 80, scale=Scale("StatefulSet", "none")))
    secret = Secret("${PATH_OF_IT}", "mcp")
    assert "path must begin with /" in await failure(K8sServiceSpec("ns", "x", 80, path=secret))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"namespace": "No"}, "namespace: 'No' is no name of a namespace"),
        ({"service_name": "a.b"}, "service_name: 'a.b' is no name of a Service"),
        ({"port": 0}, "port must be between 1 and 65535, or a port's name"),
        ({"port": "a_b"}, "port must be between 1 and 65535, or a port's name"),
        ({"path": "mcp"}, "path must begin with /"),
        ({"path": "/m cp"}, "path must begin with /"),
        ({"headers": StringMap((("Host\n", "x"),))}, "is no valid HTTP header name"),
    ],
)
def test_K27_mistakes_in_the_catalog_are_told_when_it_is_read(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("/", "\\/")):
        K8sServiceSpec(**{"namespace": "ns", "service_name": "x", "port": 80, **keys})
    assert K8sServiceSpec("ns", "x", "http-1", path="/a/b?c=d").port == "http-1"
    with pytest.raises(ValueError, match="is no name of a Deployment"):
        Scale("Deployment", "A b")
    with pytest.raises(ValueError, match="min must be at least 0"):
        Scale("Deployment", "a", 2, 1)


async def test_E7_no_cluster_is_one_error_that_names_what_was_tried(tmp_path: Any) -> None:
    environ = {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")}
    with pytest.raises(StartFailed, match=r"none does not exist") as caught:
        async with open_service(SPEC, Surroundings("s", {}, environ=environ)):
            raise AssertionError("it opened")
    assert "KUBERNETES_SERVICE_HOST is not set" in caught.value.message


async def test_faults_inside_the_block_come_out_as_they_are(
    autojump_clock: trio.testing.MockClock, wall: None, store: Store
) -> None:
    store.put(ENDPOINTS, READY)
    with pytest.raises(LookupError, match="mine"):
        async with open_service(SPEC, Surroundings("s", {})):
            raise LookupError("mine")
    assert store.objects[TARGET.path]["spec"]["replicas"] == 0


async def test_endpoints_follow_the_cluster(autojump_clock: trio.testing.MockClock, store: Store) -> None:
    followed = Endpoints(store, "ns", "x", "")  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(followed.run)
        assert followed.all == ()
        for body, ready in ((READY, 1), ({}, 0), (READY, 1)):
            changed = followed.changed
            store.put(ENDPOINTS, body)
            with trio.fail_after(5):
                await changed.wait()
            assert len(followed.ready) == ready
        nursery.cancel_scope.cancel()


def test_wall_time_is_what_annotations_hold() -> None:
    made = enter(workload(0), TARGET, "me", time.time())
    assert abs(float(made.annotations[scaling.USER + "me"] or 0) - time.time()) < 5
