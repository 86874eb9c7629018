"""plant(): a run directory with one cause in it, or several, whose numbers come from real logits that went through the cause."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from planted.arithmetic import bits_of
from planted.causes import CAUSES
from planted.generation import Generated, generate
from planted.pipeline import Pipeline
from planted.policy import Policy, trained_policy
from planted.run_folder import RECORDED, assignments, write_run
from planted.scene import Scene, make_scene
from planted.training import Trained, recompute

BF16_NOISE, FP32_NOISE, NO_NOISE = 2.0**-8, 2.0**-24, 0.0


@dataclass
class Planted:
    """What was done, for tests of this generator and for the truth beside an analysis; nothing of it is in the run directory."""

    pipeline: Pipeline
    scene: Scene
    policy: Policy
    generated: Generated
    trained: Trained
    rank: np.ndarray


def plant(
    folder: Path, cause: str | tuple[str, ...], magnitude: float | tuple[float, ...], seed: int, *, steps: int = 4, sequences: int = 64, response: int = 112,
    noise: float = BF16_NOISE, recorded: set[str] = RECORDED, model: int = 0, keep_logits: bool = False,
) -> Planted:  # fmt: skip
    """Write a run of `steps` steps with `sequences` sequences each, of at most `response` generated tokens, with these causes.

    magnitude: one a cause, in the cause's unit. noise: unit roundoff of the engine's activations beside any cause (2⁻⁸: bf16; 2⁻²⁴: fp32,
    whose sums are in another order than the trainer's; 0: the trainer has the engine's bits). recorded: which optional data there
    are. model: seed of the policy, which is made once a process. The same arguments write the same numbers.
    """
    causes = (cause,) if isinstance(cause, str) else cause
    magnitudes = magnitude if isinstance(magnitude, tuple) else (magnitude,)
    assert len(causes) == len(magnitudes), "a magnitude for each cause"
    assert recorded <= RECORDED, f"recorded: some of {sorted(RECORDED)}"
    rng = np.random.default_rng([seed, model, 0])
    pipeline = Pipeline(activation_bits=bits_of(noise) if noise else None)
    for each, size in zip(causes, magnitudes, strict=True):
        CAUSES[each].plant(pipeline, size, steps, rng)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; and bits must not depend on who calls
    try:
        policy = trained_policy(model)
        scene = make_scene(pipeline, steps, sequences, response, np.random.default_rng([seed, model, 1]))
        made = generate(pipeline, scene, policy, np.random.default_rng([seed, model, 2]), seed, keep_logits)
        plans, rank = assignments(scene, made)
        seen = recompute(pipeline, scene, policy, made, rank, np.random.default_rng([seed, model, 3]), seed)
    finally:
        torch.set_num_threads(threads)
    write_run(folder, pipeline, scene, made, seen, plans, recorded)
    return Planted(pipeline, scene, policy, made, seen, rank)
