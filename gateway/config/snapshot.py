"""All that a request may read of the configuration, as one immutable value that is swapped whole."""

from __future__ import annotations

import time

import attrs

from gateway.config.model import Catalog, ServerSpec, Settings

__all__ = ["Difference", "Snapshot", "diff", "same"]


@attrs.frozen
class Snapshot:
    """One generation of config and catalog. ``loaded_at`` is Unix time, for people only."""

    settings: Settings = attrs.field(factory=Settings)
    catalog: Catalog = attrs.field(factory=Catalog)
    generation: int = 1
    loaded_at: float = attrs.field(factory=time.time)
    unset: frozenset[str] = frozenset()
    """Variables that the catalog names in ``${}`` and the environment lacks (compat G16)."""

    def server(self, server_id: str) -> ServerSpec | None:
        """The entry of that id, None when there is none."""
        return self.catalog.by_id.get(server_id)


@attrs.frozen
class Difference:
    """What a reload changed, as ids in catalog order."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    modified: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The bracket of compat W9's summary line."""
        return (
            f"added: {len(self.added)}, removed: {len(self.removed)}, "
            f"modified: {len(self.modified)}, unchanged: {len(self.unchanged)}"
        )


def diff(old: Catalog, new: Catalog) -> Difference:
    """Compare two catalogs by value, after substitution."""
    before, after = old.by_id, new.by_id
    return Difference(
        added=tuple(i for i in after if i not in before),
        removed=tuple(i for i in before if i not in after),
        modified=tuple(i for i, s in after.items() if i in before and not same(before[i], s)),
        unchanged=tuple(i for i, s in after.items() if i in before and same(before[i], s)),
    )


def same(one: ServerSpec, other: ServerSpec) -> bool:
    """Whether two entries are written alike. Equal ones may still be shown to clients in different ways."""
    return one == other and one.presentation == other.presentation
