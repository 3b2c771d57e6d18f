"""Keeps what was found for some seconds: many people type the same few letters.

A layer over any `SearchIndex`. Kept are ids and counts only; whoever shows them reads the rows, so
who is gone, or blocks the viewer, is not shown whatever is kept here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from app.search.grams import words
from app.search.protocol import Found, SearchIndex, TagFound

__all__ = ["LIFE", "CachedSearch"]

T = TypeVar("T")

LIFE: Final = 10.0
"""Seconds for which an answer is kept."""

SIZE: Final = 5000
"""Answers that are kept, of the questions asked last."""


class CachedSearch:
    """A `SearchIndex` that remembers what another one has found.

    Of those who ask the same at one time, one asks. An answer that is not whole is not kept.

    Args:
        index: the other one.
        life: seconds for which an answer is kept.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        index: SearchIndex,
        *,
        life: float = LIFE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._life = life
        self._clock = clock
        self._kept: OrderedDict[tuple[Any, ...], tuple[float, Found[Any]]] = OrderedDict()
        self._asking: dict[tuple[Any, ...], asyncio.Task[Found[Any]]] = {}

    async def people(self, text: str, n: int) -> Found[int]:
        """Return ids of people; see `SearchIndex.people`."""
        key = ("people", " ".join(words(text)), text.strip().casefold(), n)
        return await self._answer(key, lambda: self._index.people(text, n))

    async def hashtags(self, text: str, n: int) -> Found[TagFound]:
        """Return tags; see `SearchIndex.hashtags`."""
        key = ("hashtags", text.strip().casefold(), n)
        return await self._answer(key, lambda: self._index.hashtags(text, n))

    async def _answer(
        self, key: tuple[Any, ...], ask: Callable[[], Awaitable[Found[T]]]
    ) -> Found[T]:
        kept = self._kept.get(key)
        if kept is not None and self._clock() < kept[0]:
            self._kept.move_to_end(key)
            return kept[1]
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._ask(key, ask))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(task)

    async def _ask(self, key: tuple[Any, ...], ask: Callable[[], Awaitable[Found[T]]]) -> Found[T]:
        found = await ask()
        if not found.is_partial:
            self._kept[key] = (self._clock() + self._life, found)
            self._kept.move_to_end(key)
            while len(self._kept) > SIZE:
                self._kept.popitem(last=False)
        return found
