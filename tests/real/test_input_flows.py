"""Row B2: servers that ask and clients that answer, in every combination of eras and transports.

Client and server are the official SDK (2.3.0), each pinned to one era, and only the gateway between them can make them
understand each other. What is expected is what the same server says to a client of its own era, but for the answers of
section 4 of protocol.md where the eras differ. The states that a client brings back are attacked with raw HTTP below.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import ACCEPT, RunningGateway, events

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DRIVER = FIXTURES / "clients" / "flows.py"
SERVER = FIXTURES / "asking_server.py"
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"

# ---------------------------------------------------------------------------------------------------- what is expected
FORM = {"kind": "form", "message": "Who are you?", "properties": ["name"]}
NAMED = 'form accept {"name": "my name"}'
REFUSED = {"code": -1, "message": "The user refused"}

Seen = dict[str, Any]


class Flow:
    """A call whose client is asked, and what both sides must see of it, by the eras of client and server."""

    def __init__(
        self,
        plan: Seen,
        expect: Seen | Callable[[str, str, str], Seen],
        *,
        journal: Callable[..., list[str]] | None = None,
    ) -> None:
        self.plan = plan
        self._expect = expect
        self.journal = journal

    def expected(self, client: str, server: str, tag: str) -> Seen:
        return self._expect(client, server, tag) if callable(self._expect) else self._expect


def call(tool: str, **more: Any) -> Seen:
    return {"do": "call", "name": tool, **more}


def ok(text: str, *asked: Seen) -> Seen:
    return {"text": text, "isError": False, "asked": list(asked)}


def refused(kind: str, method: str) -> Callable[[str, str, str], Seen]:
    """The client answers a question with an error: a modern one ends its call by itself, for a legacy one the server
    is told, or the gateway ends the call (4.3, rule 3)."""

    def expect(client: str, server: str, tag: str) -> Seen:
        if client == "modern":
            return {"error": REFUSED}
        if server == "legacy":
            return {"text": f"{kind} error -1: The user refused", "isError": True}
        if kind == "form":
            return {"text": "form cancel", "isError": False}
        return {"text": f"The client refused {method}: The user refused", "isError": True}

    return expect


def page(client: str, tag: str) -> Seen:
    # Only 2025-11-25 has ids of elicitations: the gateway strips a server's and mints what is missing.
    return {"kind": "url", "url": f"https://example.com/consent/{tag}", "id": client == "legacy"}


def opened(action: str) -> Callable[[str, str, str], Seen]:
    return lambda client, server, tag: ok(f"url {action}", page(client, tag))


def rounds(count: int) -> Callable[[str, str, str], Seen]:
    def expect(client: str, server: str, tag: str) -> Seen:
        questions = [
            {"kind": "form", "message": f"Question {n}?", "properties": ["answer"]} for n in range(1, count + 1)
        ]
        seen = ok("; ".join(['form accept {"answer": "my answer"}'] * count), *questions)
        told = [[n, f"before question {n}"] for n in range(1, count + 1)]
        logs = [f"before question {n}" for n in range(1, count + 1)]
        if server == "legacy":
            # Once each, in whichever request the client waits by then.
            return {**seen, "progress": told, "logs": logs}
        # A modern server starts over in each round; a legacy client must only ever see progress rise, and it has set
        # no log level, without which a modern server logs nothing.
        return {**seen, "progress": told, "logs": []} if client == "legacy" else seen

    return expect


def too_many(client: str, server: str, tag: str) -> Seen:
    if client == "modern":
        return {"error": {"code": 0}}  # its own: InputRequiredRoundsExceededError
    if server == "legacy":
        return {"isError": False}
    # The stdio proxy of one server has errors of its own shape.
    return {"error": {"code": -32000}} if "-stdio-" in tag else {"isError": True}


def several(client: str, server: str, tag: str) -> Seen:
    asked = [FORM, {"kind": "roots"}, {"kind": "sample", "texts": ["Say something"]}, page(client, tag)]
    return ok(f"{NAMED}; url accept; sample sampled Say something; roots file:///mine", *asked)


def several_mixed(client: str, server: str, tag: str) -> Seen:
    asked = [FORM, {"kind": "roots"}, {"kind": "sample", "texts": ["Say something"]}, page(client, tag)]
    return ok("form decline; url cancel; sample sampled Say something; roots file:///mine", *asked)


def consented(client: str, server: str, tag: str) -> Seen:
    if client == server == "legacy":
        return {"error": {"code": -32042}}
    return ok("consented", page(client, tag))


def declared(client: str, server: str, tag: str) -> Seen:
    # rule 7 of 4.2, rule 1 of 4.3
    roots = {"listChanged": True} if client == server else {}
    if client == "modern" and server == "legacy":
        roots = {"listChanged": True}
    capabilities = {"elicitation": {"form": {}, "url": {}}, "roots": roots, "sampling": {"tools": {}}}
    version = MODERN if server == "modern" else "2025-11-25"
    return ok(json.dumps({"capabilities": capabilities, "version": version}, sort_keys=True))


TOOLS_ASKED = [
    {"kind": "sample", "texts": ["What is 2 + 3?"], "tools": ["add"]},
    {"kind": "sample", "texts": ["tool_result 5"], "tools": ["add"]},
]
FLOWS: dict[str, Flow] = {
    "declared": Flow(call("whoami"), declared),
    "form": Flow(call("form_tool"), ok(NAMED, FORM)),
    "form-decline": Flow(call("form_tool", answers={"form": "decline"}), ok("form decline", FORM)),
    "form-cancel": Flow(call("form_tool", answers={"form": "cancel"}), ok("form cancel", FORM)),
    "url": Flow(call("url_tool"), opened("accept")),
    "url-decline": Flow(call("url_tool", answers={"url": "decline"}), opened("decline")),
    "url-cancel": Flow(call("url_tool", answers={"url": "cancel"}), opened("cancel")),
    "url-required": Flow(call("consent"), consented),
    "sampling": Flow(
        call("sample_tool"), ok("sample sampled Say something", {"kind": "sample", "texts": ["Say something"]})
    ),
    "sampling-tools": Flow(call("sample_with_tools"), ok("sample sampled tool_result 5", *TOOLS_ASKED)),
    "roots": Flow(call("roots_tool"), ok("roots file:///mine", {"kind": "roots"})),
    "several": Flow(call("several"), several),
    "several-mixed": Flow(call("several", answers={"form": "decline", "url": "cancel"}), several_mixed),
    "rounds": Flow(call("rounds", count=3), rounds(3)),
    "rounds-10": Flow(call("rounds", count=10), rounds(10)),
    "state-only": Flow(call("state_only"), ok("done")),
    "prompt": Flow(
        {"do": "prompt", "name": "asking"},
        {
            "text": 'form accept {"topic": "my topic"}',
            "asked": [{"kind": "form", "message": "What about?", "properties": ["topic"]}],
        },
    ),
    "resource": Flow(
        {"do": "read", "name": "ask://it"},
        {
            "text": 'form accept {"reason": "my reason"}',
            "asked": [{"kind": "form", "message": "May it be read?", "properties": ["reason"]}],
        },
    ),
    "cancel-working": Flow(
        call("hang", cancel="progress"),
        {"cancelled": True, "asked": [FORM]},
        journal=lambda client, server: [
            "start",
            *(["asked", "start"] if server == "modern" else []),
            f"told {NAMED}",
            "working",
            "cancelled",
        ],
    ),
    "after-cancel": Flow(call("form_tool"), ok(NAMED, FORM)),
    # Below: what may leave a parked call behind, since a modern client does not say that it will not come back.
    "form-error": Flow(call("form_tool", answers={"form": "error"}), refused("form", "elicitation/create")),
    "sampling-error": Flow(
        call("sample_tool", answers={"sample": "error"}), refused("sample", "sampling/createMessage")
    ),
    "roots-error": Flow(call("roots_tool", answers={"roots": "error"}), refused("roots", "roots/list")),
    "rounds-11": Flow(call("rounds", count=11), too_many),
    "cancel-asked": Flow(
        call("hang", cancel="asked", answers={"form": "silence"}),
        {"cancelled": True, "asked": [FORM]},
        # What becomes of a call that a modern client leaves parked is told below.
        journal=lambda client, server: (
            ["start", "asked"] if server == "modern" else ["start", "cancelled"] if client == "legacy" else ["start"]
        ),
    ),
    "after-all": Flow(call("form_tool"), ok(NAMED, FORM)),
    "several-after-all": Flow(call("several"), several),
}


# ------------------------------------------------------------------------------------------------------------ parts
class Parts:
    """The SDK's interpreter, the asking servers over HTTP, and the gateway in front of all of them."""

    def __init__(self, python: str, folder: Path, pyz: Path) -> None:
        self.python, self.folder, self.pyz = python, folder, pyz
        self.journal = folder / "journal"
        self.journal.touch()
        self.processes: list[subprocess.Popen[bytes]] = []

    def argv(self, *more: str) -> list[str]:
        return [self.python, str(SERVER), "--journal", str(self.journal), *more]

    def http_server(self, era: str) -> str:
        """Start an asking server on a port: its URL."""
        process = subprocess.Popen(self.argv("--era", era, "--http", "0"), stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}/mcp"

    def entry(self, id: str, *arguments: str, **more: Any) -> dict[str, Any]:
        program, *rest = self.argv(*arguments)
        runtime = {"type": "local-process", "command": program, "args": rest}
        return {"id": id, "isolation": "session", "runtime": runtime, **more}

    def remote(self, id: str, url: str, **more: Any) -> dict[str, Any]:
        runtime = {"type": "remote-http", "url": url, "allow_private": True}
        return {"id": id, "isolation": "session", "runtime": runtime, **more}

    def drive(self, mode: str, target: list[str], flows: list[Seen], **more: Any) -> list[Seen]:
        """What a client of the SDK saw."""
        plan = {"mode": mode, "target": target, "flows": flows, **more}
        done = subprocess.run(
            [self.python, str(DRIVER)], input=json.dumps(plan), capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        return list(json.loads(done.stdout)["flows"])

    def events_of(self, tag: str) -> list[str]:
        """What the servers wrote about one tag."""
        lines = self.journal.read_text().splitlines()
        return [line.removeprefix(f"{tag} ") for line in lines if line.startswith(f"{tag} ")]

    def wait_for(self, tag: str, event: str, seconds: float = 10) -> list[str]:
        """The events of a tag, once the given one is among them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.events_of(tag)
            if event in found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{tag} has no {event!r}: {self.events_of(tag)}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="module")
def parts(real_part: Part, gateway_pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    made = Parts(str(real_part("py/sdk") / "bin" / "python"), tmp_path_factory.mktemp("asking"), gateway_pyz)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def running(parts: Parts, name: str, entries: list[dict[str, Any]], **config: Any) -> Iterator[RunningGateway]:
    folder = parts.folder / name
    folder.mkdir()
    with RunningGateway(folder, entries, config=config, pyz=parts.pyz) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def gateway(parts: Parts) -> Iterator[RunningGateway]:
    entries = [
        parts.entry("legacy-pipe", "--era", "legacy"),
        parts.entry("modern-pipe", "--era", "modern"),
        parts.remote("legacy-http", parts.http_server("legacy")),
        parts.remote("modern-http", parts.http_server("modern")),
    ]
    with running(parts, "flows", entries) as made:
        yield made


def target(parts: Parts, gateway: RunningGateway, front: str, server: str) -> list[str]:
    if front == "http":
        return ["http", f"http://127.0.0.1:{gateway.port}/servers/{server}/mcp"]
    if front == "merged":
        return ["http", f"http://127.0.0.1:{gateway.port}/mcp"]
    return ["stdio", sys.executable, str(parts.pyz), "stdio", "--server", server, "--catalog", str(gateway.catalog)]


def tagged(flow: Seen, tag: str, prefix: str = "") -> Seen:
    """A flow's plan with the tag, and its other arguments, in their place."""
    plan = copy.deepcopy(flow)
    count = plan.pop("count", None)
    if plan["do"] == "call":
        plan["arguments"] = {"tag": tag, **({"count": count} if count else {})}
    elif plan["do"] == "prompt":
        plan["arguments"] = {"tag": tag}
    if plan["do"] != "read":
        plan["name"] = prefix + plan["name"]
    return {"seconds": 15, **plan}


COMBINATIONS = [
    (front, client, server)
    for front in ("http", "stdio")
    for client in ("legacy", "modern")
    for server in ("legacy-pipe", "modern-pipe", "legacy-http", "modern-http")
]


@pytest.fixture(scope="module")
def driven(parts: Parts, gateway: RunningGateway) -> Callable[[str, str, str], dict[str, Seen]]:
    """All flows through one client, driven once for each combination."""
    known: dict[tuple[str, str, str], dict[str, Seen]] = {}

    def drive(front: str, client: str, server: str) -> dict[str, Seen]:
        key = (front, client, server)
        if key not in known:
            plans = [tagged(flow.plan, f"{name}-{front}-{client}-{server}") for name, flow in FLOWS.items()]
            mode = "legacy" if client == "legacy" else MODERN
            seen = parts.drive(mode, target(parts, gateway, front, server), plans)
            known[key] = dict(zip(FLOWS, seen, strict=True))
        return known[key]

    return drive


def check(flow: Flow, seen: Seen, client: str, server: str, tag: str) -> None:
    expected = flow.expected(client, server, tag)
    expected = dict(expected)
    error = expected.pop("error", None)
    if error is not None:
        assert "error" in seen, seen
        assert {name: seen["error"][name] for name in error} == error, seen
    else:
        assert "error" not in seen, seen
    assert not seen.get("late"), seen
    asked = expected.pop("asked", None)
    if asked is not None:
        key = json.dumps
        # Questions of one round may be put in any order.
        assert sorted(seen["asked"], key=key) == sorted(asked, key=key), seen
    assert {name: seen.get(name) for name in expected} == expected, seen


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(("front", "client", "server"), COMBINATIONS)
def test_B2_flow(
    front: str, client: str, server: str, name: str, driven: Callable[..., dict[str, Seen]], parts: Parts
) -> None:
    flow = FLOWS[name]
    tag = f"{name}-{front}-{client}-{server}"
    era = server.partition("-")[0]
    check(flow, driven(front, client, server)[name], client, era, tag)
    if flow.journal is not None:
        wanted = flow.journal(client, era)
        assert parts.wait_for(tag, wanted[-1])[: len(wanted)] == wanted


@pytest.mark.parametrize("client", ["legacy", "modern"])
@pytest.mark.parametrize("server", ["legacy-pipe", "modern-pipe"])
def test_B2_flow_at_the_merged_endpoint(client: str, server: str, parts: Parts, gateway: RunningGateway) -> None:
    names = ["form", "url", "sampling-tools", "several", "rounds", "prompt", "resource"]
    plans = [tagged(FLOWS[n].plan, f"{n}-merged-{client}-{server}", f"{server}__") for n in names]
    mode = "legacy" if client == "legacy" else MODERN
    for name, seen in zip(names, parts.drive(mode, target(parts, gateway, "merged", server), plans), strict=True):
        check(FLOWS[name], seen, client, server.partition("-")[0], f"{name}-merged-{client}-{server}")


# ---------------------------------------------------------------------------------------------------------- raw clients
FORM_ANSWER = {"action": "accept", "content": {"name": "Ann"}}
ALL = {"elicitation": {"form": {}, "url": {}}, "sampling": {"tools": {}}, "roots": {}}
KEYS = {"a": "key-of-tenant-a", "b": "key-of-tenant-b"}
TENANTS = [{"id": id, "api_key": key, "namespaces": ["default"]} for id, key in KEYS.items()]
LEGACY = ["legacy-pipe", "legacy-http"]


def context(capabilities: Seen, **more: Any) -> Seen:
    return {
        f"{META}protocolVersion": MODERN,
        f"{META}clientInfo": {"name": "raw", "version": "1"},
        f"{META}clientCapabilities": capabilities,
        **more,
    }


class Raw:
    """A modern client over HTTP that says exactly what a test wants."""

    def __init__(
        self, gateway: RunningGateway, server: str = "", *, tenant: str = "", capabilities: Seen | None = None
    ) -> None:
        self.gateway = gateway
        self.path = f"/servers/{server}/mcp" if server else "/mcp"
        self.modern = server.startswith("modern")
        self.key = {"Authorization": f"Bearer {KEYS[tenant]}"} if tenant else {}
        self.capabilities = ALL if capabilities is None else capabilities
        self.events: list[Seen] = []

    def headers(self, method: str, params: Seen) -> dict[str, str]:
        name = params.get("name", params.get("uri"))
        named = {"Mcp-Name": name} if name is not None else {}
        return {**self.key, "MCP-Protocol-Version": MODERN, "Mcp-Method": method, **named}

    def body(self, method: str, params: Seen, id: Any = 1, token: Any = None) -> Seen:
        meta = context(self.capabilities, **({} if token is None else {"progressToken": token}))
        return {"jsonrpc": "2.0", "id": id, "method": method, "params": {**params, "_meta": meta}}

    def post(self, method: str, params: Seen, id: Any = 1, token: Any = None) -> tuple[int, Seen]:
        """Status and reply; what came before it is in ``events``."""
        status, headers, data = self.gateway.http(
            "POST", self.path, self.body(method, params, id, token), self.headers(method, params)
        )
        if "json" in headers["content-type"]:
            self.events = []
            return status, dict(json.loads(data))
        *self.events, reply = events(data)
        assert reply["id"] == id, reply
        return status, reply

    def call(self, tool: str, tag: str, arguments: Seen | None = None, **more: Any) -> Seen:
        """The result of a tools/call that is answered with one."""
        params = {"name": tool, "arguments": {"tag": tag, **(arguments or {})}}
        token = more.pop("token", None)
        status, reply = self.post("tools/call", {**params, **more}, token=token)
        assert status == 200 and "result" in reply, (status, reply)
        return dict(reply["result"])

    def refused(self, tool: str, tag: str, arguments: Seen | None = None, **more: Any) -> Seen:
        """The error of a tools/call that is refused as params which do not fit."""
        params = {"name": tool, "arguments": {"tag": tag, **(arguments or {})}, **more}
        return self.refused_as("tools/call", params)

    def refused_as(self, method: str, params: Seen) -> Seen:
        status, reply = self.post(method, params, id="r-7")
        assert status == 400 and reply["id"] == "r-7", (status, reply)
        assert reply["error"]["code"] == -32602, reply
        return dict(reply["error"])

    def park(self, tool: str, tag: str, arguments: Seen | None = None, **more: Any) -> tuple[dict[str, Seen], str]:
        """Questions and state of a call that is answered with input_required."""
        result = self.call(tool, tag, arguments, **more)
        assert result["resultType"] == "input_required", result
        assert result["_meta"][f"{META}serverInfo"]["name"] == "open-mcp-gateway", result
        return dict(result["inputRequests"]), str(result.get("requestState", ""))

    def in_rounds(self, tag: str, count: Seen) -> tuple[Seen, str]:
        """Answers and state for the next request of a call of the tool "rounds" that waits for it."""
        questions, state = self.park("rounds", tag, count)
        if self.modern:  # its first question has no state
            assert not state
            answers = {key: answer_to(question) for key, question in questions.items()}
            questions, state = self.park("rounds", tag, count, inputResponses=answers)
        return {key: answer_to(question) for key, question in questions.items()}, state


def answer_to(question: Seen, name: str = "Ann") -> Seen:
    method, params = question["method"], question.get("params", {})
    if method == "roots/list":
        return {"roots": [{"uri": "file:///mine"}]}
    if method == "sampling/createMessage":
        return {"role": "assistant", "model": "m", "content": {"type": "text", "text": "sampled"}}
    if params.get("mode") == "url":
        return {"action": "accept"}
    return {"action": "accept", "content": dict.fromkeys(params["requestedSchema"]["properties"], name)}


def text_of(result: Seen) -> str:
    assert result["resultType"] == "complete", result
    return str(result["content"][0]["text"])


@pytest.fixture(scope="module")
def guarded(parts: Parts) -> Iterator[RunningGateway]:
    """Two tenants on servers of both eras."""
    entries = [
        parts.entry("legacy-pipe", "--era", "legacy"),
        parts.entry("modern-pipe", "--era", "modern"),
        parts.entry("other-pipe", "--era", "legacy"),
        parts.remote("legacy-http", parts.http_server("legacy")),
        parts.remote("modern-http", parts.http_server("modern")),
    ]
    with running(parts, "guarded", entries, tenants=TENANTS) as made:
        yield made


@pytest.fixture
def tag(request: pytest.FixtureRequest) -> str:
    """What one test's executions are called in the journal."""
    return str(request.node.name).removeprefix("test_B2_")


@pytest.mark.parametrize("server", LEGACY)
def test_B2_a_parked_call_answers_input_required_and_ends_in_the_retry(
    server: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    raw = Raw(guarded, server, tenant="a")
    questions, state = raw.park("several", tag)
    kinds = sorted((q["method"], q["params"].get("mode", "")) for q in questions.values())
    assert kinds == [
        ("elicitation/create", "form"),
        ("elicitation/create", "url"),
        ("roots/list", ""),
        ("sampling/createMessage", ""),
    ]
    assert "elicitationId" not in json.dumps(questions)
    assert state.isascii() and " " not in state
    assert parts.events_of(tag) == ["start"], "the call stays open"
    answers = {key: answer_to(question) for key, question in questions.items()}
    done = raw.call("several", tag, inputResponses=answers, requestState=state)
    assert text_of(done) == 'form accept {"name": "Ann"}; url accept; sample sampled; roots file:///mine'
    assert parts.events_of(tag).count("start") == 1


@pytest.mark.parametrize("server", LEGACY)
def test_B2_a_missing_answer_is_asked_for_again_and_a_needless_one_ignored(
    server: str, guarded: RunningGateway, tag: str
) -> None:
    raw = Raw(guarded, server, tenant="a")
    questions, state = raw.park("several", tag)
    form = next(key for key, q in questions.items() if q.get("params", {}).get("mode") == "form")
    answers = {form: FORM_ANSWER, "never-asked": FORM_ANSWER}
    again, later = raw.park("several", tag, inputResponses=answers, requestState=state)
    assert {json.dumps(q, sort_keys=True) for q in again.values()} == {
        json.dumps(q, sort_keys=True) for key, q in questions.items() if key != form
    }
    raw.refused("several", tag, inputResponses=answers, requestState=state)
    rest = {key: answer_to(question) for key, question in again.items()}
    assert text_of(raw.call("several", tag, inputResponses=rest, requestState=later)).startswith(
        'form accept {"name": "Ann"}; url accept'
    )


def spoilt(state: str) -> list[Any]:
    """A state with one character changed here and there, cut, lengthened, or something else altogether."""
    changed = []
    for at in (0, 1, len(state) // 3, len(state) // 2, len(state) - 20, len(state) - 1):
        other = "A" if state[at] != "A" else "B"
        changed.append(state[:at] + other + state[at + 1 :])
    body, _, mac = state.partition(".")
    return [*changed, state[:-1], state + "A", state + "=", body, f"{body}.", f".{mac}", f"{mac}.{body}", "x", "é", "."]


@pytest.mark.parametrize("server", [*LEGACY, "modern-pipe", "modern-http"])
def test_B2_tampered_state_is_refused_and_the_genuine_one_still_works(
    server: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    raw = Raw(guarded, server, tenant="a")
    count = {"count": 2}
    answers, state = raw.in_rounds(tag, count)
    before = parts.events_of(tag)
    for other in spoilt(state):
        raw.refused("rounds", tag, count, inputResponses=answers, requestState=other)
    assert parts.events_of(tag) == before, "nothing is run for them"
    result = raw.call("rounds", tag, count, inputResponses=answers, requestState=state)
    if server.startswith("legacy"):
        assert result["resultType"] == "input_required"
        answers = {key: answer_to(question) for key, question in result["inputRequests"].items()}
        result = raw.call("rounds", tag, count, inputResponses=answers, requestState=result["requestState"])
    assert text_of(result) == 'form accept {"answer": "Ann"}; form accept {"answer": "Ann"}'


@pytest.mark.parametrize("server", LEGACY)
def test_B2_replayed_state_is_refused_and_runs_nothing(
    server: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    raw = Raw(guarded, server, tenant="a")
    questions, state = raw.park("form_tool", tag)
    more = {"inputResponses": dict.fromkeys(questions, FORM_ANSWER), "requestState": state}
    assert text_of(raw.call("form_tool", tag, **more)) == 'form accept {"name": "Ann"}'
    for _ in range(2):
        assert "start the call again" in raw.refused("form_tool", tag, **more)["message"]
    assert parts.events_of(tag).count("start") == 1


@pytest.mark.parametrize("server", [*LEGACY, "modern-pipe", "modern-http"])
def test_B2_foreign_state_is_refused(server: str, guarded: RunningGateway, parts: Parts, tag: str) -> None:
    mine, other = Raw(guarded, server, tenant="a"), Raw(guarded, server, tenant="b")
    count = {"count": 2}
    answers, state = mine.in_rounds(tag, count)
    before = parts.events_of(tag)
    more = {"inputResponses": answers, "requestState": state}
    other.refused("rounds", tag, count, **more)
    assert parts.events_of(tag) == before
    result = mine.call("rounds", tag, count, **more)
    assert result["resultType"] == ("complete" if server.startswith("modern") else "input_required")


@pytest.mark.parametrize("server", ["legacy-pipe", "modern-pipe"])
def test_B2_a_state_is_of_no_use_for_any_other_call(
    server: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    raw = Raw(guarded, server, tenant="a")
    count = {"count": 2}
    answers, state = raw.in_rounds(tag, count)
    before = parts.events_of(tag)
    more = {"inputResponses": answers, "requestState": state}
    raw.refused("rounds", tag, {"count": 3}, **more)
    raw.refused("rounds", f"{tag}-2", count, **more)
    raw.refused("form_tool", tag, count, **more)
    raw.refused_as("prompts/get", {"name": "rounds", "arguments": {"tag": tag, **count}, **more})
    raw.refused_as("resources/read", {"uri": "ask://it", **more})
    Raw(guarded, "other-pipe", tenant="a").refused("rounds", tag, count, **more)
    Raw(guarded, tenant="a").refused(f"{server}__rounds", tag, count, **more)
    assert parts.events_of(tag) == before
    assert parts.events_of(f"{tag}-2") == []
    assert raw.call("rounds", tag, count, **more)["resultType"] in ("complete", "input_required")


@pytest.mark.parametrize("server", LEGACY)
def test_B2_calls_parked_at_the_same_time_get_their_own_answers(server: str, guarded: RunningGateway, tag: str) -> None:
    raw = Raw(guarded, server, tenant="b")
    parked = {n: raw.park("form_tool", f"{tag}-{n}") for n in range(5)}
    for n in (3, 0, 4, 1, 2):
        questions, state = parked[n]
        (key,) = questions
        answers = {key: answer_to(questions[key], f"user {n}")}
        done = raw.call("form_tool", f"{tag}-{n}", inputResponses=answers, requestState=state)
        assert text_of(done) == f'form accept {{"name": "user {n}"}}'


@pytest.mark.parametrize("server", LEGACY)
def test_B2_progress_goes_on_under_the_token_of_the_retry(server: str, guarded: RunningGateway, tag: str) -> None:
    raw = Raw(guarded, server, tenant="b")
    tokens: list[Any] = [7, "7", "later"]
    more: Seen = {}
    for number, token in enumerate(tokens, 1):
        result = raw.call("rounds", tag, {"count": 2}, token=token, **more)
        seen = [
            (type(m["params"]["progressToken"]), m["params"]["progressToken"], m["params"]["progress"])
            for m in raw.events
            if m["method"] == "notifications/progress"
        ]
        assert seen == ([(type(token), token, number)] if number < 3 else []), seen
        if number < 3:
            answers = {key: answer_to(question) for key, question in result["inputRequests"].items()}
            more = {"inputResponses": answers, "requestState": result["requestState"]}
    assert text_of(result) == 'form accept {"answer": "Ann"}; form accept {"answer": "Ann"}'


@pytest.mark.parametrize("server", LEGACY)
def test_B2_a_client_that_hangs_up_in_the_retry_has_cancelled(
    server: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    import http.client

    raw = Raw(guarded, server, tenant="a")
    questions, state = raw.park("hang", tag)
    more = {"inputResponses": dict.fromkeys(questions, FORM_ANSWER), "requestState": state}
    params = {"name": "hang", "arguments": {"tag": tag}, **more}
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port)
    headers = {"Accept": ACCEPT, "Content-Type": "application/json", **raw.headers("tools/call", params)}
    connection.request("POST", raw.path, json.dumps(raw.body("tools/call", params)), headers)
    parts.wait_for(tag, "working")
    raw.refused("hang", tag, **more)  # the state is used up, though the call goes on
    connection.close()
    parts.wait_for(tag, "cancelled")
    raw.refused("hang", tag, **more)


def test_B2_a_state_does_not_outlive_its_gateway(parts: Parts, guarded: RunningGateway, tag: str) -> None:
    questions, state = Raw(guarded, "legacy-pipe", tenant="a").park("form_tool", tag)
    more = {"inputResponses": dict.fromkeys(questions, FORM_ANSWER), "requestState": state}
    entries = [parts.entry("legacy-pipe", "--era", "legacy")]
    with running(parts, "restarted", entries, tenants=TENANTS) as other:
        Raw(other, "legacy-pipe", tenant="a").refused("form_tool", tag, **more)
    assert parts.events_of(tag) == ["start"]


def test_B2_states_over_stdio(parts: Parts, guarded: RunningGateway, tag: str) -> None:
    raw = Raw(guarded)
    argv = target(parts, guarded, "stdio", "legacy-pipe")[1:]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None

    def ask(id: int, **more: Any) -> Seen:
        body = raw.body("tools/call", {"name": "form_tool", "arguments": {"tag": tag}, **more}, id)
        process.stdin.write(json.dumps(body).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        assert reply["id"] == id
        return dict(reply)

    try:
        result = ask(1)["result"]
        state, answers = result["requestState"], dict.fromkeys(result["inputRequests"], FORM_ANSWER)
        for number, other in enumerate(spoilt(state), 2):
            assert ask(number, inputResponses=answers, requestState=other)["error"]["code"] == -32602
        done = ask(100, inputResponses=answers, requestState=state)["result"]
        assert text_of(done) == 'form accept {"name": "Ann"}'
        assert ask(101, inputResponses=answers, requestState=state)["error"]["code"] == -32602
        assert parts.events_of(tag).count("start") == 1
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


# ------------------------------------------------------------------------------------------------ parks that are lost
WIRE = """
import json, os, sys
# A legacy server that asks what it is told to ask, all at once, and writes down every line it gets.
log = open(sys.argv[1], "a", buffering=1)
log.write(json.dumps({"pid": os.getpid()}) + "\\n")
def send(**m):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **m}) + "\\n")
    sys.stdout.flush()
waiting = {}
for line in sys.stdin:
    m = json.loads(line)
    log.write(line)
    if m.get("method") == "initialize":
        send(id=m["id"], result={"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
                                 "serverInfo": {"name": "w", "version": "1"}})
    elif m.get("method") == "tools/list":
        send(id=m["id"], result={"tools": [{"name": "ask", "inputSchema": {"type": "object"}}]})
    elif m.get("method") == "tools/call":
        for n, (method, params) in enumerate(m["params"]["arguments"]["ask"]):
            send(id=f"q{m['id']}-{n}", method=method, params=params)
    elif "method" in m and "id" in m:
        send(id=m["id"], error={"code": -32601, "message": "no"})
"""
QUESTIONS: list[Any] = [
    ["elicitation/create", {"message": "Who?", "requestedSchema": {"type": "object", "properties": {}}}],
    ["sampling/createMessage", {"messages": [], "maxTokens": 1}],
    ["roots/list", {}],
]


class Wire:
    """A scripted legacy server behind a gateway that parks calls for a second."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "wire.log"
        self.script = folder / "wire.py"
        self.script.write_text(WIRE)

    def entry(self, **more: Any) -> dict[str, Any]:
        runtime = {"type": "local-process", "command": sys.executable}
        arguments = ["-E", "-s", str(self.script), str(self.log)]
        return {
            "id": "wire",
            "isolation": "session",
            "era": "legacy",
            "runtime": {**runtime, "args": arguments},
            **more,
        }

    def got(self) -> list[Seen]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for(self, what: Callable[[Seen], bool], seconds: float = 10) -> list[Seen]:
        """Everything it has got, once something of that kind is among it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if any(what(message) for message in self.got()):
                return self.got()
            time.sleep(0.02)
        raise AssertionError(self.got())

    def calls(self) -> int:
        return sum(message.get("method") == "tools/call" for message in self.got())


def test_B2_a_park_that_expires_is_declined_then_cancelled_and_can_not_be_resumed(parts: Parts, tmp_path: Path) -> None:
    wire = Wire(tmp_path)
    with running(parts, "expiring", [wire.entry()], park_timeout_seconds=1) as made:
        raw = Raw(made, "wire")
        arguments = {"ask": QUESTIONS}
        questions, state = raw.park("ask", "", arguments)
        got = wire.wait_for(lambda m: m.get("method") == "notifications/cancelled")
        (call_id,) = [m["id"] for m in got if m.get("method") == "tools/call"]
        answers = {m["id"]: m for m in got if "method" not in m and "id" in m}
        assert answers[f"q{call_id}-0"]["result"] == {"action": "cancel"}
        assert answers[f"q{call_id}-1"]["error"]["code"] == -1
        assert answers[f"q{call_id}-2"]["error"]["code"] == -32601
        assert got[-1]["method"] == "notifications/cancelled"
        assert got[-1]["params"]["requestId"] == call_id
        more = {"inputResponses": {k: answer_to(q) for k, q in questions.items()}, "requestState": state}
        assert "start the call again" in raw.refused("ask", "", arguments, **more)["message"]
        assert wire.calls() == 1
        # The server is asked again by a call that starts again.
        raw.park("ask", "", arguments)
        assert wire.calls() == 2


def test_B2_a_park_whose_server_ends_is_lost_and_nothing_is_run_again(parts: Parts, tmp_path: Path) -> None:
    wire = Wire(tmp_path)
    with running(parts, "dying", [wire.entry()]) as made:
        raw = Raw(made, "wire")
        arguments = {"ask": QUESTIONS[:1]}
        questions, state = raw.park("ask", "", arguments)
        os.kill(wire.got()[0]["pid"], signal.SIGKILL)
        made.wait_for_line("ended")
        more = {"inputResponses": dict.fromkeys(questions, FORM_ANSWER), "requestState": state}
        params = {"name": "ask", "arguments": {"tag": "", **arguments}, **more}
        status, reply = raw.post("tools/call", params)
        if status == 200:
            assert reply["result"]["isError"] and "ended" in reply["result"]["content"][0]["text"], reply
        else:
            assert (status, reply["error"]["code"]) == (400, -32602), reply
        raw.refused("ask", "", arguments, **more)
        assert wire.calls() == 1


def test_B2_one_principal_can_not_take_all_places_for_parked_calls(parts: Parts, tmp_path: Path) -> None:
    wire = Wire(tmp_path)
    config = {"max_parked": 8, "tenants": TENANTS}
    with running(parts, "crowded", [wire.entry(max_connections_per_server=50)], **config) as made:
        greedy, modest = Raw(made, "wire", tenant="a"), Raw(made, "wire", tenant="b")
        arguments = {"ask": QUESTIONS[:1]}
        greedy.park("ask", "1", arguments)
        greedy.park("ask", "2", arguments)
        status, reply = greedy.post("tools/call", {"name": "ask", "arguments": {"tag": "3", **arguments}})
        assert status in (200, 429, 503), (status, reply)
        assert "max_parked" in json.dumps(reply), reply
        third = wire.got()[-1] if "method" not in wire.got()[-1] else wire.got()[-2]
        assert third["result"] == {"action": "cancel"}, "its server is told that nobody answers"
        modest.park("ask", "1", arguments)


# ------------------------------------------------------------------------------------------------------------- timeouts
@pytest.fixture(scope="module")
def hasty(parts: Parts) -> Iterator[RunningGateway]:
    """A gateway whose requests may take a second, and people three."""
    entries = [
        parts.entry("legacy-pipe", "--era", "legacy"),
        parts.entry("modern-pipe", "--era", "modern"),
        parts.remote("legacy-http", parts.http_server("legacy")),
        parts.remote("modern-http", parts.http_server("modern")),
    ]
    with running(parts, "hasty", entries, request_timeout_seconds=1, park_timeout_seconds=3) as made:
        yield made


@pytest.mark.parametrize("client", ["legacy", "modern"])
@pytest.mark.parametrize("server", ["legacy-pipe", "modern-pipe", "legacy-http", "modern-http"])
def test_B2_timeout_people_may_take_longer_than_programs(
    server: str, client: str, hasty: RunningGateway, parts: Parts, tag: str
) -> None:
    flows = [
        tagged(call("quick"), f"{tag}-0"),
        tagged(call("form_tool", answers={"form": 1.5}), f"{tag}-1"),
        tagged(call("hang"), f"{tag}-2"),
        tagged(call("form_tool"), f"{tag}-3"),
    ]
    mode = "legacy" if client == "legacy" else MODERN
    _, slow, hung, after = parts.drive(mode, target(parts, hasty, "http", server), flows)
    assert slow["text"] == NAMED, slow
    assert hung["isError"], hung
    assert "did not answer within" in hung["text"], hung
    parts.wait_for(f"{tag}-2", "cancelled")
    assert after["text"] == NAMED, after


# ----------------------------------------------------------------------------------------- what nobody may be asked
RUDE = {
    "form": ({"elicitation": {"url": {}}}, {"elicitation": {"form": {}}}, "form cancel"),
    "url": ({"elicitation": {"form": {}}}, {"elicitation": {"url": {}}}, "url cancel"),
    "sample": ({"roots": {}}, {"sampling": {}}, "sample error -1"),
    "sample-tools": ({"sampling": {}}, {"sampling": {"tools": {}}}, "sample error -1"),
    "roots": ({"sampling": {}}, {"roots": {}}, "roots error -32601"),
}


@pytest.mark.parametrize("what", RUDE)
@pytest.mark.parametrize("server", [*LEGACY, "modern-pipe", "modern-http"])
def test_B2_undeclared_capability_of_a_modern_client_is_32021(
    server: str, what: str, guarded: RunningGateway, parts: Parts, tag: str
) -> None:
    declared, needed, _ = RUDE[what]
    raw = Raw(guarded, server, tenant="a", capabilities=declared)
    status, reply = raw.post("tools/call", {"name": "rude", "arguments": {"tag": tag, "what": what}})
    assert (status, reply["error"]["code"]) == (400, -32021), reply
    assert reply["error"]["data"]["requiredCapabilities"] == needed
    if server in LEGACY:
        # It was told what this client can do and asked all the same: its work is not wanted any more.
        assert parts.wait_for(tag, "cancelled")[0] == "start"
    elif what == "form":  # {} declares forms, and forms only
        Raw(guarded, server, tenant="a", capabilities={"elicitation": {}}).park("rude", tag, {"what": "form"})


@pytest.mark.parametrize("server", LEGACY)
def test_B2_url_required_without_the_capability_is_32021(server: str, guarded: RunningGateway, tag: str) -> None:
    raw = Raw(guarded, server, tenant="a", capabilities={"elicitation": {"form": {}}})
    status, reply = raw.post("tools/call", {"name": "consent", "arguments": {"tag": tag}})
    assert (status, reply["error"]["code"]) == (400, -32021), reply
    assert reply["error"]["data"]["requiredCapabilities"] == {"elicitation": {"url": {}}}


@pytest.mark.parametrize("server", LEGACY)
def test_B2_url_required_parks_nothing(server: str, guarded: RunningGateway, parts: Parts, tag: str) -> None:
    raw = Raw(guarded, server, tenant="b")
    questions, state = raw.park("consent", tag)
    (question,) = questions.values()
    assert question["params"] == {
        "mode": "url",
        "message": "Please consent",
        "url": f"https://example.com/consent/{tag}",
    }
    assert state == ""
    answers = {key: {"action": "accept"} for key in questions}
    assert text_of(raw.call("consent", tag, inputResponses=answers)) == "consented"
    assert parts.events_of(tag).count("start") == 2


@pytest.mark.parametrize("what", RUDE)
@pytest.mark.parametrize("server", ["modern-pipe", "modern-http"])
def test_B2_undeclared_capability_of_a_legacy_client_ends_the_call(
    server: str, what: str, gateway: RunningGateway, parts: Parts, tag: str
) -> None:
    # The SDK can't declare one kind of elicitation only, so these clients declare none at all.
    declare = ["sampling"] if what in ("sample-tools", "roots") else ["roots"]
    flow = tagged(call("rude"), tag)
    flow["arguments"]["what"] = what
    (seen,) = parts.drive("legacy", target(parts, gateway, "http", server), [flow], declare=declare)
    assert seen["isError"], seen
    assert {"sample": "sampling", "sample-tools": "tools", "roots": "roots"}.get(what, "elicitation") in seen["text"]
    assert seen["asked"] == []


@pytest.fixture(scope="module")
def shared(parts: Parts) -> Iterator[RunningGateway]:
    entries = [
        parts.entry("legacy-pipe", "--era", "legacy", isolation="shared"),
        parts.entry("modern-pipe", "--era", "modern", isolation="shared"),
        parts.remote("legacy-http", parts.http_server("legacy"), isolation="shared"),
        parts.remote("modern-http", parts.http_server("modern"), isolation="shared"),
        parts.entry("nosy", "--era", "legacy", "--nosy"),
    ]
    with running(parts, "shared", entries) as made:
        yield made


@pytest.mark.parametrize("client", ["legacy", "modern"])
@pytest.mark.parametrize("server", LEGACY)
def test_B2_a_shared_legacy_server_is_told_of_no_capability_and_may_ask_nobody(
    server: str, client: str, shared: RunningGateway, parts: Parts, tag: str
) -> None:
    flows = [tagged(call("whoami"), tag)]
    for what in RUDE:
        flow = tagged(call("rude"), f"{tag}-{what}")
        flow["arguments"]["what"] = what
        flows.append(flow)
    mode = "legacy" if client == "legacy" else MODERN
    who, *rude = parts.drive(mode, target(parts, shared, "http", server), flows)
    assert json.loads(who["text"])["capabilities"] == {}
    for what, seen in zip(RUDE, rude, strict=True):
        assert seen["text"].startswith(RUDE[what][2]), seen
        assert seen["asked"] == []


@pytest.mark.parametrize("client", ["legacy", "modern"])
@pytest.mark.parametrize("server", ["modern-pipe", "modern-http"])
def test_B2_a_shared_modern_server_asks_each_client_by_itself(
    server: str, client: str, shared: RunningGateway, parts: Parts, tag: str
) -> None:
    names = ["declared", "form", "url", "sampling-tools", "roots", "several", "rounds"]
    mode = "legacy" if client == "legacy" else MODERN
    plans = [tagged(FLOWS[n].plan, f"{n}-{tag}") for n in names]
    for name, seen in zip(names, parts.drive(mode, target(parts, shared, "http", server), plans), strict=True):
        check(FLOWS[name], seen, client, "modern", f"{name}-{tag}")


def test_B2_questions_during_a_list_have_no_one_to_go_to(shared: RunningGateway, parts: Parts) -> None:
    plans = [{"do": "list", "name": "", "seconds": 15}, tagged(call("form_tool"), "after-the-list")]
    listed, called = parts.drive(MODERN, target(parts, shared, "http", "nosy"), plans)
    assert int(listed["text"]) > 10, listed
    assert listed["asked"] == []
    assert parts.events_of("nosy")[:3] == ["told form cancel", "told sample error -1", "told roots error -32601"]
    assert called["text"] == NAMED
