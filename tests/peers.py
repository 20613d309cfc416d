"""Raw clients of both eras, and servers of either era whose record can be read: both sides of a gateway.

``House`` is a running gateway in front of ``fixtures/peer_server.py`` in several ways; ``Record`` is what such a server
was told. ``LegacyClient`` and ``ModernClient`` send what a test says, byte by byte if it wants, and hide nothing that
they get. For unit tests ``Scripted`` is the same server without a process: lines in, lines out.
"""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from running import ACCEPT, RunningGateway

Json = dict[str, Any]

SERVER = Path(__file__).resolve().parent / "fixtures" / "peer_server.py"
META = "io.modelcontextprotocol/"
MODERN = "2026-07-28"
NEWEST = "2025-11-25"
ALL: Json = {"sampling": {"tools": {}}, "elicitation": {"form": {}, "url": {}}, "roots": {"listChanged": True}}
"""What a client declares that can be asked everything."""
SECONDS = 10.0
"""How long anything here is waited for."""
NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}


def wait_until(what: Callable[[], Any], why: str = "", seconds: float = SECONDS) -> Any:
    """The first true value."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, why or what
        time.sleep(0.005)
    return found


# ----------------------------------------------------------------------------------------------------- recorded servers
class Record:
    """What one entry's servers were told and have said, of all their processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def entries(self) -> list[Json]:
        """Every line that is complete."""
        whole = self.path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def got(self, method: str | None = None, **params: Any) -> list[Json]:
        """The messages that came in, of this method, with these members of params."""
        found = []
        for entry in self.entries():
            message = entry.get("got")
            if message is None or (method is not None and message.get("method") != method):
                continue
            own = message.get("params") or {}
            if all(name in own and own[name] == value for name, value in params.items()):
                found.append({**entry, **message})
        return found

    def calls(self, tag: str, method: str = "tools/call") -> list[Json]:
        """The calls whose arguments bear this tag, or reads of a URI that does."""
        every = self.got(method)
        return [m for m in every if (m["params"].get("arguments") or {}).get("tag", m["params"].get("uri")) == tag]

    def call(self, tag: str, method: str = "tools/call") -> Json:
        """The only one of them, as soon as it has come."""
        wait_until(lambda: self.calls(tag, method), f"no call {tag!r} in {self.entries()[-8:]}")
        (found,) = self.calls(tag, method)
        return found

    def events(self, name: str, **members: Any) -> list[Json]:
        """What the server has noted itself."""
        found = [e for e in self.entries() if e.get("event") == name]
        return [e for e in found if all(e.get(key) == value for key, value in members.items())]

    def sent(self, method: str) -> list[Json]:
        """The requests and notifications that went out."""
        return [e["sent"] for e in self.entries() if "sent" in e and e["sent"].get("method") == method]

    def wait(self, what: Callable[[Record], Any]) -> Any:
        """The first true value of something about it."""
        until = time.monotonic() + SECONDS
        while not (found := what(self)):
            assert time.monotonic() < until, self.entries()[-12:]
            time.sleep(0.005)
        return found

    def __len__(self) -> int:
        return len(self.entries())


