"""From an Origin to a link that has been spoken to: Streamable HTTP, and HTTP+SSE where a server is older than that.

A link opens with the handshake (compat K16): ``initialize`` is POSTed, and where that gets 400, 404 or 405 an event
stream is asked for instead (specification 2025-11-25, transports, backwards compatibility); another gateway is asked
for plain calls instead (compat S8). 401, 403, 5xx and network faults decide nothing. The probe of the modern era
(protocol.md section 3) belongs in front of these, in ``_open``; what it finds is one more subclass of ``HttpLink``.

httpx costs 50 ms and 5 MB, so this module is imported when the first remote server starts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio

from gateway import __version__
from gateway.errors import GatewayError, LinkLost, RateLimited, ServerProtocolError, StartFailed
from gateway.runtimes.base import Origin
from gateway.upstream.dial import Resolver, Target, open_transport, resolve
from gateway.upstream.http_link import CLOSE_LIMIT, HttpLink, NoStreamableHttp
from gateway.upstream.http_sse import SseLink
from gateway.upstream.plain_rpc import NO_MERGED_VIEW, PlainLink
from gateway.upstream.streamable import StreamableLink
from gateway.upstream.terms import Terms

__all__ = ["connect_http"]


@asynccontextmanager
async def connect_http(origin: Origin, terms: Terms, *, resolve_host: Resolver = resolve) -> AsyncIterator[HttpLink]:
    """Open a link to an origin for as long as the block lasts. Use it directly in ``async with``: it holds a nursery.

    Raises StartFailed when the handshake does not succeed within ``terms.timeout`` seconds, RateLimited when the server
    answers 429. Leaving the block ends every call in flight, then the session, within CLOSE_LIMIT.
    """
    target = Target.of(origin, f"open-mcp-gateway/{__version__}")
    transport = open_transport(origin, resolve_host=resolve_host)
    failure: GatewayError | None = None
    link: HttpLink | None = None
    alive = False
    try:
        async with trio.open_nursery() as nursery:
            try:
                link = await _open(origin, target, transport, nursery, terms)
            except GatewayError as error:
                failure = error
            else:
                try:
                    yield link
                finally:
                    # Also when cancelled: callers are told, not left to their deadlines.
                    alive = link.lost is None
                    link.lose(LinkLost(f"Server '{terms.server_id}' was stopped"))
            nursery.cancel_scope.cancel()
    finally:
        if alive and link is not None:
            with trio.move_on_after(CLOSE_LIMIT, shield=True):
                await link.goodbye()
        with trio.move_on_after(CLOSE_LIMIT, shield=True):
            await transport.aclose()
    if failure is not None:
        if isinstance(failure, (StartFailed, RateLimited)):
            raise failure
        raise StartFailed(failure.message, retry_after=failure.retry_after) from failure


async def _open(
    origin: Origin, target: Target, transport: httpx.AsyncBaseTransport, nursery: trio.Nursery, terms: Terms
) -> HttpLink:
    """Find out which transport the server speaks, newest first, and do the handshake."""
    details = origin.details
    link = StreamableLink(target, transport, nursery, terms, details)
    try:
        await link.open()
    except ServerProtocolError as error:
        if origin.plain is None or origin.plain[1]:
            raise
        raise StartFailed(f"{error.message}{NO_MERGED_VIEW}") from error  # 422, from an original gateway
    except NoStreamableHttp as refusal:
        link.lose(LinkLost("superseded"))
        if origin.plain is not None:
            url, server_id = origin.plain
            plain = PlainLink(target.at(url), server_id, transport, nursery, terms, details)
            await plain.open(refusal)
            return plain
        older = SseLink(target, transport, nursery, terms, details)
        await older.open(refusal)
        return older
    return link
