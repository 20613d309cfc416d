"""The pipe link and the two eras: which one a server speaks, and what each is told on behalf of the other's clients."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from scripted import MemoryPipe, Script
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.auth.principal import ANONYMOUS
from gateway.config.snapshot import Snapshot
from gateway.errors import ServerProtocolError, StartFailed
from gateway.exchange import Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_reply, decode_request
from gateway.supervisor import leaf
from gateway.upstream.connect import Terms, UpstreamLink, WrongEra, connect

META = "io.modelcontextprotocol/"
BOTH = (Era.MODERN, Era.LEGACY)
CAPABILITIES = {"elicitation": {}, "sampling": {}, "roots": {"listChanged": True}, "tasks": {"list": {}}}


class Somebody:
    """An owner who can't be asked outside a call."""

    def ask(self, ask: Ask) -> bool:
        return False

    def notify(self, text: str) -> None: ...

    def mark(self, topic: str) -> None: ...


def legacy_client(version: str = "2025-11-25") -> Client:
    return Client("old", Era.LEGACY, version, CAPABILITIES, {"name": "old"}, owner=Somebody())


def modern_client(**more: Any) -> Client:
    return Client("modern:1", Era.MODERN, "2026-07-28", {"elicitation": {}}, {"name": "new"}, **more)


def exchange(client: Client, method: str = "tools/call", *, id: int = 1, **params: Any) -> Exchange:
    text = json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params or {"name": "x"}})
    return Exchange(decode_request(text), ANONYMOUS, Snapshot(), client, "s", trio.current_time() + 30)


def context(**more: Any) -> dict[str, Any]:
    return {META + "protocolVersion": "2026-07-28", META + "clientCapabilities": {"elicitation": {}}, **more}


class Peer:
    """A scripted server, the link to it, and what the link passed on."""

    def __init__(self, script: Script, pipe: MemoryPipe) -> None:
        self.script = script
        self.pipe = pipe
        self.link: Any = None
        self.notices: list[Message] = []

    def requests(self, method: str) -> list[dict[str, Any]]:
        return [m for m in self.script.seen if m.get("method") == method]

    def reply(self, message: dict[str, Any], **result: Any) -> None:
        self.pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    async def settled(self, method: str = "tools/call") -> dict[str, Any]:
        await wait_all_tasks_blocked()
        return self.requests(method)[-1]


def quiet(**more: Any) -> Script:
    return Script(answer=lambda pipe, message: None, **more)


@asynccontextmanager
async def linked(script: Script, *, eras: tuple[Era, ...] = BOTH, isolated: bool = True) -> AsyncIterator[Peer]:
    pipe = MemoryPipe(script.on_line)
    peer = Peer(script, pipe)
    terms = Terms("s", peer.notices.append, lambda ask: False, {"name": "g"}, isolated=isolated, eras=eras)
    async with connect(pipe, terms) as link:
        peer.link = link
        await wait_all_tasks_blocked()
        yield peer


async def until(call: Call, kind: type[Any]) -> Any:
    with trio.fail_after(60):
        while True:
            event = await call.next()
            if type(event) is kind:
                return event


# ---------------------------------------------------------------------------------------------------------- the probe
@pytest.mark.parametrize(
    ("modern", "eras", "era", "decided"),
    [
        (True, BOTH, Era.MODERN, "server/discover"),
        (False, BOTH, Era.LEGACY, "initialize"),
        (True, BOTH[::-1], Era.MODERN, "server/discover"),
        (False, BOTH[::-1], Era.LEGACY, "initialize"),
        (True, (Era.MODERN,), Era.MODERN, "catalog"),
        (False, (Era.LEGACY,), Era.LEGACY, "catalog"),
    ],
)
async def test_B7_the_era_is_found_out_and_shown(modern: bool, eras: tuple[Era, ...], era: Era, decided: str) -> None:
    async with linked(quiet(modern=modern), eras=eras) as peer:
        link: UpstreamLink = peer.link
        assert (link.era, link.decided) == (era, decided)
        assert link.facts["protocolVersion"] == ("2026-07-28" if modern else "2025-11-25")
        assert link.facts["serverInfo"] == {"name": "scripted", "version": "1"}
        assert (link.details["era"], link.details["era_decided_by"]) == (era.value, decided)


