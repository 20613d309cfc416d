"""Row B8: what real gateways got wrong (protocol.md section 9), one test and more for each of the ten, in both eras.

All on real gateways, real processes and raw HTTP; servers are the recorded ones of ``peers``.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peers import (
    ALL,
    META,
    MODERN,
    AnyClient,
    House,
    Json,
    LegacyClient,
    ModernClient,
    Record,
    answers_to,
    items,
    wait_until,
)
from running import RunningGateway

UNAVAILABLE = "io.github.open-mcp-gateway/unavailable"
LISTS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}
SERVERS = ("lpipe", "mpipe", "lhttp", "mhttp")
CLIENTS: dict[str, type[AnyClient]] = {"legacy": LegacyClient, "modern": ModernClient}


@pytest.fixture(params=["legacy", "modern"])
def front(request: pytest.FixtureRequest) -> str:
    """The era of the client."""
    return str(request.param)


def client_of(front: str, gateway: RunningGateway, path: str, *args: Any, **more: Any) -> Any:
    """A client of an era."""
    return CLIENTS[front](gateway, path, *args, **more)


def four(house: House, *more: str, **entry: Any) -> None:
    """A server of each era, on a pipe and at a URL."""
    house.pipe("lpipe", "legacy", *more, **entry)
    house.pipe("mpipe", "modern", *more, **entry)
    house.http("lhttp", "legacy", *more, **entry)
    house.http("mhttp", "modern", *more, **entry)


def program(house: House, id: str, code: str, **more: Any) -> None:
    """An entry whose command is a few lines of Python."""
    runtime = {"type": "local-process", "command": sys.executable, "args": ["-I", "-S", "-c", code]}
    house.entries.append({"id": id, "runtime": runtime, **more})


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Every session and every principal has servers of its own."""
    built = House(
        tmp_path_factory.mktemp("own"),
        api_key="open",
        tenants=[{"id": name, "api_key": f"key-{name}", "namespaces": ["default"]} for name in ("ann", "bob")],
    )
    four(built, isolation="session")
    with built:
        yield built


KEY = {"Authorization": "Bearer open"}


# ------------------------------------------------------------------------------------ 1. one dead server fails the list
@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Four good servers, one that ends at once, one that never says a word, one that is not there."""
    built = House(tmp_path_factory.mktemp("sick"))
    program(built, "dead", "raise SystemExit(4)")
    four(built)
    program(built, "mute", "import time; time.sleep(600)", start_timeout_seconds=1)
    built.at("gone", "http://127.0.0.1:9/mcp")
    with built:
        yield built


@pytest.mark.parametrize("method", list(LISTS))
def test_pitfall_1_dead_servers_do_not_fail_the_list(sick: House, front: str, method: str) -> None:
    client = client_of(front, sick.gateway, "/mcp")
    reply = client.request(method)
    assert reply.status == 200
    listed = items([reply.result], LISTS[method])
    if LISTS[method] in ("tools", "prompts"):
        assert {name.partition("__")[0] for name in listed} == set(SERVERS)
    else:
        assert {name.partition(":")[0] for name in listed} == set(SERVERS)
    unavailable = reply.result["_meta"][UNAVAILABLE]
    assert set(unavailable) == {"dead", "mute", "gone"}, "what is missing is named"
    assert all(isinstance(why, str) and why for why in unavailable.values())
    if front == "modern":
        assert (reply.result["ttlMs"], reply.result["cacheScope"]) == (0, "private"), "it is soon out of date"
    client.close()


def test_pitfall_1_calls_go_on_beside_dead_servers(sick: House, front: str) -> None:
    client = client_of(front, sick.gateway, "/mcp")
    for server in SERVERS:
        assert client.call(f"{server}__echo", text=server).text == server
    reply = client.call("dead__echo", text="x")
    assert "error" in reply.message or reply.result["isError"], "nothing is made up"
    client.close()


def test_pitfall_1_only_when_all_are_dead_the_list_fails(front: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    program(house, "dead", "raise SystemExit(4)")
    program(house, "buried", "raise SystemExit(5)")
    with house:
        reply = client_of(front, house.gateway, "/mcp").request("tools/list")
        assert (reply.status, reply.error["code"]) == (200, -32603)
        assert "dead" in reply.error["message"] and "buried" in reply.error["message"]


# ---------------------------------------------------------------------------------------------------- 2. the first page
@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Servers with one item a page."""
    built = House(tmp_path_factory.mktemp("paged"))
    four(built, "--page", "1")
    built.pipe("endless", "legacy", "--page", "-4")
    built.pipe("whole", "legacy")
    with built:
        yield built


