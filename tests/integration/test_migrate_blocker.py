"""A transaction stays on a table that a migration wants: the application hardly notices.

`python -m benchmarks migrate_blocker` measures it for a minute.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from shardkit.clock import SYSTEM
from shardkit.ops.drift import drift
from shardkit.ops.migrate import Limits, MigrationOutcome
from shardkit.testing import wait_until
from tests.fixtures.site import ALPHA, BETA, Site

pytestmark = pytest.mark.integration

# Without looking who is there, it would queue for nine tenths of the time.
EAGER = Limits(lock_timeout=0.3, longest_pause=0.05, lock_attempts=10_000)
LOOKS = 100


@dataclass
class Reader:
    """Reads and writes the tables of the application's users until it is stopped."""

    site: Site
    longest: float = 0.0
    n_held: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with self.site.app("alpha") as connection:
            number = 0
            while not self.stop.wait(0.005):
                number = (number + 1) % len(ALPHA)
                start = SYSTEM.monotonic()
                connection.execute(f"SELECT count(*) FROM shard_{number:04d}.t".encode())
                connection.execute(
                    f"INSERT INTO shard_{number:04d}.t VALUES (1) ON CONFLICT DO NOTHING".encode()
                )
                self.longest = max(self.longest, SYSTEM.monotonic() - start)
                self.n_held += number == 2


def test_nobody_queues_behind_a_migration_that_waits_for_who_stays(site: Site) -> None:
    site.apply()
    site.write("r2", 'op.add_column("t", sa.Column("b", sa.Text))', "r1")
    outcomes: list[MigrationOutcome] = []
    reader = Reader(site)
    threads = [
        threading.Thread(target=reader.run),
        threading.Thread(target=lambda: outcomes.append(site.apply(EAGER))),
    ]
    waiting = 0
    with site.admin("alpha") as holder, site.admin("alpha") as other:
        holder.execute("BEGIN")
        holder.execute("SELECT * FROM shard_0002.t")
        for thread in threads:
            thread.start()
        wait_until(
            lambda: (
                sum("r2" in has for has in (site.ledger("alpha") | site.ledger("beta")).values())
                == len(ALPHA + BETA) - 1
            ),
            60.0,
            "everything else is migrated",
        )
        before = reader.n_held
        pause = threading.Event()
        for _ in range(LOOKS):
            row = other.execute(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
            ).fetchone()
            waiting += bool(row and row[0])
            pause.wait(0.02)
        assert reader.n_held > before, "the table that is held is read and written meanwhile"
        holder.execute("ROLLBACK")
        threads[1].join(60)
    reader.stop.set()
    threads[0].join(60)
    assert waiting < LOOKS / 2, "it looks who is there, and does not queue"
    # Two statements, each held up for the lock timeout at most; the rest is the machine's.
    assert reader.longest < 2 * EAGER.lock_timeout + 2.0
    assert [outcome.error for outcome in outcomes] == [None]
    assert drift(site.topology, site.revisions()).differences == ()
