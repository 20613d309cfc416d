"""Newline frames: whole lines from any fragmentation, bounded memory (RB09, RB10)."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.framing import EDGE, LineDecoder, Oversize


def test_lines_of_one_chunk_and_a_rest() -> None:
    decoder = LineDecoder(100)
    assert decoder.feed(b'{"a":1}\n{"b":2}\r\n\n{"c"') == [b'{"a":1}', b'{"b":2}', b""]
    assert decoder.feed(b":3}\n") == [b'{"c":3}']
    assert decoder.finish() == []
    assert decoder.feed(b"last") == []
    assert decoder.finish() == [b"last"]


@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b and not b.endswith(b"\r"))), st.data())
def test_RB10_any_fragmentation_gives_the_same_lines(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    decoder = LineDecoder(1000)
    found: list[bytes | Oversize] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == lines


def test_RB09_an_oversized_line_is_never_held_whole_and_the_next_one_is_read() -> None:
    for chunk in (1000, 100_000, 10**7):
        decoder = LineDecoder(50_000)
        line = b"HEAD" + b"x" * 3_000_000 + b"TAIL"
        stream = line + b"\nok\n"
        found: list[bytes | Oversize] = []
        for at in range(0, len(stream), chunk):
            found += decoder.feed(stream[at : at + chunk])
            assert len(decoder._begun) <= 50_000 + chunk
        over, good = found
        assert isinstance(over, Oversize)
        assert (over.size, len(over.head), len(over.tail)) == (len(line), EDGE, EDGE)
        assert over.head.startswith(b"HEAD")
        assert over.tail.endswith(b"TAIL")
        assert good == b"ok"


def test_the_ceiling_counts_the_line_without_its_newline() -> None:
    assert LineDecoder(5).feed(b"12345\n") == [b"12345"]
    (over,) = LineDecoder(5).feed(b"123456\n")
    assert isinstance(over, Oversize)
    assert over.head == over.tail == b"123456"


def test_RB10_tiny_fragments_take_linear_time() -> None:
    def cost(size: int) -> float:
        decoder = LineDecoder(1 << 24)
        begin = time.process_time()
        for _ in range(size):
            decoder.feed(b"x")
        return time.process_time() - begin

    small = min(cost(20_000) for _ in range(3))
    assert min(cost(200_000) for _ in range(2)) < small * 10 * 4
