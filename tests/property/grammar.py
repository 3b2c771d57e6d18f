"""The free grammar: statements of any shape, whether shardkit promises to answer them or not.

Each is answered as by one server, or refused. See `tests.property.supported` for those that must
be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    Integer,
    String,
    and_,
    exists,
    func,
    inspect,
    literal,
    not_,
    or_,
    select,
    true,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on
from sqlalchemy.orm import aliased, join, outerjoin

from tests.property.parts import (
    Dice,
    columns_of,
    direction,
    finished,
    limited,
    model_of,
    pairs,
    selected,
    simple_condition,
    total_order,
)

__all__ = ["KINDS", "Made", "statement"]

Made = tuple[Any, bool]
"""A statement, and whether the order of its rows counts."""


def _matching(d: Dice, a: Any, b: Any) -> Any:
    """Return a condition between two entities, usually on keys."""
    kind = d.upto(9)
    on_keys = _on_keys(d, a, b)
    if kind < 6:
        return on_keys
    other = d.column([a])
    if kind < 8:
        return other == d.twin(other, [b])
    if kind == 8:
        number = d.quantity([a])
        return or_(on_keys, number < d.twin(number, [b]))
    return and_(on_keys, d.pinned(d.pick(a, b)))


def _on_keys(d: Dice, a: Any, b: Any) -> Any:
    """Return an equality of placing columns, usually of two that place by one rule."""
    together = pairs(a, b)
    if together and d.chance(85):
        return d.pick(*together)
    column = d.key(a)
    return column == d.twin(column, [b])


def _condition(d: Dice, scope: Sequence[Any], depth: int = 2) -> Any:
    """Return a condition on entities in scope; deeper ones nest."""
    scope = [one for one in scope if model_of(one) is not d.schema.reference]
    kind = d.upto(15 if depth else 5)
    if kind == 0:
        return d.pinned(d.pick(*scope))
    if kind < 6:
        return simple_condition(d, scope, 0)
    if kind in (6, 7):
        return d.pick(and_, or_)(_condition(d, scope, depth - 1), _condition(d, scope, depth - 1))
    if kind == 8:
        return not_(_condition(d, scope, depth - 1))
    if kind == 9:
        return _related(d, scope, depth)
    inner = _subselect(d, scope, depth - 1)
    if kind < 13:
        return exists(inner) if d.chance(50) else ~exists(inner)
    if kind < 15:
        column = d.twin(inner.selected_columns[0], scope)
        return column.in_(inner) if d.chance(60) else column.not_in(inner)
    return _counted(inner) > d.upto(2)


def _related(d: Dice, scope: Sequence[Any], depth: int) -> Any:
    links = [(one, *link) for one in scope for link in d.schema.links[model_of(one)]]
    if not links:
        return simple_condition(d, scope, 0)
    one, name, target = d.pick(*links)
    attribute = getattr(one, name)
    inner = _condition(d, [target], depth - 1)
    return attribute.any(inner) if inspect(model_of(one)).relationships[name].uselist else (
        attribute.has(inner)
    )  # fmt: skip


def _subselect(d: Dice, scope: Sequence[Any], depth: int) -> Any:
    """Return a SELECT of one column, usually correlated, over one or two entities."""
    inner = d.entity()
    around = [one for one in scope if model_of(one) is not d.schema.reference]
    own = [inner]
    found = select(d.key(inner) if d.chance(70) else d.column([inner]))
    if d.chance(25):
        other = d.beside(own)
        own.append(other)
        on = _matching(d, inner, other)
        found = found.select_from(inner).join(other, on, isouter=d.chance(40))
    for percent in (75, 15):
        if d.chance(percent):
            found = found.where(_matching(d, d.pick(*own), d.pick(*around)))
    if d.chance(40):
        found = found.where(_condition(d, own, depth))
    if d.chance(10):
        found = found.order_by(found.selected_columns[0]).limit(1 + d.upto(2))
    return found.distinct() if d.chance(10) else found


def _counted(inner: Any) -> Any:
    only = inner.with_only_columns(func.count(), maintain_column_froms=True)
    return only.order_by(None).scalar_subquery()


def _narrowed(d: Dice, statement: Any, scope: Sequence[Any]) -> Any:
    """Add conditions, often ones that confine."""
    sharded = [one for one in scope if model_of(one) is not d.schema.reference]
    if d.chance(55):
        statement = statement.where(d.pinned(d.pick(*sharded)))
    for _ in range(d.upto(2)):
        statement = statement.where(_condition(d, sharded))
    return statement


def _columns(d: Dice, scope: Sequence[Any]) -> list[Any]:
    chosen = selected(d, scope)
    if d.chance(15):
        chosen.append((d.column(scope, Integer) + 1).label("next"))
    if d.chance(12):
        chosen.append(_counted(_subselect(d, scope, 0)).label("n_found"))
    if d.chance(5):
        chosen.append(exists(_subselect(d, scope, 0)).label("any"))
    return chosen


# -- statements, by kind


def _filter(d: Dice) -> Made:
    scope = [d.entity()]
    return finished(d, _narrowed(d, select(*_columns(d, scope)), scope), scope)


def _join(d: Dice) -> Made:
    scope = [d.entity()]
    if d.chance(25):
        root = aliased(d.schema.root)
        scope = [root, d.schema.leaf]
        statement = select(*_columns(d, scope)).select_from(root)
        statement = statement.join(root.leaves, isouter=d.chance(40))
        return finished(d, _narrowed(d, statement, scope), scope)
    scope.append(d.beside(scope))
    statement = select(*_columns(d, scope)).select_from(scope[0])
    on = _matching(d, scope[0], scope[1])
    mode = d.upto(9)
    if mode < 3:
        statement = statement.join(scope[1], on)
    elif mode < 6:
        statement = statement.outerjoin(scope[1], on)
    elif mode < 7:
        statement = statement.outerjoin(scope[1], on, full=True)
    else:
        statement = select(*_columns(d, scope)).where(on)
    if mode < 7 and d.chance(30):
        third = d.beside(scope)
        on = _matching(d, third, d.pick(*scope))
        if d.chance(30):
            on = and_(on, _matching(d, third, scope[0]))
        statement = statement.join(third, on, isouter=d.chance(50))
        scope.append(third)
    return finished(d, _narrowed(d, statement, scope), scope)


def _nested_join(d: Dice) -> Made:
    models = d.schema.models
    scope = [d.entity(), aliased(d.pick(*models)), aliased(d.pick(*models))]
    first, second, third = scope
    inner_on = _matching(d, second, third)
    if d.chance(40):
        inner_on = and_(inner_on, d.pinned(d.pick(second, third)))
    inner_join: Any = d.pick(join, outerjoin)
    inner = inner_join(second, third, inner_on)
    on = _matching(d, first, d.pick(second, third))
    outer: Any = d.pick(join, outerjoin, outerjoin)
    source = outer(inner, first, on) if d.chance(30) else outer(first, inner, on)
    if d.chance(15):
        source = outerjoin(first, inner, on, full=True)
    statement = select(*_columns(d, scope)).select_from(source)
    return finished(d, _narrowed(d, statement, scope), scope)


def _reference(d: Dice) -> Made:
    land = d.schema.reference
    one = d.entity()
    scope = [one, land] if d.chance(60) else [land, one]
    if d.chance(15):
        found = exists().where(one.label == land.code, _condition(d, [one], 1))
        return finished(d, select(land).where(found), [land])
    statement = select(*_columns(d, scope)).select_from(scope[0])
    statement = statement.join(
        scope[1], one.label == land.code, isouter=d.chance(50), full=d.chance(10)
    )
    return finished(d, _narrowed(d, statement, scope), scope)


def _subquery(d: Dice) -> Made:
    scope = [d.entity()]
    if d.chance(25):
        inner, other = _subselect(d, [d.schema.root], 1), _subselect(d, [d.schema.root], 0)
        asked = d.pick(exists(inner), _counted(inner), ~exists(inner))
        if d.chance(40):
            return select(asked, d.pick(exists(other), ~exists(other)).label("other")), False
        number = func.sum(d.quantity(scope))
        return _narrowed(d, select(*d.pick((asked,), (asked, number))), scope), False
    if d.chance(30):
        scope.append(d.beside(scope))
    statement = select(*_columns(d, scope))
    if len(scope) == 2 and d.chance(60):
        statement = statement.where(_on_keys(d, scope[0], scope[1]))
    inner = _subselect(d, scope, 1)
    column = d.twin(inner.selected_columns[0], scope)
    clause = d.pick(exists(inner), ~exists(inner), column.in_(inner), column.not_in(inner))
    return finished(d, _narrowed(d, statement.where(clause), scope), scope)


def _inner(d: Dice, inner: Any, around: Any) -> tuple[Any, bool]:
    """Return a SELECT to stand in FROM, and whether it is lateral."""
    kind = d.upto(9)
    some = columns_of(inner)
    keys = [getattr(inner, c.key) for c in inspect(model_of(inner)).primary_key]
    found = select(*[c.label(f"d_{c.key}") if d.chance(40) else c for c in some])
    if kind == 1:
        found = select(some[0], func.count().label("counted")).group_by(some[0])
    if d.chance(30):
        found = found.where(d.pinned(inner))
    if d.chance(20):
        found = found.where(_condition(d, [inner], 1))
    if kind == 0:
        found = found.where(_matching(d, inner, around))
    if kind in (0, 2, 3):
        found = found.order_by(*keys).limit(1 + d.upto(2))
    if kind == 4:
        found = found.add_columns(func.row_number().over(order_by=keys).label("counted"))
    if kind == 5:
        found = found.ext(distinct_on(some[-1])).order_by(some[-1], *keys)
    return found, kind == 0


def _derived(d: Dice) -> Made:
    scope = [d.entity()]
    inner = d.entity()
    found, is_lateral = _inner(d, inner, scope[0])
    table: Any = found.lateral() if is_lateral else d.pick(found.subquery, found.cte)()
    if d.chance(20):
        table = table.alias()
    first, *_ = table.c
    keys = d.schema.keys[model_of(inner)]
    passed = [
        c for c in table.c
        if c.key.removeprefix("d_") in keys or (c.key != "counted" and d.chance(5))
    ] or [first]  # fmt: skip
    chosen = _columns(d, scope) if d.chance(60) else []
    statement = select(*chosen, first) if d.chance(50) else select(*chosen, *table.c)
    key = d.key(scope[0])
    on = true() if is_lateral else key == d.twin_of(key, passed)
    mode = d.upto(9)
    if mode < 4 or is_lateral:
        statement = statement.select_from(scope[0]).join(table, on, isouter=d.chance(30))
    elif mode < 6:
        statement = statement.select_from(scope[0]).outerjoin(table, on)
    elif mode < 7:
        statement = statement.select_from(table).outerjoin(scope[0], on)
    elif mode < 8 and not chosen:
        scope = []
    elif mode < 9:
        statement = select(*_columns(d, scope)).where(key.in_(select(d.twin_of(key, passed))))
    else:
        other = table.alias()
        statement = select(*other.c).select_from(table).join(
            other, first == other.c[first.key], isouter=d.chance(50)
        )  # fmt: skip
        if d.chance(50):
            statement = statement.where(
                exists(select(table.c[first.key]).where(first.is_not(None)))
            )
        scope = []
    return (_narrowed(d, statement, scope) if scope else statement), False


def _union(d: Dice) -> Made:
    parts, outer = [], d.entity()
    key = d.key(outer)
    for _ in range(2):
        one = d.entity()
        parts.append(_narrowed(d, select(d.twin_of(key, columns_of(one)).label("x")), [one]))
    together = d.pick(union, union_all)(*parts)
    mode = d.upto(9)
    if mode < 2:
        return _narrowed(d, select(outer).where(key.in_(together)), [outer]), False
    if mode < 4:
        inside = together.subquery()
        found = select(outer, inside.c.x).join(inside, inside.c.x == key)
        return _narrowed(d, found, [outer]), False
    return together, False


def _aggregate(d: Dice) -> Made:
    scope = [d.entity()]
    if d.chance(30):
        scope.append(d.beside(scope))
    grouped = [d.column(scope) for _ in range(d.upto(2))]
    chosen: list[Any] = [*grouped]
    for i in range(1 + d.upto(2)):
        column, number = d.column(scope), d.column(scope, Integer)
        made = d.pick(
            func.count(), func.count(column), func.sum(d.quantity(scope)), func.min(number),
            func.max(number), func.count(column.distinct()), func.avg(d.quantity(scope)),
            func.bool_and(number > 2), func.bool_or(number == 2), func.avg(number * -3),
            _collected(d, scope),
        )  # fmt: skip
        if d.chance(25):
            made = made.filter(_condition(d, scope, 1))
        chosen.append(made.label(f"a{i}") if d.chance(50) else made)
    statement = select(*chosen).select_from(scope[0])
    if len(scope) == 2:
        on = _matching(d, scope[0], scope[1])
        statement = statement.join(scope[1], on, isouter=d.chance(40))
    statement = _narrowed(d, statement.group_by(*grouped), scope)
    if d.chance(30):
        statement = statement.having(having(d, scope, grouped))
    if grouped and d.chance(60):
        last = [column.desc() if d.chance(50) else column for column in grouped]
        some = [chosen[-1].desc()] if d.chance(50) else []
        return limited(d, statement.order_by(*some, *last)), True
    return statement, False


def _collected(d: Dice, scope: Sequence[Any]) -> Any:
    """Return an array_agg or string_agg that has an order."""
    if d.chance(20):
        made = func.string_agg(d.column(scope, String), d.pick("", ", "))
    elif d.chance(20):
        column = d.column(scope)
        return func.array_agg(aggregate_order_by(column.distinct(), direction(d, column)))
    else:
        made = func.array_agg(d.column(scope))
    return made.aggregate_order_by(*total_order(d, scope))


def having(d: Dice, scope: Sequence[Any], grouped: Sequence[Any]) -> Any:
    """Return a condition on groups."""
    column = d.column(scope, Integer)
    tests = [
        func.count() > d.upto(3), func.sum(column) <= d.upto(9), func.avg(column) >= d.upto(3),
        func.max(column).is_(None), not_(func.min(column) != 1),
        *(one == d.value(one) for one in grouped), *(one.is_not(None) for one in grouped),
    ]  # fmt: skip
    first, second = d.pick(*tests), d.pick(*tests)
    return d.pick(first, and_(first, second), or_(first, second), not_(or_(first, second)))


def _distinct(d: Dice) -> Made:
    scope = [d.entity()]
    return _narrowed(d, select(*_columns(d, scope)).distinct(), scope), False


def _window(d: Dice) -> Made:
    scope = [d.entity()]
    ranked: Any = d.pick(func.row_number(), func.rank(), func.count())
    over = ranked.over(order_by=total_order(d, scope))
    if d.chance(50):
        return _narrowed(d, select(*_columns(d, scope), over), scope), False
    statement = select(*_columns(d, scope), literal(1).label("one"))
    return _narrowed(d, statement, scope).order_by(over.desc(), *total_order(d, scope)), True


KINDS: Final[Mapping[str, Callable[[Dice], Made]]] = {
    "filter": _filter,
    "join": _join,
    "nested join": _nested_join,
    "reference table": _reference,
    "subquery": _subquery,
    "derived table": _derived,
    "union": _union,
    "aggregate": _aggregate,
    "distinct": _distinct,
    "window": _window,
}
_WEIGHTED = [*KINDS, "filter", "join", "join", "subquery", "subquery", "derived table", "aggregate"]


def statement(d: Dice) -> tuple[str, Any, bool]:
    """Return a kind, a statement of it, and whether the order of its rows counts."""
    kind = d.pick(*_WEIGHTED)
    return kind, *KINDS[kind](d)
