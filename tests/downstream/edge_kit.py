"""The request edge in front of a real router and scripted servers, on a loopback port, and clients for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.config.snapshot import Snapshot
from gateway.downstream.asgi import ASGIApplication
from gateway.downstream.endpoint import Endpoint
from gateway.downstream.server import Server, ServerConnection
from gateway.hub import Hub
from gateway.router import Router
from gateway.runtimes.base import Surroundings
from gateway.supervisor import Directions, Supervisor
from tests.downstream.legacy_kit import Peer, Response
from tests.scripted import SCRIPTED, Script, ScriptedSpec

INFO = {"name": "g", "version": "0"}


async def plain_admin(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Stands for the management application: says who calls and what."""
    principal = scope["state"]["principal"]
    body = json.dumps({"path": scope["path"], "method": scope["method"], "who": principal.subject}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class House:
    """Router, supervisor and endpoint. ``specs`` are entries for the catalog; their runtimes are Scripts."""

    def __init__(self, specs: list[ServerSpec], settings: Settings) -> None:
        self.snapshot = Snapshot(settings, Catalog(tuple(specs)))
        hub = Hub()
        directions = Directions(
            {"scripted": SCRIPTED},
            lambda spec: Surroundings(spec.id, {}),
            lambda: self.snapshot.settings,
            INFO,
        )
        self.supervisor = Supervisor(directions, hub)
        self.router = Router(self.supervisor, hub, lambda: self.snapshot, INFO)
        self.load_admin: Callable[[], Any] = self._load_plain
        self.endpoint = Endpoint(self.router, lambda: self.load_admin())
        self.port = 0
        self.connections: list[trio.CancelScope] = []

    async def _load_plain(self) -> ASGIApplication:
        return plain_admin

    def configure(self, **settings: Any) -> None:
        """What a reload of the config does."""
        self.snapshot = Snapshot(Settings(**settings), self.snapshot.catalog, self.snapshot.generation + 1)
        self.endpoint.configure(self.snapshot.settings)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Peer]:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            yield Peer(stream)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str | None) -> Response:
        """One request on a connection of its own, and the whole reply. Header names with _ for -; None: not sent."""
        async with self.connect() as peer:
            data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            sent: dict[str, Any] = {"content_type": "application/json", **headers}
            response = await peer.send(method, path, None, data, **sent)
            if not response.is_stream and method != "HEAD":
                await response.read()
            return response

    async def mcp(self, body: Any, **headers: str | None) -> Response:
        """POST /mcp."""
        return await self.ask("POST", "/mcp", body, **headers)

    async def raw(self, data: bytes) -> bytes:
        """Bytes as they are, and everything that comes until the connection ends."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await stream.send_all(data)
            received = b""
            with trio.fail_after(10):
                async for part in stream:
                    received += part
            return received


def entry(id: str, script: Script, **more: Any) -> ServerSpec:
    """A catalog entry that runs a Script."""
    return ServerSpec(id, ScriptedSpec(script, id), "scripted", **more)


@asynccontextmanager
async def edge(*specs: ServerSpec, **settings: Any) -> AsyncIterator[House]:
    """Serve."""
    house = House(list(specs) or [entry("echo", Script())], Settings(**settings))
    server = Server(house.endpoint)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    house.port = listener.socket.getsockname()[1]

    async def handler(stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            house.connections.append(scope)
            await ServerConnection(server, None, None, None, stream)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.sweep)
        await nursery.start(house.supervisor.run)
        await nursery.start(house.endpoint.legacy.run)
        await nursery.start(house.endpoint.modern.run)
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield house
        nursery.cancel_scope.cancel()
