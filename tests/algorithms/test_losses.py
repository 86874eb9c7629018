"""Losses, KL and reductions against float64 numpy, values and gradients, over random ragged masked data with poison under the mask."""

import numpy as np
import pytest
import reference_numpy as reference
import torch

from miles.algorithms.corrections import truncated_importance
from miles.algorithms.kl import token_kl
from miles.algorithms.policy_loss import policy_loss
from miles.algorithms.reduction import per_sample_weight, per_token_weight, weighted_sum
from miles.algorithms.sft_loss import sft_loss

POISON = [float("nan"), float("-inf"), float("inf")]


def ragged(seed, spread=0.5):
    """Sequences of 0 to 12 tokens, some wholly masked; under the mask lie NaN and infinities."""
    random = np.random.default_rng(seed)
    lengths = np.concatenate([random.integers(0, 13, size=7), [0, 1, 1, 5]])
    total = int(lengths.sum())
    mask = random.random(total) < 0.7
    bounds = [(int(b - n), int(b)) for b, n in zip(np.cumsum(lengths), lengths, strict=True)]
    mask[bounds[-1][0] : bounds[-1][1]] = False  # the last sequence is all masked
    new = -random.exponential(2.0, size=total).astype(np.float32)
    old = (new + random.normal(scale=spread, size=total)).astype(np.float32)
    advantage = random.normal(size=total).astype(np.float32)
    for array in (new, old, advantage):
        array[~mask] = random.choice(POISON, size=int((~mask).sum()))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.array([mask[a:b].sum() for a, b in bounds])
    return new, old, advantage, mask, bounds, sequence, tokens


def tensor(array, grad=False):
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_(grad)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("high", "dual"), [(None, None), (0.28, None), (0.28, 1.5)])
@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_policy_loss(seed, high, dual, spread):
    new, old, advantage, mask, *_ = ragged(seed, spread)
    got = policy_loss(tensor(new, True), tensor(old), tensor(advantage), tensor(mask), eps_clip=0.2, eps_clip_high=high, eps_clip_c=dual)
    loss, ratio, clipped, kl = reference.ppo(new, old, advantage, mask, 0.2, 0.2 if high is None else high, dual)
    np.testing.assert_allclose(got.loss.detach(), loss, rtol=3e-6, atol=1e-7)
    np.testing.assert_allclose(got.ratio, ratio, rtol=3e-6)
    np.testing.assert_array_equal(got.clipped[tensor(mask)], clipped[mask])
    np.testing.assert_allclose(got.ppo_kl, kl, rtol=1e-6, atol=1e-7)


def numeric_gradient(function, x, mask, step=1e-5):
    out = np.zeros(len(x))
    for t in np.flatnonzero(mask):
        up, down = x.astype(np.float64).copy(), x.astype(np.float64).copy()
        up[t] += step
        down[t] -= step
        out[t] = (function(up) - function(down)) / (2 * step)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dual", [None, 1.3])
