"""`make model-check`: the fault table of docs/cache.md, measured; and one configuration by hand.

    python -m tests.property.modelcheck                  # everything; minutes
    python -m tests.property.modelcheck --lists          # lists and counts; about a minute
    python -m tests.property.modelcheck P5 --faults crash

Ends with 1 when a protocol that is broken was not caught, or ours was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

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
LISTS = {
    "P1": ("A", "A", "A", "A", "A", "AB", "AB", "A"),
    "P2": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P3": ("A", "A", "A", "A", "A", "AB", "AB", "A"),
    "P4": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P5": ("-", "-", "A", "A", "-", "AB", "B", "A"),
    "P6": ("-", "A", "A", "A", "A", "AB", "B", "A"),
    "P7": ("AB", "AB", "AB", "AB", "AB", "AB", "AB", "AB"),
    "P8": ("-", "-", "A", "A", "-", "-", "-", "A"),
    "P9": ("-", "-", "-", "-", "-", "-", "-", "A"),
}
"""The same of a list or count, whose writers do not lock each other, with one reader."""


def lists(text: str = "none", **more: object) -> Configuration:
    return configuration(text, lists=True, **{"readers": 1, **more})


CLEAN_LISTS = (
    lists("rollback+crash"),
    lists("restart"),
    lists("2lost"),
    lists("crash", n_keys=2, writers=1),
    lists("3lost", writers=1, floors=True),
    lists("evict+2lost", writers=1, floors=True),
)
LISTS_WITHOUT = (
    (lists("crash", protocol="P8"), "A"),
    (lists("replica"), "A"),
    (lists(next=True), "A"),  # versions that say which transactions had begun, not which had ended
    (lists("3lost", writers=1), "B"),
)
QUICK_LISTS = (lists("crash"), lists("rollback+crash"))
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


class Report:
    """What a run has found so far, printed as it is found.

    Attributes:
        good: whether all is as expected.
        ours: states of our own protocol.
        others: states of the others.
    """

    def __init__(self) -> None:
        self.good, self.ours, self.others = True, 0, 0

    def table(self, expected: Mapping[str, Sequence[str]], **more: object) -> dict[str, list[str]]:
        """Search every protocol under every fault; return what was found, by protocol."""
        cells: dict[str, list[str]] = {}
        print(f"{'protocol, writers, readers, faults':58} {'found':5} {'visited':>15} {'took':>8}")
        for protocol, wants in expected.items():
            cells[protocol] = []
            for column, wanted in zip(COLUMNS, wants, strict=True):
                whole = protocol in {"P8", "P9"} and wanted == "-"
                each = configuration(column, protocol=protocol, **more)
                result = search(each, wanted="" if whole else "AB")
                cells[protocol].append(result.verdict)
                self._count(result)
                show(result)
                if result.verdict != wanted:
                    self._fail(result, f"expected {wanted}", result.found)
        return cells

    def clean(self, title: str, wanted: Iterable[Configuration]) -> None:
        """Search configurations in which nothing is to be found."""
        print(f"\n{title}")
        for each in wanted:
            result = search(each)
            show(result)
            self._count(result)
            if result.found:
                self._fail(result, "", result.found)

    def until_relay(self, wanted: Iterable[Configuration]) -> None:
        """Search configurations in which something old is shown, before the relay has run."""
        print("\nUntil the relay has run:")
        for each in wanted:
            result = search(each)
            show(result, "B" if "B" in result.found else "-")
            self._count(result)
            if {"A", "C"} & set(result.found):
                self._fail(result, "", {"A", "C"} & set(result.found))

    def without(self, wanted: Iterable[tuple[Configuration, str]]) -> None:
        """Search configurations that lack a part, and are to fail."""
        print("\nWithout a part of it:")
        for each, found in wanted:
            result = search(each, wanted=found)
            show(result)
            self.others += result.states
            if result.verdict != found:
                self._fail(result, f"expected {found}", ())
            explain(each, found[:1])

    def _count(self, result: Result) -> None:
        if result.configuration.protocol == "P9":
            self.ours += result.states
        else:
            self.others += result.states

    def _fail(self, result: Result, why: str, found: Iterable[str]) -> None:
        self.good = False
        print(f"  {why}")
        explain(result.configuration, found)


def everything() -> bool:
    """Print the tables and everything else; return whether all is as expected."""
    report = Report()
    rows = report.table(EXPECTED)
    report.clean("Ours in other forms, and with more faults:", (*CLEAN, *FLOORS))
    report.until_relay(UNTIL_RELAY)
    report.without(WITHOUT)
    good = everything_of_lists(report)
    print_table(rows)
    return good


def everything_of_lists(report: Report | None = None) -> bool:
    """The same of lists and counts alone."""
    report = report or Report()
    print("\nLists and counts:")
    cells = report.table(LISTS, lists=True, readers=1)
    report.clean("In other forms, and with more faults:", CLEAN_LISTS)
    report.without(LISTS_WITHOUT)
    print_table(cells)
    verdict = "as expected" if report.good else "NOT as expected"
    total = report.ours + report.others
    print(f"\n{report.ours:,} states of ours, {total:,} in all: {verdict}")
    return report.good


def print_table(cells: Mapping[str, Sequence[str]]) -> None:
    """Print what was found, as Markdown."""
    print(f"\n| protocol | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for protocol, verdicts in cells.items():
        name = NAMES.get(protocol, "ours without the relay" if protocol == "P8" else "ours")
        print(f"| {protocol} {name} | {' | '.join(verdicts)} |")


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
    parser.add_argument("--lists", action="store_true", help="lists and counts, and not rows")
    given = parser.parse_args(arguments)
    if given.protocol is None:
        return 0 if (everything_of_lists() if given.lists else everything()) else 1
    one = configuration(
        given.faults,
        protocol=given.protocol,
        writers=given.writers,
        readers=given.readers,
        n_keys=given.keys,
        deletes=given.deletes,
        previous=given.previous,
        early=given.early,
        lists=given.lists,
    )
    result = search(one)
    show(result)
    explain(one, result.found)
    return 1 if result.found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
