"""Row E1: the matrix of tests/scenarios/test_bridge.py with its servers in pods behind Services.

What a server was told is read as there: the folder of the records is mounted into the pods, whose node is this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from peers import House, Record
from running import RunningGateway
from services import Cluster, service, until, workload

from tests.clusters import IMAGE, Kube
from tests.scenarios import test_bridge
from tests.scenarios.test_bridge import Cell

pytestmark = pytest.mark.real

CELLS = ("LL_http", "LM_http", "ML_http", "MM_http")


class PodHouse(House):
    """A house whose servers at URLs are in pods instead, one for each."""

    def __init__(self, folder: Path, cluster: Cluster, namespace: str) -> None:
        super().__init__(folder)
        self.cluster = cluster
        self.namespace = namespace
        folder.chmod(0o777)

    def http(self, id: str, era: str, /, *more: str, headers: Mapping[str, str] | None = None, **entry: Any) -> str:
        """See House; ``headers`` are of no use here."""
        assert headers is None
        self.records[id] = Record(self.folder / f"{id}.record")
        self.records[id].path.chmod(0o666)
        name = f"{id}-{self.folder.name[-8:].strip('-_').lower().replace('_', '-')}"
        words = ["--era", era, "--record", f"/record/{id}.record", "--name", id, "--http", "8000", *more]
        made = workload(
            self.namespace,
            name,
            1,
            image=IMAGE,
            args=["/app/anywhere.py", "/app/peer_server.py", *words],
            volumeMounts=[{"name": "record", "mountPath": "/record"}],
        )
        volume = {"name": "record", "hostPath": {"path": str(self.folder), "type": "Directory"}}
        made["spec"]["template"]["spec"]["volumes"] = [volume]
        made["spec"]["template"]["spec"]["hostname"] = "0badcafe"  # the fixture wants one like a container's
        self.cluster.apply(made, service(self.namespace, name))
        runtime = {"type": "k8s-service", "namespace": self.namespace, "service_name": name, "port": "mcp"}
        self.entries.append({"id": id, "runtime": runtime, **entry})
        return name

    def __enter__(self) -> PodHouse:
        names = [entry["runtime"].get("service_name") for entry in self.entries]
        for name in filter(None, names):
            until(lambda name=name: self.ready(name), 60, f"{name} is not ready")
        environ = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig)}
        self.gateway = RunningGateway(self.folder, self.entries, env=environ)
        return self

    def ready(self, name: str) -> bool:
        subsets = self.cluster.get(self.namespace, "endpoints", name).get("subsets") or []
        return any(subset.get("addresses") for subset in subsets)


@pytest.fixture(scope="module")
def place(kube: Kube) -> Iterator[tuple[Cluster, str]]:
    cluster = Cluster(kube)
    with cluster.namespace() as namespace:
        yield cluster, namespace


def furnished(folder: Path, place: tuple[Cluster, str], **entry: Any) -> PodHouse:
    built = PodHouse(folder, *place)
    built.pipe("lpipe", "legacy", "--page", "5", **entry)  # for the merged endpoint: they are looked at elsewhere
    built.pipe("mpipe", "modern", "--page", "5", **entry)
    built.http("lhttp", "legacy", "--page", "5", **entry)
    built.http("mhttp", "modern", "--page", "5", **entry)
    return built


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, place: tuple[Cluster, str]) -> Iterator[House]:
    """Links of their own for each client."""
    with furnished(tmp_path_factory.mktemp("bridge"), place, isolation="session") as built:
        yield built


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, place: tuple[Cluster, str]) -> Iterator[House]:
    """Links that all clients share."""
    with furnished(tmp_path_factory.mktemp("merged"), place) as built:
        yield built


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest, house: House, merged: House) -> Iterator[Cell]:
    made = Cell(request.param, house, merged)
    yield made
    made.close()


for _name in vars(test_bridge):
    _test = getattr(test_bridge, _name)
    if _name.startswith("test_bridge_") and "cell" in getattr(_test, "__annotations__", {}):
        globals()[_name] = _test
