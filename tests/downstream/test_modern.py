"""The modern front over HTTP, in front of a real router and scripted servers of both eras."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.auth.principal import ANONYMOUS
from gateway.downstream.modern import MAX_CONTEXTS, ModernFront
from gateway.exchange import Client
from gateway.protocol.message import decode_request
from gateway.router import Router
from tests.downstream.edge_kit import House, edge, entry
from tests.downstream.legacy_kit import Peer, Response, until
from tests.running import ACCEPT, RunningGateway, echo_entry
from tests.scripted import MemoryPipe, Script

META = "io.modelcontextprotocol/"
PATH = "/servers/s/mcp"
Answer = Callable[[MemoryPipe, dict[str, Any]], None]


def context(capabilities: Any = None, **more: Any) -> dict[str, Any]:
    own = {META + "protocolVersion": "2026-07-28", META + "clientCapabilities": capabilities or {}}
    return {**own, **more}


def modern(method: str = "tools/call", *, id: Any = 1, meta: Any = None, **params: Any) -> dict[str, Any]:
    if method == "tools/call":
        params = {"name": "x", "arguments": {}, **params}
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": {**params, "_meta": meta or context()}}


def mirrored(body: dict[str, Any]) -> dict[str, str]:
    params = body["params"]
    name = params.get("name") or params.get("uri")
    found = {"content_type": "application/json", "mcp_protocol_version": "2026-07-28", "mcp_method": body["method"]}
    return found | ({"mcp_name": name} if name else {})


async def ask(house: House, body: dict[str, Any], path: str = PATH, **headers: Any) -> Response:
    sent: dict[str, Any] = {**mirrored(body), **headers}
    return await house.ask("POST", path, body, **sent)


@asynccontextmanager
async def begun(house: House, body: dict[str, Any], path: str = PATH) -> Any:
    """A request of which only the head of the response has been read."""
    async with house.connect() as peer:
        opened: list[tuple[Peer, Response]] = []

        async def send() -> None:
            with suppress(trio.ClosedResourceError):
                response = await peer.send("POST", path, None, json.dumps(body).encode(), **mirrored(body))
                opened.append((peer, response))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            yield opened, peer
            nursery.cancel_scope.cancel()


def reply(pipe: MemoryPipe, message: dict[str, Any], **result: Any) -> None:
    pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})


def to_requests(answer: Answer) -> Answer:
    """Answer what wants an answer."""
    return lambda pipe, message: answer(pipe, message) if "id" in message and "method" in message else None


def asking(*questions: dict[str, Any], capabilities: Any = None) -> Script:
    """A legacy server that puts questions in each call and answers with what it was answered."""
    calls: dict[str, tuple[Any, list[Any]]] = {}

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            reply(pipe, message, tools=[])
        elif message.get("method") == "tools/call":
            for number, question in enumerate(questions):
                key = f"{message['id']}-{number}"
                calls[key] = (message["id"], [])
                pipe.say({"jsonrpc": "2.0", "id": key, **question})
        elif "method" not in message:
            id, _ = calls[message["id"]]
            answers = [m for m in script.seen if str(m.get("id")).startswith(f"{id}-")]
            if len(answers) == len(questions):
                text = json.dumps([m.get("result", m.get("error")) for m in answers])
                pipe.say({"jsonrpc": "2.0", "id": id, "result": {"content": [{"type": "text", "text": text}]}})

    script = Script(answer=answer)
    return script


FORM = {"method": "elicitation/create", "params": {"message": "?", "requestedSchema": {"type": "object"}}}
ROOTS = {"method": "roots/list", "params": {}}
ASKABLE = {"elicitation": {}, "roots": {}, "sampling": {}}


# ----------------------------------------------------------------------------------------------------- plain requests
@pytest.mark.parametrize("speaks_modern", [True, False])
async def test_a_reply_says_what_the_modern_era_wants_of_it(speaks_modern: bool) -> None:
    async with edge(entry("s", Script(modern=speaks_modern))) as house:
        response = await ask(house, modern(id="seven"))
        assert response.status == 200
        assert response.json["id"] == "seven"
        result = response.json["result"]
        assert result["resultType"] == "complete"
        assert result["_meta"][META + "serverInfo"] == {"name": "g", "version": "0"}
        assert result["echo"]["name"] == "x"


async def test_discover_starts_nothing_and_then_says_what_the_server_can() -> None:
    script = Script()
    async with edge(entry("s", script)) as house:
        for path in (PATH, "/mcp"):
            result = (await ask(house, modern("server/discover"), path)).json["result"]
            assert result["supportedVersions"] == ["2026-07-28"]
            assert result["capabilities"]["tools"] == {"listChanged": True}
            assert (result["ttlMs"], result["cacheScope"]) == (0, "private")
        assert script.starts == 0
        await ask(house, modern())
        capabilities = (await ask(house, modern("server/discover"))).json["result"]["capabilities"]
        assert capabilities == {
            "tools": {"listChanged": True},
            "resources": {"subscribe": True, "listChanged": True},
        }  # and no logging: a shared legacy server does not say whose logs it writes


@pytest.mark.parametrize("method", ["initialize", "ping", "logging/setLevel", "resources/subscribe", "made/up"])
async def test_removed_and_unknown_methods_are_404(method: str) -> None:
    def refuse(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "no"}})

    async with edge(entry("s", Script(answer=to_requests(refuse)))) as house:
        response = await ask(house, modern(method, uri="test://a"), mcp_name=None)
        assert (response.status, response.json["error"]["code"]) == (404, -32601)


async def test_checks_come_in_the_order_of_the_specification() -> None:
    """Each request breaks every rule from the one it is refused for on (protocol.md section 3, check order)."""
    bad = context()
    bad[META + "protocolVersion"] = "2099-01-01"
    incomplete = {META + "protocolVersion": "2099-01-01"}
    async with edge(entry("s", Script())) as house:

        async def code(meta: Any, **headers: Any) -> tuple[int, int]:
            response = await ask(house, modern("ping", meta=meta), **headers)
            return response.status, response.json["error"]["code"]

        assert (await ask(house, modern("ping", meta=incomplete), accept="text/html")).status == 406
        assert await code(incomplete, mcp_method="x") == (400, -32602)
        assert await code(bad, mcp_method="x") == (400, -32020)
        assert await code(bad, mcp_protocol_version="2099-01-01") == (400, -32022)
        assert await code(None) == (404, -32601)


async def test_notifications_are_taken_and_replies_are_not() -> None:
    async with edge(entry("s", Script())) as house:
        body = modern("notifications/cancelled", requestId=1)
        del body["id"]
        assert (await ask(house, body)).status == 202
        version = {"mcp_protocol_version": "2026-07-28", "content_type": "application/json"}
        response = await house.ask("POST", PATH, {"jsonrpc": "2.0", "id": 1, "result": {}}, **version)
        assert (response.status, response.json["error"]["code"]) == (400, -32600)


async def test_a_body_that_is_no_single_message_is_refused_after_what_comes_before_it() -> None:
    version = {"mcp_protocol_version": "2026-07-28"}
    hello = {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
    async with edge(entry("s", Script())) as house:
        opening = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
        session = (await house.ask("POST", PATH, opening)).headers["mcp-session-id"]
        batch = [{"jsonrpc": "2.0", "id": 1, "method": "ping"}]
        for body, code in ((batch, -32600), (b"{", -32700), (b"7", -32600)):
            response = await house.ask("POST", PATH, body, mcp_session_id=session, **version)
            assert (response.status, response.json["error"]["code"]) == (400, code)
            response = await house.ask("POST", PATH, body, accept="application/json", **version)
            assert response.status == 406


def test_a_client_is_the_same_in_all_its_requests() -> None:
    front = ModernFront(cast(Router, None), {})

    def client(capabilities: Any = None, **more: Any) -> Client:
        message = decode_request(json.dumps(modern(meta=context(capabilities, **more))))
        return front.client_of(ANONYMOUS, message)

    assert client() is client() is client(progressToken=1) is client(traceparent="00-1-2-03")
    assert client({"sampling": {}}).key != client().key
    assert client({"sampling": {}, "x": {}}).key == client({"sampling": {}}).key  # can't be asked for
    assert client(**{META + "logLevel": "info"}) is not client()
    for number in range(MAX_CONTEXTS + 1):
        client({"n": number})
    assert len(front._contexts) == MAX_CONTEXTS


@pytest.mark.parametrize(
    "wrong",
    [
        {META + "protocolVersion": 1},
        {META + "protocolVersion": None},
        {META + "clientCapabilities": []},
        {META + "clientCapabilities": None},
        {META + "clientInfo": "me"},
        {META + "logLevel": "loud"},
        {META + "logLevel": []},
    ],
)
async def test_what_a_request_says_of_its_client_must_be_complete(wrong: dict[str, Any]) -> None:
    script = Script()
    async with edge(entry("s", script)) as house:
        response = await ask(house, modern(meta={**context(), **wrong}))
        assert (response.status, response.json["error"]["code"]) == (400, -32602)
        assert next(iter(wrong)) in response.json["error"]["message"]
        assert script.starts == 0


async def test_faults_are_told_as_section_7_has_them() -> None:
    async with edge(entry("s", Script(fail_starts=99))) as house:
        response = await ask(house, modern())
        result = response.json["result"]
        assert (response.status, result["isError"], result["resultType"]) == (200, True, "complete")
        response = await ask(house, modern("prompts/get", name="x"))
        assert (response.status, response.json["error"]["code"]) == (200, -32603)
        response = await ask(house, modern(), "/servers/none/mcp")
        assert (response.status, response.json["error"]["code"]) == (404, -32001)


@pytest.mark.parametrize(("code", "status"), [(-32602, 400), (-32603, 200), (-32002, 400), (1234, 200), (-32601, 404)])
async def test_a_servers_errors_have_their_status(code: int, status: int) -> None:
    def refuse(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "error": {"code": code, "message": "no"}})

    async with edge(entry("s", Script(answer=to_requests(refuse)))) as house:
        response = await ask(house, modern("resources/read", uri="test://a"))
        error = response.json["error"]
        assert (response.status, error["code"]) == (status, -32602 if code == -32002 else code)
        if error["code"] == -32602:
            assert error["data"]["uri"] == "test://a"


async def test_lists_of_the_merged_view_say_how_long_they_may_be_kept() -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        reply(pipe, message, tools=[{"name": "t", "inputSchema": {}}], ttlMs=700, cacheScope="public")

    async with edge(entry("s", Script(modern=True, answer=to_requests(answer)))) as house:
        for _ in range(2):
            result = (await ask(house, modern("tools/list"), "/mcp")).json["result"]
            assert (result["ttlMs"], result["cacheScope"], result["resultType"]) == (700, "public", "complete")
            assert [tool["name"] for tool in result["tools"]] == ["s__t"]


# ------------------------------------------------------------------------------------------------- on the way, and gone
async def test_RB20_a_client_that_goes_away_has_cancelled() -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            reply(pipe, message, tools=[])

    script = Script(answer=answer)
    async with edge(entry("s", script)) as house:
        async with begun(house, modern()) as (_, peer):
            with trio.fail_after(5):
                while "tools/call" not in script.methods():
                    await trio.sleep(0.01)
            await peer.stream.aclose()
        with trio.fail_after(5):
            while "notifications/cancelled" not in script.methods():
                await trio.sleep(0.01)


async def test_progress_and_wanted_logs_make_a_stream_and_the_reply_ends_it() -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") != "tools/call":
            if "id" in message:
                reply(pipe, message)
            return
        token = message["params"]["_meta"]["progressToken"]
        for value in (1, 2):
            params = {"progressToken": token, "progress": value}
            pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})
        for level in ("debug", "warning"):
            params = {"level": level, "data": level}
            pipe.say({"jsonrpc": "2.0", "method": "notifications/message", "params": params})
        reply(pipe, message, content=[])

    async with edge(entry("s", Script(answer=to_requests(answer)), isolation="session")) as house:
        meta = context(progressToken="p", **{META + "logLevel": "info"})
        body = modern(id=5, meta=meta)
        async with begun(house, body) as (opened, _):
            with trio.fail_after(5):
                while not opened:
                    await trio.sleep(0.01)
            response = opened[0][1]
            assert (response.status, response.headers["x-accel-buffering"]) == (200, "no")
            messages = []
            while (event := await response.event()) is not None:
                assert event.id == ""
                messages.append(event.json)
        *way, last = messages
        assert [m["params"].get("progress", m["params"].get("level")) for m in way] == [1, 2, "warning"]
        assert way[0]["params"]["progressToken"] == "p"
        assert (last["id"], last["result"]["resultType"]) == (5, "complete")


async def test_logs_that_nobody_asked_for_stay_here() -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        pipe.say({"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "error", "data": 1}})
        reply(pipe, message, content=[])

    async with edge(entry("s", Script(answer=to_requests(answer)), isolation="session")) as house:
        response = await ask(house, modern())
        assert not response.is_stream
        assert response.json["result"]["content"] == []


async def test_RB20_a_client_that_goes_away_while_it_waits_for_a_slot_has_called_nothing() -> None:
    held: list[dict[str, Any]] = []

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            reply(pipe, message, tools=[])
        elif message.get("method") == "tools/call":
            held.append(message)

    script = Script(answer=to_requests(answer))
    async with edge(entry("s", script), max_connections_per_server=1) as house:
        async with begun(house, modern()):
            await until(lambda: held)
            async with begun(house, modern()) as (_, peer):
                await until(lambda: house.endpoint.modern._waiting)
                await peer.stream.aclose()
                await until(lambda: not house.endpoint.modern._waiting)
            reply(script.pipe, held[0], content=[])
            async with begun(house, modern(name="next")):
                await until(lambda: len(held) == 2)
        assert [m["params"]["name"] for m in held] == ["x", "next"]


async def test_RB20_a_client_that_goes_away_while_its_server_starts_has_called_nothing(mock_clock: MockClock) -> None:
    mock_clock.rate = 10
    script = Script(start_seconds=5)
    async with edge(entry("s", script)) as house:
        async with begun(house, modern("prompts/list")) as (_, peer):
            await until(lambda: script.starts)
            await peer.stream.aclose()
        assert (await ask(house, modern("prompts/get", name="x"))).status == 200
        assert "prompts/list" not in script.methods()


@pytest.mark.parametrize("start_seconds", [0, 40])
async def test_a_long_silence_is_broken_by_comments_on_a_stream(mock_clock: MockClock, start_seconds: float) -> None:
    mock_clock.rate = 100
    held: list[tuple[MemoryPipe, dict[str, Any]]] = []
    script = Script(answer=to_requests(lambda pipe, message: held.append((pipe, message))), start_seconds=start_seconds)
    async with edge(entry("s", script), request_timeout_seconds=100) as house:
        began = trio.current_time()
        async with begun(house, modern("resources/list", id="l")) as (opened, _):
            while not opened:
                await trio.sleep(0.1)
            assert 15 <= trio.current_time() - began < 30
            response = opened[0][1]
            while response.raw.count(b":") < 2:
                await response.chunk()
            assert response.raw.replace(b":", b"").split() == []
            while not held:
                await trio.sleep(0.1)
            reply(*held[0], resources=[])
            assert (await response.event()).json["id"] == "l"
            assert await response.event() is None


async def test_RB09_what_a_hostile_server_says_costs_its_own_request_only() -> None:
    odd = [
        b'{"jsonrpc":"2.0","id":ID,"error":{"code":[],"message":{}}}',
        b'{"jsonrpc":"2.0","id":ID,"error":{"code":-32042,"message":1,"data":{"elicitations":[1,{"url":2}]}}}',
        b'{"jsonrpc":"2.0","id":ID,"result":{"resultType":"input_required"}}',
        b'{"jsonrpc":"2.0","id":ID,"result":{"resultType":"input_required","inputRequests":{"a":1e999}}}',
        b'{"jsonrpc":"2.0","id":ID,"result":{"resultType":"input_required","inputRequests":[{}],"x":"\\ud800"}}',
        b'{"jsonrpc":"2.0","id":ID,"result":[]}',
    ]
    before = b"".join(
        b'{"jsonrpc":"2.0","method":"notifications/message","params":%s}\n' % params for params in (b"[]", b"{}", b"1")
    )

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] != "tools/call":
            reply(pipe, message, tools=[])
            return
        line = odd[int(message["params"]["name"])].replace(b"ID", str(message["id"]).encode())
        pipe.say_bytes(before + line + b"\n")

    script = Script(answer=to_requests(answer))
    meta = context({"elicitation": {"url": {}}}, **{META + "logLevel": "debug"})
    async with edge(entry("s", script, isolation="session")) as house:
        for number in range(len(odd)):
            async with begun(house, modern(name=str(number), meta=meta)) as (opened, _):
                await until(lambda: opened)
                response = opened[0][1]
                last = (await response.events())[-1].json if response.is_stream else json.loads(await response.read())
                assert last["id"] == 1
        assert script.starts == 1
        wrong = {"resultType": "input_required", "requestState": "s"}
        script.answer = to_requests(lambda pipe, message: reply(pipe, message, **wrong))
        response = await ask(house, modern("resources/list", meta=meta))
        assert (response.status, response.json["error"]["code"]) == (200, -32603)


async def test_RB26_halves_of_surrogate_pairs_pass() -> None:
    half = "\ud800"
    script = asking({"method": "elicitation/create", "params": {"message": half, "requestedSchema": {}}})
    async with edge(entry("s", script, isolation="session")) as house:

        async def half_way(body: dict[str, Any]) -> Any:
            # The test client says what it repeats in headers in latin-1.
            return (await ask(house, body, mcp_name="=?base64?eA==?=")).json

        body = modern(meta=context(ASKABLE), arguments={half: half})
        first = (await half_way(body))["result"]
        (key,) = first["inputRequests"]
        assert first["inputRequests"][key]["params"]["message"] == half
        more = {"inputResponses": {key: {"content": {"a": half}}}, "requestState": first["requestState"]}
        done = await half_way(modern(meta=context(ASKABLE), arguments={half: half}, **more))
        assert json.loads(done["result"]["content"][0]["text"]) == [{"content": {"a": half}}]
        version = modern(meta={**context(), META + "protocolVersion": half})
        assert (await half_way(version))["error"]["code"] == -32020
        listen = modern("subscriptions/listen", notifications={"resourceSubscriptions": [half]})
        script.answer = None
        async with begun(house, listen) as (opened, _):
            await until(lambda: opened)
            assert (await opened[0][1].event()).json["method"].endswith("/acknowledged")


# ------------------------------------------------------------------------------------------------------------- parking
async def test_B2_a_legacy_servers_questions_are_answered_by_the_retry() -> None:
    script = asking(FORM, ROOTS)
    async with edge(entry("s", script, isolation="session")) as house:
        first = (await ask(house, modern(meta=context(ASKABLE)))).json["result"]
        assert first["resultType"] == "input_required"
        assert {entry["method"] for entry in first["inputRequests"].values()} == {"elicitation/create", "roots/list"}
        (one, two) = first["inputRequests"]
        responses = {one: {"action": "accept", "content": {"a": 1}}, "extra": {}}
        state = first["requestState"]
        half = (await ask(house, modern(meta=context(ASKABLE), inputResponses=responses, requestState=state))).json
        assert list(half["result"]["inputRequests"].values()) == [first["inputRequests"][two]]
        again = modern(id=3, meta=context(ASKABLE), requestState=half["result"]["requestState"])
        (key,) = half["result"]["inputRequests"]
        assert key == two
        again["params"]["inputResponses"] = {key: {"roots": []}}
        done = (await ask(house, again)).json
        assert done["id"] == 3
        assert json.loads(done["result"]["content"][0]["text"]) == [
            {"action": "accept", "content": {"a": 1}},
            {"roots": []},
        ]
        assert script.methods().count("tools/call") == 1
        # Once is enough.
        replayed = await ask(house, again)
        assert (replayed.status, replayed.json["error"]["code"]) == (400, -32602)
        assert script.methods().count("tools/call") == 1


async def test_B2_a_question_that_was_not_declared_is_refused_and_the_call_cancelled() -> None:
    script = asking(FORM)
    async with edge(entry("s", script, isolation="session")) as house:
        response = await ask(house, modern(meta=context({"sampling": {}})))
        assert (response.status, response.json["error"]["code"]) == (400, -32021)
        assert response.json["error"]["data"]["requiredCapabilities"] == {"elicitation": {"form": {}}}
        await until(lambda: {"action": "cancel"} in [m.get("result") for m in script.seen])
        # An answer before that would be one for the tool.
        assert "notifications/cancelled" in [m.get("method") for m in script.seen[:-1]]


def in_turn(*rounds: list[dict[str, Any]]) -> Script:
    """A legacy server whose one call goes through these rounds of messages, each sent when the last is answered.

    In a round, "TOKEN" stands for the call's progress token, and one with a result is the reply.
    """
    calls: list[dict[str, Any]] = []
    left = [*rounds]

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            reply(pipe, message, tools=[])
            return
        if message.get("method") == "tools/call":
            calls.append(message)
        elif "method" in message:
            return
        token = calls[-1]["params"]["_meta"].get("progressToken")
        for each in left.pop(0):
            if "result" in each:
                each = {**each, "id": calls[-1]["id"]}
            pipe.say(json.loads(json.dumps({"jsonrpc": "2.0", **each}).replace('"TOKEN"', json.dumps(token))))

    return Script(answer=answer)


def progress(value: int) -> dict[str, Any]:
    return {"method": "notifications/progress", "params": {"progressToken": "TOKEN", "progress": value}}


async def test_B2_no_key_means_two_questions_of_one_call() -> None:
    done = {"result": {"content": []}}
    script = in_turn([{"id": "a", **FORM}], [{"id": "a", **FORM}, {"id": "b", **ROOTS}], [], [done])
    keys: list[str] = []
    async with edge(entry("s", script, isolation="session")) as house:
        more: dict[str, Any] = {}
        while True:
            result = (await ask(house, modern(meta=context(ASKABLE), **more))).json["result"]
            if result["resultType"] == "complete":
                break
            keys += result["inputRequests"]
            more = {"requestState": result["requestState"]}
            more["inputResponses"] = {key: {"action": "decline"} for key in result["inputRequests"]}
    assert len(keys) == len(set(keys)) == 3


async def test_of_the_progress_while_parked_the_latest_goes_on_under_the_new_token() -> None:
    script = in_turn([progress(1), {"id": "a", **FORM}], [*map(progress, (5, 6)), {"result": {"content": []}}])
    async with edge(entry("s", script, isolation="session")) as house:
        body = modern(meta=context(ASKABLE, progressToken="old"))
        async with begun(house, body) as (opened, _):
            await until(lambda: opened)
            first = [event.json for event in await opened[0][1].events()]
        assert first[0]["params"] == {"progressToken": "old", "progress": 1}
        token = next(m for m in script.seen if m.get("method") == "tools/call")["params"]["_meta"]["progressToken"]
        for each in map(progress, (2, 3, 4)):
            script.pipe.say(json.loads(json.dumps({"jsonrpc": "2.0", **each}).replace('"TOKEN"', str(token))))
        await wait_all_tasks_blocked()
        result = first[-1]["result"]
        more = {"inputResponses": {key: {"action": "accept"} for key in result["inputRequests"]}}
        again = modern(meta=context(ASKABLE, progressToken=7), requestState=result["requestState"], **more)
        async with begun(house, again) as (opened, _):
            await until(lambda: opened)
            rest = [event.json for event in await opened[0][1].events()]
    told = [m["params"] for m in rest if m.get("method") == "notifications/progress"]
    assert told == [{"progressToken": 7, "progress": value} for value in (4, 5, 6)]
    assert rest[-1]["result"]["resultType"] == "complete"


async def test_B2_a_call_that_has_ended_meanwhile_asks_no_more() -> None:
    script = in_turn([{"id": "a", **FORM}])
    async with edge(entry("s", script, isolation="session")) as house:
        state = (await ask(house, modern(meta=context(ASKABLE)))).json["result"]["requestState"]
        call = next(m for m in script.seen if m.get("method") == "tools/call")
        reply(script.pipe, call, content=[], gave="up")
        await wait_all_tasks_blocked()
        response = await ask(house, modern(meta=context(ASKABLE), requestState=state))
        assert response.json["result"]["gave"] == "up"


async def test_B2_a_client_that_goes_away_while_its_questions_are_gathered_is_asked_nothing() -> None:
    script = asking(FORM, ROOTS)
    async with edge(entry("s", script, isolation="session")) as house:
        async with begun(house, modern(meta=context(ASKABLE))) as (opened, peer):
            await until(lambda: "tools/call" in script.methods())
            await peer.stream.aclose()
            await until(lambda: "notifications/cancelled" in script.methods())
            assert not opened
        assert len(house.endpoint.modern.parking) == 0

        def answers() -> list[Any]:
            return [m.get("result", m.get("error", {}).get("code")) for m in script.seen if "method" not in m]

        await until(lambda: answers() == [{"action": "cancel"}, -32601])  # or the server would count them as open


@pytest.mark.parametrize("method", ["tools/list", "completion/complete"])
async def test_B2_questions_that_no_retry_could_answer_are_declined(method: str) -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == method:
            calls.append(message)
            pipe.say({"jsonrpc": "2.0", "id": "q", **FORM})
        elif message.get("id") == "q":
            reply(pipe, calls[-1], tools=[], completion={"values": []}, answered=message["result"])

    calls: list[dict[str, Any]] = []
    async with edge(entry("s", Script(answer=answer), isolation="session")) as house:
        response = await ask(house, modern(method, meta=context(ASKABLE)))
        assert response.json["result"]["answered"] == {"action": "cancel"}


async def test_P8_more_parked_calls_than_a_principal_may_have_are_refused_and_declined() -> None:
    script = asking(FORM)
    async with edge(entry("s", script, isolation="session"), max_parked=4) as house:
        assert (await ask(house, modern(meta=context(ASKABLE)))).status == 200
        response = await ask(house, modern(meta=context(ASKABLE)))
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert "max_parked" in response.json["error"]["message"]
        await until(lambda: {"action": "cancel"} in [m.get("result") for m in script.seen])


async def test_B2_a_lost_park_is_answered_in_the_clients_place(mock_clock: MockClock) -> None:
    mock_clock.rate = 10
    script = asking(FORM)
    async with edge(entry("s", script, isolation="session"), park_timeout_seconds=5) as house:
        first = (await ask(house, modern(meta=context(ASKABLE)))).json["result"]
        await trio.sleep(10)
        await wait_all_tasks_blocked()
        assert {"action": "cancel"} in [m.get("result") for m in script.seen]
        response = await ask(house, modern(meta=context(ASKABLE), requestState=first["requestState"]))
        assert (response.status, response.json["error"]["code"]) == (400, -32602)
        assert "start the call again" in response.json["error"]["message"]


async def test_B2_a_modern_servers_state_comes_back_to_it_and_only_from_the_same_call() -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "tools/call" and "requestState" not in params:
            question = {"method": "elicitation/create", "params": {"mode": "form", "message": "?"}}
            reply(pipe, message, resultType="input_required", inputRequests={"own": question}, requestState="theirs")
        elif message.get("method") == "tools/call":
            told = json.dumps([params["requestState"], params["inputResponses"]])
            reply(pipe, message, resultType="complete", content=[{"type": "text", "text": told}])
        elif message.get("method") == "tools/list":
            reply(pipe, message, tools=[])

    async with edge(entry("s", Script(modern=True, answer=to_requests(answer)))) as house:
        first = (await ask(house, modern(meta=context(ASKABLE)))).json["result"]
        assert list(first["inputRequests"]) == ["own"]  # keys are the server's
        assert "theirs" not in first["requestState"]
        retry = {"inputResponses": {"own": {"action": "decline"}}, "requestState": first["requestState"]}
        done = (await ask(house, modern(meta=context(ASKABLE), **retry))).json["result"]
        assert json.loads(done["content"][0]["text"]) == ["theirs", {"own": {"action": "decline"}}]
        other = await ask(house, modern(meta=context(ASKABLE), arguments={"b": 1}, **retry))
        assert (other.status, other.json["error"]["code"]) == (400, -32602)
        undeclared = await ask(house, modern())
        assert (undeclared.status, undeclared.json["error"]["code"]) == (400, -32021)


@pytest.mark.parametrize("can", [True, False])
async def test_B2_urls_to_open_first_are_asked_for_and_the_call_made_again(can: bool) -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] == "tools/call" and script.methods().count("tools/call") == 1:
            urls = [{"mode": "url", "elicitationId": "e", "url": "https://x.example/", "message": "sign in"}]
            error = {"code": -32042, "message": "first", "data": {"elicitations": urls}}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "error": error})
        elif message.get("method") == "tools/call":
            reply(pipe, message, content=[], told=sorted(message["params"]))
        else:
            reply(pipe, message, tools=[])

    script = Script(answer=to_requests(answer))
    async with edge(entry("s", script, isolation="session")) as house:
        meta = context({"elicitation": {"url": {}} if can else {}})
        response = await ask(house, modern(meta=meta))
        if not can:
            assert (response.status, response.json["error"]["code"]) == (400, -32021)
            return
        (key, request) = next(iter(response.json["result"]["inputRequests"].items()))
        assert request["params"] == {"mode": "url", "message": "sign in", "url": "https://x.example/"}
        assert "requestState" not in response.json["result"]
        done = (await ask(house, modern(meta=meta, inputResponses={key: {"action": "accept"}}))).json["result"]
        assert done["told"] == ["_meta", "arguments", "name"]


# -------------------------------------------------------------------------------------------------------- subscriptions
async def test_a_subscription_is_acknowledged_tagged_and_ended() -> None:
    script = Script()
    async with edge(entry("s", script)) as house:
        await ask(house, modern())
        wanted = {"promptsListChanged": True, "resourceSubscriptions": ["test://a"], "madeUp": True}
        body = modern("subscriptions/listen", id="mine", notifications=wanted)
        async with begun(house, body) as (opened, _):
            with trio.fail_after(5):
                while not opened:
                    await trio.sleep(0.01)
            response = opened[0][1]
            first = (await response.event()).json
            tag = {META + "subscriptionId": "mine"}
            honoured = {"promptsListChanged": True, "resourceSubscriptions": ["test://a"]}
            assert first["method"] == "notifications/subscriptions/acknowledged"
            assert first["params"] == {"notifications": honoured, "_meta": tag}
            for method in ("resources/list_changed", "prompts/list_changed"):
                script.pipe.say({"jsonrpc": "2.0", "method": f"notifications/{method}"})
            for uri in ("test://b", "test://a"):
                params = {"uri": uri}
                script.pipe.say({"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": params})
            told = [(await response.event()).json for _ in range(2)]
            assert sorted((m["method"], m["params"].get("uri")) for m in told) == [
                ("notifications/prompts/list_changed", None),
                ("notifications/resources/updated", "test://a"),
            ]
            assert all(m["params"]["_meta"] == tag for m in told)
            # Told ten times a second at most, also what no hub spaces.
            started, updates = trio.current_time(), 0
            async with trio.open_nursery() as nursery:

                async def touch() -> None:
                    update = {"jsonrpc": "2.0", "method": "notifications/resources/updated"}
                    for _ in range(100):
                        script.pipe.say({**update, "params": {"uri": "test://a"}})
                        await trio.sleep(0.01)
                    script.pipe.say({"jsonrpc": "2.0", "method": "notifications/prompts/list_changed"})

                nursery.start_soon(touch)
                while (await response.event()).json["method"].endswith("updated"):
                    updates += 1
            assert 2 < updates <= (trio.current_time() - started) * 10 + 2
        with trio.fail_after(5):
            while "resources/unsubscribe" not in script.methods():
                await trio.sleep(0.01)


def test_C16_a_shutdown_ends_subscriptions_with_a_word(tmp_path: Path) -> None:
    body = modern("subscriptions/listen", id="mine", notifications={"toolsListChanged": True})
    headers = {name.replace("_", "-"): value for name, value in mirrored(body).items()}
    with RunningGateway(tmp_path, [echo_entry("s")]) as gateway:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
        connection.request("POST", PATH, json.dumps(body), {"Accept": ACCEPT, **headers})
        stream = connection.getresponse()
        line = stream.readline
        assert b"acknowledged" in b"".join(iter(line, b"\n"))
        gateway.process.send_signal(signal.SIGTERM)
        events = [json.loads(part.partition(b"data: ")[2]) for part in stream.read().split(b"\n\n") if part]
        connection.close()
        assert gateway.process.wait(20) == 0
    result, cancelled = events
    tag = {META + "subscriptionId": "mine"}
    assert (result["id"], result["result"]["resultType"]) == ("mine", "complete")
    assert result["result"]["_meta"].items() >= tag.items()
    assert cancelled["method"] == "notifications/cancelled"
    assert cancelled["params"] == {"requestId": "mine", "_meta": tag}


@pytest.mark.parametrize("wanted", [None, [], {"resourceSubscriptions": "test://a"}, {"resourceSubscriptions": [1]}])
async def test_a_subscription_to_nonsense_is_refused(wanted: Any) -> None:
    async with edge(entry("s", Script())) as house:
        response = await ask(house, modern("subscriptions/listen", notifications=wanted))
        assert (response.status, response.json["error"]["code"]) == (400, -32602)


# --------------------------------------------------------------------------------------------------- mirrored arguments
async def test_arguments_in_headers_are_compared_once_the_tools_are_known() -> None:
    schema = {"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}}

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            reply(pipe, message, tools=[{"name": "x", "inputSchema": schema}])
        elif message.get("method") == "tools/call":
            reply(pipe, message, content=[])

    script = Script(answer=to_requests(answer))
    async with edge(entry("s", script)) as house:
        call = modern(arguments={"region": "eu"})
        assert (await ask(house, call, mcp_param_region="eu")).status == 200
        for header in ("us", None):
            response = await ask(house, call, mcp_param_region=header)
            assert (response.status, response.json["error"]["code"]) == (400, -32020)
        assert (await ask(house, modern())).status == 200
        assert script.methods().count("tools/list") == 1
