"""K5: events of the outbox: delivered at least once, in order by key, their effects once.

    emit      ["emit", key, event] → position in its key, as the database gave it
    deliver   ["deliver", key, event, position], by the handler
    effects   ["effects"] → the events whose effect is there, one entry for each effect; `final`

Source: faults.md K5; docs/outbox.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from tests.history.findings import Verdict
from tests.history.ledger import Ledger
from tests.history.records import Operation, Outcome

__all__ = ["judge_outbox"]


def judge_outbox(ledger: Ledger) -> Verdict:
    """Committed events are delivered, in the order of commit by key, with one effect each.

    Of an event of unknown outcome: its effect is there once if it was delivered, never without.
    """
    verdict = Verdict("K5", "events are delivered, in order by key, and take effect once")
    emits = {op.do[2]: op for op in ledger.operations.get("emit", ())}
    deliveries = ledger.operations.get("deliver", [])
    finals = [
        op
        for op in ledger.operations.get("effects", ())
        if op.outcome is Outcome.OK and op.more.get("final") is True
    ]
    delivered: dict[Any, Operation] = {}
    for op in sorted(deliveries, key=lambda op: op.invoked):
        event = op.do[2]
        delivered.setdefault(event, op)
        emit = emits.get(event)
        if emit is None:
            verdict.found(
                "phantom event", f"{event} was delivered, and nobody emitted it", [_r(op)]
            )
        elif emit.outcome is Outcome.FAIL:
            text = f"{event} was delivered, and its transaction {_w(emit)} had failed"
            verdict.found("aborted event", text, [_r(emit), _r(op)])
        elif op.invoked < emit.invoked and ledger.has_one_clock:
            text = f"{event} was delivered before {_w(emit)} began to emit it"
            verdict.found("early event", text, [_r(emit), _r(op)])
    _order(verdict, delivered)
    for event, emit in emits.items():
        if emit.outcome is Outcome.OK and event not in delivered and finals:
            text = f"{event} of {emit.do[1]} was committed by {_w(emit)} and never delivered"
            verdict.found("lost event", text, [_r(emit)])
    for read in finals:
        _effects(verdict, emits, delivered, read)
    verdict.is_concerned = bool(emits) or bool(deliveries)
    verdict.counts = {
        "final reads of effects": len(finals),
        "events": len(emits),
        "deliveries": len(deliveries),
        "keys": len({op.do[1] for op in emits.values()}),
    }
    return verdict


def _order(verdict: Verdict, delivered: dict[Any, Operation]) -> None:
    """Compare the first delivery of each event with those of its key before it."""
    keys: dict[Any, list[Operation]] = defaultdict(list)
    for op in delivered.values():  # in order of time
        keys[op.do[1]].append(op)
    for key, ops in keys.items():
        last = ops[0]
        for op in ops[1:]:
            if op.do[3] < last.do[3]:
                text = (
                    f"{op.do[2]} of {key} has position {op.do[3]} and was delivered after "
                    f"{last.do[2]}, which has {last.do[3]}"
                )
                verdict.found("order", text, [_r(last), _r(op)])
            else:
                last = op


def _effects(
    verdict: Verdict,
    emits: dict[Any, Operation],
    delivered: dict[Any, Operation],
    read: Operation,
) -> None:
    effects = Counter(read.got)
    for event, n in effects.items():
        emit = emits.get(event)
        refs = [*([_r(emit)] if emit else []), _r(read)]
        if n > 1:
            verdict.found("duplicate effect", f"{event} took effect {n} times", refs)
        if emit is None or emit.outcome is Outcome.FAIL or event not in delivered:
            verdict.found("phantom effect", f"{event} took effect and should not have", refs)
    for event, op in delivered.items():
        if event not in effects and op.outcome is Outcome.OK:
            verdict.found("lost effect", f"{event} was delivered and has no effect", [_r(op)])


def _r(op: Operation) -> tuple[str, int]:
    return op.process, op.n


def _w(op: Operation) -> str:
    return f"{op.process} #{op.n}"
