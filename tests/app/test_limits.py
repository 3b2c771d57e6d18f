"""Who asks too often is told when to come back; without Redis passwords are not tried at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from app.limits.buckets import RedisBuckets, SilentError
from app.limits.limiter import Limiter
from app.limits.rates import Rate
from shardkit.config import load
from shardkit.local import LocalCluster
from tests.fixtures.service import PASSWORD, Person, Service, serving

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
NOWHERE = "redis://127.0.0.1:1/0"


def redis_of(local: LocalCluster) -> str:
    found = load(local.config_path)[0].services.get("redis")
    if found is None:
        pytest.skip("there is no Redis")
    return found


async def _take(url: str, key: str, rate: Rate, costs: list[int]) -> list[tuple[bool, int]]:
    buckets = RedisBuckets(url, patience=10.0)
    try:
        taken = [await buckets.take(key, rate, cost) for cost in costs]
    finally:
        await buckets.close()
    return [(each.is_allowed, each.left) for each in taken]


def test_buckets_in_redis_are_shared_and_exact(app_cluster: LocalCluster) -> None:
    url, rate = redis_of(app_cluster), Rate(5, 86_400)
    key = f"test:{id(rate)}"

    async def together() -> int:
        found = await asyncio.gather(*(_take(url, key, rate, [1] * 3) for _ in range(8)))
        return sum(allowed for each in found for allowed, _ in each)

    assert asyncio.run(together()) == 5, "of 24 that came at once, of 8 clients"
    assert asyncio.run(_take(url, key, rate, [-1, 1, 1])) == [(True, 1), (True, 0), (False, 0)]


def test_reads_and_writes_are_told_what_is_left(join: Join) -> None:
    ana = join("ana")
    told = ana.http.get("/api/v1/me").headers
    assert told["ratelimit-policy"] == '"reads";q=1000000;w=1'
    assert told["ratelimit"].startswith('"reads";r=')
    assert "retry-after" not in told
    assert "ratelimit" not in ana.http.get("/healthz").headers


def test_who_guesses_passwords_is_stopped_by_account_and_by_address(
    join: Join, service: Service
) -> None:
    ana = join("limited")
    limits = {"limit_log_in_failures": Rate(2, 900), "limit_log_ins": Rate(7, 900)}
    with serving(service.settings.model_copy(update=limits)) as strict, strict.client() as eve:

        def log_in(name: str, password: str = "a wrong guess") -> httpx.Response:
            return eve.post("/api/v1/sessions", json={"username": name, "password": password})

        for _ in range(3):
            assert log_in(ana.username, PASSWORD).status_code == 201, "who knows it is not counted"
        codes = [log_in(f" @{ana.username.upper()}").status_code for _ in range(3)]
        assert codes == [401, 401, 429]
        refused = log_in(ana.username, PASSWORD)
        assert refused.status_code == 429, "also with the right one: nobody learns it so"
        assert refused.json()["type"].endswith("too-many-requests")
        assert 1 <= int(refused.headers["retry-after"]) <= 450
        last = log_in("nobody")
        assert last.status_code == 429, "the eighth from one address"
        assert last.headers["ratelimit"].startswith('"log_ins";r=0;')
        page = eve.post("/login", data={"username": "x", "password": "y"})
        assert (page.status_code, page.headers["content-type"][:9]) == (429, "text/html")
        assert eve.get("/api/v1/explore").status_code == 200, "reads have a bucket of their own"


def test_without_redis_reads_go_on_and_passwords_are_refused() -> None:
    """What Redis does to a whole server is in test_faults; this is the decision itself."""

    async def run() -> None:
        buckets = RedisBuckets(NOWHERE)
        limiter = Limiter(buckets, {"reads": Rate(1, 60), "log_ins": Rate(1, 60)})
        try:
            with pytest.raises(SilentError):
                await buckets.take("x", Rate(1, 60))
            for _ in range(3):
                assert await limiter.admit("reads", "192.0.2.1") == {}
            with pytest.raises(Exception, match="cannot be checked"):
                await limiter.admit("log_ins", "192.0.2.1")
        finally:
            await limiter.close()

    asyncio.run(run())


def test_a_server_whose_redis_is_silent_refuses_log_ins(join: Join, service: Service) -> None:
    ana = join("closed")
    limits = {"limit_log_ins": Rate(100, 60), "limit_sign_ups": Rate(100, 60)}
    text = service.settings.config.read_text("utf-8")
    url = redis_line(text)
    beside = service.settings.config.with_name("no-redis.toml")
    beside.touch(0o600)
    beside.write_text(text.replace(url, NOWHERE), "utf-8")
    settings = service.settings.model_copy(update={**limits, "config": beside})
    with serving(settings) as alone, alone.client() as client:
        given = {"username": ana.username, "password": PASSWORD}
        for path in ("/api/v1/sessions", "/api/v1/users"):
            refused = client.post(path, json=given)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "2"
        assert client.get("/api/v1/explore").status_code == 200
        bearer = {"authorization": f"Bearer {ana.http.cookies['session']}"}
        assert client.patch("/api/v1/me", json={"bio": "x"}, headers=bearer).status_code == 200


def redis_line(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("redis = "):
            return line.partition('"')[2].rstrip('"')
    pytest.skip("there is no Redis")
