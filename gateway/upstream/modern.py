"""What is said to a server of either era on behalf of a client of either era, whatever carries it.

Every request leaves with the context that its server's era wants: ``modern_params`` puts the client's into ``_meta``,
``legacy_params`` takes it out. Where a modern server wants input from a legacy client, ``Rounds`` asks the client as a
legacy server would have and repeats the request with the answers (protocol.md section 4.3), so fronts never see the
difference.

No I/O here but the pause before some rounds; links send what these give.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import attrs
import trio

from gateway.errors import GatewayError, ServerProtocolError
from gateway.exchange import INTERNAL, Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol import headers, translate
from gateway.protocol.eras import (
    CLIENT_CAPABILITIES,
    CLIENT_INFO,
    LOG_LEVEL,
    META,
    MODERN,
    PROTOCOL_VERSION,
    Era,
)
from gateway.protocol.message import (
    RESULT,
    Message,
    build_notification,
    build_request,
    build_result,
    decode_reply,
    decode_request,
    dumps,
    quote,
)
from gateway.upstream.pending import Pending

__all__ = [
    "ACKNOWLEDGED",
    "LISTEN",
    "MAX_ROUNDS",
    "Rounds",
    "cleaned_tools",
    "context_meta",
    "is_input_required",
    "legacy_params",
    "listen_params",
    "lister",
    "modern_params",
    "pass_progress",
    "promised",
    "untagged",
]

log = logging.getLogger("gateway_core")

LISTEN: Final = "subscriptions/listen"
ACKNOWLEDGED: Final = "notifications/subscriptions/acknowledged"
MAX_ROUNDS: Final = 10
"""Rounds of one call, as both official clients have it."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 0.25
"""Seconds before a retry that only carries the server's state back: it is not ready yet."""

_elicitations = itertools.count(1)


# ------------------------------------------------------------------------------------------------------------- params
def context_meta(client: Client, info: Mapping[str, Any]) -> str:
    """The members of a modern ``_meta`` that speak for a client, as JSON text without braces. Kept with the client.

    A legacy client is spoken for by its session: what it declared at ``initialize``, the level it set. One that can't
    be asked (no session behind it) declares nothing.
    """
    context = client.context
    if context is None:
        askable = client.era is Era.MODERN or client.owner is not None
        context = _context(client.info or info, _declared(client) if askable else {}, client.log_level)
        if client.info:
            client.context = context  # else it holds the name by which only this server knows us
    return context


def lister(client: Client | None, info: Mapping[str, Any]) -> Client:
    """Who asks a server for what it has: the gateway, but in the name of the client that the server belongs to, if any.

    A server may offer more to a client that can be asked more. The gateway can't be asked: that is up to the calls.
    """
    if client is None:
        return INTERNAL
    return attrs.evolve(INTERNAL, context=_context(client.info or info, _declared(client), None))


def _declared(client: Client) -> Mapping[str, Any]:
    """What a client says with each request that it can be asked, or would if it were a modern one."""
    return client.capabilities if client.era is Era.MODERN else translate.session_capabilities(client.capabilities)


def _context(info: Mapping[str, Any], capabilities: Mapping[str, Any], log_level: str | None) -> str:
    parts = [
        f"{quote(PROTOCOL_VERSION)}:{quote(MODERN)}",
        f"{quote(CLIENT_INFO)}:{dumps(dict(info))}",
        f"{quote(CLIENT_CAPABILITIES)}:{dumps(dict(capabilities))}",
    ]
    if log_level is not None:
        parts.append(f"{quote(LOG_LEVEL)}:{dumps(log_level)}")
    return ",".join(parts)


