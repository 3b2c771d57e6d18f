"""Files that are replaced whole or not at all. Called by commands and by the embedded cluster."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, text: str, mode: int, owner: pwd.struct_passwd | None = None) -> None:
    """Write a file whole or not at all, never readable by more people than `mode` says.

    Args:
        path: the file, in a folder that only the user of this process can write.
        text: its content.
        mode: permission bits.
        owner: who it belongs to; None for the user of this process.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        if owner is not None:
            os.fchown(file.fileno(), owner.pw_uid, owner.pw_gid)
        os.fchmod(file.fileno(), mode)
    new.replace(path)
