"""What a catalog entry of type ``k8s-job`` says: the YAML schema, checked as far as that goes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from gateway.config.model import StringMap, Text

__all__ = ["EnvFrom", "K8sJobSpec", "Quantities", "Resources", "Toleration", "Tree", "Volume"]

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


def _must_be_template(instance: K8sJobSpec, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, Tree):
        raise ValueError("pod_overrides must be a map")
    for name, each in value.items:
        if name not in ("metadata", "spec"):
            hint = f"; did you mean pod_overrides: {{spec: {{{name}: ...}}}}?"
            raise ValueError(f"pod_overrides: a pod has metadata and spec, not {name!r}{hint}")
        if not isinstance(each, Tree):
            raise ValueError(f"pod_overrides: {name} must be a map")


_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CAPABILITY: Final = re.compile(r"[A-Z][A-Z_]{0,63}")
_USER: Final = re.compile(r"[0-9]{1,10}(:[0-9]{1,10})?")


@attrs.frozen
class K8sJobSpec:
    """A Job made for this server, whose one container, ``server``, runs ``image``; see compat K24-K26.

    context          of the kubeconfig; none: in-cluster, else the current one
    env              under the entry's own ``env``; values from ``${}`` are kept in a Secret that goes with the Job
    service_account  whose token the server gets; none: it gets no token
    resources        none: limits of 1 CPU and 1Gi, requests of 50m and 64Mi
    user             "uid" or "uid:gid"; none: the image's, which must be a number other than 0
    cap_add          capabilities; read_only: the image's files can't be changed
    ttl_seconds      how long a finished Job stays; active_deadline_seconds: how long it may run
    pod_overrides    merged into the pod template last (``metadata``, ``spec``): the way to what has no key here
    """

    namespace: str
    image: Text
    command: tuple[Text, ...] = ()
    args: tuple[Text, ...] = ()
    env: StringMap = _NO_STRINGS
    env_from: tuple[EnvFrom, ...] = ()
    working_dir: Text | None = None
    user: str | int | None = None
    cap_add: tuple[str, ...] = ()
    read_only: bool = False
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
    pod_overrides: Any = attrs.field(default=Tree(), converter=_freeze, validator=_must_be_template)
    context: str | None = None

    def __attrs_post_init__(self) -> None:
        if not _NAME.fullmatch(self.namespace):
            raise ValueError(f"namespace: {self.namespace[:80]!r} is no name of a namespace")
        if self.user is not None and not _USER.fullmatch(str(self.user)):
            raise ValueError(f"user: {str(self.user)[:80]!r} must be a number, or two as in 1000:1000")
        for capability in self.cap_add:
            if not _CAPABILITY.fullmatch(capability):
                raise ValueError(f"cap_add: {capability[:80]!r} is no capability, such as NET_RAW")
        if self.ttl_seconds < 0 or (self.active_deadline_seconds is not None and self.active_deadline_seconds < 1):
            raise ValueError("ttl_seconds must be at least 0, active_deadline_seconds at least 1")
