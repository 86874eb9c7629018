"""The engines' side: sequences generated token by token, and what was reported of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from planted.arithmetic import FP32
from planted.model import EXPERTS, LAYERS, Weights
from planted.passes import Recorded, Stepper
from planted.pipeline import Pipeline
from planted.policy import Policy
from planted.sampling import Speculation
from planted.scene import Scene
from planted.vocabulary import STOP


@dataclass
class Generated:
    """token i32 [S, T]; logprob f32 [S, T], as reported, NaN where not generated; kept_mass f32 [S, T]; length [S]; stopped bool [S];
    generated, accepted, resampled bool [S, T]; order u8 [S, T, LAYERS, EXPERTS]: experts at that token, best first; logits f32 [S, T, V] that
    token t was drawn from, before the sampler, where they were asked for."""

    token: NDArray[np.int32]
    logprob: NDArray[np.float32]
    kept_mass: NDArray[np.float32]
    length: NDArray[np.int64]
    stopped: NDArray[np.bool_]
    generated: NDArray[np.bool_]
    accepted: NDArray[np.bool_]
    resampled: NDArray[np.bool_]
    order: NDArray[np.uint8]
    logits: NDArray[np.float32] | None


def stacked(blocks: list[Weights]) -> Weights:
    """Weights of several blocks, f32 [G, …]."""
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def weights_of_blocks(pipeline: Pipeline, scene: Scene, policy: Policy, position: int, seed: int) -> Weights:
    """What each block's engine really computes with at this position of its sequences."""
    found = []
    for block in range(scene.blocks):
        first = block * scene.rows
        step, engine = int(scene.step[first]), int(scene.engine[first])
        lag = next(lag for start, lag in reversed(scene.lag[block]) if start <= position)
        version = step - lag * (pipeline.lag_size or 0.0)
        found.append(policy.of_copy(version, [fault for fault in pipeline.engines if fault.holds(engine, step)], seed))
    return stacked(found)


@torch.no_grad()
def generate(pipeline: Pipeline, scene: Scene, policy: Policy, rng: np.random.Generator, seed: int, keep_logits: bool = False) -> Generated:
    """Generate all sequences of a scene. seed: of a stale engine's damage."""
    blocks, rows = scene.blocks, scene.rows
    width = scene.script.shape[1]
    shape = (blocks, rows)
    bits = FP32 if pipeline.activation_bits is None else pipeline.activation_bits
    stepper, routes, speculation = Stepper(*shape, width, bits), Recorded(), Speculation(torch.from_numpy(scene.drafts).view(shape))
    script = torch.from_numpy(scene.script).view(*shape, width)
    token = script.clone()
    logprob, mass = torch.full((2, *shape, width), torch.nan)
    accepted, resampled = torch.zeros((2, *shape, width), dtype=torch.bool)
    uniform = torch.from_numpy(rng.random((width, 3, *shape)))
    switches = {start for lags in scene.lag for start, _ in lags} | {0}
    going = torch.ones(shape, dtype=torch.bool)
    limit = torch.from_numpy(scene.limit).view(shape)
    kept = []
    for position in range(width - 1):
        if position in switches:
            weights = weights_of_blocks(pipeline, scene, policy, position, seed)
        logits, draft = stepper.step(weights, token[..., position], routes)
        reported, probability, masses = pipeline.sampler.distribution(logits)
        drawn, yes, no = speculation.draw(probability, draft.softmax(-1), uniform[position])
        given = script[..., position + 1]
        token[..., position + 1] = torch.where(given >= 0, given, drawn)
        logprob[..., position + 1] = reported.gather(-1, drawn[..., None])[..., 0]
        mass[..., position + 1], accepted[..., position + 1], resampled[..., position + 1] = masses, yes, no
        if keep_logits:
            kept.append(logits)
        going &= ((given >= 0) | (drawn >= STOP)) & (position + 2 < limit)
        if not going.any():
            break
    return _trimmed(scene, token, logprob, mass, accepted, resampled, routes, kept)


def _trimmed(scene: Scene, token: torch.Tensor, logprob: torch.Tensor, mass: torch.Tensor, accepted: torch.Tensor, resampled: torch.Tensor, routes: Recorded, kept: list[torch.Tensor]) -> Generated:
    total, width = scene.script.shape
    tokens, yes, no = (each.view(total, width).numpy() for each in (token, accepted, resampled))
    column = np.arange(width)
    free = scene.script < 0
    stop = free & (tokens < STOP) & (column < scene.limit[:, None])
    stopped = stop.any(1)
    length = np.where(stopped, stop.argmax(1) + 1, scene.limit)
    generated = free & (column < length[:, None])
    order = np.zeros((total, width, LAYERS, EXPERTS), np.uint8)
    made = routes.all().permute(1, 2, 0, 3, 4)
    order[:, : made.shape[2]] = made.reshape(total, -1, LAYERS, EXPERTS).numpy()
    logits = None
    if kept:
        seen = torch.stack(kept, 2).reshape(total, len(kept), -1).numpy()
        logits = np.full((total, width, seen.shape[-1]), np.nan, np.float32)
        logits[:, 1 : 1 + len(kept)] = seen
    return Generated(
        token=tokens.astype(np.int32), length=length, stopped=stopped, generated=generated, accepted=yes & generated, resampled=no & generated, order=order, logits=logits,
        logprob=np.where(generated, logprob.view(total, width).numpy(), np.float32(np.nan)), kept_mass=mass.view(total, width).numpy(),
    )  # fmt: skip
