"""HTTP+SSE of 2024-11-05, over real sockets, with a scripted router behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateway.downstream import http_sse
from gateway.downstream.server import ConnectionLimits
from gateway.errors import Forbidden, LinkLost, StartFailed
from gateway.exchange import Reply
from gateway.protocol.message import build_notification
from tests.downstream.legacy_kit import (
    FACTS,
    House,
    Question,
    Response,
    note,
    progress,
    rpc,
    served,
    tool,
    until,
)

OK = Reply.result('{"content":[]}')


class Wire:
    """A client's stream and the place it posts to."""

    def __init__(self, house: House, stream: Response, target: str, headers: dict[str, Any]) -> None:
        self.house = house
        self.stream = stream
        self.target = target
        self.headers = headers

    async def post(self, message: Any, status: int = 202) -> Response:
        response = await self.house.post(message, path=self.target, **self.headers)
        assert response.status == status
        return response

    async def next(self) -> Any:
        event = await self.stream.event()
        assert event is not None
        assert (event.event, event.id) == ("message", "")
        return event.json

    async def initialize(self, version: str = "2024-11-05") -> Any:
        await self.post(rpc("initialize", {"protocolVersion": version, "capabilities": {"roots": {}}}, 0))
        reply = await self.next()
        await self.post(note("notifications/initialized"))
        return reply


@asynccontextmanager
async def wired(house: House, path: str = "/servers/echo/sse", **headers: Any) -> AsyncIterator[Wire]:
    async with house.connect() as peer:
        stream = await peer.get(None, path, **headers)
        assert (stream.status, stream.is_stream) == (200, True)
        event = await stream.event()
        assert event is not None
        assert event.event == "endpoint"
        assert event.data.startswith(f"{path}{http_sse.MESSAGES}?session_id=")
        yield Wire(house, stream, event.data, headers)


@pytest.mark.parametrize("path", ["/servers/echo/sse", "/sse"])
@pytest.mark.parametrize("version", ["2024-11-05", "2025-06-18", "2025-11-25"])
async def test_H38_a_whole_conversation(path: str, version: str) -> None:
    async with served() as house, wired(house, path) as wire:
        reply = await wire.initialize(version)
        assert reply == {"jsonrpc": "2.0", "id": 0, "result": {**FACTS, "protocolVersion": version}}
        await wire.post(tool("x"))
        call = await house.router.call()
        assert call.exchange.target == ("echo" if path.startswith("/servers") else None)
        call.deliver(progress(1))
        assert (await wire.next())["params"]["progress"] == 1
        call.finish(OK)
        assert await wire.next() == {"jsonrpc": "2.0", "id": "x", "result": {"content": []}}
        await wire.post(rpc("ping", None, 2))
        assert await wire.next() == {"jsonrpc": "2.0", "id": 2, "result": {}}
        assert b"id: " not in wire.stream.raw
        assert b"retry" not in wire.stream.raw


async def test_replies_come_in_the_order_of_their_servers_and_posts_never_wait() -> None:
    async with served() as house, wired(house) as wire, house.connect() as peer:
        await wire.initialize()
        for id in (1, 2, 3):  # on one connection: none waits for the call before it
            response = await peer.post(tool(id), path=wire.target)
            await response.read()
            assert response.status == 202
        calls = [await house.router.call(index) for index in range(3)]
        for call in reversed(calls):
            call.finish(OK)
            await trio.testing.wait_all_tasks_blocked()
        assert [(await wire.next())["id"] for _ in range(3)] == [3, 2, 1]


async def test_before_initialize_only_ping_is_answered() -> None:
    async with served() as house, wired(house) as wire:
        await wire.post(tool(1))
        assert (await wire.next())["error"]["code"] == -32600
        await wire.post(rpc("ping", None, 2))
        assert (await wire.next())["result"] == {}
        await wire.post(note("notifications/roots/list_changed"))
        assert house.router.notified == []
        await wire.initialize()
        await wire.post(rpc("initialize", {}, 3))
        assert "already initialized" in (await wire.next())["error"]["message"]
        assert house.router.calls == []


async def test_a_failed_initialize_may_be_tried_again_on_the_same_stream() -> None:
    async with served() as house, wired(house) as wire:
        house.router.initialize_error = StartFailed("no such command: nope")
        await wire.post(rpc("initialize", {}, 0))
        reply = await wire.next()
        assert reply["error"]["code"] == -32603
        assert "no such command" in reply["error"]["message"]
        house.router.initialize_error = None
        assert (await wire.initialize())["result"]["serverInfo"] == FACTS["serverInfo"]


