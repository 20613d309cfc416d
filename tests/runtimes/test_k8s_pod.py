"""A server in a Job's pod, against a scripted API: framing, reasons, faults, and what is left (K24, RB62 to RB64)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode

from gateway.config.model import StringMap
from gateway.errors import LinkLost, StartFailed
from gateway.runtimes.base import Surroundings
from gateway.runtimes.k8s_job import K8sJobSpec, open_job
from gateway.runtimes.kubernetes import pod as job_pod
from gateway.runtimes.kubernetes.look import look
from gateway.runtimes.kubernetes.pod import Channels, JobPod, sweep
from gateway.runtimes.kubernetes.websocket import BINARY, CONTINUATION, BadFrame, Frames
from tests import kit
from tests.fixtures import fake_kube
from tests.fixtures.fake_kube import (
    RUNNING,
    V4,
    V5,
    FakeKube,
    hang,
    hang_up,
    status,
    terminated,
    unschedulable,
    waiting,
)

SPEC = K8sJobSpec("mcp", "acme/box:1", context="fake")


# -------------------------------------------------------------------------------------------------------------- framing
@given(st.binary(max_size=70_000), st.integers(1, 5000))
def test_E4_frames_are_what_wsproto_reads(payload: bytes, step: int) -> None:
    reader = FrameProtocol(client=False, extensions=[])
    data = Frames.encode(BINARY, payload)
    found = b""
    for at in range(0, len(data), step):
        reader.receive_bytes(data[at : at + step])
        for frame in reader.received_frames():
            assert frame.opcode is Opcode.BINARY
            found += frame.payload
    assert found == payload


@given(st.lists(st.binary(max_size=70_000), min_size=1, max_size=5), st.integers(1, 5000))
def test_E4_frames_are_read_as_wsproto_writes_them(payloads: list[bytes], step: int) -> None:
    writer, reader = FrameProtocol(client=False, extensions=[]), Frames()
    data = b"".join(bytes(writer.send_data(payload, fin=True)) for payload in payloads)
    found = []
    for at in range(0, len(data), step):
        found += reader.feed(data[at : at + step])
    assert found == [(BINARY, payload) for payload in payloads]


def test_E4_parts_make_one_frame_and_pieces_come_as_they_are() -> None:
    reader = FrameProtocol(client=False, extensions=[])
    reader.receive_bytes(Frames.encode(BINARY, b"\0", memoryview(b"abc")))
    assert [bytes(frame.payload) for frame in reader.received_frames()] == [b"\0abc"]
    writer = FrameProtocol(client=False, extensions=[])
    data = bytes(writer.send_data(b"\1one", fin=False)) + bytes(writer.send_data(b"two", fin=True))
    frames = Frames().feed(data)
    assert frames == [(BINARY, b"\1one"), (CONTINUATION, b"two")]
    channels = Channels()
    assert [channels.take(*frame) for frame in frames] == [(1, b"one"), (1, b"two")]
    assert channels.take(BINARY, b"") == (-1, b"")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x82\xff" + b"\0" * 12, "a masked frame"),
        (b"\xc2\x01a", "an extension nobody asked for"),
        (b"\x82\x7f" + (1 << 40).to_bytes(8, "big"), "a frame of 1099511627776 bytes"),
    ],
)
def test_E4_broken_frames_are_refused(data: bytes, told: str) -> None:
    with pytest.raises(BadFrame, match=told):
        Frames().feed(data)


# ----------------------------------------------------------------------------------------------------------------- look
def pod(found: dict[str, Any], **meta: Any) -> dict[str, Any]:
    limits = {"resources": {"limits": {"memory": "64Mi"}}}
    return {"metadata": meta, "spec": {"containers": [{"name": "server", **limits}]}, "status": found}


@pytest.mark.parametrize(
    ("found", "running", "ended"),
    [
        (RUNNING, True, ""),
        (terminated(0, "Completed"), True, "container exited with code 0"),
        (terminated(7), True, "container exited with code 7"),
        (
            terminated(137, "OOMKilled"),
            True,
            "container ran out of memory (OOMKilled, memory limit 64Mi, exit code 137)",
        ),
        (
            terminated(127, "ContainerCannotRun", 'exec: "serve": not found'),
            True,
            'container can\'t run: exec: "serve": not found (exit code 127)',
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            False,
            "pod failed: Evicted: The node was low on resource: memory.",
        ),
        (
            {**terminated(143), "reason": "DeadlineExceeded", "message": "Pod was active too long"},
            True,
            "pod failed: DeadlineExceeded: Pod was active too long",
        ),
        (
            {**RUNNING, "reason": "NodeLost", "message": "Node n1 is gone"},
            True,
            "pod failed: NodeLost: Node n1 is gone",
        ),
        ({"phase": "Failed"}, False, "pod ended as Failed"),
        (
            {
                "phase": "Failed",
                "initContainerStatuses": [{"name": "prep", "state": {"terminated": {"exitCode": 3, "message": "no"}}}],
            },
            False,
            "container 'prep' of its pod exited with code 3: no",
        ),
    ],
)
def test_RB64_why_a_pod_ended(found: dict[str, Any], running: bool, ended: str) -> None:
    seen = look(pod(found))
    assert (seen.running, seen.ended, seen.refusal) == (running, ended, "")


def test_RB64_a_pod_that_is_being_taken_away_has_ended() -> None:
    assert look(pod(RUNNING, deletionTimestamp="2026-01-01T00:00:00Z")).ended == "pod was evicted or deleted"
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    found = {**RUNNING, "conditions": [condition]}
    assert look(pod(found, deletionTimestamp="x")).ended == "pod was evicted or deleted: drained"


@pytest.mark.parametrize(
    ("found", "waits", "refusal"),
    [
        ({}, "not seen by Kubernetes yet", ""),
        ({"phase": "Pending"}, "Pending", ""),
        (waiting("ContainerCreating"), "ContainerCreating", ""),
        (unschedulable("0/1 nodes are available"), "Unschedulable: 0/1 nodes are available", ""),
        (waiting("ErrImagePull", "not found"), "", "the image can't be had: ErrImagePull: not found"),
        (waiting("ImagePullBackOff", "Back-off"), "", "the image can't be had: ImagePullBackOff: Back-off"),
        (
            waiting("CreateContainerConfigError", 'secret "x" not found'),
            "",
            'the container can\'t be started: CreateContainerConfigError: secret "x" not found',
        ),
        (
            waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
            "",
            "the container can't be started: CreateContainerConfigError: container has runAsNonRoot and image will run"
            " as root; name the user with `user`, such as `user: 1000` (`user: 0` allows root)",
        ),
        (
            {
                **waiting("PodInitializing"),
                "initContainerStatuses": [{"name": "prep", "state": {"waiting": {"reason": "ErrImagePull"}}}],
            },
            "",
            "the image can't be had: ErrImagePull",
        ),
    ],
)
def test_RB61_what_a_pod_waits_for_and_what_will_never_be(found: dict[str, Any], waits: str, refusal: str) -> None:
    seen = look(pod(found))
    assert (seen.running, seen.ended, seen.waiting, seen.refusal) == (False, "", waits, refusal)


# -------------------------------------------------------------------------------------------------------------- running
class Around:
    """A fake cluster, and surroundings that use it."""

    def __init__(self, kube: FakeKube, folder: Path) -> None:
        self.kube = kube
        self.instance = kit.Instance()
        self.stderr: list[str] = []
        self.progress: list[str] = []
        self.extended: list[str] = []
        path = folder / "config"
        path.write_text(
            json.dumps(
                {
                    "clusters": [{"name": "c", "cluster": {"server": kube.server.url("")}}],
                    "contexts": [{"name": "fake", "context": {"cluster": "c"}}],
                }
            )
        )
        self.environ = {"KUBECONFIG": str(path)}
        self.surroundings = Surroundings(
            "box",
            {},
            stop_grace=0.2,
            environ=self.environ,
            instance=self.instance,
            log=self.stderr.append,
            progress=self._progressed,
            redact=lambda text: text.replace("s3cret", "${TOKEN}"),
            env={"TOKEN": "s3cret", "MODE": "fast"},
        )

    def _progressed(self, text: str, *, extend: bool = False) -> None:
        if not self.progress or self.progress[-1] != text:
            self.progress.append(text)
        if extend:
            self.extended.append(text)

    @asynccontextmanager
    async def open(self, spec: K8sJobSpec = SPEC) -> AsyncIterator[JobPod]:
        async with open_job(spec, self.surroundings) as pipe:
            assert isinstance(pipe, JobPod)
            yield pipe

    async def refusal(self, spec: K8sJobSpec = SPEC) -> str:
        """Why it does not start; nothing may be left then."""
        with pytest.raises(StartFailed) as caught:
            async with self.open(spec):
                pass
        assert not self.kube.jobs
        return caught.value.message


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that a scripted API does not need."""
    for name, seconds in (
        ("CLOSE_WAIT", 0.2),
        ("DELETE_LIMIT", 0.6),
        ("EVENTS_EVERY", 0.1),
        ("REFUSAL_WAIT", 0.3),
        ("STATUS_WAIT", 1.0),
        ("DRAIN", 0.3),
        ("FORCE_LIMIT", 0.5),
    ):
        monkeypatch.setattr(job_pod, name, seconds)
    monkeypatch.setattr(job_pod, "_left", [])


