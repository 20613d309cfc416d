"""Which addresses may be reached (RB55), TLS and the names of failures (RB50)."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
import trio

from gateway.errors import GatewayError, StartFailed
from gateway.runtimes.base import Origin
from gateway.upstream.connect import Terms, connect
from gateway.upstream.dial import Dialer, Target, classify, odd_literal, open_transport, permitted
from gateway.upstream.http import connect_http
from tests.fixtures.http_scripted import McpScript, Server, serve

TLS = Path(__file__).resolve().parent.parent / "fixtures" / "tls"
PUBLIC, PRIVATE, METADATA = "93.184.216.34", "10.1.2.3", "169.254.169.254"


def at(*addresses: str) -> list[tuple[int, Any]]:
    return [(socket.AF_INET6 if ":" in a else socket.AF_INET, (a, 80)) for a in addresses]


def terms() -> Terms:
    return Terms("srv", lambda message: None, lambda ask: False, {"name": "g", "version": "0"}, timeout=5.0)


async def failure_of(connecting: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        async with connecting:
            pytest.fail("connected")
    return caught.value


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        (PUBLIC, "public"),
        ("2606:2800:220:1::1", "public"),
        ("127.0.0.1", "private"),
        ("::1", "private"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("0.0.0.0", "private"),
        ("::", "private"),
        ("fc00::1", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::a00:1", "private"),
        ("64:ff9b::5db8:d822", "public"),
        ("2002:a00:1::", "private"),
        ("169.254.169.254", "special"),
        ("169.254.1.1", "special"),
        ("fe80::1", "special"),
        ("fe80::1%eth0", "special"),
        ("::ffff:169.254.169.254", "special"),
        ("64:ff9b::a9fe:a9fe", "special"),
        ("168.63.129.16", "special"),
        ("100.100.100.200", "special"),
        ("fd00:ec2::254", "special"),
        ("224.0.0.1", "special"),
        ("ff02::1", "special"),
    ],
)
def test_RB55_classes(address: str, kind: str) -> None:
    assert classify(address) == kind


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1", "0"]
)
async def test_RB55_unusual_spellings_need_true(host: str) -> None:
    assert odd_literal(host)
    for policy in ("auto", False):
        with pytest.raises(httpcore.ConnectError, match="unusual spelling"):
            permitted(host, at("127.0.0.1"), policy)
    assert permitted(host, at("127.0.0.1"), True) == at("127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.0.0.1", "localhost", "example.com", "2001:db8::1", "be.ef"])
def test_RB55_usual_spellings(host: str) -> None:
    assert not odd_literal(host)


async def test_RB55_auto_allows_private_hosts_and_pins_the_class_of_names() -> None:
    assert permitted("localhost", at("127.0.0.1"), "auto") == at("127.0.0.1")
    assert permitted("10.1.2.3", at(PRIVATE), "auto") == at(PRIVATE)
    assert permitted("intern.example", at(PRIVATE), "auto") == at(PRIVATE)
    assert permitted("intern.example", at("10.9.9.9", PUBLIC), "auto") == at("10.9.9.9")
    assert permitted("api.example", at(PUBLIC, PRIVATE), "auto") == at(PUBLIC)
    for _ in range(2):
        with pytest.raises(httpcore.ConnectError, match=r"is a private address: 'api\.example' was public"):
            permitted("api.example", at("127.0.0.1"), "auto")
    assert permitted("api.example", at("8.8.8.8"), "auto") == at("8.8.8.8")
    with pytest.raises(httpcore.ConnectError, match="was private when it was first used"):
        permitted("intern.example", at(PUBLIC), "auto")


async def test_RB55_false_allows_public_only_and_true_everything() -> None:
    assert permitted("both.example", at(PRIVATE, PUBLIC), False) == at(PUBLIC)
    for host, address in (("localhost", "127.0.0.1"), ("10.1.2.3", PRIVATE), ("x.example", PRIVATE)):
        with pytest.raises(httpcore.ConnectError, match="allow_private is false"):
            permitted(host, at(address), False)
        assert permitted(host, at(address), True) == at(address)


@pytest.mark.parametrize("host", [METADATA, "metadata.example"])
async def test_RB55_link_local_and_metadata_need_true(host: str) -> None:
    for policy in ("auto", False):
        with pytest.raises(httpcore.ConnectError, match="needs allow_private: true"):
            permitted(host, at(METADATA), policy)
    assert permitted(host, at(METADATA), True) == at(METADATA)
    assert permitted("mixed.example", at(METADATA, PUBLIC), "auto") == at(PUBLIC)


async def test_RB55_the_connection_goes_to_the_address_that_was_checked() -> None:
    answers = [at("127.0.0.1"), at("127.0.0.1"), at(PUBLIC)]
    asked: list[str] = []

    async def flipping(host: str, port: int) -> list[tuple[int, Any]]:
        asked.append(host)
        return [(family, (address[0], port)) for family, address in answers[len(asked) - 1]]

    async with serve(McpScript()) as server:
        transport = open_transport(Origin(server.url()), resolve_host=flipping)
        async with transport:
            url = f"http://flip.example:{server.port}/mcp"
            for number in (1, 2):
                request = httpx.Request("GET", url, headers={"connection": "close"})
                response = await transport.handle_async_request(request)
                await response.aclose()
                # One look-up for each connection: nothing resolves again behind the check.
                assert len(asked) == number
            assert server.seen[0].headers["host"] == f"flip.example:{server.port}"
            with pytest.raises(httpx.ConnectError, match="was private when it was first used"):
                await transport.handle_async_request(httpx.Request("GET", url))
        assert server.connections == 2


async def test_RB55_a_refused_address_is_a_clear_start_failure_and_nothing_is_sent() -> None:
    async with serve(McpScript()) as server:
        error = await failure_of(connect_http(Origin(server.url(), allow_private=False), terms()))
        assert type(error) is StartFailed
        assert "127.0.0.1 is a private address: allow_private is false" in error.message
        odd = f"http://2130706433:{server.port}/mcp"
        error = await failure_of(connect_http(Origin(odd), terms()))
        assert "unusual spelling" in error.message
        assert server.connections == 0
        async with connect_http(Origin(odd, allow_private=True), terms()) as link:
            await link.ping(5)  # type: ignore[misc]


async def test_RB50_the_next_address_is_tried_when_one_is_refused_or_silent() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.2", 0))  # bound and not listening: refused
        async with serve(McpScript()) as server:

            async def two(host: str, port: int) -> list[tuple[int, Any]]:
                return [(socket.AF_INET, ("127.0.0.2", deaf.getsockname()[1])), (socket.AF_INET, ("127.0.0.1", port))]

            stream = await Dialer("auto", two).connect_tcp("two.example", server.port)
            assert stream.get_extra_info("server_addr")[0] == "127.0.0.1"
            await stream.aclose()

            async def none(host: str, port: int) -> list[tuple[int, Any]]:
                return [(socket.AF_INET, ("127.0.0.2", deaf.getsockname()[1]))] * 2

            with pytest.raises(httpcore.ConnectError, match=r"^connection refused$"):
                await Dialer("auto", none).connect_tcp("two.example", server.port)


# ----------------------------------------------------------------------------------------------------------------- TLS
@asynccontextmanager
async def https(script: McpScript) -> AsyncIterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    async with serve(script, tls=context) as server:
        yield server


async def test_RB50_unknown_certificates_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    async with https(McpScript()) as server:
        error = await failure_of(connect_http(Origin(server.url()), terms()))
        assert "TLS certificate refused: unable to get local issuer certificate" in error.message
        assert server.seen == []


async def test_RB50_SSL_CERT_FILE_is_honoured_and_host_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))

    async def loopback(host: str, port: int) -> list[tuple[int, Any]]:
        return [(socket.AF_INET, ("127.0.0.1", port))]

    async with https(McpScript()) as server:
        async with connect_http(Origin(server.url()), terms()) as link:
            await link.ping(5)  # type: ignore[misc]
        other = f"https://other.example:{server.port}/mcp"
        error = await failure_of(connect_http(Origin(other), terms(), resolve_host=loopback))
        assert "TLS certificate refused: Hostname mismatch" in error.message

    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent.pem")
    error = await failure_of(connect_http(Origin("https://127.0.0.1:1/"), terms()))
    assert "SSL_CERT_FILE" in error.message


async def test_RB50_plain_http_where_tls_was_wanted_is_named() -> None:
    async with serve(McpScript()) as server:
        error = await failure_of(connect_http(Origin(server.url().replace("http:", "https:")), terms()))
        assert "TLS failed" in error.message


async def test_RB50_a_silent_tls_handshake_ends_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.http_link.CONNECT_LIMIT", 0.3)

    async def mute(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners: Any = await nursery.start(trio.serve_tcp, mute, 0)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(3):
            error = await failure_of(connect_http(Origin(f"https://127.0.0.1:{port}/"), terms()))
        assert "no connection within" in error.message
        nursery.cancel_scope.cancel()


# -------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("url", ["", "x", "ftp://h/x", "http://", "/mcp", "http://u:p@h/", "http://h/#f", "http://h:x/"])
def test_K13_urls_that_can_not_be_used(url: str) -> None:
    with pytest.raises(StartFailed, match="url"):
        Target.of(Origin(url), "agent")


def test_K14_headers_of_the_transport_are_ours_and_others_win_over_defaults() -> None:
    origin = Origin("http://h/x?q=secret", (("User-Agent", "mine"), ("Content-Length", "5"), ("X-A", "ü")))
    target = Target.of(origin, "agent")
    assert dict(target.headers) == {b"user-agent": b"mine", b"accept-encoding": b"identity", b"x-a": "ü".encode()}
    assert target.name == "http://h/x"


async def test_an_origin_with_its_own_transport_uses_it() -> None:
    script = McpScript(session=False)
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        message = httpx.Response(202)
        if b'"id"' in request.content:
            message = httpx.Response(200, json={"jsonrpc": "2.0", "id": len(seen), "result": script.hello()})
        return message

    origin = Origin("http://tunnel.invalid/mcp", transport=lambda: httpx.MockTransport(handle))
    async with connect(origin, terms()) as link:
        assert link.facts["serverInfo"]["name"] == "scripted"
    assert len(seen) == 2


def test_httpx_still_has_what_we_replace() -> None:
    """_Transport sets httpx's private pool, and TrioStream is httpcore's own; both are pinned exactly."""
    assert "_pool" in httpx.AsyncHTTPTransport.handle_async_request.__code__.co_names
    assert "_pool" in httpx.AsyncHTTPTransport.aclose.__code__.co_names
    from httpcore._backends.trio import TrioStream

    assert issubclass(TrioStream, httpcore.AsyncNetworkStream)
