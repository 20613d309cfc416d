"""The request edge over real sockets: who may speak, as whom, about what, and how it is refused."""

from __future__ import annotations

import json
import logging
import re
import uuid
from typing import Any

import pytest
import trio

from gateway.config.model import ServerSpec, Tenant
from gateway.downstream import endpoint as endpoint_module
from gateway.downstream.endpoint import AdminGone
from gateway.downstream.server import ClientGone
from tests.downstream.edge_kit import House, edge, entry, plain_admin
from tests.downstream.legacy_kit import Response, note, rpc
from tests.scripted import Script

HELLO = rpc("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "c"}})
PATHS = ["/mcp", "/rpc", "/sse", "/sse/messages", "/servers", "/servers/echo/mcp", "/servers/echo/sse", "/nothing"]


def rest(response: Response, status: int, error: str, message: str) -> None:
    """The shape of H25."""
    assert (response.status, response.headers["content-type"]) == (status, "application/json")
    assert response.json == {"error": error, "message": message}


# ------------------------------------------------------------------------------------------------------------- health
@pytest.mark.parametrize("path", ["/health", "/healthz", "/health?x=1"])
async def test_H1_health_needs_no_key(path: str) -> None:
    async with edge(api_key="k") as house:
        response = await house.ask("GET", path)
        assert (response.status, response.json) == (200, {"status": "ok"})
        assert (await house.ask("HEAD", path)).status == 200
        response = await house.ask("POST", path)
        rest(response, 405, "Method Not Allowed", "POST is not possible here; use GET")
        assert response.headers["allow"] == "GET"


# ---------------------------------------------------------------------------------------------------------------- keys
@pytest.mark.parametrize("path", PATHS)
async def test_H33_RB80_no_key_and_a_wrong_key(path: str) -> None:
    async with edge(api_key="right") as house:
        for method in ("GET", "POST", "DELETE", "PUT"):
            response = await house.ask(method, path)
            rest(response, 401, "Unauthorized", "API key required")
            assert response.headers["www-authenticate"].startswith("Bearer ")
            rest(await house.ask(method, path, x_api_key="wrong"), 403, "Forbidden", "Invalid API key")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer right"},
        {"authorization": "bearer right"},
        {"x_api_key": "right"},
        {"authorization": "Basic eDp5", "x_api_key": "right"},
    ],
)
async def test_H34_key_headers(headers: dict[str, Any]) -> None:
    async with edge(api_key="right") as house:
        assert (await house.ask("GET", "/servers", **headers)).json["who"] == "api-key"


async def test_A1_everything_is_open_without_a_key() -> None:
    async with edge() as house:
        assert (await house.ask("GET", "/servers", x_api_key="whatever")).json["who"] == "anonymous"


async def test_RB23_RB80_the_key_is_asked_for_before_the_body() -> None:
    async with edge(api_key="k") as house:
        head = "POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
        reply = await house.raw(head.encode())
    assert reply.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in reply


async def test_G18_a_new_key_counts_at_once() -> None:
    async with edge(api_key="old") as house, house.connect() as peer:
        assert (await read(await peer.send("GET", "/servers", None, x_api_key="old"))).status == 200
        house.configure(api_key="new", max_body_bytes=10)
        assert (await read(await peer.send("GET", "/servers", None, x_api_key="old"))).status == 403
        assert (await read(await peer.send("GET", "/servers", None, x_api_key="new"))).status == 200
        body = json.dumps(HELLO).encode()
        response = await read(await peer.send("POST", "/mcp", None, body, x_api_key="new"))
        assert (response.status, response.json["error"]) == (413, "Payload Too Large")


async def read(response: Response) -> Response:
    await response.read()
    return response


async def test_refusals_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with edge(api_key="k") as house, house.connect() as peer:
        for _ in range(50):
            await read(await peer.send("GET", "/servers?api_key=s3cret", None, x_api_key="s3cret"))
    lines = [r.getMessage() for r in caplog.records if r.name == "gateway_http" and r.levelno >= logging.WARNING]
    assert len(lines) <= 2
    assert lines[0] == "GET /servers from 127.0.0.1: Invalid API key"


