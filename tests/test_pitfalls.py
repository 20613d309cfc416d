"""Ten pitfalls that real gateways fell into, each in the eras where it can happen; at the edge of a whole gateway.

In the order of the list that the project keeps; each test names what went wrong elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio

from gateway.config.model import Tenant
from tests.downstream.edge_kit import House, edge, entry
from tests.downstream.legacy_kit import note, rpc
from tests.scripted import MemoryPipe, Script

META = "io.modelcontextprotocol/"
ERAS = ["legacy", "modern"]
Answer = Callable[[MemoryPipe, dict[str, Any]], None]


class Client:
    """A client of either era at one endpoint. A legacy one has a session, a modern one a context."""

    def __init__(self, house: House, era: str, path: str, capabilities: Any = None, **headers: str) -> None:
        self.house = house
        self.era = era
        self.path = path
        self.capabilities = capabilities or {}
        self.headers: dict[str, Any] = dict(headers)

    async def open(self) -> Client:
        if self.era == "legacy":
            info = {"name": "c", "version": "1"}
            params = {"protocolVersion": "2025-11-25", "capabilities": self.capabilities, "clientInfo": info}
            response = await self.house.ask("POST", self.path, rpc("initialize", params), **self.headers)
            assert response.status == 200, response.body
            self.headers["mcp_session_id"] = response.headers["mcp-session-id"]
            await self.house.ask("POST", self.path, note("notifications/initialized"), **self.headers)
        return self

    async def post(self, method: str, params: dict[str, Any] | None = None) -> list[Any]:
        """All messages of the response."""
        params, headers = dict(params or {}), {"content_type": "application/json", **self.headers}
        if self.era == "modern":
            own = {META + "protocolVersion": "2026-07-28", META + "clientCapabilities": self.capabilities}
            params["_meta"] = {**params.get("_meta", {}), **own}
            headers |= {"mcp_protocol_version": "2026-07-28", "mcp_method": method}
            if "name" in params or "uri" in params:
                headers["mcp_name"] = params.get("name") or params["uri"]
        async with self.house.connect() as peer:
            response = await peer.send("POST", self.path, None, json.dumps(rpc(method, params)).encode(), **headers)
            if response.is_stream:
                return [event.json for event in await response.events() if event.data]
            await response.read()
            return [response.json]

    async def request(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """The result."""
        return (await self.post(method, params))[-1]["result"]

    async def call(self, name: str = "x", **arguments: Any) -> Any:
        return await self.request("tools/call", {"name": name, "arguments": arguments})


def server(era: str, *tools: str, call: Answer | None = None, **more: Any) -> Script:
    """A server of one era with some tools. ``call`` answers tools/call; without it the params come back."""

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method == "tools/list":
            result: dict[str, Any] = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in tools]}
        elif method == "tools/call" and call is not None:
            call(pipe, message)
            return
        elif method is not None and "id" in message:
            result = {"content": [{"type": "text", "text": json.dumps(message.get("params"))}]}
        elif method is None and call is not None:
            call(pipe, message)
            return
        else:
            return
        if era == "modern":
            result["resultType"] = "complete"
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    return Script(modern=era == "modern", answer=answer, **more)


@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_1_one_dead_server_empties_the_list(client_era: str) -> None:
    dead = Script(fail_starts=99)
    specs = entry("good", server("legacy", "a")), entry("dead", dead), entry("new", server("modern", "b"))
    async with edge(*specs) as h:
        client = await Client(h, client_era, "/mcp").open()
        result = await client.request("tools/list")
        assert [tool["name"] for tool in result["tools"]] == ["good__a", "new__b"]
        assert "exited" in result["_meta"]["io.github.open-mcp-gateway/unavailable"]["dead"]


@pytest.mark.parametrize("client_era", ERAS)
@pytest.mark.parametrize("server_era", ERAS)
async def test_pitfall_2_pages_are_lost_or_an_empty_cursor_taken_for_the_end(client_era: str, server_era: str) -> None:
    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/list":
            cursor = message.get("params", {}).get("cursor")
            name, following = {None: ("1", ""), "": ("2", "c"), "c": ("3", None)}[cursor]
            result: dict[str, Any] = {"tools": [{"name": name, "inputSchema": {"type": "object"}}]}
            if following is not None:
                result["nextCursor"] = following
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    async with edge(entry("s", Script(modern=server_era == "modern", answer=answer))) as house:
        merged = await (await Client(house, client_era, "/mcp").open()).request("tools/list")
        assert [tool["name"] for tool in merged["tools"]] == ["s__1", "s__2", "s__3"]
        alone = await Client(house, client_era, "/servers/s/mcp").open()
        names, params = [], {}
        while True:
            page = await alone.request("tools/list", params)
            names += [tool["name"] for tool in page["tools"]]
            if "nextCursor" not in page:
                break
            params = {"cursor": page["nextCursor"]}
        assert names == ["1", "2", "3"]


async def test_pitfall_3_one_server_session_for_all_clients_or_one_for_each_call() -> None:
    script = server("legacy", "x")
    async with edge(entry("s", script, isolation="session")) as house:
        clients = [await Client(house, "legacy", "/servers/s/mcp").open() for _ in range(3)]
        for _ in range(3):
            for client in clients:
                await client.call()
        assert script.starts == 3
    script = server("legacy", "x")
    tenants = tuple(Tenant(id, f"k{id}", ("default",)) for id in "ab")
    async with edge(entry("s", script, isolation="session"), tenants=tenants) as house:
        for _ in range(3):
            for key in ("ka", "kb"):
                await Client(house, "modern", "/servers/s/mcp", x_api_key=key).call()
        assert script.starts == 2  # one for each principal, however many calls


@pytest.mark.parametrize("server_era", ERAS)
@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_4_later_questions_go_to_the_first_requests_context(client_era: str, server_era: str) -> None:
    asked: dict[str, Any] = {}

    def call(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if "method" not in message:
            text = json.dumps(message["result"])
            pipe.say({"jsonrpc": "2.0", "id": asked.pop(message["id"]), "result": {"content": [text_of(text)]}})
        elif server_era == "legacy":
            key = f"q{message['id']}"
            asked[key] = message["id"]
            question = {"message": params["arguments"]["q"], "requestedSchema": {"type": "object"}}
            pipe.say({"jsonrpc": "2.0", "id": key, "method": "elicitation/create", "params": question})
        elif "inputResponses" not in params:
            question = {"mode": "form", "message": params["arguments"]["q"], "requestedSchema": {"type": "object"}}
            requests = {"k": {"method": "elicitation/create", "params": question}}
            result = {"resultType": "input_required", "inputRequests": requests}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})
        else:
            text = json.dumps(params["inputResponses"]["k"])
            result = {"resultType": "complete", "content": [text_of(text)]}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    isolation: dict[str, Any] = {"isolation": "session"}
    async with edge(entry("s", server(server_era, "x", call=call), **isolation)) as house:
        client = await Client(house, client_era, "/servers/s/mcp", {"elicitation": {}}).open()
        for question in ("one", "two", "three"):
            with trio.fail_after(10):
                assert await answered(client, question) == {"action": "accept", "content": {"said": question}}


def text_of(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


async def answered(client: Client, question: str) -> Any:
    """Call, answer what is asked by repeating it, and give what the server says it was told."""
    params: dict[str, Any] = {"name": "x", "arguments": {"q": question}}
    if client.era == "modern":
        first = await client.request("tools/call", params)
        ((key, entry),) = first["inputRequests"].items()
        said = {"action": "accept", "content": {"said": entry["params"]["message"]}}
        params |= {"inputResponses": {key: said}}
        if "requestState" in first:
            params["requestState"] = first["requestState"]
        result = await client.request("tools/call", params)
    else:
        async with client.house.connect() as peer:
            body = json.dumps(rpc("tools/call", params)).encode()
            sent = {"content_type": "application/json", **client.headers}
            response = await peer.send("POST", client.path, None, body, **sent)
            event = await response.event()
            while event is not None and not event.data:
                event = await response.event()
            assert event is not None
            said = {"action": "accept", "content": {"said": event.json["params"]["message"]}}
            reply = {"jsonrpc": "2.0", "id": event.json["id"], "result": said}
            await client.house.ask("POST", client.path, reply, **client.headers)
            event = await response.event()
            assert event is not None
            result = event.json["result"]
    return json.loads(result["content"][0]["text"])


@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_5_a_lost_server_is_reported_as_an_empty_success(client_era: str) -> None:
    def die(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        pipe.exit(3)

    async with edge(entry("s", server("legacy", "x", call=die))) as house:
        client = await Client(house, client_era, "/servers/s/mcp").open()
        result = await client.call()
        assert result["isError"] is True
        assert "code 3" in result["content"][0]["text"]


@pytest.mark.parametrize("server_era", ERAS)
@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_6_the_servers_handshake_is_chosen_by_the_clients_era(client_era: str, server_era: str) -> None:
    script = server(server_era, "x")
    for isolation in ("shared", "session"):
        async with edge(entry("s", script, isolation=isolation)) as house:
            client = await Client(house, client_era, "/servers/s/mcp").open()
            result = await client.call()
            # Not downgraded, and told nothing of the other era.
            assert (result.get("resultType") == "complete") is (client_era == "modern")
            (instance,) = house.supervisor.status("s").details
            assert instance["era"] == server_era


@pytest.mark.parametrize("server_era", ERAS)
@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_7_what_is_not_known_is_dropped(client_era: str, server_era: str) -> None:
    seen: list[Any] = []

    def call(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        seen.append(message["params"])
        token = message["params"]["_meta"]["progressToken"]
        progress = {"progressToken": token, "progress": 1, "total": 2, "own": 1}
        pipe.say({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        part = {"type": "text", "text": "t", "annotations": {"priority": 1}, "_meta": {"own/part": 1}, "own": [1]}
        result: dict[str, Any] = {"content": [part], "structuredContent": {"n": 1.50}, "_meta": {"own/result": 1}}
        result["own"] = {"deep": [1]}
        if server_era == "modern":
            result["resultType"] = "complete"
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    async with edge(entry("s", server(server_era, "x", call=call))) as house:
        client = await Client(house, client_era, "/servers/s/mcp").open()
        params = {"name": "x", "arguments": {"a": {"b": 1}}, "own": 1, "_meta": {"own/key": {"c": 1}}}
        params["_meta"]["progressToken"] = "p"  # type: ignore[index]
        progress, reply = await client.post("tools/call", params)
        assert progress["params"] == {"progressToken": "p", "progress": 1, "total": 2, "own": 1}
        result = reply["result"]
        assert result["content"][0]["_meta"] == {"own/part": 1}
        assert result["content"][0]["own"] == [1]
        assert (result["structuredContent"], result["own"]) == ({"n": 1.5}, {"deep": [1]})
        assert result["_meta"]["own/result"] == 1
        assert seen[0]["own"] == 1
        assert seen[0]["arguments"] == {"a": {"b": 1}}
        assert seen[0]["_meta"]["own/key"] == {"c": 1}


@pytest.mark.parametrize("isolation", ["shared", "session"])
async def test_pitfall_8_what_a_client_can_is_not_passed_on(isolation: Any) -> None:
    told: list[Any] = []

    def call(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        told.append(message["params"]["_meta"][META + "clientCapabilities"])
        result = {"resultType": "complete", "content": []}
        pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})

    can = {"elicitation": {"form": {}, "url": {}}, "sampling": {"tools": {}}, "roots": {}}
    async with edge(entry("s", server("modern", "x", call=call), isolation=isolation)) as house:
        for era in ERAS:
            await (await Client(house, era, "/servers/s/mcp", can).open()).call()
    assert told == [can, can]


@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_9_names_grow_too_long_or_change_with_the_second_server(client_era: str) -> None:
    long = "a_tool_with_a_name_that_is_by_itself_nearly_too_long_for_anyone"
    async with edge(entry("s", server("legacy", "x", long))) as house:
        alone = await (await Client(house, client_era, "/mcp").open()).request("tools/list")
    one, two = server("legacy", "x", long), server("legacy", "x")
    async with edge(entry("s", one), entry("s-x", two), entry("t", server("legacy", "x"), prefix="s__")) as house:
        client = await Client(house, client_era, "/mcp").open()
        tools = [tool["name"] for tool in (await client.request("tools/list"))["tools"]]
        assert [tool["name"] for tool in alone["tools"]] == tools[:2]
        assert tools[0] == "s__x"
        assert max(map(len, tools)) <= 48
        assert len(set(tools)) == len(tools) == 4  # the doubled name is another one now, and nothing is dropped
        for name in tools:
            assert "isError" not in await client.call(name)


@pytest.mark.parametrize("server_era", ERAS)
@pytest.mark.parametrize("client_era", ERAS)
async def test_pitfall_10_a_clients_credentials_are_leaked_to_a_server(client_era: str, server_era: str) -> None:
    script = server(server_era, "x")
    async with edge(entry("s", script), api_key="the-clients-key") as house:
        headers = {"authorization": "Bearer the-clients-key", "cookie": "c=the-clients-cookie"}
        client = await Client(house, client_era, "/servers/s/mcp", **headers).open()
        await client.call()
    seen = json.dumps(script.seen)
    assert '"tools/call"' in seen
    assert "the-clients" not in seen
