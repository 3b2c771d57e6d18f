"""`python -m app.repair` finds what disagrees, mends it, and says nothing when all agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from app.accounts.models import User
from app.graph.models import Assoc, Kind
from app.photos.models import LikeSlot, Photo
from app.repair import KINDS, run
from app.search.models import PersonEntry
from app.tags.models import PhotoTag
from shardkit import Cluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
FOLDER = Path(__file__).parents[2]


def repair(service: Service, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "app.repair", "--config", str(service.settings.config)),
            *("--json", *arguments),
        ],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def followers_of(person: Person) -> set[str]:
    answer = person.http.get(f"/api/v1/users/{person.username}/followers").json()
    return {item["username"] for item in answer["items"]}


def edges(id1: int, kind: Kind) -> Any:
    return delete(Assoc).where(Assoc.id1 == id1, Assoc.atype == int(kind))


def execute(cluster: Cluster, *statements: Any) -> None:
    for statement in statements:
        with cluster.writer() as session:
            session.execute(statement)
            session.commit()


def test_what_disagrees_is_found_and_mended(join: Join, service: Service) -> None:
    star, fans = join("star"), [join("fan") for _ in range(5)]
    for fan in fans:
        fan.http.put(f"/api/v1/users/{star.username}/follow").raise_for_status()
    photo = int(star.upload(pictures.jpeg(64, 64), "#mended").json()["id"])
    fans[0].http.put(f"/api/v1/photos/{photo}/like").raise_for_status()
    wait_until(lambda: len(followers_of(star)) == 5, 10.0, "the relay has been there")

    me = int(star.id)
    with Cluster.from_file(service.settings.config) as cluster:
        run(cluster)  # other tests write rows past the service
        assert run(cluster) == dict.fromkeys(KINDS, 0)
        # By hand: two inverse edges lost, one of nobody who follows, four counts wrong.
        lost = [int(fans[0].id), int(fans[1].id)]
        execute(
            cluster,
            edges(me, Kind.FOLLOWED_BY).where(Assoc.id2.in_(lost)),
            edges(int(fans[2].id), Kind.FOLLOWS).where(Assoc.id2 == me),
            delete(PersonEntry).where(PersonEntry.user_id == me),
            delete(PhotoTag).where(PhotoTag.photo_id == photo),
            update(User).where(User.id == me).values(follower_count=77, photo_count=0),
            update(Photo).where(Photo.owner_id == me, Photo.id == photo).values(like_count=9),
            update(LikeSlot).where(LikeSlot.photo_id == photo).values(n=5),
        )

    found = repair(service, "--dry-run", "--batch", "2")
    expected = dict.fromkeys(KINDS, 0) | {
        "edges.missing": 2,
        "edges.extra": 1,
        "people_index.missing": 1,
        "photo_tags": 1,
        "users.follower_count": 1,
        "users.photo_count": 1,
        "users.following_count": 1,
        "photos.like_count": 1,
        "photos.like_slots": 1,
    }
    assert found == {"dry_run": True, "found": expected}
    assert repair(service, "--dry-run")["found"] == expected, "a dry run changes nothing"

    assert repair(service, "--batch", "2") == {"dry_run": False, "found": expected}
    left = {fan.username for fan in fans if fan is not fans[2]}
    wait_until(lambda: followers_of(star) == left, 10.0, "the relay mends the edges")
    assert repair(service)["found"] == dict.fromkeys(KINDS, 0)
    profile = star.http.get(f"/api/v1/users/{star.username}").json()
    assert (profile["follower_count"], profile["photo_count"]) == (4, 1)
    assert star.http.get(f"/api/v1/photos/{photo}").json()["like_count"] == 1
    tagged = star.http.get("/api/v1/tags/mended/photos").json()["items"]
    assert [item["id"] for item in tagged] == [str(photo)]
    unfollowed = fans[2].http.get(f"/api/v1/users/{fans[2].username}").json()
    assert unfollowed["following_count"] == 0


def test_a_count_of_many_agrees_in_small_pages(join: Join, service: Service) -> None:
    star, fans = join("star"), [join("fan") for _ in range(3)]
    for fan in fans:
        for other in (star, *fans):
            if other is not fan:
                fan.http.put(f"/api/v1/users/{other.username}/follow").raise_for_status()
    wait_until(lambda: len(followers_of(star)) == 3, 10.0, "the relay has been there")
    assert repair(service, "--batch", "1")["found"] == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize("arguments", [["--config", "nothing.toml"], ["--batch", "0"]])
def test_wrong_use_is_said_and_exit_2(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.repair", *arguments],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
