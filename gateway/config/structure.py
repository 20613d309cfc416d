"""Nodes -> frozen attrs classes: cattrs with strict hooks that know where they are.

A hook receives an Item and returns a value or raises Mistakes; cattrs goes on through all members of a class and hands
over everything that was raised. (Its own hooks would make ``bool("no")`` true.) The schema is the class itself:
attributes are keys, defaults are defaults. A field's metadata may give ``{"aliases": ("service",)}``, other names of
its key; model.NOT_YAML says that it is no key. What is peculiar to single fields comes as Rules.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs
from cattrs import BaseValidationError, Converter
from cattrs.gen import make_dict_structure_fn, override

from gateway.config.model import Secret, StringMap, reveal
from gateway.config.nodes import MAX_DEPTH, MAX_PROBLEMS, Item, Mistakes
from gateway.errors import Problem

__all__ = ["Hook", "Rules", "make_converter", "warn_unknown"]

MAX_INTEGER: Final = 2**53

Hook = Callable[[Any, Any], Any]
"""Takes an Item (and its type, which only cattrs needs), returns the value or raises Mistakes."""

Check = Callable[[Any], object]
"""Takes a value, raises ValueError with a sentence that fits behind its key."""


@attrs.frozen
class Rules:
    """What the types of the fields do not say.

    hooks      for single fields, instead of those of their types
    check      the Check of a class's field, None for none
    misplaced  a hint for an unknown key of a class, "" for none
    """

    hooks: Mapping[tuple[type, str], Hook] = attrs.field(factory=dict)
    check: Callable[[type, str], Check | None] = lambda owner, name: None
    misplaced: Callable[[type, str, Item], str] = lambda owner, name, item: ""


def make_converter(rules: Rules) -> Converter:
    """Structures Items of str, int, float, bool, Path, Literal, StringMap, Text, tuples, unions and attrs classes.

    A field of type Any gets plain maps, lists and scalars, with a Secret where ``${}`` was filled in.
    """
    converter = Converter(detailed_validation=True)
    converter.register_structure_hook(str, _string)
    converter.register_structure_hook(int, _number)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(bool, _boolean)
    converter.register_structure_hook(Path, _path)
    converter.register_structure_hook_factory(attrs.has, lambda kind: _class_hook(converter, rules, kind))
    converter.register_structure_hook(StringMap, _string_map)
    converter.register_structure_hook_factory(_is_tuple, lambda kind: _tuple_hook(converter, kind))
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_factory(_is_union, lambda kind: _union_hook(converter, kind))
    converter.register_structure_hook_func(lambda kind: kind is Any, _anything)
    return converter


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


# ------------------------------------------------------------------------------------------------------------- scalars
def _lacking(item: Item, text: str | Secret) -> bool:
    """Whether a text is not whole because a variable is not set: then any value of the right type will do."""
    return isinstance(text, Secret) and any(name in item.entry.unset for name, _ in text.parts)


def _text(item: Item, _: Any = None) -> str | Secret:
    return item.filled()


def _string(item: Item, _: Any = None) -> str:
    text = item.filled()
    return item.written if _lacking(item, text) else reveal(text)


def _path(item: Item, _: Any = None) -> Path:
    return Path(_string(item))


def _whole_reference(item: Item) -> Secret | None:
    """The text of a scalar that is nothing but one ``${VAR}``, which may stand for a number or a boolean."""
    if item.kind != "text" or not item.written.startswith("${"):
        return None
    text = item.filled()
    return text if isinstance(text, Secret) and len(text.parts) == 1 and text.value == text.parts[0][1] else None


def _number(item: Item, kind: type) -> int | float:
    whole = kind is int
    expected = "a whole number" if whole else "a number"
    reference = _whole_reference(item)
    if reference is not None and _lacking(item, reference):
        return 1
    if reference is None and item.kind not in ("int", "float"):
        hint = "; write it without quotes" if item.kind == "text" and _parsed(item.written) is not None else ""
        raise item.mistake(f"expected {expected}, got {item.describe()}{hint}")
    value = _parsed(item.written if reference is None else reference.value.strip())
    if value is None or (whole and not isinstance(value, int)):
        what = "one with a fraction" if value is not None else "one that is not finite"
        got = what if reference is None else f"the value of {reference.template}"
        raise item.mistake(f"expected {expected}, got {got}")
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise item.mistake("the number is too large")
    return value


def _parsed(text: str) -> int | float | None:
    """A YAML 1.2 number; None if it is none or not finite."""
    if len(text) > 64 or not text.isascii():
        return None
    base = {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10)
    try:
        return int(text, base)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _boolean(item: Item, _: Any = None) -> bool:
    reference = _whole_reference(item)
    if reference is not None and _lacking(item, reference):
        return False
    text = (reference.value.strip() if reference is not None else item.written) if item.kind in ("bool", "text") else ""
    if (reference is not None or item.kind == "bool") and text.lower() in ("true", "false"):
        return text.lower() == "true"
    got = f"the value of {reference.template}" if reference is not None else item.describe()
    raise item.mistake(f"expected true or false, got {got}")


def _literal(item: Item, kind: Any) -> Any:
    options = get_args(kind)
    text = item.filled()
    if _lacking(item, text):
        return options[0]
    if reveal(text) in options:
        return reveal(text)
    shown = text.template if isinstance(text, Secret) else text
    near = _nearest(shown, options)
    raise item.mistake(f"expected {_expected(kind)}, got {shown[:40]!r}{near}")


def _string_map(item: Item, _: Any = None) -> StringMap:
    """Names and texts; other scalars are the text they are written as (compat K5)."""
    pairs: list[tuple[str, str | Secret]] = []
    problems: list[Problem] = []
    for name, value in item.members().items():
        try:
            scalar = value.kind in ("int", "float", "bool")
            pairs.append((name, "" if value.kind == "nothing" else value.written if scalar else value.filled()))
        except Mistakes as mistakes:
            problems.extend(mistakes.problems)
    if problems:
        raise Mistakes(problems)
    return StringMap(tuple(sorted(pairs, key=lambda pair: pair[0])))


def _tuple_hook(converter: Converter, kind: Any) -> Hook:
    element = get_args(kind)[0]
    hook = converter.get_structure_hook(element)

    def structure(item: Item, _: Any) -> tuple[Any, ...]:
        values: list[Any] = []
        problems: list[Problem] = []
        for child in item.elements():
            try:
                values.append(hook(child, element))
            except Mistakes as mistakes:
                problems.extend(mistakes.problems)
            if len(problems) >= MAX_PROBLEMS:
                break
        if problems:
            raise Mistakes(problems)
        return tuple(values)

    return structure


def _union_hook(converter: Converter, kind: Any) -> Hook:
    options = get_args(kind)
    rest = tuple(option for option in options if option is not type(None))
    if Secret in rest and str in rest:
        hooks: list[tuple[Hook, Any]] = [(_text, str)]
    else:
        hooks = [(converter.get_structure_hook(option), option) for option in rest]

    def structure(item: Item, _: Any) -> Any:
        if type(None) in options and item.kind == "nothing":
            return None
        if len(hooks) == 1:
            return hooks[0][0](item, hooks[0][1])
        for hook, option in hooks:
            try:
                return hook(item, option)
            except Mistakes:
                continue
        raise item.mistake(f"expected {_expected(kind)}, got {item.describe()}")

    return structure


def _anything(item: Item, _: Any = None, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise item.mistake("nested too deeply; does it contain itself?")
    match item.kind:
        case "map":
            return {name: _anything(child, None, depth + 1) for name, child in item.members().items()}
        case "list":
            return [_anything(child, None, depth + 1) for child in item.elements()]
        case "int":
            return _number(item, int)
        case "float":
            return _number(item, float)
        case "bool":
            return _boolean(item)
        case "nothing":
            return None
        case _:
            return item.filled()


def _expected(kind: Any) -> str:
    """A type, for people."""
    if _is_literal(kind):
        options = [str(option) for option in get_args(kind)]
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
    if _is_union(kind):
        return " or ".join(dict.fromkeys(_expected(o) for o in get_args(kind) if o is not type(None)))
    if _is_tuple(kind):
        return "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Secret: "text", Path: "text"}
    return names.get(kind, "a map")


# ------------------------------------------------------------------------------------------------------------- classes
def _resolved(kind: type[Any]) -> type[Any]:
    """The class with its annotations as types."""
    attrs.resolve_types(kind)
    return kind


def _keys(kind: type[Any]) -> list[attrs.Attribute[Any]]:
    """The fields that are YAML keys."""
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(_resolved(kind))
    return [field for field in fields if field.init and field.metadata.get("yaml", True)]


def _field_hook(converter: Converter, rules: Rules, owner: type[Any], field: attrs.Attribute[Any]) -> Hook:
    """The hook of a field's type and then the check of its value."""
    kind: Any = field.type
    hook = rules.hooks.get((owner, field.name)) or converter.get_structure_hook(kind)
    check = rules.check(owner, field.name)
    if check is None:
        return hook

    def structure(item: Item, _: Any) -> Any:
        value = hook(item, kind)
        try:
            check(value)
        except ValueError as error:
            raise item.mistake(str(error)) from None
        return value

    return structure


