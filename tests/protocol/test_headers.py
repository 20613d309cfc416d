"""Headers that repeat what a modern request says (protocol.md section 3, "Headers" and "x-mcp-header")."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ClientProtocolError
from gateway.protocol.headers import (
    HeaderParameter,
    check,
    check_parameters,
    decode_value,
    encode_value,
    mirrored,
    mirrored_name,
    parameter_headers,
    parameters_of,
    strip,
)
from gateway.protocol.message import Message, decode_request

VERSION = "io.modelcontextprotocol/protocolVersion"


def request(method: str = "tools/call", *, id: bool = True, version: Any = "2026-07-28", **params: Any) -> Message:
    body: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if id:
        body["id"] = 1
    body["params"] = params | ({} if version is None else {"_meta": {VERSION: version}})
    return decode_request(json.dumps(body))


def refused(headers: dict[str, str], message: Message) -> str:
    with pytest.raises(ClientProtocolError) as caught:
        check(headers, message)
    assert (caught.value.code, caught.value.status) == (-32020, 400)
    return caught.value.message


# --------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("value", "header"),
    [
        ("", ""),
        ("a", "a"),
        ("a b~!", "a b~!"),
        ("=?base64?SGVsbG8=", "=?base64?SGVsbG8="),
        ("SGVsbG8=?=", "SGVsbG8=?="),
        ("é", "=?base64?w6k=?="),
        (" a", "=?base64?IGE=?="),
        ("a\t", "=?base64?YQk=?="),
        ("a\nb", "=?base64?YQpi?="),
        ("\x7f", "=?base64?fw==?="),
        ("=?base64?SGk=?=", "=?base64?PT9iYXNlNjQ/U0drPT89?="),
        ("=?BASE64?x?=", "=?base64?PT9CQVNFNjQ/eD89?="),
    ],
)
def test_section_3_values_are_plain_where_they_can_be(value: str, header: str) -> None:
    assert encode_value(value) == header
    assert decode_value(header) == value


@given(st.text())
def test_section_3_every_value_comes_back(value: str) -> None:
    header = encode_value(value)
    assert header.isascii()
    assert not header or header.isprintable()
    assert decode_value(f" {header}\t") == value


def test_section_3_half_a_surrogate_pair_is_no_header() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode_value("\ud800")


@pytest.mark.parametrize(
    "header",
    [
        "=?base64?SGVsbG8?=",  # no padding
        "=?base64?SGVs!!!bG8=?=",
        "=?base64?SGVs bG8=?=",
        "=?base64?SGVsbG9=?=",  # bits left over: not what an encoder writes
        "=?base64?/w==?=",  # no UTF-8
        "=?base64?=?=",
        "=?base64?é?=",
    ],
)
def test_section_3_malformed_base64_is_a_header_mismatch(header: str) -> None:
    with pytest.raises(ClientProtocolError) as caught:
        decode_value(header)
    assert (caught.value.code, caught.value.status) == (-32020, 400)


@pytest.mark.parametrize("header", ["=?base64?=", "=?BASE64?SGk=?=", "=?base64?SGk=", "SGk=?=", "=?utf-8?q?x?="])
def test_section_3_what_is_not_marked_in_full_is_literal(header: str) -> None:
    assert decode_value(header) == header


# ------------------------------------------------------------------------------------------------------ method and name
@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("tools/call", {"name": "n"}, "n"),
        ("prompts/get", {"name": "n"}, "n"),
        ("resources/read", {"uri": "x://é"}, "x://é"),
        ("tasks/get", {"taskId": "t"}, "t"),
        ("tasks/update", {"taskId": "t"}, "t"),
        ("tasks/cancel", {"taskId": "t"}, "t"),
        ("tools/list", {"name": "n"}, None),
        ("completion/complete", {"name": "n"}, None),
        ("tools/call", {}, None),
        ("tools/call", {"name": 7}, None),
        ("tools/call", None, None),
    ],
)
def test_section_3_what_the_name_header_repeats(method: str, params: Any, name: str | None) -> None:
    assert mirrored_name(method, params) == name
    headers = mirrored(method, params)
    assert headers[:2] == [("mcp-protocol-version", "2026-07-28"), ("mcp-method", method)]
    assert headers[2:] == ([] if name is None else [("mcp-name", encode_value(name))])


def test_section_3_our_own_headers_pass_our_own_check() -> None:
    for method, params in (
        ("tools/call", {"name": " odd\n"}),
        ("resources/read", {"uri": "=?base64?SGk=?="}),
        ("tools/list", {}),
        ("tools/call", {}),
    ):
        check(dict(mirrored(method, params)), request(method, **params))


GOOD = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "echo"}


def test_section_3_values_are_compared_after_trimming_and_decoding() -> None:
    message = request(name="echo")
    check(GOOD, message)
    check({**GOOD, "mcp-name": " echo\t", "mcp-method": " tools/call "}, message)
    check({**GOOD, "mcp-name": "=?base64?ZWNobw==?="}, message)


@pytest.mark.parametrize("header", ["mcp-protocol-version", "mcp-method", "mcp-name"])
@pytest.mark.parametrize("value", [None, "other", "ECHO", "Tools/call", "2026-07-29", "echo, echo", ""])
def test_wire_a_header_that_differs_or_is_missing_is_named(header: str, value: str | None) -> None:
    headers = {**GOOD, header: value}
    text = refused({name: said for name, said in headers.items() if said is not None}, request(name="echo"))
    assert header in text.lower()
    assert ("is missing" in text) is (value is None)
    where = {"mcp-protocol-version": VERSION, "mcp-method": "method", "mcp-name": "params.name"}[header]
    assert where in text


def test_section_3_a_value_that_looks_encoded_is_decoded_even_when_the_body_says_the_same() -> None:
    refused({**GOOD, "mcp-name": "=?base64?SGk=?="}, request(name="=?base64?SGk=?="))
    check({**GOOD, "mcp-name": encode_value("=?base64?SGk=?=")}, request(name="=?base64?SGk=?="))


@pytest.mark.parametrize("version", [20260728, None, ["2026-07-28"]])
def test_section_3_a_version_that_is_no_string_equals_no_header(version: Any) -> None:
    assert "MCP-Protocol-Version" in refused({**GOOD, "mcp-protocol-version": str(version)}, request(version=version))


def test_section_3_a_notification_need_not_have_the_headers_but_may_not_contradict_them() -> None:
    notice = request("notifications/cancelled", id=False, version=None)
    check({}, notice)
    check({"mcp-protocol-version": "2026-07-28"}, notice)
    assert "Mcp-Method" in refused({"mcp-method": "tools/call"}, notice)
    own = request("notifications/cancelled", id=False)
    assert "MCP-Protocol-Version" in refused({"mcp-protocol-version": "2025-11-25"}, own)


def test_section_3_a_name_without_a_header_for_it_is_not_asked_for() -> None:
    check({**GOOD, "mcp-method": "tools/list"}, request("tools/list", name="x"))


# ------------------------------------------------------------------------------------------------- arguments in headers
def tool(**properties: Any) -> dict[str, Any]:
    return {"name": "t", "inputSchema": {"type": "object", "properties": properties}}


def marked(header: Any, kind: Any = "string", **more: Any) -> dict[str, Any]:
    return {"type": kind, "x-mcp-header": header, **more}


REGION = HeaderParameter("Region", ("region",), "string")
COUNT = HeaderParameter("Count", ("where", "count"), "integer")
FLAG = HeaderParameter("X-Flag", ("flag",), "boolean")


def test_section_3_annotations_are_found_through_properties() -> None:
    inner = {"type": "object", "properties": {"count": marked("Count", "integer"), "x-mcp-header": {"type": "string"}}}
    assert parameters_of(
        tool(region=marked("Region"), other={"type": "string"}, where=inner, flag=marked("X-Flag", "boolean"))
    ) == (
        REGION,
        COUNT,
        FLAG,
    )
    assert parameters_of({"name": "t"}) == ()
    assert parameters_of({"name": "t", "inputSchema": None}) == ()
    assert parameters_of(tool(a=None, b={"type": "string"})) == ()


def test_section_3_the_word_in_data_and_in_names_is_no_annotation() -> None:
    data = {"x-mcp-header": "Bad Name"}
    parameters = parameters_of(
        tool(
            a={"type": "object", "default": data, "const": data, "enum": [data], "examples": [data]},
            b={"type": "object", "properties": {"x-mcp-header": {"type": "number"}}, "x-vendor": data},
            c={"$defs": {"x-mcp-header": {"type": "string"}}},
        )
    )
    assert parameters == ()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (tool(a=marked("A"), b=marked("a")), "'a'"),
        (tool(a=marked("A"), b={"properties": {"c": marked("A", "integer")}}), "b.c"),
        (tool(a=marked("A", "number")), "number"),
        (tool(a=marked("A", "object")), "object"),
        (tool(a=marked("A", "array")), "array"),
        (tool(a=marked("A", ["string", "null"])), "null"),
        (tool(a={"x-mcp-header": "A"}), "None"),
        (tool(a=marked("")), "name of a header"),
        (tool(a=marked("A B")), "name of a header"),
        (tool(a=marked("A:")), "name of a header"),
        (tool(a=marked("Ä")), "name of a header"),
        (tool(a=marked("A\r\nX: y")), "name of a header"),
        (tool(a=marked("A\n")), "name of a header"),
        (tool(a=marked(7)), "name of a header"),
        (tool(a=marked(None)), "name of a header"),
        (tool(a={"type": "array", "items": marked("A")}), "reached"),
        (tool(a={"type": "array", "prefixItems": [marked("A")]}), "reached"),
        (tool(a={"anyOf": [{"properties": {"b": marked("A")}}]}), "reached"),
        (tool(a={"type": "object", "additionalProperties": marked("A")}), "reached"),
        (tool(a={"type": "object", "patternProperties": {"x": marked("A")}}), "reached"),
        (tool(a={"not": marked("A")}), "reached"),
        (tool(a={"if": {}, "then": marked("A")}), "reached"),
        ({"inputSchema": {"type": "object", "$defs": {"p": {"properties": {"b": marked("A")}}}}}, "reached"),
        ({"inputSchema": {"type": "string", "x-mcp-header": "A"}}, "reached"),
    ],
)
def test_section_3_invalid_annotations_are_refused_and_can_be_stripped(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match="x-mcp-header") as caught:
        parameters_of(bad)
    assert why in str(caught.value)
    before = json.dumps(bad)
    stripped = strip(bad)
    assert parameters_of(stripped) == ()
    assert "x-mcp-header" not in json.dumps(stripped)
    assert json.dumps(bad) == before


def test_section_5_stripping_takes_nothing_else_away() -> None:
    data = {"x-mcp-header": "data"}
    schema = {
        "type": "object",
        "properties": {"x-mcp-header": marked("A", default=data), "b": {"items": [marked("B"), True], "enum": [data]}},
        "required": ["x-mcp-header"],
        "allOf": [{"properties": {"c": marked("C")}}],
    }
    assert strip({"name": "t", "inputSchema": schema, "x-mcp-header": 1}) == {
        "name": "t",
        "x-mcp-header": 1,
        "inputSchema": {
            "type": "object",
            "properties": {
                "x-mcp-header": {"type": "string", "default": data},
                "b": {"items": [{"type": "string"}, True], "enum": [data]},
            },
            "required": ["x-mcp-header"],
            "allOf": [{"properties": {"c": {"type": "string"}}}],
        },
    }
    assert strip({"name": "t"}) == {"name": "t"}
    assert strip({"name": "t", "inputSchema": []}) == {"name": "t", "inputSchema": []}


def test_section_3_a_very_deep_schema_is_no_trouble() -> None:
    deep: dict[str, Any] = marked("Deep")
    for _ in range(5000):
        deep = {"properties": {"p": deep}}
    (found,) = parameters_of({"inputSchema": deep})
    assert len(found.path) == 5000
    assert parameters_of(strip({"inputSchema": deep})) == ()
    assert parameter_headers((found,), {"p": 1}) == []


ALL = (REGION, COUNT, FLAG)


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        ({"region": "eu", "where": {"count": 42}, "flag": True}, ["eu", "42", "true"]),
        ({"region": "é", "where": {"count": -1}, "flag": False}, ["=?base64?w6k=?=", "-1", "false"]),
        ({"region": None, "where": {"count": None}}, [None, None, None]),
        ({"region": "", "where": 7}, ["", None, None]),
        ({"region": ["eu"], "where": {"count": {}}}, [None, None, None]),
        ({"where": {"count": 42.0}}, [None, "42", None]),
        ({"where": {"count": 1.5}}, [None, "1.5", None]),
        ({"where": {"count": 2**60}}, [None, str(2**60), None]),
        ({}, [None, None, None]),
        (None, [None, None, None]),
    ],
)
def test_section_3_arguments_as_headers_and_back(arguments: Any, headers: list[str | None]) -> None:
    expected = [(f"Mcp-Param-{p.header}", said) for p, said in zip(ALL, headers, strict=True) if said is not None]
    made = parameter_headers(ALL, arguments)
    assert made == expected
    check_parameters(ALL, {name.lower(): said for name, said in made}, arguments)


@pytest.mark.parametrize(
    ("arguments", "name", "said"),
    [
        ({"region": "eu"}, "Region", None),
        ({"region": "eu"}, "Region", "EU"),
        ({"region": "eu"}, "Region", "=?base64?SGVsbG8?="),
        ({"region": "eu"}, "Region", "eu, eu"),
        ({"region": None}, "Region", "eu"),
        ({"region": None}, "Region", "null"),
        ({}, "Region", ""),
        ({"region": ["eu"]}, "Region", "eu"),
        ({"region": "1"}, "Region", "1.0"),
        ({"where": {"count": 42}}, "Count", "43"),
        ({"where": {"count": 42}}, "Count", "42.5"),
        ({"where": {"count": 42}}, "Count", "4_2"),
        ({"where": {"count": 42}}, "Count", "+42"),
        ({"where": {"count": 42}}, "Count", "4.2e1"),
        ({"where": {"count": 42}}, "Count", "٤٢"),
        ({"where": {"count": 42}}, "Count", "9" * 5000),
        ({"where": {"count": 2**53}}, "Count", str(2**53 + 1)),
        ({"where": {"count": True}}, "Count", "1"),
        ({"where": {"count": "42"}}, "Count", "42.0"),
        ({"where": {"count": 42}}, "Count", None),
        ({"flag": True}, "X-Flag", "True"),
        ({"flag": True}, "X-Flag", "1"),
    ],
)
def test_section_3_arguments_and_headers_that_differ(arguments: Any, name: str, said: str | None) -> None:
    headers = dict(parameter_headers(ALL, arguments))
    lower = {key.lower(): value for key, value in headers.items()}
    lower.pop(f"mcp-param-{name.lower()}", None)
    if said is not None:
        lower[f"mcp-param-{name.lower()}"] = said
    with pytest.raises(ClientProtocolError) as caught:
        check_parameters(ALL, lower, arguments)
    assert (caught.value.code, caught.value.status) == (-32020, 400)
    assert f"Mcp-Param-{name}" in caught.value.message
    assert ("arguments." in caught.value.message) is not (said is not None and said.startswith("=?"))


@pytest.mark.parametrize(("value", "said"), [(42, "42.0"), (42.0, "42"), (42, "042"), (0, "-0"), (2**60, str(2**60))])
def test_section_3_integers_are_compared_as_numbers(value: Any, said: str) -> None:
    check_parameters(ALL, {"mcp-param-count": said}, {"where": {"count": value}})


def test_section_3_a_number_where_a_string_belongs_may_be_spelled_in_two_ways() -> None:
    for said in ("42", "42.0"):
        check_parameters(ALL, {"mcp-param-region": said}, {"region": 42.0})


def test_section_3_an_integer_beyond_javascript_needs_no_header() -> None:
    """The official TypeScript client sends none for it, the Python one does."""
    check_parameters(ALL, {}, {"where": {"count": 2**53}})
    with pytest.raises(ClientProtocolError):
        check_parameters(ALL, {}, {"where": {"count": 2**53 - 1}})


def test_section_3_an_encoded_argument_is_compared_decoded() -> None:
    said = f"=?base64?{base64.b64encode(b'eu').decode()}?="
    check_parameters(ALL, {"mcp-param-region": said}, {"region": "eu"})
