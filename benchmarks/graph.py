"""TAO's reads on the application's graph: the published mix, against the same reads in SQL.

The mix is that of the paper's production workload: assoc_range 40.9 %, obj_get 28.9 %, assoc_get
15.7 %, assoc_count 11.7 %, assoc_time_range 2.8 %; 0.2 % of all requests write. Who is read follows
Zipf's law. Each arm does the same reads:

- *direct SQL*: SQLAlchemy statements in a session on databases, one session for a page: what the
  application would do without its graph;
- *psycopg*: a prepared statement for each, on an open connection to the primary that has the row:
  the least that asking a database costs a Python program, without objects and routing; no target;
- *graph*: what the application does, one session for the reads of a page.

Source: Bronson et al., "TAO", USENIX ATC 2013, table of section 6 (as in app.md, section 2).
"""

from __future__ import annotations

import bisect
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import func, select

from app.accounts.models import User
from app.graph import tao
from app.graph.models import Assoc, Kind
from benchmarks.measure import connect, report
from benchmarks.socialworld import World, patient, world
from shardkit import Cluster, ids
from shardkit.topology import schema_name

PEERS = ("SQLAlchemy without a cache", "psycopg, prepared statements")
TARGETS = {"vs_direct_sql": "≥ 10", "hit_rate": "≥ 0.97"}

MIX = {"range": 40.9, "obj": 28.9, "get": 15.7, "count": 11.7, "time_range": 2.8}
WRITES = 0.002
ZIPF = 1.0
PAGE = 60
"""Reads of one page. Source: TAO's paper, section 1: a page is an aggregation of hundreds."""

LIMIT = 50


class Read(NamedTuple):
    kind: str
    id1: int
    id2s: tuple[int, ...]


