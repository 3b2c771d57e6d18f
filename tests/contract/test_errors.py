"""The tree drawn in `shardkit.errors` is the real one, and so is what it says of retries."""

from __future__ import annotations

import inspect
import re

import pytest

from shardkit import errors
from shardkit.errors import ShardkitError

LINE = re.compile(r"^ {4}(?P<stem>[ │├└─]*)(?P<name>\w+Error)(?:\s+(?P<mark>retryable))?$")


def drawn() -> dict[str, tuple[str | None, bool]]:
    """Return parent and `retryable` by class name, as the module's text draws them."""
    tree: dict[str, tuple[str | None, bool]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := LINE.match(line):
            depth = len(match["stem"]) // 4
            path[depth:] = [match["name"]]
            tree[match["name"]] = (path[depth - 1] if depth else None, bool(match["mark"]))
    return tree


def real() -> dict[str, type[ShardkitError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, ShardkitError)
    }


def parent(kind: type[ShardkitError]) -> str | None:
    return next((b.__name__ for b in kind.__bases__ if issubclass(b, ShardkitError)), None)


def test_the_drawn_tree_is_the_real_tree() -> None:
    assert {name: above for name, (above, _) in drawn().items()} == {
        name: parent(kind) for name, kind in real().items()
    }


def test_retryable_is_marked_exactly_where_it_holds() -> None:
    assert {name for name, (_, mark) in drawn().items() if mark} == {
        name for name, kind in real().items() if kind.retryable
    }


@pytest.mark.parametrize("kind", real().values(), ids=real().keys())
def test_the_docstring_is_a_message_that_stands_alone(kind: type[ShardkitError]) -> None:
    first = (kind.__doc__ or "").strip().splitlines()[0]
    assert first.endswith(".")
    assert kind.__doc__ != ShardkitError.__doc__ or kind is ShardkitError
