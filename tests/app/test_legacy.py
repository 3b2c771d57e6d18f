"""Old addresses of photos, on the real service and its Redis."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from app.legacy.codes import code_of
from app.legacy.photos import MAP, WIDTH
from shardkit.idmap import IdMap
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration


@pytest.fixture
def numbers(service: Service) -> Iterator[IdMap]:
    """The service's map, as an operator fills it."""
    services = tomllib.loads(service.settings.config.read_text("utf-8")).get("services", {})
    if "redis" not in services:
        pytest.skip("redis-server is not installed")
    with Redis.from_url(services["redis"]) as client:
        found = IdMap(client, MAP, width=WIDTH)
        yield found
        client.delete(*client.keys("shardkit:idmap:*"))


def test_an_old_address_leads_to_the_photo(
    join: Callable[[str], Person], service: Service, numbers: IdMap
) -> None:
    photo = join("ana").upload(pictures.jpeg(), "older than this service").json()
    numbers.set(123_456_789, int(photo["id"]))
    with service.client() as stranger:
        moved = stranger.get(f"/p/{code_of(123_456_789)}")
        assert (moved.status_code, moved.headers["location"]) == (301, f"/p/{photo['id']}")
        shown = stranger.get(moved.headers["location"])
        assert (shown.status_code, "older than this service" in shown.text) == (200, True)
        assert stranger.get(f"/p/{photo['id']}").status_code == 200


def test_a_code_that_nobody_had(service: Service, numbers: IdMap) -> None:
    numbers.set(7, 7)
    with service.client() as stranger:
        for code in ("B", "AB", "z" * 11, "zzzzzzzzzz", "a" * 12, "B1", "-", "%00", "é"):
            assert stranger.get(f"/p/{code}").status_code == 404, code


def test_garbage_is_no_photo(service: Service, numbers: IdMap) -> None:
    numbers.set(7, 7)
    with service.client() as stranger:
        assert stranger.get("/p/H").headers["location"] == "/p/7"
        with Redis.from_url(
            tomllib.loads(service.settings.config.read_text("utf-8"))["services"]["redis"]
        ) as client:
            client.set(numbers.key(7), b"garbage")
        answer = stranger.get("/p/H")
        assert answer.status_code == 500
        assert "location" not in answer.headers
