"""``gateway.pyz warm``: real processes, their output and exit status, and a gateway that then lists without a start."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from listers import Lister, entries, names, running, wait_until
from peers import LegacyClient
from running import RunningGateway, command


def write(folder: Path, listers: list[Lister], **config: Any) -> list[str]:
    """The files, and the command that reads them."""
    (folder / "catalog.yaml").write_text(json.dumps({"servers": entries(listers)}))
    said = {"catalog_path": str(folder / "catalog.yaml"), "state_dir": str(folder / "state"), **config}
    (folder / "config.yaml").write_text(json.dumps(said))
    return [*command(), "warm", "--config", str(folder / "config.yaml")]


def run(argv: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL, **more
    )


def test_warm_keeps_what_all_servers_list(tmp_path: Path) -> None:
    listers = [
        Lister(tmp_path, "a", tools=1, prompts=1, resources=2),
        Lister(tmp_path, "b", tools=130, pages=13),
        Lister(tmp_path, "c", tools=0),
        Lister(tmp_path, "own", entry={"isolation": "session"}),
    ]
    done = run(write(tmp_path, listers))
    assert (done.returncode, done.stderr) == (0, "")
    *progress, last = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in progress] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    said = {line.split()[1].rstrip(":"): re.sub(r" \(\d+\.\d s\)$", "", line.split(": ", 1)[1]) for line in progress}
    assert said == {"a": "1 tool, 1 prompt, 2 resources", "b": "130 tools", "c": "nothing", "own": "5 tools"}
    assert last == f"4 of 4 servers listed; kept in {tmp_path / 'state' / 'listings'}"
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        client = LegacyClient(gateway, "/mcp")
        assert names(client) == set().union(*(lister.names() for lister in listers))
        assert names(client, "prompts/list") == {"a__a-p0"}
        assert names(client, "resources/list") == {"a:///0", "a:///1"}
        assert [lister.starts for lister in listers] == [1, 1, 1, 1]
        assert running(gateway.process.pid) == []


def test_warm_starts_those_that_are_named_only(tmp_path: Path) -> None:
    listers = [Lister(tmp_path, id) for id in ("a", "b", "c")]
    done = run([*write(tmp_path, listers), "c", "a"])
    assert done.returncode == 0
    assert "2 of 2 servers listed" in done.stdout
    assert [lister.starts for lister in listers] == [1, 0, 1]
    with RunningGateway(tmp_path, entries(listers)) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == set().union(*(lister.names() for lister in listers))
    assert [lister.starts for lister in listers] == [1, 1, 1]


def test_warm_asks_again_what_was_kept(tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a")
    argv = write(tmp_path, [lister])
    assert "a: 5 tools" in run(argv).stdout
    lister.becomes(tools=8)
    assert "a: 8 tools" in run(argv).stdout
    assert lister.starts == 2
    with RunningGateway(tmp_path, entries([lister])) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == {f"a__a-{n}" for n in range(8)}
    assert lister.starts == 2


def test_warm_names_who_is_unknown_and_starts_nobody(tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a")
    done = run([*write(tmp_path, [lister]), "a", "nope", "neither"])
    assert done.returncode == 2
    assert done.stderr == f"error: there is no server nope, neither in {tmp_path / 'catalog.yaml'}\n"
    assert (done.stdout, lister.starts) == ("", 0)
    assert not (tmp_path / "state").exists()


def test_warm_goes_on_without_who_fails_and_says_so(tmp_path: Path) -> None:
    never = str(tmp_path / "never")
    gone = Lister(tmp_path, "gone")
    gone.entry["runtime"] = {**gone.entry["runtime"], "command": str(tmp_path / "not-there")}
    hang = Lister(tmp_path, "hang", hang=never, entry={"start_timeout_seconds": 1})
    listers = [
        Lister(tmp_path, "good"),
        gone,
        hang,
        Lister(tmp_path, "fail", fail=never),
        Lister(tmp_path, "die", die=never),
    ]
    done = run(write(tmp_path, listers))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = {line.split()[1].rstrip(":"): line for line in done.stdout.splitlines()[:-1]}
    assert said["good"].count("5 tools") == 1
    for id, reason in {"gone": "not-there", "hang": "1", "fail": "on fire", "die": "3"}.items():
        assert f"{id}: failed: " in said[id] and reason in said[id], said[id]
    assert "1 of 5 servers listed" in done.stdout.splitlines()[-1]
    with RunningGateway(tmp_path, entries(listers[:1])) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == listers[0].names()
    assert listers[0].starts == 1


def test_warm_does_not_lose_what_was_kept_of_who_fails_now(tmp_path: Path) -> None:
    lister = Lister(tmp_path, "a", die=str(tmp_path / "works"))
    (tmp_path / "works").touch()
    argv = write(tmp_path, [lister])
    assert run(argv).returncode == 0
    (tmp_path / "works").unlink()
    assert run(argv).returncode == 1
    with RunningGateway(tmp_path, entries([lister])) as gateway:
        assert names(LegacyClient(gateway, "/mcp")) == lister.names()
    assert lister.starts == 2


def test_warm_shows_its_progress_on_a_terminal(tmp_path: Path) -> None:
    listers = [Lister(tmp_path, id) for id in ("a", "b")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(write(tmp_path, listers), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert process.wait(20) == 0
    assert re.search(rb"\[1/2\] [ab]: 5 tools \(\d\.\d s\)\r\n\[1/2\] \.\.\.\r\[2/2\] [ab]: 5 tools", shown), shown


def test_warm_does_not_say_that_it_kept_what_it_could_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(write(tmp_path, [Lister(tmp_path, "a")], state_dir=str(tmp_path / "file" / "state")))
    assert done.returncode == 1
    assert "nothing can be written there: Not a directory" in done.stderr
    assert "kept in" not in done.stdout and "Traceback" not in done.stderr


def test_warm_uses_the_folder_that_is_named(tmp_path: Path) -> None:
    done = run([*write(tmp_path, [Lister(tmp_path, "a")]), "--state-dir", str(tmp_path / "elsewhere")])
    assert done.returncode == 0
    assert len(list((tmp_path / "elsewhere" / "listings").glob("*.json"))) == 1
    assert not (tmp_path / "state").exists()


def test_warm_tells_a_bad_catalog(tmp_path: Path) -> None:
    argv = write(tmp_path, [])
    (tmp_path / "catalog.yaml").write_text("servers: [{id: 1, runtime: 2")
    done = run(argv)
    assert done.returncode == 1 and "catalog.yaml" in done.stderr and "Traceback" not in done.stderr


def test_warm_that_is_stopped_stops_its_servers(tmp_path: Path) -> None:
    hang = Lister(tmp_path, "hang", hang=str(tmp_path / "never"))
    argv = write(tmp_path, [hang])
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: hang.starts == 1)
        server = int(hang.file.read_text())
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 1, (out, err)
        assert b"Traceback" not in err
        wait_until(lambda: not Path(f"/proc/{server}/cmdline").exists() or not running_now(server))
    finally:
        process.kill()
        process.wait()


def running_now(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
