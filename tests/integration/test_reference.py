"""Reference tables are the same on every physical shard, whoever writes them and whatever ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SAWarning
from sqlalchemy.orm.exc import StaleDataError

from shardkit import AsyncCluster, Cluster, ids
from shardkit.broadcasts import LOCK_KEY
from shardkit.cli import main
from shardkit.errors import (
    CrossShardWriteError,
    StatementTimeoutError,
    UnavailableError,
    UnsupportedStatementError,
)
from shardkit.events import Event, TwoPhaseStep
from shardkit.twophase import in_doubt, resolve
from tests.fixtures.sharded import admin
from tests.models import Country, User

pytestmark = pytest.mark.integration


def everywhere(cluster: Cluster, query: str = "SELECT code, name FROM reference.countries") -> Any:
    """Return the rows of every physical shard, which are the same."""
    found = []
    for shard in cluster.topology.physical.values():
        with admin(shard) as connection:
            found.append(sorted(connection.execute(query.encode()).fetchall()))
    assert all(rows == found[0] for rows in found), found
    return found[0]


def test_objects_are_written_on_every_server(cluster: Cluster) -> None:
    user = ids.compose(1, cluster.topology.shard_map.owned_by("beta")[0], 0)
    with cluster.writer(atomic=True) as session:
        session.add_all([Country(code="es", name="Spain"), Country(code="fr", name="Frnace")])
        session.add(User(id=user, name="es"))
        session.flush()
        joined = select(Country.name).join(User, Country.code == User.name)
        assert session.scalars(joined.where(User.id == user)).one() == "Spain"
        session.get_one(Country, "fr").name = "France"
        session.commit()
        assert everywhere(cluster) == [("es", "Spain"), ("fr", "France"), ("pt", "Portugal")]
        session.get_one(Country, "fr").code = "ff"
        session.delete(session.get_one(Country, "es"))
        session.commit()
    assert everywhere(cluster) == [("ff", "France"), ("pt", "Portugal")]


def test_a_plain_writer_refuses_and_statements_are_refused(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(Country(code="es", name="Spain"))
        with pytest.raises(CrossShardWriteError, match="atomic=True"):
            session.commit()
    with cluster.writer() as session:
        session.get_one(Country, "pt").name = "other"
        with pytest.raises(CrossShardWriteError, match="atomic=True"):
            session.commit()
    assert everywhere(cluster) == [("pt", "Portugal")]


def test_what_is_rolled_back_is_nowhere(cluster: Cluster) -> None:
    with cluster.writer(atomic=True) as session:
        session.add(Country(code="es", name="Spain"))
        inner = session.begin_nested()
        session.add(Country(code="it", name="Italy"))
        session.flush()
        session.add(Country(code="es", name="again"))
        with pytest.raises(IntegrityError):
            session.flush()
        inner.rollback()
        session.rollback()
        session.add(Country(code="fr", name="France"))
        nested = session.begin_nested()
        session.add(Country(code="de", name="Germany"))
        session.flush()
        nested.rollback()
        session.commit()
    assert everywhere(cluster) == [("fr", "France"), ("pt", "Portugal")]


def test_broadcasts_of_many_threads_leave_the_same_everywhere(cluster: Cluster) -> None:
    def change(worker: int, n: int) -> None:
        with cluster.writer(atomic=True) as session:
            country = session.get(Country, f"x{n}")
            if country is None:
                session.add(Country(code=f"x{n}", name=f"{worker}"))
            elif (n + worker) % 3:
                country.name += f" {worker}"
            else:
                session.delete(country)
            session.commit()

    def work(worker: int) -> None:
        for n in range(8):
            for _ in range(20):
                try:
                    change(worker, n)
                except (IntegrityError, StaleDataError, SAWarning, UnavailableError):  # not first
                    continue
                done.append((worker, n))
                break

    done: list[tuple[int, int]] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 32
    everywhere(cluster)
    assert in_doubt(cluster.connections, cluster.topology.physical) == ([], {})


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prepared", "decided"])
def test_a_killed_broadcast_ends_alike_and_holds_up_the_next(cluster: Cluster, step: str) -> None:
    child = os.fork()
    if child == 0:
        dying = Cluster(cluster.topology)
        dying.listen(lambda e: os.kill(os.getpid(), signal.SIGKILL) if at(e, step) else None)
        with dying.writer(atomic=True) as session:
            session.add(Country(code="es", name="Spain"))
            session.commit()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with cluster.writer(atomic=True) as session:
        session.add(Country(code="it", name="Italy"))
        with pytest.raises(StatementTimeoutError) as caught:
            session.commit()
        assert caught.value.retryable
        session.rollback()
        resolve(cluster.connections, cluster.topology.physical, older_than=0.0)
        session.add(Country(code="it", name="Italy"))
        session.commit()
    expected = [("it", "Italy"), ("pt", "Portugal")]
    assert everywhere(cluster) == ([("es", "Spain")] if step == "decided" else []) + expected


def at(event: Event, step: str) -> bool:
    return isinstance(event, TwoPhaseStep) and event.step == step


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr().out
    return ended.value.code, json.loads(printed) if printed.startswith("{") else {}


def test_a_difference_is_found_and_repaired(
    cluster: Cluster, cluster_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--config", str(cluster_file))
    code, found = run(capsys, "reference", "check", "--json", *config)
    assert (code, found["differences"], found["home"]) == (0, [], "alpha")
    with admin(cluster.topology.physical["beta"]) as beta:
        beta.execute("UPDATE reference.countries SET name = 'other'")
        beta.execute("INSERT INTO reference.countries VALUES ('zz', 'nowhere')")
    with admin(cluster.topology.physical["alpha"]) as alpha:
        alpha.execute("INSERT INTO reference.countries VALUES ('es', 'Spain')")
    expected = [{"physical": "beta", "table": "countries", "rows": 2, "expected": 2}]
    code, found = run(capsys, "reference", "check", "--json", *config)
    assert (code, found["differences"]) == (1, expected)
    code, found = run(capsys, "reference", "repair", "--dry-run", "--json", *config)
    assert (code, found["differences"], found["repaired"]) == (0, expected, {})
    code, found = run(capsys, "reference", "repair", "--json", *config)
    assert (code, found["repaired"]) == (0, {"beta": 3})
    assert everywhere(cluster) == [("es", "Spain"), ("pt", "Portugal")]
    assert run(capsys, "reference", "check", *config)[0] == 0
    with admin(cluster.topology.physical["beta"]) as beta:
        beta.execute("ALTER TABLE reference.countries ADD COLUMN extra text")
        try:
            assert run(capsys, "reference", "repair", *config)[0] == 3
        finally:
            beta.execute("ALTER TABLE reference.countries DROP COLUMN extra")
        beta.execute("BEGIN")
        beta.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
        assert run(capsys, "reference", "check", *config)[0] == 4


def test_a_trigger_that_makes_something_else_is_refused(cluster: Cluster) -> None:
    with admin(cluster.topology.physical["beta"]) as beta:
        beta.execute(
            "CREATE FUNCTION reference.spoil() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.name = 'spoilt'; RETURN NEW; END $$"
        )
        beta.execute(
            "CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON reference.countries "
            "FOR EACH ROW EXECUTE FUNCTION reference.spoil()"
        )
        try:
            with cluster.writer(atomic=True) as session:
                session.add(Country(code="es", name="Spain"))
                with pytest.raises(UnsupportedStatementError, match="trigger"):
                    session.commit()
        finally:
            beta.execute("DROP FUNCTION reference.spoil CASCADE")
    assert everywhere(cluster) == [("pt", "Portugal")]


@pytest.mark.anyio
async def test_the_same_for_asyncio(cluster: Cluster) -> None:
    async with AsyncCluster(cluster.topology) as awaited, awaited.writer(atomic=True) as session:
        session.add(Country(code="es", name="Spain"))
        await session.commit()
    assert everywhere(cluster) == [("es", "Spain"), ("pt", "Portugal")]
