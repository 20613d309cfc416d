"""Kubernetes' API client over a real socket, against a scripted API: requests, retries, watches (RB63)."""

from __future__ import annotations

import gc
import json
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import trio
import trio.testing

from gateway.errors import StartFailed
from gateway.runtimes.kubernetes.access import Access
from gateway.runtimes.kubernetes.api import Cluster, Refused, Unreachable, on_cluster, path_of
from tests.fixtures.fake_kube import hang_up, status
from tests.fixtures.http_scripted import Answer, Hangup, Request, Server, serve

TLS = Path(__file__).parents[1] / "fixtures" / "tls"
PODS = path_of("mcp", "pods")


class Api:
    """A scripted API: ``answers`` are used up one a request, and what follows is ``otherwise``."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.times: list[float] = []
        self.queries: list[dict[str, str]] = []

    async def __call__(self, request: Request, answer: Answer) -> None:
        self.times.append(trio.current_time())
        self.queries.append(dict(parse_qsl(urlsplit(request.target).query)))
        if not self.answers:
            await trio.sleep_forever()
        given = self.answers.pop(0)
        if callable(given):
            await given(request, answer)
        else:
            await answer.json(given)


def events(*lines: Any, cut: bool = False) -> Any:
    """A watch that says this much and ends, in good order or not."""

    async def give(request: Request, answer: Answer) -> None:
        await answer.start_stream(kind="application/json")
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        for at in range(0, len(data), 37):  # never line by line
            await answer.chunk(data[at : at + 37])
        if not cut:
            await answer.end()

    return give


def pod(name: str, version: int, **fields: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}, **fields}


def pods(*items: dict[str, Any], version: int) -> dict[str, Any]:
    return {"kind": "PodList", "metadata": {"resourceVersion": str(version)}, "items": list(items)}


@asynccontextmanager
async def scripted(*answers: Any) -> AsyncIterator[tuple[Cluster, Api, Server]]:
    api = Api(*answers)
    async with serve(api) as server, on_cluster(Access(server.url(""), "mcp", "a test"), {}) as cluster:
        with trio.fail_after(30):
            yield cluster, api, server


# ------------------------------------------------------------------------------------------------------------ requests
async def test_K24_objects_are_made_read_changed_and_deleted() -> None:
    async with scripted({"a": 1}, pod("x", 1), {"c": 3}, {"d": 4}, {"e": 5}) as (cluster, _, server):
        assert await cluster.create(PODS, {"kind": "Pod"}) == {"a": 1}
        assert await cluster.get(path_of("mcp", "pods", "x")) == pod("x", 1)
        await cluster.replace(path_of("mcp", "pods", "x"), {"kind": "Pod"})
        await cluster.patch(path_of("mcp", "deployments", "d", "scale", group="apps/v1"), {"spec": {"replicas": 1}})
        assert await cluster.delete(path_of("mcp", "pods", "x"), uid="u", propagation="Foreground", grace=3)
    lines = [(r.method, r.target) for r in server.seen]
    assert lines == [
        ("POST", "/api/v1/namespaces/mcp/pods"),
        ("GET", "/api/v1/namespaces/mcp/pods/x"),
        ("PUT", "/api/v1/namespaces/mcp/pods/x"),
        ("PATCH", "/apis/apps/v1/namespaces/mcp/deployments/d/scale"),
        ("DELETE", "/api/v1/namespaces/mcp/pods/x"),
    ]
    assert server.seen[3].headers["content-type"] == "application/merge-patch+json"
    assert server.seen[4].json == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": "u"},
        "gracePeriodSeconds": 3,
    }


async def test_a_request_cancelled_while_it_is_sent_leaves_nothing_to_the_collector() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    address = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    body = {"kind": "Secret", "data": {"x": "y" * 30_000_000}}  # more than any socket's buffer holds
    async with listener, on_cluster(Access(address, "mcp", "a test"), {}) as cluster:
        with trio.move_on_after(0.3) as scope:
            await cluster.create(PODS, body)
        assert scope.cancelled_caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
        await trio.testing.wait_all_tasks_blocked()
    assert [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)] == []


async def test_K24_what_is_gone_or_somebody_elses_is_not_deleted() -> None:
    async with scripted(status(404, "NotFound"), status(409, "Conflict"), status(403, "Forbidden")) as (cluster, _, _):
        assert not await cluster.delete(path_of("mcp", "pods", "x"))
        assert not await cluster.delete(path_of("mcp", "pods", "x"), uid="mine")
        with pytest.raises(Refused, match="Forbidden"):
            await cluster.delete(path_of("mcp", "pods", "x"))


async def test_K24_a_refusal_says_what_kubernetes_said() -> None:
    said = 'pods "x" is forbidden: exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1'
    async with scripted(status(403, "Forbidden", said)) as (cluster, _, server):
        with pytest.raises(Refused) as caught:
            await cluster.create(PODS, {})
    error = caught.value
    assert (error.http_status, error.reason, error.said) == (403, "Forbidden", said)
    assert error.message == (
        f"Kubernetes (a test, {server.url('')}) refused POST /api/v1/namespaces/mcp/pods: {said} (403 Forbidden)"
    )


def test_K28_failures_can_be_told_to_every_waiter_anew() -> None:
    """As the supervisor does with a start's failure."""
    for failure in (Refused("no", 403, "Forbidden", "no"), Unreachable("away", sent=True)):
        again = type(failure)(failure.message, retry_after=2.0)
        assert (again.message, again.retry_after, again.status) == (failure.message, 2.0, 502)


