"""Single messages between the two eras: what a reply, a question or a notification is called on the other side.

Pure: JSON texts and decoded messages in, texts and messages out. Whatever the other era does not forbid passes
unchanged, unknown members included; texts are spliced by offset, since results may be large (protocol.md section 4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from json import JSONDecoder
from typing import Any, Final

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
    Message,
    build_error,
    build_notification,
    build_result,
    decode_reply,
    decode_request,
    dumps,
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
        "server/discover",
        "tools/list",
        "prompts/list",
        "resources/list",
        "resources/templates/list",
        "resources/read",
    )
)
"""Methods whose results say how long they may be kept (2026-07-28, caching)."""

_2024: Final = LEGACY_VERSIONS[0]
_JUNE: Final = "2025-06-18"
_NOVEMBER: Final = "2025-11-25"
_RELATED_TASK: Final = META + "related-task"


# ----------------------------------------------------------------------------------------------- replies, to the modern
def to_modern(method: str, message: Message, server_info: str, cache: tuple[int, str] | None = None) -> str:
    """A reply of whatever origin as the member of a modern reply: ``"result":{...}`` or ``"error":{...}``.

    Completes what a legacy server or the gateway itself left out: ``resultType``, ``ttlMs`` and ``cacheScope``
    (``cache``, by default 0 and "private"). ``server_info`` is the gateway's own serverInfo as JSON text, which takes
    the place of the server's. A modern result stays as it is otherwise.
    """
    if message.kind is ERROR:
        return f'"error":{_error_to_modern(message)}'
    start, end = message.result_span
    result = message.result
    text = message.text[start:end]
    if type(result) is not dict:
        return f'"result":{text}'
    added = "" if "resultType" in result else '"resultType":"complete",'
    if method in CACHED and result.get("resultType", "complete") == "complete":
        ttl, scope = cache or (0, "private")
        if "ttlMs" not in result:
            added += f'"ttlMs":{ttl},'
        if "cacheScope" not in result:
            added += f'"cacheScope":{quote(scope)},'
    if method == "tools/list" and '"execution"' in text:
        text = _without_execution(result, text)
    if "_meta" not in result:
        added += f'"_meta":{{{_QUOTED_INFO}:{server_info}}},'
        body = text[1:].lstrip()
        return f'"result":{{{added[:-1] if body == "}" else added}{body}'
    span = _info_span(text)
    if span is not None:
        return f'"result":{{{added}{text[1 : span[0]]}{server_info}{text[span[1] :]}'
    meta = result["_meta"]
    kept = {name: value for name, value in meta.items() if name != SERVER_INFO} if type(meta) is dict else {}
    joined = f'{{{_QUOTED_INFO}:{server_info}{"," if kept else ""}{dumps(kept)[1:]}'
    members = {**{name: dumps(value) for name, value in result.items()}, "_meta": joined}
    return '"result":{' + added + ",".join(f"{quote(name)}:{value}" for name, value in members.items()) + "}"


def _info_span(text: str) -> tuple[int, int] | None:
    """Where the server's name stands in a result that has a ``_meta``; None where that is not plain.

    A member of that name that is the only one in the text may still be another object's, but then it is a result inside
    a result, and says the same.
    """
    if text.count(_QUOTED_INFO) != 1:
        return None
    found = _after_info(text)
    if found is None:
        return None
    try:
        return found.end(), _scan(text, found.end())[1]
    except (ValueError, StopIteration, RecursionError):
        return None


_alone = re.compile(r'("_meta"\s*:\s*\{\s*)$').search
_scan = JSONDecoder().raw_decode
_after_info = re.compile(re.escape(quote(SERVER_INFO)) + r"\s*:\s*").search
_QUOTED_INFO: Final = quote(SERVER_INFO)


def _without_execution(result: Mapping[str, Any], text: str) -> str:
    tools = result.get("tools")
    if type(tools) is not list:
        return text
    kept = [{k: v for k, v in tool.items() if k != "execution"} if type(tool) is dict else tool for tool in tools]
    return dumps({**result, "tools": kept})


def _error_to_modern(message: Message) -> str:
    error = message.result
    code = error.get("code")
    if code == NO_RESOURCE:
        return dumps({**error, "code": INVALID_PARAMS})
    if code == URL_ELICITATION:
        return dumps({**error, "code": INTERNAL_ERROR})
    return dumps(error)


# ----------------------------------------------------------------------------------------------- replies, to the legacy
def to_legacy(method: str, message: Message, version: str, *, uri: str = "") -> Message:
    """A modern server's reply in the dialect of a legacy revision: nothing modern in it, and what that revision does
    not know replaced by something that it does (section 4.4). ``uri`` is the resource that was asked for.
    """
    if message.kind is ERROR:
        return _error_to_legacy(method, message, uri)
    result = message.result
    if type(result) is not dict:
        return message
    if _needs_rework(method, result, version):
        kept = {name: value for name, value in result.items() if name not in _MODERN_ONLY}
        return decode_reply(build_result(message.id_text, dumps(_downgraded(method, _without_info(kept), version))))
    text = message.text
    if '"_meta"' in text and SERVER_INFO in (result.get("_meta") or {}):
        cut = _without_info_text(text)
        if cut is None:
            return _rebuilt(message)
        text = cut
    for name, pattern in _SCALARS.items():
        if name in result:
            if text.count(f'"{name}"') != 1:
                return _rebuilt(message)
            # It is a member of the result, and stands in the text once: so there.
            text = pattern.sub(_joint, text, count=1)
    return message if text is message.text else decode_reply(text)


def _without_info_text(text: str) -> str | None:
    """The text without the server's name, None where that is not plain."""
    span = _info_span(text)
    if span is None:
        return None
    start = text.rindex(_QUOTED_INFO, 0, span[0])
    alone = _alone(text[:start])
    if alone is not None and text[span[1] :].lstrip()[:1] == "}":
        # Nothing else is in that ``_meta``: it goes altogether.
        start, span = alone.start(1), (0, text.index("}", span[1]) + 1)
    before, after = text[:start].rstrip(), text[span[1] :].lstrip()
    if before.endswith(","):
        return before[:-1] + after
    return before + (after[1:] if after.startswith(",") else after)


