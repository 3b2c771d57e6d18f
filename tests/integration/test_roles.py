"""Each role does its work, and `shardkit roles` makes and mends what that takes."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select

from shardkit import Cluster, Relay, ids
from shardkit.cli import main
from shardkit.config import CacheConfig, load
from shardkit.ops import migrate, rolesrun
from shardkit.ops.doctor import examine
from shardkit.ops.health.findings import Severity
from shardkit.ops.rebalance.measure import measure
from shardkit.ops.reference import check, repair
from shardkit.ops.status import is_healthy, read_status
from shardkit.outbox import Event
from shardkit.testing import wait_until
from shardkit.topology import libpq_options
from tests.fixtures.roled import Roled
from tests.fixtures.servers import NewCluster
from tests.models import Country, Photo, User

pytestmark = pytest.mark.integration

PATIENCE = 60.0


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Run a command; return its exit code and what it printed."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def changes(roled: Roled) -> list[str]:
    """Return what is not as it should be."""
    found = rolesrun.plan(roled.topology)
    assert not [part.error for part in found if part.error]
    return [change.what for part in found for change in part.changes]


def test_a_cluster_that_was_made_is_as_it_should_be(roled: Roled) -> None:
    assert changes(roled) == []
    outcome = migrate.apply(roled.topology, (), rules=migrate.load_rules("tests.models:Base"))
    assert outcome.error is None
    assert changes(roled) == []


def test_the_application_does_its_work(roled: Roled) -> None:
    with Cluster(roled.topology, cache=CacheConfig(backend="memory")) as cluster:
        shards = roled.topology.shard_map
        ana, bela = (
            User(id=ids.compose(1, shards.owned_by(name)[0], 7), name=name)
            for name in ("alpha", "beta")
        )
        with cluster.writer(atomic=True) as session:  # in two phases
            session.add_all([ana, bela])
            session.commit()
        with cluster.writer() as session:  # with an id of a leased block, and an event
            photo = Photo(owner_id=ana.id, caption="dawn")
            session.add(photo)
            session.emit("photo.added", {"id": str(photo.id)}, key=ana.id, near=ana.id)
            session.commit()
            token = session.token
            photo_id = photo.id
        with cluster.reader(after=token) as session:
            assert session.get(Photo, photo_id).caption == "dawn"
            found = session.scalars(select(User).where(User.id.in_([ana.id, bela.id])))
            assert {user.name for user in found} == {"alpha", "beta"}
        with cluster.writer() as session:
            session.get(Photo, photo_id).caption = "dusk"
            session.commit()
        with cluster.writer(atomic=True) as session:  # on every server
            session.add(Country(code="is", name="Iceland"))
            session.commit()
    names = {shard.primary.url.username for shard in roled.topology.physical.values()}
    assert names == {"shardkit_app"}


def test_a_relay_delivers_as_itself(roled: Roled) -> None:
    seen: list[Event] = []
    with Cluster(roled.topology) as cluster:
        with cluster.writer() as session:
            session.emit("who.delivers", {}, near=ids.compose(1, 0, 1))
            session.commit()
        relay = Relay(cluster, {"who.delivers": seen.append, "photo.added": seen.append})
        relay.drain()
    assert "who.delivers" in [event.topic for event in seen]
    with roled.connect("relay") as connection:
        row = connection.execute("SELECT count(*) FROM shard_0000.shardkit_outbox").fetchone()
    assert row == (0,)


def test_what_a_migrator_makes_can_be_used_at_once(roled: Roled) -> None:
    with roled.connect("migrator") as migrator:
        migrator.execute(
            "CREATE TABLE shard_0000.newborn (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY,"
            " old serial, name text);"
            "CREATE FUNCTION shard_0000.twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n'"
        )
    try:
        for duty in ("app", "relay"):
            with roled.connect(duty) as connection:
                row = connection.execute(
                    "INSERT INTO shard_0000.newborn (name) VALUES (%s) RETURNING shard_0000.twice(1)",
                    [duty],
                ).fetchone()
                assert row == (2,)
                connection.execute("UPDATE shard_0000.newborn SET name = 'x'")
        with (
            roled.connect("monitor") as monitor,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            monitor.execute("SELECT * FROM shard_0000.newborn")
        with roled.superuser() as superuser:
            row = superuser.execute(
                "SELECT tableowner FROM pg_tables WHERE tablename = 'newborn'"
            ).fetchone()
            assert row == ("shardkit_owner",)
        assert changes(roled) == []
    finally:
        with roled.connect("migrator") as migrator:
            migrator.execute("DROP TABLE shard_0000.newborn; DROP FUNCTION shard_0000.twice(int)")


def test_the_monitor_looks(roled: Roled) -> None:
    config, topology = load(roled.path)
    wait_until(lambda: is_healthy(read_status(topology)), PATIENCE, "every server answers")
    found = examine(config, topology, timeout=PATIENCE)
    # The embedded servers of tests do not wait for their disks.
    errors = [each for each in found.findings if each.severity is not Severity.NOTE]
    assert {each.check for each in errors} <= {"fsync"}
    assert all(state.app.name == "shardkit_app" for state in found.facts.states)
    repair(topology)
    assert not check(topology).differences
    assert all(shard.size_bytes > 0 for shard in measure(topology).shards)


def test_the_mover_can_fence_and_copy(roled: Roled) -> None:
    with roled.connect("mover") as mover:
        # Temporary: it is gone with the connection.
        mover.execute("SELECT pg_create_logical_replication_slot('away', 'pgoutput', true)")
    with roled.connect("mover") as mover, mover.transaction(force_rollback=True):
        mover.execute(
            "LOCK TABLE shard_0000.users IN EXCLUSIVE MODE;"
            "REVOKE INSERT, UPDATE, DELETE ON shard_0000.users FROM shardkit_app;"
            "UPDATE shardkit.ownership SET state = 'fenced' WHERE logical_shard = 0;"
            "CREATE PUBLICATION away FOR TABLE shard_0000.users"
        )
        mover.execute(
            "CREATE SUBSCRIPTION back CONNECTION 'host=127.0.0.1 password=x'"
            " PUBLICATION away WITH (connect = false, slot_name = NONE)"
        )


BREAKAGES = {
    "a right too many": "GRANT UPDATE ON shardkit.ownership TO shardkit_app",
    "a right for everybody": "GRANT SELECT ON shard_0000.users TO PUBLIC",
    "a right of one column": "GRANT SELECT (name) ON shard_0000.users TO shardkit_monitor",
    "a right too few": "REVOKE INSERT ON shard_0001.photos FROM shardkit_app",
    "a function for everybody": "GRANT EXECUTE ON FUNCTION shardkit.reserve_ids(int, int) TO PUBLIC",
    "a sequence": "REVOKE ALL ON SEQUENCE shard_0000.version_seq FROM shardkit_app",
    "a schema": "REVOKE USAGE ON SCHEMA shard_0001 FROM shardkit_monitor",
    "rights to come": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE shardkit_owner IN SCHEMA shard_0000"
        " REVOKE INSERT ON TABLES FROM shardkit_app"
    ),
    "rights to come for everybody": (
        "ALTER DEFAULT PRIVILEGES FOR ROLE shardkit_owner IN SCHEMA shard_0000"
        " GRANT SELECT ON TABLES TO PUBLIC"
    ),
    "an owner": "ALTER TABLE shard_0001.photos OWNER TO shardkit_app",
    "an attribute": "ALTER ROLE shardkit_relay CREATEDB",
    "a group": "GRANT pg_monitor TO shardkit_app",
    "a password": "ALTER ROLE shardkit_monitor PASSWORD 'another'",
    "the database": "GRANT TEMPORARY ON DATABASE shardkit TO PUBLIC",
    "the role of the migrator": "ALTER ROLE shardkit_migrator IN DATABASE shardkit RESET role",
    "who may be the owner": "REVOKE shardkit_owner FROM shardkit_mover GRANTED BY shardkit_admin",
}


@pytest.mark.parametrize("text", BREAKAGES.values(), ids=BREAKAGES)
def test_what_was_changed_by_hand_is_found_and_mended(roled: Roled, text: str) -> None:
    with roled.superuser() as superuser:
        superuser.execute(text.encode())
        if "GRANTED BY" not in text and text.startswith(("GRANT pg", "ALTER ROLE shardkit_relay")):
            # As a superuser did it; the admin undoes what the admin could have done.
            superuser.execute(
                "REVOKE pg_monitor FROM shardkit_app; ALTER ROLE shardkit_relay NOCREATEDB;"
                "ALTER ROLE shardkit_admin CREATEDB; SET SESSION AUTHORIZATION shardkit_admin"
            )
            superuser.execute(text.encode())
    assert changes(roled)
    found = rolesrun.apply(roled.topology)
    assert [(part.error, part.left) for part in found] == [(None, ()), (None, ())]
    assert sum(part.done for part in found) > 0
    assert changes(roled) == []
    with roled.superuser() as superuser:
        superuser.execute("ALTER ROLE shardkit_admin NOCREATEDB")


def test_a_fenced_logical_shard_is_left_to_its_mover(roled: Roled) -> None:
    fence = (
        "REVOKE INSERT, UPDATE, DELETE ON shard_0000.users FROM shardkit_app;"
        "UPDATE shardkit.ownership SET state = '{}' WHERE logical_shard = 0"
    )
    with roled.superuser() as superuser:
        superuser.execute(fence.format("fenced").encode())
        try:
            assert changes(roled) == []
        finally:
            superuser.execute(
                b"UPDATE shardkit.ownership SET state = 'active' WHERE logical_shard = 0"
            )
    assert changes(roled) == ["table users: give DELETE, INSERT, UPDATE to shardkit_app"]
    assert not [part.left for part in rolesrun.apply(roled.topology) if part.left]


def test_the_doctor_says_what_the_plan_says(roled: Roled) -> None:
    with roled.superuser() as superuser:
        superuser.execute("GRANT TRUNCATE ON shard_0000.users TO shardkit_app")
    found = examine(*load(roled.path), timeout=PATIENCE)
    [finding] = [each for each in found.findings if each.check == "roles-differ"]
    assert finding.message == "table users: take TRUNCATE from shardkit_app"
    assert "shardkit roles" in finding.remedy
    rolesrun.apply(roled.topology)


def test_the_commands_print_plans_and_end_with_their_codes(
    roled: Roled, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--config", str(roled.path))
    with roled.superuser() as superuser:
        superuser.execute("GRANT TRUNCATE ON shard_0000.users, shard_0001.users TO shardkit_app")
    line = "table users: take TRUNCATE from shardkit_app"
    code, out, _ = run(capsys, "roles", "plan", "--sql", *where)
    assert code == 0
    assert f"{line} [logical shards 0-1]" in out
    assert 'REVOKE TRUNCATE ON TABLE "shard_0001"."users" FROM "shardkit_app"' in out
    code, out, _ = run(capsys, "roles", "apply", "--dry-run", "--json", *where)
    document = json.loads(out)
    assert code == 0
    assert document["applied"] is False
    assert document["physical"]["alpha"]["changes"][0]["what"] == line
    assert changes(roled) == [line]  # nothing was done
    code, out, _ = run(capsys, "roles", "apply", *where)
    assert code == 0
    assert "alpha: 1 of 1 changes made" in out
    code, out, _ = run(capsys, "roles", "apply", "--json", *where)
    assert json.loads(out)["physical"]["alpha"] == {
        "changes": [], "done": 0, "left": [], "notes": [], "error": None,
    }  # fmt: skip


def test_a_server_that_is_down_does_not_stop_the_other(
    roled: Roled, capsys: pytest.CaptureFixture[str]
) -> None:
    with roled.superuser() as superuser:
        superuser.execute("GRANT TRUNCATE ON shard_0000.users TO shardkit_app")
    name = roled.local.primary("beta").name
    roled.local.stop_server(name)
    try:
        code, out, err = run(capsys, "roles", "apply", "--json", "--config", str(roled.path))
    finally:
        roled.local.start_server(name)
    document = json.loads(out)["physical"]
    assert code == 4
    assert document["alpha"]["done"] == 1
    assert "beta" in document["beta"]["error"]
    assert "physical shard 'beta'" in err
    assert changes(roled) == []


def test_only_one_run_at_a_time(roled: Roled, capsys: pytest.CaptureFixture[str]) -> None:
    with roled.connect("admin") as other:
        other.execute("SELECT pg_advisory_lock(%s)", [0x7368_6172_646B_6974])
        code, _, err = run(capsys, "roles", "apply", "--config", str(roled.path))
    assert code == 3
    assert "is at work" in err


def test_wrong_use_is_one_line(
    roled: Roled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = ("--config", str(roled.path))
    code, _, err = run(capsys, "roles", "plan", "--password-file", str(tmp_path / "no"), *where)
    assert (code, "--password-file goes with --user" in err) == (2, True)
    code, _, err = run(
        capsys, "roles", "plan", "--user", "x", "--password-file", str(tmp_path / "no"), *where
    )
    assert (code, "no such file" in err) == (2, True)
    monkeypatch.setenv("SHARDKIT_ROLES_PASSWORD", "wrong")
    code, _, err = run(capsys, "roles", "plan", "--user", "mallory", *where)
    assert (code, "does not accept the login 'mallory'" in err) == (4, True)
    code, _, _ = run(capsys, "roles", "plan", "--password", "x", *where)
    assert code == 2  # there is no such option


def test_an_admin_that_may_not_make_roles_says_what_it_needs(
    roled: Roled, capsys: pytest.CaptureFixture[str]
) -> None:
    with roled.superuser() as superuser:
        superuser.execute(
            "ALTER ROLE shardkit_admin NOCREATEROLE; ALTER ROLE shardkit_relay SUPERUSER"
        )
        try:
            code, out, err = run(capsys, "roles", "apply", "--config", str(roled.path))
        finally:
            superuser.execute(
                "ALTER ROLE shardkit_admin CREATEROLE; ALTER ROLE shardkit_relay NOSUPERUSER"
            )
    assert code == 1
    assert "! role shardkit_relay: NOSUPERUSER -- needs a superuser" in out
    assert "1 changes are left to be made" in err
    assert "use --user" in err


@pytest.mark.slow
def test_a_cluster_with_two_logins_gets_roles_and_hostile_names(
    new_cluster: NewCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    local = new_cluster(
        physical=1, replicas=0, logical_shards=2, redis=False, memcached=False, pgbouncer=False
    )
    local.start()
    where = ("--config", str(local.config_path))
    _, topology = load(local.config_path)
    assert [part.changes for part in rolesrun.plan(topology)] == [()]  # a fresh one
    migrate.apply(topology, ())
    assert [part.changes for part in rolesrun.plan(topology)] == [()]
    code, _, err = run(capsys, "roles", "plan", *where)
    assert (code, "has no [roles]" in err) == (0, True)

    text = local.config_path.read_text(encoding="utf-8")
    names = {
        "migrator": "Mi\"gr'a;tor --", "mover": "mover %s {}", "relay": "Relais \U0001f4ec",
        "monitor": "user",
    }  # fmt: skip
    lines = ["", "[roles]", f"owner = {json.dumps('own er')}"]
    for duty, name in names.items():
        lines.append(
            f"{duty} = {{ user = {json.dumps(name, ensure_ascii=False)}, password = {json.dumps(f'p w{chr(39)}{duty}')} }}"
        )
    local.config_path.write_text("\n".join([text, *lines, ""]), encoding="utf-8")
    _, topology = load(local.config_path)
    # Half of it is there already.
    with psycopg.connect(local.superuser_dsn("alpha_0"), autocommit=True) as superuser:
        superuser.execute(
            'CREATE ROLE "own er" LOGIN; GRANT "own er" TO shardkit_admin WITH ADMIN OPTION'
        )
        superuser.execute('ALTER TABLE shard_0001.shardkit_outbox OWNER TO "own er"')
    [part] = rolesrun.apply(topology)
    assert (part.error, part.left) == (None, ())
    assert [part.changes for part in rolesrun.plan(topology)] == [()]
    assert migrate.apply(topology, ()).error is None
    assert [part.changes for part in rolesrun.plan(topology)] == [()]
    shard = topology.physical["alpha"]
    with Cluster(topology) as cluster, cluster.writer() as session:
        session.emit("x", {}, near=ids.compose(1, 0, 1))
        session.commit()
        assert Relay(cluster, {"x": print}).drain() == 1
    for url in (shard.admin_url, shard.relay_url, shard.mover_url, shard.monitor_url):
        assert url is not None
        with psycopg.connect(**libpq_options(url)) as connection:
            connection.execute("SELECT 1 FROM shardkit.identity")


def test_no_password_reaches_a_server(roled: Roled) -> None:
    logs = [file.read_text(encoding="utf-8") for file in roled.path.parent.glob("logs/*.log")]
    text = "\n".join(logs)
    assert "SCRAM-SHA-256$" in text  # statements are logged
    secrets = [
        file.read_text(encoding="utf-8").strip() for file in roled.path.parent.glob("secrets/*")
    ]
    assert len(secrets) == 4
    assert not [secret for secret in secrets if secret in text]


def test_a_role_that_is_not_there_is_told(roled: Roled, tmp_path: Path) -> None:
    text = roled.path.read_text(encoding="utf-8").replace(
        '"secrets/', f'"{roled.path.parent}/secrets/'
    )
    file = tmp_path / "shardkit.toml"
    file.write_text(text.replace("migrator = {", 'migrator = { user = "nobody",'), encoding="utf-8")
    file.chmod(0o600)
    outcome = migrate.apply(load(file)[1], ())
    assert isinstance(outcome.error, Exception)
    assert "shardkit roles apply" in str(outcome.error)
