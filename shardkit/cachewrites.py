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
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from sqlalchemy import ForeignKey, Table, TextClause
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state

from shardkit.cacheable import CHANGED, VERSION, identity_of, is_cached
from shardkit.derived import is_watched, watched_columns
from shardkit.emitting import EPOCH_SHIFT
from shardkit.errors import ConfigurationError
from shardkit.modifier import ModifyingSession
from shardkit.participants import Ending, Participant
from shardkit.parts import Part
from shardkit.placing import sharding_of_mapper
from shardkit.topology import schema_name

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.cache import Writer
    from shardkit.cached import CachePlan

__all__ = ["CacheWrites"]

_LOG: Final = logging.getLogger("shardkit.cache")

_NEW: Final = -1
"""Version of a row before it is inserted."""

_ANY_VERSION: Final = sys.maxsize
"""Of a change whose version is not known: whatever is there is older. Its marker carries no row
and is followed by none, so that others may take it for a later writer's."""

# What this transaction's triggers have written. Locks nothing; begins at the first of these events.
_ASKED: Final = """
SELECT payload FROM {schema}.shardkit_outbox
WHERE position > (SELECT (o.epoch << {shift})
        + nullif(current_setting('shardkit.cache_since', true), '')::bigint
        FROM shardkit.ownership AS o WHERE o.logical_shard = {shard})
    AND topic = '{topic}' AND payload ->> 'transaction' = pg_current_xact_id_if_assigned()::text
"""


class _Row(NamedTuple):
    """A row, by what names its entry: its logical shard, its table and its primary key."""

    shard: int
    table: str
    identity: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """What is known of a changed row.

    Attributes:
        version: it has now; `_ANY_VERSION` when that is not known.
        payload: it as it is now, encoded; None to leave no entry.
        floor: version that readers of this process have to see at least.
        replaces: version it had before the transaction; None when that is not known.
        plan: of its class; None when a statement changed it.
    """

    version: int
    payload: bytes | None = None
    floor: int = 0
    replaces: int | None = None
    plan: CachePlan | None = None


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
        self._changes: dict[_Row, _Change] = {}
        self._asked: set[int] = set()
        self._quiet: set[int] = set()
        self._marks: dict[object, tuple[dict[_Row, _Change], set[int]]] = {}
        self._writers: list[Writer] = []

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
                or (state.key is not None and not is_cached(table) and _reaches(table))
            ):
                self._ask((self._placed[id(obj)],))
            if not is_cached(table):
                continue
            if session._atomic:
                self._hush(self._placed.get(id(obj)))
            # What the program sets itself is not what the server will have.
            if state.key is None:
                known = None if VERSION in state.dict else _NEW
            else:
                known = None if VERSION in state.committed_state else state.dict.get(VERSION)
            self._versions[id(obj)] = known

    def _changes_list(self, obj: Any, state: InstanceState[Any]) -> bool:
        """Tell whether a list or count may be another when an object is written."""
        if not is_watched(state.mapper.local_table):
            return False
        if state.key is None or obj in self._session.deleted:
            return True
        return not _watched_attributes(state.mapper).isdisjoint(state.committed_state)

    def flushed(self) -> None:
        """Note what was written, as it is now: later changes in place must not be cached.

        Raises:
            ConfigurationError: rows get no versions.
        """
        session, cache = self._session, self._cache
        if cache is None:
            return
        deleted = {id(obj) for obj in session.deleted}
        for obj in _concerned(session.new, session.dirty, session.deleted):
            state = instance_state(obj)
            before = self._versions.get(id(obj))
            identity = tuple(state.mapper.primary_key_from_instance(obj))
            if id(obj) in deleted:
                self._change(state.mapper, identity, _gone(before))
                continue
            after = state.dict.get(VERSION)
            if before is not None and before == after and after > 0:
                continue  # nothing was written
            if after == 0 and before == _NEW:
                raise ConfigurationError(
                    f"rows of {state.mapper.local_table} get no versions",
                    hint="run shardkit migrate apply, with migrations.models",
                )
            if state.key is not None and state.key[1] != identity:
                self._change(state.mapper, state.key[1], _gone(before))
            self._change(state.mapper, identity, _now(cache, state, before, after))
        self._versions.clear()

    def _change(self, mapper: Mapper[Any], identity: tuple[Any, ...], change: _Change) -> None:
        sharding = sharding_of_mapper(mapper)
        assert sharding is not None, "only sharded classes are cached"
        shard = self._session._decided(lambda router: sharding.shard_of_identity(router, identity))
        row = _Row(shard, cast("Table", mapper.local_table).name, identity)
        earlier = self._changes.get(row)
        if earlier is not None:
            replaces = earlier.replaces
            change = _Change(change.version, change.payload, change.floor, replaces, change.plan)
        self._changes[row] = change
        if _reaches(mapper.local_table):
            self._asked.add(shard)

    # -- statements

    def writing(self, statement: Any, found: Sequence[Part]) -> None:
        """Note where a statement changes cached rows: the server knows which."""
        if _concerns(statement.table):
            self._ask(part.shard for part in found)

    def said(self, statement: Any, shard: int) -> None:
        """Note where a statement may change cached rows."""
        if isinstance(statement, TextClause):
            may_change = not statement.text.lstrip().lower().startswith("select")
        else:
            may_change = _concerns(getattr(statement, "table", None))
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

    def prepare(self) -> None:
        """Put markers in the places of the rows, while their locks are held."""
        cache = self._cache
        if cache is None or not (self._changes or self._asked):
            return
        for shard in sorted(self._asked):
            self._answered(shard)
        if not self._changes:
            return
        from shardkit.cache import DEFAULT_LIVES, Writer  # noqa: PLC0415 - the `cache` extra

        for row, change in self._changes.items():
            replaces = None
            if cache.serves_previous and change.payload is not None:
                replaces = change.replaces
            self._writers.append(
                Writer.begin(
                    cache.key_of(row.table, row.shard, row.identity),
                    change.version,
                    change.payload,
                    lives=DEFAULT_LIVES if change.plan is None else change.plan.lives,
                    replaces=replaces,
                )
            )
        self._drive()

    def _answered(self, shard: int) -> None:
        """Ask a server which rows the transaction has changed, and believe it."""
        text = _ASKED.format(
            schema=schema_name(shard), shard=shard, shift=EPOCH_SHIFT, topic=CHANGED
        )
        for (payload,) in self._session._connection_to(shard).exec_driver_sql(text):
            for key, version in payload["rows"]:
                row = _Row(shard, payload["table"], identity_of(payload["tags"], key))
                known = self._changes.get(row)
                if known is None or known.version < version:
                    self._changes[row] = _Change(version, floor=version)

    def finish(self) -> None:
        """Store the rows, or remove what is older."""
        if not self._writers:
            return
        cache = self._cache
        for writer, change in zip(self._writers, self._changes.values(), strict=True):
            if change.floor:
                cache.raise_floor(writer.key, change.floor)
        self._writers = [writer.committed() for writer in self._writers]
        try:
            self._drive()
        except Exception:  # noqa: BLE001 - it holds, and the caller must learn that
            _LOG.exception("what was committed is left to the relay")
        finally:
            self._writers = []

    def settle(self, ending: Ending) -> None:
        """Remove the markers of what did not commit; leave them where nobody knows."""
        writers, self._writers = self._writers, []
        self._changes = {}
        self._asked.clear()
        self._quiet.clear()
        self._marks.clear()
        self._versions.clear()
        if writers and ending is Ending.ROLLED_BACK:
            # One that is not ready was interrupted: its marker expires.
            self._writers = [writer.rolled_back() for writer in writers if writer.is_ready]
            try:
                self._drive()
            except Exception:  # noqa: BLE001 - the transaction is over, and they expire
                _LOG.exception("markers are left to expire")
            finally:
                self._writers = []

    def _drive(self) -> None:
        """Have the machines ask until they are ready or done, in step."""
        writers, cache = self._writers, self._cache
        while asking := [
            (n, request)
            for n, writer in enumerate(writers)
            if (request := writer.request) is not None
        ]:
            answers = cache.run([request for _, request in asking])
            for (n, _), answer in zip(asking, answers, strict=True):
                writers[n] = writers[n].advance(answer)

    # -- savepoints

    def began(self, savepoint: object) -> None:
        """Note what was changed before a savepoint."""
        self._marks[savepoint] = (dict(self._changes), set(self._asked))

    def undone(self, transaction: object) -> None:
        """Forget what was changed since a savepoint."""
        if transaction in self._marks:
            self._changes, self._asked = self._marks.pop(transaction)
        self._quiet.clear()  # the setting may be undone with it


