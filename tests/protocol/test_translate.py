"""Single messages between the two eras (protocol.md sections 1, 4 and 7)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ServerProtocolError
from gateway.exchange import Reply
from gateway.protocol.eras import LEGACY_VERSIONS, SERVER_INFO
from gateway.protocol.message import Kind, Message, build_error, build_result, decode_reply
from gateway.protocol.translate import (
    CACHED,
    capability_needed,
    declares,
    progress_for,
    question_to_legacy,
    question_to_modern,
    session_capabilities,
    to_legacy,
    to_modern,
)

OURS = '{"name":"gateway","version":"1"}'
THEIRS = {"name": "upstream", "version": "9"}
OLDEST, MARCH, JUNE, NOVEMBER = LEGACY_VERSIONS
HELLO = {"type": "text", "text": "hello"}


def reply(result: Any, id_text: str = "7") -> Message:
    return decode_reply(build_result(id_text, json.dumps(result)))


def failure(code: Any, message: Any = "no", data: Any = None, id_text: str = "7") -> Message:
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return decode_reply(f'{{"jsonrpc":"2.0","id":{id_text},"error":{json.dumps(error)}}}')


def modern(method: str, message: Message, **more: Any) -> Any:
    """What ``to_modern`` makes, as the reply's one member."""
    whole = json.loads('{"jsonrpc":"2.0","id":1,' + to_modern(method, message, OURS, **more) + "}")
    assert list(whole) == ["jsonrpc", "id", "result" if "result" in whole else "error"]
    return whole["result"] if "result" in whole else whole["error"]


def legacy(method: str, message: Message, version: str = NOVEMBER, **more: Any) -> Message:
    """What ``to_legacy`` makes, after checking that what it says of its text is so, and that a second time is idle."""
    made = to_legacy(method, message, version, **more)
    again = decode_reply(made.text)
    assert (made.kind, made.id, made.id_text, made.id_span) == (again.kind, again.id, again.id_text, again.id_span)
    assert (made.result, made.result_span) == (again.result, again.result_span)
    assert to_legacy(method, made, version, **more).text == made.text
    return made


# ----------------------------------------------------------------------------------------- a legacy result, to a client
def test_bridge_call_M_to_L_adds_result_type_and_our_name_and_keeps_every_byte() -> None:
    text = '{"content":[{"type":"text","text":"\\u00e9\\ud83d","n":1.50,"big":1e400}],  "odd":{"a":[]}}'
    message = decode_reply(build_result("7", text))
    member = to_modern("tools/call", message, OURS)
    assert member == f'"result":{{"resultType":"complete","_meta":{{"{SERVER_INFO}":{OURS}}},{text[1:]}'


def test_bridge_call_M_to_L_of_an_empty_result() -> None:
    for text in ("{}", "{ }"):
        made = modern("completion/complete", decode_reply(build_result("7", text)))
        assert made == {"resultType": "complete", "_meta": {SERVER_INFO: json.loads(OURS)}}


@pytest.mark.parametrize("method", sorted(CACHED))
def test_bridge_lists_M_to_L_say_how_long_they_may_be_kept(method: str) -> None:
    assert modern(method, reply({"x": 1}))["ttlMs"] == 0
    assert modern(method, reply({"x": 1}))["cacheScope"] == "private"
    made = modern(method, reply({"x": 1}), cache=(500, "public"))
    assert (made["ttlMs"], made["cacheScope"], made["resultType"]) == (500, "public", "complete")
    own = modern(method, reply({"ttlMs": 9, "cacheScope": "public", "resultType": "complete"}), cache=(0, "private"))
    assert (own["ttlMs"], own["cacheScope"]) == (9, "public")


@pytest.mark.parametrize("method", ["tools/call", "prompts/get", "completion/complete"])
def test_section_1_other_results_are_not_cached(method: str) -> None:
    assert not {"ttlMs", "cacheScope"} & modern(method, reply({"x": 1}), cache=(500, "public")).keys()


