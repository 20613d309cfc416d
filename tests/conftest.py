"""Fixtures for every test file: the built archive, and the real programs that tests/real/install.sh installs."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test shares what gateways remember with another one, or with whoever runs the tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.fixture
def strict_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are checked as strictly as by Python 3.13 and later."""
    lax = ssl.create_default_context

    def strict(*args: Any, **keys: Any) -> ssl.SSLContext:
        context = lax(*args, **keys)
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # as from Python 3.13 on
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)


@pytest.fixture(scope="session")
def gateway_pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of this tree, built once a session by the Python that runs the tests.

    MCP_GATEWAY_PYZ names one that is already built. Tests that replace or damage it do so to a copy.
    """
    if built := os.environ.get("MCP_GATEWAY_PYZ"):
        return Path(built).resolve()
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "build_zipapp.py"), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "gateway.pyz"


@pytest.fixture(scope="session")
def real_part() -> Callable[[str], Path]:
    """``real_part("py/sdk")`` is the folder of one part of tests/real/install.sh.

    Where it is not installed the test is skipped, and fails under MCP_GATEWAY_REAL=1: CI does without nothing.
    """
    cache = os.environ.get("MCP_TEST_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) if cache else Path(home) / "open-mcp-gateway-tests"

    def part(name: str) -> Path:
        found = folder / name
        if not found.is_dir():
            missing = f"{found} is not there; install it with tests/real/install.sh {name.rpartition('/')[2]}"
            if os.environ.get("MCP_GATEWAY_REAL") == "1":
                pytest.fail(missing)
            pytest.skip(missing)
        return found

    return part
