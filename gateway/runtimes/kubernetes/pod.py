"""A server in the pod of a Job of its own: made, awaited, attached, watched and removed.

The container's stdin, stdout and stderr come over one WebSocket (``attach``), each with a channel byte before its
frames. Whether the server lives, and why not, is the pod's status, which a watch follows: attach ends with "Success"
whatever the exit code was, and breaks without the server having ended.

However the block is left, the Job is deleted, by its uid, and the pod awaited: it is over when Kubernetes says that the
container has ended or that the pod is gone. What can't be confirmed within the stop's bounds is left to the next start
in this namespace and to the next gateway's sweep.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import Any, Final

import attrs
import trio

from gateway.errors import LinkLost, StartFailed
from gateway.runtimes._quantities import scaled
from gateway.runtimes.base import Surroundings
from gateway.runtimes.kubernetes.api import Cluster, Kind, Object, Params, Refused, Unreachable, open_cluster, path_of
from gateway.runtimes.kubernetes.job_spec import K8sJobSpec
from gateway.runtimes.kubernetes.look import Look, condition, container_status, look
from gateway.runtimes.kubernetes.manifest import (
    CONTAINER,
    INSTANCE,
    JOB,
    MANAGED_BY,
    MANAGER,
    Identity,
    build,
    job_name,
)
from gateway.runtimes.kubernetes.websocket import BINARY, CLOSE, CONTINUATION, Broken, Socket
from gateway.runtimes.local_process import StderrLines

__all__ = ["Channels", "JobPod", "open_pod", "sweep"]

BATCH: Final = "batch/v1"
V5: Final = "v5.channel.k8s.io"
PROTOCOLS: Final = (V5, "v4.channel.k8s.io")
"""In the order we like them. Only v5 can close stdin alone."""

PIECE: Final = 32 * 1024
"""Bytes of stdin in a frame: what a node's runtime copies at a time."""
CLOSE_WAIT: Final = 0.8
"""Seconds between the end of stdin and the deletion (RB13)."""
DELETE_LIMIT: Final = 5.0
"""Seconds for Kubernetes to accept a deletion, and to end what did not heed its grace."""
FORCE_LIMIT: Final = 2.0
STATUS_WAIT: Final = 4.0
"""Seconds for the pod's status after the end of its output: the kubelet looks once a second, and then reports."""
LOST_WAIT: Final = 0.5
"""The same where the connection broke: the server may well live."""
DRAIN: Final = 2.0
"""Seconds for the last output to arrive after Kubernetes knows that the container has ended."""
EVENTS_EVERY: Final = 1.0
"""Seconds between two looks at the events of what does not run yet."""
REFUSAL_WAIT: Final = 3.0
"""Seconds that a Job may be without a pod because of the same refusal."""
SECRET_WAIT: Final = 15.0
"""Seconds for the kubelet to see a Secret that was made just after its Job."""
MAX_NAMES: Final = 3
SWEEP_LIMIT: Final = 20.0


# ------------------------------------------------------------------------------------------------------------ channels
class Channels:
    """Kubernetes' channels over a WebSocket (``v4`` and ``v5.channel.k8s.io``): a byte before each message. No I/O."""

    STDIN: Final = b"\0"
    CLOSE_STDIN: Final = b"\xff\0"
    """A whole message of v5: channel 255, and the channel that is closed."""
    STDOUT: Final = 1
    STDERR: Final = 2
    STATUS: Final = 3

    def __init__(self) -> None:
        self._channel = -1

    def take(self, opcode: int, payload: bytes) -> tuple[int, bytes]:
        """The channel of a data frame and what it carries; an empty one is for nobody (-1)."""
        if opcode == CONTINUATION:
            return self._channel, payload
        self._channel = payload[0] if payload else -1
        return self._channel, payload[1:]


