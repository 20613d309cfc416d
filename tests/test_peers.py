"""The scripted peer of ``peers`` without I/O, in both eras: alone, and as the other end of a pipe link.

One conversation, four ways: whichever era the server and the client speak, a link shows a question as an Ask to legacy
clients and hands on what a modern server says to modern ones.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from peers import ALL, META, MODERN, NEWEST, Json, Scripted, answers_to
from scripted import MemoryPipe

from gateway.auth.principal import ANONYMOUS
from gateway.config.snapshot import Snapshot
from gateway.exchange import Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import decode_request
from gateway.upstream.connect import Terms, UpstreamLink, connect


class Owner:
    """A client that can be asked."""

    def ask(self, ask: Ask) -> bool:
        return False

    def notify(self, text: str) -> None:
        raise AssertionError(text)

    def mark(self, topic: str) -> None:
        raise AssertionError(topic)


@asynccontextmanager
async def linked(server: str, *eras: Era) -> AsyncIterator[tuple[UpstreamLink, Scripted]]:
    """A link to a peer in memory."""
    peer = Scripted(server)

    def on_line(pipe: MemoryPipe, line: bytes) -> None:
        for message in peer.feed(line):
            pipe.say(message)

    terms = Terms("s", lambda notice: None, lambda ask: False, {"name": "t"}, ALL, isolated=True, eras=eras)
    async with connect(MemoryPipe(on_line), terms) as link:
        yield link, peer


def exchange_of(era: Era, name: str, **arguments: Any) -> Exchange:
    """A tool's call by a client of an era."""
    params: Json = {"name": name, "arguments": arguments, "_meta": {"progressToken": "mine"}}
    if era is Era.MODERN:
        params["_meta"] |= {f"{META}protocolVersion": MODERN, f"{META}clientCapabilities": ALL}
    message = decode_request(json.dumps({"jsonrpc": "2.0", "id": "c", "method": "tools/call", "params": params}))
    version = MODERN if era is Era.MODERN else NEWEST
    client = Client("c", era, version, ALL, {"name": "c"}, Owner() if era is Era.LEGACY else None)
    return Exchange(message, ANONYMOUS, Snapshot(), client, "s", trio.current_time() + 10)


async def conversation(call: Call) -> tuple[Json, list[str], list[str]]:
    """The result of a call, the questions that were answered on the way, and the notifications."""
    asked: list[str] = []
    notes: list[str] = []
    while True:
        event = await call.next()
        if isinstance(event, Reply):
            return dict(event.message.result), asked, notes
        if isinstance(event, Ask):
            asked.append(event.message.method)
            question = {"method": event.message.method, "params": event.message.params}
            event.resolve(json.dumps(answers_to(question)))
        elif isinstance(event, Interim):
            notes.append(event.text)


@pytest.mark.parametrize("first", list(Era))
@pytest.mark.parametrize("server", ["legacy", "modern", "both"])
async def test_a_link_finds_out_what_its_peer_speaks(server: str, first: Era) -> None:
    second = Era.LEGACY if first is Era.MODERN else Era.MODERN
    async with linked(server, first, second) as (link, peer):
        assert link.era is (first if server == "both" else Era(server))
        assert link.decided == ("initialize" if link.era is Era.LEGACY else "server/discover")
        assert link.facts["protocolVersion"] == (NEWEST if link.era is Era.LEGACY else MODERN)
        assert link.facts["serverInfo"] == peer.peer.info


@pytest.mark.parametrize("client", list(Era))
@pytest.mark.parametrize("server", list(Era))
async def test_one_conversation_in_both_eras_of_both_sides(server: Era, client: Era) -> None:
    async with linked(server.value, server) as (link, peer):
        result, asked, notes = await conversation(link.call(exchange_of(client, "steps", ask=True, tag="t")))
        if server is client is Era.MODERN:
            assert result["resultType"] == "input_required", "it is for the client to go on"
            assert list(result["inputRequests"]) == ["elicitation"] and asked == []
        else:
            assert result == {"content": [{"type": "text", "text": "done"}]}
            assert asked == ["elicitation/create"]
        told = [json.loads(note)["params"] for note in notes]
        assert {params["progressToken"] for params in told} == {"mine"}
        assert [params["progress"] for params in told] == ([1, 2] if not asked else [1, 2, 3, 4])
        calls = [e["got"] for e in peer.entries if e.get("got", {}).get("method") == "tools/call"]
        assert len(calls) == (2 if (server, client) == (Era.MODERN, Era.LEGACY) else 1)


def test_a_modern_peer_takes_no_legacy_opening_and_the_other_way_round() -> None:
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": NEWEST}}
    probe = {"jsonrpc": "2.0", "id": 2, "method": "server/discover", "params": {"_meta": {}}}
    (refused,) = Scripted("modern").feed(json.dumps(hello))
    assert refused["error"]["code"] == -32022
    (refused,) = Scripted("legacy").feed(json.dumps(probe))
    assert refused["error"]["code"] == -32602
