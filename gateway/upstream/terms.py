"""What a link is told about its server and the gateway, whichever way the server is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from gateway.errors import UpstreamTimeout
from gateway.exchange import INTERNAL, Ask, Client
from gateway.protocol.eras import LATEST_LEGACY, Era
from gateway.protocol.message import Message

__all__ = ["Terms", "WrongEra", "too_late"]


@attrs.frozen
class Terms:
    """How to introduce ourselves to a server, and where to put what it says by itself.

    capabilities  declared to the server: empty for a shared one, exactly its client's for an isolated one
    isolated      one client owns the server
    lister        who asks it for what it has; see ``modern.lister``
    eras          the eras to try, in this order; one only where the catalog says so
    probe_timeout seconds that a server may be silent to ``server/discover`` before it is taken for a legacy one
    """

    server_id: str
    on_notice: Callable[[Message], None]
    on_ask: Callable[[Ask], bool]
    info: Mapping[str, Any]
    capabilities: Mapping[str, Any] = attrs.field(factory=dict)
    version: str = LATEST_LEGACY
    isolated: bool = False
    lister: Client = INTERNAL
    max_message_bytes: int = 16 * 1024 * 1024
    timeout: float = 60.0
    eras: tuple[Era, ...] = (Era.LEGACY,)
    probe_timeout: float = 10.0


class WrongEra(Exception):
    """The server has to be started again and spoken to in this era first: the other one has spoilt the connection.

    ``reason`` is for people.
    """

    def __init__(self, first: Era, reason: str) -> None:
        super().__init__(reason)
        self.first = first
        self.reason = reason


def too_late(server_id: str, seconds: float, remark: str) -> UpstreamTimeout:
    """The error of a call that got no answer in time. ``remark`` explains it, if anything does."""
    why = f": {remark}" if remark else ""
    return UpstreamTimeout(f"Server '{server_id}' did not answer within {seconds:.3g} s{why}")
