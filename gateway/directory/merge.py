"""Joining the lists of several servers into the one that clients see.

A merged table gives every item a name that is unique, short and stable (``names``), shows what shaping lets through
(``shaping``), and knows the way back from each name: routing looks a name up, names are never split. Items whose name
stays as it is are not touched. Everything here is synchronous and pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple
from zlib import crc32

import attrs

from gateway.config.model import ServerSpec, Shaping, ViewSpec
from gateway.directory.listing import LISTS, Listing, Route, topic_of
from gateway.directory.names import NAME_LIMIT, fit, prefix_of, stand_ins
from gateway.directory.shaping import Shape, shape_of
from gateway.protocol.message import ERROR, Message, build_result, decode_reply, dumps, quote

__all__ = ["UNAVAILABLE", "Merged", "Plan", "merge", "render", "shortened", "with_names"]

UNAVAILABLE: Final = "io.github.open-mcp-gateway/unavailable"
"""The ``_meta`` key under which a merged list names the servers that are not in it, and why."""


@attrs.frozen
class Plan:
    """How lists are joined: for a view of many servers, or with ``own`` for the endpoint of a single one, whose names
    have no prefix.
    """

    view: ViewSpec | None = None
    own: bool = False
    limit: int = NAME_LIMIT

    def shape(self, topic: str) -> Shape:
        """What the view itself hides and changes."""
        shaping: Shaping = Shaping() if self.view is None else getattr(self.view, topic)
        return shape_of(shaping)


@attrs.frozen
class Merged:
    """One list over several servers: its items as decoded JSON and as texts, and the way back from each name.

    ``origins`` has the server's id for each item. ``renamed`` holds by server id what is called otherwise here than
    there (URIs only), ``problems`` a sentence for each name that had to be changed beyond its prefix. ``cache`` says
    how long the list may be kept, in ms, and by whom.
    """

    method: str
    items: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    origins: Sequence[str]
    routes: Mapping[str, Route]
    problems: tuple[str, ...] = ()
    renamed: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict)
    cache: tuple[int, str] = (0, "private")
    text: str = attrs.field(init=False)
    result: Mapping[str, Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        text, result = self.page(0, len(self.texts))
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "result", result)

    @cached_property
    def mark(self) -> str:
        """What tells tables apart. The same content has the same mark, on every replica."""
        text = self.text.encode("utf-8", "surrogatepass")
        return f"{crc32(text):08x}{len(text):x}"

    def page(
        self, start: int, end: int, cursor: str | None = None, missing: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """A result of the list method, as JSON text and decoded: items ``start`` to ``end``, and where to go on.

        ``missing`` names the servers that could not be listed, and why.
        """
        member = LISTS[self.method][0]
        result: dict[str, Any] = {member: self.items[start:end]}
        text = f"{{{quote(member)}:[{','.join(self.texts[start:end])}]"
        if cursor is not None:
            result["nextCursor"] = cursor
            text += f',"nextCursor":{quote(cursor)}'
        if missing:
            result["_meta"] = {UNAVAILABLE: dict(missing)}
            text += f',"_meta":{dumps(result["_meta"])}'
        return text + "}", result


class _Joining:
    """A merged table while it is made."""

    def __init__(self, method: str, plan: Plan) -> None:
        self.method = method
        self.plan = plan
        self.shape = plan.shape(topic_of(method))
        self.by_uri = LISTS[method][1] != "name"
        self.key = LISTS[method][1]
        self.routes: dict[str, Route] = {}
        self.items: list[Mapping[str, Any]] = []
        self.texts: list[str] = []
        self.origins: list[str] = []
        self.problems: list[str] = []
        self.renamed: dict[str, dict[str, str]] = {}

    def add(self, spec: ServerSpec, listing: Listing) -> None:
        """Put one server's items behind those that are there."""
        for thing in render(spec, listing, self.plan):
            own, _, _, item, text = thing
            name = item[self.key]
            if name in self.routes:
                moved = self._clash(spec, thing)
                if moved is None:
                    continue
                name, item, text = moved[self.key], moved, dumps(moved)
            self.routes[name] = Route(spec, own, dumps(own))
            self.items.append(item)
            self.texts.append(text)
            self.origins.append(spec.id)

    def _clash(self, spec: ServerSpec, thing: _Thing) -> Mapping[str, Any] | None:
        """What has a name that is taken, under another one: nothing is dropped (protocol.md section 5). None where the
        view hides it: its patterns meet the name that it should have had as well as the one that clients would see, so
        that nothing that is hidden appears because another server has come to have the like.
        """
        wanted = thing.item[self.key]
        name = self._free(spec, thing)
        if self.by_uri:
            self.renamed.setdefault(spec.id, {})[thing.own] = name
        item = self.shape.shown(self.method, {**thing.base, self.key: name}, thing.base[self.key])
        if item is None:
            return None
        if item[self.key] != name:
            name = fit(item[self.key], self.plan.limit)
            item = {**item, self.key: name if name not in self.routes else self._free(spec, thing)}
        self.problems.append(
            f"{self.method}: '{wanted}' of '{spec.id}' clashes with another server's; it is '{item[self.key]}'"
        )
        return item

    def _free(self, spec: ServerSpec, thing: _Thing) -> str:
        if not self.by_uri:
            return next(name for name in stand_ins(spec, thing.short, self.plan.limit) if name not in self.routes)
        name = f"{spec.id}+{thing.own}"
        while name in self.routes:
            name = f"{spec.id}+{name}"
        return name


