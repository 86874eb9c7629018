"""A whole train step (batch opened, metrics, clipping, record written) against the bare forward, backward and optimizer step.

Same model shapes (SmolLM2-135M, random weights), same kernels, same packed batch, in turns in one process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import Row, show
from benchmarks.workload import build_smollm2
from miles.config.schema import RunConfig
from miles.data.plan_batch import assign
from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry
from miles.data.store.shard import write_shard
from miles.models.forward import PackedContext, forward
from miles.models.load import load_model
from miles.precision.logprob import token_logprob
from miles.training.distributed import Ranks, start_ranks
from miles.training.fsdp import FsdpTrainer

SEQUENCES, LENGTH, PROMPT = 8, 128, 24


def make_batch(folder: Path) -> Manifest:
    """One packed micro-batch of SEQUENCES x LENGTH tokens."""
    random = np.random.default_rng(0)
    generated = np.arange(LENGTH) >= PROMPT
    samples = [
        Sample(
            draw=index // 4, sample=index % 4, seed=0, token_id=random.integers(2, 49000, LENGTH).astype(np.int32), prompt_length=PROMPT,
            rollout_logprob=np.where(generated, -10.8, np.nan).astype(np.float32), loss_mask=generated.astype(np.uint8),
            flags=(generated * int(Flag.GENERATED)).astype(np.uint8), status=Status.COMPLETED, reward=float(index % 2),
        )
        for index in range(SEQUENCES)
    ]  # fmt: skip
    sealed = write_shard(folder / "rollout.0.h5", samples)
    rows = np.arange(SEQUENCES)
    assignment = assign([LENGTH] * SEQUENCES, rows // 4, rows % 4, [0] * SEQUENCES, rows, dp_size=1, max_tokens=SEQUENCES * LENGTH)
    entry = ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=SEQUENCES, tokens=SEQUENCES * LENGTH)
    return Manifest(
        run_id="bench", epoch=1, step=1, kind="rollout", policy=Policy(weight_version=0, weight_checksum=""), shards=[entry],
        sampling={"temperature": 1.0}, assignment=assignment,
    )  # fmt: skip


def measure(say: Callable[[str], None], repeats: int = 3, threads: int = 1, build: Callable[[Path], Path] = build_smollm2) -> list[Row]:
    """The train step against the bare one, and batch-invariant against plain, each the least of `repeats` turns.

    Processor time of one thread, so that neighbours on the machine don't count; files are written, but waits for the disk are not seen.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = start_ranks(0, 1, threads=threads)
        model, manifest = build(folder / "model"), make_batch(folder)
        trainers = {invariant: _trainer(model, ranks, invariant) for invariant in (True, False)}
        bare = load_model(model, batch_invariant=True)
        optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
        batch = trainers[True].open_batch(manifest, folder)
        packed = next(batch.packed(0))
        batch.close()

        def ours(trainer: FsdpTrainer) -> None:
            batch = trainer.open_batch(manifest, folder)
            trainer.train_step(batch, 0)
            trainer.close_batch(batch, folder / "train")

        def reference() -> None:
            logits = forward(bare, packed.token_id, packed.position_id, PackedContext(cu_seqlens=packed.cu_seqlens), packed.row)
            (-token_logprob(logits, packed.target, 1.0)[0].mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        sides = {"train step": lambda: ours(trainers[True]), "bare": reference, "plain": lambda: ours(trainers[False])}
        seconds: dict[str, list[float]] = {label: [] for label in sides}
        for turn in range(repeats + 1):
            for label, function in sides.items():
                say(f"train step: {f'turn {turn} of {repeats}' if turn else 'warm-up'}, {label}")
                began = time.process_time()
                function()
                if turn:
                    seconds[label].append(time.process_time() - began)
    least = {label: min(values) / threads for label, values in seconds.items()}
    step, tokens = least["train step"], SEQUENCES * LENGTH
    return [
        Row(
            "SmolLM2-135M: train step / bare forward, backward, optimizer", step / least["bare"], 1.10, at_least=False,
            note=f"{step:.2f} s and {least['bare']:.2f} s for {tokens} tokens, same kernels", found={"seconds": seconds},
        ),
        Row("SmolLM2-135M: train step, batch-invariant / plain", step / least["plain"], note=f"{step:.2f} s and {least['plain']:.2f} s", found={"seconds": seconds}),
    ]  # fmt: skip


def _trainer(model: Path, ranks: Ranks, invariant: bool) -> FsdpTrainer:
    options = {"num_rollout": 100, "train": {"optimizer": {"lr": 1e-5}}, "rollout": {"batch_invariant": invariant}}
    trainer = FsdpTrainer(RunConfig.model_validate(options), model, ranks)
    trainer.start_phase("rollout")
    return trainer


if __name__ == "__main__":
    show(measure(print))
