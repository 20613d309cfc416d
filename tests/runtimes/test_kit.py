"""The conformance kit, over real processes and over a fake in memory: it must accept both and refuse broken ones."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.errors import LinkLost
from gateway.runtimes import ProcessGuard
from gateway.runtimes.base import Pipe, Surroundings
from gateway.runtimes.local_process import LocalProcessSpec, open_local_process
from tests import kit

PEER = str(Path(__file__).parents[1] / "fixtures" / "peer.py")


@asynccontextmanager
async def open_process(*, stop_grace: float = 1.0) -> AsyncIterator[Pipe]:
    spec = LocalProcessSpec(sys.executable, ("-S", PEER))
    async with open_local_process(spec, Surroundings("peer", dict(os.environ), stop_grace=stop_grace)) as pipe:
        yield pipe


class Buffer:
    """A bounded pipe in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.size = 64 * 1024
        self.closed = False
        self.changed = trio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def put(self, data: bytes | memoryview) -> int:
        if self.closed:
            raise BrokenPipeError
        accepted = min(len(data), self.size - len(self.data))
        self.data += data[:accepted]
        self.change()
        return accepted

    def take(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        self.change()
        return data

    def close(self) -> None:
        self.closed = True
        self.change()

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.data and not self.closed:
            await self.changed.wait()

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while len(self.data) >= self.size and not self.closed:
            await self.changed.wait()


class FakePeer:
    """fixtures/peer.py as a task, at the other end of two buffers; a Pipe at this one."""

    def __init__(self) -> None:
        self.there = Buffer()
        self.back = Buffer()
        self.exited = trio.Event()
        self.said = ""
        self.code: int | None = None

    details: Mapping[str, Any] = {"fake": True}

    def write_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self.there.put(data)
        except BrokenPipeError as error:
            raise LinkLost(self.diagnosis()) from error

    async def wait_writable(self) -> None:
        await self.there.wait_writable()
        if self.there.closed:
            raise LinkLost(self.diagnosis())

    async def receive_some(self) -> bytes:
        await self.back.wait_readable()
        return self.back.take()

    async def wait_exited(self) -> None:
        await self.exited.wait()

    async def measure(self) -> Mapping[str, Any]:
        return {}

    def remark(self) -> str:
        return ""

    def diagnosis(self) -> str:
        return f"fake ended with {self.code}: {self.said}"

    async def run(self, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await self.speak()
            except BrokenPipeError:
                self.code = -13
        self.there.close()
        self.back.close()
        self.exited.set()

    async def write(self, data: bytes) -> None:
        while data:
            data = data[self.back.put(data) :]
            await self.back.wait_writable()

    async def speak(self) -> None:
        buffer = b""
        while True:
            while b"\n" not in buffer:
                await self.there.wait_readable()
                buffer += self.there.take()
                if self.there.closed:
                    self.code = 0
                    return
            line, _, buffer = buffer.partition(b"\n")
            word, _, rest = line.partition(b" ")
            if word == b"echo":
                await self.write(rest + b"\n")
            elif word == b"big":
                await self.write(b"x" * int(rest) + b"\n")
            elif word == b"babble":
                while True:
                    await self.write(b"bla " * 4096)
            elif word == b"error":
                self.said += rest.decode()
            elif word == b"deaf":
                await trio.sleep(float(rest))
            elif word == b"exit":
                self.code = int(rest)
                return


@asynccontextmanager
async def open_fake(*, stop_grace: float = 1.0) -> AsyncIterator[Pipe]:
    await trio.lowlevel.checkpoint()
    peer = FakePeer()
    manager = trio.open_nursery()
    nursery = await manager.__aenter__()
    scope = trio.CancelScope(shield=True)
    nursery.start_soon(peer.run, scope)
    try:
        yield peer
    finally:
        scope.cancel()
        await manager.__aexit__(None, None, None)


@pytest.mark.parametrize("check", kit.PIPE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("open_peer", [open_process, open_fake], ids=["local-process", "fake"])
async def test_K12_pipe(open_peer: kit.OpenPeer, check: Any) -> None:
    with trio.fail_after(kit.PATIENCE):
        await check(open_peer)


async def test_K12_the_kit_refuses_a_pipe_that_loses_bytes() -> None:
    class Lossy(FakePeer):
        async def receive_some(self) -> bytes:
            data = await super().receive_some()
            await trio.sleep(0.001)  # cancelled here, the data are gone
            return data

    @asynccontextmanager
    async def open_lossy(*, stop_grace: float = 1.0) -> AsyncIterator[Pipe]:
        async with trio.open_nursery() as nursery:
            peer = Lossy()
            scope = trio.CancelScope()
            nursery.start_soon(peer.run, scope)
            yield peer
            scope.cancel()

    with pytest.raises(trio.TooSlowError), trio.fail_after(2):
        await kit.check_cancelled_receive_loses_nothing(open_lossy)


async def test_P12_no_descriptor_or_child_is_left_by_the_kit() -> None:
    had = own_children()
    async with ProcessGuard():
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            async with open_process() as pipe:
                await kit.send(pipe, b"echo x\n")
                assert await kit.Lines(pipe).next() == b"x"
        assert set(os.listdir("/proc/self/fd")) == before
    assert own_children() == had, "engines that other tests keep running are nobody's business here"


def own_children() -> set[int]:
    """The processes whose parent this one is, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found
