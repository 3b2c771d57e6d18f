"""What a form of the pages sent, and the key that makes sending it twice the same as once.

Each form that changes something carries a key, made when its page is rendered. It counts for the
form as it was filled in: sent again, by a second click or a reload, it does nothing more and
leads to where it led first; filled in anew on a page one went back to, it is another request.
Called by all pages (`app.web.pages`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import Depends, Request
from starlette.datastructures import FormData, UploadFile

from app.deps import DatabaseDep
from app.errors import InvalidInputError

__all__ = ["Sent", "Upload", "new_key"]

_KEY_BYTES = 16
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)
_MOST_FIELDS = 20


class Fields:
    """The fields of a form.

    Args:
        form: as it was parsed.
    """

    def __init__(self, form: FormData) -> None:
        self._form = form

    def text(self, name: str) -> str:
        """Return what was typed; an empty text where there is no such field."""
        found = self._form.get(name)
        return found if isinstance(found, str) else ""

    def texts(self, *names: str) -> dict[str, str]:
        """Return what was typed, by name."""
        return {name: self.text(name) for name in names}

    async def file(self) -> bytes | None:
        """Return the bytes of the file, or None where none was chosen."""
        found = self._form.get("file")
        return await found.read() if isinstance(found, UploadFile) else None


def new_key() -> str:
    """Return a key for one form of one page."""
    return secrets.token_urlsafe(_KEY_BYTES)


async def read_form(request: Request, database: DatabaseDep) -> AsyncIterator[Fields]:
    """Read a form without files; the client's database takes its key.

    Raises:
        InvalidInputError: it has a key that no page of ours made.
    """
    async with request.form(max_files=0, max_fields=_MOST_FIELDS) as form:
        _take_key(form, database)
        yield Fields(form)


async def read_upload(request: Request, database: DatabaseDep) -> AsyncIterator[Fields]:
    """Read a form with a file; see `read_form`."""
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        _take_key(form, database)
        yield Fields(form)


def _take_key(form: FormData, database: DatabaseDep) -> None:
    """Give the key to the database; a form without one, of a program, counts each time."""
    keys = form.getlist("key")
    if not keys:
        return
    (key, *others) = keys
    if others or not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidInputError("key", "This form is not one of ours; open its page anew.")
    database.take_form_key(key)


Sent = Annotated[Fields, Depends(read_form)]
Upload = Annotated[Fields, Depends(read_upload)]
