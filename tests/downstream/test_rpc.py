"""Plain calls by server id, over real sockets, a real router and scripted servers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import trio

from gateway.config.model import Tenant
from gateway.downstream import rpc
from tests.downstream.edge_kit import House, edge, entry
from tests.downstream.legacy_kit import Response, until
from tests.scripted import MemoryPipe, Script

Answer = Callable[[MemoryPipe, dict[str, Any]], None]


def plain(method: str = "tools/call", id: Any = 1, server_id: Any = "echo", **more: Any) -> dict[str, Any]:
    return {"server_id": server_id, "jsonrpc": "2.0", "id": id, "method": method, **more}


def only(method: str, then: Answer) -> Answer:
    """Do ``then`` for one method, answer the others."""

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == method:
            then(pipe, message)
        elif "id" in message and "method" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})

    return answer


def raw(text: str) -> Answer:
    """Answer every call with this text, the id put in for @."""
    return only("tools/call", lambda pipe, m: pipe.say_bytes(text.replace("@", str(m["id"])).encode() + b"\n"))


def refused(response: Response, status: int, code: int, text: str, id: Any = 1) -> None:
    """The shape of H27, H28, H30, H32: an envelope, a top-level message, and who made it."""
    assert response.status == status, response.body
    found = response.json
    assert text in found["message"]
    assert found == {
        "jsonrpc": "2.0",
        "id": id,
        "error": {"code": code, "message": found["message"], "data": {"source": "gateway"}},
        "message": found["message"],
    }


# --------------------------------------------------------------------------------------------------------- the call
async def test_H7_server_id_is_stripped_and_the_reply_unchanged() -> None:
    reply = '{"result" : {"z":1.50, "a":[ ], "big":12345678901234567890}, "x-extra":true, "id":@, "jsonrpc":"2.0"}'
    script = Script(answer=raw(reply))
    async with edge(entry("echo", script)) as house:
        params = {"name": "t", "arguments": {"server_id": "mine"}, "_meta": {"a/b": 1}}
        response = await house.mcp(plain(id="x", params=params))
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    assert response.body.decode() == reply.replace("@", '"x"')
    sent = script.seen[-1]
    assert set(sent) == {"jsonrpc", "id", "method", "params"}
    assert sent["params"] == params


async def test_H7_starts_the_server_and_whatever_the_headers() -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        for accept in (None, "text/html", "application/json"):
            response = await house.mcp(plain(), accept=accept, mcp_session_id="nonsense", mcp_protocol_version="1")
            assert response.status == 200
    assert script.starts == 1


async def test_H8_rpc_takes_the_id_from_its_header() -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        body = {"jsonrpc": "2.0", "id": 5, "method": "tools/list", "params": {"a": 1}}
        response = await house.ask("POST", "/rpc", body, x_server_id="echo")
        assert response.json == {"jsonrpc": "2.0", "id": 5, "result": {"echo": {"a": 1}}}
        response = await house.ask("POST", "/rpc", body)
        assert response.status == 400
        assert response.json == {"error": "Bad Request", "message": "X-Server-ID header required"}


@pytest.mark.parametrize(
    "id_text", ["7", "-1", "1.50", "1e3", "12345678901234567890", '"7"', '"\\u0037"', "null", '""']
)
async def test_H23_ids_come_back_as_they_were_spelled(id_text: str) -> None:
    async with edge() as house:
        body = f'{{"server_id":"echo","id":{id_text},"method":"a","jsonrpc":"2.0"}}'.encode()
        response = await house.mcp(body)
        assert response.body.decode() == f'{{"jsonrpc": "2.0", "id": {id_text}, "result": {{"echo": null}}}}'


@pytest.mark.parametrize("path", ["/mcp", "/rpc"])
async def test_H22_jsonrpc_and_id_have_defaults(path: str) -> None:
    async with edge() as house:
        body = {"server_id": "echo", "method": "tools/list"}
        response = await house.ask("POST", path, body, x_server_id="echo")
        assert response.status == 200
        assert uuid.UUID(response.json["id"]).version == 4
        other = await house.ask("POST", path, body, x_server_id="echo")
        assert other.json["id"] != response.json["id"]


async def test_H22_notifications_are_taken_without_a_wait() -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        await house.mcp(plain())
        for method in ("notifications/initialized", "notifications/cancelled", "notifications/message"):
            response = await house.mcp({"server_id": "echo", "method": method, "params": {"level": "info"}})
            assert (response.status, response.body) == (202, b"")
        await house.mcp(plain())
    assert script.methods().count("notifications/message") == 1
    # What belongs to the gateway's own handshake and ids is not passed on.
    assert script.methods().count("notifications/initialized") == 1
    assert "notifications/cancelled" not in script.methods()


async def test_H22_a_notification_starts_nothing_but_its_server_must_exist() -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        note = {"server_id": "echo", "jsonrpc": "2.0", "method": "notifications/roots/list_changed"}
        assert (await house.mcp(note)).status == 202
        assert (await house.mcp({**note, "server_id": "nope"})).status == 404
    assert script.starts == 0


async def test_H39_initialize_is_answered_from_the_gateways_own_handshake() -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        params = {"protocolVersion": "2025-03-26", "capabilities": {"sampling": {}}, "clientInfo": {"name": "c"}}
        result = (await house.mcp(plain("initialize", params=params))).json["result"]
    assert (result["serverInfo"]["name"], result["protocolVersion"]) == ("scripted", "2025-03-26")
    assert result["capabilities"]["tools"] == {"listChanged": True}
    (sent,) = [m for m in script.seen if m.get("method") == "initialize"]
    assert sent["params"]["clientInfo"] != params["clientInfo"]
    assert sent["params"]["capabilities"] == {}


async def test_H40_what_the_server_says_in_between_is_not_the_reply() -> None:
    def chatty(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        pipe.say(
            {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "hello"}},
            {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"},
            {"jsonrpc": "2.0", "id": 99999, "result": {"stray": True}},
            {"jsonrpc": "2.0", "id": message["id"], "result": {"right": True}},
        )

    for isolation in ("shared", "principal"):
        async with edge(entry("echo", Script(answer=only("tools/call", chatty)), isolation=isolation)) as house:
            assert (await house.mcp(plain())).json["result"] == {"right": True}


@pytest.mark.parametrize("method", ["resources/templates/list", "prompts/get", "x-vendor/anything"])
async def test_H41_methods_are_forwarded(method: str) -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        assert (await house.mcp(plain(method, params={"a": 1}))).json["result"] == {"echo": {"a": 1}}
    assert script.methods()[-1] == method


async def test_ping_is_answered_for_servers_that_exist() -> None:
    async with edge() as house:
        assert (await house.mcp(plain("ping"))).json == {"jsonrpc": "2.0", "id": 1, "result": {}}
        refused(await house.mcp(plain("ping", server_id="nope")), 404, -32001, "Server 'nope' not found")


# ----------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("method", ["tools/call", "initialize", "ping", "resources/subscribe"])
async def test_H27_unknown_server(method: str) -> None:
    async with edge() as house:
        refused(await house.mcp(plain(method, server_id="nope")), 404, -32001, "Server 'nope' not found")
        body = {"jsonrpc": "2.0", "id": 1, "method": method}
        refused(await house.ask("POST", "/rpc", body, x_server_id="nope"), 404, -32001, "Server 'nope' not found")


async def test_A5_another_tenants_server_is_unknown_in_the_same_words() -> None:
    tenants = (Tenant("a", "key-a", ("red",)), Tenant("b", "key-b", ("blue",)))
    async with edge(entry("echo", Script(), namespace="red"), tenants=tenants) as house:
        assert (await house.mcp(plain(), x_api_key="key-a")).status == 200
        hidden = await house.mcp(plain(), x_api_key="key-b")
        absent = await house.mcp(plain(server_id="nope"), x_api_key="key-b")
        refused(hidden, 404, -32001, "Server 'echo' not found")
        assert hidden.body == absent.body.replace(b"nope", b"echo")


async def test_H28_failed_start() -> None:
    async with edge(entry("echo", Script(fail_starts=9))) as house:
        message = "Failed to connect to server: process exited with code 1"
        refused(await house.mcp(plain()), 502, -32000, message)
        response = await house.mcp(plain())
        refused(response, 502, -32000, "Failed to connect to server: ")
        response = await house.mcp(plain())  # the second failure in a row is followed by a wait (design section 7)
        refused(response, 502, -32000, "failed 2 times in a row")
        assert response.headers["retry-after"] == "1" or response.headers["retry-after"] == "2"


@pytest.mark.parametrize("slots", [1, 10])
async def test_H28_L16_timeout(slots: int) -> None:
    script = Script(answer=only("tools/call", lambda pipe, m: None))
    spec = entry("echo", script, request_timeout_seconds=0.2, max_connections_per_server=slots)
    async with edge(spec) as house:
        replies = []

        async def one() -> None:
            replies.append(await house.mcp(plain()))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(one)
        for response in replies:
            refused(response, 504, -32000, "Server error: ")
        assert (await house.mcp(plain("tools/list"))).status == 200
    assert script.starts == 1  # a server that hangs in one call stays up (RB04)


async def test_H29_the_servers_own_error_passes_unchanged_with_200() -> None:
    reply = '{"jsonrpc":"2.0","id":@,"error":{"code":-32602,"message":"Unknown tool","data":[1]}}'
    async with edge(entry("echo", Script(answer=raw(reply)))) as house:
        response = await house.mcp(plain(id=4))
        assert (response.status, response.body.decode()) == (200, reply.replace("@", "4"))


async def test_H31_RB03_a_server_that_ends_mid_call() -> None:
    script = Script(answer=only("tools/call", lambda pipe, m: pipe.exit(1)))
    async with edge(entry("echo", script)) as house:
        refused(await house.mcp(plain()), 502, -32000, "Server error: ")
    assert script.methods().count("tools/call") == 1


NOT_JSON = [b"", b"{", b'{"server_id":"echo"', b"nonsense", b'{"a":NaN}', b"\xff", b'\xef\xbb\xbf{"a":1}']


@pytest.mark.parametrize("path", ["/mcp", "/rpc"])
@pytest.mark.parametrize("body", [*NOT_JSON, b'{"server_id":"echo","method":"a","method":"b"}', b"[" * 200_000])
async def test_H30_RB26_bad_json(path: str, body: bytes) -> None:
    async with edge() as house:
        response = await house.ask("POST", path, body, x_server_id="echo")
    assert response.status == 400, response.body
    assert (response.json["id"], response.json["error"]["code"]) == (None, -32700)
    assert response.json["error"]["data"]["source"] == "gateway"


@pytest.mark.parametrize("path", ["/mcp", "/rpc"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": 5},
        {"method": ""},
        {"method": None},
        {"method": "a", "jsonrpc": "1.0"},
        {"method": "a", "params": "x"},
        {"method": "a", "params": 0},
        {"result": {}},
    ],
)
async def test_H30_wrong_shapes_keep_their_id(path: str, more: dict[str, Any]) -> None:
    script = Script()
    async with edge(entry("echo", script)) as house:
        response = await house.ask("POST", path, {"server_id": "echo", "id": 3, **more}, x_server_id="echo")
    assert response.status == 400, response.body
    assert (response.json["id"], response.json["error"]["code"]) == (3, -32600)
    assert response.json["error"]["data"]["source"] == "gateway"
    assert script.starts == 0


@pytest.mark.parametrize("server_id", [None, 5, "", ["echo"], {"a": 1}])
async def test_H22_server_id_must_be_a_string(server_id: Any) -> None:
    async with edge() as house:
        refused(await house.mcp(plain(server_id=server_id)), 400, -32600, "server_id must be a non-empty string")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
async def test_H7_H26_a_wrong_content_type_is_400_not_415(kind: str | None) -> None:
    async with edge() as house:
        for path in ("/mcp", "/rpc"):
            response = await house.ask("POST", path, plain(), content_type=kind, x_server_id="echo")
            assert response.status == 400
            assert response.json == {"error": "Bad Request", "message": "Content-Type must be application/json"}


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
async def test_H7_content_types_that_are_json(kind: str) -> None:
    async with edge() as house:
        assert (await house.mcp(plain(), content_type=kind)).status == 200


async def test_G19_a_limit_of_the_gateway_is_503_with_retry_after() -> None:
    async with edge(entry("a", Script()), entry("b", Script()), max_units=1) as house:
        assert (await house.mcp(plain(server_id="a"))).status == 200
        response = await house.mcp(plain(server_id="b"))
        refused(response, 503, -32000, "max_units")
        assert response.headers["retry-after"] == "1"


# ------------------------------------------------------------------------------------------- nobody there to talk with
async def test_questions_are_declined_and_progress_is_left_out() -> None:
    answers: list[dict[str, Any]] = []

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            token = message["params"]["_meta"]["progressToken"]
            params = {"progressToken": token, "progress": 1}
            pipe.say(
                {"jsonrpc": "2.0", "id": "q1", "method": "roots/list"},
                {"jsonrpc": "2.0", "method": "notifications/progress", "params": params},
                {"jsonrpc": "2.0", "id": "q2", "method": "elicitation/create", "params": {}},
            )
            calls.append(message["id"])
        elif message.get("id") in ("q1", "q2"):
            answers.append(message)
            if len(answers) == 2:
                pipe.say({"jsonrpc": "2.0", "id": calls[0], "result": {"done": True}})
        elif "id" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})

    calls: list[Any] = []
    async with edge(entry("echo", Script(answer=answer), isolation="principal")) as house:
        await house.mcp(plain("tools/list"))  # so that a question is the first thing that the next call meets
        response = await house.mcp(plain(params={"name": "t", "_meta": {"progressToken": "p"}}))
    assert response.json == {"jsonrpc": "2.0", "id": 1, "result": {"done": True}}
    assert [(a["id"], a["error"]["code"]) for a in answers] == [("q1", -32601), ("q2", -32601)]


def posted(body: Any) -> bytes:
    """A request to POST /mcp as bytes, for a caller that won't wait for its reply."""
    data = json.dumps(body).encode()
    head = f"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


