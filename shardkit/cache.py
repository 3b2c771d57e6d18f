"""The write-through protocol of the cache: what a writer, a reader and a repair do with one key.

Three machines as values: each says what to ask of the cache next (`request`), and is given the
answer (`advance`), which makes another value. They are pure, so that one session may drive
hundreds in step, one round trip per server and step, and so that `make model-check` can search
every interleaving of these very functions. See docs/cache.md for why each step is there.

    writer   marker ── COMMIT ── store on the marker ── or repair
    reader   lease or hit ── read the primary ── store on the lease
    repair   read ── remove what is older ── four times, then delete

Never decides when to commit and never reads a database: its callers do.
"""

from __future__ import annotations

from shardkit.caching.lives import DEFAULT_LIVES, MARKER_LIFE, Lives, Patience
from shardkit.caching.operations import Answer, Cas, Kind, Op, Outcome, Request
from shardkit.caching.reader import Reader, Source
from shardkit.caching.repair import REPAIR_ROUNDS, Phase, Repair
from shardkit.caching.writer import Writer

__all__ = [
    "DEFAULT_LIVES",
    "MARKER_LIFE",
    "REPAIR_ROUNDS",
    "Answer",
    "Cas",
    "Kind",
    "Lives",
    "Op",
    "Outcome",
    "Patience",
    "Phase",
    "Reader",
    "Repair",
    "Request",
    "Source",
    "Writer",
]
