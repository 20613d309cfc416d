"""The archive as a user has it: one file, alone in an empty folder, run by each Python 3.11 or newer that is there."""

from __future__ import annotations

import functools
import hashlib
import http.client
import importlib.util
import json
import marshal
import os
import re
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running import StdioClient

import gateway

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
"""Seconds until something that must happen counts as never happening."""

CATALOG = """
servers:
  - id: demo
    runtime: {type: local-process, command: "${MCP_GATEWAY_PYTHON}", args: ["${MCP_GATEWAY_MAIN}", demo-server]}
"""
ECHO = {"name": "echo", "arguments": {"text": "hello"}}
ECHOED = [{"type": "text", "text": "hello"}]
REPLACED = "gateway.pyz was replaced; restart the gateway"


@functools.cache
def pythons() -> dict[str, str]:
    """{"3.12": program} for every Python on the machine, the one that runs the tests first."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    names = [f"python3.{minor}" for minor in range(6, 20)]
    programs = [program for name in names if (program := shutil.which(name))]
    for root in {os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv")} - {""}:
        programs += map(str, sorted(Path(root).glob("versions/*/bin/python3.*[0-9]")))
    for program in programs:
        ask = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.executable)"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            version, real = done.stdout.split("\n")[:2]
            found.setdefault(version, real)
    return found


def supported(version: str) -> bool:
    return int(version.split(".")[1]) >= 11


SUPPORTED = [version for version in pythons() if supported(version)]
TOO_OLD = [version for version in pythons() if not supported(version)]


class Place:
    """An empty folder with nothing but the archive in it, an empty home, and one Python to run it."""

    def __init__(self, pyz: Path, folder: Path, python: str) -> None:
        self.folder, self.python = folder / "place", python
        for each in ("place", "home", "tmp"):
            (folder / each).mkdir()
        self.pyz = self.folder / "gateway.pyz"
        shutil.copy(pyz, self.pyz)
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, *arguments: str, given: str = "", archive: str = "gateway.pyz") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, archive, *arguments],
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder.parent / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [self.python, "./gateway.pyz", *arguments], cwd=self.folder, env=self.environment, stderr=err
            )
        self.started.append(process)
        return process

    def log(self) -> str:
        return (self.folder.parent / "stderr").read_text("utf-8")

    def left(self) -> list[str]:
        """Whatever was written anywhere, besides what the test put there and what is kept in the state folder."""
        root = self.folder.parent
        known = {"place", "home", "tmp", "stderr", "place/gateway.pyz", "place/catalog.yaml"}
        found = {str(path.relative_to(root)) for path in root.rglob("*")} - known
        state = "home/.local/state/open-mcp-gateway"
        return sorted(path for path in found if not (path.startswith(state) or state.startswith(path)))


@pytest.fixture(params=SUPPORTED)
def place(request: pytest.FixtureRequest, gateway_pyz: Path, tmp_path: Path) -> Iterator[Place]:
    yield from make_place(gateway_pyz, tmp_path, pythons()[request.param])


@pytest.fixture
def here(gateway_pyz: Path, tmp_path: Path) -> Iterator[Place]:
    """A place for the Python that runs the tests only."""
    yield from make_place(gateway_pyz, tmp_path, sys.executable)


def make_place(pyz: Path, folder: Path, python: str) -> Iterator[Place]:
    made = Place(pyz, folder, python)
    try:
        yield made
    finally:
        for process in made.started:
            process.kill()
            process.wait()


class Http:
    """``http`` mode, running in a place. In ``more`` of the catalog, PORT is its own port."""

    def __init__(self, place: Place, *options: str, more: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.place = place
        self.write(more)
        self.process = place.start(
            "http", "--catalog", "catalog.yaml", "--listen-addr", f"127.0.0.1:{self.port}", *options
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                assert self.ask("GET", "/health") == (200, {"status": "ok"})
                break
            except ConnectionRefusedError:
                assert self.process.poll() is None, place.log()
                assert time.monotonic() < deadline, place.log()
                time.sleep(0.02)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            sent = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {**sent, **{k.replace("_", "-"): v for k, v in headers.items()}})
            answer = connection.getresponse()
            text = answer.read().decode()
            self.headers = answer.headers
            if answer.headers.get_content_type() == "text/event-stream":
                text = [line[5:] for line in text.splitlines() if line.startswith("data:") and line[5:].strip()][-1]
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def write(self, more: str) -> None:
        """The catalog, with more servers than the demo."""
        (self.place.folder / "catalog.yaml").write_text(CATALOG + more.replace("PORT", str(self.port)))

    def rest(self, server_id: str) -> Any:
        """The reply to one tools/call by server id."""
        body = {"server_id": server_id, "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": ECHO}
        status, reply = self.ask("POST", "/mcp", body)
        assert (status, reply.get("id")) == (502 if "error" in reply else 200, 7), (reply, self.place.log())
        return reply

    def call(self, server_id: str = "demo") -> Any:
        """What one tools/call by server id gives."""
        reply = self.rest(server_id)
        assert "result" in reply, (reply, self.place.log())
        return reply["result"]["content"]

    def search(self, path: str) -> tuple[int, Any]:
        """Status and reply of a search for tools there, in a session of its own."""
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        assert self.ask("POST", path, {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello})[0] == 200
        session = {"Mcp_Session_Id": self.headers["Mcp-Session-Id"], "MCP_Protocol_Version": "2025-11-25"}
        params = {"name": "search_tools", "arguments": {"query": "echo"}}
        return self.ask("POST", path, {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params}, **session)

    def wait_for_line(self, text: str) -> None:
        """Until the log has it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.place.log():
            assert time.monotonic() < deadline, self.place.log()
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, self.place.log()


