"""The Engine API of Docker and Podman: finding an engine, asking it, and the one border for its failures.

An engine that can't be reached or breaks off is EngineGone, one that says no is EngineRefused with its own words. Both
are StartFailed, so what is raised during a start needs no second conversion.

This stands on httpcore, which carries our HTTP anyway, and not on httpx: that would cost 2.5 MB and a TLS context for
every transport. Imported by the first container only.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager, suppress
from math import inf
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import attrs
import httpcore
import trio

from gateway.bodies import Body, unwound
from gateway.errors import StartFailed
from gateway.runtimes._keepalive import keepalive
from gateway.trust import private

__all__ = ["Address", "Engine", "EngineGone", "EngineRefused", "Hijacked", "find_engine", "parse_address", "sockets_of"]

NEWEST: Final = (1, 51)
OLDEST: Final = (1, 41)
"""API versions that are spoken: Docker 20.10 (2020) to 28. A newer engine speaks 1.51 as well."""

LIMIT: Final = 20.0
"""Seconds for one answer of an engine, unless the request says otherwise."""
CONNECT_LIMIT: Final = 5.0
"""Seconds for an engine to answer at all."""
MAX_BODY: Final = 16 * 1024 * 1024
MAX_LINE: Final = 1024 * 1024
"""Bytes of an answer, and of a line of one that never ends."""
MAX_REASON: Final = 600
"""Characters of an engine's explanation that are passed on."""
CHUNK: Final = 64 * 1024
UNKNOWN_CLIENT: Final = "it wants another client certificate (cert.pem, key.pem), or one at all"


class EngineGone(StartFailed):
    """The engine can't be reached, does not answer, or has broken off."""


class EngineRefused(StartFailed):
    """The engine has answered with an error: ``answer`` is the HTTP status, ``reason`` what it says."""

    def __init__(self, message: str, answer: int, reason: str) -> None:
        super().__init__(message)
        self.answer = answer
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------- addresses
@attrs.frozen
class Address:
    """Where an engine listens. ``where`` is how it is written; ``certificates`` is the folder for TLS, None without."""

    where: str
    path: str = ""
    host: str = ""
    port: int = 0
    certificates: str | None = None

    @property
    def local(self) -> bool:
        """Whether the engine is on this machine, as far as the address tells."""
        return bool(self.path) or self.host in ("localhost", "127.0.0.1", "::1")


def parse_address(text: str, environ: Mapping[str, str], certificates: str | None = None) -> Address:
    """An address as DOCKER_HOST holds it. ``certificates``: a folder of its own for TLS, whatever the environment says.

    Raises ValueError with a sentence that fits behind the variable's name.
    """
    scheme, separator, rest = text.partition("://")
    if scheme == "unix" and separator:
        path = "/" + rest.lstrip("/")
        if not rest or "\0" in rest:
            raise ValueError("names no socket; write unix:///var/run/docker.sock")
        return Address(f"unix://{path}", path)
    if scheme == "ssh":
        raise ValueError("ssh:// is not supported; forward the engine's socket (ssh -L) and name it as unix://")
    if scheme not in ("tcp", "http", "https") or not separator:
        raise ValueError(f"must begin with unix:// or tcp://, not {text[:40]!r}")
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ValueError(f"can't be read: {error}") from None
    if not host or "@" in url.netloc or url.path.strip("/") or url.query:
        raise ValueError("must be tcp://HOST:PORT")
    secure = certificates is not None or scheme == "https"
    secure = secure or (scheme == "tcp" and environ.get("DOCKER_TLS_VERIFY", "") != "")
    folder = certificates or environ.get("DOCKER_CERT_PATH") or docker_folder(environ) if secure else None
    port = port or (2376 if secure else 2375)
    shown = f"[{host}]" if ":" in host else host
    return Address(f"{scheme}://{shown}:{port}", "", host, port, folder)


def docker_folder(environ: Mapping[str, str]) -> str:
    """Where Docker's own client keeps its configuration."""
    return environ.get("DOCKER_CONFIG") or os.path.join(environ.get("HOME", "/"), ".docker")


@attrs.frozen
class _Context:
    """A Docker context (Docker Desktop and others name their engine so): its address, and its folder for TLS."""

    name: str = ""
    host: str = ""
    certificates: str | None = None

    @property
    def address(self) -> Address:
        """Raises ValueError like ``parse_address``."""
        return parse_address(self.host, {}, self.certificates)


