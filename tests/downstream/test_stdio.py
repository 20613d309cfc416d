"""The stdio front over real pipes and scripted servers: order, timing, endings; and going through another gateway (S8).

What lines and sessions do in general is test_stdio_front's affair.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from running import RunningGateway, StdioClient, command, echo_entry
from scripted import FACTS, Script
from trio.testing import MockClock

from gateway import app
from gateway.config.model import Settings
from tests.downstream.stdio_kit import answering, hello, opened, progress_and_reply, request, through
from tests.fixtures import http_scripted
from tests.fixtures.http_scripted import McpScript, serve

CALL = request("tools/call", {"name": "t"}, 9)


# --------------------------------------------------------------------------------------------------- order and timing
async def test_S7_requests_reach_the_server_in_their_order() -> None:
    script = Script()
    async with opened(script) as client:
        await client.hello()
        await client.ask("ping")
        for _ in range(5):  # the loop runs the tasks of one turn in any order
            script.seen.clear()
            names = [f"t{i}" for i in range(6)]
            await client.send(*(request("tools/call", {"name": name}, name) for name in names))
            for _ in names:
                await client.read()
            assert [m["params"]["name"] for m in script.seen] == names


async def test_S7_a_cancellation_right_behind_its_request_finds_it() -> None:
    script = answering(lambda pipe, message: None)
    async with opened(script) as client:
        await client.hello()
        await client.ask("ping")
        for id in range(10, 16):
            cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}
            await client.send(request("tools/call", {"name": "t"}, id), cancel)
            # "The receiver of a cancellation SHOULD NOT send a response."
            await client.silent()
        assert script.methods().count("notifications/cancelled") == 6
        assert (await client.ask("ping", id="on"))["id"] == "on"
        assert await client.end() == 0


async def test_A5_progress_and_the_reply_are_two_reads() -> None:
    """protocol.md 4.1: TypeScript clients drop progress that they read together with the reply."""
    async with opened(answering(progress_and_reply)) as client:
        await client.hello()
        await client.ask("ping")
        for id in range(5):
            await client.send(request("tools/call", {"name": "t", "_meta": {"progressToken": "mine"}}, id))
            note, reply = [json.loads(await client.output.receive_some(65536)) for _ in range(2)]
            assert note["params"] == {"progressToken": "mine", "progress": 1}
            assert reply["id"] == id


async def test_S9_stopped_while_idle_and_started_again_with_all_it_knew(autojump_clock: MockClock) -> None:
    script = Script()
    async with opened(script, idle_timeout_seconds=60) as client:
        await client.hello(roots={"listChanged": True})
        await client.ask("logging/setLevel", {"level": "debug"})
        assert script.running == 1
        await trio.sleep(61)
        assert script.running == 0
        script.seen.clear()
        assert "result" in await client.ask("tools/list")
        assert script.methods() == ["initialize", "notifications/initialized", "logging/setLevel", "tools/list"]
        first = script.seen[0]["params"]
        assert first["capabilities"] == {"roots": {"listChanged": True}} and first["clientInfo"]["name"] == "me"


async def test_S6_the_drain_is_bounded_by_the_request_timeout(autojump_clock: MockClock) -> None:
    script = answering(lambda pipe, message: None)
    async with opened(script, settings=Settings(request_timeout_seconds=30)) as client:
        await client.send(CALL)
        await trio.sleep(1)
        await client.input.aclose()
        await trio.sleep(28)
        assert client.status is None
        await trio.sleep(3)
        assert client.status == 0
        assert "30 s" in (await client.read())["error"]["message"]


async def test_list_changes_before_initialize_are_not_announced(autojump_clock: MockClock) -> None:
    async with opened(Script()) as client:
        hub = client.front.router.hub
        hub.publish("a", "tools")
        await trio.sleep(1)
        assert "result" in await client.ask("initialize", hello())
        hub.publish("a", "tools")
        await trio.sleep(1)
        assert (await client.read())["method"] == "notifications/tools/list_changed"


# ------------------------------------------------------------------------------------------- --gateway, in this process
class Original:
    """An original gateway: only ``POST /mcp`` with ``server_id``, and whatever the server says next is the answer."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.unreadable = 422
        self.bodies: list[dict[str, Any]] = []
        self.faults: dict[str, tuple[int, Any]] = {}

    async def __call__(self, got: http_scripted.Request, answer: http_scripted.Answer) -> None:
        if self.key and got.headers.get("authorization") != f"Bearer {self.key}":
            status = 403 if "authorization" in got.headers else 401
            await answer.json({"error": "Unauthorized", "message": "API key required"}, status)
        elif got.method != "POST" or got.target != "/mcp":
            await answer.send(404)
        else:
            await self.mcp(got.json, answer)

    async def mcp(self, body: dict[str, Any], answer: http_scripted.Answer) -> None:
        self.bodies.append(body)
        method = body["method"]
        if "server_id" not in body:
            await answer.send(self.unreadable, b"missing field `server_id`", "text/plain")
        elif body["server_id"] != "a":
            text = f"Server '{body['server_id']}' not found"
            await answer.json({"error": "Not Found", "message": text}, 404)
        elif method in self.faults:
            status, value = self.faults[method]
            await answer.json(value, status)
        elif "id" not in body:
            await answer.json({"error": "Bad Request", "message": "missing field `id`"}, 400)
        elif method == "initialize":
            await answer.json({"jsonrpc": "2.0", "id": body["id"], "result": FACTS})
        else:
            await answer.json({"jsonrpc": "2.0", "id": body["id"], "result": {"echo": body.get("params")}})


