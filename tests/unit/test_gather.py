"""What a statement over several logical shards becomes, and what is refused."""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import math
import zoneinfo
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
    JSON,
    DateTime,
    Enum,
    Float,
    Integer,
    Numeric,
    String,
    cast,
    distinct,
    exists,
    func,
    literal_column,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import INTERVAL, distinct_on

from shardkit import gather, ordering
from shardkit.errors import UnsupportedStatementError
from shardkit.ids import compose
from shardkit.router import Router
from tests.models import Like, Photo, User

ROUTER = Router(64)


def plan(statement: Any, params: Any) -> gather.Plan:
    return gather.plan(statement, params, ROUTER)


likes = select(Like.photo_id).cte()
tags = cast(Photo.caption, JSON)
per_owner = select(Photo.owner_id).subquery()


def in_order(element: Any, *order: Any) -> Any:
    return func.array_agg(element).aggregate_order_by(*order)


REFUSED: list[tuple[str, Any, str]] = [
    ("for update", select(Photo).with_for_update(), "FOR UPDATE"),
    ("fetch", select(Photo).fetch(3), "FETCH"),
    ("text order", select(Photo).order_by(Photo.caption), "collat"),
    ("text min", select(func.min(Photo.caption)), "collat"),
    ("unknown function", select(func.json_agg(Photo.id)), "json_agg"),
    ("aggregate in an expression", select(func.count() + 1).select_from(Photo), "count"),
    ("count distinct", select(func.count(distinct(Photo.rank))), "DISTINCT"),
    ("window", select(func.count().over()).select_from(Photo), "window"),
    ("column outside group by", select(Photo.rank, func.count()), "GROUP BY"),
    ("entity beside aggregate", select(Photo, func.count()).group_by(Photo.id), "entities"),
    ("subquery in from", select(per_owner), "subquery"),
    ("average of floats", select(func.avg(cast(Photo.rank, Float))), "avg of type FLOAT"),
    ("sum of floats", select(func.sum(cast(Photo.rank, Float))), "sum of type FLOAT"),
    (
        "an aggregate of the query around",
        select(
            select(func.max(Photo.rank))
            .correlate(Photo)
            .select_from(Like)
            .where(Like.photo_id == Photo.id)
            .scalar_subquery()
        ).select_from(Photo),
        "max",
    ),
    ("order by a window", select(Photo).order_by(func.rank().over(order_by=Photo.rank)), "window"),
    ("order by a disguise", select(Photo).order_by(type_coerce(Photo.caption, Integer)), "looks"),
    ("order by a duration", select(Photo).order_by(cast(Photo.caption, INTERVAL)), "ORDER BY"),
    ("sum of durations", select(func.sum(cast(Photo.caption, INTERVAL))), "sum of"),
    ("distinct on", select(Photo).ext(distinct_on(Photo.rank)), "DISTINCT|extensions"),
    ("SQL text", select(literal_column("count(*)")).select_from(Photo), "SQL text"),
    ("CTE behind in", select(Photo).where(Photo.id.in_(select(likes.c.photo_id))), "CTE"),
    ("group by JSON", select(tags, func.count()).select_from(Photo).group_by(tags), "JSON"),
    ("negative limit", select(Photo).limit(-1), "LIMIT"),
    ("exists after an offset", select(exists(select(Photo.id).offset(1))), "OFFSET"),
    (
        "exists of chosen groups",
        select(exists(select(Photo.rank).group_by(Photo.rank).having(func.count() > 1))),
        "HAVING",
    ),
    ("exists of a subquery", select(exists(select(per_owner))), "subquery"),
    ("exists of a CTE", select(exists(select(likes))), "CTE"),
    ("rows beside exists", select(Photo.id, exists(select(User.id))), "beside EXISTS"),
    ("exists of other rows", select(exists(select(User.id))).select_from(Photo), "beside EXISTS"),
    ("list of lists", select(func.array_agg(cast(Photo.caption, ARRAY(Integer)))), "array_agg of"),
    (
        "list of enums",
        select(func.array_agg(cast(Photo.caption, Enum("a", name="e")))),
        "array_agg",
    ),
    ("list in text order", select(in_order(Photo.rank, Photo.caption)), "collat"),
    (
        "list sorted by lists",
        select(in_order(Photo.rank, Photo.id)).order_by(in_order(Photo.rank, Photo.id)),
        "ORDER BY",
    ),
    (
        "list compared",
        select(func.count()).select_from(Photo).having(func.array_agg(Photo.id) == [1]),
        "ORDER BY",
    ),
    ("list of an aggregate", select(func.array_agg(func.unnest(Photo.rank))), "unnest"),
    (
        "distinct list in another order",
        select(func.array_agg(distinct(Photo.rank)).aggregate_order_by(Photo.id)),
        "something else",
    ),
    ("separator of the row", select(func.string_agg(Photo.caption, Photo.caption)), "separator"),
    ("sum in an order", select(func.sum(Photo.rank).aggregate_order_by(Photo.id)), "ORDER BY"),
    (
        "filter by an aggregate",
        select(func.sum(Photo.rank).filter(func.count(Photo.id) > 1)),
        "count",
    ),
]


