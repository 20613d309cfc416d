"""Logs: one line for people or one JSON object a record, to stderr (compat O2 to O4, C13, A10).

The text form is ``[timestamp] LEVEL target: message key=value``; the JSON form has timestamp, level and message first,
then the target and the fields. Fields travel as ``extra={"fields": {...}}``. Control characters are escaped and what a
traceback says is indented, so that nothing a client or server says can forge a line; headers that carry credentials
are masked.

Logging never raises. It writes in the caller's thread, which keeps the order and loses nothing when the process ends,
but must not make the gateway depend on whoever reads stderr: a reader that takes nothing holds one line up for at most
STALL_SECONDS, then lines are dropped until it reads again, and their number is told (see ``Handler``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, TextIO

__all__ = ["TRACE", "Throttle", "choose_level", "is_level", "redacted_headers", "setup"]

TRACE: Final = 5
LEVELS: Final[Mapping[str, int]] = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 10,
}
NAMES: Final[Mapping[int, str]] = {TRACE: "TRACE", logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
TARGETS: Final = ("gateway_http", "gateway_core", "catalog_watcher")
QUIET: Final = ("httpx", "httpcore", "hypercorn", "quart", "trio")
"""Libraries whose own story nobody asked for: warnings and worse only."""
MASKED: Final = frozenset({"authorization", "proxy-authorization", "x-api-key", "cookie", "set-cookie"})
STALL_SECONDS: Final = 0.1
ATOMIC: Final = 4096
"""Bytes that a writable pipe takes without blocking (PIPE_BUF on Linux)."""
MAX_CAUSES: Final = 256

_control = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def is_level(text: str) -> bool:
    """Whether a word names a level."""
    return text.lower() in LEVELS


def choose_level(option: str | None, rust_log: str | None, configured: str) -> str:
    """What decides: ``--log-level``, then RUST_LOG, then the config (compat C13), as text for ``setup``.

    RUST_LOG may be a list that names some targets only; what it leaves open is the config's.
    """
    return option or (f"{configured},{rust_log}" if rust_log else configured)


def setup(level: str, format: str = "text", stream: TextIO | None = None) -> None:
    """Send the gateway's records to ``stream`` (stderr), and only those of a level or above.

    ``level`` is a level's name, or RUST_LOG's list: ``info,gateway_core=debug``, where what comes later counts. Unknown
    words are ignored: a variable meant for another program must not stop this one. May be called again, which replaces
    what it set up before.
    """
    default = logging.INFO
    targets: dict[str, int] = {}
    for part in level.split(","):
        target, equals, name = part.strip().rpartition("=")
        value = LEVELS.get(name.strip().lower())
        if value is None:
            continue
        if equals:
            targets[target.partition("::")[0].strip()] = value
        else:
            default = value
    handler = Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    others = max(default, logging.WARNING)
    root.setLevel(others)
    for name in QUIET:
        logging.getLogger(name).setLevel(targets.get(name, others))
    for name in TARGETS:
        logging.getLogger(name).setLevel(targets.get(name, default))
    logging.addLevelName(TRACE, "TRACE")


class Stderr:
    """A stream's descriptor, written to with patience for STALL_SECONDS, as ``StreamHandler`` wants it.

    Before each piece it asks the system whether a write would wait. While the reader is stalled nothing waits for it;
    ``lost`` counts the lines that went missing. The descriptor's non-blocking flag is left alone: a terminal shares it
    with other programs.
    """

    def __init__(self, descriptor: int) -> None:
        self.lost = 0
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._torn = False

    def ready(self) -> bool:
        """Whether the next piece can be written; waits for it unless the stream is stalled already."""
        return bool(self._poll.poll(0 if self.lost else STALL_SECONDS * 1000))

    def write(self, text: str) -> None:
        """Write a line, or count it as lost. Raises OSError when the stream is broken."""
        data = text.encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        at = 0
        while at < len(data):
            try:
                if not self.ready():
                    break
                at += os.write(self._descriptor, data[at : at + ATOMIC])
            except BlockingIOError:  # another program has made it non-blocking
                break
        else:
            self._torn = False
            return
        self.lost += 1
        self._torn = at > 0 or self._torn

    def flush(self) -> None:
        """Nothing is held back."""


class Handler(logging.StreamHandler[Any]):
    """Never raises and never prints a traceback of its own: a closed or full stderr costs the line, nothing else."""

    def __init__(self, stream: TextIO | None) -> None:
        target: Any = stream
        try:
            if stream is not None:
                target = Stderr(stream.fileno())
        except (AttributeError, OSError, ValueError):
            pass  # a buffer without a descriptor, or Windows, which has no poll: written to as it is
        super().__init__(target)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, and before it how many could not be."""
        stream = self.stream
        if type(stream) is Stderr and stream.lost and stream.ready():
            lost, stream.lost = stream.lost, 0
            text = "log lines lost, as nobody read them: %d"
            super().emit(logging.LogRecord("gateway_http", logging.WARNING, "", 0, text, (lost,), None))
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record."""


def escaped(text: str) -> str:
    """One line: control characters and line separators in their escaped form."""
    return _control.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def stamp(seconds: float) -> str:
    """Unix time as ISO-8601 UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


class TextFormatter(logging.Formatter):
    """``[timestamp] LEVEL target: message key=value``; a traceback follows, indented, on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        fields = getattr(record, "fields", None) or {}
        tail = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        level = NAMES.get(record.levelno, record.levelname)
        line = f"[{stamp(record.created)}] {level} {record.name}: {escaped(record.getMessage() + tail)}"
        if record.exc_info:
            # An exception may quote what a client has sent, line ends included.
            for part in self.formatException(record.exc_info).splitlines():
                line += "\n    " + escaped(part)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as JSON."""
        entry: dict[str, Any] = {
            "timestamp": stamp(record.created),
            "level": NAMES.get(record.levelno, record.levelname),
            "message": record.getMessage(),
            "target": record.name,
        }
        for name, value in (getattr(record, "fields", None) or {}).items():
            entry.setdefault(name, value)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _shown(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text or "=" in text else text


def redacted_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers for a debug line, those with credentials masked (compat A10)."""
    return {name: "***" if name.lower() in MASKED else value for name, value in headers.items()}


class Throttle:
    """Warnings that repeat: at most one line a second for each cause, and then how many were left out (RB10, RB41).

    ``cause`` is a word of the caller's, not a client's; after MAX_CAUSES of them all are forgotten.
    """

    def __init__(self, log: logging.Logger, seconds: float = 1.0) -> None:
        self._log = log
        self._seconds = seconds
        self._seen: dict[str, tuple[float, int]] = {}

    def warning(self, cause: str, text: str, *args: object) -> None:
        """Log ``text % args`` unless this cause was logged within the last second."""
        now = time.monotonic()
        last, left_out = self._seen.get(cause, (float("-inf"), 0))
        if now - last < self._seconds:
            self._seen[cause] = (last, left_out + 1)
            return
        if len(self._seen) >= MAX_CAUSES:
            self._seen.clear()
        self._seen[cause] = (now, 0)
        if left_out:
            text, args = text + " (%d more like it)", (*args, left_out)
        self._log.warning(text, *args)
