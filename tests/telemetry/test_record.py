"""Times as people read them."""

from __future__ import annotations

import pytest

from gateway.telemetry.record import iso


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1970-01-01T00:00:00Z"), (1_767_225_599.999, "2025-12-31T23:59:59Z"), (951_782_400, "2000-02-29T00:00:00Z")],
)
def test_H13_times_are_iso_8601_in_utc(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert iso(seconds) == text
