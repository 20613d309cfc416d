"""The request edge: who may speak, as whom, about what; and one place where faults become replies.

The order is fixed (robustness RB80): head limits (the connection's), Host and Origin, OPTIONS, key, route, body. So
without a key an unknown path is 401, and no body is read for a caller who is not known. MCP, RPC and health are
answered here; what is left goes to the Quart application, which is imported when it is first needed.

Everything a request looks up is compiled once for each Settings object (``_Rules``) or remembered by path: the edge
costs a few dictionary lookups.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from math import ceil
from random import getrandbits
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs
import trio

from gateway.auth.apikeys import ApiKeys
from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Settings, parse_listen_addr
from gateway.downstream.asgi import ASGIApplication, run_asgi
from gateway.downstream.http1 import Refusal, error_body
from gateway.downstream.http_sse import MESSAGES, SseFront
from gateway.downstream.legacy import LegacyFront
from gateway.downstream.modern import ModernFront
from gateway.downstream.rpc import RpcFront
from gateway.downstream.server import ClientGone, ConnectionLimits, Request
from gateway.errors import (
    REPLACED,
    AuthError,
    ClientProtocolError,
    Forbidden,
    GatewayError,
    Unauthenticated,
    of_archive,
)
from gateway.exchange import Target, ViewName
from gateway.protocol.eras import LEGACY_VERSIONS, MODERN_VERSIONS, is_modern
from gateway.protocol.message import INVALID_REQUEST, Malformed, Message, build_error, decode_request, split_batch
from gateway.router import Router
from gateway.telemetry.logs import Throttle, redacted_headers

__all__ = ["AdminGone", "Endpoint"]

log = logging.getLogger("gateway_http")

EXPOSED: Final = "Mcp-Session-Id, X-Request-ID"
CORS_METHODS: Final = "GET, POST, DELETE"
CORS_AGE: Final = "3600"
MODES: Final = ("list", "search")
"""What ``?mode=`` may say at a view's endpoint."""
MAX_ROUTES: Final = 4096
MAX_ROUTE: Final = 256
"""Routes that are remembered, and characters of the longest path among them."""
HEALTHY: Final = b'{"status":"ok"}'
NOT_JSON: Final = "Content-Type must be application/json"
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")


class AdminGone(Exception):
    """The management application can't be imported any more: the archive was replaced under the process."""


@attrs.frozen
class Route:
    """What a path means. ``kind`` is "health", "mcp", "rpc", "sse", "messages" or "admin"."""

    kind: str
    target: Target = None

    def target_of(self, request: Request) -> Target:
        """The endpoint's target; of a view the query may choose the mode (``?mode=search``).

        Raises ClientProtocolError for any other mode.
        """
        target = self.target
        if not request.query or type(target) is str:
            return target
        mode = dict(parse_qsl(request.query)).get("mode", "")
        if not mode:
            return target
        if mode not in MODES:
            raise ClientProtocolError(f"mode must be {' or '.join(MODES)}, not {mode[:40]!r}")
        return ViewName(target.name if type(target) is ViewName else "", mode)


