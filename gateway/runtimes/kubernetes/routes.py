"""How requests get to the pods behind a Service. Not a runtime.

A ``Route`` is one way: to the pods' addresses from inside the cluster; from outside through the API, by
port-forwarding, as its proxy of pods, or as its proxy of Services. ``Balanced`` is the httpx transport over it: each
request goes to the least busy ready pod, but those of a session of the legacy era go to the pod that has opened it.
When that one is gone so is the session, and the transport answers 404 in its place: what was sent has not run, so the
link opens another session elsewhere (specification 2025-11-25, transports, session management). Which pods are gone
the cluster says; while it can't be asked, one that takes no connection counts as gone if another is left.

A request is sent again only where it is certain that no pod has seen it: nobody was there to connect to.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import httpcore
import httpx
import trio
from httpcore._backends.trio import TrioStream  # makes TLS over any of trio's streams

from gateway.errors import StartFailed
from gateway.runtimes._keepalive import keepalive
from gateway.runtimes.kubernetes.access import Access
from gateway.runtimes.kubernetes.api import Cluster, RequestBody, path_of
from gateway.runtimes.kubernetes.endpoints import Endpoint, Endpoints
from gateway.runtimes.kubernetes.websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    TEXT,
    Broken,
    Socket,
    message_of,
)
from gateway.trust import private, public_context

__all__ = ["Balanced", "Load", "Route", "choose_route"]

KEEP_ALIVE: Final = 4.0
"""Seconds an idle connection is kept, see ``upstream.dial``."""
CONNECT_LIMIT: Final = 5.0
"""Seconds for one pod to take a connection: a pod that is gone answers nothing."""
AVOIDED: Final = 10.0
"""Seconds in which others come before a pod that has taken no connection."""
MAX_TRIES: Final = 3
"""Pods that are tried for one request."""
READY_WAIT: Final = 25.0
"""Seconds a request waits for a pod that is coming up (RB64: replaced within 30 s)."""
MAX_SESSIONS: Final = 64
"""Sessions of one link: it uses one at a time."""
MAX_STATUS: Final = 64 * 1024
"""Bytes of an answer that may be the API's own instead of the pod's."""
LISTEN: Final = "subscriptions/listen"
FORWARD_PROTOCOL: Final = "v4.channel.k8s.io"
MESSAGE: Final = 64 * 1024
"""Bytes of one message to a forwarded port."""
DATA_CHANNEL: Final = 0
ERROR_CHANNEL: Final = 1


class Route(Protocol):
    """One way to the pods.

    via     what people are shown
    exact   it leads to the pod that is chosen
    direct  it does without the cluster's API
    """

    via: str
    exact: bool
    direct: bool

    def transport(self) -> httpx.AsyncBaseTransport:
        """What carries requests this way; the caller closes it."""

    def aim(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Request:
        """The request as it goes to this pod."""

    async def judge(self, response: httpx.Response) -> httpx.Response:
        """The response, unless it is not the pod's own. Raises httpx.ConnectError when no pod has seen the request."""


# ---------------------------------------------------------------------------------------------------------- the ways
class _Pool(httpx.AsyncHTTPTransport):
    """httpx's transport over a pool of ours: HTTP/1.1, no proxy, no limit on connections: the unit has one on calls."""

    def __init__(self, context: ssl.SSLContext | None, backend: httpcore.AsyncNetworkBackend) -> None:
        # Not super().__init__(): it would make a TLS context of its own, which takes longer than all the rest.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=KEEP_ALIVE,
            network_backend=backend,
            # A lost node says nothing, and its connections would stay open.
            socket_options=keepalive(),
        )


