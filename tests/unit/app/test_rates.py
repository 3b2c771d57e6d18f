"""Buckets, groups and what clients are told of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from app.limits.buckets import LocalBuckets
from app.limits.rates import Rate, Taken, client_of, group_of, headers_of
from app.settings import Settings

pytestmark = pytest.mark.anyio


class Told:
    """A clock that stands where it is put."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_bucket_gives_what_it_has_and_fills_with_time() -> None:
    clock, rate = Told(), Rate(3, 30)
    buckets = LocalBuckets(clock)
    assert [(await buckets.take("a", rate)).left for _ in range(3)] == [2, 1, 0]
    refused = await buckets.take("a", rate)
    assert refused == Taken(False, 0, 10.0, 30.0)
    assert (await buckets.take("b", rate)).is_allowed, "another bucket"
    clock.now += 10.0
    assert (await buckets.take("a", rate)).is_allowed
    assert not (await buckets.take("a", rate)).is_allowed
    clock.now += 3600.0
    assert (await buckets.take("a", rate)).left == 2, "never fuller than full"


async def test_what_is_given_back_is_there_again_and_no_more() -> None:
    buckets, rate = LocalBuckets(Told()), Rate(2, 60)
    await buckets.take("a", rate)
    assert (await buckets.take("a", rate, -1)).left == 2
    assert (await buckets.take("a", rate, -1)).left == 2


@pytest.mark.parametrize(
    ("method", "path", "group"),
    [
        ("POST", "/api/v1/users", "sign_ups"), ("POST", "/signup", "sign_ups"),
        ("POST", "/api/v1/sessions", "log_ins"), ("POST", "/login/", "log_ins"),
        ("PUT", "/api/v1/me/password", "log_ins"), ("POST", "/api/v1/photos", "heavy"),
        ("GET", "/api/v1/users", "reads"), ("HEAD", "/", "reads"), ("BREW", "/", "writes"),
        ("DELETE", "/api/v1/photos/1", "writes"), ("GET", "/media/x/1080.jpg", None),
        ("GET", "/healthz", None), ("GET", "/static/style.css", None),
    ],
)  # fmt: skip
async def test_groups(method: str, path: str, group: str | None) -> None:
    assert group_of(method, path) == group


async def test_who_is_counted() -> None:
    assert client_of("192.0.2.7") == client_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1") != client_of("2001:db8:0:1::1")
    assert client_of("") == "unknown"


async def test_headers() -> None:
    told = headers_of("reads", Rate(3, 30), Taken(False, 0, 0.4, 29.2))
    assert told == {
        "ratelimit-policy": '"reads";q=3;w=30',
        "ratelimit": '"reads";r=0;t=30',
        "retry-after": "1",
    }


@pytest.mark.parametrize("text", ["", "3", "0/1", "1/0", "-1/5", "1/1/1", "1e3/1", "1 / 1"])
async def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ValidationError, match="requests/seconds"):
        Settings.read({"APP_LIMIT_READS": text})


async def test_rates_as_operators_write_them() -> None:
    settings = Settings.read({"APP_LIMIT_READS": "30/60", "APP_LIMIT_WRITES": "off"})
    assert (settings.limits["reads"], settings.limits["writes"]) == (Rate(30, 60), None)
