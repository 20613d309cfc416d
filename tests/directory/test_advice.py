"""What `check` says of a catalog that is valid and hardly meant."""

from __future__ import annotations

from typing import Any

from gateway.config.model import Catalog, ServerSpec, Shaping, StringMap, ViewSpec
from gateway.directory import LISTS, Listing
from gateway.directory.advice import advise

LISTED = {"tools": ["read", "write"], "prompts": ["ask"], "resources": ["a://1"], "resourceTemplates": ["a://{x}"]}


def server(id: str, **more: Any) -> ServerSpec:
    return ServerSpec(id, None, **more)


def known(spec: ServerSpec, method: str) -> Listing | None:
    """Every server but those called new lists LISTED."""
    if spec.id.startswith("new"):
        return None
    member, key = LISTS[method]
    return Listing(method, tuple({key: name, "name": name} for name in LISTED[member]))


def said(*servers: ServerSpec, views: tuple[ViewSpec, ...] = (), limit: int = 48) -> list[str]:
    return advise(Catalog(servers, views=views), limit, known)


def test_C4_nothing_is_said_of_a_tidy_catalog() -> None:
    shaped = Shaping(allow=("re*", "w*"), deny=("write",), rename=StringMap((("read", "get"),)))
    uris = Shaping(allow=("a://*",), deny=("a://{x}",))
    view = ViewSpec("v", tools=Shaping(deny=("s__get",), describe=StringMap((("s__g*", "x"),))))
    assert said(server("s", tools=shaped, resources=uris), server("s2", resources=Shaping(deny=("*",)))) == []
    assert said(server("s", tools=shaped), views=(view,)) == []


def test_C4_names_that_had_to_be_changed() -> None:
    long = "x" * 40
    assert said(server(long), limit=48) == [
        f"Server '{long}': its prefix '{long}__' takes 42 of the 48 characters that a name may have (tool_name_limit); "
        "a shorter prefix keeps names readable"
    ]
    assert [text.partition(" is too long")[0] for text in said(server("abcdefghijkl"), limit=16)] == [
        "Server 'abcdefghijkl': its prefix 'abcdefghijkl__' takes 14 of the 16 characters that a name may have "
        "(tool_name_limit); a shorter prefix keeps names readable",
        "Server 'abcdefghijkl': 'abcdefghijkl__read'",
        "Server 'abcdefghijkl': 'abcdefghijkl__write'",
        "Server 'abcdefghijkl': 'abcdefghijkl__ask'",
    ]


def test_C4_many_changed_names_are_counted() -> None:
    many = Listing("tools/list", tuple({"name": f"tool number {n}"} for n in range(20)))
    found = advise(Catalog((server("s"),)), 48, lambda spec, method: many if method == "tools/list" else None)
    assert len(found) == 4
    assert found[-1] == "Server 's': so are 17 more names"


def test_C4_clashes_are_told_for_the_view_that_has_them() -> None:
    bare = ViewSpec("bare", prefix="")
    hidden = Shaping(deny=("*",))
    assert said(server("a", resources=hidden), server("b", resources=hidden), views=(bare,)) == [
        "View 'bare': tools/list: 'read' of 'b' clashes with another server's; it is 'b__read'",
        "View 'bare': tools/list: 'write' of 'b' clashes with another server's; it is 'b__write'",
        "View 'bare': prompts/list: 'ask' of 'b' clashes with another server's; it is 'b__ask'",
    ]


def test_C5_patterns_that_match_nothing() -> None:
    shaping = Shaping(
        allow=("read", "raed"),
        deny=("delete_*",),
        rename=StringMap((("wriet", "w"),)),
        describe=StringMap((("x", "y"),)),
    )
    assert said(server("s", tools=shaping)) == [
        "Server 's': tools.allow: 'raed' matches nothing that is listed",
        "Server 's': tools.deny: 'delete_*' matches nothing that is listed",
        "Server 's': tools.describe: 'x' matches nothing that is listed",
        "Server 's': tools.rename: 'wriet' is not listed",
    ]
    assert said(server("new", tools=shaping)) == [], "what it lists is not known"


def test_C5_patterns_of_a_view_meet_the_names_of_the_view() -> None:
    view = ViewSpec("v", prefix="{id}.", tools=Shaping(deny=("read", "s.write")))
    assert said(server("s"), views=(view,)) == ["View 'v': tools.deny: 'read' matches nothing that is listed"]
    assert said(server("s"), server("new"), views=(view,)) == [], "the other server may have it"
