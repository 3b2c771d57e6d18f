"""`shardkit idmap`: fill a map from a file, look at it, find what is damaged."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from redis import Redis

from shardkit.cli import main
from shardkit.errors import InvalidMappingError
from shardkit.idmap import IdMap
from shardkit.ops.idmap import count, pairs
from tests.fixtures.caches import CacheServer, NewServer
from tests.fixtures.redis_clusters import NewCluster

pytestmark = pytest.mark.integration


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def server(cache_server: NewServer) -> CacheServer:
    """A Redis that keeps nothing."""
    return cache_server("redis", "--appendonly", "no")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `shardkit idmap`, in this process: four of them take seconds to begin."""

    def start(*words: str, text: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as end:
            main(["idmap", *words])
        said = capsys.readouterr()
        return Ended(end.value.code if isinstance(end.value.code, int) else 0, said.out, said.err)

    return start


def test_a_file_is_loaded_and_checked(run: Run, server: CacheServer, tmp_path: Path) -> None:
    file, where = tmp_path / "photos.csv", ("--redis", server.url)
    entries = {n: n * 3 for n in range(0, 20_000, 2)}
    file.write_text("# id,user\n" + "".join(f"{id},{user}\n" for id, user in entries.items()))  # noqa: A001
    with Redis(port=server.port) as client:
        dry = run("load", "photos", str(file), "--dry-run", "--json", *where)
        assert json.loads(dry.out)["entries"] == len(entries)
        assert client.dbsize() == 0
        for _ in range(2):
            loaded = run("load", "photos", str(file), "--json", *where)
            assert json.loads(loaded.out)["entries"] == len(entries)
        assert IdMap(client, "photos").get_many(range(20_000)) == entries
        assert run("get", "photos", "200", *where).out == "600\n"
        assert json.loads(run("get", "photos", "1", "--json", *where).out)["value"] is None

        whole = run("check", "photos", *where)
        assert (whole.code, "10,000 entries in blocks: 4 sparse" in whole.out) == (0, True)
        client.set(IdMap(client, "photos").key(0), "garbage")
        damaged = run("check", "photos", *where)
        assert damaged.code == 1
        assert "damaged: shardkit:idmap:photos:0" in damaged.out
        assert "load their ids again" in damaged.err


def test_what_is_no_entry_is_named(run: Run, server: CacheServer, tmp_path: Path) -> None:
    file, where = tmp_path / "wrong", ("--redis", server.url)
    for line in ("1", "a,b", "1,-2", "1,2,3", "٣,1", "9" * 5000 + ",1", "1,1.5"):
        with pytest.raises(InvalidMappingError, match="photos, line 2: "):
            count(pairs(["1,2", line], "photos"))
    refused = run("load", "photos", "-", *where, text="1,2\na,b\n")
    assert (refused.code, "standard input, line 2: 'a,b'" in refused.err) == (2, True)
    assert "Traceback" not in refused.err
    file.write_bytes(b"\x80\x00\xff\n")
    assert run("load", "photos", str(file), *where).code == 2
    assert run("load", "photos", str(tmp_path / "none"), *where).code == 2
    missing = run("check", "none", *where)
    assert (missing.code, "right name" in missing.err) == (1, True)


def test_a_cluster_is_loaded(run: Run, redis_cluster: NewCluster) -> None:
    cluster = redis_cluster(3)
    where = ["--redis", cluster.urls[1], "--cluster", "--json"]
    text = "".join(f"{n} {n}\n" for n in range(0, 100_000, 9))
    assert run("load", "photos", "-", *where, text=text).code == 0
    assert json.loads(run("check", "photos", *where).out)["entries"] == 11_112
    cluster.stop()
    gone = run("check", "photos", *where)
    assert (gone.code, "does not answer" in gone.err) == (4, True)