def test_section_1_input_required_is_never_cached() -> None:
    made = modern("resources/read", reply({"resultType": "input_required", "requestState": "s"}))
    assert made == {
        "resultType": "input_required",
        "requestState": "s",
        "_meta": {SERVER_INFO: json.loads(OURS)},
    }


def test_bridge_lists_M_to_L_strip_execution() -> None:
    tools = [{"name": "a", "execution": {"taskSupport": "optional"}, "x": 1.0}, {"name": "execution"}, "odd"]
    made = modern("tools/list", reply({"tools": tools, "nextCursor": "", "_meta": {"a": 1}}))
    assert made["tools"] == [{"name": "a", "x": 1.0}, {"name": "execution"}, "odd"]
    assert (made["nextCursor"], made["ttlMs"]) == ("", 0)
    assert made["_meta"] == {"a": 1, SERVER_INFO: json.loads(OURS)}


def test_section_1_a_result_that_is_no_object_is_an_error_not_a_broken_reply() -> None:
    assert modern("tools/call", reply([1]))["code"] == -32603
    assert modern("tools/call", reply(None))["code"] == -32603


# ----------------------------------------------------------------------------------------- a modern result, to a client
def test_bridge_call_M_to_M_only_the_name_in_meta_is_ours() -> None:
    meta = f'{{"a": 1.50, "{SERVER_INFO}": {{"name": "u", "icons": [{{}}]}}}}'
    text = f'{{"_meta": {meta}, "resultType":"complete","content":[]}}'
    message = decode_reply(build_result("7", text))
    member = to_modern("tools/call", message, OURS)
    assert member == '"result":' + text.replace('{"name": "u", "icons": [{}]}', OURS)
    assert to_modern("tools/call", decode_reply('{"jsonrpc":"2.0","id":7,' + member + "}"), OURS) == member


def test_bridge_call_M_to_M_relays_input_required_untouched() -> None:
    text = '{"resultType":"input_required","inputRequests":{"k":{"method":"roots/list"}},"requestState":"a\\/b"}'
    member = to_modern("tools/call", decode_reply(build_result("7", text)), OURS)
    assert member == f'"result":{{"_meta":{{"{SERVER_INFO}":{OURS}}},{text[1:]}'


@pytest.mark.parametrize(
    "text",
    [
        # The name stands elsewhere, too, or only elsewhere, or is spelled in other ways.
        '{"_meta":{"a":1},"structuredContent":{"io.modelcontextprotocol/serverInfo":{"name":"inner"}}}',
        '{"structuredContent":{"_meta":{"io.modelcontextprotocol/serverInfo":1}},"_meta":{"a":1}}',
        '{"structuredContent":{"_meta":{}},"_meta":{"io.modelcontextprotocol/serverInfo":{"a":[1,2]}}}',
        '{"_meta":{"io.modelcontextprotocol\\/serverInfo":{"name":"php"}},"a":{"io.modelcontextprotocol/serverInfo":1}}',
        '{"\\u005fmeta":{"a":1},"structuredContent":{"_meta":{"b":1}}}',
        '{"_meta":{"x":"io.modelcontextprotocol/serverInfo"}}',
        '{"_meta":{"x":"_meta"},"content":["_meta"]}',
        '{"_meta":{ }, "a":1}',
        '{"_meta":null,"a":1}',
        '{"a":1,"_meta" : [ ] }',
        '{"content":[{"type":"text","text":"{\\"_meta\\":{\\"io.modelcontextprotocol/serverInfo\\":1}}"}],"_meta":{}}',
    ],
)
def test_bridge_call_M_to_M_finds_the_right_meta(text: str) -> None:
    message = decode_reply(build_result("7", text))
    expected = dict(message.result)
    kept = expected.get("_meta")
    expected["_meta"] = {**(kept if isinstance(kept, dict) else {}), SERVER_INFO: json.loads(OURS)}
    expected.setdefault("resultType", "complete")
    assert modern("tools/call", message) == expected


