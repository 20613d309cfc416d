"""Row B5: real clients of either era in front of the gateway, at servers that speak only one or both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningGateway

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CLIENTS = FIXTURES / "clients"
LEGACY, MODERN = "2025-11-25", "2026-07-28"

SERVERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "everything": ("echo", {"message": "hello"}, "Echo: hello"),
    "time": ("get_current_time", {"timezone": "Asia/Tokyo"}, '"timezone": "Asia/Tokyo"'),
    "modern": ("test_simple_text", {}, "This is a simple text response for testing."),
}
"""A tool of each server, its arguments, and what its answer says."""

REVISIONS = {"legacy": LEGACY, "auto": MODERN, MODERN: MODERN}
"""What a client in each mode agrees on with the gateway, whatever the server speaks."""


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, gateway_pyz: Path, real_part: Part
) -> Iterator[RunningGateway]:
    package = real_part("npm/servers") / "node_modules" / "@modelcontextprotocol" / "server-everything"
    python = str(real_part("py/sdk") / "bin" / "python")
    commands = {
        "everything": ["node", str(package / "dist" / "index.js")],
        "time": [str(real_part("py/time") / "bin" / "mcp-server-time")],
        "modern": [python, str(FIXTURES / "era_server.py"), "--era", "modern"],
    }
    entries = [
        {"id": id, "isolation": "session", "runtime": {"type": "local-process", "command": head, "args": tail}}
        for id, (head, *tail) in commands.items()
    ]
    with RunningGateway(tmp_path_factory.mktemp("eras"), entries, pyz=gateway_pyz) as running:
        yield running


def run(argv: list[str], **more: Any) -> Any:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def target(gateway: RunningGateway, pyz: Path, how: str, server: str) -> list[str]:
    base = f"http://127.0.0.1:{gateway.port}"
    stdio = ["stdio", sys.executable, str(pyz), "stdio", "--server", server]
    return {
        "http": ["http", f"{base}/servers/{server}/mcp"],
        "merged": ["http", f"{base}/mcp"],
        "stdio": [*stdio, "--catalog", str(gateway.catalog)],
        "stdio-gateway": [*stdio, "--gateway", base],
    }[how]


def check(found: dict[str, Any], text: str, mode: str | None, server: str) -> None:
    assert text in found["text"]
    assert found["tools"] > 0
    assert found["refused"] is True
    if mode is not None:
        assert found["revision"] == REVISIONS[mode]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("mode", REVISIONS)
@pytest.mark.parametrize("how", ["http", "merged", "stdio", "stdio-gateway"])
def test_B5_python_sdk(
    how: str, mode: str, server: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part
) -> None:
    python = str(real_part("py/sdk") / "bin" / "python")
    tool, arguments, text = SERVERS[server]
    argv = [python, str(CLIENTS / "era_client.py"), "sdk", mode, tool, json.dumps(arguments)]
    check(run([*argv, *target(gateway, gateway_pyz, how, server)]), text, mode, server)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("mode", REVISIONS)
@pytest.mark.parametrize("how", ["http", "merged", "stdio", "stdio-gateway"])
def test_B5_typescript_client(
    how: str, mode: str, server: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part
) -> None:
    tool, arguments, text = SERVERS[server]
    argv = ["node", str(CLIENTS / "era_client.mjs"), mode, tool, json.dumps(arguments)]
    found = run([*argv, *target(gateway, gateway_pyz, how, server)], cwd=real_part("npm/client"))
    check(found, text, mode, server)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("how", ["http", "stdio"])
def test_B5_fastmcp(how: str, server: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part) -> None:
    python = str(real_part("py/fastmcp") / "bin" / "python")
    tool, arguments, text = SERVERS[server]
    argv = [python, str(CLIENTS / "era_client.py"), "fastmcp", "-", tool, json.dumps(arguments)]
    check(run([*argv, *target(gateway, gateway_pyz, how, server)]), text, None, server)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize("how", ["http", "stdio"])
def test_B5_inspector(
    how: str, era: str, server: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part, tmp_path: Path
) -> None:
    program = real_part("npm/inspector") / "node_modules" / ".bin" / "mcp-inspector"
    tool, arguments, text = SERVERS[server]
    _, *rest = target(gateway, gateway_pyz, how, server)
    head = [rest[0], "--transport", "http"]
    if how == "stdio":
        # A command's own options would be taken for the inspector's, so it gets them from a file.
        config = tmp_path / "inspector.json"
        config.write_text(json.dumps({"mcpServers": {"it": {"command": rest[0], "args": rest[1:]}}}))
        head = ["--config", str(config), "--server", "it"]
    pairs = [f"{name}={value}" for name, value in arguments.items()]
    tail = ["--method", "tools/call", "--tool-name", tool, *(["--tool-arg", *pairs] if pairs else [])]
    env = {**os.environ, "PATH": f"{real_part('node24')}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    answer = run([str(program), "--cli", *head, "--protocol-era", era, *tail], env=env)
    assert text in answer["content"][0]["text"]


ASKING = {
    "modern": ("test_elicitation", {"message": "who?"}, "ann@example.org"),
    "everything": ("trigger-elicitation-request", {}, "User provided the requested information"),
}


@pytest.mark.parametrize("server", ASKING)
@pytest.mark.parametrize("mode", REVISIONS)
@pytest.mark.parametrize("how", ["http", "stdio", "stdio-gateway"])
def test_B5_a_typescript_client_is_asked_by_servers_of_the_other_era(
    how: str, mode: str, server: str, gateway: RunningGateway, gateway_pyz: Path, real_part: Part
) -> None:
    tool, arguments, text = ASKING[server]
    argv = ["node", str(CLIENTS / "era_client.mjs"), mode, tool, json.dumps(arguments)]
    found = run([*argv, *target(gateway, gateway_pyz, how, server)], cwd=real_part("npm/client"))
    assert text in found["text"]
    assert found["revision"] == REVISIONS[mode]
