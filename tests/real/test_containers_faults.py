"""Row D4, RB60, RB61: engines and containers that end, hang and come back, with calls in flight; and pulls."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import wait_until
from engines import IMAGE, DockerEngine, Engine
from registry import Registry
from running import RunningGateway, echo_entry

pytestmark = pytest.mark.real

SLOW = 40.0
NOTICED = 2.0 + 1.5
"""RB60's two seconds, and what a busy machine adds."""


def post(gateway: RunningGateway, id: str, tool: str = "echo", **arguments: Any) -> tuple[int, str]:
    """A call's status, and its text or what the caller is told."""
    body = {"server_id": id, "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    body["params"] = {"name": tool, "arguments": arguments or {"text": "x"}}
    status, _, data = gateway.http("POST", "/mcp", body, timeout=120)
    reply = json.loads(data)
    return status, str(reply["result"]["content"][0]["text"] if status == 200 else reply["message"])


def container(engine: Engine, id: str) -> str:
    (found,) = engine.containers(f"open-mcp-gateway.server={id}")
    return str(found["Id"])


class Sleeper:
    """A call in flight, and how long after ``hit`` its caller was told."""

    def __init__(self, gateway: RunningGateway, id: str, pool: concurrent.futures.Executor) -> None:
        self._call = pool.submit(self._run, gateway, id)
        self._ended = 0.0
        time.sleep(0.5)

    def _run(self, gateway: RunningGateway, id: str) -> tuple[int, str]:
        result = post(gateway, id, "sleep", seconds=60)
        self._ended = time.monotonic()
        return result

    def told(self, since: float, within: float = NOTICED) -> str:
        status, text = self._call.result(SLOW)
        assert status == 502, text
        assert self._ended - since < within, (self._ended - since, text)
        return text


@pytest.fixture
def pool() -> Iterator[concurrent.futures.Executor]:
    with concurrent.futures.ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture
def own_engine(engine_named: Callable[[str], Engine]) -> Iterator[DockerEngine]:
    """An engine that a test may stop."""
    engine_named("20.10")  # skips where there is none
    engine = DockerEngine()
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["20.10", "podman"])
def test_D4_RB60_a_container_that_is_killed_removed_or_paused(
    name: str, engine_named: Callable[[str], Engine], tmp_path: Path, pool: concurrent.futures.Executor
) -> None:
    engine = engine_named(name)
    entry = engine.entry("box", request_timeout_seconds=60)
    hasty = engine.entry("hasty", request_timeout_seconds=2, stop_grace_seconds=1)
    with RunningGateway(tmp_path, [entry, hasty]) as gateway:
        assert post(gateway, "box") == (200, "x")

        call = Sleeper(gateway, "box", pool)
        begin = time.monotonic()
        engine.api("POST", f"/containers/{container(engine, 'box')}/kill?signal=SIGKILL")
        assert "container exited with code 137 (SIGKILL)" in call.told(begin)
        assert post(gateway, "box") == (200, "x"), "the next call starts it again"

        call = Sleeper(gateway, "box", pool)
        begin = time.monotonic()
        engine.api("DELETE", f"/containers/{container(engine, 'box')}?force=1&v=1")
        assert "container was removed" in call.told(begin)

        assert post(gateway, "hasty") == (200, "x")
        paused = container(engine, "hasty")
        engine.api("POST", f"/containers/{paused}/pause")
        wait_until(lambda: "paused" in engine.inspect(paused)["State"]["Status"])
        status, text = post(gateway, "hasty")
        assert status == 504
        assert "container is paused" in text
        engine.api("POST", f"/containers/{paused}/unpause")
        assert post(gateway, "hasty") == (200, "x")
        engine.api("POST", f"/containers/{paused}/pause")
        begin = time.monotonic()
        gateway.json("POST", "/servers/hasty/stop")
        wait_until(lambda: not engine.containers("open-mcp-gateway.server=hasty"), SLOW)
        assert time.monotonic() - begin < 1 + 1 + 5
    assert not engine.containers()


