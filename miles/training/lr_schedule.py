"""The learning rate of every optimizer step: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

from miles.config.schema import Optimizer


def learning_rate(optimizer: Optimizer, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of a phase that has `total` of them.

    Warm-up: lr (step + 1) / (warmup + 1), so that the first step moves and the first step after the warm-up has lr.
    Decay from lr to min_lr over lr_decay_steps (default: the rest of the phase), min_lr from then on.
    """
    assert step >= 0, "steps count from 0"
    warmup = optimizer.lr_warmup_steps
    if step < warmup:
        return optimizer.lr * (step + 1) / (warmup + 1)
    if optimizer.lr_schedule == "constant":
        return optimizer.lr
    length = optimizer.lr_decay_steps or max(total - warmup, 1)
    done = min((step - warmup) / length, 1.0)
    left = 1.0 - done if optimizer.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
