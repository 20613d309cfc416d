"""``gateway.pyz emit kubernetes``: print what a cluster needs to run the gateway with a config and a catalog.

Nothing secret is printed: ``${NAME}`` in the files stays as it is, and becomes a variable that the pods get out of a
Secret, which the user makes. What the account of the gateway may do follows from the catalog (``rights``), and so does
where it may connect to (``reach``).
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.scalarstring import LiteralScalarString

import gateway
from gateway.config import load
from gateway.config.model import API_KEY_VARIABLE, Catalog, Secret, ServerSpec, Settings, StringMap
from gateway.emit.objects import FIELDS, KEY_OF_API_KEY, PORT, STATE_DIR, Plan, manifests
from gateway.emit.reach import egress_of
from gateway.emit.rights import rules_by_namespace
from gateway.errors import ConfigError, Problem
from gateway.runtimes import RUNTIMES, by_type, load_plugins
from gateway.runtimes.docker import DockerSpec
from gateway.runtimes.k8s_job import K8sJobSpec
from gateway.runtimes.k8s_service import K8sServiceSpec
from gateway.runtimes.local_process import LocalProcessSpec

__all__ = ["EmitOptions", "emit"]

SLACK: Final = 5
"""Seconds that a pod gets beyond the gateway's own drain and stop times."""
MAX_CATALOG: Final = 900 * 1024
"""Bytes: a ConfigMap holds 1 MiB with everything."""
SET_IN_PODS: Final = {"MCP_GATEWAY_PYTHON", "MCP_GATEWAY_MAIN", "PATH", "HOME", *(name for name, _ in FIELDS)}
"""Variables that every gateway in a pod has without being told."""
DEFAULT_HPA: Final = "2:10"

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_IMAGE: Final = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]{0,254}")
_QUANTITY: Final = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_TELLTALE: Final = re.compile(r"auth|cookie|credential|key|passw|secret|token", re.IGNORECASE)
_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@attrs.frozen
class EmitOptions:
    """The command line of ``emit kubernetes``, as it was written."""

    config: Path | None = None
    catalog: Path | None = None
    name: str = "mcp-gateway"
    namespace: str = "mcp-gateway"
    replicas: int = 2
    image: str | None = None
    image_pull_policy: str | None = None
    image_pull_secret: Sequence[str] = ()
    secret: str | None = None
    requests: str = "cpu=100m,memory=128Mi"
    limits: str = "cpu=1,memory=512Mi"
    hpa: str | None = None
    ingress: str | None = None
    ingress_class: str | None = None
    tls_secret: str | None = None
    service_monitor: bool = False
    network_policy: bool = True
    namespaces: str = "own"

    @classmethod
    def of(cls, parsed: Mapping[str, Any]) -> EmitOptions:
        """Out of what argparse has found."""
        return cls(**{field.name: parsed[field.name] for field in attrs.fields(cls)})


