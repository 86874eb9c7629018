"""Each operation against float64 autograd, and its rows' bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from miles.precision import batch_invariant as ops
from miles.precision.threads import set_threads


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def close(got, wanted, tolerance=2e-6):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1.0)


def check(function, reference, *inputs, tolerance=2e-6):
    """Forward and gradients of fp32 `function` against `reference` in float64."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = function(*inputs), reference(*doubles)
    close(got, wanted, tolerance)
    with torch.no_grad():
        assert torch.equal(function(*inputs), got), "with and without gradients: the same bits"
    weight = torch.randn_like(wanted)
    mine = torch.autograd.grad((got * weight.float()).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weight).sum(), doubles)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, tolerance * 4)


def rms_reference(x, weight, eps):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("n", [16, 72, 5])
def test_against_float64(rows, n):
    torch.manual_seed(rows * n)
    x, weight, bias = torch.randn(rows, n), torch.randn(24, n), torch.randn(24)
    for exact in (True, False):
        check(lambda a, b, c: ops.linear(a, b, c, exact), F.linear, x, weight, bias, tolerance=4e-6)  # noqa: B023
    check(lambda a, b: ops.rms_norm(a, b, 1e-6), lambda a, b: rms_reference(a, b, 1e-6), x, torch.randn(n))
    check(ops.silu_mul, lambda a, b: F.silu(a) * b, x * 4, torch.randn(rows, n))
    close(ops.softmax(x), x.double().softmax(-1))


@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotary_against_float64(normed):
    torch.manual_seed(1)
    rows, heads, dim = 37, 3, 24
    x, weight = torch.randn(rows, heads, dim), torch.randn(dim)
    position = torch.randint(0, 50, (rows,))
    angle = torch.arange(50.0)[:, None] / 100 ** (torch.arange(dim // 2) / dim)
    table = (angle.cos(), angle.sin())

    def reference(x, weight):
        if normed:
            x = rms_reference(x, weight, 1e-5)
        a, b = x.chunk(2, dim=-1)
        cos, sin = (t[position][:, None].double() for t in table)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1) + (0 if normed else 0 * weight)

    def ours(x, weight):
        return ops.norm_rope(x, weight if normed else None, 1e-5, position, table) + (0 if normed else 0 * weight)

    check(ours, reference, x, weight)


@pytest.mark.parametrize("normalise", [True, False])
def test_route_against_float64(normalise):
    torch.manual_seed(2)
    logits = torch.randn(41, 8) * 2
    index, weight = ops.route(logits, 3, normalise)
    prob = logits.double().softmax(-1)
    top, wanted = prob.topk(3, dim=-1)
    assert torch.equal(index, wanted)
    close(weight, top / top.sum(-1, keepdim=True) if normalise else top)
    check(lambda x: ops.route(x, 3, normalise)[1], lambda x: choose(x, index, normalise), logits)
    ties = ops.route(torch.zeros(1, 5), 2, True)
    assert ties[0].tolist() == [[0, 1]]
    assert ties[1].tolist() == [[0.5, 0.5]]


def choose(logits, index, normalise):
    chosen = logits.softmax(-1).gather(1, index)
    return chosen / chosen.sum(-1, keepdim=True) if normalise else chosen


def experts_reference(x, index, weight, gate_up, down):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for c in range(index.shape[1]):
            gate, up = (gate_up[index[t, c]] @ x[t]).chunk(2)
            out[t] = out[t] + weight[t, c] * (down[index[t, c]] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("exact", [True, False])
def test_experts_against_float64(exact):
    torch.manual_seed(3)
    tokens, hidden, inner, number = 45, 40, 24, 5
    x, weight = torch.randn(tokens, hidden), torch.rand(tokens, 2)
    index = torch.stack([torch.randperm(number - 1)[:2] for _ in range(tokens)])  # the last expert gets nothing
    gate_up, down = torch.randn(number, 2 * inner, hidden) / 6, torch.randn(number, hidden, inner) / 5

    def ours(x, weight, gate_up, down):
        return ops.experts(x, index, weight, gate_up, down, exact)

    check(ours, lambda x, w, g, d: experts_reference(x, index, w, g, d), x, weight, gate_up, down, tolerance=4e-6)


def companies(rows, generator):
    """Subsets of rows in random order and number, the last one a single row."""
    for size in (rows, rows // 2 + 1, 17, 16, 3, 1):
        yield torch.randperm(rows, generator=generator)[:size]


@pytest.mark.parametrize("shape", [(128, 128), (128, 8), (72, 331), (576, 192), (960, 96), (1024, 256), (576, 1536)], ids=str)
def test_linear_rows_keep_their_bits(shape, threads):
    k, n = shape
    generator = torch.Generator().manual_seed(k + n)
    x, weight, bias = torch.randn(75, k, generator=generator), torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
    whole = ops.linear(x, weight, bias)
    for chosen in companies(75, generator):
        assert torch.equal(ops.linear(x[chosen], weight, bias), whole[chosen])


def test_other_rows_keep_their_bits(threads):
    generator = torch.Generator().manual_seed(11)
    rows, hidden, inner, number = 75, 72, 40, 6
    x = torch.randn(rows, hidden, generator=generator)
    up = torch.randn(rows, hidden, generator=generator)
    scale = torch.randn(hidden, generator=generator)
    gate_up = torch.randn(number, 2 * inner, hidden, generator=generator)
    down = torch.randn(number, hidden, inner, generator=generator)
    logits = torch.randn(rows, number, generator=generator)
    position = torch.randint(0, 30, (rows,), generator=generator)
    table = (torch.randn(30, 18, generator=generator), torch.randn(30, 18, generator=generator))

    def everything(chosen):
        index, weight = ops.route(logits[chosen], 2, True)
        rotated = ops.norm_rope(x[chosen].view(-1, 2, 36), scale[:36], 1e-6, position[chosen], table)
        mixed = ops.experts(x[chosen], index, weight, gate_up, down)
        return ops.rms_norm(x[chosen], scale, 1e-6), ops.silu_mul(x[chosen], up[chosen]), index, weight, rotated, mixed

    whole = everything(torch.arange(rows))
    for chosen in companies(rows, generator):
        for got, wanted in zip(everything(chosen), whole, strict=True):
            assert torch.equal(got, wanted[chosen])


def test_a_strided_half_gives_the_bits_of_its_copy():
    both = torch.randn(20, 66)
    gate, up = both[:, :33], both[:, 33:]
    assert torch.equal(ops.silu_mul(gate, up), ops.silu_mul(gate.contiguous(), up.contiguous()))


def test_extremes_stay_finite():
    gate = torch.tensor([[-200.0, 200.0, -88.0, 0.0]])
    assert ops.silu_mul(gate, torch.ones(1, 4)).tolist() == [[0.0, 200.0, pytest.approx(-88.0 / (1 + 1.6516e38), rel=1e-3), 0.0]]
    assert ops.softmax(torch.tensor([[0.0, -1000.0, float("-inf")]])).tolist() == [[1.0, 0.0, 0.0]]


def test_backward_is_deterministic():
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    first, second = (torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).square().sum(), (x, weight)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_threads_are_pinned_or_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        set_threads(0)
