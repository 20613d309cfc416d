"""What it costs to have many servers at one endpoint, for README. Run by hand, on Linux, on a quiet machine:

    python3 build_zipapp.py && python3 tests/bench/merged.py dist/gateway.pyz

CPU of the gateway's own process. Calls: a tools/call at /mcp with 20 servers in it, next to the same call at the
server's own endpoint, at 64 connections and at one. Lists: tools/list of ten servers with 100 tools each, next to
writing the same bytes from a static route of the gateway's own HTTP front. First list: after a restart, from disk, next
to the second. Rounds alternate; the figures are medians of the rounds' ratios.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eras
from running import HttpClient, RunningGateway, echo_entry

SERVERS = 20
LISTS = 300
RESTARTS = 9

MANY = """
import json, sys
schema = {"type": "object", "required": ["a"],
    "properties": {"a": {"type": "string", "description": "some words"}, "b": {"type": "integer"}}}
tools = [{"name": f"tool_{n}", "description": "x" * 120, "inputSchema": schema} for n in range(100)]
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    answer = {"jsonrpc": "2.0", "id": message["id"]}
    if message["method"] == "initialize":
        answer["result"] = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
            "serverInfo": {"name": "many", "version": "1"}}
    elif message["method"] == "tools/list":
        answer["result"] = {"tools": tools}
    else:
        answer["error"] = {"code": -32601, "message": "no"}
    print(json.dumps(answer), flush=True)
"""


def answers(port: int, data: bytes, count: int) -> bytes:
    """So many requests on one connection, one after the other: the last one's body."""
    body = b""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(count):
            sock.sendall(data)
            got = b""
            while b"\r\n\r\n" not in got:
                got += sock.recv(1 << 20)
            head, _, body = got.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            (length,) = (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            parts = [body]
            while length > sum(map(len, parts)):
                parts.append(sock.recv(1 << 20))
            body = b"".join(parts)
    return body


def calls(folder: Path, pyz: Path | None) -> None:
    """A call at the endpoint of all servers next to one at the server's own."""
    entries = [echo_entry(f"echo{n}") for n in range(SERVERS)]
    with RunningGateway(folder, entries, pyz=pyz, config={"max_connections_per_server": 256}) as gateway:
        HttpClient(gateway, "/mcp").request("tools/list")
        for connections in (64, 1):
            for client in ("legacy", "modern"):
                load = {
                    path: [eras.call(gateway, client, path, name) for _ in range(connections)]
                    for path, name in (("/servers/echo0/mcp", "echo"), ("/mcp", "echo0__echo"))
                }
                ratios = []
                for number in range(eras.ROUNDS + 1):
                    spent = []
                    for data in load.values():
                        before = eras.cpu(gateway.process.pid)
                        eras.load(gateway.port, data, eras.CALLS)
                        spent.append(eras.cpu(gateway.process.pid) - before)
                    if number:  # the first one warms up
                        ratios.append(spent[1] / spent[0])
                print(f"call, {client} client, {connections} connections: {statistics.median(ratios):.2f}")


def static(path: str) -> None:
    """Serve one file from the gateway's own HTTP front, whatever is asked; says its port."""
    import trio

    from gateway.downstream.server import ConnectionLimits, bind, serve

    body = Path(path).read_bytes()

    class App:
        limits = ConnectionLimits(max_body_bytes=1 << 20, max_connections=100)

        async def __call__(self, scope, receive, send):  # type: ignore[no-untyped-def]
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return

        async def handle(self, request):  # type: ignore[no-untyped-def]
            await request.body()
            await request.respond(200, body)

    sockets = bind("127.0.0.1", 0)
    print(sockets[0].getsockname()[1], flush=True)
    trio.run(lambda: serve(App(), sockets, shutdown_trigger=trio.sleep_forever))


def lists(folder: Path, pyz: Path | None) -> None:
    """A list of 1,000 tools next to the same bytes from a file, and the first one after a restart."""
    program = folder / "many.py"
    program.write_text(MANY)
    entries = [
        {"id": f"s{n}", "runtime": {"type": "local-process", "command": sys.executable, "args": ["-S", str(program)]}}
        for n in range(10)
    ]
    with RunningGateway(folder, entries, pyz=pyz) as gateway:
        client = HttpClient(gateway, "/mcp")
        assert len(client.request("tools/list")["result"]["tools"]) == 1000
        for kind in ("legacy", "modern"):
            data = eras.request(gateway, kind, "/mcp", "tools/list", {})
            body = folder / "body"
            body.write_bytes(answers(gateway.port, data, 1))
            command = [sys.executable, __file__, "--static", str(body)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
                assert other.stdout is not None
                port = int(other.stdout.readline())
                ratios = []
                for number in range(eras.ROUNDS + 1):
                    spent = []
                    for pid, to in ((other.pid, port), (gateway.process.pid, gateway.port)):
                        before = eras.cpu(pid)
                        answers(to, data, LISTS)
                        spent.append(eras.cpu(pid) - before)
                    if number:
                        ratios.append(spent[1] / spent[0])
                other.kill()
            size = body.stat().st_size
            print(f"list of 1,000 tools ({size:,} bytes), {kind} client: {statistics.median(ratios):.2f}")
    first = []
    for _ in range(RESTARTS):
        with RunningGateway(folder, entries, pyz=pyz) as gateway:
            data = eras.request(gateway, "legacy", "/mcp", "tools/list", {})
            spent = [eras.cpu(gateway.process.pid)]
            for _ in range(2):
                answers(gateway.port, data, 1)
                spent.append(eras.cpu(gateway.process.pid))
            children = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children").read_text().split()
            first.append((spent[1] - spent[0], spent[2] - spent[1], len(children)))
    ratio = statistics.median(one / two for one, two, _ in first)
    print(f"first list after a restart, next to the second: {ratio:.2f}; processes: {max(n for _, _, n in first)}")


def main() -> None:
    """Print the figures."""
    if sys.argv[1:2] == ["--static"]:
        static(sys.argv[2])
        return
    pyz = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        lists(Path(folder), pyz)
    with tempfile.TemporaryDirectory() as folder:
        calls(Path(folder), pyz)


if __name__ == "__main__":
    main()
