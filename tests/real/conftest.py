"""Container engines and a cluster, started when the first test wants one and kept for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import kube, namespace
from engines import Engine, open_engine

__all__ = ["docker", "engine", "engine_named", "kube", "namespace"]

ENGINES = ("20.10", "newer", "podman")
"""Docker's oldest and newest API that we speak, and Podman."""


@pytest.fixture(scope="session")
def engine_named(real_part: Callable[[str], Path]) -> Iterator[Callable[[str], Engine]]:
    """``engine_named("20.10")``: that engine, the same for the whole session."""
    running: dict[str, Any] = {}

    def get(name: str) -> Engine:
        if name not in running:
            running[name] = open_engine(name, real_part)
        found: Engine = running[name]
        return found

    get.running = running  # type: ignore[attr-defined]
    try:
        yield get
    finally:
        for each in running.values():
            each.close()


@pytest.fixture
def docker(engine_named: Callable[[str], Engine]) -> Engine:
    """The oldest Docker engine, where it does not matter which one."""
    return engine_named("20.10")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, engine_named: Callable[[str], Engine]) -> Engine:
    """Each engine in turn."""
    return engine_named(request.param)
