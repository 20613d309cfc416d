"""What values of single keys must be, beyond their types. Each check raises ValueError with a sentence that fits behind
its key; where that stands is load's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from gateway.config.model import (
    Annotations,
    Secret,
    ServerSpec,
    Settings,
    Shaping,
    StringMap,
    Tenant,
    ViewSpec,
    parse_listen_addr,
    reveal,
)

__all__ = ["TIDY_ID", "check_key", "check_of"]

TIDY_ID: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
MAX_ID: Final = 128
MAX_SECONDS: Final = 1_000_000_000
ABOVE_ZERO: Final = {
    "request_timeout_seconds",
    "start_timeout_seconds",
    "session_idle_seconds",
    "park_timeout_seconds",
}
"""Times without a meaning for 0. Of the others, 0 is never, off, or at once."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_PLUGIN: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NAME_PART: Final = re.compile(r"[A-Za-z0-9_.-]*")
_VIEW: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _check_id(value: str) -> None:
    """An id is a part of a URL's path, of tool names and of log lines."""
    if not value:
        raise ValueError("must not be empty")
    if len(value) > MAX_ID:
        raise ValueError(f"must not be longer than {MAX_ID} characters")
    if "/" in value or _CONTROL.search(value) or value in (".", ".."):
        raise ValueError("must not hold a / or a control character, nor be . or ..")


def check_key(value: str | Secret | None) -> None:
    if value is None:
        return
    text = reveal(value)
    if not text:
        raise ValueError("must not be empty; leave it out to serve everybody")
    if not _PRINTABLE.fullmatch(text):
        raise ValueError("can't be sent in a header: only printable ASCII, no white space at its ends (a newline?)")


def _check_env(value: StringMap) -> None:
    for name, _ in value:
        if not name or "=" in name:
            raise ValueError(f"{name!r} can't be the name of a variable")


def _check_prefix(value: str | None) -> None:
    if value is not None and (len(value) > MAX_ID or not _NAME_PART.fullmatch(value)):
        raise ValueError("only letters, digits, _ . and - belong in a tool's name")


def _check_view_name(value: str) -> None:
    """A view's name is a part of a URL's path."""
    if not _VIEW.fullmatch(value):
        raise ValueError("1 to 64 letters, digits, _ and - make the name of a view")


def _check_view_prefix(value: str | None) -> None:
    if value is not None and (len(value) > MAX_ID or not _NAME_PART.fullmatch(value.replace("{id}", ""))):
        raise ValueError("only letters, digits, _ . and - belong in a tool's name, and {id} for the server's id")


def _check_patterns(value: tuple[str, ...] | None) -> None:
    if value is not None and "" in value:
        raise ValueError("a pattern must not be empty; * matches all")


def _check_priority(value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError("must be a number from 0 to 1")


def _check_name_limit(value: int) -> None:
    if not 16 <= value <= 128:
        raise ValueError("must be from 16 to 128")


def _check_names(value: Shaping) -> None:
    """Of tools and prompts, which are called by their names."""
    for name, shown in value.rename:
        new = reveal(shown)
        if "*" in name or "?" in name:
            raise ValueError(f"rename takes names, not patterns such as {name!r}")
        if not 1 <= len(new) <= MAX_ID or not _NAME_PART.fullmatch(new):
            raise ValueError(f"rename of {name!r}: 1 to {MAX_ID} letters, digits, _ . and - make a name")
    new_names = [reveal(shown) for _, shown in value.rename]
    for new in new_names:
        if new_names.count(new) > 1:
            raise ValueError(f"rename gives the name {new!r} twice")


def _check_tools(value: Shaping) -> None:
    _check_names(value)
    _check_hints(value, "tools", ("audience", "priority"))


def _check_prompts(value: Shaping) -> None:
    _check_names(value)
    if value.annotate:
        raise ValueError("prompts have no annotations")


def _check_resources(value: Shaping) -> None:
    if any(not reveal(shown) for _, shown in value.rename):
        raise ValueError("rename: a name must not be empty")
    _check_hints(value, "resources", ("title", "read_only", "destructive", "idempotent", "open_world"))


def _check_hints(value: Shaping, kind: str, others: Collection[str]) -> None:
    for pattern, hints in value.annotate:
        for key in others:
            if getattr(hints, key) is not None:
                raise ValueError(f"annotate of {pattern!r}: {kind} have no {key}")


def _check_plugins(value: tuple[str, ...]) -> None:
    for name in value:
        if not _PLUGIN.fullmatch(name):
            raise ValueError(f"expected module:NAME, got {name!r}")


def _check_filled(value: object) -> None:
    """None is a value that is left out."""
    if value is not None and (not str(value) or value == Path()):
        raise ValueError("must not be empty")


def _check_seconds(value: float | None) -> None:
    if value is not None and not 0 <= value <= MAX_SECONDS:
        raise ValueError("must not be negative" if value < 0 else f"must not be above {MAX_SECONDS}")


def _check_seconds_above_zero(value: float | None) -> None:
    _check_seconds(value)
    if value == 0:
        raise ValueError("must be above 0")


def _check_count(value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError("must be at least 1")


CHECKS: Final[Mapping[tuple[type, str], Callable[[Any], object]]] = {
    (Settings, "listen_addr"): parse_listen_addr,
    (Settings, "catalog_path"): _check_filled,
    (Settings, "api_key"): check_key,
    (Settings, "runtimes"): _check_plugins,
    (Settings, "state_dir"): _check_filled,
    (Settings, "tool_name_limit"): _check_name_limit,
    (Settings, "list_page_size"): _check_count,
    (Tenant, "id"): _check_filled,
    (Tenant, "api_key"): check_key,
    (ServerSpec, "id"): _check_id,
    (ServerSpec, "namespace"): _check_filled,
    (ServerSpec, "env"): _check_env,
    (ServerSpec, "prefix"): _check_prefix,
    (ViewSpec, "name"): _check_view_name,
    (ViewSpec, "prefix"): _check_view_prefix,
    **{(ViewSpec, key): _check_patterns for key in ("servers", "tags", "exclude")},
    **{(Shaping, key): _check_patterns for key in ("allow", "deny")},
    (Annotations, "priority"): _check_priority,
    **{(owner, "tools"): _check_tools for owner in (ServerSpec, ViewSpec)},
    **{(owner, "prompts"): _check_prompts for owner in (ServerSpec, ViewSpec)},
    **{(owner, "resources"): _check_resources for owner in (ServerSpec, ViewSpec)},
}
"""Of single keys. Numbers are checked by how their keys begin and end; spec classes check themselves."""


def check_of(owner: type, name: str) -> Callable[[Any], object] | None:
    if owner in (Settings, ServerSpec):
        if name.endswith("_seconds"):
            return _check_seconds_above_zero if name in ABOVE_ZERO else _check_seconds
        if name.startswith("max_"):
            return _check_count
    return CHECKS.get((owner, name))
