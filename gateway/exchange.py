"""One client request on its way through the gateway, and the conversation it has with one server.

The internal shape is the modern one (design.md section 1): a request that carries its own context, answered by any
number of interim events and exactly one reply. An ``Exchange`` is the request with its context. A ``Call`` is that
exchange at one server: ``next()`` yields Interim and Ask events and at last one Reply, or raises what went wrong.

A Call costs no task, no channel, no event and no cancel scope: the request's own task is parked and the link's reader
reschedules it (design.md section 12). The reader never waits for a client; a Call's box is bounded and may drop
progress and logs, never a question or the reply.
"""

from __future__ import annotations

import enum
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import attrs
import outcome
import trio

from gateway.auth.principal import Principal
from gateway.config.snapshot import Snapshot
from gateway.errors import GatewayError
from gateway.protocol.eras import Era
from gateway.protocol.message import ERROR, RESULT, Message, build_error, build_request, build_result, decode_request

__all__ = [
    "INTERNAL",
    "SLOW",
    "SLOW_AFTER",
    "Ask",
    "Call",
    "Client",
    "Event",
    "Exchange",
    "Interim",
    "Link",
    "Owner",
    "Reply",
    "Slow",
    "Target",
    "ViewName",
    "decline",
    "internal_exchange",
    "own_request",
]

MAX_BOX: Final = 256
"""Events a Call may hold before interim ones are dropped."""

SLOW_AFTER: Final = 0.05
"""Seconds after which a waiting request is told to look after its client (design.md section 5, disconnects)."""


@attrs.frozen(cache_hash=True)
class ViewName:
    """A view, as a client addresses it. The name "" is that of the view of all servers.

    ``mode`` is "list" or "search" where the client has asked for one, else "".
    """

    name: str = ""
    mode: str = ""

    def __str__(self) -> str:
        """For bindings and logs: no server id holds a slash."""
        return f"/{self.name}?{self.mode}" if self.mode else f"/{self.name}"


Target = str | ViewName | None
"""What an endpoint is about: a server id, a view, or None, which is the view of all servers as the config has it."""


class Owner(Protocol):
    """The one client that an isolated unit belongs to, seen from the unit: where its own messages go."""

    def ask(self, ask: Ask) -> bool:
        """Put a server's question to the client outside any call. False: there is no way to; it will be declined."""

    def notify(self, text: str) -> None:
        """Pass a server's notification (a whole JSON-RPC message) to the client. May drop the oldest."""

    def mark(self, topic: str) -> None:
        """A resource that the client has subscribed to has changed: "resource:URI"."""


@attrs.define(eq=False)
class Client:
    """What one client said of itself, for as long as its session lasts (a request, where there is none).

    key           isolates: units with ``isolation: session`` are keyed by it
    capabilities  the client's declared capabilities, as decoded JSON
    info          its clientInfo
    owner         how to reach it outside a call; None for a client that can't be reached
    context       what a modern server is told of it, made by the links when first needed; None again when it changes
    closed        its session is over
    """

    key: str
    era: Era
    version: str
    capabilities: Mapping[str, Any] = attrs.field(factory=dict)
    info: Mapping[str, Any] = attrs.field(factory=dict)
    owner: Owner | None = None
    log_level: str | None = None
    context: str | None = None
    closed: bool = False

    def set_log_level(self, level: str | None) -> None:
        """The least level of log lines it wants, None for none."""
        self.log_level = level
        self.context = None


@attrs.define(eq=False, slots=True)
class Exchange:
    """A request in flight.

    message    the client's request or notification, ids and names as the client wrote them
    target     the endpoint it came to: a server id, or a view
    changes    members of params to replace on the way to the server (name -> JSON text), such as a native tool name
    deadline   trio time by which the client is answered
    rewrite    puts the client's names for things into the reply, where the server has others
    """

    message: Message
    principal: Principal
    snapshot: Snapshot
    client: Client
    target: Target
    deadline: float
    changes: dict[str, str] | None = None
    rewrite: Callable[[Message], Message] | None = None
    on_end: Callable[[Call], None] | None = None
    on_stay: Callable[[], None] | None = None
    on_park: Callable[[Exchange], None] | None = None


