"""The modern era over HTTP (2026-07-28) from the client's side: every request is a POST that says all there is to know.

No session, no stream but a request's own. What differs from the older transport follows from that: headers repeat what
the body says, a request is cancelled by closing its response and by nothing else, and list changes and resource updates
come as the answer to a request of the gateway's own that is kept open (``_listen``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from json import loads
from math import inf
from typing import Any, Final

import httpx
import trio

from gateway.errors import (
    ClientProtocolError,
    CredentialsRefused,
    GatewayError,
    LinkLost,
    RateLimited,
    ServerProtocolError,
    StartFailed,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import Call, Exchange, Reply, internal_exchange
from gateway.protocol import handshake
from gateway.protocol.eras import (
    HEADER_MISMATCH,
    INPUT_METHODS,
    LEGACY_VERSIONS,
    MISSING_CAPABILITY,
    MODERN,
    UNSUPPORTED_VERSION,
    Era,
)
from gateway.protocol.headers import HeaderParameter, mirrored, parameter_headers, parameters_of
from gateway.protocol.message import (
    ERROR,
    INVALID_PARAMS,
    NOTIFICATION,
    REQUEST,
    RESULT,
    Malformed,
    Message,
    build_error,
    build_notification,
    build_request,
    build_result,
    decode_reply,
    decode_request,
    dumps,
)
from gateway.protocol.sse import EVENT_STREAM, Decoder, Event, Oversize
from gateway.protocol.translate import to_legacy
from gateway.upstream.http_link import (
    JSON_BODY,
    MAX_REOPEN,
    MAX_SMALL,
    REOPEN,
    HttpLink,
    Trail,
    about_session,
    body_of,
    content_type,
    encoded,
    one_line,
)
from gateway.upstream.modern import (
    ACKNOWLEDGED,
    LISTEN,
    Rounds,
    cleaned_tools,
    is_input_required,
    listen_params,
    modern_params,
    promised,
    untagged,
)

__all__ = ["ModernHttpLink"]

log = logging.getLogger("gateway_core")

REPROBE_LIMIT: Final = 10.0
"""Seconds for the answer of a server that is asked again what it speaks."""
LATE: Final = 120.0
"""Seconds for which a late answer to the probe is of interest."""
RELIST_LIMIT: Final = 10.0
"""Seconds a list may take that is fetched again because a call's headers were refused."""
MAX_PAGES: Final = 100
MAX_TOOLS: Final = 10_000
"""Tools whose headers are remembered."""
SETTLED: Final = 5.0
"""Seconds a subscription must have lasted to be opened again at once when it ends."""
OURS: Final = (HEADER_MISMATCH, MISSING_CAPABILITY, UNSUPPORTED_VERSION)
"""Error codes that only modern servers use."""

_ACCEPT: Final = (b"accept", f"application/json, {EVENT_STREAM}".encode())
_LISTS: Final = {"toolsListChanged": "tools", "promptsListChanged": "prompts", "resourcesListChanged": "resources"}


class Listener:
    """A ``subscriptions/listen`` of ours: what it asks for, and what came of it.

    honoured      resources whose updates the server has promised
    settled       set with the first answer, whichever it is
    failure       why there was none to the first request; it is tried again all the same
    refusal       the server's error; it is not tried again
    """

    __slots__ = ("failure", "honoured", "refusal", "scope", "settled", "uris")

    def __init__(self, uris: frozenset[str]) -> None:
        self.uris = uris
        self.honoured: frozenset[str] = frozenset()
        self.settled = trio.Event()
        self.failure: GatewayError | None = None
        self.refusal: Message | None = None
        self.scope = trio.CancelScope()

    def acknowledge(self, filter: object) -> None:
        """The server has said what it will send."""
        self.honoured = promised(filter)
        self.settled.set()

    def end(self) -> None:
        """Close it: nobody listens any more."""
        self.scope.cancel()
        self.settled.set()


