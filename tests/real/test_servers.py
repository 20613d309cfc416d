"""Row A3: every tool of real servers that needs no internet, called once through ``/servers/ID/mcp`` and once directly.

Both ways see the same folder, repository and environment, set back in between, so the results must be equal.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import HttpClient, RunningGateway, StdioClient

pytestmark = pytest.mark.real

Part = Callable[[str], Path]
NODE = "npm/servers/node_modules/@modelcontextprotocol"
GIT_DATES = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}


def node_server(part: Part, name: str) -> list[str]:
    program = part("npm/servers") / "node_modules/@modelcontextprotocol" / name / "dist/index.js"
    return [shutil.which("node") or "node", str(program)]


def make_files(work: Path) -> None:
    shutil.rmtree(work / "files", ignore_errors=True)
    (work / "files" / "sub").mkdir(parents=True)
    (work / "files" / "a.txt").write_text("one\ntwo\nthree\n")
    (work / "files" / "sub" / "b.txt").write_text("bee\n")
    (work / "files" / "pixel.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for path in [work / "files", *sorted((work / "files").rglob("*"))]:
        os.utime(path, (1_700_000_000, 1_700_000_000))


def make_repository(work: Path) -> None:
    repo = work / "repo"
    shutil.rmtree(repo, ignore_errors=True)
    repo.mkdir()

    def git(*words: str) -> None:
        env = {**os.environ, **GIT_DATES, "GIT_CONFIG_GLOBAL": os.devnull}
        subprocess.run(["git", *words], cwd=repo, env=env, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("config", "user.name", "T")
    git("config", "user.email", "t@example.com")
    (repo / "f.txt").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    (repo / "f.txt").write_text("2\n")


def forget_memory(work: Path) -> None:
    (work / "memory.jsonl").unlink(missing_ok=True)


def nothing(work: Path) -> None:
    """No state to set back."""


PERSON = {"name": "Ann", "entityType": "person", "observations": ["likes tea"]}
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "everything": [
        ("echo", {"message": "hällo\u2028 \U0001f600"}),
        ("get-annotated-message", {"messageType": "error", "includeImage": True}),
        ("get-env", {}),
        ("get-resource-links", {"count": 2}),
        ("get-resource-reference", {"resourceType": "Text", "resourceId": 1}),
        ("get-structured-content", {"location": "Chicago"}),
        ("get-sum", {"a": 1.5, "b": 2}),
        ("get-tiny-image", {}),
        ("gzip-file-as-resource", {"name": "x.gz", "data": "data:text/plain;base64,aGVsbG8="}),
        ("toggle-simulated-logging", {}),
        ("toggle-subscriber-updates", {}),
        ("trigger-long-running-operation", {"duration": 0.1, "steps": 2}),
        ("simulate-research-query", {"topic": "tea"}),
        ("no-such-tool", {}),
    ],
    "filesystem": [
        ("read_file", {"path": "{files}/a.txt"}),
        ("read_text_file", {"path": "{files}/a.txt", "head": 2}),
        ("read_media_file", {"path": "{files}/pixel.png"}),
        ("read_multiple_files", {"paths": ["{files}/a.txt", "{files}/none"]}),
        ("list_directory", {"path": "{files}"}),
        ("list_directory_with_sizes", {"path": "{files}"}),
        ("directory_tree", {"path": "{files}"}),
        ("search_files", {"path": "{files}", "pattern": "**/*.txt"}),
        ("get_file_info", {"path": "{files}/sub"}),
        ("list_allowed_directories", {}),
        ("write_file", {"path": "{files}/new.txt", "content": "new"}),
        ("edit_file", {"path": "{files}/a.txt", "edits": [{"oldText": "two", "newText": "2"}]}),
        ("create_directory", {"path": "{files}/d"}),
        ("move_file", {"source": "{files}/new.txt", "destination": "{files}/d/moved.txt"}),
        ("read_file", {"path": "/etc/passwd"}),
    ],
    "memory": [
        ("create_entities", {"entities": [PERSON, {**PERSON, "name": "Bob"}]}),
        ("create_relations", {"relations": [{"from": "Ann", "to": "Bob", "relationType": "knows"}]}),
        ("add_observations", {"observations": [{"entityName": "Ann", "contents": ["has a cat"]}]}),
        ("read_graph", {}),
        ("search_nodes", {"query": "tea"}),
        ("open_nodes", {"names": ["Bob"]}),
        ("delete_observations", {"deletions": [{"entityName": "Ann", "observations": ["has a cat"]}]}),
        ("delete_relations", {"relations": [{"from": "Ann", "to": "Bob", "relationType": "knows"}]}),
        ("delete_entities", {"entityNames": ["Ann", "Bob"]}),
    ],
    "time": [
        ("get_current_time", {"timezone": "Europe/Zurich"}),
        ("convert_time", {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}),
        ("get_current_time", {"timezone": "Nowhere/At-All"}),
    ],
    "git": [
        ("git_status", {"repo_path": "{repo}"}),
        ("git_diff_unstaged", {"repo_path": "{repo}"}),
        ("git_add", {"repo_path": "{repo}", "files": ["f.txt"]}),
        ("git_diff_staged", {"repo_path": "{repo}"}),
        ("git_commit", {"repo_path": "{repo}", "message": "second"}),
        ("git_log", {"repo_path": "{repo}"}),
        ("git_show", {"repo_path": "{repo}", "revision": "HEAD"}),
        ("git_create_branch", {"repo_path": "{repo}", "branch_name": "side"}),
        ("git_checkout", {"repo_path": "{repo}", "branch_name": "side"}),
        ("git_branch", {"repo_path": "{repo}", "branch_type": "local"}),
        ("git_diff", {"repo_path": "{repo}", "target": "main"}),
        ("git_reset", {"repo_path": "{repo}"}),
    ],
    "fetch": [("fetch", {"url": "http://127.0.0.1:9/nothing-listens-here", "raw": True})],
}
RESETS = {"filesystem": make_files, "git": make_repository, "memory": forget_memory}


def argv_of(name: str, part: Part, work: Path) -> list[str]:
    if name in ("everything", "filesystem", "memory"):
        return node_server(part, f"server-{name}") + ([str(work / "files")] if name == "filesystem" else [])
    return [str(part(f"py/{name}") / "bin" / f"mcp-server-{name}")]


def filled(value: Any, work: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{files}", str(work / "files")).replace("{repo}", str(work / "repo"))
    if isinstance(value, list):
        return [filled(v, work) for v in value]
    return {k: filled(v, work) for k, v in value.items()} if isinstance(value, dict) else value


def settled(text: str) -> str:
    """Without what differs between any two runs: the clock, process-bound variables, access times."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[^\"\\]*", "TIME", text)
    text = re.sub(r"(accessed|created|modified): [^\\\"]*", r"\1: TIME", text)
    text = re.sub(r"\d+:\d\d:\d\d( [AP]M)?", "TIME", text)
    return re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b", "UUID", text)


