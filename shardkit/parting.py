"""psycopg connections that send the last statements of a transaction together with COMMIT.

A writer says them with `say_last`; they travel in one packet with COMMIT, in libpq's pipeline
mode, so an event costs no round trip of its own. What one of them fails with is what COMMIT
fails with, and the transaction is then rolled back. psycopg's own pipelines cost more than
the round trip, so one internal generator of it is extended here.
Part of the connections of `shardkit.drivers`; used by `shardkit.writer`.
Source: PostgreSQL's documentation, libpq, "Pipeline Mode"; `python -m benchmarks outbox`.
"""

from __future__ import annotations

from typing import Any

from psycopg import adapt, errors, generators
from psycopg._connection_base import BaseConnection
from psycopg._preparing import Prepare
from psycopg.abc import PQGen
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

__all__ = ["Parting"]

_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_ABORTED)


class Parting(BaseConnection[Any]):
    """What both kinds of connections share.

    *Invariant:* what was said last is sent with the COMMIT of its transaction, or never.
    """

    _last: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def say_last(self, statement: str, parameters: tuple[Any, ...]) -> bool:
        """Have a statement sent with COMMIT; False where nothing has been begun to commit."""
        if self.pgconn.transaction_status != TransactionStatus.INTRANS:
            return False
        self._last += ((statement, parameters),)
        return True

    def _commit_gen(self) -> PQGen[None]:
        if (yield from self._part(())) is None:
            yield from super()._commit_gen()

    def _part(self, asked: tuple[bytes, ...]) -> PQGen[list[PGresult] | None]:
        """Commit with what was said last, if anything was.

        Args:
            asked: a query to run just before COMMIT and one to run after it, or nothing.

        Returns:
            the answers to those two, or None where COMMIT has not been sent.
        """
        said, self._last = self._last, ()
        if not said or self.pgconn.transaction_status != TransactionStatus.INTRANS:
            return None
        return (yield from self._say(said, asked))

    def _rollback_gen(self) -> PQGen[None]:
        self._last = ()
        yield from super()._rollback_gen()

    def _say(
        self, said: tuple[tuple[str, tuple[Any, ...]], ...], asked: tuple[bytes, ...]
    ) -> PQGen[list[PGresult] | None]:
        """Send statements and COMMIT; None when only the statements were sent."""
        cursor: Any = self.cursor()  # type: ignore[attr-defined]  # both kinds have it
        cursor._tx = adapt.Transformer(cursor)
        queries = [cursor._convert_query(*each) for each in said]
        found = [self._prepared.get(query) for query in queries]
        if self._pipeline is not None or any(prep is Prepare.SHOULD for prep, _ in found):
            try:
                for each in said:  # to be prepared for the next time
                    yield from cursor._execute_gen(*each)
            except errors.Error:
                if self.pgconn.transaction_status == TransactionStatus.INERROR:
                    yield from self._exec_command(b"ROLLBACK")
                raise
            return None
        server = self.pgconn
        server.enter_pipeline_mode()
        for query, (prep, name) in zip(queries, found, strict=True):
            if prep is Prepare.YES:
                cursor._send_query_prepared(name, query)
            else:
                cursor._execute_send(query, force_extended=True)
            self._prepared.maybe_add_to_cache(query, prep, name)
        before, after = asked[:1], asked[1:]
        for query_text in (*before, b"COMMIT", *after):  # what comes after it sees it
            server.send_query_params(query_text, None)
        server.pipeline_sync()  # one alone, for poolers: see `shardkit.gates`
        yield from generators.send(server)
        answers: list[PGresult] = []
        for _ in range(len(queries) + len(before) + 1):
            answers += yield from generators.fetch_many(server)
        told: list[PGresult] = answers[len(queries) : -1]
        for _ in after:
            told += yield from generators.fetch_many(server)
        yield from generators.fetch_many(server)  # the answer to Sync
        server.exit_pipeline_mode()
        if self.pgconn.transaction_status == TransactionStatus.INERROR:
            yield from self._exec_command(b"ROLLBACK")  # a COMMIT that fails ends the transaction
        for answer in answers:
            if answer.status in _FAILED:
                raise errors.error_from_result(answer, encoding=server._encoding)
        return told
