"""`shardkit rebalance`: what is measured on real servers, what is planned, what a plan file is worth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import URL

from shardkit import ids
from shardkit.cli import main
from shardkit.config import load
from shardkit.errors import EndpointUnavailableError, RefusedError
from shardkit.local import LocalCluster
from shardkit.ops import migrate, moves
from shardkit.ops.moves.transactions import change
from shardkit.ops.moves.transitions import Claim, Move, Release
from shardkit.ops.placed import as_placed
from shardkit.ops.rebalance import planfile
from shardkit.ops.rebalance.measure import measure
from shardkit.testing import FakeClock
from shardkit.topology import Topology, libpq_options
from tests.fixtures.servers import lend, options
from tests.fixtures.sharded import Settled, admin

pytestmark = pytest.mark.integration

N = 64


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Return what a command printed as JSON."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    assert not end.value.code
    return json.loads(capsys.readouterr().out)


class Watched(FakeClock):
    """A clock on which something happens while somebody waits."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__()
        self.happens = happens

    def sleep(self, seconds: float) -> None:
        self.happens()
        super().sleep(seconds)


def write(topology: Topology, shard: int, rows: int) -> None:
    """Write users on one logical shard, and read each once; the server has counted it after."""
    users = f"shard_{shard:04d}.users"
    with admin(topology.physical[topology.shard_map.owner(shard)]) as connection:
        first = ids.compose(1, shard, 0)
        connection.execute(
            f"INSERT INTO {users} (id, name) SELECT %s + n, 'rebalanced' FROM generate_series(1, %s) AS n",
            (first, rows),
        )
        connection.execute(f"SELECT count(*) FROM {users} WHERE name = 'rebalanced'".encode())
        # What is counted goes to the other processes at the end of the next statement.
        connection.execute("SELECT pg_stat_force_next_flush()")


def test_size_rows_and_load_of_every_logical_shard_are_measured(topology: Topology) -> None:
    shard = topology.shard_map.owned_by("beta")[0]
    before = measure(topology)
    found = measure(topology, seconds=10.0, clock=Watched(lambda: write(topology, shard, 5000)))
    assert [s.number for s in found.shards] == list(range(N))
    assert [s.owner for s in found.shards] == list(topology.shard_map.owners)
    assert (before.seconds, found.seconds) == (0.0, 10.0)
    assert found.notes == ()
    busiest = max(found.shards, key=lambda each: each.load)
    assert busiest.number == shard
    assert 5000 <= busiest.writes < 6000
    assert 5000 <= busiest.reads < 20_000
    after = measure(topology)
    assert after.shards[shard].size_bytes > before.shards[shard].size_bytes > 0
    assert after.shards[shard].rows - before.shards[shard].rows == 5000


def test_reads_of_replicas_count_and_a_silent_replica_is_noted(
    topology: Topology, settled: Settled
) -> None:
    shard = topology.shard_map.owned_by("alpha")[0]
    write(topology, shard, 100)
    settled()
    alpha = topology.physical["alpha"]

    def read() -> None:
        url = alpha.looking_at(alpha.replicas[0].url)
        with psycopg.connect(autocommit=True, **libpq_options(url)) as replica:
            query = f"SELECT count(*) FROM shard_{shard:04d}.users"
            [(rows,)] = replica.execute(query.encode()).fetchall()
            assert rows == 100
            replica.execute("SELECT pg_stat_force_next_flush()")

    found = measure(topology, seconds=1.0, clock=Watched(read))
    assert 100 <= found.shards[shard].reads < 1000
    gone = replace(alpha.replicas[1], url=alpha.replicas[1].url.set(port=1))
    shards = {**topology.physical, "alpha": replace(alpha, replicas=(alpha.replicas[0], gone))}
    found = measure(Topology(topology.name, shards, topology.shard_map))
    assert [note.split(":")[0] for note in found.notes] == [f"reads of {gone}".split(":")[0]]


def test_a_silent_primary_and_one_without_tables_are_refused(
    topology: Topology, local_cluster: LocalCluster
) -> None:
    alpha = topology.physical["alpha"]
    gone = replace(alpha, admin_url=alpha.admin_url.set(port=1))
    shards = {**topology.physical, "alpha": gone}
    with pytest.raises(EndpointUnavailableError, match="'alpha' could not be measured"):
        measure(Topology(topology.name, shards, topology.shard_map))
    superuser = conninfo_to_dict(local_cluster.superuser_dsn(local_cluster.primary("alpha").name))
    new = replace(
        alpha,
        admin_url=URL.create(
            "postgresql+psycopg",
            username=str(superuser["user"]),
            database="postgres",
            host=str(superuser["host"]),
            port=int(str(superuser["port"])),
        ),
    )
    shards = {**topology.physical, "alpha": new}
    with pytest.raises(RefusedError, match="'alpha' has never been migrated"):
        measure(Topology(topology.name, shards, topology.shard_map))


def test_what_is_being_moved_is_left_out(topology: Topology, cluster_file: Path) -> None:
    shard = topology.shard_map.owned_by("alpha")[0]
    move = Move("00000000-0000-0000-0000-00000000000a")
    with admin(topology.physical["alpha"]) as connection:
        change(connection, shard, Claim(move))
        try:
            found = measure(topology)
            assert found.shards[shard].held == f"move {move.id} has claimed it on 'alpha'"
            assert [s.number for s in found.shards if s.held] == [shard]
            with pytest.raises(SystemExit) as refused:
                main(["rebalance", "plan", "--config", str(cluster_file), "--drain", "alpha"])
            assert refused.value.code == 4
        finally:
            change(connection, shard, Release(move))


