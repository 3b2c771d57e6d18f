"""Asks for an export, and ends an account; the relay does the work (`app.leaving.erasure`).

An account ends in one transaction on its own shard: the row of the person and every log-in are
gone, so nobody can use it and nothing of it is shown from then on, wherever its rows still are.
The same transaction announces what is to be removed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import func, select

from app import happenings
from app.accounts.models import User
from app.accounts.repository import delete_logins
from app.accounts.service import Viewer
from app.addresses import API
from app.clock import Clock
from app.database import Database, Request
from app.errors import ConflictError, NotFoundError
from app.leaving.files import path_of
from app.leaving.models import Erasure, Export
from app.leaving.schemas import DeletionOut, ExportOut
from shardkit import AsyncWriteSession
from shardkit.errors import InvalidIdError, InvalidShardKeyError

__all__ = ["LeavingService"]

LIFE: Final = dt.timedelta(days=7)
"""How long the file of an export is there."""

MOST_EXPORTS: Final = 3
"""Exports that a person may have at one time."""


class LeavingService:
    """What people do to take their data along, or to leave.

    Args:
        database: the client's sessions.
        clock: the time.
        folder: where the files of exports are.
    """

    def __init__(self, database: Database, clock: Clock, folder: Path) -> None:
        self._database = database
        self._clock = clock
        self._folder = folder

    async def export(self, viewer: Viewer) -> ExportOut:
        """Ask for a copy of what there is of the viewer.

        Raises:
            ConflictError: there are enough of them already.
        """

        async def work(session: AsyncWriteSession) -> dict[str, Any]:
            now = self._clock()
            if await session.get(User, viewer.id, with_for_update=True) is None:
                raise NotFoundError("There is no such person.")
            living = select(func.count()).select_from(Export)
            living = living.where(Export.user_id == viewer.id, Export.expires_at > now)
            if (await session.scalars(living)).one() >= MOST_EXPORTS:
                raise ConflictError("You have exports already; take one of those.")
            export = Export(user_id=viewer.id, created_at=now, expires_at=now + LIFE, n_bytes=None)
            session.add(export)
            await session.flush()
            return _out(export).model_dump(mode="json")

        request = Request(viewer.id, ("export",))
        return ExportOut.model_validate(await self._database.run(request, work, near=viewer.id))

    async def exports(self, viewer: Viewer) -> Sequence[ExportOut]:
        """Return the viewer's exports, newest first."""
        statement = select(Export).where(
            Export.user_id == viewer.id, Export.expires_at > self._clock()
        )
        async with self._database.reader() as session:
            found = await session.scalars(statement.order_by(Export.id.desc()).limit(100))
            return [_out(export) for export in found]

    async def status(self, viewer: Viewer, export_id: int) -> ExportOut:
        """Return what has become of one of the viewer's exports.

        Raises:
            NotFoundError: the viewer has none such.
        """
        return _out(await self._own(viewer, export_id))

    async def file(self, viewer: Viewer, export_id: int) -> Path:
        """Return where the file of one of the viewer's exports is.

        Raises:
            NotFoundError: the viewer has none such, or it is not ready.
        """
        export = await self._own(viewer, export_id)
        path = path_of(self._folder, export.id)
        if export.n_bytes is None or not path.is_file():
            raise NotFoundError("There is no such file yet.")
        return path

    async def delete(self, viewer: Viewer) -> DeletionOut:
        """End the viewer's account; their password was checked."""

        async def work(session: AsyncWriteSession) -> None:
            user = await session.get(User, viewer.id, with_for_update=True)
            if user is None:
                raise NotFoundError("There is no such person.")
            await delete_logins(session, viewer.id)
            session.add(Erasure(user_id=viewer.id, created_at=self._clock()))
            await session.delete(user)
            happenings.person_removed(session, viewer.id)

        await self._database.run(Request(viewer.id, ("leave",)), work, near=viewer.id)
        return DeletionOut(id=viewer.id, state="working")

    async def deletion(self, user_id: int) -> DeletionOut:
        """Return how far the removal of an account is; whoever removed it has no log-in any more.

        Raises:
            NotFoundError: this account is not being removed.
        """
        try:
            async with self._database.primary() as session:
                if await session.get(Erasure, user_id) is not None:
                    return DeletionOut(id=user_id, state="working")
                if await session.get(User, user_id) is not None:
                    raise NotFoundError
        except (InvalidIdError, InvalidShardKeyError):
            raise NotFoundError from None
        return DeletionOut(id=user_id, state="done")

    async def _own(self, viewer: Viewer, export_id: int) -> Export:
        async with self._database.reader() as session:
            export = await session.get(Export, export_id)
        if export is None or export.user_id != viewer.id or self._clock() >= export.expires_at:
            raise NotFoundError("There is no such export.")
        return export


def _out(export: Export) -> ExportOut:
    is_done = export.n_bytes is not None
    return ExportOut(
        id=export.id,
        state="done" if is_done else "working",
        n_bytes=export.n_bytes,
        file=f"{API}/me/exports/{export.id}/file" if is_done else None,
        created_at=export.created_at,
        expires_at=export.expires_at,
    )