def test_D4_RB61_an_image_that_is_deleted(docker: Engine, tmp_path: Path) -> None:
    docker.api("POST", f"/images/{IMAGE}/tag?repo=doomed&tag=1")
    with RunningGateway(tmp_path, [docker.entry("box", runtime={"image": "doomed:1"})]) as gateway:
        assert post(gateway, "box") == (200, "x")
        docker.api("DELETE", "/images/doomed:1?force=1")
        assert post(gateway, "box") == (200, "x"), "what runs needs no name"
        gateway.json("POST", "/servers/box/stop")
        status, text = post(gateway, "box")
        assert status == 502 and "image 'doomed:1' is not on the Docker engine at" in text and "pull is never" in text
        docker.api("POST", f"/images/{IMAGE}/tag?repo=doomed&tag=1")
        gateway.json("POST", "/servers/box/start")
        assert post(gateway, "box") == (200, "x")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_D4_RB60_an_engine_that_goes_away_and_comes_back(
    how: str, own_engine: DockerEngine, tmp_path: Path, pool: concurrent.futures.Executor
) -> None:
    engine = own_engine
    entries = [engine.entry("box", request_timeout_seconds=60), echo_entry("here")]
    with RunningGateway(tmp_path, entries) as gateway:
        assert post(gateway, "box") == (200, "x")
        call = Sleeper(gateway, "box", pool)
        begin = time.monotonic()
        if how == "kill":
            engine.kill()
        else:
            stopping = pool.submit(engine.stop)
        text = call.told(begin)
        assert "went away" in text or (how == "stop" and "container exited with code 143 (SIGTERM)" in text), text
        assert gateway.call("here", "echo", {"text": "y"}) == "y"
        if how == "stop":
            stopping.result(SLOW)
        status, text = post(gateway, "here")
        assert status == 200
        waiting = pool.submit(post, gateway, "box")
        time.sleep(1)
        engine.start()
        begin = time.monotonic()
        status, text = waiting.result(SLOW)
        while status != 200 and time.monotonic() - begin < 30:
            time.sleep(0.2)
            status, text = post(gateway, "box")
        assert (status, text) == (200, "x")
        assert time.monotonic() - begin < 10 + 5
        running = engine.containers("open-mcp-gateway.server=box")
        assert [each["State"] for each in running] == ["running"], "no duplicate, and nothing dead is left"
    assert not engine.containers()


# ------------------------------------------------------------------------------------------------------------- pulling
@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as running:
        yield running


def pulled(engine: Engine, id: str, image: str, **more: Any) -> dict[str, Any]:
    runtime = {"type": engine.type, "image": image, "host": engine.host, **more.pop("runtime", {})}
    return {"id": id, "era": "legacy", "runtime": runtime, **more}


@pytest.fixture(params=["20.10", "podman"])
def puller(request: pytest.FixtureRequest, engine_named: Callable[[str], Engine]) -> Engine:
    return engine_named(request.param)


def test_K17_K23_RB61_an_image_is_pulled_with_progress(puller: Engine, registry: Registry, tmp_path: Path) -> None:
    registry.seconds = 6.0
    image = registry.add("acme/box:1", random=8_000_000)
    with RunningGateway(tmp_path, [pulled(puller, "box", image, start_timeout_seconds=3)]) as gateway:
        status, text = post(gateway, "box", "hello")
        assert (status, text) == (200, "hello from a pulled image"), "a pull that gets on outlasts the start timeout"
        lines = [line for line in gateway.lines if f"pulling image '{image}'" in line]
        assert any(" % of 8 MB" in line or " % of 9 MB" in line for line in gateway.lines), gateway.lines
        assert lines
    puller.api("DELETE", f"/images/{image}?force=1")


def test_K17_K23_RB61_pulls_that_fail_say_why(puller: Engine, registry: Registry, tmp_path: Path) -> None:
    registry.add("acme/far:1", architecture="s390x")
    registry.add("acme/box:1")
    host = registry.host
    entries = [
        pulled(puller, "missing", f"{host}/acme/box:nope"),
        pulled(puller, "platform", f"{host}/acme/far:1"),
        pulled(puller, "nobody", "127.0.0.1:1/acme/box:1"),
        pulled(puller, "never", f"{host}/acme/box:1", runtime={"pull": "never"}),
    ]
    if puller.type == "podman":  # Docker takes any registry of its machine as it is
        entries.append(pulled(puller, "plain", f"localhost:{host.partition(':')[2]}/acme/box:1"))
    with RunningGateway(tmp_path, entries) as gateway:
        told = {entry["id"]: post(gateway, entry["id"], "hello") for entry in entries}
    assert all(status == 502 for status, _ in told.values())
    assert f"image '{host}/acme/box:nope' can't be pulled: the registry has no such image or tag" in told["missing"][1]
    assert "it does not exist for this platform" in told["platform"][1]
    assert "the registry can't be reached" in told["nobody"][1]
    assert puller.type != "podman" or "the registry speaks no TLS" in told["plain"][1]
    assert "pull is never" in told["never"][1]