def test_a_plan_is_shown_drawn_and_kept(
    topology: Topology, cluster_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, drawn = tmp_path / "plan.json", tmp_path / "plan.svg"
    asked = ["rebalance", "plan", "--config", str(cluster_file), "--seconds", "0"]
    asked += ["--drain", "beta", "--out", str(file), "--svg", str(drawn)]
    with pytest.raises(SystemExit) as end:
        main(asked)
    assert not end.value.code
    shown = capsys.readouterr().out
    assert re.search(r"beta before +32 +\S+ \S+ +[\d,]+ +drained", shown)
    assert "32 moves" in shown
    document = told(capsys, *asked)
    beta = topology.shard_map.owned_by("beta")
    assert sorted(m["logical_shard"] for m in document["moves"]) == list(beta)
    assert [fill["shards"] for fill in document["after"]] == [64, 0]
    assert document["size_bytes"] == document["least_bytes"] > 0
    kept = planfile.read(file)
    assert [m.logical_shard for m in kept.planned] == [
        m["logical_shard"] for m in document["moves"]
    ]
    assert len(planfile.remaining(kept, measure(topology))) == 32
    picture = ET.fromstring(drawn.read_text(encoding="utf-8"))
    titles = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 1
    assert str(titles[0]).startswith("beta to alpha: 32 logical shards")


def test_even_servers_have_nothing_to_move(
    cluster_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rebalance", "plan", "--config", str(cluster_file), "--seconds", "0"])
    assert not end.value.code
    assert "nothing has to move" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--drain", "omega"], 2, "no physical shard is called 'omega'"),
    (["--drain", "alpha", "--drain", "beta"], 3, "every physical shard is to be drained"),
    (["--weight", "alpha"], 2, "--weight alpha: write NAME=…"),
    (["--weight", "alpha=0"], 2, "a weight is a number above 0"),
    (["--weight", "alpha=nan"], 2, "a weight is a number above 0"),
    (["--pin", "alpha=7-3"], 2, "must ascend"),
    (["--pin", "alpha=64"], 2, "there is no logical shard 64"),
    (["--pin", "alpha=3", "--drain", "alpha"], 3, "logical shard 3 is pinned to 'alpha'"),
    (["--drain", "beta", "--max-moves", "3"], 3, "need 32 moves, and --max-moves is 3"),
    (["--tolerance", "-1"], 2, "tolerance"),
    (["--out", "/nowhere/plan.json"], 2, "/nowhere/plan.json: cannot be written"),
])  # fmt: skip
def test_what_cannot_be_met_is_named(
    cluster_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["rebalance", "plan", "--config", str(cluster_file), "--seconds", "0", *arguments])
    assert refused.value.code == code
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def growing(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_version: str,  # noqa: ARG001  skips when there is none
) -> Iterator[Path]:
    """Two physical shards with three logical shards each, by migrations."""
    shape = options(replicas=0, logical_shards=6, redis=False, memcached=False, pgbouncer=False)
    with lend(tmp_path_factory.mktemp("growing") / "cluster", shape) as local:
        _, topology = load(local.config_path)
        assert (
            migrate.apply(
                topology, migrate.load_revisions("app:migrations", folder=Path.cwd())
            ).error
            is None
        )
        yield local.config_path


def owners(config: Path) -> tuple[str, ...]:
    return as_placed(load(config)[1]).shard_map.owners


@pytest.mark.slow
def test_a_plan_is_applied_resumed_and_refused_when_it_is_stale(
    growing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    asked = ["--config", str(growing)]
    assert owners(growing) == ("alpha",) * 3 + ("beta",) * 3
    plan = ["rebalance", "plan", *asked, "--seconds", "0", "--drain", "beta", "--out", str(file)]
    assert len(told(capsys, *plan)["moves"]) == 3
    apply = ["rebalance", "apply", str(file), *asked]
    assert [m["target"] for m in told(capsys, *apply, "--dry-run")["moves"]] == ["alpha"] * 3
    # The first of them is begun by another, and stops before it hands over.
    first = planfile.read(file).planned[0].logical_shard
    _, topology = load(growing)
    script = moves.revised(migrate.load_revisions("app:migrations", folder=Path.cwd()))
    held = moves.move(topology, first, "alpha", script=script, options=moves.Options(is_held=True))
    assert not held.is_moved
    assert told(capsys, *apply, "--dry-run")["begun"] == [first]
    done = told(capsys, *apply, "--migrations", "app:migrations")
    assert sorted(move["logical_shard"] for move in done["moved"]) == [3, 4, 5]
    assert all(move["is_moved"] for move in done["moved"])
    assert owners(growing) == ("alpha",) * 6
    again = told(capsys, *apply, "--migrations", "app:migrations")
    assert (again["moved"], again["failed"], again["done_before"]) == ([], [], 3)
    # One goes elsewhere, which the plan does not know.
    moves.rollback(topology, first)
    with pytest.raises(SystemExit) as refused:
        main([*apply, "--migrations", "app:migrations"])
    assert refused.value.code == 3
    assert "old copy on alpha is kept" in capsys.readouterr().err
    for number in (3, 4, 5):
        moves.clean(topology, number)
    back = tmp_path / "back.json"
    asked_back = ["--max-moves", "2", "--seconds", "0", "--out", str(back)]
    assert {
        m["logical_shard"] for m in told(capsys, "rebalance", "plan", *asked, *asked_back)["moves"]
    } == {0, 1}
    moves.move(topology, 5, "beta", script=script)
    with pytest.raises(SystemExit) as stale:
        main(["rebalance", "apply", str(back), *asked, "--dry-run"])
    assert stale.value.code == 3
    assert "the plan is stale" in capsys.readouterr().err
