"""An UPDATE or DELETE that is to run in batches: how a revision says so, and its text by the batch.

A comment at the end of the statement carries it through Alembic and the checksum, so that what is
kept is plain SQL that anybody can read and run. Called by `shardkit.migrations`, which writes it,
and by `shardkit.ops.steps`, which finds it; pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import postgast
from psycopg import sql

from shardkit.ops.sqltree import Statement, parse

__all__ = ["RANGE", "Backfill", "backfill_of", "tagged", "within"]

RANGE = "shardkit_range_c7b1f5d2a9e34086"
"""Stands for the bounds of a batch in compiled text; no column has this name."""

_TAG = re.compile(r"/\* shardkit: in batches of at most (\d{1,7}) rows \*/\s*$")


@dataclass(frozen=True, slots=True)
class Backfill:
    """A statement that runs in batches.

    Attributes:
        text: of it, with `RANGE` as one more condition.
        table: whose rows it changes, without a schema.
        alias: what the statement calls that table.
        rows: of the table that a batch reads at most.
    """

    text: str
    table: str
    alias: str
    rows: int


def tagged(statement: str, *, rows: int) -> str:
    """Return a statement that says that it runs in batches.

    Args:
        statement: one UPDATE or DELETE of a table of a logical shard, without RETURNING.
        rows: of the table that a batch reads at most; 1 to 1,000,000.

    Raises:
        ValueError: it is something else.
    """
    if not 1 <= rows <= 1_000_000:
        raise ValueError(f"a batch has 1 to 1,000,000 rows, not {rows}")
    plain = statement.strip().rstrip(";").rstrip()
    found = parse(plain)
    if len(found) != 1 or found[0].kind not in {"update_stmt", "delete_stmt"}:
        raise ValueError("a backfill is one UPDATE or one DELETE")
    # A line of its own: the statement may end in a `--` comment.
    text = f"{plain}\n/* shardkit: in batches of at most {rows} rows */"
    [one] = parse(text)
    if backfill_of(one) is None:
        raise ValueError("a backfill names its table without a schema, and returns nothing")
    return text


def backfill_of(statement: Statement) -> Backfill | None:
    """Return how a statement runs in batches; None when it runs at once."""
    tag = _TAG.search(statement.text)
    if tag is None or statement.kind not in {"update_stmt", "delete_stmt"}:
        return None
    body = statement.body
    target = body["relation"]
    if target.get("schemaname") or body.get("returning_list") or body.get("returning_clause"):
        return None
    alias = target.get("alias", {}).get("aliasname", target["relname"])
    text = _restricted(statement.text[: tag.start()].rstrip())
    return Backfill(text, target["relname"], alias, int(tag[1]))


def _restricted(text: str) -> str:
    """Return a statement with one more condition: only its own WHERE is outside all brackets."""
    raw = text.encode()
    depth = 0
    for token in postgast.scan(text).tokens:
        word = raw[token.start : token.end].upper()
        depth += (word == b"(") - (word == b")")
        if depth == 0 and word == b"WHERE":
            head, tail = raw[: token.end].decode(), raw[token.end :].decode()
            return f"{head} (\n{tail.strip()}\n) AND {RANGE}"
    return f"{text}\nWHERE {RANGE}"


def within(
    alias: str,
    key: tuple[tuple[str, str], ...],
    after: tuple[str, ...] | None,
    until: tuple[str, ...] | None,
) -> str:
    """Return the condition that a row is in a batch.

    Args:
        alias: of the table.
        key: columns of its primary key, each with its type as SQL.
        after: values as text of the last row before the batch; None when it is the first.
        until: those of the last row of it; None when it goes to the end.
    """
    columns = sql.SQL(", ").join(sql.Identifier(alias, name) for name, _ in key)
    bounds = [
        sql.SQL("({}) {} ({})").format(
            columns,
            sql.SQL(sign),
            sql.SQL(", ").join(
                sql.SQL("{}::{}").format(value, sql.SQL(kind))
                for value, (_, kind) in zip(values, key, strict=True)
            ),
        )
        for sign, values in ((">", after), ("<=", until))
        if values is not None
    ]
    return f"({sql.SQL(' AND ').join(bounds).as_string(None) if bounds else 'true'})"
