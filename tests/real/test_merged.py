"""Row C1: eight real servers behind one endpoint, and all they have used by real clients of either era.

The official SDKs first use each server directly, then all of them through the gateway: with the lists joined and the
prefixes taken off, everything must be the same, and everything that is listed must have been used.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from running import HttpClient, RunningGateway, StdioClient, command

from tests.real.test_servers import (
    CALLS,
    GIT_DATES,
    RESETS,
    argv_of,
    env_of,
    filled,
    make_files,
    make_repository,
    settled,
)

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
CLIENTS = Path(__file__).resolve().parent.parent / "fixtures" / "clients"
LEGACY, MODERN, KEY = "2025-11-25", "2026-07-28", "io.modelcontextprotocol"

SERVERS = ["everything", "filesystem", "memory", "sequential-thinking", "time", "git", "fetch", "demo"]
LISTS = {"tools": "name", "prompts": "name", "resources": "uri", "resourceTemplates": "uriTemplate"}
"""Each list, and the member that tells its items apart."""

THOUGHT = {"thought": "first", "nextThoughtNeeded": False, "thoughtNumber": 1, "totalThoughts": 1}
TOOLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    **{name: [(tool, arguments) for tool, arguments in CALLS[name] if tool != "no-such-tool"] for name in CALLS},
    "sequential-thinking": [("sequentialthinking", THOUGHT)],
    "demo": [
        ("echo", {"text": "hällo"}),
        ("time", {"timezone": "+02:00"}),
        ("notes", {"action": "add", "text": "a note"}),
        ("notes", {"action": "list"}),
        ("notes", {"action": "clear"}),
    ],
}
ASKING = [
    ("get-roots-list", {}),
    ("trigger-sampling-request", {"prompt": "say something"}),
    ("trigger-elicitation-request", {}),
    ("trigger-url-elicitation", {"url": "http://127.0.0.1:9/form", "elicitationId": "e-1"}),
]
"""The tools that server-everything has for clients that can be asked. They see them once their own server runs."""
PROMPTS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "everything": [
        ("simple-prompt", {}),
        ("args-prompt", {"city": "Bern", "state": "BE"}),
        ("completable-prompt", {"department": "Sales", "name": "Eve"}),
        ("resource-prompt", {"resourceType": "Text", "resourceId": "3"}),
    ],
    "fetch": [("fetch", {"url": "http://127.0.0.1:9/nothing-listens-here"})],
    "demo": [("summarize-notes", {"style": "one line"})],
}
URIS: dict[str, list[str]] = {
    "everything": [
        *(f"demo://resource/dynamic/{kind}/7" for kind in ("text", "blob")),
        "demo://resource/session/x.gz",  # which one of the tools has made
    ]
}
"""What is read besides what the lists have: a URI of each template, and what results have linked to."""
COMPLETIONS: dict[str, list[tuple[dict[str, str], dict[str, str]]]] = {
    "everything": [
        ({"type": "ref/prompt", "name": "completable-prompt"}, {"name": "department", "value": "S"}),
        (
            {"type": "ref/resource", "uri": "demo://resource/dynamic/text/{resourceId}"},
            {"name": "resourceId", "value": "12"},
        ),
    ]
}
NEEDS_TASK = "simulate-research-query"
REFUSED = {
    ("everything", NEEDS_TASK),
    ("filesystem", "read_file"),  # of /etc/passwd
    ("time", "get_current_time"),  # nowhere
    ("fetch", "fetch"),  # nothing listens there
}
"""Tools of which one call is meant to fail, with the server's own words."""

RESULT = ("content", "structuredContent", "isError", "messages", "description", "contents", "completion", "error")
Json = dict[str, Any]


class Sdk(NamedTuple):
    """An official SDK: what it is installed as, and how its client is run."""

    part: str
    argv: list[str]


SDKS = {
    "python": Sdk("py/sdk", ["bin/python", str(CLIENTS / "all_of_it.py")]),
    "typescript": Sdk("npm/client", ["node", str(CLIENTS / "all_of_it.mjs"), "2"]),
    "typescript-1": Sdk("npm/sdk1", ["node", str(CLIENTS / "all_of_it.mjs"), "1"]),
}


def argv_of_any(name: str, part: Part, work: Path) -> list[str]:
    if name == "demo":
        return [*command(), "demo-server"]
    if name == "sequential-thinking":
        package = part("npm/thinking") / "node_modules" / "@modelcontextprotocol" / "server-sequential-thinking"
        return ["node", str(package / "dist" / "index.js")]
    return argv_of(name, part, work)


def reset(work: Path) -> None:
    make_files(work)
    make_repository(work)
    for each in RESETS.values():
        each(work)


