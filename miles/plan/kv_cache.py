"""The key-value cache of an engine: bytes of a token, tokens that are wanted, and what a fraction of the memory leaves for it."""

from __future__ import annotations

from miles.config.schema import RunConfig, Shape


def token_bytes(shape: Shape, width: int, ranks: int) -> int:
    """Bytes of one token on one of `ranks` tensor-parallel ranks, width bytes a number.

    Grouped attention keeps a key and a value of every key-value head; a rank has its share of the heads, at least one. Latent
    attention keeps one compressed vector and the rotary key, whole on every rank.
    """
    if shape.kv_lora:
        return shape.layers * (shape.kv_lora + shape.qk_rope) * width
    heads = shape.kv_heads or shape.heads
    return shape.layers * 2 * max(1, heads // ranks) * (shape.head_dim or shape.hidden // shape.heads) * width


def token_words(shape: Shape, width: int, ranks: int) -> str:
    """The same product in words."""
    if shape.kv_lora:
        return f"{shape.layers} layers × ({shape.kv_lora} + {shape.qk_rope}) × {width} bytes (latent, whole on each rank)"
    heads = shape.kv_heads or shape.heads
    return f"{shape.layers} layers × 2 × {max(1, heads // ranks)} heads × {shape.head_dim or shape.hidden // shape.heads} × {width} bytes"


def longest(config: RunConfig) -> tuple[int, bool]:
    """(longest sequence that sampling allows [tokens], whether prompts are bounded and so counted in)."""
    samplings = [config.rollout.sampling] if config.num_rollout else []
    if config.eval.interval:
        samplings.append(config.eval.sampling)
    whole = [sampling.max_context_len or sampling.max_response_len for sampling in samplings]
    return max(whole, default=0), all(sampling.max_context_len for sampling in samplings)


def wanted_tokens(config: RunConfig) -> tuple[int, str]:
    """(tokens of a full house: every running request at its longest, the product in words)."""
    length, bounded = longest(config)
    requests = config.rollout.max_running_requests
    return requests * length, f"{requests} requests × {length} tokens" + ("" if bounded else " and their prompts")
