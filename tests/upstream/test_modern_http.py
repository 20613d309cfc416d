"""Two eras over HTTP, from the client's side: which one a server speaks, and being a client of a modern one.

Scripted servers on real sockets; one of the official SDK's at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from gateway.auth.principal import Principal
from gateway.config.snapshot import Snapshot
from gateway.errors import (
    ClientProtocolError,
    CredentialsRefused,
    GatewayError,
    LinkLost,
    RateLimited,
    ServerProtocolError,
    StartFailed,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.exchange import Ask, Call, Client, Exchange, Interim, Reply
from gateway.protocol.eras import Era
from gateway.protocol.message import Message, decode_request
from gateway.runtimes.base import Origin
from gateway.upstream.connect import Terms
from gateway.upstream.http import connect_http
from gateway.upstream.http_link import HttpLink
from gateway.upstream.modern import lister
from tests.fixtures.http_scripted import (
    META,
    Answer,
    Hangup,
    McpScript,
    ModernScript,
    Request,
    Script,
    Server,
    decoded,
    dispatch,
    serve,
)

MODERN_FIRST = (Era.MODERN, Era.LEGACY)
LEGACY_FIRST = (Era.LEGACY, Era.MODERN)
INFO = {"name": "open-mcp-gateway", "version": "0"}
CAPABILITIES = {"elicitation": {}, "sampling": {}, "roots": {"listChanged": True}}
FORM = {
    "method": "elicitation/create",
    "params": {"mode": "form", "message": "?", "requestedSchema": {"type": "object", "properties": {}}},
}


class World:
    """What the link is connected to on the gateway's side."""

    def __init__(self, eras: tuple[Era, ...] = MODERN_FIRST, *, isolated: bool = False, **more: Any) -> None:
        self.notices: list[Message] = []
        self._news = trio.Event()
        capabilities = CAPABILITIES if isolated else {}
        self.terms = Terms(
            "srv",
            self.notice,
            lambda ask: False,
            INFO,
            capabilities,
            isolated=isolated,
            eras=eras,
            **{"timeout": 5.0, **more},
        )

    def notice(self, message: Message) -> None:
        self.notices.append(message)
        news, self._news = self._news, trio.Event()
        news.set()

    @property
    def said(self) -> list[tuple[str, Any]]:
        return [(message.method, message.params) for message in self.notices]

    async def until(self, count: int) -> None:
        with trio.fail_after(5):
            while len(self.notices) < count:
                await self._news.wait()


@asynccontextmanager
async def linked(script: Script, world: World | None = None) -> AsyncIterator[tuple[Server, Any]]:
    terms = (world or World()).terms
    async with serve(script) as server, connect_http(Origin(server.url()), terms) as link:
        yield server, link


class Somebody:
    """A client's session that can't be asked outside a call."""

    def ask(self, ask: Ask) -> bool:
        return False

    def notify(self, text: str) -> None: ...

    def mark(self, topic: str) -> None: ...


def legacy_client(version: str = "2025-11-25", capabilities: Any = CAPABILITIES) -> Client:
    return Client("old", Era.LEGACY, version, capabilities, {"name": "old", "version": "1"}, owner=Somebody())


def modern_client(**more: Any) -> Client:
    return Client("modern:1", Era.MODERN, "2026-07-28", {"elicitation": {}}, {"name": "new", "version": "1"}, **more)


CONTEXT = {
    META + "protocolVersion": "2026-07-28",
    META + "clientInfo": {"name": "new", "version": "1"},
    META + "clientCapabilities": {"elicitation": {}},
}


def exchange(
    params: Any = None, *, client: Client | None = None, method: str = "tools/call", seconds: float = 5, **more: Any
) -> Exchange:
    text = params if isinstance(params, str) else json.dumps({"name": "t"} if params is None else params)
    message = decode_request(f'{{"jsonrpc":"2.0","id":7,"method":"{method}","params":{text}}}')
    client = client or legacy_client()
    return Exchange(message, Principal("p"), Snapshot(), client, "srv", trio.current_time() + seconds, **more)


async def event_of(call: Call, kind: type[Any]) -> Any:
    with trio.fail_after(10):
        while True:
            event = await call.next()
            if type(event) is kind:
                return event


async def reply_of(link: HttpLink, *args: Any, **more: Any) -> Any:
    """The result or error object of one call."""
    return (await event_of(link.call(exchange(*args, **more)), Reply)).message.result


async def failure_of(script: Script, world: World | None = None) -> tuple[GatewayError, list[str]]:
    """The error that a connect ends with, and what the server was asked until then."""
    async with serve(script) as server:
        with pytest.raises(GatewayError) as caught:
            async with connect_http(Origin(server.url()), (world or World()).terms):
                pytest.fail("connected")
        return caught.value, asked(server)


def asked(server: Server) -> list[str]:
    return [r.rpc if r.method == "POST" else r.method for r in server.seen]


def refuse(status: int, body: Any = None, kind: str = "application/json") -> Script:
    async def script(request: Request, answer: Answer) -> None:
        if isinstance(body, dict):
            id = request.json["id"] if status == 200 else "server-error"
            await answer.json({"jsonrpc": "2.0", "id": id, "error": body}, status)
        else:
            await answer.send(status, body or b"", kind)

    return script


def error(code: int, text: str = "no", **data: Any) -> dict[str, Any]:
    return {"code": code, "message": text, **({"data": data} if data else {})}


# ---------------------------------------------------------------------------------------------------------- the probe
async def test_probe_a_modern_server_is_found_by_server_discover_and_told_who_asks() -> None:
    script = ModernScript()
    async with linked(script) as (server, link):
        assert link.era is Era.MODERN and link.decided == "server/discover" and link.slow is False
        assert link.details == {"transport": "streamable-http", "era": "modern", "era_decided_by": "server/discover"}
        assert link.facts == {
            "protocolVersion": "2026-07-28",
            "capabilities": script.capabilities,
            "serverInfo": {"name": "scripted-modern", "version": "1"},
            "instructions": "be kind",
        }
        await script.until(lambda: script.listens)
    assert asked(server) == ["server/discover", "subscriptions/listen"]
    first = server.seen[0]
    assert first.headers["mcp-protocol-version"] == "2026-07-28"
    assert first.headers["mcp-method"] == "server/discover" and "mcp-name" not in first.headers
    assert first.json["params"]["_meta"] == {
        META + "protocolVersion": "2026-07-28",
        META + "clientInfo": INFO,
        META + "clientCapabilities": {},
    }


