"""The history test, in short: clients at work while servers move and fail; nothing is found.

`make test-history SECONDS=… SEED=…` is the long one.
"""

from __future__ import annotations

import pytest

from tests.fixtures.folders import in_reach
from tests.history.live import bites
from tests.history.live.movers import movers
from tests.history.live.run import Result, run

pytestmark = [pytest.mark.integration, pytest.mark.fault]

JUDGES = (
    "appends", "registers", "sets", "bank", "names", "sessions", "caches", "outbox", "owners",
    "leftovers", "liveness", "schemas", "secrets",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_version: str,  # noqa: ARG001  skips when there is none
) -> Result:
    """One short run, of a seed of its own."""
    folder = in_reach(tmp_path_factory.mktemp("history") / "run")
    return run(
        folder,
        seconds=12.0,
        calm=5.0,
        seed=1,
        moves=movers(1),
        deadline=60.0,
        nemesis={"pause": 0.5},
    )


def test_nothing_is_found_while_servers_move_and_fail(result: Result) -> None:
    assert not result.violations, "\n".join([*result.lines, f"seed {1}"])
    assert result.broken is None


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["catch-up not awaited", "asynchronous failover"])
def test_judges_bite_on_real_servers(bug: str, postgres_version: str) -> None:  # noqa: ARG001
    """Two of fifteen; `make test-bites` has all."""
    assert bites.main([bug]) == 0


def test_clients_are_told_of_no_error(result: Result) -> None:
    assert not result.n_errors, result.errors


def test_every_judge_had_something_to_judge(result: Result) -> None:
    """It is worth nothing if nothing happens."""
    idle = [name for name in JUDGES if not result.verdicts[name].has_checked]
    assert not idle, "\n".join(result.lines)
    assert result.counts["moves"] + result.counts["moves given up"] >= 1
    assert sum(n for what, n in result.counts.items() if what not in {"moves", "operations"}) >= 3
