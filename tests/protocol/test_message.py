"""Messages: decoded once, strictly; rewritten by slicing (RB26, RB27, design section 5)."""

from __future__ import annotations

import contextlib
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.message import (
    INVALID_REQUEST,
    PARSE_ERROR,
    Kind,
    Malformed,
    build_error,
    decode_reply,
    decode_request,
    dumps,
    split_batch,
)

CALL = (
    '{"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "a", "arguments": {"x": 1.50}, "z": [1]}}'
)


def test_request_is_read_once_and_kept_as_text() -> None:
    message = decode_request(CALL.encode())
    assert (message.kind, message.method, message.id, message.id_text) == (Kind.REQUEST, "tools/call", 7, "7")
    assert message.params == {"name": "a", "arguments": {"x": 1.5}, "z": [1]}
    assert message.params_text() == CALL[CALL.index('{"name"') : -1]


def test_replacing_one_member_leaves_every_other_byte() -> None:
    message = decode_request(CALL)
    assert message.params_text({"name": '"long"'}) == '{"name": "long", "arguments": {"x": 1.50}, "z": [1]}'
    added = message.params_text({"_meta": '{"progressToken":3}', "name": '"n"'})
    assert added == '{"name": "n", "arguments": {"x": 1.50}, "z": [1],"_meta":{"progressToken":3}}'
    nested = '{"a": {"name": 1} ,"name" : "%s", "c": {"name": 2}}'
    message = decode_request(f'{{"jsonrpc":"2.0","method":"x","params":{nested % "b"}}}')
    assert message.params_text({"name": '"n"'}) == nested % "n"
    assert decode_request('{"jsonrpc":"2.0","method":"x","params":{}}').params_text({"a": "1"}) == '{"a":1}'
    assert decode_request('{"jsonrpc":"2.0","method":"x"}').params_text({"a": "1"}) == '{"a":1}'


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"jsonrpc":"2.0","method":"x","method":"y"}', "duplicate"),
        ('{"jsonrpc":"2.0","id":1,"method":"x","\\u0069d":2}', "duplicate"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":{"b":[{"c":1,"c":1}]}}}', "duplicate"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":NaN}}', "NaN"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":-Infinity}}', "Infinity"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":1e400}}', "overflows"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":' + "9" * 5000 + "}}", "4300"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":' + "[" * 127 + "]" * 127 + "}}", None),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":' + "[" * 128 + "]" * 128 + "}}", "deeper"),
        ('{"jsonrpc":"2.0","method":"x","params":{"a":' + "[" * 200_000, "deeper"),
        ('{"jsonrpc":"2.0","method":"x"}{', "follows"),
        ('{"jsonrpc":"2.0","method":"x\n"}', "control"),
        ("", "not JSON"),
        ('\ufeff{"jsonrpc":"2.0","method":"x"}', "byte order mark"),
    ],
)
def test_RB26_what_two_parsers_could_read_differently_is_refused(text: str, what: str | None) -> None:
    if what is None:
        decode_request(text.encode())
        return
    with pytest.raises(Malformed, match=what) as caught:
        decode_request(text.encode())
    assert caught.value.code == PARSE_ERROR


def test_RB26_utf8_only() -> None:
    for data in ('{"jsonrpc":"2.0","method":"x"}'.encode("utf-16"), b'{"jsonrpc":"2.0","method":"\xff"}'):
        with pytest.raises(Malformed, match="UTF-8"):
            decode_request(data)


def test_RB26_brackets_inside_strings_are_not_depth() -> None:
    text = json.dumps({"jsonrpc": "2.0", "method": "x", "params": {"a": "[{" * 500, "b": '\\"[' * 300}})
    assert decode_request(text).method == "x"


@pytest.mark.parametrize(
    ("text", "id_text"),
    [
        ("[]", "null"),
        ("5", "null"),
        ('{"jsonrpc":"1.0","id":4,"method":"x"}', "4"),
        ('{"id":4,"method":"x"}', "4"),
        ('{"jsonrpc":"2.0","id":"q","method":""}', '"q"'),
        ('{"jsonrpc":"2.0","id":4,"method":5}', "4"),
        ('{"jsonrpc":"2.0","id":4,"method":"x","params":"p"}', "4"),
        ('{"jsonrpc":"2.0","id":{},"method":"x"}', "null"),
        ('{"jsonrpc":"2.0","id":true,"method":"x"}', "null"),
        ('{"jsonrpc":"2.0","id":4}', "4"),
        ('{"jsonrpc":"2.0","id":4,"result":1,"error":{}}', "4"),
        ('{"jsonrpc":"2.0","result":1}', "null"),
    ],
)
def test_wrong_shapes_are_invalid_requests_that_keep_their_id(text: str, id_text: str) -> None:
    with pytest.raises(Malformed) as caught:
        decode_request(text)
    assert (caught.value.code, caught.value.id_text) == (INVALID_REQUEST, id_text)


@pytest.mark.parametrize("id_text", ["7", '"7"', "null", "1.0", "-3", "9223372036854775807", '"\\u00e9"'])
def test_H23_ids_come_back_with_their_type_and_spelling(id_text: str) -> None:
    message = decode_request(f'{{"jsonrpc":"2.0","id":{id_text},"method":"x"}}')
    assert message.id_text == id_text
    assert message.kind is Kind.REQUEST
    reply = decode_reply('{"jsonrpc":"2.0","id":12,"result":{"id":12}}')
    assert reply.with_id(message.id_text) == f'{{"jsonrpc":"2.0","id":{id_text},"result":{{"id":12}}}}'


