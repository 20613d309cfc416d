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
import importlib
import logging
import os
import signal
import sys
import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
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
    ViewSpec,
    parse_listen_addr,
    secrets_of,
    server_environment,
)
from gateway.config.snapshot import Difference, Snapshot, diff, same
from gateway.directory import Listing
from gateway.directory.shelf import Volume
from gateway.directory.store import Store, encoded, state_folder
from gateway.errors import REPLACED, ConfigError, Problem, StartFailed, UnknownTarget, of_archive
from gateway.exchange import Client, Target, ViewName
from gateway.hub import ALL, Hub
from gateway.protocol.eras import LATEST_LEGACY, Era
from gateway.router import Router
from gateway.runtimes import RUNTIMES, Instances, ProcessGuard, by_type, load_plugins
from gateway.runtimes.base import Runtime, Surroundings
from gateway.supervisor import Directions, Supervisor, Unit
from gateway.telemetry import logs
from gateway.telemetry.record import ServerStatus

__all__ = [
    "Gateway",
    "HttpOptions",
    "Read",
    "Sources",
    "StdioOptions",
    "check",
    "overrides",
    "read_or_complain",
    "run_http",
    "run_stdio",
    "set_up_logs",
    "state_of",
]

log = logging.getLogger("gateway_http")
core_log = logging.getLogger("gateway_core")
watch_log = logging.getLogger("catalog_watcher")

LIST_TOPICS: Final = ("tools", "prompts", "resources")
SWEEP_PAUSE: Final = 5.0
MAX_SWEEP_PAUSE: Final = 300.0
"""Seconds before it is tried again to remove what a killed gateway has left."""
SAVE_PAUSE: Final = 1.0
"""Seconds for which changed lists are gathered before they are written to disk."""
UNREADABLE: Final = (ImportError, OSError, LookupError, EOFError, TypeError, ValueError, zlib.error)
"""How an import can fail in an archive that was replaced."""


@attrs.frozen
class HttpOptions:
    """The command line of ``http``, ``check`` and ``warm``."""

    config: Path | None = None
    listen_addr: str | None = None
    log_level: str | None = None
    catalog: Path | None = None
    state_dir: Path | None = None