@pytest.mark.parametrize("method", list(LISTS))
def test_pitfall_2_every_page_is_read(paged: House, front: str, method: str) -> None:
    """The first cursor is "", which is a cursor as good as any; only where there is none the list ends."""
    member = LISTS[method]
    whole = client_of(front, paged.gateway, "/servers/whole/mcp")
    wanted = {re.sub("^whole", "", name) for name in items(whole.pages(method), member)}
    merged = client_of(front, paged.gateway, "/mcp")
    every = items(merged.pages(method), member)
    for server in SERVERS:
        own = client_of(front, paged.gateway, f"/servers/{server}/mcp")
        pages = own.pages(method)
        assert {re.sub(f"^{server}", "", name) for name in items(pages, member)} == wanted
        assert len(pages) == len(wanted), "the server's own pages are the client's"
        prefix = f"{server}__" if member in ("tools", "prompts") else server
        assert {name.removeprefix(prefix) for name in every if name.startswith(prefix)} == wanted
        own.close()
    whole.close()
    merged.close()


def test_pitfall_2_a_list_without_an_end_ends(paged: House, front: str) -> None:
    merged = client_of(front, paged.gateway, "/mcp")
    every = items(merged.pages("tools/list"), "tools")
    assert len([name for name in every if name.startswith("endless__")]) == len(
        [name for name in every if name.startswith("whole__")]
    )
    asked = paged.records["endless"].got("tools/list")
    assert len(asked) <= 2 * len(every), "a cursor that comes again is not followed"
    merged.close()


# -------------------------------------------------------------------------------------- 3. whose session is it upstream
@pytest.mark.parametrize("server", ["lpipe", "lhttp"])
def test_pitfall_3_sessions_have_their_own_state_and_keep_it(own: House, server: str) -> None:
    path = f"/servers/{server}/mcp"
    one, two = (LegacyClient(own.gateway, path, headers=KEY) for _ in range(2))
    assert one.call("remember", value="one's").text == ""
    assert two.call("remember", value="two's").text == "", "another session's state is in it"
    assert one.call("remember", value="x").text == "one's", "its own state is lost"
    assert two.call("remember", value="x").text == "two's"
    one.close()
    again = LegacyClient(own.gateway, path, headers=KEY)
    assert again.call("remember", value="x").text == "", "a new session begins anew"
    for client in (two, again):
        client.close()


@pytest.mark.parametrize("server", ["lpipe", "lhttp"])
def test_pitfall_3_principals_have_their_own_state_and_keep_it(own: House, server: str) -> None:
    """A modern client has no session, its principal is one (protocol.md section 4.6)."""
    path = f"/servers/{server}/mcp"
    ann, bob = (ModernClient(own.gateway, path, headers={"X-API-Key": f"key-{name}"}) for name in ("ann", "bob"))
    assert ann.call("remember", value="ann's").text == ""
    assert bob.call("remember", value="bob's").text == ""
    assert ann.call("remember", value="ann's").text == "ann's"
    assert bob.call("remember", value="bob's").text == "bob's"
    session = LegacyClient(own.gateway, path, headers={"X-API-Key": "key-ann"})
    assert session.call("remember", value="x").text == "", "nor does it share one with its own legacy sessions"
    session.close()


def test_pitfall_3_a_parked_call_is_its_principals(own: House) -> None:
    """What one principal's call waits for is not another's to answer, and no session's to see."""
    path = "/servers/lpipe/mcp"
    ann, bob = (ModernClient(own.gateway, path, headers={"X-API-Key": f"key-{name}"}) for name in ("ann", "bob"))
    params = {"name": "ask", "arguments": {"kinds": ["roots"], "tag": "parked"}}
    first = ann.request("tools/call", params).result
    (key,) = first["inputRequests"]
    again = {**params, "inputResponses": {key: {"roots": []}}, "requestState": first["requestState"]}
    refused = bob.request("tools/call", again)
    assert (refused.status, refused.error["code"]) == (400, -32602)
    assert "roots" in ann.request("tools/call", again).text


