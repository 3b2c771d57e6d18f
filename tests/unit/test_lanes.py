"""Work on the keys of one server, which nobody else waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import pytest

from shardkit.clock import SYSTEM
from shardkit.lanes import Lane
from shardkit.testing import wait_until


class Server:
    """Answers when it is let; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked: list[dict[str, int]] = []
        self.is_broken = False

    def __call__(self, wanted: Mapping[str, int]) -> set[str]:
        self.asked.append(dict(wanted))
        assert self.answers.wait(60)
        if self.is_broken:
            raise OSError("gone")
        return set(wanted)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def lane(server: Server) -> Iterator[Lane]:
    lane = Lane(server, clock=SYSTEM)
    yield lane
    server.answers.set()
    lane.close()


def asked(lane: Lane, wanted: dict[str, int], patience: float) -> set[str]:
    lane.ask(wanted)
    return lane.owed(wanted, SYSTEM.monotonic() + patience)


def test_what_is_answered_is_done(lane: Lane, server: Server) -> None:
    server.answers.set()
    assert asked(lane, {"a": 1, "b": 2}, 60) == set()
    assert server.asked == [{"a": 1, "b": 2}]


def test_nobody_waits_twice_for_a_server_that_hangs(lane: Lane) -> None:
    assert asked(lane, {"a": 1}, 0.01) == {"a"}
    began = SYSTEM.monotonic()
    assert asked(lane, {"a": 1, "b": 1}, 600) == {"a", "b"}
    assert SYSTEM.monotonic() - began < 300


def test_what_was_done_later_is_found_when_it_is_asked_for_again(
    lane: Lane, server: Server
) -> None:
    assert asked(lane, {"a": 1}, 0.01) == {"a"}
    server.answers.set()
    wait_until(lambda: not lane.owed({"a": 1}, 0.0), 60, "it is done")
    assert asked(lane, {"a": 1}, 60) == set()
    assert server.asked == [{"a": 1}]
    lane.forget({"a": 1})
    assert lane.owed({"a": 1}, 0.0) == {"a"}


def test_a_later_version_is_other_work(lane: Lane, server: Server) -> None:
    """Under way is version 1: what comes of it says nothing of version 2."""
    assert asked(lane, {"a": 1}, 0.01) == {"a"}
    wait_until(lambda: bool(server.asked), 60, "the server was asked")
    assert asked(lane, {"a": 2}, 0.01) == {"a"}
    server.answers.set()
    wait_until(lambda: not lane.owed({"a": 2}, 0.0), 60, "both are done")
    assert server.asked == [{"a": 1}, {"a": 2}]
    lane.forget({"a": 1})
    assert lane.owed({"a": 2}, 0.0) == set()


def test_what_fails_is_not_done(lane: Lane, server: Server) -> None:
    server.is_broken = True
    server.answers.set()
    assert asked(lane, {"a": 1}, 60) == {"a"}
    server.is_broken = False
    assert asked(lane, {"a": 1}, 60) == set()
