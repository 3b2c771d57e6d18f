"""What a breaker costs a server in good health, beside pybreaker's own call and none at all.

In one thread, CPU time, interleaved: a call of a function that does nothing, bare, between
`admit` and `succeeded`, and through `pybreaker.CircuitBreaker.call`; what the bare call takes is
taken off. The duration told to `succeeded` is given: sessions measure it anyway, for the choice
of replicas and the concurrency limit. With both readings of the clock added it is
`timed_success_cost_vs_pybreaker`. In 16 threads, wall time, in turns: calls that wait 10 ms, as a
round trip does. What an outage costs is measured on real servers: `benchmarks.outage`.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import pybreaker

from benchmarks.measure import interleaved, report
from benchmarks.outage import outages
from shardkit.breaker import Breaker
from shardkit.limits import ConcurrencyLimit

PEERS = ("pybreaker.CircuitBreaker",)
TARGETS = {
    "success_cost_vs_pybreaker": "≤ 0.1",
    "success_ns": "≤ 200",
    "concurrency_share": "≥ 0.95",
    "calls_until_open": "≤ 25",
    "retry_amplification": "≤ 1.12",
    "healthy_shards_throughput": "≥ 0.97",
}
THREADS = 16
WAIT = 0.01


def main(*, as_json: bool, quick: bool = False) -> None:
    costs = successes(rounds=30 if quick else 150)
    rates = shares(rounds=3 if quick else 9, seconds=1.0 if quick else 2.0)
    ours, timed, theirs, limit = (
        costs[name] - costs["bare"]
        for name in ("admit, succeeded", "admit, clock, succeeded", "pybreaker", "limit")
    )
    figures = {
        "success_cost_vs_pybreaker": ours / theirs,
        "success_ns": ours * 1e9,
        "timed_success_cost_vs_pybreaker": timed / theirs,
        "limit_ns": limit * 1e9,
        "pybreaker_success_ns": theirs * 1e9,
        "concurrency_share": rates["breaker"] / rates["bare"],
        "pybreaker_concurrency_share": rates["pybreaker"] / rates["bare"],
        "calls_until_open": calls_until_open(),
        **outages(quick=quick),
    }
    medians = {f"{name}, per call": seconds for name, seconds in costs.items()}
    medians |= {f"{name}, 16 threads, per call": 1 / rate for name, rate in rates.items()}
    report("breaker", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def successes(rounds: int, calls: int = 10_000) -> dict[str, float]:
    """Return median CPU seconds of a call that succeeds."""
    ours, theirs, limit = Breaker("bench"), pybreaker.CircuitBreaker(), ConcurrencyLimit("bench")
    clock = time.monotonic

    def work() -> None:
        pass

    def bare() -> None:
        for _ in range(calls):
            work()

    def breaker() -> None:
        for _ in range(calls):
            probe = ours.admit()
            work()
            ours.succeeded(WAIT, probe)

    def timed() -> None:
        for _ in range(calls):
            probe = ours.admit()
            began = clock()
            work()
            ours.succeeded(clock() - began, probe)

    def limited() -> None:
        for _ in range(calls):
            limit.acquire()
            work()
            limit.release(WAIT)

    def called() -> None:
        for _ in range(calls):
            theirs.call(work)

    arms = {
        "bare": bare,
        "admit, succeeded": breaker,
        "admit, clock, succeeded": timed,
        "limit": limited,
        "pybreaker": called,
    }
    times = interleaved(arms, rounds=rounds, warm_up=3, timer=time.process_time)
    return {name: seconds / calls for name, seconds in times.items()}


def shares(*, rounds: int, seconds: float) -> dict[str, float]:
    """Return median calls per second of 16 threads together."""
    ours, theirs = Breaker("bench"), pybreaker.CircuitBreaker()

    def work() -> None:
        time.sleep(WAIT)

    arms: dict[str, Callable[[], object]] = {
        "bare": work,
        "breaker": lambda: ours.call(work),
        "pybreaker": lambda: theirs.call(work),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            rates[name].append(rate(call, seconds))
    return {name: statistics.median(measured) for name, measured in rates.items()}


def rate(call: Callable[[], object], seconds: float) -> float:
    """Return how often a second the threads made a call, from the first to the last."""
    counts = [0] * THREADS
    begin = threading.Barrier(THREADS + 1)
    stop = threading.Event()

    def repeat(number: int) -> None:
        begin.wait()
        while not stop.is_set():
            call()
            counts[number] += 1

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def calls_until_open() -> int:
    """Return how many calls a server that fails four of five gets before it is left alone."""
    breaker = Breaker("bench")
    calls = 0
    while breaker.is_closed and calls < 1000:
        if calls % 5 == 4:
            breaker.succeeded(WAIT)
        else:
            breaker.failed(ConnectionResetError(), WAIT)
        calls += 1
    return calls
