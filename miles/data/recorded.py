"""Recorded batches of another run, to be trained on or scored again: found by step, checked, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.plan_batch import assign_by, data_parallel_size
from miles.data.store.files import Damaged, verify
from miles.data.store.manifest import NAME, Manifest, read_manifest
from miles.data.store.run_dir import RunDir, steps_in
from miles.data.store.shard import open_shard

# What decides on the bits of training, given the batches.
DECIDES = ("seed", "model", "algorithm", "train", "warm_start.optimizer", "cluster.device", "cluster.threads", "checkpoint.load", "checkpoint.ref_load", "rollout.batch_invariant")
DECIDES_NOT = ("train.update_weight_transport",)


def recording(config: RunConfig) -> RunDir:
    """The run whose batches are read."""
    named = config.debug.recorded
    assert named is not None, "a mode on recorded batches"
    return RunDir(Path(named))


def chosen_steps(config: RunConfig) -> list[int]:
    """Steps whose recorded batches are read, ascending: those of this run, or those that are to be scored (default: all there are)."""
    if config.debug.train_only:
        return list(range(1, config.last_step + 1))
    run = recording(config)
    return sorted(set(config.debug.rescore_steps)) or [step for step in steps_in(run.batches) if (run.batch(step) / NAME).exists()]


def recorded_batch(config: RunConfig, step: int) -> Manifest:
    """The manifest of one recorded batch, its shards verified. Raises UserError by name: missing, set aside, damaged, or of another shape than this run's."""
    folder = recording(config).batch(step)
    if not (folder / NAME).exists():
        aside = sorted(path.name for path in folder.parent.glob(f"{folder.name}.aside.*"))
        why = f"; one was set aside as {', '.join(aside)}, because other weights made it or it was damaged" if aside else ""
        raise UserError(f"{folder}: no recorded batch{why}; {_other_steps(config, step)}")
    try:
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            verify(folder / shard.name, shard.bytes, shard.xxh3)
    except Damaged as error:
        raise Damaged(f"{error}; restore the file, or {_other_steps(config, step)}") from None
    if config.debug.train_only:
        _fits(config, step, manifest, folder)
    return manifest


def _other_steps(config: RunConfig, step: int) -> str:
    return f"debug.stop_after={step - 1} trains on those before it" if config.debug.train_only else "choose others by debug.rescore_steps"


def _fits(config: RunConfig, step: int, manifest: Manifest, folder: Path) -> None:
    """Refuse a batch of another kind, and one that is divided otherwise, unless it may be divided anew."""
    kind = "sft" if step <= config.warm_start.steps else "rollout"
    if manifest.kind != kind:
        raise UserError(f"{folder}: is a batch of kind {manifest.kind}, and step {step} of this run is of kind {kind}; set warm_start.steps as in the recorded run")
    if config.debug.reassign:
        return
    ranks, recorded = data_parallel_size(config), len(manifest.assignment[0])
    mend = "or debug.reassign=true to divide the batches anew (other bits)"
    if ranks != recorded:
        per_node = recorded // config.train.num_nodes
        raise UserError(f"{folder}: is divided among {recorded} trainer ranks, and this run has {ranks}; set train.num_gpus_per_node={per_node}, {mend}")
    updates = config.train.num_steps_per_rollout or 1
    if kind == "rollout" and len(manifest.assignment) != updates:
        text = f"{folder}: is divided into {len(manifest.assignment)} optimizer steps, and this run takes {updates}"
        raise UserError(f"{text}; set train.num_steps_per_rollout={len(manifest.assignment)} and train.global_batch_size=null, {mend}")


def check_recording(config: RunConfig) -> None:
    """Verify every batch that will be read, and divide anew what will be. Raises UserError as recorded_batch and reassigned do, and where there is
    nothing to score."""
    steps = chosen_steps(config)
    if not steps:
        raise UserError(f"{recording(config).batches}: no recorded batch; name a run that has some")
    for step in steps:
        manifest = recorded_batch(config, step)
        if config.debug.reassign or any(len(ranks) != data_parallel_size(config) for ranks in manifest.assignment):
            reassigned(manifest, recording(config).batch(step), config)


def differences(config: RunConfig) -> list[str]:
    """Settings that decide on the bits of training and are not those of the recorded run; dotted paths."""
    ours, theirs = _decisive(config), _decisive(load_config([recording(config).run_yaml]))
    return sorted(path for path in ours | theirs if ours.get(path) != theirs.get(path))


def _decisive(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, below in value.items():
                visit(below, f"{path}.{name}" if path else name)
        elif path.startswith(DECIDES) and not path.startswith(DECIDES_NOT):
            found[path] = value

    visit(config.model_dump(), "")
    for section, optimizer in (("train.optimizer", config.train.optimizer), ("warm_start.optimizer", config.warm_start.optimizer)):
        if optimizer.lr_schedule == "constant":
            found.pop(f"{section}.lr_decay_steps")
    return found


def reassigned(manifest: Manifest, folder: Path, config: RunConfig) -> Manifest:
    """The same batch divided anew over this run's ranks. Reads the small arrays of its shards. Raises UserError where it has too few draws."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("lengths", "draws", "samples", "shards", "rows")}
    for index, entry in enumerate(manifest.shards):
        with open_shard(folder / entry.name) as shard:
            table = shard.sequences()
        count = len(table["draw"])
        for name, column in (
            ("lengths", np.diff(table["offset"].astype(np.int64))), ("draws", table["draw"]), ("samples", table["sample"]),
            ("shards", np.full(count, index)), ("rows", np.arange(count)),
        ):  # fmt: skip
            parts[name].append(column)
    steps = 1 if manifest.kind == "sft" else config.train.num_steps_per_rollout or 1
    sequences = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    try:
        return manifest.model_copy(update={"assignment": assign_by(config, steps, **sequences)})
    except ValueError as error:
        found = len(np.unique(sequences["draws"]))
        raise UserError(f"{folder}: its {found} prompt draws can't be divided over {steps} optimizer steps; lower train.num_steps_per_rollout") from error
