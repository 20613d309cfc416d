"""Being an MCP client over HTTP, against scripted servers on real sockets: K13-K16, RB50-RB54, L16, H40."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest
import trio

from gateway.auth.principal import Principal
from gateway.config.snapshot import Snapshot
from gateway.errors import (
    GatewayError,
    LinkLost,
    RateLimited,
    ServerProtocolError,
    StartFailed,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import SLOW, Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_reply, decode_request, dumps
from gateway.runtimes.base import Origin
from gateway.upstream.connect import Terms
from gateway.upstream.dial import open_transport
from gateway.upstream.http import connect_http
from gateway.upstream.http_link import HttpLink
from tests.fixtures.http_scripted import Answer, Hangup, McpScript, Request, Script, Server, serve

SAMPLING = {"sampling": {}, "elicitation": {}}


class World:
    """What the link is connected to on the gateway's side."""

    def __init__(self, *, isolated: bool = False, can_ask: bool = False, **more: Any) -> None:
        self.notices: list[Message] = []
        self.asks: list[Ask] = []
        self.can_ask = can_ask
        self.arrived = trio.Event()
        self.terms = Terms(
            "srv",
            self.notice,
            self.ask,
            {"name": "open-mcp-gateway", "version": "0"},
            SAMPLING if isolated else {},
            isolated=isolated,
            **{"timeout": 5.0, **more},
        )

    def notice(self, message: Message) -> None:
        self.notices.append(message)
        self.arrived.set()

    def ask(self, ask: Ask) -> bool:
        if self.can_ask:
            self.asks.append(ask)
            self.arrived.set()
        return self.can_ask


@asynccontextmanager
async def linked(
    script: Script, world: World | None = None, path: str = "/mcp", headers: tuple[tuple[str, str], ...] = ()
) -> AsyncIterator[tuple[Server, HttpLink]]:
    terms = (world or World()).terms
    async with serve(script) as server, connect_http(Origin(server.url(path), headers), terms) as link:
        yield server, link


def exchange(params: str = "{}", *, method: str = "tools/call", id: str = "7", seconds: float = 5) -> Exchange:
    text = f'{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}'
    client = Client("c", Era.LEGACY, "2025-11-25")
    return Exchange(decode_request(text), Principal("p"), Snapshot(), client, "srv", trio.current_time() + seconds)


async def reply_of(call: Call) -> Reply:
    while True:
        event = await call.next()
        if type(event) is Reply:
            return event


async def ask_server(link: HttpLink, params: str = "{}", **more: Any) -> Any:
    """The result or error object of one call."""
    return (await reply_of(link.call(exchange(params, **more)))).message.result


async def until(condition: Callable[[], object]) -> None:
    """For what has no event to wait for."""
    with trio.fail_after(3):
        while not condition():
            await trio.sleep(0.005)


async def failure_of(connecting: Any) -> GatewayError:
    """The error that a connect ends with, which comes bare, not in a group."""
    with pytest.raises(GatewayError) as caught:
        async with connecting:
            pytest.fail("connected")
    return caught.value


# --------------------------------------------------------------------------------------------------- the good servers
@pytest.mark.parametrize("sse_replies", [False, True])
async def test_K15_json_and_event_stream_replies(sse_replies: bool) -> None:
    script = McpScript(sse_replies=sse_replies)
    async with linked(script) as (server, link):
        assert link.facts["serverInfo"]["name"] == "scripted"
        assert link.facts["protocolVersion"] == "2025-11-25"
        assert link.era is Era.LEGACY
        text = (await reply_of(link.call(exchange('{"name":"t", "arguments": {"n":1.50}}', id='"a"')))).text('"a"')
        # Parameters arrive byte for byte, the reply goes back under the client's own id.
        assert b'"params":{"name":"t", "arguments": {"n":1.50}}' in server.calls("tools/call")[0].body
        assert json.loads(text)["id"] == "a"
        assert json.loads(text)["result"] == {"echo": {"name": "t", "arguments": {"n": 1.5}}}
    first, second, third = (r for r in server.seen if r.method == "POST")
    assert [first.rpc, second.rpc, third.rpc] == ["initialize", "notifications/initialized", "tools/call"]
    assert first.json["params"]["clientInfo"]["name"] == "open-mcp-gateway"
    assert first.json["params"]["capabilities"] == {}
    for request in (first, second, third):
        assert request.headers["accept"] == "application/json, text/event-stream"
        assert request.headers["content-type"] == "application/json"
        assert request.headers["accept-encoding"] == "identity"
    assert "mcp-session-id" not in first.headers and "mcp-protocol-version" not in first.headers
    assert second.headers["mcp-session-id"] == third.headers["mcp-session-id"] == "s1"
    assert second.headers["mcp-protocol-version"] == third.headers["mcp-protocol-version"] == "2025-11-25"


async def test_K13_K14_full_url_and_headers_on_every_request() -> None:
    headers = (("Authorization", "Bearer t0ken"), ("X-Team", "a b"), ("Accept", "text/plain"), ("Mcp-Session-Id", "x"))
    script = McpScript()
    async with linked(script, path="/a/b?key=k%20v&x=1", headers=headers) as (server, link):
        await ask_server(link)
        await server.until(lambda: any(r.method == "GET" for r in server.seen))
    assert {r.method for r in server.seen} == {"POST", "GET", "DELETE"}
    for request in server.seen:
        assert request.target == "/a/b?key=k%20v&x=1"
        assert request.headers["authorization"] == "Bearer t0ken"
        assert request.headers["x-team"] == "a b"
        assert "text/plain" not in request.headers.get("accept", "")
    assert "mcp-session-id" not in server.seen[0].headers


