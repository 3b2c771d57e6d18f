"""The open streams of one server, and what wakes them.

Each stream has a bounded queue. What comes over Redis is put into the queues of whom it is for; a
queue that is full is emptied and marked as behind, and its stream reads the inbox instead: memory
is bounded, and nothing is lost. Every few seconds, and all the time while Redis is away, the hub
asks the inboxes of everybody who listens for their highest number, and marks who missed something.
It also looks for the log-ins of all streams, and ends those that have none any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from typing import Final, Self

from redis.exceptions import RedisError
from sqlalchemy import select

from app.accounts.models import LoginSession
from app.clock import Clock
from app.database import TIMEOUT
from app.notifications.bus import Message, listen
from app.notifications.models import Inbox
from shardkit import AsyncCluster, deadline
from shardkit.errors import ShardkitError

__all__ = ["Hub", "Subscription", "opened"]

log = logging.getLogger("app")

DEPTH: Final = 32
"""Messages that wait for one client; then it is behind, and reads its inbox."""

CALM: Final = 5.0
"""Seconds between two looks at the inboxes while Redis tells of what comes."""

ALONE: Final = 0.5
"""The same while it does not."""

CHECKED: Final = 5.0
"""Seconds between two checks of the log-ins, if it looks that often."""

_AT_ONCE: Final = 250
"""Streams that one statement is about. Between two of them whatever has come is sent: statements
about a thousand held the loop for 20 to 40 ms."""


class Subscription:
    """What one stream waits for.

    Attributes:
        user_id: whose.
        login_id: the log-in it was opened with; it ends with that.
        seq: up to which the stream has sent; it keeps this.
        is_behind: whether the inbox has to be read.
        is_closed: whether there will be nothing more.
    """

    def __init__(self, user_id: int, login_id: int, depth: int = DEPTH) -> None:
        self.user_id = user_id
        self.login_id = login_id
        self.seq = 0
        self.is_behind = False
        self.is_closed = False
        self._depth = depth
        self._messages: deque[Message] = deque()
        self._woken = asyncio.Event()

    def offer(self, message: Message) -> None:
        """Take a message, or remember that there are too many."""
        if self.is_behind:
            return
        if len(self._messages) >= self._depth:
            self.fall_behind()
            return
        self._messages.append(message)
        self._woken.set()

    def fall_behind(self) -> None:
        """Have the stream read the inbox; what waits is in there."""
        self._messages.clear()
        self.is_behind = True
        self._woken.set()

    def close(self) -> None:
        """End the stream."""
        self.is_closed = True
        self._woken.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until there is something to do; return False after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        is_woken = self._woken.is_set()
        self._woken.clear()
        return is_woken

    def taken(self) -> Iterator[Message]:
        """Take the messages that wait, one after the other."""
        while self._messages:
            yield self._messages.popleft()


class Hub:
    """The open streams.

    Args:
        cluster: where the inboxes are.
        redis_url: where servers are told of what comes; None for nowhere.
        clock: the time.
    """

    def __init__(self, cluster: AsyncCluster, redis_url: str | None, clock: Clock) -> None:
        self._cluster = cluster
        self._redis_url = redis_url
        self._clock = clock
        self._next_check = 0.0
        self._open: dict[int, set[Subscription]] = defaultdict(set)
        self._hears = False
        self._doubt = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        """Return how many streams are open."""
        return sum(map(len, self._open.values()))

    @contextmanager
    def subscribed(self, user_id: int, login_id: int) -> Iterator[Subscription]:
        """Listen to what comes for a person, for the time of a `with` block."""
        subscription = Subscription(user_id, login_id)
        self._open[user_id].add(subscription)
        try:
            yield subscription
        finally:
            self._open[user_id].discard(subscription)
            if not self._open[user_id]:
                del self._open[user_id]

    def start(self) -> Self:
        """Begin to listen."""
        self._tasks = [asyncio.create_task(self._look())]
        if self._redis_url is not None:
            self._tasks.append(asyncio.create_task(self._listen(self._redis_url)))
        return self

    async def stop(self) -> None:
        """End every stream, and stop listening."""
        for subscription in self._everybody():
            subscription.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def tell(self, message: Message) -> None:
        """Hand a message to the streams of whom it is for."""
        for subscription in self._open.get(message.user_id, ()):
            subscription.offer(message)

    async def look(self) -> None:
        """Ask the inboxes of everybody who listens, and mark who has missed something.

        Raises:
            ShardkitError: a server does not answer; those who are there are told later.
        """
        people = iter(list(self._open))
        while some := list(islice(people, _AT_ONCE)):
            statement = select(Inbox.user_id, Inbox.last_seq).where(Inbox.user_id.in_(some))
            with deadline(TIMEOUT):
                async with self._cluster.writer() as session:
                    rows = (await session.execute(statement)).all()
            for user_id, last_seq in rows:
                for subscription in self._open.get(user_id, ()):
                    if subscription.seq < last_seq:
                        subscription.fall_behind()

    async def check(self) -> None:
        """End the streams whose log-in has ended; one statement a server for all of them.

        Raises:
            ShardkitError: a server does not answer; what is open stays so for now.
        """
        streams = iter(self._everybody())
        while some := list(islice(streams, _AT_ONCE)):
            statement = select(LoginSession.id).where(
                LoginSession.id.in_({each.login_id for each in some}),
                LoginSession.expires_at > self._clock(),
            )
            with deadline(TIMEOUT):
                async with self._cluster.writer() as session:
                    good = set(await session.scalars(statement))
            for subscription in some:
                if subscription.login_id not in good:
                    subscription.close()

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALM if self._hears else ALONE):
                    await self._doubt.wait()
            self._doubt.clear()
            try:
                await self.look()
                if time.monotonic() >= self._next_check:
                    await self.check()
                    self._next_check = time.monotonic() + CHECKED
            except ShardkitError as error:
                log.warning("inboxes were not asked: %s", error)
            except Exception:
                log.exception("inboxes were not asked")

    async def _listen(self, url: str) -> None:
        while True:
            try:
                async for message in listen(url):
                    if message is None:  # what came before that was missed
                        self._hears = True
                        self._doubt.set()
                    else:
                        self.tell(message)
            except (RedisError, OSError) as error:
                log.warning("Redis tells nothing of notifications: %s", error)
            self._hears = False
            self._doubt.set()
            await asyncio.sleep(ALONE)

    def _everybody(self) -> Sequence[Subscription]:
        return [each for some in self._open.values() for each in some]


@asynccontextmanager
async def opened(cluster: AsyncCluster, redis_url: str | None, clock: Clock) -> AsyncIterator[Hub]:
    """Run a hub for the time of a `with` block."""
    hub = Hub(cluster, redis_url, clock).start()
    try:
        yield hub
    finally:
        await hub.stop()
