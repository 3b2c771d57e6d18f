"""The parts that statements are made of: entities, columns, conditions, orders.

Used by `tests.property.grammar`, which puts anything together, and by `tests.property.supported`,
which puts together what is promised. Everything is drawn from `Dice`, in one world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st
from sqlalchemy import Boolean, Integer, Numeric, String, and_, inspect, not_, or_, tuple_
from sqlalchemy.orm import aliased

from shardkit.models import sharding_of
from tests.property.schemas import Schema, family
from tests.property.worlds import World

__all__ = [
    "Dice",
    "columns_of",
    "direction",
    "finished",
    "limited",
    "model_of",
    "pairs",
    "selected",
    "simple_condition",
    "total_order",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Dice:
    """What a generator draws from, and the world it draws for."""

    world: World
    draw: Callable[[st.SearchStrategy[Any]], Any]

    @property
    def schema(self) -> Schema:
        """The models."""
        return self.world.schema

    def pick(self, *choices: T) -> T:
        """Return one of the choices."""
        return self.draw(st.sampled_from(choices))  # type: ignore[no-any-return]

    def chance(self, percent: int) -> bool:
        """Return True so often."""
        return bool(self.draw(st.integers(0, 99)) < percent)

    def upto(self, most: int) -> int:
        """Return a number from 0."""
        return int(self.draw(st.integers(0, most)))

    def some(self, choices: Sequence[T], least: int = 0, most: int = 3) -> list[T]:
        """Return some of the choices, each once."""
        strategy = st.lists(
            st.sampled_from(range(len(choices))), min_size=least, max_size=most, unique=True
        )
        return [choices[i] for i in self.draw(strategy)]

    # -- entities and columns

    def entity(self, *models: Any) -> Any:
        """Return a model, or an alias of one."""
        model = self.pick(*(models or self.schema.models))
        return aliased(model) if self.chance(40) else model

    def beside(self, scope: Sequence[Any], *models: Any) -> Any:
        """Return another entity for one FROM, where a table can stand under its own name once."""
        one = self.entity(*models)
        return aliased(one) if one in scope else one

    def key(self, one: Any) -> Any:
        """Return a placing column of an entity."""
        return getattr(one, self.pick(*self.schema.keys[model_of(one)]))

    def column(self, scope: Sequence[Any], *types: Any) -> Any:
        """Return a column of some entity, of given types or of any that sorts alike anywhere."""
        found = [
            column for one in scope for column in columns_of(one)
            if (isinstance(column.type, types) if types else not isinstance(column.type, String))
        ]  # fmt: skip
        return self.pick(*found)

    def quantity(self, scope: Sequence[Any]) -> Any:
        """Return a column of numbers that add up exactly."""
        return self.column(scope, Integer, Numeric)

    def twin(self, column: Any, scope: Sequence[Any]) -> Any:
        """Return a column that can be compared with another one; itself if need be."""
        return self.twin_of(column, [other for one in scope for other in columns_of(one)])

    def twin_of(self, column: Any, among: Sequence[Any]) -> Any:
        """Return one of some columns that can be compared with another one; itself if need be."""
        found = [other for other in among if family(other) == family(column)]
        return self.pick(*found) if found else column

    def value(self, column: Any) -> Any:
        """Return a value worth comparing a column with."""
        return self.pick(*self.world.pool(column))

    def pinned(self, one: Any) -> Any:
        """Return a condition on a key of an entity: what confines a statement."""
        column = self.key(one)
        pool = self.world.pool(column)
        return column == self.pick(*pool) if self.chance(60) else column.in_(self.some(pool))


def model_of(entity: Any) -> Any:
    """Return the model of an entity that may be an alias."""
    return inspect(entity).mapper.class_


def columns_of(one: Any) -> list[Any]:
    """Return the columns of an entity."""
    return [getattr(one, attribute.key) for attribute in inspect(model_of(one)).column_attrs]


def placing(one: Any) -> dict[str, Any]:
    """Return the rules of the placing columns of an entity."""
    sharding = sharding_of(inspect(model_of(one)).local_table)
    assert sharding is not None
    return sharding.placing


def pairs(a: Any, b: Any) -> list[Any]:
    """Return the conditions that say that rows of two entities lie together."""
    return [
        getattr(a, first) == getattr(b, second)
        for first, rule in placing(a).items()
        for second, other in placing(b).items()
        if rule == other
    ]


def simple_condition(d: Dice, scope: Sequence[Any], depth: int = 2) -> Any:
    """Return a condition on the rows of some entities, without subqueries."""
    kind = d.upto(9 if depth else 6)
    column = d.pick(*[c for one in scope for c in columns_of(one)])
    if kind == 0:
        ways: tuple[Any, ...] = (column.__eq__, column.__ne__)
        if not isinstance(column.type, Boolean | String):
            ways += (column.__lt__, column.__le__, column.__gt__, column.__ge__)
        return d.pick(*ways)(d.value(column))
    if kind == 1:
        values = [d.value(column) for _ in range(d.upto(3))]
        return column.in_(values) if d.chance(60) else column.not_in(values)
    if kind == 2:
        return column.is_(None) if d.chance(50) else column.is_not(None)
    if kind == 3:
        return column == d.twin(column, scope)
    if kind == 4:
        other = d.pick(*[c for one in scope for c in columns_of(one)])
        return tuple_(column, other).in_([(d.value(column), d.value(other)) for _ in range(2)])
    if kind == 5:
        return d.column(scope, String).like(d.pick("%a%", "", "_o%", "Z%"))
    if kind == 6:
        number = d.quantity(scope)
        return number.between(d.value(number), d.value(number))
    if kind == 9:
        return not_(simple_condition(d, scope, depth - 1))
    parts = [simple_condition(d, scope, depth - 1) for _ in range(2)]
    return and_(*parts) if kind == 7 else or_(*parts)


def selected(d: Dice, scope: Sequence[Any], *, entities: bool = True) -> list[Any]:
    """Return what a SELECT asks for: columns, some under labels, and entities."""
    chosen: list[Any] = []
    for i, one in enumerate(scope):
        chosen += [
            column.label(f"c{i}_{column.key}") if d.chance(50) else column
            for column in d.some(columns_of(one), most=2)
        ]
        if entities and d.chance(40):
            chosen.append(one)
    return chosen or [scope[0] if entities else columns_of(scope[0])[0]]


def direction(d: Dice, column: Any) -> Any:
    """Return a column as an ORDER BY term, either way and with NULLs where it likes."""
    term = column.collate("C") if isinstance(column.type, String) else column
    term = d.pick(term, term.desc(), term.asc())
    if d.chance(40):
        return term.nulls_first() if d.chance(50) else term.nulls_last()
    return term


def total_order(d: Dice, scope: Sequence[Any], least: int = 0) -> list[Any]:
    """Return a total order: some columns, and last everything that tells rows apart."""
    some = [d.column(scope) for _ in range(least + d.upto(2 - least))]
    last = [getattr(one, c.key) for one in scope for c in inspect(model_of(one)).primary_key]
    return [direction(d, column) for column in (*some, *last)]


def limited(d: Dice, statement: Any) -> Any:
    """Return a statement with LIMIT and OFFSET, sometimes."""
    if d.chance(70):
        statement = statement.limit(d.upto(6))
    return statement.offset(d.upto(4)) if d.chance(40) else statement


def finished(d: Dice, statement: Any, scope: Sequence[Any]) -> tuple[Any, bool]:
    """Order and limit a statement, sometimes; return it, and whether its order counts."""
    if d.chance(50):
        return statement, False
    return limited(d, statement.order_by(*total_order(d, scope))), True
