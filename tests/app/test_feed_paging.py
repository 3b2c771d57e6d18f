"""The small form of `make feed-paging`."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.feedpaging import paged

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("postgres_version")
def test_pages_have_no_repeats_and_no_gaps_while_people_post_delete_and_block() -> None:
    for program in ("redis-server", "memcached"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    verdict, changes = paged(6_000)
    assert verdict.items >= 6_000
    assert changes > 0
    found = (verdict.duplicates, verdict.gaps, verdict.blocked, verdict.deleted)
    assert found == (0, 0, 0, 0)
