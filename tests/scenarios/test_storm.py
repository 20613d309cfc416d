"""Row A8: nothing is lost, doubled or crossed while servers crash and the catalog is rewritten (P1, P2, P5, RB28)."""

from __future__ import annotations

import collections
import concurrent.futures
import http.client
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from running import RunningGateway, echo_entry

CALLS = int(os.environ.get("MCP_GATEWAY_STORM_CALLS", "50000"))
CLIENTS = 64

COUNTING = """
import json, os, sys, threading
# Answers each call with its own text; writes every call it sees to a log; dies on a tool called "die".
log = open(sys.argv[1], "a", buffering=1)
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        info = {"name": "c", "version": "1"}
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
    elif m.get("method") == "tools/call":
        text = m["params"]["arguments"]["text"]
        log.write(text + "\\n")
        if m["params"]["name"] == "die":
            os._exit(3)
        result = {"content": [{"type": "text", "text": text}]}
    elif "id" in m:
        result = {}
    else:
        continue
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": result}) + "\\n")
    sys.stdout.flush()
"""


def test_A8_P5_a_thousand_concurrent_first_calls_start_one_process(tmp_path: Path) -> None:
    slow = echo_entry("echo", env={"ECHO_START_DELAY": "1"}, max_connections_per_server=64)
    with RunningGateway(tmp_path, [slow], config={"request_timeout_seconds": 60}) as gateway:
        connections = []
        for n in range(1000):
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=90)
            body = {"server_id": "echo", "jsonrpc": "2.0", "id": 1, "method": "tools/call"}
            body["params"] = {"name": "echo", "arguments": {"text": f"t{n}"}}
            connection.request("POST", "/mcp", json.dumps(body), {"Content-Type": "application/json"})
            connections.append(connection)
        for n, connection in enumerate(connections):
            reply = connection.getresponse()
            data = json.loads(reply.read())
            assert reply.status == 200, data
            assert data["result"]["content"][0]["text"] == f"t{n}"
            connection.close()
        assert len([line for line in gateway.lines if "Starting server" in line]) == 1


def test_A8_P1_P2_a_storm_of_equal_ids_crashes_and_reloads(tmp_path: Path) -> None:
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    ids = ["a", "b", "c", "d"]

    def entry(id: str, note: int = 0) -> dict[str, Any]:
        runtime = {
            "type": "local-process",
            "command": sys.executable,
            "args": ["-E", "-s", str(script), str(tmp_path / f"{id}.log")],
        }
        return {"id": id, "runtime": runtime, "max_connections_per_server": 32, "description": f"v{note}"}

    config = {"request_timeout_seconds": 60}
    stop = threading.Event()
    outcomes: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()
    wrong: list[str] = []

    def client(k: int, gateway: RunningGateway) -> None:
        rng = random.Random(k)
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=90)
        tally: collections.Counter[str] = collections.Counter()
        for n in range(CALLS // CLIENTS):
            id = rng.choice(ids)
            text = f"{id}-{k}-{n}"
            die = id in ("c", "d") and rng.random() < 0.002
            body = {"server_id": id, "jsonrpc": "2.0", "id": n, "method": "tools/call"}
            body["params"] = {"name": "die" if die else "echo", "arguments": {"text": text}}
            connection.request("POST", "/mcp", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            data = json.loads(reply.read())
            if reply.status == 200:
                if data["id"] != n or data["result"]["content"][0]["text"] != text:
                    wrong.append(f"{text}: {data}")
                else:
                    tally["own"] += 1
            elif reply.status == 502 and id in ("c", "d"):
                tally["502"] += 1
                if data["id"] != n:
                    wrong.append(f"{text}: {data}")
            else:
                wrong.append(f"{text}: {reply.status} {data}")
        connection.close()
        with lock:
            outcomes.update(tally)

    with RunningGateway(tmp_path, [entry(i) for i in ids], config=config) as gateway:

        def rewrite() -> None:
            note = 0
            while not stop.wait(1):
                note += 1
                gateway.write([entry("a"), entry("b"), entry("c"), entry("d", note)])

        writer = threading.Thread(target=rewrite)
        writer.start()
        begin = time.monotonic()
        try:
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                for done in [pool.submit(client, k, gateway) for k in range(CLIENTS)]:
                    done.result()
        finally:
            stop.set()
            writer.join()
        seconds = time.monotonic() - begin
        assert gateway.process.poll() is None
        starts = collections.Counter(
            line.split("server_id=")[1].split()[0] for line in gateway.lines if "Starting server" in line
        )
    assert not wrong, wrong[:5]
    assert outcomes["own"] + outcomes["502"] == CALLS // CLIENTS * CLIENTS
    assert outcomes["502"] > 0, "crashes did happen"
    for id in ids:
        seen = collections.Counter((tmp_path / f"{id}.log").read_text().splitlines())
        doubled = [text for text, count in seen.items() if count > 1]
        assert not doubled, doubled[:5]
    assert starts["a"] == starts["b"] == 1, "unchanged, healthy servers were never restarted"
    print(f"{dict(outcomes)} in {seconds:.1f} s, starts {dict(starts)}")
