"""Examples in the OpenAPI document: for every body that is sent and every answer.

Made from the schemas, so that an example cannot lack a field or have one too many; values come
from the names of fields. `tests/app/test_contract.py` checks each against its schema.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

__all__ = ["PROBLEM", "complete", "example_of"]

Schema = Mapping[str, Any]

PROBLEM: Final = {
    "type": "urn:shardkit-app:problem:not-found",
    "title": "Not found",
    "status": 404,
    "detail": "There is nothing here.",
    "request_id": "9f86d081884c7d65",
}

_SIZES: Final = {
    size: f"/media/000000011f0c3a5b7d9e2f4a6c8b0d1e/{size}.jpg"
    for size in ("1080", "640", "320", "150")
}

_NAMED: Final[Mapping[str, Any]] = {
    "username": "ana.lima",
    "display_name": "Ana Lima",
    "bio": "Light, mostly.",
    "password": "a long sentence",
    "current_password": "a long sentence",
    "new_password": "quite another sentence",
    "caption": "First light",
    "body": "Where is this?",
    "client": "Mozilla/5.0 (X11; Linux x86_64)",
    "token": "1903344051200000.5d41402abc4b2a76b9719d911017c592",
    "images": _SIZES,
    "images_webp": {size: name.replace(".jpg", ".webp") for size, name in _SIZES.items()},
    "width": 1080,
    "height": 810,
    "limit": 20,
    "next_cursor": None,
    "partial": False,
    "n_bytes": 482113,
    "file": "/api/v1/me/exports/1903344051200000/file",
    "problem": None,
    "photo_id": "1903344051200007",
    "detail": PROBLEM["detail"],
    "type": PROBLEM["type"],
}


def complete(document: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Give an example to every JSON body of an OpenAPI document that has none; return it."""
    schemas: Mapping[str, Schema] = document.get("components", {}).get("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for body in bodies:
                for kind, content in body.get("content", {}).items():
                    _fill(kind, content, schemas)
    return document


def _fill(kind: str, content: MutableMapping[str, Any], schemas: Mapping[str, Schema]) -> None:
    if "example" in content or "examples" in content:
        return
    if kind == "application/problem+json":
        content["example"] = dict(PROBLEM)
    elif kind in {"application/json", "multipart/form-data"} and content.get("schema"):
        content["example"] = example_of(content["schema"], schemas)


def example_of(schema: Schema, schemas: Mapping[str, Schema], name: str = "") -> Any:
    """Return a value that a schema allows.

    Args:
        schema: JSON Schema as pydantic writes it.
        schemas: those it may refer to, by name.
        name: of the field it is for.
    """
    if name in _NAMED and (_NAMED[name] is not None or "anyOf" in schema):
        return _NAMED[name]
    if found := schema.get("examples"):
        # FastAPI leaves out what is null in them.
        absent = dict.fromkeys(schema.get("required", ())) if isinstance(found[0], Mapping) else {}
        return {**absent, **found[0]} if absent else found[0]
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas, name)
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0], schemas, name)
    if "enum" in schema or "const" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    return _plain(schema, schemas, name)


def _plain(schema: Schema, schemas: Mapping[str, Schema], name: str) -> Any:
    match schema.get("type"):
        case "object":
            fields: Mapping[str, Schema] = schema.get("properties", {})
            return {field: example_of(each, schemas, field) for field, each in fields.items()}
        case "array":
            return [example_of(schema.get("items", {}), schemas, name)]
        case "integer":
            return schema.get("minimum", 3)
        case "number":
            return 0.5
        case "boolean":
            return bool(schema.get("default", False))
        case "string" if schema.get("format") == "date-time":
            return "2026-11-21T11:00:00Z"
        case "string":
            return str(schema.get("default") or "text")
        case _:
            return None
