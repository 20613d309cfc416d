"""The revisions of MCP and what belongs to which: versions, eras, names of headers, methods and ``_meta`` keys.

The two eras are the specification's: LEGACY opens with ``initialize`` and keeps a session, MODERN (from 2026-07-28)
has neither and carries its context in every request's ``_meta``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "CLIENT_CAPABILITIES",
    "CLIENT_INFO",
    "HEADER_MISMATCH",
    "HTTP_LEGACY_VERSIONS",
    "INPUT_METHODS",
    "LATEST_LEGACY",
    "LEGACY_VERSIONS",
    "LOG_LEVEL",
    "LOG_LEVELS",
    "META",
    "MISSING_CAPABILITY",
    "MODERN",
    "MODERN_VERSIONS",
    "NO_RESOURCE",
    "PROTOCOL_VERSION",
    "REMOVED",
    "SERVER_INFO",
    "SUBSCRIPTION_ID",
    "UNSUPPORTED_VERSION",
    "URL_ELICITATION",
    "Era",
    "agree_on",
    "is_modern",
    "level_at_least",
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
MODERN: Final = "2026-07-28"
MODERN_VERSIONS: Final = (MODERN,)

META: Final = "io.modelcontextprotocol/"
"""Prefix of the specification's own ``_meta`` keys."""
PROTOCOL_VERSION: Final = META + "protocolVersion"
CLIENT_INFO: Final = META + "clientInfo"
CLIENT_CAPABILITIES: Final = META + "clientCapabilities"
LOG_LEVEL: Final = META + "logLevel"
SUBSCRIPTION_ID: Final = META + "subscriptionId"
SERVER_INFO: Final = META + "serverInfo"

HEADER_MISMATCH: Final = -32020
MISSING_CAPABILITY: Final = -32021
UNSUPPORTED_VERSION: Final = -32022
NO_RESOURCE: Final = -32002
"""Legacy only; the modern era says -32602 with ``data.uri``."""
URL_ELICITATION: Final = -32042
"""Legacy only (2025-11-25): the client must open the URLs in ``data.elicitations`` and call again."""

INPUT_METHODS: Final = frozenset(("tools/call", "prompts/get", "resources/read"))
"""Requests that a modern server may answer with ``input_required``."""
REMOVED: Final = frozenset(
    ("initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe")
)
"""Requests that the modern era does not have."""
LOG_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

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


def level_at_least(level: object, wanted: object) -> bool:
    """Whether a log line of ``level`` is wanted by who asked for ``wanted``. Unknown levels are."""
    if level not in LOG_LEVELS or wanted not in LOG_LEVELS:
        return True
    return LOG_LEVELS.index(str(level)) >= LOG_LEVELS.index(str(wanted))


def is_modern(meta: Mapping[str, Any]) -> bool:
    """Whether a request's ``_meta`` makes it a modern one (2026-07-28, base protocol)."""
    return META + "protocolVersion" in meta
