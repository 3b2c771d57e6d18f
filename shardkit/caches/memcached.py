"""Memcached for threads: pymemcache's connections, meta commands, one round trip per server.

cache = Memcached(["10.0.0.1:11211", "10.0.0.2:11211"], gutter=["10.0.0.9:11211"])
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, Unpack

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from shardkit.caches.meta import (
    Life,
    ProtocolViolation,
    Replies,
    answers_of,
    hello,
    life_of,
    quick_answer,
    render,
)
from shardkit.caches.node import Node
from shardkit.caches.served import Deadline, ServedCache
from shardkit.caches.serving import Options
from shardkit.caching.operations import Answer, Request

__all__ = ["Memcached", "split_address"]

_PIECE: Final = 65536
_FLUSH_TIME: Final = 1.0


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`; without a port, 11211."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return address.strip("[]"), 11211
    return host.strip("[]"), int(port)


class _Connection(Client):  # type: ignore[misc]  # ships no types
    """A pymemcache client that speaks the meta protocol.

    Attributes:
        life: of the server, as of when this connected; None while it is not.
        is_used: whether it has carried a call before.
    """

    def __init__(self, node: Node, timeout: float) -> None:
        super().__init__(
            split_address(node.name), connect_timeout=timeout, timeout=timeout, no_delay=True
        )
        self.node = node
        self.life: Life | None = None
        self.is_used = False
        self._timeout = timeout
        self._armed = 0.0
        self._sent: list[int] = []

    def send(self, requests: Sequence[Request], deadline: Deadline) -> None:
        if self.life is None:
            self.connect_timeout = deadline.left()
            self._connect()
            assert self.sock is not None
            self._armed = 0.0
            self._wait_no_longer_than(deadline)
            self.sock.sendall(hello(secrets.token_hex(8).encode()))
            self.life = life_of(self.node.name, self._replies(2, deadline))
            self.node.met(self.life)
        data, self._sent = render(requests, self.life)
        if data:
            self._wait_no_longer_than(deadline)
            assert self.sock is not None
            self.sock.sendall(data)

    def receive(self, requests: Sequence[Request], deadline: Deadline) -> list[Answer]:
        assert self.life is not None
        data = b""
        if len(self._sent) == 1 == len(requests):  # a hit, mostly, in one piece: a third quicker
            assert self.sock is not None
            data = self.sock.recv(_PIECE)  # waits no longer than `send` has said
            if (answer := quick_answer(data, self.life)) is not None:
                return [answer]
            if not data:
                raise ConnectionResetError("the server closed the connection")
        replies = self._replies(len(self._sent), deadline, data)
        return answers_of(requests, self._sent, replies.replies, self.life)

    def shut(self) -> None:
        self.life = None
        self.close()

    def _replies(self, n: int, deadline: Deadline, data: bytes = b"") -> Replies:
        replies = Replies(n)
        if data:
            replies.feed(data)
        sock = self.sock
        assert sock is not None
        while not replies.is_complete:
            self._wait_no_longer_than(deadline)
            data = sock.recv(_PIECE)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            replies.feed(data)
        return replies

    def _wait_no_longer_than(self, deadline: Deadline) -> None:
        """Bound the next wait. Setting a socket's timeout is a system call: not for 2 ms."""
        left = deadline.left()
        if not left <= self._armed <= left + 0.002:
            assert self.sock is not None
            self.sock.settimeout(left)
            self._armed = left


class Memcached(ServedCache):
    """A static ring of Memcached servers, 1.6 or newer.

    Args:
        servers: as `host:port`; the same list, in any order, in every process.
        options: see `Options`.
    """

    def __init__(self, servers: Sequence[str], **options: Unpack[Options]) -> None:
        super().__init__(servers, lambda node: _Connection(node, self.seconds), **options)

    def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""
        address = split_address(self.nodes.named(name).name)
        client = Client(address, connect_timeout=_FLUSH_TIME, timeout=_FLUSH_TIME)
        try:
            client.flush_all(noreply=False)
        except (OSError, MemcacheError, ProtocolViolation):
            return False
        finally:
            client.close()
        self.nodes.flushed(name)
        return True
