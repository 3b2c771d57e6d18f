"""Turns templates into responses: whole pages, and pages whose head leaves before the data.

A streamed page sends its head, navigation and style sheet link at once, so that the browser
fetches the style while the databases are read. The status is fixed by then; what decides it
(who is asking, whether the thing exists) has to be known before.
"""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from app.accounts.service import Viewer
from app.clock import Clock
from app.errors import Problem, problem_of
from app.tags.parser import Kind, segments
from app.timing import stage
from app.web.forms import new_key

__all__ = ["Load", "Pages", "linked"]

log = logging.getLogger("app")

FOLDER: Final = Path(__file__).parent
N_TINTS = 8
"""Avatar colours in the style sheet."""

Load = Callable[[], Awaitable[Mapping[str, Any]]]
"""Reads the data of a part of a page."""


class Pages:
    """The templates.

    Args:
        clock: the time, for "3 hours ago".
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._unread = 0
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(ago=self._ago, amount=_amount, tint=_tint, linked=linked)
        style = (FOLDER / "static" / "style.css").read_bytes()
        version = hashlib.sha256(style).hexdigest()[:10]
        self._environment.globals["stylesheet"] = f"/static/style.css?v={version}"
        self._environment.globals["new_key"] = new_key

    def telling(self, unread: int) -> Self:
        """Return the templates with a head that tells how many notifications are unread."""
        found = copy.copy(self)
        found._unread = unread  # noqa: SLF001 - of this class
        return found

    def whole(
        self,
        template: str,
        *,
        title: str,
        viewer: Viewer | None = None,
        here: str = "",
        status: int = 200,
        **context: Any,
    ) -> HTMLResponse:
        """Return a page that is complete, such as a form.

        Args:
            template: the part between head and foot.
            title: of the window.
            viewer: who is logged in.
            here: the entry of the navigation that is current.
            status: HTTP status.
            context: what the template needs.
        """
        names = {**self._head(title, viewer, here), **context}
        text = "".join(self._render(part, names) for part in ("top.html", template, "bottom.html"))
        return HTMLResponse(text, status)

    def streamed(
        self,
        request: Request,
        *parts: tuple[str, Load],
        title: str,
        viewer: Viewer | None,
        here: str = "",
        first: tuple[str, Mapping[str, Any]] | None = None,
    ) -> StreamingResponse:
        """Return a page whose head is sent before its parts are read.

        Args:
            request: for the id shown when a part fails.
            parts: templates in order, each with what reads its data.
            title: of the window.
            viewer: who is logged in.
            here: the entry of the navigation that is current.
            first: a part whose data is known already, sent with the head.
        """
        names = self._head(title, viewer, here)

        async def chunks() -> AsyncIterator[str]:
            head = self._render("top.html", names)
            yield head + (self._render(first[0], {**names, **first[1]}) if first else "")
            for template, load in parts:
                try:
                    text = self._render(template, {**names, **await load()})
                except Exception as error:  # noqa: BLE001 - the head is out: say it in the page
                    text = self._broken(request, error)
                yield text
            yield self._render("bottom.html", names)

        return StreamingResponse(
            chunks(), media_type="text/html", headers={"x-accel-buffering": "no"}
        )

    def problem(self, problem: Problem) -> Response:
        """Return the page for a refused request."""
        response = self.whole(
            "problem.html", title=problem.title, status=problem.status, problem=problem
        )
        response.headers.update(problem.headers)
        return response

    def _head(self, title: str, viewer: Viewer | None, here: str) -> dict[str, Any]:
        return {"title": title, "viewer": viewer, "here": here, "unread": self._unread}

    def _broken(self, request: Request, error: Exception) -> str:
        request_id: str = request.state.request_id
        problem = problem_of(error).model_copy(update={"request_id": request_id})
        unexpected = error if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR else None
        log.error(
            "request %s failed after its head was sent: %s",
            request_id,
            error,
            exc_info=unexpected,
        )
        return self._render("broken.html", {"problem": problem})

    def _render(self, template: str, names: Mapping[str, Any]) -> str:
        with stage("render"):
            return self._environment.get_template(template).render(names)

    def _ago(self, time: dt.datetime) -> str:
        seconds = max(0.0, (self._clock() - time).total_seconds())
        for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
            if seconds >= length:
                n = int(seconds // length)
                return f"{n} {unit}" if unit != "d" or n < 14 else f"{time:%d %b %Y}"
        return "just now"


def _amount(n: int) -> str:
    """Write a count the way people read it: 999, 1.2k, 3.4m."""
    for unit, factor in (("m", 1_000_000), ("k", 1000)):
        if n >= factor:
            return f"{n / factor:.1f}".removesuffix(".0") + unit
    return str(n)


def linked(text: str) -> Markup:
    """Write what somebody wrote with its tags and names as links; all else is escaped."""
    places = {Kind.TAG: "/tags/", Kind.MENTION: "/u/"}
    return Markup("").join(
        Markup('<a href="{}{}">{}</a>').format(places[part.kind], quote(part.name), part.text)
        if part.name
        else escape(part.text)
        for part in segments(text)
    )


def _tint(username: str) -> int:
    return zlib.crc32(username.encode()) % N_TINTS
