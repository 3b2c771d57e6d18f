"""The same map for asyncio. Decides nothing: `steps` says what to ask and what answers mean."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import Redis, RedisCluster

from shardkit import deadlines
from shardkit.errors import DeadlineExceededError, OutcomeUnknownError
from shardkit.idmap.building import Loaded, windows
from shardkit.idmap.layout import Layout
from shardkit.idmap.map import checked_client, judged, lacking
from shardkit.idmap.replies import FAILURES
from shardkit.idmap.scripts import Command, is_change, with_source
from shardkit.idmap.steps import Steps, Work

__all__ = ["AsyncIdMap"]

_Result = TypeVar("_Result")


class AsyncIdMap:
    """A map from ids to ids in Redis, or on a Redis Cluster; see `shardkit.idmap.IdMap`.

    Inside a deadline of `shardkit.deadline` no round trip takes longer than what is left.

    Args:
        client: `redis.asyncio.Redis` or `redis.asyncio.RedisCluster`, without `decode_responses`.
        name: of the map.
        width: bytes of most values.
    """

    def __init__(self, client: Redis | RedisCluster, name: str, *, width: int = 3) -> None:
        self._client: Any = checked_client(client)
        self._steps = Steps(name, Layout(width))

    @property
    def name(self) -> str:
        """Name of the map."""
        return self._steps.name

    @property
    def layout(self) -> Layout:
        """How its ids are laid out."""
        return self._steps.layout

    async def get(self, id: int) -> int | None:  # noqa: A002  the glossary's word
        """Return the value of an id, or None when it has none: one round trip."""
        return await self._run(self._steps.reading(self._steps.get(id)))

    async def get_many(self, ids: Iterable[int]) -> dict[int, int]:
        """Return the values of ids; those without one are left out."""
        return await self._run(self._steps.reading(self._steps.get_many(ids)))

    async def set(self, id: int, value: int) -> None:  # noqa: A002  the glossary's word
        """Give an id a value, in place of one it may have."""
        await self.set_many({id: value})

    async def set_many(self, entries: Mapping[int, int]) -> None:
        """Give ids values: all that share a block at once, blocks one after the other.

        Raises:
            OverloadedError: others changed a block over and over (retryable).
        """
        for value in entries.values():
            self.layout.cell(value)
        await self._change(entries)

    async def delete(self, id: int) -> bool:  # noqa: A002  the glossary's word
        """Take an id's value away; return whether it had one."""
        return bool(await self._change({id: None}))

    async def delete_many(self, ids: Iterable[int]) -> int:
        """Take values away; return how many there were."""
        return len(await self._change(dict.fromkeys(ids)))

    async def load(
        self,
        entries: Iterable[tuple[int, int]],
        *,
        progress: Callable[[Loaded], object] | None = None,
    ) -> Loaded:
        """Store many entries, as whole blocks; see `shardkit.idmap.IdMap.load`.

        Packing takes the event loop's time, some milliseconds a block: load large maps elsewhere.
        """
        done = Loaded()
        for blocks, more in windows(self.layout, entries):
            size = await self._run(self._steps.writing(self._steps.put(blocks)))
            done = Loaded(
                done.entries + more.entries,
                done.blocks + more.blocks,
                done.size_bytes + size,
                more.last_id,
            )
            if progress is not None:
                progress(done)
        return done

    async def _change(self, changes: Mapping[int, int | None]) -> dict[int, int]:
        return await self._run(self._steps.writing(self._steps.change(changes)))

    async def _run(self, work: Work[_Result]) -> _Result:
        try:
            commands = next(work)
            while True:
                commands = work.send(await self._exchange(commands))
        except StopIteration as end:
            result: _Result = end.value
            return result

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        deadlines.check("the id map")
        left = deadlines.left(math.inf)
        try:
            async with asyncio.timeout(None if left == math.inf else left):
                replies = await self._sent(commands)
                if again := lacking(commands, replies):
                    whole = await self._sent([with_source(commands[index]) for index in again])
                    for index, reply in zip(again, whole, strict=True):
                        replies[index] = reply
        except FAILURES as error:
            if isinstance(error, TimeoutError) and deadlines.is_over():
                raise _late(commands) from error
            raise judged(commands, error) from error
        return replies

    async def _sent(self, commands: Sequence[Command]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [await self._client.execute_command(*commands[0])]
            except redis_errors.ResponseError as error:
                return [error]
        pipeline: Any = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))


def _late(commands: Sequence[Command]) -> Exception:
    if any(map(is_change, commands)):
        return OutcomeUnknownError(
            "the deadline passed while a change of the id map was answered",
            hint="make the change again: twice does no harm",
        )
    return DeadlineExceededError("the deadline passed while Redis was asked for the id map")
