"""Starting, sharing, restarting and stopping servers.

A ``Unit`` is one supervised server instance: one ServerSpec, and for isolated ones the value that isolates it. Its life
is an ``async with`` block inside one task (``_attempt``); the task exists only while there is something to supervise.
What happens next is decided by the table in ``lifecycle``; this file carries it out. Everything here runs in the one
thread of the event loop, so between two awaits nothing changes.

A request takes a slot of its unit (``try_enter`` where nothing has to be waited for, else ``enter``), sends itself with
``begin``, and gives the slot back when the call ends. The last slot to come back moves the attempt's deadline to now +
idle timeout: that deadline is the idle stop. The same deadline is the start timeout before the server is ready.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final

import attrs
import trio

from gateway.auth.principal import Principal
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.directory import LISTS, LISTS_OF, Listing, Shelf, topic_of
from gateway.errors import (
    REPLACED,
    GatewayError,
    LinkLost,
    Overloaded,
    ServerProtocolError,
    StartFailed,
    UpstreamTimeout,
    of_archive,
)
from gateway.exchange import Ask, Call, Client, Exchange
from gateway.hub import Audience, Hub
from gateway.lifecycle import CIRCUIT_SECONDS, FORGET_SECONDS, MAX_FAILURES, Event, Phase, State, Tally, admit, feed
from gateway.protocol.eras import LATEST_LEGACY, LEGACY_VERSIONS, Era
from gateway.protocol.message import METHOD_NOT_FOUND, RESULT, Message, build_result, decode_reply, dumps
from gateway.runtimes.base import Place, Runtime, Surroundings
from gateway.telemetry.record import ServerStatus
from gateway.turns import Queue, Turn
from gateway.upstream.connect import Terms, UpstreamLink, WrongEra, connect
from gateway.upstream.modern import lister

__all__ = ["Counters", "Supervisor", "Unit", "UnitKey"]

log = logging.getLogger("gateway_core")

MAX_WAITING: Final = 4096
"""Requests that may wait for a slot of one unit."""
REFRESH_PAUSES: Final = (1.0, 5.0, 30.0)
"""Seconds before a changed list that could not be fetched is asked for again."""
MAX_OPENINGS: Final = 3
"""Times one attempt may start a server to find the era that it speaks."""
MAX_PAGES: Final = 100
"""Pages of one list that are read before the rest is left out; a repeated cursor ends it too."""
COALESCE: Final = 0.02
"""Seconds for which a server's list changes are gathered before the list is fetched again."""
SPACING: Final = 0.1
"""Seconds between two fetches of a list that goes on changing."""
REFRESH_LIMIT: Final = 10.0
PROBE_TIMEOUT: Final = 10.0
"""Seconds that a server may be silent to the modern probe; official clients wait as long."""
SUBSCRIBE_TIMEOUT: Final = 10.0
PROGRESS_SPACING: Final = 5.0
"""Seconds between two lines of the log about one start."""
MEASURE_LIMIT: Final = 2.0
"""Seconds that somebody who looks at a server waits for what its instances use."""
MAX_MEASURED: Final = 20
"""Instances of one server that are asked for it."""
MARGIN: Final = 1.0
"""Seconds by which a slot may come back after its call's deadline: links look at deadlines from time to time."""
LIST_TOPICS: Final = {
    "notifications/tools/list_changed": "tools",
    "notifications/prompts/list_changed": "prompts",
    "notifications/resources/list_changed": "resources",
}


_OTHER: Final = {Era.LEGACY: Era.MODERN, Era.MODERN: Era.LEGACY}


def leaf(error: BaseException) -> BaseException:
    """The first real cause inside nested exception groups: nurseries wrap what we raise through them."""
    while isinstance(error, BaseExceptionGroup):
        ours = [e for e in error.exceptions if not isinstance(e, trio.Cancelled)]
        error = ours[0] if ours else error.exceptions[0]
    return error


@attrs.define
class Counters:
    """What is counted per server id, across units, stops and reloads (compat L10). Times are trio's."""

    requests: int = 0
    errors: int = 0
    last_activity: float | None = None


@attrs.frozen(cache_hash=True)
class UnitKey:
    """Which unit a request belongs to. ``value`` is "" for a shared one."""

    spec: ServerSpec
    value: Hashable = ""


@attrs.frozen
class Directions:
    """What the composition root gives the supervisor, so that it depends on no file, variable or front.

    surroundings  the environment, log sink and guard of one server's process; raises StartFailed for unset variables
    info          how the gateway introduces itself to servers
    """

    runtimes: Mapping[str, Runtime]
    surroundings: Callable[[ServerSpec], Surroundings]
    settings: Callable[[], Settings]
    info: Mapping[str, Any]


def _place_of(
    spec: ServerSpec, client: Client, principal: Principal, *, listing: bool = False
) -> tuple[Hashable, Audience]:
    """Which of a server's isolated units a client's requests go to, and whom that unit's changes concern.

    ``listing``: its requests for lists. Only with ``isolation: call`` that makes a difference.
    """
    isolation = spec.isolation
    if isolation == "session" and client.era is Era.MODERN:
        # No session: the principal is one, for each way in which it can be asked (protocol.md section 4.6).
        audience = (principal, client.key)
        return ("modern", spec, *audience), audience
    if isolation == "session":
        # By id, not by definition: the session keeps the definition it began with (compat W5).
        return ("session", spec.id, client.key), client.key
    if isolation == "principal":
        return (spec, principal, client.era, json.dumps(client.capabilities, sort_keys=True)), (principal, "")
    if isolation == "tenant":
        return (spec, principal.tenant), None
    return (spec, "listing") if listing else object(), None


def _unreachable(client: Client) -> Client:
    """A client as a server is told of it that serves several of its kind: none of them is its owner."""
    return Client(client.key, client.era, client.version, client.capabilities, client.info)


