"""Which servers a view has."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from gateway.config.model import ServerSpec, ViewSpec

__all__ = ["servers_of"]


def servers_of(view: ViewSpec, servers: Sequence[ServerSpec]) -> tuple[ServerSpec, ...]:
    """The servers that a view selects, in the catalog's order."""

    def chosen(spec: ServerSpec) -> bool:
        if any(fnmatchcase(spec.id, pattern) for pattern in view.exclude):
            return False
        if not view.servers and not view.tags:
            return True
        named = any(fnmatchcase(spec.id, pattern) for pattern in view.servers)
        return named or not set(view.tags).isdisjoint(spec.tags)

    return tuple(filter(chosen, servers))
