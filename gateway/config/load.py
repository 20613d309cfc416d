"""config.yaml and catalog.yaml -> Settings and Catalog, with every mistake at once and its place (design.md section 9).

``nodes`` says what a file holds and where, ``structure`` makes frozen values of it, this module knows the two files.
Import it when a file is to be loaded and not before: it brings ruamel.yaml and cattrs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs

from gateway.config.model import (
    API_KEY_VARIABLE,
    Catalog,
    Secret,
    ServerSpec,
    Settings,
    StringMap,
    Tenant,
    parse_listen_addr,
    reveal,
)
from gateway.config.nodes import Document, Entry, Item, Mistakes, invented, read
from gateway.config.structure import Rules, make_converter, warn_unknown
from gateway.errors import ConfigError, Problem

__all__ = ["Loaded", "find_config", "load_catalog", "load_settings", "parse_listen_addr"]

T = TypeVar("T")

SYSTEM_CONFIGS: Final = (Path("/etc/mcp-gateway/config.yaml"), Path("/config/config.yaml"))
COMMAND_LINE: Final = "command line"


@attrs.frozen
class Loaded(Generic[T]):
    """What a file became. ``unset``: the variables it names and the environment lacks; ``digest``: of its bytes."""

    value: T
    warnings: tuple[Problem, ...] = ()
    unset: frozenset[str] = frozenset()
    digest: bytes = b""


# ---------------------------------------------------------------------------------------------------------- the config
def find_config(explicit: Path | None, cwd: Path, home: Path, system: Collection[Path] = SYSTEM_CONFIGS) -> Path | None:
    """The config file to use (compat G1, D9); None: there is none. Raises ConfigError if ``explicit`` is missing."""
    if explicit is not None:
        if not _exists(cwd / explicit):
            raise ConfigError([Problem("there is no such file", str(explicit))])
        return cwd / explicit
    places = (cwd / "config.yaml", home / ".config/mcp-gateway/config.yaml", *system)
    return next((path for path in places if _exists(path)), None)


def _exists(path: Path) -> bool:
    """Whether there is anything of that name; what may not be looked at is not there for us."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def load_settings(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Loaded[Settings]:
    """The config at ``path`` (None: the defaults), with ``overrides`` from the command line on top, None in them aside.

    ``catalog_path`` comes out usable: relative to the config's folder, or to the working directory where it comes from
    the command line (compat C5, G3). Blocks. Raises ConfigError with all problems.
    """
    document, root = read(path, environ, strict=True) if path is not None else (Document(COMMAND_LINE, environ), None)
    if root is None:
        root = invented(Entry(document), {})
    settings = _structure(root, Settings)
    overridden = _overridden(document, overrides or {})
    if settings is not None:
        if path is not None and "catalog_path" not in overridden:
            overridden["catalog_path"] = path.parent / _expanded(settings.catalog_path, environ)
        settings = attrs.evolve(settings, **overridden, variables=frozenset(root.entry.variables))
        settings = _with_api_key(settings, root, environ)
        _check_tenants(settings, root)
        _warn_if_exposed(settings, root, overridden)
    document.check()
    assert settings is not None
    return Loaded(settings, document.sorted_warnings(), digest=document.digest)


def _overridden(document: Document, overrides: Mapping[str, object]) -> dict[str, Any]:
    """The command line's values, under the same checks as the file's."""
    given = {name: str(value) for name, value in overrides.items() if value is not None}
    line = Document(COMMAND_LINE)
    settings = _structure(invented(Entry(line), given), Settings)
    document.problems.extend(line.problems)
    return {} if settings is None else {name: getattr(settings, name) for name in given}


def _expanded(path: Path, environ: Mapping[str, str]) -> Path:
    """``~`` is the HOME that the gateway was given."""
    if path.parts[:1] != ("~",) or "HOME" not in environ:
        return path
    return Path(environ["HOME"], *path.parts[1:])


def _with_api_key(settings: Settings, root: Item, environ: Mapping[str, str]) -> Settings:
    """Compat C14: the variable is the key where the config has none. A6: a key belongs in the environment."""
    if settings.api_key is not None:
        if isinstance(settings.api_key, str):
            advice = f'is written out; better keep it out of the file: api_key: "${{{API_KEY_VARIABLE}}}"'
            root.entry.document.warnings.append(root.at("api_key").problem(advice))
        return settings
    value = environ.get(API_KEY_VARIABLE)
    if value is None:
        return settings
    key = Secret(f"${{{API_KEY_VARIABLE}}}", value, ((API_KEY_VARIABLE, value),))
    try:
        _check_key(key)
    except ValueError as error:
        root.entry.document.problems.append(Problem(f"the environment variable {API_KEY_VARIABLE}: {error}"))
    return attrs.evolve(settings, api_key=key)


