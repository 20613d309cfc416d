"""Servers that do what a test tells them by its calls, however bad (``fixtures/actor.py``), behind a real gateway."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from running import RunningGateway

ACTOR = Path(__file__).resolve().parent / "fixtures" / "actor.py"


class Actor:
    """A hostile server's entry, what it was sent, and how to make it act."""

    def __init__(self, folder: Path, id: str, prologue: str = "", **more: Any) -> None:
        self.id = id
        self.journal = folder / f"{id}.journal"
        self.journal.touch()
        args = ["-E", "-s", str(ACTOR), str(self.journal), *([prologue] if prologue else [])]
        runtime = {"type": "local-process", "command": sys.executable, "args": args}
        # Its era is given: it answers nothing that it does not know, and would be waited for.
        self.entry = {"id": id, "runtime": runtime, "era": "legacy", **more}
        self.gateway: RunningGateway

    def call(self, code: str, **more: Any) -> tuple[int, dict[str, str], Any]:
        """Run code in the server by a call: status, headers and body of the gateway's answer."""
        body = {"server_id": self.id, "jsonrpc": "2.0", "id": 7, "method": "tools/call"}
        body["params"] = {"name": "act", "arguments": {"code": code, **more}}
        status, headers, data = self.gateway.http("POST", "/mcp", body)
        return status, headers, json.loads(data)

    def text(self, code: str, **more: Any) -> str:
        """The text that the code answers with."""
        status, _, reply = self.call(code, **more)
        assert status == 200, reply
        return str(reply["result"]["content"][0]["text"])

    def noted(self) -> list[tuple[int, float, Any]]:
        """The journal: process, monotonic time, message or note."""
        whole = self.journal.read_text().rpartition("\n")[0]  # the last line may be half written
        return [tuple(json.loads(line)) for line in whole.splitlines()]

    def calls(self) -> list[Any]:
        """The calls that reached it."""
        return [m for _, _, m in self.noted() if isinstance(m, dict) and m.get("method") == "tools/call"]

    def wait_noted(self, wanted: Callable[[Any], bool], seconds: float = 10) -> tuple[int, float, Any]:
        """The first line of the journal that is wanted."""
        until = time.monotonic() + seconds
        while True:
            for entry in self.noted():
                if wanted(entry[2]):
                    return entry
            assert time.monotonic() < until, self.noted()
            time.sleep(0.005)

    @property
    def shown(self) -> dict[str, Any]:
        """GET /servers/ID."""
        return dict(self.gateway.json("GET", f"/servers/{self.id}"))

    @property
    def pid(self) -> int:
        """Of the running server."""
        return int(self.shown["instances"][0]["pid"])

    def starts(self) -> int:
        """How often the gateway has started it."""
        return len([line for line in list(self.gateway.lines) if line.endswith(f"Starting server server_id={self.id}")])

    def forget(self) -> None:
        """Stop it, and what the journal says."""
        self.gateway.http("POST", f"/servers/{self.id}/stop")
        self.journal.write_text("")


def wait_until(what: Callable[[], object], seconds: float = 10) -> float:
    """Wait until it is true; how long that took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds, what
        time.sleep(0.005)
    return time.monotonic() - begin


def memory(gateway: RunningGateway) -> float:
    """RSS of the gateway in MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{gateway.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
