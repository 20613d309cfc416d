"""REST management behind the request edge, over real sockets; Operations are a verified stand-in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import attrs
import pytest

from gateway.admin.api import Operations, create_app
from gateway.auth.principal import Principal
from gateway.config.model import Secret, ServerSpec, StringMap, Tenant
from gateway.config.snapshot import Difference, Snapshot
from gateway.errors import ConfigError, GatewayError, Overloaded, Problem, StartFailed
from gateway.runtimes.local_process import LocalProcessSpec
from gateway.runtimes.remote_sse import RemoteSpec
from gateway.telemetry.record import ServerStatus
from tests.downstream.edge_kit import House, edge
from tests.downstream.legacy_kit import Response

TOKEN = Secret("${TOKEN}", "s3cret-token")
NOTES = ServerSpec(
    "notes",
    LocalProcessSpec("notes-mcp", ("--stdio", Secret("--key=${TOKEN}", "--key=s3cret-token"))),
    "local-process",
    display_name="Notes",
    description="What was said",
    env=StringMap((("MODE", "fast"), ("TOKEN", TOKEN))),
    tags=("a", "b"),
)
FAR = ServerSpec(
    "far",
    RemoteSpec(
        Secret("https://far.example/${TOKEN}", "https://far.example/s3cret-token"),
        StringMap((("Authorization", TOKEN), ("X-Plain", "yes"))),
    ),
    "remote-sse",
    tags=("b",),
    namespace="red",
    isolation="session",
    request_timeout_seconds=5,
)
UP = ServerStatus(
    "running",
    request_count=7,
    error_count=2,
    started_at=1_767_225_600,
    last_activity_at=1_767_225_661.9,
    uptime_seconds=61,
    connection_count=3,
    units=2,
    details=({"pid": 4},),
)
FAILING = ServerStatus("unhealthy", last_error="no such file", failures=5, retry_at=1_767_225_630.0, error_count=5)


class FakeOperations:
    """Honours ``admin.api.Operations``."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.states: dict[str, ServerStatus] = {}
        self.did: list[tuple[str, ...]] = []
        self.error: GatewayError | None = None
        self.uptime = 12.9

    @property
    def snapshot(self) -> Snapshot:
        return self.house.snapshot

    def visible(self, principal: Principal) -> Sequence[ServerSpec]:
        return self.house.router.visible(principal, self.house.snapshot)

    def status(self, server_id: str) -> ServerStatus:
        return self.states.get(server_id, ServerStatus())

    async def instances(self, server_id: str) -> Sequence[Mapping[str, Any]]:
        return self.status(server_id).details

    async def start(self, server_id: str, principal: Principal) -> bool:
        self._do("start", server_id, principal.subject)
        return self.status(server_id).status == "running"

    async def stop(self, server_id: str) -> bool:
        self._do("stop", server_id)
        return self.status(server_id).status == "stopped"

    async def restart(self, server_id: str, principal: Principal) -> None:
        self._do("restart", server_id, principal.subject)

    async def reload(self) -> tuple[Difference, int]:
        self._do("reload")
        return Difference(("a",), ("b", "c"), ("d",), ("e", "f", "g")), 5

    def _do(self, *what: str) -> None:
        self.did.append(what)
        if self.error is not None:
            raise self.error


@attrs.define
class Managed:
    house: House
    operations: FakeOperations

    async def ask(self, method: str, path: str, **headers: Any) -> Response:
        response = await self.house.ask(method, path, None, **headers)
        assert response.headers["content-type"] == "application/json", response.headers
        return response

    async def get(self, path: str, **headers: Any) -> Any:
        response = await self.ask("GET", path, **headers)
        assert response.status == 200, response.body
        return response.json


@asynccontextmanager
async def managed(*specs: ServerSpec, **settings: Any) -> AsyncIterator[Managed]:
    async with edge(*(specs or (NOTES, FAR)), **settings) as house:
        operations = FakeOperations(house)
        protocol: Operations = operations  # it is one, says mypy
        app = create_app(protocol)
        await app.startup()

        async def load() -> Any:
            return app

        house.load_admin = load
        yield Managed(house, operations)


def refused(response: Response, status: int, error: str, message: str) -> None:
    """The shape of H25."""
    assert (response.status, response.json) == (status, {"error": error, "message": message})


