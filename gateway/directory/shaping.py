"""What a catalog entry or a view lets clients see of a list, and as what (README, "Shaping").

A ``Shape`` is a ``Shaping`` for one kind of item, compiled. Everything here is pure: items in, items out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import attrs

from gateway.config.model import Annotations, Shaping, reveal
from gateway.directory.listing import LISTS

__all__ = ["Shape", "shape_of"]

_HINTS: Final = {
    "title": "title",
    "read_only": "readOnlyHint",
    "destructive": "destructiveHint",
    "idempotent": "idempotentHint",
    "open_world": "openWorldHint",
    "audience": "audience",
    "priority": "priority",
}
"""YAML key -> member of ``annotations``."""

_NOTHING: Final = Shaping()
_DOTS: Final = re.compile(r"(?:^|[/\\])\.\.?(?:[/\\?#]|$)")
"""Segments of a path that are another one ("Remove Dot Segments", RFC 3986), also as Windows writes them."""


class Shape:
    """A Shaping, compiled. ``idle`` says that it changes nothing, so that nobody needs to ask it anything; ``hides``
    that there may be things clients must not know of, ``renames`` that names lead to others.
    """

    def __init__(self, shaping: Shaping) -> None:
        self.idle = shaping == _NOTHING
        self.hides = shaping.allow is not None or bool(shaping.deny)
        self.renames = bool(shaping.rename)
        self._allow = None if shaping.allow is None else _any_of(shaping.allow)
        self._deny = _any_of(shaping.deny)
        self._renamed = {name: reveal(text) for name, text in shaping.rename}
        self._native = {shown: name for name, shown in self._renamed.items()}
        # The most particular pattern first: names before wildcards, long before short.
        self._describe = [(_any_of((pattern,)), reveal(text)) for pattern, text in sorted(shaping.describe, key=_rank)]
        self._annotate = [(_any_of((glob,)), _hints(hints)) for glob, hints in sorted(shaping.annotate, key=_rank)]

    def shows(self, name: str) -> bool:
        """Whether clients may know of what is called that."""
        return self._allows(name) and not self.denies(name)

    def _allows(self, name: str) -> bool:
        return self._allow is None or self._allow.fullmatch(name) is not None

    def denies(self, name: str) -> bool:
        """Whether ``deny`` names it."""
        return self._deny.fullmatch(name) is not None

    def admits(self, uri: str) -> bool:
        """Whether a URI that no list has, but a template or a link leads to, may be used.

        Servers take ``/a/../secret`` and ``/%73ecret`` for ``/secret``, so what is denied is denied in these spellings,
        too, and where anything is hidden no path may go back.
        """
        if not self.hides:
            return True
        plain = unquote(uri)
        return not (self.denies(uri) or self.denies(plain) or _DOTS.search(plain))

    def shown(self, method: str, item: Mapping[str, Any], wanted: str = "") -> Mapping[str, Any] | None:
        """An item of the list ``method`` as clients see it; None for a hidden one and for one without a usable name.

        ``wanted`` is the name that it should have had, where it has another one only because that was taken: patterns
        may match either.
        """
        key = LISTS[method][1]
        name = item.get(key)
        if not isinstance(name, str) or not name:
            return None
        if self.idle:
            return item
        names = (name, wanted) if wanted else (name,)
        if any(map(self.denies, names)) or not any(map(self._allows, names)):
            return None
        changes: dict[str, Any] = {}
        if name in self._renamed:
            changes["name"] = self._renamed[name]
        elif key == "name" and name in self._native:
            return None  # the name was given to another one
        text = next((text for pattern, text in self._describe if any(map(pattern.fullmatch, names))), None)
        if text is not None:
            changes["description"] = text
        hints: dict[str, Any] = {}
        for pattern, more in self._annotate:
            if any(map(pattern.fullmatch, names)):
                hints = {**more, **hints}
        if hints:
            own = item.get("annotations")
            changes["annotations"] = {**(own if isinstance(own, dict) else {}), **hints}
        return {**item, **changes} if changes else item

    def native(self, name: str) -> str | None:
        """What the server calls what clients call ``name``; None if they may not know of it. For tools and prompts."""
        own = self._native.get(name)
        if own is None:
            if name in self._renamed:
                return None
            own = name
        return own if self.shows(own) else None


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # fnmatch.translate brings its own anchors; the empty alternative list must match nothing.
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")


def _rank(entry: tuple[str, Any]) -> tuple[bool, int, str]:
    pattern = entry[0]
    return any(sign in pattern for sign in "*?["), -len(pattern), pattern


def _hints(annotations: Annotations) -> dict[str, Any]:
    found = attrs.asdict(annotations)
    return {
        _HINTS[name]: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value is not None
    }


@lru_cache(4096)
def shape_of(shaping: Shaping) -> Shape:
    """The Shape of a Shaping; equal ones are compiled once."""
    return Shape(shaping)
