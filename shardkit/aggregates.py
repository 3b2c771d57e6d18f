"""Partial aggregates of several logical shards into whole ones: GROUP BY, HAVING, ORDER BY.

Pure. Every logical shard groups its own rows; groups with equal keys are joined here. `avg` is
computed from sums and counts with PostgreSQL's own rule for the digits of a quotient, HAVING and
ORDER BY are applied to the joined groups. What does not distribute over a union is refused.
"""

from __future__ import annotations

import decimal
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Integer,
    Numeric,
    Select,
    UnaryExpression,
    func,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import ColumnElement, False_, Grouping, Null, True_
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import iterate

from shardkit.arrays import COLLECTING, Call, call_of, list_of
from shardkit.existences import Existence, existences_of
from shardkit.ordering import (
    EQUATABLE_TYPES,
    Combine,
    Row,
    SortKey,
    alike,
    comparable,
    direction,
    ordering,
    refuse_unordered,
    refused,
    same,
)
from shardkit.shapes import unlabelled
from shardkit.statements import Params

__all__ = ["ROW_FUNCTIONS", "Aggregation", "aggregation", "is_aggregate"]

# Functions of one row. Any other may be an aggregate, which does not distribute over a union.
ROW_FUNCTIONS = frozenset((
    "abs", "cardinality", "ceil", "char_length", "coalesce", "date_part", "date_trunc", "extract",
    "floor", "greatest", "jsonb_array_length", "least", "length", "lower", "nullif", "round",
    "upper",
))  # fmt: skip

# As many digits as a numeric of PostgreSQL can have; infinities of both signs make NaN there too.
_EXACT: Final = decimal.Context(prec=150_000, traps=[])

Fold = Callable[[list[Row]], Any]
"""Makes one value of the rows of one group."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How a statement with aggregates runs over several logical shards.

    Attributes:
        branch: what each logical shard runs; it may have more columns than were asked for.
        combine: makes the final rows of the partial ones.
    """

    branch: Select[Any]
    combine: Combine


def is_aggregate(element: Any) -> bool:
    """Tell whether an expression is an aggregate that can be merged."""
    return _aggregate(element) is not None


def _aggregate(element: Any) -> Call | None:
    """Return the call of an aggregate that can be merged, or None for anything else."""
    call = call_of(element)
    return call if call is not None and call.name in _FOLDS.keys() | COLLECTING else None


def aggregation(
    statement: Select[Any], bare: Select[Any], params: Params, limit: int | None, offset: int | None
) -> Aggregation:
    """Decide how a statement with aggregates or GROUP BY is merged.

    Args:
        statement: what was asked.
        bare: the same without ORDER BY, LIMIT and OFFSET.
        params: the values passed with it.
        limit: rows to keep, or None for all.
        offset: rows to leave out first.

    Raises:
        UnsupportedStatementError: it cannot be merged exactly.
    """
    columns = _Columns([unlabelled(column) for column in statement._raw_columns], params)
    existences = existences_of(statement)
    grouped = [unlabelled(clause) for clause in statement._group_by_clauses]
    keys = [columns.position(clause) for clause in grouped]
    for i, existence in existences.items():
        columns.folds[i] = _found(i, existence)
    for i, column in enumerate(columns.asked):
        columns.show(i, column, is_grouped=i in keys)
    for clause in grouped:
        if not isinstance(clause.type, EQUATABLE_TYPES):
            raise refused(f"GROUP BY {clause} of type {clause.type}")
    keep = [_predicate(clause, columns, params) for clause in statement._having_criteria]
    order = [_sort_key(clause, columns) for clause in statement._order_by_clauses]
    finish = ordering(order, limit, offset)
    folds = columns.folds

    def combine(rows: list[Row]) -> list[Row]:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(same([row[i] for i in keys]), []).append(row)
        whole: list[Row] = []
        for parts in groups.values():
            joined = list(parts[0])
            for i, fold in folds.items():
                joined[i] = fold(parts)
            if all(test(joined) is True for test in keep):
                whole.append(tuple(joined))
        return finish(whole)

    branch = bare
    if statement._having_criteria:
        branch = branch._generate()
        branch._having_criteria = ()
    for i, column in enumerate(columns.added):
        branch = branch.add_columns(column.label(f"shardkit_part_{i}"))
    return Aggregation(branch, combine)


