"""One server of a physical shard, as a failover talks to it: looks, and changes one thing.

Every wait has a deadline. What changes a server goes over the session that holds its claim, a lock
that ends with the session: a driver that was frozen, and then replaced, finds its sessions gone
(`idle_session_timeout`) and changes nothing any more. Called by `shardkit.ops.failover.driver`;
decides nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import URL

from shardkit import deadlines
from shardkit.clock import SYSTEM, Clock
from shardkit.gates import lsn_of
from shardkit.ops.direct import Unguarded, parameters
from shardkit.ops.failover.machine import CUT, Node
from shardkit.ops.moves.replication import NAMES
from shardkit.ops.moves.transactions import promote
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.waits import Connection

__all__ = ["Heard", "Server"]

_LOG: Final = logging.getLogger(__name__)

KEY: Final = 0x5348_4B46_4F56
"""Of the advisory lock that claims a server for one driver."""

_REJOINS: Final = 0x5348_524A
"""First half of the advisory lock, on a primary, of who makes a standby of another server."""

_IDLE: Final = 10
"""Seconds after which a server ends the session of a driver that is still, and so its claim."""

_NOWHERE: Final = "/shardkit-cut"
"""What a standby is told to follow that is to follow nobody: the rest of its address is kept."""

_RENEWED: Final = 2.0
"""Seconds that a standby has for a new connection to its primary."""

_RENEWALS: Final = 30.0
"""Seconds after which a standby that still reached its primary is asked again."""

_PROMOTION: Final = 20
"""Seconds that a standby has to become a primary: it replays what it has received."""

_INTENT: Final = 60.0
"""Seconds for which a switchover that has begun is gone on with."""

# A moment more than the settings' own time: server processes read them one after the other.
_BUSY: Final = """
SELECT count(*) FROM pg_catalog.pg_stat_activity AS a WHERE a.backend_type = 'client backend'
    AND a.pid <> pg_catalog.pg_backend_pid() AND a.application_name <> 'shardkit failover'
    AND a.xact_start < pg_catalog.pg_conf_load_time() + interval '0.1 s'
"""

# No lock. Columns that an older version lacks are read as JSON. What a standby has received may be
# more than it has replayed, or less when it has just started. `written_lsn` is null until a
# receiver has written something; what it says beside may be where it was told to begin, which it
# has not got. A promoted server remembers, until it is restarted, what it had as a standby.
_LOOK: Final = f"""
SELECT r.r, CASE WHEN r.r THEN greatest(coalesce(w.received_tli, 0), c.timeline_id,
        m.min_recovery_end_timeline, (to_jsonb(i) ->> 'timeline')::bigint) ELSE {TIMELINE} END,
    CASE WHEN r.r THEN greatest(pg_catalog.pg_last_wal_receive_lsn(),
        pg_catalog.pg_last_wal_replay_lsn())
        ELSE pg_catalog.pg_current_wal_insert_lsn() END::text,
    (to_jsonb(i) ->> 'timeline')::bigint, coalesce(w.status, ''),
    pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - w.last_msg_receipt_time),
    pg_catalog.current_setting('primary_conninfo'),
    (SELECT s.setting = 'on' FROM pg_catalog.pg_settings AS s
        WHERE s.name = 'default_transaction_read_only'),
    (SELECT s.setting::float8 / 1000 FROM pg_catalog.pg_settings AS s
        WHERE s.name = 'wal_receiver_timeout'),
    ({_BUSY}), CASE WHEN r.r THEN pg_catalog.pg_last_wal_replay_lsn()
        ELSE greatest(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())
        END::text, w.received_tli, to_jsonb(w) ->> 'written_lsn',
    i.cluster, i.physical
