"""Looks after the standbys that confirm commits of one physical shard, as `relaxing` decides.

Called by `shardkit.ops.failover.driver` while there is a lawful primary, and asked by it what a
failover may lose. The line in `shardkit.failovers` is always older than the setting it speaks of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg
from psycopg import errors as pg

from shardkit.clock import Clock
from shardkit.config import DurabilityConfig
from shardkit.ops.failover import relaxing
from shardkit.ops.failover.machine import View
from shardkit.ops.failover.nodes import Server
from shardkit.ops.failover.relaxing import Confirm, Follower, Relax, Restore, Rules, Seen
from shardkit.ops.intervals import (
    NOTES,
    RELAXED,
    RESTORED,
    Interval,
    Loss,
    intervals,
    loss,
    note_of,
)
from shardkit.ops.standbynames import lowered

__all__ = ["Confirming", "Step"]

Step = Relax | Restore | Confirm

_SETTING: Final = "synchronous_standby_names"

# Catalogues only. How long a standby has been silent is told by the clock of whoever asks, never
# from the times in its answers, which are of the standby's clock.
_LOOK: Final = f"""
SELECT pg_catalog.json_build_object('setting', pg_catalog.current_setting('{_SETTING}'),
    'is_own', {{is_own}},
    'followers', (SELECT coalesce(pg_catalog.json_agg(pg_catalog.json_build_object(
        'name', r.application_name, 'streams', r.state = 'streaming', 'said', r.reply_time,
        'flushed', r.flush_lsn, 'behind', pg_catalog.pg_wal_lsn_diff(
            pg_catalog.pg_current_wal_flush_lsn(), r.flush_lsn))), '[]')
        FROM pg_catalog.pg_stat_replication AS r))
