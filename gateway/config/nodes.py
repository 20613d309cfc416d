"""YAML files as nodes that know their place, and ``${VAR}`` in their texts. What the nodes mean is ``load``'s affair.

A file is hostile until shown otherwise: its size, its depth and the nodes that its aliases unfold to are bounded, tags
make nothing, and a value filled in from the environment is a text for ever, whatever it looks like (robustness RB33).
Nodes are unfolded only where somebody asks for them, so nothing inside an ignored key can do harm.

YAML 1.2 as ruamel reads it: ``no`` and ``on`` are texts, ``<<`` merges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from gateway.config.digest import digest_of
from gateway.config.model import Secret
from gateway.errors import ConfigError, Problem

__all__ = ["Document", "Entry", "Item", "Mistakes", "invented", "read"]

MAX_BYTES: Final = 4 * 1024 * 1024
"""About 15,000 servers, or 12 seconds of reading; hundreds are usual (compat N6)."""
MAX_DEPTH: Final = 64
MAX_NODES: Final = 200_000
"""Nodes looked at, each as often as aliases name it."""
MAX_MERGES: Final = 16
"""How deep ``<<`` may nest."""
MAX_PROBLEMS: Final = 100
MAX_TEXT: Final = 500
"""Characters of one problem."""

CORE: Final = "tag:yaml.org,2002:"
KINDS: Final = {
    "str": "text",
    "timestamp": "text",  # nothing here is a date, so one that is not quoted is what it looks like
    "value": "text",
    "merge": "text",
    "null": "nothing",
    "bool": "bool",
    "int": "int",
    "float": "float",
}
NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
UNUSABLE: Final = re.compile("[\0\ud800-\udfff]")


class Mistakes(Exception):
    """What is wrong with a node, or with several inside it. Ends the making of the value, not the search for more."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


@attrs.define(eq=False)
class Document:
    """One file being read: what ``${}`` may draw from, what was found wrong so far, how much more may be unfolded.

    ``strict`` makes an unset variable a mistake; otherwise it is noted in the Entry.
    """

    file: str
    environ: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    strict: bool = True
    digest: bytes = b""
    problems: list[Problem] = attrs.field(factory=list)
    warnings: list[Problem] = attrs.field(factory=list)
    unfolded: int = 0

    @property
    def hopeless(self) -> bool:
        """Whether looking on is no use: nobody reads that many problems, or the file is a bomb."""
        return len(self.problems) >= MAX_PROBLEMS or self.unfolded > MAX_NODES

    def check(self) -> None:
        """Raise ConfigError with all problems, in the order of the file, if there are any."""
        if self.problems:
            found = sorted(dict.fromkeys(self.problems), key=lambda p: (p.line, p.column))
            if len(found) > MAX_PROBLEMS:
                found[MAX_PROBLEMS:] = [Problem(f"and {len(found) - MAX_PROBLEMS} more problems", self.file)]
            raise ConfigError(found)

    def sorted_warnings(self) -> tuple[Problem, ...]:
        """In the order of the file."""
        return tuple(sorted(self.warnings, key=lambda p: (p.line, p.column)))


@attrs.define(eq=False)
class Entry:
    """A definition in the file, such as one server: how problems call it, and the variables that it names."""

    document: Document
    name: str = ""
    variables: set[str] = attrs.field(factory=set)
    unset: set[str] = attrs.field(factory=set)
    runtime_type: str = ""