@pytest.mark.parametrize("modern", [True, False])
async def test_an_era_that_the_catalog_demands_is_not_bridged(modern: bool) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with linked(quiet(modern=modern), eras=((Era.LEGACY,) if modern else (Era.MODERN,))):
            raise AssertionError
    error = leaf(caught.value)
    assert isinstance(error, StartFailed)
    assert "2026-07-28" in str(error) or "Unsupported" in str(error)


async def test_a_server_that_says_nothing_to_the_probe_is_initialized(autojump_clock: MockClock) -> None:
    script = quiet()
    script.discovered = lambda: {"method": "notifications/nothing"}  # type: ignore[method-assign]
    began = trio.current_time()
    async with linked(script) as peer:
        assert peer.link.era is Era.LEGACY
        assert 10 <= trio.current_time() - began <= 20
        assert not peer.link.slow


async def test_a_slow_modern_server_is_not_taken_for_a_legacy_one(autojump_clock: MockClock) -> None:
    """It reads the probe and initialize when it is up at last, and refuses initialize: it is asked once more."""
    held: list[tuple[MemoryPipe, bytes]] = []
    script = quiet(modern=True)
    usual, up = script.on_line, False

    def on_line(pipe: MemoryPipe, line: bytes) -> None:
        if up:
            usual(pipe, line)
        else:
            held.append((pipe, line))

    script.on_line = on_line  # type: ignore[method-assign]
    peer: list[Peer] = []

    async def connected() -> None:
        async with linked(script) as found:
            peer.append(found)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connected)
        await trio.sleep(40)
        assert not peer
        up = True
        for line in held:
            usual(*line)
    assert peer[0].link.era is Era.MODERN


async def test_a_server_that_dies_of_the_probe_is_opened_again_for_initialize() -> None:
    script = quiet()
    script.on_line = lambda pipe, line: pipe.exit(1)  # type: ignore[method-assign]
    with pytest.raises(BaseExceptionGroup) as caught:
        async with linked(script):
            raise AssertionError
    error = leaf(caught.value)
    assert isinstance(error, WrongEra)
    assert error.first is Era.LEGACY


@pytest.mark.parametrize("result", [{}, {"echo": 1}, {"supportedVersions": ["2025-11-25"]}, {"supportedVersions": 3}])
async def test_only_a_modern_version_makes_a_modern_server(result: Any) -> None:
    script = quiet()
    script.discovered = lambda: {"result": result}  # type: ignore[method-assign]
    async with linked(script) as peer:
        assert peer.link.era is Era.LEGACY


# ---------------------------------------------------------------------------------- legacy clients at a modern server
async def test_bridge_a_legacy_session_becomes_the_context_of_each_request() -> None:
    async with linked(quiet(modern=True)) as peer:
        client = legacy_client()
        client.set_log_level("warning")
        call = peer.link.call(exchange(client, name="x", _meta={"progressToken": "mine", "own/key": 1}))
        sent = await peer.settled()
        meta = sent["params"]["_meta"]
        assert meta.pop("progressToken") == sent["id"]
        assert meta == {
            "own/key": 1,
            META + "protocolVersion": "2026-07-28",
            META + "clientInfo": {"name": "old"},
            META + "clientCapabilities": {"elicitation": {}, "sampling": {}, "roots": {}},
            META + "logLevel": "warning",
        }
        progress = {"progressToken": sent["id"], "progress": 1, "message": "one"}
        peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        peer.reply(sent, resultType="complete", content=[])
        event = await until(call, Interim)
        assert json.loads(event.text)["params"] == {"progressToken": "mine", "progress": 1, "message": "one"}
        assert (await until(call, Reply)).message.result == {"content": []}


async def test_bridge_the_oldest_revision_has_no_progress_message() -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client("2024-11-05"), name="x", _meta={"progressToken": 1}))
        sent = await peer.settled()
        progress = {"progressToken": sent["id"], "progress": 1, "message": "one"}
        peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        assert json.loads((await until(call, Interim)).text)["params"] == {"progressToken": 1, "progress": 1}


async def test_bridge_a_caller_without_a_session_declares_nothing() -> None:
    async with linked(quiet(modern=True)) as peer:
        peer.link.call(exchange(Client("principal:x", Era.LEGACY, "2025-11-25", CAPABILITIES), name="x"))
        assert (await peer.settled())["params"]["_meta"][META + "clientCapabilities"] == {}


def answer(ask: Ask, **reply: Any) -> None:
    ask.answer(decode_reply(json.dumps({"jsonrpc": "2.0", "id": 99, **reply})))