# ------------------------------------------------------------------------------------------------------ Host and Origin
@pytest.mark.parametrize(
    ("host", "settings", "passes"),
    [
        ("localhost", {}, True),
        ("LOCALHOST:4444", {}, True),
        ("127.0.0.1:9", {}, True),
        ("192.168.7.7", {}, True),
        ("[::1]", {}, True),
        ("[2001:db8::1]:80", {}, True),
        ("evil.example", {}, False),
        ("localhost.evil.example", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("gw.example:4444", {"listen_addr": "gw.example:4444"}, True),
        ("other.example:4444", {"listen_addr": "gw.example:4444"}, False),
        ("anything.example", {"api_key": "k"}, True),
        ("anything.example", {"tenants": (Tenant("a", "k"),)}, True),
        ("gw.example", {"allowed_hosts": ("gw.example",)}, True),
        ("GW.example:99", {"allowed_hosts": ("gw.example",)}, True),
        ("gw.example:99", {"allowed_hosts": ("gw.example:80",)}, False),
        ("gw.example:80", {"allowed_hosts": ("gw.example:80",)}, True),
        ("localhost", {"allowed_hosts": ("gw.example",)}, False),
        ("anything.example", {"allowed_hosts": ("gw.example",), "api_key": "k"}, False),
        ("localhost", {"allowed_hosts": ()}, False),
    ],
)
async def test_G20_RB25_hosts(host: str, settings: dict[str, Any], passes: bool) -> None:
    async with edge(**settings) as house:
        for path in ("/health", "/servers"):
            response = await house.ask("GET", path, host=host, x_api_key="k")
            assert response.status == (200 if passes else 403)
            if not passes:
                assert response.json["error"] == "Forbidden"
                assert "allowed_hosts" in response.json["message"]


async def test_G20_http_1_0_may_leave_the_host_out() -> None:
    async with edge() as house:
        assert (await house.raw(b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


LISTED = {"cors_origins": ("https://app.example", "http://tool.example:8080/")}


@pytest.mark.parametrize(
    ("origin", "settings", "passes"),
    [
        ("http://localhost", {}, True),
        ("http://localhost:5173", {}, True),
        ("https://127.0.0.1:1", {}, True),
        ("http://[::1]:3000", {}, True),
        ("http://evil.example", {}, False),
        ("http://localhost.evil.example", {}, False),
        ("http://127.0.0.1@evil.example", {}, False),
        ("null", {}, False),
        ("http://[broken", {}, False),
        ("https://evil.example", {"api_key": "k"}, True),
        ("null", {"api_key": "k"}, True),
        ("https://app.example", LISTED, True),
        ("HTTPS://App.example", LISTED, True),
        ("http://tool.example:8080", LISTED, True),
        ("http://app.example", LISTED, False),
        ("https://app.example:444", LISTED, False),
        ("https://evil.example", {**LISTED, "api_key": "k"}, False),
    ],
)
async def test_G20_RB25_H35_origins(origin: str, settings: dict[str, Any], passes: bool) -> None:
    async with edge(**settings) as house:
        response = await house.ask("GET", "/servers", origin=origin, x_api_key="k")
        preflight = await house.ask("OPTIONS", "/servers", origin=origin, access_control_request_method="POST")
    assert response.status == (200 if passes else 403)
    assert preflight.status == 204
    for reply in (response, preflight):
        assert reply.headers.get("access-control-allow-origin") == (origin if passes else None)
        assert "access-control-allow-credentials" not in reply.headers


async def test_H35_a_preflight_needs_no_key_and_echoes_what_is_asked_for() -> None:
    async with edge(api_key="k") as house:
        for path in PATHS:
            asked = {"access_control_request_method": "POST", "access_control_request_headers": "x-api-key, x-odd"}
            response = await house.ask("OPTIONS", path, origin="https://app.example", **asked)
            assert (response.status, response.body) == (204, b"")
            assert response.headers["access-control-allow-methods"] == "GET, POST, DELETE"
            assert response.headers["access-control-allow-headers"] == "x-api-key, x-odd"
            assert response.headers["access-control-max-age"] == "3600"


async def test_H35_every_reply_to_an_allowed_origin_can_be_read_errors_too() -> None:
    script = Script()
    async with edge(entry("echo", script), api_key="k") as house:
        bad = await house.mcp(b"{", x_api_key="k", origin="https://a.example")
        replies = [
            bad,
            await house.mcp({"server_id": "echo", "method": "a"}, x_api_key="k", origin="https://a.example"),
            await house.mcp({"server_id": "nope", "method": "a"}, x_api_key="k", origin="https://a.example"),
            await house.mcp({}, origin="https://a.example"),
            await house.mcp({}, origin="https://a.example", x_api_key="wrong"),
            await house.ask("PUT", "/mcp", origin="https://a.example", x_api_key="k"),
            await house.ask("GET", "/health", origin="https://a.example"),
            await house.ask("GET", "/servers", origin="https://a.example", x_api_key="k"),
        ]
    assert [r.status for r in replies] == [400, 200, 404, 401, 403, 405, 200, 200]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        assert reply.headers["access-control-expose-headers"] == "Mcp-Session-Id, X-Request-ID"
        assert reply.headers["vary"] == "Origin"


async def test_G10_no_cors_headers_when_switched_off() -> None:
    async with edge(cors_enabled=False) as house:
        for method in ("GET", "OPTIONS"):
            response = await house.ask(method, "/health", origin="http://localhost:1")
            assert response.status in (200, 204)
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_reply_without_an_origin_has_no_cors_headers() -> None:
    async with edge() as house:
        response = await house.ask("OPTIONS", "/mcp")
        assert (response.status, response.headers["allow"]) == (204, "GET, POST, DELETE, OPTIONS")
        assert not [name for name in response.headers if name.startswith("access-control")]


async def test_RB80_host_and_origin_come_before_the_key() -> None:
    async with edge(api_key="k", allowed_hosts=("gw",), cors_origins=()) as house:
        assert "allowed_hosts" in (await house.ask("GET", "/servers", host="evil")).json["message"]
        response = await house.ask("GET", "/servers", host="gw", origin="http://evil")
        assert "cors_origins" in response.json["message"]
        assert (await house.ask("GET", "/servers", host="gw")).status == 401


async def test_P8_what_is_remembered_of_hosts_origins_and_paths_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_ROUTES", 20)
    async with edge(api_key="k") as house, house.connect() as peer:
        for n in range(600):
            host, origin, path = f"h{n}.example", f"http://o{n}.example", f"/servers/s{n}/mcp"
            await read(await peer.send("GET", path, None, host=host, origin=origin, x_api_key="k"))
        await read(await peer.send("GET", f"/servers/{'x' * 1000}/mcp", None, x_api_key="k"))
        rules = house.endpoint._rules
        assert max(len(rules._known_hosts), len(rules._known_origins)) <= 256
        assert len(house.endpoint._routes) <= 20
        assert (await read(await peer.send("GET", "/health", None))).status == 200


# ------------------------------------------------------------------------------------------------------- X-Request-ID
@pytest.mark.parametrize("sent", ["abc-123", "!~" * 64, "x"])
async def test_H36_a_sane_request_id_comes_back(sent: str) -> None:
    async with edge() as house:
        assert (await house.ask("GET", "/health", x_request_id=sent)).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", [None, "", "a b", "a\tb", "x" * 129, "\u00e9".encode("latin-1").decode("latin-1")])
async def test_H36_otherwise_there_is_a_new_one(sent: str | None) -> None:
    async with edge() as house, house.connect() as peer:
        ids = []
        for _ in range(3):
            line = b"" if sent is None else b"X-Request-ID: " + sent.encode("latin-1") + b"\r\n"
            await peer.stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n")
            found = None
            while found is None:
                peer.buffer += await peer.more()
                found = re.search(rb"X-Request-ID: (\S*)\r\n.*ok", peer.buffer, re.DOTALL)
            peer.buffer = b""
            ids.append(uuid.UUID(found[1].decode()))
    assert len(set(ids)) == 3
    assert {i.version for i in ids} == {4}
    assert {i.variant for i in ids} == {uuid.RFC_4122}


async def test_H36_errors_carry_it_too() -> None:
    async with edge(api_key="k") as house:
        for method, path in (("GET", "/servers"), ("OPTIONS", "/mcp"), ("POST", "/health")):
            assert (await house.ask(method, path, x_request_id="mine")).headers["x-request-id"] == "mine"


# -------------------------------------------------------------------------------------------------------------- routes
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/mcp", "GET, POST, DELETE"),
        ("PATCH", "/servers/echo/mcp", "GET, POST, DELETE"),
        ("GET", "/rpc", "POST"),
        ("POST", "/sse", "GET"),
        ("DELETE", "/servers/echo/sse", "GET"),
        ("GET", "/servers/echo/sse/messages", "POST"),
    ],
)
async def test_H26_wrong_methods(method: str, path: str, allow: str) -> None:
    async with edge() as house:
        response = await house.ask(method, path)
        rest(response, 405, "Method Not Allowed", f"{method} is not possible here; use {allow}")
        assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    ("path", "server_id"),
    [
        ("/servers/a%2Fb/mcp", "a/b"),
        ("/servers/a%20b%C3%A9/mcp", "a bé"),
        ("/servers/%65cho/mcp", "echo"),
        ("/servers/100%25/mcp", "100%"),
        ("/servers/%252F/mcp", "%2F"),
        ("/servers/../mcp", ".."),
    ],
)
async def test_K1_RB85_ids_in_paths_are_decoded_once_and_slashes_in_them_stay_data(path: str, server_id: str) -> None:
    async with edge(entry(server_id, Script())) as house:
        for _ in range(2):  # found, then remembered
            response = await house.ask("POST", path, HELLO)
            assert response.json["result"]["serverInfo"]["name"] == "scripted"
        assert (await house.ask("POST", "/servers/a/b/mcp", HELLO)).json["path"] == "/servers/a/b/mcp"


