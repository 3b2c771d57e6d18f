"""What is to be done about a physical shard whose primary may be lost: one pure function, `decide`.

(view, policy) → action. The view is what was last heard of every server; an action is one step,
after which the view is made anew. Nothing but the servers remembers how far a failover is, so
whoever comes next, after a crash at any step, goes on where it stood. Driven by
`shardkit.ops.failover.driver` on real servers, and by simulations with a clock of their own.

    no lawful primary ── is it really lost? ──▶ Rest        too early, too often, nobody agrees
                      ── Renew ──▶ a replica tries to reach it anew, and says whether it can
                      ── Claim ──▶ this driver alone, on every standby that is seen
                      ── Fence ──▶ the old primary, where it can be reached
                      ── Cut ────▶ standbys stop listening to it: what they have is final
                      ── Promote ▶ the one that has most
    an upstart        ── Register ▶ its timeline, epochs and ids: from here on it is lawful
    a lawful primary  ── Drain, Fence, Promote ▶ where a switchover is wanted
                      ── Fence ──▶ every other server that takes writes
                      ── Repoint, Lead, Rejoin ▶ standbys, poolers, and who was left behind

**Lawful** is the primary whose timeline is the newest that anybody has registered. A standby that
was cut gives the old primary no answer, so with `policy.needed` of them cut no commit can be
acknowledged there that the promoted one lacks. Source: docs/failover.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shardkit.ops.failover.relaxing import Confirm, Relax, Restore

__all__ = [
    "CUT", "Action", "Claim", "Cut", "Drain", "Fence", "Lead", "Node", "Open", "Policy", "Promote",
    "Refuse", "Register", "Rejoin", "Renew", "Repoint", "Rest", "View", "Wait", "decide",
    "needed_of",
]  # fmt: skip

CUT: Final = "cut"
"""What a standby follows that follows nobody, by order of a failover."""


@dataclass(frozen=True, slots=True)
class Node:
    """One server, as it was last heard.

    Attributes:
        name: its address.
        answers: whether a new connection to it could be made.
        in_recovery: whether it is a standby.
        timeline: of its log; a standby's, of what it has received.
        position: end of its log: what a standby has flushed, what a primary has written; bytes.
        reached: a standby's timeline and position again, of what it surely has only: a receiver
            that begins says that it has all before, and may wait for what nobody has written.
        registered: the newest timeline that was registered, as far as it knows; None for none.
        began: a promoted one's, the most that it had as a standby, beginnings of records included;
            None for unknown.
        follows: name of the server that it is told to follow; `CUT`, or None for unknown.
        streams: whether it receives the log.
        is_lost: a standby says that its primary is out of its reach.
        is_renewing: it tries to reach its primary anew.
        is_renewed: it was told to reach its primary anew, and has had the time for it.
        is_closed: a primary that was told to take no writes.
        is_drained: and that by a switchover or a failover, not by a person.
        is_quiet: and on which nobody writes any more.
        is_stuck: a standby that does not follow, however often it connects: see `following`.
        is_rewound: it was made a standby again by pg_rewind, and has not followed since.
        is_claimed: this driver, and no other, changes it now.
        since: seconds since the last failover that it knows of; None for none.
    """

    name: str
    answers: bool = False
    in_recovery: bool = False
    timeline: int = 0
    position: int = 0
    reached: tuple[int, int] = (0, 0)
    registered: int | None = None
    began: int | None = None
    follows: str | None = None
    streams: bool = False
    is_lost: bool = False
    is_renewing: bool = False
    is_renewed: bool = False
    is_closed: bool = False
    is_drained: bool = False
    is_quiet: bool = False
    is_stuck: bool = False
    is_rewound: bool = False
    is_claimed: bool = False
    since: float | None = None

    @property
    def has(self) -> tuple[int, int]:
        """How much of the log it has."""
        return self.timeline, self.position

    @property
    def is_standby(self) -> bool:
        """Whether it answers as a standby."""
        return self.answers and self.in_recovery

    @property
    def takes_writes(self) -> bool:
        """Whether it answers as a primary."""
        return self.answers and not self.in_recovery


@dataclass(frozen=True, slots=True)
class View:
    """What one who decides knows.

    Attributes:
        nodes: every server of the physical shard.
        leader: name of the last lawful primary; the configured one at first.
        failures: probes of it in a row that have failed.
        failing_for: seconds since the last one that did not; 0 while they succeed.
        wanted: name of the server that is to become the primary by a planned switchover; None for
            no switchover.
        drained: end of the log of a primary that was drained for it; None before.
        is_ordered: a person has ordered a failover: no waiting, and no asking whether it is lost.
        accepts_loss: a person has said that fewer standbys than are needed will do.
        adopts: name of a promoted server that is to be registered though the old primary lives;
            None for none.
        fenced: names of servers that are known to be stopped, or shut out of writing for good.
        untouchable: names of those that could not be fenced.
        pooled: the server that poolers send writes to; None where there are none, or unknown.
        can_rejoin: names of servers that can be made standbys again.
        is_led: whether poolers are to be looked after.
    """

    nodes: tuple[Node, ...]
    leader: str
    failures: int = 0
    failing_for: float = 0.0
    wanted: str | None = None
    drained: int | None = None
    is_ordered: bool = False
    accepts_loss: bool = False
    adopts: str | None = None
    fenced: frozenset[str] = frozenset()
    untouchable: frozenset[str] = frozenset()
    pooled: str | None = None
    can_rejoin: frozenset[str] = frozenset()

    def node(self, name: str) -> Node:
        """Return a server; one that nobody knows answers nothing."""
        return next((n for n in self.nodes if n.name == name), Node(name))


@dataclass(frozen=True, slots=True)
class Policy:
    """When a failover is made.

    Attributes:
        failures: probes in a row that have to fail.
        patience: seconds that they have to fail for.
        every: seconds between two failovers of a physical shard, at least.
        needed: standbys that have to be seen, N - k + 1 for commits that k of N confirm.
        follows: whether a promotion by somebody else is registered without a person's word.
        acts: whether this one promotes at all; where something else does (Patroni), it only
            registers, and looks after poolers.
    """

    failures: int = 3
    patience: float = 1.0
    every: float = 60.0
    needed: int = 1
    follows: bool = True
    acts: bool = True


def needed_of(n_servers: int, *, confirm: int) -> int:
    """Return how many standbys have to be seen before one is promoted.

    Args:
        n_servers: the primary included.
        confirm: standbys that confirm each commit, k of `ANY k (…)`; 0 where none does.

    Returns:
        N - k + 1, which meets every k of N. Where nobody confirms there is no such number: half of
        the standbys, so that of three one that was left behind does not decide alone.
    """
    n_standbys = n_servers - 1
    if confirm:
        return max(1, n_standbys - confirm + 1)
    return max(1, (n_standbys + 1) // 2)


@dataclass(frozen=True, slots=True)
class Rest:
    """All is well; what there is."""

    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing may be done yet, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing may be done; a person has to look."""

    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class Renew:
    """A standby tries to reach its primary by a new connection."""

    node: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Servers are changed by this driver only, until it lets go or is gone."""

    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """A server must not take writes any more: it is stopped, or told so."""

    node: str


@dataclass(frozen=True, slots=True)
class Cut:
    """Standbys stop to receive from their primary."""

    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """A primary begins no write any more, and those under way end."""

    node: str
    to: str


@dataclass(frozen=True, slots=True)
class Open:
    """A primary that was drained takes writes again: the switchover was given up."""

    node: str


@dataclass(frozen=True, slots=True)
class Promote:
    """A standby becomes the primary; what is lost by that, maybe, as the driver says it."""

    node: str
    may_lose: str | None = None


@dataclass(frozen=True, slots=True)
class Register:
    """A promoted server's timeline is written down, epochs and ids raised: it is lawful."""

    node: str


