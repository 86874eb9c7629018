"""One sampled response, with everything that the store records of it (shared by worker, journal, shard and report)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Status(IntEnum):
    """Fate of a sample."""

    PENDING = 0
    COMPLETED = 1
    TRUNCATED = 2
    ABORTED = 3
    FAILED = 4


class Flag(IntEnum):
    """Bits of /tokens/flags."""

    GENERATED = 1
    FIRST_OF_TURN = 2
    TOOL_OUTPUT = 4
    DRAFT_ACCEPTED = 8
    DRAFT_RESAMPLED = 16
    PREFIX_CACHED = 32


@dataclass
class Draw:
    """One prompt handed out: never the same number twice in a run."""

    draw: int
    prompt: str | list[dict[str, Any]]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = "data"


@dataclass
class Sample:
    """A prompt and one response. Arrays run over all T tokens, prompt first.

    token_id i32 [T]; rollout_logprob f32 [T], natural log, NaN where not generated; loss_mask u8 [T]; flags u8 [T];
    runs: (start, weight_version) pairs; turns: (start, role) pairs; routes u8 or u16 [T-1, layers, top_k] or None;
    kept_mass f16 [T] or None: probability kept by top-p and top-k.
    """

    draw: int
    sample: int
    seed: int
    token_id: NDArray[np.int32]
    prompt_length: int
    rollout_logprob: NDArray[np.float32]
    loss_mask: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    status: Status = Status.PENDING
    reward: float = float("nan")
    reward_parts: dict[str, float] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    engine: str = ""
    source: str = "data"
    cached_tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    routes: NDArray[np.integer[Any]] | None = None
    kept_mass: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        length = len(self.token_id)
        assert len(self.rollout_logprob) == len(self.loss_mask) == len(self.flags) == length, "arrays of one length"
        assert 0 <= self.prompt_length <= length, "the prompt is part of the tokens"

    @property
    def response_length(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_id) - self.prompt_length
