"""Row D9: what a container costs, beside ``docker run -i`` and a local process. By hand, on Linux, on a quiet machine:

    DOCKER_HOST=unix:///run/docker.sock python3 tests/bench/containers.py [ROUNDS]

Needs the docker client on PATH and, for building the image, root or the group docker. *First call* is the time from a
call on a stopped server to its answer, handshake included; ``docker run`` is given the same messages in the same order.
*Warm call* is the CPU time of the gateway's process for each of many calls on one connection, by a server in a
container and by the same server as a local process; the engine's own share is told apart.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engines import IMAGE, Engine
from running import RunningGateway, echo_entry

CALLS = 3000
LIMITS = ("--init", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "1g", "--cpus", "1")


def message(id: int, method: str, params: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


def docker_run() -> float:
    """Seconds from exec of ``docker run -i`` to the answer of its first call."""
    begin = time.perf_counter()
    command = ["docker", "run", "-i", "--rm", *LIMITS, "--pids-limit", "256", "--log-driver", "none", IMAGE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "b", "version": "1"}}
    for data in (
        message(1, "initialize", hello),
        message(2, "tools/call", {"name": "echo", "arguments": {"text": "x"}}),
    ):
        process.stdin.write(data)
        process.stdin.flush()
        assert b"result" in process.stdout.readline()
    seconds = time.perf_counter() - begin
    process.stdin.close()
    process.wait()
    process.stdout.close()
    return seconds


def first_call(gateway: RunningGateway) -> float:
    """Seconds of a call on the stopped server."""
    gateway.json("POST", "/servers/box/stop")
    while gateway.json("GET", "/servers/box")["status"] != "stopped":
        time.sleep(0.05)
    begin = time.perf_counter()
    assert gateway.call("box", "echo", {"text": "x"}) == "x"
    return time.perf_counter() - begin


def cpu(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def engine_pids(*marks: str) -> list[int]:
    """The daemon and the container's shim, by what is in their command lines."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                program = Path(f"/proc/{name}/comm").read_text().strip()
                line = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if program.startswith(("dockerd", "containerd-shim")) and any(mark in line for mark in marks):
                found.append(int(name))
    return found


def warm_calls(gateway: RunningGateway, id: str) -> tuple[float, float]:
    """Microseconds of CPU for each call: the gateway's, and the engine's."""
    body = {"server_id": id, "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    data = json.dumps({**body, "params": {"name": "echo", "arguments": {"text": "x"}}})
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)

    def call() -> None:
        connection.request("POST", "/mcp", data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200
        reply.read()

    for _ in range(200):
        call()
    details = gateway.json("GET", f"/servers/{id}")["instances"][0]
    engines = engine_pids(details["engine"], details["container_id"]) if "engine" in details else []
    own, others = cpu(gateway.process.pid), sum(map(cpu, engines))
    for _ in range(CALLS):
        call()
    connection.close()
    used = cpu(gateway.process.pid) - own, sum(map(cpu, engines)) - others
    return 1e6 * used[0] / CALLS, 1e6 * used[1] / CALLS


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    engine = Engine("docker", os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    entries = [engine.entry("box", era="legacy"), echo_entry("here", era="legacy")]
    with tempfile.TemporaryDirectory() as folder, RunningGateway(Path(folder), entries) as gateway:
        gateway.call("box", "echo", {"text": "x"})
        docker_run()
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(docker_run())
            ours.append(first_call(gateway))
        mine, run = statistics.median(ours), statistics.median(theirs)
        print(f"first call: gateway {mine:.3f} s, docker run -i {run:.3f} s: {mine / run:.2f} times (at most 1.3)")
        warm: dict[str, list[tuple[float, float]]] = {"box": [], "here": []}
        for _ in range(3):
            for id in warm:
                warm[id].append(warm_calls(gateway, id))
        box, here = (statistics.median(own for own, _ in warm[id]) for id in ("box", "here"))
        ratio = f"{box / here:.2f} times (at most 1.5)"
        print(f"warm call, CPU of the gateway: container {box:.0f} us, process {here:.0f} us: {ratio}")
        print(f"warm call, CPU of the engine: {statistics.median(each for _, each in warm['box']):.0f} us")


if __name__ == "__main__":
    main()
