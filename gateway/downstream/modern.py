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
from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from gateway.auth.principal import Principal
from gateway.downstream.listening import LISTEN, Listening
from gateway.downstream.parking import Binding, Parked, ParkingLot, start_again
from gateway.downstream.server import ClientGone, Request
from gateway.downstream.streams import COALESCE, COMMENT_AFTER, EARLY, STREAM_HEADERS, Feed, PostOutlet
from gateway.errors import AuthError, ClientProtocolError, GatewayError
from gateway.exchange import SLOW, Ask, Call, Client, Event, Exchange, Interim, Reply, decline
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
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REQUEST,
    RESULT,
    Message,
    build_error,
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
"""Seconds between two looks at what waits."""
GATHER: Final = 0.03
"""Seconds for which a server's further questions are waited for once it has asked one."""
MAX_CONTEXTS: Final = 1024
"""Contexts of requests that are remembered; the oldest goes first."""
NOT_ACCEPTABLE: Final = "Not Acceptable: the client must accept both application/json and text/event-stream"
GONE: Final = "the client has gone"


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
        self._waiting: dict[Exchange, Outlet] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Give up calls that nobody comes back for, and signs of life for those that wait, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    await trio.sleep(TICK)
                    now = trio.current_time()
                    self.parking.sweep(now)
                    for exchange, outlet in self._waiting.items():
                        if outlet.comment_at <= now:
                            nursery.start_soon(self._comment, exchange, outlet)
        finally:
            self.parking.clear()

    async def _comment(self, exchange: Exchange, outlet: Outlet) -> None:
        if exchange in self._waiting:
            await outlet.comment_now()

    # ------------------------------------------------------------------------------------------------------- its client
    def client_of(self, principal: Principal, message: Message) -> Client:
        """Who sends a request, by its ``_meta``. Remembered by the text of that: a client always says the same.

        Raises ClientProtocolError: -32602 for a ``_meta`` that is not complete, -32022 for another revision.
        """
        client = self._context_of(message)
        if client.version != MODERN:
            raise unsupported_version(client.version)
        return client

    def _context_of(self, message: Message) -> Client:
        meta = message.meta
        text = ""
        if meta and "progressToken" not in meta:
            start, end = message.spans["_meta"]
            text = message.text[start:end]
            found = self._contexts.get(text)
            if found is not None:
                return found
        client = _read_context(meta)
        if text and len(text) <= 4096:
            if len(self._contexts) >= MAX_CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[text] = client
        return client

    # ------------------------------------------------------------------------------------------------------------- HTTP
    async def post(self, request: Request, principal: Principal, server_id: str | None, message: Message) -> None:
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
                await self._post_listen(request, client, principal, server_id, message)
                return
            exchange = self._exchange(client, principal, server_id, message)
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

    async def unsupported(self, request: Request, message: Message, version: str) -> None:
        """Answer a request whose version header names a revision that does not exist; it might be of either era."""
        error = unsupported_version(version, (*LEGACY_VERSIONS, *MODERN_VERSIONS))
        status, text = self.refusal(error, message.method, message.id_text or "null")
        await request.respond(status, text.encode())

    async def _check_parameters(self, request: Request, exchange: Exchange) -> None:
        """Compare ``Mcp-Param-*`` with the arguments that a tool wants mirrored."""
        parameters = self.router.tool_headers(exchange)
        if parameters is None:
            await self.router.learn_tools(exchange)
            parameters = self.router.tool_headers(exchange)
        if parameters:
            mirror.check_parameters(parameters, request.headers, exchange.message.param("arguments"))

    async def _answer_post(self, request: Request, exchange: Exchange) -> tuple[int, str]:
        """Status and reply, "" where it has been sent."""
        message = exchange.message
        id_text, method = message.id_text, message.method
        call: Call | None = None
        event: Event | None = None
        plain = method not in REMOVED and method != DISCOVER and message.param("requestState") is None
        if plain:
            got = self.router.dispatch_now(exchange)
            if type(got) is Reply:
                return self._text(exchange, got)
            if type(got) is Call:
                call = got

                def at_once(reply: Reply) -> None:
                    status, text = self._text(exchange, reply)
                    if text:
                        request.respond_now(status, text.encode())

                call.on_reply = at_once
                try:
                    event = await call.next()
                except BaseException:
                    call.cancel(GONE)
                    raise
                finally:
                    call.on_reply = None
                if type(event) is Reply and request.responded:
                    return 200, ""
        outlet = PostOutlet(request, lambda: Feed(0, None, owed=1), prime=False)
        result: list[tuple[int, str]] = []
        failed: GatewayError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, request, nursery.cancel_scope)
            try:
                result.append(await self._attend(exchange, call, event, outlet))
            except GatewayError as error:
                failed = error  # raised outside, where no group is put around it
            nursery.cancel_scope.cancel()
        if failed is not None:
            if outlet.feed is None:
                raise failed
            result.append(self.refusal(failed, method, id_text))
        if not result:
            raise ClientGone
        status, text = result[0]
        if outlet.feed is None:
            return status, text
        await outlet.send(text)
        await outlet.end()
        return 200, ""

    async def _post_listen(
        self, request: Request, client: Client, principal: Principal, server_id: str | None, message: Message
    ) -> None:
        listening = Listening(self.router, client, principal, server_id, message, request.wake)
        try:
            await request.start_stream(200, STREAM_HEADERS)
            await listening.open()
            await request.write(encode(listening.acknowledgement()))
            server = request.server
            comment_at = trio.current_time() + COMMENT_AFTER
            while not server.draining:
                if listening.dirty:
                    await trio.sleep(COALESCE)
                    await request.write(b"".join(encode(text) for text in listening.take()))
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
            listening.close()

    # ------------------------------------------------------------------------------------------------ transport-neutral
    async def carry_out(
        self, client: Client, principal: Principal, server_id: str | None, message: Message, outlet: Outlet
    ) -> tuple[int, str]:
        """HTTP status and whole reply to a request; what comes before it goes to ``outlet``. Raises GatewayError.

        Cancelled, it cancels the call at its server.
        """
        return await self._attend(self._exchange(client, principal, server_id, message), None, None, outlet)

    def _exchange(self, client: Client, principal: Principal, server_id: str | None, message: Message) -> Exchange:
        router = self.router
        snapshot = router.snapshot
        deadline = trio.current_time() + router.timeout_of(server_id, snapshot)
        return Exchange(message, principal, snapshot, client, server_id, deadline)

    def refusal(self, error: GatewayError, method: str, id_text: str) -> tuple[int, str]:
        """A fault as a modern client sees it: HTTP status and reply (protocol.md section 7)."""
        if isinstance(error, Unsupported):
            return 400, build_error(id_text, error.code, error.message, {**error.data, "source": "gateway"})
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
            code = result.get("code")
            if code == URL_ELICITATION and method in INPUT_METHODS:
                return 200, ""
            if method == "resources/read" and code in (-32002, INVALID_PARAMS):
                reply = _with_uri(reply, exchange.message.param("uri"))
                code = INVALID_PARAMS
            text = self._build(exchange.message.id_text, to_modern(method, reply.message, self.info))
            return _STATUS.get(code, 200), text
        if type(result) is dict and result.get("resultType") == "input_required":
            return 200, ""
        return 200, self._build(exchange.message.id_text, to_modern(method, message, self.info, reply.cache))

    async def _attend(
        self, exchange: Exchange, call: Call | None, event: Event | None, outlet: Outlet
    ) -> tuple[int, str]:
        """Carry a request out, from wherever it has got to: status and reply. Cancelled, it cancels the call."""
        resumed = False
        try:
            if call is None:
                got = await self._begin(exchange, outlet)
                if type(got) is Reply:
                    return self._final(exchange, got)
                if type(got) is Parked:
                    text = self._resume(exchange, got)
                    if text:
                        return 200, text
                    call, resumed = got.call, True
                else:
                    assert type(got) is Call
                    call = got
            while True:
                if event is None:
                    with trio.move_on_at(outlet.comment_at):
                        event = await call.next()
                    if event is None:
                        await outlet.comment()
                        continue
                if type(event) is Reply:
                    return self._final(exchange, event)
                if type(event) is Ask:
                    asks, event = await self._gather(exchange, call, event, outlet, resumed)
                    if asks:
                        return 200, self._park(exchange, call, asks)
                    continue
                if type(event) is Interim:
                    await self._interim(exchange, event, outlet, resumed)
                event = None
        except BaseException:
            if call is not None:
                call.cancel(GONE)
            raise

    async def _begin(self, exchange: Exchange, outlet: Outlet) -> Reply | Call | Parked:
        message = exchange.message
        method = message.method
        if method == DISCOVER:
            return await self._discover(exchange)
        if method in REMOVED:
            return Reply.error(METHOD_NOT_FOUND, f"Method not found: {method}", {"source": "gateway"})
        state = message.param("requestState")
        if state is not None and method in INPUT_METHODS:
            if type(state) is not str:
                raise start_again("requestState must be a string")
            binding = Binding.of(exchange.principal, exchange.server_id, message)
            found = self.parking.take(state, binding)
            if type(found) is Parked:
                return found
            exchange.changes = {"requestState": quote(str(found))}
        got = self.router.dispatch_now(exchange)
        if got is not None:
            return got
        # It waits for a start, a slot or a list; ``run`` gives signs of life meanwhile, which begin the event stream.
        self._waiting[exchange] = outlet
        try:
            return await self.router.dispatch(exchange)
        finally:
            del self._waiting[exchange]

    async def _discover(self, exchange: Exchange) -> Reply:
        facts = dict(await self.router.discover(exchange.client, exchange.principal, exchange.server_id))
        facts.pop("serverInfo", None)
        facts.pop("protocolVersion", None)
        return Reply.result(dumps({"supportedVersions": list(MODERN_VERSIONS), **facts}))

    # ------------------------------------------------------------------------------------------ on the way to the reply
    async def _interim(self, exchange: Exchange, event: Interim, outlet: Outlet, resumed: bool) -> None:
        text = event.text
        if '"notifications/message"' in text:
            wanted = exchange.client.log_level
            level = json.loads(text).get("params", {}).get("level")
            if wanted is None or not level_at_least(level, wanted):
                return
        elif resumed and '"notifications/progress"' in text:
            # Told before the client came back, it still bears the token of the request before.
            token = exchange.message.meta.get("progressToken")
            if token is None:
                return
            found = json.loads(text)
            found["params"]["progressToken"] = token
            text = dumps(found)
        await outlet.send(text)

    async def _gather(
        self, exchange: Exchange, call: Call, first: Ask, outlet: Outlet, resumed: bool
    ) -> tuple[list[Ask], Event | None]:
        """A question and those right after it, as far as the client can be asked them; perhaps another event, too."""
        asks = [first]
        event: Event | None = None
        with trio.move_on_after(GATHER):
            while len(asks) < 64:
                event = await call.next()
                if type(event) is Ask:
                    asks.append(event)
                    event = None
                elif type(event) is Interim:
                    await self._interim(exchange, event, outlet, resumed)
                    event = None
                elif event is SLOW:
                    event = None
                else:
                    break
        possible = []
        for ask in asks:
            params = ask.message.params if type(ask.message.params) is dict else {}
            known = capability_needed(ask.message.method, params) is not None
            if not known or exchange.message.method not in INPUT_METHODS or type(event) is Reply:
                decline(ask)
            elif ask.open:
                self._require(exchange, ask.message.method, params)
                possible.append(ask)
        return possible, event

    def _park(self, exchange: Exchange, call: Call, asks: list[Ask]) -> str:
        keyed = {f"{ask.message.method.partition('/')[0]}-{number}": ask for number, ask in enumerate(asks, 1)}
        binding = Binding.of(exchange.principal, exchange.server_id, exchange.message)
        try:
            state = self.parking.park(call, keyed, exchange.principal, binding)
        except GatewayError:
            for ask in asks:
                decline(ask)
            raise
        requests = {key: question_to_modern(ask.message) for key, ask in keyed.items()}
        return self._input_required(exchange, {"inputRequests": requests, "requestState": state})

    def _input_required(self, exchange: Exchange, members: Mapping[str, Any]) -> str:
        reply = Reply.result(dumps({"resultType": "input_required", **members}))
        return self._build(exchange.message.id_text, to_modern(exchange.message.method, reply.message, self.info))

    def _resume(self, exchange: Exchange, parked: Parked) -> str:
        """Answer what the client has answers for. "" when the call goes on, else the reply that asks for the rest."""
        responses = exchange.message.param("inputResponses")
        answers = responses if type(responses) is dict else {}
        call = parked.resume(exchange)
        missing = []
        for key, ask in parked.asks.items():
            answer = answers.get(key)
            if type(answer) is dict:
                ask.resolve(dumps(answer))
            elif ask.open:
                missing.append(ask)
        return self._park(exchange, call, missing) if missing else ""

    def _final(self, exchange: Exchange, reply: Reply) -> tuple[int, str]:
        """Status and text of the last event of a call."""
        status, text = self._text(exchange, reply)
        if text:
            return status, text
        result = reply.message.result
        if reply.message.kind is ERROR:
            return 200, self._urls(exchange, result)
        requests = result.get("inputRequests")
        for entry in requests.values() if type(requests) is dict else ():
            params = entry.get("params") if type(entry) is dict else None
            self._require(exchange, entry.get("method") if type(entry) is dict else None, params or {})
        members = {name: value for name, value in result.items() if name not in ("resultType", "requestState")}
        state = result.get("requestState")
        if type(state) is str:
            binding = Binding.of(exchange.principal, exchange.server_id, exchange.message)
            members["requestState"] = self.parking.relay(state, binding)
        return 200, self._input_required(exchange, members)

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
            return build_error(exchange.message.id_text, -32603, str(error.get("message", ""))[:500])
        return self._input_required(exchange, {"inputRequests": requests})


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


def _with_uri(reply: Reply, uri: Any) -> Reply:
    """The error for a resource that is not there: the modern era wants to know which."""
    error = reply.message.result
    data = error.get("data")
    kept = data if type(data) is dict else {}
    return Reply.error(INVALID_PARAMS, str(error.get("message", "")), {"uri": uri, **kept})


async def _cancel_when_gone(request: Request, scope: trio.CancelScope) -> None:
    await request.wait_disconnected()
    scope.cancel()
