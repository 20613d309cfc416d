"""The calls a link has in flight: fresh integer ids, progress tokens, deadlines. Pure bookkeeping, no I/O, no clock.

The upstream sees an id of ours for every request, and the same number as its progress token, so that clients which all
count from 1 can never cross (protocol.md section 0, rule 5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from gateway.errors import GatewayError
from gateway.exchange import SLOW_AFTER, Call

__all__ = ["Pending"]

_any_id = re.compile(rb'"id" ?: ?([0-9]{1,18})')


class Pending:
    """Calls by id, oldest first. ``unmatched`` counts replies that belonged to nobody (late, doubled, invented)."""

    __slots__ = ("_last", "calls", "tokens", "unmatched")

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.tokens: dict[int, Call] = {}
        self.unmatched = 0
        self._last = 0

    def __len__(self) -> int:
        return len(self.calls)

    def new_id(self) -> int:
        """The next id; never used twice on one link."""
        self._last += 1
        return self._last

    def add(self, call: Call) -> None:
        """A call has been sent."""
        self.calls[call.id] = call

    def take(self, id: object) -> Call | None:
        """The call that a reply with this id ends; None, and counted, when there is none. True is not 1."""
        call = self.calls.pop(id, None) if type(id) is int else None
        if call is None:
            self.unmatched += 1
        return call

    def get(self, token: object) -> Call | None:
        """The call that a progress token belongs to."""
        if type(token) is not int:
            return None
        return self.calls.get(token) or self.tokens.get(token)

    def keep_token(self, token: int, call: Call) -> None:
        """The call goes on under another id, but its progress still comes under this token."""
        self.tokens = {t: c for t, c in self.tokens.items() if not c.done}
        self.tokens[token] = call

    def drop(self, call: Call) -> bool:
        """Forget a call; False when it was not in flight any more."""
        return self.calls.pop(call.id, None) is not None

    def sole_client_call(self) -> Call | None:
        """The only call in flight that a client made, None when there are none or several.

        A parked one is only meant if there is no other: its server waits, too.
        """
        working: list[Call] = []
        parked: list[Call] = []
        for call in self.calls.values():
            if call.exchange.client.key:
                (parked if call.parked else working).append(call)
        found = working or parked
        return found[0] if len(found) == 1 else None

    def overdue(self, now: float) -> Iterator[Call]:
        """Tell waiting calls that they are slow, and yield those past their deadline (still in flight)."""
        late = []
        for call in self.calls.values():
            if call.deadline <= now:
                late.append(call)
            elif call.started + SLOW_AFTER <= now:
                call.tell_slow()
        return iter(late)

    def fail_answered(self, parts: Iterable[bytes], error: GatewayError) -> None:
        """End the call that a message with these parts answers, or every call if that can't be told (RB09)."""
        for part in parts:
            for found in _any_id.finditer(part):
                call = self.calls.pop(int(found[1]), None)
                if call is not None:
                    call.fail(error)
                    return
        self.fail_all(error)

    def fail_all(self, error: GatewayError) -> None:
        """End every call with this error; nothing is in flight afterwards."""
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.fail(error)
