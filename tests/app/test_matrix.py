"""Who may do what to whose: every route, by everybody, to things in every state.

Routes come from the OpenAPI document: one without an entry in `RULES` fails, and so does an entry
without a route. Who may not know of a thing is answered as if there were none, in the same words.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

import app.legacy.endpoints
import app.web.pages
from app.photos.endpoints import media
from shardkit import ids
from tests.fixtures import pictures
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]

OWNER, FOLLOWER, STRANGER, BLOCKED = "owner", "follower", "stranger", "blocked"
NOBODY, GONE, OUT = "anonymous", "deleted account", "logged out"
ROLES = (OWNER, FOLLOWER, STRANGER, BLOCKED, NOBODY, GONE, OUT)
UNKNOWN = (NOBODY, GONE, OUT)
"""Roles that have no log-in that counts."""

OK = 200
"""Stands for every answer of success."""

Expected = Callable[[str, str], set[int]]


def public(_role: str, _state: str) -> set[int]:
    return {OK, 422, 401, 409}  # whatever it is about, not that one may not


def anybody(_role: str, _state: str) -> set[int]:
    return {OK}


def one_self(role: str, _state: str) -> set[int]:
    return {401} if role in UNKNOWN else {OK, 409, 422, 403}


def sees(role: str, state: str) -> bool:
    if state == "public":
        return role != BLOCKED
    return state == "private" and role in {OWNER, FOLLOWER}


def seen(role: str, state: str) -> set[int]:
    return {OK} if sees(role, state) else {404}


def acted_on(role: str, state: str) -> set[int]:
    return {401} if role in UNKNOWN else seen(role, state)


def taken_back(role: str, state: str) -> set[int]:
    """What was done may be taken back by who may not see it any more."""
    exists = state in {"public", "private"}
    return (
        {401} if role in UNKNOWN else {OK} if sees(role, state) else {OK, 404} if exists else {404}
    )


def owned(role: str, state: str) -> set[int]:
    if role in UNKNOWN:
        return {401}
    return (
        {OK} & {OK}
        if role == OWNER and sees(role, state)
        else {403}
        if sees(role, state)
        else {404}
    )


def own_thing(role: str, state: str) -> set[int]:
    if role in UNKNOWN:
        return {401}
    return {OK} if role == OWNER and state == "public" else {404}


def profile(role: str, state: str) -> set[int]:
    exists = state in {"public", "private"}
    return {OK} if exists and role != BLOCKED else {404}


def listed(role: str, state: str) -> set[int]:
    closed = state == "private" and role not in {OWNER, FOLLOWER, BLOCKED}
    return {OK, 404} if closed else profile(role, state)


def listed_to_known(role: str, state: str) -> set[int]:
    return {401} if role in UNKNOWN else listed(role, state)


def follow(role: str, state: str) -> set[int]:
    if role in UNKNOWN:
        return {401}
    return {422} if role == OWNER and state in {"public", "private"} else profile(role, state)


def about_person(role: str, state: str) -> set[int]:
    """Ending or answering something between two people."""
    if role in UNKNOWN:
        return {401}
    return {OK, 404, 422} if state in {"public", "private"} else {404}


RULES: Mapping[str, Expected] = {
    "POST /api/v1/users": public,
    "POST /api/v1/sessions": public,
    "GET /api/v1/sessions": one_self,
    "DELETE /api/v1/sessions/current": one_self,
    "DELETE /api/v1/sessions/{session_id}": own_thing,
    "PUT /api/v1/me/password": one_self,
    "GET /api/v1/me": one_self,
    "PATCH /api/v1/me": one_self,
    "GET /api/v1/users/{username}": profile,
    "POST /api/v1/photos": one_self,
    "GET /api/v1/uploads/{upload_id}": own_thing,
    "GET /api/v1/photos/{photo_id}": seen,
    "DELETE /api/v1/photos/{photo_id}": owned,
    "GET /api/v1/users/{username}/photos": listed,
    "PUT /api/v1/photos/{photo_id}/like": acted_on,
    "DELETE /api/v1/photos/{photo_id}/like": taken_back,
    "GET /api/v1/photos/{photo_id}/comments": seen,
    "POST /api/v1/photos/{photo_id}/comments": acted_on,
    "DELETE /api/v1/photos/{photo_id}/comments/{comment_id}": owned,
    "PUT /api/v1/users/{username}/follow": follow,
    "DELETE /api/v1/users/{username}/follow": about_person,
    "GET /api/v1/users/{username}/followers": listed,
    "GET /api/v1/users/{username}/following": listed,
    "DELETE /api/v1/me/followers/{username}": about_person,
    "GET /api/v1/me/requests": one_self,
    "PUT /api/v1/me/requests/{username}": about_person,
    "DELETE /api/v1/me/requests/{username}": about_person,
    "GET /api/v1/me/blocks": one_self,
    "PUT /api/v1/users/{username}/block": about_person,
    "DELETE /api/v1/users/{username}/block": about_person,
    "GET /api/v1/photos/{photo_id}/comments/{comment_id}/replies": seen,
    "POST /api/v1/stories": one_self,
    "GET /api/v1/stories": one_self,
    "GET /api/v1/users/{username}/stories": listed_to_known,
    "GET /api/v1/stories/{story_id}": acted_on,
    "DELETE /api/v1/stories/{story_id}": owned,
    "PUT /api/v1/stories/{story_id}/view": acted_on,
    "GET /api/v1/stories/{story_id}/viewers": owned,
    "PUT /api/v1/photos/{photo_id}/save": acted_on,
    "DELETE /api/v1/photos/{photo_id}/save": one_self,
    "GET /api/v1/me/saves": one_self,
    "GET /api/v1/tags/{tag}/photos": anybody,
    "GET /api/v1/me/notifications": one_self,
    "GET /api/v1/me/notifications/unread": one_self,
    "PUT /api/v1/me/notifications/read": one_self,
    "GET /api/v1/me/notifications/stream": one_self,
    "GET /api/v1/search": public,
    "GET /api/v1/feed": one_self,
    "GET /api/v1/explore": anybody,
    "POST /api/v1/me/exports": one_self,
    "GET /api/v1/me/exports": one_self,
    "GET /api/v1/me/exports/{export_id}": own_thing,
    "GET /api/v1/me/exports/{export_id}/file": own_thing,
    "POST /api/v1/me/deletion": one_self,
    "GET /api/v1/deletions/{user_id}": anybody,
}

DESTROYS = {
    ("GET /api/v1/me/notifications/stream", ""),  # never ends
    ("DELETE /api/v1/photos/{photo_id}", OWNER), ("DELETE /api/v1/sessions/current", ""),
    ("DELETE /api/v1/photos/{photo_id}/comments/{comment_id}", OWNER),
    ("DELETE /api/v1/stories/{story_id}", OWNER),
    ("DELETE /api/v1/me/followers/{username}", ""), ("PUT /api/v1/users/{username}/block", ""),
    ("DELETE /api/v1/users/{username}/follow", FOLLOWER),
    ("DELETE /api/v1/users/{username}/block", OWNER),
}  # fmt: skip
"""What would end the world of the test, by role, or by every role that may; it has tests of its
own (test_journey, test_sessions, test_blocks)."""

WHOLE = "SHARDKIT_MATRIX" in os.environ
"""Whether every state is asked for, as `make api-matrix` does, or a sample of them."""

SAMPLE = ("", "public", "private", "random")
HASHED = ("POST /api/v1/users", "POST /api/v1/sessions", "PUT /api/v1/me/password")
"""Routes that hash a password each time."""

STATES = ("public", "private", "deleted", "random", "another shard")


@dataclass(frozen=True)
class World:
    """Who there is, and what to ask for in each state, by name of the parameter."""

    clients: Mapping[str, httpx.Client]
    named: Mapping[str, Mapping[str, str]]


def told(person: Person) -> str:
    """Return the id of a new story."""
    files = {"file": ("a.jpg", pictures.jpeg(64, 64))}
    posted = person.http.post("/api/v1/stories", files=files)
    posted.raise_for_status()
    return str(posted.json()["id"])


@pytest.fixture
def world(join: Join, service: Service) -> Iterator[World]:
    people = {role: join("matrix") for role in (OWNER, FOLLOWER, STRANGER, BLOCKED, GONE, OUT)}
    hidden = join("matrixp")  # the owner's other account
    owner = people[OWNER]
    hidden.http.patch("/api/v1/me", json={"is_private": True}).raise_for_status()
    tokens = {role: person.http.cookies["session"] for role, person in people.items()}
    photo = {"public": owner.upload(pictures.jpeg(64, 64)).json()["id"]}
    photo["private"] = hidden.upload(pictures.jpeg(64, 64)).json()["id"]
    dead = owner.upload(pictures.jpeg(64, 64)).json()["id"]
    comment = {
        state: who.http.post(f"/api/v1/photos/{photo[state]}/comments", json={"body": "x"}).json()
        for state, who in (("public", owner), ("private", hidden))
    }
    owner.http.delete(f"/api/v1/photos/{dead}").raise_for_status()
    story = {"public": told(owner), "private": told(hidden), "deleted": told(owner)}
    owner.http.delete(f"/api/v1/stories/{story['deleted']}").raise_for_status()
    for who in (owner, hidden):
        people[FOLLOWER].http.put(f"/api/v1/users/{who.username}/follow").raise_for_status()
        name = people[BLOCKED].username
        who.http.put(f"/api/v1/users/{name}/block").raise_for_status()
    follower = people[FOLLOWER].username
    hidden.http.put(f"/api/v1/me/requests/{follower}").raise_for_status()
    export = owner.http.post("/api/v1/me/exports").json()["id"]
    upload = owner.http.post(
        "/api/v1/photos",
        files={"file": ("a.jpg", pictures.jpeg(64, 64))},
        headers={"prefer": "respond-async"},
    ).json()["id"]
    gone = people[GONE].http.post("/api/v1/me/deletion", json={"password": PASSWORD})
    gone.raise_for_status()
    people[OUT].http.delete("/api/v1/sessions/current").raise_for_status()
    with service.client() as other:  # a log-in of the owner's that may be ended
        given = {"username": owner.username, "password": PASSWORD}
        session = other.post("/api/v1/sessions", json=given).json()["token"].partition(".")[0]
    random = str(int(dead) + (1 << 40))
    elsewhere = str(ids.compose(0, (ids.shard_of(int(dead)) + 1) % 8, 7))

    def states(public: str, private: str, deleted: str) -> Mapping[str, str]:
        return dict(zip(STATES, (public, private, deleted, random, elsewhere), strict=True))

    names = states(owner.username, hidden.username, people[GONE].username)
    named = {
        "photo_id": states(photo["public"], photo["private"], dead),
        "comment_id": states(comment["public"]["id"], comment["private"]["id"], dead),
        "username": {**names, "random": "nobody.at.all", "another shard": "no.such.person"},
        "story_id": states(story["public"], story["private"], story["deleted"]),
        "tag": {"public": "sunset"},
        "session_id": states(session, dead, dead),
        "export_id": states(export, dead, dead),
        "upload_id": states(upload, dead, dead),
        "user_id": {"public": people[GONE].id},
    }
    clients = {role: service.client() for role in ROLES}
    clients["owner of private"] = service.client()
    for role, token in {**tokens, "owner of private": hidden.http.cookies["session"]}.items():
        clients[role].headers["authorization"] = f"Bearer {token}"
    yield World(clients, named)
    for client in clients.values():
        client.close()


def cells(document: dict[str, Any], world: World) -> Iterator[tuple[str, str, str, str]]:
    """Yield route, role, state and address: all there are."""
    for path, verbs in document["paths"].items():
        for verb in verbs:
            route = f"{verb.upper()} {path}"
            names = [name for name in world.named if f"{{{name}}}" in path]
            states = world.named[names[0]] if names else [""]
            for role, state in itertools.product(ROLES, states):
                is_dear = route in HASHED and role not in {NOBODY, OWNER}
                if not WHOLE and (state not in SAMPLE or is_dear):
                    continue
                address = path
                for name in names:
                    address = address.replace(f"{{{name}}}", world.named[name][state])
                yield route, role, state, address


def body_of(document: dict[str, Any], route: str) -> dict[str, Any]:
    verb, _, path = route.partition(" ")
    content = document["paths"][path][verb.lower()].get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return {}
    wrong = {"password": "not this one", "current_password": "not this one"}
    sent = dict(content["application/json"]["example"])
    return {
        "json": {}
        if path == "/api/v1/me"
        else {**sent, **{k: v for k, v in wrong.items() if k in sent}}
    }


def test_every_route_by_everybody_in_every_state(world: World) -> None:
    document = world.clients[NOBODY].get("/api/v1/openapi.json").json()
    routes = {f"{verb.upper()} {p}" for p, verbs in document["paths"].items() for verb in verbs}
    assert routes == RULES.keys(), "every route has one rule, and every rule a route"

    n, wrong, refusals = 0, [], defaultdict(set)
    for route, role, state, address in list(cells(document, world))[:: 1 if WHOLE else 3]:
        allowed = RULES[route](role, state)
        if OK in allowed and ((route, role) in DESTROYS or (route, "") in DESTROYS):
            continue
        who = "owner of private" if (role, state) == (OWNER, "private") else role
        verb = route.partition(" ")[0]
        answer = world.clients[who].request(verb, address, **body_of(document, route))
        world.clients[who].cookies.clear()  # a sign-up logs in; bearers stay
        status = OK if answer.is_success else answer.status_code
        n += 1
        if status not in allowed:
            wrong.append((route, role, state, answer.status_code, allowed, answer.text[:100]))
        if status == 404 and RULES[route] is not about_person:  # of two whom both may see
            refusals[route].add(tuple(v for k, v in answer.json().items() if k != "request_id"))
    assert wrong == [], "\n".join(map(repr, wrong))
    assert n > (500 if WHOLE else 80)
    for route, said in refusals.items():
        assert len(said) == 1, f"{route}: what may not be known is told from what is not there"


def test_pages_that_change_something_are_for_who_is_logged_in(service: Service) -> None:
    open_to_all = {"/login", "/signup", "/logout"}
    routers = [*app.web.pages.ROUTERS, app.legacy.endpoints.router, media]
    routes = [each for router in routers for each in router.routes if isinstance(each, APIRoute)]
    assert len(routes) > 30
    n = 0
    with service.client() as client:
        for route in routes:
            if "POST" not in (route.methods or ()) or route.path in open_to_all:
                continue
            address = route.path.replace("{username}", "ana.lima")
            for name in route.param_convertors:
                address = address.replace(f"{{{name}}}", "1903344051200000")
            answer = client.post(address, data={})
            assert answer.status_code == 303, route.path
            assert answer.headers["location"] == "/login?next=/", route.path
            n += 1
    assert n > 10
