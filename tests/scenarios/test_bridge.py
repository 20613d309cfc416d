"""Row B3: every kind of message between clients and servers of both eras, seen from both sides of a real gateway.

Each test is one row of the matrix; its parameter is the cell: the first letter is the client's era, the second the
server's (L legacy, M modern), on a pipe or, with ``_http``, at a URL. A test looks at what the client is told, and in
the server's record at what reached it.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from peers import (
    ALL,
    META,
    MODERN,
    NEWEST,
    AnyClient,
    House,
    Inbox,
    Json,
    LegacyClient,
    ModernClient,
    Record,
    Reply,
    answers_to,
    header_text,
    items,
    wait_until,
)

CELLS = [f"{cell}{carrier}" for carrier in ("", "_http") for cell in ("LL", "LM", "ML", "MM")]
CLIENTS: dict[str, type[LegacyClient] | type[ModernClient]] = {"L": LegacyClient, "M": ModernClient}
KINDS = (
    *("initialize_discover", "lists", "call", "get", "read", "progress", "cancel", "list_changed"),
    *("resource_updates", "sampling", "elicitation", "roots", "log", "roots_list_changed", "ping", "completion"),
    "cursor",
)
"""The rows of the matrix, call, get and read counted one by one."""
CACHE = ("resultType", "ttlMs", "cacheScope")
SERVER_INFO = f"{META}serverInfo"

fresh = itertools.count(1)


def add_servers(house: House, **entry: Any) -> None:
    """A server of each era, on a pipe and at a URL."""
    house.pipe("lpipe", "legacy", "--page", "5", **entry)
    house.pipe("mpipe", "modern", "--page", "5", **entry)
    house.http("lhttp", "legacy", "--page", "5", **entry)
    house.http("mhttp", "modern", "--page", "5", **entry)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Servers of their own for each client."""
    built = House(tmp_path_factory.mktemp("bridge"))
    add_servers(built, isolation="session")
    with built:
        yield built


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Servers that all clients share, for the merged endpoint and for what is shared."""
    built = House(tmp_path_factory.mktemp("merged"))
    add_servers(built)
    with built:
        yield built


class Cell:
    """One combination. ``tag`` tells this test's messages from all others."""

    def __init__(self, name: str, house: House, merged: House) -> None:
        self.front, self.back = name[0], name[1]
        self.on_http = name.endswith("_http")
        self.server = self.back.lower() + ("http" if self.on_http else "pipe")
        self.record = house.records[self.server]
        self.shared = merged.records[self.server]
        self.tag = f"{name}-{next(fresh)}"
        self.house, self.merged = house, merged
        self._open: list[AnyClient | Inbox] = []

    def client(self, capabilities: Json | None = None, **more: Any) -> Any:
        """A client of a server of its own; a modern one shares it with those that declare the same."""
        return self._keep(CLIENTS[self.front](self.house.gateway, f"/servers/{self.server}/mcp", capabilities, **more))

    def own(self) -> Json:
        """Capabilities that nobody else declares, so that the server is new."""
        return {**ALL, "elicitation": {**ALL["elicitation"], "example.com/own": {"tag": self.tag}}}

    def sharer(self) -> Any:
        """A client of the shared server."""
        return self._keep(CLIENTS[self.front](self.merged.gateway, f"/servers/{self.server}/mcp"))

    def merger(self) -> Any:
        """A client of the merged endpoint."""
        return self._keep(CLIENTS[self.front](self.merged.gateway, "/mcp"))

    def listen(self, client: Any, **filter: Any) -> Inbox:
        """A stream for what belongs to no call."""
        inbox: Inbox = self._keep(client.listen(**filter))
        return inbox

    def _keep(self, what: Any) -> Any:
        self._open.append(what)
        return what

    def close(self) -> None:
        for each in reversed(self._open):
            each.close()

    def is_gateways_own(self, message: Json) -> bool:
        """Whether the gateway has listed for itself: then nobody can be asked anything."""
        meta = (message.get("params") or {}).get("_meta") or {}
        return self.back == "M" and meta.get(f"{META}clientCapabilities") == {}

    def check_arrived(self, client: Any, message: Json) -> None:
        """A request as the server's era wants it: its own context, nothing of the other era, mirrored in headers."""
        params = message.get("params") or {}
        meta = params.get("_meta") or {}
        headers = message["http"]["headers"] if self.on_http else {}
        if self.back == "L":
            assert not [key for key in meta if key.startswith(META)], meta
            assert not {"inputResponses", "requestState", "task"} & set(params), params
            if self.on_http:
                assert headers["mcp-session-id"] == message["session"]
                assert headers["mcp-protocol-version"] == NEWEST
                assert "mcp-method" not in headers and "mcp-name" not in headers
            return
        declared = dict(client.capabilities)
        if self.front == "L":
            declared["roots"] = {}  # it says listChanged, which no request can
        assert meta[f"{META}protocolVersion"] == MODERN
        assert meta[f"{META}clientInfo"] == client.info
        assert meta[f"{META}clientCapabilities"] == declared
        if self.on_http:
            assert headers["mcp-protocol-version"] == MODERN
            assert headers["mcp-method"] == message["method"]
            assert "mcp-session-id" not in headers
            name = params.get("uri") if message["method"] == "resources/read" else params.get("name")
            assert headers.get("mcp-name") == (None if name is None else header_text(name))

    def check_result(self, reply: Reply, *, cached: bool = False) -> Json:
        """A result as the client's era wants it; what is left without that."""
        result = reply.result
        assert reply.status == 200
        if self.front == "L":
            assert not set(CACHE) & set(result), result
            assert SERVER_INFO not in result.get("_meta", {})
            return result
        assert result.pop("resultType") == "complete"
        assert result["_meta"].pop(SERVER_INFO)["name"] == "open-mcp-gateway"
        if not result["_meta"]:
            del result["_meta"]
        if cached:
            ttl, scope = result.pop("ttlMs"), result.pop("cacheScope")
            assert (ttl, scope) == ((0, "private") if self.back == "L" else (5000, "public"))
        return result


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest, house: House, merged: House) -> Iterator[Cell]:
    """Each of the combinations."""
    made = Cell(request.param, house, merged)
    yield made
    made.close()


