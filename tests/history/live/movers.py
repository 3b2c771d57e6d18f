"""What moves logical shards in the history test, behind one interface."""

from __future__ import annotations

import uuid

from tests.fixtures.movers import Mover as StandIn
from tests.history.live.stage import Stage
from tests.history.live.tables import Base
from tests.history.live.witness import image

__all__ = ["StandInMover"]


class StandInMover:
    """The mover that copies while the source is fenced; for scenarios that need no more."""

    is_sturdy = False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def move(self, shard: int, source: str, target: str) -> bool:
        """Move a logical shard; compare both sides between decision and activation."""
        stage = self._stage
        mover = StandIn(stage.local, stage.topology, shard, source, target, metadata=Base.metadata)
        name = str(uuid.uuid4())
        tables = [table.name for table in Base.metadata.sorted_tables]
        try:
            mover.prepare()
            mover.fence()
            mover.copy()
            mover.decide()
            for side, connection in (("source", mover.reads), ("target", mover.writes)):
                stage.recorder.fact(
                    "image", move=name, shard=shard, side=side,
                    image=image(connection, shard, tables),
                )  # fmt: skip
            mover.activate()
        finally:
            mover.close()
        return True