"""  # noqa: S608  a constant

# Whether ALTER SYSTEM has set it. Where the login may not know, the file is supposed to have.
_IS_OWN: Final = (
    "(SELECT coalesce(s.sourcefile LIKE '%postgresql.auto.conf', false) "
    "FROM pg_catalog.pg_settings AS s WHERE s.name = 'synchronous_standby_names')"
)


@dataclass(slots=True)
class _Memory:
    """What was observed of the last lawful primary."""

    said: dict[str, tuple[Any, float]] = field(default_factory=dict)
    short_since: float | None = None
    well_at: float | None = None
    known: tuple[Interval, ...] = ()
    lost: Loss | None = None


class Confirming:
    """Who confirms commits of a physical shard. Not thread-safe.

    Args:
        servers: by name.
        durability: what the configuration says.
        clock: source of monotonic time.
    """

    def __init__(
        self, servers: Mapping[str, Server], durability: DurabilityConfig, clock: Clock
    ) -> None:
        self.rules = Rules(
            durability.confirming, durability.last_standby == "relaxed", durability.patience
        )
        self._servers = servers
        self._clock = clock
        self._memory = _Memory()

    def tend(self, view: View, hook: Callable[[str], object]) -> Step | None:
        """Look at the primary, and do one step; return it, or None where nothing is to be done.

        Raises:
            psycopg.Error: it does not answer; the next look goes on.
        """
        leader = view.node(view.leader)
        if not self.rules.confirm or not leader.takes_writes or leader.is_closed:
            return None
        server = self._servers[leader.name]
        # One that answers and does not follow may have been taken away by a failover under way.
        others = [n for n in view.nodes if n.answers and n.name != leader.name]
        is_alone = all(n.is_standby and n.follows in {leader.name, None} for n in others)
        seen = replace(self._seen(server), may_relax=is_alone)
        step = relaxing.decide(seen, self.rules)
        if step is None:
            return None
        had = server.is_claimed
        if not server.claim():
            return None  # another watcher is at it
        try:
            # What was seen before may have been changed by whoever had the claim.
            seen = replace(self._seen(server), may_relax=is_alone)
            if step != relaxing.decide(seen, self.rules):
                return None
            hook(type(step).__name__)
            self._do(server, seen, step, hook)
            hook(f"{type(step).__name__} done")
        finally:
            if not had:
                server.release()
        return step

    def tighten(self, name: str) -> None:
        """Before a server is promoted: undo a relaxation that it has kept, or was copied with."""
        if not self.rules.confirm:
            return
        server = self._servers[name]
        setting, is_own = self._setting(server)
        known = self._known(server)
        if is_own and _is_lowered(setting, known):
            kept = [i for i in known if i.server == name and i.is_own]
            server.set(_SETTING, kept[-1].setting if kept else None)

    def loss(self, name: str, position: int) -> Loss | None:
        """Return what is lost, maybe, when a server is promoted now; None for nothing.

        Args:
            name: of the server.
            position: end of the log that it has.
        """
        memory = self._memory
        if not (self.rules.confirm and self.rules.is_relaxed):
            return None
        known = [*memory.known]
        try:
            known += self._known(self._servers[name])
        except (psycopg.Error, OSError):  # it is promoted all the same
            known += []
        now, patience = self._clock.monotonic(), self.rules.patience
        saw = memory.well_at is not None and now - memory.well_at < patience
        memory.lost = loss(known, saw=saw, position=position)
        return memory.lost

    @property
    def lost(self) -> Loss | None:
        """What `loss` said last."""
        return self._memory.lost

    # -- parts

    def _do(self, server: Server, seen: Seen, step: Step, hook: Callable[[str], object]) -> None:
        match step:
            case Relax(node, number, missing):
                before = seen.setting if seen.open is None else seen.open.setting
                own = seen.is_own if seen.open is None else seen.open.is_own
                lower = lowered(before, number)
                detail = {"setting": before, "is_own": own, "to": lower, "missing": missing}
                server.note(RELAXED, server=node, detail=json.dumps(detail))
                self._memory.known = self._known(server)
                hook("Relax noted")
                server.set(_SETTING, lower)
            case Restore(_, setting):
                server.set(_SETTING, setting)
            case Confirm(node):
                server.note(RESTORED, server=node, is_confirmed=True)

    def _seen(self, server: Server) -> Seen:
        memory, now = self._memory, self._clock.monotonic()
        found = self._asked(server)
        known = self._known(server)
        seen = Seen(
            server.name,
            found["setting"],
            found["is_own"],
            tuple(self._follower(each, now) for each in found["followers"]),
            open=next((i for i in known if i.is_open), None),
            is_lowered=_is_lowered(found["setting"], known),
        )
        memory.known = known
        memory.lost = None
        if relaxing.is_short(seen):
            memory.short_since = now if memory.short_since is None else memory.short_since
        else:
            memory.short_since = None
            memory.well_at = now
        since = memory.short_since
        return replace(seen, short_for=0.0 if since is None else now - since)

    def _follower(self, said: Mapping[str, Any], now: float) -> Follower:
        name, mark = said["name"], (said["said"], said["flushed"])
        before = self._memory.said.get(name)
        if before is None or before[0] != mark:
            before = self._memory.said[name] = (mark, now)
        behind = said["behind"]
        return Follower(
            name,
            streams=bool(said["streams"]),
            behind=1 << 62 if behind is None else int(behind),
            silence=now - before[1],
        )

    def _asked(self, server: Server) -> dict[str, Any]:
        try:
            found = server.ask(_LOOK.format(is_own=_IS_OWN))
        except pg.InsufficientPrivilege:
            found = server.ask(_LOOK.format(is_own="false"))
        assert isinstance(found, dict), "an object of JSON"
        return found

    def _setting(self, server: Server) -> tuple[str, bool]:
        return str(server.ask(f"SHOW {_SETTING}")), bool(server.ask(f"SELECT {_IS_OWN}"))

    def _known(self, server: Server) -> tuple[Interval, ...]:
        try:
            rows = server.ask(NOTES)
        except (pg.UndefinedTable, pg.InsufficientPrivilege):  # of an older version
            return ()
        return intervals(note_of(row) for row in rows)


def _is_lowered(setting: str, known: Sequence[Interval]) -> bool:
    """Tell whether a setting is one that a relaxation has made."""
    return any(setting in each.lowered for each in known)
