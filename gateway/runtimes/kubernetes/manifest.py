"""The objects that a k8s-job entry becomes: a Job, and a Secret for what readers of Jobs need not read. Pure.

The pod is safe by default (robustness RB65): not root, no new privileges, no capabilities, the runtime's seccomp
profile, no token of Kubernetes' API, limits. ``relaxations`` says what of that an entry gives up, by whichever key.

Secrets: values that hold one (``${}``) go from ``env`` into a Secret object which the Job owns, so that it goes with
it. Kubernetes expands ``$(NAME)`` in commands and values; every ``$`` is doubled, so a text arrives as it was written.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Final

import attrs

from gateway.config.model import Secret, Text, reveal
from gateway.errors import StartFailed
from gateway.runtimes._quantities import scaled

if TYPE_CHECKING:
    from gateway.runtimes.kubernetes.job_spec import K8sJobSpec

__all__ = [
    "CONTAINER",
    "INSTANCE",
    "JOB",
    "MANAGED_BY",
    "SERVER",
    "Identity",
    "Manifests",
    "build",
    "job_name",
    "label_value",
    "relaxations",
]

Object = dict[str, Any]

CONTAINER: Final = "server"
"""The name of the pod's container: what ``pod_overrides`` means by it."""
MANAGER: Final = "open-mcp-gateway"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
INSTANCE: Final = "open-mcp-gateway/instance"
SERVER: Final = "open-mcp-gateway/server"
JOB: Final = "open-mcp-gateway/job"
SERVER_ID: Final = "open-mcp-gateway/server-id"

LIMITS: Final[Mapping[str, str]] = {"cpu": "1", "memory": "1Gi"}
REQUESTS: Final[Mapping[str, str]] = {"cpu": "50m", "memory": "64Mi"}
"""What a container may use and is sure to get where its entry says nothing."""
LOST_NODE: Final = 10
"""Seconds a pod stays bound to a node that is lost, instead of Kubernetes' five minutes (RB64)."""
LOST: Final = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

_VARIABLE: Final = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]{0,252}")


@attrs.frozen
class Identity:
    """Whose Job it is: the gateway's instance id, the server's id, and the gateway's own pod as owner, if any."""

    name: str
    server_id: str
    instance: str
    owner: Mapping[str, str] | None = None

    def labels(self) -> Object:
        """What no entry can change."""
        return {
            MANAGED_BY: MANAGER,
            INSTANCE: self.instance,
            SERVER: label_value(self.server_id),
            JOB: self.name,
        }


@attrs.frozen
class Manifests:
    """What is to be made. ``secret`` still lacks its owner, the Job, whose uid Kubernetes gives."""

    job: Object
    secret: Object | None


def job_name(server_id: str, unique: str) -> str:
    """``mcp-<server>-<unique>``, short enough for the pod's name and for labels."""
    server = re.sub(r"[^a-z0-9]+", "-", server_id.lower()).strip("-")[:42].strip("-")
    return f"mcp-{server}-{unique}" if server else f"mcp-{unique}"


def label_value(text: str) -> str:
    """As much of a text as a label can hold."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63])


def build(
    spec: K8sJobSpec,
    identity: Identity,
    env: Mapping[str, str],
    is_secret: Callable[[str], bool],
    stop_grace: float,
    version: tuple[int, int] = (0, 0),
) -> Manifests:
    """The Job for an entry. ``env`` is the entry's own, on top of ``spec.env``; ``version`` is Kubernetes'.

    Raises StartFailed.
    """
    variables, hidden = _variables(spec, identity.name, env, is_secret)
    metadata: Object = {"labels": {**spec.labels.revealed(), **identity.labels()}}
    annotations = {**spec.annotations.revealed(), SERVER_ID: identity.server_id}
    pod = _pod(spec, variables, stop_grace)
    template = {"metadata": {**metadata, "annotations": annotations}, "spec": pod}
    template = _merged(template, _revealed(spec.pod_overrides.thaw()))
    _keep_ours(template, identity)
    job: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": identity.name,
            "namespace": spec.namespace,
            "labels": dict(metadata["labels"]),
            "annotations": annotations,
        },
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": spec.ttl_seconds,
            "template": template,
        },
    }
    if version >= (1, 29):  # earlier ones do not know it
        job["spec"]["podReplacementPolicy"] = "Failed"
    if spec.active_deadline_seconds is not None:
        job["spec"]["activeDeadlineSeconds"] = spec.active_deadline_seconds
    if identity.owner is not None:
        owner = identity.owner
        job["metadata"]["ownerReferences"] = [
            {"apiVersion": "v1", "kind": "Pod", "name": owner["name"], "uid": owner["uid"]}
        ]
    return Manifests(job, _secret(spec.namespace, identity, hidden) if hidden else None)


# ----------------------------------------------------------------------------------------------------------- variables
def _variables(
    spec: K8sJobSpec, secret_name: str, env: Mapping[str, str], is_secret: Callable[[str], bool]
) -> tuple[list[Object], dict[str, str]]:
    """The container's ``env``, and what goes into the Secret."""
    marked = {name for name, value in spec.env if isinstance(value, Secret)} - set(env)
    hidden: dict[str, str] = {}
    found: list[Object] = []
    for name, value in sorted((spec.env.revealed() | dict(env)).items()):
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise StartFailed(f"environment variable {name!r} can't be given to a pod: bad name, or a NUL character")
        if name in marked or is_secret(value):
            hidden[name] = value
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name, "key": name}}})
        else:
            found.append({"name": name, "value": _literal(value)})
    return found, hidden


