"""What a rule is, and how statements are put to all of them.

Each rule is a function under `@rule` in a module of this package, named by what it forbids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from shardkit.ops.sqltree import Node, Statement, named, nodes, parse, relation

__all__ = ["Finding", "Rule", "Scene", "check", "commands", "examine", "rule", "rules", "typed"]

When = Literal["promise", "always", "large", "used", "advice"]
"""Where a finding counts: everywhere and for good; wherever the tables are in use already; where
the table is larger than the limit; where it holds any rows; nowhere, it is only told."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to refuse a statement.

    Attributes:
        problem: what the statement does, in words.
        remedy: what to write instead.
        statement: the offending statement, shortened to one line.
        rule: the rule's name, for an override.
        when: where it counts.
        table: the table concerned, with its schema where the statement gives one, or None.
    """

    problem: str
    remedy: str
    statement: str
    rule: str = ""
    when: When = "promise"
    table: str | None = None


@dataclass(slots=True)
class Scene:
    """What earlier statements of the same revision have established.

    Attributes:
        phase: of the revision, `pre` or `post`.
        made: tables it has created, which nobody uses yet.
        checks: columns that a constraint not validated yet says are not null, by its name.
        proved: columns that are known to hold no nulls, as `(table, column)`.
    """

    phase: str = "pre"
    made: set[str] = field(default_factory=set)
    checks: dict[str, tuple[str, str]] = field(default_factory=dict)
    proved: set[tuple[str, str]] = field(default_factory=set)

    def learn(self, statement: Statement) -> None:
        """Take note of what a statement establishes."""
        if statement.kind in {"create_stmt", "create_table_as_stmt"}:
            target = statement.body.get("relation") or statement.body["into"]["rel"]
            self.made.add(relation(target))
        for command in nodes(statement.body, "alter_table_cmd"):
            table = named(statement.body) or ""
            if command.get("subtype") == "AT_AddConstraint":
                constraint = command["def"]["constraint"]
                for test in nodes(constraint.get("raw_expr", {}), "null_test"):
                    column = next(nodes(test, "column_ref"), None)
                    if test.get("nulltesttype") == "IS_NOT_NULL" and column:
                        name = column["fields"][-1]["string"]["sval"]
                        self.checks[constraint.get("conname", "")] = (table, name)
            if command.get("subtype") == "AT_ValidateConstraint" and (
                proof := self.checks.get(command.get("name", ""))
            ):
                self.proved.add(proof)


Found = Iterator[str | None]
"""For each problem the table concerned, or None."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: what it forbids.
        problem: what a statement that breaks it does, in words.
        remedy: what to write instead.
        when: where it counts.
        squawk: names of squawk's counterparts.
        strong: names of strong_migrations' counterparts.
        find: the function that decides.
    """

    name: str
    problem: str
    remedy: str
    when: When
    squawk: tuple[str, ...]
    strong: tuple[str, ...]
    find: Callable[[Statement, Scene], Found]


_RULES: list[Rule] = []


def rules() -> tuple[Rule, ...]:
    """Return every rule."""
    return tuple(_RULES)


def rule(
    problem: str,
    remedy: str,
    when: When,
    *,
    squawk: Iterable[str] = (),
    strong: Iterable[str] = (),
) -> Callable[[Callable[[Statement, Scene], Found]], Callable[[Statement, Scene], Found]]:
    """Make a rule of a function, which is named by what it forbids."""

    def register(find: Callable[[Statement, Scene], Found]) -> Callable[[Statement, Scene], Found]:
        name = find.__name__.replace("_", "-")
        _RULES.append(Rule(name, problem, remedy, when, tuple(squawk), tuple(strong), find))
        return find

    return register


def commands(statement: Statement, *subtypes: str) -> Iterator[tuple[str, Node]]:
    """Return the table and the command of each part of an ALTER TABLE of some kinds."""
    if statement.kind != "alter_table_stmt":
        return
    for item in statement.body.get("cmds", ()):
        command = item["alter_table_cmd"]
        if command.get("subtype", "AT_AddColumn") in subtypes:
            yield named(statement.body) or "", command


def check(sql: str) -> Finding | None:
    """Return the first promise that some SQL breaks, or None when it may run.

    Args:
        sql: one or several statements as PostgreSQL reads them.
    """
    try:
        statements = parse(sql)
    except ValueError as error:
        return Finding(
            "is not SQL that PostgreSQL 18 reads", str(error), shorten(sql), "syntax-error"
        )
    found = _examine(statements, Scene(), [r for r in _RULES if r.when == "promise"])
    return next(found, None)


def examine(texts: Iterable[str], *, phase: str = "pre") -> tuple[Finding, ...]:
    """Return every hazard of a revision's statements, in order; advice too.

    Args:
        texts: one or several statements each, that `check` lets pass.
        phase: of the revision.
    """
    statements = [statement for text in texts for statement in parse(text)]
    wanted = [r for r in _RULES if r.when != "promise"]
    return tuple(_examine(statements, Scene(phase), wanted))


def _examine(
    statements: Iterable[Statement], scene: Scene, wanted: Iterable[Rule]
) -> Iterator[Finding]:
    for statement in statements:
        for each in wanted:
            for table in each.find(statement, scene):
                if table is not None and table in scene.made:
                    continue
                yield Finding(
                    each.problem,
                    each.remedy,
                    shorten(statement.text),
                    each.name,
                    each.when,
                    table,
                )
        scene.learn(statement)


def shorten(statement: str) -> str:
    """Return a statement on one line of at most 80 characters, without what steers a terminal."""
    line = " ".join(re.sub(r"[^\S ]+", " ", statement).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= 80 else line[:79] + "…"


def typed(column: Any) -> str:
    """Return the name of a column's type, as PostgreSQL calls it, without its schema."""
    names = column.get("type_name", {}).get("names", ())
    return str(names[-1]["string"]["sval"]) if names else ""
