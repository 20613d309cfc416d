"""The tuple of runtimes, their YAML schemas and plugins (K4, K9-K29, G21)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.config.load import load_catalog
from gateway.errors import ConfigError
from gateway.runtimes import RUNTIMES, by_type, load_plugins, spec_types
from gateway.runtimes.base import Runtime
from gateway.runtimes.docker import Amounts, DockerSpec
from gateway.runtimes.k8s_job import EnvFrom, K8sJobSpec, Toleration, Volume
from gateway.runtimes.k8s_service import K8sServiceSpec, Scale
from gateway.runtimes.local_process import LocalProcessSpec
from gateway.runtimes.remote_sse import RemoteSpec

CATALOG = """
servers:
  - id: local
    runtime: {type: local-process, command: notes-mcp, args: [--stdio, "${HOME}"], working_dir: ./x}
  - id: far
    runtime: {type: remote-http, url: "http://far:9000/mcp", headers: {X-Key: "${KEY}"}, allow_private: true}
  - id: box
    runtime:
      {type: docker, image: "acme/box:1", command: serve, args: [-v], entrypoint: /init, env: {A: 1}, env_file: e.env,
       volumes: ["/d:/d:ro"], network: n1, user: 1000, working_dir: /w, container_name: c1, init: false,
       resources: {limits: {cpu: 0.5, memory: 512Mi, pids: 64}, requests: {cpu: 250m}},
       read_only: true, tmpfs: [/tmp], cap_add: [NET_RAW], pull: always, platform: linux/amd64, labels: {a: b},
       port: 8080, path: /mcp, host: "unix:///run/x.sock"}
  - id: pod
    runtime: {type: podman, image: "acme/box:1"}
  - id: job
    runtime:
      type: k8s-job
      namespace: m
      image: "acme/j:1"
      command: [serve]
      args: [-v]
      env: {A: b}
      env_from: [{secret: s}, {config_map: c}]
      service_account: sa
      resources: {limits: {cpu: 500m}, requests: {memory: 64Mi}}
      labels: {a: b}
      annotations: {a: b}
      node_selector: {disk: ssd}
      tolerations: [{key: k, operator: Exists, effect: NoSchedule, toleration_seconds: 5}]
      image_pull_policy: IfNotPresent
      image_pull_secrets: [r]
      volumes: [{mount_path: /c, config_map: c, read_only: true}, {mount_path: /t, empty_dir: true}]
      ttl_seconds: 5
      active_deadline_seconds: 600
      pod_overrides: {spec: {hostNetwork: true, priority: 7, dnsConfig: {nameservers: [1.1.1.1, "${KEY}"]}}}
      context: dev
  - id: svc
    runtime:
      {type: k8s-service, namespace: m, service: s, port: http, path: /x, scheme: https, headers: {A: b},
       scale: {kind: Deployment, name: d, min: 0, max: 2}, context: dev}
