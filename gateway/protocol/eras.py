"""The revisions of MCP and what belongs to which: versions, eras, names of headers, methods and ``_meta`` keys.

The two eras are the specification's: LEGACY opens with ``initialize`` and keeps a session, MODERN (from 2026-07-28)
has neither and carries its context in every request's ``_meta``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "HTTP_LEGACY_VERSIONS",
    "LATEST_LEGACY",
    "LEGACY_VERSIONS",
    "META",
    "MODERN_VERSIONS",
    "Era",
    "agree_on",
    "is_modern",
    "name_parameter",
]


class Era(enum.Enum):
    """Which of the two protocols a peer speaks on this leg."""

    LEGACY = "legacy"
    MODERN = "modern"


LEGACY_VERSIONS: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
HTTP_LEGACY_VERSIONS: Final = LEGACY_VERSIONS[1:]
"""Revisions that have Streamable HTTP."""
LATEST_LEGACY: Final = "2025-11-25"
MODERN_VERSIONS: Final = ("2026-07-28",)
META: Final = "io.modelcontextprotocol/"
"""Prefix of the specification's own ``_meta`` keys."""

_NAMED: Final = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "resources/subscribe": "uri",
    "resources/unsubscribe": "uri",
}


def name_parameter(method: str) -> str | None:
    """The member of params that says which tool, prompt or resource a request is about, None where there is none."""
    return _NAMED.get(method)


def agree_on(requested: object) -> str:
    """The revision a legacy server answers ``initialize`` with: the client's, if known, else our latest.

    Both official SDKs do so for unknown and for modern versions too.
    """
    return requested if isinstance(requested, str) and requested in LEGACY_VERSIONS else LATEST_LEGACY


def is_modern(meta: Mapping[str, Any]) -> bool:
    """Whether a request's ``_meta`` makes it a modern one (2026-07-28, base protocol)."""
    return META + "protocolVersion" in meta
