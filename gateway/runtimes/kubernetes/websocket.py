"""A WebSocket to Kubernetes' API, as cheap as a pipe: attach and port-forward go through it.

``Frames`` is RFC 6455's framing from the client's side, without I/O. ``Socket`` puts it on a connection of its own,
with TLS by the ssl module right on the socket: a message out is one ``send``, a message in one wait and one ``recv``.
Nothing here waits to send. What the connection does not take at once stays in a buffer that holds one frame's rest at
most, and a task of the owner's (``Socket.flush_always``) writes it when there is room.

Our own for its price: a round trip of a small message through trio-websocket costs 227 us of CPU and through wsproto's
framing alone 36, where a whole call to a local process costs 49 (64 connections) and one to a pod may cost twice that.
These frames cost 3. wsproto is their oracle in tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from gateway.errors import StartFailed
from gateway.runtimes._keepalive import keepalive

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "BadFrame",
    "Broken",
    "Frames",
    "Socket",
    "Upgraded",
    "dial",
    "message_of",
]

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

MAX_FRAME: Final = 64 * 1024 * 1024
"""Bytes of one message. Kubernetes sends some 32 KiB at a time."""
MAX_HEAD: Final = 64 * 1024
"""Bytes of the answer to the upgrade."""
PING_AFTER: Final = 25.0
"""Seconds between two pings: load balancers cut what is silent for a minute or more."""
READ_SIZE: Final = 64 * 1024
RECORD: Final = 16 * 1024
"""Bytes of a full TLS record: a bigger read gets no more, a smaller one would leave some with OpenSSL."""
READ_LIMIT: Final = 256 * 1024
"""Bytes that are read before the caller sees them."""

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_AGAIN: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


# -------------------------------------------------------------------------------------------------------------- frames
class BadFrame(Exception):
    """The other side broke RFC 6455."""


class Frames:
    """Both directions of the framing. What comes in is given frame by frame, as (opcode, payload): a message in
    several frames is not joined, its later ones are CONTINUATION."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @staticmethod
    def encode(opcode: int, *parts: bytes | memoryview) -> bytes:
        """One whole frame, masked as a client's must be."""
        payload = b"".join(parts)
        size = len(payload)
        mask = os.urandom(4)
        if size < 126:
            head = bytes((0x80 | opcode, 0x80 | size))
        elif size < 65536:
            head = bytes((0x80 | opcode, 0xFE, size >> 8, size & 0xFF))
        else:
            head = bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big")
        if not size:
            return head + mask
        repeated = (mask * (size // 4 + 1))[:size]
        masked = int.from_bytes(payload, "little") ^ int.from_bytes(repeated, "little")
        return b"".join((head, mask, masked.to_bytes(size, "little")))

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that are complete with these bytes. Raises BadFrame."""
        buffer = self._buffer
        if buffer:
            buffer += data
            view: bytes | bytearray = buffer
        else:
            view = data
        found: list[tuple[int, bytes]] = []
        at, have = 0, len(view)
        while have - at >= 2:
            first, size = view[at], view[at + 1]
            start = at + 2
            if size >= 126:
                if size > 127:
                    raise BadFrame("a masked frame")
                start += 2 if size == 126 else 8
                if have < start:
                    break
                size = int.from_bytes(view[at + 2 : start], "big")
                if size > MAX_FRAME:
                    raise BadFrame(f"a frame of {size} bytes")
            if first & 0x70:
                raise BadFrame("a frame with an extension nobody asked for")
            if have < start + size:
                break
            at = start + size
            found.append((first & 0x0F, bytes(view[start:at])))
        if view is data:
            if at < have:
                buffer += memoryview(data)[at:]
        else:
            del buffer[:at]
        return found


# -------------------------------------------------------------------------------------------------------------- socket
class Broken(Exception):
    """The connection is over; the text says why."""


class Socket:
    """An upgraded connection. One task may be in ``receive``, one in ``wait_writable``; one is in ``flush_always``."""

    def __init__(self, sock: socket.socket, protocol: str, early: bytes) -> None:
        self.protocol = protocol
        self._sock = sock
        self._fd = sock.fileno()
        # Not SSLSocket's send and recv, which only come to the same after more checks.
        tls = isinstance(sock, ssl.SSLSocket)
        self._send: Callable[[bytes | bytearray], int] = sock.write if tls else sock.send  # type: ignore[attr-defined]
        self._recv: Callable[[int], bytes] = sock.read if tls else sock.recv  # type: ignore[attr-defined]
        self._frames = Frames()
        self._early = early
        self._out = bytearray()
        self._stuck = trio.Event()
        self._room = trio.Event()
        self.over = ""  # why it is over

    def __repr__(self) -> str:
        return f"<Socket {self.protocol}{' over: ' + self.over if self.over else ''}>"

    @property
    def full(self) -> bool:
        """Whether the connection takes nothing now."""
        return bool(self._out) and not self._flush()

    @property
    def stirred(self) -> bool:
        """Whether there is anything to receive, were it only the end."""
        if self.over or self._early:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def send_nowait(self, opcode: int, *parts: bytes | memoryview) -> None:
        """Send a whole frame, or what of it goes now. Don't when ``full``. Raises Broken."""
        frame = Frames.encode(opcode, *parts)
        sent = 0
        if not self._out and not self.over:
            with suppress(*_AGAIN):
                sent = self._write(frame)
            if sent == len(frame):
                return
        self._out += frame[sent:] if sent else frame
        if not self._flush():
            self._stuck.set()

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self._send(data)
        except _AGAIN:
            raise
        except (OSError, ValueError) as error:
            self.fail(_reason(error) if isinstance(error, OSError) else "closed")
            raise Broken(self.over) from error

    def _flush(self) -> bool:
        """Whether nothing waits any more. Raises Broken."""
        if self.over:
            raise Broken(self.over)
        out = self._out
        try:
            # A TLS write that did not fit must be tried again with the same bytes: they stay where they are.
            while out:
                del out[: self._write(out)]
        except _AGAIN:
            return False
        return True

    async def flush_always(self) -> None:
        """Write what waits whenever there is room, until the connection is over. The owner runs it as a task.

        Where nothing waits for long it sends a ping, so that nobody between takes an idle connection for a dead one.
        """
        while not self.over:
            with trio.move_on_after(PING_AFTER) as idle:
                await self._stuck.wait()
            self._stuck = trio.Event()
            try:
                if idle.cancelled_caught and not self.full:
                    self.send_nowait(PING)
                while self.full:
                    await trio.lowlevel.wait_writable(self._fd)
            except (Broken, trio.ClosedResourceError):
                return
            self._room.set()

    async def wait_writable(self) -> None:
        """Return when ``full`` may be false. Raises Broken when it is over."""
        await trio.lowlevel.checkpoint()
        while self.full:
            self._room = trio.Event()
            self._stuck.set()
            await self._room.wait()
        if self.over:
            raise Broken(self.over)

    async def receive(self) -> list[tuple[int, bytes]]:
        """The next frames, at least one. Answers pings. Always a checkpoint; cancelled, it loses nothing.

        Raises Broken at the end, whoever brought it about.
        """
        while not self.over:
            try:
                if self._early:
                    await trio.lowlevel.checkpoint()
                    data, self._early = self._early, b""
                else:
                    # OpenSSL never holds back what it has decrypted: a read asks for as much as a record can hold.
                    await trio.lowlevel.wait_readable(self._fd)
                    data = self._recv(RECORD)
                    if len(data) == RECORD:
                        data = self._more(data)
            except _AGAIN:
                continue
            except trio.ClosedResourceError:
                break
            except (OSError, ValueError) as error:
                self.fail(_reason(error) if isinstance(error, OSError) else "closed")
                break
            if not data:
                self.fail("the API closed the connection")
                break
            try:
                frames = self._frames.feed(data)
            except BadFrame as error:
                self.fail(f"the API sent {error}")
                raise Broken(self.over) from error
            for opcode, payload in frames:
                if opcode == PING and not self.full:
                    self.send_nowait(PONG, payload)
            if frames:
                return frames
        await trio.lowlevel.checkpoint()
        raise Broken(self.over)

    def _more(self, data: bytes) -> bytes:
        """A full record seldom comes alone."""
        parts, size = [data], len(data)
        try:
            while size < READ_LIMIT and len(parts[-1]) >= RECORD:
                parts.append(self._recv(RECORD))
                size += len(parts[-1])
        except (OSError, ValueError):
            pass  # nothing more now; an error comes again
        return b"".join(parts)

    def fail(self, reason: str) -> None:
        """It is over: wake everybody. The first reason stays."""
        if not self.over:
            self.over = reason
            trio.lowlevel.notify_closing(self._fd)
            self._stuck.set()
            self._room.set()

    def close(self) -> None:
        """Give the connection up at once, with a close frame where that goes without waiting."""
        if not self.over and not self._out:
            with suppress(Broken):
                self.send_nowait(CLOSE, b"\x03\xe8")
        self.fail("closed")
        self._sock.close()


# ---------------------------------------------------------------------------------------------------------------- dial
class Upgraded:
    """What came of an upgrade: a ``socket``, or the HTTP ``status`` and ``body`` of the refusal."""

    def __init__(self, socket: Socket | None, status: int, headers: dict[str, str], body: bytes) -> None:
        self.socket = socket
        self.status = status
        self.headers = headers
        self.body = body


async def dial(
    url: str,
    headers: Sequence[tuple[str, str]],
    protocols: Sequence[str],
    context: ssl.SSLContext | None,
    *,
    server_name: str | None = None,
    proxy: str | None = None,
) -> Upgraded:
    """Connect, offer a WebSocket with one of these protocols and read the answer. The caller bounds the time.

    Raises OSError, ssl.SSLError or Broken when there is no answer; leaves nothing open then.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    sock = await _connect(host, port, proxy)
    try:
        if parts.scheme == "https":
            assert context is not None
            sock = context.wrap_socket(sock, server_hostname=server_name or host, do_handshake_on_connect=False)
            await _handshake(sock)
        key = base64.b64encode(os.urandom(16))
        lines = [
            f"GET {parts.path}?{parts.query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key.decode()}",
            f"Sec-WebSocket-Protocol: {', '.join(protocols)}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        await _send_all(sock, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        status, found, rest = await _read_head(sock)
        if status != 101:
            return _refused(sock, status, found, await _read_body(sock, found, rest))
        expected = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
        chosen = found.get("sec-websocket-protocol", "")
        if found.get("sec-websocket-accept") != expected or chosen not in protocols:
            raise Broken("what answers there is no WebSocket of Kubernetes")
        return Upgraded(Socket(sock, chosen, rest), status, found, b"")
    except BaseException:
        sock.close()
        raise


def _refused(sock: socket.socket, status: int, headers: dict[str, str], body: bytes) -> Upgraded:
    sock.close()
    return Upgraded(None, status, headers, body)


async def _connect(host: str, port: int, proxy: str | None) -> socket.socket:
    if proxy is None:
        return _detached(await trio.open_tcp_stream(host, port))
    parts = urlsplit(proxy)
    if parts.scheme != "http":
        raise StartFailed(f"the proxy {parts.scheme}://{parts.hostname} can't be used: only http:// proxies can")
    sock = _detached(await trio.open_tcp_stream(parts.hostname or "", parts.port or 80))
    try:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if parts.username:
            pair = f"{parts.username}:{parts.password or ''}".encode()
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}")
        await _send_all(sock, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        status, _, _ = await _read_head(sock)
        if status != 200:
            raise Broken(f"the proxy {parts.hostname} answered CONNECT with {status}")
    except BaseException:
        sock.close()
        raise
    return sock


def _detached(stream: trio.SocketStream) -> socket.socket:
    """The socket itself, non-blocking and noticed when its peer is silently gone."""
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    for option in keepalive():
        sock.setsockopt(*option)
    return sock


async def _handshake(sock: ssl.SSLSocket) -> None:
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)


async def _send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except _AGAIN:
            await trio.lowlevel.wait_writable(sock)


async def _receive(sock: socket.socket) -> bytes:
    while True:
        try:
            return sock.recv(READ_SIZE)
        except _AGAIN:
            await trio.lowlevel.wait_readable(sock)


async def _read_head(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by small names, and the bytes after them."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await _receive(sock)
        if not more or len(data) > MAX_HEAD:
            raise Broken("the API closed the connection" if not more else "the API's answer has no end")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"HTTP/1\.[01] (\d{3})(?: .*)?", first)
    if found is None:
        raise Broken("what answers there does not speak HTTP/1.1")
    pairs = (line.partition(":") for line in lines)
    return int(found[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, rest


async def _read_body(sock: socket.socket, headers: dict[str, str], body: bytes) -> bytes:
    """Of a refusal: what its length says, else what comes within two seconds."""
    length = headers.get("content-length", "")
    size = min(int(length), MAX_HEAD) if length.isdigit() else MAX_HEAD
    with trio.move_on_after(2):
        while len(body) < size and (more := await _receive(sock)):
            body += more
    return body


def message_of(body: bytes) -> dict[str, Any]:
    """A Kubernetes Status, or an empty one."""
    # In chunks when the length was not known: the object is on a line of its own all the same.
    for each in (body, *body.split(b"\r\n")):
        try:
            found = json.loads(each)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return (os.strerror(error.errno) if error.errno else str(error)).lower()
