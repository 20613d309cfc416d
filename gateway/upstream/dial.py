"""Reaching an Origin: the address policy, connecting, TLS, and the border where httpx's failures get names.

Two rules hold here. A connection goes to the very address that was checked, so that a name can't change its mind
between the check and the connect (robustness RB55). And every failure leaves as a GatewayError that names the cause and
never shows the URL's query or user info, nor a header's value (RB50).

Proxies named in the environment are not used: they would resolve the name themselves, past the policy, and see where
credentials go. Redirects, cookies and compression are not used either: requests go straight to the transport.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, NoReturn

import attrs
import httpcore
import httpx
import trio
from httpcore._backends.trio import TrioStream  # TLS over a socket that we have connected ourselves

from gateway.errors import GatewayError, LinkLost, ServerProtocolError, StartFailed, UpstreamError
from gateway.runtimes.base import Origin
from gateway.trust import public_context

__all__ = ["CONNECT_LIMIT", "Dialer", "Target", "border", "classify", "open_transport", "shown"]

CONNECT_LIMIT: Final = 10.0
"""Seconds for resolving, connecting and the TLS handshake together."""
KEEP_ALIVE: Final = 4.0
"""Seconds an idle connection is kept: less than the 5 s after which node's and uvicorn's servers close theirs, so that
a request seldom meets a closing connection (RB54)."""
STAGGER: Final = 0.25
"""Seconds before the next address of a name is tried beside a silent one (RFC 8305)."""
MAX_ADDRESSES: Final = 8
MAX_LOOKUPS: Final = 20
"""Threads that may wait for the resolver; a hanging one costs nobody else's threads."""

Address = tuple[int, Any]
"""Address family and socket address."""
Resolver = Callable[[str, int], Awaitable[list[Address]]]


