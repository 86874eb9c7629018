"""AdamW over sharded parameters, and the clipping of the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from miles.config.schema import Optimizer
from miles.training.distributed import Ranks


class Diverged(ArithmeticError):
    """The gradient is not finite: training cannot go on from here. Weights and optimizer are as before the step."""


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), one fused pass over each parameter; no weight decay on norms and biases (1-D parameters).

    States are made at once, as zeros, so that a checkpoint can be loaded into them and memory is known from the start.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    for parameter in decayed + plain:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=local.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, ranks: Ranks) -> float:
    """Scale all gradients so that their global L2 norm is at most `largest` (0: leave them); returns the norm before. Collective.

    Squares are summed in float64 over tensors and ranks. Raises Diverged, on all ranks alike, when the norm is not finite.
    """
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        total = norms.square().sum().reshape(1)
    else:
        total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    norm = float(ranks.all_reduce(total).sqrt())
    if not norm < float("inf"):
        raise Diverged(f"the gradient's norm is {norm}: lower the learning rate, or look for log-probs that are not finite in train/")
    if 0 < largest < norm:
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
