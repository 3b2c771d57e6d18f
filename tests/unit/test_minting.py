"""The minter that hands ids out of leased blocks."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Mapping

import pytest

from shardkit import ids
from shardkit.errors import IdRequestError
from shardkit.ids import MAX_LEASE
from shardkit.minting import MAX_MINT, IdMinter
from shardkit.testing import FakeClock


class Leases:
    """A database's side of leasing: ranges that never overlap."""

    def __init__(self) -> None:
        self.state: dict[int, int] = {}
        self.calls: list[dict[int, int]] = []

    def __call__(self, counts: Mapping[int, int]) -> dict[int, int]:
        self.calls.append(dict(counts))
        firsts = {}
        for shard, n in counts.items():
            firsts[shard] = self.state.get(shard, 0) + 1
            self.state[shard] = firsts[shard] + n - 1
        return firsts


def test_minted_ids_are_distinct_ascending_and_carry_their_shard() -> None:
    minter = IdMinter(Leases(), block_size=8, clock=FakeClock())
    made = [new for _ in range(50) for new in minter.mint({5: 3})[5]]
    assert made == sorted(set(made))
    assert {ids.shard_of(new) for new in made} == {5}


def test_one_lease_serves_a_block_and_several_shards_share_a_call() -> None:
    leases = Leases()
    minter = IdMinter(leases, block_size=8, clock=FakeClock())
    minter.mint({1: 1, 2: 1})
    for _ in range(7):
        minter.mint({1: 1, 2: 1})
    assert leases.calls == [{1: 8, 2: 8}]
    minter.mint({1: 20})
    assert leases.calls[1:] == [{1: 20}]


def test_what_is_left_of_an_old_block_is_dropped() -> None:
    leases, clock = Leases(), FakeClock()
    minter = IdMinter(leases, block_size=8, block_ttl=0.2, clock=clock)
    first = minter.mint({1: 1})[1][0]
    clock.advance(0.2)
    second = minter.mint({1: 1})[1][0]
    assert len(leases.calls) == 2
    assert second == first + 8


def test_a_slow_lease_still_mints_what_was_asked_for() -> None:
    clock = FakeClock()
    leases = Leases()

    def slow(counts: Mapping[int, int]) -> dict[int, int]:
        clock.advance(5.0)
        return leases(counts)

    minter = IdMinter(slow, block_size=8, block_ttl=0.2, clock=clock)
    assert len(minter.mint({1: 3})[1]) == 3
    minter.mint({1: 1})
    assert len(leases.calls) == 2, "the rest of a block that arrived late is not used"


def test_a_child_process_does_not_mint_its_parents_ids() -> None:
    minter = IdMinter(Leases(), block_size=64, clock=FakeClock())
    minter.mint({1: 1})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's coverage is not collected
        os.write(writer, b"%d" % len(minter._blocks))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"0"
    assert len(minter._blocks) == 1


@pytest.mark.parametrize("n", [0, -1, MAX_MINT + 1])
def test_a_number_that_cannot_be_minted_is_refused(n: int) -> None:
    with pytest.raises(IdRequestError, match="cannot mint"):
        IdMinter(Leases()).mint({1: n})


def test_more_than_a_lease_holds_comes_from_several() -> None:
    leases = Leases()
    made = IdMinter(leases, clock=FakeClock()).mint({1: 2 * MAX_LEASE + 1, 2: 1})
    assert leases.calls == [{1: MAX_LEASE, 2: 64}, {1: MAX_LEASE}, {1: 64}]
    assert len(made[1]) == 2 * MAX_LEASE + 1
    assert made[1] == sorted(set(made[1]))
    assert len(made[2]) == 1


def test_a_lease_overtaken_by_a_later_one_does_not_lead_back() -> None:
    leases = Leases()
    overtaking: list[int] = []

    def overtaken(counts: Mapping[int, int]) -> dict[int, int]:
        answer = leases(counts)
        if len(leases.calls) == 1:  # another thread leases and mints before this answer arrives
            overtaking.extend(minter.mint({1: 1})[1])
        return answer

    minter = IdMinter(overtaken, block_size=8, clock=FakeClock())
    assert minter.mint({1: 1})[1][0] < overtaking[0]
    assert minter.mint({1: 1})[1][0] > overtaking[0]


def test_a_minter_that_is_gone_is_not_kept_by_the_fork_hook() -> None:
    minter = IdMinter(Leases())
    gone = weakref.ref(minter)
    del minter
    gc.collect()
    assert gone() is None
