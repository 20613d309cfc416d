"""What a catalog may say about views and about what clients see of a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.config.load import load_catalog, load_settings
from gateway.config.model import Annotations, Catalog, ServerSpec, Shaping, StringMap, ViewSpec
from gateway.errors import ConfigError
from gateway.runtimes import RUNTIMES, spec_types

Read = Callable[..., Any]

SERVERS = """\
servers:
  - {id: git, tags: [dev], runtime: {type: local-process, command: c}}
  - {id: fs-home, runtime: {type: local-process, command: c}}
  - {id: fs-secret, runtime: {type: local-process, command: c}}
"""


class Desk:
    """A catalog file, what it becomes, what is said about it as "line:column: text"."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "catalog.yaml"

    def read(self, text: str, **environ: str) -> tuple[Catalog, list[str]]:
        self.path.write_text(text)
        loaded = load_catalog(self.path, environ, spec_types(RUNTIMES))
        return loaded.value, [self._told(problem) for problem in loaded.warnings]

    def server(self, keys: str, **environ: str) -> ServerSpec:
        catalog, warnings = self.read(f"servers: [{{id: s, runtime: {{type: local-process, command: c}}, {keys}}}]")
        assert warnings == []
        return catalog.servers[0]

    def view(self, keys: str, **environ: str) -> ViewSpec:
        catalog, warnings = self.read(f"{SERVERS}views: [{{name: v, {keys}}}]", **environ)
        assert warnings == []
        return catalog.views[0]

    def problems(self, text: str, **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.read(text, **environ)
        return [self._told(problem) for problem in caught.value.problems]

    def about(self, keys: str, **environ: str) -> list[str]:
        """Problems of a view with these keys, without their places."""
        return [said.partition(": ")[2] for said in self.problems(f"{SERVERS}views: [{{{keys}}}]", **environ)]

    def about_server(self, keys: str) -> list[str]:
        text = f"servers: [{{id: s, runtime: {{type: local-process, command: c}}, {keys}}}]"
        return [said.partition(": ")[2] for said in self.problems(text)]

    def _told(self, problem: Any) -> str:
        return str(problem).removeprefix(f"{self.path}:")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# ---------------------------------------------------------------------------------------------------------- shaping
def test_C5_shaping_of_a_server(desk: Desk) -> None:
    spec = desk.server(
        'prefix: gh_, tools: {allow: ["*_issue*"], deny: ["delete_*"], rename: {a: b}, describe: {c: "text"},'
        ' annotate: {"x*": {read_only: true, title: T}}}, prompts: {deny: ["*"]},'
        ' resources: {allow: ["repo://*"], annotate: {"*": {audience: [user], priority: 0.5}}}'
    )
    assert spec.prefix == "gh_"
    assert spec.tools == Shaping(
        allow=("*_issue*",),
        deny=("delete_*",),
        rename=StringMap((("a", "b"),)),
        describe=StringMap((("c", "text"),)),
        annotate=(("x*", Annotations(title="T", read_only=True)),),
    )
    assert spec.prompts == Shaping(deny=("*",))
    assert spec.resources == Shaping(
        allow=("repo://*",), annotate=(("*", Annotations(audience=("user",), priority=0.5)),)
    )
    assert spec.shaped


def test_C5_editing_what_clients_see_leaves_the_unit_what_it_is(desk: Desk) -> None:
    plain, shaped = desk.server("prefix: a_"), desk.server('prefix: "", tools: {deny: [x]}')
    assert plain == shaped and hash(plain) == hash(shaped)
    assert plain.presentation != shaped.presentation
    assert (plain.shaped, shaped.shaped) == (False, True)
    assert plain != desk.server("env: {A: b}")


def test_C5_allow_of_nothing_and_no_allow_are_two_things(desk: Desk) -> None:
    assert desk.server("tools: {allow: []}").tools.allow == ()
    assert desk.server("tools: {allow: null}").tools.allow is None
    assert desk.server("tools: {}").tools == Shaping()
    assert desk.problems("servers:\n- id: s\n  runtime: {type: local-process, command: c}\n  tools:\n    allow:\n") == [
        "5:5: Server 's': tools.allow: must not be empty; write [] to show nothing, or leave it out to show all"
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("tools: {allow: a}", "tools.allow: expected a list, got text"),
        ('tools: {deny: [""]}', "tools.deny: a pattern must not be empty; * matches all"),
        ("tools: {rename: {a: x, b: x}}", "tools: rename gives the name 'x' twice"),
        ('tools: {rename: {"a*": x}}', "tools: rename takes names, not patterns such as 'a*'"),
        ("tools: {rename: {a: x y}}", "tools: rename of 'a': 1 to 128 letters, digits, _ . and - make a name"),
        ('prompts: {rename: {a: ""}}', "prompts: rename of 'a': 1 to 128 letters, digits, _ . and - make a name"),
        ('resources: {rename: {"a://": ""}}', "resources: rename: a name must not be empty"),
        ("prompts: {annotate: {a: {title: x}}}", "prompts: prompts have no annotations"),
        ("tools: {annotate: {a: {priority: 1}}}", "tools: annotate of 'a': tools have no priority"),
        ("resources: {annotate: {a: {title: x}}}", "resources: annotate of 'a': resources have no title"),
        ("resources: {annotate: {a: {priority: 2}}}", "resources.annotate.a.priority: must be a number from 0 to 1"),
        (
            "resources: {annotate: {a: {audience: [me]}}}",
            "resources.annotate.a.audience[0]: expected user or assistant, got 'me'",
        ),
        ("tools: {annotate: {a: yes}}", "tools.annotate.a: expected a map, got text"),
        ("tools: {annotate: {a: {read_only: 1}}}", "tools.annotate.a.read_only: expected true or false, got a number"),
        ("tools: [a]", "tools: expected a map, got a list"),
        ('prefix: "a b"', "prefix: only letters, digits, _ . and - belong in a tool's name"),
    ],
)
def test_C5_mistakes_in_shaping_are_named(desk: Desk, keys: str, said: str) -> None:
    assert desk.about_server(keys) == [f"Server 's': {said}"]


