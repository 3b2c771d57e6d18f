"""How soon a notification reaches an open stream: `python -m benchmarks notifications`.

1,000 people listen, each with a stream of Server-Sent Events of one server process. Some like one
photo after the other, at a steady pace, over HTTP. Each like goes all the way: its transaction with
the event in the outbox, the relay in another process, the inbox of the owner on the owner's shard,
Redis, the hub of the server, the stream. The clock runs from the answer to the like to the arrival
of the event in the listener's socket; also from the request, which includes the like.

The control is how late a sleep of the measuring process ends meanwhile. The peer is the same
service without Redis, whose hub asks the inboxes twice a second.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import json
import os
import re
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from app.accounts.models import LoginSession, User
from app.photos.models import Photo
from app.run import complete
from benchmarks.measure import report, servers
from shardkit import Cluster
from shardkit.config import load
from shardkit.ops import migrate

__all__ = ["main"]

STREAMS = 1000
ACTORS = 8
PACE = 0.05
"""Seconds between two likes."""

PATIENCE = 180.0
TRY_AGAIN = 503
_FOLDER = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody who is logged in, with a photo.

    Attributes:
        token: of the log-in.
        photo_id: the photo.
    """

    token: str
    photo_id: int


@dataclass
class Arrivals:
    """When events arrived, by photo; monotonic seconds."""

    at: dict[int, float] = field(default_factory=dict)
    open: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, n_open: int = 0, n_arrived: int = 0) -> None:
        """Wait until so many streams are open and so many events are there."""
        async with asyncio.timeout(PATIENCE):
            while self.open < n_open or len(self.at) < n_arrived:
                self.changed.clear()
                await self.changed.wait()


