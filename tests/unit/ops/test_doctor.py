"""Every check of `shardkit doctor`: quiet on facts that are right, and loud on the one it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

import shardkit
from shardkit.commands.doctor import printable
from shardkit.errors import EndpointUnavailableError, OperationError
from shardkit.ops.health.facts import (
    AppRole,
    Expected,
    Facts,
    IdState,
    Login,
    Memcached,
    PgBouncer,
    PooledDatabase,
    Prepared,
    Redis,
    Server,
    Silent,
    Slot,
    Standby,
    State,
)
from shardkit.ops.health.findings import Severity
from shardkit.ops.health.registry import CHECKS, diagnose
from shardkit.ops.intervals import Interval
from shardkit.ops.ledger import OWN, Identity, Ledger, Ownership
from shardkit.ops.lookup import Report
from shardkit.ops.outbox import PhysicalOutbox
from shardkit.ops.reference import Difference, ReferenceCheck
from shardkit.ops.standbynames import named_standbys
from shardkit.topology import Endpoint, PhysicalShard, Pooler, Role, ShardMap, Topology

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
DOC = Path(shardkit.__file__).parent.parent / "docs" / "doctor.md"

SETTINGS = {
    "autovacuum": "on",
    "data_checksums": "on",
    "fsync": "on",
    "full_page_writes": "on",
    "hot_standby": "on",
    "max_connections": "200",
    "max_locks_per_transaction": "256",
    "max_prepared_transactions": "64",
    "max_replication_slots": "24",
    "max_slot_wal_keep_size": "2048",
    "max_wal_senders": "24",
    "max_worker_processes": "32",
    "password_encryption": "scram-sha-256",
    "ssl": "off",
    "superuser_reserved_connections": "3",
    "synchronous_standby_names": "ANY 1 (alpha_1)",
    "wal_level": "logical",
}


def endpoint(physical: str, role: Role, port: int, standby: str = "") -> Endpoint:
    url = make_url(f"postgresql://shardkit_app@127.0.0.1:{port}/shardkit")
    return Endpoint(physical, role, url, standby=standby)


def shard(name: str, port: int, pooler: Pooler | None = None) -> PhysicalShard:
    return PhysicalShard(
        name,
        endpoint(name, Role.PRIMARY, port),
        (endpoint(name, Role.REPLICA, port + 1, standby=f"{name}_1"),),
        make_url(f"postgresql://shardkit_admin@127.0.0.1:{port}/shardkit"),
        pooler=pooler,
    )


ALPHA, BETA = shard("alpha", 5501), shard("beta", 5601, Pooler((1, 24)))
TOPOLOGY = Topology(
    "demo", {"alpha": ALPHA, "beta": BETA}, ShardMap(("alpha",) * 2 + ("beta",) * 2, (1,) * 4)
)


def server(each: Endpoint) -> Server:
    is_replica = each.role is Role.REPLICA
    names = f"ANY 1 ({each.physical}_1)"
    return Server(
        str(each),
        each.physical,
        each.role,
        is_replica,
        180_004,
        SETTINGS | {"synchronous_standby_names": "" if is_replica else names},
        system=11 if each.physical == "alpha" else 22,
        standbys=() if is_replica else (Standby(f"{each.physical}_1", is_streaming=True),),
        extensions={"plpgsql": "1.0"},
        available=frozenset({"plpgsql"}),
    )


def state(each: PhysicalShard) -> State:
    owned = TOPOLOGY.shard_map.owned_by(each.name)
    ledger = Ledger(
        identity=Identity("demo", each.name, 4, 0),
        digest="admin",
        ownership={n: Ownership(1, "active", None) for n in owned},
        applied={n: {OWN: "own"} for n in owned},
    )
    return State(
        str(each.primary),
        each.name,
        ledger,
        "admin",
        "own",
        frozenset(owned),
        tuple(IdState(n, -5.0) for n in owned),
        n_relations=40,
        widest=6,
        app=AppRole("shardkit_app"),
        admin_powers=("REPLICATION",),
    )


def login(each: Endpoint) -> Login:
    is_replica = each.role is Role.REPLICA
    return Login(
        str(each),
        is_replica,
        is_replica,
        11 if each.physical == "alpha" else 22,
        {
            "idle_in_transaction_session_timeout": "60000",
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
        },
    )


CLEAN = Facts(
    Expected(TOPOLOGY),
    servers=tuple(server(each) for each in TOPOLOGY.endpoints),
    logins=tuple(login(each) for each in TOPOLOGY.endpoints),
    states=(state(ALPHA), state(BETA)),
    poolers=(
        PgBouncer(
            "pgbouncer 127.0.0.1:6432",
            "127.0.0.1",
            "beta",
            (1, 24, 0),
            (1, 24),
            {
                "auth_type": "scram-sha-256",
                "max_client_conn": "1000",
                "max_prepared_statements": "200",
                "query_wait_timeout": "5",
                "server_reset_query": "DISCARD ALL",
                "server_reset_query_always": "0",
                "track_extra_parameters": "IntervalStyle",
            },
            (PooledDatabase("shardkit", "127.0.0.1:5601/shardkit", "transaction", 20),),
        ),
    ),
    redis=(Redis("redis", "master", "volatile-lru", 1 << 30, is_kept=True),),
    memcached=(Memcached("memcached", (1, 6, 18), knows_meta=True, max_item_bytes=1 << 20),),
    outboxes=(PhysicalOutbox("alpha", backlog=3, oldest=0.5), PhysicalOutbox("beta")),
    reference=ReferenceCheck("alpha", {"countries": 1}, (), {}, {}),
    lookups=(Report("accounts.name", n_rows=20),),
)


def on_server(n: int, **changes: Any) -> Facts:
    servers = list(CLEAN.servers)
    servers[n] = replace(servers[n], **changes)
    return replace(CLEAN, servers=tuple(servers))


def setting(n: int, **changes: str) -> Facts:
    return on_server(n, settings={**CLEAN.servers[n].settings, **changes})


def on_state(**changes: Any) -> Facts:
    return replace(CLEAN, states=(replace(CLEAN.states[0], **changes), CLEAN.states[1]))


def on_ledger(**changes: Any) -> Facts:
    return on_state(ledger=replace(CLEAN.states[0].ledger, **changes))


def on_login(n: int, **changes: Any) -> Facts:
    logins = list(CLEAN.logins)
    logins[n] = replace(logins[n], **changes)
    return replace(CLEAN, logins=tuple(logins))


def on_app(**changes: Any) -> Facts:
    return on_state(app=replace(CLEAN.states[0].app, **changes))


def on_pooler(**changes: Any) -> Facts:
    return replace(CLEAN, poolers=(replace(CLEAN.poolers[0], **changes),))


def pooler_setting(**changes: str) -> Facts:
    return on_pooler(settings={**CLEAN.poolers[0].settings, **changes})


def on_database(**changes: Any) -> Facts:
    return on_pooler(databases=(replace(CLEAN.poolers[0].databases[0], **changes),))


def on_redis(**changes: Any) -> Facts:
    return replace(CLEAN, redis=(replace(CLEAN.redis[0], **changes),))


def on_memcached(**changes: Any) -> Facts:
    return replace(CLEAN, memcached=(replace(CLEAN.memcached[0], **changes),))


def expecting(facts: Facts = CLEAN, **changes: Any) -> Facts:
    return replace(facts, expected=replace(facts.expected, **changes))


ROW = Ownership(1, "active", None)

# Index 0 is alpha's primary, 1 its replica, 2 beta's primary.
BROKEN: dict[str, Facts | tuple[Facts, ...]] = {
    "unreachable": replace(CLEAN, silent=(Silent("alpha", "the admin login", "refused"),)),
    "role": (on_server(0, is_replica=True), on_server(1, is_replica=False)),
    "version": on_server(0, version=130_012),
    "version-differs": on_server(1, version=170_002),
    "data-checksums": setting(0, data_checksums="off"),
    "fsync": setting(1, fsync="off"),
    "full-page-writes": setting(0, full_page_writes="off"),
    "autovacuum": setting(0, autovacuum="off"),
    "wal-level": setting(0, wal_level="minimal"),
    "wal-level-moves": setting(0, wal_level="replica"),
    "pending-restart": on_server(0, pending=("max_connections",)),
    "clock": (
        on_server(0, clock_offset=0.7, clock_error=0.1),
        on_server(0, clock_offset=-3.0, clock_error=0.1),
    ),
    "encoding": on_server(0, encoding="LATIN1"),
    "collation": on_server(2, collation="en_US.utf8"),
    "prepared-disabled": setting(0, max_prepared_transactions="0"),
    "prepared-room": (
        setting(0, max_prepared_transactions="9"),
        expecting(processes=7),
    ),
    "prepared-left": (
        on_server(0, prepared=(Prepared("shardkit:a:alpha:beta", 11.0),)),
        on_server(0, prepared=(Prepared("other", 3600.0),)),
    ),
    "locks": on_state(widest=68_000),
    "locks-room": on_state(widest=20_000, n_relations=60_000),
    "connections": (expecting(processes=5), setting(0, max_connections="40")),
    "idle-in-transaction": on_login(0, settings={"idle_in_transaction_session_timeout": "0"}),
    "synchronous-commit": on_login(0, settings={"synchronous_commit": "off"}),
    "isolation": on_login(0, settings={"default_transaction_isolation": "serializable"}),
    "plain-text": on_server(0, host="10.0.0.7"),
    "md5-passwords": setting(0, password_encryption="md5"),
    "extension-missing": on_server(1, available=frozenset()),
    "extension-differs": (on_server(2, extensions={"plpgsql": "1.1"}), on_server(2, extensions={})),
    "sync-wildcard": (
        setting(0, synchronous_standby_names="*"),
        setting(1, synchronous_standby_names="FIRST 1 (a, *)"),
    ),
    "sync-missing": expecting(confirming=2),
    "sync-blocked": (
        on_server(0, standbys=()),
        on_server(0, standbys=(Standby("alpha_1", is_streaming=False),)),
        setting(0, synchronous_standby_names="FIRST 2 (alpha_1, alpha_2)"),
        setting(0, synchronous_standby_names="FIRST 2 (*)"),
    ),
    "sync-relaxed": on_server(0, intervals=(Interval("a:1", NOON, 4, "ANY 1 (alpha_1)"),)),
    "sync-lost": on_server(0, may_lose={"beyond": "0/4", "since": None}),
    "sync-unknown": setting(0, synchronous_standby_names="ANY 1 (alpha_1, alpha_9)"),
    "sync-undeclared": setting(0, synchronous_standby_names=""),
    "hot-standby": setting(0, hot_standby="off"),
    "not-streaming": on_server(1, is_streaming=False),
    "other-lineage": on_server(1, system=99),
    "replica-room": setting(1, max_connections="199"),
    "wal-senders": setting(0, max_wal_senders="2"),
    "slots-room": setting(0, max_replication_slots="0"),
    "slot-inactive": on_server(0, slots=(Slot("old", is_active=False, held_bytes=9),)),
    "slot-lost": on_server(0, slots=(Slot("old", is_active=False, held_bytes=9, is_lost=True),)),
    "slot-unbounded": on_server(
        0,
        settings={**SETTINGS, "max_slot_wal_keep_size": "-1"},
    ),
    "app-powers": on_app(powers=("SUPERUSER",)),
    "app-owns": on_app(owned=("table public.x",)),
    "app-creates": on_app(creates_in=("schema public",)),
    "admin-powers": on_state(admin_powers=("SUPERUSER",)),
    "passwords-logged": on_state(logged=("log_statement",)),
    "identity": (
        on_ledger(identity=None),
        on_ledger(identity=Identity("other", "alpha", 4, 0)),
        on_ledger(identity=Identity("demo", "gamma", 4, 0)),
        on_ledger(identity=Identity("demo", "alpha", 8, 0)),
    ),
    "roles-differ": on_state(role_changes=("table t: take TRUNCATE from app",)),
    "schema-missing": on_state(schemas=frozenset({0})),
    "schema-stray": on_state(schemas=frozenset({0, 1, 3})),
    "unowned": (
        on_ledger(ownership={0: ROW}),
        on_ledger(ownership={0: ROW, 1: ROW, 2: ROW}),
    ),
    "misplaced": on_ledger(ownership={0: ROW, 1: ROW, 3: Ownership(2, "active", None)}),
    "fenced": on_ledger(ownership={0: ROW, 1: Ownership(1, "fenced", None)}),
    "outdated": (on_ledger(digest="old"), on_ledger(applied={0: {OWN: "own"}, 1: {OWN: "old"}})),
    "ids-missing": on_state(ids=(IdState(0, None),)),
    "ids-ahead": on_state(ids=(IdState(0, 0.06),)),
    "reference-differs": (
        replace(CLEAN, reference=ReferenceCheck("alpha", {}, (Difference("beta", "c", 1, 2),), {}, {})),
        replace(CLEAN, reference=ReferenceCheck("alpha", {}, (Difference("beta", "c", None, None),), {}, {})),
    ),
    "not-looked-at": (
        replace(CLEAN, failures={"unique columns": OperationError("x")}),
        replace(CLEAN, outboxes=(PhysicalOutbox("alpha", error=OperationError("x")),)),
        replace(CLEAN, reference=ReferenceCheck("alpha", {}, (), {"beta": EndpointUnavailableError("x")}, {})),
    ),
    "lookup-incomplete": (
        replace(CLEAN, lookups=(Report("accounts.name", n_rows=20, n_missing=1),)),
        replace(CLEAN, lookups=(Report("accounts.name", n_rows=20, duplicates={(1, 2)}),)),
    ),
    "outbox-late": replace(CLEAN, outboxes=(PhysicalOutbox("alpha", backlog=1, oldest=61.0),)),
    "outbox-dead": replace(CLEAN, outboxes=(PhysicalOutbox("alpha", dead=1),)),
    "pooler-silent": replace(CLEAN, failures={"pgbouncer h:1": OperationError("not allowed")}),
    "pool-mode": (on_database(mode="session"), on_database(mode="statement")),
    "pooler-version": (on_pooler(version=(1, 18, 0)), expecting(on_pooler(version=(1, 20), told=()), prepares=True)),
    "pooler-newer": on_pooler(told=(1, 18)),
    "pooler-cancels": on_pooler(version=(1, 19, 1), told=()),
    "pooler-prepares": pooler_setting(max_prepared_statements="0"),
    "pooler-room": (on_database(size=198), on_pooler(databases=CLEAN.poolers[0].databases * 10)),
    "pooler-starves": on_database(size=1),
    "pooler-clients": pooler_setting(max_client_conn="50"),
    "pooler-tracks-path": pooler_setting(track_extra_parameters="IntervalStyle, Search_Path"),
    "pooler-ignores": pooler_setting(ignore_startup_parameters="extra_float_digits,options"),
    "pooler-resets": pooler_setting(server_reset_query_always="1"),
    "pooler-trusts": pooler_setting(auth_type="trust"),
    "pooler-waits": (pooler_setting(query_wait_timeout="0"), pooler_setting(query_wait_timeout="120")),
    "pooler-plain-text": on_pooler(host="10.0.0.7"),
    "readers-write": on_login(1, is_read_only=False),
    "leads-astray": on_login(0, system=99),
    "twophase-refused": on_database(mode="statement"),
    "redis-policy": on_redis(policy="allkeys-lru"),
    "redis-full": on_redis(policy="noeviction"),
    "redis-unbounded": on_redis(max_bytes=0),
    "redis-forgets": on_redis(is_kept=False),
    "redis-role": on_redis(role="slave"),
    "memcached-version": (on_memcached(version=(1, 5, 22)), on_memcached(knows_meta=False)),
    "memcached-item-size": on_memcached(max_item_bytes=1 << 19),
}  # fmt: skip


def test_what_is_right_is_not_found() -> None:
    assert diagnose(CLEAN) == []


def test_every_check_is_tried() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    assert set(names) == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_finds_what_it_is_for(name: str) -> None:
    broken = BROKEN[name]
    check = next(check for check in CHECKS if check.name == name)
    for facts in (broken,) if isinstance(broken, Facts) else broken:
        found = [finding for finding in diagnose(facts) if finding.check == name]
        assert found
        for finding in found:
            assert finding.severity is check.severity
            assert finding.where
            assert finding.message
            assert finding.remedy
            assert "\n" not in finding.message


QUIET: list[tuple[str, Callable[[], Facts]]] = [
    ("prepared-left", lambda: on_server(0, prepared=(Prepared("shardkit:a:b:c", 9.0),))),
    ("clock", lambda: on_server(0, clock_offset=1.0, clock_error=0.6)),
    ("ids-ahead", lambda: on_state(ids=(IdState(0, 0.04),))),
    ("connections", lambda: setting(2, max_connections="20")),  # PgBouncer stands before it
    ("sync-unknown", lambda: setting(0, synchronous_standby_names="")),
    ("unowned", lambda: replace(CLEAN, states=CLEAN.states[:1])),  # who is silent may own it
    ("fenced", lambda: on_ledger(ownership={0: ROW, 1: Ownership(1, "retired", "beta")})),
    ("pooler-version", lambda: on_pooler(version=(1, 18, 0), told=(1, 18))),
    ("idle-in-transaction", lambda: on_login(1, settings={"idle_in_transaction_session_timeout": "0"})),
    ("not-looked-at", lambda: replace(CLEAN, failures={"pgbouncer h:1": OperationError("x")})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "facts"), QUIET)
def test_a_check_is_quiet_about_what_looks_alike(name: str, facts: Callable[[], Facts]) -> None:
    assert [finding for finding in diagnose(facts()) if finding.check == name] == []


def test_the_worst_comes_first() -> None:
    facts = replace(on_redis(max_bytes=0), servers=on_server(0, pending=("x",), version=1).servers)
    found = [finding.severity for finding in diagnose(facts)]
    assert found == sorted(found, key=list(Severity).index)
    assert set(found) == set(Severity)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, ())),
        ("a, b", (1, ("a", "b"))),
        ("*", (1, ("*",))),
        ("2 (a, b)", (2, ("a", "b"))),
        ("FIRST 2 (a,b)", (2, ("a", "b"))),
        ('any 1 ("A ""b"" (c)", d)', (1, ('A "b" (c)', "d"))),
        ('"first"', (1, ("first",))),
    ],
)
def test_standby_names_are_read_as_postgresql_reads_them(
    text: str, expected: tuple[int, tuple[str, ...]]
) -> None:
    assert named_standbys(text) == expected


def test_hostile_names_are_printed_escaped() -> None:
    shown = printable("slot '\x1b[2Jx\u202e\n'")
    assert shown == "slot '\\x1b[2Jx\\u202e\\n'"


def test_the_document_lists_every_check() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split(" | "))
        for line in DOC.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert rows == [
        (f"`{check.name}`", str(check.severity), check.about, check.remedy.replace("|", "\\|"))
        for check in CHECKS
    ]
