"""Tools that only run as tasks (2025-11-25, tasks), for clients that know nothing of tasks.

The gateway advertises no tasks, so nobody asks for one. A server may have tools all the same that refuse to run
otherwise (``execution.taskSupport: required``). It says so by -32601, upon which nothing has run: then the call is
repeated as a task and its result waited for, here, while the client waits for a plain reply (protocol.md section 4.5).

Sans-IO: a link feeds replies to ``TaskRun.take`` and sends what that gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.protocol.message import ERROR, METHOD_NOT_FOUND, RESULT, Message, dumps

__all__ = ["TaskRun", "needs_task"]

TTL: Final = 24 * 3600 * 1000
"""Milliseconds for which a server may have to keep a result; it is fetched as soon as it is there."""


def needs_task(capabilities: Mapping[str, Any], method: str, reply: Message) -> bool:
    """Whether a reply says that this request is only served as a task, by a server that has tasks for it."""
    if reply.kind is not ERROR or method != "tools/call" or reply.result.get("code") != METHOD_NOT_FOUND:
        return False
    found: Any = capabilities
    for name in ("tasks", "requests", "tools", "call"):
        found = found.get(name) if type(found) is dict else None
    return found is not None


class TaskRun:
    """One call on its way as a task. ``id`` is the task's, "" before the server has named it."""

    __slots__ = ("id", "token")

    def __init__(self, token: int) -> None:
        self.id = ""
        self.token = token

    changes: Final = {"task": dumps({"ttl": TTL})}
    """What the repeated call has in its params."""

    def take(self, message: Message) -> tuple[str, str] | None:
        """The next request (method, params) after this reply; None when the reply is the client's."""
        if self.id or message.kind is not RESULT:
            return None
        task = message.result.get("task") if type(message.result) is dict else None
        id = task.get("taskId") if type(task) is dict else None
        if type(id) is not str:
            return None
        self.id = id
        # It waits for the end of the task, and what the task asks meanwhile comes as part of it ("Result Retrieval").
        return "tasks/result", dumps({"taskId": id})