def test_bridge_has_a_test_for_every_cell() -> None:
    assert len(KINDS) >= 16
    assert {name for name in CELLS if "_" not in name} == {"LL", "LM", "ML", "MM"}
    for kind in KINDS:
        assert "cell" in inspect.signature(globals()[f"test_bridge_{kind}"]).parameters


# ---------------------------------------------------------------------------------------------------- opening and lists
def test_bridge_initialize_discover(cell: Cell) -> None:
    client = CLIENTS[cell.front](cell.house.gateway, "/mcp")
    cell._keep(client)
    own = cell.own()
    if isinstance(client, LegacyClient):
        assert client.facts["serverInfo"]["name"] == "open-mcp-gateway"
        client = cell.client(own)
        facts = client.facts
        assert facts["protocolVersion"] == NEWEST
        assert facts["serverInfo"] == {"name": cell.server, "version": "1.0"}
        assert not {"supportedVersions", "_meta", *CACHE} & set(facts)
    else:
        before = cell.record.entries()
        for path in ("/mcp", f"/servers/{cell.server}/mcp"):
            client = ModernClient(cell.house.gateway, path, own)
            reply = client.request("server/discover")
            facts = reply.result
            assert facts["supportedVersions"] == [MODERN]
            assert facts["resultType"] == "complete"
            assert facts["ttlMs"] >= 0 and facts["cacheScope"] in ("private", "public")
            assert facts["_meta"][SERVER_INFO]["name"] == "open-mcp-gateway"
            assert "protocolVersion" not in facts and "serverInfo" not in facts
        assert cell.record.entries() == before, "server/discover has started a server"
    for name in ("tools", "prompts", "resources"):
        assert facts["capabilities"][name]["listChanged"] is True
    assert facts["capabilities"]["resources"]["subscribe"] is True
    assert "tasks" not in facts["capabilities"]
    client.call("echo", tag=cell.tag, text="hi")
    if cell.back == "L":
        (hello,) = [m for m in cell.record.got("initialize") if m["params"]["capabilities"] == own]
        assert hello["params"]["protocolVersion"] == NEWEST
        assert hello["params"]["clientInfo"] == client.info
        call = cell.record.call(cell.tag)
        (ready,) = [
            m
            for m in cell.record.got("notifications/initialized")
            if m["pid"] == call["pid"] and m["session"] in ("", call["session"])
        ]
        assert "id" not in ready
    else:
        assert cell.record.got("server/discover")
        assert not cell.record.got("notifications/initialized"), "it has taken a session's opening"
        cell.check_arrived(client, cell.record.call(cell.tag))


@pytest.mark.parametrize(
    ("method", "member"),
    [
        ("tools/list", "tools"),
        ("prompts/list", "prompts"),
        ("resources/list", "resources"),
        ("resources/templates/list", "resourceTemplates"),
    ],
    ids=["tools", "prompts", "resources", "templates"],
)
def test_bridge_lists(cell: Cell, method: str, member: str) -> None:
    client = cell.client()
    before = len(cell.record.got(method))
    found = client.pages(method)
    for page in found:
        if cell.front == "L":
            assert not set(CACHE) & set(page), page
        else:
            assert page["resultType"] == "complete"
            assert (page["ttlMs"], page["cacheScope"]) == ((0, "private") if cell.back == "L" else (5000, "public"))
    listed = items(found, member)
    for message in cell.record.got(method)[before:]:
        if not cell.is_gateways_own(message):
            cell.check_arrived(client, message)
    every = items(cell.merger().pages(method), member)
    if member == "tools":
        check_tools(cell, listed)
    if member in ("tools", "prompts"):
        own = {name.partition("__")[2]: item for name, item in every.items() if name.startswith(f"{cell.server}__")}
        assert own.keys() == listed.keys()
        for name, item in own.items():
            assert {**item, "name": name} == listed[name], "more than the name has been changed"
    else:
        own = {uri: item for uri, item in every.items() if uri.startswith(f"{cell.server}://")}
        assert own == listed
    if member == "prompts":
        assert listed["greet"]["example.com/extra"] == {"kept": True}
    assert len({name.partition("__")[0] if "__" in name else name.partition(":")[0] for name in every}) == 4