def main(*, as_json: bool = False, quick: bool = False) -> None:
    n_likes = 200 if quick else 900
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with servers(redis=True, memcached=True) as local:
        complete(local.config_path)
        _, topology = load(local.config_path)
        outcome = migrate.apply(
            topology,
            migrate.load_revisions("app:migrations", folder=Path()),
            rules=migrate.load_rules("app.tables:Base"),
            cached=migrate.load_cached("app.tables:Base"),
        )
        if outcome.error:
            raise outcome.error
        with Cluster.from_file(local.config_path) as cluster, ThreadPoolExecutor(ACTORS) as pool:
            listeners = list(pool.map(lambda _: _member(cluster), range(STREAMS)))
            everybody = {
                arm: [_member(cluster) for _ in range(ACTORS)] for arm in ("redis", "looking")
            }
        figures: dict[str, float] = {}
        medians: dict[str, float] = {}
        for arm, config in (
            ("redis", local.config_path),
            ("looking", _without_redis(local.config_path)),
        ):
            with _service(config) as (url, pid):
                before = _resident(pid)
                wanted = listeners[: n_likes if arm == "redis" else n_likes // 3]
                answered, asked, lateness, memory = asyncio.run(
                    _measured(url, pid, listeners, everybody[arm], wanted)
                )
            medians[f"{arm}: from the answer"] = statistics.median(answered)
            medians[f"{arm}: from the request"] = statistics.median(asked)
            figures |= {
                f"{arm}_p50_ms": 1e3 * statistics.median(answered),
                f"{arm}_p99_ms": 1e3 * _percentile(answered, 0.99),
                f"{arm}_max_ms": 1e3 * max(answered),
                f"{arm}_p99_from_request_ms": 1e3 * _percentile(asked, 0.99),
            }
            if arm == "redis":
                figures["streams"] = STREAMS
                figures["events"] = len(answered)
                figures["control_p99_ms"] = 1e3 * _percentile(lateness, 0.99)
                figures["kib_per_stream"] = (memory - before) / STREAMS / 1024
    report(
        "notifications",
        figures,
        peers=["the hub asks the inboxes every 0.5 s"],
        medians=medians,
        targets={"redis_p99_ms": "≤ 100"},
        as_json=as_json,
    )


async def _measured(
    url: str,
    pid: int,
    listeners: Sequence[Member],
    actors: Sequence[Member],
    wanted: Sequence[Member],
) -> tuple[list[float], list[float], list[float], int]:
    """Open the streams, like photos, and return latencies, the control and the server's memory."""
    arrivals = Arrivals()
    host, _, port = url.removeprefix("http://").partition(":")
    gate = asyncio.Semaphore(20)
    tasks = [
        asyncio.create_task(_listen(host, int(port), member, arrivals, gate))
        for member in listeners
    ]
    await arrivals.until(n_open=len(listeners))
    memory = _resident(pid)
    asked: dict[int, float] = {}
    answered: dict[int, float] = {}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:

        async def like(member: Member, actor: Member) -> None:
            path = f"/api/v1/photos/{member.photo_id}/like"
            bearer = {"authorization": f"Bearer {actor.token}"}
            asked[member.photo_id] = time.perf_counter()
            while (answer := await client.put(path, headers=bearer)).status_code == TRY_AGAIN:
                asked[member.photo_id] = time.perf_counter()
            answer.raise_for_status()
            answered[member.photo_id] = time.perf_counter()

        # The first ones warm up connections, plans and caches on all sides.
        for n in range(20):
            await like(listeners[-1 - n], actors[n % len(actors)])
        await arrivals.until(n_arrived=20)
        control = asyncio.create_task(_late())
        likes = []
        for n, member in enumerate(wanted):
            likes.append(asyncio.create_task(like(member, actors[n % len(actors)])))
            await asyncio.sleep(PACE)
        await asyncio.gather(*likes)
        await arrivals.until(n_arrived=20 + len(wanted))
        control.cancel()
        lateness = await control
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ids = [member.photo_id for member in wanted]
    return (
        [max(0.0, arrivals.at[each] - answered[each]) for each in ids],
        [arrivals.at[each] - asked[each] for each in ids],
        lateness,
        memory,
    )


async def _late() -> list[float]:
    """Return by how much sleeps of 5 ms were too long: how busy the machine is."""
    found: list[float] = []
    with suppress(asyncio.CancelledError):
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            found.append(time.perf_counter() - began - 0.005)
    return found


async def _listen(
    host: str, port: int, member: Member, arrivals: Arrivals, gate: asyncio.Semaphore
) -> None:
    asking = (
        f"GET /api/v1/me/notifications/stream HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Authorization: Bearer {member.token}\r\nConnection: close\r\n\r\n"
    )
    async with gate:
        while True:  # a machine that is busy may refuse: as clients do, again
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(asking.encode())
            while (line := await reader.readline()) and not line.startswith(b"retry:"):
                pass
            if line:
                break
        arrivals.open += 1
        arrivals.changed.set()
    try:
        while line := await reader.readline():
            if line.startswith(b"data: "):
                arrivals.at[int(json.loads(line[6:])["photo_id"])] = time.perf_counter()
                arrivals.changed.set()
    finally:
        writer.close()


def _member(cluster: Cluster) -> Member:
    """Sign somebody up without hashing a password, log them in and give them a photo."""
    now = dt.datetime.now(dt.UTC)
    name, secret = f"m{secrets.token_hex(8)}", secrets.token_hex(32)
    user = User(username=name, display_name=name, bio="", password_hash="", created_at=now)
    with cluster.writer() as session:
        session.add(user)
        session.flush()
        login = LoginSession(
            user_id=user.id,
            token_hash=hashlib.sha256(secret.encode()).digest(),
            created_at=now,
            last_seen_at=now,
            expires_at=now + dt.timedelta(days=1),
        )
        photo = Photo(
            owner_id=user.id,
            caption="",
            width=1,
            height=1,
            blob_key=secrets.token_hex(16),
            created_at=now,
        )
        session.add_all([login, photo])
        session.flush()
        member = Member(f"{login.id}.{secret}", photo.id)
        session.commit()
        return member


@contextmanager
def _service(config: Path) -> Iterator[tuple[str, int]]:
    """Run a server and a relay; yield the server's address and process id."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as media:
        environment["APP_MEDIA"] = media

        def started(module: str, *options: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", module, "--config", str(config), *options]
            process = subprocess.Popen(
                command, cwd=_FOLDER, env=environment, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGKILL)
            return process

        started("app.workers")
        server = started("app", "--port", "0")
        assert server.stdout is not None
        found = re.search(r"http://[^/]+", server.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        yield found[0], server.pid


def _without_redis(config: Path) -> Path:
    """Return a copy of a configuration in which nobody is told of a Redis."""
    text = re.sub(r"(?m)^redis = .*\n", "", config.read_text("utf-8"))
    copy = config.with_name("without_redis.toml")
    copy.touch(0o600)
    copy.write_text(text, "utf-8")
    return copy


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
