"""When commits were acknowledged without the standbys that should confirm them, and its price.

`shardkit.failovers` has a line whenever the watcher lets commits go unconfirmed (`relaxed`), and
one when they are confirmed again (`restored`); here these become intervals, and what a failover
may have lost. Pure. Written by `shardkit.ops.failover.confirming`; shown by `shardkit status` and
`shardkit doctor`. Source: docs/failover.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from shardkit.gates import lsn_of, lsn_text

__all__ = [
    "NOTES", "RELAXED", "RESTORED", "Interval", "Loss", "Note", "intervals", "loss", "note_of",
]  # fmt: skip

RELAXED: Final = "relaxed"
RESTORED: Final = "restored"

# AccessShareLock on a small table. Also on standbys, which have what they have replayed.
NOTES: Final = f"""
SELECT coalesce(pg_catalog.json_agg(line ORDER BY line.entry), '[]') FROM (
    SELECT f.entry, f.kind, f.server, f.position, f.detail, f.noted FROM shardkit.failovers AS f
    WHERE f.kind IN ('{RELAXED}', '{RESTORED}') ORDER BY f.entry DESC LIMIT 100) AS line
"""  # noqa: S608  a constant


@dataclass(frozen=True, slots=True)
class Note:
    """A line of `shardkit.failovers` of one of these kinds."""

    kind: str
    server: str
    at: datetime
    position: int
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Interval:
    """A time in which commits were acknowledged with fewer standbys than are wanted, or none.

    Attributes:
        server: the primary, as `host:port`.
        since: when it began, by the database's clock.
        since_position: end of the primary's log then.
        setting: `synchronous_standby_names` before.
        is_own: whether that was set by ALTER SYSTEM, and not by a file of an operator.
        missing: names of the standbys that did not confirm.
        lowered: what the setting was made meanwhile.
        until: when it ended; None while it lasts.
        until_position: a position of the log that the standbys had confirmed by then.
    """

    server: str
    since: datetime
    since_position: int
    setting: str
    is_own: bool = False
    missing: tuple[str, ...] = ()
    lowered: tuple[str, ...] = ()
    until: datetime | None = None
    until_position: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether it lasts."""
        return self.until is None

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "server": self.server,
            "since": self.since.isoformat(),
            "since_position": lsn_text(self.since_position),
            "until": None if self.until is None else self.until.isoformat(),
            "until_position": None
            if self.until_position is None
            else lsn_text(self.until_position),
            "missing": list(self.missing),
        }


@dataclass(frozen=True, slots=True)
class Loss:
    """What a failover may have lost.

    Attributes:
        beyond: end of the log that the promoted server had; what lies beyond may be lost.
        since: when the old primary began to acknowledge alone; None where nobody knows whether it
            did.
    """

    beyond: int
    since: datetime | None

    def __str__(self) -> str:
        """Return it as a sentence."""
        if self.since is None:
            return (
                f"commits beyond {lsn_text(self.beyond)} may be lost: nobody knows whether the old "
                "primary acknowledged without a standby"
            )
        return (
            f"commits since {self.since:%Y-%m-%d %H:%M:%S %Z} beyond {lsn_text(self.beyond)} "
            "may be lost: no standby confirmed them"
        )

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        since = None if self.since is None else self.since.isoformat()
        return {"beyond": lsn_text(self.beyond), "since": since}


def note_of(row: Mapping[str, Any]) -> Note:
    """Return a line of `NOTES`."""
    return Note(
        row["kind"],
        row["server"],
        datetime.fromisoformat(row["noted"]),
        lsn_of(row["position"]),
        row["detail"] or {},
    )


def intervals(notes: Iterable[Note]) -> tuple[Interval, ...]:
    """Return the intervals that lines tell of, oldest first; only the last one may be open.

    A line `relaxed` within an interval says that the number of standbys has changed again; the
    first one says how it was before.
    """
    found: list[Interval] = []
    for note in notes:
        last = found[-1] if found and found[-1].is_open else None
        if note.kind == RELAXED and last is None:
            found.append(
                Interval(
                    note.server,
                    note.at,
                    note.position,
                    setting=str(note.detail.get("setting", "")),
                    is_own=bool(note.detail.get("is_own")),
                    missing=tuple(note.detail.get("missing", ())),
                    lowered=(str(note.detail.get("to", "")),),
                )
            )
        elif note.kind == RELAXED and last is not None:
            to = str(note.detail.get("to", ""))
            found[-1] = replace(last, lowered=(*last.lowered, to))
        elif note.kind == RESTORED and last is not None:
            found[-1] = replace(last, until=note.at, until_position=note.position)
    return tuple(found)


def loss(known: Sequence[Interval], *, saw: bool, position: int) -> Loss | None:
    """Return what a failover may lose because the old primary acknowledged alone, or None.

    Args:
        known: intervals that the promoted server has heard of, and that its watcher has seen.
        saw: whether somebody has seen, so short a time before the primary was lost that nothing
            can have been relaxed since, that it had the standbys it needs.
        position: end of the log that the promoted server has.
    """
    costly = [
        each for each in known if each.until_position is None or each.until_position > position
    ]
    if costly:
        return Loss(position, min(each.since for each in costly))
    return None if saw else Loss(position, None)
