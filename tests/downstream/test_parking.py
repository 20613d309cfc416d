"""Sealed states and the table of parked calls."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Settings
from gateway.config.snapshot import Snapshot
from gateway.downstream.parking import Binding, Parked, ParkingLot, Sealer
from gateway.errors import ClientProtocolError, Overloaded
from gateway.exchange import Ask, Call, Client, Exchange, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_reply, decode_request

ANN, BOB = Principal("ann"), Principal("bob")


def request(method: str = "tools/call", **params: Any) -> Message:
    params = params or {"name": "x", "arguments": {"a": 1}}
    return decode_request(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))


class Link:
    """Takes a call's cancellation."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def cancel(self, call: Call, reason: str = "") -> None:
        self.cancelled.append(reason)


def call_at(link: Link) -> Call:
    exchange = Exchange(request(), ANN, Snapshot(), Client("m", Era.MODERN, "2026-07-28"), "s", 30)
    return Call(exchange, link, 1, 0)  # type: ignore[arg-type]


def question(method: str = "elicitation/create") -> tuple[Ask, list[Any]]:
    answers: list[Any] = []
    message = decode_request(json.dumps({"jsonrpc": "2.0", "id": 9, "method": method, "params": {}}))
    return Ask(message, lambda text: answers.append(json.loads(text))), answers


BINDING = Binding.of(ANN, "s", request())


def test_a_state_is_opened_by_any_of_the_keys_and_signed_by_the_first() -> None:
    old, new = Sealer([b"1" * 32]), Sealer([b"2" * 32, b"1" * 32])
    assert new.open(old.seal({"a": 1})) == {"a": 1}
    with pytest.raises(ClientProtocolError):
        old.open(new.seal({"a": 1}))


def test_every_change_of_a_state_is_seen() -> None:
    sealer = Sealer()
    sealed = sealer.seal({"a": 1, "b": "text"})
    assert sealed.isascii()
    assert sealed.isprintable()
    text, _, mac = sealed.partition(".")
    forged = base64.urlsafe_b64encode(b'{"a":2}').decode().rstrip("=")
    others = [sealed[:n] + ("A" if sealed[n] != "A" else "B") + sealed[n + 1 :] for n in range(len(sealed))]
    for bad in (*others, "", ".", text, f"{forged}.{mac}", sealed + "A", f"{text}.", "\u00e9.x", sealed.upper()):
        with pytest.raises(ClientProtocolError) as caught:
            sealer.open(bad)
        assert caught.value.code == -32602
        assert "start the call again" in caught.value.message


@pytest.mark.parametrize(
    "other",
    [
        Binding.of(BOB, "s", request()),
        Binding.of(ANN, "t", request()),
        Binding.of(ANN, None, request()),
        Binding.of(ANN, "s", request("prompts/get", name="x", arguments={"a": 1})),
        Binding.of(ANN, "s", request(name="y", arguments={"a": 1})),
        Binding.of(ANN, "s", request(name="x", arguments={"a": 2})),
        Binding.of(ANN, "s", request(name="x")),
    ],
)
async def test_RB83_a_state_is_for_its_own_caller_and_call(other: Binding) -> None:
    lot = ParkingLot(Settings)
    for sealed in (lot.relay("theirs", BINDING), lot.park(call_at(Link()), {}, ANN, BINDING)):
        with pytest.raises(ClientProtocolError, match="belongs to another call"):
            lot.take(sealed, other)
    assert len(lot) == 1


async def test_the_hops_own_members_are_no_arguments() -> None:
    same = request(name="x", arguments={"a": 1}, _meta={"k": 1}, inputResponses={}, requestState="s")
    assert Binding.of(ANN, "s", same) == BINDING
    assert Binding.of(ANN, "s", request(arguments={"a": 1}, name="x")) == BINDING  # in whatever order


async def test_a_parked_call_is_taken_once() -> None:
    lot = ParkingLot(Settings)
    call = call_at(Link())
    sealed = lot.park(call, {}, ANN, BINDING)
    assert call.deadline == float("inf")
    found = lot.take(sealed, BINDING)
    assert isinstance(found, Parked)
    assert found.call is call
    with pytest.raises(ClientProtocolError, match="used already"):
        lot.take(sealed, BINDING)


