"""Runs one statement over the logical shards of a server, and over several servers at once.

`view` makes the engine on which the branch of a plan, compiled once by SQLAlchemy and cached by
it, is sent as one UNION ALL over the schemas of that server, with ORDER BY and LIMIT outside,
where PostgreSQL turns them into a MergeAppend. `Gathering` sends it to every server in parallel
and loads what comes back through the ORM. Source: docs/architecture.md, decision 4.
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

from shardkit.checks import late_error
from shardkit.drivers import refuse_many
from shardkit.errors import ShardFencedError, StatementTimeoutError, TooManyRowsError
from shardkit.gates import CANNOT_ANSWER
from shardkit.gather import Plan
from shardkit.keylists import KeyLists
from shardkit.schemas import ANY_SCHEMA
from shardkit.timeouts import limited
from shardkit.topology import schema_name

__all__ = [
    "CURSOR",
    "Cursor",
    "Gathering",
    "Scatter",
    "compose",
    "is_lost",
    "is_refused",
    "of",
    "sql_of",
    "too_many_rows",
    "view",
]

_OPTION: Final = "shardkit_scatter"
CURSOR: Final = "shardkit_cursor"
"""The execution option with the `Cursor` of a statement."""
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


@dataclass(frozen=True, slots=True)
class Cursor:
    """A cursor that a statement declares, or whose first rows stand for its answer.

    Attributes:
        name: of the cursor.
        n_rows: how many rows to fetch; None to declare it.
    """

    name: str
    n_rows: int | None = None

    def rewritten(self, statement: str, parameters: Any) -> tuple[str, Any]:
        """Return what is run in place of a statement."""
        if self.n_rows is None:
            return f"DECLARE {self.name} NO SCROLL CURSOR FOR {statement}", parameters
        return f"FETCH FORWARD {self.n_rows} FROM {self.name}", {}


def of(plan: Plan | None, shards: tuple[int, ...], max_rows: int | None) -> Scatter:
    """Return what one server runs of a plan, or of a statement that needs none.

    Args:
        plan: of the statement.
        shards: the logical shards of that server to ask.
        max_rows: rows that may be held; the server sends at most one more, which tells. None
            for any number.
    """
    if plan is None:
        return Scatter(shards, "")
    tail = plan.tail
    if max_rows is not None and (plan.n_rows is None or plan.n_rows > max_rows):
        tail = f"{tail.removesuffix(f' LIMIT {plan.n_rows}')} LIMIT {max_rows + 1}"
    return Scatter(shards, tail, plan.lists, plan.union)


def view(engine: Engine) -> Engine:
    """Return a view of an engine that runs scattered statements over many schemas."""
    scattering = engine.execution_options(schema_translate_map={None: ANY_SCHEMA})
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
        scatter.lists.text(branch, shard).replace(f"{ANY_SCHEMA}.", f"{schema_name(shard)}.")
        for shard in scatter.shards
    )
    return union + scatter.tail


def sql_of(branch: Any, scatter: Scatter) -> str:
    """Return the SQL of one server for people to read; values stay parameters."""
    schemas = {None: ANY_SCHEMA}
    compiled = branch.compile(dialect=_DIALECT, schema_translate_map=schemas)
    return compose(compiled.preparer._render_schema_translates(compiled.string, schemas), scatter)


class Gathering:
    """One statement on its way through several servers.

    Only the round trips run in parallel; objects are made in the caller's thread, since a
    session belongs to one.

    Args:
        state: the execution that the session's hook was given.
        plan: what to run.
        max_rows: how many rows all servers may return together; None for any number.
        timeout: seconds for each server, or None.

    Attributes:
        answers: rows fetched, by name of the physical shard.
    """

    def __init__(
        self, state: ORMExecuteState, plan: Plan, *, max_rows: int | None, timeout: float | None
    ) -> None:
        self.answers: dict[str, int] = {}
        self._session = state.session
        self._plan = plan
        self._max_rows = max_rows
        self._timeout = timeout
        self._load = cast("Any", state._compile_state_cls)
        self._statement: Any = plan.branch
        self._options: Mapping[str, Any] = state.execution_options
        self._params = state.parameters
        self._bind_arguments = state.bind_arguments
        self._first: CursorResult[Any] | None = None
        self._rows: list[Any] = []
        if self._load is not None:
            self._statement, self._options, self._params = self._load.orm_pre_session_exec(
                state.session,
                self._statement,
                self._params,
                self._options,
                self._bind_arguments,
                is_pre_event=False,
            )

    def ask(
        self,
        servers: Mapping[str, tuple[Connection, tuple[int, ...]]],
        parallel: Callable[[Sequence[Callable[[], Any]]], list[Any]],
    ) -> dict[str, Exception]:
        """Ask servers at once; return the lost connection, timeout or fence of each that failed.

        Args:
            servers: connection, of an engine made by `view`, and logical shards, by name of the
                physical shard.
            parallel: runs tasks at the same time and returns result or exception of each.

        Raises:
            TooManyRowsError: they returned more rows than may be held.
        """
        tasks = [
            self._task(name, connection, of(self._plan, shards, self._max_rows))
            for name, (connection, shards) in servers.items()
        ]
        failures: dict[str, Exception] = {}
        for name, answer in zip(servers, parallel(tasks), strict=True):
            if isinstance(answer, Exception):
                # These are about a server; anything else is about the statement.
                is_late = isinstance(
                    answer, StatementTimeoutError | ShardFencedError
                ) or late_error(answer)
                if not (is_late or is_lost(answer) or is_refused(answer)):
                    raise answer
                failures[name] = answer
            else:
                self.answers[name] = len(answer)
                self._rows.extend(answer)
        if self._max_rows is not None and len(self._rows) > self._max_rows:
            raise too_many_rows(self._max_rows)
        return failures

    def result(self) -> Result[Any]:
        """Merge the answers, of which there is at least one, and load them."""
        # Merge what the driver returned and let SQLAlchemy read it as one server's answer.
        assert self._first is not None, "a server has answered"
        merged = self._plan.combine(self._rows)
        self._first.cursor_strategy = FullyBufferedCursorFetchStrategy(None, initial_buffer=merged)
        return self._loaded(self._first)

    def when_answered(self, tell: Callable[[Mapping[str, int]], None]) -> None:
        """Tell how many rows were fetched of each server, once all of them were."""
        tell(self.answers)

    def close(self) -> None:
        """Let go of what was opened; what was fetched needs nothing."""

    def _loaded(self, cursor: CursorResult[Any]) -> Result[Any]:
        """Load the rows that a result of the driver has, as those of one server."""
        result: Result[Any] = cursor
        if self._load is not None:
            result = self._load.orm_setup_cursor_result(
                self._session,
                self._statement,
                self._params,
                self._options,
                self._bind_arguments,
                cursor,
            )
        return _without_sort_columns(result, self._plan.n_columns) if self._plan.adds else result

    def _task(
        self,
        name: str,
        connection: Connection,
        scatter: Scatter,
    ) -> Callable[[], Sequence[Any]]:
        """Return what fetches the rows of a server."""

        def task() -> Sequence[Any]:
            result = self._execute(connection, scatter, {})
            rows: Sequence[Any] = cast("Any", result.cursor).fetchall()
            self._first = self._first or result
            return rows

        def in_time() -> Sequence[Any]:
            assert self._timeout is not None
            with limited(connection, self._timeout):
                return task()

        return task if self._timeout is None else in_time

    def _execute(
        self, connection: Connection, scatter: Scatter, options: Mapping[str, Any]
    ) -> CursorResult[Any]:
        # Rows are fetched here for the merge; what SQLAlchemy buffered would be missing.
        here = {**self._options, "stream_results": False, "yield_per": None, _OPTION: scatter}
        return connection.execute(
            self._statement, self._params or {}, execution_options={**here, **options}
        )


def is_lost(error: Exception) -> bool:
    """Tell whether an error is the loss of a connection."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def is_refused(error: Exception) -> bool:
    """Tell whether a replica could not answer, so that the primary is to be asked."""
    return isinstance(error, DBAPIError) and isinstance(error.orig, CANNOT_ANSWER)


def too_many_rows(max_rows: int) -> TooManyRowsError:
    """Return the error of a statement that would hold too many rows."""
    return TooManyRowsError(
        f"more than {max_rows:,} rows would be held",
        hint="add a LIMIT and a cursor, or all_shards(max_rows=…)",
    )


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


def _rewrite(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, context: Any, _many: object
) -> tuple[str, Any]:
    scatter = context.execution_options.get(_OPTION)
    if scatter is None:
        return statement, parameters
    refuse_many(len(parameters))  # they would be written out for each schema
    text = compose(statement, scatter)
    parameters = {**parameters, **scatter.lists.parameters(scatter.shards)}
    cursor = context.execution_options.get(CURSOR)
    return (text, parameters) if cursor is None else cursor.rewritten(text, parameters)
