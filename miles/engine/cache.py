"""Rows of the key-value cache: who holds which, and what prompts they already contain.

A row holds the keys and values of one sequence, token by token. A row whose sequence has ended keeps its contents until the row
is needed again, so that a prompt that begins like an earlier or a running one starts from a copy of that row
(or from the row itself). Every row's tokens are in one array, so the longest match is one comparison.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KEEP = 0.5  # a free row is taken over, not copied, when at least this part of it is of use


class Rows:
    """`rows` rows of at most `length` tokens."""

    def __init__(self, rows: int, length: int):
        self.width = length
        self.token = np.full((rows, length), -1, dtype=np.int32)
        self.length = np.zeros(rows, dtype=np.int64)  # tokens whose keys are there
        self._running = np.zeros(rows, dtype=bool)
        self._current = np.ones(rows, dtype=bool)  # false: written by older weights, never matched
        self._key = np.full(rows, "", dtype=object)
        self._used = np.zeros(rows, dtype=np.int64)  # when the row was last used, on a clock of events
        self._clock = 0

    @property
    def running_tokens(self) -> int:
        """Tokens of running rows."""
        return int(self.length[self._running].sum())

    @property
    def free_rows(self) -> int:
        """Rows that no sequence runs in."""
        return int((~self._running).sum())

    def match(self, tokens: NDArray[np.int32], key: str) -> tuple[int, int]:
        """(row, count): the row that shares the longest prefix with `tokens`, and its length; (-1, 0) without any."""
        able = np.flatnonzero(self._current & (self.length > 0) & (self._key == key))
        if not len(able) or not len(tokens):
            return -1, 0
        able = able[self.token[able, 0] == tokens[0]]
        if not len(able):
            return -1, 0
        different = self.token[able, : len(tokens)] != tokens[: self.width]
        common = np.where(different.any(axis=1), different.argmax(axis=1), different.shape[1])
        common = np.minimum(common, self.length[able])
        best = int(np.lexsort((~self._running[able], common))[-1])  # of equals a free row, which may be taken over
        return int(able[best]), int(common[best])

    def take(self, tokens: NDArray[np.int32], source: int, count: int, key: str) -> int:
        """A row for a sequence of these tokens, of which `count` come from row `source`; equals `source` when it is taken over."""
        assert not self._running.all(), "the scheduler looks for a free row first"
        if source >= 0 and not self._running[source] and count >= _KEEP * self.length[source]:
            row = source
        else:
            free = np.flatnonzero(~self._running)
            others = free[free != source]
            free = others if len(others) else free
            row = int(free[np.lexsort((self._used[free], self.length[free] > 0))[0]])  # an empty one, else the longest unused
        self._running[row], self._current[row], self._key[row] = True, True, key
        self.token[row, : len(tokens)] = tokens
        self.length[row] = count
        self._touch(row)
        return row

    def grow(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """One more token for each row; returns their positions i64."""
        position = self.length[rows]
        self.token[rows, position] = tokens
        self.length[rows] = position + 1
        return position

    def give(self, row: int) -> None:
        """The sequence is done with its row; what it computed stays to be matched."""
        self._running[row] = False
        if not self._current[row]:
            self.length[row] = 0
        self._touch(row)

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock

    def forget(self) -> None:
        """Empties free rows; running ones keep their contents to themselves."""
        self._current[:] = False
        self.length[~self._running] = 0
