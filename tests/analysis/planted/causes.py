"""The causes that can be planted: what each is in the world, how it changes the pipeline, and magnitudes from strong to nil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from planted.arithmetic import bits_of
from planted.model import LAYERS
from planted.pipeline import Pipeline, Stale
from planted.scene import ENGINES, RANKS, RANKS_A_NODE

Plant = Callable[[Pipeline, float, int, np.random.Generator], None]  # pipeline, magnitude, steps of the run, choices


@dataclass(frozen=True)
class Cause:
    """`family`: the answer that an analysis should give. `unit`: what the magnitude is. Magnitudes fall to 0, where nothing is wrong."""

    family: str
    meaning: str
    unit: str
    magnitudes: tuple[float, ...]
    plant: Plant


def _clean(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    assert magnitude == 0, "a clean run has no magnitude; its noise is an argument of plant()"


def _harmless_filter(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, top_p=1 - magnitude, renormalised=False)


def _noise(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.activation_bits = bits_of(magnitude) if magnitude else None


def _retokenised(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.retokenised = magnitude


def _other_prompt(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.other_prompt = magnitude


def _shifted(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.shifted = magnitude


def _temperature(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, temperature=1 + magnitude)


def _top_p(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, top_p=1 - magnitude)


def _top_k(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, top_k=round(1 / magnitude) if magnitude else 0)


def _bf16(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, logit_bits=bits_of(magnitude))


def _bf16_logprob(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.sampler = replace(pipeline.sampler, logprob_bits=bits_of(magnitude))


def _bf16_trainer(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.train_logit_bits = bits_of(magnitude)


def _since(steps: int, rng: np.random.Generator) -> tuple[int, int]:
    """First and last step of a fault: some steps before it are right, where there are any."""
    first = int(rng.integers(1, max(steps - 1, 2))) if steps > 1 else 0
    return first, int(rng.integers(first, steps)) if rng.random() < 0.5 else steps - 1


def _tensor(rng: np.random.Generator) -> str:
    return f"{rng.integers(LAYERS)}.{rng.choice(['qkv', 'out', 'up', 'down'])}"


def _engine(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.engines.append(Stale((int(rng.integers(ENGINES)),), *_since(steps, rng), behind=magnitude))


def _engine_tensor(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.engines.append(Stale((int(rng.integers(ENGINES)),), *_since(steps, rng), damage=(_tensor(rng), magnitude)))


def _rank(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.ranks.append(Stale((int(rng.integers(RANKS)),), *_since(steps, rng), damage=(_tensor(rng), magnitude)))


def _node(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    node = int(rng.integers(RANKS // RANKS_A_NODE))
    ranks = tuple(range(node * RANKS_A_NODE, (node + 1) * RANKS_A_NODE))
    pipeline.ranks.append(Stale(ranks, *_since(steps, rng), damage=(_tensor(rng), magnitude)))


def _lag(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.lag_size = magnitude


def _routing(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.rerouted = magnitude


def _routing_next(pipeline: Pipeline, magnitude: float, steps: int, rng: np.random.Generator) -> None:
    pipeline.rerouted, pipeline.reroute_at_random = magnitude, False


SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.0)
ROUTED = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0)
TENSOR = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0)
ROUNDOFF = (2.0**-7, 2.0**-8, 2.0**-9, 2.0**-11, 2.0**-13, 0.0)
COPIES = "root-mean-square error of one tensor over that tensor's own"

CAUSES: dict[str, Cause] = {
    "clean": Cause("noise", "nothing is wrong; only the noise of arithmetic is there (noise=0: equal bits)", "none", (0.0,), _clean),
    "clean_top_p": Cause(
        "noise", "tokens are sampled within top-p, but reported with log-probs before it, as the format wants", "1 − top_p", (0.5, 0.2, 0.1, 0.05, 0.0), _harmless_filter,
    ),
    "noise": Cause("noise", "the engine rounds activations to fewer bits than the trainer (fp32)", "unit roundoff of activations (bf16: 2⁻⁸)", (2.0**-6, 2.0**-7, 2.0**-8, 2.0**-11, 2.0**-16, 2.0**-24, 0.0), _noise),
    "retokenised": Cause(
        "token ids differ", "the trainer tokenized the text again: other ids, often another length, zipped to the engine's log-probs", "rate of pairs of tokens that are written otherwise",
        (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0), _retokenised,
    ),
    "other_prompt": Cause("token ids differ", "the trainer's prompt begins with another token (template, BOS); responses are equal", "share of sequences", SHARES, _other_prompt),
    "shifted": Cause("shifted by one", "the trainer's log-probs lie one token too early", "share of sequences", SHARES, _shifted),
    "temperature": Cause(
        "temperature", "the engine samples and reports at another temperature (its generation config), the trainer at 1", "engine's temperature − 1",
        (0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.0), _temperature,
    ),
    "temperature_low": Cause(
        "temperature", "the same, below 1", "engine's temperature − 1", (-0.4, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, -0.002, 0.0), _temperature,
    ),
    "top_p": Cause(
        "top-p or top-k", "the engine reports log-probs renormalised over the nucleus, the trainer over the vocabulary", "1 − top_p",
        (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0), _top_p,
    ),
    "top_k": Cause(
        "top-p or top-k", "the same over the k most probable tokens", "1 / k", (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0), _top_k,
    ),
    "bf16_logits": Cause("bf16 logits", "the engine's head gives bf16 (log softmax in fp32)", "unit roundoff of logits (bf16: 2⁻⁸, fp16: 2⁻¹¹)", ROUNDOFF, _bf16),
    "bf16_logprob": Cause("bf16 logits", "the engine's log softmax gives bf16 (of fp32 logits)", "unit roundoff of log-probs", ROUNDOFF, _bf16_logprob),
    "bf16_trainer": Cause("bf16 logits", "the trainer's head gives bf16", "unit roundoff of logits", ROUNDOFF, _bf16_trainer),
    "engine": Cause(
        "one engine off", "for some steps one engine has old weights and says it has the new ones", "versions behind, fractions on the line between two",
        (6.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.0), _engine,
    ),
    "engine_tensor": Cause("one engine off", "for some steps one tensor of one engine is damaged", COPIES, TENSOR, _engine_tensor),
    "rank": Cause("one rank off", "for some steps one tensor of one trainer rank is damaged", COPIES, TENSOR, _rank),
    "node": Cause("one node off", "the same on all ranks of one node", COPIES, TENSOR, _node),
    "lag": Cause(
        "policy lag", "sequences were generated one to three versions ago, some with newer weights from some token on; recorded truly",
        "optimizer steps that a recorded lag of one is worth", (2.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.0), _lag,
    ),
    "routing": Cause("routing", "the trainer sends some tokens to experts at random, the others to the engine's", "share of tokens", ROUTED, _routing),
    "routing_next": Cause("routing", "the trainer takes the engine's third choice for its second, for some tokens", "share of tokens", ROUTED, _routing_next),
}  # fmt: skip
PAIRS = [pair for pair in combinations(CAUSES, 2) if len({CAUSES[each].family for each in pair} | {"noise"}) == 3]  # of two families