async def test_S8_an_original_gateway_is_asked_by_plain_calls() -> None:
    original = Original()
    async with serve(original) as server, through(server.url("/")) as client:
        facts = await client.hello(sampling={})
        assert facts["serverInfo"] == FACTS["serverInfo"]
        # What can't come back over single replies is not promised.
        assert facts["capabilities"] == {"tools": {}, "resources": {}}
        reply = await client.ask("tools/call", {"name": "t", "arguments": {"n": 2**60}}, "mine")
        assert reply == {"jsonrpc": "2.0", "id": "mine", "result": {"echo": {"name": "t", "arguments": {"n": 2**60}}}}
        await client.send({"jsonrpc": "2.0", "method": "notifications/roots/list_changed"})
        await server.until(lambda: len(original.bodies) == 4)
        assert await client.end() == 0
    first, ready, call, note = original.bodies
    assert first["method"] == "initialize" and first["params"]["capabilities"] == {}
    assert ready["method"] == "notifications/initialized" and "id" not in ready
    assert call["server_id"] == "a" and call["jsonrpc"] == "2.0" and type(call["id"]) is int
    assert note["method"] == "notifications/roots/list_changed"


async def test_S8_an_original_gateway_that_never_answers_notifications_delays_little() -> None:
    class Waits(Original):
        async def mcp(self, body: dict[str, Any], answer: http_scripted.Answer) -> None:
            if "id" not in body:
                await answer.gone()
            else:
                await super().mcp(body, answer)

    async with serve(Waits()) as server, through(server.url("")) as client:
        assert "result" in await client.ask("tools/list")


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ((502, {"error": "Bad Gateway", "message": "process exited with code 1"}), -32002, "exited with code 1"),
        ((502, {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "Gone"}}), -32002, "Gone"),
        ((504, {"error": "Gateway Timeout", "message": "late"}), -32002, "late"),
        ((500, {"error": "Internal Server Error", "message": "No response from server"}), -32002, "No response"),
        ((401, {"error": "Unauthorized", "message": "API key required"}), -32003, "API key required"),
        ((403, {"error": "Forbidden", "message": "Invalid API key"}), -32003, "MCP_GATEWAY_API_KEY"),
        ((200, {"jsonrpc": "2.0", "id": 77777, "result": {}}), -32000, "no reply to this request"),
        ((200, {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}), -32000, "no JSON-RPC reply"),
        ((404, {"error": "Not Found", "message": "Server 'a' not found"}), -32001, "Server 'a' not found"),
    ],
)
async def test_S8_faults_of_an_original_gateway(fault: tuple[int, Any], code: int, said: str) -> None:
    original = Original()
    async with serve(original) as server, through(server.url("")) as client:
        await client.hello()
        original.faults["tools/call"] = fault
        reply = await client.ask("tools/call", {"name": "t"}, "x")
        assert (reply["id"], reply["error"]["code"]) == ("x", code)
        assert said in reply["error"]["message"]
        assert "result" in await client.ask("tools/list")


