"""Being an MCP server on stdin and stdout, for desktop clients: a message a line, full duplex (compat S1 to S10).

The client's first request says which era it speaks, and the pipe then stays in that one. A legacy client is a session
that is carried by lines instead of event streams, so everything about sessions is in ``sessions`` and ``legacy``; a
modern one is ``stdio_modern``'s. Here is what both need: reading without ever waiting for an answer, an orderly end,
and what the original's desktop proxy answers when a server is unknown or can't be reached.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from gateway.auth.principal import ANONYMOUS
from gateway.downstream.legacy import LegacyFront
from gateway.downstream.lines import LineOutlet, Lines
from gateway.downstream.sessions import Session
from gateway.downstream.streams import Feed
from gateway.errors import (
    AuthError,
    CredentialsRefused,
    GatewayError,
    NoSuchServer,
    Overloaded,
    ServerProtocolError,
    StartFailed,
    UnknownTarget,
    UpstreamError,
    unexpected,
)
from gateway.exchange import Target, ViewName, decline
from gateway.protocol.eras import LATEST_LEGACY, Era, is_modern
from gateway.protocol.framing import LineDecoder, Oversize
from gateway.protocol.handshake import DISCOVER
from gateway.protocol.message import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REQUEST,
    Malformed,
    Message,
    build_error,
    decode_request,
    split_batch,
)
from gateway.protocol.session import BATCH_VERSION, State, failure, hello, welcome
from gateway.router import Router

if TYPE_CHECKING:
    from gateway.downstream.stdio_modern import ModernLines, ModernRequest

__all__ = ["Lines", "StdioFront"]

log = logging.getLogger("gateway_http")

MAX_CALLS: Final = 1000
COALESCE: Final = 0.05
"""Seconds in which list changes are joined to one notification."""
DRAIN_TICK: Final = 0.2
"""Seconds between two looks, after the end of the input, at whether the client still reads."""
LISTEN: Final = "subscriptions/listen"
KEY_HINT: Final = "(MCP_GATEWAY_API_KEY is the key that is sent)"
UNKNOWN: Final = -32001
UNREACHABLE: Final = -32002
DENIED: Final = -32003


class LineFeed:
    """Stands in a Session where HTTP has its standalone stream: what is added is a line."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.last = 0
        self.sent = 0
        self.number = 0
        self.owed = 0
        self.reader: LineFeed | None = self
        self.on_poke: Any = None

    def add(self, text: str, instead: str = "", topic: str = "") -> bytes:
        """Write one message. While the client does not read, what needs no answer is dropped."""
        if not self.lines.full or "id" in json.loads(text):
            self.lines.send(text)
        self.last = self.sent = self.last + 1
        return b""

    def poke(self) -> None:
        """There are list changes to announce."""
        if self.on_poke is not None:
            self.on_poke()

    def end(self) -> None:
        """Nothing to do: the process ends."""


