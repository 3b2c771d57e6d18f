"""DDL and moves exclude each other, whoever comes first."""

from __future__ import annotations

import pytest

from shardkit.errors import RefusedError, TryAgainError
from shardkit.ops.ddllocks import release, take
from shardkit.ops.migrate import plan
from shardkit.testing import wait_until
from tests.fixtures.site import ALPHA, BETA, Site

pytestmark = pytest.mark.integration

COLUMN = 'op.add_column("t", sa.Column("b", sa.Text))'


def test_a_move_keeps_a_migration_away_from_its_logical_shard(site: Site) -> None:
    site.apply()
    site.write("r2", f'{COLUMN}\n\n\ndef downgrade(): op.drop_column("t", "b")', "r1")
    with site.admin("alpha") as mover:
        take(mover, 2, holder="move 17", reason="moves to \x1b[2Jbeta")
        take(mover, 2, holder="move 17", reason="again")
        with pytest.raises(RefusedError, match="move 17"):
            take(mover, 2, holder="move 18", reason="moves")
    # A mover that died is no less a move.
    code, output, errors = site.run("apply", "--wave", "all")
    assert code == 4, errors
    assert "move 17" in errors
    assert "logical shard 2" in errors
    assert "\x1b" not in output + errors
    assert site.ledger("alpha") == {n: ["r1"] if n == 2 else ["r1", "r2"] for n in ALPHA}
    assert site.ledger("beta") == {n: ["r1", "r2"] for n in BETA}
    code, _, errors = site.run("downgrade", "r1")
    assert code == 4, errors
    with site.admin("alpha") as mover:
        assert not release(mover, 2, holder="move 18")
        assert release(mover, 2, holder="move 17")
    assert site.apply().error is None
    assert plan(site.topology, site.revisions()).n_work == 0


def test_a_migration_keeps_moves_away_until_it_ends(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, site.admin("alpha") as mover:
        with holder.transaction():
            holder.execute("SELECT * FROM shard_0000.t")
            run = site.command("apply", "--lock-attempts", "1000", "--lock-timeout", "0.05")
            wait_until(lambda: "r2" in site.ledger("alpha")[3], 30.0, "it is at work")
            with pytest.raises(TryAgainError, match="migration is at work"):
                take(mover, 3, holder="move 17", reason="moves to beta")
        run.communicate(timeout=60)
        assert run.returncode == 0
        take(mover, 3, holder="move 17", reason="moves to beta")
        take(mover, 1, holder="move 18", reason="moves of one server do not wait for each other")
