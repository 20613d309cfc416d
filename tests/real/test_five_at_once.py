"""Row E8: one catalog file with a server each as local process, container, Job, Service and remote, all at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import HttpClient, RunningGateway, echo_entry
from services import Cluster, service, workload

from tests.clusters import IMAGE, Kube

pytestmark = pytest.mark.real

WAYS = ("here", "box", "job", "service", "far")


def test_E8_one_catalog_serves_all_five_at_once(kube: Kube, tmp_path: Path) -> None:
    cluster = Cluster(kube)
    folders = {name: tmp_path / name for name in ("near", "far")}
    for folder in folders.values():
        folder.mkdir()
    with cluster.namespace() as namespace, RunningGateway(folders["far"], [echo_entry("echo")]) as far:
        cluster.apply(workload(namespace, "tools", 0), service(namespace, "tools"))
        scale = {"kind": "Deployment", "name": "tools"}
        runtimes = {
            "box": {"type": "docker", "image": IMAGE, "host": cluster.docker_host, "pull": "never"},
            "job": kube.job(namespace),
            "service": {
                "type": "k8s-service",
                "namespace": namespace,
                "service_name": "tools",
                "port": "mcp",
                "scale": scale,
            },
            "far": {"type": "remote-sse", "url": f"http://127.0.0.1:{far.port}/servers/echo/mcp"},
        }
        entries = [echo_entry("here"), *({"id": id, "runtime": runtime} for id, runtime in runtimes.items())]
        env = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
        config = {"request_timeout_seconds": 120, "list_timeout_seconds": 90}
        with RunningGateway(folders["near"], entries, env=env, config=config) as gateway:

            def ask(id: str) -> tuple[str, str]:
                client = HttpClient(gateway, "/mcp")
                result = client.request("tools/call", {"name": f"{id}__echo", "arguments": {"text": id}})["result"]
                return id, str(result["content"][0]["text"])

            with ThreadPoolExecutor(len(WAYS)) as pool:
                assert dict(pool.map(ask, WAYS)) == {id: id for id in WAYS}
            names = {tool["name"] for tool in HttpClient(gateway, "/mcp").request("tools/list")["result"]["tools"]}
            assert names >= {f"{id}__echo" for id in WAYS}
            shown = {entry["id"]: (entry["status"], entry["runtime_type"]) for entry in gateway.json("GET", "/servers")}
            assert shown == {
                "here": ("running", "local-process"),
                "box": ("running", "docker"),
                "job": ("running", "k8s-job"),
                "service": ("running", "k8s-service"),
                "far": ("running", "remote-sse"),
            }
        assert cluster.get(namespace, "deployments", "tools")["spec"]["replicas"] == 0, "idle again"
        assert not kube.items("jobs", namespace)
