"""`make model-check`: the fault table of docs/cache.md, measured; and one configuration by hand.

    python -m tests.property.modelcheck                  # everything; minutes
    python -m tests.property.modelcheck P5 --faults crash

Ends with 1 when a protocol that is broken was not caught, or ours was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from tests.property.cachecontrols import NAMES
from tests.property.cachemodel import FAULTS, Configuration
from tests.property.cachesearch import Result, search

COLUMNS = ("none", "evict", "crash", "evict+crash", "expire", "lost", "late", "replica")
EXPECTED = {
    "P1": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P2": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P3": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P4": ("-", "AB", "A", "AB", "-", "AB", "B", "-"),
    "P5": ("-", "-", "A", "A", "-", "AB", "B", "AB"),
    "P6": ("-", "AB", "A", "AB", "AB", "AB", "B", "AB"),
    "P7": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P8": ("-", "-", "-", "A", "-", "-", "-", "-"),
    "P9": ("-", "-", "-", "-", "-", "-", "-", "AB"),
}
"""What two writers and two readers reach, each fault once."""


def faults_of(text: str) -> tuple[tuple[str, int], ...]:
    """Read `evict+2crash`, or `none`."""
    if text == "none":
        return ()
    pairs = [(word.lstrip("0123456789"), word) for word in text.replace(",", "+").split("+")]
    return tuple((name, int(word[: -len(name)] or 1)) for name, word in pairs)


def configuration(text: str = "none", **more: object) -> Configuration:
    return Configuration(faults=faults_of(text), **more)  # type: ignore[arg-type]  # by name


CLEAN = (
    # Ours with more faults than one, more actors, and in its other forms: nothing to be found.
    configuration("evict+crash", readers=1),
    configuration("2evict+crash+expire", readers=1),
    configuration("crash+late", readers=1),
    configuration("evict+lost", readers=1),
    configuration("evict+crash+lost", readers=1),
    configuration("2lost", readers=1),
    configuration("2late", readers=1),
    configuration("rollback+crash", readers=2),
    configuration("restart"),
    configuration("restart+crash", readers=1),
    configuration("failover+crash", readers=1),
    configuration("failover+evict", readers=1),
    configuration("evict+crash", deletes=True),
    configuration("lost", deletes=True),
    configuration("late", deletes=True),
    configuration("evict+crash", previous=True, readers=1),
    configuration("lost", previous=True),
    configuration("late", previous=True, readers=1),
    configuration("rollback", previous=True),
    configuration("crash", writers=3, readers=1),
    configuration("crash", n_keys=2, readers=1),
    *(
        configuration(faults, early=True, **more)
        for faults, more in (
            ("none", {}),
            ("evict+crash", {"readers": 1}),
            ("expire", {"readers": 1}),
            ("lost", {"readers": 1}),
            ("late", {"readers": 1}),
            ("crash+late", {"readers": 1}),
            ("2late", {"writers": 2, "readers": 0}),
            ("rollback+crash", {"readers": 1}),
            ("restart", {"readers": 1}),
            ("failover+crash", {"readers": 1}),
            ("crash", {"readers": 1, "deletes": True}),
            ("lost", {"readers": 1, "deletes": True}),
            ("evict+crash", {"readers": 1, "previous": True}),
            ("lost", {"readers": 1, "previous": True}),
            ("late", {"readers": 1, "previous": True}),
            ("crash", {"deletes": True, "previous": True, "readers": 1}),
            ("evict", {"writers": 3, "readers": 1}),
            ("none", {"n_keys": 2, "readers": 1}),
        )
    ),
)
FLOORS = (
    # The same faults as below, seen by the session that wrote: never older than its own write.
    configuration("evict+2lost", writers=1, floors=True),
    configuration("3lost", writers=1, floors=True),
    configuration("evict+crash+lost", readers=1, floors=True),
)
UNTIL_RELAY = (
    # Three faults at once that keep a writer from repairing: its marker and its last two
    # operations go. Old values until the relay has run, so B and never A or C.
    configuration("evict+2lost", writers=1),
    configuration("3lost", writers=1),
    configuration("evict+crash+lost+late", writers=1),
)
WITHOUT = (
    # What each part of the protocol is for: without it, something old is found.
    (configuration("restart", readers=1, lives=False), "A"),
    (configuration("failover", readers=1, epochs=False), "AB"),
    (configuration("evict+crash", readers=1, protocol="P8"), "A"),
    (configuration("replica"), "AB"),
    (configuration("3lost", writers=1), "B"),  # without the session's floor
)
QUICK = (
    configuration(readers=1, n_keys=2),
    *(configuration(column, readers=1) for column in ("evict+crash", "lost", "late", "expire")),
    configuration("rollback+crash", readers=1),
    configuration("restart", readers=1),
    configuration("failover", readers=1),
    configuration("crash", readers=1, deletes=True),
    configuration("crash", readers=1, previous=True),
    configuration("lost", readers=1, previous=True),
    configuration(writers=3, readers=1),
    configuration("3lost", writers=1, floors=True),
    configuration("evict+crash", readers=1, early=True),
    configuration("lost", readers=1, early=True),
    configuration("rollback+crash", readers=1, early=True),
    configuration("crash", readers=1, early=True, deletes=True),
    configuration("crash", readers=1, early=True, previous=True),
)


def show(result: Result, verdict: str | None = None) -> None:
    whole = "" if result.is_whole else " (ended when found)"
    print(
        f"{result.configuration!s:58} {verdict or result.verdict:5} "
        f"{result.states:>8,} states {result.seconds:6.1f} s{whole}",
        flush=True,
    )


def explain(configuration: Configuration, wanted: Iterable[str]) -> None:
    """Print a shortest way to each violation."""
    for name in wanted:
        traced = search(configuration, wanted=name, traced=True)
        print(f"  {name}:")
        for step in traced.found[name]:
            print(f"      {step}")


def everything() -> bool:
    """Print the table and everything else; return whether all is as expected."""
    good, ours, total = True, 0, 0
    cells: dict[str, list[str]] = {}
    print(f"{'protocol, writers, readers, faults':58} {'found':5} {'visited':>15} {'took':>8}")
    for protocol, expected in EXPECTED.items():
        cells[protocol] = []
        for column, wanted in zip(COLUMNS, expected, strict=True):
            whole = protocol in {"P8", "P9"} and wanted == "-"
            result = search(configuration(column, protocol=protocol), wanted="" if whole else "AB")
            cells[protocol].append(result.verdict)
            good &= result.verdict == wanted
            total += result.states
            ours += result.states if protocol == "P9" else 0
            show(result)
            if result.verdict != wanted:
                print(f"  expected {wanted}")
                explain(result.configuration, result.found)
    print("\nOurs in other forms, and with more faults:")
    for each in (*CLEAN, *FLOORS):
        result = search(each)
        show(result)
        ours += result.states
        if result.found:
            good = False
            explain(each, result.found)
    print("\nUntil the relay has run:")
    for each in UNTIL_RELAY:
        result = search(each)
        show(result, "B" if "B" in result.found else "-")
        ours += result.states
        if {"A", "C"} & set(result.found):
            good = False
            explain(each, {"A", "C"} & set(result.found))
    print("\nWithout a part of it:")
    for each, wanted in WITHOUT:
        result = search(each, wanted=wanted)
        show(result)
        total += result.states
        if result.verdict != wanted:
            good = False
            print(f"  expected {wanted}")
        explain(each, wanted[:1])
    print(f"\n| protocol | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for protocol, verdicts in cells.items():
        name = NAMES.get(protocol, "ours without the relay" if protocol == "P8" else "ours")
        print(f"| {protocol} {name} | {' | '.join(verdicts)} |")
    verdict = "as expected" if good else "NOT as expected"
    print(f"\n{ours:,} states of ours, {total + ours:,} in all: {verdict}")
    return good


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="modelcheck", description=__doc__)
    parser.add_argument("protocol", nargs="?", choices=[*EXPECTED])
    parser.add_argument("--faults", default="none", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--deletes", action="store_true")
    parser.add_argument("--previous", action="store_true")
    parser.add_argument("--early", action="store_true")
    given = parser.parse_args(arguments)
    if given.protocol is None:
        return 0 if everything() else 1
    one = configuration(
        given.faults,
        protocol=given.protocol,
        writers=given.writers,
        readers=given.readers,
        n_keys=given.keys,
        deletes=given.deletes,
        previous=given.previous,
        early=given.early,
    )
    result = search(one)
    show(result)
    explain(one, result.found)
    return 1 if result.found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
