"""What clients may list, and where a listed name leads.

A ``Listing`` is what one server answered to one list method, drained page by page and kept as raw item texts. A merged
table joins the listings of several servers under names that are unique, at most NAME_LIMIT long and stable (protocol.md
section 5): only the name inside an item is rewritten. Routing looks a name up in the table; names are never split.
Everything here is synchronous; the router fetches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from gateway.config.model import ServerSpec
from gateway.protocol.message import ERROR, Message, build_result, decode_reply, dumps, quote

__all__ = ["LISTS", "NAME_LIMIT", "Listing", "Merged", "Route", "merge", "prefix_of", "with_names"]

UNAVAILABLE: Final = "io.github.open-mcp-gateway/unavailable"
"""The ``_meta`` key under which a merged list names the servers that are not in it, and why."""
NAME_LIMIT: Final = 48
"""Hosts add prefixes of their own, and model APIs cut names at 64 characters."""

LISTS: Final[Mapping[str, tuple[str, str]]] = {
    "tools/list": ("tools", "name"),
    "prompts/list": ("prompts", "name"),
    "resources/list": ("resources", "uri"),
    "resources/templates/list": ("resourceTemplates", "uriTemplate"),
}
"""List method -> (member of the result that holds the items, member of an item that names it)."""


@attrs.frozen
class Listing:
    """The items of one server for one list method, as decoded JSON, in the server's order.

    ``ttl_ms`` and ``public`` say how long and by whom it may be kept, as far as the server has said so.
    """

    method: str
    items: tuple[Mapping[str, Any], ...] = ()
    ttl_ms: int = attrs.field(default=0, eq=False)
    public: bool = attrs.field(default=False, eq=False)


@attrs.frozen
class Route:
    """Where a merged name leads: the server and its own name for the thing."""

    spec: ServerSpec
    name: str


@attrs.frozen
class Merged:
    """One list over several servers: the result as JSON text and decoded, and the way back from each name.

    ``renamed`` holds by server id what is called otherwise here than there (URIs only), ``problems`` a sentence for
    each name that had to be changed beyond its prefix.
    """

    text: str
    result: Mapping[str, Any]
    routes: Mapping[str, Route]
    problems: tuple[str, ...] = ()
    renamed: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict)
    cache: tuple[int, str] = (0, "private")


def prefix_of(spec: ServerSpec) -> str:
    """What stands before a server's names in the merged view: ``ID__`` unless configured."""
    if spec.prefix is None:
        return f"{spec.id}__"
    return spec.prefix


def shorten(name: str, limit: int = NAME_LIMIT) -> str:
    """A name of at most ``limit`` characters: longer ones keep their head and end in a stable 6-digit hash."""
    if len(name) <= limit:
        return name
    import hashlib  # late: it brings OpenSSL, 3 MB, and few names are that long

    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{name[: limit - 7]}_{digest}"


def merge(
    method: str, listings: Iterable[tuple[ServerSpec, Listing]], missing: Mapping[str, str] | None = None
) -> Merged:
    """Join listings in catalog order. ``missing`` names the servers that could not be listed, and why.

    Tools and prompts are prefixed. URIs stay as they are while unique; the later of two equal ones gets its server's id
    as a scheme prefix (``files+file:///x``).
    """
    member, key = LISTS[method]
    by_uri = key != "name"
    routes: dict[str, Route] = {}
    texts: list[str] = []
    items: list[Mapping[str, Any]] = []
    problems: list[str] = []
    renamed: dict[str, dict[str, str]] = {}
    listings = list(listings)
    for spec, listing in listings:
        prefix = "" if by_uri else prefix_of(spec)
        for item in listing.items:
            own = item.get(key)
            if not isinstance(own, str) or not own:
                continue
            name = own if by_uri else shorten(prefix + own)
            if name in routes:
                name = f"{spec.id}+{own}" if by_uri else shorten(f"{spec.id}__{own}")
                problems.append(f"{method}: '{own}' of '{spec.id}' clashes with another server's; it is '{name}'")
                if name in routes:
                    continue
                if by_uri:
                    renamed.setdefault(spec.id, {})[own] = name
            routes[name] = Route(spec, own)
            items.append(item if name == own else {**item, key: name})
            texts.append(dumps(items[-1]))
    result: dict[str, Any] = {member: items}
    meta = ""
    if missing:
        result["_meta"] = {UNAVAILABLE: dict(missing)}
        meta = f',"_meta":{dumps(result["_meta"])}'
    # As long as the shortest of its parts; for everybody only if all are (protocol.md section 5, cache).
    ttl = 0 if missing else min((listing.ttl_ms for _, listing in listings), default=0)
    public = not missing and all(listing.public and spec.isolation == "shared" for spec, listing in listings)
    text = f"{{{quote(member)}:[{','.join(texts)}]{meta}}}"
    cache = (ttl, "public" if public and texts else "private")
    return Merged(text, result, routes, tuple(problems), renamed, cache)


def with_names(message: Message, names: Mapping[str, str]) -> Message:
    """A reply in which resources have the URIs that the client knows (``names``: the server's -> ours), wherever the
    specification has one: contents that were read, links and embedded resources, data of errors.
    """
    if type(message.result) is not dict or not any(uri in message.text for uri in names):
        return message
    result = dict(message.result)
    for member in ("contents", "content", "messages"):
        if type(result.get(member)) is list:
            result[member] = [_named(part, names) for part in result[member]]
    data = result.get("data") if message.kind is ERROR else None
    if type(data) is dict:
        result["data"] = _named(data, names)
    text = dumps(result)
    if message.kind is ERROR:
        return decode_reply(f'{{"jsonrpc":"2.0","id":{message.id_text},"error":{text}}}')
    return decode_reply(build_result(message.id_text, text))


def _named(part: Any, names: Mapping[str, str]) -> Any:
    if type(part) is not dict:
        return part
    found = dict(part)
    if type(part.get("uri")) is str:
        found["uri"] = names.get(part["uri"], part["uri"])
    for member in ("resource", "content"):  # embedded, and what a prompt's message holds
        if type(part.get(member)) is dict:
            found[member] = _named(part[member], names)
    return found
