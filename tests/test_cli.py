"""The command line: rows C1 to C17, in process where only words are turned into options, else as the user runs it."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, RunningGateway, command

import gateway
from gateway import app, cli

Main = Callable[..., int]
PROCESS: dict[str, Any] = {
    "type": "local-process",
    "command": "${MCP_GATEWAY_PYTHON}",
    "args": ["${MCP_GATEWAY_MAIN}", "demo-server"],
}
DEMO = {"id": "demo", "runtime": PROCESS}
CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "echo", "arguments": {"text": "hi"}}}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """``main(words, prog)`` in this process, which it leaves as it was."""
    for name in ("MCP_GATEWAY_PYTHON", "MCP_GATEWAY_MAIN", "MCP_GATEWAY_TRACEBACK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def run(*words: str, prog: str = "gateway.pyz") -> int:
        return cli.main(list(words), prog)

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What was asked of the composition root, which does nothing and returns 42."""
    seen: list[tuple[str, Any]] = []
    for name in ("run_http", "run_stdio", "check"):

        def stand_in(options: Any, name: str = name) -> int:
            seen.append((name, options))
            return 42

        monkeypatch.setattr(app, name, stand_in)
    return seen


class Desk:
    """A folder to run the program in, with an empty home and none of our variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "desk"
        self.home = folder / "home"
        self.folder.mkdir()
        self.home.mkdir()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MCP_GATEWAY", "RUST_LOG"))
        }
        self.environment["HOME"] = str(self.home)

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def run(
        self, *words: str, given: str = "", environment: dict[str, str] | None = None, shell: str = ""
    ) -> subprocess.CompletedProcess[str]:
        argv: Sequence[str] = [*command(), *words]
        if shell:
            argv = ["sh", "-c", f'exec "$@" {shell}', "sh", *argv]
        return subprocess.run(
            argv,
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done
    return [json.loads(line) for line in done.stdout.splitlines()]


def line(message: dict[str, Any]) -> str:
    return json.dumps(message) + "\n"


# ------------------------------------------------------------------------------------------------ words to options
@pytest.mark.parametrize(
    ("prog", "called"),
    [
        ("/usr/local/bin/gateway-http", "run_http"),
        ("gateway-http.pyz", "run_http"),
        ("gateway-http.exe", "run_http"),
        ("./gateway-http-linux-amd64", "run_http"),
        ("gateway-stdio", "run_stdio"),
        ("gateway-stdio-darwin-arm64", "run_stdio"),
    ],
)
def test_C1_the_name_it_is_called_by_decides(main: Main, asked: list[Any], prog: str, called: str) -> None:
    assert main(prog=prog) == 42
    assert [name for name, _ in asked] == [called]


@pytest.mark.parametrize("prog", ["gateway.pyz", "gateway", "__main__.py", "open-mcp-gateway", "gateway-httpd"])
def test_C1_under_any_other_name_the_first_word_does(main: Main, asked: list[Any], prog: str) -> None:
    assert main("http", prog=prog) == 42
    assert main("stdio", prog=prog) == 42
    assert main("check", prog=prog) == 42
    assert [name for name, _ in asked] == ["run_http", "run_stdio", "check"]


def test_C2_C3_C4_C5_options_of_http(main: Main, asked: list[Any]) -> None:
    words = ["--config", "c.yaml", "--listen-addr", "[::1]:80", "--log-level", "TRACE", "--catalog", "k.yaml"]
    assert main(*words, prog="gateway-http") == main("http", *words) == main("http") == 42
    whole = app.HttpOptions(Path("c.yaml"), "[::1]:80", "trace", Path("k.yaml"))
    assert asked == [("run_http", whole), ("run_http", whole), ("run_http", app.HttpOptions())]


def test_C6_validate_and_check_ask_for_the_same(main: Main, asked: list[Any]) -> None:
    assert main("--validate", "--config", "c", "--catalog", "k", "--listen-addr", "x:1", prog="gateway-http") == 42
    assert main("check", "--config", "c", "--catalog", "k") == 42
    first, second = asked
    assert first == ("check", app.HttpOptions(Path("c"), "x:1", None, Path("k")))
    assert second == ("check", app.HttpOptions(Path("c"), None, None, Path("k")))


def test_C8_C9_C10_C11_options_of_stdio_in_both_forms(main: Main, asked: list[Any]) -> None:
    assert main("-s", "a b", "-c", "k.yaml", "--log-level", "debug", prog="gateway-stdio") == 42
    assert main("stdio", "--server", "a b", "--catalog", "k.yaml", "--log-level", "Debug") == 42
    assert main("stdio", "-g", "http://h:1", "--config", "c.yaml") == main("stdio", "--gateway", "http://h:1") == 42
    direct = app.StdioOptions("a b", Path("k.yaml"), None, "debug", None)
    assert [options for _, options in asked] == [
        direct,
        direct,
        app.StdioOptions(None, None, "http://h:1", None, Path("c.yaml")),
        app.StdioOptions(None, None, "http://h:1", None, None),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["-V"],
        ["http", "--version"],
        ["http", "-V"],
        ["stdio", "--version"],
        ["stdio", "-V"],
        ["check", "-V"],
    ],
)
def test_C7_version_is_name_and_semver(main: Main, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(*words) == 0
    assert capsys.readouterr() == (f"open-mcp-gateway {gateway.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", gateway.__version__)
    if len(words) == 2:
        for prog in ("gateway-http", "gateway-stdio"):
            assert main(words[1], prog=prog) == 0
            assert capsys.readouterr().out == f"{prog} {gateway.__version__}\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_C7_help_names_every_option(main: Main, capsys: pytest.CaptureFixture[str], word: str) -> None:
    http = ("--config", "--listen-addr", "--log-level", "--catalog", "--validate", "--version", "-V", "--help", "-h")
    stdio = ("-s", "--server", "-c", "--catalog", "-g", "--gateway", "--log-level", "-V", "--version", "-h", "--help")
    for prog, words, options in (
        ("gateway.pyz", [word], ("http", "stdio", "check", "version", "demo-server")),
        ("gateway.pyz", ["http", word], http),
        ("gateway-http", [word], http),
        ("gateway.pyz", ["stdio", word], stdio),
        ("gateway-stdio", [word], stdio),
    ):
        assert main(*words, prog=prog) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        for option in options:
            assert re.search(rf"(^|[\s\[,]){option}\b", printed.out), (words, option)


# --------------------------------------------------------------------------------------------------------- exit codes
def test_C16_a_bare_call_prints_usage_and_is_2(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: gateway.pyz")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve"], "'serve'"),
        (["http", "--prot", "1"], "--prot"),
        (["http", "--conf", "c.yaml"], "--conf"),  # no guessing: a new option must not change what old words mean
        (["http", "--log-level", "loud"], "'loud'"),
        (["http", "extra"], "extra"),
        (["stdio", "--server"], "--server"),
        (["stdio", "-c", "k", "-g", "http://h"], "--gateway"),
        (["check", "--listen-addr", "x"], "--listen-addr"),
    ],
)
def test_C16_wrong_usage_is_2(
    main: Main, asked: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(*words) == 2
    printed = capsys.readouterr()
    assert (printed.out, asked) == ("", [])
    assert says in printed.err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 0, ""),
        (BaseExceptionGroup("nursery", [BaseExceptionGroup("inner", [KeyboardInterrupt()])]), 0, ""),
        (BrokenPipeError(), 1, ""),
        (ExceptionGroup("nursery", [ExceptionGroup("inner", [RuntimeError("a defect")])]), 1, "RuntimeError: a defect"),
        (ValueError("another"), 1, "gateway.pyz: internal error: ValueError: another"),
    ],
)
def test_C16_no_traceback_reaches_a_user(
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    says: str,
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr(app, "run_http", fail)
    assert main("http") == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (says in printed.err) if says else printed.err == ""
    assert "Traceback" not in printed.err
    assert "sub-exception" not in printed.err
    if status and says:
        monkeypatch.setenv("MCP_GATEWAY_TRACEBACK", "1")
        with pytest.raises(type(error)):
            main("http")


def test_C16_bad_files_are_1(desk: Desk) -> None:
    desk.write("catalog.yaml", "servers:\n  - {display_name: nameless}\n")
    for words in (["http"], ["stdio", "-c", "catalog.yaml"], ["check"]):
        done = desk.run(*words)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert "Server at index 0 missing required field: id" in done.stderr
        assert "catalog.yaml:2" in done.stderr
        assert "Traceback" not in done.stderr
    for words in (["http", "--config", "no.yaml"], ["stdio", "--config", "no.yaml"], ["check", "--config", "no.yaml"]):
        done = desk.run(*words)
        assert done.returncode == 1, done
        assert "no.yaml" in done.stderr
    done = desk.run("stdio", "-c", "no.yaml")
    assert done.returncode == 1, done
    assert "no.yaml" in done.stderr


# -------------------------------------------------------------------------------------------------------------- check
def test_C6_check_tells_everything_and_starts_nothing(desk: Desk) -> None:
    touched = desk.folder / "started"
    server = {"id": "a", "runtime": {"type": "local-process", "command": "touch", "args": [str(touched)]}}
    good = desk.write("catalog.yaml", {"servers": [server, {**server, "id": "B", "colour": "red"}]})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        for words in (["http", "--validate", "--listen-addr", listen], ["check"], ["check", "--catalog", str(good)]):
            done = desk.run(*words)
            assert done.returncode == 0, done
            assert done.stdout.startswith("OK: 2 servers")
            assert "warning:" in done.stderr
            assert "colour" in done.stderr
    bad = [{**server, "runtime": {"type": "carrier-pigeon"}}, server, {"runtime": {}}]
    desk.write("catalog.yaml", {"servers": bad})
    desk.write("config.yaml", "idle_timeout_seconds: soon\nlog_level: loud\n")
    for words in (["http", "--validate"], ["check"]):
        done = desk.run(*words)
        assert (done.returncode, done.stdout) == (1, ""), done
        for text in ("idle_timeout_seconds", "log_level"):
            assert text in done.stderr, done.stderr
    (desk.folder / "config.yaml").unlink()
    for words in (["http", "--validate"], ["check"]):
        done = desk.run(*words)
        assert (done.returncode, done.stdout) == (1, ""), done
        for text in (
            "Server 'a' has unknown runtime type: carrier-pigeon",
            "Duplicate server ID: a",
            "Server at index 2 missing required field: id",
        ):
            assert text in done.stderr, done.stderr
    assert not touched.exists()


# -------------------------------------------------------------------------------------------- which catalog stdio uses
def test_C12_without_c_and_g_the_catalog_of_the_config(desk: Desk) -> None:
    done = desk.run("stdio", "--server", "demo", given=line(CALL))
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "--catalog" in done.stderr
    assert "--gateway" in done.stderr

    desk.write("catalog.yaml", {"servers": [DEMO]})
    (reply,) = answers(desk.run("stdio", "--server", "demo", given=line(CALL)))
    assert reply["result"]["content"] == [{"type": "text", "text": "hi"}]

    # The merged view without --server, and the catalog that a config names before ./catalog.yaml.
    elsewhere = desk.write("elsewhere/other.yaml", {"servers": [{**DEMO, "id": "other"}]})
    desk.write("config.yaml", {"catalog_path": str(elsewhere)})
    (reply,) = answers(desk.run("stdio", given=line({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})))
    assert "other__echo" in [tool["name"] for tool in reply["result"]["tools"]]
    named = desk.write("named.yaml", {"catalog_path": "catalog.yaml"})
    (reply,) = answers(desk.run("stdio", "--config", str(named), "-s", "demo", given=line(CALL)))
    assert "result" in reply


# -------------------------------------------------------------------------------------------------------- environment
def test_C11_C13_S2_levels_of_stdio(desk: Desk) -> None:
    desk.write("catalog.yaml", {"servers": [DEMO]})

    def logged(*words: str, **environment: str) -> str:
        done = desk.run("stdio", "-s", "demo", *words, given=line(CALL), environment=environment)
        assert len(answers(done)) == 1
        return done.stderr

    assert "gateway-stdio" not in logged()
    assert "Received" not in logged("--log-level", "info")
    text = logged(RUST_LOG="gateway_http=debug")
    begun, *_, received = [one for one in text.splitlines() if "gateway_http" in one]
    assert re.fullmatch(r"\[\S+Z\] INFO gateway_http: Starting gateway-stdio for server: demo", begun)
    assert re.fullmatch(r"\[\S+Z\] DEBUG gateway_http: Received request: tools/call", received)
    assert "gateway-stdio" not in logged("--log-level", "warn", RUST_LOG="debug")


def test_C14_the_variable_is_the_key(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, env={"MCP_GATEWAY_API_KEY": "sesame"}) as running:
        assert running.http("GET", "/stats")[0] == 401
        assert running.http("GET", "/stats", headers={"Authorization": "Bearer sesame"})[0] == 200
        assert not any("sesame" in logged for logged in running.lines)


def test_C17_the_lines_of_the_start(tmp_path: Path) -> None:
    with RunningGateway(tmp_path, [DEMO, {**DEMO, "id": "two"}]) as running:
        catalog, port = running.catalog, running.port
        running.wait_for_line("Hot reload")
        logged = [re.sub(r"^\[\S+Z\] ", "", each) for each in running.lines[:4]]
    assert logged == [
        "INFO gateway_http: Starting Open MCP Gateway",
        "INFO gateway_http: Loaded 2 servers from catalog",
        f"INFO gateway_http: Listening on 127.0.0.1:{port}",
        f"INFO gateway_http: Hot reload enabled for {catalog}",
    ]


def test_where_the_program_is_told_to_catalogs(main: Main, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", os.path.relpath(sys.executable))
    assert main("http") == 42
    assert Path(os.environ["MCP_GATEWAY_PYTHON"]).is_absolute()
    assert os.environ["MCP_GATEWAY_MAIN"] == str(ROOT / "gateway")
    argv = [os.environ["MCP_GATEWAY_PYTHON"], os.environ["MCP_GATEWAY_MAIN"], "demo-server"]
    asks = line({"jsonrpc": "2.0", "id": 1, "method": "ping"})
    done = subprocess.run(argv, cwd="/", input=asks, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, json.loads(done.stdout)["result"]) == (0, {})


# ------------------------------------------------------------------------------------------------------ being cheap
@pytest.mark.parametrize("words", [["version"], ["--help"], ["http", "--help"], ["stdio", "-V"], [], ["demo-server"]])
def test_A14_what_serves_nothing_imports_nothing(desk: Desk, words: list[str]) -> None:
    script = (
        "import sys; sys.argv[:] = sys.argv[1:]; from gateway.__main__ import run; run()\n"
        "heavy = {'trio', 'attr', 'httpx', 'ruamel', 'cattrs', 'quart', 'hypercorn', 'ssl', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "gateway.pyz", *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "[]", done


def test_A14_stdio_loads_no_http(desk: Desk) -> None:
    desk.write("catalog.yaml", {"servers": [DEMO]})
    script = (
        "import sys; sys.argv[:] = sys.argv[1:]; from gateway.__main__ import run; status = run()\n"
        "heavy = {'httpx', 'quart', 'hypercorn', 'h11', 'asyncio', 'http.client', 'email'} & set(sys.modules)\n"
        "sys.stderr.write(f'{status} {sorted(heavy)}')"
    )
    argv = [sys.executable, "-c", script, "gateway.pyz", "stdio", "-s", "demo", "-c", str(desk.folder / "catalog.yaml")]
    done = subprocess.run(argv, cwd=ROOT, input=line(CALL), capture_output=True, text=True, timeout=60, check=False)
    assert len(answers(done)) == 1
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr


# -------------------------------------------------------------------------------------------------- standard files
def test_S1_only_protocol_on_stdout_whatever_a_plugin_prints(desk: Desk) -> None:
    chatty = (
        "import os, sys\n"
        "print('hello from a plugin')\n"
        "from gateway.runtimes.local_process import RUNTIME as LOCAL\n"
        "from gateway.runtimes.base import Runtime\n"
        "CHATTY = Runtime('chatty', LOCAL.spec, LOCAL.open)\n"
    )
    desk.write("plugins/chatty.py", chatty)
    catalog = desk.write("catalog.yaml", {"servers": [{"id": "demo", "runtime": {**PROCESS, "type": "chatty"}}]})
    desk.write("config.yaml", {"runtimes": ["chatty:CHATTY"], "catalog_path": str(catalog)})
    given = {"PYTHONPATH": str(desk.folder / "plugins")}
    done = desk.run("stdio", "-s", "demo", given=line(CALL), environment=given)
    (reply,) = answers(done)
    assert reply["id"] == 7
    assert "hello from a plugin" in done.stderr


@pytest.mark.parametrize(
    ("closed", "numbers"), [("<&-", {0}), (">&-", {1}), ("2>&-", {2}), ("<&- >&- 2>&-", {0, 1, 2})]
)
def test_S1_closed_standard_files_are_nobody_elses(desk: Desk, closed: str, numbers: set[int]) -> None:
    """A program that is started with a standard file closed would open its own files under that number."""
    desk.write("catalog.yaml", {"servers": [DEMO]})
    given = "" if 0 in numbers else line(CALL)
    done = desk.run("stdio", "-s", "demo", given=given, shell=closed)
    assert len(answers(done)) == (1 if numbers == {2} else 0), done
    assert "Traceback" not in done.stderr
    desk.write("catalog.yaml", "servers: [")
    done = desk.run("stdio", "-s", "demo", given=given, shell=closed)
    assert (done.returncode, done.stdout) == (1, ""), done

    told = desk.folder / "told"
    script = (
        "import os, sys; from gateway.cli import main; main(['--no-such-option'], 'gateway.pyz')\n"
        f"open({str(told)!r}, 'w').write(str([os.path.sameopenfile(n, os.open(os.devnull, 2)) for n in (0, 1, 2)]))"
    )
    argv = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script]
    subprocess.run(argv, cwd=ROOT, stdin=subprocess.PIPE, capture_output=True, timeout=30, check=True)
    assert told.read_text() == str([number in numbers for number in (0, 1, 2)])


def test_C1_console_scripts_are_the_whole_program(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert set(scripts) == {"open-mcp-gateway", "gateway-http", "gateway-stdio"}
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        run = getattr(importlib.import_module(module), function)
        for words, called in ((["--version"], "cli"), (["demo-server"], "demo_server")):
            monkeypatch.setattr(sys, "argv", [f"/venv/bin/{name}", *words])
            monkeypatch.setattr(f"gateway.{called}.main", lambda: 42)
            assert run() == 42, (name, words)
            monkeypatch.undo()