@pytest.fixture
async def around(quick: None, tmp_path: Path) -> AsyncIterator[Around]:
    with trio.fail_after(30):
        async with FakeKube().serve() as kube:
            yield Around(kube, tmp_path)


@pytest.mark.parametrize("protocol", [V5, V4])
async def test_K24_E4_both_protocols_and_their_half_close(around: Around, protocol: str) -> None:
    kube = around.kube
    kube.speaks = [protocol]
    async with around.open() as pipe:
        attached = await kube.attached()
        assert kube.offered == [V5, V4]
        assert attached.query == {
            "container": ["server"], "stdin": ["true"], "stdout": ["true"], "stderr": ["true"], "tty": ["false"],
        }  # fmt: skip
        await kit.send(pipe, b"hello\n")
        assert await attached.stdin() == b"hello\n"
        await attached.send(1, b"wor")
        await attached.send(2, b"oops\n")
        await attached.send(1, b"ld\n")
        assert await kit.Lines(pipe).next() == b"world"
        await kube.until(lambda: around.stderr == ["oops"] or kube._wake())
        ends: list[tuple[Opcode, bytes]] = []

        async def end() -> None:
            ends.append(await attached.next())
            await kube.change(kube.pod, terminated(0, "Completed"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            nursery.start_soon(_leave, pipe)
    assert ends == [(Opcode.BINARY, b"\xff\0")] if protocol == V5 else [(Opcode.CLOSE, b"")]
    assert not kube.jobs
    assert around.instance.left == 0


async def _leave(pipe: JobPod) -> None:
    """What the end of the block begins with."""
    pipe.close_stdin()
    with pytest.raises(LinkLost):
        pipe.write_nowait(b"x\n")
    await trio.lowlevel.checkpoint()


async def test_K24_the_job_is_written_down_before_it_is_made_and_its_secret_is_owned(around: Around) -> None:
    kube = around.kube
    async with around.open() as pipe:
        (name, job), *_ = kube.jobs.items()
        assert name.startswith("mcp-box-") and job["metadata"]["labels"]["open-mcp-gateway/instance"] == kit.Instance.id
        assert "s3cret" not in json.dumps(job)
        secret = kube.secrets[name]
        assert list(secret["data"]) == ["TOKEN"]
        assert secret["metadata"]["ownerReferences"] == [
            {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": f"uid-{name}"}
        ]
        ((type, where),) = around.instance.used
        assert (type, json.loads(where)["namespace"], json.loads(where)["context"]) == ("k8s-job", "mcp", "fake")
        assert pipe.details == {
            "job": name,
            "pod": f"{name}-x",
            "node": "n1",
            "namespace": "mcp",
            "context": "fake",
            "image_id": "sha256:1",
        }


async def test_K24_a_ping_is_answered(around: Around) -> None:
    async with around.open() as pipe, trio.open_nursery() as nursery:
        attached = await around.kube.attached()
        await attached.ping(b"you there?")
        nursery.start_soon(pipe.receive_some)
        assert await attached.next() == (Opcode.PONG, b"you there?")
        nursery.cancel_scope.cancel()


async def test_K24_an_idle_connection_is_kept_alive(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runtimes.kubernetes.websocket.PING_AFTER", 0.1)
    async with around.open():
        attached = await around.kube.attached()
        assert await attached.next() == (Opcode.PING, b"")
        assert await attached.next() == (Opcode.PING, b"")


# ------------------------------------------------------------------------------------------------------ while it starts
async def test_RB61_a_missing_image_is_told_in_kubernetes_words(around: Around) -> None:
    around.kube.begin = waiting("ErrImagePull", "rpc error: manifest for acme/box:1 not found")
    assert await around.refusal() == (
        "the image can't be had: ErrImagePull: rpc error: manifest for acme/box:1 not found"
    )


async def test_RB61_a_back_off_is_told_with_its_first_reason(around: Around) -> None:
    around.kube.begin = waiting("ImagePullBackOff", 'Back-off pulling image "acme/box:1"')
    around.kube.events = [
        {"type": "Normal", "reason": "BackOff", "message": "Back-off", "lastTimestamp": "2"},
        {"type": "Warning", "reason": "Failed", "message": "Failed to pull image: unauthorized", "lastTimestamp": "1"},
    ]
    assert await around.refusal() == "the image can't be had: Failed to pull image: unauthorized"


async def test_E6_a_quota_is_told_in_kubernetes_words(around: Around) -> None:
    kube = around.kube
    kube.begin = None
    said = 'Error creating: pods "x" is forbidden: exceeded quota: small, requested: pods=1, used: pods=1'
    kube.events = [{"type": "Warning", "reason": "FailedCreate", "message": said, "lastTimestamp": "1"}]
    message = await around.refusal()
    assert message.startswith("Kubernetes makes no pod for Job mcp-box-") and message.endswith(said)


async def test_K24_a_refusal_that_passes_is_waited_for(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = around.kube
    monkeypatch.setattr(job_pod, "REFUSAL_WAIT", 20)
    kube.begin = None
    kube.events = [{"type": "Warning", "reason": "FailedCreate", "message": "no account yet", "lastTimestamp": "1"}]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_leave, around)
        await kube.until(lambda: "no account yet" in str(around.progress))
        kube.begin = RUNNING
        await kube.make_pod(next(iter(kube.jobs)))


async def _open_and_leave(around: Around) -> None:
    async with around.open():
        pass


async def test_K24_what_it_waits_for_is_shown_and_progress_gives_time(around: Around) -> None:
    kube = around.kube
    kube.begin = unschedulable("0/1 nodes are available: 1 Insufficient memory.")
    scheduled = {"conditions": [{"type": "PodScheduled", "status": "True"}]}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_leave, around)
        await kube.until(lambda: "Insufficient memory" in str(around.progress))
        assert around.extended == [], "nothing has moved"
        await kube.change(kube.pod, {**waiting("ContainerCreating"), **scheduled})
        kube.events = [{"type": "Normal", "reason": "Pulling", "message": 'Pulling image "x"', "lastTimestamp": "1"}]
        await kube.until(lambda: "Pulling image" in str(around.progress))
        kube.events = [{"type": "Warning", "reason": "FailedMount", "message": "no such secret", "lastTimestamp": "2"}]
        await kube.until(lambda: "FailedMount: no such secret" in str(around.progress))
        assert len(around.extended) == 2
        await kube.change(kube.pod, {**RUNNING, **scheduled})
    assert around.progress[0] == "making a Job"
    assert around.progress[-1] == "attaching to the pod"


async def test_K24_events_that_may_not_be_read_are_done_without(around: Around) -> None:
    kube = around.kube
    kube.begin = waiting("ContainerCreating")
    kube.faults["GET events"] = [status(403, "Forbidden")] * 9
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_leave, around)
        await kube.until(lambda: kube.requests("GET events") == 1)
        await trio.sleep(0.3)
        await kube.change(kube.pod, RUNNING)
    assert kube.requests("GET events") == 1


async def test_RB01_a_server_that_ends_before_anything_is_told_with_its_words(around: Around) -> None:
    kube = around.kube
    kube.begin = terminated(3)
    kube.log = b"Traceback\nno module named s3cret\n"
    assert await around.refusal() == "container exited with code 3: Traceback | no module named ${TOKEN}"


async def test_RB01_a_server_that_ends_before_it_is_attached_to(around: Around) -> None:
    kube = around.kube

    async def too_late(request: Any, answer: Any) -> None:
        await status(400, "BadRequest", "container server is not running")(request, answer)
        await kube.change(kube.pod, terminated(4))

    kube.faults["GET attach"] = [too_late]
    assert await around.refusal() == "container exited with code 4"


async def test_K24_an_attach_that_is_refused_is_told(around: Around) -> None:
    around.kube.faults["GET attach"] = [status(403, "Forbidden", 'cannot create resource "pods/attach"')]
    message = await around.refusal()
    assert 'attach: cannot create resource "pods/attach" (403 Forbidden)' in message
    around.kube.speaks = ["v3.channel.k8s.io"]
    assert "unable to negotiate protocol" in await around.refusal()


async def test_K24_a_secret_that_may_not_be_made_leaves_no_job(around: Around) -> None:
    around.kube.faults["POST secrets"] = [status(403, "Forbidden", 'cannot create resource "secrets"')]
    assert 'cannot create resource "secrets"' in await around.refusal()
    assert around.instance.left == 0


async def test_K24_its_own_secret_may_be_late(around: Around) -> None:
    kube = around.kube
    kube.begin = waiting("ContainerCreating")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_leave, around)
        await kube.until(lambda: kube.pods)
        (name,) = kube.jobs
        await kube.change(kube.pod, waiting("CreateContainerConfigError", f'secret "{name}" not found'))
        await kube.until(lambda: f'secret "{name}" not found' in str(around.progress))
        await kube.change(kube.pod, RUNNING)


# ------------------------------------------------------------------------------------------------------------ its names
async def test_RB62_a_foreign_job_of_the_same_name_is_neither_taken_nor_removed(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    kube = around.kube
    names = iter(["taken", "free"])
    monkeypatch.setattr(job_pod, "token_hex", lambda size: next(names))
    foreign = {"metadata": {"name": "mcp-box-taken", "uid": "foreign", "labels": {}}}
    kube.jobs["mcp-box-taken"] = foreign
    async with around.open() as pipe:
        assert pipe.details["job"] == "mcp-box-free"
    assert kube.jobs == {"mcp-box-taken": foreign}


async def test_RB62_a_job_whose_making_was_not_answered_is_looked_for(around: Around) -> None:
    """It may have been made: then it is ours to remove."""
    kube = around.kube

    async def made_and_cut(request: Any, answer: Any) -> None:
        job = request.json
        job["metadata"]["uid"] = "uid-1"
        kube.jobs[job["metadata"]["name"]] = job
        await hang_up(request, answer)

    kube.faults["POST jobs"] = [made_and_cut]
    assert "did not answer" in await around.refusal()
    kube.faults["POST jobs"] = [hang_up]
    assert "did not answer" in await around.refusal()
    assert around.instance.left == 0


async def test_RB62_an_object_of_that_name_which_is_not_ours_stays(around: Around) -> None:
    kube = around.kube

    async def somebody_elses(request: Any, answer: Any) -> None:
        name = request.json["metadata"]["name"]
        kube.jobs[name] = {"metadata": {"name": name, "uid": "foreign", "labels": {}}}
        await hang_up(request, answer)

    kube.faults["POST jobs"] = [somebody_elses]
    with pytest.raises(StartFailed):
        async with around.open():
            pass
    assert [job["metadata"]["uid"] for job in kube.jobs.values()] == ["foreign"]


async def test_P7_giving_up_while_it_is_made_leaves_nothing(around: Around) -> None:
    kube = around.kube
    kube.begin = waiting("ContainerCreating")
    for what in ("POST jobs", "POST secrets", "WATCH pods"):
        before = kube.requests(what)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_open_and_leave, around)
                await kube.until(lambda what=what, before=before: kube.requests(what) > before)
                scope.cancel()
        assert not kube.jobs, what
    assert around.instance.left == 0


# ---------------------------------------------------------------------------------------------------------- how it ends
async def ended(around: Around, happens: Callable[[Any], Any]) -> str:
    """What callers are told when this happens to a running server."""
    async with around.open() as pipe:
        attached = await around.kube.attached()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(happens, attached)
            assert await pipe.receive_some() == b""
        await pipe.wait_exited()
        with pytest.raises(LinkLost):
            await kit.send(pipe, b"x" * 10_000_000)
        return pipe.diagnosis()


async def test_K24_the_exit_code_is_the_pods(around: Around) -> None:
    """Attach says Success whatever happened, and the pod's status comes later."""

    async def happens(attached: Any) -> None:
        await attached.send(2, b"last words\n")
        await attached.finish()
        await trio.sleep(0.2)
        await around.kube.change(around.kube.pod, terminated(7))

    assert await ended(around, happens) == "container exited with code 7: last words"


async def test_RB64_out_of_memory_is_told(around: Around) -> None:
    async def happens(attached: Any) -> None:
        await around.kube.change(around.kube.pod, terminated(137, "OOMKilled"))
        await attached.finish()

    assert "ran out of memory (OOMKilled, memory limit 1Gi" in await ended(around, happens)


async def test_RB64_an_end_that_only_the_watch_sees_is_the_end(around: Around) -> None:
    """The connection hangs: the node is lost, or a proxy keeps it open."""

    async def happens(attached: Any) -> None:
        await around.kube.change(around.kube.pod, {**RUNNING, "reason": "NodeLost", "message": "n1 is gone"})

    assert await ended(around, happens) == "pod failed: NodeLost: n1 is gone"


async def test_RB64_an_eviction_is_told_at_once(around: Around) -> None:
    async def happens(attached: Any) -> None:
        await around.kube.change(around.kube.pod, None, deletionTimestamp="2026-01-01T00:00:00Z")

    assert await ended(around, happens) == "pod was evicted or deleted"


async def test_RB64_a_pod_that_is_taken_away_gets_no_successor_behind_our_back(around: Around) -> None:
    """Kubernetes replaces it while it still ends: there are never two of a server."""
    kube = around.kube
    async with around.open() as pipe:
        await kube.attached()
        (name,) = kube.jobs
        kube.obedient = False
        await kube.change(kube.pod, None, deletionTimestamp="2026-01-01T00:00:00Z")
        await kube.make_pod(name, "-y")
        await kube.until(lambda: f"{name}-y" not in kube.pods and not kube.jobs)
        assert list(kube.pods) == [f"{name}-x"]
        assert "evicted or deleted" in pipe.diagnosis()
        await kube.remove(kube.pod)


async def test_RB64_newer_kubernetes_is_told_to_wait_with_a_successor(around: Around) -> None:
    around.kube.minor = "31"
    async with around.open():
        (job,) = around.kube.jobs.values()
        assert job["spec"]["podReplacementPolicy"] == "Failed"


async def test_RB63_an_end_during_a_cut_watch_is_not_missed(around: Around) -> None:
    kube = around.kube

    async def happens(attached: Any) -> None:
        kube.faults["WATCH pods"] = [status(410, "Expired")]
        await kube.cut_watches()
        await kube.remove(kube.pod)

    assert await ended(around, happens) == "pod was deleted"


async def test_RB64_a_broken_connection_is_told_as_one(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_pod, "LOST_WAIT", 0.1)

    async def happens(attached: Any) -> None:
        attached.cut()

    message = await ended(around, happens)
    assert message.startswith("the connection to pod mcp-box-") and "the API closed the connection" in message


async def test_E4_a_failure_status_is_told(around: Around) -> None:
    async def happens(attached: Any) -> None:
        await attached.finish({"status": "Failure", "message": "s3cret container is gone"})

    assert "is over (${TOKEN} container is gone)" in await ended(around, happens)


async def test_E4_nonsense_frames_end_it(around: Around) -> None:
    async def happens(attached: Any) -> None:
        await attached.raw(b"\xff" * 100)

    assert "the API sent a masked frame" in await ended(around, happens)


async def test_RB63_an_api_that_is_away_does_not_end_a_live_connection(around: Around) -> None:
    kube = around.kube
    async with around.open() as pipe:
        attached = await kube.attached()
        kube.away = True
        await kube.cut_watches()
        await kube.until(lambda: kube.requests("WATCH pods") + kube.requests("GET pods") >= 4)
        assert "the pod's state is not known: Kubernetes" in pipe.remark()
        await kit.send(pipe, b"still\n")
        assert await attached.stdin() == b"still\n"
        await attached.send(1, b"here\n")
        assert await kit.Lines(pipe).next() == b"here"
        kube.away = False
        watches = kube.requests("WATCH pods")
        await kube.until(lambda: kube.requests("WATCH pods") > watches)
        while pipe.remark():
            await trio.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- removal
async def test_RB63_a_job_that_could_not_be_removed_is_removed_before_the_next(around: Around) -> None:
    """The API is away when it stops: never two of a server, and a later gateway looks after it."""
    kube = around.kube
    async with around.open():
        kube.away = True
        await kube.cut_watches()
    assert len(kube.jobs) == 1 and around.instance.left == 1
    (first,) = kube.jobs
    kube.away = False
    async with around.open() as pipe:
        assert list(kube.jobs) == [pipe.details["job"]]
        assert pipe.details["job"] != first
    assert not kube.jobs and not kube.pods
    assert around.instance.left == 1


async def test_RB64_a_pod_that_does_not_go_is_removed_by_force(around: Around) -> None:
    kube = around.kube
    kube.obedient = False
    async with around.open():
        pass
    assert kube.requests("DELETE pods") == 1
    assert not kube.pods and around.instance.left == 0


async def test_RB64_a_pod_that_stays_is_left_to_the_sweep(around: Around) -> None:
    kube = around.kube
    kube.obedient = False
    kube.faults["DELETE pods"] = [status(403, "Forbidden"), hang]
    begun = trio.current_time()
    async with around.open():
        pass
    assert around.instance.left == 1
    assert trio.current_time() - begun < 10


async def test_RB62_a_sweep_removes_one_instances_jobs_only(around: Around) -> None:
    kube = around.kube
    async with around.open() as mine:
        stranger = {
            "metadata": {"name": "other", "uid": "o", "labels": {"app.kubernetes.io/managed-by": "open-mcp-gateway"}}
        }
        kube.jobs["other"] = stranger
        ((_, where),) = around.instance.used
        await sweep(where, "b" * 32, around.environ)
        assert set(kube.jobs) == {"other", mine.details["job"]}
        await sweep(where, around.instance.id, {"HOME": "/nonexistent"})
        assert kube.jobs == {"other": stranger}


async def test_RB62_a_sweep_that_can_not_be_sure_says_so(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = around.kube
    monkeypatch.setattr(job_pod, "SWEEP_LIMIT", 0.5)
    with pytest.raises(StartFailed, match="is no place to look at"):
        await sweep("nonsense", kit.Instance.id, around.environ)
    async with around.open():
        ((_, where),) = around.instance.used
        kube.faults["GET jobs"] = [status(403, "Forbidden", "may not list jobs")]
        with pytest.raises(StartFailed, match="may not list jobs"):
            await sweep(where, kit.Instance.id, around.environ)
        kube.obedient = False
        with pytest.raises(StartFailed, match="pods of a killed gateway in mcp still run"):
            await sweep(where, kit.Instance.id, around.environ)
        kube.obedient = True
        await kube.remove(kube.pod)


# -------------------------------------------------------------------------------------------------------------- measure
async def test_K26_what_it_uses_is_asked_of_the_metrics_api(around: Around) -> None:
    kube = around.kube
    async with around.open() as pipe:
        usage = {"containers": [{"name": "server", "usage": {"cpu": "12345678n", "memory": "2048Ki"}}]}

        async def metrics(request: Any, answer: Any) -> None:
            assert request.target.startswith("/apis/metrics.k8s.io/v1beta1/namespaces/mcp/pods/")
            await answer.json(usage)

        kube.faults["GET pods"] = [status(404, "NotFound", "no metrics yet"), metrics, status(404, "", "404 page")]
        assert await pipe.measure() == {}
        assert await pipe.measure() == {"memory_bytes": 2048 * 1024, "cpu_cores": 0.012}
        assert await pipe.measure() == {}
        asked = kube.requests("GET pods")
        assert await pipe.measure() == {}
        assert kube.requests("GET pods") == asked, "a cluster without metrics is not asked again"


async def test_K24_variables_reach_the_pod_and_nothing_of_the_gateways(around: Around) -> None:
    spec = attrs.evolve(SPEC, env=StringMap((("MODE", "slow"), ("OWN", "x"))))
    async with around.open(spec):
        (job,) = around.kube.jobs.values()
        env = job["spec"]["template"]["spec"]["containers"][0]["env"]
        assert {each["name"]: each.get("value") for each in env} == {"MODE": "fast", "OWN": "x", "TOKEN": None}


async def test_K24_the_owner_is_the_gateways_pod_in_the_same_namespace_only(around: Around) -> None:
    from gateway.runtimes.kubernetes.access import Access
    from gateway.runtimes.kubernetes.api import on_cluster

    inside = Access(around.kube.server.url(""), "mcp", "the pod's service account")
    pod = {"POD_NAME": "gateway-1", "POD_UID": "u-1"}
    async with on_cluster(inside, {}) as cluster:
        assert await job_pod._owner(cluster, "mcp", pod) == {"name": "gateway-1", "uid": "u-1"}
        assert await job_pod._owner(cluster, "other", pod) is None
        here = {"metadata": {"name": "gateway-2", "uid": "u-2"}, "status": {"podIP": "127.0.0.1"}}
        elsewhere = {**here, "status": {"podIP": "192.0.2.1"}}
        for found, expected in ((here, {"name": "gateway-2", "uid": "u-2"}), (elsewhere, None)):

            async def one(request: Any, answer: Any, found: Any = found) -> None:
                assert request.target == "/api/v1/namespaces/mcp/pods/gateway-2"
                await answer.json(found)

            around.kube.faults["GET pods"] = [one]
            assert await job_pod._owner(cluster, "mcp", {"HOSTNAME": "gateway-2"}) == expected
    async with on_cluster(attrs.evolve(inside, context="dev"), {}) as cluster:
        assert await job_pod._owner(cluster, "mcp", pod) is None


def test_the_fake_speaks_both_protocols() -> None:
    assert fake_kube.V5 in job_pod.PROTOCOLS and fake_kube.V4 in job_pod.PROTOCOLS
