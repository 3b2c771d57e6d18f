"""What changes something, sent three times while the server dies, leaves what once leaves.

Routes are those of the application: one that changes something and has no case here fails, and so
does a case without a route. Each case is done once to a new world, and three times to another one,
where the first two requests end at a moment of the grid: the server is killed around each COMMIT
of the request and before the answer leaves, or the answer is lost. Compared is all that came and
went in all stores. Some routes at one moment each by default; `make api-replays` does the grid.
"""

from __future__ import annotations

import itertools
import os
import secrets
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from app.main import create_app
from app.repair import KINDS, run
from app.settings import Settings
from shardkit import Cluster
from tests.fixtures.mortal import LOST, Mortal
from tests.fixtures.service import PASSWORD, UNLIMITED, migrated
from tests.fixtures.stores import change
from tests.fixtures.worlds import (
    API,
    PICTURE,
    Preparation,
    Site,
    World,
    answered,
    blocked,
    everything,
    friends,
    liked,
    more_logins,
    nothing,
    notified,
    own_photo,
    photo,
    requested,
    saved,
    story_of,
)

pytestmark = [pytest.mark.integration, pytest.mark.fault]

WHOLE = "SHARDKIT_REPLAYS" in os.environ

ANOTHER = "quite another sentence"


# -- the cases


@dataclass(frozen=True)
class Case:
    """How a route is asked.

    Attributes:
        prepare: what is there before.
        sent: the body, as httpx takes it; texts may name what the world has.
        again: what else a repetition may be answered with, when it finds no log-in.
        who: asks.
    """

    prepare: Preparation = nothing
    sent: Mapping[str, Any] = field(default_factory=dict)
    again: frozenset[int] = frozenset()
    who: str | None = "ana"


def form(**fields: str) -> dict[str, Any]:
    return {"data": fields}


FILE = {"files": {"file": ("a.jpg", PICTURE)}}
UPLOAD = {**FILE, "data": {"caption": "#{mark} @{cat}"}}
SAID = "#{mark} @{cat}"
OUT = frozenset({401})
SIGN_UP = {"username": "{nobody}", "password": PASSWORD}
LOG_IN = {"username": "{ana}", "password": PASSWORD}
CHANGED = {"current_password": PASSWORD, "new_password": ANOTHER}
PROFILE = {"display_name": "Ana", "bio": "{mark}"}

CASES: Mapping[str, Case] = {
    f"POST {API}/users": Case(sent={"json": SIGN_UP}, who=None),
    f"POST {API}/sessions": Case(sent={"json": LOG_IN}, who=None),
    f"DELETE {API}/sessions/current": Case(again=OUT),
    f"DELETE {API}/sessions/{{ana_other}}": Case(more_logins),
    f"PUT {API}/me/password": Case(more_logins, {"json": CHANGED}),
    f"PATCH {API}/me": Case(sent={"json": {**PROFILE, "is_private": True}}),
    f"POST {API}/photos": Case(friends, UPLOAD),
    f"DELETE {API}/photos/{{photo}}": Case(own_photo),
    f"PUT {API}/photos/{{photo}}/like": Case(photo),
    f"DELETE {API}/photos/{{photo}}/like": Case(liked),
    f"POST {API}/photos/{{photo}}/comments": Case(photo, {"json": {"body": SAID}}),
    f"DELETE {API}/photos/{{photo}}/comments/{{comment}}": Case(answered),
    f"PUT {API}/users/{{ben}}/follow": Case(photo),
    f"DELETE {API}/users/{{ben}}/follow": Case(friends),
    f"DELETE {API}/me/followers/{{ben}}": Case(friends),
    f"PUT {API}/me/requests/{{ben}}": Case(requested),
    f"DELETE {API}/me/requests/{{ben}}": Case(requested),
    f"PUT {API}/users/{{ben}}/block": Case(friends),
    f"DELETE {API}/users/{{ben}}/block": Case(blocked),
    f"POST {API}/stories": Case(sent=UPLOAD),
    f"DELETE {API}/stories/{{story}}": Case(story_of("ana")),
    f"PUT {API}/stories/{{story}}/view": Case(story_of("ben")),
    f"PUT {API}/photos/{{photo}}/save": Case(photo),
    f"DELETE {API}/photos/{{photo}}/save": Case(saved),
    f"PUT {API}/me/notifications/read": Case(notified, {"json": {"seq": "{seq}"}}),
    f"POST {API}/me/exports": Case(own_photo),
    f"POST {API}/me/deletion": Case(everything, {"json": {"password": PASSWORD}}, OUT),
    "POST /feed-order": Case(sent=form(order="ranked")),
    "POST /signup": Case(sent=form(**SIGN_UP, display_name="New"), who=None),
    "POST /login": Case(sent=form(**LOG_IN, next="/"), who=None),
    "POST /logout": Case(more_logins, form(everywhere="1")),
    "POST /settings": Case(sent=form(**PROFILE, is_private="1")),
    "POST /settings/sessions/{ana_other}/end": Case(more_logins, form()),
    "POST /settings/password": Case(more_logins, form(**CHANGED)),
    "POST /settings/export": Case(own_photo, form()),
    "POST /settings/delete": Case(everything, form(password=PASSWORD)),
    "POST /upload": Case(friends, UPLOAD),
    "POST /u/{ben}/follow": Case(photo, form()),
    "POST /u/{ben}/unfollow": Case(friends, form()),
    "POST /u/{ben}/block": Case(friends, form()),
    "POST /u/{ben}/unblock": Case(blocked, form()),
    "POST /requests/{ben}/accept": Case(requested, form()),
    "POST /requests/{ben}/refuse": Case(requested, form()),
    "POST /p/{photo}/like": Case(photo, form()),
    "POST /p/{photo}/unlike": Case(liked, form()),
    "POST /p/{photo}/delete": Case(own_photo, form()),
    "POST /p/{photo}/comments": Case(photo, form(body=SAID)),
    "POST /p/{photo}/comments/{comment}/delete": Case(answered, form()),
    "POST /p/{photo}/save": Case(photo, form()),
    "POST /p/{photo}/unsave": Case(saved, form()),
    "POST /notifications/read": Case(notified, form(seq="{seq}")),
    "POST /stories/new": Case(sent=UPLOAD),
    "POST /stories/{story}/delete": Case(story_of("ana"), form()),
}
"""Routes, with the names of what the world has in place of the parameters."""