async def test_K16_connecting_is_the_handshake_by_post_and_get_may_be_405() -> None:
    script = McpScript()
    async with linked(script) as (server, link):
        assert server.seen[0].method == "POST" and server.seen[0].rpc == "initialize"
        await link.ping(5)
        assert server.calls("ping")

        @script.on("ping")
        async def unknown(request: Request, answer: Answer) -> None:
            await answer.json({"jsonrpc": "2.0", "id": request.json["id"], "error": {"code": -32601, "message": "no"}})

        await link.ping(5)  # an error is a sign of life too

        @script.on("ping")
        async def silent(request: Request, answer: Answer) -> None:
            await answer.gone()

        with pytest.raises(UpstreamTimeout):
            await link.ping(0.2)
        assert link.lost is None


async def test_H40_out_of_order_replies_reach_their_own_callers() -> None:
    script = McpScript()
    release = trio.Event()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        if request.json["params"]["name"] == "slow":
            await release.wait()
        await answer.result(request, {"for": request.json["params"]["name"]})

    async with linked(script) as (server, link):
        slow = link.call(exchange('{"name":"slow"}', id="1"))
        fast = link.call(exchange('{"name":"fast"}', id="1"))
        assert (await reply_of(fast)).message.result == {"for": "fast"}
        release.set()
        assert (await reply_of(slow)).message.result == {"for": "slow"}
        a, b = server.calls("tools/call")
        assert a.json["id"] != b.json["id"]


