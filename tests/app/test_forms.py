"""A form of the pages that is sent again does nothing more and leads to the same place."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from app.web.forms import new_key
from tests.fixtures import pictures
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


class Forms(HTMLParser):
    """The forms of a page that are sent with POST: their hidden fields, by action."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {}
        self._fields: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self._fields = {}
            if given.get("method") == "post":
                self.found[given["action"] or ""] = self._fields
        elif tag == "input" and given.get("type") == "hidden":
            self._fields[given["name"] or ""] = given["value"] or ""


def forms(client: httpx.Client, path: str) -> dict[str, dict[str, str]]:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return Forms(answer.text).found


def send(client: httpx.Client, page: str, action: str, **fields: Any) -> httpx.Response:
    """Open a page and send one of its forms three times; all answers are the first one's."""
    files = {name: fields.pop(name) for name in ("file",) if name in fields}
    data = forms(client, page)[action] | fields
    first, *others = [client.post(action, data=data, files=files or None) for _ in range(3)]
    assert first.status_code == 303, first.text
    for other in others:
        assert (other.status_code, other.headers["location"]) == (303, first.headers["location"])
    return first


def test_every_form_that_changes_something_has_a_key_of_its_own(
    join: Join, service: Service
) -> None:
    ana, ben = join("ana"), join("ben")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    ana.http.put(f"/api/v1/users/{ben.username}/follow").raise_for_status()
    ana.http.post(f"/api/v1/photos/{photo}/comments", json={"body": "x"}).raise_for_status()
    keys, actions = [], set()
    with service.client() as stranger:
        pages = [
            *((stranger, path) for path in ("/signup", "/login")),
            *(
                (ana.http, path)
                for path in (
                    "/", "/explore", "/upload", "/settings", f"/p/{photo}", f"/u/{ben.username}",
                    f"/u/{ana.username}/following", f"/u/{ben.username}", "/upload", "/stories/new",
                )
            ),
        ]  # fmt: skip
        for client, path in pages:
            for action, fields in forms(client, path).items():
                if action != "/logout":  # ends what has ended already
                    keys.append(fields["key"])
                    actions.add(re.sub(r"\d+|(?<=/u/)[^/]+", "…", action))
    assert len(keys) == len(set(keys)), "each page has keys of its own"
    assert actions == {
        "/signup", "/login", "/upload", "/settings", "/p/…/like", "/p/…/delete",
        "/p/…/comments", "/p/…/comments/…/delete", "/u/…/unfollow", "/u/…/block", "/p/…/save",
        "/stories/new", "/feed-order",
    }  # fmt: skip


