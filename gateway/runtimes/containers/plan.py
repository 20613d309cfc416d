"""From an entry to what an engine is asked to make: checked, complete, and with nothing of the image's own wishes.

What an image's metadata may decide is only what the container's own program is and sees: its entry point and command,
environment, user and working folder, each under the key of the same name. It decides no mount of this machine, no
port, network, privilege, limit, name or health check, and none of our labels (row D6). Anonymous volumes, which an
image may ask for, are removed with the container.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import trio

from gateway.config.model import Redactor, Secret, reveal
from gateway.errors import StartFailed
from gateway.runtimes._quantities import memory_bytes, nano_cpus
from gateway.runtimes.base import Surroundings
from gateway.runtimes.containers.engine import Engine, EngineRefused
from gateway.runtimes.containers.mounts import Mount, device_of, parse_mount, refusal, resolved
from gateway.runtimes.containers.spec import LABEL, DockerSpec

__all__ = ["Plan", "container_body", "make_plan", "parse_env_file"]

MAX_ENV_FILE: Final = 1024 * 1024
SHORTEST_SECRET: Final = 8
"""Characters from which on a value in an env_file is hidden wherever it shows up."""


@attrs.frozen
class Plan:
    """One container to make. ``body`` is what the engine is asked; ``fixed`` says that the entry chose the name."""

    name: str
    fixed: bool
    image: str
    body: Mapping[str, Any]
    memory: int
    port: int | None
    publish_at: str
    path: str
    network: str
    redact: Callable[[str], str]


# ------------------------------------------------------------------------------------------------------------ env_file
def parse_env_file(data: bytes) -> dict[str, str]:
    """Names and values, as ``docker run --env-file`` reads them: NAME=VALUE, one a line, # for comments, no quotes.

    Raises ValueError with a sentence that fits behind the file's name; it never shows a value.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not written in UTF-8") from None
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").lstrip()
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator:
            raise ValueError(f"line {number}: there is no = in it; write NAME=VALUE")
        if not name or re.search(r"[\s\0]", name):
            raise ValueError(f"line {number}: what is before = is no name of a variable")
        if "\0" in value:
            raise ValueError(f"line {number}: the value holds a NUL character")
        found[name] = value
    return found