def _check_tenants(settings: Settings, root: Item) -> None:
    ids: set[str] = set()
    keys = {reveal(settings.api_key)} if settings.api_key is not None else set()
    document = root.entry.document
    for index, tenant in enumerate(settings.tenants):
        key = reveal(tenant.api_key)
        if tenant.id in ids:
            document.problems.append(root.at("tenants", index, "id").problem(f"duplicate tenant id: {tenant.id}"))
        if key in keys:
            document.problems.append(root.at("tenants", index, "api_key").problem("the same key is in use elsewhere"))
        if not tenant.namespaces:
            document.warnings.append(root.at("tenants", index).problem("no namespaces, so this tenant sees no server"))
        ids.add(tenant.id)
        keys.add(key)


def _warn_if_exposed(settings: Settings, root: Item, overridden: Collection[str]) -> None:
    """Compat G2: listening beyond this machine without a key is allowed, never by accident."""
    host, _ = parse_listen_addr(settings.listen_addr)
    if settings.api_key is not None or settings.tenants or _is_loopback(host):
        return
    text = f"listen_addr: {settings.listen_addr} can be reached from other machines, and without api_key by everybody"
    document = root.entry.document
    written = "listen_addr" not in overridden
    document.warnings.append(root.at("listen_addr").place(text) if written else Problem(text, COMMAND_LINE))


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --------------------------------------------------------------------------------------------------------- the catalog
@attrs.define(eq=False)
class _CatalogDocument(Document):
    """A catalog being read, with the classes of the runtimes' specs by ``type``."""

    spec_types: Mapping[str, type[Any]] = attrs.field(factory=dict, kw_only=True)


def load_catalog(path: Path, environ: Mapping[str, str], spec_types: Mapping[str, type[Any]]) -> Loaded[Catalog]:
    """The catalog at ``path``. ``spec_types`` are the runtimes' spec classes by every name that ``type`` may have.

    A server that names unset variables is loaded all the same and says so in ``ServerSpec.unset`` (compat G16).
    Blocks. Raises ConfigError with all problems.
    """
    plain, root = read(path, environ, strict=False)
    document = _CatalogDocument(plain.file, environ, strict=False, digest=plain.digest, spec_types=spec_types)
    servers: list[ServerSpec] = []
    variables: dict[str, frozenset[str]] = {}
    if root is not None:  # else all is commented out, which is a catalog of no servers
        _read_servers(attrs.evolve(root, entry=Entry(document)), servers, variables)
    document.check()
    unset = frozenset(name for spec in servers for name in spec.unset)
    return Loaded(Catalog(tuple(servers), path, variables), document.sorted_warnings(), unset, document.digest)


def _read_servers(root: Item, servers: list[ServerSpec], variables: dict[str, frozenset[str]]) -> None:
    document = root.entry.document
    try:
        top = root.members()
        warn_unknown(top, {"servers"})
        if "servers" not in top:
            raise root.mistake("missing required field: servers")
        items = [] if top["servers"].kind == "nothing" else top["servers"].elements()
    except Mistakes as mistakes:
        document.problems.extend(mistakes.problems)
        return
    seen: set[str] = set()
    for index, item in enumerate(items):
        item = attrs.evolve(item, entry=Entry(document, f"Server at index {index}"), path="")
        spec = _read_server(item, seen)
        if spec is not None:
            servers.append(spec)
            variables[spec.id] = frozenset(item.entry.variables)
        if document.hopeless:
            return


def _read_server(item: Item, seen: set[str]) -> ServerSpec | None:
    """One entry, None if it has problems; they and the warnings go to the document. ``seen`` are the ids before it."""
    entry = item.entry
    document = entry.document
    try:
        named = item.members(note=False).get("id")
        server_id = _CONVERTER.structure(named, str) if named is not None and named.kind == "text" else ""
    except Mistakes as mistakes:
        document.problems.extend(mistakes.problems)
        return None
    if named is not None and server_id:
        entry.name = f"Server '{server_id}'"
        if server_id in seen:
            document.problems.append(named.place(f"Duplicate server ID: {server_id}"))
        seen.add(server_id)
    spec = _structure(item, ServerSpec)
    if spec is None or named is None:
        return None
    if not TIDY_ID.fullmatch(server_id):
        document.warnings.append(named.problem("better lower-case letters, digits and single hyphens only"))
    for name in sorted(entry.unset):
        document.warnings.append(item.problem(f"the environment variable {name} is not set; the server can't start"))
    return attrs.evolve(spec, runtime_type=entry.runtime_type, unset=tuple(sorted(entry.unset)))


