"""Pages to come in and to leave: sign up, log in, log out. For browsers only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from app.accounts.schemas import Credentials, SignUp
from app.deps import (
    Accounts,
    MaybeViewer,
    begin_login,
    end_login,
)
from app.errors import AppError
from app.web.forms import Sent
from app.web.replies import PagesDep, again, go, local_path

__all__ = ["router"]

router = APIRouter(include_in_schema=False)


@router.get("/signup")
async def sign_up_form(viewer: MaybeViewer, pages: PagesDep) -> Response:
    """Show the form for a new account."""
    if viewer is not None:
        return go("/")
    values = {"username": "", "display_name": ""}
    return pages.whole("signup.html", title="Sign up", values=values, errors=())


@router.post("/signup")
async def sign_up(request: Request, form: Sent, accounts: Accounts, pages: PagesDep) -> Response:
    """Create an account and log it in."""
    values = form.texts("username", "display_name", "password")
    try:
        login = await accounts.sign_up(SignUp.model_validate(values))
    except (AppError, ValidationError) as error:
        return again(pages, "signup.html", "Sign up", error, values=values)
    response = go("/")
    begin_login(request, response, login)
    return response


@router.get("/login")
async def log_in_form(
    viewer: MaybeViewer,
    pages: PagesDep,
    goto: Annotated[str, Query(alias="next", max_length=200)] = "/",
) -> Response:
    """Show the form to log in."""
    if viewer is not None:
        return go(local_path(goto))
    values = {"username": "", "next": local_path(goto)}
    return pages.whole("login.html", title="Log in", here="login", values=values, errors=())


@router.post("/login")
async def log_in(request: Request, form: Sent, accounts: Accounts, pages: PagesDep) -> Response:
    """Log in."""
    values = form.texts("username", "password", "next")
    given = {"username": values["username"], "password": values["password"]}
    try:
        login = await accounts.log_in(Credentials.model_validate(given))
    except (AppError, ValidationError) as error:
        values["next"] = local_path(values["next"])
        return again(pages, "login.html", "Log in", error, values=values)
    response = go(local_path(values["next"]))
    begin_login(request, response, login)
    return response


@router.post("/logout")
async def log_out(
    request: Request, viewer: MaybeViewer, form: Sent, accounts: Accounts
) -> Response:
    """Log out."""
    if viewer is not None:
        await accounts.log_out(viewer, everywhere=bool(form.text("everywhere")))
    response = go("/")
    end_login(request, response)
    return response