# ------------------------------------------------------------------------------------------------ errors, to the modern
def test_section_4_4_no_resource_is_invalid_params_with_the_uri() -> None:
    made = modern("resources/read", failure(-32002, "Resource not found", {"uri": "x://1", "more": 1}))
    assert made == {"code": -32602, "message": "Resource not found", "data": {"uri": "x://1", "more": 1}}
    assert modern("resources/read", failure(-32002), uri="x://2")["data"] == {"uri": "x://2"}
    assert modern("resources/read", failure(-32002, data={"uri": "x://1", "m": 2}), uri="a+x://1")["data"] == {
        "uri": "a+x://1",
        "m": 2,
    }
    assert modern("resources/read", failure(-32602, data={"uri": "x://1"}), uri="a+x://1")["data"] == {"uri": "a+x://1"}
    assert modern("resources/read", failure(-32602, data={"no": 1}), uri="x://1")["data"] == {"no": 1}
    assert modern("tools/call", failure(-32602, data={"uri": "x://1"}), uri="y")["data"] == {"uri": "x://1"}


def test_section_1_a_banned_code_becomes_an_internal_error() -> None:
    made = modern("tools/call", failure(-32042, "open it", {"elicitations": []}))
    assert (made["code"], made["message"], made["data"]) == (-32603, "open it", {"elicitations": []})


def test_section_7_other_errors_pass_byte_for_byte() -> None:
    text = '{"jsonrpc":"2.0","id":7,"error":{ "code":-32021,"message":"\\ud83d", "data":{"n":1e400} }}'
    assert to_modern("tools/call", decode_reply(text), OURS) == f'"error":{text[32:-1]}'
    assert modern("tools/call", failure(42, "MCP error 42: own code")) == {
        "code": 42,
        "message": "MCP error 42: own code",
    }


def test_section_7_errors_of_our_own_are_complete() -> None:
    made = modern("tools/call", Reply.error(-32002, "Resource 'x' not found", {"uri": "x"}).message)
    assert made == {"code": -32602, "message": "Resource 'x' not found", "data": {"uri": "x"}}
    assert modern("tools/call", Reply.error(-32603, "down").message) == {"code": -32603, "message": "down"}
    assert modern("resources/read", Reply.error(-32002, "no").message, uri="u")["data"] == {"uri": "u"}


def test_section_7_an_error_without_code_or_message_is_mended() -> None:
    made = modern("tools/call", failure("bad", None, 1))
    assert (made["code"], type(made["message"]), made["data"]) == (-32603, str, 1)


# ----------------------------------------------------------------------------------------------- results, to the legacy
def test_bridge_call_L_to_M_leaves_nothing_modern_behind() -> None:
    text = (
        f'{{"_meta":{{"{SERVER_INFO}":{json.dumps(THEIRS)}}},"resultType":"complete","content":[{{"n":1.50}}],"odd":1}}'
    )
    made = legacy("tools/call", decode_reply(build_result('"x"', text)))
    assert made.text == '{"jsonrpc":"2.0","id":"x","result":{"content":[{"n":1.50}],"odd":1}}'


@pytest.mark.parametrize("version", LEGACY_VERSIONS)
@pytest.mark.parametrize(
    "method", ["tools/list", "prompts/list", "resources/list", "resources/templates/list", "resources/read"]
)
def test_bridge_lists_L_to_M_strip_result_type_and_cache_fields(method: str, version: str) -> None:
    result = {"resultType": "complete", "items": [1], "ttlMs": 5, "cacheScope": "public", "nextCursor": ""}
    assert legacy(method, reply(result), version).result == {"items": [1], "nextCursor": ""}


