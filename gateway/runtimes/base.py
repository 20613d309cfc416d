"""What a runtime is: the way to start one kind of server, and nothing about MCP.

A runtime turns a frozen spec into a place to speak to, for as long as an ``async with`` block lasts:

    async with runtime.open(spec, surroundings) as place:   # started here
        ...                                                 # place is a Pipe or an Origin
                                                            # stopped here, also when cancelled

A new one is one file that exports ``RUNTIME`` (design.md section 8).
"""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import attrs

__all__ = ["Guard", "Instance", "Origin", "Pipe", "Place", "Progress", "Runtime", "Surroundings"]


class Pipe(Protocol):
    """Bytes in and bytes out: a process's stdin and stdout, a container's or a pod's attached streams.

    Writing is non-blocking on purpose: the link writes at once when nothing is queued, and only the rest of a frame
    waits (design.md section 12), so a cancelled call can never leave half a frame behind.
    """

    def write_nowait(self, data: bytes | memoryview) -> int:
        """Write what fits now and return how many bytes that was (0: nothing fits). Raises LinkLost once closed."""

    async def wait_writable(self) -> None:
        """Return when ``write_nowait`` may accept bytes again. Cancellable at any time. Raises LinkLost once closed."""

    async def receive_some(self) -> bytes:
        """The next bytes from the server, b"" at its end. Cancellation loses nothing. Never raises OSError."""

    async def wait_exited(self) -> None:
        """Return when the server is known to have ended: a process exited, whoever may still hold its streams.

        ``receive_some`` then gives what was already written and b"". Cancellable."""

    def diagnosis(self) -> str:
        """Why it ended or misbehaves, for people: "process exited with code 1: last stderr lines". Secrets removed."""

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts for /servers/ID, such as {"pid": 4711}. JSON values only."""

    async def measure(self) -> Mapping[str, Any]:
        """Facts that have to be asked for, such as {"memory_bytes": 4096}; {} where there are none, or none now.

        JSON values only. Raises nothing; cancelled when it takes too long.
        """

    def remark(self) -> str:
        """What explains that a call gets no answer, for its error: "container is paused"; "" where nothing does."""


@attrs.frozen
class Origin:
    """A server that is reached by HTTP: an absolute URL and the headers every request to it carries.

    ``transport`` makes the httpx transport to use (unix sockets, tunnels); None means the ordinary one.
    ``allow_private`` is the address policy of RB55: "auto", True or False. ``plain`` is set where another gateway is
    behind the URL: where it takes plain calls, and the id of the server meant, "" for its merged view (compat S8).

    What follows is for servers that the runtime itself has started. ``starting``: it may not listen yet, so until it
    has answered anything, refused and broken connections and 502, 503 and 504 are tried again. ``ended`` returns when
    it is known to have ended, with the reason for people; it is cancelled when the link is closed. ``measure`` and
    ``remark`` are as in Pipe.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    transport: Callable[[], Any] | None = None
    allow_private: bool | str = "auto"
    plain: tuple[str, str] | None = None
    details: Mapping[str, Any] = attrs.field(factory=dict)
    starting: bool = False
    ended: Callable[[], Awaitable[str]] | None = None
    measure: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
    remark: Callable[[], str] = str


Place = Pipe | Origin


class Guard(Protocol):
    """Kills process groups that outlive the gateway. ``runtimes.ProcessGuard`` is the real one."""

    def prepare(self) -> None:
        """Be ready to watch. Blocks for milliseconds: called in a worker thread, before something is started."""

    def watch(self, group: int) -> None:
        """From now on, kill this process group when the gateway dies without having said ``forget``."""

    def forget(self, group: int) -> None:
        """This group has ended in good order."""


class Instance(Protocol):
    """This running gateway, as what it makes elsewhere (containers, Jobs) is labelled with it (robustness RB62)."""

    @property
    def id(self) -> str:
        """32 hexadecimal digits, others at every start."""

    def uses(self, type: str, where: str) -> None:
        """Write down, before something is made there, that ``Runtime.sweep`` of this type may have to look there.

        ``where`` is one line that the runtime will understand: an engine's address, a cluster and a namespace.
        """

    def leaves(self) -> None:
        """Something that was made could not be removed: a later gateway has to look after it."""

    def dead(self, id: str) -> bool:
        """Whether that instance id is known to be of a gateway that has ended: what it has made may be taken over."""


class Progress(Protocol):
    """Takes what a start is doing at the moment, for people: "pulling image acme/box:1, 45 %".

    ``extend``: it is known to get on, so the start timeout begins anew.
    """

    def __call__(self, text: str, *, extend: bool = False) -> None: ...


def _never(spec: Any) -> bool:
    """An ``origin`` that no spec has."""
    return False


def _unheard(text: str, *, extend: bool = False) -> None:
    """A Progress that nobody wants to know."""


@attrs.frozen
class Surroundings:
    """What a runtime is told besides its spec.

    variables      the complete environment of a process on this machine (filtered and substituted, compat K5)
    env            the entry's own ``env`` alone: what a container or pod gets beside its image's
    environ        the gateway's environment, for finding an engine or a cluster (DOCKER_HOST, KUBECONFIG, HOME)
    stop_grace     seconds between the polite and the forced end
    log            takes one line of the server's stderr, without the newline, already bounded in length
    redact         removes secrets from a text that people will read
    guard          see Guard; None in tests that need none
    catalog_dir    relative paths in the spec mean this folder
    progress       see Progress
    instance       see Instance; None in tests that leave nothing behind
    allowed_paths  the config's ``docker.allowed_paths``: None where it is not set (compat K19)
    """

    server_id: str
    variables: Mapping[str, str]
    stop_grace: float = 10.0
    log: Callable[[str], None] = lambda line: None
    redact: Callable[[str], str] = lambda text: text
    guard: Guard | None = None
    catalog_dir: Path = Path()
    env: Mapping[str, str] = attrs.field(factory=dict)
    environ: Mapping[str, str] = attrs.field(factory=dict)
    progress: Progress = _unheard
    instance: Instance | None = None
    allowed_paths: tuple[str, ...] | None = None


@attrs.frozen
class Runtime:
    """One way to start servers: its YAML ``type`` names, its spec class (the YAML schema) and its context manager.

    ``open`` raises StartFailed with a sentence that names what is wrong; cancelled or not, leaving the block stops
    whatever was started within a bounded time. ``open`` None: the type validates, and starting it answers
    "not available in this build".

    ``advice`` says what ``check`` prints of an entry: each relaxation of safe defaults, and what a start would refuse.
    It does no I/O but looking at paths. ``sweep(where, instance, environ)`` removes everything that the gateway with
    that instance id has made there, and nothing else (RB62). It raises StartFailed when it can't be sure that all is
    gone; then it is called again.

    ``modules`` are those that ``open`` imports, ``origin`` says whether a spec's place is an Origin. With these a
    daemon has in memory what its catalog needs, off the way of the first caller and before its archive is replaced.
    """

    type: str
    spec: builtins.type[Any]
    open: Callable[[Any, Surroundings], AbstractAsyncContextManager[Place]] | None
    aliases: tuple[str, ...] = ()
    advice: Callable[[Any, Surroundings], Sequence[str]] | None = None
    sweep: Callable[[str, str, Mapping[str, str]], Awaitable[None]] | None = None
    modules: tuple[str, ...] = ()
    origin: Callable[[Any], bool] = _never