class Interim:
    """Something on the way to the reply: a progress or log notification, ready to be sent to the client."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Ask:
    """A request from the server to the client. Answer it exactly once.

    message       as the server sent it; the front gives it an id of its own (``message.with_id``)
    answer        takes the client's reply message; a second call and one after the end are ignored
    on_withdrawn  set by the front: called with the reason when the server takes the question back or is gone
    on_answered   set by the front: called when the answer, whoever gave it, has gone to the server
    """

    __slots__ = ("_answer", "message", "on_answered", "on_withdrawn")

    def __init__(self, message: Message, answer: Callable[[str], None]) -> None:
        self.message = message
        self._answer: Callable[[str], None] | None = answer
        self.on_withdrawn: Callable[[str], None] | None = None
        self.on_answered: Callable[[], None] | None = None

    @property
    def open(self) -> bool:
        """Whether the server still waits for the answer."""
        return self._answer is not None

    def answer(self, reply: Message) -> None:
        """Send the client's reply (RESULT or ERROR, any id) to the server."""
        self._finish(reply.with_id(self.message.id_text))

    def refuse(self, code: int, text: str) -> None:
        """Answer with an error in the client's place."""
        self._finish(build_error(self.message.id_text, code, text))

    def resolve(self, result_text: str) -> None:
        """Answer with a result (JSON text) in the client's place."""
        self._finish(build_result(self.message.id_text, result_text))

    def withdraw(self, reason: str) -> None:
        """The server no longer waits."""
        if self._answer is not None:
            self._answer = None
            if self.on_withdrawn is not None:
                self.on_withdrawn(reason)

    def _finish(self, text: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(text)
            if self.on_answered is not None:
                self.on_answered()


class Reply:
    """The one answer to a request: a result or an error of the server's, or one the gateway made.

    A legacy client's reply is in its dialect already: links of modern servers see to that. A modern client's may lack
    what a legacy server or the gateway did not say; the modern front completes it (``translate.to_modern``).
    ``cache`` is how long the result may be kept, in ms, and by whom ("public" or "private"); None where unknown.

    One that is sent many times, to clients of one era, is ``kept``: its front puts what follows the id into ``tail``
    as bytes, so that a long list is not encoded and copied for everybody.
    """

    __slots__ = ("cache", "kept", "message", "tail")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.cache: tuple[int, str] | None = None
        self.kept = False
        self.tail = b""

    @classmethod
    def result(cls, result_text: str, result: Any = None) -> Reply:
        """A result of our own, from JSON text; ``result`` is the same decoded, where it is at hand."""
        message = Message(build_result("0", result_text), RESULT)
        message.id_span = (22, 23)
        message.id_text = "0"
        message.result_span = (33, 33 + len(result_text))
        message.result = json.loads(result_text) if result is None else result
        return cls(message)

    @classmethod
    def error(cls, code: int, text: str, data: Any = None) -> Reply:
        """An error of our own."""
        message = Message(build_error("0", code, text, data), ERROR)
        message.id_span = (22, 23)
        message.id_text = "0"
        message.result = (
            {"code": code, "message": text} if data is None else {"code": code, "message": text, "data": data}
        )
        return cls(message)

    def text(self, id_text: str) -> str:
        """The whole reply under the client's id."""
        return self.message.with_id(id_text)

    @staticmethod
    def head(id_text: str) -> str:
        """What stands before a ``tail``."""
        return f'{{"jsonrpc":"2.0","id":{id_text}'


class Slow(enum.Enum):
    """Not an event of the server's: the request has been waiting for SLOW_AFTER seconds."""

    SLOW = "slow"


SLOW: Final = Slow.SLOW

Event = Interim | Ask | Reply | Slow


class Call:
    """One exchange at one server. Made by a link; consumed by exactly one task at a time.

    The consumer calls ``next()`` until it gets a Reply or an error, or gives up with ``cancel()``. However it ends,
    ``exchange.on_end`` is called exactly once, as soon as the server is done with it (not when the consumer is).
    ``parked`` says that its client has been sent away to come back with an answer, ``rounds`` is the link's own.
    ``on_reply``, set by a consumer that waits in ``next``, gets the reply in the link's
    task, before the consumer is woken: it must neither wait nor raise, and saves the client one turn of the loop.
    ``on_event``, set by a consumer that waits elsewhere, is told there that ``next`` has something to give.
    """

    __slots__ = (
        "_box",
        "_task",
        "_told",
        "deadline",
        "done",
        "exchange",
        "failed",
        "id",
        "link",
        "on_event",
        "on_reply",
        "parked",
        "rounds",
        "started",
    )

    def __init__(self, exchange: Exchange, link: Link, id: int, started: float) -> None:
        self.exchange = exchange
        self.link = link
        self.id = id
        self.started = started
        self.deadline = exchange.deadline
        self.done = False
        self.failed = False
        self.on_event: Callable[[], object] | None = None
        self.on_reply: Callable[[Reply], object] | None = None
        self.parked = False
        self.rounds: Any = None
        self._box: deque[Interim | Ask | Reply | GatewayError] | None = None
        self._task: trio.lowlevel.Task | None = None
        self._told = False

    def __repr__(self) -> str:
        return f"<Call {self.exchange.message.method} #{self.id}{' done' if self.done else ''}>"

    # ------------------------------------------------------------------------------------------------ consumer's side
    async def next(self) -> Event:
        """Wait for the next event. SLOW comes at most once. Raises the GatewayError that ended the call.

        Cancellation leaves the call as it was; cancel it too if nobody will listen again.
        """
        box = self._box
        if box:
            event = box.popleft()
            if isinstance(event, GatewayError):
                raise event
            return event
        self._task = trio.lowlevel.current_task()
        return await trio.lowlevel.wait_task_rescheduled(self._abort)  # type: ignore[no-any-return]

    def grant(self, deadline: float) -> None:
        """Let the call last until that trio time: somebody is being asked, and people take longer than programs."""
        self.deadline = deadline
        if self.exchange.on_stay is not None:
            self.exchange.on_stay()

    def park(self) -> None:
        """Nobody works on the call before its client comes back: others may have its slot, the server stays up."""
        self.parked = True
        self.grant(math.inf)
        exchange = self.exchange
        if exchange.on_park is not None:
            exchange.on_park(exchange)

    def unpark(self, exchange: Exchange) -> None:
        """The client is back, with another request for the same call."""
        former = self.exchange
        exchange.on_end, exchange.on_stay, exchange.on_park = former.on_end, former.on_stay, former.on_park
        exchange.changes, exchange.rewrite = former.changes, former.rewrite
        self.parked = False
        self.exchange = exchange
        self.grant(exchange.deadline)

    def cancel(self, reason: str = "") -> None:
        """Give up: tell the server (unless it is done) and drop whatever still comes. Never waits."""
        if not self.done:
            self.link.cancel(self, reason)
            self.end()

    @property
    def buffered(self) -> bool:
        """Whether there is an event that nobody has taken yet."""
        return bool(self._box)

    @property
    def questions(self) -> list[Ask]:
        """Those that nobody has taken yet."""
        return [event for event in self._box or () if type(event) is Ask]

    # ---------------------------------------------------------------------------------------------------- link's side
    def deliver(self, event: Interim | Ask) -> None:
        """Hand over an interim event or a question."""
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task, outcome.Value(event))
            return
        if self._box is None or len(self._box) < MAX_BOX or isinstance(event, Ask):
            self._put(event)

    def finish(self, reply: Reply) -> None:
        """Hand over the reply; the call is done. Later ones are ignored."""
        if self.done:
            return
        if self.exchange.rewrite is not None:
            message = self.exchange.rewrite(reply.message)
            reply = reply if message is reply.message else Reply(message)
        self.end()
        task = self._task
        if task is not None:
            self._task = None
            if self.on_reply is not None:
                self.on_reply(reply)
            trio.lowlevel.reschedule(task, outcome.Value(reply))
            return
        self._put(reply)

    def fail(self, error: GatewayError) -> None:
        """End the call with an error; ``next`` raises it."""
        if self.done:
            return
        self.failed = True
        self.end()
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task, outcome.Error(error))
            return
        self._put(error)

    def _put(self, event: Interim | Ask | Reply | GatewayError) -> None:
        if self._box is None:
            self._box = deque()
        self._box.append(event)
        if self.on_event is not None:
            self.on_event()

    def tell_slow(self) -> None:
        """Wake the consumer once with SLOW, if it is waiting."""
        if not self._told:
            self._told = True
            task = self._task
            if task is not None:
                self._task = None
                trio.lowlevel.reschedule(task, outcome.Value(SLOW))

    def end(self) -> None:
        """Mark the call as done and give back what it held. Idempotent."""
        if not self.done:
            self.done = True
            on_end = self.exchange.on_end
            if on_end is not None:
                on_end(self)

    def _abort(self, raise_cancel: Any) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Link(Protocol):
    """A server that has been spoken to: its handshake is done, calls may be made.

    A link never retries. It ends by itself when its place ends; every call in flight then fails with LinkLost.
    """

    @property
    def facts(self) -> Mapping[str, Any]:
        """The handshake's result: protocolVersion, capabilities, serverInfo, instructions."""

    @property
    def era(self) -> Era: ...

    def call(self, exchange: Exchange) -> Call:
        """Send the exchange's request. Never waits. Raises Overloaded (outbox full) or LinkLost: nothing was sent."""

    def notify(self, method: str, params_text: str = "") -> None:
        """Send a notification. Never waits; dropped when the link is lost or full."""

    def cancel(self, call: Call, reason: str = "") -> None:
        """Tell the server to stop working on a call and forget it. Use ``Call.cancel``."""

    def forget(self, call: Call) -> None:
        """The call is over without the server's reply, and the server need not be told."""

    async def subscribe(self, uri: str, timeout: float) -> Message:
        """Have updates of one more resource sent: the server's RESULT, or ERROR (-32602 where it does not honour it).

        ``timeout`` is in seconds. Raises what ``Call.next`` raises.
        """

    async def unsubscribe(self, uri: str, timeout: float) -> Message:
        """Take ``subscribe`` back."""


