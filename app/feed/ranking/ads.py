"""Ads: photos that somebody pays for, each beside its owner; and those that may be shown now.

    python -m app.feed.ranking.ads --photo 123 --bid 0.4 --days 7

The inventory is small, so each process reads it whole now and then.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy import Float, select
from sqlalchemy.orm import Mapped, mapped_column

from app.clock import utc_now
from app.models import Base
from app.photos.models import Photo
from app.settings import Settings
from shardkit import Cluster, Sharded

__all__ = ["MOST", "Ad", "add", "running"]

MOST: Final = 200
"""Ads of the inventory that are looked at, the best paid first."""


class Ad(Sharded, Base):
    """A photo that is shown to people who do not follow its owner, and is said to be paid for.

    Attributes:
        owner_id: who pays, and whose photo it is.
        photo_id: what is shown.
        bid: what it is worth to them, in the unit of the ranker's values.
    """

    __tablename__ = "ads"
    __shard_key__ = "owner_id"

    owner_id: Mapped[int]
    photo_id: Mapped[int]
    bid: Mapped[float] = mapped_column(Float(53))
    begins_at: Mapped[dt.datetime]
    ends_at: Mapped[dt.datetime]


def running(now: dt.datetime) -> Any:
    """Return the statement for the ads that run, best paid first."""
    found = select(Ad).where(Ad.begins_at <= now, Ad.ends_at > now)
    return found.order_by(Ad.bid.desc(), Ad.id.desc()).limit(MOST)


def add(
    cluster: Cluster, photo_id: int, *, bid: float, days: float, now: dt.datetime
) -> Sequence[int]:
    """Have a photo shown as an ad from now on; return the id of the ad, if there is the photo."""
    with cluster.writer() as session:
        photo = session.get(Photo, photo_id)
        if photo is None:
            return ()
        ad = Ad(
            owner_id=photo.owner_id,
            photo_id=photo_id,
            bid=bid,
            begins_at=now,
            ends_at=now + dt.timedelta(days=days),
        )
        session.add(ad)
        session.commit()
        return (int(ad.id),)


def main(
    photo: Annotated[int, typer.Option(help="id of the photo")],
    bid: Annotated[float, typer.Option(min=0.0, max=10.0, help="what it is worth")] = 0.5,
    days: Annotated[float, typer.Option(min=0.01, max=365.0, help="how long it runs")] = 7.0,
    config: Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")] = None,
) -> None:
    """Have a photo shown as an ad."""
    settings = Settings.read(os.environ, config=config)
    with Cluster.from_file(settings.config) as cluster:
        found = add(cluster, photo, bid=bid, days=days, now=utc_now())
    if not found:
        typer.echo("error: there is no such photo", err=True)
        raise typer.Exit(1)
    typer.echo(f"ad {found[0]}")


if __name__ == "__main__":
    typer.run(main)
