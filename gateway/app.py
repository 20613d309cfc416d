"""The composition root: builds the house, nests its tasks so that leaving them is the shutdown order, and runs it.

    guard                                         a helper process that outlives us, for the case that we are killed
      supervisor nursery                          leaves last: stops every server, in parallel
        front nursery                             leaves first: stops accepting, answers what is in flight
          server > connections      (http)
          stdio loop                (stdio)
          catalog watcher, signals

Nobody imports this module but ``cli``. What one mode does not need is imported where the other does: stdio mode never
sees hypercorn or Quart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import trio

import gateway
from gateway.auth.principal import Principal
from gateway.config.model import (
    API_KEY_VARIABLE,
    Catalog,
    Secret,
    ServerSpec,
    Settings,
    StringMap,
    parse_listen_addr,
    secrets_of,
    server_environment,
)
from gateway.config.snapshot import Difference, Snapshot, diff
from gateway.errors import ConfigError, Problem, StartFailed
from gateway.exchange import Client
from gateway.hub import Hub
from gateway.protocol.eras import LATEST_LEGACY, Era
from gateway.router import Router
from gateway.runtimes import RUNTIMES, ProcessGuard, by_type, load_plugins
from gateway.runtimes.base import Runtime, Surroundings
from gateway.supervisor import Directions, Supervisor, Unit
from gateway.telemetry import logs
from gateway.telemetry.record import ServerStatus

__all__ = ["Gateway", "HttpOptions", "Sources", "StdioOptions", "check", "run_http", "run_stdio"]

log = logging.getLogger("gateway_http")
core_log = logging.getLogger("gateway_core")
watch_log = logging.getLogger("catalog_watcher")

LIST_TOPICS: Final = ("tools", "prompts", "resources")


@attrs.frozen
class HttpOptions:
    """The command line of ``http`` and ``check``."""

    config: Path | None = None
    listen_addr: str | None = None
    log_level: str | None = None
    catalog: Path | None = None


@attrs.frozen
class StdioOptions:
    """The command line of ``stdio``. ``gateway`` is the URL of a running gateway to go through."""

    server: str | None = None
    catalog: Path | None = None
    gateway: str | None = None
    log_level: str | None = None
    config: Path | None = None


@attrs.frozen
class Read:
    """What the files say now. ``digests`` names the files and the bytes that were read."""

    settings: Settings
    catalog: Catalog
    runtimes: Mapping[str, Runtime]
    warnings: tuple[Problem, ...]
    digests: Mapping[Path, bytes] = attrs.field(factory=dict)


@attrs.define
class Sources:
    """Where config and catalog come from; what the command line overrides is applied at every reading."""

    config: Path | None = None
    overrides: Mapping[str, object] = attrs.field(factory=dict)
    adjust: Callable[[ServerSpec], ServerSpec] = lambda spec: spec

    def read(self) -> Read:
        """Load both files as they are now, in whatever thread. Raises ConfigError with every problem."""
        from gateway.config import load

        path = load.find_config(self.config, Path.cwd(), Path.home())
        settings = load.load_settings(path, os.environ, self.overrides)
        runtimes = by_type((*RUNTIMES, *load_plugins(settings.value.runtimes)))
        types = {name: runtime.spec for name, runtime in runtimes.items()}
        catalog = load.load_catalog(settings.value.catalog_path, os.environ, types)
        digests = {settings.value.catalog_path: catalog.digest}
        if path is not None:
            digests[path] = settings.digest
        return Read(
            settings.value,
            attrs.evolve(catalog.value, servers=tuple(map(self.adjust, catalog.value.servers))),
            runtimes,
            (*settings.warnings, *catalog.warnings),
            digests,
        )


class Gateway:
    """The running gateway without a front: snapshot, supervisor, router, reload.

    ``read`` gives what the files say at the start; ``sources`` reads them again. One exists for each process.
    """

    def __init__(self, sources: Sources, read: Read) -> None:
        self.sources = sources
        self.snapshot = Snapshot(read.settings, read.catalog)
        self.started = trio.current_time()
        self.stopping = trio.Event()
        self.on_settings: list[Callable[[Settings], None]] = []
        self._read = read
        self._guard = ProcessGuard()
        self._redactor = secrets_of(read.settings, read.catalog)
        self._reloading = trio.Lock()
        info = {"name": "open-mcp-gateway", "version": gateway.__version__}
        self.hub = Hub()
        self.supervisor = Supervisor(
            Directions(read.runtimes, self._surroundings, lambda: self.snapshot.settings, info), self.hub
        )
        self.router = Router(self.supervisor, self.hub, lambda: self.snapshot, info)

    # ------------------------------------------------------------------------------------------------------- servers
    def _surroundings(self, spec: ServerSpec) -> Surroundings:
        if spec.unset:
            names = ", ".join(spec.unset)
            raise StartFailed(f"Server '{spec.id}' needs environment variables that are not set: {names}")
        snapshot = self.snapshot
        variables = server_environment(spec, snapshot.catalog, snapshot.settings.variables, os.environ)
        prefix = f"[{spec.id}] "
        return Surroundings(
            server_id=spec.id,
            variables=variables,
            stop_grace=spec.or_default("stop_grace_seconds", snapshot.settings),
            log=lambda line: core_log.info("%s%s", prefix, line),
            redact=self._redactor.redact,
            guard=self._guard,
            catalog_dir=snapshot.catalog.path.parent,
        )

    # -------------------------------------------------------------------------------------------------------- reload
    async def reload(self) -> tuple[Difference, int]:
        """Read the files again and swap the snapshot: what changed, and how many servers there are.

        Raises ConfigError and keeps everything as it was when the files are bad. One reload at a time.
        """
        async with self._reloading:
            path = self.snapshot.catalog.path
            watch_log.info("Catalog changed, reloading...")
            watch_log.info("Reloading catalog from: %s", path)
            try:
                read = await trio.to_thread.run_sync(self.sources.read)
            except ConfigError as error:
                watch_log.error("Failed to parse catalog: %s", error)
                watch_log.warning("Keeping previous catalog due to %s error", error.kind)
                raise
            return self._apply(read)

    def _apply(self, read: Read) -> tuple[Difference, int]:
        old = self.snapshot
        for problem in read.warnings:
            watch_log.warning("%s", problem)
        # Equal definitions stay the same objects, so that looking their units up stays a comparison of identities.
        before = old.catalog.by_id
        servers = tuple(before[s.id] if before.get(s.id) == s else s for s in read.catalog.servers)
        catalog = attrs.evolve(read.catalog, servers=servers)
        changes = diff(old.catalog, catalog)
        settings = read.settings
        if settings.listen_addr != old.settings.listen_addr:
            watch_log.warning("listen_addr has changed; it takes effect at the next start of the gateway")
        self._read = read
        self._redactor = secrets_of(settings, catalog)
        self.snapshot = Snapshot(settings, catalog, old.generation + 1)
        self.supervisor.directions = attrs.evolve(self.supervisor.directions, runtimes=read.runtimes)
        self.supervisor.apply(catalog)
        for server_id in (*changes.added, *changes.removed, *changes.modified):
            for topic in LIST_TOPICS:
                self.hub.publish(server_id, topic)
        for tell in self.on_settings:
            tell(settings)
        watch_log.info("Loaded %d servers (%s)", len(servers), changes)
        watch_log.info(
            "Registry updated",
            extra={
                "fields": {"added": len(changes.added), "removed": len(changes.removed), "total": len(servers)}
            },
        )
        return changes, len(servers)

    async def watch(self) -> None:
        """Reload when a file changes, for as long as ``hot_reload`` says so."""
        from gateway.config.watch import watch

        async def changed() -> None:
            if self.snapshot.settings.hot_reload:
                with contextlib.suppress(ConfigError):  # it is logged, and the old snapshot stays
                    await self.reload()

        def paths() -> Sequence[Path]:
            if not self.snapshot.settings.hot_reload:
                return ()
            return list(self._read.digests)

        await watch(paths, changed, loaded=lambda: self._read.digests)

    # ----------------------------------------------------------------------------------------------------------- life
    async def run(self, front: Callable[[], Awaitable[None]]) -> None:
        """Run servers for as long as ``front`` runs, then stop them all; bounded by their stop grace."""
        async with self._guard, trio.open_nursery() as house:
            await house.start(self.supervisor.run)
            try:
                await front()
            finally:
                house.cancel_scope.cancel()

    async def signals(self) -> None:
        """The first SIGTERM or SIGINT begins the end; a second one ends the process at once (compat C16, RB70).

        The guard then kills what our servers have started, as it does when we are killed.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for number in received:
                name = signal.Signals(number).name
                if self.stopping.is_set():
                    log.warning("%s again: leaving at once", name)
                    logging.shutdown()
                    os._exit(1)
                log.info("%s: finishing requests, then stopping servers", name)
                self.stopping.set()


