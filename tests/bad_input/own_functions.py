"""Functions of a user who made a mistake: a reward, a builder."""

from __future__ import annotations

from pathlib import Path

NOT_A_FUNCTION = 1


def raises(samples, context):
    raise KeyError("no such\nanswer")


def build(folder: Path, seed: int) -> None:
    folder.mkdir()
    raise OSError("the mirror is down")