def env_of(work: Path) -> dict[str, str]:
    kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR", "USER") if k in os.environ}
    return {**kept, **GIT_DATES, "MEMORY_FILE_PATH": str(work / "memory.jsonl")}


@pytest.mark.parametrize("name", CALLS)
def test_A3_every_tool_answers_as_it_does_directly(name: str, real_part: Part, tmp_path: Path) -> None:
    reset = RESETS.get(name, nothing)
    make_files(tmp_path)
    make_repository(tmp_path)
    argv = argv_of(name, real_part, tmp_path)
    env = env_of(tmp_path)
    calls = [(tool, filled(arguments, tmp_path)) for tool, arguments in CALLS[name]]

    reset(tmp_path)
    client = StdioClient(argv, env=env, cwd=tmp_path)
    try:
        tools = client.request("tools/list")["result"]["tools"]
        direct = [client.request("tools/call", {"name": t, "arguments": a}) for t, a in calls]
    finally:
        client.close()
    assert {t["name"] for t in tools} <= {tool for tool, _ in calls}, "a tool that this test does not call"

    reset(tmp_path)
    own = {k: v for k, v in env.items() if k not in ("PATH", "HOME", "LANG", "TMPDIR", "USER")}
    runtime = {"type": "local-process", "command": argv[0], "args": argv[1:], "working_dir": str(tmp_path)}
    entry = {"id": name, "env": own, "inherit_env": False, "runtime": runtime}
    with RunningGateway(tmp_path, [entry]) as gateway:
        through = HttpClient(gateway, f"/servers/{name}/mcp")
        listed = through.request("tools/list")["result"]["tools"]
        replies = [through.request("tools/call", {"name": t, "arguments": a}) for t, a in calls]

    # Tasks are not advertised, so neither is which tools could run as one.
    assert listed == [{name: value for name, value in tool.items() if name != "execution"} for tool in tools]
    for (tool, _), ours, theirs in zip(calls, replies, direct, strict=True):
        ours.pop("id")
        theirs.pop("id")
        assert settled(repr(ours)) == settled(repr(theirs)), tool
        assert ("error" in ours) is False, (tool, ours)
