"""The site through nginx: people, photos, feeds and what the relays do; and containers that die."""

from __future__ import annotations

import itertools

import httpx
import pyvips

from shardkit.clock import SYSTEM
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.stack import Stack
from tests.fixtures.visitors import Visit, Visitor

WINDOW = 30.0
"""Seconds after a container has died in which an attempt may fail; each request is answered all
the same. Of these, 10 are what PostgreSQL may take to notice that a replica is gone whose log it
waits for; the rest is for a machine that is busy."""

AFTERWARDS = 25
"""Requests of each kind that must succeed at once when the window is over."""

BACK = 180.0
"""Seconds until a container that was started again is healthy."""


def test_a_photo_reaches_a_follower(stack: Stack, visit: Visit) -> None:
    ana, ben = visit("ana"), visit("ben")
    answer = ana.ask(
        "POST",
        "/api/v1/photos",
        files={"file": ("dawn.jpg", pictures.jpeg(gps=True))},
        data={"caption": "dawn"},
    )
    assert answer.status_code == 201, answer.text
    photo = answer.json()
    assert ben.ask("PUT", f"/api/v1/users/{ana.username}/follow").status_code == 204

    feed = ben.ask("GET", "/api/v1/feed").json()
    assert [item["id"] for item in feed["items"]] == [photo["id"]]
    assert feed["partial"] is False

    # Every process of the service has the pictures, whoever took them in.
    for _ in range(6):
        with httpx.Client(base_url=stack.url) as stranger:
            picture = stranger.get(photo["images"]["640"])
        assert picture.status_code == 200
        assert pyvips.Image.new_from_buffer(picture.content, "").width == 640
        assert b"Secret" not in picture.content

    wait_until(lambda: followers_of(ana) == [ben.username], BACK, "a relay adds the other edge")
    page = httpx.get(f"{stack.url}/")
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert not ana.failures + ben.failures


def test_both_processes_serve_and_metrics_stay_inside(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url) as client:
        assert client.get("/metrics").status_code == 404
        assert client.get("/readyz").json()["status"] == "ready"
        for _ in range(40):
            assert client.get("/healthz").status_code == 200
    seen = stack.command("logs", "--no-color", "nginx")
    addresses = {line.split()[-1] for line in seen.splitlines() if "/healthz 200" in line}
    assert len(addresses) == len(stack.containers("app")) == 2


def test_the_synchronous_replica_dies(stack: Stack, visit: Visit) -> None:
    ana, ben = couple(visit)
    assert synchronous(stack) == "alpha_1"
    victim = stack.container("alpha-1")

    stack.engine("kill", victim)
    keep_on(ana, ben, since=SYSTEM.monotonic())
    assert stack.state(victim) == "exited", "nobody starts what was killed by hand"
    assert synchronous(stack) == "alpha_2", "the next one takes its place"

    stack.engine("start", victim)
    wait_until(lambda: stack.state(victim) == "healthy", BACK, "the replica is back")
    wait_until(lambda: synchronous(stack) == "alpha_1", BACK, "it follows again")


def test_a_process_of_the_service_dies(stack: Stack, visit: Visit) -> None:
    ana, ben = couple(visit)
    victim, other = stack.containers("app")

    stack.engine("kill", victim)
    keep_on(ana, ben, since=SYSTEM.monotonic())
    assert stack.state(other) == "healthy"

    stack.up()  # what was killed comes back, and the jobs find nothing to do
    assert stack.state(victim) == "healthy"


def test_what_crashes_is_started_again(stack: Stack, visit: Visit) -> None:
    ana, ben = couple(visit)
    victims = [stack.containers("app")[0], stack.containers("relay")[0]]
    before = {each: stack.inspect(each)[0]["State"]["StartedAt"] for each in victims}

    for each in victims:
        # The program, not the init process that waits for it: a crash, nobody's order.
        stack.engine("exec", each, "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
    keep_on(ana, ben, since=SYSTEM.monotonic())

    def are_back() -> bool:
        return all(
            stack.state(each) == "healthy"
            and stack.inspect(each)[0]["State"]["StartedAt"] != before[each]
            for each in victims
        )

    wait_until(are_back, BACK, "both have been started again")


def couple(visit: Visit) -> tuple[Visitor, Visitor]:
    """Return two people who do not know each other yet."""
    return visit("ana"), visit("ben")


def keep_on(ana: Visitor, ben: Visitor, *, since: float) -> None:
    """Use the site during the window and beyond: each request is answered, and soon at once.

    Ben follows, ana publishes, ben finds the photo in the feed and comments on it. In the end no
    photo and no comment is there twice, and the relays have done what there was to do.
    """
    captions = itertools.count()
    published: list[str] = []
    after = 0
    assert ben.ask("PUT", f"/api/v1/users/{ana.username}/follow").status_code == 204
    while after < AFTERWARDS:
        is_over = SYSTEM.monotonic() > since + WINDOW
        photo = ana.ask(
            "POST",
            "/api/v1/photos",
            files={"file": ("small.jpg", pictures.jpeg(320, 240))},
            data={"caption": f"photo {next(captions)}"},
        )
        assert photo.status_code == 201, photo.text
        published.append(photo.json()["id"])
        # Ben has no token of what ana wrote: a replica may show it to him a moment later.
        wait_until(lambda: published[-1] in feed_of(ben), WINDOW, "the photo is in the feed")
        comment = ben.ask(
            "POST", f"/api/v1/photos/{published[-1]}/comments", json={"body": "what a light"}
        )
        assert comment.status_code == 201, comment.text
        after += is_over
    failed = [each.at - since for each in ana.failures + ben.failures]
    print(
        f"{len(published)} photos; {len(failed)} attempts failed, the last after {max(failed, default=0):.1f} s"
    )
    late = [each for each in ana.failures + ben.failures if each.at > since + WINDOW]
    assert not late, f"{WINDOW:g} s after the death, attempts still fail: {late}"

    mine = ana.ask("GET", f"/api/v1/users/{ana.username}").json()
    assert mine["photo_count"] == len(published)
    last = ana.ask("GET", f"/api/v1/photos/{published[-1]}/comments").json()["items"]
    assert [each["author"]["username"] for each in last] == [ben.username]
    wait_until(lambda: followers_of(ana) == [ben.username], BACK, "a relay adds the other edge")


def feed_of(person: Visitor) -> list[str]:
    return [item["id"] for item in person.ask("GET", "/api/v1/feed").json()["items"]]


def followers_of(person: Visitor) -> list[str]:
    answer = person.ask("GET", f"/api/v1/users/{person.username}/followers").json()
    return [each["username"] for each in answer["items"]]


def synchronous(stack: Stack) -> str:
    """Return the replica of alpha that commits wait for."""
    question = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'"
    return stack.command(
        "exec", "-T", "alpha-0", "psql", "-XAtq", "-h", "/var/run/postgresql", "-c", question
    ).strip()
