"""Single messages between the two eras: what a reply, a question or a notice is called on the other side.

Pure: texts and decoded messages in, texts and messages out. Whatever the other era does not forbid passes unchanged,
unknown members included. Texts are cut and joined by offset and never encoded anew: results may be large, and what a
server sent may not survive it (numbers that overflow, lone surrogates). protocol.md, sections 1 and 4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from json.decoder import JSONDecoder
from typing import Any, Final

from gateway.errors import ServerProtocolError
from gateway.protocol.eras import (
    HEADER_MISMATCH,
    LEGACY_VERSIONS,
    META,
    MISSING_CAPABILITY,
    NO_RESOURCE,
    SERVER_INFO,
    UNSUPPORTED_VERSION,
    URL_ELICITATION,
)
from gateway.protocol.message import (
    ERROR,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    RESULT,
    Message,
    build_notification,
    build_result,
    decode_reply,
    quote,
)

__all__ = [
    "CACHED",
    "capability_needed",
    "declares",
    "progress_for",
    "question_to_legacy",
    "question_to_modern",
    "session_capabilities",
    "to_legacy",
    "to_modern",
]

CACHED: Final = frozenset(
    (
        *("server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list"),
        "resources/read",
    )
)
"""Methods whose results say how long they may be kept (2026-07-28, caching)."""

OLDEST: Final = LEGACY_VERSIONS[0]
JUNE: Final = "2025-06-18"
NOVEMBER: Final = "2025-11-25"
_RELATED_TASK: Final = META + "related-task"
_TASKS: Final = META + "tasks"
_MODERN_MEMBERS: Final = ("resultType", "ttlMs", "cacheScope")
_LEGACY: Final = frozenset(LEGACY_VERSIONS)
_MODERN_SET: Final = frozenset(_MODERN_MEMBERS)
_INFO: Final = quote(SERVER_INFO)

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON in ASCII: what a server said may hold lone surrogates, which have no UTF-8."""


# -------------------------------------------------------------------------------------------- places in a (valid) text
# As in ``message``: ``scan_once`` gives value and end in one step. The texts here have been decoded before.
_scan: Callable[[str, int], tuple[Any, int]] = JSONDecoder().scan_once  # type: ignore[attr-defined]
_key = re.compile(r'[ \t\n\r]*("(?:[^"\\]|\\.)*")[ \t\n\r]*:[ \t\n\r]*').match
_next = re.compile(r"[ \t\n\r]*([,\]}])[ \t\n\r]*").match
_space = re.compile(r"[ \t\n\r]*").match

_Member = tuple[str, int, int, int]


def _members(text: str, at: int) -> list[_Member]:
    """The object at ``at``: name, start of the name, start and end of the value for each member."""
    members: list[_Member] = []
    found = _key(text, at + 1)
    while found is not None:
        value, end = found.end(), _scan(text, found.end())[1]
        members.append((json.loads(found[1]), found.start(1), value, end))
        mark = _next(text, end)
        if mark is None or mark[1] != ",":
            break
        found = _key(text, mark.end())
    return members


def _items(text: str, at: int) -> list[tuple[int, int]]:
    """The array at ``at``: start and end of each item."""
    items: list[tuple[int, int]] = []
    found = _space(text, at + 1)
    while found is not None and text[found.end()] != "]":
        end = _scan(text, found.end())[1]
        items.append((found.end(), end))
        mark = _next(text, end)
        if mark is None or mark[1] != ",":
            break
        found = _space(text, mark.end())
    return items


_Changes = Mapping[str, tuple[str, Any] | None]
"""Member -> its new text and value, None to drop it."""


def _changed(text: str, at: int, value: Mapping[str, Any], changes: _Changes) -> tuple[str, dict[str, Any]]:
    """The object at ``at`` with some members replaced, dropped or added: text and value."""
    parts = []
    for name, start, first, last in _members(text, at):
        if name not in changes:
            parts.append(text[start:last])
        elif (change := changes[name]) is not None:
            parts.append(text[start:first] + change[0])
    parts += [f"{quote(name)}:{new[0]}" for name, new in changes.items() if new is not None and name not in value]
    made = {name: kept for name, kept in value.items() if name not in changes}
    made |= {name: new[1] for name, new in changes.items() if new is not None}
    return "{" + ",".join(parts) + "}", made


