"""Redis Cluster for threads and for asyncio: the servers say which has which keys.

    cache = RedisCluster(["redis://10.0.0.1:6379", "redis://10.0.0.2:6379"])

Keys of one call go to their servers in one round trip each, as in the other caches. A server that
does not have a key says who has it (`MOVED`, or `ASK` while a slot is on its way), and is
believed within the same call and its deadline. A replica that was promoted may lack the last
writes of its primary: it has to be flushed before it is read, as a Redis that came back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Unpack
from urllib.parse import urlsplit, urlunsplit

from shardkit.caches.async_served import AsyncServedCache
from shardkit.caches.backend import Answered, Place
from shardkit.caches.node import Node
from shardkit.caches.redis import PREFIX, flush
from shardkit.caches.redis_wire import (
    Asking,
    AsyncRedisConnection,
    Keeper,
    Redirect,
    RedisConnection,
    parse_url,
)
from shardkit.caches.served import Deadline, ServedCache
from shardkit.caches.serving import Options, Serving
from shardkit.caches.slots import SLOTS_COMMAND, SlotMap, place_of, ranges_of
from shardkit.caching.operations import UNKNOWN, Answer, Op, Request

__all__ = ["AsyncRedisCluster", "RedisCluster"]

_REDIRECTS: Final = 3
"""Times a key is sent on within one call."""
_ASK_TIME: Final = 0.02
"""Seconds one server may take to say who has what."""


def _names(urls: Sequence[str]) -> list[str]:
    parts = [parse_url(url) for url in urls]
    return [f"{each.get('host', 'localhost')}:{each.get('port', 6379)}" for each in parts]


class _Members:
    """The servers of a cluster, and how they are found; what both kinds of cache know."""

    def __init__(self, seeds: Sequence[str], prefix: str, cache: Serving, slots: SlotMap) -> None:
        self._seed = urlsplit(seeds[0])
        self._cache = cache
        self.slots = slots
        self.nodes = cache.nodes
        self.keeper = Keeper(self.nodes, prefix, self._address, self._life_key)

    def _address(self, node: Node) -> str:
        login, at, _ = self._seed.netloc.rpartition("@")
        host, _, port = node.name.rpartition(":")
        host = f"[{host}]" if ":" in host else host
        return urlunsplit(self._seed._replace(netloc=f"{login}{at}{host}:{port}", path=""))

    def _life_key(self, node: Node) -> bytes | None:
        return self.slots.life_key(node, self.nodes)

    @property
    def is_uncertain(self) -> bool:
        """Whether who has what may not be what was last heard."""
        return self.slots.is_wrong or any(not node.breaker.is_closed for node in self.nodes.homes)

    def to_ask(self) -> list[Node]:
        """Return who may know who has what; nobody when that was asked a moment ago."""
        if not self.slots.is_due(self._cache.now()):
            return []
        return sorted(self.nodes.homes, key=lambda node: not node.breaker.is_closed)

    def heard(self, node: Node, reply: object) -> bool:
        """Take in who has what; return whether that was said."""
        ranges = ranges_of(reply, node.name.rpartition(":")[0])
        if ranges is None:
            return False
        self.slots.learn(ranges, self.nodes)
        return True

    def redirected(
        self, requests: Sequence[Request], answers: Sequence[Answer], place: Place
    ) -> list[tuple[Node, list[int], list[Request]]]:
        """Return what has to be asked again, and of whom."""
        again: dict[tuple[Node, bool], list[int]] = {}
        for index, answer in enumerate(answers):
            if type(answer.cas) is not Redirect:
                continue
            slot, address, is_asked = answer.cas
            if is_asked:
                node = self.nodes.homes[place_of(address, self.nodes)]
            else:
                node = self.slots.moved(slot, address, self.nodes)
            if index < len(requests) and place is not Place.GUTTER:
                again.setdefault((node, is_asked), []).append(index)
        return [
            (node, at, [Asking(*requests[i]) if is_asked else requests[i] for i in at])
            for (node, is_asked), at in again.items()
        ]

    def settled(self, requests: Sequence[Request], answers: list[Answer]) -> list[Answer]:
        """Return the answers of a call that is over."""
        del answers[len(requests) :]
        for index, answer in enumerate(answers):
            if type(answer.cas) is Redirect:  # sent on too often
                answers[index] = UNKNOWN
                if requests[index].op is Op.DELETE:
                    key = requests[index].key
                    self.nodes.missed(self.nodes.home(key), key)
        return answers


class RedisCluster(ServedCache):
    """The servers of a Redis Cluster.

    Args:
        servers: addresses of some of them, as `redis://user:password@host:port`; login and TLS
            of the first are used for all.
        prefix: before every key; what `flush` deletes.
        options: see `Options`.
    """

    def __init__(
        self, servers: Sequence[str], *, prefix: str = PREFIX, **options: Unpack[Options]
    ) -> None:
        options["gutter"] = _names(options.get("gutter", ()))
        slots = SlotMap(prefix)
        super().__init__(
            _names(servers),
            lambda node: RedisConnection(node, self._members.keeper),
            owners=slots,
            **options,
        )
        self._members = _Members(servers, prefix, self, slots)

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        members, deadline = self._members, Deadline(self.seconds, self.now)
        if members.is_uncertain:
            self._ask_around(deadline)
        batches, answers = self.nodes.plan(requests, place)
        self._carry(batches, answers, deadline)
        for _ in range(_REDIRECTS):
            again = members.redirected(requests, answers, place)
            for node, at, theirs in again:
                there = [UNKNOWN] * len(at)
                self._carry(self.nodes.planned_at(node, theirs), there, deadline)
                for index, answer in zip(at, there, strict=True):
                    answers[index] = answer
            if not again:
                break
        return members.settled(requests, answers)

    def start(self, requests: Sequence[Request]) -> Answered:
        """Carry requests out at once: some may be sent to another server."""
        return Answered(self.run(requests))

    def _ask_around(self, deadline: Deadline) -> None:
        for node in self._members.to_ask():
            connection = RedisConnection(node, self._members.keeper)
            try:
                soon = Deadline(min(_ASK_TIME, deadline.left()), self.now)
                if self._members.heard(node, connection.exchange_raw(SLOTS_COMMAND, soon)):
                    return
            except OSError:
                continue
            finally:
                connection.shut()

    def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        return flush(self._members.keeper, name)


class AsyncRedisCluster(AsyncServedCache):
    """The same for asyncio; the arguments are those of `RedisCluster`."""

    def __init__(
        self, servers: Sequence[str], *, prefix: str = PREFIX, **options: Unpack[Options]
    ) -> None:
        options["gutter"] = _names(options.get("gutter", ()))
        slots = SlotMap(prefix)
        super().__init__(
            _names(servers),
            lambda node: AsyncRedisConnection(node, self._members.keeper),
            owners=slots,
            **options,
        )
        self._members = _Members(servers, prefix, self, slots)

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        members = self._members
        until = asyncio.get_running_loop().time() + self.seconds
        if members.is_uncertain:
            await self._ask_around(until)
        batches, answers = self.nodes.plan(requests, place)
        await self._carry(batches, answers, until)
        for _ in range(_REDIRECTS):
            again = members.redirected(requests, answers, place)
            for node, at, theirs in again:
                there = [UNKNOWN] * len(at)
                await self._carry(self.nodes.planned_at(node, theirs), there, until)
                for index, answer in zip(at, there, strict=True):
                    answers[index] = answer
            if not again:
                break
        return members.settled(requests, answers)

    async def _ask_around(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        for node in self._members.to_ask():
            connection = AsyncRedisConnection(node, self._members.keeper)
            try:
                async with asyncio.timeout_at(min(until, loop.time() + _ASK_TIME)):
                    reply = await connection.exchange_raw(SLOTS_COMMAND)
                if self._members.heard(node, reply):
                    return
            except OSError:
                continue
            finally:
                connection.shut()

    async def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        return await asyncio.to_thread(flush, self._members.keeper, name)
