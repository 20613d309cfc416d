"""What callers see at an endpoint of many servers: which servers, which names, and when that changes.

A ``Face`` is one endpoint as callers with the same rights see it: the merged tables of all its lists, made when they
are first needed and made again when a list has changed. Tables are joined from the supervisor's shelf, so no server is
started to be listed: only one that nobody has ever listed is, in the background. A list waits for it, but only for a
while (``list_timeout_seconds`` from the moment it was first tried), and says what is missing; when the server answers
in the end, everybody who may have listed without it is told.

A server that could not be listed is tried again as long as anybody listens for changes: with growing pauses, and never
against its own backoff.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, Final

import trio

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import ServerSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import (
    LISTS,
    LISTS_OF,
    Listing,
    Merged,
    Plan,
    Route,
    merge,
    prefix_of,
    render,
    servers_of,
    topic_of,
)
from gateway.errors import GatewayError, UnknownTarget, UpstreamTimeout
from gateway.exchange import Client, Target, ViewName
from gateway.hub import Audience, Hub, Judge
from gateway.protocol.eras import LATEST_LEGACY, Era
from gateway.supervisor import Supervisor

__all__ = ["Face", "Views"]

log = logging.getLogger("gateway_core")

AGAIN_LIMIT: Final = 1.0
"""Seconds that a list waits for a server that could not be listed the last time."""
MAX_PAUSE: Final = 300.0
"""Seconds between two tries in the background, at most."""
MAX_OWN: Final = 64
"""Tables kept for clients whose own servers list something else; the oldest goes first."""
OLD_TABLES: Final = 8
"""Tables that are kept for clients that are in the middle of their pages."""
MAX_LINKS: Final = 1000
"""Links to resources, seen in results, that are kept for each face."""


class Face:
    """One endpoint as callers with the same rights see it. Lives across reloads, as its clients do.

    ``tables``, and ``complete`` which says whether nobody is missing in one, are by list method. ``links`` are URIs
    that results have named and lists have not. ``kept`` is for what others make of tables.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.plan = Plan()
        self.searching = False
        self.specs: tuple[ServerSpec, ...] = ()
        self.ids: frozenset[str] = frozenset()
        self.isolated: tuple[ServerSpec, ...] = ()
        self.tables: dict[str, Merged] = {}
        self.links: dict[str, Route] = {}
        self.kept: dict[Any, Any] = {}
        self.complete: dict[str, bool] = {}
        self._checked: dict[str, int] = {}
        self._sources: dict[str, list[Listing | None]] = {}
        self._old: dict[str, Merged] = {}
        self._withdrawing: set[str] = set()

    def renew(self, snapshot: Snapshot, specs: tuple[ServerSpec, ...], plan: Plan) -> None:
        """Take a new snapshot over. What was made by other rules is forgotten: it may show what is hidden now."""
        self.snapshot = snapshot
        self.plan = plan
        self.specs = specs
        self.kept.clear()
        current = {spec: spec for spec in specs}  # equal ones may have been given another shape
        links = {uri: (current.get(route.spec), route.name) for uri, route in self.links.items()}
        self.links = {uri: Route(spec, name) for uri, (spec, name) in links.items() if spec is not None}
        self._withdrawing.update(self.tables)
        self.ids = frozenset(spec.id for spec in specs)
        self.isolated = tuple(spec for spec in specs if spec.isolation not in ("shared", "tenant", "call"))
        self._checked.clear()
        self._sources.clear()

    def table(self, method: str, supervisor: Supervisor) -> Merged:
        """The table of one list, of what is known now."""
        shelf = supervisor.shelf
        if self._checked.get(method) == shelf.version:
            return self.tables[method]
        sources = [shelf.listing(spec, method) for spec in self.specs]
        former = self._sources.get(method)
        if former is None or any(map(_differ, former, sources)):
            self._sources[method] = sources
            self._join(method, sources)
        self._checked[method] = shelf.version
        return self.tables[method]

    def _join(self, method: str, sources: Sequence[Listing | None]) -> None:
        pairs = [(spec, listing) for spec, listing in zip(self.specs, sources, strict=True) if listing is not None]
        table = merge(method, pairs, self.plan)
        former = self.tables.get(method)
        if former is not None and former.mark != table.mark:
            self.keep(former)
        if method in self._withdrawing:
            # Pages of an older table must not show what a reload has hidden.
            self._withdrawing.discard(method)
            for old in [old for old in self._old.values() if old.method == method]:
                if not old.routes.keys() <= table.routes.keys():
                    del self._old[old.mark]
        for problem in table.problems:
            if former is None or problem not in former.problems:
                log.warning("%s", problem)
        self.tables[method] = table
        self.complete[method] = len(pairs) == len(self.specs)

    def own_table(self, method: str, supervisor: Supervisor, own: Mapping[ServerSpec, Listing]) -> Merged:
        """The table for a client whose own servers list something else than others of their kind."""
        shelf = supervisor.shelf
        pairs = []
        for spec in self.specs:
            listing = own.get(spec) or shelf.listing(spec, method)
            if listing is not None:
                pairs.append((spec, listing))
        key = ("own", method, self.plan, *(id(listing) for _, listing in pairs))
        found = self.kept.get(key)
        if found is None:
            # The listings are kept with the table, so that no other one can come to have the same id().
            found = merge(method, pairs, self.plan), pairs
            mine = [key for key in self.kept if type(key) is tuple and key[0] == "own"]
            for oldest in mine[: len(mine) - MAX_OWN + 1]:
                del self.kept[oldest]
            self.kept[key] = found
        table: Merged = found[0]
        return table

    def keep(self, table: Merged) -> None:
        """Have a table found again by its mark, for a while."""
        self._old[table.mark] = table
        while len(self._old) > OLD_TABLES:
            del self._old[next(iter(self._old))]

    def by_mark(self, method: str, mark: str) -> Merged | None:
        """The table that a cursor was made for; None if it is gone."""
        now = self.tables.get(method)
        if now is not None and now.mark == mark:
            return now
        found = self._old.get(mark)
        return found if found is not None and found.method == method else None

    def saw(self, uri: str, route: Route) -> None:
        """A result has named this resource."""
        self.links.pop(uri, None)
        while len(self.links) >= MAX_LINKS:
            del self.links[next(iter(self.links))]
        self.links[uri] = route


