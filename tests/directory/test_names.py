"""Row C4: whatever servers call their things, merged names are legal, unique, stable, and lead back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listers import Lister, entries, names
from peers import LegacyClient, ModernClient
from running import RunningGateway

from gateway.config.model import Catalog, ServerSpec, Settings, Shaping, StringMap, ViewSpec
from gateway.config.snapshot import Snapshot
from gateway.directory import LISTS, Listing, Merged, Plan, Shelf, fit, merge, prefix_of
from gateway.directory.names import stand_ins
from gateway.supervisor import Supervisor
from gateway.views import Face

NAMED = ("tools/list", "prompts/list")
BY_URI = ("resources/list", "resources/templates/list")
ROOT = Path(__file__).resolve().parents[2]

Crowd = tuple[tuple[ServerSpec, tuple[str, ...]], ...]
"""Servers in the catalog's order, and what each has, in its order."""


# ---------------------------------------------------------------------------------------------------- what there may be
WORDS = [
    "a",
    "b",
    "a b",
    "a_b",
    "A",
    "é",
    "e\u0301",
    "日本語",
    "\ud800",
    "\0",
    "b+a",
    "c+a",
    "b+b+a",
    "a__b",
    "a__a",
    "b__b",
    "." * 50,
]
PREFIXES = [None, None, "", "", "a__", "b_", "a", "p" * 40, "-"]
IDS = ["a", "b", "c", "a-b", "ü", "a b", "b__b", "a" * 60, "server"]
LIMITS = [16, 20, 48, 64, 128]


ANY_NAME: st.SearchStrategy[str] = st.one_of(
    st.sampled_from(WORDS),
    st.text("ab_. é/", min_size=1, max_size=5),
    st.text(min_size=1, max_size=8),
    st.sampled_from(["n" * length + end for length in (14, 46, 62, 126, 127, 128, 140) for end in ("", "1", "2", "é")]),
)


@st.composite
def catalogs(draw: st.DrawFn) -> tuple[Crowd, int]:
    """Servers whose names are made to be mistaken for each other's, and the limit."""
    limit = draw(st.sampled_from(LIMITS))
    ids = draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=5, unique=True))
    shared = draw(st.lists(st.one_of(st.sampled_from(WORDS), ANY_NAME), min_size=1, max_size=6, unique=True))
    made: list[tuple[ServerSpec, tuple[str, ...]]] = []
    taken: list[str] = ["a"]
    for id in ids:
        spec = ServerSpec(id, None, "x", prefix=draw(st.sampled_from(PREFIXES)))
        own: list[str] = draw(st.lists(st.sampled_from(shared), max_size=5))
        # What looks like another server's name, made of its prefix, a hash, or what it gets after a clash.
        for name in draw(st.lists(st.sampled_from(taken), max_size=3)):
            looks = [
                name,
                name.removeprefix(prefix_of(spec)) or "a",
                fit(prefix_of(spec) + name, limit),
                next(stand_ins(spec, name, limit)),
            ]
            own.append(draw(st.sampled_from(looks)))
        own += draw(st.lists(ANY_NAME, max_size=3))
        own = list(dict.fromkeys(own))
        draw(st.randoms(use_true_random=False)).shuffle(own)
        made.append((spec, tuple(own)))
        taken += [fit(prefix_of(spec) + name, limit) for name in own]
        taken += [text for name in own[:2] for text in islice(stand_ins(spec, name, limit), 3)]
    return tuple(made), limit


def listing(method: str, own: Sequence[str]) -> Listing:
    key = LISTS[method][1]
    return Listing(method, tuple({key: name, "title": f"title of {name}"} for name in own))


def merged(crowd: Crowd, method: str, limit: int, view: ViewSpec | None = None) -> Merged:
    return merge(method, [(spec, listing(method, own)) for spec, own in crowd], Plan(view, limit=limit))


def names_of(table: Merged) -> dict[tuple[str, str], str]:
    """(server, its own name) -> the name in the table."""
    return {(route.spec.id, route.name): name for name, route in table.routes.items()}


def legal(name: str, limit: int) -> bool:
    return re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{limit}}}", name, re.ASCII) is not None