def test_policy_gradient_is_the_finite_difference(seed, dual):
    new, old, advantage, mask, bounds, sequence, tokens = ragged(seed)
    x = tensor(new, True)
    weight = per_sample_weight(tensor(mask), tensor(sequence), tensor(tokens), len(bounds))
    got = policy_loss(x, tensor(old), tensor(advantage), tensor(mask), eps_clip=0.2, eps_clip_high=0.3, eps_clip_c=dual)
    weighted_sum(got.loss, tensor(mask), weight).backward()

    def function(n):
        return reference.sample_mean(reference.ppo(n, old, advantage, mask, 0.2, 0.3, dual)[0], mask, bounds, len(bounds))

    assert torch.isfinite(x.grad).all()
    assert (x.grad.numpy()[~mask] == 0).all()
    np.testing.assert_allclose(x.grad, numeric_gradient(function, new, mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_kl_and_its_gradient(kind, spread):
    new, base, _, mask, *_ = ragged(11, spread)
    x = tensor(new, True)
    got = token_kl(x, tensor(base), tensor(mask), kind)
    np.testing.assert_allclose(got.detach(), reference.kl(new, base, mask, kind), rtol=2e-5, atol=1e-6)
    got.sum().backward()
    wide, step = new.astype(np.float64), 1e-6  # a token's value depends on that token alone, so all move at once
    expected = (reference.kl(wide + step, base, mask, kind) - reference.kl(wide - step, base, mask, kind)) / (2 * step)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert (got.detach().numpy()[~mask] == 0).all()


def test_k3_is_never_negative_and_does_not_overflow():
    d = torch.linspace(-200, 200, 801)
    value = token_kl(d, torch.zeros(801), torch.ones(801, dtype=torch.bool), "k3")
    assert torch.isfinite(value).all()
    assert (value >= 0).all()


def test_kl_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k5"):
        token_kl(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), "k5")


@pytest.mark.parametrize("seed", range(4))
def test_reductions_over_any_split_are_the_mean_of_the_whole(seed):
    value, _, _, mask, bounds, sequence, tokens = ragged(seed)
    whole = per_sample_weight(tensor(mask), tensor(sequence), tensor(tokens), len(bounds))
    assert float(weighted_sum(tensor(value), tensor(mask), whole)) == pytest.approx(reference.sample_mean(value, mask, bounds, len(bounds)), rel=1e-5)
    tokenwise = per_token_weight(tensor(mask), int(mask.sum()))
    assert float(weighted_sum(tensor(value), tensor(mask), tokenwise)) == pytest.approx(reference.token_mean(value, mask), rel=1e-5)
    cut = bounds[3][1]
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        local = per_sample_weight(tensor(mask[rows]), tensor(sequence[rows]), tensor(tokens), len(bounds))
        parts.append(float(weighted_sum(tensor(value[rows]), tensor(mask[rows]), local)))
    assert sum(parts) == pytest.approx(float(weighted_sum(tensor(value), tensor(mask), whole)), rel=1e-5)


def test_all_masked_sample_counts_and_contributes_nothing():
    mask = torch.tensor([True, True, False, False])
    weight = per_sample_weight(mask, torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0]), 2)
    assert weight.tolist() == [0.25, 0.25, 0, 0]
    value = torch.tensor([2.0, 4.0, float("nan"), float("-inf")])
    assert float(weighted_sum(value, mask, weight)) == 1.5
    nothing = torch.zeros(4, dtype=torch.bool)
    assert float(weighted_sum(value, nothing, per_token_weight(nothing, 0))) == 0.0


def test_minus_infinity_under_the_mask_leaves_no_nan_in_value_or_gradient():
    mask = torch.tensor([True, False])
    x = torch.tensor([-1.0, float("-inf")], requires_grad=True)
    minus = torch.tensor([-1.5, float("-inf")])
    loss = policy_loss(x, minus, torch.tensor([1.0, float("nan")]), mask, eps_clip=0.2).loss.sum()
    loss = loss + token_kl(x, minus, mask, "k3").sum() + sft_loss(x, mask).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad[1] == 0
    assert torch.isfinite(x.grad).all()


def test_active_token_that_is_not_finite_has_ratio_one_and_no_gradient():
    x = torch.tensor([float("-inf"), -1.0], requires_grad=True)
    got = policy_loss(x, torch.tensor([-1.0, float("-inf")]), torch.ones(2), torch.ones(2, dtype=torch.bool), eps_clip=0.2)
    assert got.ratio.tolist() == [1.0, 1.0]
    got.loss.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]


def test_sft_loss():
    x = torch.tensor([-2.0, float("nan"), -0.5], requires_grad=True)
    got = sft_loss(x, torch.tensor([True, False, True]))
    assert got.tolist() == [2.0, 0.0, 0.5]
    got.sum().backward()
    assert x.grad.tolist() == [-1.0, 0.0, -1.0]


def test_empty_rows():
    nothing, mask = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert policy_loss(nothing, nothing, nothing, mask, eps_clip=0.2).loss.shape == (0,)
    assert token_kl(nothing, nothing, mask, "k3").shape == (0,)
    assert float(weighted_sum(nothing, mask, nothing)) == 0.0


def test_truncated_importance():
    train = torch.tensor([-1.0, -1.0, -5.0, float("nan"), -1.0, -1.0, -3.0])
    rollout = torch.tensor([-1.0, -3.0, -1.0, -1.0, float("-inf"), float("nan"), -1.0])
    mask = torch.tensor([True, True, True, True, True, True, False])
    got = truncated_importance(train, rollout, mask, low=0.5, high=2.0)
    assert got.weight.tolist() == [1.0, 2.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    assert got.clipped.tolist() == [0, 1, 1, 0, 1, 0, 0]
    assert got.raw[1].item() == pytest.approx(np.exp(2.0), rel=1e-6)
