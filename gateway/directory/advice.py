"""What is legal in a catalog and hardly meant: names that clients will not find, patterns that match nothing.

Known is what servers have listed before; of what nobody has listed nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import attrs

from gateway.config.model import Catalog, ServerSpec, Shaping, ViewSpec
from gateway.directory.listing import LISTS, LISTS_OF, Listing
from gateway.directory.merge import Plan, merge, shortened
from gateway.directory.names import prefix_of
from gateway.directory.selection import servers_of

__all__ = ["advise"]

Known = Callable[[ServerSpec, str], Listing | None]
"""What a server has answered to a list method."""

ROOM: Final = 16
"""Characters that a prefix should leave for the name behind it."""
BRIEF: Final = 3
"""Names of one server that are told one by one; of more only the number is told."""


def advise(catalog: Catalog, limit: int, known: Known) -> list[str]:
    """Sentences for people, each once. ``limit`` is ``tool_name_limit``."""
    found = dict.fromkeys(_dead_patterns_of_servers(catalog, known))
    for view in (None, *catalog.views):
        specs = catalog.servers if view is None else servers_of(view, catalog.servers)
        plan = Plan(view, limit=limit)
        where = f"View '{view.name}': " if view is not None else ""
        found |= dict.fromkeys(where + text for text in _names(specs, plan, known))
        if view is not None:
            found |= dict.fromkeys(where + text for text in _dead_patterns_of_view(view, specs, limit, known))
    return list(found)


def _names(specs: Sequence[ServerSpec], plan: Plan, known: Known) -> Iterator[str]:
    for spec in specs:
        prefix = prefix_of(spec, plan.view)
        if len(prefix) > plan.limit - ROOM:
            yield (
                f"Server '{spec.id}': its prefix '{prefix}' takes {len(prefix)} of the {plan.limit} characters that a "
                "name may have (tool_name_limit); a shorter prefix keeps names readable"
            )
    for method in LISTS:
        pairs = [(spec, listing) for spec in specs if (listing := known(spec, method)) is not None]
        yield from merge(method, pairs, plan).problems
        for spec, listing in pairs:
            changed = shortened(spec, listing, plan)
            for wanted, name in changed[:BRIEF]:
                yield (
                    f"Server '{spec.id}': '{wanted}' is too long (tool_name_limit is {plan.limit}) or not legal; "
                    f"it is '{name}'"
                )
            if changed[BRIEF:]:
                yield f"Server '{spec.id}': so are {len(changed) - BRIEF} more names"


def _dead_patterns_of_servers(catalog: Catalog, known: Known) -> Iterator[str]:
    for spec in catalog.servers:
        for topic, methods in LISTS_OF.items():
            lists = {method: listing for method in methods if (listing := known(spec, method)) is not None}
            if len(lists) == len(methods):
                names = [name for method, listing in lists.items() for name in _keys(method, listing.items)]
                for text in _dead(getattr(spec, topic), topic, names):
                    yield f"Server '{spec.id}': {text}"


def _dead_patterns_of_view(
    view: ViewSpec, specs: Sequence[ServerSpec], limit: int, known: Known
) -> Iterator[str]:
    """A view's patterns meet the names of the view, before the view itself has hidden or renamed any."""
    plain = Plan(attrs.evolve(view, tools=Shaping(), prompts=Shaping(), resources=Shaping()), limit=limit)
    for topic, methods in LISTS_OF.items():
        names: list[str] = []
        for method in methods:
            pairs = [(spec, listing) for spec in specs if (listing := known(spec, method)) is not None]
            if len(pairs) < len(specs):
                return
            names += _keys(method, merge(method, pairs, plain).items)
        yield from _dead(getattr(view, topic), topic, names)


def _keys(method: str, items: Sequence[Mapping[str, object]]) -> list[str]:
    key = LISTS[method][1]
    return [name for item in items if isinstance(name := item.get(key), str)]


def _dead(shaping: Shaping, topic: str, names: Sequence[str]) -> Iterator[str]:
    written = [
        *(("allow", pattern) for pattern in shaping.allow or ()),
        *(("deny", pattern) for pattern in shaping.deny),
        *(("describe", pattern) for pattern, _ in shaping.describe),
        *(("annotate", pattern) for pattern, _ in shaping.annotate),
    ]
    for key, pattern in written:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{topic}.{key}: {pattern!r} matches nothing that is listed"
    for name, _ in shaping.rename:
        if name not in names:
            yield f"{topic}.rename: {name!r} is not listed"
