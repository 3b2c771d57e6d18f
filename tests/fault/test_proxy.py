"""The proxy breaks what it is told to break, and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest
import redis
from psycopg.conninfo import make_conninfo
from redis.backoff import NoBackoff
from redis.retry import Retry

from shardkit import Cluster
from shardkit.clock import SYSTEM
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.local.server import ServerKind
from shardkit.testing import Fault, FaultProxy, Way, When, wait_until
from shardkit.topology import Topology
from tests.fixtures.pauses import within
from tests.fixtures.proxies import Proxied
from tests.models import User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def proxy(local_cluster: LocalCluster) -> Iterator[FaultProxy]:
    """A link to the primary of alpha."""
    server = local_cluster.primary("alpha")
    with FaultProxy(server.host, server.port) as proxy:
        yield proxy


@pytest.fixture
def dsn(local_cluster: LocalCluster, proxy: FaultProxy) -> str:
    """How the admin login reaches it."""
    _, topology = load(local_cluster.config_path)
    url = topology.physical["alpha"].admin_url.set(
        drivername="postgresql", host=proxy.host, port=proxy.port
    )
    return make_conninfo(url.render_as_string(hide_password=False), sslmode="disable")


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
        yield connection
        connection.close()  # what is broken must not be rolled back


def seconds(work: object) -> float:
    """Return how long a function takes."""
    assert callable(work)
    before = SYSTEM.monotonic()
    work()
    return SYSTEM.monotonic() - before


def silent(connection: Connection, query: str = "SELECT 1") -> threading.Thread:
    """Run a query in a thread, for which nothing may ever come back."""

    def run() -> None:
        with pytest.raises(psycopg.OperationalError):
            connection.execute(query)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_counts_are_those_of_the_conversation(proxy: FaultProxy, connection: Connection) -> None:
    assert (proxy.counts.connections, proxy.counts.logins) == (1, 1)
    assert (proxy.counts.statements, proxy.counts.round_trips) == (0, 0)
    for _ in range(7):  # from the sixth on it is prepared
        connection.execute("SELECT %s::int", [1])
    assert (proxy.counts.statements, proxy.counts.round_trips) == (7, 8), "once to prepare"
    assert set(proxy.statements) == {"SELECT $1::int"}
    proxy.forget()
    with connection.pipeline():
        for number in range(50):
            connection.execute("SELECT %s::int + 1", [number])
    counts = proxy.counts
    assert counts.statements == 50
    assert counts.round_trips <= 3, "a pipeline is one turn, or a few"
    assert counts.bytes_to_server > 50 * 20 < counts.bytes_to_client


def test_latency_is_added_to_each_turn(proxy: FaultProxy, connection: Connection) -> None:
    proxy.shape(latency=0.1, jitter=0.02)
    with within(0.6):
        assert seconds(lambda: connection.execute("SELECT 1")) >= 0.2
    proxy.heal()
    with within(0.1):
        connection.execute("SELECT 1")


def test_a_thin_link_in_small_pieces_loses_no_byte(
    proxy: FaultProxy, connection: Connection
) -> None:
    text = "x" * 200_000
    proxy.shape(Way.TO_CLIENT, bandwidth=400_000, slice_bytes=1000)
    found: list[object] = []
    with within(3.0):
        took = seconds(
            lambda: found.extend(connection.execute("SELECT %s", [text]).fetchone() or ())
        )
    assert found == [text]
    assert took > 0.4
    proxy.heal()
    proxy.shape(slice_bytes=1)
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_reset_is_seen_by_both(proxy: FaultProxy, connection: Connection, dsn: str) -> None:
    pid = connection.info.backend_pid
    proxy.reset()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    with psycopg.connect(dsn) as other:
        wait_until(lambda: not alive(other, pid), 5.0, "the session has ended")


def alive(connection: Connection, pid: int) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE pid = %s"
    with connection.transaction():  # the view is as of its transaction
        return connection.execute(query, [pid]).fetchone() is not None


@pytest.mark.parametrize("fault", [Fault.HALF_OPEN, Fault.BLACK_HOLE])
def test_a_silence_has_no_end_until_it_heals(
    proxy: FaultProxy, connection: Connection, dsn: str, fault: Fault
) -> None:
    pid = connection.info.backend_pid
    proxy.on("SELECT 1", fault)
    waiting = silent(connection)
    with psycopg.connect(dsn) as other:
        if fault is Fault.HALF_OPEN:
            wait_until(lambda: not alive(other, pid), 5.0, "the server has been told")
        else:
            assert alive(other, pid)
    assert waiting.is_alive()
    proxy.heal()
    waiting.join(5.0)
    assert not waiting.is_alive(), "what was lost is lost, and both are told"


@pytest.mark.parametrize("way", list(Way))
def test_bytes_are_lost_in_one_direction(
    proxy: FaultProxy, connection: Connection, dsn: str, way: Way
) -> None:
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("DROP TABLE IF EXISTS public.heard; CREATE TABLE public.heard (n int)")
        hears = "SELECT count(*) FROM public.heard"
    proxy.black_hole(way)
    waiting = silent(connection, "INSERT INTO public.heard VALUES (1)")
    wait_until(lambda: proxy.counts.statements > 1, 5.0, "it was sent")
    if way is Way.TO_CLIENT:
        wait_until(lambda: proxy.counts.round_trips > 1, 5.0, "and answered")
    proxy.heal()
    waiting.join(5.0)
    with psycopg.connect(dsn) as other:
        assert other.execute(hears).fetchone() == (int(way is Way.TO_CLIENT),)
        other.execute("DROP TABLE public.heard")


def test_a_black_hole_accepts_and_says_nothing(proxy: FaultProxy, dsn: str) -> None:
    proxy.black_hole()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(dsn, connect_timeout=2)
    proxy.heal()
    psycopg.connect(dsn).close()


def test_a_stall_loses_nothing(proxy: FaultProxy, connection: Connection) -> None:
    proxy.stall()
    answers: list[object] = []
    thread = threading.Thread(
        target=lambda: answers.append(connection.execute("SELECT 1").fetchone())
    )
    thread.start()
    wait_until(lambda: proxy.counts.statements == 1, 5.0, "it was sent")
    assert not answers
    proxy.heal()
    thread.join(5.0)
    assert answers == [(1,)]


def test_a_refusal_ends_and_the_port_stays(
    proxy: FaultProxy, connection: Connection, dsn: str
) -> None:
    for _ in range(3):
        proxy.refuse()
        with pytest.raises(psycopg.OperationalError, match="Connection refused"):
            psycopg.connect(dsn)
        proxy.heal()
        psycopg.connect(dsn).close()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


@pytest.mark.parametrize("when", list(When))
@pytest.mark.parametrize("prepared", [False, True])
def test_the_third_commit_is_cut(proxy: FaultProxy, dsn: str, when: When, prepared: bool) -> None:
    """Before: the server never heard it. After: it is durable, and the client does not know."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("DROP TABLE IF EXISTS public.kept; CREATE TABLE public.kept (n int)")
    cut = proxy.on(r"^commit$", Fault.RESET, nth=3, when=when)
    connection = psycopg.connect(dsn)
    for n in (1, 2):
        connection.execute("INSERT INTO public.kept VALUES (%s)", [n], prepare=prepared)
        connection.commit()
    assert not cut.fired
    connection.execute("INSERT INTO public.kept VALUES (%s)", [3], prepare=prepared)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    connection.close()
    cut.wait(0)
    expected = [1, 2, 3] if when is When.AFTER else [1, 2]
    with psycopg.connect(dsn, autocommit=True) as admin:
        rows = admin.execute("SELECT n FROM public.kept ORDER BY n").fetchall()
        assert [n for (n,) in rows] == expected
        admin.execute("DROP TABLE public.kept")


