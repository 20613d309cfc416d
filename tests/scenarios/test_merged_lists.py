"""Row C3: however bad some servers are, the merged list holds the others' in time, names who is missing, and heals."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from listers import UNAVAILABLE, Lister, entries, names, wait_until
from peers import LegacyClient, ModernClient
from running import RunningGateway, StdioClient, command

CLIENTS = {"legacy": LegacyClient, "modern": ModernClient}
LIMIT = 4.0
"""Seconds that a list waits for servers."""
SLACK = 1.5
"""Seconds that a busy machine may add to what takes no time."""
RECOVERY = 30.0
"""Seconds within which a server that works again is tried again, after the few failures that a test waits for."""
CHANGED = "notifications/tools/list_changed"


@pytest.fixture(params=["legacy", "modern"])
def era(request: pytest.FixtureRequest) -> str:
    """The era of the client."""
    return str(request.param)


class Ward:
    """Healthy servers among sick ones, and how the sick are healed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        healed = {word: str(folder / f"{word}.healed") for word in ("hang", "fail", "die")}
        self.healthy = [
            Lister(folder, "first", prompts=2, resources=2),
            Lister(folder, "big", tools=2000, pages=64),
            Lister(folder, "repeat", tools=6, pages=3, cursor="repeat"),
            Lister(folder, "endless", tools=6, pages=2, cursor="endless"),
            Lister(folder, "last", prompts=1),
        ]
        gone = Lister(folder, "gone")
        self.command = folder / "not-there-yet"
        gone.entry["runtime"] = {**gone.entry["runtime"], "command": str(self.command)}
        self.sick = {
            "gone": gone,
            "hang": Lister(folder, "hang", hang=healed["hang"]),
            "fail": Lister(folder, "fail", fail=healed["fail"]),
            "die": Lister(folder, "die", die=healed["die"]),
        }
        first, *others = self.healthy
        self.entries = entries([first, *self.sick.values(), *others])
        self.config = {"list_timeout_seconds": LIMIT}

    def gateway(self, **config: Any) -> RunningGateway:
        return RunningGateway(self.folder, self.entries, config={**self.config, **config})

    def heal(self, id: str) -> None:
        """Have one server work from now on."""
        if id == "gone":
            os.symlink(sys.executable, self.command)
        else:
            (self.folder / f"{id}.healed").touch()

    @property
    def wanted(self) -> set[str]:
        """What the healthy list."""
        return set().union(*(lister.names() for lister in self.healthy))

    @property
    def everything(self) -> set[str]:
        """What all of them list when they are healed."""
        return self.wanted.union(*(lister.names() for lister in self.sick.values()))


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    yield Ward(tmp_path)


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.monotonic()
    return what(), time.monotonic() - begin


def missing(result: dict[str, Any]) -> dict[str, str]:
    return dict(result.get("_meta", {}).get(UNAVAILABLE, {}))


def check_reasons(found: dict[str, str]) -> None:
    """Everybody who is missing, with what helps to find out why."""
    assert set(found) == {"gone", "hang", "fail", "die"}
    assert "not-there-yet" in found["gone"]
    assert "still starting" in found["hang"]
    assert "the disk is on fire" in found["fail"]
    assert "3" in found["die"] or "dying as asked" in found["die"], found["die"]


# --------------------------------------------------------------------------------------------------------- in time
def test_C3_the_list_holds_the_healthy_in_time_and_names_the_others(era: str, ward: Ward) -> None:
    with ward.gateway() as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        first, took = timed(lambda: client.request("tools/list"))
        assert LIMIT - 0.2 < took < LIMIT + SLACK  # one hangs, and may come until then
        assert first.status == 200
        check_reasons(missing(first.result))
        if era == "modern":
            assert (first.result["ttlMs"], first.result["cacheScope"]) == (0, "private")
        # Nobody waits for it again, on whatever page.
        found, took = timed(lambda: names(client))
        assert found == ward.wanted and took < SLACK
        assert len(found) == 2000 + 4 * 5 + 2
        for method, count in (("prompts/list", 3), ("resources/list", 2), ("resources/templates/list", 0)):
            reply, took = timed(lambda method=method: client.request(method))
            assert took < SLACK
            (items,) = (value for value in reply.result.values() if isinstance(value, list))
            assert len(items) == count
            check_reasons(missing(reply.result))
        # What is listed can be called, what is not says why.
        assert client.call("big__big-1999").text.startswith("big:big-1999:")
        assert client.call("endless__endless-5").text.startswith("endless:endless-5:")
        assert [lister.starts for lister in ward.healthy] == [1] * 5
        assert ward.sick["hang"].starts == 1


def test_C3_what_was_listed_stays_listed_after_a_restart(era: str, ward: Ward) -> None:
    with ward.gateway() as gateway:
        assert names(CLIENTS[era](gateway, "/mcp")) == ward.wanted
    with ward.gateway() as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        first, took = timed(lambda: client.request("tools/list").result)
        check_reasons(missing(first))
        assert took < LIMIT + SLACK
        assert names(client) == ward.wanted
    assert [lister.starts for lister in ward.healthy] == [1] * 5


def test_C3_many_clients_at_once_wait_for_the_same_starts(ward: Ward) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ward.gateway() as gateway, ThreadPoolExecutor(10) as pool:
        clients = [CLIENTS["legacy" if n % 2 else "modern"](gateway, "/mcp") for n in range(10)]
        found, took = timed(lambda: list(pool.map(lambda client: client.request("tools/list").result, clients)))
        assert took < LIMIT + SLACK
        for result in found:
            check_reasons(missing(result))
        assert {len(result["tools"]) for result in found} == {1000}
        assert [lister.starts for lister in ward.healthy] == [1] * 5
        assert ward.sick["hang"].starts == 1


