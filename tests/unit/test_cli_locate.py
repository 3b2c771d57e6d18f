"""`shardkit locate` with a configuration and no server."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from shardkit.cli import main
from shardkit.ids import compose
from shardkit.keys import canonical
from shardkit.strategies import hash_shard

CONFIG = """
[cluster]
name = "demo"
logical_shards = 64
[admin]
user = "admin"
[[physical]]
name = "alpha"
logical_shards = "0-31"
primary = "postgresql://app@127.0.0.1:1/db"
[[physical]]
name = "beta"
logical_shards = "32-63"
primary = "postgresql://app@127.0.0.1:2/db"
replicas = ["postgresql://app@127.0.0.1:3/db"]
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "shardkit.toml"
    file.write_text(CONFIG)
    return str(file)


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_an_id_is_located_by_what_it_carries(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("locate", str(compose(1, 42, 0)), "--config", config) == 0
    out = capsys.readouterr().out
    assert "42 (shard_0042)" in out
    assert "beta/replica@127.0.0.1:3/db" in out
    assert "the id carries it" in out


UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--key", "ana"), "ana"), (("--key", "1"), "1"), (("--key", ""), ""),
        (("--key", "1", "--type", "integer"), 1), (("--key=-7", "--type", "integer"), -7),
        (("--key", str(UUID).upper(), "--type", "uuid"), UUID), (("--key", "00ff", "--type", "bytes"), b"\0\xff"),
    ],
)  # fmt: skip
def test_a_key_is_hashed(
    options: tuple[str, ...], key: object, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("locate", *options, "--config", config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logical_shard"] == hash_shard(canonical(key), 64)
    assert found["strategy"] == "hash"
    assert found["physical"] == ("alpha" if found["logical_shard"] < 32 else "beta")


@pytest.mark.parametrize(
    "options",
    [
        (), ("1", "--key", "a"), ("1", "--table", "t"), ("x",), ("9" * 30,), (str(compose(1, 64, 0)),),
        ("--key", "x", "--type", "integer"), ("--key", "e\u0301"), ("--key", "a\udcff"),
        ("--key", "\u0663", "--type", "integer"), ("--key", "9" * 19, "--type", "integer"),
        ("--key", "x", "--type", "uuid"), ("--key", "abc", "--type", "bytes"), ("--key", "x" * 5000),
        ("--key", "x", "--type", "float"),
    ],
)  # fmt: skip
def test_what_cannot_be_located_is_said_with_exit_2(
    options: tuple[str, ...], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("locate", *options, "--config", config) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.strip()


def test_a_table_is_asked_of_the_servers(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("locate", "--key", "x", "--table", "t", "--config", config) == 4
    assert "does not accept" in capsys.readouterr().err
