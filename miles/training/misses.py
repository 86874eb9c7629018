"""In how many layers each token was routed otherwise than in the rollout, and in which: what a train record says of routing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.training.packing import PackedBatch


@dataclass(frozen=True)
class Misses:
    """Of a micro-batch: token u8 [T], the layers in which the pass that predicted a token chose other experts (0 where there is nothing to
    compare). By layer u64 [layers], of the tokens under the loss mask: how many were compared, and how many of those went to other experts."""

    token: np.ndarray
    compared: np.ndarray
    differ: np.ndarray

    @property
    def layers(self) -> dict[str, np.ndarray]:
        """As a train record names them."""
        return {"routed": self.compared, "route_miss": self.differ}


def misses(packed: PackedBatch, layers: int) -> Misses:
    """What the pass over this micro-batch found; layers: of the model."""
    token = np.zeros(int(packed.lengths.sum()), np.uint8)
    compared, differ = np.zeros((2, layers), np.uint64)
    found = packed.rerouted
    if found is None:
        return Misses(token, compared, differ)
    predicted = found.row.cpu().numpy() + 1  # a sequence's last token has no routes, so this one is of the same sequence
    token[predicted] = found.differs.sum(1).clamp(max=255).cpu().numpy()
    counted = np.zeros(len(token), bool)
    counted[packed.place[packed.mask[: len(packed.place)].cpu().numpy()]] = True
    chosen = counted[predicted]
    compared[sorted(found.layers)] = np.count_nonzero(chosen)
    differ += found.differs.cpu().numpy()[chosen].sum(0).astype(np.uint64)
    return Misses(token, compared, differ)
