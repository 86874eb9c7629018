"""Causal attention over packed sequences and over a KV cache.

fp32 on a CPU: compiled kernels (cpu_attention.py) in which a query has the same bits in a packed batch, a prefill and a decode step.
Elsewhere (CUDA, bf16): PyTorch's scaled_dot_product_attention, or its variable-length flash attention for half precision on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from miles.precision import cpu_attention
from miles.precision.threads import launch

QUERIES_PER_TASK = 32
OVERREAD = 16  # key lines are read in blocks of 16: this much slack behind the last key


def uses_kernels(x: torch.Tensor) -> bool:
    """Whether the compiled kernels serve this tensor: fp32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32


class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, per layer; who sits in which slot is the owner's business.

    With the kernels (fp32 on CPU) keys lie transposed: k[layer] [slots, Hkv, D, L], v[layer] [slots, Hkv, L, D]; else both [slots, Hkv, L, D].
    L is length rounded up to 16. Fresh memory is zero; stale values beyond a sequence's length are never used.
    """

    def __init__(
        self, layers: int, slots: int, length: int, kv_heads: int, head_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.length = (length + 15) // 16 * 16
        self.slots = slots
        self.transposed = torch.device(device).type == "cpu" and dtype == torch.float32
        shape = (layers, slots, kv_heads, self.length, head_dim)
        self.v = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
        if self.transposed:
            shape = (layers, slots, kv_heads, head_dim, self.length)
        self.k = torch.zeros(shape, device=device, dtype=dtype).unbind(0)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Store k, v [T, Hkv, D] of tokens at (slot, position), i64 [T]; slot -1: a padding row, skipped (kernels) or not allowed."""
        if self.transposed:
            k, v = k.contiguous(), v.contiguous()
            rows, heads, dim = k.shape
            where = (slot.data_ptr(), position.data_ptr(), self.k[layer].data_ptr(), self.v[layer].data_ptr())
            launch(cpu_attention.cache_write, rows, (k.data_ptr(), v.data_ptr(), *where, rows, heads, dim, self.length), k.numel())
        else:
            self.k[layer][slot, :, position] = k.to(self.k[layer].dtype)
            self.v[layer][slot, :, position] = v.to(self.v[layer].dtype)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of slot `source`, all layers."""
        for k, v in zip(self.k, self.v, strict=True):
            if self.transposed:
                k[target, :, :, :length] = k[source, :, :, :length]
            else:
                k[target, :, :length] = k[source, :, :length]
            v[target, :, :length] = v[source, :, :length]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))


@dataclass(frozen=True)
class Plan:
    """Who attends to what, worked out once for all layers: tasks i64 [n, 4] (first query row, queries, keys before, slot)."""

    tasks: torch.Tensor
    work: int  # query-key pairs
    longest: int  # keys of the longest sequence
    spans: tuple[tuple[int, int], ...]  # (first row, end row) of every sequence
    ordered: torch.Tensor  # i64 [S, 2]: (first row, length), longest first (backward)


def _split(row: int, queries: int, before: int, slot: int) -> list[tuple[int, int, int, int]]:
    return [(row + i, min(QUERIES_PER_TASK, queries - i), before + i, slot) for i in range(0, queries, QUERIES_PER_TASK)]


def packed_plan(cu_seqlens: torch.Tensor) -> Plan:
    """Plan of a packed batch: cu_seqlens i32 or i64 [S + 1], rising from 0; sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1]."""
    ends = cu_seqlens.tolist()
    spans = tuple((a, b) for a, b in pairwise(ends) if b > a)
    tasks = [task for a, b in spans for task in _split(a, b - a, 0, a)]
    return _plan(tasks, spans)


def cached_plan(cu_q: torch.Tensor, slot: torch.Tensor, start: torch.Tensor) -> Plan:
    """Plan over a KV cache: sequence s has queries in rows cu_q[s] .. cu_q[s + 1], at positions start[s], start[s] + 1, ... of slot[s]."""
    ends = cu_q.tolist()
    spans = tuple(pairwise(ends))
    if all(b - a == 1 for a, b in spans):  # decode: one query each
        stacked = torch.stack([cu_q[:-1].long(), torch.ones_like(slot), start, slot], dim=1)
        longest = int(start.max()) + 1 if len(spans) else 0
        return Plan(stacked, int(start.sum()) + len(spans), longest, spans, torch.empty(0, 2, dtype=torch.int64))
    tasks = [t for (a, b), s, p in zip(spans, slot.tolist(), start.tolist(), strict=True) for t in _split(a, b - a, p, s)]
    return _plan(tasks, spans)


def _plan(tasks: list[tuple[int, int, int, int]], spans: tuple[tuple[int, int], ...]) -> Plan:
    work = sum(queries * (before + queries) for _, queries, before, _ in tasks)
    longest = max((before + queries for _, queries, before, _ in tasks), default=0)
    ordered = sorted(((a, b - a) for a, b in spans), key=lambda span: (-span[1], span[0]))
    return Plan(
        torch.tensor(tasks, dtype=torch.int64).reshape(-1, 4), work, longest, spans, torch.tensor(ordered, dtype=torch.int64).reshape(-1, 2)
    )


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, strides: tuple[int, ...], kv_heads: int, plan: Plan, scale: float, lse: torch.Tensor | None
) -> torch.Tensor:
    rows, heads, dim = q.shape
    covered = plan.spans[-1][1] if plan.spans else 0
    out = torch.empty_like(q) if covered == rows else torch.zeros_like(q)  # rows of no sequence (padding) give 0
    scale32 = torch.tensor(scale, dtype=torch.float32)
    width = (plan.longest + 15) // 16 * 16
    args = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), plan.tasks.data_ptr())
    work = 2 * plan.work * heads * dim
    launch(
        cpu_attention.attention_forward, len(plan.tasks) * kv_heads, (*args, scale32.data_ptr(), heads, kv_heads, dim, *strides, width), work
    )
    return out


def _lines(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [H, D, T + slack]: lanes along tokens."""
    rows, heads, dim = x.shape
    lines = x.new_zeros(heads, dim, rows + OVERREAD)
    lines[:, :, :rows] = x.permute(1, 2, 0)
    return lines


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
        lse = q.new_zeros(q.shape[:2])
        out = _packed(q, k, v, plan, scale, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        rows, heads, dim = q.shape
        kv_heads = k.shape[1]
        grad = grads[0].contiguous()
        k_lines, v_lines, k_heads = _lines(k), _lines(v), k.transpose(0, 1).contiguous()
        dq = torch.zeros_like(q)
        dk, dv = torch.zeros_like(k_heads), torch.zeros_like(k_heads)
        scale = torch.tensor(ctx.scale, dtype=torch.float32)
        tensors = (q, k_lines, v_lines, k_heads, grad, out, lse, dq, dk, dv, plan.ordered, scale)
        sizes = (heads, kv_heads, dim, rows, rows + OVERREAD, (plan.longest + 15) // 16 * 16)
        launch(cpu_attention.attention_backward, len(plan.ordered) * kv_heads, (*(t.data_ptr() for t in tensors), *sizes), plan.work * heads * dim)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float, lse: torch.Tensor | None) -> torch.Tensor:
    rows, kv_heads, dim = k.shape
    lines, values = _lines(k), v.transpose(0, 1).contiguous()
    strides = (dim * lines.shape[2], 1, lines.shape[2], rows * dim, dim)
    return _forward(q, lines, values, strides, kv_heads, plan, scale, lse)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, plan: Plan | None = None
) -> torch.Tensor:
    """Causal attention within each packed sequence, grouped-query, differentiable.

    q [T, H, D]; k, v [T, Hkv, D], H a multiple of Hkv; cu_seqlens i32 [S + 1]; -> [T, H, D]. Rows behind the last sequence give 0.
    plan: packed_plan(cu_seqlens), to share it between layers.
    """
    plan = plan or packed_plan(cu_seqlens)
    if not uses_kernels(q):
        return _library_varlen(q, k, v, cu_seqlens, plan, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Varlen.apply(q, k, v, plan, scale)
    return _packed(q, k, v, plan, scale, None)


def _library_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and k.shape[1] == q.shape[1]:
        from torch.nn.attention.varlen import varlen_attn

        ends = cu_seqlens.to(device=q.device, dtype=torch.int32)
        covered = plan.spans[-1][1]
        out = varlen_attn(q[:covered], k[:covered], v[:covered], ends, ends, plan.longest, plan.longest, scale=scale, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - covered))
    parts = []
    for a, b in plan.spans:
        x, y, z = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    end = plan.spans[-1][1] if plan.spans else 0
    return torch.cat([*parts, q.new_zeros(q.shape[0] - end, *q.shape[1:])])