async def test_H40_RB11_notifications_foreign_ids_and_second_replies_are_not_the_reply() -> None:
    script = McpScript()
    world = World()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        id = request.json["id"]
        await answer.start_stream()
        await answer.event({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        await answer.event({"jsonrpc": "2.0", "id": id + 1000, "result": {"wrong": 1}})
        await answer.event({"jsonrpc": "2.0", "id": str(id), "result": {"wrong": 2}})
        await answer.event("this is not json")
        await answer.event({"jsonrpc": "2.0", "id": id, "result": {"right": True}})
        await answer.event({"jsonrpc": "2.0", "id": id, "result": {"wrong": 3}})
        await answer.end()

    async with linked(script, world) as (_, link):
        assert await ask_server(link) == {"right": True}
        assert [m.method for m in world.notices] == ["notifications/tools/list_changed"]
        assert link.pending.unmatched == 2
        assert await ask_server(link) == {"right": True}


async def test_K15_a_batch_with_the_reply_and_a_pretty_printed_reply() -> None:
    script = McpScript(version="2025-03-26")
    world = World()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        notice = {"jsonrpc": "2.0", "method": "notifications/prompts/list_changed"}
        await answer.json([notice, {"jsonrpc": "2.0", "id": request.json["id"], "result": {"b": 1}}])

    @script.on("tools/list")
    async def pretty(request: Request, answer: Answer) -> None:
        text = json.dumps({"jsonrpc": "2.0", "id": request.json["id"], "result": {"b": "x\ny"}}, indent=2)
        await answer.send(200, text.encode(), "application/json; charset=utf-8")

    async with linked(script, world) as (server, link):
        assert await ask_server(link) == {"b": 1}
        assert [m.method for m in world.notices] == ["notifications/prompts/list_changed"]
        text = (await reply_of(link.call(exchange(method="tools/list")))).text("1")
        assert "\n" not in text and json.loads(text)["result"] == {"b": "x\ny"}
        assert server.calls("tools/call")[0].headers["mcp-protocol-version"] == "2025-03-26"


async def test_progress_and_logs_of_a_call_reach_it_under_the_clients_own_token() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        token = request.json["params"]["_meta"]["progressToken"]
        assert token == request.json["id"] and request.json["params"]["_meta"]["x/y"] == 1
        await answer.start_stream()
        for step in (1, 2):
            progress = {"progressToken": token, "progress": step, "total": 2.50}
            await answer.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        await answer.event({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "hi"}})
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": {}})
        await answer.end()

    async with linked(script) as (_, link):
        call = link.call(exchange('{"name":"t","_meta":{"progressToken":"mine","x/y":1}}'))
        events = []
        while type(event := await call.next()) is not Reply:
            if type(event) is Interim:
                events.append(json.loads(event.text))
        assert [e["method"] for e in events] == ["notifications/progress"] * 2 + ["notifications/message"]
        assert [e["params"]["progressToken"] for e in events[:2]] == ["mine", "mine"]


# ------------------------------------------------------------------------------------------------- questions, streams
def elicit(id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": "elicitation/create", "params": {"message": "?"}}


async def test_questions_on_a_calls_stream_go_to_that_call_and_answers_are_posted() -> None:
    script = McpScript()
    answers: list[Any] = []
    answered = trio.Event()

    async def take(request: Request, answer: Answer) -> None:
        answers.append(request.json)
        answered.set()
        await answer.send(202)

    script.methods[""] = take

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.event(elicit("q1"))
        await answered.wait()
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": {"done": True}})
        await answer.end()

    world = World(isolated=True)
    async with linked(script, world) as (server, link):
        assert server.calls("initialize")[0].json["params"]["capabilities"] == SAMPLING
        other = link.call(exchange(method="tools/list"))
        await reply_of(other)
        call = link.call(exchange())
        event = await call.next()
        assert type(event) is Ask and event.message.method == "elicitation/create"
        event.answer(decode_reply('{"jsonrpc":"2.0","id":99,"result":{"action":"accept"}}'))
        event.answer(decode_reply('{"jsonrpc":"2.0","id":99,"result":{"action":"twice"}}'))
        assert (await reply_of(call)).message.result == {"done": True}
        assert answers == [{"jsonrpc": "2.0", "id": "q1", "result": {"action": "accept"}}]


async def test_a_question_ends_with_its_call_or_when_the_server_takes_it_back() -> None:
    script = McpScript()
    withdrawn: dict[int, str] = {}
    go = trio.Event()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.event(elicit(1))
        await answer.event(elicit(2))
        await go.wait()
        cancelled = {"requestId": 1, "reason": "enough"}
        await answer.event({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancelled})
        await answer.gone()

    async with linked(script, World(isolated=True)) as (_, link):
        call = link.call(exchange())
        asks: list[Ask] = []
        while len(asks) < 2:
            if type(event := await call.next()) is Ask:
                event.on_withdrawn = partial(withdrawn.__setitem__, event.message.id)
                asks.append(event)
        go.set()
        await until(lambda: 1 in withdrawn)
        assert withdrawn == {1: "enough"}
        call.cancel("client gone")
        await until(lambda: 2 in withdrawn)
        assert not any(ask.open for ask in asks)


async def test_a_shared_server_is_never_asked_and_pings_are_answered() -> None:
    script = McpScript()
    answers: list[Any] = []

    async def take(request: Request, answer: Answer) -> None:
        answers.append(request.json)
        await answer.send(202)

    script.methods[""] = take

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.event(elicit(1))
        await answer.event({"jsonrpc": "2.0", "id": 2, "method": "sampling/createMessage", "params": {}})
        await answer.event({"jsonrpc": "2.0", "id": 3, "method": "roots/list"})
        await answer.event({"jsonrpc": "2.0", "id": 4, "method": "ping"})
        await server.until(lambda: len(answers) == 4)
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": {}})
        await answer.end()

    async with linked(script) as (server, link):
        await ask_server(link)
        by_id = {a["id"]: a for a in answers}
        assert by_id[1]["result"] == {"action": "cancel"}
        assert by_id[2]["error"]["code"] == -1
        assert by_id[3]["error"]["code"] == -32601
        assert by_id[4]["result"] == {}


async def test_the_sessions_stream_brings_notices_and_questions_and_is_reopened_where_it_ended() -> None:
    script = McpScript()
    answers: list[Any] = []
    world = World(isolated=True, can_ask=True)

    async def take(request: Request, answer: Answer) -> None:
        answers.append(request.json)
        await answer.send(202)

    script.methods[""] = take

    async def stream(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        if "last-event-id" not in request.headers:
            await answer.event({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}, id="e1", retry=100)
            await answer.end()
        else:
            await answer.event(elicit("q"))
            await answer.gone()

    script.stream = stream
    async with linked(script, world) as (server, _):
        gets = lambda: [r for r in server.seen if r.method == "GET"]  # noqa: E731
        await server.until(lambda: len(gets()) == 2)
        assert gets()[0].headers["mcp-session-id"] == "s1"
        assert "text/event-stream" in gets()[0].headers["accept"]
        assert gets()[1].headers["last-event-id"] == "e1"
        await until(lambda: world.asks)
        assert [m.method for m in world.notices] == ["notifications/tools/list_changed"]
        world.asks[0].refuse(-1, "no")
        await server.until(lambda: bool(answers))
        assert answers[0]["error"]["code"] == -1


async def test_a_call_whose_stream_the_server_drops_is_taken_up_by_its_event_id() -> None:
    script = McpScript()
    ids: list[int] = []

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        ids.append(request.json["id"])
        await answer.start_stream()
        await answer.event(None, name="", id="p1", retry=100)
        if request.json["params"].get("break"):
            raise Hangup
        await answer.end()

    async def stream(request: Request, answer: Answer) -> None:
        if "last-event-id" not in request.headers:
            await answer.send(405)
            return
        await answer.start_stream()
        if request.headers["last-event-id"] == "p1":
            progress = {"progressToken": ids[-1], "progress": 1}
            await answer.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress}, id="p2")
        else:
            await answer.event({"jsonrpc": "2.0", "id": ids[-1], "result": {"polled": True}}, id="p3")
        await answer.end()

    script.stream = stream
    async with linked(script) as (server, link):
        for params in ('{"_meta":{"progressToken":5}}', '{"break":true,"_meta":{"progressToken":5}}'):
            call = link.call(exchange(params))
            assert type(await call.next()) in (Interim, type(SLOW))
            assert (await reply_of(call)).message.result == {"polled": True}
        resumed = [r.headers["last-event-id"] for r in server.seen if "last-event-id" in r.headers]
        assert resumed == ["p1", "p2", "p1", "p2"]
        assert len(server.calls("tools/call")) == 2


async def test_a_stream_that_ends_without_reply_or_event_id_is_an_error_and_nothing_is_repeated() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        if request.json["params"].get("id"):
            await answer.event(None, id="x", retry=10)
        await answer.end()

    async with linked(script) as (server, link):
        with pytest.raises(LinkLost, match="ended its event stream before it had answered"):
            await ask_server(link)
        with pytest.raises(LinkLost, match="HTTP 405"):
            await ask_server(link, '{"id":true}')
        assert len(server.calls("tools/call")) == 2
        assert link.lost is None


# ----------------------------------------------------------------------------------------------- deadlines, cancelling
async def test_L16_no_answer_in_time_is_a_timeout_the_server_is_told_and_stays_up() -> None:
    script = McpScript()
    closed = trio.Event()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        if request.json["params"].get("hang"):
            await answer.gone()
            closed.set()
        else:
            await answer.result(request, {})

    async with linked(script) as (server, link):
        with pytest.raises(UpstreamTimeout, match=r"Server 'srv' did not answer within 0\.2 s"):
            await ask_server(link, '{"hang":true}', seconds=0.2)
        with trio.fail_after(2):
            await closed.wait()
        await server.until(lambda: bool(server.calls("notifications/cancelled")))
        cancelled = server.calls("notifications/cancelled")[0]
        assert cancelled.json["params"]["requestId"] == server.calls("tools/call")[0].json["id"]
        assert cancelled.headers["mcp-session-id"] == "s1"
        assert await ask_server(link) == {}
        assert link.lost is None and len(link.pending) == 0


@pytest.mark.parametrize("streaming", [False, True])
async def test_RB20_a_cancel_reaches_the_server_and_closes_the_response_within_100_ms(streaming: bool) -> None:
    script = McpScript()
    closed = trio.Event()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        if streaming:
            await answer.start_stream()
            await answer.event({"jsonrpc": "2.0", "method": "notifications/message", "params": {}})
        await answer.gone()
        closed.set()

    async with linked(script) as (server, link):
        ended: list[Call] = []
        asked = exchange()
        asked.on_end = ended.append
        call = link.call(asked)
        while await call.next() is not SLOW:
            pass
        started = trio.current_time()
        call.cancel("client gone")
        assert ended == [call]
        await closed.wait()
        await server.until(lambda: bool(server.calls("notifications/cancelled")))
        assert trio.current_time() - started < 0.1
        assert server.calls("notifications/cancelled")[0].json["params"]["reason"] == "client gone"


async def test_SLOW_comes_once_50_ms_after_the_start() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await trio.sleep(0.4)
        await answer.result(request, {})

    async with linked(script) as (_, link):
        started = trio.current_time()
        call = link.call(exchange())
        assert await call.next() is SLOW
        assert 0.04 < trio.current_time() - started < 0.2
        assert type(await call.next()) is Reply


async def test_leaving_ends_calls_and_the_session_even_if_the_server_hangs() -> None:
    script = McpScript()

    async def hang_on_delete(request: Request, answer: Answer) -> None:
        if request.method == "DELETE" or request.rpc == "tools/call":
            await answer.gone()
        await script(request, answer)

    async with serve(hang_on_delete) as server:
        with trio.fail_after(4):
            async with connect_http(Origin(server.url()), World().terms) as link:
                call = link.call(exchange())
                await server.until(lambda: bool(server.calls("tools/call")))
            with pytest.raises(LinkLost, match="was stopped"):
                await call.next()
            with pytest.raises(LinkLost):
                link.call(exchange())
        assert server.seen[-1].method == "DELETE"
        assert server.seen[-1].headers["mcp-session-id"] == "s1"


async def test_cancelling_the_block_ends_it_and_tells_callers() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.gone()

    async with serve(script) as server:
        with trio.CancelScope() as scope:
            async with connect_http(Origin(server.url()), World().terms) as link:
                call = link.call(exchange())
                await server.until(lambda: bool(server.calls("tools/call")))
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(LinkLost):
            await call.next()
        await server.until(lambda: server.seen[-1].method == "DELETE")


# ----------------------------------------------------------------------------------------------------------- sessions
async def test_RB54_a_lost_session_is_opened_again_once_and_each_call_runs_once() -> None:
    script = McpScript()
    ran: list[int] = []

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        ran.append(request.json["id"])
        await answer.result(request, {})

    async with linked(script) as (server, link):
        await ask_server(link, '{"level":"info"}', method="logging/setLevel")
        await ask_server(link, '{"uri":"a:b"}', method="resources/subscribe")
        await ask_server(link, '{"uri":"a:c"}', method="resources/subscribe")
        await ask_server(link, '{"uri":"a:c"}', method="resources/unsubscribe")
        script.known.clear()
        calls = [link.call(exchange()) for _ in range(5)]
        for call in calls:
            assert (await reply_of(call)).message.result == {}
        assert len(server.calls("initialize")) == 2
        assert sorted(ran) == sorted(call.id for call in calls)
        # What the first session had been told, the second is told too.
        await server.until(lambda: len(server.calls("resources/subscribe")) == 3)
        assert len(server.calls("logging/setLevel")) == 2
        assert server.calls("resources/subscribe")[-1].json["params"] == {"uri": "a:b"}
        assert link.lost is None


async def test_RB54_a_400_about_the_session_counts_as_lost_too() -> None:
    script = McpScript()

    async def forgetful(request: Request, answer: Answer) -> None:
        session = request.headers.get("mcp-session-id")
        if request.method == "POST" and session is not None and session not in script.known:
            error = {"code": -32000, "message": "Bad Request: No valid session ID provided"}
            await answer.json({"jsonrpc": "2.0", "id": None, "error": error}, 400)
        else:
            await script(request, answer)

    async with linked(forgetful) as (server, link):
        script.known.clear()
        assert await ask_server(link) == {"echo": {}}
        assert len(server.calls("initialize")) == 2


async def test_RB54_sessions_that_are_never_known_end_in_an_error_not_in_a_storm() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.send(404)

    async with linked(script) as (server, link):
        with pytest.raises(UpstreamError, match="lost its session twice in a row"):
            await ask_server(link)
        assert len(server.calls("initialize")) == 2
        assert len(server.calls("tools/call")) == 2


async def test_RB54_a_session_that_can_not_be_renewed_ends_the_link() -> None:
    script = McpScript()
    async with linked(script) as (_, link):
        script.known.clear()

        @script.on("initialize")
        async def broken(request: Request, answer: Answer) -> None:
            await answer.send(503)

        with pytest.raises(UpstreamError, match="HTTP 503"):
            await ask_server(link)
        await link.wait_closed()
        assert link.lost is not None and "after its session was lost" in link.lost.message


async def test_RB54_a_connection_closed_while_idle_is_not_used_and_one_lost_after_sending_is_not_repeated() -> None:
    script = McpScript()

    async def closes(request: Request, answer: Answer) -> None:
        await script(request, answer)
        if request.rpc == "tools/list":
            raise Hangup  # right after a good reply, without "Connection: close"

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        raise Hangup  # the request has been read: it may have run

    async with linked(closes) as (server, link):
        for _ in range(10):
            assert await ask_server(link, method="tools/list") == {"echo": {}}
            await trio.sleep(0.01)
        assert len(server.calls("tools/list")) == 10
        assert len({r.connection for r in server.calls("tools/list")}) == 10
        with pytest.raises(LinkLost, match="dropped the connection before its answer was complete"):
            await ask_server(link)
        assert len(server.calls("tools/call")) == 1


@pytest.mark.parametrize("sse_replies", [False, True])
async def test_connections_are_used_again_also_after_event_streams(sse_replies: bool) -> None:
    script = McpScript(sse_replies=sse_replies)
    async with linked(script) as (server, link):
        for _ in range(20):
            await ask_server(link)
            await trio.sleep(0.005)
        # One is busy with the question for the session's stream when the first call comes.
        assert len({r.connection for r in server.calls("tools/call")}) <= 2


async def test_L_http_without_session_claims_only_what_it_can_do_and_is_offered_nothing() -> None:
    script = McpScript(session=False)
    async with linked(script, World(isolated=True)) as (server, link):
        assert link.facts["capabilities"] == {"tools": {}, "resources": {}}
        assert server.calls("initialize")[-1].json["params"]["capabilities"] == {}
        assert await ask_server(link) == {"echo": {}}
    assert {r.method for r in server.seen} == {"POST"}


# ------------------------------------------------------------------------------------------------------------ failures
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


async def test_RB50_refused_and_unresolvable_are_named_without_secrets() -> None:
    port = free_port()
    origin = Origin(f"http://127.0.0.1:{port}/mcp?token=s3cret", (("Authorization", "Bearer s3cret"),))
    error = await failure_of(connect_http(origin, World().terms))
    assert type(error) is StartFailed
    assert error.message == f"Server 'srv' can't be reached at http://127.0.0.1:{port}/mcp: connection refused"
    assert error.__cause__ is not None

    async def no_such_name(host: str, port: int) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    error = await failure_of(connect_http(Origin("http://nosuch.example/x"), World().terms, resolve_host=no_such_name))
    assert error.message == (
        "Server 'srv' can't be reached at http://nosuch.example/x: "
        "the name 'nosuch.example' can't be resolved (Name or service not known)"
    )


async def test_RB50_a_url_out_of_a_variable_shows_no_path() -> None:
    port = free_port()
    origin = Origin(f"http://127.0.0.1:{port}/s3cret/mcp", details={"url": "${HOOK_URL}"})
    error = await failure_of(connect_http(origin, World().terms))
    assert error.message == f"Server 'srv' can't be reached at http://127.0.0.1:{port}: connection refused"


async def test_RB50_reset_and_garbage_are_named() -> None:
    async def reset(request: Request, answer: Answer) -> None:
        sock = answer.stream.socket  # type: ignore[attr-defined]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raise Hangup

    async with serve(reset) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert "dropped the connection before its answer was complete (connection reset by peer)" in error.message

    async def garbage(request: Request, answer: Answer) -> None:
        await answer.raw(b"220 smtp.example ESMTP\r\n\r\n")

    async with serve(garbage) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert "does not speak proper HTTP/1.1" in error.message


async def test_RB50_a_silent_connect_ends_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.http_link.CONNECT_LIMIT", 0.3)

    async def hanging(host: str, port: int) -> Any:
        await trio.sleep_forever()

    with trio.fail_after(3):
        error = await failure_of(connect_http(Origin("http://slow.example/"), World().terms, resolve_host=hanging))
    assert error.message == "Server 'srv' can't be reached at http://slow.example/: no connection within 0.3 s"


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_RB51_5xx_is_an_error_with_the_status(status: int) -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.json({"jsonrpc": "2.0", "id": None, "error": {"code": -1, "message": "boom"}}, status)

    async with linked(script) as (server, link):
        with pytest.raises(UpstreamError, match=f"HTTP {status}: boom") as caught:
            await ask_server(link)
        assert caught.value.status == 502
        assert len(server.calls("tools/call")) == 1

    async def down(request: Request, answer: Answer) -> None:
        await answer.send(status, b"<html>", "text/html")

    async with serve(down) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert type(error) is StartFailed and f"HTTP {status}" in error.message
        assert [r.method for r in server.seen] == ["POST"]


@pytest.mark.parametrize(
    ("value", "seconds"), [("17", 17.0), ("", 1.0), ("soon", 1.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)]
)
async def test_RB51_429_is_passed_on_with_retry_after_and_nothing_is_repeated(value: str, seconds: float) -> None:
    script = McpScript()

    async def limited(request: Request, answer: Answer) -> None:
        await answer.send(429, headers={"Retry-After": value} if value else {})

    script.methods["tools/call"] = limited
    async with linked(script) as (server, link):
        for _ in range(5):
            with pytest.raises(RateLimited) as caught:
                await ask_server(link)
            assert (caught.value.status, caught.value.retry_after) == (429, seconds)
        assert len(server.calls("tools/call")) == 5
        assert link.lost is None

    async with serve(limited) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert type(error) is RateLimited and error.retry_after == seconds
        assert len(server.seen) == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_401_and_403_decide_nothing_and_name_the_status(status: int) -> None:
    async def refuse(request: Request, answer: Answer) -> None:
        await answer.send(status)

    async with serve(refuse) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert f"HTTP {status}" in error.message and "headers" in error.message
        assert [r.method for r in server.seen] == ["POST"]


def html(request: Request, answer: Answer) -> Any:
    return answer.send(200, b"<html>login</html>", "text/html")


def truncated(request: Request, answer: Answer) -> Any:
    return answer.send(200, b'{"jsonrpc":"2.0","id":')


def not_mine(request: Request, answer: Answer) -> Any:
    return answer.json({"jsonrpc": "2.0", "id": "nobody", "result": {}})


def accepted(request: Request, answer: Answer) -> Any:
    return answer.send(202)


def zipped(request: Request, answer: Answer) -> Any:
    return answer.send(200, b"\x1f\x8b" + b"\0" * 20, headers={"Content-Encoding": "gzip"})


def teapot(request: Request, answer: Answer) -> Any:
    return answer.send(418)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (html, "text/html instead of a JSON-RPC reply"),
        (truncated, "no JSON-RPC message"),
        (not_mine, "without the reply to this request"),
        (accepted, "answered 202"),
        (zipped, "content-encoding gzip"),
        (teapot, "HTTP 418"),
    ],
)
async def test_RB52_nonsense_is_an_error_that_names_it(what: Callable[[Request, Answer], Any], says: str) -> None:
    script = McpScript()
    script.methods["tools/call"] = what
    async with linked(script) as (_, link):
        for _ in range(4):
            with pytest.raises(ServerProtocolError, match=says):
                await ask_server(link)
        assert link.lost is None
        assert await ask_server(link, method="tools/list") == {"echo": {}}

    script.methods["initialize"] = what
    async with serve(script) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert type(error) is StartFailed and says in error.message


