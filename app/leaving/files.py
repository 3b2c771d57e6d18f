"""Files of exports: where they are, and that they are there whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["clear_old", "path_of", "written"]


def path_of(folder: Path, export_id: int) -> Path:
    """Return where the file of an export is, once it is there."""
    return folder / f"{export_id}.zip"


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a name to write to; at the end what is there takes the place of `path`, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        number = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    finally:
        draft.unlink(missing_ok=True)


def clear_old(folder: Path, seconds: float) -> None:
    """Remove files, also drafts of who died, that are older than that."""
    oldest = time.time() - seconds
    for path in folder.glob("*.zip*"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:
            continue  # another relay was quicker