SCHEMA = {"type": "object"}
FORM = {"method": "elicitation/create", "params": {"mode": "form", "message": "?", "requestedSchema": SCHEMA}}
SAMPLE = {"method": "sampling/createMessage", "params": {"messages": [], "maxTokens": 1}}


async def test_bridge_input_required_is_asked_and_the_request_repeated_with_the_answers() -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x", arguments={"a": 1}, _meta={"progressToken": 5}))
        first = await peer.settled()
        peer.reply(first, resultType="input_required", inputRequests={"a": FORM, "b": SAMPLE}, requestState='s"1')
        one, two = await until(call, Ask), await until(call, Ask)
        assert [ask.message.method for ask in (one, two)] == ["elicitation/create", "sampling/createMessage"]
        answer(two, result={"role": "assistant"})
        assert await peer.settled() == first  # all answers go together
        answer(one, result={"action": "accept", "content": {"x": 1}})
        second = await peer.settled()
        assert second["id"] != first["id"]
        assert second["params"]["inputResponses"] == {
            "a": {"action": "accept", "content": {"x": 1}},
            "b": {"role": "assistant"},
        }
        assert second["params"]["requestState"] == 's"1'
        assert second["params"]["arguments"] == {"a": 1}
        assert second["params"]["_meta"]["progressToken"] == second["id"]
        peer.reply(second, resultType="input_required", inputRequests={"c": FORM})
        answer(await until(call, Ask), error={"code": -1, "message": "no"})
        third = await peer.settled()
        assert third["params"]["inputResponses"] == {"c": {"action": "cancel"}}
        assert "requestState" not in third["params"]
        peer.reply(third, resultType="complete", content=[{"type": "text", "text": "done"}])
        assert (await until(call, Reply)).message.result == {"content": [{"type": "text", "text": "done"}]}
        assert len(peer.link.pending) == 0


async def test_bridge_progress_only_rises_across_rounds() -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x", _meta={"progressToken": 5}))
        seen: list[float] = []
        for values in ((1, 2), (1, 2, 3)):
            sent = await peer.settled()
            for value in values:
                params = {"progressToken": sent["id"], "progress": value}
                peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})
            if len(values) == 2:
                peer.reply(sent, resultType="input_required", inputRequests={"a": FORM})
                await wait_all_tasks_blocked()
                event = await call.next()
                while type(event) is Interim:
                    seen.append(json.loads(event.text)["params"]["progress"])
                    event = await call.next()
                assert type(event) is Ask
                answer(event, result={"action": "decline"})
            else:
                peer.reply(sent, resultType="complete", content=[])
        event = await call.next()
        while type(event) is Interim:
            seen.append(json.loads(event.text)["params"]["progress"])
            event = await call.next()
        assert seen == [1, 2, 3]


@pytest.mark.parametrize(("method", "is_tool"), [("tools/call", True), ("prompts/get", False)])
async def test_bridge_a_refused_sampling_ends_the_call(method: str, is_tool: bool) -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client(), method, name="x"))
        peer.reply(await peer.settled(method), resultType="input_required", inputRequests={"a": SAMPLE, "b": FORM})
        one, two = await until(call, Ask), await until(call, Ask)
        withdrawn: list[str] = []
        two.on_withdrawn = withdrawn.append
        answer(one, error={"code": -7, "message": "not today"})
        reply = (await until(call, Reply)).message
        if is_tool:
            assert reply.result["isError"] is True
            assert "not today" in reply.result["content"][0]["text"]
        else:
            assert reply.result["code"] == -7
        assert withdrawn
        assert len(peer.requests(method)) == 1
        assert len(peer.link.pending) == 0


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"inputRequests": {}},
        {"inputRequests": {"a": {"method": "made/up", "params": {}}}},
        {"inputRequests": {"a": 3}},
    ],
)
async def test_bridge_an_input_required_that_says_nothing_is_the_servers_fault(result: dict[str, Any]) -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x"))
        peer.reply(await peer.settled(), resultType="input_required", **result)
        with pytest.raises(ServerProtocolError):
            await until(call, Reply)
        assert len(peer.link.pending) == 0


async def test_bridge_what_a_client_did_not_declare_is_not_asked_of_it() -> None:
    async with linked(quiet(modern=True)) as peer:
        client = Client("old", Era.LEGACY, "2025-11-25", {}, owner=Somebody())
        call = peer.link.call(exchange(client, name="x"))
        peer.reply(await peer.settled(), resultType="input_required", inputRequests={"a": FORM})
        reply = await until(call, Reply)
        assert reply.message.result["isError"] is True
        assert "elicitation" in reply.message.result["content"][0]["text"]