# ------------------------------------------------------------------------------------------------ 4. later elicitations
@pytest.mark.parametrize("server", SERVERS)
def test_pitfall_4_later_questions_belong_to_later_calls(own: House, front: str, server: str) -> None:
    client = client_of(front, own.gateway, f"/servers/{server}/mcp", headers=KEY)
    client.call("echo", text="the first request asks nothing")
    for n in range(4):
        tag = f"later-{front}-{server}-{n}"
        reply = client.ask("tools/call", {"name": "ask", "arguments": {"kinds": ["elicitation"], "tag": tag}})
        # ``finish`` has read it from the stream of this very request, or ``ask`` from its result.
        assert client.asked[-1]["params"]["message"] == f"name for {tag}"
        assert "Ada" in reply.text
    assert len(client.asked) == 4
    client.close()


@pytest.mark.parametrize("server", ["mpipe", "lhttp", "mhttp"])
def test_pitfall_4_questions_of_calls_at_once_are_not_mixed_up(own: House, front: str, server: str) -> None:
    """(A legacy pipe does not say whose its questions are; there, calls at once are not asked at all.)"""
    tags = [f"at-once-{front}-{server}-{n}" for n in range(4)]
    session = client_of(front, own.gateway, f"/servers/{server}/mcp", headers=KEY)
    together = threading.Barrier(len(tags))

    def run(tag: str) -> None:
        client = session
        if front == "modern":
            client = ModernClient(own.gateway, f"/servers/{server}/mcp", headers=KEY)

        def answer(question: Json) -> Json:
            assert question["params"]["message"] == f"name for {tag}"
            together.wait(10)
            return {"action": "accept", "content": {"name": tag}}

        params = {"name": "ask", "arguments": {"kinds": ["elicitation"], "tag": tag}}
        if front == "legacy":
            reply = one_call(client, params, tag, answer)
        else:
            client.answerer = answer
            reply = client.ask("tools/call", params)
        assert f'"{tag}"' in reply.text
        assert not [other for other in tags if other != tag and other in reply.text]

    with concurrent.futures.ThreadPoolExecutor(len(tags)) as pool:
        list(pool.map(run, tags))
    session.close()


def one_call(session: LegacyClient, params: Json, id: str, answerer: Any) -> Any:
    """A call of a session that has several at once: only its own stream counts."""
    twin = object.__new__(LegacyClient)
    twin.__dict__.update(session.__dict__, answerer=answerer, asked=[])
    return twin.request("tools/call", params, id=id)


# --------------------------------------------------------------------------------------------- 5. stale server sessions
def test_pitfall_5_a_lost_session_is_opened_anew(own: House, front: str) -> None:
    client = client_of(front, own.gateway, "/servers/lhttp/mcp", headers=KEY)
    record = own.records["lhttp"]
    for n in range(2):
        assert client.call("forget").text == "forgotten"
        tag = f"stale-{front}-{n}"
        assert client.call("echo", text=tag, tag=tag).text == tag, "an empty success, or none"
        sent = [call for call in record.calls(tag) if not call.get("unknown")]
        assert len(sent) == 1, "it was executed once"
        client.call("forget")
        assert len(items(client.pages("tools/list"), "tools")) > 10
    client.close()


