"""What can go wrong, named by whose fault it is.

Each class carries the three names under which a fault is seen from outside: the JSON-RPC code, the HTTP status and
the label it is counted under. One function per front turns any of them into a reply, so a raiser only picks a class
and writes one sentence that names what, where and how to mend it. Messages never hold secrets or tracebacks.

The tree is design.md section 10. Nothing here imports from the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Self

import attrs

__all__ = [
    "REPLACED",
    "AuthError",
    "ClientProtocolError",
    "ConfigError",
    "CredentialsRefused",
    "Forbidden",
    "GatewayError",
    "LinkLost",
    "NoSuchServer",
    "Overloaded",
    "Problem",
    "RateLimited",
    "ServerProtocolError",
    "StartFailed",
    "Unauthenticated",
    "UnknownTarget",
    "UpstreamError",
    "UpstreamTimeout",
    "of_archive",
    "unexpected",
]

REPLACED: Final = "gateway.pyz was replaced; restart the gateway"


class GatewayError(Exception):
    """A fault that the gateway itself reports.

    ``message`` is one sentence for people. ``code`` (JSON-RPC), ``status`` (HTTP) and ``label`` (metrics) default to
    the class's; ``retry_after`` is in seconds, None where waiting does not help.
    """

    code: int = -32603
    status: int = 500
    label: ClassVar[str] = "internal"
    retry_after: float | None = None

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        if retry_after is not None:
            self.retry_after = retry_after

    def anew(self, message: str | None = None, *, retry_after: float | None = None) -> Self:
        """The same fault for another caller, who needs an exception with a traceback of its own; other words if given.

        It has all that this one has, whatever its class's constructor wants.
        """
        text = self.message if message is None else message
        other = type(self).__new__(type(self), text)
        other.__dict__.update(self.__dict__)
        other.message = text
        if retry_after is not None:
            other.retry_after = retry_after
        return other


@attrs.frozen
class Problem:
    """One mistake in a file: where (1-based line and column, 0 when unknown) and what."""

    text: str
    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if not self.file:
            return self.text
        if not self.line:
            return f"{self.file}: {self.text}"
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class ConfigError(GatewayError):
    """A config or catalog that can't be used; ``problems`` holds every mistake found, in file order.

    ``kind`` is "parse" when the file is no YAML and "validation" when it is YAML with the wrong content.
    """

    label = "config"

    def __init__(self, problems: Sequence[Problem], *, kind: str = "validation") -> None:
        self.problems = tuple(problems)
        self.kind = kind
        super().__init__("; ".join(str(p) for p in self.problems))


class ClientProtocolError(GatewayError):
    """The client broke the rules of HTTP, JSON-RPC or MCP."""

    code = -32600
    status = 400
    label = "client_protocol"


class AuthError(GatewayError):
    """The caller may not do this."""

    code = -32003
    status = 403
    label = "auth"


class Unauthenticated(AuthError):
    """No credentials, or unusable ones; the reply carries a WWW-Authenticate challenge."""

    status = 401


class Forbidden(AuthError):
    """Known and refused."""


class UnknownTarget(GatewayError):
    """No such server, session, tool or task, or one that this caller must not know of: the text is the same."""

    code = -32001
    status = 404
    label = "unknown_target"


class Overloaded(GatewayError):
    """A documented limit was met; waiting helps."""

    code = -32000
    status = 503
    label = "overloaded"
    retry_after = 1.0


class RateLimited(Overloaded):
    """This caller is over its rate."""

    status = 429
    label = "rate_limited"


class UpstreamError(GatewayError):
    """The server behind the gateway could not be reached, started or understood."""

    code = -32000
    status = 502
    label = "upstream"


class StartFailed(UpstreamError):
    """The server did not come up: bad command, early exit, refused connection, failed handshake."""

    label = "start_failed"


class CredentialsRefused(StartFailed):
    """A remote server knows nobody by the credentials we send it (401, 403); nothing was done."""


class NoSuchServer(StartFailed):
    """Another gateway says that it has no server of that id."""


class LinkLost(UpstreamError):
    """The server went away while the call was with it; whether it did the work is unknown, so it is never re-sent."""

    label = "link_lost"


class UpstreamTimeout(UpstreamError):
    """No answer within the request's deadline; the server stays up and a late answer is dropped."""

    status = 504
    label = "timeout"


class ServerProtocolError(UpstreamError):
    """The server answered something that is no MCP, or more than ``max_message_bytes`` of it."""

    label = "server_protocol"


def of_archive(error: BaseException) -> bool:
    """Whether this was raised while something was read from the archive that we run from: another is in its place.

    Python looks for a module where it was when the archive was opened. What is there now can fail to be one in any way
    (ZipImportError, zlib.error, EOFError, OSError, ...), so it goes by who has raised it.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__") in ("zipimport", "zipfile")


def unexpected(error: BaseException) -> str:
    """What a caller is told of a failure that is no GatewayError."""
    return REPLACED if of_archive(error) else "Internal error"
