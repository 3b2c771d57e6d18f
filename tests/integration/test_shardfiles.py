"""One logical shard as files: round trips, and files that are not what they say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import select

from shardkit import Cluster, ids
from shardkit.backup.rows import copy_out, prepare, shapes
from shardkit.backup.shardfile import EXPORT, SCHEMA, ShardFile, read
from shardkit.cli import main
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.ops import lookup
from shardkit.ops.direct import connect
from shardkit.testing import create_tables
from shardkit.topology import Topology
from shardkit.uniques import lookups_of
from tests.fixtures.backups import Home
from tests.models import Account, Base, Country, Like, Photo, Post, Profile, Tenant, User

pytestmark = pytest.mark.integration

SHARD = 2
SCHEMA_NAME = f"shard_{SHARD:04d}"
"""On the physical shard alpha."""

_EMPTY = """
DO $$
DECLARE t record;
BEGIN
    FOR t IN SELECT schemaname, tablename FROM pg_tables
        WHERE schemaname LIKE 'shard\\_%' AND tablename <> 'shardkit_id_state'
        AND pg_relation_size(format('%I.%I', schemaname, tablename)::regclass) > 0 LOOP
        EXECUTE format('TRUNCATE %I.%I CASCADE', t.schemaname, t.tablename);
    END LOOP;
END $$
"""


@pytest.fixture(scope="module")
def pair(home: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configurations of two clusters of the same shape, as databases of the same servers."""
    folder = tmp_path_factory.mktemp("shardfiles")
    one, two = (folder / f"{name}.toml" for name in ("one", "two"))
    _configure(home.local, one)
    _configure(home.local, two)
    return one, two


def _configure(local: LocalCluster, file: Path) -> None:
    for server in ("alpha_0", "beta_0"):
        dsn = local.superuser_dsn(server, "postgres")
        with psycopg.connect(dsn, autocommit=True) as connection:
            database = sql.Identifier(file.stem)
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER shardkit_admin").format(database))
    file.touch(0o600)
    text = local.config_path.read_text().replace('/shardkit"', f'/{file.stem}"')
    file.write_text(text.replace('name = "local"', f'name = "{file.stem}"'))
    _, topology = load(file)
    create_tables(topology, Base.metadata)
    with Cluster(topology) as cluster, cluster.writer(atomic=True) as session:
        session.add(Country(code="pt", name="Portugal"))
        session.commit()


@pytest.fixture(scope="module")
def source(pair: tuple[Path, Path]) -> Topology:
    """A logical shard with rows of many kinds."""
    _, topology = load(pair[0])
    with Cluster(topology) as cluster:
        with cluster.writer() as session:
            for n in range(20):
                owner = ids.compose(5_000 + n, SHARD, 0)
                session.add(User(id=owner, name=f"n\n{n}\t\\ é \N{SNOWMAN}"))
                session.flush()
                photo = Photo(owner_id=owner, caption="\\N", rank=None if n % 2 else n)
                session.add(photo)
                session.flush()
                session.add(Like(photo_id=photo.id, user_id=owner))
            for n in range(3):
                profile = Profile(id=ids.compose(6_000 + n, SHARD, 0), name="p", data={"a": [n]})
                session.add(profile)
                session.flush()
                profile.name = "again"  # a second version
                session.add(Post(owner_id=profile.id, text="post"))
            session.add(Account(id=ids.compose(7_000, SHARD, 0), name="Ana", email="a@b.c"))
            session.commit()
        with cluster.writer() as session:
            session.add(Tenant(name="acme"))
            session.commit()
    return topology


@pytest.fixture(scope="module")
def original(
    pair: tuple[Path, Path], source: Topology, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files of that logical shard."""
    folder = tmp_path_factory.mktemp("export") / "files"
    command = ["export", str(SHARD), "--into", str(folder), "--config", str(pair[0])]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert read(folder).tables["photos"].rows == 20
    assert content(source)["photos"][1] == read(folder).tables["photos"].sha256
    return folder


@pytest.fixture
def exported(original: Path, tmp_path: Path) -> Path:
    """A copy of them, to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "files"))


@pytest.fixture
def target(pair: tuple[Path, Path]) -> Topology:
    """The other cluster, empty."""
    _, topology = load(pair[1])
    for shard in topology.physical.values():
        with connect(shard, application="test") as connection:
            connection.execute(_EMPTY)
    return topology


