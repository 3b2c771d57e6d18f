"""What a backup says about itself: one JSON file, checked when it is read. Pure, but for reading.

A backup is a folder whose name is its label: `manifest.json`, and for every physical shard `base`
(a plain base backup with PostgreSQL's own manifest) and `wal` (the log from before the base backup
to the label). The manifest names every file or the list that names it, each with its SHA-256, and
ends with a digest of itself. Called by every module of `shardkit.backup`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardkit.errors import BackupError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "NAME",
    "NOTHING",
    "LabelFile",
    "Manifest",
    "Part",
    "Place",
    "Rows",
    "decode",
    "encode",
    "name_at",
    "read",
    "sha256_of",
]

FORMAT: Final = 1
"""Version of the files; a newer one is refused, since it may mean something unknown here."""

MANIFEST: Final = "manifest.json"
NAME: Final = re.compile(r"\d{8}T\d{6}\.\d{3}Z\Z")
"""Names of backups, which are their labels: UTC, to the millisecond, and so in order."""

Found = TypeVar("Found", bound=BaseModel)

NOTHING: Final = hashlib.sha256().hexdigest()
"""SHA-256 of no rows."""

_CHUNK: Final = 1 << 20
_LONGEST: Final = 256 << 20
"""Bytes of a manifest: 8,192 logical shards of a hundred tables each, and some."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Segment = Annotated[str, Field(pattern=r"^[0-9A-F]{24}$|^[0-9A-F]{8}\.history$")]
Rows = tuple[int, Sha256] | None
"""Number of rows and SHA-256 of all of them in order; None where writes under way at the label
make it unknown."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Value):
    """One physical shard of a backup.

    Attributes:
        system_identifier: of the server, as `pg_control_system()` has it.
        timeline: of its log.
        version: of PostgreSQL, as `server_version_num`.
        segment_bytes: size of a file of log.
        lsn: end of the label in the log, as PostgreSQL writes log positions.
        size_bytes: of the base backup and its log.
        base: SHA-256 of the base backup's own manifest, which has that of every file.
        wal: SHA-256 by name of a file of log.
        settings: those that a server needs to replay the log.
        schemas: digest of the catalogue by name of the schema.
        rows: by `schema.table`; absent where it was not asked for.
    """

    system_identifier: str
    timeline: Annotated[int, Field(ge=1)]
    version: Annotated[int, Field(ge=100_000)]
    segment_bytes: Annotated[int, Field(ge=1 << 20)]
    lsn: Annotated[str, Field(pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]
    size_bytes: Annotated[int, Field(ge=0)]
    base: Sha256
    wal: Mapping[Segment, Sha256]
    settings: Mapping[Annotated[str, Field(pattern=r"^[a-z_]+$")], Annotated[int, Field(ge=0)]]
    schemas: Mapping[str, str]
    rows: Mapping[str, Rows] | None = None


class Place(_Value):
    """Where a label is in the log of one server."""

    lsn: Annotated[str, Field(pattern=r"^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]
    timeline: Annotated[int, Field(ge=1)]


PhysicalName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]


class Manifest(_Value):
    """The whole of a backup.

    Attributes:
        format: version of the files.
        name: of the backup, and of its restore point on every server.
        cluster: whose it is.
        logical_shards: their fixed number.
        label_at: when the label was taken, by the first server's clock, in UTC.
        window: seconds between the first and the last server's restore point.
        physical: by name of the physical shard.
    """

    format: int
    name: Annotated[str, Field(pattern=NAME.pattern.replace(r"\Z", "$"))]
    cluster: str
    logical_shards: Annotated[int, Field(ge=1, le=8192)]
    label_at: dt.datetime
    window: Annotated[float, Field(ge=0)]
    physical: Annotated[Mapping[PhysicalName, Part], Field(min_length=1)]

    @property
    def size_bytes(self) -> int:
        """Bytes of all physical shards together."""
        return sum(part.size_bytes for part in self.physical.values())


class LabelFile(_Value):
    """A label in the archived log, without a backup of its own.

    Attributes:
        format: version of the files.
        name: of its restore point on every server.
        label_at: when it was taken, in UTC.
        window: as in a backup.
        physical: where it is, by name of the physical shard.
    """

    format: int
    name: Annotated[str, Field(pattern=NAME.pattern.replace(r"\Z", "$"))]
    label_at: dt.datetime
    window: Annotated[float, Field(ge=0)]
    physical: Mapping[PhysicalName, Place]


def name_at(unix_ms: int) -> str:
    """Return the name of a backup that begins at a time."""
    at = dt.datetime.fromtimestamp(unix_ms / 1000, dt.UTC)
    return f"{at:%Y%m%dT%H%M%S}.{unix_ms % 1000:03d}Z"


def encode(value: BaseModel) -> str:
    """Return the text of a file, its digest included."""
    content = value.model_dump(mode="json")
    return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"


def read(folder: Path) -> Manifest:
    """Return the manifest of a backup.

    Raises:
        BackupError: it is missing, damaged or of a newer format; nothing is taken from it.
    """
    return decode(folder / MANIFEST, Manifest, folder.name)


def decode(file: Path, kind: type[Found], name: str) -> Found:
    """Return what a file that `encode` wrote says.

    Args:
        file: which; its content is not trusted.
        kind: what it is.
        name: what it must be called.

    Raises:
        BackupError: it is missing, damaged or of a newer format; nothing is taken from it.
    """
    try:
        if file.stat().st_size > _LONGEST:
            raise ValueError(f"larger than {_LONGEST:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")  # noqa: TRY004  one kind of damage among others
        if isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise BackupError(
                f"{file}: format {content['format']} is newer than {FORMAT}",
                hint="use the shardkit that made it, or a newer one",
            )
        digest = content.pop("sha256", None)
        if digest != _digest(content):
            raise ValueError("its content is not what its digest says")
        found = kind.model_validate(content)
        if name not in {"", getattr(found, "name", "")}:
            raise ValueError(f"it belongs to {getattr(found, 'name', 'another')}")
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise BackupError(f"{file}: cannot be used: {reason}") from error
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
