"""Units: start once, idle stop, backoff, circuit, slots, retirement; on the virtual clock with scripted servers."""

from __future__ import annotations

import contextlib
from typing import Any

import attrs
import pytest
import trio
from scripted import SCRIPTED, MemoryPipe, Script, ScriptedSpec
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Catalog, ServerSpec, Settings
from gateway.config.snapshot import Snapshot
from gateway.errors import GatewayError, LinkLost, Overloaded, StartFailed, UpstreamTimeout
from gateway.exchange import Ask, Client, Exchange, Reply
from gateway.hub import Hub
from gateway.lifecycle import CIRCUIT_SECONDS, FORGET_SECONDS, MAX_FAILURES, Phase
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_request
from gateway.runtimes.base import Surroundings
from gateway.supervisor import Directions, Supervisor, Unit


class Owner:
    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.notes: list[str] = []
        self.marks: list[str] = []

    def ask(self, ask: Ask) -> bool:
        self.asks.append(ask)
        return True

    def notify(self, text: str) -> None:
        self.notes.append(text)

    def mark(self, topic: str) -> None:
        self.marks.append(topic)


def client(key: str = "c", **more: Any) -> Client:
    return Client(key, Era.LEGACY, "2025-11-25", **more)


class House:
    """A supervisor over scripted servers."""

    def __init__(self, nursery: trio.Nursery, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.hub = Hub()
        self.supervisor = Supervisor(
            Directions(
                {"scripted": SCRIPTED},
                lambda spec: Surroundings(spec.id, {}),
                lambda: self.settings,
                {"name": "test", "version": "0"},
            ),
            self.hub,
        )
        self.scope = trio.CancelScope()
        self.nursery = nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await self.supervisor.run(task_status=task_status)

    def unit(self, script: Script, who: Client | None = None, principal: Principal = ANONYMOUS, **more: Any) -> Unit:
        spec = ServerSpec("s", ScriptedSpec(script), "scripted", **more)
        return self.supervisor.unit(spec, who or client(), principal)


@pytest.fixture
async def house(nursery: trio.Nursery) -> House:
    house = House(nursery)
    await nursery.start(house.run)
    return house


def exchange(seconds: float = 30.0, method: str = "tools/call", params: str = '{"name":"x"}') -> Exchange:
    message = decode_request(f'{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}')
    return Exchange(message, ANONYMOUS, Snapshot(), client(), "s", trio.current_time() + seconds)


async def call(unit: Unit, seconds: float = 30.0, **more: Any) -> Message:
    ex = exchange(seconds, **more)
    if not unit.try_enter(ex.deadline):
        await unit.enter(ex.deadline)
    got = unit.begin(ex)
    while True:
        event = await got.next()
        if isinstance(event, Reply):
            return event.message


def mute(pipe: MemoryPipe, message: dict[str, Any]) -> None:
    """Answers nothing."""


async def test_L2_P5_a_thousand_first_calls_start_one_server(house: House, autojump_clock: MockClock) -> None:
    script = Script(start_seconds=1)
    unit = house.unit(script)
    replies = []

    async def one() -> None:
        replies.append(await call(unit))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(one)
    assert len(replies) == 1000
    assert script.starts == 1
    assert unit.state.phase is Phase.READY


async def test_L8_A9_idle_stop_is_the_deadline(house: House, autojump_clock: MockClock) -> None:
    script = Script()
    unit = house.unit(script, idle_timeout_seconds=300)
    await call(unit)
    await trio.sleep(299)
    assert unit.state.phase is Phase.READY
    await call(unit)
    await trio.sleep(299)
    assert unit.state.phase is Phase.READY, "the second call moved the deadline"
    await trio.sleep(2)
    assert (unit.state.phase, script.running) == (Phase.IDLE, 0)
    await call(unit)
    assert script.starts == 2


async def test_G6_zero_never_stops(house: House, autojump_clock: MockClock) -> None:
    unit = house.unit(Script(), idle_timeout_seconds=0)
    await call(unit)
    await trio.sleep(80_000)
    assert unit.state.phase is Phase.READY


async def test_L9_a_call_in_flight_and_a_hold_keep_it(house: House, autojump_clock: MockClock) -> None:
    script = Script(answer=mute)
    unit = house.unit(script, idle_timeout_seconds=5)
    with pytest.raises(UpstreamTimeout):
        await call(unit, seconds=100)
    assert script.running == 1
    unit.hold()
    await trio.sleep(100)
    assert script.running == 1
    unit.unhold()
    await trio.sleep(6)
    assert script.running == 0


async def test_L16_RB04_timeout_leaves_the_server_and_drops_the_late_reply(
    house: House, autojump_clock: MockClock
) -> None:
    late: list[dict[str, Any]] = []

    def answer(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            late.append(message)
        elif "id" in message:
            pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})

    script = Script(answer=answer)
    unit = house.unit(script)
    started = trio.current_time()
    with pytest.raises(UpstreamTimeout, match="did not answer within 3"):
        await call(unit, seconds=3)
    assert 3 <= trio.current_time() - started < 3.2
    assert script.seen[-1]["method"] == "notifications/cancelled"
    assert script.seen[-1]["params"]["requestId"] == late[0]["id"]
    script.pipe.say({"jsonrpc": "2.0", "id": late[0]["id"], "result": {"late": True}})
    reply = await call(unit, method="prompts/get")
    assert reply.result == {}
    assert script.starts == 1


