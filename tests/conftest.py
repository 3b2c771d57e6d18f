"""The plugins of the test suite; nothing else."""

pytest_plugins = [
    "tests.fixtures.caches",
    "tests.fixtures.folders",
    "tests.fixtures.lateness",
    "tests.fixtures.order",
    "tests.fixtures.poolers",
    "tests.fixtures.proxies",
    "tests.fixtures.redis_clusters",
    "tests.fixtures.servers",
    "tests.fixtures.service",
    "tests.fixtures.sharded",
    "tests.fixtures.roled",
    "tests.fixtures.signals",
    "tests.fixtures.site",
    "tests.fixtures.skips",
    "tests.fixtures.sockets",
    "tests.fixtures.stack",
    "tests.fixtures.unattended",
    "tests.fixtures.visitors",
    "tests.fixtures.backups",
    "tests.fixtures.blobs",
]
