"""Servers as Kubernetes Jobs of one pod: the YAML schema (compat K24-K26). This build does not run them yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from gateway.config.model import StringMap, Text
from gateway.runtimes.base import Runtime

__all__ = ["RUNTIME", "EnvFrom", "K8sJobSpec", "Quantities", "Resources", "Toleration", "Tree", "Volume"]

_NO_STRINGS: Final = StringMap()


@attrs.frozen
class Quantities:
    """Kubernetes quantities: ``500m``, ``0.5``, ``512Mi``."""

    cpu: str | int | float | None = None
    memory: str | int | None = None


@attrs.frozen
class Resources:
    """A container's requests and limits."""

    requests: Quantities = Quantities()
    limits: Quantities = Quantities()


@attrs.frozen
class EnvFrom:
    """All keys of one Secret or ConfigMap as variables."""

    secret: str | None = None
    config_map: str | None = None

    def __attrs_post_init__(self) -> None:
        if (self.secret is None) == (self.config_map is None):
            raise ValueError("an entry of env_from is either a secret or a config_map")


@attrs.frozen
class Toleration:
    """As in a pod's spec."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


@attrs.frozen
class Volume:
    """Something mounted at ``mount_path``: one of config_map, secret, pvc (their names) and empty_dir."""

    mount_path: str
    config_map: str | None = None
    secret: str | None = None
    pvc: str | None = None
    empty_dir: bool = False
    sub_path: str | None = None
    read_only: bool = False

    def __attrs_post_init__(self) -> None:
        if [self.config_map, self.secret, self.pvc].count(None) + (not self.empty_dir) != 3:
            raise ValueError("a volume is exactly one of config_map, secret, pvc and empty_dir: true")


@attrs.frozen
class Tree:
    """A YAML map of any depth, kept so that it hashes; lists are tuples."""

    items: tuple[tuple[str, Any], ...] = ()

    def thaw(self) -> dict[str, Any]:
        """As dictionaries and lists again."""
        return {name: _thaw(value) for name, value in self.items}


def _freeze(value: Any) -> Any:
    """Plain values, and nodes as ``config.load`` hands them over where a field's type is Any, as hashable ones."""
    match getattr(value, "kind", None):
        case "map":
            return _tree({name: _freeze(each) for name, each in value.members().items()})
        case "list":
            return tuple(map(_freeze, value.elements()))
        case "text":
            return value.filled()
        case "bool":
            return value.written.lower() == "true"
        case "int":
            return int(value.written, 0)
        case "float":
            return float(value.written)
        case "nothing":
            return None
    if isinstance(value, Mapping):
        return _tree({str(name): _freeze(each) for name, each in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _tree(members: Mapping[str, Any]) -> Tree:
    return Tree(tuple(sorted(members.items(), key=lambda pair: pair[0])))


def _thaw(value: Any) -> Any:
    if isinstance(value, Tree):
        return value.thaw()
    return list(map(_thaw, value)) if isinstance(value, tuple) else value


def _must_be_tree(instance: K8sJobSpec, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, Tree):
        raise ValueError("pod_overrides must be a map")


@attrs.frozen
class K8sJobSpec:
    """A Job made for this server, whose one container is ``image``; see compat K24-K26.

    context          of the kubeconfig; none: in-cluster, else the current one
    ttl_seconds      how long a finished Job stays; active_deadline_seconds: how long it may run
    pod_overrides    merged into the pod template last: the way to what has no key here
    """

    namespace: str
    image: Text
    command: tuple[Text, ...] = ()
    args: tuple[Text, ...] = ()
    env: StringMap = _NO_STRINGS
    env_from: tuple[EnvFrom, ...] = ()
    service_account: str | None = None
    resources: Resources = Resources()
    labels: StringMap = _NO_STRINGS
    annotations: StringMap = _NO_STRINGS
    node_selector: StringMap = _NO_STRINGS
    tolerations: tuple[Toleration, ...] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    ttl_seconds: int = 60
    active_deadline_seconds: int | None = None
    pod_overrides: Any = attrs.field(default=Tree(), converter=_freeze, validator=_must_be_tree)
    context: str | None = None


RUNTIME: Final = Runtime("k8s-job", K8sJobSpec, None)
