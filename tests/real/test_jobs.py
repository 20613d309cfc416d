"""Rows E1-E4 and E6 for Jobs, K24-K26, P7, RB61-RB65: servers in Jobs behind a real gateway, on a real Kubernetes."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from tests.clusters import IMAGE, Kube
from tests.fixtures.api_proxy import ApiProxy, kubeconfig
from tests.running import HttpClient, RunningGateway, echo_entry

pytestmark = pytest.mark.real

SLOW = 60.0
"""Seconds for whatever a busy machine may take for a pod."""
AWAY = 60.0
"""Seconds for which the API is away (row E6)."""
OURS = "app.kubernetes.io/managed-by=open-mcp-gateway"
RIGHTS = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch", "delete"]},
    {"apiGroups": [""], "resources": ["pods/attach"], "verbs": ["get", "create"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
]
"""All that a k8s-job server needs. Every test here runs with these and no others."""


@pytest.fixture(scope="module")
def token(kube: Kube, namespace: str) -> str:
    """Of a service account with RIGHTS in the namespace."""
    meta = {"name": "gateway", "namespace": namespace}
    rbac = "rbac.authorization.k8s.io"
    kube.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": RIGHTS},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "gateway"},
            "subjects": [{"kind": "ServiceAccount", "name": "gateway", "namespace": namespace}],
        },
    )
    return kube.token(namespace, "gateway")


@pytest.fixture
def env(kube: Kube, token: str, tmp_path: Path) -> dict[str, str]:
    return {"KUBECONFIG": str(kube.user_config(tmp_path, {"token": token}))}


@pytest.fixture
def proxy(kube: Kube) -> Iterator[ApiProxy]:
    with ApiProxy(json.loads(kube.kubectl("config", "view", "--raw", "-o", "json"))) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: ApiProxy, token: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a gateway that reaches the API through the proxy."""
    return {"KUBECONFIG": str(kubeconfig(proxy.url, proxy.authority, {"token": token}, str(tmp_path)))}


@pytest.fixture(autouse=True)
def clean(kube: Kube, namespace: str) -> Iterator[None]:
    """What a failed test leaves is not the next one's."""
    yield
    kube.kubectl("-n", namespace, "delete", "jobs", "--all", "--cascade=background", "--wait=false")


def entry(kube: Kube, namespace: str, id: str = "box", *args: str, **more: Any) -> dict[str, Any]:
    runtime = kube.job(namespace, *args, **more.pop("runtime", {}))
    return {"id": id, "runtime": runtime, **more}


def jobs(kube: Kube, namespace: str, selector: str = OURS) -> list[dict[str, Any]]:
    return kube.items("jobs", namespace, selector)


def living(kube: Kube, namespace: str) -> list[str]:
    """Pods in which a server may still run: a container that has ended is known before its pod's phase is."""

    def over(pod: dict[str, Any]) -> bool:
        states = [each["state"] for each in pod["status"].get("containerStatuses", ())]
        return pod["status"].get("phase") in ("Succeeded", "Failed") or any("terminated" in state for state in states)

    return [pod["metadata"]["name"] for pod in kube.items("pods", namespace, OURS) if not over(pod)]


