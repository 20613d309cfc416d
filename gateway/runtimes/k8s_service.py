"""Servers behind Kubernetes Services, which speak Streamable HTTP (compat K27); scaled from zero and back if wanted.

Inside the cluster the pods are reached at their addresses, from outside through the API (``kubernetes.routes``). Which
pods there are is watched (``kubernetes.endpoints``); the workload behind them is scaled as ``kubernetes.scale`` says.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

import attrs
import trio

from gateway.config.model import Secret, StringMap, Text, reveal
from gateway.errors import StartFailed
from gateway.runtimes.base import Origin, Runtime, Surroundings
from gateway.runtimes.remote_sse import check_headers

if TYPE_CHECKING:
    from gateway.runtimes.kubernetes.api import Cluster
    from gateway.runtimes.kubernetes.endpoints import Endpoints
    from gateway.runtimes.kubernetes.routes import Load
    from gateway.runtimes.kubernetes.scale import Scaler, Target

__all__ = ["RUNTIME", "K8sServiceSpec", "Scale", "lease_name", "open_service"]

log = logging.getLogger("gateway_core")

_NO_STRINGS: Final = StringMap()

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_PORT_NAME: Final = re.compile(r"(?=.{1,63}$)[a-z0-9]+(-[a-z0-9]+)*")
_PATH: Final = re.compile(r"/[!-\"$-~]*")

LOOK_AGAIN: Final = 1.0
"""Seconds between two looks at what a workload waits for."""
ALL_GONE: Final = 30.0
"""Seconds without any pod after which those who still wait for an answer are told that none will come."""


@attrs.frozen
class Scale:
    """The workload behind the Service, brought to ``max`` replicas by the first call and back to ``min`` when idle."""

    kind: Literal["Deployment", "StatefulSet"]
    name: str
    min: int = 0
    max: int = 1

    def __attrs_post_init__(self) -> None:
        if not _SUBDOMAIN.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} is no name of a {self.kind}")
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError("min must be at least 0, max at least 1 and not below min")


def lease_name(scale: Scale) -> str:
    """The Lease that all gateways take before they change this workload's replicas."""
    return f"open-mcp-gateway-{scale.kind.lower()}-{scale.name}"


@attrs.frozen
class K8sServiceSpec:
    """A Service whose pods speak Streamable HTTP. ``port`` is a number or a port's name; ``context`` as for jobs."""

    namespace: str
    service_name: str = attrs.field(metadata={"aliases": ("service",)})
    port: int | str
    path: Text = "/mcp"
    scheme: Literal["http", "https"] = "http"
    headers: StringMap = _NO_STRINGS
    scale: Scale | None = None
    context: str | None = None

    def __attrs_post_init__(self) -> None:
        if not _LABEL.fullmatch(self.namespace):
            raise ValueError(f"namespace: {self.namespace!r} is no name of a namespace")
        if not _LABEL.fullmatch(self.service_name):
            raise ValueError(f"service_name: {self.service_name!r} is no name of a Service")
        if not (0 < self.port < 65536 if isinstance(self.port, int) else _PORT_NAME.fullmatch(self.port)):
            raise ValueError("port must be between 1 and 65535, or a port's name")
        if isinstance(self.path, str):
            check_path(self.path)
        if not any(isinstance(value, Secret) for _, value in self.headers):
            check_headers(self.headers)


def check_path(path: str) -> None:
    """Raise ValueError unless requests can go there. Never shows it."""
    if not _PATH.fullmatch(path):
        raise ValueError("path must begin with / and hold no space, no # and nothing outside ASCII")


