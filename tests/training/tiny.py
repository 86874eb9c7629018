"""Tiny real models, batches and trainers for the tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from miles.config.schema import RunConfig
from miles.data.plan_batch import assign
from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry
from miles.data.store.shard import write_routes, write_shard

VOCABULARY = 97


def make_model(folder: Path, kind: str = "qwen3_moe", seed: int = 0, tied: bool = False) -> Path:
    """A random model of a family, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2, dtype="float32", eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**common, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
        )
    model.save_pretrained(folder)
    return folder


def make_samples(seed: int, draws: int = 6, siblings: int = 4, *, first_draw: int = 0, odd: bool = True) -> list[Sample]:
    """Ragged random samples; with `odd`, one without a response, one of one response token, and one wholly masked."""
    random = np.random.default_rng(seed)
    samples = []
    for draw in range(draws):
        prompt = random.integers(2, VOCABULARY, size=random.integers(1, 8))
        for index in range(siblings):
            response = random.integers(2, VOCABULARY, size=int(random.integers(2, 20)))
            if odd and draw == 1 and index < 2:
                response = response[:index]
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            length, start = len(tokens), len(prompt)
            generated = np.arange(length) >= start
            mask = generated.copy()
            if odd and draw == 2 and index == 0:
                mask[:] = False
            elif odd and draw == 2 and index == 1:
                mask[start + 1 :: 3] = False
            logprob = np.where(generated, -random.exponential(2.0, size=length), np.nan).astype(np.float32)
            samples.append(
                Sample(
                    draw=first_draw + draw, sample=index, seed=int(random.integers(1 << 40)), token_id=tokens, prompt_length=start,
                    rollout_logprob=logprob, loss_mask=mask.astype(np.uint8), flags=(generated * int(Flag.GENERATED)).astype(np.uint8),
                    status=Status.COMPLETED, reward=float(random.integers(0, 3)),
                )
            )  # fmt: skip
    return samples


def add_routes(samples: list[Sample], seed: int) -> list[Sample]:
    """The samples with random routes of make_model's mixture of experts."""
    random = np.random.default_rng(seed)
    for sample in samples:
        sample.routes = random.random((max(len(sample.token_id) - 1, 0), 2, 4)).argsort(-1)[..., :2].astype(np.uint8)
    return samples


def make_batch(
    folder: Path, samples: list[Sample], *, world: int = 1, steps: int = 1, max_tokens: int = 64, shards: int = 2, kind: str = "rollout",
    step: int = 1, temperature: float = 1.0,
) -> Manifest:  # fmt: skip
    """Shards, routes of samples that have any, and the manifest of a batch, as the service would seal them (the manifest is returned, not written)."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, where, routes = [], [], []
    for index in range(shards):
        part = sorted(samples[index::shards], key=lambda sample: (sample.draw, sample.sample))
        name = f"rollout.w{index}.h5"
        sealed = write_shard(folder / name, part)
        entries.append(ShardEntry(name=name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=len(part), tokens=sum(len(s.token_id) for s in part)))
        if (beside := write_routes(folder / f"routes.w{index}.h5", part)) is not None:
            routes.append(ShardEntry(name=beside.name, bytes=beside.bytes, xxh3=beside.xxh3, sequences=len(part), tokens=entries[-1].tokens))
        where += [(len(s.token_id), s.draw, s.sample, index, row) for row, s in enumerate(part)]
    columns = [np.array(column) for column in zip(*where, strict=True)]
    return Manifest(
        run_id="test", epoch=1, step=step, kind=kind, policy=Policy(weight_version=0, weight_checksum=""), shards=entries, routes=routes,
        sampling={"temperature": temperature}, assignment=assign(*columns, dp_size=world, steps=steps, max_tokens=max_tokens),
    )  # fmt: skip


def make_config(**sections: dict) -> RunConfig:
    """A configuration with these sections over small defaults."""
    base = {
        "num_rollout": 8,
        "train": {"optimizer": {"lr": 1e-2, "lr_warmup_steps": 1, "lr_schedule": "cosine", "weight_decay": 0.1}},
        "warm_start": {"steps": 8, "optimizer": {"lr": 1e-2}},
    }
    return RunConfig.model_validate(base | sections)
