"""Streamable HTTP of 2025-03-26 to 2025-11-25, over real sockets, with a scripted router behind it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateway.downstream import streams
from gateway.downstream.server import ConnectionLimits
from gateway.downstream.streams import Budget, EventLog, Feed, Reader
from gateway.errors import Forbidden, LinkLost, Overloaded, RateLimited, StartFailed, UnknownTarget
from gateway.exchange import Call, Reply
from gateway.protocol.message import build_notification, quote
from gateway.protocol.session import VENDOR_DATA
from tests.downstream.legacy_kit import (
    FACTS,
    PATH,
    Got,
    House,
    Peer,
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


def data_source(reply: Any) -> str:
    source: str = reply["error"]["data"]["source"]
    return source


@asynccontextmanager
async def calling(house: House, session: str, message: Any = None, **headers: str) -> AsyncIterator[tuple[Peer, Call]]:
    """A request that is at its server: the client's connection, its response not yet read, and the Call."""
    index = len(house.router.calls)
    body = json.dumps(message or tool()).encode()
    async with house.connect() as peer, trio.open_nursery() as nursery:
        lines = {"host": "x", "mcp-session-id": session, "accept": "*/*", "content-length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await peer.stream.send_all(f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + body)
        yield peer, await house.router.call(index)
        nursery.cancel_scope.cancel()


async def response(peer: Peer) -> Response:
    """The head of the response to a request sent already."""
    while b"\r\n\r\n" not in peer.buffer:
        data = await peer.more()
        assert data
        peer.buffer += data
    top, _, peer.buffer = peer.buffer.partition(b"\r\n\r\n")
    first, *rest = top.decode().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    return Response(peer, int(first.split()[1]), fields)


async def whole(peer: Peer) -> Response:
    found = await response(peer)
    await found.read()
    return found


async def next_json(stream: Response) -> Any:
    """The next event that holds a message."""
    while True:
        event = await stream.event()
        assert event is not None
        if event.data:
            return event.json


# ------------------------------------------------------------------------------------------------------- initialize
async def test_H39_initialize_is_answered_by_the_router_and_opens_a_session() -> None:
    async with served() as house:
        params = {"protocolVersion": "2025-06-18", "capabilities": {"sampling": {}}, "clientInfo": {"name": "me"}}
        reply = await house.post(rpc("initialize", params, "i"))
        assert reply.status == 200
        assert reply.json == {"jsonrpc": "2.0", "id": "i", "result": {**FACTS, "protocolVersion": "2025-06-18"}}
        (client,) = house.router.clients
        assert client.capabilities == {"sampling": {}}
        assert client.info == {"name": "me"}
        assert client.version == "2025-06-18"
        assert client.owner is house.session
        assert client.key not in house.session.id


async def test_RB83_session_ids_are_random_and_visible_ascii() -> None:
    async with served() as house:
        ids = {await house.open() for _ in range(20)}
        assert len(ids) == 20
        for id in ids:
            assert re.fullmatch(r"[A-Za-z0-9_-]{32}", id)  # 32 characters of 6 bits: 192 bits


@pytest.mark.parametrize(
    ("asked", "agreed"), [("2024-11-05", "2024-11-05"), ("2026-07-28", "2025-11-25"), ("x", "2025-11-25")]
)
async def test_the_revision_is_negotiated(asked: str, agreed: str) -> None:
    async with served() as house:
        reply = await house.post(rpc("initialize", {"protocolVersion": asked}))
        assert reply.json["result"]["protocolVersion"] == agreed
        assert house.session.client.version == agreed


async def test_H39_a_failed_initialize_is_an_error_and_no_session() -> None:
    async with served() as house:
        house.router.initialize_error = StartFailed("process exited with code 3")
        reply = await house.post(rpc("initialize", {}, 9))
        assert reply.status == 200
        assert reply.json["id"] == 9
        assert reply.json["error"]["code"] == -32603
        assert "code 3" in reply.json["error"]["message"]
        assert data_source(reply.json) == "gateway"
        assert "mcp-session-id" not in reply.headers
        assert not house.front.sessions
        assert house.router.closed == house.router.clients  # what was started for it alone is let go
        assert not house.router.hub._listeners


async def test_initialize_at_an_unknown_server_and_with_bad_params() -> None:
    async with served() as house:
        reply = await house.post(rpc("initialize", {}), path="/servers/nope/mcp")
        assert (reply.status, reply.json["error"]["code"]) == (404, -32001)
        assert reply.json["error"]["message"] == "Server 'nope' not found"
        reply = await house.post(rpc("initialize", {"capabilities": 3}))
        assert (reply.status, reply.json["error"]["code"]) == (200, -32602)
        assert not house.front.sessions


async def test_initialize_twice_is_refused_and_with_a_dead_id_forgiven() -> None:
    async with served() as house:
        session = await house.open()
        again = await house.post(rpc("initialize", {}), session)
        assert (again.status, again.json["error"]["code"]) == (400, -32600)
        fresh = await house.post(rpc("initialize", {}), "dead-and-gone")
        assert fresh.status == 200
        assert fresh.headers["mcp-session-id"] not in ("dead-and-gone", session)


async def test_G19_max_sessions_is_503_with_retry_after() -> None:
    async with served(max_sessions=2) as house:
        first = await house.open()
        await house.open()
        refused = await house.post(rpc("initialize", {}, 4))
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json["id"] == 4
        assert "max_sessions" in refused.json["error"]["message"]
        async with house.connect() as peer:
            assert (await peer.send("DELETE", PATH, first)).status == 200
        await house.open()


async def test_a_slow_start_keeps_the_client_company(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served() as house, house.connect() as peer:
        house.router.initialize_gate = trio.Event()
        replies: list[Response] = []

        async def initialize() -> None:
            replies.append(await peer.post(rpc("initialize", {"protocolVersion": "2025-06-18"}, 0)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(initialize)
            await until(lambda: house.router.clients)
            mock_clock.jump(16)
            await until(lambda: replies)
        (stream,) = replies
        assert stream.is_stream
        session = stream.headers["mcp-session-id"]
        assert session not in house.front.sessions
        while b"\n\n" not in stream.raw:
            await stream.chunk()
        assert stream.raw.startswith(b":")
        house.router.initialize_gate.set()
        (event,) = await stream.events()
        assert event.json["result"]["serverInfo"] == FACTS["serverInfo"]
        assert session in house.front.sessions


# ------------------------------------------------------------------------------------------------ headers and sessions
async def test_H7_without_a_session_both_ways_are_named() -> None:
    async with served() as house:
        for message in (tool(3), note("notifications/initialized"), {"jsonrpc": "2.0", "id": 1, "result": {}}):
            reply = await house.post(message)
            assert reply.status == 400
            error = reply.json["error"]
            assert error["code"] == -32600
            assert "initialize" in error["message"]
            assert "server_id" in error["message"]
            assert reply.json["id"] == (3 if message == tool(3) else None)
        assert house.router.calls == []


async def test_RB83_foreign_sessions_are_the_same_404_as_unknown_ones() -> None:
    async with served() as house:
        session = await house.open(x_who="alice")
        unknown = await house.post(tool(), "nope", x_who="alice")
        assert unknown.status == 404
        assert unknown.json["error"]["code"] == -32001
        strangers = [
            await house.post(tool(), session, x_who="bob"),
            await house.post(tool(), session),
            await house.post(tool(), session, "/servers/other/mcp", x_who="alice"),
            await house.post(tool(), session, "/mcp", x_who="alice"),
        ]
        for reply in strangers:
            assert (reply.status, reply.json) == (404, unknown.json)
        async with house.connect() as peer:
            for method in ("GET", "DELETE"):
                reply = await peer.send(method, PATH, session, x_who="bob")
                await reply.read()
                assert (reply.status, reply.json["error"]) == (404, unknown.json["error"])
        # Nor does initialize tell them apart.
        assert (await house.post(rpc("initialize", {}), session, x_who="bob")).status == 200
        assert house.router.calls == []
        async with calling(house, session, **{"x-who": "alice"}) as (_, call):
            assert call.exchange.principal.subject == "alice"


async def test_sessions_of_the_merged_endpoint() -> None:
    async with served() as house:
        session = await house.open(path="/mcp")
        reply = await house.post(rpc("ping"), session, "/mcp")
        assert reply.json == {"jsonrpc": "2.0", "id": 1, "result": {}}
        assert house.session.target is None


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "text/html", "*/*;q=0"])
async def test_H7_a_post_must_accept_both_types(accept: str) -> None:
    async with served() as house:
        session = await house.open()
        reply = await house.post(tool(8), session, accept=accept)
        assert reply.status == 406
        assert reply.json["id"] == 8
        assert house.router.calls == []


@pytest.mark.parametrize("accept", [None, "*/*", "application/json;q=0.5, text/event-stream"])
async def test_H7_accept_absent_or_any_counts_as_both(accept: Any) -> None:
    async with served() as house:
        session = await house.open()
        assert (await house.post(rpc("ping"), session, accept=accept)).status == 200


@pytest.mark.parametrize(("version", "status"), [("2025-06-18", 200), ("2024-11-05", 200), ("2030-01-01", 400)])
async def test_the_version_header(version: str, status: int) -> None:
    async with served() as house:
        session = await house.open("2025-06-18")
        reply = await house.post(rpc("ping"), session, mcp_protocol_version=version)
        assert reply.status == status
        if status == 400:
            assert reply.json["error"]["code"] == -32600


async def test_H7_a_null_id_is_refused() -> None:
    async with served() as house:
        session = await house.open()
        reply = await house.post(tool(None), session)
        assert (reply.status, reply.json["error"]["code"], reply.json["id"]) == (400, -32600, None)


async def test_delete_ends_the_session_and_everything_of_it() -> None:
    async with served() as house:
        session = await house.open()
        elicitation, sampling = Question("elicitation/create", 1), Question("sampling/createMessage", 2)
        async with house.connect() as get_peer, calling(house, session) as (peer, call):
            stream = await get_peer.get(session)
            assert house.session.ask(elicitation.ask)
            assert (await next_json(stream))["method"] == "elicitation/create"
            call.deliver(sampling.ask)
            post_stream = await response(peer)
            assert (await next_json(post_stream))["method"] == "sampling/createMessage"
            client = house.session.client
            async with house.connect() as other:
                assert (await other.send("DELETE", PATH, session)).status == 200
                assert (await other.send("DELETE", PATH, session)).status == 404
            assert await stream.event() is None
            last = [event.json for event in await post_stream.events()][-1]
            assert last["error"]["code"] == -32000
            assert call.done
            assert house.router.link.cancelled == [(1, "the session was closed")]
        assert elicitation.answers == [{"jsonrpc": "2.0", "id": 1, "result": {"action": "cancel"}}]
        assert sampling.answers[0]["error"]["code"] == -1
        assert house.router.closed == [client]
        assert not house.router.hub._listeners
        assert (await house.post(tool(), session)).status == 404


async def test_G19_idle_sessions_expire_and_busy_ones_stay(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served(session_idle_seconds=60, request_timeout_seconds=10_000) as house:
        idle, streaming, calling_, speaking = [await house.open() for _ in range(4)]
        async with house.connect() as peer, calling(house, calling_) as (_, call):
            stream = await peer.get(streaming)
            assert stream.status == 200
            for _ in range(8):
                assert (await house.post(rpc("ping"), speaking)).status == 200
                mock_clock.jump(20)
                await trio.testing.wait_all_tasks_blocked()
            assert set(house.front.sessions) == {streaming, calling_, speaking}
            assert (await house.post(rpc("ping"), idle)).status == 404
            call.finish(OK)
        # Both are idle from now on, not from long ago.
        await until(lambda: not any(session.busy for session in house.front.sessions.values()))
        mock_clock.jump(40)
        await trio.testing.wait_all_tasks_blocked()
        assert streaming in house.front.sessions
        for _ in range(3):
            mock_clock.jump(30)
            await trio.testing.wait_all_tasks_blocked()
        assert house.front.sessions == {}
        assert len(house.router.closed) == 4


# ------------------------------------------------------------------------------------------------------ plain calls
@pytest.mark.parametrize("id", [0, 7, -1, "7", "", "x/ü", 1.5, 2**53 + 1])
async def test_H40_a_plain_call_is_one_json_reply_under_its_own_id(id: Any) -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session, tool(id)) as (peer, call):
            assert call.exchange.target == "echo"
            assert call.exchange.client is house.session.client
            call.finish(Reply.result('{"content":[{"type":"text","text":"é"}]}'))
            reply = await whole(peer)
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.json == {"jsonrpc": "2.0", "id": id, "result": {"content": [{"type": "text", "text": "é"}]}}
        assert not house.session.calls
        assert not house.session.feeds


async def test_a_slow_but_quiet_call_is_still_plain_json() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            call.tell_slow()
            await trio.testing.wait_all_tasks_blocked()
            call.finish(OK)
            assert (await whole(peer)).headers["content-type"] == "application/json"


async def test_RB28_equal_ids_of_many_sessions_never_cross() -> None:
    async with served() as house:
        sessions = [await house.open() for _ in range(8)]
        replies: dict[str, Any] = {}

        async def ask(session: str) -> None:
            replies[session] = (await house.post(tool(1, session), session)).json

        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(ask, session)
            calls = [await house.router.call(index) for index in range(8)]
            for call in reversed(calls):
                call.finish(Reply.result(json.dumps({"for": call.exchange.message.param("name")})))
        assert {session: reply["result"]["for"] for session, reply in replies.items()} == {s: s for s in sessions}


async def test_RB28_a_live_id_reused_in_the_same_session_is_refused() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session, tool(7)) as (peer, call):
            double = await house.post(tool(7), session)
            assert (double.status, double.json["error"]["code"], double.json["id"]) == (400, -32600, 7)
            assert "still running" in double.json["error"]["message"]
            async with calling(house, session, tool("7")) as (string_peer, string_call):
                string_call.finish(OK)
                assert (await whole(string_peer)).json["id"] == "7"
            call.finish(OK)
            assert (await whole(peer)).json["id"] == 7
        async with calling(house, session, tool(7)) as (peer, call):  # free again
            call.finish(OK)
            assert (await whole(peer)).status == 200


async def test_a_failed_server_is_an_is_error_result_for_tools_and_32603_otherwise() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            call.fail(LinkLost("Server 'echo' ended: exited with code 1"))
            reply = await whole(peer)
        assert reply.status == 200
        assert reply.json["result"]["isError"] is True
        assert "exited with code 1" in reply.json["result"]["content"][0]["text"]
        assert reply.json["result"]["_meta"][VENDOR_DATA]["source"] == "gateway"
        async with calling(house, session, rpc("prompts/get", {"name": "p"})) as (peer, call):
            call.fail(LinkLost("Server 'echo' ended"))
            reply = await whole(peer)
        assert (reply.status, reply.json["error"]["code"]) == (200, -32603)
        assert data_source(reply.json) == "gateway"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownTarget("Server 'echo' not found"), 404, -32001),
        (UnknownTarget("Tool 'x' not found", code=-32602), 200, -32602),
        (Overloaded("outbox full"), 503, -32000),
        (RateLimited("too fast", retry_after=7), 429, -32000),
    ],
)
async def test_refusals_of_the_router(error: Any, status: int, code: int) -> None:
    async with served() as house:
        session = await house.open()
        house.router.script["tools/call"] = lambda exchange: error
        reply = await house.post(tool(), session)
        assert (reply.status, reply.json["error"]["code"]) == (status, code)
        assert data_source(reply.json) == "gateway"
        assert ("retry-after" in reply.headers) == (status in (429, 503))
        if status == 429:
            assert reply.headers["retry-after"] == "7"