def check_sound(table: Merged, crowd: Crowd) -> None:
    """Nothing is dropped, nothing is there twice, and each name leads to its own server's item and nothing else."""
    key = LISTS[table.method][1]
    wanted = [(spec.id, name) for spec, own in crowd for name in own]
    assert len(table.items) == len(table.routes) == len(wanted)
    shown = [item[key] for item in table.items]
    assert [(table.routes[name].spec.id, table.routes[name].name) for name in shown] == wanted
    assert list(table.origins) == [id for id, _ in wanted]
    assert [item["title"] for item in table.items] == [f"title of {name}" for _, name in wanted]
    assert [json.loads(text) for text in table.texts] == list(table.items)
    assert json.loads(table.text) == table.result
    assert all(json.loads(route.text) == route.name for route in table.routes.values())


# ----------------------------------------------------------------------------------------------------------- properties
@settings(deadline=None, max_examples=150)
@given(catalogs(), st.sampled_from(NAMED))
def test_C4_names_are_legal_unique_and_lead_back(made: tuple[Crowd, int], method: str) -> None:
    crowd, limit = made
    table = merged(crowd, method, limit)
    check_sound(table, crowd)
    for name in table.routes:
        assert legal(name, limit), name
    found = names_of(table)
    first: dict[str, tuple[str, str]] = {}
    for spec, own in crowd:
        for native in own:
            wanted = prefix_of(spec) + native
            name = found[spec.id, native]
            if first.setdefault(wanted, (spec.id, native)) != (spec.id, native):
                assert name != wanted, "the earlier one has it"
            elif legal(wanted, limit) and name != wanted:
                # What is fine as it is stays so, unless it is what an earlier one has been given.
                assert table.routes[wanted].name != native and any("clash" in text for text in table.problems)


@settings(deadline=None, max_examples=150)
@given(catalogs(), st.sampled_from(BY_URI))
def test_C4_uris_stay_while_unique_and_clashing_ones_can_be_turned_back(made: tuple[Crowd, int], method: str) -> None:
    crowd, limit = made
    table = merged(crowd, method, limit)
    check_sound(table, crowd)
    found = names_of(table)
    seen: set[str] = set()
    for spec, own in crowd:
        for uri in own:
            name = found[spec.id, uri]
            if uri not in seen:
                assert name == uri
            else:
                assert name != uri and re.fullmatch(f"({re.escape(spec.id)}\\+)+", name[: -len(uri)])
            assert name == table.renamed.get(spec.id, {}).get(uri, uri)
            seen.add(name)
    assert set(table.renamed) <= {spec.id for spec, _ in crowd}


@settings(deadline=None, max_examples=60)
@given(catalogs(), st.sampled_from([*NAMED, *BY_URI]), st.data())
def test_C4_names_depend_on_catalog_and_lists_only(made: tuple[Crowd, int], method: str, data: st.DataObject) -> None:
    """However and in whatever order the lists became known, and whatever they were before."""
    crowd, limit = made
    specs = tuple(spec for spec, _ in crowd)
    shelf = Shelf()
    supervisor = with_shelf(shelf)
    face = Face()
    face.renew(Snapshot(Settings(), Catalog(specs)), specs, Plan(limit=limit))
    listings = [(spec, listing(method, own)) for spec, own in crowd]
    past = [(spec, listing(method, (*own[1:], "gone"))) for spec, own in crowd]
    for spec, what in data.draw(st.permutations(past)) + data.draw(st.permutations(listings)):
        shelf.put(spec, what, "")
        if data.draw(st.booleans()):
            face.table(method, supervisor)
    fresh = merged(crowd, method, limit)
    assert face.table(method, supervisor).text == fresh.text
    assert face.table(method, supervisor).mark == fresh.mark
    assert dict(face.table(method, supervisor).routes) == dict(fresh.routes)


def with_shelf(shelf: Shelf) -> Supervisor:
    """A supervisor as far as tables need one."""
    return cast(Supervisor, SimpleNamespace(shelf=shelf))


