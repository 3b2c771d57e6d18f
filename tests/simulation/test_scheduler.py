"""The scheduler: one seed, one trace; messages, crashes and freezes do what they say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.runs import WORLDS, run
from tests.simulation.scheduler import LOST, Call, Reply, Server, Simulation, Steps


class Counter(Server):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation, "counter")
        self.got: list[Any] = []

    def handle(self, request: Any, reply: Reply) -> None:
        self.got.append(request)
        reply(len(self.got))


def _asks(server: Counter, answers: list[Any], n: int = 1, timeout: float = 1.0) -> Steps:
    for i in range(n):
        answer = yield Call(server, i, timeout)
        answers.append(answer)


@pytest.mark.parametrize("world", WORLDS)
def test_a_seed_gives_the_same_trace_and_another_one_another(world: str) -> None:
    one, again, other = (run(world, seed, is_traced=True) for seed in (3, 3, 4))
    assert one.trace == again.trace
    assert one.n_steps == again.n_steps
    assert one.trace != other.trace


def test_an_answer_takes_two_messages_and_no_real_time() -> None:
    simulation = Simulation(1)
    server, answers = Counter(simulation), list[Any]()
    simulation.network.delay = 100.0
    simulation.spawn("a", _asks(server, answers, timeout=1000.0))
    simulation.run()
    assert answers == [1]
    assert 0 < simulation.now <= 1000.0


def test_a_message_that_is_late_happens_after_its_caller_gave_up() -> None:
    simulation = Simulation(1)
    server, answers = Counter(simulation), list[Any]()
    simulation.network.late = 1.0
    simulation.network.delay = 1.0
    simulation.spawn("a", _asks(server, answers, timeout=0.001))
    simulation.run()
    assert answers == [LOST]
    assert server.got == [0]


def test_of_lost_messages_some_are_carried_out_and_some_are_not() -> None:
    simulation = Simulation(2)
    server, answers = Counter(simulation), list[Any]()
    simulation.network.lost = 0.3
    simulation.spawn("a", _asks(server, answers, 200))
    simulation.run()
    n_answered = sum(answer is not LOST for answer in answers)
    assert n_answered < len(server.got) < 200


def test_a_server_that_crashes_answers_nothing_of_before() -> None:
    simulation = Simulation(1)
    server, answers = Counter(simulation), list[Any]()
    simulation.network.delay = 0.0
    simulation.spawn("a", _asks(server, answers))
    simulation.at(0.0, server.crash)
    simulation.at(0.5, server.restart)
    simulation.spawn("b", _asks(server, answers), after=0.6)
    simulation.run()
    assert answers == [1, LOST]


def test_a_frozen_server_does_all_that_has_arrived_when_it_thaws() -> None:
    simulation = Simulation(1)
    server, answers = Counter(simulation), list[Any]()
    server.freeze()
    simulation.spawn("a", _asks(server, answers, timeout=0.1))
    simulation.at(0.5, server.thaw)
    simulation.run()
    assert answers == [LOST]
    assert server.got == [0]


def test_a_frozen_actor_goes_on_where_it_was_and_a_killed_one_does_not() -> None:
    simulation = Simulation(1)
    seen: list[float] = []

    def steps() -> Steps:
        while True:
            seen.append(simulation.now)
            yield 0.1

    actor = simulation.spawn("a", steps())
    simulation.at(0.25, simulation.freeze, actor)
    simulation.at(0.95, simulation.thaw, actor)
    simulation.at(1.1, simulation.kill, actor)
    simulation.run()
    assert [round(at, 2) for at in seen] == [0.0, 0.1, 0.2, 0.95, 1.05]
    assert not actor.is_alive


def test_what_has_no_end_is_ended() -> None:
    simulation = Simulation(1)

    def steps() -> Steps:
        while True:
            yield 0.0

    simulation.spawn("a", steps())
    with pytest.raises(AssertionError, match="no end"):
        simulation.run(steps=1000)
