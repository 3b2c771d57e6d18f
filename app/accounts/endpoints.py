"""Accounts over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, status

from app.accounts.schemas import (
    Credentials,
    LoginOut,
    PasswordChange,
    ProfileOut,
    ProfilePatch,
    SessionOut,
    SignUp,
    ViewerOut,
)
from app.accounts.service import LogIn
from app.addresses import API
from app.deps import Accounts, Keyed, Logins, MaybeViewer, SignedIn, begin_login, end_login
from app.ids import Id

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["accounts"])

Everywhere = Annotated[bool, Query(description="end all log-ins, not only this one")]


@router.post("/users", status_code=status.HTTP_201_CREATED, dependencies=[Keyed])
async def sign_up(
    wanted: SignUp, request: Request, response: Response, accounts: Accounts
) -> SessionOut:
    """Sign up; the new account is logged in at once."""
    return _begin(request, response, await accounts.sign_up(wanted))


@router.post("/sessions", status_code=status.HTTP_201_CREATED, dependencies=[Keyed])
async def log_in(
    given: Credentials, request: Request, response: Response, accounts: Accounts
) -> SessionOut:
    """Log in; browsers keep the cookie, programs send `token` as bearer."""
    return _begin(request, response, await accounts.log_in(given))


@router.delete("/sessions/current", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed])
async def log_out(
    viewer: SignedIn,
    request: Request,
    response: Response,
    accounts: Accounts,
    everywhere: Everywhere = False,  # noqa: FBT002 - FastAPI passes it by name
) -> None:
    """Log out."""
    await accounts.log_out(viewer, everywhere=everywhere)
    end_login(request, response)


@router.get("/sessions")
async def sessions(viewer: SignedIn, logins: Logins) -> Sequence[LoginOut]:
    """Return one's own log-ins, the last used first."""
    return await logins.all(viewer)


@router.delete(
    "/sessions/{session_id}", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed]
)
async def end_session(session_id: Id, viewer: SignedIn, logins: Logins) -> None:
    """End one of one's own log-ins."""
    await logins.end(viewer, session_id)


@router.put("/me/password", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed])
async def change_password(viewer: SignedIn, given: PasswordChange, logins: Logins) -> None:
    """Change one's password; every other log-in ends."""
    await logins.change_password(viewer, given)


@router.get("/me")
async def me(viewer: SignedIn) -> ViewerOut:
    """Return who is logged in."""
    return viewer.out()


@router.patch("/me", dependencies=[Keyed])
async def edit(viewer: SignedIn, patch: ProfilePatch, accounts: Accounts) -> ViewerOut:
    """Change one's own profile."""
    return await accounts.edit(viewer, patch)


@router.get("/users/{username}")
async def profile(username: str, viewer: MaybeViewer, accounts: Accounts) -> ProfileOut:
    """Return a profile."""
    return await accounts.profile(username, viewer)


def _begin(request: Request, response: Response, login: LogIn) -> SessionOut:
    begin_login(request, response, login)
    return SessionOut(user=login.viewer.out(), token=login.token, expires_at=login.expires_at)
