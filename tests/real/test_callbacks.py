"""Row A5: everything a server may do besides answering, end to end, against server-everything isolated by session.

The same client runs against the server directly, so that what is compared is what the server really does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningGateway

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
DRIVER = Path(__file__).resolve().parent.parent / "fixtures" / "clients" / "callbacks.py"


@pytest.fixture(scope="module")
def server(real_part: Part) -> list[str]:
    folder = real_part("npm/servers") / "node_modules/@modelcontextprotocol/server-everything"
    return [shutil.which("node") or "node", str(folder / "dist/index.js")]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, gateway_pyz: Path, server: list[str]) -> Iterator[RunningGateway]:
    runtime = {"type": "local-process", "command": server[0], "args": server[1:]}
    entry = {"id": "everything", "isolation": "session", "runtime": runtime}
    with RunningGateway(tmp_path_factory.mktemp("everything"), [entry], pyz=gateway_pyz) as running:
        yield running


def drive(real_part: Part, *target: str) -> dict[str, Any]:
    argv = [str(real_part("py/sdk") / "bin" / "python"), str(DRIVER), *target]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def direct(real_part: Part, server: list[str]) -> dict[str, Any]:
    return drive(real_part, "stdio", *server)


@pytest.mark.parametrize("transport", ["http", "sse", "stdio", "stdio-gateway"])
def test_A5_callbacks_work_as_they_do_directly(
    transport: str, direct: dict[str, Any], gateway: RunningGateway, gateway_pyz: Path, real_part: Part
) -> None:
    base = f"http://127.0.0.1:{gateway.port}"
    stdio = ["stdio", sys.executable, str(gateway_pyz), "stdio", "--server", "everything"]
    target = {
        "http": ["http", f"{base}/servers/everything/mcp"],
        "sse": ["sse", f"{base}/servers/everything/sse"],
        "stdio": [*stdio, "--catalog", str(gateway.catalog)],
        "stdio-gateway": [*stdio, "--gateway", base],
    }[transport]
    assert direct["sampled"] == direct["elicited"] == 1
    assert direct["cancelled"] and direct["logged"] and direct["updated"] and direct["roots_again"]
    assert len(direct["progress"]) == 5
    assert len(direct["conditional_tools"]) == 3
    assert direct["changed"], "the server announces its conditional tools"
    assert drive(real_part, *target) == direct
