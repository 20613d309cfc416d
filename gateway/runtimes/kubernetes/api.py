"""Kubernetes' API for the runtimes that need it: requests, watches, WebSockets. Not a runtime.

    async with open_cluster(context, environ) as cluster:       # StartFailed names what was tried
        pod = await cluster.get("/api/v1/namespaces/mcp/pods/x")
        await cluster.create("/apis/batch/v1/namespaces/mcp/jobs", job)

``cluster.access`` says which cluster it is (``server``, ``namespace``, ``context``, ``described``). Then:

    get, list_all, create, replace, patch, delete    JSON in, JSON out; ``request`` is what they stand on
    text, version                                    a pod's log; Kubernetes' version
    watch                                            every object that matches, and each change, for ever
    upgrade                                          a WebSocket (``kubernetes.websocket.Socket``): attach, port-forward
    transport                                        httpx's transport with our credentials: the API's service proxy

``path`` is an absolute path of the API, its parts quoted (``path_of``); ``params`` become the query. Objects are plain
dictionaries, as Kubernetes sends them. What goes wrong is Refused (Kubernetes' own answer: ``http_status``, ``reason``,
``message``) or Unreachable (no answer), both StartFailed. 429 is tried again when its Retry-After has passed, every
other failure only where nothing can happen twice and for ``patience`` seconds. 401 has rotated credentials read again.

httpx and ssl are imported here: import this module only where a server is started.
"""

from __future__ import annotations

import json
import os
import random
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import quote, urlencode

import httpcore
import httpx
import trio
from httpcore._backends.trio import TrioBackend, TrioStream

from gateway.bodies import Body, unwound
from gateway.errors import StartFailed
from gateway.runtimes._keepalive import keepalive
from gateway.runtimes.kubernetes.access import Access, Credentials, find_access, tls_context
from gateway.runtimes.kubernetes.websocket import Broken, Socket, dial, message_of

__all__ = ["Cluster", "OnEvent", "Refused", "RequestBody", "Unreachable", "on_cluster", "open_cluster", "path_of"]

Object = dict[str, Any]
Params = Mapping[str, str | int | bool]
Kind = Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]
OnEvent = Callable[[Kind, Object], None]
Patch = Literal["merge", "strategic", "json", "apply"]

AGENT: Final = "open-mcp-gateway"
CONNECT_LIMIT: Final = 5.0
READ_LIMIT: Final = 20.0
"""Seconds of silence in the middle of an answer."""
PATIENCE: Final = 3.0
"""Seconds for which a request that may be repeated is."""
RETRY_AFTER: Final = 30.0
"""Seconds that 429 may make a request wait in all."""
MAX_ANSWER: Final = 32 * 1024 * 1024
PAGE: Final = 500
WATCH_SECONDS: Final = 20
"""For which a watch runs. Kubernetes then ends it with a bookmark, so a connection that is silently dead is noticed
within WATCH_SLACK more, and changes reach callers within RB64's 30 s whatever happens between."""
WATCH_SLACK: Final = 5.0
MAX_PAUSE: Final = 5.0
"""Seconds between two attempts to take up a watch."""
MAX_LINE: Final = 8 * 1024 * 1024

_PATCHES: Final[Mapping[Patch, str]] = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}


class Refused(StartFailed):
    """Kubernetes said no. ``reason`` is its word ("NotFound", "AlreadyExists", "Forbidden", ...), ``said`` its text,
    ``wait`` its Retry-After in seconds.
    """

    def __init__(
        self,
        message: str,
        http_status: int = 0,
        reason: str = "",
        said: str = "",
        wait: float | None = None,
        **given: Any,
    ) -> None:
        super().__init__(message, **given)
        self.http_status = http_status
        self.reason = reason
        self.said = said
        self.wait = wait


class Unreachable(StartFailed):
    """No answer, or one that is not Kubernetes'. Whether the request was carried out is unknown if ``sent``."""

    def __init__(self, message: str, *, sent: bool = False, **given: Any) -> None:
        super().__init__(message, **given)
        self.sent = sent


def path_of(namespace: str, plural: str, *rest: str, group: str = "") -> str:
    """``path_of("mcp", "pods", "x", "log")``; ``group`` such as "batch/v1" is the core API's v1 when empty."""
    root = f"/apis/{group}" if group else "/api/v1"
    parts = "/".join(quote(each, safe="") for each in (namespace, plural, *rest))
    return f"{root}/namespaces/{parts}"