def _spelled_out(text: str, start: int, end: int) -> bool:
    """Whether no member's name there can be spelled with escapes.

    Then a name that a decoded object has, and that stands in quotes exactly once, is that very member: within a string
    its quotes would be escaped. Only that a whole string says the same is left to the caller: a colon follows a name.
    """
    return text.find("\\", start, end) < 0 or (text.find("\\u00", start, end) < 0 and text.find("\\/", start, end) < 0)


# ----------------------------------------------------------------------------------------------- replies, to the modern
def to_modern(
    method: str, message: Message, server_info: str, cache: tuple[int, str] | None = None, *, uri: str = ""
) -> str:
    """A reply of whatever origin as the member of a modern reply: ``"result":{...}`` or ``"error":{...}``.

    Completes what a legacy server or the gateway itself left out: ``resultType``, and for CACHED methods ``ttlMs`` and
    ``cacheScope`` (``cache``, by default 0 and "private"). ``server_info`` is the gateway's own serverInfo as JSON
    text, which takes the place of the server's. ``uri`` is the resource that was asked for, for errors that must name
    it. A modern result stays as it is otherwise. Never raises.
    """
    result = message.result
    if message.kind is ERROR:
        return f'"error":{_error_to_modern(method, message, uri)}'
    if type(result) is not dict:
        return f'"error":{{"code":{INTERNAL_ERROR},"message":"The result of the server is no object"}}'
    text = message.text
    start, end = message.result_span
    added = "" if "resultType" in result else '"resultType":"complete",'
    if method in CACHED and result.get("resultType", "complete") == "complete":
        ttl, scope = cache or (0, "private")
        if "ttlMs" not in result:
            added += f'"ttlMs":{ttl},'
        if "cacheScope" not in result:
            added += f'"cacheScope":{quote(scope)},'
    try:
        if method == "tools/list" and any("execution" in tool for tool in _list(result, "tools") if type(tool) is dict):
            text, result = _changed(text, start, result, {"tools": _without(text, start, result, ("execution",))})
            start, end = 0, len(text)
        if "_meta" not in result:
            added += f'"_meta":{{{_INFO}:{server_info}}}'
            return f'"result":{{{added},{text[start + 1 : end]}' if result else f'"result":{{{added}}}'
        first, last, new = _own_info(text, start, end, result["_meta"], server_info)
    except RecursionError:
        return f'"error":{_TOO_DEEP}'
    return f'"result":{{{added}{text[start + 1 : first]}{new}{text[last:end]}'


_TOO_DEEP: Final = f'{{"code":{INTERNAL_ERROR},"message":"The result of the server is nested too deep"}}'
_after = re.compile(r"[ \t\n\r]*:[ \t\n\r]*").match


def _own_info(text: str, start: int, end: int, meta: Any, server_info: str) -> tuple[int, int, str]:
    """What to put where in the text of a result, so that its ``_meta`` bears our name."""
    own = type(meta) is dict and SERVER_INFO in meta
    name = _INFO if own else '"_meta"'
    found = None
    if text.count(name, start, end) == 1 and _spelled_out(text, start, end):
        found = _after(text, text.find(name, start, end) + len(name))
    if found is not None:
        first = found.end()
        last = _scan(text, first)[1] if own or type(meta) is not dict else first
    else:
        first, last = next((member[2], member[3]) for member in reversed(_members(text, start)) if member[0] == "_meta")
        if own:
            inner = reversed(_members(text, first))
            first, last = next((member[2], member[3]) for member in inner if member[0] == SERVER_INFO)
    if own:
        return first, last, server_info
    if type(meta) is not dict:
        return first, last, f"{{{_INFO}:{server_info}}}"
    return first + 1, first + 1, f"{_INFO}:{server_info}{',' if meta else ''}"


