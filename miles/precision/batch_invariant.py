"""fp32 operations on a CPU whose result for a row has the same bits whatever other rows stand beside it; differentiable.

Matrix products are cut into pieces of one fixed shape (16 rows, the last block padded, and a panel of columns), each one serial call of
MKL; the pieces are shared among threads. Everything else goes to compiled kernels. Backward passes are plain and deterministic for the
same inputs and threads, but not batch-invariant. `exact=False` takes the plain product instead: the same functions, not invariant.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from miles.precision import cpu_kernels, cpu_linear, cpu_routing
from miles.precision.threads import address_of, launch

BLOCK = 16  # rows of a matrix block; rows handed over in multiples of it need no padding copy
ROWS = 32  # rows of a task whose partial weight gradients are added up: a fixed split, so that backward is deterministic


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@cache
def _scalar(value: float) -> torch.Tensor:
    """An fp32 constant kept alive for the kernels to read."""
    return torch.tensor(value, dtype=torch.float32)


def _rows(x: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.is_contiguous() else x.contiguous()


def _tasks(rows: int) -> int:
    return (rows + ROWS - 1) // ROWS


# --- linear ---------------------------------------------------------------------------------------------------------------------------


SGEMM = address_of("sgemm_")
SERIAL = address_of("MKL_Set_Num_Threads_Local")


def _panel(n: int) -> int:
    """Columns of one serial product: enough pieces for the threads of a small batch, a function of N alone."""
    return min(n, max(64, (n // 4 + 63) // 64 * 64) if n <= 4096 else 1024)


def _products(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, expert: torch.Tensor | None = None) -> None:
    """out = x weight.T for whole blocks of 16 rows; expert i64 [blocks]: weight is [E, N, K] and each block has its own.

    Each piece (block, panel) is one serial MKL call of one fixed shape. torch.bmm, the way without MKL's entries, lets MKL split a product
    over threads: on some machines (seen on a Xeon, K >= 960, 2 threads) a row's bits then depend on the number of blocks.
    """
    blocks, (n, k) = x.shape[0] // BLOCK, weight.shape[-2:]
    if SGEMM and SERIAL:
        panel = _panel(n)
        tasks = blocks * ((n + panel - 1) // panel)
        tensors = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), 0 if expert is None else expert.data_ptr())
        launch(cpu_linear.linear_blocks, tasks, (*tensors, BLOCK, k, n, panel, SGEMM, SERIAL, blocks), x.numel() * n)
        return
    pieces, results = x.view(blocks, BLOCK, k), out.view(blocks, BLOCK, n)
    if expert is None:
        torch.bmm(pieces, weight.t().unsqueeze(0).expand(blocks, k, n), out=results)
    else:
        for piece, e, result in zip(pieces, expert.tolist(), results, strict=True):
            torch.bmm(piece[None], weight[e].t()[None], out=result[None])


def _blocked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] @ weight [N, K].T in blocks of 16 rows."""
    rows = x.shape[0]
    padded = (rows + BLOCK - 1) // BLOCK * BLOCK
    if rows != padded:
        x = F.pad(x, (0, 0, 0, padded - rows))
    out = x.new_empty(padded, weight.shape[0])
    _products(x, weight.contiguous(), out)
    out = out[:rows]
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _blocked(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.has_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, exact: bool = True) -> torch.Tensor:
    """x [.., K] @ weight [N, K].T + bias [N] -> [.., N]."""
    if not exact:
        return F.linear(x, weight, bias)
    flat = _rows(x)
    out = _Linear.apply(flat, weight, bias) if _needs_grad(flat, weight, bias) else _blocked(flat, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


# --- RMS norm -------------------------------------------------------------------------------------------------------------------------


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor | None) -> torch.Tensor:
    rows, n = x.shape
    out = torch.empty_like(x)
    args = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), 0 if scale is None else scale.data_ptr(), rows, n, _scalar(eps).data_ptr(), ROWS)
    launch(cpu_kernels.rms_norm_forward, _tasks(rows), args, x.numel())
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = x.new_empty(x.shape[0])
        ctx.save_for_backward(x, weight, scale)
        return _rms_norm(x, weight, eps, scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, n = x.shape
        grad, grad_x, parts = grads[0].contiguous(), torch.empty_like(x), x.new_empty(_tasks(rows), n)
        tensors = (x, weight, grad, scale, grad_x, parts)
        launch(cpu_kernels.rms_norm_backward, _tasks(rows), (*(t.data_ptr() for t in tensors), rows, n, ROWS), x.numel() * 4)
        return grad_x, parts.sum(0), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension: x [.., N], weight [N]."""
    flat = _rows(x)
    out = _RmsNorm.apply(flat, weight, eps) if _needs_grad(flat, weight) else _rms_norm(flat, weight, eps, None)
    return out.view(x.shape)


# --- SiLU times up --------------------------------------------------------------------------------------------------------------------


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    rows, n = gate.shape
    out = gate.new_empty(rows, n)
    tensors = (gate.data_ptr(), up.data_ptr(), out.data_ptr())
    launch(cpu_kernels.silu_mul_forward, _tasks(rows), (*tensors, rows, n, gate.stride(0), up.stride(0), ROWS), gate.numel() * 4)
    return out


def _silu_mul_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, grad_gate: torch.Tensor, grad_up: torch.Tensor) -> None:
    rows, n = gate.shape
    tensors = (gate, up, grad, grad_gate, grad_up)
    launch(cpu_kernels.silu_mul_backward, _tasks(rows), (*(t.data_ptr() for t in tensors), rows, n, gate.stride(0), ROWS), gate.numel() * 8)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _silu_mul_backward(gate, up, grads[0].contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate / (1 + exp(-gate)) * up, both [.., N]."""
    x, y = _rows(gate), _rows(up)
    out = _SiluMul.apply(x, y) if _needs_grad(x, y) else _silu_mul(x, y)
    return out.view(gate.shape)


# --- norm of a head and rotary embedding ----------------------------------------------------------------------------------------------

RotaryTable = tuple[torch.Tensor, torch.Tensor]  # cos, sin: f32 [positions, D / 2]


def _norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, position: torch.Tensor, table: RotaryTable, scale: torch.Tensor | None
) -> torch.Tensor:
    rows, heads, dim = x.shape
    out = torch.empty_like(x)
    tensors = (x, weight, out, scale, position, *table)
    sizes = (rows, heads, dim, _scalar(eps).data_ptr(), ROWS)
    launch(cpu_kernels.norm_rope_forward, _tasks(rows), (*(0 if t is None else t.data_ptr() for t in tensors), *sizes), x.numel() * 2)
    return out


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        scale = x.new_empty(x.shape[:2])
        ctx.save_for_backward(x, weight, scale, position, cos, sin)
        return _norm_rope(x, weight, eps, position, (cos, sin), scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale, position, cos, sin = ctx.saved_tensors
        rows, heads, dim = x.shape
        grad, grad_x, parts = grads[0].contiguous(), torch.empty_like(x), x.new_empty(_tasks(rows), dim)
        tensors = (x, weight, grad, scale, position, cos, sin, grad_x, parts)
        args = (*(0 if t is None else t.data_ptr() for t in tensors), rows, heads, dim, ROWS)
        launch(cpu_kernels.norm_rope_backward, _tasks(rows), args, x.numel() * 4)
        return grad_x, None if weight is None else parts.sum(0), None, None, None, None


def norm_rope(x: torch.Tensor, weight: torch.Tensor | None, eps: float, position: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotary embedding of x [T, H, D] (RMS norm over D with `weight` first, where given), from a table indexed by position i64 [T]."""
    x = x.contiguous()
    if _needs_grad(x, weight):
        return _NormRope.apply(x, weight, eps, position, *table)
    return _norm_rope(x, weight, eps, position, table, None)


# --- mixture of experts ---------------------------------------------------------------------------------------------------------------


def _route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, experts = logits.shape
    prob = torch.empty_like(logits)
    index, weight = torch.empty(rows, top_k, dtype=torch.int64), logits.new_empty(rows, top_k)
    tensors = (logits.data_ptr(), prob.data_ptr(), index.data_ptr(), weight.data_ptr())
    launch(cpu_routing.route, _tasks(rows), (*tensors, rows, experts, top_k, int(normalise), ROWS), logits.numel() * (4 + top_k))
    return prob, index, weight


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        prob, index, weight = _route(logits, top_k, normalise)
        ctx.save_for_backward(prob, index, weight)
        ctx.normalise = normalise
        ctx.mark_non_differentiable(index)
        return index, weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        prob, index, weight = ctx.saved_tensors
        grad = grads[1]
        mean = (grad * weight).sum(1, keepdim=True)
        if ctx.normalise:  # normalised over the chosen: a softmax of their logits alone
            return torch.zeros_like(prob).scatter_(1, index, weight * (grad - mean)), None, None
        return (prob * -mean).scatter_add_(1, index, weight * grad), None, None


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over experts and the top_k: logits [T, E] -> (index i64 [T, k], most probable first, ties to the lower expert; weight [T, k]).

    normalise: the weights of a token are divided by their sum (norm_topk_prob).
    """
    logits = logits.contiguous()
    return _Route.apply(logits, top_k, normalise) if _needs_grad(logits) else _route(logits, top_k, normalise)[1:]


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension of [T, E] (a router's probabilities); no gradient."""
    return _route(_rows(x), 1, False)[0].view(x.shape)


def _sorted_rows(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """(padded row of every routed row i64 [T k], first block of every expert and the end [E + 1])."""
    slot, first, count = (torch.empty(size, dtype=torch.int64) for size in (index.numel(), experts + 1, experts))
    tensors = (index.data_ptr(), slot.data_ptr(), first.data_ptr(), count.data_ptr())
    launch(cpu_routing.sort_by_expert, 1, (*tensors, index.numel(), experts, BLOCK), 0)
    return slot, first.tolist()


def _scatter(x: torch.Tensor, slot: torch.Tensor, padded: int, top_k: int, weight: torch.Tensor | None) -> torch.Tensor:
    out = x.new_zeros(padded, x.shape[1])
    args = (x.data_ptr(), slot.data_ptr(), out.data_ptr(), 0 if weight is None else weight.data_ptr(), slot.numel(), top_k, x.shape[1], ROWS)
    launch(cpu_routing.scatter_rows, _tasks(slot.numel()), args, slot.numel() * x.shape[1])
    return out


def _combine(y: torch.Tensor, slot: torch.Tensor, rows: int, top_k: int, weight: torch.Tensor | None) -> torch.Tensor:
    out = y.new_empty(rows, y.shape[1])
    args = (y.data_ptr(), slot.data_ptr(), 0 if weight is None else weight.data_ptr(), out.data_ptr(), rows, top_k, y.shape[1], ROWS)
    launch(cpu_routing.combine_rows, _tasks(rows), args, slot.numel() * y.shape[1])
    return out


def _grouped(x: torch.Tensor, weight: torch.Tensor, first: list[int], exact: bool) -> torch.Tensor:
    """Rows of expert e, blocks first[e] .. first[e + 1], times weight[e] [N, K].T."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    if exact or first[-1] <= 4 * len(weight):  # few rows: one call for all experts is faster than one each
        owner = torch.repeat_interleave(torch.arange(len(weight)), torch.tensor(first).diff())
        _products(x, weight.contiguous(), out, owner)
        return out
    for e, (a, b) in enumerate(pairwise(first)):
        if b > a:
            torch.mm(x[a * BLOCK : b * BLOCK], weight[e].t(), out=out[a * BLOCK : b * BLOCK])
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, exact: bool
    ) -> torch.Tensor:
        out, saved, first = _experts(x, index, weight, gate_up, down, exact)
        ctx.save_for_backward(weight, gate_up, down, *saved)
        ctx.first = first
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, gate_up, down, slot, rows, hidden, inner, y = ctx.saved_tensors
        first, (tokens, top_k), wide = ctx.first, weight.shape, inner.shape[1]
        grad = grads[0].contiguous()
        grad_weight = torch.empty_like(weight)
        args = (grad.data_ptr(), y.data_ptr(), slot.data_ptr(), grad_weight.data_ptr(), slot.numel(), top_k, grad.shape[1], ROWS)
        launch(cpu_routing.route_weight_backward, _tasks(slot.numel()), args, slot.numel() * grad.shape[1])
        grad_y = _scatter(grad, slot, y.shape[0], top_k, weight)
        grad_down, grad_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        grad_inner, grad_rows = torch.empty_like(inner), torch.empty_like(rows)
        spans = [(e, slice(a * BLOCK, b * BLOCK)) for e, (a, b) in enumerate(pairwise(first)) if b > a]
        for e, s in spans:
            torch.mm(grad_y[s].t(), inner[s], out=grad_down[e])
            torch.mm(grad_y[s], down[e], out=grad_inner[s])
        grad_hidden = torch.empty_like(hidden)
        _silu_mul_backward(hidden[:, :wide], hidden[:, wide:], grad_inner, grad_hidden[:, :wide], grad_hidden[:, wide:])
        for e, s in spans:
            torch.mm(grad_hidden[s].t(), rows[s], out=grad_gate_up[e])
            torch.mm(grad_hidden[s], gate_up[e], out=grad_rows[s])
        return _combine(grad_rows, slot, tokens, top_k, None), None, grad_weight, grad_gate_up, grad_down, None


def _experts(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[int]]:
    tokens, top_k = index.shape
    slot, first = _sorted_rows(index, gate_up.shape[0])
    rows = _scatter(x, slot, first[-1] * BLOCK, top_k, None)
    hidden = _grouped(rows, gate_up, first, exact)
    wide = hidden.shape[1] // 2
    inner = _silu_mul(hidden[:, :wide], hidden[:, wide:])
    y = _grouped(inner, down, first, exact)
    return _combine(y, slot, tokens, top_k, weight), (slot, rows, hidden, inner, y), first


def experts(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, exact: bool = True
) -> torch.Tensor:
    """Routed experts: sum over c of weight[t, c] * down[e](silu(gate[e](x_t)) * up[e](x_t)), e = index[t, c], added in the order of c.

    x [T, H]; index i64 [T, k]; weight [T, k]; gate_up [E, 2 I, H], gate first; down [E, H, I]; -> [T, H].
    """
    x, index, weight = x.contiguous(), index.contiguous(), weight.contiguous()
    if _needs_grad(x, weight, gate_up, down):
        return _Experts.apply(x, index, weight, gate_up, down, exact)
    return _experts(x, index, weight, gate_up, down, exact)[0]
