"""`shardkit migrate apply` as the command: models that are cached get versions and triggers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardkit.topology import schema_name
from tests.fixtures.site import ALPHA, BETA, Site

pytestmark = pytest.mark.integration

MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped
from shardkit import CachedCount, CachedList, Sharded

class Base(DeclarativeBase):
    pass

class Song(Sharded, Base):
    __tablename__ = "songs"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 60.0
    owner_id: Mapped[int]
    title: Mapped[str]

newest = CachedList(Song.owner_id, order_by=Song.id.desc(), limit=5)
n_songs = CachedCount(Song.owner_id)
"""
SONGS = """op.create_table("songs", sa.Column("id", sa.BigInteger, primary_key=True,
        autoincrement=False), sa.Column("version", sa.BigInteger, nullable=False,
        server_default="0"), sa.Column("owner_id", sa.BigInteger, nullable=False),
        sa.Column("title", sa.String, nullable=False))"""
VERSIONS = {"version", "inserted", "updated", "deleted"}

# Every trigger of a schema with its function, and what tells whether it was made anew.
_MADE = """
SELECT g.tgname, p.proname, g.oid, p.oid, p.xmin::text FROM pg_trigger AS g
JOIN pg_class AS c ON c.oid = g.tgrelid JOIN pg_proc AS p ON p.oid = g.tgfoid
WHERE c.relnamespace = %s::regnamespace AND NOT g.tgisinternal ORDER BY 1
"""


@pytest.fixture
def songs(site: Site) -> Site:
    """A site whose configuration names models; their module is found beside the tests' own."""
    module = f"songs_{site.folder.parent.name.replace('-', '_')}"
    site.folder.parent.joinpath(f"{module}.py").write_text(MODELS)
    text = site.config.read_text()
    assert "[migrations]" not in text
    site.config.write_text(f'{text}\n[migrations]\nmodels = "{module}:Base"\n')
    site.write("r1", SONGS)
    return site


def run(site: Site, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int | str, Any]:
    monkeypatch.syspath_prepend(site.folder.parent)
    code, output, error = site.run(*arguments, "--json")
    assert output, error
    return code, json.loads(output)


def made(site: Site) -> dict[int, list[Any]]:
    found = {}
    for physical, numbers in (("alpha", ALPHA), ("beta", BETA)):
        with site.admin(physical) as connection:
            for n in numbers:
                schema = schema_name(n)
                sequence = connection.execute(
                    "SELECT to_regclass(%s)::oid", (f"{schema}.version_seq",)
                ).fetchone()
                found[n] = [sequence, *connection.execute(_MADE, (schema,)).fetchall()]
    return found


def test_cached_models_get_versions_and_triggers_once(
    songs: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = run(songs, monkeypatch, "apply")
    assert code == 0
    first = made(songs)
    assert set(first) == {*ALPHA, *BETA}
    for sequence, *triggers in first.values():
        assert sequence[0] is not None
        names = {name for name, *_ in triggers}
        assert {f"shardkit_{each}" for each in VERSIONS} <= names
        derived = {name for name in names if name.startswith("shardkit_derived_")}
        assert len(derived) == 2 * 3, "of the list and of the count"
        assert len(names) == len(VERSIONS) + len(derived)
    with songs.app("beta") as connection:
        connection.execute("INSERT INTO shard_0006.songs (id, owner_id, title) VALUES (1, 2, 'x')")
        found = connection.execute("SELECT version FROM shard_0006.songs").fetchone()
        assert found is not None
        assert found[0] > 0
        said = connection.execute(
            "SELECT payload ->> 'table' FROM shard_0006.shardkit_outbox ORDER BY 1"
        ).fetchall()
        assert [name.partition("|")[0] for (name,) in said] == ["songs"] * 3
        assert len({name for (name,) in said}) == 3, "the row, the list and the count"

    code, _ = run(songs, monkeypatch, "apply")
    assert code == 0
    assert made(songs) == first, "nothing is made anew"

    code, drift = run(songs, monkeypatch, "drift")
    assert code == 0, json.dumps(drift["differences"], indent=1)
    assert drift["differences"] == []


def test_a_trigger_that_is_gone_is_made_again(songs: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(songs, monkeypatch, "apply")[0] == 0
    with songs.admin("alpha") as connection:
        connection.execute("DROP TRIGGER shardkit_deleted ON shard_0002.songs")
    names = {name for name, *_ in made(songs)[2][1:]}
    assert "shardkit_deleted" not in names
    assert run(songs, monkeypatch, "apply")[0] == 0
    assert {name for name, *_ in made(songs)[2][1:]} == {*names, "shardkit_deleted"}
