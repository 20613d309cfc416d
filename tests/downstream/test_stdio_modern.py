"""Modern clients on stdin and stdout: how the era is found, requests and subscriptions on lines, and their ends."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from running import RunningGateway, command, echo_entry
from scripted import MemoryPipe, Script
from trio.testing import MockClock

from gateway.config.model import Settings
from gateway.downstream import stdio
from gateway.exchange import Exchange
from gateway.protocol.session import VENDOR_DATA
from gateway.router import Router
from tests.downstream.stdio_kit import LIMIT, Client, answering, hello, opened, progress_and_reply, request, through

KEY = "io.modelcontextprotocol/"
VERSION, CAPABILITIES, SUBSCRIPTION = KEY + "protocolVersion", KEY + "clientCapabilities", KEY + "subscriptionId"
SUPPORTED = ["2026-07-28"]
CHANGED = "notifications/tools/list_changed"
ASK = {"message": "Which?", "requestedSchema": {"type": "object", "properties": {}}}


def modern(method: str, params: Any = None, id: Any = 1, *, version: str = "2026-07-28", **meta: Any) -> dict[str, Any]:
    """A request with its context. ``meta`` adds members of ``_meta``; capabilities={} and the like replace ours."""
    capabilities = meta.pop("capabilities", {"elicitation": {"form": {}}})
    context = {VERSION: version, CAPABILITIES: capabilities, KEY + "clientInfo": {"name": "me", "version": "1"}}
    return request(method, {**(params or {}), "_meta": {**context, **meta}}, id)


def cancelled(id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id, "reason": "enough"}}


async def say(client: Client, method: str, params: Any = None, id: Any = 1, **meta: Any) -> dict[str, Any]:
    """A modern request, and the next line."""
    await client.send(modern(method, params, id, **meta))
    return await client.read()


# ---------------------------------------------------------------------------------------------------- which era it is
@pytest.mark.parametrize("server_id", ["a", None])
async def test_discover_starts_no_server_and_decides_no_era(server_id: str | None) -> None:
    script = Script()
    async with opened(script, at=server_id) as client:
        reply = await say(client, "server/discover", None, "server-discover-probe-1")
        assert reply["id"] == "server-discover-probe-1"
        assert reply["result"]["supportedVersions"] == SUPPORTED
        assert reply["result"]["resultType"] == "complete"
        assert reply["result"]["capabilities"]["tools"] == {"listChanged": True}
        assert {"ttlMs", "cacheScope"} <= reply["result"].keys()
        assert script.starts == 0
        assert "serverInfo" in await client.hello()  # a legacy client that has only tried
        assert (await client.ask("ping"))["result"] == {}
    async with opened(script, at=server_id) as client:
        await say(client, "server/discover")
        await say(client, "server/discover", None, 2)
        name = "t" if server_id else "a__t"
        assert "resultType" in (await say(client, "tools/list", {"name": name}, 3))["result"]
        assert (await client.ask("initialize", hello()))["error"]["code"] == -32022


@pytest.mark.parametrize("first", ["tools/list", "tools/call", "prompts/get", "ping", "subscriptions/listen"])
async def test_any_modern_request_may_come_first_and_decides(first: str) -> None:
    async with opened(Script()) as client:
        reply = await say(client, first, {"name": "t", "notifications": {}}, "first")
        if first == "ping":
            assert reply["error"]["code"] == -32601
        elif first == "subscriptions/listen":
            assert reply["params"]["_meta"] == {SUBSCRIPTION: "first"}
        else:
            assert reply["result"]["resultType"] == "complete"
        refused = await client.ask("initialize", hello(), 2)
        assert (refused["id"], refused["error"]["code"]) == (2, -32022)
        assert refused["error"]["data"]["supported"] == SUPPORTED
        assert refused["error"]["data"]["requested"] == "2025-11-25"
        for params in (None, {}, {"_meta": {"progressToken": 1}}):
            error = (await client.ask("tools/list", params, 3))["error"]
            assert error["code"] == -32022 and error["data"]["supported"] == SUPPORTED
            assert type(error["data"]["requested"]) is str
        # One that shows the era but is not complete is told what is missing.
        error = (await client.ask("tools/list", {"_meta": {CAPABILITIES: {}}}, 4))["error"]
        assert error["code"] == -32602 and VERSION in error["message"]
        assert "result" in await say(client, "tools/list", None, 5)
        assert "error" in await say(client, "initialize", hello(), 6)


@pytest.mark.parametrize("first", ["initialize", "tools/list"])
async def test_a_legacy_beginning_decides_too(first: str) -> None:
    async with opened(Script()) as client:
        assert "result" in await client.ask(first, hello() if first == "initialize" else None)
        for method in ("tools/list", "server/discover"):
            refused = await say(client, method, None, "x")
            assert (refused["id"], refused["error"]["code"]) == ("x", -32600)
            assert "2026-07-28" in refused["error"]["message"]
        # And what the SDK's legacy servers say to a discover that shows no era.
        assert (await client.ask("server/discover"))["error"]["code"] == -32601
        assert "result" in await client.ask("tools/list", None, 7)


async def test_a_request_that_is_refused_decides_nothing() -> None:
    script = Script()
    async with opened(script) as client:
        error = (await say(client, "tools/list", version="2031-01-01"))["error"]
        assert error["code"] == -32022
        assert (error["data"]["supported"], error["data"]["requested"]) == (SUPPORTED, "2031-01-01")
        error = (await client.ask("tools/list", {"_meta": {VERSION: "2026-07-28"}}))["error"]
        assert error["code"] == -32602 and CAPABILITIES in error["message"]
        assert (await client.ask("server/discover"))["error"]["code"] == -32602
        assert (await say(client, "tools/list", **{KEY + "logLevel": "loud"}))["error"]["code"] == -32602
        await client.send({**modern("tools/list"), "id": None})
        assert (await client.read())["error"]["code"] == -32600
        assert script.starts == 0
        assert "capabilities" in await client.hello()


async def test_notifications_and_replies_decide_nothing() -> None:
    async with opened(Script()) as client:
        await client.send(
            {"jsonrpc": "2.0", "method": "notifications/initialized", "params": {"_meta": {VERSION: "2026-07-28"}}},
            {"jsonrpc": "2.0", "id": 1, "result": {}},
            cancelled(1),
        )
        assert (await client.ask("ping"))["result"] == {}
        assert "resultType" in (await say(client, "tools/list"))["result"]


async def test_S6_a_request_piped_by_echo_is_still_legacy() -> None:
    script = Script()
    async with opened(script) as client:
        await client.send(request("tools/call", {"name": "t"}, 9))
        assert (await client.read())["result"] == {"echo": {"name": "t"}}  # nothing modern about it
        assert await client.end() == 0
    async with opened(script) as client:
        await client.send(modern("tools/call", {"name": "t"}, 9))
        await client.input.aclose()
        assert (await client.read())["result"]["resultType"] == "complete"
        assert await client.ended() == 0


# ------------------------------------------------------------------------------------------------------------ requests
@pytest.mark.parametrize("speaks_modern", [False, True])
async def test_S7_replies_come_as_they_are_ready_under_their_own_ids(speaks_modern: bool) -> None:
    waiting: list[Any] = []

    def act(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] == "tools/list":
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {"tools": []}})
        elif message["method"] == "tools/call":
            waiting.append((pipe, message["id"]))
            if len(waiting) == 3:
                for at, (pipe, id) in reversed(list(enumerate(waiting))):
                    pipe.say({"jsonrpc": "2.0", "id": id, "result": {"at": at}})

    async with opened(Script(act, modern=speaks_modern)) as client:
        await say(client, "tools/list")
        await client.send(*(modern("tools/call", {"name": "t"}, id) for id in (7, "7", "x")))
        for at, id in ((2, "x"), (1, "7"), (0, 7)):
            reply = await client.read()
            assert (reply["id"], type(reply["id"]), reply["result"]["at"]) == (id, type(id), at)
            assert reply["result"]["resultType"] == "complete"
            assert reply["result"]["_meta"][KEY + "serverInfo"] == {"name": "g", "version": "0"}


async def test_S7_modern_requests_reach_a_running_server_in_their_order() -> None:
    script = Script()
    async with opened(script) as client:
        await say(client, "tools/list")
        for _ in range(5):
            script.seen.clear()
            names = [f"t{i}" for i in range(6)]
            await client.send(*(modern("tools/call", {"name": name}, name) for name in names))
            for _ in names:
                await client.read()
            assert [m["params"]["name"] for m in script.seen] == names


@pytest.mark.parametrize("speaks_modern", [False, True])
async def test_A5_cancelling_tells_the_server_and_gets_no_reply(speaks_modern: bool) -> None:
    def act(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] == "tools/list":
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {"tools": []}})

    script = Script(act, modern=speaks_modern)
    async with opened(script) as client:
        await say(client, "tools/list")
        for id in (10, "10", 12):
            await client.send(modern("tools/call", {"name": "t"}, id), cancelled(id))
            await client.silent()
        sent = [m["id"] for m in script.seen if m["method"] == "tools/call"]
        assert [m["params"]["requestId"] for m in script.seen if m["method"] == "notifications/cancelled"] == sent
        await client.send(modern("tools/call", {"name": "t"}, 1), cancelled("1"), cancelled(True), cancelled(None))
        await client.silent()
        script.pipe.say({"jsonrpc": "2.0", "id": script.seen[-1]["id"], "result": {}})
        assert (await client.read())["id"] == 1
        assert await client.end() == 0


async def test_A5_a_request_is_taken_back_while_its_server_starts(autojump_clock: MockClock) -> None:
    script = Script(start_seconds=5)
    async with opened(script) as client:
        await client.send(modern("tools/call", {"name": "one"}, 1), modern("tools/call", {"name": "two"}, 2))
        await trio.sleep(1)
        await client.send(cancelled(1))
        with trio.fail_after(60):
            assert (await client.read())["id"] == 2
        assert [m["params"]["name"] for m in script.seen if m["method"] == "tools/call"] == ["two"]


async def test_A5_a_request_is_taken_back_while_its_reply_waits(mock_clock: MockClock) -> None:
    async with opened(answering(progress_and_reply)) as client:
        await client.send(modern("tools/call", {"name": "t"}, 1, progressToken="mine"))
        assert (await client.read())["method"] == "notifications/progress"
        await client.silent()  # the reply stands apart from it, and the clock stands still
        await client.send(cancelled(1))
        await client.silent()
        mock_clock.jump(1)
        await client.silent()
        assert "result" in await say(client, "tools/list", None, 2)


async def test_A5_modern_progress_and_the_reply_are_two_reads() -> None:
    """protocol.md 4.1: TypeScript clients drop progress that they read together with the reply."""

    def act(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        token = message["params"]["_meta"]["progressToken"]
        note = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": token, "progress": 1}}
        if message["params"]["name"] == "fails":
            pipe.say(note)
            pipe.exit()
        else:
            pipe.say(note, {"jsonrpc": "2.0", "id": message["id"], "result": {}})

    async with opened(answering(act)) as client:
        await say(client, "tools/list")
        for id, name in enumerate(("t", "t", "t", "fails")):
            await client.send(modern("tools/call", {"name": name}, id, progressToken="mine"))
            note, reply = [json.loads(await client.output.receive_some(65536)) for _ in range(2)]
            assert note["params"] == {"progressToken": "mine", "progress": 1}
            assert reply["id"] == id


async def test_RB28_a_modern_id_in_use_gets_a_clear_error() -> None:
    script = answering(lambda pipe, message: None)
    async with opened(script) as client:
        await client.send(*(modern("tools/call", {"name": "t"}, 2) for _ in range(2)), cancelled(2))
        assert (await client.read())["id"] == 2
        await client.send(modern("tools/call", {"name": "t"}, 2), cancelled(2))  # it was free at once
        await client.silent()
        await client.send(modern("tools/call", {"name": "t"}, 1), modern("tools/call", {"name": "t"}, 1))
        reply = await client.read()
        assert (reply["id"], reply["error"]["code"]) == (1, -32600) and "still running" in reply["error"]["message"]
        await client.silent()
        script.pipe.say({"jsonrpc": "2.0", "id": script.seen[-1]["id"], "result": {}})
        assert "result" in await client.read()
        assert "result" in await say(client, "tools/list")  # and then it is free


async def test_requests_beyond_the_limit_are_refused_in_modern_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "MAX_CALLS", 2)
    async with opened(answering(lambda pipe, message: None)) as client:
        await client.send(*(modern("tools/call", {"name": "t"}, id) for id in (1, 2, 3)))
        reply = await client.read()
        assert reply["id"] == 3 and "2 requests" in reply["error"]["message"]
        assert reply["error"]["data"]["source"] == "gateway"
        await client.send(cancelled(1), cancelled(2))
        await client.silent()
        assert "result" in await say(client, "tools/list", None, 4)


async def test_RB09_S5_bad_lines_of_a_modern_client() -> None:
    async with opened(Script()) as client:
        await say(client, "tools/list")
        big = json.dumps(modern("tools/call", {"name": "t", "arguments": {"x": "y" * LIMIT}})).encode() + b"\n"
        for line, code in ((b"{not json}\n", -32700), (b"[" + big[:20] + b"]\n", -32700), (big, -32600)):
            await client.input.send_all(line)
            reply = await client.read()
            assert (reply["id"], reply["error"]["code"]) == (None, code)
        await client.input.send_all(json.dumps([modern("tools/list")]).encode() + b"\n")
        assert (await client.read())["error"]["code"] == -32600
        await client.send({"jsonrpc": "2.0", "id": 1, "result": {}})  # nothing was asked
        await client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert "result" in await say(client, "tools/list")


async def test_a_defect_costs_one_modern_request(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = Router.dispatch_now

    def broken(self: Router, exchange: Exchange) -> Any:
        if exchange.message.method == "tools/call":
            raise ZeroDivisionError("secret internals")
        return dispatch(self, exchange)

    monkeypatch.setattr(Router, "dispatch_now", broken)
    async with opened(Script()) as client:
        error = (await say(client, "tools/call", {"name": "t"}, 1))["error"]
        assert error == {"code": -32603, "message": "Internal error", "data": {"source": "gateway"}}
        assert "result" in await say(client, "tools/list", None, 2)


# -------------------------------------------------------------------------------------------------------------- faults
async def test_S4_a_modern_client_is_told_of_faults_as_its_era_has_it() -> None:
    """protocol.md section 7; the codes of the original's proxy are for legacy clients."""
    script = Script(fail_starts=99)
    async with opened(script) as client:
        result = (await say(client, "tools/call", {"name": "t"}, 1))["result"]
        assert result["isError"] and "exited with code 1" in result["content"][0]["text"]
        assert result["resultType"] == "complete"
        assert result["_meta"][VENDOR_DATA]["source"] == "gateway"
        error = (await say(client, "prompts/get", {"name": "p"}, 2))["error"]
        assert (error["code"], error["data"]["source"]) == (-32603, "gateway")
        assert await client.end() == 0


