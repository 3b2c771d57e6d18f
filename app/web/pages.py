"""The pages: everything the API does, for a person with a browser and no script.

The same services as the API do the work. Forms are sent with POST and answered with a redirect, to
the same place when one is sent again (`app.web.forms`). A form that is refused is shown again with
the reason (`app.web.replies`). Put together here; called by `app.main`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter

from app.web import account, activity, entrance, feeds, people, photos, stories

__all__ = ["ROUTERS"]

ROUTERS: Final[Sequence[APIRouter]] = tuple(
    each.router for each in (feeds, entrance, people, photos, account, activity, stories)
)
"""All pages."""
