"""An embedded PostgreSQL: made by initdb or cloned from a primary, and launched.

Called by `cluster`. What a server is, primary or replica, is read from its data folder every
time, so a promotion by `shardkit failover` is respected at the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardkit.errors import LocalServerError
from shardkit.local.account import child_environment, write_file
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.ports import HOST
from shardkit.local.server import ServerKind, ServerProcess, run_tool
from shardkit.local.settings import (
    ADMIN_ROLE,
    APP_ROLE,
    DATABASE,
    REPLICATION_ROLE,
    SUPERUSER,
    postgres_conf,
)
from shardkit.ops.moves.replication import NAMES
from shardkit.topology import Role

__all__ = ["PostgresServer", "role_of"]

_BUILTIN_LOCALE = 17
"""First version with a locale of its own. Source: PostgreSQL 17 manual, 23.1.4."""

_FUNCTIONS = (
    "pg_promote(boolean, integer), pg_reload_conf(), pg_wal_replay_pause(), "
    "pg_wal_replay_resume(), pg_create_restore_point(text), pg_switch_wal()"
)
_PARAMETERS = (
    "primary_conninfo, synchronous_standby_names, recovery_min_apply_delay, "
    "default_transaction_read_only"
)
"""What `shardkit failover`, `doctor` and `backup` need beyond owning the database."""

_SILENCED = "log_min_error_statement, log_statement, log_min_duration_statement"
"""What keeps the passwords of subscriptions out of the log: docs/moves.md."""

_READY = "ready"
_STATUS_LINE = 7
"""Line of postmaster.pid that says `ready`. Source: PostgreSQL, miscadmin.h."""


_BEGUN = "servers diverged"
"""What pg_rewind says before it changes anything. Source: PostgreSQL's pg_rewind.c."""


def role_of(folder: Path) -> Role:
    """Return what the server of a data folder is; a promotion removes the signal file."""
    return Role.REPLICA if (folder / "standby.signal").exists() else Role.PRIMARY


