"""Log positions as text, and what is said to servers that cannot be run here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.gates import lsn_of, lsn_text, wait_for


@given(st.integers(0, 2**64 - 1))
def test_a_log_position_survives_its_text(lsn: int) -> None:
    assert lsn_of(lsn_text(lsn)) == lsn_of(lsn_text(lsn).encode()) == lsn


def test_a_log_position_is_written_as_postgresql_does() -> None:
    assert lsn_text(0x1_0300_DAE8) == "1/300DAE8"


@pytest.mark.parametrize("lsn", [0, 0x1_0300_DAE8, 2**64 - 1])
def test_newer_servers_wait_by_a_statement_of_their_own(lsn: int) -> None:
    """Of PostgreSQL 19, which the embedded cluster does not run: only the text is tested."""
    expected = f"WAIT FOR LSN '{lsn_text(lsn)}' WITH (TIMEOUT '20ms', NO_THROW)"
    assert wait_for(lsn, 20) == expected.encode()