def check_tools(cell: Cell, tools: dict[str, Json]) -> None:
    """Tools as clients of this era may see them."""
    echo = tools["echo"]
    assert echo["title"] == "Echo"
    assert echo["annotations"] == {"readOnlyHint": True, "example.com/hint": 1}
    assert echo["_meta"] == {"example.com/kept": [1, {"a": None}]}
    assert not [tool for tool in tools.values() if "execution" in tool], "nothing runs as a task"
    schema = {"LL": {"type": "object"}, "ML": {"type": "object"}, "MM": {"type": "array"}}
    assert tools["structured"].get("outputSchema") == schema.get(cell.front + cell.back)
    mirrored = tools["mirrored"]["inputSchema"]["properties"]["region"]
    if cell.front == "M":
        assert mirrored.get("x-mcp-header") == ("Region" if cell.back == "M" else None)


def test_bridge_cursor(cell: Cell) -> None:
    client = cell.client()
    before = len(cell.record.got("tools/list"))
    first, second, *_ = pages = client.pages("tools/list")
    assert first["nextCursor"] == "", "the server's first cursor is the empty string"
    assert first["tools"] != second["tools"]
    assert len(items(pages, "tools")) == sum(len(page["tools"]) for page in pages) > 10
    # The gateway may list a server of its client's own meanwhile, to see whether it lists what others of its kind do.
    cursors = [(m.get("params") or {}).get("cursor") for m in cell.record.got("tools/list")[before:]]
    assert cursors.index(None) < cursors.index("") and len(set(cursors)) == len(pages)
    refused = client.request("tools/list", {"cursor": "nonsense"})
    assert (refused.status, refused.error["code"]) == (200 if cell.front == "L" else 400, -32602)
    merger = cell.merger()
    every = items(merger.pages("tools/list"), "tools")
    assert {f"{cell.server}__{name}" for name in items(pages, "tools")} <= set(every)
    arrived = len(cell.shared.got("tools/list"))
    refused = merger.request("tools/list", {"cursor": first["nextCursor"]})
    assert (refused.status, refused.error["code"]) == (200 if cell.front == "L" else 400, -32602)
    assert len(cell.shared.got("tools/list")) == arrived, "a cursor is its own server's only"


# ------------------------------------------------------------------------------------------------------ call, get, read
def test_bridge_call(cell: Cell) -> None:
    client = cell.client()
    arguments = {"tag": cell.tag, "text": "grüße\n\u2028 \U0001f600", "odd": [1, None, {"a": 1.5}]}
    params = {"name": "echo", "arguments": arguments, "_meta": {"example.com/t": {"deep": [1, None]}}}
    reply = client.request("tools/call", params, id="7")
    assert reply.message["id"] == "7"
    result = cell.check_result(reply)
    assert result == {
        "content": [
            {
                "type": "text",
                "text": arguments["text"],
                "annotations": {"priority": 0.5},
                "example.com/block": {"x": [True]},
            }
        ],
        "isError": False,
        "structuredContent": {"text": arguments["text"]},
        "example.com/future": {"a": [1, None]},
        "_meta": {"example.com/trace": "t-1"},
    }
    arrived = cell.record.call(cell.tag)
    assert arrived["params"]["arguments"] == arguments
    assert arrived["params"]["_meta"]["example.com/t"] == {"deep": [1, None]}
    assert arrived["id"] != "7"
    cell.check_arrived(client, arrived)
    assert client.request("tools/call", params, id=7).message["id"] == 7


def test_bridge_call_downgrades(cell: Cell) -> None:
    """What the client's revision has no word for: nothing in the modern era, and the newest legacy one."""
    client = cell.client()
    result = cell.check_result(client.call("structured"))
    assert result["content"] == [{"type": "text", "text": "[1, 2]"}]
    told = {"LL": {"numbers": [1, 2]}, "ML": {"numbers": [1, 2]}, "MM": [1, 2]}
    assert result.get("structuredContent") == told.get(cell.front + cell.back)
    content = cell.check_result(client.call("blocks"))["content"]
    assert [block["type"] for block in content] == ["resource_link", "audio"]
    if cell.front + cell.back == "LM":
        old = cell.client(version="2024-11-05")
        assert [block["type"] for block in old.call("blocks").result["content"]] == ["text", "text"]
        assert set(old.call("echo", text="x").result) & {"structuredContent"} == set()


def test_bridge_call_headers(cell: Cell) -> None:
    """``x-mcp-header``: checked where a modern client should send them, made where a modern server wants them."""
    client = cell.client()
    client.pages("tools/list")
    arguments = {"tag": cell.tag, "region": "süd", "count": 7, "flag": True}
    params = {"name": "mirrored", "arguments": arguments}
    if cell.front + cell.back == "MM":
        refused = client.request("tools/call", params)
        assert (refused.status, refused.error["code"]) == (400, -32020)
        assert not cell.record.calls(cell.tag)
        right = {"Mcp_Param_Region": header_text("süd"), "Mcp_Param_Count": "7", "Mcp_Param_Flag": "true"}
        reply = client.request("tools/call", params, **right)
    else:
        reply = client.request("tools/call", params)
    assert reply.text == "mirrored"
    arrived = cell.record.call(cell.tag) if not cell.on_http else cell.record.calls(cell.tag)[-1]
    cell.check_arrived(client, arrived)
    if cell.on_http:
        sent = {name: value for name, value in arrived["http"]["headers"].items() if name.startswith("mcp-param-")}
        wanted = {"mcp-param-region": header_text("süd"), "mcp-param-count": "7", "mcp-param-flag": "true"}
        assert sent == (wanted if cell.back == "M" else {})


