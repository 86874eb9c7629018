"""Placement jobs: rollout nodes that are killed, say goodbye and come late; the run has the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import whole_runs as runs
import yaml

from miles.config.compose import load_config
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.slurm.attempt import SUPERVISE, Attempt, Component
from miles.slurm.local import LocalComponent, LocalRunner

JOBS = ["cluster.placement=jobs", "rollout.num_gpus=2", "cluster.groups.rollout.gpus_per_node=1", "rollout.generate_path=gated.generate"]
# Samples of step 4 with an odd draw wait at the gate; what is generated leaves a line.
GATED = """
import asyncio, os
from pathlib import Path
from miles.rollout.generate import generate as built_in

async def generate(draw, sample, context):
    folder = Path(os.environ["GATED"])
    with (folder / "generated").open("a") as file:
        file.write(f"{context.kind} {draw.draw} {sample}\\n")
    while context.kind == "rollout" and context.weight_version == 3 and draw.draw % 2 and not (folder / "gate").exists():
        await asyncio.sleep(0.02)
    return await built_in(draw, sample, context)
"""


class Apart:
    """An attempt whose trainer and rollout nodes are started one by one, as jobs of their own would."""

    def __init__(self, folder: Path) -> None:
        config = load_config(runs.STEPS[:1], [*runs.STEPS[1:], *JOBS])
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.folder, self.attempt = folder, Attempt(RunDir(folder), config, print, self.nobody)
        self.started: list[LocalComponent] = []

    @staticmethod
    def nobody(attempt: Attempt, component: str) -> Component:
        raise AssertionError("components are started by hand")

    def start(self, component: str, node: int) -> LocalComponent:
        runner = LocalRunner(self.attempt.folder / "submitit")
        self.started.append(runner.submit(f"{component}.{node}.{len(self.started)}", SUPERVISE, str(self.folder), component, self.attempt.epoch, node))
        return self.started[-1]

    def until(self, ready: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + runs.PATIENCE
        while not ready():
            assert time.monotonic() < deadline, f"{what}: did not happen; {runs.status(self.folder)}\n{runs.logs(self.folder)}"
            time.sleep(0.02)

    def close(self) -> None:
        for component in self.started:
            component.kill()


def test_rollout_nodes_come_and_go(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("GATED", str(tmp_path))
    monkeypatch.setenv("MILES_SILENCE_SECONDS", "5")
    run_dir = tmp_path / "run"
    apart = Apart(run_dir)
    try:
        train, first, second = apart.start("train", 0), apart.start("rollout", 0), apart.start("rollout", 1)
        apart.until(lambda: [runs.status(run_dir).get(key) for key in ("phase", "step", "groups_done")] == ["generate", 4, 2], "two groups of step 4, two under way")

        (supervisor,) = psutil.Process(second.jobs[0]._process.pid).children()  # type: ignore[union-attr]
        supervisor.kill()
        (tmp_path / "gate").touch()
        apart.until(lambda: runs.trained(run_dir) >= 4, "step 4 without the second node")
        notices = runs.status(run_dir)["notices"]
        assert len(notices) == 1
        assert "was silent for 5 s); what it had not finished goes to others" in notices[0]

        first.terminate()
        apart.until(lambda: "a rollout node to come" in runs.status(run_dir).get("waiting", ""), "the trainer waits")
        assert train.running()
        assert first.outcome()["code"] == 75
        before = runs.trained(run_dir)
        assert before < 8

        third = apart.start("rollout", 1)
        apart.until(lambda: not train.running(), "the end")
        assert train.outcome()["code"] == 0, runs.logs(run_dir)
        apart.until(lambda: not third.running(), "the end of the rollout node")
        assert third.outcome()["code"] == 0
    finally:
        apart.close()
    runs.same_run(calm, run_dir)
    names = [{entry.name for entry in read_manifest(RunDir(run_dir).batch(step)).shards} for step in (4, 8)]
    assert names == [{"rollout.0.h5"}, {"rollout.2.h5"}], "nobody else's number is taken"
    generated = Counter((tmp_path / "generated").read_text().split("\n"))
    again = {int(line.split()[1]) for line, count in generated.items() if line.startswith("rollout") and count > 1 and int(line.split()[1]) in range(4, 8)}
    assert len(again) == 1, "of step 4 only the group that the lost worker had under way was made again; its finished one was in its journal"
    used = [draw for step in range(3, 9) for draw in read_manifest(RunDir(run_dir).batch(step)).draws]
    assert used == list(range(6 * 4))
    assert json.loads((run_dir / "provenance.json").read_text())["attempts"][-1]["epoch"] == 1, "one attempt"
