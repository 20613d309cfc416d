"""The way in: ``python3 gateway.pyz ...``, ``python3 -m gateway ...`` and ``python3 path/to/gateway ...``.

The demo server is looked for first, and before anything else is imported: the gateway starts it through this file,
and it must neither wait for the gateway's imports nor carry them in its memory. It goes by the first argument alone, so
that it is also found when the archive is called gateway-http or gateway-stdio.
"""

from __future__ import annotations

import sys


def run() -> int:
    """Do what ``sys.argv`` says and return the exit status."""
    try:
        if sys.argv[1:2] == ["demo-server"]:
            from gateway.demo_server import main as demo_server

            return demo_server()
        from gateway.cli import main

        return main()
    except KeyboardInterrupt:
        # Ctrl-C while still importing: nothing runs yet, so this is the clean stop of any other time (compat C16).
        return 0


if __name__ == "__main__":
    if not __package__:
        # Run as a folder or file: Python put the folder itself first in sys.path, where gateway is not found and our
        # module names would hide others'.
        import os

        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.exit(run())