def filled(value: Any, names: Mapping[str, str]) -> Any:
    """Put what a world has where it is named."""
    match value:
        case str():
            return value.format(**names)
        case dict():
            return {key: filled(each, names) for key, each in value.items()}
        case _:
            return value


# -- the test


@pytest.fixture(scope="module")
def site(
    postgres_version: str,  # noqa: ARG001 - skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    with migrated(tmp_path_factory.mktemp("replays") / "cluster") as local:
        settings = Settings(
            config=local.config_path,
            media=tmp_path_factory.mktemp("media"),
            erasure_grace=0.0,
            upload_patience=20.0,
            **UNLIMITED,
        )
        with Cluster.from_file(local.config_path) as cluster, Mortal(settings) as server:
            yield Site(local, settings, cluster, server)


def done(site: Site, route: str, case: Case, ends: str) -> tuple[list[str], httpx.Response]:
    """Make a world, send the request once, or three times of which two end so.

    Returns:
        What changed in all stores, and the last answer.
    """
    world = World(site)
    case.prepare(world)
    site.settle()
    before = site.stores.state()

    verb, _, path = filled(route, world.names).partition(" ")
    sent = filled(dict(case.sent), world.names)
    headers = {} if case.who is None else world.headers(case.who)
    if path.startswith(API):
        headers["idempotency-key"] = str(uuid.uuid4())
    else:
        sent["data"] = {**sent["data"], "key": secrets.token_urlsafe(16)}
    for _ in range(2 if ends else 0):
        cut = site.server.send(verb, path, headers=headers, ends=ends, **sent)
        if cut is not None:  # a repetition may have less to commit
            check(case, cut, is_first=False)
    answer = site.server.send(verb, path, headers=headers, **sent)
    assert answer is not None
    check(case, answer, is_first=not ends)
    site.settle()
    return change(before, site.stores.state(), world.words), answer


def check(case: Case, answer: httpx.Response, *, is_first: bool) -> None:
    status = answer.status_code
    is_done = status in {200, 201, 202, 204, 303}
    assert is_done or (not is_first and status in case.again), answer.text


def routes() -> set[str]:
    """Return every route of the application that changes something."""

    def found(some: Any) -> Iterator[APIRoute]:
        for each in some:
            if isinstance(each, APIRoute):
                yield each
            elif (router := getattr(each, "original_router", None)) is not None:
                yield from found(router.routes)

    return {
        f"{verb} {route.path}"
        for route in found(create_app(Settings()).routes)
        for verb in (route.methods or set()) - {"GET", "HEAD", "OPTIONS"}
    }


def shape(route: str) -> str:
    """Return a route without the names of its parameters."""
    return "/".join("{}" if part.startswith("{") else part for part in route.split("/"))


def test_every_route_that_changes_something_has_a_case() -> None:
    assert sorted(map(shape, routes())) == sorted(map(shape, CASES))


MOMENTS = ("before 1", "after 1", "answer", LOST)
"""What a sample takes in turn; the whole grid has each COMMIT that the request made."""

CHOSEN = list(enumerate(CASES) if WHOLE else enumerate(list(CASES)[::13]))


@pytest.mark.parametrize(("n", "route"), CHOSEN, ids=[route for _, route in CHOSEN])
def test_three_times_is_once(site: Site, n: int, route: str) -> None:
    case = CASES[route]
    once, answer = done(site, route, case, "")
    assert once, "it changes something"
    n_commits = int(answer.headers["x-commits"])
    moments = [MOMENTS[n % len(MOMENTS)]]
    if WHOLE:
        around = itertools.product(("before", "after"), range(1, n_commits + 1))
        moments = [*(f"{side} {number}" for side, number in around), "answer", LOST]
    for moment in moments:
        deaths = site.server.n_deaths
        thrice, _ = done(site, route, case, moment)
        # Only the first COMMIT is sure: what was tried again inside a request counts twice there.
        is_sure = moment == "answer" or moment.endswith(" 1")
        assert site.server.n_deaths > deaths or not is_sure, "the server died"
        assert thrice == once, moment
    print(f"{route}: {', '.join(moments)}")


def test_nothing_disagrees_with_anything_after_that(site: Site) -> None:
    assert run(site.cluster, dry_run=True) == dict.fromkeys(KINDS, 0)
