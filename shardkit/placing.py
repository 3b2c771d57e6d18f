"""Places the objects of one flush: logical shards for all, minted ids for the new.

Called by `WriteSession` before anything is written. A new object lies where its shard key says;
when a relationship will fill the key, where the parent lies; when its own id is the key, where
the placement policy says. Talks to a database only to lease ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from sqlalchemy import Table
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state

from shardkit.errors import InvalidShardKeyError, NoShardKeyError, ShardKeyChangeError
from shardkit.minting import IdMinter
from shardkit.models import Sharding, sharding_of
from shardkit.placement import Placement
from shardkit.router import Router
from shardkit.strategies import EMBEDDED

__all__ = ["Placer", "sharding_of_mapper", "stored_shard"]


@cache
def sharding_of_mapper(mapper: Mapper[Any]) -> Sharding | None:
    """Return how the rows of a mapped class are placed, or None when it is not sharded."""
    table = mapper.local_table
    return sharding_of(table) if isinstance(table, Table) else None


def stored_shard(obj: Any, router: Router) -> int | None:
    """Return the logical shard of a stored object, or None when its class is not sharded.

    Raises:
        ShardKeyChangeError: a column that places the row was changed.
    """
    state: InstanceState[Any] = instance_state(obj)
    mapper: Mapper[Any] = state.mapper
    sharding = sharding_of_mapper(mapper)
    if sharding is None:
        return None
    for name in sharding.attributes:
        history = state.attrs[name].history
        if history.deleted and history.added and history.deleted != history.added:
            raise ShardKeyChangeError(f"{mapper.class_.__name__}.{name} was changed")
    identity = state.identity or tuple(mapper.primary_key_from_instance(obj))
    return sharding.shard_of_identity(router, identity)


class Placer:
    """Places the new objects of one flush.

    Args:
        router: places key values.
        placement: chooses a logical shard where nothing else does.
        minter: mints ids.
    """

    def __init__(self, router: Router, placement: Placement, minter: IdMinter) -> None:
        self._router = router
        self._placement = placement
        self._minter = minter
        self._pending: set[int] = set()
        self._placed: dict[int, int] = {}

    def run(self, new: Iterable[Any]) -> dict[int, int]:
        """Give the new objects ids; return the logical shard of each, by identity of the object.

        Raises:
            NoShardKeyError: an object has no shard key.
            InvalidShardKeyError: a key cannot place its object, or its id names another shard.
        """
        objects = list(new)
        self._pending = {id(obj) for obj in objects}
        wanted: dict[int, list[tuple[Any, str]]] = {}
        for obj in objects:
            state: InstanceState[Any] = instance_state(obj)
            sharding = sharding_of_mapper(state.mapper)
            if sharding is None:
                continue
            shard = self._place(obj, state, sharding)
            minted = sharding.minted
            if minted is None:
                continue
            given = state.dict.get(minted)
            if given is None:
                wanted.setdefault(shard, []).append((obj, minted))
            elif self._router.shard(EMBEDDED, given) != shard:
                raise InvalidShardKeyError(
                    f"{type(obj).__name__}: id {given} carries another logical shard than "
                    f"{sharding.key} names",
                    hint="leave the id out; it is minted at flush",
                    logical_shard=shard,
                )
        if wanted:
            ids = self._minter.mint({shard: len(rows) for shard, rows in wanted.items()})
            for shard, rows in wanted.items():
                for (obj, attribute), new_id in zip(rows, ids[shard], strict=True):
                    setattr(obj, attribute, new_id)
        return self._placed

    def _place(self, obj: Any, state: InstanceState[Any], sharding: Sharding) -> int:
        """Return the logical shard of a new object, deciding it on the first call."""
        known = self._placed.get(id(obj))
        if known is not None:
            return known
        value = state.dict.get(sharding.key)
        if value is not None:
            shard = self._router.shard(sharding.rule, value)
            if (kept := sharding.kept(value)) is not value:
                setattr(obj, sharding.key, kept)  # one spelling, so one identity
        elif sharding.key == sharding.minted:
            shard = self._placement(self._router.total)
        else:
            shard = self._beside_parent(obj, state, sharding)
        self._placed[id(obj)] = shard
        return shard

    def _beside_parent(self, obj: Any, state: InstanceState[Any], sharding: Sharding) -> int:
        parent = _parent(state, sharding)
        beside: InstanceState[Any] | None = None if parent is None else instance_state(parent)
        found = None if beside is None else sharding_of_mapper(beside.mapper)
        if beside is None or found is None:
            raise NoShardKeyError(
                f"{type(obj).__name__} was added without {sharding.key}, its shard key",
                hint=f"set {sharding.key}, or the relationship that fills it",
            )
        if id(parent) in self._pending:
            return self._place(parent, beside, found)
        shard = stored_shard(parent, self._router)
        assert shard is not None, "its class is sharded"
        return shard


def _parent(state: InstanceState[Any], sharding: Sharding) -> Any:
    """Return the object whose key will fill the shard key at flush, through a relationship."""
    for relationship in state.mapper.relationships:
        pairs = relationship.local_remote_pairs or []
        if not relationship.uselist and any(a is sharding.key_column for a, _ in pairs):
            parent = state.dict.get(relationship.key)
            if parent is not None:
                return parent
    # The parent may hold the child in a collection that has no relationship back.
    session = state.session
    for other in () if session is None else (*session.new, *session.identity_map.values()):
        other_state: InstanceState[Any] = instance_state(other)
        for relationship in other_state.mapper.relationships:
            if relationship.mapper is state.mapper and any(
                b is sharding.key_column for _, b in relationship.local_remote_pairs or []
            ):
                children = other_state.dict.get(relationship.key)
                if children is not None and any(
                    child is state.obj()
                    for child in (children if relationship.uselist else (children,))
                ):
                    return other
    return None