def _secret(namespace: str, identity: Identity, hidden: Mapping[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": identity.name, "namespace": namespace, "labels": identity.labels()},
        "type": "Opaque",
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in hidden.items()},
    }


def _literal(text: str) -> str:
    return text.replace("$", "$$")


def _literals(texts: Sequence[Text]) -> list[str]:
    return [_literal(reveal(text)) for text in texts]


# ----------------------------------------------------------------------------------------------------------------- pod
def _pod(spec: K8sJobSpec, variables: list[Object], stop_grace: float) -> Object:
    pod: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": max(1, ceil(stop_grace)),
        "automountServiceAccountToken": spec.service_account is not None,
        "enableServiceLinks": False,
        "securityContext": _pod_security(spec),
        "tolerations": _tolerations(spec),
        "containers": [_container(spec, variables)],
    }
    if spec.service_account is not None:
        pod["serviceAccountName"] = spec.service_account
    if spec.node_selector.items:
        pod["nodeSelector"] = spec.node_selector.revealed()
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in spec.image_pull_secrets]
    if spec.volumes:
        pod["volumes"] = [{"name": f"volume-{at}", **_source(volume)} for at, volume in enumerate(spec.volumes)]
    return pod


def _pod_security(spec: K8sJobSpec) -> Object:
    found: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if spec.user is not None:
        user, _, group = str(spec.user).partition(":")
        found |= {"runAsUser": int(user), "runAsNonRoot": int(user) != 0}
        if group:
            found["runAsGroup"] = int(group)
    return found


def _container(spec: K8sJobSpec, variables: list[Object]) -> Object:
    capabilities: Object = {"drop": ["ALL"]}
    if spec.cap_add:
        capabilities["add"] = list(spec.cap_add)
    security: Object = {"allowPrivilegeEscalation": False, "capabilities": capabilities}
    if spec.read_only:
        security["readOnlyRootFilesystem"] = True
    found: Object = {
        "name": CONTAINER,
        "image": reveal(spec.image),
        "stdin": True,
        "stdinOnce": True,
        "resources": _resources(spec),
        "securityContext": security,
    }
    for key, texts in (("command", spec.command), ("args", spec.args)):
        if texts:
            found[key] = _literals(texts)
    if spec.working_dir is not None:
        found["workingDir"] = reveal(spec.working_dir)
    if spec.image_pull_policy is not None:
        found["imagePullPolicy"] = spec.image_pull_policy
    if variables:
        found["env"] = variables
    if spec.env_from:
        found["envFrom"] = [
            {"secretRef": {"name": each.secret}} if each.secret is not None
            else {"configMapRef": {"name": each.config_map}}
            for each in spec.env_from
        ]  # fmt: skip
    if spec.volumes:
        found["volumeMounts"] = [
            {"name": f"volume-{at}", "mountPath": volume.mount_path}
            | ({"subPath": volume.sub_path} if volume.sub_path is not None else {})
            | ({"readOnly": True} if volume.read_only else {})
            for at, volume in enumerate(spec.volumes)
        ]
    return found


def _source(volume: Any) -> Object:
    if volume.config_map is not None:
        return {"configMap": {"name": volume.config_map}}
    if volume.secret is not None:
        return {"secret": {"secretName": volume.secret}}
    if volume.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": volume.pvc}}
    return {"emptyDir": {}}


def _resources(spec: K8sJobSpec) -> Object:
    """What the entry says, and our defaults where they do not contradict it."""
    limits: Object = {}
    requests: Object = {}
    for name in ("cpu", "memory"):
        limit, request = getattr(spec.resources.limits, name), getattr(spec.resources.requests, name)
        if limit is not None:
            limits[name] = str(limit)
        elif request is None or not _exceeds(request, LIMITS[name]):
            limits[name] = LIMITS[name]
        else:
            limits[name] = str(request)
        if request is not None:
            requests[name] = str(request)
        elif limit is None or not _exceeds(REQUESTS[name], limit):
            requests[name] = REQUESTS[name]
    return {"limits": limits, **({"requests": requests} if requests else {})}


