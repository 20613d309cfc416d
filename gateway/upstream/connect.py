"""From a started place to a link that has been spoken to: the one door between ``runtimes`` and ``upstream``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from gateway.errors import GatewayError, LinkLost
from gateway.exchange import Link
from gateway.protocol.message import Message
from gateway.runtimes.base import Origin, Place
from gateway.upstream.pipe import PipeLink, start_failure
from gateway.upstream.terms import Terms, WrongEra

__all__ = ["Terms", "UpstreamLink", "WrongEra", "connect"]


class UpstreamLink(Link, Protocol):
    """What the supervisor sees of a link, whichever kind it is."""

    lost: LinkLost | None
    decided: str
    """By what its era was found out: "server/discover", "initialize" or "catalog"."""
    slow: bool
    """Whether it was spoken to in its second era only because it took too long to answer in the first."""
    ping: Callable[[float], Awaitable[None]] | None
    """Asks the server whether it lives, within some seconds; raises UpstreamError. None where its life is visible."""

    @property
    def details(self) -> Mapping[str, Any]: ...

    async def wait_closed(self) -> None: ...

    async def request(self, method: str, params_text: str = "", *, timeout: float) -> Message: ...


@asynccontextmanager
async def connect(place: Place, terms: Terms) -> AsyncIterator[UpstreamLink]:
    """Open a link for as long as the block lasts. Use it directly in ``async with``: it holds a nursery.

    Raises StartFailed when the handshake does not succeed within ``terms.timeout`` seconds, and WrongEra when the place
    has to be opened again for another era to be tried; in a group, as nurseries have it.
    """
    if isinstance(place, Origin):
        # httpx costs 50 ms and 5 MB, so only gateways with a server that is reached by HTTP pay for it.
        from gateway.upstream.http import connect_http

        async with connect_http(place, terms) as http_link:
            yield http_link
        return
    link = PipeLink(place, terms)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        try:
            await link.handshake()
        except GatewayError as error:
            with trio.move_on_after(0.5):  # RB01: the exit code belongs into the message
                if isinstance(error, LinkLost):
                    await place.wait_exited()
            raise start_failure(error, place) from error
        yield link
        nursery.cancel_scope.cancel()