# ---------------------------------------------------------------------------------------------------------------- pipe
class JobPod:
    """A server in a pod as a ``base.Pipe``. Made by ``open_pod``, which alone stops it.

    One task at a time may be in ``receive_some`` and one in ``wait_writable``. Whoever reads stdout drains stderr.
    """

    def __init__(self, job: _Job, socket: Socket) -> None:
        self._job = job
        self._socket = socket
        self._channels = Channels()
        self._status: Object | None = None
        self._lines = StderrLines(job.surroundings.log, job.surroundings.redact)
        self._finished = False
        self._exited = trio.Event()
        self._half_closed = False

    def __repr__(self) -> str:
        return f"<JobPod {self._job.name} {self._job.look.ended or self._socket!r}>"

    @property
    def details(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: job, pod, node, namespace, context, image_id."""
        job, pod = self._job, self._job.pod or {}
        status = pod.get("status") or {}
        found = {
            "job": job.name,
            "pod": job.pod_name,
            "node": (pod.get("spec") or {}).get("nodeName"),
            "namespace": job.spec.namespace,
            "context": job.cluster.access.context or "in-cluster",
            "image_id": container_status(status).get("imageID"),
        }
        return {name: value for name, value in found.items() if value}

    async def measure(self) -> Mapping[str, Any]:
        """See ``base.Pipe``: memory and CPU where the cluster has metrics.k8s.io."""
        return await self._job.usage()

    def remark(self) -> str:
        """See ``base.Pipe``."""
        job = self._job
        if job.trouble:
            return f"the pod's state is not known: {job.trouble}"
        if ((job.pod or {}).get("status") or {}).get("phase") == "Unknown":
            return "the pod's node does not report"
        return ""

    def write_nowait(self, data: bytes | memoryview) -> int:
        """See ``base.Pipe``."""
        socket, view, at = self._socket, memoryview(data), 0
        size = len(view)
        try:
            if self._half_closed or self._job.look.ended:
                raise Broken
            while at < size and not socket.full:
                piece = view[at : at + PIECE]
                socket.send_nowait(BINARY, Channels.STDIN, piece)
                at += len(piece)
        except Broken as error:
            if not at:
                raise LinkLost(self.diagnosis()) from error
        return at

    async def wait_writable(self) -> None:
        """See ``base.Pipe``."""
        try:
            await self._socket.wait_writable()
            if self._half_closed or self._job.look.ended:
                raise Broken
        except Broken as error:
            raise LinkLost(self.diagnosis()) from error

    async def receive_some(self) -> bytes:
        """See ``base.Pipe``. Always lets other tasks run."""
        while not self._finished:
            try:
                frames = await self._socket.receive()
            except Broken:
                await self._settle()
                break
            data = self._take(frames)
            if data:
                return data
        await trio.lowlevel.checkpoint()
        return b""

    async def wait_exited(self) -> None:
        """See ``base.Pipe``."""
        await self._exited.wait()

    def diagnosis(self) -> str:
        """See ``base.Pipe``."""
        job = self._job
        if job.look.ended:
            end = job.surroundings.redact(job.look.ended)
        elif self._socket.over:
            end = f"the connection to pod {job.pod_name} is over ({self._over()})"
        else:
            end = "container is running"
        last = self._lines.last()
        return f"{end}: {last}" if last else end

    def _over(self) -> str:
        status = self._status or {}
        if status.get("status") == "Failure":
            return self._job.surroundings.redact(str(status.get("message") or "failed"))
        return "its output ended" if status else self._socket.over

    # ------------------------------------------------------------------------------------------------------ insides
    def _take(self, frames: list[tuple[int, bytes]]) -> bytes:
        """What of the frames is stdout."""
        found = []
        for opcode, payload in frames:
            if opcode >= CLOSE:
                if opcode == CLOSE:
                    self._socket.fail("closed by the API")
                continue
            channel, data = self._channels.take(opcode, payload)
            if not data:
                continue
            if channel == Channels.STDOUT:
                found.append(data)
            elif channel == Channels.STDERR:
                self._lines.feed(data, trio.current_time())
            elif channel == Channels.STATUS:
                with suppress(ValueError):
                    status = json.loads(data)
                    self._status = status if isinstance(status, dict) else {}
        return found[0] if len(found) == 1 else b"".join(found)

    async def _settle(self) -> None:
        """The output is over: wait for why, so that ``diagnosis`` knows it."""
        job = self._job
        with trio.move_on_after(STATUS_WAIT if self._status is not None else LOST_WAIT):
            await job.until(lambda: bool(job.look.ended))
        if not self._finished and not self._lines.last():
            self._lines.feed(await job.log(), trio.current_time())
        self._finished = True
        self._exited.set()

    async def finish(self) -> None:
        """A task: when the container has ended, what it said last may arrive, and then that is the end."""
        job = self._job
        await job.until(lambda: bool(job.look.ended))
        await trio.sleep(DRAIN if job.look.running and not job.gone else 0)
        self._exited.set()
        self._socket.fail("the container has ended")

    def close_stdin(self) -> None:
        """Half-close by what the protocol has for it: v4 has nothing but the end of the connection."""
        self._half_closed = True
        if self._socket.protocol == V5:
            with suppress(Broken):
                if not self._socket.full:
                    self._socket.send_nowait(BINARY, Channels.CLOSE_STDIN)
        else:
            self._socket.close()

    def close(self) -> None:
        """Give everything back. The last step."""
        self._half_closed = self._finished = True
        self._exited.set()
        self._socket.close()
        self._lines.close()


# ----------------------------------------------------------------------------------------------------------------- job
class _Job:
    """One Job on its way from its making to its end."""

    def __init__(self, cluster: Cluster, spec: K8sJobSpec, surroundings: Surroundings) -> None:
        self.cluster = cluster
        self.spec = spec
        self.surroundings = surroundings
        self.name = ""
        self.uid = ""
        self.pod: Object | None = None
        self.look = Look()
        self.gone = False
        self.trouble = ""
        self.pipe: JobPod | None = None
        self._maybe = False  # it was asked for, and whether it was made is not known
        self._has_secret = False
        self._events = True
        self._metrics = True
        self._began = trio.current_time()
        self._stages: set[str] = set()
        self._others: dict[str, str] = {}
        self._news = trio.Event()

    @property
    def pod_name(self) -> str:
        return str(((self.pod or {}).get("metadata") or {}).get("name") or "")

    def _path(self, plural: str, *rest: str) -> str:
        return path_of(self.spec.namespace, plural, *rest, group=BATCH if plural == "jobs" else "")

    # ------------------------------------------------------------------------------------------------------- start
    async def start(self, run: Callable[[Callable[[], Awaitable[None]]], None]) -> JobPod:
        """Make it, wait until it runs and attach. ``run`` starts a task that lives until the Job is gone."""
        self._say("making a Job")
        await self._create()
        run(self._watch)
        run(self._stay_one)
        await self._running()
        socket = await self._attach()
        self.pipe = JobPod(self, socket)
        run(socket.flush_always)
        run(self.pipe.finish)
        return self.pipe

    async def _create(self) -> None:
        surroundings, spec = self.surroundings, self.spec
        owner = await _owner(self.cluster, spec.namespace, surroundings.environ)
        instance = surroundings.instance.id if surroundings.instance is not None else "none"
        redact = surroundings.redact
        version = await self.cluster.version()
        for _ in range(MAX_NAMES):
            identity = Identity(job_name(surroundings.server_id, token_hex(4)), surroundings.server_id, instance, owner)
            made = build(
                spec, identity, surroundings.env, lambda text: redact(text) != text, surroundings.stop_grace, version
            )
            self.name, self._maybe = identity.name, True
            try:
                job = await self.cluster.create(self._path("jobs"), made.job)
            except Refused as error:
                self._maybe = False
                if error.reason != "AlreadyExists":
                    raise
                continue
            self.uid, self._maybe = str(job["metadata"]["uid"]), False
            if made.secret is None:
                return
            # After the Job, so that it is never without an owner; the pod waits for it.
            me = {"apiVersion": BATCH, "kind": "Job", "name": self.name, "uid": self.uid}
            made.secret["metadata"]["ownerReferences"] = [me]
            self._has_secret = True
            await self.cluster.create(self._path("secrets"), made.secret)
            return
        raise StartFailed(f"Kubernetes ({self.cluster.access}) has objects of {MAX_NAMES} random names already")

    async def _watch(self) -> None:
        await self.cluster.watch(
            self._path("pods"), self._seen, {"labelSelector": f"{JOB}={self.name}"}, on_trouble=self._troubled
        )

    def _seen(self, kind: Kind, pod: Object) -> None:
        if kind == "SYNCED":
            return
        if self.pod is not None and pod["metadata"]["uid"] != self.pod["metadata"]["uid"]:
            meta = pod["metadata"]
            self._others[meta["uid"]] = meta["name"]
            if kind == "DELETED":
                del self._others[meta["uid"]]
            self._wake()
            return
        self.pod = pod
        found = look(pod)
        if kind == "DELETED":
            self.gone = True
            if not found.ended:
                found = Look(found.running, ended="pod was deleted")
        if not self.look.ended or found.ended.startswith("pod failed"):  # else the first reason is the reason
            self.look = found
        self._wake()

    async def _stay_one(self) -> None:
        """Kubernetes replaces a pod that is taken away, before 1.29 at once: there must be no second one of a server.

        So the Job goes as soon as that is seen, and the replacement before its container has started.
        """
        await self.until(lambda: self.gone or self._is_taken_away() or bool(self._others))
        with suppress(StartFailed):
            await self.cluster.delete(self._path("jobs", self.name), uid=self.uid)
        while True:
            await self.until(lambda: bool(self._others))
            uid, name = self._others.popitem()
            with suppress(StartFailed):
                await self.cluster.delete(self._path("pods", name), uid=uid, grace=0)

    def _is_taken_away(self) -> bool:
        return bool(((self.pod or {}).get("metadata") or {}).get("deletionTimestamp"))

    def _troubled(self, text: str) -> None:
        self.trouble = text

    def _wake(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for news of the pod that make it true."""
        while not condition():
            await self._news.wait()

    def _say(self, text: str, stage: str = "") -> None:
        """Show what the start is doing. A stage that it has not been in yet is progress."""
        extend = bool(stage) and stage not in self._stages
        self._stages.add(stage)
        self.surroundings.progress(self.surroundings.redact(text), extend=extend)

    def _show(self, reason: str, message: str) -> None:
        """What it waits for, by the pod's status and the last event."""
        if self.trouble:
            self._say(self.trouble)
            return
        waits, event = self.look.waiting or self.look.refusal, f"{reason}: {message}"
        if self.pod is None:
            self._say(f"waiting for a pod: {event}" if reason else "waiting for a pod")
        elif not condition(self.pod.get("status") or {}, "PodScheduled"):
            self._say(f"waiting for the pod: {waits}")
        elif reason and not self.look.refusal:
            self._say(f"waiting for the pod: {event}", "Pulling" if reason == "Pulling" else "scheduled")
        else:
            self._say(f"waiting for the pod: {waits}", "scheduled")

    async def _running(self) -> None:
        """Return when the container runs. Raises StartFailed as soon as it is known that it never will."""
        refused_since: float | None = None
        reason = message = ""
        while not self.look.running or self.look.ended:
            found = self.look
            if found.ended:
                last = (await self.log()).decode("utf-8", "replace").strip().splitlines()[-StderrLines.LAST_LINES :]
                raise StartFailed(": ".join(filter(None, (found.ended, " | ".join(last)[-1500:]))))
            if found.refusal and not self._secret_is_late(found.refusal):
                raise StartFailed(await self._explained(found))
            self._show(reason, message)
            with trio.move_on_after(EVENTS_EVERY) as pause:
                await self._news.wait()
            if pause.cancelled_caught:
                reason, message = await self._last_event()
            if self.pod is None and reason == "FailedCreate":
                now = trio.current_time()
                refused_since = refused_since or now
                if now - refused_since >= REFUSAL_WAIT:
                    raise StartFailed(f"Kubernetes makes no pod for Job {self.name}: {message}")

    def _secret_is_late(self, refusal: str) -> bool:
        return self._has_secret and self.name in refusal and trio.current_time() - self._began < SECRET_WAIT

    async def _explained(self, found: Look) -> str:
        """A refusal, with what an event knows of it: a back-off forgets why the image could not be pulled."""
        if found.about_image and "Back-off" in found.refusal:
            for event in await self._all_events():
                if event.get("reason") == "Failed" and "pull" in str(event.get("message")):
                    return f"the image can't be had: {event['message']}"
        return found.refusal

    async def _last_event(self) -> tuple[str, str]:
        """Reason and message of the last that is worth showing."""
        for event in await self._all_events():
            reason = str(event.get("reason") or "")
            if reason.startswith("Failed") or reason in ("Pulling", "BackOff", "NetworkNotReady"):
                return reason, str(event.get("message") or "")
        return "", ""

    async def _all_events(self) -> list[Object]:
        """What Kubernetes tells of the pod, or of the Job while there is none; the newest first."""
        uid = self.pod["metadata"]["uid"] if self.pod is not None else self.uid
        if not self._events:
            return []
        try:
            query = {"fieldSelector": f"involvedObject.uid={uid}"}
            found = (await self.cluster.get(self._path("events"), query, patience=0)).get("items") or []
        except Refused as error:
            self._events = error.http_status not in (403, 404)
            return []
        except StartFailed:
            return []
        found.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""), reverse=True)
        return list(found)

    async def log(self) -> bytes:
        """The end of all that the container wrote; b"" where it can't be had."""
        with trio.move_on_after(2):
            with suppress(StartFailed):
                query: Params = {"container": CONTAINER, "tailLines": StderrLines.LAST_LINES, "limitBytes": 64 * 1024}
                return (await self.cluster.text(self._path("pods", self.pod_name, "log"), query)).encode()
        return b""

    async def _attach(self) -> Socket:
        self._say("attaching to the pod")
        query = [("container", CONTAINER), ("stdin", "true"), ("stdout", "true"), ("stderr", "true"), ("tty", "false")]
        path = self._path("pods", self.pod_name, "attach")
        try:
            return await self.cluster.upgrade(path, query, PROTOCOLS)
        except (Refused, Unreachable) as error:
            if isinstance(error, Refused) and error.http_status in (401, 403):
                raise
            # Most likely it has ended already: then that is the reason.
            with trio.move_on_after(STATUS_WAIT if not self.look.ended else 0):
                await self.until(lambda: bool(self.look.ended))
            if self.look.ended:
                await self._running()
            raise

    # ------------------------------------------------------------------------------------------------------ running
    async def usage(self) -> Mapping[str, Any]:
        """What the container uses, {} where the cluster can't tell."""
        if not self._metrics:
            return {}
        path = path_of(self.spec.namespace, "pods", self.pod_name, group="metrics.k8s.io/v1beta1")
        try:
            found = await self.cluster.get(path, patience=0)
        except Refused as error:
            # A pod without metrics yet is a 404 of their API, a cluster without metrics one of Kubernetes'.
            self._metrics = error.http_status != 403 and not (error.http_status == 404 and error.reason != "NotFound")
            return {}
        except StartFailed:
            return {}
        for each in found.get("containers") or ():
            if each.get("name") == CONTAINER:
                usage = each.get("usage") or {}
                with suppress(ValueError, KeyError):
                    cpu = round(scaled(usage["cpu"], 9) / 1e9, 3)
                    return {"memory_bytes": scaled(usage["memory"], 0), "cpu_cores": cpu}
        return {}

    # --------------------------------------------------------------------------------------------------------- stop
    async def stop(self) -> None:
        """Remove it. Run shielded; bounded by CLOSE_WAIT + DELETE_LIMIT + grace + DELETE_LIMIT + FORCE_LIMIT."""
        pipe = self.pipe
        if pipe is not None and not self.look.ended:
            pipe.close_stdin()
            with trio.move_on_after(CLOSE_WAIT):
                await self.until(lambda: bool(self.look.ended))
        if not await self._remove(self.surroundings.stop_grace):
            if self.surroundings.instance is not None:
                self.surroundings.instance.leaves()
            if self.uid:
                _left.append(_Left(_where(self.cluster, self.spec), self.name, self.uid))

    async def _remove(self, grace: float) -> bool:
        """Whether it is known to be gone."""
        if self._maybe and not await self._find():
            return False
        if not self.uid:
            return True
        accepted = False
        with trio.move_on_after(DELETE_LIMIT), suppress(StartFailed):
            await self.cluster.delete(self._path("jobs", self.name), uid=self.uid, patience=DELETE_LIMIT)
            accepted = True
        if not accepted:
            return False
        over = self._over
        with trio.move_on_after(grace + DELETE_LIMIT):
            await self.until(over)
        if not over() and self.pod is not None:
            with trio.move_on_after(FORCE_LIMIT), suppress(StartFailed):
                uid = self.pod["metadata"]["uid"]
                await self.cluster.delete(self._path("pods", self.pod_name), uid=uid, grace=0)
                await self.until(over)
        return over()

    def _over(self) -> bool:
        """Nothing of the server runs any more. Without a pod there is none: a deleted Job makes no more."""
        if self.pod is None or self.gone:
            return True
        status = self.pod.get("status") or {}
        ended = "terminated" in (container_status(status).get("state") or {})
        return ended or status.get("phase") in ("Failed", "Succeeded")

    async def _find(self) -> bool:
        """A Job whose making was not answered: whether it is known now if it exists. Sets ``uid`` if it is ours."""
        with trio.move_on_after(DELETE_LIMIT):
            for pause in (0.0, 0.3):
                await trio.sleep(pause)
                try:
                    job = await self.cluster.get(self._path("jobs", self.name), patience=DELETE_LIMIT)
                except Refused as error:
                    if error.http_status != 404:
                        return False
                except StartFailed:
                    return False
                else:
                    instance = self.surroundings.instance
                    labels = job["metadata"].get("labels") or {}
                    if labels.get(INSTANCE) == (instance.id if instance is not None else "none"):
                        self.uid = str(job["metadata"]["uid"])
                    return True
            return True
        return False


