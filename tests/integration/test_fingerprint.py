"""How tables place their rows is recorded with the data; a model that says otherwise is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import BigInteger, Text, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import Cluster, Directory, Range, ReadSession, Sharded, all_shards
from shardkit.cli import main
from shardkit.errors import ConfigurationError, RefusedError
from shardkit.keys import canonical
from shardkit.local import LocalCluster
from shardkit.models import rules_of
from shardkit.ops import migrate
from shardkit.strategies import hash_shard
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology
from tests.fixtures.sharded import admin
from tests.fixtures.site import QUICK, Site
from tests.models import Base as Known
from tests.models import Handle, Reading, Tenant

pytestmark = pytest.mark.integration


def base(strategy: Any, *, kind: type[Any] = Text, table: str = "handles") -> Any:
    """Return a declarative base with one model: `handles` as somebody edited it."""

    class Base(DeclarativeBase):
        pass

    class Edited(Sharded, Base):
        __tablename__ = table
        __shard_key__ = "name"
        __shard_strategy__ = strategy
        name: Mapped[Any] = mapped_column(kind, primary_key=True)

    Base.edited = Edited
    return Base


EDITED = [
    (Directory("names"), Text),
    (Range([("m", 1)], rest=2), Text),
    ("hash", BigInteger),
    ("embedded", BigInteger),
]


@pytest.mark.parametrize(("strategy", "kind"), EDITED)
def test_a_cluster_refuses_a_model_that_places_otherwise(
    cluster: Cluster, strategy: Any, kind: type[Any]
) -> None:
    edited = base(strategy, kind=kind).edited
    key: Any = "ana" if kind is Text else 5
    calls: list[Callable[[ReadSession], Any]] = [
        lambda session: session.get(edited, key),
        lambda session: session.scalars(select(edited).where(edited.name == key)),
        lambda session: session.scalars(select(edited).options(all_shards())),
    ]
    for call in calls:
        with cluster.reader() as reader, pytest.raises(ConfigurationError, match="were placed by"):
            call(reader)
    with cluster.writer() as session:
        session.add(edited(name=key))
        with pytest.raises(ConfigurationError, match="were placed by"):
            session.flush()
    with cluster.reader() as reader:
        assert reader.get(Handle, "ana") is None, "the right model goes on"


def test_a_table_that_is_not_recorded_is_not_checked(topology: Topology) -> None:
    for physical in topology.physical.values():
        with admin(physical) as connection:
            connection.execute("DELETE FROM shardkit.placement WHERE table_name = 'readings'")
    try:
        with Cluster(topology) as cluster, cluster.reader(after=ASK_PRIMARIES) as reader:
            assert reader.get(Reading, 1) is None
    finally:
        rule = rules_of(Known.metadata)["readings"]
        for physical in topology.physical.values():
            with admin(physical) as connection:
                connection.execute("INSERT INTO shardkit.placement VALUES ('readings', %s)", [rule])


def test_the_application_cannot_change_what_is_recorded(cluster: Cluster) -> None:
    with cluster.writer() as session, pytest.raises(Exception, match="permission denied"):
        session.execute(text("DELETE FROM shardkit.placement"), bind_arguments={"logical_shard": 0})


def test_migrations_record_rules_once_and_refuse_others(site: Site) -> None:
    rules = rules_of(base("hash", table="t").metadata)
    other = rules_of(base(Directory("t"), table="t").metadata)
    assert site.apply().error is None
    found = migrate.status(site.topology, site.revisions(), rules=rules)
    assert [entry.unrecorded for entry in found.physical] == [("t",), ("t",)]
    assert site.apply(rules=rules).error is None
    found = migrate.status(site.topology, site.revisions(), rules=rules)
    assert [entry.unrecorded for entry in found.physical] == [(), ()]
    for run in (migrate.plan, migrate.status):
        with pytest.raises(RefusedError, match="were placed by"):
            run(site.topology, site.revisions(), rules=other)
    with pytest.raises(RefusedError, match="rows of t on 'alpha'"):
        migrate.apply(site.topology, site.revisions(), rules=other, limits=QUICK)
    assert site.apply().error is None, "without models nothing is checked"


@pytest.fixture
def models() -> Iterator[str]:
    """A module that holds models, by name."""
    sys.modules["shop_models"] = type(sys)("shop_models")
    sys.modules["shop_models"].Base = base(Directory("t"), table="t")  # type: ignore[attr-defined]
    yield "shop_models"
    del sys.modules["shop_models"]


def test_the_commands_take_the_models_from_the_configuration(
    site: Site, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--config", str(site.config)])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    site.config.write_text(
        f'{site.config.read_text()}\n[migrations]\nlocation = "{site.folder}"\n'
        f'models = "{models}:Base"\n'
    )
    assert "record how t place their rows" in run("migrate", "plan")[1]
    assert run("migrate", "apply")[0] == 0
    code, out, _ = run("migrate", "status", "--json")
    assert code == 0
    assert json.loads(out)["physical"]["alpha"]["unrecorded"] == []
    assert run("migrate", "plan", "--models", "no_such_module:Base")[0] == 2
    assert run("migrate", "plan", "--models", f"{models}:Other")[0] == 2
    assert run("migrate", "plan", "--models", "json:dumps")[0] == 2
    code, _, error = run("locate", "--key", "x", "--table", "t")
    assert code == 1
    assert "no entry" in error
    code, _, error = run("locate", "--key", "x", "--table", "unknown")
    assert code == 1
    assert "not recorded" in error


def test_locate_follows_the_recorded_rule(
    cluster: Cluster, local_cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.writer() as session:
        session.add(Tenant(name="acme"))
        session.commit()
        placed = session.route(select(Tenant).where(Tenant.name == "acme")).shards

    def located(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as caught:
            main(["locate", *arguments, "--json", "--config", str(local_cluster.config_path)])
        captured = capsys.readouterr()
        assert caught.value.code == 0, captured.err
        return dict(json.loads(captured.out))

    found = located("--key", "acme", "--table", "tenants")
    assert (found["logical_shard"],) == placed
    assert found["strategy"] == "directory"
    assert located("--key", "-3", "--table", "readings")["logical_shard"] == 3
    hashed = located("--key", "ana", "--table", "handles")
    assert hashed["logical_shard"] == hash_shard(canonical("ana"), 64)
