from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from app.ids import Id, IdText, parse_id
from app.paging import Page, cut
from shardkit.ids import MAX_ID


@given(st.integers(0, MAX_ID))
def test_an_id_survives_the_way_to_the_client_and_back(number: int) -> None:
    class Body(BaseModel):
        id: IdText

    text = Body(id=number).model_dump_json()
    assert text == f'{{"id":"{number}"}}'
    assert Body.model_validate_json(text).id == number
    assert parse_id(str(number)) == number


@given(st.text(max_size=30))
def test_only_canonical_text_is_an_id(text: str) -> None:
    try:
        number = parse_id(text)
    except ValueError:
        return
    assert str(number) == text


@pytest.mark.parametrize(
    "value",
    ["", "-1", "+1", " 1", "1 ", "01", "1_0", "1.0", "\u0661", str(MAX_ID + 1), True, 1.0, None],
)
def test_what_is_no_id(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python(value)


def test_a_page_knows_whether_more_follow() -> None:
    assert cut([9, 8, 7], 3, lambda n: n) == ([9, 8, 7], None)
    assert cut([9, 8, 7, 6], 3, lambda n: n) == ([9, 8, 7], 7)
    assert cut([], 3, lambda n: n) == ([], None)
    assert Page[int](items=[1], next_cursor=MAX_ID).model_dump()["next_cursor"] == str(MAX_ID)