async def test_RB63_429_waits_as_long_as_it_says_whatever_the_request() -> None:
    busy = status(429, "TooManyRequests", headers={"retry-after": "1"})
    async with scripted(busy, {"made": True}) as (cluster, api, _):
        assert await cluster.create(PODS, {}) == {"made": True}
        assert api.times[1] - api.times[0] >= 1


async def test_RB63_429_that_asks_for_too_long_is_an_error_at_once() -> None:
    busy = status(429, "TooManyRequests", "come tomorrow", headers={"retry-after": "86400"})
    async with scripted(busy) as (cluster, api, _):
        with pytest.raises(Refused, match="come tomorrow"):
            await cluster.get(PODS)
        assert len(api.times) == 1


async def test_RB63_nothing_is_made_twice() -> None:
    """What may have been carried out is not repeated: the caller has to look."""
    for failure in (status(500, "InternalError"), hang_up):
        async with scripted(failure) as (cluster, api, _):
            with pytest.raises((Refused, Unreachable)) as caught:
                await cluster.create(PODS, {})
            assert len(api.times) == 1
            if failure is hang_up:
                assert isinstance(caught.value, Unreachable) and caught.value.sent


async def test_RB63_reading_is_repeated_for_a_while() -> None:
    async with scripted(status(500, "InternalError"), hang_up, {"here": True}) as (cluster, _, _):
        assert await cluster.get(PODS) == {"here": True}


async def test_K28_nobody_there_is_told_with_the_place_that_was_tried() -> None:
    async with scripted() as (cluster, _, server):
        await server.stop()
        with pytest.raises(Unreachable, match=r"\(a test, http://127.0.0.1:\d+\) can't be reached: connection refused"):
            await cluster.create(PODS, {}, patience=0.5)


async def test_K24_html_and_endless_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def html(request: Request, answer: Answer) -> None:
        await answer.send(200, b"<html>please log in</html>", "text/html")

    async with scripted(html, {"x": "y" * 2000}) as (cluster, _, _):
        with pytest.raises(Unreachable, match="no JSON object"):
            await cluster.get(PODS, patience=0)
        monkeypatch.setattr("gateway.runtimes.kubernetes.api.MAX_ANSWER", 1000)
        with pytest.raises(Unreachable, match="over 1000 bytes"):
            await cluster.get(PODS, patience=0)


async def test_K24_lists_come_in_pages() -> None:
    first = {"metadata": {"resourceVersion": "5", "continue": "abc"}, "items": [pod("a", 1)]}
    async with scripted(first, pods(pod("b", 2), version=5)) as (cluster, api, _):
        found, version = await cluster.list_all(PODS, {"labelSelector": "a=b,c"})
    assert [each["metadata"]["name"] for each in found] == ["a", "b"]
    assert version == "5"
    assert api.queries[1] == {"limit": "500", "continue": "abc", "labelSelector": "a=b,c"}


