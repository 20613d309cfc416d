"""Row B4: what a client of either era is answered when something is wrong, byte by byte on raw HTTP; and row B7.

Each test is a line of the error table (protocol.md section 7), in both eras where both have it, at the merged endpoint
and at a server's own, with servers of both eras behind it.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import (
    ALL,
    META,
    MODERN,
    NEWEST,
    SERVER,
    Answer,
    House,
    Json,
    LegacyClient,
    ModernClient,
    Record,
    Reply,
    wait_until,
)
from running import ACCEPT, RunningGateway

ENDPOINTS = ("/mcp", "/servers/lpipe/mcp", "/servers/mpipe/mcp")
LEGACY_VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
VENDOR_DATA = "open-mcp-gateway/data"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A gateway in front of a good server of each era, shared and not, and of some that can't be had."""
    folder = tmp_path_factory.mktemp("wire")
    built = House(folder)
    for id, era in (("lpipe", "legacy"), ("mpipe", "modern")):
        built.pipe(id, era, "--page", "5")
        built.pipe(f"{id}own", era, isolation="session")
        built.pipe(f"{id}frail", era, request_timeout_seconds=0.4)
    with built:
        yield built


@pytest.fixture(params=ENDPOINTS, ids=["merged", "legacy_server", "modern_server"])
def place(request: pytest.FixtureRequest) -> str:
    """Where it happens."""
    return str(request.param)


@pytest.fixture
def legacy(house: House, place: str) -> Iterator[Any]:
    """A session there."""
    client = LegacyClient(house.gateway, place)
    yield client
    client.close()


@pytest.fixture
def modern(house: House, place: str) -> Any:
    """A modern client there."""
    return ModernClient(house.gateway, place)


def refused(answer: Answer, status: int, code: int, id: Any = None) -> Json:
    """An error reply: its error."""
    (message,) = answer.messages()
    assert (answer.status, message["error"]["code"]) == (status, code), message
    assert message["jsonrpc"] == "2.0" and message["id"] == id
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(message["error"]["message"], str) and message["error"]["message"]
    return dict(message["error"])


def name_at(place: str, name: str) -> str:
    """A tool's or prompt's name there."""
    return f"lpipe__{name}" if place == "/mcp" else name