def emit(options: EmitOptions) -> int:
    """Print the manifests: 0, 1 for files that can't be used, 2 for an option that makes no sense. Notes on stderr."""
    try:
        shape = _shape(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        files = _Files.read(options)
        files.check()
        plan = _plan(options, shape, files)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1
    for note in files.notes():
        print(note, file=sys.stderr)
    sys.stdout.write(_header(plan) + rendered(manifests(plan)))
    return 0


# -------------------------------------------------------------------------------------------------- the command line
def _shape(options: EmitOptions) -> Plan:
    """What the options alone say. Raises ValueError with a sentence for people."""
    for option in ("name", "namespace"):
        text = getattr(options, option)
        if not _LABEL.fullmatch(text):
            raise ValueError(f"--{option}: {text!r} is no name that Kubernetes takes: a-z, 0-9 and -, at most 63")
    for option in ("secret", "ingress", "ingress_class", "tls_secret"):
        text = getattr(options, option)
        if text is not None and not _SUBDOMAIN.fullmatch(text):
            shown = option.replace("_", "-")
            raise ValueError(f"--{shown}: {text!r} is no name that Kubernetes takes: a-z, 0-9, - and .")
    if not 1 <= options.replicas <= 100:
        raise ValueError("--replicas must be from 1 to 100")
    image = options.image or f"agentic/mcp-gateway:v{gateway.__version__}"
    if not _IMAGE.fullmatch(image):
        raise ValueError(f"--image: {image!r} is no image name, such as registry.example/mcp-gateway:v1.2.3")
    if options.ingress is None and (options.tls_secret is not None or options.ingress_class is not None):
        raise ValueError("--tls-secret and --ingress-class belong to --ingress HOST")
    return Plan(
        name=options.name,
        namespace=options.namespace,
        image=image,
        files={},
        grace=0,
        pull_policy=options.image_pull_policy,
        pull_secrets=tuple(options.image_pull_secret),
        replicas=options.replicas,
        secret=options.secret or options.name,
        requests=_amounts("--requests", options.requests),
        limits=_amounts("--limits", options.limits),
        hpa=_range(options.hpa),
        ingress=options.ingress,
        ingress_class=options.ingress_class,
        tls_secret=options.tls_secret,
        service_monitor=options.service_monitor,
    )


def _amounts(option: str, text: str) -> dict[str, str]:
    """ "cpu=1,memory=512Mi" as a dictionary."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, amount = part.strip().partition("=")
        if name not in ("cpu", "memory", "ephemeral-storage") or not _QUANTITY.fullmatch(amount):
            raise ValueError(f"{option}: write it as cpu=100m,memory=128Mi (got {part.strip()!r})")
        found[name] = amount
    return found


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--hpa: write it as LEAST:MOST replicas, such as {DEFAULT_HPA} (got {text!r})")
    return int(found[1]), int(found[2])


# --------------------------------------------------------------------------------------------------------- the files
class _StandIns(dict[str, str]):
    """An environment in which every variable is set: the cluster's Secret will have it, the user's shell need not.

    A stand-in reads as a number, so that it passes wherever a variable may stand.
    """

    def get(self, name: str, default: Any = None) -> str:
        if name not in self:
            self[name] = str(10_000 + len(self))
        return self[name]


@attrs.frozen
class _Files:
    """Config and catalog: what they mean, and how they are written. ``written`` is the config as ruamel reads it."""

    settings: Settings
    catalog: Catalog
    warnings: tuple[Problem, ...]
    config_path: Path | None
    written: Any
    catalog_text: str

    @classmethod
    def read(cls, options: EmitOptions) -> _Files:
        """Read both. Raises ConfigError with every problem."""
        path = load.find_config(options.config, Path.cwd(), Path.home())
        override = None if options.catalog is None else options.catalog.absolute()
        settings = load.load_settings(path, _StandIns(os.environ), {"catalog_path": override}).value
        types = {name: each.spec for name, each in by_type((*RUNTIMES, *load_plugins(settings.runtimes))).items()}
        catalog = load.load_catalog(settings.catalog_path, os.environ, types)
        return cls(
            settings,
            catalog.value,
            tuple(warning for warning in catalog.warnings if "is not set" not in warning.text),
            path,
            None if path is None else _round_trip().load(path.read_text("utf-8-sig")),
            settings.catalog_path.read_text("utf-8-sig"),
        )

    def check(self) -> None:
        """Raise ConfigError for what can't be put into a cluster."""
        problems = []
        for index, tenant in enumerate(self.settings.tenants):
            if not isinstance(tenant.api_key, Secret):
                hint = (
                    f'tenants[{index}].api_key is written out; write it as "${{NAME}}" to keep it out of the ConfigMap'
                )
                problems.append(Problem(hint, str(self.config_path)))
        if len(self.catalog_text.encode()) > MAX_CATALOG:
            hint = f"is larger than {MAX_CATALOG} bytes, which is what a ConfigMap has room for"
            problems.append(Problem(hint, str(self.catalog.path)))
        if problems:
            raise ConfigError(problems)

    def config_text(self) -> str:
        """The config for the cluster: the user's, but for where the gateway listens, logs and keeps its state.

        It never runs there without a key: where the config has neither key nor tenants, it gets one.
        """
        data = {} if self.written is None else self.written
        key = data.get("api_key")
        data["listen_addr"] = f"0.0.0.0:{PORT}"
        data["catalog_path"] = "catalog.yaml"
        data["log_format"] = "json"
        data["state_dir"] = STATE_DIR
        if "${" not in str(key) and (key is not None or not self.settings.tenants):
            data["api_key"] = f"${{{API_KEY_VARIABLE}}}"
        text = io.StringIO()
        _round_trip().dump(data, text)
        return text.getvalue()

    def variables(self, config_text: str) -> dict[str, bool]:
        """The variables that the Secret holds, and whether the gateway starts without them (compat G16)."""
        by_servers = set().union(*self.catalog.variables.values())
        found = dict.fromkeys(_variables_in(config_text), False)
        for name in _variables_in(self.catalog_text):
            found.setdefault(name, name in by_servers)
        return {name: optional for name, optional in found.items() if name not in SET_IN_PODS}

    def notes(self) -> Iterator[str]:
        """What a user should know, a line each."""
        for warning in self.warnings:
            yield f"warning: {warning}"
        if isinstance(self.settings.api_key, str):
            yield f"warning: {self.config_path}: api_key is written out; the cluster takes it from the Secret instead"
        for server in self.catalog.servers:
            who = f"server '{server.id}'"
            for where, name in _written_secrets(server):
                yield (
                    f"warning: {who}: {where} {name} is written out and will stand in the ConfigMap; "
                    f'write it as "${{NAME}}" to take it from the Secret'
                )
            spec = server.runtime
            if isinstance(spec, LocalProcessSpec):
                yield f"note: {who} runs in the gateway's own container: the image needs its command"
            elif isinstance(spec, DockerSpec):
                yield f"note: {who} needs a container engine, which the gateway's pods do not have"
            elif isinstance(spec, K8sJobSpec | K8sServiceSpec) and spec.context is not None:
                yield f"note: {who} names a context: no rights are granted for it, and its kubeconfig has to be mounted"


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = 10_000
    yaml.preserve_quotes = True
    return yaml


def _variables_in(text: str) -> tuple[str, ...]:
    """The variables that the values in a file name, in the order of the file."""
    root = YAML(typ="safe", pure=True).compose(text)
    found: dict[str, None] = {}
    seen: set[int] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, ScalarNode):
            found |= dict.fromkeys(_REFERENCE.findall(str(node.value)))
        elif isinstance(node, SequenceNode):
            waiting.extend(reversed(node.value))
        elif isinstance(node, MappingNode):
            waiting.extend(value for _, value in reversed(node.value))
    return tuple(found)


