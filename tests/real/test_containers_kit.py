"""Row D1: containers on every engine do what the runtime kit asks of a Pipe."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from engines import IMAGE, Engine

from gateway.config.model import StringMap
from gateway.runtimes import RUNTIMES, by_type
from gateway.runtimes.base import Pipe, Surroundings
from gateway.runtimes.docker import DockerSpec
from tests import kit

pytestmark = pytest.mark.real

PATIENCE = 3 * kit.PATIENCE


@asynccontextmanager
async def open_peer(engine: Engine, *, stop_grace: float = 1.0, **keys: Any) -> AsyncIterator[Pipe]:
    spec = DockerSpec(IMAGE, args=("/app/peer.py",), host=engine.host, pull="never", **keys)
    around = Surroundings("peer", {}, stop_grace=stop_grace, environ=os.environ)
    opener = by_type(RUNTIMES)[engine.type].open
    assert opener is not None
    async with opener(spec, around) as place:
        assert not hasattr(place, "url")
        yield place


@pytest.mark.parametrize("check", kit.PIPE_CHECKS, ids=lambda check: check.__name__)
async def test_K17_K23_D1_pipe(engine: Engine, check: Any) -> None:
    def opened(*, stop_grace: float = 1.0) -> Any:
        return open_peer(engine, stop_grace=stop_grace)

    with trio.fail_after(PATIENCE):
        await check(opened)
    assert not engine.containers("open-mcp-gateway.server=peer"), "every container is gone"


async def test_D1_env_reaches_the_server_and_nothing_else(engine: Engine) -> None:
    async with open_peer(engine, env=StringMap((("OWN", "a=b c"),))) as pipe:
        await kit.send(pipe, b"env\n")
        seen = await kit.Lines(pipe).next()
    assert b'"OWN": "a=b c"' in seen
    assert b"DOCKER_HOST" not in seen and b"XDG_STATE_HOME" not in seen
