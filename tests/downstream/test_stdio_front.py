"""The stdio front: over a scripted router and real pipes, and as a process between a client and real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
from running import RunningGateway, command, echo_entry
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.downstream.lines import APART, MAX_QUEUED, Lines
from gateway.downstream.stdio import COALESCE, MAX_CALLS, StdioFront
from gateway.errors import LinkLost, StartFailed, UpstreamTimeout
from gateway.exchange import Reply
from gateway.protocol.message import build_notification
from gateway.protocol.session import VENDOR_DATA
from tests.downstream.legacy_kit import FACTS, FakeRouter, Question, progress

HELLO = {"protocolVersion": "2025-06-18", "capabilities": {"roots": {}}, "clientInfo": {"name": "t", "version": "1"}}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}
GATEWAY = {"source": "gateway"}


def request(id: Any, method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def call(id: Any, **arguments: Any) -> dict[str, Any]:
    return request(id, "tools/call", name="echo", arguments=arguments)


def result(id: Any, **result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "result": result}


def answered(text: str = "{}") -> Reply:
    return Reply.result(text)


class Pair:
    """A client of the front: its end of both pipes. ``status`` is what ``run`` returned."""

    def __init__(self, router: FakeRouter, server_id: str | None, limit: int, remote: bool) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self.ends = (theirs_in, theirs_out)
        self.write = trio.lowlevel.FdStream(ours_out)
        self.read = trio.lowlevel.FdStream(ours_in)
        self.lines = Lines(theirs_in, theirs_out)
        self.front = StdioFront(
            router,  # type: ignore[arg-type]
            server_id,
            self.lines,
            max_message_bytes=limit,
            remote=remote,
        )
        self.status: int | None = None
        self.ended = trio.Event()
        self._rest = b""

    async def serve(self) -> None:
        self.status = await self.front.run()
        self.lines.close()
        for end in self.ends:
            os.close(end)
        self.ended.set()

    async def send(self, *messages: Any) -> None:
        """Write messages in one go; bytes as they are."""
        await self.write.send_all(b"".join(m if type(m) is bytes else json.dumps(m).encode() + b"\n" for m in messages))

    async def receive(self) -> Any:
        """The next message."""
        with trio.fail_after(5):
            while b"\n" not in self._rest:
                data = await self.read.receive_some(65536)
                assert data, f"the front closed its output after {self._rest!r}"
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    async def silent(self) -> bool:
        """Whether nothing is on its way to the client."""
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.01) as scope:
            self._rest += await self.read.receive_some(65536)
        return scope.cancelled_caught and not self._rest

    async def greet(self, **hello: Any) -> Any:
        await self.send(request(0, "initialize", **{**HELLO, **hello}), INITIALIZED)
        return (await self.receive())["result"]

    async def close(self) -> int:
        """Close our input: its exit status, and that nothing more was said."""
        await self.write.aclose()
        with trio.fail_after(100):
            await self.ended.wait()
        assert self.status is not None
        return self.status

    async def everything(self) -> list[Any]:
        """Close its input, and all that it still says."""
        await self.write.aclose()
        data = self._rest
        self._rest = b""
        with trio.fail_after(100):
            while more := await self.read.receive_some(65536):
                data += more
        assert not data or data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]


@asynccontextmanager
async def desk(
    router: FakeRouter, server_id: str | None = "echo", *, limit: int = 1 << 20, remote: bool = False
) -> AsyncIterator[Pair]:
    pair = Pair(router, server_id, limit, remote)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.serve)
        try:
            yield pair
            await pair.write.aclose()
            await pair.read.aclose()
            with trio.fail_after(100):
                await pair.ended.wait()
        finally:
            nursery.cancel_scope.cancel()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


# ---------------------------------------------------------------------------------------------------------- handshake
async def test_S1_S7_full_duplex(router: FakeRouter) -> None:
    """Answers come in any order, under the client's ids with their types; notifications never wait for an answer."""
    async with desk(router) as client:
        assert await client.greet() == {**FACTS, "protocolVersion": "2025-06-18"}
        (me,) = router.clients
        assert (me.capabilities, me.info, me.version) == ({"roots": {}}, {"name": "t", "version": "1"}, "2025-06-18")
        await client.send(
            call(7), call("7"), {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}, call(7.5)
        )
        for at, id in reversed(list(enumerate([7, "7", 7.5]))):
            (await router.call(at)).finish(answered(f'{{"at":{at}}}'))
            assert await client.receive() == result(id, at=at)
        assert [method for method, _, _ in router.notified] == ["notifications/roots/list_changed"]
        assert await client.close() == 0
        assert router.closed == [me]


@pytest.mark.parametrize(
    ("asked", "agreed"),
    [("2024-11-05", "2024-11-05"), ("2026-07-28", "2025-11-25"), ("nonsense", "2025-11-25"), (None, "2025-11-25")],
)
async def test_S1_the_version_agreed_on(router: FakeRouter, asked: Any, agreed: str) -> None:
    async with desk(router) as client:
        assert (await client.greet(protocolVersion=asked))["protocolVersion"] == agreed


