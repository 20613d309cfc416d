"""Event streams of a session: numbered events, what is kept of them, and the connections that carry them.

An event is numbered in its stream and kept in its session's ``EventLog`` when it is made, whether or not somebody is
connected to read it. A ``Reader`` follows a ``Feed`` from a cursor: what was made before it came and what is made while
it stays take the same way, so a resumed stream has no seam (Streamable HTTP, "Resumability and Redelivery").

Everything here is bounded: a log by MAX_EVENTS, MAX_BYTES and MAX_AGE a session and MAX_TOTAL for all, a reader that
does not keep up by MAX_PENDING, and below it the connection's stall limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

import trio

from gateway.downstream.server import ClientGone, Request
from gateway.hub import SPACING
from gateway.protocol.session import event_id
from gateway.protocol.sse import EVENT_STREAM, KEEP_ALIVE, encode

__all__ = [
    "COMMENT_AFTER",
    "STREAM_HEADERS",
    "Budget",
    "EventLog",
    "Feed",
    "Outlet",
    "PostOutlet",
    "Reader",
    "follow",
    "priming",
]

COMMENT_AFTER: Final = 15.0
"""Seconds of silence after which a stream carries a comment, and a waiting POST becomes a stream."""
COALESCE: Final = 0.05
"""Seconds that list changes are gathered for, once the first of them is known (protocol.md section 5: at most 0.1)."""
EARLY: Final = 1.5
"""Seconds by which a comment may come early, because the server's sweeper wakes connections early."""
RETRY: Final = 1000
"""Milliseconds after which a client should reconnect."""
STREAM_HEADERS: Final = (
    ("Content-Type", EVENT_STREAM),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)

MAX_EVENTS: Final = 100
MAX_BYTES: Final = 1024 * 1024
MAX_AGE: Final = 300.0
MAX_TOTAL: Final = 64 * 1024 * 1024
MAX_PENDING: Final = 16 * 1024 * 1024
"""Bytes a reader may owe its connection; on top of the 30 s that a write may stall."""


class Budget:
    """The bytes that all logs together hold."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = MAX_TOTAL) -> None:
        self.limit = limit
        self.used = 0


class EventLog:
    """The latest events of one session's streams, oldest first, for clients that come back (RB20).

    An entry is (stream, number, trio time, encoded event, topic). What does not fit pushes the oldest out. Of events
    that say that a topic has changed only the latest is kept: who comes back is told once, and nothing else is pushed
    out.
    """

    __slots__ = ("_budget", "_bytes", "_entries")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._bytes = 0
        self._entries: deque[tuple[int, int, float, bytes, str]] | None = None  # an empty deque is 600 bytes

    def add(self, stream: int, number: int, data: bytes, now: float, topic: str = "") -> None:
        """Keep an event. One larger than MAX_BYTES is not kept at all."""
        size = len(data)
        if size > MAX_BYTES:
            return
        entries = self._entries
        if entries is None:
            entries = self._entries = deque()
        elif topic:
            self._supersede(topic)
        budget = self._budget
        while entries and (
            len(entries) >= MAX_EVENTS or self._bytes + size > MAX_BYTES or budget.used + size > budget.limit
        ):
            self._drop()
        if budget.used + size > budget.limit:
            return
        entries.append((stream, number, now, data, topic))
        self._bytes += size
        budget.used += size

    def _drop(self) -> None:
        assert self._entries is not None
        self._release(self._entries.popleft()[3])

    def _supersede(self, topic: str) -> None:
        entries = self._entries
        assert entries is not None
        for index in range(len(entries) - 1, -1, -1):  # mostly it is the last one
            if entries[index][4] == topic:
                self._release(entries[index][3])
                del entries[index]
                return

    def _release(self, data: bytes) -> None:
        self._bytes -= len(data)
        self._budget.used -= len(data)

    def after(self, stream: int, number: int) -> list[tuple[int, bytes]]:
        """Number and bytes of what is kept of one stream after an event."""
        return [(n, data) for s, n, _, data, _ in self._entries or () if s == stream and n > number]

    def knows(self, stream: int) -> bool:
        """Whether anything is kept of a stream."""
        return any(entry[0] == stream for entry in self._entries or ())

    def expire(self, now: float) -> None:
        """Drop what is older than MAX_AGE."""
        while self._entries and self._entries[0][2] <= now - MAX_AGE:
            self._drop()
        if not self._entries:
            self._entries = None

    def clear(self) -> None:
        """Drop everything."""
        while self._entries:
            self._drop()
        self._entries = None


class Reader:
    """One connection that carries a feed. ``wake`` interrupts its waiting; set by ``follow``.

    lossy      whether the oldest events may be dropped when it falls MAX_PENDING behind; otherwise it is ended
    ended      nothing more is to be written than what is pending
    """

    __slots__ = ("_pending", "_size", "ended", "lossy", "number", "wake")

    def __init__(self, *, lossy: bool = True) -> None:
        self._pending: list[tuple[int, bytes]] = []
        self._size = 0
        self.lossy = lossy
        self.ended = False
        self.number = 0
        self.wake: Callable[[], None] | None = None

    def put(self, number: int, data: bytes) -> None:
        """One more event to write, unless ended."""
        if self.ended:
            return
        self._pending.append((number, data))
        self._size += len(data)
        while self._size > MAX_PENDING and self._pending:
            if not self.lossy:
                self.end()
                break
            self._size -= len(self._pending.pop(0)[1])
        self.poke()

    def take(self) -> bytes:
        """All that is to be written now; ``number`` becomes the number of its last event."""
        pending, self._pending = self._pending, []
        self._size = 0
        if not pending:
            return b""
        self.number = pending[-1][0]
        return pending[0][1] if len(pending) == 1 else b"".join(data for _, data in pending)

    def end(self) -> None:
        """Write what is pending and end the stream."""
        self.ended = True
        self.poke()

    def poke(self) -> None:
        """Have the connection's task look again."""
        if self.wake is not None:
            self.wake()