class World:
    """The servers' folder, the gateway in front of them, and what each SDK gets from each server directly."""

    def __init__(self, work: Path, part: Part) -> None:
        self.work = work
        self.part = part
        reset(work)
        self.argv = {name: argv_of_any(name, part, work) for name in SERVERS}
        # git's server wants dates in git's own form.
        dates = dict.fromkeys(GIT_DATES, "1767225600 +0000")
        own = {name: value for name, value in env_of(work).items() if name not in ("HOME", "USER", "LANG")} | dates
        self.env = own
        # What everything tells and asks is for one client; the others are one for all.
        self.entries: list[Json] = [
            {
                "id": name,
                "isolation": "session" if name == "everything" else "shared",
                "env": own,
                "runtime": {
                    "type": "local-process",
                    "command": argv[0],
                    "args": argv[1:],
                    "working_dir": str(work),
                },
            }
            for name, argv in self.argv.items()
        ]
        self.gateway = RunningGateway(work, self.entries)
        self._direct: dict[str, Json] = {}
        self.lists = {name: self.raw_lists(name) for name in SERVERS}
        # What the gateway knows first is what a client sees that can't be asked anything: the others see more.
        raw_lists(HttpClient(self.gateway, "/mcp"))

    def raw_lists(self, name: str) -> dict[str, list[Json]]:
        """A server's lists, as it gives them to a client that can't be asked anything."""
        client = StdioClient(self.argv[name], env=env_of(self.work), cwd=self.work)
        try:
            return raw_lists(client)
        finally:
            client.close()

    def run(self, sdk: str, mode: str, targets: Json) -> Json:
        """What the SDK's client says to a plan."""
        reset(self.work)
        part, (program, *rest) = self.part(SDKS[sdk].part), SDKS[sdk].argv
        argv = [str(part / program) if "/" in program else program, *rest]
        plan = {"mode": mode, "root": (self.work / "files").as_uri(), "targets": targets}
        done = subprocess.run(
            argv, input=json.dumps(plan), cwd=part, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + "\n".join(self.gateway.lines[-20:])
        return dict(json.loads(done.stdout))

    def direct(self, sdk: str) -> Json:
        """By server: its lists, and its answers to the steps. They speak the legacy era with everybody."""
        if sdk not in self._direct:
            targets = {name: self.target(["stdio", *argv], self.steps(name, "")) for name, argv in self.argv.items()}
            self._direct[sdk] = self.run(sdk, "legacy", targets)
        return self._direct[sdk]

    def target(self, at: list[str], steps: list[Json]) -> Json:
        return {"at": at, "env": self.env, "cwd": str(self.work), "steps": steps}

    def steps(self, name: str, prefix: str) -> list[Json]:
        """All uses of one server, by the names that its things have behind a prefix."""

        def calls(table: list[tuple[str, dict[str, Any]]]) -> list[Json]:
            return [
                {"do": "tools/call", "name": prefix + tool, "arguments": filled(arguments, self.work)}
                for tool, arguments in table
            ]

        found = calls(TOOLS[name])
        if name == "everything":
            found += [{"do": "tools/list", "name": prefix + tool} for tool, _ in ASKING]
            found += calls(ASKING)
        found += [
            {"do": "prompts/get", "name": prefix + prompt, "arguments": arguments}
            for prompt, arguments in PROMPTS.get(name, [])
        ]
        listed = [item["uri"] for item in self.lists[name]["resources"]]
        found += [{"do": "resources/read", "uri": uri} for uri in [*URIS.get(name, []), *listed]]
        for ref, argument in COMPLETIONS.get(name, []):
            named = {**ref, "name": prefix + ref["name"]} if "name" in ref else ref
            found.append({"do": "completion/complete", "ref": named, "argument": argument})
        return found


def raw_lists(client: StdioClient | HttpClient | ModernClient) -> dict[str, list[Json]]:
    """All four lists as they come; empty where the server has no such thing."""
    found = {}
    for member in LISTS:
        method = "resources/templates" if member == "resourceTemplates" else member
        found[member] = client.request(f"{method}/list").get("result", {member: []})[member]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, real_part: Part) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("merged"), real_part)
    try:
        yield made
    finally:
        made.gateway.stop()


def joined(lists: dict[str, Json], member: str) -> list[Json]:
    """What the merged list must be: all servers' in the catalog's order, with prefixes, else unchanged."""
    found = []
    for name in SERVERS:
        for item in lists[name][member]:
            # Tasks are not offered, so neither is which tools could run as one.
            kept = {key: value for key, value in item.items() if key != "execution"}
            found.append({**kept, "name": f"{name}__{item['name']}"} if LISTS[member] == "name" else kept)
    return found


