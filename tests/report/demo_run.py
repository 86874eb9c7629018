"""Makes a run directory with the store's own writers: what a small run leaves behind, from a seed. Also a script: demo_run.py FOLDER."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from miles.config.compose import dump_config
from miles.config.schema import RunConfig
from miles.data.sample import Flag, Sample, Status
from miles.data.store.epoch import new_epoch
from miles.data.store.events import Events
from miles.data.store.files import seal_bytes
from miles.data.store.manifest import Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.metrics import Metrics, append_line
from miles.data.store.run_dir import RunDir, record_attempt
from miles.data.store.shard import write_shard
from miles.data.store.train_record import write_train_record
from miles.training.batch import Seen
from miles.training.record import OwnPart

START = 1_780_000_000.0  # unix seconds of the first step
SECONDS = 7.5  # of one step
CONFIG = {
    "name": "arithmetic-demo",
    "num_rollout": 40,
    "model": {"name": "qwen3-moe-tiny"},
    "data": {"reasoning_gym": "chain_sum", "label_key": "answer"},
    "warm_start": {"steps": 12, "batch_size": 32},
    "rollout": {"batch_size": 16, "n_samples_per_prompt": 8, "sampling": {"max_response_len": 64}},
    "eval": {"interval": 10},
    "train": {"optimizer": {"lr": 3e-4}},
}


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with only its 256 bytes and few merges: multi-byte characters are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = [("Ġ", "="), ("Ġ", "+"), ("t", "h"), ("th", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def empty_run(folder: Path, config: dict | None = None) -> RunDir:
    """A run that was configured and has not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    run = RunDir(folder)
    seal_bytes(run.run_yaml, dump_config(RunConfig.model_validate(CONFIG if config is None else config)).encode())
    return run


def begin_attempt(run: RunDir, tier: str = "exact", restart: bool = False) -> int:
    """A new attempt with the folder of its logs; restart: the launcher began it by itself."""
    epoch = new_epoch(run)
    (run.attempt(epoch) / "logs").mkdir()
    record_attempt(run, epoch, tier=tier, restart=restart)
    return epoch


def end_attempt(run: RunDir, epoch: int, code: int = 0, reason: str = "finished", **more: object) -> None:
    (run.attempt(epoch) / "exit.json").write_text(json.dumps({"code": code, "reason": reason, **more}))


def sample(rng: np.random.Generator, tokenizer: Tokenizer, draw: int, index: int, prompt: str, response: str, answer: str, reward: float) -> Sample:
    """One sample with log-probs of a model that is sure of most tokens."""
    prompt_ids = tokenizer.encode(prompt).ids
    response_ids = [*tokenizer.encode(response).ids, tokenizer.token_to_id("<|end|>")]
    ids = np.array(prompt_ids + response_ids, np.int32)
    generated = np.arange(len(ids)) >= len(prompt_ids)
    logprob = np.where(generated, -rng.exponential(0.25, len(ids)) * rng.integers(0, 2, len(ids)), np.nan).astype(np.float32)
    return Sample(
        draw=draw,
        sample=index,
        seed=draw * 100 + index,
        token_id=ids,
        prompt_length=len(prompt_ids),
        rollout_logprob=logprob,
        loss_mask=generated.astype(np.uint8),
        flags=np.where(generated, Flag.GENERATED, 0).astype(np.uint8),
        status=Status.COMPLETED if reward else Status.TRUNCATED,
        reward=reward,
        engine="http://127.0.0.1:30000",
        prompt=prompt,
        response=response,
        label=answer,
        runs=[(0, 0)],
    )


def samples(rng: np.random.Generator, tokenizer: Tokenizer, prompts: int, per_prompt: int, first_draw: int, skill: float) -> list[Sample]:
    """Sums, answered right with probability `skill`; wrong ones ramble."""
    made = []
    for draw in range(first_draw, first_draw + prompts):
        left, right = int(rng.integers(10, 99)), int(rng.integers(10, 99))
        prompt = f"What is {left} + {right}? Think step by step, then answer.\n"
        for index in range(per_prompt):
            if rng.random() < skill:
                response, reward = f"First the tens: {left // 10 * 10} + {right // 10 * 10} = {left // 10 * 10 + right // 10 * 10}.\nThen the ones: {left % 10} + {right % 10} = {left % 10 + right % 10}.\nAnswer: {left + right}", 1.0
            else:
                response, reward = f"Hmm… the <b>sum</b> of {left} & {right} is perhaps {left + right + int(rng.integers(1, 9))} ± 1 → " + "so " * int(rng.integers(3, 160)), 0.0
            made.append(sample(rng, tokenizer, draw, index, prompt, response, str(left + right), reward))
    return made


