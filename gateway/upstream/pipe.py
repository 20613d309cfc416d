"""Speaking MCP over a pipe: one JSON message a line, to a process, a container or a pod (the stdio transport).

One task reads, one sweeps deadlines, and a writer runs only while a frame does not fit. Callers never wait to send:
a frame goes into the pipe at once when nothing is queued, whole frames queue behind a full pipe, and a full queue is an
error (robustness RB12). So a cancelled call can't leave half a frame behind, and one slow server costs its own callers
only. Everything the server writes is hostile until decoded: see ``_line`` and ``_oversize``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from math import inf
from typing import Any, Final

import trio

from gateway.errors import GatewayError, LinkLost, Overloaded, ServerProtocolError, StartFailed
from gateway.exchange import Call, Exchange, Interim, Reply, decline, internal_exchange, own_request
from gateway.protocol import handshake
from gateway.protocol.eras import INPUT_METHODS, SUBSCRIPTION_ID, Era, level_at_least
from gateway.protocol.framing import LineDecoder, Oversize
from gateway.protocol.message import (
    ERROR,
    INVALID_PARAMS,
    NOTIFICATION,
    REQUEST,
    Malformed,
    Message,
    build_error,
    build_notification,
    build_request,
    build_result,
    decode_reply,
    dumps,
)
from gateway.protocol.translate import to_legacy
from gateway.runtimes.base import Pipe
from gateway.telemetry.logs import TRACE, Throttle
from gateway.upstream.asks import Asks
from gateway.upstream.modern import (
    ACKNOWLEDGED,
    LISTEN,
    Rounds,
    cleaned_tools,
    is_input_required,
    legacy_params,
    listen_params,
    modern_params,
    pass_progress,
    promised,
    untagged,
)
from gateway.upstream.pending import Pending
from gateway.upstream.tasks import TaskRun, needs_task
from gateway.upstream.terms import Terms, WrongEra, too_late

__all__ = ["PipeLink", "start_failure"]

log = logging.getLogger("gateway_core")

MAX_OUTBOX: Final = 16 * 1024 * 1024
"""Bytes that may wait for a server that does not read."""
MAX_FRAMES: Final = 16384
"""Messages that may wait for it: a small one costs several times its bytes (answers to a flood of pings, RB09)."""
TICK: Final = 0.05
"""Seconds between two looks at the calls in flight; SLOW_AFTER and RB20's 100 ms rest on it."""
JOIN_FROM: Final = 8
"""Calls in flight from which on frames of one turn of the loop are joined."""
JOIN_BYTES: Final = 64 * 1024
"""What is joined at most: more than a pipe usually takes would only be copied again."""
LATE: Final = 120.0
"""Seconds for which a late answer to the probe is of interest."""
POST_LIMIT: Final = 30.0
"""Seconds a request of the gateway's own may take that nobody waits for."""
EXIT_WAIT: Final = 0.05
"""Seconds to wait for the exit code after the end of the output, so that callers are told why (P4: 100 ms)."""


class PipeLink:
    """A server of either era behind a pipe. Implements ``exchange.Link``.

    ``terms.on_notice`` gets notifications that belong to no call, ``terms.on_ask`` questions that no single call can
    take; it returns False when nobody can be asked. ``terms.isolated`` says that one client owns the server, so that
    what it asks and logs during that client's only call is part of that call.
    """

    ping: Callable[[float], Awaitable[None]] | None = None
    """A process is healthy while it lives, and the reader notices its end at once (compat K16)."""

    def __init__(self, pipe: Pipe, terms: Terms) -> None:
        self.server_id = terms.server_id
        self.era = Era.LEGACY
        self.decided = ""
        self.slow = False
        self.facts: Mapping[str, Any] = {}
        self.pending = Pending()
        self.lost: LinkLost | None = None
        self._pipe = pipe
        self._write = pipe.write_nowait
        self._terms = terms
        self._isolated = terms.isolated
        self._max_message_bytes = terms.max_message_bytes
        self._level: str | None = None
        self._listener: Listener | None = None
        self._listening = trio.Lock()
        self._outbox: deque[memoryview] = deque()
        self._queued = 0
        self._wake_writer = trio.Event()
        self._wake_sweeper = trio.Event()
        self._closed = trio.Event()
        self._noise = Throttle(log)
        self._asks = Asks(terms.server_id, self._post, self._noise)

    def __repr__(self) -> str:
        return f"<PipeLink {self.server_id} in_flight={len(self.pending)}{' lost' if self.lost else ''}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts of the pipe behind it and of its era, for people."""
        return {**self._pipe.details, "era": self.era.value, "era_decided_by": self.decided}

    # -------------------------------------------------------------------------------------------------- its own tasks
    async def run(self) -> None:
        """Read, write and sweep until the server ends or this is cancelled; every call in flight then fails."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._writer)
                nursery.start_soon(self._sweeper)
                await self._reader()
                nursery.cancel_scope.cancel()
        finally:
            # Also when cancelled: a stopped server's callers are told, not left to their deadlines.
            self._lose(self.lost or LinkLost(f"Server '{self.server_id}' was stopped"))

    async def wait_closed(self) -> None:
        """Return when the link is lost; ``lost`` says why."""
        await self._closed.wait()

    async def _reader(self) -> None:
        decoder = LineDecoder(self._max_message_bytes)
        receive, feed, line = self._pipe.receive_some, decoder.feed, self._line
        while data := await receive():
            for item in feed(data):
                if isinstance(item, Oversize):
                    self._oversize(item)
                else:
                    line(item)
        with trio.move_on_after(EXIT_WAIT):
            await self._pipe.wait_exited()
        self._lose(LinkLost(f"Server '{self.server_id}' ended: {self._pipe.diagnosis()}"))

    async def _writer(self) -> None:
        outbox = self._outbox
        while True:
            if not outbox:
                self._wake_writer = trio.Event()
                await self._wake_writer.wait()
            try:
                while outbox:
                    head = outbox.popleft()
                    if outbox and len(head) < JOIN_BYTES:
                        parts, size = [head], len(head)
                        while outbox and size < JOIN_BYTES:
                            parts.append(outbox.popleft())
                            size += len(parts[-1])
                        head = memoryview(b"".join(parts))
                    count = self._write(head)
                    self._queued -= count
                    if count < len(head):
                        outbox.appendleft(head[count:])
                        await self._pipe.wait_writable()
            except LinkLost:
                # The server closed its input; what it still says is read to the end, then the reader tells everybody.
                outbox.clear()
                self._queued = 0
                await trio.sleep_forever()

    async def _sweeper(self) -> None:
        pending = self.pending
        while True:
            if not pending.calls:
                self._wake_sweeper = trio.Event()
                await self._wake_sweeper.wait()
            await trio.sleep(TICK)
            for call in pending.overdue(trio.current_time()):
                seconds = call.deadline - call.started
                self.cancel(call, "timeout")
                call.fail(too_late(self.server_id, seconds, self._pipe.remark()))

    def _lose(self, error: LinkLost) -> None:
        if self.lost is None:
            self.lost = error
        self.pending.fail_all(self.lost)
        self._asks.withdraw("the server has ended")
        if self._listener is not None:
            self._listener.end()
        self._closed.set()

    # ------------------------------------------------------------------------------------------------------- sending
    def _send(self, text: str) -> None:
        if self.lost is not None:
            raise self.lost
        if log.isEnabledFor(TRACE):
            log.log(TRACE, "Sent message %s", text)
        if "\n" in text or "\r" in text:
            # Between the tokens of a checked message only: strings can't hold them.
            text = text.replace("\n", " ").replace("\r", " ")
        # A lone surrogate is no UTF-8; escaped it is the same JSON.
        data = text.encode("utf-8", "backslashreplace") + b"\n"
        size = len(data)
        if not self._outbox:
            if len(self.pending.calls) >= JOIN_FROM:
                # Busy: what this turn of the loop sends goes out in one write at the writer's turn.
                self._outbox.append(memoryview(data))
                self._queued += size
                self._wake_writer.set()
                return
            count = self._write(data)
            if count == size:
                return
            self._outbox.append(memoryview(data)[count:])
            self._queued += size - count
            self._wake_writer.set()
            return
        if self._queued + size > MAX_OUTBOX or len(self._outbox) >= MAX_FRAMES:
            raise Overloaded(f"Server '{self.server_id}' does not read its input; {self._queued} bytes wait for it")
        self._outbox.append(memoryview(data))
        self._queued += size

    def call(self, exchange: Exchange) -> Call:
        """Send a request. See ``exchange.Link.call``."""
        pending = self.pending
        id = pending.new_id()
        if self.era is Era.MODERN:
            params = modern_params(exchange, id, self._terms.info)
        else:
            params = legacy_params(exchange, id)
            if exchange.client.log_level is not None and exchange.client.era is Era.MODERN:
                self._lower_level(exchange.client.log_level)
        call = Call(exchange, self, id, trio.current_time())
        self._send(build_request(str(id), exchange.message.method, params))
        if not pending.calls:
            self._wake_sweeper.set()
        pending.calls[id] = call
        return call

    def _lower_level(self, level: str) -> None:
        """A modern client wants logs with this call: have a legacy server send them (protocol.md section 4.1, log).

        Asked on the same pipe before the call, so the server knows when it begins; its answer is not waited for.
        """
        if not self._isolated or "logging" not in self.facts.get("capabilities", {}):
            return
        if self._level is None or not level_at_least(level, self._level):
            self._level = level
            self._forgettable("logging/setLevel", {"level": level})

    def _again(self, call: Call, changes: dict[str, str]) -> None:
        """Send a call's next round, under an id of its own."""
        if call.done:
            return
        self.pending.drop(call)
        id = self.pending.new_id()
        params = modern_params(call.exchange, id, self._terms.info, changes)
        self._go_on(call, id, call.exchange.message.method, params)

    async def request(self, method: str, params_text: str = "", *, timeout: float) -> Message:
        """A request of the gateway's own: the reply, which may be an error. Raises what ``Call.next`` raises.

        Cancelling it cancels the request at the server.
        """
        return await own_request(self, method, params_text, timeout, self._terms.lister)

    def notify(self, method: str, params_text: str = "") -> None:
        """Send a notification; dropped when the link is lost or full."""
        self._post(build_notification(method, params_text))

    def _post(self, text: str) -> None:
        try:
            self._send(text)
        except GatewayError as error:
            log.debug("dropped a message to %s: %s", self.server_id, error)

    def cancel(self, call: Call, reason: str = "") -> None:
        """See ``exchange.Link.cancel``. ``initialize`` can't be cancelled (lifecycle), so its server is stopped."""
        if self.pending.drop(call) and self.lost is None and call.exchange.message.method != "initialize":
            tail = f',"reason":{dumps(reason)}' if reason else ""
            self.notify("notifications/cancelled", f'{{"requestId":{call.id}{tail}}}')
            if type(call.rounds) is TaskRun and call.rounds.id:
                self._forgettable("tasks/cancel", {"taskId": call.rounds.id})

    def _forgettable(self, method: str, params: Mapping[str, Any]) -> None:
        """A request of ours whose answer nobody waits for."""
        with suppress(GatewayError):
            self.call(internal_exchange(method, dumps(params), trio.current_time() + POST_LIMIT))

    def forget(self, call: Call) -> None:
        """See ``exchange.Link.forget``."""
        self.pending.drop(call)

    # ----------------------------------------------------------------------------------------------------- handshake
    async def handshake(self) -> None:
        """Find out which era the server speaks, in the order of ``terms.eras``, and fill ``facts``.

        Raises StartFailed or another UpstreamError; WrongEra when it takes another process to go on.
        """
        eras = self._terms.eras
        if eras[0] is Era.MODERN:
            silent = await self._probe(last=len(eras) == 1)
            if self.era is Era.LEGACY:
                await self._initialize(silent, then_probe=silent is not None)
        else:
            await self._initialize(None, then_probe=len(eras) > 1)

    async def _probe(self, *, last: bool) -> Call | None:
        """Ask ``server/discover``: the call, if it has not been answered in time. ``era`` says what came of it.

        Raises StartFailed when nothing else may be tried.
        """
        terms = self._terms
        method, params = handshake.probe(terms.info)
        started = trio.current_time()
        call = self.call(internal_exchange(method, params, started + (terms.timeout if last else LATE)))
        event: object = None
        try:
            with trio.move_on_at(inf if last else started + min(terms.timeout, terms.probe_timeout)):
                event = await call.next()
                while type(event) is not Reply:
                    event = await call.next()
        except LinkLost:
            if last:
                raise
            raise WrongEra(Era.LEGACY, "it ended when it was asked for server/discover") from None
        if type(event) is not Reply:
            return call
        reply = event.message
        facts = handshake.discovered(reply)
        if facts is not None:
            self._modern(facts, "catalog" if len(terms.eras) == 1 else handshake.DISCOVER)
        elif last:
            raise StartFailed(
                f"the server does not speak 2026-07-28: it answered server/discover with {str(reply.result)[:200]}"
            )
        return None

    def _modern(self, facts: Mapping[str, Any], decided: str) -> None:
        self.era, self.facts, self.decided = Era.MODERN, facts, decided
        params = listen_params(facts["capabilities"], (), self._terms.info)
        if params:
            self._listener = Listener(self.pending.new_id(), frozenset())
            self._post(build_request(str(self._listener.id), LISTEN, params))

    async def _initialize(self, silent: Call | None, *, then_probe: bool) -> None:
        """Open a legacy session. ``silent`` is a probe that was not answered in time and may be answered yet.

        ``then_probe`` asks a server that refuses for the modern era: it was slow, or has never been asked.
        """
        terms = self._terms
        method, params = handshake.opening(terms.capabilities, terms.info, terms.version)
        reply = await self.request(method, params, timeout=terms.timeout)
        if then_probe and handshake.wants_modern(reply):
            await self._probe(last=True)
            return
        self.facts = handshake.conclude(reply)
        self.decided = "initialize" if len(terms.eras) > 1 else "catalog"
        self.notify(handshake.INITIALIZED)
        if silent is not None and silent.done and not silent.failed:
            # It speaks both and was only slow: nothing is known against the modern era.
            late = await silent.next()
            self.slow = type(late) is Reply and handshake.discovered(late.message) is not None

    # ------------------------------------------------------------------------------------------- resource subscriptions
    async def subscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.subscribe``."""
        if self.era is Era.LEGACY:
            return await self.request("resources/subscribe", dumps({"uri": uri}), timeout=timeout)
        async with self._listening:
            held = self._listener.uris if self._listener is not None else frozenset()
            return await self._listen(held | {uri}, uri, timeout)

    async def unsubscribe(self, uri: str, timeout: float) -> Message:
        """See ``exchange.Link.unsubscribe``."""
        if self.era is Era.LEGACY:
            return await self.request("resources/unsubscribe", dumps({"uri": uri}), timeout=timeout)
        async with self._listening:
            held = self._listener.uris if self._listener is not None else frozenset()
            return await self._listen(held - {uri}, "", timeout)

    async def _listen(self, uris: frozenset[str], wanted: str, timeout: float) -> Message:
        """Replace the listen by one with these resources: open, wait for its acknowledgement, close the former.

        A filter can't be changed (2026-07-28, subscriptions), and so nothing is missed between the two.
        """
        former = self._listener
        params = listen_params(self.facts["capabilities"], uris, self._terms.info)
        if params:
            listener = self._listener = Listener(self.pending.new_id(), uris)
            self._send(build_request(str(listener.id), LISTEN, params))
            with trio.move_on_after(timeout):
                await listener.acknowledged.wait()
            if self.lost is not None:
                raise self.lost
            if listener.error is not None or (wanted and wanted not in listener.honoured):
                self._listener = former
                self._end_listen(listener)
                refusal = build_error("0", INVALID_PARAMS, "The server does not honour it", {"uri": wanted})
                return decode_reply(listener.error or refusal)
        else:
            self._listener = None
        if former is not None:
            self._end_listen(former)
        return decode_reply(build_result("0", "{}"))

    def _end_listen(self, listener: Listener) -> None:
        if listener.error is None:
            self.notify("notifications/cancelled", f'{{"requestId":{listener.id}}}')

    # ----------------------------------------------------------------------------------------------------- receiving
    def _line(self, line: bytes) -> None:
        try:
            message = decode_reply(line)
        except Malformed as error:
            if line.strip():
                self._noise.warning(
                    "not-json",
                    "server %s wrote a line that is no JSON-RPC message (%s): %.200r",
                    self.server_id,
                    error,
                    line[:200],
                )
            return
        if log.isEnabledFor(TRACE):
            log.log(TRACE, "Received message %s", message.text)
        kind = message.kind
        if kind > NOTIFICATION:
            call = self.pending.take(message.id)
            if call is None:
                self._listen_ended(message)
            else:
                self._replied(call, message)
        elif kind is REQUEST:
            self._asked(message)
        else:
            self._notified(message)

    def _replied(self, call: Call, message: Message) -> None:
        exchange = call.exchange
        if exchange.message.method == "tools/list":
            message = cleaned_tools(message)
        if self.era is Era.MODERN:
            if exchange.client.era is Era.LEGACY and exchange.client.key:
                self._answered(call, message)
                return
        elif call.rounds is not None or message.kind is ERROR:
            self._maybe_task(call, message)
            return
        call.finish(Reply(message))

    def _answered(self, call: Call, message: Message) -> None:
        """A modern server's reply to a legacy client: in its dialect, or another round (protocol.md section 4.3)."""
        exchange = call.exchange
        if is_input_required(message) and exchange.message.method in INPUT_METHODS:
            call.id = self.pending.new_id()
            self.pending.add(call)
            Rounds.of(call, self._again).another(message, self.pending, self._nursery)
            return
        method = exchange.message.method
        call.finish(Reply(to_legacy(method, message, exchange.client.version, uri=str(exchange.message.param("uri")))))

    def _maybe_task(self, call: Call, message: Message) -> None:
        """A legacy server's reply, unless it only says how the call has to be made (protocol.md section 4.5)."""
        exchange, run = call.exchange, call.rounds
        if run is None and needs_task(self.facts.get("capabilities", {}), exchange.message.method, message):
            call.rounds = run = TaskRun(self.pending.new_id())
            params = legacy_params(exchange, run.token, run.changes)
            self._go_on(call, run.token, exchange.message.method, params)
            return
        after = run.take(message) if run is not None else None
        if after is None:
            call.finish(Reply(message))
        else:
            self.pending.keep_token(run.token, call)
            self._go_on(call, self.pending.new_id(), *after)

    def _go_on(self, call: Call, id: int, method: str, params: str) -> None:
        """Another request for the sake of the same call."""
        call.id = id
        try:
            self._send(build_request(str(id), method, params))
        except GatewayError as error:
            call.fail(error)
            return
        self.pending.add(call)
        self._wake_sweeper.set()

    def _listen_ended(self, message: Message) -> None:
        listener = self._listener
        if listener is not None and message.id == listener.id:
            # Refused, or given up by a server that is about to go: what it does not announce is asked for when needed.
            listener.error = message.text if message.kind is ERROR else ""
            listener.end()

    def _asked(self, message: Message) -> None:
        ask = self._asks.take(message, allowed=self._isolated and self.era is not Era.MODERN)
        if ask is None:
            return
        call = self.pending.sole_client_call()
        if call is not None:
            call.deliver(ask)
        elif not self._terms.on_ask(ask):
            decline(ask)

    def _notified(self, message: Message) -> None:
        method = message.method
        if method == "notifications/progress":
            call = self.pending.get(message.param("progressToken"))
            if call is not None:
                self._progressed(call, message)
        elif method == "notifications/cancelled":
            self._asks.cancelled(message)
        elif method == ACKNOWLEDGED:
            listener = self._listener
            if listener is not None and message.meta.get(SUBSCRIPTION_ID) == listener.id:
                listener.acknowledge(message.param("notifications"))
        else:
            if method == "notifications/message" and self._isolated:
                call = self.pending.sole_client_call()
                if call is not None:
                    call.deliver(Interim(message.text))
                    return
            self._terms.on_notice(untagged(message) if self.era is Era.MODERN else message)

    def _progressed(self, call: Call, message: Message) -> None:
        exchange = call.exchange
        bridged = self.era is Era.MODERN and exchange.client.era is Era.LEGACY
        # It may take several rounds, each of which counts anew.
        in_rounds = bridged and exchange.message.method in INPUT_METHODS
        if not in_rounds or Rounds.of(call, self._again).risen(message.param("progress")):
            pass_progress(call, message)

    def _oversize(self, item: Oversize) -> None:
        """A line over the limit: end the call it answers, or every call if that can't be told (RB09)."""
        error = ServerProtocolError(
            f"Server '{self.server_id}' sent a message of over {self._max_message_bytes} bytes (max_message_bytes)"
        )
        self._noise.warning("oversize", "%s", error.message)
        self.pending.fail_answered((item.head, item.tail), error)


class Listener:
    """A ``subscriptions/listen`` of ours: what it asked for, and what came of it."""

    __slots__ = ("acknowledged", "error", "honoured", "id", "uris")

    def __init__(self, id: int, uris: frozenset[str]) -> None:
        self.id = id
        self.uris = uris
        self.honoured: frozenset[str] = frozenset()
        self.acknowledged = trio.Event()
        self.error: str | None = None

    def acknowledge(self, filter: object) -> None:
        """The server has said what it will send."""
        self.honoured = promised(filter)
        self.acknowledged.set()

    def end(self) -> None:
        """Nothing comes of it any more."""
        if self.error is None:
            self.error = ""
        self.acknowledged.set()


def start_failure(error: GatewayError, pipe: Pipe) -> StartFailed:
    """The sentence for a server that ended or stayed silent before its handshake was done (RB01, RB05)."""
    if isinstance(error, StartFailed):
        return error
    if isinstance(error, LinkLost):
        return StartFailed(pipe.diagnosis())
    return StartFailed(f"{error.message}; {pipe.diagnosis()}")