def test_bridge_call_takes_no_tasks(cell: Cell) -> None:
    """Nothing runs as a task here, and no server hears that somebody wanted that."""
    client = cell.client()
    params = {"name": "echo", "arguments": {"text": "t", "tag": cell.tag}, "task": {"ttl": 60_000}}
    reply = client.request("tools/call", params, token="t")
    assert cell.check_result(reply)["content"][0]["text"] == "t"
    arrived = cell.record.call(cell.tag)
    assert "task" not in arrived["params"]
    cell.check_arrived(client, arrived)


@pytest.mark.parametrize("back", ["lpipe", "mpipe", "lhttp", "mhttp"])
def test_bridge_call_without_a_session(house: House, back: str) -> None:
    """A plain call is answered in the legacy dialect and can't be asked anything, so nothing is declared for it."""
    tag = f"plain-{back}"
    reply = house.gateway.rest(back, "tools/call", {"name": "echo", "arguments": {"text": "t", "tag": tag}})
    assert reply["result"]["content"][0]["text"] == "t"
    assert not set(CACHE) & set(reply["result"])
    arrived = house.records[back].call(tag)
    if back.startswith("m"):
        assert arrived["params"]["_meta"][f"{META}clientCapabilities"] == {}
    else:
        (hello,) = [m for m in house.records[back].got("initialize") if m["params"]["capabilities"] == {}]
        assert same(hello, arrived)
    asked = house.gateway.rest(back, "tools/call", {"name": "ask", "arguments": {"kinds": ["roots"], "tag": tag}})
    if back.startswith("m"):
        assert asked["result"]["isError"] is True and "roots" in asked["result"]["content"][0]["text"]
    else:
        assert "error" in asked["result"]["content"][0]["text"], "it is told that nobody can be asked"


def test_bridge_get(cell: Cell) -> None:
    client = cell.client()
    params = {"name": "greet", "arguments": {"name": "Ada", "tag": cell.tag}, "_meta": {"example.com/t": 1}}
    result = cell.check_result(client.request("prompts/get", params))
    assert result == {
        "description": "d",
        "messages": [{"role": "user", "content": {"type": "text", "text": "greet Ada"}}],
    }
    arrived = cell.record.call(cell.tag, "prompts/get")
    assert arrived["params"]["arguments"] == params["arguments"]
    assert arrived["params"]["_meta"]["example.com/t"] == 1
    cell.check_arrived(client, arrived)
    merged = cell.merger().request("prompts/get", {**params, "name": f"{cell.server}__greet"})
    assert cell.check_result(merged) == result
    assert cell.shared.call(cell.tag, "prompts/get")["params"]["name"] == "greet"


def test_bridge_get_asks(cell: Cell) -> None:
    client = cell.client()
    reply = client.ask("prompts/get", {"name": "curious", "arguments": {"tag": cell.tag}})
    assert "Ada" in cell.check_result(reply)["messages"][0]["content"]["text"]
    assert len(client.asked) == 1
    assert len(cell.record.calls(cell.tag, "prompts/get")) == (1 if cell.back == "L" else 2)


def test_bridge_read(cell: Cell) -> None:
    client = cell.client()
    uri = f"{cell.server}://item/{cell.tag}-ä b"
    reply = client.request("resources/read", {"uri": uri})
    assert cell.check_result(reply, cached=True) == {
        "contents": [
            {"uri": uri, "mimeType": "text/plain", "text": f"item/{cell.tag}-ä b", "_meta": {"example.com/n": 1}}
        ]
    }
    cell.check_arrived(client, cell.record.call(uri, "resources/read"))
    absent = client.request("resources/read", {"uri": f"{cell.server}://nothing"})
    assert absent.error["data"]["uri"] == f"{cell.server}://nothing"
    assert (absent.status, absent.error["code"]) == ((200, -32002) if cell.front == "L" else (400, -32602))
    merged = cell.merger()
    assert cell.check_result(merged.request("resources/read", {"uri": f"{cell.server}://static"}), cached=True)
    assert merged.request("resources/read", {"uri": uri}).result["contents"][0]["uri"] == uri


def test_bridge_read_asks(cell: Cell) -> None:
    client = cell.client()
    reply = client.ask("resources/read", {"uri": f"{cell.server}://asks"})
    assert "Ada" in cell.check_result(reply, cached=True)["contents"][0]["text"]
    assert len(client.asked) == 1


# -------------------------------------------------------------------------------------------------- progress and cancel
def values(reply: Reply) -> list[tuple[Any, float]]:
    """Token and value of each progress."""
    return [(params["progressToken"], params["progress"]) for params in reply.noted("notifications/progress")]


def test_bridge_progress(cell: Cell) -> None:
    client = cell.client()
    for token in ("5", 5):
        reply = client.call("steps", token=token, tag=f"{cell.tag}-{token!r}")
        told = reply.noted("notifications/progress")
        own = {"total": 10, "progressToken": token}
        assert told == [{**own, "progress": n, "message": f"step {n}", "example.com/more": n} for n in (1, 2)]
        assert type(told[0]["progressToken"]) is type(token)
        sent = cell.record.call(f"{cell.tag}-{token!r}")
        assert sent["params"]["_meta"]["progressToken"] not in ("5", 5) or sent["id"] == 5
    assert not client.call("steps").notes, "nobody wanted progress"


