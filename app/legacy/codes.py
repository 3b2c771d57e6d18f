"""The short codes of photos in old addresses: numbers written with 52 letters. No I/O.

The old service counted its photos from 0. Letters only, so no code looks like an id of today.
"""

from __future__ import annotations

import string
from typing import Final

__all__ = ["LONGEST", "code_of", "number_of"]

_LETTERS: Final = string.ascii_uppercase + string.ascii_lowercase
_NUMBERS: Final = {letter: number for number, letter in enumerate(_LETTERS)}
LONGEST: Final = 11
"""Letters of a code at most: numbers below 52^11, which is less than 2^63."""


def code_of(number: int) -> str:
    """Return the code of a photo's old number, from 0 to 52^11 - 1."""
    code = ""
    while True:
        number, last = divmod(number, len(_LETTERS))
        code = _LETTERS[last] + code
        if not number:
            return code


def number_of(code: str) -> int | None:
    """Return the number that a code stands for; None for what was no code of a photo.

    Each number has one code: with more letters "A" in front it is no code.
    """
    if not 0 < len(code) <= LONGEST or (code[0] == _LETTERS[0] and len(code) > 1):
        return None
    number = 0
    for letter in code:
        if letter not in _NUMBERS:
            return None
        number = number * len(_LETTERS) + _NUMBERS[letter]
    return number
