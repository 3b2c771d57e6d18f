"""Feeds: bytes of a timeline, deliveries, pages against fan-out on read, and pages over HTTP.

- *timeline_bytes_per_entry*: growth of Redis' `used_memory` for full timelines that were filled by
  pushes, names and all; beside it the same for a ZSET and for a LIST.
- *deliveries_vs_zset*: photos pushed to full timelines of 500 followers, against ZADD with
  ZREMRANGEBYRANK in pipelines of as many, and against the same by a script: CPU of client and
  server, which is what a delivery costs on a machine that is busy.
- *read_vs_fanout_on_read*: finding the photos of a page of somebody who follows 1,000, against whom
  one follows and one statement per server over all of them: CPU of all processes, as above. Whom
  one follows has 200 photos each. Reading the rows that were found is the same in both;
  `photos_vs_fanout_on_read` has it in the first arm only, with checks of privacy and blocks.
  `page_vs_fanout_on_read` is the whole page, with owners and likes, without Redis and cache.
- *http_p99_ms*: pages of 20 over HTTP from a server process, an open loop at 30 % of what a closed
  loop reaches, timed from when each was due. `cpu_share` is what all processes of this benchmark
  take of the machine meanwhile; `cpu_of_machine` is what everybody takes.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from sqlalchemy import select

from app.accounts.service import Viewer
from app.clock import utc_now
from app.database import Database
from app.feed.building import Builder
from app.feed.cursors import Cursors
from app.feed.ranked import RankedFeed
from app.feed.rings import MOST, encoded
from app.feed.service import FeedService
from app.feed.timelines import AsyncTimelines, Timelines
from app.graph.models import Assoc, Kind
from app.photos.models import Photo
from app.run import complete
from benchmarks.measure import report
from benchmarks.socialworld import World, patient, world
from shardkit import AsyncCluster, ids
from shardkit.testing import wait_until

PEERS = ("ZSET, pipelined", "ZSET by a script", "LIST by a script", "fan-out on read")
TARGETS = {
    "timeline_bytes_per_entry": "≤ 11",
    "deliveries_vs_zset": "≥ 4",
    "read_vs_fanout_on_read": "≥ 10",
    "http_p99_ms": "≤ 50",
    "cpu_share": "≤ 0.6",
}

FOLLOWERS = 500
RUNS = 12
ENTRIES = 800
"""Of a ZSET or LIST. Source: what Mastodon and Twitter keep (app.md, section 3)."""

ZSET = """
for k = 1, #KEYS do
    redis.call('ZADD', KEYS[k], ARGV[1], ARGV[1])
    redis.call('ZREMRANGEBYRANK', KEYS[k], 0, -801)
end"""
LIST = """
for k = 1, #KEYS do
    if redis.call('LPUSHX', KEYS[k], ARGV[1]) > 0 then redis.call('LTRIM', KEYS[k], 0, 799) end
