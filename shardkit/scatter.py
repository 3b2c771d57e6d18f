"""Runs one statement over the logical shards of a server, and over several servers at once.

`view` makes the engine on which the branch of a plan, compiled once by SQLAlchemy and cached by
it, is sent as one UNION ALL over the schemas of that server, with ORDER BY and LIMIT outside,
where PostgreSQL turns them into a MergeAppend. `run` sends it to every server in parallel and
loads what comes back through the ORM. Source: docs/architecture.md, decision 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, cast

from sqlalchemy import Connection, CursorResult, Engine, Result, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.engine.result import SimpleResultMetaData, tuplegetter
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import ORMExecuteState

from shardkit.errors import GatherError
from shardkit.gather import Plan
from shardkit.keylists import KeyLists
from shardkit.topology import schema_name

__all__ = ["Scatter", "compose", "of", "run", "sql_of", "view"]

_OPTION: Final = "shardkit_scatter"
_ANY_SCHEMA: Final = "shardkit_any_shard"
_DIALECT: Final[Any] = cast("Any", PGDialect_psycopg)()


@dataclass(frozen=True, slots=True)
class Scatter:
    """What one server runs.

    Attributes:
        shards: the logical shards of that server to ask.
        tail: ORDER BY and LIMIT of their union, or nothing.
        lists: the keys that each logical shard is asked for; of its equality only the names.
        union: what joins the branches.
    """

    shards: tuple[int, ...]
    tail: str
    lists: KeyLists = field(default_factory=KeyLists, compare=False)
    union: str = "UNION ALL"
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.lists.values))


def of(plan: Plan | None, shards: tuple[int, ...]) -> Scatter:
    """Return what one server runs of a plan, or of a statement that needs none."""
    if plan is None:
        return Scatter(shards, "")
    return Scatter(shards, plan.tail, plan.lists, plan.union)


def view(engine: Engine) -> Engine:
    """Return a view of an engine that runs scattered statements over many schemas."""
    scattering = engine.execution_options(schema_translate_map={None: _ANY_SCHEMA})
    event.listen(scattering, "before_cursor_execute", _rewrite, retval=True)
    return scattering


@lru_cache(maxsize=512)
def compose(branch: str, scatter: Scatter) -> str:
    """Return the SQL of one server: the union of a branch over its schemas, and the tail.

    Args:
        branch: compiled for `view`, so that its schema is a placeholder.
        scatter: the schemas and the tail.
    """
    union = f" {scatter.union} ".join(
        scatter.lists.text(branch, shard).replace(f"{_ANY_SCHEMA}.", f"{schema_name(shard)}.")
        for shard in scatter.shards
    )
    return union + scatter.tail


def sql_of(branch: Any, scatter: Scatter) -> str:
    """Return the SQL of one server for people to read; values stay parameters."""
    schemas = {None: _ANY_SCHEMA}
    compiled = branch.compile(dialect=_DIALECT, schema_translate_map=schemas)
    return compose(compiled.preparer._render_schema_translates(compiled.string, schemas), scatter)


def run(
    state: ORMExecuteState,
    plan: Plan,
    servers: Mapping[str, tuple[Connection, tuple[int, ...]]],
    parallel: Callable[[Sequence[Callable[[], Any]]], list[Any]],
) -> Result[Any]:
    """Run a plan on every server at once and return its rows, merged.

    Only the round trips run in parallel; objects are made in the caller's thread, since a
    session belongs to one.

    Args:
        state: the execution that the session's hook was given.
        plan: what to run.
        servers: connection, of an engine made by `view`, and logical shards, by name of the
            physical shard.
        parallel: runs tasks at the same time and returns result or exception of each.

    Raises:
        GatherError: servers could not be reached; others may have answered.
    """
    load = cast("Any", state._compile_state_cls)
    statement: Any = plan.branch
    options: Mapping[str, Any] = state.execution_options
    params = state.parameters
    bind_arguments = state.bind_arguments
    if load is not None:
        statement, options, params = load.orm_pre_session_exec(
            state.session, statement, params, options, bind_arguments, is_pre_event=False
        )
    tasks = [
        _task(connection, statement, params, of(plan, shards), options)
        for connection, shards in servers.values()
    ]
    answers = dict(zip(servers, parallel(tasks), strict=True))
    failures = {name: a for name, a in answers.items() if isinstance(a, Exception)}
    if failures:
        _raise(failures, answered=tuple(name for name in answers if name not in failures))
    # Merge what the driver returned and let SQLAlchemy read the winners as one server's answer.
    result, _ = next(iter(answers.values()))
    merged = plan.combine([row for _, rows in answers.values() for row in rows])
    result.cursor_strategy = FullyBufferedCursorFetchStrategy(None, initial_buffer=merged)
    if load is not None:
        result = load.orm_setup_cursor_result(
            state.session, statement, params, options, bind_arguments, result
        )
    return _without_sort_columns(result, plan.n_columns) if plan.adds else result


def _without_sort_columns(result: Result[Any], n_columns: int) -> Result[Any]:
    """Keep the first columns of a result.

    `Result.columns` looks positions up by name, which two columns, or two aliases, may share.
    """
    known: Any = result._metadata
    if not isinstance(known, SimpleResultMetaData):
        keys = {record[0]: key for key, record in known._keymap.items()}
        return result.columns(*(keys[i] for i in range(n_columns)))
    extra = {record[0]: record[2] for record in known._keymap.values()}
    result._metadata = SimpleResultMetaData(
        known._keys[:n_columns],
        extra=[extra.get(i, ()) for i in range(n_columns)],
        _tuplefilter=tuplegetter(*range(n_columns)),
        _translated_indexes=range(n_columns),
        _processors=known._processors,
        _create_unique_filters=known._create_unique_filters,
        _ambiguous_keys=known._ambiguous_keys,
    )
    return result


def _raise(failures: Mapping[str, Exception], answered: tuple[str, ...]) -> None:
    for failure in failures.values():
        # A lost connection is about a server; anything else is about the statement.
        if not isinstance(failure, DBAPIError) or not failure.connection_invalidated:
            raise failure
    raise GatherError(failures, answered)


def _task(
    connection: Connection, statement: Any, params: Any, scatter: Scatter, options: Any
) -> Callable[[], tuple[CursorResult[Any], Sequence[Any]]]:
    def task() -> tuple[CursorResult[Any], Sequence[Any]]:
        # Every row is fetched here for the merge; what SQLAlchemy buffered would be missing.
        here = {**options, _OPTION: scatter, "stream_results": False, "yield_per": None}
        result = connection.execute(statement, params or {}, execution_options=here)
        return result, cast("Any", result.cursor).fetchall()

    return task


def _rewrite(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, context: Any, _many: object
) -> tuple[str, Any]:
    scatter = context.execution_options.get(_OPTION)
    if scatter is None:
        return statement, parameters
    return compose(statement, scatter), {**parameters, **scatter.lists.parameters(scatter.shards)}