def test_what_is_sent_again_is_done_once(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    upload = send(
        ana.http, "/upload", "/upload", caption="Once", file=("p.jpg", pictures.jpeg(64, 64))
    )
    here = upload.headers["location"]
    assert len(ana.http.get(f"/api/v1/users/{ana.username}/photos").json()["items"]) == 1

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = ana.http.get(f"/api/v1/photos/{here[3:]}").json()
        return found

    written = send(ben.http, here, f"{here}/comments", body="Hm.").headers["location"]
    send(ben.http, here, f"{here}/like")
    assert (shown()["comment_count"], shown()["like_count"]) == (1, 1)
    send(ben.http, here, f"{here}/unlike")
    number = written.partition("#c")[2]
    send(ben.http, here, f"{here}/comments/{number}/delete")
    assert (shown()["comment_count"], shown()["like_count"]) == (0, 0)

    profile = f"/u/{ana.username}"
    send(ben.http, profile, f"{profile}/follow")
    assert ben.http.get(f"/api/v1/users/{ben.username}").json()["following_count"] == 1
    send(ben.http, profile, f"{profile}/unfollow")
    assert ben.http.get(f"/api/v1/users/{ben.username}").json()["following_count"] == 0
    send(ana.http, "/settings", "/settings", display_name="Ana", bio="light")
    send(ana.http, here, f"{here}/delete")
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["photo_count"] == 0


def test_a_form_that_is_filled_in_anew_is_another_request(join: Join) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    action = f"/p/{photo}/comments"
    hidden = forms(ana.http, f"/p/{photo}")[action]
    for body in ("One", "Two", "One"):
        assert ana.http.post(action, data=hidden | {"body": body}).status_code == 303
    comments = ana.http.get(f"/api/v1/photos/{photo}/comments").json()["items"]
    assert [comment["body"] for comment in comments] == ["One", "Two"]
    # So it is with the form of another page, and of another person with the same key.
    send(ana.http, f"/p/{photo}", action, body="One")
    ben = join("ben")
    assert ben.http.post(action, data=hidden | {"body": "One"}).status_code == 303
    assert ana.http.get(f"/api/v1/photos/{photo}").json()["comment_count"] == 4


def test_a_sign_up_that_is_sent_again_is_logged_in(service: Service) -> None:
    wanted = {"username": f"form{new_key()[:8].lower().replace('-', '_')}x", "display_name": ""}
    with service.client() as client:
        hidden = forms(client, "/signup")["/signup"]
        filled = hidden | wanted | {"password": PASSWORD}
        sessions = set()
        for _ in range(2):
            answer = client.post("/signup", data=filled)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            sessions.add(client.cookies["session"])
            client.cookies.clear()
        assert len(sessions) == 1
        stolen = client.post("/signup", data=filled | {"password": "another long sentence"})
        assert stolen.status_code == 409
        given = {"username": wanted["username"], "password": PASSWORD}
        for _ in range(2):  # two pages, two log-ins
            filled = forms(client, "/login")["/login"] | given
            for _ in range(2):
                assert client.post("/login", data=filled).status_code == 303
                sessions.add(client.cookies["session"])
                client.cookies.clear()
        assert len(sessions) == 3


def test_of_two_submissions_at_once_one_has_an_effect(join: Join) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    comments = f"/p/{photo}/comments"
    comment = forms(ana.http, f"/p/{photo}")[comments] | {"body": "At once"}
    upload = forms(ana.http, "/upload")["/upload"] | {"caption": "At once"}
    file = {"file": ("p.jpg", pictures.jpeg(64, 64))}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            said = [pool.submit(ana.http.post, comments, data=comment) for _ in range(2)]
            sent = [
                pool.submit(ana.http.post, "/upload", data=upload, files=file) for _ in range(2)
            ]
            for pair in (said, sent):
                answers = [each.result() for each in pair]
                assert [answer.status_code for answer in answers] == [303, 303]
                assert len({answer.headers["location"] for answer in answers}) == 1
    assert ana.http.get(f"/api/v1/photos/{photo}").json()["comment_count"] == 1
    assert len(ana.http.get(f"/api/v1/users/{ana.username}/photos").json()["items"]) == 2


@pytest.mark.parametrize(
    "key",
    [
        "", "x" * 15, "x" * 65, "x" * 10_240, "key\0of sixteen and more", "key\nof-sixteen-and-more",
        "\x1b" * 20, "\x85" * 20, "ключ" * 5, "\u0661" * 20, "a key, with spaces", "'; DROP TABLE x; --'",
        "x" * 20 + "\n",
    ],
)  # fmt: skip
def test_a_key_that_no_page_made_is_refused(join: Join, key: str) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    file = {"file": ("p.jpg", pictures.jpeg(64, 64))}
    answers = [
        ana.http.post(f"/p/{photo}/comments", data={"body": "x", "key": key}),
        ana.http.post(f"/p/{photo}/like", data={"key": key}),
        ana.http.post(f"/p/{photo}/delete", data={"key": key}),
        ana.http.post("/upload", data={"key": key}, files=file),
        ana.http.post("/settings", data={"bio": "x", "key": key}),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "This form is not one of ours" in answer.text
    shown = ana.http.get(f"/api/v1/photos/{photo}").json()
    assert (shown["comment_count"], shown["like_count"]) == (0, 0)


def test_a_key_that_is_no_text_or_comes_twice_is_refused(join: Join) -> None:
    ana = join("ana")
    twice = ana.http.post("/settings", data={"bio": "x", "key": [new_key(), new_key()]})
    file = ana.http.post("/upload", files={"key": ("p.jpg", pictures.jpeg(64, 64))})
    assert (twice.status_code, file.status_code) == (422, 422)
    # A program that sends none is served, each time.
    for _ in range(2):
        assert ana.http.post("/settings", data={"bio": "x"}).status_code == 303