def test_G14_unknown_keys_in_shaping_are_warned_about(desk: Desk) -> None:
    _, warnings = desk.read(
        f"{SERVERS}  - {{id: s, tools: {{hide: [x], annotate: {{a: {{readonly: true}}}}}},"
        " runtime: {type: local-process, command: c}}\n"
    )
    assert [said.partition(": ")[2] for said in warnings] == [
        "Server 's': tools: unknown key 'hide' is ignored",
        "Server 's': tools.annotate.a: unknown key 'readonly' is ignored; did you mean 'read_only'?",
    ]


# ------------------------------------------------------------------------------------------------------------ views
def test_C5_a_view_with_every_key(desk: Desk) -> None:
    view = desk.view(
        'description: All of it., servers: [git, "fs-*"], tags: [dev], exclude: [fs-secret], prefix: "{id}.",'
        " mode: search, tools: {deny: [x]}, prompts: {allow: [y]}, resources: {deny: [z]}"
    )
    assert view == ViewSpec(
        "v",
        "All of it.",
        ("git", "fs-*"),
        ("dev",),
        ("fs-secret",),
        "{id}.",
        "search",
        Shaping(deny=("x",)),
        Shaping(allow=("y",)),
        Shaping(deny=("z",)),
    )


def test_C5_views_are_found_by_name_and_count_in_comparisons(desk: Desk) -> None:
    catalog, _ = desk.read(f"{SERVERS}views: [{{name: a}}, {{name: b, servers: [git]}}]")
    assert list(catalog.view_by_name) == ["a", "b"]
    assert catalog != desk.read(f"{SERVERS}views: [{{name: a}}, {{name: b}}]")[0]
    assert desk.read(f"{SERVERS}views:\n")[0].views == ()
    assert desk.read(SERVERS)[0].views == ()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("servers: [git]", "View at index 0 missing required field: name"),
        ('name: ""', "View at index 0: name: 1 to 64 letters, digits, _ and - make the name of a view"),
        ("name: a/b", "View 'a/b': name: 1 to 64 letters, digits, _ and - make the name of a view"),
        ("name: 7", "View at index 0: name: expected text, got a number; put it in quotes"),
        ("name: v, mode: find", "View 'v': mode: expected list or search, got 'find'"),
        (
            'name: v, prefix: "{server}_"',
            "View 'v': prefix: only letters, digits, _ . and - belong in a tool's name, and {id} for the server's id",
        ),
        ("name: v, servers: git", "View 'v': servers: expected a list, got text"),
        ('name: v, exclude: [""]', "View 'v': exclude: a pattern must not be empty; * matches all"),
        ("name: v, prompts: {annotate: {a: {}}}", "View 'v': prompts: prompts have no annotations"),
    ],
)
def test_C5_mistakes_in_views_are_named(desk: Desk, keys: str, said: str) -> None:
    assert desk.about(keys) == [said]


