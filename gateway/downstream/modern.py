"""Being a modern MCP server (2026-07-28): stateless requests, ``server/discover``, ``input_required``, subscriptions.

A request carries its own context in ``_meta``. ``client_of`` reads it, ``carry_out`` does what is asked, and neither
knows what carries the messages. ``post`` is HTTP: headers that mirror the body, one JSON reply or an event stream, and
a client that goes away has cancelled.

The usual call is answered from the task of its server's link and costs no task, scope or timer here. A question from a
legacy server parks its call (``parking``); a modern server's ``input_required`` passes, its state sealed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Collection, Iterable, Mapping
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import trio

from gateway.auth.principal import Principal
from gateway.downstream.listening import LISTEN, Listening
from gateway.downstream.parking import Binding, Parked, ParkingLot, start_again
from gateway.downstream.server import ClientGone, Request
from gateway.downstream.streams import COALESCE, COMMENT_AFTER, EARLY, Feed, PostOutlet
from gateway.errors import AuthError, ClientProtocolError, GatewayError, ServerProtocolError
from gateway.exchange import Ask, Call, Client, Event, Exchange, Interim, Reply, Target, decline
from gateway.hub import SPACING
from gateway.protocol import headers as mirror
from gateway.protocol.eras import (
    CLIENT_CAPABILITIES,
    CLIENT_INFO,
    INPUT_METHODS,
    LEGACY_VERSIONS,
    LOG_LEVEL,
    LOG_LEVELS,
    MISSING_CAPABILITY,
    MODERN,
    MODERN_VERSIONS,
    NO_RESOURCE,
    PROTOCOL_VERSION,
    REMOVED,
    UNSUPPORTED_VERSION,
    URL_ELICITATION,
    Era,
    level_at_least,
)
from gateway.protocol.handshake import DISCOVER
from gateway.protocol.message import (
    ERROR,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REQUEST,
    RESULT,
    Malformed,
    Message,
    build_error,
    build_notification,
    decode_reply,
    dumps,
    quote,
)
from gateway.protocol.session import BOTH, accepts, failure
from gateway.protocol.sse import KEEP_ALIVE, encode
from gateway.protocol.translate import capability_needed, declares, question_to_modern, to_modern

if TYPE_CHECKING:
    from gateway.router import Router

__all__ = ["ModernFront", "Outlet", "Unsupported"]

log = logging.getLogger("gateway_http")

TICK: Final = 1.0
"""Seconds between two looks at parked calls."""
LOOK: Final = 0.05
"""Seconds between two looks at what waits to be begun: whether its client is still there (RB20), or wants a sign."""
GATHER: Final = 0.03
"""Seconds for which a server's further questions are waited for once it has asked one."""
MAX_CONTEXTS: Final = 1024
"""Contexts of requests that are remembered; the oldest goes first."""
MAX_ASKS: Final = 64
"""Questions that a client is asked at once; further ones wait for its next round."""
NOT_ACCEPTABLE: Final = "Not Acceptable: the client must accept both application/json and text/event-stream"
GONE: Final = "the client has gone"
MAX_CONTEXT: Final = 4096
"""Characters of the longest context among those that are remembered."""

T = TypeVar("T")


class Unsupported(ClientProtocolError):
    """A refusal whose data says what would be taken. ``data`` goes into the error reply."""

    def __init__(self, message: str, code: int, data: Mapping[str, Any]) -> None:
        super().__init__(message, code=code)
        self.data = dict(data)


def unsupported_version(requested: object, supported: tuple[str, ...] = MODERN_VERSIONS) -> Unsupported:
    """-32022 for a revision that is not spoken (2026-07-28, versioning)."""
    text = f"Unsupported protocol version {str(requested)[:40]!r}; supported: {', '.join(supported)}"
    return Unsupported(text, UNSUPPORTED_VERSION, {"supported": list(supported), "requested": requested})


class Outlet(Protocol):
    """Where what comes before a reply goes. ``comment_at`` is the trio time at which ``comment`` is due.

    ``comment_now`` is ``comment`` from a task that is not the request's.
    """

    @property
    def comment_at(self) -> float: ...

    async def send(self, text: str) -> None: ...

    async def comment(self) -> None: ...

    async def comment_now(self) -> None: ...


