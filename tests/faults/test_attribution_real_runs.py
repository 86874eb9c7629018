"""Real runs whose engine does something else than it says: the analysis names it. A run without a fault has equal bits, and no cause.

A lag can't be made here: runs are synchronous, and an engine that serves other weights than the batch's is refused.
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
from miles.analysis.verdict import judge

WORDS = [
    "recipes/tiny", "num_rollout=6", "warm_start.steps=2", "eval.interval=6", "algorithm.entropy_coef=0.01", "rollout.num_gpus=2", "rollout.batch_size=8",
    "rollout.sampling.max_response_len=24", "rollout.kv_cache_tokens=4096", "train.max_tokens_per_gpu=2048", "train.optimizer.lr=5e-3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [("", None), ("temperature:1.1", "temperature"), ("top_p:0.9", "top-p or top-k"), ("head:bf16", "bf16 logits"), ("stale:1", "one engine off")],
)
def test_what_is_wrong_with_the_engine_comes_first(wrong: str, cause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", wrong)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent / "wrong"), *filter(None, [os.environ.get("PYTHONPATH")])]))
    runs.run(tmp_path / "run", *WORDS)
    state = analyze(tmp_path / "run", Alone())
    causes = attribute(state.evidence)
    verdict = judge(measure.token_metrics(state), measure.standard_errors(state), causes)
    if cause is None:
        assert causes == []
        assert verdict.word == "bitwise"
        return
    assert causes[0].name == cause, causes
    assert causes[0].share > 0.5, causes
    assert any(cause in word for word in verdict.why)