async def test_who_may_not_is_the_endpoints_business() -> None:
    async with served() as house:
        session = await house.open()
        house.router.script["tools/call"] = lambda exchange: Forbidden("not you")
        assert (await house.post(tool(), session)).status == 403
        assert isinstance(house.app.caught[0], Forbidden)


async def test_H39_notifications_and_replies_are_202() -> None:
    async with served() as house:
        session = await house.open(ready=False)
        for message in (
            note("notifications/initialized"),
            note("notifications/initialized"),
            note("notifications/roots/list_changed"),
            note("notifications/progress", {"progressToken": 1, "progress": 2}),
            note("notifications/cancelled", {"requestId": "unheard of"}),
            note("notifications/cancelled", {"requestId": True}),
            note("notifications/cancelled"),
            {"jsonrpc": "2.0", "id": 99, "result": {}},
            {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "?"}},
        ):
            reply = await house.post(message, session)
            assert (reply.status, reply.body) == (202, b"")
        assert [(method, params) for method, params, _ in house.router.notified] == [
            ("notifications/roots/list_changed", None),
            ("notifications/progress", {"progressToken": 1, "progress": 2}),
        ]
        assert house.router.notified[0][2] is house.session.client


# ----------------------------------------------------------------------------------------------------- event streams
@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
async def test_A5_progress_turns_the_reply_into_a_stream(version: str) -> None:
    async with served() as house:
        session = await house.open(version)
        async with calling(house, session, tool("a")) as (peer, call):
            call.deliver(progress(1))
            call.deliver(progress(2))
            stream = await response(peer)
            assert (stream.status, stream.is_stream) == (200, True)
            assert stream.headers["cache-control"].startswith("no-cache")
            assert stream.headers["x-accel-buffering"] == "no"
            call.finish(OK)
            events = await stream.events()
        if version == "2025-11-25":
            assert events[0].data == ""
            assert b"retry: " in stream.raw.partition(b"\n\n")[0]
            events = events[1:]
        assert b"retry" not in stream.raw or version == "2025-11-25"
        assert [event.json.get("params", {}).get("progress") for event in events] == [1, 2, None]
        assert events[-1].json == {"jsonrpc": "2.0", "id": "a", "result": {"content": []}}
        assert {event.event for event in events} == {"message"}
        assert not house.session.feeds


