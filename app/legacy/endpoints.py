"""Old addresses of photos lead to where the photos are now: `/p/TbIUn` to `/p/1903344051200000`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from starlette.convertors import Convertor, register_url_convertor

from app.deps import ResourcesDep
from app.errors import NotFoundError
from app.legacy.codes import LONGEST, number_of

__all__ = ["router"]

router = APIRouter(include_in_schema=False)


class _Letters(Convertor[str]):
    """Part of an address that is letters only: ids of today are digits only."""

    regex = f"[A-Za-z]{{1,{LONGEST}}}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("letters", _Letters())


@router.get("/p/{code:letters}")
async def old_photo(code: str, resources: ResourcesDep) -> Response:
    """Lead to a photo by the code that it had.

    Raises:
        NotFoundError: there was no such photo.
    """
    number, photos = number_of(code), resources.legacy_photos
    photo_id = None if number is None or photos is None else await photos.get(number)
    if photo_id is None:
        raise NotFoundError("There is no such photo.")
    return RedirectResponse(
        f"/p/{photo_id}", status_code=301, headers={"cache-control": "public, max-age=86400"}
    )
