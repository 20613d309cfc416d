"""Being a legacy MCP server over HTTP: sessions, and Streamable HTTP as 2025-03-26 to 2025-11-25 have it.

A session belongs to one principal and one endpoint; to everybody else it does not exist (RB83). It outlives whatever
happens to servers and catalogs, and ends by DELETE or when it has been idle for ``session_idle_seconds``.

A client that disconnects has cancelled nothing: its calls go on and their replies are kept (RB20, ``streams``). What it
sends by ``notifications/cancelled`` ends a call. One task, ``run``, does for all sessions what needs a clock: expiry,
signs of life for calls that wait for a start, questions nobody can be asked. A POST that is answered at once costs none
of this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.auth.principal import Principal
from gateway.downstream.server import ClientGone, Request
from gateway.downstream.sessions import CANCELLED, MAX_ASKS, Session
from gateway.downstream.streams import (
    STREAM_HEADERS,
    Budget,
    EventLog,
    Feed,
    Outlet,
    PostOutlet,
    Reader,
    follow,
    priming,
)
from gateway.errors import AuthError, ClientProtocolError, GatewayError, Overloaded, UnknownTarget
from gateway.exchange import Ask, Call, Exchange, Interim, Reply, Target, decline
from gateway.protocol.message import REQUEST, Malformed, Message, build_error, build_result, decode_request
from gateway.protocol.session import (
    BATCH_VERSION,
    BOTH,
    NO_SESSION,
    PRIMING_VERSION,
    STREAM,
    Act,
    State,
    accepts,
    admit,
    check_version,
    failure,
    hello,
    read_event_id,
    welcome,
)

if TYPE_CHECKING:
    from gateway.router import Router

__all__ = ["NOT_A_STREAM", "LegacyFront"]

ASK_UNSENT: Final = 30.0
"""Seconds a question outside any call waits for the client to open its stream; then it is declined."""

TICK: Final = 5.0
"""Seconds between two looks at all sessions; comments are late by at most this."""

NOT_ACCEPTABLE: Final = "Not Acceptable: the client must accept both application/json and text/event-stream"
NOT_A_STREAM: Final = "Not Acceptable: a GET opens a stream, so the client must accept text/event-stream"
NO_SUCH_SESSION: Final = 'Session not found: it has ended or never was yours; begin a new one with "initialize"'

_REPLY_CANCELLED: Final = Reply.error(-32000, "Request cancelled", {"source": "gateway", "reason": "Request cancelled"})


def _check_open(session: Session) -> None:
    """A request that has a task of its own may get its first turn after the session's end, when nobody is left to
    cancel it: what it starts would run for nobody. Raises UnknownTarget.
    """
    if session.closed:
        raise UnknownTarget(NO_SUCH_SESSION)


def _id_in_use(message: Message) -> ClientProtocolError:
    return ClientProtocolError(f"The id {message.id_text[:80]} belongs to a request that is still running")


class LegacyFront:
    """All legacy sessions. ``run`` must be running; the other methods are called by the endpoint, one task a request.

    A method answers its request itself, faults included, except AuthError, which it raises before anything was sent,
    and ClientGone.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.sessions: dict[str, Session] = {}
        self.nursery: trio.Nursery | None = None
        self._budget = Budget()
        self._opening: dict[Session, None] = {}
        self._waiting: dict[object, Outlet] = {}

    # ------------------------------------------------------------------------------------------------------- its task
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sweep until cancelled. Its nursery carries the calls of HTTP+SSE sessions."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            task_status.started()
            while True:
                idle = self.router.snapshot.settings.session_idle_seconds or inf
                await trio.sleep(min(TICK, max(idle / 4, 0.05)))
                self._keep_alive(nursery)
                self._sweep(trio.current_time(), idle)

    def _keep_alive(self, nursery: trio.Nursery) -> None:
        """Have requests that wait give a sign of life. A method, so that none is held until the next look."""
        now = trio.current_time()
        for token, outlet in self._waiting.items():
            if outlet.comment_at <= now:
                nursery.start_soon(self._comment, token, outlet)

    async def _comment(self, token: object, outlet: Outlet) -> None:
        if token in self._waiting:
            await outlet.comment_now()

    def _sweep(self, now: float, idle: float) -> None:
        for session in list(self.sessions.values()):
            if session.leaving and not session.calls:
                self.close(session)
                continue
            if session.busy:
                session.used = now
            elif session.used + idle <= now:
                self.close(session)
                continue
            if session.log is not None:
                session.log.expire(now)
            if session.asks:
                session.decline_unsent(now - ASK_UNSENT)

    # ------------------------------------------------------------------------------------------------------- sessions
    def open(self, principal: Principal, target: Target, *, resumable: bool) -> Session:
        """A new session, not yet to be found by its id. Raises Overloaded at ``max_sessions``."""
        limit = self.router.snapshot.settings.max_sessions
        if len(self.sessions) + len(self._opening) >= limit:
            raise Overloaded(f"{limit} sessions are open (max_sessions)")
        session = Session(principal, target, EventLog(self._budget) if resumable else None)
        session.subscription = self.router.subscribe(target, session.changed, principal, session.client)
        return session

    def close(self, session: Session) -> None:
        """End a session: its calls are cancelled, its questions declined, its streams ended, its servers released."""
        self.sessions.pop(session.id, None)
        if not session.closed:
            session.close()
            self.router.close(session.client)

    def dismiss(self, known: Collection[Principal]) -> None:
        """End the sessions of everybody but these, their streams with them; what is in flight is answered first."""
        for session in (*self.sessions.values(), *self._opening):
            if session.principal not in known:
                session.leaving = True
                if not session.calls:
                    self.close(session)

    def find(self, id: str | None, principal: Principal, target: Target, *, sse: bool = False) -> Session:
        """The session of that id, if it is this caller's at this endpoint and of this transport.

        Raises ClientProtocolError without an id, UnknownTarget for any other.
        """
        if id is None:
            raise ClientProtocolError(NO_SESSION)
        session = self.sessions.get(id)
        if session is None or not session.belongs(principal, target) or (session.log is None) is not sse:
            raise UnknownTarget(NO_SUCH_SESSION)
        return session

    def _has(self, id: str | None, principal: Principal, target: Target) -> bool:
        session = self.sessions.get(id) if id is not None else None
        return session is not None and session.belongs(principal, target)

    # ----------------------------------------------------------------------------------------------------------- POST
    async def post(
        self, request: Request, principal: Principal, target: Target, message: Message | list[str]
    ) -> None:
        """Answer one POST: a decoded message, or the entries of a batch as ``message.split_batch`` gives them."""
        method, id_text = "", "null"
        try:
            headers = request.headers
            if type(message) is Message:
                method = message.method
                if message.kind is REQUEST:
                    id_text = message.id_text
            if accepts(headers.get("accept")) != BOTH:
                raise ClientProtocolError(NOT_ACCEPTABLE, status=406)
            session_id = headers.get("mcp-session-id")
            if method == "initialize" and id_text != "null" and not self._has(session_id, principal, target):
                # A dead id is forgiven here: official clients keep sending it, and this is how they can recover.
                assert type(message) is Message
                await self._initialize(request, principal, target, message)
                return
            session = self.find(session_id, principal, target)
            check_version(headers.get("mcp-protocol-version"))
            session.used = trio.current_time()
            if isinstance(message, list):
                await self._batch(request, session, message)
                return
            act = admit(session.state, message)
            if act is not Act.CALL:
                if act is Act.PONG:
                    await request.respond(200, build_result(id_text, "{}").encode())
                else:
                    self.take(session, act, message)
                    await request.respond(202)
                return
            text, error, outlet = await self.answer(session, message, request)
        except GatewayError as refused:
            if isinstance(refused, AuthError):
                raise
            await self.refuse(request, refused, method, id_text)
            return
        if outlet is not None and outlet.feed is not None:
            await self._end_stream(session, outlet, text, id_text)
        elif error is not None:
            await self.refuse(request, error, method, id_text)
        elif not request.responded:
            await request.respond(200, text.encode())

    async def _end_stream(self, session: Session, outlet: Outlet, text: str, id_text: str) -> None:
        instead = build_error(id_text, -32000, "The reply was too large to be kept", {"source": "gateway"})
        await outlet.send(text, instead)
        await outlet.end()
        assert outlet.feed is not None
        session.feeds.pop(outlet.feed.number, None)

    async def refuse(self, request: Request, error: GatewayError, method: str, id_text: str) -> None:
        """Answer a request with a fault of the gateway's."""
        status, text = failure(error, method, id_text)
        headers = [("Retry-After", str(ceil(error.retry_after)))] if error.retry_after and status >= 400 else []
        await request.respond(status, text.encode(), headers=headers)

    def take(self, session: Session, act: Act, message: Message) -> None:
        """Carry out what has no reply: a notification of the client's, or its answer to a question. Never waits."""
        if act is Act.ANSWER:
            session.answered(message)
        elif act is Act.CANCEL:
            id = message.param("requestId")
            if type(id) in (str, int, float):  # true is not 1
                session.cancel(id, str(message.param("reason") or "")[:200])
        elif act is Act.READY:
            session.ready()
        elif act is Act.NOTE:
            self.router.notify(self._exchange(session, message))

    def _exchange(self, session: Session, message: Message) -> Exchange:
        router = self.router
        snapshot = router.snapshot
        deadline = trio.current_time() + router.timeout_of(session.target, snapshot)
        return Exchange(message, session.principal, snapshot, session.client, session.target, deadline)

    # ---------------------------------------------------------------------------------------------- answering a request
    async def answer(
        self, session: Session, message: Message, request: Request | None, outlet: Outlet | None = None
    ) -> tuple[str, GatewayError | None, Outlet | None]:
        """The reply to a request as text; the gateway's own fault behind it, if any; the outlet, if one was needed.

        What comes before the reply goes to ``outlet``, which is made from ``request`` when it is first needed: the
        usual call needs none, and no task, scope or timer either. Raises AuthError. Cancelled, it cancels the call.
        """
        key, calls = message.id, session.calls
        call: Call | None = None
        try:
            _check_open(session)
            if key in calls:
                raise _id_in_use(message)
            exchange = self._exchange(session, message)
            got = self.router.dispatch_now(exchange)
            if got is None:
                outlet = outlet or self._outlet(session, request)
                got = await self._wait(session, exchange, outlet)
            if type(got) is Call:
                calls[key] = call = got
                if request is not None and outlet is None:
                    id_text = message.id_text
                    got.on_reply = lambda reply: request.respond_now(200, reply.text(id_text).encode())
                event = await got.next()
                got.on_reply = None
                if type(event) is not Reply:
                    outlet = outlet or self._outlet(session, request)
                    event = await self._converse(session, call, event, outlet)
                got = event
            assert type(got) is Reply
            if got.kept and request is not None and outlet is None:
                if not got.tail:
                    got.tail = got.message.text[got.message.id_span[1] :].encode()
                await request.respond(200, got.head(message.id_text).encode(), rest=got.tail)
            if request is not None and request.responded and (outlet is None or outlet.feed is None):
                return "", None, None  # ``respond_now`` did it
            return got.text(message.id_text), None, outlet
        except GatewayError as error:
            if isinstance(error, AuthError) and request is not None and (outlet is None or outlet.feed is None):
                raise
            return failure(error, message.method, message.id_text)[1], error, outlet
        except BaseException:
            if call is not None:
                call.cancel("the request was dropped")
            raise
        finally:
            if call is not None and calls.get(key) is call:
                del calls[key]

    def _outlet(self, session: Session, request: Request | None, **more: Any) -> PostOutlet:
        assert request is not None
        return PostOutlet(request, session.open_feed, prime=session.client.version == PRIMING_VERSION, **more)

    async def _wait(self, session: Session, exchange: Exchange, outlet: Outlet) -> Reply | Call:
        """Dispatch what has to wait for a start or a slot; the client may take it back, and gets signs of life."""
        key = exchange.message.id
        got: Reply | Call | None = None
        with trio.CancelScope() as scope:
            session.calls[key] = scope
            self._waiting[scope] = outlet
            try:
                got = await self.router.dispatch(exchange)
            finally:
                del self._waiting[scope]
                taken_back = session.calls.get(key) is not scope
                if not taken_back:
                    del session.calls[key]
        if not taken_back:
            assert got is not None
            return got
        if type(got) is Call:
            got.cancel("taken back")
        return _REPLY_CANCELLED

    async def _converse(self, session: Session, call: Call, event: Any, outlet: Outlet) -> Reply:
        """The slow half of a call: interim events and questions, comments while it is silent, until its reply."""
        calls, key = session.calls, call.exchange.message.id
        asked: list[Ask] = []
        try:
            while type(event) is not Reply:
                if type(event) is Interim and event is not CANCELLED:
                    await outlet.send(event.text)
                elif type(event) is Ask:
                    if len(session.asks) >= MAX_ASKS or session.closed:
                        decline(event)
                    elif event.open:
                        asked.append(event)
                        self._be_patient(call, event, asked)
                        await outlet.send(session.question(event, outlet.say))
                if calls.get(key) is not call:
                    # Taken back. Also seen here in case a full box has dropped the CANCELLED.
                    return _REPLY_CANCELLED
                event = None
                with trio.move_on_at(outlet.comment_at) as outlet.scope:
                    event = await call.next()
                outlet.scope = None
                if event is None:
                    await outlet.comment()
            return event
        finally:
            for ask in asked:
                if ask.open:
                    session.drop_question(ask, outlet.say)

    def _be_patient(self, call: Call, ask: Ask, asked: list[Ask]) -> None:
        """People take longer than programs: while somebody is asked, the call's own time stands still."""
        for other in asked:
            if other is not ask and other.open:
                ask.on_answered = other.on_answered  # it stands still already
                return
        now = trio.current_time()
        left = call.deadline - now
        call.grant(max(call.deadline, now + (self.router.snapshot.settings.park_timeout_seconds or inf)))

        def answered() -> None:
            if not call.done and not any(other.open for other in asked):
                call.grant(trio.current_time() + left)

        ask.on_answered = answered

    # ------------------------------------------------------------------------------------------------------- initialize
    async def _initialize(
        self, request: Request, principal: Principal, target: Target, message: Message
    ) -> None:
        said = hello(message)
        session = self.open(principal, target, resumable=True)
        session.greet(said)
        headers = (("Mcp-Session-Id", session.id),)
        outlet = self._outlet(session, request, headers=headers)
        try:
            self._opening[session] = None
            try:
                facts = await self.introduce(session, outlet)
            finally:
                del self._opening[session]
            if session.closed:
                raise UnknownTarget(NO_SUCH_SESSION)
            session.state = State.OPEN
            self.sessions[session.id] = session
            text = welcome(message.id_text, said.version, facts)
            if outlet.feed is None:
                await request.respond(200, text.encode(), headers=headers)
            else:
                await self._end_stream(session, outlet, text, message.id_text)
        except (GatewayError, ClientGone) as error:
            self.close(session)
            if outlet.feed is None or not isinstance(error, GatewayError):
                raise
            text = failure(error, "initialize", message.id_text)[1]
            await self._end_stream(session, outlet, text, message.id_text)
        except BaseException:
            self.close(session)
            raise

    async def introduce(self, session: Session, outlet: Outlet) -> Mapping[str, Any]:
        """What the endpoint is, for the reply to initialize. Its server may have to start. Raises GatewayError."""
        _check_open(session)
        router, snapshot = self.router, self.router.snapshot
        start = snapshot.settings.start_timeout_seconds
        spec = router.check(session.principal, session.target)
        if spec is not None:
            start = spec.or_default("start_timeout_seconds", snapshot.settings)
        # A start has its own limit, and to refuse at the request's would leave clients with a server that is just up.
        deadline = trio.current_time() + max(start, router.timeout_of(session.target, snapshot))
        token = object()
        self._waiting[token] = outlet
        try:
            return await router.initialize(session.client, session.principal, session.target, deadline)
        finally:
            del self._waiting[token]

    # ---------------------------------------------------------------------------------------------------------- batches
    async def _batch(self, request: Request, session: Session, texts: list[str]) -> None:
        """JSON-RPC batch (2025-03-26 only): replies in one array, or each as an event once something was streamed."""
        if session.client.version != BATCH_VERSION:
            raise ClientProtocolError(
                f"Batches exist in {BATCH_VERSION} only; this session speaks {session.client.version}: send one message"
            )
        outlet = self._outlet(session, request)
        replies: list[str] = []
        ids: set[Any] = set()

        async def one(message: Message) -> None:
            text, _, _ = await self.answer(session, message, None, outlet)
            if outlet.feed is None:
                replies.append(text)
            else:
                await outlet.send(text)

        def start(message: Message) -> None:
            # Tasks start in any order, but of two equal ids the first one is the good one.
            if message.id in ids:
                replies.append(failure(_id_in_use(message), message.method, message.id_text)[1])
            else:
                ids.add(message.id)
                nursery.start_soon(one, message)

        async with trio.open_nursery() as nursery:
            replies += self.each(session, texts, start)
        if outlet.feed is not None:
            for text in replies:
                await outlet.send(text)
            await outlet.end()
            session.feeds.pop(outlet.feed.number, None)
        elif replies:
            await request.respond(200, f"[{','.join(replies)}]".encode())
        else:
            await request.respond(202)

    def each(self, session: Session, texts: list[str], call: Callable[[Message], None]) -> list[str]:
        """Carry out a batch's entries as ``handle`` does; the replies known at once."""
        replies: list[str] = []
        for text in texts:
            try:
                reply = self.handle(session, decode_request(text), call)
            except Malformed as error:
                reply = build_error(error.id_text, error.code, error.reason, {"source": "gateway"})
            if reply is not None:
                replies.append(reply)
        return replies

    def handle(self, session: Session, message: Message, call: Callable[[Message], None]) -> str | None:
        """Carry out one message; its reply where that is known at once. ``call`` takes the requests that need work."""
        try:
            act = admit(session.state, message)
        except ClientProtocolError as error:
            return failure(error, message.method, message.id_text)[1]
        if act is Act.CALL or act is Act.INITIALIZE:
            call(message)
        elif act is Act.PONG:
            return build_result(message.id_text, "{}")
        else:
            self.take(session, act, message)
        return None

    # ----------------------------------------------------------------------------------------------------- GET, DELETE
    async def get(self, request: Request, principal: Principal, target: Target) -> None:
        """Carry the session's standalone stream, or with Last-Event-ID go on with the stream of that event."""
        try:
            headers = request.headers
            if not accepts(headers.get("accept")) & STREAM:
                raise ClientProtocolError(NOT_A_STREAM, status=406)
            session = self.find(headers.get("mcp-session-id"), principal, target)
            check_version(headers.get("mcp-protocol-version"))
            session.used = trio.current_time()
            last_event = headers.get("last-event-id")
            if last_event:
                feed, after = self._resumed(session, last_event)
            elif session.feed.reader is not None:
                raise ClientProtocolError("Conflict: this session's one stream is open already", status=409)
            else:
                feed, after = session.feed, session.feed.sent
        except GatewayError as refused:
            await self.refuse(request, refused, "", "null")
            return
        prime = not last_event and session.client.version == PRIMING_VERSION
        await self.carry(request, session, feed, after, priming(feed, after) if prime else b"")

    def _resumed(self, session: Session, last_event: str) -> tuple[Feed, int]:
        number, after = read_event_id(last_event)
        if number == 0:
            return session.feed, after
        feed = session.feeds.get(number)
        if feed is None:
            assert session.log is not None
            if not session.log.knows(number):
                raise ClientProtocolError("Nothing is kept for this Last-Event-ID any more; send the request again")
            feed = Feed(number, session.log)
        return feed, after

    async def carry(
        self, request: Request, session: Session, feed: Feed, after: int, first: bytes, *, lossy: bool = True
    ) -> None:
        """Write a feed to a connection until it is over, the session closed, the client gone or replaced."""
        reader = Reader(lossy=lossy)
        feed.attach(reader, after)
        if feed.number and not feed.owed:
            reader.end()  # that POST is answered: what is kept is all there is
        session.open_streams += 1
        try:
            await request.start_stream(200, STREAM_HEADERS)
            if first:
                await request.write(first)
            await follow(request, feed, reader, session if feed is session.feed else None)
            await request.finish()
        finally:
            feed.detach(reader)
            session.open_streams -= 1
            session.used = trio.current_time()

    async def delete(self, request: Request, principal: Principal, target: Target) -> None:
        """End the session (Streamable HTTP, "Session Management")."""
        try:
            session = self.find(request.headers.get("mcp-session-id"), principal, target)
            check_version(request.headers.get("mcp-protocol-version"))
        except GatewayError as refused:
            await self.refuse(request, refused, "", "null")
            return
        self.close(session)
        await request.respond(200)
