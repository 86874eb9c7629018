"""What shards say of whole sequences: numbers, engines and sources by name, and runs of one weight version, of several shards as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.columns import Sheet

NUMBERS = {
    "prompt_length": np.int64, "draw": np.uint64, "sample": np.uint64, "reward": np.float64, "status": np.int64, "engine": np.int64, "source": np.int64,
    "cached_tokens": np.int64,
}  # fmt: skip
NAMED = {"engine": "engines", "source": "sources"}  # numbers that point into a list of names, and where a shard has it
UNKNOWN = "unknown"  # a number without a name


@dataclass(eq=False)
class Part:
    """A shard: its rows' numbers."""

    sheet: Sheet
    offset: NDArray[np.int64]
    numbers: dict[str, NDArray[Any]]
    engines: list[str]
    sources: list[str]
    run_sequence: NDArray[np.int64]
    run_start: NDArray[np.int64]
    run_version: NDArray[np.int64]


@dataclass
class Rows:
    """Rows of some shards, one shard's after another's.

    first i64 [shards]: where those of each begin. numbers [rows] by name, of the types of NUMBERS, those of NAMED as places in names. Runs:
    those of row i are run_first[i] to run_first[i + 1] (exclusive) of run_start (tokens) and run_version.
    """

    first: NDArray[np.int64]
    numbers: dict[str, NDArray[Any]]
    names: dict[str, list[str]]
    run_first: NDArray[np.int64]
    run_start: NDArray[np.int64]
    run_version: NDArray[np.int64]


def rows_of(parts: Sequence[Part]) -> Rows:
    """All rows of these shards; an engine or source of several shards is one."""
    first = np.cumsum([0, *(len(part.offset) - 1 for part in parts)])[:-1]
    numbers: dict[str, NDArray[Any]] = {
        name: np.concatenate([part.numbers[name] for part in parts], dtype=kind, casting="unsafe") for name, kind in NUMBERS.items() if name not in NAMED
    }
    names: dict[str, list[str]] = {}
    for name, lists in NAMED.items():
        place: dict[str, int] = {}
        found = []
        for part in parts:
            known = np.array([place.setdefault(each, len(place)) for each in (*getattr(part, lists), UNKNOWN)], np.int64)
            found.append(known[np.minimum(part.numbers[name].astype(np.uint64), len(known) - 1)])
        numbers[name], names[name] = np.concatenate(found), list(place)
    runs = np.concatenate([[0], *(np.bincount(part.run_sequence, minlength=len(part.offset) - 1) for part in parts)])
    start, version = (np.concatenate([getattr(part, name) for part in parts]) for name in ("run_start", "run_version"))
    return Rows(first, numbers, names, np.cumsum(runs), start, version)
