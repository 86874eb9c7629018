import numpy as np
import pytest
import reference_numpy as reference
import torch

from miles.algorithms.metrics import mismatch_metrics, mismatch_sums, sample_ess


def measure(train, rollout, mask, splits=1):
    sums, maxima = 0, None
    for rows in np.array_split(np.arange(len(mask)), splits):
        a, b = mismatch_sums(torch.from_numpy(train[rows]), torch.from_numpy(rollout[rows]), torch.from_numpy(mask[rows]))
        sums = sums + a
        maxima = b if maxima is None else torch.maximum(maxima, b)
    return mismatch_metrics(sums.tolist(), maxima.tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 15.0])
def test_against_numpy_with_poison(seed, splits, scale):
    random = np.random.default_rng(seed)
    train = -random.exponential(2.0, 400).astype(np.float32)
    rollout = (train + random.normal(scale=scale, size=400)).astype(np.float32)
    rollout[:100] = train[:100]
    mask = random.random(400) < 0.8
    train[::37], rollout[::41], rollout[::43] = np.nan, -np.inf, np.nan
    got = measure(train, rollout, mask, splits)
    expected = reference.mismatch(train, rollout, mask)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-4, abs=3e-7), name


def test_equal_log_probs_are_exactly_zero():
    x = -np.random.default_rng(0).exponential(3.0, 1000).astype(np.float32)
    got = measure(x, x.copy(), np.ones(1000, dtype=bool), 3)
    assert got["train/train_rollout_logprob_abs_diff"] == 0
    assert got["train/train_rollout_kl"] == 0
    assert got["train/train_rollout_equal_bits"] == 1
    assert got["train/train_rollout_ess"] == 1


def test_one_bit_is_seen():
    x = -np.random.default_rng(0).exponential(3.0, 10).astype(np.float32)
    y = x.copy()
    y[3] = np.nextafter(y[3], np.float32(0))
    assert measure(x, y, np.ones(10, dtype=bool))["train/train_rollout_equal_bits"] == 0.9


def test_nothing_to_average():
    nothing = np.zeros(0, dtype=np.float32)
    assert measure(nothing, nothing, np.zeros(0, dtype=bool)) == {"train/mismatch_tokens": 0, "train/mismatch_not_finite": 0}
    x = np.full(3, np.nan, dtype=np.float32)
    assert measure(x, x, np.ones(3, dtype=bool)) == {"train/mismatch_tokens": 0, "train/mismatch_not_finite": 3}


def test_sample_ess():
    ratio = torch.tensor([1.0, 1.0, 1.0, 3.0, float("nan")])
    mask = torch.tensor([True, True, True, True, False])
    got = sample_ess(ratio, mask, torch.tensor([0, 0, 1, 1, 3]), 4)
    assert got.tolist() == [1.0, 1 * (4**2) / (2 * 10), 1.0, 1.0]
