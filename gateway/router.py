"""From a request to the server that answers it.

A method table says what each method is: answered here, listed, or routed to one server. At a server's own endpoint
(``/servers/ID/...``) names pass through unchanged; at the merged endpoint they are looked up in the directory's tables.
The fast path, a routed request to a ready server with a free slot, awaits nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import trio

from gateway.auth.principal import Principal
from gateway.config.model import ServerSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import LISTS, Listing, Merged, Route, merge
from gateway.errors import GatewayError, ServerProtocolError, UnknownTarget, UpstreamTimeout
from gateway.exchange import Ask, Call, Client, Exchange, Reply, decline
from gateway.hub import ALL, Hub, Subscription
from gateway.protocol.message import INVALID_PARAMS, METHOD_NOT_FOUND, RESULT, dumps
from gateway.supervisor import Supervisor, Unit

__all__ = ["Router"]

log = logging.getLogger("gateway_core")

MAX_PAGES: Final = 100
"""Pages of one list that are read before the rest is left out; a repeated cursor ends it too."""
MAX_TABLES: Final = 64
"""Merged tables that are kept; the oldest goes first."""
PONG: Final = Reply.result("{}")
EMPTY: Final = Reply.result("{}")
GATEWAY_CAPABILITIES: Final[Mapping[str, Any]] = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
    "completions": {},
}
"""What the merged endpoint claims: a server that can't is a per-call error, and clients freeze what they are told."""

NO_RESOURCE: Final = -32002