def comparable(world: World, step: Json, answer: Json) -> str:
    """What is the same in any two runs of a step."""
    kept = {key: answer[key] for key in RESULT if key in answer}
    assert kept or step["do"] == "tools/list", (step, answer)
    if step.get("name", "").endswith("get-env"):  # which has what each parent process hands down as well
        variables = json.loads(kept["content"][0]["text"])
        return repr({name: variables.get(name) for name in world.env})
    if "/blob/" in step.get("uri", ""):
        blobs = [base64.b64decode(content["blob"]).decode() for content in kept["contents"]]
        kept["contents"] = [{**content, "blob": blob} for content, blob in zip(kept["contents"], blobs, strict=True)]
    text = settled(json.dumps(kept, sort_keys=True, ensure_ascii=False))
    if NEEDS_TASK in step.get("name", "") and re.search("requires task", text):
        return "refused"  # by the server, or by a client that has seen in the server's own list that it would be
    text = re.sub(r"(Started|Stopped) simulated[^\"]*", "Toggled", text)  # state, not of a client but a process
    text = re.sub(r'"unix": [\d.]+', '"unix": TIME', text)
    return re.sub(r"(thoughtHistoryLength\W+)\d+", r"\1N", text)


def check(world: World, sdk: str, revision: str, seen: Json) -> None:
    """Through the gateway everything is there, and is what it is without."""
    direct = world.direct(sdk)
    assert seen["revision"] == revision
    for member in LISTS:
        expected = joined({name: direct[name]["after"] for name in SERVERS}, member)
        assert seen["after"][member] == expected, member
        # Until a client's own server has started, it sees what that lists to others: to those that can be asked less,
        # at worst. And one of the tools has made a resource since.
        before = seen["before"][member]
        assert all(item in expected for item in before), member
        key = LISTS[member]
        assert {item[key] for item in joined(world.lists, member)} <= {item[key] for item in before}, member
    answers = iter(seen["answers"])
    problems = []
    for name in SERVERS:
        for own, step, theirs in zip(
            world.steps(name, ""), world.steps(name, f"{name}__"), direct[name]["answers"], strict=True
        ):
            ours = next(answers)
            if comparable(world, own, ours) != comparable(world, own, theirs):
                problems.append(f"{step}\n    merged: {ours}\n    direct: {theirs}")
    assert not problems, "\n".join(problems)
    assert next(answers, None) is None


def all_steps(world: World) -> list[Json]:
    return [step for name in SERVERS for step in world.steps(name, f"{name}__")]


def through(world: World, sdk: str, mode: str, at: list[str]) -> Json:
    seen: Json = world.run(sdk, mode, {"merged": world.target(at, all_steps(world))})["merged"]
    return seen


def stdio(world: World, *more: str) -> list[str]:
    return ["stdio", *command(), "stdio", *more]


@pytest.mark.parametrize("sdk", SDKS)
def test_C1_the_tables_of_this_test_use_everything_there_is(sdk: str, world: World) -> None:
    direct = world.direct(sdk)
    for name in SERVERS:
        steps = world.steps(name, "")
        used = {step.get("name") or step.get("uri") for step in steps if step["do"] != "completion/complete"}
        for member in ("tools", "prompts", "resources"):
            assert {item[LISTS[member]] for item in direct[name]["after"][member]} <= used, (name, member)
        for item in direct[name]["after"]["resourceTemplates"]:
            head = item["uriTemplate"].partition("{")[0]
            assert any(uri and uri != head and uri.startswith(head) for uri in used), (name, item)
        failed = {
            (name, step["name"])
            for step, answer in zip(steps, direct[name]["answers"], strict=True)
            if "error" in answer or answer.get("isError")
        }
        assert failed == {each for each in REFUSED if each[0] == name}


class ModernClient:
    """The smallest client of the modern era, which declares that it can be asked things, and answers nothing."""

    def __init__(self, gateway: RunningGateway, path: str, *able: str) -> None:
        self.gateway, self.path, self.able = gateway, path, able

    def request(self, method: str, params: Json | None = None) -> Json:
        params = params or {}
        meta = {f"{KEY}/protocolVersion": MODERN, f"{KEY}/clientCapabilities": {name: {} for name in self.able}}
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": meta}}
        headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": method}
        headers |= {"Mcp-Name": params["name"]} if "name" in params else {}
        return dict(self.gateway.json("POST", self.path, message, headers=headers))


@pytest.mark.parametrize("client", [HttpClient, ModernClient])
def test_C1_lists_are_the_servers_own_with_prefixes(
    client: type[HttpClient] | type[ModernClient], world: World, tmp_path: Path
) -> None:
    """As they come over the wire, with all members, from a gateway that has never listed these servers before."""
    with RunningGateway(tmp_path, world.entries) as gateway:
        merged = raw_lists(client(gateway, "/mcp"))
    for member, key in LISTS.items():
        assert merged[member] == joined(world.lists, member), member
        names = [item[key] for item in merged[member]]
        assert names
        assert len(set(names)) == len(names)
        assert key != "name" or all(re.fullmatch(r"[A-Za-z0-9_.-]{1,48}", name) for name in names)