def watched(house: House) -> bool:
    """Whether the newest call has been waiting for so long that its caller is looked after."""
    (unit,) = house.supervisor.units()
    assert unit.link is not None
    calls = unit.link.pending.calls  # type: ignore[attr-defined]
    return bool(calls) and [*calls.values()][-1]._told


async def test_RB20_a_caller_that_leaves_takes_its_call_back_within_100_ms() -> None:
    script = Script(answer=only("tools/call", lambda pipe, m: None))
    took = []
    async with edge(entry("echo", script, max_connections_per_server=1)) as house:
        await house.mcp(plain("tools/list"))
        (unit,) = house.supervisor.units()
        for _ in range(3):
            async with house.connect() as peer:
                await peer.stream.send_all(posted(plain()))
                await until(lambda: watched(house))
                assert unit.active == 1
            left = trio.current_time()
            await until(lambda: script.methods()[-1] == "notifications/cancelled")
            took.append(trio.current_time() - left)
            call, cancelled = script.seen[-2:]
            assert (call["method"], cancelled["params"]["requestId"]) == ("tools/call", call["id"])
            assert unit.active == 0
            assert (await house.mcp(plain("tools/list"))).status == 200
    assert min(took) < 0.1


async def test_RB20_a_caller_that_leaves_at_once() -> None:
    script = Script(answer=only("tools/call", lambda pipe, m: None))
    async with edge(entry("echo", script)) as house:
        await house.mcp(plain("tools/list"))
        async with house.connect() as peer:
            await peer.stream.send_all(posted(plain()))
        await until(lambda: script.methods()[-2:] == ["tools/call", "notifications/cancelled"])