@pytest.mark.parametrize(
    "path", ["/", "/servers", "/servers/", "/servers//mcp", "/servers/echo", "/mcp/", "/favicon.ico"]
)
async def test_the_rest_goes_to_the_management_application(path: str) -> None:
    async with edge(api_key="k") as house:
        response = await house.ask("POST", path, {}, x_api_key="k")
        assert response.json == {"path": path, "method": "POST", "who": "api-key"}


async def test_H27_unknown_server_in_a_path() -> None:
    async with edge() as house:
        response = await house.ask("POST", "/servers/nope/mcp", HELLO)
    assert (response.status, response.json["error"]["code"]) == (404, -32001)
    assert response.json["error"]["message"] == "Server 'nope' not found"


# ----------------------------------------------------------------------------------------------- one path, two faces
async def test_H7_a_body_without_server_id_is_mcp() -> None:
    async with edge() as house:
        response = await house.mcp(HELLO)
        assert response.status == 200
        session = response.headers["mcp-session-id"]
        assert (await house.mcp(note("notifications/initialized"), mcp_session_id=session)).status == 202
        response = await house.mcp(rpc("tools/list"), mcp_session_id=session)
        assert "result" in response.json
        assert (await house.ask("DELETE", "/mcp", mcp_session_id=session)).status == 200
        assert (await house.mcp(rpc("tools/list"), mcp_session_id=session)).status == 404