def _exceeds(one: str | int | float, other: str | int | float) -> bool:
    try:
        return scaled(one, 9) > scaled(other, 9)
    except ValueError:
        return False  # Kubernetes will say what it thinks of it


def _tolerations(spec: K8sJobSpec) -> list[Object]:
    found: list[Object] = []
    for each in spec.tolerations:
        one: Object = {"operator": each.operator}
        for key, value in (
            ("key", each.key),
            ("value", each.value),
            ("effect", each.effect),
            ("tolerationSeconds", each.toleration_seconds),
        ):
            if value is not None:
                one[key] = value
        found.append(one)
    named = {each.key for each in spec.tolerations}
    if None not in named:  # else all is tolerated, lost nodes too
        found += [
            {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE}
            for key in LOST
            if key not in named
        ]
    return found


# ----------------------------------------------------------------------------------------------------------- overrides
def _revealed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _revealed(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_revealed(each) for each in value]
    return reveal(value) if isinstance(value, Secret) else value


def _merged(base: Any, over: Any) -> Any:
    """Maps merge, lists of named things (containers, volumes, variables) merge by name, None removes, the rest wins."""
    if isinstance(base, dict) and isinstance(over, dict):
        found = dict(base)
        for key, value in over.items():
            if value is None:
                found.pop(key, None)
            else:
                found[key] = _merged(base[key], value) if key in base else value
        return found
    if _named(base) and _named(over):
        by_name = {each["name"]: each for each in base}
        for each in over:
            by_name[each["name"]] = _merged(by_name.get(each["name"], {}), each)
        return list(by_name.values())
    return over


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "name" in each for each in value)


def _keep_ours(template: Object, identity: Identity) -> None:
    """What overrides can't change: whose pod it is, and that we can speak with it. Raises StartFailed."""
    metadata, pod = template.get("metadata"), template.get("spec")
    containers = pod.get("containers") if isinstance(pod, dict) else None
    if not isinstance(metadata, dict) or not isinstance(containers, list):
        raise StartFailed("pod_overrides leave no pod: metadata and spec must be maps, containers a list")
    labels = metadata.get("labels")
    metadata["labels"] = {**(labels if isinstance(labels, dict) else {}), **identity.labels()}
    ours = [each for each in containers if isinstance(each, dict) and each.get("name") == CONTAINER]
    if not ours:
        raise StartFailed(f"pod_overrides leave no container {CONTAINER!r}")
    assert isinstance(pod, dict)
    pod["restartPolicy"] = "Never"
    ours[0].update(stdin=True, stdinOnce=True)
    ours[0].pop("tty", None)


# ---------------------------------------------------------------------------------------------------------- relaxations
def relaxations(job: Object) -> list[str]:
    """What of the safe defaults a Job gives up, for people, whichever keys said so."""
    pod = job["spec"]["template"]["spec"]
    found = []
    for key, text in (
        ("hostNetwork", "uses the node's network"),
        ("hostPID", "sees the node's processes"),
        ("hostIPC", "shares the node's memory segments"),
        ("shareProcessNamespace", "lets the pod's containers see each other's processes"),
    ):
        if pod.get(key):
            found.append(f"{key} {text}")
    if pod.get("automountServiceAccountToken", True):
        account = pod.get("serviceAccountName") or "default"
        found.append(f"the server gets a token of Kubernetes' API as service account {account!r} (service_account)")
    for volume in pod.get("volumes") or ():
        if "hostPath" in volume:
            found.append(f"volume {volume.get('name')!r} is the node's folder {volume['hostPath'].get('path')!r}")
    around = pod.get("securityContext") or {}
    for container in (*(pod.get("initContainers") or ()), *pod["containers"]):
        found += [f"container {container.get('name')!r} {text}" for text in _relaxed(container, around)]
    return found


def _relaxed(container: Object, around: Object) -> list[str]:
    security = container.get("securityContext") or {}
    both = {**around, **security}
    found = []
    if security.get("privileged"):
        found.append("is privileged: it owns the node")
    if both.get("runAsUser") == 0 or not both.get("runAsNonRoot"):
        found.append("may run as root (user)")
    if security.get("allowPrivilegeEscalation", True):
        found.append("may gain privileges (allowPrivilegeEscalation)")
    capabilities = security.get("capabilities") or {}
    if capabilities.get("add"):
        found.append(f"has the capabilities {', '.join(map(str, capabilities['add']))} (cap_add)")
    if "ALL" not in (capabilities.get("drop") or ()):
        found.append("keeps the engine's default capabilities")
    if (both.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("may make any system call (seccompProfile)")
    limits = (container.get("resources") or {}).get("limits") or {}
    for name in ("cpu", "memory"):
        if name not in limits:
            found.append(f"has no {name} limit")
        elif _exceeds(limits[name], LIMITS[name]):
            found.append(f"may use {limits[name]} of {name}, which is above the default of {LIMITS[name]}")
    return found
