"""What a log line looks like, which ones there are, and that logging hurts nobody."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.telemetry import logs
from gateway.telemetry.logs import TRACE, Throttle, choose_level, redacted_headers, setup

http = logging.getLogger("gateway_http")
core = logging.getLogger("gateway_core")

Lines = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Loggers belong to the process: put back what ``setup`` changes."""
    names = (None, *logs.TARGETS, *logs.QUIET)
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def collect(level: str, format: str = "text") -> Lines:
    """Set up with a buffer; what it holds, line by line."""
    stream = io.StringIO()
    setup(level, format, stream)
    return lambda: stream.getvalue().splitlines()


def test_O2_text_line_has_time_level_target_message_and_fields() -> None:
    lines = collect("info")
    core.warning("Server failed", extra={"fields": {"server_id": "notes", "error": "no such file", "code": 1}})
    (line,) = lines()
    found = re.fullmatch(r"\[(\S+)\] (.*)", line)
    assert found is not None
    assert found[2] == 'WARN gateway_core: Server failed server_id=notes error="no such file" code=1'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found[1])
    told = time.strptime(found[1][:19], "%Y-%m-%dT%H:%M:%S")
    assert abs(time.mktime(time.gmtime()) - time.mktime(told)) < 5


@pytest.mark.parametrize(
    ("level", "name"),
    [(TRACE, "TRACE"), (10, "DEBUG"), (20, "INFO"), (30, "WARN"), (40, "ERROR"), (50, "ERROR")],
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_O2_names_of_levels(level: int, name: str, format: str) -> None:
    lines = collect("trace", format)
    http.log(level, "x")
    (line,) = lines()
    assert json.loads(line)["level"] == name if format == "json" else f"] {name} gateway_http: x" in line


def test_O3_json_line_has_timestamp_level_message_first_then_fields() -> None:
    lines = collect("info", "json")
    http.info("Loaded %d servers", 3, extra={"fields": {"server_id": "a\nb", "level": "forged", "odd": {1}}})
    (line,) = lines()
    entry = json.loads(line)
    assert list(entry)[:3] == ["timestamp", "level", "message"]
    assert (entry["level"], entry["message"], entry["target"]) == ("INFO", "Loaded 3 servers", "gateway_http")
    assert (entry["server_id"], entry["odd"]) == ("a\nb", "{1}")


def test_O3_traceback_stays_in_its_json_line() -> None:
    lines = collect("info", "json")
    try:
        raise ValueError("broken")
    except ValueError:
        http.exception("oh")
    (line,) = lines()
    assert json.loads(line)["traceback"].endswith("ValueError: broken")


FORGED = "x\n[2026-01-01T00:00:00.000Z] ERROR gateway_core: forged"


@pytest.mark.parametrize(
    "nasty", [FORGED, FORGED.replace("\n", "\r"), FORGED.replace("\n", "\u2028"), "\x1b[2J", "\x85"]
)
def test_no_line_is_forged_by_what_others_say(nasty: str) -> None:
    lines = collect("info")
    http.warning("client said %s", nasty, extra={"fields": {"name": nasty}})
    (line,) = lines()
    assert line.isprintable()
    assert " WARN gateway_http: client said " in line


def test_no_line_is_forged_through_a_traceback() -> None:
    lines = collect("info")
    try:
        raise ValueError(FORGED + "\x1b[2J")
    except ValueError:
        http.exception("oh")
    first, *rest = lines()
    assert first.endswith("ERROR gateway_http: oh")
    assert any("ValueError: x" in line for line in rest)
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize(
    ("option", "rust_log", "configured", "http_level", "core_level"),
    [
        (None, None, "warn", 30, 30),
        (None, "debug", "warn", 10, 10),
        ("error", "debug", "warn", 40, 40),
        (None, "gateway_core=debug,gateway_http=info", "warn", 20, 10),
        (None, "gateway_core=trace", "warn", 30, TRACE),
        (None, "error, gateway_core::supervisor=debug", "info", 40, 10),
        (None, "INFO", "error", 20, 20),
        (None, "something,else=loud,=,", "error", 40, 40),
        (None, "", "error", 40, 40),
        (None, "off", "info", 60, 60),
    ],
)
def test_C13_levels_and_what_decides_them(
    option: str | None, rust_log: str | None, configured: str, http_level: int, core_level: int
) -> None:
    collect(choose_level(option, rust_log, configured))
    assert (http.level, core.level) == (http_level, core_level)


def test_G18_levels_change_while_running() -> None:
    lines = collect("warn")
    http.info("not yet")
    lines_now = collect("debug", "json")
    http.debug("now")
    assert lines() == []
    assert [json.loads(line)["message"] for line in lines_now()] == ["now"]


@pytest.mark.parametrize("name", ["httpx", "hypercorn.error", "quart.app", "trio.serve_listeners"])
def test_libraries_are_quiet(name: str) -> None:
    lines = collect("trace")
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("trouble")
    assert [line.endswith(f"WARN {name}: trouble") for line in lines()] == [True]


def test_A10_credentials_in_headers_are_masked() -> None:
    shown = redacted_headers({"authorization": "Bearer k", "x-api-key": "k", "Cookie": "k", "accept": "*/*"})
    assert shown == {"authorization": "***", "x-api-key": "***", "Cookie": "***", "accept": "*/*"}


@pytest.mark.parametrize("what", ["closed", "bad arguments", "bad field"])
def test_logging_never_raises_and_never_prints(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no")

    logging.getLogger().handlers.clear()  # pytest's own complain loudly
    stream = io.StringIO()
    setup("info", "text", stream)
    if what == "closed":
        stream.close()
        http.info("x")
    elif what == "bad arguments":
        http.info("%d", "x")
    else:
        http.info("x", extra={"fields": {"a": Bad()}})
    assert capfd.readouterr() == ("", "")


class Pipe:
    """A pipe in stderr's place that takes ``room`` bytes until somebody reads."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.stream = os.fdopen(self.writer, "w")

    def read(self) -> str:
        data = b""
        while True:
            try:
                more = os.read(self.reader, 65536)
            except BlockingIOError:
                return data.decode()
            if not more:
                return data.decode()
            data += more

    def close(self) -> None:
        os.close(self.reader)
        self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def test_lines_longer_than_a_pipe_takes_at_once_arrive_whole(pipe: Pipe) -> None:
    setup("info", "text", pipe.stream)
    http.info("%s", "é" * 10_000)
    http.info("next")
    first, second = pipe.read().splitlines()
    assert first.endswith("gateway_http: " + "é" * 10_000)
    assert second.endswith("gateway_http: next")


def test_a_reader_that_stops_reading_holds_nobody_up(pipe: Pipe) -> None:
    setup("info", "text", pipe.stream)
    began = time.monotonic()
    for number in range(3000):
        http.info("line %d %s", number, "x" * 100)
    took = time.monotonic() - began
    assert took < 2.0  # one wait of STALL_SECONDS and the formatting; without a limit it would hang
    written = pipe.read()
    assert 1 < written.count("\n") < 3000
    http.info("again")
    *_, told, last = pipe.read().splitlines()
    lost = re.search(r"WARN gateway_http: log lines lost, as nobody read them: (\d+)$", told)
    assert lost is not None
    assert last.endswith("gateway_http: again")
    whole = [line for line in written.split("\n")[:-1] if line.endswith("x" * 100)]
    assert int(lost[1]) == 3000 - len(whole)


def test_a_torn_line_does_not_swallow_the_next(pipe: Pipe) -> None:
    setup("info", "text", pipe.stream)
    http.info("%s", "x" * 1_000_000)
    pipe.read()
    http.info("again")
    ends = [line.partition("] ")[2] for line in pipe.read().splitlines()]
    assert ends == ["", "WARN gateway_http: log lines lost, as nobody read them: 1", "INFO gateway_http: again"]


def test_a_reader_that_has_gone_costs_the_lines_only(pipe: Pipe) -> None:
    setup("info", "text", pipe.stream)
    os.close(pipe.reader)
    try:
        http.info("x")
        http.info("y")
    finally:
        pipe.reader = os.open(os.devnull, os.O_RDONLY)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_RB10_RB41_one_line_a_second_for_each_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock()
    monkeypatch.setattr(logs, "time", clock)
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.Logger("noisy")
    logger.addHandler(Handler())
    noise = Throttle(logger)
    for _ in range(100):
        noise.warning("a", "bad line from %s", "x")
    noise.warning("b", "other")
    clock.now += 0.9
    noise.warning("a", "bad line from %s", "x")
    assert said == ["bad line from x", "other"]
    clock.now += 0.2
    noise.warning("a", "bad line from %s", "y")
    assert said[2:] == ["bad line from y (100 more like it)"]


def test_P8_causes_are_bounded() -> None:
    logger = logging.Logger("noisy", logging.CRITICAL)
    noise = Throttle(logger)
    for number in range(10 * logs.MAX_CAUSES):
        noise.warning(str(number), "x")
    assert len(noise._seen) <= logs.MAX_CAUSES
