"""`shardkit idmap`: fills a map from a file, and reads all of one. Called by the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.retry import Retry

from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    IdMapError,
    InvalidMappingError,
)
from shardkit.idmap import Found, IdMap, Layout, Loaded
from shardkit.idmap.replies import FAILURES

__all__ = ["Counted", "check", "connect", "count", "load", "pairs"]

PATIENT: Final = 10.0
"""Seconds a server has for one round trip."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What a file has, without a server.

    Attributes:
        entries: lines with an entry.
        is_sorted: whether ids ascend; a load of others is slow.
        widest: bytes of the widest value.
    """

    entries: int
    is_sorted: bool
    widest: int


def connect(url: str, *, is_cluster: bool = False) -> Redis | RedisCluster:
    """Return a client of Redis, or of a Redis Cluster by the address of one server.

    Raises:
        ConfigurationError: that is no address.
        EndpointUnavailableError: the cluster does not answer (retryable).
    """
    try:
        if is_cluster:
            cluster: RedisCluster = RedisCluster.from_url(url, socket_timeout=PATIENT)
            return cluster
        client: Redis = Redis.from_url(url, socket_timeout=PATIENT, retry=Retry(NoBackoff(), 1))
        return client
    except ValueError as error:
        raise ConfigurationError(
            f"{url!r} is no address of Redis: {error}", hint="as redis://10.0.0.1:6379/0"
        ) from None
    except FAILURES as error:
        raise EndpointUnavailableError(f"the Redis Cluster does not answer: {error}") from error


def pairs(lines: Iterable[str], name: str) -> Iterator[tuple[int, int]]:
    """Return the entries of a text: an id and a value a line, with a comma or spaces between.

    Empty lines, and those that begin with #, are none.

    Raises:
        InvalidMappingError: a line is something else; names it.
    """
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if len(words) == 2 and all(map(_is_number, words)):
            yield int(words[0]), int(words[1])
        elif words and not line.startswith("#"):
            raise InvalidMappingError(
                f"{name}, line {number}: {line.strip()[:60]!r} is no entry",
                hint="give an id and a value, as 1155315,939; what came before is loaded already",
            )


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 19


def count(entries: Iterable[tuple[int, int]]) -> Counted:
    """Read entries to the end, and store nothing.

    Raises:
        InvalidMappingError: one cannot be stored.
    """
    layout = Layout()
    n, largest, is_sorted = 0, 0, True
    for (before, _), (id, value) in pairwise(_begun(entries)):  # noqa: A001  the glossary's word
        layout.place(id)
        largest = max(largest, layout.cell(value))
        is_sorted &= before <= id
        n += 1
    return Counted(n, is_sorted, (largest.bit_length() + 7) // 8)


def _begun(entries: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    yield -1, 0
    yield from entries


def load(
    target: IdMap,
    entries: Iterable[tuple[int, int]],
    *,
    progress: Callable[[Loaded], object] | None = None,
) -> Loaded:
    """Store entries; again, or on where it stopped, does no harm."""
    return target.load(entries, progress=progress)


def check(target: IdMap, *, progress: Callable[[Found], object] | None = None) -> Found:
    """Read a whole map.

    Raises:
        IdMapError: there is no such map.
    """
    found = target.check(progress=progress)
    if not found.entries and not found.damaged:
        raise IdMapError(
            f"there is nothing in the map {target.name!r}",
            hint="is it the right name, and the right server?",
        )
    return found