def _read_env_file(spec: DockerSpec, surroundings: Surroundings) -> dict[str, str]:
    if spec.env_file is None:
        return {}
    path = os.path.join(surroundings.catalog_dir, os.path.expanduser(reveal(spec.env_file)))
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_ENV_FILE + 1)
        if len(data) > MAX_ENV_FILE:
            raise ValueError(f"is over {MAX_ENV_FILE} bytes")
        return parse_env_file(data)
    except OSError as error:
        raise StartFailed(f"env_file {path!r} can't be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise StartFailed(f"env_file {path!r} {error}") from None


# -------------------------------------------------------------------------------------------------------------- mounts
def _check_path(mount: Mount, surroundings: Surroundings, engine: Engine, sockets: Sequence[str]) -> str:
    """The real path of a mount. Blocking: looks at the disk. Raises StartFailed when it must not be mounted."""
    try:
        path = resolved(mount.source, surroundings.catalog_dir, surroundings.environ.get("HOME", ""))
    except ValueError as error:
        raise StartFailed(f"volumes: {error}") from None
    known = [*sockets, *filter(None, [engine.address.path])]
    reason = refusal(path, surroundings.allowed_paths, known, surroundings.environ)
    if reason:
        shown = mount.source if path == mount.source else f"{mount.source} ({path})"
        hint = "" if surroundings.allowed_paths is not None else "; docker.allowed_paths in the config can allow it"
        raise StartFailed(f"volumes: {shown} must not be mounted: {reason}{hint}")
    if engine.address.local and not os.path.lexists(path):
        raise StartFailed(f"volumes: {path} does not exist")
    return path


async def _check_volume(mount: Mount, surroundings: Surroundings, engine: Engine, sockets: Sequence[str]) -> str:
    """The name of a volume that is plain storage, or leads where a mount may."""
    try:
        found = await engine.ask("GET", f"/volumes/{mount.source}")
    except EngineRefused as refused:
        if refused.answer == 404:
            return mount.source  # it will be made, as plain storage
        raise
    device = device_of(found if isinstance(found, dict) else {})
    if device is None:
        raise StartFailed(f"volumes: volume '{mount.source}' has a driver or options that may mean any place")
    if device:
        try:
            place = resolved(device, surroundings.catalog_dir, "")
        except ValueError as error:
            raise StartFailed(f"volumes: volume '{mount.source}': {error}") from None
        reason = refusal(place, surroundings.allowed_paths, sockets, surroundings.environ)
        if reason:
            raise StartFailed(f"volumes: volume '{mount.source}' is {device}, which must not be mounted: {reason}")
    return mount.source


async def _binds(spec: DockerSpec, surroundings: Surroundings, engine: Engine, sockets: Sequence[str]) -> list[str]:
    found = []
    for volume in spec.volumes:
        mount = parse_mount(reveal(volume))
        if mount.named:
            source = await _check_volume(mount, surroundings, engine, sockets)
        else:
            source = await trio.to_thread.run_sync(
                _check_path, mount, surroundings, engine, sockets, abandon_on_cancel=True
            )
        options = ",".join(filter(None, ("ro" if mount.read_only else "rw", mount.options)))
        if ":" in source:
            raise StartFailed(f"volumes: {source} holds a colon, which no engine can mount")
        found.append(f"{source}:{mount.target}:{options}")
    return found


# ---------------------------------------------------------------------------------------------------------------- body
def container_body(
    spec: DockerSpec,
    env: Mapping[str, str],
    binds: Sequence[str],
    labels: Mapping[str, str],
    limits: tuple[int, int, int],
    publish_at: str,
) -> dict[str, Any]:
    """What ``POST /containers/create`` is told. Pure. ``publish_at`` is the engine's address for a published port."""
    cpu, memory, pids = limits
    pipe = spec.port is None
    requests = spec.resources.requests
    host: dict[str, Any] = {
        "Binds": list(binds),
        "CapDrop": ["ALL"],
        "CapAdd": list(spec.cap_add),
        "SecurityOpt": ["no-new-privileges"],
        "Init": spec.init,
        "ReadonlyRootfs": spec.read_only,
        "Tmpfs": {path: options for path, _, options in (each.partition(":") for each in spec.tmpfs)},
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": cpu,
        "PidsLimit": pids,
        "RestartPolicy": {"Name": "no"},
        # What it says comes to us; a copy on the engine's disk would hold secrets and grow for ever.
        "LogConfig": {"Type": "none"},
    }
    if requests.memory is not None:
        host["MemoryReservation"] = memory_bytes(requests.memory)
    if requests.cpu is not None:
        host["CpuShares"] = max(2, nano_cpus(requests.cpu) * 1024 // 1_000_000_000)
    body: dict[str, Any] = {
        "Image": reveal(spec.image),
        "Env": [f"{name}={value}" for name, value in env.items()],
        "Labels": dict(labels),
        "Tty": False,
        "OpenStdin": pipe,
        "StdinOnce": pipe,
        "AttachStdin": pipe,
        "AttachStdout": True,
        "AttachStderr": True,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }
    if spec.network is not None:
        host["NetworkMode"] = reveal(spec.network)
    elif spec.port is not None:
        body["ExposedPorts"] = {f"{spec.port}/tcp": {}}
        host["PortBindings"] = {f"{spec.port}/tcp": [{"HostIp": publish_at, "HostPort": ""}]}
    command = ([] if spec.command is None else [reveal(spec.command)]) + [reveal(each) for each in spec.args]
    if command:
        body["Cmd"] = command
    if spec.entrypoint is not None:
        body["Entrypoint"] = [reveal(spec.entrypoint)]
    if spec.user is not None:
        body["User"] = str(spec.user)
    if spec.working_dir is not None:
        body["WorkingDir"] = reveal(spec.working_dir)
    return body


async def make_plan(
    spec: DockerSpec,
    surroundings: Surroundings,
    engine: Engine,
    limits: tuple[int, int, int],
    sockets: Sequence[str],
) -> Plan:
    """Look at everything that the container depends on. Raises StartFailed that names the key."""
    file = await trio.to_thread.run_sync(_read_env_file, spec, surroundings, abandon_on_cancel=True)
    env = {**file, **spec.env.revealed(), **surroundings.env}
    for name, value in env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise StartFailed(f"environment variable {name!r} can't be passed on: bad name, or a NUL character")
    hidden = [Secret(f"${{{name}}}", value) for name, value in file.items() if len(value) >= SHORTEST_SECRET]
    redactor = Redactor(hidden)

    def redact(text: str) -> str:
        return redactor.redact(surroundings.redact(text))

    instance = surroundings.instance
    labels = {
        **spec.labels.revealed(),
        f"{LABEL}instance": "" if instance is None else instance.id,
        f"{LABEL}server": surroundings.server_id,
    }
    if spec.container_name is None:
        tidy = re.sub(r"[^A-Za-z0-9_.-]+", "-", surroundings.server_id)[:60].strip("-.") or "server"
        name = f"mcp-{tidy}-{secrets.token_hex(4)}"
    else:
        name = reveal(spec.container_name)
    publish_at = "127.0.0.1"
    if spec.port is not None and not engine.address.local:
        publish_at = await _address_of(engine)
    binds = await _binds(spec, surroundings, engine, sockets)
    return Plan(
        name=name,
        fixed=spec.container_name is not None,
        image=reveal(spec.image),
        body=container_body(spec, env, binds, labels, limits, publish_at),
        memory=limits[1],
        port=spec.port,
        publish_at=publish_at,
        path=reveal(spec.path),
        network="" if spec.network is None else reveal(spec.network),
        redact=redact,
    )


async def _address_of(engine: Engine) -> str:
    """A remote engine's own address: a published port must be reachable from here, and need not be from elsewhere."""
    try:
        found = await trio.socket.getaddrinfo(engine.address.host, engine.address.port)
    except OSError as error:
        raise StartFailed(f"{engine.name} has a name that can't be resolved: {error.strerror}") from error
    return str(found[0][4][0])
