"""Runs the parts of one write, each on its logical shard, and merges what they return.

The parts lie on one physical shard, so one connection and one transaction run all of them.
SQLAlchemy compiles each and keeps the session's objects in step, shard by shard: values that
depend on the execution, as of `onupdate`, are those of the object's own shard. Called by
`WriteSession`, which has checked where the parts go. Never decides where anything goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from sqlalchemy import Connection, Result
from sqlalchemy.orm import ORMExecuteState, bulk_persistence
from sqlalchemy.orm.context import QueryContext
from sqlalchemy.orm.evaluator import UnevaluatableError
from sqlalchemy.util import immutabledict

from shardkit.errors import UnsupportedStatementError
from shardkit.parts import Part

__all__ = ["is_bulk", "run"]

_BULK: Final[Any] = bulk_persistence

Connect = Callable[[int], Connection]
"""Returns the session's connection to a logical shard."""


class _Transaction:
    """What SQLAlchemy's bulk operations need of a transaction: a connection.

    Given its own, they refuse sessions that choose a connection for each object.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.session = self
        self.connection_callable = None

    def connection(self, _mapper: Any) -> Connection:
        return self._connection


def is_bulk(state: ORMExecuteState) -> bool:
    """Tell whether SQLAlchemy takes a write for rows of a class instead of for one statement."""
    for name in ("_sa_orm_insert_options", "_sa_orm_update_options"):
        options = state.execution_options.get(name)
        if options is not None:
            return bool(options._dml_strategy == "bulk")
    return False


def run(
    state: ORMExecuteState,
    parts: Sequence[Part],
    connect: Connect,
    shard_of: Callable[[Any], int | None],
) -> Result[Any]:
    """Run the parts of a write one after the other and return their results as one.

    Args:
        state: the execution that the session's hook was given.
        parts: what to run; on one physical shard.
        connect: returns the connection to a logical shard.
        shard_of: returns the logical shard of a stored object.
    """
    load = cast("Any", state)._compile_state_cls
    if load is None:
        cast("Any", state.session)._autoflush()
        results = [
            connect(part.shard).execute(
                part.statement,
                cast("Any", part.params or {}),
                execution_options=state.local_execution_options,
            )
            for part in parts
        ]
        return _merged(results, parts)
    if state.is_insert:
        return _inserted(state, load, parts, connect)
    if is_bulk(state):
        return _updated_rows(state, load, parts, connect)
    return _changed(state, load, parts, connect, shard_of)


def _prepared(
    state: ORMExecuteState, load: Any, part: Part, **extra: Any
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return statement, options, parameters and bind arguments as SQLAlchemy runs them."""
    bind_arguments = {**state.bind_arguments, "logical_shard": part.shard}
    options = immutabledict(state.local_execution_options).union(extra)
    statement, options, params = load.orm_pre_session_exec(
        state.session, part.statement, part.params, options, bind_arguments, is_pre_event=False
    )
    return statement, options, params, bind_arguments


def _inserted(
    state: ORMExecuteState, load: Any, parts: Sequence[Part], connect: Connect
) -> Result[Any]:
    bulk = is_bulk(state)
    prepared = [_prepared(state, load, part) for part in parts]
    results = []
    for part, (statement, options, params, _) in zip(parts, prepared, strict=True):
        connection = connect(part.shard)
        if not bulk:
            result = connection.execute(statement, params or {}, execution_options=options)
        else:
            chosen = options["_sa_orm_insert_options"]
            result = _BULK._bulk_insert(
                chosen._subject_mapper,
                [params] if isinstance(params, dict) else params,
                _Transaction(connection),
                isstates=False,
                return_defaults=False,
                render_nulls=chosen._render_nulls,
                use_orm_insert_stmt=statement,
                execution_options=options,
            )
        results.append(result)
    merged = _merged(results, parts)
    statement, options, params, bind_arguments = prepared[0]
    chosen = options["_sa_orm_insert_options"]
    if not statement._returning or chosen._dml_strategy == "raw":
        return merged
    if chosen._populate_existing:
        loading: Any = options.get("_sa_orm_load_options", QueryContext.default_load_options)
        loading += {"_populate_existing": True}
        options = options.union({"_sa_orm_load_options": loading})
    return cast(
        "Result[Any]",
        load._return_orm_returning(
            state.session, statement, params, options, bind_arguments, merged
        ),
    )


