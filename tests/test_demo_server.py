"""The demo server: both eras, its tools, and how it ends."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.demo_server import LEGACY, MAX_NOTES, META, MODERN, NOTES_URI, Server

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "gateway"), "demo-server"]


class Peer:
    """A client that speaks to a Server without a process: ``sent`` is all that came back, in order."""

    def __init__(self, version: str) -> None:
        self.sent: list[Any] = []
        self.server = Server(self.sent.append)
        self.version = version
        self.ids = 0
        if version in LEGACY:
            result = self.ask("initialize", protocolVersion=version, capabilities={}, clientInfo={"name": "t"})
            assert result["protocolVersion"] == version
            self.line({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def line(self, message: Any) -> None:
        self.server.receive(json.dumps(message).encode() + b"\n")

    def reply(self, method: str, /, **params: Any) -> dict[str, Any]:
        """The whole reply to a request; what was sent with it stays in ``sent``."""
        self.ids += 1
        if self.version == MODERN:
            meta = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
            params = {**params, "_meta": {**meta, **params.get("_meta", {})}}
        self.line({"jsonrpc": "2.0", "id": self.ids, "method": method, "params": params})
        replies = [each for each in self.sent if each.get("id") == self.ids]
        assert len(replies) == 1
        self.sent.remove(replies[0])
        return dict(replies[0])

    def ask(self, method: str, /, **params: Any) -> dict[str, Any]:
        return dict(self.reply(method, **params)["result"])

    def error(self, method: str, /, **params: Any) -> tuple[int, Any]:
        error = self.reply(method, **params)["error"]
        assert error["message"]
        return error["code"], error.get("data")

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        return self.ask("tools/call", name=name, arguments=arguments)


@pytest.fixture(params=[*LEGACY, MODERN])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(request.param)


def test_it_imports_nothing_of_the_package_and_little_else() -> None:
    tree = ast.parse((ROOT / "gateway" / "demo_server.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert top == {"json", "os", "sys", "time"}


def test_lists(peer: Peer) -> None:
    tools = peer.ask("tools/list")["tools"]
    assert [tool["name"] for tool in tools] == ["echo", "time", "notes"]
    newer = peer.version >= "2025-06-18"
    assert all(("title" in tool) == newer for tool in tools)
    assert ["outputSchema" in tool for tool in tools] == [False, newer, newer]
    assert [each["uri"] for each in peer.ask("resources/list")["resources"]] == [NOTES_URI]
    assert peer.ask("resources/templates/list")["resourceTemplates"] == []
    assert [each["name"] for each in peer.ask("prompts/list")["prompts"]] == ["summarize-notes"]
    assert peer.error("tools/list", cursor="")[0] == -32602


def test_echo_and_time(peer: Peer) -> None:
    text = 'x\n"ü\U0001f600\ud800'
    assert peer.call("echo", text=text)["content"] == [{"type": "text", "text": text}]
    for zone, end in (("UTC", "+00:00"), ("+05:30", "+05:30"), ("-0800", "-08:00")):
        result = peer.call("time", timezone=zone)
        assert result["content"][0]["text"].endswith(end)
        if peer.version >= "2025-06-18":
            assert result["structuredContent"]["timezone"] == zone
        else:
            assert "structuredContent" not in result
    assert peer.call("time")["content"][0]["text"].endswith("+00:00")


def test_notes_prompt_and_resource(peer: Peer) -> None:
    assert peer.call("notes", action="add", text="milk")["content"][0]["text"] == "1 note\n- milk"
    peer.call("notes", action="add", text="bread")
    listed = peer.call("notes", action="list")
    if peer.version >= "2025-06-18":
        assert listed["structuredContent"] == {"notes": ["milk", "bread"]}
    contents = peer.ask("resources/read", uri=NOTES_URI)["contents"]
    assert contents == [{"uri": NOTES_URI, "mimeType": "text/plain", "text": "milk\nbread"}]
    said = peer.ask("prompts/get", name="summarize-notes", arguments={"style": "a poem"})["messages"]
    assert said[0]["content"]["text"] == "Summarize these notes as a poem:\n\nmilk\nbread"
    assert peer.call("notes", action="clear")["content"][0]["text"] == "0 notes"
    assert peer.sent == []


def test_notes_are_bounded() -> None:
    peer = Peer("2025-11-25")
    for number in range(MAX_NOTES):
        assert not peer.call("notes", action="add", text=str(number))["isError"]
    assert peer.call("notes", action="add", text="one more")["isError"]
    assert peer.call("notes", action="add", text="x" * 100_000)["isError"]
    assert len(peer.server.notes) == MAX_NOTES


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("echo", {}, "needs the argument text"),
        ("echo", {"text": 1}, "must be a string"),
        ("echo", {"text": "x", "more": "y"}, "no argument 'more'"),
        ("time", {"timezone": "Mars/Olympus"}, "unknown time zone"),
        ("time", {"timezone": "../../etc/passwd"}, "unknown time zone"),
        ("time", {"timezone": "Europe"}, "unknown time zone"),
        ("time", {"timezone": "+24:00"}, "unknown time zone"),
        ("notes", {"action": "burn"}, "must be one of add, list, clear"),
        ("notes", {"action": "add"}, "give its text"),
    ],
)
def test_bad_arguments_are_told_as_the_revision_has_it(
    peer: Peer, name: str, arguments: dict[str, Any], says: str
) -> None:
    reply = peer.reply("tools/call", name=name, arguments=arguments)
    if peer.version >= "2025-11-25":
        assert reply["result"]["isError"]
        assert says in reply["result"]["content"][0]["text"]
    else:
        assert reply["error"]["code"] == -32602
        assert says in reply["error"]["message"]


def test_errors(peer: Peer) -> None:
    modern = peer.version == MODERN
    assert peer.error("tools/call", name="nope")[0] == -32602
    assert peer.error("tools/call", name="echo", arguments=[])[0] == -32602
    assert peer.error("prompts/get", name="nope")[0] == -32602
    assert peer.error("resources/read", uri="demo://x") == (-32602 if modern else -32002, {"uri": "demo://x"})
    for method in ("completion/complete", "logging/setLevel", "nope", "tasks/list"):
        assert peer.error(method)[0] == -32601
    if modern:
        for method in ("initialize", "ping", "resources/subscribe"):
            assert peer.error(method)[0] == -32601
    else:
        assert peer.ask("ping") == {}
        assert peer.error("initialize", protocolVersion=peer.version)[0] == -32600
        assert peer.error("server/discover")[0] == -32601


@pytest.mark.parametrize(
    ("line", "code", "identity"),
    [
        (b"{", -32700, None),
        (b"\xff\xfe", -32700, None),
        (b"[" * 100_000, -32700, None),
        (b"9" * 5000, -32700, None),
        (b"[]", -32600, None),
        (b"7", -32600, None),
        (b'{"id": 1, "method": "ping"}', -32600, None),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600, None),
        (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600, None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600, 1),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', -32600, 1),
    ],
)
def test_nothing_it_reads_ends_it(line: bytes, code: int, identity: Any) -> None:
    peer = Peer("2025-11-25")
    peer.server.receive(line)
    [reply] = peer.sent
    assert (reply["error"]["code"], reply["id"]) == (code, identity)
    peer.sent.clear()
    assert peer.ask("ping") == {}


def test_replies_notifications_and_cancellations_need_no_answer(peer: Peer) -> None:
    peer.line({"jsonrpc": "2.0", "id": 5, "result": {}})
    peer.line({"jsonrpc": "2.0", "id": 5, "error": {"code": 1, "message": "x"}})
    peer.line({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})
    peer.line({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": {}}})
    peer.line({"jsonrpc": "2.0", "method": "nope"})
    assert peer.sent == []


def test_batches_only_where_the_revision_has_them(peer: Peer) -> None:
    peer.line([{"jsonrpc": "2.0", "id": "a", "method": "ping"}, {"jsonrpc": "2.0", "method": "x"}, 5])
    [sent] = peer.sent
    if peer.version == "2025-03-26":
        assert [(each["id"], "result" in each) for each in sent] == [("a", True), (None, False)]
    else:
        assert sent["error"]["code"] == -32600


@pytest.mark.parametrize("wish", ["2026-07-28", "1.0", None, 5])
def test_an_unknown_revision_gets_the_newest_legacy_one(wish: Any) -> None:
    peer = Peer("")
    assert peer.ask("initialize", protocolVersion=wish)["protocolVersion"] == "2025-11-25"


def test_modern_results_carry_what_the_revision_requires() -> None:
    peer = Peer(MODERN)
    found = peer.ask("server/discover")
    assert found["supportedVersions"] == [MODERN]
    assert found["capabilities"] == {"tools": {}, "resources": {"subscribe": True}, "prompts": {}}
    results = {method: peer.ask(method) for method in ("tools/list", "resources/list", "prompts/list")}
    results["read"] = peer.ask("resources/read", uri=NOTES_URI)
    for result in [found, *results.values()]:
        assert result["resultType"] == "complete"
        assert isinstance(result["ttlMs"], int)
        assert result["cacheScope"] in ("public", "private")
        assert result["_meta"][META + "serverInfo"]["name"] == "open-mcp-gateway-demo"
    assert results["read"]["ttlMs"] == 0
    called = peer.call("echo", text="x")
    assert called["resultType"] == "complete"
    assert "ttlMs" not in called


def test_modern_meta_is_checked() -> None:
    peer = Peer(MODERN)
    assert peer.error("tools/list", _meta={META + "protocolVersion": "2027-01-01"}) == (
        -32022,
        {"supported": [MODERN], "requested": "2027-01-01"},
    )
    assert peer.error("tools/list", _meta={META + "clientCapabilities": None})[0] == -32602


def test_a_connection_keeps_its_era_and_discover_does_not_choose_it() -> None:
    peer = Peer(MODERN)
    peer.ask("server/discover")
    peer.version = ""
    peer.ask("initialize", protocolVersion="2025-06-18")
    peer.version = MODERN
    assert peer.error("tools/list")[0] == -32600
    other = Peer(MODERN)
    other.ask("tools/list")
    other.version = ""
    assert other.error("initialize", protocolVersion="2025-06-18")[0] == -32022
    assert other.error("tools/list")[0] == -32602


def test_legacy_subscription() -> None:
    peer = Peer("2025-06-18")
    assert peer.error("resources/subscribe", uri="demo://x")[0] == -32002
    peer.call("notes", action="add", text="before")
    peer.ask("resources/subscribe", uri=NOTES_URI)
    peer.call("notes", action="add", text="x")
    peer.call("notes", action="list")
    updated = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": NOTES_URI}}
    assert peer.sent == [updated]
    peer.ask("resources/unsubscribe", uri=NOTES_URI)
    peer.call("notes", action="clear")
    assert peer.sent == [updated]


def test_modern_subscription() -> None:
    peer = Peer(MODERN)
    meta = {META + "protocolVersion": MODERN, META + "clientCapabilities": {}}
    asked = {"toolsListChanged": True, "resourceSubscriptions": [NOTES_URI, "demo://x"]}
    listen = {"jsonrpc": "2.0", "id": "listen:0", "method": "subscriptions/listen"}
    peer.line({**listen, "params": {"notifications": asked, "_meta": meta}})
    [acknowledged] = peer.sent
    assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
    own = {META + "subscriptionId": "listen:0"}
    assert acknowledged["params"] == {"notifications": {"resourceSubscriptions": [NOTES_URI]}, "_meta": own}
    peer.sent.clear()
    peer.call("notes", action="add", text="x")
    [updated] = peer.sent
    assert updated["params"] == {"uri": NOTES_URI, "_meta": own}
    peer.line({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "listen:0"}})
    peer.sent.clear()
    peer.call("notes", action="clear")
    assert peer.sent == []


# ---------------------------------------------------------------- as a process

INITIALIZE = b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18"}}\n'


def start(**options: Any) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, **options)


def test_end_of_input_is_a_clean_end() -> None:
    with start() as process:
        out, err = process.communicate(INITIALIZE + b"\n" + INITIALIZE.replace(b"1", b"2", 1), timeout=30)
    assert [json.loads(line)["jsonrpc"] for line in out.splitlines()] == ["2.0", "2.0"]
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_quietly(number: signal.Signals) -> None:
    with start() as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(INITIALIZE)
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stdout.read() + process.stderr.read() == b""


def test_a_reader_that_left_ends_it_quietly() -> None:
    with start() as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.write(INITIALIZE)
        process.stdin.flush()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


CLIENT = """
import sys, anyio
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

async def main():
    server = stdio_client(StdioServerParameters(command=sys.argv[2], args=sys.argv[3:]))
    async with Client(server, mode=sys.argv[1]) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["echo", "time", "notes"]
        assert (await client.call_tool("time", {"timezone": "Europe/Berlin"})).structured_content["unix"]
        assert (await client.call_tool("notes", {"action": "add", "text": "x"})).structured_content == {"notes": ["x"]}
        assert (await client.read_resource("demo://notes")).contents[0].text == "x"
        assert (await client.get_prompt("summarize-notes")).messages
        if sys.argv[1] != "legacy":
            async with client.listen(resource_subscriptions=["demo://notes"]) as changes:
                await client.call_tool("notes", {"action": "clear"})
                async for change in changes:
                    break
        print(client.protocol_version)

anyio.run(main)
"""


@pytest.mark.real
@pytest.mark.parametrize(("mode", "version"), [("legacy", "2025-11-25"), ("auto", MODERN), (MODERN, MODERN)])
def test_the_official_client_gets_on_with_it(real_part: Callable[[str], Path], mode: str, version: str) -> None:
    python = real_part("py/sdk") / "bin" / "python"
    command = [python, "-c", CLIENT, mode, *COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [version], done.stderr
