"""Rows A10, P6, P7, RB70: how the gateway ends, with real processes."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import RunningGateway, command, echo_entry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ESCAPING = """
import os, sys, subprocess, json, time, signal
# A server that leaves helpers behind: one in its group, one in a session of its own, one double-forked away.
marker = sys.argv[1]
sleeper = [sys.executable, "-c", "import time, signal; signal.signal(15, 1); time.sleep(600)", marker]
subprocess.Popen(sleeper)
subprocess.Popen(sleeper, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, sleeper)
    os._exit(0)
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        info = {"name": "e", "version": "1"}
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
    elif "id" in m:
        result = {"content": [{"type": "text", "text": "ok"}]}
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": result}), flush=True)
"""


def processes(marker: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marker.encode() in line and state != "Z":
                found.append(int(name))
    return found


def await_all(marker: str) -> None:
    """Wait for the server and its three helpers, which start on their own time."""
    until = time.monotonic() + 10
    while len(processes(marker)) < 4:
        assert time.monotonic() < until, processes(marker)
        time.sleep(0.02)


def gone(marker: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not processes(marker):
            return True
        time.sleep(0.05)
    return False


def escaping_entry(folder: Path, marker: str) -> dict[str, Any]:
    script = folder / "escaping.py"
    script.write_text(ESCAPING)
    runtime = {"type": "local-process", "command": sys.executable, "args": [str(script), marker]}
    return {"id": "escaping", "stop_grace_seconds": 1, "runtime": runtime}


def test_A10_P6_sigterm_answers_what_is_in_flight_and_leaves_nothing(tmp_path: Path) -> None:
    marker = f"marker-{os.getpid()}-term"
    servers = [echo_entry("echo"), escaping_entry(tmp_path, marker)]
    with RunningGateway(tmp_path, servers) as gateway:
        echo_pid = int(json.loads(gateway.call("echo", "info"))["pid"])
        gateway.call("escaping", "x")
        await_all(marker)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(gateway.call, "echo", "sleep", {"seconds": 2}) for _ in range(8)]
            gateway_started = time.monotonic()
            while json.loads(gateway.http("GET", "/stats")[2])["servers"]["echo"]["request_count"] < 9:
                assert time.monotonic() - gateway_started < 10
                time.sleep(0.02)
            gateway.process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            while True:
                try:
                    socket.create_connection(("127.0.0.1", gateway.port), 1).close()
                except ConnectionRefusedError:
                    break
                assert time.monotonic() - sent < 0.5, "the listener is closed within 100 ms (x5)"
                time.sleep(0.01)
            assert [c.result() for c in calls] == ["slept"] * 8
        assert gateway.process.wait(45) == 0
        assert gone(marker, 1)
        assert not Path(f"/proc/{echo_pid}").exists()


def test_A10_P7_sigkill_leaves_no_descendant(tmp_path: Path) -> None:
    marker = f"marker-{os.getpid()}-kill"
    with RunningGateway(tmp_path, [echo_entry("echo"), escaping_entry(tmp_path, marker)]) as gateway:
        echo_pid = int(json.loads(gateway.call("echo", "info"))["pid"])
        gateway.call("escaping", "x")
        await_all(marker)
        gateway.process.kill()
        assert gone(marker, 5)
        until = time.monotonic() + 5
        while Path(f"/proc/{echo_pid}").exists():
            assert time.monotonic() < until
            time.sleep(0.05)


def test_RB70_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    marker = f"marker-{os.getpid()}-twice"
    with RunningGateway(tmp_path, [echo_entry("echo"), escaping_entry(tmp_path, marker)]) as gateway:
        gateway.call("escaping", "x")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(
                gateway.http,
                "POST",
                "/mcp",
                {
                    "server_id": "echo",
                    "id": 1,
                    "method": "tools/call",
                    "params": {"name": "sleep", "arguments": {"seconds": 25}},
                },
            )
            until = time.monotonic() + 10
            while json.loads(gateway.http("GET", "/stats")[2])["servers"]["echo"]["request_count"] < 1:
                assert time.monotonic() < until
                time.sleep(0.02)
            gateway.process.send_signal(signal.SIGTERM)
            gateway.wait_for_line("finishing requests")
            gateway.process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            assert gateway.process.wait(10) == 1
            assert time.monotonic() - sent < 2
        assert gone(marker, 5)


def test_C16_RB70_a_taken_port_is_exit_1_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("servers: []\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = [*command(), "http", "--catalog", "catalog.yaml", "--listen-addr", f"127.0.0.1:{port}"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_L17_sigint_is_a_clean_stop_too(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [echo_entry("echo")]) as gateway:
        gateway.call("echo", "echo", {"text": "x"})
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(20) == 0
