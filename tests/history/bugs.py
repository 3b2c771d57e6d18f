"""Protections that are left out on purpose, by name, to see that judges notice.

The processes of the history test call `apply` at their start. Nothing of this is in the library:
each bug is a patch of it, made in processes of their own, which end with the run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["BUGS", "apply"]


def apply(name: str) -> None:
    """Leave a protection out in this process, for good; an empty name leaves none out."""
    if name:
        BUGS[name]()


def _without(left_out: str) -> None:
    """Leave out what the transaction of a change does besides changing the row."""
    from psycopg import sql

    from shardkit.ops.moves import transactions

    original: Any = transactions._doing

    def doing(shard: int, action: Any, *more: Any) -> Any:
        return sql.SQL("SELECT 1") if action.name == left_out else original(shard, action, *more)

    transactions._doing = doing  # type: ignore[assignment]


def _fence_without_the_lock() -> None:
    _without("LOCK")


def _fence_without_revoke() -> None:
    from shardkit.ops.moves import transactions

    transactions._WRITERS = "SELECT NULL WHERE false"  # type: ignore[misc]  # a constant
    _without("CLOSE_WRITES")


def _catch_up_not_awaited() -> None:
    from tests.fixtures.movers import Mover

    fence, copy = Mover.fence, Mover.copy

    def copies_first(self: Mover) -> None:
        copy(self)
        fence(self)

    Mover.fence = copies_first  # type: ignore[method-assign]
    Mover.copy = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005


def _activation_before_decision() -> None:
    from dataclasses import replace

    from shardkit.ops.moves.transactions import change, row_of
    from shardkit.ops.moves.transitions import Activate, Release
    from shardkit.ownership import State
    from tests.fixtures.movers import Mover

    def activate(self: Mover) -> None:
        source = row_of(self.on_source, self.shard)
        assert source is not None
        self.lift()  # a decision comes too late for that
        forged = replace(source, state=State.RETIRED, epoch=source.epoch + 1)
        change(self.on_target, self.shard, Activate(self.move, forged, self.target.name), note={})
        change(self.on_source, self.shard, Release(self.move))
        change(self.on_target, self.shard, Release(self.move))

    Mover.decide = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005
    Mover.activate = activate  # type: ignore[method-assign]


def _sequence_not_advanced() -> None:
    from tests.fixtures.movers import Mover

    Mover.advance = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005


def _unversioned_cache_set() -> None:
    """Whatever was loaded or written is stored, whatever is there."""
    from shardkit.caching.operations import Op
    from shardkit.caching.reader import Reader
    from shardkit.caching.writer import Writer

    def puts(kind: type[Any]) -> None:
        original: Any = kind.request

        def request(self: Any) -> Any:
            wanted = original.fget(self)
            if wanted is None or wanted.op is not Op.STORE:
                return wanted
            time.sleep(random.random() * 0.05)  # as any process may pause
            return wanted._replace(op=Op.PUT)

        kind.request = property(request)

    puts(Reader)
    puts(Writer)


def _map_never_refreshed() -> None:
    from shardkit import mapwatch
    from shardkit.heldmap import HeldMap
    from shardkit.mapwatch import MapWatch

    HeldMap.is_current = lambda self, physical: True  # type: ignore[method-assign]  # noqa: ARG005
    MapWatch.refresh = lambda self, physical: None  # type: ignore[method-assign]  # noqa: ARG005

    async def nothing(self: Any, name: str) -> None:  # noqa: ARG001
        return None

    mapwatch._Watcher._watch = nothing  # type: ignore[method-assign]


def _blind_retry() -> None:
    from shardkit import units

    original: Any = units._attempts
    units.named = lambda *_: None
    units._attempts = lambda _name, *more: original("run again, whatever came of it", *more)


def _lookup_without_reservation() -> None:
    from shardkit.claims import Claims

    Claims._reserve = lambda self, changes: None  # type: ignore[method-assign]  # noqa: ARG005


def _effect_without_dedupe() -> None:
    from shardkit.emitter import EmittingSession

    def noted(self: Any, placed: Any, consumer: str) -> set[int]:  # noqa: ARG001
        return {event.id for event, _ in placed}

    EmittingSession._note_effects = noted  # type: ignore[method-assign]


def _token_ignored_by_reads() -> None:
    from shardkit import Cluster

    original = Cluster.reader
    Cluster.reader = lambda self, **_: original(self)  # type: ignore[method-assign]


def _event_outside_its_transaction() -> None:
    from shardkit.emitter import EmittingSession
    from shardkit.writer import WriteSession

    original = EmittingSession.emit

    def emit(self: Any, *given: Any, **more: Any) -> None:
        with WriteSession(self._cluster) as session:
            original(session, *given, **more)
            session.commit()

    EmittingSession.emit = emit  # type: ignore[method-assign]


def _not_the_most_advanced() -> None:
    from shardkit.ops.failover import machine

    original = machine._succeeded

    def succeeded(view: Any, standbys: Any) -> Any:
        action = original(view, standbys)
        if isinstance(action, machine.Promote):
            return machine.Promote(min(standbys, key=lambda node: node.has).name)
        return action

    machine._succeeded = succeeded
    machine._unsafe = lambda *_: None  # it would not be registered


def _epoch_not_raised() -> None:
    from shardkit.ops.failover import nodes

    server: Any = nodes
    original: Any = server.promote

    def promote(connection: Any, **more: Any) -> Any:
        with connection.transaction():
            done = original(connection, **more)
            connection.execute(
                "UPDATE shardkit.ownership SET epoch = epoch - 1 WHERE logical_shard = ANY (%s)",
                (done[1],),
            )
        return done

    server.promote = promote


BUGS: Final[dict[str, Callable[[], None]]] = {
    "fence without the lock": _fence_without_the_lock,
    "fence without revoke": _fence_without_revoke,
    "catch-up not awaited": _catch_up_not_awaited,
    "activation before decision": _activation_before_decision,
    "sequence not advanced": _sequence_not_advanced,
    "unversioned cache set": _unversioned_cache_set,
    "map never refreshed": _map_never_refreshed,
    "blind retry of unknown outcomes": _blind_retry,
    "lookup without reservation": _lookup_without_reservation,
    "effect without dedupe": _effect_without_dedupe,
    "token ignored by reads": _token_ignored_by_reads,
    "event outside its transaction": _event_outside_its_transaction,
    "promoted replica not the most advanced": _not_the_most_advanced,
    "failover without a new epoch": _epoch_not_raised,
    "asynchronous failover": lambda: None,  # the shape of the cluster is the bug
}