def raw(gateway: RunningGateway, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> tuple[int, Json]:
    """A POST with these headers exactly, some of them twice if one likes: status and body."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", "Connection: close"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers)]) + "\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(head.encode("latin-1") + body)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    first, _, rest = data.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(rest)


# ------------------------------------------------------------------------------------------------ JSON, arrays, shapes
BROKEN = [b'{"jsonrpc": "2.0", nope', b"", b"\xff\xfe", b'{"jsonrpc":"2.0","id":1,"method":"ping"} x']


@pytest.mark.parametrize("body", BROKEN, ids=["broken", "empty", "no_utf8", "trailing"])
def test_wire_bad_json(legacy: Any, modern: Any, body: bytes) -> None:
    refused(legacy.send(body), 400, -32700)
    refused(modern.send(body, MCP_Protocol_Version=MODERN, Mcp_Method="tools/list"), 400, -32700)


def test_wire_array(house: House, place: str, legacy: Any, modern: Any) -> None:
    calls = [{"jsonrpc": "2.0", "id": n, "method": "tools/list"} for n in ("a", 2)]
    refused(legacy.send(calls), 400, -32600)
    refused(modern.send(calls, MCP_Protocol_Version=MODERN), 400, -32600)
    refused(modern.send([modern.message("tools/list")], MCP_Protocol_Version=MODERN), 400, -32600)
    refused(modern.send([modern.message("tools/list")]), 400, -32600)
    old = LegacyClient(house.gateway, place, version="2025-03-26")
    replies: Any
    (replies,) = old.send(calls).messages()
    assert {reply["id"] for reply in replies} == {"a", 2}, "that revision has batches"
    assert all("tools" in reply["result"] for reply in replies)
    refused(old.send([]), 400, -32600)
    old.close()


SHAPES: list[tuple[str, Json, Any]] = [
    ("version", {"jsonrpc": "1.0", "id": 3, "method": "tools/list"}, 3),
    ("no_version", {"id": "x", "method": "tools/list"}, "x"),
    ("method", {"jsonrpc": "2.0", "id": 3, "method": 5}, 3),
    ("no_method", {"jsonrpc": "2.0", "id": 3}, 3),
    ("null_id", {"jsonrpc": "2.0", "id": None, "method": "tools/list"}, None),
    ("object_id", {"jsonrpc": "2.0", "id": {}, "method": "tools/list"}, None),
    ("params", {"jsonrpc": "2.0", "id": 3, "method": "tools/list", "params": "p"}, 3),
]


@pytest.mark.parametrize(("message", "id"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES])
def test_wire_shape(legacy: Any, modern: Any, message: Json, id: Any) -> None:
    refused(legacy.send(message), 400, -32600, id)
    context = message if message.get("params") else {**message, "params": {"_meta": modern.meta}}
    refused(modern.send(json.dumps(context).encode(), MCP_Protocol_Version=MODERN), 400, -32600, id)


def test_wire_replies_and_notifications(legacy: Any, modern: Any) -> None:
    """Taken without a word; but a modern server has nothing that could be replied to."""
    reply = {"jsonrpc": "2.0", "id": 77, "result": {}}
    assert list(legacy.send(reply).messages()) == []
    refused(modern.send(reply, MCP_Protocol_Version=MODERN, Mcp_Method=None), 400, -32600, 77)
    for client in (legacy, modern):
        client.notify("notifications/whatever", {"x": 1})


# --------------------------------------------------------------------------------------- Accept, Origin, Host, session
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "text/html"])
def test_wire_accept(legacy: Any, modern: Any, accept: str) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for answer in (legacy.send(message, Accept=accept), modern.start("tools/list", Accept=accept)):
        assert answer.status == 406
        assert [m["error"]["code"] for m in answer.messages()] == [-32600]


def test_wire_content_type(legacy: Any, modern: Any) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for answer in (
        legacy.send(message, Content_Type="text/plain"),
        modern.start("tools/list", Content_Type="text/plain"),
    ):
        assert answer.status == 415
        assert [m["error"]["code"] for m in answer.messages()] == [-32600]


@pytest.mark.parametrize("name", ["Origin", "Host"])
def test_wire_origin_and_host(legacy: Any, modern: Any, name: str) -> None:
    evil: Any = {name: "http://evil.example" if name == "Origin" else "evil.example"}
    for answer in (
        legacy.send({"jsonrpc": "2.0", "id": 1, "method": "ping"}, **evil),
        modern.start("tools/list", **evil),
    ):
        assert answer.status == 403
        list(answer.messages())
    for good in ("http://localhost:3000", "http://127.0.0.1:1"):
        assert modern.request("tools/list", Origin=good).status == 200


def test_wire_session(house: House, place: str, legacy: Any, modern: Any) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    refused(legacy.send(message, Mcp_Session_Id=None, MCP_Protocol_Version=None), 400, -32600, 1)
    refused(legacy.send(message, Mcp_Session_Id="no-such-session"), 404, -32001, 1)
    elsewhere = next(other for other in ENDPOINTS if other != place)
    stranger = LegacyClient(house.gateway, elsewhere)
    refused(legacy.send(message, Mcp_Session_Id=stranger.session["Mcp-Session-Id"]), 404, -32001, 1)
    stranger.close()
    refused(stranger.send(message), 404, -32001, 1)  # it has ended
    for ignored in ("no-such-session", legacy.session["Mcp-Session-Id"]):
        reply = modern.request("tools/list", Mcp_Session_Id=ignored, Last_Event_ID="3-4")
        assert reply.status == 200 and "mcp-session-id" not in reply.headers


# -------------------------------------------------------------------------------------------------- versions and _meta
def test_wire_bad_version(house: House, place: str, legacy: Any, modern: Any) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    refused(legacy.send(message, MCP_Protocol_Version="2099-01-01"), 400, -32600, 1)
    for asked in ("2099-01-01", "nonsense", MODERN):
        client = LegacyClient(house.gateway, place, version=asked)
        assert client.facts["protocolVersion"] == NEWEST, "an unknown revision gets ours"
        client.close()
    for wrong in ("2099-01-01", "2025-11-25", ""):
        sent = modern.message("tools/list", id="v")
        sent["params"]["_meta"][f"{META}protocolVersion"] = wrong
        error = refused(modern.send(sent, MCP_Protocol_Version=wrong), 400, -32022, "v")
        assert error["data"]["supported"] == [MODERN] and error["data"]["requested"] == wrong


def test_wire_version_that_tells_no_era(modern: Any) -> None:
    """Neither a context nor a session, and a header that names none of the revisions: any of them would do."""
    message = {"jsonrpc": "2.0", "id": 9, "method": "tools/list", "params": {}}
    error = refused(modern.send(message, MCP_Protocol_Version="2099-01-01"), 400, -32022, 9)
    assert sorted(error["data"]["supported"]) == sorted((*LEGACY_VERSIONS, MODERN))
    assert error["data"]["requested"] == "2099-01-01"


INCOMPLETE: list[tuple[str, Any]] = [
    ("clientCapabilities", None),
    ("clientCapabilities", []),
    ("clientInfo", "me"),
    ("logLevel", "loud"),
    ("logLevel", 3),
]


@pytest.mark.parametrize(("key", "value"), INCOMPLETE, ids=[f"{key}_{value}" for key, value in INCOMPLETE])
def test_wire_meta(legacy: Any, modern: Any, key: str, value: Any) -> None:
    sent = modern.message("tools/list", id=4)
    if value is None:
        del sent["params"]["_meta"][f"{META}{key}"]
    else:
        sent["params"]["_meta"][f"{META}{key}"] = value
    refused(modern.send(sent), 400, -32602, 4)
    # The keys mean nothing in a session.
    assert legacy.request("tools/list", {"_meta": {f"{META}{key}": value}}).status == 200


def test_wire_meta_without_a_version(modern: Any) -> None:
    sent = modern.message("tools/list", id=4)
    del sent["params"]["_meta"][f"{META}protocolVersion"]
    refused(modern.send(sent), 400, -32602, 4)
    refused(modern.send({"jsonrpc": "2.0", "id": 5, "method": "tools/list"}), 400, -32602, 5)


# ------------------------------------------------------------------------------------------------------------- headers
MISMATCHES: list[tuple[str, dict[str, str | None]]] = [
    ("version", {"MCP_Protocol_Version": "2025-06-18"}),
    ("no_version", {"MCP_Protocol_Version": None}),
    ("method", {"Mcp_Method": "tools/list"}),
    ("method_case", {"Mcp_Method": "Tools/call"}),
    ("no_method", {"Mcp_Method": None}),
    ("name", {"Mcp_Name": "other"}),
    ("no_name", {"Mcp_Name": None}),
    ("malformed", {"Mcp_Name": "=?base64?*?="}),
]


@pytest.mark.parametrize("wrong", [each[1] for each in MISMATCHES], ids=[each[0] for each in MISMATCHES])
def test_wire_header_mismatch(place: str, legacy: Any, modern: Any, wrong: dict[str, Any]) -> None:
    params = {"name": name_at(place, "echo"), "arguments": {"text": "t"}}
    refused(modern.start("tools/call", params, id="h", **wrong), 400, -32020, "h")
    headers = {name: value for name, value in wrong.items() if name != "MCP_Protocol_Version"}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    assert legacy.finish(legacy.send(message, **headers)).text == "t", "a session has no such headers"


def test_wire_headers_are_compared_as_values(place: str, modern: Any) -> None:
    """Names in any case, values trimmed, and what was encoded without need is what it says."""
    name = name_at(place, "echo")
    message = modern.message("tools/call", {"name": name, "arguments": {"text": "t"}})
    coded = f"=?base64?{base64.b64encode(name.encode()).decode()}?="
    headers = [
        *(("ACCEPT", ACCEPT), ("content-type", "application/json"), ("mcp-protocol-version", f"  {MODERN}  ")),
        *(("MCP-METHOD", "tools/call"), ("mCP-nAME", coded)),
    ]
    status, reply = raw(modern.gateway, place, headers, json.dumps(message).encode())
    assert (status, reply["result"]["content"][0]["text"]) == (200, "t")
    for twice in ("Mcp-Method", "Mcp-Name", "MCP-Protocol-Version"):
        value = next(value for header, value in headers if header.lower() == twice.lower())
        status, reply = raw(modern.gateway, place, [*headers, (twice, value)], json.dumps(message).encode())
        assert (status, reply["error"]["code"]) == (400, -32020), "it is there twice"
        assert twice.lower() in json.dumps(reply).lower()


def test_wire_checks_have_their_order(place: str, modern: Any) -> None:
    """``_meta``, headers, version, method: of several faults the first is told."""
    wrong = modern.message("nonsense/method", id=1)
    wrong["params"]["_meta"][f"{META}protocolVersion"] = "2099-01-01"
    bad_meta = json.loads(json.dumps(wrong))
    del bad_meta["params"]["_meta"][f"{META}clientCapabilities"]
    refused(modern.send(bad_meta, MCP_Protocol_Version="2099-01-01", Mcp_Method="x"), 400, -32602, 1)
    refused(modern.send(wrong, MCP_Protocol_Version="2099-01-01", Mcp_Method="x"), 400, -32020, 1)
    refused(modern.send(wrong, MCP_Protocol_Version="2099-01-01"), 400, -32022, 1)
    refused(modern.start("nonsense/method", id=1), 404, -32601, 1)


# -------------------------------------------------------------------------------------------------------- capabilities
@pytest.mark.parametrize("back", ["lpipeown", "mpipeown"])
@pytest.mark.parametrize(
    ("kind", "declared", "needed"),
    [
        ("sampling", {}, {"sampling": {}}),
        ("roots", {"sampling": {}}, {"roots": {}}),
        ("elicitation", {"roots": {}}, {"elicitation": {}}),
        ("url", {"elicitation": {}}, {"elicitation": {"url": {}}}),
    ],
)
def test_wire_capability(house: House, back: str, kind: str, declared: Json, needed: Json) -> None:
    params = {"name": "ask", "arguments": {"kinds": [kind], "tag": f"{kind}-{back}"}}
    client = ModernClient(house.gateway, f"/servers/{back}/mcp", declared)
    error = refused(client.start("tools/call", params, id="c"), 400, -32021, "c")
    assert isinstance(error["data"]["requiredCapabilities"], dict)
    assert set(error["data"]["requiredCapabilities"]) == set(needed)
    if kind == "url":
        assert error["data"]["requiredCapabilities"] == needed
    session = LegacyClient(house.gateway, f"/servers/{back}/mcp", declared)
    session.answerer = lambda question: {"error": {"code": -32601, "message": "can't"}}
    reply = session.request("tools/call", params)
    if back == "mpipeown":
        assert reply.result["isError"] is True and next(iter(needed)) in reply.text
        assert session.asked == [], "nobody is asked for what was not declared"
    else:
        assert "error" in reply.text, "a legacy server was told what there is, and asks at its own risk"
    session.close()


# --------------------------------------------------------------------------------- methods, tools, resources, the rest
REMOVED = ("initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe")


def test_wire_unknown_method(legacy: Any, modern: Any) -> None:
    reply = legacy.request("nonsense/method", id="m")
    assert (reply.status, reply.error["code"], reply.message["id"]) == (200, -32601, "m")
    for method in ("nonsense/method", *REMOVED):
        refused(modern.start(method, {"uri": "x", "level": "info"}, id=f"m {method}"), 404, -32601, f"m {method}")


def test_wire_unknown_tool(legacy: Any, modern: Any) -> None:
    for client, status in ((legacy, 200), (modern, 400)):
        reply = client.call("nothing")
        assert (reply.status, reply.error["code"]) == (status, -32602)


def test_wire_no_resource(place: str, legacy: Any, modern: Any) -> None:
    uri = "lpipe://nothing" if "mpipe" not in place else "mpipe://nothing"
    reply = legacy.request("resources/read", {"uri": uri})
    assert (reply.status, reply.error["code"]) == (200, -32002)
    reply = modern.request("resources/read", {"uri": uri})
    assert (reply.status, reply.error["code"]) == (400, -32602)
    assert reply.error["data"]["uri"] == uri


@pytest.mark.parametrize("method", ["tools/list", "prompts/list", "resources/list", "resources/templates/list"])
def test_wire_bad_cursor(legacy: Any, modern: Any, method: str) -> None:
    reply = legacy.request(method, {"cursor": "nonsense"})
    assert (reply.status, reply.error["code"]) == (200, -32602)
    reply = modern.request(method, {"cursor": "nonsense"})
    assert (reply.status, reply.error["code"]) == (400, -32602)


def test_wire_bad_prompt(legacy: Any, modern: Any) -> None:
    reply = legacy.request("prompts/get", {"name": "nothing"})
    assert (reply.status, reply.error["code"]) == (200, -32602)
    reply = modern.request("prompts/get", {"name": "nothing"})
    assert (reply.status, reply.error["code"]) == (400, -32602)


@pytest.mark.parametrize("back", ["lpipeown", "mpipeown"])
def test_wire_bad_state(house: House, back: str) -> None:
    client = ModernClient(house.gateway, f"/servers/{back}/mcp")
    params: Json = {"name": "ask", "arguments": {"kinds": ["roots"], "tag": f"state-{back}"}}
    first = client.request("tools/call", params).result
    state = first["requestState"]
    (key,) = first["inputRequests"]
    again = {**params, "inputResponses": {key: {"roots": []}}, "requestState": state}
    record = house.records[back]
    arrived = len(record.calls(f"state-{back}"))

    def check(wrong: Json) -> None:
        reply = client.request("tools/call", wrong)
        assert (reply.status, reply.error["code"]) == (400, -32602)

    check({**again, "requestState": "nonsense"})
    check({**again, "requestState": state[:-2] + ("AA" if state[-2:] != "AA" else "BB")})
    check({**again, "requestState": 5})
    check({**again, "arguments": {**params["arguments"], "kinds": ["sampling"]}})
    check({**again, "name": "steps"})
    other = ModernClient(house.gateway, "/servers/lpipe/mcp")
    assert other.request("tools/call", again).error["code"] == -32602, "it is another server's"
    assert len(record.calls(f"state-{back}")) == arrived, "a server has been called with a state that was not its own"
    assert client.request("tools/call", again).result["resultType"] == "complete", "the right one still works"
    if back == "lpipeown":
        check(again)  # once
    # A legacy client has no such thing; nobody looks at it, and no legacy server gets to see it.
    session = LegacyClient(house.gateway, "/servers/lpipe/mcp")
    params = {"name": "echo", "arguments": {"text": "t", "tag": back}, "requestState": state, "inputResponses": {}}
    assert session.request("tools/call", params).text == "t"
    assert set(house.records["lpipe"].call(back)["params"]) - {"_meta"} == {"name", "arguments"}
    session.close()


def test_wire_errors_of_servers_keep_their_code(place: str, legacy: Any, modern: Any) -> None:
    for code, status in ((-32603, 200), (-32000, 200), (1234, 200), (-32602, 400)):
        params = {"name": name_at(place, "fail"), "arguments": {"code": code, "data": {"kept": [1]}}}
        for client, wanted in ((legacy, 200), (modern, status)):
            reply = client.request("tools/call", params)
            assert (reply.status, reply.error["code"]) == (wanted, code)
            assert reply.error["data"] == {"kept": [1]} and reply.error["message"] == "as asked"


def test_wire_codes_of_the_other_era_reach_nobody(house: House) -> None:
    """-32020 to -32022 are no legacy codes, -32002 and -32042 no modern ones."""
    session = LegacyClient(house.gateway, "/servers/mpipe/mcp")
    needed: Json = {"requiredCapabilities": {"sampling": {}}}
    for code in (-32020, -32022):
        assert session.call("fail", code=code, data=needed).error["code"] == -32603
    reply = session.call("fail", code=-32021, data=needed)
    assert reply.result["isError"] is True and "sampling" in reply.text
    session.close()
    client = ModernClient(house.gateway, "/servers/lpipe/mcp")
    assert client.call("fail", code=-32002, data={"uri": "x"}).error["code"] == -32602
    assert client.call("fail", code=-32042, data={"nothing": "to open"}).error["code"] == -32603


# --------------------------------------------------------------------------------------------------- servers in trouble
@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A gateway whose servers can't be started, or once only."""
    folder = tmp_path_factory.mktemp("rough")
    built = House(folder)

    def command(id: str, program: str, *args: str, **more: Any) -> None:
        runtime = {"type": "local-process", "command": program, "args": list(args)}
        built.entries.append({"id": id, "runtime": runtime, **more})

    dies = "import sys; print('no database', file=sys.stderr); sys.exit(4)"
    command("dead", sys.executable, "-I", "-S", "-c", dies)
    command("absent", str(folder / "no-such-program"))
    command("mute", sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", start_timeout_seconds=0.6)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        built.at("unreachable", f"http://127.0.0.1:{unused.getsockname()[1]}/mcp")
    once = "import os, sys; os.mkdir(sys.argv[1]) if not os.path.exists(sys.argv[1]) else sys.exit(5); "
    once += "os.execv(sys.executable, [sys.executable, '-I', '-S', *sys.argv[2:]])"
    for era in ("legacy", "modern"):
        for n in (1, 2):
            built.records[f"once-{era}-{n}"] = Record(folder / f"once-{era}-{n}.record")
            peer = [str(SERVER), "--era", era, "--record", str(built.records[f"once-{era}-{n}"].path)]
            lock = str(folder / f"once-{era}-{n}.lock")
            command(f"once-{era}-{n}", sys.executable, "-I", "-S", "-c", once, lock, *peer, era=era)
    with built:
        yield built


def check_fault(reply: Reply, tool: bool, *, modern: bool) -> str:
    """A fault of a server's, as the gateway tells it: the reason."""
    assert reply.status == 200
    if not tool:
        assert reply.error["code"] == -32603
        assert reply.error["data"]["source"] == "gateway"
        assert reply.error["data"]["reason"] == reply.error["message"]
        return str(reply.error["message"])
    assert reply.result["isError"] is True
    data = reply.result["_meta"][VENDOR_DATA]
    assert data["source"] == "gateway" and data["reason"] == reply.text
    assert (reply.result.get("resultType") == "complete") is modern
    assert (f"{META}serverInfo" in reply.result["_meta"]) is modern
    return reply.text


@pytest.mark.parametrize(
    ("server", "said"),
    [("dead", "code 4"), ("absent", "no-such-program"), ("mute", "0.6 s"), ("unreachable", "can't be reached")],
)
def test_wire_server_that_can_not_be_started(rough: House, server: str, said: str) -> None:
    client = ModernClient(rough.gateway, f"/servers/{server}/mcp")
    for tool in (True, False):
        reply = client.call("echo") if tool else client.request("prompts/list")
        assert said in check_fault(reply, tool, modern=True)
    hello = {"protocolVersion": NEWEST, "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    answer = Answer(
        rough.gateway,
        "POST",
        f"/servers/{server}/mcp",
        body,
        {"Accept": ACCEPT, "Content-Type": "application/json"},
    )
    (message,) = answer.messages()
    reply = Reply(answer, message, [])
    assert said in check_fault(reply, tool=False, modern=False)
    assert "mcp-session-id" not in answer.headers, "there is no session"


@pytest.mark.parametrize("back", ["legacy", "modern"])
@pytest.mark.parametrize("front", ["legacy", "modern"])
def test_wire_server_that_ends(rough: House, front: str, back: str) -> None:
    """A crash in a call, a start that fails, and the circuit: for tools a text, for the rest an error."""
    id = f"once-{back}-{1 if front == 'legacy' else 2}"
    path = f"/servers/{id}/mcp"
    modern = front == "modern"
    client: Any = ModernClient(rough.gateway, path) if modern else LegacyClient(rough.gateway, path)
    assert client.call("echo", text="up").text == "up"
    assert "exited with code 3" in check_fault(client.call("crash"), True, modern=modern)
    assert "code 5" in check_fault(client.request("prompts/list"), False, modern=modern)
    assert "2 times in a row" in check_fault(client.call("echo"), True, modern=modern)
    for _ in range(4):
        assert rough.gateway.http("POST", f"/servers/{id}/start")[0] >= 500, "by hand no pause is kept"
    assert "circuit open" in check_fault(client.call("echo"), True, modern=modern)
    assert "circuit open" in check_fault(client.request("prompts/list"), False, modern=modern)
    assert len(rough.records[id].calls("")) <= 2, "a call that may have run is not repeated"
    client.close()


@pytest.mark.parametrize("back", ["lpipefrail", "mpipefrail"])
@pytest.mark.parametrize("front", ["legacy", "modern"])
def test_wire_timeout(house: House, front: str, back: str) -> None:
    client: Any = (LegacyClient if front == "legacy" else ModernClient)(house.gateway, f"/servers/{back}/mcp")
    tag = f"timeout-{front}-{back}"
    assert "0.4 s" in check_fault(client.call("hang", tag=tag), True, modern=front == "modern")
    house.records[back].wait(lambda record: record.events("cancelled", tag=tag))
    assert client.call("echo", text="still there").text == "still there"
    client.close()


# ------------------------------------------------------------------------------------------ ids, quotas, keys, streams
def test_wire_unknown_server(house: House) -> None:
    client = ModernClient(house.gateway, "/servers/nobody/mcp")
    refused(client.start("tools/list", id="u"), 404, -32001, "u")
    refused(client.start("subscriptions/listen", {"notifications": {}}, id="u"), 404, -32001, "u")
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": NEWEST}}
    headers = {"Accept": ACCEPT, "Content-Type": "application/json"}
    refused(Answer(house.gateway, "POST", "/servers/nobody/mcp", body, headers), 404, -32001, 1)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A gateway that wants keys and holds two sessions."""
    built = House(tmp_path_factory.mktemp("guarded"), api_key="right", max_sessions=2)
    built.pipe("lpipe", "legacy")
    built.pipe("mpipe", "modern")
    with built:
        yield built


def test_wire_session_quota(guarded: House) -> None:
    key = {"Authorization": "Bearer right"}
    sessions = [LegacyClient(guarded.gateway, "/mcp", headers=key) for _ in range(2)]
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": NEWEST}}
    headers = {"Accept": ACCEPT, "Content-Type": "application/json", **key}
    answer = Answer(guarded.gateway, "POST", "/mcp", body, headers)
    assert answer.status == 503
    (message,) = answer.messages()
    assert "max_sessions" in message["error"]["message"]
    client = ModernClient(guarded.gateway, "/servers/mpipe/mcp", headers=key)
    assert client.call("echo", text="t").text == "t", "the modern era has no sessions"
    for session in sessions:
        session.close()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_wire_token(guarded: House, path: str) -> None:
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": NEWEST}}
    common = {"Accept": ACCEPT, "Content-Type": "application/json"}
    for key, status in ((None, 401), ("wrong", 403)):
        more = {} if key is None else {"Authorization": f"Bearer {key}"}
        for answer in (
            Answer(guarded.gateway, "POST", path, hello, {**common, **more}),
            ModernClient(guarded.gateway, path, headers=more).start("tools/list"),
        ):
            assert answer.status == status
            assert ("www-authenticate" in answer.headers) is (status == 401)
            list(answer.messages())
    right = {"Authorization": "Bearer right"}
    assert ModernClient(guarded.gateway, path, headers=right).request("tools/list").status == 200
    LegacyClient(guarded.gateway, path, headers=right).close()


def test_wire_answers_are_streams_only_where_something_comes_first(house: House, place: str) -> None:
    """Errors keep their status because a stream begins with the first notification, not before."""
    session: Any = LegacyClient(house.gateway, place)
    for each in (session, ModernClient(house.gateway, place)):
        assert not each.call(name_at(place, "echo"), token="t", text="x").streamed
        reply = each.call(name_at(place, "steps"), token="t")
        assert reply.streamed and reply.status == 200
        assert len(reply.notes) == 2
        assert reply.headers["x-accel-buffering"] == "no"
        assert "no-cache" in reply.headers["cache-control"] or "no-store" in reply.headers["cache-control"]
    session.close()


def test_wire_modern_methods_of_http(house: House, place: str) -> None:
    """GET and DELETE belong to sessions: a modern client that tries has none, and is told so."""
    for method, statuses in (("GET", (400, 404, 405)), ("DELETE", (400, 404, 405)), ("PUT", (405,))):
        status, headers, _ = house.gateway.http(method, place, headers={"MCP-Protocol-Version": MODERN})
        assert status in statuses
        assert status != 405 or "POST" in headers["allow"]


# ------------------------------------------------------------------------------------------------------------------ B7
@pytest.fixture(scope="module")
def eras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Servers of each era, found out or given, on pipes and at URLs."""
    built = House(tmp_path_factory.mktemp("eras"))
    carriers: dict[str, Any] = {"pipe": built.pipe, "http": built.http}
    for name, carrier in carriers.items():
        for era in ("legacy", "modern", "both"):
            carrier(f"{era}-{name}", era)
        for era in ("legacy", "modern"):
            carrier(f"given-{era}-{name}", era, era=era)
        carrier(f"own-both-{name}", "both", isolation="session")
    with built:
        yield built


@pytest.mark.parametrize("carrier", ["pipe", "http"])
@pytest.mark.parametrize(
    ("server", "era", "decided"),
    [
        ("legacy", "legacy", "initialize"),
        ("modern", "modern", "server/discover"),
        ("both", "modern", "server/discover"),
        ("given-legacy", "legacy", "catalog"),
        ("given-modern", "modern", "catalog"),
    ],
)
def test_B7_a_server_shows_its_era_and_how_it_was_found_out(
    eras: House, carrier: str, server: str, era: str, decided: str
) -> None:
    id = f"{server}-{carrier}"
    session: Any = LegacyClient(eras.gateway, f"/servers/{id}/mcp")
    for each in (session, ModernClient(eras.gateway, f"/servers/{id}/mcp")):
        assert each.call("echo", text="t").text == "t"
    (instance,) = eras.gateway.json("GET", f"/servers/{id}")["instances"]
    revision = MODERN if era == "modern" else NEWEST
    assert instance["era"] == era
    assert instance["protocol_version"] == revision
    assert instance["era_decided_by"] == decided
    said = [line for line in list(eras.gateway.lines) if "Server ready" in line and f"server_id={id} " in line]
    (line,) = said
    assert f"era={era} " in line and f"revision={revision}" in line and f"era_decided_by={decided}" in line
    opened = [m["method"] for m in eras.records[id].got() if m["method"] in ("initialize", "server/discover")]
    expected = {
        "legacy": ["server/discover", "initialize"],
        "modern": ["server/discover"],
        "both": ["server/discover"],
        "given-legacy": ["initialize"],
        "given-modern": ["server/discover"],
    }
    assert opened == expected[server]
    session.close()


@pytest.mark.parametrize("carrier", ["pipe", "http"])
def test_B7_a_server_of_both_eras_speaks_its_clients(eras: House, carrier: str) -> None:
    """Isolated it has one client, and needs no bridge."""
    id = f"own-both-{carrier}"
    session: Any = LegacyClient(eras.gateway, f"/servers/{id}/mcp")
    for each in (session, ModernClient(eras.gateway, f"/servers/{id}/mcp")):
        assert each.call("echo", text="t").text == "t"

    def shown() -> list[Json]:
        return list(eras.gateway.json("GET", f"/servers/{id}")["instances"])

    wait_until(lambda: len(shown()) == 2)
    assert sorted((each["era"], each["protocol_version"]) for each in shown()) == [
        ("legacy", NEWEST),
        ("modern", MODERN),
    ]
    session.close()


@pytest.mark.parametrize("carrier", ["pipe", "http"])
def test_B7_what_was_found_out_is_remembered(eras: House, carrier: str) -> None:
    """A server that has been found legacy is not asked again whether it is modern."""
    id = f"legacy-{carrier}"
    ModernClient(eras.gateway, f"/servers/{id}/mcp").call("echo", text="t")
    before = len(eras.records[id].got("server/discover"))
    assert eras.gateway.http("POST", f"/servers/{id}/restart")[0] == 200
    ModernClient(eras.gateway, f"/servers/{id}/mcp").call("echo", text="t")
    assert len(eras.records[id].got("server/discover")) == before


def test_wire_all_capabilities_are_known(house: House) -> None:
    """What these tests declare by default is what a legacy server is told, word by word."""
    session = LegacyClient(house.gateway, "/servers/lpipeown/mcp")
    told = json.loads(session.call("who").text)["client"]
    assert told["capabilities"] == ALL and told["clientInfo"] == session.info
    assert Path(f"/proc/{json.loads(session.call('who').text)['pid']}").exists()
    session.close()
