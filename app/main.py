"""Puts the service together: `create_app` is the one place where the parts meet."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import app.api
import app.health
import app.legacy.endpoints
import app.photos.endpoints
import app.stories.endpoints
import app.web.pages
from app.addresses import API, MEDIA
from app.clock import Clock, utc_now
from app.errors import AppError, NotSignedInError, is_disk_full, problem_of
from app.examples import complete
from app.limits.middleware import RateLimit
from app.metrics import Metrics
from app.middleware import (
    BodyLimit,
    HeadAsGet,
    OriginCheck,
    RequestScope,
    SecurityHeaders,
)
from app.origins import CrossOrigin
from app.resources import Resources, open_resources, running
from app.settings import Settings
from app.stories.cleanup import keep_clean
from app.timing import ServerTiming
from app.web.rendering import Pages
from shardkit.contrib.asgi import FreshReads
from shardkit.errors import ShardkitError

__all__ = ["create_app"]

MULTIPART_OVERHEAD = 64 * 1024
"""Bytes a form adds to the file in it: boundaries, names and the caption."""

MACHINE_PATHS = ("/api/", f"{MEDIA}/", "/healthz", "/readyz", "/metrics")
"""Addresses asked by programs: their errors are problem documents, all others are pages."""


def create_app(settings: Settings, clock: Clock = utc_now) -> FastAPI:
    """Return the application; it opens databases when started, not before.

    Args:
        settings: what the operator chose.
        clock: the time.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with open_resources(settings, clock) as resources:
            sweeping = keep_clean(resources.cluster, resources.blobs, clock)
            with running(sweeping):
                yield {"resources": resources}

    service = FastAPI(
        title="Lightbox",
        summary="Photos and a feed: the reference service of shardkit.",
        version="1",
        lifespan=lifespan,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    described = service.openapi
    service.openapi = lambda: dict(complete(described()))  # type: ignore[method-assign] # as FastAPI documents
    pages = Pages(clock)
    service.state.pages = pages
    service.state.metrics = Metrics()

    def respond(scope: Scope, error: Exception) -> Response:
        return _respond(pages, scope, error)

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, OSError) and not is_disk_full(error):
            raise error
        return respond(request.scope, error)

    kinds = (AppError, ShardkitError, HTTPException, RequestValidationError, ValidationError)
    for kind in (*kinds, OSError):
        service.add_exception_handler(kind, handle)

    service.include_router(app.api.router)
    service.include_router(app.photos.endpoints.media)
    service.include_router(app.stories.endpoints.media)
    service.include_router(app.health.router)
    service.include_router(app.legacy.endpoints.router)
    for router in app.web.pages.ROUTERS:
        service.include_router(router)
    service.mount("/static", _Assets(directory=Path(app.web.__file__).parent / "static"))

    upload = settings.max_upload_bytes + MULTIPART_OVERHEAD
    service.add_middleware(FreshReads, keys=_token_keys, ttl=settings.fresh_reads)
    service.add_middleware(OriginCheck, respond=respond, origins=settings.origins)
    service.add_middleware(
        BodyLimit,
        default=settings.max_body_bytes,
        paths=dict.fromkeys((f"{API}/photos", f"{API}/stories", "/upload", "/stories/new"), upload),
        timeout=settings.body_timeout,
        respond=respond,
    )
    service.add_middleware(RateLimit, respond=respond)
    service.add_middleware(CrossOrigin, origins=settings.origins)
    service.add_middleware(SecurityHeaders)
    service.add_middleware(ServerTiming)
    service.add_middleware(RequestScope, metrics=service.state.metrics, respond=respond)
    service.add_middleware(HeadAsGet)
    return service


def _token_keys(scope: MutableMapping[str, Any]) -> Sequence[str]:
    resources: Resources = scope["state"]["resources"]
    return resources.cluster.token_keys


class _Assets(StaticFiles):
    """The style sheet and the icon; their addresses carry a version, so browsers keep them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "public, max-age=86400"
        return response


def _respond(pages: Pages, scope: Scope, error: Exception) -> Response:
    """Return the response for an exception: a problem document, or a page for people."""
    if isinstance(error, HTTPException) and isinstance(error.__cause__, AppError):
        error = error.__cause__  # the framework wraps what reading a body raises
    path: str = scope["path"]
    is_page = not path.startswith(MACHINE_PATHS)
    if is_page and isinstance(error, NotSignedInError):
        target = path if scope["method"] == "GET" else "/"
        return RedirectResponse(f"/login?next={urllib.parse.quote(target)}", 303)
    request_id = scope.get("state", {}).get("request_id", "")
    problem = problem_of(error).model_copy(update={"request_id": request_id})
    if is_page:
        return pages.problem(problem)
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )
