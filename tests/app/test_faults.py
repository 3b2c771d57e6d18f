"""A server dies: what still works works, the rest says 503 and comes back by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.outages import frozen, home_of, servers_of, without
from tests.fixtures.service import PASSWORD, Person, Service, serving

pytestmark = [pytest.mark.integration, pytest.mark.fault]

Join = Callable[[str], Person]

LIMIT = 2.0
"""Seconds that a step may take where servers stand still."""


@pytest.fixture
def one_on_each(join: Join) -> tuple[Person, Person]:
    """Somebody on alpha and somebody on beta; where a person lands is chance."""
    found: dict[str, Person] = {}
    for _ in range(64):
        person = join("resident")
        found.setdefault(home_of(person), person)
        if len(found) == 2:
            return found["alpha"], found["beta"]
    raise AssertionError("64 people all landed on one physical shard")


def is_unavailable(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 503
        and answer.headers["retry-after"].isdigit()
        and answer.headers["content-type"] == "application/problem+json"
        and "Traceback" not in answer.text
        and "127.0.0.1" not in answer.text
    )


def test_one_physical_shard_down(
    app_cluster: LocalCluster, service: Service, join: Join, one_on_each: tuple[Person, Person]
) -> None:
    ana, ben = one_on_each
    residents = [ana, *(p for p in [join("many") for _ in range(10)] if home_of(p) == "alpha")]
    photo = ana.upload(pictures.jpeg(64, 64), "on alpha").json()["id"]
    for person in (ben, ana):
        body = {"body": "by ana" if person is ana else "by ben"}
        person.http.post(f"/api/v1/photos/{photo}/comments", json=body).raise_for_status()
    far = ben.upload(pictures.jpeg(64, 64), "on beta").json()["id"]
    ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()

    with without(app_cluster, service, *reversed(servers_of(app_cluster, "beta"))):
        with service.client() as client:
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["parts"]["shard:beta"] == "down"
            assert ready.json()["parts"]["shard:alpha"] == "up"
            assert client.get("/healthz").status_code == 200

        # Alpha's people and photos are served as ever.
        assert ana.http.get("/api/v1/me").status_code == 200
        assert ana.http.get(f"/api/v1/photos/{photo}").status_code == 200
        assert ana.http.put(f"/api/v1/photos/{photo}/like").json()["like_count"] == 1
        assert ana.upload(pictures.jpeg(64, 64), "meanwhile").status_code == 201

        # Lists over both servers have what there is, and say that it is not all.
        for path, captions in (
            ("/api/v1/feed", {"meanwhile", "on alpha"}),
            ("/api/v1/explore?limit=2", {"meanwhile", "on alpha"}),
        ):
            page = ana.http.get(path).raise_for_status().json()
            assert page["partial"] is True
            assert {item["caption"] for item in page["items"]} == captions
        for path in ("/", "/explore"):
            shown = ana.http.get(path)
            assert shown.status_code == 200
            assert "data-partial" in shown.text
            assert "Some photos are missing here" in shown.text
            assert 'role="alert"' not in shown.text
            assert shown.text.endswith("</html>")
        # Ben's name may be in the cache.
        assert comments_of(ana, photo) in ((["by ana"], True), (["by ben", "by ana"], False))

        # Who lives on alpha is found by name, also where the name's own row is on beta.
        for resident in residents:
            here = f"/api/v1/users/{resident.username}"
            assert resident.http.get(here).json()["id"] == resident.id
            assert resident.http.get(f"{here}/photos").json()["partial"] is False
            credentials = {"username": resident.username, "password": PASSWORD}
            with service.client() as client:
                assert client.post("/api/v1/sessions", json=credentials).status_code == 201
            if resident is not ana:
                assert ana.http.put(f"{here}/follow").status_code == 204
        # Nobody can say that there is no such person as ben.
        assert is_unavailable(ana.http.get(f"/api/v1/users/{ben.username}"))

        # Whatever needs beta says so, in time and without details.
        cached = ana.http.get(f"/api/v1/photos/{far}")
        assert cached.status_code == 200 or is_unavailable(cached)
        for answer in (
            ana.http.put(f"/api/v1/photos/{far}/like"),
            ana.http.post(f"/api/v1/photos/{far}/comments", json={"body": "hello"}),
            ben.http.get("/api/v1/me"),
            ben.upload(pictures.jpeg(64, 64)),
            ana.http.put(f"/api/v1/users/{ben.username}/follow"),
            ben.http.put(f"/api/v1/photos/{photo}/like"),
        ):
            assert is_unavailable(answer), (answer.request.url, answer.text)
        gone = ana.http.get(f"/u/{ben.username}")
        assert (gone.status_code, gone.headers["retry-after"]) == (503, "2")

    feed = ana.http.get("/api/v1/feed").json()
    assert feed["partial"] is False
    assert {item["caption"] for item in feed["items"]} == {"meanwhile", "on beta", "on alpha"}
    assert comments_of(ana, photo) == (["by ben", "by ana"], False)


def comments_of(person: Person, photo: str) -> tuple[list[str], bool]:
    page = person.http.get(f"/api/v1/photos/{photo}/comments").raise_for_status().json()
    return [comment["body"] for comment in page["items"]], page["partial"]


@pytest.fixture
def hurried(service: Service) -> Iterator[Service]:
    """The service once more, with less time for a step."""
    with serving(service.settings.model_copy(update={"database_timeout": LIMIT})) as running:
        yield running


def test_one_physical_shard_frozen(
    app_cluster: LocalCluster, hurried: Service, one_on_each: tuple[Person, Person]
) -> None:
    ana, ben = one_on_each
    for person in one_on_each:
        person.http.base_url = hurried.url
    photo = ana.upload(pictures.jpeg(64, 64), "here").json()["id"]
    far = ben.upload(pictures.jpeg(64, 64), "there").json()["id"]
    ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()

    with frozen(app_cluster, hurried, *servers_of(app_cluster, "beta")):
        for _ in range(2):
            feed = in_time(lambda: ana.http.get("/api/v1/feed")).json()
            assert feed["partial"] is True
            assert [item["caption"] for item in feed["items"]] == ["here"]
            assert "data-partial" in in_time(lambda: ana.http.get("/")).text
            assert in_time(lambda: ana.http.get(f"/api/v1/photos/{photo}")).status_code == 200
            liked = in_time(lambda: ana.http.put(f"/api/v1/photos/{photo}/like"))
            assert liked.json()["like_count"] == 1
            cached = in_time(lambda: ana.http.get(f"/api/v1/photos/{far}"))
            assert cached.status_code == 200 or is_unavailable(cached)
            for answer in (
                in_time(lambda: ana.http.put(f"/api/v1/photos/{far}/like")),
                in_time(lambda: ben.http.get("/api/v1/me")),
            ):
                assert is_unavailable(answer), answer.text
    feed = ana.http.get("/api/v1/feed").json()
    assert {item["caption"] for item in feed["items"]} == {"there", "here"}
    assert feed["partial"] is False


def in_time(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Return an answer that came when its time was over, with what a busy machine adds."""
    started = time.monotonic()
    answer = ask()
    assert time.monotonic() - started < 3 * LIMIT, answer.request.url
    return answer


