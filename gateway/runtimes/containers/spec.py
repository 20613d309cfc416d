"""What a catalog entry of type ``docker`` or ``podman`` says: the YAML schema, checked as far as that goes alone."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

import attrs

from gateway.config.model import Secret, StringMap, Text, reveal
from gateway.runtimes._quantities import memory_bytes, nano_cpus
from gateway.runtimes.containers.mounts import parse_mount
from gateway.runtimes.containers.reference import parse_reference

__all__ = ["CPU", "LABEL", "MEMORY", "PIDS", "Amounts", "DockerSpec", "Resources", "limits_of"]

_NO_STRINGS: Final = StringMap()

LABEL: Final = "open-mcp-gateway."
"""What the labels begin with that say whose a container is."""
CPU: Final = 1_000_000_000
MEMORY: Final = 1024 * 1024 * 1024
PIDS: Final = 256
"""The limits of an entry that sets none."""

_CAPABILITY: Final = re.compile(r"[A-Z][A-Z_]{0,63}")
_NETWORK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CONTAINER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?")
_PLATFORM: Final = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+){0,2}")


@attrs.frozen
class Amounts:
    """Kubernetes quantities (``500m``, ``0.5``, ``512Mi``) and a number of processes."""

    cpu: str | int | float | None = None
    memory: str | int | None = None
    pids: int | None = None

    def __attrs_post_init__(self) -> None:
        for name, read in (("cpu", nano_cpus), ("memory", memory_bytes)):
            value = getattr(self, name)
            if value is not None:
                try:
                    read(value)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if self.pids is not None and not 0 < self.pids < 2**31:
            raise ValueError("pids must be at least 1")


@attrs.frozen
class Resources:
    """The same shape as a Kubernetes container's (compat K22, K26)."""

    requests: Amounts = Amounts()
    limits: Amounts = Amounts()

    def __attrs_post_init__(self) -> None:
        if self.requests.pids is not None:
            raise ValueError("requests can't hold pids; it is a limit")


@attrs.frozen
class DockerSpec:
    """A container made from ``image`` for this server alone.

    command, args   replace the image's command; entrypoint replaces its entry point ("" removes it)
    env, env_file   added to the image's environment, under the entry's own ``env``; a file is relative to the catalog
    volumes         host:container[:ro]; container_name: unique by default
    network         none, host, or a network of the engine; the engine's default network by default
    port, path      the server speaks HTTP there instead of stdin and stdout
    read_only, tmpfs, cap_add, init, user, resources    relaxations and limits of the safe defaults (robustness RB65)
    host            the engine's address (unix://..., tcp://...); by default it is looked for as its own client does
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
    init: bool = True
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    labels: StringMap = _NO_STRINGS
    port: int | None = None
    path: Text = "/mcp"
    host: Text | None = None

    def __attrs_post_init__(self) -> None:
        """A mistake in the file is told when it is read; one in a variable harms only the server that uses it."""
        self.check(written=True)

    def check(self, *, written: bool = False) -> None:
        """Raise ValueError, beginning with the key's name, for a value that can't be used.

        ``written``: only of what stands in the file itself, not of what came out of ``${}``.
        """

        def known(text: Text | None) -> str | None:
            return None if text is None or (written and isinstance(text, Secret)) else reveal(text)

        if (image := known(self.image)) is not None:
            _explain("image", parse_reference, image)
        for volume in self.volumes:
            if (text := known(volume)) is not None:
                _explain("volumes:", parse_mount, text)
        network, name, path = known(self.network), known(self.container_name), known(self.path)
        if network is not None and not _NETWORK.fullmatch(network):
            raise ValueError(f"network {network[:80]!r} is neither none, host nor the name of a network")
        if name is not None and not _CONTAINER.fullmatch(name):
            raise ValueError("container_name takes two or more letters, digits, _ . and -")
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError("port must be between 1 and 65535")
        if self.port is not None and network == "none":
            raise ValueError("port needs a network, and network is none")
        if path is not None and not re.fullmatch(r"/[\x21-\x22\x24-\x7e]*", path):
            raise ValueError("path must begin with / and hold neither spaces nor #")
        if (folder := known(self.working_dir)) is not None and not folder.startswith("/"):
            raise ValueError("working_dir must be an absolute path in the container")
        if self.user is not None and not _USER.fullmatch(str(self.user)):
            raise ValueError("user is a name or number, with :GROUP if need be")
        if self.platform is not None and not _PLATFORM.fullmatch(self.platform):
            raise ValueError("platform is written os/architecture, such as linux/amd64")
        for mount in self.tmpfs:
            if not mount.startswith("/") or mount.partition(":")[0].rstrip("/") == "":
                raise ValueError(f"tmpfs: {mount[:80]!r} must be an absolute path in the container, other than /")
        for capability in self.cap_add:
            if not _CAPABILITY.fullmatch(capability):
                raise ValueError(f"cap_add: {capability[:80]!r} is no capability, such as NET_RAW")
        for label, _ in self.labels:
            if label.startswith(LABEL) or not label:
                raise ValueError(f"labels: {label[:80]!r} is empty or one of the gateway's own")


def _explain(key: str, parse: Any, text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def limits_of(spec: DockerSpec) -> tuple[int, int, int]:
    """Billionths of a CPU, bytes of memory and processes that the container may use."""
    limits = spec.resources.limits
    return (
        CPU if limits.cpu is None else nano_cpus(limits.cpu),
        MEMORY if limits.memory is None else memory_bytes(limits.memory),
        limits.pids or PIDS,
    )