# -------------------------------------------------------------------------------------------------------------- cluster
@asynccontextmanager
async def open_cluster(context: str | None, environ: Mapping[str, str]) -> AsyncIterator[Cluster]:
    """The cluster that ``context`` and the environment mean (``kubernetes.access``), for as long as the block lasts.

    Connects nowhere yet. Raises StartFailed.
    """
    access = await trio.to_thread.run_sync(find_access, context, environ)
    async with on_cluster(access, environ) as cluster:
        yield cluster


@asynccontextmanager
async def on_cluster(access: Access, environ: Mapping[str, str]) -> AsyncIterator[Cluster]:
    """As ``open_cluster``, where the access is known already."""
    credentials = Credentials(access, environ)
    await credentials.headers()  # a plugin may bring a certificate
    cluster = Cluster(access, environ, credentials)
    await cluster._prepare()
    try:
        yield cluster
    finally:
        with trio.CancelScope(shield=True):
            await cluster._client.aclose()


class RequestBody(Body, httpx.AsyncByteStream):
    """As httpx insists on it."""


class Cluster:
    """One API and our right to it. Made by ``open_cluster``. All its methods may be used by several tasks at once."""

    def __init__(self, access: Access, environ: Mapping[str, str], credentials: Credentials) -> None:
        self.access = access
        self._environ = environ
        self._credentials = credentials
        self._certificate: tuple[str, str] | None = None
        self._version: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"<Cluster {self.access}>"

    async def _prepare(self) -> None:
        """The TLS context and the client, anew when our certificate is another one."""
        self._certificate = self._credentials.certificate
        self._tls = None
        if self.access.server.startswith("https:"):
            self._tls = await trio.to_thread.run_sync(tls_context, self.access, self._certificate, self._environ)
        self._client = httpx.AsyncClient(
            transport=self._bare_transport(),
            trust_env=False,
            timeout=httpx.Timeout(READ_LIMIT, connect=CONNECT_LIMIT),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": AGENT},
        )

    def _bare_transport(self) -> httpx.AsyncHTTPTransport:
        proxy = self.access.proxy
        if proxy is not None and not proxy.startswith("http://"):
            scheme = proxy.partition(":")[0][:20]
            raise StartFailed(f"Kubernetes ({self.access}): only http:// proxies can be used, not {scheme}://")
        return _Transport(self._tls, proxy)

    def transport(self) -> httpx.AsyncBaseTransport:
        """Carries a server's own requests through the API (``.../services/NAME:PORT/proxy/...``) as us.

        The caller closes it. A request that is refused with 401 is not repeated: the next one has new credentials.
        """
        return _Authorized(self._bare_transport(), self._credentials, self.access.server_name)

    # ------------------------------------------------------------------------------------------------------- requests
    async def version(self) -> tuple[int, int]:
        """Kubernetes' own, such as (1, 37); (0, 0) where it does not say."""
        if self._version is None:
            try:
                found = await self.get("/version", patience=0)
                digits = (re.match(r"\d+", str(found.get(key, ""))) for key in ("major", "minor"))
                major, minor = (int(each[0]) if each else 0 for each in digits)
                self._version = (major, minor)
            except StartFailed:
                self._version = (0, 0)
        return self._version

    async def get(self, path: str, params: Params | None = None, *, patience: float = PATIENCE) -> Object:
        """One object."""
        return await self.request("GET", path, params, patience=patience)

    async def list_all(self, path: str, params: Params | None = None) -> tuple[list[Object], str]:
        """Every object that matches, and the version to watch from. Raises Refused 410 if it took too long."""
        found: list[Object] = []
        query = {"limit": PAGE, **(params or {})}
        while True:
            page = await self.get(path, query)
            found += page.get("items") or []
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                return found, str(meta.get("resourceVersion") or "")
            query["continue"] = str(meta["continue"])

    async def create(self, path: str, body: Object, *, patience: float = PATIENCE) -> Object:
        """Never sent twice, but where Kubernetes says that it did nothing. Unreachable.sent: it may exist now."""
        return await self.request("POST", path, body=body, patience=patience)

    async def replace(self, path: str, body: Object) -> Object:
        """The whole object; with its resourceVersion in it, Refused 409 if somebody else was faster."""
        return await self.request("PUT", path, body=body)

    async def patch(self, path: str, body: Any, *, kind: Patch = "merge", params: Params | None = None) -> Object:
        """``apply`` needs ``fieldManager`` in ``params``."""
        return await self.request("PATCH", path, params, body=body, content_type=_PATCHES[kind])

    async def delete(
        self,
        path: str,
        *,
        uid: str | None = None,
        propagation: Literal["Foreground", "Background", "Orphan"] = "Background",
        grace: int | None = None,
        patience: float = PATIENCE,
    ) -> bool:
        """Whether there was one to delete. ``uid``: only that very object, False when another one bears the name."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        try:
            await self.request("DELETE", path, body=body, patience=patience)
        except Refused as error:
            if error.http_status == 404 or (error.http_status == 409 and uid is not None):
                return False
            raise
        return True

    async def text(self, path: str, params: Params | None = None) -> str:
        """What is no JSON, such as a log."""
        return (await self._request("GET", path, params, None, "", PATIENCE)).decode("utf-8", "replace")

    async def request(
        self,
        method: str,
        path: str,
        params: Params | None = None,
        *,
        body: Any = None,
        content_type: str = "application/json",
        patience: float = PATIENCE,
    ) -> Object:
        """See the module. ``patience`` inf: as long as the caller has."""
        data = await self._request(method, path, params, body, content_type, patience)
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Unreachable(f"Kubernetes ({self.access}) answered {method} {path} with no JSON object", sent=True)
        return found

    async def _request(
        self, method: str, path: str, params: Params | None, body: Any, content_type: str, patience: float
    ) -> bytes:
        content = None if body is None else json.dumps(body).encode()
        started = trio.current_time()
        pause, renewed = 0.2, False
        while True:
            failure: Refused | Unreachable
            try:
                return await self._once(method, path, params, content, content_type)
            except Refused as error:
                failure = error
                if error.http_status == 401 and not renewed and await self._renew():
                    renewed = True
                    continue
                busy = error.http_status == 429 or (error.http_status >= 500 and error.wait is not None)
                again = busy or (error.http_status >= 500 and method == "GET")
                limit, wait = max(patience, RETRY_AFTER if busy else 0), error.wait or pause
            except Unreachable as error:
                failure = error
                again, limit, wait = method in ("GET", "DELETE") or not error.sent, patience, pause
            if not again or trio.current_time() + wait > started + limit:
                raise failure
            await trio.sleep(wait)
            pause = min(pause * 2, MAX_PAUSE)

    async def _once(
        self, method: str, path: str, params: Params | None, content: bytes | None, content_type: str
    ) -> bytes:
        sent = False
        try:
            async with self._stream(method, path, params, content, content_type) as (response, pieces):
                sent = True
                data = bytearray()
                async for piece in pieces:
                    data += piece
                    if len(data) > MAX_ANSWER:
                        raise Unreachable(f"{method} {path}: an answer of over {MAX_ANSWER} bytes", sent=True)
                if response.status_code >= 300:
                    raise self._refusal(f"{method} {path}", response.status_code, response.headers, bytes(data))
                return bytes(data)
        except (httpx.HTTPError, OSError) as error:
            sent = sent or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            raise self._unreachable(error, sent) from error

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        path: str,
        params: Params | None,
        content: bytes | None,
        content_type: str,
        read_limit: float = READ_LIMIT,
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
        """An answer and its body as it comes."""
        headers = await self._credentials.headers()
        if content is not None:
            headers.append(("Content-Type", content_type))
        extensions: dict[str, Any] = {
            "timeout": {"connect": CONNECT_LIMIT, "read": read_limit, "write": READ_LIMIT, "pool": CONNECT_LIMIT}
        }
        if self.access.server_name:
            extensions["sni_hostname"] = self.access.server_name
        url = self._url(path, params)
        request = self._client.build_request(method, url, headers=headers, content=content, extensions=extensions)
        if content is not None:
            request.stream = RequestBody(content)
        response = await self._client.send(request, stream=True)
        try:
            async with unwound(aiter(response.stream), httpx.HTTPError) as pieces:  # type: ignore[arg-type]
                yield response, pieces
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()

    def _url(self, path: str, params: Params | None) -> str:
        query = urlencode({name: _query_value(value) for name, value in (params or {}).items()})
        return f"{self.access.server}{path}" + (f"?{query}" if query else "")

    async def _renew(self) -> bool:
        """Our credentials were refused: whether there may be others now. Raises StartFailed when a plugin fails."""
        if not self._credentials.refused():
            return False
        await self._credentials.headers()
        if self._credentials.certificate != self._certificate:
            former = self._client
            await self._prepare()
            await former.aclose()
        return True

    # --------------------------------------------------------------------------------------------------------- errors
    def _refusal(self, what: str, status: int, headers: Mapping[str, str], body: bytes) -> Refused:
        found = message_of(body)
        said = str(found.get("message") or body[:200].decode("utf-8", "replace").strip() or "no message")[:2000]
        reason = str(found.get("reason") or "")
        wait = headers.get("retry-after", "")
        text = f"Kubernetes ({self.access}) refused {what}: {said} ({status}{f' {reason}' if reason else ''})"
        return Refused(text, status, reason, said, float(wait) if wait.isdigit() else None)

    def _unreachable(self, error: Exception, sent: bool) -> Unreachable:
        reason = reason_of(error)
        doing = "did not answer" if sent else "can't be reached"
        return Unreachable(f"Kubernetes ({self.access}) {doing}: {reason}", sent=sent)

    # ---------------------------------------------------------------------------------------------------------- watch
    async def watch(
        self,
        path: str,
        on_event: OnEvent,
        params: Params | None = None,
        *,
        on_trouble: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Tell ``on_event`` of every object that matches and of each change, until cancelled. Never raises.

        First ("ADDED", object) for all there are, then ("SYNCED", {}); then changes as they come. Whatever happens
        between, nothing is missed: a watch that ends goes on where it was, and one that can't (410) begins with a new
        list, of which only the differences are told, objects that are gone as ("DELETED", what they last were), and
        ("SYNCED", {}) again. ``on_event`` is synchronous and raises nothing. ``on_trouble`` hears why nothing can be
        watched just now, and "" when it works again.
        """
        seen = _Seen()
        pause = 0.0
        while True:
            began = trio.current_time()
            wait = None
            try:
                if not seen.version:
                    await self._relist(path, params, seen, on_event)
                await self._follow(path, params, seen, on_event, on_trouble)
            except Refused as error:
                wait = error.wait
                on_trouble(error.message)
                if error.http_status == 401:
                    on_trouble(await self._renewed() or error.message)
                elif error.http_status == 410 or "resource version" in error.said.lower():
                    seen.version = ""  # too old; or 504: one of the future, after a restored backup
            except StartFailed as error:
                on_trouble(error.message)
            # A watch that lasted ends in good order, one that did not is not taken up again all the time.
            pause = 0.0 if trio.current_time() - began > MAX_PAUSE else min(MAX_PAUSE, pause * 2 or 0.1)
            await trio.sleep(wait if wait is not None else pause * random.uniform(0.8, 1.2))

    async def _renewed(self) -> str:
        """Why there are no new credentials, "" if there may be."""
        try:
            await self._renew()
        except StartFailed as error:
            return error.message
        return ""

    async def _relist(self, path: str, params: Params | None, seen: _Seen, on_event: OnEvent) -> None:
        found, version = await self.list_all(path, params)
        now = {_uid(each): each for each in found}
        known = seen.known
        for uid in [uid for uid in known if uid not in now]:
            on_event("DELETED", known.pop(uid))
        for uid, each in now.items():
            former = known.get(uid)
            known[uid] = each
            if former is None:
                on_event("ADDED", each)
            elif _version(former) != _version(each):
                on_event("MODIFIED", each)
        seen.version = version
        on_event("SYNCED", {})

    async def _follow(
        self,
        path: str,
        params: Params | None,
        seen: _Seen,
        on_event: OnEvent,
        on_trouble: Callable[[str], None],
    ) -> None:
        """Follow from ``seen.version`` on until the watch ends, in good order or not."""
        query: dict[str, str | int | bool] = dict(params or {})
        query |= {"watch": True, "allowWatchBookmarks": True, "timeoutSeconds": WATCH_SECONDS}
        query["resourceVersion"] = seen.version
        buffer = b""
        up = False
        try:
            async with self._stream("GET", path, query, None, "", WATCH_SECONDS + WATCH_SLACK) as (response, pieces):
                if response.status_code != 200:
                    body = b"".join([piece async for piece in pieces])
                    raise self._refusal(f"the watch of {path}", response.status_code, response.headers, body)
                up = True
                on_trouble("")
                async for piece in pieces:
                    *lines, buffer = (buffer + piece).split(b"\n")
                    for line in lines:
                        self._event(line, seen, on_event)
                    if len(buffer) > MAX_LINE:
                        raise Unreachable(f"the watch of {path}: an event of over {MAX_LINE} bytes", sent=True)
        except (httpx.HTTPError, OSError) as error:
            if not up:  # else it was cut: whether that matters shows when it is taken up again, at once
                raise self._unreachable(error, sent=False) from error

    def _event(self, line: bytes, seen: _Seen, on_event: OnEvent) -> None:
        if not line.strip():
            return
        try:
            event = json.loads(line)
            kind, found = event["type"], event["object"]
        except (ValueError, LookupError, TypeError):
            raise Unreachable(f"Kubernetes ({self.access}) sent a watch event that is none", sent=True) from None
        if kind == "ERROR":
            said = str(found.get("message") or "no message")
            wait = (found.get("details") or {}).get("retryAfterSeconds")
            text = f"Kubernetes ({self.access}) ended a watch: {said}"
            raise Refused(text, int(found.get("code") or 500), str(found.get("reason") or ""), said, wait)
        seen.version = _version(found) or seen.version
        if kind == "BOOKMARK":
            return
        if kind == "DELETED":
            seen.known.pop(_uid(found), None)
        else:
            seen.known[_uid(found)] = found
        on_event(kind, found)

    # ------------------------------------------------------------------------------------------------------ websocket
    async def upgrade(
        self, path: str, params: Sequence[tuple[str, str]], protocols: Sequence[str], *, limit: float = 10.0
    ) -> Socket:
        """A WebSocket, which the caller closes. Raises Refused or Unreachable, within ``limit`` seconds."""
        url = f"{self.access.server}{path}?{urlencode(params)}"
        renewed = False
        while True:
            headers = await self._credentials.headers()
            try:
                with trio.fail_after(limit):
                    answer = await dial(
                        url,
                        [*headers, ("User-Agent", AGENT)],
                        protocols,
                        self._tls,
                        server_name=self.access.server_name,
                        proxy=self.access.proxy,
                    )
            except trio.TooSlowError:
                raise Unreachable(f"Kubernetes ({self.access}) did not answer within {limit:g} s", sent=True) from None
            except (OSError, Broken) as error:
                raise self._unreachable(error, sent=True) from error
            if answer.socket is not None:
                return answer.socket
            if answer.status == 401 and not renewed and await self._renew():
                renewed = True
                continue
            raise self._refusal(f"GET {path}", answer.status, answer.headers, answer.body)


