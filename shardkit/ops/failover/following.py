"""Whether the standbys of a primary follow it: by what they have of its log, not by connecting.

A standby can connect over and over and get nothing. When a primary dies in the middle of a record
that crosses a file of its log, a standby may have the first file whole, with the beginning of that
record. Whoever is promoted ends before the record and goes on in the first file; the standby wants
the second one, which does not exist there yet (`requested starting point … is ahead of the WAL
flush position of this server`), and begins again. pg_rewind finds nothing to do: what was replayed
is common. Source: PostgreSQL 18, xlogrecovery.c, WaitForWALToBecomeAvailable.

So a standby follows when it has reached a position that the primary had at an earlier look, on the
primary's timeline; while it gets nearer it is given time. Pure: looks and times are arguments.
Called by `shardkit.ops.failover.driver`, and by simulations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from shardkit.ops.failover.machine import Node

__all__ = ["PATIENCE", "Following"]

PATIENCE: Final = 5.0
"""Seconds without anything new after which a standby of a living primary is stuck."""

_LOOK: Final = 1.0
"""Seconds that one look counts for at most: what was not looked at is not known."""


@dataclass(slots=True)
class _Track:
    """A standby on its way.

    Attributes:
        behind: the primary that it follows, and its timeline.
        mark: position that it has to reach.
        reached: the most that it had.
        still: seconds since it came nearer.
    """

    behind: tuple[str, int]
    mark: int
    reached: tuple[int, int]
    still: float = 0.0


class Following:
    """What was observed of the standbys of a physical shard. Not thread-safe.

    Args:
        patience: seconds without anything new after which a standby is stuck.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._tracks: dict[str, _Track] = {}
        self._rewound: set[str] = set()
        self._looked: float | None = None

    def note(self, nodes: Iterable[Node], leader: Node | None, now: float) -> None:
        """Take a look into account.

        Args:
            nodes: every server.
            leader: the lawful primary; None where none answers, and nobody can be stuck.
            now: monotonic seconds.
        """
        if leader is None:
            self._looked = None
            return
        elapsed = 0.0 if self._looked is None else min(now - self._looked, _LOOK)
        self._looked = now
        for node in nodes:
            if not node.is_standby or node.follows != leader.name:
                self._tracks.pop(node.name, None)
                continue
            behind = leader.name, leader.timeline
            track = self._tracks.get(node.name)
            if track is None or track.behind != behind:
                self._tracks[node.name] = _Track(behind, leader.position, node.reached)
            elif node.reached >= (leader.timeline, track.mark):
                self._tracks[node.name] = _Track(behind, leader.position, node.reached)
                self._rewound.discard(node.name)
            elif node.reached > track.reached:
                track.reached, track.still = node.reached, 0.0
            else:
                track.still += elapsed

    def seen(self, node: Node) -> Node:
        """Return a server with what is known of it beyond one look."""
        is_rewound = node.name in self._rewound
        track = self._tracks.get(node.name)
        if track is None:
            return replace(node, is_rewound=is_rewound) if is_rewound else node
        _, timeline = track.behind
        return replace(
            node,
            streams=node.streams and node.reached[0] >= timeline,
            is_stuck=track.still > self._patience,
            is_rewound=is_rewound,
        )

    def rejoined(self, name: str, *, anew: bool) -> None:
        """Note that a server was made a standby again: by a new copy, or by pg_rewind."""
        self._tracks.pop(name, None)
        if anew:
            self._rewound.discard(name)
        else:
            self._rewound.add(name)
