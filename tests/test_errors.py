"""Errors: what is said of them is theirs, whoever raises them again."""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from gateway.errors import REPLACED, StartFailed, of_archive, unexpected


class Peculiar(StartFailed):
    """One that its runtime makes of more than a message."""

    def __init__(self, message: str, answer: int, reason: str) -> None:
        super().__init__(message, status=504)
        self.answer = answer
        self.reason = reason


def test_a_fault_is_told_anew_to_every_caller_whatever_made_it() -> None:
    first = Peculiar("it refuses", 409, "in use")
    second, third = first.anew(), first.anew("try later", retry_after=2.5)
    assert type(second) is Peculiar and second is not first
    assert (str(second), second.message, second.answer, second.reason, second.status) == (
        "it refuses",
        "it refuses",
        409,
        "in use",
        504,
    )
    assert (str(third), third.message, third.retry_after, third.answer) == ("try later", "try later", 2.5, 409)
    assert second.retry_after is None and second.code == StartFailed.code


@pytest.mark.parametrize("later", ["moved", "garbage", "gone"])
def test_what_can_t_be_read_from_a_replaced_archive_is_told_from_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    archive = tmp_path / "some.pyz"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("of_archive_first.py", "import of_archive_second")
        made.writestr("of_archive_second.py", "")
    monkeypatch.syspath_prepend(str(archive))
    assert importlib.util.find_spec("of_archive_first") is not None  # from now on Python knows where it is
    if later == "gone":
        archive.unlink()
    else:
        archive.write_bytes(b"#" * 50 + (archive.read_bytes() if later == "moved" else b""))
    with pytest.raises((ImportError, OSError)) as lost:
        importlib.import_module("of_archive_first")
    assert of_archive(lost.value) and unexpected(ExceptionGroup("", [lost.value])) == REPLACED
    with pytest.raises(ImportError) as absent:
        importlib.import_module("of_archive_that_never_was")
    with pytest.raises(ZeroDivisionError) as defect:
        raise ZeroDivisionError
    assert {unexpected(each.value) for each in (absent, defect)} == {"Internal error"}