class PostgresServer(ServerProcess):
    """One PostgreSQL server.

    Attributes:
        primary: the server it follows while it is a replica.
    """

    kind: ClassVar[ServerKind] = ServerKind.POSTGRESQL
    # Fast shutdown: sessions are ended, the log is written out.
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT

    layout: Layout
    options: LocalOptions
    primary: PostgresServer | None = None

    @property
    def role(self) -> Role:
        """Replica while its folder says so, else primary."""
        return role_of(self.folder)

    @property
    def superuser_dsn(self) -> str:
        """How the owner of the cluster connects as superuser, by unix socket, no password."""
        return make_conninfo(host=str(self.layout.sockets), port=self.port, user=SUPERUSER)

    def has_data(self) -> bool:
        """Return whether the folder holds a database."""
        return (self.folder / "PG_VERSION").exists()

    def initialise(self) -> None:
        """Make a new, empty primary; what was in the folder is deleted.

        Raises:
            LocalServerError: initdb failed.
        """
        self.layout.empty_folder(self.name)
        # Strings compare by code point, as in Python: a merge in the client then agrees with
        # every server.
        if self.program.major >= _BUILTIN_LOCALE:
            locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        else:
            locale = ["--locale=C.UTF-8"]
        self._run(
            "initdb",
            f"--pgdata={self.folder}",
            f"--username={SUPERUSER}",
            "--encoding=UTF8",
            *locale,
            # The rules in force are those of the conf folder; this copy lets nobody in.
            "--auth=reject",
            *(() if self.options.fsync else ("--no-sync",)),
            "--no-instructions",
        )

    def clone(self, primary: PostgresServer) -> None:
        """Make a replica of a running primary; what was in the folder is deleted, once it is done.

        What a standby has may be nowhere else by the time that the primary is gone in the middle.

        Raises:
            LocalServerError: pg_basebackup failed; the folder is as it was.
        """
        new = f"{self.name}.new"
        self._run(
            "pg_basebackup",
            f"--pgdata={self.layout.empty_folder(new)}",
            f"--dbname={self._conninfo(primary)}",
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-manifest",
            *(() if self.options.fsync else ("--no-sync",)),
            cwd=self.layout.folder(new),
        )
        self.layout.replace_folder(self.name, new)
        self.become_replica()

    def rewind(self, primary: PostgresServer) -> bool:
        """Make a stopped server what a copy of a running primary would be; tell whether it is.

        What only this server has is lost; nothing else is copied. Not for replicas that have
        crashed: pg_rewind recovers by itself what has crashed, as a primary does, and the line
        that this adds to the log is on the same timeline and found by nobody.

        Raises:
            LocalServerError: the primary does not answer; a replica is as it was.
        """
        role = self.role
        self._write_settings(None)
        # A crash is recovered from by a server that speaks to nobody, which cannot be a standby.
        (self.folder / "standby.signal").unlink(missing_ok=True)
        try:
            self._run(
                "pg_rewind",
                f"--target-pgdata={self.folder}",
                f"--source-server={make_conninfo(primary.superuser_dsn, dbname='postgres')}",
                f"--config-file={self._settings_file}",
                *(() if self.options.fsync else ("--no-sync",)),
            )
        except LocalServerError as error:
            if _BEGUN in str(error):
                self.layout.empty_folder(self.name)  # half of it is the primary's: of no use
            elif role is Role.REPLICA:
                self.become_replica()
            if not self._answers(primary):
                raise
            return False
        # pg_rewind leaves these; on a replica nobody would drop them, and they hold back the log.
        self._drop_slots("")
        return True

    def _answers(self, primary: PostgresServer) -> bool:
        try:
            psycopg.connect(primary.superuser_dsn, dbname="postgres", connect_timeout=3).close()
        except psycopg.Error:
            return False
        return True

    def create_roles(self, passwords: Mapping[str, str]) -> None:
        """Create the roles and the database of shardkit on a running, new primary."""
        # No replica runs yet that could confirm a commit.
        alone = "-c synchronous_commit=local"
        with psycopg.connect(
            self.superuser_dsn, dbname="postgres", options=alone, autocommit=True
        ) as connection:
            for role, attributes in (
                (REPLICATION_ROLE, "LOGIN REPLICATION"),
                # It owns the schemas, makes slots for moves and roles, and is no superuser.
                (ADMIN_ROLE, "LOGIN REPLICATION CREATEROLE"),
                (APP_ROLE, "LOGIN"),
            ):
                # The verifier is made here, so that no log or view ever sees the password.
                verifier = connection.pgconn.encrypt_password(
                    passwords[role].encode(), role.encode(), b"scram-sha-256"
                )
                connection.execute(
                    sql.SQL("CREATE ROLE {} {} PASSWORD {}").format(
                        sql.Identifier(role), sql.SQL(attributes), verifier.decode()
                    )
                )
            connection.execute(f"CREATE DATABASE {DATABASE} OWNER {ADMIN_ROLE}")
            connection.execute("REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")
        with psycopg.connect(
            self.superuser_dsn, dbname=DATABASE, options=alone, autocommit=True
        ) as connection:
            for statement in self._grants():
                connection.execute(statement)

    def before_launch(self) -> None:
        """Write the settings and remove what a crash left behind."""
        conninfo = None
        if self.role is Role.REPLICA and self.primary is not None:
            conninfo = self._conninfo(self.primary)
            self._forget_old_primary()
            self._drop_slots(NAMES)  # of moves that it knew as a primary
        self._write_settings(conninfo)
        # No process works in the folder any more. A recycled pid in these files would keep
        # PostgreSQL from starting.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        for leftover in (f".s.PGSQL.{self.port}", f".s.PGSQL.{self.port}.lock"):
            (self.layout.sockets / leftover).unlink(missing_ok=True)

    def command(self) -> Sequence[str | Path]:
        """Return the command line of the postmaster."""
        return [self.program.path, "-D", self.folder, "-c", f"config_file={self._settings_file}"]

    def is_ready(self) -> bool:
        """Return whether the postmaster says that connections are accepted."""
        mark = self.mark
        try:
            lines = (self.folder / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        return (
            mark is not None
            and len(lines) > _STATUS_LINE
            and lines[0] == str(mark.pid)
            and lines[_STATUS_LINE].strip() == _READY
        )

    def timeline(self) -> int:
        """Return the timeline of a stopped server; it grows by one at each promotion."""
        return int(self._told_of("Latest checkpoint's TimeLineID") or 0)

    @property
    def is_crashed_replica(self) -> bool:
        """Whether a stopped server was a replica, and did not stop in good order."""
        return self._told_of("Database cluster state") == "in archive recovery"

    def _told_of(self, what: str) -> str | None:
        """Return what the control file of a stopped server says."""
        answer = subprocess.run(
            [self.program.tool("pg_controldata"), str(self.folder)],
            capture_output=True,
            text=True,
            check=False,
            env=dict(child_environment()),
        )
        found = re.search(rf"^{what}:\s+(.*)$", answer.stdout, re.MULTILINE)
        return found[1] if found else None

    @property
    def _settings_file(self) -> Path:
        return self.layout.conf / f"{self.name}.conf"

    def _write_settings(self, conninfo: str | None) -> None:
        text = postgres_conf(
            name=self.name,
            port=self.port,
            sockets=str(self.layout.sockets),
            options=self.options,
            folder=str(self.layout.conf),
            primary_conninfo=conninfo,
        )
        write_file(self._settings_file, text, 0o644)

    def _conninfo(self, primary: PostgresServer) -> str:
        return make_conninfo(
            host=HOST,
            port=primary.port,
            user=REPLICATION_ROLE,
            passfile=str(self.layout.conf / "replication.pgpass"),
            application_name=self.name,
        )

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> None:
        run_tool(
            [self.program.tool(tool), *arguments],
            account=self.account,
            log=self.log,
            cwd=cwd or self.folder,
        )

    def become_replica(self) -> None:
        """Have a stopped server start as a replica from now on."""
        path = self.folder / "standby.signal"
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        if self.account.is_switched:
            os.fchown(descriptor, self.account.uid, self.account.gid)
        os.close(descriptor)

    def _forget_old_primary(self) -> None:
        """Drop a `primary_conninfo` that ALTER SYSTEM left; its port may be of another time."""
        path = self.folder / "postgresql.auto.conf"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
            lines = file.readlines()
            kept = [line for line in lines if not line.startswith("primary_conninfo")]
            if kept != lines:
                file.seek(0)
                file.writelines(kept)
                file.truncate()

    def _drop_slots(self, beginning: str) -> None:
        """Drop the replication slots of a stopped server whose names begin so."""
        for slot in (self.folder / "pg_replslot").glob(f"{beginning}*"):
            shutil.rmtree(slot)

    def _grants(self) -> list[str]:
        """Return what the admin may do beside owning the database."""
        statements = [
            f"REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC",
            f"GRANT CONNECT ON DATABASE {DATABASE} TO {APP_ROLE}",
            f"GRANT pg_monitor, pg_read_all_stats TO {ADMIN_ROLE} WITH ADMIN OPTION",
            f"GRANT pg_signal_backend TO {ADMIN_ROLE}",
            f"GRANT EXECUTE ON FUNCTION {_FUNCTIONS} TO {ADMIN_ROLE}",
        ]
        if self.program.major >= 15:
            statements += [
                f"GRANT pg_checkpoint TO {ADMIN_ROLE}",
                f"GRANT ALTER SYSTEM ON PARAMETER {_PARAMETERS} TO {ADMIN_ROLE}",
                f"GRANT SET ON PARAMETER {_SILENCED} TO {ADMIN_ROLE}",
            ]
        else:
            statements.append("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        if self.program.major >= 16:
            statements += [
                f"GRANT pg_create_subscription TO {ADMIN_ROLE} WITH ADMIN OPTION",
                # To have the relay be the application, without being it.
                f"GRANT {APP_ROLE} TO {ADMIN_ROLE} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE",
            ]
        return statements