def cached_attention(
    q: torch.Tensor,
    cu_q: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Attention of new tokens over a KV cache that already holds their own keys and values; decode and (chunked) prefill alike.

    q [T, H, D]; sequence s owns rows cu_q[s] .. cu_q[s + 1] (cu_q i32 [S + 1]), the i-th at position start[s] + i (start i64 [S]), and sees
    positions 0 .. start[s] + i of slot[s] (i64 [S]). k_cache, v_cache: one layer of KVCache. -> [T, H, D]; no gradient.
    """
    plan = plan or cached_plan(cu_q, slot, start)
    if not uses_kernels(q):
        return _library_cached(q, slot, start, k_cache, v_cache, plan, scale)
    kv_heads, dim, length = k_cache.shape[1:]
    assert plan.longest <= length, "the cache is long enough for every position"
    strides = (dim * length, kv_heads * dim * length, length, length * dim, kv_heads * length * dim)
    return _forward(q.contiguous(), k_cache, v_cache, strides, kv_heads, plan, scale, None)


def _library_cached(
    q: torch.Tensor, slot: torch.Tensor, start: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Plan, scale: float
) -> torch.Tensor:
    if all(b - a == 1 for a, b in plan.spans):  # decode: one padded call
        device, rows = q.device, len(plan.spans)
        keys = torch.arange(plan.longest, device=device)
        mask = (keys[None] <= start.to(device)[:, None])[:, None, None]
        k, v = k_cache[slot.to(device), :, : plan.longest], v_cache[slot.to(device), :, : plan.longest]
        out = F.scaled_dot_product_attention(q[:rows].unsqueeze(2), k, v, attn_mask=mask, scale=scale, enable_gqa=True).squeeze(2)
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - rows))
    parts = []
    for (a, b), s, p in zip(plan.spans, slot.tolist(), start.tolist(), strict=True):
        keys = torch.arange(p + b - a, device=q.device)
        mask = keys[None] <= keys[p:, None]
        k, v = k_cache[s, :, : p + b - a].unsqueeze(0), v_cache[s, :, : p + b - a].unsqueeze(0)
        x = q[a:b].transpose(0, 1).unsqueeze(0)
        parts.append(F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat([*parts, q.new_zeros(q.shape[0] - plan.spans[-1][1], *q.shape[1:])])
