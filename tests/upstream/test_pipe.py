"""The pipe link against a scripted server that misbehaves: RB03, RB04, RB09 to RB12, and cancellation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from scripted import MemoryPipe, Script
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.auth.principal import ANONYMOUS
from gateway.config.snapshot import Snapshot
from gateway.errors import LinkLost, Overloaded, ServerProtocolError, StartFailed, UpstreamTimeout
from gateway.exchange import Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_request
from gateway.upstream.connect import Terms, UpstreamLink, connect
from gateway.upstream.pipe import MAX_OUTBOX

CLIENT = Client("me", Era.LEGACY, "2025-11-25")


def exchange(n: int = 1, seconds: float = 30, params: str | None = None) -> Exchange:
    text = params or f'{{"name":"x","arguments":{{"n":{n}}}}}'
    message = decode_request(f'{{"jsonrpc":"2.0","id":{n},"method":"tools/call","params":{text}}}')
    return Exchange(message, ANONYMOUS, Snapshot(), CLIENT, "s", trio.current_time() + seconds)


class Peer:
    """A link, its scripted server, and what the link passed on."""

    def __init__(self, script: Script, pipe: MemoryPipe) -> None:
        self.script = script
        self.pipe = pipe
        self.link: Any = None
        self.notices: list[Message] = []
        self.asks: list[Ask] = []

    def ask(self, ask: Ask) -> bool:
        self.asks.append(ask)
        return True

    def last_call(self) -> dict[str, Any]:
        return [m for m in self.script.seen if m.get("method") == "tools/call"][-1]

    def reply(self, message: dict[str, Any], **result: Any) -> None:
        self.pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": result})


@asynccontextmanager
async def linked(
    script: Script | None = None, *, isolated: bool = True, max_message_bytes: int = 1 << 20
) -> AsyncIterator[Peer]:
    script = script or Script(answer=lambda pipe, message: None)
    pipe = MemoryPipe(script.on_line)
    peer = Peer(script, pipe)
    terms = Terms(
        "s", peer.notices.append, peer.ask, {"name": "t"}, isolated=isolated, max_message_bytes=max_message_bytes
    )
    async with connect(pipe, terms) as link:
        peer.link = link
        yield peer


async def finish(call: Call) -> Message:
    while True:
        event = await call.next()
        if isinstance(event, Reply):
            return event.message


async def test_handshake_says_who_we_are_and_keeps_the_facts() -> None:
    async with linked() as peer:
        first, second = peer.script.seen
        assert first["params"]["clientInfo"] == {"name": "t"}
        assert second == {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert peer.link.facts["serverInfo"]["name"] == "scripted"


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"protocolVersion": "1999-01-01", "capabilities": {}}, "protocol version '1999-01-01'"),
        ({"protocolVersion": "2025-11-25", "capabilities": []}, "capabilities is no object"),
    ],
)
async def test_an_unusable_handshake_says_what_was_wrong(facts: dict[str, Any], what: str) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(StartFailed, match=what)):
        async with linked(Script(facts=facts)):
            pass


async def test_RB01_exit_before_the_handshake_names_code_and_output(autojump_clock: MockClock) -> None:
    begin = trio.current_time()
    pipe = MemoryPipe(lambda pipe, line: pipe.exit(7))
    with pytest.RaisesGroup(pytest.RaisesExc(StartFailed, match="process exited with code 7")):
        async with connect(pipe, Terms("s", lambda m: None, lambda a: False, {})):
            pass
    assert trio.current_time() - begin <= 1


async def test_RB11_out_of_order_second_unknown_and_late_replies() -> None:
    async with linked() as peer:
        calls = [peer.link.call(exchange(n)) for n in range(5)]
        sent = [m for m in peer.script.seen if m.get("method") == "tools/call"]
        assert len({m["id"] for m in sent}) == 5
        for message in reversed(sent):
            peer.reply(message, n=message["params"]["arguments"]["n"])
            peer.reply(message, n="second")
        peer.pipe.say({"jsonrpc": "2.0", "id": 999, "result": {}})
        peer.pipe.say({"jsonrpc": "2.0", "id": str(sent[0]["id"]), "result": {}})
        assert [(await finish(c)).result["n"] for c in calls] == list(range(5))
        await wait_all_tasks_blocked()
        assert peer.link.pending.unmatched == 7


async def test_RB28_equal_client_ids_do_not_cross() -> None:
    async with linked() as peer:
        calls = [peer.link.call(exchange(1, params=f'{{"n":{n}}}')) for n in range(20)]
        await wait_all_tasks_blocked()
        for message in [m for m in peer.script.seen if m.get("method") == "tools/call"]:
            peer.reply(message, n=message["params"]["n"])
        assert [(await finish(c)).result["n"] for c in calls] == list(range(20))


async def test_RB10_noise_is_dropped_and_fragments_are_joined() -> None:
    async with linked() as peer:
        call = peer.link.call(exchange())
        id = peer.last_call()["id"]
        peer.pipe.say_bytes(b'starting up...\n\n\xff\xfe\n[1,2]\n{"jsonrpc":"2.0"\n')
        good = json.dumps({"jsonrpc": "2.0", "id": id, "result": {"text": "é" * 100}}, ensure_ascii=False).encode()
        for at in range(0, len(good), 7):
            peer.pipe.say_bytes(good[at : at + 7])
        peer.pipe.say_bytes(b"\r\n")
        assert (await finish(call)).result["text"] == "é" * 100


async def test_RB09_an_oversized_reply_ends_its_own_call() -> None:
    async with linked(max_message_bytes=10_000) as peer:
        big, small = peer.link.call(exchange(1)), peer.link.call(exchange(2))
        first, second = [m for m in peer.script.seen if m.get("method") == "tools/call"]
        peer.reply(first, text="x" * 50_000)
        with pytest.raises(ServerProtocolError, match="max_message_bytes"):
            await finish(big)
        peer.reply(second, ok=True)
        assert (await finish(small)).result == {"ok": True}


async def test_RB09_an_oversized_line_without_an_id_ends_every_call() -> None:
    async with linked(max_message_bytes=10_000) as peer:
        calls = [peer.link.call(exchange(n)) for n in range(3)]
        peer.pipe.say_bytes(b"x" * 50_000 + b"\n")
        for call in calls:
            with pytest.raises(ServerProtocolError):
                await finish(call)
        again = peer.link.call(exchange())
        peer.reply(peer.last_call(), ok=True)
        assert (await finish(again)).result == {"ok": True}


async def test_RB12_a_server_that_stops_reading_costs_its_callers_only(autojump_clock: MockClock) -> None:
    async with linked() as peer:
        peer.pipe.room = 10
        half = peer.link.call(exchange(1, seconds=3))
        waiting = peer.link.call(exchange(2, seconds=5))
        waiting.cancel("enough")
        with pytest.raises(UpstreamTimeout):
            await finish(half)
        filler = '{"x":"' + "y" * (1 << 20) + '"}'
        with pytest.raises(Overloaded, match="does not read its input"):
            for n in range(MAX_OUTBOX // (1 << 20) + 1):
                peer.link.call(exchange(n, params=filler))
        peer.pipe.give_room(float("inf"))
        await wait_all_tasks_blocked()
        # every frame arrived whole and in order, the cancelled one and the late ones too
        assert all("jsonrpc" in m for m in peer.script.seen)
        assert peer.script.methods().count("notifications/cancelled") >= 2
        call = peer.link.call(exchange())
        await wait_all_tasks_blocked()
        peer.reply(peer.last_call(), ok=True)
        assert (await finish(call)).result == {"ok": True}


async def test_RB03_P4_the_end_of_the_server_fails_calls_at_once(autojump_clock: MockClock) -> None:
    async with linked() as peer:
        calls = [peer.link.call(exchange(n)) for n in range(3)]
        begin = trio.current_time()
        peer.pipe.exit(9)
        for call in calls:
            with pytest.raises(LinkLost, match="Server 's' ended: process exited with code 9"):
                await finish(call)
        assert trio.current_time() - begin <= 0.1
        with pytest.raises(LinkLost):
            peer.link.call(exchange())
        await peer.link.wait_closed()


async def test_RB20_slow_calls_are_told_and_a_cancel_reaches_the_server(autojump_clock: MockClock) -> None:
    async with linked() as peer:
        call = peer.link.call(exchange())
        begin = trio.current_time()
        event = await call.next()
        assert not isinstance(event, Reply)
        assert trio.current_time() - begin <= 0.1
        call.cancel("client has gone")
        assert peer.script.seen[-1] == {
            "jsonrpc": "2.0",
            "method": "notifications/cancelled",
            "params": {"requestId": peer.last_call()["id"], "reason": "client has gone"},
        }
        peer.reply(peer.last_call(), late=True)
        await wait_all_tasks_blocked()
        assert peer.link.pending.unmatched == 1


async def test_questions_and_logs_of_an_isolated_server_follow_its_only_call() -> None:
    async with linked() as peer:
        call = peer.link.call(exchange())
        peer.pipe.say(
            {"jsonrpc": "2.0", "id": 0, "method": "sampling/createMessage", "params": {"messages": []}},
            {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}},
        )
        ask, note = await call.next(), await call.next()
        assert isinstance(ask, Ask)
        assert isinstance(note, Interim)
        ask.answer(decode_request('{"jsonrpc":"2.0","id":"c","result":{"role":"assistant"}}'))
        assert peer.script.seen[-1] == {"jsonrpc": "2.0", "id": 0, "result": {"role": "assistant"}}
        second = peer.link.call(exchange(2))
        peer.pipe.say({"jsonrpc": "2.0", "id": 1, "method": "roots/list"})
        await wait_all_tasks_blocked()
        assert [a.message.id for a in peer.asks] == [1], "two calls in flight: the owner is asked"
        peer.pipe.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})
        await wait_all_tasks_blocked()
        assert not peer.asks[0].open
        call.cancel()
        second.cancel()


async def test_newlines_between_tokens_do_not_break_the_frame() -> None:
    async with linked() as peer:
        call = peer.link.call(exchange(params='{\n  "name": "x",\r\n  "text": "a\\nb"\n}'))
        assert peer.last_call()["params"] == {"name": "x", "text": "a\nb"}
        call.cancel()


async def test_gateways_own_requests_time_out_and_are_cancelled(autojump_clock: MockClock) -> None:
    async with linked() as peer:
        link: UpstreamLink = peer.link
        with pytest.raises(UpstreamTimeout):
            await link.request("tools/list", timeout=2)
        assert peer.script.methods()[-1] == "notifications/cancelled"
