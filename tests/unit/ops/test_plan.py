"""What is to be done, decided from ledgers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from shardkit.errors import EndpointUnavailableError, RefusedError, ShardkitError
from shardkit.ids import EPOCH_MS
from shardkit.ops.ledger import (
    OWN,
    Identity,
    Ledger,
    Ownership,
    admin_script,
    logical_shard_digest,
    shard_script,
)
from shardkit.ops.parts import Parts
from shardkit.ops.plan import MigrationPlan, decide
from shardkit.ops.revisions import Revision
from shardkit.topology import Endpoint, PhysicalShard, Role, RoleNames, ShardMap, Topology

ROLES = RoleNames.of(app="app", admin="admin")
ACTIVE = Ownership(1, "active", None)
OWN_ROW = {OWN: logical_shard_digest(ROLES)}


def physical(name: str) -> PhysicalShard:
    url = make_url(f"postgresql+psycopg://app@{name}/db")
    return PhysicalShard(name, Endpoint(name, Role.PRIMARY, url), (), url.set(username="admin"))


TOPOLOGY = Topology(
    "demo",
    {"alpha": physical("alpha"), "beta": physical("beta")},
    ShardMap(("alpha", "alpha", "beta", "beta"), (1, 1, 1, 1)),
)


def revision(id: str, checksum: str = "c") -> Revision:  # noqa: A002
    return Revision(id, "", Path("x"), ("SELECT 1",), checksum)


R1, R2 = revision("r1"), revision("r2")
DONE = OWN_ROW | {"r1": "c"}


def ledger(
    name: str,
    applied: dict[int, dict[str, str]],
    ownership: dict[int, Ownership] | None = None,
) -> Ledger:
    _, digest = admin_script(TOPOLOGY.physical[name], cluster="demo", n_logical_shards=4)
    rows = ownership if ownership is not None else dict.fromkeys(applied, ACTIVE)
    return Ledger(Identity("demo", name, 4, EPOCH_MS), False, digest, rows, applied)


def work(plan: MigrationPlan) -> dict[int, list[str]]:
    return {
        item.logical_shard: [r.id for r in item.revisions]
        for part in plan.physical
        for item in part.work
    }


def test_an_unused_cluster_gets_everything_where_it_is_first_placed() -> None:
    plan = decide(TOPOLOGY, [R1, R2], {"alpha": Ledger(), "beta": Ledger()})
    assert work(plan) == {n: ["r1", "r2"] for n in range(4)}
    assert all(part.admin for part in plan.physical)
    assert all(item.is_new and item.own for part in plan.physical for item in part.work)
    assert plan.pending == (R1, R2)


def test_a_current_cluster_needs_nothing() -> None:
    plan = decide(
        TOPOLOGY,
        [R1],
        {"alpha": ledger("alpha", {0: DONE, 1: DONE}), "beta": ledger("beta", {2: DONE, 3: DONE})},
    )
    assert plan.n_work == 0
    assert not any(part.admin for part in plan.physical)
    assert [part.n_current for part in plan.physical] == [2, 2]


def test_a_half_finished_run_is_continued() -> None:
    plan = decide(
        TOPOLOGY,
        [R1, R2],
        {
            "alpha": ledger("alpha", {0: DONE | {"r2": "c"}, 1: DONE}),
            "beta": ledger("beta", {2: DONE}),
        },
    )
    assert work(plan) == {1: ["r2"], 2: ["r2"], 3: ["r1", "r2"]}


def test_a_used_schema_gets_a_transaction_per_revision_and_a_new_one_a_single() -> None:
    plan = decide(
        TOPOLOGY,
        [R1, R2],
        {"alpha": ledger("alpha", {0: {"r1": "c"}}), "beta": Ledger()},
    )
    used, new = plan.physical[0].work
    parts = Parts(plan.physical[0], ROLES)
    own, then = parts.of(used, 0)
    assert (own.revisions, then.revisions) == ((), (R2,))
    [at_once] = parts.of(new, 0)
    assert at_once.revisions == (R1, R2)


def test_ownership_rows_win_over_the_first_placement() -> None:
    moved = {2: Ownership(2, "active", None)}
    retired = {0: ACTIVE, 1: ACTIVE}
    plan = decide(
        TOPOLOGY,
        [R1],
        {
            "alpha": ledger("alpha", {0: DONE, 1: DONE, 2: OWN_ROW}, retired | moved),
            "beta": ledger(
                "beta", {2: DONE, 3: DONE}, {2: Ownership(2, "retired", "alpha"), 3: ACTIVE}
            ),
        },
    )
    assert work(plan) == {2: ["r1"]}
    assert plan.physical[0].work[0].logical_shard == 2


def test_a_logical_shard_under_way_waits() -> None:
    plan = decide(
        TOPOLOGY,
        [R1],
        {
            "alpha": ledger(
                "alpha", {0: OWN_ROW, 1: DONE}, {0: Ownership(1, "fenced", None), 1: ACTIVE}
            ),
            "beta": ledger("beta", {2: DONE, 3: DONE}),
        },
    )
    assert plan.n_work == 0
    assert "fenced" in plan.physical[0].waiting[0]


def test_a_silent_physical_shard_does_not_hold_up_the_others() -> None:
    dead: ShardkitError = EndpointUnavailableError("down")
    plan = decide(TOPOLOGY, [R1], {"alpha": Ledger(), "beta": dead})
    assert work(plan) == {0: ["r1"], 1: ["r1"]}
    assert plan.physical[1].error is dead


def test_nothing_is_created_while_its_home_may_be_silent() -> None:
    """Rows and configuration disagree, so a missing logical shard may be on the silent server."""
    dead: ShardkitError = EndpointUnavailableError("down")
    moved = {0: ACTIVE, 3: Ownership(2, "active", None)}
    plan = decide(
        TOPOLOGY,
        [R1],
        {"alpha": ledger("alpha", {0: DONE, 3: DONE}, moved), "beta": dead},
    )
    assert plan.n_work == 0
    assert "beta" in plan.physical[0].waiting[1]


@pytest.mark.parametrize(
    "identity",
    [
        Identity("other", "alpha", 4, EPOCH_MS),
        Identity("demo", "beta", 4, EPOCH_MS),
        Identity("demo", "alpha", 8, EPOCH_MS),
        Identity("demo", "alpha", 4, 0),
    ],
)
def test_a_server_of_something_else_is_refused(identity: Identity) -> None:
    with pytest.raises(RefusedError, match="the server says"):
        decide(TOPOLOGY, [R1], {"alpha": Ledger(identity), "beta": Ledger()})


def test_a_replica_is_refused() -> None:
    with pytest.raises(RefusedError, match="replica"):
        decide(TOPOLOGY, [R1], {"alpha": Ledger(is_replica=True), "beta": Ledger()})


def test_an_edited_revision_is_refused() -> None:
    ledgers = {"alpha": ledger("alpha", {0: DONE}), "beta": Ledger()}
    with pytest.raises(RefusedError, match="r1 was edited"):
        decide(TOPOLOGY, [revision("r1", "other")], ledgers)


def test_a_revision_from_newer_code_is_refused() -> None:
    ledgers = {"alpha": ledger("alpha", {0: DONE}), "beta": Ledger()}
    with pytest.raises(RefusedError, match="r1 is applied on 'alpha' but unknown"):
        decide(TOPOLOGY, [], ledgers)


def test_two_owners_at_one_epoch_are_refused() -> None:
    with pytest.raises(RefusedError, match="both"):
        decide(
            TOPOLOGY,
            [R1],
            {"alpha": ledger("alpha", {0: DONE}), "beta": ledger("beta", {0: DONE})},
        )


def test_the_script_of_a_shard_carries_its_ledger_row() -> None:
    script = shard_script(42, own=False, roles=ROLES, revisions=[R1])
    assert script.startswith('SET LOCAL search_path = "shard_0042"\n;\nSELECT 1\n;\nINSERT INTO ')
    assert '"shard_0042".shardkit_version' in script
    assert "('r1', 'c', NULL)" in script


def test_names_are_quoted_into_the_script() -> None:
    assert '"odd""role"' in shard_script(
        1, own=True, roles=RoleNames.of(app='odd"role', admin="adm"), revisions=[]
    )
