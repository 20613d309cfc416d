"""A workload that the first request brings up and idleness takes down, for any number of gateways. Not a runtime.

What gateways know of each other stands on the workload itself, in annotations:

    users.open-mcp-gateway/ID    one for each gateway that uses it: when it last did, in seconds since 1970. Written
                                 again every REFRESH seconds; after EXPIRY without that the gateway counts as dead.
    open-mcp-gateway/scaled      what a gateway has set, {"to": 1, "back": 0}: our claim.

Three rules follow. Only what we have set is undone: when the replicas are others than those of the claim, somebody else
(a person, an autoscaler) has changed them, and the claim is dropped for good. Only the last user undoes it. And every
change is made under a Lease and with the version it was decided on, so that two gateways decide one after the other.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import attrs
import trio

from gateway.errors import StartFailed
from gateway.runtimes.kubernetes.api import Cluster, Refused, path_of

__all__ = ["Decision", "Scaler", "Target", "enter", "leave", "why_not_ready"]

log = logging.getLogger("gateway_core")

REFRESH: Final = 30.0
EXPIRY: Final = 180.0
"""Seconds; see the module. Gateways' clocks may differ by EXPIRY less REFRESH."""
LEASE_SECONDS: Final = 15
"""For which a gateway that has died in the middle of a change keeps the others from changing anything."""
CHANGE_LIMIT: Final = 10.0
"""Seconds for one change, from having the Lease to giving it back: less than it lasts."""
LEASE_POLL: Final = 0.3
LEAVE_LIMIT: Final = 20.0
"""Seconds for the last user's leaving, with the wait for the Lease."""
MAX_CONFLICTS: Final = 20

USER: Final = "users.open-mcp-gateway/"
CLAIM: Final = "open-mcp-gateway/scaled"
PLURALS: Final = {"Deployment": "deployments", "StatefulSet": "statefulsets"}

Object = dict[str, Any]


@attrs.frozen
class Target:
    """The workload, the replicas it has when idle (``least``) and in use (``most``), and the name of its Lease."""

    namespace: str
    kind: str
    name: str
    least: int
    most: int
    lease: str

    @property
    def path(self) -> str:
        """In the API."""
        return path_of(self.namespace, PLURALS[self.kind], self.name, group="apps/v1")

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"


# --------------------------------------------------------------------------------------------------------- decisions
@attrs.frozen
class Decision:
    """What to change of a workload: annotations (None removes one) and, if that is not None, its replicas.

    ``others`` are the living users besides us, with the times at which they will count as dead.
    """

    annotations: Mapping[str, str | None]
    replicas: int | None = None
    others: Mapping[str, float] = attrs.field(factory=dict)

    def body(self, version: str) -> Object:
        """A merge patch that is refused when the workload is not that version any more."""
        made: Object = {"metadata": {"annotations": dict(self.annotations)}}
        if version:
            made["metadata"]["resourceVersion"] = version
        if self.replicas is not None:
            made["spec"] = {"replicas": self.replicas}
        return made


def enter(workload: Object, target: Target, user: str, now: float) -> Decision:
    """Somebody begins to use it."""
    annotations: dict[str, str | None] = {USER + user: _stamp(now)}
    others, dead = _users(workload, user, now)
    annotations |= dict.fromkeys(dead)
    replicas, claim = _replicas(workload), _claim(workload)
    if replicas == 0 or (replicas <= target.least and target.least < target.most):
        most = max(1, target.most)
        annotations[CLAIM] = json.dumps({"to": most, "back": target.least})
        return Decision(annotations, most, others)
    if claim is not None and claim["to"] != replicas:
        annotations[CLAIM] = None
    return Decision(annotations, None, others)


def leave(workload: Object, user: str, now: float) -> Decision:
    """It is not used any more by this one. The claim says what was before, so a stranger's workload can be left too."""
    others, dead = _users(workload, user, now)
    annotations: dict[str, str | None] = {USER + each: None for each in dead}
    if USER + user in _annotations(workload):
        annotations[USER + user] = None
    if others:
        return Decision(annotations, None, others)
    claim = _claim(workload)
    if CLAIM in _annotations(workload):
        annotations[CLAIM] = None
    if claim is None or claim["to"] != _replicas(workload) or claim["back"] >= claim["to"]:
        return Decision(annotations)
    return Decision(annotations, claim["back"])


def _stamp(now: float) -> str:
    return str(int(now))


def _annotations(workload: Object) -> Mapping[str, str]:
    return (workload.get("metadata") or {}).get("annotations") or {}


def _replicas(workload: Object) -> int:
    found = (workload.get("spec") or {}).get("replicas")
    return found if isinstance(found, int) else 1


