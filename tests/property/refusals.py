"""Shapes that are not answered everywhere: refused over several logical shards, or always."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Double, Integer, exists, func, literal, select, text, true, union_all
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on
from sqlalchemy.orm import aliased

from shardkit import all_shards
from tests.property.grammar import Made
from tests.property.parts import (
    Dice,
    columns_of,
    model_of,
    pairs,
    selected,
    simple_condition,
    total_order,
)
from tests.property.supported import ANSWERED, Shape, co_located, confined

__all__ = ["REFUSED", "SHAPES"]


def _text_order(d: Dice, several: bool) -> Made:
    one = d.entity()
    order = (one.label, *total_order(d, [one]))
    return confined(
        d, select(*selected(d, [one])).order_by(*order), one, several=several, lists=0
    ), True


def _counted_once(d: Dice, several: bool) -> Made:
    one = d.entity()
    made = func.count(d.column([one]).distinct())
    return confined(
        d, select(made.label("x")).select_from(one), one, several=several, lists=0
    ), False


def _floats(d: Dice, several: bool) -> Made:
    one = d.entity()
    number = d.column([one], Integer).cast(Double())
    made = d.pick(func.sum(number), func.avg(number))
    return confined(
        d, select(made.label("x")).select_from(one), one, several=several, lists=0
    ), False


def _packed(d: Dice, several: bool) -> Made:
    one = d.entity()
    made: Any = func.json_agg(aggregate_order_by(d.column([one], Integer), *total_order(d, [one])))
    return confined(
        d, select(made.label("x")).select_from(one), one, several=several, lists=0
    ), False


def _beside_existence(d: Dice, several: bool) -> Made:
    one, other = d.entity(), aliased(d.pick(*d.schema.models))
    if several:
        found = exists().where(simple_condition(d, [other]))
        return confined(d, select(*selected(d, [one]), found), one, several=True, lists=0), False
    found = exists().where(d.pick(*pairs(one, aliased(model_of(one)))))
    return confined(d, select(*selected(d, [one]), found), one, several=False), False


def _existing_groups(d: Dice, several: bool) -> Made:
    one = d.entity()
    groups = select(one.n).group_by(one.n).having(func.count() > d.upto(3))
    return select(exists(confined(d, groups, one, several=several, lists=0))).options(
        *([all_shards()] if several else [])
    ), False


def _computed(d: Dice, several: bool) -> Made:
    one = d.entity()
    made = (func.sum(d.column([one], Integer)) + 1).label("x")
    return confined(d, select(made).select_from(one), one, several=several, lists=0), False


def _window(d: Dice, several: bool) -> Made:
    one = d.entity()
    over = func.row_number().over(order_by=total_order(d, [one])).label("x")
    return confined(d, select(*selected(d, [one]), over), one, several=several, lists=0), False


def _distinct_on(d: Dice, several: bool) -> Made:
    one = d.entity()
    column = d.column([one])
    statement = select(*selected(d, [one])).ext(distinct_on(column))
    statement = statement.order_by(column, *total_order(d, [one]))
    return confined(d, statement, one, several=several, lists=0), False


def _fetch(d: Dice, several: bool) -> Made:
    one = d.entity()
    statement = select(*selected(d, [one])).order_by(*total_order(d, [one])).fetch(2)
    return confined(d, statement, one, several=several, lists=0), True


def _derived(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner = confined(d, select(*columns_of(one)), one, several=several, lists=0)
    outer = select(inner.subquery())
    return (outer.options(all_shards()) if several else outer), False


def _cte(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner = confined(d, select(*columns_of(one)), one, several=several, lists=0)
    outer = select(inner.cte())
    return (outer.options(all_shards()) if several else outer), False


def _lateral(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner, on = co_located(d, one)
    table = select(d.column([inner], Integer).label("x")).where(on).order_by(
        *total_order(d, [inner])).limit(1).lateral()  # fmt: skip
    statement = select(*selected(d, [one]), table.c.x).select_from(one).join(table, true())
    return confined(d, statement, one, several=several, lists=0), False


def _union(d: Dice, several: bool) -> Made:
    one = d.entity()
    part = select(columns_of(one)[0].label("x"), d.column([one]).label("y"))
    if several:
        return union_all(part, part).options(all_shards()), False
    part = confined(d, part, one, several=False)
    return union_all(part, part), False


def _beside_keys(d: Dice, several: bool) -> Made:
    one = d.entity()
    other = aliased(d.pick(*d.schema.models))
    statement = select(*selected(d, [one, other])).select_from(one)
    statement = statement.join(other, one.n == other.n)
    if several:
        return confined(d, statement, one, several=True, lists=0), False
    twins = [model for model in d.schema.models if pairs(one, model)]
    other = aliased(d.pick(*twins))
    pair = d.pick(*pairs(one, other))
    value = d.value(pair.left)
    statement = select(*selected(d, [one, other])).join_from(one, other, one.n == other.n)
    return statement.where(pair.left == value, pair.right == value), False


def _uncorrelated(d: Dice, several: bool) -> Made:
    one, other = d.entity(), aliased(d.pick(*d.schema.models))
    statement = select(*selected(d, [one])).where(one.n.in_(select(other.n)))
    return confined(d, statement, one, several=several, lists=0), False


def _sql_text(d: Dice, several: bool) -> Made:  # noqa: ARG001 - as every shape
    return text("SELECT 1"), False


def _nothing(d: Dice, several: bool) -> Made:  # noqa: ARG001 - as every shape
    return select(literal(1)), False


REFUSED: Final[tuple[Shape, ...]] = (
    Shape("`ORDER BY` text in another collation", _text_order, several=False,
          remark="servers and client order text alike in the C collation only"),
    Shape("`count(DISTINCT …)`", _counted_once, several=False,
          remark="select the distinct values and count them"),
    Shape("`sum`, `avg` of floats", _floats, several=False,
          remark="the last digits depend on the order of adding; cast to `Numeric`"),
    Shape("rows beside `EXISTS` of other rows", _beside_existence, several=False,
          remark="ask for it by itself"),
    Shape("`EXISTS` as a column, of groups that `HAVING` chooses", _existing_groups, several=False,
          remark="also after an `OFFSET`"),
    Shape("other aggregates", _packed, several=False, remark="`json_agg`, `stddev`, …"),
    Shape("expressions of aggregates", _computed, several=False, remark="compute in the client"),
    Shape("window functions", _window, several=False),
    Shape("`DISTINCT ON`", _distinct_on, several=False),
    Shape("`FETCH`", _fetch, several=False, remark="use `limit()`"),
    Shape("subquery in `FROM`", _derived, several=False),
    Shape("CTE", _cte, several=False, remark="recursive ones never"),
    Shape("`LATERAL`", _lateral, several=False),
    Shape("`UNION` and the like", _union, several=False, remark="run the parts one by one"),
    Shape("join on other columns", _beside_keys, several=False,
          remark="answered when keys confine both tables to one logical shard"),
    Shape("subquery that no shard key ties", _uncorrelated, one=False, several=False,
          remark="its rows may lie anywhere; read them first, pass them with `in_()`"),
    Shape("`text()`", _sql_text, one=False, several=False,
          remark='runs with `bind_arguments={"logical_shard": n}`'),
    Shape("no sharded table at all", _nothing, one=False, several=False, remark="the same"),
)  # fmt: skip
"""Shapes that are refused over several logical shards, if not always."""

SHAPES: Final = (*ANSWERED, *REFUSED)
"""The support matrix."""
