"""A client of the stdio front in this process: real pipes, and scripted servers or another gateway behind it."""

from __future__ import annotations

import json
import os
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from scripted import SCRIPTED, MemoryPipe, Script, ScriptedSpec
from trio.testing import wait_all_tasks_blocked

from gateway import app
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.config.snapshot import Snapshot
from gateway.downstream.lines import Lines
from gateway.downstream.stdio import StdioFront
from gateway.hub import Hub
from gateway.router import Router
from gateway.runtimes.base import Surroundings
from gateway.supervisor import Directions, Supervisor

LIMIT = 4 * 1024 * 1024


def request(method: str, params: Any = None, id: Any = 1) -> dict[str, Any]:
    found = {"jsonrpc": "2.0", "id": id, "method": method}
    return found if params is None else {**found, "params": params}


def hello(**capabilities: Any) -> dict[str, Any]:
    info = {"name": "me", "version": "1"}
    return {"protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": info}


class Client:
    """The far ends of a front's two pipes. ``status`` is what its run returned."""

    def __init__(self, front: StdioFront, to: int, out: int) -> None:
        self.front = front
        self.input = trio.lowlevel.FdStream(to)
        self.output = trio.lowlevel.FdStream(out)
        self.status: int | None = None
        self._rest = b""

    async def send(self, *messages: Any) -> None:
        """Write messages in one write, each a line."""
        await self.input.send_all(b"".join(json.dumps(m).encode() + b"\n" for m in messages))

    async def read(self) -> dict[str, Any]:
        """The next line; AssertionError when there is none within 5 s."""
        with trio.fail_after(5):
            while b"\n" not in self._rest:
                data = await self.output.receive_some(65536)
                assert data, "the output has ended"
                self._rest += data
        found, self._rest = self._rest.split(b"\n", 1)
        return dict(json.loads(found))

    async def silent(self) -> None:
        """Assert that nothing comes of what was sent."""
        await wait_all_tasks_blocked(0.02)
        assert not self._rest
        assert not select.select([self.output.fileno()], [], [], 0)[0]

    async def ask(self, method: str, params: Any = None, id: Any = 1) -> dict[str, Any]:
        await self.send(request(method, params, id))
        return await self.read()

    async def hello(self, **capabilities: Any) -> dict[str, Any]:
        """The handshake: the result of initialize."""
        reply = await self.ask("initialize", hello(**capabilities), "hello")
        await self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return dict(reply["result"])

    async def end(self) -> int | None:
        """Close the input and wait for the end: the exit status."""
        await self.input.aclose()
        return await self.ended()

    async def ended(self) -> int | None:
        with trio.fail_after(5):
            while self.status is None:
                await trio.sleep(0.005)
        return self.status


@asynccontextmanager
async def fronted(
    make: Callable[[Lines], StdioFront], run: Callable[[Callable[[], Any]], Any]
) -> AsyncIterator[Client]:
    """A front on pipes; ``run`` carries it out with whatever it stands on."""
    ours_in, theirs_in = os.pipe()
    theirs_out, ours_out = os.pipe()
    front = make(Lines(ours_in, ours_out))
    client = Client(front, theirs_in, theirs_out)

    async def serve_it() -> None:
        client.status = await front.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, serve_it)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()
    for end in (client.input, client.output):
        await end.aclose()
    for fd in (ours_in, ours_out):
        os.close(fd)


@asynccontextmanager
async def opened(
    script: Script, *, settings: Settings | None = None, at: str | None = "a", **spec: Any
) -> AsyncIterator[Client]:
    """A front with one scripted server "a" that is isolated to it, as direct mode has it. ``at`` None: merged view."""
    entry = ServerSpec("a", ScriptedSpec(script), "scripted", isolation="session", **spec)
    snapshot = Snapshot(settings or Settings(), Catalog((entry,)))
    hub = Hub()
    runtimes = {"scripted": SCRIPTED}
    directions = Directions(runtimes, lambda s: Surroundings(s.id, {}), lambda: snapshot.settings, {"name": "g"})
    supervisor = Supervisor(directions, hub)
    router = Router(supervisor, hub, lambda: snapshot, {"name": "g", "version": "0"})

    async def run(front: Callable[[], Any]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            await front()
            nursery.cancel_scope.cancel()

    def make(lines: Lines) -> StdioFront:
        return StdioFront(router, at, lines, max_message_bytes=LIMIT)

    async with fronted(make, run) as client:
        yield client


def answering(act: Callable[[MemoryPipe, dict[str, Any]], None]) -> Script:
    """A server that answers everything but tools/call, which ``act`` does."""

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            act(pipe, message)
        elif "id" in message and "method" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})

    return Script(answer)


def progress_and_reply(pipe: MemoryPipe, message: dict[str, Any]) -> None:
    """Both in one breath, for ``answering``."""
    params = {"progressToken": message["params"]["_meta"]["progressToken"], "progress": 1}
    pipe.say(
        {"jsonrpc": "2.0", "method": "notifications/progress", "params": params},
        {"jsonrpc": "2.0", "id": message["id"], "result": {}},
    )


@asynccontextmanager
async def through(url: str, server_id: str | None = "a") -> AsyncIterator[Client]:
    """``gateway-stdio --gateway URL --server ID`` but for its process."""
    house = app.Gateway(app.Sources(), app._through(url, server_id))

    def make(lines: Lines) -> StdioFront:
        return StdioFront(house.router, server_id or "gateway", lines, max_message_bytes=LIMIT, remote=True)

    async with fronted(make, house.run) as client:
        yield client
