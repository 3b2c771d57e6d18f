"""The pages of one's account: log-ins, password, a copy of one's data, and the end of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from app.accounts.schemas import PasswordChange
from app.accounts.service import Viewer
from app.deps import Leaving, Logins, SignedIn, end_login
from app.errors import AppError
from app.ids import Id
from app.leaving.endpoints import file_response
from app.web.forms import Sent
from app.web.rendering import Pages
from app.web.replies import PagesDep, again, go

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

REFRESH = 3
"""Seconds after which a page asks again."""


@router.get("/settings/account")
async def account(viewer: SignedIn, logins: Logins, leaving: Leaving, pages: PagesDep) -> Response:
    """Show one's log-ins and copies of one's data, and the forms for all else."""
    context = await _context(viewer, logins, leaving)
    response = pages.whole("account.html", title="Your account", errors=(), **context)
    if any(export.state == "working" for export in context["exports"]):
        response.headers["refresh"] = str(REFRESH)
    return response


@router.post("/settings/sessions/{login_id}/end")
async def end_session(login_id: Id, viewer: SignedIn, _form: Sent, logins: Logins) -> Response:
    """End one of one's log-ins."""
    await logins.end(viewer, login_id)
    return go("/settings/account")


@router.post("/settings/password")
async def change_password(
    viewer: SignedIn, form: Sent, logins: Logins, leaving: Leaving, pages: PagesDep
) -> Response:
    """Change one's password."""
    try:
        given = PasswordChange.model_validate(form.texts("current_password", "new_password"))
        await logins.change_password(viewer, given)
    except (AppError, ValidationError) as error:
        return await _again(pages, error, viewer, logins, leaving)
    return go("/settings/account")


@router.post("/settings/export")
async def export(
    viewer: SignedIn, _form: Sent, logins: Logins, leaving: Leaving, pages: PagesDep
) -> Response:
    """Ask for a copy of one's data."""
    try:
        await leaving.export(viewer)
    except AppError as error:
        return await _again(pages, error, viewer, logins, leaving)
    return go("/settings/account")


@router.get("/settings/export/{export_id}")
async def export_file(export_id: Id, viewer: SignedIn, leaving: Leaving) -> Response:
    """Return a copy of one's data."""
    return file_response(await leaving.file(viewer, export_id))


@router.post("/settings/delete")
async def delete(
    *,
    request: Request,
    viewer: SignedIn,
    form: Sent,
    logins: Logins,
    leaving: Leaving,
    pages: PagesDep,
) -> Response:
    """End one's account."""
    try:
        await logins.check_password(viewer, form.text("password"))
        found = await leaving.delete(viewer)
    except AppError as error:
        return await _again(pages, error, viewer, logins, leaving)
    response = go(f"/goodbye/{found.id}")
    end_login(request, response)
    return response


@router.get("/goodbye/{user_id}")
async def goodbye(user_id: Id, leaving: Leaving, pages: PagesDep) -> Response:
    """Say how far the removal of an account is; the page asks again by itself."""
    found = await leaving.deletion(user_id)
    response = pages.whole("goodbye.html", title="Goodbye", deletion=found)
    if found.state == "working":
        response.headers["refresh"] = str(REFRESH)
    return response


async def _context(viewer: Viewer, logins: Logins, leaving: Leaving) -> Mapping[str, Any]:
    return {
        "viewer": viewer,
        "logins": await logins.all(viewer),
        "exports": await leaving.exports(viewer),
    }


async def _again(
    pages: Pages, error: Exception, viewer: Viewer, logins: Logins, leaving: Leaving
) -> Response:
    context = await _context(viewer, logins, leaving)
    return again(pages, "account.html", "Your account", error, **context)
