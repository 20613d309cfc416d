"""Calls: parked tasks, bounded boxes, ends that are told exactly once (design sections 4 and 12)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from gateway.errors import LinkLost
from gateway.exchange import MAX_BOX, SLOW, Ask, Call, Interim, Reply, internal_exchange
from gateway.protocol.message import decode_reply, decode_request


class FakeLink:
    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def cancel(self, call: Call, reason: str = "") -> None:
        self.cancelled.append(reason)


def make(ends: list[Call] | None = None) -> tuple[Call, Any]:
    link: Any = FakeLink()
    exchange = internal_exchange("tools/call", "{}", 10.0)
    exchange.on_end = None if ends is None else ends.append
    return Call(exchange, link, 1, 0.0), link


REPLY = Reply.result('{"a":1}')


async def test_events_arrive_in_order_waiting_or_not() -> None:
    call, _ = make()
    call.deliver(Interim("1"))
    call.finish(REPLY)
    assert isinstance(first := await call.next(), Interim)
    assert first.text == "1"
    assert await call.next() is REPLY

    call, _ = make()
    seen = []

    async def consume() -> None:
        while not seen or seen[-1] is not REPLY:
            seen.append(await call.next())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await trio.testing.wait_all_tasks_blocked()
        call.tell_slow()
        call.tell_slow()
        await trio.testing.wait_all_tasks_blocked()
        call.deliver(Interim("2"))
        call.deliver(Interim("3"))
        await trio.testing.wait_all_tasks_blocked()
        call.finish(REPLY)
    assert [e.text if isinstance(e, Interim) else e for e in seen] == [SLOW, "2", "3", REPLY]


async def test_end_is_told_once_however_it_ends() -> None:
    ends: list[Call] = []
    call, link = make(ends)
    call.finish(REPLY)
    call.finish(REPLY)
    call.fail(LinkLost("late"))
    call.cancel("late")
    assert (ends, link.cancelled, call.failed) == ([call], [], False)
    call, link = make(ends)
    call.cancel("enough")
    call.cancel("enough")
    assert (len(ends), link.cancelled) == (2, ["enough"])
    call, _ = make(ends)
    call.fail(LinkLost("gone"))
    assert (len(ends), call.failed) == (3, True)
    with pytest.raises(LinkLost, match="gone"):
        await call.next()


async def test_RB09_a_full_box_drops_progress_but_no_question_and_no_reply() -> None:
    call, _ = make()
    for n in range(MAX_BOX + 50):
        call.deliver(Interim(str(n)))
    ask = Ask(decode_reply('{"jsonrpc":"2.0","id":1,"method":"roots/list"}'), lambda text: None)
    call.deliver(ask)
    call.finish(REPLY)
    events = [await call.next() for _ in range(MAX_BOX + 2)]
    assert events[-2:] == [ask, REPLY]
    assert isinstance(last := events[MAX_BOX - 1], Interim)
    assert last.text == str(MAX_BOX - 1)


async def test_cancelled_consumer_leaves_the_call_usable(autojump_clock: trio.testing.MockClock) -> None:
    call, _ = make()
    with trio.move_on_after(1):
        await call.next()
    call.finish(REPLY)
    assert await call.next() is REPLY


def test_an_ask_is_answered_at_most_once_with_the_servers_id() -> None:
    sent: list[str] = []
    ask = Ask(decode_reply('{"jsonrpc":"2.0","id":"s-1","method":"roots/list"}'), sent.append)
    ask.answer(decode_request('{"jsonrpc":"2.0","id":44,"result":{"roots":[]}}'))
    ask.refuse(-1, "late")
    assert sent == ['{"jsonrpc":"2.0","id":"s-1","result":{"roots":[]}}']
    assert not ask.open
    ask = Ask(ask.message, sent.append)
    reasons: list[str] = []
    ask.on_withdrawn = reasons.append
    ask.withdraw("gone")
    ask.answer(decode_request('{"jsonrpc":"2.0","id":44,"result":{}}'))
    assert (reasons, len(sent)) == (["gone"], 1)


def test_replies_of_our_own_take_any_id() -> None:
    assert Reply.result('{"x":0}').text('"0"') == '{"jsonrpc":"2.0","id":"0","result":{"x":0}}'
    assert Reply.error(-1, "no", {"a": 1}).text("null") == (
        '{"jsonrpc":"2.0","id":null,"error":{"code":-1,"message":"no","data":{"a":1}}}'
    )
