"""Nothing is found where nothing is wrong, over thousands of seeds; and every bug is found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.judge import Limits, judge
from tests.history.ledger import Ledger
from tests.simulation.__main__ import main
from tests.simulation.bugs import BUGS
from tests.simulation.cacheworld import CacheWorld
from tests.simulation.failoverworld import FAILOVER_BUGS
from tests.simulation.runs import run
from tests.simulation.world import World


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 60),
    n_clients=st.integers(1, 8),
    n_operations=st.integers(1, 15),
    lag=st.floats(0.0, 0.5),
    is_calm=st.booleans(),
)
def test_no_history_of_a_world_without_bugs_is_found_wanting(
    seed: int, n_clients: int, n_operations: int, lag: float, is_calm: bool
) -> None:
    world = World(
        seed, n_clients=n_clients, n_operations=n_operations, lag=lag, is_calm=is_calm
    ).run()
    verdicts = judge(Ledger.of(world.journal.records), Limits(within=0.5))
    assert {name: v.totals for name, v in verdicts.items() if v.violations} == {}


@pytest.mark.parametrize("bug", BUGS)
def test_every_bug_is_found_by_the_judge_it_is_for(bug: str) -> None:
    """Within a hundred seeds; most need one."""
    wanted = BUGS[bug]
    for seed in range(100):
        try:
            verdict = run("database", seed, bug=bug).verdicts[wanted.judge]
        except AssertionError:  # the world has noticed; it is the judge who has to
            continue
        if not set(wanted.findings).isdisjoint(verdict.totals):
            return
    pytest.fail(f"{wanted.judge} has not found that this is left out: {bug}")


@pytest.mark.parametrize("bug", FAILOVER_BUGS)
def test_every_bug_of_a_failover_is_found(bug: str) -> None:
    judge_name, findings = FAILOVER_BUGS[bug]
    for seed in range(300):
        try:
            verdict = run("failover", seed, bug=bug).verdicts[judge_name]
        except AssertionError:
            continue
        if not set(findings).isdisjoint(verdict.totals):
            return
    pytest.fail(f"{judge_name} has not found that this is left out: {bug}")


@pytest.mark.parametrize("protocol", ["P1", "P2", "P3", "P4", "P5", "P6"])
def test_well_known_cache_protocols_show_what_is_old(protocol: str) -> None:
    for seed in range(100):
        world = CacheWorld(seed, protocol=protocol).run()
        if judge(Ledger.of(world.journal.records))["caches"].totals.get("stale cache"):
            return
    pytest.fail(f"{protocol} has never shown anything old")


def test_one_command_replays_a_seed_and_explains_what_was_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["3", "--world", "database"]) == 0
    assert "0 with violations" in capsys.readouterr().out
    assert main(["0", "--bug", "lost write"]) == 1
    out = capsys.readouterr().out
    assert "lost write: " in out
    assert "COMMIT" in out or "('commit', " in out
    assert "replay: python -m tests.simulation 0 --world database --bug 'lost write'" in out
