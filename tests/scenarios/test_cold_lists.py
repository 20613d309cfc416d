"""Row C2: after a restart lists are answered from what is kept on disk; nothing is started until it is called."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
from listers import UNAVAILABLE, Lister, cpu, entries, filled, names, running, wait_until
from peers import LegacyClient, ModernClient
from running import RunningGateway, StdioClient, command

from gateway.config.model import ServerSpec
from gateway.directory.shelf import Volume
from gateway.directory.store import Store, encoded

CLIENTS = {"legacy": LegacyClient, "modern": ModernClient}
LISTS = ("tools/list", "prompts/list", "resources/list", "resources/templates/list")
NOT_USED = "are not used"


@pytest.fixture(params=["legacy", "modern"])
def era(request: pytest.FixtureRequest) -> str:
    """The era of the client."""
    return str(request.param)


def eight(folder: Path, **said: Any) -> list[Lister]:
    """Eight servers with 200 tools, some in pages, and prompts and resources."""
    return [Lister(folder, f"s{n}", tools=25, pages=1 + n % 3, prompts=2, resources=3, **said) for n in range(8)]


def total(listers: list[Lister]) -> int:
    return sum(lister.starts for lister in listers)


def all_names(listers: list[Lister]) -> set[str]:
    return set().union(*(lister.names() for lister in listers))


def warnings(gateway: RunningGateway) -> list[str]:
    return [line for line in list(gateway.lines) if NOT_USED in line]


# ------------------------------------------------------------------------------------------------------ nothing starts
def test_C2_lists_start_nothing_and_the_first_call_starts_one(era: str, tmp_path: Path) -> None:
    listers = eight(tmp_path)
    filled(tmp_path, listers)
    assert [lister.starts for lister in listers] == [1] * 8
    views = [{"name": "some", "servers": ["s1", "s2"]}, {"name": "find", "servers": ["*"], "mode": "search"}]
    with RunningGateway(tmp_path, entries(listers), views=views) as gateway:
        assert names(CLIENTS[era](gateway, "/mcp")) == all_names(listers)
        for path in ("/mcp", "/views/some/mcp", "/views/find/mcp", "/mcp?mode=search"):
            client = CLIENTS[era](gateway, path)
            for method in LISTS:
                reply = client.request(method).result
                assert UNAVAILABLE not in reply.get("_meta", {})
            if "search" in path or "find" in path:
                found = client.call("search_tools", query="item 7 of s5")
                assert "s5__s5-7" in json.dumps(found.result)
                assert "s5__s5-7" in json.dumps(client.call("describe_tool", name="s5__s5-7").result)
        assert total(listers) == 8
        assert running(gateway.process.pid) == []

        said = CLIENTS[era](gateway, "/mcp").call("s4__s4-3", text="x").text
        (process,) = running(gateway.process.pid)
        assert said.startswith("s4:s4-3:") and '"id": "s4"' in process
        assert total(listers) == 9 and listers[4].starts == 2


def test_C2_stdio_front_lists_without_starting(tmp_path: Path) -> None:
    listers = eight(tmp_path)
    filled(tmp_path, listers)
    client = StdioClient(
        [*command(), "stdio", "--catalog", str(tmp_path / "catalog.yaml"), "--state-dir", str(tmp_path / "state")]
    )
    try:
        reply = client.request("tools/list")["result"]
        assert {tool["name"] for tool in reply["tools"]} == all_names(listers)
        assert running(client.process.pid) == [] and total(listers) == 8
        said = client.request("tools/call", {"name": "s0__s0-0", "arguments": {}})
        assert said["result"]["content"][0]["text"].startswith("s0:s0-0:")
        assert len(running(client.process.pid)) == 1 and total(listers) == 9
    finally:
        client.close()


def test_C2_isolated_servers_are_listed_without_starting_as_well(tmp_path: Path) -> None:
    ways = ("shared", "session", "principal", "tenant", "call")
    listers = [Lister(tmp_path, way, entry={"isolation": way}) for way in ways]
    filled(tmp_path, listers)
    before = total(listers)
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        client = LegacyClient(gateway, "/mcp")
        assert names(client) == all_names(listers)
        assert total(listers) == before and running(gateway.process.pid) == []
        assert client.call("session__session-1").text.startswith("session:session-1:")
        assert total(listers) == before + 1


def test_C2_the_first_list_costs_at_most_three_of_the_second(era: str, tmp_path: Path) -> None:
    """The least that either cost in some gateways: what else the machine does only adds to it."""
    listers = eight(tmp_path)
    filled(tmp_path, listers)
    views = [{"name": "none", "servers": ["nobody-*"]}]
    costs: list[tuple[float, float]] = []
    for _ in range(7):
        with RunningGateway(tmp_path, entries(listers), views=views) as gateway:
            pid = gateway.process.pid
            # The front's own first time is no list's.
            CLIENTS[era](gateway, "/views/none/mcp").request("ping" if era == "legacy" else "server/discover")
            first, second = (cost_of_a_list(CLIENTS[era], gateway) for _ in range(2))
            costs.append((first, second))
            assert running(pid) == []
    assert total(listers) == 8
    least = [min(column) for column in zip(*costs, strict=True)]
    assert least[0] <= 3 * least[1], costs


def cost_of_a_list(kind: Any, gateway: RunningGateway) -> float:
    """CPU of the gateway in milliseconds for a new client, with all that the client needs before it may list."""
    before = settled(gateway.process.pid)
    assert len(kind(gateway, "/mcp").request("tools/list").result["tools"]) == 200
    return settled(gateway.process.pid) - before


def settled(pid: int) -> float:
    """CPU of a process once it has come to rest."""
    found = [cpu(pid)]

    def rests() -> bool:
        found.append(cpu(pid))
        return len(found) > 3 and len(set(found[-3:])) == 1

    wait_until(rests)
    return found[-1]


# --------------------------------------------------------------------------------------------------- other definitions
def test_C2_an_edited_definition_does_not_use_what_was_kept(tmp_path: Path) -> None:
    listers = [Lister(tmp_path, id) for id in ("a", "b", "c")]
    filled(tmp_path, listers)
    a, b, c = listers
    a.entry["env"] = {"COLOUR": "blue"}
    b.entry |= {"request_timeout_seconds": 9, "tools": {"deny": ["b-4"]}, "prefix": "B."}
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        client = LegacyClient(gateway, "/mcp")
        assert names(client) == a.names() | c.names() | (b.names("B.") - {"B.b-4"})
        assert [lister.starts for lister in listers] == [2, 1, 1]
        # The same while it runs.
        c.entry["env"] = {"COLOUR": "red"}
        c.becomes(tools=2)
        inbox = client.listen()
        gateway.write(entries(listers))
        gateway.wait_for_line("Registry updated")
        inbox.next("notifications/tools/list_changed")
        assert names(client) == a.names() | {"c__c-0", "c__c-1"} | (b.names("B.") - {"B.b-4"})
        assert [lister.starts for lister in listers] == [2, 1, 2]
        inbox.close()


def test_C2_a_definition_that_comes_back_finds_what_was_kept(tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a")
    filled(tmp_path, [lister])
    other = Lister(tmp_path, "b")
    with RunningGateway(tmp_path, entries([other])) as gateway:
        client = LegacyClient(gateway, "/mcp")
        assert names(client) == other.names()
        gateway.write(entries([other, lister]))
        gateway.wait_for_line("Registry updated")
        wait_until(lambda: names(client) == other.names() | lister.names())
    assert (lister.starts, other.starts) == (1, 1)


def test_C2_what_is_kept_is_the_definitions_whatever_its_id(tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a")
    filled(tmp_path, [lister])
    lister.entry["id"] = "renamed"
    with RunningGateway(tmp_path, entries([lister])) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == lister.names("renamed__")
        assert lister.starts == 1


# --------------------------------------------------------------------------------------------------- another truth
def test_C2_a_server_that_lists_otherwise_is_believed_and_told_once(era: str, tmp_path: Path) -> None:
    listers = [Lister(tmp_path, "a", prompts=1, resources=1), Lister(tmp_path, "b")]
    filled(tmp_path, listers)
    a, b = listers
    a.becomes(tools=7)
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        assert names(client) == a.names() | b.names()
        inbox = client.listen()
        assert client.call("b__b-1").text.startswith("b:")
        assert inbox.drained(0.6) == []  # it lists what it did
        assert client.call("a__a-1").text.startswith("a:")
        inbox.next("notifications/tools/list_changed")
        assert names(client) == b.names() | {f"a__a-{n}" for n in range(7)}
        assert inbox.drained(0.6) == []
        inbox.close()
        starts = total(listers)
    # And that is what is kept now.
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        assert names(CLIENTS[era](gateway, "/mcp")) == b.names() | {f"a__a-{n}" for n in range(7)}
        assert total(listers) == starts


# ------------------------------------------------------------------------------------------------------- damaged files
def file_of(folder: Path, lister: Lister) -> Path:
    """Where a server's lists are kept."""
    (found,) = [path for path in folder.glob("*.json") if f'"{lister.id}-0"' in path.read_text()]
    return found