def call(gateway: RunningGateway, id: str, tool: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    body = {"server_id": id, "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    body["params"] = {"name": tool, "arguments": arguments}
    status, _, data = gateway.http("POST", "/mcp", body, timeout=120)
    return status, json.loads(data)


def wait_gone(kube: Kube, namespace: str) -> None:
    kube.wait_for(lambda: not jobs(kube, namespace) and not living(kube, namespace), "all is gone", SLOW)


# ------------------------------------------------------------------------------------------------- what everybody wants
def test_K24_K25_E1_a_server_in_a_job_answers_and_is_seen(
    kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path
) -> None:
    box = entry(kube, namespace, env={"GREETING": "costs $(A) $5", "TOKEN": "${TOKEN}"})
    with RunningGateway(tmp_path, [box, echo_entry("here")], env={**env, "TOKEN": "t0p-s3cret"}) as gateway:
        assert gateway.call("box", "echo", {"text": "contained"}) == "contained"
        info = json.loads(gateway.call("box", "info"))
        assert info["env"]["GREETING"] == "costs $(A) $5" and info["env"]["TOKEN"] == "t0p-s3cret"
        assert info["uid"] == 1000 and "KUBECONFIG" not in info["env"]
        client = HttpClient(gateway, "/servers/box/mcp")
        assert "echo" in [tool["name"] for tool in client.request("tools/list")["result"]["tools"]]
        (job,) = jobs(kube, namespace)
        (shown,) = gateway.json("GET", "/servers/box")["instances"]
        assert shown["job"] == job["metadata"]["name"] and shown["pod"].startswith(shown["job"])
        assert (shown["namespace"], shown["context"]) == (namespace, "test")
        assert shown["node"] and shown["image_id"]
        assert "t0p-s3cret" not in json.dumps(job)
        (secret,) = kube.items("secrets", namespace, OURS)
        assert base64.b64decode(secret["data"]["TOKEN"]) == b"t0p-s3cret"
        assert secret["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        assert call(gateway, "here", "echo", text="beside")[0] == 200
        gateway.json("POST", "/servers/box/stop")
        wait_gone(kube, namespace)
        kube.wait_for(lambda: not kube.items("secrets", namespace, OURS), "the secret goes with its Job", SLOW)


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_K24_E1_both_eras(kube: Kube, namespace: str, env: dict[str, str], era: str, tmp_path: Path) -> None:
    box = entry(kube, namespace, "box", "/app/peer_server.py", "--era", era)
    with RunningGateway(tmp_path, [box], env=env) as gateway:
        tools = gateway.rest("box", "tools/list")["result"]["tools"]
        client = HttpClient(gateway, "/servers/box/mcp")
        assert [tool["name"] for tool in client.request("tools/list")["result"]["tools"]] == [t["name"] for t in tools]
        (shown,) = gateway.json("GET", "/servers/box")["instances"]
        assert shown["era"] == era


# ------------------------------------------------------------------------------------------------------- one, ten, none
def test_E3_many_first_calls_make_one_job(kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [entry(kube, namespace, max_connections_per_server=30)], env=env) as gateway:
        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            found = list(pool.map(lambda n: gateway.call("box", "echo", {"text": str(n)}), range(30)))
        assert found == [str(n) for n in range(30)]
        assert len(jobs(kube, namespace)) == 1


def test_E3_P7_each_session_has_a_job_and_SIGTERM_leaves_none(
    kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path
) -> None:
    box = entry(kube, namespace, isolation="session", start_timeout_seconds=120, request_timeout_seconds=120)
    with RunningGateway(tmp_path, [box], env=env) as gateway:

        def session(number: int) -> str:
            client = HttpClient(gateway, "/servers/box/mcp")
            reply = client.request("tools/call", {"name": "info", "arguments": {}})
            return str(json.loads(reply["result"]["content"][0]["text"])["env"]["HOSTNAME"])

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            hosts = list(pool.map(session, range(10)))
        assert len(set(hosts)) == 10
        assert len(jobs(kube, namespace)) == 10
        begun = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - begun < 40
    assert not jobs(kube, namespace)
    kube.wait_for(lambda: not living(kube, namespace), "no pod is left", 20)


def test_E3_P7_RB62_what_a_killed_gateway_leaves_is_removed_by_the_next_one(
    kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path
) -> None:
    foreign = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "mcp-box-foreign",
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "open-mcp-gateway", "open-mcp-gateway/instance": "f" * 32},
        },
        "spec": {
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "x", "image": IMAGE, "command": ["sleep", "600"]}],
                }
            }
        },
    }
    kube.apply(foreign)
    boxes = [entry(kube, namespace), entry(kube, namespace, "other", env={"ECHO_IGNORE_TERM": "1"})]
    with RunningGateway(tmp_path, boxes, env=env) as gateway:
        for box in boxes:
            gateway.call(box["id"], "echo", {"text": "x"})
        before = {job["metadata"]["name"] for job in jobs(kube, namespace)}
        assert len(before) == 3
        gateway.kill()
    assert {job["metadata"]["name"] for job in jobs(kube, namespace)} == before
    with RunningGateway(tmp_path, boxes, env=env) as gateway:
        assert gateway.call("box", "echo", {"text": "again"}) == "again"
        (mine,) = [each["job"] for each in gateway.json("GET", "/servers/box")["instances"]]
        names = {"mcp-box-foreign", mine}
        kube.wait_for(lambda: {job["metadata"]["name"] for job in jobs(kube, namespace)} == names, "the rest", SLOW)
    assert [job["metadata"]["name"] for job in jobs(kube, namespace)] == ["mcp-box-foreign"]


