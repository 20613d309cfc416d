"""The two files: what they may say, and what is said about their mistakes and where."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import load, nodes
from gateway.config.load import Loaded, find_config, load_catalog, load_settings
from gateway.config.model import Catalog, Secret, ServerSpec, Settings, StringMap, Text, reveal
from gateway.errors import ConfigError
from gateway.runtimes import RUNTIMES, spec_types

ROOT = Path(__file__).resolve().parent.parent.parent


@attrs.frozen
class Program:
    command: Text
    args: tuple[Text, ...] = ()
    working_dir: str | None = None


@attrs.frozen
class Limits:
    cpu: str | int | float | None = None
    pids: int | None = None


@attrs.frozen(cache_hash=True)
class Remote:
    url: Text = attrs.field()
    headers: StringMap = attrs.field(factory=StringMap)
    allow_private: bool | Literal["auto"] = "auto"
    limits: Limits = attrs.field(factory=Limits)
    port: int = attrs.field(default=80, metadata={"aliases": ("tcp_port",)})
    folder: Path | None = None
    rest: Any = None

    @url.validator
    def _(self, _attribute: Any, value: Text) -> None:
        if not reveal(value).startswith("http"):
            raise ValueError("url must begin with http:// or https://")


TYPES = {"local-process": Program, "remote-sse": Remote, "remote-http": Remote}


class Desk:
    """Files in a folder of their own, loaded with an environment of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def catalog(self, text: str | bytes, **environ: str) -> Loaded[Catalog]:
        return load_catalog(self.write("catalog.yaml", text), environ, TYPES)

    def one(self, entry: str, **environ: str) -> ServerSpec:
        """The server of a catalog with one: the entry in flow style, without its braces."""
        return self.catalog(f"servers: [{{{entry}}}]", **environ).value.servers[0]

    def settings(self, text: str | bytes, overrides: Mapping[str, object] | None = None, **environ: str) -> Settings:
        return load_settings(self.write("config.yaml", text), environ, overrides).value

    def problems(self, text: str | bytes, **environ: str) -> list[str]:
        """What is wrong with the catalog, as "line:column: text"."""
        with pytest.raises(ConfigError) as caught:
            self.catalog(text, **environ)
        return self.told(caught.value)

    def settings_problems(self, text: str | bytes, **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.settings(text, None, **environ)
        return self.told(caught.value)

    def told(self, error: ConfigError) -> list[str]:
        return [str(problem).replace(f"{self.folder}/", "").partition(".yaml:")[2] for problem in error.problems]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


RUN = "runtime: {type: local-process, command: c}"


# ------------------------------------------------------------------------------------------------------------- lookup
class TestFindConfig:
    def test_G1_order(self, tmp_path: Path) -> None:
        cwd, home, etc, container = (tmp_path / name for name in ("cwd", "home", "etc", "container"))
        places = [
            cwd / "config.yaml",
            home / ".config/mcp-gateway/config.yaml",
            etc / "config.yaml",
            container / "config.yaml",
        ]
        assert find_config(None, cwd, home, places[2:]) is None
        for place in reversed(places):
            place.parent.mkdir(parents=True)
            place.touch()
            assert find_config(None, cwd, home, places[2:]) == place
        assert [*map(str, load.SYSTEM_CONFIGS)] == ["/etc/mcp-gateway/config.yaml", "/config/config.yaml"]

    def test_G1_explicit(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").touch()
        assert find_config(Path("mine.yaml"), tmp_path, tmp_path) == tmp_path / "mine.yaml"
        assert find_config(tmp_path / "mine.yaml", Path("/"), Path("/")) == tmp_path / "mine.yaml"
        with pytest.raises(ConfigError, match=r"^other\.yaml: there is no such file"):
            find_config(Path("other.yaml"), tmp_path, tmp_path)


# ------------------------------------------------------------------------------------------------------------- config
class TestSettings:
    def test_G1_none_found_is_the_defaults(self) -> None:
        assert load_settings(None, {}).value == Settings()
        assert load_settings(None, {}).value.catalog_path == Path("catalog.yaml")

    def test_G2_to_G20_every_key(self, desk: Desk) -> None:
        got = desk.settings(
            """
            listen_addr: "[::1]:5555"
            catalog_path: servers.yaml
            log_level: debug
            log_format: json
            api_key: "${KEY}"
            idle_timeout_seconds: 0
            health_check_interval_seconds: 0.5
            max_connections_per_server: 0x10
            request_timeout_seconds: 1e1
            cors_enabled: false
            cors_origins: [https://a.example]
            allowed_hosts: [a.example]
            hot_reload: false
            tenants: [{id: red, api_key: "${RED}", namespaces: [a]}]
            max_body_bytes: 1
            runtimes: ["acme.gateway:RUNTIME"]
            """,
            KEY="k1",
            RED="k2",
        )
        assert got.listen_addr == "[::1]:5555"
        assert got.catalog_path == desk.folder / "servers.yaml"
        assert (got.log_level, got.log_format) == ("debug", "json")
        assert got.api_key == Secret("${KEY}", "k1")
        assert (got.idle_timeout_seconds, got.health_check_interval_seconds) == (0, 0.5)
        assert (got.max_connections_per_server, got.request_timeout_seconds) == (16, 10.0)
        assert (got.cors_enabled, got.cors_origins, got.hot_reload) == (False, ("https://a.example",), False)
        assert got.allowed_hosts == ("a.example",)
        assert [(t.id, t.api_key, t.namespaces) for t in got.tenants] == [("red", Secret("", "k2"), ("a",))]
        assert (got.max_body_bytes, got.runtimes) == (1, ("acme.gateway:RUNTIME",))
        assert got.variables == {"KEY", "RED"}

    def test_G3_catalog_path(self, desk: Desk) -> None:
        assert desk.settings("catalog_path: a/c.yaml").catalog_path == desk.folder / "a/c.yaml"
        assert desk.settings("catalog_path: /a/c.yaml").catalog_path == Path("/a/c.yaml")
        assert desk.settings("catalog_path: ~/c.yaml", HOME="/home/me").catalog_path == Path("/home/me/c.yaml")
        assert desk.settings("log_level: info").catalog_path == desk.folder / "catalog.yaml"
        assert desk.settings("log_level: info", {"catalog_path": Path("c.yaml")}).catalog_path == Path("c.yaml")
        assert desk.settings_problems("catalog_path: ''") == ["1:15: catalog_path: must not be empty"]

    def test_C3_C4_overrides(self, desk: Desk) -> None:
        got = desk.settings(
            "listen_addr: 127.0.0.1:1\nlog_level: warn", {"listen_addr": "127.0.0.1:2", "log_level": "error"}
        )
        assert (got.listen_addr, got.log_level) == ("127.0.0.1:2", "error")
        got = desk.settings("listen_addr: 127.0.0.1:1", {"listen_addr": None, "log_level": None})
        assert (got.listen_addr, got.log_level) == ("127.0.0.1:1", "info")

    def test_C6_all_problems_of_file_and_command_line_at_once(self, desk: Desk) -> None:
        path = desk.write("config.yaml", "hot_reload: maybe\nmax_units: 0\n")
        with pytest.raises(ConfigError) as caught:
            load_settings(path, {}, {"listen_addr": "nowhere", "log_level": "warning"})
        assert [str(problem) for problem in caught.value.problems] == [
            'command line: listen_addr: expected HOST:PORT, such as "127.0.0.1:4444"',
            "command line: log_level: expected trace, debug, info, warn or error, got 'warning'; did you mean 'warn'?",
            f"{path}:1:13: hot_reload: expected true or false, got text",
            f"{path}:2:12: max_units: must be at least 1",
        ]
        assert caught.value.kind == "validation"

    def test_G14_unknown_key_is_a_warning_with_the_nearest(self, desk: Desk) -> None:
        got = load_settings(desk.write("config.yaml", "log_level: info\nhot_relaod: true\nx-mine: 1\nqqq: 1"), {})
        assert [str(warning).rpartition("yaml:")[2] for warning in got.warnings] == [
            "2:1: unknown key 'hot_relaod' is ignored; did you mean 'hot_reload'?",
            "4:1: unknown key 'qqq' is ignored",
        ]
        assert load_settings(desk.write("config.yaml", "variables: [A]"), {}).warnings

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("hot_reload: 'true'", "hot_reload: expected true or false, got text"),
            ("hot_reload: yes", "hot_reload: expected true or false, got text"),
            ("hot_reload: 1", "hot_reload: expected true or false, got a number"),
            ("max_units: '5'", "max_units: expected a whole number, got text; write it without quotes"),
            ("max_units: 1.5", "max_units: expected a whole number, got one with a fraction"),
            ("max_units: true", "max_units: expected a whole number, got true"),
            ("max_units: 99999999999999999999", "max_units: the number is too large"),
            ("park_timeout_seconds: .nan", "park_timeout_seconds: expected a number, got one that is not finite"),
            ("park_timeout_seconds: 1e999", "park_timeout_seconds: expected a number, got one that is not finite"),
            ("idle_timeout_seconds: -1", "idle_timeout_seconds: must not be negative"),
            ("idle_timeout_seconds: 2000000000", "idle_timeout_seconds: must not be above 1000000000"),
            ("request_timeout_seconds: 0", "request_timeout_seconds: must be above 0"),
            ("max_connections: -1", "max_connections: must be at least 1"),
            ("log_level: 5", "log_level: expected text, got a number; put it in quotes"),
            ("cors_origins: a", "cors_origins: expected a list, got text"),
            ("cors_origins: [1]", "cors_origins[0]: expected text, got a number; put it in quotes"),
            ("listen_addr: {}", "listen_addr: expected text, got a map"),
            ("listen_addr: a:99999", "listen_addr: the port must be a number from 0 to 65535"),
            ("log_format: !!binary eA==", "log_format: expected text, got the tag tag:yaml.org,2002:binary"),
            ("runtimes: [a.b]", "runtimes: expected module:NAME, got 'a.b'"),
            ('listen_addr: "\\0:1"', "listen_addr: holds a character that no text may hold"),
            ('listen_addr: "\\ud800:1"', "listen_addr: holds a character that no text may hold"),
            ("tenants: [{id: a}]", "tenants[0] missing required field: api_key"),
            ("tenants: [{id: '', api_key: a}]", "tenants[0].id: must not be empty"),
        ],
    )
    def test_G14_wrong_value_names_the_key(self, desk: Desk, line: str, says: str) -> None:
        (problem,) = desk.settings_problems(line)
        assert re.fullmatch(r"1:\d+: " + re.escape(says) + ".*", problem)

    def test_G15_one_variable_may_stand_for_a_number_or_a_boolean(self, desk: Desk) -> None:
        text = "max_units: ${N}\nhot_reload: '${B}'\nidle_timeout_seconds: ${T}\nlog_level: ${L}"
        got = desk.settings(text, N="7", B="False", T="1.5", L="warn")
        assert (got.max_units, got.hot_reload, got.idle_timeout_seconds, got.log_level) == (7, False, 1.5, "warn")

    def test_G15_wrong_values_are_refused_without_showing_them(self, desk: Desk) -> None:
        text = "max_units: ${N}\nhot_reload: ${N}\nlog_level: ${N}\nmax_parked: 1${N}"
        problems = desk.settings_problems(text, N="s3cret")
        assert problems == [
            "1:12: max_units: expected a whole number, got the value of ${N}",
            "2:13: hot_reload: expected true or false, got the value of ${N}",
            "3:12: log_level: expected trace, debug, info, warn or error, got '${N}'",
            "4:13: max_parked: expected a whole number, got text",
        ]

    def test_G16_unset_in_the_config_is_an_error(self, desk: Desk) -> None:
        problems = desk.settings_problems("api_key: ${KEY}\nlisten_addr: 127.0.0.1:${PORT}")
        assert problems == [
            "1:10: api_key: the environment variable KEY is not set",
            "2:14: listen_addr: the environment variable PORT is not set",
        ]

    @pytest.mark.parametrize("line", ["api_key: ''", "api_key:", "api_key: ${KEY}", "api_key: ' k'", "api_key: 'ключ'"])
    def test_G16_never_keyless_or_unusable_by_accident(self, desk: Desk, line: str) -> None:
        (problem,) = desk.settings_problems(line, KEY="")
        assert "api_key: " in problem

    def test_G5_null_is_meant(self, desk: Desk) -> None:
        assert desk.settings("api_key: null").api_key is None
        assert desk.settings("log_level: info").api_key is None

    def test_C14_variable_is_the_key_where_the_config_has_none(self, desk: Desk) -> None:
        got = desk.settings("log_level: info", MCP_GATEWAY_API_KEY="k")
        assert isinstance(got.api_key, Secret)
        assert (got.api_key.template, got.api_key.value) == ("${MCP_GATEWAY_API_KEY}", "k")
        assert reveal(desk.settings("api_key: other", MCP_GATEWAY_API_KEY="k").api_key or "") == "other"
        assert load_settings(None, {"MCP_GATEWAY_API_KEY": "k"}).value.api_key == got.api_key
        with pytest.raises(ConfigError, match="MCP_GATEWAY_API_KEY: must not be empty"):
            load_settings(None, {"MCP_GATEWAY_API_KEY": ""})
        with pytest.raises(ConfigError) as caught:
            load_settings(None, {"MCP_GATEWAY_API_KEY": "s3cret\n"})
        assert "s3cret" not in str(caught.value)

    def test_A6_key_in_the_file_is_a_warning(self, desk: Desk) -> None:
        (warning,) = load_settings(desk.write("config.yaml", "api_key: inline-key"), {}).warnings
        assert (warning.line, warning.column) == (1, 10)
        assert "${MCP_GATEWAY_API_KEY}" in warning.text
        assert "inline-key" not in warning.text
        assert not load_settings(desk.write("config.yaml", "api_key: ${K}"), {"K": "k"}).warnings

    def test_G13_tenants_are_told_apart(self, desk: Desk) -> None:
        text = (
            "api_key: ${A}\ntenants:\n- {id: a, api_key: k1, namespaces: [x]}\n"
            "- {id: a, api_key: k2, namespaces: [x]}\n- {id: b, api_key: k1, namespaces: [x]}\n"
            "- {id: c, api_key: '${A}', namespaces: [x]}"
        )
        assert desk.settings_problems(text, A="k3") == [
            "4:8: tenants[1].id: duplicate tenant id: a",
            "5:20: tenants[2].api_key: the same key is in use elsewhere",
            "6:20: tenants[3].api_key: the same key is in use elsewhere",
        ]
        (warning,) = load_settings(
            desk.write("config.yaml", "tenants: [{id: a, api_key: '${K}'}]"), {"K": "k"}
        ).warnings
        assert warning.text == "tenants[0]: no namespaces, so this tenant sees no server"

    @pytest.mark.parametrize(
        ("text", "overrides", "warns"),
        [
            ("listen_addr: 0.0.0.0:1", {}, True),
            ("listen_addr: ':1'", {}, True),
            ("listen_addr: '[::]:1'", {}, True),
            ("listen_addr: gateway.example:1", {}, True),
            ("log_level: info", {"listen_addr": "0.0.0.0:1"}, True),
            ("listen_addr: 0.0.0.0:1", {"listen_addr": "127.0.0.1:1"}, False),
            ("listen_addr: 127.0.0.9:1", {}, False),
            ("listen_addr: localhost:1", {}, False),
            ("listen_addr: 0.0.0.0:1\napi_key: ${K}", {}, False),
        ],
    )
    def test_G2_exposed_without_a_key_is_a_warning(
        self, desk: Desk, text: str, overrides: dict[str, object], warns: bool
    ) -> None:
        warnings = load_settings(desk.write("config.yaml", text), {"K": "k"}, overrides).warnings
        assert [w.text.partition(":")[0] for w in warnings] == ["listen_addr"] * warns


