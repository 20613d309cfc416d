"""Who is next: the queue for the slots of one server."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import trio

from gateway.errors import GatewayError

__all__ = ["Queue", "Turn"]


class Turn:
    """A request's place in the queue for a slot."""

    __slots__ = ("error", "given", "task")

    def __init__(self) -> None:
        self.task = trio.Event()
        self.given = False
        self.error: GatewayError | None = None


class Queue:
    """Who waits for a slot. Clients take turns; what one client has sent is served in its order.

    So a client that sends a thousand requests at once makes others wait for one of them, not for all.
    """

    __slots__ = ("_lines", "_size")

    def __init__(self) -> None:
        self._lines: dict[str, deque[Turn]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Turn]:
        for line in self._lines.values():
            yield from line

    def put(self, client: str, turn: Turn) -> None:
        """Stand at the end of a client's line."""
        self._lines.setdefault(client, deque()).append(turn)
        self._size += 1

    def take(self) -> Turn:
        """Who is next; the client's line goes behind the others'. There must be one."""
        client, line = next(iter(self._lines.items()))
        turn = line.popleft()
        del self._lines[client]
        if line:
            self._lines[client] = line
        self._size -= 1
        return turn

    def remove(self, client: str, turn: Turn) -> None:
        """Leave; harmless for who has left."""
        line = self._lines.get(client)
        if line is not None and turn in line:
            line.remove(turn)
            self._size -= 1
            if not line:
                del self._lines[client]

    def clear(self) -> None:
        """Send everybody away."""
        self._lines.clear()
        self._size = 0