# ---------------------------------------------------------------- running it


def test_A2_C7_version_and_help(place: Place) -> None:
    printed = place.run("version").stdout
    assert gateway.__version__ in printed
    assert hashlib.sha256((ROOT / ".lock" / "runtime.txt").read_bytes()).hexdigest() in printed
    assert re.search(r"\b([0-9a-f]{40}|unknown)\b", printed)
    for arguments in (["--version"], ["http", "--version"], ["stdio", "--version"], ["stdio", "-V"]):
        done = place.run(*arguments)
        assert (done.returncode, gateway.__version__ in done.stdout) == (0, True), (arguments, done)
    for arguments in (["--help"], ["http", "--help"], ["stdio", "-h"]):
        done = place.run(*arguments)
        assert (done.returncode, "usage" in done.stdout.lower()) == (0, True), (arguments, done)
    assert place.left() == []


def test_A2_check(place: Place) -> None:
    (place.folder / "catalog.yaml").write_text(CATALOG)
    done = place.run("check", "--catalog", "catalog.yaml")
    assert done.returncode == 0, done
    (place.folder / "catalog.yaml").write_text(CATALOG + "  - {display_name: nameless}\n")
    done = place.run("check", "--catalog", "catalog.yaml")
    assert done.returncode == 1, done
    assert "Server at index 1 missing required field: id" in done.stderr
    assert "Traceback" not in done.stderr
    assert place.left() == []


def test_A2_demo_server(place: Place) -> None:
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25"}},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": ECHO},
    ]
    done = place.run("demo-server", given="".join(json.dumps(line) + "\n" for line in lines))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[1])["result"]["content"] == ECHOED
    assert place.left() == []


def test_A2_stdio(place: Place) -> None:
    (place.folder / "catalog.yaml").write_text(CATALOG)
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": "two", "method": "tools/call", "params": ECHO},
    ]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    done = place.run("stdio", "--catalog", "catalog.yaml", "--server", "demo", given=given)
    assert done.returncode == 0, done
    replies = {reply["id"]: reply for line in done.stdout.splitlines() if "id" in (reply := json.loads(line))}
    assert replies[1]["result"]["protocolVersion"] == "2025-11-25"
    assert replies["two"]["result"]["content"] == ECHOED
    assert "Traceback" not in done.stderr
    assert place.left() == []


