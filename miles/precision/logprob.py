"""The log-prob function, shared by sampling and training: one computation, so that both have the same bits.

log-prob = log softmax(logits / temperature) in fp32, after temperature and before top-k and top-p, as SGLang 0.5.15 reports it; greedy
decoding (temperature 0) counts as temperature 1. Never below the least finite fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from miles.precision import cpu_logprob
from miles.precision.threads import launch

LEAST = torch.finfo(torch.float32).min


def _temperatures(temperature: float | torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        given = temperature.to(device=device, dtype=torch.float32).expand(rows)
    else:
        given = torch.full((rows,), temperature, dtype=torch.float32, device=device)
    return torch.where(given == 0, 1.0, given).contiguous()


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """fp32 with contiguous rows (a row stride is fine); no copy where that already holds."""
    logits = logits.float()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = _rows(logits)
        rows, size = x.shape
        logprob, entropy, lse = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3))
        if x.device.type == "cpu":
            tensors = (x, target, temperature, logprob, entropy, lse)
            launch(cpu_logprob.logprob_forward, rows, (*(t.data_ptr() for t in tensors), rows, size, x.stride(0)), x.numel() * 4)
        else:
            for part in _chunks(rows, size):
                z = x[part] / temperature[part, None]
                lse[part] = z.logsumexp(1)
                logprob[part] = (z.gather(1, target[part, None])[:, 0] - lse[part]).clamp_min(LEAST)
                p = (z - lse[part, None]).exp()
                entropy[part] = lse[part] - torch.where(p > 0, p * z, 0).sum(1)
        ctx.save_for_backward(logits, target, temperature, entropy, lse)
        ctx.set_materialize_grads(True)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, temperature, entropy, lse = ctx.saved_tensors
        x = _rows(logits)
        rows, size = x.shape
        grad_logprob, grad_entropy = grads[0].float().contiguous(), grads[1].float().contiguous()
        out = torch.empty(rows, size, dtype=torch.float32, device=x.device)
        if x.device.type == "cpu":
            tensors = (x, target, temperature, entropy, lse, grad_logprob, grad_entropy, out)
            launch(cpu_logprob.logprob_backward, rows, (*(t.data_ptr() for t in tensors), rows, size, x.stride(0)), x.numel() * 4)
        else:
            for part in _chunks(rows, size):
                logp = x[part] / temperature[part, None] - lse[part, None]
                p = logp.exp()
                scaled = torch.where(p > 0, p * (logp + entropy[part, None]), 0)
                g = -p * grad_logprob[part, None] - scaled * grad_entropy[part, None]
                g.scatter_add_(1, target[part, None], grad_logprob[part, None])
                out[part] = g / temperature[part, None]
        return out.to(logits.dtype), None, None


def _chunks(rows: int, size: int) -> list[slice]:
    """Runs of rows of about 64 Mi elements: bounds the temporaries."""
    step = max(1, (1 << 26) // size)
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


def token_logprob(logits: torch.Tensor, target: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of the target of every row, and the entropy of the row's distribution.

    logits [T, V] fp32 (others are cast first), target i64 [T] in 0 .. V - 1, temperature a number or [T] (0 counts as 1);
    -> (logprob f32 [T], entropy f32 [T]), natural log, differentiable in logits. Beyond the logits it takes O(T) memory forward and one
    [T, V] gradient backward. A row's bits depend on that row, its target and its temperature alone.
    """
    scale = _temperatures(temperature, logits.shape[0], logits.device)
    return _TokenLogprob.apply(logits, target.to(torch.int64).contiguous(), scale)


@torch.no_grad()
def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row and report its log-prob, bit for bit token_logprob(logits, token, temperature)'s.

    logits [B, V] fp32; temperature f32 [B] (0: greedy, the lowest token of equals); top_k i64 [B] (<= 0: off); top_p f32 [B] (1: off);
    seed i64 [B] (the bits of an u64); position i64 [B], the index of the drawn token in its sequence; -> (token i64 [B], logprob f32 [B]).
    A token is kept when its rank (by probability falling, then token rising) is below top_k and the probability before it is <= top_p.
    One uniform per (seed, position), so a draw depends on nothing else in the batch: with G = 0x9E3779B97F4A7C15 modulo 2^64 and mix
    splitmix64's finaliser, u = (mix(mix(seed + G) + (position + 1) G) >> 11) 2^-53; then the inverse CDF (kept tokens in falling order
    when filtered, token order otherwise; sums in fp64).
    """
    device = logits.device
    x = _rows(logits.cpu())
    rows, size = x.shape
    temperature, top_p = temperature.float().cpu().contiguous(), top_p.float().cpu().contiguous()
    top_k, seed, position = (t.to(torch.int64).cpu().contiguous() for t in (top_k, seed, position))
    token, logprob = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    tensors = (x, temperature, top_k, top_p, seed, position, token, logprob)
    launch(cpu_logprob.sample_rows, rows, (*(t.data_ptr() for t in tensors), rows, size, x.stride(0)), x.numel() * 4)
    if device.type != "cpu":
        token = token.to(device)
        logprob = token_logprob(logits, token, temperature.to(device))[0]
    return token, logprob