class StdioFront:
    """One client on a pipe. ``target`` None serves all servers, merged.

    ``era`` is the client's, None until a request has shown it. ``server/discover`` shows nothing: who has tried it may
    still begin with initialize (protocol.md section 3, "Classifying a client"). ``remote`` says that the server is
    another gateway, whose refusals have codes of their own (compat S8).
    """

    def __init__(
        self, router: Router, target: Target, lines: Lines, *, max_message_bytes: int, remote: bool = False
    ) -> None:
        self.router = router
        self.target = target
        self.lines = lines
        self.legacy = LegacyFront(router)
        self.remote = remote
        self.era: Era | None = None
        self._modern_lines: ModernLines | None = None
        self._max = max_message_bytes
        self._feed = LineFeed(lines)
        self._announcing = False
        self._opening = trio.Event()
        self._calls = 0
        self._idle = trio.Event()
        self._idle.set()
        self._begun = False
        self._unasked = False
        self._taken_back: set[Any] = set()
        self._met = not remote
        self._status = 0
        self._reading = trio.CancelScope()
        self._draining = trio.CancelScope()
        self._drains = False

    async def run(self) -> int:
        """Serve until stdin ends and all is answered, or nobody can read the answers: the exit status (S3, S6).

        A call has its own limit in time, so the drain has one. Questions of servers are declined meanwhile.
        """
        if not self.remote:
            try:
                self.router.check(ANONYMOUS, self.target)
            except UnknownTarget:
                self.refuse_server()
                return 1
        session = self.legacy.open(ANONYMOUS, self.target, resumable=False)
        session.client.version = LATEST_LEGACY
        # The one thing a session's stream is used for here is to carry messages to the client.
        session.feed = cast(Feed, self._feed)
        session.open_streams = 1  # it ends with its pipe and never by being idle
        self.legacy.sessions[session.id] = session
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.legacy.run)
                nursery.start_soon(self.lines.write_queued)
                nursery.start_soon(self._notice_broken)
                self._feed.on_poke = lambda: self._announce_soon(session, nursery)
                with self._reading:
                    await self._read(session, nursery)
                with self._draining:
                    await self._drain(session)
                nursery.cancel_scope.cancel()
        finally:
            self.legacy.close(session)
        return self._status

    def stop(self, seconds: float) -> None:
        """Take no more requests; ``run`` returns when what is in flight is answered, at the latest after ``seconds``.

        After the end of the input it returns at once: a client that has closed it and still sends signals has no
        patience left (lifecycle page, "Shutdown", stdio).
        """
        self._draining.deadline = trio.current_time() + (0 if self._drains else seconds)
        self._reading.cancel()

    async def _notice_broken(self) -> None:
        await self.lines.broken.wait()
        self._reading.cancel()

    async def _drain(self, session: Session) -> None:
        self._drains = not self._reading.cancelled_caught
        if self._modern_lines is not None:
            self._modern_lines.end_subscriptions()
        while not self._idle.is_set() and not self._status and not self.lines.deserted():
            for id, question in list(session.asks.items()):
                # Nobody is read any more who could answer it.
                del session.asks[id]
                decline(question.ask)
            with trio.move_on_after(DRAIN_TICK):
                await self._idle.wait()
        while not self.lines.deserted():
            with trio.move_on_after(DRAIN_TICK):
                await self.lines.flush()
                return

    def refuse_server(self) -> None:
        """S3: there is no such server, or no such view."""
        target = self.target
        what = f"Server '{target}'" if type(target) is not ViewName else f"View '{target.name}'"
        self.lines.send(build_error("null", UNKNOWN, f"{what} not found in catalog", SOURCE))

    # --------------------------------------------------------------------------------------------------------- reading
    async def _read(self, session: Session, nursery: trio.Nursery) -> None:
        decoder = LineDecoder(self._max)
        while data := await self.lines.receive():
            for item in decoder.feed(data):
                await self._in_turn(session)
                self._line(session, nursery, item)
            await self.lines.room()
        for item in decoder.finish():
            await self._in_turn(session)
            self._line(session, nursery, item)

    async def _in_turn(self, session: Session) -> None:
        """Let the requests before this line be sent first: a cancellation must find its request, a server its order.

        Tasks of one turn of the loop run in any order. A request's is there after one turn, a batch entry's after two.
        """
        if self._begun:
            self._begun = False
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        await self._opened(session)

    async def _opened(self, session: Session) -> None:
        """Wait while initialize is being answered: lines come in order, so what follows it is meant for after it."""
        while session.state is State.OPENING:
            self._opening = trio.Event()
            await self._opening.wait()

    def _line(self, session: Session, nursery: trio.Nursery, line: bytes | Oversize) -> None:
        if type(line) is Oversize:
            text = f"The message is over {self._max} bytes (max_message_bytes)"
            self.lines.send(build_error("null", INVALID_REQUEST, text, SOURCE))
            return
        assert type(line) is bytes
        if not line.strip():
            return
        try:
            batch = split_batch(line) if line.lstrip()[:1] == b"[" else None
            if batch is not None:
                if session.client.version != BATCH_VERSION or session.state is State.NEW:
                    raise Malformed(f"Batches exist in {BATCH_VERSION} only: send one message a line", INVALID_REQUEST)
                self._begun = True
                self._enter()
                nursery.start_soon(self._batch, session, batch)
                return
            message = decode_request(line)
        except Malformed as error:
            # The original's words for what is no JSON at all (S5).
            text = "Parse error: invalid JSON" if error.code == PARSE_ERROR else error.reason
            self.lines.send(build_error(error.id_text, error.code, text, {**SOURCE, "reason": error.reason}))
            return
        if message.method:
            log.debug("Received request: %s", message.method)
        self._take(session, nursery, message)

    def _take(self, session: Session, nursery: trio.Nursery, message: Message) -> None:
        asked = message.kind is REQUEST
        modern = asked and message.method != "initialize" and is_modern(message.meta)
        if self.era is Era.MODERN or (self.era is None and (modern or (asked and message.method == DISCOVER))):
            self._take_modern(nursery, message)
        elif modern:
            # As the SDKs' servers have it; another era on the same pipe needs another process.
            text = "This connection was begun with a legacy revision, so requests of 2026-07-28 are not taken on it"
            self.lines.send(build_error(message.id_text, INVALID_REQUEST, text, SOURCE))
        elif asked and message.method == DISCOVER:
            text = f"Method not found: {DISCOVER}"
            self.lines.send(build_error(message.id_text, METHOD_NOT_FOUND, text, SOURCE))
        else:
            self._take_legacy(session, nursery, message)

    def _take_modern(self, nursery: trio.Nursery, message: Message) -> None:
        lines = self._modern_lines
        if lines is None:
            # Not for legacy clients' memory and start.
            from gateway.downstream.stdio_modern import ModernLines

            lines = self._modern_lines = ModernLines(self.router, self.target, self.lines)
            nursery.start_soon(lines.run)
        if message.kind is not REQUEST:
            lines.note(message)
            return
        try:
            if self._calls >= MAX_CALLS:
                raise Overloaded(f"{MAX_CALLS} requests are in flight")
            request = lines.admit(message, begun=self.era is not None)
        except GatewayError as error:
            self.lines.send(lines.refusal(error, message))
            return
        if message.method != DISCOVER:
            self.era = Era.MODERN
        self._begun = True
        self._enter()
        nursery.start_soon(self._serve_modern, lines, request)

    def _take_legacy(self, session: Session, nursery: trio.Nursery, message: Message) -> None:
        if message.kind is REQUEST and message.method != "ping":
            self.era = Era.LEGACY
        if message.method == "initialize" or message.kind is not REQUEST or message.method == "ping":
            if session.state is State.NEW and message.method != "initialize" and message.kind is not REQUEST:
                return
        elif session.state is State.NEW:
            # Piped by echo: a request without a handshake is answered all the same (S6), and what follows it waits as
            # it does for initialize: the callers that wait for one start are woken in any order.
            session.state = State.READY
            self._unasked = True
        if message.method == "notifications/cancelled":
            id = message.param("requestId")
            if type(id) in (str, int, float) and id in session.calls:
                self._taken_back.add(id)
        reply = self.legacy.handle(session, message, lambda m: self._start(session, nursery, m))
        if reply is not None:
            self.lines.send(reply)

    # ------------------------------------------------------------------------------------------------------- answering
    def _start(self, session: Session, nursery: trio.Nursery, message: Message) -> None:
        if self._calls >= MAX_CALLS:
            busy = Overloaded(f"{MAX_CALLS} requests are in flight")
            self.lines.send(failure(busy, message.method, message.id_text)[1])
            return
        unasked, self._unasked = self._unasked, False
        if unasked or message.method == "initialize":
            session.state = State.OPENING
        self._begun = True
        self._enter()
        nursery.start_soon(self._serve, session, message, unasked)

    def _enter(self) -> None:
        self._calls += 1
        if self._calls == 1:
            self._idle = trio.Event()

    def _leave(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    async def _serve(self, session: Session, message: Message, unasked: bool) -> None:
        try:
            await self.lines.room()
            text = await self._answer(session, message, unasked)
            # "The receiver of a cancellation SHOULD NOT send a response" (cancellation page).
            if text and message.id not in self._taken_back:
                self.lines.send(text)
        finally:
            self._taken_back.discard(message.id)
            self._leave()

    async def _serve_modern(self, lines: ModernLines, request: ModernRequest) -> None:
        message = request.message
        try:
            text = await lines.serve(request)
            self._met = self._met or message.method not in (DISCOVER, LISTEN)
        except GatewayError as error:
            text = self._modern_fault(lines, error, message)
        except Exception as error:
            log.exception("unexpected failure while answering %s", message.method)
            text = build_error(message.id_text, INTERNAL_ERROR, unexpected(error), SOURCE)
        finally:
            self._leave()
        if text and not request.withdrawn:
            self.lines.send(text)

    async def _answer(self, session: Session, message: Message, unasked: bool = False) -> str:
        """The reply to one request, "" for none. Contains every failure: one request can't end the others."""
        outlet = LineOutlet(self.lines, session.feed)
        try:
            if unasked:
                try:
                    await self.legacy.introduce(session, outlet)
                finally:
                    session.state = State.READY
                    self._opening.set()
            if message.method == "initialize":
                text = await self._initialize(session, message, outlet)
            else:
                text, error, _ = await self.legacy.answer(session, message, None, outlet)
                if error is not None:
                    return self._fault(error, message)
                await outlet.stand_apart()
            self._met = True
            return text
        except GatewayError as error:
            return self._fault(error, message)
        except Exception as error:
            log.exception("unexpected failure while answering %s", message.method)
            return build_error(message.id_text, INTERNAL_ERROR, unexpected(error), SOURCE)

    async def _initialize(self, session: Session, message: Message, outlet: LineOutlet) -> str:
        try:
            said = hello(message)
            session.greet(said)
            facts = await self.legacy.introduce(session, outlet)
        except GatewayError:
            session.state = State.NEW
            raise
        else:
            session.state = State.OPEN
        finally:
            self._opening.set()
        return welcome(message.id_text, said.version, facts)

    def _fault(self, error: GatewayError, message: Message) -> str:
        """S4 and S8: the codes of the original's proxy at one server's endpoint, MCP's at the merged one."""
        data = {**SOURCE, "reason": error.message}
        if isinstance(error, AuthError):
            return build_error(message.id_text, DENIED, error.message, data)
        if self.remote and isinstance(error, UpstreamError):
            return self._remote_fault(error, message, data)
        if type(self.target) is not str:
            return failure(error, message.method, message.id_text)[1]
        if isinstance(error, StartFailed):
            return build_error(message.id_text, UNREACHABLE, f"Failed to connect to server: {error.message}", data)
        if isinstance(error, UpstreamError):
            return build_error(message.id_text, error.code, f"Server error: {error.message}", data)
        return failure(error, message.method, message.id_text)[1]

    def _remote_fault(self, error: UpstreamError, message: Message, data: dict[str, Any]) -> str:
        """S8: what the gateway behind us refuses, or that it is not there."""
        if isinstance(error, CredentialsRefused):
            return build_error(message.id_text, DENIED, f"{error.message} {KEY_HINT}", data)
        if isinstance(error, NoSuchServer):
            if self._unknown_remote():
                return ""
            return build_error(message.id_text, UNKNOWN, f"Server '{self.target}' not found", data)
        if isinstance(error, ServerProtocolError):
            return build_error(message.id_text, error.code, f"Server error: {error.message}", data)
        return build_error(message.id_text, UNREACHABLE, f"Failed to connect to server: {error.message}", data)

    def _unknown_remote(self) -> bool:
        """Whether the gateway behind us has never known the server, which ends this one as S3 has it."""
        if self._met:
            return False
        if not self._status:
            self._status = 1
            self.refuse_server()
            self._reading.cancel()
        return True

    def _modern_fault(self, lines: ModernLines, error: GatewayError, message: Message) -> str:
        """Faults have the codes of protocol.md section 7; only that there is no such gateway's server is S3's, too."""
        if isinstance(error, NoSuchServer) and self._unknown_remote():
            return ""
        if self.remote and isinstance(error, CredentialsRefused):
            error = CredentialsRefused(f"{error.message} {KEY_HINT}")
        return lines.refusal(error, message)

    async def _batch(self, session: Session, texts: list[str]) -> None:
        """JSON-RPC batch (2025-03-26 only): all replies in one array. The caller has counted it as a call."""
        replies: list[str] = []
        try:
            async with trio.open_nursery() as nursery:

                async def one(message: Message) -> None:
                    text = await self._answer(session, message)
                    if text:
                        replies.append(text)

                replies += self.legacy.each(session, texts, lambda m: nursery.start_soon(one, m))
            if replies:
                self.lines.send(f"[{','.join(replies)}]")
        finally:
            self._leave()

    # ----------------------------------------------------------------------------------------------------- list changes
    def _announce_soon(self, session: Session, nursery: trio.Nursery) -> None:
        if not self._announcing:
            self._announcing = True
            nursery.start_soon(self._announce, session)

    async def _announce(self, session: Session) -> None:
        await trio.sleep(COALESCE)
        self._announcing = False
        if session.dirty():  # before its initialize nothing is announced
            session.announce()


SOURCE: Final = {"source": "gateway"}
