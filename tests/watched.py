"""A running gateway that can be asked what it holds, and looks at processes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from running import RunningGateway

WATCHED = Path(__file__).resolve().parent / "fixtures" / "watched_gateway.py"


class WatchedGateway(RunningGateway):
    """``fixtures/watched_gateway.py``, for everything else the same."""

    def __init__(self, folder: Path, servers: Sequence[dict[str, Any]] = (), **more: Any) -> None:
        self._asked = 0
        super().__init__(folder, servers, pyz=WATCHED, **more)

    def census(self) -> dict[str, int]:
        """How many tasks, descriptors, sessions, units ... there are now."""
        self._asked += 1
        self.process.send_signal(signal.SIGUSR1)
        line = self.wait_for_line("census ", count=self._asked, seconds=30)
        return dict(json.loads(line.removeprefix("census ")))

    @property
    def memory(self) -> float:
        """RSS in MiB."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    @property
    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return (
            sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"))
            / 1e9
        )


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
