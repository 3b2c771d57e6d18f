"""Compares what shardkit answers with what one server does, exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import inspect

from shardkit import all_shards
from tests.property.worlds import World

__all__ = ["Answer", "answer_of_one_server", "answer_of_shardkit", "assert_alike"]

Answer = tuple[list[str], list[tuple[str, ...]]]
"""Names of the columns, and the rows as text that tells every two values apart."""


def answer_of_one_server(world: World, statement: Any) -> Answer:
    """Ask the plain server."""
    world.single.expunge_all()
    return _read(world.single.execute(statement))


def answer_of_shardkit(
    world: World, statement: Any, *, awaited: bool, yield_per: int | None = None
) -> Answer:
    """Ask shardkit, through asyncio or not, for all rows at once or for a few at a time.

    Raises:
        RoutingError: it refuses.
    """
    if awaited:
        world.awaited.expunge_all()
        yield_per = yield_per or statement.get_execution_options().get("yield_per")
        return world.runner.run(_awaited(world, statement, yield_per))
    world.sharded.expunge_all()
    options: dict[str, Any] = {} if yield_per is None else {"yield_per": yield_per}
    return _read(world.sharded.execute(statement, execution_options=options))


async def _awaited(world: World, statement: Any, yield_per: int | None) -> Answer:
    if yield_per is None:
        return _read(await world.awaited.execute(statement))
    options = {"yield_per": yield_per}
    stream = await world.awaited.stream(statement, execution_options=options)
    names = list(stream.keys())
    if len(names) == 1:
        # SQLAlchemy 2.1 takes a row that is one absent object for the end of an answer that is
        # read row by row, from one server as well (docs/statements.md): in parts it does not.
        return names, [_texts(names, row) async for part in stream.partitions() for row in part]
    return names, [_texts(names, row) async for row in stream]


def wide(statement: Any) -> Any:
    """Return a statement that may go to every logical shard."""
    return statement.options(all_shards())


def assert_alike(found: Answer, expected: Answer, *, is_ordered: bool) -> None:
    """Check that two answers are the same, in the same order if it counts."""
    assert found[0] == expected[0]
    if is_ordered:
        assert found[1] == expected[1]
    else:
        assert Counter(found[1]) == Counter(expected[1])


def _read(result: Any) -> Answer:
    names = list(result.keys())
    return names, [_texts(names, row) for row in result]


def _texts(names: list[str], row: Any) -> tuple[str, ...]:
    """Return a row as text; of a column that is a bag, in whatever order it was collected."""
    bags = [name.startswith("bag") for name in names]
    if not any(bags):  # columns of one name have one name only
        return tuple(map(_text, row))
    return tuple(
        repr(sorted(map(repr, item))) if is_bag and item is not None else _text(item)
        for is_bag, item in zip(bags, row, strict=True)
    )


def _text(item: Any) -> str:
    """Return a value as text: NaN equals itself then, and 1.0 is not 1.00."""
    state = inspect(item, raiseerr=False)
    if state is None or not hasattr(state, "mapper"):
        return repr(item)
    mapper = state.mapper
    values = [getattr(item, attribute.key) for attribute in mapper.column_attrs]
    return f"{mapper.class_.__name__}{values!r}"