async def test_event_ids_are_unique_in_the_session() -> None:
    async with served() as house:
        session = await house.open("2025-11-25")
        seen: list[str] = []
        for _ in range(3):
            async with calling(house, session) as (peer, call):
                call.deliver(progress(1))
                call.finish(OK)
                seen += [event.id for event in await (await response(peer)).events()]
        for _ in range(3):
            await until(lambda: house.session.feed.reader is None)
            async with house.connect() as peer:
                stream = await peer.get(session)
                house.session.notify(build_notification("notifications/message"))
                for _ in range(2):
                    event = await stream.event()
                    assert event is not None
                    seen.append(event.id)
        assert len(set(seen)) == len(seen) == 15


async def test_messages_over_several_lines_are_one_data_line() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            text = json.dumps(json.loads(progress(1).text), indent=1)
            call.deliver(type(progress(1))(text))
            call.finish(OK)
            stream = await response(peer)
            events = await stream.events()
        assert events[0].json["params"]["progress"] == 1
        assert stream.raw.count(b"data:") == 2


async def test_silence_of_15_s_turns_into_comments(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served(request_timeout_seconds=1000) as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            mock_clock.jump(14)
            await trio.testing.wait_all_tasks_blocked()
            call.tell_slow()
            await trio.testing.wait_all_tasks_blocked()
            assert house.session.feeds == {}
            mock_clock.jump(16)
            stream = await response(peer)
            assert stream.is_stream
            for _ in range(3):
                before = stream.raw.count(b":")
                while stream.raw.count(b":") == before:
                    await stream.chunk()
                mock_clock.jump(15.1)
            call.finish(OK)
            (event,) = await stream.events()
        assert event.json["result"] == {"content": []}


async def test_a_failure_after_the_stream_began_ends_it_with_an_answer() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            call.deliver(progress(1))
            call.fail(LinkLost("gone"))
            events = await (await response(peer)).events()
        assert events[-1].json["result"]["isError"] is True


# -------------------------------------------------------------------------------------------------------- cancellation
async def test_A5_cancelled_ends_the_post_and_tells_the_server() -> None:
    async with served() as house:
        session = await house.open()
        number, string = calling(house, session, tool(7)), calling(house, session, tool("7"))
        async with number as (peer, call), string as (peer2, call2):
            await house.post(note("notifications/cancelled", {"requestId": "7", "reason": "enough"}), session)
            reply = await whole(peer2)
            assert reply.status == 200
            assert reply.json["id"] == "7"
            assert reply.json["error"]["code"] == -32000
            assert reply.json["error"]["message"] == "Request cancelled"
            assert call2.done
            assert not call.done
            assert house.router.link.cancelled == [("7", "enough")]
            call2.finish(Reply.result('{"late":true}'))
            await house.post(note("notifications/cancelled", {"requestId": 7}), session)
            assert (await whole(peer)).json["id"] == 7
            assert not house.session.calls


async def test_a_cancelled_stream_ends_with_the_error() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session, tool(3)) as (peer, call):
            call.deliver(progress(1))
            stream = await response(peer)
            assert (await next_json(stream))["method"] == "notifications/progress"
            await house.post(note("notifications/cancelled", {"requestId": 3}), session)
            call.deliver(progress(2))
            events = await stream.events()
            assert [event.json.get("error", {}).get("code") for event in events] == [-32000]