def write_batch(run: RunDir, epoch: int, step: int, kind: str, made: list[Sample], workers: int = 2) -> list[list[Sample]]:
    """Seal shards (round robin over workers) and the manifest; returns the samples of every shard in row order."""
    folder = run.batch_of(kind, step)
    folder.mkdir(parents=True, exist_ok=True)
    shards, entries = [], []
    for worker in range(workers):
        mine = sorted((one for one in made if one.draw % workers == worker), key=lambda one: (one.draw, one.sample))
        sealed = write_shard(folder / f"rollout.{worker}.h5", mine, {"worker": worker, "epoch": epoch, "step": step})
        shards.append(mine)
        entries.append(ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=len(mine), tokens=sum(len(one.token_id) for one in mine)))
    manifest = Manifest(
        run_id=run.run_id(),
        epoch=epoch,
        step=step,
        kind=kind,
        policy=Policy(weight_version=step - 1 if kind == "rollout" else step, weight_checksum="0" * 16),
        shards=entries,
        draws=sorted({one.draw for one in made}),
    )
    seal_manifest(folder, manifest)
    return shards


def write_train(run: RunDir, step: int, shards: list[list[Sample]], rng: np.random.Generator, noise: float) -> list[np.ndarray]:
    """Train records of two nodes, with log-probs that differ by `noise` (0: the same bits); returns all differences, float64."""
    differences = []
    for rank, mine in enumerate(shards):
        lengths = np.array([len(one.token_id) for one in mine])
        rollout = np.concatenate([one.rollout_logprob for one in mine])
        train = rollout if noise == 0 else (rollout + rng.normal(0, 1, len(rollout)) * noise * 10.0 ** rng.uniform(-4, 1, len(rollout))).astype(np.float32)
        differences.append(train.astype(np.float64) - rollout.astype(np.float64))
        count = len(rollout)
        zeros = np.zeros(count, np.float32)
        values = {"train_logprob": train, "entropy": zeros, "advantage": zeros, "used": np.isfinite(rollout).astype(np.uint8)}
        part = OwnPart(rank, [Seen(np.full(len(mine), rank), np.arange(len(mine)), lengths, values)])
        run.train(step).mkdir(parents=True, exist_ok=True)
        write_train_record(run.train(step) / f"{rank}.h5", [part])
    return differences


def record_step(run: RunDir, epoch: int, step: int, kind: str, at: float, **metrics: float) -> None:
    Metrics(run.metrics).append({"step": step, "kind": kind, "time": at, **metrics})


def record_phases(run: RunDir, epoch: int, step: int, start: float, phases: dict[str, float]) -> None:
    """Phases one after another, in the trainer's event file."""
    path = Events(run, "trainer", 0, epoch).path
    for phase, seconds in phases.items():
        append_line(path, {"phase": phase, "step": step, "start": start, "end": start + seconds})
        start += seconds