# -------------------------------------------------------------------------------------------------------- GET /servers
async def test_H3_H13_the_list_is_a_bare_array_in_catalog_order() -> None:
    async with managed() as m:
        m.operations.states = {"notes": UP}
        response = await m.ask("GET", "/servers")
    assert response.status == 200
    assert response.json == [
        {
            "id": "notes",
            "display_name": "Notes",
            "description": "What was said",
            "status": "running",
            "tags": ["a", "b"],
            "runtime_type": "local-process",
            "started_at": "2026-01-01T00:00:00Z",
            "last_activity": "2026-01-01T00:01:01Z",
            "request_count": 7,
            "uptime_seconds": 61,
            "units": 2,
        },
        {
            "id": "far",
            "display_name": "far",
            "status": "stopped",
            "tags": ["b"],
            "runtime_type": "remote-sse",
            "request_count": 0,
            "units": 0,
        },
    ]


async def test_H13_says_why_a_server_is_unhealthy_and_when_it_is_tried_again() -> None:
    async with managed() as m:
        m.operations.states = {"notes": FAILING}
        entry = (await m.get("/servers"))[0]
    found = {name: entry[name] for name in ("status", "last_error", "consecutive_failures", "retry_at")}
    assert found == {
        "status": "unhealthy",
        "last_error": "no such file",
        "consecutive_failures": 5,
        "retry_at": "2026-01-01T00:00:30Z",
    }
    assert "started_at" not in entry
    assert "uptime_seconds" not in entry


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", ["notes", "far"]),
        ("?tag=b", ["notes", "far"]),
        ("?tag=a", ["notes"]),
        ("?tag=a&tag=b", ["notes"]),
        ("?tag=A", []),
        ("?tag=", []),
        ("?tag=none", []),
        ("?other=1", ["notes", "far"]),
    ],
)
async def test_H3_K6_tags(query: str, ids: list[str]) -> None:
    async with managed() as m:
        assert [entry["id"] for entry in await m.get(f"/servers{query}")] == ids


async def test_H11_pages_are_opt_in_and_survive_a_reload() -> None:
    many = [ServerSpec(f"ü/{n}", LocalProcessSpec("x"), "local-process", tags=("odd",) * (n % 2)) for n in range(7)]
    async with managed(*many) as m:
        assert len(await m.get("/servers")) == 7
        found: list[str] = []
        path = "/servers?limit=2&tag=odd"
        while path:
            response = await m.ask("GET", path)
            found += [entry["id"] for entry in response.json]
            cursor = response.headers.get("x-next-cursor")
            path = f"/servers?limit=2&tag=odd&cursor={quote(cursor)}" if cursor else ""
        assert found == ["ü/1", "ü/3", "ü/5"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=x", "limit=1001", "limit=²", "cursor=x", "cursor=eHg="]
)
async def test_H11_a_bad_page_is_400(query: str) -> None:
    async with managed() as m:
        response = await m.ask("GET", f"/servers?{quote(query, safe='=')}")
    assert (response.status, response.json["error"]) == (400, "Bad Request")


# ----------------------------------------------------------------------------------------------------- GET /servers/ID
async def test_H4_H14_H15_detail_of_a_process() -> None:
    async with managed() as m:
        m.operations.states = {"notes": UP}
        detail = await m.get("/servers/notes")
        (entry, _) = await m.get("/servers")
    assert entry.items() <= detail.items()
    assert detail["runtime"] == {
        "type": "local-process",
        "command": "notes-mcp",
        "args": ["--stdio", "--key=${TOKEN}"],
    }
    assert detail["env"] == {"MODE": "fast", "TOKEN": "${TOKEN}"}
    assert (detail["connection_count"], detail["error_count"], detail["namespace"]) == (3, 2, "default")
    assert detail["isolation"] == "shared"
    assert detail["instances"] == [{"pid": 4}]


async def test_H14_H15_detail_of_a_remote_server_never_shows_a_secret() -> None:
    async with managed() as m:
        response = await m.ask("GET", "/servers/far")
    detail = response.json
    assert detail["runtime"]["type"] == "remote-sse"
    assert detail["runtime"]["url"] == "https://far.example/${TOKEN}"
    assert detail["runtime"]["headers"] == {"Authorization": "${TOKEN}", "X-Plain": "yes"}
    assert (detail["env"], detail["request_timeout_seconds"]) == ({}, 5)
    assert b"s3cret" not in response.body


