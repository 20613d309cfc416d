"""Two other parsers as oracles: whatever we take, h11 and httptools take too, and read the same.

The other direction does not hold. Refused here on purpose, though at least one of them takes it:

  - control characters in values (h11), NUL excepted
  - a fragment in the target; methods beyond GET HEAD POST PUT PATCH DELETE OPTIONS; HTTP/1.2 and up
  - any repetition of Content-Length, even of equal ones, and lists in it; Content-Length with Transfer-Encoding (h11)
  - a missing, empty, repeated or malformed Host in HTTP/1.1; an absolute target whose host is another one
  - bare LF, folded headers (h11); empty lines before the request line (httptools)
  - repeated Authorization, Content-Type, Origin, X-API-Key, X-Server-ID, Last-Event-ID and Mcp-*
  - Transfer-Encoding in HTTP/1.0, and any other than exactly "chunked"; Expect other than 100-continue
  - chunk extensions with spaces or quoted strings; chunk lines over 256 bytes; trailers over 4 KiB; tiny chunks
"""

from __future__ import annotations

from contextlib import suppress

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.downstream.http1 import ChunkedDecoder, Head, Refusal, parse_head

Reading = tuple[bytes, bytes, bytes, list[tuple[bytes, bytes]], bytes, bool]  # method target version headers body whole


