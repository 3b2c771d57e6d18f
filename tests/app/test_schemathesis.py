"""Requests generated from the OpenAPI document, valid and not: never an answer of 5xx.

A few by default; `make api-fuzz` sends five thousand. Complements test_fuzz, whose values are ours.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

N = int(os.environ.get("SHARDKIT_FUZZ_CASES", "24"))

ENDS = {"/api/v1/sessions/current", "/api/v1/me/deletion"}
"""What would end the log-in that the others are asked with."""

STREAMED = "/api/v1/me/notifications/stream"
"""Its answer has no end; the head is all that is looked at."""

MARGIN = 1.5
"""Some operations have few different requests; others are asked so much more often."""

WORKERS = 2 if N > 100 else 1
"""Processes that make requests up, which takes longer than answering them."""


@dataclass(frozen=True)
class Share:
    """What one process asks.

    Attributes:
        document: the OpenAPI document.
        url: of the service.
        bearer: the header of a log-in.
        labels: operations to ask.
        each: requests for each of them, if there are so many different ones.
        things: what there is, by the name of the parameter; of somebody else.
    """

    document: dict[str, Any]
    url: str
    bearer: dict[str, str]
    labels: list[str]
    each: int
    things: dict[str, str]


def operations_of(document: dict[str, Any]) -> list[Any]:
    schema: Any = schemathesis.openapi.from_dict(document)
    return [each.ok() for each in schema.get_all_operations()]


def ask(share: Share) -> tuple[Counter[int], list[str]]:
    """Make requests up and send them; return how many answers began so, and what went wrong."""
    counted: Counter[int] = Counter()
    failed: list[str] = []
    session = requests.Session()
    for operation in operations_of(share.document):
        if operation.label not in share.labels:
            continue
        modes = [operation.as_strategy(generation_mode=mode) for mode in modes_of()]

        @settings(
            max_examples=share.each,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(modes), is_there=st.booleans())
        def send(case: Any, *, is_there: bool) -> None:
            if is_there:  # made up, nearly no id is one of something
                known = share.things.keys() & case.path_parameters.keys()
                case.path_parameters |= {name: share.things[name] for name in known}
            asked = case.as_transport_kwargs(base_url=share.url, headers=share.bearer)
            is_streamed = case.path == STREAMED
            with session.request(**asked, timeout=60, stream=is_streamed) as answer:
                counted[answer.status_code // 100] += 1
                if answer.status_code >= 500:
                    failed.append(f"{answer.status_code} {case.as_curl_command()}")

        send()
    return counted, failed


def things_of(ben: Person) -> dict[str, str]:
    """Return what somebody has, by the name of the parameter that asks for it."""
    photo = ben.upload(pictures.jpeg(64, 64), "#light").json()["id"]
    said = ben.http.post(f"/api/v1/photos/{photo}/comments", json={"body": "Hm."}).json()["id"]
    file = {"file": ("a.jpg", pictures.jpeg(64, 64))}
    story = ben.http.post("/api/v1/stories", files=file).json()["id"]
    names = {"photo_id": photo, "comment_id": said, "story_id": story, "user_id": ben.id}
    return {**names, "username": ben.username, "tag": "light"}


def test_generated_requests_never_fail_by_themselves(
    join: Callable[[str], Person], service: Service
) -> None:
    ana = join("schema")
    document = ana.http.get("/api/v1/openapi.json").json()
    asked = [each.label for each in operations_of(document) if each.path not in ENDS]
    if len(asked) > N:  # a sample
        asked = asked[:: -(-len(asked) // N)]
    bearer = {"authorization": f"Bearer {ana.http.cookies['session']}"}
    each = max(1, int(MARGIN * N / len(asked)))
    things = things_of(join("schema"))
    shares = [
        Share(document, service.url, bearer, asked[n::WORKERS], each, things)
        for n in range(WORKERS)
    ]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        told = list(pool.map(ask, shares) if WORKERS > 1 else map(ask, shares))
    counted: Counter[int] = sum((some for some, _ in told), Counter())
    print(f"{counted.total()} cases over {len(asked)} operations: {dict(counted)}")
    assert [each for _, some in told for each in some] == []
    assert counted.total() >= N
    assert ana.http.get("/api/v1/me").status_code == 200


def modes_of() -> list[Any]:
    """Return both ways of making a request: as the document says, and otherwise."""
    return [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
