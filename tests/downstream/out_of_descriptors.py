"""Run by test_server.py in its own process: serves with too few descriptors, and is its own client."""

from __future__ import annotations

import resource
import socket
import time

import trio

from gateway.downstream.server import ConnectionLimits, Request, Server, bind, serve

LIMIT = 40
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class App:
    limits = ConnectionLimits()

    async def handle(self, request: Request) -> None:
        await request.respond(200, b"{}")

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        raise RuntimeError("no lifespan here")


async def answered(sock: socket.socket, within: float) -> bool:
    sock.setblocking(False)
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            return sock.recv(1000).startswith(b"HTTP/1.1 200")
        except BlockingIOError:
            await trio.sleep(0.01)
    return False


async def main() -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[Server]) -> None:
            await serve(App(), bind("127.0.0.1", 0), shutdown_trigger=stop.wait, task_status=task_status)

        server = await nursery.start(run)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (LIMIT, LIMIT), "raised to the hard limit"
        # Each connection takes two descriptors here. The clients' are taken first, the server's run out.
        clients = [socket.socket() for _ in range(22)]
        for client in clients:
            client.connect(server.addresses[0])
            client.sendall(GET)
        for _ in range(25):
            await trio.sleep(0.1)
        served = [client for client in clients if await answered(client, 0.05)]
        assert 0 < len(served) < len(clients), len(served)
        served[0].sendall(GET)
        assert await answered(served[0], 2), "a connection in use must go on"
        for client in served:
            client.close()
        waiting = [client for client in clients if client not in served]
        for client in waiting:
            assert await answered(client, 5), "recovery"
        stop.set()


resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT // 2, LIMIT))
trio.run(main)
