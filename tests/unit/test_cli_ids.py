"""`shardkit ids parse` through the real command line, in process."""

from __future__ import annotations

import json

import pytest

from shardkit.cli import main
from shardkit.ids import EPOCH_MS, compose

ONE = compose(1_800_000_000_000 - EPOCH_MS, 42, 7)


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_an_id_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ids", "parse", str(ONE)) == 0
    out = capsys.readouterr().out
    assert "2027-01-15 08:00:00.000" in out
    assert "42" in out


def test_json_keeps_ids_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ids", "parse", "--json", str(ONE), "1") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "id": str(ONE),
        "time": "2027-01-15T08:00:00.000+00:00",
        "logical_shard": 42,
        "sequence": 7,
    }
    assert second["logical_shard"] == 0


@pytest.mark.parametrize("text", ["x", "0", "1.5", "٣", "99999999999999999999", ""])
def test_what_is_no_id_is_said_in_one_line_with_exit_2(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ids", "parse", text) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_negative_number_is_no_id() -> None:
    assert run("ids", "parse", "--", "-5") == 2


def test_migrations_must_be_named(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("migrate", "status", "--config", f"{tmp_path}/none.toml") == 2
    assert "no such file" in capsys.readouterr().err
