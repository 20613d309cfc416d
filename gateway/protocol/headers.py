"""The headers in which a modern request over HTTP repeats what its body says (2026-07-28, transports, "Headers").

Proxies and gateways may route by them without reading bodies, so a server must refuse a request in which the two
differ. Pure: strings in, strings out.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from gateway.errors import ClientProtocolError
from gateway.protocol.eras import HEADER_MISMATCH, MODERN, PROTOCOL_VERSION
from gateway.protocol.message import Message

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

_token = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}").fullmatch
_plain = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?").fullmatch
_encoded = re.compile(r"=\?base64\?([A-Za-z0-9+/]*={0,2})\?=").fullmatch
_sentinel = re.compile(r"=\?base64\?.*\?=", re.IGNORECASE).fullmatch


def encode_value(value: str) -> str:
    """A string as a header's value: as it is, where that is unmistakable, else in base64 between sentinels."""
    if value == "" or (_plain(value) is not None and _sentinel(value) is None):
        return value
    return f"=?base64?{base64.b64encode(value.encode()).decode()}?="


def decode_value(header: str) -> str:
    """``encode_value`` taken back. Raises ClientProtocolError (-32020) for broken base64."""
    value = header.strip(" \t")
    if _sentinel(value) is None:
        return value
    found = _encoded(value)
    try:
        if found is None:
            raise ValueError
        return base64.b64decode(found[1], validate=True).decode()
    except (ValueError, binascii.Error):
        raise _mismatch(f"the value {value[:60]!r} is no base64 of a UTF-8 string") from None


def _mismatch(text: str) -> ClientProtocolError:
    return ClientProtocolError(f"Header mismatch: {text}", code=HEADER_MISMATCH, status=400)


def mirrored_name(method: str, params: Any) -> str | None:
    """What ``Mcp-Name`` has to say about a request; None where it has none."""
    key = _NAMES.get(method)
    value = params.get(key) if key is not None and type(params) is dict else None
    return value if type(value) is str else None


_NAMES: Final = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
    "tasks/result": "taskId",
}


def mirrored(method: str, params: Any) -> list[tuple[str, str]]:
    """The headers of a request to a modern server."""
    headers = [(VERSION, MODERN), (METHOD, encode_value(method))]
    name = mirrored_name(method, params)
    if name is not None:
        headers.append((NAME, encode_value(name)))
    return headers


def check(headers: Mapping[str, str], message: Message) -> None:
    """Compare a request's headers (names in lower case) with its body.

    Raises ClientProtocolError (-32020, 400) that names what differs.
    """
    _equal("MCP-Protocol-Version", headers.get(VERSION), str(message.meta.get(PROTOCOL_VERSION, "")))
    _equal("Mcp-Method", headers.get(METHOD), message.method)
    name = mirrored_name(message.method, message.params)
    if name is not None:
        _equal("Mcp-Name", headers.get(NAME), name)


def _equal(name: str, header: str | None, body: str) -> None:
    if header is None:
        raise _mismatch(f"{name} is missing; the body says {body[:100]!r}")
    value = decode_value(header)
    if value != body:
        raise _mismatch(f"{name} says {value[:100]!r}, the body {body[:100]!r}")


# ------------------------------------------------------------------------------------------------- arguments in headers
@attrs.frozen
class HeaderParameter:
    """An argument of a tool that also stands in a header: ``path`` leads to it through the arguments."""

    header: str
    path: tuple[str, ...]
    type: str


def parameters_of(tool: Mapping[str, Any]) -> tuple[HeaderParameter, ...]:
    """What a tool annotates with ``x-mcp-header``. Raises ValueError for annotations that break the rules."""
    schema = tool.get("inputSchema")
    if type(schema) is not dict:
        return ()
    found = tuple(_walk(schema, ()))
    names = [parameter.header.lower() for parameter in found]
    if len(set(names)) != len(names):
        raise ValueError(f"{ANNOTATION} is not unique: {sorted(names)}")
    if _count(schema) != len(found):
        raise ValueError(f"{ANNOTATION} stands where only properties of properties may have it")
    return found


def _walk(schema: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[HeaderParameter]:
    properties = schema.get("properties")
    for name, part in properties.items() if type(properties) is dict else ():
        if type(part) is not dict:
            continue
        header = part.get(ANNOTATION)
        if header is not None:
            kind = part.get("type")
            if type(header) is not str or _token(header) is None:
                raise ValueError(f"{ANNOTATION} {header!r:.60} is no name of a header")
            if kind not in ("string", "integer", "boolean"):
                raise ValueError(f"{ANNOTATION} {header!r:.60} stands on no string, integer or boolean")
            yield HeaderParameter(header, (*path, name), kind)
        yield from _walk(part, (*path, name))


def _count(value: Any, *, named: bool = False) -> int:
    """How often the annotation stands anywhere in a schema. ``named``: the members are properties, not keywords."""
    if type(value) is list:
        return sum(_count(part) for part in value)
    if type(value) is not dict:
        return 0
    own = 0 if named else int(ANNOTATION in value)
    return own + sum(
        _count(part, named=not named and name == "properties")
        for name, part in value.items()
        if named or name not in ("default", "const", "enum", "examples", ANNOTATION)
    )


def _argument(parameter: HeaderParameter, arguments: Any) -> Any:
    value = arguments
    for name in parameter.path:
        value = value.get(name) if type(value) is dict else None
    return value


def _spelled(value: Any) -> str:
    return "true" if value is True else "false" if value is False else str(value)


def parameter_headers(parameters: Sequence[HeaderParameter], arguments: Any) -> list[tuple[str, str]]:
    """The headers of a tools/call for these arguments; null and absent ones have none."""
    values = ((parameter, _argument(parameter, arguments)) for parameter in parameters)
    return [
        (f"Mcp-Param-{parameter.header}", encode_value(_spelled(value)))
        for parameter, value in values
        if type(value) in (str, int, bool)
    ]


def check_parameters(parameters: Sequence[HeaderParameter], headers: Mapping[str, str], arguments: Any) -> None:
    """Compare the headers (names in lower case) with the arguments. Raises ClientProtocolError (-32020, 400)."""
    for parameter in parameters:
        name = f"Mcp-Param-{parameter.header}"
        header = headers.get(PREFIX + parameter.header.lower())
        value = _argument(parameter, arguments)
        if value is None:
            if header is not None:
                raise _mismatch(f"{name} is there, the argument is not")
            continue
        if header is None:
            raise _mismatch(f"{name} is missing; the argument is {_spelled(value)[:100]!r}")
        said = decode_value(header)
        if type(value) is int and parameter.type == "integer":
            try:
                same = int(said) == value
            except ValueError:
                same = False
        else:
            same = said == _spelled(value)
        if not same:
            raise _mismatch(f"{name} says {said[:100]!r}, the argument {_spelled(value)[:100]!r}")


def strip(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool without annotations for headers."""
    return {name: _stripped(value) if name == "inputSchema" else value for name, value in tool.items()}


def _stripped(value: Any, *, named: bool = False) -> Any:
    if type(value) is list:
        return [_stripped(part) for part in value]
    if type(value) is not dict:
        return value
    return {
        name: _stripped(part, named=not named and name == "properties")
        for name, part in value.items()
        if named or name != ANNOTATION
    }
