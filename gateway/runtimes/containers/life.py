"""Running containers: making one (the image pulled if need be), attaching, starting, and removing it again.

A container has our labels from its creation on, so whatever happens to this process, a later gateway finds it and no
other's (robustness RB62). The streams are attached before the start, or the first lines are lost. However the block of
``open_container`` is left, the container is removed with its anonymous volumes: stdin closed, at most a second, its
stop signal, ``stop_grace``, then by force.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, Final

import trio

from gateway.config.model import reveal
from gateway.errors import StartFailed
from gateway.runtimes.base import Origin, Place, Surroundings
from gateway.runtimes.containers.container import SETTLE, Container
from gateway.runtimes.containers.engine import Engine, EngineGone, EngineRefused, find_engine, sockets_of
from gateway.runtimes.containers.images import pull
from gateway.runtimes.containers.plan import Plan, make_plan
from gateway.runtimes.containers.reference import parse_reference
from gateway.runtimes.containers.spec import LABEL, DockerSpec, limits_of

__all__ = ["open_container", "sweep"]

log = logging.getLogger("gateway_core")

CREATE_WAIT: Final = 30.0
"""Seconds for the engine to make a container. Nothing interrupts it: what is made must be known."""
REMOVE_WAIT: Final = 10.0
"""Seconds for a removal, with its retries. What is left then is for a later gateway."""
RETURN_WAIT: Final = 10.0
"""Seconds for which a start waits for an engine that was there before."""
SWEEP_WAIT: Final = 5.0
"""Seconds for which it waits for one of another gateway's, which may just be swept."""
NAME_WAIT: Final = 30.0
"""Seconds for which a start waits for a fixed name that another container of ours still has."""
EXIT_WAIT: Final = 0.5
"""Seconds after the removal for the engine to tell its end to whoever waits for that."""


async def _remove(engine: Engine, id: str, limit: float | None = None) -> None:
    """Remove a container, running or not, with its anonymous volumes. Raises StartFailed when that is not certain."""
    until = trio.current_time() + (REMOVE_WAIT if limit is None else limit)
    pause = 0.05
    while True:
        left = until - trio.current_time()
        try:
            await engine.ask("DELETE", f"/containers/{id}", query={"force": "1", "v": "1"}, limit=max(left, 0.5))
            return
        except EngineRefused as refused:
            # 409: somebody else is removing it. 500: something of it is busy for a moment.
            if refused.answer == 404:
                return
            if refused.answer not in (409, 500) or trio.current_time() + pause > until:
                raise
        await trio.sleep(pause)
        pause = min(2 * pause, 1.0)


# ------------------------------------------------------------------------------------------------------------- creating
async def _create(engine: Engine, spec: DockerSpec, plan: Plan, surroundings: Surroundings) -> str:
    """The id of a new container. Pulls the image if need be. Raises StartFailed."""
    progress = surroundings.progress
    reference = parse_reference(plan.image)
    fetch = partial(pull, engine, reference, spec.platform, surroundings.environ, progress)
    if spec.pull == "always":
        await fetch()
    pulled = spec.pull != "missing"
    until = trio.current_time() + NAME_WAIT
    while True:
        try:
            return await _ask_for(engine, spec, plan, surroundings)
        except EngineRefused as refused:
            reason = refused.reason.lower()
            if refused.answer == 404 and ("image" in reason or "platform" in reason or "manifest" in reason):
                if spec.pull == "never":
                    raise StartFailed(f"image {reference} is not on {engine.name}, and pull is never") from refused
                if pulled:
                    raise StartFailed(f"image {reference} can't be used: {refused.reason}") from refused
                pulled = True
                await fetch()
            elif refused.answer in (409, 500) and plan.fixed and "in use" in reason:
                await _free_name(engine, plan, surroundings, until)
            else:
                raise StartFailed(f"container can't be made: {refused.reason}") from refused


