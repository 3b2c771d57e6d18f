"""Checks of how servers follow each other.

Source: PostgreSQL manual, 19.6 and 26.2; docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.gates import lsn_text
from shardkit.ops.health.facts import Facts, Server
from shardkit.ops.health.findings import Problem, Severity, check
from shardkit.ops.intervals import Interval
from shardkit.ops.standbynames import named_standbys

__all__ = ["CHECKS"]

_AT_LEAST = (
    "max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions",
    "max_locks_per_transaction",
)  # fmt: skip
"""Settings that a replica must not have lower than its primary. Source: manual, 26.4.3."""


@check(
    Severity.ERROR,
    "name the standbys: ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (a, b)'; "
    "SELECT pg_reload_conf()",
)
def sync_wildcard(facts: Facts) -> Iterator[Problem]:
    """`*` in synchronous_standby_names: a move's subscription counts as a standby."""
    for server in facts.servers:
        if "*" in _names(server):
            yield Problem(
                server.where, "any client of the log counts as a standby, also one without a copy"
            )


@check(
    Severity.ERROR,
    "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (a, b)', on replicas too; "
    "SELECT pg_reload_conf()",
)
def sync_missing(facts: Facts) -> Iterator[Problem]:
    """durability.mode is sync, and too few standbys have to confirm a commit."""
    for server in facts.servers:
        number, _ = named_standbys(server.settings["synchronous_standby_names"])
        if _open(server):
            continue
        if number < facts.expected.confirming:
            yield Problem(
                server.where, f"commits wait for {number} standbys, not {facts.expected.confirming}"
            )


@check(Severity.ERROR, "start those standbys, or take them out of synchronous_standby_names")
def sync_blocked(facts: Facts) -> Iterator[Problem]:
    """Fewer standbys are connected than a commit waits for: every write hangs."""
    for server in facts.primaries:
        number, names = named_standbys(server.settings["synchronous_standby_names"])
        present = {standby.name for standby in server.standbys if standby.is_streaming}
        n_present = len(present if "*" in names else present & set(names))
        if n_present < number:
            yield Problem(server.where, f"commits wait for {number} standbys, {n_present} stream")


@check(
    Severity.ERROR,
    "start those standbys: `shardkit failover watch` has commits wait for them again",
)
def sync_relaxed(facts: Facts) -> Iterator[Problem]:
    """Commits go unconfirmed, as last_standby = "relaxed" says: a failover now loses them."""
    for server in facts.primaries:
        for each in _open(server):
            yield Problem(
                server.where,
                f"since {each.since:%Y-%m-%d %H:%M:%S %Z}, {lsn_text(each.since_position)}, "
                f"without {', '.join(each.missing)}",
            )


@check(Severity.WARNING, "see what is missing, and have it written again; docs/failover.md")
def sync_lost(facts: Facts) -> Iterator[Problem]:
    """The last failover may have lost commits that no standby had confirmed."""
    for server in facts.primaries:
        if server.may_lose is not None:
            since = server.may_lose.get("since")
            alone = f"acknowledged since {since}" if since else "that no standby confirmed, if any"
            yield Problem(server.where, f"those beyond {server.may_lose['beyond']} {alone}")


@check(Severity.WARNING, "start it, or take it out of synchronous_standby_names")
def sync_unknown(facts: Facts) -> Iterator[Problem]:
    """A name in synchronous_standby_names that nobody has."""
    for server in facts.primaries:
        present = {standby.name for standby in server.standbys}
        for name in _names(server):
            if name not in present and name != "*":
                yield Problem(server.where, f"no standby is called {name!r}")


@check(Severity.ERROR, "add it to synchronous_standby_names, or remove `standby` of the replica")
def sync_undeclared(facts: Facts) -> Iterator[Problem]:
    """A replica that shardkit.toml calls synchronous and its primary does not."""
    for server in facts.primaries:
        shard = facts.expected.topology.physical.get(server.physical)
        names = _names(server)
        for replica in shard.replicas if shard else ():
            if replica.standby and replica.standby not in names and "*" not in names:
                yield Problem(
                    server.where,
                    f"commits do not wait for {replica.standby!r}, as shardkit.toml says",
                )


@check(Severity.WARNING, "ALTER SYSTEM SET hot_standby = on, and restart")
def hot_standby(facts: Facts) -> Iterator[Problem]:
    """hot_standby is off: as a replica, the server would answer nobody."""
    for server in facts.servers:
        if server.settings["hot_standby"] == "off":
            yield Problem(server.where, "as a replica it would answer nobody")


