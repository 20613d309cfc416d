"""Newline frames: bytes in, whole lines out, with a ceiling (the stdio transport of every revision).

Sans-IO and linear: a chunk that holds whole lines is split once and nothing is copied twice. A line over the ceiling is
never held whole (robustness RB09): of it only both ends are kept, where a JSON-RPC id usually stands.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EDGE", "LineDecoder", "Oversize"]

EDGE: Final = 4096
"""Bytes kept of each end of a line that is too long."""


class Oversize:
    """A line over the ceiling: its first and last EDGE bytes, which may overlap, and its length."""

    __slots__ = ("head", "size", "tail")

    def __init__(self, head: bytes, tail: bytes, size: int) -> None:
        self.head = head
        self.tail = tail
        self.size = size

    def __repr__(self) -> str:
        return f"<Oversize {self.size} bytes>"


class LineDecoder:
    """Cuts a stream of bytes into lines of at most ``max_bytes`` (without the newline; a CR before it is dropped)."""

    __slots__ = ("_begun", "_head", "_lost", "_tail", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._begun = bytearray()  # a line whose end has not come; growing it is linear however small the fragments
        self._lost = 0  # bytes of an oversized line so far, 0 when there is none
        self._head = b""
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes | Oversize]:
        """The lines that these bytes complete, in order. Never raises."""
        *lines, rest = data.split(b"\n")
        done: list[bytes | Oversize] = lines  # type: ignore[assignment]
        if lines:
            if self._lost:
                done[0] = self._end_oversize(lines[0])
            elif self._begun:
                self._begun += lines[0]
                done[0] = bytes(self._begun)
                self._begun = bytearray()
            limit = self.max_bytes
            for at, line in enumerate(done):
                if type(line) is bytes:
                    if len(line) > limit:
                        done[at] = Oversize(line[:EDGE], line[-EDGE:], len(line))
                    elif line[-1:] == b"\r":
                        done[at] = line[:-1]
        if rest:
            self._keep(rest)
        return done

    def finish(self) -> list[bytes | Oversize]:
        """What stands after the last newline at the end of the stream: a last line without one, or nothing."""
        if self._lost:
            return [self._end_oversize(b"")]
        if not self._begun:
            return []
        return self.feed(b"\n")

    def _keep(self, rest: bytes) -> None:
        if self._lost:
            self._lost += len(rest)
            self._tail = (self._tail + rest[-EDGE:])[-EDGE:]
            return
        self._begun += rest
        if len(self._begun) > self.max_bytes:
            self._head, self._tail, self._lost = bytes(self._begun[:EDGE]), bytes(self._begun[-EDGE:]), len(self._begun)
            self._begun = bytearray()

    def _end_oversize(self, last: bytes) -> Oversize:
        size = self._lost + len(last)
        found = Oversize(self._head, (self._tail + last)[-EDGE:], size)
        self._head = self._tail = b""
        self._lost = 0
        return found
