"""Row C7: who shares a server with whom, when a server that is somebody's own ends, and that caps hold under load.

Real gateways, counting servers (``counters``), callers of every front and both eras. A server is known by its process.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from counters import Caller, Counter, Refused, most_at_once
from listers import names
from peers import LegacyClient, ModernClient, wait_until
from running import RunningGateway
from watched import WatchedGateway, alive

PATIENCE = 30.0
"""Seconds after which what should have happened has not."""
FRONTS = ("legacy", "modern", "sse", "rest")
ISOLATIONS = ("shared", "tenant", "principal", "session", "call")
KEYED: dict[str, Any] = {
    # The key of no tenant is of the tenant "default", so with this config that tenant has two keys.
    "api_key": "key-main",
    "tenants": [
        {"id": "default", "api_key": "key-other", "namespaces": ["default"]},
        {"id": "bob", "api_key": "key-bob", "namespaces": ["default"]},
    ],
}
KEYS = {"main": "key-main", "main again": "key-main", "other": "key-other", "bob": "key-bob"}


def gone(*pids: int) -> None:
    """Wait until these processes have ended."""
    wait_until(lambda: not any(map(alive, pids)), f"still running: {[pid for pid in pids if alive(pid)]}", PATIENCE)


def settled(gateway: WatchedGateway, before: dict[str, int]) -> None:
    """Wait until nothing is left that was not there ``before``."""
    names = ("Call", "Session", "Subscription", "Turn", "Unit")
    until = time.monotonic() + PATIENCE
    while left := {name: count for name in names if (count := gateway.census()[name] - before[name])}:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def groups(owners: dict[str, int]) -> set[frozenset[str]]:
    """Who shares a process with whom."""
    return {frozenset(name for name, of in owners.items() if of == pid) for pid in owners.values()}


def parted(*together: Sequence[str]) -> set[frozenset[str]]:
    return set(map(frozenset, together))


# ------------------------------------------------------------------------------------------------- who shares with whom
@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("keyed")
    servers = [Counter(folder, isolation, isolation).entry for isolation in ISOLATIONS]
    with RunningGateway(folder, servers, config=KEYED) as gateway:
        yield gateway


SHARING = {
    "shared": parted(("main", "main again", "other", "bob")),
    "tenant": parted(("main", "main again", "other"), ("bob",)),
    "principal": parted(("main", "main again"), ("other",), ("bob",)),
    "session": parted(("main",), ("main again",), ("other",), ("bob",)),
    "call": parted(("main",), ("main again",), ("other",), ("bob",)),
}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_C7_who_counts_together(keyed: RunningGateway, isolation: str, front: str) -> None:
    """Two callers of one key, another key of its tenant, another tenant."""
    callers = {who: Caller(front, keyed, isolation, key=key) for who, key in KEYS.items()}
    first = {who: caller.count() for who, caller in callers.items()}
    again = {who: caller.count() for who, caller in callers.items()}
    expected = SHARING[isolation]
    if isolation == "session" and front in ("modern", "rest"):
        expected = SHARING["principal"]  # without a session the principal is one (protocol.md section 4.6)
    assert groups({who: pid for who, (_, pid) in first.items()}) == expected
    if isolation == "call":
        assert {number for number, _ in (*first.values(), *again.values())} == {1}
        assert len({pid for _, pid in (*first.values(), *again.values())}) == 8
        gone(*(pid for _, pid in (*first.values(), *again.values())))
        return
    for together in expected:
        # Everybody has counted once between the two counts of each, and nobody else.
        size = len(together)
        assert {again[who][0] - first[who][0] for who in together} == {size}
        assert len({again[who][1] for who in together}) == 1
    for caller in callers.values():
        caller.close()


def test_C7_fronts_of_one_tenant_count_together_or_apart(keyed: RunningGateway) -> None:
    """A principal's own server is told what its client can be asked, in its era; else the front is no matter."""

    def owners(isolation: str) -> set[frozenset[str]]:
        callers = {front: Caller(front, keyed, isolation, key="key-bob") for front in FRONTS}
        for front in FRONTS[:3]:
            callers[f"{front} merged"] = Caller(front, keyed, isolation, key="key-bob", merged=True)
        found = groups({name: caller.count()[1] for name, caller in callers.items()})
        for caller in callers.values():
            caller.close()
        return found

    legacy, modern = ("legacy", "legacy merged", "sse", "sse merged"), ("modern", "modern merged")
    assert owners("shared") == owners("tenant") == parted((*legacy, *modern, "rest"))
    assert owners("principal") == parted((*legacy, "rest"), modern)
    assert owners("session") == parted(*((name,) for name in legacy), modern, ("rest",))


