"""One's own log-ins and password: the list, the end of one, and a new password.

Called by the API and the pages. Log-ins are read and ended on the primary, where every request
checks its own, so one that was ended is refused at once.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import update

from app.accounts.models import User
from app.accounts.passwords import Passwords
from app.accounts.repository import AccountRepository, delete_logins
from app.accounts.schemas import LoginOut, PasswordChange
from app.accounts.service import SessionLimits, Viewer
from app.clock import Clock
from app.database import Database, Request
from app.errors import NotFoundError, WrongPasswordError
from app.limits.limiter import Limiter
from shardkit import AsyncWriteSession
from shardkit.errors import InvalidIdError, InvalidShardKeyError

__all__ = ["LoginService"]


class LoginService:
    """What people do with their log-ins.

    Args:
        database: the client's sessions.
        passwords: the hasher.
        clock: the time.
        limits: when log-ins end.
        limiter: counts wrong passwords.
    """

    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        clock: Clock,
        limits: SessionLimits,
        *,
        limiter: Limiter,
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._clock = clock
        self._limits = limits
        self._limiter = limiter

    async def all(self, viewer: Viewer) -> Sequence[LoginOut]:
        """Return the viewer's log-ins that can still be used, the last used first."""
        async with self._database.primary() as session:
            found = await AccountRepository(session).logins(viewer.id)
        now = self._clock()
        return [
            LoginOut(
                id=login.id,
                client=login.client,
                created_at=login.created_at,
                last_seen_at=login.last_seen_at,
                expires_at=min(login.expires_at, login.last_seen_at + self._limits.idle),
                is_current=login.id == viewer.login_id,
            )
            for login in found
            if _is_alive(login.expires_at, login.last_seen_at + self._limits.idle, now)
        ]

    async def end(self, viewer: Viewer, login_id: int) -> None:
        """End one of the viewer's log-ins; the current one, too.

        Raises:
            NotFoundError: the viewer has no such log-in.
        """

        async def work(session: AsyncWriteSession) -> None:
            try:
                login = await AccountRepository(session).login(login_id)
            except (InvalidIdError, InvalidShardKeyError):
                login = None
            if login is None or login.user_id != viewer.id:
                raise NotFoundError("There is no such log-in.")
            await delete_logins(session, viewer.id, only=login_id)

        request = Request(viewer.id, ("end log-in", login_id))
        await self._database.run(request, work, near=viewer.id)

    async def change_password(self, viewer: Viewer, given: PasswordChange) -> None:
        """Set a new password and end every other log-in, in one transaction.

        Raises:
            WrongPasswordError: the current password is another one.
            TooManyRequestsError: it was wrong too often (retryable).
        """
        await self.check_password(viewer, given.current_password, or_else=given.new_password)
        password_hash = await self._passwords.hash(given.new_password)

        async def work(session: AsyncWriteSession) -> None:
            statement = update(User).where(User.id == viewer.id)
            await session.execute(statement.values(password_hash=password_hash))
            await delete_logins(session, viewer.id, but=viewer.login_id)

        request = Request(viewer.id, ("change password",))
        await self._database.run(request, work, near=viewer.id)

    async def check_password(self, viewer: Viewer, password: str, or_else: str = "") -> None:
        """Check that it is the viewer who asks, and not somebody at their screen.

        Args:
            viewer: who.
            password: what was typed.
            or_else: accepted of a repetition, which finds what the first request has changed.

        Raises:
            WrongPasswordError: it is another one.
            TooManyRequestsError: it was wrong too often (retryable).
            BusyError: nobody can count that at the moment (retryable).
        """
        await self._limiter.begin_log_in(viewer.username)
        async with self._database.primary() as session:
            encoded = await AccountRepository(session).password_hash(viewer.id)
        matches = await self._passwords.verify(encoded, password)
        if not matches and or_else and self._database.has_key:
            matches = await self._passwords.verify(encoded, or_else)
        if not matches:
            raise WrongPasswordError
        await self._limiter.succeeded(viewer.username)


def _is_alive(expires_at: dt.datetime, idle_at: dt.datetime, now: dt.datetime) -> bool:
    return now < min(expires_at, idle_at)
