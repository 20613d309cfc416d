"""Heads, chunked bodies and replies, byte by byte: what is read, what is refused and why."""

from __future__ import annotations

import time

import pytest

from gateway.downstream import http1
from gateway.downstream.http1 import ChunkedDecoder, Head, Refusal, parse_head


def read(data: bytes, **limits: int) -> tuple[Head, int]:
    head = Head()
    return head, parse_head(data, head, **limits)


def accepted(data: bytes) -> Head:
    head, size = read(data)
    assert size == data.index(b"\r\n\r\n") + 4
    return head


def refused(data: bytes, **limits: int) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(data, **limits)
    return caught.value


def request(*lines: bytes, first: bytes = b"POST /mcp HTTP/1.1", host: bytes | None = b"localhost") -> bytes:
    head = [first] + ([b"Host: " + host] if host is not None else []) + list(lines)
    return b"\r\n".join(head) + b"\r\n\r\n"


def test_a_plain_head() -> None:
    data = request(b"Content-Type: application/json", b"CONTENT-length:  12 \t", b"X-Empty:") + b"{}"
    head = accepted(data)
    assert (head.method, head.target, head.path, head.query, head.version) == ("POST", "/mcp", "/mcp", "", "1.1")
    assert head.headers == {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": "12",
        "x-empty": "",
    }
    assert (head.content_length, head.chunked, head.keep_alive, head.expect_continue) == (12, False, True, False)


def test_path_and_query_stay_raw() -> None:
    head = accepted(request(first=b"GET /a%2Fb//c?x=1?&y=%20 HTTP/1.1"))
    assert (head.path, head.query) == ("/a%2Fb//c", "x=1?&y=%20")


def test_keep_alive_and_expect() -> None:
    assert accepted(request(b"Connection: keep-alive, Close")).keep_alive is False
    assert accepted(request(b"Connection: closed")).keep_alive is True
    assert accepted(request(b"Content-Length: 1", b"Expect: 100-Continue")).expect_continue is True
    assert accepted(request(b"Expect: 100-continue")).expect_continue is False, "no body, nothing to wait for"
    assert refused(request(b"Expect: 200-maybe")).status == 417


