"""What a server in a Kubernetes Job costs, for the table in README (row E9). Run by hand, on Linux, on a quiet machine:

    python3 tests/bench/jobs.py KUBECONFIG [dist/gateway.pyz]

The cluster's node must have the image mcp-fixtures:1 (tests/real/engines/image.py). A first call is the time from the
request to its answer with the Job stopped and the image present, next to ``kubectl run --attach`` of the same image
answering the same call; warm calls are the CPU of the gateway's own process for each tools/call, next to the same
server as a local process, at 64 connections and at one. Medians of rounds that alternate, so that a disturbance meets
both. Where the cluster is on the same machine, the kernel does part of the API's work in the gateway's time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from secrets import token_hex

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clusters import IMAGE, Kube
from eras import cpu, load
from running import RunningGateway, echo_entry

STARTS = 7
ROUNDS = 9
CALLS = 2000


def request(server: str) -> bytes:
    """One tools/call as bytes."""
    params = {"name": "echo", "arguments": {"text": "hello"}}
    body = json.dumps({"server_id": server, "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params})
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"POST /mcp HTTP/1.1\r\n{head}\r\n{body}".encode()


def first_call(gateway: RunningGateway) -> float:
    """Seconds."""
    gateway.json("POST", "/servers/job/stop")
    begin = time.perf_counter()
    assert gateway.call("job", "echo", {"text": "hello"}) == "hello"
    return time.perf_counter() - begin


def kubectl_run(kube: Kube, namespace: str) -> float:
    """Seconds for kubectl to start the same server, attach to it, and have the same answered."""
    meta = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
    call = {"name": "echo", "arguments": {"text": "hello"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": meta},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
    ]
    name = f"bench-{token_hex(4)}"
    command = ["kubectl", f"--kubeconfig={kube.config}", "-n", namespace, "run", name, f"--image={IMAGE}", "--rm", "-i"]
    command += ["--quiet", "--restart=Never", "--image-pull-policy=IfNotPresent", "--attach"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    process.stdin.flush()
    while True:
        line = process.stdout.readline()
        assert line, "kubectl ended without the answer"
        if b'"id":2' in line.replace(b" ", b""):
            break
    seconds = time.perf_counter() - begin
    process.stdin.close()
    process.wait(60)
    return seconds


def warm(gateway: RunningGateway, connections: int) -> tuple[float, float, float]:
    """Microseconds a call of the local process and of the Job, and the median of the rounds' ratios."""
    found: dict[str, list[float]] = {"local": [], "job": []}
    for _ in range(ROUNDS + 1):
        for server, times in found.items():
            before = cpu(gateway.process.pid)
            load(gateway.port, [request(server)] * connections, CALLS)
            times.append((cpu(gateway.process.pid) - before) / CALLS * 1e6)
    ratios = [job / local for local, job in zip(found["local"][1:], found["job"][1:], strict=True)]
    return statistics.median(found["local"][1:]), statistics.median(found["job"][1:]), statistics.median(ratios)


def main() -> None:
    """Measure and print a table."""
    kube = Kube(Path(sys.argv[1]))
    pyz = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
    namespace = f"bench-{token_hex(4)}"
    kube.kubectl("create", "namespace", namespace)
    kube.wait_for(lambda: kube.items("serviceaccounts", namespace), "the namespace's service account")
    limits = {"max_connections_per_server": 64}
    job = {"id": "job", "runtime": kube.job(namespace), **limits}
    print("| what | local process | Job | ratio |\n|---|---|---|---|", flush=True)
    try:
        with tempfile.TemporaryDirectory() as name:
            entries = [job, echo_entry("local", **limits)]
            with RunningGateway(Path(name), entries, env={"KUBECONFIG": str(kube.config)}, pyz=pyz) as gateway:
                first_call(gateway)
                pairs = [(first_call(gateway), kubectl_run(kube, namespace)) for _ in range(STARTS)]
                ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
                print(f"| first call, `kubectl run --attach` {theirs:.2f} s | - | {ours:.2f} s | {ours / theirs:.2f} |")
                for connections in (64, 1):
                    local, remote, ratio = warm(gateway, connections)
                    what = f"CPU of a warm call, {connections} connections"
                    print(f"| {what} | {local:.0f} us | {remote:.0f} us | {ratio:.2f} |", flush=True)
    finally:
        kube.kubectl("delete", "namespace", namespace, "--wait=false")


if __name__ == "__main__":
    main()
