"""Turns an uploaded file into the variants the service stores, or says why it will not.

Called by the photo service. The decoding itself happens in `decoder.py`, in processes of their
own with limits on memory, processor time and pixels; this module starts them, hands them work,
and replaces one that dies or takes too long. Never decodes anything in the server's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import (
    BusyError,
    DamagedImageError,
    EmptyUploadError,
    TooManyPixelsError,
    UnsupportedImageError,
    UploadError,
)
from app.photos import decoder

__all__ = ["FORMATS", "SIZES", "VARIANTS", "ImageLimits", "ImageWorkers", "PreparedImage"]

SIZES = tuple(decoder.SIZES)
"""Longest sides of the stored pictures, in pixels, largest first."""

FORMATS = decoder.FORMATS
VARIANTS = tuple(f"{size}.{ending}" for ending in FORMATS for size in SIZES)
"""Names of everything a picture may be made into, in the order in which volumes keep it."""

_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "VIRTUAL_ENV")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one picture may cost.

    Attributes:
        max_pixels: width times height, read from the header before decoding.
        memory_bytes: address space of a decoding process.
        cpu_seconds: processor time per picture.
        timeout: seconds until the process is killed and the picture refused.
        max_waiting: uploads that may wait for a free process.
    """

    max_pixels: int = 40_000_000
    memory_bytes: int = 768 * 1024 * 1024
    cpu_seconds: int = 5
    timeout: float = 15.0
    max_waiting: int = 32


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded and re-encoded picture.

    Attributes:
        width: pixels of the largest size.
        height: pixels of the largest size.
        variants: bytes by name, such as `1080.jpg`.
    """

    width: int
    height: int
    variants: Mapping[str, bytes]


@dataclass(slots=True)
class _Worker:
    """One decoding process.

    Attributes:
        process: the process.
        n_served: pictures it has decoded.
        is_spent: whether it must not serve another one.
    """

    process: Process
    n_served: int = 0
    is_spent: bool = False


class ImageWorkers:
    """A few decoding processes.

    *Invariant:* at most `n` processes exist, and one serves one picture at a time. A process
    that failed to decode something serves nobody else: its memory may be in pieces.

    Args:
        n: number of processes; each uses one core.
        limits: what one picture may cost.
        formats: what to make of it, some of `decoder.FORMATS`.
    """

    PICTURES_PER_PROCESS = 200
    """After so many a process is replaced, which bounds what fragmentation can cost."""

    def __init__(
        self,
        n: int = 1,
        limits: ImageLimits | None = None,
        formats: Sequence[str] = decoder.FORMATS,
    ) -> None:
        self.formats = tuple(formats)
        self.limits = limits or ImageLimits()
        self._free = asyncio.Semaphore(n)
        self._idle: list[_Worker] = []
        self._waiting = 0

    async def prepare(self, data: bytes) -> PreparedImage:
        """Return the variants of an uploaded picture.

        Raises:
            EmptyUploadError: no bytes.
            UnsupportedImageError: not JPEG, PNG or WebP by its first bytes.
            TooManyPixelsError: the header announces more than `max_pixels`.
            DamagedImageError: it cannot be decoded to its end within the limits.
            BusyError: too many uploads wait already.
        """
        if not data:
            raise EmptyUploadError
        try:
            try:
                return await self._decode(data)
            except TimeoutError:
                raise
            except (OSError, EOFError):
                return await self._decode(data)  # a process may die of something else: once more
        except (TimeoutError, OSError, EOFError) as error:
            raise DamagedImageError(
                "The image could not be decoded within the limits of this service."
            ) from error

    async def close(self) -> None:
        """End the processes; idempotent."""
        while self._idle:
            await _end(self._idle.pop().process)

    async def _decode(self, data: bytes) -> PreparedImage:
        async with self._worker() as worker, asyncio.timeout(self.limits.timeout):
            return await self._ask(worker, data)

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        """Lend a process; it is ended when it is spent or its work was interrupted."""
        if self._waiting >= self.limits.max_waiting:
            raise BusyError
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            worker = self._idle.pop() if self._idle else _Worker(await self._start())
            worker.n_served += 1
            spent, worker.is_spent = worker.n_served >= self.PICTURES_PER_PROCESS, True
            try:
                yield worker
            finally:
                if worker.is_spent or spent:
                    await _end(worker.process)
                else:
                    self._idle.append(worker)
        finally:
            self._free.release()

    async def _start(self) -> Process:
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(Path(decoder.__file__)),
            str(self.limits.memory_bytes),
            str(self.limits.cpu_seconds),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,  # what a picture makes the library print is nobody's log
            env=environment | {"VIPS_CONCURRENCY": "1", "MALLOC_ARENA_MAX": "2"},
        )

    async def _ask(self, worker: _Worker, data: bytes) -> PreparedImage:
        process = worker.process
        if process.stdin is None or process.stdout is None:
            raise OSError("a decoding process has no pipes")
        head = {
            "length": len(data),
            "max_pixels": self.limits.max_pixels,
            "formats": self.formats,
        }
        process.stdin.write(json.dumps(head).encode() + b"\n" + data)
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError("a decoding process ended")
        answer = json.loads(line)
        if "refused" in answer:
            refusal = self._refusal(answer["refused"])
            worker.is_spent = isinstance(refusal, DamagedImageError)
            raise refusal
        variants = {
            variant: await process.stdout.readexactly(length)
            for variant, length in answer["lengths"].items()
        }
        worker.is_spent = False
        return PreparedImage(answer["width"], answer["height"], variants)

    def _refusal(self, reason: str) -> UploadError:
        match reason:
            case "unsupported":
                return UnsupportedImageError()
            case "pixels":
                return TooManyPixelsError(
                    f"The image has more than {self.limits.max_pixels // 1_000_000} megapixels."
                )
            case _:
                return DamagedImageError()


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
