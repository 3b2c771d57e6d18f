"""`make bench`: every benchmark, or those named.

With --json one document a line; with --quick fewer rounds.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

SHARED = (
    "__main__",
    "cacheroles",
    "cachesessions",
    "cachestages",
    "cachetrace",
    "loopdisk",
    "measure",
    "outage",
    "promoted",
    "published",
    "socialworld",
    "tenants",
)
"""Modules that are no benchmarks."""

LONG = (
    "cachechaos",
    "cachekills",
    "chaos",
    "feedpaging",
    "halves",
    "idmap300m",
    "lookup",
    "migrate_blocker",
    "stale",
    "uniqueness",
)
"""Benchmarks that take minutes, run only when named."""


def main(arguments: list[str]) -> None:
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    known = [name for name in modules if name not in SHARED]
    options = {"as_json": "--json" in arguments, "quick": "--quick" in arguments}
    wanted = [name for name in arguments if not name.startswith("-")] or (
        [name for name in known if name not in LONG]
    )
    if unknown := set(wanted) - set(known):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in wanted:
        importlib.import_module(f"benchmarks.{name}").main(**options)


if __name__ == "__main__":
    main(sys.argv[1:])
