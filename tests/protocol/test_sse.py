"""The event-stream encoder and decoder: the standard's rules, and hostile streams (RB09-RB11, RB52)."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.sse import EDGE, KEEP_ALIVE, Decoder, Event, Oversize, encode


def decode(*pieces: bytes, limit: int = 1000) -> list[tuple[str, bytes, str]]:
    decoder = Decoder(limit)
    found = [item for piece in pieces for item in decoder.feed(piece)]
    assert all(type(item) is Event for item in found)
    return [(item.event, item.data, item.id) for item in found if type(item) is Event]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (b"data: x\n\n", [("message", b"x", "")]),
        (b"data:x\n\n", [("message", b"x", "")]),
        (b"data:  x\n\n", [("message", b" x", "")]),
        (b"data\n\n", [("message", b"", "")]),
        (b"data: a\ndata: b\n\n", [("message", b"a\nb", "")]),
        (b"event: endpoint\ndata: /post\n\n", [("endpoint", b"/post", "")]),
        (b"event: e\n\ndata: x\n\n", [("message", b"x", "")]),
        (b"id: 7\ndata: x\n\ndata: y\n\n", [("message", b"x", "7"), ("message", b"y", "7")]),
        (b"id: 7\ndata: x\n\nid\ndata: y\n\n", [("message", b"x", "7"), ("message", b"y", "")]),
        (b"id: a\0b\ndata: x\n\n", [("message", b"x", "")]),
        (b": comment\n\n:\n\ndata: x\n\n", [("message", b"x", "")]),
        (b"unknown: x\ndata: y\nDATA: z\n\n", [("message", b"y", "")]),
        (b"\xef\xbb\xbfdata: x\n\n", [("message", b"x", "")]),
        (b"data: x\n\n\xef\xbb\xbfdata: y\n\n", [("message", b"x", "")]),
        (b"data: x\r\rdata: y\r\n\r\n", [("message", b"x", ""), ("message", b"y", "")]),
        (b"data: z\n\r", [("message", b"z", "")]),
        (b"data: a\x0bb\x0cc\x85d\xe2\x80\xa8e\n\n", [("message", b"a\x0bb\x0cc\x85d\xe2\x80\xa8e", "")]),
        (b"data: cut off\n", []),
        (b"data: cut off", []),
        (b"\n\n\r\r\r\n\r\n", []),
    ],
)
def test_standard(text: bytes, events: list[tuple[str, bytes, str]]) -> None:
    assert decode(text) == events
    assert decode(*(text[i : i + 1] for i in range(len(text)))) == events


def test_priming_event_and_retry() -> None:
    decoder = Decoder(100)
    (event,) = decoder.feed(encode("", event="", id="s/1", retry=500))
    assert type(event) is Event and event.data == b""
    assert (decoder.last_event_id, decoder.retry) == ("s/1", 500)
    decoder.feed(b"retry: 1.5\nretry: -3\nretry: 99999999999999999999\nretry: \xc2\xb2\n\n")
    assert decoder.retry == 500
    decoder.feed(b"id: s/2\n\n")  # an id without data counts all the same
    assert decoder.last_event_id == "s/2"
    decoder.feed(b"id: " + b"x" * 5000 + b"\n\n")
    assert decoder.last_event_id == "s/2"
    assert Decoder(100, last_event_id="s/9").last_event_id == "s/9"


def test_encoder() -> None:
    assert encode('{"a":1}') == b'event: message\ndata: {"a":1}\n\n'
    assert encode("/post?s=1", event="endpoint") == b"event: endpoint\ndata: /post?s=1\n\n"
    assert encode('{\r\n"a":\r1\n}', event="", id="3", retry=1000) == b'id: 3\nretry: 1000\ndata: {  "a": 1 }\n\n'
    assert decode(KEEP_ALIVE + encode("ü") + KEEP_ALIVE) == [("message", "ü".encode(), "")]


lines = st.sampled_from(
    [b"data: {}", b"data:x", b"data", b"", b"event: e", b"id: 1", b"id", b": c", b"retry: 5", b"x", b"\xef\xbb\xbf"]
)
ends = st.sampled_from([b"\n", b"\r", b"\r\n"])


def reference(text: bytes) -> list[tuple[str, bytes, str]]:
    """Section 9.2.6, word for word and all at once."""
    text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found, data, event, id = [], b"", "", ""
    for line in text.split(b"\n")[:-1]:
        if not line:
            if data:
                found.append((event or "message", data[:-1], id))
            data, event = b"", ""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data += value + b"\n"
        elif name == b"event":
            event = value.decode()
        elif name == b"id":
            id = value.decode()
    return found


@given(st.lists(st.tuples(lines, ends)), st.lists(st.integers(1, 9)))
def test_RB10_fragmentation_changes_nothing(parts: list[tuple[bytes, bytes]], sizes: list[int]) -> None:
    text = b"".join(line + end for line, end in parts)
    if text.endswith(b"\r"):
        text += b"\n"  # whether a lone CR at the end is half a CRLF only the next byte tells
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    pieces.append(text[at:])
    assert decode(*pieces) == reference(text)


@given(st.binary(max_size=300), st.integers(1, 40))
def test_RB10_never_raises(text: bytes, size: int) -> None:
    decoder = Decoder(50)
    for at in range(0, len(text), size):
        decoder.feed(text[at : at + size])


def test_RB09_an_event_over_the_limit_is_never_held_and_names_its_ends() -> None:
    decoder = Decoder(100_000)
    tracemalloc.start()
    assert decoder.feed(b'event: message\ndata: {"id":7,') == []
    for _ in range(2000):
        assert decoder.feed(b"x" * 10_000) == []
    assert decoder.overflowing
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
    (found,) = decoder.feed(b',"id":8}\n\n')
    assert type(found) is Oversize
    assert b'"id":7' in found.head and b'"id":8' in found.tail
    assert len(found.head) <= EDGE and len(found.tail) <= EDGE
    assert not decoder.overflowing
    (good,) = decoder.feed(b"data: next\n\n")
    assert type(good) is Event and good.data == b"next" and good.event == "message"


def test_RB09_many_small_lines_count_together() -> None:
    decoder = Decoder(1000)
    found = [item for _ in range(500) for item in decoder.feed(b"data: 12345678\n")]
    assert found == [] and decoder.overflowing
    assert [type(item) for item in decoder.feed(b"\ndata: y\n\n")] == [Oversize, Event]


def test_RB09_an_event_of_exactly_the_limit_passes() -> None:
    assert decode(b"data: " + b"x" * 1000 + b"\n\n", limit=1000) == [("message", b"x" * 1000, "")]
    assert [type(item) for item in Decoder(1000).feed(b"data: " + b"x" * 1100 + b"\n\n")] == [Oversize]


def test_RB52_endless_comment_and_endless_field_lines_are_not_kept() -> None:
    decoder = Decoder(1_000_000)
    tracemalloc.start()
    decoder.feed(b":")
    for _ in range(3000):
        decoder.feed(b"x" * 10_000)
    assert not decoder.overflowing
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert [item.data for item in decoder.feed(b"\ndata: y\n\n") if type(item) is Event] == [b"y"]


def test_RB10_time_is_linear_in_the_bytes() -> None:
    def cost(size: int) -> float:
        started = time.process_time()
        decoder = Decoder(10_000_000)
        decoder.feed(b"data: ")
        for _ in range(size):
            decoder.feed(b"xy")
        assert len(decoder.feed(b"\n\n")) == 1
        return time.process_time() - started

    small = min(cost(20_000) for _ in range(3))
    assert min(cost(160_000) for _ in range(2)) < small * 8 * 4 + 0.1
