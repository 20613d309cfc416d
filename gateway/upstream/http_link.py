"""What all HTTP transports share: a call's tasks, deadlines, questions, errors. See ``streamable``, ``http_sse``,
``plain_rpc`` and ``modern_http``.

Two things hold for every line. A call is sent once: it is repeated only where the server's own answer proves that
nothing ran (404 for its session, RB54), never after a broken connection. And whatever a server does (hang, drip, flood,
redirect, answer nonsense) ends in an error that names the cause, within the call's deadline and ``max_message_bytes``.

One call may take several requests, one after another: a tool that only runs as a task, the rounds of a modern server.
Each has an id of its own, ``call.id`` being the last one's, and a task of its own (``_carry``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import httpx
import trio

from gateway.bodies import Body, unwound
from gateway.errors import (
    CredentialsRefused,
    GatewayError,
    LinkLost,
    RateLimited,
    ServerProtocolError,
    UpstreamError,
)
from gateway.exchange import Call, Exchange, Interim, Reply, decline, internal_exchange, own_request
from gateway.protocol.eras import Era, level_at_least
from gateway.protocol.message import (
    ERROR,
    NOTIFICATION,
    REQUEST,
    Malformed,
    Message,
    build_notification,
    decode_reply,
    dumps,
    split_batch,
    text_of,
)
from gateway.protocol.sse import Decoder, Event, Oversize
from gateway.telemetry.logs import TRACE, Throttle
from gateway.upstream.asks import Asks
from gateway.upstream.dial import CONNECT_LIMIT, Target, border
from gateway.upstream.modern import cleaned_tools, legacy_params, pass_progress
from gateway.upstream.pending import Pending
from gateway.upstream.pipe import TICK
from gateway.upstream.tasks import TaskRun, needs_task
from gateway.upstream.terms import Terms, too_late

__all__ = [
    "CLOSE_LIMIT",
    "JSON_BODY",
    "POST_LIMIT",
    "HttpLink",
    "NoStreamableHttp",
    "Trail",
    "about_session",
    "body_of",
    "content_type",
    "encoded",
    "one_line",
]

log = logging.getLogger("gateway_core")

MAX_POSTS: Final = 256
"""Notifications and answers that may be on their way to one server; more are dropped."""
POST_LIMIT: Final = 30.0
"""Seconds a notification or an answer may take."""
CLOSE_LIMIT: Final = 2.0
"""Seconds for the DELETE that ends a session."""
LEVEL_LIMIT: Final = 5.0
"""Seconds a call waits for its server to take note of the log level it wants."""
REOPEN: Final = 1.0
"""Seconds before an ended event stream is asked for again, unless the server names another time."""
MAX_REOPEN: Final = 30.0
DRAIN: Final = 0.1
"""Seconds to wait for the end of a stream whose reply has come, so that its connection can be used again."""
MAX_STRIKES: Final = 3
"""Calls in a row that failed for want of the server, after which the link is given up and the handshake tried anew."""
DISCARD_LIMIT: Final = 1.0
"""Seconds to wait for the end of a body that nobody wants."""
MAX_SMALL: Final = 64 * 1024
"""Bytes read of a body that should hold nothing or an error."""
JSON_BODY: Final = (b"content-type", b"application/json")

about_session = re.compile(r"session|not initialized", re.IGNORECASE).search
"""Whether an error's text says that the server wants a session, or another one."""


class NoStreamableHttp(UpstreamError):
    """``initialize`` got 400, 404 or 405: perhaps a server of 2024-11-05."""


class Trail:
    """What is known of an event stream across its connections: the last event id and when to ask again."""

    __slots__ = ("id", "wait")

    def __init__(self) -> None:
        self.id = ""
        self.wait = REOPEN

    def follow(self, decoder: Decoder) -> None:
        """Take over what the stream has said so far."""
        self.id = decoder.last_event_id
        if decoder.retry is not None:
            self.wait = min(max(decoder.retry / 1000, 0.1), MAX_REOPEN)


