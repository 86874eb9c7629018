"""Parallel arithmetic. Expected numbers are worked out by hand in the test's table."""

import pytest

from miles.config.schema import Parallel, Shape
from miles.plan.layout import Layout, misfits

QWEN3_30B = Shape(layers=48, hidden=2048, ffn=6144, heads=32, kv_heads=4, head_dim=128, vocab=151936, experts=128, top_k=8, expert_ffn=768)
DENSE = Shape(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, vocab=152064)

FIT = [  # nodes, per node, tensor, pipeline, context, expert, expert_tensor, data-parallel size
    (1, 8, 1, 1, 1, 1, None, 8),
    (1, 8, 8, 1, 1, 1, None, 1),
    (2, 8, 8, 2, 1, 1, None, 1),
    (4, 8, 8, 1, 1, 4, None, 4),
    (1, 8, 4, 2, 1, 4, 1, 1),
    (1, 8, 2, 1, 2, 4, 2, 2),
    (16, 4, 4, 4, 1, 16, 1, 4),
]

MISFIT = [  # nodes, per node, tensor, pipeline, context, expert, expert_tensor, shape, [(field, parts of message, parts of mend)]
    (1, 8, 8, 2, 1, 1, None, None, [("pipeline", "TP 8 × PP 2 × CP 1 = 16 ranks for one copy of the model, but there are 1 node × 8 = 8 ranks", "train.num_nodes=2, or train.parallel.tensor=4")]),
    (1, 8, 8, 1, 1, 4, None, None, [("expert", "ETP 8 (expert_tensor defaults to TP) × EP 4 × PP 1 = 32 ranks", "train.parallel.expert_tensor=2, or train.num_nodes=4")]),
    (1, 4, 3, 1, 1, 1, None, None, [("tensor", "TP 3 × PP 1 × CP 1 = 3 ranks", "train.num_nodes=3, or train.parallel.tensor=2")]),
    (1, 8, 1, 1, 3, 1, None, None, [("context", "CP 3 = 3 ranks", "train.num_nodes=3")]),
    (1, 8, 1, 1, 1, 16, 1, None, [("expert", "EP 16 × PP 1 = 16 ranks", "train.parallel.expert=8 train.parallel.expert_tensor=1, or train.num_nodes=2")]),
    (1, 8, 8, 1, 1, 1, None, DENSE, [("tensor", "TP 8 does not divide 28 heads", "train.parallel.tensor=7")]),
    (1, 8, 1, 8, 1, 1, None, DENSE, [("pipeline", "PP 8 does not divide 28 layers", "train.parallel.pipeline=7")]),
    (1, 8, 1, 1, 1, 2, None, DENSE, [("expert", "EP 2, but the model has no experts", "train.parallel.expert=1")]),
    (3, 8, 1, 1, 1, 24, 1, QWEN3_30B, [("expert", "EP 24 does not divide 128 experts", "train.parallel.expert=16")]),
    (5, 1, 1, 1, 1, 1, 5, QWEN3_30B, [("expert_tensor", "ETP 5 does not divide an expert's width 768", "train.parallel.expert_tensor=4")]),
]


def layout(nodes: int, per_node: int, *sizes: int | None) -> Layout:
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor")
    return Layout(nodes, per_node, Parallel(**dict(zip(names, sizes, strict=True))))


@pytest.mark.parametrize("row", FIT)
def test_fits(row: tuple) -> None:
    fitting = layout(*row[:-1])
    assert misfits(fitting, None) == []
    assert fitting.data == row[-1]


@pytest.mark.parametrize("row", MISFIT, ids=[row[8][0][1][:40] for row in MISFIT])
def test_does_not_fit(row: tuple) -> None:
    found = misfits(layout(*row[:7]), row[7])
    assert [misfit.field for misfit in found] == [field for field, _, _ in row[8]]
    for misfit, (_, message, mend) in zip(found, row[8], strict=True):
        assert message in misfit.message
        assert mend in misfit.mend


@pytest.mark.parametrize("row", MISFIT[:5], ids=[row[8][0][1][:40] for row in MISFIT[:5]])
def test_the_mend_mends(row: tuple) -> None:
    """Each alternative that a message offers fits, when done."""
    for misfit in misfits(layout(*row[:7]), row[7]):
        for alternative in misfit.mend.removeprefix("set ").split(", or "):
            nodes, sizes = row[0], dict(zip(("tensor", "pipeline", "context", "expert", "expert_tensor"), row[2:7], strict=True))
            for setting in alternative.split():
                key, value = setting.split("=")
                if key == "train.num_nodes":
                    nodes = int(value)
                else:
                    sizes[key.removeprefix("train.parallel.")] = int(value)
            assert misfits(Layout(nodes, row[1], Parallel(**sizes)), row[7]) == [], alternative
