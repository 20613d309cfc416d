"""Row C8: however fast a list changes, every stream is told seldom, of the last change always, at no cost in memory.

One real gateway, 20 real servers, 500 real connections of all three kinds, all read by one loop.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import statistics
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from listers import Lister, entries
from peers import MODERN, NEWEST, LegacyClient, ModernClient, items, wait_until
from running import ACCEPT
from watched import WatchedGateway

VIEW = "/views/all"
CHANGED = b'"notifications/tools/list_changed"'
MOST = 10
"""Notices that one stream may carry in a second."""
SECOND = 0.95
"""The second in which they are counted: the kernel may deliver one notice late, and the tenth after it at once."""
PATIENCE = 60.0


class Stream:
    """One open connection and the notices that have come on it.

    Of each notice it is known that it came after one moment and before another: nothing that delays its reader is
    mistaken for haste of the gateway's.
    """

    def __init__(
        self, gateway: WatchedGateway, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE)
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *map(": ".join, headers.items())]
        lines += [f"Content-Length: {len(body)}"] * bool(body)
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.buffer = b""
        head = self.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        self.came: list[tuple[float, float]] = []
        self.others: list[bytes] = []
        self.read_at = 0.0
        self.client: Any = None

    def until(self, end: bytes) -> bytes:
        """What comes up to this, waiting for it."""
        while end not in self.buffer:
            data = self.socket.recv(65536)
            assert data, self.buffer
            self.buffer += data
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def read(self, not_before: float) -> bool:
        """Take what has come; whether more may come. ``not_before`` is when nothing had come yet."""
        data = b""
        with suppress(BlockingIOError):
            data = self.socket.recv(1 << 16)
            if not data:
                return False
        now = time.monotonic()
        *events, self.buffer = (self.buffer + data).split(b"\n\n")
        for event in events:
            if CHANGED in event:
                self.came.append((max(not_before, self.read_at), now))
            elif b"data: {" in event:
                self.others.append(event)
        self.read_at = now
        return True

    def most_in_a_second(self) -> int:
        """How many notices have come within one second, at least: the most."""
        window: deque[float] = deque()
        most = 0
        for after, before in self.came:
            window.append(after)
            while window and before - window[0] >= SECOND:
                window.popleft()
            most = max(most, len(window))
        return most


def legacy(gateway: WatchedGateway) -> Stream:
    """The standalone stream of a session."""
    client = LegacyClient(gateway, f"{VIEW}/mcp", {})
    stream = Stream(gateway, "GET", f"{VIEW}/mcp", {"Accept": "text/event-stream", **client.session}, b"")
    stream.client = client
    return stream


def modern(gateway: WatchedGateway) -> Stream:
    """A subscription."""
    client = ModernClient(gateway, f"{VIEW}/mcp", {})
    message = client.message("subscriptions/listen", {"notifications": {"toolsListChanged": True}})
    headers = {"Accept": ACCEPT, "Content-Type": "application/json", "MCP-Protocol-Version": MODERN}
    headers["Mcp-Method"] = message["method"]
    stream = Stream(gateway, "POST", f"{VIEW}/mcp", headers, json.dumps(message).encode())
    assert b"notifications/subscriptions/acknowledged" in stream.until(b"\n\n")
    stream.client = client
    return stream


def sse(gateway: WatchedGateway) -> Stream:
    """A session of HTTP+SSE."""
    stream = Stream(gateway, "GET", f"{VIEW}/sse", {"Accept": "text/event-stream"}, b"")
    path = stream.until(b"\n\n").partition(b"data: ")[2].decode()

    def post(method: str, params: dict[str, Any], id: int | None = None) -> bytes:
        message = {"jsonrpc": "2.0", "method": method, "params": params, **({} if id is None else {"id": id})}
        assert gateway.http("POST", path, message)[0] == 202
        return stream.until(b"\n\n") if id is not None else b""

    said = {"protocolVersion": NEWEST, "capabilities": {}, "clientInfo": {"name": "raw-sse", "version": "1"}}
    assert b"serverInfo" in post("initialize", said, 1)
    post("notifications/initialized", {})
    return stream


class Crowd:
    """All streams, read by one loop."""

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams
        self.selector = selectors.DefaultSelector()
        for stream in streams:
            stream.socket.setblocking(False)
            self.selector.register(stream.socket, selectors.EVENT_READ, stream)
        self._looked = time.monotonic()

    def read(self, seconds: float) -> bool:
        """Read for that long; whether anything came."""
        came = False
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            found = self.selector.select(until - now)
            for key, _ in found:
                assert key.data.read(self._looked), "a stream has ended"
                came = True
            self._looked = now
        return came

    def close(self) -> None:
        self.selector.close()
        for stream in self.streams:
            stream.socket.close()


def names(client: Any) -> set[str]:
    """What it lists."""
    return set(items(client.pages("tools/list"), "tools"))


def killed(caller: ModernClient) -> bool:
    """Kill the server of the storm, if it runs."""
    pid = caller.call("storm__storm-0").text.rpartition(":")[2]
    if not pid.isdigit():
        return False  # it has just been killed, or must not start again so soon
    os.kill(int(pid), signal.SIGKILL)
    return True


@pytest.mark.parametrize(
    ("streams", "changes", "pause"),
    [
        pytest.param(500, 150, 0.1, id="500 streams, a change every 100 ms"),
        # So few that the gateway could tell them of each change: the limit is what holds it back.
        pytest.param(25, 200, 0.02, id="25 streams, a change every 20 ms"),
    ],
)
def test_C8_P12_streams_of_a_list_that_always_changes(streams: int, changes: int, pause: float, tmp_path: Path) -> None:
    log = tmp_path / "changes"
    stays = {"idle_timeout_seconds": 0}
    listers = [Lister(tmp_path, f"s{n}", tools=10, entry=stays) for n in range(18)]
    listers.append(Lister(tmp_path, "fast", tools=10, churn=str(log), entry=stays))
    listers.append(Lister(tmp_path, "storm", tools=10, entry=stays))
    with WatchedGateway(tmp_path, entries(listers), views=[{"name": "all", "servers": ["*"]}]) as gateway:
        caller = ModernClient(gateway, f"{VIEW}/mcp", {})
        assert len(names(caller)) == 201
        before = gateway.census()
        makers = [legacy, legacy, modern, modern, sse]
        crowd = Crowd([makers[n % 5](gateway) for n in range(streams)])
        crowd.read(0.5)
        assert not any(stream.came or stream.others for stream in crowd.streams), "nothing has changed yet"

        begun, used = time.monotonic(), gateway.cpu
        memory: list[float] = []
        kills = 0
        caller.call("fast__fast-churn", changes=changes, pause=pause)
        while (done := len(log.read_text().splitlines()) if log.exists() else 0) < changes:
            assert time.monotonic() - begun < changes * pause + PATIENCE
            crowd.read(0.5)
            memory.append(gateway.memory)
            kills += done < 0.9 * changes and killed(caller)
        while crowd.read(1.0):
            assert time.monotonic() - begun < changes * pause + 2 * PATIENCE
        took, spent = time.monotonic() - begun, gateway.cpu - used
        memory.append(gateway.memory)

        last = float(log.read_text().split()[-1])
        counts = [len(stream.came) for stream in crowd.streams]
        most = max(stream.most_in_a_second() for stream in crowd.streams)
        late = max(stream.came[-1][1] for stream in crowd.streams if stream.came) - last
        third = max(memory[: len(memory) // 3])
        print(
            f"{kills} kills; {min(counts)} to {max(counts)} notices, {statistics.mean(counts) / took:.1f} a second, at "
            f"most {most} in one; the last {late:.2f} s after the last change; RSS {memory[0]:.1f}, {third:.1f}, "
            f"{memory[-1]:.1f} MiB; {spent:.1f} s of CPU in {took:.1f} s"
        )
        assert most <= MOST
        assert kills >= 3
        for stream in crowd.streams:
            assert len(stream.came) > 1 and stream.came[-1][1] > last, "it was not told of the last change"
            assert not stream.others, stream.others[:2]
        assert memory[-1] - third < 4
        # Whoever lists after the last notice sees the last state.
        newest = f"fast__fast-rev{changes}"
        for stream in crowd.streams[:: len(crowd.streams) // 20]:
            if stream.client is not None:
                assert {name for name in names(stream.client) if "-rev" in name} == {newest}

        # Afterwards nothing is left of them. (The server of the storm may be between two lives.)
        assert wait_until(lambda: "error" not in caller.call("storm__storm-0").message, seconds=PATIENCE)
        crowd.close()
        for stream in crowd.streams:
            if isinstance(stream.client, LegacyClient):
                stream.client.close()
        names_left = ("EventLog", "Listening", "Reader", "Session", "Subscription", "Turn", "Unit", "fds", "tasks")
        until = time.monotonic() + PATIENCE
        while left := {name: more for name in names_left if (more := gateway.census()[name] - before[name]) > 0}:
            assert time.monotonic() < until, left
            time.sleep(0.2)
