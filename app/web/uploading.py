"""A form with a picture and a caption: shown empty, read, and shown again with what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Response
from pydantic import TypeAdapter

from app.accounts.service import Viewer
from app.errors import EmptyUploadError
from app.settings import Settings
from app.web.forms import Fields
from app.web.rendering import Pages
from app.web.replies import again

__all__ = ["UploadPage"]


@dataclass(frozen=True, slots=True)
class UploadPage:
    """A form.

    Attributes:
        template: its part of the page.
        title: of the window.
        here: the entry of the navigation that is current.
        asking: what is said to who has chosen no file.
        caption: what captions may be.
    """

    template: str
    title: str
    here: str
    asking: str
    caption: TypeAdapter[str]

    def empty(self, pages: Pages, viewer: Viewer, settings: Settings) -> Response:
        """Return the form, to be filled in."""
        shown = self._shown(viewer, settings, "")
        return pages.whole(self.template, title=self.title, errors=(), **shown)

    async def read(self, form: Fields) -> tuple[bytes, str]:
        """Return the file and the caption.

        Raises:
            EmptyUploadError: no file was chosen.
            ValidationError: the caption is none.
        """
        data = await form.file()
        if data is None:
            raise EmptyUploadError(self.asking)
        return data, self.caption.validate_python(form.text("caption"))

    def refused(
        self, pages: Pages, viewer: Viewer, settings: Settings, form: Fields, error: Exception
    ) -> Response:
        """Return the form with what was typed and what is wrong."""
        shown = self._shown(viewer, settings, form.text("caption"))
        return again(pages, self.template, self.title, error, **shown)

    def _shown(self, viewer: Viewer, settings: Settings, caption: str) -> dict[str, Any]:
        return {
            "viewer": viewer,
            "here": self.here,
            "values": {"caption": caption},
            "megabytes": settings.max_upload_bytes >> 20,
        }
