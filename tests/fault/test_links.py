"""Rows 1 and 58 of the fault matrix: a primary that crashes, and a COMMIT whose answer is lost."""

from __future__ import annotations

import pytest

from shardkit import Cluster
from shardkit.clock import SYSTEM
from shardkit.errors import OutcomeUnknownError, UnavailableError
from shardkit.local import LocalCluster
from shardkit.testing import Fault, When, wait_until
from shardkit.topology import Topology
from tests.fixtures.proxies import Proxied
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]


def stored(topology: Topology, user_id: int) -> bool:
    """Return whether the primary holds a user."""
    with Cluster(topology) as cluster, cluster.writer() as session:
        return session.get(User, user_id) is not None


@pytest.mark.parametrize("when", list(When))
def test_row_58_a_commit_without_an_answer_is_unknown(
    topology: Topology, proxied: Proxied, when: When
) -> None:
    """Nobody can tell the two apart from the client's side, so both are unknown."""
    through, proxy = proxied(topology, topology.physical["alpha"].primary)
    with Cluster(through) as cluster:
        cluster.connections.placement = lambda _: 0
        for turn in range(3):
            user = User(name=f"ana{turn}")
            with cluster.writer() as session:
                session.add(user)
                session.flush()
                user_id = user.id
                session.add(Photo(owner_id=user_id))
                session.flush()
                cut = proxy.on(r"(^|; )commit", Fault.RESET, when=when)
                with pytest.raises(OutcomeUnknownError) as caught:
                    session.commit()
            cut.wait(0)
            assert not caught.value.retryable
            assert stored(topology, user_id) is (when is When.AFTER)
        proxy.heal()
        with cluster.writer() as session:
            session.add(User(name="bo"))
            session.commit()


def test_row_1_a_primary_that_crashes_loses_nothing_that_it_acknowledged(
    topology: Topology, local_cluster: LocalCluster
) -> None:
    acknowledged: list[int] = []
    name = local_cluster.primary("alpha").name
    with Cluster(topology) as cluster:
        cluster.connections.placement = lambda _: 0

        def write() -> bool:
            user = User(name="ana")
            begun = SYSTEM.monotonic()
            try:
                with cluster.writer() as session:
                    session.add(user)
                    session.commit()
                    acknowledged.append(user.id)
            except (UnavailableError, OutcomeUnknownError):
                return False
            finally:
                assert SYSTEM.monotonic() - begun < 6.0, "the error comes soon"
            return True

        assert all(write() for _ in range(20))
        local_cluster.kill_server(name)
        try:
            assert not write()
        finally:
            local_cluster.start_server(name)
        wait_until(write, 10.0, "writes go on")
        assert len(acknowledged) == 21
        assert all(stored(topology, user_id) for user_id in acknowledged)