async def test_RB52_truncated_body_is_a_lost_connection() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.raw(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"jsonrpc":')
        raise Hangup

    async with linked(script) as (server, link):
        with pytest.raises(LinkLost, match="dropped the connection"):
            await ask_server(link)
        assert len(server.calls("tools/call")) == 1


async def drip_head(request: Request, answer: Answer) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000:
        await answer.raw(bytes([byte]))
        await trio.sleep(0.02)


async def drip_body(request: Request, answer: Answer) -> None:
    await answer.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n")
    while True:
        await answer.raw(b" ")
        await trio.sleep(0.02)


async def drip_stream(request: Request, answer: Answer) -> None:
    await answer.start_stream()
    while True:
        await answer.chunk(b": still here\n\n")
        await trio.sleep(0.02)


async def hang(request: Request, answer: Answer) -> None:
    await answer.gone()


@pytest.mark.parametrize("what", [hang, drip_head, drip_body, drip_stream])
async def test_RB52_hang_and_drip_are_bounded_in_time(what: Script) -> None:
    script = McpScript()
    script.methods["tools/call"] = what
    async with linked(script) as (_, link):
        started = trio.current_time()
        with pytest.raises(UpstreamTimeout):
            await ask_server(link, seconds=0.3)
        assert trio.current_time() - started < 0.6

    script.methods["initialize"] = what
    async with serve(script) as server:
        with trio.fail_after(2):
            error = await failure_of(connect_http(Origin(server.url()), World(timeout=0.3).terms))
        assert "did not answer within 0.3 s" in error.message


async def endless_line(request: Request, answer: Answer) -> None:
    await answer.start_stream()
    await answer.chunk(b"data: ")
    while True:
        await answer.chunk(b"x" * 50_000)


async def endless_body(request: Request, answer: Answer) -> None:
    await answer.start_stream(kind="application/json")
    while True:
        await answer.chunk(b" " * 50_000)


async def large_event(request: Request, answer: Answer) -> None:
    await answer.start_stream()
    await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": {"x": "y" * 200_000}})


@pytest.mark.parametrize("what", [endless_line, endless_body, large_event])
async def test_RB09_RB52_a_reply_over_max_message_bytes_ends_its_call_only(what: Script) -> None:
    script = McpScript()
    script.methods["tools/call"] = what
    release = trio.Event()

    @script.on("tools/list")
    async def slow(request: Request, answer: Answer) -> None:
        await release.wait()
        await answer.result(request, {"ok": True})

    async with linked(script, World(max_message_bytes=100_000)) as (_, link):
        neighbour = link.call(exchange(method="tools/list"))
        with trio.fail_after(3):
            with pytest.raises(ServerProtocolError, match="over 100000 bytes"):
                await ask_server(link)
        release.set()
        assert (await reply_of(neighbour)).message.result == {"ok": True}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_RB53_redirects_are_not_followed_and_their_host_is_named(status: int) -> None:
    async def elsewhere(request: Request, answer: Answer) -> None:
        raise AssertionError("followed")

    async with serve(elsewhere) as other:

        async def redirect(request: Request, answer: Answer) -> None:
            await answer.send(status, headers={"Location": f"http://u:p@127.0.0.1:{other.port}/x?s3cret"})

        async with serve(redirect) as server:
            origin = Origin(server.url(), (("Authorization", "Bearer t"),))
            error = await failure_of(connect_http(origin, World().terms))
            assert f"redirects to http://127.0.0.1:{other.port} (HTTP {status})" in error.message
            assert "s3cret" not in error.message
        assert other.connections == 0


async def test_RB53_cookies_are_not_kept() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.result(request, {}, {"Set-Cookie": "a=b; Path=/"})

    async with linked(script) as (server, link):
        await ask_server(link)
        await ask_server(link)
        assert not any("cookie" in r.headers for r in server.seen)


async def test_a_server_that_has_gone_ends_the_link_after_three_calls() -> None:
    async with linked(McpScript()) as (server, link):
        await ask_server(link)
        await server.stop()
        for _ in range(3):
            assert link.lost is None
            with pytest.raises(UpstreamError, match=r"connection refused|dropped the connection"):
                await ask_server(link)
        await link.wait_closed()
        assert link.lost is not None
        with pytest.raises(LinkLost):
            link.call(exchange())


async def test_errors_of_the_server_are_replies_whatever_the_status() -> None:
    script = McpScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        status = request.json["params"]["status"]
        error = {"code": -32602, "message": "no such tool", "data": {"x": 1}}
        await answer.json({"jsonrpc": "2.0", "id": request.json["id"], "error": error}, status)

    async with linked(script) as (_, link):
        for status in (200, 400, 404):
            error = await ask_server(link, dumps({"status": status}))
            assert error == {"code": -32602, "message": "no such tool", "data": {"x": 1}}


async def test_a_modern_only_server_is_refused_with_its_reason() -> None:
    async def modern(request: Request, answer: Answer) -> None:
        await answer.json({"jsonrpc": "2.0", "id": None, "error": {"code": -32022, "message": "Unsupported"}}, 400)

    async with serve(modern) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert "2026-07-28" in error.message
        assert [r.method for r in server.seen] == ["POST"]


# ------------------------------------------------------------------------------------------------------------ HTTP+SSE
class OldServer:
    """A correct server of 2024-11-05. ``endpoint`` is what its first event says; ``methods`` replace what it does."""

    def __init__(self, endpoint: str = "/post?session=1") -> None:
        self.endpoint = endpoint
        self.posts: list[Any] = []
        self.stream: Answer | None = None
        self.methods: dict[str, Callable[[Request], Any]] = {}
        self.refuse_post = 405
        self.drop = trio.Event()

    async def __call__(self, request: Request, answer: Answer) -> None:
        if request.method == "GET":
            await answer.start_stream()
            self.stream = answer
            await answer.event(self.endpoint, name="endpoint")
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await answer.gone()
                    self.drop.set()

                nursery.start_soon(watch)
                await self.drop.wait()
                nursery.cancel_scope.cancel()
            raise Hangup
        if request.target == "/sse":
            await answer.send(self.refuse_post)
            return
        self.posts.append(request.json)
        await answer.send(202, b"Accepted", "text/plain")
        if request.rpc in self.methods:
            await self.methods[request.rpc](request)
        elif request.rpc == "initialize":
            hello = {"protocolVersion": "2024-11-05", "capabilities": {"logging": {}}, "serverInfo": {"name": "old"}}
            await self.say({"jsonrpc": "2.0", "id": request.json["id"], "result": hello})
        elif request.rpc and "id" in request.json:
            await self.say({"jsonrpc": "2.0", "id": request.json["id"], "result": {"echo": request.json.get("params")}})

    async def say(self, message: Any) -> None:
        assert self.stream is not None
        await self.stream.event(message)


@pytest.mark.parametrize("status", [400, 404, 405])
async def test_K15_falls_back_to_http_sse(status: int) -> None:
    old = OldServer()
    old.refuse_post = status
    headers = (("Authorization", "Bearer t"),)
    async with linked(old, path="/sse", headers=headers) as (server, link):
        assert link.facts["serverInfo"]["name"] == "old"
        assert link.details["transport"] == "http+sse"
        assert await ask_server(link, '{"a":1}') == {"echo": {"a": 1}}
        await link.ping(5)
    first = [f"{r.method} {r.target}" for r in server.seen[:3]]
    assert first == ["POST /sse", "GET /sse", "POST /post?session=1"]
    assert {r.headers["authorization"] for r in server.seen} == {"Bearer t"}
    assert [p.get("method") for p in old.posts][:2] == ["initialize", "notifications/initialized"]


async def test_H40_http_sse_replies_match_by_id_and_deadlines_hold() -> None:
    old = OldServer()
    later: list[Any] = []

    async def tool(request: Request) -> None:
        later.append(request.json["id"])
        if len(later) == 2:
            for id in reversed(later):
                await old.say({"jsonrpc": "2.0", "id": id, "result": {"id": id}})
            await old.say({"jsonrpc": "2.0", "id": later[0], "result": {"late": True}})

    old.methods["tools/call"] = tool
    async with linked(old, path="/sse") as (_, link):
        calls = [link.call(exchange()), link.call(exchange())]
        for call in calls:
            assert (await reply_of(call)).message.result == {"id": call.id}
        with pytest.raises(UpstreamTimeout):
            await ask_server(link, seconds=0.2)
        await until(lambda: old.posts[-1].get("method") == "notifications/cancelled")
        assert await ask_server(link, method="tools/list") == {"echo": {}}


async def test_http_sse_questions_and_logs_belong_to_the_only_call_in_flight() -> None:
    old = OldServer()
    world = World(isolated=True, can_ask=True)

    async def tool(request: Request) -> None:
        await old.say({"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": 1}})
        await old.say(elicit(5))

    async def answered(request: Request) -> None:
        if request.json["id"] == 5:
            (id,) = link.pending.calls
            await old.say({"jsonrpc": "2.0", "id": id, "result": request.json["result"]})

    old.methods["tools/call"] = tool
    old.methods[""] = answered
    async with linked(old, world, path="/sse") as (_, link):
        call = link.call(exchange())
        seen: list[str] = []
        while type(event := await call.next()) is not Reply:
            seen.append(type(event).__name__)
            if type(event) is Ask:
                event.resolve('{"action":"accept"}')
        assert event.message.result == {"action": "accept"}
        assert [s for s in seen if s != "Slow"] == ["Interim", "Ask"]
        await old.say(elicit(6))
        with trio.fail_after(2):
            await world.arrived.wait()
        assert world.asks[0].message.id == 6


