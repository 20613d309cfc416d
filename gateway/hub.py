"""Change notifications, as sets of dirty topics.

A publisher says that something changed; a subscriber keeps the set of what is dirty for it and is woken. However fast
things change and however slow a client reads, the set stays as small as the number of topics (design.md section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

__all__ = ["ALL", "Audience", "Hub", "Subscription"]

ALL: Final = "*"
"""Subscribe to every server."""


Audience = Hashable
"""For whom something changed: None is everybody, other values are those of units that are isolated."""


class Subscription:
    """One listener: ``dirty`` holds topics in the order they first changed; ``take`` empties it."""

    __slots__ = ("_hub", "dirty", "keys", "wake")

    def __init__(self, hub: Hub, keys: tuple[tuple[str, Audience], ...], wake: Callable[[], None]) -> None:
        self._hub = hub
        self.keys = keys
        self.wake = wake
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
    """Who listens to which server. Synchronous; owned by the one thread of the event loop."""

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, Audience], dict[Subscription, None]] = {}

    def subscribe(self, server_id: str, wake: Callable[[], None], *audiences: Audience) -> Subscription:
        """Listen to one server, or ALL: to what concerns everybody, and these audiences.

        ``wake`` must not block; it is called when something becomes dirty.
        """
        keys = tuple((server_id, audience) for audience in {None, *audiences})
        subscription = Subscription(self, keys, wake)
        for key in keys:
            self._listeners.setdefault(key, {})[subscription] = None
        return subscription

    def publish(self, server_id: str, topic: str, audience: Audience = None) -> None:
        """Something of this server changed: "tools", "prompts", "resources", "resource:URI", "state"."""
        for key in ((server_id, audience), (ALL, audience)):
            for subscription in list(self._listeners.get(key, ())):
                subscription.mark(server_id, topic)

    def forget(self, subscription: Subscription) -> None:
        """Used by ``Subscription.close``."""
        for key in subscription.keys:
            listeners = self._listeners.get(key)
            if listeners is not None:
                listeners.pop(subscription, None)
                if not listeners:
                    del self._listeners[key]
