"""Who confirms commits, asked of every primary of the moment: a part of `shardkit status`.

Only with durability mode `sync`. Asked with the monitor's login, or the admin's, at the servers
themselves; changes nothing. Called by the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from shardkit import deadlines
from shardkit.config import Config
from shardkit.ops.direct import Unguarded, parameters
from shardkit.ops.intervals import NOTES, Interval, intervals, note_of
from shardkit.ops.poolers import server_url
from shardkit.ops.standbynames import named_standbys
from shardkit.parallel import run
from shardkit.secret import without_frames
from shardkit.topology import Endpoint, PhysicalShard, Topology
from shardkit.waits import Connection

__all__ = ["DurabilityStatus", "read_durability"]

TIMEOUT: Final = 3.0
"""Seconds that all servers together have to answer."""

_SHOWN: Final = 10
"""Intervals that are shown, the newest."""

# AccessShareLock on small tables. Of a standby only that it is one.
_ASK: Final = f"""
SELECT pg_catalog.pg_is_in_recovery(), (SELECT i.timeline FROM shardkit.identity AS i),
    pg_catalog.current_setting('synchronous_standby_names'),
    ARRAY(SELECT r.application_name::text FROM pg_catalog.pg_stat_replication AS r
        WHERE r.state = 'streaming'),
    a.n, a.longest, ({NOTES}),
    (SELECT f.detail -> 'may_lose' FROM shardkit.failovers AS f
        WHERE f.kind = 'promoted' ORDER BY f.entry DESC LIMIT 1)
FROM (SELECT count(*) AS n, coalesce(max(pg_catalog.date_part('epoch',
        pg_catalog.clock_timestamp() - s.state_change)), 0) AS longest
    FROM pg_catalog.pg_stat_activity AS s WHERE s.wait_event = 'SyncRep') AS a
"""  # noqa: S608  a constant


@dataclass(frozen=True, slots=True)
class DurabilityStatus:
    """Who confirms the commits of a physical shard.

    Attributes:
        physical: its name.
        last_standby: `strict` or `relaxed`, as configured.
        server: its primary, as `host:port`; None when none answered.
        wanted: standbys that have to confirm a commit, as configured.
        waits_for: how many commits wait for now.
        standbys: names of those that count.
        streaming: names of those that are there.
        n_waiting: commits that wait for a standby now.
        longest: seconds for which the oldest of them waits.
        intervals: times in which commits went unconfirmed, oldest first.
        may_lose: what the last failover may have lost for that; None for nothing.
        error: why it is not known, or None.
    """

    physical: str
    last_standby: str
    server: str | None = None
    wanted: int = 0
    waits_for: int = 0
    standbys: tuple[str, ...] = ()
    streaming: tuple[str, ...] = ()
    n_waiting: int = 0
    longest: float = 0.0
    intervals: tuple[Interval, ...] = ()
    may_lose: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether commits wait for standbys that are not there."""
        return self.server is not None and len(self.streaming) < self.waits_for

    @property
    def is_relaxed(self) -> bool:
        """Whether commits go unconfirmed now."""
        return bool(self.intervals) and self.intervals[-1].is_open

    @property
    def is_well(self) -> bool:
        """Whether as many standbys confirm as are wanted."""
        is_full = self.server is not None and self.waits_for >= self.wanted
        return is_full and not self.is_blocked and not self.is_relaxed

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {
            "intervals": [each.plain() for each in self.intervals],
            "is_blocked": self.is_blocked,
            "is_relaxed": self.is_relaxed,
        }

    def lines(self) -> list[str]:
        """Return it for people."""
        if self.server is None:
            return [f"who confirms commits is not known: {self.error}"]
        there = ", ".join(self.streaming) or "none"
        number = f"{self.waits_for} of {len(self.standbys)}"
        said = [f"commits wait for {number} standbys; there: {there}"]
        if self.is_blocked:
            said[0] += f"; {self.n_waiting} wait now, the oldest for {self.longest:.1f} s"
        if self.waits_for < self.wanted:
            said[0] += f"; shardkit.toml says {self.wanted}"
        for each in self.intervals:
            until = "now" if each.until is None else f"{each.until:%Y-%m-%d %H:%M:%S %Z}"
            missing = f", without {', '.join(each.missing)}" if each.missing else ""
            said.append(
                f"unconfirmed on {each.server} from {each.since:%Y-%m-%d %H:%M:%S %Z} until {until}"
                f"{missing}"
            )
        if self.may_lose is not None:
            since = self.may_lose.get("since")
            alone = f"since {since} " if since else ""
            said.append(
                f"the last failover may have lost commits {alone}beyond {self.may_lose['beyond']}"
            )
        return said


def read_durability(
    config: Config, topology: Topology, *, timeout: float = TIMEOUT
) -> list[DurabilityStatus]:
    """Return who confirms commits, for each physical shard; empty in mode `async`.

    Args:
        config: the file.
        topology: made of it.
        timeout: seconds that all servers together have to answer.
    """
    if not config.durability.confirming:
        return []
    shards = topology.physical.values()
    asked = [(shard, endpoint) for shard in shards for endpoint in shard.endpoints]
    with deadlines.deadline(timeout):
        answers = run([partial(_ask, shard, endpoint) for shard, endpoint in asked])
    found = []
    for name in topology.physical:
        mine = [a for (shard, _), a in zip(asked, answers, strict=True) if shard.name == name]
        found.append(_status(config, name, mine))
    return found


def _ask(shard: PhysicalShard, endpoint: Endpoint) -> tuple[Any, ...]:
    url = shard.looking_at(server_url(shard, endpoint))
    options = parameters(url, application="shardkit status")
    connection = Connection.open("", patience=TIMEOUT, guard=_GUARD, autocommit=True, **options)
    try:
        row = connection.execute(_ASK.encode()).fetchone()
        assert row is not None, "an aggregate has a row"
        return f"{url.host}:{url.port or 5432}", *row
    finally:
        connection.close()


def _status(
    config: Config, name: str, answers: list[tuple[Any, ...] | Exception]
) -> DurabilityStatus:
    durability = config.durability
    told = [a for a in answers if not isinstance(a, Exception)]
    primaries = sorted((a for a in told if not a[1]), key=lambda a: a[2] or 0)
    if not primaries:
        errors = [str(without_frames(a)).strip() for a in answers if isinstance(a, Exception)]
        reason = next((e.splitlines()[0] for e in errors if e), "no server is a primary")
        return DurabilityStatus(
            name, durability.last_standby, wanted=durability.confirming, error=reason
        )
    server, _, _, setting, streaming, n_waiting, longest, notes, may_lose = primaries[-1]
    number, standbys = named_standbys(setting)
    known = intervals(note_of(row) for row in notes)[-_SHOWN:]
    if not standbys and known and known[-1].is_open:
        standbys = named_standbys(known[-1].setting)[1]
    return DurabilityStatus(
        name,
        durability.last_standby,
        server,
        durability.confirming,
        number,
        standbys,
        tuple(sorted(set(streaming) & set(standbys) if "*" not in standbys else set(streaming))),
        n_waiting,
        longest,
        known,
        may_lose,
    )


_GUARD: Final = Unguarded()
