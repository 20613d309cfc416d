"""What every runtime's Pipe must do (``gateway.runtimes.base.Pipe``), as checks to run over any of them.

A *peer* is a program at the other end that speaks the little language of ``fixtures/peer.py``; how it gets there is
the runtime's business. A runtime's own test file parametrizes over ``PIPE_CHECKS``:

    @pytest.mark.parametrize("check", PIPE_CHECKS, ids=lambda check: check.__name__)
    async def test_kit(check): await check(open_peer)

``open_peer(**options)`` opens a new peer; options: ``stop_grace`` in seconds. A peer whose end others have to report
has ``open_peer.slack``, the seconds that this takes.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest
import trio

from gateway.errors import LinkLost
from gateway.runtimes.base import Pipe

PATIENCE = 20.0
"""Seconds after which a check that hangs has failed."""


class OpenPeer(Protocol):
    """How to open a peer on the runtime that is being checked."""

    def __call__(self, *, stop_grace: float = 1.0) -> AbstractAsyncContextManager[Pipe]: ...


class Instance:
    """Implements ``base.Instance``; remembers what it is told."""

    id = "ab" * 16

    def __init__(self) -> None:
        self.used: list[tuple[str, str]] = []
        self.left = 0

    def uses(self, type: str, where: str) -> None:
        self.used.append((type, where))

    def leaves(self) -> None:
        self.left += 1

    def dead(self, id: str) -> bool:
        return id == "de" * 16


async def send(pipe: Pipe, data: bytes) -> None:
    """Write all, as a link does."""
    while data:
        written = pipe.write_nowait(data)
        data = data[written:]
        if data:
            await pipe.wait_writable()


class Lines:
    """Reads lines from a pipe."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.buffer = b""

    async def next(self) -> bytes:
        """The next line without its newline; b"" at the end."""
        while b"\n" not in self.buffer:
            data = await self.pipe.receive_some()
            if not data:
                return b""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line


async def check_round_trip(open_peer: OpenPeer) -> None:
    """Lines arrive whole and in order, both ways."""
    async with open_peer() as pipe:
        lines = Lines(pipe)
        for number in range(20):
            await send(pipe, b"echo %d\n" % number)
            assert await lines.next() == b"%d" % number


async def check_fragments_and_batches(open_peer: OpenPeer) -> None:
    """A line in many writes, many lines in one."""
    async with open_peer() as pipe:
        lines = Lines(pipe)
        for piece in (b"ec", b"ho on", b"e\necho two\necho thr", b"ee\n"):
            await send(pipe, piece)
            await trio.lowlevel.checkpoint()
        assert [await lines.next() for _ in range(3)] == [b"one", b"two", b"three"]