class House:
    """A gateway and the peers behind it. ``add`` them, then enter it.

    HTTP peers run beside the gateway; pipes are its own children.
    """

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        self.config = config
        self.entries: list[Json] = []
        self.records: dict[str, Record] = {}
        self.gateway: RunningGateway
        self._running: list[subprocess.Popen[bytes]] = []

    def arguments(self, id: str, era: str, *more: str) -> list[str]:
        """A peer's command line."""
        self.records[id] = Record(self.folder / f"{id}.record")
        named = () if "--name" in more else ("--name", id)
        return ["-I", "-S", str(SERVER), "--era", era, "--record", str(self.records[id].path), *named, *more]

    def pipe(self, id: str, era: str, /, *more: str, **entry: Any) -> None:
        """A server on a pipe."""
        runtime = {"type": "local-process", "command": sys.executable, "args": self.arguments(id, era, *more)}
        self.entries.append({"id": id, "runtime": runtime, **entry})

    def http(self, id: str, era: str, /, *more: str, headers: Mapping[str, str] | None = None, **entry: Any) -> str:
        """A server at a URL: the URL."""
        argv = [sys.executable, *self.arguments(id, era, "--http", "0", *more)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._running.append(process)
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/mcp"
        self.at(id, url, headers=headers, **entry)
        return url

    def at(
        self, id: str, url: str, *, record_of: str = "", headers: Mapping[str, str] | None = None, **entry: Any
    ) -> None:
        """An entry for a URL. ``record_of`` names the entry whose server that is."""
        if record_of:
            self.records[id] = self.records[record_of]
        runtime = {"type": "remote-sse", "url": url, **({"headers": dict(headers)} if headers else {})}
        self.entries.append({"id": id, "runtime": runtime, **entry})

    def __enter__(self) -> House:
        self.gateway = RunningGateway(self.folder, self.entries, config=self.config)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.gateway.stop()
        finally:
            for process in self._running:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


# -------------------------------------------------------------------------------------------------------------- answers
class Answer:
    """The response to one request, read as it comes."""

    def __init__(self, gateway: RunningGateway, method: str, path: str, body: Any, headers: Mapping[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=3 * SECONDS)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self._connection.request(method, path, data, dict(headers))
            assert self._connection.sock is not None
            self._socket = self._connection.sock
            self._response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}
        self.streamed = self.headers.get("content-type") == "text/event-stream"
        self.raw = b""

    def messages(self) -> Iterator[Json]:
        """Each message once; at the end everything is closed."""
        try:
            if not self.streamed:
                self.raw = self._response.read()
                if self.raw:
                    yield json.loads(self.raw)
                return
            data = b""
            while line := self._response.readline():
                self.raw += line
                line = line.rstrip(b"\r\n")
                if line.startswith(b"data:"):
                    data += line[5:].strip()
                elif not line and data:
                    found, data = json.loads(data), b""
                    yield found
        except (OSError, http.client.HTTPException):
            if self._connection.sock is not None or not self._response.isclosed():
                raise
        finally:
            self.close()

    def abort(self) -> None:
        """Close it while something is still to come, as a client that goes away does."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class Reply:
    """The whole answer to a request: the reply, and what came before it."""

    def __init__(self, answer: Answer, message: Json, notes: list[Json]) -> None:
        self.status, self.headers, self.streamed, self.raw = answer.status, answer.headers, answer.streamed, answer.raw
        self.message, self.notes = message, notes

    @property
    def result(self) -> Json:
        assert "result" in self.message, self.message
        return dict(self.message["result"])

    @property
    def error(self) -> Json:
        assert "error" in self.message, self.message
        return dict(self.message["error"])

    @property
    def text(self) -> str:
        return str(self.result["content"][0]["text"])

    def noted(self, method: str) -> list[Json]:
        """The params of the notifications of one kind that came before."""
        return [note["params"] for note in self.notes if note["method"] == method]


class Inbox:
    """A stream that stays open, read by a thread of its own."""

    def __init__(self, answer: Answer, id: str = "") -> None:
        self.answer = answer
        self.id = id
        self.seen: list[Json] = []
        self._box: queue.Queue[Json | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError, http.client.HTTPException, ValueError):
            for message in self.answer.messages():
                self._box.put(message)
        self._box.put(None)

    def next(self, method: str = "") -> Json:
        """The next message, of this method if one is given; None of the others in between is kept back."""
        until = time.monotonic() + SECONDS
        while True:
            try:
                message = self._box.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {method or 'message'} came; seen: {self.seen}") from None
            assert message is not None, f"the stream ended; seen: {self.seen}"
            self.seen.append(message)
            if not method or message.get("method") == method:
                return message

    def drained(self, quiet: float = 0) -> list[Json]:
        """What has come and was not asked for, and what comes until there was nothing for ``quiet`` seconds."""
        found = []
        with suppress(queue.Empty):
            while (message := self._box.get(quiet > 0, quiet or None)) is not None:
                found.append(message)
        self.seen += found
        return found

    def close(self) -> None:
        self.answer.abort()
        self._thread.join(5)


def header_text(value: Any) -> str:
    """A name or URI as a header can carry it (2026-07-28, header mirroring)."""
    text = str(value)
    if text.isascii() and text.isprintable() and text == text.strip() and not text.startswith("=?base64?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def answers_to(question: Json) -> Json:
    """What our user, model and disk say to a question: a result."""
    method, params = question["method"], question.get("params") or {}
    if method == "elicitation/create":
        return {"action": "accept", **({} if params.get("mode") == "url" else {"content": {"name": "Ada"}})}
    if method == "sampling/createMessage":
        return {"role": "assistant", "content": {"type": "text", "text": "said"}, "model": "m", "example.com/x": [1]}
    return {"roots": [{"uri": "file:///r", "name": "r"}]}


Answerer = Callable[[Json], "Json | None"]


# -------------------------------------------------------------------------------------------------------------- clients
class LegacyClient:
    """A session. ``capabilities`` are declared; questions are answered by ``answerer`` and kept in ``asked``."""

    letter = "L"

    def __init__(
        self,
        gateway: RunningGateway,
        path: str,
        capabilities: Json | None = None,
        *,
        version: str = NEWEST,
        info: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.gateway, self.path = gateway, path
        self.capabilities = ALL if capabilities is None else capabilities
        self.info = info or {"name": "raw-legacy", "version": "9"}
        self.more = dict(headers or {})
        self.session: dict[str, str] = {}
        self.asked: list[Json] = []
        self.answerer: Answerer = answers_to
        self._id = 0
        hello = {"protocolVersion": version, "capabilities": self.capabilities, "clientInfo": self.info}
        self.hello = self.request("initialize", hello)
        self.facts = self.hello.result
        self.session = {
            "Mcp-Session-Id": self.hello.headers["mcp-session-id"],
            "MCP-Protocol-Version": self.facts["protocolVersion"],
        }
        self.notify("notifications/initialized")

    def send(self, message: Any, http_method: str = "POST", **headers: str | None) -> Answer:
        """Anything, with the session's headers; None takes one away."""
        sent: dict[str, str | None] = {"Accept": ACCEPT, "Content-Type": "application/json", **self.more}
        sent |= {**self.session, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return Answer(self.gateway, http_method, self.path, message, {n: v for n, v in sent.items() if v is not None})

    def start(self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None) -> Answer:
        """A request whose answer is read elsewhere."""
        self._id += 1
        sent = dict(params or {})
        if token is not None:
            sent["_meta"] = {**sent.get("_meta", {}), "progressToken": token}
        return self.send({"jsonrpc": "2.0", "id": self._id if id is None else id, "method": method, "params": sent})

    def finish(self, answer: Answer) -> Reply:
        """Read an answer to its end. A question is answered as it comes."""
        notes: list[Json] = []
        for message in answer.messages():
            if "method" not in message:
                for _ in answer.messages() if answer.streamed else ():
                    pass
                return Reply(answer, message, notes)
            if "id" in message:
                self.asked.append(message)
                said = self.answerer(message)
                if said is not None:
                    self.answer(message["id"], said)
            else:
                notes.append(message)
        raise AssertionError(f"{answer.status} without a reply: {answer.raw!r}")

    def answer(self, id: Any, said: Json) -> None:
        """Answer a question: a result, or ``{"error": ...}``."""
        body = said if "error" in said else {"result": said}
        answer = self.send({"jsonrpc": "2.0", "id": id, **body})
        assert answer.status == 202, answer.status
        answer.close()

    def request(self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None) -> Reply:
        """A request and all that came of it."""
        return self.finish(self.start(method, params, token=token, id=id))

    def call(self, tool: str, *, token: Any = None, id: Any = None, **arguments: Any) -> Reply:
        """A tool."""
        return self.request("tools/call", {"name": tool, "arguments": arguments}, token=token, id=id)

    def ask(self, method: str, params: Json, *, token: Any = None) -> Reply:
        """A request whose questions are answered on the way."""
        return self.request(method, params, token=token)

    def notify(self, method: str, params: Json | None = None) -> None:
        """A notification."""
        answer = self.send({"jsonrpc": "2.0", "method": method, **({"params": params} if params else {})})
        assert answer.status == 202, answer.status
        answer.close()

    def listen(self, **filter: Any) -> Inbox:
        """The session's own stream; it knows no filter but subscriptions."""
        inbox = Inbox(self.send(None, "GET", Accept="text/event-stream"))
        assert inbox.answer.status == 200, inbox.answer.status
        for uri in filter.get("resourceSubscriptions", ()):
            self.request("resources/subscribe", {"uri": uri})
        return inbox

    def pages(self, method: str) -> list[Json]:
        """The results of all pages of a list."""
        return _pages(self, method)

    def close(self) -> None:
        """End the session."""
        if self.session:
            self.send(None, "DELETE").close()


class ModernClient:
    """Requests with a context. Its questions come as ``input_required``; ``ask`` goes through the rounds."""

    letter = "M"

    def __init__(
        self,
        gateway: RunningGateway,
        path: str,
        capabilities: Json | None = None,
        *,
        info: Json | None = None,
        level: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.gateway, self.path = gateway, path
        self.capabilities = ALL if capabilities is None else capabilities
        self.info = info or {"name": "raw-modern", "version": "9"}
        self.level = level
        self.more = dict(headers or {})
        self.asked: list[Json] = []
        self.rounds: list[Json] = []
        self.answerer: Answerer = answers_to
        self._id = 100

    @property
    def meta(self) -> Json:
        """A request's context."""
        found = {
            f"{META}protocolVersion": MODERN,
            f"{META}clientInfo": self.info,
            f"{META}clientCapabilities": self.capabilities,
        }
        return found | ({f"{META}logLevel": self.level} if self.level else {})

    def send(self, message: Any, http_method: str = "POST", **headers: str | None) -> Answer:
        """Anything, with the headers that mirror it; None takes one away."""
        sent: dict[str, str | None] = {"Accept": ACCEPT, "Content-Type": "application/json", **self.more}
        if isinstance(message, dict):
            sent |= {"MCP-Protocol-Version": MODERN, "Mcp-Method": message.get("method")}
            name = NAMED.get(str(message.get("method")))
            if name is not None:
                sent["Mcp-Name"] = header_text((message.get("params") or {}).get(name))
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(self.gateway, http_method, self.path, message, {n: v for n, v in sent.items() if v is not None})

    def message(self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None) -> Json:
        """A request with its context."""
        self._id += 1
        sent = dict(params or {})
        sent["_meta"] = {**self.meta, **sent.get("_meta", {}), **({} if token is None else {"progressToken": token})}
        return {"jsonrpc": "2.0", "id": self._id if id is None else id, "method": method, "params": sent}

    def start(
        self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None, **headers: str | None
    ) -> Answer:
        """A request whose answer is read elsewhere."""
        message = self.message(method, params, token=token, id=id)
        return self.send(message, "POST", **headers)

    def finish(self, answer: Answer) -> Reply:
        """Read an answer to its end."""
        *notes, reply = list(answer.messages())
        assert "method" not in reply, reply
        assert all("id" not in note for note in notes), notes
        return Reply(answer, reply, notes)

    def request(
        self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None, **headers: str | None
    ) -> Reply:
        """A request and all that came of it."""
        return self.finish(self.start(method, params, token=token, id=id, **headers))

    def call(self, tool: str, *, token: Any = None, id: Any = None, **arguments: Any) -> Reply:
        """A tool."""
        return self.request("tools/call", {"name": tool, "arguments": arguments}, token=token, id=id)

    def ask(self, method: str, params: Json, *, token: Any = None) -> Reply:
        """A request, repeated with the answers until it needs none; notes are those of all rounds."""
        notes: list[Json] = []
        sent = dict(params)
        for _ in range(12):
            reply = self.request(method, sent, token=token)
            notes += reply.notes
            if reply.message.get("result", {}).get("resultType") != "input_required":
                reply.notes = notes
                return reply
            self.rounds.append(reply.result)
            responses = {}
            for key, question in (reply.result.get("inputRequests") or {}).items():
                self.asked.append(question)
                said = self.answerer(question)
                if said is not None:
                    responses[key] = said
            sent = {**params, "inputResponses": responses}
            if "requestState" in reply.result:
                sent["requestState"] = reply.result["requestState"]
        raise AssertionError("it never ends")

    def notify(self, method: str, params: Json | None = None) -> None:
        """A notification."""
        answer = self.send({"jsonrpc": "2.0", "method": method, "params": {**(params or {}), "_meta": self.meta}})
        assert answer.status == 202, answer.status
        answer.close()

    def listen(self, **filter: Any) -> Inbox:
        """A subscription, acknowledged."""
        wanted = filter or {"toolsListChanged": True, "promptsListChanged": True, "resourcesListChanged": True}
        self._id += 1
        id = f"listen:{self._id}"
        answer = self.start("subscriptions/listen", {"notifications": wanted}, id=id)
        assert answer.status == 200 and answer.streamed, answer.status
        inbox = Inbox(answer, id)
        inbox.next("notifications/subscriptions/acknowledged")
        return inbox

    def pages(self, method: str) -> list[Json]:
        """The results of all pages of a list."""
        return _pages(self, method)

    def close(self) -> None:
        """There is nothing to end."""


AnyClient = LegacyClient | ModernClient


def _pages(client: AnyClient, method: str) -> list[Json]:
    found = [client.request(method).result]
    while "nextCursor" in found[-1]:
        assert len(found) < 50
        found.append(client.request(method, {"cursor": found[-1]["nextCursor"]}).result)
    return found


def items(pages: Sequence[Json], member: str) -> dict[str, Json]:
    """What the pages of a list hold, by name."""
    key = {"resources": "uri", "resourceTemplates": "uriTemplate"}.get(member, "name")
    return {item[key]: item for page in pages for item in page[member]}


# ---------------------------------------------------------------------------------------------------------- without I/O
def load_server() -> Any:
    """The module of ``fixtures/peer_server.py``."""
    found = sys.modules.get("peer_server")
    if found is None:
        spec = importlib.util.spec_from_file_location("peer_server", SERVER)
        assert spec is not None and spec.loader is not None
        found = sys.modules["peer_server"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


class Scripted:
    """A peer without I/O: ``feed`` it a line, read what it ``says``. ``entries`` is its record."""

    def __init__(self, era: str, **more: Any) -> None:
        module = load_server()
        self.entries: list[Json] = []
        self.said: list[Json] = []
        self.peer = module.Peer(era, record=self.entries.append, **more)
        self.connection = module.Connection(self.peer, lambda message, related: self.said.append(message))

    def feed(self, line: str | bytes) -> list[Json]:
        """One message in, the messages that it led to out."""
        before = len(self.said)
        self.connection.receive(json.loads(line))
        return self.said[before:]