@dataclass(frozen=True, slots=True)
class Repoint:
    """A standby follows another primary."""

    node: str
    to: str


@dataclass(frozen=True, slots=True)
class Lead:
    """Poolers send to the primary."""

    to: str


@dataclass(frozen=True, slots=True)
class Rejoin:
    """A server whose log went another way, or that was stopped, becomes a standby.

    By pg_rewind, or by a new copy where that did not help.
    """

    node: str
    to: str
    anew: bool = False


Action = (
    Rest | Wait | Refuse | Renew | Claim | Fence | Cut | Drain | Open | Promote | Register | Repoint
    | Lead | Rejoin | Relax | Restore | Confirm
)  # fmt: skip
"""The last three are decided by `relaxing`, while there is a lawful primary."""


def decide(view: View, policy: Policy) -> Action:
    """Return the next step."""
    newest = _newest(view.nodes)
    lawful = [
        n for n in view.nodes if n.takes_writes and n.timeline == newest == (n.registered or newest)
    ]
    upstarts = [n for n in view.nodes if n.takes_writes and n.timeline > newest]
    if len(lawful) > 1:
        return Refuse(
            f"{_names(lawful)} take writes on one timeline, {newest}",
            "stop all but the one whose rows are right, and make the others anew from it",
        )
    if lawful and not (view.adopts and view.adopts in {n.name for n in upstarts}):
        return _tended(view, policy, lawful[0], upstarts)
    if upstarts:
        return _raised(view, policy, upstarts, lawful)
    stale = [n for n in view.nodes if n.takes_writes and not _is_shut(view, n)]
    if stale and policy.acts:
        return Fence(stale[0].name)
    return _lost(view, policy)


