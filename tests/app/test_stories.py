"""Stories are there for 24 hours by the clock, to the second; then nothing of them is served."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from sqlalchemy import select

from app.clock import utc_now
from app.photos.opening import open_blobs
from app.removal import forget_person
from app.stories.cleanup import sweep
from app.stories.models import Story, StoryView
from shardkit import AsyncCluster, Cluster
from shardkit.local import LocalCluster
from tests.app.test_idempotency import three_times
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service, serving

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


@dataclass
class Moved:
    """A clock that stands where a test has put it."""

    now: dt.datetime = field(default_factory=utc_now)

    def __call__(self) -> dt.datetime:
        return self.now


@pytest.fixture
def clock() -> Moved:
    return Moved()


@pytest.fixture
def later(service: Service, clock: Moved) -> Iterator[Service]:
    """The service with a clock that tests move."""
    with serving(service.settings, clock) as running:
        yield running


def post(client: httpx.Client, caption: str = "") -> dict[str, object]:
    file = {"file": ("story.jpg", pictures.jpeg(64, 48))}
    answer = client.post("/api/v1/stories", files=file, data={"caption": caption})
    assert answer.status_code == 201, answer.text
    made: dict[str, object] = answer.json()
    return made


def keys(service: Service) -> set[str]:
    """Return the keys of all pictures that are stored."""

    async def read() -> set[str]:
        blobs = open_blobs(service.settings)
        try:
            return {key async for key in blobs.iterate_keys()}
        finally:
            await blobs.close()

    return asyncio.run(read())


def rows(cluster: Cluster, owner: Person, story_id: int) -> tuple[list[int], list[int]]:
    """Return ids of somebody's stories, and a story's once for each view that is kept of it."""
    with cluster.writer() as session:
        stories = select(Story.id).where(Story.owner_id == int(owner.id)).order_by(Story.id)
        views = select(StoryView.story_id).where(StoryView.story_id == story_id)
        return list(session.scalars(stories)), list(session.scalars(views))


def test_a_story_ends_after_24_hours(
    join: Join, later: Service, clock: Moved, app_cluster: LocalCluster
) -> None:
    ana, ben = join("ana"), join("ben")
    ben.http.put(f"/api/v1/users/{ana.username}/follow").raise_for_status()
    with later.client() as owner, later.client() as viewer:
        owner.cookies, viewer.cookies = ana.http.cookies, ben.http.cookies
        began = clock.now
        story = post(owner, "On the way")
        here = f"/api/v1/stories/{story['id']}"
        picture = str(story["images"]["640"])  # type: ignore[index]
        assert viewer.put(f"{here}/view").status_code == 204

        def served() -> dict[str, bool]:
            """Return what is served of it, by where."""
            mine = f"/api/v1/users/{ana.username}/stories"
            return {
                "itself": viewer.get(here).status_code == 200,
                "its bytes": viewer.get(picture).status_code == 200,
                "its owner's": bool(viewer.get(mine).json()["stories"]),
                "everybody's": bool(viewer.get("/api/v1/stories").json()["items"]),
                "for its owner": bool(owner.get("/api/v1/stories").json()["items"]),
                "its viewers": owner.get(f"{here}/viewers").status_code == 200,
                "its page": viewer.get(f"/stories/{ana.username}").status_code == 200,
                "home": f'data-story="{ana.username}"' in viewer.get("/").text,
                "another look": viewer.put(f"{here}/view").status_code == 204,
            }

        assert set(served().values()) == {True}
        clock.now = began + dt.timedelta(hours=24) - dt.timedelta(seconds=1)
        assert set(served().values()) == {True}
        kept = viewer.get(picture).headers["cache-control"]
        assert kept == "private, max-age=1"
        for seconds in (0, 1, 86_400):
            clock.now = began + dt.timedelta(hours=24, seconds=seconds)
            assert {name for name, is_there in served().items() if is_there} == set()

    # The sweep was not needed for that; it removes the rows and the bytes.
    async def swept() -> tuple[int, int]:
        blobs = open_blobs(later.settings)
        async with AsyncCluster.from_file(app_cluster.config_path) as cluster:
            early = await sweep(cluster, blobs, began)
            late = await sweep(cluster, blobs, clock.now)
        await blobs.close()
        return early, late

    with Cluster.from_file(app_cluster.config_path) as cluster:
        number = int(str(story["id"]))
        assert rows(cluster, ana, number) == ([number], [number])
        kept_before = keys(later)
        early, done = asyncio.run(swept())
        assert early == 0
        assert done >= 1  # and what other tests have posted
        assert rows(cluster, ana, number) == ([], [])
        assert len(kept_before - keys(later)) == done


def test_who_sees_stories_and_who_has_seen_them(join: Join, service: Service) -> None:
    ana, ben, cleo = join("ana"), join("ben"), join("cleo")
    stories = [post(ana.http, f"story {n}") for n in range(2)]
    mine = f"/api/v1/users/{ana.username}/stories"
    first, second = (f"/api/v1/stories/{story['id']}" for story in stories)
    for person in (ben, cleo):
        three_times(person.http, "PUT", f"{first}/view")
        person.http.put(f"{first}/view").raise_for_status()
    ana.http.put(f"{first}/view").raise_for_status()  # one's own does not count

    shown = ben.http.get(mine).json()
    assert [each["seen_by_me"] for each in shown["stories"]] == [True, False]
    assert shown["all_seen"] is False
    assert {each["view_count"] for each in shown["stories"]} == {None}
    assert ben.http.get("/api/v1/stories").json()["items"] == []  # ben does not follow ana
    assert [each["view_count"] for each in ana.http.get(mine).json()["stories"]] == [2, 0]
    page = ana.http.get(f"{first}/viewers", params={"limit": "1"}).json()
    rest = ana.http.get(f"{first}/viewers", params={"cursor": page["next_cursor"]}).json()
    seen = [each["person"]["username"] for each in [*page["items"], *rest["items"]]]
    assert seen == [cleo.username, ben.username]
    assert ben.http.get(f"{first}/viewers").status_code == 403
    assert ben.http.delete(first).status_code == 403

    # No address gives the bytes away: not to strangers, and not by the key of the store.
    picture = ben.http.get(second).json()["images"]["150"]
    with service.client() as stranger:
        assert stranger.get(picture).status_code == 401
        assert stranger.get(mine).status_code == 401
    assert "/stories/" in picture
    ana.http.put(f"/api/v1/users/{ben.username}/block").raise_for_status()
    for path in (first, picture, mine):
        assert ben.http.get(path).status_code == 404
    assert ben.http.put(f"{second}/view").status_code == 404
    three_times(ana.http, "DELETE", second)
    assert cleo.http.get(second).status_code == 404
    assert cleo.http.get(picture).status_code == 404


def test_a_story_is_posted_once_and_refused_like_a_photo(join: Join, service: Service) -> None:
    ana = join("ana")
    before = keys(service)
    picture = ("a.jpg", pictures.jpeg(64, 64))
    once = {"file": picture, "caption": (None, "once")}
    three_times(ana.http, "POST", "/api/v1/stories", files=once)
    assert len(ana.http.get("/api/v1/stories").json()["items"][0]["stories"]) == 1
    assert len(keys(service) - before) == 1
    for data, status in ((b"", 422), (b"GIF89a", 415), (pictures.bomb_png(), 422)):
        answer = ana.http.post("/api/v1/stories", files={"file": ("a.jpg", data)})
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
    long = ana.http.post("/api/v1/stories", files={"file": picture, "caption": (None, "x" * 501)})
    assert long.status_code == 422


def test_a_person_who_goes_leaves_nothing(join: Join, app_cluster: LocalCluster) -> None:
    ana, ben = join("gone"), join("ben")
    photo = ben.upload(pictures.jpeg(64, 64)).json()["id"]
    theirs, own = post(ben.http), post(ana.http)
    ana.http.put(f"/api/v1/photos/{photo}/save").raise_for_status()
    ana.http.put(f"/api/v1/stories/{theirs['id']}/view").raise_for_status()
    with Cluster.from_file(app_cluster.config_path) as cluster:
        forget_person(cluster, int(ana.id), utc_now())
        forget_person(cluster, int(ana.id), utc_now())
        assert rows(cluster, ben, int(str(theirs["id"])))[1] == []
    assert ana.http.get("/api/v1/me/saves").json()["items"] == []
    assert ben.http.get(f"/api/v1/stories/{own['id']}").status_code == 404
