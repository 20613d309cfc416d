"""Two file descriptors as lines in and lines out, and how a call's messages go onto them.

Nothing here knows what a line says but that it is one JSON-RPC message, nor of which era.
"""

from __future__ import annotations

import os
import select
import stat
from collections import deque
from typing import Final

import trio

from gateway.downstream.streams import COMMENT_AFTER, Feed

__all__ = ["LineOutlet", "Lines"]

READ_SIZE: Final = 65536
MAX_QUEUED: Final = 8 * 1024 * 1024
"""Bytes that may wait for a client that does not read before no more of its requests are taken."""
APART: Final = 0.005
"""Seconds between a call's last progress and its reply: TypeScript clients drop progress that they read together with
the reply, and a reader that has just been woken by the one line needs a moment to come back for the other."""
WHOLE: Final = 1 << 30
TERMINAL_STEP: Final = 1024
"""Bytes written to a terminal at once: what it has room for whenever it says that it can be written to."""


class Lines:
    """Two file descriptors as lines in and lines out, never half a line out.

    Pipes and sockets are read and written without blocking; their mode is put back by ``close``, since it belongs to
    whoever shares the descriptor. A terminal keeps its mode, which it shares with the shell and with our stderr: what
    can be read or written is waited for, and then does not block. Regular files and the like are always ready.

    ``broken`` is set when the client has closed our output.
    """

    def __init__(self, input: int = 0, output: int = 1) -> None:
        self._input = input
        self._output = output
        self._pollable = {fd for fd in (input, output) if _pollable(fd)}
        self._blocking = {fd: os.get_blocking(fd) for fd in self._pollable if not os.isatty(fd)}
        for fd in self._blocking:
            os.set_blocking(fd, False)
        self._step = WHOLE if output in self._blocking or output not in self._pollable else TERMINAL_STEP
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._more = trio.Event()
        self._empty = trio.Event()
        self._empty.set()
        self.broken = trio.Event()

    def close(self) -> None:
        """Put the descriptors' modes back; they stay open."""
        for fd, blocking in self._blocking.items():
            os.set_blocking(fd, blocking)

    async def receive(self) -> bytes:
        """The next bytes, b"" at the end. Cancellation loses nothing."""
        while True:
            if self._input in self._pollable:
                await trio.lowlevel.wait_readable(self._input)
            else:
                await trio.lowlevel.checkpoint()
            try:
                return os.read(self._input, READ_SIZE)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    def send(self, text: str) -> None:
        """Write a message as one line, now or when there is room. Never waits, never raises."""
        if self.broken.is_set():
            return
        if "\n" in text or "\r" in text:
            text = text.replace("\n", " ").replace("\r", " ")
        data = memoryview(text.encode("utf-8", "surrogatepass") + b"\n")
        if not self._queue:
            data = data[self._write(data) :]
            if not data or self.broken.is_set():
                return
        self._queue.append(data)
        self._queued += len(data)
        self._empty = trio.Event() if self._empty.is_set() else self._empty
        self._more.set()

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._output, data[: self._step])
        except BlockingIOError:
            return 0
        except OSError:
            # The client has closed our output, or the disk is full. There is nobody to tell.
            self.broken.set()
            self._queue.clear()
            self._queued = 0
            self._empty.set()
            return 0

    async def write_queued(self) -> None:
        """Write what did not fit at once. Runs until cancelled."""
        while True:
            self._more = trio.Event()
            while self._queue and not self.broken.is_set():
                if self._output in self._pollable:
                    await trio.lowlevel.wait_writable(self._output)
                else:
                    await trio.lowlevel.checkpoint()
                count = self._write(self._queue[0])
                if self.broken.is_set():
                    break
                self._queued -= count
                self._queue[0] = self._queue[0][count:]
                if not self._queue[0]:
                    self._queue.popleft()
            self._empty.set()
            await self._more.wait()

    @property
    def full(self) -> bool:
        """Whether too much is queued for a client that does not read."""
        return self._queued > MAX_QUEUED

    async def room(self) -> None:
        """Wait while too much is queued for a client that does not read."""
        if self.full:
            await self._empty.wait()

    def deserted(self) -> bool:
        """Whether nobody can ever read what would be written: the client has ended or closed our output."""
        if self._output in self._blocking:
            poll = select.poll()
            poll.register(self._output, 0)
            if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
                self.broken.set()
        return self.broken.is_set()

    async def flush(self) -> None:
        """Wait until everything is written, or can't be any more."""
        await self._empty.wait()


def _pollable(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and os.isatty(fd))


class LineOutlet:
    """An ``Outlet`` of a call onto the lines."""

    __slots__ = ("feed", "lines", "scope", "sent_at")

    def __init__(self, lines: Lines, feed: Feed | None = None) -> None:
        self.lines = lines
        self.sent_at = float("-inf")
        self.feed = feed
        self.scope: trio.CancelScope | None = None

    @property
    def comment_at(self) -> float:
        """Lines need no comments."""
        return trio.current_time() + COMMENT_AFTER

    async def send(self, text: str, instead: str = "") -> None:
        """Write one message; wait if the client does not read, and the call's own bounded box drops progress."""
        self.lines.send(text)
        self.sent_at = trio.current_time()
        await self.lines.room()

    async def stand_apart(self) -> None:
        """Let the client read what was sent before it gets the reply (protocol.md section 4.1, progress)."""
        left = self.sent_at + APART - trio.current_time()
        if left > 0:
            await trio.sleep(left)

    def say(self, text: str) -> None:
        """Write one message."""
        self.lines.send(text)

    async def comment(self) -> None:
        """Nothing to do."""

    async def comment_now(self) -> None:
        """Nothing to do."""

    async def end(self) -> None:
        """The lines outlive every call."""