@settings(deadline=None, max_examples=60)
@given(catalogs(), st.sampled_from([*NAMED, *BY_URI]), st.data())
def test_C4_whatever_later_servers_do_renames_nothing_of_earlier_ones(
    made: tuple[Crowd, int], method: str, data: st.DataObject
) -> None:
    crowd, limit = made
    before = names_of(merged(crowd, method, limit))
    place = data.draw(st.integers(0, len(crowd) - 1))
    spec, own = crowd[place]
    earlier = {spec.id for spec, _ in crowd[:place]}

    def kept(other: Crowd) -> dict[tuple[str, str], str]:
        return {pair: name for pair, name in names_of(merged(other, method, limit)).items() if pair[0] in earlier}

    mine = {pair: name for pair, name in before.items() if pair[0] in earlier}
    assert kept(crowd[:place]) == mine, "all later ones removed"
    assert kept(crowd[:place] + crowd[place + 1 :]) == mine, "one of them removed"
    new = (ServerSpec("new", None, "x", prefix=data.draw(st.sampled_from(PREFIXES))), own)
    assert kept((*crowd[:place], new, *crowd[place:])) == mine, "one put before it"
    more = data.draw(st.one_of(ANY_NAME, st.sampled_from(sorted(before.values()) or ["a"])))
    at = data.draw(st.integers(0, len(own)))
    grown = (spec, own if more in own else (*own[:at], more, *own[at:]))
    assert kept((*crowd[:place], grown, *crowd[place + 1 :])) == mine, "a tool added anywhere in it"
    # A tool added at its end renames none that it had.
    behind = names_of(merged((*crowd[:place], (spec, own if more in own else (*own, more))), method, limit))
    assert {pair: name for pair, name in behind.items() if pair != (spec.id, more) or more in own} == {
        pair: name for pair, name in before.items() if pair[0] in earlier or pair[0] == spec.id
    }


@settings(deadline=None, max_examples=60)
@given(catalogs(), st.data())
def test_C4_a_new_id_with_the_same_prefix_keeps_names(made: tuple[Crowd, int], data: st.DataObject) -> None:
    """Only what clashes has its server's id in its name, or in its hash."""
    crowd, limit = made
    place = data.draw(st.integers(0, len(crowd) - 1))
    spec, own = crowd[place]
    given_prefix = attrs.evolve(spec, prefix=prefix_of(spec) if legal(prefix_of(spec) or "a", 128) else "given_")
    before = (*crowd[:place], (given_prefix, own), *crowd[place + 1 :])
    after = (*crowd[:place], (attrs.evolve(given_prefix, id="renamed"), own), *crowd[place + 1 :])
    for method in NAMED:
        one, other = merged(before, method, limit), merged(after, method, limit)
        if not one.problems:
            assert list(other.routes) == list(one.routes) and other.texts == one.texts
        else:  # whatever comes before the first clash
            upto = next(n for n, item in enumerate(one.items) if f"it is '{item['name']}'" in one.problems[0])
            assert list(other.routes)[:upto] == list(one.routes)[:upto]


@settings(deadline=None, max_examples=150)
@given(catalogs(), st.data())
def test_C4_views_that_rename_and_prefix_obey_the_same_rules(made: tuple[Crowd, int], data: st.DataObject) -> None:
    crowd, limit = made
    prefix = data.draw(st.sampled_from([None, "", "{id}.", "{id}{id}", "v_"]))
    plain = merged(crowd, "tools/list", limit, ViewSpec("v", prefix=prefix))
    some = data.draw(st.lists(st.sampled_from(sorted(plain.routes) or ["a"]), max_size=3, unique=True))
    new = data.draw(st.permutations(["a", "b", "a__b", "b_", "x" * 60, "y" * 120]))
    view = ViewSpec("v", prefix=prefix, tools=Shaping(rename=StringMap(tuple(zip(some, new, strict=False)))))
    table = merged(crowd, "tools/list", limit, view)
    assert len(table.items) == len(table.routes)
    assert [item["name"] for item in table.items] == list(table.routes)
    for name, route in table.routes.items():
        assert legal(name, limit), name
        assert (route.spec.id, route.name) in names_of(plain)
    assert len({(route.spec.id, route.name) for route in table.routes.values()}) == len(table.routes)


# ------------------------------------------------------------------------------------------------------------- by hand
def table(*servers: tuple[ServerSpec, list[str]], view: ViewSpec | None = None, limit: int = 48) -> dict[str, str]:
    """Name in the table -> "server:its own name"."""
    found = merged(tuple((spec, tuple(own)) for spec, own in servers), "tools/list", limit, view)
    return {name: f"{route.spec.id}:{route.name}" for name, route in found.routes.items()}


def bare(id: str, **more: Any) -> ServerSpec:
    return ServerSpec(id, None, "x", **{"prefix": "", **more})


