"""Whoever leaves takes their data along and leaves nothing behind, in any store of the service."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import random
import re
import secrets
import socket
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import BigInteger, delete

from app.accounts.models import LoginSession, User
from app.feed.ranking.ads import add
from app.feed.timelines import Timelines
from app.leaving.erasure import Eraser
from app.leaving.models import ACCOUNT_DELETED
from app.leaving.traces import OTHERS, PEOPLE, traces
from app.photos.opening import open_blobs
from app.photos.store.compaction import compact, stats
from app.repair import KINDS, run
from app.tables import Base
from app.workers import relay_of
from shardkit import Cluster
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.outbox import Event
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.blobs import VARIANTS, keys_in
from tests.fixtures.mortal import Mortal
from tests.fixtures.service import PASSWORD, Person, Service
from tests.fixtures.stores import Stores

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
PATIENCE = 60.0


def test_every_column_of_numbers_is_known_to_be_a_person_or_not() -> None:
    for table in Base.metadata.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, BigInteger):
                known = (column.name in PEOPLE) + (column.name in OTHERS)
                assert known == 1, f"add {table.name}.{column.name} to app/leaving/traces.py"
    named = {trace.entity.__tablename__ for trace in traces()}
    assert {"users", "photos", "likes", "comments", "assocs", "exports"} <= named


# -- everything there is of somebody


@dataclass(frozen=True)
class Life:
    """What somebody did.

    Attributes:
        person: who.
        mark: a word that is in every text of theirs and nowhere else.
        photos: theirs, by id.
        stories: theirs, by id.
        blobs: keys of their pictures.
        middles: bytes out of the middles of those.
    """

    person: Person
    mark: str
    photos: list[str]
    stories: list[str]
    blobs: set[str]
    middles: set[bytes]


def keyed() -> dict[str, str]:
    """Have the answer noted, as careful clients do."""
    return {"idempotency-key": secrets.token_urlsafe(16)}


def posted(person: Person, path: str, verb: str = "POST", **sent: Any) -> Any:
    """Have somebody do something; return what the answer says."""
    answer = person.http.request(verb, f"/api/v1{path}", headers=keyed(), **sent)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def picture(caption: str, width: int = 64) -> dict[str, Any]:
    """Return an upload; pictures of one width have the same bytes."""
    return {"files": {"file": ("a.jpg", pictures.jpeg(width, 64))}, "data": {"caption": caption}}


def lived(join: Join, service: Service, friends: list[Person], cluster: Cluster) -> Life:
    """Have somebody use everything, with people of several shards."""
    mark = f"zq{uuid.uuid4().hex[:12]}"
    me = join(mark)
    word = f"#{mark} @{friends[0].username}"
    before = keys_in(service)
    widths = random.sample(range(100, 1000), 3)
    photos = [posted(me, "/photos", **picture(word, widths[0]))["id"]]
    later = me.http.post(
        "/api/v1/photos",
        headers={**keyed(), "prefer": "respond-async"},
        **picture(mark, widths[1]),
    )
    assert later.status_code == 202
    here = f"/api/v1/uploads/{later.json()['id']}"
    wait_until(lambda: me.http.get(here).json()["state"] == "done", PATIENCE, "it is stored")
    photos.append(me.http.get(here).json()["photo_id"])
    stories = [posted(me, "/stories", **picture(mark, widths[2]))["id"]]
    blobs = keys_in(service) - before
    posted(me, "/me", "PATCH", json={"bio": mark, "display_name": mark})
    assert add(cluster, int(photos[0]), bid=1.0, days=1, now=dt.datetime.now(dt.UTC))
    for friend in friends:
        theirs = posted(friend, "/photos", **picture("theirs"))["id"]
        told = posted(friend, "/stories", **picture("theirs"))["id"]
        both = ((me, friend, theirs, told), (friend, me, photos[0], stories[0]))
        for who, whom, photo, story in both:
            posted(who, f"/users/{whom.username}/follow", "PUT")
            for path in (
                f"/photos/{photo}/like",
                f"/photos/{photo}/save",
                f"/stories/{story}/view",
            ):
                posted(who, path, "PUT")
            body = {"body": f"#{mark} @{whom.username}"}
            said = posted(who, f"/photos/{photo}/comments", json=body)["id"]
            answer = {"body": mark, "parent_id": said}
            posted(whom, f"/photos/{photo}/comments", json=answer)
        friend.http.get("/api/v1/feed").raise_for_status()  # builds a timeline
    me.http.get("/api/v1/feed").raise_for_status()
    posted(me, f"/users/{friends[0].username}/block", "PUT")
    posted(friends[1], f"/users/{me.username}/block", "PUT")
    export = posted(me, "/me/exports")
    assert export["state"] == "working"
    return Life(me, mark, photos, stories, blobs, asyncio.run(middles(blobs, service)))


async def middles(keys: set[str], service: Service) -> set[bytes]:
    """Return some bytes out of the middle of each file of pictures."""
    blobs = open_blobs(service.settings)
    try:
        files = [await blobs.get(key, name) for key in keys for name in VARIANTS]
    finally:
        await blobs.close()
    assert all(files)
    return {data[len(data) // 2 :][:48] for data in files if data}


def on_disk(life: Life, service: Service) -> bool:
    """Tell whether bytes of pictures are in any file of the store."""
    files = [path for path in service.settings.media_folder.rglob("*") if path.is_file()]
    assert files
    return any(middle in path.read_bytes() for path in files for middle in life.middles)


def compacted(service: Service, friend: Person) -> None:
    """Give back the bytes of all deleted needles, beside the service that writes others."""
    root = service.settings.media_folder

    def is_done(volume: int) -> bool:
        if compact(root, volume) is not None:
            return True
        posted(friend, "/photos", **picture(""))  # the service goes on in another volume
        return False

    for each in stats(root):
        if each.dead_bytes:
            wait_until(partial(is_done, each.volume), PATIENCE, "a volume is compacted")


def hits(friend: Person, mark: str) -> list[Any]:
    """Search for everything there is by a word; answers of before are known for a while."""
    found = []
    for text in (mark, f"#{mark}", mark[:-1]):
        page = friend.http.get("/api/v1/search", params={"q": text}).raise_for_status().json()
        found += [each for each in (*page["people"], *page["tags"]) if mark in str(each)]
    return found


def found_of(life: Life, local: LocalCluster, service: Service) -> list[str]:
    """Look through every store for somebody; return where they were found."""
    found = [*in_tables(life, local, service), *in_redis(life, local), *in_memcached(life, local)]
    found += [f"picture {key}" for key in asyncio.run(readable(life, service))]
    folder = service.settings.exports_folder
    found += [f"file {path.name}" for path in folder.glob("*.zip") if says(path, life.mark)]
    return found


def in_tables(life: Life, local: LocalCluster, service: Service) -> Iterator[str]:
    """Find rows of all tables of all logical shards by the id, ids of photos, and the mark."""
    ids = {life.person.id, *life.photos, *life.stories}
    for table, row in Stores(local, service.settings).rows():
        said = life.mark in row or life.mark.encode().hex() in row  # who has a name, as bytes
        if said or ids.intersection(re.findall(r"\d+", row)):
            yield f"{table}: {row[:200]}"


def in_redis(life: Life, local: LocalCluster) -> Iterator[str]:
    services = load(local.config_path)[0].services
    ids = [int(each) for each in (life.person.id, *life.photos)]
    with redis.Redis.from_url(services["redis"]) as client:
        for key in client.scan_iter(count=1000):
            value = client.dump(key) if client.type(key) != b"string" else client.get(key)
            named = life.mark.encode() in (value or b"") or life.mark.encode() in key
            mine = key.startswith(b"tl:") and key.endswith(f":{life.person.id}".encode())
            ring = key.startswith(b"tl:") and any(n.to_bytes(8, "big") in value for n in ids)
            if named or mine or ring:
                yield f"redis {key!r}"


def in_memcached(life: Life, local: LocalCluster) -> Iterator[str]:
    """Read every key that a Memcached has, and look for the mark in its value."""
    url = load(local.config_path)[0].services.get("memcached")
    if url is None:
        return
    at = urlsplit(url if "//" in url else f"//{url}")
    with socket.create_connection((at.hostname or "", at.port or 11211), 10) as line:
        file = line.makefile("rwb")
        file.write(b"lru_crawler metadump all\r\n")
        file.flush()
        keys = []
        while not (told := file.readline()).startswith((b"END", b"BUSY", b"ERROR")):
            keys.append(told.split()[0].removeprefix(b"key="))
        assert keys, "the cache is used"
        for key in keys:
            file.write(b"mg " + key + b" b v\r\n" if b"%" in key else b"mg " + key + b" v\r\n")
            file.flush()
            head = file.readline().split()
            if head[:1] == [b"VA"]:
                value = file.read(int(head[1]) + 2)
                if life.mark.encode() in value:
                    yield f"memcached {key!r}: {value[:80]!r}"


async def readable(life: Life, service: Service) -> list[str]:
    blobs = open_blobs(service.settings)
    try:
        return [key for key in life.blobs if await blobs.get(key, "150.jpg") is not None]
    finally:
        await blobs.close()


def says(path: Any, mark: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(mark.encode() in archive.read(name) for name in archive.namelist())


def nothing_is_left(life: Life, local: LocalCluster, service: Service) -> None:
    """Wait until nothing is found; events that were committed are still on their way."""
    found: list[str] = []

    def is_empty() -> bool:
        found[:] = found_of(life, local, service)
        return not found

    try:
        wait_until(is_empty, PATIENCE, "nothing is left")
    except AssertionError:
        raise AssertionError("\n".join(found)) from None


# -- the tests


NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def friends(join: Join) -> list[Person]:
    return [join(f"friend{n}x") for n in range(2)]


def check_export(life: Life, friends: list[Person]) -> None:
    http = life.person.http
    (export,) = http.get("/api/v1/me/exports").json()
    here = f"/api/v1/me/exports/{export['id']}"
    wait_until(lambda: http.get(here).json()["state"] == "done", PATIENCE, "the export is made")
    assert friends[0].http.get(here).status_code == 404
    assert friends[0].http.get(f"{here}/file").status_code == 404

    answer = http.get(http.get(here).json()["file"])
    assert answer.headers["content-type"] == "application/zip"
    assert "attachment" in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        tables = {
            name[7:-5]: json.loads(archive.read(name))
            for name in archive.namelist()
            if name.startswith("tables/")
        }
        shown = {name for name in archive.namelist() if name.startswith("pictures/")}
    assert [row["id"] for row in tables["users"]] == [life.person.id]
    assert {row["id"] for row in tables["photos"]} == set(life.photos)
    assert shown == {f"pictures/{each}.jpg" for each in (*life.photos, *life.stories)}
    n = len(friends)
    assert (len(tables["likes"]), len(tables["comments"])) == (n, 2 * n)
    assert (len(tables["saves"]), len(tables["stories"])) == (n, 1)
    assert {row["id1"] for row in tables["assocs"]} == {life.person.id}, "not who blocks them"
    for secret in ("password_hash", "token_hash", "argon2"):
        assert secret not in json.dumps(tables)


@pytest.fixture
def mended(app_cluster: LocalCluster) -> None:
    """Begin with what is right: other tests write rows past the service."""
    with Cluster.from_file(app_cluster.config_path) as cluster:
        run(cluster)


@pytest.mark.usefixtures("mended")
def test_who_leaves_takes_everything_along_and_leaves_nothing(
    join: Join, service: Service, app_cluster: LocalCluster, friends: list[Person]
) -> None:
    with Cluster.from_file(app_cluster.config_path) as cluster:
        life = lived(join, service, friends, cluster)
    me = life.person
    check_export(life, friends)
    assert on_disk(life, service)
    wait_until(lambda: len(hits(friends[0], life.mark)) > 1, PATIENCE, "people and tags are found")
    where = found_of(life, app_cluster, service)
    for store in ({*Base.metadata.tables} - {"erasures"}) | {"picture", "file", "redis"}:
        assert any(each.startswith(store) for each in where), f"{store}: of a life, there is some"

    wrong = me.http.post("/api/v1/me/deletion", json={"password": "not this one"})
    assert wrong.status_code == 403
    answer = me.http.post("/api/v1/me/deletion", json={"password": PASSWORD})
    assert (answer.status_code, answer.json()["state"]) == (202, "working")
    assert me.http.get("/api/v1/me").status_code == 401
    for path in (f"/api/v1/users/{me.username}", f"/api/v1/photos/{life.photos[0]}"):
        assert friends[0].http.get(path).status_code == 404, "gone at once"

    status = answer.headers["location"]
    wait_until(
        lambda: friends[0].http.get(status).json()["state"] == "done", PATIENCE, "it is removed"
    )
    nothing_is_left(life, app_cluster, service)
    wait_until(lambda: not hits(friends[0], life.mark), PATIENCE, "nothing is found")
    compacted(service, friends[0])
    assert not on_disk(life, service)
    for friend in friends:
        *_, theirs = friend.http.get(f"/api/v1/users/{friend.username}/photos").json()["items"]
        assert (theirs["like_count"], theirs["comment_count"]) == (0, 0), "theirs is still there"
    with Cluster.from_file(app_cluster.config_path) as cluster:
        relay_of(cluster).drain()
        assert run(cluster, dry_run=True) == dict.fromkeys(KINDS, 0), "every count is exact"
    assert free_again(me, service)


def free_again(me: Person, service: Service) -> bool:
    """Tell whether somebody else gets the name."""
    with service.client() as client:
        again = {"username": me.username, "password": PASSWORD}
        answer = client.post("/api/v1/users", json=again)
        return answer.status_code == 201 and answer.json()["user"]["id"] != me.id


@pytest.mark.fault
@pytest.mark.usefixtures("mended")
def test_the_server_may_die_right_after_the_account_has_ended(
    join: Join, service: Service, app_cluster: LocalCluster, friends: list[Person]
) -> None:
    """Nobody is told, and nothing is done any more by who has ended it: relays do all of it."""
    with Cluster.from_file(app_cluster.config_path) as cluster:
        life = lived(join, service, friends, cluster)
    me = life.person
    log_in = {"username": me.username, "password": PASSWORD}
    token = me.http.post("/api/v1/sessions", json=log_in).raise_for_status().json()["token"]
    with Mortal(service.settings) as mortal:
        bearer = {"authorization": f"Bearer {token}"}
        leave = partial(mortal.send, "POST", "/api/v1/me/deletion", headers=bearer)
        assert leave(json={"password": PASSWORD}, ends="after 1") is None
        assert mortal.n_deaths == 1
        again = leave(json={"password": PASSWORD})
        assert again is not None
        assert again.status_code == 401, "it was committed"
    nothing_is_left(life, app_cluster, service)
    assert free_again(me, service)


class Killed(BaseException):
    """The worker dies here."""


@pytest.mark.usefixtures("mended")
def test_a_worker_may_die_at_every_step(
    join: Join, service: Service, app_cluster: LocalCluster, friends: list[Person]
) -> None:
    """Each attempt is killed at the first step of a kind that none was killed at; the last ends."""
    with Cluster.from_file(app_cluster.config_path) as cluster:
        life = lived(join, service, friends, cluster)
        me = life.person
        timelines = Timelines(cluster.services["redis"])
        with cluster.writer() as session:  # the account ends, and no relay hears of it
            session.delete(session.get_one(User, int(me.id)))
            session.execute(delete(LoginSession).where(LoginSession.user_id == int(me.id)))
            session.commit()
        event = Event(1, ACCOUNT_DELETED, me.id, {"user_id": me.id}, NOW, 0, 0)
        died: set[str] = set()

        def step(name: str) -> None:
            if name not in died:
                died.add(name)
                raise Killed

        eraser = Eraser(cluster, timelines, service.settings, step=step)
        for _ in range(100):
            try:
                eraser.handle(event)
                break
            except Killed:
                continue
        timelines.close()
        assert {"photos", "photo", "like", "comment", "edges", "edge", "note"} <= died
        nothing_is_left(life, app_cluster, service)
        relay_of(cluster).drain()
        assert run(cluster, dry_run=True) == dict.fromkeys(KINDS, 0)