def test_C3_a_server_that_gives_up_starting_delays_the_first_list_only(era: str, tmp_path: Path) -> None:
    good = Lister(tmp_path, "good")
    hang = Lister(tmp_path, "hang", hang=str(tmp_path / "never"), entry={"start_timeout_seconds": 0.5})
    with RunningGateway(tmp_path, entries([good, hang]), config={"list_timeout_seconds": LIMIT}) as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        first, took = timed(lambda: client.request("tools/list").result)
        assert took < 0.5 + SLACK and set(missing(first)) == {"hang"}
        times = []
        for _ in range(6):
            result, took = timed(lambda: client.request("tools/list").result)
            assert names(client) == good.names() and set(missing(result)) == {"hang"}
            times.append(took)
        assert sorted(times)[3] < 0.5, times


def test_C3_all_of_them_dead_is_an_error_that_says_why(era: str, ward: Ward) -> None:
    ward.entries = [ward.sick["gone"].entry, ward.sick["die"].entry]
    with ward.gateway() as gateway:
        reply = CLIENTS[era](gateway, "/mcp").request("tools/list")
        assert reply.status == 200 and reply.error["code"] == -32603
        assert "gone" in reply.error["message"] and "die" in reply.error["message"]


def test_C3_a_dead_server_does_not_take_its_own_view_with_it(era: str, ward: Ward) -> None:
    ward.entries = [ward.healthy[0].entry, ward.sick["fail"].entry]
    view = {"name": "v", "servers": ["first", "fail"], "prefix": "{id}."}
    with RunningGateway(ward.folder, ward.entries, config=ward.config, views=[view]) as gateway:
        client = CLIENTS[era](gateway, "/views/v/mcp")
        result = client.request("tools/list").result
        assert set(missing(result)) == {"fail"}
        assert names(client) == ward.healthy[0].names("first.")


# ---------------------------------------------------------------------------------------------------------- recovery
@pytest.mark.parametrize("listening", ["before", "after"])
def test_C3_whoever_recovers_is_told_and_listed(era: str, listening: str, ward: Ward) -> None:
    """``listening``: the stream is opened before the first list, or after it, as modern clients mostly do."""
    with ward.gateway() as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        inbox = client.listen() if listening == "before" else None
        check_reasons(missing(client.request("tools/list").result))
        inbox = inbox or client.listen()
        inbox.drained()
        for id in ward.sick:
            ward.heal(id)
        until = time.monotonic() + RECOVERY
        while (found := names(client)) != ward.everything:
            assert ward.wanted <= found and time.monotonic() < until, ward.everything - found
            wait_until(lambda: CHANGED in [message["method"] for message in inbox.drained()], RECOVERY)
        inbox.drained(0.5)  # the last notice may come just after the list that did not need it
        result = client.request("tools/list").result
        assert missing(result) == {}
        assert not {message["method"] for message in inbox.drained(0.5)} & {CHANGED}
        assert [lister.starts for lister in ward.healthy] == [1] * 5
        inbox.close()


def test_C3_nobody_is_told_of_tries_that_fail(era: str, ward: Ward) -> None:
    ward.entries = [ward.healthy[0].entry, *(ward.sick[id].entry for id in ("fail", "die", "gone"))]
    with ward.gateway() as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        inbox = client.listen()
        assert set(missing(client.request("tools/list").result)) == {"fail", "die", "gone"}
        starts = ward.sick["die"].starts
        wait_until(lambda: ward.sick["die"].starts >= starts + 2)  # after 1 and 2 seconds
        assert inbox.drained(0.3) == []
        inbox.close()


def test_C3_without_a_stream_the_next_list_finds_who_recovered(era: str, ward: Ward) -> None:
    with ward.gateway() as gateway:
        client = CLIENTS[era](gateway, "/mcp")
        check_reasons(missing(client.request("tools/list").result))
        for id in ward.sick:
            ward.heal(id)
        wait_until(lambda: names(client) == ward.everything, RECOVERY)
        assert missing(client.request("tools/list").result) == {}


def test_C3_stdio_front_lists_the_healthy_and_is_told_of_the_others(ward: Ward) -> None:
    with ward.gateway() as gateway:
        gateway.stop()  # it has written the files
    client = StdioClient([*command(), "stdio", "--config", str(ward.folder / "config.yaml")])
    try:
        first, took = timed(lambda: client.request("tools/list")["result"])
        assert took < LIMIT + SLACK
        check_reasons(missing(first))
        assert stdio_names(client, first) == ward.wanted
        for id in ward.sick:
            ward.heal(id)
        until = time.monotonic() + RECOVERY
        while (found := stdio_names(client)) != ward.everything:
            assert ward.wanted <= found and time.monotonic() < until, ward.everything - found
            wait_until(lambda: told(client), RECOVERY)
        assert missing(client.request("tools/list")["result"]) == {}
    finally:
        client.close()


def told(client: StdioClient) -> bool:
    """Whether list_changed has come since the last time."""
    client.request("ping")
    methods = [note["method"] for note in client.notes]
    client.notes.clear()
    return CHANGED in methods


def stdio_names(client: StdioClient, page: dict[str, Any] | None = None) -> set[str]:
    page = page or client.request("tools/list")["result"]
    found = [tool["name"] for tool in page["tools"]]
    while "nextCursor" in page:
        page = client.request("tools/list", {"cursor": page["nextCursor"]})["result"]
        found += [tool["name"] for tool in page["tools"]]
    assert len(set(found)) == len(found)
    return set(found)
