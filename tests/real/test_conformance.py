"""Rows B1 and C1: the official conformance suites, first against the fixture server itself, then through the gateway.

Four cells: the server behind the gateway speaks only the legacy era or only the modern one, over stdio or over HTTP.
In each cell the suites of both eras run against ``/servers/ID/mcp`` and against ``/mcp``, where the server has an empty
prefix and a neighbour. What passes without the gateway must pass through it, but for the scenarios in EXCEPTIONS.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from running import ACCEPT, RunningGateway, command

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
ERA_SERVER = Path(__file__).resolve().parent.parent / "fixtures" / "era_server.py"
AT_ONCE = 3
"""Runs at the same time: the suites mostly wait."""


class Suite(NamedTuple):
    """One way to run a suite, and what the fixture server must reach in it (protocol §8)."""

    part: str
    options: Sequence[str]
    checks: int
    scenarios: int


OLD, NEW = "conformance", "conformance-next"
SUITES = {
    "0.1.16-active": Suite(OLD, ["--suite", "active"], 40, 30),
    "0.1.16-all": Suite(OLD, ["--suite", "all"], 44, 32),
    "2025-03-26": Suite(NEW, ["--suite", "all", "--spec-version", "2025-03-26"], 3, 1),
    "2025-06-18": Suite(NEW, ["--suite", "all", "--spec-version", "2025-06-18"], 56, 27),
    "2025-11-25": Suite(NEW, ["--requirements", "2025-11-25"], 84, 33),
    "2026-07-28": Suite(NEW, ["--requirements", "2026-07-28"], 152, 40),
}
THROUGH = [name for name in SUITES if name != "0.1.16-active"]
"""What runs against each endpoint of the gateway; ``active`` is a part of ``all``."""
LEGACY, MODERN, KEY = "2025-11-25", "2026-07-28", "io.modelcontextprotocol"
EXTENSIONS = re.compile(r"tasks-|sep-2640-")
"""Scenarios of optional extensions, which the requirement sets run but don't score."""

ENDPOINTS = {"server": "/servers/era/mcp", "merged": "/mcp"}
NEIGHBOUR = {
    "id": "demo",
    "runtime": {"type": "local-process", "command": command()[0], "args": [*command()[1:], "demo-server"]},
}
"""Another server at the merged endpoint, so that something is merged there."""
CELLS = ["legacy-stdio", "legacy-http", "modern-stdio", "modern-http"]

JSON_ANSWER = (
    "The gateway answers with JSON where nothing comes before the result, and the suite has nothing to look at (3)."
)
NO_KEYS = "The suite wants the question under the key user_name, but a legacy server's questions have no keys (4.2)."
NO_STATE = "Answers without the requestState of a parked call belong to none: the call begins anew and asks (4.2)."
ALWAYS = {
    ("server-sse-multiple-streams", "server-sse-streams-functional"): JSON_ANSWER,
    ("server-sse-polling", "server-sse-priming-event"): JSON_ANSWER,
    ("server-sse-polling", "server-sse-retry-field"): JSON_ANSWER,
    ("server-sse-polling", "server-sse-disconnect-resume"): JSON_ANSWER,
}
BEFORE_LEGACY = {
    ("input-required-result-basic-elicitation", "sep-2322-elicitation-incomplete"): NO_KEYS,
    ("input-required-result-basic-elicitation", "sep-2322-elicitation-complete"): NO_KEYS,
    ("input-required-result-ignore-extra-params", "sep-2322-ignore-unexpected-params"): NO_STATE,
}
EXCEPTIONS = {
    "legacy-stdio": {**ALWAYS, **BEFORE_LEGACY},
    "legacy-http": {**ALWAYS, **BEFORE_LEGACY},
    "modern-stdio": ALWAYS,
    "modern-http": ALWAYS,
}
"""(scenario, check) that can't pass in a cell, and why. One that does pass is a failure of this table."""

BAD = ("FAILURE", "WARNING")
Checks = list[dict[str, Any]]


class Outcome(NamedTuple):
    """What one run said: its exit status, the checks of each scenario, and its output."""

    status: int
    scenarios: dict[str, Checks]
    output: str


