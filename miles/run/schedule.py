"""Which steps a run has, and what belongs to each: pure arithmetic on the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles.config.schema import RunConfig

Kind = Literal["sft", "rollout"]


@dataclass(frozen=True)
class Step:
    """One step of the run: warm-start steps come first, then rollouts; `number` counts both from 0."""

    number: int
    kind: Kind
    number_in_phase: int
    first_rollout: bool
    evaluate: bool
    save: bool


def total_steps(config: RunConfig) -> int:
    """Warm-start steps and rollouts together."""
    return config.warm_start.steps + config.num_rollout


def steps(config: RunConfig, first: int) -> Iterator[Step]:
    """The steps from `first` on. Evaluation and saving happen after a step's training.

    The end of the warm start is saved as well, and the last step is always saved (and evaluated, if anything ever is).
    """
    warm, total = config.warm_start.steps, total_steps(config)
    for number in range(first, total):
        rollout = number >= warm
        in_phase = number - warm if rollout else number
        last = number == total - 1
        every = config.eval.interval
        keep = config.checkpoint.save_interval
        yield Step(
            number=number,
            kind="rollout" if rollout else "sft",
            number_in_phase=in_phase,
            first_rollout=rollout and in_phase == 0,
            evaluate=rollout and every is not None and ((in_phase + 1) % every == 0 or last),
            save=last or number == warm - 1 or (rollout and keep is not None and (in_phase + 1) % keep == 0),
        )
