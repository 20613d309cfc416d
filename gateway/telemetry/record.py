"""What is known of a server right now, as values for people and programs to read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["ServerStatus", "iso"]


def iso(seconds: float) -> str:
    """Unix time as ISO-8601 UTC, to the second (compat §4: times end in Z)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@attrs.frozen
class ServerStatus:
    """One server id at one moment. Times are Unix seconds, None where there is none.

    status      stopped, starting, running, unhealthy or shutting_down (compat H16); running if any unit runs
    last_error  why the newest attempt failed, "" when it did not
    retry_at    when a call may start it again, None when now
    units       how many instances run (more than one only with isolation)
    details     facts of the running instances: process ids, protocol version, transport
    progress    what starting ones are doing at the moment, "" where there is nothing to say
    """

    status: str = "stopped"
    request_count: int = 0
    error_count: int = 0
    started_at: float | None = None
    last_activity_at: float | None = None
    uptime_seconds: int | None = None
    connection_count: int = 0
    units: int = 0
    last_error: str = ""
    failures: int = 0
    retry_at: float | None = None
    details: tuple[Mapping[str, Any], ...] = ()
    progress: str = ""
