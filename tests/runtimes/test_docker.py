"""What of containers needs no engine: frames, quantities, names, mounts, credentials, what an engine is asked for."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.model import Secret, StringMap
from gateway.runtimes._quantities import memory_bytes, nano_cpus, shown_bytes
from gateway.runtimes.base import Surroundings
from gateway.runtimes.containers.container import Frames, usage
from gateway.runtimes.containers.engine import parse_address
from gateway.runtimes.containers.images import PullProgress, credentials, explain
from gateway.runtimes.containers.mounts import device_of, parse_mount, refusal, resolved
from gateway.runtimes.containers.plan import container_body, parse_env_file
from gateway.runtimes.containers.reference import parse_reference
from gateway.runtimes.containers.spec import limits_of
from gateway.runtimes.docker import RUNTIME, Amounts, DockerSpec, Resources

ROOT = Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------------------------------------------------- the stream
def frame(kind: int, payload: bytes) -> bytes:
    return bytes([kind, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


PIECES = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3]), st.binary(max_size=40)), max_size=20)


@given(PIECES, st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_D3_frames_however_they_are_cut(pieces: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(kind, payload) for kind, payload in pieces)
    frames, out, err, at, turn = Frames(), b"", b"", 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        more, complaints = frames.feed(data[at : at + size])
        out, err, at, turn = out + more, err + complaints, at + size, turn + 1
    assert out == b"".join(payload for kind, payload in pieces if kind < 2)
    assert err == b"".join(payload for kind, payload in pieces if kind > 1)


def test_D3_a_line_over_frames_and_a_frame_of_lines() -> None:
    frames = Frames()
    assert frames.feed(frame(1, b'{"a":') + frame(2, b"noise\n") + frame(1, b" 1}\n")) == (b'{"a": 1}\n', b"noise\n")
    assert frames.feed(frame(1, b"1\n2\n3\n")) == (b"1\n2\n3\n", b"")
    assert frames.feed(frame(1, b"") + frame(1, b"x")) == (b"x", b"")


def test_D3_a_frame_of_any_length_is_not_kept() -> None:
    frames = Frames()
    head = bytes([1, 0, 0, 0]) + b"\xff\xff\xff\xff"
    assert frames.feed(head + b"abc") == (b"abc", b"")
    chunk = bytes(1 << 20)
    for _ in range(64):
        assert frames.feed(chunk) == (chunk, b"")
    assert all(len(value) < 16 for value in vars(frames).values() if isinstance(value, bytes))


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 500 oops", bytes([4, 0, 0, 0, 0, 0, 0, 1, 65]), bytes([1, 0, 1, 0, 0, 0, 0, 1])]
)
def test_D3_what_is_no_such_stream_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no header of a container's stream"):
        Frames().feed(data)


# ---------------------------------------------------------------------------------------------------------- quantities
@pytest.mark.parametrize(
    ("written", "nano"),
    [
        ("500m", 500_000_000),
        (0.5, 500_000_000),
        ("0.5", 500_000_000),
        (2, 2_000_000_000),
        ("1e-1", 100_000_000),
        ("1k", 10**12),
        ("10m", 10_000_000),
        ("100000000n", 100_000_000),
        (".25", 250_000_000),
        ("1.", 10**9),
    ],
)
def test_K22_cpus(written: Any, nano: int) -> None:
    assert nano_cpus(written) == nano


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("512Mi", 512 << 20),
        ("1G", 10**9),
        ("1Gi", 1 << 30),
        (67108864, 1 << 26),
        ("1e9", 10**9),
        ("1E1", None),
        ("1.5Gi", 3 << 29),
        ("8000001k", 8000001000),
        ("123456789012345m", 123456789013),
        ("0.0000001Pi", 112589991),
    ],
)
def test_K22_memory(written: Any, count: int | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match="at least 6Mi"):
            memory_bytes(written)
    else:
        assert memory_bytes(written) == count


@pytest.mark.parametrize(
    "written", ["", "x", "1 Gi", "-1", "1GiB", "5mm", "0x10", "1e", "inf", "nan", "\uff11Gi", "1e99Gi", "."]
)
def test_K22_what_is_no_quantity(written: str) -> None:
    with pytest.raises(ValueError, match=r"is no quantity such as|is too much"):
        memory_bytes(written)
    with pytest.raises(ValueError, match=r"is no quantity such as|is too much"):
        nano_cpus(written)


def test_K22_what_is_too_little_or_too_much() -> None:
    with pytest.raises(ValueError, match="did you mean Mi instead of m"):
        memory_bytes("512m")
    with pytest.raises(ValueError, match="at least 10m"):
        nano_cpus("1m")
    with pytest.raises(ValueError, match="too much"):
        memory_bytes("99999999E")
    assert shown_bytes(512 << 20) == "512 MiB" and shown_bytes(1 << 30) == "1 GiB" and shown_bytes(5) == "5 bytes"


def test_K22_the_limits_of_an_entry_and_its_defaults() -> None:
    assert limits_of(DockerSpec("x")) == (10**9, 1 << 30, 256)
    limits = Amounts(cpu="250m", memory="64Mi", pids=5)
    assert limits_of(DockerSpec("x", resources=Resources(limits=limits))) == (250_000_000, 64 << 20, 5)


# ----------------------------------------------------------------------------------------------------------- references
@pytest.mark.parametrize(
    ("text", "name", "tag", "domain", "path"),
    [
        ("box", "box", "latest", "docker.io", "library/box"),
        ("acme/box:1", "acme/box", "1", "docker.io", "acme/box"),
        ("ghcr.io/acme/box:1.2-x", "ghcr.io/acme/box", "1.2-x", "ghcr.io", "acme/box"),
        ("localhost/box", "localhost/box", "latest", "localhost", "box"),
        ("127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000/a/b/c", "t", "127.0.0.1:5000", "a/b/c"),
        ("[::1]:5000/box", "[::1]:5000/box", "latest", "[::1]:5000", "box"),
        ("a/b@sha256:" + "0" * 64, "a/b", "sha256:" + "0" * 64, "docker.io", "a/b"),
        ("a/b:t@sha256:" + "0" * 64, "a/b", "sha256:" + "0" * 64, "docker.io", "a/b"),
        ("sha256:" + "a" * 64, "sha256:" + "a" * 64, "", "", ""),
    ],
)
def test_K17_names_of_images(text: str, name: str, tag: str, domain: str, path: str) -> None:
    found = parse_reference(text)
    assert (found.name, found.tag, found.domain, found.path) == (name, tag, domain, path)


@pytest.mark.parametrize(
    "text", ["", "a b", "Box/x:1 ", "a//b", "-a", "a:", "a@sha256:12", "http://x/y", "a/b:t:u", "é"]
)
def test_K17_what_is_no_name_of_an_image(text: str) -> None:
    with pytest.raises(ValueError, match="is no name of an image"):
        parse_reference(text)


# -------------------------------------------------------------------------------------------------------------- mounts
@pytest.mark.parametrize(
    "text",
    [
        "/a",
        "/a:",
        ":/b",
        "/a:b",
        "a/b:/c",
        "/a:/b:rx",
        "/a:/b:ro,rw",
        "/a:/b:shared",
        "/a:/",
        "/a:/b/../..",
        "/a:/b:ro:z",
        "/a:/b:ro,ro",
        "\0:/b",
        "-x:/b",
        "$HOME:/b",
        "~x:/b",
    ],
)
def test_K19_what_is_no_mount(text: str) -> None:
    with pytest.raises(ValueError):
        parse_mount(text)


def test_K19_mounts() -> None:
    mount = parse_mount("/a b:/c:ro,z")
    assert (mount.source, mount.target, mount.read_only, mount.options, mount.named) == ("/a b", "/c", True, "z", False)
    assert parse_mount("notes:/data").named and not parse_mount("./notes:/data").named
    assert not parse_mount("/a:/b").read_only, "rw unless :ro, as Docker"
    assert resolved("~/x", Path("/cat"), "/home/u") == "/home/u/x"
    assert resolved("./x", Path("/cat"), "/home/u") == "/cat/x"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/etc",
        "/etc/ssl/certs",
        "/proc",
        "/proc/1/fd",
        "/sys/fs",
        "/dev/shm",
        "/root",
        "/root/x",
        "/boot",
        "/home",
        "/home/ada/.ssh",
        "/srv/x/.aws/credentials",
        "/home/ada/.config/gcloud",
        "/run",
        "/var",
        "/var/lib/docker/volumes",
        "/run/docker.sock",
        "/run/podman",
        "/data/eng",
        "/data/eng/d.sock",
        "/data",
        "/ETC",
        "/srv/.SSH",
    ],
)
def test_K19_places_that_hand_over_the_machine_are_refused(path: str) -> None:
    environ = {"HOME": "/home/ada"}
    assert refusal(path, None, ["/data/eng/d.sock"], environ)
    assert not refusal(path, ["/"], ["/data/eng/d.sock"], environ), "unless it is allowed by name"
    assert not refusal(path, [path], ["/data/eng/d.sock"], environ)


@pytest.mark.parametrize("path", ["/srv/data", "/home/ada/work", "/opt", "/etcetera", "/var/lib/app", "/usr/share/x"])
def test_K19_other_places_are_fine(path: str) -> None:
    assert refusal(path, None, ["/data/eng/d.sock"], {"HOME": "/home/ada"}) == ""
    assert "names neither it" in refusal(path, ["/srv/other"], [], {}), "when it is set, only what it names"
    assert refusal(path, ["/srv/other", path + "/"], [], {}) == ""


def test_K19_links_and_sockets_are_seen_through(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/etc")
    (tmp_path / "b").symlink_to("a")
    assert resolved(str(tmp_path / "b" / "ssl"), tmp_path, "") == os.path.realpath("/etc/ssl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "any-name"))
        assert refusal(str(tmp_path / "any-name"), None, [], {}) == "it is a socket"


def test_K19_a_named_volume_with_driver_options_is_what_it_leads_to() -> None:
    assert device_of({"Driver": "local", "Options": None}) == ""
    assert device_of({"Driver": "local", "Options": {"type": "none", "o": "bind", "device": "/etc"}}) == "/etc"
    assert device_of({"Driver": "local", "Options": {"type": "nfs", "o": "addr=x", "device": ":/x"}}) is None
    assert device_of({"Driver": "evil"}) is None
    assert device_of({"Driver": "local", "Options": {"type": "tmpfs", "device": "tmpfs"}}) == ""


# ------------------------------------------------------------------------------------------------------------- env_file
def test_K21_env_files() -> None:
    data = b"\xef\xbb\xbf# comment\n\nA=1\r\n  B = with space \nC='quoted'\nD=x=y\nE=\n"
    with pytest.raises(ValueError, match="line 4: what is before = is no name"):
        parse_env_file(data)
    assert parse_env_file(data.replace(b"B =", b"B=")) == {
        "A": "1",
        "B": " with space ",
        "C": "'quoted'",
        "D": "x=y",
        "E": "",
    }
    for bad, text in (
        (b"A", "line 1: there is no = in it"),
        (b"A=\0", "NUL"),
        (b"A=\xff", "UTF-8"),
        (b"=x", "no name"),
    ):
        with pytest.raises(ValueError, match=text):
            parse_env_file(bad)


# ---------------------------------------------------------------------------------------------------------- the request
def test_RB65_what_an_engine_is_asked_for() -> None:
    body = container_body(DockerSpec("acme/box:1"), {"A": "1"}, [], {"l": "m"}, (10**9, 1 << 30, 256), "127.0.0.1")
    host = body["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and host["CapAdd"] == [] and host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"], host["PidsLimit"]) == (1 << 30, 1 << 30, 10**9, 256)
    assert host["Init"] is True and host["Binds"] == [] and host["LogConfig"] == {"Type": "none"}
    assert "Privileged" not in host and "NetworkMode" not in host and "PortBindings" not in host
    assert body["Healthcheck"] == {"Test": ["NONE"]} and body["Env"] == ["A=1"] and body["Labels"] == {"l": "m"}
    assert not {"Cmd", "Entrypoint", "User", "WorkingDir", "ExposedPorts"} & set(body), "the image's own"
    assert body["Tty"] is False and body["OpenStdin"] and body["StdinOnce"]


def test_K17_K20_every_key_arrives() -> None:
    spec = DockerSpec(
        "acme/box:1",
        command="serve",
        args=("-v",),
        entrypoint="",
        network="n1",
        user=1000,
        working_dir="/w",
        resources=Resources(Amounts(cpu="250m", memory="64Mi"), Amounts(cpu=2)),
        read_only=True,
        tmpfs=("/tmp:size=1m", "/x"),
        cap_add=("NET_RAW",),
        port=8080,
        init=False,
    )
    body = container_body(spec, {}, ["/a:/b:ro"], {}, limits_of(spec), "127.0.0.1")
    host = body["HostConfig"]
    assert body["Cmd"] == ["serve", "-v"] and body["Entrypoint"] == [""] and body["User"] == "1000"
    assert body["WorkingDir"] == "/w" and not body["OpenStdin"]
    assert host["NetworkMode"] == "n1" and "PortBindings" not in host, "its own address is used there"
    assert host["Tmpfs"] == {"/tmp": "size=1m", "/x": ""} and host["ReadonlyRootfs"] and host["Init"] is False
    assert (host["NanoCpus"], host["CpuShares"], host["MemoryReservation"]) == (2 * 10**9, 256, 64 << 20)
    assert host["CapAdd"] == ["NET_RAW"] and host["CapDrop"] == ["ALL"] and host["Binds"] == ["/a:/b:ro"]
    published = container_body(DockerSpec("x", port=80), {}, [], {}, (1, 1, 1), "127.0.0.1")["HostConfig"][
        "PortBindings"
    ]
    assert published == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"image": "A B"}, "image 'A B' is no name of an image"),
        ({"volumes": ("/a",)}, "volumes: '/a' is not host:container"),
        ({"network": "container:abc"}, "network 'container:abc' is neither"),
        ({"container_name": "a/b"}, "container_name takes"),
        ({"port": 80, "network": "none"}, "port needs a network"),
        ({"port": 0}, "port must be between"),
        ({"path": "mcp"}, "path must begin with /"),
        ({"working_dir": "x"}, "working_dir must be an absolute path"),
        ({"user": "a b"}, "user is a name or number"),
        ({"platform": "Linux/amd64"}, "platform is written os/architecture"),
        ({"tmpfs": ("tmp",)}, "tmpfs: 'tmp' must be an absolute path"),
        ({"cap_add": ("net-raw",)}, "cap_add: 'net-raw' is no capability"),
        (
            {"labels": StringMap((("open-mcp-gateway.instance", "x"),))},
            "labels: 'open-mcp-gateway.instance' is empty or one",
        ),
    ],
)
def test_K17_K22_mistakes_begin_with_their_key(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        DockerSpec(**{"image": "x", **keys})
    assert str(caught.value).startswith(text)


def test_K17_a_mistake_in_a_variable_is_told_at_the_start_only() -> None:
    spec = DockerSpec(Secret("${IMAGE}", "A B"))
    with pytest.raises(ValueError, match="no name of an image"):
        spec.check()
    for keys, text in (
        ({"cpu": "x"}, "cpu: 'x' is no"),
        ({"memory": "5"}, "memory: must be"),
        ({"pids": 0}, "pids must"),
    ):
        with pytest.raises(ValueError, match=text):
            Amounts(**keys)
    with pytest.raises(ValueError, match="requests can't hold pids"):
        Resources(requests=Amounts(pids=5))


def test_RB65_check_names_what_is_relaxed(tmp_path: Path) -> None:
    assert RUNTIME.advice is not None
    around = Surroundings("box", {}, catalog_dir=tmp_path, environ={"HOME": "/home/ada"})
    assert list(RUNTIME.advice(DockerSpec("x", volumes=("./d:/d:ro", "cache:/c:ro")), around)) == []
    limits = Amounts(cpu=4, memory="4Gi", pids=1000)
    spec = DockerSpec(
        "x",
        volumes=("./d:/d", "/etc:/e:ro"),
        network="host",
        cap_add=("NET_RAW",),
        init=False,
        env_file="no.env",
        resources=Resources(limits=limits),
    )
    notes = list(RUNTIME.advice(spec, around))
    assert [note.partition(" ")[0] for note in notes] == [
        "volumes:",
        "volumes:",
        "network:",
        "cap_add",
        "init:",
        "resources",
        "env_file",
    ]
    assert "./d:/d can be written to" in notes[0] and "/etc:/e:ro is refused" in notes[1]
    assert "4 CPUs, 4 GiB of memory, 1000 processes" in notes[5]


# -------------------------------------------------------------------------------------------------------------- engines
def test_addresses_of_engines() -> None:
    assert parse_address("unix:///run/d.sock", {}).path == "/run/d.sock"
    plain = parse_address("tcp://eng:2375", {})
    assert (plain.host, plain.port, plain.certificates, plain.local) == ("eng", 2375, None, False)
    secure = parse_address("tcp://eng", {"DOCKER_TLS_VERIFY": "1", "HOME": "/h"})
    assert (secure.port, secure.certificates, secure.where) == (2376, "/h/.docker", "tcp://eng:2376")
    assert parse_address("tcp://[::1]:5", {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": "/c"}).certificates == "/c"
    for bad in ("ssh://x", "npipe://x", "unix://", "tcp://", "tcp://u@h:1", "tcp://h:x", "/run/d.sock", "tcp://h:1/x"):
        with pytest.raises(ValueError):
            parse_address(bad, {})


# ---------------------------------------------------------------------------------------------------------------- usage
V1 = {
    "memory_stats": {
        "usage": 30_000_000,
        "max_usage": 40_000_000,
        "limit": 67108864,
        "stats": {"cache": 9_000_000, "total_inactive_file": 8_000_000, "inactive_file": 1, "total_rss": 20_000_000},
    },
    "cpu_stats": {"cpu_usage": {"total_usage": 1_234_567_890, "percpu_usage": [1, 2]}, "system_cpu_usage": 5},
    "pids_stats": {"current": 3, "limit": 256},
}
V2 = {
    "memory_stats": {
        "usage": 30_000_000,
        "limit": 67108864,
        "stats": {"anon": 1, "file": 9, "inactive_file": 5_000_000},
    },
    "cpu_stats": {"cpu_usage": {"total_usage": 90_000_000, "usage_in_kernelmode": 1}, "online_cpus": 2},
    "pids_stats": {"current": 2, "limit": 18446744073709551615},
}


def test_usage_of_both_kinds_of_cgroups() -> None:
    assert usage(V1) == {"memory_bytes": 22_000_000, "memory_limit_bytes": 67108864, "cpu_seconds": 1.23, "pids": 3}
    assert usage(V2) == {"memory_bytes": 25_000_000, "memory_limit_bytes": 67108864, "cpu_seconds": 0.09, "pids": 2}
    stopped = {"memory_stats": {}, "cpu_stats": {"cpu_usage": {"total_usage": 0}}, "pids_stats": {}}
    assert usage(stopped) == usage(None) == usage({"memory_stats": None}) == {}


# ------------------------------------------------------------------------------------------------------------- pulling
def test_RB61_progress_of_a_pull() -> None:
    progress = PullProgress("'box'")

    def step(status: str, layer: str, current: int = 0, total: int = 0) -> tuple[str, bool]:
        detail = {"current": current, "total": total} if total else {}
        return progress.feed({"status": status, "id": layer, "progressDetail": detail})

    assert progress.feed({"status": "Pulling from acme/box"}) == ("pulling image 'box'", False)
    assert step("Pulling fs layer", "a") == ("pulling image 'box'", True)
    assert step("Downloading", "a", 1_000_000, 4_000_000) == ("pulling image 'box': 25 % of 4 MB", True)
    assert step("Downloading", "a", 1_000_000, 4_000_000)[1] is False, "it does not get on"
    assert step("Downloading", "b", 1_000_000, 4_000_000) == ("pulling image 'box': 25 % of 8 MB", True)
    assert step("Download complete", "a") == ("pulling image 'box': 62 % of 8 MB", True)
    assert step("Extracting", "a", 2_000_000, 4_000_000)[0] == "extracting image 'box': 25 % of 8 MB"
    for hostile in (
        None,
        5,
        {"status": 5},
        {"status": "x", "id": "y", "progressDetail": {"current": "z", "total": -1}},
    ):
        progress.feed(hostile)
    for number in range(5000):
        step("Downloading", f"l{number}", 1, 2)
    assert len(progress._layers) <= 1000
    assert progress.feed({"errorDetail": {"message": "no\nspace"}, "error": "x"}) == ("", False)
    assert progress.error == "x"


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("pull access denied for x, repository does not exist or may require 'docker login': denied", "needs a login"),
        ("manifest for acme/box:9 not found: manifest unknown: manifest unknown", "no such image or tag"),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", "for this platform"),
        ("failed to register layer: write /x: no space left on device", "no space left"),
        ("dial tcp: lookup registry-1.docker.io: no such host", "can't be reached"),
        ("toomanyrequests: You have reached your pull rate limit", "rate limit"),
        ("Head x: unauthorized: authentication required", "without a valid login (docker login)"),
        ("Get x: http: server gave HTTP response to HTTPS client", "speaks no TLS"),
        ("Get x: tls: first record does not look like a TLS handshake", "speaks no TLS"),
        ("Get x: x509: certificate signed by unknown authority", "does not trust the registry's certificate"),
    ],
)
def test_RB61_an_engines_words_about_a_pull(reason: str, meaning: str) -> None:
    assert meaning in explain(reason) and explain(reason).endswith(reason)


def decoded(header: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(header))


async def test_K17_credentials_from_the_users_files(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.mkdir()
    environ = {
        "DOCKER_CONFIG": str(docker),
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "PATH": "/bin",
    }

    def auth(text: str) -> dict[str, str]:
        return {"auth": base64.b64encode(text.encode()).decode()}

    async def found(image: str, podman: bool = False) -> Any:
        result = await credentials(parse_reference(image), podman=podman, environ=environ)
        return decoded(result.header) if result.header else result.remark

    assert await found("acme/box") == ""
    auths = {
        "https://index.docker.io/v1/": auth("hub:p:w"),
        "ghcr.io": auth("gh:t"),
        "https://old.example/v1/": auth("o:p"),
        "token.example": {"identitytoken": "tok"},
        "broken.example": {"auth": "%%%"},
        "empty.example": {},
    }
    (docker / "config.json").write_text(json.dumps({"auths": auths}))
    assert await found("acme/box") == {
        "username": "hub",
        "password": "p:w",
        "serveraddress": "https://index.docker.io/v1/",
    }
    assert (await found("ghcr.io/a/b"))["username"] == "gh"
    assert (await found("old.example/a/b"))["username"] == "o"
    assert (await found("token.example/a"))["identitytoken"] == "tok"
    assert await found("broken.example/a") == await found("empty.example/a") == await found("other.example/a") == ""
    (tmp_path / "run" / "containers").mkdir(parents=True)
    own = {"auths": {"ghcr.io/acme": auth("narrow:1"), "ghcr.io": auth("wide:1")}}
    (tmp_path / "run" / "containers" / "auth.json").write_text(json.dumps(own))
    assert (await found("ghcr.io/acme/box", podman=True))["username"] == "narrow"
    assert (await found("ghcr.io/else/box", podman=True))["username"] == "wide"
    assert (await found("acme/box", podman=True))["username"] == "hub", "Docker's file is the last resort"
    for text in ("[]", "{", '{"auths": 5, "credHelpers": [], "credsStore": 7}'):
        (docker / "config.json").write_text(text)
        assert await found("acme/box") == ""


async def test_K17_credential_helpers(tmp_path: Path) -> None:
    environ = {
        "DOCKER_CONFIG": str(tmp_path),
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }

    def helper(name: str, script: str) -> None:
        path = tmp_path / f"docker-credential-{name}"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)

    helper("good", """s=$(cat); printf '{"ServerURL":"%s","Username":"u-%s","Secret":"p"}' "$s" "$1" """)
    helper("token", """printf '{"Username":"<token>","Secret":"t"}'""")
    helper("none", "echo 'credentials not found in native keychain'; exit 1")
    helper("bad", "echo nonsense")
    helper("failing", "exit 3")

    async def found(config: dict[str, Any], image: str = "ghcr.io/a/b") -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = await credentials(parse_reference(image), podman=False, environ=environ)
        return decoded(result.header) if result.header else result.remark

    assert (await found({"credsStore": "good"}))["username"] == "u-get"
    assert (await found({"credsStore": "good"}, "acme/box"))["serveraddress"] == "https://index.docker.io/v1/"
    assert (await found({"credHelpers": {"ghcr.io": "token"}, "credsStore": "good"}))["identitytoken"] == "t"
    assert await found({"credsStore": "none"}) == ""
    assert "answers what is no credential" in await found({"credsStore": "bad"})
    assert "exit code 3" in await found({"credsStore": "failing"})
    assert "is not on PATH" in await found({"credsStore": "absent"})
    assert "no usable name" in await found({"credsStore": "../../bin/sh"})


async def test_K17_a_credential_helper_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runtimes.containers.images.HELPER_LIMIT", 0.3)
    path = tmp_path / "docker-credential-slow"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    (tmp_path / "config.json").write_text('{"credsStore": "slow"}')
    environ = {"DOCKER_CONFIG": str(tmp_path), "HOME": "/", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with trio.fail_after(20):
        found = await credentials(parse_reference("a/b"), podman=False, environ=environ)
    assert "no answer within 0.3 s" in found.remark


# --------------------------------------------------------------------------------------------------------------- check
def test_RB65_K19_check_prints_notes(tmp_path: Path) -> None:
    runtime = {"type": "docker", "image": "acme/box:1", "volumes": ["/etc:/e", "./d:/d"], "network": "host"}
    (tmp_path / "catalog.yaml").write_text(json.dumps({"servers": [{"id": "box", "runtime": runtime}]}))
    command = [sys.executable, str(ROOT / "gateway"), "check", "--catalog", str(tmp_path / "catalog.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "OK: 1 servers" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: server 'box': ")]
    assert len(notes) == 3, done.stderr
    assert "/etc:/e is refused, and it will not start: that is the machine's own (/etc)" in notes[0]
    (tmp_path / "config.yaml").write_text(json.dumps({"docker": {"allowed_paths": ["/etc"]}}))
    done = subprocess.run(
        [*command, "--config", "config.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "/etc:/e can be written to by the server" in done.stderr
    assert "./d:/d is refused, and it will not start: docker.allowed_paths names neither" in done.stderr