def test_bridge_call_L_to_M_keeps_the_rest_of_meta() -> None:
    meta = {"a": {"b": 1}, SERVER_INFO: THEIRS, "c": 2}
    assert legacy("tools/call", reply({"_meta": meta, "content": []})).result == {
        "_meta": {"a": {"b": 1}, "c": 2},
        "content": [],
    }
    untouched = reply({"_meta": {"a": 1}, "content": []})
    assert legacy("tools/call", untouched) is untouched


@pytest.mark.parametrize(
    "text",
    [
        '{"resultType":"complete"}',
        '{ "resultType" : "complete" , "a":1 , "ttlMs" : 1.5e3 }',
        '{"a":1,"ttlMs":0,"cacheScope":"private"}',
        '{"cacheScope":"private","a":1,"resultType":"complete","_meta":{"io.modelcontextprotocol/serverInfo":{}}}',
        '{"a":[],"_meta":{ "io.modelcontextprotocol/serverInfo" : {"name":"}}"} } }',
        '{"a":1,"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"x","icons":[{"src":"a"}]}},"b":2}',
        '{"a":1,"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"a\\"}b\\\\"}},"b":2}',
        '{"a":1,"_meta":{"io.modelcontextprotocol\\/serverInfo":null},"b":2}',
        '{"structuredContent":{"resultType":"x","ttlMs":2,"cacheScope":"y","_meta":{}},"resultType":"complete","ttlMs":1}',
        '{"structuredContent":{"resultType":"x"},"result\\u0054ype":"complete"}',
        '{"ttlMs":{"odd":1},"cacheScope":null,"x":1}',
        '{"a":"ttlMs","ttlMs":1}',
        '{"_meta":{"io.modelcontextprotocol/serverInfo":1,"x":"ttlMs\\u0022"},"ttlMs":1}',
    ],
)
def test_bridge_call_L_to_M_cuts_the_right_members(text: str) -> None:
    message = decode_reply(build_result("7", text))
    expected = {n: v for n, v in message.result.items() if n not in ("resultType", "ttlMs", "cacheScope")}
    if isinstance(expected.get("_meta"), dict):
        expected["_meta"] = {n: v for n, v in expected["_meta"].items() if n != SERVER_INFO}
        if not expected["_meta"]:
            del expected["_meta"]
    assert legacy("tools/call", message).result == expected


def test_bridge_call_L_to_M_the_id_may_stand_anywhere() -> None:
    message = decode_reply('{"result":{"resultType":"complete","a":1},"id":"q","jsonrpc":"2.0"}')
    assert legacy("tools/call", message).text == '{"jsonrpc":"2.0","id":"q","result":{"a":1}}'


def test_section_3_a_result_of_an_unknown_type_is_an_error() -> None:
    for kind in ("task", "input_required", 7, None):
        made = legacy("tools/list", reply({"resultType": kind, "x": 1}))
        assert made.kind is Kind.ERROR
        assert made.result["code"] == -32603


def test_section_5_the_gateway_itself_reads_all_of_a_reply() -> None:
    tools = [{"name": "a", "outputSchema": {"type": "array"}}]
    message = reply({"resultType": "complete", "tools": tools, "ttlMs": 5, "cacheScope": "public"})
    assert to_legacy("tools/list", message, "") is message


def test_section_5_a_list_without_anything_modern_is_not_touched() -> None:
    message = Reply.result('{"tools":[{"name":"a","outputSchema":{"type":"object"}}]}').message
    assert to_legacy("tools/list", message, NOVEMBER) is message


# ----------------------------------------------------------------------------------------------------------- downgrades
@pytest.mark.parametrize("structured", ["[1.50,2]", '"text"', "null", "7"])
@pytest.mark.parametrize("version", LEGACY_VERSIONS)
def test_section_4_4_structured_content_that_is_no_object_goes_its_text_stays(version: str, structured: str) -> None:
    text = f'{{"resultType":"complete","content":[{{"type":"text","text":"said"}}],"structuredContent":{structured}}}'
    message = decode_reply(build_result("7", text))
    assert legacy("tools/call", message, version).result == {"content": [{"type": "text", "text": "said"}]}


