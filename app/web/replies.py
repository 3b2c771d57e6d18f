"""How pages are answered: with a page, a redirect, or the form again. Called by all pages."""

from __future__ import annotations

from typing import Annotated, Any, Final, cast
from urllib.parse import quote

from fastapi import Depends, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel

from app.deps import MaybeViewer, Notifications
from app.errors import problem_of
from app.partial import FAILED
from app.web.forms import Fields
from app.web.rendering import Pages
from shardkit import deadline

__all__ = ["NO_MORE", "PagesDep", "again", "back_to", "go", "local_path"]

SEE_OTHER = 303
NO_MORE = {"next_cursor": None}

BADGE_PATIENCE: Final = 0.5
"""Seconds that the number in the head may take; a page without it is a page, too."""


async def get_pages(request: Request, viewer: MaybeViewer, notifications: Notifications) -> Pages:
    """Return the templates; their head tells the viewer how much is unread."""
    pages = cast("Pages", request.app.state.pages)
    if viewer is None or request.method != "GET":
        return pages
    try:
        with deadline(BADGE_PATIENCE):
            return pages.telling((await notifications.unread(viewer)).unread)
    except FAILED:
        return pages


PagesDep = Annotated[Pages, Depends(get_pages)]


def local_path(text: str) -> str:
    """Return a path of this site as given, or `/`: a form never leads to another site."""
    is_local = text.startswith("/") and not text.startswith(("//", "/\\"))
    return text if is_local and text.isascii() and text.isprintable() else "/"


def back_to(form: Fields, otherwise: str, fragment: str = "") -> Response:
    """Go where a form says that it was, or to another place."""
    back = local_path(form.text("back"))
    return go((back if back != "/" or otherwise == "/" else otherwise) + fragment)


def go(path: str) -> RedirectResponse:
    """Answer a form: the browser loads another page."""
    return RedirectResponse(quote(path, safe="/?=#&%:@"), SEE_OTHER)


def again(pages: Pages, template: str, title: str, error: Exception, **context: Any) -> Response:
    """Show a refused form again with what was typed and why it was refused."""
    problem = problem_of(error)
    errors = [_sentence(field) for field in problem.errors or ()] or [problem.detail]
    return pages.whole(template, title=title, status=problem.status, errors=errors, **context)


def _sentence(field: BaseModel) -> str:
    values = field.model_dump()
    name = str(values["field"]).replace("_", " ").capitalize()
    return f"{name} {values['message']}." if name else str(values["message"])
