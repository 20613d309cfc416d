"""Servers that are programs on this machine: newline-delimited bytes on stdin and stdout (compat K9-K12).

A program is started without a shell, in a session of its own. It has ended when it has exited or closed its stdout.
However the block is left, the program and all that it started are gone afterwards (compat L14, robustness RB13):
stdin closed, at most a second, SIGTERM to its group, ``stop_grace``, SIGKILL to its whole family (see ``_guard``).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import attrs
import trio

from gateway.config.model import Secret, Text, reveal
from gateway.errors import LinkLost, StartFailed
from gateway.runtimes import _guard
from gateway.runtimes.base import Guard, Runtime, Surroundings

__all__ = ["RUNTIME", "LocalProcessSpec", "StderrLines", "open_local_process"]

CLOSE_WAIT: Final = 0.8
"""Seconds between the end of stdin and SIGTERM: a second, less what finding and killing the rest takes."""

CRASH_WAIT: Final = 0.3
"""Seconds that the group of a program which ended by itself gets after SIGTERM: a caller waits for the restart."""

KILL_WAIT: Final = 2.0
"""Seconds for SIGKILL to work. Who survives is stuck in the kernel and is left to the guard."""

SETTLE: Final = 0.05
"""Seconds at the end of stdout for the exit code and the last stderr lines to arrive as well."""

READ_SIZE: Final = 64 * 1024
BIG_SIZE: Final = 256 * 1024
"""Of reads and pipes, once a server sends much at a time. Measured: 0.3 ms of CPU per MB instead of 0.7."""

REST_SIZE: Final = 1024 * 1024
"""Bytes read after the exit: no pipe holds more, only surviving descendants could."""

FLOOD_RATE: Final = 64 * 1024 * 1024
FLOOD_BURST: Final = 8.0 * 1024 * 1024
"""Bytes of stderr a second, and at once, before we read with pauses. Measured: this costs 10 % of a core."""


# ----------------------------------------------------------------------------------------------------------- stderr
class StderrLines:
    """A server's stderr in bounded memory and time: splits it into lines for ``log``, keeps the end for a diagnosis.

    No I/O; ``now`` is any clock in seconds. Lines over MAX_LINE are cut. Over RATE lines a second (after BURST of
    them at once) lines are counted instead of logged; the count is logged when there is room again. Control
    characters and colours are removed, secrets by ``redact``.
    """

    MAX_LINE: Final = 8192
    RATE: Final = 200.0
    BURST: Final = 1000.0
    TAIL: Final = 16 * 1024
    LAST_LINES: Final = 20
    LAST_CHARACTERS: Final = 1500

    _CONTROL: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

    def __init__(self, log: Callable[[str], None], redact: Callable[[str], str]) -> None:
        self._log = log
        self._redact = redact
        self._partial = b""
        self._cutting = False
        self._tail = b""
        self._tokens = self.BURST
        self._refilled = 0.0
        self._quiet = False
        self._dropped = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take the next bytes. Costs little more than a copy while lines are being dropped."""
        self._tail = data[-self.TAIL :] if len(data) >= self.TAIL else (self._tail + data)[-self.TAIL :]
        self._tokens = min(self.BURST, self._tokens + (now - self._refilled) * self.RATE)
        self._refilled = now
        if self._quiet and self._tokens >= self.RATE:  # not at the first token: one report a second is enough
            self._quiet = False
            self._report_dropped()
        *lines, rest = (self._partial + data).split(b"\n", 0 if self._quiet else int(self._tokens))
        for line in lines:
            if self._cutting:
                self._cutting = False
            else:
                self._emit(line)
        if more := rest.count(b"\n"):
            self._quiet = True
            self._dropped += more - self._cutting
            self._cutting = False
            rest = rest[rest.rindex(b"\n") + 1 :]
        if self._cutting:
            rest = b""
        elif len(rest) > 2 * self.MAX_LINE:  # twice, so that a secret at the cut is still whole
            self._emit(rest)
            self._cutting = True
            rest = b""
        self._partial = rest

    def close(self) -> None:
        """Log an unfinished last line and what was dropped."""
        if self._dropped:
            self._report_dropped()
        if self._partial:
            self._emit(self._partial)
            self._partial = b""

    def last(self) -> str:
        """The last lines as one: what the server said before it ended."""
        text = self._clean(self._tail)
        if len(self._tail) >= self.TAIL:
            text = text.partition("\n")[2] or text[len(text) // 2 :]  # the first line may begin within a secret
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        shown = " | ".join(lines[-self.LAST_LINES :])
        return shown if len(shown) <= self.LAST_CHARACTERS else "... " + shown[-self.LAST_CHARACTERS :]

    def _emit(self, line: bytes) -> None:
        if self._quiet:
            self._dropped += 1
            return
        self._tokens -= 1
        text = self._clean(line).rstrip()
        if text:
            self._log(text if len(text) <= self.MAX_LINE else text[: self.MAX_LINE] + " [cut]")

    def _report_dropped(self) -> None:
        self._log(f"[{self._dropped} more lines, too many to log]")
        self._dropped = 0

    def _clean(self, data: bytes) -> str:
        return self._CONTROL.sub("", self._redact(data.decode("utf-8", "replace")))


# ------------------------------------------------------------------------------------------------------------ start
@attrs.frozen
class LocalProcessSpec:
    """A program and its arguments.

    command      a name on the server's own PATH, an absolute path, or one relative to ``working_dir``
    working_dir  relative: to the catalog's folder; none: the gateway's own
    """

    command: Text
    args: tuple[Text, ...] = ()
    working_dir: Text | None = None

    def __attrs_post_init__(self) -> None:
        if self.command == "":
            raise ValueError("command must not be empty")


@attrs.frozen
class _Plan:
    """All that exec needs, checked."""

    program: str
    arguments: list[str]
    folder: str | None
    variables: Mapping[str, str]


def _resolve(spec: LocalProcessSpec, surroundings: Surroundings) -> _Plan:
    """Find the program as exec would. Blocking: a dead network disk may hold it for long. Raises StartFailed.

    The program is opened and read here, before anything is started: exec itself holds all of Python up, and comes
    back at once for a file that was just read.
    """
    command = reveal(spec.command)
    arguments = [command, *map(reveal, spec.args)]
    variables = surroundings.variables
    if not command:
        raise StartFailed("command is empty")
    _refuse_unusable(arguments, variables)
    folder = None if spec.working_dir is None else _check_folder(reveal(spec.working_dir), surroundings)
    if "/" in command:
        program = os.path.join(folder or ".", os.path.expanduser(command))
    else:
        program = _search(command, variables.get("PATH", os.defpath), folder)
    _check_program(program, command)
    return _Plan(program, arguments, folder, variables)


def _refuse_unusable(arguments: list[str], variables: Mapping[str, str]) -> None:
    for text in arguments:
        if "\0" in text:
            raise StartFailed("command and args can't hold a NUL character")
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise StartFailed(f"environment variable {name!r} can't be passed on: bad name, or a NUL character")


def _check_folder(written: str, surroundings: Surroundings) -> str:
    folder = os.path.abspath(surroundings.catalog_dir / os.path.expanduser(written))
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:
        raise StartFailed(f"working_dir {folder!r} can't be used: {_reason(error)}") from error
    if not stat.S_ISDIR(mode):
        raise StartFailed(f"working_dir {folder!r} is not a folder")
    if not os.access(folder, os.X_OK):
        raise StartFailed(f"working_dir {folder!r} can't be entered: permission denied")
    return folder


def _search(command: str, path: str, folder: str | None) -> str:
    """The first executable file of that name on PATH."""
    unusable = ""
    for entry in path.split(os.pathsep):
        candidate = os.path.join(folder or ".", entry, command)
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            unusable = unusable or candidate
    if unusable:
        raise StartFailed(f"command {command!r}: {unusable!r} is not executable (chmod +x it)")
    raise StartFailed(f"command {command!r} was not found; PATH searched: {path or '(empty)'}")


def _check_program(program: str, command: str) -> None:
    try:
        mode = os.stat(program).st_mode
    except (OSError, ValueError) as error:
        raise StartFailed(f"command {command!r}: {program!r} can't be used: {_reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise StartFailed(f"command {command!r}: {program!r} is a folder, not a program")
    if not stat.S_ISREG(mode):
        raise StartFailed(f"command {command!r}: {program!r} is not a file")
    if not os.access(program, os.X_OK):
        raise StartFailed(f"command {command!r}: {program!r} is not executable (chmod +x it)")
    interpreter = _interpreter(program)
    if interpreter and not os.path.exists(interpreter):
        raise StartFailed(f"command {command!r}: the interpreter in its first line, {interpreter!r}, does not exist")


def _interpreter(program: str) -> str:
    """What a script's ``#!`` line names; empty where there is none or it can't be read."""
    try:
        with open(program, "rb") as file:
            head = file.read(256)
    except OSError:
        return ""  # executable without being readable is fine
    if not head.startswith(b"#!"):
        return ""
    words = head[2:].partition(b"\n")[0].split()
    return os.fsdecode(words[0]) if words else ""


def _reason(error: OSError | ValueError) -> str:
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)


@attrs.frozen
class _Started:
    family: _guard.Family
    stdin: int
    stdout: int
    stderr: int


def _launch(plan: _Plan, guard: Guard | None) -> _Started:
    """Start the program. Blocking, for a moment. Raises StartFailed and leaves nothing open then."""
    if guard is not None:
        guard.prepare()
    fds: list[int] = []
    try:
        for _ in range(3):
            fds += os.pipe()
        their_stdin, stdin, stdout, their_stdout, stderr, their_stderr = fds
        process, mark = _guard.start(
            plan.arguments,
            executable=plan.program,
            cwd=plan.folder,
            env=plan.variables,
            stdin=their_stdin,
            stdout=their_stdout,
            stderr=their_stderr,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        for fd in fds:
            os.close(fd)
        raise _start_error(error, plan) from error
    for fd in (their_stdin, their_stdout, their_stderr):
        os.close(fd)
    for fd in (stdin, stdout, stderr):
        os.set_blocking(fd, False)
    return _Started(_guard.Family(process, mark), stdin, stdout, stderr)


_START_ERRORS: Final = {
    errno.ENOENT: "can't be started: the loader or interpreter that it needs does not exist",
    errno.ENOEXEC: "is no program for this machine: neither a binary of its kind nor a script with a '#!' line",
    errno.E2BIG: "got more arguments and environment than the system allows",
    errno.EACCES: "may not be executed (permission denied; is the disk mounted noexec?)",
    errno.ETXTBSY: "is being written to right now",
    errno.EAGAIN: "can't be started: the limit on processes is reached",
    errno.ENOMEM: "can't be started: out of memory",
    errno.EMFILE: "can't be started: out of file descriptors",
    errno.ENFILE: "can't be started: the system is out of file descriptors",
}


def _start_error(error: Exception, plan: _Plan) -> StartFailed:
    known = _START_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None
    reason = _reason(error) if isinstance(error, OSError | ValueError) else str(error)
    return StartFailed(f"command {plan.arguments[0]!r}: {plan.program!r} " + (known or f"can't be started: {reason}"))


# ------------------------------------------------------------------------------------------------------------- pipe
class LocalProcess:
    """A running program as a ``base.Pipe``. Made by ``open_local_process``, which alone stops it.

    One task at a time may be in ``receive_some`` and one in ``wait_writable``. Our ends of the pipes are raw
    non-blocking descriptors: a read is one wait and one system call, a write one system call.
    """

    def __init__(self, started: _Started, surroundings: Surroundings, command: str) -> None:
        self._family = started.family
        self._process = started.family.leader
        self._stdin = started.stdin
        self._stdout = started.stdout
        self._stderr = started.stderr
        self._redact = surroundings.redact
        self._details = {"pid": self._process.pid, "command": command}
        self._lines = StderrLines(surroundings.log, surroundings.redact)
        self._size = READ_SIZE
        self._left = REST_SIZE
        self.gone = True  # False: some of the family survived even SIGKILL
        self._end: str | None = None
        self._ended = trio.Event()
        self._silent = trio.Event()
        self._output_over = trio.Event()

    def __repr__(self) -> str:
        return f"<LocalProcess {self._process.pid} {self._end or 'running'}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: pid and command."""
        return self._details

    async def measure(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: memory and CPU of the program itself, where there is /proc."""
        await trio.lowlevel.checkpoint()
        return _usage(self._process.pid)

    def remark(self) -> str:
        """See ``base.Pipe``."""
        return ""

    def write_nowait(self, data: bytes | memoryview) -> int:
        """See ``base.Pipe``."""
        try:
            written = os.write(self._stdin, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkLost(self.diagnosis()) from error
        if written < len(data):
            _enlarge(self._stdin)
        return written

    async def wait_writable(self) -> None:
        """See ``base.Pipe``."""
        if self._stdin >= 0:
            try:
                return await trio.lowlevel.wait_writable(self._stdin)
            except trio.ClosedResourceError:
                pass
        await trio.lowlevel.checkpoint()
        raise LinkLost(self.diagnosis())

    async def receive_some(self) -> bytes:
        """See ``base.Pipe``. Always lets other tasks run; reads more at a time while the server sends much."""
        while True:
            fd = self._stdout
            try:
                if self._end is None:
                    await trio.lowlevel.wait_readable(fd)
                else:
                    await trio.lowlevel.checkpoint()
                data = os.read(fd, self._size) if self._left > 0 else b""
            except BlockingIOError:
                if self._end is None:
                    continue
                data = b""
            except trio.ClosedResourceError:
                if self._stdout >= 0:
                    continue  # woken by the exit: the pipe may still hold something
                data = b""
            except (OSError, ValueError):  # closed
                data = b""
            got = len(data)
            if got == self._size:
                if got < BIG_SIZE:
                    self._size = BIG_SIZE
                    _enlarge(fd)
            elif not got:
                await self._settle()
                return b""
            elif got < READ_SIZE:
                self._size = READ_SIZE
            if self._end is not None:
                self._left -= got  # what was in the pipe, not what surviving descendants may still write
            return data

    async def wait_exited(self) -> None:
        """See ``base.Pipe``."""
        await self._ended.wait()

    def diagnosis(self) -> str:
        """See ``base.Pipe``."""
        end = self._end or _guard.poll_exit(self._process)
        if end is None:
            end = "process closed its output but still runs" if self._output_over.is_set() else "process is running"
        last = self._lines.last()
        return f"{end}: {last}" if last else end

    # ------------------------------------------------------------------------------------------------------ insides
    async def _settle(self) -> None:
        """Wait a moment for what comes with the end of stdout, so that ``diagnosis`` knows it."""
        self._output_over.set()
        with trio.move_on_after(SETTLE):
            await self._ended.wait()
            await self._silent.wait()

    async def _watch_exit(self, scope: trio.CancelScope) -> None:
        with scope:
            self._end = await _guard.wait_exit(self._process, self._output_over)
            self._ended.set()
            self._close_stdin()
            trio.lowlevel.notify_closing(self._stdout)  # wakes the reader although a descendant may hold the pipe

    async def _drain_stderr(self, scope: trio.CancelScope) -> None:
        """Read stderr for ever, so that the server never waits for us there; its flood costs us little."""
        fd = self._stderr
        size = READ_SIZE
        budget = FLOOD_BURST
        refilled = time.monotonic()
        with scope:
            try:
                while True:
                    await trio.lowlevel.wait_readable(fd)
                    data = os.read(fd, size)
                    if not data:
                        break
                    if len(data) == READ_SIZE:
                        size = BIG_SIZE
                        _enlarge(fd)
                    now = time.monotonic()
                    self._lines.feed(data, now)
                    budget = min(FLOOD_BURST, budget + (now - refilled) * FLOOD_RATE) - len(data)
                    refilled = now
                    if budget < 0:
                        await trio.sleep(0.02)
            except (OSError, trio.ClosedResourceError):
                pass
            self._silent.set()

    async def _stop(self, grace: float) -> None:
        """End the program and its family; bounded by CLOSE_WAIT + grace + KILL_WAIT. Run shielded."""
        crashed = self._ended.is_set()
        self._close_stdin()
        with trio.move_on_after(CLOSE_WAIT):
            await self._ended.wait()
        family = self._family
        living = await family.living()
        if self._ended.is_set() and not living:
            return
        if not self._ended.is_set() or any(living.values()):
            family.signal_group(signal.SIGTERM)
            with trio.move_on_after(min(grace, CRASH_WAIT) if crashed else grace):
                await self._ended.wait()
                pause = 0.01
                while any((await family.living()).values()):
                    await trio.sleep(pause)
                    pause = min(pause * 2, 0.25)
        self.gone = await family.kill(KILL_WAIT)
        if self.gone:
            with trio.move_on_after(KILL_WAIT):
                await self._ended.wait()

    def _close_stdin(self) -> None:
        fd, self._stdin = self._stdin, -1
        _close(fd)

    def _close(self) -> None:
        """Give everything back. The last step."""
        self._close_stdin()
        for fd in (self._stdout, self._stderr):
            _close(fd)
        self._stdout = self._stderr = -1
        self._lines.close()
        _guard.reap(self._process)


def _usage(pid: int) -> dict[str, Any]:
    """Memory and CPU of a process, {} where that is not known."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            pages = int(file.read().split()[1])
        with open(f"/proc/{pid}/stat", "rb") as file:
            times = file.read().rpartition(b")")[2].split()[11:13]
        cpu = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        return {"memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "cpu_seconds": round(cpu, 2)}
    except (OSError, IndexError, ValueError):
        return {}


def _close(fd: int) -> None:
    if fd >= 0:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)


def _enlarge(fd: int) -> None:
    """Make a pipe bigger that has just been full.

    Only then: pipe memory is limited per user (64 MiB), and beyond that all the user's new pipes hold one page.
    """
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < BIG_SIZE:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, BIG_SIZE)


@asynccontextmanager
async def open_local_process(spec: LocalProcessSpec, surroundings: Surroundings) -> AsyncIterator[LocalProcess]:
    """Run the program while the block lasts.

    Raises StartFailed when it can't be started; that it ends soon after is the reader's to notice. Cancelled or not,
    the block is left within 1 s + ``stop_grace`` with the program and all that it started gone, but for what not
    even SIGKILL ends. Holds a nursery: use it by ``async with`` only. Errors of the block come out as they are.
    """
    if sys.platform == "win32":
        raise StartFailed("local-process needs a POSIX system")
    command = spec.command.template if isinstance(spec.command, Secret) else spec.command
    try:
        plan = await trio.to_thread.run_sync(
            _resolve, spec, surroundings, limiter=_guard.STARTS, abandon_on_cancel=True
        )
        started = await trio.to_thread.run_sync(_launch, plan, surroundings.guard, limiter=_guard.STARTS)
    except StartFailed as error:
        raise StartFailed(surroundings.redact(error.message)) from error
    guard, pid = surroundings.guard, started.family.leader.pid
    if guard is not None:
        guard.watch(pid)
    process = LocalProcess(started, surroundings, command)
    scopes = [trio.CancelScope(shield=True), trio.CancelScope(shield=True)]  # they serve the stop as well
    manager = trio.open_nursery()
    nursery = await manager.__aenter__()
    try:
        for scope, work in zip(scopes, (process._watch_exit, process._drain_stderr), strict=True):
            nursery.start_soon(work, scope)
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await process._stop(surroundings.stop_grace)
            with trio.move_on_after(SETTLE):
                await process._silent.wait()
        for scope in scopes:
            scope.cancel()
        # Not handed the block's error: it should come out as itself, not in the nursery's group.
        await manager.__aexit__(None, None, None)
        process._close()
        if guard is not None and process.gone:
            guard.forget(pid)


RUNTIME: Final = Runtime("local-process", LocalProcessSpec, open_local_process)