def test_a_prepared_statement_is_known_by_its_text(
    proxy: FaultProxy, connection: Connection
) -> None:
    for _ in range(3):
        connection.execute("SELECT 'marked', %s::int", [1], prepare=True)
    held = proxy.on("marked", Fault.HOLD)
    thread = threading.Thread(
        target=lambda: connection.execute("SELECT 'marked', %s::int", [1], prepare=True)
    )
    thread.start()
    held.wait(5.0)
    assert thread.is_alive()
    held.release()
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_trigger_delays_and_calls(proxy: FaultProxy, connection: Connection) -> None:
    calls: list[int] = []
    proxy.on("called", lambda: calls.append(1), nth=2, times=2)
    for _ in range(5):
        connection.execute("SELECT 'called'")
    assert calls == [1, 1]
    for when in When:
        slow = proxy.on("slow", 0.2, when=when)
        assert seconds(lambda: connection.execute("SELECT 'slow'")) >= 0.2
        assert slow.fired
    never = proxy.on("never", Fault.RESET)
    with pytest.raises(AssertionError, match=r"message 1 like 'never' \(seen: 0\)"):
        never.wait(0.01)


def test_what_a_function_raises_is_told(local_cluster: LocalCluster) -> None:
    server = local_cluster.server("redis")
    proxy = FaultProxy(server.host, server.port, protocol="tcp")
    proxy.start()
    wrong = proxy.on("PING", lambda: 1 / 0)
    assert spoken(proxy, b"PING\r\n") == b"+PONG\r\n"
    with pytest.raises(ZeroDivisionError):
        wrong.wait(5.0)
    with pytest.raises(ZeroDivisionError):
        proxy.stop()
    proxy.stop()