def _newest(nodes: Iterable[Node]) -> int:
    """Return the newest timeline that was registered; that of the primary where none was."""
    known = [n.registered for n in nodes if n.answers and n.registered is not None]
    return max(known) if known else max((n.timeline for n in nodes if n.answers), default=0)


def _is_shut(view: View, node: Node) -> bool:
    return node.name in view.fenced or node.name in view.untouchable or node.is_closed


def _raised(view: View, policy: Policy, upstarts: list[Node], lawful: list[Node]) -> Action:
    """A server was promoted and is not registered: by this driver a moment ago, or by others."""
    if len(upstarts) > 1:
        return Refuse(
            f"{_names(upstarts)} were promoted side by side",
            "stop all but one, then run shardkit failover adopt",
        )
    (node,) = upstarts
    if view.adopts not in {None, node.name}:
        return Refuse(f"{view.adopts} was not promoted", f"{node.name} was")
    if not (policy.follows or view.adopts or _is_ours(view, policy, node)):
        return Wait(f"{node.name} was promoted and waits for shardkit failover adopt")
    if policy.acts and not (view.adopts or view.accepts_loss):
        unsafe = _unsafe(view, policy, node)
        if unsafe is not None:
            return unsafe
    for old in lawful:
        if not _is_shut(view, old):
            return Fence(old.name)
    return Register(node.name)


def _is_ours(view: View, policy: Policy, node: Node) -> bool:
    """Tell whether a failover promoted it that has not ended: the other standbys are cut still.

    No primary can have had a commit confirmed since, so it has all that was acknowledged.
    """
    others = [n for n in view.nodes if n.is_standby and n.follows in {CUT, node.name}]
    return policy.acts and len(others) + 1 >= policy.needed


def _unsafe(view: View, policy: Policy, node: Node) -> Action | None:
    """Return what has to be done before a promoted server may be registered, or None.

    Since it was promoted the old primary may have come back for a while, and a standby that
    follows it may have confirmed what the promoted one lacks. So nobody may follow the old one
    any more, and nobody may have more of its log than the promoted one began with.
    """
    standbys = [n for n in view.nodes if n.is_standby]
    if len(standbys) + 1 < policy.needed:
        return Refuse(
            f"{node.name} was promoted, and {len(standbys) + 1} of {policy.needed} servers that "
            "are needed answer: another may have what was acknowledged since",
            "bring one of the others back, or run shardkit failover adopt",
        )
    loose = [n for n in standbys if n.follows not in {CUT, node.name}]
    if loose:
        unclaimed = tuple(sorted(n.name for n in loose if not n.is_claimed))
        return Claim(unclaimed) if unclaimed else Cut(tuple(n.name for n in loose))
    began = node.position if node.began is None else node.began
    # Who is on a timeline before the one that was lawful till then has nothing acknowledged alone.
    late = range(node.registered or 0, node.timeline)
    ahead = [n for n in standbys if n.timeline in late and n.position > began]
    if ahead:
        return Refuse(
            f"{_names(ahead)} has more of the log than {node.name}, which was promoted",
            f"stop {node.name} and promote {ahead[0].name}, or run shardkit failover adopt",
        )
    return None


def _doubt(view: View, policy: Policy, leader: Node) -> Action | None:
    """Return why nobody may be told to follow a primary that seems lawful, or None.

    Standbys that had its timeline were taken away from it, and together with servers that do not
    answer they are enough to have let one of those be promoted. Nobody can confirm commits to the
    old one meanwhile. (Whoever was cut before it was promoted itself has an older timeline.)
    """
    silent = [n for n in view.nodes if not n.answers]
    apart = [
        n
        for n in view.nodes
        if n.is_standby and n.follows not in {leader.name, None} and n.timeline >= leader.timeline
    ]
    if silent and apart and len(silent) + len(apart) >= policy.needed:
        return Refuse(
            f"{_names(apart)} does not follow {leader.name} any more, and {_names(silent)} may "
            "have been promoted: it does not answer",
            "bring it back, or run shardkit failover --accept-loss",
        )
    return None


