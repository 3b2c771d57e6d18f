"""Backups of two physical shards under atomic commits over both: restored, nothing is half done."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from shardkit import Cluster, all_shards
from shardkit.backup import drill as drills
from shardkit.backup.manifest import MANIFEST
from shardkit.backup.restore import Sides, chosen, restored, settle
from shardkit.backup.store import Store
from shardkit.cli import main
from shardkit.ops.ddllocks import MIGRATION_KEY
from shardkit.ops.direct import connect
from shardkit.testing import wait_until
from tests.fixtures.backups import IN_DOUBT, Home, Made, load_on
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def numbers(sides: Sides) -> dict[str, set[int]]:
    """Return the commits that each restored server has a part of."""
    found = {}
    for physical in ("alpha", "beta"):
        with Cluster(sides.topology) as cluster, cluster.writer() as session:
            mine = {*sides.topology.shard_map.owned_by(physical)}
            names = session.scalars(select(User).options(all_shards())).all()
            found[physical] = {
                int(user.name)
                for user in names
                if user.name.isdigit() and (user.id >> 10) & 8191 in mine
            }
    return found


def run(capsys: pytest.CaptureFixture[str], home: Home, *arguments: str) -> tuple[Any, Any, str]:
    """Run a command; returns its exit code, its JSON and what it said of errors."""
    command = [
        "backup",
        *arguments,
        "--config",
        str(home.config),
        "--folder",
        str(home.store.folder),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    said = capsys.readouterr()
    return ended.value.code, json.loads(said.out) if said.out else None, said.err


@pytest.fixture(scope="module")
def sides(home: Home, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """Servers as they were at the label, and nothing ended yet that was in doubt."""
    choice = chosen(home.topology, home.store, made.manifest.name, None)
    into = reachable(tmp_path_factory.mktemp("restored"))
    with restored(home.topology, choice, into / "data", sync=False) as sides:
        yield sides


def reachable(folder: Path) -> Path:
    """Let the servers' account pass through a folder of the tests."""
    if os.geteuid() == 0:
        for each in (folder, *folder.parents):
            if each.stat().st_uid == 0 and not each.stat().st_mode & 0o001:
                each.chmod(each.stat().st_mode | 0o111)
    return folder


def test_rows_and_catalogue_are_those_of_the_label(sides: Sides, made: Made) -> None:
    assert drills._catalogue(sides, made.manifest).is_right
    check = drills._rows(sides, made.manifest)
    assert check.is_right, check.detail
    known = [
        rows for part in made.manifest.physical.values() for rows in (part.rows or {}).values()
    ]
    assert sum(rows is not None and rows[0] > 0 for rows in known) >= 10
    # The judge can say no.
    alpha = made.manifest.physical["alpha"]
    table = next(name for name, rows in (alpha.rows or {}).items() if rows and rows[0])
    wrong = alpha.model_copy(update={"rows": {**(alpha.rows or {}), table: (1, "0" * 64)}})
    other = made.manifest.model_copy(
        update={"physical": {**made.manifest.physical, "alpha": wrong}}
    )
    check = drills._rows(sides, other)
    assert check.is_right is False
    assert table in check.detail


def test_no_commit_is_half_done_and_all_that_was_acknowledged_is_there(
    home: Home, made: Made, sides: Sides
) -> None:
    settled = settle(sides.topology)
    assert "commit" in {each.outcome for each in settled}  # the one that was decided and left
    found = numbers(sides)
    assert found["alpha"] == found["beta"]
    assert len(made.before) > 20
    assert made.before <= found["alpha"]
    assert max(found["alpha"]) >= IN_DOUBT
    assert home.acknowledged - found["alpha"], "the label is a point, not the end"
    with Cluster(sides.topology) as cluster, cluster.writer() as session:
        captions = session.scalars(select(Photo.caption).options(all_shards())).all()
        assert list(captions) == ["tab\there, back\\slash, é"] * 8


def test_points_that_are_no_label_have_halves(home: Home, made: Made, tmp_path: Path) -> None:
    """The same judge over the same log, without the lock: a green test alone proves nothing."""
    choice = chosen(home.topology, home.store, made.manifest.name, None)
    with restored(
        home.topology, replace(choice, label="torn"), reachable(tmp_path) / "x", sync=False
    ) as torn:
        settle(torn.topology)
        found = numbers(torn)
    assert found["alpha"] != found["beta"]


def test_what_is_restored_speaks_to_nobody(home: Home, sides: Sides) -> None:
    for name, shard in sides.topology.physical.items():
        with connect(shard, application="test") as connection:
            for setting, value in (
                ("max_wal_senders", "0"),
                ("archive_mode", "off"),
                ("primary_conninfo", ""),
                ("synchronous_standby_names", ""),
                ("listen_addresses", "127.0.0.1"),
                ("max_logical_replication_workers", "0"),
            ):
                found = connection.execute("SELECT current_setting(%s)", (setting,)).fetchone()
                assert found == (value,), setting
            timeline = connection.execute(
                "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
            ).fetchone()
        assert timeline == ("00000002",), "a timeline of its own"
        url = shard.admin_url.set(drivername="postgresql", query={"replication": "true"})
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url.render_as_string(hide_password=False))
        assert shard.admin_url.port != home.topology.physical[name].admin_url.port


