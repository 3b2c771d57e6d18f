"""Alembic revisions as plain SQL: written once by the author, run on every logical shard.

Each revision's `upgrade()` runs exactly once per command, in Alembic's offline mode, with no
schema in any name; what it emits is kept as text. Alembic's `op` is one global proxy, so this
happens in one thread; everything after it works on values. Called by `shardkit.ops.migrate`;
never opens a connection. Revisions that need one are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy import Dialect

from shardkit.errors import ConfigurationError, MigrationError
from shardkit.ops.safety import Finding, check, examine, rules

if TYPE_CHECKING:  # Alembic takes long to import, and most commands read no revision
    from alembic.script import Script

__all__ = ["Revision", "load", "locate"]


@dataclass(frozen=True, slots=True)
class Revision:
    """One step of the schema, rendered.

    Attributes:
        id: Alembic's identifier.
        summary: first line of the revision's docstring.
        path: the file it came from.
        statements: the SQL of `upgrade()` for every logical shard, in order; possibly empty.
        reference: that about reference tables, for every physical shard, in order.
        checksum: digest of the statements, white space apart; kept in the ledger.
        phase: `pre` runs before the new code, `post` once the old code is gone.
        allowed: rules the author sets aside, each with the reason.
        hazards: what the safety rules have against it, other than what is refused everywhere.
        is_undone: whether the statements are those of `downgrade()`.
    """

    id: str
    summary: str
    path: Path
    statements: tuple[str, ...]
    checksum: str
    reference: tuple[str, ...] = ()
    phase: str = "pre"
    allowed: Mapping[str, str] = field(default_factory=dict)
    hazards: tuple[Finding, ...] = ()
    is_undone: bool = False


# What a statement works on, where that is a table or an index of a table in the schema of
# reference tables. Other statements may refer to those.
_ON_REFERENCE = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
    r"(?:CREATE\s+(?:UNIQUE\s+)?INDEX\s[^(]*?\sON\s+(?:ONLY\s+)?"
    r"|(?:CREATE|ALTER|DROP|COMMENT\s+ON)\s+(?:TABLE|INDEX|SEQUENCE|COLUMN|VIEW|TYPE)\s+"
    r"(?:IF\s+(?:NOT\s+)?EXISTS\s+)?(?:ONLY\s+)?"
    r"|CREATE\s+TYPE\s+|INSERT\s+INTO\s+|UPDATE\s+(?:ONLY\s+)?|DELETE\s+FROM\s+(?:ONLY\s+)?"
    r'|TRUNCATE\s+(?:TABLE\s+)?)(?:reference|"reference")\s*\.',
    re.IGNORECASE | re.DOTALL,
)


_PHASE = re.compile(r"(?:^|_)(pre|post)(?:_|$)")


def locate(location: str, *, folder: Path) -> Path:
    """Return the folder a `migrations.location` names.

    Args:
        location: `package:folder` for revisions shipped inside a package, else a path.
        folder: what a relative path is relative to: the folder of `shardkit.toml`.

    Raises:
        ConfigurationError: there is no such package or folder.
    """
    package, colon, inside = location.partition(":")
    if colon:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(
                f"migrations.location: there is no package {package!r}",
                hint="install it, run from its folder, or give a path",
            )
        found = Path(spec.submodule_search_locations[0]) / inside
    else:
        found = folder / location
    if not found.is_dir():
        raise ConfigurationError(
            f"migrations.location: {found} is not a folder",
            hint='write "package:folder" or a path from the folder of shardkit.toml',
        )
    return found


def load(folder: Path, *, undo: Collection[str] = ()) -> tuple[Revision, ...]:
    """Read and render every revision of a folder, oldest first; possibly none.

    Args:
        folder: holds the revision files, directly or in `versions/` as Alembic lays it out.
        undo: revisions of which `downgrade()` is rendered; the others are left out then.

    Raises:
        MigrationError: a revision cannot be loaded or rendered, has several heads, or contains
            a statement `shardkit.ops.safety` refuses; the revision is named.
    """
    from alembic.script import ScriptDirectory  # noqa: PLC0415  see above

    versions = folder / "versions"
    script = ScriptDirectory(
        str(folder), version_locations=[str(versions if versions.is_dir() else folder)]
    )
    try:
        with _no_bytecode(), warnings.catch_warnings():
            # Alembic only warns about a missing predecessor, and forgets the revision.
            warnings.filterwarnings("error", message="Revision .* is not present")
            heads = script.get_heads()
            scripts = list(script.walk_revisions()) if len(heads) == 1 else []
    except Exception as error:  # a revision is a program: its import may fail in any way
        raise MigrationError(f"{folder}: revisions cannot be loaded: {error}") from error
    if len(heads) > 1:
        raise MigrationError(
            f"{folder}: there are {len(heads)} heads: {', '.join(sorted(heads))}",
            hint="merge them with `alembic merge heads`",
        )
    if undo:
        return tuple(
            _render(item, is_undone=True) for item in reversed(scripts) if item.revision in undo
        )
    return tuple(_render(item) for item in reversed(scripts))


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Read revisions from their source only.

    Python trusts a compiled file whose source has the same size and second of change, so an
    edit, or a checkout that sets times, could leave the old SQL in force.
    """
    before = sys.pycache_prefix
    with tempfile.TemporaryDirectory() as empty:
        sys.pycache_prefix = empty
        try:
            yield
        finally:
            sys.pycache_prefix = before