def modern_params(exchange: Exchange, id: int, info: Mapping[str, Any], more: Mapping[str, str] | None = None) -> str:
    """The params of a request to a modern server as JSON text; ``id`` is also the progress token.

    ``more`` has members (name -> JSON text) that this request of the exchange's gets besides its own ``changes``.
    """
    message, client, changes = exchange.message, exchange.client, exchange.changes
    if more:
        changes = {**(changes or {}), **more}
    params = message.params
    meta = message.meta
    if type(params) is dict and "task" in params:
        return _rebuilt(exchange, changes, id, info)
    if client.era is Era.MODERN:
        # Its own context is in it already.
        if "progressToken" not in meta:
            return message.params_text(changes)
        text = dumps({**meta, "progressToken": id})
    else:
        text = _speaking_for(client, meta, id, info)
    return message.params_text({**changes, "_meta": text} if changes else {"_meta": text})


def _speaking_for(client: Client, meta: Mapping[str, Any], id: int, info: Mapping[str, Any]) -> str:
    """A legacy client's ``_meta`` with its context."""
    context = context_meta(client, info)
    if not meta:
        return f"{{{context}}}"
    kept = _kept(meta, id)
    return f"{dumps(kept)[:-1]}{',' if kept else ''}{context}}}"


def _kept(meta: Mapping[str, Any], id: int) -> dict[str, Any]:
    """What of a ``_meta`` is not for one hop only, under our progress token."""
    kept = {name: value for name, value in meta.items() if name not in _CONTEXT}
    if "progressToken" in kept:
        kept["progressToken"] = id
    return kept


def legacy_params(exchange: Exchange, id: int, more: Mapping[str, str] | None = None) -> str:
    """The params of a request to a legacy server as JSON text; ``id`` and ``more`` are as in ``modern_params``."""
    message, changes = exchange.message, exchange.changes
    if more:
        changes = {**(changes or {}), **more}
    params = message.params
    if type(params) is not dict:
        return message.params_text(changes)
    if "task" in params or "inputResponses" in params or "requestState" in params:
        return _rebuilt(exchange, changes, id, None)
    if "_meta" not in params:
        return message.params_text(changes)
    meta = message.meta
    if exchange.client.era is Era.MODERN:
        kept = _kept(meta, id)
        text = dumps(kept) if kept else "{}"
        return message.params_text({**changes, "_meta": text} if changes else {"_meta": text})
    if "progressToken" in meta:
        changes = {**(changes or {}), "_meta": dumps({**meta, "progressToken": id})}
    return message.params_text(changes)


def _rebuilt(exchange: Exchange, changes: Mapping[str, str] | None, id: int, info: Mapping[str, Any] | None) -> str:
    """The rare request of which something must not reach the server: ``task``, since no tasks are advertised; and from
    a legacy one (``info`` None) answers and states, which were for us.
    """
    message, client = exchange.message, exchange.client
    dropped = _NO_TASK if info is not None and client.era is Era.MODERN else _NO_INPUT
    members = {name: dumps(value) for name, value in message.params.items() if name not in dropped}
    for name, text in (changes or {}).items():
        if name not in _NO_INPUT or info is not None or name == "task":
            members[name] = text
    meta = message.meta
    if info is None or client.era is Era.MODERN:
        members["_meta"] = dumps(_kept(meta, id) if info is None else {**meta, **_token(meta, id)})
    else:
        members["_meta"] = _speaking_for(client, meta, id, info)
    return "{" + ",".join(f"{quote(name)}:{text}" for name, text in members.items()) + "}"


def _token(meta: Mapping[str, Any], id: int) -> dict[str, int]:
    return {"progressToken": id} if "progressToken" in meta else {}


_NO_TASK: Final = frozenset(("task",))
_NO_INPUT: Final = frozenset(("task", "inputResponses", "requestState"))
_CONTEXT: Final = frozenset((PROTOCOL_VERSION, CLIENT_INFO, CLIENT_CAPABILITIES, LOG_LEVEL))
"""What a request's ``_meta`` says for one hop only."""


def listen_params(capabilities: Mapping[str, Any], uris: Iterable[str], info: Mapping[str, Any]) -> str:
    """The params of the gateway's own ``subscriptions/listen``: every list the server announces, and these resources.

    "" when there is nothing to listen to.
    """
    wanted: dict[str, Any] = {}
    for name in ("tools", "prompts", "resources"):
        claim = capabilities.get(name)
        if type(claim) is dict and claim.get("listChanged"):
            wanted[f"{name}ListChanged"] = True
    resources = sorted(uris)
    if resources:
        wanted["resourceSubscriptions"] = resources
    if not wanted:
        return ""
    return f'{{"notifications":{dumps(wanted)},"_meta":{{{context_meta(INTERNAL, info)}}}}}'