def deep(path: Path) -> None:
    path.write_text('{"format":' + "[" * 200_000)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def changed(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


def big(path: Path) -> None:
    os.truncate(path, 65 * 1024 * 1024)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(os.urandom(500)),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "null": lambda path: path.write_text("null"),
    "array": lambda path: path.write_text("[1, 2]"),
    "foreign": lambda path: path.write_text('{"servers": {"x": 1}}'),
    "newer": lambda path: changed(path, format="open-mcp-gateway listing 99"),
    "facts": lambda path: changed(path, facts=["x"]),
    "lists": lambda path: changed(path, lists=7),
    "items": lambda path: changed(path, lists={"tools/list": {"items": ["x"]}}),
    "method": lambda path: changed(path, lists={"tools/burn": {"items": []}}),
    "deep": deep,
    "fifo": fifo,
    "link": link,
    "big": big,
    **({"others": lambda path: os.chown(path, 12345, 12345)} if os.geteuid() == 0 else {}),
}


def test_C2_each_damaged_file_is_warned_about_once_and_made_anew(tmp_path: Path) -> None:
    listers = [Lister(tmp_path, id) for id in (*DAMAGES, "healthy")]
    folder = filled(tmp_path, listers)
    paths = {lister.id: file_of(folder, lister) for lister in listers}
    for id, damage in DAMAGES.items():
        damage(paths[id])
    (folder / "notes.txt").write_text("a foreign file that nobody asked for")
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        for _ in range(2):
            assert names(LegacyClient(gateway, "/mcp")) == all_names(listers)
        said = warnings(gateway)
        assert {id: len([line for line in said if str(path) in line]) for id, path in paths.items()} == {
            **dict.fromkeys(DAMAGES, 1),
            "healthy": 0,
        }
        assert len(said) == len(DAMAGES)
    assert {lister.id: lister.starts for lister in listers} == {**dict.fromkeys(DAMAGES, 2), "healthy": 1}
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == all_names(listers)
        assert warnings(gateway) == []
    assert {lister.starts for lister in listers} == {1, 2}
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 33])
def test_C2_a_damaged_key_is_warned_about_once(key: bytes, tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a")
    folder = filled(tmp_path, [lister])
    (folder / "key").write_bytes(key)
    with RunningGateway(tmp_path, entries([lister])) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == lister.names()
        assert lister.starts == 2
    assert len(warnings(gateway)) == 1 and str(folder / "key") in warnings(gateway)[0]


def test_C2_items_that_are_no_items_do_no_harm(tmp_path: Path) -> None:
    listers = [Lister(tmp_path, "a"), Lister(tmp_path, "b")]
    folder = filled(tmp_path, listers)
    odd = [{}, {"name": 5}, {"name": ["x"]}, {"name": ""}, {"name": "good"}, {"name": "\ud800"}]
    changed(file_of(folder, listers[0]), lists={"tools/list": {"items": odd, "ttl_ms": "x", "public": 1}})
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        found = names(LegacyClient(gateway, "/mcp"))
        assert found >= listers[1].names() | {"a__good"}
        assert not [line for line in gateway.lines if "Traceback" in line]


def test_C2_without_a_folder_to_write_to_it_says_so_once_and_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    listers = [Lister(tmp_path, "a"), Lister(tmp_path, "b")]
    config = {"state_dir": str(tmp_path / "file" / "state")}
    for round in (1, 2):
        with RunningGateway(tmp_path, entries(listers), config=config) as gateway:
            client = LegacyClient(gateway, "/mcp")
            for _ in range(2):
                assert names(client) == all_names(listers)
            assert client.call("a__a-0").text.startswith("a:")
        assert total(listers) == 2 * round
        said = [line for line in gateway.lines if str(tmp_path / "file") in line]
        assert len(said) == 1 and NOT_USED in said[0], said


# ------------------------------------------------------------------------------------------------------- who may read
def test_C2_files_are_private_and_hold_no_secret(tmp_path: Path) -> None:
    secret = "hunter2-correct-horse"
    lister = Lister(tmp_path, "a", entry={"env": {"TOKEN": secret, "OTHER": "${FROM_OUTSIDE}"}})
    before = os.umask(0)
    try:
        folder = filled(tmp_path, [lister], env={"FROM_OUTSIDE": secret[::-1]})
    finally:
        os.umask(before)
    files = list(folder.iterdir())
    assert len(files) == 2  # the lists and the key
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        data = path.read_bytes() + path.name.encode()
        for word in (secret, secret[::-1], "TOKEN", "FROM_OUTSIDE"):
            assert word.encode() not in data
    # The name is no plain digest: another folder has another one for the same definition.
    with RunningGateway(
        tmp_path, entries([lister]), config={"state_dir": str(tmp_path / "other")}, env={"FROM_OUTSIDE": secret[::-1]}
    ) as gateway:
        names(LegacyClient(gateway, "/mcp"))
    others = {path.name for path in (tmp_path / "other" / "listings").iterdir()}
    assert len(others) == 2 and others & {path.name for path in files} == {"key"}


# ------------------------------------------------------------------------------------------------------------- deaths
KILLER = """
import os, signal
real = os.replace
def replace(source, target, **more):
    if str(target).endswith(".json"):
        if {when!r} == "half written":
            os.truncate(source, os.stat(source).st_size // 2)
        if {when!r} == "in place":
            real(source, target, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **more)
os.replace = replace
"""


@pytest.mark.parametrize("when", ["half written", "written", "in place"])
def test_C2_killed_while_it_saves_leaves_what_can_be_used(when: str, tmp_path: Path) -> None:
    listers = [Lister(tmp_path, "a", pad=2000, tools=50), Lister(tmp_path, "b")]
    folder = filled(tmp_path, listers)
    a, b = listers
    a.becomes(tools=60)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILLER.format(when=when))
    gateway = RunningGateway(tmp_path, entries(listers), env={"PYTHONPATH": str(site)})
    try:
        assert LegacyClient(gateway, "/mcp").call("a__a-1").text.startswith("a:")
        assert gateway.process.wait(20) == -signal.SIGKILL
    finally:
        gateway.kill()
    assert [path.suffix for path in folder.iterdir()].count(".new") == (0 if when == "in place" else 1)
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        kept = {f"a__a-{n}" for n in range(60 if when == "in place" else 50)} | b.names()
        client = LegacyClient(gateway, "/mcp")
        assert names(client) == kept and warnings(gateway) == []
        assert (a.starts, b.starts) == (2, 1)
        client.call("a__a-1")
        wait_until(lambda: "a__a-59" in names(client))
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        assert "a__a-59" in names(LegacyClient(gateway, "/mcp"))
        assert (a.starts, b.starts) == (3, 1)


