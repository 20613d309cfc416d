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
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from math import inf
from typing import Any, Final

import attrs
import trio

from gateway.auth.principal import Principal
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.errors import GatewayError, LinkLost, Overloaded, StartFailed, UpstreamTimeout
from gateway.exchange import Ask, Call, Client, Exchange
from gateway.hub import Hub
from gateway.lifecycle import Event, Phase, State, admit, feed
from gateway.protocol.eras import LATEST_LEGACY
from gateway.protocol.message import RESULT, Message, dumps
from gateway.runtimes.base import Place, Runtime, Surroundings
from gateway.telemetry.record import ServerStatus
from gateway.upstream.connect import Terms, UpstreamLink, connect

__all__ = ["Counters", "Supervisor", "Unit", "UnitKey"]

log = logging.getLogger("gateway_core")

MAX_WAITING: Final = 4096
"""Requests that may wait for a slot of one unit."""
SUBSCRIBE_TIMEOUT: Final = 10.0
MARGIN: Final = 1.0
"""Seconds by which a slot may come back after its call's deadline: links look at deadlines from time to time."""
LIST_TOPICS: Final = {
    "notifications/tools/list_changed": "tools",
    "notifications/prompts/list_changed": "prompts",
    "notifications/resources/list_changed": "resources",
}


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


class Turn:
    """A request's place in the queue for a slot."""

    __slots__ = ("error", "given", "task")

    def __init__(self) -> None:
        self.task = trio.Event()
        self.given = False
        self.error: GatewayError | None = None