async def test_H7_server_id_means_nothing_below_the_top_or_at_a_servers_own_endpoint() -> None:
    async with edge() as house:
        response = await house.mcp({**rpc("tools/list"), "params": {"server_id": "echo"}})
        assert (response.status, response.json["error"]["code"]) == (400, -32600)
        response = await house.ask("POST", "/servers/echo/mcp", {**rpc("tools/list"), "server_id": "echo"})
        assert (response.status, response.json["error"]["code"]) == (400, -32600)


async def test_H7_a_request_that_is_neither_names_both_ways() -> None:
    async with edge() as house:
        response = await house.mcp(rpc("tools/list", id="x"))
    assert (response.status, response.json["id"], response.json["error"]["code"]) == (400, "x", -32600)
    assert "initialize" in response.json["error"]["message"]
    assert "server_id" in response.json["error"]["message"]


META = "io.modelcontextprotocol/"
MODERN_META = {META + "protocolVersion": "2026-07-28", META + "clientCapabilities": {}}


@pytest.mark.parametrize("path", ["/mcp", "/servers/echo/mcp"])
@pytest.mark.parametrize(
    ("meta", "version", "session", "era"),
    [
        (MODERN_META, "2026-07-28", None, "modern"),
        (MODERN_META, "2026-07-28", "stale", "modern"),  # an id that means nothing here
        (MODERN_META, None, None, "mismatch"),
        ({}, "2026-07-28", None, "incomplete"),
        ({}, "2025-11-25", None, "legacy"),
        ({}, None, None, "legacy"),
        ({}, "1999-01-01", None, "unsupported"),
        ({}, "1999-01-01", "stale", "no session"),
    ],
)
async def test_a_request_is_of_the_era_that_its_body_or_else_its_header_says(
    path: str, meta: Any, version: str | None, session: str | None, era: str
) -> None:
    script = Script()
    headers = {"mcp_protocol_version": version, "mcp_method": "tools/list", "mcp_session_id": session}
    async with edge(entry("echo", script)) as house:
        response = await house.ask("POST", path, rpc("tools/list", {"_meta": meta}, "x"), **headers)
    assert response.json["id"] == "x"
    if era == "modern":
        assert (response.status, response.json["result"]["resultType"]) == (200, "complete")
        return
    status, code = {
        "mismatch": (400, -32020),
        "incomplete": (400, -32602),
        "legacy": (400, -32600),
        "unsupported": (400, -32022),
        "no session": (404, -32001),
    }[era]
    assert (response.status, response.json["error"]["code"]) == (status, code)
    assert script.starts == 0
    if era == "unsupported":
        data = response.json["error"]["data"]
        assert data["requested"] == "1999-01-01"
        assert data["supported"] == ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28"]


