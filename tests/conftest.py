"""The plugins of the test suite; nothing else."""

pytest_plugins = [
    "tests.fixtures.servers",
    "tests.fixtures.service",
    "tests.fixtures.sharded",
    "tests.fixtures.site",
    "tests.fixtures.skips",
    "tests.fixtures.sockets",
]