def run_suite(name: str, url: str, folder: Path, part: Part) -> Outcome:
    """Run a suite against a URL; the results are read from the checks.json it writes for each scenario."""
    suite = SUITES[name]
    program = part(f"npm/{suite.part}") / "node_modules" / ".bin" / "conformance"
    env = {**os.environ, "PATH": f"{part('node24')}{os.pathsep}{os.environ['PATH']}"}
    argv = [str(program), "server", "--url", url, *suite.options, "-o", str(folder)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
    scenarios: dict[str, Checks] = {}
    for path in sorted(folder.glob("*/checks.json")):
        found = re.fullmatch(r"server-(.+?)-\d{4}-\d\d-\d\dT[\d-]+Z", path.parent.name)
        assert found, path
        scenarios[found[1]] = json.loads(path.read_text())
    return Outcome(done.returncode, scenarios, done.stdout + done.stderr)


def run_all(tasks: dict[Any, tuple[str, str]], folder: Path, part: Part) -> dict[Any, Outcome]:
    """Run several (suite, URL) side by side.

    Those of the modern era come first and one at a time: they allow some answers 500 ms only, and without
    authentication both would share one pipe to a legacy server, on which only a sole call's questions can be told
    from those of other calls (protocol 4.2).
    """
    results, places = {}, {key: folder / re.sub(r"\W+", "-", f"{key}") for key in tasks}
    for key, (name, url) in tasks.items():
        if name == MODERN:
            results[key] = run_suite(name, url, places[key], part)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {
            key: pool.submit(run_suite, name, url, places[key], part)
            for key, (name, url) in tasks.items()
            if name != MODERN
        }
        return results | {key: future.result() for key, future in running.items()}


def counted(checks: Checks, *statuses: str) -> Counter[str]:
    return Counter(check["id"] for check in checks if check["status"] in statuses)


def worse(checks: Checks, expected: Checks) -> set[str]:
    """The checks that fail, warn or are missing, unlike without the gateway: a SHOULD is kept as well as a MUST."""
    lost = counted(expected, "SUCCESS") - counted(checks, "SUCCESS")
    return set(lost + (counted(checks, *BAD) - counted(expected, *BAD)))


def explained(checks: Checks, id: str) -> str:
    """What the suite says about a check."""
    said = [
        f"{check['status']}: {check.get('errorMessage')}\n        {json.dumps(check.get('details'))[:600]}"
        for check in checks
        if check["id"] == id and check["status"] != "SUCCESS"
    ]
    return "; ".join(said) or "was not made"


class EraServer:
    """The fixture server over HTTP."""

    def __init__(self, era: str, part: Part) -> None:
        argv = [*era_command(era, part), "--http", "0"]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fixture server did not start"
        self.url = f"http://127.0.0.1:{int(line)}/mcp"

    def __enter__(self) -> EraServer:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def era_command(era: str, part: Part) -> list[str]:
    return [str(part("py/sdk") / "bin" / "python"), "-E", "-s", str(ERA_SERVER), "--era", era]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, real_part: Part) -> dict[str, Outcome]:
    """All suites against the fixture server, unpinned and without a gateway."""
    with EraServer("both", real_part) as server:
        tasks = {name: (name, server.url) for name in SUITES}
        return run_all(tasks, tmp_path_factory.mktemp("baseline"), real_part)


def warm_up(gateway: RunningGateway) -> None:
    """Start the server for modern clients that can be asked: the suite gives one such call 600 ms."""
    meta = {f"{KEY}/protocolVersion": MODERN, f"{KEY}/clientCapabilities": {"elicitation": {}}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}
    headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/list"}
    gateway.json("POST", ENDPOINTS["server"], message, headers=headers)


@pytest.fixture(scope="module", params=CELLS)
def cell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, real_part: Part
) -> Iterator[tuple[str, dict[tuple[str, str], Outcome]]]:
    """All suites through the gateway, with the server behind it pinned."""
    era, transport = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    entry: dict[str, Any] = {"id": "era", "isolation": "session", "prefix": ""}
    if transport == "http":
        with EraServer(era, real_part) as server:
            entry["runtime"] = {"type": "remote-sse", "url": server.url}
            yield request.param, run_cell(folder, entry, real_part)
    else:
        program, *args = era_command(era, real_part)
        entry["runtime"] = {"type": "local-process", "command": program, "args": args}
        yield request.param, run_cell(folder, entry, real_part)


