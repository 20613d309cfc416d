"""Plain calls to another gateway by server id: what its ``POST /mcp`` took before it had MCP endpoints (compat H7, S8).

One POST per message, one JSON reply, nothing else comes back: no progress, no questions, no list changes. The original
gateway forwards whatever it is sent, so the handshake goes through it too; where it stands between several clients and
one server, that server is greeted by each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import httpx
import trio

from gateway.errors import (
    CredentialsRefused,
    GatewayError,
    NoSuchServer,
    RateLimited,
    ServerProtocolError,
    StartFailed,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import Call, Reply
from gateway.protocol import handshake
from gateway.protocol.message import (
    ERROR,
    NOTIFICATION,
    Malformed,
    build_notification,
    build_request,
    decode_reply,
    dumps,
)
from gateway.upstream.dial import Target
from gateway.upstream.http_link import JSON_BODY, HttpLink, content_type, encoded, one_line
from gateway.upstream.streamable import deliverable
from gateway.upstream.terms import Terms

__all__ = ["NO_MERGED_VIEW", "PlainLink"]

NO_MERGED_VIEW: Final = "; if this is a gateway without a merged view, name one of its servers"

_ACCEPT: Final = (b"accept", b"application/json")
INITIALIZED_LIMIT: Final = 1.0
"""Seconds to wait for a word on ``notifications/initialized``: the original waits for an answer that never comes."""


class PlainLink(HttpLink):
    """A server behind a gateway that is only known by its plain calls. ``plain_id`` is the server's id there."""

    transport_name = "plain-calls"
    prefers_sole_call = False

    def __init__(
        self,
        target: Target,
        plain_id: str,
        transport: httpx.AsyncBaseTransport,
        nursery: trio.Nursery,
        terms: Terms,
        details: Mapping[str, Any],
    ) -> None:
        super().__init__(target, transport, nursery, terms, details)
        self._can_ask = False
        self._prefix = f'{{"server_id":{dumps(plain_id)},'
        self._plain_id = plain_id

    async def open(self, refusal: GatewayError) -> None:
        """Do the handshake. ``refusal`` is why there was no MCP endpoint. Raises UpstreamError."""
        terms = self._terms
        if not self._plain_id:
            raise StartFailed(f"{refusal.message}{NO_MERGED_VIEW}")
        method, params = handshake.opening({}, terms.info, terms.version)
        facts = handshake.conclude(await self.request(method, params, timeout=terms.timeout))
        self.facts = {**facts, "capabilities": deliverable(facts["capabilities"])}
        with trio.move_on_after(INITIALIZED_LIMIT), suppress(UpstreamError, RateLimited):
            await self._post(build_notification(handshake.INITIALIZED))

    async def _converse(self, call: Call, id: int, method: str, params: str) -> None:
        async with self._posted(build_request(str(id), method, params)) as response:
            status = response.status_code
            json_body = content_type(response) == "application/json"
            data = await self._read(response, self._max) if json_body else b""
            if status < 300 and not json_body:
                raise self._nonsense(f"answered {status} with {content_type(response)[:60] or 'nothing'}, not JSON")
            message = _reply_in(data)
            gateway_fault = message is not None and message.kind is ERROR and status >= 400
            if message is not None and message.kind > NOTIFICATION and not gateway_fault:
                # The next message of the server is what the original answers with, whatever it is: never another's.
                if message.id != id:
                    raise self._nonsense("answered with a message that is no reply to this request")
                self._message(message, call, id)
                return
            if status < 300:
                raise self._nonsense("answered with a body that is no JSON-RPC reply")
            if message is not None and status not in (401, 403, 404, 429) and status < 500 and self.pending.drop(call):
                call.finish(Reply(message))  # a request that its server refuses
                return
            raise self._fault(response, _said_in(data))

    async def _post(self, text: str) -> None:
        async with self._posted(text) as response:
            if response.status_code >= 300:
                raise await self._refusal(response)
            await self._discard(response)

    def _posted(self, text: str) -> Any:
        return self._send("POST", self._target.url, [_ACCEPT, JSON_BODY], encoded(self._prefix + text[1:]))

    def _fault(self, response: httpx.Response, said: str) -> GatewayError:
        """The error for a status, as compat H26 has them."""
        status = response.status_code
        who = f"Server '{self._plain_id}' at {self._target.name}"
        tail = f": {said}" if said else ""
        if status in (401, 403):
            return CredentialsRefused(f"{who} refuses our credentials (HTTP {status}){tail}")
        if status == 404 and said:
            return NoSuchServer(f"{who} is not known there{tail}")
        if status == 404:
            return StartFailed(f"{who}: there is no gateway at this URL (HTTP 404)")
        if status == 429:
            return RateLimited(f"{who} asks for fewer requests (HTTP 429){tail}")
        if status == 504:
            return UpstreamTimeout(f"{who} did not answer in time (HTTP 504){tail}")
        if status >= 500:
            return UpstreamError(f"{who} failed (HTTP {status}){tail}")
        return ServerProtocolError(f"{who} answered with HTTP {status}{tail}")


def _reply_in(data: bytes) -> Any:
    """The JSON-RPC message of a body, None where there is none."""
    with suppress(Malformed):
        return decode_reply(one_line(data))
    return None


def _said_in(data: bytes) -> str:
    """What an error's body says, in either shape that gateways use (compat H25, H27)."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    error = found.get("error")
    text = found.get("message") or (error.get("message") if isinstance(error, dict) else error)
    return text[:300] if isinstance(text, str) else ""