def _error_to_modern(method: str, message: Message, uri: str) -> str:
    """An error in a code that the modern era has; -32002 and -32042 are banned there."""
    error = message.result
    code, data = error.get("code"), error.get("data")
    changes: dict[str, tuple[str, Any]] = {}
    if code == NO_RESOURCE:
        changes["code"] = (str(INVALID_PARAMS), INVALID_PARAMS)
    elif code == URL_ELICITATION or type(code) is not int:
        changes["code"] = (str(INTERNAL_ERROR), INTERNAL_ERROR)
    if type(error.get("message")) is not str:
        changes["message"] = ('"The server gave no reason"', "")
    if uri and (code == NO_RESOURCE or _names_resource(method, code, data)):
        changes["data"] = _with_uri(message, uri)
    start, end = message.result_span
    if not end:  # of our own making, by ``Reply.error``
        return _encode({**error, **{name: value for name, (_, value) in changes.items()}})
    if not changes:
        return message.text[start:end]
    return _changed(message.text, start, error, changes)[0]


def _names_resource(method: str, code: object, data: Any) -> bool:
    """Whether a modern error says that there is no such resource."""
    return method == "resources/read" and code == INVALID_PARAMS and type(data) is dict and "uri" in data


def _with_uri(message: Message, uri: str) -> tuple[str, Any]:
    """The data of an error with the URI that the client knows."""
    data = message.result.get("data")
    new = (quote(uri), uri)
    start, end = message.result_span
    if type(data) is not dict or not end:
        data = {**(data if type(data) is dict else {}), "uri": uri}
        return _encode(data), data
    at = next(member[2] for member in reversed(_members(message.text, start)) if member[0] == "data")
    return _changed(message.text, at, data, {"uri": new})


# ----------------------------------------------------------------------------------------------- replies, to the legacy
def to_legacy(method: str, message: Message, version: str, *, uri: str = "") -> Message:
    """A modern server's reply in the dialect of a legacy revision: nothing modern in it, and what that revision does
    not know dropped or replaced by something that it does (section 4.4). Idempotent. Never raises.

    ``uri`` is the resource that was asked for, as the client calls it. For a ``version`` that is no legacy revision the
    message stays as it is: the gateway itself asked, and reads all of it.
    """
    if version not in _LEGACY:
        return message
    if message.kind is ERROR:
        return _error_to_legacy(method, message, uri)
    result = message.result
    if type(result) is not dict:
        return message
    kind = result.get("resultType", "complete")
    if kind != "complete":
        return _error(message, INTERNAL_ERROR, f"The server answered {method} with a result of type {kind!r:.60}")
    meta: Any = result.get("_meta")
    named = type(meta) is dict and SERVER_INFO in meta
    alone = named and len(meta) == 1
    try:
        changes = _downgrades(method, message, version)
        if not changes:
            if not named and _MODERN_SET.isdisjoint(result):
                return message
            cut = _cut(message, alone) if alone or not named else None
            if cut is not None:
                return _result(message, *cut)
        changes |= dict.fromkeys(_MODERN_MEMBERS)
        start = message.result_span[0]
        if alone:
            changes["_meta"] = None
        elif named:
            at = next(member[2] for member in reversed(_members(message.text, start)) if member[0] == "_meta")
            changes["_meta"] = _changed(message.text, at, meta, {SERVER_INFO: None})
        return _result(message, *_changed(message.text, start, result, changes))
    except RecursionError:
        return _error(message, INTERNAL_ERROR, "The result of the server is nested too deep")


_scalar = re.compile(r'"[^"\\]*"[ \t\n\r]*:[ \t\n\r]*(?:"[^"\\]*"|[-+.0-9a-zA-Z]+)[ \t\n\r]*(,[ \t\n\r]*)?').match
# A serverInfo of plain members, alone in its ``_meta``; others take the general way.
_only_info = re.compile(
    rf'"_meta"[ \t\n\r]*:[ \t\n\r]*\{{[ \t\n\r]*{re.escape(_INFO)}[ \t\n\r]*:[ \t\n\r]*'
    r'\{(?:[^][{}"\\]++|"[^"\\]*+")*+\}[ \t\n\r]*\}[ \t\n\r]*(,[ \t\n\r]*)?'
).match