# -------------------------------------------------------------------------------------------------------------- volumes
def test_E4_large_many_and_noisy(kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path) -> None:
    box = entry(kube, namespace, request_timeout_seconds=120, max_connections_per_server=64)
    with RunningGateway(tmp_path, [box], env=env) as gateway:
        gateway.call("box", "echo", {"text": "up"})
        big = gateway.call("box", "big", {"bytes": 5_000_000})
        assert len(big) == 5_000_000 and set(big) == {"x"}
        text = "0123456789" * 30_000
        assert gateway.call("box", "echo", {"text": text}) == text
        noise = threading.Thread(target=call, args=(gateway, "box", "stderr"), kwargs={"lines": 20_000})
        noise.start()

        def many(worker: int) -> None:
            body = {"server_id": "box", "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=120)
            for number in range(worker, 10_000, 8):
                body["params"] = {"name": "echo", "arguments": {"text": f"n{number}"}}
                connection.request("POST", "/mcp", json.dumps(body), {"Content-Type": "application/json"})
                reply = json.loads(connection.getresponse().read())
                assert reply["result"]["content"][0]["text"] == f"n{number}"
            connection.close()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(many, range(8)))
        noise.join(SLOW)
        assert not noise.is_alive()
        assert len(gateway.json("GET", "/servers/box")["instances"]) == 1
        assert len(jobs(kube, namespace)) == 1


# ------------------------------------------------------------------------------------------------- what Kubernetes says
def test_E6_RB61_what_can_not_start_says_why(kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path) -> None:
    """Each in Kubernetes' own words, soon, and nothing is left."""
    huge = {"requests": {"memory": "900Gi"}, "limits": {"memory": "900Gi"}}
    missing = {"env_from": [{"secret": "no-such-secret"}]}
    absent = {"volumes": [{"mount_path": "/x", "secret": "no-such-volume"}]}
    boxes = [
        entry(
            kube, namespace, "image", runtime={"image": "registry.invalid/none:1", "image_pull_policy": "IfNotPresent"}
        ),
        entry(kube, namespace, "never", runtime={"image": "none:1", "image_pull_policy": "Never"}),
        entry(kube, namespace, "root", runtime={"user": None}),
        entry(kube, namespace, "secret", runtime=missing),
        entry(kube, namespace, "command", runtime={"command": ["/no/such/program"]}),
        entry(kube, namespace, "crash", env={"ECHO_EXIT_AT_START": "3"}),
        entry(kube, namespace, "nowhere", runtime={"namespace": "no-such-namespace"}),
        entry(kube, namespace, "huge", runtime={"resources": huge}, start_timeout_seconds=6),
        entry(kube, namespace, "volume", runtime=absent, start_timeout_seconds=20),
    ]
    for box in boxes:
        box["runtime"] = {name: value for name, value in box["runtime"].items() if value is not None}
    told = {
        "image": "the image can't be had: ",
        "never": "the image can't be had: ErrImageNeverPull: ",
        "root": "name the user with `user`, such as `user: 1000`",
        "secret": 'secret "no-such-secret" not found',
        "command": "container can't run: ",
        "crash": "container exited with code 3",
        "nowhere": "(403 Forbidden)",
        "huge": "Unschedulable: 0/1 nodes are available",
        "volume": 'secret "no-such-volume" not found',
    }
    with RunningGateway(tmp_path, boxes, env=env, config={"max_parallel_starts": 16}) as gateway:
        with concurrent.futures.ThreadPoolExecutor(len(boxes)) as pool:
            found = dict(zip(told, pool.map(lambda id: gateway.failing(id), told), strict=True))
        for id, text in told.items():
            assert text in found[id], (id, found[id])
        wait_gone(kube, namespace)


