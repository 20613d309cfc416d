"""A scripted router, and MCP clients over real sockets, for the tests of the legacy fronts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import attrs
import trio

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.config.snapshot import Snapshot
from gateway.downstream.http_sse import MESSAGES, SseFront
from gateway.downstream.legacy import LegacyFront
from gateway.downstream.server import ConnectionLimits, Request, Server, ServerConnection
from gateway.downstream.sessions import Session
from gateway.errors import GatewayError, UnknownTarget
from gateway.exchange import Ask, Call, Client, Exchange, Interim, Reply, Target
from gateway.hub import ALL, Hub, Subscription
from gateway.protocol.message import Malformed, build_notification, decode_reply, decode_request, dumps, split_batch
from gateway.protocol.sse import Decoder

ACCEPT = "application/json, text/event-stream"
PATH = "/servers/echo/mcp"
FACTS = {"capabilities": {"tools": {}}, "serverInfo": {"name": "scripted", "version": "1"}, "instructions": "be kind"}


class FakeLink:
    """Takes every call and leaves it to the test."""

    def __init__(self) -> None:
        self.cancelled: list[tuple[Any, str]] = []
        self.last = 0

    def call(self, exchange: Exchange) -> Call:
        self.last += 1
        return Call(exchange, self, self.last, trio.current_time())  # type: ignore[arg-type]

    def cancel(self, call: Call, reason: str = "") -> None:
        self.cancelled.append((call.exchange.message.id, reason))


class FakeRouter:
    """Honours the router's contract; what a request meets is scripted.

    ``script`` maps a method to what becomes of it: a Reply, a GatewayError to raise, a Call from ``link``, or None when
    it has to wait until ``gate`` opens. Methods it lacks become Calls, in ``calls``.
    """

    def __init__(self, **settings: Any) -> None:
        self.hub = Hub()
        self.link = FakeLink()
        self.calls: list[Call] = []
        self.script: dict[str, Callable[[Exchange], Reply | GatewayError | None]] = {}
        self.notified: list[tuple[str, Any, Client]] = []
        self.closed: list[Client] = []
        self.clients: list[Client] = []
        self.gate = trio.Event()
        self.initialize_gate = trio.Event()
        self.initialize_gate.set()
        self.initialize_error: GatewayError | None = None
        self.snapshot = Snapshot(
            Settings(**settings),
            Catalog((ServerSpec("echo", None, "local-process"), ServerSpec("other", None, "local-process"))),
        )
        self.arrived = trio.lowlevel.ParkingLot()

    def check_server(self, principal: Principal, server_id: str, snapshot: Snapshot | None = None) -> ServerSpec:
        spec = self.snapshot.server(server_id)
        if spec is None:
            raise UnknownTarget(f"Server '{server_id}' not found")
        return spec

    def check(self, principal: Principal, target: Target) -> ServerSpec | None:
        return self.check_server(principal, target) if isinstance(target, str) else None

    def timeout_of(self, server_id: str | None, snapshot: Snapshot) -> float:
        return snapshot.settings.request_timeout_seconds

    async def initialize(
        self, client: Client, principal: Principal, server_id: str | None, deadline: float
    ) -> Mapping[str, Any]:
        self.clients.append(client)
        await self.initialize_gate.wait()
        if server_id is not None:
            self.check_server(principal, server_id)
        if self.initialize_error is not None:
            raise self.initialize_error
        return FACTS

    def dispatch_now(self, exchange: Exchange) -> Reply | Call | None:
        step = self.script.get(exchange.message.method)
        if step is not None:
            done = step(exchange)
            if isinstance(done, GatewayError):
                raise done
            return done
        return self._begin(exchange)

    async def dispatch(self, exchange: Exchange) -> Reply | Call:
        self.arrived.unpark_all()
        with trio.move_on_at(exchange.deadline):
            await self.gate.wait()
        return self._begin(exchange)

    def _begin(self, exchange: Exchange) -> Call:
        call = self.link.call(exchange)
        self.calls.append(call)
        self.arrived.unpark_all()
        return call

    async def call(self, index: int = 0) -> Call:
        """The call of that number, once it has come."""
        with trio.fail_after(5):
            while len(self.calls) <= index:
                await self.arrived.park()
        return self.calls[index]

    def notify(self, exchange: Exchange) -> None:
        self.notified.append((exchange.message.method, exchange.message.params, exchange.client))
        self.arrived.unpark_all()

    def subscribe(
        self, server_id: str | None, wake: Callable[[], None], principal: object = None, client: object = None
    ) -> Subscription:
        return self.hub.subscribe(ALL if server_id is None else server_id, wake)

    def close(self, client: Client) -> None:
        self.closed.append(client)


def progress(value: int, token: Any = "t") -> Interim:
    return Interim(build_notification("notifications/progress", dumps({"progressToken": token, "progress": value})))


class Question:
    """A server's question and what became of it."""

    def __init__(self, method: str = "roots/list", id: Any = "s-1", params: str = "{}") -> None:
        text = f'{{"jsonrpc":"2.0","id":{dumps(id)},"method":{dumps(method)},"params":{params}}}'
        self.answers: list[Any] = []
        self.answered = trio.Event()
        self.ask = Ask(decode_reply(text), self._take)

    def _take(self, text: str) -> None:
        self.answers.append(json.loads(text))
        self.answered.set()