"""


def load(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "catalog.yaml"
    path.write_text(text)
    return load_catalog(path, {"HOME": "/root", "KEY": "k"}, spec_types(RUNTIMES))


def test_K17_K27_K28_all_types_and_keys_parse(tmp_path: Path) -> None:
    loaded = load(tmp_path, CATALOG)
    assert [str(warning) for warning in loaded.warnings] == []
    specs = {server.id: server.runtime for server in loaded.value.servers}
    assert isinstance(specs["local"], LocalProcessSpec)
    assert isinstance(specs["far"], RemoteSpec)
    assert specs["far"].allow_private is True
    box = specs["box"]
    assert isinstance(box, DockerSpec)
    assert box.resources.limits == Amounts(0.5, "512Mi", 64)
    assert (box.user, box.port, box.pull) == (1000, 8080, "always")
    assert specs["pod"] == DockerSpec("acme/box:1")
    job = specs["job"]
    assert isinstance(job, K8sJobSpec)
    assert job.env_from == (EnvFrom(secret="s"), EnvFrom(config_map="c"))
    assert job.tolerations == (Toleration("k", "Exists", None, "NoSchedule", 5),)
    assert job.volumes == (Volume("/c", config_map="c", read_only=True), Volume("/t", empty_dir=True))
    thawed = job.pod_overrides.thaw()
    assert thawed["spec"]["hostNetwork"] is True
    assert thawed["spec"]["priority"] == 7
    assert thawed["spec"]["dnsConfig"]["nameservers"][1].value == "k"
    svc = specs["svc"]
    assert isinstance(svc, K8sServiceSpec)
    assert (svc.service_name, svc.port, svc.scale) == ("s", "http", Scale("Deployment", "d", 0, 2))
    assert len({hash(server) for server in loaded.value.servers}) == 6


def test_K4_every_type_has_its_names() -> None:
    assert sorted(spec_types(RUNTIMES)) == [
        "docker",
        "k8s-job",
        "k8s-service",
        "local-process",
        "podman",
        "remote-http",
        "remote-sse",
    ]
    runtimes = by_type(RUNTIMES)
    assert runtimes["remote-http"] is runtimes["remote-sse"]
    assert all(runtime.open is not None for runtime in RUNTIMES)


@pytest.mark.parametrize(
    ("runtime", "place", "expected"),
    [
        ("{type: local-process}", 1, "missing required field: command"),
        ('{type: local-process, command: ""}', 1, "command must not be empty"),
        ("{type: remote-sse, url: far}", 1, "url must begin with http:// or https://"),
        ("{type: remote-sse, url: 'http://u:p@far/'}", 1, "url holds a user name or password"),
        ("{type: remote-sse, url: 'http://far/', headers: {'a b': c}}", 1, "'a b' is no valid HTTP header name"),
        ("{type: docker}", 1, "missing required field: image"),
        ("{type: docker, image: x, pull: sometimes}", 1, "expected missing, always or never"),
        ("{type: docker, image: x, port: 70000}", 1, "port must be between"),
        ("{type: docker, image: x, network: none, port: 80}", 1, "port needs a network"),
        ("{type: docker, image: x, volumes: [/a]}", 1, "'/a' is not host:container"),
        ("{type: docker, image: x, resources: {limits: {memory: 512m}}}", 1, "did you mean Mi instead of m"),
        ("{type: docker, image: x, resources: {limits: {cpu: lots}}}", 1, "'lots' is no quantity"),
        ("{type: k8s-job, namespace: m}", 1, "missing required field: image"),
        ("{type: k8s-job, namespace: m, image: x, pod_overrides: [a]}", 1, "pod_overrides must be a map"),
        ("{type: k8s-job, namespace: m, image: x, volumes: [{mount_path: /x}]}", 1, "exactly one of config_map"),
        ("{type: k8s-job, namespace: m, image: x, env_from: [{}]}", 1, "either a secret or a config_map"),
        ("{type: k8s-service, namespace: m}", 2, "missing required field: port"),
        ("{type: k8s-service, namespace: m, service_name: s, port: 0}", 1, "port must be between"),
        (
            "{type: k8s-service, namespace: m, service: s, port: 1, scale: {kind: Deployment, name: d, min: 3}}",
            1,
            "max at least 1 and not below min",
        ),
    ],
)
def test_K9_K27_mistakes_are_named_with_their_place(runtime: str, place: int, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"servers:\n  - id: x\n    runtime: {runtime}\n")
    problems = caught.value.problems
    assert len(problems) == place
    assert expected in " ".join(map(str, problems))
    assert all(problem.line == 3 for problem in problems)


def test_K14_a_mistake_in_a_variable_is_that_servers_own(tmp_path: Path) -> None:
    text = "servers:\n  - {id: x, runtime: {type: remote-sse, url: '${KEY}', headers: {A: '${KEY}\\n'}}}\n"
    assert load(tmp_path, text).value.servers[0].runtime.url.value == "k"


def test_specs_are_cheap_to_import() -> None:
    script = "import sys; import gateway.runtimes; print(*sorted(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    heavy = {"httpx", "cattrs", "ruamel", "ssl", "asyncio", "dataclasses", "quart", "hypercorn", "ctypes"}
    bare = subprocess.run(
        [sys.executable, "-c", "import sys, trio, attrs; print(*sys.modules)"], capture_output=True, text=True
    )
    assert heavy & set(done.stdout.split()) <= set(bare.stdout.split())


# ----------------------------------------------------------------------------------------------------------- plugins
@attrs.frozen
class NomadSpec:
    address: str


PLUGIN = """
import attrs
from gateway.runtimes.base import Runtime

@attrs.frozen
class Spec:
    address: str

@attrs.define
class Loose:
    address: str

RUNTIME = Runtime("nomad", Spec, None)
TAKEN = Runtime("docker", Spec, None)
LOOSE = Runtime("loose", Loose, None)
NO_SPEC = Runtime("none", dict, None)
NUMBER = 7
"""


@pytest.fixture
def plugin_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "acme_nomad.py").write_text(PLUGIN)
    (tmp_path / "acme_broken.py").write_text("1 / 0\n")
    (tmp_path / "acme_needy.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "acme_typo.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_G21_K29_a_plugin_is_found(plugin_path: Path) -> None:
    (nomad,) = load_plugins(("acme_nomad:RUNTIME",))
    assert isinstance(nomad, Runtime)
    assert spec_types((*RUNTIMES, nomad))["nomad"] is nomad.spec
    assert load_plugins(()) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acme_nomad", "write it as module:NAME"),
        ("acme_nomad:", "write it as module:NAME"),
        (":RUNTIME", "write it as module:NAME"),
        ("acme nomad:RUNTIME", "write it as module:NAME"),
        ("acme_absent:RUNTIME", "no module 'acme_absent' on PYTHONPATH"),
        ("acme_nomad.deeper:RUNTIME", "no module 'acme_nomad.deeper' on PYTHONPATH"),
        ("acme_needy:RUNTIME", "needs the module 'not_installed_anywhere', which is not installed"),
        ("acme_broken:RUNTIME", "its import failed: ZeroDivisionError: division by zero"),
        ("acme_typo:RUNTIME", "its import failed: SyntaxError"),
        ("acme_nomad:ABSENT", "module 'acme_nomad' has no ABSENT"),
        ("acme_nomad:NUMBER", "it is a int, not a gateway.runtimes.base.Runtime"),
        ("acme_nomad:NO_SPEC", "its spec must be a frozen attrs class"),
        ("acme_nomad:LOOSE", "its spec must be a frozen attrs class"),
        ("acme_nomad:TAKEN", "two runtimes are called 'docker'"),
    ],
)
def test_G21_a_bad_plugin_is_explained(name: str, expected: str, plugin_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugins((name,))
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_G21_all_bad_plugins_are_told_at_once(plugin_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugins(("a", "acme_nomad:RUNTIME", "acme_absent:X"))
    assert len(caught.value.problems) == 2
