"""The whole of the service over real HTTP with real pictures."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import pyvips

from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


def test_a_day_in_the_life(join: Join, service: Service) -> None:
    ana, ben = join("ana"), join("ben")

    shared = [ana.upload(pictures.jpeg(gps=True), f"photo {n}").json() for n in range(3)]
    photo = shared[-1]
    assert photo["owner"]["username"] == ana.username
    assert (photo["width"], photo["height"]) == (1080, 810)

    # Every size is a JPEG that anybody may load and browsers keep for ever.
    with service.client() as stranger:
        for size in ("1080", "640", "320", "150"):
            picture = stranger.get(photo["images"][size])
            assert picture.headers["content-type"] == "image/jpeg"
            assert "immutable" in picture.headers["cache-control"]
            assert b"Secret" not in picture.content
            decoded = pyvips.Image.new_from_buffer(picture.content, "")
            assert max(decoded.width, decoded.height) == int(size)

    # Before following the feed is empty, after it newest first.
    assert ben.http.get("/api/v1/feed").json() == {
        "items": [],
        "next_cursor": None,
        "partial": False,
    }
    for _ in range(2):
        assert ben.http.put(f"/api/v1/users/{ana.username}/follow").status_code == 204
    feed = ben.http.get("/api/v1/feed").json()
    assert [item["caption"] for item in feed["items"]] == ["photo 2", "photo 1", "photo 0"]
    profile = ben.http.get(f"/api/v1/users/{ana.username.upper()}").json()
    assert profile["follower_count"] == 1
    assert profile["photo_count"] == 3
    assert profile["followed_by_me"] is True
    wait_until(lambda: followers_of(ana) == [ben.username], 10.0, "the relay adds the other edge")
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["follower_count"] == 1
    following = ben.http.get(f"/api/v1/users/{ben.username}/following").json()
    assert [person["username"] for person in following["items"]] == [ana.username]

    # Likes and comments count once.
    here = f"/api/v1/photos/{photo['id']}"
    for _ in range(2):
        liked = ben.http.put(f"{here}/like").json()
        assert liked == {"photo_id": photo["id"], "like_count": 1, "liked_by_me": True}
    written = ben.http.post(f"{here}/comments", json={"body": " What a <b>light</b>! "})
    assert written.status_code == 201
    comment = written.json()
    assert comment["body"] == "What a <b>light</b>!"
    assert ben.http.get(here).json()["comment_count"] == 1
    assert ben.http.get(here).json()["liked_by_me"] is True
    assert ana.http.get(here).json()["liked_by_me"] is False
    assert ana.http.get(f"{here}/comments").json()["items"] == [comment]
    for _ in range(2):
        assert ben.http.delete(f"{here}/like").json()["like_count"] == 0

    # Only those concerned delete; then nothing is left, not even the files.
    assert ben.http.delete(here).status_code == 403
    assert ana.http.delete(f"{here}/comments/{comment['id']}").status_code == 204
    assert ana.http.get(here).json()["comment_count"] == 0
    assert ana.http.delete(here).status_code == 204
    assert ana.http.get(here).status_code == 404
    assert ana.http.get(photo["images"]["640"]).status_code == 404
    grid = ana.http.get(f"/api/v1/users/{ana.username}/photos").json()
    assert [item["caption"] for item in grid["items"]] == ["photo 1", "photo 0"]

    # Unfollowing empties the feed at once.
    for _ in range(2):
        assert ben.http.delete(f"/api/v1/users/{ana.username}/follow").status_code == 204
    assert ben.http.get("/api/v1/feed").json()["items"] == []
    assert ben.http.get(f"/api/v1/users/{ana.username}").json()["follower_count"] == 0
    wait_until(lambda: followers_of(ana) == [], 10.0, "the relay removes the other edge")
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["follower_count"] == 0


def followers_of(person: Person) -> list[str]:
    answer = person.http.get(f"/api/v1/users/{person.username}/followers")
    return [item["username"] for item in answer.json()["items"]]


def test_feed_pages_have_no_gaps_and_no_repeats(join: Join) -> None:
    reader = join("reader")
    expected: list[str] = []
    for author in [join("author") for _ in range(4)]:
        reader.http.put(f"/api/v1/users/{author.username}/follow").raise_for_status()
        for n in range(3):
            answer = author.upload(pictures.jpeg(64, 48), f"{author.username} {n}")
            expected.append(answer.json()["id"])

    seen: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "5"} | ({"cursor": cursor} if cursor else {})
        page = reader.http.get("/api/v1/feed", params=query).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    # Ids minted within 200 ms of each other on different shards may be out of order.
    assert seen == sorted(expected, key=int, reverse=True)


def test_log_in_and_out(join: Join, service: Service) -> None:
    ana = join("ana")
    cookie = ana.http.cookies["session"]
    assert ana.http.get("/api/v1/me").json()["username"] == ana.username

    with service.client() as other:
        credentials = {"username": f" @{ana.username.upper()}", "password": PASSWORD}
        answer = other.post("/api/v1/sessions", json=credentials)
        assert answer.status_code == 201
        flags = next(c for c in answer.headers.get_list("set-cookie") if c.startswith("session="))
        assert {"httponly", "samesite=lax", "path=/"} <= set(flags.lower().split("; "))
        bearer = {"authorization": f"Bearer {answer.json()['token']}"}
    with service.client() as program:
        assert program.get("/api/v1/me", headers=bearer).status_code == 200

        # A log-out takes effect at once, and only where it was asked for.
        assert ana.http.delete("/api/v1/sessions/current").status_code == 204
        stolen = {"cookie": f"session={cookie}"}
        assert program.get("/api/v1/me", headers=stolen).status_code == 401
        assert program.get("/api/v1/me", headers=bearer).status_code == 200
        everywhere = program.delete(
            "/api/v1/sessions/current", params={"everywhere": "true"}, headers=bearer
        )
        assert everywhere.status_code == 204
        assert program.get("/api/v1/me", headers=bearer).status_code == 401


def test_cookies_behind_tls_are_bound_to_the_host(join: Join, service: Service) -> None:
    ana = join("ana")
    with service.client() as client:
        answer = client.post(
            "/api/v1/sessions",
            json={"username": ana.username, "password": PASSWORD},
            headers={"x-forwarded-proto": "https"},
        )
    cookies = [cookie.lower() for cookie in answer.headers.get_list("set-cookie")]
    assert {cookie.partition("=")[0] for cookie in cookies} == {"__host-session", "shardkit-token"}
    for cookie in cookies:
        assert {"secure", "httponly", "samesite=lax", "path=/"} <= set(cookie.split("; "))


def test_unknown_user_and_wrong_password_look_the_same(join: Join, service: Service) -> None:
    ana = join("ana")
    bodies = []
    with service.client() as client:
        for username, password in (
            (ana.username, "not the password"),
            ("nobody.at.all", "not the password"),
            ("???", "x"),
            (ana.username, ""),
        ):
            answer = client.post(
                "/api/v1/sessions", json={"username": username, "password": password}
            )
            assert answer.status_code == 401
            body = answer.json()
            body.pop("request_id")
            bodies.append(body)
    assert all(body == bodies[0] for body in bodies)


def test_usernames_are_unique_however_written(join: Join, service: Service) -> None:
    ana = join("ana")
    with service.client() as client:
        for name in (ana.username, ana.username.upper(), f"\uff41{ana.username[1:]}"):
            answer = client.post("/api/v1/users", json={"username": name, "password": PASSWORD})
            assert answer.status_code == 409
            assert answer.json()["type"].endswith("username-taken")


def test_profile_can_be_edited(join: Join) -> None:
    ana = join("ana")
    answer = ana.http.patch("/api/v1/me", json={"bio": "light\nand shade", "display_name": "Ana L"})
    assert answer.status_code == 200
    profile = ana.http.get(f"/api/v1/users/{ana.username}").json()
    assert (profile["bio"], profile["display_name"]) == ("light\nand shade", "Ana L")
    assert ana.http.patch("/api/v1/me", json={"is_admin": True}).status_code == 422


def test_ids_are_strings(join: Join) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.png(), "").json()
    for value in (photo["id"], photo["owner"]["id"], ana.id):
        assert isinstance(value, str)
        assert int(value) > 1 << 53


def test_health_and_metrics(service: Service) -> None:
    with service.client() as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        ready = client.get("/readyz")
        assert ready.status_code == 200
        assert (
            ready.json()["parts"] | {"shard:alpha": "up", "shard:beta": "up"}
            == (ready.json()["parts"])
        )
        client.get("/api/v1/photos/123")
        text = client.get("/metrics").text
    assert 'route="/api/v1/photos/{photo_id}"' in text
    assert "/photos/123" not in text


def test_head_is_get_without_the_body(service: Service) -> None:
    with service.client() as client:
        for path in ("/", "/explore", "/healthz", "/api/v1/explore", "/static/style.css"):
            answer = client.head(path)
            assert answer.status_code == 200
            assert answer.content == b""
        assert client.head("/api/v1/photos/1").status_code == 404


def test_openapi_describes_every_operation(service: Service) -> None:
    with service.client() as client:
        document = client.get("/api/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    operations = [
        (path, verb, operation)
        for path, verbs in document["paths"].items()
        for verb, operation in verbs.items()
    ]
    assert len(operations) >= 18
    for path, verb, operation in operations:
        assert path.startswith("/api/v1/"), path
        assert operation["summary"], (verb, path)
        refused = operation["responses"]["4XX"]["content"]
        assert "application/problem+json" in refused


def test_head_of_the_page_comes_first(join: Join, service: Service) -> None:
    ana = join("ana")
    with httpx.stream(
        "GET", f"{service.url}/", cookies=dict(ana.http.cookies), timeout=10
    ) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        first = next(answer.iter_raw())
        assert b"style.css" in first
        assert b"<main" in first
        assert b"</html>" not in first
