"""The names of images, as Docker and Podman write them. Pure."""

from __future__ import annotations

import re
from typing import Final

import attrs

__all__ = ["Reference", "parse_reference"]

_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN: Final = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_NAME: Final = re.compile(
    rf"(?:(?P<domain>{_DOMAIN})/)?(?P<path>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-f]{32,}))?"
)
_ID: Final = re.compile(r"(?:sha256:)?[0-9a-f]{64}")


@attrs.frozen
class Reference:
    """An image: ``name`` without tag, ``tag`` or digest ("" for an id), and the registry's ``domain`` and ``path``."""

    written: str
    name: str
    tag: str
    domain: str
    path: str

    def __str__(self) -> str:
        return f"'{self.written}'"


def parse_reference(text: str) -> Reference:
    """Raises ValueError with a sentence that fits behind "image "."""
    if _ID.fullmatch(text):
        return Reference(text, text, "", "", "")
    found = _NAME.fullmatch(text)
    if found is None:
        hint = "; names are in lower case" if _NAME.fullmatch(text.lower()) else ""
        raise ValueError(f"{text[:120]!r} is no name of an image, such as acme/box:1 or ghcr.io/acme/box:1{hint}")
    domain, path = found["domain"] or "", found["path"]
    if domain and not ("." in domain or ":" in domain or domain == "localhost" or domain != domain.lower()):
        domain, path = "", f"{domain}/{path}"
    name = f"{domain}/{path}" if domain else path
    if not domain:
        domain, path = "docker.io", path if "/" in path else f"library/{path}"
    return Reference(text, name, found["digest"] or found["tag"] or "latest", domain, path)
