"""Row B6: twelve clients of both eras on one shared server, all with the same ids and the same progress tokens.

Everything that the server says bears the name of the client it is for, in the text, so that whatever arrives at another
one is found, whether it is an answer, a progress notification, a log line, or the notice of a change. Every client has
two calls in flight whose ids are a number and the same number as a string, and whose tokens are the other way round.
"""

from __future__ import annotations

import collections
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import ACCEPT, RunningGateway, command

CALLS = int(os.environ.get("MCP_GATEWAY_MIXED_CALLS", "100000"))
STEPS = 2
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "same", "version": "1"}}

SERVER = r"""
import json, os, queue, random, select, sys
# Speaks one era over a pipe, where it answers calls in random order, between other calls' progress and logs; or the
# modern one over HTTP, where a log line can be told to belong to a call.
era = "modern" if sys.argv[1] == "http" else sys.argv[1]
rng = random.Random(7)
META = "io.modelcontextprotocol/"
info = {"name": "mixed", "version": "1"}
capabilities = {"tools": {"listChanged": True}, "resources": {"subscribe": True, "listChanged": True}, "logging": {}}
out, held, uris, listens = [], [], set(), {}
changes = 0

def note(method, params):
    return {"jsonrpc": "2.0", "method": method, "params": params}

def notice(method, params, wanted):
    # To whoever listens, once for each listening.
    if era == "legacy":
        if wanted or params["uri"] in uris:
            out.append(note(method, params))
        return
    for id, (lists, own, put) in list(listens.items()):
        if params.get("uri") in own or wanted in lists:
            put(note(method, {**params, "_meta": {META + "subscriptionId": id}}))

def call(id, params, modern):
    global changes
    arguments = params["arguments"]
    text, token = arguments["text"], (params.get("_meta") or {}).get("progressToken")
    mine = [note("notifications/progress", {"progressToken": token, "progress": i + 1, "total": 2, "message": text})
            for i in range(2)]
    if not modern or META + "logLevel" in params["_meta"]:
        mine.insert(1, note("notifications/message", {"level": "info", "logger": "mixed", "data": text}))
    if "touch" in arguments:
        notice("notifications/resources/updated", {"uri": arguments["touch"]}, None)
    if arguments.get("change"):
        changes += 1
        notice("notifications/tools/list_changed", {}, "toolsListChanged")
    return mine, {"content": [{"type": "text", "text": text}]}

def handle(m, put=out.append):
    method, params = m.get("method"), m.get("params") or {}
    modern = META + "protocolVersion" in (params.get("_meta") or {})
    if method == "notifications/cancelled":
        listens.pop(params.get("requestId"), None)
    if "id" not in m or method is None:
        return
    mine, cached, result, error = [], {}, None, None
    if method == "server/discover" and era != "legacy":
        result = {"supportedVersions": ["2026-07-28"], "capabilities": capabilities}
        cached = {"ttlMs": 0, "cacheScope": "private"}
    elif method == "initialize" and era != "modern":
        result = {"protocolVersion": params["protocolVersion"], "capabilities": capabilities, "serverInfo": info}
    elif method == "tools/list":
        result = {"tools": [{"name": "say", "inputSchema": {"type": "object"}, "description": f"change {changes}"}]}
        cached = {"ttlMs": 0, "cacheScope": "private"}
    elif method == "resources/list":
        result = {"resources": [{"uri": f"mixed://{n}", "name": f"r{n}"} for n in range(12)]}
        cached = {"ttlMs": 0, "cacheScope": "private"}
    elif method == "resources/subscribe":
        uris.add(params["uri"])
        result = {}
    elif method == "subscriptions/listen":
        wanted = params["notifications"]
        own = wanted.get("resourceSubscriptions") or ()
        listens[m["id"]] = ({name for name in wanted if wanted[name] is True}, set(own), put)
        put(note("notifications/subscriptions/acknowledged",
                 {"notifications": wanted, "_meta": {META + "subscriptionId": m["id"]}}))
        return
    elif method == "tools/call":
        mine, result = call(m["id"], params, modern)
    elif method in ("ping", "logging/setLevel", "resources/unsubscribe"):
        result = {}
    else:
        error = {"code": -32601, "message": "Method not found"}
    if error is None and modern:
        result = {"resultType": "complete", **result, **cached, "_meta": {META + "serverInfo": info}}
    mine.append({"jsonrpc": "2.0", "id": m["id"], **({"error": error} if error else {"result": result})})
    return mine

def serve_http():
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def chunk(self, data):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        def do_POST(self):
            m = json.loads(self.rfile.read(int(self.headers["content-length"])))
            waiting = queue.SimpleQueue()
            mine = handle(m, waiting.put)
            listening = m.get("method") == "subscriptions/listen"
            plain = not listening and (mine is None or len(mine) == 1)
            self.send_response(200 if mine or listening else 202)
            if plain:
                data = json.dumps(mine[0]).encode() if mine else b""
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while listening or mine:
                message = waiting.get() if listening else mine.pop(0)
                self.chunk(b"event: message\ndata: %b\n\n" % json.dumps(message).encode())
            self.chunk(b"")

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()

if sys.argv[1] == "http":
    serve_http()
rest = b""
while True:
    # What is held back waits for other calls to come in between, but not long.
    if held and not select.select([0], [], [], 0.001)[0]:
        data = None
    else:
        data = os.read(0, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            mine = handle(json.loads(line))
            if mine:
                held.append(mine)
    keep = []
    while held:
        mine = held.pop(rng.randrange(len(held)))
        out.append(mine.pop(0))
        if mine:
            (held if data is None or rng.random() < 0.8 else keep).append(mine)
    held = keep
    if out:
        data = b"".join(json.dumps(m, separators=(",", ":")).encode() + b"\n" for m in out)
        out.clear()
        while data:
            data = data[os.write(1, data):]
"""


