"""Nothing that a server started outlives the server, nor the gateway.

A server's *family* is the process we start (its leader) and all that descends from it. Killing the leader's process
group misses who left the group; walking parents misses who was orphaned by a double fork; a marked environment
misses who was started with a clean one or overwrote it with a title. So three things are used together:

- The leader gets a session of its own. A session can't be joined from outside, so all its members are family.
- Linux: the leader is born with a *mark*, a soft RLIMIT_RTTIME of some 60,000 years of microseconds whose digits name
  this gateway and this start. Limits are inherited by fork and kept by exec, setsid, setuid and ``env -i``, nobody
  touches this one but realtime audio, and ``/proc/PID/limits`` shows it to everybody. The mark is set on ourselves
  for the moment of the start, under a lock, so no child is ever without it.
- Whoever descends from family, or is in a session with family, is family.

Where there is no ``/proc`` (macOS), or the limit is in real use, only the rest works: at least the group is killed.

``ProcessGuard`` does the same after a SIGKILL of the gateway: a shell at the other end of a pipe, which knows the
groups and our part of the mark, and strikes when the pipe ends without a goodbye.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final

import attrs
import trio

__all__ = ["STARTS", "Family", "ProcessGuard", "members", "poll_exit", "reap", "start", "wait_exit"]

_logger = logging.getLogger("gateway_core")

STARTS: Final = trio.CapacityLimiter(8)
"""Threads that look for and start programs: apart from those of DNS and files, which they could starve."""

_SCANS: Final = trio.CapacityLimiter(2)

_FAR: Final = 10**18
"""A realtime limit from here on means "none": 31,000 years of microseconds."""

_COUNT: Final = 10**6

_PREFIX: Final = _FAR // _COUNT + int.from_bytes(os.urandom(8), "big") % (_FAR // _COUNT)
"""The leading 13 digits of all our marks; six more count the starts."""

_numbers = itertools.count(1)
_start_lock = threading.Lock()
_children: set[int] = set()
"""Our own children, which only their owners reap."""
_survivors: list[subprocess.Popen[bytes]] = []
_starting = 0


# --------------------------------------------------------------------------------------------------------- starting
def start(arguments: Sequence[str], *, marked: bool = True, **options: Any) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program in its own session; returns it with its mark (0: it has none).

    Blocking, for worker threads. ``options`` are Popen's. Raises what Popen raises. Whoever starts a process reaps
    it, with ``reap``.
    """
    global _starting
    with _start_lock:
        _starting += 1
        try:
            mark, restore = _put_mark() if marked else (0, None)
            try:
                process = subprocess.Popen(arguments, start_new_session=True, **options)
            finally:
                if restore is not None:
                    _set_realtime_limit(restore)
            _children.add(process.pid)
            _give_back_file_limit(process.pid)
            return process, mark
        finally:
            _starting -= 1


def reap(process: subprocess.Popen[bytes]) -> bool:
    """Collect an ended child; False while it still runs. From then on its number may mean another process."""
    if process.poll() is None:
        _survivors.append(process)  # its finalizer would complain
        return False
    _children.discard(process.pid)
    return True


def _put_mark() -> tuple[int, tuple[int, int] | None]:
    """Set the next mark as our own soft limit; returns it and the limits to restore."""
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_RTTIME)
        mark = _PREFIX * _COUNT + next(_numbers) % _COUNT
        soft, hard = (2**64 if limit == resource.RLIM_INFINITY else limit for limit in before)
        if soft < _FAR or hard < mark:
            return 0, None
        _set_realtime_limit((mark, before[1]))
    except (ImportError, AttributeError, OSError, ValueError):
        return 0, None
    return mark, before


def _set_realtime_limit(limits: tuple[int, int]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_RTTIME, limits)


def _file_limit() -> tuple[int, int] | None:
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):
        return None


_FILE_LIMIT: Final = _file_limit()
"""As we were started; the HTTP front raises ours to the hard limit."""