def test_bridge_progress_across_questions(cell: Cell) -> None:
    client = cell.client()
    params: Json = {"name": "steps", "arguments": {"ask": True, "tag": cell.tag}}
    if cell.front == "L":
        # A modern server counts from 1 again in its second round; what the client sees only rises.
        assert values(client.ask("tools/call", params, token="t")) == [("t", n) for n in (1, 2, 3, 4)]
        return
    first = client.request("tools/call", params, token="first")
    assert first.result["resultType"] == "input_required"
    assert values(first) == [("first", 1), ("first", 2)]
    (key,) = first.result["inputRequests"]
    again = {**params, "inputResponses": {key: {"action": "decline"}}, "requestState": first.result["requestState"]}
    last = client.request("tools/call", again, token="second")
    assert last.text == "done"
    assert values(last) == [("second", n) for n in ((3, 4) if cell.back == "L" else (1, 2, 3, 4))]


def test_bridge_cancel(cell: Cell) -> None:
    client = cell.client()
    answer = client.start("tools/call", {"name": "hang", "arguments": {"tag": cell.tag}}, token="t", id="mine")
    messages = answer.messages()
    assert next(messages)["method"] == "notifications/progress"
    arrived = cell.record.call(cell.tag)
    if cell.front == "L":
        client.notify("notifications/cancelled", {"requestId": "mine", "reason": "enough"})
    else:
        answer.abort()
    (event,) = cell.record.wait(lambda record: record.events("cancelled", tag=cell.tag))
    assert event["id"] == arrived["id"]
    told = cell.record.got("notifications/cancelled", requestId=arrived["id"])
    told = [m for m in told if m["pid"] == arrived["pid"] and m["session"] == arrived["session"]]
    if cell.back == "M" and cell.on_http:
        assert event["how"] == "disconnect"
        assert not told
    else:
        assert event["how"] == "notification"
        assert len(told) == 1
        assert told[0]["params"].get("reason") == "enough" or cell.front == "M"
    answer.close()


def test_bridge_cancel_ignores_late_answers(cell: Cell) -> None:
    client = cell.client()
    params = {"name": "hang", "arguments": {"tag": cell.tag, "late": True}}
    answer = client.start("tools/call", params, token="t", id=8)
    messages = answer.messages()
    assert next(messages)["method"] == "notifications/progress"
    if cell.front == "L":
        client.notify("notifications/cancelled", {"requestId": 8})
        assert not [message for message in messages if "result" in message], "an answer after the cancellation"
    else:
        answer.abort()
    cell.record.wait(lambda record: record.events("cancelled", tag=cell.tag))
    assert client.call("echo", text="still there", id=8).text == "still there"


# ------------------------------------------------------------------------------------------------------------- changes
def test_bridge_list_changed(cell: Cell) -> None:
    client = cell.client(cell.own())
    inbox = cell.listen(client)
    other = cell.listen(client, promptsListChanged=True) if cell.front == "M" else None
    for topic in ("tools", "resources", "prompts"):
        # A server that another test has ended may list less now, which is a change, too: let that be told first.
        client.call("change", what=topic)
        inbox.next(f"notifications/{topic}/list_changed")
    inbox.drained(0.3)
    if other is not None:
        other.drained()
    for topic in ("tools", "resources", "prompts"):
        assert client.call("change", what=topic).text == "changed"
        note = inbox.next()
        assert note["method"] == f"notifications/{topic}/list_changed"
        meta = (note.get("params") or {}).get("_meta", {})
        # Tagged for the client's listen; the tag of the gateway's own listening is nobody's business.
        assert meta == ({f"{META}subscriptionId": inbox.id} if cell.front == "M" else {})
    if other is not None:
        note = other.next()
        assert note["method"] == "notifications/prompts/list_changed", "only what was asked for"
        assert other.drained() == []
    assert inbox.drained() == [], "one notice a change"
    listens = cell.record.got("subscriptions/listen")
    assert not listens if cell.back == "L" else listens
    for listen in listens:
        wanted = {"toolsListChanged": True, "promptsListChanged": True, "resourcesListChanged": True}
        assert listen["params"]["notifications"] == wanted


def test_bridge_list_changed_for_all_who_share(cell: Cell) -> None:
    """Of a shared server every client hears, and only of lists that are not as they were."""
    clients = [cell.sharer(), cell.sharer(), cell.merger()]
    inboxes = [cell.listen(client) for client in clients]
    clients[2].request("tools/list")  # so that the gateway knows the list
    before = len(cell.shared.got("tools/list"))
    clients[0].call("change", what="tools", really=False)
    cell.shared.wait(lambda record: len(record.got("tools/list")) > before)
    clients[0].call("change", what="prompts")
    for inbox in inboxes:
        assert inbox.next()["method"] == "notifications/prompts/list_changed", "the tools are what they were"
    clients[0].call("change", what="tools")
    for inbox in inboxes:
        assert inbox.next()["method"] == "notifications/tools/list_changed"


def listened(record: Record, uri: str) -> list[Json]:
    """The listens whose filter names a resource."""
    every = record.got("subscriptions/listen")
    return [m for m in every if uri in m["params"]["notifications"].get("resourceSubscriptions", ())]