class ModernHttpLink(HttpLink):
    """A server of 2026-07-28 behind a URL. Open it with ``probe``.

    Legacy clients get its replies in their dialect and see its questions as Asks; modern ones get what it says.
    """

    era = Era.MODERN
    transport_name = "streamable-http"
    prefers_sole_call = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parameters: dict[str, tuple[HeaderParameter, ...]] = {}
        self._sent: dict[int, str] = {}
        self._repeats: set[int] = set()
        self._relisting = trio.Lock()
        self._lists = 0
        self._doubted = False
        self._unanswered: list[Call] = []
        self._listening = trio.Lock()
        self._listener: Listener | None = None
        self._listeners: set[Listener] = set()

    # ------------------------------------------------------------------------------------------------------- opening
    async def probe(self, *, last: bool) -> bool | None:
        """Ask ``server/discover`` (protocol.md section 3): whether the server is modern; None when it is silent.

        A modern one is ready then. Raises what decides nothing (401, 403, 429, 5xx, network faults), and StartFailed
        where the server is modern but can't be spoken to, or ``last`` says that nothing else may be tried.
        """
        terms = self._terms
        method, params = handshake.probe(terms.info)
        started = trio.current_time()
        call = self.call(internal_exchange(method, params, started + (terms.timeout if last else LATE)))
        event: object = None
        try:
            with trio.move_on_at(inf if last else started + min(terms.timeout, terms.probe_timeout)):
                while type(event) is not Reply:
                    event = await call.next()
        except ServerProtocolError as error:
            if last:
                raise StartFailed(f"{error.message}; it was asked for server/discover of {MODERN}") from error
            return False
        if type(event) is not Reply:
            self._unanswered.append(call)
            return None
        facts = _facts_in(event.message)
        if facts is None:
            if last:
                said = str(event.message.result)[:200]
                raise StartFailed(f"the server does not speak {MODERN}: it answered server/discover with {said}")
            return False
        self.facts = facts
        self.decided = "catalog" if len(terms.eras) == 1 else handshake.DISCOVER
        self._begin_listening()
        return True

    async def answered_late(self) -> bool:
        """Whether the server, silent to the probe at first, has meanwhile said that it is modern."""
        for call in self._unanswered:
            if call.done and not call.failed:
                event: object = None
                while type(event) is not Reply:
                    event = await call.next()
                with suppress(StartFailed):
                    return _facts_in(event.message) is not None
        return False

    def lose(self, error: LinkLost) -> None:
        """See ``HttpLink.lose``."""
        super().lose(error)
        for listener in list(self._listeners):
            listener.end()

    async def _ping(self, timeout: float) -> None:
        await self.request(handshake.DISCOVER, timeout=timeout)

    def _doubt(self) -> None:
        """Ask again what the server is: it answers like one of the other era."""
        if self.facts and not self._doubted:
            self._doubted = True
            self._nursery.start_soon(self._probe_again)

    async def _probe_again(self) -> None:
        modern = True
        try:
            modern = _facts_in(await self.request(handshake.DISCOVER, timeout=REPROBE_LIMIT)) is not None
        except CredentialsRefused:
            pass
        except (ServerProtocolError, StartFailed):
            modern = False
        except GatewayError:
            pass
        finally:
            self._doubted = False
        if not modern:
            self.lose(LinkLost(f"Server '{self.server_id}' at {self._target.name} does not speak {MODERN} any more"))

    # ------------------------------------------------------------------------------------------------------- sending
    def _params(self, exchange: Exchange, id: int) -> str:
        return modern_params(exchange, id, self._terms.info)

    def notify(self, method: str, params_text: str = "") -> None:
        """Nothing that clients notify a legacy server of has a place here."""

    def cancel(self, call: Call, reason: str = "") -> None:
        """See ``exchange.Link.cancel``: closing the response is the cancellation, nothing else is sent."""
        self.forget(call)

    async def _converse(self, call: Call, id: int, method: str, params: str) -> None:
        headers = self._headers(call.exchange, method)
        if method == "tools/call":
            self._sent[id] = params
        try:
            body = encoded(build_request(str(id), method, params))
            async with self._send("POST", self._target.url, headers, body) as response:
                await self._follow(call, id, response)
        finally:
            self._sent.pop(id, None)
            self._repeats.discard(id)

    def _headers(self, exchange: Exchange, method: str) -> list[tuple[bytes, bytes]]:
        """What a POST carries besides its body. Raises ClientProtocolError for a name that no header can carry."""
        params, changes = exchange.message.params, exchange.changes
        if type(params) is not dict:
            params = {}
        if changes:
            params = {**params, **{name: loads(text) for name, text in changes.items() if name in _MIRRORED}}
        try:
            pairs = mirrored(method, params)
            if method == "tools/call":
                parameters = self._parameters.get(params.get("name", ""))
                if parameters:
                    pairs += parameter_headers(parameters, params.get("arguments"))
        except UnicodeEncodeError:
            raise ClientProtocolError("a name or an argument is no valid Unicode", code=INVALID_PARAMS) from None
        return [_ACCEPT, JSON_BODY, *((name.encode(), value.encode()) for name, value in pairs)]

    # -------------------------------------------------------------------------------------------------- what comes back
    async def _follow(self, call: Call, id: int, response: httpx.Response) -> None:
        """Take the answer to a POST. Raises GatewayError when there is no reply in it."""
        status, kind = response.status_code, content_type(response)
        if status < 300:
            if kind == EVENT_STREAM:
                await self._stream(call, id, response, Trail())
                if not self._ended(call, id):
                    what = f"Server '{self.server_id}' ended its event stream before it had answered"
                    # To the probe that is no answer a modern server would give; to a call it is the server's end.
                    raise LinkLost(what) if self.facts else ServerProtocolError(what)
                return
            if kind != "application/json":
                raise self._nonsense(f"answered {status} with {kind[:60] or 'nothing'} instead of a JSON-RPC reply")
            self._body(call, id, await self._read(response, self._max))
            return
        if 400 <= status < 500 and status not in (401, 403, 429):
            message = _error_in(await self._read(response, self._max)) if kind == "application/json" else None
            if message is not None:
                code, said = message.result.get("code"), str(message.result.get("message", ""))
                foreign = message.id != id and code not in OURS and about_session(said) is not None
                if not foreign or not self.facts:
                    if call.id == id and self.pending.drop(call):
                        self._replied(call, message)
                    return
                self._doubt()
                raise self._nonsense(f"answered with HTTP {status}: {said[:200]}")
            self._doubt()
        raise await self._refusal(response)

    def _replied(self, call: Call, message: Message) -> None:
        exchange = call.exchange
        method, client = exchange.message.method, exchange.client
        if method == "tools/list":
            self._learn(message)
            message = cleaned_tools(message, drop_invalid=True)
        elif message.kind is ERROR and message.result.get("code") == HEADER_MISMATCH:
            params = self._sent.get(call.id)
            if params is not None and call.id not in self._repeats:
                self._keep(call)
                self._nursery.start_soon(self._list_and_repeat, call, call.id, params, message)
                return
        elif message.kind is ERROR and message.result.get("code") == UNSUPPORTED_VERSION:
            self._doubt()
        self._hand_over(call, message, translated=client.era is Era.LEGACY and client.key != "")

    def _hand_over(self, call: Call, message: Message, *, translated: bool) -> None:
        exchange = call.exchange
        method = exchange.message.method
        if not translated:
            call.finish(Reply(message))
        elif is_input_required(message) and method in INPUT_METHODS:
            self._another_round(call, message)
        else:
            uri = str(exchange.message.param("uri"))
            call.finish(Reply(to_legacy(method, message, exchange.client.version, uri=uri)))

    def _keep(self, call: Call) -> None:
        """The call's next request follows later, under this new id; its deadline holds meanwhile."""
        self.pending.keep_token(call.id, call)
        call.id = self.pending.new_id()
        self.pending.add(call)

    def _asked(self, message: Message, call: Call | None, id: int) -> None:
        self._noise.warning("asked", "modern server %s sent a request of its own (%s)", self.server_id, message.method)

    def _notified(self, message: Message, call: Call | None) -> None:
        if message.method.endswith("/list_changed") or message.method == "notifications/resources/updated":
            message = untagged(message)
        super()._notified(message, call)

    def _progressed(self, call: Call, message: Message) -> None:
        exchange = call.exchange
        # It may take several rounds, each of which counts anew.
        rounds = exchange.client.era is Era.LEGACY and exchange.message.method in INPUT_METHODS
        if not rounds or Rounds.of(call, self._again).risen(message.param("progress")):
            super()._progressed(call, message)

    # ---------------------------------------------------------------------------------------------------------- rounds
    def _another_round(self, call: Call, message: Message) -> None:
        """The server wants input from a legacy client (protocol.md section 4.3)."""
        self._keep(call)
        Rounds.of(call, self._again).another(message, self.pending, self._nursery)

    def _again(self, call: Call, changes: dict[str, str]) -> None:
        """Send a call's next round."""
        if call.done:
            return
        params = modern_params(call.exchange, call.id, self._terms.info, changes)
        self._go(call, call.exchange.message.method, params)

    # --------------------------------------------------------------------------------------- arguments that are headers
    def _learn(self, message: Message) -> None:
        """Remember which arguments of the tools listed here stand in headers."""
        tools = message.result.get("tools") if message.kind is RESULT and type(message.result) is dict else None
        if type(tools) is not list or not (self._parameters or '"x-mcp-header"' in message.text):
            return
        for tool in tools:
            name = tool.get("name") if type(tool) is dict else None
            if type(name) is not str:
                continue
            parameters: tuple[HeaderParameter, ...] = ()
            with suppress(ValueError):
                parameters = parameters_of(tool)
            if not parameters:
                self._parameters.pop(name, None)
            elif len(self._parameters) < MAX_TOOLS:
                self._parameters[name] = parameters

    async def _list_and_repeat(self, call: Call, id: int, params: str, refusal: Message) -> None:
        """A call was refused for its headers, so nothing ran: learn what they should be and send it once more."""
        try:
            await self._relist()
        except GatewayError as error:
            log.debug("server %s could not be listed again: %s", self.server_id, error)
            if not self._ended(call, id) and self.pending.drop(call):
                client = call.exchange.client
                self._hand_over(call, refusal, translated=client.era is Era.LEGACY and client.key != "")
            return
        if not self._ended(call, id) and self.lost is None:
            self._repeats.add(id)
            self._go(call, call.exchange.message.method, params)

    async def _relist(self) -> None:
        """List the tools, once for all who wait for it. Raises GatewayError."""
        before = self._lists
        async with self._relisting:
            if self._lists != before:
                return
            cursor: object = None
            for _ in range(MAX_PAGES):
                params = "" if cursor is None else dumps({"cursor": cursor})
                reply = await self.request("tools/list", params, timeout=RELIST_LIMIT)
                if reply.kind is not RESULT or type(reply.result) is not dict:
                    raise self._nonsense(f"could not list its tools: {str(reply.result)[:200]}")
                following = reply.result.get("nextCursor")
                if type(following) is not str or following == cursor:
                    break
                cursor = following
            self._lists += 1

    # --------------------------------------------------------------------------------- list changes, resource updates
    async def subscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.subscribe``."""
        held = self._held()
        if self._listener is not None and uri in held and uri in self._listener.honoured:
            return _DONE
        return await self._change(frozenset((uri,)), frozenset(), timeout)

    async def unsubscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.unsubscribe``."""
        return await self._change(frozenset(), frozenset((uri,)), timeout)

    def _held(self) -> frozenset[str]:
        return self._listener.uris if self._listener is not None else frozenset()

    async def _change(self, more: frozenset[str], less: frozenset[str], timeout: float) -> Message:
        """Listen to more or fewer resources. One change at a time."""
        if self.lost is not None:
            raise self.lost
        with trio.move_on_after(timeout):
            async with self._listening:
                return await self._replace((self._held() | more) - less, more)
        raise UpstreamTimeout(f"Server '{self.server_id}' did not answer {LISTEN} within {timeout:.3g} s")

    async def _replace(self, uris: frozenset[str], wanted: frozenset[str]) -> Message:
        """Put another listener in the place of the one there is: open it, wait for its acknowledgement, close the old.

        A filter can't be changed (2026-07-28, subscriptions), and so nothing is missed between the two.
        """
        former = self._listener
        if listen_params(self.facts["capabilities"], uris, self._terms.info):
            listener = self._open_listener(uris)
            try:
                await listener.settled.wait()
                if self.lost is not None:
                    raise self.lost
                if listener.failure is not None:
                    raise listener.failure
                if listener.refusal is not None or not wanted <= listener.honoured:
                    return _not_honoured(wanted, listener.refusal)
                self._listener = listener
            finally:
                if self._listener is not listener:
                    listener.end()
        else:
            self._listener = None
        if former is not None:
            former.end()
        return _DONE

    def _begin_listening(self) -> None:
        if listen_params(self.facts["capabilities"], (), self._terms.info):
            self._listener = self._open_listener(frozenset())

    def _open_listener(self, uris: frozenset[str]) -> Listener:
        listener = Listener(uris)
        self._listeners.add(listener)
        self._nursery.start_soon(self._listen, listener)
        return listener

    async def _listen(self, listener: Listener) -> None:
        """Keep a listen open: ask again, more and more seldom, when it ends or fails, until the server refuses it."""
        failures = 0
        try:
            with listener.scope:
                while self.lost is None and listener.refusal is None:
                    started = trio.current_time()
                    try:
                        await self._listen_once(listener)
                    except (UpstreamError, RateLimited) as error:
                        log.debug("a subscription at server %s failed: %s", self.server_id, error)
                        if not listener.settled.is_set():
                            listener.failure = error
                            listener.settled.set()
                    failures = 0 if trio.current_time() - started >= SETTLED else failures + 1
                    await trio.sleep(min(REOPEN * 2 ** min(max(failures - 1, 0), 5), MAX_REOPEN))
        finally:
            listener.settled.set()
            self._listeners.discard(listener)

    async def _listen_once(self, listener: Listener) -> None:
        """One listen from its POST to its end. Raises UpstreamError, RateLimited."""
        id = self.pending.new_id()
        params = listen_params(self.facts["capabilities"], listener.uris, self._terms.info)
        headers = [(name.encode(), value.encode()) for name, value in mirrored(LISTEN, {})]
        body = encoded(build_request(str(id), LISTEN, params))
        async with self._send("POST", self._target.url, [_ACCEPT, JSON_BODY, *headers], body) as response:
            status, kind = response.status_code, content_type(response)
            if status < 300 and kind == EVENT_STREAM:
                decoder = Decoder(self._max)
                async with body_of(response) as chunks:
                    async for chunk in chunks:
                        for event in decoder.feed(chunk):
                            if self._heard(listener, id, event):
                                return
                return
            if kind == "application/json" and (status < 300 or status in (400, 404, 405)):
                listener.refusal = _error_in(await self._read(response, MAX_SMALL))
            if listener.refusal is None:
                raise await self._refusal(response) if status >= 300 else self._nonsense("answered no event stream")

    def _heard(self, listener: Listener, id: int, event: Event | Oversize) -> bool:
        """One event of a listen; whether it was the last."""
        if type(event) is not Event or event.event != "message":
            return False
        try:
            message = decode_reply(one_line(event.data))
        except Malformed as error:
            self._noise.warning("not-json", "server %s sent no JSON-RPC message (%s)", self.server_id, error)
            return False
        method = message.method
        if message.kind > NOTIFICATION:
            ours: bool = message.id == id
            if message.kind is ERROR and ours:
                listener.refusal = message
            return ours
        if message.kind is REQUEST:
            self._asked(message, None, 0)
        elif method == ACKNOWLEDGED:
            again = listener.settled.is_set()
            listener.acknowledge(message.param("notifications"))
            if again:
                self._catch_up(listener, message.param("notifications"))
        elif method == "notifications/cancelled":
            return True
        else:
            # Nothing else may come here; whatever does is of no request.
            self._notified(message, None)
        return False

    def _catch_up(self, listener: Listener, filter: object) -> None:
        """A listen was open again after a break: what it may have missed counts as changed."""
        honoured: Mapping[str, Any] = filter if type(filter) is dict else {}
        for name, topic in _LISTS.items():
            if honoured.get(name):
                self._terms.on_notice(decode_request(build_notification(f"notifications/{topic}/list_changed")))
        for uri in sorted(listener.honoured & listener.uris):
            params = dumps({"uri": uri})
            self._terms.on_notice(decode_request(build_notification("notifications/resources/updated", params)))