def test_redis_down_everything_answers(
    app_cluster: LocalCluster, service: Service, one_on_each: tuple[Person, Person]
) -> None:
    ana, ben = one_on_each
    with without(app_cluster, service, "redis"):
        with service.client() as client:
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            assert ready.json()["parts"]["redis"] == "down"
        photo = ben.upload(pictures.jpeg(64, 64), "no redis").json()["id"]
        ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()
        ana.http.put(f"/api/v1/photos/{photo}/like").raise_for_status()
        feed = ana.http.get("/api/v1/feed").json()
        assert (feed["items"][0]["id"], feed["partial"]) == (photo, False)
        wait_until(
            lambda: followers_of(ben) == [ana.username], 10.0, "the relay needs no Redis either"
        )


def test_a_follow_reaches_a_server_that_was_down(
    app_cluster: LocalCluster, service: Service, join: Join, one_on_each: tuple[Person, Person]
) -> None:
    ana, ben = one_on_each
    near = next(p for p in (join("near") for _ in range(64)) if home_of(p) == "alpha")
    primary = app_cluster.primary("beta").name  # replicas go on: ben is found, not written to
    with without(app_cluster, service, primary):
        ready = ana.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["parts"]["primary:beta"] == "down"
        ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()
        ana.http.put(f"/api/v1/users/{near.username}/follow").raise_for_status()
        wait_until(lambda: followers_of(near) == [ana.username], 20.0, "others do not wait for it")
        ana.http.cookies.delete("shardkit-token")  # after a minute any replica will do
        profile = ana.http.get(f"/api/v1/users/{ben.username}").json()
        assert (profile["followed_by_me"], profile["follower_count"]) == (True, 1)
    wait_until(lambda: followers_of(ben) == [ana.username], 30.0, "the relay is through")


