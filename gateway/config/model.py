"""The frozen values that a config and a catalog become. No I/O, no YAML, no environment.

A YAML key is the attribute of the same name, its default stands here, its meaning in the README's reference.
Everything is immutable and hashable: a ``ServerSpec`` is the key of the unit that runs it (design.md section 7), so
two equal definitions are one unit and an edited one is another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import attrs

__all__ = [
    "API_KEY_VARIABLE",
    "Annotations",
    "Catalog",
    "DockerSettings",
    "EraChoice",
    "Isolation",
    "LogLevel",
    "Redactor",
    "Secret",
    "ServerSpec",
    "Settings",
    "Shaping",
    "StringMap",
    "Tenant",
    "Text",
    "ViewMode",
    "ViewSpec",
    "parse_listen_addr",
    "reveal",
    "secrets_of",
    "server_environment",
]

Isolation = Literal["shared", "session", "tenant", "principal", "call"]
EraChoice = Literal["auto", "legacy", "modern"]
ViewMode = Literal["list", "search"]
LogLevel = Literal["trace", "debug", "info", "warn", "error"]

API_KEY_VARIABLE: Final = "MCP_GATEWAY_API_KEY"
"""Is ``api_key`` where the config has none (compat C14); no server inherits it (K5)."""

NOT_YAML: Final = {"yaml": False}
"""Metadata of fields that the loader fills in; the file can't."""


@attrs.frozen(repr=False, str=False)
class Secret:
    """A string that came out of ``${}``: compares by value, shows only the template it was written as.

    ``parts`` are the variables in it with their values, so that a text that quotes only one of them is redacted too.
    """

    template: str = attrs.field(eq=False)
    value: str
    parts: tuple[tuple[str, str], ...] = attrs.field(default=(), eq=False)

    def __repr__(self) -> str:
        return f"Secret({self.template!r})"

    __str__ = __repr__


Text = str | Secret


def reveal(text: Text) -> str:
    """The real string. Call it where the value leaves the gateway, never where something is shown."""
    return text.value if isinstance(text, Secret) else text


@attrs.frozen
class StringMap:
    """A YAML map of strings, kept as sorted pairs so that it hashes."""

    items: tuple[tuple[str, Text], ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Text]]:
        return iter(self.items)

    def revealed(self) -> dict[str, str]:
        """Names and real values."""
        return {name: reveal(value) for name, value in self.items}

    def shown(self) -> dict[str, str]:
        """Names and what people may see: literals, and templates where a value came from ``${}``."""
        return {name: value.template if isinstance(value, Secret) else value for name, value in self.items}


@attrs.frozen
class Tenant:
    """Who a key belongs to, and which catalog namespaces it may see (compat G13)."""

    id: str
    api_key: Text
    namespaces: tuple[str, ...] = ()


@attrs.frozen
class Annotations:
    """Hints that replace a server's own ("Tool Annotations" and "Annotations" of the specification); None keeps them.

    The first five are for tools, ``audience`` and ``priority`` (0 to 1) for resources.
    """

    title: str | None = None
    read_only: bool | None = None
    destructive: bool | None = None
    idempotent: bool | None = None
    open_world: bool | None = None
    audience: tuple[Literal["user", "assistant"], ...] | None = None
    priority: float | None = None