# ------------------------------------------------------------------------------------------------------------ catalog
class TestCatalog:
    def test_K1_to_K15_every_key(self, desk: Desk) -> None:
        loaded = desk.catalog(
            """
servers:
  - id: notes
    display_name: Notes
    description: of mine
    runtime:
      type: local-process
      command: notes-mcp
      args: [--stdio, "--dir=${HOME}/n"]
      working_dir: ./here
    env: {TOKEN: "${NOTES_TOKEN}", PORT: 8080, RATIO: 1.10, DEBUG: true, EMPTY: }
    inherit_env: false
    tags: [a, b]
    namespace: team
    isolation: session
    prefix: ""
    idle_timeout_seconds: 0
    request_timeout_seconds: 1
    start_timeout_seconds: 2
    stop_grace_seconds: 3
    max_connections_per_server: 4
    max_message_bytes: 5
    health_check_interval_seconds: 6
  - id: far
    runtime: {type: remote-sse, url: "http://far:9000/mcp", headers: {X-Key: "${FAR}"}, allow_private: true}
""",
            HOME="/h",
            NOTES_TOKEN="t",
            FAR="f",
        )
        notes, far = loaded.value.servers
        assert notes == ServerSpec(
            id="notes",
            display_name="Notes",
            description="of mine",
            runtime=Program("notes-mcp", ("--stdio", Secret("--dir=${HOME}/n", "--dir=/h/n")), "./here"),
            runtime_type="local-process",
            env=StringMap(
                (
                    ("DEBUG", "true"),
                    ("EMPTY", ""),
                    ("PORT", "8080"),
                    ("RATIO", "1.10"),
                    ("TOKEN", Secret("${NOTES_TOKEN}", "t")),
                )
            ),
            inherit_env=False,
            tags=("a", "b"),
            namespace="team",
            isolation="session",
            prefix="",
            idle_timeout_seconds=0,
            request_timeout_seconds=1,
            start_timeout_seconds=2,
            stop_grace_seconds=3,
            max_connections_per_server=4,
            max_message_bytes=5,
            health_check_interval_seconds=6,
        )
        assert loaded.value.variables == {"notes": {"HOME", "NOTES_TOKEN"}, "far": {"FAR"}}
        assert far.runtime == Remote("http://far:9000/mcp", StringMap((("X-Key", Secret("", "f")),)), True)
        assert far.or_default("idle_timeout_seconds", Settings()) == 300
        assert notes.or_default("idle_timeout_seconds", Settings()) == 0
        assert (loaded.warnings, loaded.unset) == ((), frozenset())
        assert loaded.value.by_id == {"notes": notes, "far": far}
        assert len({notes, far, attrs.evolve(notes)}) == 2

    @pytest.mark.parametrize("text", ["servers: []", "servers:", "servers: null", "# all of it is commented out\n"])
    def test_catalog_without_servers_is_valid(self, desk: Desk, text: str) -> None:
        assert desk.catalog(text).value.servers == ()

    def test_validation_strings(self, desk: Desk) -> None:
        problems = desk.problems(
            f"""servers:
- {RUN}
- id: a
- id: b
  runtime: {{type: quantum}}
- id: c
  {RUN}
- id: c
  {RUN}
- id: d
  runtime: {{type: local-process}}
- id: e
  runtime: {{command: c}}
- id:
  runtime:
- id: f
  runtime: {{type: , command: c}}
"""
        )
        assert problems == [
            "2:3: Server at index 0 missing required field: id",
            "3:3: Server 'a' missing required field: runtime",
            "5:19: Server 'b' has unknown runtime type: quantum",
            "8:7: Duplicate server ID: c",
            "11:12: Server 'd' missing required field: command",
            "13:12: Server 'e' missing required field: type",
            "14:3: Server at index 7 missing required field: id",
            "14:3: Server at index 7 missing required field: runtime",
            "17:12: Server 'f' missing required field: type",
        ]

    def test_G17_yaml_error_has_its_line(self, desk: Desk) -> None:
        path = desk.write("catalog.yaml", "servers:\n  - id: a\n    runtime: {type: x\n  - id: b\n")
        with pytest.raises(ConfigError) as caught:
            load_catalog(path, {}, TYPES)
        (problem,) = caught.value.problems
        assert (caught.value.kind, problem.file, problem.line) == ("parse", str(path), 4)
        assert "\n" not in problem.text

    def test_G15_yaml_error_from_missing_quotes_says_so(self, desk: Desk) -> None:
        (problem,) = desk.problems("servers:\n- {id: a, env: {A: ${A}}}\n")
        assert problem.startswith("2:") and problem.endswith('; inside [] and {}, "${NAME}" needs quotes')
        (problem,) = desk.problems("servers:\n- id: a\n  env: {A: b\n  c: ${A}\n")
        assert "needs quotes" not in problem

    def test_all_problems_at_once_with_their_places(self, desk: Desk) -> None:
        problems = desk.problems(
            """servers:
  - id: x
    isolation: sharde
    inherit_env: no
    env: [a]
    tags: b
    prefix: "a b"
    runtime:
      type: local-process
      command: 1
      args: [a, 2, null, [b]]
      working_dir: {}
  - id: y
    runtime: local-process
  - nonsense
  - id: z
    env: {"A=B": c}
    namespace: ''
    runtime: {type: remote-sse, url: http://x, limits: {pids: many, cpu: [1]}, allow_private: maybe, port: '1'}
"""
        )
        assert problems == [
            "3:16: Server 'x': isolation: expected shared, session, tenant, principal or call, got 'sharde'; "
            "did you mean 'shared'?",
            "4:18: Server 'x': inherit_env: expected true or false, got text",
            "5:10: Server 'x': env: expected a map, got a list",
            "6:11: Server 'x': tags: expected a list, got text",
            "7:13: Server 'x': prefix: only letters, digits, _ . and - belong in a tool's name",
            "10:16: Server 'x': command: expected text, got a number; put it in quotes",
            "11:17: Server 'x': args[1]: expected text, got a number; put it in quotes",
            "11:20: Server 'x': args[2]: expected text, got nothing",
            "11:26: Server 'x': args[3]: expected text, got a list",
            "12:20: Server 'x': working_dir: expected text, got a map",
            "14:14: Server 'y': runtime: expected a map, got text",
            "15:5: Server at index 2: expected a map, got text",
            "17:10: Server 'z': env: 'A=B' can't be the name of a variable",
            "18:16: Server 'z': namespace: must not be empty",
            "19:63: Server 'z': limits.pids: expected a whole number, got text",
            "19:74: Server 'z': limits.cpu: expected text or a whole number or a number, got a list",
            "19:95: Server 'z': allow_private: expected true or false or auto, got text",
            "19:108: Server 'z': port: expected a whole number, got text; write it without quotes",
        ]

    @pytest.mark.parametrize(
        "server_id", ["''", "a/b", '"a\\u0007"', '"a\\n"', ".", "..", "a" * 129, "1", "true", "{}", "[a]"]
    )
    def test_K1_ids_that_are_refused(self, desk: Desk, server_id: str) -> None:
        (problem,) = desk.problems(f"servers: [{{id: {server_id}, {RUN}}}]")
        assert "id: " in problem
        assert problem.isprintable()

    @pytest.mark.parametrize("server_id", ["Notes", "my server", "a_b", "-a", "a--b", "é", "a" * 128 + ""])
    def test_K1_ids_that_are_accepted(self, desk: Desk, server_id: str) -> None:
        loaded = desk.catalog(f"servers: [{{id: {server_id}, {RUN}}}]")
        assert loaded.value.servers[0].id == server_id
        tidy = server_id == "a" * 128
        assert [w.text.startswith(f"Server '{server_id}': id: better") for w in loaded.warnings] == [True] * (not tidy)

    def test_K30_unknown_keys_are_warnings(self, desk: Desk) -> None:
        loaded = desk.catalog(
            f"""x-common: 1
server: []
servers:
  - id: a
    {RUN}
    idle_timeout: 3
    args: [x]
  - id: b
    runtime: {{type: remote-sse, url: http://x, env: {{}}, header: {{}}, limits: {{cpus: 1}}}}
    zzz: {{ ? [1] : 2 }}
    cycle: &c [*c, "${{", !!python/object:os.system {{}}]
"""
        )
        assert [f"{w.line}:{w.column}: {w.text}" for w in loaded.warnings] == [
            "2:1: unknown key 'server' is ignored; did you mean 'servers'?",
            "6:5: Server 'a': unknown key 'idle_timeout' is ignored; did you mean 'idle_timeout_seconds'?",
            "7:5: Server 'a': unknown key 'args' is ignored; it belongs into runtime",
            "9:48: Server 'b': unknown key 'env' is ignored; it belongs beside runtime, not into it",
            "9:57: Server 'b': unknown key 'header' is ignored; did you mean 'headers'?",
            "9:78: Server 'b': limits: unknown key 'cpus' is ignored; did you mean 'cpu'?",
            "10:5: Server 'b': unknown key 'zzz' is ignored",
            "11:5: Server 'b': unknown key 'cycle' is ignored",
        ]
        assert all(warning.file == str(desk.folder / "catalog.yaml") for warning in loaded.warnings)

    def test_K27_K28_runtime_schema_is_the_spec_class(self, desk: Desk) -> None:
        spec = desk.one(
            "id: a, runtime: {type: remote-http, url: http://x, tcp_port: 0o17, folder: ~/x, "
            'limits: {cpu: 0.5, pids: 3}, rest: {a: [1, 2.5, true, null, "${V}"]}}',
            V="v",
        )
        assert spec.runtime_type == "remote-http"
        assert (spec.runtime.port, spec.runtime.folder) == (15, Path("~/x"))
        assert spec.runtime.limits == Limits(0.5, 3)
        assert spec.runtime.rest == {"a": [1, 2.5, True, None, Secret("${V}", "v")]}
        assert (
            desk.one("id: a, runtime: {type: remote-http, url: http://x, limits: {cpu: 500m}}").runtime.limits.cpu
            == "500m"
        )

    def test_spec_class_refuses_a_value(self, desk: Desk) -> None:
        assert desk.problems("servers:\n- id: a\n  runtime: {type: remote-sse, url: 'ftp:'}") == [
            "3:36: Server 'a': url must begin with http:// or https://"
        ]

    def test_null_is_the_default(self, desk: Desk) -> None:
        spec = desk.one(f"id: a, {RUN}, env: , tags: null, isolation: ~, display_name: , prefix: ")
        assert (spec.env, spec.tags, spec.isolation, spec.name, spec.prefix) == (StringMap(), (), "shared", "a", None)

    def test_merge_keys_and_anchors(self, desk: Desk) -> None:
        loaded = desk.catalog(
            """x-base: &base {isolation: call, tags: [base]}
servers:
  - <<: *base
    id: a
    runtime: &run {type: local-process, command: c}
    tags: [own]
  - {<<: [{tags: [first]}, *base], id: b, runtime: *run}
"""
        )
        assert [(s.isolation, s.tags) for s in loaded.value.servers] == [("call", ("own",)), ("call", ("first",))]
        assert not loaded.warnings

    def test_yaml_1_2_scalars(self, desk: Desk) -> None:
        spec = desk.one(
            "id: no, display_name: 2024-01-01, description: 12:30, runtime: {type: local-process, command: y}"
        )
        assert (spec.id, spec.display_name, spec.description) == ("no", "2024-01-01", "12:30")


