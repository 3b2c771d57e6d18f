"""Checks of PgBouncer, and of what the application gets through it.

Source: PgBouncer's documentation of its settings and its changelog; docs/doctor.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shardkit.ops.health.facts import Facts
from shardkit.ops.health.findings import Problem, Severity, check

__all__ = ["CHECKS"]

_CARRIES = (1, 21)
"""First version that carries prepared statements from one server connection to another."""

_CANCELS_SAFELY = (1, 20)

_TRACKS_SAFELY = (1, 25, 1)
"""Version in which CVE-2025-12819 is fixed: search_path as a tracked parameter ran as SQL."""

_LONGEST_WAIT = 30
_LOOPBACK = ("127.", "::1", "localhost", "/")


@check(Severity.WARNING, "put the admin's login into `stats_users` of pgbouncer.ini, and RELOAD")
def pooler_silent(facts: Facts) -> Iterator[Problem]:
    """A PgBouncer whose console does not answer the admin's login: nothing of it was checked."""
    for where, error in facts.failures.items():
        if where.startswith("pgbouncer "):
            yield Problem(where, error.message)


@check(Severity.ERROR, "pool_mode = transaction, and RELOAD")
def pool_mode(facts: Facts) -> Iterator[Problem]:
    """A database of PgBouncer in another mode than transaction."""
    for pooler in facts.poolers:
        for database in pooler.databases:
            if database.mode != "transaction":
                why = (
                    "transactions are refused"
                    if database.mode == "statement"
                    else "a client holds its server connection while it lives"
                )
                yield Problem(pooler.where, f"{database.name} is in {database.mode} mode: {why}")


@check(Severity.ERROR, "write its real version behind `pooler`, or upgrade it")
def pooler_version(facts: Facts) -> Iterator[Problem]:
    """shardkit.toml says a PgBouncer that carries prepared statements, and it is older."""
    for pooler in facts.poolers:
        prepares = facts.expected.prepares
        says = pooler.told >= _CARRIES if prepares is None else prepares
        if says and pooler.version < _CARRIES:
            yield Problem(
                pooler.where,
                f"is {_dotted(pooler.version)}: prepared statements fail below 1.21",
            )


@check(Severity.NOTE, "write its version behind `pooler` in shardkit.toml")
def pooler_newer(facts: Facts) -> Iterator[Problem]:
    """A PgBouncer that could carry prepared statements, but is not asked to."""
    for pooler in facts.poolers:
        if pooler.version >= _CARRIES > pooler.told and facts.expected.prepares is None:
            yield Problem(
                pooler.where, f"is {_dotted(pooler.version)}, shardkit.toml does not say so"
            )


@check(Severity.WARNING, "upgrade PgBouncer to 1.20 or newer, and have it restarted when it ends")
def pooler_cancels(facts: Facts) -> Iterator[Problem]:
    """A PgBouncer that ends, with all connections, when a client gives up while it cancels.

    Seen with 1.18.0, a frozen server and a deadline: "bad client state: 0".
    Source: issue 801 and pull request 846 of pgbouncer/pgbouncer.
    """
    for pooler in facts.poolers:
        if pooler.version < _CANCELS_SAFELY:
            yield Problem(
                pooler.where, f"is {_dotted(pooler.version)}: a cancelled query may end it"
            )


@check(Severity.ERROR, "max_prepared_statements = 200, and RELOAD")
def pooler_prepares(facts: Facts) -> Iterator[Problem]:
    """Clients prepare statements, and PgBouncer is not set up to carry them."""
    for pooler in facts.poolers:
        prepares = facts.expected.prepares
        says = pooler.told >= _CARRIES if prepares is None else prepares
        has = pooler.settings.get("max_prepared_statements", "0") != "0"
        if says and pooler.version >= _CARRIES and not has:
            yield Problem(pooler.where, "max_prepared_statements is 0")


@check(Severity.ERROR, "lower default_pool_size or pool_size, or raise max_connections")
def pooler_room(facts: Facts) -> Iterator[Problem]:
    """The pools of PgBouncer open more connections than the server behind them takes."""
    for pooler in facts.poolers:
        server = facts.primary(pooler.physical)
        if server is None:
            continue
        reserved = server.number("superuser_reserved_connections")
        room = server.number("max_connections") - reserved
        sizes: Counter[str] = Counter()
        for database in pooler.databases:
            sizes[database.server] += database.size
        for address, size in sorted(sizes.items()):
            if size > room:
                yield Problem(
                    pooler.where, f"opens {size} connections to {address}, which takes {room}"
                )


@check(Severity.ERROR, "default_pool_size = 2 or more, above the writers at a time, and RELOAD")
def pooler_starves(facts: Facts) -> Iterator[Problem]:
    """One server connection: a writer that mints ids waits for itself."""
    for pooler in facts.poolers:
        for database in pooler.databases:
            if database.size < 2:
                yield Problem(
                    pooler.where,
                    f"{database.name} has {database.size} connection; a writer needs two",
                )