@pytest.mark.parametrize(
    "refusal",
    [
        refuse(400, error(-32600, "Bad Request: Missing session ID")),
        refuse(404, error(-32601)),
        refuse(400, error(-32000, "Bad Request: Server not initialized")),
        refuse(400, error(-32022, supported=["2025-11-25", "2025-06-18"])),
        refuse(200, error(-32601)),
        refuse(200, error(-32602)),
        refuse(405),
        refuse(400, b"bad request", "text/plain"),
        refuse(422, b'{"detail":"no"}'),
        refuse(200, b"<html>", "text/html"),
        refuse(202),
    ],
)
async def test_probe_every_other_refusal_means_initialize(refusal: Script) -> None:
    legacy = McpScript()
    async with linked(dispatch({"server/discover": refusal}, legacy)) as (server, link):
        assert link.era is Era.LEGACY and link.decided == "initialize" and link.slow is False
        assert link.details["era"] == "legacy" and link.details["era_decided_by"] == "initialize"
        assert link.facts["protocolVersion"] == "2025-11-25"
        assert (await reply_of(link))["echo"] == {"name": "t"}
    assert asked(server)[:3] == ["server/discover", "initialize", "notifications/initialized"]
    assert "mcp-session-id" not in server.seen[1].headers  # whatever the refusal may have said


@pytest.mark.parametrize("code", [-32020, -32021, -32022])
async def test_probe_what_only_modern_servers_say_is_never_followed_by_initialize(code: int) -> None:
    failure, seen = await failure_of(refuse(400, error(code, "Header mismatch: a proxy took it")))
    assert type(failure) is StartFailed and "2026-07-28" in failure.message and "a proxy took it" in failure.message
    assert seen == ["server/discover"]


async def test_probe_no_revision_in_common_is_named() -> None:
    failure, seen = await failure_of(refuse(400, error(-32022, supported=["2027-01-01"], requested="2026-07-28")))
    assert type(failure) is StartFailed and "2027-01-01" in failure.message
    assert seen == ["server/discover"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, CredentialsRefused), (403, CredentialsRefused), (429, RateLimited), (500, StartFailed), (503, StartFailed)],
)
async def test_probe_401_403_429_and_5xx_decide_nothing(status: int, kind: type[GatewayError]) -> None:
    for eras in (MODERN_FIRST, LEGACY_FIRST, (Era.MODERN,)):
        failure, seen = await failure_of(refuse(status, error(-32600)), World(eras))
        assert type(failure) is kind and f"HTTP {status}" in failure.message
        assert len(seen) == 1


async def test_probe_network_faults_decide_nothing() -> None:
    async def cut(request: Request, answer: Answer) -> None:
        raise Hangup

    for script in (cut, refuse(301)):
        failure, seen = await failure_of(script)
        assert type(failure) is StartFailed
        assert seen[0] == "server/discover"
    failure, seen = await failure_of(cut)
    assert seen == ["server/discover"] and "dropped the connection" in failure.message


async def test_probe_silence_means_initialize_and_a_late_answer_is_no_refutation() -> None:
    modern = ModernScript()

    for answers_late in (False, True):
        released = trio.Event()

        async def silent(request: Request, answer: Answer, late: trio.Event = released) -> None:
            await late.wait()
            await modern.result(request, answer, **modern.hello())

        legacy = McpScript()

        @legacy.on("notifications/initialized")
        async def greeted(request: Request, answer: Answer, answers: bool = answers_late) -> None:
            if answers:
                released.set()  # noqa: B023
                await probed.wait()  # noqa: B023
            await answer.send(202)

        probed = trio.Event()

        async def watched(request: Request, answer: Answer) -> None:
            await silent(request, answer)
            probed.set()  # noqa: B023

        script = dispatch({"server/discover": watched}, legacy)
        async with linked(script, World(probe_timeout=0.2)) as (server, link):
            assert link.era is Era.LEGACY and link.decided == "initialize"
            assert link.slow is answers_late
            assert asked(server)[:2] == ["server/discover", "initialize"]
            assert (await reply_of(link))["echo"] == {"name": "t"}
            released.set()


async def test_probe_a_slow_modern_server_is_asked_again_when_it_refuses_initialize() -> None:
    modern = ModernScript()

    async def first_silent(request: Request, answer: Answer) -> None:
        if len(server.calls("server/discover")) == 1:
            await answer.gone()
        else:
            await modern.result(request, answer, **modern.hello())

    async with serve(dispatch({"server/discover": first_silent}, modern)) as server:
        async with connect_http(Origin(server.url()), World(probe_timeout=0.2).terms) as link:
            assert link.era is Era.MODERN and link.decided == "server/discover"
        assert asked(server)[:3] == ["server/discover", "initialize", "server/discover"]


def test_probe_waits_for_ten_seconds() -> None:
    assert World().terms.probe_timeout == 10.0


@pytest.mark.parametrize("refusal", [(400, -32022), (404, -32601), (200, -32601), (400, -32602), (400, -32020)])
async def test_probe_a_modern_only_server_that_refuses_initialize_is_asked_for_discover(
    refusal: tuple[int, int],
) -> None:
    script = ModernScript()
    script.refusal = refusal
    async with linked(script, World(LEGACY_FIRST)) as (server, link):
        assert link.era is Era.MODERN and link.decided == "server/discover"
        assert (await reply_of(link))["echo"]["name"] == "t"
    assert asked(server)[:2] == ["initialize", "server/discover"]


async def test_probe_an_initialize_that_fails_for_another_reason_says_nothing_of_the_era() -> None:
    script = dispatch({"initialize": refuse(200, error(-32000, "no such program"))}, ModernScript())
    failure, seen = await failure_of(script, World(LEGACY_FIRST))
    assert type(failure) is StartFailed and "no such program" in failure.message
    assert seen == ["initialize"]


async def test_probe_legacy_first_asks_a_good_legacy_server_nothing_else() -> None:
    async with linked(McpScript(), World(LEGACY_FIRST, isolated=True)) as (server, link):
        assert link.era is Era.LEGACY and link.decided == "initialize"
        await reply_of(link)
    assert "server/discover" not in asked(server) and asked(server).count("initialize") == 1


async def test_probe_a_legacy_server_without_sessions_is_spoken_to_in_the_modern_era_if_it_can() -> None:
    modern, legacy = ModernScript(), McpScript(session=False)
    both = dispatch({"initialize": legacy, "notifications/initialized": legacy}, modern)
    async with linked(both, World(LEGACY_FIRST, isolated=True)) as (server, link):
        assert link.era is Era.MODERN and link.decided == "server/discover"
    assert asked(server)[:3] == ["initialize", "notifications/initialized", "server/discover"]
    only = dispatch({"server/discover": refuse(404, error(-32601))}, legacy)
    async with linked(only, World(LEGACY_FIRST, isolated=True)) as (server, link):
        assert link.era is Era.LEGACY and link.decided == "initialize"
        assert [r.json["params"]["capabilities"] for r in server.calls("initialize")] == [CAPABILITIES, {}]


