"""One logical shard as files: what the manifest of an export says, and files that are not trusted.

An export is a folder: `export.json`, `schema.sql` (what pg_dump makes of the schema, for people and
for the day when there is no shardkit), and one `.copy` file per table, as PostgreSQL's COPY writes
text. Text and not pg_dump's archive: the tables are there already, made by the same revisions, so
only rows travel; the text of COPY is what every version of PostgreSQL reads; and written in the
order of the primary key, the SHA-256 of a file is that of the table. Called by `exporting` and
`importing`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from shardkit.backup.manifest import FORMAT, decode
from shardkit.errors import BackupError

__all__ = ["EXPORT", "SCHEMA", "ShardFile", "TableFile", "check", "pieces", "read"]

EXPORT: Final = "export.json"
SCHEMA: Final = "schema.sql"
_CHUNK: Final = 1 << 18

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableFile(_Value):
    """The rows of one table.

    Attributes:
        file: name of its file; made of a number, so that no table's name is a path.
        columns: in the order of the file.
        rows: how many.
        size_bytes: of the file.
        sha256: of the file, and so of the rows in order.
    """

    file: Annotated[str, Field(pattern=r"^[0-9]{4}\.copy$")]
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: Count
    size_bytes: Count
    sha256: Sha256


class ShardFile(_Value):
    """The whole of an export.

    Attributes:
        format: version of the files.
        cluster: where it comes from.
        logical_shard: its number, which every id in it carries.
        logical_shards: how many there are.
        id_epoch_ms: what ids count from.
        version: of PostgreSQL, as `server_version_num`.
        at: when the rows were as they are, by the server's clock.
        epoch: of its ownership.
        id_state: the last id given away, as `shardkit_id_state` has it.
        catalogue: digest of the schema.
        revisions: checksum by revision.
        rules: how the rows of tables are placed, by table.
        sequences: last value by name.
        tables: by name.
        schema_sha256: of `schema.sql`.
    """

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    cluster: str
    logical_shard: Annotated[int, Field(ge=0, lt=8192)]
    logical_shards: Annotated[int, Field(ge=1, le=8192)]
    id_epoch_ms: Count
    version: Annotated[int, Field(ge=100_000)]
    at: dt.datetime
    epoch: Count
    id_state: Annotated[int, Field(ge=0, lt=1 << 50)]
    catalogue: Sha256
    revisions: Mapping[str, str]
    rules: Mapping[str, str]
    sequences: Mapping[str, Count]
    tables: Mapping[str, TableFile]
    schema_sha256: Sha256

    @property
    def n_rows(self) -> int:
        """Rows of all tables together."""
        return sum(table.rows for table in self.tables.values())


def read(folder: Path) -> ShardFile:
    """Return the manifest of an export.

    Raises:
        BackupError: it is missing, damaged or of a newer format.
    """
    return decode(folder / EXPORT, ShardFile, "")


def check(folder: Path, found: ShardFile) -> None:
    """Make sure that every file is there and what it was.

    Raises:
        BackupError: one is missing, damaged, no plain file, or named twice.
    """
    files = [table.file for table in found.tables.values()]
    if len(set(files)) != len(files):
        raise BackupError(f"{folder / EXPORT}: names a file twice")
    for name, table in found.tables.items():
        digest, size = hashlib.sha256(), 0
        for piece in pieces(folder / table.file):
            digest.update(piece)
            size += len(piece)
        if (size, digest.hexdigest()) != (table.size_bytes, table.sha256):
            raise BackupError(
                f"{folder / table.file}, the rows of {name!r}: is damaged or cut short"
            )


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a plain file.

    Raises:
        BackupError: it is missing, a link or anything but a file.
    """
    try:
        # Not to wait for whoever would write into a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BackupError(f"{path}: cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BackupError(f"{path}: is no plain file")
        while piece := file.read(_CHUNK):
            yield piece