# ------------------------------------------------------------------------------------------------- the served fronts
class App:
    """The endpoint in little: routes by path, takes the principal from X-Who, decodes the body."""

    def __init__(self, router: FakeRouter, limits: ConnectionLimits) -> None:
        self.router = router
        self.limits = limits
        self.front = LegacyFront(router)  # type: ignore[arg-type]
        self.sse = SseFront(self.front)
        self.caught: list[Exception] = []

    async def handle(self, request: Request) -> None:
        who = request.headers.get("x-who")
        principal = ANONYMOUS if who is None else Principal(who)
        parts = request.path.strip("/").split("/")
        server_id = None
        if parts[0] == "servers":
            server_id, parts = parts[1], parts[2:]
        try:
            if parts == ["mcp"]:
                await self._mcp(request, principal, server_id)
            elif parts == ["sse"]:
                await self.sse.open(request, principal, server_id)
            elif "/" + parts[-1] == MESSAGES:
                session_id = parse_qs(request.query).get("session_id", [None])[0]
                await self.sse.post(request, principal, server_id, session_id, await self._message(request))
            else:
                await request.respond(404)
        except Exception as error:
            self.caught.append(error)
            raise

    async def _message(self, request: Request) -> Any:
        body = await request.body()
        try:
            return split_batch(body) or decode_request(body)
        except Malformed as error:
            raise AssertionError(f"the endpoint refuses this before the front sees it: {error}") from error

    async def _mcp(self, request: Request, principal: Principal, server_id: str | None) -> None:
        if request.method == "POST":
            await self.front.post(request, principal, server_id, await self._message(request))
        elif request.method == "GET":
            await self.front.get(request, principal, server_id)
        else:
            await self.front.delete(request, principal, server_id)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError


class House:
    """The fronts, served on loopback."""

    def __init__(self, app: App, server: Server, port: int) -> None:
        self.app = app
        self.router = app.router
        self.front = app.front
        self.server = server
        self.port = port

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Peer]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            yield Peer(stream)

    @property
    def session(self) -> Session:
        """The one session there is."""
        (session,) = self.front.sessions.values()
        return session

    async def post(self, message: Any, session: str | None = None, path: str = PATH, **headers: str) -> Response:
        """One POST on a connection of its own, and the whole response."""
        async with self.connect() as peer:
            response = await peer.post(message, session, path, **headers)
            await response.read()
            return response

    async def open(self, version: str = "2025-06-18", path: str = PATH, *, ready: bool = True, **headers: str) -> str:
        """Initialize; the session's id."""
        info = {"name": "c", "version": "1"}
        params = {"protocolVersion": version, "capabilities": {"roots": {}}, "clientInfo": info}
        response = await self.post(rpc("initialize", params, 0), path=path, **headers)
        assert response.status == 200, response.body
        session = response.headers["mcp-session-id"]
        if ready:
            done = await self.post(note("notifications/initialized"), session, path, **headers)
            assert (done.status, done.body) == (202, b"")
        return session