def _updated_rows(
    state: ORMExecuteState, load: Any, parts: Sequence[Part], connect: Connect
) -> Result[Any]:
    """Update rows by their primary keys."""
    prepared = [_prepared(state, load, part) for part in parts]
    result: Any = None
    for part, (statement, options, params, bind_arguments) in zip(parts, prepared, strict=True):
        chosen = options["_sa_orm_update_options"]
        if statement._where_criteria and chosen._synchronize_session == "evaluate":
            raise UnsupportedStatementError(
                "a bulk UPDATE with a further condition does not keep objects in step",
                hint='pass execution_options={"synchronize_session": None}',
            )
        result = _BULK._bulk_update(
            chosen._subject_mapper,
            params,
            _Transaction(connect(part.shard)),
            isstates=False,
            update_changed_only=False,
            use_orm_update_stmt=statement,
            enable_check_rowcount=not statement._where_criteria,
        )
        result = load.orm_setup_cursor_result(
            state.session, statement, params, options, bind_arguments, result
        )
    return cast("Result[Any]", result)


def _changed(
    state: ORMExecuteState,
    load: Any,
    parts: Sequence[Part],
    connect: Connect,
    shard_of: Callable[[Any], int | None],
) -> Result[Any]:
    """Run an UPDATE or DELETE; each shard's objects are changed by that shard's part alone."""
    session = state.session
    sync, condition = _synchronization(state, load)
    results: list[Any] = []
    places: dict[int, int | None] = {}
    last: Any = None
    for part in parts:
        # The condition is that of the whole statement, which can be evaluated where a part's
        # list of keys cannot; SQLAlchemy need not know of it before.
        said = False if sync == "evaluate" else sync
        last = _prepared(state, load, part, synchronize_session=said)
        statement, options, params, _ = last
        result = connect(part.shard).execute(statement, params or {}, execution_options=options)
        chosen = options["_sa_orm_update_options"]
        if sync == "evaluate":

            def here(obj: Any, shard: int = part.shard) -> Any:
                if id(obj) not in places:
                    places[id(obj)] = shard_of(obj)
                return condition(obj) if places[id(obj)] == shard else False

            chosen += {"_eval_condition": here}
            load._do_post_synchronize_evaluate(session, statement, result, chosen)
        elif sync == "fetch":
            load._do_post_synchronize_fetch(session, statement, result, chosen)
        results.append(result)
    merged = _merged(results, ())
    statement, options, params, bind_arguments = last
    return cast(
        "Result[Any]",
        load._return_orm_returning(session, statement, params, options, bind_arguments, merged),
    )


def _synchronization(state: ORMExecuteState, load: Any) -> tuple[Any, Any]:
    """Return how objects are kept in step, and the condition that tells which are concerned."""
    options: Any = state.update_delete_options
    sync = options._synchronize_session
    if options._dml_strategy != "orm" or sync not in {"auto", "evaluate"}:
        return sync if options._dml_strategy == "orm" else False, None
    try:
        return "evaluate", load._eval_condition_from_statement(options, state.statement)
    except UnevaluatableError:
        if sync == "evaluate":  # raises SQLAlchemy's own error
            load._do_pre_synchronize_evaluate(state.session, state.statement, None, {}, {}, options)
        return "fetch", None


def _merged(results: Sequence[Any], parts: Sequence[Part]) -> Result[Any]:
    """Return results as the first of them, with the rows and the row count of all.

    Rows are put in the order of the rows given, where each of those has one.
    """
    first = results[0]
    if len(results) == 1 or getattr(first, "context", None) is None:  # rows of a class, unreturned
        return cast("Result[Any]", first)
    counts = [result.context.rowcount for result in results]
    if first.returns_rows:
        answers = [result.all() for result in results]
        rows = [row for answer in answers for row in answer]
        if parts and all(
            len(part.positions) == len(answer) for part, answer in zip(parts, answers, strict=True)
        ):
            places = [place for part in parts for place in part.positions]
            by_place = dict(zip(places, rows, strict=True))
            rows = [by_place[place] for place in sorted(by_place)]
        first._rewind(rows)
    if parts and first.context.isinsert and not first.context._is_explicit_returning:
        _merge_keys(results, parts)
    first.context._rowcount = -1 if -1 in counts else sum(counts)
    return cast("Result[Any]", first)


def _merge_keys(results: Sequence[Any], parts: Sequence[Part]) -> None:
    """Have the first result tell the primary keys of all rows, in the order they were given."""
    places = [place for part in parts for place in part.positions]
    keys = [key for result in results for key in result.context.inserted_primary_key_rows]
    first = results[0].context
    if len(keys) == len(places):
        by_place = dict(zip(places, keys, strict=True))
        first.inserted_primary_key_rows = [by_place[place] for place in sorted(by_place)]
    else:  # several rows in one VALUES, of which SQLAlchemy knows no keys
        first.inserted_primary_key_rows = [None] * len(places)
