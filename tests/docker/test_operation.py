"""What a person who runs the stack does and sees: Prometheus, doctor, status, the poolers' files."""

from __future__ import annotations

import json
from typing import Any

import httpx

from shardkit.testing import wait_until
from tests.fixtures.stack import Stack

SCRAPED = 60.0
"""Seconds until Prometheus has asked everybody twice."""


def test_prometheus_scrapes_everybody_by_the_rules(stack: Stack) -> None:
    url = stack.published("prometheus", 9090)

    def ask(path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{url}/api/v1/{path}", params=parameters, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def all_up() -> bool:
        targets = ask("targets")["activeTargets"]
        jobs = sorted(target["labels"]["job"] for target in targets)
        health = {target["health"] for target in targets}
        return jobs == ["lightbox", "lightbox", "postgres", "prometheus"] and health == {"up"}

    wait_until(all_up, SCRAPED, "every target is up")

    def all_servers() -> bool:
        found = ask("query", query="pg_server_is_replica")["result"]
        return sorted(each["value"][1] for each in found) == ["0"] * 2 + ["1"] * 6

    wait_until(all_servers, SCRAPED, "two primaries and six replicas are seen")

    def all_evaluated() -> bool:
        found = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        assert len(found) >= 15
        return all(rule["health"] == "ok" for rule in found)

    wait_until(all_evaluated, SCRAPED, "every rule has been evaluated")

    httpx.get(f"{stack.url}/healthz")
    counted = 'sum(http_requests_total{job="lightbox",route="/healthz"}) > 0'
    wait_until(lambda: bool(ask("query", query=counted)["result"]), SCRAPED, "requests are counted")


def test_doctor_finds_no_error(stack: Stack) -> None:
    done = stack.run("run", "--rm", "dba", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    errors = [each for each in found["findings"] if each["severity"] == "error"]
    assert not errors
    # What it warns of is known: nothing in here is encrypted, and poolers have one login.
    assert {each["check"] for each in found["findings"]} <= {"plain-text", "pooler-silent"}


def test_every_logical_shard_is_migrated(stack: Stack) -> None:
    drift = json.loads(stack.command("run", "--rm", "dba", "migrate", "drift", "--json"))
    assert drift["differences"] == []
    looked_at = [
        sum(len(shards) for shards in group.values()) for group in drift["fingerprints"].values()
    ]
    assert looked_at == [32, 32]


def test_the_poolers_files_are_those_of_now(stack: Stack) -> None:
    done = stack.run(
        *("run", "--rm", "--no-deps", "poolers", "/opt/lightbox/docker/render-poolers", "--check")
    )
    assert done.returncode == 0, done.stdout + done.stderr