async def test_probe_the_catalogs_word_is_final() -> None:
    async with linked(ModernScript(), World((Era.MODERN,))) as (_, link):
        assert link.era is Era.MODERN and link.decided == "catalog"
    async with linked(McpScript(), World((Era.LEGACY,))) as (_, link):
        assert link.era is Era.LEGACY and link.decided == "catalog"
    legacy = dispatch({"server/discover": refuse(400, error(-32600, "Missing session ID"))}, McpScript())
    failure, seen = await failure_of(legacy, World((Era.MODERN,)))
    assert type(failure) is StartFailed and "2026-07-28" in failure.message and "Missing session" in failure.message
    assert seen == ["server/discover"]
    failure, seen = await failure_of(refuse(405), World((Era.MODERN,)))
    assert type(failure) is StartFailed and "HTTP 405" in failure.message and seen == ["server/discover"]
    failure, seen = await failure_of(ModernScript(), World((Era.LEGACY,)))
    assert type(failure) is StartFailed and "era: legacy" in failure.message and seen == ["initialize"]


@pytest.mark.parametrize("eras", [MODERN_FIRST, LEGACY_FIRST])
async def test_probe_a_server_of_2024_11_05_is_found_after_both(eras: tuple[Era, ...]) -> None:
    stream: Answer | None = None

    async def old(request: Request, answer: Answer) -> None:
        nonlocal stream
        if request.method == "GET":
            stream = answer
            await answer.start_stream()
            await answer.event("/post", name="endpoint")
            await answer.gone()
        elif request.target == "/mcp":
            await answer.send(405)
        else:
            await answer.send(202)
            if "id" in request.json:
                hello = {"protocolVersion": "2024-11-05", "capabilities": {}, "serverInfo": {"name": "old"}}
                assert stream is not None
                await stream.event({"jsonrpc": "2.0", "id": request.json["id"], "result": hello})

    async with linked(old, World(eras)) as (server, link):
        assert link.era is Era.LEGACY and link.decided == "initialize"
        assert link.details["transport"] == "http+sse"
    first = ["server/discover", "initialize"] if eras is MODERN_FIRST else ["initialize", "server/discover"]
    assert asked(server)[:4] == [*first, "GET", "initialize"]


async def test_probe_again_when_a_modern_server_answers_like_a_legacy_one() -> None:
    modern = ModernScript(claims=False)
    current: list[Script] = [modern]

    async def script(request: Request, answer: Answer) -> None:
        await current[0](request, answer)

    async with linked(script) as (server, link):
        await reply_of(link)
        # One odd answer alone is nothing: the server still says that it is modern.
        current[0] = dispatch({"tools/call": refuse(400, error(-32600, "Missing session ID"))}, modern)
        with pytest.raises(ServerProtocolError, match="Missing session ID"):
            await reply_of(link)
        await server.until(lambda: len(server.calls("server/discover")) == 2)
        current[0] = modern
        await reply_of(link)
        assert link.lost is None
        # Nor is a 401, or a failure while asking.
        current[0] = dispatch({"tools/call": refuse(404, b"gone", "text/plain")}, refuse(503))
        with pytest.raises(ServerProtocolError, match="HTTP 404"):
            await reply_of(link)
        await server.until(lambda: len(server.calls("server/discover")) == 3)
        current[0] = modern
        await reply_of(link)
        assert link.lost is None
        current[0] = refuse(400, error(-32600, "Bad Request: Server not initialized"))
        with pytest.raises(ServerProtocolError, match="not initialized"):
            await reply_of(link)
        with trio.fail_after(5):
            await link.wait_closed()
        assert "does not speak 2026-07-28 any more" in str(link.lost)
    current[0] = modern
    async with linked(script) as (_, link):
        current[0] = refuse(400, error(-32022, supported=["2027-01-01"]))
        assert (await reply_of(link))["code"] == -32603
        with trio.fail_after(5):
            await link.wait_closed()


# -------------------------------------------------------------------------------------------------------------- calls
@pytest.mark.parametrize("sse_replies", [False, True])
async def test_a_legacy_clients_call_carries_its_context_and_the_reply_is_in_its_dialect(sse_replies: bool) -> None:
    async with linked(ModernScript(sse_replies=sse_replies)) as (server, link):
        text = '{"name":"t", "arguments": {"n":1.50}}'
        result = await reply_of(link, text)
        request = server.calls("tools/call")[0]
    assert b'"name":"t", "arguments": {"n":1.50}' in request.body  # byte for byte
    meta = {
        META + "protocolVersion": "2026-07-28",
        META + "clientInfo": {"name": "old", "version": "1"},
        META + "clientCapabilities": {"elicitation": {"form": {}}, "sampling": {}, "roots": {}},
    }
    sent = request.json["params"]["_meta"]
    assert {**sent, META + "clientCapabilities": None} == {**meta, META + "clientCapabilities": None}
    assert set(sent[META + "clientCapabilities"]) == {"elicitation", "sampling", "roots"}
    assert "listChanged" not in sent[META + "clientCapabilities"]["roots"]
    assert set(result) == {"echo"}  # no resultType, no serverInfo
    assert request.headers["mcp-method"] == "tools/call" and request.headers["mcp-name"] == "t"
    assert request.headers["accept"] == "application/json, text/event-stream"
    assert "mcp-session-id" not in request.headers


async def test_a_modern_clients_call_and_reply_pass_untouched_but_for_the_hop() -> None:
    async with linked(ModernScript()) as (server, link):
        params = {"name": "t", "_meta": {**CONTEXT, "x/y": 1, "progressToken": "mine"}, "requestState": "s", "odd": 2}
        result = await reply_of(link, params, client=modern_client())
        sent = server.calls("tools/call")[0].json
    assert result["resultType"] == "complete" and META + "serverInfo" in result["_meta"]
    token = sent["params"]["_meta"].pop("progressToken")
    assert token == sent["id"]
    del params["_meta"]["progressToken"]  # type: ignore[attr-defined]
    assert sent["params"] == params


@pytest.mark.parametrize("name", ["größe", " edge", "a\nb", "=?base64?YQ==?=", "plain name"])
async def test_names_that_no_header_can_carry_are_encoded(name: str) -> None:
    async with linked(ModernScript(claims=False)) as (server, link):
        for method, key in (("tools/call", "name"), ("prompts/get", "name"), ("resources/read", "uri")):
            assert (await reply_of(link, {key: name}, method=method))["echo"][key] == name
            assert decoded(server.seen[-1].headers["mcp-name"]) == name
        # The name that the server knows it by, not the client's.
        await reply_of(link, {"name": "merged-t"}, changes={"name": json.dumps(name)})
        assert decoded(server.seen[-1].headers["mcp-name"]) == name == server.seen[-1].json["params"]["name"]


