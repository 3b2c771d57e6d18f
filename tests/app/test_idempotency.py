"""A request that is sent again with its Idempotency-Key does nothing more and is answered alike."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from app.sealing import sealed
from shardkit.ids import shard_of
from shardkit.local import LocalCluster
from tests.fixtures import pictures
from tests.fixtures.blobs import keys_in
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


def new_key() -> dict[str, str]:
    return {"idempotency-key": str(uuid.uuid4())}


def three_times(
    client: httpx.Client, verb: str, path: str, headers: dict[str, str] | None = None, **sent: Any
) -> httpx.Response:
    """Send a request three times with one key; all answers are the first one's."""
    headers = headers or new_key()
    first, *others = [client.request(verb, path, headers=headers, **sent) for _ in range(3)]
    assert first.is_success, first.text
    for other in others:
        assert (other.status_code, other.content) == (first.status_code, first.content)
    return first


def test_every_endpoint_that_changes_something(join: Join, service: Service) -> None:
    ana, ben = join("ana"), join("ben")
    photo = ana.upload(pictures.jpeg(64, 64), "kept").json()["id"]
    before = keys_in(service)

    upload = {"file": ("photo.jpg", pictures.jpeg(64, 64)), "caption": (None, "once")}
    made = three_times(ana.http, "POST", "/api/v1/photos", files=upload).json()["id"]
    grid = ana.http.get(f"/api/v1/users/{ana.username}/photos").json()["items"]
    assert [item["id"] for item in grid] == [made, photo]
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["photo_count"] == 2
    added = keys_in(service) - before
    assert len(added) == 1, "the bytes of the repetitions are gone"

    here = f"/api/v1/photos/{photo}"
    comment = three_times(ben.http, "POST", f"{here}/comments", json={"body": "Hm."}).json()
    assert [c["id"] for c in ana.http.get(f"{here}/comments").json()["items"]] == [comment["id"]]
    three_times(ben.http, "PUT", f"{here}/like")
    shown = ana.http.get(here).json()
    assert (shown["comment_count"], shown["like_count"]) == (1, 1)
    three_times(ben.http, "DELETE", f"{here}/like")
    three_times(ben.http, "DELETE", f"{here}/comments/{comment['id']}")
    shown = ana.http.get(here).json()
    assert (shown["comment_count"], shown["like_count"]) == (0, 0)

    three_times(ben.http, "PUT", f"/api/v1/users/{ana.username}/follow")
    assert ben.http.get(f"/api/v1/users/{ben.username}").json()["following_count"] == 1
    three_times(ben.http, "DELETE", f"/api/v1/users/{ana.username}/follow")
    assert ben.http.get(f"/api/v1/users/{ben.username}").json()["following_count"] == 0

    three_times(ana.http, "PATCH", "/api/v1/me", json={"bio": "light"})
    three_times(ana.http, "DELETE", f"/api/v1/photos/{made}")
    assert ana.http.get(f"/api/v1/users/{ana.username}").json()["photo_count"] == 1


def test_a_sign_up_and_a_log_in_give_the_same_session(service: Service) -> None:
    username = f"once{uuid.uuid4().hex[:12]}"
    wanted = {"username": username, "password": PASSWORD, "display_name": "Once"}
    with service.client() as client:
        headers = new_key()
        made = three_times(client, "POST", "/api/v1/users", headers, json=wanted).json()
        bearer = {"authorization": f"Bearer {made['token']}"}
        client.cookies.clear()
        assert client.get("/api/v1/me", headers=bearer).json()["username"] == username
        # Somebody else who has learnt the key gets nothing by it.
        stolen = wanted | {"password": "another long sentence"}
        answer = client.post("/api/v1/users", json=stolen, headers=headers)
        assert answer.status_code == 409
        # Without the key the name is taken.
        assert client.post("/api/v1/users", json=wanted).status_code == 409

        credentials = {"username": username, "password": PASSWORD}
        tokens = {
            three_times(client, "POST", "/api/v1/sessions", json=credentials).json()["token"]
            for _ in range(2)
        }
        assert len(tokens) == 2, "another key is another log-in"


