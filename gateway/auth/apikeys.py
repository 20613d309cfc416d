"""API keys: from two headers to a Principal (compat A1, G13, H33, H34).

Keys are looked up by their SHA-256, so a caller's guess is never compared with a key, and the time an answer takes
tells at most something about digests, from which no key can be found.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Settings, reveal
from gateway.errors import Forbidden, Unauthenticated

__all__ = ["ApiKeys"]


class ApiKeys:
    """The keys of one config, compiled. Immutable: a new config makes a new one."""

    def __init__(self, settings: Settings) -> None:
        keys: dict[bytes, tuple[bytes, Principal]] = {}
        for tenant in settings.tenants:
            digest = _digest(reveal(tenant.api_key))
            keys[digest] = (digest, Principal(f"tenant:{tenant.id}", tenant.id, frozenset(tenant.namespaces)))
        if settings.api_key is not None:
            digest = _digest(reveal(settings.api_key))
            keys[digest] = (digest, Principal("api-key"))
        self._keys = keys
        self.principals: Final = frozenset(principal for _, principal in keys.values()) or frozenset((ANONYMOUS,))
        """Everybody that ``authenticate`` can return."""

    @property
    def required(self) -> bool:
        """Whether callers need a key at all."""
        return bool(self._keys)

    def authenticate(self, authorization: str | None, x_api_key: str | None) -> Principal:
        """Who sends these two headers (None: not sent). One digest and one lookup.

        A Bearer token comes first, ``X-API-Key`` counts without one. ANONYMOUS where no key is configured. Raises
        Unauthenticated without a key and Forbidden for a wrong one.
        """
        if not self._keys:
            return ANONYMOUS
        key = ""
        if authorization is not None and authorization[:7].lower() == "bearer ":
            key = authorization[7:].strip()
        if not key and x_api_key is not None:
            key = x_api_key.strip()
        if not key:
            raise Unauthenticated("API key required")
        digest = _digest(key)
        known, principal = self._keys.get(digest, (b"", ANONYMOUS))
        if not hmac.compare_digest(known, digest):
            raise Forbidden("Invalid API key")
        return principal


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