def _joint(found: re.Match[str]) -> str:
    """What is left of a member that is cut out with the commas around it: one, if it stood between two others."""
    return "," if found[1] and found[2] else ""


_SCALARS: Final = {
    "resultType": re.compile(r'(,?)\s*"resultType"\s*:\s*"[^"\\]*"\s*(,?)'),
    "ttlMs": re.compile(r'(,?)\s*"ttlMs"\s*:\s*[0-9.eE+-]+\s*(,?)'),
    "cacheScope": re.compile(r'(,?)\s*"cacheScope"\s*:\s*"[^"\\]*"\s*(,?)'),
}
_MODERN_ONLY: Final = frozenset(_SCALARS)


def _rebuilt(message: Message) -> Message:
    kept = {name: value for name, value in message.result.items() if name not in _MODERN_ONLY}
    return decode_reply(build_result(message.id_text, dumps(_without_info(kept))))


def _without_info(result: dict[str, Any]) -> dict[str, Any]:
    meta = result.get("_meta")
    if type(meta) is not dict or SERVER_INFO not in meta:
        return result
    kept = {name: value for name, value in meta.items() if name != SERVER_INFO}
    return {**result, "_meta": kept} if kept else {name: v for name, v in result.items() if name != "_meta"}


def _needs_rework(method: str, result: Mapping[str, Any], version: str) -> bool:
    if method == "tools/call":
        if "structuredContent" in result and (version < _JUNE or type(result["structuredContent"]) is not dict):
            return True
        return version < _JUNE and any(_unknown_part(part, version) for part in _list(result.get("content")))
    if method == "tools/list":
        return any(
            version < _JUNE or not _object_schema(tool.get("outputSchema"))
            for tool in _list(result.get("tools"))
            if type(tool) is dict and "outputSchema" in tool
        )
    if method == "prompts/get" and version < _JUNE:
        messages = _list(result.get("messages"))
        return any(_unknown_part(m.get("content"), version) for m in messages if type(m) is dict)
    return False


def _list(value: Any) -> list[Any]:
    return value if type(value) is list else []


def _object_schema(schema: Any) -> bool:
    return type(schema) is dict and schema.get("type") == "object"


def _unknown_part(part: Any, version: str) -> bool:
    if type(part) is not dict:
        return False
    kind = part.get("type")
    return kind == "resource_link" or (version == _2024 and (kind == "audio" or "annotations" in part))