def test_bridge_resource_updates(cell: Cell) -> None:
    uri, other = f"{cell.server}://watched/{cell.tag}", f"{cell.server}://watched/{cell.tag}/2"
    one, two = cell.sharer(), cell.sharer()
    first = cell.listen(one, resourceSubscriptions=[uri])
    second = cell.listen(two, resourceSubscriptions=[uri])
    if cell.back == "L":
        assert len(cell.shared.got("resources/subscribe", uri=uri)) == 1, "many clients, one subscription"
    else:
        assert len(listened(cell.shared, uri)) == 1
    one.call("touch", uri=uri)
    for inbox in (first, second):
        params = inbox.next("notifications/resources/updated")["params"]
        assert params.pop("uri") == uri
        assert set(params.get("_meta", {})) == ({f"{META}subscriptionId"} if cell.front == "M" else set())
    third = cell.listen(two, resourceSubscriptions=[other]) if cell.front == "M" else second
    if cell.front == "L":
        two.request("resources/subscribe", {"uri": other})
    if cell.back == "M":
        check_replaced(cell, uri, other)
    one.call("touch", uri=other)
    assert third.next("notifications/resources/updated")["params"]["uri"] == other
    end_watch(cell, one, first, uri)
    one.call("touch", uri=uri)
    assert second.next("notifications/resources/updated")["params"]["uri"] == uri
    assert first.drained() == [], "it is not watching any more"
    end_watch(cell, two, second, uri)
    if cell.back == "L":
        wait_until(lambda: cell.shared.got("resources/unsubscribe", uri=uri), "the last one has gone")
    else:
        wait_until(lambda: uri not in current(cell.shared), "the last one has gone")
    if third is not second:
        third.close()
    else:
        two.request("resources/unsubscribe", {"uri": other})


def end_watch(cell: Cell, client: Any, inbox: Inbox, uri: str) -> None:
    """As a client of its era does: by a request, or by closing the stream; then wait until the gateway knows."""
    if cell.front == "L":
        client.request("resources/unsubscribe", {"uri": uri})
        return
    inbox.close()
    inbox.drained()


def current(record: Record) -> list[str]:
    """The resources of the newest listen."""
    return list(record.got("subscriptions/listen")[-1]["params"]["notifications"].get("resourceSubscriptions", ()))


def check_replaced(cell: Cell, uri: str, other: str) -> None:
    """A filter can't be changed: a listen with both resources, and only when that is acknowledged the old one ends."""
    (union,) = listened(cell.shared, other)
    assert uri in union["params"]["notifications"]["resourceSubscriptions"]
    before = listened(cell.shared, uri)[0]
    cell.shared.wait(lambda record: record.events("unlistened", id=before["id"]))
    lines = cell.shared.entries()
    acknowledged = next(
        n
        for n, line in enumerate(lines)
        if line.get("sent", {}).get("method") == "notifications/subscriptions/acknowledged"
        and line["sent"]["params"]["_meta"][f"{META}subscriptionId"] == union["id"]
    )
    gone = next(n for n, line in enumerate(lines) if line.get("event") == "unlistened" and line["id"] == before["id"])
    assert acknowledged < gone, "the old one was closed before the new one was there"


def test_bridge_resource_updates_that_are_refused(cell: Cell) -> None:
    good, bad = f"{cell.server}://watched/{cell.tag}", f"{cell.server}://refused/{cell.tag}"
    client = cell.sharer()
    if cell.front == "L":
        refused = client.request("resources/subscribe", {"uri": bad})
        assert (refused.status, refused.error["code"]) == (200, -32602)
        assert client.request("resources/subscribe", {"uri": good}).result == {}
        client.request("resources/unsubscribe", {"uri": good})
        return
    inbox = cell.listen(client, resourceSubscriptions=[bad, good], toolsListChanged=True)
    honoured = inbox.seen[0]["params"]["notifications"]
    assert honoured == {"toolsListChanged": True, "resourceSubscriptions": [good]}


def test_bridge_resource_updates_at_the_merged_endpoint(cell: Cell) -> None:
    uri = f"{cell.server}://watched"
    client = cell.merger()
    client.request("resources/list")
    inbox = cell.listen(client, resourceSubscriptions=[uri])
    client.call(f"{cell.server}__touch", uri=uri)
    assert inbox.next("notifications/resources/updated")["params"]["uri"] == uri


def test_bridge_resource_updates_after_a_restart(cell: Cell) -> None:
    """A server that has lost what it was told is told it again."""
    uri = f"{cell.server}://watched/{cell.tag}"
    client = cell.sharer()
    inbox = cell.listen(client, resourceSubscriptions=[uri])
    if not cell.on_http:
        assert client.call("crash").result["isError"] is True
        # By hand, since it has crashed for the cell before, too, and would not be started again at once.
        assert cell.merged.gateway.http("POST", f"/servers/{cell.server}/start")[0] == 200
    elif cell.back == "L":
        client.call("forget")
    assert client.call("echo", text="up again").text == "up again"
    client.call("touch", uri=uri)
    assert inbox.next("notifications/resources/updated")["params"]["uri"] == uri


