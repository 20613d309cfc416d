"""The headers in which a modern request over HTTP repeats what its body says (2026-07-28, Streamable HTTP, "Headers").

Proxies may route by them without reading bodies, so a server must refuse a request in which the two differ; and so must
we, in front of one (protocol.md section 3). Pure: strings and decoded JSON in, strings out.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from gateway.errors import ClientProtocolError
from gateway.protocol.eras import HEADER_MISMATCH, MODERN, PROTOCOL_VERSION
from gateway.protocol.message import NOTIFICATION, Message

__all__ = [
    "METHOD",
    "NAME",
    "VERSION",
    "HeaderParameter",
    "check",
    "check_parameters",
    "decode_value",
    "encode_value",
    "mirrored",
    "mirrored_name",
    "parameter_headers",
    "parameters_of",
    "strip",
]

VERSION: Final = "mcp-protocol-version"
METHOD: Final = "mcp-method"
NAME: Final = "mcp-name"
PREFIX: Final = "mcp-param-"
ANNOTATION: Final = "x-mcp-header"

_OPEN, _CLOSE = "=?base64?", "?="
_plain = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?").fullmatch
_token = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_decimal = re.compile(r"(-?[0-9]+)(?:\.0+)?", re.ASCII).fullmatch


# --------------------------------------------------------------------------------------------------------------- values
def encode_value(value: str) -> str:
    """A string as a header's value: as it is where every reader gets it back like that, else in base64, marked.

    Raises UnicodeEncodeError for half a surrogate pair, which no header can say.
    """
    if value == "":
        return value
    if _plain(value) is not None:
        lower = value.lower()
        if not (lower.startswith(_OPEN) and lower.endswith(_CLOSE)):
            return value
    return f"{_OPEN}{base64.b64encode(value.encode()).decode()}{_CLOSE}"


def decode_value(header: str, name: str = "the value") -> str:
    """``encode_value`` taken back; spaces around the header do not count. Raises ClientProtocolError (-32020, 400) for
    a marked value that is not the base64 of UTF-8, in its one canonical form; ``name`` says whose it is.
    """
    value = header.strip(" \t")
    if not (value.startswith(_OPEN) and value.endswith(_CLOSE) and len(value) >= len(_OPEN) + len(_CLOSE)):
        return value
    inner = value[len(_OPEN) : -len(_CLOSE)]
    try:
        data = base64.b64decode(inner, validate=True)
        if base64.b64encode(data).decode() == inner:
            return data.decode()
    except ValueError:
        pass
    raise _mismatch(f"{name} is {value[:60]!r}, which is not the base64 of UTF-8")


def _mismatch(text: str) -> ClientProtocolError:
    return ClientProtocolError(f"Header mismatch: {text}", code=HEADER_MISMATCH, status=400)


# ------------------------------------------------------------------------------------------------------ method and name
_NAMES: Final = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
    "tasks/result": "taskId",
}
"""Method -> the member of params that ``Mcp-Name`` repeats."""


def mirrored_name(method: str, params: Any) -> str | None:
    """What ``Mcp-Name`` has to say about a request; None where it has none."""
    key = _NAMES.get(method)
    value = params.get(key) if key is not None and type(params) is dict else None
    return value if type(value) is str else None


def mirrored(method: str, params: Any) -> list[tuple[str, str]]:
    """The headers of a request to a modern server. Raises what ``encode_value`` raises."""
    headers = [(VERSION, MODERN), (METHOD, encode_value(method))]
    name = mirrored_name(method, params)
    if name is not None:
        headers.append((NAME, encode_value(name)))
    return headers


def check(headers: Mapping[str, str], message: Message) -> None:
    """Compare a request's headers (names in lower case) with its body.

    Raises ClientProtocolError (-32020, 400) that names what differs or is missing. A notification need not have the
    headers, nor a version in its body; where both speak they must agree.
    """
    lenient = message.kind is NOTIFICATION
    version = message.meta.get(PROTOCOL_VERSION)
    if not (lenient and version is None):
        _equal("MCP-Protocol-Version", headers.get(VERSION), version, f"params._meta[{PROTOCOL_VERSION!r}]", lenient)
    _equal("Mcp-Method", headers.get(METHOD), message.method, "method", lenient)
    key = _NAMES.get(message.method)
    if key is not None:
        name = mirrored_name(message.method, message.params)
        if name is not None:
            _equal("Mcp-Name", headers.get(NAME), name, f"params.{key}", lenient)


def _equal(name: str, header: str | None, body: object, where: str, lenient: bool) -> None:
    if header is None:
        if lenient:
            return
        raise _mismatch(f"{name} is missing; in the body {where} is {body!r:.100}")
    if header == body and not header.startswith("=?"):
        return
    value = decode_value(header, name)
    if value != body:
        raise _mismatch(f"{name} is {value[:100]!r}; in the body {where} is {body!r:.100}")


# ------------------------------------------------------------------------------------------------- arguments in headers
@attrs.frozen
class HeaderParameter:
    """An argument of a tool that is repeated in the header ``Mcp-Param-`` + ``header``.

    path  the names that lead to it through the arguments
    type  "string", "integer" or "boolean"
    """

    header: str
    path: tuple[str, ...]
    type: str


# The keywords of JSON Schema 2020-12 below which schemas stand. Everything else is data, or a reference, where the
# annotation's name means nothing.
_NAMED_SCHEMAS: Final = frozenset(("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"))
_SCHEMAS: Final = frozenset(
    (
        *("items", "prefixItems", "contains", "unevaluatedItems", "additionalProperties", "propertyNames"),
        *("unevaluatedProperties", "not", "if", "then", "else", "allOf", "anyOf", "oneOf", "contentSchema"),
    )
)


def parameters_of(tool: Mapping[str, Any]) -> tuple[HeaderParameter, ...]:
    """What a tool annotates with ``x-mcp-header``, in the order of its schema.

    Raises ValueError for an annotation that breaks the rules: its place is reached by anything but ``properties``, its
    property is no string, integer or boolean, or its value is no header name or not unique (case does not count).
    """
    found: dict[str, HeaderParameter] = {}
    for path, schema in _positions(tool.get("inputSchema")):
        if ANNOTATION not in schema:
            continue
        if not path:
            raise ValueError(f"{ANNOTATION} stands where it can't be reached by properties alone")
        where = f"{ANNOTATION} of the property {'.'.join(path)[:100]!r}"
        header, kind = schema[ANNOTATION], schema.get("type")
        if type(header) is not str or _token(header) is None:
            raise ValueError(f"{where} is no name of a header: {header!r:.60}")
        if kind not in ("string", "integer", "boolean"):
            raise ValueError(f"{where} needs the type string, integer or boolean, not {kind!r:.60}")
        other = found.setdefault(header.lower(), HeaderParameter(header, path, kind))
        if other.path != path:
            raise ValueError(f"{where} is that of {'.'.join(other.path)[:100]!r}, too: {header!r:.60}")
    return tuple(found.values())


def _positions(root: Any) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
    """Every schema in a schema, itself first, with the names that lead there; None where not by properties alone.

    No recursion: how deep a schema goes is the server's choice.
    """
    stack: list[tuple[tuple[str, ...] | None, Any]] = [((), root)]
    while stack:
        path, schema = stack.pop()
        if type(schema) is not dict:
            continue
        yield path, schema
        below: list[tuple[tuple[str, ...] | None, Any]] = []
        for keyword, value in schema.items():
            if keyword in _NAMED_SCHEMAS:
                if type(value) is dict:
                    go_on = path is not None and keyword == "properties"
                    below += [((*(path or ()), name) if go_on else None, part) for name, part in value.items()]
            elif keyword in _SCHEMAS:
                below += [(None, part) for part in value] if type(value) is list else [(None, value)]
        stack.extend(reversed(below))


def strip(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool without annotations for headers; the original stays as it is."""
    schema = tool.get("inputSchema")
    if type(schema) is not dict:
        return dict(tool)
    root = dict(schema)
    stack: list[Any] = [root]
    while stack:
        copy = stack.pop()
        if type(copy) is not dict:
            continue
        copy.pop(ANNOTATION, None)
        for keyword, value in copy.items():
            if keyword in _NAMED_SCHEMAS and type(value) is dict:
                copy[keyword] = {name: dict(part) if type(part) is dict else part for name, part in value.items()}
                stack += copy[keyword].values()
            elif keyword in _SCHEMAS:
                if type(value) is list:
                    copy[keyword] = [dict(part) if type(part) is dict else part for part in value]
                    stack += copy[keyword]
                elif type(value) is dict:
                    copy[keyword] = dict(value)
                    stack.append(copy[keyword])
    return {**tool, "inputSchema": root}