@pytest.mark.parametrize("id", ["a/b", "a b", "ü", "100%", "%2F", "start", "x/start", "servers"])
async def test_H4_RB85_ids_are_decoded_and_slashes_in_them_stay_data(id: str) -> None:
    odd = ServerSpec(id, LocalProcessSpec("x"), "local-process")
    async with managed(odd, ServerSpec("x", LocalProcessSpec("x"), "local-process")) as m:
        path = f"/servers/{quote(id, safe='')}"
        assert (await m.get(path))["id"] == id
        assert (await m.ask("POST", f"{path}/start")).json["id"] == id
        assert m.operations.did == [("start", id, "anonymous")]
        response = await m.ask("POST", "/servers/x%2Fstart")
        refused(response, 404, "Not Found", "There is nothing at /servers/x/start")
        assert len(m.operations.did) == 1


@pytest.mark.parametrize(("method", "after"), [("GET", ""), *(("POST", f"/{a}") for a in ("start", "stop", "restart"))])
async def test_H4_H26_unknown_server(method: str, after: str) -> None:
    async with managed() as m:
        refused(await m.ask(method, f"/servers/nope{after}"), 404, "Not Found", "Server 'nope' not found")
        assert m.operations.did == []


# ------------------------------------------------------------------------------------------------ start, stop, restart
@pytest.mark.parametrize(
    ("action", "before", "status", "message"),
    [
        ("start", "stopped", "running", "Server started successfully"),
        ("start", "running", "running", "Server already running"),
        ("stop", "running", "stopped", "Server stopped successfully"),
        ("stop", "stopped", "stopped", "Server already stopped"),
        ("restart", "running", "running", "Server restarted successfully"),
        ("restart", "stopped", "running", "Server restarted successfully"),
    ],
)
async def test_H5_H6_H6b(action: str, before: str, status: str, message: str) -> None:
    async with managed() as m:
        m.operations.states = {"notes": ServerStatus(before)}
        response = await m.ask("POST", f"/servers/notes/{action}")
        assert (response.status, response.json) == (200, {"id": "notes", "status": status, "message": message})
        assert [did[:2] for did in m.operations.did] == [(action, "notes")]


@pytest.mark.parametrize("action", ["start", "restart"])
async def test_H5_H6b_a_start_that_fails(action: str) -> None:
    async with managed() as m:
        m.operations.error = StartFailed("process exited with code 1", retry_after=0.4)
        response = await m.ask("POST", f"/servers/notes/{action}")
        refused(response, 502, "Bad Gateway", "Failed to start server: process exited with code 1")
        assert response.headers["retry-after"] == "1"
        m.operations.error = Overloaded("500 servers are running (max_units)")
        response = await m.ask("POST", f"/servers/notes/{action}")
        message = "Failed to start server: 500 servers are running (max_units)"
        refused(response, 503, "Service Unavailable", message)


# ---------------------------------------------------------------------------------------------------------------- stats
async def test_H2_H17_to_H21_stats() -> None:
    async with managed() as m:
        m.operations.states = {"notes": UP}
        stats = await m.get("/stats")
    assert stats == {
        "uptime_seconds": 12,
        "total_requests": 7,
        "active_servers": 1,
        "total_servers": 2,
        "last_reload": stats["last_reload"],
        "servers": {
            "notes": {
                "status": "running",
                "request_count": 7,
                "error_count": 2,
                "uptime_seconds": 61,
                "last_activity": "2026-01-01T00:01:01Z",
            },
            "far": {"status": "stopped", "request_count": 0, "error_count": 0},
        },
    }
    assert stats["last_reload"].endswith("Z")


# --------------------------------------------------------------------------------------------------------------- reload
async def test_H9_H24_reload() -> None:
    async with managed() as m:
        assert (await m.ask("POST", "/admin/reload")).json == {
            "status": "ok",
            "message": "Catalog reloaded",
            "servers_loaded": 5,
            "servers_added": 1,
            "servers_removed": 2,
            "servers_modified": 1,
            "servers_unchanged": 3,
        }