_STATUS: Final = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    INVALID_PARAMS: 400,
    METHOD_NOT_FOUND: 404,
    -32020: 400,
    MISSING_CAPABILITY: 400,
    UNSUPPORTED_VERSION: 400,
}
"""HTTP statuses of error replies; an error that is not here is an answer: 200 (protocol.md section 7)."""


class ModernFront:
    """Answers modern requests, for all clients. ``run`` must be running."""

    def __init__(self, router: Router, info: Mapping[str, Any] | None = None) -> None:
        self.router = router
        self.parking = ParkingLot(lambda: router.snapshot.settings)
        self.info = dumps(dict(info if info is not None else router.info))
        self._contexts: dict[str, Client] = {}
        self._waiting: dict[trio.CancelScope, tuple[Outlet, Request | None]] = {}
        self._unanswered: list[Ask] = []
        self._busy = trio.Event()
        self._subscriptions: dict[Listening, Request] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after what has no task of its own: parked calls, and requests that wait to be begun. Until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    if not self._waiting and not self._unanswered:
                        self._busy = trio.Event()
                        with trio.move_on_after(TICK if len(self.parking) else inf):
                            await self._busy.wait()
                    await trio.sleep(LOOK)
                    self._decline_all()
                    self.parking.sweep(trio.current_time())
                    self._look_after(nursery)
        finally:
            self._decline_all()
            self.parking.clear()

    def _look_after(self, nursery: trio.Nursery) -> None:
        """Give up what nobody waits for, keep alive what waits. A method, so that none is held until the next look."""
        now = trio.current_time()
        for scope, (outlet, request) in self._waiting.items():
            if request is not None and request.look():
                scope.cancel()
            elif outlet.comment_at <= now:
                nursery.start_soon(self._comment, scope, outlet)

    def _decline_all(self) -> None:
        asks, self._unanswered = self._unanswered, []
        for ask in asks:
            if ask.open:
                decline(ask)

    async def _comment(self, scope: trio.CancelScope, outlet: Outlet) -> None:
        if scope in self._waiting:
            await outlet.comment_now()

    async def _patiently(self, work: Awaitable[T], outlet: Outlet, request: Request | None) -> T:
        """Await what may take long, with signs of life from ``run``, which begin the event stream.

        Raises ClientGone, with the work cancelled, when the client of ``request`` has gone.
        """
        done: list[T] = []
        with trio.CancelScope() as scope:
            self._waiting[scope] = (outlet, request)
            self._busy.set()
            try:
                done.append(await work)
            finally:
                del self._waiting[scope]
        if not done:
            raise ClientGone
        return done[0]

    # ------------------------------------------------------------------------------------------------------- its client
    def client_of(self, principal: Principal, message: Message) -> Client:
        """Who sends a request, by its ``_meta``. Remembered, since a client always says the same.

        Raises ClientProtocolError: -32602 for a ``_meta`` that is not complete, -32022 for another revision.
        """
        client = self._context_of(message)
        if client.version != MODERN:
            raise unsupported_version(client.version)
        return client

    def _context_of(self, message: Message) -> Client:
        meta = message.meta
        said = meta.get
        # What stands beside it, such as a progress token or a trace, differs from request to request.
        key = repr((said(PROTOCOL_VERSION), said(CLIENT_CAPABILITIES), said(CLIENT_INFO), said(LOG_LEVEL)))
        client = self._contexts.get(key)
        if client is None:
            client = _read_context(meta)
            if len(key) <= MAX_CONTEXT:
                if len(self._contexts) >= MAX_CONTEXTS:
                    del self._contexts[next(iter(self._contexts))]
                self._contexts[key] = client
        return client

    # ------------------------------------------------------------------------------------------------------------- HTTP
    async def post(self, request: Request, principal: Principal, target: Target, message: Message) -> None:
        """Answer one POST. Raises AuthError, before anything was sent, and ClientGone."""
        id_text, method = message.id_text or "null", message.method
        try:
            if accepts(request.headers.get("accept")) != BOTH:
                raise ClientProtocolError(NOT_ACCEPTABLE, status=406)
            if message.kind is not REQUEST:
                if not message.is_request:
                    raise ClientProtocolError("A reply can't be posted: the modern era has no requests of servers")
                await request.respond(202)
                return
            if message.id is None:
                raise ClientProtocolError("The id of a request must be a string or a number, not null")
            client = self._context_of(message)
            mirror.check(request.headers, message)
            if client.version != MODERN:
                raise unsupported_version(client.version)
            if method == LISTEN:
                await self._post_listen(request, client, principal, target, message)
                return
            exchange = self._exchange(client, principal, target, message)
            if method == "tools/call":
                await self._check_parameters(request, exchange)
            status, text = await self._answer_post(request, exchange)
        except GatewayError as error:
            if isinstance(error, AuthError) or request.responded:
                raise
            status, text = self.refusal(error, method, id_text)
            retry = [("Retry-After", str(ceil(error.retry_after)))] if error.retry_after and status >= 400 else []
            await request.respond(status, text.encode(), headers=retry)
            return
        if text and not request.responded:
            await request.respond(status, text.encode())

    async def malformed(self, request: Request, error: Malformed) -> None:
        """Answer a body that is no single message; batches are none of this era's."""
        if accepts(request.headers.get("accept")) != BOTH:
            refused = ClientProtocolError(NOT_ACCEPTABLE, status=406)
        else:
            refused = ClientProtocolError(error.reason, code=error.code)
        status, text = self.refusal(refused, "", error.id_text)
        await request.respond(status, text.encode())

    async def unsupported(self, request: Request, message: Message, version: str) -> None:
        """Answer a request whose version header names a revision that does not exist; it might be of either era."""
        error = unsupported_version(version, (*LEGACY_VERSIONS, *MODERN_VERSIONS))
        status, text = self.refusal(error, message.method, message.id_text or "null")
        await request.respond(status, text.encode())

    async def _check_parameters(self, request: Request, exchange: Exchange) -> None:
        """Compare ``Mcp-Param-*`` with the arguments that a tool wants mirrored."""
        parameters = self.router.tool_headers(exchange)
        if parameters is None:
            await self._patiently(self.router.learn_tools(exchange), _outlet(request), request)
            parameters = self.router.tool_headers(exchange)
        if parameters:
            mirror.check_parameters(parameters, request.headers, exchange.message.param("arguments"))

    async def _answer_post(self, request: Request, exchange: Exchange) -> tuple[int, str]:
        """Status and reply, "" where it has been sent."""
        outlet: PostOutlet | None = None
        event: Event | None = None
        try:
            got = self._at_once(exchange)
            if got is None:
                outlet = _outlet(request)
                got = await self._patiently(self._slowly(exchange), outlet, request)
            if type(got) is Call and (outlet is None or outlet.feed is None):
                event = await self._first(request, exchange, got)
                if type(event) is Reply and request.responded:
                    return 200, ""
            if type(got) is Reply and got.kept and outlet is None:
                head = got.head(exchange.message.id_text)
                if not got.tail:
                    got.tail = self._text(exchange, got)[1][len(head) :].encode()
                await request.respond(200, head.encode(), rest=got.tail)
                return 200, ""
            outlet = outlet or _outlet(request)
            status, text = await self._attend(exchange, got, event, outlet, request)
        except GatewayError as error:
            if outlet is None or outlet.feed is None:
                raise
            status, text = self.refusal(error, exchange.message.method, exchange.message.id_text)
        if outlet.feed is None:
            return status, text
        await outlet.send(text)
        await outlet.end()
        return 200, ""

    async def _first(self, request: Request, exchange: Exchange, call: Call) -> Event:
        """The first event of a call; a usual reply goes out in the task that brings it (``Request.responded``).

        Nobody looks after the client meanwhile: SLOW comes before that matters.
        """

        def at_once(reply: Reply) -> None:
            try:
                status, text = self._text(exchange, reply)
                if text:
                    request.respond_now(status, text.encode())
            except ValueError:  # not in the link's task: the request's own meets it again
                log.debug("a reply could not be sent at once", exc_info=True)

        call.on_reply = at_once
        try:
            return await call.next()
        except BaseException:
            call.cancel(GONE)
            raise
        finally:
            call.on_reply = None

    async def _post_listen(
        self, request: Request, client: Client, principal: Principal, target: Target, message: Message
    ) -> None:
        listening = Listening(self.router, client, principal, target, message, request.wake)
        outlet = _outlet(request)
        self._subscriptions[listening] = request
        try:
            await self._patiently(listening.open(), outlet, request)
            await outlet.send(listening.acknowledgement())
            server = request.server
            comment_at, next_at = trio.current_time() + COMMENT_AFTER, -inf
            while not server.draining and not listening.over:
                if listening.dirty:
                    await trio.sleep_until(max(trio.current_time() + COALESCE, next_at))
                    await request.write(b"".join(encode(text) for text in listening.take()))
                    next_at = trio.current_time() + SPACING
                elif trio.current_time() >= comment_at - EARLY:
                    await request.write(KEEP_ALIVE)
                elif await request.wait(until=comment_at):
                    raise ClientGone
                else:
                    continue
                comment_at = trio.current_time() + COMMENT_AFTER
            await request.write(b"".join(encode(text) for text in listening.ended()))
            await request.finish()
        finally:
            del self._subscriptions[listening]
            listening.close()

    def dismiss(self, known: Collection[Principal]) -> None:
        """End the subscriptions of everybody but these, and what they have parked."""
        for listening, request in self._subscriptions.items():
            if listening.principal not in known:
                listening.over = True
                request.wake()
        self.parking.dismiss(known)

    # ------------------------------------------------------------------------------------------------ transport-neutral
    async def carry_out(
        self, client: Client, principal: Principal, target: Target, message: Message, outlet: Outlet
    ) -> tuple[int, str]:
        """HTTP status and whole reply to a request; what comes before it goes to ``outlet``. Raises GatewayError.

        Cancelled, it cancels the call at its server.
        """
        exchange = self._exchange(client, principal, target, message)
        got = self._at_once(exchange)
        if got is None:
            got = await self._patiently(self._slowly(exchange), outlet, None)
        return await self._attend(exchange, got, None, outlet, None)

    def _exchange(self, client: Client, principal: Principal, target: Target, message: Message) -> Exchange:
        router = self.router
        snapshot = router.snapshot
        deadline = trio.current_time() + router.timeout_of(target, snapshot)
        return Exchange(message, principal, snapshot, client, target, deadline)

    def refusal(self, error: GatewayError, method: str, id_text: str) -> tuple[int, str]:
        """A fault as a modern client sees it: HTTP status and reply (protocol.md section 7)."""
        if isinstance(error, Unsupported):
            data = _encode({**error.data, "source": "gateway"})
            said = f'{{"code":{error.code},"message":{quote(error.message)},"data":{data}}}'
            return 400, self._build(id_text, f'"error":{said}')
        status, text = failure(error, method, id_text)
        if isinstance(error, ClientProtocolError):
            return (error.status if error.status != 400 else _STATUS.get(error.code, 400)), text
        reply = decode_reply(text)
        if reply.kind is RESULT:
            return status, self._build(id_text, to_modern(method, reply, self.info))
        return status, text

    @staticmethod
    def _build(id_text: str, member: str) -> str:
        return f'{{"jsonrpc":"2.0","id":{id_text},{member}}}'

    def _text(self, exchange: Exchange, reply: Reply) -> tuple[int, str]:
        """Status and text of a reply; "" where it takes more than completing it."""
        message, method = reply.message, exchange.message.method
        result = message.result
        if message.kind is ERROR:
            code, uri = result.get("code"), ""
            if code == URL_ELICITATION and method in INPUT_METHODS:
                return 200, ""
            if method == "resources/read":
                uri = exchange.message.param("uri")
                uri = uri if type(uri) is str else ""
                if code == INVALID_PARAMS and uri and result.get("data") is None:
                    message = Reply.error(INVALID_PARAMS, str(result.get("message")), {"uri": uri}).message
            if code == NO_RESOURCE:
                code = INVALID_PARAMS
            text = self._build(exchange.message.id_text, to_modern(method, message, self.info, uri=uri))
            return (_STATUS.get(code, 200) if type(code) is int else 200), text
        if type(result) is dict and result.get("resultType") == "input_required":
            return 200, ""
        return 200, self._build(exchange.message.id_text, to_modern(method, message, self.info, reply.cache))

    def _at_once(self, exchange: Exchange) -> Reply | Call | Parked | None:
        """A request as far as it can be carried out without waiting; None, with nothing done, where it can't."""
        message = exchange.message
        method = message.method
        if method in REMOVED:
            return Reply.error(METHOD_NOT_FOUND, f"Method not found: {method}", {"source": "gateway"})
        if method == DISCOVER:
            return None
        state = message.param("requestState")
        if state is not None and method in INPUT_METHODS:
            if type(state) is not str:
                raise start_again("requestState must be a string")
            binding = Binding.of(exchange.principal, exchange.target, message)
            found = self.parking.take(state, binding)
            if type(found) is Parked:
                return found
            exchange.changes = {"requestState": quote(str(found))}
        return self.router.dispatch_now(exchange)

    async def _slowly(self, exchange: Exchange) -> Reply | Call:
        """What may have to wait for a start, a slot or a list."""
        if exchange.message.method != DISCOVER:
            return await self.router.dispatch(exchange)
        facts = dict(await self.router.discover(exchange.client, exchange.principal, exchange.target))
        facts.pop("serverInfo", None)
        facts.pop("protocolVersion", None)
        return Reply.result(_encode({"supportedVersions": list(MODERN_VERSIONS), **facts}))

    async def _attend(
        self,
        exchange: Exchange,
        got: Reply | Call | Parked,
        event: Event | None,
        outlet: Outlet,
        request: Request | None,
    ) -> tuple[int, str]:
        """Carry a request out from where it has got to: status and reply. Cancelled, it cancels the call.

        So does the end of the client, where it is seen by the end of its ``request``: raises ClientGone.
        """
        if type(got) is Reply:
            return self._final(exchange, got)
        asked = 0
        if type(got) is Parked:
            call, asked = got.resume(exchange), got.asked
        else:
            assert type(got) is Call
            call = got
        try:
            if type(got) is Parked:
                missing = _answered(exchange, got)
                if missing:
                    return 200, self._park(exchange, call, missing, asked)
                event = await self._catch_up(exchange, call, outlet)
            while True:
                if event is None:
                    event = await _next(call, outlet, request)
                    if event is None:
                        await outlet.comment()
                        continue
                if type(event) is Reply:
                    return self._final(exchange, event)
                if type(event) is Ask:
                    asks, event = await self._gather(exchange, call, event, outlet)
                    if asks and request is not None and request.look():
                        self._give_up(call, asks)
                        raise ClientGone
                    if asks:
                        keyed = {_key_of(ask, number): ask for number, ask in enumerate(asks, asked + 1)}
                        return 200, self._park(exchange, call, keyed, asked + len(asks))
                    continue
                if type(event) is Interim:
                    await self._interim(exchange, event, outlet)
                event = None
        except BaseException:
            self._give_up(call)
            raise

    def _give_up(self, call: Call, asks: Iterable[Ask] = ()) -> None:
        """Cancel a call. What it has asked is declined later, or a tool might take that for an answer and go on."""
        self._unanswered += (*asks, *call.questions)
        call.cancel(GONE)
        self._busy.set()

    # ------------------------------------------------------------------------------------------ on the way to the reply
    async def _interim(self, exchange: Exchange, event: Interim, outlet: Outlet) -> None:
        if '"notifications/message"' in event.text:
            wanted = exchange.client.log_level
            if wanted is None:
                return
            params = json.loads(event.text).get("params")
            if type(params) is dict and not level_at_least(params.get("level"), wanted):
                return
        await outlet.send(event.text)

    async def _catch_up(self, exchange: Exchange, call: Call, outlet: Outlet) -> Event | None:
        """What came while the client was away, up to something that is no notification.

        Of progress the latest only, and under the token of the request that is there now (protocol.md section 4.1).
        """
        latest: Interim | None = None
        event: Event | None = None
        while call.buffered:
            event = await call.next()
            if type(event) is not Interim:
                break
            if '"notifications/progress"' in event.text:
                latest = event
            else:
                await self._interim(exchange, event, outlet)
            event = None
        token = exchange.message.meta.get("progressToken")
        if latest is not None and token is not None:
            message = decode_reply(latest.text)
            params = message.params_text({"progressToken": _encode(token)})
            await outlet.send(build_notification(message.method, params))
        return event

    async def _gather(
        self, exchange: Exchange, call: Call, first: Ask, outlet: Outlet
    ) -> tuple[list[Ask], Event | None]:
        """A question and those right after it, as far as the client can be asked them; perhaps another event, too."""
        asks = [first]
        event: Event | None = None
        try:
            with trio.move_on_after(GATHER):
                while len(asks) < MAX_ASKS:
                    event = await call.next()
                    if type(event) is Ask:
                        asks.append(event)
                    elif type(event) is Interim:
                        await self._interim(exchange, event, outlet)
                    elif type(event) is Reply:
                        break
                    event = None
            possible = []
            for ask in asks:
                params = ask.message.params if type(ask.message.params) is dict else {}
                known = capability_needed(ask.message.method, params) is not None
                if not known or exchange.message.method not in INPUT_METHODS or type(event) is Reply:
                    decline(ask)
                elif ask.open:
                    self._require(exchange, ask.message.method, params)
                    possible.append(ask)
        except BaseException:
            self._give_up(call, asks)
            raise
        return possible, event

    def _park(self, exchange: Exchange, call: Call, asks: dict[str, Ask], asked: int) -> str:
        """Put a call away until these questions are answered: the reply. ``asked`` counts all questions of the call."""
        binding = Binding.of(exchange.principal, exchange.target, exchange.message)
        try:
            requests = _encode({key: question_to_modern(ask.message) for key, ask in asks.items()})
            state = self.parking.park(call, asks, exchange.principal, binding, asked)
            self._busy.set()
        except GatewayError:
            for ask in asks.values():
                decline(ask)  # before the call is cancelled: nobody refuses, the limit does
            raise
        return self._input_required(exchange, f'"inputRequests":{requests},"requestState":{quote(state)}')

    def _input_required(self, exchange: Exchange, members: str) -> str:
        method = exchange.message.method
        reply = Reply.result(f'{{"resultType":"input_required",{members}}}')
        return self._build(exchange.message.id_text, to_modern(method, reply.message, self.info))

    def _final(self, exchange: Exchange, reply: Reply) -> tuple[int, str]:
        """Status and text of the last event of a call."""
        status, text = self._text(exchange, reply)
        if text:
            return status, text
        result, method = reply.message.result, exchange.message.method
        if reply.message.kind is ERROR:
            return 200, self._urls(exchange, result)
        if method not in INPUT_METHODS:
            raise ServerProtocolError(f"The server wants input for {method}, which can't have any")
        requests = result.get("inputRequests")
        for entry in requests.values() if type(requests) is dict else ():
            if type(entry) is dict:
                params = entry.get("params")
                self._require(exchange, entry.get("method"), params if type(params) is dict else {})
        members = {name: value for name, value in result.items() if name not in ("resultType", "requestState")}
        state = result.get("requestState")
        if type(state) is str:
            binding = Binding.of(exchange.principal, exchange.target, exchange.message)
            members["requestState"] = self.parking.relay(state, binding)
        if not members:
            raise ServerProtocolError("The server wants input and does not say which")
        return 200, self._input_required(exchange, _encode(members)[1:-1])

    def _require(self, exchange: Exchange, method: Any, params: Mapping[str, Any]) -> None:
        needed = capability_needed(method, params) if type(method) is str else None
        if needed is not None and not declares(exchange.client.capabilities, needed):
            raise Unsupported(
                f"The server needs a capability that the request does not declare: {dumps(needed)}",
                MISSING_CAPABILITY,
                {"requiredCapabilities": needed},
            )

    def _urls(self, exchange: Exchange, error: Mapping[str, Any]) -> str:
        """A legacy server that wants URLs opened and the call made again (-32042, 2025-11-25): nothing is parked."""
        data = error.get("data")
        found = data.get("elicitations") if type(data) is dict else None
        requests = {}
        for number, entry in enumerate(found if type(found) is list else (), 1):
            if type(entry) is dict and type(entry.get("url")) is str:
                params = {"mode": "url", "message": entry.get("message", ""), "url": entry["url"]}
                requests[f"elicitation-{number}"] = {"method": "elicitation/create", "params": params}
        self._require(exchange, "elicitation/create", {"mode": "url"})
        if not requests:
            return build_error(exchange.message.id_text, INTERNAL_ERROR, str(error.get("message", ""))[:500])
        return self._input_required(exchange, f'"inputRequests":{_encode(requests)}')


