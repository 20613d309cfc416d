"""The objects that run the gateway in a cluster, as plain dictionaries. Pure: what they depend on comes in ``Plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

import gateway
from gateway.config.model import API_KEY_VARIABLE
from gateway.emit.rights import Rule

__all__ = ["CONFIG_DIR", "FIELDS", "KEY_OF_API_KEY", "PORT", "STATE_DIR", "Plan", "manifests"]

PORT: Final = 4444
CONFIG_DIR: Final = "/config"
STATE_DIR: Final = "/state"
KEY_OF_API_KEY: Final = "api-key"
"""What the Secret calls the gateway's key (compat D7); other variables have their own names in it."""
USER: Final = 1000
"""The image's user (compat D2)."""
FIELDS: Final = (("POD_NAME", "metadata.name"), ("POD_UID", "metadata.uid"), ("POD_NAMESPACE", "metadata.namespace"))


@attrs.frozen
class Plan:
    """What is to run.

    name        of every object; namespace: where the gateway runs
    files       the ConfigMap: file name -> text
    variables   environment variables that come out of the Secret, and whether the gateway can start without them
    rules       by namespace, see ``rights``
    egress      rules of the NetworkPolicy besides DNS; None for no NetworkPolicy
    host        what the probes send as Host, where the config lists allowed_hosts
    grace       seconds from SIGTERM to the end
    hpa         least and most replicas of an autoscaler
    namespaces  Namespaces to create
    """

    name: str
    namespace: str
    image: str
    files: Mapping[str, str]
    grace: int
    pull_policy: str | None = None
    pull_secrets: tuple[str, ...] = ()
    replicas: int = 2
    variables: Mapping[str, bool] = attrs.field(factory=dict)
    secret: str = ""
    rules: Mapping[str, Sequence[Rule]] = attrs.field(factory=dict)
    egress: Sequence[Mapping[str, Any]] | None = ()
    host: str | None = None
    requests: Mapping[str, str] = attrs.field(factory=dict)
    limits: Mapping[str, str] = attrs.field(factory=dict)
    hpa: tuple[int, int] | None = None
    ingress: str | None = None
    ingress_class: str | None = None
    tls_secret: str | None = None
    service_monitor: bool = False
    namespaces: Sequence[str] = ()

    @property
    def labels(self) -> dict[str, str]:
        """Of every object; the first one selects the pods."""
        version = gateway.__version__
        return {**self.selector, "app.kubernetes.io/name": "open-mcp-gateway", "app.kubernetes.io/version": version}

    @property
    def selector(self) -> dict[str, str]:
        """What the pods of this gateway and no others have."""
        return {"app.kubernetes.io/instance": self.name}


def manifests(plan: Plan) -> list[dict[str, Any]]:
    """All objects, in an order in which they can be applied."""
    made = [_object(plan, "v1", "Namespace", name=name, namespace=None) for name in plan.namespaces]
    made.append(_object(plan, "v1", "ServiceAccount", automountServiceAccountToken=False))
    for namespace, rules in plan.rules.items():
        made += _grant(plan, namespace, rules)
    made.append(_object(plan, "v1", "ConfigMap", data=dict(plan.files)))
    made += [_deployment(plan), _service(plan), _budget(plan)]
    if plan.egress is not None:
        made.append(_network_policy(plan))
    if plan.hpa is not None:
        made.append(_autoscaler(plan))
    if plan.ingress is not None:
        made.append(_ingress(plan, plan.ingress))
    if plan.service_monitor:
        made.append(_service_monitor(plan))
    return made


def _object(
    plan: Plan, version: str, kind: str, *, name: str = "", namespace: str | None = "", **members: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name or plan.name}
    if namespace is not None:
        metadata["namespace"] = namespace or plan.namespace
    metadata["labels"] = plan.labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **members}


def _grant(plan: Plan, namespace: str, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """A Role in a namespace, bound to the gateway's account. Another gateway may have a Role there: the name tells."""
    name = plan.name if namespace == plan.namespace else f"{plan.name}-{plan.namespace}"
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": plan.name, "namespace": plan.namespace}
    return [
        _object(plan, f"{group}/v1", "Role", name=name, namespace=namespace, rules=[r.manifest() for r in rules]),
        _object(
            plan,
            f"{group}/v1",
            "RoleBinding",
            name=name,
            namespace=namespace,
            roleRef={"apiGroup": group, "kind": "Role", "name": name},
            subjects=[subject],
        ),
    ]


# ------------------------------------------------------------------------------------------------------ the workload
def _deployment(plan: Plan) -> dict[str, Any]:
    spec: dict[str, Any] = {} if plan.hpa is not None else {"replicas": plan.replicas}
    fewest = plan.replicas if plan.hpa is None else plan.hpa[0]
    spec |= {
        "selector": {"matchLabels": plan.selector},
        # A lone replica is replaced by a second one; of several, one at a time may be missing (compat D10).
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0 if fewest == 1 else 1},
        },
        "template": {"metadata": {"labels": plan.labels}, "spec": _pod(plan)},
    }
    return _object(plan, "apps/v1", "Deployment", spec=spec)


