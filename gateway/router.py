"""From a request to the server that answers it.

A method table says what each method is: answered here, listed, or routed to one server. At a server's own endpoint
(``/servers/ID/...``) names pass through unchanged; at the merged endpoint they are looked up in the directory's tables.
The fast path, a routed request to a ready server with a free slot, awaits nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from json import loads
from typing import Any, Final

import trio

from gateway.auth.principal import Principal
from gateway.config.model import ServerSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import LISTS, Listing, Merged, Route, merge, with_names
from gateway.errors import GatewayError, ServerProtocolError, UnknownTarget, UpstreamTimeout
from gateway.exchange import Ask, Call, Client, Exchange, Reply, decline
from gateway.hub import ALL, Hub, Subscription
from gateway.protocol.eras import LOG_LEVELS, MODERN, NO_RESOURCE, Era
from gateway.protocol.headers import HeaderParameter, parameters_of
from gateway.protocol.message import INVALID_PARAMS, METHOD_NOT_FOUND, RESULT, build_request, decode_request, dumps
from gateway.protocol.translate import to_legacy
from gateway.supervisor import Supervisor, Unit

__all__ = ["Router"]

log = logging.getLogger("gateway_core")

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

LEARN_LIMIT: Final = 5.0
"""Seconds to learn which headers a server's tools want, before a call goes on without."""


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
    def info(self) -> Mapping[str, Any]:
        """The gateway's name and version, as clients and servers are told."""
        return self._info

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
                return self._facts(unit.facts, unit.client is not None)
        finally:
            unit.unhold()
        raise UpstreamTimeout(f"Server '{server_id}' is still starting; try again later")

    def _facts(self, facts: Mapping[str, Any], isolated: bool) -> dict[str, Any]:
        capabilities = dict(facts.get("capabilities", {}))
        if not isolated and facts.get("protocolVersion") != MODERN:
            # A shared server does not say whose logs it writes, so nobody is promised any (protocol.md section 4.6).
            capabilities.pop("logging", None)
        capabilities.pop("tasks", None)
        answer: dict[str, Any] = {"capabilities": capabilities, "serverInfo": facts.get("serverInfo", self._info)}
        if isinstance(facts.get("instructions"), str):
            answer["instructions"] = facts["instructions"]
        return answer

    async def discover(self, client: Client, principal: Principal, server_id: str | None) -> Mapping[str, Any]:
        """What to answer ``server/discover`` with. Starts no server: clients probe with short-lived processes.

        A server that has not said yet what it can is claimed to be able to do everything that we can pass on; what it
        then lacks is an empty list. Raises UnknownTarget.
        """
        if server_id is None:
            return {"capabilities": GATEWAY_CAPABILITIES, "serverInfo": self._info}
        spec = self.check_server(principal, server_id)
        facts = self.supervisor.facts.get(spec)
        if facts is None:
            return {"capabilities": GATEWAY_CAPABILITIES, "serverInfo": self._info}
        answer = self._facts(facts, spec.isolation != "shared" and spec.isolation != "tenant")
        capabilities = answer["capabilities"]
        for name in ("tools", "prompts", "resources"):
            if name in capabilities:
                # Clients drop notices that were not claimed, and ours come from reloads and restarts, too.
                capabilities[name] = {**capabilities[name], "listChanged": True}
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
        if not unit.try_enter(exchange.deadline):
            return None
        return _listed(unit, exchange) if message.method in LISTS else unit.begin(exchange)

    async def _to(self, spec: ServerSpec, exchange: Exchange) -> Reply | Call:
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
        if not unit.try_enter(exchange.deadline):
            await unit.enter(exchange.deadline)
        return _listed(unit, exchange) if exchange.message.method in LISTS else unit.begin(exchange)

    # ------------------------------------------------------------------------------ resources/subscribe, setLevel
    async def _subscribe(self, exchange: Exchange, unit: Unit) -> Reply:
        """Many clients, one upstream subscription for each resource (protocol.md section 4.1, resource updates)."""
        uri = exchange.message.param("uri")
        if not isinstance(uri, str):
            return Reply.error(INVALID_PARAMS, "uri is missing")
        if exchange.client.owner is None:
            return Reply.error(METHOD_NOT_FOUND, "resources/subscribe needs a session")
        native = loads((exchange.changes or {}).get("uri", "null")) or uri
        return Reply(await unit.subscribe(native, exchange.client, exchange.deadline, uri))

    async def _unsubscribe(self, exchange: Exchange, unit: Unit) -> Reply:
        uri = exchange.message.param("uri")
        if not isinstance(uri, str):
            return Reply.error(INVALID_PARAMS, "uri is missing")
        native = loads((exchange.changes or {}).get("uri", "null")) or uri
        if unit.unsubscribed(native, exchange.client) and unit.link is not None:
            return Reply(await unit.link.unsubscribe(native, max(0.0, exchange.deadline - trio.current_time())))
        return EMPTY

    async def _set_level(self, exchange: Exchange, unit: Unit) -> Reply:
        level = exchange.message.param("level")
        client = exchange.client
        if level not in LOG_LEVELS:
            return Reply.error(INVALID_PARAMS, f"level must be one of {', '.join(LOG_LEVELS)}")
        await unit.hold_ready(exchange.deadline)
        try:
            if unit.link is not None and unit.link.era is Era.MODERN:
                # Remembered; each request then says it (section 4.1, log).
                client.set_log_level(level)
                return EMPTY
            reply = await self._ask(unit, exchange)
        finally:
            unit.unhold()
        if reply.message.kind is RESULT:
            client.set_log_level(level)
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
            reply = Reply.result(merged.text, merged.result)
            reply.cache = merged.cache
            if exchange.client.era is Era.LEGACY:
                reply.message = to_legacy(method, reply.message, exchange.client.version)
            return reply
        if method == "logging/setLevel":
            level = message.param("level")
            if level not in LOG_LEVELS:
                return Reply.error(INVALID_PARAMS, f"level must be one of {', '.join(LOG_LEVELS)}")
            exchange.client.set_log_level(level)
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
        by_uri = key == "uri"
        if route is not None:
            if route.name != name:
                exchange.changes = {**(exchange.changes or {}), key: dumps(route.name)}
            if method in SPECIAL:
                unit = self.supervisor.unit(route.spec, exchange.client, exchange.principal)
                return await SPECIAL[method](self, exchange, unit)
            names = self._renamed(route, name if by_uri else "", exchange)
            if names:
                exchange.rewrite = partial(with_names, names=names)
            return await self._to(route.spec, exchange)
        what = "Resource" if by_uri else "Prompt" if table == "prompts/list" else "Tool"
        return Reply.error(absent, f"{what} '{name[:200]}' not found", {"uri": name} if by_uri else None)

    def _renamed(self, route: Route, uri: str, exchange: Exchange) -> Mapping[str, str]:
        """What the client calls otherwise than the server, as far as it was listed. ``uri`` is what it asked for."""
        specs = self.visible(exchange.principal, exchange.snapshot)
        listed = self._known("resources/list", specs, exchange)[0]
        names = self._joined("resources/list", listed, {}).renamed.get(route.spec.id, {})
        return {**names, route.name: uri} if uri and uri != route.name else names

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
                unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=True)
                found[spec.id] = await unit.listing(method, exchange.deadline)
            except GatewayError as error:
                missing[spec.id] = error.message

        async with trio.open_nursery() as nursery:
            for spec in cold:
                nursery.start_soon(fetch, spec)
        if missing and not found:
            reasons = "; ".join(f"{id}: {why}" for id, why in missing.items())
            raise ServerProtocolError(f"No server could be listed: {reasons}", code=-32603)
        return self._joined(method, [(spec, found[spec.id]) for spec in specs if spec.id in found], missing)

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
            link = unit.link
            if link is None:
                continue
            if message.method == "notifications/roots/list_changed" and (unit.client is None or link.era is Era.MODERN):
                # A shared server was never told of roots, a modern one asks for them when it needs them.
                continue
            link.notify(message.method, message.params_text())

    def subscribe(
        self, server_id: str | None, wake: Callable[[], None], principal: Principal, client: Client | None = None
    ) -> Subscription:
        """Listen to list changes: of one server, or of all for the merged endpoint.

        Those of shared servers, of the principal's own, and with ``client`` of those it shares with others of its kind.
        """
        audiences = [(principal, "")] if client is None else [(principal, ""), (principal, client.key)]
        return self.hub.subscribe(ALL if server_id is None else server_id, wake, *audiences)

    async def listen(
        self, client: Client, principal: Principal, server_id: str | None, uris: Sequence[str], deadline: float
    ) -> list[str]:
        """Have a client told of updates of these resources, until ``close``: those that their servers honour.

        ``client.owner.mark`` is told. Servers are started for it. Raises UnknownTarget; other faults leave a URI out.
        """
        snapshot = self._current()
        honoured: list[str] = []

        async def one(uri: str) -> None:
            message = decode_request(build_request("0", "resources/subscribe", dumps({"uri": uri})))
            exchange = Exchange(message, principal, snapshot, client, server_id, deadline)
            with suppress(GatewayError):
                reply = await self.dispatch(exchange)
                if isinstance(reply, Reply) and reply.message.kind is RESULT:
                    honoured.append(uri)

        if server_id is not None:
            self.check_server(principal, server_id, snapshot)
        async with trio.open_nursery() as nursery:
            for uri in dict.fromkeys(uris):
                nursery.start_soon(one, uri)
        return [uri for uri in dict.fromkeys(uris) if uri in honoured]

    # -------------------------------------------------------------------------------------------- headers of tool calls
    def tool_headers(self, exchange: Exchange) -> tuple[HeaderParameter, ...] | None:
        """The arguments of a tools/call that must stand in headers, too (2026-07-28, x-mcp-header).

        None while the server's tools are not known: ``learn_tools`` first.
        """
        found = self._target_of(exchange)
        if found is None:
            return None
        unit, name = found
        if unit.tool_headers is None:
            listing = unit.listings.get("tools/list")
            if listing is None:
                return None
            unit.tool_headers = _headers_of(listing)
        return unit.tool_headers.get(name, ())

    def _target_of(self, exchange: Exchange) -> tuple[Unit, str] | None:
        name = exchange.message.param("name")
        server_id = exchange.server_id
        if server_id is not None:
            spec = self.check_server(exchange.principal, server_id, exchange.snapshot)
        else:
            specs = self.visible(exchange.principal, exchange.snapshot)
            listed = self._known("tools/list", specs, exchange)[0]
            route = self._joined("tools/list", listed, {}).routes.get(name) if type(name) is str else None
            if route is None:
                return None
            spec, name = route.spec, route.name
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=spec.isolation == "call")
        return unit, name

    async def learn_tools(self, exchange: Exchange) -> None:
        """Find out what ``tool_headers`` needs. A server that can't say delays its caller by LEARN_LIMIT at most."""
        try:
            deadline = min(exchange.deadline, trio.current_time() + LEARN_LIMIT)
            if exchange.server_id is None:
                await self._resolve("tools/list", str(exchange.message.param("name")), exchange)
                return
            spec = self.check_server(exchange.principal, exchange.server_id, exchange.snapshot)
            unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=spec.isolation == "call")
            try:
                await unit.listing("tools/list", deadline)
            except GatewayError:
                if unit.link is not None:
                    unit.tool_headers = {}  # it runs, but can't say: not asked again before it says that they changed
                raise
        except GatewayError as error:
            # The call itself will meet it, and say so in its own way.
            log.debug("tools could not be listed: %s", error)

    def close(self, client: Client) -> None:
        """A client's session is over."""
        self.supervisor.close_client(client)


