"""A whole train step (batch opened, metrics, clipping, record written) against the bare forward, backward and optimizer step.

Same model shapes (SmolLM2-135M, random weights), same kernels, same packed batch, in turns in one process. `python -m benchmarks.train_step`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from miles.config.schema import RunConfig
from miles.data.plan_batch import assign
from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry
from miles.data.store.shard import write_shard
from miles.models.forward import PackedContext, forward
from miles.models.load import load_model
from miles.precision.logprob import token_logprob
from miles.training.distributed import start_ranks
from miles.training.fsdp import FsdpTrainer

SEQUENCES, LENGTH, PROMPT = 8, 128, 24


def make_model(folder: Path) -> Path:
    """A random model of SmolLM2-135M's shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        tie_word_embeddings=True, max_position_embeddings=2048, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def measure(repeats: int = 5, threads: int = 1) -> dict[str, float]:
    """Least seconds of a train step and of the bare step over `repeats` turns of each, and their ratio (processor time, so that neighbours don't count)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = start_ranks(0, 1, threads=threads)
        model, manifest = make_model(folder / "model"), make_batch(folder)
        trainer = FsdpTrainer(RunConfig.model_validate({"num_rollout": 100, "train": {"optimizer": {"lr": 1e-5}}}), model, ranks)
        trainer.start_phase("rollout")
        bare = load_model(model, batch_invariant=True)
        optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
        batch = trainer.open_batch(manifest, folder)
        packed = next(batch.packed(0))
        batch.close()

        def ours() -> None:
            batch = trainer.open_batch(manifest, folder)
            trainer.train_step(batch, 0)
            trainer.close_batch(batch, folder / "train")

        def reference() -> None:
            logits = forward(bare, packed.token_id, packed.position_id, PackedContext(cu_seqlens=packed.cu_seqlens), packed.row)
            (-token_logprob(logits, packed.target, 1.0)[0].mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds: dict[str, list[float]] = {"train_step": [], "bare": []}
        for turn in range(repeats + 1):
            for label, function in (("train_step", ours), ("bare", reference)):
                began = time.process_time()
                function()
                if turn:  # the first turn warms up
                    seconds[label].append(time.process_time() - began)
    least = {label: min(values) / threads for label, values in seconds.items()}
    return {**least, "ratio": least["train_step"] / least["bare"]}


if __name__ == "__main__":
    found = measure()
    print(f"train step {found['train_step']:.2f} s, bare step {found['bare']:.2f} s: {found['ratio']:.3f}x (at most 1.10x)")
