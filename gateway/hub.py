"""Change notifications, as sets of dirty topics.

A publisher says that something changed; a subscriber keeps the set of what is dirty for it and is woken. However fast
things change and however slow a client reads, the set stays as small as the number of topics (design.md section 6).
While ``run`` runs, subscribers are told at most once in SPACING seconds, and of the last change always.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

import trio

__all__ = ["ALL", "SPACING", "Audience", "Hub", "Judge", "Subscription"]

ALL: Final = "*"
"""Subscribe to every server."""
SPACING: Final = 0.1
"""Seconds between two deliveries (protocol.md section 5: changes are gathered for at most 100 ms)."""


Audience = Hashable
"""For whom something changed: None is everybody, other values are those of units that are isolated."""

Judge = Callable[[str, str, Audience], bool]
"""Takes server id, topic and audience of what changed; whether it changed for this subscriber, too."""


class Subscription:
    """One listener: ``dirty`` holds topics in the order they first changed; ``take`` empties it."""

    __slots__ = ("_hub", "dirty", "judge", "keys", "wake")

    def __init__(
        self, hub: Hub, keys: tuple[tuple[str, Audience], ...], wake: Callable[[], None], judge: Judge | None
    ) -> None:
        self._hub = hub
        self.keys = keys
        self.wake = wake
        self.judge = judge
        self.dirty: dict[tuple[str, str], None] = {}

    def mark(self, server_id: str, topic: str) -> None:
        """Make a topic dirty and wake the listener if it was clean."""
        clean = not self.dirty
        self.dirty[(server_id, topic)] = None
        if clean:
            self.wake()

    def take(self) -> list[tuple[str, str]]:
        """What is dirty, as (server id, topic); clean afterwards."""
        dirty = list(self.dirty)
        self.dirty.clear()
        return dirty

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._hub.forget(self)


class Hub:
    """Who listens to which server. Owned by the one thread of the event loop."""

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, Audience], dict[Subscription, None]] = {}
        self._waiting: dict[tuple[str, str, Audience], None] = {}
        self._paced = False
        self._news = trio.Event()

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver what is published, paced, until cancelled. Without it everything is delivered at once."""
        self._paced = True
        try:
            task_status.started()
            while True:
                await self._news.wait()
                self._news = trio.Event()
                self.flush()
                await trio.sleep(SPACING)
        finally:
            self._paced = False

    def subscribe(
        self, server_id: str, wake: Callable[[], None], *audiences: Audience, judge: Judge | None = None
    ) -> Subscription:
        """Listen to one server, or ALL: to what concerns everybody, and these audiences, as far as ``judge`` says so.

        ``wake`` must not block; it is called when something becomes dirty.
        """
        keys = tuple((server_id, audience) for audience in {None, *audiences})
        subscription = Subscription(self, keys, wake, judge)
        for key in keys:
            self._listeners.setdefault(key, {})[subscription] = None
        return subscription

    def publish(self, server_id: str, topic: str, audience: Audience = None) -> None:
        """A list of this server changed: "tools", "prompts" or "resources"."""
        self._waiting[server_id, topic, audience] = None
        if self._paced:
            self._news.set()
        else:
            self.flush()

    def flush(self) -> None:
        """Deliver what was published since the last time."""
        waiting, self._waiting = self._waiting, {}
        for server_id, topic, audience in waiting:
            for key in ((server_id, audience), (ALL, audience)):
                for subscription in list(self._listeners.get(key, ())):
                    judge = subscription.judge
                    if judge is None or judge(server_id, topic, audience):
                        subscription.mark(server_id, topic)

    def forget(self, subscription: Subscription) -> None:
        """Used by ``Subscription.close``."""
        for key in subscription.keys:
            listeners = self._listeners.get(key)
            if listeners is not None:
                listeners.pop(subscription, None)
                if not listeners:
                    del self._listeners[key]
