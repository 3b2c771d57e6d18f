"""When writers put their markers: while the database writes, and where that has to be undone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from shardkit import Cluster, ids
from shardkit.cache import Op, Outcome
from shardkit.cachesteps import CacheSteps
from shardkit.cachewrites import CacheWrites
from shardkit.caching.operations import Kind
from shardkit.config import PoolConfig
from shardkit.testing import wait_until
from shardkit.topology import Topology
from tests.fixtures.caches import NewServer
from tests.integration.test_cache_writes import (
    config_of,
    entry,
    entry_of,
    name_of,
    new_profile,
    patient,
    shown,
)
from tests.models import Mood, Post, Profile

pytestmark = pytest.mark.integration


@pytest.fixture(params=["memcached", "redis"])
def cached(
    topology: Topology, cache_server: NewServer, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    pool = PoolConfig(size=8, overflow=8, timeout=20.0)
    config = config_of(cache_server(request.param))
    with Cluster(topology, pool=pool, cache=config) as cluster:
        patient(cluster)
        yield cluster


@pytest.fixture
def puts(cached: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of each batch of markers."""
    assert cached.cache is not None
    rows, found = cached.cache, list[list[str]]()
    start = rows.start

    def seen(requests: Any) -> Any:
        keys = [request.key for request in requests if request.op is Op.PUT]
        if keys:
            found.append(keys)
        return start(requests)

    monkeypatch.setattr(rows, "start", seen)
    return found


def test_markers_are_there_before_the_row_is_locked(cached: Cluster) -> None:
    """They are sent while the UPDATE waits: for another one, here."""
    profile = new_profile(cached)
    with cached.writer() as first:
        first.get_one(Profile, profile.id).name = "eva"
        first.flush()

        def rename() -> None:
            with cached.writer() as second:
                second.get_one(Profile, profile.id).name = "ida"
                second.commit()

        thread = threading.Thread(target=rename)
        thread.start()
        wait_until(lambda: entry(cached, profile).kind is Kind.MARKER, 20, "the marker is there")
        assert entry(cached, profile).version == profile.version + 1
        assert name_of(cached, profile.id) == "ana"
        first.commit()
        thread.join()
    assert name_of(cached, profile.id) == "ida"
    found = entry(cached, profile)
    assert found.outcome is Outcome.FOUND
    assert shown(cached, profile)["name"] == "ida"


def test_each_row_is_marked_once(cached: Cluster, puts: list[list[str]]) -> None:
    profile = new_profile(cached)
    assert [len(keys) for keys in puts] == [1]
    puts.clear()
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"
        session.flush()
        assert not puts, "COMMIT does not come next"
        session.get_one(Profile, profile.id).name = "ida"
        session.commit()
    assert [len(keys) for keys in puts] == [1]
    assert shown(cached, profile)["name"] == "ida"


def test_rows_that_a_flush_finds_by_itself_are_marked_too(
    cached: Cluster, puts: list[list[str]]
) -> None:
    """What a listener writes after the flush is in the same commit."""
    profile = new_profile(cached)
    puts.clear()
    with cached.writer() as session:
        mine = session.get_one(Profile, profile.id)

        @event.listens_for(session, "after_flush_postexec", once=True)
        def change_more(_session: Any, _context: Any) -> None:
            mine.mood = Mood.GOOD

        mine.name = "eva"
        session.commit()
    row = shown(cached, profile)
    assert (row["name"], row["mood"]) == ("eva", Mood.GOOD)
    assert [len(keys) for keys in puts] == [1]


def test_a_write_that_fails_takes_its_marker_away(cached: Cluster) -> None:
    profile = new_profile(cached)
    name_of(cached, profile.id)
    with cached.writer() as session:
        held = session.get_one(Profile, profile.id)
        held.name = "eva"
        session.add(Post(owner_id=profile.id, id=profile.id, text="one"))
        session.flush()
        session.commit()
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "ida"
        session.add(Post(owner_id=profile.id, id=profile.id, text="the same id again"))
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
    assert entry(cached, profile).kind is not Kind.MARKER
    assert name_of(cached, profile.id) == "eva"
    assert shown(cached, profile)["name"] == "eva"


def test_nothing_is_sent_in_the_midst_of_a_rollback(cached: Cluster, puts: list[list[str]]) -> None:
    """A flush that writes nothing leaves nothing to be done by the next wait."""
    profile = new_profile(cached)
    puts.clear()
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "ana"  # as it was: no UPDATE
        session.commit()
        session.get_one(Profile, profile.id)
        session.rollback()
    assert not puts
    assert shown(cached, profile)["name"] == "ana"


def test_an_object_of_a_later_version_than_the_row_is_not_stored(cached: Cluster) -> None:
    """After a failover that has lost commits: its marker may have been respected wrongly."""
    profile = new_profile(cached)
    shard = ids.shard_of(profile.id)
    with cached.writer() as session:
        held = session.get_one(Profile, profile.id)
        held.__dict__["version"] = profile.version + 1_000_000
        held.name = "eva"
        session.commit()
        assert held.version < profile.version + 1_000_000
        found = session.execute(
            text(f"SELECT version FROM shard_{shard:04}.profiles WHERE id = {profile.id}"),
            bind_arguments={"logical_shard": shard},
        ).scalar()
        assert found == held.version
    assert entry_of(cached, "profiles", profile.id).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) == "eva"


def test_what_follows_commit_is_computed_while_the_database_commits(
    cached: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = new_profile(cached)
    steps: list[str] = []
    for cls, name in ((CacheSteps, "foresee"), (CacheSteps, "committed"), (CacheWrites, "finish")):
        method = getattr(cls, name)

        def noted(*args: Any, _method: Any = method, _name: str = name) -> Any:
            steps.append(_name)
            return _method(*args)

        monkeypatch.setattr(cls, name, noted)
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"
        session.commit()
    assert steps == ["foresee", "finish", "committed"]
    assert shown(cached, profile)["name"] == "eva"
