"""Finds hashtags and mentions in what people write. Pure; one pass, in time linear in the text.

A hashtag is `#` and a word in any script, with its marks: letters, digits and `_`, at least one
letter, up to `MAX_TAG` characters once folded. Two spellings that look or mean the same are one
tag: NFKC and casefold, as Unicode's NFKC_Casefold (Unicode 16, section 3.13) without its removal
of what cannot be seen, which is not part of a word here. A mention is `@` and a username. Both
begin a word: addresses of mail, fragments of URLs and HTML entities are left alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from app.accounts.usernames import canonical

__all__ = [
    "HASHES",
    "MAX_MENTIONS",
    "MAX_TAG",
    "MAX_TAGS",
    "Kind",
    "Segment",
    "canonical_tag",
    "mentions",
    "segments",
    "tags",
]

MAX_TAG: Final = 64
"""Characters of a tag."""

MAX_TAGS: Final = 30
"""Tags of one text that count; further ones are links and nothing else."""

MAX_MENTIONS: Final = 20
"""People of one text who are told."""

HASHES: Final = "#\uff03"
"""What a tag begins with."""

_GLUE: Final = frozenset("#\uff03@&/")
"""Before a sign these say that no word begins there, as letters do."""

_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._")


class Kind(Enum):
    """What a piece of a text is."""

    PLAIN = "plain"
    TAG = "tag"
    MENTION = "mention"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a text.

    Attributes:
        kind: what it is.
        text: as it was written.
        name: the canonical tag or username; empty for plain text.
    """

    kind: Kind
    text: str
    name: str = ""


def segments(text: str) -> list[Segment]:
    """Cut a text into pieces; together they are the text.

    Example:
        >>> [(each.kind.value, each.name) for each in segments("#Light for @ana.")]
        [('tag', 'light'), ('plain', ''), ('mention', 'ana'), ('plain', '')]
    """
    found: list[Segment] = []
    start = here = tag_end = 0
    while here < len(text):
        sign = text[here]
        begins = here == 0 or not _is_glued(text[here - 1]) or here == tag_end
        end = here + 1
        if begins and (sign == "@" or sign in HASHES):
            kind = Kind.MENTION if sign == "@" else Kind.TAG
            end = _name_end(text, end) if sign == "@" else _word_end(text, end)
            if name := (_mention if sign == "@" else _tag)(text, here + 1, end):
                if start < here:
                    found.append(Segment(Kind.PLAIN, text[start:here]))
                found.append(Segment(kind, text[here:end], name))
                start = end
                tag_end = end if kind is Kind.TAG else 0
        here = end
    if start < len(text):
        found.append(Segment(Kind.PLAIN, text[start:]))
    return found


def tags(text: str) -> list[str]:
    """Return the first `MAX_TAGS` tags of a text, each once, in order."""
    return _first(MAX_TAGS, (s.name for s in segments(text) if s.kind is Kind.TAG))


def mentions(text: str) -> list[str]:
    """Return the first `MAX_MENTIONS` usernames of a text, each once, in order."""
    return _first(MAX_MENTIONS, (s.name for s in segments(text) if s.kind is Kind.MENTION))


def canonical_tag(text: str) -> str:
    """Return the one form of a tag, however it was typed, with or without `#`.

    Raises:
        ValueError: this is no tag.
    """
    word = text.strip()
    if word[:1] and word[0] in HASHES:
        word = word[1:]
    if not word or _word_end(word, 0) != len(word) or not (name := _folded(word)):
        raise ValueError(f"must be a word of up to {MAX_TAG} letters, digits or _, with a letter")
    return name


def _first(n: int, names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))[:n]


def _is_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def _is_glued(character: str) -> bool:
    return character in _GLUE or _is_word(character)


def _word_end(text: str, start: int) -> int:
    end = start
    while end < len(text) and _is_word(text[end]):
        end += 1
    return end


def _name_end(text: str, start: int) -> int:
    end = start
    while end < len(text) and text[end] in _NAME:
        end += 1
    while end > start and text[end - 1] == ".":  # the end of a sentence
        end -= 1
    return end


def _tag(text: str, start: int, end: int) -> str:
    return _folded(text[start:end])


def _mention(text: str, start: int, end: int) -> str:
    """Return the username, or nothing: also where a word goes on that is no name."""
    if end < len(text) and (_is_word(text[end]) or text[end] == "@"):
        return ""
    try:
        return canonical(text[start:end])
    except ValueError:
        return ""


def _folded(word: str) -> str:
    """Return a word as a tag, or nothing if it is none."""
    if not 0 < len(word) <= 4 * MAX_TAG:
        return ""
    for folded in _foldings(word):
        if folded == word:
            break
        word = folded
    is_tag = len(word) <= MAX_TAG and all(map(_is_word, word))
    return word if is_tag and any(unicodedata.category(c)[0] == "L" for c in word) else ""


def _foldings(word: str) -> Iterator[str]:
    """Yield a word folded again and again: one step may give what the next one changes."""
    rounds: Sequence[None] = [None] * 4
    for _ in rounds:
        word = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
        yield word