# ------------------------------------------------------------------------------------------------------------- running
@attrs.frozen
class _Left:
    """A Job whose end could not be confirmed."""

    where: str
    name: str
    uid: str


_left: list[_Left] = []


@asynccontextmanager
async def open_pod(spec: K8sJobSpec, surroundings: Surroundings) -> AsyncIterator[JobPod]:
    """Run the server in a Job of its own while the block lasts.

    Raises StartFailed, with Kubernetes' own reasons, when it does not come to run. Cancelled or not, the block is left
    within the bounds of ``_Job.stop``. Holds a nursery: use it by ``async with`` only. Errors of the block come out as
    they are.
    """
    async with open_cluster(spec.context, surroundings.environ) as cluster:
        where = _where(cluster, spec)
        await _tidy(cluster, spec, where, surroundings.stop_grace)
        if surroundings.instance is not None:
            surroundings.instance.uses("k8s-job", where)
        job = _Job(cluster, spec, surroundings)
        scopes: list[trio.CancelScope] = []
        manager = trio.open_nursery()
        nursery = await manager.__aenter__()

        def run(work: Callable[[], Awaitable[None]]) -> None:
            scope = trio.CancelScope(shield=True)  # they serve the stop as well
            scopes.append(scope)
            nursery.start_soon(_within, scope, work)

        try:
            try:
                pod = await job.start(run)
            except StartFailed as error:
                raise StartFailed(surroundings.redact(error.message)) from error
            yield pod
        finally:
            with trio.CancelScope(shield=True):
                await job.stop()
            for scope in scopes:
                scope.cancel()
            # Not handed the block's error: it should come out as itself, not in the nursery's group.
            await manager.__aexit__(None, None, None)
            if job.pipe is not None:
                job.pipe.close()