async def _ask_for(engine: Engine, spec: DockerSpec, plan: Plan, surroundings: Surroundings) -> str:
    """Create it. Not cancelled half-way: the engine would go on, and nobody would know of it."""
    query = {"name": plan.name, **({"platform": spec.platform} if spec.platform else {})}
    with trio.CancelScope(shield=True):
        try:
            answer = await engine.ask("POST", "/containers/create", query=query, body=plan.body, limit=CREATE_WAIT)
        except EngineGone:
            if not plan.fixed:
                _left.setdefault(engine.where, set()).add(plan.name)
            if surroundings.instance is not None:
                surroundings.instance.leaves()
            raise
    if not isinstance(answer, dict) or not isinstance(answer.get("Id"), str):
        raise StartFailed(f"{engine.name} does not say what container it has made")
    for warning in answer.get("Warnings") or ():
        log.info("Container of server '%s': %s", surroundings.server_id, plan.redact(str(warning)))
    found: str = answer["Id"]
    return found


async def _free_name(engine: Engine, plan: Plan, surroundings: Surroundings, until: float) -> None:
    """Make room for a fixed name: remove a dead gateway's container, wait for one of ours. Raises StartFailed."""
    query = {"all": "1", "filters": json.dumps({"name": [f"^/?{re.escape(plan.name)}$"]})}
    found = await engine.ask("GET", "/containers/json", query=query)
    instance = surroundings.instance
    for container in found or ():
        labels = container.get("Labels") or {}
        owner = labels.get(f"{LABEL}instance", "")
        if owner and instance is not None and owner != instance.id and instance.dead(owner):
            await _remove(engine, container["Id"])
            continue
        ours = owner and instance is not None and owner == instance.id
        if not owner or trio.current_time() > until - (0 if ours else NAME_WAIT - SWEEP_WAIT):
            whose = f"server '{labels.get(f'{LABEL}server')}' of " if owner else ""
            whose += "this gateway" if ours else "another gateway" if owner else "somebody else"
            raise StartFailed(
                f"container_name '{plan.name}' is taken by a container of {whose} ({container['Id'][:12]}); "
                "remove that, or leave container_name out"
            )
        surroundings.progress(f"waiting for the other container named '{plan.name}' to end")
        await trio.sleep(0.2)


def _url(plan: Plan, engine: Engine, found: Mapping[str, Any]) -> str:
    """Where the started container's server is. Raises StartFailed."""
    settings = found.get("NetworkSettings") or {}
    host = engine.address.host or "127.0.0.1"
    port: Any = plan.port
    if plan.network == "host":
        pass
    elif plan.network:
        networks = settings.get("Networks") or {}
        own: Mapping[str, Any] = networks.get(plan.network) or next(iter(networks.values()), {})
        host = own.get("IPAddress") or settings.get("IPAddress") or ""
        if not host:
            raise StartFailed(f"container has no address on network '{plan.network}'")
    else:
        bindings = (settings.get("Ports") or {}).get(f"{plan.port}/tcp") or ()
        port = next((each["HostPort"] for each in bindings if each.get("HostPort")), None)
        if port is None:
            raise StartFailed(f"port {plan.port} of the container was not published by {engine.name}")
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}{plan.path}"


# -------------------------------------------------------------------------------------------------------------- running
_seen: Final[set[str]] = set()
"""Engines that have worked for us: one that does not answer is likely to come back."""
_left: Final[dict[str, set[str]]] = {}
"""Containers, by id or name, that could not be removed from an engine: it may have been away."""


def _patience(where: str) -> float:
    return RETURN_WAIT if where in _seen else 0.0


async def _remove_left(engine: Engine) -> None:
    """Remove what an earlier stop could not. What resists stays for later."""
    ids = _left.get(engine.where, set())
    for id in list(ids):
        with suppress(StartFailed):
            await _remove(engine, id, 2.0)
            ids.discard(id)