async def test_bridge_a_state_alone_is_carried_back_ten_times(autojump_clock: MockClock) -> None:
    script = quiet(modern=True)

    def busy(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] == "tools/call":
            result = {"resultType": "input_required", "requestState": f"s{message['id']}"}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    script.answer = busy
    async with linked(script) as peer:
        began = trio.current_time()
        call = peer.link.call(exchange(legacy_client(), name="x"))
        with pytest.raises(ServerProtocolError, match="more than 10 times"):
            await until(call, Reply)
        sent = peer.requests("tools/call")
        assert len(sent) == 11
        for former, later in itertools.pairwise(sent):
            assert later["params"]["requestState"] == f"s{former['id']}"
        assert 1.5 < trio.current_time() - began < 2.5  # 50, 100, 200, then 250 ms


async def test_bridge_a_cancelled_call_asks_nothing_any_more() -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x"))
        peer.reply(await peer.settled(), resultType="input_required", inputRequests={"a": FORM})
        ask = await until(call, Ask)
        call.cancel("enough")
        answer(ask, result={"action": "accept"})
        await wait_all_tasks_blocked()
        assert len(peer.requests("tools/call")) == 1
        assert len(peer.link.pending) == 0


# ---------------------------------------------------------------------------------- modern clients at a legacy server
async def test_bridge_a_legacy_server_hears_nothing_of_the_modern_context() -> None:
    async with linked(quiet(), eras=(Era.LEGACY,)) as peer:
        meta = context(progressToken="p", **{"own/key": 1, META + "logLevel": "info"})
        peer.link.call(exchange(modern_client(), name="x", _meta=meta, inputResponses={}, requestState="s"))
        sent = await peer.settled()
        assert sent["params"] == {"name": "x", "_meta": {"progressToken": sent["id"], "own/key": 1}}
        peer.link.call(exchange(modern_client(), name="y", _meta=context()))
        assert (await peer.settled())["params"] == {"name": "y", "_meta": {}}


async def test_bridge_a_wanted_log_level_is_set_before_the_call() -> None:
    async with linked(quiet(), eras=(Era.LEGACY,)) as peer:
        for level in ("warning", "error", "info"):
            peer.link.call(exchange(modern_client(log_level=level), name="x", _meta=context()))
        await wait_all_tasks_blocked()
        said = [(m["method"], m["params"].get("level")) for m in peer.script.seen[2:]]
        call = ("tools/call", None)
        level_set = "logging/setLevel"
        assert said == [(level_set, "warning"), call, call, (level_set, "info"), call]  # the lowest that is wanted


async def test_bridge_a_modern_call_keeps_what_a_modern_server_says() -> None:
    async with linked(quiet(modern=True)) as peer:
        call = peer.link.call(exchange(modern_client(), name="x", _meta=context(progressToken=3)))
        sent = await peer.settled()
        assert sent["params"]["_meta"] == context(progressToken=sent["id"])
        peer.reply(sent, resultType="input_required", inputRequests={"a": FORM}, requestState="s")
        assert (await until(call, Reply)).message.result["requestState"] == "s"


# ------------------------------------------------------------------------------------------------------- subscriptions
def listens(peer: Peer) -> list[dict[str, Any]]:
    return peer.requests("subscriptions/listen")


def acknowledge(peer: Peer, listen: dict[str, Any], **honoured: Any) -> None:
    meta = {META + "subscriptionId": listen["id"]}
    method = "notifications/subscriptions/acknowledged"
    peer.pipe.say({"jsonrpc": "2.0", "method": method, "params": {"notifications": honoured, "_meta": meta}})


async def test_bridge_list_changes_are_listened_to_from_the_start() -> None:
    async with linked(quiet(modern=True)) as peer:
        (listen,) = listens(peer)
        assert listen["params"]["notifications"] == {"toolsListChanged": True}
        acknowledge(peer, listen, toolsListChanged=True)
        params = {"_meta": {META + "subscriptionId": listen["id"], "own/key": 1}}
        peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed", "params": params})
        await wait_all_tasks_blocked()
        (notice,) = peer.notices
        assert (notice.method, notice.params) == ("notifications/tools/list_changed", {"_meta": {"own/key": 1}})