def _pod(plan: Plan) -> dict[str, Any]:
    apart = {"labelSelector": {"matchLabels": plan.selector}, "topologyKey": "kubernetes.io/hostname"}
    spec: dict[str, Any] = {
        "serviceAccountName": plan.name,
        "automountServiceAccountToken": bool(plan.rules),
        "terminationGracePeriodSeconds": plan.grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
            }
        },
        "containers": [_container(plan)],
        "volumes": [
            # The folder, not single files: only so does a change of the ConfigMap reach a running gateway.
            {"name": "config", "configMap": {"name": plan.name}},
            {"name": "state", "emptyDir": {"sizeLimit": "256Mi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
    }
    if plan.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in plan.pull_secrets]
    return spec


def _container(plan: Plan) -> dict[str, Any]:
    environment: list[dict[str, Any]] = []
    for name, optional in plan.variables.items():
        key = KEY_OF_API_KEY if name == API_KEY_VARIABLE else name
        reference = {"name": plan.secret, "key": key, **({"optional": True} if optional else {})}
        environment.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    environment += [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in FIELDS]
    environment.append({"name": "HOME", "value": "/tmp"})  # the image's own home can't be written
    made: dict[str, Any] = {"name": "gateway", "image": plan.image}
    if plan.pull_policy is not None:
        made["imagePullPolicy"] = plan.pull_policy
    return {
        **made,
        "args": ["--config", f"{CONFIG_DIR}/config.yaml"],
        "env": environment,
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "livenessProbe": _probe(plan, 10, 30),
        "readinessProbe": _probe(plan, 5, 10),
        # A Service sends requests on for a moment after a pod was told to go.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "2"]}}},
        "resources": {"requests": dict(plan.requests), "limits": dict(plan.limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
            {"name": "state", "mountPath": STATE_DIR},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _probe(plan: Plan, delay: int, period: int) -> dict[str, Any]:
    get: dict[str, Any] = {"path": "/health", "port": "http"}
    if plan.host is not None:
        get["httpHeaders"] = [{"name": "Host", "value": plan.host}]
    return {
        "httpGet": get,
        "initialDelaySeconds": delay,
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": 3,
    }


# ------------------------------------------------------------------------------------------------------ around it
def _service(plan: Plan) -> dict[str, Any]:
    spec = {
        "type": "ClusterIP",
        "selector": plan.selector,
        "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        # Sessions of the legacy era live in one replica's memory.
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
    }
    return _object(plan, "v1", "Service", spec=spec)


def _budget(plan: Plan) -> dict[str, Any]:
    """One of several must stay (compat D10); a lone one would keep its node from ever being drained."""
    fewest = plan.replicas if plan.hpa is None else plan.hpa[0]
    limit = {"minAvailable": 1} if fewest > 1 else {"maxUnavailable": 1}
    return _object(plan, "policy/v1", "PodDisruptionBudget", spec={**limit, "selector": {"matchLabels": plan.selector}})


def _network_policy(plan: Plan) -> dict[str, Any]:
    dns = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    spec = {
        "podSelector": {"matchLabels": plan.selector},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"protocol": "TCP", "port": PORT}]}],
        "egress": [dns, *(plan.egress or ())],
    }
    return _object(plan, "networking.k8s.io/v1", "NetworkPolicy", spec=spec)


def _autoscaler(plan: Plan) -> dict[str, Any]:
    assert plan.hpa is not None
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": plan.name},
        "minReplicas": plan.hpa[0],
        "maxReplicas": plan.hpa[1],
        "targetCPUUtilizationPercentage": 70,
    }
    return _object(plan, "autoscaling/v1", "HorizontalPodAutoscaler", spec=spec)


def _ingress(plan: Plan, host: str) -> dict[str, Any]:
    backend = {"service": {"name": plan.name, "port": {"name": "http"}}}
    rule = {"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    spec: dict[str, Any] = {"rules": [rule]}
    if plan.ingress_class is not None:
        spec["ingressClassName"] = plan.ingress_class
    if plan.tls_secret is not None:
        spec["tls"] = [{"hosts": [host], "secretName": plan.tls_secret}]
    made = _object(plan, "networking.k8s.io/v1", "Ingress", spec=spec)
    # Others ignore these: event streams stay open and are not held back, and a client stays at its replica.
    nginx = "nginx.ingress.kubernetes.io/"
    made["metadata"]["annotations"] = {
        f"{nginx}proxy-buffering": "off",
        f"{nginx}proxy-read-timeout": "3600",
        f"{nginx}proxy-send-timeout": "3600",
        f"{nginx}upstream-hash-by": "$binary_remote_addr",
    }
    return made


def _service_monitor(plan: Plan) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"port": "http", "path": "/metrics", "interval": "30s"}
    if API_KEY_VARIABLE in plan.variables:
        credentials = {"name": plan.secret, "key": KEY_OF_API_KEY}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    spec = {"selector": {"matchLabels": plan.selector}, "endpoints": [endpoint]}
    return _object(plan, "monitoring.coreos.com/v1", "ServiceMonitor", spec=spec)