def _context(environ: Mapping[str, str]) -> _Context:
    """The chosen context, an empty one for none. Raises ValueError with a sentence when it can't be read."""
    folder = docker_folder(environ)
    name = environ.get("DOCKER_CONTEXT", "")
    if not name:
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                name = str(json.loads(file.read(MAX_LINE)).get("currentContext") or "")
        except (OSError, ValueError, AttributeError):
            pass  # there is none
    if not name or name == "default":
        return _Context()
    id = hashlib.sha256(name.encode()).hexdigest()
    meta = os.path.join(folder, "contexts", "meta", id, "meta.json")
    certificates = os.path.join(folder, "contexts", "tls", id, "docker")
    try:
        with open(meta, encoding="utf-8") as file:
            found = json.loads(file.read(MAX_LINE))["Endpoints"]["docker"]
        secure = os.path.isdir(certificates) or found.get("SkipTLSVerify")
        return _Context(name, str(found["Host"]), certificates if secure else None)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is no such file"
        raise ValueError(f"docker context {name!r} can't be used: {meta}: {reason}") from None


def _usual(type: str, environ: Mapping[str, str]) -> list[str]:
    """The sockets where such an engine listens when nobody says otherwise, the first to be tried first."""
    runtime, home = environ.get("XDG_RUNTIME_DIR", ""), environ.get("HOME", "")
    if type == "podman":
        own = f"/run/user/{os.getuid()}" if os.getuid() else ""
        found = [f"{folder}/podman/podman.sock" for folder in dict.fromkeys((runtime, own)) if folder.startswith("/")]
        found.append("/run/podman/podman.sock")
        if home.startswith("/"):
            found.append(f"{home}/.local/share/containers/podman/machine/podman.sock")
        return found
    found = ["/var/run/docker.sock"]
    if runtime.startswith("/"):
        found.append(f"{runtime}/docker.sock")
    if home.startswith("/"):
        found.append(f"{home}/.docker/run/docker.sock")
    return found


def _candidates(type: str, host: str, environ: Mapping[str, str]) -> tuple[list[Address], str]:
    """Where to look for the engine, and who says so: "host", a variable, a context, or "" for the usual places.

    Raises StartFailed for an address that can't be used.
    """
    variable = "CONTAINER_HOST" if type == "podman" else "DOCKER_HOST"
    text, source = (host, "host") if host else (environ.get(variable, ""), variable)
    context = _Context()
    if type == "docker":
        try:
            context = _context(environ)
        except ValueError as error:
            if not text:
                raise StartFailed(str(error)) from None
    if not text:
        source = f"docker context {context.name!r}"
    if not (text or context.host):
        return [Address(f"unix://{path}", path) for path in _usual(type, environ)], ""
    try:
        address = parse_address(text, environ) if text else context.address
        if text and address.certificates is None and context.certificates and address.where == context.address.where:
            address = context.address  # a later gateway, which sweeps there, knows the address only
        return [address], source
    except ValueError as error:
        raise StartFailed(f"{source} {error}") from None


def sockets_of(environ: Mapping[str, str]) -> list[str]:
    """Every unix socket at which an engine of either kind may listen for this gateway: none may be mounted."""
    found = [*_usual("docker", environ), *_usual("podman", environ)]
    for text in (environ.get("DOCKER_HOST", ""), environ.get("CONTAINER_HOST", "")):
        with suppress(ValueError):
            found.append(parse_address(text, environ).path)
    with suppress(ValueError):
        found.append(_context(environ).address.path)
    return [path for path in found if path]


# ----------------------------------------------------------------------------------------------------------- an engine
@attrs.define
class Hijacked:
    """A connection that has become a container's streams: a non-blocking descriptor, and what had arrived already.

    The caller closes ``fd``, and may end our direction alone by shutdown.
    """

    fd: int
    early: bytes


