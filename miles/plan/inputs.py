"""Inputs and places that a run needs: named, and there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from miles.config.address import bind_host, unbindable
from miles.config.schema import RunConfig, Source
from miles.plan.abilities import Entry

SUFFIXES = (".jsonl", ".json", ".parquet")


def missing(config: RunConfig) -> Iterator[Entry]:
    """Errors: a model, prompts or a reward that is not named, or a file that is not there. Nothing is opened."""
    model, checkpoint, reinforce = config.model, config.checkpoint, config.num_rollout > 0
    fault = unbindable(bind_host(config.cluster.host)) if config.cluster.executor == "local" else None
    if fault:
        yield "error", "cluster.host", f"{config.cluster.host!r} can't be listened on here ({fault})", "give an address of this machine, or leave it out"
    if not model.hf_checkpoint and not model.build:
        yield "error", "model.hf_checkpoint", "no model is named", "give --hf-checkpoint FOLDER"
    elif model.hf_checkpoint and not model.build:
        yield from _folder("model.hf_checkpoint", model.hf_checkpoint)
    yield from _recording(config)
    if checkpoint.load:
        yield from _checkpoint(checkpoint.load)
    if checkpoint.ref_load:
        yield from _folder("checkpoint.ref_load", checkpoint.ref_load)
    for where, path in [
        ("model.build", model.build),
        ("warm_start.response_path", config.warm_start.response_path),
        ("rollout.generate_path", config.rollout.generate_path),
        ("rollout.filter_path", config.rollout.filter_path),
        ("rollout.reward.path", config.rollout.reward.path),
        ("eval.reward.path", own_eval_reward(config)),
    ]:
        if path and not re.fullmatch(r"\w+(\.\w+)*[.:]\w+", path):
            yield "error", where, f"{path!r} is not an import path", "write package.module.function"
    if config.debug.recorded:
        return
    if reinforce:
        yield from _source("data", config.data, "num_rollout", config.num_rollout)
        reward = config.rollout.reward
        if not (reward.type or reward.path):
            yield "error", "rollout.reward.type", "no reward is named", "give --rm-type math, or rollout.reward.path"
        if reward.type == "reasoning_gym" and not config.data.reasoning_gym:
            yield "error", "rollout.reward.type", "reasoning_gym scores prompts of data.reasoning_gym only", "take another reward, or set data.reasoning_gym"
        if (reward.type or "").removeprefix("boxed_") in ("exact_match", "math") and config.data.prompt_data and not config.data.label_key:
            yield "error", "data.label_key", f"reward {reward.type} compares with an answer", "give --label-key KEY"
    if config.warm_start.steps:
        yield from _source("warm_start", config.warm_start, "warm_start.steps", config.warm_start.steps)
        if not (config.warm_start.label_key or config.warm_start.response_path or config.warm_start.reasoning_gym):
            yield "error", "warm_start.label_key", "no key of the responses to learn", "set warm_start.label_key, or warm_start.response_path"
    if config.eval.interval:
        yield from _source("eval", config.eval, "eval.interval", config.eval.interval)
    if not reinforce and not config.warm_start.steps:
        yield "warning", "num_rollout", "nothing to do: num_rollout and warm_start.steps are both 0", "raise one of them"


def own_eval_reward(config: RunConfig) -> str | None:
    """The path of evaluation's reward where it is not the rollout's."""
    reward = config.eval.reward if config.eval.interval else None
    return None if reward is None or reward == config.rollout.reward else reward.path


def _source(name: str, source: Source, why: str, value: int) -> Iterator[Entry]:
    if not (source.prompt_data or source.reasoning_gym):
        mend = "give --prompt-data FILE" if name == "data" else f"set {name}.prompt_data"
        yield "error", f"{name}.prompt_data", f"no prompts are named ({why} is {value})", f"{mend}, or {name}.reasoning_gym"
    if source.prompt_data:
        path = Path(re.sub(r"@\[[^\]]*\]$", "", source.prompt_data))
        if not path.is_file():
            yield "error", f"{name}.prompt_data", f"{path}: no such file", _mend(path, "check the path")
        elif path.suffix not in SUFFIXES:
            yield "error", f"{name}.prompt_data", f"{path}: unknown kind of file", f"prompts come from {', '.join(SUFFIXES)}"


def _folder(where: str, text: str) -> Iterator[Entry]:
    path = Path(text)
    if not path.is_dir():
        yield "error", where, f"{path}: no such folder", _mend(path, "give a Hugging Face folder on this machine")
    elif not (path / "config.json").is_file():
        yield "error", where, f"{path}: has no config.json", "give a Hugging Face folder"


def _recording(config: RunConfig) -> Iterator[Entry]:
    for name in ("train_only", "rescore"):
        text = getattr(config.debug, name)
        path = Path(text or "")
        if text and not path.is_dir():
            yield "error", f"debug.{name}", f"{path}: no such run directory", _mend(path, "name one whose batches are recorded")
        elif text and not ((path / "run.yaml").is_file() and (path / "batches").is_dir()):
            yield "error", f"debug.{name}", f"{path}: not a run with recorded batches (run.yaml and batches/)", "name a run directory"


def _checkpoint(text: str) -> Iterator[Entry]:
    path = Path(text)
    if not path.is_dir():
        yield "error", "checkpoint.load", f"{path}: no such folder", _mend(path, "name a checkpoint, such as runs/first/checkpoints/step_000010")
    elif not (path / "COMPLETE").is_file():
        inside = sorted(path.glob("**/step_*/COMPLETE"))
        mend = f"name {inside[-1].parent}" if inside else "name a checkpoint, such as runs/first/checkpoints/step_000010"
        yield "error", "checkpoint.load", f"{path}: no finished checkpoint (it has no COMPLETE)", mend


def _mend(path: Path, otherwise: str) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1, 0.6)
    return f"did you mean {path.parent / near[0]}?" if near else otherwise