async def test_S8_a_servers_own_error_passes_unchanged_through_an_original() -> None:
    error = {"code": -32602, "message": "no such tool", "data": [1]}

    class Fails(Original):
        async def mcp(self, body: dict[str, Any], answer: http_scripted.Answer) -> None:
            if body["method"] == "tools/call":
                await answer.json({"jsonrpc": "2.0", "id": body["id"], "error": error})
            else:
                await super().mcp(body, answer)

    async with serve(Fails()) as server, through(server.url("")) as client:
        await client.hello()
        assert (await client.ask("tools/call", {"name": "t"}))["error"] == error


async def test_S3_S8_an_original_gateway_without_that_server() -> None:
    async with serve(Original()) as server, through(server.url(""), "other") as client:
        await client.send(request("initialize", hello()))
        reply = await client.read()
        assert reply["id"] is None and reply["error"]["code"] == -32001
        assert reply["error"]["message"] == "Server 'other' not found in catalog"
        assert await client.ended() == 1


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_S8_an_original_gateway_has_no_merged_view(status: int) -> None:
    original = Original()
    original.unreadable = status
    async with serve(original) as server, through(server.url(""), None) as client:
        reply = await client.ask("initialize", hello())
        assert reply["error"]["code"] == -32002 and "name one of its servers" in reply["error"]["message"]


async def test_C15_S8_the_key_goes_along_and_without_it_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(Original("k3y")) as server:
        for key, code in (("", -32003), ("wrong", -32003), ("k3y", 0)):
            monkeypatch.setenv("MCP_GATEWAY_API_KEY", key)
            async with through(server.url("")) as client:
                for _ in range(4):  # also while the next attempt has to wait
                    reply = await client.ask("initialize", hello())
                    assert reply.get("error", {}).get("code", 0) == code
                    if code == 0:
                        break
                    assert "wrong" not in json.dumps(reply)


async def test_S8_what_is_no_gateway_at_all() -> None:
    async def script(got: http_scripted.Request, answer: http_scripted.Answer) -> None:
        await answer.send(404, b"<html>", "text/html")

    async with serve(script) as server, through(server.url("")) as client:
        reply = await client.ask("initialize", hello(), "x")
        assert reply["id"] == "x" and reply["error"]["code"] == -32002
        assert "no gateway at this URL" in reply["error"]["message"]


