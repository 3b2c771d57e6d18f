"""A stream of notifications: in order, without gaps, within bounds, whatever is published."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from app.accounts.schemas import PersonOut
from app.accounts.service import Viewer
from app.notifications import notices
from app.notifications.bus import Message
from app.notifications.hub import DEPTH, Hub, Subscription
from app.notifications.notices import NoticeKind, Withdrawal
from app.notifications.schemas import NotificationOut
from app.notifications.service import News
from app.notifications.stream import events

VIEWER = Viewer(1, "ben", "Ben", "", 2)
AT = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
ANA = PersonOut(id=7, username="ana", display_name="Ana")


def item(seq: int) -> NotificationOut:
    return NotificationOut(
        seq=seq, kind=NoticeKind.LIKE, actor=ANA, photo_id=1, comment_id=None, created_at=AT
    )


@dataclass
class Box:
    """An inbox in memory, with the two reads of the service."""

    given: list[int] = field(default_factory=list)
    last: int = 0
    reads: int = 0

    def add(self, *, withdrawn: bool = False) -> Message:
        self.last += 1
        if not withdrawn:
            self.given.append(self.last)
        return Message(1, self.last, item(self.last).model_dump_json())

    async def newest(self, user_id: int) -> int:
        return self.last

    async def since(self, user_id: int, seq: int, n: int) -> News:
        self.reads += 1
        await asyncio.sleep(0)
        above = [each for each in self.given if each > seq]
        is_all = len(above) < n
        last = max([seq, *above[:n], self.last if is_all else 0])
        return News([item(each) for each in above[:n]], last, is_all)


@dataclass
class Client:
    """Reads a stream and notes the numbers that come."""

    stream: AsyncIterator[str]
    seen: list[int] = field(default_factory=list)

    async def until(self, seq: int) -> None:
        while not self.seen or self.seen[-1] < seq:
            text = await asyncio.wait_for(anext(self.stream), 20)
            if text.startswith("id: "):
                number, kind, data, *_ = text.split("\n")
                assert kind == "event: notification"
                assert json.loads(data.removeprefix("data: "))["seq"] == number.removeprefix("id: ")
                self.seen.append(int(number.removeprefix("id: ")))


def opened(hub: Hub, box: Box, last: int | None, **options: Any) -> Client:
    return Client(events(hub, cast("Any", box), VIEWER, last, **options))


def hub_without_servers() -> Hub:
    return Hub(cast("Any", None), None, lambda: AT)


async def begun(client: Client) -> None:
    assert (await anext(client.stream)).startswith("retry: ")


def test_a_client_hears_of_what_comes_once_and_in_order() -> None:
    async def run() -> None:
        hub, box = hub_without_servers(), Box()
        box.add()
        client = opened(hub, box, None)
        await begun(client)
        for _ in range(3):
            hub.tell(box.add())
        await client.until(4)
        assert (client.seen, box.reads) == ([2, 3, 4], 0)
        messages = [box.add() for _ in range(4)]
        for at in (2, 0, 0, 3, 1):  # published by relays in any order, some again
            hub.tell(messages[at])
        await client.until(8)
        assert client.seen == [2, 3, 4, 5, 6, 7, 8]

    asyncio.run(run())


def test_what_was_missed_and_what_was_withdrawn_is_no_gap() -> None:
    async def run() -> None:
        hub, box = hub_without_servers(), Box()
        client = opened(hub, box, None)
        await begun(client)
        box.add()  # its message was lost
        box.add(withdrawn=True)
        hub.tell(box.add())
        await client.until(3)
        assert client.seen == [1, 3]

    asyncio.run(run())


@pytest.mark.parametrize(("last", "seen"), [(0, [1, 2, 3]), (2, [3]), (3, []), (99, [])])
def test_a_client_goes_on_where_it_was(last: int, seen: list[int]) -> None:
    async def run() -> None:
        hub, box = hub_without_servers(), Box()
        for _ in range(3):
            box.add()
        client = opened(hub, box, last)
        await begun(client)
        hub.tell(box.add())
        await client.until(4)
        assert client.seen == [*seen, 4]

    asyncio.run(run())


def test_a_client_that_does_not_read_takes_no_memory_and_loses_nothing() -> None:
    async def run() -> None:
        hub, box = hub_without_servers(), Box()
        client = opened(hub, box, None)
        await begun(client)
        for _ in range(20 * DEPTH):
            hub.tell(box.add())
        await client.until(20 * DEPTH)
        assert client.seen == list(range(1, 20 * DEPTH + 1))
        assert box.reads == -(-20 * DEPTH // 100)

    asyncio.run(run())


def test_a_queue_is_bounded() -> None:
    subscription = Subscription(1, 2, depth=3)
    for seq in range(1, 4):
        subscription.offer(Message(1, seq, ""))
    behind = [subscription.is_behind]
    for seq in (4, 5):
        subscription.offer(Message(1, seq, ""))
        behind.append(subscription.is_behind)
    assert behind == [False, True, True]
    assert list(subscription.taken()) == []


def test_a_stream_shows_life_and_ends_with_the_server() -> None:
    async def run() -> None:
        hub, box = hub_without_servers(), Box()
        client = opened(hub, box, None, heartbeat=0.0)
        await begun(client)
        assert [await anext(client.stream) for _ in range(2)] == [": still here\n\n"] * 2
        assert len(hub) == 1
        await hub.stop()
        assert [text async for text in client.stream] == []
        assert len(hub) == 0

    asyncio.run(run())


def test_who_is_told_of_a_comment_and_why() -> None:
    payload = {
        "photo_id": "10",
        "comment_id": "20",
        "author_id": "1",
        "told": {"owner": "2", "reply": "3"},
        "mentions": ["two", "three", "four", "one", "nobody"],
    }
    people = {"one": 1, "two": 2, "three": 3, "four": 4}
    found = notices.of_comment(payload, AT, people)
    assert [(each.user_id, each.kind) for each in found] == [
        (2, NoticeKind.MENTION),
        (3, NoticeKind.REPLY),
        (4, NoticeKind.MENTION),
    ]
    assert len({each.source for each in found}) == 1


def test_who_is_told_of_a_like() -> None:
    payload = {"photo_id": "10", "owner_id": "2", "user_id": "1", "liked": True}
    given = notices.of_like(payload, AT)
    taken = notices.of_like({**payload, "liked": False}, AT)
    assert isinstance(given, notices.Notice)
    assert isinstance(taken, Withdrawal)
    assert (given.user_id, given.source) == (taken.user_id, taken.source)
    assert notices.of_like({**payload, "user_id": "2"}, AT) is None
