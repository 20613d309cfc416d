"""The life of one supervised server as a table: what happens next, decided without awaiting.

``feed(state, event, now)`` is a pure function; the supervisor only carries out what it says. Times are trio's
monotonic seconds. The two tables below are design.md section 7.

    phase      event      next
    IDLE       START      STARTING
    BACKOFF    START      STARTING      once ``retry_at`` has passed, or by hand (``admit`` decides)
    STARTING   READY      READY
    STARTING   FAILED     IDLE or BACKOFF
    READY      FAILED     IDLE or BACKOFF
    READY      ENDED      IDLE          an exit that harmed nobody
    any alive  STOP       DRAINING      idle, by hand, replaced, shutdown
    DRAINING   ENDED      IDLE
    DRAINING   FAILED     IDLE
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

import attrs

__all__ = [
    "CIRCUIT_FAILURES",
    "CIRCUIT_SECONDS",
    "FORGET_SECONDS",
    "MAX_FAILURES",
    "PROVEN_SECONDS",
    "Event",
    "Phase",
    "State",
    "Tally",
    "admit",
    "feed",
]

CIRCUIT_FAILURES: Final = 5
"""From this many consecutive failures on the circuit is open."""
CIRCUIT_SECONDS: Final = 30.0
MAX_FAILURES: Final = 10
"""Failures of one caller's units of one server in CIRCUIT_SECONDS; see ``Tally``. One unit alone has half of them."""
FORGET_SECONDS: Final = 300.0
"""For how long a unit that failed, and that nobody wants any more, keeps its backoff."""
PROVEN_SECONDS: Final = 10.0
"""A server that was up this long after its handshake, and answered at least once, starts counting anew."""
DELAYS: Final = {1: 0.0, 2: 1.0, 3: 2.0, 4: 4.0}


class Phase(enum.Enum):
    """Where a unit is; the value is the status that people are shown (compat H16)."""

    IDLE = "stopped"
    STARTING = "starting"
    READY = "running"
    DRAINING = "shutting_down"
    BACKOFF = "unhealthy"


class Event(enum.Enum):
    """What can happen to a unit."""

    START = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()
    ENDED = enum.auto()
    STOP = enum.auto()


@attrs.frozen
class State:
    """``failures`` in a row; ``retry_at`` when a call may start it again; ``ready_at`` since when it is up."""

    phase: Phase = Phase.IDLE
    failures: int = 0
    retry_at: float = 0.0
    ready_at: float | None = None
    last_error: str = ""

    @property
    def circuit_open(self) -> bool:
        """Whether so many attempts failed that only one probe every CIRCUIT_SECONDS is made."""
        return self.phase is Phase.BACKOFF and self.failures >= CIRCUIT_FAILURES


def admit(state: State, now: float, *, by_hand: bool = False) -> float:
    """Seconds until a call may start the unit; 0 means now. A manual start or restart skips the wait."""
    if state.phase is Phase.BACKOFF and not by_hand and now < state.retry_at:
        return state.retry_at - now
    return 0.0


_LEGAL: Final = {
    Event.START: {Phase.IDLE, Phase.BACKOFF},
    Event.READY: {Phase.STARTING},
    Event.STOP: {Phase.STARTING, Phase.READY, Phase.DRAINING},
    Event.ENDED: {Phase.STARTING, Phase.READY, Phase.DRAINING},
    Event.FAILED: {Phase.STARTING, Phase.READY, Phase.DRAINING},
}


def feed(state: State, event: Event, now: float, *, error: str = "", replies: int = 0, jitter: float = 1.0) -> State:
    """The state after an event. ``jitter`` (0.8 to 1.2) spreads retries; ``replies`` is how often it answered.

    Raises AssertionError for an event that can't happen in that phase: that is a defect of the caller.
    """
    assert state.phase in _LEGAL[event], f"{event} in {state.phase}"
    if event is Event.START:
        return attrs.evolve(state, phase=Phase.STARTING, ready_at=None)
    if event is Event.READY:
        return attrs.evolve(state, phase=Phase.READY, ready_at=now)
    if event is Event.STOP:
        return attrs.evolve(state, phase=Phase.DRAINING)
    proven = state.ready_at is not None and replies > 0 and now - state.ready_at >= PROVEN_SECONDS
    failures = 0 if proven else state.failures
    if event is Event.ENDED or state.phase is Phase.DRAINING:
        # An end that was asked for proves nothing and blames nobody: a server that keeps failing stays counted.
        return State(failures=failures, last_error="" if proven or failures == 0 else state.last_error)
    failures += 1
    if failures >= CIRCUIT_FAILURES:
        return State(Phase.BACKOFF, failures, now + CIRCUIT_SECONDS, None, error)
    delay = DELAYS[failures]
    if delay == 0:
        return State(Phase.IDLE, failures, 0.0, None, error)
    return State(Phase.BACKOFF, failures, now + delay * jitter, None, error)


class Tally:
    """The latest failures of all units that one caller has had of one server, and why it was the last time.

    A unit waits after its own failures, but who isolates it can be a new session, or another way to be asked, with each
    request. So no more than MAX_FAILURES in any CIRCUIT_SECONDS are one caller's, whichever of its units they meet.
    """

    __slots__ = ("_times", "error")

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MAX_FAILURES)
        self.error = ""

    def add(self, now: float, error: str) -> None:
        """One more."""
        self._times.append(now)
        self.error = error

    def wait(self, now: float) -> float:
        """Seconds until one of them may be started again; 0 means now."""
        return max(0.0, self._times[0] + CIRCUIT_SECONDS - now) if len(self._times) == MAX_FAILURES else 0.0

    def over(self, now: float) -> bool:
        """Whether all of them are too old to count."""
        return not self._times or self._times[-1] + CIRCUIT_SECONDS <= now
