"""The command line: ``http``, ``stdio``, ``check``, ``version``, and the two names of the original's programs.

Nothing heavy is imported before the arguments are understood. Every way out has one of the codes of compat C16: 0 a
clean end, 1 bad files or a taken port, 2 wrong usage; and no traceback ever reaches a user.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import gateway

__all__ = ["main"]

LEVELS = ("trace", "debug", "info", "warn", "error")
PROGRAMS = {"gateway-http": "http", "gateway-stdio": "stdio"}
OPENSSL = ("ssl", "hmac")
"""What trio imports of the modules that load OpenSSL: 4 MB that a desktop client's gateway seldom needs."""


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the program and return its exit status. ``prog`` is the name it was called by (argv[0])."""
    words = sys.argv[1:] if argv is None else argv
    name = Path(prog or sys.argv[0]).name
    _open_standard_files()
    status = _contained(name, words)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Whoever read our words has gone, or the disk is full. Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return status or 1
    return status


def _contained(name: str, words: list[str]) -> int:
    """Do what the words say; every failure becomes an exit status and a sentence on stderr."""
    command = _program(name)
    _tell_children()
    try:
        if command is None:
            options = _everything().parse_args(words)
            command = options.command
        else:
            options = _only(name, command).parse_args(words)
        return _run(command, options)
    except SystemExit as leaving:  # argparse: 0 after --help and --version, 2 after a mistake
        return leaving.code if isinstance(leaving.code, int) else 2
    except BaseException as error:
        # The last resort. What is expected has been said better by now; this is a defect, and a user can do nothing
        # with its traceback.
        causes = _leaves(error)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return 0  # Ctrl-C before the signal handlers stand; nothing runs yet
        if os.environ.get("MCP_GATEWAY_TRACEBACK"):
            raise
        if not all(isinstance(cause, BrokenPipeError) for cause in causes):
            for cause in causes:
                print(f"{name}: internal error: {type(cause).__name__}: {cause}", file=sys.stderr)
            print("Set MCP_GATEWAY_TRACEBACK=1 to see where, and please report it.", file=sys.stderr)
        return 1


def _program(name: str) -> str | None:
    """The command that a program's name stands for: gateway-http, gateway-http.pyz, gateway-http-linux-amd64."""
    for program, command in PROGRAMS.items():
        if name == program or name.startswith((program + "-", program + ".")):
            return command
    return None


def _leaves(error: BaseException) -> list[BaseException]:
    """What was raised, without the groups that nurseries put around it."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _open_standard_files() -> None:
    """See that 0, 1 and 2 are open: else one of our own files would get the number, and be read or written as them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


class _Later(ModuleType):
    """Stands for a module until somebody wants something of it (importlib's LazyLoader: until it is imported again)."""

    def __getattr__(self, name: str) -> Any:
        """Become the module: whoever holds this finds everything here, and the next import gets the real one."""
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


def _postpone(names: tuple[str, ...]) -> None:
    """Have these modules imported by the first use of what is in them."""
    for name in names:
        sys.modules.setdefault(name, _Later(name))


def _tell_children() -> None:
    """Where this program is, for ``${MCP_GATEWAY_PYTHON}`` and ``${MCP_GATEWAY_MAIN}`` in a catalog."""
    package = Path(gateway.__file__).parent
    archive = package.parent
    os.environ["MCP_GATEWAY_PYTHON"] = os.path.abspath(sys.executable)
    os.environ["MCP_GATEWAY_MAIN"] = os.path.abspath(archive if archive.is_file() else package)


def _run(command: str | None, options: argparse.Namespace) -> int:
    if command == "version":
        return _version()
    if command == "check" or getattr(options, "validate", False):
        from gateway import app

        listen_addr = getattr(options, "listen_addr", None)
        return app.check(app.HttpOptions(options.config, listen_addr, None, options.catalog, options.state_dir))
    if command == "warm":
        from gateway import app
        from gateway.warm import warm

        files = app.HttpOptions(options.config, None, options.log_level, options.catalog, options.state_dir)
        return warm(files, options.servers)
    if command == "emit":
        from gateway.emit import EmitOptions, emit

        return emit(EmitOptions.of(vars(options)))
    if command == "http":
        from gateway import app

        return app.run_http(
            app.HttpOptions(options.config, options.listen_addr, options.log_level, options.catalog, options.state_dir)
        )
    if command == "stdio":
        if options.catalog is not None and options.gateway is not None:
            _fail("--catalog and --gateway exclude each other: run the servers here, or go through a running gateway")
        if options.server == "":
            _fail("--server is empty; leave it out to serve all servers")
        if options.view == "":
            _fail("--view is empty; leave it out to serve all servers")
        if options.server is not None and (options.view is not None or options.mode):
            _fail("--server excludes --view and --mode: one server has its own tools, under their own names")
        _postpone(OPENSSL)
        from gateway import app

        sys.stdout = sys.stderr  # standard output is for the protocol only (compat S1), whatever a plugin prints
        return app.run_stdio(
            app.StdioOptions(
                options.server,
                options.catalog,
                options.gateway,
                options.log_level,
                options.config,
                options.state_dir,
                options.view,
                options.mode or "",
            )
        )
    _everything().print_usage(sys.stderr)
    print("gateway: name a command, such as: gateway.pyz http --catalog catalog.yaml", file=sys.stderr)
    return 2