class Engine:
    """One engine that has answered. Made by ``find_engine``, which closes it.

    ``name`` is how people know it ("the Docker engine at unix:///run/docker.sock").
    """

    def __init__(self, address: Address, type: str) -> None:
        self.address = address
        self.where = address.where
        self.podman = type == "podman"
        self.prefix = ""
        self._secure = address.certificates is not None
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=None if address.certificates is None else _tls(address.certificates, self.name),
            max_connections=None,  # a hijacked or endless answer holds its connection
            max_keepalive_connections=4,
            keepalive_expiry=30.0,
            http2=False,
            uds=address.path or None,
            socket_options=None if address.path else keepalive(),
            network_backend=httpcore.TrioBackend(),
        )

    def __repr__(self) -> str:
        return f"<Engine {self.where}>"

    @property
    def name(self) -> str:
        """How people know it."""
        return f"the {'Podman' if self.podman else 'Docker'} engine at {self.where}"

    async def aclose(self) -> None:
        """Close every connection."""
        with suppress(OSError, httpcore.NetworkError, trio.BrokenResourceError):
            await self._pool.aclose()

    async def negotiate(self) -> None:
        """Ask who it is, and choose the API version to speak. Raises EngineGone, StartFailed."""
        try:
            found = await self.ask("GET", "/version", limit=CONNECT_LIMIT)
        except EngineGone as gone:
            if not self._secure or "broke off" not in gone.message:
                raise
            # TLS 1.3 refuses a client after its handshake, and the alert may be lost to our request.
            raise EngineGone(f"{gone.message} after the TLS handshake: perhaps {UNKNOWN_CLIENT}") from gone
        if not isinstance(found, dict) or "ApiVersion" not in found:
            raise EngineGone(f"what answers at {self.where} is no container engine")
        components = found.get("Components") or ()
        self.podman = any(isinstance(c, dict) and "Podman" in str(c.get("Name")) for c in components)
        newest, oldest = _version(found["ApiVersion"]), _version(found.get("MinAPIVersion") or "1.0")
        if self.podman:
            newest, oldest = OLDEST, OLDEST  # any version is answered; this is what it implements
        if newest < OLDEST:
            raise StartFailed(f"{self.name} is too old: its API is {_shown(newest)}, {_shown(OLDEST)} is needed")
        if oldest > NEWEST:
            raise StartFailed(
                f"{self.name} is too new: it takes API {_shown(oldest)} and later, this build speaks {_shown(NEWEST)}"
            )
        self.prefix = f"/v{_shown(min(newest, NEWEST))}"

    # -------------------------------------------------------------------------------------------------------- asking
    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        limit: float = LIMIT,
    ) -> Any:
        """The decoded answer; None for an empty one. Raises EngineRefused, EngineGone."""
        with self._border(), trio.move_on_after(limit):
            async with self._request(method, path, query, body) as response:
                data = await _read(response)
                self._check(response.status, data)
                try:
                    return json.loads(data) if data.strip() else None
                except (ValueError, RecursionError) as error:
                    raise EngineGone(f"{self.name} answers what is no JSON: {data[:60]!r}") from error
        raise EngineGone(f"{self.name} has not answered within {limit:g} s")

    @asynccontextmanager
    async def lines(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[AsyncIterator[Any]]:
        """An answer that comes piece by piece: its JSON values, one a line. Use it in ``async with``.

        Raises EngineRefused, EngineGone, also from the iterator.
        """
        with self._border():
            async with self._request(method, path, query, None, headers) as response:
                if response.status >= 400:
                    self._check(response.status, await _read(response))
                async with _chunks(response) as chunks:
                    yield _Values(chunks, self.name)

    async def hijack(self, path: str, query: Mapping[str, str], nursery: trio.Nursery) -> Hijacked:
        """Turn a connection into a container's streams.

        Over TLS, tasks in ``nursery`` carry the bytes; cancelling them ends the connections. Raises EngineRefused,
        EngineGone.
        """
        with self._border(), trio.move_on_after(LIMIT):
            if self._secure:
                read = {name: value for name, value in query.items() if name != "stdin"}
                async with self._upgraded(path, read) as output:
                    if "stdin" not in query:
                        return _carried(output, None, nursery)
                    async with self._upgraded(path, {"stream": "1", "stdin": "1"}) as input:
                        return _carried(output, input, nursery)
            async with self._upgraded(path, query) as stream:
                # The connection's descriptor is ours from here; the pool forgets its own when the block is left.
                fd = os.dup(stream.get_extra_info("socket").fileno())
                early = b""
                with trio.CancelScope(deadline=-inf):  # what came with the answer is there without waiting
                    early = await stream.read(CHUNK)
                return Hijacked(fd, early)
        raise EngineGone(f"{self.name} has not answered within {LIMIT:g} s")

    @asynccontextmanager
    async def _upgraded(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Any]:
        """A connection that is no longer HTTP. Over TLS it stays open after the block."""
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
        async with self._request("POST", path, query, None, headers, keep=self._secure) as response:
            if response.status != 101:
                self._check(response.status, await _read(response))
                raise EngineGone(f"{self.name} does not hand over the container's streams ({response.status})")
            yield response.extensions["network_stream"]

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        keep: bool = False,
    ) -> AsyncIterator[httpcore.Response]:
        """``keep``: a hijacked connection stays open after the block."""
        target = self.prefix + quote(path, safe="/:@") + (f"?{urlencode(query)}" if query else "")
        address = self.address
        sent = [(b"Host", b"docker"), (b"User-Agent", b"open-mcp-gateway")]
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent.append((b"Content-Type", b"application/json"))
        if content is not None or method == "POST":
            sent.append((b"Content-Length", b"%d" % len(content or b"")))
        sent += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        url = httpcore.URL(
            scheme=b"https" if self._secure else b"http",
            host=(address.host or "docker").encode(),
            port=address.port or None,
            target=target.encode(),
        )
        request = httpcore.Request(method, url, headers=sent, content=Body(content or b""))
        response = await self._pool.handle_async_request(request)
        try:
            yield response
        finally:
            if not (keep and response.status == 101):
                with trio.CancelScope(shield=True):
                    await response.aclose()

    def _check(self, status: int, data: bytes) -> None:
        if status < 400:
            return
        reason = data.decode("utf-8", "replace").strip()
        with suppress(ValueError, RecursionError):
            found = json.loads(data)
            if isinstance(found, dict):
                reason = str(found.get("message") or found.get("cause") or reason)
        reason = " ".join(reason.split())[:MAX_REASON] or f"HTTP status {status}"
        raise EngineRefused(f"{self.name} refuses: {reason}", status, reason)

    @contextmanager
    def _border(self) -> Iterator[None]:
        """Turn what httpcore, trio and the system raise into EngineGone (design.md section 10)."""
        try:
            yield
        except (
            httpcore.NetworkError,
            httpcore.TimeoutException,
            httpcore.ProtocolError,
            httpcore.ConnectionNotAvailable,
            OSError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
        ) as error:
            raise EngineGone(f"{self.name} {_reason(error)}") from error