def _argument(parameter: HeaderParameter, arguments: Any) -> Any:
    value = arguments
    for name in parameter.path:
        value = value.get(name) if type(value) is dict else None
    return value


def _spelled(value: Any) -> str | None:
    """An argument as a header says it; None for what headers can't: null, arrays, objects."""
    if type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is float:
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if type(value) is int else None


def parameter_headers(parameters: Sequence[HeaderParameter], arguments: Any) -> list[tuple[str, str]]:
    """The headers of a tools/call for these arguments; null and absent ones have none. Raises as ``encode_value``."""
    headers = []
    for parameter in parameters:
        spelled = _spelled(_argument(parameter, arguments))
        if spelled is not None:
            headers.append((f"Mcp-Param-{parameter.header}", encode_value(spelled)))
    return headers


def check_parameters(parameters: Sequence[HeaderParameter], headers: Mapping[str, str], arguments: Any) -> None:
    """Compare the headers (names in lower case) with the arguments: both there and equal, or neither.

    Numbers are compared by value, everything else by spelling. Raises ClientProtocolError (-32020, 400).
    """
    for parameter in parameters:
        name = f"Mcp-Param-{parameter.header}"
        header = headers.get(PREFIX + parameter.header.lower())
        value = _argument(parameter, arguments)
        spelled = _spelled(value)
        where = f"arguments.{'.'.join(parameter.path)}"
        if header is None:
            if spelled is not None and not _unsafe(value):
                raise _mismatch(f"{name} is missing; in the body {where} is {spelled[:100]!r}")
            continue
        said = decode_value(header, name)
        if spelled is None:
            what = "missing" if value is None else "an array or an object"
            raise _mismatch(f"{name} is {said[:100]!r}; in the body {where} is {what}")
        if said != spelled and not (_numeric(parameter, value) and _same_number(said, value)):
            raise _mismatch(f"{name} is {said[:100]!r}; in the body {where} is {spelled[:100]!r}")


_SAFE: Final = 2**53 - 1


def _unsafe(value: Any) -> bool:
    """An integer that JavaScript can't hold exactly: the official TypeScript client sends no header for it."""
    return type(value) in (int, float) and not -_SAFE <= value <= _SAFE


def _numeric(parameter: HeaderParameter, value: Any) -> bool:
    """Whether spelling does not count: 42.0 is "42" to one official client and "42.0" to the other."""
    return parameter.type == "integer" or type(value) is float


def _same_number(said: str, value: Any) -> bool:
    found = _decimal(said)
    # Longer ones are no number of Python's, by its limit on digits.
    return found is not None and len(said) <= 4000 and type(value) in (int, float) and int(found[1]) == value