@pytest.mark.parametrize("mode", ["legacy", MODERN])
@pytest.mark.parametrize("sdk", ["python", "typescript"])
def test_C1_everything_is_reachable_through_mcp(sdk: str, mode: str, world: World) -> None:
    seen = through(world, sdk, mode, ["http", f"http://127.0.0.1:{world.gateway.port}/mcp"])
    check(world, sdk, LEGACY if mode == "legacy" else mode, seen)


@pytest.mark.parametrize("sdk", SDKS)
def test_C1_everything_is_reachable_through_sse(sdk: str, world: World) -> None:
    seen = through(world, sdk, "legacy", ["sse", f"http://127.0.0.1:{world.gateway.port}/sse"])
    check(world, sdk, LEGACY, seen)


@pytest.mark.parametrize(
    ("sdk", "mode", "of"),
    [
        ("python", "legacy", "catalog"),
        ("typescript", MODERN, "catalog"),
        ("python", MODERN, "gateway"),
        ("typescript-1", "legacy", "gateway"),
    ],
)
def test_C1_everything_is_reachable_through_stdio(sdk: str, mode: str, of: str, world: World) -> None:
    base = f"http://127.0.0.1:{world.gateway.port}"
    more = ["--gateway", base] if of == "gateway" else ["--catalog", str(world.gateway.catalog)]
    seen = through(world, sdk, mode, stdio(world, *more))
    check(world, sdk, LEGACY if mode == "legacy" else mode, seen)


@pytest.mark.parametrize("mode", ["legacy", MODERN])
@pytest.mark.parametrize("sdk", ["python", "typescript"])
def test_C1_what_nobody_has_is_not_found(sdk: str, mode: str, world: World) -> None:
    """Neither what no server has, nor what one has, by its own name or under another server's prefix."""
    names = ["everything__no-such-tool", "echo", "git__echo", "demo_echo", "demo__"]
    steps: list[Json] = [{"do": "tools/call", "name": name, "arguments": {}} for name in names]
    steps += [{"do": "prompts/get", "name": name, "arguments": {}} for name in ("simple-prompt", "time__fetch")]
    steps.append({"do": "resources/read", "uri": "nobody://has/this"})
    at = ["http", f"http://127.0.0.1:{world.gateway.port}/mcp"]
    seen = world.run(sdk, mode, {"merged": world.target(at, steps)})["merged"]
    for step, answer in zip(steps, seen["answers"], strict=True):
        read = step["do"] == "resources/read"
        assert answer["error"]["code"] in ((-32602, -32002) if read else (-32602,)), (step, answer)
        assert f"'{step.get('name') or step['uri']}' not found" in answer["error"]["message"]


LISTS_BY_CLIENT = r"""
import json, sys
names = []
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    method, params = message["method"], message.get("params", {})
    answer = {"jsonrpc": "2.0", "id": message["id"]}
    if method == "initialize":
        names = ["plain", "ask"] if "elicitation" in params["capabilities"] else ["plain"]
        answer["result"] = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
            "serverInfo": {"name": "by-client", "version": "1"}}
    elif method == "tools/list":
        answer["result"] = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in names]}
    elif method == "tools/call" and params["name"] in names:
        answer["result"] = {"content": [{"type": "text", "text": params["name"]}]}
    else:
        answer["error"] = {"code": -32601, "message": "no"}
    print(json.dumps(answer), flush=True)
"""
"""Like server-everything, but it never says that its list has changed: it has not, for any of its clients."""


@pytest.mark.parametrize("path", ["/mcp", "/servers/it/mcp"])
def test_C1_a_client_sees_what_its_own_server_lists_to_it(path: str, tmp_path: Path) -> None:
    """Whoever was there first: as soon as its own server runs."""
    runtime = {"type": "local-process", "command": sys.executable, "args": ["-c", LISTS_BY_CLIENT]}
    with RunningGateway(tmp_path, [{"id": "it", "isolation": "session", "runtime": runtime}]) as gateway:
        prefix = "it__" if path == "/mcp" else ""

        def names(client: ModernClient) -> list[str]:
            return [tool["name"] for tool in client.request("tools/list")["result"]["tools"]]

        first = ModernClient(gateway, path)
        assert names(first) == [f"{prefix}plain"]
        second = ModernClient(gateway, path, "elicitation")
        second.request("tools/call", {"name": f"{prefix}plain", "arguments": {}})
        until = time.monotonic() + 20
        while (listed := names(second)) != [f"{prefix}plain", f"{prefix}ask"]:
            assert time.monotonic() < until, listed
            time.sleep(0.05)
        called = second.request("tools/call", {"name": f"{prefix}ask", "arguments": {}})["result"]
        assert called["content"][0]["text"] == "ask"
        assert names(first) == [f"{prefix}plain"]
