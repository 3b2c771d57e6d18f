"""The shape of an embedded cluster."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardkit.config import parse_ranges
from shardkit.errors import ConfigurationError
from shardkit.local.options import PHYSICAL_NAMES, LocalOptions


@pytest.mark.parametrize("physical", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("logical_shards", [16, 17, 64, 1024, 8192])
def test_every_logical_shard_is_placed_once_and_evenly(physical: int, logical_shards: int) -> None:
    placement = LocalOptions(physical=physical, logical_shards=logical_shards).placement()
    parts = [list(parse_ranges(text)) for text in placement.values()]
    assert [number for part in parts for number in part] == list(range(logical_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert tuple(placement) == PHYSICAL_NAMES[:physical]


@pytest.mark.parametrize(
    "wrong",
    [
        {"physical": 0},
        {"physical": 17},
        {"replicas": -1},
        {"replicas": 9},
        {"logical_shards": 1},
        {"logical_shards": 8193},
        {"shared_buffers_mb": 0},
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        LocalOptions(**wrong)


def test_options_survive_the_state_file() -> None:
    options = LocalOptions(physical=3, fsync=False, settings={"log_statement": "all"})
    stored = json.loads(json.dumps(options.as_json())) | {"unknown": 1}
    assert LocalOptions.from_json(stored) == options


def test_only_replicas_and_services_may_change() -> None:
    made = LocalOptions()
    assert made.changes_refused(LocalOptions(replicas=3, redis=False, fsync=False)) == []
    assert len(made.changes_refused(LocalOptions(physical=3, logical_shards=8, replicas=1))) == 3
