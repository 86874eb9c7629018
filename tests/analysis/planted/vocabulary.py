"""Tokens as strings, so that one text has several tokenizations: strings of one to three letters of six, and longer ones to fill up."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from planted.model import VOCABULARY

LETTERS = "aeinst"
STOP = 2  # ids below it end a response; they have no text


def _strings() -> list[str]:
    every = ("".join(letters) for length in (1, 2, 3, 4) for letters in product(LETTERS, repeat=length))
    return [""] * STOP + [text for text, _ in zip(every, range(VOCABULARY - STOP), strict=False)]


STRINGS = _strings()
IDS = {text: index for index, text in enumerate(STRINGS) if text}


def text_of(token: NDArray[np.integer]) -> str:
    """Their text; stops have none."""
    return "".join(STRINGS[each] for each in token)


@cache
def tokenizations(text: str, count: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write a text with `count` tokens."""
    if count == 0:
        return () if text else ((),)
    heads = (text[:length] for length in range(1, min(len(text), 4) + 1))
    return tuple((IDS[head], *rest) for head in heads if head in IDS for rest in tokenizations(text[len(head) :], count - 1))


def retokenised(token: NDArray[np.int32], first: int, rate: float, rng: np.random.Generator) -> NDArray[np.int32]:
    """Another tokenization of the same text: from `first` on, pairs of tokens are written otherwise with probability `rate`.

    A pair becomes one, two or three other tokens, each as likely where the text allows it; so the length may change.
    """
    made: list[int] = token[:first].tolist()
    place = first
    while place < len(token):
        pair = token[place : place + 2]
        if len(pair) == 2 and pair.min() >= STOP and rng.random() < rate:
            ways = {count: [way for way in tokenizations(text_of(pair), count) if way != tuple(pair)] for count in (1, 2, 3)}
            possible = [each for each in ways.values() if each]
            if possible:
                kind = possible[rng.integers(len(possible))]
                made += kind[rng.integers(len(kind))]
                place += 2
                continue
        made.append(int(token[place]))
        place += 1
    return np.array(made, np.int32)
