"""Rows RB01 to RB13, L14, O9, K5, G16 and K28: hostile servers behind a real gateway.

The servers do what their calls say (``fixtures/actor.py``); test_gateway_rows.py has the sentences that callers get.
Limits of a tenth of a second are asserted at five times that, for machines that do something else as well.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from actors import Actor, memory, wait_until
from running import RunningGateway, echo_entry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

STUBBORN = "sleeper = ['/bin/sh', '-c', \"trap '' TERM HUP INT; while :; do sleep 600; done\", {marker!r}]\n"


class House:
    """One gateway, a well-behaved neighbour and one actor for each kind of trouble."""

    def __init__(self, folder: Path) -> None:
        more: dict[str, dict[str, Any]] = {
            "plain": {"request_timeout_seconds": 10},
            "short": {"request_timeout_seconds": 1},
            "small": {"max_message_bytes": 100_000, "request_timeout_seconds": 10},
            "stop": {"stop_grace_seconds": 1},
            "own": {"isolation": "session", "request_timeout_seconds": 10},
            "slow": {"request_timeout_seconds": 1, "prologue": "time.sleep(2.5)"},
        }
        self.actors = {id: Actor(folder, id, **options) for id, options in more.items()}
        self.gateway = RunningGateway(folder, [echo_entry("echo"), *(a.entry for a in self.actors.values())])
        for actor in self.actors.values():
            actor.gateway = self.gateway
        self.gateway.call("echo", "echo", {"text": "warm"})
        self.gateway.http("GET", "/stats")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    built = House(tmp_path_factory.mktemp("children"))
    with built.gateway:
        yield built
    assert "Traceback" not in "\n".join(built.gateway.lines)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def actor(house: House, id: str = "plain") -> Actor:
    found = house.actors[id]
    found.forget()
    return found


def living(marker: str) -> list[int]:
    """Processes with this word on their command line."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


# ------------------------------------------------------------------------------------------- beginnings that go wrong
@pytest.mark.parametrize("code", [0, 7])
def test_RB01_an_exit_before_the_handshake_is_told_within_a_second(tmp_path: Path, code: int) -> None:
    """Even with 0. All who wait for the start are told, with the last lines and without values of variables."""
    lines = "; ".join(f"print('line {n}', os.environ['TOKEN'], file=sys.stderr)" for n in range(30))
    early = Actor(tmp_path, "early", f"{lines}; sys.exit({code})", env={"TOKEN": "${EARLY_TOKEN}"})
    with RunningGateway(tmp_path, [early.entry, echo_entry("echo")], env={"EARLY_TOKEN": "v3ry-secret"}) as gateway:
        early.gateway = gateway
        gateway.call("echo", "echo", {"text": "warm"})
        with ThreadPoolExecutor(4) as pool:
            begin = time.monotonic()
            answers = list(pool.map(lambda _: early.call(""), range(4)))
            assert time.monotonic() - begin < 2
        for status, _, reply in answers:
            assert status == 502
            assert f"process exited with code {code}" in reply["message"]
            assert "line 29 ${EARLY_TOKEN}" in reply["message"]
            assert "line 9 " not in reply["message"], "the last lines, not all"
        status, _, data = gateway.http("POST", "/servers/early/start")
        assert status == 502
        assert json.loads(data)["message"].startswith(f"Failed to start server: process exited with code {code}")
        shown = json.dumps([answers, early.shown, gateway.json("GET", "/stats")], default=str)
        assert "v3ry-secret" not in shown
        assert "v3ry-secret" not in "\n".join(gateway.lines)


def test_RB05_a_silent_handshake_ends_the_whole_group_and_tells_every_waiter(tmp_path: Path) -> None:
    marker = f"silent-{os.getpid()}-{time.monotonic_ns()}"
    code = STUBBORN.format(marker=marker) + "subprocess.Popen(sleeper); signal.signal(15, signal.SIG_IGN)\n"
    silent = Actor(tmp_path, "silent", code + "time.sleep(600)", start_timeout_seconds=1, stop_grace_seconds=1)
    with RunningGateway(tmp_path, [silent.entry]) as gateway, ThreadPoolExecutor(5) as pool:
        silent.gateway = gateway
        waiters = [pool.submit(silent.call, "") for _ in range(5)]
        wait_until(lambda: len(living(marker)) == 2)
        for waiter in waiters:
            status, _, reply = waiter.result()
            assert status == 502
            assert "no handshake within 1 s (start_timeout_seconds)" in reply["message"]
        assert silent.starts() == 1
        wait_until(lambda: not living(marker), 6)