# ----------------------------------------------------------------------------------------------------------------- TLS
async def test_K24_tls_is_checked_against_the_clusters_own_authority() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    async with serve(Api({"ok": 1}, {"ok": 2}), tls=context) as server:
        good = Access(server.url(""), "mcp", "a test", ca=(TLS / "ca.pem").read_text())
        async with on_cluster(good, {}) as cluster:
            assert await cluster.get(PODS) == {"ok": 1}
        async with on_cluster(Access(server.url(""), "mcp", "a test"), {}) as cluster:
            with pytest.raises(Unreachable, match="TLS certificate refused: unable to get local issuer"):
                await cluster.get(PODS, patience=0)
        async with on_cluster(Access(server.url(""), "mcp", "a test", insecure=True), {}) as cluster:
            assert await cluster.get(PODS) == {"ok": 2}


async def test_P7_giving_up_in_a_handshake_leaves_no_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        access = Access(f"https://127.0.0.1:{deaf.getsockname()[1]}", "mcp", "a test")
        async with on_cluster(access, {}) as cluster:
            before = set(os.listdir("/proc/self/fd"))
            for ask in (cluster.get(PODS), cluster.upgrade(PODS, [], ["v5"])):
                with trio.move_on_after(0.3) as scope:
                    await ask
                assert scope.cancelled_caught
            assert set(os.listdir("/proc/self/fd")) == before


