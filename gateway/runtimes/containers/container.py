"""One container: its attached streams as a Pipe, and its end with the true cause.

It has ended when the engine says so; ``_Ending`` finds out why. ``life`` makes, starts and removes it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from typing import Any, Final

import trio

from gateway.errors import LinkLost, StartFailed
from gateway.runtimes._quantities import shown_bytes
from gateway.runtimes.base import Surroundings
from gateway.runtimes.containers.engine import Engine, EngineGone, EngineRefused, Hijacked
from gateway.runtimes.containers.plan import Plan
from gateway.runtimes.local_process import StderrLines

__all__ = ["Container", "Frames", "usage"]

log = logging.getLogger("gateway_core")

CLOSE_WAIT: Final = 0.8
"""Seconds between the end of stdin and the stop signal."""
SETTLE: Final = 2.0
"""Seconds after the end of the streams for the engine to say why."""
REST_WAIT: Final = 1.0
"""Seconds after the end of the container for the rest of its output."""
UNEXPLAINED: Final = 0.4
"""Seconds after the end by a signal for the engine to say that it removes the container or itself ends."""
LOOK_LIMIT: Final = 2.0
LIMITS: Final = {"Memory": "memory", "NanoCpus": "CPU", "PidsLimit": "processes"}
READ_SIZE: Final = 64 * 1024
BIG_SIZE: Final = 256 * 1024


# -------------------------------------------------------------------------------------------------- the stream's frames
class Frames:
    """Takes a container's multiplexed stream apart: eight bytes (stream, three zeros, length), then the payload.

    Incremental; holds no payload, so a frame's length costs nothing. No I/O.
    """

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._errors = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """The next bytes of the stream as (stdout, stderr). Raises ValueError for what is no such stream."""
        if self._left >= len(data):  # inside a frame
            self._left -= len(data)
            return (b"", data) if self._errors else (data, b"")
        view = memoryview(data)
        out: list[memoryview] = []
        err: list[memoryview] = []
        at, end = 0, len(data)
        while at < end:
            if not self._left:
                head = self._head + bytes(view[at : at + 8 - len(self._head)])
                at += len(head) - len(self._head)
                if len(head) < 8:
                    self._head = head
                    break
                self._head = b""
                if head[0] > 3 or head[1:4] != b"\0\0\0":
                    raise ValueError(f"{head!r} is no header of a container's stream")
                self._errors = head[0] >= 2  # 3 is the engine's own complaint
                self._left = int.from_bytes(head[4:], "big")
            size = min(self._left, end - at)
            if size:
                (err if self._errors else out).append(view[at : at + size])
                self._left -= size
                at += size
        return b"".join(out), b"".join(err)


# --------------------------------------------------------------------------------------------------------------- usage
def usage(stats: Any) -> dict[str, Any]:
    """What ``/containers/ID/stats`` says, for people: memory without the page cache, CPU and processes.

    cgroup v1 and v2 keep the page cache under different names. {} for what is not there.
    """
    found: dict[str, Any] = {}
    if not isinstance(stats, dict):
        return found
    memory, cpu, pids = (stats.get(key) or {} for key in ("memory_stats", "cpu_stats", "pids_stats"))
    used = memory.get("usage")
    if isinstance(used, int) and used > 0:
        parts = memory.get("stats") or {}
        cache = parts.get("total_inactive_file", parts.get("inactive_file", 0))
        found["memory_bytes"] = used - cache if isinstance(cache, int) and 0 <= cache < used else used
        if isinstance(memory.get("limit"), int):
            found["memory_limit_bytes"] = memory["limit"]
    total = (cpu.get("cpu_usage") or {}).get("total_usage")
    if isinstance(total, int) and total > 0:
        found["cpu_seconds"] = round(total / 1e9, 2)
    if isinstance(pids.get("current"), int):
        found["pids"] = pids["current"]
    return found


# --------------------------------------------------------------------------------------------------------- why it ended
class _Ending:
    """What is known of a container's end, from its state and the engine's events. ``reason`` makes the sentence."""

    def __init__(self, engine: Engine, memory: int) -> None:
        self._engine = engine
        self._memory = memory
        self.paused: bool | None = None  # not known yet
        self.out_of_memory = False
        self.killed = ""
        self.died = trio.Event()
        self.removed = trio.Event()
        self.events_over = trio.Event()

    def event(self, event: Any) -> None:
        """Take one of the engine's events about this container. Docker's and Podman's names differ."""
        if not isinstance(event, dict):
            return
        action = str(event.get("Action") or event.get("status") or "").partition(":")[0]
        if action == "oom":
            self.out_of_memory = True
        elif action in ("destroy", "remove"):
            self.removed.set()
        elif action in ("die", "died"):
            self.died.set()
        elif action in ("pause", "unpause"):
            self.paused = action == "pause"
        elif action == "kill":
            actor = event.get("Actor")
            attributes = actor.get("Attributes") if isinstance(actor, dict) else None
            self.killed = str((attributes or {}).get("signal", "")) if isinstance(attributes, dict) else ""

    def reason(self, code: int, state: Mapping[str, Any]) -> str:
        """Why it ended, given its exit code and the engine's word about its state ({} if it is gone)."""
        if self.out_of_memory or state.get("OOMKilled"):
            return f"container ran out of memory (limit {shown_bytes(self._memory)})"
        if self.removed.is_set() or not state or state.get("Status") == "removing":
            return "container was removed"
        name = ""
        if code > 128:
            with suppress(ValueError):
                name = f" ({signal.Signals(code - 128).name})"
        text = f"container exited with code {code}{name}"
        if code == 137 and not self.killed and self._engine.podman:  # which does not tell
            text += f", perhaps out of memory (limit {shown_bytes(self._memory)})"
        said = state.get("Error")
        return f"{text}: {said}" if said else text