async def test_a_full_box_does_not_hide_a_cancel() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session, tool(3)) as (peer, call):
            for value in range(400):
                call.deliver(progress(value))
            house.session.cancel(3, "")
            events = await (await response(peer)).events()
            assert events[-1].json["error"]["message"] == "Request cancelled"


async def test_L15_a_request_still_waiting_for_a_slot_can_be_cancelled() -> None:
    async with served() as house:
        session = await house.open()
        house.router.script["tools/call"] = lambda exchange: None
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                reply = await house.post(tool(5), session)
                assert reply.json["error"]["message"] == "Request cancelled"

            nursery.start_soon(ask)
            await until(lambda: house.session.calls)
            double = await house.post(tool(5), session)
            assert double.json["error"]["code"] == -32600
            await house.post(note("notifications/cancelled", {"requestId": 5}), session)
        house.router.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert house.router.calls == []  # it never reached the server
        assert not house.session.calls


async def test_a_request_waiting_for_a_start_gets_signs_of_life(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served(request_timeout_seconds=1000) as house, house.connect() as peer:
        session = await house.open("2025-11-25")
        house.router.script["tools/call"] = lambda exchange: None
        streams_: list[Response] = []

        async def ask() -> None:
            streams_.append(await peer.post(tool("w"), session))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: house.session.calls)
            mock_clock.jump(16)
            await until(lambda: streams_)
        (stream,) = streams_
        first = await stream.event()
        assert first is not None and first.data == ""
        house.router.gate.set()
        (await house.router.call()).finish(OK)
        (event,) = await stream.events()
        assert event.json["id"] == "w"