def _give_back_file_limit(pid: int) -> None:
    """Set a child's soft limit of open files to the one we were started with.

    Programs size tables by it, or close every number up to it, and break when it is a million. Changing ours for the
    moment of the start would fail calls of ours that need a descriptor just then.
    """
    if _FILE_LIMIT is not None:
        with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
            import resource

            resource.prlimit(pid, resource.RLIMIT_NOFILE, _FILE_LIMIT)


# ---------------------------------------------------------------------------------------------------------- endings
async def wait_exit(process: subprocess.Popen[bytes], hint: trio.Event | None = None) -> str:
    """Wait until a child has ended, without a thread; returns ``poll_exit``'s sentence. Cancellable, does not reap.

    Where the system has no pidfd the child is looked at four times a second; ``hint`` makes the first look earlier.
    """
    pidfd = -1
    with contextlib.suppress(AttributeError, OSError):  # macOS, Linux before 5.3, some sandboxes
        pidfd = os.pidfd_open(process.pid)
    try:
        while (end := poll_exit(process)) is None:
            if pidfd >= 0:
                await trio.lowlevel.wait_readable(pidfd)
            elif hint is not None and not hint.is_set():
                with trio.move_on_after(0.25):
                    await hint.wait()
            else:
                await trio.sleep(0.25)
        return end
    finally:
        if pidfd >= 0:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)


def poll_exit(process: subprocess.Popen[bytes]) -> str | None:
    """How a child ended, for people; None while it runs.

    The child stays a zombie where the system allows it (``waitid``), so that the numbers of its process and its
    group keep meaning it and not somebody else.
    """
    if process.returncode is None and hasattr(os, "waitid"):
        try:
            found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # SIGCHLD is ignored: we were started that way, and the kernel reaps
            return "process ended"
        if found is None:
            return None
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    else:
        status = process.poll()
        if status is None:
            return None
        code = status
    if code >= 0:
        return f"process exited with code {code}"
    try:
        return f"process was killed by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"process was killed by signal {-code}"


# ----------------------------------------------------------------------------------------------------------- family
@attrs.frozen
class _Row:
    parent: int
    group: int
    session: int
    mark: int


def _read_processes() -> dict[int, _Row]:
    """All living processes that are not older than we are; empty where there is no /proc. Blocking."""
    table: dict[int, _Row] = {}
    try:
        born = int(_read_stat("self")[19])
        names = os.listdir("/proc")
    except (OSError, IndexError):
        return table
    for name in names:
        if not name.isdigit():
            continue
        try:
            fields = _read_stat(name)
            if fields[0] in b"ZX" or int(fields[19]) < born:
                continue
            table[int(name)] = _Row(int(fields[1]), int(fields[2]), int(fields[3]), _read_mark(name))
        except (OSError, IndexError, ValueError):
            continue  # it has just ended
    return table


def _read_stat(name: str) -> list[bytes]:
    """proc(5) stat from the third field on: state, ppid, pgrp, session, ... starttime at 19."""
    return _read(f"/proc/{name}/stat").rpartition(b") ")[2].split()


def _read_mark(name: str) -> int:
    soft = (_read(f"/proc/{name}/limits").partition(b"Max realtime timeout")[2].split(None, 1) or [b""])[0]
    return int(soft) if soft.isdigit() and int(soft) // _COUNT == _PREFIX else 0


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)


