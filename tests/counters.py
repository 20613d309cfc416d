"""Counting servers (``fixtures/counter_server.py``) and callers of every front, which look alike to a test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from peers import NEWEST, Answer, Inbox, Json, LegacyClient, ModernClient, Reply
from running import ACCEPT, RunningGateway, StdioClient, command

COUNTER = Path(__file__).resolve().parent / "fixtures" / "counter_server.py"


@attrs.frozen
class Event:
    """Something that a server has written down. ``at`` is in seconds of the machine's monotonic clock."""

    what: str
    pid: int
    at: float
    tag: str


class Counter:
    """One catalog entry, and what its servers have written down."""

    def __init__(self, folder: Path, id: str, isolation: str = "shared", *, starting: float = 0, **entry: Any) -> None:
        self.id = id
        self.log = folder / f"{id}.log"
        said = {"log": str(self.log), "starting": starting}
        args = ["-I", "-S", str(COUNTER), json.dumps(said)]
        runtime = {"type": "local-process", "command": sys.executable, "args": args}
        self.entry = {"id": id, "runtime": runtime, "isolation": isolation, **entry}

    def events(self, *whats: str) -> list[Event]:
        """What happened, in its order; only these things if any are named."""
        lines = self.log.read_text().rpartition("\n")[0].splitlines() if self.log.exists() else []
        found = [line.split(" ", 3) for line in lines]
        return [Event(what, int(pid), float(at), tag) for what, pid, at, tag in found if not whats or what in whats]


def most_at_once(events: list[Event], begin: str, end: str) -> int:
    """How many were between those two at once, at most."""
    now = most = 0
    # Of the same moment, ends come first: what only touches does not overlap.
    for event in sorted(events, key=lambda event: (event.at, event.what != end)):
        if event.what in (begin, end):
            now += 1 if event.what == begin else -1
            most = max(most, now)
    return most


class Refused(Exception):
    """A refusal, whatever it travelled in. ``status`` is HTTP's, 0 where there is none."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status, self.text = status, text


class SseClient:
    """A client of HTTP+SSE: one stream, and POSTs to where that says."""

    def __init__(
        self,
        gateway: RunningGateway,
        path: str,
        capabilities: Json | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.gateway = gateway
        self.more = dict(headers or {})
        self._id = 0
        stream = Answer(gateway, "GET", path, None, {"Accept": "text/event-stream", **self.more})
        if stream.status != 200:
            (message,) = list(stream.messages())
            raise Refused(stream.status, message["error"]["message"])
        self.endpoint = ""
        while line := stream._response.readline().strip():
            if line.startswith(b"data:"):
                self.endpoint = line[5:].strip().decode()
        self.inbox = Inbox(stream)
        try:
            hello = {"protocolVersion": NEWEST, "capabilities": capabilities or {}, "clientInfo": {"name": "raw-sse"}}
            self.request("initialize", hello)
            self.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
        except BaseException:
            self.close()
            raise

    def post(self, message: Json) -> None:
        """One message, taken."""
        headers = {"Accept": ACCEPT, "Content-Type": "application/json", **self.more}
        answer = Answer(self.gateway, "POST", self.endpoint, message, headers)
        answer.close()
        assert answer.status == 202, answer.status

    def request(self, method: str, params: Json | None = None) -> Json:
        """The result of one request. Raises Refused for an error."""
        self._id += 1
        self.post({"jsonrpc": "2.0", "id": self._id, "method": method, "params": params or {}})
        while (reply := self.inbox.next()).get("id") != self._id:
            pass
        if "error" in reply:
            raise Refused(0, reply["error"]["message"])
        return dict(reply["result"])

    def close(self) -> None:
        """Close the stream, which ends the session."""
        self.inbox.close()


class _Strict(LegacyClient):
    """A session whose first refusal is the end of it."""

    def request(self, method: str, params: Json | None = None, *, token: Any = None, id: Any = None) -> Reply:
        reply = super().request(method, params, token=token, id=id)
        if "error" in reply.message:
            raise Refused(reply.status, reply.message["error"]["message"])
        return reply


class Caller:
    """Somebody who uses one counter. ``front`` is legacy, modern, sse, rest or stdio.

    ``merged`` goes through the endpoint of all servers. ``number`` tells modern callers of one key apart, by what they
    declare. A refusal raises Refused.
    """

    def __init__(
        self,
        front: str,
        gateway: RunningGateway,
        counter: str,
        *,
        key: str = "",
        merged: bool = False,
        number: int | None = None,
    ) -> None:
        self.front, self.gateway, self.counter, self.merged = front, gateway, counter, merged
        self.headers = {"X-API-Key": key} if key else {}
        self.client: Any = None
        capabilities: Json = {} if number is None else {"roots": {"n": number}}
        end = {"sse": "/sse"}.get(front, "/mcp")
        path = end if merged else f"/servers/{counter}{end}"
        if front == "modern":
            self.client = ModernClient(gateway, path, capabilities, headers=self.headers)
        elif front == "sse":
            self.client = SseClient(gateway, path, capabilities, headers=self.headers)
        elif front == "stdio":
            which = [] if merged else ["-s", counter]
            argv = [*command(), "stdio", "-g", f"http://127.0.0.1:{gateway.port}", *which]
            variables = {k: v for k, v in os.environ.items() if k != "MCP_GATEWAY_API_KEY"}
            self.client = StdioClient(argv, env={**variables, **({"MCP_GATEWAY_API_KEY": key} if key else {})})
        elif front == "legacy":
            self.client = _Strict(gateway, path, capabilities, headers=self.headers)

    def call(self, tool: str, **arguments: Any) -> str:
        """A tool's text."""
        name = f"{self.counter}__{tool}" if self.merged else tool
        params = {"name": name, "arguments": arguments}
        if self.front == "rest":
            body = {"server_id": self.counter, "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
            status, _, data = self.gateway.http("POST", "/mcp", body, self.headers)
            reply = json.loads(data)
        elif self.front == "sse":
            status, reply = 200, {"result": self.client.request("tools/call", params)}
        elif self.front == "stdio":
            status, reply = 0, self.client.request("tools/call", params)
        else:
            answer = self.client.request("tools/call", params)
            status, reply = answer.status, answer.message
        if "error" in reply or reply["result"].get("isError"):
            error = reply.get("error") or {"message": reply["result"]["content"][0]["text"]}
            raise Refused(status, error["message"])
        return str(reply["result"]["content"][0]["text"])

    def count(self) -> tuple[int, int]:
        """The next number, and the process that it is from."""
        number, pid = self.call("count").split()
        return int(number), int(pid)

    def close(self) -> None:
        """Go away in good order: DELETE of the session, end of the stream, end of the input."""
        if self.client is not None:
            self.client.close()
