"""Row A12 and W1-W12, RB30-RB32 with real files and a real gateway."""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from running import RunningGateway, echo_entry


@pytest.fixture
def gateway(tmp_path: Path) -> Any:
    with RunningGateway(tmp_path, [echo_entry("keep"), echo_entry("edit"), echo_entry("drop")]) as running:
        yield running


def pid(gateway: RunningGateway, server_id: str) -> int:
    return int(json.loads(gateway.call(server_id, "info"))["pid"])


def summary(gateway: RunningGateway, count: int = 1) -> str:
    return gateway.wait_for_line("Loaded", count=count + 1)


NEW = [echo_entry("keep"), echo_entry("edit", env={"X": "2"}), echo_entry("new")]


def test_A12_RB32_W3_W4_W5_W6_W8_W9_P11_an_editors_rename(gateway: RunningGateway) -> None:
    before = {id: pid(gateway, id) for id in ("keep", "edit", "drop")}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(gateway.call, id, "sleep", {"seconds": 3}) for id in before]
        time.sleep(0.3)
        written = time.monotonic()
        gateway.write(NEW)
        line = summary(gateway)
        assert time.monotonic() - written < 2 * 5
        assert "Loaded 3 servers (added: 1, removed: 1, modified: 1, unchanged: 1)" in line
        for text in (
            "Catalog file changed, scheduling reload...",
            "Reloading catalog from:",
            "Catalog changed, reloading...",
        ):
            gateway.wait_for_line(text)
        assert pid(gateway, "keep") == before["keep"]
        assert pid(gateway, "edit") != before["edit"], "new calls use the new definition"
        assert json.loads(gateway.call("edit", "info"))["env"]["X"] == "2"
        assert gateway.call("new", "echo", {"text": "there"}) == "there"
        assert gateway.http("POST", "/mcp", {"server_id": "drop", "id": 1, "method": "tools/list"})[0] == 404
        assert [r.result() for r in running] == ["slept"] * 3, "running calls finish on the old definition"
    until = time.monotonic() + 10
    while Path(f"/proc/{before['edit']}").exists() or Path(f"/proc/{before['drop']}").exists():
        assert time.monotonic() < until, "drained, then stopped"
        time.sleep(0.05)


def test_A12_RB31_a_symlink_swap_is_seen(tmp_path: Path) -> None:
    for name, servers in (("v1", [echo_entry("a")]), ("v2", [echo_entry("a"), echo_entry("b")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "catalog.yaml").write_text(json.dumps({"servers": servers}))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "catalog.yaml").symlink_to("..data/catalog.yaml")
    with RunningGateway(tmp_path, catalog=tmp_path / "catalog.yaml") as gateway:
        first = pid(gateway, "a")
        (tmp_path / "..tmp").symlink_to("v2")
        os.replace(tmp_path / "..tmp", tmp_path / "..data")
        assert "Loaded 2 servers (added: 1, removed: 0, modified: 0, unchanged: 1)" in summary(gateway)
        assert pid(gateway, "a") == first


def test_A12_W1_RB31_a_hundred_writes_in_a_second_are_one_reload(gateway: RunningGateway) -> None:
    begin = time.monotonic()
    for n in range(100):
        gateway.catalog.write_text(json.dumps({"servers": [echo_entry("keep"), echo_entry(f"n{n}")]}))
        time.sleep(max(0.0, begin + (n + 1) / 100 - time.monotonic()))
    assert "Loaded 2 servers" in summary(gateway)
    gateway.wait_for_line("Registry updated")
    time.sleep(1.5)
    assert len([line for line in gateway.lines if "Reloading catalog from:" in line]) == 1
    assert json.loads(gateway.http("GET", "/servers")[2])[1]["id"] == "n99"


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ('{"servers": [{"id": "keep", "runt', "parse error"),
        ('{"servers": [{"id": "a"}]}', "validation error"),
        ("", None),
    ],
)
def test_A12_W2_W7_RB30_half_a_file_keeps_the_old_catalog(gateway: RunningGateway, bad: str, kind: str | None) -> None:
    if kind is None:
        gateway.catalog.unlink()
    else:
        gateway.catalog.write_text(bad)
    gateway.wait_for_line("Failed to parse catalog:")
    gateway.wait_for_line(f"Keeping previous catalog due to {kind or ''}")
    before = pid(gateway, "keep")
    assert gateway.call("edit", "echo", {"text": "old"}) == "old"
    time.sleep(1.5)
    assert len([line for line in gateway.lines if "Failed to parse catalog:" in line]) == 1, "one ERROR per change"
    gateway.write(NEW)
    summary(gateway)
    assert pid(gateway, "keep") == before


def test_G12_H9_H24_W10_manual_reload(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [echo_entry("a")], config={"hot_reload": False}) as gateway:
        gateway.write([echo_entry("a"), echo_entry("b")])
        time.sleep(1.5)
        assert len(gateway.json("GET", "/servers")) == 1, "no watcher"
        assert gateway.json("POST", "/admin/reload") == {
            "status": "ok",
            "message": "Catalog reloaded",
            "servers_loaded": 2,
            "servers_added": 1,
            "servers_removed": 0,
            "servers_modified": 0,
            "servers_unchanged": 1,
        }
        gateway.catalog.write_text('{"servers": [\n\n{"id": ')
        status, _, data = gateway.http("POST", "/admin/reload")
        assert status == 500
        assert json.loads(data)["message"].startswith("Failed to reload catalog: parse error at line 3")
        assert len(gateway.json("GET", "/servers")) == 2


def test_G18_config_reload(gateway: RunningGateway, tmp_path: Path) -> None:
    assert gateway.http("GET", "/servers")[0] == 200
    config = {"catalog_path": str(gateway.catalog), "api_key": "k" * 20}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    until = time.monotonic() + 10
    while gateway.http("GET", "/servers")[0] != 401:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gateway.http("GET", "/servers", headers={"X-API-Key": "k" * 20})[0] == 200
