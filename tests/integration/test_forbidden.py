"""What nobody may do: each attempted on a real server, and refused by PostgreSQL itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.fixtures.roled import Roled

pytestmark = pytest.mark.integration

# Who has no rights of the server is refused all of these, whatever else it may do.
NOBODY = (
    "CREATE ROLE mallory SUPERUSER LOGIN",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "ALTER ROLE CURRENT_USER BYPASSRLS",
    "ALTER ROLE shardkit_admin PASSWORD 'mine'",
    "ALTER ROLE postgres NOLOGIN",
    "DROP ROLE shardkit_monitor",
    "GRANT pg_read_server_files TO CURRENT_USER",
    "GRANT shardkit_admin TO CURRENT_USER",
    "SET ROLE shardkit_admin",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "CREATE DATABASE mine",
    "DROP DATABASE shardkit",
    "ALTER DATABASE shardkit OWNER TO CURRENT_USER",
    "ALTER DATABASE shardkit SET search_path = public",
    "ALTER SYSTEM SET archive_command = 'touch /tmp/mallory'",
    "SET session_replication_role = replica",
    "SET log_statement = 'none'",
    "SELECT pg_reload_conf()",
    "SELECT pg_promote()",
    "SELECT pg_switch_wal()",
    "SELECT pg_create_restore_point('mine')",
    "SELECT pg_backup_start('mine')",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_read_binary_file('postgresql.conf')",
    "SELECT pg_ls_dir('/')",
    "SELECT pg_stat_file('/etc/passwd')",
    "SELECT lo_import('/etc/passwd')",
    "COPY (SELECT 1) TO '/tmp/mallory'",
    "COPY (SELECT 1) TO PROGRAM 'cat'",
    "SELECT rolpassword FROM pg_authid",
    "SELECT * FROM pg_hba_file_rules",
    "SELECT subconninfo FROM pg_subscription",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
    "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION shardkit.cache_version()",
    "CREATE TABLESPACE mine LOCATION '/tmp'",
    "CREATE FOREIGN DATA WRAPPER mine",
    "CREATE FUNCTION pg_catalog.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION public.mine() RETURNS int LANGUAGE c AS 'libc', 'system'",
    "CREATE TABLE public.mine (id int)",
    "UPDATE pg_class SET relowner = 10",
)

# Nobody who is not the owner, or a member of it.
NOT_THE_OWNERS = (
    "SET ROLE shardkit_owner",
    "GRANT shardkit_owner TO CURRENT_USER",
    "CREATE SCHEMA mine",
    "CREATE SCHEMA shard_0003",
    "DROP SCHEMA shard_0000 CASCADE",
    "ALTER SCHEMA shard_0000 RENAME TO mine",
    "CREATE TABLE shard_0000.mine (id int)",
    "CREATE TABLE shardkit.mine (id int)",
    "CREATE TABLE reference.mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "ALTER TABLE shard_0000.users ADD COLUMN mine int",
    "ALTER TABLE shard_0000.users OWNER TO CURRENT_USER",
    "ALTER TABLE shard_0000.users DISABLE TRIGGER ALL",
    "ALTER TABLE shard_0000.users SET UNLOGGED",
    "DROP TABLE shard_0000.users",
    "TRUNCATE shard_0000.users",
    "TRUNCATE shard_0000.shardkit_outbox",
    "CREATE INDEX mine ON shard_0000.users (name)",
    "CREATE TRIGGER mine AFTER INSERT ON shard_0000.users EXECUTE FUNCTION shardkit.cache_version()",
    "CREATE RULE mine AS ON DELETE TO shard_0000.users DO INSTEAD NOTHING",
    "CREATE POLICY mine ON shard_0000.users USING (true)",
    "CREATE STATISTICS mine ON id, name FROM shard_0000.users",
    "COMMENT ON TABLE shard_0000.users IS 'mine'",
    "CREATE FUNCTION shard_0000.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION shardkit.next_id(logical_shard integer) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    "ALTER FUNCTION shardkit.next_id(integer) SECURITY INVOKER",
    "ALTER FUNCTION shardkit.lease_ids(integer[], integer[]) SET search_path = public",
    "DROP FUNCTION shardkit.next_id(integer)",
    "ALTER DEFAULT PRIVILEGES FOR ROLE shardkit_owner GRANT ALL ON TABLES TO PUBLIC",
    "REASSIGN OWNED BY shardkit_owner TO CURRENT_USER",
    "DROP OWNED BY shardkit_owner",
    "GRANT SELECT ON pg_authid TO PUBLIC",
    "SELECT shardkit.reserve_ids(0, 1)",
    "SELECT shardkit.id_clock_ms()",
    "UPDATE shard_0000.shardkit_id_state SET state = 0",
    "UPDATE shardkit.ownership SET epoch = epoch + 1",
    "DELETE FROM shardkit.ownership",
    "UPDATE shardkit.identity SET cluster = 'mine'",
    "UPDATE shardkit.placement SET rule = ''",
    "INSERT INTO shard_0000.shardkit_version (revision, checksum) VALUES ('mine', '')",
    "UPDATE shard_0000.shardkit_directory SET shard = 1",
    "DELETE FROM shard_0000.shardkit_directory",
    "UPDATE shard_0000.shardkit_outbox SET payload = '{}'",
    "SELECT setval('shard_0000.version_seq', 1)",
    "SELECT setval('shardkit.outbox_position', 1)",
    "ALTER SEQUENCE shard_0000.version_seq RESTART",
    "SELECT pg_create_physical_replication_slot('mine')",
    "SELECT pg_create_logical_replication_slot('mine', 'pgoutput')",
    "SELECT pg_drop_replication_slot('mine')",
    "CREATE PUBLICATION mine FOR TABLE shard_0000.users",
    "CREATE SUBSCRIPTION mine CONNECTION 'host=127.0.0.1' PUBLICATION mine WITH (connect = false)",
)

# What relays do is not the application's, once there are relays.
NOT_THE_APPLICATIONS = (
    "SELECT * FROM shardkit.outbox_claim('{0}', 1, 1, 1, 1)",
    "SELECT shardkit.outbox_finish('{0}', '{1}', '{0}', '{1}', true, 1)",
    "SELECT shardkit.outbox_fail(0, 1, 1, 1, 1, '')",
    "SELECT shardkit.outbox_alive(1)",
    "SELECT * FROM shardkit.outbox_lease",
    "UPDATE shardkit.outbox_lease SET owner = 1",
    "DELETE FROM shard_0000.shardkit_outbox",
    "SELECT * FROM shard_0000.shardkit_outbox_retry",
    "INSERT INTO shard_0000.shardkit_outbox_retry VALUES (1, '', 1, now(), '')",
    "SELECT * FROM shard_0000.shardkit_outbox_dead",
    "DELETE FROM shard_0000.shardkit_outbox_dead",
    "SET ROLE shardkit_relay",
    "SELECT * FROM shardkit.reference_version",
)

# Who looks sees no user's row, and writes nothing.
NOT_THE_MONITORS = (
    "SELECT * FROM shard_0000.users",
    "SELECT count(*) FROM shard_0000.photos",
    "SELECT payload FROM shard_0000.shardkit_outbox",
    "SELECT payload, error FROM shard_0000.shardkit_outbox_dead",
    "SELECT * FROM shard_0000.shardkit_lookup",
    "SELECT * FROM shard_0000.shardkit_directory",
    "SELECT * FROM shard_0000.shardkit_operations",
    "INSERT INTO shard_0000.users (id, name) VALUES (1, '')",
    "INSERT INTO reference.countries VALUES ('xx', '')",
    "UPDATE shardkit.outbox_lease SET owner = NULL",
    "DELETE FROM shardkit.decisions",
    "SELECT shardkit.next_id(0)",
    "SELECT shardkit.lease_ids('{0}', '{1}')",
    "SELECT nextval('shardkit.outbox_position')",
    "SELECT shardkit.outbox_alive(1)",
    "SET ROLE shardkit_app",
)

# The migrator changes tables, and nothing beyond them.
NOT_THE_MIGRATORS = (
    "SELECT pg_create_physical_replication_slot('mine')",
    "SELECT pg_create_logical_replication_slot('mine', 'pgoutput')",
    "CREATE SUBSCRIPTION mine CONNECTION 'host=127.0.0.1' PUBLICATION mine WITH (connect = false)",
    "GRANT shardkit_owner TO shardkit_app",
    "SET ROLE shardkit_mover",
)
NOT_THE_MOVERS = (
    "GRANT shardkit_owner TO shardkit_app",
    "SET ROLE shardkit_migrator",
    "CREATE PUBLICATION mine FOR ALL TABLES",
)

ATTEMPTS = [
    *(("app", text) for text in (*NOBODY, *NOT_THE_OWNERS, *NOT_THE_APPLICATIONS)),
    *(("relay", text) for text in (*NOBODY, *NOT_THE_OWNERS)),
    *(("monitor", text) for text in (*NOBODY, *NOT_THE_OWNERS, *NOT_THE_MONITORS)),
    *(("migrator", text) for text in (*NOBODY, *NOT_THE_MIGRATORS)),
    *(("mover", text) for text in (*NOBODY, *NOT_THE_MOVERS)),
]

As = Callable[[str], psycopg.Connection]


@pytest.fixture(scope="module")
def as_(roled: Roled) -> Iterator[As]:
    """Connect as somebody, once for all attempts."""
    open_: dict[str, psycopg.Connection] = {}

    def connection(duty: str) -> psycopg.Connection:
        if duty not in open_:
            open_[duty] = roled.connect(duty)
        return open_[duty]

    with roled.superuser():  # somebody whose connection could be ended
        yield connection
    for each in open_.values():
        each.close()


def test_there_are_enough_attempts() -> None:
    assert len({text for duty, text in ATTEMPTS if duty == "app"}) >= 100


@pytest.mark.parametrize(("duty", "text"), ATTEMPTS)
def test_postgresql_refuses(as_: As, duty: str, text: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_(duty).execute(text.encode())


@pytest.mark.parametrize("database", ["postgres", "template1"])
@pytest.mark.parametrize("duty", ["app", "relay", "monitor", "migrator", "mover"])
def test_nobody_reaches_another_database(roled: Roled, duty: str, database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match=r"permission denied|no pg_hba"):
        roled.connect(duty, dbname=database).close()


def test_the_owner_cannot_log_in(roled: Roled) -> None:
    with pytest.raises(
        psycopg.OperationalError, match=r"password authentication failed|not permitted"
    ):
        roled.connect("app", user="shardkit_owner", password="x")