INTERNAL: Final = Client(key="", era=Era.LEGACY, version="")
"""The gateway itself, asking for lists or pinging: the client with the empty key. Nobody can be asked behind it."""


def internal_exchange(method: str, params_text: str, deadline: float, client: Client = INTERNAL) -> Exchange:
    """A request of the gateway's own. ``deadline`` is trio time."""
    return Exchange(
        decode_request(build_request("0", method, params_text)),
        GATEWAY,
        _NO_SNAPSHOT,
        client,
        None,
        deadline,
    )


GATEWAY: Final = Principal("gateway")
_NO_SNAPSHOT: Final = Snapshot()


def decline(ask: Ask) -> None:
    """Answer a question that has no client behind it, or not any more (protocol.md section 4.2, rule 5)."""
    method = ask.message.method
    if method == "elicitation/create":
        ask.resolve('{"action":"cancel"}')
    elif method == "sampling/createMessage":
        ask.refuse(-1, "No client can be asked for sampling")
    else:
        ask.refuse(-32601, f"Method not found: {method}")


async def own_request(link: Link, method: str, params_text: str, seconds: float, client: Client) -> Message:
    """A request of the gateway's own over a link: the reply, which may be an error. Raises what ``Call.next`` raises.

    ``client`` is in whose name it is made; it has the empty key, as INTERNAL has. Questions meanwhile are declined.
    Cancelling it cancels the request at the server.
    """
    call = link.call(internal_exchange(method, params_text, trio.current_time() + seconds, client))
    try:
        while True:
            event = await call.next()
            if type(event) is Reply:
                return event.message
            if type(event) is Ask:
                decline(event)
    finally:
        call.cancel("no longer needed")