# ----------------------------------------------------------------------------------------------------------- variables
class TestVariables:
    def test_G15_anywhere_in_any_text(self, desk: Desk) -> None:
        spec = desk.one(
            'id: a, runtime: {type: local-process, command: "${A}", args: ["x${A}y${B}", \'$A\', "$$", \'$(A)\']}',
            A="1",
            B="2",
        )
        assert spec.runtime.command == Secret("${A}", "1")
        assert spec.runtime.args == (Secret("x${A}y${B}", "x1y2"), "$A", "$$", "$(A)")
        assert spec.runtime.args[0].parts == (("A", "1"), ("B", "2"))
        assert "x1y2" not in repr(spec)

    def test_G16_empty_is_set(self, desk: Desk) -> None:
        spec = desk.one(f'id: a, {RUN}, env: {{A: "${{A}}"}}', A="")
        assert (spec.env.revealed(), spec.unset) == ({"A": ""}, ())

    @pytest.mark.parametrize("bad", ["${}", "${1x}", "${A", "x${A-b}", "${A:-b}", "${ A }", "${A${B}}", "${é}", "${"])
    def test_G16_malformed_is_an_error(self, desk: Desk, bad: str) -> None:
        (problem,) = desk.problems(f"servers:\n- id: a\n  {RUN}\n  description: '{bad}'\n", A="1", B="2")
        assert problem.startswith("4:16: Server 'a': description: malformed ${")

    def test_G16_unset_in_the_catalog_concerns_one_server(self, desk: Desk) -> None:
        loaded = desk.catalog(
            """servers:
  - id: a
    runtime: {type: local-process, command: c, args: ["${NOPE}", "--k=${ALSO}"]}
    env: {E: "${NOPE}"}
    idle_timeout_seconds: ${T}
    inherit_env: ${I}
    isolation: ${S}
    namespace: ${NS}
  - id: b
    runtime: {type: local-process, command: c}
""",
        )
        a, b = loaded.value.servers
        assert a.unset == ("ALSO", "I", "NOPE", "NS", "S", "T")
        assert (a.namespace, a.env.revealed()) == ("${NS}", {"E": ""})
        assert b.unset == ()
        assert loaded.unset == set(a.unset)
        assert [(w.line, w.text) for w in loaded.warnings] == [
            (2, f"Server 'a': the environment variable {name} is not set; the server can't start") for name in a.unset
        ]
        assert a != desk.catalog((desk.folder / "catalog.yaml").read_text(), NOPE="").value.servers[0]

    def test_G16_unset_passes_the_spec_class(self, desk: Desk) -> None:
        spec = desk.one('id: a, runtime: {type: remote-sse, url: "${URL}", port: "${PORT}", headers: {a: b}}')
        assert spec.unset == ("PORT", "URL")
        assert isinstance(spec.runtime, Remote)
        assert (spec.runtime.url, spec.runtime.headers) == (Secret("${URL}", ""), StringMap((("a", "b"),)))
        assert spec.runtime.limits == Limits()
        assert hash(spec) == hash(attrs.evolve(spec))
        assert "unset" in repr(spec)

    def test_G16_unset_in_an_id(self, desk: Desk) -> None:
        assert desk.one(f'id: "${{ID}}", {RUN}').id == "${ID}"
        (problem,) = desk.problems(f'servers:\n- {{id: "${{ID}}", {RUN}}}\n- {{id: "${{ID}}", {RUN}}}')
        assert problem == "3:8: Duplicate server ID: ${ID}"

    def test_RB33_values_stay_scalars(self, desk: Desk) -> None:
        text = "servers:\n- id: a\n  runtime: {type: local-process, command: c, args: ['${V}']}\n  env: {E: '${V}'}\n"
        for value in ("[a, b]", "a: b", "*x", "!!python/object:os.system x", "x\n  b: c", "${PATH}", "'", '"', "null"):
            spec = desk.catalog(text, V=value).value.servers[0]
            assert [reveal(arg) for arg in spec.runtime.args] == [value]
            assert spec.env.revealed() == {"E": value}

    def test_value_that_is_no_text(self, desk: Desk) -> None:
        (problem,) = desk.problems(f"servers: [{{id: a, {RUN}, description: '${{V}}'}}]", V="\udcff")
        assert "V does not hold UTF-8" in problem


