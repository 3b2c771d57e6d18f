"""SQL as PostgreSQL's own parser reads it: statements, what they name, and where.

The grammar is PostgreSQL 18's, from libpg_query through `postgast`; nothing here guesses with
patterns. Called by the safety rules, by `shardkit.ops.steps` and by the revisions. Pure: it never
opens a connection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import postgast

__all__ = ["Statement", "name_of", "named", "nodes", "parse", "pieces", "relation"]

Node = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement.

    Attributes:
        text: as written, comments included, without its semicolon.
        kind: what it is, in libpg_query's words: `alter_table_stmt`.
        body: its parse tree; members that have their default value are missing.
        start: position of its text in what was parsed, in bytes.
    """

    text: str
    kind: str
    body: Node
    start: int


@lru_cache(maxsize=4096)
def parse(sql: str) -> tuple[Statement, ...]:
    """Return the statements of a text, in order; none for an empty one.

    Raises:
        ValueError: it is not SQL that PostgreSQL reads.
    """
    try:
        tree = postgast.parse(sql)
    except postgast.PgQueryError as error:
        raise ValueError(str(error)) from error
    raw = sql.encode()
    found = []
    for item in _plain(tree).get("stmts", ()):
        start = item.get("stmt_location", 0)
        end = start + item["stmt_len"] if "stmt_len" in item else len(raw)
        [(kind, body)] = item["stmt"].items()
        text = raw[start:end].decode()
        found.append(Statement(text.strip(), kind, body, start))
    return tuple(found)


def _plain(message: Any) -> dict[str, Any]:
    """Return a protobuf message as a dictionary of the members it sets, enumerations by name."""
    found: dict[str, Any] = {}
    for member, value in message.ListFields():
        if member.message_type is not None:
            is_list = hasattr(value, "append")
            found[member.name] = [_plain(item) for item in value] if is_list else _plain(value)
        elif member.enum_type is not None:
            found[member.name] = member.enum_type.values_by_number[value].name
        else:
            found[member.name] = value
    return found


def nodes(tree: Any, kind: str) -> Iterator[Node]:
    """Return every node of a kind below a node."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == kind and isinstance(value, Mapping):
                yield value
            yield from nodes(value, kind)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value, kind)


def relation(node: Node) -> str:
    """Return the name of a table as it is written, with its schema where it has one."""
    schema = node.get("schemaname")
    return f"{schema}.{node['relname']}" if schema else str(node["relname"])


def named(body: Node) -> str | None:
    """Return the table a statement is about, or None."""
    found = body.get("relation")
    return relation(found) if isinstance(found, Mapping) and "relname" in found else None


def name_of(parts: Any) -> str:
    """Return a name that is kept as a list of its parts: `x.b`."""
    if isinstance(parts, Mapping):
        parts = parts.get("list", parts)
        parts = parts.get("items", [parts]) if isinstance(parts, Mapping) else parts
    return ".".join(item["string"]["sval"] for item in parts if "string" in item)


@lru_cache(maxsize=4096)
def pieces(text: str, temporary: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Return a statement cut wherever the name of a table stands without its schema.

    Joined with `"shard_0042".` it names the tables of that logical shard, whatever the search
    path. Types, functions, and what a string or a function's body names are left to the search
    path: their names depend on more than the text.

    Args:
        text: one statement.
        temporary: tables that live in no schema of the application's.
    """
    raw = text.encode()
    cuts = []
    for statement in parse(text):
        common = {node["ctename"] for node in nodes(statement.body, "common_table_expr")}
        for node in _tables(statement.body):
            name = node["relname"]
            if (
                node.get("schemaname")
                or node.get("relpersistence") == "t"
                or name in common
                or name in temporary
                or name.startswith("pg_")
                or node.get("location", -1) < 0
            ):
                continue
            cuts.append(node["location"])
    edges = [0, *sorted(set(cuts)), len(raw)]
    return tuple(raw[a:b].decode() for a, b in itertools.pairwise(edges))


def _tables(tree: Any) -> Iterator[Node]:
    if isinstance(tree, Mapping):
        if "relname" in tree and "relpersistence" in tree:
            yield tree
        for value in tree.values():
            yield from _tables(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tables(value)
