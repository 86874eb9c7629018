"""Parallel arithmetic: does a layout divide the ranks and the model, in words and with a setting that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from miles.config.schema import Parallel, Shape


@dataclass(frozen=True)
class Layout:
    """Nodes of the trainer, ranks on each, and how they are split."""

    nodes: int
    per_node: int
    parallel: Parallel

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def data(self) -> int:
        """Data-parallel size; 0 when the layout does not fit."""
        ranks = self.parallel.model_ranks
        return 0 if self.world % ranks else self.world // ranks


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
    sizes = layout.parallel
    have = f"{layout.nodes} {'node' if layout.nodes == 1 else 'nodes'} × {layout.per_node} = {layout.world} ranks"
    found = []
    if layout.world % sizes.model_ranks:
        text = f"TP {sizes.tensor} × PP {sizes.pipeline} × CP {sizes.context} = {sizes.model_ranks} ranks for one copy of the model, but there are {have}"
        fitting = _largest(sizes.tensor, lambda tp: layout.world % (tp * sizes.pipeline * sizes.context) == 0)
        smaller = f"train.parallel.tensor={fitting}" if fitting else "train.parallel.pipeline=1 train.parallel.context=1"
        nodes = f"train.num_nodes={_nodes(sizes.model_ranks, layout.per_node)}"
        field = "pipeline" if sizes.pipeline > 1 else "context" if sizes.context > 1 else "tensor"
        found.append(Misfit(field, text, f"set {nodes}, or {smaller}"))
    if sizes.expert > 1 and layout.world % sizes.expert_ranks:
        default = " (expert_tensor defaults to TP)" if sizes.inside_expert == sizes.tensor else ""
        text = (
            f"ETP {sizes.inside_expert}{default} × EP {sizes.expert} × PP {sizes.pipeline} = {sizes.expert_ranks} ranks "
            f"for one copy of the experts, but there are {have}"
        )
        etp = _largest(sizes.inside_expert, lambda size: layout.world % (size * sizes.expert * sizes.pipeline) == 0)
        nodes = f"train.num_nodes={_nodes(sizes.expert_ranks, layout.per_node, sizes.model_ranks)}"
        smaller = f"train.parallel.expert_tensor={etp}"
        if etp is None:
            ep = _largest(sizes.expert, lambda size: layout.world % (size * sizes.pipeline) == 0)
            smaller = f"train.parallel.expert={ep or 1} train.parallel.expert_tensor=1"
        found.append(Misfit("expert", text, f"set {smaller}, or {nodes}"))
    return found


def _model(layout: Layout, shape: Shape) -> list[Misfit]:
    """TP divides heads, PP divides layers, EP divides experts, ETP divides an expert's width."""
    found, sizes = [], layout.parallel
    kv = shape.kv_heads or shape.heads
    if shape.heads % sizes.tensor:
        found.append(_divide("tensor", "TP", sizes.tensor, f"{shape.heads} heads", shape.heads))
    elif kv % sizes.tensor and sizes.tensor % kv:
        found.append(_divide("tensor", "TP", sizes.tensor, f"{kv} key-value heads", kv))
    if sizes.pipeline > 1 and shape.layers % sizes.pipeline:
        found.append(_divide("pipeline", "PP", sizes.pipeline, f"{shape.layers} layers (uneven stages are not there yet)", shape.layers))
    if sizes.expert > 1 and not shape.experts:
        found.append(Misfit("expert", f"EP {sizes.expert}, but the model has no experts", "set train.parallel.expert=1"))
    elif sizes.expert > 1 and shape.experts % sizes.expert:
        found.append(_divide("expert", "EP", sizes.expert, f"{shape.experts} experts", shape.experts))
    if shape.experts and shape.expert_ffn % sizes.inside_expert:
        found.append(_divide("expert_tensor", "ETP", sizes.inside_expert, f"an expert's width {shape.expert_ffn}", shape.expert_ffn))
    return found


def _divide(field: str, short: str, size: int, what: str, number: int) -> Misfit:
    fitting = _largest(size, lambda candidate: number % candidate == 0)
    return Misfit(field, f"{short} {size} does not divide {what}", f"set train.parallel.{field}={fitting}")


def _largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    return next((size for size in range(limit, 0, -1) if fits(size)), None)


def _nodes(ranks: int, per_node: int, also: int = 1) -> int:
    """Fewest nodes whose ranks are a multiple of `ranks` and of `also`."""
    return lcm(ranks, also, per_node) // per_node
