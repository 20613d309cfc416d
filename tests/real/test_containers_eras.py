"""Row D1: the fixtures of the eras in containers, over stdio and HTTP: rows of the bridging matrix, official clients.

The tests are those of tests/scenarios/test_bridge.py, their servers being in containers. By default a part of them runs
on one engine; MCP_TEST_MATRIX=whole runs all and the official suite, MCP_TEST_ENGINES=20.10,newer,podman on these.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from peers import House, Record
from running import RunningGateway

from tests.real import test_conformance as conformance
from tests.scenarios import test_bridge as bridge

pytestmark = pytest.mark.real

ENGINES = os.environ.get("MCP_TEST_ENGINES", "newer").split(",")
WHOLE = os.environ.get("MCP_TEST_MATRIX") == "whole"
CELLS = bridge.CELLS if WHOLE else ["LL", "LM", "ML", "MM", "LL_http", "MM_http"]
PART = ("call", "progress", "elicitation", "roots", "completion")
ROWS = {
    name.removeprefix("test_bridge_"): function
    for name, function in vars(bridge).items()
    if name.startswith("test_bridge_") and list(inspect.signature(function).parameters) == ["cell"]
}
del ROWS["cursor"]  # it counts on the order of what a server is told, where a slow start lets the gateway's own list in


class ContainerHouse(House):
    """Its peers are in containers. They write what they were told into a folder that is mounted."""

    def __init__(self, folder: Path, engine: Engine, **config: Any) -> None:
        super().__init__(folder, **config)
        self.engine = engine

    def add(self, id: str, era: str, more: tuple[str, ...], entry: dict[str, Any], **runtime: Any) -> None:
        """One entry."""
        self.records[id] = Record(self.folder / f"{id}.record")
        named = () if "--name" in more else ("--name", id)
        args = ["/app/anywhere.py", "/app/peer_server.py", "--era", era, "--record", f"/records/{id}.record", *named]
        keys = {"volumes": [f"{self.folder}:/records"], "user": 0, **runtime}
        self.entries.append(self.engine.entry(id, *args, *more, runtime=keys, stop_grace_seconds=1, **entry))

    def pipe(self, id: str, era: str, /, *more: str, **entry: Any) -> None:
        """See ``House``."""
        self.add(id, era, more, entry)

    def http(self, id: str, era: str, /, *more: str, headers: Any = None, **entry: Any) -> str:
        """See ``House``."""
        self.add(id, era, (*more, "--http", "8080"), entry, port=8080)
        return ""


@pytest.fixture(scope="module", params=ENGINES)
def houses(
    request: pytest.FixtureRequest,
    engine_named: Callable[[str], Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[House, House]]:
    """Servers of their own for each client, and servers that all share."""
    engine = engine_named(request.param)
    own = ContainerHouse(tmp_path_factory.mktemp("own"), engine, max_units_per_server=500)
    bridge.add_servers(own, isolation="session")
    shared = ContainerHouse(tmp_path_factory.mktemp("shared"), engine)
    bridge.add_servers(shared)
    with own, shared:
        yield own, shared
    assert not engine.containers()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("row", ROWS if WHOLE else PART)
def test_D1_bridge(row: str, cell: str, houses: tuple[House, House]) -> None:
    made = bridge.Cell(cell, *houses)
    try:
        ROWS[row](made)
    finally:
        made.close()


SUITES = [("legacy-stdio", "2025-11-25"), ("modern-http", "2026-07-28")] if WHOLE else []
"""Minutes: every scenario has containers of its own, and each imports the SDK."""


@pytest.mark.skipif(not WHOLE, reason="takes minutes: MCP_TEST_MATRIX=whole runs it")
@pytest.mark.parametrize(("cell", "suite"), SUITES)
def test_D1_the_official_suite(
    cell: str, suite: str, engine_named: Callable[[str], Engine], real_part: Callable[[str], Path], tmp_path: Path
) -> None:
    """The fixture server on the official SDK, in a container that has the SDK mounted."""
    engine = engine_named(ENGINES[0])
    era, transport = cell.split("-")
    (packages,) = (real_part("py/sdk") / "lib").glob("python3*/site-packages")
    program = ("/app/anywhere.py", "/app/era_server.py", "--era", era)
    runtime: dict[str, Any] = {"volumes": [f"{packages}:/sdk:ro"], "env": {"PYTHONPATH": "/sdk"}}
    if transport == "http":
        program = (*program, "--http", "8080")
        runtime["port"] = 8080
    entry = engine.entry("era", *program, runtime=runtime, isolation="session", prefix="")
    with conformance.EraServer(era, real_part) as server:
        expected = conformance.run_suite(suite, server.url, tmp_path / "direct", real_part)
    with RunningGateway(tmp_path, [entry], config={"docker": {"allowed_paths": [str(packages)]}}) as gateway:
        conformance.warm_up(gateway)
        url = f"http://127.0.0.1:{gateway.port}/servers/era/mcp"
        outcome = conformance.run_suite(suite, url, tmp_path / "through", real_part)
    key = ("server", suite)
    conformance.check_cell("server", suite, {suite: expected}, (cell, {key: outcome}))
    assert sum(check["status"] == "SUCCESS" for checks in expected.scenarios.values() for check in checks) > 50
    assert not engine.containers("open-mcp-gateway.server=era")
