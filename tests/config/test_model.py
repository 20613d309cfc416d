"""The values themselves: what a server inherits, what is hidden, where to listen."""

from __future__ import annotations

import pytest

from gateway.config.model import (
    Catalog,
    Secret,
    ServerSpec,
    Settings,
    StringMap,
    parse_listen_addr,
    secrets_of,
    server_environment,
)
from gateway.config.snapshot import diff

ENVIRON = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
    "USER": "me",
    "EDITOR": "ed",
    "MCP_GATEWAY_API_KEY": "the-key",
    "OWN": "own",
    "OTHERS": "others",
    "CONFIGS": "configs",
}


def server(server_id: str, **more: object) -> ServerSpec:
    return ServerSpec(server_id, None, "local-process", **more)  # type: ignore[arg-type]


class TestServerEnvironment:
    def environment(self, spec: ServerSpec) -> dict[str, str]:
        variables = {"a": frozenset({"OWN"}), "b": frozenset({"OTHERS", "HOME"})}
        catalog = Catalog((spec, server("b")), variables=variables)
        return server_environment(spec, catalog, {"CONFIGS"}, ENVIRON)

    def test_K5_inherits_all_but_what_belongs_to_others(self) -> None:
        assert self.environment(server("a")) == {
            "PATH": "/bin",
            "HOME": "/home/me",  # named by b, and no secret of anybody's
            "LANG": "C.UTF-8",
            "TMPDIR": "/tmp",
            "USER": "me",
            "EDITOR": "ed",
            "OWN": "own",
        }

    def test_K5_own_env_brings_one_back(self) -> None:
        env = StringMap((("MCP_GATEWAY_API_KEY", "x"), ("OTHERS", Secret("${OTHERS}", "others"))))
        got = self.environment(server("a", env=env))
        assert (got["OTHERS"], got["MCP_GATEWAY_API_KEY"]) == ("others", "x")

    def test_K5_inherit_env_false(self) -> None:
        spec = server("a", inherit_env=False, env=StringMap((("EDITOR", "vi"),)))
        assert self.environment(spec) == {
            "PATH": "/bin",
            "HOME": "/home/me",
            "LANG": "C.UTF-8",
            "TMPDIR": "/tmp",
            "USER": "me",
            "EDITOR": "vi",
        }


class TestSecrets:
    def test_H15_shows_only_its_template(self) -> None:
        secret = Secret("Bearer ${T}", "Bearer abc123")
        assert "abc123" not in f"{secret} {secret!r} {StringMap((('h', secret),))}"
        assert StringMap((("h", secret), ("g", "plain"))).shown() == {"h": "Bearer ${T}", "g": "plain"}
        assert StringMap((("h", secret),)).revealed() == {"h": "Bearer abc123"}

    def test_W5_compares_after_substitution(self) -> None:
        old = Catalog((server("a", env=StringMap((("T", Secret("${A}", "x")),))), server("b")))
        new = Catalog((server("a", env=StringMap((("T", Secret("${B}", "x")),))), server("c")))
        assert hash(old.servers[0]) == hash(new.servers[0])
        difference = diff(old, new)
        assert (difference.unchanged, difference.added, difference.removed) == (("a",), ("c",), ("b",))
        changed = Catalog((server("a", env=StringMap((("T", Secret("${A}", "y")),))), server("b")))
        assert diff(old, changed).modified == ("a",)
        assert str(diff(old, changed)) == "added: 0, removed: 0, modified: 1, unchanged: 1"

    def test_redacts_whole_values_and_each_variable_in_them(self) -> None:
        catalog = Catalog(
            (
                server(
                    "a",
                    env=StringMap((("T", Secret("Bearer ${TOKEN}", "Bearer s3cret", (("TOKEN", "s3cret"),))),)),
                ),
            )
        )
        settings = Settings(api_key=Secret("${KEY}", "key-of-keys"))
        redact = secrets_of(catalog, settings).redact
        assert redact("Bearer s3cret, s3cret; key-of-keys") == "Bearer ${TOKEN}, ${TOKEN}; ${KEY}"

    def test_redacts_the_longer_of_two(self) -> None:
        secrets = (Secret("${SHORT}", "abcd"), Secret("${LONG}", "abcdefgh"))
        assert secrets_of(*secrets).redact("abcdefgh abcd") == "${LONG} ${SHORT}"

    def test_redacts_lines_of_a_pem_and_leaves_short_values(self) -> None:
        redact = secrets_of(Secret("${PEM}", "-----BEGIN\nMIIBVgIBADANBg\n"), Secret("${N}", "abc")).redact
        assert redact("abc MIIBVgIBADANBg") == "abc ${PEM}"
        assert secrets_of(Settings()).redact("text") == "text"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:4444", ("127.0.0.1", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("[0:0:0:0:0:0:0:1]:0", ("::1", 0)),
        (":4444", ("0.0.0.0", 4444)),
        ("mcp.example.com:65535", ("mcp.example.com", 65535)),
    ],
)
def test_G2_listen_addr(text: str, address: tuple[str, int]) -> None:
    assert parse_listen_addr(text) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4444", "HOST:PORT"),
        ("localhost", "HOST:PORT"),
        ("localhost:", "port"),
        ("localhost:65536", "port"),
        ("localhost:-1", "port"),
        ("localhost:\uff14\uff14", "port"),
        ("::1:4444", "brackets"),
        ("[::g]:4444", "no IPv6"),
        ("http://x:80", "brackets"),
        ("a b:80", "neither"),
    ],
)
def test_G2_listen_addr_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_listen_addr(text)
