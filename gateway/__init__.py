"""Open MCP Gateway: one gateway between MCP clients and MCP servers.

Nothing heavy is imported here: the demo server starts through this package too, and must be up in some 50 ms.
"""

from __future__ import annotations

__all__ = ["BuildInfo", "__version__", "build_info"]

__version__ = "0.1.0"


class BuildInfo:
    """What this copy of the gateway was built from.

    version      as in ``__version__``
    commit       full git commit of the sources; "unknown" outside an archive, or built from an uncommitted state
    lock_digest  SHA-256 of .lock/runtime.txt in hex, which names every dependency by hash; "unknown" outside an archive
    """

    __slots__ = ("commit", "lock_digest", "version")

    def __init__(self, version: str, commit: str = "unknown", lock_digest: str = "unknown") -> None:
        self.version = version
        self.commit = commit
        self.lock_digest = lock_digest

    def __repr__(self) -> str:
        return f"BuildInfo(version={self.version!r}, commit={self.commit!r}, lock_digest={self.lock_digest!r})"


def build_info() -> BuildInfo:
    """Read what build_zipapp.py wrote into the archive. Never raises: a source tree just knows less."""
    import importlib

    try:
        written = importlib.import_module("gateway._build_info")
    except ImportError:
        return BuildInfo(__version__)
    return BuildInfo(__version__, str(written.COMMIT), str(written.LOCK_DIGEST))
