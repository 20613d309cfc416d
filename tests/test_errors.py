"""Errors: what is said of them is theirs, whoever raises them again."""

from __future__ import annotations

from gateway.errors import StartFailed


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
