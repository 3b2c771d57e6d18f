"""Password hashing with argon2id, off the event loop and only a few at a time.

Called by the account service. A log-in with an unknown name hashes as well, so that the answer
takes as long as one with a wrong password. Never sees where hashes are stored.
"""

from __future__ import annotations

from anyio import CapacityLimiter, to_thread
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.profiles import CHEAPEST

__all__ = ["Passwords"]

MEMORY_KIB, PASSES, LANES = 47_104, 1, 1
"""Source: OWASP Password Storage Cheat Sheet, argon2id with 46 MiB, one pass, one lane."""


class Passwords:
    """Hashes and checks passwords.

    Args:
        workers: hashes computed at the same time; each holds 46 MiB.
        cheap: use the cheapest parameters argon2 has; for tests of other things only.
    """

    def __init__(self, workers: int = 2, *, cheap: bool = False) -> None:
        self._hasher = (
            PasswordHasher.from_parameters(CHEAPEST)
            if cheap
            else PasswordHasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES)
        )
        self._workers = workers
        self._limiter: CapacityLimiter | None = None
        self._dummy = self._hasher.hash("nobody has this password")

    async def hash(self, password: str) -> str:
        """Return the encoded hash of a password, with its salt and parameters."""
        return await to_thread.run_sync(self._hasher.hash, password, limiter=self._limit())

    async def verify(self, encoded: str | None, password: str) -> bool:
        """Tell whether a password belongs to a hash; takes as long when there is no hash.

        Args:
            encoded: the stored hash, or None for an unknown user.
            password: what was typed.
        """
        matches = await to_thread.run_sync(
            self._matches, encoded or self._dummy, password, limiter=self._limit()
        )
        return matches and encoded is not None

    def _limit(self) -> CapacityLimiter:
        if self._limiter is None:
            self._limiter = CapacityLimiter(self._workers)
        return self._limiter

    def _matches(self, encoded: str, password: str) -> bool:
        try:
            return self._hasher.verify(encoded, password)
        except (VerificationError, InvalidHashError, UnicodeEncodeError):
            return False