def test_no_secret_is_an_argument(home: Home, made: Made) -> None:
    assert any(b"pg_basebackup" in each for each in made.arguments)
    assert any(b"pg_receivewal" in each for each in made.arguments)
    secrets = json.loads(home.config.with_name("passwords.json").read_text())
    for secret in secrets.values():
        assert not any(secret.encode() in each for each in made.arguments)
        assert secret not in (home.store.path(made.manifest.name) / MANIFEST).read_text()


def test_a_drill_by_command(
    capsys: pytest.CaptureFixture[str], home: Home, made: Made, tmp_path: Path
) -> None:
    text = home.config.read_text() + '\n[migrations]\nmodels = "tests.models:Base"\n'
    file = tmp_path / "shardkit.toml"
    file.touch(0o600)
    file.write_text(text)
    other = replace(home, config=file)
    code, found, said = run(
        capsys, other, "drill", "--no-sync", "--scratch", str(reachable(tmp_path))
    )
    assert code == 0, said
    assert found["backup"] == made.manifest.name
    checks = {check["name"]: check["right"] for check in found["checks"]}
    assert checks == {
        "label": True, "catalogue": True, "rows": True, "two-phase": True, "reference": True,
        "sequences": True, "ids": True, "drift": None, "lookup accounts.name": True,
        "lookup accounts.email": True,
    }  # fmt: skip
    assert found["recovery_time_seconds"] > 0
    assert found["recovery_point_seconds"] > 0  # commits went on while the log was fetched
    assert [path.name for path in tmp_path.iterdir()] == ["shardkit.toml"]


