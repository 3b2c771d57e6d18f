"""What counts as a tag and as a mention, in any script, and what never happens to a text."""

from __future__ import annotations

import html
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.tags.parser import (
    MAX_MENTIONS,
    MAX_TAG,
    MAX_TAGS,
    Kind,
    canonical_tag,
    mentions,
    segments,
    tags,
)
from app.web.rendering import linked

PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            ["#", "@", "\uff03", "_", ".", " ", "&", "/", "ana", "\u0301", "\u200d", "7", "\n"]
        ),
        st.text(max_size=4),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#Light at #dawn, #LIGHT!", ["light", "dawn"]),
        ("\uff03\u7f8e\u98df and #\u0627\u0644\u0628\u062d\u0631", ["\u7f8e\u98df", "\u0627\u0644\u0628\u062d\u0631"]),
        ("#\u0928\u092e\u0938\u094d\u0924\u0947 #Stra\u00dfe", ["\u0928\u092e\u0938\u094d\u0924\u0947", "strasse"]),
        ("#caf\u00e9 #cafe\u0301", ["caf\u00e9"]),
        ("#\uff21\uff22 #ab", ["ab"]),
        ("#a#b", ["a", "b"]),
        ("#a_1 #_", ["a_1"]),
        ("#1 #2026 # #! C# a#b &#39; x/#frag ##c", []),
        (f"#{'a' * MAX_TAG} #{'b' * (MAX_TAG + 1)}", ["a" * MAX_TAG]),
        ("#\ufdfa", []),  # folds to words with spaces between them
    ],
)  # fmt: skip
def test_tags(text: str, found: list[str]) -> None:
    assert tags(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("@Ana and @ben.b. (@cleo_1)", ["ana", "ben.b", "cleo_1"]),
        ("@ana @ANA", ["ana"]),
        ("a@ana.com me@ana @ana@host @an\u00e9 @ab @.ana @admin @@ana", []),
    ],
)
def test_mentions(text: str, found: list[str]) -> None:
    assert mentions(text) == found


def test_what_one_text_can_do_is_bounded() -> None:
    text = " ".join(f"#t{n} @user{n}" for n in range(100))
    assert len(tags(text)) == MAX_TAGS
    assert len(mentions(text)) == MAX_MENTIONS


@given(PIECES)
@example("#\ud800 @\udfff")
def test_nothing_of_a_text_is_lost_or_changed(text: str) -> None:
    found = segments(text)
    assert "".join(segment.text for segment in found) == text
    assert all(segment.text for segment in found)
    assert all(bool(segment.name) is (segment.kind is not Kind.PLAIN) for segment in found)


@given(PIECES)
@example("#\u0345a")
@example("#\u1e9e")
def test_a_tag_has_one_form_that_finds_itself(text: str) -> None:
    for name in tags(text):
        assert 1 <= len(name) <= MAX_TAG
        assert unicodedata.is_normalized("NFC", name)
        assert canonical_tag(name) == name
        assert canonical_tag(f" #{name} ") == name
        assert tags(f"({'#' + name})") == [name]


@given(PIECES)
def test_a_page_shows_a_text_as_it_is(text: str) -> None:
    written = str(linked(f"<script>{text}"))
    assert html.unescape(re.sub(r"<a href=\"/[^\"<>]*\">|</a>", "", written)) == f"<script>{text}"
    assert "<script" not in written


def test_tags_and_names_become_links_and_nothing_else() -> None:
    assert linked('<b>"x"</b> #\u00e9 @ana &') == (
        "&lt;b&gt;&#34;x&#34;&lt;/b&gt; "
        '<a href="/tags/%C3%A9">#\u00e9</a> <a href="/u/ana">@ana</a> &amp;'
    )
