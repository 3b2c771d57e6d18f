"""The OpenAPI document says everything: an example that is right, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from app.examples import PROBLEM
from app.main import create_app
from app.settings import Settings

APP = create_app(Settings(config=Path("shardkit.toml")))
DOCUMENT: dict[str, Any] = APP.openapi()
OPERATIONS = [
    (f"{verb.upper()} {path}", operation)
    for path, verbs in DOCUMENT["paths"].items()
    for verb, operation in verbs.items()
]
MUTATING = ("POST", "PUT", "PATCH", "DELETE")


def bodies(operation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield what is sent and answered: where, of what kind, and its content."""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield "request", kind, content
    for status, response in operation["responses"].items():
        for kind, content in response.get("content", {}).items():
            yield status, kind, content


def validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    document = {**schema, "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(document)


@pytest.mark.parametrize(("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_every_route_has_examples_that_fit_and_says_how_it_refuses(
    name: str, operation: dict[str, Any]
) -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    assert operation.get("summary")
    assert operation.get("description"), "its docstring"
    refusals = {status for status, kind, _ in bodies(operation) if "problem" in kind}
    assert {"4XX", "5XX", "422"} <= refusals
    for status, kind, content in bodies(operation):
        if "json" not in kind and kind != "multipart/form-data":
            continue
        assert "example" in content or "examples" in content, (name, status, kind)
        if kind != "multipart/form-data":  # a file is no JSON
            errors = [str(e) for e in validator(content["schema"]).iter_errors(content["example"])]
            assert errors == [], (name, status)
    if name.startswith(MUTATING):
        parameters = {parameter["name"] for parameter in operation.get("parameters", ())}
        assert "idempotency-key" in parameters, f"{name} does not take Idempotency-Key"


def test_the_example_of_a_refusal_is_one() -> None:
    assert (
        DOCUMENT["paths"]["/api/v1/me"]["get"]["responses"]["4XX"]["content"][
            "application/problem+json"
        ]["example"]
        == PROBLEM
    )
