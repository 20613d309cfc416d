"""Which gateways may have left something: files that live with a lock (P7, RB62), over real files and processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.app import Gateway, Read, Sources
from gateway.config.model import Catalog, Settings
from gateway.errors import StartFailed
from gateway.runtimes import Instances
from gateway.runtimes.base import Runtime

ROOT = Path(__file__).resolve().parents[2]
PLACE = ("docker", "unix:///run/the engine.sock")

KILLED = """
import os, sys
from pathlib import Path
from gateway.runtimes import Instances
instances = Instances(Path(sys.argv[1]))
instances.uses(*sys.argv[2:])
print(instances.id, flush=True)
os.kill(os.getpid(), 9)
"""


def killed(state: Path, *place: str) -> str:
    """The id of a gateway that was killed after it used a place."""
    argv = [sys.executable, "-c", KILLED, str(state), *place]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -9
    return done.stdout.strip()


async def test_P7_RB62_a_living_gateway_is_nobodys_to_sweep_and_a_killed_one_is(tmp_path: Path) -> None:
    ours, dead = Instances(tmp_path), killed(tmp_path, *PLACE)
    ours.uses(*PLACE)
    later = Instances(tmp_path)
    assert sorted(later.left()) == sorted([ours.id, dead])
    with later.taken(ours.id) as left:
        assert left is None
    with later.taken(dead) as left:
        assert left == (dead, (PLACE,))
        with Instances(tmp_path).taken(dead) as twice:
            assert twice is None, "two sweep it at once"
    assert later.left() == [ours.id]
    await ours.aclose()
    assert later.left() == []


async def test_RB62_what_could_not_be_removed_is_looked_at_again(tmp_path: Path) -> None:
    dead = killed(tmp_path, *PLACE)
    later = Instances(tmp_path)
    with pytest.raises(StartFailed), later.taken(dead):
        raise StartFailed("engine away")
    assert later.left() == [dead]

    unclean = Instances(tmp_path)
    unclean.uses(*PLACE)
    unclean.leaves()
    await unclean.aclose()
    with later.taken(unclean.id) as left:
        assert left == (unclean.id, (PLACE,))


async def test_a_gateway_that_makes_nothing_outside_writes_nothing(tmp_path: Path) -> None:
    await Instances(tmp_path).aclose()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["none", "file"])
async def test_without_a_folder_it_is_said_once(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    instances = Instances(None if where == "none" else tmp_path / "file")
    for _ in range(3):
        instances.uses(*PLACE)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and PLACE[1] in record.getMessage()
    assert instances.left() == []
    await instances.aclose()


async def test_RB62_only_a_gateway_of_this_folder_that_has_ended_is_dead(tmp_path: Path) -> None:
    living, asking = Instances(tmp_path), Instances(tmp_path)
    living.uses("docker", "unix:///d.sock")
    assert not asking.dead(living.id)
    living.leaves()
    await living.aclose()
    assert asking.dead(living.id), "it has left something"
    with asking.taken(living.id) as left:
        assert left == (living.id, (("docker", "unix:///d.sock"),))
        assert not asking.dead(living.id), "it is being swept"
    assert not asking.dead(living.id), "and then forgotten"


@pytest.mark.parametrize("id", ["", "../../etc/passwd", "f" * 32, "x" * 32, "F" * 32])
def test_RB62_what_is_no_instance_of_this_folder_is_not_dead(id: str, tmp_path: Path) -> None:
    assert not Instances(tmp_path).dead(id)
    assert not Instances(None).dead(id)


# ------------------------------------------------------------------------------------------------------------ the sweep
Sweep = Callable[[str, str, Mapping[str, str]], Awaitable[None]]


def gateway(state: Path, sweep: Sweep | None) -> Gateway:
    runtime = Runtime("docker", object, None, sweep=sweep)
    return Gateway(Sources(), Read(Settings(), Catalog(), {"docker": runtime}, ()), state)


async def test_P7_a_later_gateway_sweeps_what_a_killed_one_left_until_it_is_gone(
    tmp_path: Path, autojump_clock: Any
) -> None:
    dead = killed(tmp_path, *PLACE)
    swept: list[tuple[str, str]] = []

    async def sweep(where: str, instance: str, environ: Mapping[str, str]) -> None:
        swept.append((where, instance))
        if len(swept) < 3:
            raise StartFailed("engine away")

    house = gateway(tmp_path, sweep)
    await house._sweep()
    assert swept == [(PLACE[1], dead)] * 3
    assert list((tmp_path / "instances").iterdir()) == []


async def test_P7_without_the_runtime_nothing_is_forgotten(tmp_path: Path) -> None:
    dead = killed(tmp_path, "nomad", "http://there")
    house = gateway(tmp_path, None)
    assert not await house._sweep_once()
    assert os.listdir(tmp_path / "instances") == [dead]


