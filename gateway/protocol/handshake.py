"""The client's side of the opening: what the gateway sends a server first, and what it makes of the answer.

Sans-IO: a link sends what ``opening`` gives it and feeds the reply to ``conclude``. Only the legacy era is opened
today; the probe of protocol.md section 3 (``server/discover`` first) becomes another row here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.errors import StartFailed
from gateway.protocol.eras import LATEST_LEGACY, LEGACY_VERSIONS
from gateway.protocol.message import ERROR, Message, dumps

__all__ = ["INITIALIZED", "conclude", "opening"]

INITIALIZED: Final = "notifications/initialized"


def opening(capabilities: Mapping[str, Any], info: Mapping[str, Any], version: str = LATEST_LEGACY) -> tuple[str, str]:
    """Method and params (JSON text) of the first request to a server: ``initialize`` in all legacy revisions."""
    params = {"protocolVersion": version, "capabilities": dict(capabilities), "clientInfo": dict(info)}
    return "initialize", dumps(params)


def conclude(reply: Message) -> Mapping[str, Any]:
    """The facts of a server from its reply to the opening: protocolVersion, capabilities, serverInfo, instructions.

    Raises StartFailed, saying what the server answered, when this is no usable handshake.
    """
    if reply.kind is ERROR:
        code, text = reply.result.get("code"), str(reply.result.get("message", ""))[:300]
        modern = code in (-32020, -32021, -32022)
        hint = " (it speaks only 2026-07-28, which this build does not bridge yet)" if modern else ""
        raise StartFailed(f"handshake refused: {text} ({code}){hint}")
    facts = reply.result
    if type(facts) is not dict:
        raise StartFailed("handshake failed: the result of initialize is no object")
    version = facts.get("protocolVersion")
    if version not in LEGACY_VERSIONS:
        raise StartFailed(
            f"handshake failed: the server speaks protocol version {str(version)[:40]!r}; "
            f"supported are {', '.join(LEGACY_VERSIONS)}"
        )
    capabilities = facts.get("capabilities")
    if capabilities is None:
        capabilities = {}
    if type(capabilities) is not dict:
        raise StartFailed("handshake failed: capabilities is no object")
    info = facts.get("serverInfo")
    return {
        **facts,
        "capabilities": capabilities,
        "serverInfo": info if type(info) is dict else {"name": "unknown", "version": "0"},
    }
