"""Attention against an independent float64 computation in numpy, and the bits of a query in any company."""

import itertools

import numpy as np
import pytest
import torch

from miles.precision.attention import KVCache, cached_attention, varlen_attention
from miles.precision.threads import set_threads


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def numpy_attention(q, k, v, ends, scale):
    """Row by row in float64, as the definition says."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for a, b in itertools.pairwise(ends):
        for i in range(a, b):
            for h in range(q.shape[1]):
                score = scale * k[a : i + 1, h // group] @ q[i, h]
                p = np.exp(score - score.max())
                out[i, h] = p @ v[a : i + 1, h // group] / p.sum()
    return out


def torch_attention(q, k, v, ends, scale):
    group = q.shape[1] // k.shape[1]
    parts = []
    for a, b in itertools.pairwise(ends):
        x, y, z = (t[a:b].transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        score = (x @ y.transpose(1, 2) * scale).masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf"))
        parts.append((score.softmax(-1) @ z).transpose(0, 1))
    return torch.cat(parts)


SHAPES = [(4, 2, 32), (9, 3, 64), (4, 4, 16), (8, 1, 24), (2, 1, 80), (5, 5, 7)]
ENDS = [0, 1, 6, 40, 41, 140]


def tensors(heads, kv_heads, dim, rows=140, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape):
    q, k, v = (x.requires_grad_() for x in tensors(*shape))
    scale = shape[2] ** -0.5
    out = varlen_attention(q, k, v, torch.tensor(ENDS, dtype=torch.int32), scale)
    assert np.abs(out.detach().numpy() - numpy_attention(q, k, v, ENDS, scale)).max() < 2e-6
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(out.shape)
    mine = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((torch_attention(*doubles, ENDS, scale) * weight).sum(), doubles)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_prefill_and_packed_agree_to_the_bit(shape, threads):
    _, kv_heads, dim = shape
    q, k, v = tensors(*shape)
    scale = dim**-0.5
    whole = varlen_attention(q, k, v, torch.tensor(ENDS, dtype=torch.int32), scale)
    cache = KVCache(1, 7, 99, kv_heads, dim)
    for buffer in (*cache.k, *cache.v):
        buffer.fill_(float("nan"))  # what lies beyond a sequence must not matter
    slots = [3, 0, 6, 1, 5]
    spans = list(itertools.pairwise(ENDS))
    for (a, b), slot in zip(spans, slots, strict=True):
        cache.write(0, k[a:b], v[a:b], torch.full((b - a,), slot), torch.arange(b - a))
    for ends_at in range(1, 100, 7):  # decode: each sequence at its own position
        rows = [min(b, a + ends_at) - 1 for a, b in spans]
        start = torch.tensor([r - a for r, (a, _) in zip(rows, spans, strict=True)])
        one_each = torch.arange(len(slots) + 1, dtype=torch.int32)
        assert torch.equal(cached_attention(q[rows], one_each, torch.tensor(slots), start, cache.k[0], cache.v[0], scale), whole[rows])
    for skip in (1, 3, 16, 35):  # prefill behind a cached prefix
        parts = [(min(skip, b - a), a, b) for a, b in spans]
        rows = [r for p, a, b in parts for r in range(a + p, b)]
        cu_q = torch.tensor([0, *itertools.accumulate(b - a - p for p, a, b in parts)], dtype=torch.int32)
        start = torch.tensor([p for p, _, _ in parts])
        got = cached_attention(q[rows], cu_q, torch.tensor(slots), start, cache.k[0], cache.v[0], scale)
        assert torch.equal(got, whole[rows])


def test_padding_rows_give_zero_and_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(4, 2, 16, rows=48))
    out = varlen_attention(q, k, v, torch.tensor([0, 20, 33], dtype=torch.int32), 0.25)
    assert out[33:].abs().max() == 0
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad[33:].abs().max() == 0
        assert x.grad[:33].abs().max() > 0


def test_cache_off_the_kernels_holds_the_same_values():
    q, k, v = tensors(4, 2, 16, rows=30)
    plain, fast = KVCache(1, 2, 30, 2, 16, dtype=torch.float64), KVCache(1, 2, 30, 2, 16)
    for cache in (plain, fast):
        cache.write(0, k, v, torch.ones(30, dtype=torch.int64), torch.arange(30))
        cache.copy_prefix(1, 0, 12)
    cu_q, start = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([10, 3])
    for slots in ([0, 1], [1, 0]):
        args = (cu_q, torch.tensor(slots), start)
        a = cached_attention(q[:5].double(), *args, plain.k[0], plain.v[0], 0.25)
        b = cached_attention(q[:5], *args, fast.k[0], fast.v[0], 0.25)
        assert (a - b).abs().max() < 1e-6
    assert fast.nbytes == 16384  # K and V, 2 slots, 2 heads, 32 positions, 16 numbers of 4 bytes
    assert plain.nbytes == 32768
