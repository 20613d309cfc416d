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
from gateway.upstream.terms import Terms

__all__ = ["Terms", "UpstreamLink", "connect"]


class UpstreamLink(Link, Protocol):
    """What the supervisor sees of a link, whichever kind it is."""

    lost: LinkLost | None
    ping: Callable[[float], Awaitable[None]] | None
    """Asks the server whether it lives, within some seconds; raises UpstreamError. None where its life is visible."""

    @property
    def details(self) -> Mapping[str, Any]: ...

    async def wait_closed(self) -> None: ...

    async def request(self, method: str, params_text: str = "", *, timeout: float) -> Message: ...


@asynccontextmanager
async def connect(place: Place, terms: Terms) -> AsyncIterator[UpstreamLink]:
    """Open a link for as long as the block lasts. Use it directly in ``async with``: it holds a nursery.

    Raises StartFailed when the handshake does not succeed within ``terms.timeout`` seconds.
    """
    if isinstance(place, Origin):
        # httpx costs 50 ms and 5 MB, so it is paid by the first remote server only.
        from gateway.upstream.http import connect_http

        async with connect_http(place, terms) as http_link:
            yield http_link
        return
    link = PipeLink(
        place,
        server_id=terms.server_id,
        on_notice=terms.on_notice,
        on_ask=terms.on_ask,
        isolated=terms.isolated,
        max_message_bytes=terms.max_message_bytes,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        try:
            await link.handshake(terms.capabilities, terms.info, terms.version, terms.timeout)
        except GatewayError as error:
            with trio.move_on_after(0.5):  # RB01: the exit code belongs into the message
                if isinstance(error, LinkLost):
                    await place.wait_exited()
            raise start_failure(error, place) from error
        yield link
        nursery.cancel_scope.cancel()
