"""K3 and K4: what sessions are shown of rows, by replicas and by caches.

    row   ["write", key] → version · ["read", key] → version, 0 for no row
          `session` names the session or the chain of its token; `source` is `cache` or `database`

Versions of a row grow with every commit, so what was shown says how old it was. Lists take part
with their lengths as versions, where their operations name a session.

Source: Terry et al., "Session Guarantees for Weakly Consistent Replicated Data", PDIS 1994;
faults.md K3, K4.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from tests.history.appends import FOREVER, Key
from tests.history.findings import Verdict
from tests.history.ledger import Ledger, View

__all__ = ["judge_caches", "judge_sessions"]


def judge_sessions(ledger: Ledger) -> Verdict:
    """Each session sees its own writes, and never goes back.

    Read your writes, monotonic reads, monotonic writes, and writes that follow reads; what counts
    for an operation is what the session had been answered before it began.
    """
    verdict = Verdict("K3", "sessions see their own writes, and never anything older than before")
    views = [*ledger.views, *_of_lists(ledger)]
    by_row: dict[tuple[str, Any], list[View]] = defaultdict(list)
    for view in views:
        by_row[view.session, view.key].append(view)
    n_after = 0
    for some in by_row.values():
        if len(some) > 1:
            n_after += _one_row(verdict, some)
    verdict.is_concerned = bool(views)
    verdict.counts = {
        "views after others": n_after,
        "views": len(views),
        "sessions": len({view.session for view in views}),
    }
    return verdict


def _one_row(verdict: Verdict, views: list[View]) -> int:
    """Judge what one session saw of one row; return how many had something before them."""
    started = sorted(views, key=lambda view: view.invoked)
    ended = sorted(views, key=lambda view: view.answered)
    at = n_after = 0
    written: View | None = None
    shown: View | None = None
    for view in started:
        while at < len(ended) and ended[at].answered <= view.invoked:
            done = ended[at]
            at += 1
            if done is view:
                continue
            if done.is_write and (written is None or done.version > written.version):
                written = done
            elif not done.is_write and (shown is None or done.version > shown.version):
                shown = done
        n_after += written is not None or shown is not None
        for before in (written, shown):
            if before is None or view.version > before.version:
                continue
            if view.is_write or view.version < before.version:
                _went_back(verdict, before, view)
                break
    return n_after


def _went_back(verdict: Verdict, before: View, view: View) -> None:
    name = {
        (True, True): "monotonic writes",
        (True, False): "read your writes",
        (False, False): "monotonic reads",
        (False, True): "writes follow reads",
    }[before.is_write, view.is_write]
    did = "wrote" if before.is_write else "was shown"
    then = "wrote" if view.is_write else "was shown"
    text = (
        f"session {view.session} {did} version {before.version} of {view.key} by "
        f"{before.ref[0]} #{before.ref[1]}, and {(view.invoked - before.answered) / 1e6:.3f} ms "
        f"later {then} {view.version} by {view.ref[0]} #{view.ref[1]}"
        f"{' from the cache' if view.is_cached else ''}"
    )
    verdict.found(name, text, [before.ref, view.ref])


def _of_lists(ledger: Ledger) -> Iterable[View]:
    """Yield what sessions saw of lists; versions are lengths."""
    appends = ledger.appends
    positions: dict[Key, dict[Any, int]] = {}
    for session, t, key, length, value in appends.sessions:
        answered = appends.answered[t]
        if answered == FOREVER:
            continue
        if length is None:
            if key not in positions:
                positions[key] = {v: i for i, v in enumerate(key.order, start=1)}
            version = positions[key].get(value)
            if version is None:  # not read by anybody, or lost: K1 has seen it
                continue
        else:
            version = length
        yield View(
            session, ("list", key.name), version, appends.invoked[t], answered, length is None,
            False, appends.ref(t),
        )  # fmt: skip


def judge_caches(ledger: Ledger, *, bound: float) -> Verdict:
    """No cache shows a version when a later one was acknowledged longer ago than the bound.

    What the session itself had written or seen is K3's.

    Args:
        ledger: the history.
        bound: seconds after an acknowledgement for which others may still be shown less.
    """
    verdict = Verdict("K4", f"caches show nothing older than what was committed {bound:g} s before")
    writes: dict[Any, list[View]] = defaultdict(list)
    cached: list[View] = []
    for view in ledger.views:
        if view.is_write:
            writes[view.key].append(view)
        elif view.is_cached:
            cached.append(view)
    times: dict[Any, list[int]] = {}
    newest: dict[Any, list[View]] = {}
    for key, some in writes.items():
        some.sort(key=lambda view: view.answered)
        times[key] = [view.answered for view in some]
        highest: list[View] = []
        for view in some:
            is_newer = not highest or view.version > highest[-1].version
            highest.append(view if is_newer else highest[-1])
        newest[key] = highest
    overtaken = {key: _overtaken(some) for key, some in writes.items()}
    slack, worst = round(bound * 1e9), 0
    for view in cached:
        at = bisect_left(times.get(view.key, []), view.invoked)
        if not at or newest[view.key][at - 1].version <= view.version:
            continue
        late = view.invoked - overtaken[view.key](view.version)
        worst = max(worst, late)
        if late > slack:
            last = newest[view.key][at - 1]
            text = (
                f"{view.ref[0]} #{view.ref[1]} was shown version {view.version} of {view.key} "
                f"from the cache, {late / 1e6:.3f} ms after a later one was acknowledged; "
                f"{last.ref[0]} #{last.ref[1]} had written {last.version}"
            )
            verdict.found("stale cache", text, [last.ref, view.ref])
    verdict.is_concerned = bool(cached)
    verdict.counts = {
        "reads from caches": sum(view.key in writes for view in cached),
        "writes": sum(map(len, writes.values())),
        "most milliseconds late": round(worst / 1e6),
    }
    if not ledger.has_one_clock:
        verdict.unchecked.append("clocks of processes differ: bounds are off by as much")
    return verdict


def _overtaken(writes: list[View]) -> Callable[[int], int]:
    """Return a function: when was the first version after this one acknowledged?"""
    versions, firsts = [], list[int]()
    first = FOREVER
    for write in sorted(writes, key=lambda view: -view.version):
        first = min(first, write.answered)
        versions.append(write.version)
        firsts.append(first)
    versions.reverse()
    firsts.reverse()
    return lambda version: firsts[bisect_right(versions, version)]
