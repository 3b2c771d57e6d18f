"""Connections to every primary for one migration command: opened, locked, read.

Called by `shardkit.ops.migrate`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from shardkit.errors import EndpointUnavailableError, RefusedError, ShardkitError
from shardkit.ops.ddllocks import MIGRATION_KEY
from shardkit.ops.direct import connect
from shardkit.ops.ledger import OWN, Ledger, admin_script, logical_shard_digest
from shardkit.ops.ledger import read as read_ledger
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology

__all__ = ["connections", "lock", "read", "read_one"]

LOCK_PAUSE = 0.1
"""Seconds between two attempts to get it."""

Connections = dict[str, psycopg.Connection[tuple[Any, ...]]]


@contextlib.contextmanager
def connections(
    topology: Topology,
) -> Iterator[tuple[Connections, dict[str, Ledger | ShardkitError]]]:
    """Connect to every primary at once; closing them releases their locks."""
    found: Connections = {}
    failures: dict[str, Ledger | ShardkitError] = {}
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(max(1, len(topology.physical))) as pool:
            futures = {
                name: pool.submit(connect, shard, application="shardkit migrate")
                for name, shard in topology.physical.items()
            }
        for name, future in futures.items():
            try:
                found[name] = future.result()
            except EndpointUnavailableError as error:
                failures[name] = error
            else:
                stack.callback(found[name].close)
        yield found, failures


def lock(found: Connections, patience: float) -> None:
    """Take the session lock on every server, always in the same order.

    Raises:
        RefusedError: another runner holds one.
    """
    for name in sorted(found):
        for left in range(round(patience / LOCK_PAUSE), -1, -1):
            # A session lock, released by the server when the connection ends.
            row = (
                found[name].execute("SELECT pg_try_advisory_lock(%s)", (MIGRATION_KEY,)).fetchone()
            )
            if row and row[0]:
                break
            if not left:
                raise RefusedError(
                    f"another `shardkit migrate` is at work on physical shard {name!r}",
                    hint="wait for it to end; nothing was changed",
                )
            threading.Event().wait(LOCK_PAUSE)


def read(
    topology: Topology, revisions: Sequence[Revision], found: Connections
) -> dict[str, Ledger | ShardkitError]:
    """Return what every primary says, or that it went away, by name."""

    def one(name: str) -> Ledger | ShardkitError:
        shard = topology.physical[name]
        own = logical_shard_digest(shard.roles)
        _, digest = admin_script(
            shard, cluster=topology.name, n_logical_shards=topology.n_logical_shards
        )
        current = {OWN: own} | {revision.id: revision.checksum for revision in revisions}
        return read_one(name, found[name], current=current, digest=digest)

    with ThreadPoolExecutor(max(1, len(found))) as pool:
        return dict(zip(found, pool.map(one, found), strict=True))


def read_one(
    name: str, connection: psycopg.Connection[tuple[Any, ...]], **known: Any
) -> Ledger | ShardkitError:
    """Return the ledger of a physical shard, or that it went away."""
    try:
        return read_ledger(connection, **known)
    except psycopg.OperationalError as error:
        return EndpointUnavailableError(
            f"physical shard {name!r} went away", hint=str(error).strip()
        )