class _Thing(NamedTuple):
    """What one item of a listing becomes in a table.

    own     what its server calls it
    short   what its entry calls it; no prefix
    base    the item as it is before the view hides and changes anything
    item    the item as clients see it, and ``text`` is its text
    """

    own: str
    short: str
    base: Mapping[str, Any]
    item: Mapping[str, Any]
    text: str


MAX_LOOKS: Final = 64
"""Ways to show one listing that are kept: each view may have its own, and every edit of the catalog makes another."""


def render(spec: ServerSpec, listing: Listing, plan: Plan) -> Sequence[_Thing]:
    """What one listing becomes in a table.

    Kept with the listing: a change of one server must not have the items of all others written again. It is most of
    the work of a table, and can be done before anybody asks for one.
    """
    method = listing.method
    key = LISTS[method][1]
    by_uri = key != "name"
    topic = topic_of(method)
    own_shape, shape = shape_of(getattr(spec, topic)), plan.shape(topic)
    prefix = "" if by_uri or plan.own else prefix_of(spec, plan.view)
    look = (own_shape, shape, prefix, plan.own, plan.limit)
    if look in listing.rendered:
        kept: Sequence[_Thing] = listing.rendered[look]
        return kept
    found: dict[str, _Thing] = {}
    for item in listing.items:
        shown = own_shape.shown(method, item)
        if shown is None or item[key] in found:
            continue  # of two items with one name only one can be reached, and that is the first
        own, short = item[key], shown[key]
        exact = by_uri or plan.own
        name = short if exact else fit(prefix + short, plan.limit)
        base = shown if short == name else {**shown, key: name}
        visible = shape.shown(method, base)
        if visible is None:
            continue
        if visible[key] != name and not exact:
            visible = {**visible, key: fit(visible[key], plan.limit)}
        found[own] = _Thing(own, short, base, visible, dumps(visible))
    rendered = tuple(found.values())
    while len(listing.rendered) >= MAX_LOOKS:
        del listing.rendered[next(iter(listing.rendered))]
    listing.rendered[look] = rendered
    return rendered


def merge(method: str, listings: Iterable[tuple[ServerSpec, Listing]], plan: Plan | None = None) -> Merged:
    """Join listings, in this order.

    Tools and prompts are prefixed. URIs stay as they are while unique; the later of two equal ones gets its server's id
    as a scheme prefix (``files+file:///x``).
    """
    joining = _Joining(method, plan or Plan())
    listings = list(listings)
    for spec, listing in listings:
        joining.add(spec, listing)
    # As long as the shortest of its parts; for everybody only if all are (protocol.md section 5, cache).
    ttl = min((listing.ttl_ms for _, listing in listings), default=0)
    public = all(listing.public and spec.isolation == "shared" for spec, listing in listings)
    return Merged(
        method,
        joining.items,
        joining.texts,
        joining.origins,
        joining.routes,
        tuple(joining.problems),
        joining.renamed,
        (ttl, "public" if public and joining.texts else "private"),
    )


def shortened(spec: ServerSpec, listing: Listing, plan: Plan) -> list[tuple[str, str]]:
    """What is too long or not legal once its prefix stands before it: the name it should have, and the one it has."""
    key, shape = LISTS[listing.method][1], shape_of(getattr(spec, topic_of(listing.method)))
    shown = (shape.shown(listing.method, item) for item in listing.items)
    wanted = [prefix_of(spec, plan.view) + item["name"] for item in shown if item is not None] if key == "name" else []
    return [(name, fit(name, plan.limit)) for name in wanted if fit(name, plan.limit) != name]


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