class Router:
    """Dispatches exchanges. One for all fronts."""

    def __init__(
        self,
        supervisor: Supervisor,
        hub: Hub,
        current: Callable[[], Snapshot],
        info: Mapping[str, Any],
    ) -> None:
        self.supervisor = supervisor
        self.hub = hub
        self._current = current
        self._info = info
        self._tables: dict[tuple[Any, ...], tuple[Merged, list[tuple[ServerSpec, Listing]]]] = {}
        self._local: dict[str, Callable[[Exchange], Reply]] = {"ping": lambda exchange: PONG}

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot that a request arriving now sees. Take it once per request."""
        return self._current()

    # ------------------------------------------------------------------------------------------------------- targets
    def check_server(self, principal: Principal, server_id: str, snapshot: Snapshot | None = None) -> ServerSpec:
        """The entry of that id, if it exists for this caller. Raises UnknownTarget, the same for hidden and absent."""
        spec = (snapshot or self._current()).catalog.by_id.get(server_id)
        if spec is None or not (principal.namespaces is None or spec.namespace in principal.namespaces):
            raise UnknownTarget(f"Server '{server_id}' not found")
        return spec

    def visible(self, principal: Principal, snapshot: Snapshot) -> list[ServerSpec]:
        """The servers that exist for this caller, in catalog order."""
        return [spec for spec in snapshot.catalog.servers if principal.may_see(spec.namespace)]

    def timeout_of(self, server_id: str | None, snapshot: Snapshot) -> float:
        """Seconds a request may take; inf where the config says 0."""
        spec = snapshot.catalog.by_id.get(server_id) if server_id is not None else None
        seconds = snapshot.settings.request_timeout_seconds
        if spec is not None and spec.request_timeout_seconds is not None:
            seconds = spec.request_timeout_seconds
        return seconds or float("inf")

    # ------------------------------------------------------------------------------------------------------ handshake
    async def initialize(
        self, client: Client, principal: Principal, server_id: str | None, deadline: float
    ) -> Mapping[str, Any]:
        """What to answer an ``initialize`` with: capabilities, serverInfo, instructions (compat H39).

        A server's own endpoint answers with the server's facts, so the server is started; the merged one with ours.
        Raises UnknownTarget, StartFailed, UpstreamTimeout.
        """
        if server_id is None:
            return {"capabilities": GATEWAY_CAPABILITIES, "serverInfo": self._info}
        spec = self.check_server(principal, server_id)
        unit = self.supervisor.unit(spec, client, principal)
        unit.hold()
        try:
            with trio.move_on_at(deadline):
                await unit.ready()
                return self._facts_for(unit)
        finally:
            unit.unhold()
        raise UpstreamTimeout(f"Server '{server_id}' is still starting; try again later")

    def _facts_for(self, unit: Unit) -> Mapping[str, Any]:
        facts = unit.facts
        capabilities = dict(facts.get("capabilities", {}))
        if unit.client is None:
            # A shared server does not say whose logs it writes, so nobody is promised any (protocol.md section 4.6).
            capabilities.pop("logging", None)
        capabilities.pop("tasks", None)
        answer: dict[str, Any] = {"capabilities": capabilities, "serverInfo": facts.get("serverInfo", self._info)}
        if isinstance(facts.get("instructions"), str):
            answer["instructions"] = facts["instructions"]
        return answer

    # ------------------------------------------------------------------------------------------------------- requests
    async def dispatch(self, exchange: Exchange) -> Reply | Call:
        """Answer a request here, or send it to its server. Raises GatewayError.

        Waits only for a server to start, a slot to become free, or the lists of the merged view. Cancelled, it leaves
        nothing in flight.
        """
        message = exchange.message
        method = message.method
        local = self._local.get(method)
        if local is not None:
            return local(exchange)
        server_id = exchange.server_id
        if server_id is None:
            return await self._merged(exchange)
        spec = self.check_server(exchange.principal, server_id, exchange.snapshot)
        if method in SPECIAL:
            unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
            return await SPECIAL[method](self, exchange, unit)
        return await self._to(spec, exchange)

    def dispatch_now(self, exchange: Exchange) -> Reply | Call | None:
        """What ``dispatch`` does where nothing has to be waited for; else None, with nothing done. Raises GatewayError.

        A front that has a usual way without a cancel scope tries this first: what ``dispatch`` waits for, a client may
        take back and wants to hear a sign of life about.
        """
        message = exchange.message
        local = self._local.get(message.method)
        if local is not None:
            return local(exchange)
        server_id = exchange.server_id
        if server_id is None or message.method in SPECIAL:
            return None
        spec = self.check_server(exchange.principal, server_id, exchange.snapshot)
        if spec.isolation == "call":
            return None
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
        return unit.begin(exchange) if unit.try_enter(exchange.deadline) else None

    async def _to(self, spec: ServerSpec, exchange: Exchange) -> Call:
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
        if not unit.try_enter(exchange.deadline):
            await unit.enter(exchange.deadline)
        return unit.begin(exchange)

    # ------------------------------------------------------------------------------ resources/subscribe, setLevel
    async def _subscribe(self, exchange: Exchange, unit: Unit) -> Reply:
        """Many clients, one upstream subscription for each resource (protocol.md section 4.1, resource updates)."""
        uri = exchange.message.param("uri")
        if not isinstance(uri, str):
            return Reply.error(INVALID_PARAMS, "uri is missing")
        if exchange.client.owner is None:
            return Reply.error(METHOD_NOT_FOUND, "resources/subscribe needs a session")
        if uri in unit.subscribers and unit.link is not None:
            unit.subscribed(uri, exchange.client)
            return EMPTY
        reply = await self._ask(unit, exchange)
        if reply.message.kind is RESULT:
            unit.subscribed(uri, exchange.client)
        return reply

    async def _unsubscribe(self, exchange: Exchange, unit: Unit) -> Reply:
        uri = exchange.message.param("uri")
        if isinstance(uri, str) and uri in unit.subscribers and not unit.unsubscribed(uri, exchange.client):
            return EMPTY
        return await self._ask(unit, exchange)

    async def _set_level(self, exchange: Exchange, unit: Unit) -> Reply:
        reply = await self._ask(unit, exchange)
        level = exchange.message.param("level")
        if reply.message.kind is RESULT and isinstance(level, str):
            exchange.client.log_level = level
        return reply

    async def _ask(self, unit: Unit, exchange: Exchange) -> Reply:
        """Send the exchange and wait for the reply here."""
        if not unit.try_enter(exchange.deadline):
            await unit.enter(exchange.deadline)
        call = unit.begin(exchange)
        try:
            while True:
                event = await call.next()
                if type(event) is Reply:
                    return event
                if type(event) is Ask:
                    decline(event)
        finally:
            call.cancel()

    # ---------------------------------------------------------------------------------------------------- merged view
    async def _merged(self, exchange: Exchange) -> Reply | Call:
        message = exchange.message
        method = message.method
        if method in LISTS:
            if message.param("cursor") is not None:
                return Reply.error(INVALID_PARAMS, "Invalid cursor: this list has one page")
            merged = await self._list(method, exchange)
            return Reply.result(merged.text)
        if method == "logging/setLevel":
            exchange.client.log_level = message.param("level")
            return EMPTY
        if method == "completion/complete":
            return await self._complete(exchange)
        table, key, absent = _ROUTED.get(method, ("", "", 0))
        if not table:
            return Reply.error(METHOD_NOT_FOUND, f"Method not found: {method}")
        name = message.param(key)
        if not isinstance(name, str):
            return Reply.error(INVALID_PARAMS, f"params.{key} must be a string")
        route = await self._resolve(table, name, exchange)
        if route is not None:
            if route.name != name:
                exchange.changes = {key: dumps(route.name)}
            if method in SPECIAL:
                unit = self.supervisor.unit(route.spec, exchange.client, exchange.principal)
                return await SPECIAL[method](self, exchange, unit)
            return await self._to(route.spec, exchange)
        what = "Resource" if key == "uri" else "Prompt" if table == "prompts/list" else "Tool"
        return Reply.error(absent, f"{what} '{name[:200]}' not found", {"uri": name} if key == "uri" else None)

    async def _resolve(self, table: str, name: str, exchange: Exchange) -> Route | None:
        """Where a merged name leads. What is listed already answers first, so one dead server delays nobody else."""
        specs = self.visible(exchange.principal, exchange.snapshot)
        by_uri = table == "resources/list"
        listed = self._known(table, specs, exchange)[0]
        route = self._joined(table, listed, {}).routes.get(name)
        if route is None:
            route = (await self._list(table, exchange)).routes.get(name)
        if route is None and by_uri:
            route = _by_template(name, await self._list("resources/templates/list", exchange))
        return route

    async def _complete(self, exchange: Exchange) -> Reply | Call:
        ref = exchange.message.param("ref")
        if not isinstance(ref, dict):
            return Reply.error(INVALID_PARAMS, "params.ref must be an object")
        method, key = (
            ("prompts/list", "name") if ref.get("type") == "ref/prompt" else ("resources/templates/list", "uri")
        )
        merged = await self._list(method, exchange)
        route = merged.routes.get(ref.get(key, ""))
        if route is None:
            return Reply.error(INVALID_PARAMS, f"Unknown reference {str(ref.get(key))[:200]!r}")
        exchange.changes = {"ref": dumps({**ref, key: route.name})}
        return await self._to(route.spec, exchange)

    def _known(
        self, method: str, specs: list[ServerSpec], exchange: Exchange
    ) -> tuple[list[tuple[ServerSpec, Listing]], list[ServerSpec]]:
        """What is listed already, and the servers that are not."""
        listed: list[tuple[ServerSpec, Listing]] = []
        cold: list[ServerSpec] = []
        for spec in specs:
            unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=True)
            listing = unit.listings.get(method)
            if listing is None:
                cold.append(spec)
            else:
                listed.append((spec, listing))
        return listed, cold

    def _joined(self, method: str, listed: list[tuple[ServerSpec, Listing]], missing: Mapping[str, str]) -> Merged:
        """The merged table of these listings, made once while they stay the same."""
        if missing:
            return merge(method, listed, missing)
        key = (method, *(id(listing) for _, listing in listed))
        found = self._tables.get(key)
        if found is None:
            merged = merge(method, listed)
            while len(self._tables) >= MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            # The listings are kept with the table, so that no other one can come to have the same id().
            found = self._tables[key] = (merged, listed)
            for problem in merged.problems:
                log.warning("%s", problem)
        return found[0]

    async def _list(self, method: str, exchange: Exchange) -> Merged:
        """The merged table of one list method: every server in parallel, the failing ones left out and named."""
        specs = self.visible(exchange.principal, exchange.snapshot)
        listed, cold = self._known(method, specs, exchange)
        if not cold:
            return self._joined(method, listed, {})
        found = {spec.id: listing for spec, listing in listed}
        missing: dict[str, str] = {}

        async def fetch(spec: ServerSpec) -> None:
            try:
                found[spec.id] = await self._listing(spec, method, exchange)
            except GatewayError as error:
                missing[spec.id] = error.message

        async with trio.open_nursery() as nursery:
            for spec in cold:
                nursery.start_soon(fetch, spec)
        if missing and not found:
            reasons = "; ".join(f"{id}: {why}" for id, why in missing.items())
            raise ServerProtocolError(f"No server could be listed: {reasons}", code=-32603)
        return self._joined(method, [(spec, found[spec.id]) for spec in specs if spec.id in found], missing)

    async def _listing(self, spec: ServerSpec, method: str, exchange: Exchange) -> Listing:
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=True)
        await unit.enter(exchange.deadline)
        try:
            link = unit.link
            if link is None:
                raise ServerProtocolError(f"Server '{spec.id}' has just ended")
            capability = "resources" if method.startswith("resources") else method.partition("/")[0]
            items: list[Mapping[str, Any]] = []
            if capability in link.facts.get("capabilities", {}):
                member = LISTS[method][0]
                cursor: object = None
                seen: set[str] = set()
                for _ in range(MAX_PAGES):
                    params = "" if cursor is None else dumps({"cursor": cursor})
                    timeout = max(0.0, exchange.deadline - trio.current_time())
                    reply = await link.request(method, params, timeout=timeout)
                    if reply.kind is not RESULT or not isinstance(reply.result, dict):
                        if reply.kind is not RESULT and reply.result.get("code") == METHOD_NOT_FOUND:
                            break
                        raise ServerProtocolError(
                            f"Server '{spec.id}' answered {method} with an error: {str(reply.result)[:200]}"
                        )
                    page = reply.result.get(member)
                    items += [item for item in page if isinstance(item, dict)] if isinstance(page, list) else []
                    # "" is a valid cursor, only absence ends the list.
                    cursor = reply.result.get("nextCursor")
                    if not isinstance(cursor, str) or cursor in seen:
                        break
                    seen.add(cursor)
            listing = unit.listings[method] = Listing(method, tuple(items))
            return listing
        finally:
            unit.leave()

    # --------------------------------------------------------------------------------------------------- notifications
    def notify(self, exchange: Exchange) -> None:
        """Pass a client's notification on. Never waits and never raises: a server that does not run misses nothing.

        What is between one client and the gateway only (``initialized``, ``cancelled``) is the front's business.
        """
        message = exchange.message
        server_id = exchange.server_id
        if server_id is None:
            specs = self.visible(exchange.principal, exchange.snapshot)
        else:
            spec = exchange.snapshot.catalog.by_id.get(server_id)
            specs = [spec] if spec is not None and exchange.principal.may_see(spec.namespace) else []
        for spec in specs:
            if spec.isolation == "call" or (server_id is None and spec.isolation == "shared"):
                continue
            unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
            roots_changed = message.method == "notifications/roots/list_changed"
            if unit.link is not None and not (unit.client is None and roots_changed):
                unit.link.notify(message.method, message.params_text())

    def subscribe(self, server_id: str | None, wake: Callable[[], None]) -> Subscription:
        """Listen to list changes of shared servers: one, or all for the merged endpoint."""
        return self.hub.subscribe(ALL if server_id is None else server_id, wake)

    def close(self, client: Client) -> None:
        """A client's session is over."""
        self.supervisor.close_client(client)


