"""Uploads: from the file a client sent to a photo with its picture stored, or the reason why not.

The bytes are stored before the row and removed after it: a crash leaves at worst bytes nobody
points to, which the sweeper removes, never a photo without its picture. What takes longer than the
client waits for goes on under a status that the client can ask for; it becomes a photo, or says
why it did not, also when the process that worked on it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import logging
import secrets
from typing import Any, Final

from app import happenings
from app.accounts.models import User
from app.accounts.service import Viewer
from app.clock import Clock
from app.database import Database, Request
from app.errors import (
    NotFoundError,
    StorageFullError,
    StorageUnavailableError,
    UploadInterruptedError,
    is_disk_full,
    problem_of,
)
from app.photos.images import ImageWorkers, PreparedImage
from app.photos.models import Photo, Upload
from app.photos.running import RunningUploads, Ticket
from app.photos.schemas import PhotoOut, UploadOut, UploadProblem
from app.photos.service import images_of, photo_out
from app.photos.store import NAME_DIGITS, BlobStore
from app.tags.parser import mentions, tags
from app.tags.repository import add_tags
from shardkit import AsyncWriteSession
from shardkit.errors import OutcomeUnknownError, ShardkitError

__all__ = ["UploadService"]

log = logging.getLogger("app")

REASON_LENGTH: Final = 500


class UploadService:
    """What becomes of uploads.

    Args:
        database: the client's sessions.
        blobs: where the bytes go.
        workers: the decoding processes.
        running: where uploads go on after their answer.
        clock: the time.
        lifetime: seconds after which an upload has failed.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        workers: ImageWorkers,
        running: RunningUploads,
        *,
        clock: Clock,
        lifetime: float,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._workers = workers
        self._running = running
        self._clock = clock
        self._lifetime = dt.timedelta(seconds=lifetime)

    async def upload(
        self, viewer: Viewer, data: bytes, caption: str, *, patience: float
    ) -> PhotoOut | UploadOut:
        """Store a photo and return it, or its status when that takes longer than the patience.

        Args:
            viewer: whose photo it is.
            data: the file.
            caption: what the owner says about it.
            patience: seconds to wait; 0 for a client that would rather ask later.

        Raises:
            UploadError: the file is refused; nothing was stored.
            BusyError: too many uploads wait already.
            StorageFullError: there is no room; nothing was stored.
            StorageUnavailableError: the store does not answer; nothing was stored.
        """
        ticket = Ticket()
        task = self._running.start(self._work(viewer, data, caption, ticket))
        await asyncio.wait({task}, timeout=patience)
        if not task.done():
            async with ticket.lock:
                if not ticket.is_over:
                    upload = await self._accept(viewer)
                    ticket.upload_id = int(upload.id)
                    return upload
        return await asyncio.shield(task)

    async def status(self, viewer: Viewer, upload_id: int) -> UploadOut:
        """Return what has become of one's own upload.

        Raises:
            NotFoundError: there is no such upload of this person.
        """
        async with self._database.reader() as session:
            upload = await session.get(Upload, upload_id)
        if upload is None or upload.owner_id != viewer.id:
            raise NotFoundError("There is no such upload.")
        if upload.photo_id is not None:
            return _status(upload, "done")
        if upload.problem_type:
            problem = UploadProblem(type=upload.problem_type, detail=upload.problem_detail)
            return _status(upload, "failed", problem)
        if self._clock() >= upload.expires_at:
            reason = problem_of(UploadInterruptedError())
            problem = UploadProblem(type=reason.type, detail=reason.detail)
            return _status(upload, "failed", problem)
        return _status(upload, "working")

    async def _work(self, viewer: Viewer, data: bytes, caption: str, ticket: Ticket) -> PhotoOut:
        """Make a photo of a file, whether somebody waits for it or not."""
        try:
            prepared = await self._workers.prepare(data)
            try:
                key = await self._blobs.put(secrets.token_hex(NAME_DIGITS // 2), prepared.variants)
            except OSError as error:
                raise (
                    StorageFullError() if is_disk_full(error) else StorageUnavailableError()
                ) from error
            async with ticket.lock:
                digest = hashlib.sha256(data).hexdigest()
                request = Request(viewer.id, ("upload", digest, caption))
                photo = await self._commit(
                    viewer, request, caption=caption, key=key, prepared=prepared, ticket=ticket
                )
                ticket.is_over = True
                return photo
        except Exception as error:
            async with ticket.lock:
                ticket.is_over = True
                if ticket.upload_id is not None:
                    await self._settle(ticket.upload_id, error=error)
            raise

    async def _commit(
        self,
        viewer: Viewer,
        request: Request,
        *,
        caption: str,
        key: str,
        prepared: PreparedImage,
        ticket: Ticket,
    ) -> PhotoOut:
        """Write the row that shows a stored picture; the bytes go again if that fails."""

        async def work(session: AsyncWriteSession) -> dict[str, Any]:
            owner = await session.get(User, viewer.id, with_for_update=True)
            if owner is None:
                raise NotFoundError("There is no such person.")
            photo = Photo(
                owner_id=viewer.id,
                caption=caption,
                width=prepared.width,
                height=prepared.height,
                blob_key=key,
                has_webp=any(variant.endswith(".webp") for variant in prepared.variants),
                like_count=0,
                comment_count=0,
                created_at=self._clock(),
            )
            session.add(photo)
            owner.photo_count += 1
            await session.flush()
            await add_tags(session, photo.id, photo.id, tags(caption))
            if names := mentions(caption):
                happenings.photo_mentions(session, photo.id, viewer.id, names)
            if ticket.upload_id is not None:
                upload = await session.get_one(Upload, ticket.upload_id, with_for_update=True)
                if self._clock() >= upload.expires_at:
                    raise UploadInterruptedError
                upload.photo_id = photo.id
            return photo_out(photo, owner, 0, liked=False).model_dump(mode="json")

        try:
            answer = await self._database.run(request, work, near=viewer.id)
        except Exception as error:
            if not isinstance(error, OutcomeUnknownError):  # nothing was committed
                await self._remove(key)
            raise
        photo = PhotoOut.model_validate(answer)
        if photo.images != images_of(key):  # a repetition: the first one's are kept
            await self._remove(key)
            if ticket.upload_id is not None:
                await self._settle(ticket.upload_id, photo_id=int(photo.id))
        return photo

    async def _accept(self, viewer: Viewer) -> UploadOut:
        """Make the status of an upload."""
        now = self._clock()
        async with self._database.writer() as session:
            upload = Upload(owner_id=viewer.id, created_at=now, expires_at=now + self._lifetime)
            session.add(upload)
            await session.commit()
            return _status(upload, "working")

    async def _settle(
        self, upload_id: int, *, photo_id: int | None = None, error: Exception | None = None
    ) -> None:
        """Say what has become of an upload; if that fails too, it will show as interrupted."""
        with contextlib.suppress(ShardkitError):
            async with self._database.writer() as session:
                upload = await session.get_one(Upload, upload_id, with_for_update=True)
                if error is not None and upload.photo_id is None:
                    problem = problem_of(error)
                    upload.problem_type = problem.type
                    upload.problem_detail = problem.detail[:REASON_LENGTH]
                elif error is None:
                    upload.photo_id = photo_id
                await session.commit()

    async def _remove(self, key: str) -> None:
        """Remove bytes that no photo shows; the sweeper does if this fails."""
        try:
            await self._blobs.delete(key)
        except OSError:
            log.warning("the bytes of %s are left to the sweeper", key, exc_info=True)


def _status(upload: Upload, state: str, problem: UploadProblem | None = None) -> UploadOut:
    return UploadOut.model_validate(
        {
            "id": upload.id,
            "state": state,
            "photo_id": upload.photo_id,
            "problem": problem,
            "created_at": upload.created_at,
        }
    )
