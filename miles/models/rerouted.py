"""Where a pass sends tokens to other experts than an earlier pass did: training against rollout."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Rerouted:
    """The earlier pass's experts of N of this pass's rows, and what this pass does with them.

    row i64 [N]; expert u8 or i16 [N, layers, k], both on the model's device; numbers that i16 can't hold may be given by their bits.
    differs bool [N, layers]: where another set of experts was chosen; layers: those that chose any. Both are filled by the pass, layer by layer; a
    layer that runs again, as checkpointed activations do, fills in the same.
    """

    row: torch.Tensor
    expert: torch.Tensor
    differs: torch.Tensor = field(init=False)
    layers: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.differs = torch.zeros(self.expert.shape[:2], dtype=torch.bool, device=self.expert.device)

    def record(self, layer: int, index: torch.Tensor) -> None:
        """Compare the experts (index [T or more, k]) that a layer chose."""
        mine = index[self.row].to(self.expert.dtype).sort(-1).values
        self.differs[:, layer] = (mine != self.expert[:, layer].sort(-1).values).any(-1)
        self.layers.add(layer)
