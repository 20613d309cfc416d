"""Servers as Kubernetes Jobs of one pod (compat K24-K26), and what ``check`` says of an entry.

Each start makes a Job of its own and each stop removes it. How the pod looks is ``kubernetes.manifest``; what runs it,
``kubernetes.pod``, is imported where a catalog has one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from gateway.config.model import Secret, StringMap
from gateway.errors import StartFailed
from gateway.runtimes.base import Pipe, Runtime, Surroundings
from gateway.runtimes.kubernetes.job_spec import EnvFrom, K8sJobSpec, Quantities, Resources, Toleration, Tree, Volume

__all__ = ["RUNTIME", "EnvFrom", "K8sJobSpec", "Quantities", "Resources", "Toleration", "Tree", "Volume", "open_job"]


# -------------------------------------------------------------------------------------------------------------- advice
def advise(spec: K8sJobSpec, surroundings: Surroundings) -> Sequence[str]:
    """See ``base.Runtime.advice``."""
    from gateway.runtimes.kubernetes.manifest import Identity, build, relaxations

    try:
        made = build(spec, Identity("mcp", surroundings.server_id, "x"), surroundings.env, lambda text: False, 1)
    except StartFailed as error:
        return [f"{error.message}; it will not start"]
    found = relaxations(made.job)
    for key in ("command", "args", "annotations", "pod_overrides"):
        if _holds_secret(getattr(spec, key)):
            found.append(f"{key} hold a value from ${{}}, which everybody can read who may read Jobs; put it into env")
    return found


def _holds_secret(value: Any) -> bool:
    if isinstance(value, Tree | StringMap):
        return any(_holds_secret(each) for _, each in value.items)
    return isinstance(value, Secret) or (isinstance(value, tuple) and any(map(_holds_secret, value)))


# ------------------------------------------------------------------------------------------------------------- running
@asynccontextmanager
async def open_job(spec: K8sJobSpec, surroundings: Surroundings) -> AsyncIterator[Pipe]:
    """A Job for as long as the block lasts; see ``kubernetes.pod.open_pod``."""
    from gateway.runtimes.kubernetes.pod import open_pod

    async with open_pod(spec, surroundings) as pod:
        yield pod


async def sweep(where: str, instance: str, environ: Mapping[str, str]) -> None:
    """See ``base.Runtime.sweep``."""
    from gateway.runtimes.kubernetes import pod as job_pod

    await job_pod.sweep(where, instance, environ)


RUNTIME: Final = Runtime(
    "k8s-job", K8sJobSpec, open_job, advice=advise, sweep=sweep, modules=("gateway.runtimes.kubernetes.pod",)
)