async def test_half_a_surrogate_pair_harms_its_own_call_only() -> None:
    for first in (Era.MODERN, Era.LEGACY):
        script = ModernScript() if first is Era.MODERN else McpScript()
        async with linked(script, World((first,))) as (_, link):
            params = r'{"name":"t","_meta":{"progressToken":1,"x":"\ud800"}}'
            assert (await reply_of(link, params))["echo"]["_meta"]["x"] == "\ud800"
            if first is Era.MODERN:
                with pytest.raises(ClientProtocolError):
                    await reply_of(link, r'{"name":"\ud800"}')
            assert link.lost is None


@pytest.mark.parametrize(
    ("status", "code"), [(400, -32602), (404, -32601), (200, -32602), (400, -32021), (200, -32603)]
)
async def test_an_error_in_the_body_is_the_reply_whatever_its_status(status: int, code: int) -> None:
    script = ModernScript()

    @script.on("prompts/get")
    async def prompt(request: Request, answer: Answer) -> None:
        await script.error(request, answer, status, code, "no", requiredCapabilities={"sampling": {}})

    async with linked(script) as (server, link):
        params = {"name": "t", "_meta": CONTEXT}
        found = await reply_of(link, params, method="prompts/get", client=modern_client())
        assert found == error(code, requiredCapabilities={"sampling": {}})
        legacy = await reply_of(link, method="prompts/get")
        assert legacy["code"] == (-32603 if code == -32021 else code)
        assert len(server.calls("prompts/get")) == 2 and link.lost is None


async def test_no_resource_is_said_as_the_client_knows_it() -> None:
    script = ModernScript()

    @script.on("resources/read")
    async def read(request: Request, answer: Answer) -> None:
        await script.error(request, answer, 400, -32602, "none", uri=request.json["params"]["uri"])

    async with linked(script) as (_, link):
        old = await reply_of(link, {"uri": "x://1"}, method="resources/read")
        assert old["code"] == -32002 and old["data"] == {"uri": "x://1"}
        params = {"uri": "x://1", "_meta": CONTEXT}
        new = await reply_of(link, params, method="resources/read", client=modern_client())
        assert new["code"] == -32602


async def test_progress_and_logs_come_on_the_calls_stream_under_the_clients_own_token() -> None:
    script = ModernScript()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        token = request.json["params"]["_meta"]["progressToken"]
        assert token == request.json["id"]
        await answer.start_stream()
        for method, params in (
            ("notifications/progress", {"progressToken": token, "progress": 1, "message": "m"}),
            ("notifications/message", {"level": "info", "data": "d"}),
            ("notifications/progress", {"progressToken": 999, "progress": 1}),
        ):
            await answer.event({"jsonrpc": "2.0", "method": method, "params": params})
        await answer.event({"jsonrpc": "2.0", "id": 1000, "method": "sampling/createMessage", "params": {}})
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": script.complete({"content": []})})
        await answer.end()

    async with linked(script) as (server, link):
        for client, message in ((legacy_client(), {"message": "m"}), (legacy_client("2024-11-05"), {})):
            call = link.call(exchange({"name": "t", "_meta": {"progressToken": "mine"}}, client=client))
            first = json.loads((await event_of(call, Interim)).text)
            assert first["params"] == {"progressToken": "mine", "progress": 1, **message}
            second = json.loads((await event_of(call, Interim)).text)
            assert second["params"] == {"level": "info", "data": "d"}
            assert (await event_of(call, Reply)).message.result == {"content": []}
        assert [r.rpc for r in server.seen if r.rpc in ("", "sampling/createMessage")] == []


@pytest.mark.parametrize("streaming", [False, True])
async def test_RB20_a_cancel_closes_the_response_and_sends_nothing_else(streaming: bool) -> None:
    script = ModernScript(claims=False)
    begun, gone = trio.Event(), trio.Event()

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        if streaming:
            await answer.start_stream()
        begun.set()
        await answer.gone()
        gone.set()

    async with linked(script) as (server, link):
        for give_up in ("cancel", "deadline"):
            begun, gone = trio.Event(), trio.Event()
            call = link.call(exchange(seconds=5 if give_up == "cancel" else 0.3))
            await begun.wait()
            if give_up == "cancel":
                call.cancel("enough")
            else:
                with pytest.raises(UpstreamTimeout):
                    await event_of(call, Reply)
            with trio.fail_after(1):
                await gone.wait()
        link.notify("notifications/roots/list_changed")
        link.notify("notifications/cancelled", '{"requestId":1}')
        await link.ping(5)
        assert asked(server) == ["server/discover", "tools/call", "tools/call", "server/discover"]
        assert len(link.pending) == 0


async def test_a_stream_that_ends_without_the_reply_is_a_lost_connection_and_nothing_is_repeated() -> None:
    script = ModernScript(claims=False)

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        await answer.event({"jsonrpc": "2.0", "method": "notifications/message", "params": {}}, id="e1")
        await answer.end()

    async with linked(script) as (server, link):
        with pytest.raises(LinkLost, match="before it had answered"):
            await reply_of(link)
        assert len(server.calls("tools/call")) == 1 and "GET" not in asked(server)


async def test_K16_ping_is_server_discover_and_any_reply_is_a_sign_of_life() -> None:
    script = ModernScript(claims=False)
    async with linked(script) as (server, link):
        await link.ping(5)
        assert asked(server) == ["server/discover"] * 2
        script.methods["server/discover"] = refuse(500)
        with pytest.raises(UpstreamError):
            await link.ping(5)
        assert link.lost is None


# ------------------------------------------------------------------------------------------- input from legacy clients
def asking(script: ModernScript, rounds: int = 1, requests: Any = None) -> list[Any]:
    """Have tools/call ask that often before it answers; what came in each round."""
    seen: list[Any] = []

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        seen.append(request.json)
        if len(seen) > rounds:
            await script.result(request, answer, content=[])
            return
        asks = {"inputRequests": requests} if requests else {}
        await answer.result(request, {"resultType": "input_required", "requestState": f"s{len(seen)}", **asks})

    return seen


async def test_a_modern_servers_question_reaches_a_legacy_client_and_the_call_goes_on_with_the_answer() -> None:
    script = ModernScript(sse_replies=True)
    seen = asking(script, 1, {"q": FORM})
    async with linked(script) as (_, link):
        call = link.call(exchange({"name": "t", "arguments": {"a": 1}}))
        ask = await event_of(call, Ask)
        assert ask.message.method == "elicitation/create" and ask.message.param("message") == "?"
        ask.resolve('{"action":"accept","content":{}}')
        assert (await event_of(call, Reply)).message.result == {"content": []}
    first, second = seen
    assert first["id"] != second["id"]
    assert second["params"]["inputResponses"] == {"q": {"action": "accept", "content": {}}}
    assert second["params"]["requestState"] == "s1"
    for key in ("name", "arguments"):
        assert first["params"][key] == second["params"][key]


