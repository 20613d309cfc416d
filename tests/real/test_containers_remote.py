"""Rows K17, K23, D3: engines at a distance, over TLS with certificates on both sides, and how engines are found."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from actors import wait_until
from engines import IMAGE, DockerEngine, Engine, PodmanEngine, RootlessPodman
from running import RunningGateway

from gateway.errors import StartFailed
from gateway.runtimes.base import Surroundings
from gateway.runtimes.containers import plan
from gateway.runtimes.containers.engine import find_engine
from gateway.runtimes.docker import RUNTIME, DockerSpec

pytestmark = pytest.mark.real

SLOW = 40.0
HOST = "127.0.0.2"
"""Of this machine, but not where the gateway would look for what is on its own one."""
LAST_WORDS = """
import runpy, sys
runpy.run_path("/app/echo_server.py")["main"]()
print("last words", file=sys.stderr, flush=True)
"""


def make_certificates(folder: Path, name: str = "good") -> Path:
    """An authority, an engine's certificate and a client's folder, by the commands in Docker's documentation."""
    made = folder / name
    client = made / "client"
    client.mkdir(parents=True)

    def run(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=made, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run("req", "-x509", *key, "-days", "2", "-subj", f"/CN={name} CA", "-keyout", "ca-key.pem", "-out", "ca.pem")
    wishes = {"server": f"subjectAltName=IP:{HOST}\nextendedKeyUsage=serverAuth\n"}
    wishes["client"] = "extendedKeyUsage=clientAuth\n"
    for who, wish in wishes.items():
        (made / f"{who}.ext").write_text(wish)
        run("req", *key, "-subj", f"/CN={who}", "-keyout", f"{who}-key.pem", "-out", f"{who}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", f"{who}.ext")
        run("x509", "-req", "-in", f"{who}.csr", *signed, "-out", f"{who}-cert.pem")
    for source, target in (("ca", "ca"), ("client-cert", "cert"), ("client-key", "key")):
        shutil.copy(made / f"{source}.pem", client / f"{target}.pem")
    return made


class Remote:
    """An engine at a TLS port of ``HOST`` that wants a client's certificate; ``engine`` is asked past all that."""

    def __init__(self, folder: Path) -> None:
        made = make_certificates(folder)
        self.folder = made / "client"
        with socket.create_server((HOST, 0)) as listening:
            self.address = f"tcp://{HOST}:{listening.getsockname()[1]}"
        files = f"--tlscacert {made}/ca.pem --tlscert {made}/server-cert.pem --tlskey {made}/server-key.pem"
        self.engine = DockerEngine(ENGINE_ARGS=f"-H {self.address} --tlsverify {files}")

    def variables(self, **other: str) -> dict[str, str]:
        """What Docker's own client is told."""
        found = {"DOCKER_HOST": self.address, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(self.folder)}
        return {**found, **other}

    def entry(self, id: str, *args: str, runtime: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """A fixture in a container, at the engine that the environment names."""
        keys = {"type": "docker", "image": IMAGE, "args": list(args), "pull": "never", **(runtime or {})}
        return {"id": id, "runtime": keys, **more}

    def events(self, since: float, *names: str) -> list[str]:
        """What has happened to containers, as far as it bears one of these names."""
        wanted = quote(json.dumps({"type": ["container"], "event": list(names)}))
        path = f"/events?since={since:.6f}&until={time.time():.6f}&filters={wanted}"
        status, data = _image_api(self.engine.host, path)
        assert status == 200, data
        return [json.loads(line)["Action"] for line in data.splitlines() if line.strip()]


def _image_api(host: str, path: str) -> tuple[int, bytes]:
    from engines import image

    found: tuple[int, bytes] = image.api(host, "GET", path, timeout=60)
    return found


@pytest.fixture(scope="module")
def remote(
    engine_named: Callable[[str], Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Remote]:
    engine_named("20.10")  # skips where there is none
    made = Remote(tmp_path_factory.mktemp("remote"))
    try:
        yield made
    finally:
        made.engine.close()


# ----------------------------------------------------------------------------------------------------------------- TLS
def test_K17_D3_streams_over_tls(remote: Remote, tmp_path: Path) -> None:
    entries = [remote.entry("box", max_message_bytes=8_000_000), remote.entry("here")]
    with RunningGateway(tmp_path, entries, env=remote.variables()) as gateway:
        assert gateway.call("box", "echo", {"text": "far away"}) == "far away"
        (shown,) = gateway.json("GET", "/servers/box")["instances"]
        assert shown["engine"] == remote.address and shown["memory_bytes"] > 0
        command = ["ss", "-tnoH", "dst", remote.address.removeprefix("tcp://")]
        connections = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        assert connections and all("timer:(keepalive" in each for each in connections), "an engine may vanish silently"
        assert gateway.call("box", "big", {"bytes": 5_000_000}) == "x" * 5_000_000
        assert gateway.call("box", "echo", {"text": "é" * 400_000}) == "é" * 400_000
        assert gateway.call("box", "stderr", {"lines": 20_000, "text": "noise " * 20})
        assert gateway.call("box", "echo", {"text": "after the noise"}) == "after the noise"
        (container,) = remote.engine.containers("open-mcp-gateway.server=box")
        remote.engine.api("POST", f"/containers/{container['Id']}/kill")
        wait_until(lambda: gateway.json("GET", "/servers/box")["status"] != "running", 5)
        assert gateway.call("box", "echo", {"text": "again"}) == "again"
    assert not remote.engine.containers()


def test_K17_P6_over_tls_the_end_of_stdin_is_told_and_the_last_words_arrive(remote: Remote, tmp_path: Path) -> None:
    entries = [remote.entry("box", "-c", LAST_WORDS, stop_grace_seconds=10)]
    with RunningGateway(tmp_path, entries, env=remote.variables()) as gateway:
        assert gateway.call("box", "echo", {"text": "x"}) == "x"
        since = time.time()
        gateway.json("POST", "/servers/box/stop")
        wait_until(lambda: not remote.engine.containers(), SLOW)
        assert remote.events(since, "kill", "die") == ["die"], "it needs no signal"
        gateway.wait_for_line("[box] last words")


def test_K17_certificates_that_are_wrong_are_told_with_the_engines_address(remote: Remote, tmp_path: Path) -> None:
    other = make_certificates(tmp_path, "other") / "client"
    ours = remote.folder
    mixed = {
        "untrusted": {"ca.pem": other, "cert.pem": ours, "key.pem": ours},
        "foreign": {"ca.pem": ours, "cert.pem": other, "key.pem": other},
        "anonymous": {"ca.pem": ours},
        "half": {"ca.pem": ours, "cert.pem": ours},
    }
    for name, files in mixed.items():
        (tmp_path / name).mkdir()
        for file, source in files.items():
            shutil.copy(source / file, tmp_path / name / file)
    told = {}
    for name in (*mixed, "nowhere"):
        variables = remote.variables(DOCKER_CERT_PATH=str(tmp_path / name))
        with RunningGateway(tmp_path, [remote.entry("box")], env=variables) as gateway:
            told[name] = gateway.failing("box")
    assert all(remote.address in text for text in told.values()), told
    assert "TLS failed: " in told["untrusted"] and "issuer certificate" in told["untrusted"]
    for name in ("foreign", "anonymous"):
        assert "it wants another client certificate (cert.pem, key.pem), or one at all" in told[name], told[name]
    assert "there is no key.pem" in told["half"] and "there is no ca.pem" in told["nowhere"]
    variables = remote.variables(DOCKER_TLS_VERIFY="")
    with RunningGateway(tmp_path, [remote.entry("box")], env=variables) as gateway:
        assert "Client sent an HTTP request to an HTTPS server" in gateway.failing("box")


async def test_K17_strict_pythons_take_the_certificates_of_dockers_documentation(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with find_engine("docker", "", remote.variables()) as found:
        assert found.where == remote.address


def make_context(config: Path, name: str, host: str, certificates: Path | None) -> None:
    """What ``docker context create`` and ``docker context use`` leave."""
    id = hashlib.sha256(name.encode()).hexdigest()
    meta = config / "contexts" / "meta" / id
    meta.mkdir(parents=True)
    said = {"Name": name, "Metadata": {}, "Endpoints": {"docker": {"Host": host, "SkipTLSVerify": False}}}
    (meta / "meta.json").write_text(json.dumps(said))
    if certificates is not None:
        shutil.copytree(certificates, config / "contexts" / "tls" / id / "docker")
    (config / "config.json").write_text(json.dumps({"auths": {}, "currentContext": name}))


def test_K17_RB62_a_docker_context_with_certificates_of_its_own(remote: Remote, tmp_path: Path) -> None:
    config = tmp_path / "docker"
    make_context(config, "far", remote.address, remote.folder)
    variables = {"DOCKER_CONFIG": str(config), "DOCKER_HOST": "", "DOCKER_TLS_VERIFY": "", "DOCKER_CONTEXT": ""}
    entries = [remote.entry("box")]
    first = RunningGateway(tmp_path, entries, env=variables)
    try:
        assert first.call("box", "echo", {"text": "x"}) == "x"
    finally:
        first.kill()
    assert remote.engine.containers()
    with RunningGateway(tmp_path, entries, env=variables) as second:
        wait_until(lambda: not remote.engine.containers(), SLOW)
        second.wait_for_line("which a killed gateway has left")
    with RunningGateway(tmp_path, entries, env={**variables, "DOCKER_CONTEXT": "lost"}) as gateway:
        assert "docker context 'lost' can't be used: " in gateway.failing("box"), "and no other engine is taken"


def test_K17_an_address_that_needs_ssh_says_what_to_do(remote: Remote, tmp_path: Path) -> None:
    config = tmp_path / "docker"
    make_context(config, "shell", "ssh://ada@engine.example.com", None)
    variables = {"DOCKER_CONFIG": str(config), "DOCKER_HOST": "", "CONTAINER_HOST": "ssh://ada@x/run/podman.sock"}
    entries = [remote.entry("box"), remote.entry("pod", runtime={"type": "podman"})]
    entries.append(remote.entry("own", runtime={"host": "ssh://ada@engine.example.com"}))
    with RunningGateway(tmp_path, entries, env=variables) as gateway:
        for id, source in (("box", "docker context 'shell'"), ("pod", "CONTAINER_HOST"), ("own", "host")):
            assert f"{source} ssh:// is not supported; forward the engine's socket (ssh -L)" in gateway.failing(id)


# ----------------------------------------------------------------------------------------------------------------- HTTP
def test_K17_D1_a_port_is_reached_at_the_engines_own_address(remote: Remote, tmp_path: Path) -> None:
    args = ("/app/anywhere.py", "/app/peer_server.py", "--era", "modern", "--http")
    with socket.create_server((HOST, 0)) as listening:
        free = listening.getsockname()[1]
    entries = [
        remote.entry("web", *args, "8080", runtime={"port": 8080}),
        remote.entry("host", *args, str(free), runtime={"port": free, "network": "host"}),
    ]
    with RunningGateway(tmp_path, entries, env=remote.variables()) as gateway:
        for id in ("web", "host"):
            assert gateway.rest(id, "tools/list")["result"]["tools"]
        (container,) = remote.engine.containers("open-mcp-gateway.server=web")
        (published,) = container["Ports"]
        assert published["IP"] == HOST, "nowhere else"
        (shown,) = gateway.json("GET", "/servers/web")["instances"]
        assert shown["url"] == f"http://{HOST}:{published['PublicPort']}/mcp"
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", published["PublicPort"]), 5):
            pass
        (shown,) = gateway.json("GET", "/servers/host")["instances"]
        assert shown["url"] == f"http://{HOST}:{free}/mcp"
    assert not remote.engine.containers()


def test_K17_RB60_an_engine_behind_tls_that_is_killed_and_comes_back(remote: Remote, tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [remote.entry("box")], env=remote.variables()) as gateway:
        assert gateway.call("box", "echo", {"text": "x"}) == "x"
        remote.engine.kill()
        wait_until(lambda: gateway.json("GET", "/servers/box")["status"] != "running", 3.5)
        gateway.wait_for_line(f"the Docker engine at {remote.address} went away")
        remote.engine.start()
        assert gateway.call("box", "echo", {"text": "again"}) == "again"
        wait_until(lambda: len(remote.engine.containers()) == 1, SLOW)
    assert not remote.engine.containers()


async def test_K17_RB61_an_engine_that_does_not_have_the_address_by_which_it_is_reached(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a translated address: nothing is published where nobody asked for it."""

    async def elsewhere(engine: Any) -> str:
        return "203.0.113.1"

    monkeypatch.setattr(plan, "_address_of", elsewhere)
    spec = DockerSpec(IMAGE, args=("/app/peer_server.py", "--http", "8080"), pull="never", port=8080)
    around = Surroundings("web", {}, stop_grace=1.0, environ=remote.variables())
    assert RUNTIME.open is not None
    with pytest.raises(StartFailed) as caught:
        async with RUNTIME.open(spec, around):
            pass
    text = caught.value.message
    assert "cannot assign requested address (the engine's machine does not have 203.0.113.1" in text, text
    assert "with network: host, or a network that the gateway is on, nothing need be published" in text
    assert not remote.engine.containers()


def test_K17_K23_podman_at_an_address_and_at_the_users_own_socket(
    engine_named: Callable[[str], Engine], tmp_path: Path
) -> None:
    podman = engine_named("podman")
    assert isinstance(podman, PodmanEngine)
    args = ("/app/anywhere.py", "/app/peer_server.py", "--era", "modern", "--http", "8080")
    keys = {"type": "podman", "image": IMAGE, "pull": "never"}
    entries: list[dict[str, Any]] = [
        {"id": "box", "runtime": keys},
        {"id": "web", "runtime": {**keys, "args": args, "port": 8080}},
    ]
    with podman.at_port(HOST) as address:
        with RunningGateway(tmp_path, entries, env={"CONTAINER_HOST": address}) as gateway:
            assert gateway.call("box", "big", {"bytes": 5_000_000}) == "x" * 5_000_000
            assert gateway.rest("web", "tools/list")["result"]["tools"]
            (shown,) = gateway.json("GET", "/servers/web")["instances"]
            assert shown["url"].startswith(f"http://{HOST}:") and shown["engine"] == address
        assert not podman.containers()
    own = tmp_path / "run" / "podman" / "podman.sock"
    own.parent.mkdir(parents=True)
    own.symlink_to(podman.socket)
    variables = {"CONTAINER_HOST": "", "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    with RunningGateway(tmp_path, entries[:1], env=variables) as gateway:
        assert gateway.call("box", "echo", {"text": "mine"}) == "mine"
        assert gateway.json("GET", "/servers/box")["instances"][0]["engine"] == f"unix://{own}"
    assert not podman.containers()


def test_K23_RB65_rootless_podman_is_found_and_tells_what_it_does_not_limit(
    engine_named: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine_named("podman")  # skips where there is none
    podman = RootlessPodman()
    try:
        keys = {"type": "podman", "image": IMAGE, "pull": "never", "user": 0}
        with socket.create_server(("127.0.0.1", 0)) as listening:
            free = listening.getsockname()[1]
        args = ["/app/peer_server.py", "--era", "modern", "--http", str(free)]
        entries = [
            {"id": "box", "runtime": {**keys, "network": "none"}},
            {"id": "web", "runtime": {**keys, "network": "host", "port": free, "args": args}},
        ]
        variables = {"CONTAINER_HOST": "", "XDG_RUNTIME_DIR": str(podman.runtime)}
        with RunningGateway(tmp_path, entries, env=variables) as gateway:
            assert gateway.call("box", "big", {"bytes": 5_000_000}) == "x" * 5_000_000
            assert gateway.rest("web", "tools/list")["result"]["tools"]
            (shown,) = gateway.json("GET", "/servers/box")["instances"]
            assert shown["engine"] == podman.host
            line = gateway.wait_for_line("does not limit")
            assert "WARN" in line and f"{podman.host} does not limit its memory, CPU and processes" in line
        assert not podman.containers()
    finally:
        podman.close()
