"""Telling two contents of a file apart, by checksums: what is compared is only ever one's own file with its past.

hashlib would do it too, and bring OpenSSL with it: 3 MB, for programs that otherwise need none (issue 2, A14).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

__all__ = ["digest_of"]


def digest_of(chunks: Iterable[bytes]) -> bytes:
    """A digest of the chunks joined: their length and two 32-bit checksums of different kinds."""
    size, crc, adler = 0, 0, 1
    for chunk in chunks:
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
        adler = zlib.adler32(chunk, adler)
    return b"%d-%08x-%08x" % (size, crc, adler)
