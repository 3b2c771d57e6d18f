-- The roles and the database of a new primary. Run once, by its superuser, over the unix socket;
-- verifiers are filled in by logins.py, so no server and no log sees a password.
CREATE ROLE shardkit_replication LOGIN REPLICATION PASSWORD '$replication_verifier';
-- It owns the schemas, makes slots for moves and roles, and is no superuser.
CREATE ROLE shardkit_admin LOGIN REPLICATION CREATEROLE PASSWORD '$admin_verifier';
CREATE ROLE shardkit_app LOGIN PASSWORD '$app_verifier';
CREATE ROLE shardkit_pooler LOGIN PASSWORD '$pooler_verifier';
CREATE ROLE shardkit_monitor LOGIN CONNECTION LIMIT 5 PASSWORD '$monitor_verifier';
ALTER ROLE shardkit_app SET idle_in_transaction_session_timeout = '60s';

CREATE DATABASE shardkit OWNER shardkit_admin;
REVOKE ALL ON DATABASE postgres, template1, shardkit FROM PUBLIC;
GRANT CONNECT ON DATABASE shardkit TO shardkit_app, shardkit_pooler, shardkit_monitor;
\connect shardkit

-- What `shardkit failover`, `doctor` and `roles` need beyond owning the database.
GRANT pg_monitor, pg_read_all_stats, pg_create_subscription TO shardkit_admin WITH ADMIN OPTION;
GRANT pg_signal_backend, pg_checkpoint TO shardkit_admin;
GRANT shardkit_app TO shardkit_admin WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
GRANT EXECUTE ON FUNCTION pg_promote(boolean, integer), pg_reload_conf(), pg_wal_replay_pause(),
    pg_wal_replay_resume() TO shardkit_admin;
GRANT ALTER SYSTEM ON PARAMETER primary_conninfo, synchronous_standby_names,
    recovery_min_apply_delay, default_transaction_read_only TO shardkit_admin;
-- A subscription is made by a statement that has a password, and is logged when it fails: docs/moves.md.
GRANT SET ON PARAMETER log_min_error_statement, log_statement, log_min_duration_statement
    TO shardkit_admin;
GRANT pg_monitor TO shardkit_monitor;

-- PgBouncer asks for the verifiers of its clients by this function: docs/pgbouncer.md.
CREATE SCHEMA shardkit_pooler;
CREATE FUNCTION shardkit_pooler.secret(login text) RETURNS TABLE (name text, secret text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS
'SELECT rolname::text, rolpassword FROM pg_catalog.pg_authid
    WHERE rolname = login AND rolcanlogin AND NOT rolsuper';
REVOKE ALL ON FUNCTION shardkit_pooler.secret(text) FROM PUBLIC;
GRANT USAGE ON SCHEMA shardkit_pooler TO shardkit_pooler;
GRANT EXECUTE ON FUNCTION shardkit_pooler.secret(text) TO shardkit_pooler;