async def test_rounds_that_only_carry_state_go_on_by_themselves_and_end_after_ten() -> None:
    script = ModernScript()
    seen = asking(script, 3)
    async with linked(script) as (_, link):
        assert await reply_of(link) == {"content": []}
        assert [s["params"].get("requestState") for s in seen] == [None, "s1", "s2", "s3"]
        endless = asking(script, 100)
        with pytest.raises(ServerProtocolError, match="more than 10"):
            await reply_of(link)
        assert len(endless) == 11 and link.lost is None


async def test_progress_only_rises_across_rounds() -> None:
    script = ModernScript()
    count = 0

    @script.on("tools/call")
    async def tool(request: Request, answer: Answer) -> None:
        nonlocal count
        count += 1
        await answer.start_stream()
        for progress in (1, count + 1):
            token = request.json["params"]["_meta"]["progressToken"]
            note = {"progressToken": token, "progress": progress}
            await answer.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": note})
        more = {"resultType": "input_required", "requestState": "s"}
        result = script.complete({"content": []}) if count == 3 else more
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": result})
        await answer.end()

    async with linked(script) as (_, link):
        call = link.call(exchange({"name": "t", "_meta": {"progressToken": "p"}}))
        shown = []
        while type(event := await call.next()) is not Reply:
            if type(event) is Interim:
                shown.append(json.loads(event.text)["params"]["progress"])
        assert shown == [1, 2, 3, 4]


async def test_a_call_taken_back_between_rounds_is_over() -> None:
    script = ModernScript(claims=False)
    seen = asking(script, 1, {"q": FORM})
    async with linked(script) as (server, link):
        call = link.call(exchange())
        ask = await event_of(call, Ask)
        call.cancel("enough")
        ask.resolve('{"action":"cancel"}')
        late = link.call(exchange(seconds=0.2))
        seen.clear()
        await event_of(late, Ask)
        with pytest.raises(UpstreamTimeout):
            await event_of(late, Reply)
        assert len(link.pending) == 0
        assert asked(server) == ["server/discover", "tools/call", "tools/call"]


async def test_a_modern_client_sees_input_required_as_it_is() -> None:
    script = ModernScript()
    asking(script, 1, {"q": FORM})
    async with linked(script) as (_, link):
        result = await reply_of(link, {"name": "t", "_meta": CONTEXT}, client=modern_client())
    assert result == {"resultType": "input_required", "requestState": "s1", "inputRequests": {"q": FORM}}


# ----------------------------------------------------------------------------------------- arguments that are headers
def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object", "properties": properties}}


REGION = {"type": "string", "x-mcp-header": "Region"}
COUNT = {"type": "integer", "x-mcp-header": "Count"}


def strict_about_region(script: ModernScript) -> None:
    @script.on("tools/call")
    async def call(request: Request, answer: Answer) -> None:
        wanted = request.json["params"]["arguments"].get("region")
        header = request.headers.get("mcp-param-region")
        if (header and decoded(header)) != wanted:
            await script.error(request, answer, 400, -32020, f"Mcp-Param-Region is {header!r}")
        else:
            await script.result(request, answer, content=[], headers=request.headers)


@pytest.mark.parametrize(
    "client", [modern_client(), legacy_client(capabilities={"elicitation": {}, "tasks": {}}), None]
)
async def test_the_gateway_lists_in_the_name_of_the_client_that_the_server_belongs_to(client: Client | None) -> None:
    async with linked(ModernScript(), World(lister=lister(client, INFO))) as (server, link):
        await link.request("tools/list", timeout=5)
        (sent,) = server.calls("tools/list")
    assert sent.json["params"]["_meta"] == {
        META + "protocolVersion": "2026-07-28",
        META + "clientInfo": INFO if client is None else client.info,
        META + "clientCapabilities": {} if client is None else {"elicitation": {}},
    }


async def test_x_mcp_header_arguments_are_mirrored_once_the_tools_have_been_listed() -> None:
    script = ModernScript(claims=False)
    script.tools = [tool("t", region=REGION, n=COUNT), tool("plain", region={"type": "string"})]
    async with linked(script) as (server, link):
        listed = await reply_of(link, {}, method="tools/list")
        assert [t["name"] for t in listed["tools"]] == ["t", "plain"]
        await reply_of(link, {"name": "t", "arguments": {"region": "zürich", "n": 12}})
        headers = server.seen[-1].headers
        assert decoded(headers["mcp-param-region"]) == "zürich" and headers["mcp-param-count"] == "12"
        await reply_of(link, {"name": "t", "arguments": {"region": None}})
        assert not [h for h in server.seen[-1].headers if h.startswith("mcp-param-")]
        await reply_of(link, {"name": "plain", "arguments": {"region": "x"}})
        assert not [h for h in server.seen[-1].headers if h.startswith("mcp-param-")]
        script.tools = [tool("t", region={"type": "string"})]
        await reply_of(link, {}, method="tools/list")
        await reply_of(link, {"name": "t", "arguments": {"region": "x"}})
        assert "mcp-param-region" not in server.seen[-1].headers


@pytest.mark.parametrize("modern", [False, True])
async def test_32020_lists_the_tools_again_and_repeats_the_call_once(modern: bool) -> None:
    script = ModernScript(claims=False)
    script.tools = [tool("t", region=REGION)]
    strict_about_region(script)
    more: dict[str, Any] = {"_meta": {**(CONTEXT if modern else {}), "progressToken": "p"}}
    async with linked(script) as (server, link):
        client = modern_client() if modern else legacy_client()
        params = {"name": "t", "arguments": {"region": "eu"}, **more}
        result = await reply_of(link, params, client=client)
        assert result["content"] == [] and result["headers"]["mcp-param-region"] == "eu"
        assert asked(server) == ["server/discover", "tools/call", "tools/list", "tools/call"]
        first, second = server.calls("tools/call")
        assert first.json["id"] != second.json["id"] and first.json["params"] == second.json["params"]
        # Known by now: no detour.
        await reply_of(link, params, client=client)
        assert asked(server)[4:] == ["tools/call"]
        # A server that is never content is not asked for ever.
        script.tools = [tool("t")]
        refusal = await reply_of(link, {**params, "arguments": {"region": "x"}}, client=client) and None
        script.methods["tools/call"] = refuse(400, error(-32020, "Mcp-Param-Region: never"))
        refusal = await reply_of(link, params, client=client)
        assert asked(server)[-3:] == ["tools/call", "tools/list", "tools/call"]
        if modern:
            assert refusal["code"] == -32020
        else:
            assert refusal.get("code") == -32603 or refusal.get("isError")
        assert len(link.pending) == 0


