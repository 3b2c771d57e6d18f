"""`shardkit doctor` on real servers: quiet when all is well, and one finding for what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis as redis_client

from shardkit.cli import main
from shardkit.clock import SYSTEM
from shardkit.config import Config, load
from shardkit.ids import compose
from shardkit.local import LocalCluster
from shardkit.ops import migrate
from shardkit.ops.doctor import examine
from shardkit.ops.health import postgres
from shardkit.ops.health.findings import Finding, Severity
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology
from tests.fixtures.servers import lend, options
from tests.models import Base

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0
RELOAD = "SELECT pg_reload_conf()"
# A pooler's connections keep what their role was given when they were opened.
END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shardkit_app'"
# What cannot be looked at without what is missing is said, too.
ALSO = {
    "schema-missing": {"not-looked-at"},
    "app-powers": {"roles-differ"},
    "schema-stray": {"roles-differ"},
    "ids-missing": {"roles-differ"},
}


@dataclass(frozen=True)
class Patient:
    """A migrated cluster, and what the doctor says of it."""

    local: LocalCluster
    config: Config
    topology: Topology

    def findings(self, topology: Topology | None = None) -> list[Finding]:
        """Return everything that is found but notes, and but what the system's PgBouncer is."""
        found = examine(self.config, topology or self.topology, timeout=PATIENCE)
        return [
            each
            for each in found.findings
            if each.severity is not Severity.NOTE and each.check != "pooler-cancels"
        ]

    def names(self) -> set[str]:
        """Return the names of the checks that find something."""
        return {finding.check for finding in self.findings()}

    def run(self, server: str, *statements: str) -> None:
        """Run statements as superuser, each by itself."""
        with psycopg.connect(self.local.superuser_dsn(server), autocommit=True) as superuser:
            for statement in statements:
                superuser.execute(statement.encode())


@contextmanager
def migrated(folder: Path, **shape: Any) -> Iterator[Patient]:
    """Lend a cluster with tables, models and one row of a reference table."""
    wanted = options(replicas=1, logical_shards=8, settings={"fsync": "on"}, **shape)
    with lend(folder, wanted) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        migrate.apply(topology, (), rules=migrate.load_rules("tests.models:Base"))
        text = local.config_path.read_text() + '\n[migrations]\nmodels = "tests.models:Base"\n'
        local.config_path.write_text(text)
        config, topology = load(local.config_path)
        found = Patient(local, config, topology)
        for server in ("alpha_0", "beta_0"):
            found.run(server, "INSERT INTO reference.countries VALUES ('pt', 'Portugal')")
        yield found


@pytest.fixture(scope="module")
def patient(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Patient]:
    with migrated(tmp_path_factory.mktemp("doctor") / "cluster") as found:
        yield found


@pytest.fixture
def straight(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path: Path,
) -> Iterator[Patient]:
    """A cluster without PgBouncer: version 1.18 may crash when a frozen server's query is cancelled."""
    with migrated(tmp_path / "cluster", pgbouncer=False, redis=False, memcached=False) as found:
        yield found


@pytest.fixture
def well(patient: Patient) -> Iterator[None]:
    """Every test leaves the cluster as it was."""
    yield
    left: list[Finding] = []

    def is_well() -> bool:
        left[:] = patient.findings()
        return not left

    try:
        wait_until(is_well, PATIENCE, "the cluster is well again")
    except AssertionError as error:
        raise AssertionError(f"{error}: {left}") from error


