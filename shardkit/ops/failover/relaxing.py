"""What is to be done when fewer standbys are left than have to confirm commits: one pure function.

`[durability] last_standby` decides. `strict`: nothing, commits wait. `relaxed`: after `patience`
they go unconfirmed, by an order that is noted first, and are confirmed again as soon as the
standbys have caught up.

    enough standbys ──▶ nothing
    too few, for patience ── Relax ───▶ a line with the setting of before, then the setting
    they are back ────────── Restore ─▶ the setting of before
    and confirm ──────────── Confirm ─▶ a line that they have confirmed: the interval ends

Nothing but the line remembers the interval, so a watcher may be killed at any step: a setting is
never lower than it was without a line that says so, and an interval ends only by a commit that
standbys have confirmed. Driven by `shardkit.ops.failover.confirming`. Source: docs/failover.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardkit.ops.intervals import Interval
from shardkit.ops.standbynames import named_standbys

__all__ = ["Confirm", "Follower", "Relax", "Restore", "Rules", "Seen", "decide", "is_short"]

_CAUGHT_UP: Final = 1 << 20
"""Bytes of log that a standby may lack and count as caught up; a commit waits for them."""

_SILENCE: Final = 2.0
"""Seconds without a word after which a standby that lacks log does not count. A choice."""


@dataclass(frozen=True, slots=True)
class Follower:
    """A standby, as its primary sees it.

    Attributes:
        name: its `application_name`.
        streams: whether it has caught up with its primary once.
        behind: bytes of log that it does not have on its disk.
        silence: seconds since it said something new.
    """

    name: str
    streams: bool = True
    behind: int = 0
    silence: float = 0.0

    @property
    def confirms(self) -> bool:
        """Whether it confirms commits now; one that lacks nothing has nothing to say."""
        return self.streams and (self.behind <= 0 or self.silence < _SILENCE)


@dataclass(frozen=True, slots=True)
class Seen:
    """A primary, as it was last heard.

    Attributes:
        name: its address.
        setting: `synchronous_standby_names`.
        is_own: whether that was set by ALTER SYSTEM.
        followers: who streams its log.
        open: the interval that has begun and has not ended; None for none.
        is_lowered: whether a relaxation has made the setting what it is, here or where this server
            was copied from.
        short_for: seconds for which `is_short` has held without a break.
        may_relax: whether every other server that answers follows it, so that no failover can be
            under way that has taken its standbys.
    """

    name: str
    setting: str
    is_own: bool = False
    followers: tuple[Follower, ...] = ()
    open: Interval | None = None
    is_lowered: bool = False
    short_for: float = 0.0
    may_relax: bool = True


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says.

    Attributes:
        confirm: standbys that have to confirm a commit.
        is_relaxed: whether commits may go unconfirmed at all.
        patience: seconds for which they wait before.
    """

    confirm: int
    is_relaxed: bool = False
    patience: float = 10.0


@dataclass(frozen=True, slots=True)
class Relax:
    """Commits wait for fewer standbys: for as many as there are."""

    node: str
    number: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Restore:
    """Commits wait for standbys as before; `setting` None for what the server's file says."""

    node: str
    setting: str | None = None


@dataclass(frozen=True, slots=True)
class Confirm:
    """Standbys have confirmed a commit: the interval has ended."""

    node: str


def decide(seen: Seen, rules: Rules) -> Relax | Restore | Confirm | None:
    """Return the next step, or None."""
    level, _ = named_standbys(seen.setting)
    wanted, names = named_standbys(_before(seen, rules))
    if not wanted and level < rules.confirm:
        # Copied from a server that was relaxed: what ALTER SYSTEM has set gives way to the file.
        # Else never set as shardkit.toml says, of which the doctor tells.
        return Restore(seen.name) if seen.is_own and seen.is_lowered else None
    if not wanted or "*" in names:  # then nobody can tell a standby from any other client
        return None
    there = [f for f in seen.followers if f.name in names and f.confirms]
    missing = tuple(sorted(set(names) - {f.name for f in there}))
    can_relax = rules.is_relaxed and seen.may_relax and seen.short_for >= rules.patience
    if level >= wanted:
        if len(there) < wanted:
            return Relax(seen.name, len(there), missing) if can_relax else None
        return Confirm(seen.name) if seen.open else None
    ready = sum(f.behind <= _CAUGHT_UP for f in there)
    if ready >= wanted or not rules.is_relaxed:
        own = seen.open is not None and seen.open.server == seen.name and seen.open.is_own
        return Restore(seen.name, seen.open.setting if own and seen.open else None)
    if ready > level:
        return Relax(seen.name, ready, missing)
    if len(there) < level and can_relax:
        return Relax(seen.name, len(there), missing)
    return None


def is_short(seen: Seen) -> bool:
    """Tell whether fewer standbys confirm than commits wait for now."""
    level, names = named_standbys(seen.setting)
    return sum(f.confirms for f in seen.followers if f.name in names) < level


def _before(seen: Seen, rules: Rules) -> str:
    """Return the setting without any relaxation; empty where nobody knows it."""
    if seen.open is not None and seen.open.server == seen.name:
        return seen.open.setting
    return seen.setting if named_standbys(seen.setting)[0] >= rules.confirm else ""