class _Values:
    """The JSON values of an answer that comes line by line."""

    def __init__(self, chunks: AsyncIterator[bytes], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self._buffer = bytearray()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        buffer = self._buffer
        while True:
            end = buffer.find(b"\n")
            if end < 0:
                if len(buffer) > MAX_LINE:
                    raise EngineGone(f"{self._name} answers with a line over {MAX_LINE} bytes")
                try:
                    buffer += await anext(self._chunks)
                    continue
                except StopAsyncIteration:
                    end = len(buffer)
                    if not buffer.strip():
                        raise
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if line.strip():
                try:
                    return json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise EngineGone(f"{self._name} answers what is no JSON: {line[:60]!r}") from error


def _chunks(response: httpcore.Response) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """The body as it comes."""
    chunks: AsyncIterator[bytes] = aiter(response.stream)  # type: ignore[arg-type]
    return unwound(chunks, httpcore.NetworkError, httpcore.ProtocolError)


async def _read(response: httpcore.Response) -> bytes:
    data = bytearray()
    async with _chunks(response) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > MAX_BODY:
                raise EngineGone(f"the engine's answer is over {MAX_BODY} bytes")
    return bytes(data)


def _version(text: object) -> tuple[int, int]:
    major, _, minor = str(text).partition(".")
    try:
        return int(major), int(minor.partition(".")[0] or 0)
    except ValueError:
        raise StartFailed(f"the engine has an API version that can't be read: {str(text)[:20]!r}") from None


def _shown(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _reason(error: BaseException) -> str:
    """The cause as the rest of a sentence, from the deepest exception that knows it."""
    connecting = isinstance(error, (httpcore.ConnectError, httpcore.ConnectTimeout))
    at: BaseException | None = error
    deepest: OSError | None = None
    while at is not None:
        if isinstance(at, ssl.SSLError):
            return f"can't be reached: TLS failed: {_verdict(at)}"
        if isinstance(at, OSError):
            deepest = at
        at = at.exceptions[-1] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__
    if deepest is not None:
        number = deepest.errno or 0
        text = (os.strerror(number) if number > 0 else deepest.strerror or str(deepest)).lower()
        if isinstance(deepest, PermissionError):
            text += "; may the gateway's user use it (group docker)?"
        return f"can't be reached: {text}" if connecting else f"broke off: {text}"
    return "can't be reached" if connecting else "broke off"


def _verdict(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return error.verify_message
    reason = error.reason or "broken handshake"
    if "_ALERT_" in reason and ("CERTIFICATE" in reason or reason.endswith("_UNKNOWN_CA")):
        return f"{UNKNOWN_CLIENT} ({reason})"
    return "what listens there speaks no TLS" if reason == "WRONG_VERSION_NUMBER" else reason


def _tls(folder: str, name: str) -> ssl.SSLContext:
    """The context of a folder with ca.pem, cert.pem and key.pem, as Docker's client has it. Raises StartFailed.

    As with that, cert.pem and key.pem may both be missing: an engine may trust everybody.
    """
    ca, cert, key = (os.path.join(folder, each) for each in ("ca.pem", "cert.pem", "key.pem"))
    shown = any(map(os.path.lexists, (cert, key)))
    needed = (ca, cert, key) if shown else (ca,)
    missing = [os.path.basename(path) for path in needed if not os.path.lexists(path)]
    reason = f"there is no {' and no '.join(missing)}"
    try:
        if not missing:
            context = private(ssl.create_default_context(cafile=ca))
            if shown:
                context.load_cert_chain(cert, key, password="")  # or it asks at the terminal
            return context
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise StartFailed(f"the certificates for {name} in {folder!r} (ca.pem, cert.pem, key.pem) can't be used: {reason}")


def _carried(output: Any, input: Any, nursery: trio.Nursery) -> Hijacked:
    """TLS streams behind a local socket, so that whoever holds the container's streams need not know of TLS.

    One direction of TLS can't be ended alone, so each has a connection: a container with StdinOnce takes the end of
    ``input`` for the end of its stdin, and its last words still come.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    local = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    broken = (httpcore.NetworkError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)

    async def end(stream: Any) -> None:
        with trio.move_on_after(1, shield=True), suppress(*broken):
            await stream.aclose()

    async def outwards() -> None:
        try:
            with suppress(*broken):
                while data := await local.receive_some(CHUNK):
                    await input.write(data)
        finally:
            await end(input)

    async def inwards() -> None:
        try:
            with suppress(*broken):
                while data := await output.read(CHUNK):
                    await local.send_all(data)
                await local.send_eof()
        finally:
            await end(output)

    async def carry() -> None:
        with closing(local.socket):
            async with trio.open_nursery() as both:
                both.start_soon(inwards)
                if input is not None:
                    both.start_soon(outwards)

    nursery.start_soon(carry)
    return Hijacked(ours.detach(), b"")


# ------------------------------------------------------------------------------------------------------------ finding
@asynccontextmanager
async def find_engine(
    type: str,
    host: str,
    environ: Mapping[str, str],
    *,
    waiting: Callable[[str], float] = lambda where: 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Engine]:
    """The first engine that answers, for as long as the block lasts.

    ``waiting(where)`` gives the seconds for which an engine that does not answer is waited for (it was there before);
    ``progress`` is told so.
    Raises StartFailed that names every place tried, and why each failed.
    """
    addresses, source = _candidates(type, host, environ)
    failures: list[str] = []
    for address in addresses:
        engine = Engine(address, type)
        try:
            try:
                await _reach(engine, waiting(address.where), progress)
            except EngineGone as error:
                reason = error.message.removeprefix(f"{engine.name} ").removeprefix("can't be reached: ")
                failures.append(f"{address.where} ({reason})")
                continue
            yield engine
            return
        finally:
            with trio.CancelScope(shield=True):
                await engine.aclose()
    kind = "Podman" if type == "podman" else "Docker"
    if source:
        raise EngineGone(f"the {kind} engine at {failures[0]} can't be reached; its address comes from {source}")
    variable = "CONTAINER_HOST" if type == "podman" else "DOCKER_HOST"
    tried = ", ".join(failures)
    raise EngineGone(f"no {kind} engine can be reached: tried {tried}; start it, or set {variable} or host")


async def _reach(engine: Engine, patience: float, progress: Callable[[str], None]) -> None:
    until = trio.current_time() + patience
    pause = 0.1
    while True:
        try:
            return await engine.negotiate()
        except EngineGone:
            if trio.current_time() + pause > until:
                raise
        progress(f"waiting for {engine.name}")
        await trio.sleep(pause)
        pause = min(pause * 2, 1.0)
