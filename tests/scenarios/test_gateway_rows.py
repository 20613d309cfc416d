"""Rows of compat.md and robustness.md that only show in the whole: a real gateway, real and hostile servers."""

from __future__ import annotations

import concurrent.futures
import configparser
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, RunningGateway, command, echo_entry

SECRET = "s3cr3t-value-of-a-variable"


def script(folder: Path, name: str, code: str, **more: Any) -> dict[str, Any]:
    """A catalog entry for a hostile server of a few lines."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(code))
    runtime = {"type": "local-process", "command": sys.executable, "args": ["-E", "-s", str(path)]}
    # Their era is given: they answer whatever comes first as if it were initialize.
    return {"id": name, "runtime": runtime, "era": "legacy", **more}


HELLO = """
import json, os, sys, time
def hello():
    for line in sys.stdin:
        m = json.loads(line)
        if m.get("method") == "initialize":
            info = {"name": "h", "version": "1"}
            result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
            print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": result}), flush=True)
        elif m.get("method") == "tools/call":
            return m
"""

HOSTILE = {
    "early": 'import os, sys; print("no database at", os.environ["PASSWORD"], file=sys.stderr); sys.exit(4)',
    "silent": "import time; time.sleep(600)",
    "crashing": HELLO + "hello(); os._exit(5)",
    "flooding": HELLO + "hello()\nwhile True: os.write(1, b'x' * 65536)",
    "chatty": HELLO
    + """
hello()
line = json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "y" * 200}})
while True:
    os.write(1, (line + "\\n").encode() * 100)
