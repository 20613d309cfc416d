"""Our own HTTP/1.1 connection under hypercorn's ``worker_serve``.

hypercorn keeps its configuration, sockets, lifespan and shutdown; the one name ``hypercorn.trio.run.TCPServer``, which
it calls for every accepted stream, is replaced by ``ServerConnection``. Its own connection costs some 600 us of CPU per
request, and one packet can end the process (design.md section 12, robustness.md section 2).

What is true of every line below:

- A request is handled in its connection's task. No task, nursery, cancel scope, event, lock or channel is made for it.
- A connection that waits owns no buffer, no timer and no cancel scope. Its one deadline is a float, looked at by one
  sweeper per server about once a second. A limit is never overrun by that, but may be met up to two sweeps early.
- To wake a connection, for a deadline, for shutdown or for ``Request.wake``, is to call
  ``trio.lowlevel.notify_closing``: it makes waits on that socket raise ClosedResourceError without closing anything. So
  each wait here is a loop that looks at why it was woken.
- No exception of a handler or a socket leaves a connection. Only cancellation and the like pass.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket as stdlib_socket
import sys
import time
import types
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import trio
from trio.lowlevel import notify_closing, wait_readable, wait_writable

from gateway.downstream.asgi import run_asgi
from gateway.downstream.http1 import (
    CONTINUE,
    LAST_CHUNK,
    ChunkedDecoder,
    Head,
    Refusal,
    chunk,
    error_body,
    parse_head,
    reply,
    stream_head,
)
from gateway.errors import GatewayError, Overloaded

if TYPE_CHECKING:
    from hypercorn.config import Config

__all__ = [
    "Application",
    "ClientGone",
    "ConnectionLimits",
    "Request",
    "Server",
    "ServerConnection",
    "bind",
    "run_asgi",
    "serve",
]

log = logging.getLogger("gateway_http")

BACKLOG: Final = 2048
READ_SIZE: Final = 16384
"""For heads and what follows them. 64 KiB would cost a microsecond more: each read makes an object of its size."""
BODY_READ_SIZE: Final = 262144
JOIN_LIMIT: Final = 262144
"""Replies up to this size are joined with their head and sent at once; larger ones would only be copied for it."""
PIPELINE_LIMIT: Final = 65536
"""Bytes of further requests that are kept while one is being answered; a client that sends more is cut."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 8 * 1024 * 1024
SWEEP_SECONDS: Final = 1.0
INF: Final = math.inf


def _socket_read(fd: int, size: int, /) -> bytes:
    sock = stdlib_socket.socket(fileno=fd)
    try:
        sock.setblocking(False)
        return sock.recv(size)
    finally:
        sock.detach()


def _socket_write(fd: int, data: bytes | memoryview, /) -> int:
    sock = stdlib_socket.socket(fileno=fd)
    try:
        sock.setblocking(False)
        return sock.send(data)
    finally:
        sock.detach()


# Cheaper than the socket methods, which also serve sockets with timeouts; SIGPIPE is ignored by Python. On Windows a
# socket is no file descriptor.
_read: Callable[[int, int], bytes] = os.read if os.name == "posix" else _socket_read
_write: Callable[[int, bytes | memoryview], int] = os.write if os.name == "posix" else _socket_write


class ClientGone(Exception):
    """The client closed or reset its connection, or was cut because it did not read for ``stall_seconds``.

    Raised by everything that writes. A handler need not catch it: its connection does, quietly.
    """


@attrs.frozen
class ConnectionLimits:
    """What one client may cost. Times are in seconds, sizes in bytes.

    header_seconds     from the first byte of a head to its last; then 408
    idle_seconds       between requests, and before the first
    body_seconds       for a whole body; then 408
    stall_seconds      for a client to take some of what is being sent; then it is cut
    max_connections    more are answered 503 and closed
    body_budget_bytes  all unfinished bodies together; over it, 503 with Retry-After
    """

    header_seconds: float = 10.0
    idle_seconds: float = 75.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    max_head_bytes: int = 16384
    max_fields: int = 100
    max_body_bytes: int = 4 * 1024 * 1024
    max_connections: int = 4096
    body_budget_bytes: int = 256 * 1024 * 1024