class DirectRoute:
    """To the pods' own addresses. TLS is checked for the Service's name, which is in such certificates."""

    via = "pod address"
    exact = True
    direct = True

    def __init__(self, context: ssl.SSLContext | None, server_name: str) -> None:
        self._context = context
        self._server_name = server_name

    def transport(self) -> httpx.AsyncBaseTransport:
        """See Route."""
        return _Pool(self._context, httpcore.TrioBackend())

    def aim(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Request:
        """See Route."""
        return _moved(request, request.url.copy_with(host=endpoint.address, port=endpoint.port), self._server_name)

    async def judge(self, response: httpx.Response) -> httpx.Response:
        """See Route."""
        return response


class ForwardRoute(DirectRoute):
    """Through connections that the API forwards to a pod's port."""

    via = "port-forward"
    direct = False

    def __init__(self, context: ssl.SSLContext | None, server_name: str, cluster: Cluster, namespace: str) -> None:
        super().__init__(context, server_name)
        self._backend = _ForwardBackend(cluster, namespace)

    def transport(self) -> httpx.AsyncBaseTransport:
        """See Route."""
        return _Pool(self._context, self._backend)

    def aim(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Request:
        """See Route: here a host is a pod's name."""
        return _moved(request, request.url.copy_with(host=endpoint.pod, port=endpoint.port), self._server_name)


class ProxyRoute:
    """Through the API's own HTTP proxy, of one pod or of the Service as a whole."""

    direct = False

    def __init__(self, cluster: Cluster, namespace: str, service: str = "", port: str = "") -> None:
        self.via = "service proxy of the API" if service else "pod proxy of the API"
        self.exact = not service
        self._cluster = cluster
        self._namespace = namespace
        self._service = service
        self._port = port

    def transport(self) -> httpx.AsyncBaseTransport:
        """See Route."""
        return self._cluster.transport()

    def aim(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Request:
        """See Route."""
        if self._service:
            path = path_of(self._namespace, "services", f"{self._service}:{self._port}", "proxy")
        else:
            path = path_of(self._namespace, "pods", f"{endpoint.pod}:{endpoint.port}", "proxy")
        url = httpx.URL(f"{self._cluster.access.server}{path}{request.url.raw_path.decode('ascii')}")
        moved = _moved(request, url, "")
        moved.headers["host"] = url.netloc.decode("ascii")
        return moved

    async def judge(self, response: httpx.Response) -> httpx.Response:
        """See Route: the API answers itself, with a Status, where it finds no pod or we have no right."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
        if response.status_code < 400 or kind != "application/json":
            return response
        data = b""
        async for piece in response.stream:  # type: ignore[union-attr]
            data += piece
            if len(data) > MAX_STATUS:
                break
        await response.aclose()
        status = message_of(data)
        if status.get("kind") == "Status" and status.get("apiVersion") == "v1":
            said = str(status.get("message") or response.status_code)[:300]
            lost = response.status_code >= 500 and not _unsent(said)
            raise (httpx.ReadError if lost else httpx.ConnectError)(f"Kubernetes says: {said}")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() != b"content-length"]
        return httpx.Response(response.status_code, headers=headers, content=data, request=response.request)


def _unsent(said: str) -> bool:
    """Whether the API's words mean that it found nobody to send the request to."""
    return any(each in said for each in ("dial tcp", "no endpoints available", "not found", "connection refused"))


def _moved(request: httpx.Request, url: httpx.URL, server_name: str) -> httpx.Request:
    """The same request at another URL. Its Host stays what it was: the Service's name, as a server may insist on."""
    moved = httpx.Request(request.method, url, headers=request.headers, stream=RequestBody(request.content))
    moved.extensions = dict(request.extensions)
    if server_name:
        moved.extensions["sni_hostname"] = server_name
    timeout = dict(moved.extensions.get("timeout") or {})
    moved.extensions["timeout"] = {**timeout, "connect": CONNECT_LIMIT}
    return moved


# -------------------------------------------------------------------------------------------------- port-forwarding
class _ForwardBackend(httpcore.AsyncNetworkBackend):
    """httpcore's door to the network, which here leads to a pod's ports. One WebSocket is one connection."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to a pod's port. Raises httpcore.ConnectError."""
        path = path_of(self._namespace, "pods", host, "portforward")
        try:
            limit = timeout or CONNECT_LIMIT
            opened = await self._cluster.upgrade(path, [("ports", str(port))], [FORWARD_PROTOCOL], limit=limit)
        except StartFailed as error:
            raise httpcore.ConnectError(error.message) from error
        return _ForwardedConnection(_Forwarded(opened))

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """There are none."""
        raise httpcore.ConnectError("pods are reached by ports")

    async def sleep(self, seconds: float) -> None:
        """For httpcore's own retries, which are switched off."""
        await trio.sleep(seconds)


class _ForwardedConnection(TrioStream):
    """A forwarded connection as httpcore wants it."""

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore: what is inside TLS is still one of these."""
        made = await super().start_tls(ssl_context, server_hostname, timeout)
        assert isinstance(made, TrioStream)
        return _ForwardedConnection(made._stream)

    def get_extra_info(self, info: str) -> Any:
        """httpcore asks an idle connection whether there is anything to read, which means that it has ended."""
        stream = self._stream
        while isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        if info == "is_readable":
            return not isinstance(stream, _Forwarded) or stream.stirred
        return super().get_extra_info(info) if info == "ssl_object" else None


class _Forwarded(trio.abc.Stream):
    """One forwarded connection as a stream of trio's.

    Every message begins with its channel: data or errors. The first on each repeats the port, in two bytes. What comes
    on the channel of errors ends the connection: nobody listens there, or the pod is gone.
    """

    def __init__(self, opened: Socket) -> None:
        self._socket = opened
        self._channel = DATA_CHANNEL
        self._greeted: set[int] = set()
        self._error = b""
        self._waiting = bytearray()
        self._unsent = bytearray()
        self._ended = False

    @property
    def stirred(self) -> bool:
        """Whether something has come that nobody has read yet, were it only the end."""
        return self._ended or bool(self._waiting) or self._socket.stirred

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio. Raises BrokenResourceError. Little waits until somebody reads, as whoever speaks HTTP does next:
        a request's head and body in two messages would cost 40 ms at the pod (Nagle's algorithm, delayed acks)."""
        self._unsent += data
        if len(self._unsent) >= MESSAGE:
            await self._flush()
        else:
            await trio.lowlevel.checkpoint()

    async def _flush(self) -> None:
        try:
            while self._unsent:
                self._socket.send_nowait(BINARY, bytes((DATA_CHANNEL,)), bytes(self._unsent[:MESSAGE]))
                del self._unsent[:MESSAGE]
                if self._socket.full:
                    await self._room()
        except Broken as error:
            raise trio.BrokenResourceError(self._said() or str(error)) from error

    async def _room(self) -> None:
        """Return when everything is on its way. Raises Broken. The task that a socket wants lives for as long."""
        failure: Broken | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._socket.flush_always)
            try:
                await self._socket.wait_writable()
            except Broken as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio."""
        await self._flush()
        while not self._waiting and not self._ended:
            try:
                frames = await self._socket.receive()
            except Broken:
                self._ended = True
                break
            for opcode, payload in frames:
                self._take(opcode, payload)
        if not self._waiting:
            if self._said():
                raise trio.BrokenResourceError(self._said())
            return b""
        size = len(self._waiting) if max_bytes is None else max_bytes
        taken = bytes(self._waiting[:size])
        del self._waiting[:size]
        return taken

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            self._ended = True
            return
        if opcode not in (CONTINUATION, TEXT, BINARY):
            return
        if opcode != CONTINUATION:
            if not payload:
                return
            self._channel, payload = payload[0], payload[1:]
            if self._channel not in self._greeted and len(payload) >= 2:
                self._greeted.add(self._channel)
                payload = payload[2:]
        if self._channel == DATA_CHANNEL:
            self._waiting += payload
        elif self._channel == ERROR_CHANNEL and payload:
            self._error = (self._error + payload)[:2000]
            self._ended = True

    def _said(self) -> str:
        return self._error.decode("utf-8", "replace").strip()[:300]

    async def aclose(self) -> None:
        """See trio."""
        self._socket.close()
        await trio.lowlevel.checkpoint()


# ---------------------------------------------------------------------------------------------------------- choosing
async def choose_route(
    cluster: Cluster, namespace: str, service: str, port: str, scheme: str, headers: Sequence[tuple[str, str]]
) -> Route:
    """The way to a Service's pods that the gateway has from where it runs and by its rights. Raises StartFailed.

    Authorization would be taken by the API for itself, and it does not check the certificates of pods: then only
    port-forwarding will do.
    """
    context = None
    if scheme == "https":
        context = await trio.to_thread.run_sync(_pod_tls, cluster.access)
    server_name = f"{service}.{namespace}.svc" if context is not None else ""
    if not cluster.access.kubeconfig:
        return DirectRoute(context, server_name)
    open_to_api = scheme == "http" and not any(name.lower() == "authorization" for name, _ in headers)
    may = partial(_may, cluster, namespace)
    # First what hands bytes through: the API's proxies have been seen to cut short event streams (1.20: one in 100).
    if await may("get", "pods", "portforward"):
        return ForwardRoute(context, server_name, cluster, namespace)
    if open_to_api and await may("create", "pods", "proxy") and await may("get", "pods", "proxy"):
        return ProxyRoute(cluster, namespace)
    if open_to_api and await may("create", "services", "proxy"):
        return ProxyRoute(cluster, namespace, service, port)
    wanted = "get pods/portforward"
    if open_to_api:
        wanted += ", or create and get pods/proxy, or create services/proxy"
    raise StartFailed(
        f"Service '{service}' is reached from outside the cluster through its API, which needs the right to {wanted} "
        f"in namespace '{namespace}' ({cluster.access})"
    )


async def _may(cluster: Cluster, namespace: str, verb: str, resource: str, sub: str) -> bool:
    """Whether we have a right: everybody may ask about themselves."""
    attributes = {"namespace": namespace, "verb": verb, "resource": resource, "subresource": sub}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = await cluster.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
    return bool((answer.get("status") or {}).get("allowed"))


def _pod_tls(access: Access) -> ssl.SSLContext:
    """What pods' certificates must come from: SSL_CERT_FILE and SSL_CERT_DIR, else certifi's; or the cluster's CA."""
    try:
        context = public_context(os.environ)
        if access.ca is not None:
            private(context).load_verify_locations(cadata=access.ca)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise StartFailed(f"The certificates that pods are checked against can't be loaded: {error}") from None
    return context


# --------------------------------------------------------------------------------------------------------- balancing
class Load:
    """How busy each pod is with requests of this gateway, over all links of one place."""

    def __init__(self) -> None:
        self._waiting: dict[Endpoint, int] = {}
        self._turn: dict[Endpoint, int] = {}
        self._turns = 0
        self._avoided: dict[Endpoint, float] = {}

    @property
    def total(self) -> int:
        """Requests that wait for the end of their answers."""
        return sum(self._waiting.values())

    def least(self, endpoints: Iterable[Endpoint]) -> Endpoint:
        """The least busy one; of equals the one whose last request was the longest ago. Those to be avoided last."""
        now = trio.current_time()

        def rank(each: Endpoint) -> tuple[bool, int, int]:
            avoided = self._avoided.get(each, now) > now
            return avoided, self._waiting.get(each, 0), self._turn.get(each, 0)

        return min(endpoints, key=rank)

    def avoid(self, endpoint: Endpoint) -> None:
        """It has taken no connection: for a while others come first, or each request in turn would wait for it."""
        self._avoided[endpoint] = trio.current_time() + AVOIDED

    def begin(self, endpoint: Endpoint) -> Callable[[], None]:
        """A request goes there; call what is returned at its end, once or more."""
        self._turns += 1
        self._turn[endpoint] = self._turns
        self._waiting[endpoint] = self._waiting.get(endpoint, 0) + 1
        open = True

        def end() -> None:
            nonlocal open
            if open:
                open = False
                self._waiting[endpoint] -= 1

        return end

    def keep(self, endpoints: Iterable[Endpoint]) -> None:
        """Forget the pods that are gone, but for what still runs there."""
        kept = set(endpoints)
        self._avoided = {each: until for each, until in self._avoided.items() if each in kept}
        for endpoint in [each for each in self._turn if each not in kept and not self._waiting.get(each)]:
            del self._turn[endpoint]
            self._waiting.pop(endpoint, None)


class Balanced(httpx.AsyncBaseTransport):
    """One link's requests, over the pods there are. ``url`` is what the link was opened at."""

    def __init__(self, route: Route, endpoints: Endpoints, url: str, load: Load, shown: str) -> None:
        self._route = route
        self._inner = route.transport()
        self._endpoints = endpoints
        self._own = httpx.URL(url).raw_path
        self._load = load
        self._shown = shown
        self._sessions: OrderedDict[str, Endpoint] = OrderedDict()
        self._stream: Endpoint | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Raises httpx.ConnectError where there is no pod to send it to."""
        session = request.headers.get("mcp-session-id", "")
        bound = self._sessions.get(session)
        if session:
            if bound is None or bound not in self._endpoints.all:
                self._sessions.pop(session, None)
                return httpx.Response(404, request=request)
        elif request.url.raw_path != self._own and self._stream in self._endpoints.all:
            # HTTP+SSE: what belongs to the stream goes to its pod, at a path which that one has named.
            bound = self._stream
        await request.aread()  # in memory anyway; so it can be sent again where nobody has got it
        if bound is not None:
            try:
                return await self._send(request, bound)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if not session or not self._given_up(bound):
                    raise
                self._sessions.pop(session, None)
                return httpx.Response(404, request=request)
        tried: set[Endpoint] = set()
        while True:
            endpoint = await self._choose(tried)
            try:
                return await self._send(request, endpoint)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                tried.add(endpoint)
                self._load.avoid(endpoint)
                if len(tried) >= MAX_TRIES or not set(self._endpoints.ready) - tried:
                    raise

    def _given_up(self, endpoint: Endpoint) -> bool:
        """Whether a pod that has just taken no connection is to be believed gone. Not if the API was in between."""
        unknown = bool(self._endpoints.trouble) and self._route.direct
        return unknown and any(each != endpoint for each in self._endpoints.ready)

    async def _choose(self, tried: set[Endpoint]) -> Endpoint:
        """The least busy ready pod. Waits a while for one where some are coming up."""
        with trio.move_on_after(READY_WAIT):
            while True:
                ready = [each for each in self._endpoints.ready if each not in tried]
                if ready:
                    return self._load.least(ready)
                if not self._endpoints.all:
                    break
                await self._endpoints.changed.wait()
        count = len(self._endpoints.all)
        state = f"none of its {count} pods is ready" if count else "it has no pods"
        raise httpx.ConnectError(f"{self._shown}: {state}")

    async def _send(self, request: httpx.Request, endpoint: Endpoint) -> httpx.Response:
        # What is open all the time, to be told of changes, says nothing of how busy a pod is.
        listens = request.method == "GET" or request.headers.get("mcp-method") == LISTEN
        release = _nothing if listens else self._load.begin(endpoint)
        try:
            response = await self._inner.handle_async_request(self._route.aim(request, endpoint))
            response.request = request
            response = await self._route.judge(response)
        except BaseException:
            release()
            raise
        self._note(request, response, endpoint)
        if response.is_closed:  # it was read to its end by ``judge``
            release()
        else:
            response.stream = _Released(response.stream, release)  # type: ignore[arg-type]
        return response

    def _note(self, request: httpx.Request, response: httpx.Response, endpoint: Endpoint) -> None:
        """Remember what later requests belong to."""
        session = response.headers.get("mcp-session-id", "")
        if session and response.status_code < 300:
            self._sessions[session] = endpoint
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        if request.method == "GET" and not request.headers.get("mcp-session-id"):
            self._stream = endpoint

    async def aclose(self) -> None:
        """See httpx."""
        await self._inner.aclose()


def _nothing() -> None:
    """The end of what is not counted."""


class _Released(httpx.AsyncByteStream):
    """A response's body, which says when it is over."""

    def __init__(self, inner: httpx.AsyncByteStream, release: Callable[[], None]) -> None:
        self._inner = inner
        self._release = release

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._inner)

    async def aclose(self) -> None:
        """See httpx."""
        self._release()
        await self._inner.aclose()