async def test_a_repeated_calls_progress_still_reaches_it() -> None:
    script = ModernScript(claims=False)

    @script.on("tools/call")
    async def call_tool(request: Request, answer: Answer) -> None:
        if len(server.calls("tools/call")) == 1:
            await script.error(request, answer, 400, -32020, "Mcp-Param-Region is missing")
            return
        token = request.json["params"]["_meta"]["progressToken"]
        await answer.start_stream()
        note = {"progressToken": token, "progress": 1}
        await answer.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": note})
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": script.complete({"content": []})})
        await answer.end()

    async with serve(script) as server, connect_http(Origin(server.url()), World().terms) as link:
        call = link.call(exchange({"name": "t", "_meta": {"progressToken": "mine"}}))
        note = await event_of(call, Interim)
        assert json.loads(note.text)["params"] == {"progressToken": "mine", "progress": 1}
        await event_of(call, Reply)


async def test_32020_for_many_calls_lists_once_and_one_that_can_not_list_gets_the_refusal() -> None:
    script = ModernScript(claims=False)
    script.tools = [tool("t", region=REGION)]
    strict_about_region(script)
    release = trio.Event()

    @script.on("tools/list")
    async def list_tools(request: Request, answer: Answer) -> None:
        await release.wait()
        await script.result(request, answer, tools=script.tools, ttlMs=0, cacheScope="private")

    params = {"name": "t", "arguments": {"region": "eu"}, "_meta": CONTEXT}
    async with linked(script) as (server, link):
        calls = [link.call(exchange(params, client=modern_client())) for _ in range(5)]
        await server.until(lambda: len(server.calls("tools/call")) == 5 and len(server.calls("tools/list")) == 1)
        # All five refusals have been read when each call has another id.
        with trio.fail_after(3):
            while any(call.id in range(2, 7) for call in calls):
                await trio.lowlevel.checkpoint()
        release.set()
        for call in calls:
            assert (await event_of(call, Reply)).message.result["content"] == []
        assert len(server.calls("tools/list")) == 1
        link._parameters.clear()
        script.methods["tools/list"] = refuse(503)
        assert (await reply_of(link, params, client=modern_client()))["code"] == -32020
        assert len(link.pending) == 0


@pytest.mark.parametrize("era", [Era.MODERN, Era.LEGACY])
async def test_x_mcp_header_a_tool_with_invalid_annotations_is_dropped(era: Era) -> None:
    tools = [
        tool("good", region=REGION),
        tool("double", a=REGION, b={**REGION, "x-mcp-header": "region"}),
        tool("number", a={"type": "number", "x-mcp-header": "N"}),
        tool("name", a={"type": "string", "x-mcp-header": "a b"}),
        tool("plain", a={"type": "string"}),
    ]
    script: Any = ModernScript()
    script.tools = tools
    if era is Era.LEGACY:
        script = McpScript()

        @script.on("tools/list")  # type: ignore[untyped-decorator]
        async def list_tools(request: Request, answer: Answer) -> None:
            await answer.result(request, {"tools": tools})

    async with linked(script, World((era,))) as (_, link):
        for client in (legacy_client(), modern_client()):
            params = {"_meta": CONTEXT} if client.era is Era.MODERN else {}
            listed = await reply_of(link, params, method="tools/list", client=client)
            assert [t["name"] for t in listed["tools"]] == ["good", "plain"]


# ------------------------------------------------------------------------------------- list changes, resource updates
async def test_list_changes_come_by_a_listen_of_the_gateways_own_as_legacy_notifications() -> None:
    script, world = ModernScript(), World()
    async with serve(script) as server:
        async with connect_http(Origin(server.url()), world.terms) as link:
            await script.until(lambda: script.listens)
            listen = script.listens[0]
            assert listen.filter == {"toolsListChanged": True, "resourcesListChanged": True}
            await listen.say("notifications/tools/list_changed")
            await listen.say("notifications/resources/list_changed", odd=1)
            await world.until(2)
            assert world.said == [
                ("notifications/tools/list_changed", {"_meta": {}}),
                ("notifications/resources/list_changed", {"odd": 1, "_meta": {}}),
            ]
            await reply_of(link)
        await script.until(lambda: script.history[-1] == "closed []")
    assert server.calls("subscriptions/listen")[0].headers["mcp-method"] == "subscriptions/listen"


async def test_a_server_that_claims_no_list_changes_is_not_listened_to() -> None:
    async with linked(ModernScript(claims=False)) as (server, link):
        await reply_of(link)
        assert asked(server) == ["server/discover", "tools/call"]