@pytest.mark.parametrize("content", ['"content":[],', "", '"content":[{"type":"image"}],'])
def test_section_4_4_structured_content_that_nobody_put_in_words_is_put_in_words(content: str) -> None:
    message = decode_reply(build_result("7", f'{{{content}"structuredContent":[1.50,{{"a":"\\"\\ud83d"}}]}}'))
    made = legacy("tools/call", message)
    assert made.result["content"][-1] == {"type": "text", "text": '[1.50,{"a":"\\"\\ud83d"}]'}
    assert "structuredContent" not in made.result


def test_section_4_4_an_object_as_structured_content_is_known_since_june() -> None:
    message = reply({"content": [HELLO], "structuredContent": {"a": 1}, "isError": False})
    for version in (JUNE, NOVEMBER):
        assert legacy("tools/call", message, version) is message
    for version in (OLDEST, MARCH):
        assert legacy("tools/call", message, version).result == {"content": [HELLO], "isError": False}


def test_section_4_4_output_schema_only_of_an_object_and_only_since_june() -> None:
    schemas: list[Any] = [{"type": "object"}, {"type": "array"}, {"anyOf": []}, True]
    tools: list[Any] = [{"name": str(n), "outputSchema": s, "inputSchema": {}} for n, s in enumerate(schemas)]
    tools += [{"name": "outputSchema"}, "odd"]
    result = {"resultType": "complete", "tools": tools, "nextCursor": "c", "_meta": {SERVER_INFO: THEIRS, "k": 1}}
    for version in LEGACY_VERSIONS:
        made = legacy("tools/list", reply(result), version).result
        kept = [n for n, tool in enumerate(made["tools"]) if isinstance(tool, dict) and "outputSchema" in tool]
        assert kept == ([] if version < JUNE else [0])
        assert made["tools"][4:] == tools[4:]
        assert made["tools"][1] == {"name": "1", "inputSchema": {}}
        assert (made["nextCursor"], made["_meta"]) == ("c", {"k": 1})


LINK = {"type": "resource_link", "uri": "file:///a", "name": "a", "title": "The A", "x": 1}
AUDIO = {"type": "audio", "data": "AAAA", "mimeType": "audio/wav"}
NOTED = {"type": "text", "text": "n", "annotations": {"priority": 1}, "_meta": {"a": 1}}


def content_for(version: str) -> list[Any]:
    if version >= JUNE:
        return [LINK, AUDIO, NOTED, "odd"]
    link = {"type": "text", "text": "The A: file:///a"}
    if version == MARCH:
        return [link, AUDIO, NOTED, "odd"]
    note = {"type": "text", "text": "[audio, audio/wav: not shown, this client knows no audio]"}
    return [link, note, {"type": "text", "text": "n", "_meta": {"a": 1}}, "odd"]


@pytest.mark.parametrize("version", LEGACY_VERSIONS)
def test_section_4_4_content_that_an_old_revision_does_not_know(version: str) -> None:
    made = legacy("tools/call", reply({"content": [LINK, AUDIO, NOTED, "odd"], "isError": False}), version)
    assert made.result == {"content": content_for(version), "isError": False}


@pytest.mark.parametrize("version", LEGACY_VERSIONS)
def test_section_4_4_messages_of_prompts_that_an_old_revision_does_not_know(version: str) -> None:
    messages = [{"role": "user", "content": part, "x": 1} for part in (LINK, AUDIO, NOTED, "odd")]
    made = legacy("prompts/get", reply({"description": "d", "messages": ["odd", *messages]}), version)
    expected = [{"role": "user", "content": part, "x": 1} for part in content_for(version)]
    assert made.result == {"description": "d", "messages": ["odd", *expected]}


def test_section_4_4_a_link_without_a_name_is_its_uri() -> None:
    made = legacy("tools/call", reply({"content": [{"type": "resource_link", "uri": "x://1"}]}), MARCH)
    assert made.result["content"] == [{"type": "text", "text": "x://1"}]


