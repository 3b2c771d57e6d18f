"""What clients see of exports and of the end of accounts."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import BaseModel

from app.ids import IdText

__all__ = ["DeletionOut", "ExportOut"]


class ExportOut(BaseModel):
    """A copy of one's data.

    Attributes:
        n_bytes: length of the file, once the state is `done`.
        file: where the file is, once the state is `done`.
        expires_at: from then on the file is gone.
    """

    id: IdText
    state: Literal["working", "done"]
    n_bytes: int | None = None
    file: str | None = None
    created_at: dt.datetime
    expires_at: dt.datetime


class DeletionOut(BaseModel):
    """How far the removal of an account is."""

    id: IdText
    state: Literal["working", "done"]