async def test_S8_everything_flows_both_ways() -> None:
    """Progress, a question on the call's stream, list changes, a cancellation; over a remote MCP endpoint."""
    remote = McpScript()
    answers: list[Any] = []
    changed = trio.Event()

    @remote.on("tools/call")
    async def call(got: http_scripted.Request, answer: http_scripted.Answer) -> None:
        body = got.json
        await answer.start_stream()
        if body["params"]["name"] == "hang":
            await answer.gone()
            return
        token = body["params"]["_meta"]["progressToken"]
        note = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": token, "progress": 1}}
        await answer.event(note)
        await answer.event(request("sampling/createMessage", {"messages": [], "maxTokens": 1}, "q"))
        while not answers:
            await trio.sleep(0.005)
        await answer.event({"jsonrpc": "2.0", "id": body["id"], "result": {"said": answers[0]}})
        await answer.end()

    async def stream(got: http_scripted.Request, answer: http_scripted.Answer) -> None:
        await answer.start_stream()
        await changed.wait()
        await answer.event({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        await answer.gone()

    async def script(got: http_scripted.Request, answer: http_scripted.Answer) -> None:
        assert got.target == "/servers/a%2Fb/mcp"
        if got.method == "POST" and got.json.get("id") == "q":
            answers.append(got.json["result"])
        await remote(got, answer)

    remote.stream = stream
    async with serve(script) as server, through(server.url(""), "a/b") as client:
        await client.hello(sampling={})
        await client.send(request("tools/call", {"name": "t", "_meta": {"progressToken": "p"}}, "c"))
        assert (await client.read())["params"] == {"progressToken": "p", "progress": 1}
        question = await client.read()
        await client.send({"jsonrpc": "2.0", "id": question["id"], "result": {"text": "yes"}})
        assert await client.read() == {"jsonrpc": "2.0", "id": "c", "result": {"said": {"text": "yes"}}}
        changed.set()
        assert (await client.read())["method"] == "notifications/tools/list_changed"
        await client.send(request("tools/call", {"name": "hang"}, "h"))
        await server.until(lambda: len(server.calls("tools/call")) == 2)
        await client.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "h"}})
        await server.until(lambda: len(server.calls("notifications/cancelled")) == 1)
        sent = server.calls("tools/call")[1].json["id"]
        assert server.calls("notifications/cancelled")[0].json["params"]["requestId"] == sent
        assert await client.end() == 0
        assert [r.method for r in server.seen].count("DELETE") == 1


async def test_S8_no_limits_of_our_own() -> None:
    read = app._through("http://127.0.0.1:1", "a")
    (spec,) = read.catalog.servers
    router = app.Gateway(app.Sources(), read).router
    assert router.timeout_of("a", router.snapshot) == float("inf")
    assert spec.idle_timeout_seconds == 0 and spec.health_check_interval_seconds == 0
    assert spec.start_timeout_seconds is not None and spec.start_timeout_seconds >= 3600
    assert spec.max_connections_per_server is not None and spec.max_connections_per_server >= 1000


# ------------------------------------------------------------------------------------ --gateway to a gateway of our own
@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Any:
    servers = [echo_entry("one"), echo_entry("two words", request_timeout_seconds=1), echo_entry("broken")]
    servers[2]["runtime"]["command"] = "/nonexistent/program"
    with RunningGateway(tmp_path_factory.mktemp("far"), servers, config={"api_key": "s3cret"}) as gateway:
        yield gateway