@asynccontextmanager
async def open_container(type: str, spec: DockerSpec, surroundings: Surroundings) -> AsyncIterator[Place]:
    """Run a container while the block lasts.

    Raises StartFailed with a sentence that names what is wrong. Cancelled or not, the block is left within 1 s +
    ``stop_grace`` and what the engine takes, with the container removed; if that fails, it is told to
    ``surroundings.instance``. Holds a nursery: use it by ``async with`` only. Errors of the block come out as they are.
    """
    async with AsyncExitStack() as stack:
        with _redacting(surroundings.redact):
            try:
                spec.check()
            except ValueError as error:
                raise StartFailed(str(error)) from None
            host = "" if spec.host is None else reveal(spec.host)
            engine = await stack.enter_async_context(
                find_engine(type, host, surroundings.environ, waiting=_patience, progress=surroundings.progress)
            )
            _seen.add(engine.where)
            plan = await make_plan(spec, surroundings, engine, limits_of(spec), sockets_of(surroundings.environ))
            if surroundings.instance is not None:
                surroundings.instance.uses(type, engine.where)
            await _remove_left(engine)
        manager = trio.open_nursery()
        nursery = await manager.__aenter__()
        scope = trio.CancelScope(shield=True)  # what watches serves the stop as well
        container: Container | None = None
        try:
            with _redacting(plan.redact):
                container = Container(engine, await _create(engine, spec, plan, surroundings), plan, surroundings)
                place = await _begin(container, plan, engine, nursery, scope)
            yield place
        finally:
            with trio.CancelScope(shield=True):
                if container is not None:
                    await _end(container, engine, surroundings)
            scope.cancel()
            nursery.cancel_scope.cancel()
            # Not handed the block's error: it should come out as itself, not in the nursery's group.
            await manager.__aexit__(None, None, None)
            if container is not None:
                container.finish()


@contextmanager
def _redacting(redact: Callable[[str], str]) -> Iterator[None]:
    """What fails in the block is told without secrets."""
    try:
        yield
    except StartFailed as error:
        raise StartFailed(redact(error.message), retry_after=error.retry_after) from error


async def _begin(
    container: Container, plan: Plan, engine: Engine, nursery: trio.Nursery, scope: trio.CancelScope
) -> Place:
    """Attach to a created container, start it and watch it."""
    wanted = ("stdout", "stderr") if plan.port is not None else ("stdin", "stdout", "stderr")
    query = {"stream": "1", **dict.fromkeys(wanted, "1")}
    made: list[trio.Nursery] = []
    ready = trio.Event()

    async def attend() -> None:
        with scope:
            async with trio.open_nursery() as tasks:
                made.append(tasks)
                ready.set()
                await trio.sleep_forever()

    async def learn() -> None:
        with suppress(StartFailed):
            await container.learn()

    nursery.start_soon(attend)  # not start(): cancelled there, it would wait for what is shielded
    await ready.wait()
    (tasks,) = made
    container.take(await engine.hijack(f"/containers/{container.id}/attach", query, tasks))
    await container.start()
    for work in (container.watch, container.listen, learn if plan.port is None else container.drain):
        tasks.start_soon(work)
    if plan.port is None:
        return container
    found = await container.learn()
    try:
        url = _url(plan, engine, found)
    except StartFailed as error:
        with trio.move_on_after(SETTLE):
            raise StartFailed(await container.ended()) from error
        raise
    return Origin(
        url,
        allow_private=True,
        details={**container.details, "url": plan.redact(url)},
        starting=True,
        ended=container.ended,
        measure=container.measure,
        remark=container.remark,
    )


async def _end(container: Container, engine: Engine, surroundings: Surroundings) -> None:
    """Stop and remove it. What can't be removed is remembered."""
    async with trio.open_nursery() as nursery:
        if container.port is None:
            nursery.start_soon(container.drain)  # its link reads no more
        await container.stop(surroundings.stop_grace)
        try:
            await _remove(engine, container.id)
            with trio.move_on_after(EXIT_WAIT):
                await container.wait_exited()
        except StartFailed as error:
            _left.setdefault(engine.where, set()).add(container.id)
            if surroundings.instance is not None:
                surroundings.instance.leaves()
            text = "Container %s of server '%s' could not be removed: %s"
            log.warning(text, container.id[:12], surroundings.server_id, error.message)
        nursery.cancel_scope.cancel()


async def sweep(type: str, where: str, instance: str, environ: Mapping[str, str]) -> None:
    """Remove every container that the gateway of that instance id has made at an engine. See ``base.Runtime.sweep``."""
    async with find_engine(type, where, environ) as engine:
        query = {"all": "1", "filters": json.dumps({"label": [f"{LABEL}instance={instance}"]})}
        for container in await engine.ask("GET", "/containers/json", query=query) or ():
            log.info("Removing container %s, which a killed gateway has left", container["Id"][:12])
            await _remove(engine, container["Id"])
