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
from typing import Any, Final

import attrs

__all__ = ["Hit", "Index"]

# Weights are whole numbers, so that no sum depends on the order of the tools.
_NAME: Final = 4
_TITLE: Final = 3
_DESCRIPTION: Final = 2
_ARGUMENT: Final = 1

_SATURATION: Final = 1.2
_LENGTH: Final = 0.75
"""k1 and b of BM25, at the values that are usual."""

_RELATIVE: Final = 0.5
"""What a word counts that only begins like the one asked for, or is its beginning."""
_RELATIVE_FROM: Final = 4

_MAX_QUERY: Final = 1000
_MAX_TEXT: Final = 4000
"""Characters that are looked at, of a query and of a description."""

_WORD: Final = re.compile(r"[^\W_]+")
_HUMP: Final = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z][a-z]|[0-9])|(?<=[0-9])(?=[A-Za-z])")
_UNSPACED: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]")
"""Of scripts that write no spaces between words: each character is a word."""

_SILENT_WORDS: Final = """
a about all an and any are as at be been but by can could did do does for from get give had has have how i if in into is
it its let like me my need now of on one or our out please should show so some tell that the their them then there these
they this to up us use want was we were what when where which who why will with would you your
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
        self._lengths: list[int] = []
        self._where: dict[str, list[tuple[int, int]]] = {}
        """Stem -> number of each tool that has it, and how much it has of it."""
        for number, (name, _, item) in enumerate(self._tools):
            weights = _weighed(name, item)
            self._lengths.append(sum(weights.values()))
            for stem, weight in weights.items():
                self._where.setdefault(stem, []).append((number, weight))
        self._stems = sorted(self._where)
        self._usual = sum(self._lengths) / max(len(self._lengths), 1) or 1.0

    def search(self, query: str, limit: int = 10, server: str | None = None) -> list[Hit]:
        """The best ``limit`` tools for a query, the best first, ties by name; of one server only, if it is named.

        A query without a word finds every tool, in the order of their names.
        """
        words = list(dict.fromkeys(_stems(query[:_MAX_QUERY], silent=_SILENT)))
        words = words or list(dict.fromkeys(_stems(query[:_MAX_QUERY])))
        scores: dict[int, float] = dict.fromkeys(range(len(self._tools)), 0.0) if not words else {}
        for word in words:
            for number, score in self._scores(word).items():
                scores[number] = scores.get(number, 0.0) + score
        # What floating point makes of sums must not decide between equals.
        found = sorted((-round(score, 9), number) for number, score in scores.items())
        hits = (Hit(self._tools[n][0], self._tools[n][1], -score, self._tools[n][2]) for score, n in found)
        return [hit for hit in hits if server is None or hit.server_id == server][:limit]

    def _scores(self, word: str) -> dict[int, float]:
        """What one word of a query is worth to each tool that has it or a relative of it."""
        best: dict[int, float] = {}
        for stem in self._relatives(word):
            places = self._where[stem]
            rarity = math.log(1 + (len(self._tools) - len(places) + 0.5) / (len(places) + 0.5))
            rarity *= 1.0 if stem == word else _RELATIVE
            for number, weight in places:
                size = 1 - _LENGTH + _LENGTH * self._lengths[number] / self._usual
                score = rarity * weight * (_SATURATION + 1) / (weight + _SATURATION * size)
                best[number] = max(best.get(number, 0.0), score)
        return best

    def _relatives(self, word: str) -> Iterator[str]:
        """The stems of this index that a word stands for: itself, longer ones, and those that it begins with."""
        if word in self._where:
            yield word
        if len(word) < _RELATIVE_FROM:
            return
        for place in range(bisect_left(self._stems, word), len(self._stems)):
            stem = self._stems[place]
            if not stem.startswith(word):
                break
            if stem != word:
                yield stem
        for end in range(_RELATIVE_FROM, len(word)):
            if word[:end] in self._where:
                yield word[:end]


def _weighed(name: str, item: Mapping[str, Any]) -> Counter[str]:
    """How much a tool has of each stem."""
    weights: Counter[str] = Counter()
    annotations, schema = item.get("annotations"), item.get("inputSchema")
    titles = (item.get("title"), annotations.get("title") if isinstance(annotations, dict) else None)
    title = next((text for text in titles if isinstance(text, str)), "")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    arguments: Iterable[str] = properties if isinstance(properties, dict) else ()
    description = item.get("description")
    for stem in set(_stems(name)):  # git__git_diff is not twice as much of git
        weights[stem] += _NAME
    for stem in set(_stems(title)):
        weights[stem] += _TITLE
    for stem in _stems(description[:_MAX_TEXT] if isinstance(description, str) else ""):
        weights[stem] += _DESCRIPTION
    for stem in {stem for argument in arguments for stem in _stems(argument)}:
        weights[stem] += _ARGUMENT
    return weights


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
