"""The questions that one server has open, whatever carries them. Pure bookkeeping, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gateway.exchange import Ask, decline
from gateway.protocol.message import Message, build_result, dumps
from gateway.telemetry.logs import Throttle

__all__ = ["Asks"]

MAX_ASKS: Final = 64
"""Questions of one server that may be open."""


class Asks:
    """Questions by their id. ``post`` sends an answer, some time; ``noise`` takes what a server does wrong."""

    __slots__ = ("_noise", "_open", "_post", "_server_id")

    def __init__(self, server_id: str, post: Callable[[str], None], noise: Throttle) -> None:
        self._server_id = server_id
        self._post = post
        self._noise = noise
        self._open: dict[str, tuple[Ask, int]] = {}

    def take(self, message: Message, *, allowed: bool, owner: int = 0) -> Ask | None:
        """A server's request, to be put to a client; None when that is not needed: a ping, or nobody may be asked.

        ``owner`` is the id of our request that it came with.
        """
        key = message.id_text
        if message.method == "ping":
            self._post(build_result(key, "{}"))
            return None
        if key in self._open:
            self._noise.warning("ask-id", "server %s reused the id %s of an open request", self._server_id, key)
            return None

        def answer(text: str) -> None:
            self._open.pop(key, None)
            self._post(text)

        ask = Ask(message, answer)
        if not allowed or len(self._open) >= MAX_ASKS:
            decline(ask)
            return None
        self._open[key] = (ask, owner)
        return ask

    def cancelled(self, message: Message) -> None:
        """A ``notifications/cancelled``: the server takes a question back."""
        ask, _ = self._open.pop(dumps(message.param("requestId")), (None, 0))
        if ask is not None:
            ask.withdraw(str(message.param("reason") or "")[:200])

    def withdraw(self, reason: str, owner: int | None = None) -> None:
        """Nobody waits for answers any more: to the questions of one request of ours, or to any."""
        for key, (ask, behind) in list(self._open.items()):
            if owner is None or behind == owner:
                del self._open[key]
                ask.withdraw(reason)
