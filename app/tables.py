"""Every model of the service in one place, for commands that need to know all of them."""

from __future__ import annotations

import app.accounts.models
import app.feed.ranking.ads
import app.graph.models
import app.notifications.models
import app.photos.models
import app.saves.models
import app.search.models
import app.stories.models
import app.tags.models  # noqa: F401 - every model has to be known
from app.models import Base

__all__ = ["Base"]
