"""The quickstart's model and tokenizer, made on the spot: a Qwen3-type mixture of experts and a byte-level tokenizer.

Nothing is downloaded: the weights are random (from the run's seed) and the tokenizer's merges are learnt from questions of
the task's reasoning-gym data set. `build` is what `model.build` of the quickstart recipe names; it runs when
`model.hf_checkpoint` does not exist yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Sizes of the model. Small enough for minutes on two CPU cores; a real mixture of experts with grouped-query attention.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
# The tiny recipe's: enough to run every code path, too small to learn anything.
TINY_SHAPE: dict[str, Any] = SHAPE | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 32}

# The task, as configs/recipes/quickstart.yaml has it too (a test compares them): sums of four numbers from 0 to 10.
TASK = "basic_arithmetic"
TASK_CONFIG: dict[str, Any] = {
    "min_terms": 4,
    "max_terms": 4,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}

# Of five demonstrations of a question, so many give the exact sum; the others round it down to the ten.
EXACT, ROUNDED = 2, 3

EOS = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 384  # at most: 256 bytes, 2 special tokens, and the merges that the questions yield


def demonstrations(prompt: str, label: str, metadata: dict[str, Any]) -> list[str]:
    """Responses that the warm start learns for one question: for `warm_start.response_path`.

    They are of mixed quality on purpose: two of five are right, three round the sum down to the ten ("23" becomes "20"). A
    model that imitates them has both habits, the careless one more often, and so is mostly wrong when it decodes greedily.
    Which habit pays is left to reinforcement learning to find out.
    """
    rounded = str(int(label) // 10 * 10)
    return [label] * EXACT + [rounded] * ROUNDED


def task_questions(size: int, seed: int) -> list[str]:
    """Questions of the task, as reasoning-gym words them (not deduplicated)."""
    import reasoning_gym

    # reasoning-gym seeds question i with seed + i, so the seeds of disjoint samples lie far apart.
    dataset = reasoning_gym.create_dataset(TASK, size=size, seed=seed, **TASK_CONFIG)
    return [dataset[index]["question"] for index in range(size)]


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer (tokenizers.Tokenizer) with merges from texts.

    Any text round-trips, since all 256 bytes are tokens. Digits are always tokens of their own, so that numbers are read
    digit by digit; merges may cross spaces elsewhere, so that the fixed words of a question become one token and a prompt
    stays below ten tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(folder: Path, seed: int) -> None:
    """Make the quickstart's Hugging Face folder: config, random fp32 weights from seed, tokenizer. Same seed, same bytes.

    ValueError if the folder exists already.
    """
    _build(folder, seed, SHAPE)


def build_tiny(folder: Path, seed: int) -> None:
    """Like build, with a smaller model for tests that run the whole pipeline in seconds."""
    _build(folder, seed, TINY_SHAPE)


def _build(folder: Path, seed: int, shape: dict[str, Any]) -> None:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it, or leave out model.build to use it as it is")
    folder.mkdir(parents=True)
    # The tokenizer does not depend on the run's seed: token ids mean the same in every run of this recipe.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(task_questions(2000, seed=0)), eos_token=EOS, pad_token=PAD)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        **shape,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        norm_topk_prob=True,  # as the released Qwen3 mixtures have it
        tie_word_embeddings=False,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); at the usual 0.02 so narrow a model learns several times slower
        dtype="float32",
    )
    # A private generator state: building must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its file private