def test_C7_without_keys_sessions_have_their_own_and_everybody_is_one_principal(tmp_path: Path) -> None:
    servers = [Counter(tmp_path, isolation, isolation).entry for isolation in ISOLATIONS[1:4]]

    def owners(isolation: str, *fronts: str) -> set[frozenset[str]]:
        callers = {f"{front} {n}": Caller(front, gateway, isolation) for front in fronts for n in (1, 2)}
        found = groups({name: caller.count()[1] for name, caller in callers.items()})
        for caller in callers.values():
            caller.close()
        return found

    modern, rest = ("modern 1", "modern 2"), ("rest 1", "rest 2")
    sessions = ("legacy 1", "legacy 2", "sse 1", "sse 2")
    with RunningGateway(tmp_path, servers) as gateway:
        assert owners("tenant", *FRONTS) == parted((*sessions, *modern, *rest))
        assert owners("principal", *FRONTS) == parted((*sessions, *rest), modern)
        alone = [(name,) for name in (*sessions, "stdio 1", "stdio 2")]
        assert owners("session", *FRONTS, "stdio") == parted(*alone, modern, rest)


def test_C7_forty_sessions_at_once_each_count_alone(tmp_path: Path) -> None:
    counter = Counter(tmp_path, "c", "session")

    def five(number: int) -> tuple[list[int], set[int]]:
        caller = Caller(("legacy", "sse")[number % 2], gateway, "c", merged=number % 4 > 1)
        found = [caller.count() for _ in range(5)]
        caller.close()
        return [number for number, _ in found], {pid for _, pid in found}

    with RunningGateway(tmp_path, [counter.entry]) as gateway, ThreadPoolExecutor(40) as pool:
        found = list(pool.map(five, range(40), timeout=2 * PATIENCE))
        assert all(numbers == [1, 2, 3, 4, 5] and len(pids) == 1 for numbers, pids in found)
        assert len(set.union(*(pids for _, pids in found))) == 40
        gone(*(pid for _, pids in found for pid in pids))