@pytest.mark.parametrize("kind", [None, "text/plain"])
@pytest.mark.parametrize("path", ["/mcp", "/servers/echo/mcp", "/sse/messages?session_id=x"])
async def test_H7_a_wrong_content_type_is_415_for_mcp(path: str, kind: str | None) -> None:
    async with edge() as house:
        for body in (HELLO, [HELLO]):
            response = await house.ask("POST", path, body, content_type=kind)
            assert (response.status, response.json["jsonrpc"]) == (415, "2.0")


async def test_H7_mcp_needs_jsonrpc_and_an_id_that_is_not_null() -> None:
    async with edge() as house:
        response = await house.mcp({"id": 4, "method": "initialize"})
        assert (response.status, response.json["id"], response.json["error"]["code"]) == (400, 4, -32600)
        session = (await house.mcp(HELLO)).headers["mcp-session-id"]
        response = await house.mcp(rpc("tools/list", id=None), mcp_session_id=session)
        assert (response.status, response.json["error"]["code"]) == (400, -32600)


async def test_RB27_batches_only_where_the_session_has_them() -> None:
    async with edge() as house:
        for version, status in (("2025-03-26", 200), ("2025-06-18", 400)):
            hello = rpc("initialize", {**HELLO["params"], "protocolVersion": version})
            session = (await house.ask("POST", "/servers/echo/mcp", hello)).headers["mcp-session-id"]
            batch = [rpc("tools/list", id=n) for n in (1, 2)]
            response = await house.ask("POST", "/servers/echo/mcp", batch, mcp_session_id=session)
            assert response.status == status
            response = await house.ask("POST", "/servers/echo/mcp", [], mcp_session_id=session)
            assert (response.status, response.json["error"]["code"]) == (400, -32600)
            batch = [rpc("ping", id=n) for n in range(101)]
            response = await house.ask("POST", "/servers/echo/mcp", batch, mcp_session_id=session)
            assert (response.status, response.json["error"]["code"]) == (400, -32600)


async def test_RB83_a_session_belongs_to_whoever_opened_it_where_it_was_opened() -> None:
    tenants = (Tenant("a", "key-a", ("default",)), Tenant("b", "key-b", ("default",)))
    async with edge(tenants=tenants) as house:
        session = (await house.ask("POST", "/servers/echo/mcp", HELLO, x_api_key="key-a")).headers["mcp-session-id"]
        replies = []
        for path, key, id in (
            ("/servers/echo/mcp", "key-b", session),
            ("/mcp", "key-a", session),
            ("/servers/echo/mcp", "key-a", "nonsense"),
        ):
            headers = {"x_api_key": key, "mcp_session_id": id}
            replies.append(await house.ask("POST", path, rpc("tools/list"), **headers))
            replies.append(await house.ask("DELETE", path, **headers))
        assert {r.status for r in replies} == {404}
        assert {r.json["error"]["message"] for r in replies} == {replies[0].json["error"]["message"]}
        response = await house.ask(
            "POST", "/servers/echo/mcp", rpc("tools/list"), x_api_key="key-a", mcp_session_id=session
        )
        assert response.status == 200


@pytest.mark.parametrize("path", ["/sse", "/servers/echo/sse"])
async def test_H38_http_sse_has_its_paths(path: str) -> None:
    async with edge() as house, house.connect() as peer:
        stream = await peer.send("GET", path, None, accept="text/event-stream")
        first = await stream.event()
        assert first is not None
        assert first.data.startswith(f"{path}/messages?session_id=")
        assert (await house.ask("POST", first.data, HELLO)).status == 202
        second = await stream.event()
        assert second is not None
        assert second.json["result"]["protocolVersion"] == "2025-06-18"
        assert (await house.ask("POST", first.data, b"{")).json["error"]["code"] == -32700
        assert (await house.ask("POST", f"{path}/messages", HELLO)).status == 400