class Feed:
    """One event stream of a session.

    number    names the stream in its event ids; 0 is the standalone stream that a GET opens
    last      the number of its newest event
    sent      the number of the newest event that went to a connection
    openings  connections that began with a priming event
    owed      replies that are still to travel on it, so that a shutdown waits
    log       None for a stream that can't be resumed (HTTP+SSE): its events have no ids and are not kept
    """

    __slots__ = ("last", "log", "number", "openings", "owed", "reader", "sent")

    def __init__(self, number: int, log: EventLog | None, owed: int = 0) -> None:
        self.number = number
        self.log = log
        self.owed = owed
        self.last = 0
        self.sent = 0
        self.openings = 0
        self.reader: Reader | None = None

    def add(self, text: str, instead: str = "", topic: str = "") -> bytes:
        """Make an event of a message and give it to whoever reads; the encoded event.

        ``topic``: it says that this has changed, so of all such events only the latest is kept. ``instead`` is kept in
        its place when it is too large to keep, so that a resumed stream has an answer too.
        """
        self.last = number = self.last + 1
        if self.log is None:
            data = encode(text)
        else:
            id = event_id(self.number, number)
            data = encode(text, id=id)
            kept = encode(instead, id=id) if instead and len(data) > MAX_BYTES else data
            self.log.add(self.number, number, kept, trio.current_time(), topic)
        if self.reader is not None:
            self.reader.put(number, data)
        return data

    def attach(self, reader: Reader, after: int) -> None:
        """Give this reader everything after an event, from now on. A former reader ends."""
        former, self.reader = self.reader, reader
        if former is not None:
            former.end()
        if self.log is not None:
            for number, data in self.log.after(self.number, after):
                reader.put(number, data)

    def detach(self, reader: Reader) -> None:
        """The reader's connection is gone."""
        if self.reader is reader:
            self.reader = None


def priming(feed: Feed, after: int = 0) -> bytes:
    """The empty event that lets a client resume before the first message (2025-11-25, "Sending Messages")."""
    feed.openings += 1
    return encode("", event="", id=event_id(feed.number, after, feed.openings), retry=RETRY)


class Changes(Protocol):
    """Who knows of list changes. See ``Session``."""

    def dirty(self) -> bool: ...

    def announce(self) -> None: ...


