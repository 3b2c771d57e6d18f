"""TCP ports on 127.0.0.1 that nobody uses.

Ports are taken from below the ephemeral range: in that range a client that retries against a
stopped server can be given the very port it connects to, connect to itself and keep the server
from coming back. Source: ip(7), `ip_local_port_range`.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection
from pathlib import Path

from shardkit.errors import LocalServerError

__all__ = ["HOST", "choose", "is_free"]

HOST = "127.0.0.1"
_LOWEST = 15000
_FEWEST = 1000


def is_free(port: int) -> bool:
    """Return whether a server could listen on a port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose(taken: Collection[int]) -> int:
    """Return a free port that is not among `taken`.

    Raises:
        LocalServerError: no port is free.
    """
    low, high = _range()
    offset = secrets.randbelow(high - low)
    for step in range(high - low):
        port = low + (offset + step) % (high - low)
        if port not in taken and is_free(port):
            return port
    raise LocalServerError(f"no TCP port is free between {low} and {high} on {HOST}")


def _range() -> tuple[int, int]:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        ephemeral = int(text.split()[0])
    except (OSError, ValueError):
        ephemeral = 32768
    return (_LOWEST, ephemeral) if ephemeral - _LOWEST >= _FEWEST else (_LOWEST, 65536)
