"""Servers in containers, on Docker or Podman: the YAML schema (compat K17-K23). This build does not run them yet."""

from __future__ import annotations

from typing import Final, Literal

import attrs

from gateway.config.model import StringMap, Text
from gateway.runtimes.base import Runtime

__all__ = ["PODMAN", "RUNTIME", "Amounts", "DockerSpec", "Resources"]

_NO_STRINGS: Final = StringMap()


@attrs.frozen
class Amounts:
    """Kubernetes quantities (``500m``, ``0.5``, ``512Mi``) and a number of processes."""

    cpu: str | int | float | None = None
    memory: str | int | None = None
    pids: int | None = None


@attrs.frozen
class Resources:
    """The same shape as a Kubernetes container's (compat K22, K26)."""

    requests: Amounts = Amounts()
    limits: Amounts = Amounts()


@attrs.frozen
class DockerSpec:
    """A container made from ``image`` for this server alone.

    command, args   replace the image's command; entrypoint replaces its entry point
    env, env_file   added to the image's environment, under the entry's own ``env``; a file is relative to the catalog
    volumes         host:container[:ro]; container_name: unique by default
    port, path      the server speaks HTTP there instead of stdin and stdout
    read_only, tmpfs, cap_add, user, resources    relaxations and limits of the safe defaults (robustness RB65)
    """

    image: Text
    command: Text | None = None
    args: tuple[Text, ...] = ()
    entrypoint: Text | None = None
    env: StringMap = _NO_STRINGS
    env_file: Text | None = None
    volumes: tuple[Text, ...] = ()
    network: Text | None = None
    user: str | int | None = None
    working_dir: Text | None = None
    container_name: Text | None = None
    resources: Resources = Resources()
    read_only: bool = False
    tmpfs: tuple[str, ...] = ()
    cap_add: tuple[str, ...] = ()
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    labels: StringMap = _NO_STRINGS
    port: int | None = None
    path: Text = "/mcp"

    def __attrs_post_init__(self) -> None:
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError("port must be between 1 and 65535")


RUNTIME: Final = Runtime("docker", DockerSpec, None)
PODMAN: Final = Runtime("podman", DockerSpec, None)
