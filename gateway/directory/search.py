"""Finding tools by what they do: a lexical index over the tools that one client may see.

Okapi BM25 over the words of name, title, description and argument names, each field with a weight of its own. Words are
compared by their stems, and a word finds its relatives: longer ones (``repo`` finds ``repository``) and those that it
begins with. No model, no network, no state: the same tools and the same query give the same hits in the same order in
every process, in whatever order the tools come.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

import attrs

from gateway.directory.thesaurus import relatives

__all__ = ["Hit", "Index"]

_FIELDS: Final = (("name", 2.0, 0.5), ("title", 2.0, 0.5), ("description", 1.5, 0.75), ("arguments", 1.0, 0.75))
"""Name, weight, and b of BM25: how much the length of the field counts."""
_SATURATION: Final = 2.0
"""k1 of BM25."""

_RELATIVE: Final = 0.5
"""What a word counts that begins like the one asked for, or is its beginning."""
_RELATIVE_FROM: Final = 4
_SYNONYM: Final = 0.5
"""What a word counts that may stand for the one asked for."""

_MAX_QUERY: Final = 1000
_MAX_TEXT: Final = 4000
"""Characters that are looked at, of a query and of a description."""

_WORD: Final = re.compile(r"[^\W_]+")
_SHAPES: Final = (
    (re.compile(r"\bhttps?://\S+|\bwww\.\S+", re.I), "url"),
    (re.compile(r"(?<!\w)[\w./~-]*\w\.[a-z]{1,4}\b(?!\w)|(?<!\w)[./~]+\w[\w./~-]*", re.I), "file"),
    (re.compile(r"(?<!\w)\d+([.,]\d+)*(?!\w)"), "number"),
)
"""What a query says without the word for it: addresses, files, numbers. The words come behind the rest."""
_HUMP: Final = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z][a-z]|[0-9])|(?<=[0-9])(?=[A-Za-z])")
_UNSPACED: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]")
"""Of scripts that write no spaces between words: each character is a word."""

_SILENT_WORDS: Final = """
a about again all already also am an and any anyone anything are as at back be been being both but by can could did do
does done each either else every everyone everything few for from get give go going got had has have he her him his how
i if in into is it its just keep let like longer many may me might more most much must my need no nor not of on one only
or other our out over own please same see she should show so some someone something such take tell than that the their
them then there these they this those through to too under until up us use used using very via want was we were what
when where which while who why will with would you your
"""
_SILENT: Final = frozenset(_SILENT_WORDS.split())
"""Words of a query that say nothing about a tool."""


@attrs.frozen
class Hit:
    """A tool that was found. ``score`` is above 0, except where nothing was asked for."""

    name: str
    server_id: str
    score: float
    item: Mapping[str, Any]


class Index:
    """An index of ``tools``: for each the name clients see, its server's id, and itself as listed."""

    def __init__(self, tools: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        self._tools = sorted(tools, key=lambda tool: tool[:2])
        self._names = [(name.casefold(), frozenset(_stems(name))) for name, _, _ in self._tools]
        self._where: dict[str, list[tuple[int, float]]] = {}
        """Stem -> number of each tool that has it, and how much it has of it."""
        texts = [_fields(name, item) for name, _, item in self._tools]
        weights: list[dict[str, float]] = [{} for _ in texts]
        for place, (_, weight, b) in enumerate(_FIELDS):
            lengths = [len(fields[place]) for fields in texts if fields[place]]
            usual = sum(lengths) / max(len(lengths), 1) or 1.0
            for number, fields in enumerate(texts):
                share = weight / (1 - b + b * len(fields[place]) / usual)
                for stem, count in Counter(fields[place]).items():
                    weights[number][stem] = weights[number].get(stem, 0.0) + share * count
        for number, found in enumerate(weights):
            for stem, weight in found.items():
                self._where.setdefault(stem, []).append((number, weight))
        self._stems = sorted(self._where)

    def search(self, query: str, limit: int = 10, server: str | None = None) -> list[Hit]:
        """The best ``limit`` tools for a query, the best first, ties by name; of one server only, if it is named.

        A tool's own name finds it first, and words that are all in its name before others. A query without a word finds
        every tool, in the order of their names.
        """
        query = query[:_MAX_QUERY]
        words = list(dict.fromkeys(_stems(_spelt_out(query), silent=_SILENT)))
        words = words or list(dict.fromkeys(_stems(query)))
        scores: dict[int, float] = dict.fromkeys(range(len(self._tools)), 0.0) if not words else {}
        for word in words:
            for number, score in self._scores(word).items():
                scores[number] = scores.get(number, 0.0) + score
        exact, asked = query.strip().casefold(), frozenset(_stems(query))
        # What floating point makes of sums must not decide between equals.
        found = sorted(
            (self._names[number][0] != exact, not asked <= self._names[number][1], -round(score, 9), number)
            for number, score in scores.items()
        )
        hits = (Hit(self._tools[n][0], self._tools[n][1], -score, self._tools[n][2]) for *_, score, n in found)
        return [hit for hit in hits if server is None or hit.server_id == server][:limit]

    def _scores(self, word: str) -> dict[int, float]:
        """What one word of a query is worth to each tool that has it or a relative of it."""
        best: dict[int, float] = {}
        for stem, likeness in self._relatives(word).items():
            places = self._where[stem]
            rarity = math.log(1 + (len(self._tools) - len(places) + 0.5) / (len(places) + 0.5))
            for number, weight in places:
                score = likeness * rarity * weight * (_SATURATION + 1) / (weight + _SATURATION)
                best[number] = max(best.get(number, 0.0), score)
        return best

    def _relatives(self, word: str) -> dict[str, float]:
        """The stems of this index that a word stands for, and how well: itself, what it may be called otherwise, longer
        ones, and those that it begins with.
        """
        found = {other: _SYNONYM for other in _synonyms().get(word, ()) if other in self._where}
        if len(word) >= _RELATIVE_FROM:
            for end in range(_RELATIVE_FROM, len(word)):
                if word[:end] in self._where:
                    found[word[:end]] = _RELATIVE
            for place in range(bisect_left(self._stems, word), len(self._stems)):
                if not self._stems[place].startswith(word):
                    break
                found[self._stems[place]] = _RELATIVE
        if word in self._where:
            found[word] = 1.0
        return found


@cache
def _synonyms() -> Mapping[str, frozenset[str]]:
    return relatives(_stem)


def _fields(name: str, item: Mapping[str, Any]) -> tuple[list[str], ...]:
    """The stems of each of FIELDS."""
    annotations, schema = item.get("annotations"), item.get("inputSchema")
    titles = (item.get("title"), annotations.get("title") if isinstance(annotations, dict) else None)
    title = next((text for text in titles if isinstance(text, str)), "")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    arguments: Iterable[str] = properties if isinstance(properties, dict) else ()
    description = item.get("description")
    text = description[:_MAX_TEXT] if isinstance(description, str) else ""
    # git__git_diff is not twice as much of git.
    return (
        list(dict.fromkeys(_stems(name))),
        list(dict.fromkeys(_stems(title))),
        list(_stems(text)),
        list(dict.fromkeys(stem for argument in arguments for stem in _stems(argument))),
    )


def _spelt_out(query: str) -> str:
    """A query with words for what has only the shape of something, if it says anything else."""
    rest, hints = query, []
    for shape, word in _SHAPES:
        left = shape.sub(" ", rest)
        if left != rest:
            hints.append(word)
            rest = left
    return f"{query} {' '.join(hints)}" if _WORD.search(rest) else query


def _stems(text: str, silent: frozenset[str] = frozenset()) -> Iterator[str]:
    """The words of a text as they are compared, less those that are ``silent``."""
    for found in _WORD.finditer(unicodedata.normalize("NFKC", text)):
        for part in _HUMP.split(found.group()):
            word = part.casefold()
            if _UNSPACED.search(word):
                yield from word
            elif word and word not in silent:
                yield _stem(word)


def _stem(word: str) -> str:
    """A word without its plural, ``-ing`` or ``-ed``, roughly, and alike on both sides."""
    if len(word) <= 3 or not word.isascii():
        return word
    for ending, put in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("ss", "ss")):
        if word.endswith(ending):
            return word[: -len(ending)] + put
    if word.endswith("s") and not word.endswith("us"):
        word = word[:-1]
    for ending in ("ing", "ed"):
        rest = word[: -len(ending)]
        if word.endswith(ending) and len(rest) >= 3 and re.search("[aeiouy]", rest):
            word = rest[:-1] if rest[-1] == rest[-2] and rest[-1] not in "aeiouylsz" else rest
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word
