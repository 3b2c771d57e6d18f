"""The supported grammar: what is promised to be answered, and what to be refused, by shape.

`SHAPES` is the support matrix that docs/statements.md shows. A statement of a shape that is
promised is never refused, whatever it is made of; `tests.property.refusals` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    Double,
    Integer,
    Numeric,
    String,
    and_,
    case,
    exists,
    func,
    inspect,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import aliased

from shardkit import all_shards
from tests.property.grammar import Made, having
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

__all__ = ["ANSWERED", "Shape", "co_located", "confined"]


@dataclass(frozen=True)
class Shape:
    """One row of the support matrix.

    Attributes:
        name: the first column of the table.
        make: makes a statement for one logical shard or, if told so, for several.
        one: whether it is answered on one logical shard.
        several: whether it is answered over several.
        remark: the last column.
    """

    name: str
    make: Callable[[Dice, bool], Made]
    one: bool = True
    several: bool = True
    remark: str = ""

    @property
    def row(self) -> str:
        """The row of the table in Markdown."""
        cells = (
            self.name,
            _word(is_answered=self.one),
            _word(is_answered=self.several),
            self.remark,
        )
        return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _word(*, is_answered: bool) -> str:
    return "answered" if is_answered else "refused"


# -- where rows lie


def co_located(d: Dice, one: Any) -> tuple[Any, Any]:
    """Return another entity and the condition that its rows lie with those of the first."""
    models = [model for model in d.schema.models if pairs(one, model)]
    other = aliased(d.pick(*models))
    on = d.pick(*pairs(one, other))
    return other, (and_(on, simple_condition(d, [one, other], 1)) if d.chance(30) else on)


def confined(d: Dice, statement: Any, one: Any, *, several: bool, lists: int = 30) -> Any:
    """Send a statement to one logical shard, or to several, so often by a list of keys."""
    if not several:
        column = d.key(one)
        value = d.value(column)
        return statement.where(d.pick(column == value, column.in_([value])))
    if d.chance(lists):
        column = d.key(one)
        statement = statement.where(column.in_(d.some(d.world.pool(column), least=1, most=5)))
    return statement.options(all_shards())


def _filtered(d: Dice, statement: Any, scope: Sequence[Any]) -> Any:
    for _ in range(d.upto(2)):
        statement = statement.where(simple_condition(d, scope))
    return statement


def _chosen(d: Dice, statement: Any, scope: Sequence[Any], *, several: bool) -> Made:
    statement = confined(d, _filtered(d, statement, scope), scope[0], several=several)
    return finished(d, statement, scope)


# -- shapes that are answered everywhere


def _filter(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    return _chosen(d, select(*selected(d, scope)), scope, several=several)


def _keys(d: Dice, several: bool) -> Made:
    one = d.entity()
    column = d.key(one)
    values = d.some(d.world.pool(column), most=5 if several else 1)
    statement = select(*selected(d, [one])).where(column.in_(values))
    return finished(d, _filtered(d, statement, [one]), [one])


def _expressions(d: Dice, several: bool) -> Made:
    one = d.entity()
    number, any_column = d.column([one], Integer), d.column([one])
    chosen = [
        (number + 1).label("a"), (number * 2 - 1).label("b"), func.coalesce(number, 0).label("c"),
        case((any_column.is_(None), 1), else_=2).label("d"), func.lower(one.label).label("e"),
        any_column.is_(None).label("f"), func.length(one.label).label("g"), func.abs(number),
        (one.label + "!").label("h"),
    ]  # fmt: skip
    statement = select(*d.some(chosen, least=1), *selected(d, [one]))
    return _chosen(d, statement, [one], several=several)


def _join(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    other, on = co_located(d, scope[0])
    outer = d.chance(40)
    source: Any = select(*selected(d, [*scope, other])).select_from(scope[0])
    source = source.join(other, on, isouter=outer)
    scope.append(other)
    if d.chance(30):
        third, on = co_located(d, scope[0])
        source = source.join(third, on, isouter=d.chance(50))
        scope.append(third)
    return _chosen(d, source, scope, several=several)


def _relationship(d: Dice, several: bool) -> Made:
    root, leaf = d.schema.root, d.schema.leaf
    if d.chance(50):
        statement = select(*selected(d, [root, leaf])).join(root.leaves, isouter=d.chance(40))
        return _chosen(d, statement, [root, leaf], several=several)
    if d.chance(50):
        found = leaf.parent.has(simple_condition(d, [root], 1))
        statement, one = select(*selected(d, [leaf])), leaf
    else:
        found = root.leaves.any(simple_condition(d, [leaf], 1))
        statement, one = select(*selected(d, [root])), root
    return _chosen(d, statement.where(found if d.chance(60) else ~found), [one], several=several)


def _full_join(d: Dice, several: bool) -> Made:
    one = d.entity()
    other = aliased(d.pick(*[model for model in d.schema.models if pairs(one, model)]))
    statement = select(*selected(d, [one, other])).select_from(one)
    statement = statement.join(other, d.pick(*pairs(one, other)), full=True)
    return _chosen(d, statement, [one, other], several=several)


def _reference(d: Dice, several: bool) -> Made:
    one, land = d.entity(), d.schema.reference
    statement = select(*selected(d, [one, land])).select_from(one)
    statement = statement.join(land, one.label == land.code, isouter=d.chance(50))
    return _chosen(d, statement, [one, land], several=several)


def _exists(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner, on = co_located(d, one)
    found = select(d.pick(*columns_of(inner))).where(on)
    if d.chance(25):
        _, on = co_located(d, inner)
        more = exists().where(on)
        found = found.where(more if d.chance(60) else ~more)
    clause: Any = exists(_filtered(d, found, [inner]))
    clause = clause if d.chance(50) else ~clause
    if d.chance(20):
        clause = or_(clause, simple_condition(d, [one], 0))
    return _chosen(d, select(*selected(d, [one])).where(clause), [one], several=several)


def _in_select(d: Dice, several: bool) -> Made:
    one = d.entity()
    other = aliased(d.pick(*[model for model in d.schema.models if pairs(one, model)]))
    on = d.pick(*pairs(one, other))
    inner = _filtered(d, select(on.right), [other])
    return _chosen(d, select(*selected(d, [one])).where(on.left.in_(inner)), [one], several=several)


def _in_correlated(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner, on = co_located(d, one)
    column = d.column([inner])
    found = select(column).where(on)
    left = d.twin(column, [one])
    if left is column:  # nothing of the row can be compared with it
        left, found = one.n, found.with_only_columns(inner.n)
    clause = left.in_(found) if d.chance(50) else left.not_in(found)
    return _chosen(d, select(*selected(d, [one])).where(clause), [one], several=several)


def _scalar(d: Dice, several: bool) -> Made:
    one = d.entity()
    inner, on = co_located(d, one)
    number = d.column([inner], Integer)
    made = d.pick(func.count(), func.max(number), func.sum(number))
    value = select(made).select_from(inner).where(on).scalar_subquery()
    if d.chance(50):
        return _chosen(
            d, select(*selected(d, [one])).where(value > d.upto(2)), [one], several=several
        )
    return _chosen(d, select(*selected(d, [one]), value.label("x")), [one], several=several)


def _order(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    statement = select(*selected(d, scope)).order_by(*total_order(d, scope, 1))
    if d.chance(40):
        statement = _filtered(d, statement, scope)
    return confined(d, limited(d, statement), scope[0], several=several), True


def _keyset(d: Dice, several: bool) -> Made:
    one = d.entity()
    keys = [getattr(one, c.key) for c in inspect(model_of(one)).primary_key]
    columns = [c.collate("C") if isinstance(c.type, String) else c for c in keys]
    values = [d.value(c) for c in keys]
    up = d.chance(50)
    first = d.column([one], Integer, Numeric)
    if d.chance(50):
        this, that = tuple_(*columns), tuple_(*values)
        page = this > that if up else this < that
    else:
        value = d.value(first)
        last = [c > v if up else c < v for c, v in zip(columns, values, strict=True)]
        page = or_(first > value if up else first < value, and_(first == value, last[0]))
        columns = [first, *columns]
    order = [c.asc() if up else c.desc() for c in columns]
    statement = select(*selected(d, [one])).where(page).order_by(*order).limit(1 + d.upto(5))
    return confined(d, statement, one, several=several), True


def _distinct(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    # Equal floats and numbers may look different; which one is shown is nobody's promise.
    columns = [c for c in columns_of(scope[0]) if "float" not in c.key]
    chosen = d.some(columns, least=1)
    statement = confined(
        d, _filtered(d, select(*chosen).distinct(), scope), scope[0], several=several
    )
    sortable = [c.collate("C") if isinstance(c.type, String) else c for c in chosen]
    if any(isinstance(c.type, String) for c in chosen) or d.chance(50):
        return statement, False
    return limited(d, statement.order_by(*[d.pick(c.asc(), c.desc()) for c in sortable])), True


def _existence(d: Dice, several: bool) -> Made:
    asked = []
    for i in range(1 + d.upto(1)):
        one = d.entity()
        inner: Any = select(d.pick(*columns_of(one), one, literal_column("1")))
        if d.chance(30):
            other, on = co_located(d, one)
            inner = inner.select_from(one).join(other, on, isouter=d.chance(40))
        inner = confined(d, _filtered(d, inner, [one]).select_from(one), one, several=several)
        if d.chance(20):
            inner = d.pick(
                inner.limit(d.upto(1)), inner.with_only_columns(one.n).group_by(one.n),
                inner.with_only_columns(func.count(one.n)), inner.distinct(),
            )  # fmt: skip
        found = d.pick(exists(inner), inner.exists(), ~exists(inner))
        asked.append(found.label(f"x{i}") if d.chance(50) else found)
        if not several:
            break
    if d.chance(25):
        one = d.entity()
        other = aliased(one)
        counted = select(*_aggregates(d, [other])).select_from(other)
        if several:
            return confined(d, counted.add_columns(*asked), other, several=True), False
    statement = select(*asked)
    return (statement.options(all_shards()) if several else statement), False


def _collected(d: Dice, several: bool) -> Made:
    one = d.entity()
    order = total_order(d, [one])
    anything = d.column([one])
    made: list[Any] = [
        func.array_agg(anything).aggregate_order_by(*order),
        func.array_agg(aggregate_order_by(d.pick(*columns_of(one)), *order)),
        func.array_agg(d.column([one])).aggregate_order_by(*order).filter(
            simple_condition(d, [one], 1)),
        func.string_agg(one.label, d.pick("", ", ")).aggregate_order_by(*order),
        func.string_agg(one.label, aggregate_order_by(literal("/"), *order)).filter(
            simple_condition(d, [one], 1)),
    ]  # fmt: skip
    chosen = [column.label(f"a{i}") for i, column in enumerate(d.some(made, least=1))]
    bag = func.array_agg(d.pick(*columns_of(one)))
    exact = [c for c in columns_of(one) if not isinstance(c.type, Numeric | Double)]
    some = d.pick(*exact)
    sortable = some.collate("C") if isinstance(some.type, String) else some
    once: Any = func.array_agg(some.distinct())
    if d.chance(50):
        once = func.array_agg(sortable.distinct()).aggregate_order_by(direction(d, some))
    chosen += [c.label(f"bag{i}") for i, c in enumerate(d.some([bag, once]))]
    grouped = [d.pick(*exact)] if d.chance(50) else []
    statement = select(*grouped, *chosen).select_from(one).group_by(*grouped)
    return confined(d, _filtered(d, statement, [one]), one, several=several), False


def _filter_of_aggregates(d: Dice, several: bool) -> Made:
    one = d.entity()
    made = [a.element.filter(simple_condition(d, [one], 1)) for a in _aggregates(d, [one])]
    chosen = [a.label(f"a{i}") for i, a in enumerate(made)]
    statement = confined(d, select(*chosen).select_from(one), one, several=several)
    return (statement.having(d.pick(*made).is_not(None)) if d.chance(20) else statement), False


def _between(d: Dice, several: bool) -> Made:
    one = d.entity()
    column = d.key(one)
    values = [d.value(column), d.value(column)]
    condition = column.between(*values, symmetric=d.chance(20))
    statement = select(*selected(d, [one])).where(condition if d.chance(80) else ~condition)
    return _chosen(d, statement, [one], several=several)


def _stream(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    if d.chance(30):
        other, on = co_located(d, scope[0])
        scope.append(other)
        statement = select(*selected(d, scope)).select_from(scope[0]).join(other, on)
    else:
        statement = select(*selected(d, scope))
    made, is_ordered = _chosen(d, statement, scope, several=several)
    return made.execution_options(yield_per=1 + d.upto(4)), is_ordered


def _aggregates(d: Dice, scope: Sequence[Any]) -> list[Any]:
    number, anything = d.column(scope, Integer, Numeric), d.column(scope)
    sortable = d.column(scope, Integer, Numeric)
    made = [
        func.count(), func.count(anything), func.sum(number), func.avg(number),
        func.min(sortable), func.max(sortable), func.bool_and(number > 1),
        func.bool_or(number <= 2), func.sum(number * 2), func.avg(number + 1),
    ]  # fmt: skip
    return [one.label(f"a{i}") for i, one in enumerate(d.some(made, least=1))]


def _whole(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    statement = select(*_aggregates(d, scope)).select_from(scope[0])
    if d.chance(30):
        other, on = co_located(d, scope[0])
        statement = statement.join(other, on)
    statement = confined(d, _filtered(d, statement, scope), scope[0], several=several)
    return (statement.having(having(d, scope, [])) if d.chance(20) else statement), False


def _group(d: Dice, several: bool) -> Made:
    scope = [d.entity()]
    columns = [c for c in columns_of(scope[0]) if "float" not in c.key]
    grouped = d.some(columns, least=1, most=2)
    chosen = _aggregates(d, scope)
    statement = select(*grouped, *chosen).select_from(scope[0])
    if d.chance(30):
        other, on = co_located(d, scope[0])
        statement = statement.join(other, on, isouter=d.chance(40))
    statement = statement.group_by(*grouped)
    statement = confined(d, _filtered(d, statement, scope), scope[0], several=several)
    if d.chance(40):
        numbers = [c for c in grouped if isinstance(c.type, Integer | Boolean)]
        statement = statement.having(having(d, scope, numbers))
    if d.chance(50):
        return statement, False
    order = [c.collate("C") if isinstance(c.type, String) else c for c in grouped]
    if any(isinstance(c.type, String) for c in grouped):
        return statement, False
    some = [d.pick(*chosen).element.desc()] if d.chance(50) else []
    return limited(d, statement.order_by(*some, *order)), True


def _impossible(d: Dice, several: bool) -> Made:  # noqa: ARG001 - as every shape
    one = d.entity()
    column = d.key(one)
    statement = select(*selected(d, [one])).where(column.in_([]))
    return statement.where(d.pick(true(), not_(simple_condition(d, [one], 1)))), False


ANSWERED: Final[tuple[Shape, ...]] = (
    Shape("columns and entities with conditions", _filter,
          remark="comparisons, `IN`, `BETWEEN`, `LIKE`, `IS NULL`, row values, `AND`, `OR`, `NOT`"),
    Shape("`IN` with a list of shard keys", _keys,
          remark="needs no `all_shards()`; each logical shard gets its own keys"),
    Shape("a list of keys without any", _impossible, remark="no row; one logical shard says so"),
    Shape("expressions in the columns", _expressions,
          remark="operators, `CASE`, `coalesce`, and functions of one row"),
    Shape("join, left join on the shard key", _join,
          remark="any two placing columns of one rule; `all_shards()` starts from a sharded table"),
    Shape("full join on the shard key", _full_join, remark="nothing else in `ON`"),
    Shape("joins and `any()`, `has()` along relationships", _relationship,
          remark="of classes that lie together"),
    Shape("join with a reference table", _reference, remark="the sharded table on the left"),
    Shape("`EXISTS`, `NOT EXISTS` on the shard key", _exists, remark="nested ones too"),
    Shape("shard key `IN (SELECT shard key …)`", _in_select, remark=""),
    Shape("`IN`, `NOT IN` of a subquery on the shard key", _in_correlated,
          remark="correlated by the shard key in its `WHERE`"),
    Shape("scalar subquery on the shard key", _scalar,
          remark="correlated by the shard key; also as a column"),
    Shape("`ORDER BY`, `LIMIT`, `OFFSET`", _order,
          remark="either way, `NULLS FIRST` or `LAST`; text in the C collation"),
    Shape("keyset pages", _keyset, remark="row values or `OR`; text in the C collation"),
    Shape("`DISTINCT`", _distinct, remark="`ORDER BY` what is selected"),
    Shape("`count`, `sum`, `avg`, `min`, `max`, `bool_and`, `bool_or`", _whole,
          remark="alone in their columns; sums of exact numbers, `min` and `max` not of text"),
    Shape("`EXISTS`, `NOT EXISTS` as columns, of any rows", _existence,
          remark="alone or beside aggregates; no `GROUP BY` around, inside no `HAVING`, `OFFSET`"),
    Shape("`array_agg`, `string_agg`", _collected,
          remark="`ORDER BY` as above; without, in no defined order; `DISTINCT`"),
    Shape("aggregates with `FILTER`", _filter_of_aggregates),
    Shape("`BETWEEN` on the shard key", _between),
    Shape("`yield_per`", _stream, remark="rows as they come, see below"),
    Shape("`GROUP BY`, `HAVING`", _group, remark="`HAVING` compares aggregates and groups"),
)  # fmt: skip
"""Shapes that are answered on any number of logical shards."""