def _class_hook(converter: Converter, rules: Rules, kind: type[Any]) -> Hook:
    fields = _keys(kind)
    hooks = {field.name: _field_hook(converter, rules, kind, field) for field in fields}
    overrides: dict[str, Any] = {
        field.name: override(struct_hook=hooks[field.name]) if field.name in hooks else override(omit=True)
        for field in attrs.fields(kind)
    }
    build = make_dict_structure_fn(kind, converter, _cattrs_detailed_validation=True, **overrides)
    names = {name: field.name for field in fields for name in (field.name, *field.metadata.get("aliases", ()))}
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    nullable = {field.name for field in fields if type(None) in get_args(field.type)}

    def structure(item: Item, _: Any) -> Any:
        written = item.members()
        warn_unknown(written, names, lambda name: rules.misplaced(kind, name, item))
        members = {names[name]: child for name, child in written.items() if name in names}
        for name, child in list(members.items()):
            if child.kind == "nothing" and name not in nullable:
                del members[name]  # a key with nothing behind it is a key left out
        missing = [name for name in required if name not in members]
        try:
            return build(members, kind)
        except BaseValidationError as group:
            problems = [_missing(item, name) for name in missing]
            refused = []
            for error in _leaves(group):
                if isinstance(error, Mistakes):
                    problems.extend(error.problems)
                elif not (isinstance(error, KeyError) and error.args[:1] and error.args[0] in missing):
                    refused.append(error)
            if refused and not problems and item.entry.unset:
                return _unchecked(kind, {name: hooks[name](child, None) for name, child in members.items()})
            problems += [_refusal(item, members, error) for error in refused]
            raise Mistakes(problems) from None

    return structure


