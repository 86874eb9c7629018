"""A second attempt at scoring again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from miles.config.schema import RunConfig
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.metrics import Metrics, read_metrics
from miles.data.store.run_dir import RunDir
from miles.run.modes import Rescore
from miles.run.role import Role


class WithoutWeights(Rescore):
    """All of it but the weights."""

    def begin(self) -> None:
        pass

    def sync(self) -> None:
        self.checksum = "abc"


def test_an_older_attempt_tells_it_nothing_more(tmp_path: Path) -> None:
    """It was stopped just before a write, and goes on when the newer one has begun."""
    run = RunDir(tmp_path)
    older = Metrics(run.metrics, Fence(run, new_epoch(run)))
    older.append({"step": 4, "kind": "rollout"})
    nobody: Any = None
    newer = WithoutWeights(Role("trainer", run.path, new_epoch(run), 0, 1, "", ""), RunConfig(), nobody, nobody, nobody)
    newer.resume()
    assert older._handle is not None
    os.write(older._handle, b'{"step": 7, "kind": "rollout", "late": 1}\n')
    newer.told.append({"step": 7, "kind": "rollout"})
    assert read_metrics(run.metrics) == [{"step": 4, "kind": "rollout"}, {"step": 7, "kind": "rollout"}]
