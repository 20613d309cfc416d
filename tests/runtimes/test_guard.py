"""Nothing outlives its server, nor the gateway: families, the guard, zombies (L14, P7, A10, RB13)."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.runtimes import ProcessGuard, _guard, local_process
from gateway.runtimes._guard import _Row, members
from gateway.runtimes.base import Surroundings
from gateway.runtimes.local_process import LocalProcessSpec, open_local_process
from tests.kit import Lines, send

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
KINDS = ["child", "group", "session", "daemon", "bare", "holder"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows limits and parents in /proc")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except FileNotFoundError:
        return False


def ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


async def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Those who are left after that long."""
    with trio.move_on_after(seconds):
        while any(map(alive, pids)):
            await trio.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


@pytest.fixture
def to_kill() -> Iterator[list[int]]:
    """Whatever a failing test leaves behind."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_driver(*arguments: str, wrapper: tuple[str, ...] = ()) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    driver = subprocess.Popen(
        [*wrapper, sys.executable, str(FIXTURES / "driver.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert driver.stdout is not None
    return driver, json.loads(driver.stdout.readline())


# ------------------------------------------------------------------------------------------------ clean stop of one
@linux
@pytest.mark.parametrize("kind", KINDS)
async def test_A10_L14_no_descendant_outlives_its_server(kind: str, to_kill: list[int]) -> None:
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    async with open_local_process(spec, Surroundings("peer", dict(os.environ), stop_grace=0.2)) as pipe:
        await send(pipe, b"fork %s\n" % kind.encode())
        pid = int(await Lines(pipe).next())
        to_kill.append(pid)
        assert alive(pid)
    assert not alive(pid)


@linux
async def test_RB13_descendants_of_a_server_that_crashed_are_killed_soon(to_kill: list[int]) -> None:
    """The restart waits for it, so not for the whole grace."""
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    async with open_local_process(spec, Surroundings("peer", dict(os.environ), stop_grace=30)) as pipe:
        lines = Lines(pipe)
        for kind in KINDS:
            await send(pipe, b"fork %s\n" % kind.encode())
            to_kill.append(int(await lines.next()))
        await send(pipe, b"die 9\n")
        with trio.fail_after(1):  # although the holder keeps the pipes open
            assert await lines.next() == b""
        assert pipe.diagnosis() == "process was killed by signal SIGKILL"
        begun = trio.current_time()
    assert trio.current_time() - begun < 1
    assert not any(map(alive, to_kill))


@linux
async def test_A10_one_stop_leaves_other_servers_alone(to_kill: list[int]) -> None:
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    surroundings = Surroundings("peer", dict(os.environ), stop_grace=0.2)
    async with open_local_process(spec, surroundings) as stays:
        await send(stays, b"fork bare\n")
        other = int(await Lines(stays).next())
        to_kill.append(other)
        async with open_local_process(spec, surroundings) as goes:
            await send(goes, b"fork bare\n")
            to_kill.append(int(await Lines(goes).next()))
        assert alive(other)
        assert alive(stays.details["pid"])
        assert not alive(to_kill[1])


@linux
async def test_A10_without_a_mark_sessions_and_parents_still_find_them(
    to_kill: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_guard, "_put_mark", lambda: (0, None))
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    async with open_local_process(spec, Surroundings("peer", dict(os.environ), stop_grace=0.2)) as pipe:
        lines = Lines(pipe)
        await send(pipe, b"stubborn\n")
        for kind in ("child", "group", "session"):
            await send(pipe, b"fork %s\n" % kind.encode())
            to_kill.append(int(await lines.next()))
    assert not any(map(alive, to_kill))


async def test_L14_without_proc_the_group_is_killed(to_kill: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: no /proc, no pidfd, no waitid."""
    monkeypatch.setattr(local_process, "KILL_WAIT", 0.3)  # a zombie that its new parent has not reaped counts here
    monkeypatch.setattr(_guard, "_read_processes", dict)
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr(os, "waitid", raising=False)
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    with trio.fail_after(10):
        for last in (b"stubborn\n", b"exit 3\n"):
            async with open_local_process(spec, Surroundings("peer", dict(os.environ), stop_grace=0.2)) as pipe:
                lines = Lines(pipe)
                await send(pipe, b"fork child\n")
                pid = int(await lines.next())
                to_kill.append(pid)
                await send(pipe, last)
                if last == b"exit 3\n":
                    await pipe.wait_exited()
                    assert pipe.diagnosis() == "process exited with code 3"
            assert not await wait_gone([pid], 1)
            assert not alive(pipe.details["pid"])


def test_A10_members_are_a_closure() -> None:
    table = {
        10: _Row(parent=1, group=10, session=10, mark=0),  # the leader
        11: _Row(parent=10, group=11, session=10, mark=0),  # own group
        12: _Row(parent=11, group=12, session=12, mark=0),  # own session
        13: _Row(parent=1, group=12, session=12, mark=0),  # orphan in that session
        14: _Row(parent=13, group=14, session=14, mark=0),  # its child, out of the session
        15: _Row(parent=1, group=15, session=15, mark=77),  # daemon, known by the mark alone
        16: _Row(parent=15, group=10, session=10, mark=78),
        20: _Row(parent=1, group=20, session=20, mark=78),  # another server's
        21: _Row(parent=1, group=21, session=21, mark=0),
    }
    found = members(table, 10, 77)
    assert sorted(found) == [10, 11, 12, 13, 14, 15, 16]
    assert [pid for pid, in_group in sorted(found.items()) if in_group] == [10, 16]
    assert sorted(members(table, 30, 0)) == []  # no mark is not a mark


@linux
async def test_A10_marks_leave_our_own_limits_and_the_environment_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_RTTIME)
    spec = LocalProcessSpec(sys.executable, ("-S", str(FIXTURES / "peer.py")))
    async with open_local_process(spec, Surroundings("peer", {"ONLY": "this", "LC_ALL": "C.UTF-8"})) as pipe:
        await send(pipe, b"env\n")
        assert json.loads(await Lines(pipe).next()) == {"ONLY": "this", "LC_ALL": "C.UTF-8"}
        limits = Path(f"/proc/{pipe.details['pid']}/limits").read_text()
        assert f" {_guard._PREFIX}" in limits
    assert resource.getrlimit(resource.RLIMIT_RTTIME) == before


@linux
async def test_A10_a_real_realtime_limit_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (200_000, 200_000))
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: pytest.fail("touched"))
    assert _guard._put_mark() == (0, None)


async def test_P6_many_stops_share_their_looks_at_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = _guard._read_processes

    def counting() -> Any:
        nonlocal looks
        looks += 1
        return real()

    monkeypatch.setattr(_guard, "_read_processes", counting)
    census = _guard._Census()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(census.take)
    assert looks <= 3


# ------------------------------------------------------------------------------------------- SIGKILL of the gateway
@linux
async def test_P7_A10_sigkill_of_the_gateway_leaves_nothing(to_kill: list[int]) -> None:
    driver, shown = start_driver("guard", "2", *KINDS)
    with driver:
        pids = [shown["guard"], *shown["servers"], *shown["descendants"].values()]
        to_kill += pids
        assert len(pids) == 1 + 2 + 2 * len(KINDS)
        assert all(map(alive, pids))
        driver.kill()
    assert await wait_gone(pids, 5) == []


@linux
async def test_P7_the_guard_is_what_does_it(to_kill: list[int]) -> None:
    """Without it a stubborn descendant lives on: the test above can fail."""
    driver, shown = start_driver("none", "1", "child")
    with driver:
        to_kill += shown["servers"] + list(shown["descendants"].values())
        driver.kill()
    assert await wait_gone(list(shown["descendants"].values()), 1) != []
    os.killpg(shown["servers"][0], signal.SIGKILL)


@linux
async def test_P7_a_clean_end_leaves_nothing(to_kill: list[int]) -> None:
    driver, shown = start_driver("guard", "2", *KINDS)
    with driver:
        pids = [shown["guard"], *shown["servers"], *shown["descendants"].values()]
        to_kill += pids
        assert driver.stdin is not None
        driver.stdin.close()
        assert await trio.to_thread.run_sync(driver.wait) == 0
    assert [pid for pid in pids if alive(pid)] == []


@linux
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
async def test_P7_the_guards_script_is_plain(shell: str, tmp_path: Path, to_kill: list[int]) -> None:
    """It forgets what it is told to forget, kills the rest, and nothing after a goodbye."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, "sh"] if shell == "busybox" else [shell]
    sleepers = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(3)]
    kept, first, second = (sleeper.pid for sleeper in sleepers)
    to_kill += [kept, first, second]
    told = f"+ {first}\n+ {kept}\n+ {kept}\n+ {second}\n- {kept}\n- 99999999\n"
    for last in ("bye\n", ""):
        guard = subprocess.Popen([*command, "-c", _guard._SCRIPT, "guard", "1" * 13], stdin=subprocess.PIPE)
        assert guard.stdin is not None
        guard.stdin.write((told + last).encode())
        guard.stdin.close()
        if not last:
            assert [sleeper.wait(10) for sleeper in sleepers[1:]] == [-9, -9]
        assert guard.wait(10) == 0
        assert [alive(pid) for pid in (kept, first, second)] == [True, bool(last), bool(last)]
    os.kill(kept, signal.SIGKILL)
    sleepers[0].wait()


@linux
async def test_P7_a_killed_guard_is_replaced_and_knows_the_groups(to_kill: list[int]) -> None:
    driver, shown = start_driver("guard", "1", "child")
    with driver:
        to_kill += [*shown["servers"], *shown["descendants"].values()]
        os.kill(shown["guard"], signal.SIGKILL)
        with trio.fail_after(3):
            while True:
                found = subprocess.run(["pgrep", "-P", str(driver.pid), "-f", "mcp-gateway-guard"], capture_output=True)
                fresh = [int(pid) for pid in found.stdout.split() if int(pid) != shown["guard"]]
                if fresh:
                    break
                await trio.sleep(0.02)
        to_kill += fresh
        await trio.sleep(0.1)
        driver.kill()
    assert await wait_gone(to_kill, 5) == []


@linux
async def test_P7_the_guard_is_small_and_holds_nothing() -> None:
    async with ProcessGuard() as guard:
        assert guard.pid is None  # not before it is needed
        await trio.to_thread.run_sync(guard.prepare)
        pid = guard.pid
        assert pid is not None
        with trio.fail_after(5):
            while not ignores(pid, signal.SIGTERM):  # the first line of its script; its loader opens and closes files
                await trio.sleep(0.01)
        files = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        assert set(files) <= {"0", "1", "2"}
        assert files["0"].startswith("pipe:")
        assert files["1"] == files["2"] == "/dev/null"
        assert os.getsid(pid) == pid
        pss = [line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
        assert int(pss[0].split()[1]) < 1024
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        guard.watch(99999999)
        guard.forget(99999999)
        await trio.sleep(0.05)
        assert alive(pid)
    assert not alive(pid)


@linux
async def test_P7_a_guard_that_is_left_too_early_ends_what_it_watches(to_kill: list[int]) -> None:
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    to_kill.append(sleeper.pid)
    async with trio.open_nursery() as nursery, ProcessGuard() as guard:
        guard.watch(sleeper.pid)
        await trio.to_thread.run_sync(guard.prepare)
        pid = guard.pid
        nursery.start_soon(trio.to_thread.run_sync, sleeper.wait)  # a zombie would keep it looking
    assert sleeper.returncode == -signal.SIGKILL
    assert pid is not None
    assert not alive(pid)


async def test_P7_no_shell_no_guard_but_servers_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = _guard.start

    def start(arguments: Any, **options: Any) -> Any:
        if arguments[0] == "/bin/sh":
            raise FileNotFoundError(2, "No such file or directory")
        return real(arguments, **options)

    monkeypatch.setattr(_guard, "start", start)
    async with ProcessGuard() as guard:
        for _ in range(2):
            surroundings = Surroundings("cat", dict(os.environ), guard=guard)
            async with open_local_process(LocalProcessSpec("cat"), surroundings) as pipe:
                await send(pipe, b"x\n")
                assert await Lines(pipe).next() == b"x"
    assert caplog.text.count("no shell to watch over the servers") == 1


@linux
async def test_RB13_as_process_1_adopted_zombies_are_reaped(to_kill: list[int]) -> None:
    namespace = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a PID namespace")
    driver, shown = start_driver("guard", "1", "daemon", "bare", wrapper=namespace)
    with driver:
        assert shown["pid"] == 1
        inside = subprocess.run(["pgrep", "-P", str(driver.pid)], capture_output=True, check=True)
        outer = int(inside.stdout)
        orphans = [
            int(pid)
            for pid in subprocess.check_output(["pgrep", "-P", str(outer), "-f", "trap '' TERM HUP INT"]).split()
        ]
        assert len(orphans) == 2
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        with trio.fail_after(5):
            while any(Path(f"/proc/{pid}").exists() for pid in orphans):
                await trio.sleep(0.02)
        assert driver.stdin is not None
        driver.stdin.close()
        assert await trio.to_thread.run_sync(driver.wait) == 0
