"""Row A4: real clients in front of the gateway, over HTTP, over HTTP+SSE where they have it, and with the archive as
the command of a stdio entry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningGateway, echo_entry

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
CLIENTS = Path(__file__).resolve().parent.parent / "fixtures" / "clients"
EXPECTED = {"tools": 10, "echo": "hällo"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, gateway_pyz: Path) -> Iterator[RunningGateway]:
    with RunningGateway(tmp_path_factory.mktemp("gateway"), [echo_entry("echo")], pyz=gateway_pyz) as running:
        yield running


def run(argv: list[str], **more: Any) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def targets(gateway: RunningGateway, pyz: Path) -> dict[str, list[str]]:
    base = f"http://127.0.0.1:{gateway.port}"
    return {
        "http": ["http", f"{base}/servers/echo/mcp"],
        "merged": ["http", f"{base}/mcp"],
        "sse": ["sse", f"{base}/servers/echo/sse"],
        "merged-sse": ["sse", f"{base}/sse"],
        "stdio": ["stdio", sys.executable, str(pyz), "stdio", "--server", "echo", "--catalog", str(gateway.catalog)],
        "stdio-gateway": ["stdio", sys.executable, str(pyz), "stdio", "--server", "echo", "--gateway", base],
    }


TRANSPORTS = ["http", "merged", "sse", "merged-sse", "stdio", "stdio-gateway"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_A4_python_sdk(transport: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part) -> None:
    python = real_part("py/sdk") / "bin" / "python"
    argv = [str(python), str(CLIENTS / "python_sdk.py"), *targets(gateway, gateway_pyz)[transport]]
    assert json.loads(run(argv)) == EXPECTED


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_A4_fastmcp(transport: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part) -> None:
    python = real_part("py/fastmcp") / "bin" / "python"
    argv = [str(python), str(CLIENTS / "fast_mcp.py"), *targets(gateway, gateway_pyz)[transport]]
    assert json.loads(run(argv)) == EXPECTED


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_A4_typescript_sdk(transport: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part) -> None:
    folder = real_part("npm/sdk1")
    argv = ["node", str(CLIENTS / "typescript_sdk.mjs"), *targets(gateway, gateway_pyz)[transport]]
    assert json.loads(run(argv, cwd=folder)) == EXPECTED


@pytest.mark.parametrize("transport", ["http", "sse", "stdio"])
def test_A4_inspector(transport: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part) -> None:
    program = real_part("npm/inspector") / "node_modules" / ".bin" / "mcp-inspector"
    kind, *target = targets(gateway, gateway_pyz)[transport]
    tail = ["--method", "tools/call", "--tool-name", "echo", "--tool-arg", "text=hi"]
    how = [] if kind == "stdio" else ["--transport", kind]
    env = {**os.environ, "PATH": f"{real_part('node24')}{os.pathsep}{os.environ['PATH']}"}
    if kind == "stdio":
        # A command's own options would be taken for the inspector's, so it gets them from a file.
        config = gateway.folder / "inspector.json"
        config.write_text(json.dumps({"mcpServers": {"it": {"command": target[0], "args": target[1:]}}}))
        target = ["--config", str(config), "--server", "it"]
    answer = json.loads(run([str(program), "--cli", *target, *how, *tail], env=env))
    assert answer["content"][0]["text"] == "hi"


@pytest.mark.parametrize("transport", ["http", "stdio"])
def test_A4_mcpc(transport: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part, tmp_path: Path) -> None:
    program = real_part("npm/mcpc") / "node_modules" / ".bin" / "mcpc"
    kind, *target = targets(gateway, gateway_pyz)[transport]
    entry = {"url": target[0]} if kind == "http" else {"command": target[0], "args": target[1:]}
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"it": entry}}))
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{real_part('node24')}{os.pathsep}{os.environ['PATH']}"}
    run([str(program), "connect", f"{config}:it", "@s"], env=env)
    try:
        output = run([str(program), "--json", "@s", "tools-call", "echo", "text:=hi"], env=env)
        assert "hi" in json.dumps(json.loads(output)), output
    finally:
        run([str(program), "close", "@s"], env=env)


def test_node_is_there() -> None:
    assert shutil.which("node"), "the real clients and servers need Node 20 or newer"
