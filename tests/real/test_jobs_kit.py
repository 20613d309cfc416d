"""Row E1: a pod of a Job, attached over a WebSocket, does what the runtime kit asks of a Pipe."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from gateway.runtimes.base import Pipe, Surroundings
from gateway.runtimes.k8s_job import K8sJobSpec, open_job
from tests import kit
from tests.clusters import IMAGE, Kube

pytestmark = pytest.mark.real

PATIENCE = 4 * kit.PATIENCE
SLACK = 8.0
"""Seconds: Kubernetes' grace is whole seconds, its kubelet looks at containers once a second and reports after that."""


@pytest.mark.parametrize("check", kit.PIPE_CHECKS, ids=lambda check: check.__name__)
async def test_K24_E1_pipe(kube: Kube, namespace: str, check: Any) -> None:
    @asynccontextmanager
    async def open_peer(*, stop_grace: float = 1.0) -> AsyncIterator[Pipe]:
        spec = K8sJobSpec(namespace, IMAGE, args=("/app/peer.py",), user=1000, image_pull_policy="IfNotPresent")
        around = Surroundings("peer", {}, stop_grace=stop_grace, environ=kube.environ)
        async with open_job(spec, around) as pipe:
            yield pipe

    open_peer.slack = SLACK  # type: ignore[attr-defined]
    with trio.fail_after(PATIENCE):
        await check(open_peer)
    left = [job["metadata"]["name"] for job in kube.items("jobs", namespace, "open-mcp-gateway/server=peer")]
    assert not left, "every Job is gone"
