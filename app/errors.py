"""Everything that can go wrong for a client, and the one place where it becomes an HTTP status.

    AppError
    ├── NotSignedInError
    ├── SignInFailedError
    ├── ForbiddenError
    │   ├── CrossOriginError
    │   └── WrongPasswordError
    ├── NotFoundError
    ├── InvalidInputError
    ├── ConflictError
    │   ├── UsernameTakenError
    │   ├── FollowLimitError
    │   └── AnswerLostError
    ├── UploadError
    │   ├── EmptyUploadError
    │   ├── UnsupportedImageError
    │   ├── DamagedImageError
    │   ├── TooManyPixelsError
    │   ├── BodyTooLargeError
    │   ├── UploadInterruptedError
    │   └── StorageFullError
    ├── StorageUnavailableError
    ├── DamagedPictureError
    ├── SlowBodyError
    ├── TooManyRequestsError
    └── BusyError

Services raise these and shardkit raises its own; neither knows about HTTP. `problem_of` turns
any exception into a `Problem` (RFC 9457), `main.create_app` installs the handlers. A problem
never carries a stack, SQL or the name of a host: those go to the log under the request id.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException

from shardkit.errors import (
    GatherError,
    InvalidIdError,
    InvalidShardKeyError,
    OperationMismatchError,
    OutcomeUnknownError,
    UnavailableError,
)

__all__ = [
    "AnswerLostError",
    "AppError",
    "BodyTooLargeError",
    "BusyError",
    "ConflictError",
    "CrossOriginError",
    "DamagedImageError",
    "DamagedPictureError",
    "EmptyUploadError",
    "FieldProblem",
    "FollowLimitError",
    "ForbiddenError",
    "InvalidInputError",
    "NotFoundError",
    "NotSignedInError",
    "Problem",
    "SignInFailedError",
    "SlowBodyError",
    "StorageFullError",
    "StorageUnavailableError",
    "TooManyPixelsError",
    "TooManyRequestsError",
    "UnsupportedImageError",
    "UploadError",
    "UploadInterruptedError",
    "UsernameTakenError",
    "WrongPasswordError",
    "is_disk_full",
    "problem_of",
]


class AppError(Exception):
    """The request cannot be carried out."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or (self.__doc__ or type(self).__name__).strip().splitlines()[0]
        super().__init__(self.message)


class NotSignedInError(AppError):
    """Log in first."""


class SignInFailedError(AppError):
    """The username or the password is wrong."""


class ForbiddenError(AppError):
    """This belongs to somebody else."""


class CrossOriginError(ForbiddenError):
    """The request came from another site's page and was refused."""


class WrongPasswordError(ForbiddenError):
    """This is not your password."""


class NotFoundError(AppError):
    """There is nothing here."""


class InvalidInputError(AppError):
    """A value cannot be used.

    Attributes:
        field: name of the value as the client sent it.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class ConflictError(AppError):
    """The request contradicts what is there."""


class UsernameTakenError(ConflictError):
    """This username is taken."""


class FollowLimitError(ConflictError):
    """You follow as many people as is allowed."""


class AnswerLostError(ConflictError):
    """This was done before, and its answer cannot be read any more; look at what is there."""


class UploadError(AppError):
    """The upload was refused; nothing was stored."""


class EmptyUploadError(UploadError):
    """The file is empty."""


class UnsupportedImageError(UploadError):
    """The file is not a JPEG, PNG or WebP image."""


class DamagedImageError(UploadError):
    """The image is damaged or cut off."""


class TooManyPixelsError(UploadError):
    """The image has too many pixels."""


class BodyTooLargeError(UploadError):
    """The request is larger than allowed."""


class UploadInterruptedError(UploadError):
    """The server was stopped while it worked on this; upload it again."""


class StorageFullError(UploadError):
    """There is no room for pictures at the moment; nothing was stored."""


class StorageUnavailableError(AppError):
    """Pictures cannot be reached at the moment; try again."""


class DamagedPictureError(AppError):
    """This picture is damaged on our disk; it has been logged."""


class SlowBodyError(AppError):
    """The request did not arrive in time."""


class TooManyRequestsError(AppError):
    """Too many requests from here; wait a little.

    Attributes:
        told: the headers that say when there may be more.
    """

    def __init__(self, told: Mapping[str, str] | None = None) -> None:
        self.told = told or {}
        super().__init__()


class BusyError(AppError):
    """Too much is going on; try again in a moment."""


class FieldProblem(BaseModel):
    """One value of the request that was refused."""

    field: str
    message: str


class Problem(BaseModel):
    """A problem document of RFC 9457; the body of every error under `/api/v1`.

    Attributes:
        type: names the kind of problem for programs; never changes for one kind.
        title: the kind of problem for people.
        status: the HTTP status.
        detail: what happened this time and what to do.
        request_id: under which the log knows more.
        errors: the values refused, when it was about values.
        retry_after: seconds to wait, also sent as a header; never in the body.
        allow: methods the address does know, sent as a header; never in the body.
        told: further headers; never in the body.
    """

    type: str
    title: str
    status: int
    detail: str
    request_id: str = ""
    errors: Sequence[FieldProblem] | None = None
    retry_after: int | None = Field(default=None, exclude=True)
    allow: str | None = Field(default=None, exclude=True)
    told: Mapping[str, str] = Field(default_factory=dict, exclude=True)

    @property
    def headers(self) -> dict[str, str]:
        """The response headers that belong to the problem."""
        found = {"retry-after": self.retry_after, "allow": self.allow}
        return {**{n: str(value) for n, value in found.items() if value is not None}, **self.told}


STATUS: dict[type[Exception], tuple[int, str, str]] = {
    NotSignedInError: (401, "not-signed-in", "Not signed in"),
    SignInFailedError: (401, "sign-in-failed", "Sign-in failed"),
    CrossOriginError: (403, "cross-origin", "Cross-origin request"),
    WrongPasswordError: (403, "wrong-password", "Wrong password"),
    ForbiddenError: (403, "forbidden", "Forbidden"),
    NotFoundError: (404, "not-found", "Not found"),
    InvalidInputError: (422, "invalid-input", "Invalid input"),
    UsernameTakenError: (409, "username-taken", "Username taken"),
    FollowLimitError: (409, "follow-limit", "Follow limit reached"),
    AnswerLostError: (409, "answer-lost", "Answer lost"),
    ConflictError: (409, "conflict", "Conflict"),
    EmptyUploadError: (422, "empty-upload", "Empty upload"),
    UnsupportedImageError: (415, "unsupported-image", "Unsupported image"),
    DamagedImageError: (422, "damaged-image", "Damaged image"),
    TooManyPixelsError: (422, "too-many-pixels", "Too many pixels"),
    BodyTooLargeError: (413, "body-too-large", "Request too large"),
    UploadInterruptedError: (503, "upload-interrupted", "Upload interrupted"),
    StorageFullError: (507, "storage-full", "Storage full"),
    StorageUnavailableError: (503, "storage-unavailable", "Storage unavailable"),
    DamagedPictureError: (500, "damaged-picture", "Damaged picture"),
    UploadError: (422, "upload-refused", "Upload refused"),
    SlowBodyError: (408, "slow-body", "Request too slow"),
    TooManyRequestsError: (429, "too-many-requests", "Too many requests"),
    BusyError: (503, "busy", "Busy"),
    InvalidIdError: (404, "not-found", "Not found"),
    InvalidShardKeyError: (404, "not-found", "Not found"),
    OperationMismatchError: (422, "idempotency-key-reused", "Idempotency key reused"),
    OutcomeUnknownError: (504, "outcome-unknown", "Outcome unknown"),
    UnavailableError: (503, "unavailable", "Temporarily unavailable"),
    GatherError: (503, "unavailable", "Temporarily unavailable"),
}
"""Status, kind and title by exception class; the nearest class of the exception's own decides."""