class _Census:
    """Shares one look at /proc among all who ask at the same time: a shutdown stops hundreds of servers at once."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._begun = -1.0
        self._table: Mapping[int, _Row] = {}

    async def take(self) -> Mapping[int, _Row]:
        """The processes, read after this call began."""
        asked = trio.current_time()
        async with self._lock:
            if self._begun <= asked:
                self._begun = trio.current_time()
                self._table = await trio.to_thread.run_sync(_read_processes, limiter=_SCANS)
            return self._table


_census: trio.lowlevel.RunVar[_Census] = trio.lowlevel.RunVar("census")


@attrs.define(eq=False)
class Family:
    """A child that leads a session, and all that descends from it. Valid until the child is reaped."""

    leader: subprocess.Popen[bytes]
    mark: int

    async def living(self) -> dict[int, bool]:
        """Who lives: process id -> whether it is still in the leader's own group.

        Where there is no /proc the leader's number stands for its whole group.
        """
        try:
            census = _census.get()
        except LookupError:
            census = _Census()
            _census.set(census)
        table = await census.take()
        if not table:
            reap(self.leader)  # a zombie would count as a living member
            return {self.leader.pid: True} if self.signal_group(0) else {}
        return members(table, self.leader.pid, self.mark)

    def signal_group(self, number: int) -> bool:
        """Send a signal to the leader's group; False when there is none."""
        try:
            os.killpg(self.leader.pid, number)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # macOS: EPERM when a member is a zombie
        return True

    async def kill(self, seconds: float) -> bool:
        """Kill everybody, again until nobody is left. False if some survive for that long (stuck in the kernel)."""
        deadline = trio.current_time() + seconds
        while living := await self.living():
            if trio.current_time() >= deadline:
                return False
            self.signal_group(signal.SIGKILL)
            for pid in living:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                except PermissionError:
                    _logger.warning("process %d of a stopped server runs as another user and can't be killed", pid)
            await trio.sleep(0.01)
        return True


def members(table: Mapping[int, _Row], leader: int, mark: int) -> dict[int, bool]:
    """The family of ``leader`` in a table of processes: the closure of the three rules at the top of this file."""
    found: dict[int, bool] = {}
    sessions = {leader}
    growing = True
    while growing:
        growing = False
        for pid, row in table.items():
            if pid not in found and (
                row.session in sessions or row.parent == leader or row.parent in found or (mark and row.mark == mark)
            ):
                found[pid] = row.group == leader
                sessions.add(row.session)
                growing = True
    found.pop(os.getpid(), None)
    return found


# ------------------------------------------------------------------------------------------------------------ guard
_SCRIPT: Final = """
trap '' HUP INT QUIT TERM PIPE ALRM USR1 USR2 TSTP TTIN TTOU
groups=' '
while read -r sign id; do
  case $sign in
    +) case $groups in *" $id "*) ;; *) groups="$groups$id " ;; esac ;;
    -) case $groups in *" $id "*) groups="${groups%%" $id "*} ${groups#*" $id "}" ;; esac ;;
    bye) exit 0 ;;
  esac
done
for round in 1 2 3 4; do
  found=
  for id in $groups; do
    kill -s KILL -- "-$id" 2>/dev/null && found=yes
  done
  for file in $(grep -ls "^Max realtime timeout  *$1[0-9][0-9][0-9][0-9][0-9][0-9] " /proc/[0-9]*/limits); do
    id=${file#/proc/}
    kill -s KILL "${id%/limits}" 2>/dev/null && found=yes
  done
  [ "$found" ] || exit 0
  [ "$round" = 1 ] || sleep 1
done
"""
"""Plain POSIX (dash, busybox, bash). Further rounds catch who was forked while the first one looked."""


class ProcessGuard:
    """The shell that kills what a dead gateway has left behind (design.md section 12). See ``base.Guard``.

        async with ProcessGuard() as guard: ...

    The shell is started before the first server is, has no file but its pipe's reading end, lives in its own session
    and ignores signals; if it is killed, it is replaced. Leaving the block says goodbye, unless a group is still
    watched: then its end is left to the shell. As process 1, of a container, we also reap adopted orphans here.
    """

    def __init__(self) -> None:
        self._groups: dict[int, None] = {}
        self._shell: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._closing = False
        self._refused = False
        self._prepare_lock = threading.Lock()
        self._lock = threading.Lock()  # held for microseconds: what the shell is told equals _groups
        self._started = trio.Event()
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def pid(self) -> int | None:
        """The shell's process id, for people and tests."""
        return None if self._shell is None else self._shell.pid

    async def __aenter__(self) -> ProcessGuard:
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(self._keep)
        if os.getpid() == 1:
            self._nursery.start_soon(_reap_adopted)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._nursery_manager is not None
        assert self._nursery is not None
        await self.aclose()
        self._nursery.cancel_scope.cancel()
        # Not handed the body's error: it should come out as itself, not in the nursery's group.
        await self._nursery_manager.__aexit__(None, None, None)

    def prepare(self) -> None:
        """Have the shell running. Blocking (milliseconds), for the worker thread that is about to start a server."""
        with self._prepare_lock:
            if self._shell is not None or self._closing:
                return
            reading, writing = os.pipe()
            try:
                os.set_blocking(writing, False)
                self._shell, _ = start(
                    ["/bin/sh", "-c", _SCRIPT, "mcp-gateway-guard", str(_PREFIX)],
                    marked=False,
                    stdin=reading,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={"PATH": os.pathsep.join((os.environ.get("PATH", ""), os.defpath)), "LC_ALL": "C"},
                )
            except OSError as error:
                os.close(writing)
                if not self._refused:
                    self._refused = True
                    _logger.warning("no shell to watch over the servers (%s): a SIGKILL may leave some behind", error)
                return
            finally:
                os.close(reading)
            with self._lock:
                self._pipe = writing
                self._tell("".join(f"+ {group}\n" for group in self._groups))

    def watch(self, group: int) -> None:
        """See ``base.Guard``. Never waits."""
        with self._lock:
            self._groups[group] = None
            self._tell(f"+ {group}\n")
        self._started.set()

    def forget(self, group: int) -> None:
        """See ``base.Guard``. Never waits."""
        with self._lock:
            self._groups.pop(group, None)
            self._tell(f"- {group}\n")

    async def aclose(self) -> None:
        """Say goodbye and see the shell off, within a second. Idempotent."""
        self._closing = True
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._finish)

    def _finish(self) -> None:
        with self._prepare_lock:
            shell, self._shell = self._shell, None
            if shell is None:
                return
            with self._lock:
                if not self._groups and not self._tell("bye\n"):
                    shell.kill()  # it would take the end of the pipe for our death
                pipe, self._pipe = self._pipe, -1
            if pipe >= 0:
                os.close(pipe)
            try:
                shell.wait(1)
            except subprocess.TimeoutExpired:
                if not self._groups:  # else it is at work
                    shell.kill()
                    shell.wait()
            reap(shell)

    def _tell(self, text: str) -> bool:
        """Write to the shell, under the lock. False when it can't take it: it is dead, or stopped for long."""
        if self._pipe < 0 or not text:
            return False
        data = text.encode()
        try:
            return os.write(self._pipe, data) == len(data)
        except OSError:
            return False

    async def _keep(self) -> None:
        """Replace the shell when it ends before we do."""
        while True:
            await self._started.wait()
            self._started = trio.Event()
            shell = self._shell
            if shell is None or self._closing:
                continue
            await wait_exit(shell)
            if self._closing or self._shell is not shell:
                continue
            with self._lock:
                pipe, self._pipe = self._pipe, -1
            os.close(pipe)
            reap(shell)
            self._shell = None
            _logger.warning("the shell that watches over the servers was killed; starting another")
            await trio.sleep(0.1)
            await trio.to_thread.run_sync(self.prepare, limiter=STARTS)
            self._started.set()


async def _reap_adopted() -> None:
    """Collect the zombies that process 1 inherits. Our own children stay with those who wait for them."""
    with trio.open_signal_receiver(signal.SIGCHLD) as signals:
        while True:
            while _starting:  # noqa: ASYNC110 - counted by threads; a child might not be known as ours yet
                await trio.sleep(0.05)
            for pid in _adopted_zombies():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - does not block
            await anext(signals)


def _adopted_zombies() -> list[int]:
    """Ended children of ours that nobody here started."""
    us = str(os.getpid()).encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in _children:
            try:
                fields = _read_stat(name)
            except OSError:
                continue
            if fields[:2] == [b"Z", us]:
                found.append(int(name))
    return found
