"""Checks of what shardkit itself keeps on the primaries, and of who may touch it.

Source: docs/architecture.md, decisions 6, 7, 13, 19, 21; docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardkit.config import format_ranges
from shardkit.ids import MAX_AHEAD_MS
from shardkit.ops.health.facts import Facts
from shardkit.ops.health.findings import Problem, Severity, check
from shardkit.ops.ledger import OWN

__all__ = ["CHECKS"]

OUTBOX_AGE = 60.0
"""Seconds after which an event is late: relays look several times a second. A choice."""

_AHEAD = MAX_AHEAD_MS / 1000


@check(Severity.ERROR, "run `shardkit roles apply`: the application needs DML only")
def app_powers(facts: Facts) -> Iterator[Problem]:
    """The application's role may do more than its work, so that no fence stops it."""
    for state in facts.states:
        if state.app.powers:
            yield Problem(state.where, f"role {state.app.name!r}: {', '.join(state.app.powers)}")


@check(Severity.ERROR, "run `shardkit roles apply`; what is in other schemas, ALTER … OWNER TO")
def app_owns(facts: Facts) -> Iterator[Problem]:
    """The application's role owns something: REVOKE does not bind owners."""
    for state in facts.states:
        if state.app.owned:
            yield Problem(state.where, f"role {state.app.name!r} owns {', '.join(state.app.owned)}")


@check(Severity.ERROR, "run `shardkit roles apply`; in other schemas, REVOKE CREATE")
def app_creates(facts: Facts) -> Iterator[Problem]:
    """The application's role may create objects."""
    for state in facts.states:
        if state.app.creates_in:
            places = ", ".join(state.app.creates_in)
            yield Problem(state.where, f"role {state.app.name!r} may create in {places}")


@check(Severity.WARNING, "run `shardkit roles plan`, which lists all of them, then apply")
def roles_differ(facts: Facts) -> Iterator[Problem]:
    """Roles, owners or rights that are not as `shardkit roles apply` makes them."""
    for state in facts.states:
        if state.ledger.identity is not None and state.role_changes:
            first, n_more = state.role_changes[0], len(state.role_changes) - 1
            yield Problem(state.where, f"{first}{f', and {n_more} more' if n_more else ''}")


@check(Severity.WARNING, "ALTER ROLE … NOSUPERUSER; it owns the database, which is enough")
def admin_powers(facts: Facts) -> Iterator[Problem]:
    """The admin's role is a superuser."""
    for state in facts.states:
        if "SUPERUSER" in state.admin_powers:
            yield Problem(state.where, "the admin login is a superuser")


@check(Severity.WARNING, "as a superuser: GRANT SET ON PARAMETER … TO the admin's role")
def passwords_logged(facts: Facts) -> Iterator[Problem]:
    """A subscription that cannot be made leaves the password of the mover in the server's log."""
    for state in facts.states:
        if state.logged:
            what = f"the admin's role may not set {', '.join(state.logged)}"
            yield Problem(state.where, f"{what}, so that a move that fails may log a password")


@check(Severity.ERROR, "run `shardkit migrate apply`, or correct the address in shardkit.toml")
def identity(facts: Facts) -> Iterator[Problem]:
    """A primary that shardkit has not used, or of another cluster or physical shard."""
    topology = facts.expected.topology
    for state in facts.states:
        found = state.ledger.identity
        if found is None:
            yield Problem(state.where, "has not been migrated yet")
        elif (found.cluster, found.physical) != (topology.name, state.physical):
            yield Problem(state.where, f"is {found.physical!r} of cluster {found.cluster!r}")
        elif found.n_logical_shards != topology.n_logical_shards:
            yield Problem(
                state.where,
                f"has {found.n_logical_shards} logical shards, "
                f"shardkit.toml {topology.n_logical_shards}",
            )


@check(Severity.ERROR, "run `shardkit migrate apply`")
def schema_missing(facts: Facts) -> Iterator[Problem]:
    """A logical shard without a schema where its owner is said to be."""
    for state in facts.states:
        owned = {n for n, o in state.ledger.ownership.items() if o.state != "retired"}
        if missing := owned - state.schemas:
            yield Problem(state.where, f"has no schema of logical shards {_ranges(missing)}")


@check(Severity.WARNING, "look at what is in it; drop it when nothing is missed")
def schema_stray(facts: Facts) -> Iterator[Problem]:
    """A schema of a logical shard that the server does not own."""
    for state in facts.states:
        if stray := state.schemas - state.ledger.ownership.keys():
            yield Problem(state.where, f"has schemas of logical shards {_ranges(stray)} unowned")


@check(Severity.ERROR, "run `shardkit migrate apply`; after a restore, compare the backups")
def unowned(facts: Facts) -> Iterator[Problem]:
    """A logical shard that no primary owns, or two at one epoch."""
    if any(shard not in {s.physical for s in facts.states} for shard in _names(facts)):
        return  # it may be owned by one that does not answer
    owners: dict[int, list[tuple[int, str]]] = {}
    for state in facts.states:
        if state.ledger.identity is None:
            return
        for number, row in state.ledger.ownership.items():
            if row.state != "retired":
                owners.setdefault(number, []).append((row.epoch, state.physical))
    if lost := set(range(facts.expected.topology.n_logical_shards)) - owners.keys():
        yield Problem("cluster", f"nobody owns logical shards {_ranges(lost)}")
    for number, found in sorted(owners.items()):
        top = [physical for epoch, physical in found if epoch == max(found)[0]]
        if len(top) > 1:
            yield Problem("cluster", f"logical shard {number} is owned by {' and '.join(top)}")


