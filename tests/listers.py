"""Servers that list what a test wants (``fixtures/lister.py``), how often they were started, and what it cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peers import LegacyClient, items
from running import RunningGateway

LISTER = Path(__file__).resolve().parent / "fixtures" / "lister.py"
UNAVAILABLE = "io.github.open-mcp-gateway/unavailable"


class Lister:
    """One server: its entry, and how often it was started. ``said`` is what lister.py is told."""

    def __init__(self, folder: Path, id: str, *, entry: Mapping[str, Any] | None = None, **said: Any) -> None:
        self.id = id
        self.file = folder / f"{id}.starts"
        self.list = folder / f"{id}.list"
        self.said = {"id": id, "starts": str(self.file), "list": str(self.list), **said}
        args = ["-I", "-S", str(LISTER), json.dumps(self.said)]
        runtime = {"type": "local-process", "command": sys.executable, "args": args}
        # Its era is given, so that it is started once.
        self.entry: dict[str, Any] = {"id": id, "runtime": runtime, "era": "legacy", **(entry or {})}

    @property
    def starts(self) -> int:
        """How often a process was started."""
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0

    def names(self, prefix: str | None = None) -> set[str]:
        """Its tools' merged names."""
        start = f"{self.id}__" if prefix is None else prefix
        return {f"{start}{self.id}-{n}" for n in range(self.said.get("tools", 5))}

    def becomes(self, **said: Any) -> None:
        """The next start lists this."""
        self.list.write_text(json.dumps(said))


def entries(listers: Iterable[Lister]) -> list[dict[str, Any]]:
    """The catalog's entries."""
    return [lister.entry for lister in listers]


def running(pid: int) -> list[str]:
    """The listers among the descendants of a process, by their command lines."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(path.name))
    found, front = [], [pid]
    while front:
        front = [child for one in front for child in parents.get(one, [])]
        for child in front:
            with suppress(OSError):
                line = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                if LISTER.name in line:
                    found.append(line)
    return found


def cpu(pid: int) -> float:
    """Milliseconds of CPU that all threads of a process have used."""
    total = 0
    for path in Path(f"/proc/{pid}/task").iterdir():
        total += int((path / "schedstat").read_text().split()[0])
    return total / 1e6


def wait_until(what: Callable[[], object], seconds: float = 20) -> float:
    """Wait until it is true; how long that took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - begin


def names(client: Any, method: str = "tools/list") -> set[str]:
    """What a client of ``peers`` lists, on all pages. Nothing comes twice."""
    member = {"tools/list": "tools", "prompts/list": "prompts"}.get(method, "resources")
    pages = client.pages(method)
    found = items(pages, member)
    assert len(found) == sum(len(page[member]) for page in pages), "an item came twice"
    return set(found)


def filled(folder: Path, listers: Iterable[Lister], **more: Any) -> Path:
    """Have a gateway list all of it once, and stop it: the folder of its files."""
    with RunningGateway(folder, entries(listers), **more) as gateway:
        client = LegacyClient(gateway, "/mcp")
        reply = client.request("tools/list").result
        assert "_meta" not in reply, reply["_meta"]
        for method in ("prompts/list", "resources/list", "resources/templates/list"):
            client.request(method)
    return folder / "state" / "listings"
