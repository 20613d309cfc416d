"""Runs an ASGI application inline, in the request's own task: what is left over for Quart.

Only the ``http`` scope exists here. The body is read before the application is called, under its limit, so that a
refused one never reaches it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from gateway.downstream.server import Request

__all__ = ["ASGIApplication", "run_asgi"]

Event = MutableMapping[str, Any]
ASGIApplication = Callable[
    [dict[str, Any], Callable[[], Awaitable[Event]], Callable[[Event], Awaitable[None]]], Awaitable[None]
]

# The connection decides how a reply is framed.
_OURS = frozenset(("transfer-encoding", "connection", "keep-alive", "upgrade", "date", "server"))


def _scope(request: Request) -> dict[str, Any]:
    raw_path = request.path.encode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": request.version,
        "method": "HEAD" if request.head_only else request.method,
        "scheme": "http",
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path,
        "query_string": request.query.encode("ascii"),
        "root_path": "",
        "headers": [(name.encode("ascii"), value.encode("latin-1")) for name, value in request.headers.items()],
        "client": request.client_address,
        "server": request.server_address,
        "state": {},
        "extensions": {},
    }


class _Exchange:
    """``receive`` and ``send`` of one request."""

    __slots__ = ("_body", "_content_type", "_headers", "_length", "_request", "_status", "complete")

    def __init__(self, request: Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body
        self._status = 0
        self._content_type = ""
        self._headers: list[tuple[str, str]] = []
        self._length = b""
        self.complete = False

    async def receive(self) -> Event:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self.complete:
            await self._request.wait_disconnected()
        return {"type": "http.disconnect"}

    async def send(self, event: Event) -> None:
        request = self._request
        if event["type"] == "http.response.start":
            self._status = event["status"]
            for raw_name, raw_value in event.get("headers", ()):
                name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
                if name.lower() == "content-type":
                    self._content_type = value
                elif name.lower() == "content-length":
                    self._length = raw_value
                elif name.lower() not in _OURS:
                    self._headers.append((name, value))
        elif event["type"] == "http.response.body":
            await self._send_body(request, event.get("body", b""), event.get("more_body", False))
        # Extensions that we do not offer are not sent by a correct application; others we leave alone.

    async def _send_body(self, request: Request, body: bytes, more: bool) -> None:
        if not self._status:
            raise RuntimeError("http.response.body before http.response.start")
        if not request.responded:
            # Quart ends every reply with an empty event; a body of the announced length needs no waiting for that.
            if not more or self._length == b"%d" % len(body):
                self.complete = True
                await request.respond(self._status, bytes(body), self._content_type, self._headers)
                return
            if not body:
                return  # nothing to send yet; what follows decides whether this is a stream
            if self._content_type:
                self._headers.append(("Content-Type", self._content_type))
            await request.start_stream(self._status, self._headers)
        if self.complete:
            return
        if body and not request.head_only:
            await request.write(bytes(body))
        if not more:
            self.complete = True
            await request.finish()


async def run_asgi(request: Request, application: ASGIApplication, state: Mapping[str, Any] | None = None) -> None:
    """Answer ``request`` by an ASGI application, which finds ``state`` in its scope under that name.

    Raises what the application raises, what ``Request.body`` raises, ClientGone.
    """
    body = await request.body()
    exchange = _Exchange(request, body)
    scope = _scope(request)
    scope["state"].update(state or {})
    await application(scope, exchange.receive, exchange.send)
