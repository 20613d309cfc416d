"""Memory and start of the built archive, for the table in README. Run by hand, on Linux, on a quiet machine:

    python3 build_zipapp.py && python3 tests/bench/footprint.py dist/gateway.pyz

Memory is the proportional set size (PSS) of the gateway's own processes, servers left out. A start is the time from
exec to the first answered tools/call of a small Python server, handshakes included; the median of several.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from running import HttpClient, RunningGateway, StdioClient, command, echo_entry

STREAMS = 1000
STARTS = 7


def pss(pid: int) -> float:
    """Megabytes of one process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)


def family(pid: int) -> list[int]:
    """The gateway and its guard; servers are told by their command line."""
    found = [pid]
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if parent == pid and b"echo_server" not in line:
                found.append(int(name))
    return found


def memory(pid: int) -> float:
    """Megabytes of the gateway's own processes."""
    return sum(pss(p) for p in family(pid))


def idle_http(pyz: Path, folder: Path) -> tuple[float, float]:
    """Megabytes after one call, and kilobytes for each of STREAMS idle event streams."""
    with RunningGateway(folder, [echo_entry("echo")], pyz=pyz) as gateway:
        gateway.call("echo", "echo", {"text": "x"})
        time.sleep(1.5)
        base = memory(gateway.process.pid)
        before = pss(gateway.process.pid)
        sockets = []
        for _ in range(STREAMS):
            session = HttpClient(gateway, "/servers/echo/mcp").session
            stream = socket.create_connection(("127.0.0.1", gateway.port))
            head = "".join(f"{name}: {value}\r\n" for name, value in session.items())
            stream.sendall(
                f"GET /servers/echo/mcp HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{head}\r\n".encode()
            )
            assert b"200" in stream.recv(65536)
            sockets.append(stream)
        time.sleep(1.5)
        each = (pss(gateway.process.pid) - before) * 1024 / STREAMS
        for stream in sockets:
            stream.close()
    return base, each


def start_http(pyz: Path, folder: Path) -> float:
    """Seconds from exec to the first answered call over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "catalog.yaml").write_text(json.dumps({"servers": [echo_entry("echo")]}))
    body = json.dumps(
        {"server_id": "echo", "id": 1, "method": "tools/call", "params": {"name": "echo", "arguments": {"text": "x"}}}
    ).encode()
    head = (
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    begin = time.perf_counter()
    argv = [*command(pyz), "http", "--catalog", "catalog.yaml", "--listen-addr", f"127.0.0.1:{port}"]
    process = subprocess.Popen(argv, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(head + body)
                    assert b'"text":"x"' in connection.recv(65536)
                return time.perf_counter() - begin
            except OSError:
                time.sleep(0.002)
    finally:
        process.terminate()
        process.wait()


def start_stdio(pyz: Path, folder: Path) -> tuple[float, float]:
    """Seconds from exec to the first answered call on stdio, and the megabytes then."""
    (folder / "catalog.yaml").write_text(json.dumps({"servers": [echo_entry("echo")]}))
    begin = time.perf_counter()
    client = StdioClient([*command(pyz), "stdio", "-s", "echo", "-c", str(folder / "catalog.yaml")])
    client.request("tools/call", {"name": "echo", "arguments": {"text": "x"}})
    seconds = time.perf_counter() - begin
    time.sleep(0.5)
    used = memory(client.process.pid)
    client.close()
    return seconds, used


def main() -> None:
    """Measure and print a table."""
    pyz = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, each = idle_http(pyz, folder)
        http = [start_http(pyz, folder) for _ in range(STARTS)]
        stdio = [start_stdio(pyz, folder) for _ in range(STARTS)]
    print("| what | figure |\n|---|---|")
    print(f"| http mode, one server called, idle | {base:.1f} MB |")
    print(f"| stdio front, one server called | {statistics.median(s[1] for s in stdio):.1f} MB |")
    print(f"| each of {STREAMS} idle event streams | {each:.1f} KB |")
    print(f"| exec to first answered tools/call, http | {statistics.median(http):.2f} s |")
    print(f"| exec to first answered tools/call, stdio | {statistics.median(s[0] for s in stdio):.2f} s |")


if __name__ == "__main__":
    main()