class Unit:
    """One supervised server instance.

    ``link`` is set exactly while calls may be made. ``active`` counts the slots taken (at most ``limit``), ``holds``
    what else keeps the unit from idling: resource subscriptions and work of the gateway's own. ``principal`` is who was
    the first to use an isolated one. ``own_lists`` are those of a client's own server that have become others than its
    kind's. ``mute`` says that it could not list its tools, ``progress`` what its start is doing, for people.
    """

    def __init__(self, key: UnitKey, supervisor: Supervisor, client: Client | None) -> None:
        spec = key.spec
        self.key = key
        self.spec = spec
        self.supervisor = supervisor
        self.client = client
        self.state = State()
        self.link: UpstreamLink | None = None
        self.facts: Mapping[str, Any] = {}
        self.own_lists: dict[str, Listing] = {}
        self.mute = False
        self.progress = ""
        self.active = 0
        self.holds = 0
        self.replies = 0
        self.started_at = 0.0
        self.started_wall = 0.0
        self.failed_at = -inf
        self.retired = False
        self.audience: Audience = None
        self.principal: Principal | None = None
        self.unhealthy = ""
        self.subscribers: dict[str, dict[Client, str]] = {}
        self._counters = supervisor.counters_of(spec.id)
        self._scope: trio.CancelScope | None = None
        self._idle_at = inf
        self._place: Place | None = None
        self._changed = trio.Event()
        self._queue = Queue()
        self._failure: GatewayError | None = None
        self._stopping = ""
        self._harmed = False
        self._refreshing: dict[str, bool] = {}
        self._next_word = -inf
        self._began = 0.0
        self.configure(supervisor.directions.settings())

    def configure(self, settings: Settings) -> None:
        """Take over limits and times, the entry's own first. A running server meets them from its next turn on."""
        spec = self.spec
        self.limit: int = spec.or_default("max_connections_per_server", settings)
        self.idle_timeout: float = spec.or_default("idle_timeout_seconds", settings) or inf
        self.start_timeout: float = spec.or_default("start_timeout_seconds", settings)
        self.health_interval: float = spec.or_default("health_check_interval_seconds", settings)
        self.max_message_bytes: int = spec.or_default("max_message_bytes", settings)
        if self.link is not None and self.active == 0 and self.holds == 0:
            self._idle_at = inf
            self._rest()

    @property
    def running(self) -> bool:
        """Whether an attempt is under way, from its start to the end of its stop."""
        return self._scope is not None

    def __repr__(self) -> str:
        return f"<Unit {self.spec.id} {self.state.phase.name} active={self.active} holds={self.holds}>"

    @property
    def shown_status(self) -> str:
        """The status of compat H16."""
        if self.state.phase is Phase.READY:
            return "unhealthy" if self.unhealthy else "running" if self.link is not None else "shutting_down"
        return str(self.state.phase.value)

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts of the running instance, for people."""
        facts = {"protocol_version": self.facts.get("protocolVersion"), "server_info": self.facts.get("serverInfo")}
        return {**facts, **(self.link.details if self.link is not None else {})}

    # --------------------------------------------------------------------------------------------------- being used
    def try_enter(self, deadline: float) -> bool:
        """Take a slot if the server is ready and one is free; then call ``begin``, or ``leave`` to give it back.

        ``deadline`` is the trio time by which the slot will have come back.
        """
        active = self.active
        link = self.link
        # A lost link stands here until its attempt's task has had its turn; the next call is for the next attempt.
        if link is None or link.lost is not None or active >= self.limit or self._queue or self._stopping:
            return False
        if active == 0 and deadline + MARGIN >= self._idle_at:
            # The idle stop would come during this call. (Else it stays where it is: moving it costs more than the rest
            # of this method.) It may just have come, and then the server is being stopped.
            scope = self._scope
            assert scope is not None
            if scope.cancel_called:
                return False
            scope.deadline = self._idle_at = inf
        self.active = active + 1
        return True

    async def enter(self, deadline: float, client: str = "") -> None:
        """Take a slot of the running server, waiting for a free one and for its start.

        ``client`` is who asks: clients that wait are served in turn, each in its own order.

        Raises UpstreamTimeout at ``deadline`` (trio time), StartFailed when it does not start, Overloaded when too many
        wait. Cancellation gives the place back and leaves a start going on.
        """
        if self.active < self.limit and not self._queue:
            self.active += 1
        else:
            await self._queue_up(deadline, client)
        try:
            with trio.move_on_at(deadline):
                await self.ready()
                return
        except BaseException as error:
            if isinstance(error, GatewayError):
                self._counters.errors += 1
            self.leave()
            raise
        self._counters.errors += 1
        self.leave()
        raise self._still_starting()

    async def _queue_up(self, deadline: float, client: str) -> None:
        if len(self._queue) >= MAX_WAITING:
            raise Overloaded(
                f"Server '{self.spec.id}' has {MAX_WAITING} requests waiting "
                f"(max_connections_per_server is {self.limit})"
            )
        turn = Turn()
        self._queue.put(client, turn)
        try:
            with trio.move_on_at(deadline):
                await turn.task.wait()
        finally:
            if not turn.task.is_set():
                self._queue.remove(client, turn)
        if turn.error is not None:
            self._counters.errors += 1
            raise turn.error
        if not turn.given:
            self._counters.errors += 1
            raise UpstreamTimeout(
                f"Server '{self.spec.id}' was busy with {self.limit} other requests (max_connections_per_server)"
            )

    def begin(self, exchange: Exchange) -> Call:
        """Send the exchange to the ready server, with a slot taken; the slot comes back when the call ends.

        Raises what ``Link.call`` raises; the slot is then given back already.
        """
        counters = self._counters
        counters.requests += 1
        counters.last_activity = trio.current_time()
        exchange.on_end = self._end
        exchange.on_stay = self._stay
        exchange.on_park = self._park
        link = self.link
        try:
            if link is None:
                raise LinkLost(f"Server '{self.spec.id}' has just ended; try again")
            return link.call(exchange)
        except GatewayError:
            counters.errors += 1
            self.leave()
            raise

    def _end(self, call: Call) -> None:
        self._count(call)
        self.leave()

    def _count(self, call: Call) -> None:
        if call.failed:
            self._counters.errors += 1
            link = self.link
            if link is not None and link.lost is not None:
                self._harmed = True
        else:
            self.replies += 1

    def _park(self, exchange: Exchange) -> None:
        """Its slot is for others until it ends, but the server must not idle. A second time changes nothing."""
        exchange.on_park = None
        exchange.on_end = self._end_parked
        self.hold()
        self.leave()

    def _end_parked(self, call: Call) -> None:
        self._count(call)
        self.unhold()

    def _stay(self) -> None:
        """A call may outlast what its slot was taken for: no idle stop before it is over."""
        if self._scope is not None and self.link is not None and not self._scope.cancel_called:
            self._scope.deadline = self._idle_at = inf

    def leave(self) -> None:
        """Give a slot back; the next in the queue gets it."""
        self._counters.last_activity = trio.current_time()
        queue = self._queue
        while queue:
            turn = queue.take()
            if not turn.task.is_set():
                turn.given = True
                turn.task.set()
                return
        self.active -= 1
        if self.active == 0 and self.holds == 0:
            self._rest()

    def hold(self) -> None:
        """Keep the unit from idling."""
        self.holds += 1
        if self._scope is not None and self.link is not None:
            self._scope.deadline = self._idle_at = inf

    def unhold(self) -> None:
        """Take one ``hold`` back."""
        self.holds -= 1
        if self.active == 0 and self.holds == 0:
            self._rest()

    def _rest(self) -> None:
        """Nobody uses it: stop it if it was replaced, else let the idle timeout run.

        What could not even be started, since too many run, leaves nothing: callers can make any number of kinds of it.
        """
        if self.retired or self.spec.isolation == "call":
            self.stop_soon("replaced")
        elif self._scope is None:
            if self._disposable:
                self.supervisor.forget(self)
        elif self.link is not None:
            at = trio.current_time() + self.idle_timeout
            # A deadline that is nearly right stays; a busy unit would move it thousands of times a second.
            if self._idle_at == inf or at - self._idle_at > min(1.0, self.idle_timeout / 100):
                self._scope.deadline = self._idle_at = at

    # ------------------------------------------------------------------------------------------- starting, stopping
    async def ready(self, *, by_hand: bool = False) -> UpstreamLink:
        """The link of the running server, started if need be; any number of callers wait for one start.

        Raises StartFailed (with ``retry_after`` while it may not be tried). Cancellation leaves the start going on.
        """
        while True:
            scope = self._scope
            link = self.link
            if link is not None and link.lost is None and scope is not None and not scope.cancel_called:
                if self.active:
                    scope.deadline = self._idle_at = inf
                return link
            if scope is None:
                self.start(by_hand=by_hand)
            starting = self.state.phase is Phase.STARTING
            await self._changed.wait()
            failure = self._failure
            if starting and self.link is None and failure is not None:
                raise failure.anew() from failure

    async def hold_ready(self, deadline: float) -> None:
        """``hold`` it, started; then ``unhold``. Raises StartFailed, UpstreamTimeout at ``deadline``."""
        self.hold()
        try:
            with trio.move_on_at(deadline):
                await self.ready()
                return
            raise self._still_starting()
        except BaseException:
            self.unhold()
            raise

    def _still_starting(self) -> UpstreamTimeout:
        doing = f" ({self.progress})" if self.progress else ""
        return UpstreamTimeout(f"Server '{self.spec.id}' is still starting{doing}; try again later")

    def start(self, *, by_hand: bool = False) -> None:
        """Begin an attempt without waiting for it. Raises StartFailed while backoff or the circuit forbid one."""
        wait = admit(self.state, trio.current_time(), by_hand=by_hand)
        if wait > 0:
            circuit = "circuit open, " if self.state.circuit_open else ""
            last = self._failure if isinstance(self._failure, StartFailed) else StartFailed("")
            raise last.anew(
                f"Server '{self.spec.id}' failed {self.state.failures} times in a row ({circuit}next attempt in "
                f"{wait:.1f} s): {self.state.last_error}",
                retry_after=wait,
            )
        if by_hand:
            self.supervisor.forgive(self.spec)
        else:
            self.supervisor.check_failures(self)
        self.supervisor.check_room(self.spec)
        self._failure = None
        self._stopping = ""
        self._harmed = False
        self._scope = trio.CancelScope()
        self._feed(Event.START)
        self.supervisor.spawn(self._attempt)

    def stop_soon(self, why: str) -> None:
        """Begin to stop; calls in flight fail. Harmless when nothing runs."""
        if self._scope is None:
            self.supervisor.forget(self)
        elif not self._scope.cancel_called:
            self._stopping = why
            self._scope.cancel()

    def retire(self) -> None:
        """Its definition or its owner is gone: stop as soon as nobody uses it."""
        self.retired = True
        if self.active == 0 and self.holds == 0:
            self.stop_soon("replaced")

    async def stopped(self) -> None:
        """Return when nothing of it runs."""
        while self._scope is not None:
            await self._changed.wait()

    def _feed(self, event: Event, error: str = "") -> None:
        self.state = feed(
            self.state,
            event,
            trio.current_time(),
            error=error,
            replies=self.replies,
            jitter=random.uniform(0.8, 1.2),
        )
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # ---------------------------------------------------------------------------------------------------- one attempt
    async def _attempt(self) -> None:
        """Start the server, keep it, stop it. Contains every failure: one server can't end the gateway."""
        scope = self._scope
        assert scope is not None
        failure: GatewayError | None = None
        try:
            with scope:
                try:
                    await self._start_and_keep(scope)
                except BaseExceptionGroup as group:
                    # A server that is lost while it is stopped: the nurseries bring both. The loss must stay here.
                    cancelled, rest = group.split(trio.Cancelled)
                    if rest is not None:
                        failure = self._contain(rest)
                    if cancelled is not None:
                        raise cancelled from None
                except Exception as error:
                    failure = self._blame(error)
        finally:
            self._finish(scope, failure)

    def _contain(self, group: BaseExceptionGroup[BaseException]) -> GatewayError:
        """The fault in a group without cancellations. Raises what is no fault, such as KeyboardInterrupt."""
        error = leaf(group)
        if not isinstance(error, Exception):
            raise error
        return self._blame(error)

    async def _start_and_keep(self, scope: trio.CancelScope) -> None:
        spec, supervisor = self.spec, self.supervisor
        limiter, token = supervisor.starting, object()
        await limiter.acquire_on_behalf_of(token)

        def up(link: UpstreamLink) -> None:
            nonlocal token
            limiter.release_on_behalf_of(token)
            token = None
            self._up(link, scope)

        try:
            self._began = trio.current_time()
            scope.deadline = self._began + self.start_timeout
            self._say(logging.INFO, "Starting server")
            runtime = supervisor.runtime_of(spec)
            surroundings = attrs.evolve(supervisor.directions.surroundings(spec), progress=self._progressed)
            for _ in range(MAX_OPENINGS):
                try:
                    await self._open(runtime, surroundings, up, scope)
                    return
                except Exception as error:
                    wrong = leaf(error)
                    if not isinstance(wrong, WrongEra):
                        raise
                    supervisor.refute(spec, Era.MODERN if wrong.first is Era.LEGACY else Era.LEGACY)
                    what = f"Starting server again to speak the {wrong.first.value} era"
                    self._say(logging.INFO, what, reason=wrong.reason)
            raise StartFailed("the server answers neither server/discover nor initialize")
        finally:
            if token is not None:
                limiter.release_on_behalf_of(token)

    async def _open(
        self, runtime: Runtime, surroundings: Surroundings, up: Callable[[UpstreamLink], None], scope: trio.CancelScope
    ) -> None:
        """One process, container or connection from its start to its end."""
        terms = self._terms()
        assert runtime.open is not None
        async with runtime.open(self.spec.runtime, surroundings) as place:
            self._place = place
            async with connect(place, terms) as link:
                if len(terms.eras) > 1 and link.era is not terms.eras[0] and not link.slow:
                    self.supervisor.refute(self.spec, terms.eras[0])
                await self._replay(link)
                up(link)
                try:
                    await self._keep(link)
                finally:
                    self.link = None
                    if scope.cancel_called:
                        if not self._stopping:
                            self._say(logging.INFO, "Stopping idle server", idle_seconds=self.idle_timeout)
                        self._feed(Event.STOP)

    def _progressed(self, text: str, *, extend: bool = False) -> None:
        """See ``runtimes.base.Progress``. Every step is shown, a new one each few seconds is logged."""
        scope = self._scope
        if scope is None or self.state.phase is not Phase.STARTING:
            return
        now = trio.current_time()
        if extend:
            scope.deadline = max(scope.deadline, now + self.start_timeout)
        if text != self.progress:
            self.progress = text
            if now >= self._next_word:
                self._next_word = now + PROGRESS_SPACING
                self._say(logging.INFO, "Server starting", progress=text)

    async def measure(self) -> Mapping[str, Any]:
        """What the running instance uses now, where its runtime can tell; {} when it can't within MEASURE_LIMIT."""
        measure = None if self._place is None else self._place.measure
        found: Mapping[str, Any] = {}
        if measure is not None and self.link is not None:
            with trio.move_on_after(MEASURE_LIMIT):
                found = await measure()
        return found

    def _terms(self) -> Terms:
        client = self.client
        directions = self.supervisor.directions
        info = directions.info if client is None else client.info or directions.info
        return Terms(
            self.spec.id,
            self._noticed,
            self._asked,
            info,
            {} if client is None else client.capabilities,
            client.version if client is not None and client.version in LEGACY_VERSIONS else LATEST_LEGACY,
            isolated=client is not None,
            lister=lister(client, info),
            max_message_bytes=self.max_message_bytes,
            timeout=inf,
            eras=self._eras(),
            probe_timeout=min(PROBE_TIMEOUT, self.start_timeout / 2),
        )

    def _eras(self) -> tuple[Era, ...]:
        """The eras to try, in order (protocol.md section 3): an isolated server speaks its client's if it can, a shared
        one the modern, in which one process serves clients of both. What it was found not to speak is tried last.
        """
        if self.spec.era != "auto":
            return (Era(self.spec.era),)
        first = Era.MODERN if self.client is None else self.client.era
        if self.supervisor.refuted.get(self.spec) is first:
            first = _OTHER[first]
        return first, _OTHER[first]

    async def _replay(self, link: UpstreamLink) -> None:
        """Tell a restarted server what its predecessor knew: log level and resource subscriptions."""
        for uri in self.subscribers:
            self._check_replay("resources/subscribe", await link.subscribe(uri, SUBSCRIBE_TIMEOUT))
        client = self.client
        if client is not None and client.log_level is not None and link.era is client.era is Era.LEGACY:
            method, params = "logging/setLevel", dumps({"level": client.log_level})
            self._check_replay(method, await link.request(method, params, timeout=SUBSCRIBE_TIMEOUT))

    def _check_replay(self, method: str, reply: Message) -> None:
        if reply.kind is not RESULT:
            self._say(logging.WARNING, f"Replaying {method} failed", error=str(reply.result)[:200])

    def _up(self, link: UpstreamLink, scope: trio.CancelScope) -> None:
        self.link = link
        self.progress = ""
        self.facts = link.facts
        self.replies = 0
        self.unhealthy = ""
        self.started_at = trio.current_time()
        self.started_wall = time.time()
        self._feed(Event.READY)
        self.supervisor.shelf.put_facts(self.spec, link.facts)
        self._say(
            logging.INFO,
            "Server ready",
            seconds=round(self.started_at - self._began, 3),
            era=link.era.value,
            revision=link.facts.get("protocolVersion"),
            era_decided_by=link.decided,
        )
        idle = self.active == 0 and self.holds == 0
        scope.deadline = self._idle_at = self.started_at + self.idle_timeout if idle else inf
        if idle and self.retired:
            self.stop_soon("replaced")
        else:
            self._verify()

    async def _keep(self, link: UpstreamLink) -> None:
        """Stay while the server stays. Raises when it is lost in a way that counts as a failure."""
        if link.ping is not None and self.health_interval:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._check_health, link)
                await link.wait_closed()
                nursery.cancel_scope.cancel()
        else:
            await link.wait_closed()
        lost = link.lost or LinkLost(f"Server '{self.spec.id}' ended")
        if self._harmed or self.replies == 0:
            raise lost
        self._say(logging.INFO, "Server ended while idle", reason=lost.message)

    async def _check_health(self, link: UpstreamLink) -> None:
        """Ask the server now and then whether it lives. Never activity, never the end of a server at work (K16)."""
        assert link.ping is not None
        while True:
            await trio.sleep(self.health_interval)
            try:
                await link.ping(min(self.health_interval, 10.0))
                self.unhealthy = ""
            except GatewayError as error:
                self._say(logging.WARNING, "Server health check failed", error=error.message)
                if self.active == 0:
                    raise
                self.unhealthy = error.message

    def _blame(self, error: BaseException) -> GatewayError:
        if isinstance(error, GatewayError):
            return error
        if of_archive(error):
            return StartFailed(REPLACED)
        log.error("unexpected failure while running server %s", self.spec.id, exc_info=error)
        return StartFailed(f"Server '{self.spec.id}' could not be run: internal error ({type(error).__name__})")

    def _finish(self, scope: trio.CancelScope, failure: GatewayError | None) -> None:
        """The attempt is over and everything of it is gone: decide what comes next and tell everybody."""
        starting = self.state.phase is Phase.STARTING
        if failure is None and starting and not self._stopping and scope.cancelled_caught:
            reason = f"no handshake within {self.start_timeout:g} s (start_timeout_seconds)"
            if self._place is not None and hasattr(self._place, "diagnosis"):
                reason += f"; {self._place.diagnosis()}"
            elif self.progress:
                reason += f"; {self.progress}"
            failure = StartFailed(reason)
        elif failure is None and starting:
            failure = StartFailed(f"Server '{self.spec.id}' was stopped while it started")
            self._stopping = self._stopping or "shutdown"
        self._scope = None
        self._place = None
        self.progress = ""
        self._next_word = -inf
        self._failure = failure
        self.own_lists.clear()
        self.supervisor.deviants.discard(self)
        if failure is None or self._stopping:
            reason = self._stopping or ("idle" if scope.cancelled_caught else "ended")
            self._say(logging.INFO, "Server stopped", reason=reason)
            self._feed(Event.ENDED)
        else:
            self._say(logging.WARNING, "Failed to start server" if starting else "Server failed", error=failure.message)
            self._feed(Event.FAILED, failure.message)
            self.failed_at = trio.current_time()
            if self.client is not None and (starting or self.replies == 0):
                self.supervisor.failed(self)
        if starting and failure is not None:
            # All who wait for this start are told now, also those who wait for a slot.
            for turn in self._queue:
                if not turn.task.is_set():
                    turn.error = failure.anew()
                    turn.task.set()
            self._queue.clear()
        if self._disposable and self.unused:
            self.supervisor.forget(self)

    @property
    def unused(self) -> bool:
        """Whether nothing of it runs and nobody waits for it."""
        return self._scope is None and self.active == 0 and self.holds == 0

    @property
    def _disposable(self) -> bool:
        """Whether a new one would do as well while nothing of it runs: who isolates it may not come again."""
        return self.retired or (self.client is not None and not self.state.failures)

    def _say(self, level: int, what: str, **fields: Any) -> None:
        log.log(level, what, extra={"fields": {"server_id": self.spec.id, **fields}})

    # ------------------------------------------------------------------------------------- what it says by itself
    def _asked(self, ask: Ask) -> bool:
        owner = self.client.owner if self.client is not None else None
        return owner is not None and owner.ask(ask)

    def _noticed(self, message: Message) -> None:
        method = message.method
        owner = self.client.owner if self.client is not None else None
        topic = LIST_TOPICS.get(method)
        if topic is not None:
            self._list_changed(topic)
        elif method == "notifications/resources/updated":
            uri = message.param("uri")
            for client, shown in self.subscribers.get(uri, {}).items() if type(uri) is str else ():
                if client.owner is not None:
                    client.owner.mark(f"resource:{shown}")
        elif owner is not None:
            owner.notify(message.text)
        else:
            # A shared server does not say whom its logs are for (protocol.md section 4.6).
            log.debug("server %s: %s", self.spec.id, message.text[:500])

    def _list_changed(self, topic: str) -> None:
        """Tell whoever may have listed it.

        Where it is known, it is fetched first: a server that says so without a change must not make every client list
        again.
        """
        self.mute = False
        known = [method for method in LISTS_OF[topic] if self.known(method) is not None]
        if topic in self._refreshing:
            self._refreshing[topic] = True
        elif known:
            self._refresh_soon(topic, known)
        else:
            self._publish(topic)

    def _publish(self, topic: str) -> None:
        if self.spec.isolation != "call":  # whose next server lists as if nothing had happened
            self.supervisor.hub.publish(self.spec.id, topic, self.audience)

    def _verify(self) -> None:
        """A server that has just started may list something else than its predecessor, or than what was kept on disk.

        Of an isolated one that is only asked if nobody was yet whose client can be asked the same: servers offer more
        to clients that can be asked more, and those of a kind are as good as each other.
        """
        if self.spec.isolation == "call":
            return
        volume, askable = self.supervisor.shelf.volume(self.spec), self._askable()
        for topic, methods in LISTS_OF.items():
            known = [
                method
                for method in methods
                if method in volume.listings and (self.client is None or volume.verified.get(method) != askable)
            ]
            if known and topic not in self._refreshing:
                self._refresh_soon(topic, known)

    def _refresh_soon(self, topic: str, methods: Sequence[str]) -> None:
        self._refreshing[topic] = False
        self.supervisor.spawn(partial(self._refresh, topic, methods))

    async def _refresh(self, topic: str, methods: Sequence[str]) -> None:
        """Fetch lists until they are what the server has now."""
        pauses = iter(REFRESH_PAUSES)
        pause: float | None = COALESCE
        try:
            while pause is not None:
                await trio.sleep(pause)
                self._refreshing[topic] = False
                pause = None
                for method in methods:
                    link = self.link
                    if link is None:
                        return
                    try:
                        listing = await self._list(link, method, trio.current_time() + REFRESH_LIMIT)
                    except GatewayError as error:
                        self._say(logging.DEBUG, "Listing again failed", method=method, error=error.message)
                        pause = next(pauses, None)
                    else:
                        self._take(listing)
                if self._refreshing[topic]:
                    pause = SPACING
        finally:
            del self._refreshing[topic]

    def _take(self, listing: Listing) -> None:
        """Keep a list that the server has just answered with, and tell who sees another one now.

        The first of its kind speaks for all. After that, what a client's own server lists differently is its own.
        """
        shelf, method = self.supervisor.shelf, listing.method
        if self.client is None or method not in shelf.volume(self.spec).verified:
            if shelf.put(self.spec, listing, self._askable()):
                self.supervisor.hub.publish(self.spec.id, topic_of(method))
            return
        former = self.known(method)
        if listing == shelf.listing(self.spec, method):
            self.own_lists.pop(method, None)
        else:
            self.own_lists[method] = listing
        if self.own_lists:
            self.supervisor.deviants.add(self)
        else:
            self.supervisor.deviants.discard(self)
        if listing != former:
            self._publish(topic_of(method))

    def _askable(self) -> str:
        """What its client can be asked, as the shelf has it."""
        return "" if self.client is None else json.dumps(self.client.capabilities, sort_keys=True)

    # --------------------------------------------------------------------------------------------------------- listing
    def known(self, method: str) -> Listing | None:
        """The list as it was last seen, of this server or of its kind; None if nobody has seen it."""
        return self.own_lists.get(method) or self.supervisor.shelf.listing(self.spec, method)

    async def listing(self, method: str, deadline: float) -> Listing:
        """One list, kept until the server says that it changed. Starts the server if need be.

        Raises what ``hold_ready`` raises, what ``Call.next`` raises, and ServerProtocolError for an answer that is no
        list.
        """
        found = self.known(method)
        if found is not None:
            return found
        await self.hold_ready(deadline)
        try:
            link = self.link
            if link is None:
                raise ServerProtocolError(f"Server '{self.spec.id}' has just ended")
            listing = await self._list(link, method, deadline)
            self.supervisor.shelf.put(self.spec, listing, self._askable())
            return listing
        finally:
            self.unhold()

    async def list_all(self, first: str, listed: Callable[[str], None]) -> None:
        """Have every list kept that is not known yet, ``first`` first; ``listed`` is told of each that came.

        Starts the server; takes no slot. Raises as ``listing`` does, after all lists were tried.
        """
        failure: GatewayError | None = None
        await self.hold_ready(inf)
        try:
            for method in sorted(LISTS, key=lambda method: method != first):
                if self.supervisor.shelf.listing(self.spec, method) is not None:
                    continue
                try:
                    await self.listing(method, trio.current_time() + REFRESH_LIMIT)
                except GatewayError as error:
                    failure = failure or error
                else:
                    listed(method)
        finally:
            self.unhold()
        if failure is not None:
            raise failure

    async def _list(self, link: UpstreamLink, method: str, deadline: float) -> Listing:
        """All pages of one list."""
        if topic_of(method) not in link.facts.get("capabilities", {}):
            return Listing(method)
        member = LISTS[method][0]
        items: list[Mapping[str, Any]] = []
        cursor: object = None
        ttl, public = inf, True
        seen: set[str] = set()
        for _ in range(MAX_PAGES):
            params = "" if cursor is None else dumps({"cursor": cursor})
            reply = await link.request(method, params, timeout=max(0.0, deadline - trio.current_time()))
            result = reply.result
            if reply.kind is not RESULT or not isinstance(result, dict):
                if reply.kind is not RESULT and result.get("code") == METHOD_NOT_FOUND:
                    break
                raise ServerProtocolError(
                    f"Server '{self.spec.id}' answered {method} with an error: {str(result)[:200]}"
                )
            page_ttl = result.get("ttlMs")
            ttl = min(ttl, page_ttl if type(page_ttl) is int and page_ttl > 0 else 0)
            public = public and result.get("cacheScope") == "public"
            page = result.get(member)
            items += [item for item in page if isinstance(item, dict)] if isinstance(page, list) else []
            # "" is a valid cursor, only absence ends the list.
            cursor = result.get("nextCursor")
            if not isinstance(cursor, str) or cursor in seen:
                break
            seen.add(cursor)
        return Listing(method, tuple(items), 0 if ttl == inf else int(ttl), public)

    # --------------------------------------------------------------------------------------------------- subscriptions
    async def subscribe(self, uri: str, client: Client, deadline: float, shown: str = "") -> Message:
        """Have a client told of a resource's updates: one subscription at the server, however many clients.

        ``shown`` is the URI under which the client knows it, where that is another one.

        The server's reply to it, or one of ours where it was subscribed already. Raises what ``enter`` raises.
        """
        if uri in self.subscribers and self.link is not None:
            self.subscribed(uri, client, shown)
            return decode_reply(build_result("0", "{}"))
        await self.enter(deadline)
        try:
            link = self.link
            if link is None:
                raise LinkLost(f"Server '{self.spec.id}' has just ended; try again")
            self._counters.requests += 1
            reply = await link.subscribe(uri, max(0.0, deadline - trio.current_time()))
            if reply.kind is RESULT:
                self.subscribed(uri, client, shown)
                if client.closed:  # in the turn in which the reply came: nobody else will take it back
                    self.supervisor.close_client(client)
            return reply
        finally:
            self.leave()

    def subscribed(self, uri: str, client: Client, shown: str = "") -> None:
        """A client has subscribed to a resource: the unit stays up for it (compat L9)."""
        clients = self.subscribers.setdefault(uri, {})
        if client not in clients:
            clients[client] = shown or uri
            self.hold()

    def unsubscribed(self, uri: str, client: Client) -> bool:
        """Take it back; whether that was the last one for this resource."""
        clients = self.subscribers.get(uri)
        if clients is None or client not in clients:
            return False
        del clients[client]
        last = not clients
        if last:
            del self.subscribers[uri]
        self.unhold()
        return last

    async def unsubscribe(self, uri: str) -> None:
        """Tell the running server that nobody wants this resource any more; failures are logged only."""
        link = self.link
        if link is not None:
            try:
                await link.unsubscribe(uri, SUBSCRIBE_TIMEOUT)
            except GatewayError as error:
                self._say(logging.DEBUG, "Unsubscribing failed", error=error.message)