@attrs.frozen(eq=False)
class Item:
    """A node with its place, its path inside its Entry ("args[0]"; "" for the entry itself), and what is hidden in it.

    ``hidden`` members were taken care of elsewhere: they are neither known nor unknown.
    """

    node: Any
    entry: Entry = attrs.field(repr=False)
    path: str = ""
    key_node: Any = attrs.field(default=None, repr=False)
    hidden: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """map, list, text, int, float, bool, nothing, or tag for a node with a tag of its own."""
        tag = self.node.tag or ""
        name = tag[len(CORE) :] if tag.startswith(CORE) else ""
        if isinstance(self.node, MappingNode):
            return "map" if name == "map" else "tag"
        if isinstance(self.node, SequenceNode):
            return "list" if name == "seq" else "tag"
        return KINDS.get(name, "tag")

    @property
    def written(self) -> str:
        """A scalar as it stands in the file, without quotes."""
        return str(self.node.value)

    @property
    def blank(self) -> bool:
        """Whether nothing at all is written, not even ``null``."""
        return isinstance(self.node, ScalarNode) and self.kind == "nothing" and not self.node.value

    def describe(self) -> str:
        """What it is, for people, without showing a value that may be a secret."""
        match self.kind:
            case "map" | "list" as kind:
                return f"a {kind}"
            case "int" | "float":
                return "a number"
            case "bool":
                return self.written
            case "tag":
                return f"the tag {self.node.tag}"
            case kind:
                return kind

    def problem(self, text: str, *, at_key: bool = False) -> Problem:
        """``text`` with the names of the entry and of the key before it."""
        subject = ": ".join(filter(None, (self.entry.name, self.path)))
        return self.place(f"{subject}: {text}" if subject else text, at_key=at_key)

    def place(self, text: str, *, at_key: bool = False) -> Problem:
        """``text`` as it is, with this node's place. What a terminal or a log would trip over is escaped."""
        if not text.isprintable():
            text = text.encode("unicode_escape").decode("ascii")
        if len(text) > MAX_TEXT:
            text = f"{text[:MAX_TEXT]}..."
        node = self.key_node if self.key_node is not None and (at_key or self.blank) else self.node
        mark = node.start_mark
        if mark is None:  # invented
            return Problem(text, self.entry.document.file)
        return Problem(text, self.entry.document.file, mark.line + 1, mark.column + 1)

    def mistake(self, text: str) -> Mistakes:
        """To be raised."""
        return Mistakes((self.problem(text),))

    # ---------------------------------------------------------------------------------------------------- what is in it
    def members(self, *, note: bool = True) -> dict[str, Item]:
        """The members of a map by name, merged ones first. Raises Mistakes if this is no map.

        Problems with keys go to the document if ``note`` says so; the rest of the map is good all the same.
        """
        problems: list[Problem] = []
        found = {name: item for name, item in self._members(problems, 0).items() if name not in self.hidden}
        if note:
            self.entry.document.problems.extend(problems)
        return found

    def _members(self, problems: list[Problem], merges: int) -> dict[str, Item]:
        if self.kind != "map":
            raise self.mistake(f"expected a map, got {self.describe()}")
        if merges > MAX_MERGES:
            raise self.mistake("<< is nested too deeply")
        own: dict[str, Item] = {}
        merged: dict[str, Item] = {}
        for key, value in self.node.value:
            named = Item(key, self.entry, self.path)
            item = self._child(value, "", key)
            if key.tag == CORE + "merge":
                bases = item.elements() if item.kind == "list" else [item]
                for base in bases:
                    merged = base._members(problems, merges + 1) | merged
            elif named.kind in ("map", "list", "tag", "nothing"):
                problems.append(named.problem(f"a key must be text, not {named.describe()}"))
            elif UNUSABLE.search(named.written):
                problems.append(named.problem("a key holds a character that no text may hold"))
            elif named.written in own:
                problems.append(named.problem(f"duplicate key: {named.written}"))
            else:
                path = f"{self.path}.{named.written}" if self.path else named.written
                own[named.written] = attrs.evolve(item, path=path)
        return merged | own

    def elements(self) -> list[Item]:
        """The elements of a list. Raises Mistakes if this is none."""
        if self.kind != "list":
            raise self.mistake(f"expected a list, got {self.describe()}")
        return [self._child(node, f"{self.path}[{index}]", None) for index, node in enumerate(self.node.value)]

    def _child(self, node: Any, path: str, key_node: Any) -> Item:
        document = self.entry.document
        document.unfolded += 1
        if document.unfolded > MAX_NODES:
            raise Mistakes((Problem(f"the file unfolds to more than {MAX_NODES} values", document.file),))
        return Item(node, self.entry, path, key_node)

    def at(self, *path: str | int) -> Item:
        """The node at a path that is known to exist, to say where something is."""
        item = self
        for step in path:
            item = item.members(note=False)[step] if isinstance(step, str) else item.elements()[step]
        return item

    # ------------------------------------------------------------------------------------------------------------ texts
    def filled(self) -> str | Secret:
        """A text with its ``${VAR}`` filled in (compat G15, G16): a Secret if there were any.

        An unset variable is empty and noted in the Entry, or a mistake in a strict document. Raises Mistakes for that,
        for a malformed reference and if this is no text.
        """
        if self.kind != "text":
            hint = "; put it in quotes" if self.kind in ("int", "float", "bool") else ""
            raise self.mistake(f"expected text, got {self.describe()}{hint}")
        template = self.written
        if UNUSABLE.search(template):
            raise self.mistake("holds a character that no text may hold (NUL or half of a surrogate pair)")
        if "${" not in template:
            return template
        before, *references = template.split("${")
        value = [before]
        parts = []
        for reference in references:
            name, brace, after = reference.partition("}")
            part = self._variable(name if brace else None)
            parts.append((name, part))
            value += part, after
        return Secret(template, "".join(value), tuple(parts))

    def _variable(self, name: str | None) -> str:
        if name is None:
            raise self.mistake('malformed ${}: a "}" is missing')
        if not NAME.fullmatch(name):
            raise self.mistake(
                f"malformed ${{{name[:40]}}}: between the braces belongs the name of a variable "
                "(letters, digits and _, no digit first) and nothing else"
            )
        entry = self.entry
        entry.variables.add(name)
        value = entry.document.environ.get(name)
        if value is None:
            if entry.document.strict:
                raise self.mistake(f"the environment variable {name} is not set")
            entry.unset.add(name)
            return ""
        if UNUSABLE.search(value):
            raise self.mistake(f"the environment variable {name} does not hold UTF-8 text")
        return value