def followers_of(person: Person) -> list[str]:
    answer = person.http.get(f"/api/v1/users/{person.username}/followers").json()
    return [item["username"] for item in answer["items"]]


def test_replicas_down_reads_go_to_the_primary(
    app_cluster: LocalCluster, service: Service, one_on_each: tuple[Person, Person]
) -> None:
    ana, _ = one_on_each
    photo = ana.upload(pictures.jpeg(64, 64), "still here").json()["id"]
    replicas = [server.name for server in app_cluster.replicas("alpha")]
    with without(app_cluster, service, *replicas), service.client() as client:
        assert client.get(f"/api/v1/photos/{photo}").json()["caption"] == "still here"
        assert client.get("/readyz").status_code == 200


def test_what_i_wrote_i_read_while_replicas_stand_still(
    app_cluster: LocalCluster, service: Service, one_on_each: tuple[Person, Person]
) -> None:
    for person in one_on_each:
        replicas = [server.name for server in app_cluster.replicas(home_of(person))]
        for name in replicas:
            app_cluster.pause(name)
        try:
            photo = person.upload(pictures.jpeg(64, 64), "fresh").json()["id"]
            assert person.http.get(f"/api/v1/photos/{photo}").json()["caption"] == "fresh"
            feed = person.http.get("/api/v1/feed").json()["items"]
            assert feed[0]["id"] == photo
        finally:
            for name in replicas:
                app_cluster.resume(name)
    with service.client() as client:
        assert client.get("/readyz").status_code == 200


def test_a_write_on_two_shards_is_seen_whole_while_replicas_stand_still(
    app_cluster: LocalCluster, one_on_each: tuple[Person, Person]
) -> None:
    ana, ben = one_on_each
    photo = ben.upload(pictures.jpeg(64, 64), "followed").json()["id"]
    replicas = [s.name for name in ("alpha", "beta") for s in app_cluster.replicas(name)]
    for name in replicas:
        app_cluster.pause(name)
    try:
        ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()
        profile = ana.http.get(f"/api/v1/users/{ben.username}").json()
        assert (profile["followed_by_me"], profile["follower_count"]) == (True, 1)
        assert [item["id"] for item in ana.http.get("/api/v1/feed").json()["items"]] == [photo]
    finally:
        for name in replicas:
            app_cluster.resume(name)


def test_the_head_arrives_while_the_data_cannot(
    app_cluster: LocalCluster, service: Service, one_on_each: tuple[Person, Person]
) -> None:
    ana, _ = one_on_each
    session = {"session": ana.http.cookies["session"]}  # and no token: lists come from replicas
    replicas = [s.name for name in ("alpha", "beta") for s in app_cluster.replicas(name)]
    for name in replicas:
        app_cluster.pause(name)
    try:
        with httpx.stream("GET", f"{service.url}/", cookies=session, timeout=20) as answer:
            body = answer.iter_text()
            head = next(body)
            assert "style.css" in head
            assert "<main" in head
            assert "Nothing here yet" not in head
            for name in replicas:
                app_cluster.resume(name)
            rest = "".join(body)
            assert "Nothing here yet" in rest
            assert rest.endswith("</html>")
    finally:
        for name in replicas:
            app_cluster.resume(name)