_MIRRORED: Final = frozenset(("name", "uri", "taskId", "arguments"))
_DONE: Final = decode_reply(build_result("0", "{}"))


def _facts_in(reply: Message) -> Mapping[str, Any] | None:
    """``handshake.discovered``, for HTTP: what only a modern server says makes it one, which then can't be used.

    Raises StartFailed.
    """
    facts = handshake.discovered(reply)
    if facts is None and reply.kind is ERROR and reply.result.get("code") in OURS:
        data = reply.result.get("data")
        supported = data.get("supported") if type(data) is dict else None
        if type(supported) is list and any(version in LEGACY_VERSIONS for version in supported):
            return None
        text = str(reply.result.get("message", ""))[:200]
        raise StartFailed(f"the server speaks {MODERN} and refuses server/discover: {text} ({reply.result['code']})")
    return facts


def _error_in(data: bytes) -> Message | None:
    """The JSON-RPC error of a body, None where there is none."""
    with suppress(Malformed):
        message = decode_reply(one_line(data))
        if message.kind is ERROR:
            return message
    return None


def _not_honoured(wanted: frozenset[str], refusal: Message | None) -> Message:
    said = f": {str(refusal.result.get('message', ''))[:200]}" if refusal is not None else ""
    text = f"The server sends no updates of this resource{said}"
    return decode_reply(build_error("0", INVALID_PARAMS, text, {"uri": next(iter(wanted), "")}))