def test_E6_K26_a_quota_says_so(kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path) -> None:
    meta = {"name": "small", "namespace": namespace}
    kube.apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": {"limits.cpu": "100m"}}}
    )
    try:
        kube.wait_for(
            lambda: kube.items("resourcequotas", namespace)[0].get("status", {}).get("hard"), "the quota counts"
        )
        with RunningGateway(tmp_path, [entry(kube, namespace)], env=env) as gateway:
            message = gateway.failing("box")
            assert "makes no pod for Job" in message and "exceeded quota: small" in message
    finally:
        kube.kubectl("-n", namespace, "delete", "resourcequota", "small")
    wait_gone(kube, namespace)


def test_E6_RB64_what_ends_a_pod_is_told_and_the_next_call_has_another(
    kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path
) -> None:
    """Its own end, no memory, an eviction, a deletion: callers in flight hear it, and there are never two."""
    small = {"resources": {"limits": {"memory": "48Mi"}, "requests": {"memory": "48Mi"}}}
    polite = "import signal; signal.signal(15, lambda *_: os._exit(143))"  # a process 1 is deaf to it otherwise
    box = entry(kube, namespace, "box", "/app/actor.py", "/tmp/journal", polite, runtime=small, era="legacy")
    with RunningGateway(tmp_path, [box], env=env) as gateway:

        def during(disturb: Callable[[str], object]) -> str:
            """What a call that is under way is told."""
            assert gateway.call("box", "act", {"code": "reply('up')"}) == "up"
            (shown,) = gateway.json("GET", "/servers/box")["instances"]
            said = token_hex(4)
            long = {"code": f"say({said!r}); time.sleep(25); reply()", "aside": True}
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                told = pool.submit(gateway.failing, "box", "act", **long)
                gateway.wait_for_line(said)
                begun = time.monotonic()
                disturb(shown["pod"])
                message = told.result(SLOW)
            assert time.monotonic() - begun < 20, "the call did not just end"
            # The second failure in a row and those after it have to wait for some seconds (design, section 7).
            kube.wait_for(lambda: call(gateway, "box", "act", code="reply()")[0] == 200, "another one", 30 + SLOW)
            (other,) = gateway.json("GET", "/servers/box")["instances"]
            assert other["pod"] != shown["pod"]
            assert living(kube, namespace) == [other["pod"]]
            return message

        def act(code: str) -> None:
            call(gateway, "box", "act", code=code)

        assert "pod was evicted or deleted" in during(lambda pod: kube.evict(namespace, pod))
        assert "deleted" in during(lambda pod: kube.kill_pod(namespace, pod))
        assert "container exited with code 9" in during(lambda pod: act("os._exit(9)"))
        assert "ran out of memory (OOMKilled, memory limit 48Mi" in during(
            lambda pod: act("kept[1] = b'x' * (200 << 20)")
        )


