"""The HTTP+SSE transport of 2024-11-05, for clients that know nothing newer: one stream down, POSTs up.

The GET is the session: its first event names where to POST, everything the server says travels on it, and when it
closes the session is over and its calls are cancelled (RB20). Nothing can be resumed, so events have no ids and
nothing is kept. Any legacy revision may be negotiated on it.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Final

import trio

from gateway.auth.principal import Principal
from gateway.downstream.legacy import NOT_A_STREAM, LegacyFront
from gateway.downstream.server import Request
from gateway.downstream.sessions import Session
from gateway.downstream.streams import COMMENT_AFTER, Feed
from gateway.errors import ClientProtocolError, GatewayError, Overloaded, unexpected
from gateway.exchange import Target
from gateway.protocol.message import INTERNAL_ERROR, Message, build_error
from gateway.protocol.session import BATCH_VERSION, STREAM, State, accepts, failure, hello, welcome
from gateway.protocol.sse import encode

__all__ = ["MESSAGES", "SseFront"]

log = logging.getLogger("gateway_http")

MESSAGES: Final = "/messages"
"""Where clients POST: the stream's own path and this, with ``?session_id=``."""
MAX_CALLS: Final = 1000
"""Requests of one session that may be in flight; each is a task here."""


class SseOutlet:
    """An ``Outlet`` onto the session's one stream, which is always open. One for each call."""

    __slots__ = ("feed", "scope")

    def __init__(self, feed: Feed) -> None:
        self.feed: Feed | None = feed
        self.scope: trio.CancelScope | None = None

    @property
    def comment_at(self) -> float:
        """The stream's comments are the sweeper's."""
        return trio.current_time() + COMMENT_AFTER

    async def send(self, text: str, instead: str = "") -> None:
        """Queue one message."""
        self.say(text)

    def say(self, text: str) -> None:
        """Queue one message."""
        assert self.feed is not None
        self.feed.add(text)

    async def comment(self) -> None:
        """Nothing to do."""

    async def comment_now(self) -> None:
        """Nothing to do."""

    async def end(self) -> None:
        """The stream outlives every call."""


class SseFront:
    """Streams and POSTs of HTTP+SSE. Its sessions stand among the legacy front's and count towards ``max_sessions``.

    The legacy front's ``run`` must be running: its nursery holds the calls. Errors as with ``LegacyFront``.
    """

    def __init__(self, legacy: LegacyFront) -> None:
        self.legacy = legacy

    async def open(self, request: Request, principal: Principal, target: Target) -> None:
        """Open a session and carry its stream until the client closes it or the server shuts down."""
        legacy = self.legacy
        try:
            if not accepts(request.headers.get("accept")) & STREAM:
                raise ClientProtocolError(NOT_A_STREAM, status=406)
            legacy.router.check(principal, target)
            session = legacy.open(principal, target, resumable=False)
        except GatewayError as refused:
            await legacy.refuse(request, refused, "", "null")
            return
        legacy.sessions[session.id] = session
        # A path is same-origin by construction; both official clients resolve it against the stream's URL. What else
        # the query says belongs to the endpoint.
        query = f"{request.query}&" if request.query else ""
        endpoint = encode(f"{request.path}{MESSAGES}?{query}session_id={session.id}", event="endpoint")
        try:
            await legacy.carry(request, session, session.feed, 0, endpoint, lossy=False)
        finally:
            legacy.close(session)

    async def post(
        self,
        request: Request,
        principal: Principal,
        target: Target,
        session_id: str | None,
        message: Message | list[str],
    ) -> None:
        """Take one POST, a decoded message or a batch's entries: 202; what there is to answer goes to the stream."""
        try:
            if not session_id:
                raise ClientProtocolError("session_id is missing: POST to the URI in the stream's endpoint event")
            session = self.legacy.find(session_id, principal, target, sse=True)
            if isinstance(message, list) and session.client.version != BATCH_VERSION:
                raise ClientProtocolError(f"Batches exist in {BATCH_VERSION} only: send one message")
        except GatewayError as refused:
            await self.legacy.refuse(request, refused, "", "null")
            return
        session.used = trio.current_time()
        call = partial(self._start, session)
        if isinstance(message, list):
            replies = self.legacy.each(session, message, call)
        else:
            reply = self.legacy.handle(session, message, call)
            replies = [] if reply is None else [reply]
        for reply in replies:
            session.feed.add(reply)
        await request.respond(202, b"Accepted", content_type="text/plain")

    def _start(self, session: Session, message: Message) -> None:
        """Have a request answered by a task of its own: its POST must not wait, more may come on that connection."""
        nursery = self.legacy.nursery
        assert nursery is not None
        if session.feed.owed >= MAX_CALLS:
            busy = Overloaded(f"This session has {MAX_CALLS} requests in flight")
            session.feed.add(failure(busy, message.method, message.id_text)[1])
            return
        if message.method == "initialize":
            session.state = State.OPENING
        session.feed.owed += 1
        nursery.start_soon(self._serve, session, message)

    async def _serve(self, session: Session, message: Message) -> None:
        """Answer one request on the stream. Contains every failure: one request can't end the others."""
        outlet = SseOutlet(session.feed)
        try:
            if message.method == "initialize":
                text = await self._initialize(session, message, outlet)
            else:
                text, _, _ = await self.legacy.answer(session, message, None, outlet)
        except Exception as error:
            log.exception("unexpected failure while answering %s", message.method)
            text = build_error(message.id_text, INTERNAL_ERROR, unexpected(error), {"source": "gateway"})
        session.feed.owed -= 1
        if not session.closed:
            session.feed.add(text)

    async def _initialize(self, session: Session, message: Message, outlet: SseOutlet) -> str:
        try:
            said = hello(message)
            session.greet(said)
            facts = await self.legacy.introduce(session, outlet)
        except GatewayError as error:
            session.state = State.NEW
            return failure(error, message.method, message.id_text)[1]
        session.state = State.OPEN
        return welcome(message.id_text, said.version, facts)