def _differ(one: Listing | None, other: Listing | None) -> bool:
    return one is not other


class _Fetch:
    """The listing of one server that nobody has listed yet: one task, however many wait for it.

    ``missed``: a list was answered without it. ``fault``: why the last try came to nothing. ``first``: the method that
    was wanted first.
    """

    def __init__(self, client: Client, principal: Principal, first: str) -> None:
        self.client = client
        self.principal = principal
        self.first = first
        self.patience = inf
        self.running = False
        self.trying = False
        self.missed = False
        self.fault: GatewayError | None = None
        self.news = trio.Event()
        self.poked = trio.Event()

    def tell(self) -> None:
        """Wake who waits."""
        news, self.news = self.news, trio.Event()
        news.set()


class Views:
    """All faces, and the listing of what was never listed."""

    def __init__(self, supervisor: Supervisor, hub: Hub, current: Callable[[], Snapshot]) -> None:
        self.supervisor = supervisor
        self.hub = hub
        self._current = current
        self._faces: dict[tuple[object, ...], Face] = {}
        self._fetches: dict[ServerSpec, _Fetch] = {}

    # ---------------------------------------------------------------------------------------------------------- faces
    def face(self, target: Target, principal: Principal) -> Face:
        """What the caller sees at that endpoint, by the snapshot of now. Raises UnknownTarget."""
        key = (target, principal.namespaces)
        face = self._faces.get(key)
        snapshot = self._current()
        if face is None or face.snapshot is not snapshot:
            specs, plan, searching = self._selected(target, principal, snapshot)
            if face is None:
                face = self._faces[key] = Face()
            face.renew(snapshot, specs, plan)
            face.searching = searching
        return face

    async def prepare(self) -> None:
        """Write out the tables that unrestricted callers will see first, of what is known, one server after another.

        For the time after a start, when nobody waits for it: the first list then costs what any other does.
        """
        targets: list[Target] = [None, *(ViewName(view.name) for view in self._current().catalog.views)]
        for target in targets:
            with suppress(UnknownTarget):  # a reload has taken the view away
                for method in LISTS:
                    for spec in self.face(target, ANONYMOUS).specs:
                        listing = self.supervisor.shelf.listing(spec, method)
                        if listing is not None:
                            render(spec, listing, self.face(target, ANONYMOUS).plan)
                            await trio.lowlevel.checkpoint()
                    self.face(target, ANONYMOUS).table(method, self.supervisor)

    def _selected(
        self, target: Target, principal: Principal, snapshot: Snapshot
    ) -> tuple[tuple[ServerSpec, ...], Plan, bool]:
        catalog, limit = snapshot.catalog, snapshot.settings.tool_name_limit
        if type(target) is str:
            spec = catalog.by_id.get(target)
            if spec is None or not principal.may_see(spec.namespace):
                raise UnknownTarget(f"Server '{target}' not found")
            return (spec,), Plan(own=True, limit=limit), False
        visible = tuple(spec for spec in catalog.servers if principal.may_see(spec.namespace))
        assert target is None or type(target) is ViewName
        if target is None or not target.name:
            return visible, Plan(limit=limit), target is not None and target.mode == "search"
        view = catalog.view_by_name.get(target.name)
        specs = servers_of(view, visible) if view is not None else ()
        if view is None or (principal.namespaces is not None and not specs):
            raise UnknownTarget(f"View '{target.name[:100]}' not found")
        return specs, Plan(view, limit=limit), (target.mode or view.mode) == "search"

    def table(self, face: Face, method: str, client: Client, principal: Principal) -> Merged:
        """The merged table of what is known now; awaits nothing."""
        supervisor = self.supervisor
        table = face.table(method, supervisor)
        if supervisor.deviants and face.isolated:
            own = {}
            for spec in face.isolated:
                unit = supervisor.find(spec, client, principal)
                if unit is not None and method in unit.own_lists:
                    own[spec] = unit.own_lists[method]
            if own:
                return face.own_table(method, supervisor, own)
        return table

    # -------------------------------------------------------------------------------------------------------- listing
    async def listed(
        self,
        face: Face,
        method: str,
        client: Client,
        principal: Principal,
        deadline: float,
        *,
        only: Sequence[ServerSpec] | None = None,
    ) -> dict[str, GatewayError]:
        """Have what was never listed listed, and wait for it: the servers that are missing all the same, and why.

        ``only`` are servers to wait for until ``deadline``; None waits for all, within ``list_timeout_seconds``.
        """
        shelf = self.supervisor.shelf
        wanted = face.specs if only is None else only
        fetches = {
            spec: self._fetch(spec, client, principal, method)
            for spec in wanted
            if shelf.listing(spec, method) is None
        }
        for spec, fetch in fetches.items():
            until = deadline if only is not None else min(deadline, fetch.patience)
            with trio.move_on_at(until):
                while fetch.trying and shelf.listing(spec, method) is None:
                    await fetch.news.wait()
        missing = {}
        for spec, fetch in fetches.items():
            if shelf.listing(spec, method) is None:
                fetch.missed = True
                missing[spec.id] = fetch.fault or UpstreamTimeout(f"Server '{spec.id}' is still starting")
        return missing

    def warm(self, face: Face, client: Client, principal: Principal) -> None:
        """Begin to list what was never listed, and wait for nothing."""
        for spec in face.specs:
            if self.supervisor.shelf.listing(spec, "tools/list") is None:
                self._fetch(spec, client, principal, "tools/list").missed = True

    def _fetch(self, spec: ServerSpec, client: Client, principal: Principal, method: str) -> _Fetch:
        fetch = self._fetches.get(spec)
        if fetch is None:
            fetch = self._fetches[spec] = _Fetch(client, principal, method)
        now = trio.current_time()
        if not fetch.running:
            limit = self._current().settings.list_timeout_seconds
            fetch.patience = now + (min(limit, AGAIN_LIMIT) if fetch.fault else limit)
            if fetch.fault:
                fetch.client, fetch.principal = client, principal
            fetch.running = fetch.trying = True
            self.supervisor.spawn(partial(self._run, spec, fetch))
        elif not fetch.trying:
            fetch.patience = now + min(self._current().settings.list_timeout_seconds, AGAIN_LIMIT)
            fetch.trying = True
            fetch.poked.set()
        return fetch

    def resume(self, target: Target, principal: Principal) -> None:
        """Somebody listens there from now on: try again what could not be listed and was given up."""
        with suppress(UnknownTarget):
            for spec in self.face(target, principal).specs:
                fetch = self._fetches.get(spec)
                if fetch is not None and not fetch.running:
                    fetch.client, fetch.principal = _nobody(), ANONYMOUS
                    fetch.running = fetch.trying = True
                    self.supervisor.spawn(partial(self._run, spec, fetch))

    async def _run(self, spec: ServerSpec, fetch: _Fetch) -> None:
        """Try until it is listed, or nobody cares any more."""
        pause, due = 1.0, 0.0
        try:
            while self._current().catalog.by_id.get(spec.id) == spec:
                wait = await self._try(spec, fetch)
                if fetch.fault is None:
                    self._fetches.pop(spec, None)
                    return
                if not self.hub.heard:
                    return
                fetch.client, fetch.principal = _nobody(), ANONYMOUS
                now = trio.current_time()
                if due <= now:
                    due = now + pause
                    pause = min(2 * pause, MAX_PAUSE)
                # A list that asks for it in between is tried at once, and neither delays nor spaces out what was due.
                with trio.move_on_at(max(due, now + wait)):
                    await fetch.poked.wait()
                fetch.poked = trio.Event()
                fetch.trying = True
        finally:
            fetch.running = fetch.trying = False
            fetch.client, fetch.principal = _nobody(), ANONYMOUS  # it may outlive by far who asked first
            fetch.tell()

    async def _try(self, spec: ServerSpec, fetch: _Fetch) -> float:
        """One try: the seconds before which another one makes no sense."""
        unit = self.supervisor.unit(spec, fetch.client, fetch.principal, listing=True)
        wait = 0.0

        def listed(method: str) -> None:
            fetch.tell()
            if fetch.missed:
                self.hub.publish(spec.id, topic_of(method))

        try:
            await unit.list_all(fetch.first, listed)
            fetch.fault = None
        except GatewayError as error:
            fetch.fault = error.with_traceback(None)
            wait = error.retry_after or 0.0
        finally:
            fetch.trying = False
            fetch.tell()
            if fetch.client.key == NOBODY:
                self.supervisor.close_client(fetch.client)
        return wait

    async def list_once(self, spec: ServerSpec) -> None:
        """Start a server and keep all its lists. Raises what keeps it from being listed."""
        client = _nobody()
        unit = self.supervisor.unit(spec, client, ANONYMOUS, listing=True)
        try:
            await unit.list_all("tools/list", lambda method: None)
        finally:
            self.supervisor.close_client(client)

    def suspects(self, face: Face, method: str, name: str) -> list[ServerSpec]:
        """The servers never listed that could have an item of this name."""
        shelf = self.supervisor.shelf
        unknown = [spec for spec in face.specs if shelf.listing(spec, method) is None]
        prefixes = [(spec, prefix_of(spec, face.plan.view)) for spec in unknown]
        return [spec for spec, prefix in prefixes if prefix and name.startswith(prefix)]

    # ------------------------------------------------------------------------------------------------------- freshness
    def judge(self, target: Target, principal: Principal, client: Client | None = None) -> Judge:
        """For one listener at that endpoint: whether what changed has changed what it sees, since it last heard so."""
        seen: dict[str, str] = {}
        with suppress(UnknownTarget):
            self._moved(self.face(target, principal), LISTS, seen, client, principal)

        def changed(server_id: str, topic: str, audience: Audience) -> bool:
            try:
                face = self.face(target, principal)
            except UnknownTarget:
                return False
            methods = LISTS_OF.get(topic, ())
            if face.searching and topic == "tools":
                return False  # the three tools are always the same
            moved = self._moved(face, methods, seen, client, principal)
            spec = next((spec for spec in face.specs if spec.id == server_id), None)
            if moved or spec is None:
                return moved
            # Of what was never listed here nobody can tell whether it has changed.
            return any(self.supervisor.shelf.listing(spec, method) is None for method in methods)

        return changed

    def _moved(
        self,
        face: Face,
        methods: Iterable[str],
        seen: dict[str, str],
        client: Client | None,
        principal: Principal,
    ) -> bool:
        """Whether a listener's tables are others than those it has ``seen``; it has seen them then."""
        moved = False
        for method in methods:
            table = face.table(method, self.supervisor)
            if client is not None:
                table = self.table(face, method, client, principal)
            if seen.get(method) != table.mark:
                seen[method] = table.mark
                moved = True
        return moved

    def apply(self, snapshot: Snapshot) -> None:
        """After a reload: forget what was tried for servers that are gone."""
        current = set(snapshot.catalog.servers)
        for spec in [spec for spec in self._fetches if spec not in current]:
            fetch = self._fetches.pop(spec)
            fetch.poked.set()
        self._faces = {
            key: face
            for key, face in self._faces.items()
            if not (type(key[0]) is ViewName and key[0].name and key[0].name not in snapshot.catalog.view_by_name)
        }


NOBODY: Final = "listing"


def _nobody() -> Client:
    """Who lists when those who wanted to know may have gone."""
    return Client(NOBODY, Era.LEGACY, LATEST_LEGACY)

