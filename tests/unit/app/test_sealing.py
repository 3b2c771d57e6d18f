"""What is sealed can be read with its key, and says nothing without it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.sealing import opened, sealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(key=st.text(min_size=1, max_size=64), answer=JSON)
def test_the_key_opens_it(key: str, answer: Any) -> None:
    assert opened(key, sealed(key, answer)) == answer


def test_without_the_key_it_says_nothing() -> None:
    answer = {"username": "ana.lima", "body": "What a light" * 20}
    first, second = sealed("a key", answer), sealed("a key", answer)
    assert first != second, "each has a salt"
    with pytest.raises((ValueError, UnicodeDecodeError)):
        opened("another key", first)
    json.dumps(first)