async def test_S3_an_unknown_server_ends_it_whatever_the_era() -> None:
    async with opened(Script(), at="other") as client:
        reply = await client.read()
        assert (reply["id"], reply["error"]["code"]) == (None, -32001)
        assert await client.ended() == 1


# ------------------------------------------------------------------------------------------------------- subscriptions
async def listen(client: Client, id: Any, **wanted: Any) -> dict[str, Any]:
    """Open a subscription: what is honoured of its filter."""
    reply = await say(client, "subscriptions/listen", {"notifications": wanted}, id)
    assert reply["method"] == "notifications/subscriptions/acknowledged"
    assert reply["params"]["_meta"] == {SUBSCRIPTION: id}
    return dict(reply["params"]["notifications"])


def ended(id: Any, first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether these two say that the gateway has ended a subscription; clients go by the first."""
    assert first["id"] == id and first["result"]["resultType"] == "complete"
    assert first["result"]["_meta"][SUBSCRIPTION] == id
    return (second["method"], second["params"]["requestId"]) == ("notifications/cancelled", id)


async def test_subscriptions_stand_side_by_side_each_with_its_own_filter() -> None:
    script = Script()
    async with opened(script) as client:
        assert await listen(client, "listen:0", toolsListChanged=True) == {"toolsListChanged": True}
        wanted = {"promptsListChanged": True, "toolsListChanged": True}
        assert await listen(client, 1, **wanted) == wanted
        assert await listen(client, "1", resourcesListChanged=True, toolsListChanged=False) == {
            "resourcesListChanged": True
        }
        assert script.starts == 0
        hub = client.front.router.hub
        for _ in range(3):
            hub.publish("a", "tools")
        notes = [await client.read(), await client.read()]
        assert [note["method"] for note in notes] == [CHANGED, CHANGED]
        assert {note["params"]["_meta"][SUBSCRIPTION] for note in notes} == {"listen:0", 1}
        hub.publish("a", "resources")
        note = await client.read()
        assert (note["method"], note["params"]["_meta"]) == (
            "notifications/resources/list_changed",
            {SUBSCRIPTION: "1"},
        )
        # Requests go on meanwhile; what is cancelled ends without a word, the others stay.
        assert "result" in await say(client, "tools/list", None, 2)
        await client.send(cancelled("listen:0"))
        await client.silent()
        hub.publish("a", "tools")
        assert (await client.read())["params"]["_meta"] == {SUBSCRIPTION: 1}
        await client.silent()
        assert await listen(client, "listen:0", toolsListChanged=True)  # its id is free again


@pytest.mark.parametrize("how", ["end of input", "stop"])
async def test_S6_subscriptions_end_with_the_gateway_and_say_so(how: str) -> None:
    async with opened(Script()) as client:
        await listen(client, 1, toolsListChanged=True)
        await listen(client, "b", toolsListChanged=True)
        if how == "stop":
            client.front.stop(60)
        else:
            await client.input.aclose()
        lines = [await client.read() for _ in range(4)]
        for id in (1, "b"):
            mine = [m for m in lines if m.get("id", m.get("params", {}).get("requestId")) == id]
            assert ended(id, *mine)
        assert await client.ended() == 0


async def test_S6_a_subscription_that_waits_for_its_server_ends_too(autojump_clock: MockClock) -> None:
    async with opened(Script(start_seconds=20)) as client:
        params = {"notifications": {"resourceSubscriptions": ["file:///a"]}}
        await client.send(modern("subscriptions/listen", params, 1))
        await trio.sleep(1)
        await client.input.aclose()
        reply = await client.read()
        assert (reply["id"], reply["error"]["code"]) == (1, -32603)
        assert await client.ended() == 0


async def test_a_subscription_to_resources_subscribes_at_a_legacy_server() -> None:
    script = Script()
    async with opened(script) as client:
        assert await listen(client, 5, resourceSubscriptions=["file:///a", "file:///b"]) == {
            "resourceSubscriptions": ["file:///a", "file:///b"]
        }
        assert script.methods().count("resources/subscribe") == 2
        note = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "file:///a"}}
        script.pipe.say(note, note)
        told = await client.read()
        assert told["method"] == "notifications/resources/updated"
        assert told["params"] == {"uri": "file:///a", "_meta": {SUBSCRIPTION: 5}}
        await client.silent()
        await client.send(cancelled(5))
        with trio.fail_after(5):
            while script.methods().count("resources/unsubscribe") < 2:
                await trio.sleep(0.001)


@pytest.mark.parametrize("params", [{}, {"notifications": 1}, {"notifications": {"resourceSubscriptions": "x"}}])
async def test_a_subscription_without_a_filter_is_refused(params: dict[str, Any]) -> None:
    async with opened(Script()) as client:
        assert (await say(client, "subscriptions/listen", params))["error"]["code"] == -32602
        assert "result" in await say(client, "tools/list")


async def test_RB09_changes_are_joined_for_a_client_that_does_not_read(autojump_clock: MockClock) -> None:
    async with opened(Script()) as client:
        await listen(client, 1, toolsListChanged=True)
        client.front.lines._queued += 1 << 30
        client.front.lines._empty = trio.Event()
        for _ in range(100):
            client.front.router.hub.publish("a", "tools")
            await trio.sleep(1)
        await client.silent()
        client.front.lines._queued -= 1 << 30
        client.front.lines._empty.set()
        assert (await client.read())["method"] == CHANGED
        await client.silent()


# -------------------------------------------------------------------------------------------------------- parked calls
def asking() -> Script:
    """A legacy server that answers a call with what its question was answered with."""
    calls: dict[str, Any] = {}

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            calls["ask"] = message["id"]
            pipe.say({"jsonrpc": "2.0", "id": "ask", "method": "elicitation/create", "params": ASK})
        elif message.get("id") == "ask":
            pipe.say({"jsonrpc": "2.0", "id": calls["ask"], "result": {"said": message["result"]}})
        elif "id" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})

    return Script(answer)


async def test_a_question_is_answered_by_calling_again() -> None:
    script = asking()
    async with opened(script) as client:
        asked = (await say(client, "tools/call", {"name": "t"}, 1))["result"]
        assert asked["resultType"] == "input_required"
        ((key, entry),) = asked["inputRequests"].items()
        assert entry == {"method": "elicitation/create", "params": ASK}
        answers = {key: {"action": "accept", "content": {"x": 1}}}
        again = {"name": "t", "inputResponses": answers, "requestState": asked["requestState"]}
        reply = await say(client, "tools/call", again, 2)
        assert reply["id"] == 2 and reply["result"]["said"] == answers[key]
        assert (await say(client, "tools/call", again, 3))["error"]["code"] == -32602  # once only
        assert script.methods().count("tools/call") == 1


async def test_S6_parked_calls_end_with_the_input() -> None:
    script = asking()
    async with opened(script, settings=Settings(park_timeout_seconds=3600)) as client:
        await say(client, "tools/call", {"name": "t"}, 1)
        assert await client.end() == 0
        assert [m["result"] for m in script.seen if m.get("id") == "ask"] == [{"action": "cancel"}]
    assert script.running == 0


async def test_S6_a_call_that_is_running_at_the_end_of_the_input_is_answered() -> None:
    script = answering(lambda pipe, message: None)
    async with opened(script) as client:
        await client.send(modern("tools/call", {"name": "t"}, 1))
        while "tools/call" not in script.methods():
            await trio.sleep(0.001)
        await client.input.aclose()
        await client.silent()
        script.pipe.say({"jsonrpc": "2.0", "id": script.seen[-1]["id"], "result": {"late": True}})
        assert (await client.read())["result"]["late"] is True
        assert await client.ended() == 0


# ------------------------------------------------------------------------------------------------- through another one
@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Any:
    servers = [
        echo_entry("one"),
        echo_entry("own", isolation="session"),
        echo_entry("narrow", max_connections_per_server=1),
        echo_entry("broken"),
    ]
    servers[3]["runtime"]["command"] = "/nonexistent/program"
    with RunningGateway(tmp_path_factory.mktemp("far"), servers, config={"api_key": "s3cret"}) as gateway:
        yield gateway


@pytest.fixture
def far_url(far: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MCP_GATEWAY_API_KEY", "s3cret")
    return f"http://127.0.0.1:{far.port}/"


@pytest.mark.parametrize("server_id", ["one", "own"])
async def test_S8_a_modern_client_through_our_gateway(far_url: str, server_id: str) -> None:
    async with through(far_url, server_id) as client:
        assert (await say(client, "server/discover", None, "probe"))["result"]["supportedVersions"] == SUPPORTED
        tools = (await say(client, "tools/list", None, 2))["result"]
        assert "echo" in [tool["name"] for tool in tools["tools"]] and {"ttlMs", "cacheScope"} <= tools.keys()
        called = (await say(client, "tools/call", {"name": "echo", "arguments": {"text": "hi"}}, "3"))["result"]
        assert called["content"][0]["text"] == "hi" and called["resultType"] == "complete"
        params = {"name": "progress", "arguments": {"steps": 3}}
        await client.send(modern("tools/call", params, 4, progressToken="mine"))
        notes = [await client.read() for _ in range(3)]
        assert [n["params"]["progress"] for n in notes] == [1, 2, 3]
        assert {n["params"]["progressToken"] for n in notes} == {"mine"}
        assert "result" in await client.read()
        assert (await client.ask("initialize", hello()))["error"]["code"] == -32022
        assert await client.end() == 0


async def test_S8_cancelling_through_our_gateway_ends_the_call_there(far_url: str) -> None:
    async with through(far_url, "narrow") as client:  # it takes one call at a time
        await say(client, "tools/list")
        await client.send(modern("tools/call", {"name": "sleep", "arguments": {"seconds": 20}}, 1))
        await client.silent()
        await client.send(cancelled(1))
        await client.silent()
        assert "result" in await say(client, "tools/call", {"name": "echo", "arguments": {"text": "on"}}, 2)
        assert await client.end() == 0


async def test_S8_a_subscription_through_our_gateway_hears_of_its_changes(far: RunningGateway, far_url: str) -> None:
    async with through(far_url, None) as client:
        await say(client, "tools/list")
        assert await listen(client, "l", toolsListChanged=True) == {"toolsListChanged": True}
        before = json.loads(far.catalog.read_text())["servers"]
        far.write([*before, echo_entry("new")])
        try:
            with trio.fail_after(20):
                while True:
                    note = json.loads(await client.output.receive_some(65536))
                    if note["method"] == CHANGED:
                        break
            assert note["params"]["_meta"] == {SUBSCRIPTION: "l"}
        finally:
            far.write(before)


async def test_S3_S8_a_modern_client_of_a_server_that_is_not_there(far_url: str) -> None:
    async with through(far_url, "nope") as client:
        assert "result" in await say(client, "server/discover")  # asks nobody
        await client.send(modern("tools/list", None, 2))
        reply = await client.read()
        assert (reply["id"], reply["error"]["code"]) == (None, -32001)
        assert reply["error"]["message"] == "Server 'nope' not found in catalog"
        assert await client.ended() == 1


async def test_S4_S8_faults_of_our_gateway_in_modern_words(far_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with through(far_url, "broken") as client:
        result = (await say(client, "tools/call", {"name": "t"}))["result"]
        assert result["isError"] and "/nonexistent/program" in result["content"][0]["text"]
        assert (await say(client, "prompts/get", {"name": "p"}))["error"]["code"] == -32603
    monkeypatch.setenv("MCP_GATEWAY_API_KEY", "wrong")
    async with through(far_url, "one") as client:
        result = (await say(client, "tools/call", {"name": "t"}))["result"]
        assert result["isError"] and "MCP_GATEWAY_API_KEY" in result["content"][0]["text"]
        assert "wrong" not in json.dumps(result)


# -------------------------------------------------------------------------------------------------- as a real process
def catalog(folder: Path) -> list[str]:
    path = folder / "catalog.yaml"
    path.write_text(json.dumps({"servers": [echo_entry("echo", env={"ECHO_EXIT_AT_START": "7"}), echo_entry("good")]}))
    return ["-c", str(path)]


def piped(folder: Path, *messages: dict[str, Any], words: tuple[str, ...] = ()) -> tuple[int, list[Any]]:
    """What ``gateway stdio`` says to lines piped into it, and its exit status."""
    lines = b"".join(json.dumps(m).encode() + b"\n" for m in messages)
    argv = [*command(), "stdio", *catalog(folder), *words]
    done = subprocess.run(argv, input=lines, capture_output=True, cwd=folder, timeout=30, check=False)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("words", [("-s", "echo"), ()])
def test_a_probing_process_is_answered_and_ends(tmp_path: Path, words: tuple[str, ...]) -> None:
    """TypeScript clients probe on a process of its own, which they end at once; "echo" could not even start."""
    status, (reply,) = piped(tmp_path, modern("server/discover", None, "server-discover-probe-1"), words=words)
    assert (status, reply["id"]) == (0, "server-discover-probe-1")
    assert reply["result"]["supportedVersions"] == SUPPORTED


def test_S6_modern_lines_piped_by_echo_are_answered(tmp_path: Path) -> None:
    call = modern("tools/call", {"name": "echo", "arguments": {"text": "x"}}, 1)
    merged = modern("tools/call", {"name": "good__echo", "arguments": {"text": "x"}}, 1)
    for words, message in ((("-s", "good"), call), ((), merged)):
        status, (reply,) = piped(tmp_path, message, words=words)
        assert (status, reply["result"]["content"][0]["text"]) == (0, "x")
        assert reply["result"]["resultType"] == "complete"


def test_C16_a_signal_ends_subscriptions_and_answers_what_runs(tmp_path: Path) -> None:
    argv = [*command(), "stdio", *catalog(tmp_path), "-s", "good"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdin is not None and process.stdout is not None
        for message in (
            modern("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, "l"),
            modern("tools/call", {"name": "echo", "arguments": {"text": "x"}}, 1),
            modern("tools/call", {"name": "sleep", "arguments": {"seconds": 0.5}}, 2),
        ):
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        seen = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert {m.get("id", m.get("method")) for m in seen} == {1, "notifications/subscriptions/acknowledged"}
        process.send_signal(signal.SIGTERM)
        last = [json.loads(line) for line in process.stdout]
        assert ended("l", last[0], last[1]) and last[2]["id"] == 2
        assert process.wait(20) == 0
