"""Where a gateway in a cluster has to connect to for a catalog's servers: the egress rules of its NetworkPolicy.

A NetworkPolicy knows addresses, not names, so a server that is named is let through by its port alone.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

from gateway.config.model import Secret, ServerSpec
from gateway.runtimes.docker import DockerSpec
from gateway.runtimes.k8s_job import K8sJobSpec
from gateway.runtimes.k8s_service import K8sServiceSpec
from gateway.runtimes.remote_sse import RemoteSpec

__all__ = ["egress_of"]

WEB: Final = (443, 80)
API_SERVER: Final = (443, 6443)
"""Where API servers listen, as the pods see them and behind the Service "kubernetes", which is what policies see."""


def egress_of(servers: Iterable[ServerSpec]) -> list[dict[str, Any]]:
    """The rules besides DNS, without repetition."""
    ports: dict[int, None] = {}
    addresses: dict[tuple[str, int], None] = {}
    namespaces: dict[str, None] = {}
    for server in servers:
        spec = server.runtime
        if isinstance(spec, K8sJobSpec):
            ports |= dict.fromkeys(API_SERVER)
        elif isinstance(spec, K8sServiceSpec):
            ports |= dict.fromkeys(API_SERVER)
            if spec.context is None:
                namespaces[spec.namespace] = None
        elif isinstance(spec, RemoteSpec) and not isinstance(spec.url, Secret):
            host, port = _place(spec.url)
            block = _block(host)
            if block:
                addresses[block, port] = None
            else:
                ports[port] = None
        elif not isinstance(spec, DockerSpec):
            # A program in the gateway's container, a URL that only the cluster will know, a plugin.
            ports |= dict.fromkeys(WEB)
    rules: list[dict[str, Any]] = [{"ports": [_tcp(port) for port in sorted(ports)]}] if ports else []
    rules += [
        {"to": [{"ipBlock": {"cidr": block}}], "ports": [_tcp(port)]} for block, port in addresses if port not in ports
    ]
    # The pods' own ports may be others than the Service's.
    rules += [
        {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]} for name in namespaces
    ]
    return rules


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def _block(host: str) -> str:
    try:
        return str(ipaddress.ip_network(host))
    except ValueError:
        return ""


def _tcp(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}
