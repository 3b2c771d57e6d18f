"""Checks of PostgreSQL servers by themselves: versions, settings, clocks, room.

Source: PostgreSQL manual, chapters 19 and 28; docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from shardkit.ops.health.facts import Facts
from shardkit.ops.health.findings import Problem, Severity, check

__all__ = ["CHECKS"]

OLDEST = 14
"""Major version below which shardkit is not tried. Source: PostgreSQL's end-of-life dates."""

CLOCK_OFFSET = 0.5
"""Seconds that clocks may differ. Ids of two servers sort by their clocks, so readers see a
newest-first list out of order by as much; nothing becomes wrong. A choice."""

_NEEDS_SLOTS = 4
_LOOPBACK = ("127.", "::1", "localhost", "/")


@check(Severity.ERROR, "start the server, or correct its address and login in shardkit.toml")
def unreachable(facts: Facts) -> Iterator[Problem]:
    """A server that does not answer in time, or refuses the login."""
    for silent in facts.silent:
        yield Problem(silent.where, f"does not answer {silent.what}: {silent.reason}")


@check(Severity.ERROR, "correct `primary` and `replicas` in shardkit.toml, or finish the failover")
def role(facts: Facts) -> Iterator[Problem]:
    """A primary that is a replica, or the reverse."""
    for server in facts.servers:
        found = "replica" if server.is_replica else "primary"
        if found != server.role:
            yield Problem(server.where, f"is a {found}, configured as {server.role}")


@check(Severity.ERROR, "upgrade with pg_upgrade, or a move to newer servers")
def version(facts: Facts) -> Iterator[Problem]:
    """A PostgreSQL that is too old."""
    for server in facts.servers:
        if server.version // 10_000 < OLDEST:
            yield Problem(server.where, f"is PostgreSQL {server.version // 10_000}, below {OLDEST}")