async def test_unknown_servers_sessions_and_missing_ids() -> None:
    async with served() as house, house.connect() as peer:
        response = await peer.get(None, "/servers/nope/sse")
        await response.read()
        assert (response.status, response.json["error"]["code"]) == (404, -32001)
        assert house.front.sessions == {}
        response = await peer.get(None, "/servers/echo/sse", accept="application/json")
        await response.read()
        assert response.status == 406
        response = await house.post(rpc("ping"), path="/servers/echo/sse/messages?session_id=nope")
        assert (response.status, response.json["error"]["code"]) == (404, -32001)
        response = await house.post(rpc("ping"), path="/servers/echo/sse/messages")
        assert response.status == 400


async def test_RB83_sessions_are_bound_to_principal_endpoint_and_transport() -> None:
    async with served() as house, wired(house, x_who="alice") as wire:
        await wire.initialize()
        unknown = await house.post(rpc("ping"), path="/servers/echo/sse/messages?session_id=nope", x_who="alice")
        _, _, session = wire.target.partition("session_id=")
        for path, who in (
            (wire.target, "bob"),
            (f"/servers/other/sse/messages?session_id={session}", "alice"),
            (f"/sse/messages?session_id={session}", "alice"),
        ):
            response = await house.post(rpc("ping"), path=path, x_who=who)
            assert (response.status, response.json) == (404, unknown.json)
        assert (await house.post(rpc("ping"), session, x_who="alice")).status == 404
        streamable = await house.open(x_who="alice")
        path = f"/servers/echo/sse/messages?session_id={streamable}"
        assert (await house.post(rpc("ping"), path=path, x_who="alice")).status == 404


async def test_RB20_a_closed_stream_cancels_its_calls_and_ends_the_session() -> None:
    async with served() as house:
        async with wired(house) as wire:
            await wire.initialize()
            await wire.post(tool(1))
            await wire.post(tool("2"))
            calls = [await house.router.call(index) for index in range(2)]
            question = Question("elicitation/create", 5)
            calls[0].deliver(question.ask)
            assert (await wire.next())["method"] == "elicitation/create"
            session, target = house.session, wire.target
            started = trio.current_time()
        await until(lambda: all(call.done for call in calls))
        assert trio.current_time() - started < 1
        assert sorted(map(str, (id for id, _ in house.router.link.cancelled))) == ["1", "2"]
        assert question.answers == [{"jsonrpc": "2.0", "id": 5, "result": {"action": "cancel"}}]
        assert house.router.closed == [session.client]
        assert (await house.post(rpc("ping"), path=target)).status == 404
        await until(lambda: house.front.sessions == {})


@pytest.mark.parametrize("message", [rpc("initialize", {"protocolVersion": "2024-11-05"}, 0), tool(1)])
async def test_RB20_what_a_stream_has_posted_last_starts_nothing_once_it_is_closed(message: Any) -> None:
    """The stream closes between a POST and the first turn of the task that answers it."""
    async with served() as house, wired(house) as wire:
        if message["method"] != "initialize":
            await wire.initialize()
        session, nursery, known = house.session, house.front.nursery, len(house.router.clients)
        assert nursery is not None

        class Closing:
            def start_soon(self, serve: Any, *arguments: Any) -> None:
                house.front.close(session)
                nursery.start_soon(serve, *arguments)

        house.front.nursery = Closing()  # type: ignore[assignment]
        await wire.post(message)
        await until(lambda: session.feed.owed == 0)
        assert (house.router.calls, len(house.router.clients)) == ([], known)
        assert await wire.stream.events() == []


async def test_A5_cancelled_notifications_cancel_on_the_stream_too() -> None:
    async with served() as house, wired(house) as wire:
        await wire.initialize()
        await wire.post(tool(1))
        call = await house.router.call()
        await wire.post(note("notifications/cancelled", {"requestId": "1"}))
        assert not call.done
        await wire.post(note("notifications/cancelled", {"requestId": 1, "reason": "no"}))
        reply = await wire.next()
        assert (reply["id"], reply["error"]["code"]) == (1, -32000)
        assert house.router.link.cancelled == [(1, "no")]


async def test_A5_questions_and_changes_travel_on_the_stream() -> None:
    async with served() as house, wired(house) as wire:
        early = Question("roots/list", "early")
        assert house.session.ask(early.ask)
        house.router.hub.publish("echo", "tools")
        assert (await wire.initialize())["id"] == 0  # nothing came before the reply to initialize
        found = [await wire.next() for _ in range(2)]
        by_method = {message["method"]: message for message in found}
        asked = by_method["roots/list"]
        assert "notifications/tools/list_changed" in by_method
        await wire.post({"jsonrpc": "2.0", "id": asked["id"], "result": {"roots": []}})
        assert early.answers == [{"jsonrpc": "2.0", "id": "early", "result": {"roots": []}}]

        await wire.post(tool(1))
        call = await house.router.call()
        inside = Question("sampling/createMessage", 8)
        call.deliver(inside.ask)
        asked = await wire.next()
        inside.ask.withdraw("too late")
        cancelled = await wire.next()
        assert cancelled["params"] == {"requestId": asked["id"], "reason": "too late"}
        house.session.notify(build_notification("notifications/message"))
        assert (await wire.next())["method"] == "notifications/message"
        call.finish(OK)
        assert (await wire.next())["id"] == 1


