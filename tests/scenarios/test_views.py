"""Row C5: what an entry or a view hides is not listed, found, described or called there, by any path, and nobody can
tell it from what never was.

Every server here answers whatever it is called, listed or not, so what gets through is seen; and it keeps a log.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from listers import Lister, entries, names
from peers import META, MODERN, LegacyClient, ModernClient
from running import RunningGateway, command

Json = dict[str, Any]
Said = tuple[int, str]
"""HTTP status (0 on stdio) and the text of an answer."""

CLIENTS = {"legacy": LegacyClient, "modern": ModernClient}
NEVER = "never-was-9f3b"
"""A name that no server, entry or view has."""
ID = 4711
INFO = {"name": "t", "version": "1"}
HELLO: Json = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": INFO},
}
CONTEXT = {
    f"{META}protocolVersion": MODERN,
    f"{META}clientInfo": INFO,
    f"{META}clientCapabilities": {},
}


# ------------------------------------------------------------------------------------------------------------ the world
def lister(folder: Path, id: str, **entry: Any) -> Lister:
    """Four tools, three prompts, two resources, two templates."""
    return Lister(
        folder,
        id,
        entry=entry,
        log=str(folder / f"{id}.log"),
        names=["open", "secret", "old", "loud"],
        prompt_names=["ask", "hush", "was"],
        uris=[f"{id}:///open", f"{id}:///secret"],
        templates=[f"{id}:///t/{{n}}", f"{id}:///h/{{n}}"],
    )


SHAPED: Json = {
    "tools": {
        "deny": ["secret"],
        "rename": {"old": "new"},
        "describe": {"open": "Opened.", "*": "Some."},
        "annotate": {"open": {"read_only": True}},
    },
    "prompts": {"deny": ["hush"], "rename": {"was": "is"}},
    "resources": {"deny": ["shaped:///secret*", "shaped:///h/*", "shaped:///t/hush*"]},
}
IN_VIEW: Json = {
    "servers": ["sh*", "plain"],
    "tools": {
        "deny": ["plain__secret"],
        "rename": {"plain__old": "fresh"},
        "describe": {"plain__open": "Told."},
        "annotate": {"plain__*": {"destructive": False}, "plain__open": {"title": "Open it"}},
    },
    "prompts": {"deny": ["plain__hush"], "rename": {"plain__was": "again"}},
    "resources": {"deny": ["plain:///secret*", "plain:///h/*", "plain:///t/hush*"]},
}
VIEWS: list[Json] = [
    {"name": "v", "description": "What is shown.", **IN_VIEW},
    {"name": "find", "mode": "search", **IN_VIEW},
    {
        "name": "few",
        "tags": ["team"],
        "exclude": ["ou?"],
        "prefix": "{id}.",
        "tools": {"allow": ["*.open", "*.loud"]},
        "prompts": {"allow": ["*.[ab]sk"]},
        "resources": {"allow": ["*:///open", "*:///t/{n}"]},
    },
]


@attrs.frozen
class Seen:
    """What is there at an endpoint: name -> "server:its own name"; templates are only listed."""

    tools: Mapping[str, str]
    prompts: Mapping[str, str]
    resources: Mapping[str, str]
    templates: frozenset[str]


def mine(id: str, prefix: str | None = None) -> Seen:
    """A server as it is."""
    start = f"{id}__" if prefix is None else prefix
    return Seen(
        {start + name: f"{id}:{name}" for name in ("open", "secret", "old", "loud")},
        {start + name: f"{id}:{name}" for name in ("ask", "hush", "was")},
        {uri: f"{id}:{uri}" for uri in (f"{id}:///open", f"{id}:///secret", f"{id}:///t/1", f"{id}:///h/1")},
        frozenset({f"{id}:///t/{{n}}", f"{id}:///h/{{n}}"}),
    )


def joined(*parts: Seen) -> Seen:
    return Seen(
        {name: leads for part in parts for name, leads in part.tools.items()},
        {name: leads for part in parts for name, leads in part.prompts.items()},
        {name: leads for part in parts for name, leads in part.resources.items()},
        frozenset().union(*(part.templates for part in parts)),
    )


def shaped(prefix: str = "shaped__") -> Seen:
    """The server "shaped" as its entry shows it."""
    return Seen(
        {prefix + "open": "shaped:open", prefix + "new": "shaped:old", prefix + "loud": "shaped:loud"},
        {prefix + "ask": "shaped:ask", prefix + "is": "shaped:was"},
        {uri: f"shaped:{uri}" for uri in ("shaped:///open", "shaped:///t/1")},
        frozenset({"shaped:///t/{n}"}),
    )


SEEN = {
    "all": joined(shaped(), mine("plain"), mine("out")),
    "v": joined(
        shaped(),
        Seen(
            {"plain__open": "plain:open", "fresh": "plain:old", "plain__loud": "plain:loud"},
            {"plain__ask": "plain:ask", "again": "plain:was"},
            {uri: f"plain:{uri}" for uri in ("plain:///open", "plain:///t/1")},
            frozenset({"plain:///t/{n}"}),
        ),
    ),
    "few": Seen(
        {"plain.open": "plain:open", "plain.loud": "plain:loud"},
        {"plain.ask": "plain:ask"},
        {uri: f"plain:{uri}" for uri in ("plain:///open", "plain:///t/1")},
        frozenset({"plain:///t/{n}"}),
    ),
    "shaped": shaped(""),
}
IDS = ("shaped", "plain", "out", "plane")
ALWAYS = joined(*(mine(id, prefix) for id in IDS for prefix in ("", f"{id}__", f"{id}.", f"{id}_")))
POOL = joined(*SEEN.values(), ALWAYS)
"""Every name that anything has anywhere, or could be thought to have."""
SPELLED = ("t/%68ush", "t/x/../hush1", "t/../secret", "t/%2e%2E/secret", "t/..%2fopen")
PATHS = ("secret/x", "h/2", "t/hush", "t/hush-1", *SPELLED)
"""Paths of resources that are hidden where anything is hidden, by whatever spelling."""
GUESSES = {
    "tools": {
        *POOL.tools,
        "new",
        "fresh",
        "plain__fresh",
        "plain__new",
        "Open",
        "open ",
        "open\0",
        "shaped__open_",
        "*",
    },
    "prompts": {*POOL.prompts, "is", "again", "plain__again", "Ask", "*"},
    "resources": {
        *POOL.resources,
        *(f"{id}:///{path}" for id in IDS for path in PATHS),
        *(f"{id}+{id}:///open" for id in IDS),
        "plain+shaped:///open",
        "PLAIN:///secret",
    },
}
FITTING = {"all": r"(plain|out):///[th]/.*", "few": r"plain:///t/(hush|hush-1|%68ush)"}
"""Guesses that fit a template which is shown there, and that nothing denies."""
SEARCH_TOOLS = {"search_tools", "describe_tool", "call_tool"}


class World:
    """A gateway with three servers of which all lists are known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listers = [
            lister(folder, "shaped", **SHAPED),
            lister(folder, "plain", tags=["team"]),
            lister(folder, "out", tags=["team", "other"]),
        ]
        self.gateway = RunningGateway(folder, entries(self.listers), views=VIEWS)
        client = LegacyClient(self.gateway, "/mcp")
        for method in ("tools/list", "prompts/list", "resources/list", "resources/templates/list"):
            assert "_meta" not in client.request(method).result

    def log(self, id: str) -> list[str]:
        """What has been asked of a server: "METHOD NAME". Without what is taken back after a session has ended."""
        path = self.folder / f"{id}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("resources/unsubscribe")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("views"))
    try:
        yield found
    finally:
        found.gateway.stop()


