import math

import pytest

from miles.config.schema import Optimizer
from miles.training.lr_schedule import learning_rate


def rates(total, **fields):
    return [learning_rate(Optimizer(lr=1.0, **fields), step, total) for step in range(total)]


def test_constant_with_warmup():
    assert rates(6, lr_warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_ends_at_the_least():
    assert rates(5, lr_schedule="linear", lr_decay_steps=4, min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate(Optimizer(lr=1.0, lr_schedule="linear", lr_decay_steps=4, min_lr=0.2), 99, 5) == pytest.approx(0.2)


def test_cosine_over_the_rest_of_the_phase():
    got = rates(10, lr_schedule="cosine", lr_warmup_steps=2)
    assert got[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert got[:2] == pytest.approx([1 / 3, 2 / 3])


def test_warmup_longer_than_the_phase():
    assert rates(2, lr_warmup_steps=4, lr_schedule="cosine") == pytest.approx([0.2, 0.4])
