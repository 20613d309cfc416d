"""Notices that files have changed, by asking: works on bind mounts, NFS and ConfigMaps alike (compat W11).

Four times a second each path is looked at. What counts is what ``open`` would find, symbolic links followed, so a
rename over the file and a swapped link in its path are changes of the inode; no folder needs to be watched. The file is
read only when its stat is new or its last change so recent that another one could hide in the same time stamp, and a
change is a change of its bytes. Everything that touches the disk runs in a thread: a dead network disk stalls this task
and nothing else.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import BinaryIO, Final

import attrs
import trio

from gateway.config.digest import digest_of

__all__ = ["watch"]

log = logging.getLogger("catalog_watcher")

MAX_WAIT: Final = 5.0
"""Seconds after which a file that does not stop changing is loaded as it is."""
COARSE: Final = 3.0
"""Seconds within which a second change may leave the same time stamp (FAT has two)."""
SILENCE: Final = 60.0
"""Seconds between two reports of trouble."""
CHUNK: Final = 256 * 1024
MAX_READ: Final = 16 * 1024 * 1024
"""More than a loader accepts; what comes after it changes nothing."""


@attrs.frozen
class _Look:
    """A path at one time: its stat (None: there is no file) and the digest of its bytes, or why there is none."""

    mark: tuple[int, ...] | None
    digest: bytes


async def watch(
    paths: Callable[[], Sequence[Path]],
    on_change: Callable[[], Awaitable[None]],
    *,
    interval: float = 0.25,
    debounce: float = 0.5,
    loaded: Callable[[], Mapping[Path, bytes]] | None = None,
) -> None:
    """Call ``on_change`` when files have changed and ``debounce`` seconds have passed since they last did (compat W1).

    Runs until cancelled. ``paths`` is asked at every look. A file that has gone or can't be read is a change like
    another, and so is its return: ``on_change`` finds out what is wrong, reports it once and keeps what it has
    (robustness RB30). ``on_change`` is never called while it runs; what it raises is logged.

    ``loaded`` gives the digests (``load.Loaded.digest``) of what is in use. With it a change between the load and the
    first look is noticed, and what was meanwhile loaded by other means is not loaded again.
    """
    limiter = trio.CapacityLimiter(1)
    seen: dict[Path, _Look] = {}
    tried: dict[Path, bytes] | None = None
    """What is in use or was refused: as long as the files are like this there is nothing to do."""
    in_use: Mapping[Path, bytes] | None = None
    first_change = last_change = 0.0
    pending = False
    silent_until = -inf
    while True:
        try:
            wanted = tuple(paths())
            looks = await trio.to_thread.run_sync(_look, wanted, seen, limiter=limiter, abandon_on_cancel=True)
            found = {path: look.digest for path, look in looks.items()}
            if loaded is not None and (now_in_use := dict(loaded())) != in_use:
                in_use = now_in_use
                tried = {path: in_use.get(path, digest) for path, digest in found.items()}
            if tried is None:
                tried = dict(found)
            if loaded is None:
                tried = {path: tried.get(path, digest) for path, digest in found.items()}
            now = trio.current_time()
            if any(path not in seen or seen[path].digest != look.digest for path, look in looks.items()):
                last_change = now
            seen = looks
            if found == tried:
                pending = False
            elif not pending:
                pending = True
                first_change = last_change = now
                log.info("Catalog file changed, scheduling reload...")
            if pending and (now - last_change >= debounce or now - first_change >= MAX_WAIT):
                pending = False
                tried = found
                await on_change()
        except Exception as error:
            # The watcher outlives whatever it meets: a fault in a reload, no memory for a thread. It meets it again at
            # every look, so it says so once a minute.
            if (now := trio.current_time()) >= silent_until:
                silent_until = now + SILENCE
                log.error("Looking for changed files failed: %r; trying on", error, exc_info=True)
        await trio.sleep(interval)


def _look(paths: Sequence[Path], seen: Mapping[Path, _Look]) -> dict[Path, _Look]:
    return {path: _look_at(path, seen.get(path)) for path in paths}


def _look_at(path: Path, before: _Look | None) -> _Look:
    try:
        status = os.stat(path)
        mark = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe would take its bytes from the loader; a folder has none.
            return _Look(mark, b"not a file")
        if before is not None and before.mark == mark and abs(time.time() - status.st_mtime) > COARSE:
            return before
        return _Look(mark, _digest(path))
    except (OSError, ValueError) as error:
        return _Look(None, type(error).__name__.encode())


def _digest(path: Path) -> bytes:
    """As ``load`` makes it of files that it accepts."""
    with open(path, "rb", buffering=0) as file:
        return digest_of(_chunks(file))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    left = MAX_READ
    while left > 0 and (chunk := file.read(CHUNK)):
        yield chunk
        left -= len(chunk)