class _Rules:
    """Host, Origin, CORS and keys of one Settings object."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = ApiKeys(settings)
        self.open = not self.keys.required
        host, _ = parse_listen_addr(settings.listen_addr)
        self._hosts = None if settings.allowed_hosts is None else {h.lower() for h in settings.allowed_hosts}
        self._listen = host.lower()
        self._known_hosts: dict[str, bool] = {}
        self._origins = {o.rstrip("/").lower() for o in settings.cors_origins}
        self._wildcard = "*" in settings.cors_origins and not self.open
        self._known_origins: dict[str, bool] = {}

    def host_passes(self, host: str) -> bool:
        """Whether a Host header is one of ours (compat G20, RB25). Remembered, bounded."""
        found = self._known_hosts.get(host)
        if found is None:
            found = self._judge_host(host)
            if len(self._known_hosts) < 256:
                self._known_hosts[host] = found
        return found

    def _judge_host(self, host: str) -> bool:
        name = host.lower()
        bare = name.rpartition(":")[0] if ":" in name and not name.endswith("]") else name
        if self._hosts is not None:
            return name in self._hosts or bare in self._hosts
        if not self.open:
            return True
        if bare == "localhost" or bare == self._listen:
            return True
        try:
            ipaddress.ip_address(bare.strip("[]"))
        except ValueError:
            return False
        return True

    def origin_passes(self, origin: str) -> bool:
        """Whether a present Origin may call: loopback, listed, or any where ``*`` counts (compat G20)."""
        found = self._known_origins.get(origin)
        if found is None:
            name = origin.rstrip("/").lower()
            try:
                host = urlsplit(name).hostname or ""
            except ValueError:
                host = ""
            loopback = host == "localhost" or _is_loopback(host)
            found = loopback or self._wildcard or name in self._origins
            if len(self._known_origins) < 256:
                self._known_origins[origin] = found
        return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Endpoint:
    """The application that connections serve. ``load_admin`` imports the Quart application; it raises AdminGone."""

    def __init__(self, router: Router, load_admin: Callable[[], Awaitable[ASGIApplication]]) -> None:
        self.router = router
        self.legacy = LegacyFront(router)
        self.modern = ModernFront(router)
        self.sse = SseFront(self.legacy)
        self.rpc = RpcFront(router)
        self.limits = _limits(router.snapshot.settings)
        self._load_admin = load_admin
        self._admin: ASGIApplication | None = None
        self._loading = trio.Lock()
        self._rules = _Rules(router.snapshot.settings)
        self._routes: dict[str, Route] = dict(_FIXED)
        self._noise = Throttle(log)

    def configure(self, settings: Settings) -> None:
        """Take new settings over; requests in flight keep theirs. What callers have whose key is gone, ends."""
        former, self._rules = self._rules, _Rules(settings)
        self.limits = _limits(settings)
        known = self._rules.keys.principals
        if known != former.keys.principals:
            for part in (self.legacy, self.modern, self.rpc, self.router):
                part.dismiss(known)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI lifespan: nothing to start, nothing to stop; tasks belong to the composition root."""
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    # -------------------------------------------------------------------------------------------------------- the edge
    async def handle(self, request: Request) -> None:
        """Answer one request. Only cancellation and ClientGone leave it."""
        rules = self._rules
        headers = request.headers
        request_id = headers.get("x-request-id")
        if request_id is None or not _is_sane(request_id):
            request_id = _new_id()
        request.extra_headers.append(("X-Request-ID", request_id))
        received = self._received(request, request_id) if log.isEnabledFor(logging.DEBUG) else 0.0
        try:
            host = headers.get("host")
            if host is not None and not rules.host_passes(host):
                raise Forbidden(
                    f"The Host {host[:100]!r} is not allowed; list it in allowed_hosts if this gateway is meant"
                )
            origin = headers.get("origin")
            if origin is not None:
                self._cross_origin(request, rules, origin)
                if request.method == "OPTIONS":
                    await request.respond(204)
                    return
            elif request.method == "OPTIONS":
                await request.respond(204, headers=(("Allow", "GET, POST, DELETE, OPTIONS"),))
                return
            path = request.path
            route = self._routes.get(path)
            if route is not None and route.kind == "health":
                await self._health(request)
                return
            principal = (
                ANONYMOUS
                if rules.open
                else rules.keys.authenticate(headers.get("authorization"), headers.get("x-api-key"))
            )
            if route is None:
                route = self._find(path)
            await _HANDLERS[route.kind](self, request, principal, route)
        except ClientGone:
            raise
        except GatewayError as error:
            if request.responded:
                raise
            await self._refuse(request, error)
        except Exception as error:
            if request.responded:
                raise  # a reply that was cut must look cut; the connection sees to that, and logs it
            if of_archive(error):
                await self._replaced(request)
                return
            self._failed(request, request_id, error)
            await request.respond(500, error_body(500, "Internal error"))
        finally:
            if received:
                self._completed(request, request_id, received)

    # Fields and levels of the three below are compat O6's.
    def _received(self, request: Request, request_id: str) -> float:
        fields = {
            "method": request.method,
            "uri": request.path,  # without its query, which may name a session
            "version": request.version,
            "request_id": request_id,
            "headers": redacted_headers(request.headers),
        }
        log.debug("received request", extra={"fields": fields})
        return trio.current_time()

    def _completed(self, request: Request, request_id: str, received: float) -> None:
        duration = round((trio.current_time() - received) * 1000, 3)
        fields = {"path": request.path, "duration_ms": duration, "request_id": request_id}
        log.debug("request completed", extra={"fields": fields})

    def _failed(self, request: Request, request_id: str, error: Exception) -> None:
        fields = {"method": request.method, "path": request.path, "request_id": request_id}
        log.error("Unexpected error while answering a request", exc_info=error, extra={"fields": fields})

    def _cross_origin(self, request: Request, rules: _Rules, origin: str) -> None:
        """Refuse a foreign Origin before any work, and allow the others to read the answer (H35, RB25)."""
        settings = rules.settings
        if not rules.origin_passes(origin):
            if request.method == "OPTIONS":
                return  # a preflight is always answered; without CORS headers the browser refuses
            raise Forbidden(f"The Origin {origin[:100]!r} is not allowed; list it in cors_origins if it is meant")
        if not settings.cors_enabled:
            return
        extra = request.extra_headers
        # The origin itself and never "*": an answer that depends on it must also say so to caches.
        extra.append(("Access-Control-Allow-Origin", origin))
        extra.append(("Vary", "Origin"))
        extra.append(("Access-Control-Expose-Headers", EXPOSED))
        if request.method == "OPTIONS":
            extra.append(("Access-Control-Allow-Methods", CORS_METHODS))
            asked = request.headers.get("access-control-request-headers")
            if asked:
                extra.append(("Access-Control-Allow-Headers", asked))
            extra.append(("Access-Control-Max-Age", CORS_AGE))

    async def _replaced(self, request: Request) -> None:
        """What this request needs was never loaded, and can't be any more."""
        self._noise.warning("replaced", REPLACED)
        await request.respond(503, error_body(503, REPLACED))

    async def _refuse(self, request: Request, error: GatewayError) -> None:
        """A fault in the shape of compat H25."""
        headers = list(error.headers) if isinstance(error, Refusal) else []
        if isinstance(error, Unauthenticated):
            headers.append(("WWW-Authenticate", 'Bearer realm="open-mcp-gateway"'))
        if error.retry_after:
            headers.append(("Retry-After", str(ceil(error.retry_after))))
        if isinstance(error, AuthError):
            # At most one a second of a kind: whoever has no key must not be able to fill the log.
            text = "%s %s from %s: %s"
            self._noise.warning(
                type(error).__name__, text, request.method, request.path[:200], request.client, error.message
            )
        await request.respond(error.status, error_body(error.status, error.message), headers=headers)

    # ---------------------------------------------------------------------------------------------------------- routes
    def _find(self, path: str) -> Route:
        """What a path means: /servers/ID/mcp, /views/NAME/mcp and their like are remembered, the rest is for the
        management.
        """
        parts = path.split("/")
        kind = ""
        if len(parts) >= 4 and parts[1] in ("servers", "views") and parts[2]:
            tail = "/" + "/".join(parts[3:])
            kind = {"/mcp": "mcp", "/sse": "sse", f"/sse{MESSAGES}": "messages"}.get(tail, "")
        if not kind:
            return _ADMIN
        name = unquote(parts[2], errors="replace")
        route = Route(kind, name if parts[1] == "servers" else ViewName(name))
        if len(path) <= MAX_ROUTE:
            if len(self._routes) >= MAX_ROUTES:
                self._routes = dict(_FIXED)
            self._routes[path] = route
        return route

    async def _health(self, request: Request) -> None:
        if request.method != "GET":
            raise _wrong_method(request, "GET")
        await request.respond(200, HEALTHY)

    async def _mcp(self, request: Request, principal: Principal, route: Route) -> None:
        method = request.method
        if method == "POST":
            await self._post(request, principal, route)
        elif method == "GET":
            await self.legacy.get(request, principal, route.target_of(request))
        elif method == "DELETE":
            await self.legacy.delete(request, principal, route.target_of(request))
        else:
            raise _wrong_method(request, "GET, POST, DELETE")

    async def _post(self, request: Request, principal: Principal, route: Route) -> None:
        body = await request.body()
        target = route.target_of(request)
        try:
            message = decode_request(body, need_version=False)
        except Malformed as error:
            await self._odd_body(request, principal, route, body, error)
            return
        if target is None and message.extra is not None and "server_id" in message.extra:
            if not _is_json(request):
                raise ClientProtocolError(NOT_JSON)
            await self.rpc.mcp(request, principal, message)
            return
        if not _is_json(request):
            await self._wrong_type(request, message)
            return
        if not message.versioned:
            wrong = Malformed('jsonrpc must be "2.0"', INVALID_REQUEST, message.id_text or "null")
            await self._malformed(request, wrong)
            return
        if is_modern(message.meta):
            await self.modern.post(request, principal, target, message)
            return
        version = request.headers.get("mcp-protocol-version")
        if version is not None and version not in LEGACY_VERSIONS and message.method != "initialize":
            # Which era it is can only be told by the version (protocol.md section 3, "Classifying a client"). A session
            # is legacy, whatever its client says.
            if version in MODERN_VERSIONS:
                await self.modern.post(request, principal, target, message)
                return
            if "mcp-session-id" not in request.headers:
                await self.modern.unsupported(request, message, version)
                return
        await self.legacy.post(request, principal, target, message)

    async def _odd_body(
        self, request: Request, principal: Principal, route: Route, body: bytes, error: Malformed
    ) -> None:
        """No single message: a batch, which some sessions may send, or nothing we can read."""
        if request.headers.get("mcp-protocol-version") in MODERN_VERSIONS:
            await self.modern.malformed(request, error)
            return
        try:
            batch = split_batch(body)
        except Malformed as worse:
            await self._malformed(request, worse)
            return
        if batch is None:
            await self._malformed(request, error)
        elif not _is_json(request):
            await self._wrong_type(request, None)
        else:
            await self.legacy.post(request, principal, route.target_of(request), batch)

    async def _malformed(self, request: Request, error: Malformed) -> None:
        text = build_error(error.id_text, error.code, error.reason, {"source": "gateway"})
        await request.respond(400, text.encode())

    async def _wrong_type(self, request: Request, message: Message | None) -> None:
        error = ClientProtocolError(NOT_JSON, status=415)
        await self.legacy.refuse(request, error, "", (message and message.id_text) or "null")

    async def _rpc(self, request: Request, principal: Principal, route: Route) -> None:
        if request.method != "POST":
            raise _wrong_method(request, "POST")
        if not _is_json(request):
            raise ClientProtocolError(NOT_JSON)
        await self.rpc.rpc(request, principal)

    async def _sse(self, request: Request, principal: Principal, route: Route) -> None:
        if request.method != "GET":
            raise _wrong_method(request, "GET")
        await self.sse.open(request, principal, route.target_of(request))

    async def _messages(self, request: Request, principal: Principal, route: Route) -> None:
        if request.method != "POST":
            raise _wrong_method(request, "POST")
        body = await request.body()
        if not _is_json(request):
            await self._wrong_type(request, None)
            return
        session_id = dict(parse_qsl(request.query)).get("session_id")
        message: Message | list[str]
        try:
            batch = split_batch(body)
            message = decode_request(body) if batch is None else batch
        except Malformed as error:
            await self._malformed(request, error)
            return
        await self.sse.post(request, principal, route.target_of(request), session_id, message)

    # ------------------------------------------------------------------------------------------------- the rest: Quart
    async def _manage(self, request: Request, principal: Principal, route: Route) -> None:
        if self._admin is None:
            async with self._loading:
                if self._admin is None:
                    try:
                        self._admin = await self._load_admin()
                    except AdminGone:
                        await self._replaced(request)
                        return
        await run_asgi(request, self._admin, {"principal": principal})


