"""Real files, and a clock that stands still until it is told to jump: the watcher looks when the test says."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from gateway.config import watch as watch_module
from gateway.config.digest import digest_of
from gateway.config.watch import watch

INTERVAL = 0.25
LINE = "Catalog file changed, scheduling reload..."


class Watched:
    """A watcher over ``paths`` whose reloads are noted as what the files held."""

    def __init__(self, clock: trio.testing.MockClock, *paths: Path) -> None:
        self.clock = clock
        self.paths = list(paths)
        self.reloads: list[tuple[float, list[str | None]]] = []
        self.digests: dict[Path, bytes] | None = None
        self.fail: Exception | None = None
        self.looks = 0

    def asked(self) -> list[Path]:
        self.looks += 1
        return self.paths

    async def on_change(self) -> None:
        self.reloads.append((trio.current_time(), [self.read(path) for path in self.paths]))
        if self.fail is not None:
            raise self.fail

    def read(self, path: Path) -> str | None:
        try:
            return path.read_text()
        except OSError:
            return None

    def contents(self) -> list[list[str | None]]:
        return [contents for _, contents in self.reloads]

    def in_use(self) -> Mapping[Path, bytes]:
        assert self.digests is not None
        return self.digests

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            loaded = self.in_use if self.digests is not None else None
            nursery.start_soon(lambda: watch(self.asked, self.on_change, interval=INTERVAL, loaded=loaded))
            await self.look_done(0)
            yield
            nursery.cancel_scope.cancel()

    async def look_done(self, before: int) -> None:
        """Wait in real time, which the watcher's thread takes, until the next look is over and the watcher sleeps."""
        while self.looks == before or not 0 < trio.lowlevel.current_statistics().seconds_to_next_deadline <= INTERVAL:
            await trio.lowlevel.checkpoint()

    async def pass_time(self, seconds: float) -> None:
        """Let the watcher look as often as it does in that time."""
        for _ in range(round(seconds / INTERVAL)):
            before = self.looks
            self.clock.jump(INTERVAL)
            await self.look_done(before)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.yaml"
    path.write_text("one")
    return path


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.set_level(logging.INFO, "catalog_watcher")
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "catalog_watcher"]


async def test_W1_reloads_500_ms_after_the_change(
    mock_clock: trio.testing.MockClock, catalog: Path, lines: Callable[[], list[str]]
) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        await watched.pass_time(2)
        assert watched.reloads == []
        catalog.write_text("two")
        changed = trio.current_time()
        await watched.pass_time(0.5)
        assert (watched.reloads, lines()) == ([], [LINE])
        await watched.pass_time(2)
        assert watched.contents() == [["two"]]
        assert watched.reloads[0][0] - changed <= 1  # P11 leaves a second for the load itself
        assert lines() == [LINE]
        catalog.write_text("three")
        await watched.pass_time(2)
        assert watched.contents() == [["two"], ["three"]]


async def test_W1_each_event_restarts_the_timer_and_the_final_state_loads(
    mock_clock: trio.testing.MockClock, catalog: Path, lines: Callable[[], list[str]]
) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        for n in range(8):
            catalog.write_text(f"state {n}")
            await watched.pass_time(0.25)
        assert watched.reloads == []
        await watched.pass_time(0.5)
        assert watched.contents() == [["state 7"]]
        await watched.pass_time(3)
        assert len(watched.reloads) == 1
        assert lines() == [LINE]


async def test_RB31_hundred_writes_a_second_one_reload(mock_clock: trio.testing.MockClock, catalog: Path) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        for tenth in range(10):
            for n in range(10):
                catalog.write_text(f"state {tenth}.{n}")
            if tenth % 3:
                await watched.pass_time(0.25)
        await watched.pass_time(3)
        assert watched.contents() == [["state 9.9"]]


async def test_a_file_that_never_rests_is_loaded_after_5_seconds(
    mock_clock: trio.testing.MockClock, catalog: Path
) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        started = trio.current_time()
        for n in range(40):
            catalog.write_text(f"state {n}")
            await watched.pass_time(0.25)
        assert len(watched.reloads) == 1
        assert 5 <= watched.reloads[0][0] - started <= 5.5
        await watched.pass_time(1)
        assert watched.contents()[-1] == ["state 39"]


async def test_only_other_bytes_are_a_change(
    mock_clock: trio.testing.MockClock, catalog: Path, lines: Callable[[], list[str]]
) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        os.utime(catalog, (1, 1))
        await watched.pass_time(1)
        replacement = catalog.with_name("new")
        replacement.write_text("one")
        replacement.replace(catalog)
        await watched.pass_time(1)
        assert (watched.reloads, lines()) == ([], [])
        catalog.write_text("two")
        await watched.pass_time(0.25)
        catalog.write_text("one")  # back again before anybody loaded it
        await watched.pass_time(2)
        assert (watched.reloads, lines()) == ([], [LINE])


async def test_RB31_rename(mock_clock: trio.testing.MockClock, catalog: Path) -> None:
    os.utime(catalog, (1, 1))
    replacement = catalog.with_name("new")
    replacement.write_text("two")
    os.utime(replacement, (1, 1))
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        replacement.replace(catalog)
        await watched.pass_time(1)
        assert watched.contents() == [["two"]]