def spoken(proxy: FaultProxy, request: bytes) -> bytes:
    """Return the first bytes of the answer."""
    with socket.create_connection((proxy.host, proxy.port), timeout=5.0) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def test_redis_and_memcached_have_messages_too(local_cluster: LocalCluster) -> None:
    server = local_cluster.server("redis")
    with (
        FaultProxy(server.host, server.port, protocol="tcp") as proxy,
        redis.Redis(proxy.host, proxy.port, socket_timeout=20.0) as client,
        redis.Redis(
            proxy.host, proxy.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 1)
        ) as hasty,
    ):
        client.set("proxy", "here")
        proxy.forget()
        assert client.get("proxy") == b"here"
        assert proxy.counts.round_trips == 1
        proxy.on("GET", Fault.BLACK_HOLE, times=None, when=When.AFTER)  # the client retries
        with pytest.raises(redis.TimeoutError):
            hasty.get("proxy")
        client.delete("proxy")
    server = next(s for s in local_cluster.servers if s.kind is ServerKind.MEMCACHED)
    with FaultProxy(server.host, server.port, protocol="tcp") as proxy:
        assert spoken(proxy, b"version\r\n").startswith(b"VERSION")
        proxy.on("^version", Fault.CLOSE)
        assert spoken(proxy, b"version\r\n") == b""
        proxy.on("^version", Fault.RESET)
        with pytest.raises(ConnectionResetError):
            spoken(proxy, b"version\r\n")


def test_a_server_that_is_not_there_is_a_connection_that_breaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with FaultProxy(None, port) as proxy, pytest.raises(ConnectionResetError):
        spoken(proxy, b"\0\0\0\x08\x04\xd2\x16\x2f")


def test_nothing_is_left(local_cluster: LocalCluster, dsn: str) -> None:
    threads = threading.active_count()
    server = local_cluster.primary("alpha")
    with FaultProxy(server.host, server.port) as proxy:
        idle = [psycopg.connect(make_conninfo(dsn, port=proxy.port)) for _ in range(5)]
        proxy.black_hole()
        waiting = silent(idle[0])
        wait_until(lambda: proxy.counts.statements == 1, 5.0, "it was sent")
        assert proxy.open_connections == 5
    waiting.join(5.0)
    for connection in idle:
        connection.close()
    assert threading.active_count() == threads
    with pytest.raises(psycopg.OperationalError, match="Connection refused"):
        psycopg.connect(make_conninfo(dsn, port=proxy.port))


def test_a_cluster_goes_through(topology: Topology, proxied: Proxied) -> None:
    alpha = topology.physical["alpha"].primary
    through, proxy = proxied(topology, alpha)
    assert through.physical["alpha"].primary.url.port == proxy.port
    assert through.physical["beta"] == topology.physical["beta"]
    with Cluster(through) as cluster:
        cluster.connections.placement = lambda _: 0
        with cluster.writer() as session:
            session.add(User(name="ana"))
            session.commit()
    assert any(text.startswith("INSERT INTO shard_0000.users") for text in proxy.statements)
    assert "COMMIT" in proxy.statements