def promised(filter: object) -> frozenset[str]:
    """The resources whose updates a server has acknowledged."""
    found = filter.get("resourceSubscriptions") if type(filter) is dict else None
    return frozenset(uri for uri in found if type(uri) is str) if type(found) is list else frozenset()


def cleaned_tools(message: Message, *, drop_invalid: bool = False) -> Message:
    """A tools/list result as clients get it.

    It does not say which tools could run as tasks, since we advertise none (section 4.5). Annotations for headers that
    break the rules are taken out; a server that speaks HTTP, where they would count, loses the tool (section 5).
    """
    text = message.text
    if message.kind is not RESULT or not ('"execution"' in text or '"x-mcp-header"' in text):
        return message
    tools = message.result.get("tools") if type(message.result) is dict else None
    if type(tools) is not list:
        return message
    kept: list[Any] = []
    for tool in tools:
        if type(tool) is dict:
            tool = {name: value for name, value in tool.items() if name != "execution"}
            try:
                headers.parameters_of(tool)
            except ValueError as error:
                log.warning("tool %.100r: %s", tool.get("name"), error)
                if drop_invalid:
                    continue
                tool = headers.strip(tool)
        kept.append(tool)
    return decode_reply(build_result(message.id_text, dumps({**message.result, "tools": kept})))


def pass_progress(call: Call, message: Message) -> None:
    """Progress of a call's server, under the token that its client has given; nothing where it has given none."""
    client = call.exchange.client
    token = call.exchange.message.meta.get("progressToken")
    if token is not None:
        message = translate.progress_for(message, client.version)
        text = message.params_text({"progressToken": dumps(token)})
        call.deliver(Interim(build_notification(message.method, text)))


def untagged(message: Message) -> Message:
    """A notice without the ``_meta`` that says which of our listens it belongs to."""
    meta = message.meta
    if not meta:
        return message
    kept = {name: value for name, value in meta.items() if not name.startswith(META)}
    return decode_request(
        f'{{"jsonrpc":"2.0","method":{quote(message.method)},"params":{message.params_text({"_meta": dumps(kept)})}}}'
    )


# ------------------------------------------------------------------------------------------------------------- rounds
def is_input_required(message: Message) -> bool:
    """Whether a modern server wants input before it answers."""
    return message.kind is RESULT and type(message.result) is dict and message.result.get("resultType") == (
        "input_required"
    )


