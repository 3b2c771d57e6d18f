"""The participant that commits over several physical shards: prepares, decides, finishes.

The protocol is `shardkit.twophase`; this is its place in a writer's transaction. A transaction
that has written to one physical shard takes no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import Connection
from sqlalchemy.exc import PendingRollbackError

from shardkit.participants import Ending, Participant
from shardkit.twophase import AtomicCommit, Servers

__all__ = ["Agreement"]


class Agreement(Participant):
    """The agreement of the servers of one session's transaction.

    Args:
        servers: the cluster.
        written: returns the session's connections to the physical shards that were written to.
        session: number of the session, for those who listen.

    Attributes:
        is_needed: whether the commit under way, or the last one, is over several servers.
        pending: after a commit, physical shards that had not answered yet.
    """

    def __init__(
        self, servers: Servers, written: Callable[[], Mapping[str, Connection]], session: int
    ) -> None:
        self._servers = servers
        self._written = written
        self._session = session
        self._commit: AtomicCommit | None = None
        self.is_needed = False
        self.pending: tuple[str, ...] = ()

    @property
    def is_under_way(self) -> bool:
        """Whether it has begun and not ended."""
        return self._commit is not None

    def prepare(self) -> None:
        """Prepare the transaction on every server, if there are several.

        Raises:
            ConfigurationError: a server is not set up for prepared transactions.
            EndpointUnavailableError: it took so long that the resolver undid it (retryable).
        """
        self.refuse_failed()
        roots = self._written()
        self.is_needed = len(roots) > 1
        if self.is_needed:
            self._commit = AtomicCommit(self._servers, roots, self._session)
            self._commit.prepare()

    def refuse_failed(self) -> None:
        """Refuse to go on with a commit that failed.

        Raises:
            sqlalchemy.exc.PendingRollbackError: it did.
        """
        if self._commit is not None:
            raise PendingRollbackError("this commit failed before; call rollback() and begin again")

    def decide(self) -> None:
        """Commit the coordinator's part, and so the whole.

        Raises:
            EndpointUnavailableError: the coordinator went away, and nothing holds (retryable).
            OutcomeUnknownError: it went away and cannot be asked either.
        """
        if self._commit is not None:
            self._commit.decide()

    def finish(self) -> None:
        """Commit what is prepared elsewhere."""
        self.pending = ()
        if self._commit is not None:
            self._commit.finish()
            self.pending = self._commit.pending
            self._commit = None

    def settle(self, ending: Ending) -> None:
        """Undo what was prepared, if it did not commit or nobody knows."""
        if self._commit is not None:
            abandoned, self._commit = self._commit, None
            abandoned.abandon()