async def test_RB20_a_caller_that_leaves_during_the_start() -> None:
    script = Script(start_seconds=0.3)
    async with edge(entry("echo", script)) as house:
        async with house.connect() as peer:
            await peer.stream.send_all(posted(plain()))
            await until(lambda: script.starts == 1)
        (unit,) = house.supervisor.units()
        await until(lambda: unit.active == 0)
        assert script.running == 0
        await until(lambda: script.running == 1)  # the start goes on (RB07)
        assert (await house.mcp(plain("tools/list"))).status == 200
    assert (script.starts, script.methods().count("tools/call")) == (1, 0)


async def test_RB20_a_caller_that_leaves_while_it_waits_for_a_slot() -> None:
    script = Script(answer=only("tools/call", lambda pipe, m: None))
    async with edge(entry("echo", script, max_connections_per_server=1)) as house, trio.open_nursery() as nursery:
        nursery.start_soon(house.mcp, plain())
        await until(lambda: "tools/call" in script.methods())
        (unit,) = house.supervisor.units()
        async with house.connect() as peer:
            await peer.stream.send_all(posted(plain("tools/late")))
            await until(lambda: unit._queue)
        await until(lambda: not unit._queue)
        nursery.cancel_scope.cancel()
    assert "tools/late" not in script.methods()