async def test_failures_are_answers_on_the_stream() -> None:
    async with served() as house, wired(house) as wire:
        await wire.initialize()
        await wire.post(tool(1))
        (await house.router.call()).fail(LinkLost("exited with code 9"))
        assert (await wire.next())["result"]["isError"] is True
        house.router.script["prompts/get"] = lambda exchange: Forbidden("not you")
        await wire.post(rpc("prompts/get", {}, 2))
        assert (await wire.next())["error"]["code"] == -32003


async def test_P3_a_bug_costs_one_request_only(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as house, wired(house) as wire:
        await wire.initialize()

        def bug(exchange: Any) -> None:
            raise ZeroDivisionError("inside")

        house.router.script["prompts/get"] = bug
        await wire.post(rpc("prompts/get", {}, 1))
        error = (await wire.next())["error"]
        assert (error["code"], error["message"]) == (-32603, "Internal error")
        assert "ZeroDivisionError" in caplog.text
        await wire.post(rpc("ping", None, 2))
        assert (await wire.next())["id"] == 2


async def test_RB27_batches_only_where_2025_03_26_was_agreed_on() -> None:
    async with served() as house:
        async with wired(house) as wire:
            await wire.initialize("2024-11-05")
            await wire.post([tool(1)], status=400)
        async with wired(house) as wire:
            await wire.post([rpc("initialize", {})], status=400)
            await wire.initialize("2025-03-26")
            await wire.post([tool(1), note("notifications/roots/list_changed"), rpc("ping", None, 2)])
            assert (await wire.next())["id"] == 2
            (await house.router.call()).finish(OK)
            assert (await wire.next())["id"] == 1


async def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_sse, "MAX_CALLS", 3)
    async with served() as house, wired(house) as wire:
        await wire.initialize()
        for id in range(1, 5):
            await wire.post(tool(id))
        reply = await wire.next()
        assert (reply["id"], reply["error"]["code"]) == (4, -32000)
        for index in range(3):
            (await house.router.call(index)).finish(OK)
            await wire.next()
        await wire.post(tool(5))
        (await house.router.call(3)).finish(OK)
        assert (await wire.next())["id"] == 5


async def test_G19_streams_count_as_sessions_and_get_comments(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served(max_sessions=1, session_idle_seconds=20) as house, wired(house) as wire:
        await wire.initialize()
        async with house.connect() as peer:
            refused = await peer.get(None, "/servers/echo/sse")
            assert refused.status == 503
            assert "retry-after" in refused.headers
        for count in range(1, 4):
            mock_clock.jump(15)
            while wire.stream.raw.count(b"\n: ") + wire.stream.raw.count(b"\n\n: ") < count:
                await wire.stream.chunk()
        assert len(house.front.sessions) == 1


async def test_RB21_a_stream_that_is_not_read_is_cut_and_its_calls_cancelled() -> None:
    async with served(ConnectionLimits(stall_seconds=0.4)) as house, house.connect() as peer:
        stream = await peer.get(None, "/sse")
        event = await stream.event()
        assert event is not None
        await house.post(rpc("initialize", {}), path=event.data)
        await house.post(tool(1), path=event.data)
        call = await house.router.call()
        await until(lambda: house.session.feed.reader is not None)
        for _ in range(12):
            house.session.notify(build_notification("notifications/message", '{"data":"%s"}' % ("x" * 1_000_000)))
        await until(lambda: call.done)
        assert house.front.sessions == {}


async def test_P6_shutdown_waits_for_the_calls_of_a_stream() -> None:
    async with served() as house, wired(house) as wire, wired(house) as idle:
        await wire.initialize()
        await wire.post(tool(1))
        call = await house.router.call()
        house.server.begin_shutdown()
        assert await idle.stream.event() is None
        await trio.testing.wait_all_tasks_blocked()
        assert not call.done
        call.finish(OK)
        assert (await wire.next())["id"] == 1
        assert await wire.stream.event() is None


async def test_http_1_0_streams_too() -> None:
    async with served() as house, house.connect() as peer:
        await peer.stream.send_all(b"GET /sse HTTP/1.0\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
        data = b""
        while b"\n\n" not in data.partition(b"\r\n\r\n")[2]:
            more = await peer.more()
            assert more
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body.startswith(b"event: endpoint\ndata: /sse/messages?session_id=")


