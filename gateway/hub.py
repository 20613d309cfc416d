"""Change notifications, as sets of dirty topics.

A publisher says that something changed; a subscriber keeps the set of what is dirty for it and is woken. However fast
things change and however slow a client reads, the set stays as small as the number of topics (design.md section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["ALL", "Hub", "Subscription"]

ALL: Final = "*"
"""Subscribe to every server."""


class Subscription:
    """One listener: ``dirty`` holds topics in the order they first changed; ``take`` empties it."""

    __slots__ = ("_hub", "dirty", "server_id", "wake")

    def __init__(self, hub: Hub, server_id: str, wake: Callable[[], None]) -> None:
        self._hub = hub
        self.server_id = server_id
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
        self._listeners: dict[str, dict[Subscription, None]] = {}

    def subscribe(self, server_id: str, wake: Callable[[], None]) -> Subscription:
        """Listen to one server, or ALL. ``wake`` must not block; it is called when something becomes dirty."""
        subscription = Subscription(self, server_id, wake)
        self._listeners.setdefault(server_id, {})[subscription] = None
        return subscription

    def publish(self, server_id: str, topic: str) -> None:
        """Something of this server changed: "tools", "prompts", "resources", "resource:URI", "state"."""
        for key in (server_id, ALL):
            for subscription in list(self._listeners.get(key, ())):
                subscription.mark(server_id, topic)

    def forget(self, subscription: Subscription) -> None:
        """Used by ``Subscription.close``."""
        listeners = self._listeners.get(subscription.server_id)
        if listeners is not None:
            listeners.pop(subscription, None)
            if not listeners:
                del self._listeners[subscription.server_id]
