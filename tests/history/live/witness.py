"""Looks at the servers themselves when all is healed: what is there for good, and what is left.

Over direct connections and with plain SQL: nothing of shardkit stands between a server and what
is written down of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from shardkit.ops.shape import details
from shardkit.testing import wait_until
from shardkit.topology import schema_name
from tests.history.k6 import scan
from tests.history.live.stage import Stage
from tests.history.live.tables import ACCOUNTS, Account, Chain, place
from tests.history.recorder import Recorder

__all__ = [
    "image",
    "look",
    "note_secrets",
    "note_state",
    "wait_for_empty_outboxes",
]

Connection = psycopg.Connection[tuple[Any, ...]]

_LEFT: Final = {
    "replication slots": "SELECT slot_name FROM pg_replication_slots",
    "subscriptions": "SELECT subname FROM pg_subscription",
    "publications": "SELECT pubname FROM pg_publication",
    "prepared transactions": "SELECT gid FROM pg_prepared_xacts",
    "claims of moves": "SELECT logical_shard || ' by ' || move_id FROM shardkit.ownership"
    " WHERE move_id IS NOT NULL",
    "fences": "SELECT logical_shard FROM shardkit.ownership WHERE state IN ('fenced', 'importing')",
    "locks of sessions": "SELECT a.application_name || ' ' || l.classid || ' ' || l.objid"
    " FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE l.locktype = 'advisory'",
    "idle transactions": "SELECT concat_ws(' ', application_name, pid, 'begun', xact_start,"
    " 'idle since', state_change, 'xid', backend_xid, query) FROM pg_stat_activity"
    " WHERE state LIKE 'idle in transaction%' AND now() - state_change > interval '3 s'",
    "dead letters": "",
}


def wait_for_empty_outboxes(stage: Stage, seconds: float) -> None:
    """Wait until relays have delivered everything."""
    wait_until(lambda: not _waiting(stage), seconds, "every event is delivered")


def _waiting(stage: Stage) -> int:
    total = 0
    for shard, owner in stage.owners().items():
        with stage.superuser(owner) as connection:
            query = f"SELECT count(*) FROM {schema_name(shard)}.shardkit_outbox"
            total += _one(connection, query)
    return total


def _one(connection: Connection, query: str) -> int:
    found = connection.execute(query.encode()).fetchone()
    assert found is not None, "an aggregate has a row"
    return int(found[0])


def note_state(stage: Stage, moment: str) -> None:
    """Write down what servers hold besides data, and what their schemas are."""
    _note_leftovers(stage, moment)
    _note_schemas(stage, moment)


def _note_leftovers(stage: Stage, moment: str) -> None:
    """Write down what every physical shard holds besides data.

    Sessions whose client has ended have some seconds to end, too.
    """
    for name in stage.topology.physical:
        if moment == "after":
            with suppress(AssertionError):
                wait_until(partial(_is_quiet, stage, name), 15.0, "sessions end")
        with stage.superuser(name) as connection:
            things = {
                kind: [row[0] for row in connection.execute(query.encode())]
                for kind, query in _LEFT.items()
                if query
            }
            things["dead letters"] = [
                row[0]
                for (schema,) in connection.execute(
                    "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'shard\\_%'"
                ).fetchall()
                for row in connection.execute(
                    f"SELECT error FROM {schema}.shardkit_outbox_dead".encode()
                )
            ]
        for server in stage.members(name):
            with stage.superuser_of(server.name) as connection:
                slots = connection.execute("SELECT slot_name FROM pg_replication_slots")
                things[f"replication slots of {server.name}"] = [row[0] for row in slots]
        stage.recorder.fact("leftovers", where=name, moment=moment, things=things)


def _is_quiet(stage: Stage, name: str) -> bool:
    with stage.superuser(name) as connection:
        return not connection.execute(_LEFT["idle transactions"].encode()).fetchall()


def _note_schemas(stage: Stage, moment: str) -> None:
    """Write down what the schema of every logical shard is made of: objects and rights.

    What there is before the run is the known version; moves and failovers have to keep it.
    """
    found: dict[int, str] = {}
    for shard, owner in sorted(stage.owners().items()):
        schema = schema_name(shard)
        with stage.superuser(owner) as connection:
            parts = sorted(details(connection, [schema])[schema].items())
        found[shard] = hashlib.sha256(repr(parts).encode()).hexdigest()
    if moment == "before":
        stage.recorder.fact("schemas", known=dict.fromkeys(found.values(), "as made"))
        return
    for shard, fingerprint in found.items():
        stage.recorder.fact("schema", shard=shard, fingerprint=fingerprint)


def note_secrets(stage: Stage, folders: Iterable[Path]) -> None:
    """Write down how often passwords are in logs, in what clients wrote, and in arguments.

    Called while everything runs: the arguments of processes end with them.
    """
    passwords = json.loads((stage.local.config_path.parent / "passwords.json").read_text("utf-8"))
    canaries = {name: value.encode() for name, value in passwords.items()}
    stage.recorder.fact("canaries", planted=sorted(canaries))
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files + sorted(Path("/proc").glob("[0-9]*/cmdline")):
        with suppress(OSError):  # the process has ended
            size = path.stat().st_size or len(path.read_bytes())
            hits = {name: times for name, times in scan(path, canaries).items() if times}
            stage.recorder.fact("scanned", what=str(path), bytes=size, hits=hits)


def look(stage: Stage, folder: Path) -> None:
    """Read everything for good: from every owner, and sets from its replicas too."""
    recorder = Recorder(folder, "witness")
    effects: list[str] = []
    for shard, owner in sorted(stage.owners().items()):
        with stage.superuser(owner) as primary:
            row = primary.execute("SELECT pg_logical_emit_message(true, 'look', '')").fetchone()
            assert row is not None, "a position"
            _finals(stage, recorder, primary, shard, owner)
            schema = schema_name(shard)
            found = primary.execute(f"SELECT event FROM {schema}.effects".encode())
            effects += [event for (event,) in found]
        for server in stage.replicas(owner):
            with stage.superuser_of(server.name) as replica:
                wait_until(partial(_has, replica, row[0]), 60.0, f"{server.name} follows")
                _sets(stage, recorder, replica, shard, server.name, role="replica")
    n = recorder.invoke("effects", ["effects"], final=True)
    recorder.ok(n, effects)
    recorder.end()


def _has(replica: Connection, position: Any) -> bool:
    found = replica.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [position])
    return found.fetchone() == (True,)


def _finals(stage: Stage, recorder: Recorder, primary: Connection, shard: int, owner: str) -> None:
    schema, more = schema_name(shard), {"final": True, "endpoint": owner, "shard": shard}
    names = {place(Chain, shard, n): f"k{shard}.{n}" for n in range(stage.plan.n_lists)}
    chains = primary.execute(f"SELECT id, items FROM {schema}.chains ORDER BY id".encode())
    for row, items in chains.fetchall():
        if items:
            n = recorder.invoke("append", [["read", names[row]]], level="read committed", **more)
            recorder.ok(n, [items])
    registers = primary.execute(f"SELECT value FROM {schema}.registers ORDER BY id".encode())
    for number, (value,) in enumerate(registers.fetchall()):
        n = recorder.invoke("register", ["read", f"r{shard}.{number}"], **more)
        recorder.ok(n, value)
    n = recorder.invoke("bank", ["read", f"b{shard}"], **more)
    numbers = {place(Account, shard, number): str(number) for number in range(ACCOUNTS)}
    accounts = primary.execute(f"SELECT id, balance FROM {schema}.accounts".encode()).fetchall()
    recorder.ok(n, {numbers[row]: balance for row, balance in accounts})
    _sets(stage, recorder, primary, shard, owner)


def _sets(
    stage: Stage, recorder: Recorder, connection: Connection, shard: int, endpoint: str, **more: Any
) -> None:
    places = {place("sets", shard, n): n for n in range(stage.plan.n_lists)}
    elements: dict[int, list[str]] = {}
    ops = {
        number: recorder.invoke(
            "set",
            ["read", f"s{shard}.{number}"],
            final=True,
            endpoint=endpoint,
            shard=shard,
            **more,
        )
        for number in range(stage.plan.n_lists)
    }
    query = f"SELECT set_id, value FROM {schema_name(shard)}.elements"
    for home, value in connection.execute(query.encode()):
        elements.setdefault(places[home], []).append(value)
    for number, n in ops.items():
        recorder.ok(n, elements.get(number, []))


def image(connection: Connection, shard: int, tables: Iterable[str]) -> dict[str, str]:
    """Return a hash of the rows of each table of a logical shard, in the order of their texts."""
    schema = schema_name(shard)
    return {
        f"rows of {table}": str(
            connection.execute(
                f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM {schema}.{table} AS t".encode()
            ).fetchall()[0][0]
        )
        for table in tables
    }
