"""Every operation of the OpenAPI document, with hostile values in every place: never a 5xx."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.fixtures import pictures
from tests.fixtures.service import Person

pytestmark = [pytest.mark.integration, pytest.mark.slow]

Join = Callable[[str], Person]

TEXTS = [
    "", "0", "-1", "1", "007", "9" * 18, str((1 << 63) - 1), str(1 << 63), "1e9", "NaN", "null",
    "'", '"', "';--", "%", "_", "\\", "..", "../..", "\x00", "\r\nset-cookie: a=b", "\ufeff",
    "\u202e", "\U0001f600" * 50, "ana", "a" * 300, "{{7*7}}", "${jndi:x}", "<script>", "true",
]  # fmt: skip
VALUES: list[Any] = [*TEXTS, None, True, 0, -1, 1 << 70, 1.5, [], {}, [[]], {"a": {"b": []}}]


def requests(document: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield verb, path, query and JSON body, a few dozen for every operation."""
    for template, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            if template.endswith("/sessions/current"):
                continue  # the rest is to be asked by somebody who is logged in
            if template.endswith("/stream"):
                continue  # it does not end; see test_notifications
            for _ in range(25):
                path = template
                query = {}
                for parameter in operation.get("parameters", ()):
                    value = rng.choice(TEXTS)
                    if parameter["in"] == "path":
                        path = path.replace(f"{{{parameter['name']}}}", quote(value, safe=""))
                    elif rng.random() < 0.5:
                        query[parameter["name"]] = value
                yield verb, path, query, body_of(document, operation, rng)


def body_of(document: dict[str, Any], operation: dict[str, Any], rng: random.Random) -> Any:
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return rng.choice(VALUES) if content else None
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    names = document["components"]["schemas"][name]["properties"]
    body = {field: rng.choice(VALUES) for field in names if rng.random() < 0.9}
    if rng.random() < 0.2:
        body[rng.choice(["id", "owner_id", "is_admin", "like_count"])] = rng.choice(VALUES)
    return rng.choice([body, body, body, rng.choice(VALUES)])


@pytest.mark.parametrize("seed", range(3))
def test_no_operation_ever_fails_by_itself(join: Join, seed: int) -> None:
    rng = random.Random(seed)
    ana = join("fuzz")
    ana.upload(pictures.jpeg(64, 64), "caption").raise_for_status()
    document = ana.http.get("/api/v1/openapi.json").json()
    n_sent = 0
    for verb, path, query, body in requests(document, rng):
        answer = ana.http.request(verb, path, params=query, json=body)
        what = (seed, verb, path, query, body, answer.text)
        assert answer.status_code < 500, what
        if answer.status_code >= 400 and path.startswith("/api/"):
            assert answer.headers["content-type"] == "application/problem+json", what
        n_sent += 1
    assert ana.http.get("/api/v1/me").status_code == 200
    assert n_sent >= 25 * 17
