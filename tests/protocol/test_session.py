"""The legacy session's rules, without I/O."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from gateway.errors import (
    ClientProtocolError,
    Forbidden,
    GatewayError,
    LinkLost,
    Overloaded,
    RateLimited,
    StartFailed,
    UnknownTarget,
    UpstreamTimeout,
)
from gateway.protocol.message import Message, decode_request
from gateway.protocol.session import (
    BOTH,
    JSON,
    STREAM,
    VENDOR_DATA,
    Act,
    State,
    accepts,
    admit,
    announce,
    check_version,
    event_id,
    failure,
    hello,
    read_event_id,
    welcome,
)


def request(method: str, params: Any = None, id: Any = 1) -> Message:
    body = {"jsonrpc": "2.0", "id": id, "method": method}
    return decode_request(json.dumps(body if params is None else {**body, "params": params}))


def notification(method: str) -> Message:
    return decode_request(json.dumps({"jsonrpc": "2.0", "method": method}))


@pytest.mark.parametrize(
    ("state", "method", "act"),
    [
        (State.NEW, "initialize", Act.INITIALIZE),
        (State.NEW, "ping", Act.PONG),
        (State.OPENING, "ping", Act.PONG),
        (State.OPEN, "ping", Act.PONG),
        (State.OPEN, "tools/list", Act.CALL),
        (State.READY, "tools/call", Act.CALL),
        (State.READY, "x/unknown", Act.CALL),
    ],
)
def test_H41_requests_that_a_state_admits(state: State, method: str, act: Act) -> None:
    assert admit(state, request(method)) is act


@pytest.mark.parametrize(
    ("state", "method", "why"),
    [
        (State.NEW, "tools/list", "not initialized"),
        (State.OPENING, "tools/list", "not initialized"),
        (State.OPENING, "initialize", "already initialized"),
        (State.OPEN, "initialize", "already initialized"),
        (State.READY, "initialize", "already initialized"),
    ],
)
def test_requests_that_a_state_forbids_are_invalid(state: State, method: str, why: str) -> None:
    with pytest.raises(ClientProtocolError, match=why) as caught:
        admit(state, request(method))
    assert caught.value.code == -32600


def test_every_state_decides_about_every_kind_of_request() -> None:
    for state in State:
        for method in ("initialize", "ping", "tools/call"):
            with contextlib.suppress(ClientProtocolError):
                assert isinstance(admit(state, request(method)), Act)


@pytest.mark.parametrize(
    ("state", "method", "act"),
    [
        (State.NEW, "notifications/initialized", Act.DROP),
        (State.OPEN, "notifications/initialized", Act.READY),
        (State.READY, "notifications/initialized", Act.DROP),
        (State.OPEN, "notifications/cancelled", Act.CANCEL),
        (State.READY, "notifications/cancelled", Act.CANCEL),
        (State.READY, "notifications/roots/list_changed", Act.NOTE),
        (State.NEW, "notifications/progress", Act.DROP),
    ],
)
def test_H39_notifications_by_state(state: State, method: str, act: Act) -> None:
    assert admit(state, notification(method)) is act


def test_replies_are_answers_in_every_state() -> None:
    reply = decode_request('{"jsonrpc":"2.0","id":3,"result":{}}')
    assert {admit(state, reply) for state in State} == {Act.ANSWER}


def test_H7_a_null_id_is_an_invalid_request() -> None:
    with pytest.raises(ClientProtocolError, match="not null") as caught:
        admit(State.READY, request("tools/call", id=None))
    assert (caught.value.code, caught.value.status) == (-32600, 400)


@pytest.mark.parametrize(
    ("asked", "agreed"),
    [
        ("2024-11-05", "2024-11-05"),
        ("2025-03-26", "2025-03-26"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
        ("1.0", "2025-11-25"),
        (None, "2025-11-25"),
        (7, "2025-11-25"),
    ],
)
def test_H39_initialize_negotiates_the_revision(asked: Any, agreed: str) -> None:
    said = hello(request("initialize", {"protocolVersion": asked, "capabilities": {"roots": {}}}))
    assert said.version == agreed
    assert said.capabilities == {"roots": {}}
    assert said.info == {}
    assert hello(request("initialize")).version == "2025-11-25"


@pytest.mark.parametrize("name", ["capabilities", "clientInfo"])
def test_initialize_with_members_of_the_wrong_type(name: str) -> None:
    with pytest.raises(ClientProtocolError, match=name) as caught:
        hello(request("initialize", {name: ["x"]}))
    assert caught.value.code == -32602


def test_welcome_answers_with_our_revision_whatever_the_facts_say() -> None:
    facts = {"protocolVersion": "2024-11-05", "capabilities": {"tools": {}}, "serverInfo": {}, "instructions": "i"}
    reply = json.loads(welcome('"a"', "2025-06-18", facts))
    assert reply == {"jsonrpc": "2.0", "id": "a", "result": {**facts, "protocolVersion": "2025-06-18"}}


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (None, BOTH),
        ("*/*", BOTH),
        ("application/json, text/event-stream", BOTH),
        ("text/event-stream,application/json;q=0.9", BOTH),
        ("Application/JSON , TEXT/Event-Stream", BOTH),
        ("application/*, text/*", BOTH),
        ("application/json", JSON),
        ("text/event-stream", STREAM),
        ("text/*;q=0.1", STREAM),
        ("text/html", 0),
        ("", 0),
        ("*/*;q=0", 0),
        ("application/json, text/event-stream;q=0", JSON),
        ("application/json, text/event-stream; q=0.000", JSON),
        ("application/json, text/event-stream; Q=0.001", BOTH),
        ("application/jsonx, text/event-streams", 0),
    ],
)
def test_H7_accept(header: str | None, flags: int) -> None:
    assert accepts(header) == flags
    assert accepts(header) == flags  # and again, remembered


def test_accept_headers_that_never_repeat_are_not_remembered_without_end() -> None:
    from gateway.protocol import session

    for number in range(1000):
        assert accepts(f"x/{number}, */*") == BOTH
    assert len(session._seen) <= session._MAX_SEEN


def test_version_header() -> None:
    for fine in (None, "2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"):
        check_version(fine)
    for bad in ("2026-07-28", "1.0", "", "2025-06-18 "):
        with pytest.raises(ClientProtocolError, match="MCP-Protocol-Version") as caught:
            check_version(bad)
        assert (caught.value.code, caught.value.status) == (-32600, 400)


def test_event_ids_name_their_stream() -> None:
    assert read_event_id(event_id(0, 7)) == (0, 7)
    assert read_event_id(event_id(12, 0)) == (12, 0)
    assert event_id(1, 12) != event_id(11, 2)
    assert read_event_id(event_id(0, 7, 3)) == (0, 7)
    assert len({event_id(0, 7), event_id(0, 7, 1), event_id(0, 7, 2)}) == 3


@pytest.mark.parametrize(
    "header", ["", "-", "7", "a-1", "1-", "-1", "1-2-3", "1_0-2", "\u0661-1", "9" * 50 + "-1", "1- 2", "1-2.", "1-2.x"]
)
def test_foreign_event_ids_are_refused(header: str) -> None:
    with pytest.raises(ClientProtocolError, match="Last-Event-ID"):
        read_event_id(header)


@pytest.mark.parametrize(
    "error", [StartFailed("no such file"), LinkLost("gone"), UpstreamTimeout("late"), GatewayError("?")]
)
def test_a_failed_server_is_an_answer(error: GatewayError) -> None:
    status, text = failure(error, "tools/call", '"x"')
    result = json.loads(text)["result"]
    assert status == 200
    assert result["isError"] is True
    assert result["content"] == [{"type": "text", "text": error.message}]
    assert result["_meta"] == {VENDOR_DATA: {"source": "gateway", "reason": error.message}}

    status, text = failure(error, "resources/read", "7")
    reply = json.loads(text)
    assert status == 200
    assert reply["id"] == 7
    assert reply["error"] == {
        "code": -32603,
        "message": error.message,
        "data": {"source": "gateway", "reason": error.message},
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ClientProtocolError("x"), 400, -32600),
        (ClientProtocolError("x", code=-32700), 400, -32700),
        (ClientProtocolError("x", status=406), 406, -32600),
        (ClientProtocolError("x", status=409), 409, -32600),
        (ClientProtocolError("bad cursor", code=-32602), 200, -32602),
        (ClientProtocolError("no method", code=-32601), 200, -32601),
        (UnknownTarget("Server 'x' not found"), 404, -32001),
        (UnknownTarget("no tool", code=-32602), 200, -32602),
        (UnknownTarget("no resource", code=-32002), 200, -32002),
        (Overloaded("full"), 503, -32000),
        (RateLimited("slow down"), 429, -32000),
        (Forbidden("no"), 403, -32003),
    ],
)
def test_H32_status_and_code_of_the_gateways_own_errors(error: GatewayError, status: int, code: int) -> None:
    got, text = failure(error, "tools/call", "1")
    found = json.loads(text)["error"]
    assert (got, found["code"], found["message"]) == (status, code, error.message)
    assert found["data"]["source"] == "gateway"


def test_a_reason_to_wait_is_told() -> None:
    text = failure(StartFailed("circuit open", retry_after=12.345), "prompts/get", "1")[1]
    assert json.loads(text)["error"]["data"]["retryAfter"] == 12.3


def test_topics() -> None:
    assert announce("tools") == ("notifications/tools/list_changed", "")
    assert announce("prompts") == ("notifications/prompts/list_changed", "")
    assert announce("resources") == ("notifications/resources/list_changed", "")
    assert announce('resource:file:///"x"') == ("notifications/resources/updated", '{"uri":"file:///\\"x\\""}')
    assert announce("state") is None
