"""Processes are killed in the middle of their work; edges and counts are the truth afterwards."""

from __future__ import annotations

import datetime as dt
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import select

from app.accounts.models import User
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.photos.models import Comment
from app.repair import KINDS, run
from app.workers import relay_of
from shardkit import Cluster, all_shards
from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import PASSWORD, migrated

pytestmark = [pytest.mark.integration, pytest.mark.fault]

FOLDER = Path(__file__).parents[2]
PEOPLE = 5
ACTIONS = 30
KILL_EVERY = 35
"""Actions of everybody together between two kills."""


@pytest.fixture(scope="module")
def site(
    postgres_version: str,  # noqa: ARG001 - skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalCluster]:
    """A cluster on which no relay runs but those of the test."""
    with migrated(tmp_path_factory.mktemp("crashes") / "cluster") as local:
        yield local


@dataclass
class Processes:
    """The server and the relay, each killed and begun again now and then."""

    config: Path
    media: Path
    url: str = ""
    server: subprocess.Popen[str] | None = None
    relay: subprocess.Popen[str] | None = None
    kills: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start_server(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "APP_MEDIA": str(self.media)}
        command = [sys.executable, "-m", "app", "--config", str(self.config), "--port", "0"]
        self.server = subprocess.Popen(
            command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout is not None
        found = re.search(r"http://[^/]+", self.server.stdout.readline())
        assert found is not None
        self.url = found[0]

    def start_relay(self) -> None:
        command = [sys.executable, "-m", "app.workers", "--config", str(self.config)]
        self.relay = subprocess.Popen(command, cwd=FOLDER, text=True)

    def kill(self, turn: int) -> None:
        """Kill one of them, in turn, or both."""
        with self.lock:
            if turn % 3 != 1:
                end(self.relay)
                self.start_relay()
            if turn % 3 != 0:
                end(self.server)
                self.start_server()
            self.kills += 1


def end(process: subprocess.Popen[str] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def processes(site: LocalCluster, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(site.config_path, tmp_path / "media")
    made.start_server()
    made.start_relay()
    yield made
    end(made.server)
    end(made.relay)


def until_answered(
    processes: Processes, client: httpx.Client, verb: str, path: str, **body: Any
) -> httpx.Response:
    """Ask until there is an answer that says what happened, as a client does."""
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        try:
            answer = client.request(verb, f"{processes.url}{path}", **body)
        except httpx.TransportError:
            return False
        if answer.status_code >= 500:
            return False
        answers.append(answer)
        return True

    wait_until(is_answered, 60.0, f"{verb} {path} is answered")
    return answers[0]


def test_counts_are_exact_after_kills_of_the_server_and_the_relay(
    processes: Processes, site: LocalCluster
) -> None:
    clients = [httpx.Client(timeout=20) for _ in range(PEOPLE)]
    names = [f"crash{n}" for n in range(PEOPLE)]
    people = []
    for client, name in zip(clients, names, strict=True):
        body = {"username": name, "password": PASSWORD}
        answer = client.post(f"{processes.url}/api/v1/users", json=body)
        people.append(int(answer.raise_for_status().json()["user"]["id"]))
    upload = {"file": ("photo.jpg", pictures.jpeg(64, 64))}
    photo = clients[0].post(f"{processes.url}/api/v1/photos", files=upload).json()["id"]

    counter, keys = itertools.count(1), itertools.count(1)
    follows: dict[tuple[int, int], bool] = {}
    likes: dict[int, bool] = {}

    def act(me: int) -> None:
        rng = random.Random(me)
        for _ in range(ACTIONS):
            verb = rng.choice(["PUT", "DELETE"])
            other = rng.choice([n for n in range(PEOPLE) if n != me])
            sent: dict[str, Any] = {}
            if rng.random() < 0.2:
                verb, path = "POST", f"/api/v1/photos/{photo}/comments"
                key = {"idempotency-key": f"{me} {next(keys)}"}
                sent = {"json": {"body": key["idempotency-key"]}, "headers": key}
            elif rng.random() < 0.3:
                path = f"/api/v1/photos/{photo}/like"
                likes[me] = verb == "PUT"
            else:
                path = f"/api/v1/users/{names[other]}/follow"
                follows[people[me], people[other]] = verb == "PUT"
            answer = until_answered(processes, clients[me], verb, path, **sent)
            assert answer.is_success, answer.text
            if next(counter) % KILL_EVERY == 0:
                processes.kill(processes.kills)

    with ThreadPoolExecutor(PEOPLE) as pool:
        list(pool.map(act, range(PEOPLE)))
    for client in clients:
        client.close()
    assert processes.kills == PEOPLE * ACTIONS // KILL_EVERY
    end(processes.server)
    end(processes.relay)

    expected = {pair for pair, is_there in follows.items() if is_there}
    done = Done(expected, sum(likes.values()), next(keys) - 1)
    check(site, people, int(photo), done)


@dataclass(frozen=True)
class Done:
    """What was acknowledged: who follows whom, likes and comments of the photo."""

    follows: set[tuple[int, int]]
    n_likes: int
    n_comments: int


def check(site: LocalCluster, people: list[int], photo: int, done: Done) -> None:
    """Compare what is stored, once all is delivered, with what was acknowledged."""
    with Cluster.from_file(site.config_path) as cluster:
        drained(cluster, site)
        assert forward(cluster) == done.follows
        assert inverse(cluster) == done.follows
        with cluster.writer() as session:
            for person in people:
                user = session.get_one(User, person)
                assert user.follower_count == sum(pair[1] == person for pair in done.follows)
                assert user.following_count == sum(pair[0] == person for pair in done.follows)
            statement = select(Comment.body).where(Comment.photo_id == photo)
            bodies = list(session.scalars(statement))
        assert len(bodies) == len(set(bodies)) == done.n_comments, "one comment for each key"
        assert run(cluster, dry_run=True) == dict.fromkeys(KINDS, 0)
    with psycopg.connect(site.superuser_dsn(owner_of(site, photo), "shardkit")) as connection:
        schema = f"shard_{shard_of(photo):04d}"
        query = f"SELECT like_count FROM {schema}.photos WHERE id = {photo}"
        assert connection.execute(query).fetchone() == (done.n_likes,)


def shard_of(row_id: int) -> int:
    return (row_id >> 10) & 0x1FFF


def owner_of(site: LocalCluster, row_id: int) -> str:
    return site.primary("alpha" if shard_of(row_id) < 4 else "beta").name


def forward(cluster: Cluster) -> set[tuple[int, int]]:
    statement = select(Assoc.id1, Assoc.id2).where(Assoc.atype == int(Kind.FOLLOWS))
    statement = statement.options(all_shards())
    with cluster.writer() as session:
        return {(a, b) for a, b in session.execute(statement)}


def inverse(cluster: Cluster) -> set[tuple[int, int]]:
    statement = select(Assoc.id2, Assoc.id1).where(Assoc.atype == int(Kind.FOLLOWED_BY))
    statement = statement.options(all_shards())
    with cluster.writer() as session:
        return {(a, b) for a, b in session.execute(statement)}


def drained(cluster: Cluster, site: LocalCluster) -> None:
    """Deliver what is left, also what was claimed by a relay that died."""
    relay = relay_of(cluster)

    def is_empty() -> bool:
        relay.drain()
        return n_waiting(site) == 0

    wait_until(is_empty, 30.0, "every event is delivered")


def n_waiting(site: LocalCluster) -> int:
    n = 0
    for physical, shards in (("alpha", range(4)), ("beta", range(4, 8))):
        name = site.primary(physical).name
        with psycopg.connect(site.superuser_dsn(name, "shardkit")) as connection:
            for shard in shards:
                for table in ("shardkit_outbox", "shardkit_outbox_dead"):
                    found = connection.execute(f"SELECT count(*) FROM shard_{shard:04d}.{table}")
                    n += found.fetchall()[0][0]
    return n


def deliver_and_die(config: Path, step: str) -> None:
    with Cluster.from_file(config) as cluster:
        relay = relay_of(cluster)

        def die(point: str) -> None:
            if point == step:
                os.kill(os.getpid(), signal.SIGKILL)

        relay.step = die
        relay.drain()


@pytest.mark.parametrize("step", ["claimed", "before handler", "after handler", "before finish"])
def test_a_relay_that_dies_at_a_step_counts_nothing_twice(site: LocalCluster, step: str) -> None:
    context = multiprocessing.get_context("forkserver")

    with Cluster.from_file(site.config_path) as cluster:
        prefix = step.replace(" ", ".")
        star, *fans = [new_user(cluster, f"{prefix}{n}0") for n in range(6)]
        for fan in fans:
            follow(cluster, fan, star)
        process = context.Process(target=deliver_and_die, args=(site.config_path, step))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        follow(cluster, fans[0], star, is_there=False)
        drained(cluster, site)
        with cluster.writer() as session:
            assert session.get_one(User, star).follower_count == len(fans) - 1
        assert {pair[0] for pair in inverse(cluster) if pair[1] == star} == set(fans[1:])


def new_user(cluster: Cluster, name: str) -> int:
    with cluster.writer() as session:
        user = User(username=name, display_name=name, password_hash="", created_at=NOW)
        session.add(user)
        session.commit()
        return int(user.id)


def follow(cluster: Cluster, follower: int, followee: int, *, is_there: bool = True) -> None:
    with cluster.writer() as session:
        user = tao.locked(session, follower)
        if is_there:
            assert tao.assoc_add(session, user, Kind.FOLLOWS, followee, 1_767_225_600_000)
        else:
            assert tao.assoc_delete(session, user, Kind.FOLLOWS, followee)
        session.commit()


NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
