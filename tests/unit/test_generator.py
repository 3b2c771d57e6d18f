"""The generator of one process: order, clock steps, threads, forks and wrong arguments."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import ids
from shardkit.errors import ClockMovedBackError, IdError, IdRequestError, InvalidIdError
from shardkit.ids import EPOCH_MS, MAX_AHEAD_MS, MAX_ID, MAX_LEASE, IdGenerator
from shardkit.testing import FakeClock

CAP = 1024
"""Ids of one millisecond."""


def ms_of(id_: int) -> int:
    return (id_ >> 23) + EPOCH_MS


def test_the_first_id_of_a_millisecond_has_sequence_0() -> None:
    clock = FakeClock()
    generator = IdGenerator(42, clock=clock)
    assert generator.next() == ids.compose(clock.unix_ms() - EPOCH_MS, 42, 0)
    assert generator.next() == ids.compose(clock.unix_ms() - EPOCH_MS, 42, 1)
    clock.advance(0.001)
    assert generator.next() == ids.compose(clock.unix_ms() - EPOCH_MS, 42, 0)


@pytest.mark.parametrize("shard", [0, 42, 8191])
def test_overflow_carries_into_the_next_millisecond(shard: int) -> None:
    clock = FakeClock()
    one_by_one, at_once = (IdGenerator(shard, clock=clock) for _ in range(2))
    made = [one_by_one.next() for _ in range(2 * CAP + 2)]
    assert made == at_once.many(2 * CAP + 2)
    now = clock.unix_ms() - EPOCH_MS
    assert made[CAP - 1 : CAP + 1] == [
        ids.compose(now, shard, 1023),
        ids.compose(now + 1, shard, 0),
    ]
    assert {ids.shard_of(new) for new in made} == {shard}


calls = st.one_of(
    st.just(("next", 1)),
    st.tuples(st.just("many"), st.integers(1, 5_000)),
    st.tuples(st.just("step"), st.integers(-5_000, 5_000)),
    st.tuples(st.just("pass"), st.integers(0, 20)),
)


@given(st.integers(0, 8191), st.lists(calls, max_size=40))
def test_ids_rise_and_stay_near_the_clock_whatever_it_does(
    shard: int, script: list[tuple[str, int]]
) -> None:
    clock = FakeClock()
    generator = IdGenerator(shard, clock=clock, patience=1e9)
    made: list[int] = []
    for what, n in script:
        if what == "step":
            clock.set_unix_ms(clock.unix_ms() + n)
        elif what == "pass":
            clock.advance(n / 1000)
        else:
            made += [generator.next()] if what == "next" else generator.many(n)
            assert clock.unix_ms() <= ms_of(made[-1]) < clock.unix_ms() + MAX_AHEAD_MS
    assert all(a < b for a, b in itertools.pairwise(made))
    assert {ids.shard_of(new) for new in made} <= {shard}


def test_running_ahead_is_bounded_by_waiting() -> None:
    clock = FakeClock()
    generator = IdGenerator(1, clock=clock)
    began = clock.unix_ms()
    for _ in range(10):
        generator.many(MAX_LEASE)
    assert clock.unix_ms() - began == 9 * MAX_AHEAD_MS
    generator.next()
    assert clock.unix_ms() - began == 9 * MAX_AHEAD_MS + 1


@pytest.mark.parametrize("many", [False, True])
def test_a_clock_far_behind_is_an_error_and_mints_nothing(many: bool) -> None:
    clock = FakeClock()
    generator = IdGenerator(3, clock=clock, patience=0.5)
    before = generator.next()
    began = clock.unix_ms()
    clock.set_unix_ms(began - 5_000)
    with pytest.raises(
        ClockMovedBackError, match=r"the clock is 4\.95\d s too far behind"
    ) as caught:
        generator.many(1) if many else generator.next()
    assert caught.value.retryable
    clock.set_unix_ms(began)
    assert generator.next() == before + 1


def test_a_clock_before_the_epoch_is_an_error() -> None:
    with pytest.raises(ClockMovedBackError):
        IdGenerator(3, clock=FakeClock(unix_ms=EPOCH_MS - 60_000)).next()


@pytest.mark.parametrize("many", [False, True])
def test_a_clock_past_the_end_of_the_layout_is_an_error(many: bool) -> None:
    clock = FakeClock(unix_ms=EPOCH_MS + (1 << 40) - 1)
    generator = IdGenerator(8191, clock=clock)
    assert generator.many(CAP)[-1] == MAX_ID
    with pytest.raises(IdError, match="past the end"):
        generator.many(1) if many else generator.next()


@pytest.mark.parametrize("k", [0, -1, MAX_LEASE + 1, 1 << 63, 1.0, True, None])
def test_a_number_that_cannot_be_minted_is_refused(k: object) -> None:
    with pytest.raises(IdRequestError, match="cannot mint"):
        IdGenerator(3).many(k)  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", [-1, 8192, 1 << 20])
def test_a_logical_shard_no_id_can_carry_is_refused(shard: int) -> None:
    with pytest.raises(InvalidIdError):
        IdGenerator(shard)


def test_a_new_owner_starts_after_the_last_id_of_the_earlier_one() -> None:
    clock = FakeClock()
    last = IdGenerator(3, clock=clock).many(MAX_LEASE)[-1]
    clock.set_unix_ms(clock.unix_ms() - 20)
    successor = IdGenerator(3, clock=clock, after=last)
    assert successor.next() > last
    with pytest.raises(InvalidIdError):
        IdGenerator(3, after=0)


def test_threads_share_a_generator_without_duplicates() -> None:
    generator = IdGenerator(5)
    made: list[list[int]] = [[] for _ in range(4)]

    def mint(into: list[int]) -> None:
        for _ in range(200):
            into.append(generator.next())
            into += generator.many(7)

    threads = [threading.Thread(target=mint, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part == sorted(part) for part in made)
    together = [new for part in made for new in part]
    assert len(set(together)) == len(together) == 4 * 200 * 8


def test_a_child_process_cannot_use_its_parents_generator() -> None:
    generator = IdGenerator(5)
    generator.next()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's coverage is not collected
        try:
            generator.next()
        except IdError as error:
            os.write(writer, error.message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"this generator belongs to the parent process"
    assert generator.next()
