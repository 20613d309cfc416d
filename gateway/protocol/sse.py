"""Event streams (``text/event-stream``, WHATWG HTML section 9.2): an encoder, and an incremental decoder.

Sans-IO, and used on both sides of the gateway. The decoder is made for hostile streams: it holds at most
``max_event_bytes`` of one event plus what is fed at once, spends time linear in the bytes whatever their
fragmentation, and never raises. What it does not understand it ignores, as the standard demands.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EVENT_STREAM", "KEEP_ALIVE", "Decoder", "Event", "Oversize", "encode"]

EVENT_STREAM: Final = "text/event-stream"
KEEP_ALIVE: Final = b": \n\n"
"""A comment: says nothing, and keeps proxies and clients from taking a quiet stream for a dead one."""

EDGE: Final = 4096
"""Bytes kept of either end of an event that is too large, so that its JSON-RPC id may be found (robustness RB09)."""
MAX_ID: Final = 1024
"""Longer event ids are ignored: they travel back in a header."""
MAX_RETRY_DIGITS: Final = 9
_BOM: Final = b"\xef\xbb\xbf"


def encode(data: str, *, event: str = "message", id: str | None = None, retry: int | None = None) -> bytes:
    """One event with ``data`` on one line.

    ``data`` is checked JSON or a URI: line breaks in it stand between tokens only and become spaces, since not every
    client joins several data lines. ``event`` "" leaves the event's name out (it is then "message" by default).
    ``retry`` is in milliseconds. ``event`` and ``id`` must not hold line breaks. ``encode("", event="", id=...,
    retry=...)`` is the priming event of 2025-11-25.
    """
    if "\n" in data or "\r" in data:
        data = data.replace("\n", " ").replace("\r", " ")
    head = f"event: {event}\n" if event else ""
    if id is not None:
        head += f"id: {id}\n"
    if retry is not None:
        head += f"retry: {retry}\n"
    return f"{head}data: {data}\n\n".encode()


class Event:
    """A received event: its name ("message" unless named), its data, and the last event id of the stream so far.

    ``data`` is bytes, as received, because decoding and checking it is the message's business.
    """

    __slots__ = ("data", "event", "id")

    def __init__(self, event: str, data: bytes, id: str) -> None:
        self.event = event
        self.data = data
        self.id = id

    def __repr__(self) -> str:
        return f"<Event {self.event} {len(self.data)} bytes id={self.id!r}>"


class Oversize:
    """In the place of an event over the limit: the first and the last bytes of its data (EDGE at most)."""

    __slots__ = ("head", "tail")

    def __init__(self, head: bytes, tail: bytes) -> None:
        self.head = head
        self.tail = tail


class Decoder:
    """Bytes in, events out. One per stream: create a new one after reconnecting, and carry ``last_event_id`` over.

    last_event_id   what ``Last-Event-ID`` would be now, "" when the server gave none (or reset it)
    retry           milliseconds the server wants us to wait before reconnecting, None when it said nothing
    overflowing     whether the event being received is over the limit already; ``feed`` gives its Oversize at its end

    An event that the stream's end cuts off is dropped (standard, section 9.2.6).
    """

    __slots__ = (
        "_after_cr",
        "_buffer",
        "_data",
        "_event",
        "_first",
        "_head",
        "_id",
        "_line_empty",
        "_max",
        "_size",
        "_tail",
        "last_event_id",
        "overflowing",
        "retry",
    )

    def __init__(self, max_event_bytes: int, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self.overflowing = False
        self._max = max_event_bytes + 16  # the field's name and the line break do not count
        self._buffer = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._event = ""
        self._id = last_event_id
        self._first = True
        self._after_cr = False
        self._head = b""
        self._tail = bytearray()
        self._line_empty = True

    def feed(self, data: bytes) -> list[Event | Oversize]:
        """The events that these bytes complete, in order."""
        out: list[Event | Oversize] = []
        if not data:
            return out
        if self._after_cr and data[0] == 10:
            data = data[1:]
        self._after_cr = data[-1:] == b"\r"
        buffer = self._buffer
        for piece in data.splitlines(True):  # at CR, LF and CRLF only, unlike str.splitlines
            complete = piece[-1] in (10, 13)
            if complete:
                piece = piece.rstrip(b"\r\n")
            if self.overflowing:
                self._skip(piece, complete, out)
            elif self._size + len(buffer) + len(piece) > self._max:
                self._overflow(piece, complete, out)
            elif not complete:
                buffer += piece
                if buffer[0] == 58:  # a comment, which may be endless
                    del buffer[1:]
            elif buffer:
                buffer += piece
                line = bytes(buffer)
                buffer.clear()
                self._line(line, out)
            else:
                self._line(piece, out)
        return out

    # ------------------------------------------------------------------------------------------------------- one line
    def _line(self, line: bytes, out: list[Event | Oversize]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(out)
            return
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            self._size += len(line) + 1
        elif name == b"event":
            self._event = str(value[:256], "utf-8", "replace")
        elif name == b"id":
            if len(value) <= MAX_ID and b"\0" not in value:
                self._id = str(value, "utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) <= MAX_RETRY_DIGITS:
            self.retry = int(value)

    def _dispatch(self, out: list[Event | Oversize]) -> None:
        self.last_event_id = self._id
        if self._data:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            out.append(Event(self._event or "message", data, self._id))
            self._data = []
            self._size = 0
        self._event = ""

    # -------------------------------------------------------------------------------------------- an event too large
    def _overflow(self, piece: bytes, complete: bool, out: list[Event | Oversize]) -> None:
        self.overflowing = True
        head = b"".join((*self._data[:1], bytes(self._buffer[:EDGE]), piece[:EDGE]))
        self._head = head[:EDGE]
        self._tail[:] = (self._data[-1] if self._data else b"")[-EDGE:]
        self._tail += self._buffer[-EDGE:]
        self._line_empty = not self._buffer
        self._data = []
        self._size = 0
        self._buffer.clear()
        self._skip(piece, complete, out)

    def _skip(self, piece: bytes, complete: bool, out: list[Event | Oversize]) -> None:
        if piece:
            self._line_empty = False
            self._tail += piece[-EDGE:]
            if len(self._tail) > EDGE:
                del self._tail[:-EDGE]
        if not complete:
            return
        if self._line_empty:
            out.append(Oversize(self._head, bytes(self._tail)))
            self.overflowing = False
            self._head = b""
            self._tail.clear()
            self._event = ""
        self._line_empty = True
