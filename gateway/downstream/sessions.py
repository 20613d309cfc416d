"""One legacy session: what a client and the gateway know of each other for as long as it lasts.

Synchronous throughout: between two awaits of anybody nothing here changes. The fronts do the waiting and the I/O.
"""

from __future__ import annotations

import itertools
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import trio

from gateway.auth.principal import Principal
from gateway.downstream.streams import EventLog, Feed
from gateway.exchange import Ask, Call, Client, Interim, Target, decline
from gateway.hub import Subscription
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, build_notification, dumps
from gateway.protocol.session import Hello, State, announce

__all__ = ["CANCELLED", "MAX_ASKS", "Session"]

MAX_ASKS: Final = 64
"""Questions a session may have open at its client."""
MAX_DIRTY: Final = 1000
"""Topics that may wait to be announced to a client that opens no stream."""

CANCELLED: Final = Interim("")
"""Delivered to a call whose request the client took back."""

_keys = itertools.count(1)


class Question:
    """A server's question at the client. ``number``: its event on the standalone stream, 0 not sent, -1 elsewhere."""

    __slots__ = ("ask", "at", "number")

    def __init__(self, ask: Ask, number: int) -> None:
        self.ask = ask
        self.number = number
        self.at = trio.current_time()


class Session:
    """One legacy session, whatever carries it. Implements ``exchange.Owner``.

    id            192 random bits; a name, never a proof of who asks
    calls         requests in flight by id: the Call, or the scope of the task that waits to make it
    feed          what a GET stream carries: questions, notifications, list changes (with HTTP+SSE everything)
    feeds         streams of POSTs still running, for clients that come back to them
    open_streams  GET streams connected now
    leaving       whether it is to be closed as soon as its calls are over
    """

    __slots__ = (
        "_asked",
        "_dirty",
        "_streams",
        "asks",
        "calls",
        "client",
        "closed",
        "feed",
        "feeds",
        "id",
        "leaving",
        "log",
        "open_streams",
        "principal",
        "state",
        "subscription",
        "target",
        "used",
    )

    def __init__(self, principal: Principal, target: Target, log: EventLog | None) -> None:
        self.id = urlsafe_b64encode(os.urandom(24)).decode()
        self.principal = principal
        self.target = target
        self.client = Client(f"http-{next(_keys)}", Era.LEGACY, "", owner=self)
        self.state = State.NEW
        self.closed = False
        self.leaving = False
        self.calls: dict[Any, Call | trio.CancelScope] = {}
        self.asks: dict[int, Question] = {}
        self.log = log
        self.feed = Feed(0, log)
        self.feeds: dict[int, Feed] = {}
        self.open_streams = 0
        self.used = trio.current_time()
        self.subscription: Subscription | None = None
        self._dirty: dict[str, None] = {}
        self._asked = 0
        self._streams = 0

    def __repr__(self) -> str:
        where = self.target or "all"
        return f"<Session {self.client.key} {where} {self.state.name} calls={len(self.calls)} asks={len(self.asks)}>"

    def belongs(self, principal: Principal, target: Target) -> bool:
        """Whether this caller may know of it at this endpoint."""
        return (self.principal is principal or self.principal == principal) and self.target == target

    def greet(self, said: Hello) -> None:
        """Take over what the client's initialize said."""
        client = self.client
        client.version, client.capabilities, client.info = said.version, said.capabilities, said.info

    @property
    def busy(self) -> bool:
        """Whether something of it is going on, so that it is not idle."""
        return bool(self.calls) or self.open_streams > 0

    # ----------------------------------------------------------------------------------------------- exchange.Owner
    def ask(self, ask: Ask) -> bool:
        """See ``exchange.Owner``. A question before notifications/initialized waits for that (lifecycle page)."""
        if self.closed or len(self.asks) >= MAX_ASKS:
            return False
        text = self.question(ask, self._say, 0)
        if self.state is State.READY:
            self._say(text)
            self.asks[self._asked].number = self.feed.last
        return True

    def notify(self, text: str) -> None:
        """See ``exchange.Owner``."""
        if not self.closed:
            self._say(text)

    def mark(self, topic: str) -> None:
        """See ``exchange.Owner``."""
        dirty = self._dirty
        dirty[topic] = None
        if len(dirty) > MAX_DIRTY:
            del dirty[next(iter(dirty))]
        self.changed()

    def _say(self, text: str) -> None:
        self.feed.add(text)

    # ----------------------------------------------------------------------------------------------------- list changes
    def changed(self) -> None:
        """Have the stream look for list changes; the hub calls it."""
        if self.feed.reader is not None:
            self.feed.reader.poke()

    def dirty(self) -> bool:
        """Whether there are changes to announce: of lists, which the hub tells, and of single resources (``mark``)."""
        subscription = self.subscription
        if subscription is not None and subscription.dirty:
            for _, topic in subscription.take():
                if not topic.startswith("resource:") and announce(topic) is not None:
                    self._dirty[topic] = None
        return bool(self._dirty) and self.state in (State.OPEN, State.READY)

    def announce(self) -> None:
        """Put the changes on the stream."""
        self.dirty()
        dirty, self._dirty = self._dirty, {}
        for topic in dirty:
            found = announce(topic)
            if found is not None:
                self.feed.add(build_notification(*found), topic=topic)

    # -------------------------------------------------------------------------------------------------------- questions
    def question(self, ask: Ask, say: Callable[[str], None], number: int = -1) -> str:
        """Register a question; the request to send, under an id of the session's own. ``say`` sends its withdrawal."""
        self._asked = id = self._asked + 1
        self.asks[id] = Question(ask, number)
        ask.on_withdrawn = partial(self._withdrawn, id, say)
        return ask.message.with_id(str(id))

    def _withdrawn(self, id: int, say: Callable[[str], None], reason: str) -> None:
        question = self.asks.pop(id, None)
        if question is not None and question.number != 0 and not self.closed:
            tail = f',"reason":{dumps(reason)}' if reason else ""
            say(build_notification("notifications/cancelled", f'{{"requestId":{id}{tail}}}'))

    def drop_question(self, ask: Ask, say: Callable[[str], None]) -> None:
        """The call that a question belongs to is over: decline it, and tell the client that nobody waits."""
        for id, question in self.asks.items():
            if question.ask is ask:
                self._withdrawn(id, say, "the call is over")
                decline(ask)
                return

    def answered(self, message: Message) -> None:
        """A client's reply to a question. One that nobody waits for is dropped."""
        question = self.asks.pop(message.id, None) if type(message.id) is int else None
        if question is not None:
            question.ask.answer(message)

    def ready(self) -> None:
        """notifications/initialized: what waited for it is asked now."""
        self.state = State.READY
        for id, question in list(self.asks.items()):
            if question.number == 0:
                self._say(question.ask.message.with_id(str(id)))
                question.number = self.feed.last

    def decline_unsent(self, before: float) -> None:
        """Decline standalone questions from before that time that no connection has carried."""
        for id, question in list(self.asks.items()):
            if question.at <= before and (question.number == 0 or question.number > self.feed.sent):
                del self.asks[id]
                decline(question.ask)

    # ------------------------------------------------------------------------------------------------------- its calls
    def cancel(self, id: Any, reason: str) -> None:
        """End the request with this id, if it is in flight: its server is told, its POST answered with an error."""
        entry = self.calls.pop(id, None)
        if type(entry) is Call:
            entry.cancel(reason)
            entry.deliver(CANCELLED)
        elif type(entry) is trio.CancelScope:
            entry.cancel()

    def open_feed(self) -> Feed:
        """A stream for one POST's reply."""
        self._streams = number = self._streams + 1
        feed = self.feeds[number] = Feed(number, self.log, owed=1)
        return feed

    def close(self) -> None:
        """End everything of it. Idempotent."""
        self.closed = True
        if self.subscription is not None:
            self.subscription.close()
        for id in list(self.calls):
            self.cancel(id, "the session was closed")
        asks, self.asks = self.asks, {}
        for question in asks.values():
            decline(question.ask)
        for feed in (self.feed, *self.feeds.values()):
            if feed.reader is not None:
                feed.reader.end()
        if self.log is not None:
            self.log.clear()