def test_a_modern_servers_state_is_held_by_nobody() -> None:
    now = [1000.0]
    lot = ParkingLot(Settings, clock=lambda: now[0])
    state = 'st"ate \ud800'
    sealed = lot.relay(state, BINDING)
    assert len(lot) == 0
    assert [lot.take(sealed, BINDING), lot.take(sealed, BINDING)] == [state, state]
    now[0] += 3601
    with pytest.raises(ClientProtocolError, match="expired"):
        lot.take(sealed, BINDING)


async def test_another_gateways_states_are_refused() -> None:
    one, other = ParkingLot(Settings), ParkingLot(Settings)
    for sealed in (one.relay("s", BINDING), one.park(call_at(Link()), {}, ANN, BINDING)):
        with pytest.raises(ClientProtocolError, match="none of ours"):
            other.take(sealed, BINDING)


async def test_with_the_same_keys_only_what_nobody_holds_can_be_taken_elsewhere() -> None:
    sealer = Sealer([b"1" * 32])
    one, other = ParkingLot(Settings, sealer), ParkingLot(Settings, sealer)
    assert other.take(one.relay("theirs", BINDING), BINDING) == "theirs"
    with pytest.raises(ClientProtocolError, match="restarted"):
        other.take(one.park(call_at(Link()), {}, ANN, BINDING), BINDING)


async def test_who_does_not_come_back_is_given_up(autojump_clock: MockClock) -> None:
    lot = ParkingLot(lambda: Settings(park_timeout_seconds=300))
    link = Link()
    questions = {method: question(method) for method in ("elicitation/create", "sampling/createMessage", "roots/list")}
    sealed = lot.park(call_at(link), {key: ask for key, (ask, _) in questions.items()}, ANN, BINDING)
    await trio.sleep(299)
    lot.sweep(trio.current_time())
    assert link.cancelled == []
    await trio.sleep(1)
    lot.sweep(trio.current_time())
    assert len(link.cancelled) == 1
    answers = {method: found[0] for method, (_, found) in questions.items()}
    assert answers["elicitation/create"]["result"] == {"action": "cancel"}
    assert answers["sampling/createMessage"]["error"]["code"] == -1
    assert answers["roots/list"]["error"]["code"] == -32601
    with pytest.raises(ClientProtocolError, match="expired"):
        lot.take(sealed, BINDING)


async def test_questions_that_came_while_nobody_was_there_are_declined_too() -> None:
    lot = ParkingLot(Settings)
    call = call_at(Link())
    lot.park(call, {}, ANN, BINDING)
    ask, answers = question()
    call.deliver(ask)
    lot.clear()
    assert [answer["result"] for answer in answers] == [{"action": "cancel"}]


async def test_a_call_that_ended_meanwhile_still_has_its_reply() -> None:
    lot = ParkingLot(Settings)
    for replied in (True, False):
        call = call_at(Link())
        sealed = lot.park(call, {}, ANN, BINDING)
        if replied:
            call.finish(Reply(decode_reply('{"jsonrpc":"2.0","id":1,"result":{}}')))
            lot.sweep(0)
            assert isinstance(lot.take(sealed, BINDING), Parked)
        else:
            call.end()
            with pytest.raises(ClientProtocolError, match="ended meanwhile"):
                lot.take(sealed, BINDING)


async def test_P8_parked_calls_are_bounded_in_all_and_for_each_principal() -> None:
    lot = ParkingLot(lambda: Settings(max_parked=8))
    for _ in range(2):
        lot.park(call_at(Link()), {}, ANN, BINDING)
    with pytest.raises(Overloaded, match="max_parked is 8"):
        lot.park(call_at(Link()), {}, ANN, BINDING)
    for n in range(6):
        lot.park(call_at(Link()), {}, Principal(f"p{n}"), BINDING)
    with pytest.raises(Overloaded):
        lot.park(call_at(Link()), {}, ANONYMOUS, BINDING)
    lot.clear()
    assert len(lot) == 0
