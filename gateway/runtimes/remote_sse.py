"""Servers that are reached at a URL (compat K13-K16, RB55). Only says where; speaking is ``upstream``'s business."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal
from urllib.parse import urlsplit

import attrs

from gateway.config.model import Secret, StringMap, Text, reveal
from gateway.errors import StartFailed
from gateway.runtimes.base import Origin, Runtime, Surroundings

__all__ = ["RUNTIME", "RemoteSpec", "check_headers", "check_url", "open_remote"]

_NO_STRINGS: Final = StringMap()

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_FRAMING: Final = frozenset(
    ("connection", "content-length", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers that say how this one message is carried: setting them would break the connection."""


@attrs.frozen
class RemoteSpec:
    """An absolute URL, the headers of every request to it, and whether its host may be a private address (RB55)."""

    url: Text
    headers: StringMap = _NO_STRINGS
    allow_private: bool | Literal["auto"] = "auto"

    def __attrs_post_init__(self) -> None:
        """A mistake in the file is told when it is read; one in a variable harms only the server that uses it."""
        if isinstance(self.url, str):
            check_url(self.url)
        if not any(isinstance(value, Secret) for _, value in self.headers):
            check_headers(self.headers)


def check_url(text: str) -> None:
    """Raise ValueError unless this is an absolute http(s) URL as one writes it into a catalog. Never shows it."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise ValueError(f"url can't be read: {error}") from None
    if re.search(r"[^\x21-\x7e]", text):
        raise ValueError("url holds a space, a control character or one outside ASCII; write it percent-encoded")
    if url.scheme not in ("http", "https"):
        raise ValueError(f"url must begin with http:// or https://, not {url.scheme or 'nothing'!r}")
    if not url.hostname or port == 0:
        raise ValueError("url names no host, or port 0")
    if "@" in url.netloc:
        raise ValueError("url holds a user name or password; put credentials into headers")
    if "#" in text:
        raise ValueError("url holds a fragment (#...), which no server ever sees")


def check_headers(headers: StringMap) -> tuple[tuple[str, str], ...]:
    """The headers with their real values. Raises ValueError naming the header, never its value."""
    seen: set[str] = set()
    checked = []
    for name, text in headers:
        value = reveal(text).strip(" \t")
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"headers: {name!r} is no valid HTTP header name")
        if name.lower() in _FRAMING:
            raise ValueError(f"headers: {name!r} belongs to the connection and can't be set")
        if name.lower() in seen:
            raise ValueError(f"headers: {name!r} is there twice")
        if value and not _VALUE.fullmatch(value):
            raise ValueError(f"headers: {name!r} has a value with a newline, a control or a non-ASCII character")
        seen.add(name.lower())
        checked.append((name, value))
    return tuple(checked)


@asynccontextmanager
async def open_remote(spec: RemoteSpec, surroundings: Surroundings) -> AsyncIterator[Origin]:
    """Yield the Origin. Connects nowhere: the first request does. Raises StartFailed for a bad url or header."""
    url = reveal(spec.url)
    try:
        check_url(url)
        headers = check_headers(spec.headers)
    except ValueError as error:
        raise StartFailed(str(error)) from None
    shown = spec.url.template if isinstance(spec.url, Secret) else url
    yield Origin(url, headers, allow_private=spec.allow_private, details={"url": shown})


RUNTIME: Final = Runtime(
    "remote-sse", RemoteSpec, open_remote, aliases=("remote-http",), origin=lambda spec: True
)
