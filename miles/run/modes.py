"""The loop with a part of it left out: rollout alone, training alone on recorded batches, recorded batches scored again.

Every batch is on disk before it is trained on, so each mode is the same run with other verbs, not other code.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from miles.config.exits import TryAgain
from miles.config.schema import RunConfig
from miles.data.recorded import chosen_steps, reassigned, recorded_batch, recording
from miles.data.store.manifest import Manifest, read_manifest
from miles.data.store.metrics import read_metrics
from miles.run.coordinator import StopRequested
from miles.run.schedule import Step
from miles.run.state import Run, combine
from miles.training.batch import open_batch


def mode(config: RunConfig) -> type[Run]:
    """The run that the configuration asks for."""
    if config.debug.rollout_only:
        return RolloutOnly
    if config.debug.rescore:
        return Rescore
    return Replay if config.debug.train_only else Run


class RolloutOnly(Run):
    """Every batch is made and sealed by the weights at the start. Nothing moves, so nothing is saved: the sealed batches are the progress."""

    synced = False
    evaluated = False

    @property
    def version(self) -> int:
        return 0

    def freeze_reference(self) -> None:
        """Nobody asks for it."""

    def sync(self) -> None:
        """Once an attempt."""
        if not self.synced:
            super().sync()
            self.synced = True

    def train(self, step: Step, folder: Path) -> None:
        """Metrics of the batch itself."""
        batch = open_batch(read_manifest(folder), folder, self.config.algorithm, self.ranks)
        self.metrics = batch.metrics()
        batch.close()
        self.step_done(step, batch.manifest)

    def evaluate(self) -> None:
        """Once: the weights stay the same, and so would the answers."""
        if not self.evaluated:
            super().evaluate()
            self.evaluated = True

    def save(self, stop: bool = False) -> None:
        """There is nothing that the batches don't say."""

    def export(self) -> None:
        """The weights are those of the start."""


class Replay(Run):
    """Training alone, on the batches of another run, in their order. No engine, no worker, no prompts."""

    warned = False

    @property
    def engines_ready(self) -> bool:
        """There are none: what counts is that the checksum of the weights is known."""
        return bool(self.checksum)

    def meet_engines(self) -> None:
        """There are none."""

    def sync(self) -> None:
        """The weights go nowhere, but the recorded batches name the checksum of those that made them."""
        self.checksum = self.trainer.weight_checksum()

    def ask(self, step: Step) -> Path:
        """The recorded batch of a step, verified."""
        if self.service.announce(phase="wait", kind=step.kind, step=step.number):
            raise StopRequested
        manifest = recorded_batch(self.config, step.number)
        if step.kind == "rollout":
            self.compare(manifest)
        return recording(self.config).batch(step.number)

    def compare(self, manifest: Manifest) -> None:
        """Say once when other weights are at hand than those that made the batch."""
        made_by = manifest.policy.weight_checksum
        if self.warned or made_by == self.checksum:
            return
        self.warned = True
        line = f"step {manifest.step}: weights {made_by} made the recorded batch, the present ones are {self.checksum}: from here on, other weights train on recorded batches"
        print(f"trainer: {line}", file=sys.stderr, flush=True)
        self.service.announce(notices=[line])

    def manifest(self, folder: Path) -> Manifest:
        """As recorded, or divided anew over this run's ranks."""
        manifest = read_manifest(folder)
        return reassigned(manifest, folder, self.config) if self.config.debug.reassign else manifest

    def evaluate(self) -> None:
        """Nobody could answer."""


class Rescore(Replay):
    """Recorded batches under other weights: log-probs and entropies, recorded as training records them. No optimizer, no update."""

    def resume(self) -> None:
        """Weights as at a run's beginning; what is scored already stays."""
        self.begin()
        self.sync()
        if self.role.rank == 0:
            self.told.cut_back(math.inf)  # this attempt's copy: an older one goes on with a file that has no name any more
            print(f"trainer: scoring with weights {self.checksum}", flush=True)

    def steps(self) -> list[Step]:
        """The chosen steps that are not scored yet."""
        found = None
        if self.role.rank == 0:
            done = {line["step"] for line in read_metrics(self.folder.metrics)}
            found = [(step, read_manifest(recording(self.config).batch(step)).kind) for step in chosen_steps(self.config) if step not in done]
        return [Step(number, kind, 0, False, False, False) for number, kind in self.ranks.broadcast_json(found)]

    def compare(self, manifest: Manifest) -> None:
        """Other weights are what this is for."""

    def manifest(self, folder: Path) -> Manifest:
        """Divided anew where it was recorded for another number of ranks."""
        manifest = read_manifest(folder)
        same = all(len(ranks) == self.ranks.world_size for ranks in manifest.assignment)
        return manifest if same else reassigned(manifest, folder, self.config)

    def train(self, step: Step, folder: Path) -> None:
        """Score one batch."""
        began = time.perf_counter()
        manifest = self.manifest(folder)
        with self.phase("log_probs", step.number) as facts, self.profiled(step):
            batch = open_batch(manifest, folder, self.config.algorithm, self.ranks, self.trainer.experts)
            found = [self.trainer.score(batch, index) for index in range(batch.steps)]
            self.metrics = {name: combine(name, [values[name] for values in found]) for name in found[0]} | batch.metrics()
            self.trainer.close_batch(batch, self.folder.train(step.number), self.fence)
            facts["tokens"] = manifest.tokens
        self.metrics["perf/log_probs_time"] = time.perf_counter() - began

    def export(self) -> None:
        """The weights are somebody else's."""


def rescore(run: Rescore) -> None:
    """Score batch after batch."""
    try:
        for step in run.steps():
            run.train(step, run.batch(step))
            run.record(step)
    except StopRequested as stop:
        raise TryAgain("stopped on request; what is scored stays") from stop
    run.finish()
