"""The server's side of a legacy session, without I/O: what may be said when, and how it is answered.

Covers the base protocol, lifecycle and Streamable HTTP transport pages of 2024-11-05, 2025-03-26, 2025-06-18 and
2025-11-25 as far as they can be decided without waiting. A front asks ``admit`` what to do with a message, ``hello``
what a client said of itself, and ``failure`` how a fault of the gateway's is shown to a legacy client.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from gateway.errors import AuthError, ClientProtocolError, GatewayError, Overloaded, UnknownTarget
from gateway.protocol.eras import LEGACY_VERSIONS, agree_on
from gateway.protocol.message import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    NOTIFICATION,
    PARSE_ERROR,
    REQUEST,
    Message,
    build_error,
    build_result,
    dumps,
)

__all__ = [
    "BATCH_VERSION",
    "BOTH",
    "JSON",
    "NO_SESSION",
    "PRIMING_VERSION",
    "STREAM",
    "VENDOR_DATA",
    "Act",
    "Hello",
    "State",
    "accepts",
    "admit",
    "announce",
    "check_version",
    "event_id",
    "failure",
    "hello",
    "read_event_id",
    "welcome",
]

BATCH_VERSION: Final = "2025-03-26"
"""The one revision with JSON-RPC batches."""
PRIMING_VERSION: Final = "2025-11-25"
"""The one revision whose streams begin with an empty event; older clients would parse its data as JSON."""
VENDOR_DATA: Final = "open-mcp-gateway/data"
"""The ``_meta`` key of a tool result that the gateway made in the server's place. A result has no ``error.data``, so
what an error says there (compat H32: ``source`` "gateway", and the ``reason``) stands under this key."""
NO_SESSION: Final = (
    'Neither in an MCP session nor a plain call: begin with "initialize" and send the Mcp-Session-Id that its reply '
    'carries, or, for a plain call, POST /mcp with a top-level "server_id" in the JSON-RPC object'
)


# ------------------------------------------------------------------------------------------------------ the lifecycle
class State(enum.Enum):
    """Where a session is. Streamable HTTP sessions are born OPEN; an HTTP+SSE stream exists before its initialize.

    OPEN means that the reply to initialize has been given, READY that the client has said notifications/initialized.
    """

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    READY = "ready"


class Act(enum.Enum):
    """What to do with a message: carry out an initialize, answer a ping, hand it on, note it, or drop it."""

    INITIALIZE = "initialize"
    PONG = "pong"
    CALL = "call"
    NOTE = "note"
    CANCEL = "cancel"
    READY = "ready"
    ANSWER = "answer"
    DROP = "drop"


# A request before notifications/initialized is served: the notification travels on a connection of its own and is
# easily overtaken. Both official servers forgive it too ("the client SHOULD NOT send requests ... before").
_EARLY: Final = "The session is not initialized: send an initialize request first"
_TWICE: Final = "The session is already initialized; begin a new one instead"

_REQUESTS: Final[Mapping[tuple[State, str], Act | str]] = {
    (State.NEW, "initialize"): Act.INITIALIZE,
    (State.NEW, "ping"): Act.PONG,
    (State.NEW, ""): _EARLY,
    (State.OPENING, "initialize"): _TWICE,
    (State.OPENING, "ping"): Act.PONG,
    (State.OPENING, ""): _EARLY,
    (State.OPEN, "initialize"): _TWICE,
    (State.OPEN, "ping"): Act.PONG,
    (State.OPEN, ""): Act.CALL,
    (State.READY, "initialize"): _TWICE,
    (State.READY, "ping"): Act.PONG,
    (State.READY, ""): Act.CALL,
}
_NOTIFICATIONS: Final[Mapping[tuple[State, str], Act]] = {
    (State.OPEN, "notifications/initialized"): Act.READY,
    (State.OPEN, "notifications/cancelled"): Act.CANCEL,
    (State.OPEN, ""): Act.NOTE,
    (State.READY, "notifications/initialized"): Act.DROP,
    (State.READY, "notifications/cancelled"): Act.CANCEL,
    (State.READY, ""): Act.NOTE,
}
_special_request = frozenset(("initialize", "ping"))
_special_notification = frozenset(("notifications/initialized", "notifications/cancelled"))


def admit(state: State, message: Message) -> Act:
    """What a message means in this state.

    Raises ClientProtocolError (-32600) for a request that the state forbids and for one whose id is null (base
    protocol: "the ID MUST NOT be null"). Notifications and replies have no reply, so out of place they are dropped.
    """
    kind = message.kind
    method = message.method
    if kind is REQUEST:
        if message.id is None:
            raise ClientProtocolError("The id of a request must be a string or a number, not null")
        act = _REQUESTS[state, method if method in _special_request else ""]
        if type(act) is str:
            raise ClientProtocolError(act)
        return act  # type: ignore[return-value]
    if kind is NOTIFICATION:
        return _NOTIFICATIONS.get((state, method if method in _special_notification else ""), Act.DROP)
    return Act.ANSWER


@attrs.frozen
class Hello:
    """What a client's initialize says, and the revision agreed on."""

    version: str
    capabilities: Mapping[str, Any]
    info: Mapping[str, Any]