@check(Severity.ERROR, "upgrade the servers of a physical shard together")
def version_differs(facts: Facts) -> Iterator[Problem]:
    """Servers of one physical shard that differ in their major version."""
    for physical, group in groupby(facts.servers, key=lambda server: server.physical):
        majors = sorted({server.version // 10_000 for server in group})
        if len(majors) > 1:
            yield Problem(physical, f"has PostgreSQL {' and '.join(map(str, majors))}")


@check(Severity.WARNING, "stop the server and run `pg_checksums --enable` on its data folder")
def data_checksums(facts: Facts) -> Iterator[Problem]:
    """Data checksums are off: damage by a disk is not noticed."""
    yield from _is(facts, "data_checksums", "off", "does not notice pages that a disk has damaged")


@check(Severity.ERROR, "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()")
def fsync(facts: Facts) -> Iterator[Problem]:
    """The setting fsync is off: a crash of the machine loses commits or the whole database."""
    yield from _is(facts, "fsync", "off", "a crash of the machine can destroy the database")


@check(Severity.ERROR, "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()")
def full_page_writes(facts: Facts) -> Iterator[Problem]:
    """full_page_writes is off: a crash during a write leaves half a page."""
    yield from _is(facts, "full_page_writes", "off", "a crash can leave pages half written")


@check(Severity.ERROR, "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()")
def autovacuum(facts: Facts) -> Iterator[Problem]:
    """Autovacuum is off: outboxes bloat, and transaction numbers run out."""
    yield from _is(facts, "autovacuum", "off", "outboxes bloat and transaction numbers run out")


@check(Severity.ERROR, "ALTER SYSTEM SET wal_level = logical, and restart")
def wal_level(facts: Facts) -> Iterator[Problem]:
    """wal_level is minimal: no replica can follow."""
    yield from _is(facts, "wal_level", "minimal", "no replica can follow")


@check(Severity.WARNING, "ALTER SYSTEM SET wal_level = logical, and restart")
def wal_level_moves(facts: Facts) -> Iterator[Problem]:
    """wal_level is not logical: logical shards cannot move from or to here."""
    yield from _is(facts, "wal_level", "replica", "logical shards cannot be moved online")


@check(Severity.WARNING, "restart the server at a quiet time")
def pending_restart(facts: Facts) -> Iterator[Problem]:
    """Settings that were changed and wait for a restart."""
    for server in facts.servers:
        if server.pending:
            yield Problem(server.where, f"waits for a restart: {', '.join(sorted(server.pending))}")


@check(Severity.WARNING, "keep time with NTP on all machines")
def clock(facts: Facts) -> Iterator[Problem]:
    """A server whose clock differs from this machine's."""
    for server in facts.servers:
        if abs(server.clock_offset) - server.clock_error > CLOCK_OFFSET:
            way = "ahead" if server.clock_offset > 0 else "behind"
            yield Problem(
                server.where, f"its clock is {abs(server.clock_offset):.1f} s {way} of ours"
            )


@check(Severity.ERROR, "make the database anew with --encoding=UTF8")
def encoding(facts: Facts) -> Iterator[Problem]:
    """A database that is not in UTF-8."""
    for server in facts.servers:
        if server.encoding != "UTF8":
            yield Problem(server.where, f"its database is in {server.encoding}")


@check(Severity.WARNING, "make new physical shards with the locale of the others")
def collation(facts: Facts) -> Iterator[Problem]:
    """Databases that sort text differently."""
    found = {server.collation for server in facts.primaries}
    if len(found) > 1:
        for server in facts.primaries:
            yield Problem(server.where, f"sorts text as {server.collation}; others do not")


@check(
    Severity.ERROR,
    "ALTER SYSTEM SET max_prepared_transactions = 64 or more, on replicas first, and restart",
)
def prepared_disabled(facts: Facts) -> Iterator[Problem]:
    """max_prepared_transactions is 0: atomic writers and reference tables cannot commit."""
    if len(facts.expected.topology.physical) < 2:
        return
    for server in facts.servers:
        if server.number("max_prepared_transactions") == 0:
            yield Problem(server.where, "atomic writers and reference tables cannot commit")


@check(
    Severity.WARNING,
    "ALTER SYSTEM SET max_prepared_transactions = max_connections, on replicas first, and restart",
)
def prepared_room(facts: Facts) -> Iterator[Problem]:
    """max_prepared_transactions is below the writers there may be at once.

    Each prepares one transaction at most, so it need be no more than the connections of writers,
    which max_connections bounds.
    """
    if len(facts.expected.topology.physical) < 2:
        return
    for server in facts.servers:
        found = server.number("max_prepared_transactions")
        writers = min(
            facts.expected.pool * facts.expected.processes, server.number("max_connections")
        )
        if 0 < found < writers:
            yield Problem(server.where, f"max_prepared_transactions {found}, writers {writers}")


@check(Severity.ERROR, "shardkit twophase resolve; by another program: COMMIT or ROLLBACK PREPARED")
def prepared_left(facts: Facts) -> Iterator[Problem]:
    """Prepared transactions that nobody ends: they hold locks and keep vacuum from working."""
    for server in facts.primaries:
        for each in server.prepared:
            if each.seconds >= LEFT_AFTER:
                yield Problem(
                    server.where,
                    f"transaction {each.gid!r} has been prepared for {each.seconds:.0f} s",
                    None if each.gid.startswith("shardkit:") else _FOREIGN,
                )


LEFT_AFTER = 10.0
"""Seconds after which a prepared transaction has been left: the resolver begins after three."""

_FOREIGN = "it is not shardkit's: COMMIT PREPARED or ROLLBACK PREPARED it by its name"


@check(
    Severity.ERROR,
    "ALTER SYSTEM SET max_locks_per_transaction higher, on replicas first, and restart",
)
def locks(facts: Facts) -> Iterator[Problem]:
    """The lock table does not hold one statement over all logical shards of a server."""
    for server, room, widest, _ in _locks(facts):
        if room < widest:
            yield Problem(server, f"room for {room:,} locks; one wide statement takes {widest:,}")


@check(
    Severity.WARNING,
    "ALTER SYSTEM SET max_locks_per_transaction higher, on replicas first, and restart",
)
def locks_room(facts: Facts) -> Iterator[Problem]:
    """The lock table does not hold a few wide statements, or pg_dump, at once."""
    for server, room, widest, total in _locks(facts):
        wanted = max(total, widest * min(facts.expected.pool, 4))
        if widest <= room < wanted:
            yield Problem(server, f"room for {room:,} locks; a dump, or four scatters: {wanted:,}")


def _locks(facts: Facts) -> Iterator[tuple[str, int, int, int]]:
    """Yield each server with the room in its lock table, and what fills it.

    Source: PostgreSQL manual, `max_locks_per_transaction`.
    """
    for state in facts.states:
        for server in facts.of(state.physical):
            holders = server.number("max_connections") + server.number("max_prepared_transactions")
            room = server.number("max_locks_per_transaction") * holders
            yield server.where, room, state.widest, state.n_relations


@check(
    Severity.ERROR,
    "lower pool.size and pool.overflow, put PgBouncer in front, or raise max_connections",
)
def connections(facts: Facts) -> Iterator[Problem]:
    """max_connections is below what the pools of the processes may open."""
    for server in facts.servers:
        shard = facts.expected.topology.physical.get(server.physical)
        if shard is None or shard.pooler is not None:
            continue
        expected = facts.expected
        one = expected.readers_pools if server.is_replica else expected.writers_pools
        room = server.number("max_connections") - server.number("superuser_reserved_connections")
        if one * expected.processes > room:
            yield Problem(
                server.where,
                f"room for {room} connections; {expected.processes} processes may open "
                f"{one * expected.processes}",
            )


@check(Severity.NOTE, "ALTER ROLE of the application SET idle_in_transaction_session_timeout")
def idle_in_transaction(facts: Facts) -> Iterator[Problem]:
    """Transactions of clients that went away without a word hold their locks for ever."""
    for login in facts.logins:
        found = login.settings.get("idle_in_transaction_session_timeout")
        if not login.is_for_readers and found == "0":
            yield Problem(login.where, "idle_in_transaction_session_timeout is 0")


@check(Severity.WARNING, "ALTER ROLE of the application RESET synchronous_commit")
def synchronous_commit(facts: Facts) -> Iterator[Problem]:
    """Commits of the application are acknowledged before they are durable."""
    for login in facts.logins:
        if not login.is_for_readers and login.settings.get("synchronous_commit") == "off":
            yield Problem(login.where, "synchronous_commit is off for the application")


@check(Severity.WARNING, "RESET default_transaction_isolation of the role and the database")
def isolation(facts: Facts) -> Iterator[Problem]:
    """Another isolation than READ COMMITTED, in which replicas cannot prove what they show."""
    for login in facts.logins:
        found = login.settings.get("default_transaction_isolation", "read committed")
        if found != "read committed":
            yield Problem(login.where, f"the application's transactions are {found}")


@check(Severity.WARNING, "set ssl = on with a certificate, and sslmode=verify-full in the URLs")
def plain_text(facts: Facts) -> Iterator[Problem]:
    """A server beyond this machine without TLS."""
    for server in facts.servers:
        if server.settings["ssl"] == "off" and not server.host.startswith(_LOOPBACK):
            yield Problem(server.where, "passwords and rows travel unencrypted")


@check(Severity.WARNING, "SET password_encryption = 'scram-sha-256' and set the passwords anew")
def md5_passwords(facts: Facts) -> Iterator[Problem]:
    """New passwords are stored as MD5."""
    yield from _is(facts, "password_encryption", "md5", "new passwords are stored as MD5")


@check(Severity.ERROR, "install the extension's package on the replica")
def extension_missing(facts: Facts) -> Iterator[Problem]:
    """An extension whose files a replica lacks: after a failover its functions fail."""
    for server in facts.servers:
        primary = facts.primary(server.physical)
        if server.is_replica and primary is not None:
            for name in sorted(primary.extensions.keys() - server.available):
                yield Problem(server.where, f"has no files of the extension {name}")


@check(Severity.WARNING, "CREATE EXTENSION or ALTER EXTENSION … UPDATE where it differs")
def extension_differs(facts: Facts) -> Iterator[Problem]:
    """An extension that not every physical shard has in one version: moves would fail."""
    primaries = facts.primaries
    for name in sorted({name for server in primaries for name in server.extensions}):
        found = {server.physical: server.extensions.get(name, "none") for server in primaries}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{physical} {v}" for physical, v in found.items())
            yield Problem("cluster", f"extension {name}: {told}")


def _is(facts: Facts, setting: str, bad: str, why: str) -> Iterator[Problem]:
    for server in facts.servers:
        if server.settings[setting] == bad:
            yield Problem(server.where, f"{setting} is {bad}: {why}")


CHECKS = (
    unreachable, role, version, version_differs, data_checksums, fsync, full_page_writes,
    autovacuum, wal_level, wal_level_moves, pending_restart, clock, encoding, collation,
    prepared_disabled, prepared_room, prepared_left, locks, locks_room, connections,
    idle_in_transaction, synchronous_commit, isolation, plain_text, md5_passwords,
    extension_missing, extension_differs,
)  # fmt: skip
"""In the order in which they are reported."""
