"""Rows D2-D6 and D8, K17-K23, RB60-RB62, RB65: servers in containers behind a real gateway, on real engines."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from actors import wait_until
from engines import IMAGE, DockerEngine, Engine
from running import HttpClient, RunningGateway, echo_entry

pytestmark = pytest.mark.real

SLOW = 40.0
"""Seconds for whatever a busy machine may take for a container."""


def actor(engine: Engine, id: str, **more: Any) -> dict[str, Any]:
    """An entry for fixtures/actor.py."""
    return engine.entry(id, "/app/actor.py", "/tmp/journal", era="legacy", **more)


def act(gateway: RunningGateway, id: str, code: str) -> str:
    """Run code in an actor: its answer."""
    return gateway.call(id, "act", {"code": code})


def instances(gateway: RunningGateway, id: str) -> list[dict[str, Any]]:
    return list(gateway.json("GET", f"/servers/{id}")["instances"])


def of_server(engine: Engine, id: str) -> list[dict[str, Any]]:
    return engine.containers(f"open-mcp-gateway.server={id}")


@pytest.fixture(autouse=True)
def clean(engine_named: Callable[[str], Engine]) -> Iterator[None]:
    """What a failed test leaves is not the next one's."""
    yield
    for engine in engine_named.running.values():  # type: ignore[attr-defined]
        for container in engine.containers():
            engine.api("DELETE", f"/containers/{container['Id']}?force=1&v=1")


def no_containers(engine: Engine) -> bool:
    return not engine.containers()


# ------------------------------------------------------------------------------------------------- what everybody wants
def test_K17_D1_a_server_in_a_container_answers_and_is_seen(engine: Engine, tmp_path: Path) -> None:
    entry = engine.entry("box", env={"GREETING": "hello"})
    with RunningGateway(tmp_path, [entry, echo_entry("here")]) as gateway:
        assert gateway.call("box", "echo", {"text": "contained"}) == "contained"
        info = json.loads(gateway.call("box", "info"))
        assert info["env"]["GREETING"] == "hello" and info["uid"] == 1000
        client = HttpClient(gateway, "/servers/box/mcp")
        assert "echo" in [tool["name"] for tool in client.request("tools/list")["result"]["tools"]]
        (shown,) = instances(gateway, "box")
        (container,) = of_server(engine, "box")
        assert shown["container_id"] == container["Id"]
        assert shown["container"] == container["Names"][0].lstrip("/")
        assert shown["container"].startswith("mcp-box-")
        assert shown["image_id"].removeprefix("sha256:") == container["ImageID"].removeprefix("sha256:")
        assert 1_000_000 < shown["memory_bytes"] < 200_000_000
        assert shown["cpu_seconds"] > 0 and shown["pids"] >= 1
        gateway.json("POST", "/servers/box/stop")
        wait_until(lambda: not of_server(engine, "box"), SLOW)


