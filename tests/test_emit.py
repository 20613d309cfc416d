"""``gateway.pyz emit kubernetes``: what it prints, checked against Kubernetes' own schemas (compat D7, D8, D11 to D13).

That a real cluster takes it and what the account may do there is tests/real/test_services.py's business.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML
from running import command

from gateway.cli import main as cli_main

VERSIONS = ("1.27", "1.37")
SERVICE = {"type": "k8s-service", "namespace": "tools", "service_name": "search", "port": "http"}
SCALE = {"kind": "Deployment", "name": "search-app"}
JOB = {"type": "k8s-job", "namespace": "jobs", "image": "acme/box:1"}
Emit = Callable[..., tuple[int, list[dict[str, Any]], str]]


def server(id: str, runtime: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": id, "runtime": runtime, **more}


@pytest.fixture
def emit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Emit:
    """``emit(servers, *words, config=...)``: the exit status, the objects, and what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MCP_GATEWAY_API_KEY", "MCP_GATEWAY_PYTHON", "MCP_GATEWAY_MAIN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(
        servers: Sequence[dict[str, Any]] = (), *words: str, config: dict[str, Any] | str | None = None
    ) -> tuple[int, list[dict[str, Any]], str]:
        (tmp_path / "catalog.yaml").write_text(json.dumps({"servers": list(servers)}, indent=1))
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / "config.yaml").write_text(text)
        status = cli_main(["emit", "kubernetes", *words], "gateway.pyz")
        said = capsys.readouterr()
        objects = [made for made in YAML(typ="safe", pure=True).load_all(said.out) if made is not None]
        return status, objects, said.err

    return run


