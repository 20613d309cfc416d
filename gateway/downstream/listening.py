"""One open subscription of a modern client (2026-07-28, subscriptions), whatever carries its messages.

It is a set of dirty topics and a wake-up: however fast things change and however slow the client reads, what waits for
it stays as small as what it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from gateway.auth.principal import Principal
from gateway.errors import ClientProtocolError
from gateway.exchange import Ask, Client, Target
from gateway.protocol.eras import SUBSCRIPTION_ID
from gateway.protocol.message import INVALID_PARAMS, Message, build_notification, dumps, quote
from gateway.protocol.session import announce

if TYPE_CHECKING:
    from gateway.router import Router

__all__ = ["LISTEN", "Listening"]

LISTEN: Final = "subscriptions/listen"
MAX_URIS: Final = 1000
"""Resources that one subscription may name."""
OPEN_LIMIT: Final = 30.0
"""Seconds for the servers of its resources to start and take the subscriptions."""


class Listening:
    """One open subscription. Implements ``exchange.Owner`` for the resources that it watches.

    ``wake`` is called when there is something to ``take``; it must not block. ``open`` it, and ``close`` it in the end.
    ``over`` is for whoever wants it ended from outside.
    Raises UnknownTarget for a server that its client may not know, ClientProtocolError for a filter that is none.
    """

    def __init__(
        self,
        router: Router,
        client: Client,
        principal: Principal,
        target: Target,
        message: Message,
        wake: Callable[[], None],
    ) -> None:
        router.check(principal, target)
        wanted = message.param("notifications")
        if type(wanted) is not dict:
            raise ClientProtocolError("params.notifications must be an object", code=INVALID_PARAMS)
        uris = wanted.get("resourceSubscriptions") or []
        if type(uris) is not list or len(uris) > MAX_URIS or not all(type(uri) is str for uri in uris):
            raise ClientProtocolError(
                f"resourceSubscriptions must be a list of at most {MAX_URIS} URIs", code=INVALID_PARAMS
            )
        self.over = False
        self._router = router
        self.principal = principal
        self._target = target
        self._id_text = message.id_text
        self._topics = {name for name in ("tools", "prompts", "resources") if wanted.get(f"{name}ListChanged") is True}
        self._uris = uris
        self._honoured: list[str] = []
        self._wake = wake
        self._client = attrs.evolve(client, owner=self, context=None)
        self._marks: dict[str, None] = {}
        self._subscription = router.subscribe(target, wake, principal, client)

    async def open(self) -> None:
        """Have the servers of the resources told. Waits for their start, at most as long as a request may take."""
        if self._uris:
            router = self._router
            deadline = trio.current_time() + min(OPEN_LIMIT, router.timeout_of(self._target, router.snapshot))
            self._honoured = await router.listen(self._client, self.principal, self._target, self._uris, deadline)

    def acknowledgement(self) -> str:
        """The first message: what of the filter is honoured."""
        honoured: dict[str, Any] = {f"{topic}ListChanged": True for topic in sorted(self._topics)}
        if self._uris:
            honoured["resourceSubscriptions"] = self._honoured
        return self._tagged("notifications/subscriptions/acknowledged", {"notifications": honoured})

    @property
    def dirty(self) -> bool:
        """Whether there is something to take."""
        for _, topic in self._subscription.take():
            if topic in self._topics:
                self._marks[topic] = None
        return bool(self._marks)

    def take(self) -> list[str]:
        """The messages for what has changed since."""
        _ = self.dirty
        marks, self._marks = self._marks, {}
        texts = []
        for topic in marks:
            found = announce(topic)
            if found is not None:
                texts.append(self._tagged(found[0], json.loads(found[1]) if found[1] else {}))
        return texts

    def ended(self) -> list[str]:
        """The last messages, when it is the gateway that ends it: the result, and a notification that must come.

        In this order: the official clients take the first for the reason, and only the result for an orderly end.
        """
        cancelled = build_notification(
            "notifications/cancelled", f'{{"requestId":{self._id_text},"_meta":{self._meta}}}'
        )
        meta = f'{self._meta[:-1]},"io.modelcontextprotocol/serverInfo":{dumps(dict(self._router.info))}}}'
        result = f'{{"resultType":"complete","_meta":{meta}}}'
        return [f'{{"jsonrpc":"2.0","id":{self._id_text},"result":{result}}}', cancelled]

    def close(self) -> None:
        """Nothing more is wanted. Idempotent."""
        self._subscription.close()
        self._router.close(self._client)

    @property
    def _meta(self) -> str:
        return f"{{{quote(SUBSCRIPTION_ID)}:{self._id_text}}}"

    def _tagged(self, method: str, params: Mapping[str, Any]) -> str:
        text = json.dumps(params, separators=(",", ":"))  # in ASCII: a URI may hold lone surrogates
        tail = f'"_meta":{self._meta}}}'
        return build_notification(method, f"{text[:-1]},{tail}" if params else f"{{{tail}")

    # exchange.Owner
    def ask(self, ask: Ask) -> bool:
        """See ``exchange.Owner``: nobody is asked on a subscription."""
        return False

    def notify(self, text: str) -> None:
        """See ``exchange.Owner``: nothing but changes travels on a subscription."""

    def mark(self, topic: str) -> None:
        """See ``exchange.Owner``."""
        if topic.startswith("resource:") and topic.removeprefix("resource:") in self._uris:
            self._marks[topic] = None
            self._wake()
