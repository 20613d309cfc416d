"""Who is asking. The one value that says it, made by ``auth`` and read everywhere else."""

from __future__ import annotations

import attrs

__all__ = ["ANONYMOUS", "Principal"]


@attrs.frozen(cache_hash=True)
class Principal:
    """A caller, after authentication.

    ``subject`` tells callers apart and is safe to log. ``namespaces`` None means every namespace of the catalog.
    """

    subject: str
    tenant: str = "default"
    namespaces: frozenset[str] | None = None

    def may_see(self, namespace: str) -> bool:
        """Whether servers of this catalog namespace exist for the caller."""
        return self.namespaces is None or namespace in self.namespaces


ANONYMOUS = Principal("anonymous")
"""Everybody, where the config sets no key."""
