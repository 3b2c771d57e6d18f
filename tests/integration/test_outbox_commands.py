"""`shardkit outbox`, models that announce, and what hands events on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import database
from shardkit import Cluster, Sharded, after_delete, after_insert, after_update, ids
from shardkit.config import load
from shardkit.contrib.redis_streams import event_of, to_stream
from shardkit.local import LocalCluster
from shardkit.outbox import Event
from shardkit.relay import Relay
from tests.fixtures.commands import shardkit

pytestmark = pytest.mark.integration

ANA = ids.compose(1, 5, 0)

APP = """
from shardkit import Cluster, Relay

cluster = Cluster.from_file({config!r})
relay = Relay(cluster)
other = 1


@relay.on("good")
def good(event):
    print("handled", event.payload)
"""


def relay(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """Run `shardkit outbox relay` as a program: it finds the application where it is started."""
    done = subprocess.run(
        [sys.executable, "-m", "shardkit", "outbox", "relay", *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "COLUMNS": "200"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def outbox(*arguments: str, config: Path) -> tuple[int | str, str, str]:
    return shardkit("outbox", *arguments, "--config", str(config))


def test_from_the_first_event_to_the_replay(
    cluster: Cluster, cluster_file: Path, tmp_path: Path
) -> None:
    tmp_path.joinpath("program.py").write_text(APP.format(config=str(cluster_file)))
    for topic, payload in (("good", 1), ("bad", "\x1b[31mred\x1b[0m"), ("good", 2)):
        with cluster.writer() as session:
            session.emit(topic, payload, key=ANA)
            session.commit()
    code, out, _ = outbox("status", "--interval=0", "--json", config=cluster_file)
    assert code == 0
    alpha = json.loads(out)["alpha"]
    assert (alpha["backlog"], alpha["dead"], alpha["error"]) == (3, 0, None)
    assert alpha["oldest"] >= 0
    assert alpha["busiest"] == [[5, 3]]
    code, out, _ = relay("--app=program:relay", "--drain", folder=tmp_path)
    assert code == 0
    assert "handled 1\nhandled 2\n2 events delivered" in out
    code, out, _ = outbox("status", "--interval=0", config=cluster_file)
    assert code == 0
    assert "alpha" in out
    code, out, _ = outbox("dead", "--json", config=cluster_file)
    assert code == 0
    (letter,) = json.loads(out)["dead"]
    assert (letter["topic"], letter["error"]) == ("bad", "no handler for this topic")
    code, out, _ = outbox("dead", "--topic=none", config=cluster_file)
    assert code == 0
    assert "bad" not in out
    number = letter["id"]
    code, out, _ = outbox("replay", number, "--dry-run", config=cluster_file)
    assert (code, out) == (0, "1 dead letters would be put back\n")
    code, out, _ = outbox("replay", number, config=cluster_file)
    assert (code, out) == (0, "1 dead letters put back\n")
    code, out, err = outbox("replay", number, config=cluster_file)
    assert code == 1
    assert "no dead letters" in err
    seen: list[Event] = []
    Relay(cluster, {"bad": seen.append}).drain()
    assert [(event.id, event.payload) for event in seen] == [(int(number), "\x1b[31mred\x1b[0m")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--app=nothing:relay", "cannot be loaded"),
        ("--app=program", "cannot be loaded"),
        ("--app=program:other", "not a Relay"),
    ],
)
def test_a_relay_that_is_none_exits_with_2(
    cluster_file: Path, tmp_path: Path, arguments: str, says: str
) -> None:
    tmp_path.joinpath("program.py").write_text(APP.format(config=str(cluster_file)))
    code, _, err = relay(arguments, folder=tmp_path)
    assert code == 2
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["replay"], "give ids, --topic or --all"), (["dead", "--limit=0"], "--limit")],
)
def test_what_makes_no_sense_exits_with_2(
    cluster_file: Path, arguments: list[str], says: str
) -> None:
    code, _, err = outbox(*arguments, config=cluster_file)
    assert code == 2
    assert says in err


def test_a_server_that_is_down_is_named_and_the_others_are_shown(
    local_cluster: LocalCluster, cluster_file: Path
) -> None:
    name = local_cluster.primary("beta").name
    local_cluster.kill_server(name)
    try:
        code, out, err = outbox("status", "--interval=0", "--json", config=cluster_file)
    finally:
        local_cluster.start_server(name)
    assert code == 4
    found = json.loads(out)
    assert found["alpha"]["error"] is None
    assert "beta" in found["beta"]["error"]
    assert "beta" in err


class Announcing(DeclarativeBase):
    """Models of these tests."""


class Note(Sharded, Announcing):
    __tablename__ = "notes"
    __shard_key__ = "owner_id"
    __events__ = (
        after_insert("note.added"),
        after_update("note.moved", ["id", "place"], key="owner_id", columns=["place"]),
        after_update("note.changed", lambda note: note.text),
        after_delete("note.removed", lambda note: note.id, key=lambda note: f"all {note.owner_id}"),
    )
    owner_id: Mapped[int]
    text: Mapped[str]
    place: Mapped[int]


def test_models_announce_what_a_flush_does(local_cluster: LocalCluster) -> None:
    _, topology = load(local_cluster.config_path)
    made = database(
        local_cluster, topology, "announcing", logical_shards=8, metadata=Announcing.metadata
    )
    seen: list[Event] = []
    with Cluster(made) as cluster, cluster.writer() as session:
        note = Note(owner_id=ANA, text="a", place=1)
        session.add(note)
        session.commit()
        note.text = "b"
        session.commit()
        note.place = 2
        session.commit()
        note.place = 2
        session.commit()
        note.text = "lost"
        session.flush()
        session.rollback()
        session.delete(session.get_one(Note, note.id))
        session.commit()
        topics = ("note.added", "note.moved", "note.changed", "note.removed")
        Relay(cluster, dict.fromkeys(topics, seen.append)).drain()
    row = f"notes:{note.id}"
    added: dict[str, Any] = {"id": note.id, "owner_id": ANA, "text": "a", "place": 1}
    assert [(event.topic, event.key, event.payload) for event in seen] == [
        ("note.added", row, added),
        ("note.changed", row, "b"),
        ("note.moved", str(ANA), {"id": note.id, "place": 2}),
        ("note.changed", row, "b"),
        ("note.removed", f"all {ANA}", note.id),
    ]


def test_events_go_to_a_stream_of_redis_in_order(
    cluster: Cluster, local_cluster: LocalCluster
) -> None:
    url = load(local_cluster.config_path)[0].services["redis"]
    client = redis.Redis.from_url(url)
    client.delete("events")
    payloads: list[Any] = [1, {"é": None}, "\0", 4]
    for payload in payloads:
        with cluster.writer() as session:
            session.emit("t", payload, key=ANA)
            session.commit()
    relay = Relay(cluster)
    relay.on("t", batch=3)(to_stream(client, "events"))
    assert relay.drain() == 4
    entries: Any = client.xrange("events")
    client.close()
    events = [event_of(fields) for _, fields in entries]
    assert [event.payload for event in events] == payloads
    assert {event.key for event in events} == {str(ANA)}
    assert len({event.id for event in events}) == 4