async def _within(scope: trio.CancelScope, work: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await work()


def _where(cluster: Cluster, spec: K8sJobSpec) -> str:
    """What ``sweep`` needs to come back here."""
    access = cluster.access
    place = {"namespace": spec.namespace, "context": access.context, "kubeconfig": access.kubeconfig}
    return json.dumps({name: value for name, value in place.items() if value})


async def _tidy(cluster: Cluster, spec: K8sJobSpec, where: str, grace: float) -> None:
    """End what earlier stops of this process could not: nobody wants two of a server. Raises StartFailed."""
    for each in [each for each in _left if each.where == where]:
        await cluster.delete(path_of(spec.namespace, "jobs", each.name, group=BATCH), uid=each.uid)
        await _ended(cluster, spec.namespace, f"{JOB}={each.name}", grace + DELETE_LIMIT)
        with suppress(ValueError):
            _left.remove(each)


async def _ended(cluster: Cluster, namespace: str, selector: str, seconds: float) -> bool:
    """Whether none of these pods runs a server any more, after ``seconds`` at the latest."""
    query = {"labelSelector": selector}
    with trio.move_on_after(seconds):
        while True:
            found, _ = await cluster.list_all(path_of(namespace, "pods"), query)
            if all((pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") for pod in found):
                return True
            await trio.sleep(0.5)
    return False


async def _owner(cluster: Cluster, namespace: str, environ: Mapping[str, str]) -> Mapping[str, str] | None:
    """The gateway's own pod, with which Kubernetes collects what it has made; None where it runs in none.

    An owner must be in the same namespace of the same cluster: else its Jobs would be collected at once.
    """
    if cluster.access.context or cluster.access.namespace != namespace:
        return None
    name, uid = environ.get("POD_NAME"), environ.get("POD_UID")
    if name and uid:
        return {"name": name, "uid": uid}
    host = environ.get("HOSTNAME") or socket.gethostname()
    try:
        pod = await cluster.get(path_of(namespace, "pods", host), patience=0)
    except StartFailed:
        return None
    if not _is_here(str((pod.get("status") or {}).get("podIP") or "")):
        return None
    return {"name": host, "uid": str(pod["metadata"]["uid"])}


def _is_here(address: str) -> bool:
    """Whether this machine has that address: a pod may bear our host's name and be somewhere else."""
    try:
        family, kind, protocol, _, to = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(to)
    except OSError:
        return False
    return bool(address)


async def sweep(where: str, instance: str, environ: Mapping[str, str]) -> None:
    """See ``base.Runtime.sweep``: delete every Job that bears that instance's label, and wait for their pods' end."""
    try:
        place = json.loads(where)
        namespace = str(place["namespace"])
    except (ValueError, LookupError, TypeError):
        raise StartFailed(f"k8s-job: {where[:200]!r} is no place to look at") from None
    context, kubeconfig = place.get("context"), place.get("kubeconfig")
    around = {**environ, "KUBECONFIG": kubeconfig} if kubeconfig else environ
    selector = f"{MANAGED_BY}={MANAGER},{INSTANCE}={instance}"
    async with open_cluster(context, around) as cluster:
        jobs, _ = await cluster.list_all(path_of(namespace, "jobs", group=BATCH), {"labelSelector": selector})
        for job in jobs:
            meta = job["metadata"]
            await cluster.delete(path_of(namespace, "jobs", meta["name"], group=BATCH), uid=meta["uid"])
        if not await _ended(cluster, namespace, selector, SWEEP_LIMIT):
            raise StartFailed(f"Kubernetes ({cluster.access}): pods of a killed gateway in {namespace} still run")
