"""What the two HTTP transports share: a call's task, deadlines, questions, errors. See ``streamable`` and ``http_sse``.

Two things hold for every line. A call is sent once: it is repeated only where the server's own answer proves that
nothing ran (404 for its session, RB54), never after a broken connection. And whatever a server does (hang, drip, flood,
redirect, answer nonsense) ends in an error that names the cause, within the call's deadline and ``max_message_bytes``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import httpx
import trio

from gateway.errors import (
    CredentialsRefused,
    GatewayError,
    LinkLost,
    RateLimited,
    ServerProtocolError,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import Ask, Call, Exchange, Interim, Reply, decline, own_request
from gateway.protocol.eras import Era
from gateway.protocol.message import (
    ERROR,
    NOTIFICATION,
    REQUEST,
    Malformed,
    Message,
    build_notification,
    build_request,
    build_result,
    decode_reply,
    dumps,
)
from gateway.protocol.sse import Event, Oversize
from gateway.telemetry.logs import TRACE, Throttle
from gateway.upstream.dial import CONNECT_LIMIT, Target, border
from gateway.upstream.pending import Pending
from gateway.upstream.pipe import TICK
from gateway.upstream.terms import Terms

__all__ = [
    "CLOSE_LIMIT",
    "JSON_BODY",
    "POST_LIMIT",
    "HttpLink",
    "NoStreamableHttp",
    "body_of",
    "content_type",
    "one_line",
]

log = logging.getLogger("gateway_core")

MAX_ASKS: Final = 64
"""Questions of one server that may be open."""
MAX_POSTS: Final = 256
"""Notifications and answers that may be on their way to one server; more are dropped."""
POST_LIMIT: Final = 30.0
"""Seconds a notification or an answer may take."""
CLOSE_LIMIT: Final = 2.0
"""Seconds for the DELETE that ends a session."""
MAX_STRIKES: Final = 3
"""Calls in a row that failed for want of the server, after which the link is given up and the handshake tried anew."""
DISCARD_LIMIT: Final = 1.0
"""Seconds to wait for the end of a body that nobody wants."""
MAX_SMALL: Final = 64 * 1024
"""Bytes read of a body that should hold nothing or an error."""
JSON_BODY: Final = (b"content-type", b"application/json")

_any_id = re.compile(rb'"id" ?: ?([0-9]{1,18})')


class NoStreamableHttp(UpstreamError):
    """``initialize`` got 400, 404 or 405: perhaps a server of 2024-11-05."""


class HttpLink:
    """A legacy server behind a URL. Implements ``exchange.Link``; what both transports share.

    One task per call carries it, one sweeps deadlines; tasks live in the nursery given. ``lost`` is set when the link
    is over for good. Constructor arguments are ``Terms``; questions are put to a client only where it owns the server.
    """

    era = Era.LEGACY
    transport_name: ClassVar[str]
    prefers_sole_call: ClassVar[bool]
    """Whether what comes on no call's own stream is taken for part of the only call in flight, if there is one."""

    def __init__(
        self,
        target: Target,
        transport: httpx.AsyncBaseTransport,
        nursery: trio.Nursery,
        terms: Terms,
        details: Mapping[str, Any],
    ) -> None:
        self.server_id = terms.server_id
        self.ping: Callable[[float], Awaitable[None]] | None = self._ping
        """Asks the server whether it lives: any reply will do. Raises an UpstreamError (compat K16)."""
        self.facts: Mapping[str, Any] = {}
        self.pending = Pending()
        self.lost: LinkLost | None = None
        self._target = target
        self._transport = transport
        self._nursery = nursery
        self._terms = terms
        self._details = details
        self._max = terms.max_message_bytes
        self._can_ask = terms.isolated
        self._asks: dict[str, tuple[Ask, Call | None]] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._posts = 0
        self._strikes = 0
        self._closed = trio.Event()
        self._wake_sweeper = trio.Event()
        self._noise = Throttle(log)
        nursery.start_soon(self._sweeper)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server_id} in_flight={len(self.pending)}{' lost' if self.lost else ''}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts of the origin, for people."""
        return {**self._details, "transport": self.transport_name}

    # ------------------------------------------------------------------------------------------------ the whole link
    async def wait_closed(self) -> None:
        """Return when the link is lost; ``lost`` says why."""
        await self._closed.wait()

    async def _ping(self, timeout: float) -> None:
        await self.request("ping", timeout=timeout)

    def lose(self, error: LinkLost) -> None:
        """The link is over: every call in flight fails with this error. Idempotent."""
        if self.lost is not None:
            return
        self.lost = error
        self.pending.fail_all(error)
        for scope in self._scopes.values():
            scope.cancel()
        for ask, _ in list(self._asks.values()):
            ask.withdraw("the server has ended")
        self._asks.clear()
        self._wake_sweeper.set()
        self._closed.set()

    async def goodbye(self) -> None:
        """Tell the server that we leave, where its transport has a way to."""

    async def _sweeper(self) -> None:
        pending = self.pending
        while self.lost is None:
            if not pending.calls:
                self._wake_sweeper = trio.Event()
                await self._wake_sweeper.wait()
            await trio.sleep(TICK)
            for call in pending.overdue(trio.current_time()):
                seconds = call.deadline - call.started
                self.cancel(call, "timeout")
                call.fail(UpstreamTimeout(f"Server '{self.server_id}' did not answer within {seconds:.3g} s"))

    # ------------------------------------------------------------------------------------------------------- sending
    def call(self, exchange: Exchange) -> Call:
        """Send a request, in a task of its own. See ``exchange.Link.call``."""
        if self.lost is not None:
            raise self.lost
        message = exchange.message
        pending = self.pending
        id = pending.new_id()
        changes = exchange.changes
        meta = message.meta
        if "progressToken" in meta:
            changes = {**(changes or {}), "_meta": dumps({**meta, "progressToken": id})}
        call = Call(exchange, self, id, trio.current_time())
        text = build_request(str(id), message.method, message.params_text(changes))
        self._scopes[id] = trio.CancelScope()
        self._nursery.start_soon(self._carry, call, text.encode())
        if not pending.calls:
            self._wake_sweeper.set()
        pending.calls[id] = call
        return call

    async def _carry(self, call: Call, body: bytes) -> None:
        """One call's task: it ends with the reply, an error or the call's cancellation."""
        try:
            with self._scopes[call.id]:
                await self._converse(call, body)
        except GatewayError as error:
            self.pending.drop(call)
            self._strike(error)
            call.fail(error)
        finally:
            del self._scopes[call.id]
            for key, (ask, owner) in list(self._asks.items()):
                if owner is call:
                    del self._asks[key]
                    ask.withdraw("the request behind it has ended")

    async def _converse(self, call: Call, body: bytes) -> None:
        """Send a call and see to its reply. Raises GatewayError."""
        raise NotImplementedError

    async def _post(self, text: str) -> None:
        """Send a notification or an answer. Raises GatewayError."""
        raise NotImplementedError

    async def request(
        self,
        method: str,
        params_text: str = "",
        *,
        timeout: float,
    ) -> Message:
        """A request of the gateway's own: the reply, which may be an error. Raises what ``Call.next`` raises.

        Cancelling it cancels the request at the server.
        """
        return await own_request(self, method, params_text, timeout)

    def notify(self, method: str, params_text: str = "") -> None:
        """Send a notification; dropped when the link is lost or full."""
        self._post_soon(build_notification(method, params_text))

    def cancel(self, call: Call, reason: str = "") -> None:
        """See ``exchange.Link.cancel``: the response is closed, the server told; ``initialize`` can't be cancelled."""
        scope = self._scopes.get(call.id)
        if scope is not None:
            scope.cancel()
        if self.pending.drop(call) and call.exchange.message.method != "initialize":
            tail = f',"reason":{dumps(reason)}' if reason else ""
            self.notify("notifications/cancelled", f'{{"requestId":{call.id}{tail}}}')

    def _post_soon(self, text: str) -> None:
        if self.lost is None and self._posts < MAX_POSTS:
            self._posts += 1
            self._nursery.start_soon(self._post_quietly, text)

    async def _post_quietly(self, text: str) -> None:
        try:
            with trio.move_on_after(POST_LIMIT):
                await self._post(text)
        except GatewayError as error:
            log.debug("a message to server %s was not taken: %s", self.server_id, error)
        finally:
            self._posts -= 1

    @asynccontextmanager
    async def _send(
        self, method: str, url: httpx.URL, headers: Sequence[tuple[bytes, bytes]], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """One HTTP request, straight to the transport; the response is closed with the block."""
        request = httpx.Request(
            method,
            url,
            headers=[*self._target.headers, *headers],
            content=body,
            extensions={"timeout": {"connect": CONNECT_LIMIT}},
        )
        if body is not None:
            request.stream = _Body(body)
        with border(self.server_id, self._target.name):
            response = await self._transport.handle_async_request(request)
            response.request = request
            try:
                yield response
            finally:
                await response.aclose()

    # -------------------------------------------------------------------------------------------------- what comes back
    def _strike(self, error: GatewayError) -> None:
        """Count failures that say the server is away. The last of a row ends the link, if nobody else is using it."""
        if type(error) in (UpstreamError, LinkLost, CredentialsRefused):
            self._strikes += 1
            if self._strikes >= MAX_STRIKES and not self.pending.calls:
                self.lose(LinkLost(error.message))

    async def _discard(self, response: httpx.Response) -> None:
        """Read the little that follows an accepted message, so that its connection can be used again."""
        with suppress(ServerProtocolError), trio.move_on_after(DISCARD_LIMIT):
            await self._read(response, MAX_SMALL)

    async def _read(self, response: httpx.Response, limit: int) -> bytes:
        """A whole body. Raises ServerProtocolError for one over the limit or compressed (we ask for identity)."""
        coding = response.headers.get("content-encoding", "identity").lower()
        if coding != "identity":
            raise self._nonsense(f"sent a body with content-encoding {coding[:20]}, which was not asked for")
        data = bytearray()
        async with body_of(response) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise self._too_large()
        return bytes(data)

    def _nonsense(self, what: str) -> ServerProtocolError:
        return ServerProtocolError(f"Server '{self.server_id}' at {self._target.name} {what}")

    def _too_large(self) -> ServerProtocolError:
        return self._nonsense(f"sent a message of over {self._max} bytes (max_message_bytes)")

    async def _refusal(self, response: httpx.Response) -> GatewayError:
        """The error for a status that is no success."""
        status = response.status_code
        said = await self._said(response)
        who = f"Server '{self.server_id}' at {self._target.name}"
        if status == 429:
            return RateLimited(f"{who} asks for fewer requests (HTTP 429){said}", retry_after=_retry_after(response))
        if 300 <= status < 400:
            where = urlsplit(response.headers.get("location", ""))
            goal = f"{where.scheme}://{where.netloc.rpartition('@')[2]}" if where.netloc else "another path there"
            return ServerProtocolError(
                f"{who} redirects to {goal[:200]} (HTTP {status}); redirects are not followed, set url to its goal"
            )
        if status in (401, 403):
            return CredentialsRefused(
                f"{who} refuses our credentials (HTTP {status}); check the headers or the key that it gets{said}"
            )
        kind = UpstreamError if status >= 500 else ServerProtocolError
        return kind(f"{who} answered with HTTP {status}{said}")

    async def _said(self, response: httpx.Response) -> str:
        """What a JSON-RPC error in the body says, for people; "" where there is none."""
        if content_type(response) == "application/json":
            with suppress(GatewayError, Malformed, httpx.HTTPError), trio.move_on_after(1):
                message = decode_reply(one_line(await self._read(response, MAX_SMALL)))
                if message.kind is ERROR:
                    return f": {str(message.result.get('message', ''))[:200]}"
        return ""

    def _event(self, event: Event | Oversize, call: Call | None) -> None:
        """One event of a stream: ``call`` is the one whose stream it is, None for a stream of the session's."""
        if type(event) is Oversize:
            if call is not None:
                raise self._too_large()
            self._oversize(event)
        elif type(event) is Event and event.event == "message" and event.data:
            try:
                message = decode_reply(one_line(event.data))
            except Malformed as error:
                self._noise.warning(
                    "not-json",
                    "server %s sent an event that is no JSON-RPC message (%s): %.200r",
                    self.server_id,
                    error,
                    event.data[:200],
                )
                return
            self._message(message, call)

    def _oversize(self, event: Oversize) -> None:
        """An event over the limit on a shared stream: end the call it answers, or every call if that can't be told."""
        error = self._too_large()
        self._noise.warning("oversize", "%s", error.message)
        for part in (event.head, event.tail):
            for found in _any_id.finditer(part):
                call = self.pending.calls.pop(int(found[1]), None)
                if call is not None:
                    call.fail(error)
                    return
        self.pending.fail_all(error)

    def _message(self, message: Message, call: Call | None) -> None:
        if log.isEnabledFor(TRACE):
            log.log(TRACE, "Received message %s", message.text)
        kind = message.kind
        if kind > NOTIFICATION:
            if call is not None and message.id != call.id:
                self.pending.unmatched += 1
                return
            ended = self.pending.take(message.id)
            if ended is not None:
                self._strikes = 0
                self._replied(ended, message)
                ended.finish(Reply(message))
        elif kind is REQUEST:
            self._asked(message, call)
        else:
            self._notified(message, call)

    def _replied(self, call: Call, reply: Message) -> None:
        """A hook: a call has got this reply."""

    def _asked(self, message: Message, call: Call | None) -> None:
        if message.method == "ping":
            self._post_soon(build_result(message.id_text, "{}"))
            return
        key = message.id_text
        if key in self._asks:
            self._noise.warning("ask-id", "server %s reused the id %s of an open request", self.server_id, key)
            return

        def answer(text: str) -> None:
            self._asks.pop(key, None)
            self._post_soon(text)

        ask = Ask(message, answer)
        if not self._can_ask or len(self._asks) >= MAX_ASKS:
            decline(ask)
            return
        self._asks[key] = (ask, call)
        sole = self.pending.sole_client_call()
        if call is None and self.prefers_sole_call:
            call = sole
        # Python servers put a call's question on the session's stream when the tool does not name its request, so the
        # only call in flight is also where a question goes that its client can't be asked otherwise.
        if call is not None:
            call.deliver(ask)
        elif not self._terms.on_ask(ask):
            if sole is not None:
                sole.deliver(ask)
            else:
                decline(ask)

    def _notified(self, message: Message, call: Call | None) -> None:
        method = message.method
        if method == "notifications/progress":
            call = self.pending.get(message.param("progressToken"))
            if call is not None:
                token = call.exchange.message.meta.get("progressToken")
                if token is not None:
                    text = message.params_text({"progressToken": dumps(token)})
                    call.deliver(Interim(build_notification(method, text)))
        elif method == "notifications/cancelled":
            ask, _ = self._asks.pop(dumps(message.param("requestId")), (None, None))
            if ask is not None:
                ask.withdraw(str(message.param("reason") or "")[:200])
        elif method.endswith("/list_changed") or method == "notifications/resources/updated":
            self._terms.on_notice(message)
        else:
            if call is None and self.prefers_sole_call and self._terms.isolated and method == "notifications/message":
                call = self.pending.sole_client_call()
            if call is not None and call.exchange.client.key:
                call.deliver(Interim(message.text))
            else:
                self._terms.on_notice(message)


class _Body(httpx.AsyncByteStream):
    """A request's body. httpx's own is an async generator, which a send that is cancelled leaves to the collector."""

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
async def body_of(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it comes. Left early, the generators underneath are unwound at once instead of by the collector."""
    chunks = aiter(response.stream)  # type: ignore[arg-type]
    try:
        yield chunks
    finally:
        # Closing the outermost would leave those inside it suspended; a cancellation at their next read ends them all.
        with trio.CancelScope() as scope, suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in chunks:
                pass


def content_type(response: httpx.Response) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def one_line(data: bytes) -> bytes:
    """A message without line breaks: in checked JSON they stand between tokens only."""
    return data.replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in data or b"\r" in data else data


def _retry_after(response: httpx.Response) -> float | None:
    """Retry-After in seconds, from either of its forms (RFC 9110, 10.2.3)."""
    value: str = response.headers.get("retry-after", "").strip()
    if value.isdigit() and len(value) < 9:
        return float(value)
    if value:
        import time
        from email.utils import parsedate_to_datetime

        with suppress(ValueError, TypeError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