def test_C2_a_file_that_a_killed_process_of_the_same_id_left_is_in_nobodys_way(tmp_path: Path) -> None:
    spec = ServerSpec(id="a", runtime_type="local-process", runtime=None)
    store = Store(tmp_path)
    store.save(spec, encoded(Volume({"serverInfo": {}})))
    kept = store.path(spec)
    kept.with_name(f"{kept.name}.{os.getpid()}.new").write_text("{")
    store.save(spec, encoded(Volume({"serverInfo": {"name": "newer"}})))
    found: list[Volume] = []
    store.load([spec], lambda spec, volume: found.append(volume))
    assert [volume.facts for volume in found] == [{"serverInfo": {"name": "newer"}}]


def test_C2_two_gateways_share_one_folder(tmp_path: Path) -> None:
    listers = eight(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    config = {"state_dir": str(tmp_path / "state")}
    started = []
    for _ in range(2):  # nobody knows anything at first; after that both know all of it

        def run(folder: Path) -> set[str]:
            with RunningGateway(folder, entries(listers), config=config) as gateway:
                found = names(LegacyClient(gateway, "/mcp"))
                assert not warnings(gateway)
                return found

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for found in pool.map(run, folders):
                assert found == all_names(listers)
        started.append(total(listers))
    # One of them may have been so late that it found what the other had kept.
    assert 8 <= started[0] <= 16 and started[1] == started[0]
    kept = list((tmp_path / "state" / "listings").iterdir())
    assert len(kept) == 9 and {path.suffix for path in kept} == {".json", ""}
