"""Servers behind a Kubernetes Service: the YAML schema (compat K27). This build does not reach them yet."""

from __future__ import annotations

from typing import Final, Literal

import attrs

from gateway.config.model import StringMap, Text
from gateway.runtimes.base import Runtime

__all__ = ["RUNTIME", "K8sServiceSpec", "Scale"]

_NO_STRINGS: Final = StringMap()


@attrs.frozen
class Scale:
    """The workload behind the Service, brought to ``max`` replicas by the first call and back to ``min`` when idle."""

    kind: Literal["Deployment", "StatefulSet"]
    name: str
    min: int = 0
    max: int = 1

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError("min must be at least 0, max at least 1 and not below min")


@attrs.frozen
class K8sServiceSpec:
    """A Service whose pods speak Streamable HTTP. ``port`` is a number or a port's name; ``context`` as for jobs."""

    namespace: str
    service_name: str = attrs.field(metadata={"aliases": ("service",)})
    port: int | str
    path: Text = "/mcp"
    scheme: Literal["http", "https"] = "http"
    headers: StringMap = _NO_STRINGS
    scale: Scale | None = None
    context: str | None = None

    def __attrs_post_init__(self) -> None:
        if isinstance(self.port, int) and not 0 < self.port < 65536:
            raise ValueError("port must be between 1 and 65535, or a port's name")


RUNTIME: Final = Runtime("k8s-service", K8sServiceSpec, None)