# ------------------------------------------------------------------------------------------------------------ the doors
class Door:
    """One way in. ``ask`` sends a request, always with the same id, and gives what came of it. ``refusals`` keeps
    answers about what never was.
    """

    refusals: dict[str, Said]

    def ask(self, method: str, params: Json) -> Said:
        raise NotImplementedError

    def close(self) -> None:
        """Leave."""

    def reply(self, method: str, **params: Any) -> Json:
        """The decoded reply."""
        status, text = self.ask(method, params)
        assert status in (0, 200), (status, text)
        return dict(json.loads(text))


class HttpDoor(Door):
    """Streamable HTTP of one era."""

    def __init__(self, world: World, path: str, era: str) -> None:
        self.client = CLIENTS[era](world.gateway, path)

    def ask(self, method: str, params: Json) -> Said:
        reply = self.client.request(method, params, id=ID)
        assert not reply.notes
        return reply.status, json.dumps(reply.message) if reply.streamed else reply.raw.decode()

    def close(self) -> None:
        self.client.close()


class RestDoor(Door):
    """Plain calls: ``server_id`` in the body, or a header."""

    def __init__(self, world: World, path: str, server_id: str) -> None:
        self.world, self.path, self.id = world, path, server_id

    def ask(self, method: str, params: Json) -> Said:
        message = {"jsonrpc": "2.0", "id": ID, "method": method, "params": params}
        if self.path == "/mcp":
            status, _, body = self.world.gateway.http("POST", "/mcp", {"server_id": self.id, **message})
        else:
            status, _, body = self.world.gateway.http("POST", self.path, message, {"X-Server-ID": self.id})
        return status, body.decode()


