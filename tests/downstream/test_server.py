"""The HTTP/1.1 connection under hypercorn: real sockets, raw bytes."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
import tomllib
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel

from gateway.downstream import server as server_module
from gateway.downstream.server import (
    ClientGone,
    ConnectionLimits,
    Request,
    Server,
    ServerConnection,
    bind,
    run_asgi,
    serve,
)
from gateway.errors import ClientProtocolError, Overloaded, StartFailed

ROOT = Path(__file__).resolve().parents[2]
Handler = Callable[[Request], Awaitable[None]]
DEFAULTS = ConnectionLimits()


async def echo(request: Request) -> None:
    """What most tests serve: says what it got."""
    body = await request.body()
    seen = {"method": request.method, "target": request.target, "body": body.decode("latin-1")}
    await request.respond(200, json.dumps(seen).encode())


class App:
    """An application of one handler; its lifespan is hypercorn's to drive."""

    def __init__(self, handler: Handler, limits: ConnectionLimits) -> None:
        self.handle = handler
        self.limits = limits
        self.lifespan: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        while not self.lifespan or self.lifespan[-1] != "lifespan.shutdown":
            self.lifespan.append((await receive())["type"])
            await send({"type": self.lifespan[-1] + ".complete"})


class Serving:
    def __init__(self, app: App, server: Server, stop: trio.Event) -> None:
        self.app = app
        self.server = server
        self.stop = stop
        self.address: tuple[str, int] = server.addresses[0]

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.address)

    async def talk(self, data: bytes) -> bytes:
        """Send, half-close nothing, and read to the connection's end."""
        async with await self.connect() as stream:
            await stream.send_all(data)
            return await rest_of(stream)

    async def lives(self) -> None:
        reply = await self.talk(b"GET /alive HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n"), reply

    async def deserted(self) -> None:
        """Every connection's task has ended."""
        with trio.fail_after(5):
            while self.server.connections:
                await trio.sleep(0.005)


@asynccontextmanager
async def serving(
    handler: Handler = echo, limits: ConnectionLimits = DEFAULTS, drain_seconds: float = 5
) -> AsyncIterator[Serving]:
    app = App(handler, limits)
    stop = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[Server]) -> None:
                await serve(
                    app,
                    bind("127.0.0.1", 0),
                    shutdown_trigger=stop.wait,
                    drain_seconds=drain_seconds,
                    task_status=task_status,
                )

            yield Serving(app, await nursery.start(run), stop)
            stop.set()
    assert app.lifespan == ["lifespan.startup", "lifespan.shutdown"]


async def rest_of(stream: trio.SocketStream) -> bytes:
    """Everything up to the end; a reset is an end too."""
    data = b""
    with trio.fail_after(10):
        try:
            while more := await stream.receive_some():
                data += more
        except trio.BrokenResourceError:
            pass
    return data


async def reply_on(stream: trio.SocketStream) -> bytes:
    """One reply with a Content-Length, leaving the connection open."""
    data = b""
    with trio.fail_after(10):
        while True:
            head, end, body = data.partition(b"\r\n\r\n")
            if end and len(body) >= length_of(head):
                assert len(body) == length_of(head)
                return data
            more = await stream.receive_some()
            assert more, data
            data += more


def length_of(head: bytes) -> int:
    return next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))


def status_of(reply: bytes) -> int:
    assert reply.startswith(b"HTTP/1.1 "), reply
    return int(reply[9:12])


def is_refusal(reply: bytes, status: int) -> None:
    """RB29: every refusal is JSON in one shape, and says that the connection ends."""
    assert status_of(reply) == status, reply
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in head
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert set(json.loads(body)) == {"error", "message"}


def with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


POST = b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"


# -- requests and replies


async def test_requests_in_turn_on_one_connection() -> None:
    async with serving() as gateway, await gateway.connect() as stream:
        for _ in range(3):
            await stream.send_all(POST)
            reply = await reply_on(stream)
            assert json.loads(reply.partition(b"\r\n\r\n")[2]) == {
                "method": "POST",
                "target": "/mcp",
                "body": "hello",
            }
            assert b"Server:" not in reply
            assert b"\r\nDate: " in reply
            assert b"Connection:" not in reply


async def test_any_pieces_and_pipelines() -> None:
    data = POST + POST.replace(b"hello", b"again") + b"GET /3 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with serving() as gateway:
        for step in (1, 7, 60, len(data)):
            async with await gateway.connect() as stream:
                for at in range(0, len(data), step):
                    await stream.send_all(data[at : at + step])
                replies = (await rest_of(stream)).split(b"HTTP/1.1 200 OK\r\n")[1:]
            bodies = [json.loads(reply.partition(b"\r\n\r\n")[2]) for reply in replies]
            assert [body["body"] for body in bodies] == ["hello", "again", ""]
            assert bodies[2]["target"] == "/3"