def hello(message: Message) -> Hello:
    """Read an initialize request (lifecycle, "Initialization"). Missing members are forgiven, wrong types are not.

    Raises ClientProtocolError (-32602).
    """
    found: dict[str, Any] = {}
    for name in ("capabilities", "clientInfo"):
        value = message.param(name)
        if value is None:
            value = {}
        elif type(value) is not dict:
            raise ClientProtocolError(f"initialize: {name} must be an object", code=INVALID_PARAMS)
        found[name] = value
    return Hello(agree_on(message.param("protocolVersion")), found["capabilities"], found["clientInfo"])


def welcome(id_text: str, version: str, facts: Mapping[str, Any]) -> str:
    """The reply to initialize: the agreed revision with the capabilities, serverInfo and instructions in ``facts``."""
    return build_result(id_text, dumps({**facts, "protocolVersion": version}))


# ------------------------------------------------------------------------------------------------------------ headers
JSON: Final = 1
STREAM: Final = 2
BOTH: Final = JSON | STREAM

_RANGES: Final = {
    "*/*": BOTH,
    "application/*": JSON,
    "application/json": JSON,
    "text/*": STREAM,
    "text/event-stream": STREAM,
}
_seen: dict[str, int] = {}
_MAX_SEEN: Final = 256


def accepts(header: str | None) -> int:
    """Which of JSON and STREAM an Accept header admits (RFC 9110 section 12.5.1); absent means both."""
    if header is None:
        return BOTH
    found = _seen.get(header)
    if found is None:
        found = 0
        for part in header.lower().split(","):
            media, *params = (piece.strip() for piece in part.split(";"))
            if not any(_refused(param) for param in params):
                found |= _RANGES.get(media, 0)
        if len(_seen) < _MAX_SEEN and len(header) <= 256:
            _seen[header] = found
    return found


def _refused(param: str) -> bool:
    """Whether a parameter is a quality of zero."""
    name, _, value = param.partition("=")
    return name.strip() == "q" and value.strip().rstrip("0") in ("", "0.")


def check_version(header: str | None) -> None:
    """Check MCP-Protocol-Version (transports, "Protocol Version Header"): absent means the session's.

    Raises ClientProtocolError (-32600, 400) for a revision that a session can't have.
    """
    if header is not None and header not in LEGACY_VERSIONS:
        raise ClientProtocolError(
            f"Unsupported MCP-Protocol-Version {header[:40]!r}; supported in a session: {', '.join(LEGACY_VERSIONS)}"
        )


_event_id = re.compile(r"([0-9]{1,18})-([0-9]{1,18})(?:\.[0-9]{1,18})?").fullmatch


def event_id(stream: int, number: int, opening: int = 0) -> str:
    """An event's id: unique in its session and naming its stream (transports, "Resumability and Redelivery").

    The empty event that begins a connection stands after event ``number`` and has no number of its own, so it is told
    apart by ``opening``, the count of connections.
    """
    return f"{stream}-{number}.{opening}" if opening else f"{stream}-{number}"


def read_event_id(header: str) -> tuple[int, int]:
    """Stream and number from a Last-Event-ID header. Raises ClientProtocolError (-32600, 400)."""
    found = _event_id(header)
    if found is None:
        raise ClientProtocolError("Last-Event-ID is no event id of this session")
    return int(found[1]), int(found[2])


# -------------------------------------------------------------------------------------------------------------- faults
_BREACHES: Final = (PARSE_ERROR, INVALID_REQUEST, UnknownTarget.code)
"""Codes that go with an HTTP error status; every other code is an answer, and answers have status 200."""


def failure(error: GatewayError, method: str, id_text: str) -> tuple[int, str]:
    """A fault of the gateway's, as a legacy client over HTTP sees it: status and reply (protocol.md section 7).

    - A server that failed, and anything unforeseen: 200; for tools/call a result with ``isError`` and the reason as
      text, so that the model reads it, else -32603.
    - Overloaded and RateLimited keep 503 and 429 (RB42, RB86): nothing was done, and HTTP layers know what to do.
    - An unknown server or session: 404 with -32001. Unknown tools, prompts, resources and bad params carry codes of
      their own and are answers: 200. Other breaches of the protocol keep their status.

    Every one says that the gateway made it (compat H32).
    """
    data: dict[str, Any] = {"source": "gateway", "reason": error.message}
    if error.retry_after is not None:
        data["retryAfter"] = round(error.retry_after, 1)
    status, code = error.status, error.code
    if isinstance(error, ClientProtocolError | UnknownTarget):
        status = status if code in _BREACHES else 200
    elif not isinstance(error, Overloaded | AuthError):
        if method == "tools/call":
            content = [{"type": "text", "text": error.message}]
            result = {"content": content, "isError": True, "_meta": {VENDOR_DATA: data}}
            return 200, build_result(id_text, dumps(result))
        status, code = 200, INTERNAL_ERROR
    return status, build_error(id_text, code, error.message, data)


_LISTS: Final = {
    "tools": "notifications/tools/list_changed",
    "prompts": "notifications/prompts/list_changed",
    "resources": "notifications/resources/list_changed",
}


def announce(topic: str) -> tuple[str, str] | None:
    """Method and params (JSON text) of the notification for a dirty topic, None for a topic that clients never see."""
    method = _LISTS.get(topic)
    if method is not None:
        return method, ""
    if topic.startswith("resource:"):
        return "notifications/resources/updated", dumps({"uri": topic.removeprefix("resource:")})
    return None