@check(Severity.WARNING, "raise max_client_conn, and the limit of open files with it")
def pooler_clients(facts: Facts) -> Iterator[Problem]:
    """max_client_conn is below what the pools of the processes may open."""
    for pooler in facts.poolers:
        room = int(pooler.settings.get("max_client_conn", "100"))
        shard = facts.expected.topology.physical.get(pooler.physical)
        replicas = len(shard.replicas) if shard else 0
        one = facts.expected.writers_pools + replicas * facts.expected.readers_pools
        wanted = one * facts.expected.processes
        if wanted > room:
            yield Problem(pooler.where, f"max_client_conn is {room}; clients may open {wanted}")


@check(Severity.ERROR, "remove search_path from track_extra_parameters; names carry their schema")
def pooler_tracks_path(facts: Facts) -> Iterator[Problem]:
    """track_extra_parameters has search_path: CVE-2025-12819 below 1.25.1, of no use above."""
    for pooler in facts.poolers:
        tracked = pooler.settings.get("track_extra_parameters", "")
        if "search_path" in {name.strip().lower() for name in tracked.split(",")}:
            worse = " and can be made to run SQL" if pooler.version < _TRACKS_SAFELY else ""
            yield Problem(pooler.where, f"carries search_path from client to client{worse}")


@check(Severity.WARNING, "take it out of ignore_startup_parameters")
def pooler_ignores(facts: Facts) -> Iterator[Problem]:
    """Settings that clients send at start and PgBouncer drops without a word."""
    for pooler in facts.poolers:
        ignored = pooler.settings.get("ignore_startup_parameters", "")
        names = {name.strip().lower() for name in ignored.split(",")}
        if found := sorted(names & {"options", "search_path", "statement_timeout"}):
            yield Problem(pooler.where, f"drops {', '.join(found)} of clients")


@check(Severity.WARNING, "server_reset_query_always = 0; nothing is left that it would clear")
def pooler_resets(facts: Facts) -> Iterator[Problem]:
    """server_reset_query runs after every transaction: a round trip each, for nothing."""
    for pooler in facts.poolers:
        is_on = pooler.settings.get("server_reset_query_always", "0") not in {"0", "no", ""}
        if is_on and pooler.settings.get("server_reset_query"):
            yield Problem(pooler.where, "runs server_reset_query after every transaction")


@check(Severity.ERROR, "auth_type = scram-sha-256")
def pooler_trusts(facts: Facts) -> Iterator[Problem]:
    """PgBouncer lets in who has no password."""
    for pooler in facts.poolers:
        found = pooler.settings.get("auth_type", "")
        if found in {"trust", "any"}:
            yield Problem(pooler.where, f"auth_type is {found}")


@check(Severity.WARNING, "query_wait_timeout = 2, and RELOAD")
def pooler_waits(facts: Facts) -> Iterator[Problem]:
    """Clients wait for a server connection longer than for anything else."""
    for pooler in facts.poolers:
        found = float(pooler.settings.get("query_wait_timeout", "120"))
        if found == 0 or found > _LONGEST_WAIT:
            yield Problem(pooler.where, f"query_wait_timeout is {found:g} s; 0 is for ever")


@check(Severity.WARNING, "client_tls_sslmode = require with a certificate")
def pooler_plain_text(facts: Facts) -> Iterator[Problem]:
    """A PgBouncer beyond this machine without TLS."""
    for pooler in facts.poolers:
        is_plain = pooler.settings.get("client_tls_sslmode", "disable") in {"disable", "allow"}
        if is_plain and not pooler.host.startswith(_LOOPBACK):
            yield Problem(pooler.where, "clients' passwords and rows travel unencrypted")


@check(Severity.ERROR, "connect_query = 'SET default_transaction_read_only = on' for readers")
def readers_write(facts: Facts) -> Iterator[Problem]:
    """An address for readers where they could write."""
    for login in facts.logins:
        if login.is_for_readers and not login.is_read_only:
            yield Problem(login.where, "readers could write here")


@check(Severity.ERROR, "point the pooler at the primary, and RELOAD")
def leads_astray(facts: Facts) -> Iterator[Problem]:
    """An address of the application that leads to another server than the commands' address."""
    systems = {server.where: server.system for server in facts.servers}
    for login in facts.logins:
        behind = systems.get(login.where.removesuffix(" (reader)"))
        if behind and login.system and login.system != behind:
            yield Problem(login.where, "leads to another server than `admin` does")


@check(Severity.ERROR, "pool_mode = transaction, or connect atomic writers straight")
def twophase_refused(facts: Facts) -> Iterator[Problem]:
    """Atomic writers behind a PgBouncer in statement mode: PREPARE TRANSACTION cannot be sent.

    In transaction mode it can: PREPARE TRANSACTION ends the transaction on its server connection,
    and COMMIT PREPARED may be sent on any other.
    """
    if len(facts.expected.topology.physical) < 2:
        return
    for pooler in facts.poolers:
        if any(database.mode == "statement" for database in pooler.databases):
            yield Problem(pooler.where, "atomic writers cannot prepare in statement mode")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


CHECKS = (
    pooler_silent, pool_mode, pooler_version, pooler_newer, pooler_cancels, pooler_prepares,
    pooler_room, pooler_starves, pooler_clients, pooler_tracks_path, pooler_ignores, pooler_resets,
    pooler_trusts, pooler_waits, pooler_plain_text, readers_write, leads_astray, twophase_refused,
)  # fmt: skip
