"""The operating system's user that runs the servers, and folders that it can and others cannot use.

PostgreSQL refuses to run as root, and so do PgBouncer and Memcached: started by root they run
under an unprivileged user, who may be unable to reach the project (under `/root`, say). Called
by `layout` and `binaries`. Never follows a symbolic link that somebody else may have planted.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from shardkit.errors import LocalServerError
from shardkit.ops.files import replace_file

__all__ = ["Account", "claim_folder", "is_reachable", "server_account", "write_file"]

_UNPRIVILEGED = ("postgres", "nobody")

_MALLOC = {
    "MALLOC_TOP_PAD_": f"{1 << 20}",
    "MALLOC_TRIM_THRESHOLD_": f"{16 << 20}",
    "MALLOC_MMAP_THRESHOLD_": f"{16 << 20}",
}
"""Bytes. Without these, glibc gives the memory of a wide statement back to the kernel at its end
and faults it in again at the next one, which may double its time. Source: mallopt(3)."""


class SpawnArguments(TypedDict, total=False):
    """The arguments of `subprocess.Popen` that change the user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """The user servers run under.

    Attributes:
        name: login name.
        uid: user number.
        gid: group number.
        is_switched: whether it differs from the user of this process, which is then root.
    """

    name: str
    uid: int
    gid: int
    is_switched: bool

    @property
    def spawn_arguments(self) -> SpawnArguments:
        """Arguments that make `subprocess.Popen` start a child under this account."""
        if not self.is_switched:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_account() -> Account:
    """Return the account servers must run under: this user, or an unprivileged one for root.

    Raises:
        LocalServerError: the user has no name, or root finds no unprivileged user.
    """
    uid = os.geteuid()
    if uid != 0:
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise LocalServerError(
                f"user {uid} has no name, and PostgreSQL needs one",
                hint="add the user to /etc/passwd",
            ) from None
        return Account(entry.pw_name, uid, os.getegid(), is_switched=False)
    for name in _UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid, is_switched=True)
    raise LocalServerError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(_UNPRIVILEGED)}",
        hint="run the command as an ordinary user",
    )


def is_reachable(path: Path, account: Account) -> bool:
    """Return whether an account may pass through every folder of an existing path.

    Looks at the permission bits only; an access control list counts as no.
    """
    resolved = path.resolve()
    folders = resolved.parents if not resolved.is_dir() else (resolved, *resolved.parents)
    return all(_may_pass(folder.stat(), account) for folder in folders)


def claim_folder(path: Path, mode: int, owner: Account | None = None) -> Path:
    """Create a folder, or make sure that an existing one is safe to use.

    Args:
        path: the folder; its parent exists.
        mode: permission bits to give it.
        owner: who it belongs to; None for the user of this process.

    Returns:
        The same path.

    Raises:
        LocalServerError: it is no folder, a symbolic link, or belongs to somebody else.
    """
    ours = os.geteuid()
    wanted = owner.uid if owner is not None and owner.is_switched else ours
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _not_ours(path, error.strerror) from error
    try:
        found = os.fstat(descriptor).st_uid
        if found not in {wanted, ours}:
            raise _not_ours(path, f"it belongs to user {found}")
        if found != wanted and owner is not None:
            os.fchown(descriptor, owner.uid, owner.gid)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    return path


def write_file(path: Path, text: str, mode: int, owner: Account | None = None) -> None:
    """Write a file whole or not at all, never readable by more people than `mode` says.

    Args:
        path: the file, in a folder that only the user of this process can write.
        text: its content.
        mode: permission bits.
        owner: who it belongs to; None for the user of this process.
    """
    is_given = owner is not None and owner.is_switched
    replace_file(path, text, mode, pwd.getpwuid(owner.uid) if owner and is_given else None)


def child_environment() -> Mapping[str, str]:
    """Return the environment of servers: a path and a neutral locale, nothing inherited."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC", **_MALLOC}


def _not_ours(path: Path, why: str | None) -> LocalServerError:
    return LocalServerError(
        f"{path}: cannot be used as a folder of the cluster: {why}; it is left alone",
        hint="remove it, or choose another folder with --dir",
    )


def _may_pass(found: os.stat_result, account: Account) -> bool:
    if found.st_uid == account.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == account.gid:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)