async def test_RB24_http10_is_served_and_closed() -> None:
    async def stream_it(request: Request) -> None:
        await request.start_stream(200, [("Content-Type", "text/plain")])
        await request.write(b"all of")
        await request.write(b" it")
        await request.finish()

    async with serving() as gateway:
        reply = await gateway.talk(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in reply
        gateway.app.handle = stream_it
        reply = await gateway.talk(b"GET / HTTP/1.0\r\n\r\n")
        assert b"Transfer-Encoding" not in reply
        assert reply.endswith(b"\r\n\r\nall of it")


async def test_streams_are_chunked_and_the_connection_goes_on() -> None:
    async def stream_it(request: Request) -> None:
        request.extra_headers.append(("X-Request-ID", "r1"))
        await request.start_stream(200, [("Content-Type", "text/event-stream")])
        await request.write(b"data: 1\n\n")
        await request.write(b"")
        await request.write(b"data: 2\n\n")

    async with serving(stream_it) as gateway, await gateway.connect() as stream:
        for _ in range(2):
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += await stream.receive_some()
            head, _, body = data.partition(b"\r\n\r\n")
            assert b"Transfer-Encoding: chunked" in head
            assert b"X-Request-ID: r1" in head
            assert body == b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"


async def test_head_is_get_without_the_body() -> None:
    ended = trio.Event()

    async def stream_it(request: Request) -> None:
        await request.start_stream(200, [("Content-Type", "text/event-stream")])
        try:
            assert await request.wait()
            await request.wait_disconnected()
            await request.write(b"data: 1\n\n")
        except ClientGone:
            ended.set()
            raise

    async with serving() as gateway:
        reply = await gateway.talk(b"HEAD /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"Content-Length: 45\r\n" in reply
        assert reply.endswith(b"\r\n\r\n")
        gateway.app.handle = stream_it
        reply = await gateway.talk(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert reply.endswith(b"\r\n\r\n")
        assert ended.is_set()


async def test_large_bodies_both_ways() -> None:
    big = bytes(range(256)) * 12000

    async def mirror(request: Request) -> None:
        await request.respond(200, await request.body(), "application/octet-stream")

    async with serving(mirror) as gateway:
        for framed in (
            b"Content-Length: %d\r\n\r\n" % len(big) + big,
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(big), big),
        ):
            async with await gateway.connect() as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + framed)
                reply = await rest_of(stream)
                assert reply.partition(b"\r\n\r\n")[2] == big
        assert gateway.server.body_bytes == 0


async def test_100_continue_only_when_the_body_is_wanted() -> None:
    async def decide(request: Request) -> None:
        if request.path == "/no":
            await request.respond(401, b"{}")
        else:
            await echo(request)

    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    async with serving(decide) as gateway:
        async with await gateway.connect() as stream:
            await stream.send_all(head % b"/yes")
            assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send_all(b"hello")
            assert b'"hello"' in await rest_of(stream)
        assert status_of(await gateway.talk(head % b"/no")) == 401
        assert status_of(await gateway.talk(head % b"/yes" + b"hello")) == 200, "not waited for"


async def test_a_request_can_be_answered_only_once() -> None:
    problems: list[Exception] = []

    async def twice(request: Request) -> None:
        await request.respond(200, b"1")
        for again in (request.respond(200, b"2"), request.start_stream(200, []), request.write(b"3"), request.finish()):
            try:
                await again
            except RuntimeError as error:
                problems.append(error)

    async with serving(twice) as gateway:
        await gateway.talk(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert len(problems) == 4


# -- limits


SHORT = ConnectionLimits(header_seconds=0.8, idle_seconds=0.8, body_seconds=0.8, stall_seconds=0.8)


async def test_RB21_slow_headers_are_closed() -> None:
    async with serving(limits=SHORT) as gateway, await gateway.connect() as stream:
        began = trio.current_time()
        await stream.send_all(b"GET / HTTP/1.1\r\nHost")
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                while True:
                    await trio.sleep(0.1)
                    await stream.send_all(b"a")

            nursery.start_soon(drip)
            reply = await stream.receive_some()
            nursery.cancel_scope.cancel()
        assert 0.5 < trio.current_time() - began < 1.5
        is_refusal(reply, 408)


async def test_RB21_slow_bodies_get_408() -> None:
    for framing in (b"Content-Length: 50", b"Transfer-Encoding: chunked"):
        async with serving(limits=SHORT) as gateway, await gateway.connect() as stream:
            began = trio.current_time()
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n5\r\nhe")
            reply = await stream.receive_some()
            assert 0.5 < trio.current_time() - began < 1.5
            is_refusal(reply, 408)
            assert gateway.server.body_bytes == 0


async def test_RB21_slow_readers_are_cut_and_delay_nobody() -> None:
    gone = trio.Event()

    async def flood(request: Request) -> None:
        if request.path == "/alive":
            return await echo(request)
        try:
            await request.respond(200, bytes(30_000_000))
        except ClientGone:
            gone.set()
            raise

    async with serving(flood, SHORT) as gateway, await gateway.connect() as stream:
        began = trio.current_time()
        await stream.send_all(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        await gateway.lives()
        with trio.fail_after(5):
            await gone.wait()
        assert 0.5 < trio.current_time() - began < 2.5
        await gateway.deserted()


async def test_RB21_a_slow_reader_that_reads_is_served() -> None:
    size = 30_000_000

    async def flood(request: Request) -> None:
        await request.respond(200, bytes(size))

    async with serving(flood, SHORT) as gateway, await gateway.connect() as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = 0
        began = trio.current_time()
        while more := await stream.receive_some(1_000_000):
            got += len(more)
            if trio.current_time() - began < 1.5:
                await trio.sleep(0.3)
        assert got > size


async def test_RB21_idle_connections_are_closed_and_busy_ones_are_not() -> None:
    async def slow(request: Request) -> None:
        await trio.sleep(1.6)
        await request.respond(200, b"{}")

    async with serving(limits=SHORT) as gateway, await gateway.connect() as fresh, await gateway.connect() as used:
        began = trio.current_time()
        await used.send_all(POST)
        await reply_on(used)
        assert await rest_of(fresh) == b""
        assert await rest_of(used) == b""
        assert 0.5 < trio.current_time() - began < 1.5
        gateway.app.handle = slow
        assert status_of(await gateway.talk(POST.replace(b"Host", b"Connection: close\r\nHost"))) == 200


async def test_limits_are_live() -> None:
    async with serving() as gateway:
        assert status_of(await gateway.talk(POST.replace(b"Host", b"Connection: close\r\nHost"))) == 200
        gateway.app.limits = attrs.evolve(gateway.app.limits, max_body_bytes=4)
        is_refusal(await gateway.talk(POST[:-5]), 413)


async def test_RB22_idle_connections_beside_active_ones() -> None:
    async with serving() as gateway:
        idle = []
        began = time.perf_counter()
        for _ in range(400):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(gateway.address)
            idle.append(sock)
        while len(gateway.server.connections) < 400:
            await trio.lowlevel.checkpoint()
        accepted = time.perf_counter() - began
        answers = 0

        async def active() -> None:
            nonlocal answers
            async with await gateway.connect() as stream:
                for _ in range(5):
                    await stream.send_all(POST)
                    await reply_on(stream)
                    answers += 1

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(active)
        assert answers == 200
        assert accepted < 0.5, "a fifth of the 2,000, on a machine that is shared"
        for sock in idle:
            sock.close()
        await gateway.deserted()


async def test_RB23_big_heads_get_431() -> None:
    async with serving() as gateway:
        is_refusal(await gateway.talk(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 16384 + b"\r\n\r\n"), 431)
        is_refusal(await gateway.talk(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60_000), 431)
        is_refusal(await gateway.talk(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 100 + b"\r\n"), 431)
        await gateway.lives()


async def test_RB23_big_bodies_get_413_with_and_without_a_length() -> None:
    limits = ConnectionLimits(max_body_bytes=1000)
    async with serving(limits=limits) as gateway:
        is_refusal(await gateway.talk(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n"), 413)
        chunks = b"100\r\n" + bytes(256) + b"\r\n"
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        is_refusal(await gateway.talk(head + chunks * 4), 413)
        # A client that goes on sending reads its 413 none the less.
        async with await gateway.connect() as stream:
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n")
            await stream.send_all(bytes(2_000_000))
            is_refusal(await rest_of(stream), 413)


async def test_RB23_P10_a_refusal_does_not_wait_for_the_body() -> None:
    async def deny(request: Request) -> None:
        await request.respond(401, b'{"error": "Unauthorized"}', headers=[("WWW-Authenticate", "Bearer")])

    async with serving(deny) as gateway, await gateway.connect() as stream:
        times = []
        for _ in range(5):
            async with await gateway.connect() as stream:
                began = time.perf_counter()
                await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n")
                reply = await stream.receive_some()
                times.append(time.perf_counter() - began)
                assert status_of(reply) == 401
                assert b"\r\nConnection: close\r\n" in reply
        assert min(times) < 0.01
        # A body that is already here is skipped, and the connection goes on.
        async with await gateway.connect() as stream:
            for _ in range(2):
                await stream.send_all(POST)
                assert b"Connection: close" not in await reply_on(stream)


async def test_P8_one_budget_for_all_unfinished_bodies() -> None:
    limits = ConnectionLimits(body_budget_bytes=10_000)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000\r\n\r\n"
    async with serving(limits=limits) as gateway:
        async with await gateway.connect() as first:
            await first.send_all(head + bytes(7000))
            with trio.fail_after(5):
                while gateway.server.body_bytes != 7000:
                    await trio.sleep(0.005)
            reply = await gateway.talk(head + bytes(7000))
            is_refusal(reply, 503)
            assert b"\r\nRetry-After: 1\r\n" in reply
            await first.send_all(bytes(1000))
            assert status_of(await reply_on(first)) == 200
        assert gateway.server.body_bytes == 0


async def test_P8_more_connections_than_allowed_get_503() -> None:
    async with serving(limits=ConnectionLimits(max_connections=2)) as gateway:
        async with await gateway.connect() as first, await gateway.connect() as second:
            for stream in (first, second):
                await stream.send_all(POST)
                await reply_on(stream)
            reply = await gateway.talk(b"")
            is_refusal(reply, 503)
            assert b"\r\nRetry-After: " in reply
        await gateway.deserted()
        await gateway.lives()


async def test_P8_a_pipelining_client_is_bounded() -> None:
    gone = trio.Event()

    async def watching(request: Request) -> None:
        await request.wait_disconnected()
        gone.set()

    async with serving(watching) as gateway, await gateway.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with trio.move_on_after(5):
            try:
                while not gone.is_set():
                    await stream.send_all(POST * 100)
            except trio.BrokenResourceError:
                pass
        await gateway.deserted()
        assert gone.is_set()


# -- refusals


REFUSED: list[tuple[str, bytes, int]] = [
    (
        "both lengths",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    ("listed lengths", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello", 400),
    ("repeated lengths", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    ("bad chunk", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ("cut chunk", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n", 400),
    ("folded header", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n", 400),
    ("bare LF", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    ("no host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("bad host", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("CONNECT", b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    ("unknown method", b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    ("unknown coding", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: br\r\n\r\n", 501),
    ("unknown version", b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
]


@pytest.mark.parametrize(("data", "status"), [pytest.param(data, status, id=name) for name, data, status in REFUSED])
async def test_RB24_RB29_ambiguous_requests_are_refused_and_closed(data: bytes, status: int) -> None:
    async with serving() as gateway:
        is_refusal(await gateway.talk(data + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"), status)


H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WS = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


def h2_upgrade(settings: bytes) -> bytes:
    return (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: "
        + settings
        + b"\r\n\r\n"
    )


KILLERS: list[tuple[str, bytes, int]] = [
    ("h2 prior knowledge", H2_PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", 405),
    ("h2 preface then rubbish", H2_PREFACE + b"\xff" * 64, 405),
    ("h2 preface then bad headers", H2_PREFACE + b"\x00\x00\x03\x01\x04\x00\x00\x00\x01\x82\x86\xff", 405),
    ("h2 preface then PUSH_PROMISE", H2_PREFACE + b"\x00\x00\x04\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02", 405),
    ("h2 frames without preface", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", 400),
    ("h2c upgrade", h2_upgrade(b"AAMAAABkAAQAAP__"), 200),
    ("h2c upgrade, rubbish settings", h2_upgrade(b"!!!not base64!!!"), 200),
    ("h2c upgrade, settings of odd length", h2_upgrade(b"AAM"), 200),
    ("h2c upgrade, values out of range", h2_upgrade(b"AAT_____"), 200),
    ("h2c upgrade, not ASCII", h2_upgrade(b"\xff\xfe"), 200),
    ("h2c upgrade without settings", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
    ("h2c upgrade with a body", h2_upgrade(b"AAMAAABk")[:-2] + b"Content-Length: 2\r\n\r\nhi", 200),
    ("websocket", WS + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 200),
    ("websocket without key", WS + b"Sec-WebSocket-Version: 13\r\n\r\n", 200),
    ("websocket, bad version", WS + b"Sec-WebSocket-Version: x\r\nSec-WebSocket-Key: a\r\n\r\n", 200),
    ("websocket, bad extensions", WS + b"Sec-WebSocket-Extensions: permessage-deflate; =;;\r\n\r\n", 200),
    ("websocket over HTTP/1.0", WS.replace(b"1.1", b"1.0") + b"\r\n", 200),
    ("TLS", b"\x16\x03\x01\x00\xf5\x01\x00\x00\xf1\x03\x03" + bytes(200), 400),
    ("path that is no UTF-8", b"GET /%ff%fe HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    ("path with raw bytes", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("absolute target, broken address", b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target //[", b"GET //[bad HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    ("headers that are no UTF-8", b"GET / HTTP/1.1\r\nHost: a\r\nX: \xff\xc3\r\n\r\n", 200),
    ("host that is no ASCII", b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n", 400),
    ("length beyond 64 bits", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 400),
    ("length over the limit", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999999999\r\n\r\n", 413),
    ("proxy protocol", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n", 400),
    ("nothing but line ends", b"\r\n\r\n\r\n\r\n", 400),
]


@pytest.mark.parametrize(("data", "status"), [pytest.param(data, status, id=name) for name, data, status in KILLERS])
async def test_A11_packets_that_end_a_stock_server_do_not_end_us(data: bytes, status: int) -> None:
    async with serving() as gateway:
        async with await gateway.connect() as stream:
            await stream.send_all(data)
            reply = await stream.receive_some()
            if status == 200:  # served as plain HTTP/1.1; nothing is ever upgraded
                assert status_of(reply) == 200
                assert b"pgrade" not in reply
            else:
                is_refusal(reply, status)
        await gateway.lives()
        await gateway.deserted()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHo",
        H2_PREFACE,
        H2_PREFACE[:20],
        h2_upgrade(b"AAMAAABk"),
        WS + b"\r\n",
        POST[:-2],
        POST,
        POST * 3,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
        b"\xff" * 100,
    ],
)
@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
async def test_A11_a_client_that_leaves_in_the_middle(data: bytes, how: str) -> None:
    async with serving() as gateway:
        for _ in range(3):
            sock = socket.create_connection(gateway.address)
            sock.sendall(data)
            if how == "reset":
                with_reset(sock)
            elif how == "close":
                sock.close()
            else:
                sock.shutdown(socket.SHUT_WR)
                await gateway.deserted()
                sock.close()
        await gateway.deserted()
        await gateway.lives()


async def test_A11_resets_while_replies_and_streams_are_written() -> None:
    async def flood(request: Request) -> None:
        if request.path == "/alive":
            return await echo(request)
        if request.path == "/reply":
            await request.respond(200, bytes(3_000_000))
        await request.start_stream(200, [])
        while True:
            await request.write(bytes(100_000))

    async with serving(flood) as gateway:
        for path in (b"/reply", b"/stream"):
            sock = socket.create_connection(gateway.address)
            sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            while gateway.server.connections == set():
                await trio.sleep(0.005)
            await trio.sleep(0.05)
            with_reset(sock)
            await gateway.deserted()
        await gateway.lives()


# -- faults of handlers


def raises(error: BaseException) -> Handler:
    async def handler(request: Request) -> None:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("secret detail"), 500),
        (RecursionError(), 500),
        (ExceptionGroup("", [ValueError("secret detail"), ExceptionGroup("", [KeyError("x")])]), 500),
        (ExceptionGroup("", [StartFailed("no"), ValueError("secret detail")]), 500),
        (StartFailed("the server did not start"), 502),
        (ExceptionGroup("", [StartFailed("the server did not start")]), 502),
        (ClientProtocolError("bad", status=422), 422),
        (Overloaded("busy", retry_after=2.5), 503),
    ],
)
async def test_RB29_P3_faults_of_a_handler_stay_in_it(
    error: BaseException, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(raises(error)) as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        reply = await reply_on(stream)
        assert status_of(reply) == status
        assert set(json.loads(reply.partition(b"\r\n\r\n")[2])) == {"error", "message"}
        assert b"secret" not in reply
        assert (b"\r\nRetry-After: 3\r\n" in reply) == (status == 503)
        gateway.app.handle = echo
        await stream.send_all(POST)
        assert status_of(await reply_on(stream)) == 200, "the connection goes on"
    unexpected = [record for record in caplog.records if record.name == "gateway_http"]
    assert len(unexpected) == (status == 500)


async def test_a_handler_that_does_not_answer_gets_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def silent(request: Request) -> None:
        pass

    async with serving(silent) as gateway:
        assert status_of(await gateway.talk(POST.replace(b"Host", b"Connection: close\r\nHost"))) == 500
    assert "No answer" in caplog.text


async def test_a_stream_that_fails_looks_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def half(request: Request) -> None:
        await request.start_stream(200, [])
        await request.write(b"half")
        raise ValueError("oops")

    async with serving(half) as gateway:
        reply = await gateway.talk(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert reply.endswith(b"4\r\nhalf\r\n")
    assert "oops" in caplog.text


async def test_headers_that_can_not_be_sent_are_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def split(request: Request) -> None:
        request.extra_headers.append(("X-Request-ID", "a\r\nX: b"))
        await request.respond(200, b"{}")

    async with serving(split) as gateway:
        reply = await gateway.talk(POST.replace(b"Host", b"Connection: close\r\nHost"))
        assert status_of(reply) == 500
        assert b"X: b" not in reply


async def test_P3_cancellation_passes_without_the_faults_beside_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nursery in a handler that is cancelled while it fails: the fault is logged, only the cancellation arrives."""
    started = trio.Event()
    passed: list[BaseException] = []
    run = ServerConnection.run

    async def watched(self: ServerConnection) -> None:
        try:
            await run(self)
        except BaseException as error:
            passed.append(error)
            raise

    monkeypatch.setattr(ServerConnection, "run", watched)

    async def mixed(request: Request) -> None:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
            started.set()

    async with serving(mixed, drain_seconds=0.2) as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        await started.wait()
        gateway.stop.set()
        is_refusal(await rest_of(stream), 503)
    assert "while cancelled" in caplog.text
    (left,) = passed
    assert isinstance(left, BaseExceptionGroup)
    assert left.split(trio.Cancelled)[1] is None


# -- clients that leave, event streams


async def test_RB20_a_client_that_leaves_is_noticed_at_once() -> None:
    seen: list[float] = []
    waiting = trio.Event()

    async def watch(request: Request) -> None:
        await request.body()
        waiting.set()
        await request.wait_disconnected()
        seen.append(time.perf_counter())
        with pytest.raises(ClientGone):
            await request.respond(200)

    async with serving(watch) as gateway:
        for leave in (socket.socket.close, with_reset):
            waiting = trio.Event()
            sock = socket.create_connection(gateway.address)
            sock.sendall(POST)
            await waiting.wait()
            left = time.perf_counter()
            leave(sock)
            await gateway.deserted()
            assert seen.pop() - left < 0.1


async def test_bytes_of_the_next_request_are_kept_while_watching() -> None:
    async def slow(request: Request) -> None:
        body = await request.body()
        with trio.move_on_after(0.05):
            await request.wait_disconnected()
        await request.respond(200, body)

    async with serving(slow) as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        await stream.send_all(POST.replace(b"hello", b"again"))
        data = b""
        while not data.endswith(b"again"):
            data += await stream.receive_some()
        assert data.count(b"HTTP/1.1 200") == 2


async def test_wait_ends_for_wake_time_shutdown_and_the_clients_end() -> None:
    requests: list[Request] = []
    log: list[str] = []

    async def stream_it(request: Request) -> None:
        requests.append(request)
        await request.start_stream(200, [])
        request.wake()
        assert not await request.wait(), "remembered from before"
        log.append("remembered")
        assert not await request.wait()
        log.append("woken")
        assert not await request.wait(until=trio.current_time() + 0.1)
        log.append("timed")
        assert not await request.wait()
        assert request.server.shutting_down.is_set()
        log.append("shutdown")
        assert await request.wait()
        log.append("gone")

    async def until(word: str) -> None:
        with trio.fail_after(5):
            while log[-1:] != [word]:
                await trio.sleep(0.005)

    async with serving(stream_it) as gateway:
        async with await gateway.connect() as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await until("remembered")
            await trio.testing.wait_all_tasks_blocked()
            requests[0].wake()
            requests[0].wake()
            await until("woken")
            await until("timed")
            gateway.stop.set()
            await until("shutdown")
        await until("gone")
        await gateway.deserted()
        requests[0].wake()  # harmless
        with pytest.raises(ClientGone):
            await requests[0].write(b"x")


async def test_a_wake_does_not_excuse_a_slow_reader() -> None:
    gone = trio.Event()
    current: list[Request] = []

    async def flood(request: Request) -> None:
        current.append(request)
        await request.start_stream(200, [])
        try:
            while True:
                await request.write(bytes(1_000_000))
        except ClientGone:
            gone.set()

    async with serving(flood, SHORT) as gateway, await gateway.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with trio.fail_after(5):
            while not gone.is_set():
                if current:
                    gateway.server.connections.copy().pop().woken = False
                    current[0].wake()
                await trio.sleep(0.02)


# -- shutdown


async def test_P6_shutdown_answers_what_is_in_flight_and_closes_the_rest() -> None:
    release = trio.Event()

    async def slow(request: Request) -> None:
        body = await request.body()
        await release.wait()
        await request.respond(200, body)

    async with serving(slow) as gateway:
        idle, busy, sending = [await gateway.connect() for _ in range(3)]
        await busy.send_all(POST)
        await sending.send_all(POST[:-2])
        while len(gateway.server.connections) < 3:
            await trio.sleep(0.005)
        began = time.perf_counter()
        gateway.stop.set()
        assert await rest_of(idle) == b""
        with pytest.raises(OSError):
            while True:
                await (await gateway.connect()).aclose()
        assert time.perf_counter() - began < 0.1
        await sending.send_all(b"lo")
        release.set()
        for stream in (busy, sending):
            reply = await rest_of(stream)
            assert status_of(reply) == 200
            assert b"\r\nConnection: close\r\n" in reply
        for stream in (idle, busy, sending):
            await stream.aclose()


async def test_P6_a_request_that_has_arrived_is_still_answered() -> None:
    async with serving() as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        await reply_on(stream)
        # Both in one step of the loop: the bytes are in the socket when the connection is told to end.
        stream.socket._sock.send(POST)  # type: ignore[attr-defined]
        gateway.server.begin_shutdown()
        assert status_of(await rest_of(stream)) == 200


async def test_P6_what_outlasts_the_drain_is_cut() -> None:
    async def forever(request: Request) -> None:
        await trio.sleep_forever()

    async def stuck(request: Request) -> None:
        await request.respond(200, bytes(50_000_000))

    for handler in (forever, stuck):
        began = trio.current_time()
        async with serving(handler, drain_seconds=0.2) as gateway:
            stream = await gateway.connect()
            await stream.send_all(POST)
            while not gateway.server.connections:
                await trio.sleep(0.005)
            gateway.stop.set()
        assert trio.current_time() - began < 2
        await stream.aclose()


# -- ASGI


async def test_an_asgi_application_runs_inline() -> None:
    scopes: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        event = await receive()
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"99"), (b"x-a", b"b"), (b"server", b"s")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await send({"type": "http.response.body", "body": b"two"})
        else:
            await send({"type": "http.response.body", "body": event["body"]})
        assert (await receive())["type"] == "http.disconnect"

    async def handler(request: Request) -> None:
        request.extra_headers.append(("X-Request-ID", "7"))
        await run_asgi(request, app)

    async with serving(handler) as gateway, await gateway.connect() as stream:
        await stream.send_all(POST.replace(b"/mcp", b"/caf%C3%A9?q=%20"))
        reply = await reply_on(stream)
        head, _, body = reply.partition(b"\r\n\r\n")
        assert status_of(reply) == 201
        assert body == b"hello"
        for line in (b"Content-Type: text/plain", b"x-a: b", b"X-Request-ID: 7", b"Content-Length: 5"):
            assert b"\r\n" + line in head
        assert b"server" not in head
        scope = scopes[0]
        assert (scope["type"], scope["method"], scope["http_version"]) == ("http", "POST", "1.1")
        assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/café", b"/caf%C3%A9", b"q=%20")
        assert (b"content-length", b"5") in scope["headers"]
        assert scope["server"] == gateway.address
        assert scope["client"] == stream.socket.getsockname()
        assert scope["root_path"] == ""
        await stream.send_all(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += await stream.receive_some()
        assert data.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        await stream.send_all(b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await rest_of(stream)).endswith(b"\r\n\r\n")
        assert scopes[-1]["method"] == "HEAD"


async def test_asgi_faults_and_oversized_bodies_are_refused() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("must not be called")

    async def handler(request: Request) -> None:
        await run_asgi(request, app)

    async with serving(handler, ConnectionLimits(max_body_bytes=4)) as gateway:
        is_refusal(await gateway.talk(POST[:-5]), 413)


async def test_quart_answers_through_the_connection() -> None:
    quart_trio = pytest.importorskip("quart_trio")
    app = quart_trio.QuartTrio(__name__)

    @app.post("/double")
    async def double() -> Any:
        from quart import request

        return {"twice": (await request.get_data(as_text=True)) * 2}

    async def handler(request: Request) -> None:
        await run_asgi(request, app)

    async with serving(handler) as gateway, await gateway.connect() as stream:
        for _ in range(2):
            await stream.send_all(POST.replace(b"/mcp", b"/double"))
            assert json.loads((await reply_on(stream)).partition(b"\r\n\r\n")[2]) == {"twice": "hellohello"}
        await stream.send_all(POST.replace(b"/mcp", b"/nowhere"))
        assert status_of(await reply_on(stream)) == 404


# -- hypercorn, sockets, memory, descriptors


def test_the_names_of_hypercorn_that_we_replace_exist() -> None:
    """In a fresh process: what is replaced is there, ours takes its place, and no other protocol is even loaded."""
    code = """if True:
        import sys
        from gateway.downstream.server import ServerConnection, _worker_serve
        assert not any(name.startswith("hypercorn") for name in sys.modules)
        serve = _worker_serve()
        import hypercorn.trio.run as run
        assert run.TCPServer is ServerConnection and run.worker_serve is serve
        assert serve.__globals__["TCPServer"] is ServerConnection
        for name in ("hypercorn.protocol", "wsproto", "h2.connection", "hypercorn.trio.tcp_server", "quart"):
            assert name not in sys.modules, name
        import inspect
        from hypercorn.trio.tcp_server import TCPServer
        from hypercorn.trio.udp_server import UDPServer
        theirs, ours = inspect.signature(TCPServer), inspect.signature(ServerConnection)
        assert list(theirs.parameters) == list(ours.parameters)
        assert hasattr(TCPServer, "__await__")
        """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_hypercorn_is_pinned() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "hypercorn==0.18.0" in wanted
    assert importlib.metadata.version("hypercorn") == "0.18.0"


def test_RB70_a_taken_port_is_reported_and_nothing_stays_open() -> None:
    first = bind("127.0.0.1", 0)
    with pytest.raises(OSError):
        bind("127.0.0.1", first[0].getsockname()[1])
    for sock in first:
        sock.close()


def test_a_name_with_several_addresses_gets_one_port() -> None:
    sockets = bind("localhost", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


async def test_nodelay_is_set_and_addresses_are_told() -> None:
    seen: list[Any] = []

    async def look(request: Request) -> None:
        sock = request._connection.stream.socket
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        seen.append((request.client, request.client_address, request.server_address))
        await request.respond(200)

    async with serving(look) as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        await reply_on(stream)
        mine = stream.socket.getsockname()
        assert seen == [1, ("127.0.0.1", mine, gateway.address)]


async def test_A14_a_waiting_connection_is_small() -> None:
    """Keep-alive and event streams alike; a quarter of what one may cost in all."""

    async def handler(request: Request) -> None:
        if request.path == "/stream":
            await request.start_stream(200, [("Content-Type", "text/event-stream")])
            while not await request.wait():
                pass
        else:
            await echo(request)

    count = 300
    async with serving(handler) as gateway:
        await gateway.lives()
        for path in (b"/idle", b"/stream"):
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            sockets = [socket.create_connection(gateway.address) for _ in range(count)]
            for sock in sockets:
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost:8080\r\nAccept: text/event-stream\r\n\r\n")
            for sock in sockets:
                sock.setblocking(False)
                reply = b""
                with trio.fail_after(5):
                    while b"\r\n\r\n" not in reply:
                        try:
                            reply += sock.recv(1000)
                        except BlockingIOError:
                            await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            each = (tracemalloc.get_traced_memory()[0] - before) / count
            tracemalloc.stop()
            for sock in sockets:
                sock.close()
            await gateway.deserted()
            assert each < 6500, (path, each)


def test_RB41_accept_complains_once_a_second_without_tracebacks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(server_module.time, "monotonic", lambda: now)
    log = logging.Logger("accept")
    log.addHandler(caplog.handler)
    log.addFilter(server_module._OncePerSecond())
    for _ in range(25):
        log.error("accept returned %s", "EMFILE", exc_info=ValueError())
        now += 0.1
    assert len(caplog.records) == 3
    assert all(record.exc_info is None for record in caplog.records)


@pytest.mark.skipif(os.name != "posix", reason="no descriptor limit")
def test_RB41_out_of_descriptors() -> None:
    """Connections in use go on being served; when descriptors are back, waiting ones are accepted."""
    script = Path(__file__).with_name("out_of_descriptors.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    complaints = done.stderr.count("accept returned EMFILE")
    assert 1 <= complaints <= 4, done.stderr
    assert "Traceback" not in done.stderr


async def test_useful_reprs() -> None:
    async with serving() as gateway, await gateway.connect() as stream:
        await stream.send_all(POST)
        await reply_on(stream)
        assert repr(gateway.server) == "<Server connections=1>"
        (connection,) = gateway.server.connections
        assert repr(connection) == f"<ServerConnection fd={connection.fd}>"