def _concerned(*groups: Iterable[Any]) -> list[Any]:
    return [
        obj
        for group in groups
        for obj in group
        if is_cached(instance_state(obj).mapper.local_table)
    ]


def _gone(before: int | None) -> _Change:
    """Return the change of a row that is there no more."""
    return _Change(_ANY_VERSION, floor=0 if before is None or before < 0 else before + 1)


def _now(cache: Any, state: InstanceState[Any], before: int | None, after: Any) -> _Change:
    """Return the change of a row that was written.

    What it is now is known where its statement has returned its version: then it has returned
    all that it did not set.
    """
    if before is None or after is None or after == before:
        return _Change(_ANY_VERSION, floor=max(after or 0, 0))
    plan = cache.plan(state.mapper)
    values = state.dict
    if before == _NEW:  # new: what was left out is null
        values = {**_nulls(state.mapper), **values}
    image = plan.image(values)
    payload = None if image is None else plan.encode(image)
    return _Change(after, payload, after, before if before > 0 else None, plan)


@lru_cache(maxsize=4096)
def _nulls(mapper: Mapper[Any]) -> dict[str, None]:
    """Return the attributes whose columns are null unless a value is given."""
    return {
        key: None
        for key, column in mapper.columns.items()
        if column.nullable and column.server_default is None and column.default is None
    }


@lru_cache(maxsize=4096)
def _watched_attributes(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the attributes of the columns on which lists and counts depend."""
    columns = watched_columns(cast("Table", mapper.local_table))
    return frozenset(key for key, c in mapper.columns.items() if c.name in columns)


def _concerns(table: Any) -> bool:
    """Tell whether a statement that changes a table may change what is cached."""
    return is_cached(table) or is_watched(table) or _reaches(table)


@lru_cache(maxsize=4096)
def _reaches(table: Any) -> bool:
    """Tell whether the server itself changes cached rows when rows of a table go or change."""
    seen: set[Any] = set()
    waiting = [table] if isinstance(table, Table) else []
    while waiting:
        parent = waiting.pop()
        seen.add(parent)
        for child in parent.metadata.tables.values():
            if child not in seen and any(_acts(key, parent) for key in child.foreign_keys):
                if is_cached(child) or is_watched(child):
                    return True
                waiting.append(child)
    return False


def _acts(key: ForeignKey, parent: Table) -> bool:
    actions = {(action or "no action").lower() for action in (key.ondelete, key.onupdate)}
    return not actions <= {"no action", "restrict"} and key.references(parent)
