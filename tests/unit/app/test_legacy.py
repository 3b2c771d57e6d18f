"""The codes of old addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.legacy.codes import code_of, number_of


@given(st.integers(0, 52**11 - 1))
def test_a_number_has_one_code(number: int) -> None:
    code = code_of(number)
    assert code.isalpha()
    assert number_of(code) == number


@given(st.text(max_size=13))
def test_a_code_has_one_number(code: str) -> None:
    number = number_of(code)
    assert number is None or code_of(number) == code


@pytest.mark.parametrize("code", ["", "A1", "AB", "a" * 12, "é", "a b", "z" * 12])
def test_what_was_no_code(code: str) -> None:
    assert number_of(code) is None