def run_cell(folder: Path, entry: dict[str, Any], part: Part) -> dict[tuple[str, str], Outcome]:
    with RunningGateway(folder, [entry, NEIGHBOUR]) as gateway:
        warm_up(gateway)
        tasks = {
            (endpoint, name): (name, f"http://127.0.0.1:{gateway.port}{path}")
            for endpoint, path in ENDPOINTS.items()
            for name in THROUGH
        }
        results = run_all(tasks, folder, part)
    (folder / "gateway.log").write_text("\n".join(gateway.lines))
    return results


def ask_stdio(argv: list[str], message: dict[str, Any]) -> dict[str, Any]:
    """The first thing that a server on stdio says to this message."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        process.stdin.close()
    return dict(reply)


def ask_http(url: str, message: dict[str, Any], version: str) -> dict[str, Any]:
    """What a server on HTTP says to this message, as the first of its client."""
    headers = {"Content-Type": "application/json", "Accept": ACCEPT, "Mcp-Method": message["method"]}
    if version == MODERN:
        headers["MCP-Protocol-Version"] = version
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.netloc, timeout=30)
    try:
        connection.request("POST", target.path, json.dumps(message), headers)
        return dict(json.loads(connection.getresponse().read()))
    finally:
        connection.close()


@pytest.mark.parametrize("cell_name", CELLS)
def test_B1_pinned_server_knows_nothing_of_the_other_era(cell_name: str, real_part: Part) -> None:
    """Else the four cells would be two."""
    era, transport = cell_name.split("-")
    client = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    meta = {f"{KEY}/protocolVersion": MODERN, f"{KEY}/clientCapabilities": {}}
    foreign = {
        "legacy": (MODERN, "server/discover", {"_meta": meta}),
        "modern": (LEGACY, "initialize", client),
    }
    version, method, params = foreign[era]
    message = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    if transport == "stdio":
        reply = ask_stdio(era_command(era, real_part), message)
    else:
        with EraServer(era, real_part) as server:
            reply = ask_http(server.url, message, version)
    if era == "modern":
        assert reply["id"] == 7
        assert reply["error"]["code"] == -32022
        assert reply["error"]["data"] == {"supported": [MODERN], "requested": LEGACY}
    else:
        assert reply["error"]["code"] == (-32601 if transport == "stdio" else -32600)
        assert reply["id"] == (7 if transport == "stdio" else "server-error")


@pytest.mark.parametrize("name", SUITES)
def test_B1_baseline(name: str, baseline: dict[str, Outcome]) -> None:
    outcome = baseline[name]
    scenarios = {s: checks for s, checks in outcome.scenarios.items() if not EXTENSIONS.match(s)}
    statuses = Counter(check["status"] for checks in scenarios.values() for check in checks)
    assert (statuses["SUCCESS"], statuses["FAILURE"]) == (SUITES[name].checks, 0), outcome.output
    assert len(scenarios) == SUITES[name].scenarios
    assert outcome.status == 0


def check_cell(
    endpoint: str, name: str, baseline: dict[str, Outcome], cell: tuple[str, dict[tuple[str, str], Outcome]]
) -> None:
    """What passes without the gateway passes through it."""
    which, results = cell
    outcome = results[endpoint, name]
    passing = {(s, id) for s, checks in baseline[name].scenarios.items() for id in counted(checks, "SUCCESS")}
    exceptions = EXCEPTIONS[which].keys() & passing
    problems = []
    for scenario, expected in baseline[name].scenarios.items():
        if EXTENSIONS.match(scenario):
            continue
        checks = outcome.scenarios.get(scenario, [])
        for id in sorted(worse(checks, expected)):
            if (scenario, id) in exceptions:
                exceptions.remove((scenario, id))
            else:
                problems.append(f"{scenario}: {id}: {explained(checks, id)}")
    problems += [f"{scenario}: {id}: passes and needs no exception" for scenario, id in sorted(exceptions)]
    assert not problems, f"{which}, {endpoint}, {name}:\n" + "\n".join(problems)


@pytest.mark.parametrize("name", THROUGH)
def test_B1_cell(name: str, baseline: dict[str, Outcome], cell: tuple[str, dict[tuple[str, str], Outcome]]) -> None:
    check_cell("server", name, baseline, cell)


@pytest.mark.parametrize("name", THROUGH)
def test_C1_merged_cell(
    name: str, baseline: dict[str, Outcome], cell: tuple[str, dict[tuple[str, str], Outcome]]
) -> None:
    check_cell("merged", name, baseline, cell)
