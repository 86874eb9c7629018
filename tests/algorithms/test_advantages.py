import numpy as np
import pytest
import reference_numpy as reference
import torch

from miles.algorithms.advantages import grpo_advantages


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("std", [True, False])
def test_random_ragged_groups(seed, std):
    random = np.random.default_rng(seed)
    group = random.integers(0, 9, size=70) * 1000003
    reward = random.normal(size=70).astype(np.float32) * 10.0 ** random.integers(-3, 3)
    got = grpo_advantages(torch.from_numpy(reward), torch.from_numpy(group), std=std)
    np.testing.assert_allclose(got.numpy(), reference.grpo(reward, group, std=std), rtol=2e-6, atol=1e-6)


def test_group_of_one_and_equal_rewards_have_no_advantage():
    reward = torch.tensor([0.7, 0.1, 0.1, 0.1, 1.0, 0.0])
    got = grpo_advantages(reward, torch.tensor([5, 2, 2, 2, 9, 9]))
    assert got[:4].tolist() == [0, 0, 0, 0]
    assert got[4:].tolist() == pytest.approx([0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6)])


def test_no_normalization_returns_rewards():
    reward = torch.tensor([3.0, -1.0])
    assert grpo_advantages(reward, torch.tensor([0, 0]), normalize=False).tolist() == [3.0, -1.0]


def test_order_of_samples_does_not_matter():
    random = np.random.default_rng(0)
    reward, group = torch.from_numpy(random.normal(size=64).astype(np.float32)), torch.arange(64) // 8
    order = torch.from_numpy(random.permutation(64))
    np.testing.assert_allclose(grpo_advantages(reward[order], group[order]), grpo_advantages(reward, group)[order], rtol=1e-6)


def test_empty_batch():
    assert grpo_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="sample 1 of the batch is not finite"):
        grpo_advantages(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
