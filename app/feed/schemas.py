"""What clients see of a feed."""

from __future__ import annotations

from typing import Literal

from app.photos.schemas import PhotoOut

__all__ = ["FeedItem", "Order", "Reason"]

Reason = Literal["following", "suggested", "sponsored"]
"""Why a photo is shown."""

Order = Literal["ranked", "newest"]
"""How a feed is ordered."""


class FeedItem(PhotoOut):
    """A photo of a feed."""

    reason: Reason
