"""Log-probs, entropy and sampling against float64 numpy, and the sampler's distribution and support."""

import numpy as np
import pytest
import torch

from miles.precision.logprob import sample, token_logprob

LEAST = np.finfo(np.float32).min


def numpy_logprob(logits, temperature):
    z = logits.detach().numpy().astype(np.float64) / np.asarray(temperature, dtype=np.float64).reshape(-1, 1)
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("size", [1, 7, 1000, 4099])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_values_and_gradients(size, temperature):
    torch.manual_seed(size)
    rows = 9
    logits = (torch.randn(rows, size) * 5).requires_grad_()
    target = torch.randint(0, size, (rows,))
    logprob, entropy = token_logprob(logits, target, temperature)
    wanted = numpy_logprob(logits, [temperature])
    assert np.abs(logprob.detach().numpy() - wanted[np.arange(rows), target]).max() < 1e-5
    assert np.abs(entropy.detach().numpy() + (np.exp(wanted) * wanted).sum(1)).max() < 2e-5
    a, b = torch.randn(rows), torch.randn(rows)
    grad = torch.autograd.grad((a * logprob + b * entropy).sum(), logits)[0]
    double = logits.detach().double().requires_grad_()
    z = torch.log_softmax(double / temperature, -1)
    theirs = torch.autograd.grad((a * z.gather(1, target[:, None])[:, 0] - b * (z.exp() * z).sum(1)).sum(), double)[0]
    assert (grad - theirs).abs().max() < 1e-5
    only = torch.autograd.grad(token_logprob(logits, target, temperature)[0].sum(), logits)[0]
    assert np.abs(only.numpy() - (np.eye(size)[target] - np.exp(wanted)) / temperature).max() < 1e-5


def test_a_temperature_per_row_and_zero_as_one():
    logits, target = torch.randn(4, 50), torch.tensor([1, 2, 3, 4])
    heat = torch.tensor([0.5, 0.0, 1.0, 2.0])
    together = token_logprob(logits, target, heat)[0]
    for i, t in enumerate((0.5, 1.0, 1.0, 2.0)):
        assert torch.equal(token_logprob(logits[i : i + 1], target[i : i + 1], t)[0], together[i : i + 1])


def test_extreme_logits():
    logits = torch.tensor([[0.0, float("-inf"), -1e30, 300.0]], requires_grad=True)
    for target, wanted in ((0, -300.0), (1, LEAST), (2, -1e30), (3, 0.0)):
        logprob, entropy = token_logprob(logits, torch.tensor([target]))
        assert float(logprob.detach()) == pytest.approx(wanted)
        assert float(entropy.detach()) == 0.0
        grad = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)[0]
        assert torch.isfinite(grad).all()


def test_rows_of_a_wider_matrix_and_other_types():
    wide = torch.randn(6, 80)
    target = torch.arange(6)
    assert torch.equal(token_logprob(wide[:, :64], target)[0], token_logprob(wide[:, :64].contiguous(), target)[0])
    half = wide.bfloat16().requires_grad_()
    logprob = token_logprob(half, target)[0]
    assert torch.equal(logprob, token_logprob(half.float(), target)[0])
    logprob.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def draws(logits, count, temperature=1.0, top_k=0, top_p=1.0, position=3, seeds=None):
    rows = logits.expand(count, -1).contiguous()
    seeds = torch.arange(count) if seeds is None else seeds
    full = torch.full((count,), temperature), torch.full((count,), top_k), torch.full((count,), top_p)
    return sample(rows, *full, seeds, torch.full((count,), position))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (6, 0.9)])
def test_distribution_and_support(top_k, top_p):
    torch.manual_seed(4)
    logits = torch.randn(1, 12) * 1.5
    count = 20_000
    token, logprob = draws(logits, count, 0.8, top_k, top_p)
    p = np.exp(numpy_logprob(logits, [0.8]))[0]
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    keep = order[(np.arange(12) < (top_k or 12)) & (before <= top_p)]
    seen = np.bincount(token.numpy(), minlength=12)
    assert set(np.flatnonzero(seen)) == set(keep)
    expected = count * p[keep] / p[keep].sum()
    chi2 = ((seen[keep] - expected) ** 2 / expected).sum()
    freedom = len(keep) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), "five standard deviations of chi-square"
    assert torch.equal(logprob, token_logprob(logits.expand(count, -1), token, 0.8)[0]), "of the unfiltered distribution, bit for bit"


def splitmix(z):
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 % 2**64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def uniform(seed, position):
    golden = 0x9E3779B97F4A7C15
    z = splitmix((seed + golden) % 2**64)
    return (splitmix((z + (position + 1) * golden) % 2**64) >> 11) / 2**53


@pytest.mark.parametrize("size", [10, 2500])
def test_the_documented_formula(size):
    torch.manual_seed(size)
    logits = torch.randn(1, size)
    cdf = np.cumsum(np.exp(numpy_logprob(logits, [1.0]))[0])
    for seed, position in ((0, 0), (42, 7), (2**63 - 1, 12345), (-1, 2)):
        got = draws(logits, 1, position=position, seeds=torch.tensor([seed]))[0]
        u = uniform(seed % 2**64, position)
        assert int(got) == np.searchsorted(cdf, u, side="right")


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = torch.randn(8, 300)
    args = torch.ones(8), torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.arange(8) * 11, torch.arange(8)
    token, logprob = sample(logits, *args)
    for i in range(8):
        one = sample(logits[i : i + 1], *(a[i : i + 1] for a in args))
        assert torch.equal(one[0], token[i : i + 1])
        assert torch.equal(one[1], logprob[i : i + 1])
    assert len(set(draws(logits[:1] * 0, 50)[0].tolist())) > 20
    assert len(set(draws(logits[:1] * 0, 50, position=4)[0].tolist()) - set(draws(logits[:1] * 0, 50)[0].tolist())) > 10


def test_greedy_takes_the_lowest_of_equals_and_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    token, logprob = draws(logits, 3, temperature=0.0)
    assert token.tolist() == [1, 1, 1]
    assert torch.equal(logprob, token_logprob(logits.expand(3, -1), token, 1.0)[0])
    assert draws(logits, 1, temperature=0.7, top_k=1)[0].tolist() == [1]
    assert set(draws(logits, 40, top_k=2)[0].tolist()) == {1, 2}
    assert set(draws(logits * 0, 60, top_p=0.5)[0].tolist()) == {0, 1, 2}, "ties in token order; before the third lies 0.5"
    assert set(draws(logits, 40, top_p=0.0)[0].tolist()) == {1}


def test_a_large_vocabulary_with_filters():
    torch.manual_seed(5)
    logits = torch.randn(1, 49152)
    p = np.exp(numpy_logprob(logits, [1.0]))[0]
    order = np.argsort(-p, kind="stable")
    assert set(draws(logits, 300, top_k=4)[0].tolist()) == set(order[:4])
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p[order]), 0.3)) + 1])
    assert set(draws(logits, 300, top_p=0.3)[0].tolist()) <= nucleus
    assert int(draws(logits, 1)[0]) < 49152
