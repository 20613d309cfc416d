"""Being a modern MCP server on stdin and stdout: what ``modern`` answers, carried by lines (2026-07-28, stdio).

There are no headers here and no connection for each request, so a client takes back a request, and ends a
subscription, by ``notifications/cancelled``. Requests are independent: replies come as they are ready, and messages of
subscriptions stand between them, tagged with the id of the request that opened the subscription.
"""

from __future__ import annotations

from typing import Any, Final

import trio

from gateway.auth.principal import ANONYMOUS
from gateway.downstream.lines import LineOutlet, Lines
from gateway.downstream.listening import LISTEN, Listening
from gateway.downstream.modern import ModernFront, Unsupported
from gateway.downstream.streams import COALESCE
from gateway.errors import ClientProtocolError, GatewayError
from gateway.exchange import Client, Target
from gateway.protocol.eras import (
    CLIENT_CAPABILITIES,
    CLIENT_INFO,
    MODERN,
    MODERN_VERSIONS,
    PROTOCOL_VERSION,
    UNSUPPORTED_VERSION,
)
from gateway.protocol.message import INTERNAL_ERROR, Message, build_error
from gateway.router import Router

__all__ = ["ModernLines", "ModernRequest"]

ENDING: Final = "The gateway is ending"
_CONTEXT: Final = frozenset((PROTOCOL_VERSION, CLIENT_CAPABILITIES, CLIENT_INFO))


class ModernRequest:
    """A request in flight. ``withdrawn`` says that its client waits for no reply any more."""

    __slots__ = ("client", "message", "scope", "withdrawn")

    def __init__(self, message: Message, client: Client) -> None:
        self.message = message
        self.client = client
        self.scope = trio.CancelScope()
        self.withdrawn = False


class ModernLines:
    """The requests of one modern client, each served in a task of its own. ``run`` must be running."""

    def __init__(self, router: Router, target: Target, lines: Lines) -> None:
        self.target = target
        self.lines = lines
        self._front = ModernFront(router)
        self._running: dict[Any, ModernRequest] = {}
        self.run = self._front.run

    def admit(self, message: Message, *, begun: bool) -> ModernRequest:
        """A request to be served at once. ``begun``: the client has shown already that it speaks the modern era.

        Raises ClientProtocolError for one that can't be served; ``refusal`` makes the reply.
        """
        if message.id is None:
            raise ClientProtocolError("The id of a request must be a string or a number, not null")
        if begun and (message.method == "initialize" or _CONTEXT.isdisjoint(message.meta)):
            said = message.param("protocolVersion")
            data = {"supported": list(MODERN_VERSIONS), "requested": said if type(said) is str else "unknown"}
            text = f"This connection was begun with {MODERN}: every request carries its context in params._meta"
            raise Unsupported(text, UNSUPPORTED_VERSION, data)
        if message.id in self._running:
            raise ClientProtocolError(f"The id {message.id_text[:80]} belongs to a request that is still running")
        request = ModernRequest(message, self._front.client_of(ANONYMOUS, message))
        self._running[message.id] = request
        return request

    def refusal(self, error: GatewayError, message: Message) -> str:
        """The reply to a request that can't be carried out (protocol.md section 7)."""
        return self._front.refusal(error, message.method, message.id_text)[1]

    def note(self, message: Message) -> None:
        """A notification. The one that concerns us takes a request back, which then gets no reply (cancellation)."""
        id = message.param("requestId")
        if message.method == "notifications/cancelled" and type(id) in (str, int, float):  # true is not 1
            request = self._running.pop(id, None)
            if request is not None:
                request.withdrawn = True
                request.scope.cancel()

    def end_subscriptions(self) -> None:
        """End all that are open, and tell the client."""
        for request in self._running.values():
            if request.message.method == LISTEN:
                request.scope.cancel()

    async def serve(self, request: ModernRequest) -> str:
        """Carry a request out: the reply, to be written unless ``withdrawn``, or "" for none. Raises GatewayError.

        Cancelled, by ``note`` or from outside, it has cancelled the call at its server.
        """
        message = request.message
        text = ""
        try:
            with request.scope:
                await self.lines.room()
                if message.method == LISTEN:
                    await self._listen(request)
                else:
                    outlet = LineOutlet(self.lines)
                    try:
                        _, text = await self._front.carry_out(
                            request.client, ANONYMOUS, self.target, message, outlet
                        )
                    except GatewayError:
                        await outlet.stand_apart()
                        raise
                    await outlet.stand_apart()
        finally:
            if self._running.get(message.id) is request:
                del self._running[message.id]
        return text

    async def _listen(self, request: ModernRequest) -> None:
        """Write the messages of a subscription until it is cancelled: by its client, or else with a word to it."""
        message, send = request.message, self.lines.send
        changed = trio.Event()
        router = self._front.router
        listening = Listening(router, request.client, ANONYMOUS, self.target, message, lambda: changed.set())
        acknowledged = False
        try:
            await listening.open()
            send(listening.acknowledgement())
            acknowledged = True
            while True:
                changed = trio.Event()
                if not listening.dirty:
                    await changed.wait()
                await trio.sleep(COALESCE)
                await self.lines.room()  # a client that does not read finds changes joined when it does
                for text in listening.take():
                    send(text)
        finally:
            listening.close()
            if request.scope.cancel_called and not request.withdrawn:
                last = [build_error(message.id_text, INTERNAL_ERROR, ENDING, {"source": "gateway"})]
                for text in listening.ended() if acknowledged else last:
                    send(text)