def test_pitfall_5_a_lost_server_is_an_error(front: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    house.http("lhttp", "legacy")
    house.http("mhttp", "modern")
    with house:
        clients = [client_of(front, house.gateway, f"/servers/{id}/mcp") for id in ("lhttp", "mhttp")]
        for client in clients:
            assert client.call("echo", text="up").text == "up"
        for process in house._running:
            process.kill()
            process.wait()
        for client in clients:
            reply = client.request("resources/list")
            assert (reply.status, reply.error["code"]) == (200, -32603)
            assert client.call("echo", text="up").result["isError"] is True


# ------------------------------------------------------------------------------------------------ 6. eras of both sides
@pytest.mark.parametrize("carrier", ["pipe", "http"])
def test_pitfall_6_the_clients_era_does_not_decide_the_servers(carrier: str, front: str, tmp_path: Path) -> None:
    """Whoever comes first: a shared server is spoken to in the modern era where it knows that."""
    house = House(tmp_path)
    for era in ("legacy", "modern", "both"):
        (house.pipe if carrier == "pipe" else house.http)(era, era)
    with house:
        for era in ("legacy", "modern", "both"):
            path = f"/servers/{era}/mcp"
            first = client_of(front, house.gateway, path)
            assert first.call("echo", text="t").text == "t"
            other = client_of("modern" if front == "legacy" else "legacy", house.gateway, path)
            assert other.call("echo", text="t", tag="other").text == "t"
            arrived = house.records[era].call("other")
            context = (arrived["params"].get("_meta") or {}).get(f"{META}protocolVersion")
            assert context == (None if era == "legacy" else MODERN)
            started = house.records[era].got("initialize" if era == "legacy" else "server/discover")
            assert len(started) == 1, "one server for both"


def test_pitfall_6_a_modern_client_is_known_by_its_whole_body(own: House) -> None:
    """What makes a request modern may be the last of its members, far behind whatever a first look sees."""
    client = ModernClient(own.gateway, "/servers/lpipe/mcp", headers=KEY)
    message = client.message("tools/call", {"name": "echo", "arguments": {"text": "x" * 400_000}})
    params = message["params"]
    message["params"] = {"name": params["name"], "arguments": params["arguments"], "_meta": params["_meta"]}
    ordered = {"params": message["params"], "method": "tools/call", "jsonrpc": "2.0", "id": message["id"]}
    reply = client.finish(client.send(ordered))
    assert reply.result["resultType"] == "complete" and len(reply.text) == 400_000
    # Without the header it is a modern request that lacks it, not a legacy one.
    for sent in (client.message("tools/list"), ordered):
        refused = client.finish(client.send(sent, MCP_Protocol_Version=None))
        assert (refused.status, refused.error["code"]) == (400, -32020)


def test_pitfall_6_eras_alternate_on_one_connection(own: House) -> None:
    """HTTP connections are shared by clients behind a proxy: the era is each request's."""
    import http.client

    path = "/servers/mpipe/mcp"
    session = LegacyClient(own.gateway, path, headers=KEY)
    modern = ModernClient(own.gateway, path, headers=KEY)
    connection = http.client.HTTPConnection("127.0.0.1", own.gateway.port, timeout=10)
    common = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json", **KEY}
    for n in range(3):
        context = modern.message("tools/call", {"name": "echo", "arguments": {"text": f"m{n}"}})
        mirror = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "echo"}
        plain = {**context, "params": {"name": "echo", "arguments": {"text": f"l{n}"}}}
        for message, headers, text in ((context, mirror, f"m{n}"), (plain, session.session, f"l{n}")):
            connection.request("POST", path, json.dumps(message), {**common, **headers})
            result = json.loads(connection.getresponse().read())["result"]
            assert result["content"][0]["text"] == text
            assert ("resultType" in result) is (text[0] == "m")
    connection.close()
    session.close()


