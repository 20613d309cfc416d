"""What a k8s-job entry becomes: valid for old and new Kubernetes, and safe by default (K24-K26, RB65)."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import attrs
import kubernetes_validate
import pytest

from gateway.config.model import Secret, StringMap
from gateway.errors import StartFailed
from gateway.runtimes.base import Surroundings
from gateway.runtimes.k8s_job import (
    RUNTIME,
    EnvFrom,
    K8sJobSpec,
    Quantities,
    Resources,
    Toleration,
    Tree,
    Volume,
    advise,
)
from gateway.runtimes.kubernetes.manifest import Identity, Manifests, build, job_name, label_value, relaxations

PLAIN = K8sJobSpec("mcp", "acme/box:1")
TOKEN = Secret("${TOKEN}", "s3cret")
FULL = K8sJobSpec(
    "mcp",
    "acme/box:1",
    command=("serve",),
    args=("--port", "$(HOME) $x $$"),
    env=StringMap((("A", "b"), ("TOKEN", TOKEN))),
    env_from=(EnvFrom(secret="s"), EnvFrom(config_map="c")),
    working_dir="/srv",
    user="1000:2000",
    cap_add=("NET_RAW",),
    read_only=True,
    service_account="sa",
    resources=Resources(Quantities(memory="64Mi"), Quantities(cpu=0.5)),
    labels=StringMap((("team", "x"), ("open-mcp-gateway/instance", "stolen"))),
    annotations=StringMap((("note", "x"),)),
    node_selector=StringMap((("disk", "ssd"),)),
    tolerations=(Toleration("k", "Exists", None, "NoSchedule"), Toleration("l", "Equal", "v", "NoExecute", 5)),
    image_pull_policy="IfNotPresent",
    image_pull_secrets=("r",),
    volumes=(
        Volume("/c", config_map="c", read_only=True),
        Volume("/s", secret="s", sub_path="one"),
        Volume("/p", pvc="p"),
        Volume("/t", empty_dir=True),
    ),
    ttl_seconds=5,
    active_deadline_seconds=600,
    pod_overrides={"spec": {"priorityClassName": "low", "containers": [{"name": "server", "tty": True}]}},
)


def made(spec: K8sJobSpec, env: dict[str, str] | None = None, **more: Any) -> Manifests:
    identity = Identity("mcp-box-1234abcd", "box", "i" * 32, more.pop("owner", None))
    is_secret, grace = more.pop("is_secret", lambda text: False), more.pop("stop_grace", 10)
    return build(spec, identity, env or {}, is_secret, grace, more.pop("version", (1, 20)))


def pod_of(manifests: Manifests) -> Any:
    return manifests.job["spec"]["template"]["spec"]


def container_of(manifests: Manifests) -> Any:
    return pod_of(manifests)["containers"][0]


# ------------------------------------------------------------------------------------------------------------ validity
@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("spec", [PLAIN, FULL], ids=["plain", "full"])
def test_K24_E2_every_object_is_valid(spec: K8sJobSpec, version: str) -> None:
    major, minor = map(int, version.split("."))
    more = {"owner": {"name": "p", "uid": "u"}, "version": (major, minor), "is_secret": lambda text: "s3cret" in text}
    manifests = made(spec, {"B": "s3cret"}, **more)
    assert ("podReplacementPolicy" in manifests.job["spec"]) == (version == "1.37"), "never two, where it is known"
    kubernetes_validate.validate(manifests.job, version, strict=True)
    assert manifests.secret is not None
    kubernetes_validate.validate(manifests.secret, version, strict=True)


def test_K24_E2_the_check_refuses_what_kubernetes_would_ignore() -> None:
    manifests = made(attrs.evolve(PLAIN, pod_overrides={"spec": {"hostNetwrok": True}}))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifests.job, "1.37", strict=True)


# -------------------------------------------------------------------------------------------------------------- a job
def test_K24_a_job_is_one_pod_that_is_never_tried_again_and_cleaned_up() -> None:
    job = made(PLAIN).job
    spec = job["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 1, 0)
    assert spec["ttlSecondsAfterFinished"] == 60
    assert "activeDeadlineSeconds" not in spec
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    container = container_of(made(PLAIN))
    assert (container["stdin"], container["stdinOnce"]) == (True, True)
    assert made(FULL).job["spec"]["ttlSecondsAfterFinished"] == 5
    assert made(FULL).job["spec"]["activeDeadlineSeconds"] == 600


@pytest.mark.parametrize(("grace", "seconds"), [(0, 1), (0.5, 1), (1.2, 2), (10, 10)])
def test_K24_the_stop_grace_is_the_pods_too(grace: float, seconds: int) -> None:
    assert pod_of(made(PLAIN, stop_grace=grace))["terminationGracePeriodSeconds"] == seconds


def test_RB62_labels_say_whose_it_is_and_no_entry_can_change_them() -> None:
    hostile = attrs.evolve(
        FULL, pod_overrides={"metadata": {"labels": {"open-mcp-gateway/job": "other", "mine": "too"}}}
    )
    job = made(hostile).job
    ours = {
        "app.kubernetes.io/managed-by": "open-mcp-gateway",
        "open-mcp-gateway/instance": "i" * 32,
        "open-mcp-gateway/server": "box",
        "open-mcp-gateway/job": "mcp-box-1234abcd",
    }
    assert job["metadata"]["labels"] == {**ours, "team": "x"}
    assert job["spec"]["template"]["metadata"]["labels"] == {**ours, "team": "x", "mine": "too"}
    assert job["metadata"]["annotations"] == {"note": "x", "open-mcp-gateway/server-id": "box"}


def test_K24_the_gateways_own_pod_owns_it() -> None:
    assert "ownerReferences" not in made(PLAIN).job["metadata"]
    owned = made(PLAIN, owner={"name": "gateway-1", "uid": "u-1"}).job["metadata"]["ownerReferences"]
    assert owned == [{"apiVersion": "v1", "kind": "Pod", "name": "gateway-1", "uid": "u-1"}]


@pytest.mark.parametrize(
    ("server", "name"),
    [
        ("box", "mcp-box-0a"),
        ("My_Server.v2", "mcp-my-server-v2-0a"),
        ("___", "mcp-0a"),
        ("ä" * 9, "mcp-0a"),
        ("x" * 100, f"mcp-{'x' * 42}-0a"),
        ("x" * 41 + "--y", f"mcp-{'x' * 41}-0a"),
    ],
)
def test_K24_names_are_names(server: str, name: str) -> None:
    assert job_name(server, "0a") == name


def test_K24_label_values_are_label_values() -> None:
    assert label_value("my server!") == "my-server"
    assert label_value("_x" + "y" * 100 + "_") == "x" + "y" * 61
    assert label_value("!!!") == ""


# ------------------------------------------------------------------------------------------------------------- secrets
def test_K24_what_holds_a_secret_is_not_in_the_job() -> None:
    spec = attrs.evolve(PLAIN, env=StringMap((("OPEN", "x"), ("TOKEN", TOKEN))))
    manifests = made(spec, {"URL": "https://u:s3cret@x", "MODE": "fast"}, is_secret=lambda text: "s3cret" in text)
    assert "s3cret" not in json.dumps(manifests.job)
    assert manifests.secret is not None
    data = {name: base64.b64decode(value).decode() for name, value in manifests.secret["data"].items()}
    assert data == {"TOKEN": "s3cret", "URL": "https://u:s3cret@x"}
    reference = {"secretKeyRef": {"name": "mcp-box-1234abcd", "key": "TOKEN"}}
    assert container_of(manifests)["env"] == [
        {"name": "MODE", "value": "fast"},
        {"name": "OPEN", "value": "x"},
        {"name": "TOKEN", "valueFrom": reference},
        {"name": "URL", "valueFrom": {"secretKeyRef": {"name": "mcp-box-1234abcd", "key": "URL"}}},
    ]


def test_K24_without_a_secret_there_is_no_secret_object() -> None:
    assert made(PLAIN, {"MODE": "fast"}).secret is None


def test_K24_the_entrys_env_wins_even_over_a_secret() -> None:
    spec = attrs.evolve(PLAIN, env=StringMap((("TOKEN", TOKEN),)))
    manifests = made(spec, {"TOKEN": "none"})
    assert manifests.secret is None
    assert container_of(manifests)["env"] == [{"name": "TOKEN", "value": "none"}]


def test_K24_texts_arrive_as_they_are_written() -> None:
    """Kubernetes would fill $(NAME) in."""
    container = container_of(made(FULL, {"PRICE": "$(A) costs $5"}))
    assert container["args"] == ["--port", "$$(HOME) $$x $$$$"]
    assert {"name": "PRICE", "value": "$$(A) costs $$5"} in container["env"]


@pytest.mark.parametrize("env", [{"A=B": "x"}, {"": "x"}, {"A": "\0"}, {"1A": "x"}])
def test_K24_a_bad_variable_is_named(env: dict[str, str]) -> None:
    with pytest.raises(StartFailed, match="environment variable '"):
        made(PLAIN, env)


# -------------------------------------------------------------------------------------------------------- safe defaults
def test_RB65_a_pod_is_safe_by_default() -> None:
    pod, container = pod_of(made(PLAIN)), container_of(made(PLAIN))
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}
    assert relaxations(made(PLAIN).job) == []
    assert advise(PLAIN, Surroundings("box", {})) == []


def test_RB64_a_pod_does_not_stay_on_a_lost_node() -> None:
    lost = {each["key"]: each["tolerationSeconds"] for each in pod_of(made(PLAIN))["tolerations"]}
    assert lost == {"node.kubernetes.io/not-ready": 10, "node.kubernetes.io/unreachable": 10}
    own = attrs.evolve(PLAIN, tolerations=(Toleration("node.kubernetes.io/unreachable", "Exists", None, None, 900),))
    assert {each["key"]: each["tolerationSeconds"] for each in pod_of(made(own))["tolerations"]} == {
        "node.kubernetes.io/not-ready": 10,
        "node.kubernetes.io/unreachable": 900,
    }
    everything = attrs.evolve(PLAIN, tolerations=(Toleration(operator="Exists"),))
    assert pod_of(made(everything))["tolerations"] == [{"operator": "Exists"}]


@pytest.mark.parametrize(
    ("requests", "limits", "expected"),
    [
        ({}, {}, {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "50m", "memory": "64Mi"}}),
        ({"cpu": 2}, {}, {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "2", "memory": "64Mi"}}),
        (
            {"memory": "100Mi"},
            {"memory": "200Mi"},
            {"limits": {"cpu": "1", "memory": "200Mi"}, "requests": {"cpu": "50m", "memory": "100Mi"}},
        ),
        ({}, {"cpu": "20m", "memory": "32Mi"}, {"limits": {"cpu": "20m", "memory": "32Mi"}}),
        ({}, {"cpu": 0.5}, {"limits": {"cpu": "0.5", "memory": "1Gi"}, "requests": {"cpu": "50m", "memory": "64Mi"}}),
    ],
)
def test_K26_resources_and_defaults_never_contradict(requests: Any, limits: Any, expected: Any) -> None:
    spec = attrs.evolve(PLAIN, resources=Resources(Quantities(**requests), Quantities(**limits)))
    assert container_of(made(spec))["resources"] == expected


def test_K25_a_named_service_account_brings_its_token_and_is_told() -> None:
    spec = attrs.evolve(PLAIN, service_account="reader")
    pod = pod_of(made(spec))
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("reader", True)
    assert [text for text in relaxations(made(spec).job) if "service account 'reader'" in text]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"user": 0}, "container 'server' may run as root (user)"),
        ({"cap_add": ("NET_RAW",)}, "container 'server' has the capabilities NET_RAW (cap_add)"),
        ({"resources": Resources(limits=Quantities(memory="2Gi"))}, "may use 2Gi of memory, which is above the"),
        ({"pod_overrides": {"spec": {"hostNetwork": True}}}, "hostNetwork uses the node's network"),
        (
            {"pod_overrides": {"spec": {"volumes": [{"name": "h", "hostPath": {"path": "/etc"}}]}}},
            "volume 'h' is the node's folder '/etc'",
        ),
        (
            {"pod_overrides": {"spec": {"containers": [{"name": "server", "securityContext": {"privileged": True}}]}}},
            "is privileged",
        ),
        (
            {"pod_overrides": {"spec": {"containers": [{"name": "side", "image": "x"}]}}},
            "container 'side' may gain privileges",
        ),
        ({"pod_overrides": {"spec": {"securityContext": {"seccompProfile": None}}}}, "may make any system call"),
        ({"args": (TOKEN,)}, "args hold a value from ${}, which everybody can read who may read Jobs"),
        ({"pod_overrides": {"spec": {"x": [{"y": TOKEN}]}}}, "pod_overrides hold a value from ${}"),
        ({"pod_overrides": {"spec": {"containers": None}}}, "it will not start"),
    ],
)
def test_RB65_each_relaxation_is_told(change: dict[str, Any], told: str) -> None:
    assert RUNTIME.advice is not None
    found = RUNTIME.advice(attrs.evolve(PLAIN, **change), Surroundings("box", {}))
    assert any(told in text for text in found), found
    assert not any("s3cret" in text for text in found)


# ----------------------------------------------------------------------------------------------------------- overrides
def test_K24_overrides_are_merged_last_by_name() -> None:
    over = {
        "metadata": {"annotations": {"a": "b"}},
        "spec": {
            "dnsPolicy": "Default",
            "restartPolicy": "Always",
            "nodeSelector": {"zone": "b"},
            "containers": [
                {"name": "server", "stdin": False, "tty": True, "resources": {"limits": {"cpu": None, "gpu": "1"}}},
                {"name": "side", "image": "acme/side:1"},
            ],
            "tolerations": [{"operator": "Exists"}],
        },
    }
    manifests = made(attrs.evolve(FULL, pod_overrides=over), {})
    pod = pod_of(manifests)
    assert pod["dnsPolicy"] == "Default"
    assert pod["restartPolicy"] == "Never", "what we rely on stays"
    assert pod["nodeSelector"] == {"disk": "ssd", "zone": "b"}
    assert pod["tolerations"] == [{"operator": "Exists"}]
    ours, side = pod["containers"]
    assert (ours["image"], ours["stdin"], "tty" in ours) == ("acme/box:1", True, False)
    assert ours["resources"]["limits"] == {"memory": "1Gi", "gpu": "1"}
    assert side == {"name": "side", "image": "acme/side:1"}
    assert manifests.job["spec"]["template"]["metadata"]["annotations"]["a"] == "b"
    kept = Tree((("spec", Tree((("x", (Secret("${A}", "filled"), 1)),))),))
    assert pod_of(made(attrs.evolve(PLAIN, pod_overrides=kept)))["x"] == ["filled", 1]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"pod_overrides": {"hostNetwork": True}}, "did you mean pod_overrides: {spec: {hostNetwork: ...}}?"),
        ({"pod_overrides": {"spec": []}}, "spec must be a map"),
        ({"namespace": "Not A Name"}, "no name of a namespace"),
        ({"user": "mcp"}, "user: 'mcp' must be a number"),
        ({"user": -1}, "must be a number"),
        ({"cap_add": ("net_raw",)}, "no capability"),
        ({"ttl_seconds": -1}, "ttl_seconds must be at least 0"),
        ({"active_deadline_seconds": 0}, "active_deadline_seconds at least 1"),
    ],
)
def test_K24_mistakes_are_told_when_the_file_is_read(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        attrs.evolve(PLAIN, **keys)