@dataclass(slots=True)
class _Columns:
    """The columns of the branch: those asked for, and those added to compute with."""

    asked: list[Any]
    params: Params
    added: list[ColumnElement[Any]] = field(default_factory=list)
    folds: dict[int, Fold] = field(default_factory=dict)

    def position(self, expression: Any) -> int:
        """Return where an expression stands, adding it when it does not."""
        for i, column in enumerate([*self.asked, *self.added]):
            if alike(column, expression):
                return i
        self.added.append(expression)
        return len(self.asked) + len(self.added) - 1

    def value(self, expression: Any) -> int:
        """Return the position of an aggregate or a grouped column whose whole value is needed."""
        known = any(alike(column, expression) for column in (*self.asked, *self.added))
        if not known and not is_aggregate(expression):
            raise refused(f"{expression} beside aggregates", "group by it")
        position = self.position(expression)
        if is_aggregate(expression):
            self.fold(position, expression)
        return position

    def show(self, position: int, column: Any, *, is_grouped: bool) -> None:
        """Say how the whole value of a column that was asked for is had."""
        if not isinstance(column, ColumnElement):
            raise refused("whole entities beside aggregates", "select their columns")
        if is_aggregate(column):
            self.fold(position, column)
        elif not is_grouped and position not in self.folds:
            raise refused(f"column {column} outside GROUP BY")

    def fold(self, position: int, aggregate: Any) -> None:
        """Say how the partial values of an aggregate are joined."""
        call = call_of(aggregate)
        assert call is not None, "the caller has looked"
        _refuse_undistributed(call)
        if call.name in COLLECTING:
            whole = list_of(call, lambda parameter: _value(parameter, self.params))
            places = [self.position(part) for part in whole.parts]
            self.folds[position] = lambda rows: whole.join([row[i] for i in places] for row in rows)
            return
        if call.name != "avg":
            join = _FOLDS[call.name]
            self.folds[position] = lambda rows: join(row[position] for row in rows)
            return
        (argument,) = call.arguments
        # The sum of floats depends on the order of adding, in its last digits.
        if not isinstance(argument.type, Integer | Numeric):
            raise refused(f"avg of type {argument.type}", "cast it to Numeric")
        total, count = (
            self.position(call.like(made)) for made in (func.sum(argument), func.count(argument))
        )
        self.folds[position] = lambda rows: _average(
            _sum(row[total] for row in rows), _sum(row[count] for row in rows)
        )


def _found(position: int, existence: Existence) -> Fold:
    return lambda rows: existence.whole(row[position] for row in rows)


def _refuse_undistributed(call: Call) -> None:
    for part in itertools.chain.from_iterable(map(iterate, call.expressions)):
        if isinstance(part, FunctionElement) and part.name.lower() not in ROW_FUNCTIONS:
            raise refused(f"{part.name}() inside {call.name}()")
        if call.name not in COLLECTING and (
            isinstance(part, UnaryExpression) and part.operator is operators.distinct_op
        ):
            raise refused(f"{call.name}(DISTINCT …) over several logical shards")
    if call.order and call.name not in COLLECTING:
        raise refused(f"ORDER BY inside {call.name}()", "leave it out; it changes nothing")
    if call.name in ("min", "max"):
        for argument in call.arguments:
            refuse_unordered(argument)
    if call.name == "sum" and not isinstance(call.function.type, Integer | Numeric):
        raise refused(f"sum of type {call.function.type}", "cast it to Numeric")


def _refuse_incomparable(expression: Any) -> None:
    """Refuse what server and client may compare differently."""
    call = _aggregate(expression)
    if call is None or call.name in {"min", "max", *COLLECTING}:
        refuse_unordered(expression)


def _sort_key(clause: Any, columns: _Columns) -> SortKey:
    expression, descending, nulls_first = direction(clause)
    _refuse_incomparable(expression)
    return SortKey(columns.value(expression), descending, nulls_first)


# -- joining partial values


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    with decimal.localcontext(_EXACT):
        return sum(known[1:], start=known[0]) if known else None


def _least(values: Iterable[Any]) -> Any:
    return min((v for v in values if v is not None), default=None, key=comparable)


def _greatest(values: Iterable[Any]) -> Any:
    return max((v for v in values if v is not None), default=None, key=comparable)