@pytest.mark.usefixtures("well")
def test_a_cluster_that_is_well_has_notes_at_most(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert patient.findings() == []
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--config", str(patient.local.config_path), *arguments])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    document = json.loads(out[out.index("{") :])
    assert document["healthy"] is True
    assert document["counts"]["error"] == 0
    assert {finding["check"] for finding in document["findings"]} <= {
        "idle-in-transaction",
        "pooler-cancels",
        "redis-unbounded",
    }
    assert "4 servers" in out


@pytest.mark.usefixtures("well")
def test_everything_was_asked(patient: Patient) -> None:
    facts = examine(patient.config, patient.topology, timeout=PATIENCE).facts
    n_poolers = 0 if "pgbouncer" in patient.local.missing else 2
    assert len(facts.servers) == len(patient.topology.endpoints) == 4
    assert len(facts.logins) == 4 + n_poolers
    assert len(facts.poolers) == n_poolers
    assert len(facts.states) == len(facts.outboxes) == 2
    assert len(facts.redis) == (0 if "redis-server" in patient.local.missing else 1)
    assert len(facts.memcached) == (0 if "memcached" in patient.local.missing else 1)
    assert {report.lookup for report in facts.lookups} == {"accounts.name", "accounts.email"}
    assert facts.reference is not None
    assert facts.reference.tables == {"countries": 1}
    assert facts.states[0].widest >= 8
    assert sum(len(state.ids) for state in facts.states) == 8


ROW = compose(1_000_000, 0, 0)
DEAD = "(id, topic, payload, created, attempts, error)"
LATE = "(position, id, topic, payload, created)"

BROKEN: list[tuple[str, str, list[str], list[str]]] = [
    (
        "full-page-writes",
        "alpha_0",
        ["ALTER SYSTEM SET full_page_writes = off", RELOAD],
        ["ALTER SYSTEM RESET full_page_writes", RELOAD],
    ),
    (
        "autovacuum",
        "beta_1",
        ["ALTER SYSTEM SET autovacuum = off", RELOAD],
        ["ALTER SYSTEM RESET autovacuum", RELOAD],
    ),
    (
        "passwords-logged",
        "beta_0",
        ["REVOKE SET ON PARAMETER log_min_error_statement FROM shardkit_admin"],
        ["GRANT SET ON PARAMETER log_min_error_statement TO shardkit_admin"],
    ),
    (
        "pending-restart",
        "alpha_1",
        ["ALTER SYSTEM SET max_connections = 201", RELOAD],
        ["ALTER SYSTEM RESET max_connections", RELOAD],
    ),
    (
        "sync-wildcard",
        "alpha_0",
        ["ALTER SYSTEM SET synchronous_standby_names = '*'", RELOAD],
        ["ALTER SYSTEM RESET synchronous_standby_names", RELOAD],
    ),
    (
        "sync-unknown",
        "alpha_0",
        ["ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (alpha_1, alpha_9)'", RELOAD],
        ["ALTER SYSTEM RESET synchronous_standby_names", RELOAD],
    ),
    (
        "slot-inactive",
        "alpha_0",
        ["SELECT pg_create_physical_replication_slot('left', true)"],
        ["SELECT pg_drop_replication_slot('left')"],
    ),
    (
        "prepared-left",
        "beta_0",
        ["BEGIN; DELETE FROM reference.countries WHERE code = 'xx'; PREPARE TRANSACTION 'left'"],
        ["ROLLBACK PREPARED 'left'"],
    ),
    (
        "app-powers",
        "alpha_0",
        ["ALTER ROLE shardkit_app SUPERUSER"],
        ["ALTER ROLE shardkit_app NOSUPERUSER"],
    ),
    (
        "app-creates",
        "beta_0",
        ["GRANT CREATE ON SCHEMA public TO shardkit_app"],
        ["REVOKE CREATE ON SCHEMA public FROM shardkit_app"],
    ),
    (
        "app-owns",
        "alpha_0",
        ["CREATE TABLE public.mine ()", "ALTER TABLE public.mine OWNER TO shardkit_app"],
        ["DROP TABLE public.mine"],
    ),
    (
        "synchronous-commit",
        "alpha_0",
        ["ALTER ROLE shardkit_app SET synchronous_commit = off", END],
        ["ALTER ROLE shardkit_app RESET synchronous_commit", END],
    ),
    (
        "reference-differs",
        "beta_0",
        ["UPDATE reference.countries SET name = 'Other'"],
        ["UPDATE reference.countries SET name = 'Portugal'"],
    ),
    (
        "schema-missing",
        "alpha_0",
        ["ALTER SCHEMA shard_0001 RENAME TO gone"],
        ["ALTER SCHEMA gone RENAME TO shard_0001"],
    ),
    ("schema-stray", "alpha_0", ["CREATE SCHEMA shard_0777"], ["DROP SCHEMA shard_0777"]),
    (
        "fenced",
        "alpha_0",
        ["UPDATE shardkit.ownership SET state = 'fenced' WHERE logical_shard = 3"],
        ["UPDATE shardkit.ownership SET state = 'active' WHERE logical_shard = 3"],
    ),
    (
        "outdated",
        "alpha_0",
        ["UPDATE shard_0002.shardkit_version SET checksum = '0' || checksum"],
        ["UPDATE shard_0002.shardkit_version SET checksum = substr(checksum, 2)"],
    ),
    (
        "ids-ahead",
        "beta_0",
        ["UPDATE shard_0004.shardkit_id_state SET state = state + (1::bigint << 52)"],
        ["UPDATE shard_0004.shardkit_id_state SET state = state - (1::bigint << 52)"],
    ),
    (
        "ids-missing",
        "beta_0",
        ["ALTER TABLE shard_0005.shardkit_id_state RENAME TO gone"],
        ["ALTER TABLE shard_0005.gone RENAME TO shardkit_id_state"],
    ),
    (
        "lookup-incomplete",
        "alpha_0",
        [f"INSERT INTO shard_0000.accounts (id, name, bio) VALUES ({ROW}, 'ana', '')"],
        [f"DELETE FROM shard_0000.accounts WHERE id = {ROW}"],
    ),
    (
        "outbox-dead",
        "beta_0",
        [f"INSERT INTO shard_0006.shardkit_outbox_dead {DEAD} VALUES (1, 't', '1', now(), 9, 'x')"],
        ["DELETE FROM shard_0006.shardkit_outbox_dead"],
    ),
    (
        "outbox-late",
        "alpha_0",
        [f"INSERT INTO shard_0001.shardkit_outbox {LATE} VALUES (1, 1, 't', '1', '2026-01-01')"],
        ["DELETE FROM shard_0001.shardkit_outbox"],
    ),
]


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize(
    ("name", "server", "breaks", "mends"), BROKEN, ids=[name for name, *_ in BROKEN]
)
def test_what_is_broken_is_the_one_thing_found(
    patient: Patient,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    server: str,
    breaks: list[str],
    mends: list[str],
) -> None:
    monkeypatch.setattr(postgres, "LEFT_AFTER", 0.0)
    patient.run(server, *breaks)
    try:
        # A server takes a new setting over when it likes.
        expected = {name} | ALSO.get(name, set())
        wait_until(lambda: patient.names() == expected, PATIENCE, f"{name} is found, nothing else")
        (finding,) = (each for each in patient.findings() if each.check == name)
        assert server.partition("_")[0] in finding.where or name == "lookup-incomplete"
    finally:
        patient.run(server, *mends)


@pytest.mark.usefixtures("well")
def test_a_standby_that_is_waited_for_in_vain_blocks_commits(patient: Patient) -> None:
    patient.run("beta_0", "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (nobody)'", RELOAD)
    try:
        wait_until(
            lambda: patient.names() == {"sync-blocked", "sync-unknown"}, PATIENCE, "both are found"
        )
    finally:
        patient.run("beta_0", "ALTER SYSTEM RESET synchronous_standby_names", RELOAD)


@pytest.mark.usefixtures("well")
def test_a_replica_that_is_not_what_the_file_says(patient: Patient) -> None:
    alpha = patient.topology.physical["alpha"]
    (replica,) = alpha.replicas
    swapped = replace(
        alpha,
        primary=replace(alpha.primary, url=replica.url, read_url=None),
        replicas=(replace(replica, url=alpha.primary.url),),
        admin_url=replica.url.set(
            username=alpha.admin_url.username, password=alpha.admin_url.password
        ),
    )
    topology = Topology(
        patient.topology.name,
        {**patient.topology.physical, "alpha": swapped},
        patient.topology.shard_map,
    )
    found = {finding.check for finding in patient.findings(topology)}
    assert "role" in found
    assert "readers-write" in found


@pytest.mark.usefixtures("well")
def test_a_policy_that_evicts_anything(patient: Patient) -> None:
    address = patient.config.services.get("redis")
    if address is None:
        pytest.skip("Redis is not installed")
    client = redis_client.Redis.from_url(address)
    try:
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert patient.names() == {"redis-policy"}
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.close()


@contextmanager
def stopped(local: LocalCluster, name: str) -> Iterator[None]:
    local.stop_server(name)
    try:
        yield
    finally:
        local.start_server(name)


@contextmanager
def frozen(local: LocalCluster, name: str) -> Iterator[None]:
    local.pause(name)
    try:
        yield
    finally:
        local.resume(name)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_a_finding(
    straight: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    for outage in (stopped, frozen):
        for server in ("alpha_1", "alpha_0"):
            with outage(straight.local, server):
                file, began = str(straight.local.config_path), SYSTEM.monotonic()
                with pytest.raises(SystemExit) as caught:
                    main(["doctor", "--config", file, "--json", "--timeout", "5"])
                assert SYSTEM.monotonic() - began < 30.0, "two rounds of five seconds"
            document = json.loads(capsys.readouterr().out)
            assert caught.value.code == 1
            found = [each for each in document["findings"] if each["severity"] == "error"]
            silent = [each for each in found if each["check"] == "unreachable"]
            role = "replica" if server == "alpha_1" else "primary"
            assert silent
            assert all(each["where"].startswith(f"alpha/{role}@") for each in silent)
            assert not any(each["where"].startswith("beta") for each in found)
            wait_until(lambda: straight.names() == set(), PATIENCE, f"{server} is well again")


@pytest.mark.usefixtures("well")
def test_a_service_that_does_not_answer_is_a_finding(patient: Patient) -> None:
    if "memcached" in patient.local.missing:
        pytest.skip("Memcached is not installed")
    with stopped(patient.local, "memcached"):
        (finding,) = patient.findings()
    assert (finding.check, finding.where) == ("unreachable", "memcached")


@pytest.mark.usefixtures("well")
def test_more_processes_need_more_connections(patient: Patient) -> None:
    found = examine(patient.config, patient.topology, timeout=PATIENCE, processes=1000)
    names = {finding.check for finding in found.findings}
    assert names & {"connections", "pooler-clients"}


@pytest.mark.usefixtures("well")
def test_models_that_cannot_be_loaded_are_a_finding(patient: Patient) -> None:
    migrations = patient.config.migrations.model_copy(update={"models": "no_such_module:Base"})
    config = patient.config.model_copy(update={"migrations": migrations})
    found = examine(config, patient.topology, timeout=PATIENCE)
    (finding,) = (each for each in found.findings if each.check == "not-looked-at")
    assert finding.where == "unique columns"
    assert "no_such_module" in finding.message


@pytest.mark.usefixtures("well")
def test_a_wrong_password_is_a_finding_and_is_not_shown(patient: Patient) -> None:
    shards = {
        name: replace(shard, admin_url=shard.admin_url.set(password="wr0ng"))
        for name, shard in patient.topology.physical.items()
    }
    topology = Topology(patient.topology.name, shards, patient.topology.shard_map)
    found = [each for each in patient.findings(topology) if each.check == "unreachable"]
    assert {each.where for each in found} == {str(each) for each in topology.endpoints}
    assert all("the admin login" in each.message for each in found)
    assert not any("wr0ng" in str(each) for each in patient.findings(topology))
