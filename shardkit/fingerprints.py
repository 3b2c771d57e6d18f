"""How the rows of tables were placed, as the servers have recorded it.

Every new connection reads it with its other checks. A model that would look for its rows
elsewhere is refused on its first use, before it misses any. No I/O of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Table
from sqlalchemy.orm import Mapper

from shardkit.errors import ConfigurationError
from shardkit.models import sharding_of
from shardkit.uniques import lookups_of

__all__ = ["Fingerprints"]


class Fingerprints:
    """What one cluster has recorded, and the classes that were found to agree."""

    def __init__(self) -> None:
        self._recorded: dict[str, str] = {}
        self._agreeing: set[Mapper[Any]] = set()

    def note(self, recorded: Mapping[str, str] | None) -> None:
        """Take in what a server has recorded: text of the rule by table; None for nothing."""
        self._recorded.update(recorded or {})

    def check(self, mapper: Mapper[Any]) -> None:
        """Refuse a class that places its rows in another way than those that are stored.

        Call it with a connection at hand: opening one has read what is recorded. A table of
        which nothing is recorded is not checked.

        Raises:
            ConfigurationError: `__shard_key__` or `__shard_strategy__` was changed.
        """
        if mapper in self._agreeing:
            return
        table = mapper.local_table
        sharding = sharding_of(table) if isinstance(table, Table) else None
        recorded = self._recorded.get(table.name) if isinstance(table, Table) else None
        if sharding is None or recorded is None:
            return
        if recorded != sharding.fingerprint:
            raise ConfigurationError(
                f"rows of {mapper.class_.__name__} were placed by {recorded}, "
                f"the model says {sharding.fingerprint}",
                hint="restore __shard_key__ and __shard_strategy__; rows do not move by themselves",
            )
        for lookup in lookups_of(table):
            was = self._recorded.get(lookup.name, lookup.rule)
            if was != lookup.rule:
                raise ConfigurationError(
                    f"{lookup.name} was kept as {was}, the model says {lookup.rule}",
                    hint="restore unique_lookup(fold=…); which values are equal cannot change",
                )
        self._agreeing.add(mapper)
