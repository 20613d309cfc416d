"""Which pods stand behind a Service, kept up to date. Not a runtime.

EndpointSlices are watched where the cluster has them (1.21), else the Endpoints object of the Service's name. A pod
that is being deleted is none of them any more, though it may still finish what it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
import trio

from gateway.errors import StartFailed
from gateway.runtimes.kubernetes.api import Cluster, Kind, Refused, path_of

__all__ = ["Endpoint", "Endpoints", "in_endpoints", "in_slice", "port_of"]

Object = Mapping[str, Any]

SLICES: Final = "discovery.k8s.io/v1"
MAX_SHOWN: Final = 10
"""Pods that people are shown by name."""


@attrs.frozen
class Endpoint:
    """One pod's port. ``pod`` and ``uid`` are "" where somebody has written the address by hand."""

    address: str
    port: int
    pod: str = ""
    uid: str = ""
    ready: bool = attrs.field(default=True, eq=False)

    @property
    def shown(self) -> str:
        """For people."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.pod} ({host}:{self.port})" if self.pod else f"{host}:{self.port}"


def port_of(service: Object, wanted: int | str, shown: str) -> tuple[str, int]:
    """Name ("" for an unnamed one) and number of the Service's port. Raises StartFailed, naming those there are."""
    spec = service.get("spec") or {}
    if spec.get("type") == "ExternalName":
        raise StartFailed(
            f"{shown} is an ExternalName for {spec.get('externalName')!r}: use type remote-sse with that one's URL"
        )
    ports = spec.get("ports") or []
    for each in ports:
        if wanted in (each.get("name") or None, each.get("port")):
            return each.get("name") or "", int(each["port"])
    known = ", ".join(f"{each.get('port')}{' (' + each['name'] + ')' if each.get('name') else ''}" for each in ports)
    raise StartFailed(f"{shown} has no port {wanted}; it has {known or 'none'}")


def in_endpoints(found: Object, name: str) -> list[Endpoint]:
    """Those of an Endpoints object, for the port of that name."""
    made = []
    for subset in found.get("subsets") or []:
        for port in subset.get("ports") or []:
            if (port.get("name") or "") != name:
                continue
            for key, ready in (("addresses", True), ("notReadyAddresses", False)):
                for each in subset.get(key) or []:
                    made.append(_endpoint(each["ip"], port["port"], each.get("targetRef"), ready))
    return made


def in_slice(found: Object, name: str) -> list[Endpoint]:
    """Those of an EndpointSlice. A name instead of an address is of no use to us."""
    if found.get("addressType") not in ("IPv4", "IPv6"):
        return []
    made = []
    for port in found.get("ports") or []:
        if (port.get("name") or "") != name or not port.get("port"):
            continue
        for each in found.get("endpoints") or []:
            conditions = each.get("conditions") or {}
            if each.get("addresses") and not conditions.get("terminating"):
                # Nothing said means ready (EndpointConditions).
                ready = conditions.get("ready") is not False
                made.append(_endpoint(each["addresses"][0], port["port"], each.get("targetRef"), ready))
    return made


def _endpoint(address: str, port: int, target: Object | None, ready: bool) -> Endpoint:
    if not target or target.get("kind") != "Pod":
        return Endpoint(str(address), int(port), ready=ready)
    return Endpoint(str(address), int(port), str(target.get("name") or ""), str(target.get("uid") or ""), ready)


class Endpoints:
    """The pods behind one Service's port, as the cluster last said.

    ``all`` holds ready ones and others; ``changed`` is set, and another put in its place, when it changes. ``trouble``
    is why the cluster can't be asked just now; what it said before then stays, and works as long as the pods do.
    """

    def __init__(self, cluster: Cluster, namespace: str, service: str, port_name: str) -> None:
        self.all: tuple[Endpoint, ...] = ()
        self.changed = trio.Event()
        self.trouble = ""
        self._cluster = cluster
        self._namespace = namespace
        self._service = service
        self._port = port_name
        self._objects: dict[str, list[Endpoint]] = {}
        self._slices = True
        self._synced = False

    def __repr__(self) -> str:
        return f"<Endpoints {self._namespace}/{self._service} {len(self.ready)} of {len(self.all)} ready>"

    @property
    def ready(self) -> list[Endpoint]:
        """Those that want requests."""
        return [each for each in self.all if each.ready]

    @property
    def shown(self) -> list[str]:
        """For people, not all of many."""
        names = [each.shown + ("" if each.ready else ", not ready") for each in self.all]
        return [*names[:MAX_SHOWN], f"and {len(names) - MAX_SHOWN} more"] if len(names) > MAX_SHOWN else names

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled; started when the cluster has said once what there is. Raises StartFailed before."""
        path, params = await self._place()
        async with trio.open_nursery() as nursery:

            def on_event(kind: Kind, found: dict[str, Any]) -> None:
                self._take(kind, found)
                if kind == "SYNCED" and not self._synced:
                    self._synced = True
                    task_status.started()

            def on_trouble(text: str) -> None:
                self.trouble = text

            nursery.start_soon(lambda: self._cluster.watch(path, on_event, params, on_trouble=on_trouble))

    async def _place(self) -> tuple[str, dict[str, str]]:
        """What to watch: asked once, so that missing rights are told and no watch tries for ever."""
        slices = path_of(self._namespace, "endpointslices", group=SLICES)
        params = {"labelSelector": f"kubernetes.io/service-name={self._service}"}
        try:
            await self._cluster.get(slices, {**params, "limit": 1})
            return slices, params
        except Refused as error:
            if error.http_status not in (403, 404):
                raise
        self._slices = False
        endpoints = path_of(self._namespace, "endpoints")
        params = {"fieldSelector": f"metadata.name={self._service}"}
        await self._cluster.get(endpoints, {**params, "limit": 1})
        return endpoints, params

    def _take(self, kind: Kind, found: dict[str, Any]) -> None:
        if kind != "SYNCED":
            name = str((found.get("metadata") or {}).get("name"))
            if kind == "DELETED":
                self._objects.pop(name, None)
            else:
                self._objects[name] = (in_slice if self._slices else in_endpoints)(found, self._port)
            if not self._synced:
                return
        # Of one that two slices name (one being filled up from the other), the ready one counts.
        every: dict[Endpoint, Endpoint] = {}
        for endpoints in self._objects.values():
            for each in endpoints:
                if each.ready or each not in every:
                    every[each] = each
        now = tuple(sorted(every.values(), key=lambda each: (each.pod, each.address, each.port)))
        if [(e, e.ready) for e in now] != [(e, e.ready) for e in self.all]:
            self.all = now
            changed, self.changed = self.changed, trio.Event()
            changed.set()
