"""What the objects of a flush and the rows of an INSERT do to unique values. Pure.

Called by `shardkit.claims`, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.orm import InstanceState, PassiveFlag
from sqlalchemy.orm.attributes import instance_state

from shardkit.errors import NoShardKeyError
from shardkit.parts import Part
from shardkit.uniques import Lookup, Value

__all__ = ["Change", "added", "changed", "inserted", "label_of", "rows_of"]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the unique values of one row.

    Attributes:
        id: of the row.
        lookups: of its table.
        values: the new value by column; None for none. Columns that stay are missing.
        label: names the object in messages.
        is_stored: whether the row may be stored already.
    """

    id: int
    lookups: tuple[Lookup, ...]
    values: Mapping[Lookup, Value | None]
    label: str
    is_stored: bool = False


def added(obj: Any, lookups: tuple[Lookup, ...]) -> Change:
    """Return what a new object takes."""
    state: InstanceState[Any] = instance_state(obj)
    values = {}
    for lookup in lookups:
        given = state.dict.get(lookup.attribute)
        if given is not None:
            values[lookup] = lookup.value(given)
    identity = state.mapper.primary_key_from_instance(obj)[0]
    return Change(identity, lookups, values, label=label_of(state))


def changed(state: InstanceState[Any], lookups: tuple[Lookup, ...]) -> dict[Lookup, Value | None]:
    """Return the unique values that were set on a stored object."""
    values: dict[Lookup, Value | None] = {}
    for lookup in lookups:
        history = state.get_history(lookup.attribute, PassiveFlag.PASSIVE_NO_INITIALIZE)
        if history.added:
            given = history.added[0]
            values[lookup] = None if given is None else lookup.value(given)
        elif history.deleted:
            values[lookup] = None
    return values


def label_of(state: InstanceState[Any]) -> str:
    """Return how messages name an object."""
    return str(state.mapper.class_.__name__)


def rows_of(part: Part) -> list[dict[str, Any]]:
    """Return the rows that a part of an INSERT adds, by name."""
    statement, params = part.statement, part.params
    base = _by_name(statement._values or {})
    if isinstance(params, list | tuple):
        return [{**base, **_by_name(row)} for row in params]
    given = _by_name(cast("Any", params) or {})
    multi = [row for rows in statement._multi_values for row in rows]
    return [{**base, **_by_name(row), **given} for row in multi or [{}]]


def _by_name(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        getattr(key, "key", key): getattr(value, "effective_value", value)
        for key, value in row.items()
    }


def inserted(row: Mapping[str, Any], lookups: tuple[Lookup, ...], statement: Any) -> Change:
    """Return what a row of an INSERT takes."""
    values = {}
    for lookup in lookups:
        given = row.get(lookup.attribute, row.get(lookup.column))
        if given is not None:
            values[lookup] = lookup.value(given)
    name = lookups[0].id_column
    column = statement.table.c[name]
    row_id = row.get(name, row.get(column.key))
    if values and row_id is None:
        raise NoShardKeyError(f"INSERT without {name}, the primary key")
    return Change(row_id or 0, lookups, values, label=statement.table.name)