# ------------------------------------------------------------------------------------------------------- the container
class Container:
    """A created container as a ``base.Pipe``. Made by ``open_container``, which alone stops it.

    One task at a time may be in ``receive_some`` and one in ``wait_writable``. The attached streams are a raw
    non-blocking descriptor: a read is one wait and one system call, a write one system call.
    """

    def __init__(self, engine: Engine, id: str, plan: Plan, surroundings: Surroundings) -> None:
        self.id = id
        self.port = plan.port
        self._plan = plan
        self._engine = engine
        self._path = f"/containers/{id}"
        self._details: dict[str, Any] = {
            "container": plan.redact(plan.name),
            "container_id": id,
            "image": plan.redact(plan.image),
            "engine": plan.redact(engine.where),
        }
        self._server = surroundings.server_id
        self._ending = _Ending(engine, plan.memory)
        self._stop_signal = "SIGTERM"
        self._lines = StderrLines(surroundings.log, plan.redact)
        self._talk = StderrLines(surroundings.log, plan.redact)  # what an HTTP server prints
        self._frames = Frames()
        self._fd = -1
        self._early = b""
        self._size = READ_SIZE
        self.started = False
        self._stopping = False
        self._end: str | None = None
        self._ended = trio.Event()
        self._output_over = trio.Event()

    def __repr__(self) -> str:
        return f"<Container {self.id[:12]} {self._end or 'running'}>"

    # ------------------------------------------------------------------------------------------------------- as a Pipe
    @property
    def details(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: the container's name and id, its image and that one's digest, and the engine."""
        return dict(self._details)

    async def measure(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: memory, CPU and processes, as the engine counts them."""
        if self._ended.is_set():
            return {}
        try:
            query = {"stream": "false", "one-shot": "true"}
            return usage(await self._engine.ask("GET", f"{self._path}/stats", query=query, limit=5))
        except StartFailed:
            return {}

    def remark(self) -> str:
        """See ``base.Pipe``."""
        return "container is paused" if self._ending.paused else ""

    def write_nowait(self, data: bytes | memoryview) -> int:
        """See ``base.Pipe``."""
        if self._ended.is_set() or self._fd < 0:
            raise LinkLost(self.diagnosis())
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkLost(self.diagnosis()) from error

    async def wait_writable(self) -> None:
        """See ``base.Pipe``."""
        if not self._ended.is_set() and self._fd >= 0:
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(self._fd)
        await trio.lowlevel.checkpoint()
        if self._ended.is_set() or self._fd < 0:
            raise LinkLost(self.diagnosis())

    async def receive_some(self) -> bytes:
        """See ``base.Pipe``. Always lets other tasks run; reads more at a time while the server sends much."""
        while not self._output_over.is_set() and self._fd >= 0:
            try:
                if self._early:
                    await trio.lowlevel.checkpoint()
                    data, self._early = self._early, b""
                else:
                    await trio.lowlevel.wait_readable(self._fd)
                    data = os.read(self._fd, self._size)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                if self._fd >= 0:
                    continue  # woken by the end: the socket may still hold something
                data = b""
            except OSError:
                data = b""
            if not data:
                self._output_over.set()
                break
            self._size = BIG_SIZE if len(data) >= self._size else READ_SIZE
            try:
                out, err = self._frames.feed(data)
            except ValueError as error:
                log.warning("%s: %s", self._engine.name, error)
                self._output_over.set()
                break
            if err:
                self._lines.feed(err, time.monotonic())
            if out:
                return out
        with trio.move_on_after(SETTLE):
            await self._ended.wait()
        await trio.lowlevel.checkpoint()
        return b""

    async def wait_exited(self) -> None:
        """See ``base.Pipe``."""
        await self._ended.wait()

    def diagnosis(self) -> str:
        """See ``base.Pipe``."""
        end = self._end or self.remark() or "container is running"
        last = self._lines.last() or (self._talk.last() if self.port is not None else "")
        return f"{end}: {last}" if last else end

    async def ended(self) -> str:
        """See ``base.Origin``."""
        await self._ended.wait()
        return self.diagnosis()

    # -------------------------------------------------------------------------------------------------------- starting
    def take(self, streams: Hijacked) -> None:
        """Take over the attached streams."""
        self._fd, self._early = streams.fd, streams.early

    async def start(self) -> None:
        """Start it. Raises StartFailed with the engine's reason."""
        try:
            await self._engine.ask("POST", f"{self._path}/start", limit=60)
        except EngineRefused as refused:
            hint = ""
            if "exec format error" in refused.reason:
                hint = " (the image is for another platform)"
            elif "cgroup controller" in refused.reason and "not available" in refused.reason:
                hint = " (systemd must let the engine's user limit it: Delegate=cpu memory pids for user@.service)"
            elif "cannot assign requested address" in refused.reason:
                hint = f" (the engine's machine does not have {self._plan.publish_at}, at which the engine is reached; "
                hint += "with network: host, or a network that the gateway is on, nothing need be published)"
            raise StartFailed(f"container can't be started: {refused.reason}{hint}") from refused
        self.started = True

    async def inspect(self, limit: float = LOOK_LIMIT) -> dict[str, Any]:
        """The engine's word about it; {} if it is gone. Raises EngineGone, EngineRefused."""
        try:
            found = await self._engine.ask("GET", f"{self._path}/json", limit=limit)
        except EngineRefused as refused:
            if refused.answer == 404:
                return {}
            raise
        return found if isinstance(found, dict) else {}

    async def learn(self) -> Mapping[str, Any]:
        """Look at the started container once: its stop signal, its image's digest, whether it is paused."""
        found = await self.inspect(10)
        config, state = found.get("Config") or {}, found.get("State") or {}
        self._stop_signal = str(config.get("StopSignal") or "SIGTERM")
        if self._ending.paused is None:  # an event knows better
            self._ending.paused = bool(state.get("Paused"))
        host, wanted = found.get("HostConfig") or {}, self._plan.body["HostConfig"]
        missing = [what for key, what in LIMITS.items() if wanted[key] and key in host and not host[key]]
        if missing:  # the kernel can't, or a user without rights may not
            first, last = ", ".join(missing[:-1]), missing[-1]
            listed = f"{first} and {last}" if first else last
            log.warning("Container of server '%s': %s does not limit its %s", self._server, self._engine.name, listed)
        self._details["image_id"] = found.get("Image", "")
        with suppress(StartFailed):
            image = await self._engine.ask("GET", f"/images/{found.get('Image')}/json", limit=10)
            digests = image.get("RepoDigests") if isinstance(image, dict) else None
            if digests:
                self._details["image_digest"] = str(digests[0]).rpartition("@")[2]
        return found

    # -------------------------------------------------------------------------------------------------------- watching
    async def watch(self) -> None:
        """Find out that it has ended, and why; then tell everybody. Returns when nothing more comes of it."""
        self._end = await self._await_end()
        self._ended.set()
        self._wake()  # a writer that waits for room, and the reader, who may have to read on
        with trio.move_on_after(REST_WAIT):
            await self._output_over.wait()
        self._output_over.set()
        self._wake()

    async def _await_end(self) -> str:
        ending = self._ending
        if self._engine.podman:
            # Its wait looks at the container four times a second, at some 10 ms of CPU each time.
            await _first_of(self._output_over, ending.died, ending.removed, ending.events_over)
        while True:
            try:
                answer = await self._engine.ask("POST", f"{self._path}/wait", limit=inf)
                code = answer.get("StatusCode") if isinstance(answer, dict) else None
                return await self._explain(code if isinstance(code, int) else -1)
            except EngineRefused as refused:
                return "container was removed" if refused.answer == 404 else refused.message
            except EngineGone as gone:
                try:
                    state = (await self.inspect()).get("State") or {}
                    if not state.get("Running"):
                        return await self._explain(int(state.get("ExitCode", -1)))
                    if self._output_over.is_set():
                        return f"{self._engine.name} has let go of the container's streams"
                except (StartFailed, ValueError, TypeError):
                    log.debug("while waiting for a container: %s", gone.message)
                    return f"{self._engine.name} went away"
            await trio.sleep(0.2)

    async def _explain(self, code: int) -> str:
        ending = self._ending
        if self._stopping:
            return "container was stopped"
        if code > 128 and not ending.out_of_memory:
            with trio.move_on_after(UNEXPLAINED):
                await _first_of(ending.removed, ending.events_over)
        try:
            state = (await self.inspect()).get("State") or {}
        except StartFailed:
            return f"{self._engine.name} went away"
        return ending.reason(code, state)

    async def listen(self) -> None:
        """Follow the engine's events about it. Without them only the explanations are poorer."""
        filters = f'{{"type":["container"],"container":["{self.id}"]}}'
        with suppress(StartFailed):
            async with self._engine.lines("GET", "/events", query={"filters": filters}) as events:
                async for event in events:
                    self._ending.event(event)
        self._ending.events_over.set()

    async def drain(self) -> None:
        """Log what an HTTP server prints. Of any other, read what nobody wants any more: an engine waits for us."""
        while data := await self.receive_some():
            if self.port is not None:
                self._talk.feed(data, time.monotonic())

    # -------------------------------------------------------------------------------------------------------- stopping
    async def stop(self, grace: float) -> None:
        """End it politely, if it still runs. Run shielded; bounded by CLOSE_WAIT + grace and the engine's answers."""
        self._stopping = True
        if not self.started:
            return
        if not self._ended.is_set() and self.port is None:
            self._end_input()
            with trio.move_on_after(CLOSE_WAIT):
                await self._ended.wait()
        if not self._ended.is_set() and not self._ending.paused:
            with suppress(StartFailed):
                query = {"signal": self._stop_signal}
                await self._engine.ask("POST", f"{self._path}/kill", query=query, limit=LOOK_LIMIT)
            with trio.move_on_after(grace):
                await self._ended.wait()

    def _end_input(self) -> None:
        if self._fd < 0:
            return
        try:
            with socket.socket(fileno=os.dup(self._fd)) as streams:
                streams.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is over already

    def _wake(self) -> None:
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)

    def close(self) -> None:
        """Give the streams back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

    def finish(self) -> None:
        """The last step: everything is over."""
        self.close()
        self._end = self._end or "container was stopped"
        self._ended.set()
        self._output_over.set()
        self._lines.close()
        self._talk.close()


async def _first_of(*events: trio.Event) -> None:
    """Return when one of them is set."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(wait, event)
