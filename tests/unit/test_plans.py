"""Which statements have one plan, and which are decided anew each time."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import pytest
from sqlalchemy import ARRAY, BigInteger, any_, bindparam, literal, select
from sqlalchemy.orm import load_only
from sqlalchemy.orm.interfaces import UserDefinedOption

from shardkit import all_shards, gather
from shardkit.plans import Plans, key_of
from shardkit.router import Router
from tests.models import Photo


def newest(limit: int = 20, **limits: Any) -> Any:
    return select(Photo).order_by(Photo.id.desc()).limit(limit).options(all_shards(**limits))


def above(value: Any) -> Any:
    return select(Photo).where(Photo.rank > value).options(all_shards())


def test_statements_written_twice_have_one_key() -> None:
    assert key_of(newest(), None) is not None
    assert key_of(newest(), None) == key_of(newest(), None)
    assert key_of(above(3), {}) == key_of(above(3), {})


@pytest.mark.parametrize(
    "other",
    [
        newest(21),
        newest(max_rows=5),
        newest(timeout=1),
        newest().offset(1),
        newest().where(Photo.rank == 1),
        newest().options(load_only(Photo.rank)),
        select(Photo.id).order_by(Photo.id.desc()).limit(20).options(all_shards()),
    ],
)
def test_what_differs_has_another_key(other: Any) -> None:
    assert key_of(other, None) is not None
    assert key_of(other, None) != key_of(newest(), None)


def test_equal_values_of_two_types_have_two_keys() -> None:
    one, true = (above(literal(value, BigInteger)) for value in (1, True))
    assert key_of(one, None) is not None
    assert key_of(one, None) != key_of(true, None)


@pytest.mark.parametrize(
    "value",
    [
        0.0,
        decimal.Decimal("1.0"),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        literal([1, 2], ARRAY(BigInteger)),
        bindparam("rank", callable_=lambda: 1),
    ],
)
def test_values_that_can_be_equal_and_differ_are_not_remembered(value: Any) -> None:
    assert key_of(above(value), None) is None


class Mark(UserDefinedOption):
    """An option of the program, which SQLAlchemy's cache key leaves out."""


@pytest.mark.parametrize(
    "statement",
    [
        newest().options(Mark("a")),
        newest().execution_options(yield_per=10),
        newest().where(Photo.owner_id.in_([1, 2])),
        newest().where(Photo.owner_id == any_(literal([1, 2], ARRAY(BigInteger)))),
    ],
)
def test_what_the_key_would_leave_out_is_not_remembered(statement: Any) -> None:
    assert key_of(statement, None) is None


def test_values_beside_the_statement_are_not_remembered() -> None:
    assert key_of(newest(), {"n": 1}) is None


def test_a_plan_is_found_by_its_key_and_nothing_without() -> None:
    plans, plan = Plans(), gather.plan(newest(), None, Router(64))
    plans.keep(key_of(newest(), None), plan)
    plans.keep(None, plan)
    assert plans.get(key_of(newest(), None)) is plan
    assert plans.get(key_of(newest(21), None)) is None
    assert plans.get(None) is None