async def follow(request: Request, feed: Feed, reader: Reader, changes: Changes | None = None) -> None:
    """Write what a reader is given until it is ended, or the server shuts down and nothing is owed any more.

    One task, no nursery, no timer: idle streams are many. What is dirty in ``changes`` is announced COALESCE later, in
    one go, and SPACING after the last time at the earliest: what the hub has spaced, a busy loop could bring together
    again. Raises ClientGone when the client has gone or does not read. Cancellation may cut an event.
    """
    server = request.server
    reader.wake = request.wake
    comment_at = trio.current_time() + COMMENT_AFTER
    announced, next_at = False, -inf
    while True:
        data = reader.take()
        if data:
            await request.write(data)
            feed.sent = max(feed.sent, reader.number)
            if announced:
                announced, next_at = False, trio.current_time() + SPACING
        elif reader.ended or (server.draining and not feed.owed):
            return
        elif changes is not None and changes.dirty():
            await trio.sleep_until(max(trio.current_time() + COALESCE, next_at))
            changes.announce()
            announced = True
            continue
        elif trio.current_time() >= comment_at - EARLY:
            await request.write(KEEP_ALIVE)
        elif await request.wait(until=comment_at):
            raise ClientGone
        else:
            continue
        comment_at = trio.current_time() + COMMENT_AFTER


class Outlet(Protocol):
    """Where a call's interim events and questions go. See ``PostOutlet``."""

    feed: Feed | None
    scope: trio.CancelScope | None

    @property
    def comment_at(self) -> float: ...

    async def send(self, text: str, instead: str = "") -> None: ...

    def say(self, text: str) -> None: ...

    async def comment(self) -> None: ...

    async def comment_now(self) -> None: ...

    async def end(self) -> None: ...


class PostOutlet:
    """The reply to one POST while it is not known whether it becomes JSON or an event stream.

    Nothing is written before the first ``send`` or ``comment``, which opens the stream. When the client has gone, or
    has come back by a GET that now reads the feed, events are only kept: a disconnect is no cancel (transports page).
    Several tasks may use one outlet; writes are in turn and never mixed.
    """

    __slots__ = ("_gone", "_headers", "_lock", "_make", "_outbox", "_prime", "_request", "_written", "feed", "scope")

    def __init__(
        self, request: Request, make: Callable[[], Feed], *, prime: bool, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._request = request
        self._make = make
        self._prime = prime
        self._headers = headers
        self._lock = trio.Lock()
        self._gone = False
        self._outbox: list[bytes] = []
        self._written = trio.current_time()
        self.feed: Feed | None = None
        self.scope: trio.CancelScope | None = None

    async def send(self, text: str, instead: str = "") -> None:
        """One message on the stream. Never raises ClientGone."""
        async with self._lock:
            feed = await self._open()
            await self._write(feed.add(text, instead))

    def say(self, text: str) -> None:
        """A message for the open stream, from outside its task: it goes with the next write, now if possible."""
        if self.feed is not None:
            self._outbox.append(self.feed.add(text))
            if self.scope is not None:
                self.scope.cancel()

    @property
    def comment_at(self) -> float:
        """Trio time at which ``comment`` is due."""
        return self._written + COMMENT_AFTER

    async def comment(self) -> None:
        """Write what ``say`` left, or a keep-alive if the stream has been silent for COMMENT_AFTER."""
        async with self._lock:
            if self.feed is None or trio.current_time() >= self.comment_at:
                await self._open()
                await self._write(KEEP_ALIVE)
            else:
                await self._write(b"")

    async def comment_now(self) -> None:
        """Open the stream, or keep it alive, from a task that is not the request's.

        The stream counts as open from the moment of the call on, so the request's task can't answer beside it. Nothing
        is done while something is being written anyway.
        """
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            await self._open()
            await self._write(KEEP_ALIVE)
        finally:
            self._lock.release()

    async def end(self) -> None:
        """The last message has been sent on the open stream."""
        async with self._lock:
            await self._write(b"")
            feed = self.feed
            assert feed is not None
            feed.owed = 0
            if feed.reader is not None:
                feed.reader.end()
            if not self._gone:
                try:
                    await self._request.finish()
                except ClientGone:
                    self._gone = True

    async def _open(self) -> Feed:
        feed = self.feed
        if feed is None:
            feed = self.feed = self._make()
            try:
                await self._request.start_stream(200, STREAM_HEADERS + self._headers)
                if self._prime:
                    await self._request.write(priming(feed))
            except ClientGone:
                self._gone = True
        return feed

    async def _write(self, data: bytes) -> None:
        self._written = trio.current_time()
        if self._outbox:
            data = b"".join((*self._outbox, data))
            self._outbox.clear()
        if self.feed is not None and self.feed.reader is not None:
            self._gone = True  # the client has come back by GET; that connection has it all
        if data and not self._gone:
            try:
                await self._request.write(data)
            except ClientGone:
                self._gone = True