@pytest.mark.parametrize(("name", "era"), [("20.10", "legacy"), ("newer", "modern"), ("podman", "modern")])
def test_K17_D1_a_server_over_http_in_a_container(
    name: str, era: str, engine_named: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_named(name)
    args = ("/app/anywhere.py", "/app/peer_server.py", "--era", era, "--http", "8080")
    with RunningGateway(tmp_path, [engine.entry("web", *args, runtime={"port": 8080})]) as gateway:
        tools = gateway.rest("web", "tools/list")["result"]["tools"]
        assert tools
        (shown,) = instances(gateway, "web")
        assert shown["url"].startswith("http://127.0.0.1:") and shown["era"] == era
        assert shown["memory_bytes"] > 0
        (container,) = of_server(engine, "web")
        engine.api("DELETE", f"/containers/{container['Id']}?force=1&v=1")
        wait_until(lambda: gateway.json("GET", "/servers/web")["status"] != "running", 3)
        assert gateway.rest("web", "tools/list")["result"]["tools"] == tools
    assert no_containers(engine)


def test_K20_a_network_of_the_engine(docker: Engine, tmp_path: Path) -> None:
    args = ("/app/anywhere.py", "/app/peer_server.py", "--era", "modern", "--http", "8080")
    name = f"mcp-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    docker.api("POST", "/networks/create", {"Name": name})
    try:
        entries = [
            docker.entry("web", *args, runtime={"port": 8080, "network": name}),
            docker.entry("lost", runtime={"network": "no-such-network"}),
            docker.entry("host", *args[:-1], str(free), runtime={"port": free, "network": "host"}),
        ]
        with RunningGateway(tmp_path, entries) as gateway:
            assert gateway.rest("web", "tools/list")["result"]["tools"]
            (container,) = of_server(docker, "web")
            address = docker.inspect(container["Id"])["NetworkSettings"]["Networks"][name]["IPAddress"]
            assert instances(gateway, "web")[0]["url"] == f"http://{address}:8080/mcp"
            assert not container["Ports"], "nothing is published"
            assert "no-such-network" in gateway.failing("lost")
            assert gateway.rest("host", "tools/list")["result"]["tools"]
        assert no_containers(docker)
    finally:
        docker.api("DELETE", f"/networks/{name}")


def test_RB01_a_server_that_ends_at_once_tells_why(docker: Engine, tmp_path: Path) -> None:
    entries = [
        docker.entry("early", env={"ECHO_EXIT_AT_START": "4", "KEY": "${CONTAINER_SECRET}"}),
        docker.entry("web", "/app/no_such_file.py", runtime={"port": 8080}),
        docker.entry("typo", runtime={"entrypoint": "/no/such/program"}),
        docker.entry("bare", runtime={"entrypoint": "/no/such/program", "init": False}),
        docker.entry("gone", runtime={"image": "acme/no-such-image:1", "pull": "never"}),
        docker.entry("secret", "-c", "import os; exit('no: ' + os.environ['KEY'])", env={"KEY": "${CONTAINER_SECRET}"}),
    ]
    with RunningGateway(tmp_path, entries, env={"CONTAINER_SECRET": "hush-hush-hush"}) as gateway:
        assert "container exited with code 4: exiting as asked" in gateway.failing("early")
        assert "container exited with code 2: " in gateway.failing("web")
        assert "/no/such/program failed: No such file or directory" in gateway.failing("typo")
        assert "container can't be started: " in gateway.failing("bare")
        assert "image 'acme/no-such-image:1' is not on the Docker engine" in gateway.failing("gone")
        assert "no: ${CONTAINER_SECRET}" in gateway.failing("secret")
        assert "hush-hush-hush" not in "".join(gateway.lines)
    assert no_containers(docker)


# -------------------------------------------------------------------------------------------------------- D2: how many
def test_D2_many_first_calls_start_one_container(docker: Engine, tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [docker.entry("box", max_connections_per_server=50)]) as gateway:
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            calls = [pool.submit(gateway.call, "box", "echo", {"text": f"t{n}"}) for n in range(50)]
            assert [call.result() for call in calls] == [f"t{n}" for n in range(50)]
        assert len(of_server(docker, "box")) == 1
        assert len([line for line in gateway.lines if "Starting server" in line]) == 1
    assert no_containers(docker)


def test_D2_P7_each_session_has_a_container_and_nothing_is_left(docker: Engine, tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [docker.entry("own", isolation="session", start_timeout_seconds=120)]) as gateway:
        clients = [HttpClient(gateway, "/servers/own/mcp") for _ in range(20)]
        assert len({client.session["Mcp-Session-Id"] for client in clients}) == 20
        asked = [client.request("tools/call", {"name": "info", "arguments": {}}) for client in clients]
        hosts = {json.loads(reply["result"]["content"][0]["text"])["host"] for reply in asked}
        assert len(hosts) == 20 == len(of_server(docker, "own"))
        assert len({container["Names"][0] for container in of_server(docker, "own")}) == 20
        for client in clients[:10]:
            gateway.http("DELETE", client.path, headers=client.session)
        wait_until(lambda: len(of_server(docker, "own")) == 10, SLOW)
        assert gateway.stop() == 0
    assert no_containers(docker)


def test_P7_RB62_D2_what_a_killed_gateway_leaves_is_removed_by_the_next_one(docker: Engine, tmp_path: Path) -> None:
    web = ("/app/anywhere.py", "/app/peer_server.py", "--era", "modern", "--http", "8080")
    fixed = f"mcp-fixed-{os.getpid()}"
    entries = [
        docker.entry("pipe", runtime={"container_name": fixed}, env={"ECHO_IGNORE_TERM": "1"}),
        docker.entry("web", *web, runtime={"port": 8080}),
    ]
    labels = {"open-mcp-gateway.instance": "f" * 32, "open-mcp-gateway.server": "pipe"}
    body = {"Image": IMAGE, "Labels": labels, "OpenStdin": True}
    foreign = docker.api("POST", "/containers/create?name=foreign", body)["Id"]
    docker.api("POST", f"/containers/{foreign}/start")
    try:
        first = RunningGateway(tmp_path, entries)
        assert first.call("pipe", "echo", {"text": "1"}) == "1"
        assert first.rest("web", "tools/list")["result"]
        first.kill()
        left = {container["Id"] for container in docker.containers()} - {foreign}
        assert len(left) == 2
        with RunningGateway(tmp_path, entries) as second:
            assert second.call("pipe", "echo", {"text": "2"}) == "2", "the fixed name is free again"
            wait_until(lambda: not left & {container["Id"] for container in docker.containers()}, SLOW)
            assert docker.inspect(foreign)["State"]["Running"], "another gateway's container is left alone"
        assert [container["Id"] for container in docker.containers()] == [foreign]
        assert not list((tmp_path / "state" / "instances").iterdir())
    finally:
        docker.api("DELETE", f"/containers/{foreign}?force=1")


def test_K18_RB62_a_name_that_is_taken(docker: Engine, tmp_path: Path) -> None:
    taken = docker.api("POST", "/containers/create?name=taken-by-others", {"Image": IMAGE})["Id"]
    try:
        entries = [docker.entry("box", runtime={"container_name": "taken-by-others"})]
        with RunningGateway(tmp_path, entries) as gateway:
            text = gateway.failing("box")
            assert "container_name 'taken-by-others' is taken by a container of somebody else" in text
            docker.api("DELETE", f"/containers/{taken}")
            gateway.json("POST", "/servers/box/start")
            assert gateway.call("box", "echo", {"text": "mine"}) == "mine"
            assert instances(gateway, "box")[0]["container"] == "taken-by-others"
    finally:
        wait_until(lambda: no_containers(docker), SLOW)


# ------------------------------------------------------------------------------------------------------ D3: the stream
@pytest.mark.parametrize("name", ["20.10", "newer"])
def test_D3_large_and_many_replies_arrive_whole(
    name: str, engine_named: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_named(name)
    each = 625 if name == "20.10" else 63
    entries = [engine.entry("big", max_message_bytes=33554432), actor(engine, "many", max_connections_per_server=64)]
    with RunningGateway(tmp_path, entries, config={"request_timeout_seconds": 120}) as gateway:
        assert gateway.call("big", "big", {"bytes": 20_000_000}) == "x" * 20_000_000
        act(gateway, "many", "kept['n'] = 0; reply()")
        wrong: list[str] = []

        def client(number: int) -> None:
            http = HttpClient(gateway, "/servers/many/mcp")
            for n in range(each):
                text = f"{number}-{n}-é{'y' * (n % 300)}"
                # Another message before it, and a noisy stderr between them.
                note = "write(json.dumps({'jsonrpc': '2.0', 'method': 'notifications/x'}).encode() + b'\\n')"
                code = f"say('noise ' * 20); {note}; reply({text!r})"
                reply = http.request("tools/call", {"name": "act", "arguments": {"code": code}})
                if reply["result"]["content"][0]["text"] != text:
                    wrong.append(f"{text}: {reply}")

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(client, number) for number in range(16)]:
                done.result()
        assert not wrong, wrong[:3]


# -------------------------------------------------------------------------------------------------- D5: what is limited
def test_D5_RB65_K22_limits_are_applied(engine: Engine, tmp_path: Path) -> None:
    tight = {"limits": {"memory": "64Mi", "cpu": "500m", "pids": 20}}
    entries = [
        actor(engine, "tight", runtime={"resources": tight, "read_only": True, "tmpfs": ["/tmp"], "network": "none"}),
        actor(engine, "plain"),
    ]
    with RunningGateway(tmp_path, entries) as gateway:
        tries = """
found = {}
def attempt(name, what):
    try:
        found[name] = what() or 'done'
    except OSError as error:
        found[name] = type(error).__name__
import socket
status = open('/proc/self/status').read()
found['caps'] = [line.split()[1] for line in status.splitlines() if line.startswith(('CapEff', 'CapBnd'))]
found['privileges'] = [line.split()[1] for line in status.splitlines() if line.startswith('NoNewPrivs')]
attempt('write', lambda: open('/app/x', 'w').close())
attempt('tmp', lambda: open('/tmp/x', 'w').close())
attempt('net', lambda: socket.create_connection(('10.255.255.1', 9), 1).close())
found['interfaces'] = [name for _, name in socket.if_nameindex()]
found['sockets'] = [path for path in ('/var/run/docker.sock', '/run/podman/podman.sock') if os.path.exists(path)]
children = []
def fork():
    for _ in range(60):
        children.append(subprocess.Popen(['sleep', '60']))
attempt('fork', fork)
found['children'] = len(children)
for child in children:
    child.kill(); child.wait()
reply(json.dumps(found))
"""
        seen = json.loads(act(gateway, "tight", tries))
        assert seen["caps"] == ["0" * 16] * 2
        assert seen["privileges"] == ["1"]
        assert seen["write"] == "OSError" and seen["tmp"] == "done", seen
        assert not [name for name in seen["interfaces"] if name.startswith(("eth", "veth", "tap"))]
        assert seen["net"] != "done"
        assert seen["fork"] == "BlockingIOError" and seen["children"] < 20
        assert seen["sockets"] == []
        (container,) = of_server(engine, "tight")
        host = engine.inspect(container["Id"])["HostConfig"]
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (64 << 20, 500_000_000, 20)
        assert host["NetworkMode"] == "none" and host["ReadonlyRootfs"] and not host["Privileged"]

        act(gateway, "plain", "reply()")
        (container,) = of_server(engine, "plain")
        found = engine.inspect(container["Id"])
        host = found["HostConfig"]
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (1 << 30, 1_000_000_000, 256)
        assert host["Init"] is True and not host["Privileged"] and not host["Binds"]
        assert host["LogConfig"]["Type"] == "none"

        text = gateway.failing("tight", "act", code="kept['x'] = bytearray(b'1') * (200 << 20); reply()")
        assert "ut of memory (limit 64 MiB)" in text, text
        assert "does not limit" not in "".join(gateway.lines)


# ---------------------------------------------------------------------------------------------- D6: what is not allowed
def hostile_image(engine: Engine, tag: str) -> None:
    """An image whose metadata asks for all that it can."""
    labels = {"open-mcp-gateway.instance": "0" * 32, "open-mcp-gateway.server": "other"}
    labels["io.docker.server.metadata"] = "x"
    changes = [f"LABEL {name}={value}" for name, value in labels.items()]
    changes += ["VOLUME /data /etc", "ENV DOCKER_HOST=tcp://evil HOSTILE=1", "EXPOSE 8080"]
    changes += ["USER root", 'CMD ["/app/echo_server.py"]']
    id = engine.api("POST", "/containers/create", {"Image": IMAGE, "User": "root"})["Id"]
    repo, _, version = tag.partition(":")
    query = urlencode([("container", id), ("repo", repo), ("tag", version), ("changes", "\n".join(changes))])
    engine.api("POST", f"/commit?{query}", {"StopSignal": "SIGWINCH"})
    engine.api("DELETE", f"/containers/{id}?v=1")


def test_D6_a_hostile_image_changes_nothing(docker: Engine, tmp_path: Path) -> None:
    hostile_image(docker, "hostile:1")
    volumes = {volume["Name"] for volume in docker.api("GET", "/volumes")["Volumes"] or ()}
    keys = {"image": "hostile:1", "labels": {"own": "1"}, "user": 1000}
    entries = [docker.entry("box", runtime=keys, stop_grace_seconds=1)]
    with RunningGateway(tmp_path, entries) as gateway:
        assert gateway.call("box", "echo", {"text": "x"}) == "x"
        (container,) = of_server(docker, "box")
        found = docker.inspect(container["Id"])
        host, labels = found["HostConfig"], found["Config"]["Labels"]
        assert labels["open-mcp-gateway.instance"] != "0" * 32 and labels["own"] == "1"
        assert not host["Binds"] and not host["PortBindings"] and not host["PublishAllPorts"]
        assert not host["Privileged"] and host["CapDrop"] == ["ALL"] and host["Memory"] == 1 << 30
        assert all(mount["Type"] == "volume" and len(mount["Name"]) == 64 for mount in found["Mounts"]), found["Mounts"]
        assert found["Config"]["Healthcheck"]["Test"] == ["NONE"]
        assert found["Config"]["User"] == "1000"
        assert found["Config"]["StopSignal"] == "SIGWINCH", "its own way to be asked to stop, which is bounded"
    assert no_containers(docker)
    assert {volume["Name"] for volume in docker.api("GET", "/volumes")["Volumes"] or ()} == volumes


def test_D6_K19_places_of_the_machine_are_refused_unless_named(docker: DockerEngine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "f").write_text("mine")
    (tmp_path / "data").chmod(0o755)
    (tmp_path / "sly").symlink_to("/etc")
    path = docker.host.removeprefix("unix://")
    volumes = {
        "root": "/:/host:ro",
        "etc": "/etc/ssl:/x:ro",
        "socket": f"{path}:/var/run/docker.sock",
        "above": f"{Path(path).parent}:/x",
        "sly": "./sly:/x:ro",
        "fine": "./data:/data:ro",
        "writable": "./data:/data",
        "missing": "./nowhere:/x",
    }
    entries = [actor(docker, name, runtime={"volumes": [volume]}) for name, volume in volumes.items()]
    with RunningGateway(tmp_path, entries) as gateway:
        for name in ("root", "etc", "socket", "above", "sly"):
            text = gateway.failing(name, "act", code="reply()")
            assert "must not be mounted" in text and "docker.allowed_paths" in text, text
        assert "does not exist" in gateway.failing("missing", "act", code="reply()")
        assert act(gateway, "fine", "reply(open('/data/f').read())") == "mine"
        code = "import errno\ntry:\n open('/data/g', 'w')\nexcept OSError as e:\n reply(errno.errorcode[e.errno])"
        assert act(gateway, "fine", code) == "EROFS"
        status, _, data = gateway.http("GET", "/servers")
        assert status == 200 and len(json.loads(data)) == len(entries)
    config = {"docker": {"allowed_paths": ["/etc/ssl"]}}
    with RunningGateway(tmp_path, entries, config=config) as gateway:
        assert act(gateway, "etc", "reply(str(os.path.isdir('/x/certs')))") in ("True", "False")
        text = gateway.failing("fine", "act", code="reply()")
        assert "docker.allowed_paths names neither it nor a folder above it" in text
    assert no_containers(docker)


def test_K19_K21_volumes_of_the_engine_and_an_env_file(engine: Engine, tmp_path: Path) -> None:
    stamp = os.getpid()
    made = {f"mcp-plain-{stamp}": {}, f"mcp-sly-{stamp}": {"type": "none", "o": "bind", "device": "/etc"}}
    made[f"mcp-memory-{stamp}"] = {"type": "tmpfs", "device": "tmpfs"}
    for name, options in made.items():
        engine.api("POST", "/volumes/create", {"Name": name, "Driver": "local", "DriverOpts": options})
    plain, sly, memory = made
    fresh = f"mcp-fresh-{stamp}"
    (tmp_path / "box.env").write_text("# ours\nCOLOUR=deep blue\nOWN=from the file\n")
    keys = {"env_file": "box.env", "env": {"OWN": "from the entry"}, "user": 0, "working_dir": "/tmp"}
    entries = [
        actor(engine, "box", runtime={**keys, "volumes": [f"{plain}:/data", f"{fresh}:/fresh", f"{memory}:/memory"]}),
        actor(engine, "reader", runtime={"volumes": [f"{plain}:/data:ro"]}),
        actor(engine, "sly", runtime={"volumes": [f"{sly}:/x:ro"]}),
        actor(engine, "lost", runtime={"env_file": "none.env"}),
    ]
    try:
        with RunningGateway(tmp_path, entries) as gateway:
            found = act(gateway, "box", "reply('|'.join([os.environ['COLOUR'], os.environ['OWN'], os.getcwd()]))")
            assert found == "deep blue|from the entry|/tmp"
            code = "[open(f'/{d}/f', 'w').write('kept') for d in ('data', 'fresh', 'memory')]; reply('done')"
            assert act(gateway, "box", code) == "done"
            gateway.json("POST", "/servers/box/stop")
            wait_until(lambda: not of_server(engine, "box"), SLOW)
            gateway.json("POST", "/servers/box/start")
            assert act(gateway, "box", "reply(open('/data/f').read() + open('/fresh/f').read())") == "keptkept"
            code = "import errno\ntry:\n open('/data/g', 'w')\nexcept OSError as e:\n reply(errno.errorcode[e.errno])"
            assert act(gateway, "reader", code) == "EROFS"
            text = gateway.failing("sly", "act", code="reply()")
            assert f"volume '{sly}' is /etc, which must not be mounted" in text, text
            assert "none.env' can't be read: no such file" in gateway.failing("lost", "act", code="reply()")
        assert no_containers(engine)
    finally:
        for name in (*made, fresh):
            engine.api("DELETE", f"/volumes/{name}?force=1")


# ------------------------------------------------------------------------------------------------------ D7: no engine
def test_D7_K28_without_an_engine_the_rest_works(tmp_path: Path) -> None:
    entries = [
        {"id": "box", "runtime": {"type": "docker", "image": "acme/box:1"}},
        {"id": "pod", "runtime": {"type": "podman", "image": "acme/box:1"}},
        {"id": "far", "runtime": {"type": "docker", "image": "acme/box:1", "host": f"unix://{tmp_path}/none.sock"}},
        echo_entry("here"),
    ]
    nowhere = {"DOCKER_HOST": "", "CONTAINER_HOST": "", "XDG_RUNTIME_DIR": f"{tmp_path}/run", "HOME": str(tmp_path)}
    with RunningGateway(tmp_path, entries, env=nowhere) as gateway:
        text = gateway.failing("box")
        assert "no Docker engine can be reached: tried unix:///var/run/docker.sock (" in text
        assert f"unix://{tmp_path}/run/docker.sock (no such file or directory)" in text
        text = gateway.failing("pod")
        own, common = f"unix://{tmp_path}/run/podman/podman.sock (", "unix:///run/podman/podman.sock ("
        assert text.index(own) < text.index(common)
        assert f"unix://{tmp_path}/none.sock (no such file or directory) can't be reached" in gateway.failing("far")
        assert gateway.call("here", "echo", {"text": "still"}) == "still"


# -------------------------------------------------------------------------------------------------------- D8: an edit
def test_D8_an_edited_entry_is_another_container(docker: Engine, tmp_path: Path) -> None:
    docker.api("POST", f"/images/{IMAGE}/tag?repo=mcp-fixtures&tag=2")
    before = [docker.entry("edit"), docker.entry("keep")]
    after = [docker.entry("edit", runtime={"image": "mcp-fixtures:2"}), docker.entry("keep")]
    with RunningGateway(tmp_path, before) as gateway:
        for id in ("edit", "keep"):
            assert gateway.call(id, "echo", {"text": "1"}) == "1"
        old = {id: of_server(docker, id)[0]["Id"] for id in ("edit", "keep")}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(gateway.call, "edit", "sleep", {"seconds": 4})
            time.sleep(0.3)
            gateway.write(after)
            gateway.wait_for_line("Loaded", count=2)
            assert gateway.call("edit", "echo", {"text": "2"}) == "2"
            assert {container["Image"] for container in of_server(docker, "edit")} == {IMAGE, "mcp-fixtures:2"}
            assert running.result() == "slept", "the old one finishes"
        wait_until(lambda: [c["Image"] for c in of_server(docker, "edit")] == ["mcp-fixtures:2"], SLOW)
        assert old["edit"] not in [container["Id"] for container in of_server(docker, "edit")]
        assert [container["Id"] for container in of_server(docker, "keep")] == [old["keep"]]
    assert no_containers(docker)
