"""`make bench`: every benchmark, or those named; with --json, one document per line."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(arguments: list[str]) -> None:
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name != "__main__"]
    as_json = "--json" in arguments
    wanted = [name for name in arguments if not name.startswith("-")] or known
    if unknown := set(wanted) - set(known):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in wanted:
        importlib.import_module(f"benchmarks.{name}").main(as_json=as_json)


if __name__ == "__main__":
    main(sys.argv[1:])