def main(*, as_json: bool, quick: bool = False) -> None:
    n_people, n_edges = (4_000, 120_000) if quick else (100_000, 4_000_000)
    with world() as here:
        people = here.people(n_people)
        draw = zipf(people, random.Random(1))
        rng = random.Random(2)
        made = here.edges((rng.choice(people), draw()) for _ in range(n_edges))
        with Cluster(here.topology, cache=here.cache) as cluster, Cluster(here.topology) as plain:
            patient(cluster)
            figures, medians = measured(here, cluster, plain, people, quick=quick)
    figures["edges"] = made
    report("graph", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def zipf(people: Sequence[int], rng: random.Random) -> Callable[[], int]:
    """Return what draws people, the first ones most often."""
    sums = list(itertools.accumulate(1 / (n + 1) ** ZIPF for n in range(len(people))))
    return lambda: people[bisect.bisect(sums, rng.random() * sums[-1])]


def reads(people: Sequence[int], n: int, seed: int) -> list[Read]:
    rng = random.Random(seed)
    draw = zipf(people, rng)
    kinds = rng.choices(list(MIX), list(MIX.values()), k=n)
    return [
        Read(kind, draw(), tuple(rng.choice(people) for _ in range(3)) if kind == "get" else ())
        for kind in kinds
    ]


def measured(
    here: World, cluster: Cluster, plain: Cluster, people: Sequence[int], *, quick: bool
) -> tuple[dict[str, float], dict[str, float]]:
    n_pages = 40 if quick else 200
    everything = [Read(kind, id1, ()) for id1 in people for kind in ("obj", "count", "range")]
    for page in batched(everything):  # as caches that have run for long
        graph(cluster, page)
    direct = Direct(here)
    assert cluster.cache is not None
    speeds: dict[str, list[float]] = {"direct SQL": [], "psycopg": [], "graph": []}
    before = cluster.cache.counts
    pages = batched(reads(people, n_pages * PAGE, seed=11))
    write = iter(reads(people, n_pages, seed=12))
    for number, page in enumerate(pages):
        if number % round(1 / (WRITES * PAGE)) == 0:
            follow(cluster, next(write).id1, people[number])
        arms: dict[str, Callable[[], Any]] = {
            "psycopg": partial(direct.run, page),
            "graph": partial(graph, cluster, page),
            "direct SQL": partial(one_by_one, plain, page),
        }
        for name, run in arms.items() if number % 2 else reversed(arms.items()):
            started = time.perf_counter()
            run()
            speeds[name].append((time.perf_counter() - started) / len(page))
    counts = cluster.cache.counts
    hits, misses = counts.hits - before.hits, counts.misses - before.misses
    assert answers(direct, pages[-1]) == seen(cluster, pages[-1]), "all say the same"
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return {
        "vs_direct_sql": medians["direct SQL"] / medians["graph"],
        "vs_bare_psycopg": medians["psycopg"] / medians["graph"],
        "hit_rate": hits / max(1, hits + misses),
        "reads_per_second": 1 / medians["graph"],
    }, medians


def batched(some: Sequence[Read]) -> list[Sequence[Read]]:
    return [some[at : at + PAGE] for at in range(0, len(some), PAGE)]


def graph(cluster: Cluster, page: Sequence[Read]) -> list[Any]:
    """Return the answers of a page, as the application reads it: together."""
    with cluster.reader() as session:
        asked = [(read.kind, read.id1, read.id2s) for read in page]
        return tao.page_of(session, asked, Kind.FOLLOWS, User, LIMIT)


def one_by_one(cluster: Cluster, page: Sequence[Read]) -> None:
    """Ask databases, a statement for each read."""
    with cluster.reader() as session:
        for read in page:
            answer_of(session, read)


def answer_of(session: Any, read: Read) -> Any:
    mine = (Assoc.id1 == read.id1, Assoc.atype == int(Kind.FOLLOWS))
    match read.kind:
        case "obj":
            return session.scalars(select(User).where(User.id == read.id1)).all()
        case "get":
            asked = select(Assoc.at, Assoc.id2).where(*mine, Assoc.id2.in_(read.id2s))
            return session.execute(asked).all()
        case "count":
            return session.scalars(select(func.count()).select_from(Assoc).where(*mine)).one()
        case _:
            edges = select(Assoc.at, Assoc.id2).where(*mine)
            newest = edges.order_by(Assoc.at.desc(), Assoc.id2.desc()).limit(LIMIT)
            return session.execute(newest).all()


def follow(cluster: Cluster, id1: int, id2: int) -> None:
    with cluster.writer() as session:
        user = tao.locked(session, id1)
        at = tao.next_time(session, id1, Kind.FOLLOWS, 0)
        if not tao.assoc_add(session, user, Kind.FOLLOWS, id2, at):
            tao.assoc_delete(session, user, Kind.FOLLOWS, id2)
        session.commit()


class Direct:
    """The same reads, each a prepared statement on the server that has the row."""

    def __init__(self, here: World) -> None:
        owners = here.topology.shard_map
        opened = {name: connect(shard) for name, shard in here.topology.physical.items()}
        for connection in opened.values():
            connection.prepare_threshold = 0
            connection.prepared_max = 1000
        self._by_shard: dict[int, psycopg.Connection[Any]] = {
            shard: connection
            for name, connection in opened.items()
            for shard in owners.owned_by(name)
        }

    def run(self, page: Sequence[Read]) -> list[Any]:
        """Return the rows of each read."""
        return [self._read(read) for read in page]

    def _read(self, read: Read) -> Any:
        shard = ids.shard_of(read.id1)
        run = self._by_shard[shard].execute
        schema = schema_name(shard)
        edges = f"SELECT at, id2 FROM {schema}.assocs WHERE id1 = %s AND atype = 1"
        match read.kind:
            case "obj":
                query = f"SELECT * FROM {schema}.users WHERE id = %s"
                return run(query, (read.id1,)).fetchall()
            case "get":
                query = f"{edges} AND id2 = ANY (%s)"
                return run(query, (read.id1, list(read.id2s))).fetchall()
            case "count":
                query = f"SELECT count(*) FROM {schema}.assocs WHERE id1 = %s AND atype = 1"
                return run(query, (read.id1,)).fetchall()
            case _:
                query = f"{edges} ORDER BY at DESC, id2 DESC LIMIT {LIMIT}"
                return run(query, (read.id1,)).fetchall()


def answers(direct: Direct, page: Sequence[Read]) -> list[Any]:
    """Return what the database says, in a form to compare."""
    found: list[Any] = []
    for read, rows in zip(page, direct.run(page), strict=True):
        match read.kind:
            case "obj":
                found.append({row[0] for row in rows})
            case "count":
                found.append(rows[0][0])
            case "get":
                found.append({row[1] for row in rows})
            case _:
                found.append([tuple(row) for row in rows])
    return found


def seen(cluster: Cluster, page: Sequence[Read]) -> list[Any]:
    found: list[Any] = []
    for read, answer in zip(page, graph(cluster, page), strict=True):
        match read.kind:
            case "obj" | "get":
                found.append(set(answer))
            case "count":
                found.append(answer)
            case _:
                found.append([tuple(edge) for edge in answer])
    return found
