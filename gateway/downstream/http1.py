"""HTTP/1.1 heads and bodies, strict, without I/O (RFC 9110 and 9112).

Two rules hold for every line below.

1. What is not plainly understood is refused, never repaired (robustness.md RB24). A proxy that guesses differently
   from its neighbour is how requests are smuggled. Whatever passes here is read alike by h11 and httptools:
   tests/downstream/test_http1_differential.py keeps it so and lists where we are stricter than both.
2. Cost is linear in the bytes given. Quantifiers are possessive, so no regular expression backtracks; the caller keeps
   the bytes of an unfinished head and calls again when there are more.

Text is decoded as latin-1, so a header value holds what was on the wire, one character a byte.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Final

from gateway.errors import ClientProtocolError

__all__ = [
    "CONTINUE",
    "LAST_CHUNK",
    "ChunkedDecoder",
    "Head",
    "Refusal",
    "chunk",
    "date_field",
    "error_body",
    "fields",
    "parse_head",
    "phrase",
    "reply",
    "stream_head",
]

METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_HEAD = re.compile(
    rb"([A-Z]++) ([!-~]++) HTTP/1\.([01])\r\n((?:" + _TOKEN + rb"++:[\t -~\x80-\xff]*+\r\n)*+)\r\n",
)
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb"++) ([!-~]++) HTTP/([0-9])\.([0-9])")
_START_OF_REQUEST_LINE = re.compile(_TOKEN + rb"*+(?: [!-~]*+(?: [A-Z/.0-9]{0,8}+\r?)?)?")
_FIELD = re.compile(_TOKEN + rb"++:[\t -~\x80-\xff]*+")
_HOST = re.compile(r"(?:[A-Za-z0-9._~-]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]{1,5}+)?")
_ABSOLUTE = re.compile(r"https?://([^/?#]++)(/[^?#]*+)?(?:\?([^#]*+))?", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]{1,18}+")

# Usual names in their usual spellings: cheaper than lower(), and requests that wait share them.
_NAMES: Final = {
    spelling: name
    for name in (
        *("accept", "accept-encoding", "accept-language", "authorization", "cache-control", "connection", "cookie"),
        *("content-length", "content-type", "host", "last-event-id", "mcp-protocol-version", "mcp-session-id"),
        *("mcp-method", "mcp-name", "origin", "referer", "sec-fetch-dest", "sec-fetch-mode", "sec-fetch-site"),
        *("traceparent", "tracestate", "transfer-encoding", "user-agent", "x-forwarded-for", "x-forwarded-proto"),
        *("x-real-ip", "x-request-id", "x-server-id"),
    )
    for spelling in (name, name.title())
}

# A second one of these would be a choice between two readings; all other repeated fields are lists (RFC 9110, 5.3).
_SINGLE = frozenset(
    (
        "authorization",
        "content-length",
        "content-type",
        "expect",
        "host",
        "last-event-id",
        "origin",
        "transfer-encoding",
        "x-api-key",
        "x-server-id",
    )
)


class Refusal(ClientProtocolError):
    """A request that this parser does not take; the connection answers ``status`` with ``message`` and closes.

    ``headers`` are those that the status asks for, as Allow for 405.
    """

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message, status=status)
        self.headers = headers


class Head:
    """A request's head; every attribute is set by ``parse_head``.

    method           as sent, one of METHODS
    target           as sent
    path, query      the target's parts, raw, never decoded; query is "" when there is none
    version          "1.1" or "1.0"
    headers          by lower-case name; repeated lists are joined with ", " in the order sent
    content_length   bytes of body announced; 0 when none is, or when ``chunked``
    chunked          the body is in chunks
    keep_alive       the client will go on with this connection
    expect_continue  the client waits for 100 before it sends the body
    """

    __slots__ = (
        "chunked",
        "content_length",
        "expect_continue",
        "headers",
        "keep_alive",
        "method",
        "path",
        "query",
        "target",
        "version",
    )
    method: str
    target: str
    path: str
    query: str
    version: str
    headers: dict[str, str]
    content_length: int
    chunked: bool
    keep_alive: bool
    expect_continue: bool


def parse_head(data: bytes, head: Head, max_bytes: int = 16384, max_fields: int = 100) -> int:
    """Read the head at the start of ``data`` into ``head``; return its length, or 0 when more bytes are needed.

    Raises Refusal: 400 for what is malformed or ambiguous, 405 for unknown methods, 417, 431 over ``max_bytes`` or
    ``max_fields``, 501 for unknown codings, 505. An unfinished head is refused as soon as it can't become a good one.
    """
    match = _HEAD.match(data)
    if match is None:
        return _unfinished(data, max_bytes, max_fields)
    size = match.end()
    if size > max_bytes:
        raise _too_large(max_bytes)
    raw_method, raw_target, minor, block = match.groups()
    head.method = method = raw_method.decode("ascii")
    if method not in METHODS:
        raise _unknown_method(method)
    headers: dict[str, str] = {}
    lines = block.decode("latin-1").split("\r\n")
    lines.pop()
    if len(lines) > max_fields:
        raise _too_many(max_fields)
    for line in lines:
        name, _, value = line.partition(":")
        headers[_NAMES.get(name) or name.lower()] = value.strip(" \t")
    if len(headers) != len(lines):
        headers = _joined(lines)
    head.headers = headers
    head.target = target = raw_target.decode("ascii")
    host = headers.get("host")
    if host is not None:
        if _HOST.fullmatch(host) is None:
            raise Refusal(400, "Malformed Host header; send a name or address, and a port if needed")
    elif minor == b"1":
        raise Refusal(400, "Missing Host header; HTTP/1.1 requires one")
    if target[0] == "/" and "#" not in target:
        head.path, _, head.query = target.partition("?")
    else:
        _other_target(head, target, host)
    connection = headers.get("connection")
    if minor == b"1":
        head.version = "1.1"
        head.keep_alive = connection is None or "close" not in _list(connection)
    else:
        head.version = "1.0"
        head.keep_alive = False
    _framing(head, headers, method)
    return size


def _framing(head: Head, headers: dict[str, str], method: str) -> None:
    """How long the body is (RFC 9112, 6.3)."""
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    head.content_length = 0
    head.chunked = False
    head.expect_continue = False
    if coding is not None:
        if length is not None:
            raise Refusal(400, "Both Content-Length and Transfer-Encoding are set; send one of them")
        if head.version == "1.0":
            raise Refusal(400, "HTTP/1.0 has no Transfer-Encoding; send Content-Length")
        if coding.lower() != "chunked":
            if "chunked" in coding.lower():
                raise Refusal(400, "Transfer-Encoding must be exactly: chunked")
            raise Refusal(501, "Unknown Transfer-Encoding; send chunked or Content-Length")
        head.chunked = True
    elif length is not None:
        if _DIGITS.fullmatch(length) is None:
            raise Refusal(400, "Malformed Content-Length; send one decimal number")
        head.content_length = int(length)
    expect = headers.get("expect")
    if expect is not None and head.version != "1.0":
        if expect.lower() != "100-continue":
            raise Refusal(417, "Unknown Expect header; only 100-continue is supported")
        head.expect_continue = head.chunked or head.content_length > 0


def _list(value: str) -> list[str]:
    return [part.strip(" \t") for part in value.lower().split(",")]


def _joined(lines: Iterable[str]) -> dict[str, str]:
    """Headers where a name occurs twice: lists joined, everything else refused."""
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE or name == "mcp-session-id":
            # Others of MCP's are joined, and are then not what the body says: its own error for that tells more.
            raise Refusal(400, f"Header {name} is sent twice; send it once")
        else:
            headers[name] += ("; " if name == "cookie" else ", ") + value
    return headers


def _other_target(head: Head, target: str, host: str | None) -> None:
    """Targets that are no plain path: absolute-form when it names this host, and ``OPTIONS *``."""
    if target == "*" and head.method == "OPTIONS":
        head.path, head.query = target, ""
        return
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise Refusal(400, "Malformed request target; send a path that starts with / and has no #")
    if host is None or match[1].lower() != host.lower():
        raise Refusal(400, "The host in the request target differs from the Host header")
    head.path, head.query = match[2] or "/", match[3] or ""


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(431, f"The request's head is over {max_bytes} bytes; send fewer or shorter headers")


def _too_many(max_fields: int) -> Refusal:
    return Refusal(431, f"More than {max_fields} header fields; send fewer")


def _unknown_method(method: str) -> Refusal:
    return Refusal(405, f"Method {method[:32]} is not supported", (("Allow", ", ".join(sorted(METHODS))),))


def _unfinished(data: bytes, max_bytes: int, max_fields: int) -> int:
    """Say why ``data`` is no head: not yet (0), or never (Refusal)."""
    end = data.find(b"\r\n\r\n")
    if len(data) > max_bytes and not 0 <= end <= max_bytes - 4:
        raise _too_large(max_bytes)
    if end >= 0:
        lines = data[:end].split(b"\r\n")
        if len(lines) > max_fields + 1:
            raise _too_many(max_fields)
    else:
        *lines, last = data.split(b"\r\n")
        # The unfinished line: its end may be half a line end, and its beginning must already be possible.
        if b"\n" in last or b"\r" in last[:-1]:
            raise Refusal(400, "A line ends without CRLF; end each line of the head with CR LF")
        if not lines:
            if _START_OF_REQUEST_LINE.fullmatch(last) is None:
                raise Refusal(400, "This is no HTTP/1.1 request; speak plain HTTP/1.1 here")
            return 0
        if last[:1] in (b" ", b"\t"):
            raise Refusal(400, "Folded header line; put each header on one line")
        if len(lines) > max_fields + 1:
            raise _too_many(max_fields)
    _check_request_line(lines[0])
    for line in lines[1:]:
        _check_field(line)
    if end >= 0:
        raise Refusal(400, "Malformed request head")  # unreachable while the expressions above agree
    return 0


def _check_request_line(line: bytes) -> None:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if b"\n" in line or b"\r" in line:
            raise Refusal(400, "A line ends without CRLF; end each line of the head with CR LF")
        raise Refusal(400, "Malformed request line; send METHOD, one space, target, one space, HTTP/1.1")
    method = match[1].decode("ascii")
    if method not in METHODS:
        raise _unknown_method(method)
    if match[3] != b"1" or match[4] not in (b"0", b"1"):
        raise Refusal(505, "Only HTTP/1.1 and HTTP/1.0 are served here")


def _check_field(line: bytes) -> None:
    if _FIELD.fullmatch(line) is not None:
        return
    if line[:1] in (b" ", b"\t"):
        raise Refusal(400, "Folded header line; put each header on one line")
    if b"\n" in line or b"\r" in line:
        raise Refusal(400, "A line ends without CRLF; end each line of the head with CR LF")
    name, colon, _ = line.partition(b":")
    if not colon:
        raise Refusal(400, "Header line without a colon")
    if name.endswith((b" ", b"\t")):
        raise Refusal(400, "Space before the colon of a header")
    if not re.fullmatch(_TOKEN + rb"++", name):
        raise Refusal(400, "Malformed header name")
    raise Refusal(400, f"Control character in header {name.decode('ascii')[:64]}")


# ---------------------------------------------------------------------------------------------------------------------
# Chunked bodies (RFC 9112, 7.1)

_CHUNK_LINE = re.compile(
    # Extensions without quoted strings; their length is limited by _MAX_CHUNK_LINE.
    rb"([0-9A-Fa-f]{1,16}+)(?:;" + _TOKEN + rb"++(?:=" + _TOKEN + rb"++)?)*+\r\n"
)
_START_OF_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,16}+(?:;" + _TOKEN + rb"*+(?:=" + _TOKEN + rb"*+)?)*+\r?")
_TRAILER = re.compile(rb"(?:" + _TOKEN + rb"++:[\t -~\x80-\xff]*+\r\n)*+\r\n")
_MAX_CHUNK_LINE: Final = 256
_MAX_TRAILER: Final = 4096
_FREE_OVERHEAD: Final = 65536
_BAD_CHUNK: Final = "Malformed chunk; send its size in hexadecimal, CR LF, that many bytes, CR LF"


class ChunkedDecoder:
    """Takes the bytes of a chunked body as they come and gives its payload.

    ``done`` turns true with the last byte of the trailer; what was fed after it is in ``rest``. Trailers are checked
    and dropped. Framing may not outweigh payload by more than 64 KiB, so that four megabytes in one-byte chunks do not
    cost seconds.
    """

    __slots__ = ("_limit", "_need", "_overhead", "_payload", "_tail", "_trailer", "done", "rest")

    def __init__(self, limit: int) -> None:
        self.done = False
        self.rest = b""
        self._limit = limit
        self._need = 0  # bytes of the current chunk still to come, its CR LF included
        self._payload = 0
        self._overhead = 0
        self._tail = b""  # an unfinished line, always short
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in ``data``. Raises Refusal: 400 for bad framing, 413 as soon as ``limit`` is passed."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        parts: list[bytes] = []
        at = 0
        while not self.done:
            if self._need:
                at = self._take(data, at, parts)
                if self._need:
                    break
            at = self._trailer_end(data, at) if self._trailer else self._next_line(data, at)
            if not at:
                break
        return b"".join(parts)

    def _take(self, data: bytes, at: int, parts: list[bytes]) -> int:
        """Move on through the current chunk: payload, then exactly CR LF."""
        need = self._need
        available = len(data) - at
        if need > 2 and available:
            part = data[at : at + min(need - 2, available)]
            parts.append(part)
            at += len(part)
            need -= len(part)
        while need <= 2 and need and at < len(data):
            if data[at] != (13 if need == 2 else 10):
                raise Refusal(400, _BAD_CHUNK)
            at += 1
            need -= 1
        self._need = need
        return at

    def _next_line(self, data: bytes, at: int) -> int:
        """Read the size line at ``at``; return where its chunk begins, 0 when the line is unfinished (kept)."""
        match = _CHUNK_LINE.match(data, at)
        if match is None:
            tail = data[at:]
            if len(tail) > _MAX_CHUNK_LINE or (tail and _START_OF_CHUNK_LINE.fullmatch(tail) is None):
                raise Refusal(400, _BAD_CHUNK)
            self._tail = tail
            return 0
        end = match.end()
        if end - at > _MAX_CHUNK_LINE:
            raise Refusal(400, f"Chunk extensions over {_MAX_CHUNK_LINE} bytes")
        size = int(match[1], 16)
        if not size:
            self._trailer = True
            return end
        self._payload += size
        if self._payload > self._limit:
            raise Refusal(413, f"The body is over {self._limit} bytes")
        self._overhead += end - at + 2
        if self._overhead > self._payload + _FREE_OVERHEAD:
            raise Refusal(400, "Too many tiny chunks; send larger ones")
        self._need = size + 2
        return end

    def _trailer_end(self, data: bytes, at: int) -> int:
        match = _TRAILER.match(data, at)
        if match is not None and match.end() - at <= _MAX_TRAILER:
            self.done = True
            self.rest = data[match.end() :]
            return 0
        tail = data[at:]
        if len(tail) > _MAX_TRAILER:
            raise Refusal(431, f"The body's trailer is over {_MAX_TRAILER} bytes")
        *lines, last = tail.split(b"\r\n")
        for line in lines:
            if not line:
                raise Refusal(400, "Malformed trailer")
            _check_field(line)
        if b"\n" in last or b"\r" in last[:-1] or last[:1] in (b" ", b"\t"):
            raise Refusal(400, "Malformed trailer")
        self._tail = tail
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Replies

_PHRASES: Final = {
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    301: "Moved Permanently",
    302: "Found",
    303: "See Other",
    304: "Not Modified",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    411: "Length Required",
    413: "Payload Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    421: "Misdirected Request",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++")
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_starts: dict[tuple[int, str], bytes] = {}
_known_names: set[str] = set()
_date = b""
_date_until = 0.0


def phrase(status: int) -> str:
    """The status' words: "Not Found"; "Status" for one without a name here."""
    return _PHRASES.get(status, "Status")


