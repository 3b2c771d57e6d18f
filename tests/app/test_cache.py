"""Profiles come from the cache, show at once what was done, and do without it when it dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.database import Database
from app.graph.models import Kind, count_of
from app.partial import counted
from app.photos.repository import PhotoRepository
from app.photos.service import photo_page
from shardkit import AsyncCluster
from shardkit.events import StatementRouted
from shardkit.local import LocalCluster
from shardkit.testing import wait_until, watch
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = [pytest.mark.integration]

Join = Callable[[str], Person]
ENOUGH = 30.0
"""Seconds to wait on a machine that has other things to do."""


@pytest.fixture
def memcached(app_cluster: LocalCluster) -> Iterator[str]:
    """The name of the server that the service caches in; running again after the test."""
    if "memcached" not in {server.name for server in app_cluster.servers}:
        pytest.skip("memcached is not installed")
    yield "memcached"
    if not app_cluster.server("memcached").pid:
        app_cluster.start_server("memcached")


def shown(client: httpx.Client, person: Person) -> dict[str, Any]:
    """Return what a browser sees of a person: counts, and photos with their likes."""
    here = f"/api/v1/users/{person.username}"
    profile = client.get(here)
    grid = client.get(f"{here}/photos", params={"limit": 30})
    assert (profile.status_code, grid.status_code) == (200, 200)
    counts = {name: profile.json()[name] for name in ("follower_count", "following_count")}
    likes = [(item["id"], item["like_count"]) for item in grid.json()["items"]]
    return {**counts, "photos": likes}


def like(client: httpx.Client, photo: str, *, undo: bool = False) -> None:
    method = "DELETE" if undo else "PUT"
    client.request(method, f"/api/v1/photos/{photo}/like").raise_for_status()


def upload(person: Person) -> str:
    answer = person.upload(pictures.jpeg(64, 64))
    assert answer.status_code == 201, answer.text
    photo: str = answer.json()["id"]
    return photo


@pytest.mark.anyio
@pytest.mark.usefixtures("memcached")
async def test_a_profile_that_was_read_is_not_read_again(service: Service, join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    photos = [upload(ana) for _ in range(3)]
    like(ben.http, photos[1])
    ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()
    owner = int(ana.id)

    async with AsyncCluster.from_file(service.settings.config) as cluster:

        async def read() -> tuple[list[tuple[str, int]], int, int]:
            async with Database(cluster).reader() as session:
                found, cursor = await PhotoRepository(session).grid(owner, None, 30)
                page = await photo_page(session, found, None, cursor)
                keys = {kind: (owner, int(kind)) for kind in (Kind.FOLLOWED_BY, Kind.FOLLOWS)}
                counts = await counted(session, count_of, dict.fromkeys(keys.values(), -1))
            likes = [(str(item.id), item.like_count) for item in page.items]
            return likes, counts[keys[Kind.FOLLOWED_BY]], counts[keys[Kind.FOLLOWS]]

        expected = ([(photos[2], 0), (photos[1], 1), (photos[0], 0)], 0, 1)
        assert await read() == expected
        with watch(cluster) as seen:
            assert await read() == expected
        assert not [event for event in seen.events if isinstance(event, StatementRouted)]
        assert cluster.cache is not None
        before = cluster.cache.counts
        like(ben.http, photos[0])
        assert (await read())[0] == [(photos[2], 0), (photos[1], 1), (photos[0], 1)]
        read_again = cluster.cache.counts.misses - before.misses
        assert read_again <= 1  # how many like that photo; its row is stored by who wrote it


def test_everybody_sees_what_was_done_and_nobody_notices_that_memcached_dies(
    app_cluster: LocalCluster, memcached: str, service: Service, join: Join
) -> None:
    ana, ben = join("ana"), join("ben")
    likes: dict[str, int] = {}

    def done() -> list[tuple[str, int]]:
        """Change something; return the photos as they have to be shown now."""
        photo = upload(ana)
        likes[photo] = 0
        like(ana.http, photo)
        likes[photo] += 1
        assert shown(ana.http, ana)["photos"] == [*likes.items()][::-1]
        like(ana.http, photo, undo=True)
        likes[photo] -= 1
        if len(likes) > 2:
            gone = next(iter(likes))
            ana.http.delete(f"/api/v1/photos/{gone}").raise_for_status()
            del likes[gone]
        return [*likes.items()][::-1]

    with service.client() as stranger:
        for _ in range(3):
            photos = done()
            assert shown(ana.http, ana)["photos"] == photos
            assert shown(stranger, ana)["photos"] == photos  # with the cache, that is everybody

        app_cluster.kill_server(memcached)
        for _ in range(3):
            photos = done()
            assert shown(ana.http, ana)["photos"] == photos  # who wrote, from databases
            like(ben.http, photos[0][0])
            likes[photos[0][0]] += 1
            assert shown(ben.http, ana)["photos"] == [*likes.items()][::-1]

        app_cluster.start_server(memcached)
        photos = done()
        assert shown(ana.http, ana)["photos"] == photos
        wait_until(lambda: shown(stranger, ana)["photos"] == photos, ENOUGH, "all see it")
        ben.http.put(f"/api/v1/users/{ana.username}/follow").raise_for_status()
        assert shown(ben.http, ana)["follower_count"] == 1
        assert shown(ben.http, ben)["following_count"] == 1
        wait_until(lambda: shown(stranger, ana)["follower_count"] == 1, ENOUGH, "the relay did it")