def test_RB06_A9_P10_a_crash_loop_backs_off_and_opens_the_circuit(tmp_path: Path) -> None:
    """Failures 1 to 5 by calls and by hand; what the open circuit refuses costs nothing and starts nothing."""
    loop = Actor(tmp_path, "loop", "sys.exit(3)")
    with RunningGateway(tmp_path, [loop.entry]) as gateway:
        loop.gateway = gateway
        for failures in (1, 2):
            assert loop.call("")[0] == 502
            assert loop.starts() == failures, "the second call starts at once"
        status, headers, reply = loop.call("")
        assert (status, headers["retry-after"], loop.starts()) == (502, "1", 2) or headers["retry-after"] == "2"
        assert "failed 2 times in a row (next attempt in" in reply["message"]
        assert "process exited with code 3" in reply["message"]
        assert loop.shown["status"] == "unhealthy"
        wait_until(lambda: loop.call("")[2]["message"].startswith("Failed to connect to server: process exited"), 3)
        assert loop.starts() == 3, "after the wait a call tries again"
        for failures in (4, 5):
            assert gateway.http("POST", "/servers/loop/restart")[0] == 502
            assert loop.starts() == failures, "by hand there is no wait"
        took = []
        for _ in range(10):
            begin = time.monotonic()
            status, headers, reply = loop.call("")
            took.append(time.monotonic() - begin)
            assert status == 502
            assert "failed 5 times in a row (circuit open, next attempt in" in reply["message"]
            assert 25 <= int(headers["retry-after"]) <= 30
        assert statistics.median(took) < 0.025
        assert loop.starts() == 5
        shown = loop.shown
        assert (shown["status"], shown["consecutive_failures"]) == ("unhealthy", 5)
        assert "process exited with code 3" in shown["last_error"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["retry_at"])
        assert gateway.json("GET", "/stats")["servers"]["loop"]["status"] == "unhealthy"


def test_RB07_a_slow_start_goes_on_behind_callers_that_gave_up(house: House) -> None:
    slow = actor(house, "slow")
    before = slow.starts()
    begin = time.monotonic()
    status, _, reply = slow.call("reply()")
    assert status == 504
    assert 0.9 < time.monotonic() - begin < 2
    assert "is still starting" in reply["message"]
    assert slow.shown["status"] == "starting"
    wait_until(lambda: slow.shown["status"] == "running")
    assert slow.text("reply('here')") == "here"
    assert slow.starts() == before + 1
    assert len(slow.calls()) == 1, "the call that gave up never reached it"


