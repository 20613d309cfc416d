"""From a request to the server that answers it.

A method table says what each method is: answered here, listed, or routed to one server. At a server's own endpoint
(``/servers/ID/...``) names pass through unchanged, unless its catalog entry hides or renames something. Everywhere else
they are looked up in the tables of the caller's face (``views``); what is not in them does not exist.
The fast path, a routed request to a ready server with a free slot, awaits nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from json import loads
from typing import Any, Final

import trio

from gateway.aggregate import EMPTY, ROUTED, Aggregate
from gateway.auth.principal import Principal
from gateway.config.model import ServerSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import LISTS, Listing, Route, shape_of
from gateway.errors import GatewayError, UnknownTarget, UpstreamTimeout
from gateway.exchange import Ask, Call, Client, Exchange, Reply, Target, decline
from gateway.finder import Finder
from gateway.hub import ALL, Audience, Hub, Subscription
from gateway.protocol.eras import LOG_LEVELS, MODERN, Era
from gateway.protocol.headers import HeaderParameter, parameters_of
from gateway.protocol.message import (
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    RESULT,
    build_request,
    decode_request,
    dumps,
)
from gateway.supervisor import Supervisor, Unit
from gateway.views import Face, Views

__all__ = ["Router"]

log = logging.getLogger("gateway_core")

MAX_INSTRUCTIONS: Final = 2000
MAX_ALL_INSTRUCTIONS: Final = 16_000
"""Characters of one server's instructions, and of all together, that a client of many servers is told."""
PONG: Final = Reply.result("{}")
GATEWAY_CAPABILITIES: Final[Mapping[str, Any]] = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
    "completions": {},
    "logging": {},
}
"""What an endpoint of many servers claims: clients freeze what they are told, and servers come and go. What none of
them has is an empty list."""

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
        self.views = Views(supervisor, hub, current)
        self._finder = Finder(self.views)
        self._many = Aggregate(self.views, self._finder, current, self._send)
        self._local: dict[str, Callable[[Exchange], Reply]] = {"ping": lambda exchange: PONG}
        self._subscribed: dict[Client, tuple[Principal, Target]] = {}

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

    def check(self, principal: Principal, target: Target) -> ServerSpec | None:
        """Raises UnknownTarget for an endpoint that does not exist for this caller. A server's has an entry."""
        if type(target) is str:
            return self.check_server(principal, target)
        self.views.face(target, principal)
        return None

    def timeout_of(self, target: Target, snapshot: Snapshot) -> float:
        """Seconds a request may take; inf where the config says 0."""
        spec = snapshot.catalog.by_id.get(target) if type(target) is str else None
        seconds = snapshot.settings.request_timeout_seconds
        if spec is not None and spec.request_timeout_seconds is not None:
            seconds = spec.request_timeout_seconds
        return seconds or float("inf")

    # ------------------------------------------------------------------------------------------------------ handshake
    async def initialize(
        self, client: Client, principal: Principal, target: Target, deadline: float
    ) -> Mapping[str, Any]:
        """What to answer an ``initialize`` with: capabilities, serverInfo, instructions (compat H39).

        A server's own endpoint answers with the server's facts, so the server is started; others with ours.
        Raises UnknownTarget, StartFailed, UpstreamTimeout.
        """
        if type(target) is not str:
            return self._introduction(target, principal)
        spec = self.check_server(principal, target)
        unit = self.supervisor.unit(spec, client, principal)
        unit.hold()
        try:
            with trio.move_on_at(deadline):
                await unit.ready()
                return self._facts(unit.facts, unit.client is not None)
        finally:
            unit.unhold()
        raise UpstreamTimeout(f"Server '{target}' is still starting; try again later")

    def _introduction(self, target: Target, principal: Principal) -> Mapping[str, Any]:
        """What an endpoint of many servers says of itself, with what is known of their instructions."""
        face = self.views.face(target, principal)
        parts = [] if face.plan.view is None else [face.plan.view.description]
        if face.searching:
            parts.append(self._finder.instructions)
        for spec in face.specs:
            facts = self.supervisor.shelf.facts(spec)
            text = facts.get("instructions") if facts is not None else None
            if isinstance(text, str) and text.strip():
                parts.append(f"# {spec.name}\n{text.strip()[:MAX_INSTRUCTIONS]}")
        text = "\n\n".join(filter(None, parts))[:MAX_ALL_INSTRUCTIONS]
        facts = {"capabilities": GATEWAY_CAPABILITIES, "serverInfo": self._info}
        return {**facts, "instructions": text} if text else facts

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

    async def discover(self, client: Client, principal: Principal, target: Target) -> Mapping[str, Any]:
        """What to answer ``server/discover`` with. Starts no server: clients probe with short-lived processes.

        A server that has not said yet what it can is claimed to be able to do everything that we can pass on; what it
        then lacks is an empty list. Raises UnknownTarget.
        """
        if type(target) is not str:
            return self._introduction(target, principal)
        spec = self.check_server(principal, target)
        facts = self.supervisor.shelf.facts(spec)
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

        Waits only for a server to start, a slot to become free, or lists that nobody has made before. Cancelled, it
        leaves nothing in flight.
        """
        message = exchange.message
        method = message.method
        local = self._local.get(method)
        if local is not None:
            return local(exchange)
        target = exchange.target
        if type(target) is str:
            spec = self.check_server(exchange.principal, target, exchange.snapshot)
            if not spec.shaped or not (method in LISTS or method in ROUTED or method == "completion/complete"):
                return await self._send(spec, exchange)
        return await self._many.answer(exchange)

    def dispatch_now(self, exchange: Exchange) -> Reply | Call | None:
        """What ``dispatch`` does where nothing has to be waited for; else None, with nothing done. Raises GatewayError.

        A front that has a usual way without a cancel scope tries this first: what ``dispatch`` waits for, a client may
        take back and wants to hear a sign of life about.
        """
        message = exchange.message
        local = self._local.get(message.method)
        if local is not None:
            return local(exchange)
        target = exchange.target
        if type(target) is not str:
            return self._many.answer_now(exchange)
        if message.method in SPECIAL:
            return None
        spec = self.check_server(exchange.principal, target, exchange.snapshot)
        if spec.isolation == "call":
            return None
        if spec.shaped:
            return self._many.answer_now(exchange)
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
        if not unit.try_enter(exchange.deadline):
            return None
        return _listed(unit, exchange) if message.method in LISTS else unit.begin(exchange)

    async def _send(self, spec: ServerSpec, exchange: Exchange) -> Reply | Call:
        unit = self.supervisor.unit(spec, exchange.client, exchange.principal)
        method = exchange.message.method
        if method in SPECIAL:
            return await SPECIAL[method](self, exchange, unit)
        if not unit.try_enter(exchange.deadline):
            await unit.enter(exchange.deadline, _who(exchange))
        return _listed(unit, exchange) if method in LISTS else unit.begin(exchange)

    # ------------------------------------------------------------------------------ resources/subscribe, setLevel
    async def _subscribe(self, exchange: Exchange, unit: Unit) -> Reply:
        """Many clients, one upstream subscription for each resource (protocol.md section 4.1, resource updates)."""
        uri = exchange.message.param("uri")
        if not isinstance(uri, str):
            return Reply.error(INVALID_PARAMS, "uri is missing")
        if exchange.client.owner is None:
            return Reply.error(METHOD_NOT_FOUND, "resources/subscribe needs a session")
        native = loads((exchange.changes or {}).get("uri", "null")) or uri
        self._subscribed[exchange.client] = exchange.principal, exchange.target
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
            await unit.enter(exchange.deadline, _who(exchange))
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

    # --------------------------------------------------------------------------------------------------- notifications
    def notify(self, exchange: Exchange) -> None:
        """Pass a client's notification on. Never waits and never raises: a server that does not run misses nothing.

        What is between one client and the gateway only (``initialized``, ``cancelled``) is the front's business.
        """
        message = exchange.message
        try:
            face = self.views.face(exchange.target, exchange.principal)
        except UnknownTarget:
            return
        for spec in face.specs:
            if spec.isolation == "call" or (not face.plan.own and spec.isolation == "shared"):
                continue
            unit = self.supervisor.find(spec, exchange.client, exchange.principal)
            link = unit.link if unit is not None else None
            if unit is None or link is None:
                continue
            if message.method == "notifications/roots/list_changed" and (unit.client is None or link.era is Era.MODERN):
                # A shared server was never told of roots, a modern one asks for them when it needs them.
                continue
            link.notify(message.method, message.params_text())

    def subscribe(
        self, target: Target, wake: Callable[[], None], principal: Principal, client: Client | None = None
    ) -> Subscription:
        """Listen to list changes at an endpoint: those of shared servers, of the principal's own, and with ``client``
        of that client's. Told is what changes the lists that the listener sees there.
        """
        audiences: list[Audience] = [(principal, "")]
        if client is not None:
            audiences += [client.key, (principal, client.key)]
        judge = self.views.judge(target, principal, client)
        subscription = self.hub.subscribe(target if type(target) is str else ALL, wake, *audiences, judge=judge)
        self.views.resume(target, principal)
        return subscription

    async def listen(
        self, client: Client, principal: Principal, target: Target, uris: Sequence[str], deadline: float
    ) -> list[str]:
        """Have a client told of updates of these resources, until ``close``: those that their servers honour.

        ``client.owner.mark`` is told. Servers are started for it. Raises UnknownTarget; other faults leave a URI out.
        """
        snapshot = self._current()
        honoured: list[str] = []

        async def one(uri: str) -> None:
            message = decode_request(build_request("0", "resources/subscribe", dumps({"uri": uri})))
            exchange = Exchange(message, principal, snapshot, client, target, deadline)
            with suppress(GatewayError):
                reply = await self.dispatch(exchange)
                if isinstance(reply, Reply) and reply.message.kind is RESULT:
                    honoured.append(uri)

        self.check(principal, target)
        async with trio.open_nursery() as nursery:
            for uri in dict.fromkeys(uris):
                nursery.start_soon(one, uri)
        return [uri for uri in dict.fromkeys(uris) if uri in honoured]

    # -------------------------------------------------------------------------------------------- headers of tool calls
    def tool_headers(self, exchange: Exchange) -> tuple[HeaderParameter, ...] | None:
        """The arguments of a tools/call that must stand in headers, too (2026-07-28, x-mcp-header).

        None while the server's tools are not known: ``learn_tools`` first.
        """
        face = self.views.face(exchange.target, exchange.principal)
        if face.searching:
            return ()
        route = self._target_of(face, exchange)
        if route is None:
            return None
        call = route.spec.isolation == "call"
        unit = self.supervisor.find(route.spec, exchange.client, exchange.principal, listing=call)
        listing = (
            unit.known("tools/list") if unit is not None else self.supervisor.shelf.listing(route.spec, "tools/list")
        )
        if listing is None:
            return () if unit is not None and unit.mute else None
        headers = listing.rendered.get("headers")
        if headers is None:
            headers = listing.rendered["headers"] = _headers_of(listing)
        found: tuple[HeaderParameter, ...] = headers.get(route.name, ())
        return found

    def _target_of(self, face: Face, exchange: Exchange) -> Route | None:
        name = exchange.message.param("name")
        if type(name) is not str:
            return None
        if face.plan.own:
            spec = face.specs[0]
            return Route(spec, shape_of(spec.tools).native(name) or "")
        return self.views.table(face, "tools/list", exchange.client, exchange.principal).routes.get(name)

    async def learn_tools(self, exchange: Exchange) -> None:
        """Find out what ``tool_headers`` needs. A server that can't say delays its caller by LEARN_LIMIT at most."""
        try:
            deadline = min(exchange.deadline, trio.current_time() + LEARN_LIMIT)
            face = self.views.face(exchange.target, exchange.principal)
            if not face.plan.own:
                await self._many.resolve(face, "tools/list", str(exchange.message.param("name")), exchange)
                return
            spec = face.specs[0]
            unit = self.supervisor.unit(spec, exchange.client, exchange.principal, listing=spec.isolation == "call")
            try:
                await unit.listing("tools/list", deadline)
            except GatewayError:
                unit.mute = unit.link is not None  # it runs, but can't say: not asked again before it says otherwise
                raise
        except GatewayError as error:
            # The call itself will meet it, and say so in its own way.
            log.debug("tools could not be listed: %s", error)

    def apply(self, snapshot: Snapshot) -> None:
        """After a reload: nobody is told any more of resources that are hidden now."""
        self.views.apply(snapshot)
        for unit in self.supervisor.units():
            watched = [(uri, *one) for uri, clients in unit.subscribers.items() for one in clients.items()]
            for uri, client, shown in watched:
                principal, target = self._subscribed.get(client, (None, None))
                if principal is None or self._many.sees(target, client, principal, shown):
                    continue
                if unit.unsubscribed(uri, client):
                    with suppress(GatewayError):  # the gateway is shutting down
                        self.supervisor.spawn(partial(unit.unsubscribe, uri))

    def dismiss(self, known: Collection[Principal]) -> None:
        """Nobody else but these can call from now on: what others have a server for is over when they are served."""
        self.supervisor.dismiss(known)

    def close(self, client: Client) -> None:
        """A client's session is over."""
        self._subscribed.pop(client, None)
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


def _who(exchange: Exchange) -> str:
    """Whose request it is, for taking turns."""
    return f"{exchange.principal.subject} {exchange.client.key}"


def _headers_of(listing: Listing) -> dict[str, tuple[HeaderParameter, ...]]:
    """The header parameters of each tool that has valid ones."""
    found = {}
    for tool in listing.items:
        with suppress(ValueError):
            parameters = parameters_of(tool)
            if parameters:
                found[str(tool.get("name"))] = parameters
    return found


SPECIAL: Final[Mapping[str, Callable[[Router, Exchange, Unit], Awaitable[Reply]]]] = {
    "resources/subscribe": Router._subscribe,
    "resources/unsubscribe": Router._unsubscribe,
    "logging/setLevel": Router._set_level,
}
"""Routed requests that leave something to remember."""
