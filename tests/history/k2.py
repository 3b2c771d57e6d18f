"""K2: what was acknowledged is there once, what failed is not; registers, accounts and names too.

    set       ["add", set, element] · ["read", set] → elements; `final` once all faults are healed
    register  ["write", key, value] · ["read", key] → value; every value is written once
    bank      ["transfer", bank, from, to, amount] · ["read", bank] → balances
    name      ["claim", name, owner] · ["release", name, owner] · ["read", name] → owner or None

Source: faults.md K2; Gibbons & Korach, "Testing Shared Memories", SIAM J. Comput. 1997, 4.2 (zones:
a register whose reads name their write is judged by sorting).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from tests.history.findings import Ref, Verdict
from tests.history.ledger import Ledger
from tests.history.records import Operation, Outcome

__all__ = ["judge_bank", "judge_names", "judge_registers", "judge_sets"]

_NEVER: Final = -(1 << 62)
_FOREVER: Final = 1 << 62
_Held = dict[Any, list[tuple[int, int, Any, Operation]]]
"""By name: since when, until when, whose, and the claim."""


def _ref(op: Operation) -> Ref:
    return op.process, op.n


def _who(op: Operation) -> str:
    return f"{op.process} #{op.n}"


@dataclass(slots=True)
class _Set:
    adds: dict[Any, Operation] = field(default_factory=dict)
    reads: list[Operation] = field(default_factory=list)


def judge_sets(ledger: Ledger) -> Verdict:
    """Every acknowledged element is in every later read once, every failed one in none.

    One of unknown outcome may be there or not, but on all endpoints alike once all is healed, and
    it does not go again. Ids that databases mint are not given twice.
    """
    verdict = Verdict("K2", "what was acknowledged is there once, what failed is not")
    sets: dict[Any, _Set] = defaultdict(_Set)
    for op in ledger.operations.get("set", ()):
        verb, name = op.do[0], op.do[1]
        if verb == "add":
            sets[name].adds[op.do[2]] = op
        elif op.outcome is Outcome.OK:
            sets[name].reads.append(op)
    for id_, first, second in ledger.doubled:
        text = f"id {id_} was given to {first[0]} #{first[1]} and to {second[0]} #{second[1]}"
        verdict.found("duplicate id", text, [first, second])
    verdict.is_concerned = bool(sets) or bool(ledger.minted)
    acknowledged = finals = 0
    for name, each in sets.items():
        acknowledged += sum(op.outcome is Outcome.OK for op in each.adds.values())
        finals += sum(op.more.get("final") is True for op in each.reads)
        for read in each.reads:
            _set_read(verdict, name, each, read, has_one_clock=ledger.has_one_clock)
        _alike(verdict, name, each)
        _kept(verdict, name, each)
    verdict.counts = {
        "final reads or ids": finals + len(ledger.minted),
        "acknowledged elements": acknowledged,
        "sets": len(sets),
        "ids": len(ledger.minted),
    }
    if acknowledged and not finals:
        verdict.unchecked.append("no read is final: what was lost after the last read is not seen")
    return verdict


def _set_read(
    verdict: Verdict, name: Any, each: _Set, read: Operation, *, has_one_clock: bool
) -> None:
    counts = Counter(read.got)
    is_final = read.more.get("final") is True
    where = read.more.get("endpoint", "the primary")
    for element, n in counts.items():
        added = each.adds.get(element)
        if n > 1:
            text = f"{name} has {element} {n} times on {where}, as {_who(read)} read it"
            verdict.found("duplicate write", text, [*([_ref(added)] if added else []), _ref(read)])
        if added is None:
            text = f"{_who(read)} read {element} in {name} on {where}, which nobody added"
            verdict.found("phantom value", text, [_ref(read)])
        elif added.outcome is Outcome.FAIL:
            text = f"{element} is in {name} on {where}, and {_who(added)} had failed to add it"
            verdict.found("aborted read", text, [_ref(added), _ref(read)])
    if not is_final and (read.more.get("role") == "replica" or not has_one_clock):
        return
    for element, added in each.adds.items():
        if added.outcome is not Outcome.OK or element in counts:
            continue
        if is_final or (added.answered or 0) < read.invoked:
            text = (
                f"{element} of {name} is not on {where}: {_who(added)} was told that it is there, "
                f"{(read.invoked - (added.answered or 0)) / 1e6:.3f} ms before {_who(read)} read"
            )
            name_of_it = "lost write" if is_final else "stale read"
            verdict.found(name_of_it, text, [_ref(added), _ref(read)])


def _alike(verdict: Verdict, name: Any, each: _Set) -> None:
    """Compare elements of unknown outcome over the final reads."""
    finals = [(read, set(read.got)) for read in each.reads if read.more.get("final") is True]
    for element, added in each.adds.items():
        if added.outcome is Outcome.UNKNOWN:
            there = [read for read, got in finals if element in got]
            gone = [read for read, got in finals if element not in got]
            if there and gone:
                text = (
                    f"{element} of {name}, of unknown outcome, is there for {_who(there[0])} on "
                    f"{there[0].more.get('endpoint')} and not for {_who(gone[0])} on "
                    f"{gone[0].more.get('endpoint')}"
                )
                refs = [_ref(added), _ref(there[0]), _ref(gone[0])]
                verdict.found("endpoints differ", text, refs)


def _kept(verdict: Verdict, name: Any, each: _Set) -> None:
    """Compare reads with those that ended before they began: nothing goes."""
    reads = [read for read in each.reads if read.more.get("role") != "replica"]
    reads.sort(key=lambda read: read.answered or 0)
    shown: dict[Any, Operation] = {}
    following = sorted(reads, key=lambda read: read.invoked)
    at = 0
    for read in following:
        while at < len(reads) and (reads[at].answered or 0) < read.invoked:
            for element in reads[at].got:
                shown.setdefault(element, reads[at])
            at += 1
        for element in shown.keys() - set(read.got):
            text = f"{element} of {name} was there for {_who(shown[element])}, not for {_who(read)}"
            verdict.found("vanished", text, [_ref(shown[element]), _ref(read)])


@dataclass(slots=True)
class _Zone:
    """A write and the reads of its value.

    Attributes:
        value: that is written.
        first_end: the earliest end among them.
        last_start: the latest start among them.
        early: who ended first.
        late: who began last.
    """

    value: Any
    first_end: int = _FOREVER
    last_start: int = _NEVER
    early: Operation | None = None
    late: Operation | None = None

    def add(self, op: Operation) -> None:
        end = _FOREVER if op.outcome is not Outcome.OK else op.answered or 0
        if end < self.first_end:
            self.first_end, self.early = end, op
        if op.invoked > self.last_start:
            self.last_start, self.late = op.invoked, op

    @property
    def refs(self) -> list[Ref]:
        return [_ref(op) for op in (self.early, self.late) if op is not None]


def judge_registers(ledger: Ledger) -> Verdict:
    """Each register behaves as if operations happened one at a time, between begin and answer.

    A write and its reads are a zone. Where the first of them ended before the last began, the
    register has that value all the time between: two such zones must not overlap, and none may
    have all of another write within it. That is enough (Gibbons & Korach, theorem 4.5).
    """
    verdict = Verdict("K1", "registers are linearizable, key by key")
    writes: dict[Any, dict[Any, Operation]] = defaultdict(dict)
    reads: dict[Any, list[Operation]] = defaultdict(list)
    n_reads = 0
    for op in ledger.operations.get("register", ()):
        if op.do[0] == "write":
            writes[op.do[1]][op.do[2]] = op
        elif op.outcome is Outcome.OK and op.more.get("role") != "replica":
            reads[op.do[1]].append(op)
            n_reads += 1
    verdict.is_concerned = bool(writes)
    verdict.counts = {"reads": n_reads, "writes": sum(map(len, writes.values()))}
    if not ledger.has_one_clock:
        verdict.unchecked.append("all of it: files have different clocks")
        return verdict
    for key in {*writes, *reads}:
        _register(verdict, key, writes[key], reads[key])
    return verdict


def _register(
    verdict: Verdict, key: Any, writes: dict[Any, Operation], reads: list[Operation]
) -> None:
    zones: dict[Any, _Zone] = {None: _Zone(None, _NEVER, _NEVER)}
    for value, op in writes.items():
        if op.outcome is not Outcome.FAIL:
            zones[value] = _Zone(value)
            zones[value].add(op)
    for read in reads:
        value, write = read.got, writes.get(read.got)
        if value is not None and (write is None or write.outcome is Outcome.FAIL):
            name = "phantom value" if write is None else "aborted read"
            by = "nobody wrote" if write is None else f"{_who(write)} had failed to write"
            refs = [*([_ref(write)] if write else []), _ref(read)]
            verdict.found(name, f"{_who(read)} read {key} as {value}, which {by}", refs)
            continue
        if write is not None and (read.answered or 0) < write.invoked:
            text = f"{_who(read)} read {key} as {value} before {_who(write)} began to write it"
            verdict.found("read from the future", text, [_ref(read), _ref(write)])
            continue
        zones[value].add(read)
    held = sorted(
        (zone for zone in zones.values() if zone.first_end < zone.last_start),
        key=lambda zone: zone.first_end,
    )
    for one, two in pairwise(held):
        if two.first_end < one.last_start:
            verdict.found(
                "not linearizable",
                f"{key} would have to be {one.value} and {two.value} at one time",
                [*one.refs, *two.refs],
                [_held(one), _held(two)],
            )
    starts = [zone.first_end for zone in held]
    for zone in zones.values():
        if zone.first_end < zone.last_start or zone.first_end == _FOREVER:
            continue
        at = bisect_right(starts, zone.last_start) - 1
        if at >= 0 and zone.first_end < held[at].last_start and zone.value is not None:
            verdict.found(
                "not linearizable",
                f"{key} was written as {zone.value} while it was {held[at].value} all the time",
                [*zone.refs, *held[at].refs],
                [_held(held[at])],
            )


def _held(zone: _Zone) -> str:
    early = "it began" if zone.early is None else f"{_who(zone.early)} ended"
    late = "" if zone.late is None else f" until {_who(zone.late)} began"
    return f"it was {zone.value} from when {early}{late}"


def judge_bank(ledger: Ledger) -> Verdict:
    """Every snapshot of a bank has the same total, and the last one what transfers make of it."""
    verdict = Verdict("K2", "transfers neither make nor lose money")
    opened = {fact["bank"]: fact["accounts"] for fact in ledger.facts.get("bank", ())}
    reads = transfers = 0
    certain: dict[Any, Counter[str]] = defaultdict(Counter)
    least: dict[Any, Counter[str]] = defaultdict(Counter)
    most: dict[Any, Counter[str]] = defaultdict(Counter)
    finals: dict[Any, list[Operation]] = defaultdict(list)
    for op in ledger.operations.get("bank", ()):
        verb, bank = op.do[0], op.do[1]
        if verb == "transfer":
            transfers += 1
            _, _, source, target, amount = op.do
            if op.outcome is Outcome.OK:
                certain[bank].update({target: amount})
                certain[bank].subtract({source: amount})
            elif op.outcome is Outcome.UNKNOWN:
                least[bank].subtract({source: amount})
                most[bank].update({target: amount})
        elif op.outcome is Outcome.OK and bank in opened:
            reads += 1
            total, wanted = sum(op.got.values()), sum(opened[bank].values())
            if total != wanted:
                text = f"{_who(op)} read {total} in all of {bank}, which has {wanted}"
                verdict.found("wrong total", text, [_ref(op)], [f"balances: {op.got}"])
            if op.more.get("final"):
                finals[bank].append(op)
    for bank, last in finals.items():
        for read in last:
            for account, first in opened[bank].items():
                low = first + certain[bank][account] + least[bank][account]
                high = first + certain[bank][account] + most[bank][account]
                has = read.got.get(account, 0)
                if not low <= has <= high:
                    limits = f"{low}" if low == high else f"{low} to {high}"
                    text = f"{account} of {bank} has {has}; its transfers make it {limits}"
                    verdict.found("lost transfer", text, [_ref(read)])
    verdict.is_concerned = bool(ledger.operations.get("bank"))
    verdict.counts = {"reads": reads, "transfers": transfers, "banks": len(opened)}
    return verdict


def judge_names(ledger: Ledger) -> Verdict:
    """Of all who claim a name one has it until it is released.

    An owner has it for certain from the answer to its claim until it begins to release it.
    """
    verdict = Verdict("K2", "a unique name has one owner at a time")
    held: _Held = defaultdict(list)
    claims: dict[tuple[Any, Any], list[Operation]] = defaultdict(list)
    released: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    reads: list[Operation] = []
    for op in ledger.operations.get("name", ()):
        verb, name = op.do[0], op.do[1]
        if verb == "claim":
            claims[name, op.do[2]].append(op)
        elif verb == "release" and op.outcome is not Outcome.FAIL:
            released[name, op.do[2]].append(op.invoked)
        elif verb == "read" and op.outcome is Outcome.OK:
            reads.append(op)
    won = 0
    for (name, owner), tried in claims.items():
        ends = sorted(released[name, owner])
        for op in tried:
            if op.outcome is Outcome.OK:
                won += 1
                since = op.answered or 0
                at = bisect_right(ends, since)
                held[name].append((since, ends[at] if at < len(ends) else _FOREVER, owner, op))
    _one_owner(verdict, held)
    for read in reads:
        name, owner = read.do[1], read.got
        tried = [op for op in claims[name, owner] if op.outcome is not Outcome.FAIL]
        if owner is not None and not any(op.invoked <= (read.answered or 0) for op in tried):
            text = f"{_who(read)} read that {name} is {owner}'s, who never had it"
            verdict.found("phantom owner", text, [_ref(read)])
        for since, end, who, op in held[name]:
            if since < read.invoked and (read.answered or 0) < end and who != owner:
                text = f"{name} is {who}'s by {_who(op)}, and {_who(read)} read {owner}"
                verdict.found("lost name", text, [_ref(op), _ref(read)])
    verdict.is_concerned = bool(claims)
    verdict.counts = {
        "names won": won, "reads": len(reads), "claims": sum(map(len, claims.values())),
    }  # fmt: skip
    return verdict


def _one_owner(verdict: Verdict, held: _Held) -> None:
    """Tell of names that two owners had at one time."""
    for name, times in held.items():
        times.sort(key=lambda time: time[:2])
        until, owner, first = _NEVER, None, times[0][3]
        for since, end, who, op in times:
            if since < until and who != owner:
                text = f"{name} is {owner}'s by {_who(first)} and {who}'s by {_who(op)}"
                verdict.found("two owners", text, [_ref(first), _ref(op)])
            if end > until:
                until, owner, first = end, who, op