def _written_secrets(server: ServerSpec) -> Iterator[tuple[str, str]]:
    """Headers and variables whose names say that their values, which are written out, are secrets."""
    maps = {"env": server.env, "headers": getattr(server.runtime, "headers", None)}
    if isinstance(getattr(server.runtime, "env", None), StringMap):
        maps["runtime.env"] = server.runtime.env
    for where, values in maps.items():
        if isinstance(values, StringMap):
            yield from ((where, name) for name, text in values if isinstance(text, str) and _TELLTALE.search(name))


# ---------------------------------------------------------------------------------------------------------- the plan
def _plan(options: EmitOptions, shape: Plan, files: _Files) -> Plan:
    settings = files.settings
    rules = rules_by_namespace(files.catalog.servers)
    others = [namespace for namespace in rules if namespace != options.namespace]
    namespaces = {"own": [options.namespace], "all": [options.namespace, *others], "none": []}[options.namespaces]
    config = files.config_text()
    return attrs.evolve(
        shape,
        files={"config.yaml": config, "catalog.yaml": files.catalog_text},
        grace=int(settings.drain_timeout_seconds + settings.stop_grace_seconds) + SLACK,
        variables=files.variables(config),
        rules=rules,
        egress=egress_of(files.catalog.servers) if options.network_policy else None,
        host=settings.allowed_hosts[0] if settings.allowed_hosts else None,
        namespaces=namespaces,
    )


def _header(plan: Plan) -> str:
    """What has to be there before, as comments."""
    lines = [f"Open MCP Gateway {gateway.__version__} in Kubernetes. Apply it with: kubectl apply -f FILE"]
    absent = [name for name in (plan.namespace, *plan.rules) if name not in plan.namespaces]
    if absent:
        lines.append(f"Namespaces that have to be there: {', '.join(dict.fromkeys(absent))}")
    if plan.variables:
        lines.append(f"The gateway's pods wait for the Secret '{plan.secret}', which is not part of this file:")
        lines.append(f"  kubectl -n {plan.namespace} create secret generic {plan.secret} \\")
        for index, name in enumerate(plan.variables):
            key = KEY_OF_API_KEY if name == API_KEY_VARIABLE else name
            end = " \\" if index + 1 < len(plan.variables) else ""
            lines.append(f'    --from-literal={key}="${name}"{end}')
        spare = [name for name, optional in plan.variables.items() if optional]
        if spare:
            lines.append(f"Without one of these, only the servers that name it can't start: {', '.join(spare)}")
    return "".join(f"# {line}\n" for line in lines)


def rendered(objects: Sequence[Mapping[str, Any]]) -> str:
    """The objects as YAML documents that read back as exactly the same. Long texts are blocks where that is exact."""
    parts = []
    for made in objects:
        blocks = _with_blocks(made)
        text = _dumped(blocks)
        if blocks is not made and not _reads_as(text, made):
            text = _dumped(made)
        parts.append(f"---\n{text}")
    return "".join(parts)


def _with_blocks(made: Mapping[str, Any]) -> Mapping[str, Any]:
    data = made.get("data")
    if made["kind"] != "ConfigMap" or not data:
        return made
    return {**made, "data": {name: LiteralScalarString(text) for name, text in data.items()}}


def _dumped(made: Mapping[str, Any]) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 10_000
    yaml.representer.ignore_aliases = lambda data: True
    text = io.StringIO()
    yaml.dump(dict(made), text)
    return text.getvalue()


def _reads_as(text: str, made: Mapping[str, Any]) -> bool:
    try:
        return bool(YAML(typ="safe", pure=True).load(text) == made)
    except YAMLError:
        return False