@pytest.mark.parametrize("how", ["cut", "cancelled", "result"])
async def test_a_listen_that_ends_is_opened_again_and_what_was_missed_counts_as_changed(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.upstream.modern_http.REOPEN", 0.01)
    script, world = ModernScript(), World()
    async with linked(script, world) as (_, link):
        await link.subscribe("x://1", 5)
        await script.until(lambda: script.history[-1] == "closed []")
        listen = script.listens[0]
        assert world.notices == []
        if how == "cancelled":
            await listen.say("notifications/cancelled", requestId=listen.id)
        elif how == "result":
            await listen.answer.event({"jsonrpc": "2.0", "id": listen.id, "result": {"resultType": "complete"}})
        else:
            listen.over.set()
        await script.until(lambda: script.listens and script.listens[-1] is not listen)
        again = script.listens[-1]
        assert again.filter == listen.filter and again.id != listen.id
        await world.until(3)
        assert [method for method, _ in world.said] == [
            "notifications/tools/list_changed",
            "notifications/resources/list_changed",
            "notifications/resources/updated",
        ]
        await again.say("notifications/resources/updated", uri="x://1")
        await world.until(4)
        assert world.said[-1][1]["uri"] == "x://1"


async def test_a_refused_listen_is_left_alone_and_a_failing_one_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.modern_http.REOPEN", 0.01)
    for refusal in (refuse(404, error(-32601)), refuse(200, error(-32601))):
        script = ModernScript()
        script.methods["subscriptions/listen"] = refusal
        async with linked(script) as (server, link):
            await server.until(lambda server=server: "subscriptions/listen" in asked(server))  # type: ignore[misc]
            with trio.fail_after(2):
                while link._listeners:
                    await trio.lowlevel.checkpoint()
            assert await reply_of(link)
            assert asked(server).count("subscriptions/listen") == 1
    script = ModernScript()
    for status in (503, 401, 429):
        script.methods["subscriptions/listen"] = refuse(status)
        async with linked(script) as (server, link):
            await server.until(lambda server=server: asked(server).count("subscriptions/listen") >= 3)  # type: ignore[misc]
            del script.methods["subscriptions/listen"]
            await script.until(lambda: script.listens)
            assert link.lost is None


async def test_subscribe_opens_a_listen_with_all_resources_before_it_closes_the_former() -> None:
    script, world = ModernScript(), World()
    async with linked(script, world) as (server, link):
        assert (await link.subscribe("x://1", 5)).result == {}
        assert (await link.subscribe("x://2", 5)).result == {}
        await script.until(lambda: script.history[-1] == "closed ['x://1']")
        assert script.history == [
            "open []",
            "open ['x://1']",
            "closed []",
            "open ['x://1', 'x://2']",
            "closed ['x://1']",
        ]
        assert (await link.subscribe("x://2", 5)).result == {}  # has it already
        assert len(script.history) == 5
        await script.listens[-1].say("notifications/resources/updated", uri="x://2")
        await world.until(1)
        assert world.said == [("notifications/resources/updated", {"uri": "x://2", "_meta": {}})]
        assert (await link.unsubscribe("x://1", 5)).result == {}
        assert (await link.unsubscribe("x://2", 5)).result == {}
        await script.until(lambda: len(script.history) == 9)
        assert script.history[5:] == ["open ['x://2']", "closed ['x://1', 'x://2']", "open []", "closed ['x://2']"]
        assert "resources/subscribe" not in asked(server)


async def test_the_last_unsubscribe_of_a_server_without_list_changes_ends_the_listen() -> None:
    script = ModernScript(claims=False)
    async with linked(script) as (_, link):
        await link.subscribe("x://1", 5)
        await link.unsubscribe("x://1", 5)
        await script.until(lambda: script.history == ["open ['x://1']", "closed ['x://1']"])
        assert script.listens == []


async def test_a_resource_that_the_server_does_not_acknowledge_is_32602_and_the_former_listen_stays() -> None:
    script, world = ModernScript(), World()
    script.honoured = ["x://1"]
    async with linked(script, world) as (_, link):
        await link.subscribe("x://1", 5)
        refusal = await link.subscribe("x://2", 5)
        assert refusal.kind.name == "ERROR" and refusal.result["code"] == -32602
        assert refusal.result["data"] == {"uri": "x://2"}
        await script.until(lambda: script.history[-1] == "closed ['x://1', 'x://2']")
        assert [listen.uris for listen in script.listens] == [["x://1"]]
        await script.listens[0].say("notifications/resources/updated", uri="x://1")
        await world.until(1)
        script.methods["subscriptions/listen"] = refuse(404, error(-32601, "no such method"))
        refusal = await link.subscribe("x://3", 5)
        assert refusal.result["code"] == -32602 and "no such method" in refusal.result["message"]
        assert [listen.uris for listen in script.listens] == [["x://1"]]


async def test_subscribe_fails_in_time_and_with_the_cause() -> None:
    script = ModernScript()
    async with linked(script) as (_, link):
        await script.until(lambda: script.listens)
        script.methods["subscriptions/listen"] = refuse(503)
        with pytest.raises(UpstreamError, match="503"):
            await link.subscribe("x://1", 5)

        async def mute(request: Request, answer: Answer) -> None:
            await answer.start_stream()
            await answer.gone()

        script.methods["subscriptions/listen"] = mute
        with pytest.raises(UpstreamTimeout):
            await link.subscribe("x://1", 0.2)
        assert [listen.uris for listen in script.listens] == [[]]
        async with trio.open_nursery() as nursery:

            async def subscribe() -> None:
                with pytest.raises(LinkLost):
                    await link.subscribe("x://1", 5)

            nursery.start_soon(subscribe)
            await trio.testing.wait_all_tasks_blocked()
            link.lose(LinkLost("gone"))
        with pytest.raises(LinkLost):
            await link.subscribe("x://1", 5)


# ---------------------------------------------------------------------------------- legacy servers, modern clients
async def test_M_to_L_what_was_for_one_hop_does_not_reach_a_legacy_server() -> None:
    async with linked(McpScript(), World((Era.LEGACY,))) as (server, link):
        params = {
            "name": "t",
            "inputResponses": {"q": {}},
            "requestState": "s",
            "_meta": {**CONTEXT, "x/y": 1, "progressToken": "p"},
        }
        await reply_of(link, params, client=modern_client())
        sent = server.calls("tools/call")[0].json
    assert sent["params"] == {"name": "t", "_meta": {"x/y": 1, "progressToken": sent["id"]}}
    assert "mcp-method" not in server.calls("tools/call")[0].headers


async def test_M_to_L_a_client_that_wants_logs_has_the_server_told_before_its_call() -> None:
    script = McpScript()
    levels: list[str] = []

    @script.on("logging/setLevel")
    async def set_level(request: Request, answer: Answer) -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert [a for a in asked(server) if a != "GET"][-1] == "logging/setLevel"  # its reply is waited for
        levels.append(request.json["params"]["level"])
        await answer.result(request, {})

    async with serve(script) as server, connect_http(Origin(server.url()), World((Era.LEGACY,)).terms) as link:
        await reply_of(link, {"name": "t"}, client=modern_client())
        assert levels == []
        server.seen[:] = server.seen[:2]
        for level in ("warning", "error", "debug", "info"):
            meta = {**CONTEXT, META + "logLevel": level}
            await reply_of(link, {"name": "t", "_meta": meta}, client=modern_client(log_level=level))
        assert levels == ["warning", "debug"]  # the lowest level that any of them wanted
        assert [m for m in asked(server) if m.startswith(("logging", "tools"))] == [
            "logging/setLevel",
            "tools/call",
            "tools/call",
            "logging/setLevel",
            "tools/call",
            "tools/call",
        ]
        # A legacy client's own request counts.
        await reply_of(link, {"level": "error"}, method="logging/setLevel")
        await reply_of(link, {"name": "t", "_meta": CONTEXT}, client=modern_client(log_level="info"))
        assert levels == ["warning", "debug", "error", "info"]


async def test_M_to_L_a_level_that_the_server_refuses_is_not_asked_for_again_and_none_is_where_it_has_no_logs() -> None:
    script = McpScript()

    script.methods["logging/setLevel"] = refuse(200, error(-32601))
    for logs in (True, False):
        if not logs:
            del script.capabilities["logging"]
        async with linked(script, World((Era.LEGACY,))) as (server, link):
            for _ in range(2):
                assert await reply_of(link, {"name": "t"}, client=modern_client(log_level="info"))
            assert asked(server).count("logging/setLevel") == int(logs)


async def test_M_to_L_logs_that_belong_to_no_stream_reach_the_only_call_of_a_client_without_a_session() -> None:
    script, world = McpScript(), World((Era.LEGACY,), isolated=True)
    stream: list[Answer] = []

    async def get(request: Request, answer: Answer) -> None:
        await answer.start_stream()
        stream.append(answer)
        await answer.gone()

    script.stream = get

    @script.on("tools/call")
    async def call_tool(request: Request, answer: Answer) -> None:
        await stream[0].event({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "d"}})
        await said.wait()
        await answer.result(request, {})

    async with linked(script, world) as (server, link):
        await server.until(lambda: "GET" in asked(server))
        said = trio.Event()
        call = link.call(exchange({"name": "t"}, client=modern_client()))
        assert '"d"' in (await event_of(call, Interim)).text
        said.set()
        await event_of(call, Reply)
        said = trio.Event()
        call = link.call(exchange({"name": "t"}))
        await world.until(1)  # it has a session's stream for them
        said.set()
        assert type(await event_of(call, Reply)) is Reply


