"""Engines: one for each endpoint and purpose, and what is done to the connections they open.

A connection is checked when it is opened (the right cluster, the right role), looked at when it
leaves the pool (a dead socket is replaced unseen), and told what its transactions begin with. All
logical shards of a server share its pools: each is a view of the engine, with its own schema.
The base of `shardkit.connections`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import URL, Engine, event

from shardkit import deadlines, disks, fences, gates, scatter
from shardkit.checks import checks_server, end_transaction, replace_if_dead
from shardkit.config import PoolConfig
from shardkit.fingerprints import Fingerprints
from shardkit.guards import EndpointGuard
from shardkit.heldmap import HeldMap
from shardkit.mapwatch import PATIENCE
from shardkit.owners import Owners
from shardkit.replicas import Member, ReplicaSet
from shardkit.schemas import SchemaPreparer
from shardkit.topology import Endpoint, Role, Topology, schema_name
from shardkit.warming import PoolState, n_missing

__all__ = ["ADMITTED", "Engines", "Purpose", "connects"]

# A reader has no transaction to keep a timeout in: the server looks itself whether it is still
# waited for, so that a query given up by cutting the connection ends within a second.
_READ_OPTIONS = "-c default_transaction_read_only=on -c client_connection_check_interval=1s"

ADMITTED = "shardkit_guard"
"""What a connection is marked with that counts for the limit of its server."""

# A role, a database or somebody before us on the connection may have said otherwise.
_CONFIRMED = (
    b"pg_catalog.set_config('synchronous_commit', "
    b"CASE pg_catalog.current_setting('synchronous_commit') WHEN 'remote_apply' "
    b"THEN 'remote_apply' ELSE 'on' END, true)"
)


class Purpose(Enum):
    """What a connection is for.

    `WRITE`: transactions of writers. `READ`: single statements outside transactions, which is
    what READ COMMITTED promises a reader anyway and spares it BEGIN and ROLLBACK. `LEASE`: the
    one connection for what shardkit needs to know while a session holds its own: blocks of ids,
    entries of directories, loads. `LOOKUP`: rows of unique values, one statement at a time, so
    that nobody who holds one waits for anybody. `WAIT`: waits for transactions of others to end;
    apart from `LOOKUP`, which those need to end.
    """

    WRITE = "write"
    READ = "read"
    LEASE = "lease"
    LOOKUP = "lookup"
    WAIT = "wait"


class Engines:
    """The engines of one cluster; what they need to know is told by who inherits from this."""

    topology: Topology
    guards: dict[Endpoint, EndpointGuard]
    replica_sets: dict[str, ReplicaSet]
    held: HeldMap
    owners: Owners
    fingerprints: Fingerprints
    _cursor_class: type[gates.Cursor | gates.AsyncCursor]
    _writing: ClassVar[Mapping[str, Any]]
    """How connections that write are made, for the driver."""

    def __init__(self, pool: PoolConfig, *, patience: float, is_sync: bool) -> None:
        self._pool = pool
        self._patience = patience
        self._is_sync = is_sync
        self._engines: dict[tuple[Endpoint, Purpose], Engine] = {}
        self._opened: dict[Endpoint, weakref.WeakSet[Any]] = {}
        self._views: dict[tuple[Endpoint, Purpose, int | None], Engine] = {}

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        """Run one statement by itself; see `shardkit.connections`."""
        raise NotImplementedError

    def primary_of(self, physical: str) -> Endpoint:
        """Return the primary of a physical shard."""
        return self.topology.physical[physical].primary

    def engine(self, endpoint: Endpoint, purpose: Purpose) -> Engine:
        """Return the engine of an endpoint for a purpose, the same one each time."""
        key = (endpoint, purpose)
        if key not in self._engines:
            options: dict[str, Any] = {
                "pool_size": 1 if purpose is Purpose.LEASE else self._pool.size,
                "max_overflow": 0 if purpose is Purpose.LEASE else self._pool.overflow,
                "pool_timeout": self._pool.timeout,
                "pool_use_lifo": True,
                "hide_parameters": True,  # rows of users stay out of logs and errors
                "connect_args": self._connect_args(endpoint, purpose),
            }
            if purpose is not Purpose.WRITE:
                # Nothing is ever open on these connections, so nothing needs rolling back.
                options |= {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
            is_reader = purpose is Purpose.READ
            url = endpoint.read_url if is_reader and endpoint.read_url else endpoint.url
            engine = self._create_engine(url, options)
            engine.dialect.identifier_preparer = SchemaPreparer(engine.dialect)
            replicas = self.replica_sets[endpoint.physical]
            check = checks_server(
                self.topology,
                endpoint,
                self.fingerprints,
                replicas.meets,
                partial(self.held.believed, endpoint.physical),
                is_reader=is_reader,
            )
            event.listen(engine, "connect", check)
            if purpose is Purpose.WRITE and (self._is_sync or self._is_pooled(endpoint)):
                event.listen(engine, "connect", _begins(partial(self._first_words, endpoint)))
            if endpoint.role is Role.PRIMARY:
                event.listen(engine, "connect", _noted(self._opened, endpoint))
            if purpose is Purpose.READ and endpoint.role is Role.REPLICA:
                event.listen(engine, "connect", _meters(replicas.members[endpoint]))
            event.listen(engine, "checkout", replace_if_dead)
            if self.guards[endpoint].limit is not None:
                event.listen(engine, "checkin", _released)
            event.listen(engine, "handle_error", fences.refuses(self.owners, endpoint))
            event.listen(engine, "handle_error", disks.tells(self._catalog_of(endpoint), endpoint))
            if purpose is not Purpose.WRITE:  # cursors of the server live in transactions
                engine.dialect.supports_server_side_cursors = False
            if purpose is Purpose.READ:
                event.listen(engine, "reset", end_transaction)
            self._engines.setdefault(key, engine)
        return self._engines[key]

    def view(self, endpoint: Endpoint, purpose: Purpose, logical_shard: int | None) -> Engine:
        """Return a view of an endpoint's engine in which tables are those of a logical shard.

        Args:
            endpoint: the server.
            purpose: what its connections are for.
            logical_shard: whose schema it shows; None for statements over many schemas.
        """
        key = (endpoint, purpose, logical_shard)
        view = self._views.get(key)
        if view is None:
            engine = self.engine(endpoint, purpose)
            view = self._views[key] = (
                scatter.view(engine)
                if logical_shard is None
                else engine.execution_options(
                    schema_translate_map={None: schema_name(logical_shard)}
                )
            )
        return view

    def make_ready(self, source: str, target: str, n_moving: int) -> None:
        """Open connections to where logical shards are on their way; see `shardkit.warming`.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the server does not answer, or all are in use.
        """
        n_owned = len(self.topology.shard_map.owned_by(source))
        for purpose in Purpose:
            here = self._engines.get((self.primary_of(source), purpose))
            if here is None:
                continue
            pool: Any = self.engine(self.primary_of(target), purpose).pool
            state = _state_of(pool)
            missing = n_missing(_state_of(here.pool), state, n_moving=n_moving, n_owned=n_owned)
            with deadlines.deadline(PATIENCE), ExitStack() as stack:
                for _ in range(state.idle + missing if missing else 0):
                    if pool.checkedout() >= pool.size():
                        break  # sessions need them now, and wait for nobody
                    stack.callback(pool.connect().close)

    def _is_pooled(self, endpoint: Endpoint) -> bool:
        return self.topology.physical[endpoint.physical].pooler is not None

    def _first_words(self, endpoint: Endpoint) -> bytes | None:
        """Return what a transaction that writes begins with; see `waits.Connection.preamble`."""
        words = [_CONFIRMED] if self._is_sync else []
        believed = self.held.believed(endpoint.physical)
        if self._is_pooled(endpoint) and believed is not None and believed.tells:
            words.append(b"shardkit.on_timeline(%d)" % believed.timeline)
        return b", ".join(words) or None

    def _catalog_of(self, endpoint: Endpoint) -> disks.Ask:
        """Return what asks the catalogue of an endpoint's primary."""
        return lambda query, given: self.ask(endpoint.physical, query, given, primary=True)

    def _create_engine(self, url: URL, options: dict[str, Any]) -> Engine:
        raise NotImplementedError

    def _connect_args(self, endpoint: Endpoint, purpose: Purpose) -> dict[str, Any]:
        pooler = self.topology.physical[endpoint.physical].pooler
        arguments: dict[str, Any] = {
            "connect_timeout": self._pool.connect_timeout,
            "application_name": f"shardkit {purpose.value}",
            "patience": self._patience,
            "guard": self.guards[endpoint],
        }
        if purpose is Purpose.WRITE:
            arguments |= self._writing
        # The primary, too, refuses what slips past the session. PgBouncer refuses the option
        # instead; its connections for readers are read-only by its own configuration.
        if purpose is Purpose.READ and pooler is None:
            arguments["options"] = _READ_OPTIONS
        if purpose is Purpose.READ:
            arguments["cursor_factory"] = self._cursor_class
        prepares = self._pool.prepare_statements
        if prepares is None:
            prepares = pooler is None or pooler.carries_prepared_statements
        if not prepares:
            arguments["prepare_threshold"] = None
        return arguments


