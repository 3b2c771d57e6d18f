"""One's own log-ins: the list, the end of one or of all, and what a new password ends."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import httpx
import pytest

from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
NEW = "quite another sentence"


def logged_in(service: Service, ana: Person, client: str = "", password: str = PASSWORD) -> str:
    with service.client() as other:
        answer = other.post(
            "/api/v1/sessions",
            json={"username": ana.username, "password": password},
            headers={b"user-agent": client.encode("latin-1")},
        )
        return str(answer.raise_for_status().json()["token"])


def me(service: Service, token: str) -> int:
    with service.client() as client:
        answer = client.get("/api/v1/me", headers={"authorization": f"Bearer {token}"})
        return answer.status_code


def test_the_list_and_the_end_of_one(join: Join, service: Service) -> None:
    ana, eve = join("ana"), join("eve")
    phone = logged_in(service, ana, "Phone/1.0 \u00e9")
    listed = ana.http.get("/api/v1/sessions").json()
    assert len(listed) == 2
    assert [each["client"] for each in listed if not each["is_current"]] == ["Phone/1.0 "]
    assert not any("token" in name for each in listed for name in each)
    other = next(each["id"] for each in listed if not each["is_current"])
    assert other == phone.partition(".")[0]

    assert eve.http.delete(f"/api/v1/sessions/{other}").status_code == 404, "somebody else's"
    assert me(service, phone) == 200
    assert ana.http.delete(f"/api/v1/sessions/{other}").status_code == 204
    assert me(service, phone) == 401, "refused at once"
    assert ana.http.delete(f"/api/v1/sessions/{other}").status_code == 404
    assert len(ana.http.get("/api/v1/sessions").json()) == 1


def test_log_out_everywhere(join: Join, service: Service) -> None:
    ana = join("ana")
    tokens = [logged_in(service, ana) for _ in range(2)]
    assert ana.http.delete("/api/v1/sessions/current?everywhere=true").status_code == 204
    assert [me(service, token) for token in tokens] == [401, 401]


def test_a_new_password_ends_every_other_log_in(join: Join, service: Service) -> None:
    ana = join("ana")
    other = logged_in(service, ana)
    given = {"current_password": "a wrong guess", "new_password": NEW}
    refused = ana.http.put("/api/v1/me/password", json=given)
    assert (refused.status_code, refused.json()["type"][-14:]) == (403, "wrong-password")
    assert me(service, other) == 200

    given["current_password"] = PASSWORD
    headers = {"idempotency-key": str(uuid.uuid4())}
    for _ in range(3):
        assert ana.http.put("/api/v1/me/password", json=given, headers=headers).status_code == 204
    assert me(service, other) == 401
    assert ana.http.get("/api/v1/me").status_code == 200, "who changed it stays"
    with pytest.raises(httpx.HTTPStatusError):
        logged_in(service, ana)
    assert me(service, logged_in(service, ana, password=NEW)) == 200