def _cut(message: Message, info: bool) -> tuple[str, dict[str, Any]] | None:
    """A result without its modern members, and without ``_meta`` if ``info`` says that only the server's name is in
    it; None where plain cutting will not do.
    """
    text = message.text
    start, end = message.result_span
    result = message.result.copy()
    if not _spelled_out(text, start, end):
        return None
    cuts = []
    for name, quoted in _QUOTED.items():
        if name in result:
            del result[name]
            if text.count(quoted, start, end) != 1:
                return None
            at = text.find(_USUAL, start, end) if name == "resultType" else -1
            if at >= 0:
                cuts.append((at, at + len(_USUAL), ","))
                continue
            found = _scalar(text, text.find(quoted, start, end))
            if found is None:
                return None
            cuts.append((found.start(), found.end(), found[1]))
    if info:
        del result["_meta"]
        found = _only_info(text, text.find('"_meta"', start, end)) if text.count('"_meta"', start, end) == 1 else None
        if found is None:
            return None
        cuts.append((found.start(), found.end(), found[1]))
    cuts.sort()
    kept = ""
    for first, last, comma in cuts:
        kept += text[start:first]
        start = last
        if comma is None:  # the last member: the comma before it goes, too
            kept = kept.rstrip(" \t\n\r").removesuffix(",")
    return kept + text[start:end], result


_USUAL: Final = '"resultType":"complete",'
_QUOTED: Final = {name: quote(name) for name in _MODERN_MEMBERS}


def _result(message: Message, text: str, result: Any) -> Message:
    """A RESULT under the id of ``message``."""
    made = Message(build_result(message.id_text, text), RESULT)
    made.id, made.id_text = message.id, message.id_text
    at = 22 + len(message.id_text)
    made.id_span = (22, at)
    made.result_span = (at + 10, at + 10 + len(text))
    made.result = result
    return made


def _error(message: Message, code: int, text: str, data: tuple[str, Any] | None = None) -> Message:
    """An ERROR under the id of ``message``."""
    tail = "" if data is None else f',"data":{data[0]}'
    error = f'{{"code":{code},"message":{quote(text)}{tail}}}'
    made = Message(f'{{"jsonrpc":"2.0","id":{message.id_text},"error":{error}}}', ERROR)
    made.id, made.id_text = message.id, message.id_text
    at = 22 + len(message.id_text)
    made.id_span = (22, at)
    made.result_span = (at + 9, at + 9 + len(error))
    made.result = {"code": code, "message": text}
    if data is not None:
        made.result["data"] = data[1]
    return made


def _error_to_legacy(method: str, message: Message, uri: str) -> Message:
    error = message.result
    code, data = error.get("code"), error.get("data")
    if code == MISSING_CAPABILITY:
        needed = data.get("requiredCapabilities") if type(data) is dict else None
        named = ", ".join(_named(needed)) if type(needed) is dict else ""
        text = f"The server needs a capability that the client has not declared: {named or error.get('message')}"
        if method == "tools/call":
            result = {"content": [{"type": "text", "text": text}], "isError": True}
            return _result(message, _encode(result), result)
        return _error(message, INTERNAL_ERROR, text)
    if code in (HEADER_MISMATCH, UNSUPPORTED_VERSION):
        # What our hop and the server disagree about is not the client's business.
        return _error(message, INTERNAL_ERROR, f"The server refused the gateway's request: {error.get('message')}")
    if _names_resource(method, code, data):
        new = _with_uri(message, uri or str(data["uri"]))
        return _error(message, NO_RESOURCE, str(error.get("message", "")), new)
    return message


def _named(capabilities: Mapping[str, Any]) -> list[str]:
    """Capabilities in words: "sampling", "elicitation.url"."""
    named = []
    for name, parts in capabilities.items():
        named += [f"{name}.{part}" for part in parts] if type(parts) is dict and parts else [name]
    return named


# ----------------------------------------------------------------------------------------------------------- downgrades
def _list(value: Mapping[str, Any], name: str) -> list[Any]:
    found = value.get(name)
    return found if type(found) is list else []


