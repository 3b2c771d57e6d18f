"""Who follows, asks and blocks whom, and what is then seen of whom."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from app.accounts.models import User
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.graph.tao import Edge
from shardkit import Cluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


def names(person: Person, path: str) -> list[str]:
    answer = person.http.get(f"/api/v1/{path}").raise_for_status()
    return [item["username"] for item in answer.json()["items"]]


def statuses(person: Person, *paths: str) -> set[int]:
    return {person.http.get(path).status_code for path in paths}


def test_a_private_account_is_asked_first(join: Join) -> None:
    ana, ben, cleo = join("ana"), join("ben"), join("cleo")
    ana.http.patch("/api/v1/me", json={"is_private": True}).raise_for_status()
    photo = ana.upload(pictures.jpeg(64, 64), "mine").json()["id"]
    here, profile = f"/api/v1/photos/{photo}", f"/api/v1/users/{ana.username}"

    # Who does not follow sees that there is such a person, and nothing else.
    assert statuses(ben, here, f"{here}/comments", f"{profile}/followers") == {404}
    assert ben.http.get(f"{profile}/photos").json()["items"] == []
    assert ben.http.get(profile).json()["is_open"] is False
    assert "private" in ben.http.get(f"/u/{ana.username}").text
    assert ben.http.put(f"{here}/like").status_code == 404
    assert ben.http.post(f"{here}/comments", json={"body": "hm"}).status_code == 404
    assert photo not in {each["id"] for each in ben.http.get("/api/v1/explore").json()["items"]}

    for person in (ben, cleo):
        for _ in range(2):
            assert person.http.put(f"{profile}/follow").status_code == 202
    assert ben.http.get(profile).json()["requested_by_me"] is True
    asking = {ben.username, cleo.username}
    wait_until(lambda: set(names(ana, "me/requests")) == asking, 20.0, "the relay tells")
    assert ben.username in ana.http.get("/requests").text

    assert ana.http.delete(f"/api/v1/me/requests/{cleo.username}").status_code == 204
    for _ in range(2):
        assert ana.http.put(f"/api/v1/me/requests/{ben.username}").status_code == 204
    assert names(ana, "me/requests") == []  # at once, whatever the relay does
    assert ana.http.put(f"/api/v1/me/requests/{cleo.username}").status_code == 404
    assert statuses(ben, here, f"{here}/comments", f"{profile}/followers") == {200}
    assert ben.http.put(f"{here}/like").json()["like_count"] == 1
    assert statuses(cleo, here) == {404}
    assert [each["id"] for each in ben.http.get("/api/v1/feed").json()["items"]] == [photo]
    wait_until(lambda: names(ana, f"users/{ana.username}/followers") == [ben.username], 20.0, "")

    assert ana.http.delete(f"/api/v1/me/followers/{ben.username}").status_code == 204
    assert ben.http.get("/api/v1/feed").json()["items"] == []
    assert statuses(ben, here) == {404}


def test_a_block_hides_both_at_once_and_ends_what_there_was(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    for one, other in ((ana, ben), (ben, ana)):
        one.http.put(f"/api/v1/users/{other.username}/follow").raise_for_status()
    photos = {
        person.username: person.upload(pictures.jpeg(64, 64)).json()["id"] for person in (ana, ben)
    }
    here = f"/api/v1/photos/{photos[ana.username]}"
    ben.http.post(f"{here}/comments", json={"body": "hello"}).raise_for_status()
    assert len(ben.http.get("/api/v1/feed").json()["items"]) == 2

    for _ in range(2):
        assert ana.http.put(f"/api/v1/users/{ben.username}/block").status_code == 204
    for one, other in ((ana, ben), (ben, ana)):
        mine = [each["id"] for each in one.http.get("/api/v1/feed").json()["items"]]
        assert mine == [photos[one.username]]
        explored = {each["id"] for each in one.http.get("/api/v1/explore").json()["items"]}
        assert photos[other.username] not in explored
        assert statuses(one, f"/api/v1/photos/{photos[other.username]}") == {404}
        assert one.http.put(f"/api/v1/users/{other.username}/follow").status_code == 404
    assert ana.http.get(f"{here}/comments").json()["items"] == []
    assert ben.http.put(f"{here}/like").status_code == 404
    assert statuses(ben, f"/api/v1/users/{ana.username}", f"/u/{ana.username}") == {404}
    assert ana.http.get(f"/api/v1/users/{ben.username}").json()["blocked_by_me"] is True
    assert names(ana, "me/blocks") == [ben.username]
    assert ben.username in ana.http.get("/blocks").text

    assert ana.http.delete(f"/api/v1/users/{ben.username}/block").status_code == 204
    profile = f"/api/v1/users/{ana.username}"
    assert ben.http.get(profile).status_code == 200

    def ended() -> bool:
        mine = ben.http.get(f"/api/v1/users/{ben.username}").json()
        return (mine["following_count"], mine["follower_count"]) == (0, 0)

    wait_until(ended, 20.0, "the relay ends the follow of who was blocked")
    assert ben.http.get(profile).json()["followed_by_me"] is False


def test_pages_and_ranges_are_what_one_list_would_say(service: Service, join: Join) -> None:
    """Against a list in memory, beyond what is cached too."""
    rng = random.Random(7)
    me = int(join("star").id)
    with Cluster.from_file(service.settings.config) as cluster:
        with cluster.writer() as session:
            rows = [
                Assoc(id1=me, atype=int(Kind.PULLED), id2=id2, at=rng.randrange(1, 900))
                for id2 in range(1, 2300)
            ]
            oracle = sorted((Edge(row.at, row.id2) for row in rows), reverse=True)
            session.add_all(rows)
            session.commit()
        args = (me, Kind.PULLED)
        with cluster.reader(after=session.token) as reader:
            assert tao.assoc_count(reader, *args) == len(oracle)
            assert tao.all_ids(reader, *args, 5000) == [edge.id2 for edge in oracle]
            for pos, limit in ((0, 10), (1990, 30), (2290, 30), (2400, 5)):
                assert tao.assoc_range(reader, *args, pos, limit) == oracle[pos : pos + limit]
            for _ in range(10):
                low, high = sorted(rng.sample(range(900), 2))
                found = tao.assoc_time_range(reader, *args, high=high, low=low, limit=40)
                assert found == [edge for edge in oracle if low <= edge.at <= high][:40]
            asked = rng.sample(range(1, 5000), 100)
            found_by_id = tao.assoc_get(reader, *args, asked, low=300)
            assert found_by_id == {
                edge.id2: edge for edge in oracle if edge.id2 in asked and edge.at >= 300
            }
            seen: list[Edge] = []
            while page := tao.assoc_page(reader, *args, seen[-1] if seen else None, 170):
                seen += page
            assert seen == oracle
            assert tao.obj_get(reader, User, [me, me]).keys() == {me}