def of_kind(objects: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [made for made in objects if made["kind"] == kind]


def one(objects: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found


def rights(objects: Sequence[dict[str, Any]], namespace: str) -> set[tuple[str, str, str]]:
    """(verb, resource, name or "*") of all Roles of a namespace."""
    return {
        (verb, resource, name)
        for role in of_kind(objects, "Role")
        if role["metadata"]["namespace"] == namespace
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", ["*"])
    }


EVERYTHING = [
    server("job", JOB, env={"TOKEN": "${ACME_TOKEN}"}),
    server("search", {**SERVICE, "scale": SCALE}),
    server("far", {"type": "remote-sse", "url": "https://mcp.example.com:8443/mcp"}),
    server("near", {"type": "local-process", "command": "echo-server"}),
]
EVERY_OPTION = (
    *("--hpa", "--ingress", "mcp.example.com", "--ingress-class", "nginx", "--tls-secret", "tls"),
    *("--image-pull-secret", "registry", "--image-pull-policy", "IfNotPresent", "--namespaces", "all"),
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("words", [(), EVERY_OPTION, ("--replicas", "1")], ids=["plain", "full", "one"])
def test_D7_every_object_is_what_kubernetes_takes(emit: Emit, version: str, words: tuple[str, ...]) -> None:
    status, objects, _ = emit(EVERYTHING, *words)
    assert status == 0
    for made in objects:
        kubernetes_validate.validate(made, version, strict=True)
    kinds = [made["kind"] for made in objects]
    for kind in ("Namespace", "ServiceAccount", "ConfigMap", "Deployment", "Service", "NetworkPolicy"):
        assert kinds.count(kind) == (3 if kind == "Namespace" and words == EVERY_OPTION else 1), kind
    assert kinds.count("Role") == kinds.count("RoleBinding") == 2
    assert ("HorizontalPodAutoscaler" in kinds, "Ingress" in kinds) == (words == EVERY_OPTION,) * 2
    assert "Secret" not in kinds
    port = one(objects, "Service")["spec"]["ports"][0]
    assert (port["port"], one(objects, "Service")["spec"]["type"]) == (4444, "ClusterIP")


def test_D7_the_pod_runs_without_rights_over_its_node(emit: Emit) -> None:
    pod = one(emit()[1], "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    # What the gateway writes goes to folders of its own; no server needs the cluster, so it gets no token.
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert [("emptyDir" in volumes[mounts[path]]) for path in ("/state", "/tmp", "/config")] == [True, True, False]
    assert pod["automountServiceAccountToken"] is False
    fields = {each["name"]: each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") for each in container["env"]}
    assert (fields["POD_NAME"], fields["POD_UID"], fields["POD_NAMESPACE"]) == (
        "metadata.name",
        "metadata.uid",
        "metadata.namespace",
    )


def test_D8_probes_ask_health_as_documented(emit: Emit) -> None:
    (container,) = one(emit()[1], "Deployment")["spec"]["template"]["spec"]["containers"]
    live, ready = container["livenessProbe"], container["readinessProbe"]
    assert live["httpGet"] == ready["httpGet"] == {"path": "/health", "port": "http"}
    assert (live["initialDelaySeconds"], live["periodSeconds"], live["failureThreshold"]) == (10, 30, 3)
    assert (ready["initialDelaySeconds"], ready["periodSeconds"]) == (5, 10)
    assert {"name": "http", "containerPort": 4444, "protocol": "TCP"} in container["ports"]


def test_D8_probes_send_a_host_that_the_config_allows(emit: Emit) -> None:
    objects = emit(config={"allowed_hosts": ["mcp.example.com"]})[1]
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "mcp.example.com"}]


def test_the_pod_gets_the_time_that_the_gateway_takes_to_stop(emit: Emit) -> None:
    def grace(**config: Any) -> int:
        spec = one(emit(config=config)[1], "Deployment")["spec"]["template"]["spec"]
        return int(spec["terminationGracePeriodSeconds"])

    assert grace() == 45
    assert grace(drain_timeout_seconds=100, stop_grace_seconds=20) == 125


def test_D11_dns_is_let_out_and_nothing_that_no_server_needs(emit: Emit) -> None:
    def egress(*servers: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = one(emit(servers)[1], "NetworkPolicy")["spec"]["egress"]
        assert found[0] == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
        return found[1:]

    def ports(*numbers: int) -> dict[str, Any]:
        return {"ports": [{"protocol": "TCP", "port": number} for number in numbers]}

    assert egress() == []
    assert egress(server("a", {"type": "remote-sse", "url": "http://[fd00::7]:81/mcp"})) == [
        {"to": [{"ipBlock": {"cidr": "fd00::7/128"}}], **ports(81)}
    ]
    assert egress(server("a", {"type": "remote-sse", "url": "https://mcp.example.com/mcp"})) == [ports(443)]
    assert egress(server("a", {"type": "remote-sse", "url": "${SOMEWHERE}"})) == [ports(80, 443)]
    assert egress(server("a", JOB)) == [ports(443, 6443)]
    tools = {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tools"}}}]}
    assert egress(server("a", SERVICE)) == [ports(443, 6443), tools]
    assert "NetworkPolicy" not in [made["kind"] for made in emit([], "--no-network-policy")[1]]


def test_D12_the_monitor_finds_the_service_by_its_port_s_name(emit: Emit) -> None:
    assert of_kind(emit()[1], "ServiceMonitor") == []
    objects = emit([], "--service-monitor", "--name", "front")[1]
    monitor, service = one(objects, "ServiceMonitor"), one(objects, "Service")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["authorization"]["credentials"] == {"name": "front", "key": "api-key"}


def test_D13_rights_are_those_of_the_catalog_s_servers_in_their_namespaces(emit: Emit) -> None:
    objects = emit([server("job", JOB)])[1]
    granted = rights(objects, "jobs")
    assert {("create", "jobs", "*"), ("delete", "jobs", "*"), ("watch", "pods", "*")} <= granted
    secret = rights(emit([server("job", JOB, env={"TOKEN": "${ACME_TOKEN}"})])[1], "jobs")
    assert secret - granted == {("create", "secrets", "*")}
    assert {("get", "pods/log", "*"), ("get", "pods/attach", "*"), ("create", "pods/attach", "*")} <= granted
    assert not {resource for _, resource, _ in granted} & {"services", "endpoints", "deployments", "leases", "secrets"}
    assert {role["metadata"]["namespace"] for role in of_kind(objects, "Role")} == {"jobs"}
    (subject,) = one(objects, "RoleBinding")["subjects"]
    assert subject["namespace"] == "mcp-gateway"
    assert subject["name"] == one(objects, "ServiceAccount")["metadata"]["name"]


def test_D13_a_service_takes_its_endpoints_and_its_workload_if_it_is_scaled(emit: Emit) -> None:
    granted = rights(emit([server("plain", SERVICE)])[1], "tools")
    assert {resource for _, resource, _ in granted} == {"services", "endpoints", "endpointslices"}
    assert ("get", "services", "search") in granted and ("get", "services", "*") not in granted
    granted = rights(emit([server("scaled", {**SERVICE, "scale": SCALE})])[1], "tools")
    assert {("get", "deployments", "search-app"), ("patch", "deployments", "search-app")} <= granted
    assert ("update", "leases", "open-mcp-gateway-deployment-search-app") in granted
    assert not {resource for _, resource, _ in granted} & {"jobs", "statefulsets", "secrets", "pods/attach"}


def test_D13_no_rights_where_none_are_needed(emit: Emit) -> None:
    status, objects, said = emit([server("far", {**SERVICE, "context": "other"})])
    assert status == 0
    assert of_kind(objects, "Role") == of_kind(objects, "RoleBinding") == []
    assert "note: server 'far' names a context" in said


def test_two_gateways_of_one_name_do_not_share_a_role(emit: Emit) -> None:
    first = one(emit([server("job", JOB)], "-n", "one")[1], "Role")["metadata"]
    second = one(emit([server("job", JOB)], "-n", "two")[1], "Role")["metadata"]
    assert first["namespace"] == second["namespace"] == "jobs"
    assert first["name"] != second["name"]


# ------------------------------------------------------------------------------------------------------------ secrets
def test_placeholders_stay_and_come_out_of_the_secret(emit: Emit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_TOKEN", "s3cr3t-value")
    servers = [server("job", JOB, env={"TOKEN": "${ACME_TOKEN}", "HOME_IS": "${HOME}"})]
    config = '# mine\ntenants: [{id: a, api_key: "${A_KEY}", namespaces: [default]}]\nmax_units: ${UNITS}\n'
    status, objects, said = emit(servers, "--secret", "keys", config=config)
    assert status == 0, said
    files = one(objects, "ConfigMap")["data"]
    assert "${ACME_TOKEN}" in files["catalog.yaml"] and "${A_KEY}" in files["config.yaml"]
    assert "s3cr3t-value" not in json.dumps(objects) + said
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    sources = {each["name"]: each.get("valueFrom", {}) for each in container["env"]}
    taken = {name: source["secretKeyRef"] for name, source in sources.items() if "secretKeyRef" in source}
    assert taken == {
        "A_KEY": {"name": "keys", "key": "A_KEY"},
        "UNITS": {"name": "keys", "key": "UNITS"},
        "ACME_TOKEN": {"name": "keys", "key": "ACME_TOKEN", "optional": True},
    }


def test_the_gateway_never_runs_keyless_there(emit: Emit) -> None:
    objects = emit()[1]
    config = YAML(typ="safe", pure=True).load(one(objects, "ConfigMap")["data"]["config.yaml"])
    assert config == {
        "listen_addr": "0.0.0.0:4444",
        "catalog_path": "catalog.yaml",
        "log_format": "json",
        "state_dir": "/state",
        "api_key": "${MCP_GATEWAY_API_KEY}",
    }
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    key = {"name": "MCP_GATEWAY_API_KEY", "valueFrom": {"secretKeyRef": {"name": "mcp-gateway", "key": "api-key"}}}
    assert key in container["env"]


def test_a_key_in_the_config_is_not_printed(emit: Emit) -> None:
    status, objects, said = emit(config={"api_key": "very-secret", "log_level": "debug"})
    assert status == 0
    assert "api_key is written out" in said
    assert "very-secret" not in json.dumps(objects) + said
    config = YAML(typ="safe", pure=True).load(one(objects, "ConfigMap")["data"]["config.yaml"])
    assert (config["api_key"], config["log_level"]) == ("${MCP_GATEWAY_API_KEY}", "debug")
    tenant = {"id": "a", "api_key": "very-secret", "namespaces": ["default"]}
    status, objects, said = emit(config={"tenants": [tenant]})
    assert (status, objects) == (1, [])
    assert "tenants[0].api_key is written out" in said and "very-secret" not in said


def test_values_that_look_like_secrets_are_named(emit: Emit) -> None:
    runtime = {**SERVICE, "headers": {"Authorization": "Bearer abc", "X-Team": "red"}}
    _, _, said = emit([server("a", runtime), server("b", JOB, env={"API_TOKEN": "abc", "DEBUG": "1"})])
    assert said.count("is written out") == 2
    assert "server 'a': headers Authorization" in said and "server 'b': env API_TOKEN" in said
    assert "abc" not in said


@pytest.mark.parametrize(
    "text",
    ["servers: [] # x\n", "servers:   \n\n", "servers: []\r\n# cr\r\n", "servers: []\n\n\n", "# ☃\n servers: []"],
)
def test_the_catalog_is_copied_to_the_letter(emit: Emit, tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode())
    status, objects, said = emit([], "--catalog", "mine.yaml")
    assert status == 0, said
    assert one(objects, "ConfigMap")["data"]["catalog.yaml"] == text.replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--namespace", "Mine"), "--namespace: 'Mine' is no name that Kubernetes takes"),
        (("--replicas", "0"), "--replicas must be from 1 to 100"),
        (("--image", "a b"), "--image: 'a b' is no image name"),
        (("--limits", "cpu=lots"), "--limits: write it as cpu=100m,memory=128Mi (got 'cpu=lots')"),
        (("--hpa", "5:2"), "--hpa: write it as LEAST:MOST replicas, such as 2:10 (got '5:2')"),
        (("--tls-secret", "x"), "--tls-secret and --ingress-class belong to --ingress HOST"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense_are_named(emit: Emit, words: tuple[str, ...], message: str) -> None:
    status, objects, said = emit([], *words)
    assert (status, objects) == (2, [])
    assert message in said


def test_names_that_kubernetes_has_not_are_refused(emit: Emit) -> None:
    servers = [server("a", {**JOB, "namespace": "No"}), server("b", {**SERVICE, "service_name": "a_b"})]
    status, objects, said = emit(servers)
    assert (status, objects) == (1, [])
    assert "Server 'a': namespace: 'No' is no name of a namespace" in said
    assert "Server 'b': service_name: 'a_b' is no name of a Service" in said


def test_files_with_mistakes_are_refused_as_check_does(emit: Emit) -> None:
    status, objects, said = emit([server("a", {"type": "k8s-job", "namespace": "jobs"})])
    assert (status, objects) == (1, [])
    assert "missing required field: image" in said


def test_C6_help_and_output_as_a_user_runs_it(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("servers: []\n")
    environ = {**os.environ, "HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [*command(), "emit", *words]
        return subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=60)

    helped = run("--help")
    assert helped.returncode == 0
    for option in ("--namespace", "--replicas", "--image", "--hpa", "--ingress", "--service-monitor", "--catalog"):
        assert option in helped.stdout
    done = run("kubernetes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Open MCP Gateway")
    assert "kubectl -n mcp-gateway create secret generic mcp-gateway" in done.stdout
    wrong = run("nomad")
    assert wrong.returncode == 2 and "kubernetes" in wrong.stderr