@attrs.frozen
class Shaping:
    """What clients see of a server's tools, prompts or resources, and as what.

    allow     patterns of what is shown; None shows all
    deny      patterns of what is not shown, whatever ``allow`` says
    rename    name -> the name clients see (a resource keeps its URI and gets another ``name``)
    describe  pattern -> the description clients see
    annotate  pattern -> hints that replace the server's (tools and resources)

    Patterns are shell-style (``*``, ``?``, ``[a-z]``), case-sensitive, and match whole names; of resources the URI, of
    resource templates the URI template. Of several that match, names go before wildcards and long ones before short. An
    entry's shaping meets the server's own names, a view's those of the view.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    rename: StringMap = StringMap()
    describe: StringMap = StringMap()
    annotate: tuple[tuple[str, Annotations], ...] = ()


@attrs.frozen
class ViewSpec:
    """A named selection of the catalog's servers, with an endpoint of its own.

    servers   ids or patterns of ids; a server with one of ``tags`` is in it, too. Without both: every server
    exclude   ids or patterns of ids of servers that are not in it
    prefix    what stands before names, ``{id}`` being the server's id; None for each server's own prefix
    mode      "list" lists what the servers have, "search" three tools that find and call them
    """

    name: str
    description: str = ""
    servers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    prefix: str | None = None
    mode: ViewMode = "list"
    tools: Shaping = Shaping()
    prompts: Shaping = Shaping()
    resources: Shaping = Shaping()


@attrs.frozen(cache_hash=True)
class ServerSpec:
    """One entry of the catalog. ``runtime`` is a runtime's own spec; None for an override means the config's value.

    ``runtime_type`` is the ``type`` as it was written. With ``unset`` variables the entry is shown but must not be
    started: what they are part of is empty, or only something of the right type (compat G16).

    What only clients see of it (``presentation``) does not count when entries are compared: an entry of which nothing
    else was edited keeps its server running.
    """

    id: str
    runtime: Any
    runtime_type: str = attrs.field(default="", metadata=NOT_YAML)
    display_name: str = ""
    description: str = ""
    env: StringMap = StringMap()
    inherit_env: bool = True
    tags: tuple[str, ...] = ()
    namespace: str = "default"
    isolation: Isolation = "shared"
    era: EraChoice = "auto"
    prefix: str | None = attrs.field(default=None, eq=False)
    tools: Shaping = attrs.field(default=Shaping(), eq=False)
    prompts: Shaping = attrs.field(default=Shaping(), eq=False)
    resources: Shaping = attrs.field(default=Shaping(), eq=False)
    idle_timeout_seconds: float | None = None
    request_timeout_seconds: float | None = None
    start_timeout_seconds: float | None = None
    stop_grace_seconds: float | None = None
    max_connections_per_server: int | None = None
    max_units_per_server: int | None = None
    max_message_bytes: int | None = None
    health_check_interval_seconds: float | None = None
    unset: tuple[str, ...] = attrs.field(default=(), metadata=NOT_YAML)
    shaped: bool = attrs.field(init=False, default=False, eq=False, repr=False)
    """Whether clients see anything of it otherwise than the server has it, prefixes aside."""

    def __attrs_post_init__(self) -> None:
        shaped = any(shaping != Shaping() for shaping in (self.tools, self.prompts, self.resources))
        object.__setattr__(self, "shaped", shaped)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.display_name or self.id

    @property
    def presentation(self) -> tuple[object, ...]:
        """What clients see of it and its process does not know of."""
        return self.prefix, self.tools, self.prompts, self.resources

    def or_default(self, key: str, settings: Settings) -> Any:
        """This entry's value of an overridable key, else the config's."""
        own = getattr(self, key)
        return getattr(settings, key) if own is None else own


@attrs.frozen
class DockerSettings:
    """What the config says about containers, for all entries (compat K19).

    allowed_paths  the folders and files of this machine that entries may mount, with what is below them; None: all but
                   those that would hand over the machine
    """

    allowed_paths: tuple[str, ...] | None = None


@attrs.frozen
class Settings:
    """config.yaml. Times are in seconds, sizes in bytes; 0 switches a timeout off where the README says so."""

    listen_addr: str = "127.0.0.1:4444"
    catalog_path: Path = Path("catalog.yaml")
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    api_key: Text | None = None
    tenants: tuple[Tenant, ...] = ()
    cors_enabled: bool = True
    cors_origins: tuple[str, ...] = ("*",)
    allowed_hosts: tuple[str, ...] | None = None
    hot_reload: bool = True
    idle_timeout_seconds: float = 300
    health_check_interval_seconds: float = 30
    max_connections_per_server: int = 10
    request_timeout_seconds: float = 30
    start_timeout_seconds: float = 60
    stop_grace_seconds: float = 10
    drain_timeout_seconds: float = 30
    session_idle_seconds: float = 1800
    max_sessions: int = 10_000
    park_timeout_seconds: float = 300
    max_parked: int = 1000
    max_units: int = 500
    max_units_per_server: int = 100
    max_parallel_starts: int = 8
    max_body_bytes: int = 4 * 1024 * 1024
    max_message_bytes: int = 16 * 1024 * 1024
    max_connections: int = 4096
    tool_name_limit: int = 48
    list_timeout_seconds: float = 10
    list_page_size: int = 1000
    state_dir: Path | None = None
    runtimes: tuple[str, ...] = ()
    docker: DockerSettings = DockerSettings()
    variables: frozenset[str] = attrs.field(default=frozenset(), metadata=NOT_YAML)
    """The variables that the config names in ``${}``."""


@attrs.frozen
class Catalog:
    """The servers and views in the order of the file. ``variables`` are the names in ``${}`` by server id.

    They are not part of the specs: a server that is told the same under another name has not changed (compat W5).
    """

    servers: tuple[ServerSpec, ...] = ()
    path: Path = Path("catalog.yaml")
    variables: Mapping[str, frozenset[str]] = attrs.field(factory=dict, eq=False)
    views: tuple[ViewSpec, ...] = ()
    by_id: Mapping[str, ServerSpec] = attrs.field(init=False, eq=False, repr=False)
    view_by_name: Mapping[str, ViewSpec] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "by_id", {s.id: s for s in self.servers})
        object.__setattr__(self, "view_by_name", {v.name: v for v in self.views})


# ----------------------------------------------------------------------------------------------- what a server inherits
ALWAYS_INHERITED: Final = ("PATH", "HOME", "LANG", "TMPDIR", "USER")


def server_environment(
    spec: ServerSpec, catalog: Catalog, settings_variables: Collection[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """The complete environment of one server's process (compat K5).

    It inherits ``environ`` less the gateway's key and less every variable that the config (``settings_variables``, see
    Settings.variables) or another entry names in ``${}``, as those are others' secrets. ALWAYS_INHERITED is none, even
    if somebody writes ``${HOME}``; it is all that comes through with ``inherit_env: false``. The entry's own ``env``
    goes on top and so brings anything back.
    """
    if spec.inherit_env:
        hidden = {API_KEY_VARIABLE, *settings_variables}
        for server_id, names in catalog.variables.items():
            if server_id != spec.id:
                hidden |= names
        hidden.difference_update(ALWAYS_INHERITED)
        inherited = {name: value for name, value in environ.items() if name not in hidden}
    else:
        inherited = {name: environ[name] for name in ALWAYS_INHERITED if name in environ}
    return inherited | spec.env.revealed()


# ------------------------------------------------------------------------------------------------------------ redaction
class Redactor:
    """Puts templates where the values of secrets stand in a text that people will read.

    Values shorter than 4 characters are left alone: they are everywhere, and hiding them would hide the text.
    """

    SHORTEST: Final = 4
    SHORTEST_LINE: Final = 8

    def __init__(self, secrets: Collection[Secret]) -> None:
        self._shown: dict[str, str] = {}
        for secret in secrets:
            self._hide(secret.value, secret.template)
        for name, value in {part for secret in secrets for part in secret.parts}:
            self._hide(value, f"${{{name}}}")
        # The longest first, so that a value which contains another one is replaced as a whole.
        values = sorted(self._shown, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, values))) if values else None

    def _hide(self, value: str, template: str) -> None:
        if len(value) >= self.SHORTEST:
            self._shown[value] = template
        lines = value.splitlines()
        if len(lines) > 1:  # a key in PEM, which shows up line by line
            for line in lines:
                if len(line) >= self.SHORTEST_LINE:
                    self._shown.setdefault(line, template)

    def redact(self, text: str) -> str:
        """The text with every known secret replaced by the template it was written as."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: self._shown[found.group()], text)


