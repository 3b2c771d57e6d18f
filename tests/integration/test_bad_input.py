"""What no statement can be answered for: typed errors, and sessions that go on afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import ARRAY, BigInteger, any_, literal, select, text

from shardkit import Cluster, all_shards, ids
from shardkit.errors import InvalidShardKeyError, TooManyValuesError
from tests.fixtures.sharded import Settled
from tests.models import User

pytestmark = pytest.mark.integration

KEY = ids.compose(1, 3, 0)


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_more_values_than_postgresql_takes(cluster: Cluster, settled: Settled, kind: str) -> None:
    with cluster.writer() as session:
        session.add(User(id=KEY, name="x"))
        session.commit()
    settled()
    others = [ids.compose(5 + i, 3, 0) for i in range(100_000)]
    with getattr(cluster, kind)() as session:
        for statement in (
            select(User.id).where(User.id.in_([*others, KEY])),
            select(User.id).where(User.id.not_in(others)).options(all_shards()),
        ):
            with pytest.raises(TooManyValuesError):
                session.scalars(statement)
            session.rollback()
        whole = literal([*others, KEY], ARRAY(BigInteger))
        assert session.scalars(select(User.id).where(User.id == any_(whole))).all() == [KEY]


@pytest.mark.parametrize("given", [-1, 64, 8192, "3", 3.0, True])
@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_a_logical_shard_that_does_not_exist(cluster: Cluster, kind: str, given: Any) -> None:
    with getattr(cluster, kind)() as session:
        for statement in (select(User), text("SELECT 1")):
            with pytest.raises(InvalidShardKeyError, match="logical shard"):
                session.execute(statement, bind_arguments={"logical_shard": given})
            session.rollback()
