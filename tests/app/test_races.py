"""Many clients doing the same at once: one wins where only one may, and counts stay exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


def at_once(calls: list[Callable[[], httpx.Response]]) -> Counter[int]:
    """Run calls in threads and return how often each status came."""
    with ThreadPoolExecutor(8) as pool:
        return Counter(answer.status_code for answer in pool.map(lambda call: call(), calls))


def test_a_username_is_given_once(service: Service) -> None:
    names = ("Race.Winner", "race.winner", "RACE.WINNER", "\uff52ace.winner")

    def sign_up(name: str) -> Callable[[], httpx.Response]:
        body = {"username": name, "password": PASSWORD}
        return lambda: httpx.post(f"{service.url}/api/v1/users", json=body, timeout=30)

    assert at_once([sign_up(name) for name in names * 4]) == {201: 1, 409: 15}


def test_likes_count_every_person_once(join: Join) -> None:
    owner, fans = join("owner"), [join("fan") for _ in range(4)]
    here = f"/api/v1/photos/{owner.upload(pictures.jpeg(64, 64)).json()['id']}"

    def like(fan: Person) -> Callable[[], httpx.Response]:
        return lambda: fan.http.put(f"{here}/like")

    def unlike(fan: Person) -> Callable[[], httpx.Response]:
        return lambda: fan.http.delete(f"{here}/like")

    assert at_once([verb(fan) for fan in fans for verb in (like, unlike, like) * 5]) == {200: 60}

    photo = owner.http.get(here).json()
    liked = sum(fan.http.get(here).json()["liked_by_me"] for fan in fans)
    assert photo["like_count"] == liked
    assert at_once([like(fan) for fan in fans * 3]) == {200: 12}
    assert owner.http.get(here).json()["like_count"] == len(fans)


def test_follows_count_every_pair_once(join: Join) -> None:
    star, fans = join("star"), [join("fan") for _ in range(4)]

    def follow(fan: Person) -> Callable[[], httpx.Response]:
        return lambda: fan.http.put(f"/api/v1/users/{star.username}/follow")

    assert at_once([follow(fan) for fan in fans * 5]) == {204: 20}

    def followers() -> set[str]:
        found = star.http.get(f"/api/v1/users/{star.username}/followers").json()["items"]
        return {person["id"] for person in found}

    wait_until(lambda: followers() == {fan.id for fan in fans}, 10.0, "the relay has been there")
    profile = star.http.get(f"/api/v1/users/{star.username}").json()
    assert profile["follower_count"] == len(fans)
    for fan in fans:
        assert fan.http.get(f"/api/v1/users/{fan.username}").json()["following_count"] == 1


def test_a_photo_is_deleted_once(join: Join) -> None:
    ana = join("ana")
    here = f"/api/v1/photos/{ana.upload(pictures.jpeg(64, 64)).json()['id']}"
    assert at_once([lambda: ana.http.delete(here)] * 6) == {204: 1, 404: 5}
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["photo_count"] == 0