def _downgrades(method: str, message: Message, version: str) -> dict[str, tuple[str, Any] | None]:
    """What that revision wants otherwise in a result."""
    result = message.result
    if method == "tools/call":
        old = version < JUNE
        unstructured = "structuredContent" in result and (old or type(result["structuredContent"]) is not dict)
        if unstructured or (old and any(_unknown_part(part, version) for part in _list(result, "content"))):
            return _tool_result(message, version, unstructured)
    elif method == "tools/list":
        tools = _list(result, "tools")
        dropped = ("outputSchema", "annotations") if version == OLDEST else ("outputSchema",)
        keep = None if version < JUNE else _object_schema
        if any(type(tool) is dict and _dropped(tool, dropped, keep) for tool in tools):
            return {"tools": _without(message.text, message.result_span[0], result, dropped, keep)}
    elif method == "prompts/get" and version < JUNE:
        messages = _list(result, "messages")
        if any(type(said) is dict and _unknown_part(said.get("content"), version) for said in messages):
            return {"messages": _prompt_messages(message, version)}
    return {}


def _object_schema(schema: Any) -> bool:
    """Whether a schema describes an object, as outputSchema had to until 2025-11-25."""
    return type(schema) is dict and schema.get("type") == "object"


_Keep = Callable[[Any], bool] | None


def _dropped(item: Mapping[str, Any], names: Sequence[str], keep: _Keep) -> list[str]:
    return [name for name in names if name in item and (keep is None or not keep(item[name]))]


def _without(
    text: str, start: int, result: Mapping[str, Any], names: Sequence[str], keep: _Keep = None
) -> tuple[str, list[Any]]:
    """The tools of a result without some members; ``keep`` tells by a member's value if it may stay."""
    at = next(member[2] for member in reversed(_members(text, start)) if member[0] == "tools")
    texts, tools = [], []
    for (first, last), tool in zip(_items(text, at), result["tools"], strict=True):
        dropped = _dropped(tool, names, keep) if type(tool) is dict else []
        new, value = _changed(text, first, tool, dict.fromkeys(dropped)) if dropped else (text[first:last], tool)
        texts.append(new)
        tools.append(value)
    return f"[{','.join(texts)}]", tools


def _tool_result(message: Message, version: str, unstructured: bool) -> dict[str, tuple[str, Any] | None]:
    text, result = message.text, message.result
    places = {member[0]: member for member in _members(text, message.result_span[0])}
    texts, parts = [], []
    content = _list(result, "content")
    if content:
        for (first, last), part in zip(_items(text, places["content"][2]), content, strict=True):
            new, value = _part(text, first, part, version) if _unknown_part(part, version) else (text[first:last], part)
            texts.append(new)
            parts.append(value)
    changes: dict[str, tuple[str, Any] | None] = {}
    if unstructured:
        changes["structuredContent"] = None
        if not any(type(part) is dict and part.get("type") == "text" for part in parts):
            # Servers should say it in text, too; what one did not must not get lost.
            _, _, first, last = places["structuredContent"]
            texts.append(_text_part(text[first:last]))
            parts.append({"type": "text", "text": text[first:last]})
    changes["content"] = (f"[{','.join(texts)}]", parts)
    return changes


def _prompt_messages(message: Message, version: str) -> tuple[str, list[Any]]:
    text, result = message.text, message.result
    at = next(member[2] for member in reversed(_members(text, message.result_span[0])) if member[0] == "messages")
    texts, messages = [], []
    for (first, last), said in zip(_items(text, at), result["messages"], strict=True):
        new, value = text[first:last], said
        if type(said) is dict and _unknown_part(said.get("content"), version):
            place = next(member[2] for member in reversed(_members(text, first)) if member[0] == "content")
            new, value = _changed(text, first, said, {"content": _part(text, place, said["content"], version)})
        texts.append(new)
        messages.append(value)
    return f"[{','.join(texts)}]", messages