def _read_context(meta: Mapping[str, Any]) -> Client:
    """The client that a ``_meta`` describes. Raises ClientProtocolError (-32602); any version is taken."""
    version = meta.get(PROTOCOL_VERSION)
    capabilities = meta.get(CLIENT_CAPABILITIES)
    info = meta.get(CLIENT_INFO)
    level = meta.get(LOG_LEVEL)
    for name, value, kind in (
        (PROTOCOL_VERSION, version, str),
        (CLIENT_CAPABILITIES, capabilities, dict),
    ):
        if type(value) is not kind:
            what = "a string" if kind is str else "an object"
            raise ClientProtocolError(f"params._meta[{quote(name)}] must be {what}", code=INVALID_PARAMS)
    if info is not None and type(info) is not dict:
        raise ClientProtocolError(f"params._meta[{quote(CLIENT_INFO)}] must be an object", code=INVALID_PARAMS)
    if level is not None and level not in LOG_LEVELS:
        raise ClientProtocolError(
            f"params._meta[{quote(LOG_LEVEL)}] must be one of {', '.join(LOG_LEVELS)}", code=INVALID_PARAMS
        )
    assert type(version) is str and type(capabilities) is dict
    askable = {name: capabilities[name] for name in ("elicitation", "roots", "sampling") if name in capabilities}
    key = f"modern:{json.dumps(askable, sort_keys=True)}"
    return Client(key, Era.MODERN, version, capabilities, info or {}, log_level=level)


