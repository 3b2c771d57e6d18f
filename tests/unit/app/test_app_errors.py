from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from app import errors
from app.errors import AppError, problem_of
from shardkit.errors import (
    GatherError,
    InvalidIdError,
    OutcomeUnknownError,
    PoolTimeoutError,
    ShardkitError,
)


def subclasses(kind: type[AppError]) -> Iterator[type[AppError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def tree(kind: type[AppError], indent: str = "") -> Iterator[str]:
    children = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    for n, child in enumerate(children):
        is_last = n == len(children) - 1
        yield f"{indent}{'└' if is_last else '├'}── {child.__name__}"
        yield from tree(child, indent + ("    " if is_last else "│   "))


def test_the_tree_drawn_is_the_tree_there_is() -> None:
    drawn = inspect.cleandoc(errors.__doc__ or "").splitlines()
    start = drawn.index("    AppError") + 1
    expected = list(tree(AppError))
    assert [line.removeprefix("    ") for line in drawn[start : start + len(expected)]] == expected


OURS: dict[type[AppError], set[int]] = {
    errors.StorageFullError: {507},
    errors.DamagedPictureError: {500},
}
"""What no client can help, beside 503."""


@pytest.mark.parametrize("kind", [k for k in subclasses(AppError) if k is not AppError])
def test_every_error_of_ours_is_the_clients(kind: type[AppError]) -> None:
    error = kind("field", "why") if kind is errors.InvalidInputError else kind()
    problem = problem_of(error)
    assert 400 <= problem.status < 500 or problem.status in OURS.get(kind, {503})
    assert problem.detail == error.message
    assert problem.type.startswith("urn:shardkit-app:problem:")


def test_errors_of_the_library() -> None:
    assert problem_of(InvalidIdError()).status == 404
    busy = problem_of(PoolTimeoutError("alpha/primary@10.0.0.1:5432"))
    assert (busy.status, busy.headers) == (503, {"retry-after": "2"})
    assert "10.0.0.1" not in busy.model_dump_json()
    assert problem_of(GatherError({"beta": OSError("10.0.0.2")}, {"alpha": 3})).status == 503
    assert problem_of(OutcomeUnknownError()).status == 504
    bug = problem_of(ShardkitError("secret detail"))
    assert bug.status == 500
    assert "secret" not in bug.model_dump_json()


def test_unknown_errors_say_nothing() -> None:
    problem = problem_of(RuntimeError("password=hunter2"))
    assert problem.status == 500
    assert "hunter2" not in problem.model_dump_json()