@pytest.fixture
def far_url(far: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MCP_GATEWAY_API_KEY", "s3cret")
    return f"http://127.0.0.1:{far.port}/"


async def test_S8_one_server_of_our_gateway(far_url: str) -> None:
    async with through(far_url, "two words") as client:
        assert (await client.hello())["serverInfo"]["name"] == "mcp-echo"
        assert "echo" in [t["name"] for t in (await client.ask("tools/list"))["result"]["tools"]]
        fail = (await client.ask("tools/call", {"name": "fail", "arguments": {}}))["result"]
        assert fail == {"content": [{"type": "text", "text": "ValueError: asked to fail"}], "isError": True}
        assert (await client.ask("tools/call", {"name": "none"}))["error"]["code"] == -32602
        params = {"name": "progress", "arguments": {"steps": 3}, "_meta": {"progressToken": 5}}
        await client.send(request("tools/call", params, 1))
        notes = [await client.read() for _ in range(3)]
        assert [n["params"]["progress"] for n in notes] == [1, 2, 3] and notes[0]["params"]["progressToken"] == 5
        assert "result" in await client.read()
        # The far gateway's own limit, in its own words, and the near one goes on.
        late = await client.ask("tools/call", {"name": "sleep", "arguments": {"seconds": 9}})
        assert late["result"]["isError"] and "within 1 s" in late["result"]["content"][0]["text"]
        assert "result" in await client.ask("tools/list")


async def test_S8_all_servers_of_our_gateway_under_its_own_names(far_url: str) -> None:
    async with through(far_url, None) as client:
        assert (await client.hello())["serverInfo"]["name"] == "open-mcp-gateway"
        names = [t["name"] for t in (await client.ask("tools/list"))["result"]["tools"]]
        assert "one__echo" in names
        result = (await client.ask("tools/call", {"name": "one__echo", "arguments": {"text": "hi"}}))["result"]
        assert result["content"][0]["text"] == "hi"


@pytest.mark.parametrize("first", [request("initialize", hello()), request("tools/list")])
async def test_S3_S8_unknown_to_our_gateway(far_url: str, first: dict[str, Any]) -> None:
    async with through(far_url, "nope") as client:
        await client.send(first)
        reply = await client.read()
        assert (reply["id"], reply["error"]["code"]) == (None, -32001)
        assert reply["error"]["message"] == "Server 'nope' not found in catalog"
        assert await client.ended() == 1


async def test_S4_S8_a_server_that_our_gateway_can_not_start(far_url: str) -> None:
    async with through(far_url, "broken") as client:
        reply = await client.ask("initialize", hello(), "x")
        assert (reply["id"], reply["error"]["code"]) == ("x", -32002)
        assert "/nonexistent/program" in reply["error"]["message"]


async def test_S8_refused_by_our_gateway(far_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MCP_GATEWAY_API_KEY")
    async with through(far_url, "one") as client:
        reply = await client.ask("tools/call", {"name": "echo"}, "x")
        assert (reply["id"], reply["error"]["code"]) == ("x", -32003)


async def test_S8_a_session_outlives_the_gateway_that_it_goes_through(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with through(f"http://127.0.0.1:{port}", "one") as client:
        reply = await client.ask("initialize", hello(), "x")
        assert (reply["id"], reply["error"]["code"]) == ("x", -32002)
        assert "refused" in reply["error"]["message"]
        echo = {"name": "echo", "arguments": {"text": "a"}}
        for _ in range(2):
            far = await trio.to_thread.run_sync(
                lambda: RunningGateway(tmp_path, [echo_entry("one")], listen=f"127.0.0.1:{port}")
            )
            try:
                with trio.fail_after(10):
                    while "error" in (reply := await client.ask("tools/call", echo)):
                        assert reply["error"]["code"] == -32002
                        await trio.sleep(0.1)
                assert reply["result"]["content"][0]["text"] == "a"
            finally:
                await trio.to_thread.run_sync(far.stop)


# ------------------------------------------------------------------------------------------------- as a desktop runs it
@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.yaml"
    path.write_text(json.dumps({"servers": [echo_entry("one"), echo_entry("two")]}))
    return path


def argv(catalog: Path) -> list[str]:
    return [*command(), "stdio", "-c", str(catalog), "-s", "one"]


ECHO = json.dumps(request("tools/call", {"name": "echo", "arguments": {"text": "hi"}}, 3)).encode() + b"\n"


def echoed(data: bytes) -> bool:
    reply = json.loads(data)
    return bool(reply["id"] == 3 and reply["result"]["content"][0]["text"] == "hi")


@pytest.mark.parametrize("kind", ["file", "null", "socket"])
def test_S1_S6_whatever_stdin_and_stdout_are(catalog: Path, kind: str) -> None:
    given, taken = catalog.with_name("in"), catalog.with_name("out")
    given.write_bytes(ECHO)
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "timeout": 20}
    if kind == "socket":  # one socket for both, as inetd has it
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(ECHO)
            ours.shutdown(socket.SHUT_WR)
            done = subprocess.run(argv(catalog), stdin=theirs, stdout=theirs, **options)
            out = ours.recv(65536)
            assert os.get_blocking(theirs.fileno())  # the mode is everybody's who shares the socket
    else:
        with open(os.devnull if kind == "null" else given, "rb") as read, taken.open("wb") as write:
            done = subprocess.run(argv(catalog), stdin=read, stdout=write, **options)
        out = taken.read_bytes()
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert out == b"" if kind == "null" else echoed(out)


def test_S1_a_full_disk_is_an_end_and_no_traceback(catalog: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv(catalog), input=ECHO, stdout=full, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_S1_a_terminal_keeps_its_mode(catalog: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        modes = termios.tcgetattr(theirs)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        with subprocess.Popen(argv(catalog), stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as process:
            os.write(ours, ECHO)
            data = b""
            while b"\n" not in data:
                assert select.select([ours], [], [], 10)[0]
                data += os.read(ours, 65536)
            assert echoed(data)
            assert os.get_blocking(theirs)
            os.write(ours, b"\x04")  # Ctrl-D
            assert process.wait(10) == 0
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_A10_C16_a_signal_lets_calls_in_flight_end_and_leaves_nothing(catalog: Path, number: int) -> None:
    client = StdioClient(argv(catalog))
    reply = client.request("tools/call", {"name": "info", "arguments": {}})
    server = json.loads(reply["result"]["content"][0]["text"])["pid"]
    client.send(request("tools/call", {"name": "sleep", "arguments": {"seconds": 0.3}}, "last"))
    client.request("ping")
    client.process.send_signal(number)
    assert client.process.stdout is not None and client.process.stdin is not None
    (last,) = client.process.stdout.read().splitlines()
    assert json.loads(last)["id"] == "last" and "result" in json.loads(last)
    assert client.process.wait(10) == 0
    assert not Path(f"/proc/{server}").exists()
    client.process.stdin.close()
    client.process.stdout.close()


def test_A14_no_openssl_and_little_memory(catalog: Path) -> None:
    client = StdioClient(argv(catalog))
    client.request("tools/call", {"name": "echo", "arguments": {"text": "a"}})
    proc = Path(f"/proc/{client.process.pid}")
    if (proc / "smaps_rollup").exists():
        maps = (proc / "maps").read_text()
        assert "libssl" not in maps and "libcrypto" not in maps
        with (proc / "smaps_rollup").open() as rows:
            (pss,) = [int(row.split()[1]) for row in rows if row.startswith("Pss:")]
        # Of the sources; the figure of the archive, which is lower, is the benchmark's affair.
        assert pss * 1024 < 30e6
    assert client.close() == 0


def test_S9_the_watched_catalog_brings_and_takes_servers(catalog: Path) -> None:
    client = StdioClient(argv(catalog)[:-2])
    client.request("tools/list")
    pid = client.request("tools/call", {"name": "one__info", "arguments": {}})["result"]["content"][0]["text"]
    new = catalog.with_name("new")
    new.write_text(json.dumps({"servers": [echo_entry("one"), echo_entry("three")]}))
    new.replace(catalog)
    until = time.monotonic() + 10
    while not any(note["method"] == "notifications/tools/list_changed" for note in client.notes):
        assert time.monotonic() < until
        client.request("ping")
        time.sleep(0.05)
    names = {t["name"] for t in client.request("tools/list")["result"]["tools"]}
    assert "three__echo" in names and "one__echo" in names and "two__echo" not in names
    assert "error" in client.request("tools/call", {"name": "two__echo", "arguments": {"text": "a"}})
    again = client.request("tools/call", {"name": "one__info", "arguments": {}})["result"]["content"][0]["text"]
    assert json.loads(again)["pid"] == json.loads(pid)["pid"]  # an unchanged server is untouched
    assert client.close() == 0
