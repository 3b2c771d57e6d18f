"""Tags, threads, saved photos, notifications and search, over real HTTP and with the relay."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from shardkit.testing import wait_until
from tests.app.test_idempotency import three_times
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
SOON = 30.0
"""Seconds for what the relay does, on a machine that has other things to do."""

NOTICES = "/api/v1/me/notifications"


def upload(person: Person, caption: str = "") -> str:
    answer = person.upload(pictures.jpeg(64, 64), caption)
    assert answer.status_code == 201, answer.text
    photo: str = answer.json()["id"]
    return photo


def items(person: Person, path: str, **query: str) -> list[Any]:
    answer = person.http.get(path, params=query)
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()["items"]
    return found


def tagged(person: Person, tag: str) -> list[str]:
    return [each["id"] for each in items(person, f"/api/v1/tags/{tag}/photos", limit="100")]


def test_pages_of_tags_are_newest_first_over_all_shards(join: Join) -> None:
    people = [join("tags") for _ in range(4)]
    tag = f"caf\u00e9_{people[0].username}"
    shown = [upload(each, f"at #{tag.upper()}, really #{tag}") for each in people for _ in range(2)]
    # Ids minted within 200 ms of each other on different shards may be out of order.
    expected = sorted(shown, key=int, reverse=True)

    pages, cursor = [], None
    while True:
        query = {"limit": "3", **({"cursor": cursor} if cursor else {})}
        page = people[1].http.get(f"/api/v1/tags/{tag}/photos", params=query).json()
        pages.append([each["id"] for each in page["items"]])
        if (cursor := page["next_cursor"]) is None:
            break
    assert [each for page in pages for each in page] == expected
    assert [len(page) for page in pages] == [3, 3, 2]

    def counted() -> bool:
        return bool(searched(people[0], f"#{tag}")["tags"] == [{"name": tag, "photo_count": 8}])

    wait_until(counted, SOON, "the relay counts the tag")
    for photo in shown[1:]:
        owner = people[shown.index(photo) // 2]
        owner.http.delete(f"/api/v1/photos/{photo}").raise_for_status()
    assert tagged(people[0], tag) == [shown[0]]
    assert people[0].http.get("/api/v1/tags/%23/photos").status_code == 404


def test_tags_of_comments_count_for_the_owner_only(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    photo = upload(ana, "nothing")
    tag = f"later{ana.username}"
    here = f"/api/v1/photos/{photo}/comments"
    ben.http.post(here, json={"body": f"#{tag}"}).raise_for_status()
    assert tagged(ana, tag) == []
    own = ana.http.post(here, json={"body": f"#{tag} #other{tag}"}).json()["id"]
    assert tagged(ben, tag) == [photo]
    ana.http.delete(f"{here}/{own}").raise_for_status()
    assert tagged(ben, tag) == []


def test_threads(join: Join) -> None:
    ana, ben, cleo = join("ana"), join("ben"), join("cleo")
    photo = upload(ana)
    here = f"/api/v1/photos/{photo}/comments"

    def write(person: Person, body: str, parent: str | None = None) -> dict[str, Any]:
        answer = person.http.post(here, json={"body": body, "parent_id": parent})
        assert answer.status_code == 201, answer.text
        written: dict[str, Any] = answer.json()
        return written

    top = write(ben, "first")
    other = write(cleo, "second")
    answers = [write(ana, f"answer {n}", top["id"]) for n in range(4)]
    deeper = write(cleo, "answer to an answer", answers[0]["id"])
    assert deeper["parent_id"] == top["id"]

    shown = items(ana, here)
    assert [each["id"] for each in shown] == [top["id"], other["id"]]
    assert (shown[0]["reply_count"], shown[1]["reply_count"]) == (5, 0)
    assert [each["id"] for each in shown[0]["replies"]] == [each["id"] for each in answers[:3]]
    first = ana.http.get(f"{here}/{top['id']}/replies", params={"limit": "4"}).json()
    assert [each["body"] for each in first["items"]] == [f"answer {n}" for n in range(4)]
    rest = items(ana, f"{here}/{top['id']}/replies", cursor=first["next_cursor"])
    assert [each["id"] for each in rest] == [deeper["id"]]

    # An answer goes alone; the comment at the top takes the others along.
    assert ben.http.delete(f"{here}/{answers[3]['id']}").status_code == 403
    three_times(ana.http, "DELETE", f"{here}/{answers[3]['id']}")
    assert ana.http.get(f"/api/v1/photos/{photo}").json()["comment_count"] == 6
    three_times(ben.http, "DELETE", f"{here}/{top['id']}")
    assert ana.http.get(f"/api/v1/photos/{photo}").json()["comment_count"] == 1
    assert [each["id"] for each in items(ana, here)] == [other["id"]]
    assert ana.http.get(f"{here}/{top['id']}/replies").status_code == 404
    for parent in (top["id"], photo, str(int(photo) + 1)):
        answer = ana.http.post(here, json={"body": "to nobody", "parent_id": parent})
        assert answer.status_code == 404


def test_saved_photos_are_private_and_paged(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    photos = [upload(ana, f"photo {n}") for n in range(3)]
    for photo in photos:
        three_times(ben.http, "PUT", f"/api/v1/photos/{photo}/save")
        ben.http.put(f"/api/v1/photos/{photo}/save").raise_for_status()
    page = ben.http.get("/api/v1/me/saves", params={"limit": "2"}).json()
    rest = items(ben, "/api/v1/me/saves", cursor=page["next_cursor"])
    assert [each["id"] for each in [*page["items"], *rest]] == photos[::-1]
    assert items(ana, "/api/v1/me/saves") == []
    three_times(ben.http, "DELETE", f"/api/v1/photos/{photos[1]}/save")
    ana.http.delete(f"/api/v1/photos/{photos[2]}").raise_for_status()
    assert [each["id"] for each in items(ben, "/api/v1/me/saves")] == [photos[0]]
    assert ben.http.put(f"/api/v1/photos/{photos[2]}/save").status_code == 404
    # Who may no longer see a photo has it no longer.
    ana.http.put(f"/api/v1/users/{ben.username}/block").raise_for_status()
    assert items(ben, "/api/v1/me/saves") == []


def kinds(person: Person) -> list[tuple[str, int, bool]]:
    return [(each["kind"], each["count"], each["unread"]) for each in items(person, NOTICES)]


def test_what_happens_is_told_grouped_and_taken_back(join: Join) -> None:
    ana, ben, cleo = join("ana"), join("ben"), join("cleo")
    photo = upload(ana, f"with @{ben.username}")
    here = f"/api/v1/photos/{photo}"
    for person in (ben, cleo, ana):
        person.http.put(f"{here}/like").raise_for_status()
    top = ben.http.post(f"{here}/comments", json={"body": f"@{cleo.username} look"}).json()
    cleo.http.post(
        f"{here}/comments", json={"body": "yes", "parent_id": top["id"]}
    ).raise_for_status()
    cleo.http.put(f"/api/v1/users/{ana.username}/follow").raise_for_status()

    expected = {("like", 2, True), ("comment", 2, True), ("follow", 1, True)}
    wait_until(lambda: set(kinds(ana)) == expected, SOON, "ana is told")
    wait_until(
        lambda: {kind for kind, *_ in kinds(ben)} == {"mention", "reply"}, SOON, "ben is told"
    )
    wait_until(lambda: kinds(cleo) == [("mention", 1, True)], SOON, "cleo is told")
    likes = next(each for each in items(ana, NOTICES) if each["kind"] == "like")
    assert {each["username"] for each in likes["actors"]} == {ben.username, cleo.username}
    assert likes["photo"].endswith("/150.jpg")

    paged, cursor = [], None
    while True:
        query = {"limit": "1", **({"cursor": cursor} if cursor else {})}
        page = ana.http.get(NOTICES, params=query).json()
        paged += [each["kind"] for each in page["items"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert sorted(paged) == ["comment", "follow", "like"]

    assert ana.http.get(f"{NOTICES}/unread").json() == {"unread": 5}
    newest = items(ana, NOTICES)[0]["seq"]
    assert three_times(ana.http, "PUT", f"{NOTICES}/read", json={"seq": newest}).json() == {
        "unread": 0
    }
    ana.http.put(f"{NOTICES}/read", json={"seq": "0"}).raise_for_status()
    assert {unread for *_, unread in kinds(ana)} == {False}

    # What is taken back is no longer told; what a photo leaves goes with it, everywhere.
    ben.http.delete(f"{here}/like").raise_for_status()
    cleo.http.delete(f"/api/v1/users/{ana.username}/follow").raise_for_status()
    wait_until(
        lambda: set(kinds(ana)) == {("like", 1, False), ("comment", 2, False)}, SOON, "taken back"
    )
    ben.http.delete(f"{here}/comments/{top['id']}").raise_for_status()
    wait_until(lambda: kinds(cleo) == [], SOON, "cleo is no longer mentioned")
    wait_until(lambda: kinds(ana) == [("like", 1, False)], SOON, "the thread is gone")
    ana.http.delete(here).raise_for_status()
    wait_until(lambda: kinds(ben) == [] and kinds(ana) == [], SOON, "the photo is gone")


def test_nobody_is_told_by_who_is_blocked(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    photo = upload(ana)
    ben.http.put(f"/api/v1/photos/{photo}/like").raise_for_status()
    wait_until(lambda: len(kinds(ana)) == 1, SOON, "ana is told")
    ana.http.put(f"/api/v1/users/{ben.username}/block").raise_for_status()
    assert kinds(ana) == []
    other = upload(ben, f"@{ana.username}")
    # Told after it, in the order of ben's photo: the first one was not.
    ben.http.delete(f"/api/v1/photos/{other}").raise_for_status()
    ana.http.delete(f"/api/v1/users/{ben.username}/block").raise_for_status()
    wait_until(lambda: [kind for kind, *_ in kinds(ana)] == ["like"], SOON, "the block is over")


@contextmanager
def listening(
    service: Service, person: Person, last: str | None = None
) -> Iterator[Iterator[dict[str, Any]]]:
    """Open a stream of notifications and yield its events."""
    headers = {} if last is None else {"last-event-id": last}
    cookies = dict(person.http.cookies)
    url = f"{service.url}{NOTICES}/stream"
    with httpx.stream("GET", url, cookies=cookies, headers=headers, timeout=SOON) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        lines = answer.iter_lines()
        assert next(lines).startswith("retry:")

        def events() -> Iterator[dict[str, Any]]:
            number = ""
            for line in lines:
                name, _, value = line.partition(": ")
                if name == "id":
                    number = value
                elif name == "data":
                    yield {"id": number, **json.loads(value)}

        yield events()


def test_streams_tell_at_once_and_go_on_where_they_were(join: Join, service: Service) -> None:
    ana, ben = join("ana"), join("ben")
    photos = [upload(ana) for _ in range(4)]

    def like(n: int) -> None:
        ben.http.put(f"/api/v1/photos/{photos[n]}/like").raise_for_status()

    with listening(service, ana) as events, listening(service, ana) as others:
        like(0)
        first = next(events)
        assert (first["kind"], first["photo_id"]) == ("like", photos[0])
        assert first["actor"]["username"] == ben.username
        assert next(others) == first
        ben.http.put(f"/api/v1/photos/{photos[0]}/like").raise_for_status()  # nothing new
        like(1)
        assert next(events)["photo_id"] == photos[1]
    for n in (2, 3):  # nobody listens
        like(n)
    wait_until(lambda: len(items(ana, NOTICES)) == 4, SOON, "ana is told")
    with listening(service, ana, first["id"]) as events:
        missed = [next(events) for _ in range(3)]
    assert sorted(each["photo_id"] for each in missed) == sorted(photos[1:])
    assert [each["id"] for each in missed] == [each["seq"] for each in missed]


def test_a_stream_ends_with_its_login(join: Join, service: Service) -> None:
    ana = join("ana")
    with listening(service, ana) as events:
        ana.http.delete("/api/v1/sessions/current").raise_for_status()
        assert list(events) == []


def test_what_is_no_stream(join: Join, service: Service) -> None:
    ana = join("ana")
    stream = f"{NOTICES}/stream"
    for last in ("-1", "x", "1.5", "9" * 30):
        answer = ana.http.get(stream, headers={"last-event-id": last})
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
    assert ana.http.head(stream).status_code == 200
    with service.client() as stranger:
        assert stranger.get(stream).status_code == 401
        for path in ("/api/v1/me/saves", NOTICES, "/api/v1/stories"):
            assert stranger.get(path).status_code == 401


_limits = itertools.cycle(range(20, 51))
"""Of searches, each another one: an answer is kept for some seconds, which a test need not wait."""


def searched(person: Person, text: str) -> dict[str, Any]:
    query = {"q": text, "limit": str(next(_limits))}
    answer = person.http.get("/api/v1/search", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def found(person: Person, text: str) -> list[str]:
    return [each["username"] for each in searched(person, text)["people"]]


def test_search_of_people(join: Join) -> None:
    people = [join("quixote") for _ in range(3)]
    ana = people[0]
    ana.http.patch("/api/v1/me", json={"display_name": "Zo\u00eb Quetzalcoatl"}).raise_for_status()
    wait_until(lambda: len(found(ana, "quixote")) == 3, SOON, "people are found")
    # By the beginning, by a word of the name without its marks, misspelt, by two words.
    wait_until(lambda: found(ana, "quetzal") == [ana.username], SOON, "the new name is found")
    assert found(ana, "zoe QUETZ")[0] == ana.username
    assert ana.username in found(ana, "quetzalcotl")
    assert {each.username for each in people} <= set(found(ana, "quixotte"))
    assert found(ana, people[1].username)[0] == people[1].username
    for text in ("", "'", "' & !", "\\", "%", "#", "@", "a" * 100, "\u202e", "!!(:*"):
        assert isinstance(found(ana, text), list)
    assert ana.http.get("/api/v1/search", params={"q": "a" * 101}).status_code == 422
    people[1].http.put(f"/api/v1/users/{ana.username}/block").raise_for_status()
    assert people[1].username not in found(ana, "quixote")
    page = ana.http.get("/search", params={"q": "quix"}).text
    assert people[2].username in page


def test_search_of_hashtags(join: Join) -> None:
    ana = join("ana")
    tag = f"bioluminescence{ana.username}"
    upload(ana, f"#{tag} #{tag}two")
    upload(ana, f"#{tag}two")

    def tags(text: str) -> list[tuple[str, int]]:
        return [(each["name"], each["photo_count"]) for each in searched(ana, text)["tags"]]

    both = [(f"{tag}two", 2), (tag, 1)]
    wait_until(lambda: tags(f"#{tag[:-1]}") == both, SOON, "tags are found by their beginning")
    assert tags(f"#{tag.upper()}")[0] == (tag, 1)
    assert tag in [name for name, _ in tags(f"#biolumminescence{ana.username}")]
    assert tags(f"@{tag}") == []