async def test_W11_symlink_swap_of_a_config_map(mock_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    for name, text in (("..1", "one"), ("..2", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "catalog.yaml").write_text(text)
        os.utime(tmp_path / name / "catalog.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "catalog.yaml").symlink_to("..data/catalog.yaml")
    watched = Watched(mock_clock, tmp_path / "catalog.yaml")
    async with watched.running():
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").replace(tmp_path / "..data")
        await watched.pass_time(1)
        assert watched.contents() == [["two"]]


async def test_RB31_second_change_within_one_time_stamp(
    mock_clock: trio.testing.MockClock, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = catalog.stat()  # a file system whose clock ticks slowly
    monkeypatch.setattr(watch_module, "os", SimpleNamespace(stat=lambda path: same))
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        catalog.write_text("two")
        await watched.pass_time(1)
        assert watched.contents() == [["two"]]


async def test_unchanged_old_file_is_not_read_again(
    mock_clock: trio.testing.MockClock, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    digest = watch_module._digest

    def noted(path: Path) -> bytes:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(watch_module, "_digest", noted)
    os.utime(catalog, (1, 1))
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        await watched.pass_time(5)
    assert read == [catalog]


async def test_RB30_deleted_and_back(
    mock_clock: trio.testing.MockClock, catalog: Path, lines: Callable[[], list[str]]
) -> None:
    watched = Watched(mock_clock, catalog)
    watched.digests = {catalog: digest_of((b"one",))}
    async with watched.running():
        catalog.unlink()
        await watched.pass_time(10)
        assert watched.contents() == [[None]]  # one problem, however long it is gone
        catalog.write_text("one")
        await watched.pass_time(2)
        assert watched.contents() == [[None], ["one"]]  # the problem is over, even if nothing has changed
        catalog.unlink()
        catalog.mkdir()
        await watched.pass_time(2)
        assert len(watched.reloads) == 3
        catalog.rmdir()
        os.mkfifo(catalog)  # is never opened
        await watched.pass_time(2)
    assert lines().count(LINE) == 3


async def test_RB30_replaced_by_a_rename_with_a_gap_is_one_reload(
    mock_clock: trio.testing.MockClock, catalog: Path
) -> None:
    watched = Watched(mock_clock, catalog)
    async with watched.running():
        catalog.unlink()
        await watched.pass_time(0.25)
        catalog.write_text("two")
        await watched.pass_time(2)
        assert watched.contents() == [["two"]]


async def test_RB30_unreadable(
    mock_clock: trio.testing.MockClock, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    watched = Watched(mock_clock, catalog)
    async with watched.running():
        with monkeypatch.context() as patch:
            patch.setattr(watch_module, "_digest", refuse)
            await watched.pass_time(5)
            assert len(watched.reloads) == 1
        await watched.pass_time(2)
        assert len(watched.reloads) == 2


async def test_W7_refused_file_is_tried_once(mock_clock: trio.testing.MockClock, catalog: Path) -> None:
    watched = Watched(mock_clock, catalog)
    watched.digests = {catalog: digest_of((b"one",))}  # stays what it is: no reload succeeds
    async with watched.running():
        catalog.write_text("servers: [")
        await watched.pass_time(10)
        assert watched.contents() == [["servers: ["]]
        catalog.write_text("servers: [}")
        await watched.pass_time(2)
        assert len(watched.reloads) == 2


async def test_change_between_load_and_first_look_is_noticed(mock_clock: trio.testing.MockClock, catalog: Path) -> None:
    watched = Watched(mock_clock, catalog)
    watched.digests = {catalog: digest_of((b"zero",))}
    async with watched.running():
        await watched.pass_time(1)
        assert watched.contents() == [["one"]]


async def test_W10_what_was_reloaded_by_hand_is_not_loaded_again(
    mock_clock: trio.testing.MockClock, catalog: Path
) -> None:
    watched = Watched(mock_clock, catalog)
    watched.digests = {catalog: digest_of((b"one",))}
    async with watched.running():
        catalog.write_text("two")
        await watched.pass_time(0.25)
        watched.digests = {catalog: digest_of((b"two",))}
        await watched.pass_time(3)
        assert watched.reloads == []


async def test_G18_several_paths_that_change(mock_clock: trio.testing.MockClock, catalog: Path) -> None:
    config, other = catalog.with_name("config.yaml"), catalog.with_name("other.yaml")
    config.write_text("config")
    other.write_text("other")
    watched = Watched(mock_clock, config, catalog)
    async with watched.running():
        config.write_text("config 2")
        catalog.write_text("two")
        await watched.pass_time(1)
        assert watched.contents() == [["config 2", "two"]]
        watched.paths = [config, other]
        await watched.pass_time(1)
        catalog.write_text("three")  # nobody's any more
        await watched.pass_time(1)
        assert len(watched.reloads) == 1
        other.write_text("other 2")
        await watched.pass_time(1)
        assert watched.contents()[1:] == [["config 2", "other 2"]]


async def test_survives_whatever_happens_and_says_so_once_a_minute(
    mock_clock: trio.testing.MockClock, catalog: Path, lines: Callable[[], list[str]]
) -> None:
    watched = Watched(mock_clock, catalog)
    watched.fail = RuntimeError("broken reload")
    async with watched.running():
        for text in ("two", "three"):
            catalog.write_text(text)
            await watched.pass_time(2)
        assert watched.contents() == [["two"], ["three"]]
        assert [line for line in lines() if line != LINE] == [
            "Looking for changed files failed: RuntimeError('broken reload'); trying on"
        ]
        await watched.pass_time(60)
        catalog.write_text("four")
        await watched.pass_time(2)
        assert len(lines()) == 5


async def test_P11_real_time(catalog: Path) -> None:
    changed = trio.Event()

    async def on_change() -> None:
        changed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: watch(lambda: [catalog], on_change, loaded=lambda: {catalog: b""}))
        with trio.fail_after(5):
            await changed.wait()  # the difference from what is in use, so the watcher is up
        changed = trio.Event()
        catalog.write_text("two")
        with trio.fail_after(2):
            await changed.wait()
        nursery.cancel_scope.cancel()