@pytest.mark.parametrize(
    ("statement", "reason"), [(s, r) for _, s, r in REFUSED], ids=[name for name, *_ in REFUSED]
)
def test_refused_by_name(statement: Any, reason: str) -> None:
    with pytest.raises(UnsupportedStatementError, match=reason):
        plan(statement, None)


def test_order_and_limit_go_to_the_servers_and_offset_stays_with_the_client() -> None:
    made = plan(select(Photo).order_by(Photo.rank.desc(), Photo.id).limit(20).offset(5), None)
    assert made.tail == (
        " ORDER BY shardkit_sort_0 DESC NULLS FIRST, shardkit_sort_1 ASC NULLS LAST LIMIT 25"
    )
    assert made.n_columns == 1
    assert "ORDER BY" not in str(made.branch)
    assert "LIMIT" not in str(made.branch)


def test_text_sorts_in_the_c_collation() -> None:
    made = plan(select(User.name).order_by(User.name.collate("C")), None)
    assert made.tail == " ORDER BY shardkit_sort_0 ASC NULLS LAST"


values = st.none() | st.integers(-3, 3)


@given(
    st.lists(st.tuples(values, st.integers()), max_size=30),
    st.sampled_from(["asc", "desc"]),
    st.sampled_from([None, "first", "last"]),
    st.none() | st.integers(0, 10),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_the_merge_equals_one_sorted_server(
    rows: list[tuple[int | None, int]],
    direction: str,
    nulls: str | None,
    limit: int | None,
    offset: int,
    n_servers: int,
) -> None:
    key: Any = Photo.rank.desc() if direction == "desc" else Photo.rank.asc()
    if nulls:
        key = key.nulls_first() if nulls == "first" else key.nulls_last()
    statement = select(Photo.id).order_by(key, Photo.id).offset(offset)
    made = plan(statement if limit is None else statement.limit(limit), None)
    nulls_first = nulls == "first" or (nulls is None and direction == "desc")

    def expected_key(row: tuple[int | None, int]) -> tuple[Any, ...]:
        rank, number = row
        null_rank = (rank is None) is not nulls_first
        value = 0 if rank is None else (-rank if direction == "desc" else rank)
        return (null_rank, value, number)

    ordered = sorted(rows, key=expected_key)
    stop = None if limit is None else offset + limit
    dealt = [sorted(rows[i::n_servers], key=expected_key)[:stop] for i in range(n_servers)]
    merged = made.combine([(n, r, n) for r, n in itertools.chain(*dealt)])
    assert [(r, n) for n, r, _ in merged] == ordered[offset:stop]


def test_not_a_number_is_one_value_and_the_largest() -> None:
    value = cast(Photo.rank, Float)
    made = plan(select(value, func.count()).group_by(value), None)
    rows: list[Any] = [(float("nan"), 1), (1.0, 1), (float("nan"), 2)]
    assert [n for _, n in made.combine(rows)] == [3, 1]
    extremes = plan(select(func.min(value), func.max(value)), None)
    (least, greatest), *_ = extremes.combine([(float("nan"), 5.0), (1.0, float("nan"))])
    assert least == 1.0
    assert math.isnan(greatest)


def test_an_hour_that_the_clock_on_the_wall_repeats_is_two() -> None:
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    early = dt.datetime(2026, 10, 25, 2, 30, tzinfo=berlin)
    late = early.replace(minute=10, fold=1)
    time = cast(Photo.taken_at, DateTime(timezone=True))
    ordered = plan(select(Photo.id).order_by(time), None)
    assert ordered.combine([(1, late), (2, early)]) == [(2, early), (1, late)]
    again = early.replace(fold=1)
    grouped = plan(select(time, func.count()).group_by(time), None)
    assert len(grouped.combine([(early, 1), (again, 1)])) == 2


def test_sums_keep_every_digit() -> None:
    value = cast(Photo.rank, Numeric)
    made = plan(select(func.sum(value)), None)
    parts = [decimal.Decimal(10**40), decimal.Decimal("1e-10")]
    assert made.combine([(part,) for part in parts]) == [
        (decimal.Decimal("1" + "0" * 40 + ".0000000001"),)
    ]


def test_a_plain_table_beside_an_entity_keeps_its_columns() -> None:
    made = plan(select(User, User.__table__).order_by(User.id), None)
    assert made.n_columns == 3


def test_partial_aggregates_combine() -> None:
    statement = select(
        Photo.rank, func.count(), func.sum(Photo.rank), func.min(Photo.id), func.max(Photo.id)
    ).group_by(Photo.rank)
    made = plan(statement.order_by(func.count().desc()).limit(1), None)
    partial: list[Any] = [(1, 2, 2, 10, 12), (None, 1, None, 3, 3), (1, 3, 3, 7, 11)]
    assert made.combine(partial) == [(1, 5, 5, 7, 12)]
    everything = plan(statement, None)
    assert everything.combine(list(partial)) == [(1, 5, 5, 7, 12), (None, 1, None, 3, 3)]


def test_each_logical_shard_is_asked_for_its_own_keys() -> None:
    a, b, c = compose(1, 4, 0), compose(2, 4, 0), compose(3, 5, 0)
    statement = select(Photo.id).where(Photo.owner_id.in_([a, b, c]), Photo.rank > 1)
    made = plan(statement, None)
    assert "owner_id = ANY (" in str(made.branch)
    assert made.lists.parameters((4, 5, 6)) == {
        "shardkit_keys_0_4": [a, b], "shardkit_keys_0_5": [c], "shardkit_keys_0_6": [],
    }  # fmt: skip
    assert "IN (" in str(statement.compile()), "the caller's statement is left alone"


def test_lists_that_do_not_place_rows_stay_lists() -> None:
    made = plan(select(Photo.id).where(Photo.rank.in_([1, 2]) | Photo.owner_id.in_([1])), None)
    assert not made.lists.values
    assert str(made.branch).count("IN (") == 2


def test_distinct_rows_of_several_servers_become_one() -> None:
    made = plan(select(Photo.rank).distinct().order_by(Photo.rank).limit(2), None)
    assert made.union == "UNION"
    assert made.combine([(3, 3), (None, None), (1, 1), (3, 3), (None, None)]) == [(1, 1), (3, 3)]


def test_a_subquery_of_its_own_rows_is_one_value() -> None:
    own = select(func.max(Like.user_id)).where(Like.photo_id == Photo.id)
    every = select(func.count()).select_from(Like).where(Like.photo_id == Photo.id)
    for inner in (own, every):
        made = plan(select(Photo.id, inner.scalar_subquery().label("x")), None)
        assert made.tail == ""
        assert made.combine([(1, 7), (2, None)]) == [(1, 7), (2, None)]


def test_having_is_applied_to_whole_groups() -> None:
    statement = select(Photo.rank).group_by(Photo.rank).having(func.count() > 2)
    made = plan(statement.order_by(func.count().desc()), None)
    assert "HAVING" not in str(made.branch)
    assert [row[0] for row in made.combine([(1, 2), (1, 1), (2, 2), (None, 5)])] == [None, 1]


def test_an_average_is_made_of_sums_and_counts() -> None:
    made = plan(select(func.avg(Photo.rank)), None)
    ((average, *_),) = made.combine([(None, 1, 1), (None, 1, 2), (None, None, 0)])
    assert str(average) == "0.66666666666666666667"


def test_exists_is_true_where_any_logical_shard_has_a_row_and_not_exists_where_none_has() -> None:
    made = plan(select(exists(select(User.id)), ~exists().where(Photo.rank > 1)), None)
    assert made.combine([(False, True), (False, True)]) == [(False, True)]
    assert made.combine([(False, True), (True, False)]) == [(True, False)]
    twice = plan(select((~~exists(select(User.id))).label("x")).limit(0), None)
    assert twice.combine([(True,), (False,)]) == []


def test_keys_that_exists_asks_for_are_split_too() -> None:
    a, b, c = compose(1, 4, 0), compose(1, 5, 0), compose(2, 5, 0)
    found = exists(select(User.id).where(User.id.in_([a, b]))).label("found")
    number = func.count(Photo.id).filter(Photo.rank > 1)
    made = plan(select(number, found).where(Photo.owner_id.in_([c, b])), None)
    assert made.lists.parameters((4, 5)) == {
        "shardkit_keys_0_4": [], "shardkit_keys_0_5": [c, b],
        "shardkit_keys_1_4": [a], "shardkit_keys_1_5": [b],
    }  # fmt: skip
    assert str(made.branch).count(" AS found") == 1
    assert made.combine([(2, False), (3, True)]) == [(5, True)]


def test_lists_are_merged_in_order_with_nulls_and_ties_by_logical_shard() -> None:
    made = plan(select(in_order(Photo.caption, Photo.rank.desc())), None)
    first = (["b", None, "d"], [None, 7, 1], "shard_0002.")
    second = (["a", "c"], [7, 3], "shard_0001.")
    empty = (None, None, "shard_0000.")
    ((whole, *_),) = made.combine([first, second, empty])
    assert whole == ["b", "a", None, "c", "d"]
    assert [row[0] for row in made.combine([empty])] == [None]


def test_lists_without_an_order_are_those_of_one_logical_shard_after_another() -> None:
    made = plan(select(Photo.rank, func.array_agg(Photo.caption)).group_by(Photo.rank), None)
    rows: list[Any] = [(1, ["b", None], "shard_0010."), (2, ["x"], "shard_0010."),
                       (1, ["a"], "shard_0002.")]  # fmt: skip
    assert [row[:2] for row in made.combine(rows)] == [(1, ["a", "b", None]), (2, ["x"])]


def test_distinct_lists_have_each_element_once() -> None:
    once = func.array_agg(distinct(Photo.rank)).aggregate_order_by(Photo.rank.desc())
    made = plan(select(once), None)
    rows: list[Any] = [([None, 3, 1], "shard_0000."), ([3, 2], "shard_0001.")]
    assert [row[0] for row in made.combine(rows)] == [[None, 3, 2, 1]]


def test_texts_are_joined_without_nulls() -> None:
    text = func.string_agg(Photo.caption, ", ").aggregate_order_by(Photo.id)
    made = plan(select(text), None)
    rows: list[Any] = [("b", ["b", None], [2, 5], "shard_0000."), ("a", ["a"], [1], "shard_0001.")]
    assert [row[0] for row in made.combine(rows)] == ["a, b"]
    nothing: list[Any] = [(None, [None], [1], "shard_0000."), (None, None, None, "shard_0001.")]
    assert [row[0] for row in made.combine(nothing)] == [None]


def test_a_filter_goes_with_every_part_of_an_average() -> None:
    made = plan(select(func.avg(Photo.rank).filter(Photo.id > 5)), None)
    assert str(made.branch).count("FILTER (WHERE photos.id > ") == 3


def test_parentheses_make_no_other_order() -> None:
    """`collate(…).nulls_first()` puts some around what DISTINCT names without."""
    column = literal_column("name", String()).collate("C")
    term, _, nulls_first = ordering.direction(column.nulls_first())
    assert nulls_first
    assert ordering.alike(term, column)
    assert ordering.alike(column, term)
    assert not ordering.alike(term, literal_column("name", String()).collate("POSIX"))


def test_equal_rows_make_no_other_existence() -> None:
    inner: Any = select(literal_column("1")).distinct().where(Photo.rank == 1)
    plan(select(exists(inner)), None)