async def test_K24_through_a_proxy() -> None:
    """An ordinary one, which is asked to connect; both ways of ours to the API go through it."""
    asked = []

    async def api(request: Request, answer: Answer) -> None:
        await answer.json({"here": True})

    async def proxy(request: Request, answer: Answer) -> None:
        asked.append((request.method, request.target, request.headers.get("proxy-authorization")))
        host, _, port = request.target.partition(":")
        there = await trio.open_tcp_stream(host, int(port))
        await answer.raw(b"HTTP/1.1 200 Connected\r\n\r\n")

        async def pump(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            while data := await source.receive_some():
                await sink.send_all(data)
            nursery.cancel_scope.cancel()

        async with there, trio.open_nursery() as nursery:
            nursery.start_soon(pump, there, answer.stream)
            await pump(answer.stream, there)
        raise Hangup

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    async with serve(api, tls=context) as server, serve(proxy) as between:
        through = f"http://me:pw@127.0.0.1:{between.port}"
        access = Access(server.url(""), "mcp", "a test", ca=(TLS / "ca.pem").read_text(), proxy=through)
        async with on_cluster(access, {}) as cluster:
            assert await cluster.get(PODS) == {"here": True}
            with pytest.raises(Refused, match="200"):
                await cluster.upgrade(PODS, [], ["v5"])
    assert asked == [("CONNECT", f"127.0.0.1:{server.port}", "Basic bWU6cHc=")] * 2
    with pytest.raises(StartFailed, match="only http:// proxies can be used, not socks5://"):
        async with on_cluster(Access("https://k", "mcp", "a test", proxy="socks5://p:1"), {}):
            pass


async def test_K24_a_broken_authority_is_named() -> None:
    with pytest.raises(StartFailed, match="a test: the certificate authority can't be used"):
        async with on_cluster(Access("https://127.0.0.1:1", "mcp", "a test", ca="nonsense"), {}):
            pass


# --------------------------------------------------------------------------------------------------------------- watch
class Told:
    """What a watch has said."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.troubles: list[str] = []
        self.news = trio.Event()

    def event(self, kind: str, found: dict[str, Any]) -> None:
        self.events.append((kind, found.get("metadata", {}).get("name", "")))
        self._wake()

    def trouble(self, text: str) -> None:
        if not self.troubles or self.troubles[-1] != text:
            self.troubles.append(text)
        self._wake()

    def _wake(self) -> None:
        news, self.news = self.news, trio.Event()
        news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.news.wait()


@asynccontextmanager
async def watching(*answers: Any) -> AsyncIterator[tuple[Told, Api, Server]]:
    async with scripted(*answers) as (cluster, api, server), trio.open_nursery() as nursery:
        told = Told()

        async def watch() -> None:
            await cluster.watch(PODS, told.event, {"labelSelector": "x=y"}, on_trouble=told.trouble)

        nursery.start_soon(watch)
        yield told, api, server
        nursery.cancel_scope.cancel()


def change(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": found}


GONE = change("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})


async def test_RB63_a_watch_goes_on_where_the_last_one_ended() -> None:
    async with watching(
        pods(pod("a", 1), version=10),
        events(change("MODIFIED", pod("a", 11)), change("BOOKMARK", pod("", 15))),
        events(change("ADDED", pod("b", 16)), cut=True),
        events(change("DELETED", pod("a", 17))),
    ) as (told, api, server):
        await told.until(lambda: ("DELETED", "a") in told.events)
        await server.until(lambda: len(server.seen) == 5)
    assert told.events == [("ADDED", "a"), ("SYNCED", ""), ("MODIFIED", "a"), ("ADDED", "b"), ("DELETED", "a")]
    assert [query.get("resourceVersion") for query in api.queries] == [None, "10", "15", "16", "17"]
    assert api.queries[1]["allowWatchBookmarks"] == api.queries[1]["watch"] == "true"
    assert all(query["labelSelector"] == "x=y" for query in api.queries)
    assert told.troubles == [""]


@pytest.mark.parametrize(
    "expired",
    [events(GONE), status(410, "Expired"), status(504, "Timeout", "Too large resource version: 99, current: 3")],
)
async def test_RB63_410_lists_again_and_misses_nothing(expired: Any) -> None:
    async with watching(
        pods(pod("a", 1), pod("b", 2), pod("c", 3), version=10),
        expired,
        pods(pod("a", 1), pod("c", 33), pod("d", 40), version=50),
        events(change("DELETED", pod("d", 51))),
    ) as (told, api, _):
        await told.until(lambda: ("DELETED", "d") in told.events)
    assert told.events[4:] == [
        ("DELETED", "b"),
        ("MODIFIED", "c"),
        ("ADDED", "d"),
        ("SYNCED", ""),
        ("DELETED", "d"),
    ]
    assert api.queries[3]["resourceVersion"] == "50"


async def test_RB63_a_watch_obeys_retry_after() -> None:
    async with watching(
        pods(version=1),
        status(429, "TooManyRequests", headers={"retry-after": "1"}),
        events(change("ADDED", pod("a", 2))),
    ) as (told, api, _):
        await told.until(lambda: ("ADDED", "a") in told.events)
    assert api.times[2] - api.times[1] >= 1


async def test_RB63_the_api_goes_away_and_comes_back() -> None:
    """Errors of all kinds between: told as they are, over when it works again, and nothing is missed."""
    async with watching(
        pods(pod("a", 1), version=1),
        hang_up,
        status(500, "InternalError", "etcd is away"),
        status(503, "ServiceUnavailable", "starting"),
        events(change("ERROR", {"code": 500, "message": "the cache is not ready"})),
        events(change("MODIFIED", pod("a", 2))),
    ) as (told, api, _):
        await told.until(lambda: ("MODIFIED", "a") in told.events)
    assert [query.get("resourceVersion") for query in api.queries[:6]] == [None, "1", "1", "1", "1", "1"]
    assert any("etcd is away" in text for text in told.troubles)
    assert any("the cache is not ready" in text for text in told.troubles)
    assert told.troubles[-1] == ""


async def test_RB63_a_watch_that_is_silently_dead_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runtimes.kubernetes.api.WATCH_SECONDS", 0)
    monkeypatch.setattr("gateway.runtimes.kubernetes.api.WATCH_SLACK", 0.3)

    async def silent(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.gone()

    async with watching(pods(version=1), silent, events(change("ADDED", pod("a", 2)))) as (told, _, _):
        await told.until(lambda: ("ADDED", "a") in told.events)


async def test_RB63_a_watch_that_always_ends_at_once_is_not_taken_up_all_the_time() -> None:
    async with watching(pods(version=1), *([events()] * 200)) as (_, api, _):
        await trio.sleep(1)
    assert len(api.times) < 12


async def test_RB63_nonsense_in_a_watch_ends_it_alone() -> None:
    async def nonsense(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.chunk(b"<html>\n")
        await answer.end()

    async with watching(pods(version=1), nonsense, events(change("ADDED", pod("a", 2)))) as (told, _, _):
        await told.until(lambda: ("ADDED", "a") in told.events)
    assert any("a watch event that is none" in text for text in told.troubles)