@check(Severity.ERROR, "see its log; make it anew with pg_basebackup when its log is gone")
def not_streaming(facts: Facts) -> Iterator[Problem]:
    """A replica that receives no log, while its primary runs."""
    for server in facts.servers:
        if server.is_replica and not server.is_streaming and facts.primary(server.physical):
            yield Problem(server.where, "receives no log of its primary")


@check(Severity.ERROR, "correct its address in shardkit.toml, or make it anew with pg_basebackup")
def other_lineage(facts: Facts) -> Iterator[Problem]:
    """A replica that is a copy of something else than its primary."""
    for server in facts.servers:
        primary = facts.primary(server.physical)
        if (
            primary is not None
            and server.system
            and primary.system
            and server.system != primary.system
        ):
            yield Problem(server.where, f"is no copy of {primary.where}")


@check(Severity.ERROR, "raise it on the replica to the primary's value, and restart the replica")
def replica_room(facts: Facts) -> Iterator[Problem]:
    """A replica with less room than its primary: it stops replaying."""
    for server in facts.servers:
        primary = facts.primary(server.physical)
        if server.is_replica and primary is not None:
            for name in _AT_LEAST:
                if server.number(name) < primary.number(name):
                    yield Problem(
                        server.where,
                        f"{name} is {server.settings[name]}, on the primary "
                        f"{primary.settings[name]}",
                    )


@check(Severity.WARNING, "ALTER SYSTEM SET max_wal_senders higher, on replicas first, and restart")
def wal_senders(facts: Facts) -> Iterator[Problem]:
    """max_wal_senders leaves no room for a base backup and a move beside the replicas."""
    for server in facts.servers:
        shard = facts.expected.topology.physical.get(server.physical)
        wanted = (len(shard.replicas) if shard else 0) + 2
        if server.number("max_wal_senders") < wanted:
            yield Problem(
                server.where,
                f"max_wal_senders is {server.settings['max_wal_senders']}, needs {wanted}",
            )


@check(Severity.WARNING, "ALTER SYSTEM SET max_replication_slots higher, and restart")
def slots_room(facts: Facts) -> Iterator[Problem]:
    """max_replication_slots leaves no room for a move."""
    for server in facts.servers:
        free = server.number("max_replication_slots") - len(server.slots)
        if free < 1:
            yield Problem(server.where, "no replication slot is free; a move takes one")


@check(Severity.WARNING, "start its reader, or SELECT pg_drop_replication_slot(…)")
def slot_inactive(facts: Facts) -> Iterator[Problem]:
    """A replication slot that nobody reads: it holds log until the disk is full."""
    for server in facts.servers:
        for slot in server.slots:
            if not slot.is_active and not slot.is_lost:
                held = slot.held_bytes / 2**20
                yield Problem(
                    server.where, f"slot {slot.name!r} is unread and holds {held:.0f} MiB"
                )


@check(Severity.ERROR, "drop the slot and make its reader anew")
def slot_lost(facts: Facts) -> Iterator[Problem]:
    """A replication slot whose log is gone: its reader can never go on."""
    for server in facts.servers:
        for slot in server.slots:
            if slot.is_lost:
                yield Problem(server.where, f"slot {slot.name!r} has lost its log")


@check(Severity.WARNING, "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; pg_reload_conf()")
def slot_unbounded(facts: Facts) -> Iterator[Problem]:
    """Slots may hold log until the disk is full, so moves are refused."""
    for server in facts.servers:
        if server.number("max_slot_wal_keep_size") < 0:
            yield Problem(server.where, f"max_slot_wal_keep_size is -1, {len(server.slots)} slots")


def _open(server: Server) -> tuple[Interval, ...]:
    return tuple(each for each in server.intervals if each.is_open and not server.is_replica)


def _names(server: Server) -> tuple[str, ...]:
    return named_standbys(server.settings["synchronous_standby_names"])[1]


CHECKS = (
    sync_wildcard, sync_missing, sync_blocked, sync_relaxed, sync_lost, sync_unknown,
    sync_undeclared, hot_standby, not_streaming, other_lineage, replica_room, wal_senders,
    slots_room, slot_inactive, slot_lost,
    slot_unbounded,
)  # fmt: skip
