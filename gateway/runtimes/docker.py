"""Servers in containers, on Docker or Podman (compat K17-K23).

A container gets what its entry says and nothing of the gateway's own environment. It is safe by default (robustness
RB65): no new privileges, no capabilities, limits on memory, CPU and processes, an init process, and of this machine
only the paths that ``containers.mounts`` lets through. Each relaxation is a key of its own, and ``check`` prints it.

What runs a container is imported where a catalog has one: see ``containers.life``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from gateway.config.model import Secret, reveal
from gateway.runtimes._quantities import shown_bytes
from gateway.runtimes.base import Place, Runtime, Surroundings
from gateway.runtimes.containers.mounts import parse_mount, refusal, resolved
from gateway.runtimes.containers.spec import CPU, MEMORY, PIDS, Amounts, DockerSpec, Resources, limits_of

__all__ = ["PODMAN", "RUNTIME", "Amounts", "DockerSpec", "Resources"]


# -------------------------------------------------------------------------------------------------------------- advice
def advise(spec: DockerSpec, surroundings: Surroundings) -> Sequence[str]:
    """See ``base.Runtime.advice``."""
    found = []
    sockets = _sockets(surroundings.environ)
    for volume in spec.volumes:
        shown = volume.template if isinstance(volume, Secret) else volume
        try:
            mount = parse_mount(reveal(volume))
        except ValueError as error:
            found.append(f"volumes: {error}; it will not start" if shown is volume else f"volumes: {shown} is refused")
            continue
        reason = ""
        if not mount.named:
            try:
                path = resolved(mount.source, surroundings.catalog_dir, surroundings.environ.get("HOME", ""))
                reason = refusal(path, surroundings.allowed_paths, sockets, surroundings.environ)
            except ValueError as error:
                reason = str(error)
        if reason:
            found.append(f"volumes: {shown} is refused, and it will not start: {reason}")
        elif not mount.read_only:
            found.append(f"volumes: {shown} can be written to by the server (:ro forbids it)")
    network = "" if spec.network is None else reveal(spec.network)
    if network == "host":
        found.append("network: host lets the server into all that listens on this machine")
    if spec.cap_add:
        found.append(f"cap_add gives the server the capabilities {', '.join(spec.cap_add)}")
    if not spec.init:
        found.append("init: false leaves the server without a process that reaps its children")
    cpu, memory, pids = limits_of(spec)
    raised = [
        f"{cpu / CPU:g} CPUs" if cpu > CPU else "",
        f"{shown_bytes(memory)} of memory" if memory > MEMORY else "",
        f"{pids} processes" if pids > PIDS else "",
    ]
    if any(raised):
        found.append(f"resources let the server use {', '.join(filter(None, raised))}, which is above the default")
    if spec.env_file is not None:
        path = os.path.join(surroundings.catalog_dir, os.path.expanduser(reveal(spec.env_file)))
        if not os.access(path, os.R_OK):
            found.append("env_file can't be read, and it will not start")
    return found


def _sockets(environ: Mapping[str, str]) -> list[str]:
    """See ``containers.engine.sockets_of``, without what importing that costs where there is nothing to look at."""
    from gateway.runtimes.containers.engine import sockets_of

    return sockets_of(environ)


# ------------------------------------------------------------------------------------------------------------- running
@asynccontextmanager
async def _open(type: str, spec: DockerSpec, surroundings: Surroundings) -> AsyncIterator[Place]:
    """A running container for as long as the block lasts; see ``containers.life.open_container``."""
    from gateway.runtimes.containers.life import open_container

    async with open_container(type, spec, surroundings) as place:
        yield place


async def _sweep(type: str, where: str, instance: str, environ: Mapping[str, str]) -> None:
    """See ``base.Runtime.sweep``."""
    from gateway.runtimes.containers.life import sweep

    await sweep(type, where, instance, environ)


def _runtime(type: str) -> Runtime:
    return Runtime(
        type,
        DockerSpec,
        partial(_open, type),
        advice=advise,
        sweep=partial(_sweep, type),
        modules=("gateway.runtimes.containers.life",),
        origin=lambda spec: spec.port is not None,
    )


RUNTIME: Final = _runtime("docker")
PODMAN: Final = _runtime("podman")