def _by_template(uri: str, merged: Merged) -> Route | None:
    """The route of the first URI template that a URI fits: its literal parts, in order (RFC 6570 level 1 is enough)."""
    for template, route in merged.routes.items():
        head, brace, rest = template.partition("{")
        tail = rest.rpartition("}")[2] if brace else ""
        if brace and uri.startswith(head) and uri.endswith(tail) and len(uri) >= len(head) + len(tail):
            return route
    return None


_ROUTED: Final[Mapping[str, tuple[str, str, int]]] = {
    "tools/call": ("tools/list", "name", INVALID_PARAMS),
    "prompts/get": ("prompts/list", "name", INVALID_PARAMS),
    "resources/read": ("resources/list", "uri", NO_RESOURCE),
    "resources/subscribe": ("resources/list", "uri", NO_RESOURCE),
    "resources/unsubscribe": ("resources/list", "uri", NO_RESOURCE),
}
"""Method -> (list that names its target, member of params that holds the name, code for an unknown one)."""

SPECIAL: Final[Mapping[str, Callable[[Router, Exchange, Unit], Awaitable[Reply]]]] = {
    "resources/subscribe": Router._subscribe,
    "resources/unsubscribe": Router._unsubscribe,
    "logging/setLevel": Router._set_level,
}
"""Routed requests that leave something to remember."""
