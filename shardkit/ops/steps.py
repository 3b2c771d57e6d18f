"""A revision cut into transactions, and those compiled to text for every logical shard at once.

A step is what commits together with its ledger row. A revision whose strong locks are all on one
live table, or on tables it makes itself, is one step: a second transaction on the same table
would only queue for the same lock again. Otherwise it is cut, so that no transaction holds strong
locks on two live tables, none scans or writes rows under a lock on a table's definition, and an
index is built CONCURRENTLY outside of any. Source: docs/migrations.md.

Called by `shardkit.ops.apply` and by the safety rules; pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from shardkit.ops.backfills import Backfill, backfill_of
from shardkit.ops.sqltree import Statement, name_of, named, nodes, parse, pieces, relation
from shardkit.topology import schema_name

__all__ = ["MARK", "Step", "at_once", "is_concurrent", "render", "split", "steps"]

MARK = "shard_c7b1f5d2a9e34086"
"""Stands for the schema of a logical shard in compiled text; no schema has this name."""

_CONCURRENTLY = re.compile(r"\s+CONCURRENTLY\b", re.IGNORECASE)
_WRITES = ("insert_stmt", "update_stmt", "delete_stmt", "merge_stmt", "select_stmt", "do_stmt")


@dataclass(frozen=True, slots=True)
class Step:
    """Statements of a revision that commit together.

    Attributes:
        statements: one or more, each a single statement whose tables carry `MARK`.
        end: how many statements of the revision are done after it.
        is_last: whether that is all of them.
        index: name of the index that is built or dropped outside a transaction, else None.
        is_drop: whether it is dropped.
        backfill: how the one statement runs in batches, else None.
        locks: live tables that it locks more than a write does.
        made: tables that it makes.
        is_alone: whether it reads or writes rows of live tables, or runs outside a transaction.
    """

    statements: tuple[str, ...]
    end: int
    is_last: bool
    index: str | None = None
    is_drop: bool = False
    backfill: Backfill | None = None
    locks: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()
    is_alone: bool = False

    @property
    def is_outside(self) -> bool:
        """Whether it is more, or less, than one transaction."""
        return self.index is not None or self.backfill is not None


def render(template: str, logical_shard: int) -> str:
    """Return compiled text for one logical shard."""
    return template.replace(MARK, schema_name(logical_shard))


def split(statements: Iterable[str]) -> tuple[Statement, ...]:
    """Return texts of one or several statements each as single statements."""
    return tuple(found for text in statements for found in parse(text))


def is_concurrent(statement: Statement) -> bool:
    """Return whether a statement works on an index CONCURRENTLY."""
    kinds = {"index_stmt", "drop_stmt"}
    return statement.kind in kinds and bool(statement.body.get("concurrent"))


@lru_cache(maxsize=1024)
def at_once(statements: tuple[str, ...]) -> tuple[str, ...]:
    """Return statements compiled for a schema nobody uses yet: all in one transaction."""
    found = split(statements)
    temporary = _temporary(found)
    texts = [
        _CONCURRENTLY.sub("", item.text, count=1) if is_concurrent(item) else item.text
        for item in found
    ]
    return tuple(_compile(text, temporary) for text in texts)


@lru_cache(maxsize=1024)
def steps(statements: tuple[str, ...], done: int = 0) -> tuple[Step, ...]:
    """Return the steps of a revision, in order.

    Args:
        statements: of the revision.
        done: how many single statements an earlier run has committed.
    """
    found = split(statements)
    temporary = _temporary(found)
    made: set[str] = set()
    groups: list[_Group] = []
    for number, statement in enumerate(found):
        locks = _locks(statement) - made
        single = is_concurrent(statement) or _stands_alone(statement, made)
        last = groups[-1] if groups else None
        if last is None or last.is_alone or single or (last.locks and locks - last.locks):
            groups.append(last := _Group([], set(), set(), single))
        last.numbers.append(number)
        last.locks.update(locks)
        if statement.kind == "create_stmt":
            table = relation(statement.body["relation"])
            made.add(table)
            last.made.add(table)
    # A run of another version may have cut elsewhere: what is done stays done.
    left = [_step(group, found, temporary, done) for group in groups if group.numbers[-1] >= done]
    return tuple(left) or (Step((), len(found), is_last=True),)


@dataclass(slots=True)
class _Group:
    """Statements that will be a step: their numbers, and what they are about."""

    numbers: list[int]
    locks: set[str]
    made: set[str]
    is_alone: bool


def _step(
    group: _Group, found: tuple[Statement, ...], temporary: frozenset[str], done: int
) -> Step:
    numbers = [number for number in group.numbers if number >= done]
    first = found[numbers[0]]
    concurrent = is_concurrent(first)
    backfill = backfill_of(first) if group.is_alone else None
    texts: tuple[str, ...]
    if backfill:
        texts = (_compile(backfill.text, temporary),)
    elif concurrent and first.kind == "drop_stmt":
        texts = (_drop(first),)
    else:
        texts = tuple(_compile(found[number].text, temporary) for number in numbers)
    end = numbers[-1] + 1
    return Step(
        texts,
        end,
        end == len(found),
        _index(first) if concurrent else None,
        concurrent and first.kind == "drop_stmt",
        backfill,
        frozenset(group.locks),
        frozenset(group.made),
        group.is_alone,
    )


def _compile(text: str, temporary: frozenset[str]) -> str:
    return f'"{MARK}".'.join(pieces(text, temporary))


def _drop(statement: Statement) -> str:
    """Return a DROP INDEX CONCURRENTLY with its schema, which no search path can give it here."""
    exists = "IF EXISTS " if statement.body.get("missing_ok") else ""
    name = _index(statement).replace('"', '""')
    return f'DROP INDEX CONCURRENTLY {exists}"{MARK}"."{name}"'


def _temporary(found: Iterable[Statement]) -> frozenset[str]:
    return frozenset(
        item.body["relation"]["relname"]
        for item in found
        if item.kind == "create_stmt" and item.body["relation"].get("relpersistence") == "t"
    )


def _index(statement: Statement) -> str:
    if statement.kind == "index_stmt":
        return str(statement.body.get("idxname", ""))
    return name_of(statement.body["objects"][0])


def _locks(statement: Statement) -> set[str]:
    """Return the tables that a statement locks more than a write does, as far as it says."""
    body = statement.body
    if statement.kind in _WRITES or is_concurrent(statement):
        return set()
    if statement.kind in {"drop_stmt", "comment_stmt"}:
        return {name_of(item) for item in body.get("objects", ())}
    found = {named(body)} - {None}
    found |= {relation(node) for node in nodes(body, "pktable")}
    found |= {relation(node["range_var"]) for node in body.get("relations", ()) if node}
    if statement.kind in {"create_stmt", "view_stmt", "create_seq_stmt"}:
        found.discard(named(body))
    return {name for name in found if name}


def _stands_alone(statement: Statement, made: set[str]) -> bool:
    """Return whether a statement reads or writes rows, which nobody should wait for."""
    if statement.kind in _WRITES:
        about = named(statement.body)
        return about is None or about not in made
    return any(
        command.get("subtype") == "AT_ValidateConstraint"
        for command in nodes(statement.body, "alter_table_cmd")
    )