def test_A2_http(place: Place) -> None:
    http = Http(place)
    assert http.call() == ECHOED
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    initialize = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    status, reply = http.ask("POST", "/servers/demo/mcp", initialize)
    assert (status, reply["result"]["serverInfo"]["name"]) == (200, "open-mcp-gateway-demo")
    session = {"Mcp_Session_Id": http.headers["Mcp-Session-Id"], "MCP_Protocol_Version": "2025-11-25"}
    call = {"jsonrpc": "2.0", "id": "x", "method": "tools/call", "params": ECHO}
    status, reply = http.ask("POST", "/servers/demo/mcp", call, **session)
    assert (status, reply["id"], reply["result"]["content"]) == (200, "x", ECHOED)
    status, servers = http.ask("GET", "/servers")
    assert (status, [each["id"] for each in servers]) == (200, ["demo"])
    http.stop()
    assert "Traceback" not in place.log()
    assert place.left() == []


@pytest.mark.parametrize("rest_first", [False, True])
def test_A2_replaced_while_running(here: Place, rest_first: bool) -> None:
    """A new file in its place: calls, reloads and shutdown go on, and what was never loaded says what happened."""
    http = Http(here)
    assert http.call() == ECHOED
    if rest_first:
        assert http.ask("GET", "/servers")[0] == 200
    other = here.folder / "new"
    other.write_bytes(b"not an archive" + here.pyz.read_bytes()[100_000:])
    other.replace(here.pyz)
    for _ in range(20):
        assert http.call() == ECHOED
    status, answer = http.ask("GET", "/servers")
    if rest_first:
        assert (status, answer[0]["request_count"]) == (200, 21)
    else:
        assert (status, answer["message"]) == (503, REPLACED)
    assert http.ask("GET", "/health")[0] == 200
    assert http.call() == ECHOED
    http.stop()
    assert "Traceback" not in here.log()


FAR = """
  - id: far
    runtime: {type: remote-http, url: "http://127.0.0.1:PORT/servers/demo/mcp"}
"""
BOXES = """
  - id: box
    runtime: {type: docker, image: acme/box, host: "unix:///nowhere/docker.sock"}
  - id: job
    runtime: {type: k8s-job, image: acme/box, namespace: acme}
  - id: service
    runtime: {type: k8s-service, service_name: acme, namespace: acme, port: 80}
  - id: tls
    runtime: {type: remote-http, url: "https://127.0.0.1:PORT/servers/demo/mcp"}
"""
KUBECONFIG = """
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: nowhere, context: {cluster: c, user: u}}]
current-context: nowhere
"""


def replace(pyz: Path, how: str) -> None:
    """Put another archive in its place, as good as the first, with everything in it somewhere else."""
    first, _, rest = pyz.read_bytes().partition(b"\n")
    newer = pyz.with_name("newer.pyz")
    newer.write_bytes(first + b"\n" + b"#" * 999 + b"\n" + rest)
    assert len(zipfile.ZipFile(newer).namelist()) > 100
    if how == "mv":
        newer.replace(pyz)
    else:
        shutil.copyfile(newer, pyz)
        newer.unlink()


def test_A2_replaced_before_a_desktop_clients_first_start(here: Place) -> None:
    """Its gateway has imported nothing that it has not used: it says what happened."""
    (here.folder / "catalog.yaml").write_text(CATALOG + BOXES.replace("PORT", "1"))
    client = StdioClient(
        [here.python, "gateway.pyz", "stdio", "--catalog", "catalog.yaml"], env=here.environment, cwd=here.folder
    )
    try:
        replace(here.pyz, "cp")
        for name in ("box__x", "tls__x"):
            reply = client.request("tools/call", {"name": name})
            assert REPLACED in str(reply) and "nternal error" not in str(reply)
    finally:
        assert client.close() == 0


