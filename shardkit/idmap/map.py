"""A map for threads. Decides nothing: `steps` says what to ask and what the answers mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from redis import Redis, RedisCluster
from redis import exceptions as redis_errors

from shardkit import deadlines
from shardkit.errors import ConfigurationError
from shardkit.idmap.building import Loaded, windows
from shardkit.idmap.checking import Found, Scan
from shardkit.idmap.layout import Layout
from shardkit.idmap.replies import FAILURES, LOST, NoScript, wrong
from shardkit.idmap.scripts import Command, is_change, with_source
from shardkit.idmap.steps import Steps, Work

__all__ = ["IdMap", "checked_client", "judged", "lacking"]

_Result = TypeVar("_Result")


def checked_client(client: Any) -> Any:
    """Return a client that can be used; raises `ConfigurationError` for another."""
    encoder = getattr(client, "get_encoder", None)
    if encoder is None:
        raise ConfigurationError(
            f"{type(client).__name__} is no client of Redis",
            hint="give redis.Redis or redis.RedisCluster, or the same of redis.asyncio",
        )
    if encoder().decode_responses:
        raise ConfigurationError(
            "the client of an id map has decode_responses: blocks are bytes",
            hint="make it without decode_responses",
        )
    return client


def judged(commands: Sequence[Command], error: Exception) -> Exception:
    """Return what to raise when a round trip failed as a whole."""
    return wrong(error, None, is_change=any(map(is_change, commands)))


def lacking(commands: Sequence[Command], replies: Sequence[Any]) -> list[int]:
    """Return which commands have to be sent again with their script, which the server lacks.

    Raises:
        UnavailableError: a server of a cluster did not answer.
    """
    again = []
    for index, reply in enumerate(replies):
        if isinstance(reply, NoScript):
            again.append(index)
        elif isinstance(reply, LOST):
            raise judged([commands[index]], reply)
    return again


class IdMap:
    """A map from ids to ids in Redis, or on a Redis Cluster; thread-safe.

    Entries are never evicted or expired by this class, and Redis must not either: `check` says
    whether it may. What a deadline of `shardkit.deadline` leaves is looked at before each round
    trip; how long one may take is the client's `socket_timeout`: set it.

    Args:
        client: `redis.Redis` or `redis.RedisCluster`, without `decode_responses`.
        name: of the map; letters, digits, `_`, `.` and `-`.
        width: bytes of most values, 2 to 8: 3 for values below 16,777,215. Fixed when the map gets
            its first entry; larger values are taken as well and widen their blocks.

    Every method raises, besides what it names itself:
        EndpointUnavailableError: Redis does not answer; nothing was changed (retryable).
        OutcomeUnknownError: the answer to a change was lost; make it again, twice does no harm.
        DamagedMapError: what is stored is not what was written.
        IdMapMismatchError: the map was made with another width or format.
        InvalidMappingError: an id or a value is no int from 0 to 2^63 - 1.
        ConfigurationError: this client or login cannot be used.
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

    def key(self, id: int) -> bytes:  # noqa: A002  the glossary's word
        """Return the name of the key that an id's block is under; opens nothing."""
        return self._steps.key(self.layout.place(id)[0])

    def get(self, id: int) -> int | None:  # noqa: A002  the glossary's word
        """Return the value of an id, or None when it has none: one round trip."""
        return self._run(self._steps.reading(self._steps.get(id)))

    def get_many(self, ids: Iterable[int]) -> dict[int, int]:
        """Return the values of ids; those without one are left out.

        One round trip to each server for ids of up to 4,096 different rows of 64.
        """
        return self._run(self._steps.reading(self._steps.get_many(ids)))

    def set(self, id: int, value: int) -> None:  # noqa: A002  the glossary's word
        """Give an id a value, in place of one it may have."""
        self.set_many({id: value})

    def set_many(self, entries: Mapping[int, int]) -> None:
        """Give ids values: all that share a block at once, blocks one after the other.

        Raises:
            OverloadedError: others changed a block over and over (retryable).
        """
        for value in entries.values():
            self.layout.cell(value)
        self._change(entries)

    def delete(self, id: int) -> bool:  # noqa: A002  the glossary's word
        """Take an id's value away; return whether it had one."""
        return bool(self._change({id: None}))

    def delete_many(self, ids: Iterable[int]) -> int:
        """Take values away; return how many there were."""
        return len(self._change(dict.fromkeys(ids)))

    def load(
        self,
        entries: Iterable[tuple[int, int]],
        *,
        progress: Callable[[Loaded], object] | None = None,
    ) -> Loaded:
        """Store many entries, as whole blocks; what is there already stays or is overwritten.

        Beside others that read and write, and again after an interruption: nothing is lost or
        doubled. Holds some 32 blocks in memory, however many entries there are.

        Args:
            entries: pairs of id and value, sorted by id: in another order it works, slowly.
            progress: called after each round trip.
        """
        done = Loaded()
        for blocks, more in windows(self.layout, entries):
            size = self._run(self._steps.writing(self._steps.put(blocks)))
            done = Loaded(
                done.entries + more.entries,
                done.blocks + more.blocks,
                done.size_bytes + size,
                more.last_id,
            )
            if progress is not None:
                progress(done)
        return done

    def check(self, *, progress: Callable[[Found], object] | None = None) -> Found:
        """Read the whole map and compare every row with its check; beside others that use it.

        Args:
            progress: called after each round trip, with what was found so far.
        """
        scan = Scan(self._steps)
        self._run(self._steps.known())
        try:
            scan.policies(_infos(self._client.info("memory")))
            for work in scan.batches(self._client.scan_iter(match=scan.pattern, count=1000)):
                self._run(work)
                if progress is not None:
                    progress(scan.found)
        except FAILURES as error:
            raise wrong(error, None) from error
        return scan.found

    def _change(self, changes: Mapping[int, int | None]) -> dict[int, int]:
        return self._run(self._steps.writing(self._steps.change(changes)))

    def _run(self, work: Work[_Result]) -> _Result:
        try:
            commands = next(work)
            while True:
                commands = work.send(self._exchange(commands))
        except StopIteration as end:
            result: _Result = end.value
            return result

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        deadlines.check("the id map")
        try:
            replies = self._sent(commands)
            if again := lacking(commands, replies):
                whole = self._sent([with_source(commands[index]) for index in again])
                for index, reply in zip(again, whole, strict=True):
                    replies[index] = reply
        except FAILURES as error:
            raise judged(commands, error) from error
        return replies

    def _sent(self, commands: Sequence[Command]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [self._client.execute_command(*commands[0])]
            except redis_errors.ResponseError as error:
                return [error]
        pipeline: Any = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(pipeline.execute(raise_on_error=False))


def _infos(reply: Any) -> Sequence[Any]:
    """Return what each server says: a cluster answers by server."""
    return [reply] if "maxmemory_policy" in reply else [*reply.values()]