class Rounds:
    """The rounds of one legacy client's call at a modern server (section 4.3).

    ``retry`` sends the same request again, under a new id, with these members of params (name -> JSON text). Nothing
    is asked of a client beyond what it declared, and a client that refuses ends what can't go on without it.
    """

    __slots__ = ("_answers", "_call", "_count", "_open", "_retry", "_state", "_stateless", "progress")

    def __init__(self, call: Call, retry: Callable[[dict[str, str]], None]) -> None:
        self._call = call
        self._retry = retry
        self._count = 0
        self._stateless = 0
        self._state: str | None = None
        self._open: dict[str, Ask] = {}
        self._answers: dict[str, str] = {}
        self.progress: float = float("-inf")

    @classmethod
    def of(cls, call: Call, again: Callable[[Call, dict[str, str]], None]) -> Rounds:
        """Those of this call, which begin with the first use; ``again`` is ``retry`` for any call."""
        if call.rounds is None:
            call.rounds = cls(call, partial(again, call))
        rounds: Rounds = call.rounds
        return rounds

    def risen(self, progress: object) -> bool:
        """Whether this progress may be shown: each round counts anew, a client must only see it rise."""
        if type(progress) not in (int, float):
            return True
        value = float(progress)  # type: ignore[arg-type]
        if value <= self.progress:
            return False
        self.progress = value
        return True

    def another(self, message: Message, pending: Pending, nursery: trio.Nursery) -> None:
        """An ``input_required`` result, to a call that is among those in flight under the id of its next request.

        It stays there till then, or ends with an error when the server does not keep to the rules.
        """
        try:
            pause = self.take(message)
        except GatewayError as error:
            pending.drop(self._call)
            self._call.fail(error)
            return
        if pause is not None:
            nursery.start_soon(self._go_after, pause)

    async def _go_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        if not self._call.done:
            self.go()

    def take(self, message: Message) -> float | None:
        """An ``input_required`` result: put its questions to the client.

        None when they are out: the retry follows by itself once all are answered. Else nothing is asked, only the state
        is to be carried back, by ``go`` after so many seconds. Raises ServerProtocolError.
        """
        who = f"The server asked for input in {self._call.exchange.message.method}"
        self._count += 1
        if self._count > MAX_ROUNDS:
            raise ServerProtocolError(f"{who} more than {MAX_ROUNDS} times")
        state = message.result.get("requestState")
        self._state = state if type(state) is str else None
        self._answers = {}
        requests = message.result.get("inputRequests")
        if not requests:
            if self._state is None:
                raise ServerProtocolError(f"{who} and named neither a question nor a state")
            self._stateless += 1
            return float(min(FIRST_PAUSE * 2 ** (self._stateless - 1), LONGEST_PAUSE))
        asks = [(key, self._question(key, entry, who)) for key, entry in dict(requests).items()]
        if self._call.done:
            return None
        self._open = {key: ask for key, ask in asks if ask is not None}
        for ask in list(self._open.values()):
            self._call.deliver(ask)
        return None

    def go(self) -> None:
        """Send the next round."""
        changes = {}
        if self._answers:
            changes["inputResponses"] = "{" + ",".join(f"{quote(k)}:{v}" for k, v in self._answers.items()) + "}"
        if self._state is not None:
            changes["requestState"] = quote(self._state)
        self._retry(changes)

    def _question(self, key: str, entry: Any, who: str) -> Ask | None:
        method = entry.get("method") if type(entry) is dict else None
        params = (entry.get("params") or {}) if type(entry) is dict else None
        needed = translate.capability_needed(method, params) if type(method) is str and type(params) is dict else None
        if needed is None:
            raise ServerProtocolError(f"{who} by a request that is not known: {str(method)[:80]!r}")
        client = self._call.exchange.client
        if client.owner is None or not translate.declares(client.capabilities, needed):
            self._refused(f"The server needs a capability that the client has not declared: {dumps(needed)}", -32603)
            return None
        assert type(method) is str and type(params) is dict
        text = translate.question_to_legacy(method, params, client.version, f"open-mcp-gateway-{next(_elicitations)}")
        message = decode_request(build_request("0", method, text))
        return Ask(message, lambda reply: self._answered(key, method, reply))

    def _answered(self, key: str, method: str, text: str) -> None:
        ask = self._open.pop(key, None)
        if ask is None or self._call.done:
            return
        reply = decode_reply(text)
        if reply.kind is RESULT:
            start, end = reply.result_span
            self._answers[key] = reply.text[start:end]
        elif method == "elicitation/create":
            self._answers[key] = '{"action":"cancel"}'
        else:
            error = reply.result
            code = error.get("code") if type(error.get("code")) is int else -32603
            self._refused(f"The client refused {method}: {str(error.get('message', ''))[:300]}", code)
            return
        if not self._open:
            self.go()

    def _refused(self, text: str, code: int) -> None:
        """The call can't go on: a tool says so to its model, everything else is an error."""
        call = self._call
        if call.exchange.message.method == "tools/call":
            reply = Reply.result(dumps({"content": [{"type": "text", "text": text}], "isError": True}))
        else:
            reply = Reply.error(code, text, {"source": "gateway"})
        for ask in self._open.values():
            ask.withdraw("the call is over")
        self._open = {}
        call.link.forget(call)
        call.finish(reply)
