"""The part of a session that runs one statement on several servers, and gathers the answers.

The base of `shardkit.session`, which has decided where the statement goes. Servers are asked in
parallel; where a connection is lost another endpoint is asked, and what is still missing then is
an error of that physical shard, or rows that are left out. What is asked and how answers are
merged is told by `shardkit.gather`.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import ORMExecuteState

from shardkit import deadlines, fences, gather, scatter, streams
from shardkit.cachedsession import CachedSession
from shardkit.checks import connection_error, late_error
from shardkit.errors import (
    GatherError,
    ShardFencedError,
    StatementTimeoutError,
    UnavailableError,
    UnsupportedStatementError,
)
from shardkit.events import Gathered, StatementRouted, caller
from shardkit.parallel import outcome
from shardkit.statements import Limits, limits_of
from shardkit.topology import Endpoint, Role

__all__ = ["GatheringSession"]

_NO_LIMITS: Final = Limits()

_SHARE: Final = 0.5
"""Of the time left, for the connections of a scatter; the rest is for its statement."""


class GatheringSession(CachedSession):
    """A session that may ask several servers for one answer.

    Attributes:
        failures: after a statement with `all_shards(partial=True)`, the error of each physical
            shard whose rows are missing, by name; empty when all answered.
    """

    failures: Mapping[str, Exception]

    def _gather(
        self, state: ORMExecuteState, shards: Sequence[int], key: Hashable | None = None
    ) -> Any:
        """Run one statement per physical shard, in parallel, and merge the answers.

        Args:
            state: the execution of the statement.
            shards: the logical shards to ask.
            key: by which its plan may be known.
        """
        cluster, limits = self._cluster, limits_of(state.statement) or _NO_LIMITS
        if limits.partial and self.role is Role.PRIMARY:
            raise UnsupportedStatementError(
                "partial results inside a transaction", hint="ask for them in cluster.reader()"
            )
        if len(shards) == 1:
            plan = gather.plan_of_one(state.statement)
        elif (known := cluster.plans.get(key)) is not None:
            plan = known
        else:
            plan = self._decided(
                lambda router: gather.plan(state.statement, state.parameters, router)
            )
            if shards is cluster.everything:  # the statement names no key
                cluster.plans.keep(key, plan)
        if state.bind_mapper is not None:
            cluster.fingerprints.check(state.bind_mapper)
        gathering = self._gathering(state, plan, limits)
        started = cluster.clock.monotonic()
        groups = self._group(shards)
        failures = self._asked(state, gathering, groups)
        failures = self._asked_where_lost(state, gathering, groups, failures)
        refused = self._fresh.refused()
        if self._leave_refusing():
            again = {name: groups[name] for name in refused}
            failures = self._asked_again(state, gathering, failures, again)
        # Taken before any is let go: locating one failure abandons every broken connection.
        endpoints = {name: endpoint for name, (endpoint, _) in self._roots.items()}
        failures = {name: self._located(e, endpoints.get(name)) for name, e in failures.items()}
        if failures:
            self._leave_lost()
        if self._has_moved(failures, groups, shards):
            gathering.close()
            return self._gather(state, shards, key)
        self._name_fenced(failures, plan.branch, groups)
        if cluster.listeners and len(shards) > 1:
            line = caller()

            def tell(answers: Mapping[str, int]) -> None:
                seconds = cluster.clock.monotonic() - started
                cluster.listeners.emit(Gathered(self._number, answers, failures, seconds, line))

            gathering.when_answered(tell)
        if limits.partial:
            self.failures = failures
        if failures and not (limits.partial and gathering.answers):
            gathering.close()
            raise GatherError(failures, gathering.answers) from next(iter(failures.values()))
        if isinstance(gathering, streams.Streaming):
            gathering.stream.located = lambda name, error: self._located(error, endpoints[name])
        return gathering.result()

    def _gathering(
        self, state: ORMExecuteState, plan: gather.Plan, limits: Limits
    ) -> scatter.Gathering:
        """Return what asks the servers: for all rows at once, or for a few at a time."""
        size = streams.size_of(state)
        if size is None or plan.merge is None:
            max_rows = limits.max_rows or self._cluster.max_rows
            return scatter.Gathering(state, plan, max_rows=max_rows, timeout=limits.timeout)
        found = streams.Streaming(state, plan, self._streams, size=size, timeout=limits.timeout)
        found.stream.transaction = self.get_nested_transaction()
        return found

    def _located(self, error: Exception, endpoint: Endpoint | None) -> Exception:
        """Return the shardkit error of a server that did not answer its part of a scatter.

        Args:
            error: what became of its part.
            endpoint: the server, or None when no connection to one could be had.
        """
        self._note_lost()
        if endpoint is None:
            return error
        if scatter.is_lost(error):
            found = connection_error(error, endpoint)
            found.__cause__ = error
            if self._can_retry():
                self._abandon_broken()
            else:
                self._cluster.failed(endpoint, found)
            return found
        if isinstance(error, StatementTimeoutError | ShardFencedError):
            error.endpoint = str(endpoint)
        return late_error(error, endpoint) or error

    def _name_fenced(
        self, failures: Mapping[str, Exception], statement: Any, groups: Mapping[str, Sequence[int]]
    ) -> None:
        """Say which logical shards of servers are fenced, if the servers still tell."""
        for physical, error in failures.items():
            if isinstance(error, ShardFencedError):
                ask = partial(self._cluster.ask, physical, primary=self.role is Role.PRIMARY)
                with suppress(UnavailableError, DBAPIError):
                    error.logical_shard = fences.first_fenced(ask, statement, groups[physical])

    def _asked_where_lost(
        self,
        state: ORMExecuteState,
        gathering: scatter.Gathering,
        groups: Mapping[str, tuple[int, ...]],
        failures: dict[str, Exception],
    ) -> dict[str, Exception]:
        """Ask other endpoints where connections were lost; return the failures that are left."""
        before = self._avoided
        try:
            while lost := {n: groups[n] for n, e in failures.items() if scatter.is_lost(e)}:
                if not self._can_retry() or deadlines.is_over():
                    return failures
                endpoints = {name: endpoint for name, (endpoint, _) in self._roots.items()}
                if not self._avoid(self._abandon_broken()):
                    located = {n: connection_error(failures[n], endpoints[n]) for n in lost}
                    return {**failures, **located}
                failures = self._asked_again(state, gathering, failures, lost)
            return failures
        finally:
            self._avoided = before

    def _asked(
        self,
        state: ORMExecuteState,
        gathering: scatter.Gathering,
        groups: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Exception]:
        """Ask servers for their part; return the failure of each that did not answer."""
        failures: dict[str, Exception] = {}
        servers = {}
        for physical, found in self._scattering_all(groups):
            if isinstance(found, Connection):
                servers[physical] = (found, groups[physical])
            elif isinstance(found, UnavailableError):
                failures[physical] = found
            else:
                raise found
        if self._cluster.listeners:
            self._tell_routed(state, tuple(sorted(itertools.chain(*groups.values()))))
        return failures | gathering.ask(servers, self._cluster.parallel)

    def _scattering_all(self, groups: Iterable[str]) -> list[tuple[str, Connection | Exception]]:
        """Return this session's connections to physical shards, or why there is none.

        With a deadline, new ones are opened at the same time, and leave time for the statement: a
        server that does not answer shall not keep the others from answering.
        """
        tasks = [partial(self._scattering, physical) for physical in groups]
        is_known = deadlines.current() is None or self._roots.keys() >= set(groups)
        if is_known or self.role is Role.PRIMARY:  # a transaction opens one at a time
            found = [outcome(task) for task in tasks]
        else:
            with deadlines.share(_SHARE):
                found = self._cluster.parallel(tasks)
        return list(zip(groups, found, strict=True))

    def _asked_again(
        self,
        state: ORMExecuteState,
        gathering: scatter.Gathering,
        failures: Mapping[str, Exception],
        groups: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Exception]:
        """Ask servers once more; return the failures that are left."""
        left = {name: error for name, error in failures.items() if name not in groups}
        return left | self._asked(state, gathering, groups)

    def _tell_routed(self, state: ORMExecuteState, shards: tuple[int, ...]) -> None:
        """Tell the listeners where a statement goes, opening its connections for that."""
        cluster = self._cluster
        if len(shards) == 1:
            self._connection_to(shards[0])
        physical = tuple(self._group(shards))
        kinds = ("select", "insert", "update", "delete")
        mapper = state.bind_mapper
        cluster.listeners.emit(
            StatementRouted(
                session=self._number,
                operation=next((k for k in kinds if getattr(state, f"is_{k}")), ""),
                subject="" if mapper is None else mapper.class_.__name__,
                shards=shards,
                total=cluster.router.total,
                physical=physical,
                from_replica=frozenset(
                    name
                    for name in physical
                    if name in self._roots and self._roots[name][0].role is Role.REPLICA
                ),
                after=self._after,
                caller=caller(),
            )
        )