# -------------------------------------------------------------------------------------------------------------- bounds
class TestBounds:
    def test_RB30_no_file(self, desk: Desk) -> None:
        with pytest.raises(ConfigError) as caught:
            load_catalog(desk.folder / "none.yaml", {}, TYPES)
        assert str(caught.value) == f"{desk.folder}/none.yaml: can't be read: No such file or directory"

    def test_RB30_folder(self, desk: Desk) -> None:
        with pytest.raises(ConfigError, match="a folder, not a file"):
            load_settings(desk.folder, {})

    def test_RB30_unreadable(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        path = desk.write("catalog.yaml", "servers: []")
        monkeypatch.setattr(nodes, "open", refuse, raising=False)
        with pytest.raises(ConfigError, match=r"can't be read: Permission denied$"):
            load_catalog(path, {}, TYPES)

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_RB30_truncated_to_nothing(self, desk: Desk, text: str) -> None:
        for loading in (desk.catalog, desk.settings):
            with pytest.raises(ConfigError, match="the file is empty"):
                loading(text)

    def test_RB30_not_utf_8(self, desk: Desk) -> None:
        path = desk.write("catalog.yaml", b"servers: []\n# \xff\n")
        with pytest.raises(ConfigError) as caught:
            load_catalog(path, {}, TYPES)
        (problem,) = caught.value.problems
        assert (caught.value.kind, problem.line, problem.column) == ("parse", 2, 3)
        with pytest.raises(ConfigError, match="not UTF-8"):
            desk.catalog("servers: []".encode("utf-16"))
        assert desk.catalog(b"\xef\xbb\xbfservers: []").value.servers == ()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("[]", "1:1: expected a map, got a list"),
            ("hello", "1:1: expected a map, got text"),
            ("{}", "1:1: missing required field: servers"),
            ("server: []", "1:1: missing required field: servers"),
            ("servers: {}", "1:10: servers: expected a list, got a map"),
            ("!!set {servers}", "1:1: expected a map, got the tag tag:yaml.org,2002:set"),
            ("!foo {servers: []}", "1:1: expected a map, got the tag !foo"),
        ],
    )
    def test_not_a_catalog(self, desk: Desk, text: str, says: str) -> None:
        assert desk.problems(text) == [says]

    def test_duplicate_keys(self, desk: Desk) -> None:
        text = f"servers:\n- id: a\n  {RUN}\n  env: {{A: 1, A: 2}}\n  id: b\n"
        text += "- {id: b, runtime: {type: local-process, command: c, command: d}}\nservers: []\n"
        assert desk.problems(text) == [
            "4:15: Server 'a': env: duplicate key: A",
            "5:3: Server 'a': duplicate key: id",
            "6:54: Server 'b': duplicate key: command",
            "7:1: duplicate key: servers",
        ]
        assert desk.settings_problems("log_level: info\nlog_level: info") == ["2:1: duplicate key: log_level"]

    @pytest.mark.parametrize("key", ["? [a]", "? {a: b}", "~", "? !foo x", '"\\0"'])
    def test_keys_that_are_no_texts(self, desk: Desk, key: str) -> None:
        (problem,) = desk.problems(f"servers:\n- id: a\n  {RUN}\n  env:\n    {key} : 1\n")
        assert "Server 'a': env: a key " in problem

    def test_RB33_tags_make_nothing(self, desk: Desk, tmp_path: Path) -> None:
        target = tmp_path / "made"
        text = f"servers:\n- id: a\n  {RUN}\n  description: !!python/object/apply:os.mkdir ['{target}']\n"
        (problem,) = desk.problems(text)
        assert "expected text, got the tag tag:yaml.org,2002:python/object/apply:os.mkdir" in problem
        assert not target.exists()

    def test_RB33_depth(self, desk: Desk) -> None:
        (problem,) = desk.problems("servers: " + "[" * 70 + "]" * 70)
        assert "maximum depth" in problem
        (problem,) = desk.problems("servers: " + "[" * 50_000)
        assert "maximum depth" in problem

    def test_RB33_alias_bombs(self, desk: Desk) -> None:
        laughs = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 10))
        bomb = f"b0: &b0 [{', '.join(['x'] * 10)}]\n{laughs}"
        loaded = desk.catalog(f"{bomb}servers: []\n")  # what nobody asks for is never unfolded
        assert len(loaded.warnings) == 10
        text = bomb + "servers:\n- {id: a, runtime: {type: remote-sse, url: http://x, rest: *b9}}\n"
        started = time.monotonic()
        (problem,) = desk.problems(text)
        assert problem == " the file unfolds to more than 200000 values"
        assert time.monotonic() - started < 10
        args = f"x-args: &args [{', '.join(['x'] * 3000)}]\nservers:\n"
        args += "".join(
            f"- {{id: s{n}, runtime: {{type: local-process, command: c, args: *args}}}}\n" for n in range(100)
        )
        with pytest.raises(ConfigError, match="unfolds to more than 200000 values"):
            desk.catalog(args)

    def test_RB33_recursion(self, desk: Desk) -> None:
        (problem,) = desk.problems(f"servers:\n- &a\n  id: a\n  {RUN}\n  <<: *a\n")
        assert "<< is nested too deeply" in problem
        (problem, *_) = desk.problems(
            "servers:\n- {id: a, runtime: {type: remote-sse, url: http://x, rest: &r {r: *r}}}\n"
        )
        assert "nested too deeply" in problem

    def test_RB33_size(self, desk: Desk) -> None:
        with pytest.raises(ConfigError, match="is larger than 4194304 bytes"):
            desk.catalog(b"#" * (nodes.MAX_BYTES + 1))

    def test_problems_are_bounded(self, desk: Desk) -> None:
        with pytest.raises(ConfigError) as caught:
            desk.catalog("servers:\n" + "- 1\n" * 500)
        assert len(caught.value.problems) == nodes.MAX_PROBLEMS
        with pytest.raises(ConfigError) as caught:
            desk.catalog(f"servers: [{{id: a, {RUN}, env: {{{'a: 1, ' * 300}}}}}]")
        assert len(caught.value.problems) == nodes.MAX_PROBLEMS + 1
        assert caught.value.problems[-1].text == "and 199 more problems"

    def test_control_characters_reach_no_terminal(self, desk: Desk) -> None:
        (problem,) = desk.problems(f'servers: [{{id: a, {RUN}, env: {{"\\e[2J": [], }}}}]')
        assert problem.isprintable()
        assert "\\x1b[2J" in problem

    def test_reads_from_a_pipe(self, desk: Desk) -> None:
        path = desk.folder / "pipe"
        os.mkfifo(path)
        thread = threading.Thread(target=path.write_text, args=("servers: []",))
        thread.start()
        assert load_catalog(path, {}, TYPES).value.servers == ()
        thread.join()

    def test_digest_is_of_the_bytes(self, desk: Desk) -> None:
        first = desk.catalog("servers: []").digest
        assert first == desk.catalog("servers: []").digest != desk.catalog("servers: [] ").digest