# ---------------------------------------------------------------------------------------------- 7. everything is passed
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("merged", [False, True], ids=["own", "merged"])
def test_pitfall_7_nothing_is_left_out(own: House, front: str, server: str, merged: bool) -> None:
    path, prefix = ("/mcp", f"{server}__") if merged else (f"/servers/{server}/mcp", "")
    client = client_of(front, own.gateway, path, headers=KEY)
    tag = f"all-{front}-{server}-{merged}"
    meta = {
        "example.com/a": {"b": [1, None, "ü"]},
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    params = {"name": f"{prefix}echo", "arguments": {"text": tag, "tag": tag}, "_meta": meta, "example.com/more": [{}]}
    result = client.request("tools/call", params, token="t").result
    arrived = own.records[server].call(tag)["params"]
    assert {name: arrived["_meta"][name] for name in meta} == meta
    assert arrived["example.com/more"] == [{}]
    assert result["structuredContent"] == {"text": tag}
    assert result["example.com/future"] == {"a": [1, None]}
    assert result["_meta"]["example.com/trace"] == "t-1"
    assert result["content"][0]["annotations"] == {"priority": 0.5}
    assert result["content"][0]["example.com/block"] == {"x": [True]}
    progress = client.call(f"{prefix}steps", token="p").noted("notifications/progress")
    assert progress[1] == {"progressToken": "p", "progress": 2, "total": 10, "message": "step 2", "example.com/more": 2}
    found = items(client.pages("tools/list"), "tools")[f"{prefix}echo"]
    assert found["annotations"]["example.com/hint"] == 1 and found["_meta"] == {"example.com/kept": [1, {"a": None}]}
    client.close()


# ------------------------------------------------------------------------------------------------ 8. servers' questions
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("merged", [False, True], ids=["own", "merged"])
def test_pitfall_8_questions_reach_the_client(own: House, front: str, server: str, merged: bool) -> None:
    path, prefix = ("/mcp", f"{server}__") if merged else (f"/servers/{server}/mcp", "")
    client = client_of(front, own.gateway, path, headers=KEY)
    kinds = ["sampling", "elicitation", "roots"]
    tag = f"asks-{front}-{server}-{merged}"
    params = {"name": f"{prefix}ask", "arguments": {"kinds": kinds, "tag": tag}}
    reply = client.ask("tools/call", params)
    (told,) = json.loads(reply.text)
    methods = {"sampling": "sampling/createMessage", "elicitation": "elicitation/create", "roots": "roots/list"}
    assert told == {kind: {"result": answers_to({"method": methods[kind]})} for kind in kinds}
    arrived = own.records[server].calls(tag)[0]
    if server.startswith("m"):
        declared = arrived["params"]["_meta"][f"{META}clientCapabilities"]
        assert declared == (ALL if front == "modern" else {**ALL, "roots": {}})
    else:
        said = own.records[server].got("initialize")
        hello = [m for m in said if m["pid"] == arrived["pid"] and server == "lpipe"] or said
        assert all(m["params"]["capabilities"] == ALL for m in hello), "it was told that nobody can be asked"
    client.close()


# ------------------------------------------------------------------------------------------------------------- 9. names
def test_pitfall_9_names_are_short_unique_and_stay(front: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    long_id = "a-server-with-a-name-that-somebody-thought-about-for-a-long-time"
    house.pipe(long_id, "legacy", "--long", "--name", "one")
    house.pipe("short", "modern", "--long", "--name", "two")
    second = house.entries.pop()
    with house:
        client = client_of(front, house.gateway, "/mcp")
        alone = items(client.pages("tools/list"), "tools")
        house.gateway.write([*house.entries, second])
        inbox = client.listen()
        client.request("tools/list")
        inbox.next("notifications/tools/list_changed")
        both = items(client.pages("tools/list"), "tools")
        assert set(alone) < set(both), "names change with the second server"
        assert len(both) == 2 * len(alone), "one of two is missing"
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,48}", name) for name in both)
        assert "short__echo" in both and "echo" not in both
        longs = {name for name, tool in both.items() if "description" not in tool}
        assert {name for name in both if not name.startswith("short__")} == set(alone)
        cut = [name for name in longs if both[name]["inputSchema"] == {"type": "object"}]
        assert len(cut) == 6
        for name in cut:
            assert client.call(name, text=name).text == name, "a name that was cut leads nowhere"
        reached = [m["params"]["name"] for record in house.records.values() for m in record.got("tools/call")]
        assert len(reached) == 6 and len(set(reached)) == 3 and min(map(len, reached)) > 64
        inbox.close()


def test_pitfall_9_duplicates_are_renamed_not_dropped(front: str, tmp_path: Path) -> None:
    """Two servers without a prefix and with the same resources."""
    house = House(tmp_path)
    house.pipe("first", "legacy", "--name", "same", prefix="")
    house.pipe("second", "modern", "--name", "same", prefix="")
    with house:
        client = client_of(front, house.gateway, "/mcp")
        for method, member in LISTS.items():
            listed = items(client.pages(method), member)
            single = items(client_of(front, house.gateway, "/servers/first/mcp").pages(method), member)
            assert len(listed) == 2 * len(single), f"{method} lost some"
        for server, tool in (("first", "echo"), ("second", "second__echo")):
            assert client.call(tool, text=server, tag=server).text == server
            assert house.records[server].call(server)["params"]["name"] == "echo"
        for server, uri in (("first", "same://static"), ("second", "second+same://static")):
            assert client.request("resources/read", {"uri": uri}).result["contents"][0]["text"] == "static"
            assert house.records[server].got("resources/read")[0]["params"]["uri"] == "same://static"
        assert house.gateway.wait_for_line("clashes with another server's")


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_pitfall_9_a_clashing_resource_has_one_name_everywhere(front: str, era: str, tmp_path: Path) -> None:
    """By the URI without its prefix a client would get to the other server."""
    house = House(tmp_path)
    for id in ("first", "second"):
        house.pipe(id, era, "--name", "same")
    with house:
        client = client_of(front, house.gateway, "/mcp")
        listed = items(client.pages("resources/list"), "resources")
        uri = "second+same://watched"
        assert uri in listed and "same://watched" in listed
        inbox = client.listen(resourceSubscriptions=[uri])
        client.call("first__touch", uri="same://watched")
        client.call("second__touch", uri="same://watched")
        assert inbox.next("notifications/resources/updated")["params"]["uri"] == uri
        assert inbox.drained() == [], "it was not the other server's"
        for name in ("second+same://static", "second+same://item/5"):
            assert client.request("resources/read", {"uri": name}).result["contents"][0]["uri"] == name
        assert client.call("second__blocks").result["content"][0]["uri"] == "second+same://static"
        assert client.call("first__blocks").result["content"][0]["uri"] == "same://static"
        inbox.close()


# ----------------------------------------------------------------------------------- 10. credentials and left processes
@pytest.mark.parametrize("server", ["lhttp", "mhttp"])
def test_pitfall_10_no_header_of_a_client_goes_upstream(front: str, server: str, tmp_path: Path) -> None:
    house = House(tmp_path, api_key="client-key")
    house.http("lhttp", "legacy", headers={"Authorization": "Bearer configured", "X-Own": "mine"})
    house.http("mhttp", "modern", headers={"Authorization": "Bearer configured", "X-Own": "mine"})
    leaky = {
        "Authorization": "Bearer client-key",
        "X-API-Key": "client-key-2",
        "Cookie": "session=client-cookie",
        "X-Forwarded-Authorization": "client-forwarded",
        "Mcp-Param-Region": "client-region",
        "X-Request-ID": "client-request",
        "Origin": "http://localhost:1",
    }
    with house:
        client = client_of(front, house.gateway, f"/servers/{server}/mcp", headers=leaky)
        client.call("echo", text="t", tag="t")
        client.ask("tools/call", {"name": "ask", "arguments": {"kinds": ["roots"], "tag": "a"}})
        client.call("steps", token="t")
        client.listen(resourceSubscriptions=[f"{server}://watched"]).close()
        client.close()
        client_of(front, house.gateway, "/mcp", headers=leaky).request("tools/list")
        house.records[server].wait(lambda record: len(record.got()) > 4)
        for message in house.records[server].got():
            headers = message["http"]["headers"]
            assert headers["authorization"] == "Bearer configured" and headers["x-own"] == "mine"
            assert "client-" not in json.dumps(headers), headers
            assert not {"cookie", "x-api-key", "origin"} & set(headers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is over and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def none_alive(pids: set[int]) -> bool:
    """Whether all of them are over."""
    return not any(alive(pid) for pid in pids)


def pids(record: Record) -> set[int]:
    """The processes that have been told something."""
    return {entry["pid"] for entry in record.entries()}


def test_pitfall_10_calls_at_once_leave_no_process_behind(front: str, tmp_path: Path) -> None:
    """One start for twenty calls at once to a shared server, one process for each of an isolated one; then none."""
    house = House(tmp_path)
    for era in ("legacy", "modern"):
        house.pipe(f"shared-{era}", era)
        house.pipe(f"call-{era}", era, isolation="call")
    with house, concurrent.futures.ThreadPoolExecutor(20) as pool:
        for era in ("legacy", "modern"):
            for kind, count in (("shared", 20), ("call", 6)):
                path, record = f"/servers/{kind}-{era}/mcp", house.records[f"{kind}-{era}"]
                client = client_of(front, house.gateway, "/mcp" if front == "legacy" else path)
                name = f"{kind}-{era}__echo" if front == "legacy" else "echo"

                def call(n: int, client: Any = client, name: str = name) -> str:
                    params = {"name": name, "arguments": {"text": str(n), "tag": "call"}}
                    return str(client.request("tools/call", params, id=f"p{n}").text)

                assert list(pool.map(call, range(count))) == [str(n) for n in range(count)]
                used = {m["pid"] for m in record.calls("call")}
                assert len(used) == (1 if kind == "shared" else count)
                if kind == "shared":
                    assert all(alive(pid) for pid in used)
                    assert house.gateway.http("POST", f"/servers/{kind}-{era}/stop")[0] == 200
                wait_until(partial(none_alive, used), "a process was left behind")
    for record in house.records.values():
        assert none_alive(pids(record)), "the gateway has left some when it ended"
        assert os.getpid() not in pids(record)