async def test_RB53_RB55_an_endpoint_on_another_origin_is_refused() -> None:
    for endpoint in ("http://127.0.0.1:9/post", "//evil.example/post", "https://127.0.0.1/x", "http://u:p@{}/post"):
        old = OldServer()
        async with serve(old) as server:
            old.endpoint = endpoint.format(f"127.0.0.1:{server.port}")
            error = await failure_of(connect_http(Origin(server.url("/sse")), World().terms))
            assert type(error) is StartFailed and "another origin" in error.message
            assert old.posts == []
    old = OldServer()
    async with serve(old) as server:
        old.endpoint = server.url("/full/post?x=1#frag")
        async with connect_http(Origin(server.url("/sse")), World().terms) as link:
            await link.ping(5)
        assert server.seen[-1].target == "/full/post?x=1"


async def test_http_sse_a_stream_that_ends_ends_the_link_and_its_calls() -> None:
    old = OldServer()

    async def nothing(request: Request) -> None:
        pass

    old.methods["tools/call"] = nothing
    async with linked(old, path="/sse") as (_, link):
        call = link.call(exchange())
        await until(lambda: any(p.get("method") == "tools/call" for p in old.posts))
        old.drop.set()
        with pytest.raises(LinkLost):
            await reply_of(call)
        await link.wait_closed()
        assert link.lost is not None and "srv" in link.lost.message
        with pytest.raises(LinkLost):
            link.call(exchange())