def test_RB08_what_can_not_run_is_named_at_once(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("hello")
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/no/such/interpreter\n")
    orphan.chmod(0o755)
    wrong = {
        "absent": ({"command": "no-such-command"}, "command 'no-such-command' was not found; PATH searched"),
        "nowhere": ({"command": "/no/such/file"}, "'/no/such/file' can't be used: no such file or directory"),
        "unmarked": ({"command": str(plain)}, "is not executable (chmod +x it)"),
        "folder": ({"command": str(tmp_path)}, "is a folder, not a program"),
        "orphan": ({"command": str(orphan)}, "the interpreter in its first line, '/no/such/interpreter'"),
        "homeless": ({"command": sys.executable, "working_dir": "/no/such/folder"}, "working_dir '/no/such/folder'"),
    }
    entries = [{"id": id, "runtime": {"type": "local-process", **runtime}} for id, (runtime, _) in wrong.items()]
    with RunningGateway(tmp_path, entries) as gateway:
        gateway.http("GET", "/health")
        for id, (_, what) in wrong.items():
            begin = time.monotonic()
            reply = gateway.rest(id, "tools/call", {"name": "x"})
            assert time.monotonic() - begin < 0.5, id
            assert what in reply["message"], reply
        assert "Traceback" not in "\n".join(gateway.lines)


def test_G16_an_unset_variable_is_that_servers_fault_and_an_empty_one_is_set(tmp_path: Path) -> None:
    needs, empty = Actor(tmp_path, "needs"), Actor(tmp_path, "empty")
    needs.entry["env"] = {"A": "${CHILD_UNSET}", "B": "x${CHILD_UNSET_TOO}y"}
    empty.entry["env"] = {"A": "${CHILD_EMPTY}"}
    with RunningGateway(tmp_path, [needs.entry, empty.entry], env={"CHILD_EMPTY": ""}) as gateway:
        needs.gateway = empty.gateway = gateway
        assert "CHILD_UNSET" in next(line for line in gateway.lines if " WARN " in line)
        status, _, reply = needs.call("reply()")
        assert status == 502
        assert "needs environment variables that are not set: CHILD_UNSET, CHILD_UNSET_TOO" in reply["message"]
        assert empty.text("reply(repr(os.environ['A']))") == "''"
        assert not needs.noted()


def test_K28_without_an_engine_or_a_cluster_the_others_work(tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/none.sock"
    away = [
        {"id": "box", "runtime": {"type": "docker", "image": "acme/box:1", "host": nowhere}},
        {"id": "pod", "runtime": {"type": "podman", "image": "acme/box:1", "host": nowhere}},
        {"id": "job", "runtime": {"type": "k8s-job", "namespace": "m", "image": "acme/j:1"}},
        {"id": "svc", "runtime": {"type": "k8s-service", "namespace": "m", "service_name": "s", "port": 8080}},
    ]
    tried = {"box": "none.sock", "pod": "none.sock", "job": "kubeconfig", "svc": "kubeconfig"}
    home = {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "kubeconfig")}
    with RunningGateway(tmp_path, [*away, echo_entry("echo")], env=home) as gateway:
        for id, what in tried.items():
            status, _, data = gateway.http("POST", "/mcp", {"server_id": id, "method": "tools/list"})
            assert (status, what in data.decode()) == (502, True), data
            status, _, data = gateway.http("POST", f"/servers/{id}/start")
            assert (status, what in data.decode()) == (502, True), data
        assert gateway.call("echo", "echo", {"text": "still"}) == "still"


def test_K5_each_server_gets_the_environment_that_is_its_own(tmp_path: Path) -> None:
    key, mine, yours = "k" * 32, "value-of-mine", "value-of-yours"
    first = Actor(tmp_path, "first", env={"NAMED": "${MINE}", "NUMBER": 7})
    second = Actor(tmp_path, "second", env={"NAMED": "${YOURS}"}, inherit_env=False)
    both = {"MCP_GATEWAY_API_KEY": key, "MINE": mine, "YOURS": yours, "PASSED_ON": "yes"}
    with RunningGateway(tmp_path, [first.entry, second.entry], env=both) as gateway:
        for one in (first, second):
            one.gateway = gateway
        code = "reply(json.dumps(dict(os.environ)))"
        body = {"id": 1, "method": "tools/call", "params": {"name": "act", "arguments": {"code": code}}}
        seen = {}
        for id in ("first", "second"):
            data = gateway.http("POST", "/mcp", {"server_id": id, **body}, headers={"X-API-Key": key})[2]
            seen[id] = json.loads(json.loads(data)["result"]["content"][0]["text"])
        assert (seen["first"]["NAMED"], seen["first"]["NUMBER"], seen["first"]["PASSED_ON"]) == (mine, "7", "yes")
        assert key not in seen["first"].values(), "the gateway's key is nobody's"
        assert "YOURS" not in seen["first"], "what another entry names is not passed on"
        assert set(seen["second"]) <= {"PATH", "HOME", "LANG", "TMPDIR", "USER", "NAMED", "LC_CTYPE", "PWD"}
        assert seen["second"]["NAMED"] == yours
        for one in (first, second):
            pid = gateway.json("GET", f"/servers/{one.id}", headers={"X-API-Key": key})["instances"][0]["pid"]
            assert mine not in Path(f"/proc/{pid}/cmdline").read_text()


# ------------------------------------------------------------------------------------------------- ends of all kinds
def test_RB02_L6_an_exit_while_idle_is_just_stopped(house: House) -> None:
    idle = actor(house)
    idle.text("reply()")
    first = idle.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: idle.shown["status"] == "stopped", 2)
    shown = idle.shown
    assert "started_at" not in shown
    assert "consecutive_failures" not in shown, "it harmed nobody"
    assert not Path(f"/proc/{first}").exists(), "reaped"
    assert idle.text("reply('again')") == "again"
    assert idle.pid != first


