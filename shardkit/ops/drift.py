"""`shardkit migrate drift`: what logical shards are, against what they should be.

What they should be is not parsed from anything: the revisions are run into a schema of a
transaction that is rolled back, on each server, and its catalogue is read like that of the others;
so are the models. A logical shard that is behind is compared with the revisions it has. Called by
the command line; changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import MetaData
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from shardkit.errors import EndpointUnavailableError, MigrationError, ShardkitError, TryAgainError
from shardkit.ops.direct import connect
from shardkit.ops.ledger import OWN, Ledger, read, shard_script
from shardkit.ops.revisions import Revision
from shardkit.ops.shape import Objects, details, digests
from shardkit.topology import PhysicalShard, Topology, schema_name

__all__ = ["Difference", "Drift", "drift"]

_SCRATCH = 9999
"""A logical shard that cannot exist, since there are at most 8192."""

_CACHE = re.compile(
    r"^trigger:.*\.shardkit_(derived_[0-9a-f]{12}_)?(version|inserted|updated|deleted)$"
    r"|^function:shardkit_(changed|derived)_"
)
"""Triggers of cached tables, which `migrate apply` makes from the models, not from revisions."""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Difference:
    """One object that is not what it should be.

    Attributes:
        physical: where, or "models" when the revisions make something else than the models say.
        logical_shards: in which it is so, ascending; empty for models.
        kind: table, column, index, constraint, trigger, grant and so on.
        name: of the object, its table first.
        expected: its definition as the revisions or the models have it; None when there is none.
        found: its definition as it is; None when it is missing.
    """

    physical: str
    logical_shards: tuple[int, ...]
    kind: str
    name: str
    expected: str | None
    found: str | None


@dataclass(frozen=True, slots=True)
class Drift:
    """What was found.

    Attributes:
        differences: by server, kind and name.
        fingerprints: logical shards by the digest of their catalogue, by physical shard.
        errors: why nothing is known of a physical shard, by name.
    """

    differences: tuple[Difference, ...]
    fingerprints: Mapping[str, Mapping[str, tuple[int, ...]]]
    errors: Mapping[str, ShardkitError]


def drift(
    topology: Topology, revisions: Sequence[Revision], *, metadata: MetaData | None = None
) -> Drift:
    """Compare every logical shard with the revisions it has, and the revisions with the models.

    Args:
        topology: the cluster.
        revisions: oldest first.
        metadata: of the models, compared with what all revisions make; None leaves them out.

    Returns:
        Differences, possibly none. A physical shard that does not answer is named in `errors`.
    """
    differences: list[Difference] = []
    fingerprints: dict[str, dict[str, tuple[int, ...]]] = {}
    errors: dict[str, ShardkitError] = {}
    compared = metadata is None
    for name, shard in topology.physical.items():
        try:
            with connect(shard, application="shardkit migrate drift") as connection:
                ledger = read(connection)
                found, prints = _physical(connection, shard, ledger, revisions)
                if not compared and metadata is not None and ledger.identity is not None:
                    found += _models(connection, shard, revisions, metadata)
                    compared = True
        except ShardkitError as error:
            errors[name] = error
        except psycopg.errors.LockNotAvailable as error:
            errors[name] = TryAgainError(f"physical shard {name!r}: no lock: {error}")
        except psycopg.OperationalError as error:
            errors[name] = EndpointUnavailableError(
                f"physical shard {name!r} went away", hint=str(error).strip()
            )
        except psycopg.Error as error:
            errors[name] = MigrationError(
                f"physical shard {name!r}: the revisions cannot be tried: {error}"
            )
        else:
            differences += found
            fingerprints[name] = prints
    return Drift(tuple(differences), fingerprints, errors)


def _physical(
    connection: Connection, shard: PhysicalShard, ledger: Ledger, revisions: Sequence[Revision]
) -> tuple[list[Difference], dict[str, tuple[int, ...]]]:
    """Return the differences on one physical shard, and its logical shards by digest."""
    groups: dict[tuple[str, ...], list[int]] = {}
    differences: list[Difference] = []
    for number, row in sorted(ledger.ownership.items()):
        if row.state == "retired":
            continue
        done = ledger.applied.get(number, {})
        half = ledger.partial.get(number, {})
        if half:
            text = ", ".join(f"{name} after {step} statements" for name, (step, _) in half.items())
            differences.append(Difference(shard.name, (number,), "revision", text, None, "half"))
            continue
        if OWN not in done:
            differences.append(
                Difference(shard.name, (number,), "schema", schema_name(number), "made", None)
            )
            continue
        groups.setdefault(tuple(r.id for r in revisions if r.id in done), []).append(number)
    prints: dict[str, list[int]] = {}
    for ids, numbers in groups.items():
        with _scratch(connection, shard, [r for r in revisions if r.id in ids]) as schema:
            expected = digests(connection, [schema])[schema]
            objects = details(connection, [schema])[schema]
        schemas = {schema_name(number): number for number in numbers}
        found = digests(connection, list(schemas))
        for name, number in schemas.items():
            prints.setdefault(found.get(name, "missing"), []).append(number)
        odd = [name for name in schemas if found.get(name) != expected]
        merged: dict[tuple[str, str, str | None, str | None], list[int]] = {}
        for name, has in details(connection, odd).items():
            for each in _compare(objects, has):
                merged.setdefault(each, []).append(schemas[name])
        differences += [
            Difference(shard.name, tuple(where), *what)
            for what, where in sorted(merged.items(), key=str)
        ]
    return differences, {digest: tuple(found) for digest, found in prints.items()}


def _compare(
    expected: Objects, found: Objects
) -> Iterator[tuple[str, str, str | None, str | None]]:
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key) and not _CACHE.search(":".join(key)):
            yield (*key, expected.get(key), found.get(key))


def _models(
    connection: Connection,
    shard: PhysicalShard,
    revisions: Sequence[Revision],
    metadata: MetaData,
) -> list[Difference]:
    """Return what the models have and the revisions do not make, and the other way round."""
    tables = [table for table in metadata.sorted_tables if table.schema is None]
    names = {table.name for table in tables}
    with _scratch(connection, shard, revisions) as schema:
        made = details(connection, [schema])[schema]
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    script: list[str] = []
    for table in tables:
        script.append(str(CreateTable(table).compile(dialect=dialect)))
        script += [str(CreateIndex(index).compile(dialect=dialect)) for index in table.indexes]
    with _scratch(connection, shard, ()) as schema:
        text = f'SET LOCAL search_path = "{schema}"\n;\n' + "\n;\n".join(script)
        connection.execute(text.encode())
        wanted = details(connection, [schema])[schema]

    def relevant(objects: Objects) -> Objects:
        kinds = {"column", "index", "constraint", "table"}
        return {
            (kind, name): text
            for (kind, name), text in objects.items()
            if kind in kinds and not name.startswith("shardkit_")
        }

    found = [Difference("models", (), *each) for each in _compare(relevant(wanted), relevant(made))]
    return [each for each in found if _is_of(each, names)]


def _is_of(difference: Difference, names: set[str]) -> bool:
    """Return whether a difference is about the models' tables, or a table they do not have."""
    return difference.kind in {"table", "index"} or difference.name.split(".")[0] in names


@contextmanager
def _scratch(
    connection: Connection, shard: PhysicalShard, revisions: Sequence[Revision]
) -> Iterator[str]:
    """Run revisions into a schema that is gone afterwards."""
    script = shard_script(
        _SCRATCH,
        own=True,
        roles=shard.roles,
        revisions=revisions,
    )
    schema = schema_name(_SCRATCH)
    with connection.transaction(force_rollback=True):
        # A foreign key to a reference table locks that as well: briefly, or not at all.
        connection.execute("SET LOCAL lock_timeout = 300")
        connection.execute("SET LOCAL statement_timeout = 60000")
        connection.execute(script.encode())
        yield schema