@asynccontextmanager
async def open_service(spec: K8sServiceSpec, surroundings: Surroundings) -> AsyncIterator[Origin]:
    """Bring its workload up if it is to be scaled, wait until a pod is ready, and yield the Origin.

    Raises StartFailed: no cluster, no such Service or port, no rights, no pods. Leaving the block takes the workload
    down if that is ours to do and nobody else uses it.
    """
    from gateway.runtimes.kubernetes.api import open_cluster, path_of
    from gateway.runtimes.kubernetes.endpoints import Endpoints, port_of
    from gateway.runtimes.kubernetes.routes import Load, choose_route

    try:
        headers = check_headers(spec.headers)
        path = reveal(spec.path)
        check_path(path)
    except ValueError as error:
        raise StartFailed(str(error)) from None
    shown = f"Service '{spec.service_name}' in namespace '{spec.namespace}'"
    with _plain():
        async with open_cluster(spec.context, surroundings.environ) as cluster:
            service = await cluster.get(path_of(spec.namespace, "services", spec.service_name))
            name, number = port_of(service, spec.port, shown)
            port = name or str(number)
            route = await choose_route(cluster, spec.namespace, spec.service_name, port, spec.scheme, headers)
            endpoints = Endpoints(cluster, spec.namespace, spec.service_name, name)
            load = Load()
            url = f"{spec.scheme}://{spec.service_name}.{spec.namespace}.svc:{number}{path}"
            scaler = None if spec.scale is None else _scaler(spec, spec.scale, cluster, surroundings)
            origin = Origin(
                url,
                headers,
                transport=lambda: _balanced(route, endpoints, url, load, shown),
                allow_private=True,
                details=_Details(cluster, route.via, endpoints, scaler, url, written=spec.path == path),
                starting=scaler is not None,
                ended=partial(_all_gone, endpoints, load, shown),
                remark=partial(_remark, endpoints),
            )
            strays = "" if route.exact else f"{shown}, reached by the {route.via}"
            async with _watched(endpoints, load, strays), _used(scaler, surroundings):
                await _until_ready(endpoints, scaler, cluster, surroundings.progress, shown)
                async with _beating(scaler):
                    yield origin


@contextmanager
def _plain() -> Iterator[None]:
    """Take what is raised inside out of the groups that nurseries put around it, where it is one thing."""
    sole: BaseException | None = None
    try:
        yield
    except BaseExceptionGroup as group:
        sole = group
        while isinstance(sole, BaseExceptionGroup):
            if len(sole.exceptions) != 1:
                raise
            sole = sole.exceptions[0]
    if sole is not None:
        raise sole


def _balanced(*args: Any) -> Any:
    from gateway.runtimes.kubernetes.routes import Balanced

    return Balanced(*args)


class _Details(Mapping[str, Any]):
    """What people are shown of a Service: how it is reached, and which pods there are just now."""

    def __init__(
        self, cluster: Cluster, via: str, endpoints: Endpoints, scaler: Scaler | None, url: str, *, written: bool
    ) -> None:
        self._endpoints = endpoints
        self._fixed: dict[str, Any] = {"cluster": str(cluster.access), "via": via, "pods": []}
        if scaler is not None:
            self._fixed["scales"] = str(scaler.target)
        if not written:
            self._fixed["url"] = url.partition("://")[2].partition("/")[0]  # a path out of ${} may be a secret

    def __getitem__(self, key: str) -> Any:
        return self._endpoints.shown if key == "pods" else self._fixed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fixed)

    def __len__(self) -> int:
        return len(self._fixed)


# ------------------------------------------------------------------------------------------------------------- pods
@asynccontextmanager
async def _watched(endpoints: Endpoints, load: Load, strays: str) -> AsyncIterator[None]:
    """Follow which pods there are. Raises StartFailed when the cluster does not say so in the first place.

    ``strays`` is not "" where requests do not go to the pod that is chosen for them: said once there are several.
    """
    async with trio.open_nursery() as nursery:

        async def tidy() -> None:
            warned = not strays
            while True:
                if not warned and len(endpoints.all) > 1:
                    warned = True
                    log.warning(
                        "%s, has several pods: sessions of servers that keep any (MCP before 2026-07-28) do not stay "
                        "at one that way; give the gateway the right to get pods/portforward",
                        strays,
                    )
                await endpoints.changed.wait()
                load.keep(endpoints.all)

        await nursery.start(endpoints.run)
        nursery.start_soon(tidy)
        yield
        nursery.cancel_scope.cancel()


async def _until_ready(
    endpoints: Endpoints, scaler: Scaler | None, cluster: Cluster, progress: Callable[[str], None], shown: str
) -> None:
    """Return when a pod is ready. Waits for as long as any is on its way; raises StartFailed where none is."""
    said = ""
    while not endpoints.ready:
        count = len(endpoints.all)
        if scaler is not None:
            said = await _state_of(cluster, scaler.target, count)
        elif not count:
            raise StartFailed(f"{shown} has no pods: is its workload scaled to zero, does its selector match?")
        else:
            said = f"waiting for {shown}: none of its {count} pods is ready"
        progress(said)
        with trio.move_on_after(LOOK_AGAIN):
            await endpoints.changed.wait()