class SseDoor(Door):
    """The transport of 2024-11-05, with a version that has annotations."""

    def __init__(self, world: World, path: str) -> None:
        self.world = world
        self.connection = http.client.HTTPConnection("127.0.0.1", world.gateway.port, timeout=30)
        self.connection.request("GET", path, headers={"Accept": "text/event-stream"})
        self.stream = self.connection.getresponse()
        assert self.stream.status == 200
        self.messages = self._event()
        self.ask("initialize", HELLO["params"])
        self._post({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def _event(self) -> str:
        data = ""
        while line := self.stream.readline().decode():
            if line.startswith("data:"):
                data = line[5:].strip()
            elif not line.strip() and data:
                return data
        raise AssertionError("the stream has ended")

    def _post(self, message: Json) -> None:
        assert self.world.gateway.http("POST", self.messages, message)[0] == 202

    def ask(self, method: str, params: Json) -> Said:
        self._post({"jsonrpc": "2.0", "id": ID, "method": method, "params": params})
        while json.loads(text := self._event()).get("id") != ID:
            pass
        return 200, text

    def close(self) -> None:
        self.stream.close()
        self.connection.close()


class StdioDoor(Door):
    """A gateway of its own, or one that leads to the running one, on pipes."""

    def __init__(self, world: World, era: str, *arguments: str, through: bool = False) -> None:
        url = f"http://127.0.0.1:{world.gateway.port}"
        where = ["--gateway", url] if through else ["--config", str(world.folder / "config.yaml")]
        self.modern = era == "modern"
        self.process = subprocess.Popen(
            [*command(), "stdio", *where, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if not self.modern:
            self.ask("initialize", HELLO["params"])
            self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def _send(self, message: Json) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, method: str, params: Json) -> Said:
        params = {**params, "_meta": CONTEXT} if self.modern else params
        self._send({"jsonrpc": "2.0", "id": ID, "method": method, "params": params})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if json.loads(line).get("id") == ID:
                return 0, line.decode()
        raise AssertionError("the output has ended")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


@attrs.frozen
class Way:
    """A door, what is seen behind it, and whether its tools have to be searched."""

    name: str
    seen: str
    open: Callable[[World], Door] = attrs.field(repr=False)
    searching: bool = False


def http_ways(path: str, seen: str, searching: bool = False) -> list[Way]:
    return [
        Way(f"{era} {path}", seen, lambda world, era=era: HttpDoor(world, path, era), searching)  # type: ignore[misc]
        for era in CLIENTS
    ]


WAYS = [
    *http_ways("/mcp", "all"),
    *http_ways("/mcp?mode=search", "all", True),
    *http_ways("/views/v/mcp", "v"),
    *http_ways("/views/v/mcp?mode=search", "v", True),
    *http_ways("/views/find/mcp", "v", True),
    *http_ways("/views/find/mcp?mode=list", "v"),
    *http_ways("/views/few/mcp", "few"),
    *http_ways("/views/few/mcp?mode=search", "few", True),
    *http_ways("/servers/shaped/mcp", "shaped"),
    *http_ways("/servers/shaped/mcp?mode=search", "shaped"),  # one server has its own tools
    Way("sse /sse", "all", lambda world: SseDoor(world, "/sse")),
    Way("sse /views/v/sse", "v", lambda world: SseDoor(world, "/views/v/sse")),
    Way("sse /views/v/sse?mode=search", "v", lambda world: SseDoor(world, "/views/v/sse?mode=search"), True),
    Way("sse /views/find/sse", "v", lambda world: SseDoor(world, "/views/find/sse"), True),
    Way("sse /servers/shaped/sse", "shaped", lambda world: SseDoor(world, "/servers/shaped/sse")),
    Way("rest /mcp", "shaped", lambda world: RestDoor(world, "/mcp", "shaped")),
    Way("rest /rpc", "shaped", lambda world: RestDoor(world, "/rpc", "shaped")),
    Way("stdio --view v", "v", lambda world: StdioDoor(world, "legacy", "--view", "v")),
    Way("modern stdio --view few", "few", lambda world: StdioDoor(world, "modern", "--view", "few")),
    Way("stdio --view find", "v", lambda world: StdioDoor(world, "legacy", "--view", "find"), True),
    Way("modern stdio --mode search", "all", lambda world: StdioDoor(world, "modern", "--mode", "search"), True),
    Way(
        "stdio --view find --mode list",
        "v",
        lambda world: StdioDoor(world, "modern", "--view", "find", "--mode", "list"),
    ),
    Way("stdio --server shaped", "shaped", lambda world: StdioDoor(world, "legacy", "--server", "shaped")),
    Way("modern stdio --server shaped", "shaped", lambda world: StdioDoor(world, "modern", "--server", "shaped")),
    Way("stdio --gateway", "v", lambda world: StdioDoor(world, "legacy", "--view", "v", through=True)),
]


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def door(way: Way, world: World) -> Iterator[Door]:
    found = way.open(world)
    found.refusals = {}
    try:
        yield found
    finally:
        found.close()


# ------------------------------------------------------------------------------------------------------------ the table
def test_C5_hidden_by_no_way_and_shown_by_every(way: Way, door: Door, world: World) -> None:
    seen = SEEN[way.seen]
    before = {id: len(world.log(id)) for id in IDS}
    check_lists(door, seen, way.searching)
    if way.searching:
        check_searching(door, seen)
    check_shown(door, seen, way.searching)
    shown = {id: len(world.log(id)) for id in IDS}
    assert sum(shown.values()) > sum(before.values())
    check_hidden(door, seen, way.searching, FITTING.get(way.seen, "never"))
    assert {id: len(world.log(id)) for id in IDS} == shown, "a server was asked for what is hidden"


def listed(door: Door, method: str, member: str, key: str) -> dict[str, Json]:
    result = door.reply(method)["result"]
    assert "_meta" not in result or not any("unavailable" in key for key in result["_meta"]), result
    items = {item[key]: item for item in result[member]}
    assert len(items) == len(result[member])
    return items


def check_lists(door: Door, seen: Seen, searching: bool) -> None:
    tools = listed(door, "tools/list", "tools", "name")
    assert set(tools) == (SEARCH_TOOLS if searching else set(seen.tools))
    assert set(listed(door, "prompts/list", "prompts", "name")) == set(seen.prompts)
    uris = {uri for uri in seen.resources if "/t/" not in uri and "/h/" not in uri}
    assert set(listed(door, "resources/list", "resources", "uri")) == uris
    templates = listed(door, "resources/templates/list", "resourceTemplates", "uriTemplate")
    assert set(templates) == seen.templates
    for name, tool in tools.items():
        check_look(name, seen.tools.get(name, ""), tool, "fresh" in seen.tools)


def check_look(name: str, leads: str, tool: Json, in_view: bool) -> None:
    """What describe and annotate have made of a tool."""
    if not leads:
        return
    expected: tuple[Any, Any] = (f"The {leads.partition(':')[2]} of {leads.partition(':')[0]}.", None)
    if leads == "shaped:open":
        expected = "Opened.", {"readOnlyHint": True}
    elif leads.startswith("shaped:"):
        expected = "Some.", None
    elif in_view and leads == "plain:open":
        expected = "Told.", {"destructiveHint": False, "title": "Open it"}
    elif in_view:
        expected = expected[0], {"destructiveHint": False}
    assert (tool["description"], tool.get("annotations")) == expected, name


def check_shown(door: Door, seen: Seen, searching: bool) -> None:
    """Everything that is there can be used, and is the server's own."""
    for name, leads in seen.tools.items():
        params = {"name": "call_tool", "arguments": {"name": name, "arguments": {"a": 1}}}
        reply = door.reply("tools/call", **(params if searching else {"name": name, "arguments": {}}))
        assert reply["result"]["content"][0]["text"].startswith(f"{leads}:"), reply
    for name, leads in seen.prompts.items():
        assert door.reply("prompts/get", name=name)["result"]["messages"][0]["content"]["text"] == leads
        assert completed(door, {"type": "ref/prompt", "name": name})["result"]["completion"]["values"] == [leads]
    for uri, leads in seen.resources.items():
        assert door.reply("resources/read", uri=uri)["result"]["contents"][0] == {"uri": uri, "text": leads}
    for template in seen.templates:
        values = completed(door, {"type": "ref/resource", "uri": template})["result"]["completion"]["values"]
        assert values == [f"{template.partition(':')[0]}:{template}"]


def completed(door: Door, ref: Json) -> Json:
    return door.reply("completion/complete", ref=ref, argument={"name": "n", "value": "v"})


def check_hidden(door: Door, seen: Seen, searching: bool, fitting: str) -> None:
    """Everything else is answered like what never was."""
    for name in GUESSES["tools"] - set(seen.tools) - SEARCH_TOOLS:
        same(door, name, lambda name: ("tools/call", {"name": name, "arguments": {}}))
        if searching:
            for tool in ("call_tool", "describe_tool"):
                same(door, name, lambda name, tool=tool: ("tools/call", {"name": tool, "arguments": {"name": name}}))  # type: ignore[misc]
    if searching:  # what can be called by call_tool is not there itself
        for name in seen.tools:
            same(door, name, lambda name: ("tools/call", {"name": name, "arguments": {}}))
    for name in GUESSES["prompts"] - set(seen.prompts):
        same(door, name, lambda name: ("prompts/get", {"name": name}))
        same(door, name, lambda name: complete({"type": "ref/prompt", "name": name}))
    for uri in GUESSES["resources"] - set(seen.resources):
        if re.fullmatch(fitting, uri):
            continue
        never = f"never:///{NEVER}"
        same(door, uri, lambda uri: ("resources/read", {"uri": uri}), never)
        if isinstance(door, HttpDoor) and isinstance(door.client, LegacyClient):
            same(door, uri, lambda uri: ("resources/subscribe", {"uri": uri}), never)
            same(door, uri, lambda uri: ("resources/unsubscribe", {"uri": uri}), never)
    for template in (POOL.templates | {uri for uri in POOL.resources if "/h/" in uri}) - seen.templates:
        same(door, template, lambda uri: complete({"type": "ref/resource", "uri": uri}))


def complete(ref: Json) -> tuple[str, Json]:
    return "completion/complete", {"ref": ref, "argument": {"name": "n", "value": "v"}}


def same(door: Door, name: str, made: Callable[[str], tuple[str, Json]], never: str = NEVER) -> None:
    """What is hidden and what never was have the same answer, byte for byte but for the name."""
    status, text = door.ask(*made(name))
    question = json.dumps(made(never))
    expected = door.refusals.get(question) or door.refusals.setdefault(question, door.ask(*made(never)))
    quoted = json.dumps(name, ensure_ascii=False)[1:-1]
    in_words = json.dumps(repr(name), ensure_ascii=False)[2:-2]
    told = [expected[1].replace(never, spelled) for spelled in (quoted, in_words)]
    assert status == expected[0] and text in told, (name, text, told)
    assert '"error"' in text or '"isError"' in text, (name, text)


def check_searching(door: Door, seen: Seen) -> None:
    """Searches by everything that could find what is hidden."""
    servers = {leads.partition(":")[0] for leads in seen.tools.values()}
    queries = ["secret", "old", "The secret of plain.", "out", "plain__secret", "shaped secret", "new fresh", "*", ""]
    found: set[str] = set()
    for query in queries:
        for server in (None, *sorted(servers)):
            arguments = {"query": query, "limit": 50, **({"server": server} if server else {})}
            for tool in used(door, "search_tools", arguments)["tools"]:
                assert tool["name"] in seen.tools, (arguments, tool)
                assert tool["server"] == seen.tools[tool["name"]].partition(":")[0] and server in (None, tool["server"])
                found.add(tool["name"])
    for name, leads in seen.tools.items():  # and what is there is found
        query = "told" if name == "plain__open" and "fresh" in seen.tools else name
        hits = [tool["name"] for tool in used(door, "search_tools", {"query": query, "limit": 50})["tools"]]
        assert name in hits, (query, hits)
        look = used(door, "describe_tool", {"name": name})
        assert look["name"] == name
        check_look(name, leads, look, "fresh" in seen.tools)
    for server in {*IDS, "never"} - servers:
        said = door.reply("tools/call", name="search_tools", arguments={"query": "open", "server": server})["result"]
        assert said["isError"]
        there = ", ".join(sorted(servers))
        assert said["content"][0]["text"] == f"Server '{server}' not found; there are: {there}"


def used(door: Door, tool: str, arguments: Json) -> Json:
    result = door.reply("tools/call", name=tool, arguments=arguments)["result"]
    assert not result.get("isError"), result
    return dict(json.loads(result["content"][0]["text"]))


# --------------------------------------------------------------------------------------------------------- other paths
def post(world: World | RunningGateway, path: str, message: Json, **headers: str) -> tuple[int, str]:
    gateway = world.gateway if isinstance(world, World) else world
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, body = gateway.http("POST", path, message, sent)
    return status, body.decode()


@pytest.mark.parametrize("era", CLIENTS)
def test_C5_subscriptions_and_their_notices_are_for_what_is_shown(era: str, world: World) -> None:
    shown, hidden = "plain:///open", ["plain:///secret", "plain:///t/hush1", "out:///open", f"never:///{NEVER}"]
    client = CLIENTS[era](world.gateway, "/views/v/mcp")
    if era == "modern":
        inbox = client.listen(resourceSubscriptions=[*hidden, shown, "plain:///t/2"])
        (told,) = [m["params"]["notifications"] for m in inbox.seen if m["method"].endswith("acknowledged")]
        assert told["resourceSubscriptions"] == [shown, "plain:///t/2"]
    else:
        inbox = client.listen(resourceSubscriptions=[*hidden, shown, "plain:///t/2"])
    assert not [line for line in world.log("plain") if line.startswith("resources/subscribe") and "hush" in line]
    # The server tells of every resource, to whom it may concern.
    everywhere = CLIENTS[era](world.gateway, "/mcp")
    for uri in [*hidden, "plain:///t/2", shown]:
        everywhere.call("plain__open", updated=uri)
    found = [inbox.next("notifications/resources/updated")["params"]["uri"]]
    found += [message["params"]["uri"] for message in inbox.drained(0.3)]
    assert sorted(found) == [shown, "plain:///t/2"]
    inbox.close()
    client.close()


def test_C5_a_session_belongs_to_its_endpoint(world: World) -> None:
    """A view's session opens no other view, and another view's opens not this one."""
    before = {id: world.log(id) for id in IDS}
    sessions = {path: LegacyClient(world.gateway, path) for path in ("/mcp", "/views/v/mcp", "/views/few/mcp")}
    sessions["/views/v/mcp?mode=search"] = LegacyClient(world.gateway, "/views/v/mcp?mode=search")
    for path, client in sessions.items():
        for other in {*sessions, "/servers/plain/mcp", "/servers/shaped/mcp"} - {path}:
            answer = post(
                world,
                other,
                {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "plain__secret"}},
                **client.session,
            )
            never = post(
                world,
                other,
                {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "plain__secret"}},
                Mcp_Session_Id="never",
                MCP_Protocol_Version=client.session["MCP-Protocol-Version"],
            )
            assert answer == never and answer[0] == 404, (path, other)
    assert {id: world.log(id) for id in IDS} == before


def test_C5_a_server_id_in_the_body_opens_nothing_at_a_view(world: World) -> None:
    before = world.log("plain")
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "secret", "arguments": {}}}
    for path in ("/views/v/mcp", "/views/find/mcp", "/mcp?mode=search", "/views/v/sse", "/servers/shaped/mcp"):
        status, text = post(world, path, {"server_id": "plain", **message}, X_Server_ID="plain")
        assert status in (400, 404, 405), (path, status, text)
        assert "plain:secret" not in text
    client = ModernClient(world.gateway, "/views/v/mcp")
    sent = client.message("tools/call", {"name": "secret", "arguments": {}})
    reply = client.finish(client.send({**sent, "server_id": "plain"}, X_Server_ID="plain"))
    assert reply.error["message"] == "Tool 'secret' not found"
    assert world.log("plain") == before


