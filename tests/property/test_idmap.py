"""The id map against a dict, on a real Redis: two programs, every encoding, every change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from shardkit.idmap import MAX_ID, MAX_VALUE, AsyncIdMap, IdMap, Layout
from tests.fixtures.caches import NewServer

pytestmark = pytest.mark.integration

WIDTH = 2
SLOTS = Layout(WIDTH).n_slots
IDS = st.one_of(
    st.integers(0, 200),
    st.integers(SLOTS - 70, SLOTS + 70),  # where two blocks meet
    st.integers(0, 3 * SLOTS),
    st.sampled_from([MAX_ID, MAX_ID - 1, 2**40]),
)
VALUES = st.one_of(
    st.integers(0, 50),
    st.sampled_from([0, 2**16 - 2, 2**16 - 1, 2**24 - 2, 2**24 - 1, 2**56, MAX_VALUE]),
)


class InLoop:
    """An asynchronous map, called from a test."""

    def __init__(self, port: int, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._map = AsyncIdMap(AsyncRedis(port=port), "model", width=WIDTH)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._map, name)
        return lambda *given: self._runner.run(method(*given))


def machine(maps: list[Any], client: Any) -> type[RuleBasedStateMachine]:
    """Return the machine over maps that are the same one, each of another program."""

    class Compared(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            for key in client.scan_iter(match="shardkit:idmap:model:*"):
                if not key.endswith(b":meta"):
                    client.delete(key)
            self.model: dict[int, int] = {}

        @rule(who=st.sampled_from(maps), id=IDS, value=VALUES)
        def set(self, who: Any, id: int, value: int) -> None:  # noqa: A002
            who.set(id, value)
            self.model[id] = value

        @rule(who=st.sampled_from(maps), entries=st.dictionaries(IDS, VALUES, max_size=8))
        def set_many(self, who: Any, entries: dict[int, int]) -> None:
            who.set_many(entries)
            self.model |= entries

        @rule(who=st.sampled_from(maps), id=IDS)
        def delete(self, who: Any, id: int) -> None:  # noqa: A002
            assert who.delete(id) == (self.model.pop(id, None) is not None)

        @rule(who=st.sampled_from(maps), start=IDS, n=st.sampled_from([1, 64, 3000]))
        def delete_many(self, who: Any, start: int, n: int) -> None:
            ids = range(start, min(start + n, MAX_ID + 1))
            removed = [self.model.pop(id, None) for id in ids]  # noqa: A001
            assert who.delete_many(ids) == len(removed) - removed.count(None)

        @rule(
            who=st.sampled_from(maps),
            start=st.integers(0, SLOTS),
            n=st.sampled_from([3, 500, SLOTS]),
            step=st.sampled_from([1, 1, 3, 50]),
            largest=st.sampled_from([100, 100, 2**24]),
        )
        def load(self, who: Any, start: int, n: int, step: int, largest: int) -> None:
            entries = [(id, id * 7919 % largest) for id in range(start, start + n * step, step)]  # noqa: A001
            entries = [entry for entry in entries if entry[0] < 3 * SLOTS]
            assert who.load(entries).entries == len(entries)
            self.model.update(entries)

        @rule(who=st.sampled_from(maps), id=IDS)
        def get(self, who: Any, id: int) -> None:  # noqa: A002
            assert who.get(id) == self.model.get(id)

        @rule(who=st.sampled_from(maps), ids=st.lists(IDS, max_size=20))
        def get_many(self, who: Any, ids: list[int]) -> None:
            found = who.get_many(ids)
            assert found == {id: self.model[id] for id in ids if id in self.model}  # noqa: A001

        @invariant()
        def every_entry_is_there(self) -> None:
            some: Iterable[int] = list(self.model)[:: max(1, len(self.model) // 30)]
            for who in maps:
                assert who.get_many(some) == {id: self.model[id] for id in some}  # noqa: A001

        def teardown(self) -> None:
            found = IdMap(client, "model", width=WIDTH).check()
            assert (found.entries, found.damaged) == (len(self.model), {})

    return Compared


@pytest.fixture
def maps(cache_server: NewServer) -> Iterator[tuple[list[Any], Any]]:
    """One map, opened three times: each has hints of its own, which grow old."""
    server = cache_server("redis", "--appendonly", "no")
    with asyncio.Runner() as runner, Redis(port=server.port) as client:
        opened = [IdMap(client, "model", width=WIDTH) for _ in range(2)]
        yield [*opened, InLoop(server.port, runner)], client


def test_it_is_a_dict(maps: tuple[list[Any], Any]) -> None:
    run_state_machine_as_test(
        machine(*maps),
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
