"""The plugins of the test suite; nothing else."""

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.skips", "tests.fixtures.site"]
