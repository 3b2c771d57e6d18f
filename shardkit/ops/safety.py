"""What a migration's SQL may not contain, as pure rules.

Called by `shardkit.ops.revisions` on the text of every statement, before anything runs. The
rules protect the runner's own promises: one transaction per logical shard, names resolved in
that shard's schema only, every wait for a lock bounded. It reads text, never a database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Finding", "check"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to refuse a statement.

    Attributes:
        problem: what the statement does, in words.
        remedy: what to write instead.
        statement: the offending statement, shortened to one line.
    """

    problem: str
    remedy: str
    statement: str


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    problem: str
    remedy: str


def _rule(pattern: str, problem: str, remedy: str) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE | re.DOTALL), problem, remedy)


# Each pattern is matched at the start of one statement without its comments and literals.
_RULES = (
    _rule(
        r"(COMMIT|ROLLBACK|BEGIN|START\s+TRANSACTION|END|ABORT|SAVEPOINT|RELEASE"
        r"|PREPARE\s+TRANSACTION)\b",
        "controls the transaction",
        "the runner commits each logical shard together with its ledger row; split the revision",
    ),
    _rule(
        r"(CREATE\s+(UNIQUE\s+)?INDEX|DROP\s+INDEX|REINDEX\b.*)\s+CONCURRENTLY\b",
        "works on an index CONCURRENTLY",
        "it cannot run inside a transaction; build the index without CONCURRENTLY",
    ),
    _rule(
        r"(ALTER\s+TABLE\b.*\bDETACH\s+PARTITION\b.*\bCONCURRENTLY\b|VACUUM\b|ALTER\s+SYSTEM\b"
        r"|(CREATE|DROP|ALTER)\s+(DATABASE|TABLESPACE|ROLE|USER)\b)",
        "cannot run once per logical shard inside a transaction",
        "run it once per server, outside the migrations",
    ),
    _rule(
        r"(SET\s+((LOCAL|SESSION)\s+)?|RESET\s+)"
        r"(\"?search_path\"?|SCHEMA|ROLE|SESSION\s+AUTHORIZATION|lock_timeout|statement_timeout|ALL)\b",
        "changes a setting the runner relies on",
        "the runner sets search_path and the timeouts; leave the statement out",
    ),
    _rule(
        r"(CREATE|DROP|ALTER)\s+SCHEMA\b",
        "changes a schema",
        "schemas belong to shardkit; name tables without a schema",
    ),
    _rule(
        r".*(?<![\w$.])\"?(shard_\d{4}|shardkit)\"?\s*\.",
        "names the schema of one logical shard",
        "name tables without a schema; the runner points search_path at each logical shard",
    ),
    _rule(
        r"COPY\b.*\bFROM\s+STDIN\b",
        "reads from standard input",
        "use INSERT; the runner sends statements only",
    ),
)

_SEARCH_PATH_CALL = re.compile(r"\bset_config\s*\(\s*'search_path'", re.IGNORECASE)

# Comments and every kind of literal; quoted identifiers stay.
_OPAQUE = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?\*/ )
    | \b[eE]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | (?P<tag>\$(?:[A-Za-z_]\w*)?\$).*?(?P=tag)
    """,
    re.DOTALL | re.VERBOSE,
)


def check(sql: str) -> Finding | None:
    """Return the first reason to refuse some SQL, or None when it may run.

    Args:
        sql: one or several statements as PostgreSQL reads them.
    """
    if _SEARCH_PATH_CALL.search(sql):
        search_path = _RULES[3]
        return Finding(search_path.problem, search_path.remedy, _shorten(sql))
    plain = _OPAQUE.sub(lambda match: " " if match["comment"] else "''", sql)
    for statement in plain.split(";"):
        text = statement.strip()
        for rule in _RULES:
            if rule.pattern.match(text):
                return Finding(rule.problem, rule.remedy, _shorten(text))
    return None


def _shorten(statement: str) -> str:
    """Return a statement on one line of at most 80 characters."""
    line = " ".join(statement.split())
    return line if len(line) <= 80 else line[:79] + "…"