def _limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(max_body_bytes=settings.max_body_bytes, max_connections=settings.max_connections)


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "")
    return kind == "application/json" or kind.partition(";")[0].strip().lower() == "application/json"


def _wrong_method(request: Request, allowed: str) -> Refusal:
    return Refusal(405, f"{request.method} is not possible here; use {allowed}", (("Allow", allowed),))


def _is_sane(request_id: str) -> bool:
    """Whether a client's X-Request-ID may come back and go into logs: visible ASCII, not too much of it."""
    return 0 < len(request_id) <= 128 and request_id.isascii() and request_id.isprintable() and " " not in request_id


def _new_id() -> str:
    """A UUIDv4. It tells requests apart and nobody has to be unable to guess it, so it may be cheap."""
    text = f"{getrandbits(128) & _NO_KIND | _KIND:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


# Where RFC 9562 puts version 4 and the variant.
_NO_KIND: Final = ~(0xF << 76 | 0x3 << 62)
_KIND: Final = 0x4 << 76 | 0x2 << 62
_ADMIN: Final = Route("admin")
_FIXED: Final = {
    "/health": Route("health"),
    "/healthz": Route("health"),
    "/mcp": Route("mcp"),
    "/rpc": Route("rpc"),
    "/sse": Route("sse"),
    f"/sse{MESSAGES}": Route("messages"),
}
_HANDLERS: Final[dict[str, Callable[[Endpoint, Request, Principal, Route], Awaitable[None]]]] = {
    "mcp": Endpoint._mcp,
    "rpc": Endpoint._rpc,
    "sse": Endpoint._sse,
    "messages": Endpoint._messages,
    "admin": Endpoint._manage,
}