def _runtime(item: Item, _: Any = None) -> Any:
    """The ``runtime`` map: its ``type`` picks the class. The keys are named as if they stood in the entry itself."""
    entry = item.entry
    assert isinstance(entry.document, _CatalogDocument)
    written = item.members(note=False).get("type")
    if written is None or written.kind == "nothing":
        raise Mistakes((item.place(f"{entry.name} missing required field: type"),))
    entry.runtime_type = reveal(written.filled())
    spec_class = entry.document.spec_types.get(entry.runtime_type)
    if spec_class is None:
        # Only a variable may have emptied it; then there is no telling which runtime is meant.
        shown = entry.runtime_type or written.written
        raise Mistakes((written.place(f"{entry.name} has unknown runtime type: {shown}"),))
    return _CONVERTER.structure(attrs.evolve(item, path="", hidden=frozenset({"type"})), spec_class)


# ------------------------------------------------------------------------------------------------- what values must be
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
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.-]*")


def _check_id(value: str) -> None:
    """An id is a part of a URL's path, of tool names and of log lines."""
    if not value:
        raise ValueError("must not be empty")
    if len(value) > MAX_ID:
        raise ValueError(f"must not be longer than {MAX_ID} characters")
    if "/" in value or _CONTROL.search(value) or value in (".", ".."):
        raise ValueError("must not hold a / or a control character, nor be . or ..")


def _check_key(value: str | Secret | None) -> None:
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
    if value is not None and (len(value) > MAX_ID or not _PREFIX.fullmatch(value)):
        raise ValueError("only letters, digits, _ . and - belong in a tool's name")


def _check_plugins(value: tuple[str, ...]) -> None:
    for name in value:
        if not _PLUGIN.fullmatch(name):
            raise ValueError(f"expected module:NAME, got {name!r}")


def _check_filled(value: object) -> None:
    if not str(value) or value == Path():
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
    (Settings, "api_key"): _check_key,
    (Settings, "runtimes"): _check_plugins,
    (Tenant, "id"): _check_filled,
    (Tenant, "api_key"): _check_key,
    (ServerSpec, "id"): _check_id,
    (ServerSpec, "namespace"): _check_filled,
    (ServerSpec, "env"): _check_env,
    (ServerSpec, "prefix"): _check_prefix,
}
"""Of single keys. Numbers are checked by how their keys begin and end; spec classes check themselves."""


def _check_of(owner: type, name: str) -> Callable[[Any], object] | None:
    if owner in (Settings, ServerSpec):
        if name.endswith("_seconds"):
            return _check_seconds_above_zero if name in ABOVE_ZERO else _check_seconds
        if name.startswith("max_"):
            return _check_count
    return CHECKS.get((owner, name))


def _api_key(item: Item, _: Any = None) -> str | Secret | None:
    """Nothing after the colon is more likely a mistake than the wish to serve everybody."""
    if item.blank:
        raise item.mistake("must not be empty; leave it out, or write null, to serve everybody")
    return None if item.kind == "nothing" else item.filled()


def _misplaced(owner: type, name: str, item: Item) -> str:
    """What a key on the wrong side of ``runtime`` should have been."""
    document = item.entry.document
    if isinstance(document, _CatalogDocument):
        if owner is not ServerSpec and name in attrs.fields_dict(ServerSpec):
            return "; it belongs beside runtime, not into it"
        if owner is ServerSpec and any(name in attrs.fields_dict(spec) for spec in document.spec_types.values()):
            return "; it belongs into runtime"
    return ""


_CONVERTER: Final = make_converter(
    Rules({(Settings, "api_key"): _api_key, (ServerSpec, "runtime"): _runtime}, _check_of, _misplaced)
)


def _structure(item: Item, kind: type[T]) -> T | None:
    """The value, or None after its problems were added to the document's."""
    try:
        return _CONVERTER.structure(item, kind)
    except Mistakes as mistakes:
        item.entry.document.problems.extend(mistakes.problems)
        return None