def test_section_4_4_the_oldest_revision_knows_no_annotations_of_tools() -> None:
    message = reply({"tools": [{"name": "a", "annotations": {"readOnlyHint": True}}]})
    assert legacy("tools/list", message, OLDEST).result == {"tools": [{"name": "a"}]}
    assert legacy("tools/list", message, MARCH) is message


def test_section_4_4_the_oldest_revision_knows_no_message_of_progress() -> None:
    notice = (
        '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":1.50,"message":"m"}}'
    )
    message = decode_reply(notice)
    assert progress_for(message, OLDEST).params_text() == '{"progressToken":1,"progress":1.50}'
    assert progress_for(message, MARCH) is message
    # A server may send what we would not take from a client.
    odd = notice.replace('"m"', '"m","_meta":{"a":1,"a":2}')
    assert "message" not in progress_for(decode_reply(odd), OLDEST).params


# ------------------------------------------------------------------------------------------------ errors, to the legacy
def test_section_4_4_invalid_params_with_the_uri_is_no_resource() -> None:
    made = legacy("resources/read", failure(-32602, "MCP error -32602: none", {"uri": "x://1", "m": 1}), uri="a+x://1")
    assert made.result == {"code": -32002, "message": "MCP error -32602: none", "data": {"uri": "a+x://1", "m": 1}}
    assert legacy("resources/read", failure(-32602, data={"uri": "x://1"})).result["data"] == {"uri": "x://1"}
    for method, data in (("tools/call", {"uri": "x"}), ("resources/read", None), ("resources/read", {"m": 1})):
        assert legacy(method, failure(-32602, data=data), uri="x").result["code"] == -32602


def test_section_4_3_4_a_missing_capability_is_named() -> None:
    refused = failure(-32021, "no", {"requiredCapabilities": {"elicitation": {"url": {}}, "roots": {}}})
    made = legacy("tools/call", refused)
    assert (made.kind, made.result["isError"]) == (Kind.RESULT, True)
    assert "elicitation.url, roots" in made.result["content"][0]["text"]
    made = legacy("prompts/get", refused)
    assert (made.kind, made.result["code"]) == (Kind.ERROR, -32603)
    assert "elicitation.url, roots" in made.result["message"]
    assert "why" in legacy("prompts/get", failure(-32021, "why", {"requiredCapabilities": ["odd"]})).result["message"]


@pytest.mark.parametrize("method", ["tools/call", "tools/list"])
@pytest.mark.parametrize("code", [-32020, -32022])
def test_section_4_4_modern_codes_never_reach_a_legacy_client(code: int, method: str) -> None:
    made = legacy(method, failure(code, "Mcp-Name differs", {"supported": ["2026-07-28"]}, '"s"'))
    assert (made.result["code"], made.id) == (-32603, "s")
    assert "Mcp-Name differs" in made.result["message"]


def test_section_7_other_errors_pass_to_the_legacy_as_they_are() -> None:
    message = failure(-32601, "MCP error -32601: x", {"a": 1})
    assert legacy("tools/call", message) is message
    own = Reply.error(-32603, "down").message
    assert to_legacy("tools/call", own, NOVEMBER) is own


