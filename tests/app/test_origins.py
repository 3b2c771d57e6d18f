"""Pages of other sites: listed ones may use a bearer, nobody's may use cookies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.fixtures.service import Person, Service, serving

pytestmark = pytest.mark.integration

LISTED, OTHER = "https://photos.example", "https://evil.example"


@pytest.fixture
def open_client(service: Service) -> Iterator[httpx.Client]:
    settings = service.settings.model_copy(update={"cors_origins": LISTED})
    with serving(settings) as running, running.client() as client:
        yield client


def test_what_pages_of_other_sites_may(
    join: Callable[[str], Person], open_client: httpx.Client
) -> None:
    ana = join("cors")
    token = ana.http.cookies["session"]
    bearer = {"authorization": f"Bearer {token}"}
    asked = {"access-control-request-method": "PATCH", "origin": LISTED}
    allowed = open_client.options("/api/v1/me", headers=asked)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == LISTED
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    refused = open_client.options("/api/v1/me", headers={**asked, "origin": OTHER})
    assert "access-control-allow-origin" not in refused.headers
    assert refused.headers["vary"] == "Origin"

    def edit(origin: str, **headers: str) -> httpx.Response:
        headers["origin"] = origin
        return open_client.patch("/api/v1/me", json={"bio": "x"}, headers=headers)

    answer = edit(LISTED, **bearer)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert "access-control-allow-credentials" not in answer.headers
    open_client.cookies.clear()
    assert edit(OTHER, **bearer).status_code == 403
    assert edit(LISTED, cookie=f"session={token}").status_code == 403, "never with cookies"
    assert edit("null", **bearer).status_code == 403
    page = open_client.post("/logout", headers={"origin": LISTED})
    assert "access-control-allow-origin" not in page.headers, "pages are for this site"


def test_every_answer_says_where_its_time_went_and_keeps_browsers_careful(
    join: Callable[[str], Person],
) -> None:
    ana = join("timed")
    told = ana.http.get("/api/v1/feed").headers
    stages = dict(each.split(";dur=") for each in told["server-timing"].split(", "))
    assert stages.keys() == {"route", "db", "cache", "render", "total"}
    assert float(stages["db"]) > 0
    parts = sum(float(value) for name, value in stages.items() if name != "total")
    assert abs(parts - float(stages["total"])) < 1.0
    page = ana.http.get("/settings").headers
    assert float(dict(e.split(";dur=") for e in page["server-timing"].split(", "))["render"]) > 0
    for headers in (told, page, ana.http.get("/api/v1/nothing").headers):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