# ---------------------------------------------------------------------------------------------------- faults of the API
def test_E6_RB63_watches_are_cut_expire_and_are_refused(
    kube: Kube, namespace: str, proxy: ApiProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """What ends meanwhile is not missed, and a live connection is kept."""
    with RunningGateway(tmp_path, [entry(kube, namespace)], env=through) as gateway:
        gateway.call("box", "echo", {"text": "up"})
        kube.wait_for(lambda: proxy.times("watch=true"), "a watch")
        for fault in (410, 500, 429, 401):
            first, second = proxy.refuse_watch(fault, **({"Retry_After": "2"} if fault == 429 else {}))
            assert fault != 429 or second - first >= 2
            assert gateway.call("box", "echo", {"text": "kept"}) == "kept"
        assert len(jobs(kube, namespace)) == 1
        proxy.answer("watch=true", 410)
        (shown,) = gateway.json("GET", "/servers/box")["instances"]
        proxy.cut("watch=true")
        kube.kill_pod(namespace, shown["pod"])
        kube.wait_for(lambda: gateway.json("GET", "/servers/box")["status"] == "stopped", "its end is noticed", 30)
        assert gateway.call("box", "echo", {"text": "again"}) == "again"


def test_E6_RB63_the_api_is_away_for_a_minute_and_comes_back(
    kube: Kube, namespace: str, proxy: ApiProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """Attach goes through it, so the server is lost; its Job is removed when that can be, before there is another."""
    box = entry(kube, namespace, stop_grace_seconds=1)
    with RunningGateway(tmp_path, [box, echo_entry("here")], env=through) as gateway:
        gateway.call("box", "echo", {"text": "up"})
        (first,) = jobs(kube, namespace)
        proxy.away = True
        begun = time.monotonic()
        kube.wait_for(lambda: gateway.json("GET", "/servers/box")["status"] != "running", "the loss is noticed", 20)
        message = gateway.failing("box")
        assert f"({proxy.url})" in message or proxy.url in message
        assert call(gateway, "here", "echo", text="unharmed")[0] == 200
        while time.monotonic() < begun + AWAY:
            time.sleep(5)
            assert call(gateway, "box", "echo", text="x")[0] == 502
        proxy.away = False
        kube.wait_for(lambda: call(gateway, "box", "echo", text="again")[0] == 200, "it serves again", SLOW)
        (second,) = jobs(kube, namespace)
        assert first["metadata"]["uid"] != second["metadata"]["uid"]
    wait_gone(kube, namespace)


def test_E6_RB63_a_slow_and_busy_api_is_waited_for(
    kube: Kube, namespace: str, proxy: ApiProxy, through: dict[str, str], tmp_path: Path
) -> None:
    proxy.delay = 1.0
    proxy.answer("POST", 429, "slow down", Retry_After="2")
    with RunningGateway(tmp_path, [entry(kube, namespace, request_timeout_seconds=90)], env=through) as gateway:
        assert gateway.call("box", "echo", {"text": "slowly"}) == "slowly"
        first, second = proxy.times("POST")[:2]
        assert second - first >= 2
        assert len(jobs(kube, namespace)) == 1
    wait_gone(kube, namespace)


def test_E6_RB63_a_rotated_token_is_read_again(kube: Kube, namespace: str, token: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("expired")
    env = {"KUBECONFIG": str(kube.user_config(tmp_path, {"tokenFile": str(path)}))}
    with RunningGateway(tmp_path, [entry(kube, namespace)], env=env) as gateway:
        assert "401 Unauthorized" in gateway.failing("box")
        path.write_text(token)
        kube.wait_for(lambda: call(gateway, "box", "echo", text="in")[0] == 200, "the new token", SLOW)


def test_E2_rights_that_are_missing_are_named(kube: Kube, namespace: str, tmp_path: Path) -> None:
    name = f"nobody-{token_hex(2)}"
    kube.kubectl("-n", namespace, "create", "serviceaccount", name)
    token = kube.token(namespace, name)
    env = {"KUBECONFIG": str(kube.user_config(tmp_path, {"token": token}))}
    with RunningGateway(tmp_path, [entry(kube, namespace)], env=env) as gateway:
        message = gateway.failing("box")
        assert 'cannot create resource "jobs" in API group "batch" in the namespace' in message
        assert token not in message


def test_RB65_a_pod_has_no_more_rights_than_its_entry_says(
    kube: Kube, namespace: str, env: dict[str, str], tmp_path: Path
) -> None:
    """As Kubernetes keeps it: what an admission of ``restricted`` asks for is there."""
    box = entry(kube, namespace, runtime={"read_only": True, "volumes": [{"mount_path": "/tmp", "empty_dir": True}]})
    with RunningGateway(tmp_path, [box], env=env) as gateway:
        gateway.call("box", "echo", {"text": "x"})
        (shown,) = gateway.json("GET", "/servers/box")["instances"]
        (pod,) = [each for each in kube.items("pods", namespace) if each["metadata"]["name"] == shown["pod"]]
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = spec["containers"][0]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert [volume["name"] for volume in spec["volumes"]] == ["volume-0"], "no token of a service account"
    assert spec["containers"][0]["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}


def test_the_cluster_is_not_this_machines_own() -> None:
    assert "KUBERNETES_SERVICE_HOST" not in os.environ
