"""The files of a plain base backup against PostgreSQL's own manifest.

The same comparison as pg_verifybackup's, for where that program is missing or does not run (some
packages of PostgreSQL ship one that does not). Called by `verify`.
Source: PostgreSQL manual, 71, "Backup Manifest Format".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from shardkit.backup.manifest import sha256_of
from shardkit.errors import BackupError

__all__ = ["LISTED", "differences", "listed"]

LISTED: Final = "backup_manifest"
_MOST: Final = 5


def listed(base: Path) -> dict[str, Any]:
    """Return PostgreSQL's manifest of a base backup.

    Raises:
        BackupError: it cannot be read.
    """
    try:
        found = json.loads((base / LISTED).read_text(encoding="utf-8"))
        _ = found["Files"], found["WAL-Ranges"][0]["Start-LSN"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise BackupError(f"{base / LISTED}: cannot be read: {error}") from error
    assert isinstance(found, dict)
    return found


def differences(base: Path) -> list[str]:
    """Return the first files that are missing, too much or other than listed; possibly none."""
    expected = {_path(entry): entry for entry in listed(base)["Files"]}
    here = {
        str(path.relative_to(base))
        for path in base.rglob("*")
        if not path.is_dir() or path.is_symlink()
    } - {LISTED}
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - here)]
    wrong += [f"{name} does not belong to it" for name in sorted(here - expected.keys())]
    for name in sorted(expected.keys() & here):
        if len(wrong) >= _MOST:
            break
        path, entry = base / name, expected[name]
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry["Size"]:
            wrong.append(f"{name} has another size")
        elif entry.get("Checksum-Algorithm") != "SHA256" or sha256_of(path) != entry["Checksum"]:
            wrong.append(f"{name} is damaged")
    return wrong[:_MOST]


def _path(entry: dict[str, Any]) -> str:
    encoded = entry.get("Encoded-Path")
    if encoded is None:
        return str(entry["Path"])
    return bytes.fromhex(encoded).decode("utf-8", "surrogateescape")