async def _state_of(cluster: Cluster, target: Target, listed: int) -> str:
    """What a workload waits for."""
    from gateway.runtimes.kubernetes.api import path_of
    from gateway.runtimes.kubernetes.scale import why_not_ready

    try:
        workload = await cluster.get(target.path)
        spec, status = workload.get("spec") or {}, workload.get("status") or {}
        selector = (spec.get("selector") or {}).get("matchLabels") or {}
        params = {"labelSelector": ",".join(f"{name}={value}" for name, value in selector.items())}
        pods, _ = await cluster.list_all(path_of(target.namespace, "pods"), params) if selector else ([], "")
    except StartFailed as error:
        return f"waiting for {target}: {error.message}"
    ready = status.get("readyReplicas") or 0
    text = f"waiting for {target}: {ready} of {spec.get('replicas', 1)} pods ready"
    why = why_not_ready(workload, pods)
    if not why and ready and not listed:
        why = "but the Service has none of them: does its selector match?"
    return f"{text}; {why}" if why else text


async def _all_gone(endpoints: Endpoints, load: Load, shown: str) -> str:
    """Return when there is no pod any more and nobody waits for one's answer: why that is the end."""
    while True:
        while endpoints.all:
            await endpoints.changed.wait()
        changed = endpoints.changed
        # A pod that is being deleted has left the list, but may still answer what it was asked.
        with trio.move_on_after(ALL_GONE) as waited:
            while load.total and not changed.is_set():
                with trio.move_on_after(LOOK_AGAIN):
                    await changed.wait()
        if not endpoints.all and (waited.cancelled_caught or not load.total):
            return f"{shown} has no pods any more"


def _remark(endpoints: Endpoints) -> str:
    if endpoints.ready:
        return ""
    return f"none of {len(endpoints.all)} pods is ready" if endpoints.all else "there are no pods"


# ---------------------------------------------------------------------------------------------------------- scaling
def _target(spec: K8sServiceSpec, scale: Scale) -> Target:
    from gateway.runtimes.kubernetes.scale import Target

    return Target(spec.namespace, scale.kind, scale.name, scale.min, scale.max, lease_name(scale))


def _scaler(spec: K8sServiceSpec, scale: Scale, cluster: Cluster, surroundings: Surroundings) -> Scaler:
    from gateway.runtimes.kubernetes.api import on_cluster
    from gateway.runtimes.kubernetes.scale import Scaler

    user = surroundings.instance.id if surroundings.instance is not None else uuid4().hex
    again = partial(on_cluster, cluster.access, surroundings.environ)
    return Scaler(cluster, _target(spec, scale), user, again)


@asynccontextmanager
async def _used(scaler: Scaler | None, surroundings: Surroundings) -> AsyncIterator[None]:
    """Use the workload for as long as the block lasts: it is up at its beginning, and down after the last of them."""
    if scaler is None:
        yield
        return
    from gateway.runtimes.kubernetes.scale import LEAVE_LIMIT

    instance = surroundings.instance
    if instance is not None:
        instance.uses("k8s-service", scaler.where)
    try:
        await scaler.enter(surroundings.progress)
        yield
    finally:
        left = False
        with trio.move_on_after(LEAVE_LIMIT, shield=True):
            try:
                await scaler.leave()
                left = True
            except StartFailed as error:
                log.warning("%s stays as it is: %s", scaler.target, error.message)
        if not left and instance is not None:
            instance.leaves()


@asynccontextmanager
async def _beating(scaler: Scaler | None) -> AsyncIterator[None]:
    if scaler is None:
        yield
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scaler.beat)
        yield
        nursery.cancel_scope.cancel()


async def sweep(where: str, instance: str, environ: Mapping[str, str]) -> None:
    """Take a dead gateway off the workload that ``where`` names, which goes down if that was the last one (RB62)."""
    from gateway.runtimes.kubernetes.api import open_cluster
    from gateway.runtimes.kubernetes.scale import Scaler, Target

    try:
        left = json.loads(where)
        target = Target(**left["target"])
        context, kubeconfig = left["context"] or None, str(left["kubeconfig"])
    except (ValueError, TypeError, LookupError):
        raise StartFailed(f"what a gateway has written down about a Service can't be read: {where[:200]}") from None
    if kubeconfig:
        environ = {**environ, "KUBECONFIG": kubeconfig}
    async with open_cluster(context, environ) as cluster:
        await Scaler(cluster, target, instance, partial(open_cluster, context, environ)).clear()


RUNTIME: Final = Runtime(
    "k8s-service",
    K8sServiceSpec,
    open_service,
    sweep=sweep,
    modules=("gateway.runtimes.kubernetes.routes", "gateway.runtimes.kubernetes.scale"),
    origin=lambda spec: True,
)