def _state_of(pool: Any) -> PoolState:
    return PoolState(pool.checkedin(), pool.checkedout(), pool.size())


def _released(connection: Any, record: Any) -> None:
    """Tell the guard that a session gave its connection back."""
    guard = record.info.pop(ADMITTED, None)
    if guard is not None:
        driver_connection = getattr(connection, "driver_connection", connection)
        guard.released(None if connection is None else driver_connection.first_answer())


def connects(_dialect: Any, _record: Any, arguments: Any, options: Any) -> gates.Connection:
    """Open a connection for an engine of threads."""
    writes = options.get("cursor_factory") is gates.WriteCursor
    made: Any = gates.Writer if writes else gates.Connection
    return made.open(*arguments, **options)  # type: ignore[no-any-return]  # one of the two


def _meters(member: Member) -> Callable[[Any, Any], None]:
    """Return what has a new connection tell a replica's member how long statements take."""

    def meter(connection: Any, _record: Any) -> None:
        driver: gates.Gated = getattr(connection, "driver_connection", connection)
        driver.meter = member

    return meter


def _begins(words: Callable[[], bytes | None]) -> Callable[[Any, Any], None]:
    """Return what has transactions of a new connection begin with some words."""

    def begin(connection: Any, _record: Any) -> None:
        getattr(connection, "driver_connection", connection).preamble = words

    return begin


def _noted(
    opened: dict[Endpoint, weakref.WeakSet[Any]], endpoint: Endpoint
) -> Callable[[Any, Any], None]:
    """Return what remembers the connections that are open to a primary."""
    held = opened.setdefault(endpoint, weakref.WeakSet())

    def note(connection: Any, _record: Any) -> None:
        held.add(getattr(connection, "driver_connection", connection))

    return note
