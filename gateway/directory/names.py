"""The names that clients see: legal, short, unique and stable (protocol.md section 5).

A name depends on nothing but the catalog's order and what the servers call their things: not on which server was there
first, nor on this process. So all replicas give the same names, and tomorrow's are today's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from gateway.config.model import ServerSpec, ViewSpec

__all__ = ["NAME_LIMIT", "fit", "prefix_of", "stand_ins"]

NAME_LIMIT: Final = 48
"""Characters, by default: hosts add prefixes of their own, and model APIs cut names at 64."""

_ILLEGAL: Final = re.compile(r"[^A-Za-z0-9_.-]")
_HASH: Final = 6


def prefix_of(spec: ServerSpec, view: ViewSpec | None = None) -> str:
    """What stands before a server's names: the view's prefix, else the server's, else ``ID__``."""
    if view is not None and view.prefix is not None:
        return view.prefix.replace("{id}", spec.id)
    return f"{spec.id}__" if spec.prefix is None else spec.prefix


def fit(name: str, limit: int = NAME_LIMIT) -> str:
    """A legal name of at most ``limit`` characters ("Tool Names": 1 to 128 of ``A-Za-z0-9_.-``).

    A name that is one comes back as it is. Others keep their head, with ``_`` for what is illegal, and end in six
    digits of the whole name's hash, so that two of them that look alike stay two.
    """
    if len(name) <= limit and name and not _ILLEGAL.search(name):
        return name
    return f"{_ILLEGAL.sub('_', name)[: limit - 1 - _HASH]}_{_hash(name)}"


def stand_ins(spec: ServerSpec, own: str, limit: int) -> Iterator[str]:
    """Names for what clashes with another server's, in the order in which to try them; it never ends."""
    yield fit(f"{spec.id}__{own}", limit)
    count = 0
    while True:
        mark = _hash(f"{spec.id}\0{own}\0{count}")
        yield f"{_ILLEGAL.sub('_', own)[: limit - 1 - _HASH]}_{mark}"
        count += 1


def _hash(text: str) -> str:
    import hashlib  # late: it brings OpenSSL, 3 MB, and few names need it

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]