def test_RB24_http10_is_read_and_never_kept() -> None:
    head = accepted(request(b"Connection: keep-alive", first=b"GET / HTTP/1.0", host=None))
    assert (head.version, head.keep_alive) == ("1.0", False)
    assert refused(request(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0")).status == 400


@pytest.mark.parametrize(
    "data",
    [
        request(b"Content-Length: 3", b"Transfer-Encoding: chunked"),
        request(b"Content-Length: 3", b"Content-Length: 3"),
        request(b"Content-Length: 3", b"content-length: 4"),
        request(b"Content-Length: 3, 3"),
        request(b"Content-Length: +3"),
        request(b"Content-Length: -1"),
        request(b"Content-Length: 0x3"),
        request(b"Content-Length: 3_0"),
        request(b"Content-Length: \xb2"),
        request(b"Content-Length: " + b"9" * 19),
        request(b"Content-Length:"),
        request(b"Transfer-Encoding: chunked, chunked"),
        request(b"Transfer-Encoding: gzip, chunked"),
        request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        request(b"Transfer-Encoding: xchunked"),
        request(b"Transfer-Encoding: \x0bchunked"),
        request(b"Transfer-Encoding : chunked"),
        request(b"X-Folded: a", b" b"),
        request(b"X-Folded: a", b"\tb"),
        request(b" Host: other"),
        request(b"no colon here"),
        request(b": no name"),
        request(b"a b: space in name"),
        request(b"a\x00b: nul in name"),
        request(b"a\xe9b: not ascii"),
        request(b"X-A: nul \x00"),
        request(b"X-A: escape \x1b"),
        request(b"X-A: delete \x7f"),
        request(b"X-A: cr \r in value"),
        request(b"X-A: lf \n in value"),
        request(b"X-A: 1\nTransfer-Encoding: chunked"),
        request(b"X-A: 1\n\nGET /smuggled HTTP/1.1"),
        request().replace(b"\r\n", b"\n"),
        request().replace(b"\r\n", b"\r"),
        request().replace(b"HTTP/1.1\r\n", b"HTTP/1.1\n"),
        request(host=None),
        request(host=b""),
        request(b"Host: localhost"),
        request(b"hOST: other"),
        request(host=b"a b"),
        request(host=b"a/b"),
        request(host=b"a,b"),
        request(host=b"user@a"),
        request(host=b"a:80:80"),
        request(host=b"a:port"),
        request(host=b"[::1"),
        request(host=b"[zz]"),
        request(host=b"a\x80"),
        request(first=b"GET  / HTTP/1.1"),
        request(first=b"GET / HTTP/1.1 "),
        request(first=b"GET /\thttp HTTP/1.1"),
        request(first=b"GET /a b HTTP/1.1"),
        request(first=b"GET /\xc3\xa9 HTTP/1.1"),
        request(first=b"GET /#fragment HTTP/1.1"),
        request(first=b"GET * HTTP/1.1"),
        request(first=b"GET mcp HTTP/1.1"),
        request(first=b"GET localhost:80 HTTP/1.1"),
        request(first=b"GET /"),
        request(first=b"GET / http/1.1"),
        request(first=b"GET / HTTP/1.1\r\n"),
        request(first=b"\r\nGET / HTTP/1.1"),
        request(first=b"GET http://other/ HTTP/1.1"),
        request(first=b"GET http://user@localhost/ HTTP/1.1"),
        request(first=b"GET http://localhost/ HTTP/1.0", host=None),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),  # TLS
        b"\x00\x00\x0c\x04",
        b"{}",
    ],
)
def test_RB24_ambiguous_heads_get_400(data: bytes) -> None:
    refusal = refused(data)
    assert refusal.status == 400
    assert refusal.message


@pytest.mark.parametrize("name", ["Authorization", "Content-Type", "X-API-Key", "Origin", "Last-Event-ID"])
def test_RB24_what_decides_may_not_be_sent_twice(name: str) -> None:
    line = name.encode() + b": "
    assert name.lower() in refused(request(line + b"a", line.lower() + b"b")).message


def test_repeated_lists_are_joined() -> None:
    head = accepted(request(b"Accept: a", b"X-B: 1", b"accept: b, c", b"Cookie: x=1", b"Cookie: y=2"))
    assert head.headers["accept"] == "a, b, c"
    assert head.headers["cookie"] == "x=1; y=2"


def test_RB24_methods_and_versions() -> None:
    for method in (b"CONNECT", b"TRACE", b"BREW", b"get", b"M-SEARCH"):
        refusal = refused(request(first=method + b" / HTTP/1.1"))
        assert refusal.status == 405
        assert refusal.headers == (("Allow", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),)
    assert refused(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n").status == 405
    assert refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status == 405
    assert refused(request(first=b"GET / HTTP/2.0")).status == 505
    assert refused(request(first=b"GET / HTTP/1.2")).status == 505
    assert refused(request(first=b"GET / HTTP/0.9")).status == 505
    assert refused(request(b"Transfer-Encoding: gzip")).status == 501


def test_RB24_upgrades_are_not_seen() -> None:
    head = accepted(request(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: ////"))
    assert head.keep_alive is True


def test_absolute_and_asterisk_targets() -> None:
    head = accepted(request(first=b"GET http://LocalHost:80/a?b HTTP/1.1", host=b"localhost:80"))
    assert (head.path, head.query, head.target) == ("/a", "b", "http://LocalHost:80/a?b")
    assert accepted(request(first=b"GET http://localhost HTTP/1.1")).path == "/"
    assert accepted(request(first=b"OPTIONS * HTTP/1.1")).path == "*"


@pytest.mark.parametrize("host", [b"a", b"a.b-c_d:8080", b"127.0.0.1:1", b"[::1]:443", b"[fe80::1]", b"a:"])
def test_hosts_that_are_fine(host: bytes) -> None:
    if host == b"a:":
        assert refused(request(host=host)).status == 400
    else:
        assert accepted(request(host=host)).headers["host"] == host.decode()


def test_RB23_limits_of_a_head() -> None:
    def filled(size: int) -> bytes:
        return request(b"X: " + b"a" * (size - len(request(b"X: "))))

    assert len(filled(16384)) == 16384
    assert read(filled(16384))[1] == 16384
    assert refused(filled(16385)).status == 431
    assert refused(filled(60_000)).status == 431
    assert refused(b"GET /" + b"a" * 16384).status == 431, "before the line ends"
    fields = [b"X-%d: 1" % n for n in range(99)]
    assert len(accepted(request(*fields)).headers) == 100
    assert refused(request(*fields, b"One: more")).status == 431
    assert refused(request(*[b"a:"] * 4000)).status == 431
    assert refused(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 200).status == 431, "before the head ends"


def test_a_head_may_come_in_any_pieces() -> None:
    data = request(b"Content-Length: 3", b"X-Y: \xe9\t z")
    for cut in range(len(data)):
        assert read(data[:cut])[1] == 0, data[:cut]
    assert read(data)[1] == len(data)


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n ",
        b"GET / HTTP/1.1\r\nbad name: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\rb",
        b"GET\x00",
        b"GET /\x7f",
        b"GET / HTTP/1.1 X",
        b"\r",
        b"(",
    ],
)
def test_RB24_hopeless_beginnings_are_refused_at_once(start: bytes) -> None:
    assert refused(start).status == 400


def test_P3_heads_cost_linear_time() -> None:
    for data in (
        b"A" * 60_000,
        request(b"X: " + b" " * 60_000 + b"\x00"),
        request(*[b"a: b"] * 10_000, b"\x00"),
        request(b"X:" + b"a " * 30_000 + b"\x00"),
        b"GET / HTTP/1.1\r\n" + b"a" * 60_000,
    ):
        began = time.perf_counter()
        refused(data)
        assert time.perf_counter() - began < 0.05


# -- chunks


def decode(data: bytes, step: int = 0, limit: int = 1 << 20) -> tuple[bytes, ChunkedDecoder]:
    decoder = ChunkedDecoder(limit)
    step = step or len(data)
    payload = b""
    for at in range(0, len(data), step):
        assert not decoder.done
        payload += decoder.feed(data[at : at + step])
        if decoder.done:
            decoder.rest += data[at + step :]
            break
    return payload, decoder


GOOD = b"5\r\nhello\r\n6;a;b=c\r\n world\r\n00A\r\n0123456789\r\n0\r\nX-T: v\r\nY:\r\n\r\nGET /next"


@pytest.mark.parametrize("step", [*range(1, 40), len(GOOD)])
def test_chunks_in_any_pieces(step: int) -> None:
    payload, decoder = decode(GOOD, step)
    assert payload == b"hello world0123456789"
    assert decoder.done
    assert decoder.rest == b"GET /next"


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"5\nhello\n0\n\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n\r\n",
        b"5\r\nhello\r\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"-1\r\n",
        b"0x5\r\nhello\r\n",
        b"5_0\r\n",
        b"g\r\n",
        b"\r\n",
        b"5;\r\nhello\r\n",
        b'5;a="quoted"\r\nhello\r\n',
        b"5;a=\x00\r\nhello\r\n",
        b"5;" + b"a" * 300 + b"\r\nhello\r\n",
        b"5;" + b"a" * 300,
        b"1" * 17 + b"\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\n folded: 1\r\n\r\n",
        b"0\r\nA: 1\r\n b\r\n\r\n",
        b"0\r\nA: 1\n\r\n",
        b"0\r\nA: \x00\r\n\r\n",
    ],
)
def test_RB24_bad_chunks_get_400(data: bytes, step: int) -> None:
    with pytest.raises(Refusal) as caught:
        decode(data, step)
    assert caught.value.status == 400