# ------------------------------------------------------------------------------------------- disconnects and resuming
async def test_RB20_a_disconnect_is_no_cancel_and_the_reply_is_kept() -> None:
    async with served() as house:
        session = await house.open("2025-11-25")
        async with calling(house, session, tool("r")) as (peer, call):
            call.deliver(progress(1))
            stream = await response(peer)
            first = await stream.event()
            assert first is not None and first.data == ""
            second = await stream.event()
            assert second is not None and second.json["params"]["progress"] == 1
        await trio.testing.wait_all_tasks_blocked()
        assert not call.done
        assert house.router.link.cancelled == []
        for value in (2, 3, 4):
            call.deliver(progress(value))
            await trio.testing.wait_all_tasks_blocked()
        call.finish(OK)
        await until(lambda: not house.session.calls)
        for last, expected in ((second.id, [2, 3, 4, None]), (first.id, [1, 2, 3, 4, None])):
            async with house.connect() as peer:
                resumed = await peer.get(session, last_event_id=last)
                assert resumed.status == 200
                events = await resumed.events()
            assert [event.json.get("params", {}).get("progress") for event in events] == expected
            assert events[-1].json["id"] == "r"


async def test_RB20_a_client_gone_before_any_stream_cancels_nothing_either() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (_, call):
            pass
        call.tell_slow()
        await trio.testing.wait_all_tasks_blocked()
        assert not call.done
        call.finish(OK)
        await until(lambda: not house.session.calls)
        assert house.router.link.cancelled == []


async def test_a_resumed_stream_goes_on_live_and_only_with_its_own_events() -> None:
    async with served() as house:
        session = await house.open("2025-11-25")
        async with calling(house, session, tool("other")) as (other_peer, other), house.connect() as back:
            async with calling(house, session, tool("mine")) as (peer, call):
                call.deliver(progress(1))
                stream = await response(peer)
                first = await stream.event()
                assert first is not None
            other.deliver(progress(100))
            call.deliver(progress(2))
            resumed = await back.get(session, last_event_id=first.id)
            assert (await next_json(resumed))["params"]["progress"] == 1
            assert (await next_json(resumed))["params"]["progress"] == 2
            call.deliver(progress(3))
            assert (await next_json(resumed))["params"]["progress"] == 3
            question = Question()
            call.deliver(question.ask)
            asked = await next_json(resumed)
            await house.post({"jsonrpc": "2.0", "id": asked["id"], "result": {"roots": []}}, session)
            assert question.answers == [{"jsonrpc": "2.0", "id": "s-1", "result": {"roots": []}}]
            call.finish(OK)
            (last,) = await resumed.events()
            assert last.json["id"] == "mine"
            other.finish(OK)
            events = await (await response(other_peer)).events()
            assert [event.json["id"] for event in events if event.data and "id" in event.json] == ["other"]


@pytest.mark.parametrize("last", ["9-1", "nonsense", "1-2-3"])
async def test_unknown_event_ids_are_refused(last: str) -> None:
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer:
            reply = await peer.get(session, last_event_id=last)
            await reply.read()
            assert (reply.status, reply.json["error"]["code"]) == (400, -32600)