class HttpLink:
    """A server behind a URL, a legacy one unless a subclass says otherwise. Implements ``exchange.Link``.

    One task per request carries it, one sweeps deadlines; tasks live in the nursery given. ``lost`` is set when the
    link is over for good. Constructor arguments are ``Terms``; questions are put to a client only where it owns the
    server.
    """

    era: Era = Era.LEGACY
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
        self.decided = ""
        """By what the era was found out: "server/discover", "initialize" or "catalog"."""
        self.remark: Callable[[], str] = str
        """See ``runtimes.base.Origin``."""
        self.slow = False
        """Whether it is spoken to in its second era only because it took too long to answer in the first."""
        self.pending = Pending()
        self.lost: LinkLost | None = None
        self._target = target
        self._transport = transport
        self._nursery = nursery
        self._terms = terms
        self._details = details
        self._max = terms.max_message_bytes
        self._can_ask = terms.isolated
        self._scopes: dict[int, trio.CancelScope] = {}
        self._posts = 0
        self._strikes = 0
        self._level: str | None = None
        self._levelling = trio.Lock()
        self._closed = trio.Event()
        self._wake_sweeper = trio.Event()
        self._noise = Throttle(log)
        self._asks = Asks(terms.server_id, self._post_soon, self._noise)
        nursery.start_soon(self._sweeper)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server_id} in_flight={len(self.pending)}{' lost' if self.lost else ''}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts of the origin, for people."""
        return {
            **self._details,
            "transport": self.transport_name,
            "era": self.era.value,
            "era_decided_by": self.decided,
        }

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
        self._asks.withdraw("the server has ended")
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
                call.fail(too_late(self.server_id, seconds, self.remark()))

    # ------------------------------------------------------------------------------------------------------- sending
    def call(self, exchange: Exchange) -> Call:
        """Send a request, in a task of its own. See ``exchange.Link.call``."""
        if self.lost is not None:
            raise self.lost
        call = Call(exchange, self, self.pending.new_id(), trio.current_time())
        self._go(call, exchange.message.method, self._params(exchange, call.id))
        return call

    def _params(self, exchange: Exchange, id: int) -> str:
        """The params of a request as this server wants them; ``id`` is also the progress token."""
        return legacy_params(exchange, id)

    def _go(self, call: Call, method: str, params: str) -> None:
        """Send a request for a call's sake, under ``call.id``, in a task of its own."""
        id = call.id
        pending = self.pending
        self._scopes[id] = trio.CancelScope()
        self._nursery.start_soon(self._carry, call, id, method, params)
        if not pending.calls:
            self._wake_sweeper.set()
        pending.calls[id] = call

    async def _carry(self, call: Call, id: int, method: str, params: str) -> None:
        """One request's task: it ends with the reply, an error or the call's cancellation."""
        try:
            with self._scopes[id]:
                client = call.exchange.client
                if client.log_level is not None and client.era is Era.MODERN and self.era is Era.LEGACY:
                    await self._lower_level(client.log_level)
                await self._converse(call, id, method, params)
        except GatewayError as error:
            if call.id == id:
                self.pending.drop(call)
                self._strike(error)
                call.fail(error)
        finally:
            del self._scopes[id]
            self._asks.withdraw("the request behind it has ended", id)

    async def _lower_level(self, level: str) -> None:
        """A modern client wants logs with this call: have the server send them (protocol.md section 4.1, log).

        Only where they can be told from those of other clients' calls. What the server makes of it is its business.
        """
        if "logging" not in self.facts.get("capabilities", {}) or (
            self.prefers_sole_call and not self._terms.isolated
        ):
            return
        async with self._levelling:
            if self._level is not None and level_at_least(level, self._level):
                return
            try:
                await self.request("logging/setLevel", dumps({"level": level}), timeout=LEVEL_LIMIT)
                self._level = level  # also where it is refused: it would be again
            except GatewayError as error:
                log.debug("server %s did not take the log level %s: %s", self.server_id, level, error)

    async def _converse(self, call: Call, id: int, method: str, params: str) -> None:
        """Send a call's request of that id and see to its reply. Raises GatewayError."""
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
        return await own_request(self, method, params_text, timeout, self._terms.lister)

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
            if type(call.rounds) is TaskRun and call.rounds.id and self.lost is None:
                with suppress(GatewayError):
                    params = dumps({"taskId": call.rounds.id})
                    self.call(internal_exchange("tasks/cancel", params, trio.current_time() + POST_LIMIT))

    def forget(self, call: Call) -> None:
        """See ``exchange.Link.forget``."""
        scope = self._scopes.get(call.id)
        if scope is not None:
            scope.cancel()
        self.pending.drop(call)

    async def subscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.subscribe``."""
        return await self.request("resources/subscribe", dumps({"uri": uri}), timeout=timeout)

    async def unsubscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.unsubscribe``."""
        return await self.request("resources/unsubscribe", dumps({"uri": uri}), timeout=timeout)

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

    def _ended(self, call: Call, id: int) -> bool:
        """Whether the request of that id has its reply, or is of no interest any more."""
        return call.done or call.id != id

    def _body(self, call: Call, id: int, data: bytes) -> None:
        """A JSON body: the reply, or a batch with it inside (2025-03-26)."""
        try:
            text = text_of(one_line(data))
            for entry in split_batch(text) or [text]:
                self._message(decode_reply(entry), call, id)
        except Malformed as error:
            raise self._nonsense(f"sent a body that is no JSON-RPC message ({error})") from error
        if not self._ended(call, id):
            raise self._nonsense("sent a body without the reply to this request")

    async def _stream(self, call: Call | None, id: int, response: httpx.Response, trail: Trail) -> None:
        """Read one event stream to its end, or until the call has its reply. Raises LinkLost when it breaks off."""
        decoder = Decoder(self._max, trail.id)
        try:
            async with body_of(response) as chunks:
                async for chunk in chunks:
                    for event in decoder.feed(chunk):
                        self._event(event, call, id)
                    trail.follow(decoder)
                    if call is None:
                        continue
                    if self._ended(call, id):
                        with trio.move_on_after(DRAIN):
                            async for _ in chunks:
                                pass
                        return
                    if decoder.overflowing:
                        raise self._too_large()
        finally:
            trail.follow(decoder)

    def _event(self, event: Event | Oversize, call: Call | None, id: int = 0) -> None:
        """One event of a stream: ``call`` and ``id`` are those whose stream it is, None for one of the session's."""
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
            self._message(message, call, id)

    def _oversize(self, event: Oversize) -> None:
        """An event over the limit on a shared stream: end the call it answers, or every call if that can't be told."""
        error = self._too_large()
        self._noise.warning("oversize", "%s", error.message)
        self.pending.fail_answered((event.head, event.tail), error)

    def _message(self, message: Message, call: Call | None, id: int = 0) -> None:
        if log.isEnabledFor(TRACE):
            log.log(TRACE, "Received message %s", message.text)
        kind = message.kind
        if kind > NOTIFICATION:
            if call is not None and message.id != id:
                self.pending.unmatched += 1
                return
            ended = self.pending.take(message.id)
            if ended is not None:
                self._strikes = 0
                self._replied(ended, message)
        elif kind is REQUEST:
            self._asked(message, call, id)
        else:
            self._notified(message, call)

    def _replied(self, call: Call, message: Message) -> None:
        """The reply to a call's last request: the call's own, unless another request follows from it."""
        exchange, run = call.exchange, call.rounds
        method = exchange.message.method
        if method == "tools/list":
            message = cleaned_tools(message, drop_invalid=True)
        elif method == "logging/setLevel" and message.kind is not ERROR:
            self._level = str(exchange.message.param("level"))
        elif run is None and needs_task(self.facts.get("capabilities", {}), method, message):
            call.id = self.pending.new_id()
            call.rounds = run = TaskRun(call.id)
            self._go(call, method, legacy_params(exchange, call.id, run.changes))
            return
        elif type(run) is TaskRun:
            after = run.take(message)
            if after is not None:
                self.pending.keep_token(run.token, call)
                call.id = self.pending.new_id()
                self._go(call, *after)
                return
        call.finish(Reply(message))

    def _asked(self, message: Message, call: Call | None, id: int) -> None:
        ask = self._asks.take(message, allowed=self._can_ask, owner=id)
        if ask is None:
            return
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
                self._progressed(call, message)
        elif method == "notifications/cancelled":
            self._asks.cancelled(message)
        elif method.endswith("/list_changed") or method == "notifications/resources/updated":
            self._terms.on_notice(message)
        else:
            if call is None and self._terms.isolated and method == "notifications/message":
                # A client without a way of its own to be told (a modern one) gets it with its call, or not at all.
                sole = self.pending.sole_client_call()
                if self.prefers_sole_call or (sole is not None and sole.exchange.client.owner is None):
                    call = sole
            if call is not None and call.exchange.client.key:
                call.deliver(Interim(message.text))
            else:
                self._terms.on_notice(message)

    def _progressed(self, call: Call, message: Message) -> None:
        pass_progress(call, message)


class _Body(Body, httpx.AsyncByteStream):
    """As httpx insists on it."""


def body_of(response: httpx.Response) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """The body as it comes."""
    return unwound(aiter(response.stream), httpx.HTTPError)  # type: ignore[arg-type]


def content_type(response: httpx.Response) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def encoded(text: str) -> bytes:
    """A message of checked JSON as bytes. Half a surrogate pair, which a re-encoded string may hold, is escaped."""
    return text.encode("utf-8", "backslashreplace")


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