@check(Severity.NOTE, "write the present owner into `logical_shards` of shardkit.toml")
def misplaced(facts: Facts) -> Iterator[Problem]:
    """A logical shard that has moved since shardkit.toml said where it is."""
    shard_map = facts.expected.topology.shard_map
    for state in facts.states:
        here = {n for n, o in state.ledger.ownership.items() if o.state == "active"}
        wrong = {n for n in here if n < len(shard_map) and shard_map.owner(n) != state.physical}
        if wrong:
            yield Problem(state.where, f"owns logical shards {_ranges(wrong)}, unlike the file")


@check(Severity.WARNING, "let the move end, or abort it")
def fenced(facts: Facts) -> Iterator[Problem]:
    """Logical shards that are fenced or being imported: nobody can write to them."""
    for state in facts.states:
        found = {n for n, o in state.ledger.ownership.items() if o.state in {"fenced", "importing"}}
        if found:
            yield Problem(state.where, f"logical shards {_ranges(found)} take no writes")


@check(Severity.WARNING, "run `shardkit migrate apply`")
def outdated(facts: Facts) -> Iterator[Problem]:
    """Tables and functions of shardkit that are of another version than this one."""
    for state in facts.states:
        if state.ledger.identity is None:
            continue
        if state.ledger.digest != state.admin_digest:
            yield Problem(state.where, "its schema `shardkit` is of another version")
        old = {
            n
            for n in state.ledger.ownership.keys() & state.schemas
            if state.ledger.applied.get(n, {}).get(OWN) != state.shard_digest
        }
        if old:
            yield Problem(state.where, f"logical shards {_ranges(old)} are of another version")


@check(Severity.ERROR, "run `shardkit migrate apply`; after a restore, mint above the old ids")
def ids_missing(facts: Facts) -> Iterator[Problem]:
    """A logical shard that cannot mint ids, its state being lost."""
    for state in facts.states:
        if lost := {each.logical_shard for each in state.ids if each.ahead is None}:
            yield Problem(state.where, f"logical shards {_ranges(lost)} have no state of their ids")


@check(Severity.ERROR, "wait until the clock has caught up, and find out who set it back")
def ids_ahead(facts: Facts) -> Iterator[Problem]:
    """Ids that are ahead of the server's clock, which was set back: nothing is minted."""
    for state in facts.states:
        ahead = {each.logical_shard: each.ahead for each in state.ids if each.ahead is not None}
        late = {n for n, seconds in ahead.items() if seconds > _AHEAD}
        if late:
            most = max(ahead[n] for n in late)
            yield Problem(
                state.where, f"ids of logical shards {_ranges(late)} are {most:.1f} s ahead"
            )


@check(Severity.ERROR, "run `shardkit reference repair`")
def reference_differs(facts: Facts) -> Iterator[Problem]:
    """A reference table that is not the same on every physical shard."""
    found = facts.reference
    for each in found.differences if found else ():
        rows = "other columns" if each.rows is None else f"{each.rows:,} rows"
        expected = "no such table" if each.expected is None else f"{each.expected:,} rows"
        home = found.home if found else ""
        yield Problem(each.physical, f"reference.{each.table}: {rows}, {expected} on {home!r}")


@check(Severity.WARNING, "see the reason; run `shardkit reference check` later")
def not_looked_at(facts: Facts) -> Iterator[Problem]:
    """Something that could not be looked at, though its servers answer."""
    failures = dict(facts.failures)
    if facts.reference:
        failures |= {f"reference tables of {n}": e for n, e in facts.reference.failed.items()}
    for where, error in failures.items():
        if not where.startswith("pgbouncer "):
            yield Problem(where, error.message, error.hint)
    for outbox in facts.outboxes:
        if outbox.error is not None:
            yield Problem(f"outbox of {outbox.physical}", outbox.error.message, outbox.error.hint)


@check(Severity.ERROR, "run `shardkit lookup backfill`; rows that share a value have to be changed")
def lookup_incomplete(facts: Facts) -> Iterator[Problem]:
    """Old rows of a unique column that are not in its lookup, or share their value (a sample)."""
    for report in facts.lookups:
        if report.n_missing:
            yield Problem(report.lookup, f"{report.n_missing} of {report.n_rows} rows are missing")
        if report.duplicates:
            yield Problem(report.lookup, f"{len(report.duplicates)} values have several rows")


@check(Severity.WARNING, "start a relay, or look at what it logs: shardkit outbox relay")
def outbox_late(facts: Facts) -> Iterator[Problem]:
    """Events that wait in an outbox for too long."""
    for outbox in facts.outboxes:
        if outbox.oldest is not None and outbox.oldest > OUTBOX_AGE:
            yield Problem(
                outbox.physical,
                f"{outbox.backlog:,} events wait, the oldest for {outbox.oldest:,.0f} s",
            )


@check(Severity.WARNING, "shardkit outbox dead shows why; shardkit outbox replay tries again")
def outbox_dead(facts: Facts) -> Iterator[Problem]:
    """Events that were given up."""
    for outbox in facts.outboxes:
        if outbox.dead:
            yield Problem(outbox.physical, f"{outbox.dead:,} dead letters")


def _names(facts: Facts) -> Iterable[str]:
    return facts.expected.topology.physical


def _ranges(numbers: Iterable[int]) -> str:
    return format_ranges(sorted(numbers))


CHECKS = (
    app_powers, app_owns, app_creates, roles_differ, admin_powers, passwords_logged, identity,
    schema_missing, schema_stray, unowned, misplaced, fenced, outdated, ids_missing, ids_ahead,
    reference_differs, not_looked_at, lookup_incomplete, outbox_late, outbox_dead,
)  # fmt: skip
