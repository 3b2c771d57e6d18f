"""K6 to K11: what is true of servers after a run, from facts that its witnesses wrote down.

    image      move, shard, side (`source` or `target`), image: {"rows of photos": hash, …}   K6
    schemas    known: {fingerprint: version}, between: [fingerprints]                         K8
    schema     shard, fingerprint                                                             K8
    leftovers  where, moment (`before` or `after`), things: {"replication slots": […], …}     K9
    canaries   planted: [names]                                                               K10
    scanned    what, bytes, hits: {name: times}                                               K10
    fault      name, began, healed (nanoseconds; null while it lasts)                         K11
    killed     process: a client that the run killed on purpose                               K11

Source: faults.md, section 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.history.findings import Verdict
from tests.history.ledger import SLACK, Ledger, Stamp

__all__ = [
    "judge_images",
    "judge_leftovers",
    "judge_liveness",
    "judge_owners",
    "judge_schemas",
    "judge_secrets",
    "scan",
]


def judge_images(ledger: Ledger) -> Verdict:
    """K6: a moved logical shard is the same on both sides: rows, sequences, grants, triggers."""
    verdict = Verdict("K6", "a moved logical shard is the same on both sides")
    images: dict[tuple[Any, Any], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for fact in ledger.facts.get("image", ()):
        images[fact["move"], fact["shard"]][fact["side"]] = fact["image"]
    compared = 0
    for (move, shard), sides in images.items():
        if len(sides) != 2:
            (side,) = sides
            verdict.unchecked.append(f"move {move} of {shard}: only the {side} was looked at")
            continue
        source, target = sides["source"], sides["target"]
        for what in sorted({*source, *target}):
            compared += 1
            one, two = source.get(what, "nothing"), target.get(what, "nothing")
            if one != two:
                text = f"move {move} of {shard}: {what} is {one} on the source, {two} on the target"
                verdict.found("different copies", text)
    verdict.is_concerned = bool(images)
    verdict.counts = {"things compared": compared, "moves": len(images)}
    return verdict


def judge_owners(ledger: Ledger) -> Verdict:
    """K7: one server at a time writes to a logical shard, and its epochs never go back.

    `stamp` of an operation is (system identifier, timeline, epoch), written by the database.
    """
    verdict = Verdict("K7", "each logical shard has one owner at a time")
    shards: dict[int, list[Stamp]] = defaultdict(list)
    for stamp in ledger.stamps:
        shards[stamp.shard].append(stamp)
    for shard, stamps in shards.items():
        owners: dict[int, Stamp] = {}
        for stamp in stamps:
            first = owners.setdefault(stamp.epoch, stamp)
            if first.system != stamp.system:
                text = (
                    f"epoch {stamp.epoch} of logical shard {shard} was written by {first.system} "
                    f"and by {stamp.system}"
                )
                verdict.found("two owners", text, [first.ref, stamp.ref])
        ended = sorted(stamps, key=lambda stamp: stamp.answered)
        at, highest = 0, ended[0]
        for stamp in sorted(stamps, key=lambda stamp: stamp.invoked):
            while at < len(ended) and ended[at].answered < stamp.invoked:
                if ended[at].epoch >= highest.epoch or at == 0:
                    highest = ended[at]
                at += 1
            if at and stamp.epoch < highest.epoch:
                text = (
                    f"logical shard {shard} was written at epoch {stamp.epoch} by {stamp.system}, "
                    f"{(stamp.invoked - highest.answered) / 1e6:.3f} ms after epoch "
                    f"{highest.epoch} had been acknowledged by {highest.system}"
                )
                verdict.found("epoch went back", text, [highest.ref, stamp.ref])
    verdict.is_concerned = bool(shards)
    verdict.counts = {
        "stamps": len(ledger.stamps),
        "logical shards": len(shards),
        "epochs": len({(stamp.shard, stamp.epoch) for stamp in ledger.stamps}),
    }
    return verdict


def judge_schemas(ledger: Ledger) -> Verdict:
    """K8: the schema of each logical shard is one that a migration makes, or one on the way."""
    verdict = Verdict("K8", "every schema is that of a known version, or on its way to one")
    known: set[Any] = set()
    for fact in ledger.facts.get("schemas", ()):
        known |= {*fact["known"], *fact.get("between", ())}
    seen = ledger.facts.get("schema", [])
    for fact in seen:
        if fact["fingerprint"] not in known:
            text = (
                f"logical shard {fact['shard']} has a schema of no version: {fact['fingerprint']}"
            )
            verdict.found("unknown schema", text)
    verdict.is_concerned = bool(seen) or bool(known)
    verdict.counts = {"schemas": len(seen), "known": len(known)}
    return verdict


def judge_leftovers(ledger: Ledger) -> Verdict:
    """K9: after the run servers hold what they held before: no slot, lock or process is left."""
    verdict = Verdict("K9", "nothing is left behind")
    before: dict[Any, Mapping[str, Iterable[Any]]] = {}
    after: dict[Any, Mapping[str, Iterable[Any]]] = {}
    for fact in ledger.facts.get("leftovers", ()):
        (before if fact["moment"] == "before" else after)[fact["where"]] = fact["things"]
    looked = 0
    for where, things in after.items():
        had = before.get(where)
        if had is None:
            verdict.unchecked.append(f"{where}: nobody looked before the run")
        for kind, found in things.items():
            looked += 1
            known = set(map(str, (had or {}).get(kind, ())))
            for thing in sorted(set(map(str, found)) - known):
                verdict.found("left behind", f"{where} still has one of its {kind}: {thing}")
    verdict.is_concerned = bool(before) or bool(after)
    verdict.counts = {"kinds of things": looked, "places": len(after)}
    return verdict


def judge_secrets(ledger: Ledger) -> Verdict:
    """K10: what was planted in secret fields is nowhere to be read."""
    verdict = Verdict("K10", "no secret is in logs, errors, metrics or process arguments")
    planted = {name for fact in ledger.facts.get("canaries", ()) for name in fact["planted"]}
    scanned = ledger.facts.get("scanned", [])
    for fact in scanned:
        for name, times in fact["hits"].items():
            if times:
                verdict.found("secret", f"{name} is {times} times in {fact['what']}")
    verdict.is_concerned = bool(planted) or bool(scanned)
    verdict.counts = {
        "bytes scanned": sum(fact["bytes"] for fact in scanned) if planted else 0,
        "places": len(scanned),
        "canaries": len(planted),
    }
    return verdict


_CHUNK: Final = 1 << 20


def scan(path: Path, canaries: Mapping[str, bytes]) -> dict[str, int]:
    """Count canaries in a file, chunk by chunk; each chunk keeps the end of the one before."""
    hits = dict.fromkeys(canaries, 0)
    longest = max((len(value) for value in canaries.values()), default=1)
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            data = rest + chunk
            for name, value in canaries.items():
                # What is in the part that was kept has been counted, unless it goes beyond.
                at = data.find(value, max(0, len(rest) - len(value) + 1))
                while at >= 0:
                    hits[name] += 1
                    at = data.find(value, at + len(value))
            rest = data[-(longest - 1) :] if longest > 1 else b""
    return hits


def judge_liveness(ledger: Ledger, *, within: float, rate: float) -> Verdict:
    """K11: once the last fault is healed clients succeed again, and none hangs.

    Args:
        ledger: the history.
        within: seconds after the last fault healed from which the rate has to be reached.
        rate: share of operations that have to succeed; an honest refusal (`is_refused`) does.
    """
    verdict = Verdict("K11", f"{rate:.1%} succeed {within:g} s after the last fault; nobody hangs")
    timings, faults = ledger.timings, ledger.facts.get("fault", [])
    unhealed = [fact["name"] for fact in faults if fact.get("healed") is None]
    healed = max((fact["healed"] for fact in faults if fact.get("healed") is not None), default=0)
    since = healed + round(within * 1e9) if faults else 0
    tried = good = 0
    if not unhealed:
        for invoked, is_good in zip(timings.invoked, timings.good, strict=True):
            if invoked >= since:
                tried += 1
                good += is_good
        if tried and good < rate * tried:
            text = f"{good:,} of {tried:,} operations succeeded, {good / tried:.3%}"
            verdict.found("not recovered", text)
        elif faults and not tried:
            verdict.unchecked.append("no operation was begun after the faults: nobody recovered")
    for name in unhealed:
        verdict.unchecked.append(f"{name} was not healed")
    for ref, seconds, deadline in timings.late:
        text = f"{ref[0]} #{ref[1]} took {seconds:.3f} s with a deadline of {deadline:g} s"
        verdict.found("past its deadline", f"{text} and {SLACK:g} s of grace", [ref])
    killed = {fact["process"] for fact in ledger.facts.get("killed", ())}
    for ref in timings.pending:
        if ref[0] not in killed:
            verdict.found("hang", f"{ref[0]} #{ref[1]} was never answered, nor killed", [ref])
    verdict.is_concerned = ledger.total > 0
    verdict.counts = {
        "operations after the last fault": tried,
        "operations": ledger.total,
        "with a deadline": timings.n_deadlines,
        "faults": len(faults),
        "killed clients": len(killed),
    }
    return verdict