async def test_RB20_what_is_kept_expires_after_five_minutes(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served() as house:
        session = await house.open()
        async with calling(house, session) as (peer, call):
            call.deliver(progress(1))
            call.finish(OK)
            first = (await (await response(peer)).events())[0]
        mock_clock.jump(290)
        async with house.connect() as peer:
            assert len(await (await peer.get(session, last_event_id=first.id)).events()) == 1
        mock_clock.jump(20)
        await until(lambda: not house.session.log.knows(1))
        async with house.connect() as peer:
            assert (await peer.get(session, last_event_id=first.id)).status == 400


async def test_RB20_a_reply_too_large_to_keep_is_sent_and_resumed_as_an_error() -> None:
    async with served() as house:
        session = await house.open()
        async with calling(house, session, tool("big")) as (peer, call):
            call.deliver(progress(1))
            call.finish(Reply.result(json.dumps({"x": "y" * (streams.MAX_BYTES + 1)})))
            events = await (await response(peer)).events()
            assert len(events[-1].json["result"]["x"]) > streams.MAX_BYTES
        async with house.connect() as peer:
            (again,) = await (await peer.get(session, last_event_id=events[0].id)).events()
        assert again.json["id"] == "big"
        assert "too large" in again.json["error"]["message"]
        assert again.id == events[-1].id


def entry(size: int) -> bytes:
    return b"x" * size


def test_RB20_a_log_holds_100_events_1_mib_and_5_minutes() -> None:
    budget = Budget()
    log = EventLog(budget)
    for number in range(1, 151):
        log.add(1, number, entry(10), 0.0)
    assert [number for number, _ in log.after(1, 0)] == list(range(51, 151))
    log.clear()
    assert budget.used == 0
    for number in range(1, 8):
        log.add(1, number, entry(300_000), 100.0)
    assert [number for number, _ in log.after(1, 0)] == [5, 6, 7]
    log.add(2, 1, entry(streams.MAX_BYTES + 1), 100.0)
    assert not log.knows(2)
    log.add(2, 2, entry(1), 250.0)
    log.expire(400.0)
    assert not log.knows(1)
    assert log.knows(2)
    log.expire(550.0)
    assert budget.used == 0


def test_C8_P8_of_changes_a_log_keeps_the_latest_and_nothing_else_is_pushed_out() -> None:
    budget = Budget()
    log = EventLog(budget)
    log.add(0, 1, entry(10), 0.0)
    for number in range(2, 502, 2):
        log.add(0, number, entry(20), 0.0, "tools")
        log.add(0, number + 1, entry(30), 0.0, "resource:a:///1")
    log.add(0, 502, entry(40), 0.0)
    assert log.after(0, 0) == [(1, entry(10)), (500, entry(20)), (501, entry(30)), (502, entry(40))]
    assert budget.used == 100
    log.expire(streams.MAX_AGE)
    assert budget.used == 0
    log.add(0, 503, entry(20), 400.0, "tools")
    assert log.after(0, 400) == [(503, entry(20))]


def test_P8_all_logs_together_are_bounded() -> None:
    budget = Budget(limit=1000)
    logs = [EventLog(budget) for _ in range(5)]
    for number in range(1, 20):
        for log in logs:
            log.add(1, number, entry(100), 0.0)
            assert budget.used <= 1000
    assert all(log.after(1, 18) for log in logs[:1])
    for log in logs:
        log.clear()
    assert budget.used == 0


async def test_a_reader_that_falls_behind_loses_the_oldest_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PENDING", 1000)
    feed = Feed(0, None)
    lossy, strict = Reader(), Reader(lossy=False)
    feed.attach(lossy, 0)
    for _ in range(100):
        feed.add("x" * 50)
    assert not lossy.ended
    assert len(lossy.take()) <= 1000
    assert lossy.number == 100
    feed.attach(strict, 0)
    assert lossy.ended
    for _ in range(100):
        feed.add("x" * 50)
    assert strict.ended
    assert len(strict.take()) < 2000


# ----------------------------------------------------------------------------------------------- the standalone stream
async def test_get_needs_event_stream_and_there_is_one() -> None:
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer, house.connect() as second:
            reply = await peer.get(session, accept="application/json")
            await reply.read()
            assert reply.status == 406
            stream = await peer.get(session)
            assert (stream.status, stream.is_stream) == (200, True)
            conflict = await second.get(session)
            await conflict.read()
            assert (conflict.status, conflict.json["error"]["code"]) == (409, -32600)
            assert (await second.get(None)).status == 400
        await until(lambda: house.session.feed.reader is None)
        async with house.connect() as third:
            assert (await third.get(session)).status == 200


async def test_G19_idle_streams_get_a_comment_every_15_s(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer:
            stream = await peer.get(session)
            for count in range(1, 4):
                mock_clock.jump(15)
                while stream.raw.count(b":") < count:
                    await stream.chunk()
            assert stream.raw == b": \n\n" * 3


async def test_A5_questions_outside_any_call_travel_on_the_get_stream() -> None:
    async with served() as house:
        session = await house.open()
        question = Question("roots/list", "s-9")
        async with house.connect() as peer:
            stream = await peer.get(session)
            assert house.session.ask(question.ask)
            asked = await next_json(stream)
            assert asked["method"] == "roots/list"
            assert asked["id"] != "s-9"
            answer = {"jsonrpc": "2.0", "id": asked["id"], "result": {"roots": [{"uri": "file:///x"}]}}
            assert (await house.post(answer, session)).status == 202
            assert question.answers == [{**answer, "id": "s-9"}]
            assert (await house.post(answer, session)).status == 202  # a second time: dropped
            assert len(question.answers) == 1


async def test_a_clients_error_answers_a_question_too() -> None:
    async with served() as house:
        session = await house.open()
        question = Question("sampling/createMessage", 5)
        async with calling(house, session) as (peer, call):
            call.deliver(question.ask)
            stream = await response(peer)
            asked = await next_json(stream)
            error = {"code": -1, "message": "User rejected"}
            await house.post({"jsonrpc": "2.0", "id": asked["id"], "error": error}, session)
            assert question.answers == [{"jsonrpc": "2.0", "id": 5, "error": error}]
            call.finish(OK)
            assert len(await stream.events()) == 1


async def test_a_question_before_the_stream_waits_for_it() -> None:
    async with served() as house:
        session = await house.open(ready=False)
        question = Question()
        assert house.session.ask(question.ask)
        async with house.connect() as early:
            stream = await early.get(session)
            await house.post(note("notifications/initialized"), session)
            assert (await next_json(stream))["method"] == "roots/list"
        later = Question("roots/list", "s-2")
        await until(lambda: house.session.feed.reader is None)
        assert house.session.ask(later.ask)
        assert not later.answers
        async with house.connect() as peer:
            stream = await peer.get(session)
            asked = await next_json(stream)
            await house.post({"jsonrpc": "2.0", "id": asked["id"], "result": {"roots": []}}, session)
        assert later.answers == [{"jsonrpc": "2.0", "id": "s-2", "result": {"roots": []}}]
        assert not question.answers


async def test_a_question_that_nobody_comes_for_is_declined(mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with served() as house:
        session = await house.open()
        for question in (Question("roots/list", 1), Question("elicitation/create", 2)):
            assert house.session.ask(question.ask)
            mock_clock.jump(20)
            await trio.testing.wait_all_tasks_blocked()
            assert not question.answers
            mock_clock.jump(20)
            with trio.fail_after(5):
                await question.answered.wait()
            assert not house.session.asks
        # One that was delivered may take its time.
        async with house.connect() as peer:
            stream = await peer.get(session)
            patient = Question("elicitation/create", 3)
            assert house.session.ask(patient.ask)
            while "elicitation/create" not in stream.raw.decode() or '"id":3' not in stream.raw.decode():
                await stream.chunk()
            mock_clock.jump(200)
            await trio.testing.wait_all_tasks_blocked()
            assert not patient.answers


async def test_a_session_asks_a_bounded_number_of_questions() -> None:
    async with served() as house:
        session = await house.open()
        taken = [house.session.ask(Question(id=number).ask) for number in range(100)]
        assert taken.count(True) == 64
        async with calling(house, session) as (peer, call):
            one_more = Question("elicitation/create", "m")
            call.deliver(one_more.ask)
            with trio.fail_after(5):
                await one_more.answered.wait()
            call.finish(OK)
            assert (await whole(peer)).status == 200


async def test_withdrawn_questions_are_cancelled_at_the_client() -> None:
    async with served() as house:
        session = await house.open()
        standalone, inside = Question(), Question("elicitation/create", "s-2")
        async with house.connect() as peer, calling(house, session) as (call_peer, call):
            stream = await peer.get(session)
            assert house.session.ask(standalone.ask)
            asked = await next_json(stream)
            standalone.ask.withdraw("changed my mind")
            cancelled = await next_json(stream)
            assert cancelled["method"] == "notifications/cancelled"
            assert cancelled["params"] == {"requestId": asked["id"], "reason": "changed my mind"}

            call.deliver(inside.ask)
            post_stream = await response(call_peer)
            asked = await next_json(post_stream)
            inside.ask.withdraw("")
            cancelled = await next_json(post_stream)  # at once, though the call goes on
            assert cancelled["params"] == {"requestId": asked["id"]}
            await house.post({"jsonrpc": "2.0", "id": asked["id"], "result": {}}, session)
            call.finish(OK)
            assert len(await post_stream.events()) == 1
        assert standalone.answers == []
        assert inside.answers == []
        assert not house.session.asks


async def test_questions_of_a_cancelled_call_are_taken_back() -> None:
    async with served() as house:
        session = await house.open()
        question = Question("elicitation/create", "q")
        async with calling(house, session, tool(1)) as (peer, call):
            call.deliver(question.ask)
            stream = await response(peer)
            asked = await next_json(stream)
            await house.post(note("notifications/cancelled", {"requestId": 1}), session)
            rest = [event.json for event in await stream.events()]
        assert rest[0]["method"] == "notifications/cancelled"
        assert rest[0]["params"]["requestId"] == asked["id"]
        assert rest[1]["error"]["message"] == "Request cancelled"
        assert question.answers[0]["result"] == {"action": "cancel"}
        assert not house.session.asks


async def test_A5_list_changes_are_announced_once_within_100_ms() -> None:
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer:
            stream = await peer.get(session)
            hub = house.router.hub
            started = trio.current_time()
            for _ in range(50):
                hub.publish("echo", "tools")
                hub.publish("echo", "state")
                hub.publish("other", "prompts")
                house.session.mark("resource:test://a")
                await trio.lowlevel.checkpoint()
            hub.publish("echo", "resources")
            hub.publish("echo", "resource:test://not-ours")
            found = [await next_json(stream) for _ in range(3)]
            assert trio.current_time() - started < 1.0
            assert sorted(message["method"] for message in found) == [
                "notifications/resources/list_changed",
                "notifications/resources/updated",
                "notifications/tools/list_changed",
            ]
            assert [m["params"] for m in found if m["method"].endswith("updated")] == [{"uri": "test://a"}]
            house.session.notify(build_notification("notifications/message", '{"level":"info"}'))
            assert (await next_json(stream))["method"] == "notifications/message"  # nothing was said twice


async def test_C8_changes_are_told_ten_times_a_second_at_most_and_the_last_one_is() -> None:
    """Also those that no hub spaces, such as updates of resources."""
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer, trio.open_nursery() as nursery:
            stream = await peer.get(session)
            told = []

            async def listen() -> None:
                while True:
                    told.append((trio.current_time(), await next_json(stream)))

            nursery.start_soon(listen)
            started = trio.current_time()
            for _ in range(100):
                house.session.mark("resource:test://a")
                await trio.sleep(0.01)
            last = trio.current_time()
            house.session.mark("prompts")
            with trio.fail_after(5):
                while "prompts" not in told[-1][1]["method"]:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    updates = [message for _, message in told if message["method"].endswith("updated")]
    assert 2 < len(updates) <= (last - started) * 10 + 2


async def test_what_happens_while_no_stream_is_open_is_told_when_it_opens() -> None:
    async with served() as house:
        session = await house.open()
        house.router.hub.publish("echo", "tools")
        house.session.mark("prompts")
        for number in range(3):
            house.session.notify(build_notification("notifications/message", f'{{"data":{number}}}'))
        async with house.connect() as peer:
            stream = await peer.get(session)
            found = [await next_json(stream) for _ in range(5)]
        assert [m["params"]["data"] for m in found[:3]] == [0, 1, 2]
        assert {m["method"] for m in found[3:]} == {
            "notifications/tools/list_changed",
            "notifications/prompts/list_changed",
        }


async def test_the_standalone_stream_resumes_and_a_returning_client_takes_it_over() -> None:
    async with served() as house:
        session = await house.open("2025-11-25")
        async with house.connect() as peer, house.connect() as back:
            stream = await peer.get(session)
            first = await stream.event()
            assert first is not None and first.data == ""
            for number in range(2):
                house.session.notify(build_notification("notifications/message", f'{{"data":{number}}}'))
            seen = [await next_json(stream) for _ in range(2)]
            resumed = await back.get(session, last_event_id=first.id)  # the old connection is not known to be dead
            assert resumed.status == 200
            assert [await next_json(resumed) for _ in range(2)] == seen
            assert await stream.event() is None
            house.session.notify(build_notification("notifications/message", '{"data":2}'))
            assert (await next_json(resumed))["params"]["data"] == 2


async def test_a_flood_of_notifications_reaches_a_reading_client() -> None:
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer:
            stream = await peer.get(session)
            await until(lambda: house.session.feed.reader is not None)
            for number in range(500):  # in one go, and five times what is kept
                house.session.notify(build_notification("notifications/message", f'{{"data":{number}}}'))
            assert [(await next_json(stream))["params"]["data"] for _ in range(500)] == list(range(500))


async def test_P6_get_streams_end_at_shutdown_and_posts_are_answered() -> None:
    async with served() as house:
        session = await house.open()
        async with house.connect() as peer, calling(house, session) as (call_peer, call):
            stream = await peer.get(session)
            call.deliver(progress(1))
            post_stream = await response(call_peer)
            await next_json(post_stream)
            house.server.begin_shutdown()
            assert await stream.event() is None
            call.finish(OK)
            (event,) = await post_stream.events()
            assert event.json["result"] == {"content": []}


async def test_RB21_a_client_that_does_not_read_is_cut_and_its_call_goes_on() -> None:
    async with served(ConnectionLimits(stall_seconds=0.4), request_timeout_seconds=60) as house:
        session = await house.open()
        async with calling(house, session) as (_, call):
            text = progress(1).text.replace('"t"', quote("t" * 2_000_000))
            for _ in range(20):
                call.deliver(type(progress(1))(text))
            call.finish(OK)
            assert house.session.calls
            await until(lambda: not house.session.calls)  # this client never reads, and is still connected
            assert house.router.link.cancelled == []


# -------------------------------------------------------------------------------------------------------------- batches
async def test_RB27_a_batch_is_answered_with_one_array() -> None:
    async with served() as house:
        session = await house.open("2025-03-26")
        async with trio.open_nursery() as nursery:
            replies: list[Response] = []

            async def ask() -> None:
                batch = [
                    tool(1, "a"),
                    note("notifications/roots/list_changed"),
                    tool("1", "b"),
                    rpc("ping", None, 3),
                    rpc("initialize", {}, 4),
                    {"jsonrpc": "1.0", "id": 5, "method": "x"},
                    tool(1, "again"),
                ]
                replies.append(await house.post(batch, session))

            nursery.start_soon(ask)
            calls = [await house.router.call(index) for index in range(2)]
            for call in calls:
                call.finish(Reply.result(json.dumps({"for": call.exchange.message.param("name")})))
        (reply,) = replies
        assert reply.headers["content-type"] == "application/json"
        by_kind = [(r["id"], r.get("result"), r.get("error", {}).get("code")) for r in reply.json]
        assert sorted(by_kind, key=str) == sorted(
            [
                (1, {"for": "a"}, None),
                (1, None, -32600),
                ("1", {"for": "b"}, None),
                (3, {}, None),
                (4, None, -32600),
                (5, None, -32600),
            ],
            key=str,
        )
        assert len(house.router.notified) == 1


async def test_RB27_a_batch_that_streams() -> None:
    async with served() as house:
        session = await house.open("2025-03-26")
        async with trio.open_nursery() as nursery:
            events: list[Got] = []

            async def ask() -> None:
                async with house.connect() as peer:
                    stream = await peer.post([tool(1), tool(2)], session)
                    assert stream.is_stream
                    events.extend(await stream.events())

            nursery.start_soon(ask)
            first, second = [await house.router.call(index) for index in range(2)]
            first.finish(OK)
            second.deliver(progress(1))
            await trio.testing.wait_all_tasks_blocked()
            second.finish(OK)
        assert sorted(event.json["id"] for event in events if "id" in event.json) == [1, 2]
        assert len(events) == 3
        assert not house.session.feeds


async def test_RB27_a_batch_whose_session_ends_before_its_first_turn_starts_nothing() -> None:
    """Each entry is a task of its own, and a DELETE may come before their first turns."""
    async with served() as house:
        session = await house.open("2025-03-26")
        house.router.notify = lambda exchange: house.front.close(house.session)  # type: ignore[method-assign]
        reply = await house.post([tool(1), tool(2), note("notifications/roots/list_changed")], session)
        assert sorted((each["id"], each["error"]["code"]) for each in reply.json) == [(1, -32001), (2, -32001)]
        assert house.router.calls == []


async def test_RB27_batches_without_requests_and_of_other_revisions() -> None:
    async with served() as house:
        session = await house.open("2025-03-26")
        reply = await house.post([note("notifications/roots/list_changed")] * 2, session)
        assert (reply.status, reply.body) == (202, b"")
        other = await house.open("2025-06-18")
        reply = await house.post([tool(1)], other)
        assert (reply.status, reply.json["error"]["code"], reply.json["id"]) == (400, -32600, None)
        reply = await house.post([rpc("initialize", {})])
        assert reply.status == 400
        assert house.router.calls == []


async def test_B2_while_a_client_is_asked_its_calls_own_time_stands_still(mock_clock: MockClock) -> None:
    async with served(request_timeout_seconds=30, park_timeout_seconds=300) as house:
        session = await house.open()
        one, two = Question("elicitation/create", "q-1"), Question("elicitation/create", "q-2")
        async with calling(house, session, tool(1)) as (peer, call):
            mock_clock.jump(10)
            for question in (one, two):
                call.deliver(question.ask)
            stream = await response(peer)
            ids = [(await next_json(stream))["id"] for _ in range(2)]
            assert call.deadline == 310
            mock_clock.jump(200)
            await house.post({"jsonrpc": "2.0", "id": ids[0], "result": {"action": "accept"}}, session)
            assert call.deadline == 310
            await house.post({"jsonrpc": "2.0", "id": ids[1], "result": {"action": "accept"}}, session)
            assert call.deadline == pytest.approx(210 + 20, abs=2)
            call.finish(OK)
            await stream.events()
