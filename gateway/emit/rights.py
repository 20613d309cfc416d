"""What the gateway's service account must be allowed: exactly what the servers of a catalog take, in each namespace.

The table below follows ``runtimes.k8s_job`` and ``runtimes.k8s_service``. Where Kubernetes lets a rule name the object,
it does. Servers with a ``context`` are reached by a kubeconfig's own credentials, so they add nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs

from gateway.config.model import Secret, ServerSpec
from gateway.runtimes.k8s_job import K8sJobSpec
from gateway.runtimes.k8s_service import K8sServiceSpec, lease_name

__all__ = ["Rule", "rules_by_namespace"]


@attrs.frozen
class Rule:
    """One rule of a Role: verbs on resources of one API group, of all objects or of those named."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    names: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """As Kubernetes wants it."""
        made: dict[str, Any] = {"apiGroups": [self.group], "resources": list(self.resources)}
        if self.names:
            made["resourceNames"] = list(self.names)
        return {**made, "verbs": list(self.verbs)}


JOB_RULES: Final = (
    Rule("batch", ("jobs",), ("create", "get", "list", "delete")),
    Rule("", ("pods",), ("list", "watch", "delete")),
    Rule("", ("pods/log",), ("get",)),
    # Attaching by WebSocket is a GET; from 1.35 on Kubernetes wants the right to create for it as well.
    Rule("", ("pods/attach",), ("get", "create")),
    Rule("", ("events",), ("list",)),
    Rule("metrics.k8s.io", ("pods",), ("get",)),
)
SECRET_RULE: Final = Rule("", ("secrets",), ("create",))
"""For a Job with secret variables. It lets nobody read any: what is made belongs to the Job and goes with it."""

WORKLOADS: Final = {"Deployment": "deployments", "StatefulSet": "statefulsets"}


def rules_by_namespace(servers: Iterable[ServerSpec]) -> dict[str, list[Rule]]:
    """The rules that these servers take, by the namespace they hold in, in the order of the catalog."""
    jobs: dict[str, bool] = {}
    services: dict[str, list[K8sServiceSpec]] = {}
    for server in servers:
        spec = server.runtime
        if isinstance(spec, K8sJobSpec) and spec.context is None:
            hidden = any(isinstance(text, Secret) for _, text in (*server.env, *spec.env))
            jobs[spec.namespace] = jobs.get(spec.namespace, False) or hidden
        elif isinstance(spec, K8sServiceSpec) and spec.context is None:
            services.setdefault(spec.namespace, []).append(spec)
    found: dict[str, list[Rule]] = {}
    for namespace in dict.fromkeys((*jobs, *services)):
        rules = list(JOB_RULES) if namespace in jobs else []
        if jobs.get(namespace):
            rules.append(SECRET_RULE)
        found[namespace] = [*rules, *_service_rules(services.get(namespace, ()))]
    return found


def _service_rules(specs: Sequence[K8sServiceSpec]) -> list[Rule]:
    if not specs:
        return []
    names = tuple(dict.fromkeys(spec.service_name for spec in specs))
    rules = [
        Rule("", ("services",), ("get",), names),
        Rule("discovery.k8s.io", ("endpointslices",), ("list", "watch")),
        Rule("", ("endpoints",), ("list", "watch"), names),  # clusters before 1.21 have no slices
    ]
    scaled = [spec.scale for spec in specs if spec.scale is not None]
    for kind, resource in WORKLOADS.items():
        targets = tuple(dict.fromkeys(scale.name for scale in scaled if scale.kind == kind))
        if targets:
            rules.append(Rule("apps", (resource,), ("get", "patch"), targets))
    if scaled:
        # Why pods are not ready is told to those who wait for them.
        rules.append(Rule("", ("pods",), ("list",)))
        leases = tuple(dict.fromkeys(lease_name(scale) for scale in scaled))
        rules.append(Rule("coordination.k8s.io", ("leases",), ("create",)))
        rules.append(Rule("coordination.k8s.io", ("leases",), ("get", "update"), leases))
    return rules
