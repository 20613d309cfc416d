"""A scripted engine on a real unix socket: what a container's start, life and end do when the engine misbehaves."""

from __future__ import annotations

import json
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.config.model import Secret, StringMap
from gateway.errors import LinkLost, StartFailed
from gateway.runtimes.base import Pipe, Surroundings
from gateway.runtimes.containers import life
from gateway.runtimes.containers.engine import EngineGone, find_engine
from gateway.runtimes.docker import PODMAN, RUNTIME, DockerSpec
from tests.kit import Instance

VERSION = {"ApiVersion": "1.45", "MinAPIVersion": "1.24", "Components": [{"Name": "Engine"}]}
INSPECTED = {"State": {"Status": "running", "Running": True}, "Config": {"StopSignal": "SIGTERM"}, "Image": "sha256:i"}
Answer = tuple[int, Any] | Callable[[trio.SocketStream], Awaitable[None]]
"""A status and a body, or a program that takes the connection over."""


def frame(kind: int, payload: bytes) -> bytes:
    return bytes([kind, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


class FakeEngine:
    """Answers by ``answers[(method, path)]``, the id and version being left out; unknown ones with 404."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "d.sock"
        self.asked: list[tuple[str, str]] = []
        self.bodies: dict[str, Any] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.exited = trio.Event()
        self.code: int = 0
        self.target = ""
        self.attached: trio.SocketStream | None = None
        self.input: trio.SocketStream | None = None
        self.early = b""
        self.answers: dict[tuple[str, str], Answer] = {
            ("GET", "/version"): (200, VERSION),
            ("POST", "/containers/create"): (201, {"Id": "c0ffee", "Warnings": []}),
            ("POST", "/containers/c0ffee/attach"): self.attach,
            ("POST", "/containers/c0ffee/start"): (204, None),
            ("POST", "/containers/c0ffee/wait"): self.wait,
            ("GET", "/containers/c0ffee/json"): (200, INSPECTED),
            ("GET", "/images/sha256:i/json"): (200, {"RepoDigests": ["acme/box@sha256:d1"]}),
            ("GET", "/events"): self.silent,
            ("POST", "/containers/c0ffee/kill"): self.killed,
            ("DELETE", "/containers/c0ffee"): (204, None),
        }

    async def attach(self, stream: trio.SocketStream) -> None:
        if "stdout" in self.target:
            self.attached = stream
        if "stdin" in self.target:
            self.input = stream
        await stream.send_all(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n" + self.early)
        with trio.move_on_after(60):
            await self.exited.wait()

    async def wait(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self.exited.wait()
        body = json.dumps({"StatusCode": self.code}).encode()
        await stream.send_all(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    async def killed(self, stream: trio.SocketStream) -> None:
        self.code = 143
        await respond(stream, 204, None)
        self.exited.set()

    async def silent(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self.exited.wait()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(self.path))
            listener.listen(50)
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self.connection, trio.SocketStream(sock))

    async def serve_tls(self, context: ssl.SSLContext, *, task_status: trio.TaskStatus[int]) -> None:
        """The same at a TCP port, with TLS."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            task_status.started(listener.socket.getsockname()[1])
            await trio.serve_listeners(
                lambda stream: self.connection(
                    trio.SSLStream(stream, context, server_side=True, https_compatible=True)
                ),
                [listener],
                handler_nursery=nursery,
            )

    async def connection(self, stream: Any) -> None:
        try:
            async with stream:
                buffer = b""
                while True:
                    while b"\r\n\r\n" not in buffer:
                        data = await stream.receive_some()
                        if not data:
                            return
                        buffer += data
                    head, _, buffer = buffer.partition(b"\r\n\r\n")
                    lines = head.decode().split("\r\n")
                    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
                    while len(buffer) < int(headers.get("content-length", 0)):
                        buffer += await stream.receive_some()
                    size = int(headers.get("content-length", 0))
                    body, buffer = buffer[:size], buffer[size:]
                    method, target, _ = lines[0].split(" ")
                    path = target.partition("?")[0]
                    if path.startswith("/v"):
                        path = "/" + path.split("/", 2)[2] if path != "/version" else path
                    self.asked.append((method, target))
                    self.headers[path] = headers
                    if body:
                        self.bodies[path] = json.loads(body)
                    answer = self.answers.get((method, path), (404, {"message": f"no such thing: {path}"}))
                    self.target = target
                    if callable(answer):
                        await answer(stream)
                        if path.endswith(("/attach", "/wait", "/events")):
                            return
                    else:
                        await respond(stream, *answer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def respond(stream: trio.SocketStream, status: int, body: Any) -> None:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(data)
    await stream.send_all(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, length) + data)


async def hang(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def cut(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    await stream.aclose()


@pytest.fixture
async def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeEngine]:
    monkeypatch.setattr(life, "_seen", set())
    monkeypatch.setattr(life, "_left", {})
    engine = FakeEngine(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.serve)
        yield engine
        nursery.cancel_scope.cancel()


def around(fake: FakeEngine, **more: Any) -> Surroundings:
    return Surroundings("box", {}, stop_grace=0.2, environ={"DOCKER_HOST": f"unix://{fake.path}", "HOME": "/"}, **more)


@asynccontextmanager
async def opened(fake: FakeEngine, spec: DockerSpec | None = None, **more: Any) -> AsyncIterator[Pipe]:
    assert RUNTIME.open is not None
    with trio.fail_after(40):
        async with RUNTIME.open(spec or DockerSpec("acme/box:1"), around(fake, **more)) as place:
            assert not hasattr(place, "url")
            yield place


async def refused(fake: FakeEngine, spec: DockerSpec | None = None, **more: Any) -> str:
    with pytest.raises(StartFailed) as caught:
        async with opened(fake, spec, **more):
            pytest.fail("it started")
    return caught.value.message


# ----------------------------------------------------------------------------------------------------------- the order
async def test_K17_attached_before_started_and_removed_with_its_volumes(fake: FakeEngine) -> None:
    instance = Instance()
    async with opened(fake, instance=instance) as pipe:
        assert instance.used == [("docker", f"unix://{fake.path}")]
        assert fake.attached is not None
        await fake.attached.send_all(frame(2, b"complaint\n") + frame(1, b"hello\n"))
        assert await pipe.receive_some() == b"hello\n"
        assert pipe.write_nowait(b"x\n") == 2
        assert await fake.attached.receive_some() == b"x\n"
        with trio.fail_after(10):
            while "image_digest" not in pipe.details:
                await trio.sleep(0.01)
        assert pipe.details["image_digest"] == "sha256:d1"
    paths = [(method, target.partition("?")[0].removeprefix("/v1.45")) for method, target in fake.asked]
    order = [paths.index(("POST", f"/containers/{what}")) for what in ("create", "c0ffee/attach", "c0ffee/start")]
    assert order == sorted(order)
    assert ("DELETE", "/v1.45/containers/c0ffee?force=1&v=1") in fake.asked
    labels = fake.bodies["/containers/create"]["Labels"]
    assert labels == {"open-mcp-gateway.instance": "ab" * 16, "open-mcp-gateway.server": "box"}
    assert instance.left == 0


async def test_D3_what_comes_with_the_answer_to_attach_is_not_lost(fake: FakeEngine) -> None:
    fake.early = frame(1, b"early\n")[:5]
    async with opened(fake) as pipe:
        assert fake.attached is not None
        await fake.attached.send_all(frame(1, b"early\n")[5:])
        assert await pipe.receive_some() == b"early\n"


async def test_RB01_the_end_is_explained_with_the_last_lines(fake: FakeEngine) -> None:
    async with opened(fake, redact=lambda text: text.replace("hush", "${KEY}")) as pipe:
        assert fake.attached is not None
        await fake.attached.send_all(frame(2, b"no key hush\n"))
        fake.answers["GET", "/containers/c0ffee/json"] = (200, {"State": {"Status": "exited", "ExitCode": 3}})
        fake.code = 3
        fake.exited.set()
        assert await pipe.receive_some() == b""
        await pipe.wait_exited()
        assert pipe.diagnosis() == "container exited with code 3: no key ${KEY}"
        with pytest.raises(LinkLost, match="exited with code 3"):
            pipe.write_nowait(b"x")
        assert await pipe.measure() == {}


@pytest.mark.parametrize(
    ("code", "answer", "text"),
    [
        (137, (200, {"State": {"OOMKilled": True}}), "container ran out of memory (limit 1 GiB)"),
        (137, (404, {"message": "No such container"}), "container was removed"),
        (137, (200, {"State": {"Status": "removing"}}), "container was removed"),
        (139, (200, {"State": {"Status": "exited"}}), "container exited with code 139 (SIGSEGV)"),
        (1, (200, {"State": {"Status": "exited", "Error": "no disk"}}), "container exited with code 1: no disk"),
        (0, (500, {"message": "oops"}), "went away"),
    ],
)
async def test_D4_causes(fake: FakeEngine, code: int, answer: Answer, text: str) -> None:
    async with opened(fake) as pipe:
        fake.answers["GET", "/containers/c0ffee/json"] = answer
        fake.code = code
        fake.exited.set()
        await pipe.wait_exited()
        assert text in pipe.diagnosis()


async def test_D4_events_say_more_than_the_state(fake: FakeEngine) -> None:
    said = trio.Event()

    async def events(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        lines = [{"Action": "pause"}, 5, {"status": "exec_create: x"}, {"Action": None, "Actor": 5}]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        await stream.send_all(b"%x\r\n%b\r\n" % (len(data), data))
        await said.wait()
        data = b'{"Action": "unpause"}\n{"Action": "oom"}\n'
        await stream.send_all(b"%x\r\n%b\r\n" % (len(data), data))
        await trio.sleep_forever()

    fake.answers["GET", "/events"] = events
    async with opened(fake) as pipe:
        with trio.fail_after(10):
            while pipe.remark() != "container is paused":
                await trio.sleep(0.01)
            said.set()
            while pipe.remark():
                await trio.sleep(0.01)
        fake.code = 137
        fake.exited.set()
        await pipe.wait_exited()
        assert "ran out of memory" in pipe.diagnosis()


# ------------------------------------------------------------------------------------------------- an engine that fails
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((200, {**VERSION, "ApiVersion": "1.40"}), "is too old: its API is 1.40, 1.41 is needed"),
        ((200, {**VERSION, "ApiVersion": "1.60", "MinAPIVersion": "1.52"}), "is too new"),
        ((200, {"ApiVersion": "x"}), "can't be read"),
        ((200, {}), "is no container engine"),
        ((200, b"<html>"), "what is no JSON"),
        ((503, {"message": "starting"}), "refuses: starting"),
        (cut, "broke off"),
    ],
)
async def test_D7_what_is_no_usable_engine(fake: FakeEngine, answer: Answer, text: str) -> None:
    fake.answers["GET", "/version"] = answer
    assert text in await refused(fake)


async def test_D7_an_engine_that_hangs(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runtimes.containers.engine.CONNECT_LIMIT", 0.3)
    fake.answers["GET", "/version"] = hang
    assert "has not answered within 0.3 s" in await refused(fake)


@pytest.mark.parametrize(
    ("step", "answer", "text"),
    [
        ("/containers/create", (400, {"message": "invalid\nmount"}), "container can't be made: invalid mount"),
        ("/containers/create", (500, b"plain words"), "container can't be made: plain words"),
        ("/containers/c0ffee/attach", (500, {"message": "no"}), "refuses: no"),
        ("/containers/c0ffee/attach", (200, b"x"), "does not hand over the container's streams"),
        ("/containers/c0ffee/start", (400, {"message": 'exec: "x": not found'}), "container can't be started: exec"),
        ("/containers/c0ffee/start", (500, {"message": "exec format error"}), "(the image is for another platform)"),
        (
            "/containers/c0ffee/start",
            (500, {"message": "crun: the requested cgroup controller `cpu` is not available: OCI runtime error"}),
            "Delegate=cpu memory pids",
        ),
        ("/containers/c0ffee/start", cut, "broke off"),
    ],
)
async def test_RB61_a_step_that_fails_is_named_and_leaves_nothing(
    fake: FakeEngine, step: str, answer: Answer, text: str
) -> None:
    fake.answers["POST", step] = answer
    assert text in await refused(fake)
    removed = ("DELETE", "/v1.45/containers/c0ffee?force=1&v=1") in fake.asked
    assert removed == (step != "/containers/create")


async def test_RB65_limits_that_an_engine_does_not_apply_are_told(
    fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    applied = {"Memory": 1 << 30, "NanoCpus": 10**9, "PidsLimit": 256}
    ignored = (({}, None), ({"PidsLimit": None}, "its processes"), ({"Memory": 0, "NanoCpus": 0}, "its memory and CPU"))
    for host, text in ignored:
        caplog.clear()
        fake.answers["GET", "/containers/c0ffee/json"] = (200, {**INSPECTED, "HostConfig": {**applied, **host}})
        async with opened(fake), trio.open_nursery() as nursery:
            while ("GET", "/v1.45/images/sha256:i/json") not in fake.asked:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        told = [each.getMessage() for each in caplog.records if "does not limit" in each.getMessage()]
        assert bool(told) is (text is not None) and all(each.endswith(f"does not limit {text}") for each in told)
        fake.asked.clear()
        fake.exited = trio.Event()


async def test_RB61_secrets_are_never_quoted(fake: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "e.env").write_text("FILED=file-secret-1\n")
    fake.answers["POST", "/containers/create"] = (400, {"message": "bad: hush-hush and file-secret-1"})
    env = StringMap((("K", Secret("${K}", "hush-hush")),))
    spec = DockerSpec(Secret("${I}", "acme/hush-hush:1"), env_file="e.env", env=env)
    text = await refused(fake, spec, catalog_dir=tmp_path, redact=lambda text: text.replace("hush-hush", "${K}"))
    assert "bad: ${K} and ${FILED}" in text
    assert set(fake.bodies["/containers/create"]["Env"]) == {"FILED=file-secret-1", "K=hush-hush"}
    fake.answers["POST", "/containers/create"] = (201, {"Id": "c0ffee"})
    async with opened(fake, spec, catalog_dir=tmp_path, redact=lambda text: text.replace("hush-hush", "${K}")) as pipe:
        assert pipe.details["image"] == "acme/${K}:1"


@pytest.mark.parametrize(
    "cancelled_at", [f"/containers/{step}" for step in ("create", "c0ffee/attach", "c0ffee/start")]
)
async def test_P7_a_start_that_is_given_up_leaves_nothing(fake: FakeEngine, cancelled_at: str) -> None:
    answer = fake.answers["POST", cancelled_at]
    scope = trio.CancelScope()

    async def slow(stream: trio.SocketStream) -> None:
        scope.cancel()
        await trio.sleep(0.3)
        if callable(answer):
            await answer(stream)
        else:
            await respond(stream, *answer)

    fake.answers["POST", cancelled_at] = slow
    with scope:
        async with opened(fake):
            pytest.fail("it started")
    assert ("DELETE", "/v1.45/containers/c0ffee?force=1&v=1") in fake.asked


async def test_RB60_an_engine_that_vanishes_is_told_and_what_is_left_is_remembered(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Instance()
    async with opened(fake, instance=instance) as pipe:
        for key in list(fake.answers):
            fake.answers[key] = cut
        assert fake.attached is not None
        await fake.attached.aclose()
        fake.exited.set()  # ends the answer to wait: its connection breaks
        await pipe.wait_exited()
        assert pipe.diagnosis() in (f"the Docker engine at unix://{fake.path} went away", "container was removed")
    assert instance.left == 1
    assert life._left == {f"unix://{fake.path}": {"c0ffee"}}
    fresh = FakeEngine(fake.path.parent)
    fake.answers = fresh.answers
    fresh.exited = fake.exited = trio.Event()
    removed = len([1 for asked in fake.asked if asked[0] == "DELETE"])
    async with opened(fake, instance=instance):
        assert len([1 for asked in fake.asked if asked[0] == "DELETE"]) == removed + 1, "the next start removes it"
        assert not life._left[f"unix://{fake.path}"]


async def test_RB60_an_engine_that_was_there_is_waited_for(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(fake):
        pass
    fake.exited = trio.Event()
    times = 0

    async def at_last(stream: trio.SocketStream) -> None:
        nonlocal times
        times += 1
        await (cut(stream) if times < 4 else respond(stream, 200, VERSION))

    fake.answers["GET", "/version"] = at_last
    async with opened(fake):
        assert times == 4


# ------------------------------------------------------------------------------------------------------ images, names
async def test_K17_a_missing_image_is_pulled_once(fake: FakeEngine) -> None:
    steps: list[tuple[str, bool]] = []
    created = 0

    async def create(stream: trio.SocketStream) -> None:
        nonlocal created
        created += 1
        if created == 1:
            await respond(stream, 404, {"message": "No such image: acme/box:1"})
        else:
            await respond(stream, 201, {"Id": "c0ffee"})

    lines = [{"status": "Downloading", "id": "a", "progressDetail": {"current": 5, "total": 10}}, {"status": "x"}]
    fake.answers["POST", "/containers/create"] = create
    fake.answers["POST", "/images/create"] = (200, b"\r\n".join(json.dumps(line).encode() for line in lines))

    def progress(text: str, *, extend: bool = False) -> None:
        steps.append((text, extend))

    spec = DockerSpec("acme/box:1", platform="linux/arm64")
    async with opened(fake, spec, progress=progress):
        pass
    assert ("POST", "/v1.45/images/create?fromImage=acme%2Fbox&tag=1&platform=linux%2Farm64") in fake.asked
    assert ("pulling image 'acme/box:1': 50 % of 0 MB", True) in steps
    assert next(target for _, target in fake.asked if "containers/create" in target).endswith("platform=linux%2Farm64")


async def test_RB61_a_pull_that_breaks_off_or_floods(fake: FakeEngine) -> None:
    fake.answers["POST", "/containers/create"] = (404, {"message": "No such image: acme/box:1"})
    fake.answers["POST", "/images/create"] = (200, b'{"status": "x"}\n{"error": "unauthorized"}\n{"status": "y"}')
    assert "can't be pulled: the registry refuses it without a valid login" in await refused(fake)
    fake.answers["POST", "/images/create"] = cut
    assert "image 'acme/box:1' can't be pulled: the Docker engine" in await refused(fake)
    fake.answers["POST", "/images/create"] = (200, b"x" * 3_000_000)
    assert "a line over 1048576 bytes" in await refused(fake)
    fake.answers["POST", "/images/create"] = (200, b"")
    assert "image 'acme/box:1' can't be used: No such image" in await refused(fake), "asked for once only"


async def test_RB62_a_fixed_name_is_taken_over_from_the_dead_only(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "NAME_WAIT", 0.5)
    monkeypatch.setattr(life, "SWEEP_WAIT", 0.3)
    spec = DockerSpec("acme/box:1", container_name="mine")
    taken = True

    async def create(stream: trio.SocketStream) -> None:
        if taken:
            await respond(stream, 409, {"message": 'The container name "/mine" is already in use by container "x"'})
        else:
            await respond(stream, 201, {"Id": "c0ffee"})

    async def remove(stream: trio.SocketStream) -> None:
        nonlocal taken
        taken = False
        await respond(stream, 204, None)

    fake.answers["POST", "/containers/create"] = create
    fake.answers["DELETE", "/containers/01d"] = remove

    def owned_by(owner: str) -> None:
        labels = {"open-mcp-gateway.instance": owner, "open-mcp-gateway.server": "other"} if owner else {"a": "b"}
        fake.answers["GET", "/containers/json"] = (200, [{"Id": "01d", "Labels": labels}])

    for owner, whose in (("", "somebody else"), ("cd" * 16, "another gateway"), ("ab" * 16, "this gateway")):
        owned_by(owner)
        assert whose in await refused(fake, spec, instance=Instance())
        assert ("DELETE", "/v1.45/containers/01d?force=1&v=1") not in fake.asked
    owned_by("de" * 16)
    async with opened(fake, spec, instance=Instance()):
        assert ("DELETE", "/v1.45/containers/01d?force=1&v=1") in fake.asked


async def test_K19_a_volume_with_options_is_refused(fake: FakeEngine) -> None:
    fake.answers["GET", "/volumes/v"] = (200, {"Driver": "local", "Options": {"o": "bind", "device": "/etc"}})
    assert "volume 'v' is /etc, which must not be mounted" in await refused(fake, DockerSpec("x", volumes=("v:/d",)))
    fake.answers["GET", "/volumes/v"] = (200, {"Driver": "nfs"})
    assert "may mean any place" in await refused(fake, DockerSpec("x", volumes=("v:/d",)))
    fake.answers["GET", "/volumes/v"] = (200, {"Driver": "local", "Options": None})
    async with opened(fake, DockerSpec("x", volumes=("v:/d:ro",))):
        assert fake.bodies["/containers/create"]["HostConfig"]["Binds"] == ["v:/d:ro"]


# ------------------------------------------------------------------------------------------------------------ stopping
async def test_P6_a_removal_that_is_refused_for_a_moment_is_tried_again(fake: FakeEngine) -> None:
    times = 0

    async def busy(stream: trio.SocketStream) -> None:
        nonlocal times
        times += 1
        await respond(stream, *((409, {"message": "removal in progress"}) if times < 3 else (404, {"message": "gone"})))

    fake.answers["DELETE", "/containers/c0ffee"] = busy
    instance = Instance()
    async with opened(fake, instance=instance):
        pass
    assert times == 3 and instance.left == 0


async def test_P6_a_removal_that_fails_is_told(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "REMOVE_WAIT", 0.3)
    fake.answers["DELETE", "/containers/c0ffee"] = (500, {"message": "device busy"})
    instance = Instance()
    async with opened(fake, instance=instance):
        pass
    assert instance.left == 1


async def test_RB62_the_sweep_removes_what_bears_the_id_only(fake: FakeEngine) -> None:
    assert RUNTIME.sweep is not None and PODMAN.sweep is not None
    where = f"unix://{fake.path}"
    fake.answers["GET", "/containers/json"] = (200, [{"Id": "c0ffee"}])
    await RUNTIME.sweep(where, "ab" * 16, {})
    (asked,) = [target for method, target in fake.asked if "/containers/json" in target]
    assert "label%22%3A+%5B%22open-mcp-gateway.instance%3D" + "ab" * 16 in asked and "all=1" in asked
    assert ("DELETE", "/v1.45/containers/c0ffee?force=1&v=1") in fake.asked
    fake.answers["DELETE", "/containers/c0ffee"] = (403, {"message": "no"})
    with pytest.raises(StartFailed, match="refuses: no"):
        await RUNTIME.sweep(where, "ab" * 16, {})
    with pytest.raises(StartFailed, match="can't be reached"):
        await PODMAN.sweep(f"{where}.none", "ab" * 16, {})


async def test_P12_nothing_is_left_open(fake: FakeEngine) -> None:
    async def once() -> None:
        fake.exited = trio.Event()
        async with opened(fake) as pipe:
            assert fake.attached is not None
            await fake.attached.send_all(frame(1, b"x\n"))
            assert await pipe.receive_some() == b"x\n"
        fake.exited.set()  # the fake engine closes its ends

    async def failing() -> None:
        fake.exited = trio.Event()
        fake.answers["POST", "/containers/c0ffee/start"] = (500, {"message": "no"})
        assert await refused(fake)
        fake.answers["POST", "/containers/c0ffee/start"] = (204, None)
        fake.exited.set()

    async def count() -> int:
        await trio.sleep(0.2)
        return len(os.listdir("/proc/self/fd"))

    await once()
    await failing()
    before = await count()
    for _ in range(5):
        await once()
        await failing()
    assert await count() <= before + 1


# ------------------------------------------------------------------------------------------------------------- finding
async def test_D7_K23_the_sockets_are_tried_in_order(fake: FakeEngine, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environ = {"HOME": str(home), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    with pytest.raises(EngineGone) as caught:
        async with find_engine("podman", "", environ):
            pass
    text = caught.value.message
    assert text.index(f"unix://{tmp_path}/run/podman/podman.sock (no such file") < text.index(
        "unix:///run/podman/podman"
    )
    (tmp_path / "run" / "podman").mkdir(parents=True)
    (tmp_path / "run" / "podman" / "podman.sock").symlink_to(fake.path)
    fake.answers["GET", "/version"] = (200, {**VERSION, "Components": [{"Name": "Podman Engine"}]})
    async with find_engine("podman", "", environ) as engine:
        assert engine.podman and engine.prefix == "/v1.41" and "the Podman engine at" in engine.name
    fake.answers["GET", "/version"] = (200, {**VERSION, "ApiVersion": "1.52"})
    async with find_engine("docker", f"unix://{fake.path}", {}) as engine:
        assert engine.prefix == "/v1.51"
    with pytest.raises(StartFailed, match="host must begin with unix:// or tcp://"):
        async with find_engine("docker", "/run/d.sock", {}):
            pass


async def test_D7_the_chosen_docker_context_is_used(fake: FakeEngine, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "docker" / "contexts" / "meta" / hashlib.sha256(b"desk").hexdigest()
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"Endpoints": {"docker": {"Host": f"unix://{fake.path}"}}}))
    environ = {"DOCKER_CONFIG": str(tmp_path / "docker"), "HOME": str(tmp_path)}
    (tmp_path / "docker" / "config.json").write_text('{"currentContext": "desk"}')
    async with find_engine("docker", "", environ) as engine:
        assert engine.where == f"unix://{fake.path}"
    (tmp_path / "docker" / "config.json").write_text('{"currentContext": "../../x"}')
    with pytest.raises(StartFailed, match=r"docker context '\.\./\.\./x' can't be used: .*no such file or directory"):
        async with find_engine("docker", "", {**environ, "DOCKER_CONTEXT": ""}):
            pass
    (folder / "meta.json").write_text('{"Endpoints": []}')
    with pytest.raises(StartFailed, match="docker context 'desk' can't be used"):
        async with find_engine("docker", "", {**environ, "DOCKER_CONTEXT": "desk"}):
            pass
    (tmp_path / "docker" / "config.json").write_text('["no object"]')
    with pytest.raises(EngineGone, match="no Docker engine can be reached"):
        async with find_engine("docker", "", environ):
            pass


# ----------------------------------------------------------------------------------------------------------------- TLS
TLS = Path(__file__).resolve().parents[1] / "fixtures" / "tls"


@pytest.fixture
async def secure(fake: FakeEngine, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """What names the fake engine at a port with TLS, which wants the client's certificate, too."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    for name, source in (("ca.pem", "ca.pem"), ("cert.pem", "server.pem"), ("key.pem", "server.key")):
        shutil.copy(TLS / source, folder / name)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=TLS / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    async with trio.open_nursery() as nursery:
        port = await nursery.start(fake.serve_tls, context)
        yield {
            "DOCKER_HOST": f"tcp://localhost:{port}",
            "DOCKER_TLS_VERIFY": "1",
            "DOCKER_CERT_PATH": str(folder),
        }
        nursery.cancel_scope.cancel()


async def test_K17_an_engine_behind_tls(fake: FakeEngine, secure: dict[str, str]) -> None:
    assert RUNTIME.open is not None
    around = Surroundings("box", {}, stop_grace=0.2, environ=secure)
    with trio.fail_after(40):
        async with RUNTIME.open(DockerSpec("acme/box:1"), around) as pipe:
            assert not hasattr(pipe, "url")
            assert pipe.details["engine"] == secure["DOCKER_HOST"]
            assert fake.attached is not None and fake.input is not None
            reply = frame(1, b"r" * 300_000 + b"\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fake.attached.send_all, reply)
                received = b""
                while not received.endswith(b"\n"):
                    received += await pipe.receive_some()
            assert received == reply[8:]
            data = memoryview(b"q" * 300_000)
            echoed = b""
            while data:
                data = data[pipe.write_nowait(data) :]
                if len(echoed) < 300_000:
                    echoed += await fake.input.receive_some()
            while len(echoed) < 300_000:
                echoed += await fake.input.receive_some()
            assert echoed == b"q" * 300_000
            fake.code = 5
            fake.exited.set()
            assert await pipe.receive_some() == b""
            await pipe.wait_exited()
            assert "exited with code 5" in pipe.diagnosis()
    assert ("DELETE", "/v1.45/containers/c0ffee?force=1&v=1") in fake.asked


async def test_K17_tls_without_certificates_or_with_others(secure: dict[str, str], tmp_path: Path) -> None:
    for environ, text in (
        ({**secure, "DOCKER_CERT_PATH": str(tmp_path / "none")}, "Docker engine at tcp:.*there is no ca.pem"),
        ({"DOCKER_HOST": secure["DOCKER_HOST"]}, "the Docker engine at tcp://localhost"),
    ):
        with pytest.raises(StartFailed, match=text):
            async with find_engine("docker", "", environ):
                pass
