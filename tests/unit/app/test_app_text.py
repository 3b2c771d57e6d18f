from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.accounts.schemas import ProfilePatch, SignUp
from app.accounts.usernames import canonical
from app.comments.schemas import CommentIn
from app.web.replies import local_path


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Ana", "ana"),
        (" @ana.lima ", "ana.lima"),
        ("\uff21\uff4e\uff41", "ana"),
        ("stra\u00dfe", "strasse"),
        ("a_1.b", "a_1.b"),
        ("abc", "abc"),
        ("a" * 30, "a" * 30),
    ],
)
def test_one_name_for_all_ways_of_writing_it(typed: str, name: str) -> None:
    assert canonical(typed) == name


@pytest.mark.parametrize(
    "typed",
    [
        "", "ab", "a" * 31, ".ana", "ana.", "a..b", "a._b", "an a", "an\u0430",
        "\u0430\u043d\u0430", "a\nb", "ana\x00", "admin", "ADMIN", "@", "a/b", "\ud800aa",
    ],
)  # fmt: skip
def test_names_nobody_can_have(typed: str) -> None:
    with pytest.raises(ValueError, match=r"must have|reserved"):
        canonical(typed)


@given(st.text(max_size=40))
def test_a_canonical_name_is_its_own_canonical_name(typed: str) -> None:
    try:
        name = canonical(typed)
    except ValueError:
        return
    assert canonical(name) == name
    assert name.isascii()


@given(st.text(max_size=100))
def test_accepted_text_can_be_stored(text: str) -> None:
    try:
        body = CommentIn(body=text).body
    except ValidationError:
        return
    assert body
    assert "\x00" not in body
    body.encode()
    assert unicodedata.is_normalized("NFC", body)


def test_lines_and_paragraphs() -> None:
    patch = ProfilePatch(display_name="  Ana \n Lima ", bio=" one\r\ntwo ")
    assert patch.display_name == "Ana Lima"
    assert patch.bio == "one\ntwo"


@pytest.mark.parametrize(
    ("password", "fits"),
    [("x" * 7, False), ("x" * 8, True), (" " * 8, True), ("x" * 1024, True), ("x" * 1025, False),
     ("\u00e9" * 512, True), ("\u00e9" * 513, False), ("\x00" * 8, True), ("\ud800" * 8, False)],
)  # fmt: skip
def test_passwords_are_measured_in_bytes_and_kept(password: str, fits: bool) -> None:
    try:
        assert SignUp(username="ana", password=password).password == password
    except ValidationError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/p/1", "/p/1"),
        ("/u/ana?cursor=3#p1", "/u/ana?cursor=3#p1"),
        ("", "/"),
        ("p/1", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("/a\r\nset-cookie: x=1", "/"),
        ("/\u2028", "/"),
    ],
)
def test_redirects_stay_here(text: str, path: str) -> None:
    assert local_path(text) == path