# ------------------------------------------------------------------------------------------------------ the modes
def _set_up_logs(read: Read, level: str | None, default: str | None = None) -> None:
    settings = read.settings
    logs.setup(logs.choose_level(level, os.environ.get("RUST_LOG"), default or settings.log_level), settings.log_format)


def _say_problems(problems: Sequence[Problem], what: str) -> None:
    for problem in problems:
        print(f"{what}: {problem}", file=sys.stderr)


def _overrides(options: HttpOptions | StdioOptions) -> dict[str, object]:
    found: dict[str, object] = {}
    if options.catalog is not None:
        found["catalog_path"] = options.catalog.absolute()
    if isinstance(options, HttpOptions) and options.listen_addr is not None:
        found["listen_addr"] = options.listen_addr
    return found


def check(options: HttpOptions) -> int:
    """Read config and catalog as ``http`` would, print every problem and warning on stderr: 0 if they can be used."""
    sources = Sources(options.config, _overrides(options))
    try:
        read = sources.read()
    except ConfigError as error:
        _say_problems(error.problems, "error")
        return 1
    _say_problems(read.warnings, "warning")
    print(f"OK: {len(read.catalog.servers)} servers in {read.catalog.path}")
    return 0


def _read_or_complain(sources: Sources) -> Read | None:
    try:
        return sources.read()
    except ConfigError as error:
        _say_problems(error.problems, "error")
        return None


