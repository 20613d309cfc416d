"""Merging listings under unique, stable, short names (protocol.md section 5)."""

from __future__ import annotations

import json

from gateway.config.model import ServerSpec
from gateway.directory import NAME_LIMIT, Listing, fit, merge, with_names
from gateway.protocol.message import decode_reply


def spec(id: str, prefix: str | None = None) -> ServerSpec:
    return ServerSpec(id, None, "x", prefix=prefix)


def names(text: str, member: str = "tools", key: str = "name") -> list[str]:
    return [item[key] for item in json.loads(text)[member]]


def test_tools_are_prefixed_also_with_one_server_and_the_rest_of_an_item_is_kept() -> None:
    item = {"name": "echo", "inputSchema": {"type": "object"}, "x": 1.0, "_meta": {"k": None}}
    merged = merge("tools/list", [(spec("a"), Listing("tools/list", (item,)))])
    assert json.loads(merged.text)["tools"] == [{**item, "name": "a__echo"}]
    assert merged.routes["a__echo"].name == "echo"
    assert merged.routes["a__echo"].spec.id == "a"


def test_empty_prefix_keeps_names_and_the_later_of_two_equal_ones_is_prefixed() -> None:
    listing = Listing("tools/list", ({"name": "echo"},))
    merged = merge("tools/list", [(spec("a", ""), listing), (spec("b", ""), listing)])
    assert names(merged.text) == ["echo", "b__echo"]
    assert merged.routes["b__echo"].spec.id == "b"
    assert len(merged.problems) == 1


def test_long_names_are_cut_with_a_stable_hash() -> None:
    one, two = fit("server__" + "n" * 120 + "1"), fit("server__" + "n" * 120 + "2")
    assert len(one) == len(two) == NAME_LIMIT
    assert one != two
    assert one == fit("server__" + "n" * 120 + "1")


def test_uris_stay_while_unique() -> None:
    listing = Listing("resources/list", ({"uri": "file:///x", "name": "x"},))
    merged = merge("resources/list", [(spec("a"), listing), (spec("b"), listing)])
    assert names(merged.text, "resources", "uri") == ["file:///x", "b+file:///x"]
    assert merged.routes["b+file:///x"].name == "file:///x"


def test_missing_servers_are_named() -> None:
    text, result = merge("tools/list", []).page(0, 0, missing={"dead": "process exited with code 1"})
    assert json.loads(text) == result
    assert result == {
        "tools": [],
        "_meta": {"io.github.open-mcp-gateway/unavailable": {"dead": "process exited with code 1"}},
    }


def test_items_without_a_usable_name_are_left_out() -> None:
    items = ({"name": 5}, {"x": 1}, {"name": ""}, {"name": "ok"})
    merged = merge("tools/list", [(spec("a"), Listing("tools/list", items))])
    assert names(merged.text) == ["a__ok"]


def test_a_clashing_resource_has_the_clients_name_wherever_the_reply_has_it() -> None:
    names = {"x://a": "b+x://a"}
    link = {"type": "resource_link", "uri": "x://a", "name": "a"}
    embedded = {"type": "resource", "resource": {"uri": "x://a", "text": "x://a"}}
    result = {
        "contents": [{"uri": "x://a", "text": "t"}, {"uri": "x://other", "text": "t"}],
        "content": [link, embedded, {"type": "text", "text": "x://a"}],
        "messages": [{"role": "user", "content": embedded}],
        "own": {"uri": "x://a"},
    }
    reply = decode_reply(json.dumps({"jsonrpc": "2.0", "id": 7, "result": result}))
    renamed = with_names(reply, names)
    assert renamed.id == 7
    assert [part["uri"] for part in renamed.result["contents"]] == ["b+x://a", "x://other"]
    assert renamed.result["content"][0]["uri"] == "b+x://a"
    assert renamed.result["content"][1]["resource"] == {"uri": "b+x://a", "text": "x://a"}
    assert renamed.result["content"][2]["text"] == "x://a"
    assert renamed.result["messages"][0]["content"]["resource"]["uri"] == "b+x://a"
    assert renamed.result["own"] == {"uri": "x://a"}
    error = {"code": -32002, "message": "no", "data": {"uri": "x://a"}}
    refused = with_names(decode_reply(json.dumps({"jsonrpc": "2.0", "id": 7, "error": error})), names)
    assert refused.result["data"] == {"uri": "b+x://a"}
    other = decode_reply('{"jsonrpc":"2.0","id":7,"result":{"content":[]}}')
    assert with_names(other, names) is other