FROM (SELECT pg_catalog.pg_is_in_recovery()) AS r (r)
    CROSS JOIN pg_catalog.pg_control_checkpoint() AS c
    CROSS JOIN pg_catalog.pg_control_recovery() AS m
    CROSS JOIN shardkit.identity AS i
    LEFT JOIN pg_catalog.pg_stat_get_wal_receiver() AS w ON true
"""  # noqa: S608  a constant

# AccessShareLock on a small table.
_LAST: Final = """
SELECT (SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - max(noted))
        FROM shardkit.failovers WHERE kind = 'promoted'),
    l.kind, l.server, pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - l.noted)
FROM (SELECT) AS one LEFT JOIN
    (SELECT * FROM shardkit.failovers WHERE kind NOT IN ('relaxed', 'restored')
        ORDER BY entry DESC LIMIT 1) AS l ON true
"""

# Writes a few bytes of log and waits for the disk, and for no standby.
_WRITE: Final = (
    "BEGIN READ WRITE; SET LOCAL synchronous_commit = local; "
    "SELECT pg_catalog.pg_logical_emit_message(true, 'shardkit', 'alive'); COMMIT"
)

# One that has not said yet who it is may be ended by superusers only.
_TERMINATE: Final = """
SELECT count(pg_catalog.pg_terminate_backend(a.pid)) FROM pg_catalog.pg_stat_activity AS a
WHERE a.backend_type = 'client backend' AND a.pid <> pg_catalog.pg_backend_pid()
    AND a.application_name <> 'shardkit failover'
    AND NOT coalesce((SELECT r.rolsuper FROM pg_catalog.pg_roles AS r
        WHERE r.oid = a.usesysid), true)
"""

# Slots are of one server: on a standby they are of moves that it knew as a primary. They would hold
# back the log, and be taken for those of the next move.
_STALE: Final = f"""
SELECT count(pg_catalog.pg_drop_replication_slot(s.slot_name))
FROM pg_catalog.pg_replication_slots AS s
WHERE s.slot_name ~ '^{NAMES}[0-9]+$' AND s.active_pid IS NULL AND pg_catalog.pg_is_in_recovery()
    AND coalesce(s.database = pg_catalog.current_database(), true)