def test_RB03_P2_P4_a_kill_mid_call_fails_its_calls_and_replays_none(house: House, pool: ThreadPoolExecutor) -> None:
    doomed = actor(house)
    doomed.text("reply()")
    neighbour = pool.submit(house.gateway.call, "echo", "sleep", {"seconds": 0.8})
    calls = [pool.submit(doomed.call, "pass") for _ in range(4)]
    wait_until(lambda: len(doomed.calls()) == 5)
    pid = doomed.pid
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for call in calls:
        status, _, reply = call.result()
        assert status == 502
        assert "Server 'plain' ended: process was killed by signal SIGKILL" in reply["message"]
    assert time.monotonic() - killed < 0.5, "told within 100 ms (x5)"
    begin = time.monotonic()
    assert doomed.text("reply('new')") == "new"
    assert time.monotonic() - begin < 2, "served within 1 s and its own start"
    assert len(doomed.calls()) == 6, "nothing was sent twice"
    assert doomed.pid != pid
    assert neighbour.result() == "slept"


def test_RB13_L14_stop_is_polite_first_and_thorough_at_last(house: House, pool: ThreadPoolExecutor) -> None:
    """End of input, SIGTERM to the group, grace (1 s here), SIGKILL to all: those who left the group, too."""
    stubborn = actor(house, "stop")
    marker = f"stubborn-{os.getpid()}-{time.monotonic_ns()}"
    code = STUBBORN.format(marker=marker) + (
        "subprocess.Popen(sleeper); subprocess.Popen(sleeper, start_new_session=True)\n"
        "signal.signal(15, lambda *_: note('SIGTERM'))\n"
        "kept['end'] = os.fdopen(os.dup(0), 'rb', 0)\n"
        "reply()\n"
        "while os.read(0, 65536): pass\n"
        "note('end of input')\n"
        "while True: time.sleep(600)\n"
    )
    assert stubborn.text(code) == "ok"
    wait_until(lambda: len(living(marker)) == 2)
    pid = stubborn.pid
    begin = time.monotonic()
    stopping = pool.submit(house.gateway.http, "POST", "/servers/stop/stop")
    wait_until(lambda: stubborn.shown["status"] == "shutting_down")
    assert stopping.result()[0] == 200
    assert time.monotonic() - begin < 1 + 1 + 1, "within grace + 1 s"
    assert not Path(f"/proc/{pid}").exists(), "reaped as well"
    assert not living(marker)
    told = [(what, at) for _, at, what in stubborn.noted() if isinstance(what, str)]
    assert [what for what, _ in told] == ["end of input", "SIGTERM"]
    assert told[0][1] - begin < 0.5
    assert 0.5 < told[1][1] - told[0][1] < 1.5
    assert stubborn.shown["status"] == "stopped"


# ---------------------------------------------------------------------------------------------------------- slow ones
def test_RB04_L16_a_call_that_hangs_costs_itself_only(house: House, pool: ThreadPoolExecutor) -> None:
    """Others on the same pipe go on, the server is told, and its late reply is nobody's."""
    short = actor(house, "short")
    short.text("reply()")
    pid = short.pid
    begin = time.monotonic()
    hanging = pool.submit(short.call, "kept['late'] = id")
    while not hanging.done():
        assert short.text("reply('meanwhile')") == "meanwhile"
    status, _, reply = hanging.result()
    assert status == 504
    assert 0.9 < time.monotonic() - begin < 2
    assert "did not answer within 1 s" in reply["message"]
    id = next(m["id"] for m in short.calls() if "late" in m["params"]["arguments"]["code"])
    told = short.wait_noted(lambda m: isinstance(m, dict) and m.get("method") == "notifications/cancelled")
    assert told[2]["params"]["requestId"] == id
    assert short.text("answer(kept['late'], 'too late'); reply('mine')") == "mine"
    assert short.pid == pid


