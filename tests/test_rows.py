"""Rows A6 and A7: every row that this build promises has a test that bears its id."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROWS = [
    *(f"G{n}" for n in range(1, 22)),
    *(f"K{n}" for n in range(1, 31)),
    *(f"H{n}" for n in (*range(1, 10), *range(13, 37), *range(38, 42))),
    *(f"C{n}" for n in range(1, 18)),
    *(f"S{n}" for n in range(1, 11)),
    *(f"L{n}" for n in range(1, 18)),
    *(f"W{n}" for n in range(1, 13)),
    *(f"D{n}" for n in (7, 8, 11, 12, 13)),
    *("A1", "A6", "A10", "D16", "H6b", "O2", "O3", "O4", "O5", "O9"),
    *(f"RB{n:02d}" for n in (*range(1, 14), *range(20, 30), *range(30, 34), *range(50, 56), *range(60, 66))),
    *("RB70", "RB80", "RB83"),
]


def names() -> list[str]:
    found = []
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.append(node.name)
    return found


def test_A6_A7_every_row_has_a_test_that_bears_its_id() -> None:
    every = names()
    missing = [row for row in ROWS if not any(re.search(rf"_{row}(?:_|$)", name) for name in every)]
    assert not missing, f"no test is named after {', '.join(missing)}"
