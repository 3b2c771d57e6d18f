"""Print the part of `requirements.lock` that an image needs, hashes and all.

The lock holds everything the repository uses, tests and benchmarks too, and says of each package
by whom it is wanted. Whoever is wanted by what an image starts from belongs into it. Standard
library only: it runs before any package is installed.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

_ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main() -> None:
    """Print the entries of the packages and extras that were asked for, and of what they need."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", action="append", default=[], help="a package by itself")
    parser.add_argument("--extra", action="append", default=[], help="the project with an extra")
    options = parser.parse_args()
    wanted = {canonical(name) for name in options.package}
    if options.extra:
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        for each in (project["dependencies"], *(extras[extra] for extra in options.extra)):
            wanted |= {canonical(_NAME.match(text)[0]) for text in each}  # type: ignore[index]
    print("\n".join(chosen(Path("requirements.lock").read_text(encoding="utf-8"), wanted)))


def chosen(lock: str, wanted: Iterable[str]) -> list[str]:
    """Return the entries of packages and of all that they need, in the lock's order.

    Raises:
        SystemExit: a package is not in the lock.
    """
    starts = [found.start() for found in _ENTRY.finditer(lock)]
    entries = {}
    for start, end in zip(starts, [*starts[1:], len(lock)], strict=True):
        text = lock[start:end]
        entries[canonical(_ENTRY.match(text)["name"])] = text.rstrip()  # type: ignore[index]
    taken = set(wanted)
    if unknown := sorted(taken - entries.keys()):
        raise SystemExit(f"requirements.lock has no {', '.join(unknown)}; run `make lock`")
    parents = {name: wanted_by(text) for name, text in entries.items()}
    while more := {name for name, by in parents.items() if name not in taken and by & taken}:
        taken |= more
    return [text for name, text in entries.items() if name in taken]


def wanted_by(entry: str) -> set[str]:
    """Return who wants a package: what uv writes behind `# via`."""
    _, _, said = entry.partition("# via")
    lines = (line.strip().removeprefix("#").strip() for line in said.splitlines())
    return {canonical(line) for line in lines if line}


def canonical(name: str) -> str:
    """Return the one spelling of a package's name. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