end"""


def main(*, as_json: bool, quick: bool = False) -> None:
    with world() as here:
        figures, medians = timelines(here.redis, rounds=15 if quick else 60)
        more, times = asyncio.run(pages(here, rounds=15 if quick else 60))
        figures |= more | over_http(here, seconds=6.0 if quick else 30.0)
    medians |= times
    report("feed", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


# -- Redis


def timelines(url: str, *, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return bytes per entry and ratios of deliveries, and seconds of one delivery."""
    client = Redis.from_url(url)
    push = Timelines(url)
    push.push([], [])  # it knows the server now
    users = list(range(1, FOLLOWERS + 1))
    photos = [ids.compose(n, n % 64, n % 1024) for n in range(1, 4 * MOST)]
    empty = encoded([], floor=0, covered=0)

    def rings() -> int:
        for user in users:
            client.set(push.life.key(user), empty)
        for at in range(0, MOST, 50):
            push.push(users, photos[at : min(at + 50, MOST)])
        return MOST * FOLLOWERS

    def zsets() -> int:
        for user in users:
            client.zadd(f"z:{user}", {str(photo): photo for photo in photos[:ENTRIES]})
        return ENTRIES * FOLLOWERS

    def lists() -> int:
        for user in users:
            client.rpush(f"l:{user}", *photos[:ENTRIES][::-1])
        return ENTRIES * FOLLOWERS

    sizes = {each.__name__: bytes_of(client, each) for each in (rings, zsets, lists)}
    news = iter(photos[MOST:])
    zset, listed = client.register_script(ZSET), client.register_script(LIST)

    def by_pipeline(photo: int) -> None:
        pipeline = client.pipeline(transaction=False)
        for user in users:
            pipeline.zadd(f"z:{user}", {str(photo): photo})
            pipeline.zremrangebyrank(f"z:{user}", 0, -ENTRIES - 1)
        pipeline.execute()

    arms: dict[str, Callable[[int], Any]] = {
        "ring": lambda photo: push.push(users, [photo]),
        "ZSET, pipelined": by_pipeline,
        "ZSET by a script": lambda photo: zset([f"z:{user}" for user in users], [photo]),
        "LIST by a script": lambda photo: listed([f"l:{user}" for user in users], [photo]),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        photo = next(news)
        for name, run in arms.items():
            started = cpu_of(client)
            run(photo)
            found[name].append((cpu_of(client) - started) / FOLLOWERS)
    medians = {name: statistics.median(some) for name, some in found.items()}
    push.close()
    client.close()
    return {
        "timeline_bytes_per_entry": sizes["rings"],
        "zset_bytes_per_entry": sizes["zsets"],
        "list_bytes_per_entry": sizes["lists"],
        "deliveries_vs_zset": medians["ZSET, pipelined"] / medians["ring"],
        "deliveries_vs_zset_by_script": medians["ZSET by a script"] / medians["ring"],
        "deliveries_vs_list_by_script": medians["LIST by a script"] / medians["ring"],
        "deliveries_per_second": 1 / medians["ring"],
    }, medians


def cpu_of(client: Any) -> float:
    """Return seconds of CPU of this process and of Redis: what others run here does not count."""
    info = client.info("cpu")
    return float(time.process_time() + info["used_cpu_user"] + info["used_cpu_sys"])


def bytes_of(client: Any, fill: Callable[[], int]) -> float:
    """Return bytes of Redis for each entry that was made."""
    before = client.info("memory")["used_memory"]
    n = fill()
    return float((client.info("memory")["used_memory"] - before) / n)


# -- pages


async def pages(here: World, *, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return how much quicker pages are than with one statement over all whom one follows."""
    me, *others = here.people(1_001)
    here.photos(others, 200)
    here.photos(here.people(1_000), 60)
    here.edges((me, other) for other in others)
    viewer = Viewer(me, "me", "me", "", 1)
    async with (
        AsyncCluster(here.topology, cache=here.cache) as cluster,
        AsyncCluster(here.topology) as plain,
    ):
        patient(cluster)
        opened = AsyncTimelines(here.redis, patience=5.0)
        builder = Builder(cluster, opened, 5000)
        fast = service(cluster, (opened, builder))
        slow = service(plain, None)
        first = await fast.home(viewer, None, 20)
        await builder.settled()
        follows = select(Assoc.id2).where(Assoc.id1 == me, Assoc.atype == int(Kind.FOLLOWS))

        async def fanned_out() -> list[int]:
            async with Database(plain, timeout=60.0).reader() as reader:
                owners = [me, *await reader.scalars(follows)]
                newest = select(Photo.id).where(Photo.owner_id.in_(owners))
                return list(await reader.scalars(newest.order_by(Photo.id.desc()).limit(20)))

        async def found_ids() -> list[int]:
            async with Database(cluster).reader() as reader:
                return (await fast.ids(reader, me, ids.MAX_ID, 20))[0]

        async def merged() -> list[int]:
            async with Database(cluster).reader() as reader:
                return [p.id for p in (await fast.photos(reader, me, ids.MAX_ID, 20))[0]]

        async def whole(feed: FeedService) -> list[int]:
            return [item.id for item in (await feed.home(viewer, None, 20)).items]

        expected = [item.id for item in first.items]
        arms: dict[str, Callable[[], Any]] = {
            "ids, merged": found_ids,
            "ids, fan-out on read": fanned_out,
            "photos, merged": merged,
            "page, merged": lambda: whole(fast),
            "page, fan-out on read": lambda: whole(slow),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        costs: dict[str, float] = dict.fromkeys(arms, 0.0)
        for run in arms.values():
            for _ in range(3):
                assert await run() == expected
        for _ in range(max(3, rounds // 5)):  # counting CPU costs some, so many runs at a time
            for name, run in arms.items():
                spent = own_cpu(here)
                for _ in range(RUNS):
                    started = time.perf_counter()
                    assert await run() == expected
                    times[name].append(time.perf_counter() - started)
                costs[name] += own_cpu(here) - spent
        await builder.close()
        await opened.close()
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "read_vs_fanout_on_read": costs["ids, fan-out on read"] / costs["ids, merged"],
        "photos_vs_fanout_on_read": costs["ids, fan-out on read"] / costs["photos, merged"],
        "page_vs_fanout_on_read": costs["page, fan-out on read"] / costs["page, merged"],
        "read_vs_fanout_on_read_wall": medians["ids, fan-out on read"] / medians["ids, merged"],
    }, medians


def service(cluster: AsyncCluster, timelines: tuple[AsyncTimelines, Builder] | None) -> FeedService:
    ranked = RankedFeed(cluster, utc_now)
    return FeedService(
        Database(cluster, timeout=60.0),
        utc_now,
        Cursors(),
        ranked,
        max_followees=5000,
        timelines=timelines,
    )


# -- HTTP


def over_http(here: World, *, seconds: float) -> dict[str, float]:
    """Return what pages over HTTP take, at a steady load."""
    complete(here.local.config_path)
    with serving(here.local.config_path) as url:
        people = [sign_up(url, f"reader{n}") for n in range(24)]
        others = here.people(200)
        here.photos(others, 8)
        pairs = [
            (me, others[(7 * n + at) % 200]) for n, (me, _) in enumerate(people) for at in range(80)
        ]
        here.edges(pairs)
        cookies = [cookie for _, cookie in people]
        return asyncio.run(loaded(here, url, cookies, seconds=seconds))


@contextmanager
def serving(config: Path) -> Any:
    """Run the application and its relay as processes."""
    log = config.parent / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "app", "--config", str(config), "--port", "0"], stdout=out
        )
        relay = subprocess.Popen([sys.executable, "-m", "app.workers", "--config", str(config)])
        try:
            wait_until(lambda: b"serving on" in log.read_bytes(), 60.0, "the server listens")
            text = log.read_text()
            yield text[text.index("http://") :].split()[0].rstrip("/")
        finally:
            for process in (server, relay):
                process.terminate()
                process.wait()


def sign_up(url: str, name: str) -> tuple[int, str]:
    body = {"username": name, "password": "a long enough sentence"}
    answer = httpx.post(f"{url}/api/v1/users", json=body, timeout=60).raise_for_status().json()
    return int(answer["user"]["id"]), answer["token"]


async def loaded(
    here: World, url: str, tokens: Sequence[str], *, seconds: float
) -> dict[str, float]:
    """Ask for pages, first as fast as it goes, then steadily."""
    host, port = url.removeprefix("http://").split(":")
    clients = [await Client.opened(host, int(port), token) for token in tokens]
    for client in clients:  # timelines are built, caches filled
        for _ in range(3):
            await client.page()
    await asyncio.sleep(1.0)
    closed = await closed_loop(clients[:4], seconds / 3)
    rate = 0.3 * closed
    before, all_before, began = own_cpu(here), machine_cpu(), time.perf_counter()
    took = await open_loop(clients, rate, seconds)
    wall = time.perf_counter() - began
    busy, total = (b - a for a, b in zip(all_before, machine_cpu(), strict=True))
    for client in clients:
        client.close()
    took.sort()
    return {
        "http_p50_ms": 1000 * took[len(took) // 2],
        "http_p99_ms": 1000 * took[int(len(took) * 0.99)],
        "pages_per_second": len(took) / wall,
        "pages_per_second_closed_loop": closed,
        "cpu_share": (own_cpu(here) - before) / (wall * (os.cpu_count() or 1)),
        "cpu_of_machine": busy / total,
    }


class Client:
    """One browser's connection: the least that HTTP needs, so that little time is its own."""

    def __init__(self, streams: Any, request: bytes) -> None:
        self._reader, self._writer = streams
        self._request = request
        self._lock = asyncio.Lock()

    @classmethod
    async def opened(cls, host: str, port: int, token: str) -> Client:
        """Connect."""
        lines = [
            "GET /api/v1/feed?limit=20 HTTP/1.1",
            f"Host: {host}",
            f"Authorization: Bearer {token}",
            "",
            "",
        ]
        streams = await asyncio.open_connection(host, port)
        return cls(streams, "\r\n".join(lines).encode())

    async def page(self) -> None:
        """Ask for a page and read it whole."""
        async with self._lock:
            self._writer.write(self._request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head[:200]
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await self._reader.readexactly(length)
            assert b'"partial":false' in body
            assert body.count(b'"reason"') == 20

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


async def closed_loop(clients: Sequence[Client], seconds: float) -> float:
    """Return pages a second when each client asks again as soon as it has its page."""
    until, n = time.perf_counter() + seconds, 0

    async def ask(client: Client) -> None:
        nonlocal n
        while time.perf_counter() < until:
            await client.page()
            n += 1

    await asyncio.gather(*map(ask, clients))
    return n / seconds


async def open_loop(clients: Sequence[Client], rate: float, seconds: float) -> list[float]:
    """Return seconds that each page took, from when it was due."""
    took: list[float] = []

    async def ask(client: Client, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await client.page()
        took.append(time.perf_counter() - due)

    began = time.perf_counter() + 0.1
    n = int(rate * seconds)
    await asyncio.gather(*(ask(clients[at % len(clients)], began + at / rate) for at in range(n)))
    return took


def own_cpu(here: World) -> float:
    """Return seconds of CPU that this process, the servers and all below them have taken."""
    roots = {os.getpid(), *(server.pid for server in here.local.servers)}
    parents: dict[int, int] = {}
    taken: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        taken[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_ours(pid: int) -> bool:
        while pid > 1:
            if pid in roots:
                return True
            pid = parents.get(pid, 0)
        return False

    return sum(seconds for pid, seconds in taken.items() if is_ours(pid))


def machine_cpu() -> tuple[float, float]:
    """Return ticks in which the machine was busy, and all ticks."""
    fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return float(sum(fields) - fields[3] - fields[4]), float(sum(fields))
