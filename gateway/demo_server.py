"""A small real MCP server over stdio, so that a first run needs no other program: ``gateway.pyz demo-server``.

It speaks the legacy revisions 2024-11-05 to 2025-11-25 and the modern one, 2026-07-28, with one JSON-RPC message a
line. Tools: echo, time, notes. Resource: demo://notes, with subscriptions. Prompt: summarize-notes.

Every request is answered at once, in order, by one thread that waits for nothing but its input: so a cancellation
always comes too late and is ignored, as the specification allows. Notes live as long as the process and are bounded.

Standard library only, nothing of the gateway, and little of that, for it must start in some 50 ms.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from gateway import __version__

__all__ = ["Server", "main"]

LEGACY = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
NOTES_URI = "demo://notes"
INFO = {"name": "open-mcp-gateway-demo", "title": "Open MCP Gateway demo", "version": __version__}
INSTRUCTIONS = "A demo: echo answers with its text, time tells the time anywhere, notes keeps short texts in memory."

MAX_NOTES = 100
MAX_NOTE_LENGTH = 2000
HOUR_MS = 3_600_000
"""How long clients of the modern revision may keep our lists, in milliseconds: they never change."""

Json = dict[str, Any]


def _schema(required: tuple[str, ...] = (), **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TOOLS: list[Json] = [
    {
        "name": "echo",
        "title": "Echo",
        "description": "Answer with the text.",
        "inputSchema": _schema(("text",), text={"type": "string", "description": "What to answer"}),
        "annotations": {"readOnlyHint": True, "idempotentHint": True, "openWorldHint": False},
    },
    {
        "name": "time",
        "title": "Time",
        "description": "Tell the current time in a time zone, UTC unless named.",
        "inputSchema": _schema(
            timezone={"type": "string", "description": "An IANA name (Europe/Berlin) or an offset (+05:30)"}
        ),
        "outputSchema": _schema(
            ("time", "timezone", "unix"),
            time={"type": "string", "description": "ISO 8601, with the offset"},
            timezone={"type": "string"},
            unix={"type": "number", "description": "Seconds since 1970"},
        ),
        "annotations": {"readOnlyHint": True, "openWorldHint": False},
    },
    {
        "name": "notes",
        "title": "Notes",
        "description": "Add a note, list all notes or clear them. They are also the resource demo://notes.",
        "inputSchema": _schema(
            ("action",),
            action={"type": "string", "enum": ["add", "list", "clear"]},
            text={"type": "string", "maxLength": MAX_NOTE_LENGTH, "description": "The note to add"},
        ),
        "outputSchema": _schema(("notes",), notes={"type": "array", "items": {"type": "string"}}),
        "annotations": {"readOnlyHint": False, "destructiveHint": True, "openWorldHint": False},
    },
]
RESOURCE = {
    "uri": NOTES_URI,
    "name": "notes",
    "title": "Notes",
    "description": "All notes, one a line.",
    "mimeType": "text/plain",
}
PROMPT = {
    "name": "summarize-notes",
    "title": "Summarize the notes",
    "description": "Ask for a summary of all notes.",
    "arguments": [{"name": "style", "description": "Such as: one line, a table, a poem", "required": False}],
}
CAPABILITIES: Json = {"tools": {}, "resources": {"subscribe": True}, "prompts": {}}


class RpcError(Exception):
    """Ends a request with a JSON-RPC error."""

    def __init__(self, code: int, message: str, data: Json | None = None) -> None:
        super().__init__(message)
        self.error: Json = {"code": code, "message": message}
        if data is not None:
            self.error["data"] = data


class BadInput(Exception):
    """A tool's arguments are wrong: an error of the protocol or of the tool, as the revision has it."""


class ToolFailed(Exception):
    """A tool can't do what it was asked: a result with isError."""


def _zone(name: str) -> Any:
    """The tzinfo of an IANA name or an offset; raises BadInput."""
    import datetime
    import re

    if name.upper() in ("UTC", "Z"):
        return datetime.UTC
    if found := re.fullmatch(r"([+-])(\d\d):?(\d\d)", name, re.ASCII):
        hours, minutes = int(found[2]), int(found[3])
        if hours < 24 and minutes < 60:
            offset = datetime.timedelta(hours=hours, minutes=minutes)
            return datetime.timezone(offset if found[1] == "+" else -offset)
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise BadInput(
            f"unknown time zone {name[:80]!r}: use a name such as Europe/Berlin, an offset such as +05:30, or UTC"
        ) from None


