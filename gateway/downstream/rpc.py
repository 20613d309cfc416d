"""Plain calls by server id: one JSON-RPC message in, one JSON reply out, no session (compat H7, H8, H22 to H32).

``POST /mcp`` with a top-level ``server_id`` and ``POST /rpc`` with ``X-Server-ID`` are the same call. Whoever calls
can't be asked anything, and a caller that goes away takes its call back (RB20).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Collection
from math import ceil
from typing import Final, TypeVar

import trio

from gateway.auth.principal import Principal
from gateway.downstream.server import ClientGone, Request
from gateway.errors import (
    AuthError,
    ClientProtocolError,
    GatewayError,
    Overloaded,
    StartFailed,
    UnknownTarget,
    UpstreamError,
)
from gateway.exchange import Ask, Call, Client, Exchange, Reply
from gateway.protocol.eras import LATEST_LEGACY, Era, agree_on
from gateway.protocol.message import (
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    NOTIFICATION,
    REQUEST,
    Malformed,
    Message,
    decode_request,
    dumps,
    quote,
)
from gateway.router import Router

__all__ = ["RpcFront"]

log = logging.getLogger("gateway_http")

T = TypeVar("T")

GONE: Final = "the client has gone"
MAX_CLIENTS: Final = 1024
"""Callers whose Client is remembered; more are made anew for each call."""


class RpcFront:
    """The REST face. Every method answers its request, faults included, except AuthError and ClientGone."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._clients: dict[Principal, Client] = {}

    # ------------------------------------------------------------------------------------------------- the two doors
    async def mcp(self, request: Request, principal: Principal, message: Message) -> None:
        """``POST /mcp`` with ``server_id`` in the body, which has been decoded."""
        server_id = message.extra["server_id"] if message.extra else None
        if type(server_id) is not str or not server_id:
            await self._refuse(request, message, ClientProtocolError("server_id must be a non-empty string"))
            return
        await self.call(request, principal, server_id, message)

    async def rpc(self, request: Request, principal: Principal) -> None:
        """``POST /rpc`` with the id in ``X-Server-ID``. Raises ClientProtocolError (H25 shape) without that header."""
        server_id = request.headers.get("x-server-id")
        if not server_id:
            raise ClientProtocolError("X-Server-ID header required")
        body = await request.body()
        try:
            message = decode_request(body, need_version=False)
            if not message.is_request:
                raise Malformed("method is missing", INVALID_REQUEST, message.id_text or "null")
        except Malformed as error:
            await self.malformed(request, error)
            return
        await self.call(request, principal, server_id, message)

    async def malformed(self, request: Request, error: Malformed) -> None:
        """400 with the JSON-RPC envelope (compat H30)."""
        text = _envelope(error.id_text, error.code, error.reason)
        await request.respond(400, text.encode())

    # ------------------------------------------------------------------------------------------------------ one call
    async def call(self, request: Request, principal: Principal, server_id: str, message: Message) -> None:
        """Answer one message to one server."""
        method = message.method
        try:
            if message.kind is not REQUEST:
                if message.kind is not NOTIFICATION:
                    raise ClientProtocolError("method is missing: only requests and notifications can be posted here")
                if method.startswith("notifications/"):
                    self._notify(principal, server_id, message)
                    await request.respond(202)
                    return
                # The original's pages call without an id and still want the answer (compat H22).
                message.id_text = quote(str(uuid.uuid4()))
            if method == "initialize":
                text = await self._initialize(request, principal, server_id, message)
            else:
                exchange = self._exchange(principal, server_id, message)
                reply = self.router.dispatch_now(exchange)
                if isinstance(reply, Call):
                    reply = await _reply(request, reply, message.id_text)
                    if request.responded:
                        return
                elif reply is None:
                    reply = await _attended(request, self._slowly(exchange))
                else:
                    # What the router answers itself, such as ping, is asked of a server here: there must be one.
                    self.router.check_server(principal, server_id, exchange.snapshot)
                text = reply.text(message.id_text)
        except GatewayError as error:
            if isinstance(error, AuthError):
                raise
            await self._refuse(request, message, error)
            return
        await request.respond(200, text.encode())

    def _client(self, principal: Principal) -> Client:
        client = self._clients.get(principal)
        if client is None:
            # Whoever has no session shares the units that are isolated by it with its own other calls only.
            client = Client(f"principal:{principal.subject}", Era.LEGACY, LATEST_LEGACY)
            if len(self._clients) < MAX_CLIENTS:
                self._clients[principal] = client
        return client

    def dismiss(self, known: Collection[Principal]) -> None:
        """Forget all callers but these."""
        self._clients = {principal: client for principal, client in self._clients.items() if principal in known}

    def _exchange(self, principal: Principal, server_id: str, message: Message) -> Exchange:
        router = self.router
        snapshot = router.snapshot
        deadline = trio.current_time() + router.timeout_of(server_id, snapshot)
        return Exchange(message, principal, snapshot, self._client(principal), server_id, deadline)

    def _notify(self, principal: Principal, server_id: str, message: Message) -> None:
        self.router.check_server(principal, server_id)
        if message.method not in ("notifications/initialized", "notifications/cancelled"):
            self.router.notify(self._exchange(principal, server_id, message))

    async def _initialize(self, request: Request, principal: Principal, server_id: str, message: Message) -> str:
        """The gateway has done its own handshake; a client's is answered from it (compat H39)."""
        exchange = self._exchange(principal, server_id, message)
        answer = self.router.initialize(exchange.client, principal, server_id, exchange.deadline)
        facts = await _attended(request, answer)
        version = agree_on(message.param("protocolVersion"))
        return Reply.result(dumps({**facts, "protocolVersion": version})).text(message.id_text)

    async def _slowly(self, exchange: Exchange) -> Reply:
        got = await self.router.dispatch(exchange)
        return await _last(got) if isinstance(got, Call) else got

    # ---------------------------------------------------------------------------------------------------------- faults
    async def _refuse(self, request: Request, message: Message, error: GatewayError) -> None:
        """The JSON-RPC envelope with the HTTP status and a top-level ``message`` for REST clients (H27, H28)."""
        code, text = error.code, error.message
        if isinstance(error, StartFailed):
            text = f"Failed to connect to server: {text}"
        elif isinstance(error, UpstreamError):
            text = f"Server error: {text}"
        elif not isinstance(error, ClientProtocolError | UnknownTarget | Overloaded):
            code = -32603
        log.debug("request failed", extra={"fields": {"method": message.method, "error": text}})
        headers = [("Retry-After", str(ceil(error.retry_after)))] if error.retry_after else []
        await request.respond(error.status, _envelope(message.id_text or "null", code, text).encode(), headers=headers)