def secrets_of(*values: Any) -> Redactor:
    """All secrets inside the given Settings, Catalogs, ServerSpecs or parts of them."""
    found: dict[int, Secret] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Secret):
            found[id(value)] = value
        elif isinstance(value, tuple | list | frozenset):
            waiting.extend(value)
        elif attrs.has(type(value)):
            waiting.extend(getattr(value, field.name) for field in attrs.fields(type(value)) if field.init)
    return Redactor(list(found.values()))


# ---------------------------------------------------------------------------------------------------------- addresses
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def parse_listen_addr(text: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:4444", "[::1]:4444", "name:4444" or ":4444" (every IPv4 address, as "0.0.0.0").

    Port 0 lets the system choose. Raises ValueError with a sentence that fits after the key's name.
    """
    host, colon, digits = text.rpartition(":")
    if not colon:
        raise ValueError('expected HOST:PORT, such as "127.0.0.1:4444"')
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535):
        raise ValueError("the port must be a number from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        import ipaddress  # late: only the few who write IPv6 need it here

        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(digits)
        except ValueError:
            raise ValueError("there is no IPv6 address between the brackets") from None
    if ":" in host:
        raise ValueError('write an IPv6 address in brackets, such as "[::1]:4444"')
    if host and not _HOST.fullmatch(host):
        raise ValueError("the host is neither a name nor an address")
    return host or "0.0.0.0", int(digits)
