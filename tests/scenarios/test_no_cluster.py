"""Row E7: without a cluster the catalog is valid, calls say what was tried, and other servers know nothing of it."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.running import RunningGateway, command, echo_entry


def job(id: str, **keys: Any) -> dict[str, Any]:
    return {"id": id, "runtime": {"type": "k8s-job", "namespace": "mcp", "image": "acme/box:1", **keys}}


def test_E7_K28_no_cluster_is_told_with_all_that_was_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = f"http://127.0.0.1:{taken.getsockname()[1]}"
    config = tmp_path / "kubeconfig"
    config.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": server}}],
                "contexts": [{"name": "gone", "context": {"cluster": "c"}}],
            }
        )
    )
    env = {"KUBECONFIG": str(config), "KUBERNETES_SERVICE_HOST": ""}
    entries = [job("current"), job("gone", context="gone"), job("unknown", context="prod"), echo_entry("here")]
    told = {
        "current": f"{config}: there is no current-context",
        "gone": f"Kubernetes (context 'gone' of {config}, {server}) can't be reached: connection refused",
        "unknown": f"{config}: there is no context 'prod'; there are gone",
    }
    with RunningGateway(tmp_path, entries, env=env) as gateway:
        for id, text in told.items():
            status, _, data = gateway.http("POST", "/mcp", {"server_id": id, "method": "tools/list"})
            assert (status, text in json.loads(data)["message"]) == (502, True), data
            status, _, data = gateway.http("POST", f"/servers/{id}/start")
            assert (status, text in json.loads(data)["message"]) == (502, True), data
            assert gateway.call("here", "echo", {"text": id}) == id
        assert not any("Traceback" in line for line in gateway.lines)
    config.unlink()
    none = tmp_path / "none"
    none.mkdir()
    with RunningGateway(none, entries, env={**env, "HOME": str(none)}) as gateway:
        status, _, data = gateway.http("POST", "/mcp", {"server_id": "current", "method": "tools/list"})
        assert status == 502
        assert (
            "No Kubernetes cluster was found: not in a pod (KUBERNETES_SERVICE_HOST is not set); "
            f"{config} does not exist" in json.loads(data)["message"]
        )


def test_E7_RB65_check_names_relaxations_without_a_cluster(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(json.dumps({"servers": [job("safe"), job("loose", user=0, service_account="admin")]}))
    done = subprocess.run([*command(), "check", "--catalog", str(catalog)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "loose" in line]
    assert any("may run as root (user)" in line for line in said)
    assert any("token of Kubernetes' API as service account 'admin'" in line for line in said)
    assert not any("safe" in line and "may" in line for line in (done.stdout + done.stderr).splitlines())