"""  # noqa: S608  a constant

_BLOCKED: Final = "1s"
"""That a registration waits for who holds a lock: until it is done, nobody has to write there."""

_CLEARINGS: Final = 5
"""Times that such sessions are ended; others may come."""

_FULL: Final = re.compile(r"too many clients|connection slots are reserved|too many connections")
"""A server that says so is alive."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a server said, or did not.

    Attributes:
        node: for the machine.
        intent: the server that a switchover, which has begun, leads to; None for none.
        is_full: it lives, and lets nobody in.
        error: why it is not known; None when it is.
    """

    node: Node
    intent: str | None = None
    is_full: bool = False
    error: str | None = None


class Server:
    """One server.

    Args:
        name: `host:port`.
        expected: name of the cluster, and of the physical shard.
        control: its own address, with the login that may promote it and change its settings.
        owner: the same with the login that owns shardkit's tables.
        timeout: seconds it has for an answer.
        clock: source of monotonic time.
    """

    def __init__(
        self,
        name: str,
        expected: tuple[str, str],
        control: URL,
        owner: URL,
        *,
        timeout: float,
        clock: Clock = SYSTEM,
    ) -> None:
        self.name = name
        self._expected = expected
        self._control = control
        self._owner = owner
        self._timeout = timeout
        self._clock = clock
        self._session: Connection | None = None
        self._is_claimed = False
        self._renewed_at: float | None = None

    # -- looking

    def look(
        self, names: Mapping[tuple[str, str], str], *, fresh: bool, within: float | None = None
    ) -> Heard:
        """Return what the server says of itself.

        Args:
            names: of the servers, by host and port.
            fresh: by a new connection, and with a write where it is a primary.
            within: seconds it has to answer; None for what is usual.
        """
        try:
            with deadlines.deadline(within or self._timeout):
                if fresh and not self._is_claimed:
                    with self._opened(self._control) as connection:
                        return self._look(connection, names, writes=True)
                return self._look(self._connected(), names, writes=fresh)
        except (psycopg.Error, OSError) as error:
            self.forget()
            text = str(error).strip().splitlines() or [type(error).__name__]
            return Heard(Node(self.name), is_full=bool(_FULL.search(str(error))), error=text[-1])

    def _look(
        self, connection: Connection, names: Mapping[tuple[str, str], str], *, writes: bool
    ) -> Heard:
        row = connection.execute(_LOOK.encode()).fetchone()
        if row is None or tuple(row[-2:]) != self._expected:
            return Heard(Node(self.name), error="it belongs to another cluster, or physical shard")
        in_recovery, timeline, lsn, registered, *others = row[:-2]
        status, age, conninfo, closed, limit, busy, had, receives, written = others
        if writes and not in_recovery:
            connection.execute(_WRITE.encode())
        since, kind, to, noted = _last(connection)
        follows = self._followed(conninfo, names)
        streams = status == "streaming" and (age or 0) <= max(1.0, limit / 2 + 1)
        waited = None if self._renewed_at is None else self._clock.monotonic() - self._renewed_at
        # Who has replayed the line that a timeline was registered by, has replayed on that.
        replayed = (registered or timeline, lsn_of(had or "0/0"))
        received = (receives, lsn_of(written)) if receives and written else replayed
        node = Node(
            self.name,
            answers=True,
            in_recovery=in_recovery,
            timeline=timeline,
            position=lsn_of(lsn or "0/0"),
            reached=max(replayed, received) if in_recovery else (0, 0),
            began=None if in_recovery or had is None else lsn_of(had),
            registered=registered,
            follows=follows,
            streams=in_recovery and streams,
            is_lost=in_recovery and not streams and (waited is None or waited > _RENEWED),
            is_renewing=waited is not None and waited <= _RENEWED,
            is_renewed=waited is not None and _RENEWED < waited < _RENEWALS,
            is_closed=closed and not in_recovery,
            is_drained=closed and kind in {"switchover", "fenced"} and not in_recovery,
            is_quiet=not busy,
            is_claimed=self.is_claimed,
            since=since,
        )
        is_begun = kind == "switchover" and noted is not None and noted < _INTENT
        return Heard(node, intent=to if is_begun else None)

    def _followed(self, conninfo: str, names: Mapping[tuple[str, str], str]) -> str | None:
        said = conninfo_to_dict(conninfo or "")
        host = str(said.get("host", ""))
        if host == _NOWHERE:
            return CUT
        return names.get((host, str(said.get("port", 5432))))

    def is_quiet(self) -> bool:
        """Tell whether no transaction is left that began before the primary was closed."""
        return not self.ask(_BUSY)

    # -- claims

    @property
    def is_claimed(self) -> bool:
        """Whether this driver, and no other, changes it."""
        return self._is_claimed and self._session is not None and not self._session.closed

    def claim(self) -> bool:
        """Take the claim; False where another driver has it."""
        with self._patiently():
            found = self._ask(f"SELECT pg_catalog.pg_try_advisory_lock({KEY})")
            self._is_claimed = self._is_claimed or bool(found)
        return self._is_claimed

    def release(self) -> None:
        """Let the claim go, and the session with it."""
        self.forget()

    def forget(self) -> None:
        """Close the session; the claim ends with it."""
        self._is_claimed = False
        if self._session is not None:
            self._session.pgconn.finish()
            self._session = None

    # -- standbys

    def renew(self) -> None:
        """Have a standby connect to its primary anew; it goes on receiving if it can."""
        with self._patiently():
            said = conninfo_to_dict(self._ask("SHOW primary_conninfo"))
            # Any change restarts the receiver. Source: PostgreSQL, primary_conninfo.
            said["connect_timeout"] = 3 if str(said.get("connect_timeout")) == "2" else 2
            self._follow(said)
        self._renewed_at = self._clock.monotonic()

    def cut(self) -> None:
        """Have a standby follow nobody, and wait until it receives no more."""
        self.repoint(_NOWHERE, "1")
        with self._patiently():
            while self._ask("SELECT count(*) FROM pg_catalog.pg_stat_get_wal_receiver() AS w "
                            "WHERE w.status = 'streaming'"):  # fmt: skip
                self._clock.sleep(0.01)

    def repoint(self, host: str, port: str) -> None:
        """Have a standby follow another primary."""
        with self._patiently():
            said = conninfo_to_dict(self._ask("SHOW primary_conninfo"))
            said.pop("hostaddr", None)
            self._drop_stale_slots()
            self._follow({**said, "host": host, "port": port})
        self._renewed_at = None

    def promote(self) -> None:
        """Have a standby become a primary, and wait for that."""
        with self._patiently(_PROMOTION + self._timeout):
            if self._ask("SELECT pg_catalog.pg_is_in_recovery()"):
                self._drop_stale_slots()
                self._ask(f"SELECT pg_catalog.pg_promote(true, {_PROMOTION})")

    # -- primaries

    def register(self, detail: Mapping[str, Any]) -> tuple[int, list[int]]:
        """Register a promotion; see `shardkit.ops.moves.transactions.promote`.

        Whoever has written before waits for standbys, which follow only afterwards, and holds the
        locks of its rows meanwhile: such sessions are ended.
        """
        with self._patiently():
            self._begin_file()
        with self._patiently(_PROMOTION), self._opened(self._owner) as connection:
            connection.execute(f"SET lock_timeout = '{_BLOCKED}'".encode())
            found = self._registered(connection, detail)
        with self._patiently():
            self._set("default_transaction_read_only", None)  # of a switchover that went before
        return found

    def note(
        self, kind: str, *, server: str, detail: str = "{}", is_confirmed: bool = False
    ) -> None:
        """Write a line into `shardkit.failovers`.

        Args:
            kind: of the line.
            server: whose.
            detail: as JSON.
            is_confirmed: whether standbys have to confirm it, as those of every commit.
        """
        with self._patiently(), self._opened(self._owner) as connection, connection.transaction():
            connection.execute("SET LOCAL transaction_read_only = off")
            level = "on" if is_confirmed else "local"
            connection.execute(f"SET LOCAL synchronous_commit = {level}".encode())
            connection.execute(
                sql.SQL(
                    "INSERT INTO shardkit.failovers (kind, server, timeline, detail) "
                    "VALUES (%s, %s, " + TIMELINE + ", %s)"
                ),
                (kind, server, detail),
            )

    def close(self) -> None:
        """Have a primary begin no transaction that writes; those under way go on."""
        with self._patiently(self._timeout):
            self._set("default_transaction_read_only", "on")

    def open(self) -> None:
        """Undo `close`."""
        with self._patiently():
            self._set("default_transaction_read_only", None)

    def end_sessions(self) -> None:
        """End the sessions of everybody but superusers."""
        with self._patiently():
            self._ask(_TERMINATE)

    def written(self) -> int:
        """Return the end of the log, all of it on the disk."""
        with self._patiently():
            self._connected().execute(_WRITE.encode())
            return lsn_of(str(self._ask("SELECT pg_catalog.pg_current_wal_flush_lsn()::text")))

    def set(self, name: str, value: str | None) -> None:
        """Change a setting for good; None for what its file says."""
        with self._patiently():
            self._set(name, value)

    def ask(self, query: str) -> Any:
        """Return the only value of the only row of a query."""
        with self._patiently():
            return self._ask(query)

    @contextmanager
    def rejoining(self, node: str) -> Iterator[bool]:
        """Keep other drivers from making a standby of a server; yields whether this one may.

        The lock is of a session on this server, a primary: the other one does not run meanwhile.
        """
        with self._patiently():
            connection = self._connection(self._control)
        try:
            with self._patiently():
                query = "SELECT pg_catalog.pg_try_advisory_lock(%s, pg_catalog.hashtext(%s))"
                row = connection.execute(query, (_REJOINS, node)).fetchone()
            yield row is not None and bool(row[0])
        finally:
            connection.pgconn.finish()

    # -- parts

    @contextmanager
    def _patiently(self, seconds: float | None = None) -> Iterator[None]:
        """Bound all waits inside, and forget a session that fails."""
        try:
            with deadlines.deadline(seconds or max(self._timeout, 5.0)):
                yield
        except psycopg.OperationalError:
            self.forget()
            raise

    def _follow(self, said: Mapping[str, Any]) -> None:
        self._set("primary_conninfo", make_conninfo(**said))

    def _set(self, name: str, value: str | None) -> None:
        # Not in a transaction; ALTER SYSTEM writes a file, and the servers read it soon after.
        connection, setting = self._connected(), sql.Identifier(name)
        connection.execute(
            sql.SQL("ALTER SYSTEM RESET {}").format(setting)
            if value is None
            else sql.SQL("ALTER SYSTEM SET {} = {}").format(setting, sql.Literal(value))
        )
        before = self._ask("SELECT pg_catalog.pg_conf_load_time()")
        connection.execute("SELECT pg_catalog.pg_reload_conf()")
        while self._ask("SELECT pg_catalog.pg_conf_load_time()") == before:
            self._clock.sleep(0.005)

    def _registered(
        self, connection: Connection, detail: Mapping[str, Any]
    ) -> tuple[int, list[int]]:
        for _ in range(_CLEARINGS):
            with suppress(pg.LockNotAvailable):
                return promote(connection, server=self.name, detail=detail)
            self._ask(_TERMINATE)
        return promote(connection, server=self.name, detail=detail)

    def _begin_file(self) -> None:
        """Have the log go on in a new file.

        A standby that has the beginning of a record up to the end of this one then gets the next,
        finds that the record does not go on there, and receives this one again, if need be after a
        restart; see docs/failover.md.
        """
        try:
            self._ask("SELECT pg_catalog.pg_switch_wal()::text")
        except pg.InsufficientPrivilege as error:
            _LOG.info("%s goes on in the same file of its log: %s", self.name, error)

    def _drop_stale_slots(self) -> None:
        try:
            self._ask(_STALE)
        except (pg.InsufficientPrivilege, pg.ObjectInUse) as error:
            _LOG.warning("slots of old moves stay on %s: %s", self.name, error)

    def _ask(self, query: str) -> Any:
        row = self._connected().execute(query.encode()).fetchone()
        return None if row is None else row[0]

    def _connected(self) -> Connection:
        if self._session is None or self._session.closed:
            self._is_claimed = False
            self._session = self._connection(self._control)
            with suppress(pg.UndefinedObject):  # before PostgreSQL 14
                self._session.execute(f"SET idle_session_timeout = '{_IDLE}s'".encode())
        return self._session

    def _connection(self, url: URL) -> Connection:
        options = {**parameters(url, application="shardkit failover"), "prepare_threshold": None}
        return Connection.open(
            "", patience=_PROMOTION + self._timeout, guard=_GUARD, autocommit=True, **options
        )

    @contextmanager
    def _opened(self, url: URL) -> Iterator[Connection]:
        connection = self._connection(url)
        try:
            yield connection
        finally:
            connection.pgconn.finish()


def _last(connection: Connection) -> tuple[Any, ...]:
    try:
        row = connection.execute(_LAST).fetchone()
    except (pg.UndefinedTable, pg.InsufficientPrivilege):  # of an older version
        row = None
    return (None, None, None, None) if row is None else tuple(row)


_GUARD = Unguarded()