def demo_run(folder: Path, *, rollouts: int = 40, noise: float = 0.0, finished: bool = True, seed: int = 7, batches: bool = True, restarts: int = 1) -> RunDir:
    """A whole run: warm start, rollouts, evaluations, batches with transcripts; interrupted `restarts` times.

    noise scales train − rollout log-probs (0: equal bits everywhere). finished=False leaves the last attempt going on, with torn last lines.
    """
    rng = np.random.default_rng(seed)
    run = empty_run(folder, {**CONFIG, "num_rollout": 40 if rollouts < 40 else rollouts})
    epoch = begin_attempt(run)
    for _ in range(restarts):
        end_attempt(run, epoch, 75, "worker 0 was killed by SIGKILL")
        epoch = begin_attempt(run, restart=True)
    tokenizer = byte_tokenizer()
    run.hf.mkdir()
    tokenizer.save(str(run.hf / "tokenizer.json"))
    warm = CONFIG["warm_start"]["steps"]
    at = START
    for step in range(1, warm + 1):
        at += 2.2
        record_phases(run, epoch, step, at - 2.2, {"wait": 0.1, "train": 1.9, "save": 0.2})
        record_step(run, epoch, step, "sft", at, **{"train/loss": 3.2 * math.exp(-step / 4) + 0.4, "train/grad_norm": 2.5 * math.exp(-step / 8) + rng.uniform(0, 0.3)})
    kept = {warm + 1, warm + rollouts} if batches else set()
    for index in range(rollouts):
        step = warm + 1 + index
        skill = 0.22 + 0.72 / (1 + math.exp(-(index - rollouts / 2.6) / (rollouts / 9)))
        if index % max(rollouts // 8, 1) == 0 or index == rollouts - 1:
            evaluate(run, epoch, step if index else step - 1, at, skill, rng, tokenizer, batches and index in (0, rollouts - 1))
        at += SECONDS
        phases = {"wait": 4.2 + rng.uniform(0, 0.8), "train": 2.1 + rng.uniform(0, 0.3), "sync": 0.25}
        record_phases(run, epoch, step, at - SECONDS, {**phases, **({"eval": 2.0} if index % 10 == 9 else {})})
        worst, mean = 0.0, 0.0
        if step in kept:
            shards = write_batch(run, epoch, step, "rollout", samples(rng, tokenizer, 4, 8, 1000 + 4 * index, skill))
            all_differences = np.concatenate(write_train(run, step, shards, rng, noise))
            known = np.abs(all_differences[np.isfinite(all_differences)])
            worst, mean = float(known.max()), float(known.mean())
        elif noise:
            worst, mean = noise * 10 ** rng.uniform(0.5, 1.2), noise * 10 ** rng.uniform(-1.3, -0.8)
            if index % 9 == 4:
                worst = mean = 0.0
        long = 60 - 25 * skill + rng.uniform(-3, 3)
        record_step(
            run,
            epoch,
            step,
            "rollout",
            at,
            **{
                "rollout/raw_reward": min(max(skill + rng.normal(0, 0.03), 0), 1),
                "rollout/response_len/mean": long,
                "rollout/response_len/min": long * 0.4,
                "rollout/response_len/max": min(long * 1.9, 64 * 1.6),
                "rollout/truncated_ratio": 0.3 * (1 - skill),
                "train/loss": rng.normal(0, 0.01),
                "train/grad_norm": 0.9 - 0.4 * skill + rng.uniform(0, 0.25),
                "train/entropy_loss": 1.1 - 0.7 * skill + rng.normal(0, 0.02),
                "train/train_rollout_logprob_abs_diff": mean,
                "train/train_rollout_logprob_max_abs_diff": worst,
                "train/mismatch_not_finite": 0,
                "rollout/tokens": 128 * long,
            },
        )
    checkpoint = run.checkpoint(warm + rollouts)
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}")
    if finished:
        end_attempt(run, epoch)
    else:
        with run.metrics.open("a") as file:
            file.write('{"step": 99, "kind": "roll')
        with Events(run, "trainer", 0, epoch).path.open("a") as file:
            file.write('{"phase": "tra')
    return run


def evaluate(run: RunDir, epoch: int, step: int, at: float, skill: float, rng: np.random.Generator, tokenizer: Tokenizer, write: bool) -> None:
    """An evaluation's metrics line (the interval from statistics tables' normal quantile), and its samples."""
    n = 200
    right = round(min(max(skill + rng.normal(0, 0.02), 0), 1) * n) / n
    half = 1.96 * math.sqrt(right * (1 - right) / n + 1e-4)
    record_step(run, epoch, step, "eval", at, **{"eval/accuracy": right, "eval/accuracy_low": max(right - half, 0), "eval/accuracy_high": min(right + half, 1), "eval/n": n})
    if write:
        write_batch(run, epoch, step, "eval", samples(rng, tokenizer, 6, 1, 500_000, skill), workers=1)


if __name__ == "__main__":
    demo_run(Path(sys.argv[1]), noise=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
