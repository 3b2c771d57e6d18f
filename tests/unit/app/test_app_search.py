"""How texts are folded and compared, and what the cache of answers keeps."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from app.comments.schemas import CommentOut
from app.notifications.schemas import GroupOut, UnreadOut
from app.search.cached import LIFE, CachedSearch
from app.search.grams import folded, similarity, trigrams, words
from app.search.protocol import Found, TagFound
from app.search.schemas import SearchOut
from app.stories.schemas import StoryOut


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Zo\u00eb M\u00fcller", ["zoe", "muller"]),
        ("ana.lima_7", ["ana", "lima", "7"]),
        ("\uff21\uff4e\uff41 ANA", ["ana"]),
        ("\u041b\u0435\u043d\u0430", ["\u043b\u0435\u043d\u0430"]),
        ("' | !(); --", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_trigrams_are_those_of_pg_trgm() -> None:
    # SELECT show_trgm('word'), similarity('word', 'two words'): the manual's own example.
    assert trigrams("word") == {"  w", " wo", "wor", "ord", "rd "}
    assert similarity("word", "two words") == pytest.approx(0.36363637)


@given(st.text(max_size=40))
def test_folding_settles_and_words_can_be_a_query(text: str) -> None:
    assert folded(folded(text)) == folded(text)
    assert all(word.isalnum() for word in words(text))
    assert similarity(text, text) in {0.0, 1.0}


@dataclass
class Index:
    """Finds the same for everybody, and remembers who has asked."""

    asked: list[str] = field(default_factory=list)
    is_partial: bool = False

    async def people(self, text: str, n: int) -> Found[int]:
        self.asked.append(text)
        await asyncio.sleep(0)
        return Found([len(self.asked)], self.is_partial)

    async def hashtags(self, text: str, n: int) -> Found[TagFound]:
        return Found()


def test_an_answer_is_kept_for_seconds_and_asked_for_once() -> None:
    index, now = Index(), [0.0]
    cached = CachedSearch(index, clock=lambda: now[0])

    async def ask() -> None:
        answers = await asyncio.gather(*(cached.people("Ana", 5) for _ in range(3)))
        assert [each.items for each in answers] == [[1]] * 3
        now[0] += LIFE - 0.1
        assert (await cached.people("ana ", 5)).items == [1]
        assert (await cached.people("ana", 6)).items == [2]
        now[0] += 0.2
        assert (await cached.people("ana", 5)).items == [3]
        index.is_partial = True
        assert (await cached.people("ben", 5)).items == [4]
        assert (await cached.people("ben", 5)).items == [5]

    asyncio.run(ask())


@pytest.mark.parametrize("schema", [CommentOut, GroupOut, SearchOut, StoryOut, UnreadOut])
def test_examples_of_the_document_are_what_is_answered(schema: type[BaseModel]) -> None:
    document = schema.model_json_schema(mode="serialization")
    document = document.get("$defs", {}).get(schema.__name__, document)
    for example in document["examples"]:
        assert schema.model_validate(example).model_dump(mode="json") == example
