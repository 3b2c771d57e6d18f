"""`shardkit backup verify`: is everything there, and is it what was written?

PostgreSQL's manifest and every file of log are checked against ours; every file of the base backup
against PostgreSQL's manifest, by pg_verifybackup where it runs; the log has to be without a gap up
to the label, and pg_waldump to read all of it. Called by the command line and before a restore.
Only a restore proves more: `shardkit backup drill`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardkit.backup import manifest
from shardkit.backup.basefiles import LISTED, differences, listed
from shardkit.backup.label import segment_of
from shardkit.backup.tools import Tools
from shardkit.errors import BackupError

__all__ = ["needed", "problems", "verify"]


def verify(folder: Path, *, on_part: Callable[[str], None] = lambda _: None) -> manifest.Manifest:
    """Check a whole backup.

    Args:
        folder: of the backup.
        on_part: told of every physical shard that is through.

    Raises:
        BackupError: the manifest cannot be used, or a file is missing, damaged or too much.
    """
    found = manifest.read(folder)
    for physical, part in found.physical.items():
        with Tools(part.version // 10_000) as tools:
            wrong = problems(tools, folder / physical, part)
        if wrong:
            raise BackupError(
                f"{folder.name}: {physical}: {'; '.join(wrong)}",
                hint="do not restore it; make another with shardkit backup create",
            )
        on_part(physical)
    return found


def problems(tools: Tools, folder: Path, part: manifest.Part) -> list[str]:
    """Return what is wrong with one physical shard of a backup; possibly nothing."""
    base, wal = folder / "base", folder / "wal"
    if not (base / LISTED).is_file():
        return [f"its {LISTED} is missing"]
    if manifest.sha256_of(base / LISTED) != part.base:
        return [f"its {LISTED} was changed"]
    here = {path.name for path in wal.iterdir()} if wal.is_dir() else set()
    wrong = [f"{name} does not belong to it" for name in sorted(here - part.wal.keys())]
    for name, digest in part.wal.items():
        if name not in here:
            wrong.append(f"the file of log {name} is missing")
        elif manifest.sha256_of(wal / name) != digest:
            wrong.append(f"the file of log {name} is damaged")
    wrong += [f"the log has a gap: {n} is missing" for n in needed(base, part) if n not in part.wal]
    if wrong:
        return wrong
    start = str(listed(base)["WAL-Ranges"][0]["Start-LSN"])
    try:
        if tools.runs("pg_verifybackup"):
            tools.run("pg_verifybackup", "--quiet", "--wal-directory", wal, base)
        elif wrong := differences(base):
            return wrong
        tools.run(
            "pg_waldump",
            *("--quiet", "--path", wal, "--timeline", str(part.timeline)),
            *("--start", start, "--end", part.lsn),
        )
    except BackupError as error:
        return [error.message]
    return []


def needed(base: Path, part: manifest.Part) -> list[str]:
    """Return the files of log from the beginning of a base backup to the label.

    Raises:
        BackupError: PostgreSQL's manifest cannot be read.
    """
    first, last = _bytes(str(listed(base)["WAL-Ranges"][0]["Start-LSN"])), _bytes(part.lsn)
    size = part.segment_bytes
    ends = (number * size + 1 for number in range(first // size, (last - 1) // size + 1))
    return [segment_of(f"{e >> 32:X}/{e & 0xFFFFFFFF:X}", part.timeline, size) for e in ends]


def _bytes(lsn: str) -> int:
    high, low = (int(text, 16) for text in lsn.split("/"))
    return (high << 32) + low
