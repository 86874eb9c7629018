"""Model steps of the engine: tensors in and out of the one forward pass that the trainer uses too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from miles.engine.options import EngineOptions
from miles.engine.sequence import Batch
from miles.models.context import CachedContext
from miles.models.decode import DecodeProgram
from miles.models.forward import forward
from miles.models.load import load_model
from miles.precision.attention import KVCache
from miles.precision.logprob import sample, token_logprob
from miles.precision.threads import set_threads


class Runner:
    """The model, its key-value cache, and the experts that each cached token went through.

    `routes` [rows, context, layers, top_k] u8 or u16 (None for a model without experts) lies beside the cache, so that a prompt
    that is copied from another row has its experts too.
    """

    def __init__(self, options: EngineOptions):
        set_threads(options.threads)
        self.device = torch.device(options.device)
        self.model = load_model(options.folder, self.device, getattr(torch, options.dtype), options.batch_invariant)
        config: Any = self.model.config
        self.model_type: str = config.model_type
        self.architectures = list(config.architectures or [type(self.model).__name__])
        self.vocab_size: int = config.vocab_size
        self.eos_token_ids = _eos(config, self.model.generation_config)
        longest: int = config.max_position_embeddings
        fair = max(1, options.kv_cache_tokens // options.max_running_requests)
        given = options.context_length
        if given is not None and not 2 <= given <= min(longest, options.kv_cache_tokens):
            raise ValueError(
                f"context_length is {given}; the model allows {longest} tokens and kv_cache_tokens is {options.kv_cache_tokens}: choose 2 to the lesser"
            )
        self.context_length = max(2, min(longest, fair)) if given is None else given
        self.rows = max(1, min(options.max_running_requests, options.kv_cache_tokens // self.context_length))
        self._layers: int = config.num_hidden_layers
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._top_k = int(getattr(config, "num_experts_per_tok", 0) or 0)
        self._experts = int(getattr(config, "num_experts", 0) or 0)
        self._dtype = getattr(torch, options.dtype)
        self.routed_experts = self._experts > 0
        self.routes: NDArray[Any] | None = None
        self.cache: KVCache | None = None
        self._decode: DecodeProgram | None = None
        self.make_cache()

    def make_cache(self) -> None:
        """Allocates the cache."""
        self.cache = KVCache(self._layers, self.rows, self.context_length, self._kv_heads, self._head_dim, self.device, self._dtype)
        self._decode = DecodeProgram(self.model, self.cache, self.rows) if DecodeProgram.serves(self.model, self.cache) else None
        if self.routed_experts:
            kind = np.uint8 if self._experts <= 256 else np.uint16
            self.routes = np.zeros((self.rows, self.context_length, self._layers, self._top_k), dtype=kind)

    def release_cache(self) -> None:
        """Frees the cache."""
        self.cache = self.routes = self._decode = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def step(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.float32], list[NDArray[np.float32]]]:
        """Runs a batch. Returns tokens i64 [M], their log-probs f32 [M], and prompt log-probs f32 [n] for each of batch.scores."""
        cache = self.cache
        assert cache is not None, "requests are refused while the cache is released"
        for source, target, count in batch.copies:
            cache.copy_prefix(source, target, count)
            if self.routes is not None:
                self.routes[target, :count] = self.routes[source, :count]
        count = len(batch.token_id)
        if self._decode is not None and count == len(batch.row) == len(batch.last) <= self._decode.rows and not batch.scores:
            logits, chosen = self._decode.run(batch.token_id, batch.position, batch.row)
            if chosen is not None and self.routes is not None:
                self.routes[batch.row, batch.position] = chosen.numpy().transpose(1, 0, 2)
            return *_draw(logits, batch), []
        routes = torch.zeros((count, self._layers, self._top_k), dtype=torch.int32) if self.routed_experts else None
        queries = np.diff(batch.cu_seqlens)
        context = CachedContext(
            routes=routes, cache=cache, cu_q=torch.from_numpy(batch.cu_seqlens), slot=torch.from_numpy(batch.row),
            start=torch.from_numpy(batch.kv_length - queries),
        )  # fmt: skip
        token_id, position = (torch.from_numpy(array).to(self.device) for array in (batch.token_id, batch.position))
        rows = np.concatenate((batch.last, *(np.arange(item.first, item.first + len(item.target)) for item in batch.scores)))
        if not len(rows):
            rows = np.zeros(1, dtype=np.int64)  # a chunk that draws nothing: its logits go unread
        logits = forward(self.model, token_id, position, context, torch.from_numpy(rows).to(self.device))
        if routes is not None and self.routes is not None:
            self.routes[np.repeat(batch.row, queries), batch.position] = routes.numpy()
        drawn = len(batch.last)
        scores, at = [], drawn
        for item in batch.scores:
            part = logits[at : at + len(item.target)]
            at += len(item.target)
            scores.append(token_logprob(part, torch.from_numpy(item.target).to(self.device), 1.0)[0].cpu().numpy())
        if not drawn:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), scores
        return *_draw(logits[:drawn], batch), scores


def _draw(logits: torch.Tensor, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens i64 [M] and their log-probs f32 [M] from logits [M, V]."""
    token, logprob = sample(
        logits, torch.from_numpy(batch.temperature), torch.from_numpy(batch.top_k), torch.from_numpy(batch.top_p),
        torch.from_numpy(batch.seed.view(np.int64)), torch.from_numpy(batch.place + 1),
    )  # fmt: skip
    return token.cpu().numpy(), logprob.cpu().numpy()


def _eos(config: Any, generation: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of the model and of its generation settings."""
    found: list[int] = []
    for source in (config, generation):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))
