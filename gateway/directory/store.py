"""The shelf on disk, so that a restarted gateway lists without starting anything.

One file for each definition of a server, named by a digest of it: an edited entry has another file, an entry of which
only limits, names or shaping were edited keeps its own. A file holds what the server said of itself and its lists;
nothing of the definition is in it, and since the digest is keyed by a random number of the folder's own, nothing of a
secret can be guessed from it. What is in a file is believed until the server has really started and says otherwise, so
a folder is read by its owner only, and files of others are not read.

Everything here blocks: call it from a thread, or before anybody is served.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs

from gateway.config.model import Secret, ServerSpec
from gateway.directory.listing import LISTS, Listing
from gateway.directory.shelf import Volume

try:  # as random does it in the standard library: hashlib would bring OpenSSL, 3 MB
    from _blake2 import blake2b
except ImportError:  # pragma: no cover
    from hashlib import blake2b

__all__ = ["Store", "state_folder"]

log = logging.getLogger("gateway_core")

FORMAT: Final = "open-mcp-gateway listing 1"
MAX_FILE: Final = 64 * 1024 * 1024
KEEP_DAYS: Final = 60
"""Days after which a file goes that nobody has used."""


def state_folder(configured: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Where state is kept: as configured, else systemd's folder, else that of the XDG Base Directory Specification.

    None without a home.
    """
    if configured is not None:
        return configured
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given.startswith("/"):
        return Path(given)
    base = environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base, "open-mcp-gateway")
    home = environ.get("HOME", "")
    return Path(home, ".local/state/open-mcp-gateway") if home.startswith("/") else None


class Store:
    """The files of one state folder. Whatever is wrong with one is a warning, said once; no OSError comes out.

    ``trouble`` is what was said last, "" when nothing was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "listings"
        self._key: bytes | None = None
        self._warned: set[Path] = set()
        self.trouble = ""

    def load(self, specs: Collection[ServerSpec], take: Callable[[ServerSpec, Volume], None]) -> None:
        """Hand over what is known of these servers."""
        key = self._read_key(create=False)
        if key is None:
            return
        for spec in specs:
            path = self.path(spec)
            volume = self._load(path)
            if volume is not None:
                with suppress(OSError):
                    os.utime(path)
                take(spec, volume)

    def path(self, spec: ServerSpec) -> Path:
        """The file of one server. The key must have been read."""
        assert self._key is not None
        return self.folder / f"{_digest(spec, self._key)}.json"

    def _load(self, path: Path) -> Volume | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(path, f"it can't be read: {error.strerror or error}")
            return None
        try:
            with open(descriptor, "rb") as file:
                about = os.fstat(descriptor)
                if not stat.S_ISREG(about.st_mode) or (hasattr(os, "geteuid") and about.st_uid != os.geteuid()):
                    raise ValueError("it is not a file of this user")
                if about.st_size > MAX_FILE:
                    raise ValueError(f"it is larger than {MAX_FILE} bytes")
                return _decoded(json.loads(file.read()))
        except (OSError, ValueError, RecursionError) as error:
            reason = "it is damaged" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
            self._warn(path, str(reason))
            return None

    def save(self, spec: ServerSpec, text: str) -> bool:
        """Put a server's file in place, at once or not at all; whether it is there. ``text`` is ``encoded`` from its
        volume.
        """
        if self._read_key(create=True) is None:
            return False
        path = self.path(spec)
        # Not by the process id: a container has the same at every start, and may have been killed while it wrote.
        new = path.with_name(f"{path.name}.{os.urandom(4).hex()}.new")
        try:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
            os.replace(new, path)
        except OSError as error:
            self._warn(self.folder, f"nothing can be written there: {error.strerror or error}")
            with suppress(OSError):
                new.unlink()
            return False
        return True

    def prune(self, now: float | None = None) -> None:
        """Delete what nobody has used for KEEP_DAYS, and what a gateway left behind that was killed while it wrote."""
        oldest = (time.time() if now is None else now) - KEEP_DAYS * 86400
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):
                    age = path.stat().st_mtime
                    if path.name != KEY_NAME and (age < oldest or (path.suffix == ".new" and age < oldest + LEFT)):
                        path.unlink()

    def _read_key(self, *, create: bool) -> bytes | None:
        if self._key is not None:
            return self._key
        path = self.folder / KEY_NAME
        try:
            if create and not path.exists():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                new = path.with_name(f"{KEY_NAME}.{os.getpid()}.new")
                with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    file.write(os.urandom(KEY_SIZE))
                try:
                    os.link(new, path)  # fails where another gateway was quicker: its key it is
                except FileExistsError:
                    pass
                finally:
                    new.unlink()
            key = path.read_bytes()
        except OSError as error:
            if create or not isinstance(error, FileNotFoundError):
                what = "nothing can be written there" if create else "it can't be read"
                self._warn(self.folder, f"{what}: {error.strerror or error}")
            return None
        if len(key) != KEY_SIZE:
            self._warn(path, "it is damaged; delete it")
            return None
        self._key = key
        return key

    def _warn(self, path: Path, reason: str) -> None:
        self.trouble = f"Lists kept in {path} are not used: {reason}"
        if path not in self._warned:
            self._warned.add(path)
            log.warning("%s", self.trouble)


KEY_NAME: Final = "key"
KEY_SIZE: Final = 32
LEFT: Final = (KEEP_DAYS - 1) * 86400


def encoded(volume: Volume) -> str:
    """A volume as the text of its file. In ASCII: a server may send lone surrogates, which have no UTF-8."""
    lists = {
        method: {"items": listing.items, "ttl_ms": listing.ttl_ms, "public": listing.public}
        for method, listing in volume.listings.items()
    }
    return json.dumps({"format": FORMAT, "facts": volume.facts, "lists": lists}, separators=(",", ":"))


def _decoded(content: Any) -> Volume:
    """The opposite. Raises ValueError for what no gateway of this kind has written."""
    if type(content) is not dict or content.get("format") != FORMAT:
        raise ValueError("it was written by another program or version")
    facts, lists = content.get("facts"), content.get("lists")
    if not (facts is None or type(facts) is dict) or type(lists) is not dict:
        raise ValueError("it is damaged")
    volume = Volume(facts)
    for method, kept in lists.items():
        items = kept.get("items") if type(kept) is dict else None
        if method not in LISTS or type(items) is not list or not all(type(item) is dict for item in items):
            raise ValueError("it is damaged")
        ttl, public = kept.get("ttl_ms"), kept.get("public")
        volume.listings[method] = Listing(method, tuple(items), ttl if type(ttl) is int else 0, public is True)
    return volume


def _digest(spec: ServerSpec, key: bytes) -> str:
    """What decides which lists a server has: how it is started, not what it is called or how it is limited."""
    definition = [spec.runtime_type, _plain(spec.runtime), _plain(spec.env), spec.inherit_env, spec.era]
    text = json.dumps(definition, sort_keys=True)
    return blake2b(text.encode(), digest_size=16, key=key).hexdigest()


def _plain(value: Any) -> Any:
    """A spec as JSON, its secrets included."""
    if isinstance(value, Secret):
        return value.value
    if attrs.has(type(value)):
        fields = [field.name for field in attrs.fields(type(value)) if field.init]
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
