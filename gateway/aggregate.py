"""Answering at an endpoint of many servers, and at one of a server of which something is hidden or renamed.

Names are looked up in the tables of the caller's face (``views``); what is not in them does not exist. A request that
is routed goes to its server under the server's own name for the thing, and its reply comes back in the client's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from gateway.auth.principal import Principal
from gateway.config.model import ServerSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import LISTS, Merged, Route, shape_of, topic_of, with_names
from gateway.errors import GatewayError, ServerProtocolError, UnknownTarget, UpstreamTimeout
from gateway.exchange import Call, Client, Exchange, Reply, Target
from gateway.finder import Finder
from gateway.protocol.eras import LOG_LEVELS, NO_RESOURCE, Era
from gateway.protocol.message import INVALID_PARAMS, METHOD_NOT_FOUND, Message, dumps
from gateway.protocol.translate import to_legacy
from gateway.supervisor import Unit
from gateway.views import Face, Views

__all__ = ["EMPTY", "ROUTED", "Aggregate"]

LEVEL_TIMEOUT: Final = 5.0
"""Seconds that a server may take to accept a log level."""
EMPTY: Final = Reply.result("{}")
NONE: Final[Mapping[str, str]] = {}

ROUTED: Final[Mapping[str, tuple[str, str, int]]] = {
    "tools/call": ("tools/list", "name", INVALID_PARAMS),
    "prompts/get": ("prompts/list", "name", INVALID_PARAMS),
    "resources/read": ("resources/list", "uri", NO_RESOURCE),
    "resources/subscribe": ("resources/list", "uri", NO_RESOURCE),
    "resources/unsubscribe": ("resources/list", "uri", NO_RESOURCE),
}
"""Method -> (list that names its target, member of params that holds the name, code for an unknown one)."""


class Aggregate:
    """Answers requests by what their callers see. ``send`` takes a request to one server, waiting as it must."""

    def __init__(
        self,
        views: Views,
        finder: Finder,
        current: Callable[[], Snapshot],
        send: Callable[[ServerSpec, Exchange], Awaitable[Reply | Call]],
    ) -> None:
        self.views = views
        self.supervisor = views.supervisor
        self._finder = finder
        self._current = current
        self._send = send

    def answer_now(self, exchange: Exchange) -> Reply | Call | None:
        """The usual requests to a face, where nothing has to be waited for; None for all others."""
        message = exchange.message
        method = message.method
        face = self.views.face(exchange.target, exchange.principal)
        if face.searching and method.startswith("tools/"):
            return None
        if method == "tools/call" or method == "prompts/get":
            name = message.param("name")
            table = self.views.table(face, ROUTED[method][0], exchange.client, exchange.principal)
            route = table.routes.get(name) if type(name) is str else None
            if route is None or route.spec.isolation == "call":
                return None
            self._prepare(face, route, exchange, "name", name)
            unit = self.supervisor.unit(route.spec, exchange.client, exchange.principal)
            return unit.begin(exchange) if unit.try_enter(exchange.deadline) else None
        if method not in LISTS:
            return None
        table = self.views.table(face, method, exchange.client, exchange.principal)
        if not face.complete[method] or message.param("cursor") is not None:
            return None
        return self._page(face, table, exchange)

    async def answer(self, exchange: Exchange) -> Reply | Call:
        """Answer a request, or send it to its server. Raises GatewayError. Waits as ``Router.dispatch`` does."""
        face = self.views.face(exchange.target, exchange.principal)
        message = exchange.message
        method = message.method
        if method in LISTS:
            return await self._list(face, exchange)
        if method == "logging/setLevel":
            return await self._set_level(face, exchange)
        if method == "completion/complete":
            return await self._complete(face, exchange)
        method_of_list, key, absent = ROUTED.get(method, ("", "", 0))
        if not method_of_list:
            return Reply.error(METHOD_NOT_FOUND, f"Method not found: {method}")
        name = message.param(key)
        if not isinstance(name, str):
            return Reply.error(INVALID_PARAMS, f"params.{key} must be a string")
        if face.searching and method == "tools/call":
            found = await self._finder.call(face, name, exchange)
            if isinstance(found, Reply):
                return found
            name = found
        route = await self.resolve(face, method_of_list, name, exchange)
        if route is not None:
            self._prepare(face, route, exchange, key, name)
            return await self._send(route.spec, exchange)
        if face.searching and method == "tools/call":
            return self._finder.unknown(name)
        what = "Resource" if key == "uri" else "Prompt" if method_of_list == "prompts/list" else "Tool"
        return Reply.error(absent, f"{what} '{name[:200]}' not found", {"uri": name} if key == "uri" else None)

    def _prepare(self, face: Face, route: Route, exchange: Exchange, key: str, name: str) -> None:
        """Have the server called by its own names, within its own time, and the client told of its reply by ours."""
        spec = route.spec
        if route.name != exchange.message.param(key):
            own = route.text or dumps(route.name)
            exchange.changes = {key: own} if exchange.changes is None else {**exchange.changes, key: own}
        if spec.request_timeout_seconds is not None and not face.plan.own:
            exchange.deadline = trio.current_time() + (spec.request_timeout_seconds or float("inf"))
        # Made even if nobody has listed resources: the first link to one must have the right name.
        resources = self.views.table(face, "resources/list", exchange.client, exchange.principal)
        names: Mapping[str, str] = resources.renamed.get(spec.id, NONE) if resources.renamed else NONE
        if key == "uri" and name != route.name:
            names = {**names, route.name: name}
        exchange.rewrite = partial(self._reworded, face, spec, names, exchange.client, exchange.principal)

    async def resolve(self, face: Face, method: str, name: str, exchange: Exchange) -> Route | None:
        """Where a name leads. What is known already answers first, so one dead server delays nobody else.

        Raises the fault of the one server that could have it, if that can't be listed.
        """
        by_uri = LISTS[method][1] != "name"
        if _open(face, method):
            return Route(face.specs[0], name)
        client, principal = exchange.client, exchange.principal
        route = self._known_route(face, method, name, client, principal)
        if route is not None:
            return route
        suspects = list(face.specs) if face.plan.own else [] if by_uri else self.views.suspects(face, method, name)
        missing = await self.views.listed(
            face, method, client, principal, exchange.deadline, only=suspects if suspects else None
        )
        if by_uri:
            await self.views.listed(face, "resources/templates/list", client, principal, exchange.deadline)
        route = self._known_route(face, method, name, client, principal)
        fault = missing.get(suspects[0].id) if suspects and route is None else None
        if fault is not None:
            raise fault.anew() from fault
        return route

    def _known_route(self, face: Face, method: str, name: str, client: Client, principal: Principal) -> Route | None:
        """The way back from a name, by what is known. Of resources also by templates, and by links seen in results."""
        route = self.views.table(face, method, client, principal).routes.get(name)
        if route is not None or method != "resources/list":
            return route
        shape = face.plan.shape("resources")
        route = _by_template(name, self.views.table(face, "resources/templates/list", client, principal))
        if route is None:
            route = face.links.get(name)
            if route is None or not shape_of(route.spec.resources).shows(route.name):
                return None
            if not (shape.shows(name) or shape.shows(route.name)):
                return None
        # A view's patterns meet what clashes under both names, as in its lists.
        admitted = shape_of(route.spec.resources).admits(route.name) and shape.admits(name) and shape.admits(route.name)
        return route if admitted else None

    def sees(self, target: Target, client: Client, principal: Principal, uri: str) -> bool:
        """Whether a resource that this client has used there is one that it may still know of."""
        try:
            face = self.views.face(target, principal)
        except UnknownTarget:
            return False
        return _open(face, "resources/list") or (
            self._known_route(face, "resources/list", uri, client, principal) is not None
        )

    async def _complete(self, face: Face, exchange: Exchange) -> Reply | Call:
        ref = exchange.message.param("ref")
        if not isinstance(ref, dict):
            return Reply.error(INVALID_PARAMS, "params.ref must be an object")
        method, key = (
            ("prompts/list", "name") if ref.get("type") == "ref/prompt" else ("resources/templates/list", "uri")
        )
        name = ref.get(key)
        route = await self.resolve(face, method, name, exchange) if isinstance(name, str) else None
        if route is None:
            return Reply.error(INVALID_PARAMS, f"Unknown reference {str(name)[:200]!r}")
        exchange.changes = {"ref": dumps({**ref, key: route.name})}
        return await self._send(route.spec, exchange)

    async def _set_level(self, face: Face, exchange: Exchange) -> Reply:
        """Remembered, and told to the client's own legacy servers that run; others are told when they start."""
        level = exchange.message.param("level")
        client = exchange.client
        if level not in LOG_LEVELS:
            return Reply.error(INVALID_PARAMS, f"level must be one of {', '.join(LOG_LEVELS)}")
        client.set_log_level(level)

        async def tell(unit: Unit) -> None:
            link = unit.link
            if link is not None and link.era is Era.LEGACY and "logging" in unit.facts.get("capabilities", {}):
                with suppress(GatewayError):
                    await link.request("logging/setLevel", dumps({"level": level}), timeout=LEVEL_TIMEOUT)

        async with trio.open_nursery() as nursery:
            for spec in face.isolated:
                unit = self.supervisor.find(spec, client, exchange.principal)
                if unit is not None and unit.client is not None:
                    nursery.start_soon(tell, unit)
        return EMPTY

    def _reworded(
        self,
        face: Face,
        spec: ServerSpec,
        names: Mapping[str, str],
        client: Client,
        principal: Principal,
        message: Message,
    ) -> Message:
        """A reply on its way to the client: resources have the URIs that it knows, and the gateway remembers the links
        in it, which may lead to what no list has.

        A URI that leads to another server already gets this one's id before it, as in lists.
        """
        if '"resource' in message.text:
            for uri, link in _mentioned(message.result):
                if uri in names:
                    continue
                name = uri
                while True:
                    known = self._known_route(face, "resources/list", name, client, principal)
                    if known is None or (known.spec.id, known.name) == (spec.id, uri):
                        break
                    name = f"{spec.id}+{name}"
                if link or name != uri:
                    face.saw(name, Route(spec, uri))
                if name != uri:
                    names = {**names, uri: name}
        return with_names(message, names) if names else message

    # ---------------------------------------------------------------------------------------------------------- lists
    async def _list(self, face: Face, exchange: Exchange) -> Reply:
        """One page of a list: of every server that could be listed in time, the others named."""
        method, client, principal = exchange.message.method, exchange.client, exchange.principal
        if face.searching and method == "tools/list":
            self.views.warm(face, client, principal)
            return self._page(face, self._finder.table, exchange)
        cursor = exchange.message.param("cursor")
        if cursor is not None:
            return self._next_page(face, exchange, cursor)
        own = face.specs if face.plan.own else None
        missing = await self.views.listed(face, method, client, principal, exchange.deadline, only=own)
        table = self.views.table(face, method, client, principal)
        dead = [fault for fault in missing.values() if not isinstance(fault, UpstreamTimeout)]
        if missing and face.plan.own:
            fault = missing[face.specs[0].id]
            raise fault.anew() from fault
        if missing and len(dead) == len(face.specs):
            reasons = "; ".join(f"{id}: {fault.message}" for id, fault in missing.items())
            raise ServerProtocolError(f"No server could be listed: {reasons}", code=-32603)
        return self._page(face, table, exchange, {id: fault.message for id, fault in missing.items()})

    def _next_page(self, face: Face, exchange: Exchange, cursor: Any) -> Reply:
        """Pages are of one table, whatever has changed since the first: nothing comes twice, nothing is left out."""
        method = exchange.message.method
        mark, dot, start = cursor.partition(".") if isinstance(cursor, str) else ("", "", "")
        client, principal = exchange.client, exchange.principal
        table: Merged | None = self.views.table(face, method, client, principal)
        assert table is not None
        if table.mark != mark:
            table = face.by_mark(method, mark)
        if table is None or not dot or not start.isascii() or not start.isdigit() or int(start) >= len(table.texts):
            return Reply.error(INVALID_PARAMS, "Invalid cursor: that list is gone; list again from the beginning")
        return self._page(face, table, exchange, start=int(start))

    def _page(
        self,
        face: Face,
        table: Merged,
        exchange: Exchange,
        missing: Mapping[str, str] | None = None,
        start: int = 0,
    ) -> Reply:
        client, method = exchange.client, exchange.message.method
        size = self._current().settings.list_page_size
        key = ("reply", method, client.era, client.version)
        kept = face.kept.get(key)
        if not missing and not start and kept is not None and kept[0] is table and kept[1] == size:
            reply: Reply = kept[2]
            return reply
        end = start + size
        cursor = None
        if end < len(table.texts):
            cursor = f"{table.mark}.{end}"
            face.keep(table)
        whole = start == 0 and cursor is None and not missing
        text, result = (table.text, table.result) if whole else table.page(start, end, cursor, missing)
        reply = Reply.result(text, result)
        reply.cache = (0, "private") if missing else table.cache
        if client.era is Era.LEGACY:
            reply.message = to_legacy(method, reply.message, client.version)
        if not missing and not start:
            reply.kept = True
            face.kept[key] = (table, size, reply)
        return reply