async def test_a_cancelled_connection_takes_its_call_back() -> None:
    """As at the end of a drain."""
    script = Script(answer=only("tools/call", lambda pipe, m: None))
    async with edge(entry("echo", script)) as house, trio.open_nursery() as nursery:
        await house.mcp(plain("tools/list"))
        for late in (False, True):
            nursery.start_soon(house.mcp, plain())
            await until(lambda: script.methods()[-1:] == ["tools/call"])
            if late:
                await until(lambda: watched(house))
            house.connections[-1].cancel()
            await until(lambda: script.methods()[-1] == "notifications/cancelled")
        nursery.cancel_scope.cancel()


async def test_RB28_equal_ids_do_not_cross() -> None:
    waiting: list[dict[str, Any]] = []

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        waiting.append(message)
        if len(waiting) == 40:
            for held in reversed(waiting):
                pipe.say({"jsonrpc": "2.0", "id": held["id"], "result": held["params"]})

    found: dict[int, Any] = {}
    async with edge(entry("echo", Script(answer=only("tools/call", answer)), max_connections_per_server=64)) as house:

        async def one(number: int) -> None:
            found[number] = (await house.mcp(plain(id=1, params={"n": number}))).json

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, number)
    assert found == {n: {"jsonrpc": "2.0", "id": 1, "result": {"n": n}} for n in range(40)}


async def test_P8_remembered_callers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CLIENTS", 2)
    tenants = tuple(Tenant(str(n), f"key-{n}", ("default",)) for n in range(5))
    async with edge(tenants=tenants) as house:
        for n in range(5):
            assert (await house.mcp(plain(), x_api_key=f"key-{n}")).status == 200
        assert len(house.endpoint.rpc._clients) == 2


async def test_isolation_principal_is_one_unit_for_each_caller() -> None:
    script = Script()
    tenants = tuple(Tenant(str(n), f"key-{n}", ("default",)) for n in range(2))
    async with edge(entry("echo", script, isolation="principal"), tenants=tenants) as house:
        for _ in range(3):
            for n in range(2):
                assert (await house.mcp(plain(), x_api_key=f"key-{n}")).status == 200
    assert script.starts == 2
