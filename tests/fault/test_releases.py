"""A value whose row is gone does not outlive a process that died before it released it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, event
from sqlalchemy.orm import Session

from shardkit import AsyncCluster, Cluster, ids
from shardkit.outbox import Backoff
from shardkit.relay import Relay
from shardkit.testing import FaultProxy, reroute, wait_until
from shardkit.uniques import GIVEN_UP, lookups_of
from tests.fixtures.sharded import admin
from tests.models import Account

pytestmark = [pytest.mark.integration, pytest.mark.fault]

TABLE: Any = Account.__table__
NAME, EMAIL = lookups_of(TABLE)
MAIL = "ana@b"


def add(cluster: Cluster, name: str, **more: Any) -> int:
    with cluster.writer() as session:
        account = Account(name=name, email=MAIL, **more)
        session.add(account)
        session.commit()
        return account.id


def named(cluster: Cluster) -> tuple[list[int], list[int]]:
    """Return the ids that the lookup rows of the name and of the address have."""
    values = NAME.value("ana"), EMAIL.value(MAIL)
    found = cluster.connections.lookups.read(values)
    name, email = ([pair.id for pair in found[value]] for value in values)
    return name, email


def told(cluster: Cluster) -> int:
    """Return how many events of values that were given up there are."""
    n = 0
    for shard, physical in cluster.topology.physical.items():
        with admin(physical) as connection:
            for logical in cluster.connections.owners.ask().owned_by(shard):
                query = f"SELECT count(*) FROM shard_{logical:04d}.shardkit_outbox WHERE topic = %s"
                row: Any = connection.execute(query.encode(), [GIVEN_UP]).fetchone()
                n += row[0]
    return n


def is_paused(cluster: Cluster, shard: int) -> bool:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(shard)]
    with admin(physical) as connection:
        query = f"SELECT 1 FROM shard_{shard:04d}.shardkit_outbox_retry"
        return connection.execute(query.encode()).fetchone() is not None


def die(_: Session) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(config: Path, account_id: int, how: str) -> None:
    """Give an address up, and die when COMMIT was answered."""
    with Cluster.from_file(config) as cluster, cluster.writer() as session:
        if how == "statement":
            session.execute(delete(Account).where(Account.id == account_id))
        elif how == "object":
            session.delete(session.get_one(Account, account_id))
        else:
            session.get_one(Account, account_id).email = "other@b"
        event.listen(session, "after_commit", die)
        session.commit()


def crashed(config: Path, account_id: int, how: str) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=leave, args=(config, account_id, how))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("how", ["object", "statement", "change"])
def test_a_relay_releases_what_the_writer_did_not_live_to_release(
    cluster: Cluster, cluster_file: Path, how: str
) -> None:
    ana = add(cluster, "ana")
    crashed(cluster_file, ana, how)
    assert named(cluster) == ([ana], [ana]), "nobody has the address, and it is still there"

    Relay(cluster).drain()
    # The name, which is not relayed, stays until somebody wants it.
    assert named(cluster) == ([ana], [])
    assert told(cluster) == 0
    with cluster.reader(max_lag=1.0) as session:
        assert (session.get(Account, ana) is None) == (how != "change")


def test_what_somebody_else_has_taken_since_stays_theirs(
    cluster: Cluster, cluster_file: Path
) -> None:
    ana = add(cluster, "ana")
    crashed(cluster_file, ana, "object")
    other = add(cluster, "ana")
    assert other != ana
    Relay(cluster).drain()
    assert named(cluster) == ([other], [other])


def test_a_server_that_does_not_answer_is_asked_again(cluster: Cluster, cluster_file: Path) -> None:
    owner = cluster.topology.shard_map.owner
    home = owner(EMAIL.value(MAIL).home(64))
    away = next(shard for shard in range(64) if owner(shard) != home)
    ana = add(cluster, "ana", id=ids.compose(1, away, 0))
    crashed(cluster_file, ana, "object")
    primary = cluster.topology.physical[home].primary
    with FaultProxy(primary.url.host, primary.url.port) as proxy:
        around = reroute(cluster.topology, {primary: proxy})
        proxy.refuse()
        backoff = Backoff(first=0.05, longest=0.2, attempts=10_000)
        with Cluster(around) as theirs, Relay(theirs, backoff=backoff):
            wait_until(lambda: is_paused(cluster, away), 60.0, "it has failed once")
            assert named(cluster) == ([ana], [ana])
            proxy.heal()
            wait_until(lambda: named(cluster) == ([ana], []), 60.0, "it is released")
            wait_until(lambda: not told(cluster), 60.0, "nothing is left to do")


def test_a_relay_of_an_asyncio_cluster_releases_too(cluster: Cluster, cluster_file: Path) -> None:
    ana = add(cluster, "ana")
    crashed(cluster_file, ana, "object")

    async def relay() -> None:
        async with AsyncCluster.from_file(cluster_file) as mine:
            await asyncio.to_thread(Relay(mine).drain)

    asyncio.run(relay())
    assert named(cluster) == ([ana], [])


def test_many_values_of_one_transaction_are_told_in_few_events(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        for n in range(1, 51):  # beside her, and so on one server
            session.add(Account(id=ana ^ (n << 23), name=f"n{n}", email=f"{n}@b"))
        session.commit()
    with cluster.writer() as session:
        row_ids = [ana ^ (n << 23) for n in range(1, 51)]
        session.execute(delete(Account).where(Account.id.in_(row_ids)))
        session.commit()
    assert told(cluster) == 3
    values = [EMAIL.value(f"{n}@b") for n in range(1, 51)]
    assert not any(cluster.connections.lookups.read(values).values()), "the writer has, itself"
    assert Relay(cluster).drain() == 3
    assert told(cluster) == 0
    with cluster.writer() as session:  # a roll-back tells nothing
        session.execute(delete(Account).where(Account.id == ana))
        session.rollback()
    assert told(cluster) == 0
