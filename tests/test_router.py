"""Dispatch: what is answered here, what is routed, and the simple merged view; over scripted servers."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import trio
from scripted import SCRIPTED, MemoryPipe, Script, ScriptedSpec
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.config.snapshot import Snapshot
from gateway.errors import Overloaded, ServerProtocolError, UnknownTarget
from gateway.exchange import Call, Client, Exchange, Interim, Reply
from gateway.hub import Hub
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_request
from gateway.router import Router
from gateway.runtimes.base import Surroundings
from gateway.supervisor import Directions, Supervisor


class Owner:
    def __init__(self) -> None:
        self.marks: list[str] = []

    def ask(self, ask: Any) -> bool:
        return False

    def notify(self, text: str) -> None: ...

    def mark(self, topic: str) -> None:
        self.marks.append(topic)


class House:
    """A router over scripted servers, one for each Script."""

    def __init__(self, **scripts: Script) -> None:
        self.scripts = scripts
        self.specs = tuple(
            ServerSpec(id, ScriptedSpec(script, id), "scripted", namespace="hidden" if id == "hidden" else "default")
            for id, script in scripts.items()
        )
        self.snapshot = Snapshot(Settings(), Catalog(self.specs))
        hub = Hub()
        directions = Directions(
            {"scripted": SCRIPTED},
            lambda spec: Surroundings(spec.id, {}),
            lambda: self.snapshot.settings,
            {"name": "g"},
        )
        self.supervisor = Supervisor(directions, hub)
        self.router = Router(self.supervisor, hub, lambda: self.snapshot, {"name": "g", "version": "0"})
        self.client = Client("me", Era.LEGACY, "2025-11-25", owner=Owner())

    async def ask(
        self,
        server_id: str | None,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        principal: Principal = ANONYMOUS,
        client: Client | None = None,
        interims: list[str] | None = None,
    ) -> Message:
        body = {"jsonrpc": "2.0", "id": "mine", "method": method}
        if params is not None:
            body["params"] = params  # type: ignore[assignment]
        exchange = Exchange(
            decode_request(json.dumps(body)),
            principal,
            self.snapshot,
            client or self.client,
            server_id,
            trio.current_time() + 30,
        )
        got = await self.router.dispatch(exchange)
        while isinstance(got, Call):
            event = await got.next()
            if isinstance(event, Interim):
                assert interims is not None
                interims.append(event.text)
            if isinstance(event, Reply):
                got = event
        return got.message


def tool_server(*names: str, **more: Any) -> Script:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if "id" not in message:
            return
        method, params = message["method"], message.get("params") or {}
        if method == "tools/list":
            result: dict[str, Any] = {"tools": [{"name": n, "inputSchema": {"type": "object"}} for n in names]}
        elif method == "resources/list":
            result = {"resources": [{"uri": f"test://{n}", "name": n} for n in names]}
        elif method == "resources/templates/list":
            result = {"resourceTemplates": [{"uriTemplate": f"{names[0]}://item/{{id}}", "name": "t"}]}
        else:
            result = {"called": method, "params": params}
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    return Script(answer=answer, **more)


@pytest.fixture
async def start(nursery: trio.Nursery) -> Any:
    async def go(**scripts: Script) -> House:
        house = House(**scripts)
        await nursery.start(house.supervisor.run)
        return house

    return go


async def test_ping_is_answered_here_and_starts_nothing(start: Any) -> None:
    house = await start(a=tool_server("x"))
    assert (await house.ask("a", "ping")).text == '{"jsonrpc":"2.0","id":0,"result":{}}'
    assert house.scripts["a"].starts == 0


async def test_H41_a_servers_endpoint_passes_everything_through(start: Any) -> None:
    house = await start(a=tool_server("x"))
    reply = await house.ask("a", "tools/call", {"name": "x", "arguments": {"n": 1}, "unknown": [1]})
    assert reply.result == {"called": "tools/call", "params": {"name": "x", "arguments": {"n": 1}, "unknown": [1]}}
    assert (await house.ask("a", "vendor/method", {"q": 1})).result["called"] == "vendor/method"


async def test_progress_comes_back_under_the_clients_own_token(start: Any) -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            token = message["params"]["_meta"]["progressToken"]
            assert token == message["id"]
            assert message["params"]["_meta"]["vendor"] == {"x": 1}
            pipe.say(
                {
                    "jsonrpc": "2.0",
                    "method": "notifications/progress",
                    "params": {"progressToken": token, "progress": 1},
                },
                {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 999, "progress": 2}},
                {"jsonrpc": "2.0", "id": message["id"], "result": {}},
            )

    house = await start(a=Script(answer=answer))
    seen: list[str] = []
    await house.ask(
        "a", "tools/call", {"name": "x", "_meta": {"progressToken": "7", "vendor": {"x": 1}}}, interims=seen
    )
    assert [json.loads(text)["params"] for text in seen] == [{"progressToken": "7", "progress": 1}]


async def test_H39_initialize_answers_with_the_servers_facts_less_what_sharing_forbids(start: Any) -> None:
    house = await start(a=tool_server("x"))
    facts = await house.router.initialize(house.client, ANONYMOUS, "a", trio.current_time() + 5)
    assert facts["serverInfo"] == {"name": "scripted", "version": "1"}
    assert "logging" not in facts["capabilities"]
    assert facts["capabilities"]["resources"] == {"subscribe": True}
    merged = await house.router.initialize(house.client, ANONYMOUS, None, trio.current_time() + 5)
    assert merged["serverInfo"]["name"] == "g"
    assert house.scripts["a"].methods().count("initialize") == 1


async def test_A5_unknown_and_hidden_servers_get_the_same_answer(start: Any) -> None:
    house = await start(a=tool_server("x"), hidden=tool_server("h"))
    tenant = Principal("t", namespaces=frozenset({"default"}))
    texts = []
    for server_id in ("hidden", "nowhere"):
        with pytest.raises(UnknownTarget) as caught:
            await house.ask(server_id, "tools/list", principal=tenant)
        texts.append(caught.value.message.replace(server_id, "ID"))
    assert texts == ["Server 'ID' not found"] * 2
    listed = (await house.ask(None, "tools/list", principal=tenant)).text
    assert "h" not in [t["name"] for t in json.loads(listed)["result"]["tools"]]
    assert (await house.ask(None, "tools/call", {"name": "hidden__h"}, principal=tenant)).result["code"] == -32602


async def test_merged_lists_join_all_servers_and_calls_find_their_way(start: Any) -> None:
    house = await start(a=tool_server("x", "y"), b=tool_server("x"))
    tools = json.loads((await house.ask(None, "tools/list")).text)["result"]["tools"]
    assert [t["name"] for t in tools] == ["a__x", "a__y", "b__x"]
    reply = await house.ask(None, "tools/call", {"name": "b__x", "arguments": {"v": 1}})
    assert reply.result["params"] == {"name": "x", "arguments": {"v": 1}}
    assert "tools/call" in house.scripts["b"].methods()
    assert (await house.ask(None, "resources/read", {"uri": "test://y"})).result["params"] == {"uri": "test://y"}
    assert (await house.ask(None, "resources/read", {"uri": "b+test://x"})).result["params"] == {"uri": "test://x"}
    assert (await house.ask(None, "resources/read", {"uri": "a+x://item/3"})).result["code"] == -32002
    assert (await house.ask(None, "resources/read", {"uri": "x://item/3"})).result["called"] == "resources/read"
    assert (await house.ask(None, "tools/call", {"name": "x"})).result["code"] == -32602
    assert (await house.ask(None, "nonsense")).result["code"] == -32601


async def test_pitfall_1_one_dead_server_does_not_empty_the_list(start: Any, autojump_clock: MockClock) -> None:
    house = await start(good=tool_server("x"), dead=Script(fail_starts=99), slow=Script(silent=True))
    result = json.loads((await house.ask(None, "tools/list")).text)["result"]
    assert [t["name"] for t in result["tools"]] == ["good__x"]
    assert set(result["_meta"]["io.github.open-mcp-gateway/unavailable"]) == {"dead", "slow"}
    begin = trio.current_time()
    assert (await house.ask(None, "tools/call", {"name": "good__x"})).result["called"] == "tools/call"
    assert trio.current_time() == begin, "a known tool waits for nobody else"
    lone = await start(dead=Script(fail_starts=99))
    with pytest.raises(ServerProtocolError, match="No server could be listed"):
        await lone.ask(None, "tools/list")


async def test_pitfall_2_every_page_is_read_and_a_repeated_cursor_ends_it(start: Any) -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            cursor = (message.get("params") or {}).get("cursor")
            page = {None: ("1", ""), "": ("2", "c"), "c": ("3", "c")}[cursor]
            result = {"tools": [{"name": page[0]}], "nextCursor": page[1]}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    house = await start(a=Script(answer=answer))
    tools = json.loads((await house.ask(None, "tools/list")).text)["result"]["tools"]
    assert [t["name"] for t in tools] == ["a__1", "a__2", "a__3"]


async def test_list_changed_is_passed_on_only_when_the_list_has_changed(start: Any, autojump_clock: MockClock) -> None:
    names = ["x"]
    house = await start(a=tool_server("x"))

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message["method"] == "tools/list":
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {"tools": [{"name": n} for n in names]}})

    script = house.scripts["a"]
    script.answer = answer
    for _ in range(2):
        await house.ask(None, "tools/list")
    assert script.methods().count("tools/list") == 1
    woken: list[int] = []
    subscription = house.router.subscribe(None, lambda: woken.append(1), ANONYMOUS)
    for _ in range(3):
        script.pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    await trio.sleep(1)
    assert (woken, subscription.take()) == ([], [])
    assert script.methods().count("tools/list") == 2  # three notices, one look
    names.append("y")
    for _ in range(3):
        script.pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    await trio.sleep(1)
    assert (woken, subscription.take()) == ([1], [("a", "tools")])
    listed = json.loads((await house.ask(None, "tools/list")).text)["result"]["tools"]
    assert [tool["name"] for tool in listed] == ["a__x", "a__y"]
    assert script.methods().count("tools/list") == 3


async def test_list_changed_of_a_list_that_nobody_asked_for_is_passed_on(start: Any) -> None:
    house = await start(a=tool_server("x"))
    await house.ask("a", "tools/call", {"name": "x"})
    woken: list[int] = []
    subscription = house.router.subscribe("a", lambda: woken.append(1), ANONYMOUS)
    house.scripts["a"].pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    await wait_all_tasks_blocked()
    assert (woken, subscription.take()) == ([1], [("a", "tools")])


async def test_what_a_server_lacks_is_an_empty_list_to_who_was_claimed_it(start: Any) -> None:
    house = await start(a=tool_server("x"))
    modern = Client("modern:1", Era.MODERN, "2026-07-28")
    assert "prompts" in (await house.router.discover(modern, ANONYMOUS, "a"))["capabilities"]
    for _ in range(2):  # while it starts, and when it runs
        assert (await house.ask("a", "prompts/list", client=modern)).result == {"prompts": []}
    assert house.supervisor.status("a").connection_count == 0
    assert "prompts" not in (await house.router.discover(modern, ANONYMOUS, "a"))["capabilities"]
    assert "prompts/list" not in house.scripts["a"].methods()
    await house.ask("a", "prompts/list")
    assert "prompts/list" in house.scripts["a"].methods()  # a session knows what the server can


async def test_resource_subscriptions_of_many_clients_are_one_upstream(start: Any) -> None:
    house = await start(a=tool_server("x"))
    others = [Client(k, Era.LEGACY, "2025-11-25", owner=Owner()) for k in "123"]
    for who in others:
        reply = await house.ask("a", "resources/subscribe", {"uri": "test://x"}, client=who)
        assert "error" not in reply.text
    methods = house.scripts["a"].methods
    assert methods().count("resources/subscribe") == 1
    house.scripts["a"].pipe.say(
        {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "test://x"}}
    )
    await wait_all_tasks_blocked()
    assert all(isinstance(w.owner, Owner) and w.owner.marks == ["resource:test://x"] for w in others)
    for who in others:
        assert methods().count("resources/unsubscribe") == 0
        await house.ask("a", "resources/unsubscribe", {"uri": "test://x"}, client=who)
    assert methods().count("resources/unsubscribe") == 1


async def test_updates_of_clashing_resources_come_under_the_names_that_were_listed(start: Any) -> None:
    house = await start(a=tool_server("x"), b=tool_server("x"))
    listed = json.loads((await house.ask(None, "resources/list")).text)["result"]["resources"]
    names = [item["uri"] for item in listed]
    assert names == ["test://x", "b+test://x"]
    for uri in names:
        assert "error" not in (await house.ask(None, "resources/subscribe", {"uri": uri})).text
    for id in "ab":
        note = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "test://x"}}
        house.scripts[id].pipe.say(note)
        await wait_all_tasks_blocked()
    assert house.client.owner.marks == ["resource:test://x", "resource:b+test://x"]


async def test_notifications_reach_running_servers_only(start: Any) -> None:
    house = await start(a=tool_server("x"))

    def note(method: str) -> None:
        message = decode_request(json.dumps({"jsonrpc": "2.0", "method": method, "params": {"a": 1}}))
        house.router.notify(Exchange(message, ANONYMOUS, house.snapshot, house.client, "a", 0))

    note("notifications/x")
    assert house.scripts["a"].starts == 0
    await house.ask("a", "tools/list")
    note("notifications/x")
    note("notifications/roots/list_changed")
    await wait_all_tasks_blocked()
    assert house.scripts["a"].methods()[-1] == "notifications/x"


async def test_a_server_isolated_by_call_is_listed_once_and_leaves_nothing(start: Any) -> None:
    house = await start(a=tool_server("x"))
    spec = attrs.evolve(house.specs[0], isolation="call")
    house.snapshot = Snapshot(Settings(), Catalog((spec,)))
    for n in range(3):
        assert (await house.ask(None, "tools/call", {"name": "a__x"})).result["called"] == "tools/call"
        await wait_all_tasks_blocked()
        assert house.scripts["a"].methods().count("tools/list") == 1
        assert house.scripts["a"].starts == 2 + n, "one to list, one for each call"
    assert len(house.supervisor.units()) == 1
    assert house.scripts["a"].running == 0


@pytest.mark.parametrize("isolation", ["principal", "session"])
async def test_C7_what_starts_nothing_makes_no_unit(start: Any, isolation: Any) -> None:
    """Callers choose what they declare, so they could have any number of units made."""
    house = await start(a=tool_server("x"))
    (spec,) = house.specs
    house.snapshot = Snapshot(Settings(), Catalog((attrs.evolve(spec, isolation=isolation),)))
    client = Client("modern:{}", Era.MODERN, "2026-07-28")
    call = decode_request('{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}')
    note = decode_request('{"jsonrpc":"2.0","method":"notifications/roots/list_changed"}')
    assert house.router.tool_headers(Exchange(call, ANONYMOUS, house.snapshot, client, "a", 30)) is None
    house.router.notify(Exchange(note, ANONYMOUS, house.snapshot, house.client, "a", 30))
    assert house.supervisor.units() == []
    house.snapshot = attrs.evolve(house.snapshot, settings=Settings(max_units=0))
    for one in (client, house.client):
        with pytest.raises(Overloaded, match="max_units"):
            await house.ask("a", "tools/call", {"name": "x"}, client=one)
    assert house.supervisor.units() == []


async def test_C7_a_client_whose_own_server_lists_otherwise_may_be_the_first_to_ask(
    start: Any, autojump_clock: MockClock
) -> None:
    house = await start(a=tool_server("one"))
    (spec,) = house.specs
    house.snapshot = Snapshot(Settings(), Catalog((attrs.evolve(spec, isolation="session"),)))
    (spec,) = house.snapshot.catalog.servers
    other = Client("other", Era.LEGACY, "2025-11-25", owner=Owner())
    await house.supervisor.unit(spec, other, ANONYMOUS).list_all("tools/list", lambda method: None)
    house.scripts["a"].answer = tool_server("two").answer
    await house.supervisor.unit(spec, house.client, ANONYMOUS).ready()
    house.scripts["a"].pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    await trio.sleep(1)
    message = decode_request('{"jsonrpc":"2.0","id":1,"method":"tools/list"}')
    for client, listed in ((house.client, ["a__two"]), (other, ["a__one"])):
        got = house.router.dispatch_now(Exchange(message, ANONYMOUS, house.snapshot, client, None, 30))
        assert isinstance(got, Reply)
        assert [tool["name"] for tool in got.message.result["tools"]] == listed
