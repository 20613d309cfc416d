"""Which gateways have run here, and where the dead ones may have left something (robustness P7, RB62).

Every gateway that makes something outside this machine's process tree keeps a file named by its instance id, and a lock
on it for as long as it lives. A file without a lock was left by a gateway that is dead; its lines name where to look:

    docker unix:///var/run/docker.sock

The file goes when nothing can be left: at a clean end, or when a later gateway has swept what it names. Gateways with
other state folders have other files, so nobody ever sweeps what a living neighbour or a stranger has made.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

__all__ = ["Instances", "Left"]

log = logging.getLogger("gateway_core")

FOLDER: Final = "instances"
_ID: Final = re.compile(r"[0-9a-f]{32}")
MAX_SIZE: Final = 64 * 1024
"""Bytes of a file that are looked at: a few hundred places."""

Left = tuple[str, tuple[tuple[str, str], ...]]
"""A dead gateway: its instance id, and the runtime type and place of all that it may have left."""


class Instances:
    """Implements ``base.Instance`` for this process. Blocks on the disk for a moment; not for several threads at once.

    ``state`` None, or a folder that can't be written: nothing is kept, which is said once when it matters.
    """

    def __init__(self, state: Path | None) -> None:
        self.id = uuid4().hex
        self._folder = None if state is None else state / FOLDER
        self._fd = -1
        self._used: set[tuple[str, str]] = set()
        self._clean = True

    def __repr__(self) -> str:
        return f"<Instances {self.id} {self._folder}>"

    def uses(self, type: str, where: str) -> None:
        """See ``base.Instance``."""
        if (type, where) in self._used:
            return
        self._used.add((type, where))
        assert "\n" not in where and " " not in type
        try:
            if self._folder is None:
                raise FileNotFoundError("there is no state folder")
            if self._fd < 0:
                self._fd = self._create(self._folder)
            os.write(self._fd, f"{type} {where}\n".encode())
            os.fsync(self._fd)
        except OSError as error:
            text = "Can't keep track of what runs outside (%s): if the gateway is killed, it stays: %s %s"
            log.warning(text, error.strerror or error, type, where)

    def leaves(self) -> None:
        """See ``base.Instance``."""
        self._clean = False

    def dead(self, id: str) -> bool:
        """See ``base.Instance``. Of gateways that have kept their files here only."""
        if self._folder is None or not _ID.fullmatch(id):
            return False
        try:
            fd = os.open(self._folder / id, os.O_RDWR)
        except OSError:
            return False
        try:
            return _lock(fd)
        finally:
            os.close(fd)

    def _create(self, folder: Path) -> int:
        """A file of our own, which is never seen without its lock."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = folder / f".{self.id}"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            if not _lock(fd):
                raise OSError("its file can't be locked")
            new.rename(folder / self.id)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            os.close(fd)
            raise
        return fd

    def left(self) -> list[str]:
        """The instance ids of gateways that may be dead. Reads the folder only."""
        if self._folder is None:
            return []
        try:
            return sorted(name for name in os.listdir(self._folder) if name != self.id and not name.startswith("."))
        except OSError:
            return []

    @contextmanager
    def taken(self, id: str) -> Iterator[Left | None]:
        """What a dead gateway may have left, held for as long as the block lasts: None if it lives, or is being swept.

        When the block ends well, the gateway is forgotten.
        """
        assert self._folder is not None
        path = self._folder / id
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            yield None
            return
        try:
            if not _lock(fd):
                yield None
                return
            lines = os.read(fd, MAX_SIZE).decode("utf-8", "replace").splitlines()
            pairs = (line.partition(" ") for line in lines)
            yield id, tuple((type, where) for type, _, where in pairs if where)
            with suppress(OSError):
                path.unlink()
        finally:
            os.close(fd)

    async def aclose(self) -> None:
        """The end of this gateway, when all its servers are stopped."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._clean and self._folder is not None:
                with suppress(OSError):
                    (self._folder / self.id).unlink()
            os.close(fd)


def _lock(fd: int) -> bool:
    """Whether this process has the file's lock now. Where there are no such locks, nobody is taken for dead."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
