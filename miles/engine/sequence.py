"""A request in the engine, and the batch of one model step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.engine.protocol import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """A request and what became of it so far. `row` -1 is not running.

    `prompt_logprob` f32 [prompt - 1 - logprob_start_len] grows chunk by chunk; `routes` [prompt + output - 1, layers, top_k].
    """

    request: Request
    done: Callable[[Sequence], None]
    seed: int
    max_new_tokens: int
    row: int = -1
    output: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    prompt_logprob: list[NDArray[np.float32]] = field(default_factory=list)
    target: NDArray[np.int32] | None = None  # what must be in the cache before the next token can be drawn
    cached_tokens: int = 0
    admitted: bool = False
    retractions: int = 0
    finish: dict[str, Any] | None = None
    routes: NDArray[Any] | None = None
    weight_version: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def prompt(self) -> NDArray[np.int32]:
        """i32 [L]."""
        return self.request.input_ids

    @property
    def scored(self) -> int:
        """Prompt tokens from logprob_start_len on whose successor has its log-prob, as the position where to go on."""
        return self.request.logprob_start_len + sum(map(len, self.prompt_logprob))

    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output, i32."""
        return np.concatenate((self.prompt, np.array(self.output, dtype=np.int32))) if self.output else self.prompt


@dataclass(slots=True)
class Scores:
    """Prompt log-probs wanted of a step: rows `first`.. of the packed input, and the tokens they should predict (i64)."""

    sequence: Sequence
    first: int
    target: NDArray[np.int64]


@dataclass(slots=True)
class Batch:
    """One model step: S sequences, T tokens packed one after another, M of the sequences draw a token.

    copies: (from row, to row, tokens), to be done in this order before the step; row i64 [S] of the cache; token_id, position i64 [T];
    cu_seqlens i32 [S+1] over the packed tokens; kv_length i64 [S] tokens in each row once the step is done;
    last i64 [M] packed tokens to draw from; temperature, top_p f32 [M]; top_k i64 [M]; seed u64 [M];
    place i64 [M] position of the last context token, which decides the noise together with the seed.
    """

    copies: list[tuple[int, int, int]]
    row: NDArray[np.int64]
    token_id: NDArray[np.int64]
    position: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    kv_length: NDArray[np.int64]
    last: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    place: NDArray[np.int64]
    scores: list[Scores]
    drawing: list[Sequence]