def _tended(view: View, policy: Policy, leader: Node, upstarts: list[Node]) -> Action:
    """There is a primary: everybody is to follow it."""
    if len(upstarts) == 1 and view.adopts is None and _is_ours(view, policy, upstarts[0]):
        # It came back in the middle of a failover: to let standbys follow it again would have
        # both confirm commits.
        return _raised(view, policy, upstarts, [leader])
    if policy.acts and not (view.accepts_loss or view.adopts):
        doubt = _doubt(view, policy, leader)
        if doubt is not None:
            return doubt
    others = [n for n in view.nodes if n.name != leader.name]
    if policy.acts and (step := _gathered(view, leader, upstarts)):
        return step
    if view.pooled is not None and view.pooled != leader.name:
        return Lead(leader.name)
    if policy.acts:
        for node in others:
            is_behind = node.is_stuck or (not node.is_standby and node not in upstarts)
            if is_behind and node.name in view.can_rejoin:
                return Rejoin(node.name, leader.name, anew=node.is_stuck and node.is_rewound)
    if upstarts:
        return Wait(
            f"{_names(upstarts)} was promoted while {leader.name} lives; "
            "stop one of the two, or run shardkit failover adopt"
        )
    missing = [n.name for n in others if not (n.is_standby and n.streams)]
    told = f"{leader.name} is the primary, on timeline {leader.timeline}"
    return Wait(f"{told}; {', '.join(missing)} does not follow") if missing else Rest(told)


def _gathered(view: View, leader: Node, upstarts: list[Node]) -> Action | None:
    """Return what brings the others behind the primary, or another one in its place; or None."""
    others = [n for n in view.nodes if n.name != leader.name]
    for node in others:
        if node.takes_writes and node not in upstarts and not _is_shut(view, node):
            return Fence(node.name)
    if view.wanted is not None and view.wanted != leader.name:
        return _switched(view, leader, view.node(view.wanted))
    if leader.is_drained:
        return Open(leader.name)
    for node in others:
        # One that is told to follow an unknown name may know the primary by another one.
        is_unknown = node.follows is None and node.streams
        if node.is_standby and node.follows != leader.name and not (is_unknown or node.is_stuck):
            return Repoint(node.name, leader.name)
    return None


def _switched(view: View, leader: Node, target: Node) -> Action:
    """A person wants another primary, and nothing is to be lost."""
    if not target.is_standby or not (target.streams or view.drained is not None):
        return Refuse(f"{target.name} does not follow {leader.name}", "see shardkit status")
    if not target.is_claimed:
        return Claim((target.name,))
    if view.drained is None or not leader.is_closed or not leader.is_quiet:
        return Drain(leader.name, target.name)
    if target.position < view.drained:
        return Wait(f"{target.name} receives what is left")
    if leader.name not in view.fenced | view.untouchable:
        return Fence(leader.name)
    return Promote(target.name)


def _lost(view: View, policy: Policy) -> Action:
    """Nobody takes writes by right."""
    standbys = [n for n in view.nodes if n.is_standby]
    if not policy.acts:
        return Wait("no primary; somebody else is to promote one")
    if not standbys:
        return Wait("no server answers")
    has_begun = view.drained is not None or view.is_ordered
    if not has_begun and (why := _too_early(view, policy, standbys)):
        return Wait(why)
    if len(standbys) < policy.needed and not view.accepts_loss:
        return Refuse(
            f"{len(standbys)} of {policy.needed} standbys that are needed answer: "
            "another may have what was acknowledged",
            "bring one of the others back, or run shardkit failover --accept-loss",
        )
    if not has_begun and not any(n.is_lost or n.follows == CUT for n in standbys):
        fresh = [n.name for n in standbys if not (n.is_renewed or n.is_renewing)]
        if fresh:
            return Renew(fresh[0])
        if any(n.is_renewing for n in standbys):
            return Wait(f"{_names(standbys)} try to reach {view.leader}")
        return Wait(f"{_names(standbys)} still reach {view.leader}")
    return _succeeded(view, standbys)


def _too_early(view: View, policy: Policy, standbys: list[Node]) -> str | None:
    """Return why a primary that does not answer is not given up yet."""
    if view.failures < policy.failures or view.failing_for < policy.patience:
        return f"{view.leader} has not answered for {view.failing_for:.1f} s"
    recent = min((n.since for n in standbys if n.since is not None), default=None)
    if recent is not None and recent < policy.every:
        return f"the last failover was only {recent:.0f} s ago"
    return None


def _succeeded(view: View, standbys: list[Node]) -> Action:
    """The primary is lost: a standby takes its place."""
    if not all(n.is_claimed for n in standbys):
        return Claim(tuple(sorted(n.name for n in standbys)))
    # Who answers nothing may be the primary, whatever is remembered.
    for node in view.nodes:
        if not node.is_standby and node.name not in view.fenced | view.untouchable:
            return Fence(node.name)
    linked = tuple(n.name for n in standbys if n.follows != CUT or n.streams)
    if linked:
        return Cut(linked)
    best = max(standbys, key=lambda n: (n.has, n.name))
    target = best if view.wanted is None else view.node(view.wanted)
    if target.is_standby and target.has >= best.has:
        return Promote(target.name)
    return Refuse(f"{best.name} has more of the log than {target.name}", f"promote {best.name}")


def _names(nodes: Iterable[Node]) -> str:
    return ", ".join(n.name for n in nodes)
