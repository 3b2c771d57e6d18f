"""Whether the process lives and whether it can serve: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import asyncio
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.accounts.models import User
from app.deps import ResourcesDep
from app.metrics import CONTENT_TYPE, Metrics
from app.resources import Resources
from shardkit import AsyncReadSession, deadline, ids

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

PROBE_TIMEOUT = 2.0
"""Seconds a server has to answer; load balancers ask every few seconds."""


class Readiness(BaseModel):
    """What can be reached.

    Attributes:
        status: `ready`, `degraded` (everything can be read, not everything written), or `down`.
        parts: `up` or `down` by name: `shard:<physical shard>`, whether any of its servers can be
            read, `primary:<physical shard>`, whether it takes writes, and `redis`.
    """

    status: str
    parts: dict[str, str]


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that the process answers; asks nobody else."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(resources: ResourcesDep, response: Response) -> Readiness:
    """Say whether every physical shard and Redis answer; 503 when a shard cannot be read."""
    parts = await probe(resources)
    lost = [name for name, state in parts.items() if state != "up"]
    if any(name.startswith("shard:") for name in lost):
        response.status_code = 503
        return Readiness(status="down", parts=parts)
    return Readiness(status="degraded" if lost else "ready", parts=parts)


async def _metrics(request: Request) -> Metrics:
    return cast("Metrics", request.app.state.metrics)


@router.get("/metrics")
async def metrics(found: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Return the counters of this process."""
    return Response(found.text(), media_type=CONTENT_TYPE)


async def probe(resources: Resources) -> dict[str, str]:
    """Ask everybody at the same time; return `up` or `down` by name."""
    cluster = resources.cluster
    topology = cluster.topology
    first = {
        name: min(topology.shard_map.owned_by(name), default=None) for name in topology.physical
    }
    asked = {
        f"{kind}:{name}": _shard_answers(opened(), shard)
        for name, shard in first.items()
        if shard is not None
        for kind, opened in (("shard", cluster.reader), ("primary", cluster.writer))
    }
    if resources.redis_url is not None:
        asked["redis"] = _redis_answers(resources.redis_url)
    answers = await asyncio.gather(*asked.values())
    return {name: "up" if up else "down" for name, up in zip(asked, answers, strict=True)}


async def _shard_answers(opened: AsyncReadSession, logical_shard: int) -> bool:
    """Read a row that never was from one logical shard, through a reader or a writer."""
    try:
        with deadline(PROBE_TIMEOUT):
            async with opened as session:
                await session.get(User, ids.compose(0, logical_shard, 1))
    except Exception:  # noqa: BLE001 - whatever it is, the shard did not answer
        return False
    return True


async def _redis_answers(url: str) -> bool:
    client = Redis.from_url(url, socket_timeout=PROBE_TIMEOUT, socket_connect_timeout=PROBE_TIMEOUT)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()
