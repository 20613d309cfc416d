"""Calls that wait for a client to come back with an answer, and the states that prove it is the same client.

A legacy server asks in the middle of a call; a modern client is answered ``input_required`` and calls again. Between
the two the call is parked: a handle in a table, no task and no slot (protocol.md section 4.2). What the client brings
back is the sealed ``requestState``: it names the parked call, or holds the state of a modern server, and is bound to
caller, endpoint, method, name and arguments. It holds no secret, so it is signed and not encrypted; who changes a byte,
or brings it for another call, has to start again.

Everything is bounded: parked calls in all and by principal, and in time.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Any, Final

import attrs
import trio

from gateway.auth.principal import Principal
from gateway.config.model import Settings
from gateway.errors import ClientProtocolError, Overloaded
from gateway.exchange import Ask, Call, Exchange, Target, decline
from gateway.protocol.eras import name_parameter
from gateway.protocol.message import INVALID_PARAMS, Message

__all__ = ["Binding", "Parked", "ParkingLot", "Sealer", "start_again"]

RELAY_SECONDS: Final = 3600.0
"""For how long the state of a modern server is taken back. Nothing is held for it here."""
SHARE: Final = 4
"""A principal may hold the SHARE-th part of all parked calls."""


def start_again(why: str) -> ClientProtocolError:
    """The error for a state that can't be taken: nothing was done, and nothing is repeated."""
    return ClientProtocolError(f"{why}; start the call again", code=INVALID_PARAMS)


class Sealer:
    """Signs small JSON objects. The first of ``keys`` signs, all of them verify, so that keys can be exchanged."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self._keys = tuple(keys) or (os.urandom(32),)

    def seal(self, content: dict[str, Any]) -> str:
        """The content as visible ASCII with a signature."""
        text = _b64(json.dumps(content, separators=(",", ":")).encode())
        return f"{text}.{_b64(self._mac(self._keys[0], text))}"

    def open(self, sealed: str) -> dict[str, Any]:
        """The content. Raises ClientProtocolError (-32602) for anything that was not sealed with one of the keys."""
        import hmac  # late: it brings OpenSSL, 3 MB, and few calls are parked

        text, _, mac = sealed.partition(".")
        try:
            given = base64.urlsafe_b64decode(mac + "=" * (-len(mac) % 4))
            genuine = [hmac.compare_digest(self._mac(key, text), given) for key in self._keys]
            if any(genuine) and _b64(given) == mac:
                content = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
                if type(content) is dict:
                    return content
        except ValueError:
            pass
        raise start_again("The requestState is none of ours")

    @staticmethod
    def _mac(key: bytes, text: str) -> bytes:
        import hmac

        return hmac.digest(key, text.encode(), "sha256")


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@attrs.frozen
class Binding:
    """What a state belongs to. ``arguments`` is a digest of all params but the hop's own."""

    principal: str
    target: str
    method: str
    name: str
    arguments: str

    @classmethod
    def of(cls, principal: Principal, target: Target, message: Message) -> Binding:
        """The binding of a request."""
        import hashlib

        params = message.params if type(message.params) is dict else {}
        own = {name: value for name, value in params.items() if name not in _NOT_ARGUMENTS}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32]
        who = hashlib.sha256(repr(principal).encode()).hexdigest()[:32]
        name = params.get(name_parameter(message.method) or "")
        return cls(who, str(target or ""), message.method, str(name), digest)

    def content(self) -> dict[str, str]:
        """As members of a sealed state."""
        return {"p": self.principal, "s": self.target, "m": self.method, "n": self.name, "a": self.arguments}


_NOT_ARGUMENTS: Final = ("_meta", "inputResponses", "requestState")


class Parked:
    """A call that waits for its client. ``asks`` are the open questions by the keys under which they were put,
    ``asked`` is how many there have been in all.
    """

    __slots__ = ("asked", "asks", "binding", "call", "expires", "principal")

    def __init__(
        self, call: Call, asks: dict[str, Ask], asked: int, principal: Principal, binding: Binding, expires: float
    ) -> None:
        self.call = call
        self.asks = asks
        self.asked = asked
        self.principal = principal
        self.binding = binding
        self.expires = expires

    def resume(self, exchange: Exchange) -> Call:
        """The call, from now on for this exchange."""
        self.call.unpark(exchange)
        return self.call

    def drop(self, reason: str) -> None:
        """Nobody comes back for it: its questions are declined, then it is cancelled."""
        for ask in (*self.asks.values(), *self.call.questions):
            if ask.open:
                decline(ask)
        self.call.cancel(reason)


class ParkingLot:
    """All parked calls. ``settings`` gives the current limits; ``sweep`` is to be called about once a second.

    A parked call is known to this process only. What is relayed is good wherever the keys are; ``clock`` is the time of
    day for that, in seconds.
    """

    def __init__(
        self, settings: Callable[[], Settings], sealer: Sealer | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._sealer = sealer or Sealer()
        self._clock = clock
        self._generation = os.urandom(8).hex()
        self._parked: dict[str, Parked] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def park(self, call: Call, asks: dict[str, Ask], principal: Principal, binding: Binding, asked: int = 0) -> str:
        """Put a call away: the state that brings it back, once. Raises Overloaded where too many are parked."""
        settings = self._settings()
        limit = settings.max_parked
        own = sum(1 for parked in self._parked.values() if parked.principal == principal)
        if len(self._parked) >= limit or own >= max(1, limit // SHARE):
            raise Overloaded(f"Too many calls wait for their clients' answers (max_parked is {limit})")
        seconds = settings.park_timeout_seconds or inf
        expires = trio.current_time() + seconds
        call.park()
        id = os.urandom(16).hex()
        self._parked[id] = Parked(call, asks, asked, principal, binding, expires)
        return self._sealer.seal({"k": "park", "i": id, "g": self._generation, **binding.content()})

    def relay(self, state: str, binding: Binding) -> str:
        """The state of a modern server, bound to its caller. Nothing is held."""
        until = self._clock() + RELAY_SECONDS
        return self._sealer.seal({"k": "relay", "v": state, "e": until, **binding.content()})

    def take(self, sealed: str, binding: Binding) -> Parked | str:
        """What a state stands for: a parked call, which is not parked any more, or a modern server's own state.

        Raises ClientProtocolError (-32602) for states that are forged, another's, of another call, used or expired.
        """
        content = self._sealer.open(sealed)
        if any(content.get(name) != value for name, value in binding.content().items()):
            raise start_again("The requestState belongs to another call")
        if content.get("k") == "relay":
            if content["e"] < self._clock():
                raise start_again("The requestState has expired")
            return str(content["v"])
        if content.get("g") != self._generation:
            raise start_again("The gateway has been restarted")
        parked = self._parked.pop(str(content.get("i")), None)
        if parked is None:
            raise start_again("The requestState has been used already, or has expired")
        if parked.call.done and not parked.call.buffered:
            raise start_again("The call has ended meanwhile")
        return parked

    def sweep(self, now: float) -> None:
        """Give up what has waited too long."""
        for id, parked in list(self._parked.items()):
            if parked.expires <= now or (parked.call.done and not parked.call.buffered):
                del self._parked[id]
                parked.drop("the client did not come back")

    def dismiss(self, known: Collection[Principal]) -> None:
        """Give up what only others than these could come back for."""
        for id, parked in list(self._parked.items()):
            if parked.principal not in known:
                del self._parked[id]
                parked.drop("its caller is not known any more")

    def clear(self) -> None:
        """Give up everything."""
        parked, self._parked = self._parked, {}
        for each in parked.values():
            each.drop("the gateway is shutting down")