def _unknown_part(part: Any, version: str) -> bool:
    """Whether a content part needs another shape before 2025-06-18."""
    if version >= JUNE or type(part) is not dict:
        return False
    kind = part.get("type")
    return kind == "resource_link" or (version == OLDEST and (kind == "audio" or "annotations" in part))


def _part(text: str, at: int, part: Mapping[str, Any], version: str) -> tuple[str, Any]:
    """A content part (one of ``_unknown_part``) as an old revision can show it."""
    kind = part.get("type")
    if kind == "resource_link":
        uri, name = str(part.get("uri", "")), part.get("title") or part.get("name")
        said = f"{name}: {uri}" if name and name != uri else uri
    elif kind == "audio":
        said = f"[audio, {part.get('mimeType', 'unknown type')}: not shown, this client knows no audio]"
    else:
        return _changed(text, at, part, {"annotations": None})
    return _text_part(said), {"type": "text", "text": said}


def _text_part(said: str) -> str:
    return f'{{"type":"text","text":{quote(said)}}}'


# -------------------------------------------------------------------------------------------- questions, capabilities
def question_to_modern(message: Message) -> dict[str, Any]:
    """A legacy server's request as an entry of ``inputRequests``: without what only a legacy client could use."""
    params = message.params if type(message.params) is dict else {}
    params = {name: value for name, value in params.items() if name not in ("elicitationId", "task")}
    meta = params.get("_meta")
    if type(meta) is dict:
        kept = {name: value for name, value in meta.items() if name not in (_RELATED_TASK, "progressToken")}
        if kept:
            params["_meta"] = kept
        else:
            del params["_meta"]
    return {"method": message.method, "params": params}


def question_to_legacy(method: str, params: Mapping[str, Any], version: str, elicitation_id: str) -> str:
    """The params (JSON text) under which a legacy client is asked what a modern server wants to know.

    Up to 2025-06-18 forms have no ``mode``; the URLs of 2025-11-25 need an id, ``elicitation_id``. Raises
    ServerProtocolError for a question that is no JSON any more (a number that overflows).
    """
    members = dict(params)
    if method == "elicitation/create":
        if version < NOVEMBER:
            members.pop("mode", None)
        elif members.get("mode") == "url":
            members["elicitationId"] = elicitation_id
    try:
        return _encode(members)
    except ValueError:
        raise ServerProtocolError(f"The server's {method} holds a number that overflows") from None


def capability_needed(method: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The client capability that a question needs, as it would be declared; None for a method that is none."""
    if method == "elicitation/create":
        return {"elicitation": {"url": {}} if params.get("mode") == "url" else {"form": {}}}
    if method == "sampling/createMessage":
        return {"sampling": {"tools": {}} if "tools" in params or "toolChoice" in params else {}}
    if method == "roots/list":
        return {"roots": {}}
    return None


def declares(capabilities: Mapping[str, Any], needed: Mapping[str, Any]) -> bool:
    """Whether a client has declared what ``capability_needed`` names. ``elicitation: {}`` means forms only."""
    for name, parts in needed.items():
        own = capabilities.get(name)
        if type(own) is not dict:
            return False
        for part in parts:
            if part not in own and not (name == "elicitation" and part == "form" and "url" not in own):
                return False
    return True


def session_capabilities(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    """What a legacy session declared, as the capabilities of each request: no tasks, no roots.listChanged (4.3)."""
    kept = {name: value for name, value in capabilities.items() if name != "tasks"}
    for name, part in (("roots", "listChanged"), ("extensions", _TASKS)):
        own = kept.get(name)
        if type(own) is dict and part in own:
            kept[name] = {key: value for key, value in own.items() if key != part}
    return kept


# -------------------------------------------------------------------------------------------------------------- notices
def progress_for(message: Message, version: str) -> Message:
    """A progress notification for a client of that revision: the oldest knows no ``message``."""
    if version != OLDEST or message.param("message") is None:
        return message
    text = message.text
    kept = [f"{quote(name)}:{text[start:end]}" for name, (start, end) in message.spans.items() if name != "message"]
    return decode_reply(build_notification(message.method, "{" + ",".join(kept) + "}"))
