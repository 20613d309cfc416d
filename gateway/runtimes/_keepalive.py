"""Noticing that a peer is gone which says nothing more: engines and clusters at a distance."""

from __future__ import annotations

import socket

__all__ = ["keepalive"]


def keepalive() -> list[tuple[int, int, int]]:
    """Socket options that notice a lost peer within 20 s of silence."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_NODELAY", 1)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
