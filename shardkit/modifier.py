"""The part of a writer that runs the INSERT, UPDATE and DELETE statements that programs give it.

`shardkit.writer` builds on it. What each logical shard runs is `shardkit.parts`; how the parts are
run and become one result is `shardkit.writes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Insert, insert, update
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.orm.attributes import instance_state

from shardkit import parts, writes
from shardkit.claims import Claims
from shardkit.emitter import EmittingSession
from shardkit.errors import StatementTimeoutError, UnsupportedStatementError
from shardkit.participants import Participants
from shardkit.placing import sharding_of_mapper
from shardkit.statements import Limits, limits_of
from shardkit.timeouts import limited

__all__ = ["ModifyingSession"]


class ModifyingSession(EmittingSession):
    """What `WriteSession` is, as far as statements that write are concerned."""

    _participants: Participants
    _is_last_flush = False  # COMMIT comes next

    def _run(self, state: ORMExecuteState) -> Any:
        self._flush_deferred()
        is_write = state.is_insert or state.is_update or state.is_delete
        if is_write and "logical_shard" not in state.bind_arguments:
            return self._write(state)
        result = super()._run(state)
        if is_write and writes.is_bulk(state):
            raise UnsupportedStatementError(
                "rows of a class for a logical shard given by number",
                hint="leave bind_arguments out: each row names its shard",
            )
        if result is not None or state.is_select:
            return result
        shard = state.bind_arguments["logical_shard"]
        self._cluster.physical_of(shard)  # refuses what is no logical shard
        if is_write:
            Claims.refuse(state.statement, state.parameters, numbered=True)
        self._note_written((shard,))
        self._participants.said(state.statement, shard)
        if (state.is_update or state.is_delete) and self._is_about_objects(state):
            # Its condition need not name the shard: objects of other shards may meet it.
            part = parts.Part(shard, state.statement, state.parameters)
            return writes.run(state, [part], self._connection_to, self._shard_of_identity)
        return None

    def _is_about_objects(self, state: ORMExecuteState) -> bool:
        mapper = state.bind_mapper
        return state.is_orm_statement and mapper is not None and bool(sharding_of_mapper(mapper))

    def _write(self, state: ORMExecuteState) -> Any:
        """Run an INSERT, UPDATE or DELETE on the logical shards of its rows."""
        found = self._parts(state)
        self._note_written(part.shard for part in found)
        if self._cluster.listeners:
            self._tell_routed(state, tuple(sorted(part.shard for part in found)))
        self._participants.writing(state.statement, found)
        limits = limits_of(state.statement) or Limits()
        if limits.partial or limits.max_rows is not None:
            raise UnsupportedStatementError(
                "all_shards(partial=…) and all_shards(max_rows=…) in a write",
                hint="a write is done whole or not at all; they limit what is read",
            )
        if len(found) == 1 and not writes.is_bulk(state) and limits.timeout is None:
            state.statement = found[0].statement
            state.parameters = found[0].params
            state.bind_arguments["logical_shard"] = found[0].shard
            return None
        if state.bind_mapper is not None:
            self._cluster.fingerprints.check(state.bind_mapper)
        if limits.timeout is None:
            return writes.run(state, found, self._connection_to, self._shard_of_identity)
        self._autoflush()  # what it writes must not be undone with the statement
        try:
            with limited(self._connection_to(found[0].shard), limits.timeout):
                return writes.run(state, found, self._connection_to, self._shard_of_identity)
        except StatementTimeoutError:
            self._note_lost()
            raise

    def _parts(self, state: ORMExecuteState) -> list[parts.Part]:
        statement: Any = state.statement
        params: Any = state.parameters
        parts.refuse_unwritable(statement, params)
        Claims.refuse(statement, params)
        cluster = self._cluster
        if isinstance(statement, Insert):
            shards = self._decided(
                lambda router: parts.placed_rows(statement, params, router, cluster.placement),
                assign=True,
            )
            # Before ids are minted and anything is written.
            self._allowed(shards)
            return parts.inserts(statement, params, shards, cluster.ids.mint)
        if isinstance(params, list | tuple):
            mapper = state.bind_mapper if writes.is_bulk(state) else None
            return self._decided(
                lambda router: parts.changes_of_rows(statement, params, router, mapper)
            )
        route = self._route(statement, params)
        if len(route) == 1:
            return [parts.Part(route[0], statement, params)]
        return self._decided(lambda router: parts.changes(statement, params, router, route))

    def _shard_of_identity(self, obj: Any) -> int | None:
        state = instance_state(obj)
        sharding = sharding_of_mapper(state.mapper)
        identity = state.identity
        if sharding is None or identity is None:
            return None
        return self._decided(lambda router: sharding.shard_of_identity(router, identity))

    def _bulk_save_mappings(
        self,
        mapper: Any,
        mappings: Iterable[Any],
        *,
        isupdate: bool,
        isstates: bool,
        return_defaults: bool,
        update_changed_only: bool,
        render_nulls: bool,
    ) -> None:
        """Run what SQLAlchemy's `bulk_insert_mappings` and `bulk_update_mappings` ask for."""
        if isstates:
            raise UnsupportedStatementError(
                "bulk_save_objects()", hint="use session.add_all(), which mints ids"
            )
        if return_defaults:
            raise UnsupportedStatementError(
                "bulk_insert_mappings() with return_defaults",
                hint="use session.scalars(insert(…).returning(…), rows)",
            )
        rows = list(mappings)
        if not rows:
            return
        if isupdate:
            options = {"synchronize_session": False, "autoflush": False}
            self.execute(update(mapper), rows, execution_options=options)
        else:
            options = {"render_nulls": render_nulls, "autoflush": False}
            self.execute(insert(mapper), rows, execution_options=options)