def test_C5_two_views_of_one_name(desk: Desk) -> None:
    assert desk.problems(f"{SERVERS}views:\n  - name: a\n  - name: a\n") == ["7:11: Duplicate view name: a"]


def test_C5_views_must_be_a_list(desk: Desk) -> None:
    assert desk.problems(f"{SERVERS}views: {{a: {{}}}}\n") == ["5:8: views: expected a list, got a map"]


def test_C5_mistakes_of_servers_and_views_come_together(desk: Desk) -> None:
    said = desk.problems("servers: [{id: s}]\nviews: [{mode: x}]\n")
    assert [text.partition(": ")[2].partition(" ")[0] for text in said] == ["Server", "View", "View"]


def test_C5_what_selects_nothing_is_warned_about(desk: Desk) -> None:
    _, warnings = desk.read(f"{SERVERS}views:\n  - name: a\n    servers: [gti]\n    tags: [deev]\n    exclude: [x-*]\n")
    assert warnings == [
        "7:15: View 'a': servers[0]: no server has an id like 'gti'",
        "8:12: View 'a': tags[0]: no server has the tag 'deev'",
        "9:15: View 'a': exclude[0]: no server has an id like 'x-*'",
    ]


def test_C5_half_a_pattern_must_not_show_what_it_should_hide(desk: Desk) -> None:
    """A variable that is not set stops a server (compat G16); a view can't be stopped, so it is refused."""
    assert desk.about('name: v, tools: {deny: ["${SECRET_TOOLS}"]}') == [
        "View 'v': the environment variable SECRET_TOOLS is not set"
    ]
    view = desk.view('tools: {deny: ["${SECRET_TOOLS}"]}', SECRET_TOOLS="admin_*")
    assert view.tools.deny == ("admin_*",)


# --------------------------------------------------------------------------------------------------------- settings
def settings_problem(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {})
    (problem,) = caught.value.problems
    return problem.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tool_name_limit: 15", "tool_name_limit: must be from 16 to 128"),
        ("tool_name_limit: 129", "tool_name_limit: must be from 16 to 128"),
        ("list_page_size: 0", "list_page_size: must be at least 1"),
        ("list_timeout_seconds: -1", "list_timeout_seconds: must not be negative"),
        ("max_units_per_server: 0", "max_units_per_server: must be at least 1"),
        ('state_dir: ""', "state_dir: must not be empty"),
    ],
)
def test_C2_C4_settings_of_lists_are_checked(tmp_path: Path, text: str, said: str) -> None:
    assert settings_problem(tmp_path, text) == said


def test_C2_state_dir_is_relative_to_the_config_and_knows_home(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def state_dir(text: str, **overrides: object) -> Path | None:
        path.write_text(text)
        return load_settings(path, {"HOME": "/home/me"}, overrides).value.state_dir

    assert state_dir("state_dir: state") == tmp_path / "state"
    assert state_dir("state_dir: ~/state") == Path("/home/me/state")
    assert state_dir("state_dir: /var/lib/x") == Path("/var/lib/x")
    assert state_dir("listen_addr: 127.0.0.1:1") is None
    assert state_dir("state_dir: state", state_dir="/else") == Path("/else")