def _open(face: Face, method: str) -> bool:
    """Whether names need no table there: at a server's own endpoint they are for the server to know, unless its entry
    hides or renames something of the kind. Then what is not listed is unknown like what is hidden.
    """
    if not face.plan.own:
        return False
    shape = shape_of(getattr(face.specs[0], topic_of(method)))
    return not (shape.hides or (shape.renames and LISTS[method][1] == "name"))


def _mentioned(result: Any) -> Iterator[tuple[str, bool]]:
    """The URIs of resources in the content of a result, and of each whether it is a link to one."""
    if type(result) is not dict:
        return
    parts = list(content) if type(content := result.get("content")) is list else []
    messages = result.get("messages")
    parts += [message.get("content") for message in messages if type(message) is dict] if type(messages) is list else []
    for part in parts:
        if type(part) is not dict:
            continue
        link = part.get("type") == "resource_link"
        uri = part.get("uri") if link else part["resource"].get("uri") if type(part.get("resource")) is dict else None
        if type(uri) is str:
            yield uri, link


def _by_template(uri: str, merged: Merged) -> Route | None:
    """The route of the first URI template that a URI fits: its literal parts, in order (RFC 6570 level 1 is enough)."""
    for template, route in merged.routes.items():
        head, brace, rest = template.partition("{")
        tail = rest.rpartition("}")[2] if brace else ""
        if brace and uri.startswith(head) and uri.endswith(tail) and len(uri) >= len(head) + len(tail):
            # What stands before the server's own template tells clashing ones apart, here and in every URI made of it.
            return Route(route.spec, uri[len(template) - len(route.name) :])
    return None