@asynccontextmanager
async def served(limits: ConnectionLimits | None = None, **settings: Any) -> AsyncIterator[House]:
    """The fronts over a scripted router, behind our own connections on a loopback port."""
    app = App(FakeRouter(**settings), limits or ConnectionLimits())
    server = Server(app)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def handler(stream: trio.SocketStream) -> None:
        await ServerConnection(server, None, None, None, stream)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.sweep)
        await nursery.start(app.front.run)
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield House(app, server, listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def rpc(method: str, params: Any = None, id: Any = 1) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": id, "method": method}
    return body if params is None else {**body, "params": params}


def note(method: str, params: Any = None) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "method": method}
    return body if params is None else {**body, "params": params}


def tool(id: Any = 1, name: str = "echo") -> dict[str, Any]:
    return rpc("tools/call", {"name": name, "arguments": {}}, id)


@attrs.define
class Got:
    """One event as a client sees it."""

    event: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Peer:
    """A client's connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def more(self) -> bytes:
        with trio.fail_after(20):
            return await self.stream.receive_some(65536)

    async def post(self, message: Any, session: str | None = None, path: str = PATH, **headers: str) -> Response:
        return await self.send("POST", path, session, json.dumps(message).encode(), **headers)

    async def get(self, session: str | None, path: str = PATH, **headers: str) -> Response:
        return await self.send("GET", path, session, b"", **{"accept": "text/event-stream", **headers})

    async def send(self, method: str, path: str, session: str | None, body: bytes = b"", **headers: str) -> Response:
        """Send a request and read the response's head. Header names with _ for -, None leaves one out."""
        lines = {"host": "127.0.0.1", "accept": ACCEPT, "content-length": str(len(body))}
        if session is not None:
            lines["mcp-session-id"] = session
        lines.update({name.replace("_", "-"): value for name, value in headers.items()})
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
        await self.stream.send_all(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        while b"\r\n\r\n" not in self.buffer:
            data = await self.more()
            assert data, "the connection ended before a response"
            self.buffer += data
        top, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *rest = top.decode().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        return Response(self, int(first.split()[1]), fields)


class Response:
    """A response: ``read`` for all of it, ``event`` for the next event of a stream."""

    def __init__(self, peer: Peer, status: int, headers: dict[str, str]) -> None:
        self.peer = peer
        self.status = status
        self.headers = headers
        self.body = b""
        self.raw = b""
        self.ended = False
        self._events: list[Got] = []
        self._decoder = Decoder(1 << 24)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type") == "text/event-stream"

    async def read(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            while not self.ended:
                self.body += await self.chunk()
        else:
            length = int(self.headers.get("content-length", "0"))
            while len(self.peer.buffer) < length:
                data = await self.peer.more()
                assert data, "the response was cut"
                self.peer.buffer += data
            self.body, self.peer.buffer = self.peer.buffer[:length], self.peer.buffer[length:]
        return self.body

    async def chunk(self) -> bytes:
        peer = self.peer
        while True:
            size_text, mark, rest = peer.buffer.partition(b"\r\n")
            if mark:
                size = int(size_text, 16)
                if len(rest) >= size + 2:
                    data, peer.buffer = rest[:size], rest[size + 2 :]
                    self.ended = size == 0
                    self.raw += data
                    return data
            data = await peer.more()
            assert data, "the stream was cut"
            peer.buffer += data

    async def event(self) -> Got | None:
        """The next event, None at the stream's end."""
        while not self._events:
            if self.ended:
                return None
            for item in self._decoder.feed(await self.chunk()):
                self._events.append(Got(item.event, item.data.decode(), item.id))  # type: ignore[union-attr]
        return self._events.pop(0)

    async def events(self) -> list[Got]:
        """All events to the end."""
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        return found


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is so, a bounded time."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.002)