def _claim(workload: Object) -> dict[str, int] | None:
    try:
        found = json.loads(_annotations(workload).get(CLAIM, ""))
        return {"to": int(found["to"]), "back": int(found["back"])}
    except (ValueError, TypeError, LookupError):
        return None


def _users(workload: Object, user: str, now: float) -> tuple[dict[str, float], list[str]]:
    """The living ones besides this one, with the ends of their lives; and the dead."""
    others: dict[str, float] = {}
    dead = []
    for name, text in _annotations(workload).items():
        if name.startswith(USER) and name != USER + user:
            try:
                ends = float(text) + EXPIRY
            except ValueError:
                ends = 0.0
            if ends > now:
                others[name.removeprefix(USER)] = ends
            else:
                dead.append(name.removeprefix(USER))
    return others, dead


# ------------------------------------------------------------------------------------------------------------ why not
def why_not_ready(workload: Object, pods: list[Object]) -> str:
    """What keeps it from being ready, in Kubernetes' words; "" if nothing is said."""
    for condition in (workload.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message") or condition.get("reason"))[:500]
    for pod in pods:
        said = _why_pod(pod)
        if said:
            return f"pod {(pod.get('metadata') or {}).get('name')}: {said}"[:500]
    return ""


def _why_pod(pod: Object) -> str:
    status = pod.get("status") or {}
    if (pod.get("metadata") or {}).get("deletionTimestamp"):
        return ""
    for each in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = each.get("state") or {}
        found = state.get("waiting") or state.get("terminated") or {}
        if found.get("reason") and found["reason"] != "Completed":
            message = found.get("message") or ""
            last = ((each.get("lastState") or {}).get("terminated") or {}).get("reason")
            ended = f" (last ended: {last})" if last else ""
            return f"{found['reason']}{': ' + message if message else ''}{ended}"
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason')}: {condition.get('message')}"
    if status.get("reason"):
        return f"{status['reason']}: {status.get('message') or ''}".rstrip(": ")
    return "its readiness probe does not pass yet" if status.get("phase") == "Running" else ""


# -------------------------------------------------------------------------------------------------------------- lease
@asynccontextmanager
async def lease(cluster: Cluster, target: Target, user: str, waiting: Callable[[str], None]) -> AsyncIterator[None]:
    """Hold the workload's Lease. Waits for as long as another holds it and renews it, or has not been dead for long.

    Whether another is dead is told by our own clock: nothing about the Lease changes for as long as it lasts.
    """
    path = path_of(target.namespace, "leases", group="coordination.k8s.io/v1")
    held = await _take(cluster, path, target.lease, user, waiting)
    try:
        yield
    finally:
        # Given back, or else it ends by itself.
        held["spec"] |= {"holderIdentity": "", "renewTime": _micro_time()}
        with trio.move_on_after(3, shield=True):
            try:
                await cluster.replace(f"{path}/{target.lease}", held)
            except StartFailed as error:
                log.debug("The Lease %s could not be given back: %s", target.lease, error.message)


async def _take(cluster: Cluster, path: str, name: str, user: str, waiting: Callable[[str], None]) -> Object:
    seen: tuple[str, float] = ("", trio.current_time())
    while True:
        wanted = {
            "holderIdentity": user,
            "leaseDurationSeconds": LEASE_SECONDS,
            "acquireTime": _micro_time(),
            "renewTime": _micro_time(),
        }
        try:
            found = await cluster.get(f"{path}/{name}")
        except Refused as error:
            if error.http_status != 404:
                raise
            found = None
        try:
            if found is None:
                made = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
                return await cluster.create(path, {**made, "spec": wanted})
            version = str(found["metadata"]["resourceVersion"])
            if version != seen[0]:
                seen = version, trio.current_time()
            spec = found.get("spec") or {}
            holder = spec.get("holderIdentity") or ""
            lasts = float(spec.get("leaseDurationSeconds") or LEASE_SECONDS)
            if holder in ("", user) or trio.current_time() - seen[1] >= lasts:
                return await cluster.replace(f"{path}/{name}", {**found, "spec": {**spec, **wanted}})
            waiting(f"waiting for another gateway ({holder[:8]}) to finish scaling")
        except Refused as error:
            if error.http_status != 409:
                raise
            continue
        await trio.sleep(LEASE_POLL)


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ------------------------------------------------------------------------------------------------------------- scaler
class _Shared:
    """What the units of one gateway that use one workload have in common."""

    def __init__(self) -> None:
        self.users = 0
        self.lock = trio.Lock()
        self.beaten = -float("inf")
        self.watching: trio.CancelScope | None = None


_shared: trio.lowlevel.RunVar[dict[tuple[str, Target, str], _Shared]] = trio.lowlevel.RunVar("k8s_workloads")

Reopen = Callable[[], Any]


class Scaler:
    """One unit's use of a workload: ``enter``, ``beat`` for as long as it lasts, ``leave``.

    ``user`` is the gateway's id. Several units of a gateway are one user: the first enters, the last leaves.
    ``reopen`` gives a context manager of a cluster that does not end with the unit.
    """

    def __init__(self, cluster: Cluster, target: Target, user: str, reopen: Reopen) -> None:
        self.target = target
        self._cluster = cluster
        self._user = user
        self._reopen = reopen
        try:
            every = _shared.get()
        except LookupError:
            every = {}
            _shared.set(every)
        self._state = every.setdefault((cluster.access.server, target, user), _Shared())

    @property
    def where(self) -> str:
        """One line by which ``k8s_service.sweep`` finds the workload."""
        access = self._cluster.access
        return json.dumps(
            {"context": access.context, "kubeconfig": access.kubeconfig, "target": attrs.asdict(self.target)}
        )

    async def clear(self) -> None:
        """As ``leave``, of a user that is dead. Raises StartFailed."""
        await self._left(self._cluster)

    async def enter(self, progress: Callable[[str], None]) -> Object:
        """Say that we use it, and bring it up where it is down. Returns it. Raises StartFailed.

        Cancelled or not, it has to be left afterwards.
        """
        state = self._state
        state.users += 1
        if state.watching is not None:
            state.watching.cancel()
            state.watching = None

        def decide(workload: Object) -> Decision:
            made = enter(workload, self.target, self._user, time.time())
            if made.replicas is not None:
                progress(f"scaling {self.target} from {_replicas(workload)} to {made.replicas}")
            return made

        async with state.lock:
            workload, _ = await self._change(self._cluster, decide, progress)
            state.beaten = trio.current_time()
        return workload

    async def beat(self) -> None:
        """Say again and again that we use it, until cancelled. Failures are logged: before we count as dead, there is
        time for several."""
        state = self._state
        while True:
            await trio.sleep(max(0.0, state.beaten + REFRESH - trio.current_time()))
            if trio.current_time() < state.beaten + REFRESH:
                continue  # another unit has said it
            state.beaten = trio.current_time()
            try:
                body = Decision({USER + self._user: _stamp(time.time())}).body("")
                await self._cluster.patch(self.target.path, body)
            except StartFailed as error:
                log.warning("%s does not know that it is used: %s", self.target, error.message)

    async def leave(self) -> None:
        """We do not use it any more: it goes down if nobody does and nobody else has changed it. Raises StartFailed."""
        state = self._state
        async with state.lock:
            state.users -= 1
            if state.users:
                return
            others = await self._left(self._cluster)
        if others and state.watching is None:
            state.watching = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._watch, state.watching, max(others.values()))

    async def _left(self, cluster: Cluster) -> Mapping[str, float]:
        """Leave, and who is still there."""

        def decide(workload: Object) -> Decision:
            return leave(workload, self._user, time.time())

        try:
            workload, made = await self._change(cluster, decide, lambda text: None)
        except Refused as error:
            if error.http_status == 404:
                return {}  # it is gone itself
            raise
        if made.replicas is not None:
            log.info("%s is idle and goes back to %d replicas", self.target, _replicas(workload))
        return made.others

    async def _watch(self, scope: trio.CancelScope, ends: float) -> None:
        """Others use it still. If they should die without leaving it, somebody has to take it down: look again when
        they would count as dead, for as long as this gateway does not use it itself and anybody does."""
        state = self._state
        with scope:
            while True:
                await trio.sleep(max(1.0, ends - time.time() + 1))
                others: Mapping[str, float] = {}
                try:
                    async with state.lock, self._reopen() as cluster:
                        if not state.users:
                            others = await self._left(cluster)
                except StartFailed as error:
                    log.info("%s can't be looked after now: %s", self.target, error.message)
                    others = {"": time.time() + REFRESH}
                if not others:
                    break
                ends = max(others.values())
        if state.watching is scope:
            state.watching = None

    async def _change(
        self, cluster: Cluster, decide: Callable[[Object], Decision], waiting: Callable[[str], None]
    ) -> tuple[Object, Decision]:
        """Carry a decision out on the workload as it is then. Returns it, changed. Raises StartFailed."""
        async with lease(cluster, self.target, self._user, waiting):
            with trio.move_on_after(CHANGE_LIMIT):
                for _ in range(MAX_CONFLICTS):
                    workload = await cluster.get(self.target.path)
                    made = decide(workload)
                    if not made.annotations and made.replicas is None:
                        return workload, made
                    try:
                        body = made.body(str(workload["metadata"]["resourceVersion"]))
                        return await cluster.patch(self.target.path, body), made
                    except Refused as error:
                        if error.http_status != 409:
                            raise
        raise StartFailed(f"{self.target} could not be changed within {CHANGE_LIMIT:g} s: try again")