def test_H22_version_may_be_absent_where_asked_for() -> None:
    message = decode_request('{"server_id":"a","method":"x"}', need_version=False)
    assert message.extra == {"server_id": "a"}
    with pytest.raises(Malformed):
        decode_request('{"jsonrpc":"3","method":"x"}', need_version=False)


def test_replies_of_every_shape() -> None:
    usual = decode_reply('{"jsonrpc":"2.0","id":5,"result":{"a":[1]}}')
    spaced = decode_reply(' {"id" : 5 , "result" : {"a":[1]}, "jsonrpc":"2.0", "extra":1 } ')
    assert usual.kind is spaced.kind is Kind.RESULT
    assert usual.result == spaced.result == {"a": [1]}
    assert usual.id == spaced.id == 5
    assert spaced.with_id('"x"') == ' {"id" : "x" , "result" : {"a":[1]}, "jsonrpc":"2.0", "extra":1 } '
    error = decode_reply(build_error("5", -1, 'no "way"'))
    assert (error.kind, error.result) == (Kind.ERROR, {"code": -1, "message": 'no "way"'})
    assert decode_reply('{"jsonrpc":"2.0","id":"s","method":"roots/list"}').kind is Kind.REQUEST
    note = decode_reply('{"jsonrpc":"2.0","method":"n","params":{"progressToken":3,"x":[{}]}}')
    assert note.params_text({"progressToken": '"t"'}) == '{"progressToken":"t","x":[{}]}'


@pytest.mark.parametrize(
    "text",
    [
        '{"jsonrpc":"2.0","id":5,"result":{}}}',
        '{"jsonrpc":"2.0","id":5,"result":{},"id":6}',
        '{"jsonrpc":"2.0","id":5,"result":{"a":NaN}}',
        '{"jsonrpc":"2.0","id":5,"result":{}',
        '{"jsonrpc":"2.0","id":5,"error":"text"}',
        '{"id":5,"result":{}}',
        "hello",
        "[" * 100_000,
    ],
)
def test_RB10_bad_lines_of_a_server_are_recognised(text: str) -> None:
    with pytest.raises(Malformed):
        decode_reply(text)


def test_RB27_batches_are_split_with_bounds() -> None:
    assert split_batch('{"a":1}') is None
    assert split_batch(' [ {"a":[1]} , 2 ] ') == ['{"a":[1]}', "2"]
    assert len(split_batch("[" + ",".join("1" * 100) + "]") or []) == 100
    for text, code in (
        ("[]", INVALID_REQUEST),
        ("[" + ",".join("1" * 101) + "]", INVALID_REQUEST),
        ("[1", PARSE_ERROR),
    ):
        with pytest.raises(Malformed) as caught:
            split_batch(text)
        assert caught.value.code == code


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(st.text(max_size=8), JSON, max_size=5), st.integers() | st.text(), st.booleans(), st.integers(0, 2)
)
def test_RB26_what_is_read_is_what_is_sent_on(params: dict[str, object], id: object, ascii: bool, indent: int) -> None:
    source = {"jsonrpc": "2.0", "id": id, "method": "m", "params": params}
    text = json.dumps(source, ensure_ascii=ascii, indent=indent or None)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    message = decode_request(data)
    assert message.params == params
    assert json.loads(message.params_text()) == params
    assert json.loads(message.params_text({"k": "[1]"})) == {**params, "k": [1]}
    assert json.loads(message.with_id("0")) == {**source, "id": 0}


@given(st.text(alphabet=string.printable, max_size=200) | st.binary(max_size=200))
def test_P3_no_text_does_anything_but_decode_or_raise_malformed(data: str | bytes) -> None:
    for decode in (decode_request, decode_reply, split_batch):
        with contextlib.suppress(Malformed):
            decode(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": "\u00e9"}, '{"a":"\u00e9"}'),
        ({"a": "\ud83d", "b": "\u00e9"}, '{"a":"\\ud83d","b":"\\u00e9"}'),
        ({"a": [float("inf"), -float("inf"), 1.5]}, '{"a":[1e999,-1e999,1.5]}'),
        ({"\ud83d": float("inf")}, '{"\\ud83d":1e999}'),
    ],
)
def test_what_servers_say_can_always_be_said_again(value: Any, text: str) -> None:
    assert dumps(value) == text
    dumps(value).encode()
    assert json.loads(dumps(value)) == value


@pytest.mark.parametrize(
    "params",
    [
        '{"name":"a","_meta":{"k":1}}',
        '{"_meta" : {"k":1} , "name":"a"}',
        '{"name":"_meta","_meta":{"k":1}}',
        '{"arguments":{"_meta":{"k":2}},"_meta":{"k":1}}',
        '{"arguments":{"_meta":{"k":2}},"\\u005fmeta":{"k":1}}',
        '{"\\u005fmeta":{"k":1},"name":"_meta"}',
    ],
)
def test_a_member_is_found_however_its_name_is_spelled(params: str) -> None:
    message = decode_request(f'{{"jsonrpc":"2.0","id":1,"method":"x","params":{params}}}')
    start, end = message.span("_meta")
    assert json.loads(message.text[start:end]) == {"k": 1}
    assert json.loads(message.params_text({"_meta": "7"})) == {**message.params, "_meta": 7}
