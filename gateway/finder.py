"""Search mode: three tools instead of hundreds.

A model that is told of every tool of twenty servers pays for all of them before the first question. Here it is told of
three: ``search_tools`` finds tools by what they do, ``describe_tool`` gives one in full, ``call_tool`` calls it. What
they may find and call is what the caller's face lists in the usual mode, under the same names and by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.directory import Merged, Route
from gateway.exchange import Exchange, Reply
from gateway.protocol.message import INVALID_PARAMS, dumps
from gateway.views import Face, Views

if TYPE_CHECKING:
    from gateway.directory.search import Index

__all__ = ["Finder"]

DEFAULT_LIMIT: Final = 10
MAX_LIMIT: Final = 50
BRIEF: Final = 200
"""Characters of a tool's description in a search result."""

_TEXT: Final = {"type": "string"}
TOOLS: Final[tuple[Mapping[str, Any], ...]] = (
    {
        "name": "search_tools",
        "description": "Find tools by what they do, in plain words. Returns names, short descriptions and arguments.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "query": {**_TEXT, "description": "what you want to do"},
                "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
                "server": {**_TEXT, "description": "only this server's tools"},
            },
            "required": ["query"],
        },
        "annotations": {"readOnlyHint": True},
    },
    {
        "name": "describe_tool",
        "description": "Full description and input schema of one tool found by search_tools.",
        "inputSchema": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
        "annotations": {"readOnlyHint": True},
    },
    {
        "name": "call_tool",
        "description": "Call a tool found by search_tools with arguments that fit its input schema.",
        "inputSchema": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": {"type": "object"}},
            "required": ["name"],
        },
    },
)
NAMES: Final = frozenset(tool["name"] for tool in TOOLS)


class Finder:
    """Answers for the three tools. ``table`` is the list that has them."""

    instructions: Final = (
        "The tools of this endpoint are found by search_tools, explained by describe_tool and called by call_tool."
    )

    def __init__(self, views: Views) -> None:
        self._views = views
        texts = [dumps(tool) for tool in TOOLS]
        self.table = Merged("tools/list", TOOLS, texts, [""] * len(TOOLS), {})

    async def call(self, face: Face, name: str, exchange: Exchange) -> Reply | str:
        """The answer to a call of one of the three; for ``call_tool`` the name of the tool that is to be called, and
        the exchange is changed so that the server gets its arguments.
        """
        if name not in NAMES:
            return Reply.error(INVALID_PARAMS, f"Tool '{name[:200]}' not found")
        arguments = exchange.message.param("arguments")
        arguments = arguments if type(arguments) is dict else {}
        if name == "search_tools":
            return await self._search(face, arguments, exchange)
        wanted = arguments.get("name")
        if type(wanted) is not str or not wanted:
            return _failure(f"{name} needs the argument name: the name of a tool, as search_tools gives it")
        if name == "describe_tool":
            return await self._describe(face, wanted, exchange)
        inner = arguments.get("arguments", {})
        if type(inner) is not dict:
            return _failure("arguments must be an object that fits the tool's input schema; describe_tool shows it")
        exchange.changes = {**(exchange.changes or {}), "arguments": dumps(inner)}
        return wanted

    def unknown(self, name: str) -> Reply:
        """For a tool that the face does not have: the model can help itself."""
        return _failure(f"Tool '{name[:200]}' not found; search_tools finds the names of tools")

    async def _search(self, face: Face, arguments: Mapping[str, Any], exchange: Exchange) -> Reply:
        query, limit, server = arguments.get("query"), arguments.get("limit", DEFAULT_LIMIT), arguments.get("server")
        if type(query) is not str:
            return _failure("search_tools needs the argument query: what you want to do, in plain words")
        if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
            return _failure(f"limit must be a whole number from 1 to {MAX_LIMIT}")
        if server is not None and type(server) is not str:
            return _failure("server must be the id of a server")
        if server is not None and server not in face.ids:
            return _failure(f"Server '{server[:200]}' not found; there are: {', '.join(sorted(face.ids))}")
        missing = await self._views.listed(face, "tools/list", exchange.client, exchange.principal, exchange.deadline)
        table = self._views.table(face, "tools/list", exchange.client, exchange.principal)
        hits = self._index(face, table).search(query, limit, server)
        found: dict[str, Any] = {"tools": [_brief(hit.name, hit.server_id, hit.item) for hit in hits]}
        if missing:
            found["unavailable"] = {id: fault.message for id, fault in missing.items()}
        return _success(dumps(found))

    def _index(self, face: Face, table: Merged) -> Index:
        """The index of a table, made once while the table stays the same."""
        from gateway.directory.search import Index  # late: few gateways are searched

        kept = face.kept.get("index")
        if kept is None or kept[0] is not table:
            tools = [(str(item["name"]), id, item) for item, id in zip(table.items, table.origins, strict=True)]
            kept = face.kept["index"] = (table, Index(tools))
        index: Index = kept[1]
        return index

    async def _describe(self, face: Face, name: str, exchange: Exchange) -> Reply:
        client, principal = exchange.client, exchange.principal
        table = self._views.table(face, "tools/list", client, principal)
        if name not in table.routes:
            suspects = self._views.suspects(face, "tools/list", name)
            only = suspects if suspects else None
            await self._views.listed(face, "tools/list", client, principal, exchange.deadline, only=only)
            table = self._views.table(face, "tools/list", client, principal)
        route: Route | None = table.routes.get(name)
        if route is None:
            return self.unknown(name)
        return _success(next(t for item, t in zip(table.items, table.texts, strict=True) if item["name"] == name))


def _brief(name: str, server_id: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """What a model needs to choose a tool, and no more."""
    found: dict[str, Any] = {"name": name, "server": server_id}
    description = item.get("description")
    if type(description) is str and description:
        line = " ".join(description.split())
        found["description"] = line if len(line) <= BRIEF else f"{line[: BRIEF - 3]}..."
    schema = item.get("inputSchema")
    properties = schema.get("properties") if type(schema) is dict else None
    if type(properties) is dict and properties:
        required = schema.get("required") if type(schema) is dict else None
        needed = required if type(required) is list else []
        found["arguments"] = [key if key in needed else f"{key}?" for key in properties]
    return found


def _success(text: str) -> Reply:
    return Reply.result(f'{{"content":[{{"type":"text","text":{dumps(text)}}}]}}')


def _failure(text: str) -> Reply:
    return Reply.result(f'{{"content":[{{"type":"text","text":{dumps(text)}}}],"isError":true}}')
