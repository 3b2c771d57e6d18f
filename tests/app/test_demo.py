"""The demo loads once, whole, and adds only what is missing."""

from __future__ import annotations

import pytest

from app.clock import utc_now
from app.demo import plan
from app.demo.__main__ import PASSWORD, load_demo
from app.demo.load import DemoCounts
from app.resources import open_resources
from shardkit.testing import wait_until
from tests.fixtures.service import Service

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


async def test_loads_once_and_repairs_what_is_missing(service: Service) -> None:
    wanted = plan.make(6, 3)
    async with open_resources(service.settings, utc_now) as resources:
        added = await load_demo(resources, wanted)
        assert added.people == 6
        assert added.photos == added.pictures == len(wanted.photos)
        assert added.likes == sum(map(len, wanted.likes.values()))
        assert added.comments == sum(map(len, wanted.comments.values()))
        assert added.follows == sum(map(len, wanted.follows.values()))

        assert await load_demo(resources, wanted) == DemoCounts()

        name = wanted.photos[0].name
        (lost,) = [key async for key in resources.blobs.iterate_keys() if key.endswith(name)]
        await resources.blobs.delete(lost)
        assert await load_demo(resources, wanted) == DemoCounts(pictures=1)
        (drawn,) = [key async for key in resources.blobs.iterate_keys() if key.endswith(name)]
        assert await resources.blobs.get(drawn, "640.jpg") is not None
        assert await load_demo(resources, wanted) == DemoCounts()


def test_the_account_to_try_has_a_full_feed(service: Service) -> None:
    with service.client() as client:
        credentials = {"username": plan.DEMO_USERNAME, "password": PASSWORD}
        assert client.post("/api/v1/sessions", json=credentials).status_code == 201
        feed = client.get("/api/v1/feed").json()["items"]
        assert len(feed) > 5
        assert feed == sorted(feed, key=lambda item: int(item["id"]), reverse=True)
        assert feed == sorted(feed, key=lambda item: item["created_at"], reverse=True)
        here = f"/api/v1/users/{plan.DEMO_USERNAME}"
        n_expected = sum(0 in followees for followees in plan.make(6, 3).follows.values())
        wait_until(
            lambda: client.get(here).json()["follower_count"] == n_expected,
            10.0,
            "the relay has been there",
        )
        profile = client.get(here).json()
        grid = client.get(f"/api/v1/users/{plan.DEMO_USERNAME}/photos").json()["items"]
        assert profile["photo_count"] == len(grid)
        followers = client.get(f"/api/v1/users/{plan.DEMO_USERNAME}/followers").json()["items"]
        assert profile["follower_count"] == len(followers)
        for photo in grid:
            comments = client.get(f"/api/v1/photos/{photo['id']}/comments").json()["items"]
            assert photo["comment_count"] == len(comments)


def test_only_the_account_to_try_is_notified_of_what_is_past(service: Service) -> None:
    people = plan.make(6, 3)
    for person, n_told in ((people.people[0], True), (people.people[1], False)):
        with service.client() as client:
            credentials = {"username": person.username, "password": PASSWORD}
            assert client.post("/api/v1/sessions", json=credentials).status_code == 201
            told = client.get("/api/v1/me/notifications").json()["items"]
            assert bool(told) is n_told
