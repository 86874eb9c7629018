"""Functions of a user who made a mistake: rewards, filters, generate functions, a builder."""

from __future__ import annotations

from pathlib import Path

NOT_A_FUNCTION = 1


def raises(samples, context):
    raise KeyError("no such\nanswer")


def one_too_few(samples, context):
    return [1.0] * (len(samples) - 1)


def nan(samples, context):
    return [float("nan")] * len(samples)


def answers_a_number(group):
    return 1


async def generate(draw, sample, context):
    raise ZeroDivisionError("division by zero")


def build(folder: Path, seed: int) -> None:
    folder.mkdir()
    raise OSError("the mirror is down")
