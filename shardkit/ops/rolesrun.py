"""Reads who may do what on every primary, and changes it: the I/O of `shardkit roles`.

Physical shards at the same time, one connection each, with the admin's login or one that the
operator names. Roles are made first, then rights, in transactions that wait briefly for locks
and are tried again: a run that was killed is finished by the next, since each looks first. No
password is ever sent: its verifier is made here, and whether a server has it already is found out
by logging in. Called by the command line.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import sql
from sqlalchemy import URL

from shardkit.errors import (
    EndpointUnavailableError,
    OperationError,
    RefusedError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops.ddllocks import MIGRATION_KEY
from shardkit.ops.direct import connect, parameters
from shardkit.ops.rolefacts import RoleFacts
from shardkit.ops.roles import Change, decide, managed
from shardkit.ops.rolesread import read
from shardkit.secret import without_frames
from shardkit.topology import PhysicalShard, Topology

__all__ = ["PhysicalRoles", "apply", "plan"]

Connection = psycopg.Connection[tuple[Any, ...]]

_PATIENCE: Final = 60.0
"""Seconds a server has for one answer: catalogues of thousands of schemas take a while."""

_ATTEMPTS: Final = 20
_LONGEST_PAUSE: Final = 1.0
_PER_TRANSACTION: Final = 64
"""Statements in one transaction; each may hold a lock of `max_locks_per_transaction`."""

_SETTINGS: Final = "SET search_path = pg_catalog; SET statement_timeout = '60s'"
_LIMITS: Final = "SET LOCAL lock_timeout = '300ms'"


@dataclass(frozen=True, slots=True)
class PhysicalRoles:
    """What is, or was, to be done on one physical shard.

    Attributes:
        physical: its name.
        changes: what is not as it should be; after a run, what was not.
        done: how many of them were made.
        notes: what is worth knowing, such as a role without a password.
        left: after a run, what is still not as it should be.
        error: why the rest was not done, or None.
    """

    physical: str
    changes: tuple[Change, ...] = ()
    done: int = 0
    notes: tuple[str, ...] = ()
    left: tuple[Change, ...] = ()
    error: ShardkitError | None = None


@dataclass(slots=True)
class _Seen:
    """What one server says, and what was found out by logging in."""

    facts: RoleFacts
    notes: list[str] = field(default_factory=list)


def plan(topology: Topology, *, login: URL | None = None) -> list[PhysicalRoles]:
    """Return what would be changed on every physical shard; changes nothing.

    Args:
        topology: the cluster.
        login: name and password of who asks; None for the admin's.
    """
    return _everywhere(topology, partial(_planned, login=login))


def apply(topology: Topology, *, login: URL | None = None) -> list[PhysicalRoles]:
    """Change what is not as it should be, on every physical shard that answers.

    Args:
        topology: the cluster.
        login: name and password of who does it; None for the admin's.
    """
    return _everywhere(topology, partial(_applied, login=login))


def _everywhere(topology: Topology, work: Any) -> list[PhysicalRoles]:
    def one(shard: PhysicalShard) -> PhysicalRoles:
        try:
            found: PhysicalRoles = work(shard)
        except ShardkitError as error:
            return PhysicalRoles(shard.name, error=error)
        except psycopg.Error as error:
            return PhysicalRoles(shard.name, error=_told(error, shard))
        return found

    shards = list(topology.physical.values())
    with ThreadPoolExecutor(max(1, len(shards))) as pool:
        return list(pool.map(one, shards))


def _told(error: psycopg.Error, shard: PhysicalShard) -> ShardkitError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
        return TryAgainError(lines[0], endpoint=str(shard.primary))
    is_gone = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    kind = EndpointUnavailableError if is_gone else OperationError
    return kind(lines[0], endpoint=str(shard.primary))


def _connected(shard: PhysicalShard, login: URL | None) -> Connection:
    url = shard.control_url or shard.admin_url
    if login is not None:
        url = url.set(username=login.username)._replace(password=login.password)
    return connect(shard, application="shardkit roles", patience=_PATIENCE, url=url)


def _planned(shard: PhysicalShard, *, login: URL | None) -> PhysicalRoles:
    with _connected(shard, login) as connection:
        seen = _look(connection, shard)
    return PhysicalRoles(
        shard.name, tuple(decide(seen.facts, shard.roles)), notes=tuple(seen.notes)
    )


def _applied(shard: PhysicalShard, *, login: URL | None) -> PhysicalRoles:
    with _connected(shard, login) as connection:
        connection.execute(_SETTINGS)
        _lock(connection, shard)
        seen = _look(connection, shard)
        changes = tuple(decide(seen.facts, shard.roles))
        possible = [change for change in changes if not change.needs]
        done = 0
        error: ShardkitError | None = None
        try:
            for change in possible:
                _change(connection, shard, change)
                done += 1
        except psycopg.Error as failure:
            error = _told(failure, shard)
            error.hint = f"while it was to {possible[done].what}; run it again"
            if connection.broken or connection.closed:
                return PhysicalRoles(shard.name, changes, done, tuple(seen.notes), error=error)
        after = _look(connection, shard)
    return PhysicalRoles(
        shard.name,
        changes,
        done,
        tuple(after.notes),
        tuple(decide(after.facts, shard.roles)),
        error,
    )


def _lock(connection: Connection, shard: PhysicalShard) -> None:
    """Keep migrations and other runs away, to the end of the connection."""
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", (MIGRATION_KEY,)).fetchone()
    if row is None or not row[0]:
        raise RefusedError(
            f"`shardkit migrate` or `shardkit roles` is at work on physical shard {shard.name!r}",
            hint="wait for it to end",
        )


def _change(connection: Connection, shard: PhysicalShard, change: Change) -> None:
    """Make one change, in transactions of some schemas each, again while locks are held."""
    statements = list(change.statements)
    if change.password_of:
        secret = _secrets(shard)[change.password_of].password
        # The verifier is made here, so that no log and no view ever sees the password.
        verifier = connection.pgconn.encrypt_password(
            str(secret).encode(), change.password_of.encode(), b"scram-sha-256"
        )
        text = sql.SQL("ALTER ROLE {} PASSWORD {}")
        statements = [text.format(sql.Identifier(change.password_of), verifier.decode())]
    for start in range(0, len(statements), _PER_TRANSACTION):
        script = sql.SQL(";").join(
            [sql.SQL(_LIMITS), *statements[start : start + _PER_TRANSACTION]]
        )
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with connection.transaction():
                    connection.execute(script)
                break
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == _ATTEMPTS:
                    raise
                bound = min(_LONGEST_PAUSE, 0.05 * 2**attempt)
                pause = random.uniform(bound / 4, bound)  # noqa: S311  spreads retries
                threading.Event().wait(pause)


def _look(connection: Connection, shard: PhysicalShard) -> _Seen:
    """Read a server, and find out which passwords it has by logging in with them."""
    facts = read(connection, shard)
    unknown: set[str] = set()
    notes: list[str] = []
    logins = _secrets(shard)
    for name in managed(shard.roles):
        if name == shard.roles.owner:
            continue
        url = logins.get(name)
        if url is None or not url.password:
            if url is None or "sslcert" not in url.query:
                notes.append(f"{name} has no password in the configuration")
        elif name not in facts.roles:
            unknown.add(name)
        elif (reason := _refusal(url)) is not None:
            if _is_about_password(reason):
                unknown.add(name)
            else:
                notes.append(f"{name} cannot log in: {reason}")
    fields = {each: getattr(facts, each) for each in RoleFacts.__dataclass_fields__}
    return _Seen(RoleFacts(**{**fields, "unknown": frozenset(unknown)}), notes)


def _secrets(shard: PhysicalShard) -> dict[str, URL]:
    """Return each role's address, straight to the server, with its password where it is known."""
    straight = shard.control_url or shard.admin_url
    app = straight.set(username=shard.primary.url.username)._replace(
        password=shard.primary.url.password
    )
    relay = shard.relay_url
    if relay is not None:
        relay = straight.set(username=relay.username)._replace(password=relay.password)
    urls = (app, relay, shard.admin_url, shard.monitor_url, shard.mover_url)
    return {url.username or "": url for url in urls if url is not None}


def _refusal(url: URL) -> str | None:
    """Log in; return why that was refused, or None."""
    try:
        psycopg.connect(**parameters(url, application="shardkit roles")).close()
    except psycopg.OperationalError as error:
        lines = str(without_frames(error)).strip().splitlines()
        return lines[-1].partition("FATAL:")[2].strip() or lines[-1]
    return None


def _is_about_password(reason: str) -> bool:
    return "password authentication failed" in reason or "not permitted to log in" in reason
