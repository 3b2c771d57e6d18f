"""The declarative base of every table of the service."""

from __future__ import annotations

import datetime as dt
from typing import Any, ClassVar

from sqlalchemy import BigInteger, DateTime
from sqlalchemy.orm import DeclarativeBase

__all__ = ["Base"]


class Base(DeclarativeBase):
    """Ids are `bigint`, times carry their zone; tables have no schema, shardkit gives one."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger(),
        dt.datetime: DateTime(timezone=True),
    }