def _envelope(id_text: str, code: int, text: str) -> str:
    error = dumps({"code": code, "message": text, "data": {"source": "gateway"}})
    return f'{{"jsonrpc":"2.0","id":{id_text},"error":{error},"message":{dumps(text)}}}'


async def _reply(request: Request, call: Call, id_text: str) -> Reply:
    """The reply to a call that has just been sent; it may have gone out already (``Request.responded``).

    Its caller is watched only when it takes long: a watcher costs more than the usual call does (design section 5).
    """
    call.on_reply = lambda reply: request.respond_now(200, reply.text(id_text).encode())
    try:
        event = await call.next()
    except BaseException:
        call.cancel(GONE)
        raise
    finally:
        call.on_reply = None
    if type(event) is Reply:
        return event
    if type(event) is Ask:
        _decline(event)
    return await _attended(request, _last(call))


async def _attended(request: Request, work: Awaitable[T]) -> T:
    """Await what may take long, but only while the caller is there. Raises ClientGone, and what ``work`` raises."""
    done: list[T] = []
    failure: GatewayError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_gone, request, nursery.cancel_scope)
        try:
            done.append(await work)
        except GatewayError as error:
            failure = error  # raised outside, where no group is put around it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not done:
        raise ClientGone
    return done[0]


async def _cancel_when_gone(request: Request, scope: trio.CancelScope) -> None:
    await request.wait_disconnected()
    scope.cancel()


async def _last(call: Call) -> Reply:
    """The reply, past progress and logs, which have no place in a plain reply, and questions, which are declined.

    Cancelled, it tells the server that nobody waits any more (RB20).
    """
    try:
        while True:
            event = await call.next()
            if type(event) is Reply:
                return event
            if type(event) is Ask:
                _decline(event)
    except BaseException:
        call.cancel(GONE)
        raise


def _decline(ask: Ask) -> None:
    ask.refuse(METHOD_NOT_FOUND, "The caller of a plain request can't be asked")