def test_C4_the_same_tool_in_ten_servers() -> None:
    ids = [f"s{n}" for n in range(10)]
    assert table(*((ServerSpec(id, None), ["echo"]) for id in ids)) == {f"{id}__echo": f"{id}:echo" for id in ids}
    assert table(*((bare(id), ["echo"]) for id in ids)) == {
        "echo": "s0:echo",
        **{f"{id}__echo": f"{id}:echo" for id in ids[1:]},
    }
    # What the later ones would be called has been taken as well.
    taken = [f"{id}__echo" for id in ids]
    found = table((bare("first"), ["echo", *taken]), *((bare(id), ["echo"]) for id in ids))
    assert list(found)[:11] == ["echo", *taken]
    assert all(re.fullmatch("echo_[0-9a-f]{6}", name) for name in list(found)[11:])
    assert list(found.values()) == ["first:echo", *(f"first:{name}" for name in taken), *(f"{id}:echo" for id in ids)]


def test_C4_names_of_all_kinds_are_what_they_were() -> None:
    """Written down: what clients have learned and approved must not change with a release."""
    long = "n" * 128
    own = ["ok", "a b", "a_b", "", long, long + "x", "größe", "日本語", "\ud800", "x.y-z"]
    assert table((ServerSpec("s", None), [name for name in own if name])) == {
        "s__ok": "s:ok",
        "s__a_b_496b09": "s:a b",
        "s__a_b": "s:a_b",
        "s__nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn_688fd7": f"s:{long}",
        "s__nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn_e44610": f"s:{long}x",
        "s__gr__e_02693b": "s:größe",
        "s______2d9ee3": "s:日本語",
        "s____fe41c2": "s:\ud800",
        "s__x.y-z": "s:x.y-z",
    }
    assert table((ServerSpec("ü b", None), ["t"])) == {"__b__t_38d88b": "ü b:t"}


def test_C4_a_uri_that_looks_like_a_clashing_one_stays_too() -> None:
    crowd = ((bare("a"), ("x://1", "b+x://1", "b+b+x://1")), (bare("b"), ("x://1", "b+x://1")))
    found = merged(crowd, "resources/list", 48)
    assert [(name, route.spec.id, route.name) for name, route in found.routes.items()] == [
        ("x://1", "a", "x://1"),
        ("b+x://1", "a", "b+x://1"),
        ("b+b+x://1", "a", "b+b+x://1"),
        ("b+b+b+x://1", "b", "x://1"),
        ("b+b+b+b+x://1", "b", "b+x://1"),
    ]
    assert found.renamed == {"b": {"x://1": "b+b+b+x://1", "b+x://1": "b+b+b+b+x://1"}}


def test_C4_a_clashing_name_is_made_of_what_the_entry_calls_it() -> None:
    renamed = bare("b", tools=Shaping(rename=StringMap((("delete_everything", "clean"),))))
    assert table((bare("a"), ["clean"]), (renamed, ["delete_everything"])) == {
        "clean": "a:clean",
        "b__clean": "b:delete_everything",
    }


def test_C4_a_name_given_by_a_view_has_the_same_limit() -> None:
    view = ViewSpec("v", tools=Shaping(rename=StringMap((("a__t", "x" * 128),))))
    assert list(table((ServerSpec("a", None), ["t"]), view=view)) == [fit("x" * 128)]


CLASHING = ((bare("a"), ["echo", "stop"]), (bare("b"), ["echo", "stop"]))


@pytest.mark.parametrize(
    ("shaping", "shown"),
    [
        # Hidden is hidden, whoever else comes to have the like ...
        (Shaping(deny=("stop",)), {"echo": "a:echo", "b__echo": "b:echo"}),
        (Shaping(deny=("[!b]*",)), {}),
        # ... and the name in the list is one that can be written down, too.
        (Shaping(deny=("b__echo",)), {"echo": "a:echo", "stop": "a:stop", "b__stop": "b:stop"}),
        (Shaping(deny=("b__*",)), {"echo": "a:echo", "stop": "a:stop"}),
        (Shaping(allow=("echo",)), {"echo": "a:echo", "b__echo": "b:echo"}),
        (Shaping(allow=("echo", "b__stop")), {"echo": "a:echo", "b__echo": "b:echo"}),
        (
            Shaping(rename=StringMap((("b__echo", "other"), ("stop", "halt")))),
            {"echo": "a:echo", "halt": "a:stop", "other": "b:echo", "b__stop": "b:stop"},
        ),
        # A name that a view gives is not given twice.
        (
            Shaping(rename=StringMap((("echo", "b__echo"),))),
            {"b__echo": "a:echo", "stop": "a:stop", "echo_6cf595": "b:echo", "b__stop": "b:stop"},
        ),
    ],
)
def test_C4_C5_what_clashes_meets_a_views_patterns_under_both_names(shaping: Shaping, shown: dict[str, str]) -> None:
    assert table(*CLASHING, view=ViewSpec("v", tools=shaping)) == shown