async def check_much_both_ways(open_peer: OpenPeer) -> None:
    """5 MB out and 5 MB back, though no pipe holds them: writing waits, nothing is lost."""
    payload = b"0123456789abcdef" * (5 * 1024 * 1024 // 16)
    async with open_peer() as pipe, trio.open_nursery() as nursery:
        nursery.start_soon(send, pipe, b"echo " + payload + b"\n")
        assert await Lines(pipe).next() == payload


async def check_big_reply(open_peer: OpenPeer) -> None:
    """20 MB in one line, by reads of bounded size."""
    async with open_peer() as pipe:
        await send(pipe, b"big 20000000\n")
        received = biggest = 0
        while True:
            data = await pipe.receive_some()
            received += len(data)
            biggest = max(biggest, len(data))
            if not data or data.endswith(b"\n"):
                break
        assert received == 20_000_001
        assert biggest <= 4 * 1024 * 1024


async def check_write_never_waits(open_peer: OpenPeer) -> None:
    """A peer that does not read: writing accepts little, then nothing, and waiting for room is cancellable."""
    async with open_peer() as pipe:
        await send(pipe, b"deaf 600\n")
        data = bytes(1 << 20)
        accepted = 0
        with trio.move_on_after(0.5) as scope:
            while True:
                accepted += pipe.write_nowait(data)
                await pipe.wait_writable()
        assert scope.cancelled_caught
        with trio.fail_after(PATIENCE):
            while more := pipe.write_nowait(data):  # what lies between may still be handing on
                accepted += more
                assert accepted <= 64 << 20
                await trio.sleep(0.2)
        assert accepted <= 64 << 20


async def check_cancelled_receive_loses_nothing(open_peer: OpenPeer) -> None:
    """Given up and taken up again a hundred times, reading still gets every byte once."""
    async with open_peer() as pipe:
        for number in range(100):
            await send(pipe, b"echo %d\n" % number)
        buffer = b""
        pause = 0.0
        while buffer.count(b"\n") < 100:
            with trio.move_on_after(pause):
                while data := await pipe.receive_some():
                    buffer += data
            pause = min(0.1, pause * 2 + 0.0001)
        assert buffer.split() == [b"%d" % number for number in range(100)]


async def check_receive_lets_others_run(open_peer: OpenPeer) -> None:
    """Reading from a peer that never stops talking is a checkpoint each time."""
    async with open_peer() as pipe:
        await send(pipe, b"babble\n")
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(100):
                assert await pipe.receive_some()
            nursery.cancel_scope.cancel()
        assert turns >= 90


async def check_end(open_peer: OpenPeer) -> None:
    """What was said before the end arrives, then b"" for ever; writing raises LinkLost; the diagnosis names it."""
    async with open_peer() as pipe:
        await send(pipe, b"error last words\necho bye\nexit 3\n")
        lines = Lines(pipe)
        assert await lines.next() == b"bye"
        assert await pipe.receive_some() == b""
        assert await pipe.receive_some() == b""
        await pipe.wait_exited()
        with pytest.raises(LinkLost):
            await send(pipe, bytes(1 << 20))
        with pytest.raises(LinkLost):
            await pipe.wait_writable()
        assert "3" in pipe.diagnosis()
        assert "last words" in pipe.diagnosis()


async def check_end_wakes_everybody(open_peer: OpenPeer) -> None:
    """A reader, a writer and a watcher that wait are all told, within a second."""
    woken: list[str] = []

    async def reader(pipe: Pipe) -> None:
        assert await pipe.receive_some() == b""
        woken.append("reader")

    async def writer(pipe: Pipe) -> None:
        with pytest.raises(LinkLost):
            while True:
                if not pipe.write_nowait(bytes(1 << 20)):
                    await pipe.wait_writable()
        woken.append("writer")

    async def watcher(pipe: Pipe) -> None:
        await pipe.wait_exited()
        woken.append("watcher")

    async with open_peer() as pipe:
        await send(pipe, b"deaf 0.3\nexit 1\n")
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for work in (reader, writer, watcher):
                    nursery.start_soon(work, pipe)
    assert sorted(woken) == ["reader", "watcher", "writer"]


async def check_stopped_when_left(open_peer: OpenPeer) -> None:
    """After the block the pipe is over: b"", LinkLost, exited."""
    async with open_peer() as pipe:
        await send(pipe, b"echo x\n")
        assert await Lines(pipe).next() == b"x"
    assert await pipe.receive_some() == b""
    await pipe.wait_exited()
    with pytest.raises(LinkLost):
        pipe.write_nowait(b"x\n")


async def check_stop_is_bounded(open_peer: OpenPeer) -> None:
    """A peer that neither reads nor heeds a polite end: gone within the grace and a second; so when cancelled."""
    for cancelled in (False, True):
        with trio.CancelScope() as scope:
            async with open_peer(stop_grace=0.5) as pipe:
                await send(pipe, b"stubborn\necho ready\ndeaf 600\n")
                assert await Lines(pipe).next() == b"ready"
                begun = trio.current_time()
                if cancelled:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
        slack = getattr(open_peer, "slack", 0.0) + 0.5  # the last: for a busy machine
        assert trio.current_time() - begun <= 0.5 + 1 + slack
        await pipe.wait_exited()


async def check_errors_come_out_as_they_are(open_peer: OpenPeer) -> None:
    """The block's own error is not wrapped in a group and not lost."""
    with pytest.raises(KeyError, match="own"):
        async with open_peer():
            raise KeyError("own")


async def check_cancelled_at_every_checkpoint(open_peer: OpenPeer) -> None:
    """Opening can be given up at any time; what was started is stopped."""
    for delay in (0.0, 0.001, 0.003, 0.01):
        pipe = None
        with trio.move_on_after(delay):
            async with open_peer() as pipe:
                await trio.sleep_forever()
        if pipe is not None:
            await pipe.wait_exited()


async def check_details_are_json(open_peer: OpenPeer) -> None:
    """/servers/ID can show them."""
    async with open_peer() as pipe:
        details: Any = dict(pipe.details)
        assert json.loads(json.dumps(details)) == details


PIPE_CHECKS: list[Callable[[OpenPeer], Awaitable[None]]] = [
    check for name, check in list(globals().items()) if name.startswith("check_") and callable(check)
]
