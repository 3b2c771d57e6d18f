"""Checks of Redis and Memcached.

Source: docs/cache.md; Redis documentation, "Key eviction"; memcached's protocol.txt.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.ops.health.facts import Facts
from shardkit.ops.health.findings import Problem, Severity, check

__all__ = ["CHECKS"]

_META = (1, 6)
_LARGE_ENOUGH = 2**20
"""Bytes of an entry that a cache of rows should take: Memcached's own default."""


@check(Severity.WARNING, "maxmemory-policy volatile-lru for a cache, noeviction for maps")
def redis_policy(facts: Facts) -> Iterator[Problem]:
    """Redis evicts keys without expiry: what says that a cache is its own, id maps, sessions."""
    for redis in facts.redis:
        if redis.policy.startswith("allkeys-"):
            yield Problem(redis.where, f"maxmemory-policy is {redis.policy}: any key may go")


@check(Severity.WARNING, "CONFIG SET maxmemory-policy volatile-lru, unless it keeps maps only")
def redis_full(facts: Facts) -> Iterator[Problem]:
    """Redis has a bound and evicts nothing: when it is full, the cache takes no more."""
    for redis in facts.redis:
        if redis.max_bytes and redis.policy == "noeviction":
            yield Problem(redis.where, "when maxmemory is reached, every write is refused")


@check(Severity.NOTE, "CONFIG SET maxmemory to what the machine can spare")
def redis_unbounded(facts: Facts) -> Iterator[Problem]:
    """Redis may take all memory of its machine."""
    for redis in facts.redis:
        if not redis.max_bytes:
            yield Problem(redis.where, "maxmemory is 0")


@check(Severity.NOTE, "appendonly yes where it keeps more than a cache: id maps, sessions, queues")
def redis_forgets(facts: Facts) -> Iterator[Problem]:
    """Redis keeps nothing over a restart."""
    for redis in facts.redis:
        if not redis.is_kept:
            yield Problem(redis.where, "neither an append-only file nor snapshots")


@check(Severity.ERROR, "give the address of the master, or promote this one")
def redis_role(facts: Facts) -> Iterator[Problem]:
    """A Redis that is a replica, and refuses to write."""
    for redis in facts.redis:
        if redis.role != "master":
            yield Problem(redis.where, f"is a {redis.role}")


@check(Severity.ERROR, "upgrade Memcached to 1.6 or newer")
def memcached_version(facts: Facts) -> Iterator[Problem]:
    """A Memcached without meta commands, which the cache is made of."""
    for memcached in facts.memcached:
        if memcached.version < _META or not memcached.knows_meta:
            found = ".".join(map(str, memcached.version))
            yield Problem(memcached.where, f"version {found} does not know meta commands")


@check(Severity.WARNING, "start Memcached with -I 1m or more")
def memcached_item_size(facts: Facts) -> Iterator[Problem]:
    """A Memcached that takes small entries only."""
    for memcached in facts.memcached:
        if memcached.max_item_bytes < _LARGE_ENOUGH:
            yield Problem(memcached.where, f"entries end at {memcached.max_item_bytes:,} bytes")


CHECKS = (
    redis_policy, redis_full, redis_unbounded, redis_forgets, redis_role, memcached_version,
    memcached_item_size,
)  # fmt: skip
