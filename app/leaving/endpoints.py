"""Exports and the end of accounts over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response, status
from fastapi.responses import FileResponse

from app.accounts.schemas import PasswordCheck
from app.addresses import API
from app.deps import Keyed, Leaving, Logins, SignedIn, end_login
from app.ids import Id
from app.leaving.schemas import DeletionOut, ExportOut

__all__ = ["POLL", "file_response", "router"]

router = APIRouter(prefix=API, tags=["leaving"])

POLL = 1
"""Seconds after which a client may ask again."""

ACCEPTED = status.HTTP_202_ACCEPTED


@router.post("/me/exports", status_code=ACCEPTED, dependencies=[Keyed])
async def export(viewer: SignedIn, leaving: Leaving, response: Response) -> ExportOut:
    """Ask for a copy of everything there is of one: a ZIP with JSON and pictures."""
    found = await leaving.export(viewer)
    response.headers["location"] = f"{API}/me/exports/{found.id}"
    response.headers["retry-after"] = str(POLL)
    return found


@router.get("/me/exports")
async def exports(viewer: SignedIn, leaving: Leaving) -> Sequence[ExportOut]:
    """Return one's exports, newest first."""
    return await leaving.exports(viewer)


@router.get("/me/exports/{export_id}")
async def export_status(
    export_id: Id, viewer: SignedIn, leaving: Leaving, response: Response
) -> ExportOut:
    """Return what has become of one's export."""
    found = await leaving.status(viewer, export_id)
    if found.state == "working":
        response.headers["retry-after"] = str(POLL)
    return found


@router.get(
    "/me/exports/{export_id}/file",
    response_class=FileResponse,
    responses={200: {"description": "the file", "content": {"application/zip": {}}}},
)
async def export_file(export_id: Id, viewer: SignedIn, leaving: Leaving) -> Response:
    """Return the file of one's export."""
    return file_response(await leaving.file(viewer, export_id))


@router.post("/me/deletion", status_code=ACCEPTED, dependencies=[Keyed])
async def delete(
    *,
    given: PasswordCheck,
    viewer: SignedIn,
    logins: Logins,
    leaving: Leaving,
    request: Request,
    response: Response,
) -> DeletionOut:
    """End one's account and remove everything there is of one; it cannot be taken back."""
    await logins.check_password(viewer, given.password)
    found = await leaving.delete(viewer)
    end_login(request, response)
    response.headers["location"] = f"{API}/deletions/{found.id}"
    response.headers["retry-after"] = str(POLL)
    return found


@router.get("/deletions/{user_id}")
async def deletion(user_id: Id, leaving: Leaving) -> DeletionOut:
    """Return how far the removal of an account is."""
    return await leaving.deletion(user_id)


def file_response(path: object) -> FileResponse:
    """Return the file of an export, to be saved and never shown."""
    return FileResponse(
        str(path),
        media_type="application/zip",
        filename="lightbox.zip",
        headers={"cache-control": "private, no-store"},
    )
