"""When the newest commit in the log that is kept was made, as pg_waldump reads it.

Called by the drill, which measures how much a restore leaves out.
"""

from __future__ import annotations

import datetime as dt
import re
import tempfile
from pathlib import Path
from typing import Final

from shardkit.backup import manifest
from shardkit.backup.store import Store
from shardkit.backup.tools import Tools
from shardkit.local.binaries import SHARED_FOLDER

__all__ = ["newest_commit"]

_COMMIT: Final = re.compile(
    r"desc: COMMIT(?:_PREPARED)? (?:\S+: )?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC"
)
_SEGMENT: Final = re.compile(r"([0-9A-F]{24})(?:\.partial)?\Z")
_FILES: Final = 4
"""Files of log that are looked at, from the newest back, for one that has a commit."""


def newest_commit(tools: Tools, store: Store, found: manifest.Manifest) -> dt.datetime | None:
    """Return the time of the newest commit of any server in the archive or the backup.

    Args:
        tools: of the version that wrote the log.
        store: with the archived log, if there is any.
        found: the backup.
    """
    newest: dt.datetime | None = None
    for physical in found.physical:
        files: dict[str, Path] = {}
        for folder in (store.folder / found.name / physical / "wal", store.wal(physical)):
            for path in folder.iterdir() if folder.is_dir() else ():
                if match := _SEGMENT.match(path.name):
                    files[match[1]] = path
        for name in sorted(files, reverse=True)[:_FILES]:
            at = _last(tools, files[name], name)
            if at is not None:
                newest = at if newest is None else max(newest, at)
                break
    return newest


def _last(tools: Tools, path: Path, name: str) -> dt.datetime | None:
    """Return the time of the last commit in a file of log; the end of one may be unwritten."""
    with tempfile.TemporaryDirectory(dir=SHARED_FOLDER) as folder:
        # pg_waldump goes by the name, which that of an unfinished file is not.
        link = Path(folder) / name
        link.symlink_to(path.absolute())
        times = [m[1] for line in tools.read("pg_waldump", "--rmgr=Transaction", link)
                 if (m := _COMMIT.search(line))]  # fmt: skip
    if not times:
        return None
    return dt.datetime.fromisoformat(times[-1]).replace(tzinfo=dt.UTC)