def test_RB12_a_server_that_stops_reading_costs_its_callers_only(house: House, pool: ThreadPoolExecutor) -> None:
    """A bounded queue, timeouts for its own callers; when it reads again it hears of the cancels and serves on."""
    deaf = actor(house, "short")
    deaf.text("reply()")
    pid = deaf.pid
    before = memory(house.gateway)
    sleeping = pool.submit(deaf.call, "time.sleep(3); note('awake')")
    wait_until(lambda: len(deaf.calls()) == 2)
    big = "x" * 3_000_000
    waiting: list[Future[Any]] = [pool.submit(deaf.call, "pass", ballast=big) for _ in range(7)]
    slowest = 0.0
    while not all(call.done() for call in waiting):
        begin = time.monotonic()
        assert house.gateway.call("echo", "echo", {"text": "near"}) == "near"
        slowest = max(slowest, time.monotonic() - begin)
    assert {call.result()[0] for call in waiting} <= {503, 504}
    assert 503 in {call.result()[0] for call in waiting}, "21 MB do not fit in 16"
    assert sleeping.result()[0] == 504
    assert slowest < 0.75
    assert memory(house.gateway) - before < 128, "a queue of 16 MB, and 21 MB of requests while they are refused"
    deaf.wait_noted(lambda m: m == "awake")
    deaf.wait_noted(lambda m: isinstance(m, dict) and m.get("method") == "notifications/cancelled")
    assert deaf.text("reply('reading again')") == "reading again"
    assert deaf.pid == pid


# ------------------------------------------------------------------------------------------------------------- floods
FLOODS = {
    # stdout without a newline
    "unended": "while True: os.write(1, b'x' * 65536)",
    # valid messages that nobody asked for
    "notices": """
line = b'{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"%s"}}\\n' % (b'y' * 500)
while True: write(line * 100)
""",
    "changes": """
line = b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}\\n'
while True: write(line * 1000)
""",
    "replies": """
line = b'{"jsonrpc":"2.0","id":123456,"result":{"a":"%s"}}\\n' % (b'y' * 500)
while True: write(line * 100)
""",
    # for each a reply is due, and nobody reads them
    "pings": """
n = 0
while True:
    n += 100
    write(b''.join(b'{"jsonrpc":"2.0","id":"%d","method":"ping"}\\n' % i for i in range(n, n + 100)))
""",
    "questions": """
n = 0
line = b'{"jsonrpc":"2.0","id":"%d","method":"sampling/createMessage","params":{"messages":[],"maxTokens":1}}\\n'
while True:
    n += 100
    write(b''.join(line % i for i in range(n, n + 100)))
""",
    "garbage": "while True: os.write(1, b'no json at all\\xff\\n' * 4000)",
    "stderr": "while True: os.write(2, b'e' * 120 + b'\\n' + b'f' * 65536)",
}


