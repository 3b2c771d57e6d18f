"""`shardkit backup archive`: log without gaps, and labels in it as often as is asked for.

One pg_receivewal per primary, each with a slot that keeps log on the server while nobody takes it
(`max_slot_wal_keep_size` bounds that). A label costs milliseconds, so a cluster can be restored to
the newest one with the base backup of last night. Runs until it is told to stop, like a relay.
Called by the command line.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import psycopg
from sqlalchemy import URL

from shardkit.backup import manifest
from shardkit.backup.facts import gone, logins
from shardkit.backup.label import Label, no_migration, take
from shardkit.backup.receiver import Receiver
from shardkit.backup.rows import Connection
from shardkit.backup.store import Store
from shardkit.backup.tools import Tools
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BackupError, EndpointUnavailableError, TryAgainError
from shardkit.ops.direct import connect
from shardkit.topology import Topology

__all__ = ["SLOT", "archive", "drop_slots"]

SLOT: Final = "shardkit_backup"
"""Name of the slot on every primary."""

_PATIENCE: Final = 60.0
_POLL: Final = 0.05

# Commits, and so flushes what is in the log before it: only flushed log is sent.
_FLUSH: Final = "SELECT pg_logical_emit_message(true, 'shardkit', '')"
_ARRIVED: Final = """
SELECT restart_lsn >= %s::pg_lsn AND active FROM pg_replication_slots WHERE slot_name = %s
"""


def archive(
    topology: Topology,
    store: Store,
    stop: threading.Event,
    *,
    every: float,
    user: str = "",
    password: str | None = None,
    on_label: Callable[[manifest.LabelFile], None] = lambda _: None,
    on_miss: Callable[[TryAgainError], None] = lambda _: None,
    clock: Clock = SYSTEM,
) -> None:
    """Take the log of every primary until told to stop.

    Args:
        topology: the cluster.
        store: where the log goes.
        stop: set to end it.
        every: seconds between two labels.
        user: login with REPLICATION that takes the log; empty for the admin's.
        password: of that login.
        on_label: told of every label that can be restored.
        on_miss: told why one could not be taken; the next is tried all the same.
        clock: where the time comes from.

    Raises:
        EndpointUnavailableError: a primary does not answer, or went away (retryable): start it
            again; the slots keep the log.
        BackupError: the log cannot be written, or somebody else takes it.
    """
    store.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    urls = logins(topology, user, password)
    with Tools() as tools, _sessions(topology, urls) as (admins, takers):
        for physical, taker in takers.items():
            _make_slot(taker, str(topology.physical[physical].primary))
        receivers = [
            Receiver(
                tools,
                urls[physical],
                store.wal(physical),
                where=str(topology.physical[physical].primary),
                slot=SLOT,
            )
            for physical in takers
        ]
        try:
            for receiver in receivers:
                receiver.wait_started()
            while not stop.is_set():
                try:
                    on_label(_label(store, admins, receivers, clock))
                except TryAgainError as error:
                    on_miss(error)
                next_at = clock.monotonic() + every
                while clock.monotonic() < next_at and not stop.wait(_POLL):
                    for receiver in receivers:
                        receiver.check()
        except psycopg.OperationalError as error:
            raise gone(error) from error
        finally:
            for receiver in receivers:
                receiver.end()


def drop_slots(topology: Topology, *, user: str = "", password: str | None = None) -> list[str]:
    """Drop the slots, for good; returns the physical shards that had one.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable).
        BackupError: one is in use.
    """
    dropped = []
    with _sessions(topology, logins(topology, user, password)) as (_, takers):
        for physical, taker in takers.items():
            try:
                rows = taker.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
                    "WHERE slot_name = %s",
                    (SLOT,),
                ).fetchall()
            except psycopg.errors.ObjectInUse as error:
                raise BackupError(
                    f"the slot of {physical} is in use", hint="stop shardkit backup archive first"
                ) from error
            dropped += [physical] * len(rows)
    return dropped


def _label(
    store: Store, admins: Mapping[str, Connection], receivers: list[Receiver], clock: Clock
) -> manifest.LabelFile:
    """Take a label and write it down once its log has arrived everywhere."""
    with no_migration(admins):
        label: Label = take(admins, manifest.name_at(clock.unix_ms()), clock=clock)
    for physical, admin in admins.items():
        admin.execute(_FLUSH)
        deadline = clock.monotonic() + _PATIENCE
        lsn = label.points[physical].lsn
        while admin.execute(_ARRIVED, (lsn, SLOT)).fetchone() != (True,):
            for receiver in receivers:
                receiver.check()
            if clock.monotonic() > deadline:
                raise TryAgainError(f"the log of {physical} did not arrive within {_PATIENCE:g} s")
            clock.sleep(_POLL)
    found = manifest.LabelFile(
        format=manifest.FORMAT,
        name=label.name,
        label_at=label.at,
        window=round(label.window, 6),
        physical={
            name: manifest.Place(lsn=point.lsn, timeline=point.timeline)
            for name, point in label.points.items()
        },
    )
    store.keep_label(found)
    return found


@contextlib.contextmanager
def _sessions(
    topology: Topology, urls: Mapping[str, URL]
) -> Iterator[tuple[dict[str, Connection], dict[str, Connection]]]:
    """Connect to every primary as the admin, and as whoever takes the log."""
    with contextlib.ExitStack() as stack:
        admins, takers = {}, {}
        for name, shard in topology.physical.items():
            admins[name] = stack.enter_context(connect(shard, application="shardkit backup"))
            other = replace(shard, admin_url=urls[name])
            takers[name] = stack.enter_context(connect(other, application="shardkit backup"))
        yield admins, takers


def _make_slot(taker: Connection, where: str) -> None:
    try:
        taker.execute(
            "SELECT pg_create_physical_replication_slot(%(slot)s, true) WHERE NOT EXISTS "
            "(SELECT FROM pg_replication_slots WHERE slot_name = %(slot)s)",
            {"slot": SLOT},
        )
    except psycopg.OperationalError as error:
        raise EndpointUnavailableError(str(error).strip(), endpoint=where) from error
    except psycopg.Error as error:
        raise BackupError(
            f"no slot can be made: {str(error).splitlines()[0]}",
            endpoint=where,
            hint="the login needs REPLICATION, the server a free max_replication_slots",
        ) from error
