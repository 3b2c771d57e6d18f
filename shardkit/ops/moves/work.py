"""The steps of a move, each carried out once more where it was done: called by the driver.

What is decided elsewhere is done here, on both servers, with connections that are opened
beforehand: between the fence and the activation there is no time to connect.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import psycopg

from shardkit.clock import SYSTEM
from shardkit.errors import MoveError, RefusedError, TryAgainError
from shardkit.ops import ddllocks
from shardkit.ops.moves import copying, cutover, entries, replication, rows, shapes, transactions
from shardkit.ops.moves.machine import Goal, Step
from shardkit.ops.moves.presence import application, open_connection
from shardkit.ops.moves.sides import Report, Script, Sides
from shardkit.ops.moves.transactions import Changed, Seen, change
from shardkit.ops.moves.transitions import (
    Action,
    Activate,
    Claim,
    Decide,
    Discard,
    Fence,
    Import,
    Lift,
    Move,
    Release,
    Yield,
)
from shardkit.ownership import State

__all__ = ["Report", "Script", "Work"]

Connection = psycopg.Connection[Any]

_REPLICAS: Final = 10.0
"""Seconds to wait for replicas of the source to have the decision; it stands anyhow."""

_NEAR: Final = 0.3
"""Seconds that a change may take to the target for a fence to be worth trying."""

_SLOT_PATIENCE: Final = 60.0
"""Seconds that a new slot waits for transactions that are writing."""


class Work(Sides):
    """The steps, by name."""

    def do(self, step: Step, goal: Goal) -> None:
        """Carry a step out.

        Raises:
            MoveError: it cannot succeed.
            RefusedError: the ownership rows do not allow it.
            TryAgainError: something was in the way (retryable).
            psycopg.Error: a server refused, or went away.
        """
        getattr(self, f"_{step.name.lower()}")(goal)

    def _changed(self, side: str, changed: Changed) -> None:
        self.rows[side] = changed.row

    def _claim(self, _goal: Goal) -> None:
        source = self.on("source")
        row = transactions.row_of(source, self.logical_shard)
        if self.inherits and row is not None and row.move_id == self.inherits:
            old = Move(self.inherits, row.attempt)
            change(source, self.logical_shard, Release(old))
        self._changed("source", change(source, self.logical_shard, Claim(self.move)))

    def _import(self, _goal: Goal) -> None:
        target = self.on("target")
        row = transactions.row_of(target, self.logical_shard)
        if self.inherits and row is not None and row.move_id == self.inherits:
            old = Move(self.inherits, row.attempt)
            change(target, self.logical_shard, Release(old))
        self._changed("target", change(target, self.logical_shard, Import(self.move)))
        needed = [self.move.id, *filter(None, [self.inherits])]
        entries.prune(target, self.logical_shard, needed)

    def _lock(self, _goal: Goal) -> None:
        for side in ("source", "target"):
            ddllocks.take(
                self.on(side),
                self.logical_shard,
                holder=application(self.logical_shard),
                reason="it is being moved; shardkit move clean ends that",
            )

    def _build(self, _goal: Goal) -> None:
        text = self.script(self.target, self.logical_shard, self.on("source"))
        replication.unsubscribe(self.on("target"), self.logical_shard)
        copying.build(self.on("target"), self.logical_shard, text)

    def _copy(self, _goal: Goal) -> None:
        source, target, number = self.on("source"), self.on("target"), self.logical_shard
        replication.unsubscribe(target, number)
        for side in (source, target):  # one of an earlier move may have come back with its server
            replication.drop_slot(side, number)
        replication.publish(source, number)
        slot = open_connection(
            self.source,
            number,
            patience=None,
            replication="database",
            options=f"-c lock_timeout={round(_SLOT_PATIENCE * 1000)} -c statement_timeout=0",
        )
        with slot:
            self.report(Report(number, Step.COPY, "waits for transactions that are writing"))
            try:
                snapshot = replication.exported_slot(slot, number)
            except psycopg.errors.LockNotAvailable as error:
                raise MoveError(
                    f"a transaction has been writing on the source for {_SLOT_PATIENCE:.0f} s",
                    hint="end it, and move again: pg_stat_activity, oldest backend_xid",
                ) from error
            replication.subscribe(target, number, self._url(self.source))
            copying.strip(target, number)
            total, done = copying.size_of(source, number), 0

            def on_bytes(table: str, n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                self.report(Report(number, Step.COPY, table, done, total, "bytes"))

            into = self.on("target", "long")
            copying.copy(self.on("source", "rows"), into, number, snapshot, on_bytes)

    def _index(self, _goal: Goal) -> None:
        def on_part(name: str, done: int, total: int) -> None:
            self.report(Report(self.logical_shard, Step.INDEX, name, done, total, "parts"))

        target = self.on("target", "long")
        copying.complete(self.on("source"), target, self.logical_shard, on_part)

    def _follow(self, _goal: Goal) -> None:
        replication.enable(self.on("target"), self.logical_shard, self._url(self.source))

    def _catch_up(self, _goal: Goal) -> None:
        self._caught_up("source", "target")

    def _verify(self, _goal: Goal) -> None:
        self._same_shape()
        self.diff = self._compared("source", "target", Step.VERIFY)
        if not self.diff.is_clean:
            raise MoveError(
                f"the copy differs from the source: {self.diff.told()}",
                hint="move again; if it happens twice, look for what writes to the copy",
            )
        self.hot = self.diff.hot

    def _prepare_back(self, _goal: Goal) -> None:
        source, target, number = self.on("source"), self.on("target"), self.logical_shard
        replication.publish(target, number)
        replication.make_slot(target, number)
        replication.subscribe(source, number, self._url(self.target))

    def _fence(self, _goal: Goal) -> None:
        """Fence, if nothing that can be known beforehand speaks against it."""
        source, target, number = self.on("source"), self.on("target"), self.logical_shard
        self.blocker = None
        for side in ("source", "target"):  # opened while nobody waits for them
            self._thaw(self.on(side, "rows"))
        self._same_shape()
        self._left_behind, self._snapshots = None, ()
        self._has_standbys = cutover.has_standbys(source)
        replication.advance_slot(target, number)
        transactions.rehearse(source, number, Action.CLOSE_WRITES, Action.CLOSE)
        transactions.rehearse(target, number, Action.OPEN)
        took = cutover.reached(target, number, cutover.touch(source, number), _NEAR)
        if took is None:
            raise TryAgainError(f"a change takes more than {_NEAR:g} s to the target")
        roles = sorted({self.source.roles.app, self.source.roles.relay})
        row = self.rows["source"]
        assert row is not None, "it is claimed"
        changed = change(
            source,
            number,
            lambda at, timeline: Fence(self.move, self.target.name, at, timeline),
            roles=roles,
            lock_timeout=self.lock_timeout,
            seen=Seen(row, *transactions.now(source)),
            then=cutover.leaving(number),
        )
        self.fenced = SYSTEM.monotonic()
        self.is_drained = False
        self._left_behind = cutover.left(changed.found) if changed.found else None
        self._changed("source", changed)

    def _drain(self, _goal: Goal) -> None:
        source, target, number = self.on("source"), self.on("target"), self.logical_shard
        here, there = self.on("source", "rows"), self.on("target", "rows")
        self._thaw(here)
        self._thaw(there)
        # Both beside all that follows: nobody writes there before the activation but the apply.
        frozen = self._pool.submit(cutover.snapshot, here)
        left = self._left_behind
        if left is None:  # fenced by an attempt before this one
            left = cutover.left(source.execute(cutover.leaving(number)).fetchone() or ())
        # Synchronous: replicas that commits wait for have it, and all that came before.
        note = entries.noted(number, self.move, Step.DRAIN)
        if not cutover.land(target, number, left, note, self._seconds_left()):
            raise TryAgainError("the target has not applied everything in time")
        self._snapshots = frozen, self._pool.submit(cutover.snapshot, there)
        if self._has_standbys and not cutover.flushed(source, left.lsn, self._seconds_left()):
            raise TryAgainError("a replica of the source has not received the fence in time")
        if self.hot:
            frozen.result()
            if odd := rows.differing(here, target, number, self.hot):
                raise MoveError(f"rows of {', '.join(odd)} differ in the fence")
        self.is_drained = True

    def _decide(self, _goal: Goal) -> None:
        source, number = self.on("source"), self.logical_shard
        roles = sorted({self.source.roles.app, self.source.roles.relay})
        fenced = self.rows["source"]
        assert fenced is not None, "it is fenced"
        changed = change(
            source,
            number,
            lambda _at, timeline: Decide(self.move, timeline),
            roles=roles,
            seen=Seen(fenced, timeline=fenced.fence_timeline or 0),
        )
        self._changed("source", changed)
        if self._has_standbys:
            cutover.flushed(source, changed.lsn, _REPLICAS)

    def _activate(self, _goal: Goal) -> None:
        source = self.rows["source"]
        assert source is not None, "it has handed over"
        for taken in self._snapshots:
            taken.result()
        self._is_frozen = bool(self._snapshots)
        event = Activate(self.move, source, self.target.name)
        row = self.rows["target"]
        seen = None if row is None else Seen(row)
        changed = change(self.on("target"), self.logical_shard, event, note={}, seen=seen)
        self._changed("target", changed)
        if self.fenced is not None:
            self.pause = SYSTEM.monotonic() - self.fenced

    def _turn(self, _goal: Goal) -> None:
        source, target, number = self.on("source"), self.on("target"), self.logical_shard
        replication.unsubscribe(target, number)
        replication.drop_slot(source, number)
        replication.unpublish(source, number)
        if replication.is_following(source, number):
            replication.enable(source, number, self._url(self.target))

    def _check(self, _goal: Goal) -> None:
        if self._is_frozen:
            here, there = self.on("source", "rows"), self.on("target", "rows")
            found = rows.frozen(here, there, self.logical_shard, self._on_table(Step.CHECK))
            self._thaw(here)
            self._thaw(there)
        else:
            found = self._compared("target", "source", Step.CHECK)
        self.diff = found
        odd = shapes.differences(self.on("source"), self.on("target"), self.logical_shard)
        if not found.is_clean or odd:
            raise MoveError(
                f"after the move: {found.told()}{'; ' if odd else ''}{'; '.join(odd)}",
                hint="the target is open; look at both before shardkit move rollback or clean",
            )

    # -- backwards

    def _lift(self, _goal: Goal) -> None:
        source = self.on("source")
        row = transactions.row_of(source, self.logical_shard)
        timeline = (row.fence_timeline if row else None) or 0
        self._changed("source", change(source, self.logical_shard, Lift(self.move, timeline)))
        self.fenced, self.is_drained = None, False
        for side in ("source", "target"):
            with suppress(psycopg.Error, TryAgainError):
                self._thaw(self.on(side, "rows"))

    def _yield(self, _goal: Goal) -> None:
        target = self.rows["target"]
        assert target is not None, "it is open"
        event = Yield(self.move, self.target.name, target)
        self._changed("source", change(self.on("source"), self.logical_shard, event))

    def _detach(self, _goal: Goal) -> None:
        for side in ("source", "target"):
            replication.unsubscribe(self.on(side), self.logical_shard)
        for side in ("source", "target"):
            replication.drop_slot(self.on(side), self.logical_shard)
            replication.unpublish(self.on(side), self.logical_shard)

    def _discard(self, _goal: Goal) -> None:
        self._changed("target", change(self.on("target"), self.logical_shard, Discard(self.move)))

    def _drop_copy(self, _goal: Goal) -> None:
        self._drop("target")

    def _drop_source(self, _goal: Goal) -> None:
        self._drop("source")

    def _drop(self, side: str) -> None:
        connection = self.on(side)
        with connection.transaction():
            # A row lock: nothing becomes of the row meanwhile.
            found: Any = connection.execute(
                "SELECT state, move_id::text FROM shardkit.ownership WHERE logical_shard = %s "
                "FOR UPDATE",
                (self.logical_shard,),
            ).fetchone()
            if found is not None and (
                found[0] != State.RETIRED or found[1] not in {None, self.move.id}
            ):
                raise RefusedError(
                    f"its copy on the {side} is {found[0]}, and not to be dropped",
                    hint="look at shardkit move status",
                    logical_shard=self.logical_shard,
                )
            copying.drop(connection, self.logical_shard)

    def _unlock(self, _goal: Goal) -> None:
        for side in ("source", "target"):
            ddllocks.release(
                self.on(side), self.logical_shard, holder=application(self.logical_shard)
            )

    def _release(self, goal: Goal) -> None:
        for side in ("source", "target") if goal is Goal.CLEAN else ("source",):
            row = transactions.row_of(self.on(side), self.logical_shard)
            if row is not None and row.move_id == self.move.id:
                event = Release(self.move)
                self._changed(side, change(self.on(side), self.logical_shard, event))