def _leaves(group: BaseException) -> Iterator[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        for error in group.exceptions:
            yield from _leaves(error)
    else:
        yield group


def _missing(item: Item, name: str) -> Problem:
    subject = ": ".join(filter(None, (item.entry.name, item.path)))
    return item.place(f"{subject} missing required field: {name}".strip())


def _refusal(item: Item, members: Mapping[str, Item], error: BaseException) -> Problem:
    """What a spec class's own validation said; it is placed at the key that the sentence begins with, if any."""
    said = str(error.args[0]) if error.args else type(error).__name__
    first = re.match(r"\w+", said)
    place = members.get(first.group(), item) if first else item
    return place.place(attrs.evolve(item, path="").problem(said).text)


def _unchecked(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance past its own validation.

    Values with unset variables in them may well be refused, yet the server must be listed (compat G16). It is never
    started.
    """
    made = object.__new__(kind)
    for field in attrs.fields(kind):
        default = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory(made) if default.takes_self else default.factory()
        object.__setattr__(made, field.name, values.get(field.name, default))
    if hasattr(kind, "_attrs_cached_hash"):
        object.__setattr__(made, "_attrs_cached_hash", None)
    return made


def warn_unknown(
    written: Mapping[str, Item], names: Collection[str], misplaced: Callable[[str], str] = lambda name: ""
) -> None:
    """Compat G14, K30: unknown keys are ignored, but not silently. ``x-`` keys are a place for anchors."""
    for name, item in written.items():
        if name in names or name.startswith("x-"):
            continue
        hint = misplaced(name) or _nearest(name, names)
        subject = ": ".join(filter(None, (item.entry.name, item.path[: -len(name)].rstrip("."))))
        text = f"unknown key {name[:80]!r} is ignored{hint}"
        item.entry.document.warnings.append(item.place(f"{subject}: {text}" if subject else text, at_key=True))


def _nearest(name: str, known: Collection[str]) -> str:
    import difflib  # late: only for those who mistype

    near = difflib.get_close_matches(name[:80], list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