class _Seen:
    """What a watch knows: the objects by uid, and the version to go on from, "" when only a new list will do."""

    def __init__(self) -> None:
        self.version = ""
        self.known: dict[str, Object] = {}


class _Stream(TrioStream):
    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            return await super().start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            # httpcore closes it after errors only, not when cancelled.
            await trio.aclose_forcefully(self._stream)
            raise


class _Backend(TrioBackend):
    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(*args, **options)
        assert isinstance(stream, TrioStream)
        return _Stream(stream._stream)


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over a pool of ours: no limit on connections, each noticed when its peer is silently gone."""

    def __init__(self, context: ssl.SSLContext | None, proxy: str | None) -> None:
        # Not super().__init__(): its pool leaves the socket of a cancelled handshake to the collector.
        options: dict[str, Any] = {
            "ssl_context": context,
            "max_connections": None,
            "max_keepalive_connections": None,
            "keepalive_expiry": 30,
            "socket_options": keepalive(),
            "network_backend": _Backend(),
        }
        if proxy is None:
            self._pool = httpcore.AsyncConnectionPool(**options)
        else:
            url = httpx.Proxy(proxy)
            self._pool = httpcore.AsyncHTTPProxy(str(url.url), proxy_auth=url.raw_auth, **options)


class _Authorized(httpx.AsyncBaseTransport):
    """Adds our credentials to every request."""

    def __init__(self, inner: httpx.AsyncBaseTransport, credentials: Credentials, server_name: str | None) -> None:
        self._inner = inner
        self._credentials = credentials
        self._server_name = server_name

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        for name, value in await self._credentials.headers():
            request.headers[name] = value
        if self._server_name:
            request.extensions = {**request.extensions, "sni_hostname": self._server_name}
        response = await self._inner.handle_async_request(request)
        if response.status_code == 401:
            self._credentials.refused()
        return response

    async def aclose(self) -> None:
        """See httpx."""
        await self._inner.aclose()


def _uid(found: Object) -> str:
    meta = found.get("metadata") or {}
    return str(meta.get("uid") or f"{meta.get('namespace')}/{meta.get('name')}")


def _version(found: Object) -> str:
    return str((found.get("metadata") or {}).get("resourceVersion") or "")


def _query_value(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def reason_of(error: BaseException) -> str:
    """The cause in a few words, from the deepest exception that knows it."""
    at: BaseException | None = error
    deepest: OSError | None = None
    while at is not None:
        if isinstance(at, ssl.SSLCertVerificationError):
            return f"TLS certificate refused: {at.verify_message}"
        if isinstance(at, ssl.SSLError):
            return f"TLS failed: {at.reason or 'broken handshake'}"
        if isinstance(at, OSError):
            deepest = at
        at = at.exceptions[0] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__
    if deepest is not None:
        return (os.strerror(deepest.errno) if deepest.errno and deepest.errno > 0 else str(deepest)).lower()
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error)[:200] or type(error).__name__
