"""The participant that keeps the cache in step with a writer's transaction.

It knows which cached rows the transaction has changed and, where it can be told for sure, what
they are now; lists and counts it learns from the server. Before COMMIT, while their locks are held,
it puts markers in their places, all in
one round trip per server of the cache; afterwards it stores the rows, or removes what is old. The
steps of each row are `shardkit.cache.Writer`. The cache never fails a commit: what it does not
answer, the relay repairs, of which the triggers of the tables have told it in the outbox
(`shardkit.ops.cachetriggers`). Source: docs/cache.md, "Protocol".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Table, TextClause
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state

from shardkit.cacheable import CHANGED, VERSION, identity_of, is_cached
from shardkit.cachechanges import (
    ANY_VERSION,
    NEW,
    Change,
    Row,
    concerned,
    concerns,
    gone,
    now,
    reaches,
    watched_attributes,
)
from shardkit.cachesteps import CacheSteps
from shardkit.derived import is_watched
from shardkit.emitting import EPOCH_SHIFT
from shardkit.errors import ConfigurationError
from shardkit.modifier import ModifyingSession
from shardkit.participants import Ending, Participant
from shardkit.parts import Part
from shardkit.placing import sharding_of_mapper
from shardkit.topology import schema_name

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.gates import AsyncWriter
    from shardkit.gates import Writer as Driver

__all__ = ["CacheWrites"]

_LOG: Final = logging.getLogger("shardkit.cache")

# What this transaction's triggers have written. Locks nothing; begins at the first of these events.
_ASKED: Final = """
SELECT payload FROM {schema}.shardkit_outbox
WHERE position > (SELECT (o.epoch << {shift})
        + nullif(current_setting('shardkit.cache_since', true), '')::bigint
        FROM shardkit.ownership AS o WHERE o.logical_shard = {shard})
    AND topic = '{topic}' AND payload ->> 'transaction' = pg_current_xact_id_if_assigned()::text
