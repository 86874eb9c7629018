"""Parallel arithmetic: does a layout divide the ranks and the model, in words and with a setting that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from miles.config.schema import Parallel, Shape


@dataclass(frozen=True)
class Layout:
    """Ranks of the trainer and how they are split. Sizes are numbers of ranks."""

    nodes: int
    per_node: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def of(cls, nodes: int, per_node: int, parallel: Parallel) -> Layout:
        etp = parallel.expert_tensor or parallel.tensor
        return cls(nodes, per_node, parallel.tensor, parallel.pipeline, parallel.context, parallel.expert, etp)

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense part: TP × PP × CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of the experts: ETP × EP × PP."""
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel size; 0 when the layout does not fit."""
        return 0 if self.world % self.model_ranks else self.world // self.model_ranks


@dataclass(frozen=True)
class Misfit:
    """A part of a layout that does not divide: the arithmetic, and a setting that fits."""

    field: str  # of train.parallel
    message: str
    mend: str


def misfits(layout: Layout, shape: Shape | None) -> list[Misfit]:
    """Everything that does not divide; empty when the layout fits."""
    return [*_ranks(layout), *(_model(layout, shape) if shape else [])]


def _ranks(layout: Layout) -> list[Misfit]:
    """TP × PP × CP and ETP × EP × PP must divide the ranks (Megatron's two grids over the same ranks)."""
    have = f"{layout.nodes} {'node' if layout.nodes == 1 else 'nodes'} × {layout.per_node} = {layout.world} ranks"
    found = []
    if layout.world % layout.model_ranks:
        text = f"TP {layout.tensor} × PP {layout.pipeline} × CP {layout.context} = {layout.model_ranks} ranks for one copy of the model, but there are {have}"
        fitting = _largest(layout.tensor, lambda tp: layout.world % (tp * layout.pipeline * layout.context) == 0)
        smaller = f"train.parallel.tensor={fitting}" if fitting else "train.parallel.pipeline=1 train.parallel.context=1"
        nodes = f"train.num_nodes={_nodes(layout.model_ranks, layout.per_node)}"
        field = "pipeline" if layout.pipeline > 1 else "context" if layout.context > 1 else "tensor"
        found.append(Misfit(field, text, f"set {nodes}, or {smaller}"))
    if layout.expert > 1 and layout.world % layout.expert_ranks:
        default = " (expert_tensor defaults to TP)" if layout.expert_tensor == layout.tensor else ""
        text = (
            f"ETP {layout.expert_tensor}{default} × EP {layout.expert} × PP {layout.pipeline} = {layout.expert_ranks} ranks "
            f"for one copy of the experts, but there are {have}"
        )
        etp = _largest(layout.expert_tensor, lambda size: layout.world % (size * layout.expert * layout.pipeline) == 0)
        nodes = f"train.num_nodes={_nodes(layout.expert_ranks, layout.per_node, layout.model_ranks)}"
        smaller = f"train.parallel.expert_tensor={etp}"
        if etp is None:
            ep = _largest(layout.expert, lambda size: layout.world % (size * layout.pipeline) == 0)
            smaller = f"train.parallel.expert={ep or 1} train.parallel.expert_tensor=1"
        found.append(Misfit("expert", text, f"set {smaller}, or {nodes}"))
    return found


def _model(layout: Layout, shape: Shape) -> list[Misfit]:
    """TP divides heads, PP divides layers, EP divides experts, ETP divides an expert's width."""
    found = []
    kv = shape.kv_heads or shape.heads
    if shape.heads % layout.tensor:
        found.append(_divide("tensor", "TP", layout.tensor, f"{shape.heads} heads", shape.heads))
    elif kv % layout.tensor and layout.tensor % kv:
        found.append(_divide("tensor", "TP", layout.tensor, f"{kv} key-value heads", kv))
    if layout.pipeline > 1 and shape.layers % layout.pipeline:
        found.append(_divide("pipeline", "PP", layout.pipeline, f"{shape.layers} layers (uneven stages are not there yet)", shape.layers))
    if layout.expert > 1 and not shape.experts:
        found.append(Misfit("expert", f"EP {layout.expert}, but the model has no experts", "set train.parallel.expert=1"))
    elif layout.expert > 1 and shape.experts % layout.expert:
        found.append(_divide("expert", "EP", layout.expert, f"{shape.experts} experts", shape.experts))
    if shape.experts and shape.expert_ffn % layout.expert_tensor:
        found.append(_divide("expert_tensor", "ETP", layout.expert_tensor, f"an expert's width {shape.expert_ffn}", shape.expert_ffn))
    return found


def _divide(field: str, short: str, size: int, what: str, number: int) -> Misfit:
    fitting = _largest(size, lambda candidate: number % candidate == 0)
    return Misfit(field, f"{short} {size} does not divide {what}", f"set train.parallel.{field}={fitting}")


def _largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    return next((size for size in range(limit, 0, -1) if fits(size)), None)


def _nodes(ranks: int, per_node: int, also: int = 1) -> int:
    """Fewest nodes whose ranks are a multiple of `ranks` and of `also`."""
    return lcm(ranks, also, per_node) // per_node