class _NoConnection:
    """What `op.get_bind()` returns: it knows the dialect and refuses everything else."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"there is no connection to call {name}() on")


def _render(script: Script, *, is_undone: bool = False) -> Revision:
    if not script.revision.isprintable():
        raise MigrationError(
            f"{script.path}: the name of the revision holds characters that cannot be printed",
            hint="give it another name; it is shown in terminals and kept in the ledger",
        )
    statements = _emitted(script, "downgrade" if is_undone else "upgrade")
    phase = _phase(script)
    own = tuple(_plain(text) for text in statements if not _ON_REFERENCE.match(text))
    reference = tuple(_plain(text) for text in statements if _ON_REFERENCE.match(text))
    # What undoes a revision is meant to take away.
    hazards = () if is_undone else examine([*reference, *own], phase=phase)
    return Revision(
        id=script.revision,
        summary=_printable((script.doc or "").strip().splitlines()[0]) if script.doc else "",
        path=Path(script.path),
        statements=own,
        checksum=("undo " if is_undone else "") + checksum(statements),
        reference=reference,
        phase=phase,
        allowed=_allowed(script, hazards) if not is_undone else {},
        hazards=hazards,
        is_undone=is_undone,
    )


def _emitted(script: Script, function: str) -> list[str]:
    """Return what upgrade() or downgrade() emits, every promise of the runner kept."""
    from alembic.operations import Operations  # noqa: PLC0415  see above
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415

    statements: list[str] = []
    context = MigrationContext.configure(
        dialect_name="postgresql",
        # Any other style doubles the percent signs of literals.
        dialect_opts={"paramstyle": "named"},
        opts={"as_sql": True, "output_buffer": io.StringIO()},
    )
    # Alembic's stand-in would drop the parameters of what is executed through it.
    context.impl.connection = context.connection = _NoConnection(context.dialect)  # type: ignore[assignment]
    context.impl.static_output = statements.append  # type: ignore[method-assign, assignment]
    try:
        with Operations.context(context):
            getattr(script.module, function)()
    except Exception as error:
        raise MigrationError(
            f"revision {script.revision}: {function}() cannot be written as plain SQL: {error}",
            hint="it runs without a connection; use op.* and op.execute() with literal SQL, "
            f"and bulk_insert() with typed columns, in {script.path}",
        ) from error
    for statement in statements:
        if finding := check(statement):
            raise MigrationError(
                f"revision {script.revision} {finding.problem}: {finding.statement}",
                hint=finding.remedy,
            )
    return statements


def _phase(script: Script) -> str:
    """Return the phase a revision says, by `phase = "post"` in it or in its name; else `pre`."""
    said = getattr(script.module, "phase", None)
    if said is None:
        found = _PHASE.search(script.revision) or _PHASE.search(Path(script.path).stem)
        said = found[1] if found else "pre"
    if said not in {"pre", "post"}:
        raise MigrationError(
            f"revision {script.revision}: its phase is {said!r}", hint='write "pre" or "post"'
        )
    return str(said)


def _allowed(script: Script, hazards: tuple[Finding, ...]) -> Mapping[str, str]:
    """Return the rules that `allow = {"rule": "reason"}` sets aside, each with its reason."""
    allowed = getattr(script.module, "allow", {})
    known = {each.name for each in rules() if each.when != "promise"}
    found = {finding.rule for finding in hazards}
    where = f"revision {script.revision}: allow"
    if not isinstance(allowed, Mapping):
        raise MigrationError(f"{where} is no dictionary", hint='write {"rule": "reason"}')
    for name, reason in allowed.items():
        if name not in known:
            raise MigrationError(
                f"{where} names {name!r}, which is no rule that can be set aside",
                hint="the rules are in docs/migrations.md",
            )
        if not isinstance(reason, str) or len(reason.strip()) < 10:
            raise MigrationError(
                f"{where}[{name!r}] gives no reason",
                hint="say in a sentence why it is safe here; it is kept in the ledger",
            )
        if name not in found:
            raise MigrationError(
                f"{where} names {name!r}, which nothing in the revision breaks",
                hint="leave it out",
            )
    return dict(allowed)


def _printable(text: str) -> str:
    """Return text without what steers a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _plain(text: str) -> str:
    return text.strip().rstrip(";")


def checksum(statements: list[str] | tuple[str, ...]) -> str:
    """Return a digest of statements that ignores how they are laid out."""
    plain = "\0".join(re.sub(r"[\s;]+", " ", text).strip() for text in statements)
    return hashlib.sha256(plain.encode()).hexdigest()