@pytest.mark.parametrize("how", ["mv", "cp"])
def test_A2_replaced_before_the_first_start(here: Place, how: str) -> None:
    """What the catalog's servers need is there already, whether or not one of them was ever started."""
    (here.folder / "kubeconfig").write_text(KUBECONFIG)
    here.environment["KUBECONFIG"] = str(here.folder / "kubeconfig")
    views = "views: [{name: found, mode: search, servers: [demo]}]\n"
    http = Http(here, "--log-level", "debug", more=FAR + BOXES + views)
    http.wait_for_line("What the catalog's servers need is loaded")
    replace(here.pyz, how)
    assert http.call("far") == ECHOED
    why = {"box": "no such file", "job": "connection refused", "service": "connection refused", "tls": "TLS failed"}
    with ThreadPoolExecutor() as callers:  # at once: an API server that can't be reached is tried for seconds
        for reply, reason in zip(callers.map(http.rest, why), why.values(), strict=True):
            assert reason in reply["error"]["message"]
    assert http.search("/views/found/mcp")[0] == 200
    http.stop()
    assert "Traceback" not in here.log()


def test_A2_replaced_before_a_reload_that_needs_more(here: Place) -> None:
    """What can't be loaded any more says so, to the operator and to the callers, and harms nobody else."""
    http = Http(here)
    assert http.call() == ECHOED
    replace(here.pyz, "cp")
    http.write(FAR + BOXES)
    http.wait_for_line(REPLACED)
    http.wait_for_line("Loaded 6 servers")
    for server_id in ("far", "box", "job", "service", "tls"):
        error = http.rest(server_id)["error"]
        assert REPLACED in error["message"], error
        assert "nternal error" not in str(error)
    status, answer = http.search("/mcp?mode=search")
    assert (status, answer["message"]) == (503, REPLACED)
    assert http.call() == ECHOED
    http.stop()
    assert "Traceback" not in here.log()


def test_C1_the_name_decides(here: Place) -> None:
    for name in ("gateway-http", "gateway-stdio"):
        (here.folder / name).symlink_to("gateway.pyz")
        done = here.run("--version", archive=name)
        assert (done.returncode, done.stdout.split()[:1]) == (0, [name]), done
        assert gateway.__version__ in done.stdout
        done = here.run("demo-server", archive=name)  # as the gateway starts it under this name
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_archive_is_a_program(here: Place) -> None:
    done = subprocess.run([here.pyz, "version"], env=here.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done


@pytest.mark.skipif(not TOO_OLD, reason="no Python older than 3.11 on this machine")
@pytest.mark.parametrize("version", TOO_OLD)
def test_an_older_python_is_told_so(gateway_pyz: Path, version: str) -> None:
    done = subprocess.run([pythons()[version], gateway_pyz], capture_output=True, text=True, check=False)
    assert done.stderr == f"gateway.pyz needs Python 3.11 or newer, and this is Python {version}\n"
    assert done.returncode == 1


# ---------------------------------------------------------------- what it is made of


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def test_the_archive_holds_what_it_should(gateway_pyz: Path) -> None:
    with zipfile.ZipFile(gateway_pyz) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = set(entries)
        assert list(entries) == sorted(entries)
        assert len(entries) == len(archive.infolist())
        for name, entry in entries.items():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.external_attr >> 16 == (0o40755 if name.endswith("/") else 0o100644)
            assert name.endswith("/") or "/" not in name or name.rpartition("/")[0] + "/" in names
            assert not re.search(r"(^|/)(tests|_tests|__pycache__|bin)/", name), name
            assert not re.search(r"/(RECORD|WHEEL|INSTALLER|REQUESTED|direct_url\.json)$", name), name
            assert not name.endswith((".so", ".pyd", ".dylib", ".dll", ".pyi")), name
            assert not archive.read(name).startswith(b"\x7fELF"), name
        assert {"LICENSE", "certifi/cacert.pem", "gateway/__main__.py", "markupsafe/_native.py"} <= names
        assert {name for name in names if name.endswith(".py")} == {n[:-1] for n in names if n.endswith(".pyc")}
        for name in sorted(names):
            if name.endswith(".pyc"):
                data = archive.read(name)
                assert data[4:8] == b"\x01\0\0\0", f"{name} is not of the unchecked-hash kind"
                if data[:4] == importlib.util.MAGIC_NUMBER:
                    files = {code.co_filename for code in codes(marshal.loads(data[16:]))}
                    assert files == {"gateway.pyz/" + name[:-1]}
    assert gateway_pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert stat.S_IMODE(gateway_pyz.stat().st_mode) == 0o755


def test_sums_and_bill_of_materials_match_the_archive(gateway_pyz: Path) -> None:
    sha256 = hashlib.sha256(gateway_pyz.read_bytes()).hexdigest()
    assert gateway_pyz.with_name("gateway.pyz.sha256").read_text() == f"{sha256}  gateway.pyz\n"
    bill = json.loads(gateway_pyz.with_name("gateway.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": sha256}]
    listed = {component["purl"] for component in bill["components"]}
    with zipfile.ZipFile(gateway_pyz) as archive:
        names = archive.namelist()
    folders = {found[0] for name in names if (found := re.match(r"[^/]+(?=\.dist-info/)", name))}
    for folder in folders:
        assert [name for name in names if re.match(rf"{folder}\.dist-info/.*(licen[sc]e|copying)", name, re.I)], folder
    pairs = [folder.rpartition("-") for folder in folders]
    assert listed == {f"pkg:pypi/{re.sub('[-_.]+', '-', name).lower()}@{version}" for name, _, version in pairs}
    locked = re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / ".lock" / "runtime.txt").read_text(), re.M)
    assert listed == {f"pkg:pypi/{name}@{version}" for name, version in locked}
    assert {component["bom-ref"] for component in bill["components"]} == listed
    assert all(component["licenses"] for component in bill["components"])


