"""The trainer's side: log-probs of the recorded tokens computed again, with the faults of its side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from planted.arithmetic import rounded
from planted.generation import Generated, stacked
from planted.model import EXPERTS, LAYERS, TOP_K, VOCABULARY, Weights
from planted.passes import Replayed, Stepper, packed
from planted.pipeline import Pipeline
from planted.policy import Policy
from planted.scene import Scene
from planted.vocabulary import STOP, retokenised


@dataclass
class Trained:
    """logprob, entropy f32 [S, T]: value t belongs to token t, NaN where there is none. experts u8 [S, T, LAYERS, TOP_K]: what token t went
    through; token i32 [S, T] and length [S]: what the trainer read."""

    logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    experts: NDArray[np.uint8]
    token: NDArray[np.int32]
    length: NDArray[np.int64]


@torch.no_grad()
def recompute(pipeline: Pipeline, scene: Scene, policy: Policy, made: Generated, rank: NDArray[np.int64], rng: np.random.Generator, seed: int) -> Trained:
    """Log-probs by the trainer; rank i64 [S] says whose sequence it is. seed: of a stale rank's damage."""
    token, length = _read(pipeline, scene, made, rng)
    experts = _experts(pipeline, made, rng)
    total, width = token.shape
    logprob, entropy = np.full((2, total, width), np.nan, np.float32)
    holds = [[fault.holds(*where) for fault in pipeline.ranks] for where in zip(rank.tolist(), scene.step.tolist(), strict=True)]
    compute = _same_bits if pipeline.activation_bits is None else _packed
    for held in {tuple(each) for each in holds}:
        rows = np.array([tuple(each) == held for each in holds])
        faults = [fault for fault, here in zip(pipeline.ranks, held, strict=True) if here]
        steps = {step: policy.of_copy(step, faults, seed) for step in np.unique(scene.step[rows]).tolist()}
        compute(pipeline, scene, steps, rows, token, length, experts, logprob, entropy)
    early = rng.random(total) < pipeline.shifted
    logprob[early, :-1] = logprob[early, 1:]
    logprob[early, length[early] - 1] = np.nan
    return Trained(logprob, entropy, experts, token, length)


def _read(pipeline: Pipeline, scene: Scene, made: Generated, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The tokens as the trainer has them; what is beyond the engine's length is cut off, as where two lists are zipped."""
    token, length = made.token.copy(), made.length.copy()
    if pipeline.retokenised:
        for row, whole in enumerate(made.length):
            other = retokenised(made.token[row, :whole], int(scene.prompt_length[row]), pipeline.retokenised, rng)[:whole]
            token[row, : len(other)], length[row] = other, len(other)
    other_prompt = rng.random(len(token)) < pipeline.other_prompt
    token[other_prompt, 0] = rng.integers(STOP, VOCABULARY, int(other_prompt.sum()))
    return token, length


def _experts(pipeline: Pipeline, made: Generated, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The engine's routes, replayed; for a share of the tokens others, in all layers."""
    experts = made.order[..., :TOP_K].copy()
    if pipeline.rerouted:
        others = made.order[..., [0, 2]]
        if pipeline.reroute_at_random:
            others = rng.random((*experts.shape[:-1], EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8)
        experts = np.where((rng.random(experts.shape[:2]) < pipeline.rerouted)[..., None, None], others, experts)
    return experts


def _statistics(pipeline: Pipeline, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.log_softmax(rounded(logits, pipeline.train_logit_bits), -1)
    return full.gather(-1, target[..., None])[..., 0], -(full.exp() * full).sum(-1)


def _packed(pipeline: Pipeline, scene: Scene, steps: dict[int, Weights], rows: NDArray, token: NDArray, length: NDArray, experts: NDArray, logprob: NDArray, entropy: NDArray) -> None:
    """fp32, whole sequences, a step at a time."""
    column = np.arange(token.shape[1])
    for step, weights in steps.items():
        chosen = np.flatnonzero(rows & (scene.step == step))
        real = column < length[chosen, None]
        flat = torch.from_numpy(token[chosen][real]).long()
        replayed = Replayed(torch.from_numpy(experts[chosen][real]).long().view(1, -1, LAYERS, TOP_K))
        logits = packed(weights, flat, torch.from_numpy(length[chosen]), replayed)
        target, predicts = flat.roll(-1), real & (column < length[chosen, None] - 1)
        for array, values in zip((logprob, entropy), _statistics(pipeline, logits, target), strict=True):
            spread = np.full(real.shape, np.nan, np.float32)
            spread[real] = values.numpy()
            array[chosen, 1:] = np.where(predicts, spread, np.nan)[:, :-1]


def _same_bits(pipeline: Pipeline, scene: Scene, steps: dict[int, Weights], rows: NDArray, token: NDArray, length: NDArray, experts: NDArray, logprob: NDArray, entropy: NDArray) -> None:
    """The engines' own computation, token by token in the same blocks, with the recorded tokens in place of drawn ones."""
    shape = (scene.blocks, scene.rows)
    other = next(iter(steps.values()))
    weights = stacked([steps.get(int(scene.step[block * scene.rows]), other) for block in range(scene.blocks)])
    tokens = torch.from_numpy(np.maximum(token, 0)).long().view(*shape, -1)
    replayed = torch.from_numpy(experts).long().view(*shape, token.shape[1], LAYERS, TOP_K)
    stepper = Stepper(*shape, token.shape[1])
    for position in range(int(length[rows].max()) - 1):
        logits, _ = stepper.step(weights, tokens[..., position], Replayed(replayed[:, :, position]))
        here = rows & (position + 1 < length)
        for array, values in zip((logprob, entropy), _statistics(pipeline, logits, tokens[..., position + 1]), strict=True):
            array[here, position + 1] = values.reshape(-1).numpy()[here]