def test_RB23_chunked_bodies_have_a_limit_too() -> None:
    assert decode(b"a\r\n0123456789\r\n0\r\n\r\n", limit=10)[1].done
    with pytest.raises(Refusal) as caught:
        decode(b"b\r\n", limit=10)  # before any of its bytes
    assert caught.value.status == 413
    with pytest.raises(Refusal) as caught:
        decode(b"5\r\n01234\r\n6\r\n", limit=10)
    assert caught.value.status == 413
    with pytest.raises(Refusal) as caught:
        decode(b"f" * 16 + b"\r\n")
    assert caught.value.status == 413
    with pytest.raises(Refusal) as caught:
        decode(b"0\r\n" + b"A: 1\r\n" * 1000)
    assert caught.value.status == 431


def test_P3_chunks_cost_linear_time() -> None:
    with pytest.raises(Refusal, match="tiny"):
        decode(b"1\r\na\r\n" * 100_000, step=65536)
    data = b"".join(b"%x\r\n%b\r\n" % (100, b"a" * 100) for _ in range(10_000)) + b"0\r\n\r\n"
    began = time.perf_counter()
    payload, decoder = decode(data, step=1000)
    assert decoder.done
    assert len(payload) == 1_000_000
    assert time.perf_counter() - began < 0.5


# -- replies


def test_a_reply() -> None:
    head, _, body = http1.reply(200, b"{}", "application/json", (("X-A", "b"),), close=True).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first == "HTTP/1.1 200 OK"
    assert lines[0] == "Content-Type: application/json"
    assert lines[1].startswith("Date: ")
    assert lines[2:] == ["X-A: b", "Connection: close", "Content-Length: 2"]
    assert body == b"{}"


def test_replies_without_a_body() -> None:
    assert b"Content-Length: 0\r\n" in http1.reply(202, b"", "application/json")
    assert b"Content-Type" not in http1.reply(202, b"", "application/json")
    assert b"Content-Length" not in http1.reply(204, b"", "application/json")
    head = http1.reply(200, b"abc", "text/plain", head_only=True)
    assert b"Content-Length: 3\r\n" in head
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\rb", "a\0b", "\u20ac"])
def test_RB85_headers_of_replies_stay_on_their_line(value: str) -> None:
    with pytest.raises(ValueError):
        http1.reply(200, b"", "", (("X-Request-ID", value),))
    with pytest.raises(ValueError):
        http1.reply(200, b"x", value)
    with pytest.raises(ValueError):
        http1.stream_head(200, ((value, "x"),), chunked=True, close=False)


def test_RB40_the_date_follows_the_clock_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1.time, "time", lambda: 784111777.5)
    assert http1.date_field() == b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    monkeypatch.setattr(http1.time, "time", lambda: 784111778.0)
    assert http1.date_field() == b"Date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"
    monkeypatch.setattr(http1.time, "time", lambda: 784111770.0)
    assert http1.date_field() == b"Date: Sun, 06 Nov 1994 08:49:30 GMT\r\n"


def test_RB29_refusals_have_one_shape() -> None:
    assert http1.error_body(431, 'say "no"\n') == (
        rb'{"error": "Request Header Fields Too Large", "message": "say \"no\"\n"}'
    )
