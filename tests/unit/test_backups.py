"""What backups are called, what their files say, and what is refused before a server is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import make_url

from shardkit.backup import manifest
from shardkit.backup.facts import room
from shardkit.backup.label import segment_of
from shardkit.backup.store import Damaged, Store
from shardkit.backup.tools import failure, login
from shardkit.errors import BackupError, ConfigurationError, EndpointUnavailableError, RefusedError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("lsn", "timeline", "size", "expected"),
    [
        ("0/1", 1, 16 * MIB, "000000010000000000000000"),
        (
            "0/1000000",
            1,
            16 * MIB,
            "000000010000000000000000",
        ),  # its last byte is in the file before
        ("0/1000001", 1, 16 * MIB, "000000010000000000000001"),
        ("1/0", 2, 16 * MIB, "0000000200000000000000FF"),
        ("1/1", 2, 16 * MIB, "000000020000000100000000"),
        ("A/FFFFFFFF", 0xAB, 64 * MIB, "000000AB0000000A0000003F"),
    ],
)
def test_a_file_of_log_has_the_name_that_postgresql_gives_it(
    lsn: str, timeline: int, size: int, expected: str
) -> None:
    assert segment_of(lsn, timeline, size) == expected


def test_names_sort_by_time_and_are_what_the_store_takes() -> None:
    times = [0, 1, 999, 1000, 1_800_000_000_123, 1_800_000_000_124, 4_000_000_000_000]
    names = [manifest.name_at(at) for at in times]
    assert names == sorted(names)
    assert all(manifest.NAME.match(name) for name in names)
    assert not manifest.NAME.match("../" + names[0])
    assert not manifest.NAME.match(names[0] + "\n")


def a_label() -> manifest.LabelFile:
    return manifest.LabelFile.model_validate(
        {
            "format": 1,
            "name": manifest.name_at(1_800_000_000_000),
            "label_at": "2027-01-15T08:00:00Z",
            "window": 0.001,
            "physical": {"alpha": {"lsn": "0/3000028", "timeline": 1}},
        }
    )


def test_a_label_is_read_as_it_was_written_and_a_changed_one_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.keep_label(a_label())
    assert store.labels() == [a_label()]
    file = next((tmp_path / "labels").iterdir())
    file.write_text(file.read_text().replace("0/3000028", "0/3000029"))
    assert store.labels() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../../x"}, "cannot be used"),
        ({"physical": {"../alpha": {"lsn": "0/1", "timeline": 1}}}, "cannot be used"),
        ({"physical": {"alpha": {"lsn": "0/1; DROP", "timeline": 1}}}, "cannot be used"),
        ({"more": 1}, "cannot be used"),
        ({"window": -1}, "cannot be used"),
        ({"format": 2}, "newer"),
    ],
)
def test_a_file_with_a_digest_that_is_right_is_not_trusted_for_it(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    content = {**json.loads(manifest.encode(a_label())), **change}
    content["sha256"] = manifest._digest({k: v for k, v in content.items() if k != "sha256"})
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(BackupError, match=said):
        manifest.decode(file, manifest.LabelFile, "")


def run_out_of_space(store: Store) -> None:
    with store.locked(), store.making("x") as folder:
        (folder / "alpha").mkdir()
        raise OSError(28, "No space left on device")


def test_a_store_lists_what_is_finished_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.backups() == []
    with pytest.raises(BackupError, match="no backup"):
        store.newest()
    with pytest.raises(BackupError, match="No space"):
        run_out_of_space(store)
    assert [path.name for path in store.folder.iterdir()] == ["lock"]
    (store.folder / manifest.name_at(0)).mkdir()
    (store.folder / f".new-{manifest.name_at(1)}").mkdir()
    assert [(type(b), b.name) for b in store.backups()] == [(Damaged, manifest.name_at(0))]
    with pytest.raises(ConfigurationError, match="no backup"):
        store.path("..")
    with pytest.raises(RefusedError, match="are needed"):
        room(store, {"alpha": 1 << 60})


def test_a_password_is_not_among_the_arguments() -> None:
    url = make_url("postgresql://ana:se'cret@db.example:5433/shop?sslmode=verify-full")
    conninfo, secret = login(url, application="x")
    assert "se" not in conninfo.replace("sslmode", "").replace("user", "")
    assert secret == {"PGPASSWORD": "se'cret"}
    assert {"host=db.example", "port=5433", "user=ana", "sslmode=verify-full"} <= {
        *conninfo.split()
    }
    with pytest.raises(ConfigurationError, match="sslpassword"):
        login(url.update_query_dict({"sslpassword": "x"}), application="x")


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            'could not write to file "x": No space left on device\nremoving data',
            BackupError,
            "No space",
        ),
        ("connection to server at x failed: refused", EndpointUnavailableError, "refused"),
        ("something else", BackupError, "something else"),
        ("", BackupError, "said nothing"),
    ],
)
def test_what_a_program_says_becomes_an_error(said: str, kind: type[Exception], told: str) -> None:
    error = failure("pg_basebackup", said, "alpha/primary")
    assert type(error) is kind
    assert told in error.message