@pytest.mark.parametrize("kind", FLOODS)
def test_RB09_P8_P9_a_flood_of(house: House, pool: ThreadPoolExecutor, kind: str) -> None:
    """Memory stays within 64 MiB, the neighbour answers all the time, /health at once, and the flood can be stopped."""
    flooding = actor(house, "short")
    flooding.text("reply()")
    before = memory(house.gateway)
    flood = pool.submit(flooding.call, FLOODS[kind])
    most, neighbour, health = 0.0, [], []
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        begin = time.monotonic()
        assert house.gateway.http("GET", "/health")[0] == 200
        health.append(time.monotonic() - begin)
        begin = time.monotonic()
        assert house.gateway.call("echo", "echo", {"text": "near"}) == "near"
        neighbour.append(time.monotonic() - begin)
        most = max(most, memory(house.gateway) - before)
    assert flood.result()[0] == 504
    assert most <= 64
    assert sorted(health)[len(health) * 9 // 10] < 0.25, "50 ms (x5)"
    assert statistics.median(neighbour) < 0.25
    begin = time.monotonic()
    assert house.gateway.http("POST", "/servers/short/stop")[0] == 200
    assert time.monotonic() - begin < 5
    seen = len(house.gateway.lines)
    assert seen < 20_000, "the log is no flood either"


def test_RB09_a_line_over_the_limit_ends_the_call_it_names(house: House, pool: ThreadPoolExecutor) -> None:
    """Found by its id in the first or last 4 KiB; the other calls of the pipe do not notice."""
    small = actor(house, "small")
    small.text("reply()")
    for place in ("first", "last"):
        bystander = pool.submit(small.call, "kept['by'] = id")
        wait_until(lambda: any("'by'" in m["params"]["arguments"]["code"] for m in small.calls()))
        first = place == "first"
        ahead, behind = ("'id': id, ", "") if first else ("", ", 'id': id")
        code = f"send({{'jsonrpc': '2.0', {ahead}'result': {{'content': 'x' * 300000}}{behind}}})"
        status, _, reply = small.call(code)
        assert status == 502
        assert "sent a message of over 100000 bytes (max_message_bytes)" in reply["message"]
        assert not bystander.done()
        assert small.text("answer(kept['by'], 'unharmed'); reply('next')") == "next"
        assert bystander.result()[2]["result"]["content"][0]["text"] == "unharmed"
        small.forget()


def test_RB09_a_line_over_the_limit_without_an_id_ends_all_calls_of_its_pipe(
    house: House, pool: ThreadPoolExecutor
) -> None:
    small = actor(house, "small")
    small.text("reply()")
    pid = small.pid
    waiting = [pool.submit(small.call, "pass") for _ in range(3)]
    wait_until(lambda: len(small.calls()) == 4)
    assert small.call("write(b'z' * 300000 + b'\\n')")[0] == 502
    for call in waiting:
        status, _, reply = call.result()
        assert status == 502
        assert "max_message_bytes" in reply["message"]
    assert small.text("reply('goes on')") == "goes on"
    assert small.pid == pid


# ------------------------------------------------------------------------------------------------------------ nonsense
def test_RB10_nonsense_is_dropped_and_the_next_good_line_works(house: House) -> None:
    noisy = actor(house)
    nonsense = [
        b"listening on port 3000",
        b"\xff\xfe\x00",
        b"",
        b"{",
        b"[]",
        b"[[[[" * 2000,
        b"null",
        b'"text"',
        b'{"jsonrpc":"2.0"}',
        b'{"jsonrpc":"2.0","id":1,"id":2,"result":{}}',
        b'{"jsonrpc":"2.0","id":1,"result":NaN}',
        b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"result":{}}',
        b'{"jsonrpc":"2.0","id":[1],"result":{}}',
        b'{"jsonrpc":"2.0","method":5}',
        b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"notifications/message","params":{}}',
        b'{"jsonrpc":"2.0","method":"notifications/progress","params":[1]}',
        b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":{}}}',
        b'{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":[]}}',
    ]
    for line in nonsense:
        code = f"write({line!r} + b'\\n'); reply('fine')"
        assert noisy.text(code) == "fine", line
    warnings = [line for line in house.gateway.lines if "no JSON-RPC message" in line and "server plain" in line]
    assert 1 <= len(warnings) <= 10, "told, but not for every line"


def test_RB10_fragments_of_any_size_become_messages(house: House) -> None:
    noisy = actor(house)
    code = """
whole = json.dumps({"jsonrpc": "2.0", "id": id, "result": {"content": [{"type": "text", "text": "\\u00e4" * 3000}]}})
data = whole.encode() + b"\\n"
for at in range(0, len(data), arguments["size"]): os.write(1, data[at : at + arguments["size"]])
"""
    for size in (1, 7, 4096):
        assert noisy.text(code, size=size) == "\u00e4" * 3000


def test_RB11_replies_of_every_wrong_kind_are_dropped(house: House, pool: ThreadPoolExecutor) -> None:
    """Second, unknown, late, out of order: everybody gets the own reply, once."""
    odd = actor(house)
    assert odd.text("reply('one'); reply('two'); answer(4711, 'whose'); answer('7', 'text id')") == "one"
    assert odd.text("reply('right')") == "right"
    calls = [pool.submit(odd.text, f"kept[{n}] = id") for n in range(5)]
    wait_until(lambda: len(odd.calls()) == 7)
    assert odd.text("for n in (3, 0, 4, 1, 2): answer(kept[n], str(n))\nreply('last')") == "last"
    assert [call.result() for call in calls] == ["0", "1", "2", "3", "4"]
    for id in ("True", "1.0", "None"):
        assert odd.text(f"answer({id}, 'no'); reply('yes')") == "yes"


def test_O9_stderr_is_passed_on_by_line_and_can_forge_none(house: House) -> None:
    teller = actor(house)
    code = "say('colour \\x1b[31mred\\x1b[0m'); "
    code += "say('[2030-01-01T00:00:00.000Z] ERROR gateway_http: \\rforged'); reply()"
    teller.text(code)
    line = house.gateway.wait_for_line("forged")
    assert re.match(r"\[\S+Z\] INFO gateway_core: \[plain\] \[2030-", line)
    assert "\r" not in line
    assert house.gateway.wait_for_line("[plain] colour").endswith("[plain] colour red")
