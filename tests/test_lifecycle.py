"""The tables of design section 7, row by row, without a clock."""

from __future__ import annotations

import attrs
import pytest

from gateway.lifecycle import CIRCUIT_SECONDS, MAX_FAILURES, Event, Phase, State, Tally, admit, feed

STARTING = State(Phase.STARTING)


def fail(state: State, now: float, jitter: float = 1.0) -> State:
    """One more failed start."""
    return feed(feed(state, Event.START, now), Event.FAILED, now, error="no", jitter=jitter)


def test_A9_the_way_round() -> None:
    state = feed(State(), Event.START, 1)
    assert state.phase is Phase.STARTING
    state = feed(state, Event.READY, 2)
    assert (state.phase, state.ready_at) == (Phase.READY, 2)
    state = feed(state, Event.STOP, 3)
    assert state.phase is Phase.DRAINING
    assert feed(state, Event.ENDED, 4) == State()


@pytest.mark.parametrize(("failures", "delay"), [(1, 0), (2, 1), (3, 2), (4, 4), (5, 30), (6, 30), (9, 30)])
def test_RB06_A9_consecutive_failures_wait_by_the_table(failures: int, delay: float) -> None:
    state = State()
    for _ in range(failures):
        state = fail(state, 100)
    assert state.failures == failures
    assert state.last_error == "no"
    assert admit(state, 100) == delay
    assert admit(state, 100, by_hand=True) == 0
    assert admit(state, 100 + delay) == 0
    assert state.phase is (Phase.BACKOFF if delay else Phase.IDLE)
    assert state.circuit_open is (failures >= 5)


def test_RB06_backoff_is_spread_but_the_circuit_is_not() -> None:
    state = fail(State(), 0)
    assert admit(fail(state, 0, jitter=0.8), 0) == 0.8
    assert admit(fail(state, 0, jitter=1.2), 0) == 1.2
    for _ in range(4):
        state = fail(state, 0, jitter=1.2)
    assert admit(state, 0) == 30


def test_L3_first_failed_start_is_stopped_and_says_why() -> None:
    state = fail(State(), 5)
    assert (state.phase, state.last_error) == (Phase.IDLE, "no")


@pytest.mark.parametrize(("up", "replies", "failures"), [(10, 1, 1), (9.9, 5, 5), (60, 0, 5)])
def test_A9_ten_seconds_and_a_reply_reset_the_count(up: float, replies: int, failures: int) -> None:
    state = attrs.evolve(STARTING, failures=4)
    state = feed(state, Event.READY, 100)
    assert feed(state, Event.FAILED, 100 + up, replies=replies, error="x").failures == failures


def test_L6_an_asked_for_end_is_no_failure_and_forgives_none() -> None:
    state = feed(attrs.evolve(STARTING, failures=3, last_error="old"), Event.READY, 0)
    stopped = feed(feed(state, Event.STOP, 1), Event.ENDED, 2, replies=1)
    assert (stopped.phase, stopped.failures, stopped.last_error) == (Phase.IDLE, 3, "old")
    proven = feed(feed(state, Event.STOP, 50), Event.ENDED, 51, replies=1)
    assert (proven.failures, proven.last_error) == (0, "")
    assert feed(feed(state, Event.STOP, 1), Event.FAILED, 2, error="while stopping").phase is Phase.IDLE


def test_L1_H16_phases_show_as_the_statuses_of_compat() -> None:
    assert [p.value for p in Phase] == ["stopped", "starting", "running", "shutting_down", "unhealthy"]


@pytest.mark.parametrize(
    ("phase", "event"), [(Phase.READY, Event.START), (Phase.IDLE, Event.READY), (Phase.IDLE, Event.FAILED)]
)
def test_impossible_events_are_defects(phase: Phase, event: Event) -> None:
    with pytest.raises(AssertionError):
        feed(State(phase), event, 0)


def test_RB06_of_one_callers_units_so_many_may_fail_within_a_while() -> None:
    tally = Tally()
    assert (tally.wait(0), tally.over(0)) == (0, True)
    for now in range(MAX_FAILURES):
        assert tally.wait(now) == 0
        tally.add(now, f"no {now}")
    last = MAX_FAILURES - 1
    assert (tally.wait(last), tally.error) == (CIRCUIT_SECONDS - last, f"no {last}")
    assert tally.wait(CIRCUIT_SECONDS) == 0, "the first is too old to count"
    tally.add(CIRCUIT_SECONDS, "again")
    assert tally.wait(CIRCUIT_SECONDS) == 1, "the second is not yet"
    assert not tally.over(2 * CIRCUIT_SECONDS - 1) and tally.over(2 * CIRCUIT_SECONDS)


def test_RB06_one_unit_alone_never_fails_as_often_as_all_may() -> None:
    state, tally, now = State(), Tally(), 0.0
    for _ in range(100):
        state = fail(state, now, jitter=0.8)
        tally.add(now, "no")
        assert tally.wait(now) == 0
        now = max(now, state.retry_at)
