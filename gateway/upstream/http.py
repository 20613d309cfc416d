"""From an Origin to a link that has been spoken to: modern or legacy, Streamable HTTP or HTTP+SSE.

A link opens with the question for its server's era (protocol.md section 3, "Probing an upstream"): ``server/discover``
and ``initialize`` are POSTed in the order of ``terms.eras``. Where ``initialize`` gets 400, 404 or 405 an event stream
is asked for instead (specification 2025-11-25, transports, backwards compatibility; compat K16); another gateway is
asked for plain calls instead (compat S8). 401, 403, 5xx and network faults decide nothing.

httpx costs 50 ms and 5 MB, so this module is imported when the first remote server starts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import httpx
import trio

from gateway import __version__
from gateway.errors import GatewayError, LinkLost, RateLimited, ServerProtocolError, StartFailed, UpstreamError
from gateway.protocol.eras import Era
from gateway.runtimes.base import Origin
from gateway.upstream.dial import Resolver, Target, border, open_transport, resolve
from gateway.upstream.http_link import CLOSE_LIMIT, HttpLink, NoStreamableHttp
from gateway.upstream.http_sse import SseLink
from gateway.upstream.modern_http import ModernHttpLink
from gateway.upstream.plain_rpc import NO_MERGED_VIEW, PlainLink
from gateway.upstream.streamable import StreamableLink
from gateway.upstream.terms import Terms

__all__ = ["connect_http"]

FIRST_PAUSE: Final = 0.02
LAST_PAUSE: Final = 0.5
"""Seconds between two looks at whether a server that was just started listens."""
ANSWER_LIMIT: Final = 5.0
"""Seconds one such look may take."""
END_WAIT: Final = 0.3
"""Seconds for which a failed handshake waits for the news that the server has ended."""


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
                async with _while_it_lasts(origin):
                    if origin.starting:
                        await _until_it_answers(target, transport, terms)
                    link = await _open(origin, target, transport, nursery, terms)
            except GatewayError as error:
                failure = error
            else:
                link.remark = origin.remark
                if origin.ended is not None:
                    nursery.start_soon(_lose_with, origin.ended, link)
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
    """Find out which era and which transport the server speaks, and do the handshake."""
    eras = terms.eras
    modern = ModernHttpLink(target, transport, nursery, terms, origin.details) if Era.MODERN in eras else None
    asked = False
    if modern is not None and eras[0] is Era.MODERN:
        found = await modern.probe(last=len(eras) == 1)
        if found:
            return modern
        asked = found is False
        if asked:
            modern.lose(_SUPERSEDED)
    try:
        link = await _open_legacy(origin, target, transport, nursery, terms, None if asked else modern)
    except _IsModern as found_out:
        return found_out.link
    link.decided = "initialize" if len(eras) > 1 else "catalog"
    if modern is not None:
        # It speaks both and was only slow: nothing is known against the modern era.
        link.slow = await modern.answered_late()
        modern.lose(_SUPERSEDED)
    return link


@asynccontextmanager
async def _while_it_lasts(origin: Origin) -> AsyncIterator[None]:
    """Give up what the block does when the server is known to have ended. Raises StartFailed then, saying why."""
    if origin.ended is None:
        yield
        return
    reason = ""
    ended = origin.ended
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal reason
            reason = await ended()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            yield
        except GatewayError as error:
            # What breaks because the server has just ended is better explained by why it ended.
            failure = error
            with trio.move_on_after(END_WAIT):
                await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    if reason:
        raise StartFailed(reason) from failure
    if failure is not None:
        raise failure


async def _lose_with(ended: Callable[[], Awaitable[str]], link: HttpLink) -> None:
    """Tell the link's callers at once when the server behind it has ended."""
    reason = await ended()
    link.lose(LinkLost(f"Server '{link.server_id}' ended: {reason}"))


async def _until_it_answers(target: Target, transport: httpx.AsyncBaseTransport, terms: Terms) -> None:
    """Return when something answers at the URL, whatever it says, but for a proxy's word that nobody is there yet.

    For a server that has just been started. Waits for as long as it is let: the start timeout is the caller's.
    """
    pause = FIRST_PAUSE
    while True:
        with suppress(UpstreamError), trio.move_on_after(ANSWER_LIMIT), border(terms.server_id, target.name):
            request = httpx.Request("GET", target.url, headers=[*target.headers, (b"accept", b"application/json")])
            request.extensions = {"timeout": {"connect": ANSWER_LIMIT, "read": ANSWER_LIMIT, "pool": ANSWER_LIMIT}}
            response = await transport.handle_async_request(request)
            await response.aclose()
            if response.status_code not in (502, 503, 504):
                return
        await trio.sleep(pause)
        pause = min(pause * 2, LAST_PAUSE)


_SUPERSEDED: Final = LinkLost("superseded")


class _IsModern(Exception):
    """The server that was spoken to in the old way turned out to be a modern one."""

    def __init__(self, link: ModernHttpLink) -> None:
        super().__init__()
        self.link = link


async def _open_legacy(
    origin: Origin,
    target: Target,
    transport: httpx.AsyncBaseTransport,
    nursery: trio.Nursery,
    terms: Terms,
    modern: ModernHttpLink | None,
) -> HttpLink:
    """Do the handshake over the newest transport that the server has.

    ``modern`` is for asking a server that is no good legacy one whether it is a modern one: it never has been asked, or
    was slow to answer. Raises _IsModern then.
    """
    link = StreamableLink(target, transport, nursery, terms, origin.details)
    try:
        await link.open()
        if link.sessionless and modern is not None and terms.eras[0] is Era.LEGACY:
            # Without a session it can neither ask nor announce anything (protocol.md section 4.6).
            await _ask(modern, link)
        await link.offer_nothing()
        return link
    except ServerProtocolError as error:
        if origin.plain is None or origin.plain[1]:
            raise
        raise StartFailed(f"{error.message}{NO_MERGED_VIEW}") from error  # 422, from an original gateway
    except StartFailed:
        if modern is not None and link.perhaps_modern:
            await _ask(modern, link)
        raise
    except NoStreamableHttp as error:
        no_streamable = error
    if modern is not None:
        await _ask(modern, link)
    link.lose(_SUPERSEDED)
    if origin.plain is not None:
        url, server_id = origin.plain
        plain = PlainLink(target.at(url), server_id, transport, nursery, terms, origin.details)
        await plain.open(no_streamable)
        return plain
    older = SseLink(target, transport, nursery, terms, origin.details)
    await older.open(no_streamable)
    return older


async def _ask(modern: ModernHttpLink, link: HttpLink) -> None:
    """Raise _IsModern if the server is modern. What decides nothing leaves what is known already."""
    with suppress(UpstreamError, RateLimited):
        if await modern.probe(last=False):
            link.lose(_SUPERSEDED)
            raise _IsModern(modern)
