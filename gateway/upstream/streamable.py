"""Streamable HTTP, 2025-03-26 to 2025-11-25, from the client's side."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import httpx
import trio

from gateway.errors import (
    GatewayError,
    LinkLost,
    NoSuchServer,
    ServerProtocolError,
    StartFailed,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import Call
from gateway.protocol import handshake
from gateway.protocol.eras import MODERN, UNSUPPORTED_VERSION, Era
from gateway.protocol.message import (
    ERROR,
    INVALID_PARAMS,
    RESULT,
    Malformed,
    Message,
    build_notification,
    build_request,
    decode_reply,
)
from gateway.protocol.sse import EVENT_STREAM
from gateway.upstream.http_link import (
    JSON_BODY,
    MAX_REOPEN,
    HttpLink,
    NoStreamableHttp,
    Trail,
    about_session,
    content_type,
    encoded,
    one_line,
)

__all__ = ["StreamableLink", "deliverable"]

log = logging.getLogger("gateway_core")

BOTH: Final = f"application/json, {EVENT_STREAM}"
MAX_RESUMES: Final = 3
"""Failed attempts in a row to take up a broken stream."""
RENEW_LIMIT: Final = 60.0
"""Seconds for a handshake that replaces a lost session."""

_visible = re.compile(r"[\x21-\x7e]{1,4096}").fullmatch


class _SessionLost(Exception):
    """The server does not know the session, so it has not run what was sent."""


class StreamableLink(HttpLink):
    """Streamable HTTP: every call is a POST with its own answer, the session's own stream is a GET."""

    transport_name = "streamable-http"
    prefers_sole_call = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._session = ""
        self._version = ""
        self._offered = ""
        self._renewing = trio.Lock()
        self.perhaps_modern = False
        """Whether the server has refused ``initialize`` in a way in which a modern one would."""
        self._may_be_modern = Era.MODERN in self._terms.eras
        self._listening = trio.CancelScope()
        self._replay: dict[str, tuple[str, str]] = {}

    # ------------------------------------------------------------------------------------------------------- opening
    async def open(self) -> None:
        """Do the handshake. Raises UpstreamError; NoStreamableHttp where an older transport may be tried."""
        terms = self._terms
        await self._initialize(terms.capabilities, terms.timeout)

    @property
    def sessionless(self) -> bool:
        """Whether the server gave no session id."""
        return not self._session

    async def offer_nothing(self) -> None:
        """Greet a server anew that has no session and so no way to ask a client (protocol.md section 4.6)."""
        if self.sessionless and self._terms.capabilities:
            await self._initialize({}, self._terms.timeout)

    async def _initialize(self, capabilities: Mapping[str, Any], timeout: float) -> None:
        method, params = handshake.opening(capabilities, self._terms.info, self._terms.version)
        self._offered = ""
        reply = await self.request(method, params, timeout=timeout)
        # -32602: a modern server misses its ``_meta`` before it looks at the method.
        self.perhaps_modern = handshake.wants_modern(reply) or (
            reply.kind is ERROR and reply.result.get("code") == INVALID_PARAMS
        )
        if reply.kind is ERROR and reply.result.get("code") == UNSUPPORTED_VERSION and not self._may_be_modern:
            said = str(reply.result.get("message", ""))[:200]
            raise StartFailed(f"handshake refused: {said}; the server speaks {MODERN}, which era: legacy rules out")
        facts = handshake.conclude(reply)
        session, version = self._offered, str(facts["protocolVersion"])
        if not session:
            self._can_ask = False
            facts = {**facts, "capabilities": deliverable(facts["capabilities"])}
        # Only a session that knows of ``initialized`` takes calls, so the old one is kept until then.
        with trio.move_on_after(timeout):
            await self._submit(build_notification(handshake.INITIALIZED), self._headers(session, version))
            self.facts, self._session, self._version = facts, session, version
            self._listening.cancel()
            if session:
                self._listening = trio.CancelScope()
                self._nursery.start_soon(self._listen, self._listening)
            return
        raise UpstreamTimeout(f"Server '{self.server_id}' did not take the initialized notice within {timeout:.3g} s")

    async def _renew(self, stale: str) -> None:
        """Open another session in the place of a lost one, once however many calls found out (RB54).

        What the old one was told (log level, subscriptions) is told again. Raises GatewayError when that fails; the
        link is then lost.
        """
        async with self._renewing:
            if self._session != stale or self.lost is not None:
                return
            log.info("Server lost its session; opening another", extra={"fields": {"server_id": self.server_id}})
            try:
                capabilities = self._terms.capabilities if self._can_ask else {}
                await self._initialize(capabilities, min(self._terms.timeout, RENEW_LIMIT))
            except GatewayError as error:
                self.lose(LinkLost(f"{error.message} (after its session was lost)"))
                raise
        for method, params in list(self._replay.values()):
            try:
                await self.request(method, params, timeout=10.0)
            except GatewayError as error:
                log.warning("server %s did not take %s again: %s", self.server_id, method, error)

    async def goodbye(self) -> None:
        """End the session (405 is a fine answer)."""
        if self._session:
            with suppress(GatewayError):
                async with self._send("DELETE", self._target.url, self._headers(self._session, self._version)):
                    pass

    def _headers(self, session: str, version: str) -> list[tuple[bytes, bytes]]:
        headers = [(b"accept", BOTH.encode())]
        if session:
            headers.append((b"mcp-session-id", session.encode()))
        if version:
            headers.append((b"mcp-protocol-version", version.encode()))
        return headers

    async def _post(self, text: str) -> None:
        await self._submit(text, self._headers(self._session, self._version))

    async def _submit(self, text: str, headers: list[tuple[bytes, bytes]]) -> None:
        async with self._send("POST", self._target.url, [*headers, JSON_BODY], encoded(text)) as response:
            if response.status_code >= 300:
                raise await self._refusal(response)
            await self._discard(response)

    # --------------------------------------------------------------------------------------------------------- calls
    async def _converse(self, call: Call, id: int, method: str, params: str) -> None:
        body = encoded(build_request(str(id), method, params))
        for last in (False, True):
            # The handshake belongs to no session and to no version yet.
            opening = method == "initialize"
            session = "" if opening else self._session
            headers = self._headers(session, "" if opening else self._version)
            trail = Trail()
            try:
                async with self._send("POST", self._target.url, [*headers, JSON_BODY], body) as response:
                    await self._follow(call, id, response, trail, session)
            except _SessionLost:
                if last:
                    raise UpstreamError(f"Server '{self.server_id}' lost its session twice in a row") from None
                await self._renew(session)
                continue
            except LinkLost:
                if not trail.id:
                    raise
            if not self._ended(call, id):
                await self._resume(call, id, trail, headers)
            return

    async def _follow(self, call: Call, id: int, response: httpx.Response, trail: Trail, session: str) -> None:
        """Take the answer to a POST. Returns without a reply only when a stream has ended."""
        status, kind = response.status_code, content_type(response)
        opening = call.exchange.message.method == "initialize"
        if status < 300:
            if opening:
                self._offered = self._session_id(response)
            if kind == EVENT_STREAM:
                await self._stream(call, id, response, trail)
                return
            if kind != "application/json":
                raise self._nonsense(f"answered {status} with {kind[:60] or 'nothing'} instead of a JSON-RPC reply")
            self._body(call, id, await self._read(response, self._max))
            return
        if 400 <= status < 500 and status not in (401, 403, 429):
            if kind == "application/json":
                self._error_body(call, id, status, await self._read(response, self._max), session)
            if self._ended(call, id):
                return
            if status == 404 and session:
                raise _SessionLost
            if opening and status in (400, 404, 405):
                error = await self._refusal(response)
                raise NoStreamableHttp(error.message)
        raise await self._refusal(response)

    def _error_body(self, call: Call, id: int, status: int, data: bytes, session: str) -> None:
        """A body that came with 4xx: a JSON-RPC error is the reply, whatever its id, unless the session is gone."""
        try:
            message = decode_reply(one_line(data))
        except Malformed:
            return
        if message.kind is not ERROR:
            return
        ours = message.id == id
        code, text = message.result.get("code"), str(message.result.get("message", ""))
        about = about_session(text) is not None
        if session and (about or not ours if status == 404 else about and not ours and status == 400):
            # TypeScript's examples answer 400 for a session they do not know, and some (we do) name the request in a
            # 404. Either way nothing has run.
            raise _SessionLost
        opening = call.exchange.message.method == "initialize"
        data = message.result.get("data")
        if opening and status == 404 and code == -32001 and isinstance(data, dict) and data.get("source") == "gateway":
            # Ours, about the path: an older transport would hear the same (compat S3, S8).
            raise NoSuchServer(f"Server '{self.server_id}' at {self._target.name} is not known there: {text[:200]}")
        if opening and status in (400, 404, 405) and code not in (-32020, -32021, -32022):
            raise NoStreamableHttp(
                f"Server '{self.server_id}' at {self._target.name} answered initialize with HTTP {status}: {text[:200]}"
            )
        if call.id == id and self.pending.drop(call):
            self._replied(call, message)

    def _session_id(self, response: httpx.Response) -> str:
        session: str = response.headers.get("mcp-session-id", "")
        if session and not _visible(session):
            raise self._nonsense("gave a session id that is not visible ASCII")
        return session

    def _replied(self, call: Call, message: Message) -> None:
        self._remember(call, message)
        super()._replied(call, message)

    def _remember(self, call: Call, reply: Message) -> None:
        """Keep what another session would have to be told."""
        message = call.exchange.message
        if reply.kind is not RESULT or not message.method.startswith(("logging/", "resources/")):
            return
        if message.method == "logging/setLevel":
            self._replay["level"] = (message.method, message.params_text())
        elif message.method == "resources/subscribe":
            self._replay[f"uri {message.param('uri')}"] = (message.method, message.params_text(call.exchange.changes))
        elif message.method == "resources/unsubscribe":
            self._replay.pop(f"uri {message.param('uri')}", None)

    # ------------------------------------------------------------------------------------------------------- streams
    async def _resume(self, call: Call, id: int, trail: Trail, headers: list[tuple[bytes, bytes]]) -> None:
        """Take a stream up again that ended before its reply (2025-11-25, resumability and polling)."""
        failures = 0
        if not trail.id:
            raise LinkLost(f"Server '{self.server_id}' ended its event stream before it had answered")
        if call.exchange.message.method == "initialize":
            headers = self._headers(self._offered, "")
        while not self._ended(call, id):
            await trio.sleep(trail.wait)
            if not _visible(trail.id):
                raise self._nonsense("gave an event id that is not visible ASCII")
            before = trail.id
            refusal: GatewayError | None = None
            try:
                wanted = [*headers, (b"last-event-id", trail.id.encode())]
                async with self._send("GET", self._target.url, wanted) as response:
                    if response.status_code == 200 and content_type(response) == EVENT_STREAM:
                        await self._stream(call, id, response, trail)
                    else:
                        refusal = await self._refusal(response)
            except ServerProtocolError:
                raise
            except UpstreamError:
                failures = 0 if trail.id != before else failures + 1
                if failures >= MAX_RESUMES:
                    raise
            if refusal is not None:
                raise LinkLost(f"{refusal.message}; the broken stream of this call could not be taken up again")

    async def _listen(self, scope: trio.CancelScope) -> None:
        """Keep the session's own stream open, until there is none or the session is replaced."""
        trail = Trail()
        failures = 0
        with scope:
            while self.lost is None:
                headers = self._headers(self._session, self._version)
                if trail.id and _visible(trail.id):
                    headers.append((b"last-event-id", trail.id.encode()))
                try:
                    async with self._send("GET", self._target.url, headers) as response:
                        status = response.status_code
                        if status == 200 and content_type(response) == EVENT_STREAM:
                            failures = 0
                            await self._stream(None, 0, response, trail)
                        elif status != 429 and status < 500:
                            # 405: it has none. 404 means the same or a lost session, which the next call finds out.
                            return
                        else:
                            failures += 1
                except UpstreamError as error:
                    failures += 1
                    log.debug("the event stream of server %s broke: %s", self.server_id, error)
                await trio.sleep(min(trail.wait * 2 ** min(failures, 5), MAX_REOPEN))


def deliverable(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    """What a server without a session can keep of its claims (protocol.md section 4.6)."""
    kept: dict[str, Any] = {}
    for name, value in capabilities.items():
        if name == "logging":
            continue
        if type(value) is dict:
            value = {k: v for k, v in value.items() if k not in ("listChanged", "subscribe")}
        kept[name] = value
    return kept