async def test_legacy_subscriptions_are_requests() -> None:
    async with linked(McpScript(), World((Era.LEGACY,))) as (server, link):
        assert (await link.subscribe("x://1", 5)).result == {"echo": {"uri": "x://1"}}
        assert (await link.unsubscribe("x://1", 5)).result == {"echo": {"uri": "x://1"}}
        assert [a for a in asked(server) if a != "GET"][-2:] == ["resources/subscribe", "resources/unsubscribe"]


async def test_a_tool_that_only_runs_as_a_task_is_run_as_one() -> None:
    script = McpScript(sse_replies=True)
    script.capabilities["tasks"] = {"requests": {"tools": {"call": {}}}}
    hold = trio.Event()

    @script.on("tools/call")
    async def call_tool(request: Request, answer: Answer) -> None:
        if "task" not in request.json["params"]:
            error = {"code": -32601, "message": "task required"}
            await answer.json({"jsonrpc": "2.0", "id": request.json["id"], "error": error})
        else:
            await answer.result(request, {"task": {"taskId": "t1", "status": "working"}})

    @script.on("tasks/result")
    async def result(request: Request, answer: Answer) -> None:
        token = server.calls("tools/call")[-1].json["params"]["_meta"]["progressToken"]
        await answer.start_stream()
        note = {"progressToken": token, "progress": 1}
        await answer.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": note})
        await hold.wait()
        await answer.event({"jsonrpc": "2.0", "id": request.json["id"], "result": {"content": []}})
        await answer.end()

    @script.on("tools/list")
    async def list_tools(request: Request, answer: Answer) -> None:
        await answer.result(request, {"tools": [{"name": "t", "execution": {"taskSupport": "required"}}]})

    async with serve(script) as server, connect_http(Origin(server.url()), World((Era.LEGACY,)).terms) as link:
        params = {"name": "t", "_meta": {"progressToken": "mine"}}
        call = link.call(exchange(params))
        assert json.loads((await event_of(call, Interim)).text)["params"]["progressToken"] == "mine"
        hold.set()
        assert (await event_of(call, Reply)).message.result == {"content": []}
        assert server.calls("tasks/result")[0].json["params"] == {"taskId": "t1"}
        assert await reply_of(link, {}, method="tools/list") == {"tools": [{"name": "t"}]}
        hold = trio.Event()
        call = link.call(exchange(params))
        await event_of(call, Interim)
        call.cancel("enough")
        await server.until(lambda: "tasks/cancel" in asked(server) and "notifications/cancelled" in asked(server))
        assert server.calls("tasks/cancel")[0].json["params"] == {"taskId": "t1"}


# ------------------------------------------------------------------------------------------------------- the real one
@asynccontextmanager
async def sdk_server(python: Path, tmp_path: Path) -> AsyncIterator[str]:
    """The official SDK's server, over HTTP."""
    program = tmp_path / "server.py"
    program.write_text(SDK_SERVER)
    with trio.socket.socket() as probe:
        await probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PORT": str(port)}
    process = await trio.lowlevel.open_process(
        [str(python), str(program)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    try:
        with trio.fail_after(60):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


SDK_SERVER = '''
import os
from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("sdk")

@server.tool()
def echo(text: str) -> str:
    return text

@server.tool()
async def grow(ctx: Context) -> str:
    await ctx.report_progress(1, 2, "half")
    @server.tool()
    def added() -> str:
        return "new"
    await ctx.notify_tools_changed() if hasattr(ctx, "notify_tools_changed") else None
    return "grown"

@server.resource("note://{name}")
def note(name: str) -> str:
    return f"note {name}"

server.run("streamable-http", host="127.0.0.1", port=int(os.environ["PORT"]))
'''


@pytest.mark.real
@pytest.mark.parametrize(
    ("eras", "era"),
    [
        (MODERN_FIRST, Era.MODERN),
        (LEGACY_FIRST, Era.LEGACY),
        ((Era.MODERN,), Era.MODERN),
        ((Era.LEGACY,), Era.LEGACY),
    ],
)
async def test_the_official_sdks_server_in_either_era(
    eras: tuple[Era, ...], era: Era, real_part: Callable[[str], Path], tmp_path: Path
) -> None:
    world = World(eras, isolated=True)
    async with (
        sdk_server(real_part("py/sdk") / "bin/python", tmp_path) as url,
        connect_http(Origin(url), world.terms) as link,
    ):
        assert link.era is era and link.details["era"] == era.value
        assert link.facts["serverInfo"]["name"] == "sdk"
        await link.ping(5)
        for client in (legacy_client(), modern_client()):
            extra = {"_meta": CONTEXT} if client.era is Era.MODERN else {}
            listed = await reply_of(link, extra, method="tools/list", client=client)
            assert {"echo", "grow"} <= {t["name"] for t in listed["tools"]}
            result = await reply_of(link, {"name": "echo", "arguments": {"text": "ü"}, **extra}, client=client)
            assert result["structuredContent"] == {"result": "ü"}
            assert ("resultType" in result) is (client.era is era is Era.MODERN)
            read = await reply_of(link, {"uri": "note://ü", **extra}, method="resources/read", client=client)
            assert read["contents"][0]["text"].startswith("note ")
            meta = {**extra.get("_meta", {}), "progressToken": "mine"}
            call = link.call(exchange({"name": "grow", "arguments": {}, "_meta": meta}, client=client))
            progress = json.loads((await event_of(call, Interim)).text)["params"]
            assert progress["progressToken"] == "mine" and progress["message"] == "half"
            assert (await event_of(call, Reply)).message.result["content"][0]["text"] == "grown"
        if era is Era.MODERN:
            assert (await link.subscribe("note://a", 5)).result == {}
            assert (await link.unsubscribe("note://a", 5)).result == {}
