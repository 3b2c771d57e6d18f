"""Plans in files and as pictures: what is left of a plan, when it is stale, what is drawn of it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

import shardkit
from shardkit.errors import ConfigurationError, RefusedError
from shardkit.ops.rebalance import picture, planfile
from shardkit.ops.rebalance.facts import Constraints, LogicalShard, Situation
from shardkit.ops.rebalance.planner import moved, plan

SHARDS = tuple(LogicalShard(n, "alpha" if n < 8 else "beta", 1, 100 + n) for n in range(16))
BEFORE = Situation("demo", ("alpha", "beta", "gamma"), SHARDS)
WANTED = Constraints(weights={"beta": Fraction(1, 3)}, pins={3: "alpha"}, max_moves=40)


def kept(folder: Path, wanted: Constraints = WANTED) -> planfile.PlanFile:
    file = folder / "plan.json"
    planfile.write(file, BEFORE, wanted, plan(BEFORE, wanted), made="2026-01-02T03:04:05+00:00")
    return planfile.read(file)


def changed(number: int, **changes: Any) -> Situation:
    shards = [replace(s, **changes) if s.number == number else s for s in BEFORE.shards]
    return replace(BEFORE, shards=tuple(shards))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = kept(tmp_path)
    assert file.kept == WANTED
    assert file.planned == plan(BEFORE, WANTED).moves != ()


def test_a_plan_is_done_where_it_stopped(tmp_path: Path) -> None:
    file = kept(tmp_path)
    for n in range(len(file.planned) + 1):
        assert planfile.remaining(file, moved(BEFORE, file.planned[:n])) == file.planned[n:]


def test_a_promotion_changes_no_plan(tmp_path: Path) -> None:
    file = kept(tmp_path)
    number = file.planned[0].logical_shard
    assert planfile.remaining(file, changed(number, epoch=2)) == file.planned


def stale(file: planfile.PlanFile, now: Situation) -> str:
    with pytest.raises(RefusedError) as caught:
        planfile.remaining(file, now)
    assert caught.value.message.startswith("the plan is stale: ")
    return caught.value.message


def test_a_plan_of_another_world_is_refused(tmp_path: Path) -> None:
    file = kept(tmp_path)
    stays = min({s.number for s in SHARDS} - {m.logical_shard for m in file.planned})
    assert "the cluster 'demo', and this is 'live'" in stale(file, replace(BEFORE, cluster="live"))
    assert "knows 16 logical shards of 15" in stale(file, replace(BEFORE, shards=SHARDS[:15]))
    owner = SHARDS[stays].owner
    assert f"{stays} was on {owner!r} and is on 'gamma' now" in stale(
        file, changed(stays, owner="gamma")
    )
    gone = replace(BEFORE, physical=("alpha", "beta"))
    assert "no physical shard is called 'gamma' any more" in stale(file, gone)


def test_a_plan_that_would_make_it_worse_by_now_is_refused(tmp_path: Path) -> None:
    shards = [LogicalShard(n, "alpha" if n < 6 else "beta", 1, 100) for n in range(8)]
    two = Situation("demo", ("alpha", "beta"), tuple(shards))
    path = tmp_path / "plan.json"
    planfile.write(path, two, Constraints(), plan(two, Constraints()), made="")
    file = planfile.read(path)
    assert len(planfile.remaining(file, two)) == 2
    # What was on beta has grown, and it is beta that has too much now.
    grown = [replace(s, size_bytes=400) if s.owner == "beta" else s for s in shards]
    assert "sizes have changed" in stale(file, replace(two, shards=tuple(grown)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "moves": 3}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is no plan"):
        planfile.read(file)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        planfile.read(tmp_path / "nowhere.json")


def test_a_picture_shows_every_physical_shard_and_every_way() -> None:
    situation = replace(BEFORE, cluster="<demo> & more")
    wanted = Constraints(drained=frozenset({"beta"}))
    found = plan(situation, wanted)
    root = ET.fromstring(picture.svg(found, cluster=situation.cluster, tolerance=wanted.tolerance))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Rebalance of <demo> & more" in texts
    for name in situation.physical:
        assert texts.count(name) == 2
    ways = {(m.source, m.target) for m in found.moves}
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert {tuple(t.split(":")[0].split(" to ")) for t in titles} == ways
    assert "to be emptied" in texts
    assert "empty" in texts


def test_the_picture_of_the_documentation_is_what_is_drawn() -> None:
    """A plan of four servers: one too full, one to be emptied, one new; 64 logical shards of 2 to 6 GB."""
    shards = tuple(
        LogicalShard(n, "alpha" if n < 26 else "beta" if n < 48 else "gamma", 1, size)
        for n, size in enumerate(2 * 10**9 + n * 2_654_435_761 % (4 * 10**9) for n in range(64))
    )
    situation = Situation("photos", ("alpha", "beta", "gamma", "delta"), shards)
    wanted = Constraints(drained=frozenset({"gamma"}))
    drawn = picture.svg(plan(situation, wanted), cluster="photos", tolerance=wanted.tolerance)
    kept = Path(shardkit.__file__).parent.parent / "docs" / "rebalance.svg"
    assert kept.read_text(encoding="utf-8") == drawn
