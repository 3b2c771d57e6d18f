"""Poolers that end by themselves are started again, as a service manager would; it is counted."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final, Self

from shardkit.local.server import log_tail
from tests.history.live.stage import Stage

__all__ = ["Keeper"]

_PAUSE: Final = 0.2


class Keeper:
    """A thread that looks after the poolers of a stage; what was killed on purpose is left alone.

    Attributes:
        counts: of what was started again.
    """

    def __init__(self, stage: Stage) -> None:
        self.counts: Counter[str] = Counter()
        self._stage = stage
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stage = self._stage
        while not self._stop.wait(_PAUSE):
            with stage.lock:
                for name in stage.local.revive():
                    self.counts["poolers that ended by themselves"] += 1
                    stage.note(f"{name} had ended by itself:\n{self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        lines = log_tail(self._stage.local.server(name).log, lines=40).splitlines()
        return "\n".join(line for line in lines if " FATAL " in line) or "(nothing)"