async def test_bridge_subscriptions_are_the_union_and_nothing_is_missed_between() -> None:
    async with linked(quiet(modern=True)) as peer:
        replies: list[Message] = []

        async def subscribe(uri: str) -> None:
            replies.append(await peer.link.subscribe(uri, 5))

        for uris in (["test://a"], ["test://a", "test://b"]):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscribe, uris[-1])
                await wait_all_tasks_blocked()
                newest = listens(peer)[-1]
                assert newest["params"]["notifications"]["resourceSubscriptions"] == uris
                closed = [m["params"]["requestId"] for m in peer.requests("notifications/cancelled")]
                assert listens(peer)[-2]["id"] not in closed  # the former one only ends after this
                acknowledge(peer, newest, toolsListChanged=True, resourceSubscriptions=uris)
            await wait_all_tasks_blocked()
            closed = [m["params"]["requestId"] for m in peer.requests("notifications/cancelled")]
            assert listens(peer)[-2]["id"] in closed
        assert all("result" in reply.text for reply in replies)


async def test_bridge_a_subscription_that_is_not_honoured_is_an_error() -> None:
    async with linked(quiet(modern=True)) as peer:
        before = listens(peer)[-1]
        async with trio.open_nursery() as nursery:

            async def subscribe() -> None:
                reply = await peer.link.subscribe("test://a", 5)
                assert reply.result["code"] == -32602

            nursery.start_soon(subscribe)
            await wait_all_tasks_blocked()
            acknowledge(peer, listens(peer)[-1], toolsListChanged=True)
        await wait_all_tasks_blocked()
        closed = [m["params"]["requestId"] for m in peer.requests("notifications/cancelled")]
        assert closed == [listens(peer)[-1]["id"]] != [before["id"]]


# --------------------------------------------------------------------------------------------------------------- tasks
def with_tasks() -> Script:
    script = quiet()
    script.facts["capabilities"]["tasks"] = {"requests": {"tools": {"call": {}}}}
    return script


async def test_bridge_a_tool_that_only_runs_as_a_task_is_run_as_one() -> None:
    async with linked(with_tasks(), eras=(Era.LEGACY,)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x", arguments={"a": 1}, _meta={"progressToken": 7}))
        sent = await peer.settled()
        refusal = {"code": -32601, "message": "needs a task"}
        peer.pipe.say({"jsonrpc": "2.0", "id": sent["id"], "error": refusal})
        again = await peer.settled()
        assert again["params"]["task"]["ttl"] > 0
        assert again["params"]["arguments"] == {"a": 1}
        peer.reply(again, task={"taskId": "t1", "status": "working"})
        wanted = await peer.settled("tasks/result")
        assert wanted["params"] == {"taskId": "t1"}
        progress = {"progressToken": again["params"]["_meta"]["progressToken"], "progress": 1}
        peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        peer.reply(wanted, content=[{"type": "text", "text": "done"}])
        assert json.loads((await until(call, Interim)).text)["params"]["progressToken"] == 7
        assert (await until(call, Reply)).message.result["content"][0]["text"] == "done"


async def test_bridge_a_cancelled_task_is_cancelled_at_its_server() -> None:
    async with linked(with_tasks(), eras=(Era.LEGACY,)) as peer:
        call = peer.link.call(exchange(legacy_client(), name="x"))
        peer.pipe.say({"jsonrpc": "2.0", "id": (await peer.settled())["id"], "error": {"code": -32601, "message": "t"}})
        peer.reply(await peer.settled(), task={"taskId": "t1"})
        await peer.settled("tasks/result")
        call.cancel("enough")
        assert (await peer.settled("tasks/cancel"))["params"] == {"taskId": "t1"}


@pytest.mark.parametrize("script", [quiet, with_tasks])
async def test_bridge_no_tasks_are_asked_for_and_none_advertised(script: Callable[[], Script]) -> None:
    async with linked(script(), eras=(Era.LEGACY,)) as peer:
        peer.link.call(exchange(legacy_client(), name="x", task={"ttl": 1}))
        assert "task" not in (await peer.settled())["params"]
        call = peer.link.call(exchange(legacy_client(), "tools/list", cursor="c"))
        tool = {"name": "t", "execution": {"taskSupport": "required"}, "inputSchema": {"type": "object"}}
        peer.reply(await peer.settled("tools/list"), tools=[tool], nextCursor="d")
        result = (await until(call, Reply)).message.result
        assert result == {"tools": [{"name": "t", "inputSchema": {"type": "object"}}], "nextCursor": "d"}
