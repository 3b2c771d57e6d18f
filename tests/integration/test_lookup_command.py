"""`shardkit lookup`: rows from before, rows that disagree, and rows that change meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shardkit import Cluster, ids
from shardkit.cli import main
from shardkit.clock import SYSTEM
from shardkit.ops.lookup import Limits, Report, lookups_in, run
from shardkit.testing import FakeClock
from shardkit.topology import Topology, schema_name
from shardkit.uniques import lookups_of
from tests.fixtures.sharded import admin
from tests.models import Account, Base

pytestmark = pytest.mark.integration

TABLE: Any = Account.__table__
NAME, EMAIL = lookups_of(TABLE)
N_ROWS = 200


def store(topology: Topology, rows: list[tuple[int, str]]) -> None:
    """Insert rows behind shardkit's back."""
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for row_id, name in rows:
                shard = ids.shard_of(row_id)
                if shard in topology.shard_map.owned_by(physical.name):
                    query = f"INSERT INTO {schema_name(shard)}.accounts (id, name, bio) VALUES (%s, %s, '')"
                    connection.execute(query.encode(), [row_id, name])


def old_rows(topology: Topology, n: int = N_ROWS) -> list[tuple[int, str]]:
    rows = [(ids.compose(1_000 + k, k % topology.n_logical_shards, 0), f"Old{k}") for k in range(n)]
    store(topology, rows)
    return rows


def agree(report: Report) -> bool:
    return report.error is None and report.n_missing == report.n_stale == report.n_busy == 0


def test_a_backfill_takes_in_what_was_there(cluster: Cluster, topology: Topology) -> None:
    rows = old_rows(topology)
    found = run(cluster, NAME, "check")
    assert (found.n_rows, found.n_missing, found.n_added) == (N_ROWS, N_ROWS, 0)
    assert found.error is not None
    clock = FakeClock()
    began = clock.monotonic()
    done = run(cluster, NAME, "backfill", limits=Limits(batch=2, pause=0.5), clock=clock)
    assert (done.n_rows, done.n_added, done.error) == (N_ROWS, N_ROWS, None)
    assert clock.monotonic() - began >= 0.5 * N_ROWS / 2, "it paused after every page"
    again = run(cluster, NAME, "backfill")
    assert (again.n_rows, again.n_added) == (N_ROWS, 0)
    assert agree(run(cluster, NAME, "check"))
    with cluster.reader(max_lag=1.0) as session:
        for row_id, name in rows[::20]:
            assert session.scalars(select(Account).where(Account.name == name)).one().id == row_id


def test_rows_of_one_value_are_listed_and_all_found(cluster: Cluster, topology: Topology) -> None:
    same = [(ids.compose(5, shard, 0), name) for shard, name in ((1, "Ana"), (40, "ana"))]
    same += [(ids.compose(6, 1, n), "bo") for n in (0, 1)]
    store(topology, same)
    done = run(cluster, NAME, "backfill")
    groups = {tuple(sorted(i for i, _ in same[:2])), tuple(sorted(i for i, _ in same[2:]))}
    assert done.duplicates == groups
    assert done.error is not None
    assert run(cluster, NAME, "repair").duplicates == groups
    with cluster.reader(max_lag=1.0) as session:
        bo = session.scalars(select(Account.id).where(Account.name == "bo")).all()
        assert sorted(bo) == sorted(i for i, _ in same[2:])
    with cluster.writer() as session:
        session.get_one(Account, same[0][0]).name = "cy"
        session.commit()
        session.get_one(Account, same[2][0]).name = "di"
        session.commit()
    assert agree(run(cluster, NAME, "check"))


def test_a_value_that_is_too_long_is_listed(cluster: Cluster, topology: Topology) -> None:
    row_id = ids.compose(5, 1, 0)
    store(topology, [(row_id, "x" * 2000)])
    done = run(cluster, NAME, "backfill")
    assert done.unkept == {row_id}
    assert done.error is not None


def test_repair_adds_what_is_missing_and_removes_what_is_stale(
    cluster: Cluster, topology: Topology
) -> None:
    rows = old_rows(topology, 40)
    run(cluster, NAME, "backfill")
    gone, renamed, lost = rows[3][0], rows[5][0], NAME.value(rows[7][1])
    for physical in topology.physical.values():
        mine = topology.shard_map.owned_by(physical.name)
        with admin(physical) as connection:
            for row_id, query in (
                (gone, "DELETE FROM {}.accounts WHERE id = %s"),
                (renamed, "UPDATE {}.accounts SET name = 'new' WHERE id = %s"),
            ):
                if ids.shard_of(row_id) in mine:
                    schema = schema_name(ids.shard_of(row_id))
                    connection.execute(query.format(schema).encode(), [row_id])
            home = lost.home(topology.n_logical_shards)
            if home in mine:
                query = f"DELETE FROM {schema_name(home)}.shardkit_lookup WHERE value = %s"
                connection.execute(query.encode(), [lost.key])
    checked = run(cluster, NAME, "check")
    assert (checked.n_missing, checked.n_stale, checked.n_removed) == (2, 2, 0)
    repaired = run(cluster, NAME, "repair")
    assert (repaired.n_added, repaired.n_removed, repaired.error) == (2, 2, None)
    assert agree(run(cluster, NAME, "check"))


def test_a_scan_beside_writers_finds_nothing_wrong(cluster: Cluster, topology: Topology) -> None:
    rows = old_rows(topology, 60)
    stop = threading.Event()
    failures: list[BaseException] = []

    def rename() -> None:
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                row_id = rows[turn % len(rows)][0]
                with cluster.writer() as session:
                    session.get_one(Account, row_id).name = f"turn{turn}"
                    session.commit()
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    writer = threading.Thread(target=rename)
    writer.start()
    try:
        assert run(cluster, NAME, "backfill", limits=Limits(batch=3)).error is None
        for kind in ("check", "repair", "check"):
            found = run(cluster, NAME, kind, limits=Limits(batch=3))
            assert found.error is None
            assert found.n_missing == 0
    finally:
        stop.set()
        writer.join()
    assert not failures
    assert agree(run(cluster, NAME, "check", clock=SYSTEM))


def test_the_command(
    cluster: Cluster,  # noqa: ARG001 - its tables are empty
    topology: Topology,
    cluster_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*words: str) -> int | str | None:
        options = ("--config", str(cluster_file), "--models", "tests.models:Base")
        with pytest.raises(SystemExit) as caught:
            main(("lookup", *words, *options))
        return caught.value.code

    old_rows(topology, 10)
    assert command("check", "--lookup", "accounts.name", "--json") == 1
    assert json.loads(capsys.readouterr().out)[0]["missing"] == 10
    assert command("backfill") == 0
    out = capsys.readouterr().out
    assert "accounts.name: 10 rows, 10 missing, 10 added" in out
    assert "accounts.email: 0 rows" in out
    assert command("repair", "--dry-run", "--json") == 0
    assert [report["stale"] for report in json.loads(capsys.readouterr().out)] == [0, 0]
    assert command("check", "--lookup", "accounts.bio") == 2
    assert "accounts.name, accounts.email" in capsys.readouterr().err
    assert [lookup.name for lookup in lookups_in(Base.metadata)] == [
        "accounts.name",
        "accounts.email",
    ]
