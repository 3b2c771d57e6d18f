"""Folders and files that others must not be able to turn against the owner."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shardkit.errors import LocalServerError
from shardkit.local.account import Account, claim_folder, is_reachable, server_account, write_file

STRANGER = Account("stranger", 54321, 54321, is_switched=True)


def test_a_folder_is_made_with_its_mode_and_claimed_again(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    claim_folder(folder, 0o700)
    claim_folder(folder, 0o711)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711


def test_a_planted_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(LocalServerError, match="left alone"):
        claim_folder(tmp_path / "link", 0o711)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalServerError):
        claim_folder(tmp_path / "file", 0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, STRANGER.uid, STRANGER.gid)
    with pytest.raises(LocalServerError, match="belongs to user 54321"):
        claim_folder(folder, 0o700)
    assert claim_folder(folder, 0o700, STRANGER) == folder


def test_a_path_is_reachable_when_every_folder_may_be_entered(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a").chmod(0o700)
    assert not is_reachable(inner, STRANGER)
    assert is_reachable(Path("/usr/bin"), STRANGER)


def test_a_file_is_replaced_whole_and_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe", encoding="utf-8")
    (tmp_path / "file").symlink_to(victim)
    (tmp_path / ".file.new").symlink_to(victim)
    write_file(tmp_path / "file", "text", 0o600)
    assert victim.read_text(encoding="utf-8") == "safe"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "text"
    assert stat.S_IMODE((tmp_path / "file").lstat().st_mode) == 0o600


def test_root_runs_servers_as_somebody_else() -> None:
    account = server_account()
    assert account.uid != 0
    assert account.is_switched is (os.geteuid() == 0)
