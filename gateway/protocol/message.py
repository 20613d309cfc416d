"""One JSON-RPC message: decoded once, strictly, and rewritten by slicing its text.

Two rules hold for everything below. A message is scanned exactly once, by the C scanner, and the places of its
top-level members and of the members of ``params`` are kept; whatever the gateway changes (an id, a name, a small
``_meta``) is put in by offset, so that the rest reaches the other side byte for byte, unknown members, number formats
and order included. And what was checked is what is sent on: a text that two parsers could read differently (duplicate
members, NaN, an overflowing number, a byte order mark) is refused instead of repaired (robustness RB26).

JSON-RPC 2.0 and the base protocol of every MCP revision; batches (2025-03-26 only) are split before decoding.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from json.decoder import JSONDecoder
from typing import Any, Final, NoReturn

__all__ = [
    "INTERNAL_ERROR",
    "INVALID_PARAMS",
    "INVALID_REQUEST",
    "MAX_BATCH",
    "MAX_DEPTH",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "Kind",
    "Malformed",
    "Message",
    "build_error",
    "build_notification",
    "build_request",
    "build_result",
    "decode_reply",
    "decode_request",
    "dumps",
    "quote",
    "split_batch",
    "text_of",
]

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603

MAX_DEPTH: Final = 128
MAX_BATCH: Final = 100

quote = json.encoder.encode_basestring_ascii
"""A string as a JSON string, quotes included."""

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


_encode_ascii = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def dumps(value: Any) -> str:
    """A value as compact JSON that can be sent: also one that a server made of what few can read.

    Half a surrogate pair stays an escape, since it is no UTF-8; a number that overflows stays one.
    """
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
        return text
    except UnicodeEncodeError:
        return _encode_ascii(value)
    except ValueError:
        token = f"overflow-{os.urandom(8).hex()}"
        return dumps(_marked(value, token)).replace(f'"-{token}"', "-1e999").replace(f'"{token}"', "1e999")


def _marked(value: Any, token: str) -> Any:
    """The value with a token in the place of infinities."""
    if type(value) is dict:
        return {name: _marked(part, token) for name, part in value.items()}
    if type(value) is list or type(value) is tuple:
        return [_marked(part, token) for part in value]
    if type(value) is float and value in (math.inf, -math.inf):
        return token if value > 0 else f"-{token}"
    return value


class Malformed(ValueError):
    """The text is no message. ``code`` is -32700 (no JSON) or -32600 (JSON of the wrong shape)."""

    def __init__(self, reason: str, code: int = PARSE_ERROR, id_text: str = "null") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.id_text = id_text


class Kind(enum.IntEnum):
    """What a JSON-RPC message is."""

    REQUEST = 0
    NOTIFICATION = 1
    RESULT = 2
    ERROR = 3


REQUEST, NOTIFICATION, RESULT, ERROR = Kind.REQUEST, Kind.NOTIFICATION, Kind.RESULT, Kind.ERROR

Span = tuple[int, int]


class Message:
    """A decoded message.

    text         the JSON text as received
    id           the id's value (None for null and where there is none); ``id_text`` is its exact spelling
    method       for requests and notifications, else ""
    params       the decoded params, a dict or list, None when absent; never change it
    result       the decoded result or error object of a reply; ``result_span`` is where it stands in ``text``
    extra        top-level members that JSON-RPC does not know (the REST face's ``server_id``)
    versioned    whether it says ``"jsonrpc": "2.0"``
    """

    __slots__ = (
        "_spans",
        "extra",
        "id",
        "id_span",
        "id_text",
        "kind",
        "method",
        "params",
        "params_span",
        "result",
        "result_span",
        "text",
        "versioned",
    )

    def __init__(self, text: str, kind: Kind) -> None:
        self.text = text
        self.kind = kind
        self.id: Any = None
        self.id_text = ""
        self.id_span: Span = (0, 0)
        self.method = ""
        self.params: Any = None
        self.params_span: Span = (0, 0)
        self._spans: dict[str, Span] | None = None
        self.result: Any = None
        self.result_span: Span = (0, 0)
        self.extra: dict[str, Any] | None = None
        self.versioned = True

    def __repr__(self) -> str:
        return f"<Message {self.kind.name} {self.method} id={self.id_text or '-'}>"

    @property
    def is_request(self) -> bool:
        """A request or a notification, as opposed to a reply."""
        return self.kind <= NOTIFICATION

    def param(self, name: str) -> Any:
        """One member of ``params``, None when absent."""
        params = self.params
        return params.get(name) if type(params) is dict else None

    @property
    def meta(self) -> Mapping[str, Any]:
        """``params._meta``, empty when absent or no object."""
        meta = self.param("_meta")
        return meta if type(meta) is dict else _EMPTY

    @property
    def spans(self) -> dict[str, Span]:
        """Where each member of an object ``params`` has its value in ``text``. Looked up when first needed: most
        messages go on as they came."""
        spans = self._spans
        if spans is None:
            spans = self._spans = {}
            if type(self.params) is dict:
                at = _skip(self.text, self.params_span[0] + 1)
                spans.update((name, found[1:]) for name, found in _members(self.text, at, _scan_reply)[0].items())
        return spans

    def span(self, name: str) -> Span:
        """Where one member of an object ``params`` has its value. Raises KeyError for one that is not there."""
        if self._spans is None and name in self.params:
            text, key = self.text, f'"{name}"'
            at = text.find(key)
            if at >= 0 and text.find(key, at + 1) < 0 and "\\" not in text:
                # Its name stands in the text once, and no other could be spelled with escapes: so this is it, and
                # there is no need to find the other members.
                found = _colon(text, at + len(key))
                if found is not None:
                    start = found.end()
                    return start, _scan_reply(text, start)[1]
            # No member comes twice (that was refused), so those behind it need not be looked at.
            at = self.params_span[0] + 1
            while (found := _plain_key(text, at)) is not None:
                start = found.end()
                end = _scan_reply(text, start)[1]
                if found[1] == name:
                    return start, end
                at = _skip(text, end) + 1
        return self.spans[name]

    def params_text(self, changes: Mapping[str, str] | None = None) -> str:
        """The params as JSON text, "" when absent, with some members' values replaced or added (name -> JSON text)."""
        start, end = self.params_span
        if not changes:
            return self.text[start:end]
        if type(self.params) is not dict:
            return "{" + ",".join(f"{quote(name)}:{value}" for name, value in changes.items()) + "}"
        if self.params.keys().isdisjoint(changes):
            # Nothing to replace, so no span is needed: the usual case of a ``_meta`` that is added.
            added_text = ",".join(f"{quote(name)}:{value}" for name, value in changes.items())
            if not self.params:
                return "{" + added_text + "}"
            return f"{self.text[start : end - 1]},{added_text}}}"
        if len(changes) == 1:
            ((name, value),) = changes.items()
            first, last = self.span(name)
            return f"{self.text[start:first]}{value}{self.text[last:end]}"
        parts: list[str] = []
        at = start
        replaced = [(self.span(name), value) for name, value in changes.items() if name in self.params]
        for (first, last), value in sorted(replaced) if len(replaced) > 1 else replaced:
            parts.append(self.text[at:first])
            parts.append(value)
            at = last
        added = [f"{quote(name)}:{value}" for name, value in changes.items() if name not in self.params]
        if not added:
            parts.append(self.text[at:end])
            return "".join(parts)
        parts.append(self.text[at : end - 1].rstrip(" \t\r\n"))
        parts.append(("," if self.params else "") + ",".join(added) + "}")
        return "".join(parts)

    def with_id(self, id_text: str) -> str:
        """The whole message under another id (JSON text)."""
        start, end = self.id_span
        return self.text[:start] + id_text + self.text[end:]


_EMPTY: Mapping[str, Any] = {}


# ------------------------------------------------------------------------------------------------ the strict scanners
def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Malformed(f"duplicate member {quote(name)[:80]}")
            seen.add(name)
    return found


def _constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if value - value != 0.0:
        raise Malformed(f"the number {digits[:40]} overflows")
    return value


# ``scan_once`` and ``scanstring`` are how json itself is built on its C scanner (json.decoder documents neither, and
# has kept both since Python 2.6): value and end offset in one step, which ``raw_decode`` gives at twice the cost.
Scan = Callable[[str, int], tuple[Any, int]]
_scanstring: Callable[[str, int, bool], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]
_scan_request: Scan = JSONDecoder(  # type: ignore[attr-defined]
    object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float
).scan_once
# Replies are only read at the levels we use, so deeper duplicates pass through; hooks per object would double the cost.
_scan_reply: Scan = JSONDecoder(parse_constant=_constant).scan_once  # type: ignore[attr-defined]

_space = re.compile(r"[ \t\n\r]*").match
_plain_key = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*').match
_colon = re.compile(r"[ \t\n\r]*:[ \t\n\r]*").match
_open = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*").match
_usual_result = re.compile(r'\{"jsonrpc": ?"2\.0", ?"id": ?([0-9]{1,18}), ?"result": ?').match


def _skip(text: str, at: int) -> int:
    found = _space(text, at)
    assert found is not None
    return found.end()


_Found = dict[str, tuple[Any, int, int]]


_SCAN_ERRORS: Final = (StopIteration, IndexError, ValueError, RecursionError)
"""What a scan can end with."""


def _malformed(error: Exception, broken: str) -> Malformed:
    """What one of them says of the text; ``broken`` where it knows only that something is missing or out of place."""
    if isinstance(error, Malformed):
        return error
    if isinstance(error, RecursionError):
        return Malformed(f"nested deeper than {MAX_DEPTH}")
    if isinstance(error, ValueError):  # the scanner's own, or a number of over 4,300 digits
        return Malformed(str(error)[:120])
    return Malformed(broken)


def _members(text: str, at: int, scan: Scan) -> tuple[_Found, int]:
    """Read the object that opens before ``at``: its members with value, start and end, and the offset after it."""
    members: _Found = {}
    try:
        if text[at] == "}":
            return members, at + 1
        while True:
            found = _plain_key(text, at)
            if found is not None:
                name = found[1]
                start = found.end()
            else:
                name, start = _odd_key(text, at)
            value, end = scan(text, start)
            if name in members:
                raise Malformed(f"duplicate member {quote(name)[:80]}")
            members[name] = (value, start, end)
            mark = text[end]
            if mark != "," and mark != "}":
                end = _skip(text, end)
                mark = text[end]
            if mark == ",":
                at = end + 1
            elif mark == "}":
                return members, end + 1
            else:
                raise Malformed(f"expected , or }} at character {end}")
    except _SCAN_ERRORS as error:
        raise _malformed(error, f"the JSON ends or breaks near character {at}") from None


def _odd_key(text: str, at: int) -> tuple[str, int]:
    """A key with escapes in it: "\\u0069d" is "id" and must not slip past as something else."""
    at = _skip(text, at)
    if text[at] != '"':
        raise Malformed(f"expected a member name at character {at}")
    name, at = _scanstring(text, at + 1, True)
    at = _skip(text, at)
    if text[at] != ":":
        raise Malformed(f"expected : at character {at}")
    return name, _skip(text, at + 1)


_not_brackets = re.compile(r'"(?:[^"\\]|\\.)*"|[^][{}"]+')


def _too_deep(text: str) -> bool:
    """Whether the (valid) text nests deeper than MAX_DEPTH. Two counts settle it for nearly every message."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    brackets = _not_brackets.sub("", text)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace("[]", "").replace("{}", "")
        if not brackets:
            return False
    return True


def text_of(data: bytes | bytearray) -> str:
    """Bytes as text: UTF-8 without a byte order mark, or Malformed."""
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if text[:1] == "\ufeff":
        raise Malformed("starts with a byte order mark")
    return text


def _top(text: str, scan: Scan) -> _Found:
    found = _open(text)
    if found is None:
        try:
            scan(text, _skip(text, 0))
        except _SCAN_ERRORS as error:
            raise _malformed(error, "the text is not JSON") from None
        raise Malformed("a message is a JSON object", INVALID_REQUEST)
    members, end = _members(text, found.end(), scan)
    if end != len(text) and _skip(text, end) != len(text):
        raise Malformed(f"something follows the message at character {end}")
    return members


_IDS = (str, int, float)
_KNOWN = frozenset(("jsonrpc", "id", "method", "params", "result", "error"))


def _set_id(message: Message, members: _Found) -> bool:
    """Take the id over; whether there is one. An id is a string, a number or null (JSON-RPC 2.0 section 4)."""
    found = members.get("id")
    if found is None:
        return False
    value, start, end = found
    if value is not None and (type(value) not in _IDS):
        raise Malformed("the id must be a string or a number", INVALID_REQUEST)
    message.id = value
    message.id_span = (start, end)
    message.id_text = message.text[start:end]
    return True


def decode_request(data: bytes | bytearray | str, *, need_version: bool = True) -> Message:
    """Decode what a client sent: a request, a notification, or its reply to a server's request.

    Strict at every depth. ``need_version`` False lets ``jsonrpc`` be absent (compat H22). Raises Malformed, with the
    id where it could be read, so that the error reply can carry it.
    """
    text = data if type(data) is str else text_of(data)  # type: ignore[arg-type]
    members = _top(text, _scan_request)
    if _too_deep(text):
        raise Malformed(f"nested deeper than {MAX_DEPTH}")
    message = Message(text, NOTIFICATION)
    has_id = _set_id(message, members)
    version = members.get("jsonrpc")
    if version is None or version[0] != "2.0":
        if need_version or version is not None:
            raise Malformed('jsonrpc must be "2.0"', INVALID_REQUEST, message.id_text or "null")
        message.versioned = False
    method = members.get("method")
    if method is None:
        return _reply(message, members, has_id)
    if type(method[0]) is not str or not method[0]:
        raise Malformed("method must be a non-empty string", INVALID_REQUEST, message.id_text or "null")
    message.method = method[0]
    if has_id:
        message.kind = REQUEST
    found = members.get("params")
    if found is not None:
        value, start, end = found
        if type(value) is dict or type(value) is list:
            message.params = value
            message.params_span = (start, end)
        elif value is not None:
            raise Malformed("params must be an object", INVALID_REQUEST, message.id_text or "null")
    if not _KNOWN.issuperset(members):
        message.extra = {name: member[0] for name, member in members.items() if name not in _KNOWN}
    return message


def decode_reply(data: bytes | bytearray | str) -> Message:
    """Decode what a server sent: a reply, a request of its own, or a notification. Raises Malformed.

    Duplicate members are refused at the top level and in ``params``, where the gateway reads.
    """
    text = data if type(data) is str else text_of(data)  # type: ignore[arg-type]
    usual = _usual_result(text)
    if usual is not None:
        # The one shape that nearly every line has. Anything else, or anything after it, takes the general way.
        try:
            value, end = _scan_reply(text, usual.end())
            if text[end] == "}" and end + 1 == len(text) and type(value) is dict:
                message = Message(text, RESULT)
                message.id_span = usual.span(1)
                message.id_text = usual[1]
                message.id = int(usual[1])
                message.result = value
                message.result_span = (usual.end(), end)
                return message
        except _SCAN_ERRORS:
            pass
    members = _top(text, _scan_reply)
    message = Message(text, NOTIFICATION)
    has_id = _set_id(message, members)
    version = members.get("jsonrpc")
    if version is None or version[0] != "2.0":
        raise Malformed('jsonrpc must be "2.0"', INVALID_REQUEST, message.id_text or "null")
    method = members.get("method")
    if method is None:
        return _reply(message, members, has_id)
    if type(method[0]) is not str:
        raise Malformed("method must be a string", INVALID_REQUEST, message.id_text or "null")
    message.method = method[0]
    if has_id:
        message.kind = REQUEST
    found = members.get("params")
    if found is not None:
        message.params, start, end = found
        message.params_span = (start, end)
        if type(message.params) is dict and len(message.spans) != len(message.params):
            raise Malformed("duplicate member in params")
    return message


def _reply(message: Message, members: _Found, has_id: bool) -> Message:
    result, error = members.get("result"), members.get("error")
    if (result is None) == (error is None):
        raise Malformed("neither a request nor a reply: no method", INVALID_REQUEST, message.id_text or "null")
    if not has_id:
        raise Malformed("a reply needs an id", INVALID_REQUEST)
    if error is not None:
        if type(error[0]) is not dict:
            raise Malformed("error must be an object", INVALID_REQUEST, message.id_text)
        message.kind = ERROR
        message.result, *span = error
    else:
        assert result is not None
        message.kind = RESULT
        message.result, *span = result
    message.result_span = (span[0], span[1])
    return message


def split_batch(data: bytes | bytearray | str) -> list[str] | None:
    """The entries of a batch as texts, or None when the text is no JSON array.

    JSON-RPC 2.0 section 6: an empty batch is an invalid request; robustness RB27 bounds it to MAX_BATCH entries.
    Raises Malformed.
    """
    text = data if type(data) is str else text_of(data)  # type: ignore[arg-type]
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        return None
    entries: list[str] = []
    at = _skip(text, at + 1)
    try:
        if text[at] == "]":
            raise Malformed("an empty batch is no request", INVALID_REQUEST)
        while True:
            start = at
            _, at = _scan_request(text, at)
            entries.append(text[start:at])
            if len(entries) > MAX_BATCH:
                raise Malformed(f"a batch holds at most {MAX_BATCH} messages", INVALID_REQUEST)
            at = _skip(text, at)
            if text[at] == "]":
                break
            if text[at] != ",":
                raise Malformed(f"expected , or ] at character {at}")
            at = _skip(text, at + 1)
    except _SCAN_ERRORS as error:
        raise _malformed(error, f"the JSON ends or breaks near character {at}") from None
    if _skip(text, at + 1) != len(text):
        raise Malformed("something follows the batch")
    return entries


# --------------------------------------------------------------------------------------------------------- building
def build_request(id_text: str, method: str, params_text: str = "") -> str:
    """A request from JSON texts; ``params_text`` "" leaves params out."""
    if params_text:
        return f'{{"jsonrpc":"2.0","id":{id_text},"method":{quote(method)},"params":{params_text}}}'
    return f'{{"jsonrpc":"2.0","id":{id_text},"method":{quote(method)}}}'


def build_notification(method: str, params_text: str = "") -> str:
    """A notification from JSON texts."""
    if params_text:
        return f'{{"jsonrpc":"2.0","method":{quote(method)},"params":{params_text}}}'
    return f'{{"jsonrpc":"2.0","method":{quote(method)}}}'


def build_result(id_text: str, result_text: str) -> str:
    """A successful reply from JSON texts."""
    return f'{{"jsonrpc":"2.0","id":{id_text},"result":{result_text}}}'


def build_error(id_text: str, code: int, message: str, data: Any = None) -> str:
    """An error reply; ``data`` is a value, left out when None."""
    tail = "" if data is None else f',"data":{dumps(data)}'
    return f'{{"jsonrpc":"2.0","id":{id_text},"error":{{"code":{code},"message":{quote(message)}{tail}}}}}'
