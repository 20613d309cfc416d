"""What of this machine a container may see (compat K19, robustness RB65). Looks at paths, opens and changes nothing.

Whoever writes a catalog entry must not get hold of the machine by it: an engine's socket starts anything as root, /etc
and the key folders of homes hold what opens everything else. So a path is resolved first, symbolic links and all, and
is refused if it is such a place, lies in one or contains one. ``docker.allowed_paths`` decides instead where it is set:
what lies at or below one of its paths is allowed, and nothing else is.

Named volumes are the engine's own storage and hold nothing of the machine, unless they were made with driver options:
those may mean any path, so such a volume counts as the path (see ``device_of``).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

__all__ = ["Mount", "device_of", "parse_mount", "refusal", "resolved"]

TREES: Final = ("/proc", "/sys", "/dev", "/etc", "/root", "/boot")
ENGINES: Final = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet")
"""The engines' own storage: every container's files are in it."""
SOCKETS: Final = (
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/crio/crio.sock",
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
)
KEYS: Final = (
    ".ssh",
    ".aws",
    ".azure",
    ".gnupg",
    ".kube",
    ".docker",
    ".password-store",
    ".netrc",
    ".git-credentials",
    ".npmrc",
    ".pypirc",
    ".config/gcloud",
    ".config/gh",
    ".config/containers",
    ".local/share/containers",
    ".local/share/keyrings",
    "Library/Keychains",
)
"""Of homes: keys, and what logs in elsewhere."""

_VOLUME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@attrs.frozen
class Mount:
    """One entry of ``volumes``: a path of this machine or the name of a volume, and where it is in the container."""

    source: str
    target: str
    read_only: bool
    options: str = ""
    """SELinux relabelling, "z" or "Z"."""

    @property
    def named(self) -> bool:
        """Whether the source is a volume of the engine."""
        return _VOLUME.fullmatch(self.source) is not None


def parse_mount(text: str) -> Mount:
    """``host:container[:ro]``. Raises ValueError with a sentence that fits behind ``volumes: ``."""
    source, _, rest = text.partition(":")
    target, _, options = rest.partition(":")
    if not source or not target or "\0" in text:
        raise ValueError(f"{text[:80]!r} is not host:container or host:container:ro")
    if not (source.startswith(("/", "./", "../", "~/")) or source in (".", "..", "~") or _VOLUME.fullmatch(source)):
        raise ValueError(f"{source[:80]!r} is neither a path (/..., ./..., ~/...) nor the name of a volume")
    if not target.startswith("/") or ".." in target.split("/") or target.rstrip("/") == "":
        raise ValueError(f"{target[:80]!r} must be an absolute path in the container, other than /")
    chosen = options.split(",") if options else []
    if not set(chosen) <= {"ro", "rw", "z", "Z"} or len(set(chosen)) != len(chosen) or {"ro", "rw"} <= set(chosen):
        raise ValueError(f"{options[:40]!r} is none of the options ro, rw, z and Z")
    return Mount(source, target, "ro" in chosen, "Z" if "Z" in chosen else "z" if "z" in chosen else "")


def resolved(source: str, folder: Path, home: str) -> str:
    """The real path that a mount's source means. Relative ones are relative to ``folder``, the catalog's.

    Raises ValueError where the gateway may not see where a link leads: an engine may.
    """
    if source == "~" or source.startswith("~/"):
        source = home + source[1:]
    try:
        return os.path.realpath(os.path.join(folder, source))
    except OSError as error:
        raise ValueError(f"{source} can't be looked at: {(error.strerror or str(error)).lower()}") from None


def refusal(path: str, allowed: Sequence[str] | None, sockets: Iterable[str], environ: Mapping[str, str]) -> str:
    """Why a resolved path must not be mounted, as a clause; "" if it may be.

    ``allowed`` is ``docker.allowed_paths``, ``sockets`` where engines are known to listen, beside the usual places.
    """
    home = environ.get("HOME", "")
    if allowed is not None:
        if any(_within(path, _real(each, home)) for each in allowed):
            return ""
        return "docker.allowed_paths names neither it nor a folder above it"
    for place, what in _forbidden(sockets, home):
        if _within(path, place) or _within(place, path):
            shown = place if place == path or _within(path, place) else f"{place} is in it"
            return f"that is {what} ({shown})"
    parts = path.casefold().split("/")
    for key in KEYS:
        wanted = key.casefold().split("/")
        if any(parts[at : at + len(wanted)] == wanted for at in range(len(parts))):
            return f"{key} is a place for keys"
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            return "it is a socket"
    except (OSError, ValueError):
        pass
    return ""


def _real(path: str, home: str = "") -> str:
    """A path that is compared with: as it is written where it can't be resolved."""
    try:
        return resolved(path, Path("/"), home)
    except ValueError:
        return path


def _forbidden(sockets: Iterable[str], home: str) -> Iterable[tuple[str, str]]:
    for tree in TREES:
        yield tree, "the machine's own"
        yield _real(tree), "the machine's own"
    for folder in ENGINES:
        yield folder, "a container engine's storage"
    for socket in (*SOCKETS, *sockets):
        yield _real(socket), "a door to the machine"
    for each in _homes(home):
        for key in KEYS:
            yield os.path.join(each, key), "a home's place for keys"


def _homes(home: str) -> list[str]:
    found = [_real(home)] if home.startswith("/") else []
    for parent in ("/home", "/Users"):
        try:
            found += [os.path.join(parent, name) for name in os.listdir(parent)[:1000]]
        except OSError:
            continue
    return found


def _within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it. Not case-sensitive: neither are all file systems."""
    path, folder = path.casefold(), folder.casefold()
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def device_of(volume: Mapping[str, Any]) -> str | None:
    """What an existing volume (GET /volumes/NAME) really is: "" for plain storage, else the place that it leads to.

    None where that can't be told: another driver, or options without a device.
    """
    if volume.get("Driver") not in ("local", None):
        return None
    options = volume.get("Options") or {}
    if not options:
        return ""
    device = options.get("device")
    kind, how = str(options.get("type", "")), str(options.get("o", ""))
    if kind == "tmpfs":
        return ""
    return device if isinstance(device, str) and ("bind" in how.split(",") or kind in ("", "none")) else None