class Client:
    """One of the twelve: what it sends, and a judge of everything that arrives at it."""

    def __init__(self, number: int, era: str, count: int, prefix: str = "") -> None:
        self.number, self.era, self.count = number, era, count
        self.name = f"client{number}"
        self.tool = f"{prefix}say"
        self.uri = f"mixed://{number}"
        self.wrong: list[str] = []
        self.seen: collections.Counter[str] = collections.Counter()
        self.noticed = threading.Event()
        self.listen_id: Any = 7 if number % 4 else "7"

    def context(self, **more: Any) -> dict[str, Any]:
        if self.era == "legacy":
            return more
        return {
            f"{META}protocolVersion": MODERN,
            f"{META}clientInfo": {"name": "same", "version": "1"},
            f"{META}clientCapabilities": {},
            f"{META}logLevel": "debug",
            **more,
        }

    def message(self, id: Any, method: str, params: dict[str, Any], **meta: Any) -> dict[str, Any]:
        if context := self.context(**meta):
            params = {**params, "_meta": context}
        return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}

    def lane(self, lane: int, n: int) -> tuple[dict[str, Any], Any, str]:
        """The n-th call of a lane: the request, its token and its text."""
        id: Any = n if lane == 0 else str(n)
        token: Any = str(n) if lane == 0 else n
        text = f"{self.name}:{lane}:{n}"
        arguments: dict[str, Any] = {"text": text}
        if n % 50 == 25:
            arguments["touch"] = f"mixed://{(self.number + n // 50) % 12}"
        if lane == 0 and n in (self.count // 3, self.count // 2):
            arguments["change"] = True
        params = {"name": self.tool, "arguments": arguments}
        return self.message(id, "tools/call", params, progressToken=token), token, text

    def listening(self) -> dict[str, Any]:
        wanted = {"toolsListChanged": True, "resourceSubscriptions": [self.uri]}
        return self.message(self.listen_id, "subscriptions/listen", {"notifications": wanted})

    # -------------------------------------------------------------------------------------------------------- judging
    def fault(self, what: str, message: Any) -> None:
        if len(self.wrong) < 10:
            self.wrong.append(f"{self.name} ({self.era}) {what}: {json.dumps(message)[:400]}")

    def told(self, message: dict[str, Any]) -> None:
        """A notification that belongs to no call of its own."""
        method, params = message.get("method"), message.get("params", {})
        if self.era == "modern" and method != "notifications/message":
            id = params.get("_meta", {}).get(f"{META}subscriptionId")
            if type(id) is not type(self.listen_id) or id != self.listen_id:
                self.fault("another's subscription", message)
        if method == "notifications/resources/updated":
            if params["uri"] != self.uri:
                self.fault("another's resource", message)
            self.seen["updated"] += 1
        elif method == "notifications/tools/list_changed":
            self.seen["changed"] += 1
        elif method == "notifications/message":
            if not str(params["data"]).startswith(f"{self.name}:"):
                self.fault("another's log", message)
            self.seen["logs"] += 1
        elif method == "notifications/subscriptions/acknowledged":
            self.seen["acknowledged"] += 1
        else:
            self.fault("nobody's message", message)
        if self.seen["updated"] and self.seen["changed"]:
            self.noticed.set()

    def progressed(self, message: dict[str, Any], token: Any, text: str, step: int) -> None:
        params = message["params"]
        given = params["progressToken"]
        if type(given) is not type(token) or given != token or params["message"] != text or params["progress"] != step:
            self.fault(f"progress of another call than {token!r} {text}, step {step}", message)
        self.seen["progress"] += 1

    def answered(self, message: dict[str, Any], id: Any, text: str) -> None:
        given = message.get("id")
        result = message.get("result") or {}
        if type(given) is not type(id) or given != id or "content" not in result:
            self.fault(f"answer to another call than {id!r}", message)
        elif result["content"][0]["text"] != text or result.get("isError"):
            self.fault(f"answer to another call than {text}", message)
        else:
            self.seen["calls"] += 1


class Connection:
    """A connection to an HTTP server, kept alive: as little as it takes to read replies and event streams."""

    def __init__(self, port: int, path: str, headers: dict[str, str]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [f"{name}: {value}" for name, value in headers.items()]
        self.head = "\r\n".join([f"%s {path} HTTP/1.1", "Host: localhost", f"Accept: {ACCEPT}", *lines])
        self.buffer = b""

    def send(self, message: dict[str, Any], method: str = "POST", **headers: str) -> None:
        data = json.dumps(message).encode() if message else b""
        more = "".join(f"\r\n{name.replace('_', '-')}: {value}" for name, value in headers.items())
        head = f"{self.head % method}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}{more}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def _line(self) -> bytes:
        while (end := self.buffer.find(b"\r\n")) < 0:
            self._more()
        line, self.buffer = self.buffer[:end], self.buffer[end + 2 :]
        return line

    def _take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self._more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data

    def receive(self) -> tuple[int, dict[str, str], Iterator[dict[str, Any]]]:
        """Status, headers, and the messages as they come."""
        status = int(self._line().split()[1])
        headers = {}
        while line := self._line():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, self._messages(headers)

    def _messages(self, headers: dict[str, str]) -> Iterator[dict[str, Any]]:
        if "content-length" in headers:
            data = self._take(int(headers["content-length"]))
            if data and "json" in headers["content-type"]:
                yield json.loads(data)
            return
        if headers.get("transfer-encoding") != "chunked":
            return
        text = b""
        while size := int(self._line(), 16):
            text += self._take(size)
            self._take(2)
            *whole, text = text.split(b"\n\n")
            for event in whole:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:") and len(line) > 6:
                        yield json.loads(line[5:])
        self._line()


class HttpClient(Client):
    """Streamable HTTP: a connection for each lane, and one for what the server says by itself."""

    def start(self, gateway: RunningGateway, path: str) -> list[threading.Thread]:
        self.port, self.path = gateway.port, path
        self.headers = {}
        if self.era == "legacy":
            self._handshake()
        self.listener = Connection(self.port, path, self.headers)
        if self.era == "legacy":
            self.listener.send({}, "GET")
        else:
            self.listener.send(self.listening(), MCP_Protocol_Version=MODERN, Mcp_Method="subscriptions/listen")
        status, _, self.messages = self.listener.receive()
        assert status == 200, (self.name, status)
        threading.Thread(target=self._listen, daemon=True).start()
        return [threading.Thread(target=self._calls, args=(lane,)) for lane in (0, 1)]

    def _handshake(self) -> None:
        connection = Connection(self.port, self.path, {})
        connection.send(self.message("start", "initialize", HELLO))
        status, headers, messages = connection.receive()
        assert status == 200 and len(list(messages)) == 1, status
        connection.socket.close()
        self.headers = {"Mcp-Session-Id": headers["mcp-session-id"], "MCP-Protocol-Version": "2025-11-25"}
        connection = Connection(self.port, self.path, self.headers)
        connection.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert connection.receive()[0] == 202
        for method, params in (("logging/setLevel", {"level": "debug"}), ("resources/subscribe", {"uri": self.uri})):
            connection.send(self.message("start", method, params))
            status, _, messages = connection.receive()
            reply = list(messages)[-1]
            assert status == 200 and "result" in reply, (method, status, reply)
        connection.socket.close()

    def _listen(self) -> None:
        try:
            for message in self.messages:
                if "id" in message and "method" not in message:
                    return
                self.told(message)
        except (EOFError, OSError):
            pass

    def _calls(self, lane: int) -> None:
        more = {}
        if self.era == "modern":
            more = {"MCP_Protocol_Version": MODERN, "Mcp_Method": "tools/call", "Mcp_Name": self.tool}
        connection = Connection(self.port, self.path, self.headers)
        for n in range(self.count):
            request, token, text = self.lane(lane, n)
            connection.send(request, **more)
            status, _, messages = connection.receive()
            step = 0
            for message in messages:
                if message.get("method") == "notifications/progress":
                    step += 1
                    self.progressed(message, token, text, step)
                elif "method" in message:
                    self.told(message)
                else:
                    self.answered(message, request["id"], text)
            if status != 200 or step != STEPS:
                self.fault(f"status {status} and {step} steps of", text)
        connection.socket.close()

    def settle(self, until: float) -> None:
        """Wait for notices that are still on their way."""
        self.noticed.wait(until - time.monotonic())

    def close(self) -> None:
        self.listener.socket.close()


class StdioClient(Client):
    """A desktop client's pipe: the gateway's stdio front before the running gateway."""

    def start(self, gateway: RunningGateway, path: str) -> list[threading.Thread]:
        base = f"http://127.0.0.1:{gateway.port}"
        argv = [*command(), "stdio", "--server", "mixed", "--gateway", base]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.era == "legacy":
            self._request("initialize", HELLO)
            self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
            self._request("logging/setLevel", {"level": "debug"})
            self._request("resources/subscribe", {"uri": self.uri})
        else:
            self.listen_id = "listen"
            self._send(self.listening())
            message = self._read()
            assert message.get("method") == "notifications/subscriptions/acknowledged", message
            self.told(message)
        return [threading.Thread(target=self._calls)]

    def _send(self, *messages: dict[str, Any]) -> None:
        self.process.stdin.write(b"".join(json.dumps(m).encode() + b"\n" for m in messages))
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.name}: the gateway has ended")
        return dict(json.loads(line))

    def _request(self, method: str, params: dict[str, Any]) -> None:
        self._send(self.message("start", method, params))
        while True:
            message = self._read()
            if message.get("id") == "start":
                assert "result" in message, message
                return
            self.told(message)

    def _calls(self) -> None:
        for n in range(self.count):
            lanes = [self.lane(lane, n) for lane in (0, 1)]
            self._send(*(request for request, _, _ in lanes))
            waiting = {(type(request["id"]), request["id"]): text for request, _, text in lanes}
            steps = {(type(token), token): [text, 0] for _, token, text in lanes}
            while waiting:
                message = self._read()
                if message.get("method") == "notifications/progress":
                    token = message["params"]["progressToken"]
                    step = steps.get((type(token), token))
                    if step is None:
                        self.fault("progress of another call", message)
                        continue
                    step[1] += 1
                    self.progressed(message, token, step[0], step[1])
                elif "method" in message:
                    self.told(message)
                else:
                    id = message.get("id")
                    text = waiting.pop((type(id), id), None)
                    if text is None:
                        self.fault("answer to another call", message)
                    else:
                        self.answered(message, id, text)
            if any(step != STEPS for _, step in steps.values()):
                self.fault("progress lost of", n)

    def settle(self, until: float) -> None:
        """As above; somebody has to read the pipe."""
        while not self.noticed.is_set() and time.monotonic() < until:
            self._request("tools/list", {})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


def clients(calls: int) -> list[Client]:
    """Eight over HTTP, two of them at the merged endpoint, and four over stdio, half of each era."""
    # A call over stdio passes two gateways: they make a quarter of the calls of the others.
    unit = calls // (2 * (8 * 4 + 4))
    made: list[Client] = []
    for number in range(12):
        era = "legacy" if number % 2 else "modern"
        if number < 8:
            made.append(HttpClient(number, era, unit * 4, "mixed__" if number in (2, 3) else ""))
        else:
            made.append(StdioClient(number, era, unit))
    made[0].count += (calls - 2 * sum(client.count for client in made)) // 2
    return made


@contextmanager
def running(folder: Path, kind: str) -> Iterator[RunningGateway]:
    """The gateway before one shared server of that kind."""
    script = folder / "server.py"
    script.write_text(SERVER)
    argv = [sys.executable, "-E", "-s", str(script), kind]
    server = None
    runtime: dict[str, Any] = {"type": "local-process", "command": argv[0], "args": argv[1:]}
    if kind == "http":
        server = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/mcp"
        runtime = {"type": "remote-http", "url": url, "allow_private": True}
    entry = {"id": "mixed", "runtime": runtime, "max_connections_per_server": 64}
    try:
        with RunningGateway(folder, [entry], config={"request_timeout_seconds": 60}) as gateway:
            yield gateway
    finally:
        if server is not None:
            server.kill()
            server.wait()
            server.stdout.close()


SHARES = {"modern": 0.45, "legacy": 0.45, "http": 0.1}


@pytest.mark.parametrize("kind", SHARES)
def test_B6_nothing_reaches_the_wrong_client(kind: str, tmp_path: Path) -> None:
    calls = int(CALLS * SHARES[kind])
    with running(tmp_path, kind) as gateway:
        everyone = clients(calls)
        threads = []
        try:
            for client in everyone:
                threads += client.start(gateway, "/mcp" if client.tool != "say" else "/servers/mixed/mcp")
            begin = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - begin
            for client in everyone:
                client.noticed.clear()
                client.seen["updated"] = client.seen["changed"] = 0
                arguments = {"text": "last", "touch": client.uri, "change": True}
                assert "result" in gateway.rest("mixed", "tools/call", {"name": "say", "arguments": arguments})
            for client in everyone:
                client.settle(time.monotonic() + 10)
        finally:
            for client in everyone:
                client.close()
        assert gateway.process.poll() is None
        starts = [line for line in gateway.lines if "Starting server" in line]
    wrong = [fault for client in everyone for fault in client.wrong]
    assert not wrong, "\n".join(wrong[:10])
    total: collections.Counter[str] = collections.Counter()
    for client in everyone:
        total.update(client.seen)
        assert client.seen["updated"] and client.seen["changed"], (client.name, client.seen)
    assert total["calls"] == calls // 2 * 2
    assert total["progress"] == STEPS * total["calls"]
    assert len(starts) == 1, "all of them share one server"
    # Over a pipe nobody can tell which call a log line belongs to, so it reaches nobody.
    assert bool(total["logs"]) == (kind == "http"), total
    print(f"{dict(total)} in {seconds:.1f} s")