# ------------------------------------------------------------------------------------------------- questions to clients
def check_asked(cell: Cell, kind: str, method: str) -> Json:
    """One question and its answer, on both sides: the question as the client has seen it."""
    client = cell.client(cell.own())
    before = len(cell.record.entries())
    reply = client.ask("tools/call", {"name": "ask", "arguments": {"kinds": [kind], "tag": cell.tag}})
    question: Json
    (question,) = client.asked
    answer = answers_to(question)
    assert question["method"] == method
    assert json.loads(cell.check_result(reply)["content"][0]["text"]) == [{kind: {"result": answer}}]
    entries = cell.record.entries()[before:]
    calls = cell.record.calls(cell.tag)
    for call in calls:
        cell.check_arrived(client, call)
    if cell.back == "L":
        assert len(calls) == 1, "a call that has effects must not run twice"
        (sent,) = [e["sent"] for e in entries if e.get("sent", {}).get("method") == method]
        (back,) = [e["got"] for e in entries if "got" in e and "method" not in e["got"]]
        assert back["id"] == sent["id"] and back["result"] == answer
        own_state = None
    else:
        sent = next(e["sent"] for e in entries if "inputRequests" in e.get("sent", {}).get("result", {}))
        own_state = sent["result"]["requestState"]
        first, second = calls
        assert second["id"] != first["id"] or cell.on_http
        assert second["params"]["inputResponses"] == {kind: answer}
        assert second["params"]["requestState"] == own_state, "its state comes back as it was"
        assert second["params"]["arguments"] == first["params"]["arguments"]
        assert "inputResponses" not in first["params"] and "requestState" not in first["params"]
    if cell.front == "L":
        assert question["id"] != sent["id"], "ids are the session's own"
    else:
        (round,) = client.rounds
        assert isinstance(round["requestState"], str) and round["requestState"] != own_state
        assert round["_meta"][SERVER_INFO]["name"] == "open-mcp-gateway"
        if cell.back == "M":
            assert list(round["inputRequests"]) == [kind], "keys are the server's"
        else:
            assert len(round["inputRequests"]) == 1
    return question


def test_bridge_sampling(cell: Cell) -> None:
    question = check_asked(cell, "sampling", "sampling/createMessage")
    assert question["params"] == {
        "messages": [{"role": "user", "content": {"type": "text", "text": f"say {cell.tag}"}}],
        "maxTokens": 7,
        "example.com/future": [1, None],
    }


def test_bridge_elicitation(cell: Cell) -> None:
    params = check_asked(cell, "elicitation", "elicitation/create")["params"]
    assert params.pop("mode", "form") == "form"
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert params == {"message": f"name for {cell.tag}", "requestedSchema": schema}
    if cell.front + cell.back == "LM":
        older = cell.client({"elicitation": {}}, version="2025-06-18")
        older.ask("tools/call", {"name": "ask", "arguments": {"kinds": ["elicitation"], "tag": f"{cell.tag}-old"}})
        assert "mode" not in older.asked[0]["params"], "2025-06-18 has one mode only"


def test_bridge_elicitation_of_urls(cell: Cell) -> None:
    params = check_asked(cell, "url", "elicitation/create")["params"]
    id = params.pop("elicitationId", None)
    assert params == {"mode": "url", "message": f"consent for {cell.tag}", "url": f"https://example.com/{cell.tag}"}
    if cell.front == "M":
        assert id is None, "the modern era has none"
    elif cell.back == "L":
        assert id == f"own-{cell.tag}"
    else:
        assert isinstance(id, str) and id, "2025-11-25 wants one"


def test_bridge_roots(cell: Cell) -> None:
    question = check_asked(cell, "roots", "roots/list")
    assert not question.get("params")


def test_bridge_several_questions(cell: Cell) -> None:
    """All kinds at once, two rounds: everything is asked once a round, and every answer finds its question."""
    client = cell.client(cell.own())
    kinds = ["elicitation", "sampling", "roots"]
    arguments = {"kinds": kinds, "rounds": 2, "tag": cell.tag}
    reply = client.ask("tools/call", {"name": "ask", "arguments": arguments})
    told = json.loads(cell.check_result(reply)["content"][0]["text"])
    assert [sorted(each) for each in told] == [sorted(kinds)] * 2
    for each in told:
        assert each["roots"]["result"] == answers_to({"method": "roots/list"})
        assert each["sampling"]["result"] == answers_to({"method": "sampling/createMessage"})
        assert each["elicitation"]["result"] == answers_to({"method": "elicitation/create"})
    assert len(client.asked) == 6
    assert len(cell.record.calls(cell.tag)) == (1 if cell.back == "L" else 3)


def test_bridge_state_without_questions(cell: Cell) -> None:
    """A modern server that wants to be asked again: the gateway does that for a legacy client, a modern one itself."""
    client = cell.client()
    reply = client.ask("tools/call", {"name": "wait", "arguments": {"rounds": 2, "tag": cell.tag}})
    assert cell.check_result(reply)["content"][0]["text"] == "waited"
    calls = cell.record.calls(cell.tag)
    assert len(calls) == (1 if cell.back == "L" else 3)
    assert len({call["params"].get("requestState") for call in calls}) == len(calls)


def test_bridge_consent_by_error(cell: Cell) -> None:
    """A legacy server's -32042 is an ``input_required`` to a modern client, whose retry makes the call again."""
    client = cell.client()
    params = {"name": "consent", "arguments": {"tag": cell.tag}}
    if cell.front + cell.back == "LL":
        error = client.request("tools/call", params).error
        assert error["code"] == -32042
        assert error["data"]["elicitations"][0]["elicitationId"] == cell.tag
        return
    reply = client.ask("tools/call", params)
    assert cell.check_result(reply)["content"][0]["text"] == "consented"
    if cell.front + cell.back == "ML":
        (question,) = client.asked
        page = {"mode": "url", "message": "m", "url": f"https://example.com/{cell.tag}"}
        assert question == {"method": "elicitation/create", "params": page}
        assert len(cell.record.calls(cell.tag)) == 2