async def test_H9_a_bad_catalog() -> None:
    async with managed() as m:
        m.operations.error = ConfigError([Problem("found a tab", "/c.yaml", 7, 3)], kind="parse")
        response = await m.ask("POST", "/admin/reload")
        message = "Failed to reload catalog: parse error at line 7: found a tab"
        refused(response, 500, "Internal Server Error", message)
        problems = [Problem("Duplicate server ID: a", "/c.yaml", 2, 1), Problem("expected bool", "/c.yaml", 4, 9)]
        m.operations.error = ConfigError(problems)
        response = await m.ask("POST", "/admin/reload")
        both = "/c.yaml:2:1: Duplicate server ID: a; /c.yaml:4:9: expected bool"
        refused(response, 500, "Internal Server Error", f"Failed to reload catalog: {both}")


# ------------------------------------------------------------------------------------------------------ who, and routes
async def test_A1_A9_everything_needs_the_key() -> None:
    async with managed(api_key="k") as m:
        for method, path in (("GET", "/servers"), ("GET", "/stats"), ("POST", "/admin/reload"), ("GET", "/nothing")):
            refused(await m.ask(method, path), 401, "Unauthorized", "API key required")
        assert m.operations.did == []
        assert (await m.ask("GET", "/stats", authorization="Bearer k")).status == 200
        refused(await m.ask("GET", "/nothing", x_api_key="k"), 404, "Not Found", "There is nothing at /nothing")


async def test_A5_tenants_see_their_own_and_change_nothing_for_all() -> None:
    async with managed(tenants=(Tenant("t", "k", ("red",)),)) as m:
        assert [entry["id"] for entry in await m.get("/servers", x_api_key="k")] == ["far"]
        stats = await m.get("/stats", x_api_key="k")
        assert (list(stats["servers"]), stats["total_servers"]) == (["far"], 1)
        hidden = await m.ask("GET", "/servers/notes", x_api_key="k")
        refused(hidden, 404, "Not Found", "Server 'notes' not found")
        assert (await m.ask("POST", "/servers/notes/stop", x_api_key="k")).status == 404
        response = await m.ask("POST", "/admin/reload", x_api_key="k")
        refused(response, 403, "Forbidden", "A tenant's key can't reload the catalog")
        assert m.operations.did == []


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/servers/",
        "//servers/notes",
        "/servers//start",
        "/servers/notes/",
        "/servers/notes/logs",
        "/static/x",
        "/a%00b",
    ],
)
async def test_H26_RB29_unknown_paths_are_json_404(path: str) -> None:
    async with managed() as m:
        response = await m.ask("GET", path)
        assert (response.status, response.json["error"]) == (404, "Not Found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/servers", "GET, HEAD, OPTIONS"),
        ("DELETE", "/servers/notes", "GET, HEAD, OPTIONS"),
        ("PUT", "/stats", "GET, HEAD, OPTIONS"),
        ("GET", "/admin/reload", "OPTIONS, POST"),
    ],
)
async def test_H26_wrong_methods_are_json_405(method: str, path: str, allow: str) -> None:
    async with managed() as m:
        response = await m.ask(method, path)
        refused(response, 405, "Method Not Allowed", f"{method} is not possible here")
        assert response.headers["allow"] == allow


async def test_RB29_a_defect_is_the_request_edges_to_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken(server_id: str) -> ServerStatus:
        raise ValueError("internal detail")

    async with managed() as m:
        m.operations.status = broken  # type: ignore[method-assign]
        response = await m.ask("GET", "/servers", x_request_id="mine")
        refused(response, 500, "Internal Server Error", "Internal error")
    (record,) = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert record.fields["request_id"] == "mine"  # type: ignore[attr-defined]


async def test_headers_of_the_edge_are_on_every_reply() -> None:
    async with managed(api_key="k") as m:
        response = await m.ask("GET", "/servers", x_api_key="k", origin="https://a.example", x_request_id="mine")
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert response.headers["x-request-id"] == "mine"
        assert "set-cookie" not in response.headers
        head = await m.house.ask("HEAD", "/servers", x_api_key="k")
        assert (head.status, int(head.headers["content-length"])) == (200, len(response.body))


def test_what_is_shown_is_json() -> None:
    """Whatever a plugin's runtime keeps in its spec."""
    from gateway.admin.api import shown

    @attrs.frozen
    class Inner:
        path: Any
        hidden: str = attrs.field(default="x", repr=False)

    value = {"a": (Inner(Secret("${A}", "s3cret")), None, 1.5, True), "b": StringMap((("k", TOKEN),))}
    expected: Mapping[str, Any] = {"a": [{"path": "${A}"}, None, 1.5, True], "b": {"k": "${TOKEN}"}}
    assert json.loads(json.dumps(shown(value))) == expected