async def test_RB09_http_sse_an_event_over_the_limit_ends_its_call_only() -> None:
    old = OldServer()

    async def tool(request: Request) -> None:
        if request.json["params"].get("big"):
            await old.say({"jsonrpc": "2.0", "id": request.json["id"], "result": {"x": "y" * 200_000}})

    old.methods["tools/call"] = tool
    async with linked(old, World(max_message_bytes=100_000), path="/sse") as (_, link):
        neighbour = link.call(exchange())
        with pytest.raises(ServerProtocolError, match="over 100000 bytes"):
            await ask_server(link, '{"big":true}')
        await old.say({"jsonrpc": "2.0", "id": neighbour.id, "result": {"fine": True}})
        assert (await reply_of(neighbour)).message.result == {"fine": True}


async def test_http_sse_neither_transport_names_both_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(request: Request, answer: Answer) -> None:
        await answer.send(404)

    async with serve(nothing) as server:
        error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert error.message.count("HTTP 404") == 2
        assert [r.method for r in server.seen] == ["POST", "GET"]

    monkeypatch.setattr("gateway.upstream.http_sse.ENDPOINT_LIMIT", 0.2)

    async def mute(request: Request, answer: Answer) -> None:
        if request.method == "POST":
            await answer.send(405)
        else:
            await answer.start_stream()
            await answer.gone()

    async with serve(mute) as server:
        with trio.fail_after(3):
            error = await failure_of(connect_http(Origin(server.url()), World().terms))
        assert "no event stream named an endpoint within 0.2 s" in error.message