# --------------------------------------------------------------------------------------------------------- the policy
METADATA: Final = frozenset(("169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254"))
"""Where clouds give machine credentials to whoever asks: AWS, Azure, Google, Alibaba."""
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def classify(address: str) -> str:
    """ "public", "private" (this host and its networks), or "special": link-local, metadata and multicast.

    An IPv6 address that carries an IPv4 one (mapped, NAT64, 6to4) is what that one is.
    """
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip.ipv4_mapped is not None:
            return classify(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return classify(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.sixtofour is not None:
            return classify(str(ip.sixtofour))
    if str(ip) in METADATA or ip.is_link_local or ip.is_multicast:
        return "special"
    return "public" if ip.is_global else "private"


def odd_literal(host: str) -> bool:
    """Whether a host is an IP address in a spelling that readers and filters take for something else (2130706433,
    0x7f.1, 127.1, 0177.0.0.1, ::ffff:127.0.0.1)."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        try:
            socket.inet_aton(host)
        except OSError:
            return False
        return True
    return str(ip) != host.lower() or getattr(ip, "ipv4_mapped", None) is not None


_pins: trio.lowlevel.RunVar[dict[str, str]] = trio.lowlevel.RunVar("pins")
"""The class that each name had when it was first resolved, for as long as the gateway runs."""


def permitted(host: str, addresses: Sequence[Address], allow_private: bool | str) -> list[Address]:
    """The addresses that may be connected to. Raises httpcore.ConnectError, saying why, when there are none (RB55)."""
    if allow_private is True:
        return list(addresses)
    if odd_literal(host):
        _refuse(f"'{host}' is an unusual spelling of an IP address; write it plainly or set allow_private: true")
    classes = [(classify(address[1][0]), address) for address in addresses]
    usable = [(kind, address) for kind, address in classes if kind != "special"]
    if not usable:
        _refuse(f"{_names(classes)} is a link-local, metadata or multicast address, which needs allow_private: true")
    if allow_private is False:
        wanted, why = "public", "allow_private is false"
    else:
        try:
            pins = _pins.get()
        except LookupError:
            pins = {}
            _pins.set(pins)
        first = "public" if any(kind == "public" for kind, _ in usable) else "private"
        wanted = pins.setdefault(host, first)
        why = (
            f"'{host}' was {wanted} when it was first used and must stay so; if the change is meant, "
            "restart the gateway or set allow_private"
        )
    chosen = [address for kind, address in usable if kind == wanted]
    if not chosen:
        _refuse(f"{_names(usable)} is a {usable[0][0]} address: {why}")
    return chosen


def _names(addresses: Sequence[tuple[str, Address]]) -> str:
    return ", ".join(str(address[1][0]) for _, address in addresses[:3])


def _refuse(text: str) -> NoReturn:
    raise httpcore.ConnectError(text)


# --------------------------------------------------------------------------------------------------------- connecting
_lookups: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("lookups")


async def resolve(host: str, port: int) -> list[Address]:
    """The system resolver, in a thread that is given up on cancellation. Raises socket.gaierror."""
    try:
        limiter = _lookups.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MAX_LOOKUPS)
        _lookups.set(limiter)

    def look_up() -> list[Any]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=limiter)
    return [(family, address) for family, _, _, _, address in found]


class Dialer(httpcore.AsyncNetworkBackend):
    """httpcore's door to the network, with the policy in it. ``resolve_host`` is the resolver (tests bring theirs)."""

    def __init__(self, allow_private: bool | str = "auto", resolve_host: Resolver = resolve) -> None:
        self._allow_private = allow_private
        self._resolve = resolve_host

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to a permitted address of ``host``. Raises httpcore.ConnectError or ConnectTimeout."""
        limit = CONNECT_LIMIT if timeout is None else timeout
        started = trio.current_time()
        with trio.move_on_after(limit):
            try:
                addresses = await self._resolve(host, port)
            except socket.gaierror as error:
                raise httpcore.ConnectError(f"the name '{host}' can't be resolved ({error.strerror})") from error
            except UnicodeError as error:
                raise httpcore.ConnectError(f"the name '{host}' is no host name") from error
            stream = await _first_to_connect(permitted(host, addresses, self._allow_private)[:MAX_ADDRESSES])
            # A peer that vanished without a word would otherwise hold an event stream open for ever.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
            return _Stream(stream, started + limit)
        raise httpcore.ConnectTimeout(f"no connection within {limit:g} s")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Unix sockets come with an Origin's own transport."""
        raise httpcore.ConnectError("unix sockets are not reached by URL")

    async def sleep(self, seconds: float) -> None:
        """For httpcore's own retries, which are switched off."""
        await trio.sleep(seconds)


class _Stream(TrioStream):
    """A connection whose TLS handshake gets what connecting has left of the connect limit."""

    def __init__(self, stream: trio.SocketStream, deadline: float) -> None:
        super().__init__(stream)
        self._deadline = deadline

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        left = max(0.01, self._deadline - trio.current_time())
        try:
            return await super().start_tls(ssl_context, server_hostname, left)
        except BaseException:
            # httpcore closes it after errors only, not when cancelled.
            await trio.aclose_forcefully(self._stream)
            raise


async def _connect(address: Address) -> trio.SocketStream:
    sock = trio.socket.socket(address[0], socket.SOCK_STREAM)
    try:
        await sock.connect(address[1])
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


async def _first_to_connect(addresses: Sequence[Address]) -> trio.SocketStream:
    """The first connection that succeeds, each address STAGGER after the one before. Raises httpcore.ConnectError."""
    winner: trio.SocketStream | None = None
    errors: list[OSError] = []

    async def attempt(address: Address, failed: trio.Event) -> None:
        nonlocal winner
        try:
            stream = await _connect(address)
        except OSError as error:
            errors.append(error)
            failed.set()
            return
        if winner is None:
            winner = stream
            nursery.cancel_scope.cancel()
        else:
            stream.socket.close()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(STAGGER):
                    await failed.wait()
    except BaseException:
        if winner is not None:
            winner.socket.close()
        raise
    if winner is not None:
        return winner
    reasons = dict.fromkeys(_os_reason(error) for error in errors)
    raise httpcore.ConnectError(" / ".join(reasons) or "the name has no address") from (errors[0] if errors else None)


def _os_reason(error: OSError) -> str:
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over our own pool: HTTP/1.1, no proxy, no limit on connections (the unit has one on calls)."""

    def __init__(self, dialer: Dialer, context: ssl.SSLContext | None) -> None:
        # Not super().__init__(): it would build a second TLS context and a pool that resolves for itself.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=None,  # httpcore counts busy ones too; the expiry bounds the idle ones
            keepalive_expiry=KEEP_ALIVE,
            network_backend=dialer,
        )


@lru_cache(maxsize=2)
def _tls_context(cert_file: str, cert_dir: str) -> ssl.SSLContext:
    return public_context({"SSL_CERT_FILE": cert_file, "SSL_CERT_DIR": cert_dir})


def open_transport(origin: Origin, *, resolve_host: Resolver = resolve) -> httpx.AsyncBaseTransport:
    """What carries the requests to an origin: its own transport, or ours. The caller closes it.

    Certificates are checked against SSL_CERT_FILE and SSL_CERT_DIR when set, else certifi's. Raises StartFailed.
    """
    if origin.transport is not None:
        transport: httpx.AsyncBaseTransport = origin.transport()
        return transport
    context = None
    if origin.url[:6].lower() == "https:":
        try:
            context = _tls_context(os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", ""))
        except OSError as error:
            raise StartFailed(f"The certificates of SSL_CERT_FILE or SSL_CERT_DIR can't be loaded: {error}") from error
    return _Transport(Dialer(origin.allow_private, resolve_host), context)


# --------------------------------------------------------------------------------------------------------- the target
_RESERVED: Final = frozenset(
    (
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "expect",
        "keep-alive",
        "last-event-id",
        "mcp-method",
        "mcp-name",
        "mcp-protocol-version",
        "mcp-session-id",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    )
)
"""Headers that belong to the transport; configured ones of these names are left out."""


def shown(url: httpx.URL) -> str:
    """A URL as people and logs may see it: without user info, query and fragment."""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}{url.path}"


@attrs.frozen
class Target:
    """Where requests go and what they always carry. ``name`` is how errors call it."""

    url: httpx.URL
    headers: tuple[tuple[bytes, bytes], ...]
    name: str

    @classmethod
    def of(cls, origin: Origin, user_agent: str) -> Target:
        """Take over an origin's URL and (checked) headers. Raises StartFailed for a URL that can't be used."""
        try:
            url = httpx.URL(origin.url)
        except (httpx.InvalidURL, TypeError, ValueError) as error:
            raise StartFailed("url is not a valid URL") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise StartFailed("url must be an absolute http:// or https:// URL")
        if url.userinfo or url.fragment:
            raise StartFailed("url must have neither user info nor a fragment")
        headers = {"user-agent": user_agent, "accept-encoding": "identity"}
        headers.update((name.lower(), value) for name, value in origin.headers if name.lower() not in _RESERVED)
        # The path of a URL that came out of ${} may be a secret, as its query always may.
        written = origin.details.get("url", origin.url) == origin.url
        name = shown(url) if written else f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
        return cls(url, tuple((name.encode(), value.encode()) for name, value in headers.items()), name)

    def at(self, url: str) -> Target:
        """The same, at another URL of the same origin."""
        goal = httpx.URL(url)
        return attrs.evolve(self, url=goal, name=shown(goal))


# --------------------------------------------------------------------------------------------------------- the border
@contextmanager
def border(server_id: str, place: str) -> Iterator[None]:
    """Turn what httpx, trio and the system raise into GatewayErrors, with the cause kept (design.md section 10)."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise _converted(error, server_id, place) from error


def _converted(error: Exception, server_id: str, place: str) -> GatewayError:
    reason = _reason(error)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        return UpstreamError(f"Server '{server_id}' can't be reached at {place}: {reason}")
    if isinstance(error, httpx.ProtocolError) and not _is_disconnect(error):
        return ServerProtocolError(f"Server '{server_id}' at {place} does not speak proper HTTP/1.1 ({reason})")
    return LinkLost(f"Server '{server_id}' at {place} dropped the connection before its answer was complete ({reason})")


def _is_disconnect(error: Exception) -> bool:
    text = str(error)
    return "disconnected" in text or "peer closed connection" in text


def _reason(error: BaseException) -> str:
    """The cause in a few words, from the deepest exception that knows it."""
    at: BaseException | None = error
    deepest: OSError | None = None
    while at is not None:
        if isinstance(at, GatewayError):  # a transport of a runtime's that has said it for people already
            return at.message
        if isinstance(at, ssl.SSLCertVerificationError):
            return f"TLS certificate refused: {at.verify_message}"
        if isinstance(at, ssl.SSLError):
            hint = " (does the server speak plain http there?)" if at.reason == "WRONG_VERSION_NUMBER" else ""
            return f"TLS failed: {at.reason or 'broken handshake'}{hint}"
        if isinstance(at, OSError):
            deepest = at
        at = at.__cause__ or at.__context__
    if isinstance(error, httpx.ConnectError) and str(error):
        return str(error)[:300]
    if deepest is not None:
        return _os_reason(deepest)
    if isinstance(error, httpx.ConnectTimeout):
        return str(error) or f"no connection within {CONNECT_LIMIT:g} s"
    if isinstance(error, httpx.LocalProtocolError):
        return "a configured header or the URL can't be sent"  # its text would show the value
    return str(error)[:120] or type(error).__name__