@attrs.frozen
class StdioOptions:
    """The command line of ``stdio``. ``gateway`` is the URL of a running gateway to go through."""

    server: str | None = None
    catalog: Path | None = None
    gateway: str | None = None
    log_level: str | None = None
    config: Path | None = None
    state_dir: Path | None = None
    view: str | None = None
    mode: str = ""


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

    ``read`` gives what the files say at the start; ``sources`` reads them again. ``state`` is the folder that remembers
    what servers list, which is read at once, so this blocks, and where gateways may have left something; None for no
    memory. Without ``remember`` no lists are kept or read there. One exists for each process.
    """

    def __init__(self, sources: Sources, read: Read, state: Path | None = None, *, remember: bool = True) -> None:
        self.sources = sources
        self.snapshot = Snapshot(read.settings, read.catalog)
        self.started = trio.current_time()
        self.stopping = trio.Event()
        self.on_settings: list[Callable[[Settings], None]] = []
        self._read = read
        self._guard = ProcessGuard()
        self._instances = Instances(state)
        self._redactor = secrets_of(read.settings, read.catalog)
        self._reloading = trio.Lock()
        self._ahead = False
        info = {"name": "open-mcp-gateway", "version": gateway.__version__}
        self.hub = Hub()
        self.supervisor = Supervisor(
            Directions(read.runtimes, self._surroundings, lambda: self.snapshot.settings, info), self.hub
        )
        self.router = Router(self.supervisor, self.hub, lambda: self.snapshot, info)
        self._store = store = Store(state) if state is not None and remember else None
        self._unsaved: set[ServerSpec] = set()
        self._to_save = trio.Event()
        if store is not None:
            store.load(read.catalog.servers, self._remember)
            self.supervisor.shelf.on_change = self._changed

    # --------------------------------------------------------------------------------------------- what servers list
    def _remember(self, spec: ServerSpec, volume: Volume) -> None:
        self.supervisor.shelf.remember(spec, volume.facts, volume.listings.values())

    def _changed(self, spec: ServerSpec) -> None:
        self._unsaved.add(spec)
        self._to_save.set()

    def save(self, specs: Collection[ServerSpec]) -> None:
        """Write what is known of these servers. Blocks; raises nothing."""
        assert self._store is not None
        for spec in specs:
            volume = self.supervisor.shelf.volume(spec)
            self._store.save(spec, encoded(attrs.evolve(volume, listings=dict(volume.listings))))

    async def _save_changes(self) -> None:
        """Write what changes, a little later: lists come in groups."""
        assert self._store is not None
        await trio.to_thread.run_sync(self._store.prune)
        while True:
            await self._to_save.wait()
            await trio.sleep(SAVE_PAUSE)
            self._to_save = trio.Event()
            unsaved, self._unsaved = self._unsaved, set()
            await trio.to_thread.run_sync(self.save, unsaved)

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
            env=spec.env.revealed(),
            environ=os.environ,
            instance=self._instances,
            allowed_paths=snapshot.settings.docker.allowed_paths,
        )

    async def _sweep(self) -> None:
        """Remove what gateways have left that were killed (P7); again later what could not be looked at now."""
        pause = SWEEP_PAUSE
        while not await self._sweep_once():
            await trio.sleep(pause)
            pause = min(2 * pause, MAX_SWEEP_PAUSE)

    async def _sweep_once(self) -> bool:
        """Whether there is nothing left to look at."""
        done = True
        for name in self._instances.left():
            try:
                with self._instances.taken(name) as left:
                    for type, where in () if left is None else left[1]:
                        runtime = self.supervisor.directions.runtimes.get(type)
                        if runtime is None or runtime.sweep is None:
                            raise StartFailed(f"runtime type '{type}' is not available")
                        await runtime.sweep(where, name, os.environ)
            except StartFailed as error:
                core_log.info("What a killed gateway has left can't be removed yet: %s", error.message)
                done = False
        return done

    # -------------------------------------------------------------------------------------------------------- reload
    async def reload(self) -> tuple[Difference, int]:
        """Read the files again and swap the snapshot: what changed, and how many servers there are.

        Raises ConfigError and keeps everything as it was when the files are bad. One reload at a time.
        """
        async with self._reloading:
            path = self.snapshot.catalog.path
            watch_log.info("Catalog changed, reloading...")
            watch_log.info("Reloading catalog from: %s", path)
            kept: list[tuple[ServerSpec, Volume]] = []

            def read_files() -> Read:
                read = self.sources.read()
                if self._store is not None:
                    known = set(self.snapshot.catalog.servers)
                    new = [spec for spec in read.catalog.servers if spec not in known]
                    self._store.load(new, lambda spec, volume: kept.append((spec, volume)))
                if self._ahead and (names := _needed(read)):
                    _load(names)
                return read

            try:
                read = await trio.to_thread.run_sync(read_files)
            except ConfigError as error:
                watch_log.error("Failed to parse catalog: %s", error)
                watch_log.warning("Keeping previous catalog due to %s error", error.kind)
                raise
            applied = self._apply(read)
            for spec, volume in kept:
                self._remember(spec, volume)
            self._tell_views()
            return applied

    def _tell_views(self) -> None:
        """Have every view looked at again: who sees another list now is told (protocol.md section 5, freshness)."""
        for topic in LIST_TOPICS:
            self.hub.publish(ALL, topic)

    def _apply(self, read: Read) -> tuple[Difference, int]:
        old = self.snapshot
        for problem in read.warnings:
            watch_log.warning("%s", problem)
        # Equal definitions stay the same objects, so that looking their units up stays a comparison of identities.
        before = old.catalog.by_id
        servers = tuple(before[s.id] if s.id in before and same(before[s.id], s) else s for s in read.catalog.servers)
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
        self.router.apply(self.snapshot)
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
    async def load(self) -> None:
        """Have in memory what the catalog's servers need, and from now on what those of a reload need.

        It happens in a thread, while we serve. For the daemon: a desktop client's first answer would be 150 ms later.
        """
        self._ahead = True
        if names := _needed(self._read):
            await trio.to_thread.run_sync(_load, names)

    async def run(self, front: Callable[[], Awaitable[None]]) -> None:
        """Run servers for as long as ``front`` runs, then stop them all; bounded by their stop grace."""
        async with self._guard, contextlib.aclosing(self._instances), trio.open_nursery() as house:
            await house.start(self.supervisor.run)
            await house.start(self.hub.run)
            house.start_soon(self._sweep)
            if self._store is not None:
                house.start_soon(self._save_changes)
            try:
                await front()
            finally:
                if self._unsaved:
                    self.save(self._unsaved)
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


# ------------------------------------------------------------------------------------- what is imported when needed
def _needed(read: Read) -> list[str]:
    """The modules that the first start of each of these servers, and the first search, would have to import."""
    found: dict[str, None] = {}
    for spec in read.catalog.servers:
        runtime = read.runtimes[spec.runtime_type]
        found.update(dict.fromkeys(runtime.modules))
        if runtime.origin(spec.runtime):
            found["gateway.upstream.http"] = None
    if any(view.mode == "search" for view in read.catalog.views):
        found["gateway.directory.search"] = None
    return [name for name in found if name not in sys.modules]


def _load(names: Sequence[str]) -> None:
    """Import them now: the archive may be replaced at any time, and then nothing can be imported from it any more.

    Takes 40 to 90 ms where there is something to do. What fails is logged; who needs it will be told.
    """
    try:
        for name in names:
            importlib.import_module(name)
    except UNREADABLE as error:
        reason = REPLACED if of_archive(error) else error
        core_log.warning("What the catalog's servers need can't be loaded: %s", reason)
    else:
        core_log.debug("What the catalog's servers need is loaded")


# ------------------------------------------------------------------------------------------------------ the modes
def set_up_logs(read: Read, level: str | None, default: str | None = None) -> None:
    settings = read.settings
    logs.setup(logs.choose_level(level, os.environ.get("RUST_LOG"), default or settings.log_level), settings.log_format)


def _say_problems(problems: Sequence[Problem], what: str) -> None:
    for problem in problems:
        print(f"{what}: {problem}", file=sys.stderr)


def overrides(options: HttpOptions | StdioOptions) -> dict[str, object]:
    found: dict[str, object] = {}
    if options.catalog is not None:
        found["catalog_path"] = options.catalog.absolute()
    if options.state_dir is not None:
        found["state_dir"] = options.state_dir.absolute()
    if isinstance(options, HttpOptions) and options.listen_addr is not None:
        found["listen_addr"] = options.listen_addr
    return found


def state_of(settings: Settings) -> Path | None:
    return state_folder(settings.state_dir, os.environ)


def check(options: HttpOptions) -> int:
    """Read config and catalog as ``http`` would, print every problem and warning on stderr: 0 if they can be used."""
    sources = Sources(options.config, overrides(options))
    try:
        read = sources.read()
    except ConfigError as error:
        _say_problems(error.problems, "error")
        return 1
    _say_problems(read.warnings, "warning")
    for text in _advice(read):
        print(f"warning: {text}", file=sys.stderr)
    for text in _runtime_advice(read):
        print(f"note: {text}", file=sys.stderr)
    print(f"OK: {len(read.catalog.servers)} servers in {read.catalog.path}")
    return 0


def _advice(read: Read) -> list[str]:
    """What is legal in the catalog and hardly meant, as far as it is known what servers list."""
    from gateway.directory.advice import advise

    known: dict[ServerSpec, Volume] = {}
    folder = state_of(read.settings)
    if folder is not None:
        Store(folder).load(read.catalog.servers, known.__setitem__)

    def listed(spec: ServerSpec, method: str) -> Listing | None:
        return known[spec].listings.get(method) if spec in known else None

    return advise(read.catalog, read.settings.tool_name_limit, listed)


def _runtime_advice(read: Read) -> list[str]:
    """What an entry allows beyond what is safe, and what its start would refuse."""
    found = []
    for spec in read.catalog.servers:
        advice = read.runtimes[spec.runtime_type].advice
        if advice is not None:
            surroundings = Surroundings(
                spec.id,
                {},
                catalog_dir=read.catalog.path.parent,
                environ=os.environ,
                allowed_paths=read.settings.docker.allowed_paths,
            )
            found += [f"server '{spec.id}': {text}" for text in advice(spec.runtime, surroundings)]
    return found


def read_or_complain(sources: Sources) -> Read | None:
    try:
        return sources.read()
    except ConfigError as error:
        _say_problems(error.problems, "error")
        return None


def run_http(options: HttpOptions) -> int:
    """The daemon: 0 after a clean stop, 1 for bad files or a port that can't be had."""
    sources = Sources(options.config, overrides(options))
    read = read_or_complain(sources)
    if read is None:
        return 1
    set_up_logs(read, options.log_level)
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

    house = Gateway(sources, read, state_of(read.settings))
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
            nursery.start_soon(house.load)
            nursery.start_soon(house.router.views.prepare)
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
    except UNREADABLE as error:
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

    def views(self, principal: Principal) -> list[tuple[ViewSpec, str, Sequence[str], int | None]]:
        """See ``Operations``."""
        house = self._house
        found: list[tuple[ViewSpec, str, Sequence[str], int | None]] = []
        for view in house.snapshot.catalog.views:
            with contextlib.suppress(UnknownTarget):
                face = house.router.views.face(ViewName(view.name), principal)
                table = face.table("tools/list", house.supervisor)
                tools = len(table.texts) if face.complete["tools/list"] else None
                found.append((view, view.mode, [spec.id for spec in face.specs], tools))
        return found

    def status(self, server_id: str) -> ServerStatus:
        """See ``Operations``."""
        return self._house.supervisor.status(server_id)

    async def instances(self, server_id: str) -> Sequence[Mapping[str, Any]]:
        """See ``Operations``."""
        return await self._house.supervisor.measured(server_id)

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
            read = _through(options.gateway, options.server, options.view, options.mode)
        except ValueError as error:
            print(f"gateway-stdio: --gateway: {error}", file=sys.stderr)
            return 2
        sources = Sources()
    else:
        sources = Sources(options.config, overrides(options), _of_one_client)
        if options.catalog is None and not _has_catalog(sources):
            text = "no catalog: name one with --catalog, or a running gateway with --gateway"
            print(f"gateway-stdio: {text}", file=sys.stderr)
            return 2
        found = read_or_complain(sources)
        if found is None:
            return 1
        read = found
    set_up_logs(read, options.log_level, "warn")
    log.info("Starting gateway-stdio for server: %s", options.server or options.view or "(all)")
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


def _through(url: str, server_id: str | None, view: str | None = None, mode: str = "") -> Read:
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
        ThroughSpec(url, server_id or "", headers, view or "", mode),
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

    house = Gateway(sources, read, state_of(read.settings) if options.gateway is None else None)
    lines = Lines()
    target: Target = options.server
    if options.gateway is not None:
        target = options.server or "gateway"
    elif options.view is not None or options.mode:
        target = ViewName(options.view or "", options.mode)
    front = StdioFront(
        house.router,
        target,
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
