"""Token buckets: in Redis, by one script in one round trip, or in the process where there is none.

A bucket is one number, the time at which it will be full again: what is missing is that time from
now, counted in tokens. Source: the generic cell rate algorithm, ITU-T I.371 (2004), annex A, as a
"virtual scheduling" bucket. Time is that of Redis, so the clocks of servers do not matter; a full
bucket is no key at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.limits.rates import Rate, Taken

__all__ = ["Buckets", "LocalBuckets", "RedisBuckets", "SilentError"]

PATIENCE: Final = 0.25
"""Seconds a call may take; Redis answers in a tenth of a millisecond."""

ALONE: Final = 1.0
"""Seconds for which a Redis is left alone that did not answer: not every request waits for it."""

MOST: Final = 100_000
"""Buckets of one process without Redis; beyond that full ones are forgotten."""

TAKE: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local n, step, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local full = tonumber(redis.call('GET', KEYS[1]) or now)
if full < now then full = now end
local after = full + step * cost
if after < now then after = now end
local wait = after - now - n * step
if wait > 0 then
    return {0, math.floor((n * step - (full - now)) / step), wait, full - now}
end
if after > now then
    redis.call('SET', KEYS[1], string.format('%.0f', after), 'PX',
        math.ceil((after - now) / 1000))
else
    redis.call('DEL', KEYS[1])
end
return {1, math.floor((n * step - (after - now)) / step), 0, after - now}
"""
"""Takes tokens, or gives some back. KEYS: the bucket; ARGV: tokens of a full one, microseconds of
one token, tokens to take (negative to give back). Returns whether they were there, tokens left,
microseconds until they are, microseconds until it is full. Numbers are exact: times in
microseconds stay below 2^53 until the year 2255."""


class SilentError(Exception):
    """Redis does not answer; nobody knows how full a bucket is."""


class Buckets(Protocol):
    """Where tokens are."""

    async def take(self, key: str, rate: Rate, cost: int = 1) -> Taken:
        """Take tokens, if there are so many; a negative number gives some back.

        Raises:
            SilentError: nobody knows (retryable).
        """

    async def close(self) -> None:
        """Let go of connections."""


class RedisBuckets:
    """Buckets that all server processes share.

    Args:
        url: of the Redis.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        self._redis = Redis.from_url(
            url,
            socket_timeout=patience,
            socket_connect_timeout=patience,
            retry=Retry(NoBackoff(), 0),
        )
        self._take = self._redis.register_script(TAKE)
        self._silent_until = 0.0

    async def take(self, key: str, rate: Rate, cost: int = 1) -> Taken:
        """Take tokens; see `Buckets.take`."""
        if time.monotonic() < self._silent_until:
            raise SilentError("Redis did not answer a moment ago")
        arguments = [rate.n, rate.microseconds, cost]
        try:
            found: Any = await self._take(keys=[f"limit:{key}"], args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._silent_until = time.monotonic() + ALONE
            raise SilentError(str(error)) from error
        allowed, left, wait, reset = found
        return Taken(bool(allowed), int(left), wait / 1e6, reset / 1e6)

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()


class LocalBuckets:
    """Buckets of one process, where there is no Redis: each process has its own.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, int] = {}

    async def take(self, key: str, rate: Rate, cost: int = 1) -> Taken:
        """Take tokens; see `Buckets.take`."""
        now = int(self._clock() * 1e6)
        step, size = rate.microseconds, rate.n * rate.microseconds
        full = max(now, self._full_at.get(key, now))
        after = max(now, full + step * cost)
        if (wait := after - now - size) > 0:
            return Taken(False, (size - (full - now)) // step, wait / 1e6, (full - now) / 1e6)  # noqa: FBT003 - a record
        if len(self._full_at) >= MOST:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[key] = after
        return Taken(True, (size - (after - now)) // step, 0.0, (after - now) / 1e6)  # noqa: FBT003 - a record

    async def close(self) -> None:
        """Nothing is open."""