def by_us(data: bytes) -> tuple[Reading, Head] | None:
    head = Head()
    try:
        size = parse_head(data, head)
        if not size:
            return None
        rest = data[size:]
        if head.chunked:
            decoder = ChunkedDecoder(1 << 20)
            body, whole = decoder.feed(rest), decoder.done
        else:
            body = rest[: head.content_length]
            whole = len(body) == head.content_length
    except Refusal:
        return None
    if head.chunked:
        head.headers["transfer-encoding"] = "chunked"  # in any case; h11 shows it like this
    headers = sorted((name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers.items())
    return (head.method.encode(), head.target.encode(), head.version.encode(), headers, body, whole), head


def joined(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in pairs:
        name, value = name.lower(), value.strip(b" \t")
        found.setdefault(name, []).append(value.lower() if name == b"transfer-encoding" else value)
    return sorted((name, (b"; " if name == b"cookie" else b", ").join(values)) for name, values in found.items())


def by_h11(data: bytes) -> Reading:
    """Raises h11.RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request), request
    body = b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            body += bytes(event.data)
        else:
            break
    whole = isinstance(event, h11.EndOfMessage)
    assert whole or event is h11.NEED_DATA
    return request.method, request.target, request.http_version, joined(list(request.headers)), body, whole


class Collector:
    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.whole = False
        self.in_head = True

    def on_url(self, url: bytes) -> None:
        if not self.whole:
            self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # trailers come here too
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.in_head = False

    def on_body(self, body: bytes) -> None:
        if not self.whole:
            self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


def by_httptools(data: bytes) -> tuple[Reading, bool]:
    """Its reading, and whether it gave up on the body because it believes in an upgrade."""
    collector = Collector()
    parser = httptools.HttpRequestParser(collector)
    upgraded = False
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        upgraded = True
    reading = (
        parser.get_method(),
        collector.target,
        parser.get_http_version().encode(),
        joined(collector.headers),
        collector.body,
        collector.whole,
    )
    return reading, upgraded


def agree(data: bytes) -> bool:
    """Whether we take it; fails when the oracles do not, or read it otherwise."""
    ours = by_us(data)
    if ours is None:
        return False
    reading, head = ours
    # Only one message is compared: what follows it may be anything.
    message = data
    if reading[5]:
        size = parse_head(data, Head())
        if head.chunked:
            decoder = ChunkedDecoder(1 << 20)
            decoder.feed(data[size:])
            message = data[: len(data) - len(decoder.rest)]
        else:
            message = data[: size + head.content_length]
    try:
        assert by_h11(message) == reading
        theirs, upgraded = by_httptools(message)
    except (h11.RemoteProtocolError, httptools.HttpParserError):
        # Of an unfinished body they may know sooner that it will not do; we have not taken it yet.
        assert not reading[5]
        return False
    if upgraded:
        assert theirs[:4] == reading[:4]
    else:
        assert theirs == reading
    return True


BASE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"HEAD /health?x=1 HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a/b HTTP/1.1\r\nHost: a\r\n\r\n",
    b'DELETE /a"b<>\\^`{|}~ HTTP/1.1\r\nHost: a\r\n\r\n',
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nhi",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: \x80\xff \t\r\nY:\tq\tr \r\nZ:\r\n!#$%&'*+-.^_`|~: t\r\n\r\n",
    b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nAccept: a\r\n"
    b"Accept: b\r\nCookie: a=1\r\nCookie: b\r\n\r\nhello",
    b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 007\r\n"
    b"Expect: 100-continue\r\n\r\nhello56GET / HTTP/1.1\r\n\r\n",
    b"POST /mcp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"5\r\nhello\r\n00a;x=y;z\r\n0123456789\r\n0\r\nA: b\r\n\r\nnext",
    b"PUT / HTTP/1.1\r\nhost:a\r\ntransfer-encoding:chunked\r\n\r\n1\r\na\r\n",
    b"PATCH / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
]
REFUSED = [
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET /#f HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
    b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b'POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;a="b"\r\nx\r\n0\r\n\r\n',
]


@pytest.mark.parametrize("data", BASE)
def test_RB24_the_oracles_read_what_we_take(data: bytes) -> None:
    assert agree(data)


@pytest.mark.parametrize("data", REFUSED)
def test_RB24_where_we_are_stricter(data: bytes) -> None:
    """Each is taken by an oracle. Should one of them come to refuse it, the list above is out of date."""
    assert not agree(data)
    taken = []
    for oracle in (by_h11, by_httptools):
        with suppress(h11.RemoteProtocolError, httptools.HttpParserError, AssertionError):
            taken.append(oracle(data))
    assert taken


ALPHABET = [bytes([n]) for n in range(256)]
PIECES = [
    b"\r\n",
    b"\r",
    b"\n",
    b" ",
    b"\t",
    b":",
    b"0",
    b"5",
    b"a",
    b"\x00",
    b"\x80",
    b"chunked",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n",
    b"Connection: close\r\n",
    b"HTTP/1.1",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b";x",
    b"#",
    b"?",
    b"*",
    b"//",
    b"X",
]

mutation = st.tuples(
    st.sampled_from(["insert", "replace", "delete", "repeat"]),
    st.integers(0, 10_000),
    st.one_of(st.sampled_from(PIECES), st.sampled_from(ALPHABET)),
    st.integers(1, 12),
)


def mutate(data: bytes, changes: list[tuple[str, int, bytes, int]]) -> bytes:
    for kind, where, piece, length in changes:
        at = where % (len(data) + 1)
        if kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        else:
            data = data[:at] + data[at : at + length] + data[at:]
    return data


@settings(max_examples=3000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(BASE + REFUSED), st.lists(mutation, min_size=1, max_size=4))
def test_P3_mutations_are_refused_or_read_alike(data: bytes, changes: list[tuple[str, int, bytes, int]]) -> None:
    agree(mutate(data, changes))


token = st.text("!#$%&'*+-.^_`|~09azAZ", min_size=1, max_size=8)
value = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=12)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["GET", "POST", "DELETE", "OPTIONS"]),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=20),
    st.lists(st.tuples(token.map("x-".__add__), value), max_size=6),
    st.binary(max_size=40),
    st.booleans(),
)
def test_P3_good_requests_are_taken_and_read_alike(
    method: str, path: str, headers: list[tuple[str, str]], body: bytes, chunked: bool
) -> None:
    lines = [f"{method} /{path} HTTP/1.1", "Host: a", *(f"{name}: {text}" for name, text in headers)]
    lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
    data = "\r\n".join([*lines, "", ""]).encode("latin-1")
    if chunked:
        data += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part) + b"0\r\n\r\n"
    else:
        data += body
    assert agree(data)