def run(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> tuple[Any, Any, str]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--config", str(config), "--json"])
    said = capsys.readouterr()
    return ended.value.code, json.loads(said.out) if said.out else None, said.err


def content(topology: Topology) -> dict[str, tuple[int, str]]:
    """Return number and digest of the rows of every table."""
    with connect(topology.physical["alpha"], application="test") as connection:
        prepare(connection)
        return {
            shape.name: copy_out(connection, shape)
            for shape in shapes(connection, [SCHEMA_NAME])
            if shape.name != "shardkit_id_state"
        }


def ask(topology: Topology, query: str) -> Any:
    with connect(topology.physical["alpha"], application="test") as connection:
        row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None


def test_a_round_trip_is_equal_and_goes_on(
    capsys: pytest.CaptureFixture[str],
    pair: tuple[Path, Path],
    source: Topology,
    target: Topology,
    exported: Path,
) -> None:
    before = content(target)
    assert run(capsys, pair[1], "import", str(exported), "--dry-run")[0] == 0
    assert content(target) == before
    code, found, said = run(capsys, pair[1], "import", str(exported))
    assert code == 0, said
    assert found["rows"]["users"] == 20
    assert content(target) == content(source)
    state = f"SELECT state FROM {SCHEMA_NAME}.shardkit_id_state"
    assert ask(target, state) >= ask(source, state) > 0
    versions = f"SELECT max(version) FROM {SCHEMA_NAME}.profiles"
    following = f"SELECT nextval('{SCHEMA_NAME}.version_seq')"
    assert ask(target, following) > ask(source, versions) > 0
    position = "SELECT nextval('shardkit.outbox_position')"
    last = f"SELECT max(position) & 17592186044415 FROM {SCHEMA_NAME}.shardkit_outbox"
    assert ask(target, position) > ask(target, last) > 0
    with Cluster(target) as cluster:
        # Its unique values are with other logical shards, and are taken in as the command says.
        by_name = next(each for each in lookups_of(Account.__table__) if "name" in each.name)
        assert lookup.run(cluster, by_name, "repair").error is None
        assert lookup.run(cluster, by_name, "check").n_missing == 0
        with cluster.writer() as session:
            ana = session.scalars(select(Account).where(Account.name == "Ana")).one()
            assert ids.shard_of(ana.id) == SHARD
            profile = session.get(Profile, ids.compose(6_000, SHARD, 0))
            assert profile is not None
            profile.name = "new"  # by the triggers, which work again
            session.add(Photo(owner_id=ids.compose(5_000, SHARD, 0), caption="later"))
            session.commit()
    assert ask(target, versions) > ask(source, versions)
    assert run(capsys, pair[1], "import", str(exported))[0] == 3  # not empty any more


def test_what_other_logical_shards_keep_here_stays(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], target: Topology, exported: Path
) -> None:
    with connect(target.physical["alpha"], application="test") as connection:
        connection.execute(
            f"INSERT INTO {SCHEMA_NAME}.shardkit_lookup VALUES ('a.b', 'x', '{{1}}', '{{1}}')".encode()
        )
    code, _, said = run(capsys, pair[1], "import", str(exported))
    assert code == 0, said
    assert (
        ask(target, f"SELECT count(*) FROM {SCHEMA_NAME}.shardkit_lookup WHERE lookup = 'a.b'") == 1
    )
    assert ask(target, f"SELECT count(*) FROM {SCHEMA_NAME}.users") == 20


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its digest right again, as somebody who means harm would."""
    content = json.loads((folder / EXPORT).read_text())
    content.pop("sha256")
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / EXPORT).write_text(json.dumps(content))


def refill(folder: Path, table: str, change: Callable[[bytes], bytes]) -> None:
    """Change the rows of a table, with digests that are right."""
    found: ShardFile = read(folder)
    path = folder / found.tables[table].file
    data = change(path.read_bytes())
    path.write_bytes(data)
    entry = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "rows": data.count(b"\n"),
    }
    rewrite(folder, lambda content: content["tables"][table].update(entry))


def file_of(folder: Path, table: str) -> Path:
    return folder / read(folder).tables[table].file


def moved_away(folder: Path) -> None:
    for table in ("users", "photos", "likes"):
        refill(folder, table, lambda data: data.replace(MINE, OTHER))


def linked(folder: Path) -> None:
    path = file_of(folder, "users")
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def piped(folder: Path) -> None:
    path = file_of(folder, "users")
    path.unlink()
    os.mkfifo(path)


OTHER = str(ids.compose(5_000, SHARD + 1, 0)).encode()
MINE = str(ids.compose(5_000, SHARD, 0)).encode()
HOSTILE: dict[str, tuple[int, str, Callable[[Path], object]]] = {
    "cut short": (1, "cut short", lambda f: os.truncate(file_of(f, "photos"), 100)),
    "a missing file": (1, "cannot be read", lambda f: file_of(f, "photos").unlink()),
    "a link": (1, "cannot be read", linked),
    "a pipe": (1, "no plain file", piped),
    "a manifest cut short": (1, "cannot be used", lambda f: os.truncate(f / EXPORT, 200)),
    "a changed manifest": (1, "digest", lambda f: (f / EXPORT).write_text((f / EXPORT).read_text().replace('"id_state": ', '"id_state": 1'))),
    "a path as a file": (1, "cannot be used", lambda f: rewrite(f, lambda c: c["tables"]["users"].update(file="../../etc/passwd"))),
    "a file twice": (1, "twice", lambda f: rewrite(f, lambda c: c["tables"]["users"].update(c["tables"]["photos"]))),
    "a table too many": (1, "tables", lambda f: rewrite(f, lambda c: c["tables"].update({'x"; DROP TABLE users': {**c["tables"]["users"], "file": "9999.copy"}}) or (f / "9999.copy").write_bytes(file_of(f, "users").read_bytes()))),
    "other columns": (1, "columns", lambda f: rewrite(f, lambda c: c["tables"]["users"].update(columns=["id", "pg_sleep(9)"]))),
    "rows of another logical shard": (1, "of logical shard 3", moved_away),
    "a child without its parent": (1, "foreign key", lambda f: refill(f, "users", lambda d: d.split(b"\n", 1)[1])),
    "not in order": (1, "not what the file says", lambda f: refill(f, "users", lambda d: b"".join(reversed(d.splitlines(keepends=True))))),
    "no value of the type": (1, "invalid input", lambda f: refill(f, "users", lambda d: b"x" + d)),
    "no text": (1, "encoding", lambda f: refill(f, "users", lambda d: d.replace(b"n\\n0", b"\xff"))),
    "ids of the future": (3, "future", lambda f: rewrite(f, lambda c: c.update(id_state=(1 << 50) - 1))),
    "another number of logical shards": (3, "64 logical shards", lambda f: rewrite(f, lambda c: c.update(logical_shards=64))),
    "another catalogue": (3, "catalogue", lambda f: rewrite(f, lambda c: c.update(catalogue="0" * 64))),
    "other revisions": (3, "revisions", lambda f: rewrite(f, lambda c: c["revisions"].update(r9="x"))),
    "other rules": (3, "rules", lambda f: rewrite(f, lambda c: c["rules"].update(users="{}"))),
    "a newer PostgreSQL": (3, "PostgreSQL 99", lambda f: rewrite(f, lambda c: c.update(version=990_000))),
    "a newer format": (1, "newer", lambda f: rewrite(f, lambda c: c.update(format=2))),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_an_export_of_this_is_refused_and_nothing_imported(
    capsys: pytest.CaptureFixture[str],
    pair: tuple[Path, Path],
    target: Topology,
    exported: Path,
    what: str,
) -> None:
    code, said, spoil = HOSTILE[what]
    spoil(exported)
    found = run(capsys, pair[1], "import", str(exported))
    assert found[0] == code, found[2]
    assert said in found[2]
    assert ask(target, f"SELECT count(*) FROM {SCHEMA_NAME}.users") == 0
    assert ask(target, f"SELECT count(*) FROM {SCHEMA_NAME}.shardkit_directory") == 0


def test_commands_refuse_what_they_cannot_do(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], target: Topology, exported: Path
) -> None:
    assert (exported / SCHEMA).read_text().count("CREATE TABLE") > 10
    assert run(capsys, pair[0], "export", "8", "--into", str(exported / "x"))[0] == 2
    assert run(capsys, pair[0], "export", str(SHARD), "--into", str(exported))[0] == 3
    with connect(target.physical["alpha"], application="test") as connection:
        for state in ("fenced", "retired", "importing"):
            connection.execute(
                "UPDATE shardkit.ownership SET state = %s WHERE logical_shard = 2", (state,)
            )
            assert run(capsys, pair[1], "import", str(exported))[0] == 3
        connection.execute("UPDATE shardkit.ownership SET state = 'active'")
        connection.execute("BEGIN")
        connection.execute(f"LOCK TABLE {SCHEMA_NAME}.photos".encode())
        assert run(capsys, pair[1], "import", str(exported))[0] == 4
        connection.execute("ROLLBACK")
    assert ask(target, f"SELECT count(*) FROM {SCHEMA_NAME}.users") == 0
    assert run(capsys, pair[1], "import", str(exported))[0] == 0
