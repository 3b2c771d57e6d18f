"""Where the next page of a feed begins, signed: nobody but us writes one, and nobody lends theirs.

A cursor has everything that the next page needs, so it outlives servers, Redis, moves of shards
(ids do not change) and new ranking: what is left of a ranked window is in it, in the order in
which it was ranked. Source of the signature: RFC 2104 (HMAC), FIPS 180-4 (SHA-256), the first half
of it, 128 bits. No I/O.
"""

from __future__ import annotations

import binascii
import hmac
import secrets
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

from fastapi import Query

from app.errors import InvalidInputError

__all__ = ["LIFE", "LONGEST", "Cursors", "FeedCursor", "Place"]

LIFE: Final = 86_400
"""Seconds that a cursor is taken: nobody reads a page on a day later."""

_HEAD: Final = struct.Struct(">BBBQIQQH")
_FORMAT: Final = 1
_MAC: Final = 16
_PURPOSE: Final = b"app feed cursor 1\0"

MOST_RANKED: Final = 127
ENTRY: Final = 9

LONGEST: Final = 4 * (_HEAD.size + ENTRY * MOST_RANKED + _MAC + 2) // 3 + 4
"""Characters of a cursor, at most."""


FeedCursor = Annotated[
    str | None,
    Query(
        max_length=LONGEST,
        description="`next_cursor` of the page before; leave out for the first page",
    ),
]
"""Where a page of a feed begins, as a query parameter."""


class Place(NamedTuple):
    """Where a page begins.

    Attributes:
        before: photos below this id, newest first, once the ranked ones have been shown.
        is_ranked: the feed is ranked, window by window.
        ranked: of the window: four times the id, plus the `Source`, in the order of ranks.
        rank: how many of them have been shown.
        low: the window reaches down to this id; it is shown to its end, without the ranked ones.
    """

    before: int
    is_ranked: bool = False
    ranked: tuple[int, ...] = ()
    rank: int = 0
    low: int = 0


class Cursors:
    """Writes and reads cursors.

    Args:
        keys: secrets, the newest first, the same in every process; without any one is made that
            this process alone knows.
    """

    def __init__(self, keys: Sequence[str | bytes] = ()) -> None:
        given = [key.encode() if isinstance(key, str) else key for key in keys]
        self._keys = given or [secrets.token_bytes(32)]

    def text(self, place: Place, *, viewer_id: int, now: float) -> str:
        """Return a cursor.

        Args:
            place: where the next page begins.
            viewer_id: whose feed; nobody else's request takes it.
            now: Unix seconds.
        """
        body = _HEAD.pack(
            _FORMAT,
            place.is_ranked,
            len(place.ranked),
            viewer_id,
            int(now) + LIFE,
            place.before,
            place.low,
            place.rank,
        )
        body += b"".join(each.to_bytes(ENTRY, "big") for each in place.ranked)
        return urlsafe_b64encode(body + self._mac(self._keys[0], body)).rstrip(b"=").decode()

    def place(self, text: str, *, viewer_id: int, now: float) -> Place:
        """Return where a page begins.

        Raises:
            InvalidInputError: it is none of ours, of somebody else, or too old.
        """
        try:
            whole = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
        except (binascii.Error, UnicodeEncodeError, ValueError):
            whole = b""
        body, mac = whole[:-_MAC], whole[-_MAC:]
        ours = [hmac.compare_digest(self._mac(key, body), mac) for key in self._keys]
        if not any(ours) or len(body) < _HEAD.size:
            raise InvalidInputError("cursor", "must be the next_cursor of a page of this feed")
        form, is_ranked, n, viewer, expires, before, low, rank = _HEAD.unpack_from(body)
        if (form, viewer) != (_FORMAT, viewer_id):
            raise InvalidInputError("cursor", "must be the next_cursor of a page of this feed")
        if now >= expires:
            raise InvalidInputError("cursor", "is too old; begin with the first page")
        places = range(_HEAD.size, _HEAD.size + ENTRY * n, ENTRY)
        ranked = tuple(int.from_bytes(body[at : at + ENTRY], "big") for at in places)
        return Place(before, bool(is_ranked), ranked, rank, low)

    @staticmethod
    def _mac(key: bytes, body: bytes) -> bytes:
        return hmac.digest(key, _PURPOSE + body, "sha256")[:_MAC]
