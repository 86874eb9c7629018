"""What an engine and a trainer do with a token, with every fault that can be planted; the defaults are a run without any."""

from __future__ import annotations

from dataclasses import dataclass, field

from planted.arithmetic import FP32
from planted.sampling import Sampler


@dataclass(frozen=True)
class Stale:
    """Copies (engines or trainer ranks) whose weights are not what they are said to be, in steps [first, last].

    behind: versions behind, fractions allowed; damage: a tensor's name and the size of its error relative to the tensor.
    """

    copies: tuple[int, ...]
    first: int
    last: int
    behind: float = 0.0
    damage: tuple[str, float] | None = None

    def holds(self, copy: int, step: int) -> bool:
        """Whether this copy is one of them in this step."""
        return copy in self.copies and self.first <= step <= self.last


@dataclass
class Pipeline:
    """Shares and rates are probabilities; bits are mantissa bits."""

    sampler: Sampler = field(default_factory=Sampler)
    activation_bits: int | None = None  # of the engine; None: engine and trainer compute the same bits
    engines: list[Stale] = field(default_factory=list)
    ranks: list[Stale] = field(default_factory=list)
    lag_size: float | None = None  # optimizer steps that a recorded lag of one is worth; None: no sequence lags
    rerouted: float = 0.0  # share of tokens that the trainer routes otherwise than the engine
    reroute_at_random: bool = True  # to any experts; else the engine's third choice takes the place of its second
    shifted: float = 0.0  # share of sequences whose log-probs the trainer puts one token too early
    retokenised: float = 0.0  # rate of pairs of tokens that the trainer reads as other tokens of the same text
    other_prompt: float = 0.0  # share of sequences whose prompt has one token more at the trainer
    train_logit_bits: int = FP32
