"""What a modern call costs next to a legacy one, for the table in README. Run by hand, on Linux, on a quiet machine:

    python3 build_zipapp.py && python3 tests/bench/eras.py dist/gateway.pyz

CPU of the gateway's own process for each tools/call over HTTP, for the four pairs of client and server era, at 64
connections and at one. Rounds of the pairs alternate, so that a disturbance meets all; the figure is the median of the
rounds' ratios to the legacy client at the legacy server. Latency says nothing here: the load is a Python process.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from running import HttpClient, RunningGateway, echo_entry

ROUNDS = 15
CALLS = 4000
META = "io.modelcontextprotocol/"
PAIRS = [(client, server) for client in ("legacy", "modern") for server in ("legacy", "modern")]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def request(gateway: RunningGateway, client: str, path: str, method: str, params: dict[str, object]) -> bytes:
    """One request as bytes."""
    if client == "legacy":
        head = dict(HttpClient(gateway, path).session)
    else:
        context = {
            "protocolVersion": "2026-07-28",
            "clientInfo": {"name": "bench", "version": "1"},
            "clientCapabilities": {},
        }
        params = {**params, "_meta": {META + name: value for name, value in context.items()}}
        head = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": method}
        if "name" in params:
            head["Mcp-Name"] = str(params["name"])
    body = json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).encode()
    head |= {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "Content-Length": str(len(body)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def call(gateway: RunningGateway, client: str, path: str, name: str) -> bytes:
    """One tools/call of an echo as bytes."""
    return request(gateway, client, path, "tools/call", {"name": name, "arguments": {"text": "hello"}})


def load(port: int, each: list[bytes], calls: int) -> None:
    """So many calls, one after the other on each connection."""
    selector = selectors.DefaultSelector()
    connections = len(each)
    for data in each:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ, data)
        sock.sendall(data)
    left, open_ = calls - connections, connections
    while open_:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            reply = sock.recv(65536)
            assert reply.startswith(b"HTTP/1.1 200") and b"hello" in reply, reply
            if left > 0:
                left -= 1
                sock.sendall(key.data)
            else:
                selector.unregister(sock)
                sock.close()
                open_ -= 1


def main() -> None:
    """Print the table."""
    pyz = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    servers = [echo_entry(era, era=era, max_connections_per_server=256) for era in ("legacy", "modern")]
    with tempfile.TemporaryDirectory() as folder, RunningGateway(Path(folder), servers, pyz=pyz) as gateway:
        for connections in (64, 1):
            requests = {
                (client, server): [call(gateway, client, f"/servers/{server}/mcp", "echo") for _ in range(connections)]
                for client, server in PAIRS
            }
            ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
            base = []
            for data in requests.values():
                load(gateway.port, data, CALLS)
            for _ in range(ROUNDS):
                spent = {}
                for pair, data in requests.items():
                    before = cpu(gateway.process.pid)
                    load(gateway.port, data, CALLS)
                    spent[pair] = cpu(gateway.process.pid) - before
                base.append(spent["legacy", "legacy"] / CALLS * 1e6)
                for pair, seconds in spent.items():
                    ratios[pair].append(seconds / spent["legacy", "legacy"])
            print(f"{connections} connections: legacy client, legacy server {statistics.median(base):.0f} us of CPU")
            for (client, server), found in ratios.items():
                print(f"  {client} client, {server} server: {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