def date_field() -> bytes:
    """The Date header with its line end (RFC 9110, 6.6.1), made anew once a second."""
    global _date, _date_until
    now = time.time()
    # Two bounds: a wall clock that was set back must not freeze the date (RB40).
    if not _date_until - 1.0 <= now < _date_until:
        second = int(now)
        year, month, day, hour, minute, sec, weekday, *_ = time.gmtime(second)
        text = f"Date: {_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year} {hour:02}:{minute:02}:{sec:02} GMT\r\n"
        _date = text.encode("ascii")
        _date_until = second + 1.0
    return _date


def fields(headers: Iterable[tuple[str, str]]) -> bytes:
    """Encode headers, each with its line end. Raises ValueError for what could not be one line of latin-1."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers])
    count = 0
    for name, _ in headers:
        count += 1
        if name not in _known_names:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"not a header name: {name!r}")
            if len(_known_names) < 256:
                _known_names.add(name)
    if text.count("\r") != count or text.count("\n") != count or "\0" in text:
        raise ValueError("a header value holds a line end or NUL")
    return text.encode("latin-1")


def _start(status: int, content_type: str) -> bytes:
    """Status line and Content-Type; kept, since few pairs occur."""
    start = f"HTTP/1.1 {status} {phrase(status)}\r\n".encode("ascii")
    if content_type:
        start += fields((("Content-Type", content_type),))
    if len(_starts) < 256:
        _starts[status, content_type] = start
    return start


def reply(
    status: int,
    body: bytes,
    content_type: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    close: bool = False,
    head_only: bool = False,
    length: int | None = None,
) -> bytes:
    """A whole reply. ``head_only`` leaves the body out but tells its length (HEAD); 1xx, 204 and 304 have neither.

    ``length`` is the whole body's, where ``body`` is only its beginning.
    """
    if not body:
        content_type = ""
    start = _starts.get((status, content_type)) or _start(status, content_type)
    if status in (204, 304) or status < 200:
        end = b"\r\n"
        body = b""
    else:
        end = b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
        if head_only:
            body = b""
    if headers or close:
        more = fields(headers)
        return b"".join((start, date_field(), more, b"Connection: close\r\n" if close else b"", end, body))
    return b"".join((start, date_field(), end, body))


def stream_head(status: int, headers: Iterable[tuple[str, str]], *, chunked: bool, close: bool) -> bytes:
    """The head of a reply whose length is not known; without ``chunked`` its end is the connection's."""
    start = _starts.get((status, "")) or _start(status, "")
    coding = b"Transfer-Encoding: chunked\r\n" if chunked else b""
    return b"".join((start, date_field(), fields(headers), coding, b"Connection: close\r\n\r\n" if close else b"\r\n"))


def chunk(data: bytes) -> bytes:
    """One chunk. ``data`` must not be empty: an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def error_body(status: int, message: str) -> bytes:
    """The body of every refusal (compat H25)."""
    import json

    return json.dumps({"error": phrase(status), "message": message}).encode("ascii")