class Server:
    """One connection. ``send`` takes each outgoing message; ``receive`` handles one incoming line."""

    def __init__(self, send: Callable[[Json | list[Json]], None]) -> None:
        self.send = send
        self.notes: list[str] = []
        self.version = ""
        """The revision that the connection is held to: "" until initialize or the first modern request."""
        self.subscribed = False
        """Whether a legacy client has subscribed to the notes."""
        self.listening: list[str | int] = []
        """The ids of the modern subscriptions/listen requests that include the notes."""
        self.methods: dict[str, Callable[[Json], Json]] = {
            "tools/list": lambda params: {"tools": [self.fit(tool) for tool in TOOLS]},
            "tools/call": self.call_tool,
            "resources/list": lambda params: {"resources": [self.fit(RESOURCE)]},
            "resources/templates/list": lambda params: {"resourceTemplates": []},
            "resources/read": self.read_resource,
            "prompts/list": lambda params: {"prompts": [self.fit(PROMPT)]},
            "prompts/get": self.get_prompt,
        }
        self.tools: dict[str, Callable[..., tuple[str, Json | None]]] = {
            "echo": self.echo,
            "time": self.time,
            "notes": self.note,
        }

    # ------------------------------------------------------------ messages

    def receive(self, line: bytes) -> None:
        """Handle one line. Whatever it holds, the worst that comes of it is an error message."""
        try:
            message = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            self.send(_failure(None, RpcError(-32700, "Parse error: not JSON in UTF-8")))
            return
        if isinstance(message, list) and message and self.version == "2025-03-26":  # the one revision with batches
            replies = [reply for each in message if (reply := self.handle(each)) is not None]
            if replies:
                self.send(replies)
        elif (reply := self.handle(message)) is not None:
            self.send(reply)

    def handle(self, message: Any) -> Json | None:
        """Handle one message and return the reply it needs, if it needs one."""
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            return _failure(None, RpcError(-32600, 'Invalid request: not an object with "jsonrpc": "2.0"'))
        if "method" not in message and ("result" in message or "error" in message):
            return None  # we never ask, so this answers nothing of ours
        identity, method, params = message.get("id"), message.get("method"), message.get("params", {})
        if "id" in message and (not isinstance(identity, str | int) or isinstance(identity, bool)):
            return _failure(None, RpcError(-32600, "Invalid request: the id must be a string or an integer"))
        if not isinstance(method, str) or not isinstance(params, dict):
            wrong = RpcError(-32600, "Invalid request: the method must be a string and params an object")
            return _failure(identity, wrong) if "id" in message else None
        if "id" not in message:
            if method == "notifications/cancelled" and params.get("requestId") in self.listening:
                self.listening.remove(params["requestId"])
            return None
        assert isinstance(identity, str | int)
        try:
            meta = params.get("_meta")
            if isinstance(meta, dict) and META + "protocolVersion" in meta:
                result = self.modern(identity, method, params, meta)
            else:
                result = self.legacy(method, params)
        except RpcError as error:
            return _failure(identity, error)
        return None if result is None else {"jsonrpc": "2.0", "id": identity, "result": result}

    def legacy(self, method: str, params: Json) -> Json:
        if self.version == MODERN:
            if method == "initialize":
                raise RpcError(
                    -32022,
                    f"This connection speaks {MODERN}",
                    {"supported": [MODERN], "requested": params.get("protocolVersion")},
                )
            raise RpcError(-32602, f"Invalid params: _meta must hold {META}protocolVersion")
        if method == "initialize":
            if self.version:
                raise RpcError(-32600, "Invalid request: already initialized")
            wish = params.get("protocolVersion")
            self.version = wish if wish in LEGACY else LEGACY[-1]
            return {
                "protocolVersion": self.version,
                "capabilities": CAPABILITIES,
                "serverInfo": self.fit(INFO),
                "instructions": INSTRUCTIONS,
            }
        if method == "ping":
            return {}
        if method in ("resources/subscribe", "resources/unsubscribe"):
            self.known_resource(params)
            self.subscribed = method == "resources/subscribe"
            return {}
        return self.dispatch(method, params)

    def modern(self, identity: str | int, method: str, params: Json, meta: Json) -> Json | None:
        requested = meta[META + "protocolVersion"]
        if self.version in LEGACY:
            raise RpcError(-32600, f"Invalid request: this connection was initialized with {self.version}")
        if requested != MODERN:
            raise RpcError(-32022, "Unsupported protocol version", {"supported": [MODERN], "requested": requested})
        if not isinstance(meta.get(META + "clientCapabilities"), dict):
            raise RpcError(-32602, f"Invalid params: _meta must hold {META}clientCapabilities, an object")
        own = {META + "serverInfo": INFO}
        if method == "server/discover":
            # Does not hold the connection to this revision: clients of both kinds ask it first.
            return {
                "resultType": "complete",
                "supportedVersions": [MODERN],
                "capabilities": CAPABILITIES,
                "instructions": INSTRUCTIONS,
                "ttlMs": HOUR_MS,
                "cacheScope": "public",
                "_meta": own,
            }
        self.version = MODERN
        if method == "subscriptions/listen":
            self.listen(identity, params)
            return None
        result = {"resultType": "complete", **self.dispatch(method, params), "_meta": own}
        if method.endswith("/list"):
            result |= {"ttlMs": HOUR_MS, "cacheScope": "public"}
        elif method == "resources/read":
            result |= {"ttlMs": 0, "cacheScope": "private"}
        return result

    def dispatch(self, method: str, params: Json) -> Json:
        if method not in self.methods:
            raise RpcError(-32601, f"Method not found: {method[:100]}")
        if method.endswith("/list") and params.get("cursor") is not None:
            raise RpcError(-32602, "Invalid params: unknown cursor, all lists have one page")
        return self.methods[method](params)

    def fit(self, item: Json) -> Json:
        """An item without what came after the connection's revision: titles and output schemas in 2025-06-18."""
        if self.at_least("2025-06-18"):
            return item
        return {key: value for key, value in item.items() if key not in ("title", "outputSchema")}

    def at_least(self, version: str) -> bool:
        return (self.version or MODERN) >= version

    # ------------------------------------------------------------ subscriptions

    def listen(self, identity: str | int, params: Json) -> None:
        asked = params.get("notifications")
        if not isinstance(asked, dict):
            raise RpcError(-32602, "Invalid params: notifications must be an object")
        uris = asked.get("resourceSubscriptions")
        honoured: Json = {}
        if isinstance(uris, list) and NOTES_URI in uris:
            honoured["resourceSubscriptions"] = [NOTES_URI]
            if identity in self.listening or len(self.listening) >= MAX_NOTES:
                raise RpcError(-32600, "Invalid request: this id is already listening, or too many are")
            self.listening.append(identity)
        self.notify("subscriptions/acknowledged", {"notifications": honoured}, identity)

    def notify(self, name: str, params: Json, subscription: str | int | None = None) -> None:
        if subscription is not None:
            params = {**params, "_meta": {META + "subscriptionId": subscription}}
        self.send({"jsonrpc": "2.0", "method": "notifications/" + name, "params": params})

    def notes_changed(self) -> None:
        if self.subscribed:
            self.notify("resources/updated", {"uri": NOTES_URI})
        for identity in self.listening:
            self.notify("resources/updated", {"uri": NOTES_URI}, identity)

    # ------------------------------------------------------------ tools

    def call_tool(self, params: Json) -> Json:
        name, arguments = params.get("name"), params.get("arguments")
        if arguments is None:
            arguments = {}
        tool = next((each for each in TOOLS if each["name"] == name), None)
        if tool is None:
            raise RpcError(-32602, f"Unknown tool: {str(name)[:100]}")
        if not isinstance(arguments, dict):
            raise RpcError(-32602, "Invalid params: arguments must be an object")
        try:
            self.check_arguments(tool, arguments)
            text, structured = self.tools[tool["name"]](**arguments)
        except BadInput as bad:
            # A model can mend its arguments only when it sees the error, which since 2025-11-25 is a result's.
            if not self.at_least("2025-11-25"):
                raise RpcError(-32602, f"Invalid params: {bad}") from None
            return {"content": [{"type": "text", "text": str(bad)}], "isError": True}
        except ToolFailed as failed:
            return {"content": [{"type": "text", "text": str(failed)}], "isError": True}
        result: Json = {"content": [{"type": "text", "text": text}], "isError": False}
        if structured is not None and self.at_least("2025-06-18"):
            result["structuredContent"] = structured
        return result

    def check_arguments(self, tool: Json, arguments: Json) -> None:
        """Raise BadInput unless the arguments fit the tool's schema (all of ours are strings)."""
        schema = tool["inputSchema"]
        for name in schema["required"]:
            if name not in arguments:
                raise BadInput(f"{tool['name']} needs the argument {name}")
        for name, value in arguments.items():
            rules = schema["properties"].get(name)
            if rules is None:
                raise BadInput(f"{tool['name']} has no argument {name[:80]!r}")
            if not isinstance(value, str):
                raise BadInput(f"{name} must be a string")
            if "enum" in rules and value not in rules["enum"]:
                raise BadInput(f"{name} must be one of {', '.join(rules['enum'])}")
            if len(value) > rules.get("maxLength", sys.maxsize):
                raise BadInput(f"{name} is longer than {rules['maxLength']} characters")

    def echo(self, text: str) -> tuple[str, None]:
        return text, None

    def time(self, timezone: str = "UTC") -> tuple[str, Json]:
        import datetime

        now = datetime.datetime.fromtimestamp(time.time(), _zone(timezone))
        text = now.isoformat(timespec="seconds")
        return text, {"time": text, "timezone": timezone, "unix": round(now.timestamp(), 3)}

    def note(self, action: str, text: str | None = None) -> tuple[str, Json]:
        if action == "add":
            if not text:
                raise BadInput("to add a note, give its text")
            if len(self.notes) >= MAX_NOTES:
                raise ToolFailed(f"there are {MAX_NOTES} notes already; clear them first")
            self.notes.append(text)
            self.notes_changed()
        elif action == "clear" and self.notes:
            self.notes.clear()
            self.notes_changed()
        count = len(self.notes)
        told = "\n".join([f"{count} note{'' if count == 1 else 's'}", *(f"- {note}" for note in self.notes)])
        return told, {"notes": list(self.notes)}

    # ------------------------------------------------------------ resource and prompt

    def known_resource(self, params: Json) -> None:
        uri = params.get("uri")
        if not isinstance(uri, str):
            raise RpcError(-32602, "Invalid params: uri must be a string")
        if uri != NOTES_URI:
            code = -32602 if self.version == MODERN else -32002
            raise RpcError(code, f"Resource not found: {uri[:200]}", {"uri": uri})

    def read_resource(self, params: Json) -> Json:
        self.known_resource(params)
        return {"contents": [{"uri": NOTES_URI, "mimeType": "text/plain", "text": "\n".join(self.notes)}]}

    def get_prompt(self, params: Json) -> Json:
        name, arguments = params.get("name"), params.get("arguments", {})
        if name != PROMPT["name"]:
            raise RpcError(-32602, f"Unknown prompt: {str(name)[:100]}")
        if not isinstance(arguments, dict) or not all(isinstance(value, str) for value in arguments.values()):
            raise RpcError(-32602, "Invalid params: arguments must be an object of strings")
        style = arguments.get("style") or "three sentences"
        text = f"Summarize these notes as {style}:\n\n" + ("\n".join(self.notes) or "(there are none yet)")
        return {
            "description": PROMPT["description"],
            "messages": [{"role": "user", "content": {"type": "text", "text": text}}],
        }


def _failure(identity: Any, error: RpcError) -> Json:
    return {"jsonrpc": "2.0", "id": identity, "error": error.error}


def _write(message: Json | list[Json]) -> None:
    """Write one line to stdout, unbuffered, so that nothing is left to be flushed when the reader is gone."""
    rest = memoryview(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")
    while rest:
        rest = rest[os.write(1, rest) :]


def main() -> int:
    """Serve stdin and stdout until stdin ends or nobody reads any more; 0 in every case."""
    import signal

    # Both are ordinary ways to end this process, and it has nothing to tidy up.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    if sys.stdin.isatty():
        print("This MCP server reads JSON-RPC from stdin; the gateway is meant to start it.", file=sys.stderr)
    server = Server(_write)
    try:
        for line in sys.stdin.buffer:
            if line.strip():
                server.receive(line)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return 0
