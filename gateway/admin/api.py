"""The management interface: servers, counters, reload (compat H2 to H6b, H9, H13 to H26). A Quart-Trio application.

It knows the gateway through ``Operations`` only. Who calls has been found out before: the principal stands in the ASGI
scope's ``state``. What a caller may not see does not exist for it (A5).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any, Final, Protocol
from urllib.parse import unquote

import attrs
from quart import Quart, Response, abort, request
from quart_trio import QuartTrio

from gateway.auth.principal import Principal
from gateway.config.model import Secret, ServerSpec, Shaping, StringMap, ViewSpec
from gateway.config.snapshot import Difference, Snapshot
from gateway.errors import ClientProtocolError, ConfigError, Forbidden, GatewayError, UnknownTarget
from gateway.protocol.message import dumps
from gateway.telemetry.record import ServerStatus, iso

__all__ = ["Operations", "create_app"]

MAX_PAGE: Final = 1000
SHAPED: Final = ("tools", "prompts", "resources")
"""What entries and views may shape."""


class Operations(Protocol):
    """What the management interface may do. Implemented by the composition root."""

    @property
    def snapshot(self) -> Snapshot: ...

    @property
    def uptime(self) -> float:
        """Seconds since the gateway started."""

    def visible(self, principal: Principal) -> Sequence[ServerSpec]:
        """The servers that exist for this caller, in catalog order."""

    def views(self, principal: Principal) -> Sequence[tuple[ViewSpec, str, Sequence[str], int | None]]:
        """The views that exist for this caller: view, mode, server ids, tools (None while not all are known)."""

    def status(self, server_id: str) -> ServerStatus: ...

    async def instances(self, server_id: str) -> Sequence[Mapping[str, Any]]:
        """Facts of the running instances, with what each uses now."""

    async def start(self, server_id: str, principal: Principal) -> bool:
        """Whether it was running already. Raises StartFailed."""

    async def stop(self, server_id: str) -> bool:
        """Whether it was stopped already."""

    async def restart(self, server_id: str, principal: Principal) -> None:
        """Raises StartFailed."""

    async def reload(self) -> tuple[Difference, int]:
        """Raises ConfigError."""


def shown(value: Any) -> Any:
    """A configuration value as JSON, secrets as the templates they were written as (compat H15)."""
    if isinstance(value, Secret):
        return value.template
    if isinstance(value, StringMap):
        return value.shown()
    if attrs.has(type(value)):
        return {
            field.name: shown(part)
            for field in attrs.fields(type(value))
            if (part := getattr(value, field.name)) is not None and field.repr is not False
        }
    if isinstance(value, Mapping):
        return {str(key): shown(part) for key, part in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [shown(part) for part in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def listed(spec: ServerSpec, status: ServerStatus) -> dict[str, Any]:
    """One entry of GET /servers (compat H13); absent facts are left out."""
    entry: dict[str, Any] = {
        "id": spec.id,
        "display_name": spec.name,
        "description": spec.description or None,
        "status": status.status,
        "tags": list(spec.tags),
        "runtime_type": spec.runtime_type,
        "started_at": None if status.started_at is None else iso(status.started_at),
        "last_activity": None if status.last_activity_at is None else iso(status.last_activity_at),
        "request_count": status.request_count,
        "uptime_seconds": status.uptime_seconds,
        "units": status.units,
        "last_error": status.last_error or None,
        "consecutive_failures": status.failures or None,
        "retry_at": None if status.retry_at is None else iso(status.retry_at),
        "progress": status.progress or None,
    }
    return {name: value for name, value in entry.items() if value is not None}


def detailed(spec: ServerSpec, status: ServerStatus, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """GET /servers/ID (compat H14)."""
    runtime = {"type": spec.runtime_type, **shown(spec.runtime)}
    overrides = (
        "prefix",
        "idle_timeout_seconds",
        "request_timeout_seconds",
        "start_timeout_seconds",
        "stop_grace_seconds",
        "max_connections_per_server",
        "max_units_per_server",
        "max_message_bytes",
        "health_check_interval_seconds",
    )
    return {
        **listed(spec, status),
        "runtime": runtime,
        "env": spec.env.shown(),
        "namespace": spec.namespace,
        "isolation": spec.isolation,
        "connection_count": status.connection_count,
        "error_count": status.error_count,
        "instances": [dict(details) for details in instances],
        **{name: value for name in overrides if (value := getattr(spec, name)) is not None},
        **{name: shown(value) for name in SHAPED if (value := getattr(spec, name)) != Shaping()},
    }


def listed_view(view: ViewSpec, mode: str, servers: Sequence[str], tools: int | None) -> dict[str, Any]:
    """One entry of GET /views."""
    path = f"/views/{view.name}"
    entry = {
        "name": view.name,
        "description": view.description or None,
        "mode": mode,
        "servers": list(servers),
        "tools": tools,
        "endpoints": {"mcp": f"{path}/mcp", "sse": f"{path}/sse"},
    }
    return {name: value for name, value in entry.items() if value is not None}


def create_app(operations: Operations) -> Quart:
    """The application. It keeps no state of its own and starts nothing.

    What goes wrong unforeseen passes through it, to the request edge.
    """
    app: Quart = QuartTrio("gateway.admin", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # or //servers would be redirected instead of not found
    # A start may take longer than any limit here; how long a client may take to read is the connection's business.
    app.config.update(PROPAGATE_EXCEPTIONS=True, RESPONSE_TIMEOUT=None, BODY_TIMEOUT=None)
    _serve_servers(app, operations)
    _serve_gateway(app, operations)
    _answer_faults(app)
    return app


def _principal() -> Principal:
    found = request.scope["state"]["principal"]
    assert isinstance(found, Principal)
    return found


def _serve_servers(app: Quart, operations: Operations) -> None:
    """/servers and what is below it."""

    def find(*after: str) -> ServerSpec:
        """The server that the request's path names. Raises UnknownTarget.

        The path is taken apart as it was sent, so that a slash may be part of an id as %2F (RB85). ``after`` is what
        must follow the id.
        """
        _, *parts = request.scope["raw_path"].decode("ascii").split("/")
        if (len(parts), parts[2:]) != (2 + len(after), [*after]):
            abort(404)
        server_id = unquote(parts[1], errors="replace")
        for spec in operations.visible(_principal()):
            if spec.id == server_id:
                return spec
        raise UnknownTarget(f"Server '{server_id}' not found")

    @app.get("/servers")
    async def servers() -> Any:
        tags = request.args.getlist("tag")
        found = [s for s in operations.visible(_principal()) if all(tag in s.tags for tag in tags)]
        page, headers = _page(found, request.args.get("limit"), request.args.get("cursor"))
        return [listed(spec, operations.status(spec.id)) for spec in page], 200, headers

    @app.get("/servers/<path:_id>")
    async def server(_id: str) -> Any:
        spec = find()
        instances = await operations.instances(spec.id)
        return detailed(spec, operations.status(spec.id), instances)

    @app.post("/servers/<path:_id>/start")
    async def start(_id: str) -> Any:
        spec = find("start")
        try:
            already = await operations.start(spec.id, _principal())
        except GatewayError as error:
            raise _failed_start(error) from error
        text = "Server already running" if already else "Server started successfully"
        return {"id": spec.id, "status": "running", "message": text}

    @app.post("/servers/<path:_id>/stop")
    async def stop(_id: str) -> Any:
        spec = find("stop")
        already = await operations.stop(spec.id)
        text = "Server already stopped" if already else "Server stopped successfully"
        return {"id": spec.id, "status": "stopped", "message": text}

    @app.post("/servers/<path:_id>/restart")
    async def restart(_id: str) -> Any:
        spec = find("restart")
        try:
            await operations.restart(spec.id, _principal())
        except GatewayError as error:
            raise _failed_start(error) from error
        return {"id": spec.id, "status": "running", "message": "Server restarted successfully"}


def _page(specs: list[ServerSpec], limit: str | None, cursor: str | None) -> tuple[list[ServerSpec], dict[str, str]]:
    """One page where a client asks for pages (compat H11), and the header that leads to the next one.

    A cursor names the last server of its page, so a page begins behind that one even after a reload; when it is gone
    from the catalog the client has to begin anew. Raises ClientProtocolError.
    """
    if cursor is not None:
        ids = [spec.id for spec in specs]
        try:
            specs = specs[ids.index(base64.urlsafe_b64decode(cursor.encode()).decode()) + 1 :]
        except (ValueError, binascii.Error):
            raise ClientProtocolError("cursor leads nowhere; begin again without one") from None
    if limit is None:
        return specs, {}
    if not (limit.isascii() and limit.isdigit() and 0 < int(limit[:9]) <= MAX_PAGE):
        raise ClientProtocolError(f"limit must be a number from 1 to {MAX_PAGE}")
    page = specs[: int(limit)]
    if len(page) == len(specs):
        return page, {}
    return page, {"X-Next-Cursor": base64.urlsafe_b64encode(page[-1].id.encode()).decode()}


def _serve_gateway(app: Quart, operations: Operations) -> None:
    """/views, /stats and /admin."""

    @app.get("/views")
    async def views() -> Any:
        return [listed_view(*found) for found in operations.views(_principal())]

    @app.get("/stats")
    async def stats() -> Any:
        entries = {}
        for spec in operations.visible(_principal()):
            status = operations.status(spec.id)
            entry = {
                "status": status.status,
                "request_count": status.request_count,
                "error_count": status.error_count,
                "uptime_seconds": status.uptime_seconds,
                "last_activity": None if status.last_activity_at is None else iso(status.last_activity_at),
            }
            entries[spec.id] = {name: value for name, value in entry.items() if value is not None}
        return {
            "uptime_seconds": int(operations.uptime),
            "total_requests": sum(entry["request_count"] for entry in entries.values()),
            "active_servers": sum(entry["status"] == "running" for entry in entries.values()),
            "total_servers": len(entries),
            "last_reload": iso(operations.snapshot.loaded_at),
            "servers": entries,
        }

    @app.post("/admin/reload")
    async def reload() -> Any:
        if _principal().namespaces is not None:
            raise Forbidden("A tenant's key can't reload the catalog")
        try:
            changes, count = await operations.reload()
        except ConfigError as error:
            raise GatewayError(f"Failed to reload catalog: {reload_failure(error)}") from error
        return {
            "status": "ok",
            "message": "Catalog reloaded",
            "servers_loaded": count,
            "servers_added": len(changes.added),
            "servers_removed": len(changes.removed),
            "servers_modified": len(changes.modified),
            "servers_unchanged": len(changes.unchanged),
        }


def reload_failure(error: ConfigError) -> str:
    """``parse error at line N: ...`` or every problem of a file that is YAML (compat H9)."""
    if error.kind == "parse" and error.problems and error.problems[0].line:
        first = error.problems[0]
        return f"parse error at line {first.line}: {first.text}"
    return str(error)


def _failed_start(error: GatewayError) -> GatewayError:
    if isinstance(error, UnknownTarget):
        return error
    text = f"Failed to start server: {error.message}"
    return GatewayError(text, status=error.status, retry_after=error.retry_after)


def _answer_faults(app: Quart) -> None:
    """Every fault as JSON in the shape of compat H25."""

    def body(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
        content = dumps({"error": HTTPStatus(status).phrase, "message": text})
        return Response(content, status, dict(headers or {}), content_type="application/json")

    @app.errorhandler(GatewayError)
    async def ours(error: GatewayError) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(ceil(error.retry_after))}
        return body(error.status, error.message, headers)

    # The only faults that routing has.
    @app.errorhandler(404)
    async def nothing(error: Exception) -> Response:
        return body(404, f"There is nothing at {request.path}")

    @app.errorhandler(405)
    async def wrong_method(error: Exception) -> Response:
        allowed: list[str] = sorted(getattr(error, "valid_methods", None) or [])
        return body(405, f"{request.method} is not possible here", {"Allow": ", ".join(allowed)})