RETRY_AFTER = 2
"""Seconds a client is asked to wait after a 503; a primary's restart takes about as long."""


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that there is no room on a disk."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def problem_of(error: Exception) -> Problem:
    """Return what a client may know about an exception; unknown ones become a bare 500."""
    match error:
        case RequestValidationError():
            return _invalid(error.errors())
        case ValidationError():
            return _invalid(error.errors(include_url=False, include_input=False))
        case HTTPException():
            return _of_framework(error)
        case OSError() if is_disk_full(error):
            return problem_of(StorageFullError())
    for kind in type(error).__mro__:
        if kind in STATUS:
            status, slug, title = STATUS[kind]
            problem = _problem(status, slug, title, _detail(error, title), _fields(error))
            if isinstance(error, TooManyRequestsError):
                problem = problem.model_copy(update={"told": error.told})
            return problem
    return _problem(
        500, "internal-error", "Internal error", "Something went wrong here; it has been logged."
    )


def _problem(
    status: int, slug: str, title: str, detail: str, errors: Sequence[FieldProblem] | None = None
) -> Problem:
    return Problem(
        type=f"urn:shardkit-app:problem:{slug}",
        title=title,
        status=status,
        detail=detail,
        errors=errors,
        retry_after=RETRY_AFTER if status == HTTPStatus.SERVICE_UNAVAILABLE else None,
    )


def _detail(error: Exception, title: str) -> str:
    if isinstance(error, AppError):
        return error.message
    if isinstance(error, InvalidIdError | InvalidShardKeyError):
        return "There is nothing here."
    if isinstance(error, OperationMismatchError):
        return "This Idempotency-Key came with another request before; use each for one request."
    if isinstance(error, OutcomeUnknownError):
        return "It may or may not have been saved; look before you try again."
    return f"{title}: a server does not answer; try again in a moment."


def _fields(error: Exception) -> Sequence[FieldProblem] | None:
    if isinstance(error, InvalidInputError):
        return [FieldProblem(field=error.field, message=error.message)]
    return None


def _of_framework(error: HTTPException) -> Problem:
    status = HTTPStatus(error.status_code)
    slug = status.phrase.lower().replace(" ", "-")
    problem = _problem(status, slug, status.phrase, status.description or status.phrase)
    allow = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
    return problem.model_copy(update={"allow": allow})


def _invalid(found: Sequence[Any]) -> Problem:
    """Describe refused values; an id in the path that is none names nothing: 404."""
    if any(problem["loc"][:1] == ("path",) for problem in found):
        return problem_of(NotFoundError())
    if any(problem["type"] == "json_invalid" for problem in found):
        return _problem(400, "malformed-json", "Malformed JSON", "The body is not valid JSON.")
    fields = [
        FieldProblem(
            field=".".join(str(part) for part in problem["loc"] if part not in _SOURCES) or "body",
            message=str(problem["msg"]).removeprefix("Value error, "),
        )
        for problem in found
    ]
    detail = "; ".join(f"{field.field}: {field.message}" for field in fields[:5])
    return _problem(422, "invalid-input", "Invalid input", detail, fields)


_SOURCES = ("body", "query", "header", "cookie")
