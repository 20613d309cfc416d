"""Speaking MCP over a pipe: one JSON message a line, to a process, a container or a pod (the stdio transport).

One task reads, one sweeps deadlines, and a writer runs only while a frame does not fit. Callers never wait to send:
a frame goes into the pipe at once when nothing is queued, whole frames queue behind a full pipe, and a full queue is an
error (robustness RB12). So a cancelled call can't leave half a frame behind, and one slow server costs its own callers
only. Everything the server writes is hostile until decoded: see ``_line`` and ``_oversize``.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import trio

from gateway.errors import GatewayError, LinkLost, Overloaded, ServerProtocolError, StartFailed, UpstreamTimeout
from gateway.exchange import Ask, Call, Exchange, Interim, Reply, decline, own_request
from gateway.protocol import handshake
from gateway.protocol.eras import Era
from gateway.protocol.framing import LineDecoder, Oversize
from gateway.protocol.message import (
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
from gateway.runtimes.base import Pipe
from gateway.telemetry.logs import TRACE, Throttle
from gateway.upstream.pending import Pending

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
EXIT_WAIT: Final = 0.05
"""Seconds to wait for the exit code after the end of the output, so that callers are told why (P4: 100 ms)."""

_any_id = re.compile(rb'"id" ?: ?([0-9]{1,18})')


class PipeLink:
    """A legacy server behind a pipe. Implements ``exchange.Link``.

    ``on_notice`` gets notifications that belong to no call, ``on_ask`` questions that no single call can take; it
    returns False when nobody can be asked. ``isolated`` says that one client owns the server, so that what it asks and
    logs during that client's only call is part of that call.
    """

    era = Era.LEGACY
    ping: Callable[[float], Awaitable[None]] | None = None
    """A process is healthy while it lives, and the reader notices its end at once (compat K16)."""

    def __init__(
        self,
        pipe: Pipe,
        *,
        server_id: str,
        on_notice: Callable[[Message], None],
        on_ask: Callable[[Ask], bool],
        isolated: bool = False,
        max_message_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self.server_id = server_id
        self.facts: Mapping[str, Any] = {}
        self.pending = Pending()
        self.lost: LinkLost | None = None
        self._pipe = pipe
        self._write = pipe.write_nowait
        self._on_notice = on_notice
        self._on_ask = on_ask
        self._isolated = isolated
        self._max_message_bytes = max_message_bytes
        self._outbox: deque[memoryview] = deque()
        self._queued = 0
        self._wake_writer = trio.Event()
        self._wake_sweeper = trio.Event()
        self._asks: dict[str, Ask] = {}
        self._closed = trio.Event()
        self._noise = Throttle(log)

    def __repr__(self) -> str:
        return f"<PipeLink {self.server_id} in_flight={len(self.pending)}{' lost' if self.lost else ''}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts of the pipe behind it, for people."""
        return self._pipe.details

    # -------------------------------------------------------------------------------------------------- its own tasks
    async def run(self) -> None:
        """Read, write and sweep until the server ends or this is cancelled; every call in flight then fails."""
        try:
            async with trio.open_nursery() as nursery:
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
                call.fail(UpstreamTimeout(f"Server '{self.server_id}' did not answer within {seconds:.3g} s"))

    def _lose(self, error: LinkLost) -> None:
        if self.lost is None:
            self.lost = error
        self.pending.fail_all(self.lost)
        for ask in list(self._asks.values()):
            ask.withdraw("the server has ended")
        self._asks.clear()
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
        data = text.encode() + b"\n"
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
        message = exchange.message
        pending = self.pending
        id = pending.new_id()
        id_text = str(id)
        changes = exchange.changes
        params = message.params
        if type(params) is dict and "_meta" in params:
            meta = message.meta
            if "progressToken" in meta:
                changes = {**(changes or {}), "_meta": dumps({**meta, "progressToken": id})}
        call = Call(exchange, self, id, trio.current_time())
        self._send(build_request(id_text, message.method, message.params_text(changes)))
        if not pending.calls:
            self._wake_sweeper.set()
        pending.calls[id] = call
        return call

    async def request(self, method: str, params_text: str = "", *, timeout: float) -> Message:
        """A request of the gateway's own: the reply, which may be an error. Raises what ``Call.next`` raises.

        Cancelling it cancels the request at the server.
        """
        return await own_request(self, method, params_text, timeout)

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

    async def handshake(
        self, capabilities: Mapping[str, Any], info: Mapping[str, Any], version: str, timeout: float
    ) -> None:
        """Open the legacy session with the server and fill ``facts``. Raises StartFailed or another UpstreamError."""
        method, params = handshake.opening(capabilities, info, version)
        reply = await self.request(method, params, timeout=timeout)
        self.facts = handshake.conclude(reply)
        self.notify(handshake.INITIALIZED)

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
            if call is not None:
                call.finish(Reply(message))
        elif kind is REQUEST:
            self._asked(message)
        else:
            self._notified(message)

    def _asked(self, message: Message) -> None:
        if message.method == "ping":
            self._post(build_result(message.id_text, "{}"))
            return
        key = message.id_text
        if key in self._asks:
            self._noise.warning("ask-id", "server %s reused the id %s of an open request", self.server_id, key)
            return

        def answer(text: str) -> None:
            self._asks.pop(key, None)
            self._post(text)

        ask = Ask(message, answer)
        if not self._isolated or len(self._asks) >= 64:
            decline(ask)
            return
        self._asks[key] = ask
        call = self.pending.sole_client_call()
        if call is not None:
            call.deliver(ask)
        elif not self._on_ask(ask):
            decline(ask)

    def _notified(self, message: Message) -> None:
        method = message.method
        if method == "notifications/progress":
            call = self.pending.get(message.param("progressToken"))
            if call is not None:
                token = call.exchange.message.meta.get("progressToken")
                if token is not None:
                    text = message.params_text({"progressToken": dumps(token)})
                    call.deliver(Interim(build_notification(method, text)))
        elif method == "notifications/cancelled":
            ask = self._asks.pop(dumps(message.param("requestId")), None)
            if ask is not None:
                ask.withdraw(str(message.param("reason") or "")[:200])
        else:
            if method == "notifications/message" and self._isolated:
                call = self.pending.sole_client_call()
                if call is not None:
                    call.deliver(Interim(message.text))
                    return
            self._on_notice(message)

    def _oversize(self, item: Oversize) -> None:
        """A line over the limit: end the call it answers, or every call if that can't be told (RB09)."""
        error = ServerProtocolError(
            f"Server '{self.server_id}' sent a message of over {self._max_message_bytes} bytes (max_message_bytes)"
        )
        self._noise.warning("oversize", "%s", error.message)
        for part in (item.head, item.tail):
            for found in _any_id.finditer(part):
                call = self.pending.calls.pop(int(found[1]), None)
                if call is not None:
                    call.fail(error)
                    return
        self.pending.fail_all(error)


def start_failure(error: GatewayError, pipe: Pipe) -> StartFailed:
    """The sentence for a server that ended or stayed silent before its handshake was done (RB01, RB05)."""
    if isinstance(error, StartFailed):
        return error
    if isinstance(error, LinkLost):
        return StartFailed(pipe.diagnosis())
    return StartFailed(f"{error.message}; {pipe.diagnosis()}")
