"""config.yaml and catalog.yaml -> Settings and Catalog, with every mistake at once and its place (design.md section 9).

``nodes`` says what a file holds and where, ``structure`` makes frozen values of it, this module knows the two files.
Import it when a file is to be loaded and not before: it brings ruamel.yaml and cattrs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs

from gateway.config.checks import TIDY_ID, check_key, check_of
from gateway.config.model import (
    API_KEY_VARIABLE,
    Annotations,
    Catalog,
    Secret,
    ServerSpec,
    Settings,
    Shaping,
    ViewSpec,
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

    ``catalog_path`` and ``state_dir`` come out usable: relative to the config's folder, or to the working directory
    where they come from the command line (compat C5, G3). Blocks. Raises ConfigError with all problems.
    """
    document, root = read(path, environ, strict=True) if path is not None else (Document(COMMAND_LINE, environ), None)
    if root is None:
        root = invented(Entry(document), {})
    settings = _structure(root, Settings)
    overridden = _overridden(document, overrides or {})
    if settings is not None:
        for key in ("catalog_path", "state_dir"):
            written: Path | None = getattr(settings, key)
            if path is not None and written is not None and key not in overridden:
                overridden[key] = path.parent / _expanded(written, environ)
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
        check_key(key)
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
    views: list[ViewSpec] = []
    variables: dict[str, frozenset[str]] = {}
    if root is not None:  # else all is commented out, which is a catalog of no servers
        top = _top_of(attrs.evolve(root, entry=Entry(document)))
        _read_servers(top.get("servers", []), document, servers, variables)
        _read_views(top.get("views", []), document, views)
        _warn_of_empty_selections(top.get("views", []), views, servers)
    document.check()
    unset = frozenset(name for spec in servers for name in spec.unset)
    catalog = Catalog(tuple(servers), path, variables, tuple(views))
    return Loaded(catalog, document.sorted_warnings(), unset, document.digest)


def _top_of(root: Item) -> dict[str, list[Item]]:
    """The entries of each list of a catalog. Problems go to the document."""
    problems = root.entry.document.problems
    try:
        top = root.members()
        warn_unknown(top, {"servers", "views"})
        if "servers" not in top:
            problems.append(root.problem("missing required field: servers"))
    except Mistakes as mistakes:
        problems.extend(mistakes.problems)
        return {}
    found: dict[str, list[Item]] = {}
    for key in ("servers", "views"):
        try:
            found[key] = top[key].elements() if key in top and top[key].kind != "nothing" else []
        except Mistakes as mistakes:
            problems.extend(mistakes.problems)
    return found


def _read_servers(
    items: list[Item], document: Document, servers: list[ServerSpec], variables: dict[str, frozenset[str]]
) -> None:
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


def _read_views(items: list[Item], document: Document, views: list[ViewSpec]) -> None:
    seen: set[str] = set()
    for index, item in enumerate(items):
        entry = Entry(document, f"View at index {index}")
        item = attrs.evolve(item, entry=entry, path="")
        try:
            named = item.members(note=False).get("name")
            name = _CONVERTER.structure(named, str) if named is not None and named.kind == "text" else ""
        except Mistakes as mistakes:
            document.problems.extend(mistakes.problems)
            continue
        if named is not None and name:
            entry.name = f"View '{name}'"
            if name in seen:
                document.problems.append(named.place(f"Duplicate view name: {name}"))
            seen.add(name)
        view = _structure(item, ViewSpec)
        # Half a pattern could show what must be hidden; a server can wait for its variable, a view can't.
        for variable in sorted(entry.unset):
            document.problems.append(item.problem(f"the environment variable {variable} is not set"))
        if view is not None:
            views.append(view)
        if document.hopeless:
            return


def _warn_of_empty_selections(items: list[Item], views: list[ViewSpec], servers: list[ServerSpec]) -> None:
    """A pattern that selects nothing is more likely a typing error than a wish."""
    ids, tags = [spec.id for spec in servers], {tag for spec in servers for tag in spec.tags}
    if len(views) != len(items):
        return  # there are problems, which come first
    for item, view in zip(items, views, strict=True):
        item = attrs.evolve(item, entry=Entry(item.entry.document, f"View '{view.name}'"), path="")
        warnings = item.entry.document.warnings
        for key in ("servers", "exclude"):
            for index, pattern in enumerate(getattr(view, key)):
                if not any(fnmatchcase(id, pattern) for id in ids):
                    warnings.append(item.at(key, index).problem(f"no server has an id like {pattern!r}"))
        for index, tag in enumerate(view.tags):
            if tag not in tags:
                warnings.append(item.at("tags", index).problem(f"no server has the tag {tag!r}"))


def _annotate(item: Item, _: Any = None) -> tuple[tuple[str, Annotations], ...]:
    """A map of patterns to hints."""
    found: list[tuple[str, Annotations]] = []
    problems: list[Problem] = []
    for pattern, hints in item.members().items():
        try:
            found.append((pattern, _CONVERTER.structure(hints, Annotations)))
        except Mistakes as mistakes:
            problems.extend(mistakes.problems)
    if problems:
        raise Mistakes(problems)
    return tuple(sorted(found, key=lambda pair: pair[0]))


def _allow(item: Item, _: Any = None) -> tuple[str, ...] | None:
    """Nothing after the colon could mean all or nothing."""
    if item.blank:
        raise item.mistake("must not be empty; write [] to show nothing, or leave it out to show all")
    if item.kind == "nothing":
        return None
    patterns: tuple[str, ...] = _CONVERTER.structure(item, tuple[str, ...])
    return patterns


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


# ------------------------------------------------------------------------------------- keys with rules of their own
def _api_key(item: Item, _: Any = None) -> str | Secret | None:
    """Nothing after the colon is more likely a mistake than the wish to serve everybody."""
    if item.blank:
        raise item.mistake("must not be empty; leave it out, or write null, to serve everybody")
    return None if item.kind == "nothing" else item.filled()


def _misplaced(owner: type, name: str, item: Item) -> str:
    """What a key on the wrong side of ``runtime`` should have been."""
    document = item.entry.document
    if isinstance(document, _CatalogDocument):
        if owner in document.spec_types.values() and name in attrs.fields_dict(ServerSpec):
            return "; it belongs beside runtime, not into it"
        if owner is ServerSpec and any(name in attrs.fields_dict(spec) for spec in document.spec_types.values()):
            return "; it belongs into runtime"
    return ""


_CONVERTER: Final = make_converter(
    Rules(
        {
            (Settings, "api_key"): _api_key,
            (ServerSpec, "runtime"): _runtime,
            (Shaping, "allow"): _allow,
            (Shaping, "annotate"): _annotate,
        },
        check_of,
        _misplaced,
    )
)


def _structure(item: Item, kind: type[T]) -> T | None:
    """The value, or None after its problems were added to the document's."""
    try:
        return _CONVERTER.structure(item, kind)
    except Mistakes as mistakes:
        item.entry.document.problems.extend(mistakes.problems)
        return None