def _listed(unit: Unit, exchange: Exchange) -> Reply | Call:
    """A list from the unit, with a slot taken. A modern client may have been claimed more than the server has, before
    that was known (``discover``): what it has none of is an empty list.
    """
    method = exchange.message.method
    capability = "resources" if method.startswith("resources") else method.partition("/")[0]
    if exchange.client.era is not Era.MODERN or capability in unit.facts.get("capabilities", {}):
        return unit.begin(exchange)
    unit.leave()
    return Reply.result(f'{{"{LISTS[method][0]}":[]}}')


def _headers_of(listing: Listing) -> dict[str, tuple[HeaderParameter, ...]]:
    """The header parameters of each tool that has valid ones."""
    found = {}
    for tool in listing.items:
        with suppress(ValueError):
            parameters = parameters_of(tool)
            if parameters:
                found[str(tool.get("name"))] = parameters
    return found


def _by_template(uri: str, merged: Merged) -> Route | None:
    """The route of the first URI template that a URI fits: its literal parts, in order (RFC 6570 level 1 is enough)."""
    for template, route in merged.routes.items():
        head, brace, rest = template.partition("{")
        tail = rest.rpartition("}")[2] if brace else ""
        if brace and uri.startswith(head) and uri.endswith(tail) and len(uri) >= len(head) + len(tail):
            # What stands before the server's own template tells clashing ones apart, here and in every URI made of it.
            return Route(route.spec, uri[len(template) - len(route.name) :])
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