async def test_S6_lines_after_initialize_wait_for_its_answer_and_keep_their_order(router: FakeRouter) -> None:
    router.initialize_gate = trio.Event()
    async with desk(router) as client:
        await client.send(request(0, "initialize", **HELLO), INITIALIZED, *(call(n) for n in range(1, 21)))
        await wait_all_tasks_blocked()
        assert router.calls == []
        router.initialize_gate.set()
        assert (await client.receive())["id"] == 0
        await router.call(19)
        assert [each.exchange.message.id for each in router.calls] == list(range(1, 21))


async def test_a_failed_initialize_can_be_tried_again(router: FakeRouter) -> None:
    router.initialize_error = StartFailed("process exited with code 1")
    async with desk(router) as client:
        await client.send(request(1, "initialize", **HELLO))
        refused = await client.receive()
        assert (refused["id"], refused["error"]["code"]) == (1, -32002)
        router.initialize_error = None
        await client.send(request(2, "initialize", **HELLO))
        assert (await client.receive())["result"]["serverInfo"] == FACTS["serverInfo"]
        await client.send(request(3, "initialize", **HELLO))
        assert (await client.receive())["error"]["code"] == -32600


async def test_S6_a_request_without_a_handshake_is_answered_after_the_end_of_the_input(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.send(call(1))
        made = await router.call()
        assert (made.exchange.client.capabilities, made.exchange.client.version) == ({}, "2025-11-25")
        await client.write.aclose()
        await wait_all_tasks_blocked()
        assert not client.ended.is_set()
        made.finish(answered())
        assert await client.receive() == result(1)
        assert await client.close() == 0
    async with desk(router) as client:
        await client.send(json.dumps(call(2)).encode())  # and a last line needs no newline
        await client.write.aclose()
        (await router.call(1)).finish(answered())
        assert await client.receive() == result(2)


async def test_S6_requests_without_a_handshake_keep_their_order_while_the_server_starts(router: FakeRouter) -> None:
    router.initialize_gate = trio.Event()
    async with desk(router) as client:
        await client.send(*(call(n) for n in range(20)))
        await wait_all_tasks_blocked()
        assert router.calls == []
        router.initialize_gate.set()
        await router.call(19)
        assert [each.exchange.message.id for each in router.calls] == list(range(20))


# ------------------------------------------------------------------------------------------------------ bad messages
async def test_S5_bad_json_is_told_and_the_next_line_is_read(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.send(b"\r\n  \n{not json}\r\n", call(1))
        error = (await client.receive())["error"]
        assert (error["code"], error["message"], error["data"]["source"]) == (
            -32700,
            "Parse error: invalid JSON",
            "gateway",
        )
        (await router.call()).finish(answered())
        assert await client.receive() == result(1)


@pytest.mark.parametrize(
    ("line", "id", "code"),
    [
        (b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}', None, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":NaN}}', None, -32700),
        (b'\xef\xbb\xbf{"jsonrpc":"2.0","id":1,"method":"ping"}', None, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', None, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 129 + b"]" * 129 + b"}", None, -32700),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', 1, -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', 1, -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"tools/list"}', None, -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', None, -32600),
        (b'"ping"', None, -32600),
    ],
)
async def test_RB26_what_two_parsers_could_read_differently_is_refused(
    router: FakeRouter, line: bytes, id: Any, code: int
) -> None:
    async with desk(router) as client:
        await client.send(line + b"\n", request("after", "ping"))
        refused = await client.receive()
        assert (refused["id"], refused["error"]["code"]) == (id, code)
        assert await client.receive() == result("after")
    assert router.calls == []


async def test_RB09_a_line_over_the_limit_is_refused_and_the_next_one_read(router: FakeRouter) -> None:
    async with desk(router, limit=10_000) as client:
        await client.send(call(1, text="x" * 300_000), request(2, "ping"))
        error = (await client.receive())["error"]
        assert error["code"] == -32600
        assert "max_message_bytes" in error["message"]
        assert await client.receive() == result(2)
    assert router.calls == []


async def test_RB27_batches_only_where_2025_03_26_was_agreed_on(router: FakeRouter) -> None:
    batch = json.dumps([call(1), INITIALIZED, request(2, "ping"), {"jsonrpc": "2.0", "id": 3}]).encode() + b"\n"
    async with desk(router) as client:
        await client.send(batch)
        assert (await client.receive())["error"]["code"] == -32600
        await client.greet()
        await client.send(batch)
        assert (await client.receive())["error"]["code"] == -32600
    async with desk(router) as client:
        await client.greet(protocolVersion="2025-03-26")
        await client.send(batch)
        (await router.call()).finish(answered())
        replies = {reply["id"]: reply for reply in await client.receive()}
        assert replies[1] == result(1)
        assert replies[2] == result(2)
        assert len(replies) == 3
        await client.send(b"[]\n")
        assert (await client.receive())["error"]["code"] == -32600
        await client.send(json.dumps([request(n, "ping") for n in range(101)]).encode() + b"\n")
        assert (await client.receive())["error"]["code"] == -32600
        await client.send(json.dumps([INITIALIZED, INITIALIZED]).encode() + b"\n", request("next", "ping"))
        assert (await client.receive())["id"] == "next"


async def test_RB28_an_id_in_use_gets_a_clear_error(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.send(call(1, text="first"))
        made = await router.call()
        await client.send(call(1, text="second"))
        refused = await client.receive()
        assert (refused["id"], refused["error"]["code"]) == (1, -32600)
        assert "still running" in refused["error"]["message"]
        made.finish(answered())
        assert await client.receive() == result(1)


# --------------------------------------------------------------------------------------------------- the rest of a call
async def test_A5_progress_comes_before_the_reply(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.greet()
        await client.send(call(1))
        made = await router.call()
        for value in range(3):
            made.deliver(progress(value))
        made.finish(answered())
        seen = [await client.receive() for _ in range(4)]
        assert [m["params"]["progress"] for m in seen[:3]] == [0, 1, 2]
        assert seen[3] == result(1)


async def test_A5_the_last_progress_and_the_reply_are_not_read_as_one(
    router: FakeRouter, autojump_clock: MockClock
) -> None:
    """protocol.md section 4.1: TypeScript clients drop progress that comes in one piece with the reply."""
    async with desk(router) as client:
        await client.send(call(1))
        made = await router.call()
        made.deliver(progress(1))
        made.finish(answered())
        assert (await client.receive())["params"]["progress"] == 1
        told = trio.current_time()
        assert await client.receive() == result(1)
        assert trio.current_time() - told >= APART / 2


async def test_A5_a_question_is_answered_by_the_client(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.greet()
        await client.send(call("c"))
        made = await router.call()
        of_call, of_session = Question("elicitation/create", 5), Question("roots/list", "r")
        made.deliver(of_call.ask)
        first = await client.receive()
        assert router.clients[0].owner is not None
        assert router.clients[0].owner.ask(of_session.ask)
        second = await client.receive()
        assert (first["method"], second["method"]) == ("elicitation/create", "roots/list")
        assert first["id"] != second["id"]
        refusal = {"jsonrpc": "2.0", "id": second["id"], "error": {"code": -32601, "message": "no"}}
        await client.send(refusal, result(first["id"], action="accept"), result(99, nobody="asked"))
        with trio.fail_after(5):
            await of_call.answered.wait()
            await of_session.answered.wait()
        assert of_call.answers == [result(5, action="accept")]
        assert of_session.answers[0]["id"] == "r"
        assert of_session.answers[0]["error"]["code"] == -32601
        made.finish(answered())
        assert await client.receive() == result("c")


async def test_A5_a_question_taken_back_is_told(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.greet()
        await client.send(call(1))
        made = await router.call()
        question = Question()
        made.deliver(question.ask)
        asked = await client.receive()
        question.ask.withdraw("changed my mind")
        told = await client.receive()
        assert told["method"] == "notifications/cancelled"
        assert told["params"] == {"requestId": asked["id"], "reason": "changed my mind"}
        made.finish(answered())
        assert await client.receive() == result(1)


async def test_A5_a_question_before_initialized_waits_for_it(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.send(request(0, "initialize", **HELLO))
        await client.receive()
        owner = router.clients[0].owner
        assert owner is not None
        assert owner.ask(Question().ask)
        assert await client.silent()
        await client.send(INITIALIZED)
        assert (await client.receive())["method"] == "roots/list"


async def test_A5_cancelling_tells_the_server_and_gets_no_reply(router: FakeRouter) -> None:
    """Also in the same write as the request: a cancellation never overtakes what it is about."""
    taken: dict[str, Any] = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": 1, "reason": "bored"},
    }
    async with desk(router) as client:
        await client.greet()
        await client.send(call(1), taken, request(2, "ping"))
        assert await client.receive() == result(2)
        made = await router.call()
        assert await client.silent()
        assert router.link.cancelled == [(1, "bored")]
        assert made.done
        taken["params"]["requestId"] = 4  # nothing yet, so nothing is taken back
        await client.send(taken, call(1), call(4), request(3, "ping"))
        assert await client.receive() == result(3)
        for at, id in ((1, 1), (2, 4)):
            (await router.call(at)).finish(answered())
            assert await client.receive() == result(id)


async def test_list_changes_are_joined_to_one_notification(router: FakeRouter, autojump_clock: MockClock) -> None:
    async with desk(router) as client:
        await client.greet()
        await wait_all_tasks_blocked()
        for _ in range(4):
            router.hub.publish("echo", "tools")
            router.hub.publish("other", "prompts")
            await trio.sleep(COALESCE / 5)
        assert await client.receive() == {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}
        owner = router.clients[0].owner
        assert owner is not None
        owner.mark("resource:file:///a")
        owner.mark("resource:file:///a")
        told = await client.receive()
        assert (told["method"], told["params"]) == ("notifications/resources/updated", {"uri": "file:///a"})
        owner.notify(build_notification("notifications/message", '{"level":"info","data":1}'))
        assert (await client.receive())["method"] == "notifications/message"
        assert await client.silent()


# -------------------------------------------------------------------------------------------------------------- faults
async def test_S3_an_unknown_server_ends_it_at_once(router: FakeRouter) -> None:
    async with desk(router, "nope") as client:
        assert await client.everything() == [
            {
                "jsonrpc": "2.0",
                "id": None,
                "error": {"code": -32001, "message": "Server 'nope' not found in catalog", "data": GATEWAY},
            }
        ]
        assert client.status == 1


async def test_S4_a_server_that_does_not_start_is_told_and_the_front_stays(router: FakeRouter) -> None:
    router.script["tools/call"] = lambda exchange: StartFailed("process exited with code 3")
    router.script["tools/list"] = lambda exchange: LinkLost("Server 'echo' ended")
    router.script["prompts/list"] = lambda exchange: UpstreamTimeout("no answer within 30 s")
    async with desk(router) as client:
        for message, code, text in (
            (call("a"), -32002, "Failed to connect to server: process exited with code 3"),
            (request("b", "tools/list"), -32000, "Server error: Server 'echo' ended"),
            (request("c", "prompts/list"), -32000, "Server error: no answer within 30 s"),
        ):
            await client.send(message)
            reply = await client.receive()
            assert (reply["id"], reply["error"]["code"], reply["error"]["message"]) == (message["id"], code, text)
            assert reply["error"]["data"]["source"] == "gateway"
        await client.send(request(4, "ping"))
        assert await client.receive() == result(4)


async def test_the_merged_view_shows_faults_as_mcp_does(router: FakeRouter) -> None:
    """protocol.md section 7: a tool's fault is a result that the model reads, any other -32603."""
    router.script["tools/call"] = lambda exchange: StartFailed("process exited with code 3")
    router.script["prompts/get"] = lambda exchange: StartFailed("process exited with code 3")
    async with desk(router, None) as client:
        await client.send(call(1))
        reply = (await client.receive())["result"]
        assert (reply["isError"], reply["content"][0]["text"]) == (True, "process exited with code 3")
        assert reply["_meta"][VENDOR_DATA]["source"] == "gateway"
        await client.send(request(2, "prompts/get", name="p"))
        error = (await client.receive())["error"]
        assert (error["code"], error["data"]["source"]) == (-32603, "gateway")
        assert "code 3" in error["data"]["reason"]


async def test_a_defect_costs_one_request(
    router: FakeRouter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(exchange: Any) -> Reply:
        raise ZeroDivisionError("secret internals")

    router.script["tools/call"] = broken
    async with desk(router) as client:
        await client.send(call(1), request(2, "ping"))
        replies = {reply["id"]: reply for reply in [await client.receive(), await client.receive()]}
        assert replies[1]["error"] == {"code": -32603, "message": "Internal error", "data": GATEWAY}
        assert replies[2] == result(2)
    assert "unexpected failure" in caplog.text


# -------------------------------------------------------------------------------------------------------- its own end
async def test_S6_questions_after_the_end_of_the_input_are_declined(
    router: FakeRouter, autojump_clock: MockClock
) -> None:
    async with desk(router) as client:
        await client.greet()
        await client.send(call(1))
        made = await router.call()
        before, after = Question("elicitation/create", 5), Question("roots/list", 6)
        made.deliver(before.ask)
        assert (await client.receive())["method"] == "elicitation/create"
        await client.write.aclose()
        with trio.fail_after(5):
            await before.answered.wait()
        assert before.answers == [result(5, action="cancel")]
        made.deliver(after.ask)
        with trio.fail_after(5):
            await after.answered.wait()
        assert after.answers[0]["error"]["code"] == -32601
        made.finish(answered())
        assert [m for m in await client.everything() if "method" not in m] == [result(1)]
        assert client.status == 0


async def test_S6_nobody_left_to_read_ends_it(router: FakeRouter, autojump_clock: MockClock) -> None:
    """A client that was killed has closed both pipes: calls in flight are cancelled, not waited for."""
    async with desk(router) as client:
        await client.send(call(1))
        made = await router.call()
        await client.read.aclose()
        assert await client.close() == 0
        assert made.done


async def test_S6_output_closed_first_ends_it_too(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.read.aclose()
        await client.send(request(1, "ping"))
        with trio.fail_after(5):
            await client.ended.wait()
        assert client.status == 0


async def test_S9_a_session_outlives_any_silence(router: FakeRouter, autojump_clock: MockClock) -> None:
    """session_idle_seconds is for HTTP, where nobody tells that a client has gone; here the pipe does."""
    async with desk(router) as client:
        await client.greet()
        await trio.sleep(48 * 3600)
        question = Question()
        owner = router.clients[0].owner
        assert owner is not None
        assert owner.ask(question.ask)
        assert (await client.receive())["method"] == "roots/list"
        assert router.closed == []


async def test_stopping_waits_for_what_is_in_flight_and_takes_no_more(
    router: FakeRouter, autojump_clock: MockClock
) -> None:
    async with desk(router) as client:
        await client.send(call(1), call(2))
        first, second = await router.call(0), await router.call(1)
        began = trio.current_time()
        client.front.stop(10)
        await client.send(call(3))
        await trio.sleep(1)
        first.finish(answered())
        assert await client.receive() == result(1)
        with trio.fail_after(20):
            await client.ended.wait()
        assert 9.9 <= trio.current_time() - began <= 11
        assert second.done
        assert len(router.calls) == 2


# ------------------------------------------------------------------------------------------------------- slow clients
async def test_never_half_a_line_however_slowly_the_client_reads(router: FakeRouter) -> None:
    texts = [chr(ord("a") + n) * (n * 50_000 + 1) for n in range(10)]
    router.script["tools/call"] = lambda exchange: answered(json.dumps({"text": texts[exchange.message.id]}))
    async with desk(router) as client:
        await client.send(*(call(n) for n in range(10)), request("last", "ping"))
        await wait_all_tasks_blocked()
        data = b""
        while data.count(b"\n") < 11:
            data += await client.read.receive_some(777)
        replies = {reply["id"]: reply for reply in map(json.loads, data.splitlines())}
        assert [replies[n]["result"]["text"] for n in range(10)] == texts


async def test_RB09_a_client_that_does_not_read_costs_bounded_memory(router: FakeRouter) -> None:
    """Its requests are no longer read, notifications are dropped; replies and questions are kept."""
    big = "x" * 1_000_000
    router.script["tools/call"] = lambda exchange: answered(json.dumps({"text": big}))
    async with desk(router) as client:
        await client.greet()
        owner = router.clients[0].owner
        assert owner is not None
        log = build_notification("notifications/message", json.dumps({"data": big}))
        for _ in range(200):
            owner.notify(log)
        question = Question()
        assert owner.ask(question.ask)
        assert client.lines._queued < MAX_QUEUED + 2 * len(big)

        async with trio.open_nursery() as nursery:
            sent: list[int] = []

            async def ask_on() -> None:
                for n in range(2000):
                    await client.send(call(n, text="y" * 1000))
                    sent.append(n)

            nursery.start_soon(ask_on)
            await wait_all_tasks_blocked()
            assert len(sent) < 1000
            assert client.lines._queued < MAX_QUEUED + 100 * len(big)
            nursery.cancel_scope.cancel()
        asked = 0
        while asked == 0:
            asked = (await client.receive()).get("method") == "roots/list"


async def test_requests_beyond_the_limit_are_refused(router: FakeRouter) -> None:
    async with desk(router) as client:
        await client.send(*(call(n) for n in range(MAX_CALLS)))
        await router.call(MAX_CALLS - 1)
        await client.send(call("one more"))
        refused = await client.receive()
        assert (refused["id"], refused["error"]["code"]) == ("one more", -32000)
        assert str(MAX_CALLS) in refused["error"]["message"]


async def test_the_mode_of_the_descriptors_is_put_back() -> None:
    read, write = os.pipe()
    lines = Lines(read, write)
    assert not os.get_blocking(read)
    assert not os.get_blocking(write)
    lines.close()
    assert os.get_blocking(read)
    assert os.get_blocking(write)
    os.close(read)
    os.close(write)


async def test_files_and_devices_serve_as_standard_files(router: FakeRouter, tmp_path: Path) -> None:
    given, told = tmp_path / "in", tmp_path / "out"
    given.write_text(json.dumps(request(1, "ping")) + "\n")
    with given.open("rb") as source, told.open("wb") as sink:
        front = StdioFront(router, "echo", Lines(source.fileno(), sink.fileno()), max_message_bytes=1000)  # type: ignore[arg-type]
        with trio.fail_after(5):
            assert await front.run() == 0
    assert json.loads(told.read_text()) == result(1)
    with open(os.devnull, "r+b") as null:
        front = StdioFront(router, "echo", Lines(null.fileno(), null.fileno()), max_message_bytes=1000)  # type: ignore[arg-type]
        with trio.fail_after(5):
            assert await front.run() == 0


# ------------------------------------------------------------------------------------------------ as a real process
class Proxy:
    """``gateway stdio`` as a child process; lines both ways."""

    def __init__(self, *words: str, folder: Path, env: dict[str, str] | None = None) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MCP_", "RUST_LOG"))}
        self.stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [*command(), "stdio", *words],
            cwd=folder,
            env={**inherited, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
        )
        self.others: list[dict[str, Any]] = []
        self._id = 0

    def send(self, *messages: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(json.dumps(m).encode() + b"\n" for m in messages))
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        return dict(json.loads(line))

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The reply to a request; what comes before it is kept in ``others``."""
        self._id += 1
        self.send(request(self._id, method, **params))
        while (message := self.receive()).get("id") != self._id or "method" in message:
            self.others.append(message)
        return message

    def greet(self) -> Any:
        facts = self.ask("initialize", **HELLO)
        self.send(INITIALIZED)
        return facts.get("result") or facts["error"]

    def tool(self, tool: str, **arguments: Any) -> str:
        reply = self.ask("tools/call", name=tool, arguments=arguments)
        assert "result" in reply, reply
        return str(reply["result"]["content"][0]["text"])

    def until(self, method: str) -> dict[str, Any]:
        """The next notification of this method."""
        while (message := self.receive()).get("method") != method:
            self.others.append(message)
        return message

    def log(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Close its input: exit status and what it still said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        said = [json.loads(line) for line in self.process.stdout]
        return self.process.wait(20), said

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.stderr.close()


def catalog(folder: Path, *entries: dict[str, Any]) -> str:
    path = folder / "catalog.yaml"
    new = folder / "catalog.new"
    new.write_text(json.dumps({"servers": entries}))
    new.replace(path)
    return str(path)


def await_that(holds: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_S6_C9_direct_mode_runs_the_server_and_leaves_nothing(tmp_path: Path) -> None:
    with Proxy("-s", "echo", "-c", catalog(tmp_path, echo_entry("echo")), folder=tmp_path) as proxy:
        assert proxy.greet()["serverInfo"]["name"] == "mcp-echo"
        pid = json.loads(proxy.tool("info"))["pid"]
        assert runs(pid)
        assert proxy.end() == (0, [])
        assert not runs(pid)


def test_S10_K5_the_clients_environment_reaches_the_server(tmp_path: Path) -> None:
    given = {"NOTES_TOKEN": "from the client", "MCP_GATEWAY_API_KEY": "the gateway's own"}
    entry = echo_entry("echo", env={"OWN": "${NOTES_TOKEN}!"})
    with Proxy("-s", "echo", "-c", catalog(tmp_path, entry), folder=tmp_path, env=given) as proxy:
        seen = json.loads(proxy.tool("info"))["env"]
    assert (seen["NOTES_TOKEN"], seen["OWN"]) == ("from the client", "from the client!")
    assert "MCP_GATEWAY_API_KEY" not in seen


def test_S3_S4_S5_of_the_process(tmp_path: Path) -> None:
    missing = {"id": "bad", "runtime": {"type": "local-process", "command": "/does/not/exist"}}
    path = catalog(tmp_path, echo_entry("echo"), missing)
    with Proxy("-s", "X", "-c", path, folder=tmp_path) as proxy:
        assert proxy.process.wait(20) == 1  # without having been told anything
        status, said = proxy.end()
        assert (status, [(m["id"], m["error"]["code"], m["error"]["message"]) for m in said]) == (
            1,
            [(None, -32001, "Server 'X' not found in catalog")],
        )
    with Proxy("-s", "bad", "-c", path, folder=tmp_path) as proxy:
        for _ in range(2):
            error = proxy.greet()
            assert error["code"] == -32002
            assert error["message"].startswith("Failed to connect to server: ")
            assert "/does/not/exist" in error["message"]
        assert proxy.ask("ping")["result"] == {}
        assert proxy.end() == (0, [])
        assert "Traceback" not in proxy.log()


def test_S9_a_crash_is_an_error_and_the_session_goes_on(tmp_path: Path) -> None:
    with Proxy("-s", "echo", "-c", catalog(tmp_path, echo_entry("echo")), folder=tmp_path) as proxy:
        proxy.greet()
        first = json.loads(proxy.tool("info"))["pid"]
        error = proxy.ask("tools/call", name="exit", arguments={"code": 3})["error"]
        assert (error["code"], error["data"]["source"]) == (-32000, "gateway")
        assert error["message"].startswith("Server error: ")
        assert json.loads(proxy.tool("info"))["pid"] != first


def test_S9_an_idle_server_is_stopped_and_started_again(tmp_path: Path) -> None:
    entry = echo_entry("echo", idle_timeout_seconds=0.3)
    with Proxy("-s", "echo", "-c", catalog(tmp_path, entry), folder=tmp_path) as proxy:
        proxy.greet()
        first = json.loads(proxy.tool("info"))["pid"]
        await_that(lambda: not runs(first))
        assert json.loads(proxy.tool("info"))["pid"] != first


def test_S9_the_catalog_is_watched(tmp_path: Path) -> None:
    with Proxy("-c", catalog(tmp_path, echo_entry("one")), folder=tmp_path) as proxy:
        proxy.greet()
        names = [tool["name"] for tool in proxy.ask("tools/list")["result"]["tools"]]
        assert "one__echo" in names
        assert json.loads(proxy.tool("one__info"))["pid"]
        catalog(tmp_path, echo_entry("one"), echo_entry("two"))
        proxy.until("notifications/tools/list_changed")
        names = [tool["name"] for tool in proxy.ask("tools/list")["result"]["tools"]]
        assert {"one__echo", "two__echo"} <= set(names)
        (tmp_path / "catalog.yaml").write_text("servers: [")  # a bad one changes nothing
        await_that(lambda: "Failed to parse catalog" in proxy.log())
        assert proxy.tool("two__echo", text="x") == "x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_C16_a_signal_is_a_clean_stop(tmp_path: Path, number: signal.Signals) -> None:
    with Proxy("-s", "echo", "-c", catalog(tmp_path, echo_entry("echo")), folder=tmp_path) as proxy:
        proxy.greet()
        pid = json.loads(proxy.tool("info"))["pid"]
        proxy.send(request("slow", "tools/call", name="sleep", arguments={"seconds": 0.5}))
        assert proxy.ask("ping")["result"] == {}
        proxy.process.send_signal(number)
        assert proxy.receive()["id"] == "slow"
        assert proxy.process.wait(20) == 0
        assert not runs(pid)


def test_RB70_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    entry = echo_entry("echo", request_timeout_seconds=90)
    with Proxy("-s", "echo", "-c", catalog(tmp_path, entry), "--log-level", "info", folder=tmp_path) as proxy:
        pid = json.loads(proxy.tool("info"))["pid"]
        proxy.send(request("slow", "tools/call", name="sleep", arguments={"seconds": 60}))
        assert proxy.ask("ping")["result"] == {}
        proxy.process.send_signal(signal.SIGTERM)
        await_that(lambda: "finishing requests" in proxy.log())
        sent = time.monotonic()
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(10) == 1
        assert time.monotonic() - sent < 2
        await_that(lambda: not runs(pid), 5)


# --------------------------------------------------------------------------------------------- through a running one
def through(gateway: RunningGateway, folder: Path, *words: str, key: str = "") -> Proxy:
    env = {"MCP_GATEWAY_API_KEY": key} if key else {}
    return Proxy("-g", f"http://127.0.0.1:{gateway.port}/", *words, folder=folder, env=env)


def test_S8_C10_clients_of_one_gateway_share_its_servers(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    with (
        RunningGateway(tmp_path / "gateway", [echo_entry("echo"), echo_entry("x y", prefix="xy_")]) as running,
        through(running, tmp_path, "-s", "echo") as one,
        through(running, tmp_path, "-s", "echo") as two,
    ):
        assert one.greet()["serverInfo"]["name"] == "mcp-echo"
        assert one.tool("echo", text="through") == "through"
        assert json.loads(one.tool("info"))["pid"] == json.loads(two.tool("info"))["pid"]
        meta = {"progressToken": "mine"}
        reply = one.ask("tools/call", name="progress", arguments={"steps": 3}, _meta=meta)
        assert reply["result"]["isError"] is False
        assert [(m["params"]["progressToken"], m["params"]["progress"]) for m in one.others] == [
            ("mine", 1),
            ("mine", 2),
            ("mine", 3),
        ]
        with through(running, tmp_path, "-s", "x y") as odd, through(running, tmp_path) as merged:
            assert odd.tool("echo", text="quoted") == "quoted"
            names = {tool["name"] for tool in merged.ask("tools/list")["result"]["tools"]}
            assert {"echo__echo", "xy_echo"} <= names
            assert merged.tool("echo__echo", text="merged") == "merged"
            assert merged.end() == (0, [])
        assert one.end() == (0, [])


def test_S3_S8_a_server_that_the_gateway_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    with RunningGateway(tmp_path / "gateway", [echo_entry("echo")]) as running:
        with through(running, tmp_path, "-s", "X") as proxy:
            proxy.send(request(1, "initialize", **HELLO))
            status, said = proxy.end()
        last = said[-1]
        assert (status, last["id"], last["error"]["code"], last["error"]["message"]) == (
            1,
            None,
            -32001,
            "Server 'X' not found in catalog",
        )


def test_S3_S8_a_server_that_leaves_the_gateway_later_is_an_error_of_its_request(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    with (
        RunningGateway(tmp_path / "gateway", [echo_entry("echo"), echo_entry("two")]) as running,
        through(running, tmp_path, "-s", "echo") as proxy,
    ):
        proxy.greet()
        assert proxy.tool("echo", text="x") == "x"
        running.write([echo_entry("two")])
        running.wait_for_line("Registry updated")
        for _ in range(2):
            assert proxy.ask("tools/list")["error"]["code"] == -32001
        running.write([echo_entry("echo")])
        running.wait_for_line("Registry updated", count=2)
        until = time.monotonic() + 20
        while "error" in (reply := proxy.ask("tools/call", name="echo", arguments={"text": "back"})):
            assert time.monotonic() < until, reply
            time.sleep(0.1)
        assert reply["result"]["content"][0]["text"] == "back"
        assert proxy.end() == (0, [])


def test_S8_C15_the_key_is_sent_and_refusals_have_their_code(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    with RunningGateway(tmp_path / "gateway", [echo_entry("echo")], config={"api_key": "sesame"}) as running:
        with through(running, tmp_path, "-s", "echo", key="sesame") as proxy:
            assert proxy.tool("echo", text="in") == "in"
        for key in ("", "wrong"):
            with through(running, tmp_path, "-s", "echo", key=key) as proxy:
                for _ in range(2):
                    error = proxy.ask("tools/list")["error"]
                    assert (error["code"], error["data"]["source"]) == (-32003, "gateway")
                    assert "MCP_GATEWAY_API_KEY" in error["message"]
                    assert "wrong" not in error["message"]
                assert proxy.end() == (0, [])


def test_S8_a_gateway_that_is_not_there(tmp_path: Path) -> None:
    with Proxy("-g", "http://127.0.0.1:9", "-s", "echo", folder=tmp_path) as proxy:
        error = proxy.greet()
        assert error["code"] == -32002
        assert error["message"].startswith("Failed to connect to server: ")
        assert "refused" in error["message"]
        assert proxy.ask("ping")["result"] == {}
        assert proxy.end() == (0, [])


@pytest.mark.parametrize("url", ["ftp://h", "127.0.0.1:4444", "http://", "http://h/?q=1", "http://u:p@h"])
def test_C10_a_url_that_is_none_is_wrong_usage(tmp_path: Path, url: str) -> None:
    argv = [*command(), "stdio", "-g", url]
    done = subprocess.run(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "--gateway" in done.stderr
    assert "u:p" not in done.stderr


class Original(BaseHTTPRequestHandler):
    """A gateway that has POST /mcp with server_id and nothing else, as the original does."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.path != "/mcp" or self.server.status == 404:
            self.reply(404, {"error": "Not Found", "message": "Server 'X' not found"} if self.path == "/mcp" else None)
        elif self.server.status != 200:
            self.reply(self.server.status, {"error": "Bad Gateway", "message": "Failed to start server: no such file"})
        elif "server_id" not in body or "id" not in body:
            self.reply(400, {"error": "Bad Request", "message": "missing field"})
        elif body["method"] == "initialize":
            facts = {"capabilities": {"tools": {}}, "serverInfo": {"name": "old", "version": "0"}}
            self.reply(200, result(body["id"], protocolVersion="2024-11-05", **facts))
        else:
            self.reply(200, result(body["id"], got=body.get("params")))

    def do_GET(self) -> None:
        self.reply(404, None)

    do_DELETE = do_GET

    def reply(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if data:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def original() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Original)
    server.daemon_threads = True
    server.status = 200
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_S8_an_original_gateway_is_spoken_to_as_it_expects(original: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{original.server_port}"
    with Proxy("-g", url, "-s", "echo", folder=tmp_path, env={"MCP_GATEWAY_API_KEY": "sesame"}) as proxy:
        assert proxy.greet()["serverInfo"] == {"name": "old", "version": "0"}
        assert proxy.ask("tools/call", name="echo", arguments={"n": 1.50})["result"] == {
            "got": {"name": "echo", "arguments": {"n": 1.5}}
        }
        assert proxy.end() == (0, [])
    plain = [body for path, key, body in original.seen if path == "/mcp" and key == "Bearer sesame"]
    assert [body["server_id"] for body in plain] == ["echo"] * len(plain)
    assert "tools/call" in [body["method"] for body in plain]


@pytest.mark.parametrize(("status", "code"), [(502, -32002), (504, -32002), (401, -32003), (403, -32003)])
def test_S8_what_an_original_gateway_refuses(original: Any, tmp_path: Path, status: int, code: int) -> None:
    url = f"http://127.0.0.1:{original.server_port}"
    with Proxy("-g", url, "-s", "echo", folder=tmp_path) as proxy:
        proxy.greet()
        original.status = status
        error = proxy.ask("tools/list")["error"]
        assert (error["code"], error["data"]["source"]) == (code, "gateway")
        original.status = 200
        assert "result" in proxy.ask("tools/list")
    with Proxy("-g", url, "-s", "echo", folder=tmp_path) as proxy:
        original.status = status
        assert proxy.greet()["code"] == code
        assert proxy.end() == (0, [])


def test_S3_S8_an_original_gateway_without_that_server(original: Any, tmp_path: Path) -> None:
    original.status = 404
    with Proxy("-g", f"http://127.0.0.1:{original.server_port}", "-s", "X", folder=tmp_path) as proxy:
        proxy.send(call(1))
        status, said = proxy.end()
    assert (status, said[-1]["id"], said[-1]["error"]["code"]) == (1, None, -32001)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes are not pollable there")