# --------------------------------------------------------------------------------------- everything else, by comparison
names = st.sampled_from(
    ["_meta", "resultType", "ttlMs", "cacheScope", SERVER_INFO, "content", "structuredContent", "a"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\/}{é\ud83d') | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
results = st.dictionaries(names, values, max_size=6)
spellings = st.sampled_from(
    [
        json.dumps,
        lambda value: json.dumps(value, indent=1),
        lambda value: json.dumps(value, separators=(",", ":")),
        lambda value: json.dumps(value).replace("/", "\\/"),
        lambda value: json.dumps(value).replace('"_meta"', '"\\u005fmeta"', 1),
        lambda value: json.dumps(value).replace('"resultType"', '"result\\u0054ype"', 1),
    ]
)


@given(results, spellings)
def test_bridge_call_M_to_any_is_what_decoding_and_encoding_would_make(result: dict[str, Any], spell: Any) -> None:
    message = decode_reply(build_result("7", spell(result)))
    meta = result.get("_meta")
    expected = {"resultType": "complete", **result}
    expected["_meta"] = {**(meta if isinstance(meta, dict) else {}), SERVER_INFO: json.loads(OURS)}
    assert modern("tools/call", message) == expected


def expected_for_june(result: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in result.items() if name not in ("resultType", "ttlMs", "cacheScope")}
    meta = made.get("_meta")
    if isinstance(meta, dict) and SERVER_INFO in meta:
        made["_meta"] = {name: value for name, value in meta.items() if name != SERVER_INFO}
        if not made["_meta"]:
            del made["_meta"]
    if "structuredContent" in made and not isinstance(made["structuredContent"], dict):
        del made["structuredContent"]
        made.pop("content", None)
    return made


@given(results, spellings, st.sampled_from((JUNE, NOVEMBER)))
def test_bridge_call_L_to_any_is_what_decoding_and_encoding_would_make(
    result: dict[str, Any], spell: Any, version: str
) -> None:
    if "resultType" in result:
        result["resultType"] = "complete"
    made = dict(legacy("tools/call", decode_reply(build_result('"i"', spell(result))), version).result)
    if "structuredContent" in result and not isinstance(result["structuredContent"], dict):
        content = made.pop("content")  # its own test says what is in it
        assert isinstance(content, list)
    assert made == expected_for_june(result)


# ------------------------------------------------------------------------------------------- questions and capabilities
def test_section_4_2_1_a_question_loses_what_only_legacy_has() -> None:
    params = {
        "mode": "url",
        "url": "https://x",
        "message": "m",
        "elicitationId": "e",
        "task": {"ttl": 1},
        "_meta": {"io.modelcontextprotocol/related-task": {"taskId": "t"}, "progressToken": 3, "own": 1},
    }
    asked = decode_reply(json.dumps({"jsonrpc": "2.0", "id": 3, "method": "elicitation/create", "params": params}))
    assert question_to_modern(asked) == {
        "method": "elicitation/create",
        "params": {"mode": "url", "url": "https://x", "message": "m", "_meta": {"own": 1}},
    }
    assert asked.params == params
    assert question_to_modern(decode_reply('{"jsonrpc":"2.0","id":3,"method":"roots/list"}')) == {
        "method": "roots/list",
        "params": {},
    }
    bare = '{"jsonrpc":"2.0","id":3,"method":"roots/list","params":{"_meta":{"progressToken":1}}}'
    assert question_to_modern(decode_reply(bare))["params"] == {}


def test_section_4_3_2_a_url_gets_an_id_and_a_form_loses_its_mode() -> None:
    url = {"mode": "url", "url": "https://x", "message": "m"}
    form = {"mode": "form", "message": "m", "requestedSchema": {"type": "object"}}
    assert json.loads(question_to_legacy("elicitation/create", url, NOVEMBER, "id-1")) == {
        **url,
        "elicitationId": "id-1",
    }
    assert json.loads(question_to_legacy("elicitation/create", form, NOVEMBER, "id-1")) == form
    june = json.loads(question_to_legacy("elicitation/create", form, JUNE, "id-1"))
    assert june == {"message": "m", "requestedSchema": {"type": "object"}}
    sampling = {"mode": "own", "messages": [], "maxTokens": 1}
    assert json.loads(question_to_legacy("sampling/createMessage", sampling, JUNE, "id-1")) == sampling
    assert form["mode"] == "form"


def test_section_4_3_2_a_question_in_odd_texts_is_still_json_in_utf8() -> None:
    assert question_to_legacy("sampling/createMessage", {"x": "\ud83d"}, JUNE, "").encode() == b'{"x":"\\ud83d"}'
    with pytest.raises(ServerProtocolError, match="overflows"):
        question_to_legacy("sampling/createMessage", {"x": float("inf")}, JUNE, "")


@pytest.mark.parametrize(
    ("method", "params", "needed"),
    [
        ("elicitation/create", {}, {"elicitation": {"form": {}}}),
        ("elicitation/create", {"mode": "form"}, {"elicitation": {"form": {}}}),
        ("elicitation/create", {"mode": "url"}, {"elicitation": {"url": {}}}),
        ("sampling/createMessage", {}, {"sampling": {}}),
        ("sampling/createMessage", {"tools": []}, {"sampling": {"tools": {}}}),
        ("sampling/createMessage", {"toolChoice": {}}, {"sampling": {"tools": {}}}),
        ("roots/list", {}, {"roots": {}}),
        ("ping", {}, None),
        ("tasks/get", {}, None),
    ],
)
def test_section_3_which_capability_a_question_needs(method: str, params: Any, needed: Any) -> None:
    assert capability_needed(method, params) == needed


@pytest.mark.parametrize(
    ("capabilities", "needed", "declared"),
    [
        ({"elicitation": {}}, {"elicitation": {"form": {}}}, True),
        ({"elicitation": {}}, {"elicitation": {"url": {}}}, False),
        ({"elicitation": {"form": {}}}, {"elicitation": {"form": {}}}, True),
        ({"elicitation": {"url": {}}}, {"elicitation": {"form": {}}}, False),
        ({"elicitation": {"form": {}, "url": {}}}, {"elicitation": {"url": {}}}, True),
        ({}, {"elicitation": {"form": {}}}, False),
        ({"elicitation": None}, {"elicitation": {"form": {}}}, False),
        ({"sampling": {}}, {"sampling": {}}, True),
        ({"sampling": {}}, {"sampling": {"tools": {}}}, False),
        ({"sampling": {"tools": {}}}, {"sampling": {"tools": {}}}, True),
        ({"sampling": {}}, {"roots": {}}, False),
        ({"roots": {"listChanged": True}}, {"roots": {}}, True),
    ],
)
def test_section_4_3_1_what_a_client_has_declared(capabilities: Any, needed: Any, declared: bool) -> None:
    assert declares(capabilities, needed) is declared


def test_section_4_3_1_a_session_without_tasks_and_roots_list_changed() -> None:
    declared = {
        "roots": {"listChanged": True, "own": 1},
        "tasks": {"list": {}},
        "elicitation": {},
        "sampling": {"tools": {}},
        "extensions": {"io.modelcontextprotocol/tasks": {}, "io.modelcontextprotocol/ui": {}},
    }
    assert session_capabilities(declared) == {
        "roots": {"own": 1},
        "elicitation": {},
        "sampling": {"tools": {}},
        "extensions": {"io.modelcontextprotocol/ui": {}},
    }
    assert declared["roots"] == {"listChanged": True, "own": 1}


def test_section_1_a_reply_nested_too_deep_for_us_is_an_error() -> None:
    deep = "[" * 900 + "]" * 900
    message = decode_reply(build_result("7", f'{{"_meta":{{}},"a":{deep},"b":{{"_meta":1}},"ttlMs":[]}}'))

    def down(levels: int) -> tuple[str, Message]:
        if levels:
            return down(levels - 1)
        return to_modern("tools/call", message, OURS), to_legacy("tools/call", message, NOVEMBER)

    member, made = down(150)
    assert '"code":-32603' in member
    assert made.result["code"] == -32603


def test_section_7_build_error_is_what_we_make_of_ours() -> None:
    """Errors that the gateway makes go to legacy clients as they are and to modern ones in modern codes."""
    message = decode_reply(build_error("1", -32002, "no", {"uri": "x"}))
    assert to_legacy("resources/read", message, NOVEMBER) is message
    assert modern("resources/read", message)["code"] == -32602
