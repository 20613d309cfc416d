"""One server's answer to one list method, and where the items in it lead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from gateway.config.model import ServerSpec

__all__ = ["LISTS", "LISTS_OF", "Listing", "Route", "topic_of"]

LISTS: Final[Mapping[str, tuple[str, str]]] = {
    "tools/list": ("tools", "name"),
    "prompts/list": ("prompts", "name"),
    "resources/list": ("resources", "uri"),
    "resources/templates/list": ("resourceTemplates", "uriTemplate"),
}
"""List method -> (member of the result that holds the items, member of an item that names it)."""

LISTS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "tools": ("tools/list",),
    "prompts": ("prompts/list",),
    "resources": ("resources/list", "resources/templates/list"),
}
"""Topic, which is also the capability -> the list methods that its change concerns."""


def topic_of(method: str) -> str:
    """The topic of a list method."""
    return "resources" if method.startswith("resources") else method.partition("/")[0]


@attrs.frozen
class Listing:
    """The items of one server for one list method, as decoded JSON, in the server's order.

    ``ttl_ms`` and ``public`` say how long and by whom it may be kept, as far as the server has said so. ``rendered`` is
    merge's: what the items have become in tables.
    """

    method: str
    items: tuple[Mapping[str, Any], ...] = ()
    ttl_ms: int = attrs.field(default=0, eq=False)
    public: bool = attrs.field(default=False, eq=False)
    rendered: dict[Any, Any] = attrs.field(factory=dict, eq=False, repr=False)

    @property
    def terms(self) -> tuple[int, bool]:
        """How long and by whom it may be kept."""
        return self.ttl_ms, self.public


@attrs.frozen
class Route:
    """Where a merged name leads: the server and its own name for the thing. ``text`` is that as JSON, where known."""

    spec: ServerSpec
    name: str
    text: str = attrs.field(default="", eq=False, repr=False)