def invented(entry: Entry, members: Mapping[str, str]) -> Item:
    """A map that stands in no file, such as the command line's."""
    pairs = [(ScalarNode(CORE + "str", name), ScalarNode(CORE + "str", value)) for name, value in members.items()]
    return Item(MappingNode(CORE + "map", pairs), entry)


# ------------------------------------------------------------------------------------------------------------- reading
def read(path: Path, environ: Mapping[str, str], *, strict: bool) -> tuple[Document, Item | None]:
    """Read and compose a file. The node is None where it holds nothing but comments.

    Blocks; takes about 3 ms per kB. Raises ConfigError: kind "parse" if it is no YAML, with the line; kind "validation"
    if there is no usable file.
    """
    document = Document(str(path), environ, strict)
    data = _read_bytes(path)
    document.digest = digest_of((data,))
    node = _compose(_decode(data, document.file), document.file)
    empty = node is None or (isinstance(node, ScalarNode) and node.tag == CORE + "null" and not node.value)
    return document, None if empty else Item(node, Entry(document))


def _read_bytes(path: Path) -> bytes:
    """At most MAX_BYTES of it, from a pipe as well."""
    file = str(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        hint = "a folder, not a file (a bind mount of a file that is not there makes one)"
        raise ConfigError([Problem(f"can't be read: {hint}", file)]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([Problem(f"can't be read: {reason}", file)]) from error
    if len(data) > MAX_BYTES:
        raise ConfigError([Problem(f"is larger than {MAX_BYTES} bytes", file)])
    if not data.strip():
        # A file that is being rewritten, or was on a full disk: taking it at its word would stop every server.
        raise ConfigError([Problem("the file is empty", file)])
    return data


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError([Problem("the file is not UTF-8 text", file, line, column)], kind="parse") from None


def _compose(text: str, file: str) -> Any:
    """The root node, None for a file without one. Raises ConfigError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    try:
        return yaml.compose(text)
    except ReaderError as error:
        position = error.position if isinstance(error.position, int) else 0
        line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
        problem = Problem(f"the character {error.character!r} is not allowed in YAML", file, line, column)
        raise ConfigError([problem], kind="parse") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(str(error.problem or error.context or "not YAML").split())
        if error.problem and error.context:
            said = f"{said} ({' '.join(str(error.context).split())})"
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
        written = "".join(text.split("\n")[line - 1 : line]) if line else ""
        if "${" in written and ("[" in written or "{" in written.replace("${", "")):
            said += '; inside [] and {}, "${NAME}" needs quotes'
        raise ConfigError([Problem(said, file, line, column)], kind="parse") from None
    except (YAMLError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        # The scanner trips over some inputs with an error of Python's own, such as "\UFFFFFFFF" in quotes.
        line = getattr(yaml.reader, "line", 0) + 1
        raise ConfigError([Problem("the file is not YAML", file, line, 1)], kind="parse") from error