def _downgraded(method: str, result: dict[str, Any], version: str) -> dict[str, Any]:
    if method == "tools/call":
        structured = result.get("structuredContent")
        if "structuredContent" in result and (version < _JUNE or type(structured) is not dict):
            del result["structuredContent"]
            if not _list(result.get("content")):
                # Servers should send it as text, too; one that did not must not look empty.
                result["content"] = [{"type": "text", "text": dumps(structured)}]
        result["content"] = [_part(part, version) for part in _list(result.get("content"))]
    elif method == "tools/list":
        result["tools"] = [
            {name: value for name, value in tool.items() if name != "outputSchema"}
            if type(tool) is dict and (version < _JUNE or not _object_schema(tool.get("outputSchema")))
            else tool
            for tool in _list(result.get("tools"))
        ]
    elif method == "prompts/get":
        result["messages"] = [
            {**m, "content": _part(m["content"], version)} if type(m) is dict and "content" in m else m
            for m in _list(result.get("messages"))
        ]
    return result


def _part(part: Any, version: str) -> Any:
    """A content part as that revision can show it."""
    if type(part) is not dict or not version < _JUNE:
        return part
    if part.get("type") == "resource_link":
        name = part.get("title") or part.get("name") or ""
        return {"type": "text", "text": f"{name}: {part.get('uri', '')}" if name else str(part.get("uri", ""))}
    if version == _2024:
        if part.get("type") == "audio":
            return {"type": "text", "text": f"[audio, {part.get('mimeType', 'unknown type')}, not shown]"}
        return {name: value for name, value in part.items() if name != "annotations"}
    return part


def _error_to_legacy(method: str, message: Message, uri: str) -> Message:
    error = message.result
    code, data = error.get("code"), error.get("data")
    if code == MISSING_CAPABILITY:
        needed = data.get("requiredCapabilities") if type(data) is dict else None
        text = f"The server needs a capability that the client does not have: {dumps(needed)}"
        if method == "tools/call":
            result = {"content": [{"type": "text", "text": text}], "isError": True}
            return decode_reply(build_result(message.id_text, dumps(result)))
        return decode_reply(build_error(message.id_text, INTERNAL_ERROR, text, data))
    if code in (HEADER_MISMATCH, UNSUPPORTED_VERSION):
        return decode_reply(build_error(message.id_text, INTERNAL_ERROR, str(error.get("message", "")), data))
    if code == INVALID_PARAMS and method == "resources/read" and type(data) is dict and "uri" in data:
        return decode_reply(build_error(message.id_text, NO_RESOURCE, str(error.get("message", "")), data))
    return message


# ---------------------------------------------------------------------------------------------------------- questions
def question_to_modern(message: Message) -> dict[str, Any]:
    """A legacy server's request as an entry of ``inputRequests``."""
    params = dict(message.params) if type(message.params) is dict else {}
    for name in ("elicitationId", "task"):
        params.pop(name, None)
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

    Up to 2025-06-18 forms have no ``mode``; the URLs of 2025-11-25 need an id, ``elicitation_id``.
    """
    members = dict(params)
    if method == "elicitation/create":
        if version < _NOVEMBER:
            members.pop("mode", None)
        elif members.get("mode") == "url":
            members["elicitationId"] = elicitation_id
    return dumps(members)


def capability_needed(method: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The client capability that a question needs, as it would be declared; None for a method that is none."""
    if method == "elicitation/create":
        return {"elicitation": {"url": {}} if params.get("mode") == "url" else {"form": {}}}
    if method == "sampling/createMessage":
        needed: dict[str, Any] = {}
        if "tools" in params or "toolChoice" in params:
            needed["tools"] = {}
        if params.get("includeContext", "none") != "none":
            needed["context"] = {}
        return {"sampling": needed}
    if method == "roots/list":
        return {"roots": {}}
    return None


def declares(capabilities: Mapping[str, Any], needed: Mapping[str, Any]) -> bool:
    """Whether a client has declared a capability of ``capability_needed``. ``elicitation: {}`` means forms only.

    ``sampling.context`` is forgiven: before 2025-11-25 nobody declared it, and a client may leave the context out.
    """
    for name, parts in needed.items():
        own = capabilities.get(name)
        if type(own) is not dict:
            return False
        for part in parts:
            if part == "context" or (part == "form" and not own.keys() & {"form", "url"}):
                continue
            if part not in own:
                return False
    return True


def session_capabilities(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    """What a legacy session declared, as the capabilities of each request: no tasks, no roots.listChanged (4.3)."""
    kept = {name: value for name, value in capabilities.items() if name != "tasks"}
    roots = kept.get("roots")
    if type(roots) is dict:
        kept["roots"] = {name: value for name, value in roots.items() if name != "listChanged"}
    return kept


def progress_for(message: Message, version: str) -> Message:
    """A progress notification for a client of that revision: the oldest has no ``message``."""
    if version != _2024 or message.param("message") is None:
        return message
    params = {name: value for name, value in message.params.items() if name != "message"}
    return decode_request(build_notification(message.method, dumps(params)))
