"""A scripted server behind an in-memory pipe, and a runtime that starts such servers: no process and no socket."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from gateway.errors import LinkLost, StartFailed
from gateway.runtimes.base import Runtime, Surroundings

FACTS = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {"listChanged": True}, "resources": {"subscribe": True}, "logging": {}},
    "serverInfo": {"name": "scripted", "version": "1"},
}


class MemoryPipe:
    """Implements ``runtimes.base.Pipe``. ``room`` is how many bytes fit before writing blocks."""

    def __init__(self, on_line: Callable[[MemoryPipe, bytes], None], room: float = float("inf")) -> None:
        self.on_line = on_line
        self.room = room
        self.writable = trio.Event()
        self.details: Mapping[str, Any] = {"pid": 0}
        self.written = b""
        self._ready = trio.Event()
        self._out: deque[bytes] = deque()
        self._exited = trio.Event()
        self._why = "still running"
        self._rest = b""
        self.closed = False
        self.explained = ""
        self.measuring: trio.Event | None = None

    def write_nowait(self, data: bytes | memoryview) -> int:
        if self.closed:
            raise LinkLost("closed")
        count = int(min(len(data), self.room))
        self.room -= count
        self._rest += bytes(data[:count])
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self.written += line + b"\n"
            self.on_line(self, line)
        return count

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.room <= 0:
            self.writable = trio.Event()
            await self.writable.wait()

    def give_room(self, count: float) -> None:
        self.room += count
        self.writable.set()

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._out:
            if self.closed:
                return b""
            self._ready = trio.Event()
            await self._ready.wait()
        return self._out.popleft()

    async def wait_exited(self) -> None:
        await self._exited.wait()

    async def measure(self) -> Mapping[str, Any]:
        if self.measuring is not None:
            await self.measuring.wait()
        return {"memory_bytes": 1}

    def remark(self) -> str:
        return self.explained

    def diagnosis(self) -> str:
        return self._why

    # what the scripted server does
    def say(self, *messages: object) -> None:
        self.say_bytes(b"".join(json.dumps(m).encode() + b"\n" for m in messages))

    def say_bytes(self, data: bytes) -> None:
        self._out.append(data)
        self._ready.set()

    def exit(self, code: int = 1) -> None:
        self.closed = True
        self._why = f"process exited with code {code}"
        self._ready.set()
        self._exited.set()


@attrs.define(eq=False, slots=False)
class Script:
    """What scripted servers do, and what was seen of them. ``answer`` gets each message but the handshake's.

    With ``modern`` they speak only 2026-07-28, else only the legacy era; the probe for it is counted, not ``seen``.
    """

    answer: Callable[[MemoryPipe, dict[str, Any]], None] | None = None
    facts: dict[str, Any] = attrs.field(factory=lambda: dict(FACTS))
    fail_starts: int = 0
    refusal: StartFailed | None = None
    silent: bool = False
    modern: bool = False
    probes: int = 0
    start_seconds: float = 0.0
    stop_seconds: float = 0.0
    steps: tuple[tuple[float, str, bool], ...] = ()
    """Before the start: seconds, what is said then, whether that extends the start timeout."""
    starts: int = 0
    running: int = 0
    pipes: list[MemoryPipe] = attrs.field(factory=list)
    seen: list[dict[str, Any]] = attrs.field(factory=list)

    def on_line(self, pipe: MemoryPipe, line: bytes) -> None:
        message = json.loads(line)
        method = message.get("method")
        if method == "server/discover":
            self.probes += 1
            if not self.silent:
                pipe.say({"jsonrpc": "2.0", "id": message["id"], **self.discovered()})
            return
        self.seen.append(message)
        if self.silent:
            return
        if method == "initialize" and self.modern:
            error = {"code": -32022, "message": "Unsupported", "data": {"supported": ["2026-07-28"], "requested": "x"}}
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "error": error})
        elif method == "initialize":
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": self.facts})
        elif self.answer is not None:
            self.answer(pipe, message)
        elif "id" in message and "method" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {"echo": message.get("params")}})

    def discovered(self) -> dict[str, Any]:
        """What ``server/discover`` is answered with."""
        if not self.modern:
            return {"error": {"code": -32601, "message": "Method not found"}}
        return {
            "result": {
                "resultType": "complete",
                "supportedVersions": ["2026-07-28"],
                "capabilities": self.facts["capabilities"],
                "_meta": {"io.modelcontextprotocol/serverInfo": self.facts["serverInfo"]},
                "ttlMs": 0,
                "cacheScope": "private",
            }
        }

    @property
    def pipe(self) -> MemoryPipe:
        return self.pipes[-1]

    def methods(self) -> list[str]:
        return [m["method"] for m in self.seen if "method" in m]


@attrs.frozen
class ScriptedSpec:
    script: Script = attrs.field(eq=False, factory=Script)
    note: str = ""


@asynccontextmanager
async def open_scripted(spec: ScriptedSpec, surroundings: Surroundings) -> AsyncIterator[MemoryPipe]:
    script = spec.script
    script.starts += 1
    for seconds, text, extend in script.steps:
        await trio.sleep(seconds)
        surroundings.progress(text, extend=extend)
    if script.start_seconds:
        await trio.sleep(script.start_seconds)
    if script.fail_starts:
        script.fail_starts -= 1
        raise StartFailed("process exited with code 1")
    if script.refusal is not None:
        raise script.refusal
    pipe = MemoryPipe(script.on_line)
    script.pipes.append(pipe)
    script.running += 1
    try:
        yield pipe
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(script.stop_seconds)
        pipe.exit(0)
        script.running -= 1


SCRIPTED = Runtime("scripted", ScriptedSpec, open_scripted)