# ------------------------------------------------------------------------------------------- until their owner is gone
ASKER = """
import json, sys
# Lists a tool that asks to whoever declares that it can be asked: at initialize, or with each request.
declared = {}
for line in sys.stdin:
    message = json.loads(line)
    params = message.get("params") or {}
    if message["method"] == "initialize":
        declared = params["capabilities"]
    declared = (params.get("_meta") or {}).get("io.modelcontextprotocol/clientCapabilities", declared)
    tools = ["plain", "asking"] if "elicitation" in declared else ["plain"]
    info = {"name": "asker", "version": "1"}
    result = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in tools],
              "resultType": "complete", "ttlMs": 0, "cacheScope": "private", "supportedVersions": ["2026-07-28"],
              "protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info,
              "_meta": {"io.modelcontextprotocol/serverInfo": info}}
    if "id" in message:
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


@pytest.mark.parametrize("server", ["legacy", "modern"])
@pytest.mark.parametrize("client", [LegacyClient, ModernClient])
@pytest.mark.parametrize("isolation", ["session", "principal"])
def test_C7_a_merged_list_has_what_a_server_offers_to_such_a_client(
    isolation: str, client: Callable[..., Any], server: str, tmp_path: Path
) -> None:
    """The gateway lists in the name of the client that the server belongs to, whatever eras they are of."""
    runtime = {"type": "local-process", "command": sys.executable, "args": ["-c", ASKER]}
    entry = {"id": "s", "runtime": runtime, "isolation": isolation, "era": server}
    for declared, wanted in (({"elicitation": {}}, {"s__plain", "s__asking"}), ({}, {"s__plain"})):
        folder = tmp_path / str(len(declared))
        folder.mkdir()
        with RunningGateway(folder, [entry]) as gateway:
            assert names(client(gateway, "/mcp", declared)) == wanted


def reconfigure(gateway: RunningGateway, **config: Any) -> None:
    """Have the config read again, with these keys only and what the gateway was started with."""
    path = gateway.folder / "config.yaml"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key in ("catalog_path", "state_dir")}
    path.write_text(json.dumps({**kept, **config}))
    gateway.json("POST", "/admin/reload", headers={"X-API-Key": KEYED["api_key"]})


@pytest.mark.parametrize("merged", [False, True], ids=["own", "merged"])
@pytest.mark.parametrize("front", ["legacy", "sse", "stdio"])
def test_C7_a_sessions_server_ends_with_it(front: str, merged: bool, tmp_path: Path) -> None:
    """DELETE, the end of an HTTP+SSE stream, the end of a desktop client: its own server ends, no other."""
    servers = [Counter(tmp_path, id, "session").entry for id in ("c", "d")]
    with WatchedGateway(tmp_path, servers) as gateway:
        before = gateway.census()
        stays = Caller("legacy", gateway, "c")
        goes = Caller(front, gateway, "c", merged=merged)
        pids = [stays.count()[1], goes.count()[1]]
        assert all(map(alive, pids)) and pids[0] != pids[1]
        goes.close()
        gone(pids[1])
        assert stays.count() == (2, pids[0])
        stays.close()
        gone(pids[0])
        settled(gateway, before)


def test_C7_a_session_that_is_idle_takes_its_server_with_it(tmp_path: Path) -> None:
    """The session's own idle time, not the server's; one with an open stream is not idle."""
    config = {"session_idle_seconds": 1, "idle_timeout_seconds": 300}
    with RunningGateway(tmp_path, [Counter(tmp_path, "c", "session").entry], config=config) as gateway:
        silent, listening, sse = (Caller(front, gateway, "c") for front in ("legacy", "legacy", "sse"))
        inbox = listening.client.listen()
        pids = [caller.count()[1] for caller in (silent, listening, sse)]
        gone(pids[0])
        refused = silent.client.send({"jsonrpc": "2.0", "id": 9, "method": "tools/list"})
        assert refused.status == 404
        refused.close()
        assert (listening.count(), sse.count()) == ((2, pids[1]), (2, pids[2]))
        inbox.close()
        sse.close()
        gone(*pids)


def test_C7_an_isolated_server_that_is_idle_ends_before_its_owner(tmp_path: Path) -> None:
    """It counts anew then; whoever is at work, or has only gone quiet, keeps its session."""
    config = {"idle_timeout_seconds": 1}
    with RunningGateway(tmp_path, [Counter(tmp_path, "c", "session").entry], config=config) as gateway:
        callers = [Caller(front, gateway, "c") for front in FRONTS]
        pids = [caller.count()[1] for caller in callers]
        gone(*pids)
        assert [caller.count()[0] for caller in callers] == [1] * 4


@pytest.mark.parametrize("isolation", ["tenant", "principal", "session"])
def test_C7_what_a_removed_tenant_had_ends_with_it(isolation: str, tmp_path: Path) -> None:
    """Its servers, its sessions, its open streams; those of others go on."""
    with WatchedGateway(tmp_path, [Counter(tmp_path, "c", isolation).entry], config=KEYED) as gateway:
        mine = {front: Caller(front, gateway, "c", key="key-bob") for front in FRONTS}
        others = {front: Caller(front, gateway, "c", key="key-other") for front in FRONTS}
        pids = {caller.count()[1] for caller in mine.values()}
        former = {front: caller.count() for front, caller in others.items()}
        open = [mine["legacy"].client.listen(), mine["modern"].client.listen(), mine["sse"].client.inbox]
        going = [others["legacy"].client.listen(), others["modern"].client.listen(), others["sse"].client.inbox]
        reconfigure(gateway, **{**KEYED, "tenants": KEYED["tenants"][:1]})
        gone(*pids)
        for inbox in open:
            inbox._thread.join(PATIENCE)
            assert not inbox._thread.is_alive(), "its stream is still open"
        for front, caller in others.items():
            number, pid = caller.count()
            assert pid == former[front][1] and number > former[front][0]
        assert all(inbox._thread.is_alive() for inbox in going)

        def left() -> tuple[int, int]:
            counted = gateway.census()
            return counted["Session"], counted["Listening"]

        wait_until(lambda: left() == (2, 1))  # a stream's task has its last turn after its client has seen the end
        for caller in others.values():
            caller.close()


@pytest.mark.parametrize("front", FRONTS)
def test_C7_what_a_removed_tenant_has_in_flight_is_answered_first(front: str, tmp_path: Path) -> None:
    counter, until = Counter(tmp_path, "c", "session"), tmp_path / "go"
    with RunningGateway(tmp_path, [counter.entry], config=KEYED) as gateway, ThreadPoolExecutor(1) as pool:
        caller = Caller(front, gateway, "c", key="key-bob")
        work = pool.submit(caller.call, "work", tag="mine", until=str(until))
        wait_until(lambda: counter.events("begin"))
        reconfigure(gateway, **{**KEYED, "tenants": KEYED["tenants"][:1]})
        (begun,) = counter.events("begin")
        assert alive(begun.pid) and not work.done()
        until.touch()
        assert work.result(PATIENCE) == "mine"
        gone(begun.pid)
        if front == "sse":
            caller.close()


# --------------------------------------------------------------------------------------------- caps, with 200 at a time
MANY = 200


def outcome(work: Callable[[], Any]) -> Any:
    """What comes of it: a result, or the refusal."""
    try:
        return work()
    except Refused as refused:
        return refused


def at_once(work: Callable[[int], Any], count: int = MANY) -> list[Any]:
    """What came of that many, all begun in the same moment. Nobody waits for ever."""
    ready = threading.Barrier(count)

    def one(number: int) -> Any:
        ready.wait(PATIENCE)
        return outcome(lambda: work(number))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count), timeout=3 * PATIENCE))


def refusals(found: Sequence[Any], key: str) -> list[Refused]:
    """Who was refused, each told why, with 503 where there is an HTTP status for it."""
    refused = [each for each in found if isinstance(each, Refused)]
    assert all(each.status in (503, 0) and key in each.text for each in refused), Tally(map(str, refused))
    return refused


@pytest.mark.parametrize("cap", ["max_units_per_server", "max_units"])
def test_C7_caps_on_units_hold_and_make_room_again(cap: str, tmp_path: Path) -> None:
    """As many servers run as may, not one more, started no more at a time than may; the others are told so at once."""
    limit, parallel = 12, 3
    ids = ("a",) if cap == "max_units_per_server" else ("a", "b", "c")
    counters = [Counter(tmp_path, id, "session", starting=0.2) for id in ids]
    config = {cap: limit, "max_parallel_starts": parallel}
    with WatchedGateway(tmp_path, [counter.entry for counter in counters], config=config) as gateway:
        kinds = [(front, merged) for front in ("legacy", "sse", "modern") for merged in (False, True)]
        before = gateway.census()
        callers: list[Caller] = []

        def use(number: int) -> tuple[Caller, int]:
            front, merged = kinds[number % len(kinds)]
            caller = Caller(front, gateway, ids[number % len(ids)], merged=merged, number=number)
            callers.append(caller)
            return caller, caller.count()[1]

        found = at_once(use)
        served = [each for each in found if not isinstance(each, Refused)]
        assert len(refusals(found, cap)) == MANY - limit
        assert len({pid for _, pid in served}) == len(served) == limit
        starts = [event for counter in counters for event in counter.events("start", "up", "gone")]
        assert 1 < most_at_once(starts, "start", "up") <= parallel
        assert most_at_once(starts, "start", "gone") == limit
        for caller, pid in served:
            assert caller.count() == (2, pid)
        # Who goes makes room; modern callers, who never go, are stopped by hand here.
        for caller in callers:
            caller.close()
        for id in ids:
            gateway.http("POST", f"/servers/{id}/stop")
        gone(*(pid for _, pid in served))
        again = [use(number) for number in range(limit)]
        assert len({pid for _, pid in again}) == limit
        assert cap in outcome(lambda: use(limit)).text
        for caller in callers:
            caller.close()
        for id in ids:
            gateway.http("POST", f"/servers/{id}/stop")
        gone(*(pid for _, pid in again))
        settled(gateway, before)


def test_C7_max_sessions_holds_and_makes_room_again(tmp_path: Path) -> None:
    limit = 50
    with RunningGateway(tmp_path, [Counter(tmp_path, "c").entry], config={"max_sessions": limit}) as gateway:

        def begin(number: int) -> Caller:
            caller = Caller(("legacy", "sse")[number % 2], gateway, "c", merged=number % 4 > 1)
            caller.count()
            return caller

        found = at_once(begin)
        refused = refusals(found, "max_sessions")
        served = [each for each in found if isinstance(each, Caller)]
        assert (len(served), len(refused)) == (limit, MANY - limit)
        assert {each.status for each in refused} == {503}
        # Without a session there is no limit of sessions.
        assert Caller("modern", gateway, "c").count()[0] == Caller("rest", gateway, "c").count()[0] - 1 == limit + 1
        leaving = served[:10]
        for caller in leaving:
            caller.close()

        def room() -> Caller | None:
            come = outcome(lambda: begin(0))
            return come if isinstance(come, Caller) else None

        come = [wait_until(room) for _ in leaving]  # an HTTP+SSE session ends when its stream's end is noticed
        assert "max_sessions" in outcome(lambda: begin(0)).text
        for caller in (*come, *served[10:]):
            caller.close()


def test_C7_max_connections_per_server_bounds_what_a_server_works_on(tmp_path: Path) -> None:
    """Seen by the server itself, whatever front the 200 come through; everybody is served."""
    limit, fronts = 4, ("legacy", "modern", "sse", "rest")
    counter = Counter(tmp_path, "c", max_connections_per_server=limit)
    with RunningGateway(tmp_path, [counter.entry], config={"request_timeout_seconds": 2 * PATIENCE}) as gateway:

        def three(number: int) -> list[str]:
            caller = Caller(fronts[number % 4], gateway, "c", merged=number % 8 > 3 and number % 4 != 3, number=number)
            found = [caller.call("work", tag=f"{number}.{n}", seconds=0.01) for n in range(3)]
            caller.close()
            return found

        assert at_once(three) == [[f"{number}.{n}" for n in range(3)] for number in range(MANY)]
        assert Caller("rest", gateway, "c").call("peak") == str(limit)
        assert most_at_once(counter.events(), "begin", "end") == limit
        assert len(counter.events("start")) == 1


def test_C7_max_connections_per_server_is_each_isolated_servers_own(tmp_path: Path) -> None:
    counter, until = Counter(tmp_path, "c", "session", max_connections_per_server=2), tmp_path / "go"
    with RunningGateway(tmp_path, [counter.entry]) as gateway, ThreadPoolExecutor(12) as pool:
        callers = [Caller("legacy", gateway, "c") for _ in range(3)]
        works = [pool.submit(caller.call, "work", tag="x", until=str(until)) for caller in callers for _ in range(4)]
        wait_until(lambda: len(counter.events("begin")) == 6)
        until.touch()
        assert [work.result(PATIENCE) for work in works] == ["x"] * 12
        assert [caller.call("peak") for caller in callers] == ["2"] * 3
        for caller in callers:
            caller.close()


@pytest.mark.parametrize("single", FRONTS)
def test_C7_a_hundred_waiting_calls_of_one_client_do_not_delay_another(single: str, tmp_path: Path) -> None:
    counter, first, until = Counter(tmp_path, "c", max_connections_per_server=1), tmp_path / "first", tmp_path / "go"
    until.touch()
    with WatchedGateway(tmp_path, [counter.entry], config=KEYED) as gateway, ThreadPoolExecutor(102) as pool:
        greedy = Caller("legacy", gateway, "c", key="key-main")
        other = Caller(single, gateway, "c", key="key-bob")
        works = [pool.submit(greedy.call, "work", tag="greedy", until=str(first))]
        wait_until(lambda: counter.events("begin"))
        works += [pool.submit(greedy.call, "work", tag="greedy", until=str(until)) for _ in range(100)]
        wait_until(lambda: gateway.census()["Turn"] == 100, seconds=PATIENCE)
        lone = pool.submit(other.call, "work", tag="lone", until=str(until))
        wait_until(lambda: gateway.census()["Turn"] == 101, seconds=PATIENCE)
        first.touch()
        assert lone.result(PATIENCE) == "lone"
        assert [work.result(2 * PATIENCE) for work in works] == ["greedy"] * 101
        order = [event.tag for event in counter.events("begin")]
        assert order.index("lone") <= 2, "it waits for one of the other's calls, not for all"
        greedy.close()
        other.close()