# --------------------------------------------------------------------------------------- servers that a runtime started
class Refusing(httpx.AsyncBaseTransport):
    """Nobody listens the first times."""

    def __init__(self, url: str) -> None:
        self.inner = open_transport(Origin(url))
        self.refused = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.refused < 2:
            self.refused += 1
            raise httpx.ConnectError("Connection refused")
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_RB07_a_server_that_was_just_started_is_waited_for_until_it_listens() -> None:
    """Refused, hung up on, and told by a proxy that nobody is there: all of it is tried again."""
    turns: list[str] = []
    good = McpScript()

    async def script(request: Request, answer: Answer) -> None:
        turns.append(request.method)
        if len(turns) == 1:
            raise Hangup
        if len(turns) < 5:
            return await answer.send(500 + len(turns))
        if len(turns) == 5:
            return await answer.send(406)
        await good(request, answer)

    async with serve(script) as server:
        url = server.url("/mcp")
        transport = Refusing(url)
        async with connect_http(Origin(url, transport=lambda: transport, starting=True), World().terms) as link:
            assert await ask_server(link, '{"n":1}') == {"echo": {"n": 1}}
    assert transport.refused == 2
    assert turns[:5] == ["GET"] * 5 and turns[5] == "POST"


async def test_RB03_P4_callers_are_told_at_once_when_the_server_behind_a_url_has_ended() -> None:
    ending = trio.Event()

    async def ended() -> str:
        await ending.wait()
        return "container exited with code 1"

    async def script(request: Request, answer: Answer) -> None:
        if request.rpc == "tools/call":
            ending.set()
            await trio.sleep_forever()
        await good(request, answer)

    good = McpScript()
    async with (
        serve(script) as server,
        connect_http(Origin(server.url("/mcp"), ended=ended), World().terms) as link,
    ):
        with trio.fail_after(5), pytest.raises(LinkLost, match="container exited with code 1"):
            await reply_of(link.call(exchange(seconds=60)))
        await link.wait_closed()