def test_every_locked_package_has_hashes_and_no_file_names_an_index() -> None:
    for lock in ("runtime.txt", "dev.txt"):
        text = (ROOT / ".lock" / lock).read_text()
        assert "://" not in text
        pins = [block for block in re.split(r"\n(?=\S)", re.sub(r"(?m)^ *#.*\n", "", text)) if block.strip()]
        for pin in pins:
            assert re.match(r"[a-z0-9-]+==\S+ \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n?)+$", pin), pin


def test_A2_two_builds_are_the_same_bytes(gateway_pyz: Path, tmp_path: Path) -> None:
    """Another folder, home, time zone, umask, locale and hash seed, dependencies installed anew: not a byte differs."""
    tree = tmp_path / "some where" / "else"
    ignored = shutil.ignore_patterns("__pycache__", ".venv", "dist", "build", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tree, ignore=ignored)
    os.utime(tree / "gateway" / "__init__.py", (1, 1))
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "LC_"))},
        "HOME": str(home),
        "TZ": "Asia/Kathmandu",
        "LANG": "C",
        "PYTHONHASHSEED": "4711",
        "PYTHONOPTIMIZE": "2",
    }
    # pip keeps its downloads: what is fetched anew is the same by its hash
    ask = [sys.executable, "-m", "pip", "cache", "dir"]
    cache = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    environment.setdefault("PIP_CACHE_DIR", cache or str(home / "pip"))
    done = subprocess.run(
        [sys.executable, str(tree / "build_zipapp.py"), "--fresh"],
        cwd=tmp_path,
        env=environment,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    for name in ("gateway.pyz", "gateway.cdx.json", "gateway.pyz.sha256"):
        built = (tree / "dist" / name).read_bytes()
        assert hashlib.sha256(built).digest() == hashlib.sha256(gateway_pyz.with_name(name).read_bytes()).digest()


def test_compiled_code_fails_the_build() -> None:
    script = runpy.run_path(str(ROOT / "build_zipapp.py"))
    bad = {"x/y.so": b"", "x/y.pyd": b"", "x/liby.so.1": b"", "x/y": b"\x7fELF\x02", "y": b"MZ\x90"}
    for name, data in bad.items():
        with pytest.raises(script["BuildError"], match="compiled code"):
            script["refuse_compiled"](name, data)
    script["refuse_compiled"]("x/y.py", b"import so")
    assert not script["wanted"]("markupsafe/_speedups.cpython-311-x86_64-linux-gnu.so")
    assert script["wanted"]("markupsafe/_native.py")