def run_http(options: HttpOptions) -> int:
    """The daemon: 0 after a clean stop, 1 for bad files or a port that can't be had."""
    sources = Sources(options.config, _overrides(options))
    read = _read_or_complain(sources)
    if read is None:
        return 1
    _set_up_logs(read, options.log_level)
    from gateway.downstream.server import bind

    host, port = parse_listen_addr(read.settings.listen_addr)
    try:
        sockets = bind(host, port)
    except OSError as error:
        print(f"error: can't listen on {read.settings.listen_addr}: {error.strerror or error}", file=sys.stderr)
        return 1
    trio.run(_http, sources, read, sockets, options.log_level)
    return 0


async def _http(sources: Sources, read: Read, sockets: Sequence[Any], level: str | None) -> None:
    from gateway.downstream.endpoint import Endpoint
    from gateway.downstream.server import Server, serve

    house = Gateway(sources, read)
    log.info("Starting Open MCP Gateway")
    for problem in read.warnings:
        log.warning("%s", problem)
    log.info("Loaded %d servers from catalog", len(read.catalog.servers))
    endpoint = Endpoint(house.router, lambda: _load_admin(house))

    def configure(settings: Settings) -> None:
        endpoint.configure(settings)
        logs.setup(logs.choose_level(level, os.environ.get("RUST_LOG"), settings.log_level), settings.log_format)

    house.on_settings.append(configure)

    async def front() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.legacy.run)
            await nursery.start(endpoint.modern.run)
            nursery.start_soon(house.signals)
            nursery.start_soon(house.watch)

            async def accept(*, task_status: trio.TaskStatus[Server]) -> None:
                drain = house.snapshot.settings.drain_timeout_seconds
                await serve(
                    endpoint,
                    sockets,
                    shutdown_trigger=house.stopping.wait,
                    drain_seconds=drain,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel()

            server: Server = await nursery.start(accept)
            for address in server.addresses:
                log.info("Listening on %s", _shown_address(address))
            if read.settings.hot_reload:
                log.info("Hot reload enabled for %s", read.catalog.path)

    await house.run(front)
    log.info("Stopped")


def _shown_address(address: Any) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _load_admin(house: Gateway) -> Any:
    """Import the management application in a thread: it takes 150 ms, which nobody else should wait for."""
    from gateway.downstream.endpoint import AdminGone

    def load() -> Any:
        from gateway.admin.api import create_app

        return create_app

    try:
        create_app = await trio.to_thread.run_sync(load)
        app = create_app(_Operations(house))
        await app.startup()
    except (ImportError, OSError, LookupError, EOFError, TypeError, ValueError, zlib.error) as error:
        raise AdminGone from error
    return app


class _Operations:
    """Implements ``admin.api.Operations`` over the house."""

    def __init__(self, house: Gateway) -> None:
        self._house = house

    @property
    def snapshot(self) -> Snapshot:
        """See ``Operations``."""
        return self._house.snapshot

    @property
    def uptime(self) -> float:
        """See ``Operations``."""
        return trio.current_time() - self._house.started

    def visible(self, principal: Principal) -> Sequence[ServerSpec]:
        """See ``Operations``."""
        return self._house.router.visible(principal, self._house.snapshot)

    def status(self, server_id: str) -> ServerStatus:
        """See ``Operations``."""
        return self._house.supervisor.status(server_id)

    async def start(self, server_id: str, principal: Principal) -> bool:
        """See ``Operations``."""
        unit = self._unit(server_id, principal)
        if unit.link is not None and not unit.unhealthy:
            return True
        if unit.unhealthy:
            unit.stop_soon("restarted by hand")
            await unit.stopped()
        await unit.ready(by_hand=True)
        return False

    async def stop(self, server_id: str) -> bool:
        """See ``Operations``."""
        units = [unit for unit in self._house.supervisor.units(server_id) if unit.running]
        for unit in units:
            unit.stop_soon("stopped by hand")
        for unit in units:
            await unit.stopped()
        return not units

    async def restart(self, server_id: str, principal: Principal) -> None:
        """See ``Operations``."""
        await self.stop(server_id)
        await self._unit(server_id, principal).ready(by_hand=True)

    async def reload(self) -> tuple[Difference, int]:
        """See ``Operations``."""
        return await self._house.reload()

    def _unit(self, server_id: str, principal: Principal) -> Unit:
        spec = self._house.router.check_server(principal, server_id)
        client = Client(f"principal:{principal.subject}", Era.LEGACY, LATEST_LEGACY)
        return self._house.supervisor.unit(spec, client, principal)


# ---------------------------------------------------------------------------------------------------------- stdio
def run_stdio(options: StdioOptions) -> int:
    """One desktop client on stdin and stdout: 0 at its end, 1 for bad files or an unknown server, 2 for wrong usage."""
    if options.gateway is not None:
        try:
            read = _through(options.gateway, options.server)
        except ValueError as error:
            print(f"gateway-stdio: --gateway: {error}", file=sys.stderr)
            return 2
        sources = Sources()
    else:
        sources = Sources(options.config, _overrides(options), _of_one_client)
        if options.catalog is None and not _has_catalog(sources):
            text = "no catalog: name one with --catalog, or a running gateway with --gateway"
            print(f"gateway-stdio: {text}", file=sys.stderr)
            return 2
        found = _read_or_complain(sources)
        if found is None:
            return 1
        read = found
    _set_up_logs(read, options.log_level, "warn")
    log.info("Starting gateway-stdio for server: %s", options.server or "(all)")
    for problem in read.warnings:
        log.warning("%s", problem)
    return trio.run(_stdio, sources, read, options)


def _has_catalog(sources: Sources) -> bool:
    """Whether the config names a catalog that is there, or ./catalog.yaml is (compat C12)."""
    from gateway.config import load

    try:
        path = load.find_config(sources.config, Path.cwd(), Path.home())
        return load.load_settings(path, os.environ, sources.overrides).value.catalog_path.exists()
    except ConfigError:
        return True  # reading it again says what is wrong


def _of_one_client(spec: ServerSpec) -> ServerSpec:
    """In direct mode there is one client, so every server that would be shared is its own."""
    return attrs.evolve(spec, isolation="session") if spec.isolation == "shared" else spec


def _through(url: str, server_id: str | None) -> Read:
    """A catalog of one: a running gateway (design.md section 8, compat S8, C15). Raises ValueError for a bad URL.

    Limits in time and number are that gateway's to set, so there are none here.
    """
    from gateway.downstream.stdio import MAX_CALLS
    from gateway.runtimes.through import RUNTIME, ThroughSpec

    key = os.environ.get(API_KEY_VARIABLE)
    headers = StringMap(
        (("Authorization", Secret(f"Bearer ${{{API_KEY_VARIABLE}}}", f"Bearer {key}")),) if key else ()
    )
    spec = ServerSpec(
        server_id or "gateway",
        ThroughSpec(url, server_id or "", headers),
        RUNTIME.type,
        isolation="session",
        prefix="",
        idle_timeout_seconds=0,
        request_timeout_seconds=0,
        start_timeout_seconds=86400,
        max_connections_per_server=MAX_CALLS,
        health_check_interval_seconds=0,
    )
    return Read(Settings(hot_reload=False), Catalog((spec,)), by_type((RUNTIME,)), ())


async def _stdio(sources: Sources, read: Read, options: StdioOptions) -> int:
    from gateway.downstream.stdio import Lines, StdioFront

    house = Gateway(sources, read)
    lines = Lines()
    server_id = options.server if options.gateway is None else (options.server or "gateway")
    front = StdioFront(
        house.router,
        server_id,
        lines,
        max_message_bytes=read.settings.max_message_bytes,
        remote=options.gateway is not None,
    )
    status = 0

    async def serve() -> None:
        nonlocal status
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.signals)
            if read.settings.hot_reload:
                nursery.start_soon(house.watch)

            async def until_stopped() -> None:
                await house.stopping.wait()
                front.stop(house.snapshot.settings.drain_timeout_seconds)

            nursery.start_soon(until_stopped)
            status = await front.run()
            nursery.cancel_scope.cancel()

    try:
        await house.run(serve)
    finally:
        lines.close()
    return status
