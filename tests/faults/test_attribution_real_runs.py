"""Real runs of a small mixture of experts whose engine does something else than the trainer: the analysis names it. A run without a fault has equal
bits, the same routes, and no cause.

Runs are synchronous, and an engine that says of a reply that other weights made it than the batch's is refused. A lag comes in through a generate
function of the user's own (wrong/taken.py), which takes what the engine made and writes down which weights did.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import whole_runs as runs

from miles.analysis import measure
from miles.analysis.analyze import analyze
from miles.analysis.causes import attribute
from miles.analysis.ranks import Alone
from miles.analysis.routing import routing
from miles.analysis.verdict import judge

WORDS = [
    "recipes/tiny", "num_rollout=6", "warm_start.steps=2", "eval.interval=6", "algorithm.entropy_coef=0.01", "rollout.num_gpus=2", "rollout.batch_size=8",
    "rollout.sampling.max_response_len=24", "rollout.kv_cache_tokens=4096", "train.max_tokens_per_gpu=2048", "train.optimizer.lr=5e-3", "rollout.return_routed_experts=true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("", None), ("temperature:1.1", "temperature"), ("top_p:0.9", "top-p or top-k"), ("head:bf16", "bf16 logits"), ("stale:1", "one engine off"),
        ("routing:0.02", "routing"), ("late:1", "policy lag"), ("late:2", "policy lag"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_engine_comes_first(wrong: str, cause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", wrong)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent / "wrong"), *filter(None, [os.environ.get("PYTHONPATH")])]))
    runs.run(tmp_path / "run", *WORDS, *(["rollout.generate_path=taken.generate"] if cause == "policy lag" else []))
    state = analyze(tmp_path / "run", Alone())
    causes = attribute(state.evidence)
    verdict = judge(measure.token_metrics(state), measure.standard_errors(state), causes)
    routed = routing(tmp_path / "run")["training"]
    assert [layer["layer"] for layer in routed["by_layer"]] == [0, 1]
    assert all(0.01 < layer["differ"] < 0.2 for layer in routed["by_layer"]) or wrong != "routing:0.02"
    if wrong in ("", "temperature:1.1", "top_p:0.9", "head:bf16"):
        assert routed["total"]["differ"] == 0.0, "the same weights, and the same routes"
    if cause == "policy lag":
        lags = {value for (_, value) in state.evidence.cells.values("lag")}
        assert lags == {0, 1}
    if cause is None:
        assert causes == []
        assert verdict.word == "bitwise"
        return
    assert causes[0].name == cause, causes
    assert causes[0].share > 0.5, causes
    assert any(cause in word for word in verdict.why)
