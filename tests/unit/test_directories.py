"""The cache of directory entries, and what is asked of which server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from shardkit.directories import Directories
from shardkit.errors import EndpointUnavailableError
from shardkit.keys import KeyType, canonical
from shardkit.router import Router
from shardkit.strategies import Directory, Rule, hash_shard
from shardkit.testing import FakeClock

RULE = Rule(Directory("d"), KeyType.TEXT)


class Servers:
    """One physical shard with one replica: entries of each, and what was asked."""

    def __init__(self) -> None:
        self.primary: dict[bytes, int] = {}
        self.replica: dict[bytes, int] = {}
        self.asked: list[str] = []
        self.dead: set[str] = set()

    def group(self, logical_shards: Sequence[int], /) -> Mapping[str, tuple[int, ...]]:
        return {"alpha": tuple(logical_shards)}

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        name = "primary" if primary else "replica"
        if name in self.dead:
            raise EndpointUnavailableError
        if "INSERT" in query:
            self.asked.append("insert")
            for key, shard in zip(parameters["keys"], parameters["shards"], strict=True):
                self.primary.setdefault(key, shard)
            return []
        self.asked.append(name)
        entries = self.primary if primary else self.replica
        keys = [k for name, ks in parameters.items() if name != "d" for k in ks]
        return [(key, entries[key]) for key in keys if key in entries]


def test_an_entry_is_read_once_and_again_when_it_has_expired() -> None:
    servers, clock = Servers(), FakeClock()
    servers.replica[canonical("a")] = 9
    directories = Directories(servers, lambda _: 0, ttl=10.0, clock=clock)

    def look() -> int:
        return directories.decided(Router(64), lambda router: router.shard(RULE, "a"))

    assert [look(), look()] == [9, 9]
    assert servers.asked == ["replica"]
    clock.advance(10.0)
    assert look() == 9
    assert servers.asked == ["replica", "replica"]


def test_absence_is_believed_of_the_primary_only_and_never_kept() -> None:
    servers = Servers()
    directories = Directories(servers, lambda _: 5)

    def look(*, assign: bool = False) -> int:
        return directories.decided(
            Router(64), lambda router: router.shard(RULE, "a"), assign=assign
        )

    assert look() == hash_shard(canonical("a"), 64)
    assert servers.asked == ["replica", "primary"]
    assert look(assign=True) == 5
    servers.asked.clear()
    assert look() == 5
    assert servers.asked == []


def test_who_came_first_has_decided() -> None:
    servers = Servers()
    first = Directories(servers, lambda _: 1)
    second = Directories(servers, lambda _: 2)
    for directories in (first, second):
        found = directories.decided(Router(64), lambda r: r.shards(RULE, ["a", "b"]), assign=True)
        assert found == {1}


def test_a_dead_replica_is_passed_over_and_a_dead_primary_is_not() -> None:
    servers = Servers()
    servers.primary[canonical("a")] = 3
    servers.dead = {"replica"}
    directories = Directories(servers, lambda _: 0)
    assert directories.decided(Router(64), lambda router: router.shard(RULE, "a")) == 3
    servers.dead = {"replica", "primary"}
    assert directories.decided(Router(64), lambda router: router.shard(RULE, "a")) == 3, "cached"
    with pytest.raises(EndpointUnavailableError):
        directories.decided(Router(64), lambda router: router.shard(RULE, "b"))


def test_the_cache_is_bounded() -> None:
    servers = Servers()
    directories = Directories(servers, lambda _: 0, size=10)
    names = [f"key {n}" for n in range(25)]
    directories.decided(Router(64), lambda router: router.shards(RULE, names), assign=True)
    assert len(directories._cache) == 10
