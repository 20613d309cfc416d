"""Another gateway, which ``gateway-stdio --gateway URL`` goes through (compat S8). No catalog can name this type."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import quote

import attrs

from gateway.config.model import StringMap
from gateway.errors import StartFailed
from gateway.runtimes.base import Origin, Runtime, Surroundings
from gateway.runtimes.remote_sse import check_headers, check_url

__all__ = ["RUNTIME", "ThroughSpec"]


@attrs.frozen
class ThroughSpec:
    """The URL of a gateway, without a path of ours, and one of its servers or views; "" for both means all servers.

    Raises ValueError, with a sentence that never shows the URL, when that is none.
    """

    url: str
    server_id: str
    headers: StringMap
    view: str = ""
    mode: str = ""

    def __attrs_post_init__(self) -> None:
        """See the class."""
        check_url(self.url)
        if "?" in self.url:
            raise ValueError("url holds a query (?...); name the gateway alone, such as http://127.0.0.1:4444")

    @property
    def endpoint(self) -> str:
        """Where it speaks MCP about that server."""
        path = "/mcp"
        if self.server_id:
            path = f"/servers/{quote(self.server_id, safe='')}/mcp"
        elif self.view:
            path = f"/views/{quote(self.view, safe='')}/mcp"
        return self.url.rstrip("/") + path + (f"?mode={self.mode}" if self.mode else "")

    @property
    def plain(self) -> str:
        """Where it takes plain calls."""
        return self.url.rstrip("/") + "/mcp"


@asynccontextmanager
async def open_through(spec: ThroughSpec, surroundings: Surroundings) -> AsyncIterator[Origin]:
    """Yield the Origin. Connects nowhere. Raises StartFailed for a key that no header can carry."""
    try:
        headers = check_headers(spec.headers)
    except ValueError as error:
        raise StartFailed(str(error)) from None
    yield Origin(
        spec.endpoint,
        headers,
        allow_private=True,
        plain=(spec.plain, spec.server_id),
        details={"url": spec.endpoint},
    )


RUNTIME: Final = Runtime("gateway", ThroughSpec, open_through)
