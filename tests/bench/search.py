"""What search mode saves and whether it finds the right tool, for the table in README. Run by hand:

    python3 tests/bench/search.py [--tokens COMMAND]

The tools are those of eight real servers, as tests/fixtures/real_tools.json has them; the tasks are those of
tests/fixtures/search_tasks.json, and of search_tasks_unseen.json, which the ranking was never tuned on. Bytes are of
the results that a real gateway sends. COMMAND reads a text from its input and prints the number of tokens in it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from running import HttpClient, RunningGateway

from gateway.directory.search import Index

TESTS = Path(__file__).resolve().parent.parent
REAL = json.loads((TESTS / "fixtures" / "real_tools.json").read_text())
TASKS = {
    name: json.loads((TESTS / "fixtures" / f"{name}.json").read_text())
    for name in ("search_tasks", "search_tasks_unseen")
}
QUERY = "see what changed between two branches"
ROUNDS = 20


def serve(id: str) -> None:
    """A stdio server that lists the tools of a real one, and has nothing else."""
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        if message["method"] == "initialize":
            info, version = {"name": id, "version": "1"}, "2025-11-25"
            reply["result"] = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        elif message["method"] == "tools/list":
            reply["result"] = {"tools": REAL[id]}
        else:
            reply["error"] = {"code": -32601, "message": "Method not found"}
        print(json.dumps(reply), flush=True)


def answers(folder: Path) -> dict[str, str]:
    """The results that clients pay for, as compact JSON."""
    command = {"type": "local-process", "command": sys.executable}
    servers = [{"id": id, "runtime": {**command, "args": ["-E", "-s", __file__, "--serve", id]}} for id in REAL]
    with RunningGateway(folder, servers, config={"list_timeout_seconds": 60}) as gateway:
        plain = HttpClient(gateway, "/mcp", "2025-11-25")
        search = HttpClient(gateway, "/mcp?mode=search", "2025-11-25")
        asked = {
            "tools/list": plain.request("tools/list"),
            "tools/list in search mode": search.request("tools/list"),
        }
        for what, name, arguments in (
            (f'search_tools "{QUERY}"', "search_tools", {"query": QUERY}),
            ("the same, limit 3", "search_tools", {"query": QUERY, "limit": 3}),
            ("describe_tool git__git_diff", "describe_tool", {"name": "git__git_diff"}),
        ):
            asked[what] = search.request("tools/call", {"name": name, "arguments": arguments})
    listed = asked["tools/list"]["result"]["tools"]
    assert len(listed) == sum(len(tools) for tools in REAL.values()), len(listed)
    return {
        what: json.dumps(reply["result"], ensure_ascii=False, separators=(",", ":")) for what, reply in asked.items()
    }


def quality() -> None:
    """Print the share of tasks whose tool is found, and what a search takes."""
    named = [(f"{id}__{item['name']}", id, item) for id, items in REAL.items() for item in items]
    index = Index([(name, id, {**item, "name": name}) for name, id, item in named])
    print(f"{sum(map(len, REAL.values()))} tools of {len(REAL)} servers; the right tool is among the first 1, 3, 10:")
    for name, tasks in TASKS.items():
        places = []
        for task in tasks:
            found = [hit.name for hit in index.search(task["task"], limit=10)]
            places.append(min((found.index(name) for name in task["expect"] if name in found), default=10))
        shares = (sum(place < first for place in places) / len(places) for first in (1, 3, 10))
        print(f"  {name}, {len(tasks)} tasks: {', '.join(f'{share:.0%}' for share in shares)}")
    rounds = []
    for _ in range(ROUNDS):
        before = time.process_time()
        for task in TASKS["search_tasks"]:
            index.search(task["task"], limit=10)
        rounds.append((time.process_time() - before) / len(TASKS["search_tasks"]))
    print(f"a search takes {statistics.median(rounds) * 1e6:.0f} us of CPU")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", metavar="COMMAND", help="reads a text, prints the number of its tokens")
    parser.add_argument("--serve", choices=REAL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    quality()
    with tempfile.TemporaryDirectory() as folder:
        texts = answers(Path(folder))
    for what, text in texts.items():
        line = f"{what}: {len(text.encode())} bytes"
        if args.tokens:
            done = subprocess.run(shlex.split(args.tokens), input=text.encode(), capture_output=True, check=True)
            line += f", {int(done.stdout)} tokens"
        print(line)


if __name__ == "__main__":
    main()
