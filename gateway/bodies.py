"""Bodies of HTTP requests and answers that leave nothing to the garbage collector.

httpx's and httpcore's own are async generators. One that is cancelled or left early stays suspended until the collector
finds it, outside any task, which trio complains of.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

__all__ = ["Body", "unwound"]


class Body:
    """The body of a request, in one piece."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data, self._data = self._data, None
        if data is None:
            raise StopAsyncIteration
        return data


@asynccontextmanager
async def unwound(chunks: AsyncIterator[bytes], *broken: type[Exception]) -> AsyncIterator[AsyncIterator[bytes]]:
    """An answer's body as it comes. Left early, the generators underneath it have ended with the block.

    ``broken``: what the library raises for a connection that is lost on the way.
    """
    try:
        yield chunks
    finally:
        # Closing the outermost would leave those inside it suspended; a cancellation at their next read ends them all.
        with trio.CancelScope() as scope, suppress(*broken):
            scope.cancel()
            async for _ in chunks:
                pass
