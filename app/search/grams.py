"""Texts as a search sees them: folded, in words, and in trigrams. Pure.

Trigrams and their similarity are those of PostgreSQL's pg_trgm (manual, F.35): each word with two
spaces before and one behind, cut into all its runs of three. Kept as arrays of text with a GIN
index, which is part of PostgreSQL itself; pg_trgm is an extension that not every server has.
Folding also takes marks off letters, as the extension unaccent does.
"""

from __future__ import annotations

import unicodedata

__all__ = ["folded", "similarity", "trigrams", "words"]


def folded(text: str) -> str:
    """Return a text without case, marks and compatibility forms.

    Example:
        >>> folded("Zo\u00eb \uff21")
        'zoe a'
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = (each for each in plain if not unicodedata.combining(each) and _can_be_stored(each))
    return unicodedata.normalize("NFKC", "".join(kept)).casefold()


def _can_be_stored(character: str) -> bool:
    return character != "\x00" and not "\ud800" <= character <= "\udfff"


def words(text: str) -> list[str]:
    """Return the words of a text, folded: runs of letters and digits, each once, in order."""
    spaced = "".join(
        each if unicodedata.category(each)[0] in "LN" else " " for each in folded(text)
    )
    return list(dict.fromkeys(spaced.split()))


def trigrams(text: str) -> set[str]:
    """Return the trigrams of the words of a text.

    Example:
        >>> sorted(trigrams("Ana"))
        ['  a', ' an', 'ana', 'na ']
    """
    found: set[str] = set()
    for word in words(text):
        padded = f"  {word} "
        found.update(padded[at : at + 3] for at in range(len(padded) - 2))
    return found


def similarity(one: str, other: str) -> float:
    """Return how alike two texts are: the share of their trigrams that both have, 0 to 1."""
    first, second = trigrams(one), trigrams(other)
    return len(first & second) / len(first | second) if first or second else 0.0