async def test_A9_RB06_crashes_back_off_by_the_table_and_open_the_circuit(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script(fail_starts=7)
    unit = house.unit(script)
    for wait in (0, 1, 2, 4):
        with pytest.raises(StartFailed, match="exited with code 1"):
            await call(unit)
        if wait:
            starts = script.starts
            with pytest.raises(StartFailed, match="times in a row") as caught:
                await call(unit)
            assert caught.value.retry_after is not None
            assert wait * 0.8 <= caught.value.retry_after <= wait * 1.2
            assert caught.value.status == 502
            assert script.starts == starts, "refused without a process"
            await trio.sleep(caught.value.retry_after)
    with pytest.raises(StartFailed):
        await call(unit)
    assert unit.state.circuit_open
    for _ in range(2):
        with pytest.raises(StartFailed, match="circuit open, next attempt in 30"):
            await call(unit)
        await trio.sleep(30)
        with pytest.raises(StartFailed, match="exited"):
            await call(unit)
    await trio.sleep(30)
    await call(unit)
    assert unit.state.phase is Phase.READY


@pytest.mark.parametrize(
    ("isolation", "dies"),
    [
        ("session", "at its start"),
        ("session", "of its first call"),
        ("principal", "at its start"),
        ("principal", "of its first call"),
        ("call", "at its start"),
    ],
)
async def test_A9_RB06_whoever_varies_who_it_is_meets_a_backoff_all_the_same(
    house: House, autojump_clock: MockClock, isolation: Any, dies: str
) -> None:
    """Every way in which a client can be asked makes a unit of its own, and a call of ``isolation: call`` always."""
    ann, bob = Principal("ann"), Principal("bob")

    def die(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if "id" in message:
            pipe.exit(1)

    script = Script(fail_starts=10**9) if dies == "at its start" else Script(answer=die)
    kinds = (modern(f"modern:{n}", capabilities={"elicitation": {"n": n}}) for n in range(10**9))

    async def meets(who: Principal) -> GatewayError:
        with pytest.raises((StartFailed, LinkLost)) as caught:
            await call(house.unit(script, next(kinds), who, isolation=isolation))
        return caught.value

    for _ in range(MAX_FAILURES):
        await meets(ann)
        await trio.sleep(0.1)
    assert script.starts == MAX_FAILURES
    for _ in range(100):
        refused = await meets(ann)
    assert script.starts == MAX_FAILURES
    assert refused.retry_after == pytest.approx(CIRCUIT_SECONDS - 0.1 * MAX_FAILURES)
    assert f"failed {MAX_FAILURES} times in the last 30 s" in refused.message and "exited" in refused.message
    await meets(bob)
    assert script.starts == MAX_FAILURES + 1, "nobody pays for another one's"
    with pytest.raises(StartFailed, match="exited") if script.fail_starts else contextlib.nullcontext():
        await house.unit(script, next(kinds), ann, isolation=isolation).ready(by_hand=True)
    await meets(ann)
    assert script.starts == MAX_FAILURES + 3, "by hand it is tried at once, and then by others again"
    for _ in range(1000):
        await meets(ann)
        await trio.sleep(3)
    assert script.starts <= 3000 / CIRCUIT_SECONDS * MAX_FAILURES + 20
    assert len(house.supervisor.units()) <= 2 + FORGET_SECONDS / CIRCUIT_SECONDS * (MAX_FAILURES + 1)


async def test_A9_manual_start_skips_the_wait(house: House, autojump_clock: MockClock) -> None:
    script = Script(fail_starts=3)
    unit = house.unit(script)
    for _ in range(2):
        with pytest.raises(StartFailed):
            await call(unit)
    with pytest.raises(StartFailed, match="exited"):
        await unit.ready(by_hand=True)
    await unit.ready(by_hand=True)
    assert unit.state.phase is Phase.READY


async def test_RB05_L7_silent_handshake_fails_at_the_start_timeout_for_every_waiter(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script(silent=True)
    unit = house.unit(script, start_timeout_seconds=20, max_connections_per_server=2)
    failed = []

    async def one() -> None:
        with pytest.raises(StartFailed, match=r"no handshake within 20 s \(start_timeout_seconds\)"):
            await call(unit, seconds=60)
        failed.append(trio.current_time())

    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one)
    assert len(failed) == 10
    assert max(failed) - begin < 20.5
    assert (script.starts, script.running) == (1, 0)


async def test_RB07_callers_wait_to_their_own_deadline_and_the_start_goes_on(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script(start_seconds=30)
    unit = house.unit(script)
    begin = trio.current_time()
    with pytest.raises(UpstreamTimeout, match="still starting"):
        await call(unit, seconds=10)
    assert trio.current_time() - begin == 10
    await call(unit, seconds=25)
    assert script.starts == 1


async def test_RB07_a_start_that_gets_on_is_not_cut_off_and_says_what_it_does(
    house: House, autojump_clock: MockClock
) -> None:
    """Pulling an image may take long; what does not advance ends at the start timeout, with the last word on it."""
    steps = ((50.0, "pulling, 30 %", True), (50.0, "pulling, 60 %", True), (50.0, "pulling, 90 %", True))
    unit = house.unit(Script(steps=steps, start_seconds=50.0))
    with pytest.raises(UpstreamTimeout, match=r"still starting \(pulling, 60 %\)"):
        await call(unit, seconds=120)
    assert house.supervisor.status("s").progress == "pulling, 60 %"
    await call(unit, seconds=120)
    assert house.supervisor.status("s").progress == ""


async def test_RB61_every_waiter_is_told_what_a_runtime_says_in_an_error_of_its_own(house: House) -> None:
    class Refused(StartFailed):
        def __init__(self, message: str, *, answer: int) -> None:
            super().__init__(message)
            self.answer = answer

    script = Script(refusal=Refused("the engine refuses: no room", answer=507))
    unit = house.unit(script)
    for wanted in ("^the engine refuses: no room$", "^the engine refuses: no room$", r"failed 2 times .*: the engine"):
        with pytest.raises(Refused, match=wanted) as caught:
            await call(unit)
        assert caught.value.answer == 507


async def test_RB05_a_start_that_does_not_advance_is_cut_off_with_its_last_word(
    house: House, autojump_clock: MockClock
) -> None:
    steps = ((20.0, "no node has room", False), (20.0, "no node has room", False))
    unit = house.unit(Script(steps=steps, start_seconds=50.0))
    begin = trio.current_time()
    with pytest.raises(StartFailed, match=r"no handshake within 60 s .*; no node has room"):
        await call(unit, seconds=120)
    assert trio.current_time() - begin == 60
    assert house.supervisor.status("s").progress == ""


async def test_L16_what_explains_a_timeout_is_said_with_it(house: House, autojump_clock: MockClock) -> None:
    unit = house.unit(script := Script(answer=mute))
    await unit.ready()
    script.pipe.explained = "container is paused"
    with pytest.raises(UpstreamTimeout, match=r"did not answer within 5 s: container is paused"):
        await call(unit, seconds=5)


async def test_H14_instances_are_measured_for_a_while_only(house: House, autojump_clock: MockClock) -> None:
    unit = house.unit(script := Script())
    assert await house.supervisor.measured("s") == []
    await unit.ready()
    (found,) = await house.supervisor.measured("s")
    assert found["memory_bytes"] == 1 and found["pid"] == 0
    script.pipe.measuring = trio.Event()
    begin = trio.current_time()
    (found,) = await house.supervisor.measured("s")
    assert "memory_bytes" not in found and found["pid"] == 0
    assert trio.current_time() - begin == 2


async def test_RB03_L13_P2_a_crash_fails_its_calls_and_replays_none(house: House, autojump_clock: MockClock) -> None:
    def crash(pipe: MemoryPipe, message: dict[str, Any]) -> None:
        if message.get("method") == "tools/call":
            pipe.exit(3)

    script = Script(answer=crash)
    unit = house.unit(script)
    with pytest.raises(LinkLost, match="exited with code 3"):
        await call(unit)
    script.answer = None
    assert unit.state.failures == 0 or unit.state.phase is not Phase.READY
    await call(unit)
    assert script.methods().count("tools/call") == 2
    assert unit.state.failures == 1


async def test_RB02_exit_while_idle_is_just_stopped(house: House, autojump_clock: MockClock) -> None:
    script = Script()
    unit = house.unit(script)
    await call(unit)
    script.pipe.exit(0)
    await unit.stopped()
    assert (unit.state.phase, unit.state.failures) == (Phase.IDLE, 0)
    await call(unit)
    assert script.starts == 2


async def test_L15_slots_are_bounded_and_fair(house: House, autojump_clock: MockClock) -> None:
    waiting: list[dict[str, Any]] = []
    script = Script(answer=lambda pipe, m: waiting.append(m) if "id" in m else None)
    unit = house.unit(script, max_connections_per_server=3)
    done: list[int] = []

    async def one(n: int) -> None:
        await trio.sleep(n / 1000)
        await call(unit, params=f'{{"n":{n}}}')
        done.append(n)

    async with trio.open_nursery() as nursery:
        for n in range(9):
            nursery.start_soon(one, n)
        await trio.sleep(1)
        assert [m["params"]["n"] for m in waiting] == [0, 1, 2]
        while len(done) < 9:
            message = waiting.pop(0)
            script.pipe.say({"jsonrpc": "2.0", "id": message["id"], "result": {}})
            await wait_all_tasks_blocked()
    assert done == list(range(9))
    assert unit.active == 0


async def test_L15_waiting_counts_toward_the_timeout(house: House, autojump_clock: MockClock) -> None:
    unit = house.unit(Script(answer=mute), max_connections_per_server=1)
    async with trio.open_nursery() as nursery:

        async def first() -> None:
            with pytest.raises(UpstreamTimeout):
                await call(unit, seconds=20)

        nursery.start_soon(first)
        await trio.sleep(1)
        begin = trio.current_time()
        with pytest.raises(UpstreamTimeout, match="busy"):
            await call(unit, seconds=5)
        assert trio.current_time() - begin == 5


async def test_a_cancelled_waiter_gives_its_place_and_slot_back(house: House, autojump_clock: MockClock) -> None:
    script = Script(start_seconds=2, answer=mute)
    unit = house.unit(script, max_connections_per_server=1)
    for delay in (0.5, 1, 3):
        with trio.move_on_after(delay):
            await call(unit)
        await trio.testing.wait_all_tasks_blocked()
    # the last one was in flight; its slot comes back at its timeout at the latest
    await trio.sleep(40)
    assert unit.active == 0


async def test_W5_L6_a_replaced_unit_finishes_its_calls_then_stops(house: House, autojump_clock: MockClock) -> None:
    held: list[dict[str, Any]] = []
    script = Script(answer=lambda pipe, m: held.append(m) if "id" in m else None)
    old = house.unit(script)
    results = []

    async def one() -> None:
        results.append(await call(old))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await wait_all_tasks_blocked()
        new_spec = attrs.evolve(old.spec, description="edited")
        house.supervisor.apply(Catalog((new_spec,)))
        assert house.supervisor.unit(new_spec, client(), ANONYMOUS) is not old
        await trio.sleep(5)
        assert script.running == 1
        script.pipe.say({"jsonrpc": "2.0", "id": held[0]["id"], "result": {}})
    await old.stopped()
    assert len(results) == 1
    assert script.running == 0
    assert old not in house.supervisor.units()


async def test_W6_unchanged_keeps_its_unit(house: House, autojump_clock: MockClock) -> None:
    unit = house.unit(Script())
    await call(unit)
    house.supervisor.apply(Catalog((attrs.evolve(unit.spec),)))
    assert house.supervisor.unit(attrs.evolve(unit.spec), client(), ANONYMOUS) is unit
    assert unit.link is not None


async def test_isolation_session_gives_each_client_its_own_and_ends_with_it(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script()
    one, two = client("1", capabilities={"roots": {}}, owner=Owner()), client("2", owner=Owner())
    units = [house.unit(script, who, isolation="session") for who in (one, two, one)]
    assert units[0] is units[2]
    assert units[0] is not units[1]
    for unit in units:
        await call(unit)
    assert script.running == 2
    sent = [m["params"]["capabilities"] for m in script.seen if m.get("method") == "initialize"]
    assert sent == [{"roots": {}}, {}]
    house.supervisor.close_client(one)
    await units[0].stopped()
    assert (script.running, house.supervisor.units()) == (1, [units[1]])


@pytest.mark.parametrize(
    ("isolation", "expected"), [("shared", 1), ("tenant", 2), ("principal", 3), ("session", 4), ("call", 4)]
)
async def test_isolation_values_decide_who_shares(
    house: House, autojump_clock: MockClock, isolation: Any, expected: int
) -> None:
    script = Script()
    callers = [
        (client("1"), Principal("a", "t1")),
        (client("2"), Principal("a", "t1")),
        (client("3"), Principal("b", "t1")),
        (client("4"), Principal("c", "t2")),
    ]
    for who, principal in callers:
        await call(house.unit(script, who, principal, isolation=isolation))
    assert script.starts == expected
    if isolation == "call":
        await wait_all_tasks_blocked()
        assert (script.running, house.supervisor.units()) == (0, [])


async def test_questions_go_to_the_only_call_or_the_owner_and_never_to_a_shared_servers_client(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script()
    shared = house.unit(script)
    await call(shared)
    script.pipe.say(
        {"jsonrpc": "2.0", "id": "r", "method": "roots/list"},
        {"jsonrpc": "2.0", "id": "e", "method": "elicitation/create", "params": {}},
        {"jsonrpc": "2.0", "id": "p", "method": "ping"},
    )
    await wait_all_tasks_blocked()
    answers = {m["id"]: m for m in script.seen if m.get("id") in ("r", "e", "p")}
    assert answers["r"]["error"]["code"] == -32601
    assert answers["e"]["result"] == {"action": "cancel"}
    assert answers["p"]["result"] == {}

    owner = Owner()
    mine = house.unit(script, client("m", owner=owner), isolation="session")
    await call(mine)
    script.pipe.say({"jsonrpc": "2.0", "id": 9, "method": "roots/list"})
    await wait_all_tasks_blocked()
    assert [ask.message.method for ask in owner.asks] == ["roots/list"]
    owner.asks[0].answer(decode_request('{"jsonrpc":"2.0","id":"x","result":{"roots":[]}}'))
    assert script.seen[-1] == {"jsonrpc": "2.0", "id": 9, "result": {"roots": []}}
    owners, others = (house.hub.subscribe("s", lambda: None, *audiences) for audiences in (["m"], ["n"]))
    script.pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    script.pipe.say({"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": 1}})
    await wait_all_tasks_blocked()
    assert (owners.take(), others.take()) == ([("s", "tools")], [])
    assert len(owner.notes) == 1


async def test_L9_a_resource_subscription_keeps_the_unit_and_survives_its_restart(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script()
    owner = Owner()
    who = client("m", owner=owner)
    unit = house.unit(script, who, idle_timeout_seconds=5)
    await call(unit)
    unit.subscribed("test://a", who)
    await trio.sleep(60)
    assert script.running == 1
    script.pipe.exit(1)
    await unit.stopped()
    await call(unit)
    assert script.methods().count("resources/subscribe") == 1
    script.pipe.say({"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "test://a"}})
    await wait_all_tasks_blocked()
    assert owner.marks == ["resource:test://a"]
    house.supervisor.close_client(who)
    await trio.sleep(6)
    assert script.methods().count("resources/unsubscribe") == 1
    assert script.running == 0


async def test_L9_a_subscription_that_is_answered_after_its_session_has_ended_is_taken_back(
    house: House, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    who = client("m", owner=Owner())
    unit = house.unit(script, who, idle_timeout_seconds=5)
    await call(unit)
    assert unit.link is not None
    subscribe = unit.link.subscribe

    async def late(uri: str, timeout: float) -> Message:
        reply = await subscribe(uri, timeout)
        house.supervisor.close_client(who)  # in the same turn of the loop: too late to cancel who waits
        return reply

    monkeypatch.setattr(type(unit.link), "subscribe", staticmethod(late))
    await unit.subscribe("test://a", who, trio.current_time() + 10)
    assert not unit.subscribers
    await trio.sleep(6)
    assert script.methods().count("resources/unsubscribe") == 1
    assert script.running == 0


async def test_G19_max_units_and_max_parallel_starts(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    house = House(nursery, Settings(max_units=3, max_parallel_starts=2))
    await nursery.start(house.run)
    script = Script(start_seconds=1)
    units = [house.unit(script, note, isolation="session") for note in map(client, "abcd")]
    begin = trio.current_time()
    async with trio.open_nursery() as inner:
        for unit in units[:3]:
            inner.start_soon(unit.ready)
    assert trio.current_time() - begin == 2, "two at once, then the third"
    with pytest.raises(Overloaded, match="max_units"):
        await call(units[3])


async def test_P6_L17_shutdown_stops_all_units_in_parallel(house: House, autojump_clock: MockClock) -> None:
    script = Script(stop_seconds=5)
    for key in "abc":
        await call(house.unit(script, client(key), isolation="session"))
    assert script.running == 3
    begin = trio.current_time()
    house.scope.cancel()
    while script.running:
        await trio.sleep(0.1)
    assert trio.current_time() - begin < 5.2
    with pytest.raises(Overloaded, match="shutting down"):
        await call(house.unit(script, client("z"), isolation="session"))


async def test_a_stop_by_hand_fails_calls_in_flight_and_counts_no_failure(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script(answer=mute)
    unit = house.unit(script)
    errors = []

    async def one() -> None:
        try:
            await call(unit)
        except LinkLost as error:
            errors.append(error.message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await wait_all_tasks_blocked()
        unit.stop_soon("by hand")
    await unit.stopped()
    assert errors == ["Server 's' was stopped"]
    assert (unit.state.phase, unit.state.failures) == (Phase.IDLE, 0)
    assert unit.active == 0


async def test_L10_counters_survive_stops(house: House, autojump_clock: MockClock) -> None:
    script = Script()
    unit = house.unit(script)
    await call(unit)
    unit.stop_soon("by hand")
    await unit.stopped()
    await call(unit)
    script.answer = mute
    with pytest.raises(UpstreamTimeout):
        await call(unit, seconds=1)
    counters = house.supervisor.counters_of("s")
    assert (counters.requests, counters.errors) == (3, 1)


async def test_G18_new_settings_reach_running_units(house: House, autojump_clock: MockClock) -> None:
    script = Script()
    unit = house.unit(script)
    await call(unit)
    house.settings = Settings(idle_timeout_seconds=5, max_connections_per_server=2, max_parallel_starts=3)
    house.supervisor.apply(Catalog((unit.spec,)))
    assert (unit.limit, house.supervisor.starting.total_tokens) == (2, 3)
    await trio.sleep(6)
    assert script.running == 0


async def test_L4_L5_L11_G7_K16_a_failed_health_check_shows_and_the_next_call_restarts(
    house: House, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.upstream.pipe import PipeLink

    healthy = True
    pings = 0

    async def ping(self: PipeLink, seconds: float) -> None:
        nonlocal pings
        pings += 1
        if not healthy:
            raise UpstreamTimeout("no answer to ping")

    monkeypatch.setattr(PipeLink, "ping", ping)
    held: list[dict[str, Any]] = []
    script = Script(answer=lambda pipe, m: held.append(m) if m.get("method") == "tools/call" else None)
    unit = house.unit(script, health_check_interval_seconds=10, idle_timeout_seconds=95)
    assert pings == 0, "checks start nothing"
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            await call(unit, seconds=60)

        nursery.start_soon(one)
        await trio.sleep(11)
        healthy = False
        await trio.sleep(10)
        assert (unit.shown_status, script.running) == ("unhealthy", 1), "a server at work is left alone"
        assert house.supervisor.status("s").last_error == "no answer to ping"
        script.pipe.say({"jsonrpc": "2.0", "id": held[0]["id"], "result": {}})
    await trio.sleep(11)
    assert script.running == 0
    assert unit.state.failures == 1
    healthy = True
    script.answer = None
    await call(unit)
    assert (script.starts, unit.shown_status) == (2, "running")
    await trio.sleep(96)
    assert script.running == 0, "checks are no activity"


# ------------------------------------------------------------------------------------------------------------ two eras
def modern(key: str = "modern:1", **more: Any) -> Client:
    return Client(key, Era.MODERN, "2026-07-28", **more)


class Both(Script):
    """Speaks both eras, whichever it is asked for first."""

    def discovered(self) -> dict[str, Any]:
        return Script(modern=True).discovered()


@pytest.mark.parametrize(
    ("isolation", "who", "era"),
    [
        ("shared", client(), Era.MODERN),
        ("shared", modern(), Era.MODERN),
        ("session", client(), Era.LEGACY),
        ("session", modern(), Era.MODERN),
        ("principal", client(), Era.LEGACY),
        ("tenant", client(), Era.MODERN),
    ],
)
async def test_B7_a_server_of_both_eras_speaks_its_clients_and_a_shared_one_the_modern(
    house: House, isolation: Any, who: Client, era: Era
) -> None:
    unit = house.unit(Both(), who, isolation=isolation)
    assert (await unit.ready()).era is era
    (shown,) = house.supervisor.status("s").details
    assert shown["era"] == era.value
    assert shown["protocol_version"] == ("2026-07-28" if era is Era.MODERN else "2025-11-25")
    assert shown["era_decided_by"] == ("server/discover" if era is Era.MODERN else "initialize")


@pytest.mark.parametrize("era", ["legacy", "modern"])
async def test_B7_the_catalog_decides_if_it_wants(house: House, era: Any) -> None:
    script = Both()
    link = await house.unit(script, era=era).ready()
    assert (link.era.value, link.decided) == (era, "catalog")
    assert script.probes == (era == "modern")


async def test_B7_the_log_says_it_once(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    unit = house.unit(Both())
    for _ in range(3):
        await call(unit)
    said = [getattr(record, "fields", {}) for record in caplog.records]
    assert [(f["era"], f["revision"], f["era_decided_by"]) for f in said if "era" in f] == [
        ("modern", "2026-07-28", "server/discover")
    ]


async def test_a_silent_legacy_server_costs_its_silence_once(house: House, autojump_clock: MockClock) -> None:
    script = Script()
    script.discovered = lambda: {"method": "notifications/nothing"}  # type: ignore[method-assign]
    unit = house.unit(script)
    for seconds in (10, 0):
        began = trio.current_time()
        await call(unit)
        assert trio.current_time() - began == pytest.approx(seconds, abs=1)
        unit.stop_soon("test")
        await unit.stopped()
    assert script.probes == 1


async def test_a_server_that_dies_of_the_probe_is_started_again_at_once_and_once(house: House) -> None:
    script = Script()
    usual = script.on_line

    def on_line(pipe: MemoryPipe, line: bytes) -> None:
        if b"server/discover" in line:
            pipe.exit(1)
        else:
            usual(pipe, line)

    script.on_line = on_line  # type: ignore[method-assign]
    unit = house.unit(script)
    link = await unit.ready()
    assert (link.era, script.starts, unit.state.failures) == (Era.LEGACY, 2, 0)
    unit.stop_soon("test")
    await unit.stopped()
    await unit.ready()
    assert script.starts == 3  # it is known now


async def test_a_server_that_changed_its_era_is_probed_again(house: House) -> None:
    script = Script()
    unit = house.unit(script)
    for speaks_modern in (False, True, False):
        script.modern = speaks_modern
        link = await unit.ready()
        assert (link.era is Era.MODERN) is speaks_modern
        unit.stop_soon("test")
        await unit.stopped()


async def test_modern_callers_share_a_unit_by_principal_and_by_how_they_can_be_asked(house: House) -> None:
    ann, bob = Principal("ann"), Principal("bob")
    script = Script()
    units = [
        house.unit(script, modern("modern:1"), ann, isolation="session"),
        house.unit(script, modern("modern:1"), ann, isolation="session"),
        house.unit(script, modern("modern:2"), ann, isolation="session"),
        house.unit(script, modern("modern:1"), bob, isolation="session"),
        house.unit(script, client("modern:1"), ann, isolation="session"),
    ]
    assert units[0] is units[1]
    assert len(set(map(id, units))) == 4


async def test_bridge_list_changes_of_an_isolated_unit_reach_its_own_kind_only(house: House) -> None:
    ann, bob = Principal("ann"), Principal("bob")
    script = Script()
    unit = house.unit(script, modern("modern:1", owner=Owner()), ann, isolation="session")
    await unit.ready()
    listeners = {
        name: house.hub.subscribe("s", lambda: None, *audiences)
        for name, audiences in {
            "own": [(ann, ""), (ann, "modern:1")],
            "other kind": [(ann, ""), (ann, "modern:2")],
            "other principal": [(bob, ""), (bob, "modern:1")],
            "everybody": [],
        }.items()
    }
    for listener in listeners.values():
        listener.take()
    script.pipe.say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    await wait_all_tasks_blocked()
    assert [name for name, listener in listeners.items() if listener.take()] == ["own"]


async def test_a_call_that_was_granted_more_time_is_not_stopped_by_the_idle_timeout(
    house: House, autojump_clock: MockClock
) -> None:
    script = Script(answer=mute)
    unit = house.unit(script, idle_timeout_seconds=60)
    ex = exchange(10)
    await unit.enter(ex.deadline)
    got = unit.begin(ex)
    got.grant(trio.current_time() + 300)
    await trio.sleep(200)
    assert not got.done
    assert unit.link is not None
    got.cancel()
    await trio.sleep(61)
    assert unit.link is None


async def test_a_parked_call_gives_its_slot_to_others_and_keeps_the_server(
    house: House, autojump_clock: MockClock
) -> None:
    unit = house.unit(Script(answer=mute), idle_timeout_seconds=60, max_connections_per_server=1)
    ex = exchange(10)
    await unit.enter(ex.deadline)
    got = unit.begin(ex)
    got.park()
    assert unit.try_enter(trio.current_time() + 1)
    unit.leave()
    await trio.sleep(200)
    assert not got.done
    again = exchange(10)
    got.unpark(again)
    got.park()
    got.unpark(exchange(10))
    got.cancel()
    assert (unit.active, unit.holds) == (0, 0)
    await trio.sleep(61)
    assert unit.link is None


@pytest.mark.parametrize("stop", ["the unit", "the gateway"])
async def test_P3_a_server_that_is_lost_while_it_is_stopped_harms_nobody(stop: str) -> None:
    """Whatever turn of the loop it is: the loss and the stop then come out of the same nurseries."""
    for turns in range(15):
        async with trio.open_nursery() as nursery:
            house = House(nursery)
            await nursery.start(house.run)
            script = Script(answer=mute)
            unit = house.unit(script)
            nursery.start_soon(lost, unit)
            await wait_all_tasks_blocked()
            script.pipe.exit(3)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            if stop == "the unit":
                unit.stop_soon("test")
                await unit.stopped()
            house.scope.cancel()


async def lost(unit: Unit) -> None:
    """A call whose server goes away."""
    with pytest.raises((LinkLost, StartFailed)):
        await call(unit)