def _every(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return all(known) if known else None


def _some(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return any(known) if known else None


_FOLDS: Final[dict[str, Callable[[Iterable[Any]], Any]]] = {
    "count": _sum, "sum": _sum, "min": _least, "max": _greatest, "avg": _sum,
    "bool_and": _every, "every": _every, "bool_or": _some,
}  # fmt: skip


def _average(total: Any, count: int) -> Any:
    if total is None:
        return None
    return quotient(decimal.Decimal(total), count)


def quotient(total: decimal.Decimal, count: int) -> decimal.Decimal:
    """Return total / count, above 0, with the digits that PostgreSQL's numeric division gives.

    At least 16 significant digits, counted in groups of four from the decimal point, and never
    fewer decimal places than the dividend has. Source: `select_div_scale` in PostgreSQL's
    src/backend/utils/adt/numeric.c.
    """
    if not total.is_finite():
        return total
    weight, first = _leading_group(total)
    count_weight, count_first = _leading_group(decimal.Decimal(count))
    places = 16 - 4 * (weight - count_weight - (first <= count_first))
    places = min(max(places, -int(total.as_tuple().exponent), 0), 1000)
    # In whole numbers, so that nothing is rounded but the last digit: half away from zero.
    whole, rest = divmod(int(total.copy_abs().scaleb(places, _EXACT)), count)
    whole += 2 * rest >= count
    return decimal.Decimal(whole).copy_sign(total).scaleb(-places, _EXACT)


def _leading_group(value: decimal.Decimal) -> tuple[int, int]:
    """Return power of 10,000 and value of the first group of four digits, aligned at the point."""
    if not value:
        return 0, 0
    weight = value.adjusted() // 4
    return weight, int(value.copy_abs().scaleb(-4 * weight, _EXACT))


# -- HAVING

Test = Callable[[Row], bool | None]

_COMPARISONS: Final[dict[Any, Callable[[Any, Any], bool]]] = {
    operators.eq: operator.eq, operators.ne: operator.ne, operators.lt: operator.lt,
    operators.le: operator.le, operators.gt: operator.gt, operators.ge: operator.ge,
}  # fmt: skip


def _predicate(clause: Any, columns: _Columns, params: Params) -> Test:
    """Return a HAVING condition over joined rows: true, false, or None for unknown."""
    if isinstance(clause, Grouping):
        return _predicate(clause.element, columns, params)
    if isinstance(clause, BooleanClauseList):
        parts = [_predicate(part, columns, params) for part in clause.clauses]
        if clause.operator is operators.and_:
            return lambda row: _all([part(row) for part in parts])
        if clause.operator is operators.or_:
            return lambda row: _not(_all([_not(part(row)) for part in parts]))
    if isinstance(clause, UnaryExpression) and clause.operator is operators.inv:
        inner = _predicate(clause.element, columns, params)
        return lambda row: _not(inner(row))
    if isinstance(clause, BinaryExpression):
        left = _operand(clause.left, columns, params)
        if clause.operator in _COMPARISONS:
            compare = _COMPARISONS[clause.operator]
            right = _operand(clause.right, columns, params)

            def test(row: Row) -> bool | None:
                a, b = left(row), right(row)
                if a is None or b is None:
                    return None
                if isinstance(a, float) or isinstance(b, float):  # PostgreSQL compares as float8
                    a, b = float(a), float(b)
                return compare(comparable(a), comparable(b))

            return test
        if clause.operator in (operators.is_, operators.is_not) and isinstance(clause.right, Null):
            wanted = clause.operator is operators.is_
            return lambda row: (left(row) is None) is wanted
    raise refused(f"HAVING {clause}", "compare aggregates and grouped columns with values")


def _value(parameter: BindParameter[Any], params: Params) -> Any:
    given = params if isinstance(params, Mapping) else {}
    return given.get(parameter.key, parameter.effective_value)


def _operand(clause: Any, columns: _Columns, params: Params) -> Callable[[Row], Any]:
    clause = unlabelled(clause)
    if isinstance(clause, BindParameter):
        value = _value(clause, params)
        return lambda _: value
    if isinstance(clause, True_ | False_):
        truth = isinstance(clause, True_)
        return lambda _: truth
    _refuse_incomparable(clause)
    position = columns.value(clause)
    return lambda row: row[position]


def _all(values: list[bool | None]) -> bool | None:
    if False in values:
        return False
    return None if None in values else True


def _not(value: bool | None) -> bool | None:  # noqa: FBT001 - a truth value of SQL
    return None if value is None else not value
