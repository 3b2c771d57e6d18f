"""Keeps usernames unique over all shards, without a transaction that spans two of them.

A new user's row and the row of the name live on different shards. The user's transaction stays
open while the name is reserved and committed, then commits: a crash in between leaves a name
that points to nobody, never a user without a name. Such a stale name can be taken over once
`GRACE` has passed. Called by the account service only; library lookups will replace it.
Source: docs/architecture.md, lookup tables, simplified.
"""

from __future__ import annotations

import datetime as dt

from sqlalchemy.exc import IntegrityError

from app.accounts.models import Handle, User
from app.accounts.usernames import canonical
from app.database import Database
from app.errors import UsernameTakenError
from shardkit import AsyncReadSession

__all__ = ["GRACE", "find_user_id", "reserve"]

GRACE = dt.timedelta(seconds=60)
"""Age at which a name without a user counts as stale; a sign-up commits within milliseconds."""


async def reserve(database: Database, username: str, user_id: int, now: dt.datetime) -> None:
    """Make a name point to a user whose own transaction is still open; commits.

    Args:
        database: where to open the transaction of the name.
        username: the canonical name.
        user_id: the user to be.
        now: the current time.

    Raises:
        UsernameTakenError: somebody has the name, or may be about to.
    """
    async with database.writer() as session:
        session.add(Handle(username=username, user_id=user_id, reserved_at=now))
        try:
            await session.commit()
        except IntegrityError:
            await session.rollback()
        else:
            return
    async with database.writer() as session:
        held = await session.get(Handle, username, with_for_update=True)
        if held is None or now - held.reserved_at < GRACE:
            raise UsernameTakenError
        if await _is_held(database, username, held.user_id):
            raise UsernameTakenError
        held.user_id = user_id
        held.reserved_at = now
        await session.commit()


async def find_user_id(session: AsyncReadSession, name: str) -> int | None:
    """Return whose name this is, or None; the user's row has the last word.

    Args:
        session: where to look.
        name: as a person typed it.
    """
    try:
        username = canonical(name)
    except ValueError:
        return None
    handle = await session.get(Handle, username)
    return None if handle is None else handle.user_id


async def _is_held(database: Database, username: str, user_id: int) -> bool:
    async with database.primary() as session:
        user = await session.get(User, user_id)
        return user is not None and user.username == username
