"""Which server of a Redis Cluster has which keys: 16384 slots, as the servers last told. No I/O.

Source: Redis Cluster specification, "Key distribution model", "Redirection and resharding".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS as N_SLOTS
from redis.crc import key_slot

from shardkit.caches.node import Node
from shardkit.caches.nodes import Nodes

__all__ = ["SLOTS_COMMAND", "SlotMap", "place_of", "ranges_of"]

SLOTS_COMMAND: Final = (b"CLUSTER", b"SLOTS")
_BETWEEN: Final = 0.25
"""Seconds between two times that the servers are asked; a server that moved is known at once."""


class SlotMap:
    """Owners of slots, by their places in `Nodes.homes`.

    Args:
        prefix: before every key.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._owners = [0] * N_SLOTS
        self._asked_at = -_BETWEEN
        self.is_wrong = True

    def owner(self, key: str) -> int:
        """Return the place of a key's server."""
        return self._owners[key_slot((self._prefix + key).encode())]

    def is_due(self, now: float) -> bool:
        """Whether to ask the servers who has what; says yes once, then not for a moment."""
        if now - self._asked_at < _BETWEEN:
            return False
        self._asked_at = now
        return True

    def learn(self, ranges: Iterable[tuple[int, int, str]], nodes: Nodes) -> None:
        """Take in which server has which slots, from first to last.

        A server that has none any more is forgotten, and what it missed is missed by its heirs.
        """
        before = self._owners
        owners = list(before)
        for first, last, name in ranges:
            owners[first : last + 1] = [place_of(name, nodes)] * (last + 1 - first)
        self._owners = owners
        self.is_wrong = False
        pairs = {pair for pair in zip(before, owners, strict=True) if pair[0] != pair[1]}
        for place in {place for pair in pairs for place in pair}:
            nodes.homes[place].term += 1
        used = set(owners)
        for place, node in enumerate(nodes.homes):
            if place not in used and node.is_dirty:
                for key in node.forgotten():
                    nodes.missed(nodes.home(key), key)

    def moved(self, slot: int, name: str, nodes: Nodes) -> Node:
        """Take in where one slot is, and return the server; the rest is to be asked for."""
        place = place_of(name, nodes)
        if self._owners[slot] != place:
            nodes.homes[place].term += 1
            nodes.homes[self._owners[slot]].term += 1
            self._owners[slot] = place
        self.is_wrong = True
        return nodes.homes[place]

    def life_key(self, node: Node, nodes: Nodes) -> bytes | None:
        """Return the name of the entry that says of which life a server's data are.

        It lies in one of the server's own slots, so that a replica that is promoted has the one
        of the server it was a copy of, and is found out. None for a server without slots.
        """
        place = next((i for i, each in enumerate(nodes.homes) if each is node), -1)
        owners = self._owners
        if place not in owners:
            return None
        n = 0
        while True:
            key = f"{self._prefix}life{{{n}}}".encode()
            if owners[key_slot(key)] == place:
                return key
            n += 1


def place_of(name: str, nodes: Nodes) -> int:
    """Return the place of a server; a new one is added."""
    for place, node in enumerate(nodes.homes):
        if node.name == name:
            return place
    nodes.homes.append(nodes.made(name))
    return len(nodes.homes) - 1


def ranges_of(reply: Any, asked: str) -> list[tuple[int, int, str]] | None:
    """Return first slot, last slot and server of each range; None when that is no reply.

    Args:
        reply: to `SLOTS_COMMAND`.
        asked: host of who said it: a server that knows no name of itself says nothing.
    """
    if not isinstance(reply, Sequence) or isinstance(reply, bytes) or not reply:
        return None
    ranges: list[tuple[int, int, str]] = []
    for each in reply:
        try:
            first, last, (host, port, *_), *_ = each
            ranges.append((int(first), int(last), f"{(host or b'').decode() or asked}:{int(port)}"))
        except (TypeError, ValueError, AttributeError):
            return None
    return ranges
