"""Who may come in."""

from __future__ import annotations

import pytest

from gateway.auth.apikeys import ApiKeys
from gateway.auth.principal import ANONYMOUS, Principal
from gateway.config.model import Secret, Settings, Tenant
from gateway.errors import Forbidden, Unauthenticated

KEY = "Zm9vYmFyYmF6"
ONE = ApiKeys(Settings(api_key=Secret("${KEY}", KEY)))
TENANTS = ApiKeys(
    Settings(
        api_key="admin",
        tenants=(Tenant("red", "red-key", ("a", "b")), Tenant("blue", Secret("${BLUE}", "blue-key"))),
    )
)


def test_A1_no_key_configured_is_anonymous() -> None:
    keys = ApiKeys(Settings())
    assert not keys.required
    assert keys.authenticate(None, None) is ANONYMOUS
    assert keys.authenticate("Bearer whatever", "whatever") is ANONYMOUS


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (f"Bearer {KEY}", None),
        (f"bearer {KEY}", None),
        (f"BEARER   {KEY} ", None),
        (f"Bearer {KEY}", "wrong"),
        (None, KEY),
        ("Basic Zm9vOmJhcg==", KEY),
        ("Bearer ", KEY),
        ("", KEY),
    ],
)
def test_H34_either_header(authorization: str | None, x_api_key: str | None) -> None:
    assert ONE.required
    assert ONE.authenticate(authorization, x_api_key) == Principal("api-key")
    assert ONE.authenticate(authorization, x_api_key).may_see("anything")


@pytest.mark.parametrize(
    ("authorization", "x_api_key"), [(None, None), ("", ""), ("Bearer ", None), ("Bearer", " "), (KEY, None)]
)
def test_H33_no_key(authorization: str | None, x_api_key: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ONE.authenticate(authorization, x_api_key)
    assert (caught.value.message, caught.value.status) == ("API key required", 401)


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        ("Bearer wrong", None),
        ("Bearer wrong", KEY),  # the Bearer token decides
        (None, KEY + "x"),
        (None, KEY.lower()),
        (None, "ключ"),
        (None, "\udcff"),
    ],
)
def test_H33_wrong_key(authorization: str | None, x_api_key: str | None) -> None:
    with pytest.raises(Forbidden) as caught:
        ONE.authenticate(authorization, x_api_key)
    assert (caught.value.message, caught.value.status) == ("Invalid API key", 403)


def test_G13_tenants_have_their_namespaces() -> None:
    red = TENANTS.authenticate("Bearer red-key", None)
    assert (red.tenant, red.namespaces) == ("red", frozenset({"a", "b"}))
    assert red.may_see("a")
    assert not red.may_see("default")
    assert not TENANTS.authenticate(None, "blue-key").may_see("default")
    assert TENANTS.authenticate(None, "admin").may_see("default")
    assert len({TENANTS.authenticate(None, key).subject for key in ("red-key", "blue-key", "admin")}) == 3


def test_RB80_keys_are_compared_by_digest_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return known == given

    monkeypatch.setattr("gateway.auth.apikeys.hmac.compare_digest", compare)
    ONE.authenticate(None, KEY)
    with pytest.raises(Forbidden):
        ONE.authenticate(None, "wrong")
    assert len(compared) == 2
    assert KEY not in repr(vars(ONE))
