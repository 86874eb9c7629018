"""What a forward pass attends to: a packed batch of whole sequences, or new tokens over a KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from miles.models.rerouted import Rerouted
from miles.precision.attention import KVCache, Plan, cached_attention, cached_plan, packed_plan, varlen_attention


@dataclass
class Context:
    """Common part, of which a mixture of experts fills what is given with the experts that it chose.

    routes: i32 [T, layers, k] on the CPU, its choices; rerouted: how they differ from those of an earlier pass.
    """

    routes: torch.Tensor | None = None
    rerouted: Rerouted | None = None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [T, H, D], k, v [T, Hkv, D] -> [T, H, D]."""
        raise AssertionError("a Context is either packed or cached")

    def record(self, layer: int, index: torch.Tensor) -> None:
        """Note the experts (index [T or more, k]) that a layer chose."""
        if self.routes is not None:
            self.routes[:, layer] = index[: len(self.routes)].to(device=self.routes.device, dtype=self.routes.dtype)
        if self.rerouted is not None:
            self.rerouted.record(layer, index)


@dataclass
class PackedContext(Context):
    """Whole sequences side by side: sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1]; cu_seqlens i32 [S + 1]."""

    cu_seqlens: torch.Tensor = field(kw_only=True)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = packed_plan(self.cu_seqlens)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return varlen_attention(q, k, v, self.cu_seqlens, scale, self.plan)


@dataclass
class CachedContext(Context):
    """New tokens of S sequences that live in a KV cache; their keys and values are written to it first.

    Sequence s owns rows cu_q[s] .. cu_q[s + 1] (cu_q i32 [S + 1]), at positions start[s], start[s] + 1, ... (start i64 [S]) of slot[s]
    (i64 [S]); positions below start[s] must be in the cache already. All three on the CPU. Decode: one row a sequence.
    """

    cache: KVCache = field(kw_only=True)
    cu_q: torch.Tensor = field(kw_only=True)
    slot: torch.Tensor = field(kw_only=True)
    start: torch.Tensor = field(kw_only=True)
    plan: Plan = field(init=False)
    row_slot: torch.Tensor = field(init=False)
    row_position: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plan = cached_plan(self.cu_q, self.slot, self.start)
        if self.plan.longest > self.cache.length:
            raise ValueError(f"a sequence of {self.plan.longest} tokens does not fit into a KV cache of {self.cache.length} per sequence")
        count = self.cu_q.diff().long()
        rows = int(self.cu_q[-1])
        if bool((count == 1).all()):
            self.row_slot, self.row_position = self.slot, self.start
        else:
            offset = torch.arange(rows) - torch.repeat_interleave(self.cu_q[:-1].long(), count)
            self.row_slot = torch.repeat_interleave(self.slot, count)
            self.row_position = torch.repeat_interleave(self.start, count) + offset

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        rows = len(self.row_slot)
        self.cache.write(layer, k[:rows], v[:rows], self.row_slot, self.row_position)
        return cached_attention(q, self.cu_q, self.slot, self.start, self.cache.k[layer], self.cache.v[layer], scale, self.plan)
