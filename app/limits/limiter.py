"""Decides whether a request may go on, and what it is when nobody knows how full its bucket is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Final

from app.errors import BusyError, TooManyRequestsError
from app.limits.buckets import Buckets, SilentError
from app.limits.rates import CLOSED, Group, Rate, Taken, client_of, headers_of

__all__ = ["Limiter"]

log = logging.getLogger("app")

_BACK: Final = -1


class Limiter:
    """The limits of one server process.

    Args:
        buckets: where tokens are.
        rates: sizes of buckets by group; a group without one is not limited.
    """

    def __init__(self, buckets: Buckets, rates: Mapping[Group, Rate | None]) -> None:
        self._buckets = buckets
        self._rates = rates

    async def admit(self, group: Group, host: str) -> Mapping[str, str]:
        """Take a token for a request; return the headers that tell its client what is left.

        Args:
            group: which bucket.
            host: address of the client.

        Raises:
            TooManyRequestsError: there is none (retryable, it says when).
            BusyError: Redis does not answer, and the group is closed then (retryable).
        """
        return await self._admit(group, client_of(host))

    async def begin_log_in(self, name: str) -> None:
        """Take one of the failures that a name may have; `succeeded` gives it back.

        Names of nobody have buckets too, so that this tells nobody who there is.

        Raises:
            TooManyRequestsError: it had too many (retryable, it says when).
            BusyError: Redis does not answer (retryable).
        """
        await self._admit("log_in_failures", _digest(name))

    async def succeeded(self, name: str) -> None:
        """Give back what `begin_log_in` took; the bucket fills by itself when that fails."""
        if (rate := self._rates.get("log_in_failures")) is not None:
            try:
                await self._buckets.take(f"log_in_failures:{_digest(name)}", rate, _BACK)
            except SilentError:
                return

    async def close(self) -> None:
        """Let go of connections."""
        await self._buckets.close()

    async def _admit(self, group: Group, who: str) -> Mapping[str, str]:
        rate = self._rates.get(group)
        if rate is None:
            return {}
        try:
            taken: Taken = await self._buckets.take(f"{group}:{who}", rate)
        except SilentError as error:
            if group in CLOSED:
                log.warning("nobody counts %s, so they are refused: %s", group, error)
                raise BusyError("This cannot be checked at the moment; try again.") from error
            return {}
        told = headers_of(group, rate, taken)
        if not taken.is_allowed:
            raise TooManyRequestsError(told)
        return told


def _digest(name: str) -> str:
    """Name a bucket by what was typed, folded; no name is in Redis."""
    folded = name.strip().casefold().removeprefix("@")
    return hashlib.sha256(folded.encode("utf-8", "surrogatepass")).hexdigest()[:32]
