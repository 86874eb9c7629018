"""What both sides generate, and the models they generate with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

THREADS = 2
# How long a thread that waits for others burns its core. The default, some milliseconds, makes anything with two threads tens of times slower
# on a machine that others use too; so both sides get the setting that the roles of a run have (miles/run/component.py).
SPINS = "1000"
REQUESTS, SHORTEST, LONGEST = 64, 8, 256
CALL = 8  # prompts of one /generate call: a worker sends the samples of a group together


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length (so that generate pads nothing) and the tokens wanted for each, in the order of arrival."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Useful tokens: those that were asked for."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))


def make_workload(vocabulary: int, prompt: int, requests: int = REQUESTS, longest: int = LONGEST) -> Workload:
    """`requests` random prompts of `prompt` tokens, response lengths spread evenly over SHORTEST to `longest` in a shuffled order."""
    random = np.random.default_rng(0)
    lengths = np.linspace(SHORTEST, longest, requests).round().astype(int)
    random.shuffle(lengths)
    return Workload(random.integers(2, vocabulary, (requests, prompt)).tolist(), lengths.tolist())


def build_smollm2(folder: Path) -> Path:
    """A random model of SmolLM2-135M's shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build_quickstart(folder: Path) -> Path:
    """The quickstart recipe's model, untrained."""
    from miles.recipes.quickstart import build

    build(folder, seed=0)
    return folder