def test_labels_of_the_archive_bring_back_what_came_after_the_backup(
    capsys: pytest.CaptureFixture[str], home: Home, made: Made, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shardkit", "backup", "archive", "--every", "0.2",
         "--config", str(home.config), "--folder", str(home.store.folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: bool(home.store.labels()), 60.0, "a label in the archive")
        number = next(home.numbers)
        with Cluster(home.topology) as cluster, cluster.writer(atomic=True) as session:
            session.add_all(home.pair(number))
            session.commit()
        n_then = len(home.store.labels())
        wait_until(lambda: len(home.store.labels()) > n_then + 1, 60.0, "a later label")
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    choice = chosen(home.topology, home.store, None, "newest")
    assert choice.manifest.name == made.manifest.name
    assert choice.label > made.manifest.name
    with restored(home.topology, choice, reachable(tmp_path) / "data", sync=False) as sides:
        settle(sides.topology)
        found = numbers(sides)
    assert number in found["alpha"]
    assert found["alpha"] == found["beta"]
    assert run(capsys, home, "archive", "--drop-slots")[:2] == (0, {"dropped": ["alpha", "beta"]})


def test_a_folder_that_holds_anything_is_left_alone(
    capsys: pytest.CaptureFixture[str], home: Home, made: Made, tmp_path: Path
) -> None:
    kept = tmp_path / "precious"
    kept.write_text("data")
    code, _, said = run(capsys, home, "restore", made.manifest.name, "--into", str(tmp_path))
    assert (code, "precious" in said) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    code, planned, _ = run(capsys, home, "restore", "--into", str(tmp_path / "new"), "--dry-run")
    assert (code, planned["label"]) == (0, made.manifest.name)
    assert not (tmp_path / "new").exists()
    code, _, said = run(capsys, home, "restore", "../../etc", "--into", str(tmp_path / "new"))
    assert (code, "no backup" in said) == (2, True)
    code, _, said = run(
        capsys, home, "restore", "--into", str(tmp_path / "new"), "--to", "tomorrow"
    )
    assert code == 2


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


Damage = tuple[str, Callable[[Path], Path], Callable[[Path], object]]


def edited(key: str, value: object) -> Callable[[Path], object]:
    """Return what changes one value of a manifest and not its digest."""
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def log_of(physical: str) -> Callable[[Path], Path]:
    """Return what finds the last file of log."""
    return lambda folder: max((folder / physical / "wal").iterdir())


def the_manifest(folder: Path) -> Path:
    return folder / MANIFEST


# What is said, which file, and what becomes of it.
DAMAGE: dict[str, Damage] = {
    "a byte of a table": ("damaged", lambda f: min(f.glob("alpha/base/base/*/1259")), lambda p: flip(p, 9000)),
    "a missing file": ("missing", lambda f: f / "beta/base/global/pg_control", Path.unlink),
    "a foreign file": ("does not belong", lambda f: f / "alpha/base/x", Path.touch),
    "a byte of log": ("damaged", log_of("alpha"), lambda p: flip(p, 100)),
    "a file of log cut short": ("damaged", log_of("beta"), lambda p: os.truncate(p, 4096)),
    "a missing file of log": ("missing", log_of("beta"), Path.unlink),
    "PostgreSQL's manifest": ("changed", lambda f: f / "alpha/base/backup_manifest", lambda p: flip(p, 500)),
    "a changed manifest": ("digest", the_manifest, edited("cluster", "other")),
    "a manifest cut short": ("cannot be used", the_manifest, lambda p: os.truncate(p, 100)),
    "a newer format": ("newer", the_manifest, edited("format", 2)),
    "nested without end": ("cannot be used", the_manifest, lambda p: p.write_text("[" * 100_000)),
}  # fmt: skip


@pytest.fixture(scope="module")
def linked(home: Home, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The backup in another folder, as hard links: only what is damaged is copied."""
    folder = tmp_path_factory.mktemp("linked")
    name = made.manifest.name
    shutil.copytree(home.store.path(name), folder / name, copy_function=os.link)
    return replace(home, store=Store(folder))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named(
    capsys: pytest.CaptureFixture[str], linked: Home, made: Made, what: str
) -> None:
    said, find, damage = DAMAGE[what]
    file = find(linked.store.path(made.manifest.name))
    kept = file.read_bytes() if file.exists() else None
    if kept is not None:
        file.unlink()  # the link, and not what it leads to
        file.write_bytes(kept)
    try:
        damage(file)
        code, _, error = run(capsys, linked, "verify", made.manifest.name)
        assert code == 1
        assert said in error
        code, listed, _ = run(capsys, linked, "list")
        assert (code, len(listed["backups"])) == (0, 1)
    finally:
        file.unlink(missing_ok=True)
        if kept is not None:
            file.write_bytes(kept)


def test_an_interrupted_backup_is_none_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], home: Home, tmp_path: Path
) -> None:
    store = Store(tmp_path / "backups")
    command = [sys.executable, "-m", "shardkit", "backup", "create", "--config", str(home.config),
               "--folder", str(store.folder)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: any(store.folder.glob(".new-*/*/base/base")), 60.0, "files are copied")
    process.kill()
    process.communicate(timeout=60)
    assert store.backups() == []
    assert list(store.folder.glob(".new-*"))
    # Programs and slots end with it; the next run removes what it wrote.
    for shard in home.topology.physical.values():
        with connect(shard, application="test") as connection:
            wait_until(
                lambda c=connection: c.execute(  # type: ignore[misc]
                    "SELECT (SELECT count(*) FROM pg_replication_slots) "
                    "+ (SELECT count(*) FROM pg_stat_replication)"
                ).fetchone() == (0,), 60.0, "slots and senders end",
            )  # fmt: skip
    # A write that fails in the middle: no file may grow beyond this.
    limited = subprocess.run(
        command, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19)),
    )  # fmt: skip
    assert limited.returncode == 1, limited.stderr
    assert "File too large" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert {path.name for path in store.folder.iterdir()} == {"lock"}
    with store.locked():
        code, _, said = run(capsys, replace(home, store=store), "create")
    assert (code, "another command" in said) == (3, True)
    with connect(home.topology.physical["beta"], application="test") as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (MIGRATION_KEY,))  # as a migration does
        code, _, said = run(capsys, replace(home, store=store), "create", "--no-rows")
    assert (code, "migration" in said) == (4, True)
    assert {path.name for path in store.folder.iterdir()} == {"lock"}
    home.local.stop_server("beta_0")
    try:
        code, _, said = run(capsys, replace(home, store=store), "create")
    finally:
        home.local.start_server("beta_0")
    assert (code, "beta" in said) == (4, True)
    assert {path.name for path in store.folder.iterdir()} == {"lock"}


def test_the_oldest_go_and_the_others_stay(
    capsys: pytest.CaptureFixture[str], home: Home, made: Made, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    old = tmp_path / made.manifest.name
    shutil.copytree(home.store.path(made.manifest.name), old, copy_function=os.link)
    copy = replace(home, store=store)
    code, planned, _ = run(capsys, copy, "create", "--dry-run")
    assert code == 0
    assert set(planned["size_bytes"]) == {"alpha", "beta"}
    # Of the archive, what no backup needs any more goes, too.
    for number in (0, 0xFFFFFF):
        (store.wal("alpha") / f"{1:08X}{0:08X}{number:08X}").parent.mkdir(
            parents=True, exist_ok=True
        )
        (store.wal("alpha") / f"{1:08X}{0:08X}{number:08X}").touch()
    with load_on(home, threads=1):
        code, kept, said = run(capsys, copy, "create", "--keep", "1", "--no-rows")
    assert code == 0, said
    assert kept["name"] > made.manifest.name
    code, listed, _ = run(capsys, copy, "list")
    assert [each["name"] for each in listed["backups"]] == [kept["name"]]
    assert not old.exists()
    assert [path.name for path in store.wal("alpha").iterdir()] == ["000000010000000000FFFFFF"]
    code, good, _ = run(capsys, copy, "verify", "--all")
    assert (code, good) == (0, {kept["name"]: None})
