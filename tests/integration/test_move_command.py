"""`shardkit move` as people run it, with schemas that revisions make."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardkit.cli import main
from tests.fixtures.site import Site

pytestmark = pytest.mark.integration


class Command:
    """Runs `shardkit move` in this process."""

    def __init__(self, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
        self._site = site
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        given = ["move", *arguments, "--config", str(self._site.config)]
        if arguments[0] in {"start", "resume", "cutover"}:
            given += ["--migrations", str(self._site.folder)]
        with pytest.raises(SystemExit) as end:
            main(given)
        out, errors = self._capsys.readouterr()
        assert (end.value.code or 0) == code, (arguments, out, errors)
        return out + errors

    def json(self, *arguments: str, code: int = 0) -> Any:
        text = self(*arguments, "--json", code=code)
        return json.JSONDecoder().raw_decode(text)[0]


@pytest.fixture
def command(site: Site, capsys: pytest.CaptureFixture[str]) -> Command:
    site.write(
        "r2",
        'op.create_table("u", sa.Column("id", sa.BigInteger, primary_key=True), '
        'sa.Column("a", sa.BigInteger, sa.ForeignKey("t.a"), index=True)); '
        'op.create_check_constraint("positive", "u", "id > 0")',
        "r1",
    )
    assert site.apply().error is None
    with site.admin("alpha") as owner:
        owner.execute("INSERT INTO shard_0001.t SELECT generate_series(1, 500)")
        owner.execute("INSERT INTO shard_0001.u SELECT a, a FROM shard_0001.t")
    return Command(site, capsys)


def test_a_logical_shard_goes_there_and_back_and_migrations_go_on(
    site: Site, command: Command
) -> None:
    assert "steps: claim, import" in command("plan", "1", "beta")
    [planned] = command.json("start", "1", "beta", "--dry-run")
    assert (planned["source"], planned["target"]) == ("alpha", "beta")
    assert not any(check["problem"] for check in planned["checks"])
    assert "ready: shardkit move cutover hands over" in command("start", "1", "beta", "--hold")
    assert "is being moved" in command("start", "1", "beta", code=3)
    assert "nothing differs" in command("verify", "1")
    [known] = command.json("status")["moves"]
    assert (known["logical_shard"], known["is_handed_over"]) == (1, False)
    [done] = command.json("cutover", "1")["moves"]
    assert done["is_moved"]
    assert done["pause"] < 5
    assert "moved: clean, or rollback" in command("status")
    # A migration leaves it alone until the old copy is forgotten.
    site.write("r3", 'op.add_column("t", sa.Column("b", sa.Text))', "r2")
    assert site.apply().laggards.keys() == {1}
    assert command.json("rollback", "1")["moves"][0]["target"] == "alpha"
    assert "the old copy on beta is gone" in command("clean", "1")
    assert site.apply().error is None
    with site.admin("alpha") as owner:
        found = owner.execute(
            "SELECT count(*), count(b) FROM shard_0001.u JOIN shard_0001.t USING (a)"
        )
        assert found.fetchone() == (500, 0)
        kinds = owner.execute(
            "SELECT count(*) FROM pg_indexes WHERE schemaname = 'shard_0001' AND tablename = 'u'"
        )
        assert kinds.fetchone() == (2,)


@pytest.mark.slow
def test_many_at_once_and_what_is_refused(site: Site, command: Command) -> None:
    found = command.json("start", "0-2", "beta", "--clean", "--at-once", "3", "--per-server", "3")
    assert sorted(each["logical_shard"] for each in found["moves"]) == [0, 1, 2]
    with site.admin("beta") as owner:
        assert owner.execute("SELECT count(*) FROM shard_0001.u").fetchone() == (500,)
    assert command.json("status")["moves"] == []
    assert "on beta already" in command("start", "1", "beta", code=3)
    assert "there is no logical shard 99" in command("start", "99", "beta", code=2)
    assert "names no logical shards" in command("start", "x", "beta", code=2)
    assert "no physical shard 'omega'" in command("plan", "1", "omega", code=3)
    for name in ("resume", "abort", "rollback", "clean", "verify", "cutover"):
        assert "not being moved" in command(name, "1", code=3)
    assert "not being moved" in command("abort", "1", "--dry-run", code=3)


def test_an_abort_leaves_nothing(site: Site, command: Command) -> None:
    command("start", "1", "beta", "--hold")
    assert "given up: alpha goes on" in command("abort", "1")
    with site.admin("beta") as owner:
        assert owner.execute("SELECT to_regnamespace('shard_0001')").fetchone() == (None,)
    assert command.json("status") == {"moves": [], "silent": {}}