def test_a_key_is_for_one_request(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    here = f"/api/v1/photos/{photo}"
    headers = new_key()
    first = ana.http.post(f"{here}/comments", json={"body": "One"}, headers=headers)
    assert first.status_code == 201
    for verb, path, body in (
        ("POST", f"{here}/comments", {"body": "Two"}),
        ("PUT", f"{here}/like", None),
        ("PATCH", "/api/v1/me", {"bio": "x"}),  # ana's photo is beside her
    ):
        answer = ana.http.request(verb, path, headers=headers, json=body)
        assert answer.status_code == 422
        assert answer.json()["type"].endswith("idempotency-key-reused")
        assert headers["idempotency-key"] not in answer.text
    shown = ana.http.get(here).json()
    assert (shown["comment_count"], shown["like_count"]) == (1, 0)
    # The same key of somebody else is another one.
    other = ben.http.post(f"{here}/comments", json={"body": "Two"}, headers=headers)
    assert other.status_code == 201
    # What was refused may be sent again.
    fresh = new_key()
    missing = f"/api/v1/photos/{int(photo) + 1}/like"
    assert ana.http.put(missing, headers=fresh).status_code == 404
    assert ana.http.put(missing, headers=fresh).status_code == 404


def test_of_requests_at_once_one_has_an_effect(join: Join) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    here = f"/api/v1/photos/{photo}/comments"
    headers = new_key()

    def comment(_: int) -> httpx.Response:
        return ana.http.post(here, json={"body": "At once"}, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(comment, range(16)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(ana.http.get(here).json()["items"]) == 1


@pytest.mark.parametrize("how", ["bit", "other", "old"])
def test_an_answer_that_was_tampered_with_is_none(
    join: Join, app_cluster: LocalCluster, how: str
) -> None:
    """It was done, so it is not done again; and what somebody else has written is not told."""
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    here = f"/api/v1/photos/{photo}/comments"
    headers = new_key()
    say = partial(ana.http.post, here, json={"body": "Once"}, headers=headers)
    assert say().status_code == 201
    assert say().status_code == 201
    key = headers["idempotency-key"]
    kept = results(app_cluster, ana.id, key)
    assert "Once" not in kept
    results(app_cluster, ana.id, key, rewritten(kept, key, how))

    answer = say()
    assert answer.status_code == 409
    assert answer.json()["type"].endswith("answer-lost")
    assert len(ana.http.get(here).json()["items"]) == 1


def rewritten(kept: str, key: str, how: str) -> str:
    """Return what somebody may have put in place of a sealed answer."""
    if how == "old":  # of before answers were authenticated: a salt, and an exclusive or
        return base64.b64encode(bytes(40)).decode()
    if how == "other":  # sealed with this very key, but for another request
        return sealed(key, {"id": "1"}, of="another")
    form, _, text = kept.partition(":")
    raw = bytearray(base64.b64decode(text))
    raw[-20] ^= 1
    return f"{form}:{base64.b64encode(raw).decode()}"


def results(local: LocalCluster, who: str, key: str, new: str | None = None) -> str:
    """Return what is kept of the answer to a request, and put something in its place."""
    schema = f"shard_{shard_of(int(who)):04d}"
    operation = hashlib.sha256(f"{who}\0{key}".encode()).hexdigest()
    found = []
    for name in sorted({server.physical for server in local.servers if server.physical}):
        dsn = local.superuser_dsn(local.primary(name).name, "shardkit")
        with psycopg.connect(dsn, autocommit=True) as connection:
            has = connection.execute("SELECT to_regnamespace(%s)", [schema]).fetchone()
            if has == (None,):
                continue
            table = sql.Identifier(schema, "shardkit_operations")
            query = sql.SQL("SELECT result::jsonb #>> '{{}}' FROM {} WHERE operation = %s").format(
                table
            )
            found += connection.execute(query, [operation]).fetchall()
            if new is not None:
                change = "UPDATE {} SET result = to_jsonb(%s::text)::text WHERE operation = %s"
                connection.execute(sql.SQL(change).format(table), [new, operation])
    ((text,),) = found
    return str(text)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_that_is_none_is_refused(join: Join, key: str) -> None:
    ana = join("ana")
    answer = ana.http.patch("/api/v1/me", json={"bio": "x"}, headers={"idempotency-key": key})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "idempotency-key"


@pytest.mark.parametrize("key", ["\xff\xfe", "a b", "'; --", "\x85"])
def test_any_other_text_is_a_key(join: Join, key: str) -> None:
    ana = join("ana")
    headers = {b"idempotency-key": key.encode("latin-1")}
    answers = [ana.http.patch("/api/v1/me", json={"bio": "x"}, headers=headers) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {200}
