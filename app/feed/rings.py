"""The bytes of a timeline: a ring of photo ids in one string of Redis, eight bytes each.

| offset | bytes | field | meaning |
|---|---|---|---|
| 0 | 1 | format | 1 |
| 1 | 1 | | zero |
| 2 | 2 | next | slot that is written next |
| 4 | 2 | slots | how many there are; up to `MOST` |
| 6 | 2 | | zero |
| 8 | 8 | floor | every delivered id above it is in the ring; `MAX_ID` while it is being built |
| 16 | 8 | covered | up to when follows are in it; while it is built, a `claim` |
| 24 | 8 each | slots | ids in the order of arrival, zero for none |

All big-endian. A delivery writes one slot in place: nothing is moved, trimmed or allocated. A ring
that is full grows to the next of `STEPS`, which fill jemalloc's size classes, so that an entry
takes 8.2 bytes with everything around it; one of `MOST` slots gives up its `BLOCK` oldest arrivals
at once and raises the floor to them. Ids may arrive late, in any order and twice; readers sort.

Floor and covered together are the mark of a ring. Who read databases because of what a ring said
changes it only while it has the same mark: of one that was built anew meanwhile the floor may be
lower, and what lies between was not read.

Sources: app.md, section 3.1, for what other encodings take (`python -m benchmarks feed`); jemalloc
5.3, size classes; Redis 7, sds.h (a header of five bytes for strings of up to 65,535, one byte at
the end). No I/O.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardkit import ids

__all__ = [
    "ADD",
    "COVER",
    "FILL",
    "HOLD",
    "MOST",
    "REMOVE",
    "STEPS",
    "Timeline",
    "claim",
    "decoded",
    "encoded",
    "packed",
]

HEADER: Final = struct.Struct(">BxHHxxQQ")
_MARK: Final = struct.Struct(">QQ")
_RANDOM: Final = 28
"""Random bits of a claim; its seconds have the other 36."""

FORMAT: Final = 1

STEPS: Final = (36, 76, 156, 316, 636, 888)
"""Slots of a ring as it grows: strings of 320, 640, 1280, 2560, 5120 and 7168 bytes."""

MOST: Final = STEPS[-1]

BLOCK: Final = 24
"""Slots that are given up together in a full ring; `MOST` is a multiple."""


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """What a ring says.

    Attributes:
        slots: ids as they arrived, some perhaps twice, and zeros.
        floor: every id above it that was delivered is among them.
        covered: the last follow that it has the photos of, in Unix milliseconds; a `claim` while
            it is being built.
    """

    slots: NDArray[np.int64]
    floor: int
    covered: int

    @property
    def ids(self) -> list[int]:
        """Newest first, each once; a page needs few of them, see `app.feed.sources`."""
        found: list[int] = np.unique(self.slots[self.slots > 0])[::-1].tolist()
        return found

    @property
    def is_building(self) -> bool:
        """Whether nothing is certain yet."""
        return self.floor == ids.MAX_ID

    @property
    def mark(self) -> bytes:
        """What has to be the same for a change."""
        return _MARK.pack(self.floor, self.covered)

    @property
    def claimed_until(self) -> int:
        """Unix seconds until which one may be built."""
        return self.covered >> _RANDOM


def claim(until: int) -> Timeline:
    """Return what a ring says that is being built from now on, by one and nobody else.

    Args:
        until: Unix seconds.
    """
    return Timeline(np.empty(0, np.int64), ids.MAX_ID, until << _RANDOM | secrets.randbits(_RANDOM))


def packed(photo_ids: Iterable[int]) -> list[bytes]:
    """Return ids as the scripts take them."""
    return [photo_id.to_bytes(8, "big") for photo_id in photo_ids]


def encoded(photo_ids: Sequence[int], *, floor: int, covered: int) -> bytes:
    """Return the bytes of a ring.

    Args:
        photo_ids: newest first; the first `MOST` are taken, and the floor is raised to the rest.
        floor: see the table.
        covered: see the table.
    """
    taken = photo_ids[:MOST]
    if len(photo_ids) > MOST:
        floor = max(floor, photo_ids[MOST])
    slots = next(step for step in STEPS if step >= len(taken))
    ring = [*taken[::-1], *[0] * (slots - len(taken))]  # the oldest are overwritten first
    head = HEADER.pack(FORMAT, len(taken), slots, floor, covered)
    return head + struct.pack(f">{slots}Q", *ring)


def decoded(value: bytes | None) -> Timeline | None:
    """Return what a ring says; None for none, and for bytes of another format."""
    if value is None or len(value) < HEADER.size or value[0] != FORMAT:
        return None
    _, _, slots, floor, covered = HEADER.unpack_from(value)
    if len(value) != HEADER.size + 8 * slots:
        return None
    return Timeline(
        np.frombuffer(value, ">u8", offset=HEADER.size).astype(np.int64), floor, covered
    )


_STEPS: Final = f"local steps, block = {{{', '.join(map(str, STEPS))}}}, {BLOCK}"

_STORE: Final = """
local most = steps[#steps]
local function less(a, b)
    local c, d = struct.unpack('>I4I4', a)
    local e, f = struct.unpack('>I4I4', b)
    return c < e or (c == e and d < f)
end
local function room(key, slots)
    for s = 1, #steps do
        if steps[s] > slots then
            local empty = string.rep('\\0', 8 * (steps[s] - slots))
            redis.call('SET', key, redis.call('GET', key) .. empty, 'KEEPTTL')
            return slots, steps[s]
        end
    end
    return 0, slots
end
local function drop(key, slot)
    local at = 24 + 8 * slot
    local gone = redis.call('GETRANGE', key, at, at + 8 * block - 1)
    local floor = redis.call('GETRANGE', key, 8, 15)
    for i = 1, #gone, 8 do
        local photo = string.sub(gone, i, i + 7)
        if less(floor, photo) then floor = photo end
    end
    redis.call('SETRANGE', key, 8, floor)
    redis.call('SETRANGE', key, at, string.rep('\\0', #gone))
end
local call, unpack, pack = redis.call, struct.unpack, struct.pack
local function store(key, photos, first)
    local head = call('GETRANGE', key, '2', '5')
    if head == '' then return 0 end
    local slot, slots = unpack('>HH', head)
    for i = first, #photos do
        if slot >= slots then slot, slots = room(key, slots) end
        if slots == most and slot % block == 0 then drop(key, slot) end
        call('SETRANGE', key, 24 + 8 * slot, photos[i])
        slot = slot + 1
    end
    call('SETRANGE', key, '2', pack('>HH', slot, slots))
    return #photos - first + 1
end
"""
# Halves are compared, since numbers of Lua are exact up to 2^53 only. Constants are text: Redis
# would write a number anew at each call. Both by measurement: `python -m benchmarks feed`.

ADD: Final = f"""{_STEPS}{_STORE}
local n = 0
for k = 1, #KEYS do n = n + store(KEYS[k], ARGV, 1) end
return n
"""
"""Adds ids to rings; KEYS: rings, of which those that are not there are left; ARGV: ids. Returns
how many slots were written. It reads and writes the named keys alone; in a Redis Cluster these
would have to share a slot."""

COVER: Final = f"""{_STEPS}{_STORE}
if call('GETRANGE', KEYS[1], '8', '23') ~= ARGV[1] then return 0 end
call('SETRANGE', KEYS[1], '16', ARGV[2])
store(KEYS[1], ARGV, 3)
return 1
"""
"""Adds the ids of people who are newly followed. KEYS: the ring; ARGV: the mark it had, `covered`
from now on, ids. Returns 0 when the mark is another."""

FILL: Final = f"""{_STEPS}{_STORE}
local old = redis.call('GET', KEYS[1])
if not old or string.sub(old, 9, 24) ~= ARGV[2] then return 0 end
local _, slots = struct.unpack('>HH', string.sub(old, 3, 6))
local found = {{}}
for slot = 0, slots - 1 do
    local photo = string.sub(old, 25 + 8 * slot, 32 + 8 * slot)
    if photo ~= '\\0\\0\\0\\0\\0\\0\\0\\0' then found[#found + 1] = photo end
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
store(KEYS[1], found, 1)
return 1
"""
"""Puts a ring in the place of one that is being built, with the ids that came meanwhile. KEYS: the
ring; ARGV: the new one, the mark of the one that was begun, seconds it is kept."""

HOLD: Final = """
if redis.call('GETRANGE', KEYS[1], '8', '23') ~= ARGV[1] then return 0 end
return redis.call('EXPIREAT', KEYS[1], ARGV[2])
"""
"""Has a ring end at a time. KEYS: the ring; ARGV: its mark, Unix seconds."""

REMOVE: Final = """
local gone = {}
for i = 1, #ARGV do gone[ARGV[i]] = true end
local n = 0
for k = 1, #KEYS do
    local ring = redis.call('GET', KEYS[k])
    for at = 25, ring and #ring - 7 or 0, 8 do
        if gone[string.sub(ring, at, at + 7)] then
            redis.call('SETRANGE', KEYS[k], at - 1, '\\0\\0\\0\\0\\0\\0\\0\\0')
            n = n + 1
        end
    end
end
return n
"""
"""Empties the slots of some ids. KEYS: rings; ARGV: ids. Returns how many slots there were."""
