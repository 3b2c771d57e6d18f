"""What the README shows runs, on real servers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shardkit
from shardkit.ids import compose
from tests.fixtures.site import Site

pytestmark = pytest.mark.integration

README = Path(shardkit.__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")

PHOTOS = (
    'op.create_table("photos", sa.Column("id", sa.BigInteger, primary_key=True, '
    'autoincrement=False), sa.Column("owner_id", sa.BigInteger, nullable=False), '
    'sa.Column("caption", sa.Text, nullable=False))'
)


def test_the_tour_runs(site: Site) -> None:
    site.write("r2", PHOTOS, "r1")
    assert site.apply().error is None
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    written = 'Cluster.from_file(".shardkit/shardkit.toml")'
    assert written in blocks[0]
    tour = blocks[0].replace(written, "Cluster.from_file(CONFIG)")
    ana = SimpleNamespace(id=compose(1_000_000, 5, 0))
    names: dict[str, Any] = {"CONFIG": site.config, "ana": ana, "__name__": "tour"}
    try:
        exec(compile(tour, "README.md", "exec", dont_inherit=True), names)
        with names["cluster"].reader(after=names["token"]) as session:
            assert [photo.caption for photo in session.scalars(names["mine"])] == ["dawn"]
            assert (
                shardkit.ids.shard_of(
                    session.scalars(names["newest"].options(shardkit.all_shards())).one().id
                )
                == 5
            )
    finally:
        if "cluster" in names:
            names["cluster"].close()
