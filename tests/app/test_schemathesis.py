"""Requests generated from the OpenAPI document, valid and not: never an answer of 5xx.

A few by default; `make api-fuzz` sends five thousand. Complements test_fuzz, whose values are ours.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

N = int(os.environ.get("SHARDKIT_FUZZ_CASES", "24"))

ENDS = {"/api/v1/sessions/current", "/api/v1/me/deletion"}
"""What would end the log-in that the others are asked with."""


def test_generated_requests_never_fail_by_themselves(
    join: Callable[[str], Person], service: Service
) -> None:
    ana = join("schema")
    document = ana.http.get("/api/v1/openapi.json").json()
    schema: Any = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [each for each in operations if each.path not in ENDS]
    if len(asked) > N:  # a sample
        asked = asked[:: -(-len(asked) // N)]
    bearer = {"authorization": f"Bearer {ana.http.cookies['session']}"}
    counted: Counter[int] = Counter()
    failed: list[str] = []
    each = max(1, -(-N // len(asked)))
    for operation in asked:
        modes = [operation.as_strategy(generation_mode=mode) for mode in modes_of()]

        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(modes))
        def send(case: Any) -> None:
            answer = case.call(base_url=service.url, headers=bearer, timeout=20)
            counted[answer.status_code // 100] += 1
            if answer.status_code >= 500:
                failed.append(f"{answer.status_code} {case.as_curl_command()}")

        send()
    print(f"{counted.total()} cases over {len(asked)} operations: {dict(counted)}")
    assert failed == []
    assert counted.total() >= min(N, len(asked))
    assert ana.http.get("/api/v1/me").status_code == 200


def modes_of() -> list[Any]:
    """Return both ways of making a request: as the document says, and otherwise."""
    return [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