class Unit:
    """One supervised server instance.

    ``link`` is set exactly while calls may be made. ``active`` counts the slots taken (at most ``limit``), ``holds``
    what else keeps the unit from idling: resource subscriptions and work of the gateway's own.
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
        self.listings: dict[str, Any] = {}
        self.active = 0
        self.holds = 0
        self.replies = 0
        self.started_at = 0.0
        self.started_wall = 0.0
        self.retired = False
        self.unhealthy = ""
        self.subscribers: dict[str, dict[Client, None]] = {}
        self._counters = supervisor.counters_of(spec.id)
        self._scope: trio.CancelScope | None = None
        self._idle_at = inf
        self._place: Place | None = None
        self._changed = trio.Event()
        self._queue: deque[Turn] = deque()
        self._failure: GatewayError | None = None
        self._stopping = ""
        self._harmed = False
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

    async def enter(self, deadline: float) -> None:
        """Take a slot of the running server, waiting for a free one (first come, first served) and for its start.

        Raises UpstreamTimeout at ``deadline`` (trio time), StartFailed when it does not start, Overloaded when too many
        wait. Cancellation gives the place back and leaves a start going on.
        """
        if self.active < self.limit and not self._queue:
            self.active += 1
        else:
            await self._queue_up(deadline)
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
        raise UpstreamTimeout(f"Server '{self.spec.id}' is still starting; try again later")

    async def _queue_up(self, deadline: float) -> None:
        if len(self._queue) >= MAX_WAITING:
            raise Overloaded(
                f"Server '{self.spec.id}' has {MAX_WAITING} requests waiting "
                f"(max_connections_per_server is {self.limit})"
            )
        turn = Turn()
        self._queue.append(turn)
        try:
            with trio.move_on_at(deadline):
                await turn.task.wait()
        finally:
            if not turn.task.is_set():
                self._queue.remove(turn)
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
        if call.failed:
            self._counters.errors += 1
            link = self.link
            if link is not None and link.lost is not None:
                self._harmed = True
        else:
            self.replies += 1
        self.leave()

    def leave(self) -> None:
        """Give a slot back; the next in the queue gets it."""
        self._counters.last_activity = trio.current_time()
        queue = self._queue
        while queue:
            turn = queue.popleft()
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
        """Nobody uses it: stop it if it was replaced, else let the idle timeout run."""
        if self.retired or self.spec.isolation == "call":
            self.stop_soon("replaced")
        elif self._scope is not None and self.link is not None:
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
                raise type(failure)(failure.message, retry_after=failure.retry_after) from failure

    def start(self, *, by_hand: bool = False) -> None:
        """Begin an attempt without waiting for it. Raises StartFailed while backoff or the circuit forbid one."""
        wait = admit(self.state, trio.current_time(), by_hand=by_hand)
        if wait > 0:
            circuit = "circuit open, " if self.state.circuit_open else ""
            kind = type(self._failure) if isinstance(self._failure, StartFailed) else StartFailed
            raise kind(
                f"Server '{self.spec.id}' failed {self.state.failures} times in a row ({circuit}next attempt in "
                f"{wait:.1f} s): {self.state.last_error}",
                retry_after=wait,
            )
        self.supervisor.check_room()
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
        self.supervisor.hub.publish(self.spec.id, "state")

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
                except trio.Cancelled:
                    raise
                except Exception as error:
                    failure = self._blame(leaf(error))
        finally:
            self._finish(scope, failure)

    async def _start_and_keep(self, scope: trio.CancelScope) -> None:
        spec, supervisor = self.spec, self.supervisor
        limiter, token = supervisor.starting, object()
        await limiter.acquire_on_behalf_of(token)
        try:
            scope.deadline = trio.current_time() + self.start_timeout
            self._say(logging.INFO, "Starting server")
            runtime = supervisor.runtime_of(spec)
            surroundings = supervisor.directions.surroundings(spec)
            assert runtime.open is not None
            async with runtime.open(spec.runtime, surroundings) as place:
                self._place = place
                async with connect(place, self._terms()) as link:
                    await self._replay(link)
                    limiter.release_on_behalf_of(token)
                    token = None
                    self._up(link, scope)
                    try:
                        await self._keep(link)
                    finally:
                        self.link = None
                        if scope.cancel_called:
                            if not self._stopping:
                                self._say(logging.INFO, "Stopping idle server", idle_seconds=self.idle_timeout)
                            self._feed(Event.STOP)
        finally:
            if token is not None:
                limiter.release_on_behalf_of(token)

    def _terms(self) -> Terms:
        client = self.client
        if client is None:
            return Terms(
                self.spec.id,
                self._noticed,
                lambda ask: False,
                self.supervisor.directions.info,
                max_message_bytes=self.max_message_bytes,
                timeout=inf,
            )
        return Terms(
            self.spec.id,
            self._noticed,
            self._asked,
            client.info or self.supervisor.directions.info,
            client.capabilities,
            client.version or LATEST_LEGACY,
            isolated=True,
            max_message_bytes=self.max_message_bytes,
            timeout=inf,
        )

    async def _replay(self, link: UpstreamLink) -> None:
        """Tell a restarted server what its predecessor knew: log level and resource subscriptions."""
        requests = [("resources/subscribe", dumps({"uri": uri})) for uri in self.subscribers]
        if self.client is not None and self.client.log_level is not None:
            requests.append(("logging/setLevel", dumps({"level": self.client.log_level})))
        for method, params in requests:
            reply = await link.request(method, params, timeout=SUBSCRIBE_TIMEOUT)
            if reply.kind is not RESULT:
                self._say(logging.WARNING, f"Replaying {method} failed", error=str(reply.result)[:200])

    def _up(self, link: UpstreamLink, scope: trio.CancelScope) -> None:
        self.link = link
        self.facts = link.facts
        self.replies = 0
        self.unhealthy = ""
        self.started_at = trio.current_time()
        self.started_wall = time.time()
        self._feed(Event.READY)
        began = scope.deadline - self.start_timeout
        self._say(logging.INFO, "Server ready", seconds=round(self.started_at - began, 3))
        idle = self.active == 0 and self.holds == 0
        scope.deadline = self._idle_at = self.started_at + self.idle_timeout if idle else inf
        if idle and self.retired:
            self.stop_soon("replaced")

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
        log.error("unexpected failure while running server %s", self.spec.id, exc_info=error)
        return StartFailed(f"Server '{self.spec.id}' could not be run: internal error ({type(error).__name__})")

    def _finish(self, scope: trio.CancelScope, failure: GatewayError | None) -> None:
        """The attempt is over and everything of it is gone: decide what comes next and tell everybody."""
        starting = self.state.phase is Phase.STARTING
        if failure is None and starting and not self._stopping and scope.cancelled_caught:
            reason = f"no handshake within {self.start_timeout:g} s (start_timeout_seconds)"
            if self._place is not None and hasattr(self._place, "diagnosis"):
                reason += f"; {self._place.diagnosis()}"
            failure = StartFailed(reason)
        elif failure is None and starting:
            failure = StartFailed(f"Server '{self.spec.id}' was stopped while it started")
            self._stopping = self._stopping or "shutdown"
        self._scope = None
        self._place = None
        self._failure = failure
        if failure is None or self._stopping:
            reason = self._stopping or ("idle" if scope.cancelled_caught else "ended")
            self._say(logging.INFO, "Server stopped", reason=reason)
            self._feed(Event.ENDED)
        else:
            self._say(logging.WARNING, "Failed to start server" if starting else "Server failed", error=failure.message)
            self._feed(Event.FAILED, failure.message)
        if starting and failure is not None:
            # All who wait for this start are told now, also those who wait for a slot.
            for turn in self._queue:
                if not turn.task.is_set():
                    turn.error = type(failure)(failure.message, retry_after=failure.retry_after)
                    turn.task.set()
            self._queue.clear()
        disposable = self.retired or (self.client is not None and not self.state.failures)
        if disposable and self.active == 0 and self.holds == 0:
            self.supervisor.forget(self)

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
            self.listings.clear()
            if owner is not None:
                owner.mark(topic)
            else:
                self.supervisor.hub.publish(self.spec.id, topic)
        elif method == "notifications/resources/updated":
            uri = message.param("uri")
            for client in self.subscribers.get(uri, ()) if type(uri) is str else ():
                if client.owner is not None:
                    client.owner.mark(f"resource:{uri}")
        elif owner is not None:
            owner.notify(message.text)
        else:
            # A shared server does not say whom its logs are for (protocol.md section 4.6).
            log.debug("server %s: %s", self.spec.id, message.text[:500])

    # --------------------------------------------------------------------------------------------------- subscriptions
    def subscribed(self, uri: str, client: Client) -> None:
        """A client has subscribed to a resource: the unit stays up for it (compat L9)."""
        clients = self.subscribers.setdefault(uri, {})
        if client not in clients:
            clients[client] = None
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
                await link.request("resources/unsubscribe", dumps({"uri": uri}), timeout=SUBSCRIBE_TIMEOUT)
            except GatewayError as error:
                self._say(logging.DEBUG, "Unsubscribing failed", error=error.message)


class Supervisor:
    """All units. ``run`` is its task; everything else is called from other tasks of the same loop."""

    def __init__(self, directions: Directions, hub: Hub) -> None:
        self.directions = directions
        self.hub = hub
        self.starting = trio.CapacityLimiter(directions.settings().max_parallel_starts)
        self.counters: dict[str, Counters] = {}
        self._nursery: trio.Nursery | None = None
        self._shared: dict[ServerSpec, Unit] = {}
        self._isolated: dict[Hashable, Unit] = {}

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
        )

    def units(self, server_id: str | None = None) -> list[Unit]:
        """The units of one server, or all."""
        every = [*self._shared.values(), *self._isolated.values()]
        return every if server_id is None else [u for u in every if u.spec.id == server_id]

    def check_room(self) -> None:
        """Raises Overloaded when ``max_units`` are running."""
        limit = self.directions.settings().max_units
        if sum(1 for unit in self.units() if unit.running) >= limit:
            raise Overloaded(f"{limit} servers are running (max_units)")

    def runtime_of(self, spec: ServerSpec) -> Runtime:
        """Raises StartFailed for a type that this build can't start."""
        runtime = self.directions.runtimes.get(spec.runtime_type)
        if runtime is None or runtime.open is None:
            raise StartFailed(f"Runtime type '{spec.runtime_type}' is not available in this build")
        return runtime

    def unit(self, spec: ServerSpec, client: Client, principal: Principal, *, listing: bool = False) -> Unit:
        """The unit that serves this client, made if there is none; nothing is started.

        ``listing`` asks for it to list what it has: servers that are isolated by call have one unit for that, whose
        lists are kept.
        """
        isolation = spec.isolation
        if isolation == "shared":
            unit = self._shared.get(spec)
            if unit is None:
                unit = self._shared[spec] = Unit(UnitKey(spec), self, None)
            return unit
        owner: Client | None = client
        key: Hashable
        if isolation == "session":
            # By id, not by definition: the session keeps the definition it began with (compat W5).
            key = ("session", spec.id, client.key)
        elif isolation == "principal":
            key = (spec, principal, json.dumps(client.capabilities, sort_keys=True))
            owner = Client(client.key, client.era, client.version, client.capabilities, client.info)
        elif isolation == "tenant":
            key, owner = (spec, principal.tenant), None
        elif listing:
            key, owner = (spec, "listing"), None
        else:
            key = object()
        unit = self._isolated.get(key)
        if unit is None:
            unit = self._isolated[key] = Unit(UnitKey(spec, key), self, owner)
        return unit

    def close_client(self, client: Client) -> None:
        """A client's session is over: what it alone owned is stopped, what it subscribed to is not kept for it."""
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
        for unit in self.units():
            unit.configure(settings)
            keeps = unit.spec.isolation == "session" and unit.spec.id in catalog.by_id
            if unit.spec not in current and not keeps:
                unit.retire()

    def forget(self, unit: Unit) -> None:
        """Drop a unit of which nothing runs. Its server's counters stay."""
        if unit.spec.isolation == "shared":
            if self._shared.get(unit.spec) is unit:
                del self._shared[unit.spec]
        elif self._isolated.get(unit.key.value) is unit:
            del self._isolated[unit.key.value]