async def test_RB01_a_server_that_ends_while_it_is_waited_for_is_told_by_its_reason() -> None:
    async def ended() -> str:
        await trio.sleep(0.1)
        return "container exited with code 3: no such module"

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        origin = Origin(f"http://127.0.0.1:{taken.getsockname()[1]}/mcp", starting=True, ended=ended)
        error = await failure_of(connect_http(origin, World().terms))
    assert isinstance(error, StartFailed) and error.message == "container exited with code 3: no such module"


async def test_RB01_a_handshake_that_breaks_since_the_server_ends_is_told_by_its_reason() -> None:
    broken = trio.Event()

    async def ended() -> str:
        await broken.wait()
        return "container ran out of memory"

    async def script(request: Request, answer: Answer) -> None:
        broken.set()
        raise Hangup

    async with serve(script) as server:
        error = await failure_of(connect_http(Origin(server.url("/mcp"), ended=ended), World().terms))
    assert isinstance(error, StartFailed) and error.message == "container ran out of memory"


async def test_L16_a_timeout_at_a_url_is_explained_too() -> None:
    async def script(request: Request, answer: Answer) -> None:
        if request.rpc == "tools/call":
            await trio.sleep_forever()
        await good(request, answer)

    good = McpScript()
    async with serve(script) as server:
        origin = Origin(server.url("/mcp"), remark=lambda: "container is paused")
        async with connect_http(origin, World().terms) as link:
            with pytest.raises(UpstreamTimeout, match=r"within 0\.2 s: container is paused"):
                await reply_of(link.call(exchange(seconds=0.2)))
