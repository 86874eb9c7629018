"""Who generates what: draws, prompts, engines, lags, tool outputs and drafts of every sequence, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planted.model import VOCABULARY
from planted.pipeline import Pipeline
from planted.vocabulary import STOP

ENGINES, RANKS, RANKS_A_NODE, SIBLINGS = 4, 4, 2, 4
PROMPT, TOOL = (8, 25), 6  # tokens of a prompt, from and below; of a tool's output
LAGS, SHARES = (0, 1, 2, 3), (0.4, 0.3, 0.2, 0.1)


@dataclass
class Scene:
    """S sequences, in blocks of one step and one set of weights: the sequences of block g are g·B to (g+1)·B.

    step (from 0), engine, draw, sample i64 [S]; source [S] texts; script i64 [S, T]: tokens that are given (prompt, tool output), −1 where
    one is generated; tool bool [S, T]; prompt_length, tool_start (0: none), limit [S]; drafts bool [S].
    lag: by block, (first position, lag) pairs.
    """

    blocks: int
    step: NDArray[np.int64]
    engine: NDArray[np.int64]
    draw: NDArray[np.int64]
    sample: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    tool_start: NDArray[np.int64]
    limit: NDArray[np.int64]
    script: NDArray[np.int64]
    tool: NDArray[np.bool_]
    drafts: NDArray[np.bool_]
    lag: list[list[tuple[int, int]]]

    @property
    def rows(self) -> int:
        """Sequences of a block."""
        return len(self.step) // self.blocks


def make_scene(pipeline: Pipeline, steps: int, sequences: int, response: int, rng: np.random.Generator) -> Scene:
    """A run of `steps` steps with `sequences` sequences each, of at most `response` generated tokens."""
    assert sequences % (ENGINES * SIBLINGS) == 0, f"sequences come in multiples of {ENGINES * SIBLINGS}"
    total, draws = steps * sequences, steps * sequences // SIBLINGS
    step = np.repeat(np.arange(steps), sequences)
    place = np.concatenate([rng.permutation(sequences) + first for first in range(0, total, sequences)])  # siblings are scattered over blocks
    draw, sample = place // SIBLINGS, place % SIBLINGS
    width = PROMPT[1] - 1 + response
    prompts = rng.integers(STOP, VOCABULARY, (draws, PROMPT[1]))
    prompt_length = rng.integers(*PROMPT, draws)[draw]
    limit = prompt_length + rng.integers(response // 2, response + 1, total)
    column = np.arange(width)
    script = np.where(column < prompt_length[:, None], np.resize(prompts[draw].T, (width, total)).T, -1)
    tool_start = np.where(rng.random(total) < 0.2, prompt_length + rng.integers(4, response // 2 - TOOL, total), 0)
    tool = (tool_start[:, None] > 0) & (column >= tool_start[:, None]) & (column < tool_start[:, None] + TOOL)
    script = np.where(tool, rng.integers(STOP, VOCABULARY, script.shape), script)
    return Scene(
        blocks=steps * ENGINES, step=step, engine=_engines(pipeline, steps, sequences, rng), draw=draw, sample=sample, prompt_length=prompt_length,
        tool_start=tool_start, limit=limit, script=script, tool=tool, drafts=rng.random(total) < 0.5, lag=_lags(pipeline, steps, response, rng),
    )  # fmt: skip


def _engines(pipeline: Pipeline, steps: int, sequences: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A block is an engine; where sequences lag, a block has one lag, and engines are mixed over blocks, save the stale one."""
    block = np.tile(np.repeat(np.arange(ENGINES), sequences // ENGINES), steps)
    if pipeline.lag_size is None:
        return block
    apart = {engine for fault in pipeline.engines for engine in fault.copies}
    mixed = [engine for engine in range(ENGINES) if engine not in apart] or [0]
    return np.where(np.isin(block, list(apart)), block, np.array(mixed)[rng.integers(len(mixed), size=len(block))])


def _lags(pipeline: Pipeline, steps: int, response: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    """Each block's lag; half of those behind get newer weights on the way."""
    if pipeline.lag_size is None:
        return [[(0, 0)] for _ in range(steps * ENGINES)]
    made = []
    for _ in range(steps):
        lags = rng.choice(LAGS, ENGINES, p=SHARES)
        lags[rng.choice(ENGINES, 2, replace=False)] = 0, rng.integers(1, 4)  # every step has both
        for lag in lags.tolist():
            switch = PROMPT[1] + int(rng.integers(response // 4, response // 2))
            made.append([(0, lag), (switch, lag - 1)] if lag and rng.random() < 0.5 else [(0, lag)])
    return made