# ------------------------------------------------------------------------------------------------- replicas, processes
REMADE = """
import json, sys
from gateway.config.model import ServerSpec
from gateway.directory import Listing, Plan, merge
method, limit, servers = json.loads(sys.argv[1])
pairs = [(ServerSpec(id, None, prefix=prefix), Listing(method, tuple(items))) for id, prefix, items in servers]
table = merge(method, pairs, Plan(limit=limit))
print(json.dumps([table.text, table.mark, [[name, r.spec.id, r.name] for name, r in table.routes.items()]]))
"""


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_C4_names_are_the_same_in_another_process(seed: str) -> None:
    own = [*WORDS, "n" * 128, *(f"t{n}" for n in range(50)), *(fit(f"{id}__a b") for id in IDS)]
    crowd = tuple((ServerSpec(id, None, prefix=PREFIXES[n % len(PREFIXES)]), tuple(own)) for n, id in enumerate(IDS))
    for method in ("tools/list", "resources/list"):
        here = merged(crowd, method, 48)
        servers = [(spec.id, spec.prefix, listing(method, own).items) for spec, own in crowd]
        done = subprocess.run(
            [sys.executable, "-c", REMADE, json.dumps([method, 48, servers])],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        text, mark, routes = json.loads(done.stdout)
        assert (text, mark) == (here.text, here.mark)
        assert routes == [[name, route.spec.id, route.name] for name, route in here.routes.items()]


CLIENTS = {"legacy": LegacyClient, "modern": ModernClient}
ALL_LISTS = tuple(LISTS)


def strange(folder: Path) -> list[Lister]:
    """Servers whose tools, prompts and resources clash in every way."""
    folder.mkdir(exist_ok=True)
    odd = ["echo", "a b", "größe", "n" * 140, "b__echo"]
    more: dict[str, Any] = {
        "names": odd,
        "prompts": 2,
        "prompt_names": ["ask", "fr\u00e4ge"],
        "uris": ["x://1", "x://\u00e4"],
        "templates": ["x://{n}"],
    }
    return [Lister(folder, id, entry={"prefix": ""} if id != "c" else {}, **more) for id in "abcd"]


def whole_lists(client: Any) -> dict[str, list[bytes]]:
    """The bytes of all pages, by list method; ids of requests are the same for clients that did the same."""
    found: dict[str, list[bytes]] = {}
    for method in ALL_LISTS:
        pages = [client.request(method)]
        while cursor := pages[-1].result.get("nextCursor"):
            pages.append(client.request(method, {"cursor": cursor}))
        found[method] = [page.raw for page in pages]
    return found


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_C4_replicas_and_restarts_list_the_same_bytes(era: str, tmp_path: Path) -> None:
    """Two gateways that have never heard of each other, the servers becoming known in another order at each."""
    folders = [tmp_path / "one", tmp_path / "two"]
    listers = [strange(folder) for folder in folders]
    config = {"list_page_size": 7}
    with (
        RunningGateway(folders[0], entries(listers[0]), config=config) as one,
        RunningGateway(folders[1], entries(listers[1]), config=config) as two,
    ):
        for id in "dcba":  # started one by one at the second, the last first
            assert len(CLIENTS[era](two, f"/servers/{id}/mcp").request("tools/list").result["tools"]) == 5
        first, second = whole_lists(CLIENTS[era](one, "/mcp")), whole_lists(CLIENTS[era](two, "/mcp"))
        assert first == second
        assert [len(pages) for pages in first.values()] == [3, 2, 2, 1]
        # A client may go on at the other replica, and what it calls there is the same server's.
        client, other = CLIENTS[era](one, "/mcp"), CLIENTS[era](two, "/mcp")
        cursor = client.request("tools/list").result["nextCursor"]
        rest = other.request("tools/list", {"cursor": cursor}).result["tools"]
        assert rest == client.request("tools/list", {"cursor": cursor}).result["tools"]
        for name in sorted(names(client)):
            said = [who.call(name).text.rpartition(":")[0] for who in (client, other)]
            assert said[0] == said[1]
    for folder, again in zip(folders, listers, strict=True):
        with RunningGateway(folder, entries(again), config=config) as gateway:
            starts = [lister.starts for lister in again]
            assert whole_lists(CLIENTS[era](gateway, "/mcp")) == first
            assert [lister.starts for lister in again] == starts
