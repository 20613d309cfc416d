"""Kubernetes quantities (``500m``, ``0.5``, ``512Mi``, ``1G``, ``1e3``) as whole numbers. Pure and exact."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["memory_bytes", "nano_cpus", "scaled", "shown_bytes"]

_FORM: Final = re.compile(r"([0-9]{1,20})?(?:\.([0-9]{0,20}))?(?:[eE]([+-]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)")
_DECIMAL: Final = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY: Final = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}

LEAST_CPU: Final = 10_000_000
"""Billionths of a CPU: engines take no less than 0.01."""
LEAST_MEMORY: Final = 6 * 1024 * 1024
"""Bytes: engines take no less."""
MOST: Final = 2**62


def scaled(written: str | int | float, places: int) -> int:
    """The quantity times 10 ** places, rounded up. Raises ValueError for what is no quantity, or a negative one."""
    text = str(written).strip()
    found = _FORM.fullmatch(text)
    if found is None or not (found[1] or found[2]):
        raise ValueError(f"{text[:40]!r} is no quantity such as 500m, 0.5, 512Mi or 1G")
    whole, fraction, exponent, suffix = found[1] or "", found[2] or "", found[3], found[4] or ""
    number = int(whole + fraction)
    power = places - len(fraction)
    if suffix in _BINARY:
        number <<= _BINARY[suffix]
    else:
        power += int(exponent) if exponent is not None else _DECIMAL[suffix]
    result: int = number * 10**power if power >= 0 else -(-number // 10**-power)
    if result > MOST:
        raise ValueError(f"{text[:40]!r} is too much")
    return result


def nano_cpus(written: str | int | float) -> int:
    """Billionths of a CPU. Raises ValueError with a sentence that fits behind the key's name."""
    found = scaled(written, 9)
    if found < LEAST_CPU:
        raise ValueError("must be at least 10m (a hundredth of a CPU)")
    return found


def memory_bytes(written: str | int | float) -> int:
    """Bytes. Raises ValueError with a sentence that fits behind the key's name."""
    found = scaled(written, 0)
    if found < LEAST_MEMORY:
        hint = "; did you mean Mi instead of m?" if str(written).strip().endswith("m") else ""
        raise ValueError(f"must be at least 6Mi{hint}")
    return found


def shown_bytes(count: int) -> str:
    """For people: "512 MiB"."""
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