# --------------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("path", ["/mcp", "/rpc", "/servers", "/servers/echo/mcp"])
async def test_RB29_P3_a_defect_is_a_500_without_internals_and_logged_once(
    path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any) -> None:
        raise ValueError("internal detail")

    async with edge() as house:
        monkeypatch.setattr(house.endpoint.rpc, "call", broken)
        monkeypatch.setattr(house.endpoint.legacy, "post", broken)
        house.load_admin = broken
        body = HELLO if "servers" in path else {"server_id": "echo", "method": "a"}
        response = await house.ask("POST", path, body, x_server_id="echo", x_request_id="mine")
        rest(response, 500, "Internal Server Error", "Internal error")
        assert (await house.ask("GET", "/health")).status == 200
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.fields["request_id"] == "mine"  # type: ignore[attr-defined]
    assert record.exc_info is not None


async def test_a_defect_behind_a_begun_reply_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def torn(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("internal detail")

    async def load() -> Any:
        return torn

    async with edge() as house:
        house.load_admin = load
        reply = await house.raw(b"GET /servers HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply.endswith(b"4\r\nhalf\r\n")  # no last chunk: it looks cut
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


async def test_a_client_that_leaves_is_no_defect(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*args: Any) -> None:
        raise ClientGone

    async with edge() as house:
        monkeypatch.setattr(house.endpoint.rpc, "call", gone)
        body = b'{"server_id":"echo","method":"a"}'
        head = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        assert await house.raw(head % len(body) + body) == b""
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


async def test_body_limits_keep_the_rest_shape() -> None:
    async with edge(max_body_bytes=100) as house:
        for path in ("/mcp", "/rpc", "/servers", "/sse/messages"):
            response = await house.ask("POST", path, b"x" * 101, x_server_id="echo")
            rest(response, 413, "Payload Too Large", "The body is over 100 bytes")


# ----------------------------------------------------------------------------------------------- the lazy application
async def test_the_management_application_is_loaded_once_when_it_is_needed() -> None:
    loads = []

    async def load() -> Any:
        loads.append(1)
        await trio.sleep(0.01)
        return plain_admin

    async with edge(entry("echo", Script()), api_key="k") as house:
        house.load_admin = load
        await house.ask("GET", "/servers")
        await house.ask("GET", "/health")
        await house.mcp({"server_id": "echo", "method": "a"}, x_api_key="k")
        assert loads == []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ok, house)
    assert loads == [1]


async def ok(house: House) -> None:
    assert (await house.ask("GET", "/stats", x_api_key="k")).status == 200


async def test_A2_a_replaced_archive_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def load() -> Any:
        raise AdminGone from ImportError("bad local file header")

    async with edge() as house:
        house.load_admin = load
        for _ in range(3):
            response = await house.ask("GET", "/servers")
            rest(response, 503, "Service Unavailable", "gateway.pyz was replaced; restart the gateway")
        assert (await house.mcp({"server_id": "echo", "method": "a"})).status == 200
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 2


# ----------------------------------------------------------------------------------------------------------------- logs
async def test_O6_A10_debug_lines_tell_of_requests_and_hide_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gateway_http")
    async with edge(api_key="s3cret") as house:
        await house.ask("GET", "/health?token=s3cret", authorization="Bearer s3cret", cookie="s3cret", x_request_id="i")
    received, completed = [r for r in caplog.records if r.name == "gateway_http"]
    assert (received.getMessage(), received.levelno) == ("received request", logging.DEBUG)
    fields: dict[str, Any] = received.fields  # type: ignore[attr-defined]
    assert (fields["method"], fields["uri"], fields["version"]) == ("GET", "/health", "1.1")
    assert fields["headers"]["authorization"] == "***"
    assert "s3cret" not in repr(fields)
    assert completed.getMessage() == "request completed"
    fields = completed.fields  # type: ignore[attr-defined]
    assert (fields["path"], fields["request_id"]) == ("/health", "i")
    assert 0 <= fields["duration_ms"] < 5000


async def test_O8_nothing_is_said_of_ordinary_requests_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway_http")
    spec: ServerSpec = entry("echo", Script())
    async with edge(spec) as house:
        for _ in range(3):
            assert (await house.mcp({"server_id": "echo", "method": "a"})).status == 200
    assert [r for r in caplog.records if r.name == "gateway_http"] == []
