"""Averages computed in the client have the digits that PostgreSQL gives them."""

from __future__ import annotations

import decimal
import random

import psycopg
import pytest

from shardkit.aggregates import quotient
from shardkit.local import LocalCluster

pytestmark = pytest.mark.integration


def dividends(seed: int) -> list[decimal.Decimal]:
    draw = random.Random(seed)
    made = [decimal.Decimal(n) for n in (0, 1, -1, 9999, 10_000, -99_999_999, 10**40)]
    for _ in range(600):
        digits = str(draw.randrange(10 ** draw.randrange(1, 45)))
        places = draw.randrange(0, 40)
        sign = draw.choice(("", "-"))
        made.append(decimal.Decimal(f"{sign}{digits}E-{places}"))
    return made


def test_a_quotient_has_the_digits_of_numeric_division(local_cluster: LocalCluster) -> None:
    draw = random.Random(2)
    pairs = [
        (total, draw.choice((1, 2, 3, 7, 999, 10_000, 10_001, draw.randrange(1, 10**9))))
        for total in dividends(1)
    ]
    dsn = local_cluster.superuser_dsn(local_cluster.primary("alpha").name)
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT (t / c)::text FROM unnest(%s::numeric[], %s::numeric[]) AS p (t, c)",
            ([total for total, _ in pairs], [count for _, count in pairs]),
        ).fetchall()
    wrong = [
        (total, count, ours, theirs)
        for (total, count), (theirs,) in zip(pairs, rows, strict=True)
        if (ours := format(quotient(total, count), "f")) != theirs and float(theirs) != 0
    ]
    assert not wrong