PIECES = st.sampled_from(
    [
        *"\n :-[]{},&*!|>'\"%@`#?\t\0\x85\ufeff",
        "  ",
        "servers:",
        "- id: a",
        "runtime: {type: local-process, command: c}",
        "<<: ",
        "&a ",
        "*a",
        "!!int ",
        "!<x>",
        "%YAML 1.1\n---\n",
        "%TAG ! tag:x,1:\n---\n",
        "---\n",
        "...\n",
        "${A}",
        "${",
        '"\\UFFFFFFFF"',
        '"\\x',
        "|2\n",
        "\r",
        "\u2028",
        "0x",
        "1e5",
        "é",
        "\U0001f600",
    ]
)


class TestHostileBytes:
    @settings(max_examples=300, deadline=None)
    @given(data=st.lists(PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode("utf-8", "replace")))
    def test_P3_pieces_of_yaml_end_in_values_or_config_errors(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes
    ) -> None:
        self.load(tmp_path_factory.getbasetemp() / "hostile.yaml", data)

    @settings(max_examples=200, deadline=None)
    @given(data=st.binary(max_size=60))
    def test_P3_any_bytes_end_in_values_or_config_errors(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes
    ) -> None:
        self.load(tmp_path_factory.getbasetemp() / "hostile.yaml", data)

    def load(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        try:
            assert isinstance(load_catalog(path, {"A": "1"}, TYPES).value, Catalog)
        except ConfigError as error:
            assert error.problems
            assert all(str(problem).isprintable() for problem in error.problems)


# ------------------------------------------------------------------------------------------------------------- example
class TestExample:
    ENVIRON: ClassVar = {"MCP_GATEWAY_PYTHON": "/usr/bin/python3", "MCP_GATEWAY_MAIN": "/opt/gateway.pyz"}
    TEXT = (ROOT / "catalog.example.yaml").read_text()

    def test_catalog_example(self) -> None:
        loaded = load_catalog(ROOT / "catalog.example.yaml", self.ENVIRON, spec_types(RUNTIMES))
        (demo,) = loaded.value.servers
        assert (demo.id, loaded.warnings) == ("demo", ())
        assert reveal(demo.runtime.command) == "/usr/bin/python3"
        assert [reveal(arg) for arg in demo.runtime.args] == ["/opt/gateway.pyz", "demo-server"]

    def test_catalog_example_uncommented(self, desk: Desk) -> None:
        """What is commented out works, and with it every type that K28 promises to accept."""
        said = "".join(self.TEXT.partition("servers:")[1:])
        text = re.sub(r"^#(?=  |views:)", "", said, flags=re.M)
        path = desk.write("catalog.yaml", text)
        environ = self.ENVIRON | {"HOME": "/home/me", "REMOTE_TOKEN": "t", "BOX_TOKEN": "b"}
        loaded = load_catalog(path, environ, spec_types(RUNTIMES))
        assert loaded.warnings == ()
        types = [spec.runtime_type for spec in loaded.value.servers]
        assert types == ["local-process", "local-process", "remote-sse", "docker", "k8s-job", "k8s-service"]
        assert [(view.name, view.mode) for view in loaded.value.views] == [("desk", "search")]
