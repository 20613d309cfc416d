"""The client's side of the opening: what the gateway sends a server first, and what it makes of the answer.

Sans-IO: a link sends what ``probe`` or ``opening`` gives it and feeds the reply to ``discovered`` or ``conclude``. The
order in which the eras are tried, and what silence or the end of a process means, is the link's (protocol.md section 3,
"Probing an upstream"). Only ``server/discover`` decides: some legacy servers answer anything else before a handshake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.errors import StartFailed
from gateway.protocol.eras import (
    CLIENT_CAPABILITIES,
    CLIENT_INFO,
    HEADER_MISMATCH,
    LATEST_LEGACY,
    LEGACY_VERSIONS,
    MISSING_CAPABILITY,
    MODERN,
    PROTOCOL_VERSION,
    SERVER_INFO,
    UNSUPPORTED_VERSION,
)
from gateway.protocol.message import ERROR, METHOD_NOT_FOUND, Message, dumps

__all__ = ["DISCOVER", "INITIALIZED", "conclude", "discovered", "opening", "probe", "wants_modern"]

DISCOVER: Final = "server/discover"

INITIALIZED: Final = "notifications/initialized"


def opening(capabilities: Mapping[str, Any], info: Mapping[str, Any], version: str = LATEST_LEGACY) -> tuple[str, str]:
    """Method and params (JSON text) of the first request to a server: ``initialize`` in all legacy revisions."""
    params = {"protocolVersion": version, "capabilities": dict(capabilities), "clientInfo": dict(info)}
    return "initialize", dumps(params)


def probe(info: Mapping[str, Any]) -> tuple[str, str]:
    """Method and params (JSON text) of the request that only modern servers know, and all of them must."""
    return DISCOVER, dumps({"_meta": {PROTOCOL_VERSION: MODERN, CLIENT_INFO: dict(info), CLIENT_CAPABILITIES: {}}})


def discovered(reply: Message) -> Mapping[str, Any] | None:
    """The facts of a modern server from its reply to the probe, named as in ``conclude``; None for a legacy one.

    Raises StartFailed for a server with which we have no revision in common.
    """
    result = reply.result
    if reply.kind is ERROR:
        data = result.get("data")
        supported = data.get("supported") if type(data) is dict else None
        foreign = type(supported) is list and not any(version in LEGACY_VERSIONS for version in supported)
        if result.get("code") == UNSUPPORTED_VERSION and foreign:
            raise StartFailed(
                f"the server speaks protocol versions {dumps(supported)[:200]}; supported are "
                f"{', '.join((*LEGACY_VERSIONS, MODERN))}"
            )
        return None
    versions = result.get("supportedVersions") if type(result) is dict else None
    if type(versions) is not list or MODERN not in versions:
        return None
    capabilities = result.get("capabilities")
    meta = result.get("_meta")
    info = meta.get(SERVER_INFO) if type(meta) is dict else None
    facts: dict[str, Any] = {
        "protocolVersion": MODERN,
        "capabilities": capabilities if type(capabilities) is dict else {},
        "serverInfo": info if type(info) is dict else {"name": "unknown", "version": "0"},
    }
    if type(result.get("instructions")) is str:
        facts["instructions"] = result["instructions"]
    return facts


def wants_modern(reply: Message) -> bool:
    """Whether a server that refuses ``initialize`` so may be a modern one."""
    codes = (HEADER_MISMATCH, MISSING_CAPABILITY, UNSUPPORTED_VERSION, METHOD_NOT_FOUND)
    return reply.kind is ERROR and reply.result.get("code") in codes


def conclude(reply: Message) -> Mapping[str, Any]:
    """The facts of a server from its reply to the opening: protocolVersion, capabilities, serverInfo, instructions.

    Raises StartFailed, saying what the server answered, when this is no usable handshake.
    """
    if reply.kind is ERROR:
        code, text = reply.result.get("code"), str(reply.result.get("message", ""))[:300]
        raise StartFailed(f"handshake refused: {text} ({code})")
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