_ascii = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _encode(value: Any) -> str:
    """What somebody else said, as JSON again. In ASCII: it may hold lone surrogates, which have no UTF-8.

    Raises ServerProtocolError for numbers that were too large to be read.
    """
    try:
        return _ascii(value)
    except (ValueError, RecursionError):
        raise ServerProtocolError("The server sent what can't be said in JSON") from None


def _key_of(ask: Ask, number: int) -> str:
    """The key of a question in ``inputRequests``; of two questions of one call, whatever the round, it differs."""
    return f"{ask.message.method.partition('/')[0]}-{number}"


def _answered(exchange: Exchange, parked: Parked) -> dict[str, Ask]:
    """Give the server what the client has answered; the questions that are still open."""
    responses = exchange.message.param("inputResponses")
    answers = responses if type(responses) is dict else {}
    missing = {}
    for key, ask in parked.asks.items():
        answer = answers.get(key)
        if type(answer) is dict:
            ask.resolve(_encode(answer))
        elif ask.open and not parked.call.done:
            missing[key] = ask
    return missing


def _outlet(request: Request) -> PostOutlet:
    return PostOutlet(request, lambda: Feed(0, None, owed=1), prime=False)


async def _next(call: Call, outlet: Outlet, request: Request | None) -> Event | None:
    """A call's next event; None when a comment is due. Raises ClientGone.

    The end of the request's client is waited for as well, at the connection, which costs no task, scope or timer: when
    all calls are slow, all clients are watched, and that must not make the calls slower.
    """
    event = None
    if request is None:
        with trio.move_on_at(outlet.comment_at):
            event = await call.next()
        return event
    call.on_event = request.wake
    try:
        while not call.buffered:
            comment_at = outlet.comment_at
            if trio.current_time() >= comment_at:
                return None
            if await request.wait(until=comment_at):
                raise ClientGone
    finally:
        call.on_event = None
    return await call.next()