# ------------------------------------------------------------------------------------------------------------------ log
def lines(reply: Reply) -> list[str]:
    """The log lines that came before a reply."""
    return [params["data"].rpartition(" ")[2] for params in reply.noted("notifications/message")]


def test_bridge_log(cell: Cell) -> None:
    every = ["debug", "info", "warning", "error"]
    own = cell.own()
    if cell.front == "L":
        client = cell.client(own)
        before = lines(client.call("log", tag=f"{cell.tag}-0"))
        assert before == (every if cell.back == "L" else []), "a modern server logs for who has said so"
        assert client.request("logging/setLevel", {"level": "warning"}).result == {}
        assert lines(client.call("log", tag=f"{cell.tag}-1")) == every[2:]
        silent, loud = None, "warning"
    else:
        assert lines(cell.client(own).call("log", tag=f"{cell.tag}-0", all=True)) == [], "it has not asked for any"
        assert lines(cell.client(own, level="warning").call("log", tag=f"{cell.tag}-1")) == every[2:]
        assert lines(cell.client(own, level="info").call("log", tag=f"{cell.tag}-2")) == every[1:]
        assert lines(cell.client(own, level="error").call("log", tag=f"{cell.tag}-3", all=True)) in (every[3:], every)
        silent, loud = None, "warning"
    first, second = cell.record.call(f"{cell.tag}-0"), cell.record.call(f"{cell.tag}-1")
    told = [m["params"]["level"] for m in cell.record.got("logging/setLevel") if same(m, second)]
    if cell.back == "M":
        assert told == []
        assert first["params"]["_meta"].get(f"{META}logLevel") == silent
        assert second["params"]["_meta"].get(f"{META}logLevel") == loud
    else:
        assert told[:1] == ["warning"]
        assert told[1:] == ([] if cell.front == "L" else ["info"]), "the lowest that anybody wants"


def same(one: Json, other: Json) -> bool:
    """Whether two messages came over the same pipe or session."""
    return bool(one["pid"] == other["pid"] and one["session"] == other["session"])


def test_bridge_log_is_the_callers(cell: Cell) -> None:
    """A line belongs to one call: to the client that makes it, at the level that it asked for."""
    if cell.front == "L":
        quiet, loud = cell.client(cell.own()), cell.client(cell.own())
        loud.request("logging/setLevel", {"level": "debug"})
        quiet.request("logging/setLevel", {"level": "emergency"})
    else:
        own = cell.own()
        quiet, loud = cell.client(own), cell.client(own, level="debug")
    assert lines(loud.call("log", tag=f"{cell.tag}-loud")) == ["debug", "info", "warning", "error"]
    assert lines(quiet.call("log", tag=f"{cell.tag}-quiet")) == []


# ------------------------------------------------------------------------------------------- notices, pings, completion
def test_bridge_roots_list_changed(cell: Cell) -> None:
    client = cell.client(cell.own())
    client.call("echo", tag=cell.tag, text="up")
    client.notify("notifications/roots/list_changed")
    client.call("echo", tag=f"{cell.tag}-after", text="after")
    call = cell.record.call(f"{cell.tag}-after")
    told = [m for m in cell.record.got("notifications/roots/list_changed") if same(m, call)]
    if cell.front + cell.back == "LL":
        cell.record.wait(lambda record: [m for m in record.got("notifications/roots/list_changed") if same(m, call)])
    else:
        assert not told


def test_bridge_ping(cell: Cell) -> None:
    client = cell.client()
    arrived = len(cell.record.got("ping"))
    reply = client.request("ping")
    if cell.front == "L":
        assert reply.result == {}
    else:
        assert (reply.status, reply.error["code"]) == (404, -32601)
    assert len(cell.record.got("ping")) == arrived, "the gateway answers itself"
    asked = client.ask("tools/call", {"name": "ping_me", "arguments": {"tag": cell.tag}})
    assert cell.check_result(asked)["content"][0]["text"] == ("{}" if cell.back == "L" else '"there is none"')
    assert client.asked == [], "the server's ping is not for the client"


def test_bridge_completion(cell: Cell) -> None:
    params = {"argument": {"name": "name", "value": cell.tag}, "context": {"arguments": {"other": "x"}}}
    merger = cell.merger()
    ref = {"type": "ref/prompt", "name": f"{cell.server}__greet"}
    reply = merger.request("completion/complete", {**params, "ref": ref})
    told = {"values": [f"{cell.tag}-greet", "x"], "total": 2, "hasMore": False}
    assert cell.check_result(reply) == {"completion": told}
    (arrived,) = cell.shared.got("completion/complete", argument=params["argument"])
    assert arrived["params"]["ref"] == {"type": "ref/prompt", "name": "greet"}
    cell.check_arrived(merger if cell.back == "M" else None, arrived)
    client = cell.client()
    template = f"{cell.server}://item/{{id}}"
    reply = client.request("completion/complete", {**params, "ref": {"type": "ref/resource", "uri": template}})
    assert cell.check_result(reply)["completion"]["values"] == [f"{cell.tag}-{template}", "x"]
    (arrived,) = cell.record.got("completion/complete", argument=params["argument"])
    cell.check_arrived(client, arrived)