"""


class CacheWrites(Participant):
    """The cached rows that one session's transaction changes.

    Args:
        session: whose transaction it is.
        placed: logical shards of the objects of a flush, by their identity.
    """

    def __init__(self, session: ModifyingSession, placed: Mapping[int, int]) -> None:
        self._session = session
        self._placed = placed
        self._versions: dict[int, int | None] = {}
        self._changes: dict[Row, Change] = {}
        self._asked: set[int] = set()
        self._quiet: set[int] = set()
        self._marks: dict[object, tuple[dict[Row, Change], set[int]]] = {}
        self._steps: CacheSteps | None = None
        self._keys: dict[Row, str] = {}
        self._known: dict[str, tuple[int, bytes | None]] = {}  # what is committed
        self._driver: Driver | AsyncWriter | None = None  # computes while it waits for COMMIT

    def concern(self, state: InstanceState[Any]) -> bool:
        """Tell whether something is to be done about an object that is written."""
        is_on = self._cache is not None or self._session._atomic
        table = state.mapper.local_table
        return is_on and (is_cached(table) or is_watched(table))

    @property
    def _cache(self) -> Any:
        return self._session._cluster.cache

    # -- objects

    def flushing(self) -> None:
        """Note which versions objects have before they are written."""
        session = self._session
        if self._cache is None and not session._atomic:
            return
        self._versions.clear()
        for obj in (*session.new, *session.dirty, *session.deleted):
            state = instance_state(obj)
            table = state.mapper.local_table
            if id(obj) in self._placed and (
                self._changes_list(obj, state)
                or (state.key is not None and not is_cached(table) and reaches(table))
            ):
                self._ask((self._placed[id(obj)],))
            if not is_cached(table):
                continue
            if session._atomic:
                self._hush(self._placed.get(id(obj)))
            # What the program sets itself is not what the server will have.
            if state.key is None:
                known = None if VERSION in state.dict else NEW
            else:
                known = None if VERSION in state.committed_state else state.dict.get(VERSION)
            self._versions[id(obj)] = known
        is_last = session._is_last_flush and not session.in_nested_transaction()
        if is_last and self._versions and self._cache is not None:
            self._meanwhile(self._mark_early)

    def _meanwhile(self, work: Callable[[], None]) -> None:
        """Have something done as soon as the database has been sent something, if it can be."""
        drivers = self._session._drivers
        if len(drivers) == 1:
            self._driver = drivers[0]
            self._driver.meanwhile = work

    def _mark_early(self) -> None:
        """Send markers for what is about to be written, while the database writes it.

        They say the least version that a row can get: one more than it had when it was read.
        """
        try:
            rows = {}
            for obj in concerned(self._session.new, self._session.dirty, self._session.deleted):
                state = instance_state(obj)
                known, shard = self._versions.get(id(obj)), self._placed.get(id(obj))
                identity = tuple(state.mapper.primary_key_from_instance(obj))
                is_written = state.key is None or (
                    obj in self._session.deleted or self._session.is_modified(obj)
                )
                if known is not None and shard is not None and is_written and None not in identity:
                    replaces = known if known > 0 else None
                    plan = self._cache.plan(state.mapper)
                    row = Row(shard, plan.table.name, identity)
                    rows[row] = Change(max(known, 0) + 1, replaces=replaces, plan=plan)
            self._mark(rows)
            # At once, since the database may wait for a lock, and connections are few.
            if self._steps is not None and not self._cache.is_async:
                self._steps.drive()
        except Exception:  # noqa: BLE001 - called in the midst of a statement
            _LOG.exception("markers are sent later")

    def flush_ended(self) -> None:
        """Forget what was to be done while it wrote, if it wrote nothing or failed."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.meanwhile = None

    def _changes_list(self, obj: Any, state: InstanceState[Any]) -> bool:
        """Tell whether a list or count may be another when an object is written."""
        if not is_watched(state.mapper.local_table):
            return False
        if state.key is None or obj in self._session.deleted:
            return True
        return not watched_attributes(state.mapper).isdisjoint(state.committed_state)

    def flushed(self) -> None:
        """Note what was written, as it is now: later changes in place must not be cached.

        Raises:
            ConfigurationError: rows get no versions.
        """
        session, cache = self._session, self._cache
        if cache is None:
            return
        deleted = {id(obj) for obj in session.deleted}
        for obj in concerned(session.new, session.dirty, session.deleted):
            state = instance_state(obj)
            before = self._versions.get(id(obj))
            identity = tuple(state.mapper.primary_key_from_instance(obj))
            shard = self._placed.get(id(obj))
            if id(obj) in deleted:
                self._change(state.mapper, identity, gone(before), shard)
                continue
            after = state.dict.get(VERSION)
            if before is not None and before == after and after > 0:
                continue  # nothing was written
            if after == 0 and before == NEW:
                raise ConfigurationError(
                    f"rows of {state.mapper.local_table} get no versions",
                    hint="run shardkit migrate apply, with migrations.models",
                )
            if state.key is not None and state.key[1] != identity:
                self._change(state.mapper, state.key[1], gone(before))
            self._change(state.mapper, identity, now(cache, state, before, after), shard)
        self._versions.clear()

    def _change(
        self,
        mapper: Mapper[Any],
        identity: tuple[Any, ...],
        change: Change,
        shard: int | None = None,
    ) -> None:
        if shard is None:
            shard = self._shard_of(mapper, identity)
        row = Row(shard, cast("Table", mapper.local_table).name, identity)
        earlier = self._changes.get(row)
        if earlier is not None:
            replaces = earlier.replaces
            change = Change(change.version, change.payload, change.floor, replaces, change.plan)
        self._changes[row] = change
        if reaches(mapper.local_table):
            self._asked.add(shard)

    def _shard_of(self, mapper: Mapper[Any], identity: tuple[Any, ...]) -> int:
        sharding = sharding_of_mapper(mapper)
        assert sharding is not None, "only sharded classes are cached"
        return self._session._decided(lambda router: sharding.shard_of_identity(router, identity))

    # -- statements

    def writing(self, statement: Any, found: Sequence[Part]) -> None:
        """Note where a statement changes cached rows: the server knows which."""
        if concerns(statement.table):
            self._ask(part.shard for part in found)

    def said(self, statement: Any, shard: int) -> None:
        """Note where a statement may change cached rows."""
        if isinstance(statement, TextClause):
            may_change = not statement.text.lstrip().lower().startswith("select")
        else:
            may_change = concerns(getattr(statement, "table", None))
        if may_change:
            self._ask((shard,))

    def _ask(self, shards: Iterable[int]) -> None:
        for shard in shards:
            if self._session._atomic:
                self._hush(shard)
            if self._cache is not None:
                self._asked.add(shard)

    def _hush(self, shard: int | None) -> None:
        """Have triggers not notify: what has notified cannot be prepared."""
        if shard is not None and shard not in self._quiet:
            self._quiet.add(shard)
            connection = self._session._connection_to(shard)
            connection.exec_driver_sql("SET LOCAL shardkit.quiet = 'on'")

    # -- around COMMIT

    def mark(self) -> None:
        """Send markers for what a flush has written, COMMIT being next; do not wait for them."""
        if self._cache is not None and not self._session.in_nested_transaction():
            self._mark(self._changes)

    def prepare(self) -> None:
        """Put markers in the places of the rows, while their locks are held."""
        if self._cache is None:
            return
        for shard in sorted(self._asked):
            self._answered(shard)
        self._mark(self._changes)
        if self._steps is None:
            return
        self._steps.drive()
        changes = self._changes.items()
        self._known = {self._key(row): (each.version, each.payload) for row, each in changes}
        self._meanwhile(self._foresee)

    def _foresee(self) -> None:
        if self._steps is not None:
            self._steps.foresee(self._known)

    def _mark(self, changes: Mapping[Row, Change]) -> None:
        """Send markers for rows that have none yet."""
        cache, steps = self._cache, self._steps
        marked = () if steps is None else steps.keys
        fresh = [
            (key, change)
            for row, change in changes.items()
            if (key := self._key(row)) not in marked
        ]
        if not fresh:
            return
        from shardkit.cache import DEFAULT_LIVES, Writer  # noqa: PLC0415 - the `cache` extra

        if steps is None:
            steps = self._steps = CacheSteps(cache)
        steps.mark(
            [
                Writer.begin(
                    key,
                    change.version,
                    change.payload,
                    lives=DEFAULT_LIVES if change.plan is None else change.plan.lives,
                    replaces=change.replaces if self._shows_previous(change) else None,
                )
                for key, change in fresh
            ]
        )

    def _shows_previous(self, change: Change) -> bool:
        """Whether readers may have the previous value meanwhile."""
        return bool(self._cache.serves_previous) and change.version != ANY_VERSION

    def _key(self, row: Row) -> str:
        """Return the name of a row's entry."""
        key = self._keys.get(row)
        if key is None:
            key = self._keys[row] = self._cache.key_of(row.table, row.shard, row.identity)
        return key

    def _answered(self, shard: int) -> None:
        """Ask a server which rows the transaction has changed, and believe it."""
        text = _ASKED.format(
            schema=schema_name(shard), shard=shard, shift=EPOCH_SHIFT, topic=CHANGED
        )
        for (payload,) in self._session._connection_to(shard).exec_driver_sql(text):
            for key, version in payload["rows"]:
                row = Row(shard, payload["table"], identity_of(payload["tags"], key))
                known = self._changes.get(row)
                if known is None or known.version < version:
                    self._changes[row] = Change(version, floor=version)

    def finish(self) -> None:
        """Send what stores the rows, or removes what is older."""
        if self._steps is None:
            return
        try:
            self._steps.committed(self._known)
        except Exception:  # noqa: BLE001 - it holds, and the caller must learn that
            _LOG.exception("what was committed is left to the relay")
            self._steps = None
        for row, change in self._changes.items():
            if change.floor:
                self._cache.raise_floor(self._key(row), change.floor)

    def settle(self, ending: Ending) -> None:
        """Wait until that is done; remove the markers of what did not commit.

        Where nobody knows, they are left to expire.
        """
        steps, self._steps = self._steps, None
        self.flush_ended()
        keys = [self._key(row) for row in self._changes] if ending is Ending.COMMITTED else []
        self._changes = {}
        self._keys = {}
        self._known = {}
        self._asked.clear()
        self._quiet.clear()
        self._marks.clear()
        self._versions.clear()
        if steps is not None and ending is not Ending.UNKNOWN:
            try:
                if ending is Ending.ROLLED_BACK:
                    steps.rolled_back()
                steps.drive()
            except Exception:  # noqa: BLE001 - the transaction is over
                _LOG.exception("the cache is left to the relay")
        # What other processes have copied before has to end before this is acknowledged.
        if keys and (seconds := self._cache.copies_end(keys)):
            self._cache.wait(seconds)

    # -- savepoints

    def began(self, savepoint: object) -> None:
        """Note what was changed before a savepoint."""
        self._marks[savepoint] = (dict(self._changes), set(self._asked))

    def undone(self, transaction: object) -> None:
        """Forget what was changed since a savepoint."""
        if transaction in self._marks:
            self._changes, self._asked = self._marks.pop(transaction)
        self._quiet.clear()  # the setting may be undone with it