""",
    "noisy": HELLO + "hello()\nwhile True: os.write(2, b'error line\\n' * 1000)",
    "deaf": HELLO + "hello(); time.sleep(600)",
    "slow": HELLO + "time.sleep(3)\nwhile True:\n    m = hello()\n",
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("rows")
    servers = [echo_entry("echo", display_name="Echo", description="Says it again", tags=["t"])]
    servers += [script(folder, name, code, request_timeout_seconds=3) for name, code in HOSTILE.items()]
    servers[1]["env"] = {"PASSWORD": "${ROW_SECRET}"}
    servers[2]["start_timeout_seconds"] = 2
    missing = {"type": "local-process", "command": "no-such-command-anywhere"}
    servers.append({"id": "missing", "runtime": missing})
    servers.append({"id": "unset", "runtime": missing, "env": {"A": "${ROW_UNSET_VARIABLE}"}})
    no_engine = {"type": "docker", "image": "acme/box:1", "host": f"unix://{folder}/none.sock"}
    servers.append({"id": "box", "runtime": no_engine})
    with RunningGateway(folder, servers, env={"ROW_SECRET": SECRET}) as running:
        yield running


def post(gateway: RunningGateway, server_id: str, tool: str = "x", **arguments: Any) -> tuple[int, dict[str, str], Any]:
    body = {"server_id": server_id, "jsonrpc": "2.0", "id": 7, "method": "tools/call"}
    body["params"] = {"name": tool, "arguments": arguments}
    status, headers, data = gateway.http("POST", "/mcp", body)
    return status, headers, json.loads(data)


def memory(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


# ------------------------------------------------------------------------------------------------- hostile servers
def test_RB01_H28_early_exit_tells_code_and_output_without_secrets(gateway: RunningGateway) -> None:
    begin = time.monotonic()
    status, _, reply = post(gateway, "early")
    assert time.monotonic() - begin < 5
    assert status == 502
    assert reply["error"]["code"] == -32000
    assert "Failed to connect to server: process exited with code 4: no database at ${ROW_SECRET}" in reply["message"]
    assert reply["error"]["data"]["source"] == "gateway"
    assert SECRET not in json.dumps(reply) + "".join(gateway.lines)


def test_L12_RB06_backoff_is_told_and_a_restart_by_hand_skips_it(gateway: RunningGateway) -> None:
    for _ in range(3):
        status, headers, reply = post(gateway, "early")
    assert status == 502
    assert "times in a row" in reply["message"]
    assert 1 <= int(headers["retry-after"]) <= 5
    shown = gateway.json("GET", "/servers/early")
    assert shown["status"] == "unhealthy"
    assert "exited with code 4" in shown["last_error"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["retry_at"])
    starts = len([line for line in gateway.lines if "Starting server" in line and "=early" in line])
    status, _, data = gateway.http("POST", "/servers/early/restart")
    assert status == 502
    assert json.loads(data)["message"].startswith("Failed to start server: process exited with code 4")
    assert len([line for line in gateway.lines if "Starting server" in line and "=early" in line]) == starts + 1


def test_RB05_a_silent_handshake_fails_at_its_limit(gateway: RunningGateway) -> None:
    begin = time.monotonic()
    status, _, reply = post(gateway, "silent")
    assert 1.5 < time.monotonic() - begin < 10
    assert status == 502
    assert "no handshake within 2 s (start_timeout_seconds)" in reply["message"]


@pytest.mark.parametrize(
    ("server_id", "what"),
    [
        ("missing", "no-such-command-anywhere"),
        ("unset", "ROW_UNSET_VARIABLE"),
        ("box", "none.sock (no such file or directory) can't be reached"),
    ],
)
def test_RB08_G16_K28_what_is_wrong_is_named_at_once(gateway: RunningGateway, server_id: str, what: str) -> None:
    begin = time.monotonic()
    status, _, reply = post(gateway, server_id)
    assert time.monotonic() - begin < 0.5
    assert status == 502
    assert what in reply["message"]
    assert "Traceback" not in "".join(gateway.lines)


def test_RB03_P4_a_crash_mid_call_is_told_and_the_next_call_starts_anew(gateway: RunningGateway) -> None:
    for _ in range(2):
        status, _, reply = post(gateway, "crashing")
        assert status == 502
        assert "Server error: Server 'crashing' ended: process exited with code 5" in reply["message"]
        time.sleep(1.3)


def test_RB03_a_killed_server_harms_no_neighbour(gateway: RunningGateway) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        neighbour = pool.submit(gateway.call, "echo", "sleep", {"seconds": 1})
        doomed = pool.submit(post, gateway, "deaf")
        until = time.monotonic() + 10
        while not gateway.json("GET", "/servers/deaf").get("instances"):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(gateway.json("GET", "/servers/deaf")["instances"][0]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        status, _, reply = doomed.result()
        assert time.monotonic() - killed < 0.5
        assert status == 502
        assert "SIGKILL" in reply["message"]
        assert neighbour.result() == "slept"


@pytest.mark.parametrize("server_id", ["flooding", "chatty", "noisy"])
def test_RB09_P8_P9_floods_cost_bounded_memory_and_no_neighbour(gateway: RunningGateway, server_id: str) -> None:
    gateway.call("echo", "echo", {"text": "warm"})
    before = memory(gateway.process.pid)
    slowest = 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        flood = pool.submit(post, gateway, server_id)
        while not flood.done():
            begin = time.monotonic()
            assert gateway.http("GET", "/health")[0] == 200
            assert gateway.call("echo", "echo", {"text": "still"}) == "still"
            slowest = max(slowest, time.monotonic() - begin)
        status = flood.result()[0]
    assert status in (502, 504)
    assert memory(gateway.process.pid) - before <= 64
    assert slowest < 1.0
    gateway.http("POST", f"/servers/{server_id}/stop")


def test_G9_L16_RB04_RB12_a_hanging_call_is_504_and_the_server_stays(gateway: RunningGateway) -> None:
    begin = time.monotonic()
    status, _, reply = post(gateway, "deaf")
    assert status == 504
    assert 2.5 < time.monotonic() - begin < 10
    assert reply["error"]["code"] == -32000
    assert re.search(r"Server 'deaf' did not answer within (3|2\.9\d*) s", reply["message"])
    assert gateway.json("GET", "/servers/deaf")["status"] == "running"


def test_RB20_a_caller_that_goes_away_takes_its_call_back(gateway: RunningGateway) -> None:
    gateway.call("echo", "echo", {"text": "x"})
    body = {"server_id": "echo", "id": 1, "method": "tools/call"}
    body["params"] = {"name": "sleep", "arguments": {"seconds": 20}}
    data = json.dumps(body).encode()
    head = f"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
        caller.sendall(head.replace("Host: x", "Host: localhost").encode() + data)
        until = time.monotonic() + 5
        while gateway.json("GET", "/servers/echo")["connection_count"] == 0:
            assert time.monotonic() < until
    gone = time.monotonic()
    while gateway.json("GET", "/servers/echo")["connection_count"]:
        assert time.monotonic() - gone < 0.5, "its slot is free within 100 ms (x5)"


def test_RB80_P10_refusals_are_quick(gateway: RunningGateway) -> None:
    for request, status in (
        (b"POST /mcp HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100000\r\n\r\n", b"403"),
        (b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20000 + b"\r\n\r\n", b"431"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"405"),
    ):
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(request)
            assert connection.recv(4096).split()[1] == status
        assert time.monotonic() - begin < 0.2


# ------------------------------------------------------------------------------------------------------ what is shown
def test_K2_K3_K6_K7_K8_H15_entries_are_shown_as_written(gateway: RunningGateway) -> None:
    listed = {entry["id"]: entry for entry in gateway.json("GET", "/servers")}
    assert (listed["echo"]["display_name"], listed["echo"]["description"]) == ("Echo", "Says it again")
    assert listed["deaf"]["display_name"] == "deaf"
    assert "description" not in listed["deaf"]
    assert [entry["id"] for entry in gateway.json("GET", "/servers?tag=t")] == ["echo"]
    shown = gateway.json("GET", "/servers/early")
    assert shown["env"] == {"PASSWORD": "${ROW_SECRET}"}
    assert (shown["namespace"], shown["isolation"], shown["request_timeout_seconds"]) == ("default", "shared", 3)


def test_H17_H18_H19_H20_H21_stats_add_up(gateway: RunningGateway) -> None:
    gateway.call("echo", "echo", {"text": "x"})
    stats = gateway.json("GET", "/stats")
    assert stats["total_servers"] == len(stats["servers"]) == len(gateway.json("GET", "/servers"))
    assert stats["total_requests"] == sum(entry["request_count"] for entry in stats["servers"].values())
    assert stats["active_servers"] == sum(entry["status"] == "running" for entry in stats["servers"].values())
    assert stats["uptime_seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stats["last_reload"])
    assert stats["servers"]["missing"]["error_count"] >= 1


def test_H25_errors_have_one_shape(gateway: RunningGateway) -> None:
    for method, path, status, phrase in (
        ("GET", "/nowhere", 404, "Not Found"),
        ("DELETE", "/stats", 405, "Method Not Allowed"),
        ("GET", "/servers/nobody", 404, "Not Found"),
        ("POST", "/rpc", 400, "Bad Request"),
    ):
        found, _, data = gateway.http(method, path, {} if method == "POST" else None)
        body = json.loads(data)
        assert (found, body["error"], set(body)) == (status, phrase, {"error", "message"})


def test_C17_O2_O5_log_lines(gateway: RunningGateway) -> None:
    gateway.call("echo", "echo", {"text": "x"})
    order = ["Starting Open MCP Gateway", "Loaded ", "Listening on ", "Hot reload enabled for "]
    places = [next(n for n, line in enumerate(gateway.lines) if text in line) for text in order]
    assert places == sorted(places)
    line = gateway.wait_for_line("Starting server")
    assert re.fullmatch(r"\[\d{4}-\S+Z\] INFO gateway_core: Starting server server_id=\S+", line)
    gateway.wait_for_line("Failed to start server server_id=missing error=")
    gateway.http("POST", "/servers/echo/stop")
    gateway.wait_for_line("Server stopped server_id=echo")


def test_O9_stderr_of_servers_is_passed_on_with_their_name(gateway: RunningGateway) -> None:
    gateway.call("echo", "stderr", {"lines": 1, "text": "said on stderr"})
    assert "[echo] said on stderr" in gateway.wait_for_line("said on stderr")


# ------------------------------------------------------------------------------------------------ gateways of their own
def test_G4_O3_O4_json_logs_and_message_bodies_at_trace(tmp_path: Path) -> None:
    config = {"log_format": "json", "log_level": "trace"}
    with RunningGateway(tmp_path, [echo_entry("echo")], config=config) as gateway:
        gateway.call("echo", "echo", {"text": "look for me"})
        gateway.wait_for_line("Received message")
        lines = [json.loads(line) for line in list(gateway.lines)]
        assert all({"timestamp", "level", "message"} <= set(line) for line in lines)
        for what in ("Sent message", "Received message"):
            assert any(what in line["message"] and "look for me" in json.dumps(line) for line in lines), what


def test_G6_L8_idle_stop_for_real(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [echo_entry("echo", idle_timeout_seconds=1)]) as gateway:
        pid = json.loads(gateway.call("echo", "info"))["pid"]
        gateway.wait_for_line("Stopping idle server server_id=echo idle_seconds=1")
        gateway.wait_for_line("Server stopped server_id=echo")
        assert not Path(f"/proc/{pid}").exists()
        assert gateway.json("GET", "/servers/echo")["status"] == "stopped"
        assert json.loads(gateway.call("echo", "info"))["pid"] != pid


def test_G8_L15_max_connections_per_server_bounds_what_is_worked_on(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [echo_entry("echo")], config={"max_connections_per_server": 2}) as gateway:
        gateway.call("echo", "echo", {"text": "x"})
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(gateway.call, "echo", "sleep", {"seconds": 0.5}) for _ in range(4)]
            assert [c.result() for c in calls] == ["slept"] * 4
        assert time.monotonic() - begin >= 1.0


def test_G11_A1_H34_cors_and_keys_together(tmp_path: Path) -> None:
    config = {"api_key": "k" * 24, "cors_origins": ["https://app.example"]}
    with RunningGateway(tmp_path, [echo_entry("echo")], config=config) as gateway:
        key = {"Authorization": "Bearer " + "k" * 24}
        good = gateway.http("GET", "/servers", headers={**key, "Origin": "https://app.example"})
        assert (good[0], good[1]["access-control-allow-origin"]) == (200, "https://app.example")
        bad = gateway.http("GET", "/servers", headers={**key, "Origin": "https://other.example"})
        assert (bad[0], "access-control-allow-origin" in bad[1]) == (403, False)
        assert gateway.http("GET", "/nowhere")[0] == 401
        assert gateway.http("GET", "/health")[0] == 200
        assert "k" * 24 not in "".join(gateway.lines)


def test_W12_invalid_files_at_startup_are_exit_1_with_every_problem(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("servers:\n  - id: a\n  - runtime: {type: nonsense}\n")
    done = subprocess.run(
        [*command(), "http", "--catalog", "catalog.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "Server 'a' missing required field: runtime" in done.stderr
    assert "Server at index 1 missing required field: id" in done.stderr
    assert re.search(r"catalog\.yaml:2:\d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_D16_the_systemd_unit_gives_the_gateway_time_to_stop() -> None:
    text = (ROOT / "README.md").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    block = text.split("## systemd")[1].split("\n## ")[0]
    unit.read_string(textwrap.dedent("\n".join(line for line in block.splitlines() if line.startswith("    "))))
    from gateway.config.model import Settings

    settings = Settings()
    needed = settings.drain_timeout_seconds + settings.stop_grace_seconds + 2
    assert int(unit["Service"]["TimeoutStopSec"]) >= needed
    assert unit["Service"]["ExecStart"].endswith("gateway.pyz http --config /etc/mcp-gateway/config.yaml")
    assert unit["Service"]["KillMode"] == "mixed"
