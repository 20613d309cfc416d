"""Where a remote server is (K13, K14, RB55): checked before anything connects."""

from __future__ import annotations

import pytest

from gateway.config.model import Secret, StringMap
from gateway.errors import StartFailed
from gateway.runtimes.base import Origin, Surroundings
from gateway.runtimes.remote_sse import RemoteSpec, check_url, open_remote

AROUND = Surroundings("far", {})


async def test_K13_K14_the_origin_has_real_values_and_shows_templates() -> None:
    headers = StringMap((("Authorization", Secret("Bearer ${T}", "Bearer hush")), ("X-Empty", "")))
    spec = RemoteSpec(Secret("http://${H}:9/mcp?k=1", "http://far:9/mcp?k=1"), headers, True)
    async with open_remote(spec, AROUND) as origin:
        assert origin == Origin(
            "http://far:9/mcp?k=1",
            (("Authorization", "Bearer hush"), ("X-Empty", "")),
            allow_private=True,
            details={"url": "http://${H}:9/mcp?k=1"},
        )


@pytest.mark.parametrize("url", ["http://far", "https://far:443/mcp", "http://[::1]:80/x", "http://10.0.0.1/%20"])
def test_K13_good_urls(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "url must begin with http:// or https://, not 'nothing'"),
        ("far:9000/mcp", "url must begin with"),
        ("ftp://far/", "not 'ftp'"),
        ("//far/", "not 'nothing'"),
        ("http:///mcp", "url names no host"),
        ("http://far:0/", "port 0"),
        ("http://far:99999/", "url can't be read"),
        ("http://far:x/", "url can't be read"),
        ("http://[::1/", "url can't be read"),
        ("http://user:hush@far/", "user name or password"),
        ("http://far/#hush", "fragment"),
        ("http://far/#", "fragment"),
        ("http://far/a b", "percent-encoded"),
        ("http://far/\r\nX: y", "percent-encoded"),
        ("http://bücher/", "percent-encoded"),
    ],
)
async def test_K13_bad_urls_are_explained_and_never_shown(url: str, expected: str) -> None:
    with pytest.raises(StartFailed) as caught:
        async with open_remote(RemoteSpec(Secret("${URL}", url)), AROUND):
            pass
    assert expected in caught.value.message
    assert "hush" not in caught.value.message


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("a b", "x")], "'a b' is no valid HTTP header name"),
        ([("", "x")], "'' is no valid HTTP header name"),
        ([("A", "hush\r\nB: c")], "'A' has a value with a newline"),
        ([("A", "hush\0")], "'A' has a value"),
        ([("A", "hüsh")], "'A' has a value"),
        ([("A", "1"), ("a", "2")], "'a' is there twice"),
        ([("Content-Length", "1")], "'Content-Length' belongs to the connection"),
        ([("Transfer-Encoding", "chunked")], "'Transfer-Encoding' belongs to the connection"),
    ],
)
async def test_K14_bad_headers_are_named_without_their_value(headers: list[tuple[str, str]], expected: str) -> None:
    secret = StringMap(tuple((name, Secret("${X}", value)) for name, value in headers))
    with pytest.raises(StartFailed) as caught:
        async with open_remote(RemoteSpec("http://far/", secret), AROUND):
            pass
    assert expected in caught.value.message
    assert "h\u00fcsh" not in caught.value.message
    assert "hush" not in caught.value.message
