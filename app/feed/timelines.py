"""Timelines in Redis: what was pushed to whom. Rebuilt from databases whenever it is lost.

`Timelines` is for the relay, which pushes, `AsyncTimelines` for servers, which read. Of somebody
without a timeline nothing is kept: pushes to them do nothing, so who does not look for `LIFE` costs
nothing. No command is repeated, and none waits longer than `PATIENCE`.

A Redis may come back with the data of an earlier moment, which would lack what was pushed since.
So names have the `run_id` of the server in them: of another life there is no timeline. A
connection learns it when it is made; an answer counts if no connection has learnt another since
its name was made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from redis import Redis, exceptions
from redis import asyncio as async_redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.feed.rings import (
    ADD,
    COVER,
    FILL,
    HOLD,
    REMOVE,
    Timeline,
    claim,
    decoded,
    encoded,
    packed,
)

__all__ = ["LIFE", "AsyncTimelines", "SilentError", "Timelines"]

LIFE: Final = 7 * 86_400
"""Seconds for which a timeline is kept that nobody reads. Source: Mastodon drops feeds after
seven days, issue 7354 (app.md, section 3)."""

BUILDING: Final = 30
"""Seconds that building one may take, until somebody else begins anew."""

PATIENCE: Final = 0.25
"""Seconds a command may take; Redis answers in a tenth of a millisecond."""

ALONE: Final = 1.0
"""Seconds for which a Redis is left alone that did not answer."""

BATCH: Final = 500
"""Timelines of one call of the script: it takes about a millisecond, others wait for it."""

PIPELINE: Final = 20

LOOK: Final = 200
"""Keys looked at in one call."""

FEW: Final = 10
"""Timelines that one call of a script looks through: up to nine thousand slots."""


class SilentError(Exception):
    """Redis does not answer; timelines are read from databases until it does."""


def _some(found: Iterable[Any], n: int) -> Iterator[list[Any]]:
    """Yield what is found, up to `n` at a time."""
    iterator = iter(found)
    while some := list(islice(iterator, n)):
        yield some


class _Life:
    """The `run_id` of the server, as connections learn it."""

    def __init__(self) -> None:
        self.now = ""

    def learn(self, info: Any) -> None:
        """Take what INFO says."""
        text = info.decode() if isinstance(info, bytes) else str(info)
        line = next(each for each in text.split() if each.startswith("run_id:"))
        self.now = line.removeprefix("run_id:")[:12]

    def key(self, user_id: int) -> str:
        return f"tl:{self.now}:{user_id}"


_FAILED: Final = (exceptions.RedisError, OSError, TimeoutError)


class Timelines:
    """Timelines as the relay pushes to them, for threads.

    Args:
        url: of the Redis.
        patience: seconds a command may take.
    """

    def __init__(self, url: str, *, patience: float = 5.0) -> None:
        self.life = _Life()
        self.redis = Redis.from_url(
            url,
            socket_timeout=patience,
            socket_connect_timeout=patience,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._connected,
        )
        self._sha = hashlib.sha1(ADD.encode(), usedforsecurity=False).hexdigest()
        self._remove = self.redis.register_script(REMOVE)

    def _connected(self, connection: Any) -> None:
        connection.on_connect()
        connection.send_command("INFO", "server")
        self.life.learn(connection.read_response())

    def push(self, user_ids: Sequence[int], photo_ids: Sequence[int]) -> int:
        """Add photos to the timelines there are of some people; return how many entries.

        Raises:
            SilentError: Redis does not answer; some may have them, and may be given them again.
        """
        try:
            self.redis.ping()  # the life is known, and this connection is of it
            life, n = self.life.now, 0
            values = packed(photo_ids)
            prefix = f"tl:{life}:".encode()
            calls = [user_ids[at : at + BATCH] for at in range(0, len(user_ids), BATCH)]
            for at in range(0, len(calls), PIPELINE):
                some = [
                    [b"%b%d" % (prefix, each) for each in call] for call in calls[at:][:PIPELINE]
                ]
                n += sum(self._pushed(some, values))
            if life != self.life.now:
                raise SilentError("Redis began a new life meanwhile")
        except _FAILED as error:
            raise SilentError(str(error)) from error
        return n

    def remove(self, photo_ids: Sequence[int]) -> int:
        """Remove photos from every timeline there is; return how many entries there were.

        For accounts that end; a photo that is deleted is left out by readers. Looks at all keys,
        a few at a time, and asks for a script only where there is something to remove.

        Raises:
            SilentError: Redis does not answer; some timelines still have them.
        """
        wanted, gone, n = set(photo_ids), packed(photo_ids), 0
        try:
            for keys in _some(self.redis.scan_iter("tl:*", count=LOOK), LOOK):
                rings: Any = self.redis.mget(keys)
                hit = [
                    key
                    for key, ring in zip(keys, rings, strict=True)
                    if (found := decoded(ring)) is not None and wanted.intersection(found.ids)
                ]
                for at in range(0, len(hit), FEW):
                    n += self._remove(hit[at : at + FEW], gone)
        except _FAILED as error:
            raise SilentError(str(error)) from error
        return n

    def forget(self, user_id: int) -> None:
        """Remove the timeline of somebody, of every life of the server.

        Raises:
            SilentError: Redis does not answer.
        """
        try:
            self.redis.ping()
            self.redis.delete(self.life.key(user_id))
            for key in self.redis.scan_iter(f"tl:*:{user_id}", count=LOOK):
                self.redis.delete(key)
        except _FAILED as error:
            raise SilentError(str(error)) from error

    def _pushed(self, calls: Sequence[Sequence[bytes]], values: Sequence[bytes]) -> list[int]:
        """Run the script on some lists of keys, in one round trip; load it where it lacks."""
        pipeline = self.redis.pipeline(transaction=False)
        for keys in calls:
            pipeline.evalsha(self._sha, len(keys), *keys, *values)
        try:
            return list(pipeline.execute())
        except exceptions.NoScriptError:
            self.redis.script_load(ADD)
            return self._pushed(calls, values)

    def close(self) -> None:
        """Close every connection."""
        self.redis.close()


class AsyncTimelines:
    """Timelines as servers read them.

    Args:
        url: of the Redis.
        patience: seconds a command may take.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        self.life = _Life()
        self.redis = async_redis.Redis.from_url(
            url,
            socket_timeout=patience,
            socket_connect_timeout=patience,
            retry=AsyncRetry(NoBackoff(), 0),
            redis_connect_func=self._connected,
        )
        self._cover = self.redis.register_script(COVER)
        self._hold = self.redis.register_script(HOLD)
        self._fill = self.redis.register_script(FILL)
        self.silent_until = 0.0

    async def _connected(self, connection: Any) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        self.life.learn(await connection.read_response())

    async def read(self, user_id: int) -> Timeline | None:
        """Return somebody's timeline, and keep it for another `LIFE`; None when there is none.

        Raises:
            SilentError: Redis does not answer.
        """
        async with _Asked(self) as key:
            value: Any = await self.redis.getex(key(user_id), ex=LIFE)
            timeline = decoded(value)
            if timeline is not None and timeline.is_building:  # its builder may be gone
                until = timeline.claimed_until
                await self._hold(keys=[key(user_id)], args=[timeline.mark, until])
        return timeline

    async def begin(self, user_id: int) -> Timeline | None:
        """Begin to build a timeline: pushes arrive in it. None when somebody else has begun.

        Raises:
            SilentError: Redis does not answer.
        """
        begun = claim(int(time.time()) + BUILDING)
        empty = encoded([], floor=begun.floor, covered=begun.covered)
        async with _Asked(self) as key:
            is_ours = await self.redis.set(key(user_id), empty, nx=True, ex=BUILDING)
        return begun if is_ours else None

    async def finish(
        self, user_id: int, photo_ids: Sequence[int], *, begun: Timeline, floor: int, covered: int
    ) -> bool:
        """Fill a timeline that was begun, keeping what was pushed meanwhile.

        Args:
            user_id: whose.
            photo_ids: newest first.
            begun: what `begin` returned; nothing is done when that has ended.
            floor: they are all there are above it.
            covered: time of the last follow whose photos are among them.

        Raises:
            SilentError: Redis does not answer.
        """
        ring = encoded(photo_ids, floor=floor, covered=covered)
        async with _Asked(self) as key:
            return bool(await self._fill(keys=[key(user_id)], args=[ring, begun.mark, LIFE]))

    async def cover(
        self, user_id: int, photo_ids: Sequence[int], *, seen: Timeline, covered: int
    ) -> bool:
        """Add the photos of people who are newly followed.

        Args:
            user_id: whose timeline.
            photo_ids: oldest first; all they have above the floor of `seen`.
            seen: the timeline as it was; nothing is done when its mark is another by now.
            covered: time of the last follow whose photos are among them.

        Raises:
            SilentError: Redis does not answer.
        """
        async with _Asked(self) as key:
            values = [seen.mark, covered.to_bytes(8, "big"), *packed(photo_ids)]
            return bool(await self._cover(keys=[key(user_id)], args=values))

    async def forget(self, user_id: int) -> None:
        """Remove a timeline; it is built again when it is asked for.

        Raises:
            SilentError: Redis does not answer.
        """
        async with _Asked(self) as key:
            await self.redis.delete(key(user_id))

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()


class _Asked:
    """Some commands about timelines of one life of the server; gives what names them."""

    def __init__(self, timelines: AsyncTimelines) -> None:
        self._timelines = timelines
        self._life = ""

    async def __aenter__(self) -> Callable[[int], str]:
        owner = self._timelines
        if time.monotonic() < owner.silent_until:
            raise SilentError("Redis did not answer a moment ago")
        if not owner.life.now:
            try:
                await owner.redis.ping()
            except _FAILED as error:
                raise self._silent(error) from error
        self._life = owner.life.now
        return owner.life.key

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _FAILED):
            raise self._silent(error) from error
        if error is None and self._life != self._timelines.life.now:
            raise SilentError("Redis began a new life meanwhile")

    def _silent(self, error: BaseException) -> SilentError:
        self._timelines.silent_until = time.monotonic() + ALONE
        return SilentError(str(error))