class Application(Protocol):
    """What is served."""

    @property
    def limits(self) -> ConnectionLimits:
        """Read for every connection and request, so a reload takes effect at once."""

    async def handle(self, request: Request) -> None:
        """Answer the request through ``request``. What it raises is logged once and answered 500."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI, of which hypercorn only uses the lifespan."""


class Request(Head):
    """One request and the way to answer it, to be used in the connection's task unless a method says otherwise.

    ``method`` is GET for HEAD too: the connection leaves the body out, and an event stream ends at once with
    ClientGone. ``extra_headers`` go with every reply to this request; the application fills it before it responds.
    """

    __slots__ = (
        "_chunked",
        "_close",
        "_connection",
        "_head_only",
        "_rest",
        "_streaming",
        "_unread",
        "extra_headers",
        "responded",
    )
    _chunked: bool
    _unread: bool

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._head_only = False
        self._streaming = False
        self._rest = b""  # of a reply that ``respond_now`` could only begin
        self._close = False  # decided when the reply begins: it says "Connection: close"
        self.extra_headers: list[tuple[str, str]] = []
        self.responded = False

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path}>"

    @property
    def client(self) -> str:
        """The peer's address without its port; "" when it is gone or has none (a unix socket)."""
        return self._connection.address(peer=True)[0]

    @property
    def client_address(self) -> tuple[str, int]:
        """The peer's address and port."""
        return self._connection.address(peer=True)

    @property
    def server_address(self) -> tuple[str, int]:
        """The address and port that the client reached."""
        return self._connection.address(peer=False)

    @property
    def server(self) -> Server:
        """Who accepted the connection; its ``shutting_down`` tells event streams to end."""
        return self._connection.server

    @property
    def head_only(self) -> bool:
        """This was HEAD."""
        return self._head_only

    async def body(self, limit: int | None = None) -> bytes:
        """Read the whole body, once. ``limit`` in bytes defaults to ``limits.max_body_bytes``.

        100 Continue is sent only now, and only if it is waited for. Raises ClientProtocolError (413 over the limit, 408
        too slow, 400 malformed or ended early), Overloaded (503, the budget of all bodies is used up), ClientGone.
        After an error or a cancellation the connection is closed behind the reply.
        """
        connection = self._connection
        if limit is None:
            limit = connection.server.application.limits.max_body_bytes
        if not self._unread:
            if self.chunked or self.content_length:
                raise RuntimeError("the body has already been read")
            return b""
        if not self.chunked:
            length = self.content_length
            if length > limit:
                raise Refusal(413, f"The body is over {limit} bytes")
            buffer = connection.buffer
            if len(buffer) >= length:
                self._unread = False
                if len(buffer) == length:
                    connection.buffer = b""
                    return buffer
                connection.buffer = buffer[length:]
                return buffer[:length]
        if self.expect_continue and not connection.buffer:
            await connection.send(CONTINUE)
        try:
            body = await connection.read_body(self, limit)
        except BaseException:
            self.keep_alive = False
            raise
        self._unread = False
        return body

    async def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
        rest: bytes = b"",
    ) -> None:
        """Send a whole reply, with one write when the socket takes it. Raises ClientGone.

        ``rest`` is the long end of a body that many replies share: it is never copied. Not a checkpoint unless the
        socket is full. Without a body there is no Content-Type. Raises ValueError, with nothing sent, for a header that
        is no single line of latin-1.
        """
        if self.responded:
            raise RuntimeError("this request has already been answered")
        connection = self._connection
        if self._unread or not self.keep_alive or connection.server.draining:
            self._settle()
        if self.extra_headers:
            headers = [*self.extra_headers, *headers]
        if len(body) + len(rest) > JOIN_LIMIT and not self._head_only:
            length = len(body) + len(rest)
            head = reply(status, body, content_type, headers, close=self._close, head_only=True, length=length)
            self.responded = True
            await connection.send(head + body if rest else head)
            await connection.send(rest or body)
            return
        body += rest
        data = reply(status, body, content_type, headers, close=self._close, head_only=self._head_only)
        self.responded = True
        # This is ``connection.send``, inline because it runs once per request.
        if connection.gone:
            raise ClientGone
        try:
            sent = _write(connection.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            connection.gone = True
            raise ClientGone from None
        if sent != len(data):
            await connection.send_rest(data, sent)

    def respond_now(self, status: int, body: bytes, content_type: str = "application/json") -> bool:
        """Send a whole reply from any task of this loop, if that needs no waiting and no decision; never raises.

        For the task that learns of an answer: the client has it one turn of the loop before the request's own task is
        woken, which then finds ``responded`` true. False: nothing was done, answer with ``respond``.
        """
        connection = self._connection
        if (
            self.responded
            or self._unread
            or self._head_only
            or not self.keep_alive
            or connection.server.draining
            or connection.gone
            or len(body) > JOIN_LIMIT
        ):
            return False
        try:
            data = reply(status, body, content_type, self.extra_headers, close=False, head_only=False)
            sent = _write(connection.fd, data)
        except (BlockingIOError, ValueError):
            return False
        except OSError:
            connection.gone = True
            return False
        self.responded = True
        if sent != len(data):
            self._rest = data[sent:]
        return True

    def _settle(self) -> None:
        """Decide whether the connection ends with the reply that is about to begin."""
        connection = self._connection
        if not self.keep_alive or connection.server.draining:
            self._close = True
        elif self._unread:
            # What has already come can be skipped; to wait for more, for nobody, would only hold the connection.
            self._close = self.chunked or len(connection.buffer) < self.content_length

    async def start_stream(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Begin a reply of unknown length: in chunks, or up to the connection's end for HTTP/1.0. Raises ClientGone.

        ``finish`` ends it; a handler that raises instead leaves it visibly cut.
        """
        if self.responded:
            raise RuntimeError("this request has already been answered")
        self._settle()
        self._chunked = self.version == "1.1"
        if self.extra_headers:
            headers = [*self.extra_headers, *headers]
        head = stream_head(status, headers, chunked=self._chunked, close=self._close)
        self.responded = True
        self._streaming = True
        await self._connection.send(head)

    async def write(self, data: bytes) -> None:
        """Send one chunk of the stream at once. Empty data is nothing. Raises ClientGone.

        Not a checkpoint unless the socket is full. A cancelled write may have sent a part; the connection is then
        closed. From several tasks only in turn.
        """
        if not self._streaming:
            if self._connection.gone:
                raise ClientGone
            raise RuntimeError("no stream was started, or it is finished")
        if self._head_only:
            raise ClientGone
        if data:
            await self._connection.send(chunk(data) if self._chunked else data)

    async def finish(self) -> None:
        """End the stream. Raises ClientGone."""
        if not self._streaming:
            if self._connection.gone:
                raise ClientGone
            raise RuntimeError("no stream was started, or it is finished")
        self._streaming = False
        if self._chunked and not self._head_only:
            await self._connection.send(LAST_CHUNK)

    async def wait_disconnected(self) -> None:
        """Return when the client has gone; cancel it when that no longer matters. May run beside writes.

        A closed sending side counts as gone: it can't be told from a closed connection before too late. Bytes of a
        following request are kept, up to PIPELINE_LIMIT. The body should have been read.
        """
        connection = self._connection
        while not connection.gone and not (self._head_only and self._streaming):
            await connection.watch()

    def look(self) -> bool:
        """Whether the client has gone by now. Never waits; from any task, and beside other methods.

        For somebody who looks after many requests at once, and now and then.
        """
        connection = self._connection
        if not connection.gone:
            poll = select.poll()
            poll.register(connection.fd, _HANGUP)
            connection.gone = bool(poll.poll(0))
        return connection.gone

    async def wait(self, until: float = INF) -> bool:
        """Wait for whichever comes first: ``wake``, the trio time ``until``, shutdown, or the client's end.

        Returns whether the client has gone. A checkpoint, always. The cheap way for an idle event stream to live: no
        nursery, no cancel scope, no timer. ``until`` is looked at by the sweeper, so it may be met up to two seconds
        early and returns may be spurious: look at your own state, write, wait again.

            while not request.server.shutting_down.is_set():
                for data in take():           # what was noted by whoever called request.wake()
                    await request.write(data)
                if await request.wait(until=last_write + 15):
                    break                     # the client has gone
                ...

        Not beside another method that waits on this request's socket. A ``wake`` that came before the call is
        remembered, so nothing between look and wait is lost.
        """
        connection = self._connection
        if connection.woken or connection.gone or self._head_only:
            connection.woken = False
            await trio.lowlevel.checkpoint()
            return connection.gone or self._head_only
        connection.deadline = until
        try:
            await connection.watch()
        finally:
            connection.deadline = INF
            connection.expired = connection.woken = False
        return connection.gone

    def wake(self) -> None:
        """Make ``wait`` return, now or the next time. From any task of this loop; never waits, never raises."""
        connection = self._connection
        if not connection.woken:
            connection.woken = True
            connection.nudge()


# Linux also tells of a closed sending side.
_HANGUP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class ServerConnection:
    """One accepted connection, from its first byte to its end. Awaited once, by ``trio.serve_listeners``.

    The arguments are those of the class that it replaces; ``app`` is the Server.
    """

    __slots__ = ("buffer", "deadline", "expired", "fd", "gone", "server", "stream", "woken")

    def __init__(self, app: Server, config: Config, context: object, state: object, stream: trio.SocketStream) -> None:
        self.server = app
        self.stream = stream
        self.fd = stream.socket.fileno()
        self.buffer = b""  # bytes received behind the head in hand: its body, then further requests
        self.deadline = INF  # trio time
        self.expired = False  # the deadline has passed; whoever waits under it takes this back
        self.gone = False  # nothing can be written any more
        self.woken = False

    def __repr__(self) -> str:
        return f"<ServerConnection fd={self.fd}{' gone' if self.gone else ''}>"

    def __await__(self) -> Generator[Any, Any, None]:
        return self.run().__await__()

    async def run(self) -> None:
        """Serve requests until either side ends the connection. Raises nothing but cancellation and the like."""
        server = self.server
        if not server.enter(self):
            await self._turn_away()
            return
        application = server.application
        fd = self.fd
        data = b""
        request: Request | None = None
        try:
            while True:
                if not data:
                    self.deadline = server.idle_deadline
                    try:
                        if not server.draining:
                            await wait_readable(fd)
                        data = _read(fd, READ_SIZE)
                    except (BlockingIOError, trio.ClosedResourceError):
                        # Before the end we look once more: what the client has already sent is still answered.
                        if (self.expired or server.draining) and not (data := self._take()):
                            return
                        continue
                    if not data:
                        return
                limits = application.limits
                request = Request(self)
                try:
                    size = parse_head(data, request, limits.max_head_bytes, limits.max_fields)
                    if not size:
                        data, size = await self._rest_of_head(data, request, limits)
                        if not size:
                            return
                except Refusal as refusal:
                    await self._refuse(refusal)
                    return
                self.deadline = INF
                self.expired = False
                self.buffer = data[size:]
                data = b""  # a handler may take hours
                request._unread = request.content_length > 0 or request.chunked
                if request.method == "HEAD":
                    request.method = "GET"
                    request._head_only = True
                try:
                    await application.handle(request)
                except BaseException as error:
                    if not await self._failed(request, error):
                        return
                unsettled = (
                    request._streaming or request._close or request._unread or request._rest or not request.responded
                )
                if unsettled and not await self._settled(request):
                    return
                request = None
                data = self.buffer
                if data:
                    self.buffer = b""
                    await trio.lowlevel.checkpoint()  # or a pipelining client would keep the loop to itself
        except (OSError, ClientGone):
            pass
        except Exception as error:
            log.error("Unexpected error in a connection", exc_info=error)
        finally:
            self.gone = True
            self.deadline = INF
            self.fd = -1  # its number may soon be another's
            server.connections.discard(self)
            self.stream.socket.close()

    # -- the end of a request

    async def _settled(self, request: Request) -> bool:
        """Complete what the handler left open. Returns whether the connection goes on."""
        if not request.responded:
            log.error("No answer was made to %s %s", request.method, request.path)
            await self._respond_error(request, 500, "Internal error")
        elif request._streaming:
            await request.finish()
        elif request._rest:
            await self.send(request._rest)
        if request._close:
            if request._unread:
                await self._linger()
            return False
        if request._unread:
            self.buffer = self.buffer[request.content_length :]
        return True

    async def _failed(self, request: Request, error: BaseException) -> bool:
        """Contain what a handler raised. Returns whether the connection goes on; re-raises cancellation and the like.

        Groups are taken apart: a nursery in the handler may mix its faults with our own cancellation.
        """
        leaves = list(_leaves(error))
        faults = [leaf for leaf in leaves if isinstance(leaf, Exception)]
        unexpected = [fault for fault in faults if not isinstance(fault, ClientGone | GatewayError)]
        if unexpected:
            # One line, one traceback; the reply shows nothing of it.
            log.error("Unexpected error while answering %s %s", request.method, request.path, exc_info=error)
        if len(faults) != len(leaves):
            if not request.responded:
                self._blurt(reply(503, error_body(503, "The gateway is shutting down"), "application/json", close=True))
            if isinstance(error, BaseExceptionGroup):
                raise error.split(lambda leaf: isinstance(leaf, Exception))[1] or error
            raise error
        if request.responded or self.gone:
            # A cut stream must look cut; but a complete reply, followed by a fault, is complete.
            return not (self.gone or request._streaming or request._close)
        known = [fault for fault in faults if isinstance(fault, GatewayError)]
        if unexpected:
            await self._respond_error(request, 500, "Internal error")
        elif known:
            await self._respond_error(request, known[0].status, known[0].message, _headers_of(known[0]))
        else:
            return False
        return True

    async def _respond_error(
        self, request: Request, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        body = error_body(status, message)
        try:
            await request.respond(status, body, headers=headers)
        except ValueError:  # the handler's extra headers can't be sent; that was the fault
            request.extra_headers.clear()
            await request.respond(status, body, headers=headers)

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer a head that is not understood, and close: what follows it is not understood either."""
        body = error_body(refusal.status, refusal.message)
        await self.send(reply(refusal.status, body, "application/json", refusal.headers, close=True))
        await self._linger()

    async def _turn_away(self) -> None:
        """There are too many connections: say so and close at once."""
        body = error_body(503, "Too many connections; try again later")
        try:
            self._blurt(reply(503, body, "application/json", (("Retry-After", "1"),), close=True))
            self._take()  # unread bytes would turn the close into a reset, which may overtake the reply
        finally:
            self.stream.socket.close()
        await trio.lowlevel.checkpoint()

    async def _linger(self) -> None:
        """Close our side and drop what still comes, a bounded time and amount, so that the reply is not lost.

        To close with unread input sends a reset, and that may take the reply from the client before it reads it
        (RFC 9112, 9.6).
        """
        self.stream.socket.shutdown(stdlib_socket.SHUT_WR)
        self.expired = False
        self.deadline = self.server.now + LINGER_SECONDS
        left = LINGER_BYTES
        while left > 0 and not self.expired:
            data = await self._receive(BODY_READ_SIZE)
            if not data:
                return
            left -= len(data)

    # -- reading

    def _take(self) -> bytes:
        """What has arrived, without waiting."""
        try:
            return _read(self.fd, READ_SIZE)
        except OSError:
            return b""

    async def _receive(self, size: int) -> bytes:
        """Wait for bytes; b"" at the end of input or when ``expired`` is set. Raises OSError."""
        while not self.expired:
            try:
                await wait_readable(self.fd)
                return _read(self.fd, size)
            except (BlockingIOError, trio.ClosedResourceError):
                continue
        return b""

    async def _rest_of_head(self, data: bytes, request: Request, limits: ConnectionLimits) -> tuple[bytes, int]:
        """Read until the head is complete; return all bytes and the head's length, 0 when the client left."""
        self.deadline = self.server.now + limits.header_seconds
        while True:
            more = await self._receive(READ_SIZE)
            if not more:
                if self.expired:
                    self.expired = False
                    raise Refusal(408, f"The request's head took over {limits.header_seconds:g} s")
                return b"", 0
            data += more
            # Only the end of a line can change what the parser said; so bytes that drip in cost little.
            if b"\n" in more or len(data) > limits.max_head_bytes:
                size = parse_head(data, request, limits.max_head_bytes, limits.max_fields)
                if size:
                    return data, size

    async def read_body(self, request: Request, limit: int) -> bytes:
        """The part of ``Request.body`` that waits."""
        server = self.server
        limits = server.application.limits
        decoder = ChunkedDecoder(limit) if request.chunked else None
        length = request.content_length
        body = bytearray()
        held = 0
        data, self.buffer = self.buffer, b""
        self.deadline = server.now + limits.body_seconds
        try:
            while True:
                if data:
                    body += decoder.feed(data) if decoder else data
                    more = len(body) - held
                    if server.body_bytes + more > limits.body_budget_bytes:
                        raise Overloaded("Too many unfinished request bodies; try again later", retry_after=1.0)
                    server.body_bytes += more
                    held += more
                if decoder:
                    if decoder.done:
                        self.buffer = decoder.rest
                        return bytes(body)
                elif len(body) == length:
                    return bytes(body)
                try:
                    data = await self._receive(BODY_READ_SIZE if decoder else min(length - len(body), BODY_READ_SIZE))
                except OSError:
                    self.gone = True
                    raise ClientGone from None
                if not data:
                    if self.expired:
                        raise Refusal(408, f"The request's body took over {limits.body_seconds:g} s")
                    raise Refusal(400, "The request's body ended early")
        finally:
            server.body_bytes -= held
            self.deadline = INF
            self.expired = False

    async def watch(self) -> None:
        """Wait once for something from the client, keeping it; sets ``gone`` at its end. May return for nothing."""
        try:
            await wait_readable(self.fd)
            data = _read(self.fd, READ_SIZE)
        except (BlockingIOError, trio.ClosedResourceError):
            return
        except OSError:
            data = b""
        if data and len(self.buffer) + len(data) <= PIPELINE_LIMIT:
            self.buffer += data
        else:
            self.gone = True

    # -- writing

    async def send(self, data: bytes) -> None:
        """Write all of ``data``. Raises ClientGone."""
        if self.gone:
            raise ClientGone
        try:
            sent = _write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.gone = True
            raise ClientGone from None
        if sent != len(data):
            await self.send_rest(data, sent)

    async def send_rest(self, data: bytes, sent: int) -> None:
        """Write from ``sent`` on as the client takes it. Raises ClientGone, also when it takes nothing for too long."""
        complete = False
        stall = self.server.application.limits.stall_seconds
        self.deadline = self.server.now + stall
        try:
            with memoryview(data) as view:
                while sent < len(data):
                    try:
                        await wait_writable(self.fd)
                        sent += _write(self.fd, view[sent:])
                        self.deadline = self.server.now + stall
                    except (BlockingIOError, trio.ClosedResourceError):
                        if self.gone or self.expired:
                            raise ClientGone from None
                    except OSError:
                        raise ClientGone from None
            complete = True
        finally:
            self.deadline = INF
            self.expired = False
            if not complete:  # cancelled ones too: nothing may follow half a message
                self.gone = True
                self.nudge()

    def _blurt(self, data: bytes) -> None:
        """Write once, without waiting, whatever comes of it."""
        if not self.gone:
            try:
                _write(self.fd, data)
            except OSError:
                self.gone = True

    # -- from outside the task

    def nudge(self) -> None:
        """Make whoever waits on the socket look again."""
        if self.fd >= 0:
            notify_closing(self.fd)

    def address(self, *, peer: bool) -> tuple[str, int]:
        """Asked of the kernel when needed, so that idle connections need not remember it."""
        try:
            name = self.stream.socket.getpeername() if peer else self.stream.socket.getsockname()
        except OSError:
            return "", 0
        return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("", 0)


def _leaves(error: BaseException) -> Generator[BaseException, None, None]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _headers_of(fault: GatewayError) -> tuple[tuple[str, str], ...]:
    headers = fault.headers if isinstance(fault, Refusal) else ()
    if fault.retry_after is not None:
        headers += (("Retry-After", str(math.ceil(fault.retry_after))),)
    return headers


class Server:
    """What all connections share; given to hypercorn as its application, of which it only calls the lifespan.

    ``shutting_down`` is set when shutdown begins: listeners close, idle connections end, ``Request.wait`` returns, and
    replies from then on say Connection: close.
    """

    def __init__(self, application: Application) -> None:
        self.application = application
        self.connections: set[ServerConnection] = set()
        self.shutting_down = trio.Event()
        self.draining = False  # shutting_down.is_set(), for the hot path
        self.addresses: list[Any] = []
        self.body_bytes = 0  # held by unfinished bodies
        self.now = 0.0  # trio time of the last sweep, or of the first connection after a quiet time
        self.idle_deadline = 0.0
        self._quiet: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<Server connections={len(self.connections)}{' draining' if self.draining else ''}>"

    async def __call__(self, scope: Any, receive: Any, send: Any, *_: Any) -> None:
        """hypercorn's way to call an application, for the lifespan."""
        await self.application(scope, receive, send)

    def enter(self, connection: ServerConnection) -> bool:
        """Take a new connection in; False when there are too many."""
        if len(self.connections) >= self.application.limits.max_connections:
            return False
        self.connections.add(connection)
        if self._quiet is not None:
            self._quiet.set()
            self._quiet = None
            self.tick()
        return True

    def begin_shutdown(self) -> None:
        """Let everything end that has nothing to answer. Idempotent."""
        if not self.draining:
            self.draining = True
            self.shutting_down.set()
            for connection in list(self.connections):
                connection.nudge()

    def interval(self) -> float:
        """Seconds between sweeps: one, or less where a limit is short (tests)."""
        limits = self.application.limits
        return min(
            SWEEP_SECONDS,
            limits.idle_seconds / 8,
            limits.header_seconds / 8,
            limits.body_seconds / 8,
            limits.stall_seconds / 8,
        )

    def tick(self) -> None:
        """One sweep: expire each connection whose deadline would pass before the next one."""
        self.now = trio.current_time()
        self.idle_deadline = self.now + self.application.limits.idle_seconds
        due = self.now + self.interval()
        for connection in list(self.connections):
            if connection.deadline <= due:
                connection.deadline = INF
                connection.expired = True
                connection.nudge()

    async def sweep(self) -> None:
        """Sweep while there are connections; sleep for good while there are none."""
        while True:
            if not self.connections:
                quiet = self._quiet = trio.Event()
                await quiet.wait()
            await trio.sleep(self.interval())
            self.tick()


class _OncePerSecond(logging.Filter):
    """Lets one record a second through, and without its traceback: trio retries accept ten times a second (RB41)."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1.0
        record.exc_info = None
        return True


def _raise_file_limit() -> None:
    """Let the process have as many descriptors as it may: each connection and each server takes some."""
    try:
        import resource
    except ImportError:  # pragma: no cover  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # pragma: no cover  # macOS refuses "unlimited"
        log.debug("The limit of open files could not be raised")


def _worker_serve() -> Callable[..., Awaitable[None]]:
    """hypercorn's server, with our connection in the place of its own.

    Its own protocols are kept from being imported at all: that saves 2 MB and 20 ms, and no setting can bring HTTP/2
    or websockets back.
    """
    names = (("hypercorn.trio.tcp_server", "TCPServer"), ("hypercorn.trio.udp_server", "UDPServer"))
    placed = []
    for module, name in names:
        if module not in sys.modules and "hypercorn.trio.run" not in sys.modules:
            stand_in = types.ModuleType(module)
            setattr(stand_in, name, None)
            sys.modules[module] = stand_in
            placed.append(module)
    try:
        import hypercorn.trio.run as run
    finally:
        for module in placed:  # whoever wants the real ones may have them
            del sys.modules[module]
    setattr(run, "TCPServer", ServerConnection)  # noqa: B010  # not exported, says mypy
    return run.worker_serve


def bind(host: str, port: int) -> list[stdlib_socket.socket]:
    """Bind and listen on every address of ``host`` (a name may have several). Raises OSError, with nothing left open.

    Blocks for the name's lookup. Port 0 lets the system choose one, the same for all. An address that this host does
    not have is left out as long as another one works: "localhost" where IPv6 is off.
    """
    found = stdlib_socket.getaddrinfo(host, port, type=stdlib_socket.SOCK_STREAM, flags=stdlib_socket.AI_PASSIVE)
    sockets: list[stdlib_socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            if sockets and not port:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
            except OSError as error:
                missing = error
                continue
            try:
                if os.name == "posix":
                    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
                if family == stdlib_socket.AF_INET6:
                    sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
            except OSError as error:
                sock.close()
                if not _absent(error):
                    raise
                missing = error
            else:
                sock.setblocking(False)
                sockets.append(sock)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        raise missing or OSError(f"{host} has no address")
    return sockets


def _absent(error: OSError) -> bool:
    import errno

    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def serve(
    application: Application,
    sockets: Sequence[stdlib_socket.socket],
    *,
    shutdown_trigger: Callable[[], Awaitable[object]],
    drain_seconds: float = 30.0,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on listening sockets (see ``bind``) until ``shutdown_trigger`` returns and requests in flight are answered.

    Starts with ``nursery.start``, which gives the Server once connections are accepted. After ``drain_seconds`` what is
    still in flight is cancelled. Closes the sockets. Cancellation ends everything at once.
    """
    from hypercorn.config import Config, Sockets

    worker_serve = _worker_serve()
    _raise_file_limit()
    accept_log = logging.getLogger("trio.serve_listeners")
    if not any(isinstance(known, _OncePerSecond) for known in accept_log.filters):
        accept_log.addFilter(_OncePerSecond())
    config = Config()
    config.accesslog = config.errorlog = None
    config.backlog = BACKLOG
    config.graceful_timeout = drain_seconds
    server = Server(application)
    server.addresses = [sock.getsockname() for sock in sockets]
    server.tick()

    async def trigger() -> None:
        await shutdown_trigger()
        server.begin_shutdown()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.sweep)
            await worker_serve(
                server,
                config,
                sockets=Sockets(secure_sockets=[], insecure_sockets=list(sockets), quic_sockets=[]),
                shutdown_trigger=trigger,
                task_status=_Started(task_status, server),
            )
            nursery.cancel_scope.cancel()
    finally:
        server.begin_shutdown()
        for sock in sockets:
            sock.close()


class _Started:
    """Hands our Server on where hypercorn gives the names of its sockets."""

    def __init__(self, task_status: trio.TaskStatus[Server], server: Server) -> None:
        self._task_status = task_status
        self._server = server

    def started(self, value: object = None) -> None:
        self._task_status.started(self._server)
