"""Statements about users and log-ins."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import undefer

from app.accounts.models import LoginSession, User
from app.accounts.usernames import canonical
from app.database import Database
from app.errors import NotFoundError
from app.partial import FAILED, PATIENCE, answered, answered_or_none, is_partial
from shardkit import AsyncReadSession, AsyncWriteSession, deadline
from shardkit.errors import UnavailableError

__all__ = ["AccountRepository", "person_of_name"]

MOST_LOGINS = 200
"""Log-ins that are listed."""

_WITH_HASH = undefer(User.password_hash)


class AccountRepository:
    """Users and log-ins as one session sees them.

    Args:
        session: where to read; methods that write need a write session of their own.
    """

    def __init__(self, session: AsyncReadSession) -> None:
        self._session = session

    async def user(self, user_id: int) -> User:
        """Return a user.

        Raises:
            NotFoundError: there is none.
        """
        user = await self._session.get(User, user_id)
        if user is None:
            raise NotFoundError("There is no such person.")
        return user

    async def user_by_name(self, name: str) -> User | None:
        """Return the user of a name however typed, or None; with the hash of the password."""
        try:
            username = canonical(name)
        except ValueError:
            return None
        here = self._session
        try:
            found = select(User).where(User.username == username).options(_WITH_HASH)
            return (await here.scalars(found)).first()
        except UnavailableError:
            if isinstance(here, AsyncWriteSession):
                raise
            return await self._searched(username)

    async def _searched(self, username: str) -> User | None:
        """Look for a name everywhere: its lookup row is on a server that does not answer.

        Raises:
            UnavailableError: it was not found, and may be where nobody answers (retryable).
        """
        # Asked so, the router does not take the lookup, and PostgreSQL takes the index.
        statement = select(User).where(User.username.between(username, username))
        statement = statement.options(_WITH_HASH)
        found = await answered(self._session, statement)
        if not found:
            raise UnavailableError("the name may be on a server that does not answer")
        user: User = found[0]
        return user

    async def users(self, user_ids: Iterable[int]) -> dict[int, User]:
        """Return users by id; ids of nobody, and of who does not answer, are missing."""
        wanted = set(user_ids)
        if not wanted:
            return {}
        if not is_partial(self._session):
            try:
                with deadline(PATIENCE):
                    users = await self._session.get_many(User, wanted)
                return {user.id: user for user in users if user is not None}
            except FAILED:
                pass  # who answers is asked below
        found = await answered_or_none(self._session, select(User).where(User.id.in_(wanted)))
        return {user.id: user for user in found}

    async def newest(self, n: int) -> Sequence[User]:
        """Return the newest users of all shards, newest first."""
        return await answered(self._session, select(User).order_by(User.id.desc()).limit(n))

    async def logins(self, user_id: int) -> Sequence[LoginSession]:
        """Return the log-ins of a person, the last used first."""
        statement = select(LoginSession).where(LoginSession.user_id == user_id)
        statement = statement.order_by(LoginSession.last_seen_at.desc(), LoginSession.id.desc())
        return (await self._session.scalars(statement.limit(MOST_LOGINS))).all()

    async def password_hash(self, user_id: int) -> str:
        """Return the hash of a person's password.

        Raises:
            NotFoundError: there is no such person.
        """
        statement = select(User.password_hash).where(User.id == user_id)
        found = (await self._session.scalars(statement)).first()
        if found is None:
            raise NotFoundError("There is no such person.")
        return found

    async def login(self, login_id: int) -> LoginSession | None:
        """Return a log-in, or None."""
        return await self._session.get(LoginSession, login_id)


async def person_of_name(database: Database, name: str) -> User | None:
    """Return the user of a name as the primary knows it, or any replica when that is silent.

    For what has to be found right after a sign-up somewhere else.
    """
    try:
        async with database.primary() as session:
            return await AccountRepository(session).user_by_name(name)
    except UnavailableError:
        async with database.reader(fresh=False) as session:
            return await AccountRepository(session).user_by_name(name)


async def touch_login(session: AsyncWriteSession, login: LoginSession, now: dt.datetime) -> None:
    """Remember that a log-in was used; commits."""
    statement = (
        update(LoginSession)
        .where(LoginSession.user_id == login.user_id, LoginSession.id == login.id)
        .values(last_seen_at=now)
    )
    await session.execute(statement)
    await session.commit()


async def delete_logins(
    session: AsyncWriteSession,
    user_id: int,
    *,
    only: int | None = None,
    but: int | None = None,
    expired_at: dt.datetime | None = None,
) -> None:
    """Delete log-ins of a user.

    Args:
        session: the transaction.
        user_id: whose.
        only: this one, or None for all.
        but: not this one.
        expired_at: those that ended before this time, or None for all.
    """
    statement = delete(LoginSession).where(LoginSession.user_id == user_id)
    if only is not None:
        statement = statement.where(LoginSession.id == only)
    if but is not None:
        statement = statement.where(LoginSession.id != but)
    if expired_at is not None:
        statement = statement.where(LoginSession.expires_at < expired_at)
    await session.execute(statement)