def _version() -> int:
    info = gateway.build_info()
    print(f"open-mcp-gateway {info.version}\ncommit {info.commit}\nlock {info.lock_digest}")
    return 0


def _fail(text: str) -> NoReturn:
    print(f"gateway: {text}", file=sys.stderr)
    raise SystemExit(2)


def _everything() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway.pyz", description="One gateway between MCP clients and MCP servers.", allow_abbrev=False
    )
    _version_option(parser, "open-mcp-gateway")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (
        ("http", "serve HTTP: the daemon"),
        ("stdio", "serve one desktop client on stdin and stdout"),
        ("check", "read config and catalog, name every mistake, start nothing"),
        ("warm", "start servers once and keep what they list, so that listing starts nothing"),
        ("emit", "print what a cluster needs to run this gateway"),
        ("version", "print version, commit and dependency lock"),
        ("demo-server", "a small MCP server on stdin and stdout"),
    ):
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        _options(sub, name, "open-mcp-gateway")
    return parser


def _only(name: str, command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    _options(parser, command, name)
    return parser


def _version_option(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-V", "--version", action="version", version=f"{name} {gateway.__version__}")


def _options(parser: argparse.ArgumentParser, command: str, name: str) -> None:
    _version_option(parser, name)
    if command in ("http", "check", "warm", "emit"):
        parser.add_argument("--config", type=Path, metavar="FILE", help="config file; default: the usual places")
        parser.add_argument("--catalog", type=Path, metavar="FILE", help="catalog file; overrides catalog_path")
    if command == "http":
        parser.add_argument("--listen-addr", metavar="HOST:PORT", help="overrides listen_addr")
        parser.add_argument("--log-level", metavar="LEVEL", type=str.lower, choices=LEVELS, help="|".join(LEVELS))
        parser.add_argument("--validate", action="store_true", help="check both files without starting; exit 0 or 1")
    if command == "warm":
        parser.add_argument("servers", nargs="*", metavar="ID", help="servers of the catalog; default: all")
        parser.add_argument("--log-level", metavar="LEVEL", type=str.lower, choices=LEVELS, help="default: error")
    if command in ("http", "check", "warm", "stdio"):
        text = "where lists are kept; default: the user's state folder"
        parser.add_argument("--state-dir", type=Path, metavar="DIR", help=text)
    if command == "emit":
        _emit_options(parser)
    if command == "stdio":
        parser.add_argument("-s", "--server", metavar="ID", help="one server of the catalog; default: all, merged")
        parser.add_argument("--view", metavar="NAME", help="one view of the catalog")
        parser.add_argument("--mode", choices=("list", "search"), help="list all tools, or three that find them")
        parser.add_argument("-c", "--catalog", type=Path, metavar="FILE", help="run the servers here")
        parser.add_argument("-g", "--gateway", metavar="URL", help="go through a running gateway")
        parser.add_argument("--config", type=Path, metavar="FILE", help="config file; default: the usual places")
        parser.add_argument("--log-level", metavar="LEVEL", type=str.lower, choices=LEVELS, help="default: warn")


def _emit_options(parser: argparse.ArgumentParser) -> None:
    """Their names are those of ``gateway.emit.EmitOptions``, where the defaults are explained."""
    add = parser.add_argument
    add("platform", choices=("kubernetes",), help="kubernetes: YAML for kubectl apply")
    add("--name", metavar="NAME", default="mcp-gateway", help="of the objects; default: mcp-gateway")
    add("-n", "--namespace", metavar="NAME", default="mcp-gateway", help="to run in; default: mcp-gateway")
    text = "Namespaces to create: the gateway's own, those of its servers as well, or none; default: own"
    add("--namespaces", choices=("own", "all", "none"), default="own", help=text)
    add("--replicas", metavar="N", type=int, default=2, help="gateway pods; default: 2")
    add("--image", metavar="IMAGE", help="of the gateway; default: agentic/mcp-gateway of this version")
    add("--image-pull-policy", choices=("Always", "IfNotPresent", "Never"), help="default: Kubernetes' own")
    text = "Secret with a registry's credentials; may be repeated"
    add("--image-pull-secret", metavar="NAME", action="append", default=[], help=text)
    text = "Secret that holds the key (as api-key) and what the files name in ${}; default: as --name"
    add("--secret", metavar="NAME", help=text)
    add("--requests", metavar="AMOUNTS", default="cpu=100m,memory=128Mi", help="default: cpu=100m,memory=128Mi")
    add("--limits", metavar="AMOUNTS", default="cpu=1,memory=512Mi", help="default: cpu=1,memory=512Mi")
    text = "an autoscaler at 70 %% of the requested CPU, instead of --replicas; without a value 2:10"
    add("--hpa", metavar="LEAST:MOST", nargs="?", const="2:10", help=text)
    add("--ingress", metavar="HOST", help="an Ingress for this host name")
    add("--ingress-class", metavar="CLASS", help="of the Ingress, such as nginx")
    add("--tls-secret", metavar="NAME", help="Secret with the certificate for the Ingress")
    add("--service-monitor", action="store_true", help="a ServiceMonitor for the Prometheus operator")
    text = "leave the NetworkPolicy out, which lets the gateway reach DNS and its servers only"
    add("--no-network-policy", dest="network_policy", action="store_false", help=text)