class Supervisor:
    """All units. ``run`` is its task; everything else is called from other tasks of the same loop.

    ``refuted`` is the era that a server was found not to speak, ``shelf`` what is known of servers whether they run or
    not, ``deviants`` are the units whose clients see other lists than the shelf's.
    """

    def __init__(self, directions: Directions, hub: Hub) -> None:
        self.directions = directions
        self.hub = hub
        self.starting = trio.CapacityLimiter(directions.settings().max_parallel_starts)
        self.counters: dict[str, Counters] = {}
        self._nursery: trio.Nursery | None = None
        self.refuted: dict[ServerSpec, Era] = {}
        self.shelf = Shelf()
        self.deviants: set[Unit] = set()
        self._shared: dict[ServerSpec, Unit] = {}
        self._isolated: dict[Hashable, Unit] = {}
        self._tallies: dict[tuple[ServerSpec, Principal | None], Tally] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the units. Cancel it to stop them all, in parallel, each within its stop grace."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def spawn(self, attempt: Callable[[], Any]) -> None:
        """Run one attempt."""
        if self._nursery is None or self._nursery.cancel_scope.cancel_called:
            raise Overloaded("The gateway is shutting down")
        self._nursery.start_soon(attempt)

    def counters_of(self, server_id: str) -> Counters:
        """The counters of a server id."""
        found = self.counters.get(server_id)
        if found is None:
            found = self.counters[server_id] = Counters()
        return found

    def status(self, server_id: str) -> ServerStatus:
        """What people are shown of one server id; one line for all its units (design.md section 7)."""
        counters = self.counters_of(server_id)
        now, wall = trio.current_time(), time.time()
        units = self.units(server_id)
        running = [unit for unit in units if unit.link is not None]
        shown = "stopped"
        for wanted in ("running", "unhealthy", "starting", "shutting_down"):
            if any(unit.shown_status == wanted for unit in units):
                shown = wanted
                break
        oldest = min(running, key=lambda unit: unit.started_at, default=None)
        troubled = max(units, key=lambda unit: unit.state.failures, default=None)
        state = troubled.state if troubled is not None else State()
        return ServerStatus(
            status=shown,
            request_count=counters.requests,
            error_count=counters.errors,
            started_at=None if oldest is None else oldest.started_wall,
            last_activity_at=None if counters.last_activity is None else wall - (now - counters.last_activity),
            uptime_seconds=None if oldest is None else int(now - oldest.started_at),
            connection_count=sum(unit.active for unit in units),
            units=len(running),
            last_error=next((unit.unhealthy for unit in units if unit.unhealthy), state.last_error),
            failures=state.failures,
            retry_at=wall + (state.retry_at - now) if state.phase is Phase.BACKOFF and state.retry_at > now else None,
            details=tuple(unit.details for unit in running),
            progress=next((unit.progress for unit in units if unit.progress), ""),
        )

    async def measured(self, server_id: str) -> list[Mapping[str, Any]]:
        """The facts of each running instance of a server, with what it uses now: asked of all at once."""
        running = [unit for unit in self.units(server_id) if unit.link is not None]
        found: list[Mapping[str, Any]] = [unit.details for unit in running]

        async def ask(index: int, unit: Unit) -> None:
            found[index] = {**found[index], **await unit.measure()}

        async with trio.open_nursery() as nursery:
            for index, unit in enumerate(running[:MAX_MEASURED]):
                nursery.start_soon(ask, index, unit)
        return found

    def units(self, server_id: str | None = None) -> list[Unit]:
        """The units of one server, or all."""
        every = [*self._shared.values(), *self._isolated.values()]
        return every if server_id is None else [u for u in every if u.spec.id == server_id]

    def check_room(self, spec: ServerSpec) -> None:
        """Raises Overloaded when ``max_units`` are running, or ``max_units_per_server`` of this one."""
        settings = self.directions.settings()
        running = [unit.spec for unit in self.units() if unit.running]
        if len(running) >= settings.max_units:
            raise Overloaded(f"{settings.max_units} servers are running (max_units)")
        limit: int = spec.or_default("max_units_per_server", settings)
        if sum(1 for other in running if other.id == spec.id) >= limit:
            raise Overloaded(f"Server '{spec.id}' is running {limit} times (max_units_per_server)")

    def check_failures(self, unit: Unit) -> None:
        """Raises StartFailed when too many units of this server have just failed the caller that this one is for."""
        tally = self._tallies.get((unit.spec, unit.principal))
        wait = 0.0 if tally is None else tally.wait(trio.current_time())
        if tally is not None and wait > 0:
            raise StartFailed(
                f"Server '{unit.spec.id}' failed {MAX_FAILURES} times in the last {CIRCUIT_SECONDS:g} s (next attempt "
                f"in {wait:.1f} s): {tally.error}",
                retry_after=wait,
            )

    def failed(self, unit: Unit) -> None:
        """A client's own unit has not come up, or has ended without a reply.

        Those that failed long ago are forgotten: callers can make any number of kinds of them.
        """
        now = trio.current_time()
        self._tallies = {key: tally for key, tally in self._tallies.items() if not tally.over(now)}
        self._tallies.setdefault((unit.spec, unit.principal), Tally()).add(now, unit.state.last_error)
        for other in list(self._isolated.values()):
            if other.failed_at + FORGET_SECONDS < now and other.state.failures and other.unused:
                self.forget(other)

    def forgive(self, spec: ServerSpec) -> None:
        """Somebody has seen to this server: what failed before says nothing any more of units that are new."""
        self._tallies = {key: tally for key, tally in self._tallies.items() if key[0] != spec}

    def runtime_of(self, spec: ServerSpec) -> Runtime:
        """Raises StartFailed for a type that this build can't start."""
        runtime = self.directions.runtimes.get(spec.runtime_type)
        if runtime is None or runtime.open is None:
            raise StartFailed(f"Runtime type '{spec.runtime_type}' is not available in this build")
        return runtime

    def unit(self, spec: ServerSpec, client: Client, principal: Principal, *, listing: bool = False) -> Unit:
        """The unit that serves this client, made if there is none; nothing is started.

        ``listing`` asks for it to list what it has: servers that are isolated by call have one unit for that.
        """
        if spec.isolation == "shared":
            unit = self._shared.get(spec)
            if unit is None:
                unit = self._shared[spec] = Unit(UnitKey(spec), self, None)
            return unit
        key, audience = _place_of(spec, client, principal, listing=listing)
        unit = self._isolated.get(key)
        if unit is None:
            owner: Client | None = client
            if spec.isolation == "tenant" or (listing and spec.isolation == "call"):
                owner = None
            elif audience is not None and audience != client.key:
                owner = _unreachable(client)
            unit = self._isolated[key] = Unit(UnitKey(spec, key), self, owner)
            unit.audience = audience
            unit.principal = principal
        return unit

    def find(self, spec: ServerSpec, client: Client, principal: Principal, *, listing: bool = False) -> Unit | None:
        """The unit that serves this client, or lists for it, if there is one."""
        if spec.isolation == "shared":
            return self._shared.get(spec)
        return self._isolated.get(_place_of(spec, client, principal, listing=listing)[0])

    def refute(self, spec: ServerSpec, era: Era) -> None:
        """A server was found not to speak an era; it is tried last from now on."""
        self.refuted[spec] = era

    def close_client(self, client: Client) -> None:
        """A client's session is over: what it alone owned is stopped, what it subscribed to is not kept for it."""
        client.closed = True
        for unit in self.units():
            for uri in [uri for uri, clients in unit.subscribers.items() if client in clients]:
                if unit.unsubscribed(uri, client) and unit.link is not None and self._nursery is not None:
                    self._nursery.start_soon(unit.unsubscribe, uri)
            if unit.client is client and unit.spec.isolation == "session":
                unit.retired = True
                unit.stop_soon("session over")

    def apply(self, catalog: Catalog) -> None:
        """Retire what the new catalog does not hold any more; unchanged definitions keep their units.

        ``directions.settings`` gives the new settings by now; all units take them over (compat G18).
        """
        settings = self.directions.settings()
        self.starting.total_tokens = settings.max_parallel_starts
        current = set(catalog.servers)
        self.refuted = {spec: era for spec, era in self.refuted.items() if spec in current}
        self.shelf.keep(current)
        self._tallies = {key: tally for key, tally in self._tallies.items() if key[0] in current}
        for unit in self.units():
            unit.configure(settings)
            of_session = unit.client is not None and unit.client.owner is not None
            keeps = of_session and unit.spec.isolation == "session" and unit.spec.id in catalog.by_id
            if unit.spec not in current and not keeps:
                unit.retire()

    def dismiss(self, known: Collection[Principal]) -> None:
        """Retire what belongs to other principals than these, or to a tenant that none of them is of."""
        tenants = {principal.tenant for principal in known}
        for unit in self.units():
            principal, isolation = unit.principal, unit.spec.isolation
            if principal is None or isolation == "call":
                continue
            if principal.tenant not in tenants if isolation == "tenant" else principal not in known:
                unit.retire()

    def forget(self, unit: Unit) -> None:
        """Drop a unit of which nothing runs. Its server's counters stay."""
        if unit.spec.isolation == "shared":
            if self._shared.get(unit.spec) is unit:
                del self._shared[unit.spec]
        elif self._isolated.get(unit.key.value) is unit:
            del self._isolated[unit.key.value]