def test_C5_a_page_of_another_view_can_not_be_asked_for(tmp_path: Path) -> None:
    plain = lister(tmp_path, "plain")
    views = [{"name": "some", "tools": {"deny": ["*secret"]}}]
    with RunningGateway(tmp_path, entries([plain]), views=views, config={"list_page_size": 1}) as gateway:
        everything = LegacyClient(gateway, "/mcp").request("tools/list").result["nextCursor"]
        client = LegacyClient(gateway, "/views/some/mcp")
        first = client.request("tools/list").result
        other = client.request("tools/list", {"cursor": everything})
        assert other.error["code"] == -32602 and "list again" in other.error["message"]
        assert other.error == client.request("tools/list", {"cursor": f"0{everything}"}).error
        assert client.request("tools/list", {"cursor": first["nextCursor"]}).result["tools"]


def test_C5_views_that_do_not_exist(world: World) -> None:
    for path in ("/views/nope/mcp", "/views/V/mcp", "/views//mcp", "/views/v%20/mcp", "/views/nope/mcp?mode=search"):
        status, text = post(world, path, HELLO)
        assert status == 404, (path, text)
    assert world.gateway.http("GET", "/views/nope/sse", headers={"Accept": "text/event-stream"})[0] == 404
    status, text = post(world, "/views/v/mcp?mode=all", HELLO)
    assert status == 400 and "list or search" in text
    for argument in (["--view", "nope"], ["--view", "V"]):
        done = subprocess.run(
            [*command(), "stdio", "--config", str(world.folder / "config.yaml"), *argument],
            input=b"",
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0 and b"not found" in done.stdout and b"Traceback" not in done.stderr
    assert {view["name"]: view for view in world.gateway.json("GET", "/views")} == {
        "v": shown_view("v", "list", ["shaped", "plain"], 6, description="What is shown."),
        "find": shown_view("find", "search", ["shaped", "plain"], 6),
        "few": shown_view("few", "list", ["plain"], 2),
    }


def shown_view(name: str, mode: str, servers: list[str], tools: int, **more: Any) -> Json:
    endpoints = {"mcp": f"/views/{name}/mcp", "sse": f"/views/{name}/sse"}
    return {"name": name, "mode": mode, "servers": servers, "tools": tools, "endpoints": endpoints, **more}


# ------------------------------------------------------------------------------------------------------------- tenants
def test_C5_views_hold_what_their_caller_may_see(tmp_path: Path) -> None:
    """A view of several tenants' servers is for each of them one of its own; a view of none of them does not exist."""
    mine, theirs = lister(tmp_path, "mine", namespace="one"), lister(tmp_path, "theirs", namespace="two")
    both = lister(tmp_path, "both")
    config = {
        "api_key": "root-key",
        "tenants": [
            {"id": "one", "api_key": "one-key", "namespaces": ["one", "default"]},
            {"id": "two", "api_key": "two-key", "namespaces": ["two"]},
        ],
    }
    views = [{"name": "all"}, {"name": "theirs", "servers": ["theirs"]}, {"name": "find", "mode": "search"}]
    with RunningGateway(tmp_path, entries([mine, theirs, both]), views=views, config=config) as gateway:

        def opened(era: str, key: str, path: str) -> Any:
            return CLIENTS[era](gateway, path, headers={"X-API-Key": key})

        for era in CLIENTS:
            root, one, two = (opened(era, f"{who}-key", "/views/all/mcp") for who in ("root", "one", "two"))
            assert {name.partition("__")[0] for name in names(root)} == {"mine", "theirs", "both"}
            assert {name.partition("__")[0] for name in names(one)} == {"mine", "both"}
            assert {name.partition("__")[0] for name in names(two)} == {"theirs"}
            for method, key in (("tools/call", "name"), ("prompts/get", "name"), ("resources/read", "uri")):
                for value in ("theirs__open", "theirs__ask", "theirs:///open", "theirs:///t/1"):
                    said = [one.request(method, {key: name}, id=ID) for name in (value, NEVER)]
                    assert said[0].raw == said[1].raw.replace(NEVER.encode(), value.encode())
                    assert "not found" in said[0].error["message"]
            finder = opened(era, "one-key", "/views/find/mcp")
            hits = json.loads(finder.call("search_tools", query="open of theirs", limit=50).text)["tools"]
            assert {hit["server"] for hit in hits} == {"mine", "both"}
            said = finder.call("search_tools", query="open", server="theirs").text
            assert said == "Server 'theirs' not found; there are: both, mine"
            for tool in ("describe_tool", "call_tool"):
                replies = [
                    finder.request("tools/call", {"name": tool, "arguments": {"name": name}}, id=ID)
                    for name in ("theirs__open", NEVER)
                ]
                assert replies[0].raw == replies[1].raw.replace(NEVER.encode(), b"theirs__open")
        before = (tmp_path / "theirs.log").read_text() if (tmp_path / "theirs.log").exists() else ""
        assert before == ""
        for path in ("/views/{}/mcp", "/views/{}/mcp?mode=search"):
            answers = [post(gateway, path.format(view), HELLO, X_API_Key="one-key") for view in ("theirs", "never-ok")]
            assert answers[0][0] == 404
            assert answers[0] == (answers[1][0], answers[1][1].replace("never-ok", "theirs"))
        for who, shown in (("root", {"all", "theirs", "find"}), ("one", {"all", "find"})):
            found = gateway.json("GET", "/views", headers={"X-API-Key": f"{who}-key"})
            assert {view["name"] for view in found} == shown
            if who == "one":
                assert {tuple(view["servers"]) for view in found} == {("mine", "both")}
                assert {view["tools"] for view in found} == {8}


# ---------------------------------------------------------------------------------------------------------- hot reload
NOTE = "notifications/tools/list_changed"
HIDING = {
    "entry": ({"tools": {"deny": ["secret"]}, "resources": {"deny": ["*secret"]}}, {}),
    "view": ({}, {"tools": {"deny": ["*secret"]}, "resources": {"deny": ["*secret"]}}),
    "exclude": ({}, {"exclude": ["plain"]}),
}
"""What is edited: the entry, or the view."""


@pytest.mark.parametrize("era", CLIENTS)
@pytest.mark.parametrize("how", HIDING)
def test_C5_what_a_reload_hides_is_gone_at_once(how: str, era: str, tmp_path: Path) -> None:
    """For who is connected, in the middle of a list, subscribed to it, or has a link to it."""
    in_entry, in_view = HIDING[how]
    plain, other = lister(tmp_path, "plain"), lister(tmp_path, "other")
    secret = "plain:///secret"
    with RunningGateway(
        tmp_path, entries([plain, other]), views=[{"name": "v"}], config={"list_page_size": 2}
    ) as gateway:
        client = CLIENTS[era](gateway, "/views/v/mcp")
        finder = CLIENTS[era](gateway, "/views/v/mcp?mode=search")
        assert len(names(client)) == 8
        client.request("resources/templates/list")
        inbox = client.listen()
        updates = client.listen(resourceSubscriptions=[secret, "other:///open"]) if era == "modern" else inbox
        if era == "legacy":
            for uri in (secret, "other:///open"):
                client.request("resources/subscribe", {"uri": uri})
        cursors = {m: client.request(m).result["nextCursor"] for m in ("tools/list", "resources/list")}
        client.call("plain__secret", link="plain:///linked/secret")
        assert client.request("resources/read", {"uri": "plain:///linked/secret"}).result
        assert (
            json.loads(finder.call("search_tools", query="secret of plain").text)["tools"][0]["name"] == "plain__secret"
        )
        inbox.drained()

        plain.entry |= in_entry
        gateway.write(entries([plain, other]), [{"name": "v", **in_view}])
        inbox.next(NOTE)
        log = (tmp_path / "plain.log").read_text()
        assert "plain__secret" not in names(client)
        for method, cursor in cursors.items():
            assert "list again" in client.request(method, {"cursor": cursor}).error["message"]
        for method, key, name in (
            ("tools/call", "name", "plain__secret"),
            ("resources/read", "uri", secret),
            ("resources/read", "uri", "plain:///linked/secret"),
        ):
            said = [client.request(method, {key: value}, id=ID).raw for value in (name, NEVER)]
            assert said[0] == said[1].replace(NEVER.encode(), name.encode()), name
        hits = json.loads(finder.call("search_tools", query="secret of plain", limit=50).text)["tools"]
        assert "plain__secret" not in {hit["name"] for hit in hits} and hits
        for tool in ("describe_tool", "call_tool"):
            assert "not found" in finder.call(tool, name="plain__secret").text
        # Updates of what is hidden reach nobody, others do.
        everything = CLIENTS[era](gateway, "/mcp")
        updates.drained()
        everything.call("plain__open", updated=secret)
        everything.call("other__open", updated="other:///open")
        assert updates.next("notifications/resources/updated")["params"]["uri"] == "other:///open"
        assert secret not in json.dumps(updates.drained(0.3))
        asked = (tmp_path / "plain.log").read_text()[len(log) :].splitlines()
        assert [line for line in asked if "secret" in line and "unsubscribe" not in line] == []
        inbox.close()
        updates.close()


@pytest.mark.parametrize("era", CLIENTS)
def test_C5_changes_of_what_is_hidden_are_told_to_nobody(era: str, tmp_path: Path) -> None:
    plain = Lister(tmp_path, "plain", relist=True, entry={"tools": {"allow": ["plain-0", "plain-relist"]}})
    with RunningGateway(tmp_path, entries([plain])) as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        assert names(client) == {"plain__plain-0", "plain__plain-relist"}
        inbox = client.listen()

        def relisted(tools: int) -> None:
            plain.becomes(tools=tools)
            client.call("plain__plain-relist")

        for tools, shown in ((0, {"plain__plain-relist"}), (1, {"plain__plain-0", "plain__plain-relist"})):
            relisted(tools)
            inbox.next(NOTE)
            assert names(client) == shown
        for tools in (9, 3):
            relisted(tools)
            assert inbox.drained(0.5) == []
        assert len(client.request("tools/list").result["tools"]) == 2
        inbox.close()


# --------------------------------------------------------------------------------------------------------------- links
@pytest.mark.parametrize("era", CLIENTS)
def test_C4_C5_links_lead_to_their_own_server_and_not_to_what_is_hidden(era: str, tmp_path: Path) -> None:
    first, second = lister(tmp_path, "first"), lister(tmp_path, "second")
    for one in (first, second):
        one.said |= {"uris": ["x:///listed"] if one is first else ["x:///own"], "templates": ["y:///{n}"]}
        one.entry["runtime"]["args"][-1] = json.dumps(one.said)
    views = [{"name": "v", "resources": {"deny": ["*hidden*", "y:///deep/*"], "allow": ["x:*", "y:*"]}}]
    with RunningGateway(tmp_path, entries([first, second]), views=views) as gateway:
        client = CLIENTS[era](gateway, "/views/v/mcp")

        def linked(server: str, uri: str) -> str:
            """The name that a link of this server's has for the client."""
            link, embedded = client.call(f"{server}__open", link=uri).result["content"]
            assert link["uri"] == embedded["resource"]["uri"]
            return str(link["uri"])

        def read(uri: str) -> Any:
            message = client.request("resources/read", {"uri": uri}).message
            return message["result"]["contents"][0]["text"] if "result" in message else message["error"]["message"]

        # What there is is known, though nobody has listed resources here.
        for method in ("tools/list", "resources/list", "resources/templates/list"):
            LegacyClient(gateway, "/mcp").request(method)
        assert linked("second", "x:///listed") == "second+x:///listed"
        assert read("second+x:///listed") == "second:x:///listed" and read("x:///listed") == "first:x:///listed"
        assert linked("second", "x:///own") == "x:///own" and read("x:///own") == "second:x:///own"
        # Neither lists it: the first to link to it has the name.
        assert linked("second", "x:///new") == "x:///new"
        assert linked("first", "x:///new") == "first+x:///new"
        assert linked("second", "x:///new") == "x:///new"
        assert (read("x:///new"), read("first+x:///new")) == ("second:x:///new", "first:x:///new")
        # Both have the template.
        assert linked("first", "y:///1") == "y:///1" and linked("second", "y:///1") == "second+y:///1"
        assert (read("y:///1"), read("second+y:///1")) == ("first:y:///1", "second:y:///1")
        templates = [t["uriTemplate"] for t in client.request("resources/templates/list").result["resourceTemplates"]]
        assert templates == ["y:///{n}", "second+y:///{n}"]
        # Denied, not allowed: a link changes nothing.
        for uri in ("x:///hidden", "y:///hidden", "y:///deep/1", "z:///1", "y:///a/../deep/1"):
            for server in ("first", "second"):
                linked(server, uri)
                for name in (uri, f"{server}+{uri}", f"second+{uri}"):
                    assert read(name) == f"Resource '{name}' not found"
