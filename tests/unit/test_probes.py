"""Silence of a server, and pauses of our own that look like it."""

from __future__ import annotations

import asyncio

import pytest

from shardkit.probes import PausedError, answered
from shardkit.testing import FakeClock


async def _wait_in_vain(clock: FakeClock, seconds: float) -> None:
    async with answered(0.001, clock):
        clock.advance(seconds)
        await asyncio.Event().wait()


def test_a_server_that_does_not_answer_is_to_blame() -> None:
    with pytest.raises(TimeoutError) as caught:
        asyncio.run(_wait_in_vain(FakeClock(), 0.001))
    assert not isinstance(caught.value, PausedError)


def test_after_a_pause_of_this_process_no_server_is_to_blame() -> None:
    with pytest.raises(PausedError):
        asyncio.run(_wait_in_vain(FakeClock(), 10.0))