def test_K17_K23_images_by_digest_platform_and_always_anew(
    puller: Engine, registry: Registry, tmp_path: Path
) -> None:
    image = registry.add("acme/box:1")
    with urllib.request.urlopen(f"http://{registry.host}/v2/acme/box/manifests/1", timeout=10) as reply:
        digest = reply.headers["Docker-Content-Digest"]
    entries = [
        pulled(puller, "digest", f"{registry.host}/acme/box@{digest}"),
        pulled(puller, "always", image, runtime={"pull": "always", "platform": "linux/amd64"}),
    ]

    def image_of(id: str) -> str:
        assert post(gateway, id, "hello") == (200, "hello from a pulled image")
        shown: dict[str, Any] = {}
        while "image_digest" not in shown:  # learnt a moment after the start
            (shown,) = gateway.json("GET", f"/servers/{id}")["instances"]
        gateway.json("POST", f"/servers/{id}/stop")
        return str(shown["image_id"])

    with RunningGateway(tmp_path, entries) as gateway:
        first = image_of("digest")
        assert image_of("always") == first
        registry.add("acme/box:1", random=1000)
        gateway.json("POST", "/servers/always/start")
        assert image_of("always") != first, "the tag has moved"
        gateway.json("POST", "/servers/digest/start")
        assert image_of("digest") == first
    for found in {each["Id"] for each in puller.api("GET", "/images/json") if "acme" in str(each)}:
        puller.api("DELETE", f"/images/{found}?force=1")


HELPER = """#!/bin/sh
server=$(cat)
[ "$1" = get ] && [ "$server" = "{host}" ] || exit 1
printf '{{"ServerURL": "%s", "Username": "ada", "Secret": "lovelace-1815"}}' "$server"
"""


def test_K17_K23_registry_credentials(puller: Engine, registry: Registry, tmp_path: Path) -> None:
    registry.password = "lovelace-1815"
    image = registry.add("acme/private:1")
    docker = tmp_path / "docker-config" / "config.json"
    podman = tmp_path / "run" / "containers" / "auth.json"
    for file in (docker, podman):
        file.parent.mkdir(parents=True)
    own = podman if puller.type == "podman" else docker
    entry = pulled(puller, "box", image)
    variables = {"DOCKER_CONFIG": str(docker.parent), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    variables |= {"XDG_RUNTIME_DIR": f"{tmp_path}/run", "XDG_CONFIG_HOME": f"{tmp_path}/xdg"}

    def write(file: Path, password: str) -> None:
        auth = base64.b64encode(f"ada:{password}".encode()).decode()
        file.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))

    def again() -> tuple[int, str]:
        """Start it anew, with the image pulled anew."""
        status, _, data = gateway.http("POST", "/servers/box/start", timeout=60)
        if status != 200:
            return status, str(json.loads(data)["message"])
        found = post(gateway, "box", "hello")
        gateway.json("POST", "/servers/box/stop")
        puller.api("DELETE", f"/images/{image}?force=1")
        return found

    with RunningGateway(tmp_path, [entry], env=variables) as gateway:
        for password in ("", "byron-1788"):
            if password:
                write(own, password)
            status, text = again()
            assert status != 200 and "the registry refuses it without a" in text, text
            assert f"login ({puller.type} login)" in text, text
        write(own, "lovelace-1815")
        assert again() == (200, "hello from a pulled image")
        own.unlink()
        write(docker, "lovelace-1815")
        assert again()[0] == 200, "Podman takes Docker's, too"
        helper = tmp_path / "docker-credential-test"
        helper.write_text(HELPER.format(host=registry.host))
        helper.chmod(0o755)
        docker.unlink()
        own.write_text(json.dumps({"credsStore": "test"}))
        assert again()[0] == 200
        assert "lovelace-1815" not in "".join(gateway.lines)


def test_D4_RB61_no_space_for_a_pull(engine_named: Callable[[str], Engine], registry: Registry, tmp_path: Path) -> None:
    engine_named("20.10")  # skips where there is none
    engine = DockerEngine(disk="24m", build=False)
    try:
        image = registry.add("acme/fat:1", zeros=64_000_000)
        with RunningGateway(tmp_path, [pulled(engine, "box", image)]) as gateway:
            status, text = post(gateway, "box", "hello")
        assert status == 502
        assert f"image '{image}' can't be pulled: there is no space left on the engine's disk" in text
    finally:
        engine.close()
