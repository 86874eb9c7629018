"""The trainer read other tokens than the engine generated: another tokenization, or another prompt before an equal response."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis import exact
from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import LOUDNESS, LOUDNESS_BIN
from miles.analysis.sequence_kernels import EARLY

LOUDER = 6.0  # spreads above the quieter half, and at least so much of the log:
LEAST = 1.5
FADES, CERTAIN, ALL_CERTAIN = 1.0, 3.5, 6.0  # of the log, how much the beginning has more; standard errors of the loud sequences, and of all
SPREAD = 0.8  # of that number where nothing is wrong


def look(case: Case, explained_elsewhere: float) -> Found | None:
    """explained_elsewhere: Σ d² of exploded sequences that lie with an engine, a rank or a node that is off altogether."""
    exploded = case.classes["exploded"]
    variance, evidence = 0.0, []
    if exploded["d2"] > 1.5 * explained_elsewhere:
        variance += exploded["d2"] - explained_elsewhere
        evidence.append(
            f"in {exploded['sequences']:.0f} of {case.sequences} sequences d explodes at some token and stays so: "
            f"{100 * exploded['far'] / max(exploded['after'], 1):.0f} % of the tokens from there on are off by more than 3 nats"
        )
        if not case.parts["routed_alike"]["tokens"] and not case.parts["routed_otherwise"]["tokens"]:
            evidence.append("where tokens were routed is not recorded: if the model has experts, other routes could look alike")
        if exploded["missing_tail"]:
            evidence.append(f"{exploded['missing_tail']:.0f} of their last tokens have no log-prob of the trainer: its sequences are shorter")
    if prompts := _other_prompts(case):
        more, count, times = prompts
        variance += more
        evidence.append(
            f"{count:.0f} of {case.sequences} sequences are {'louder than the rest, and' if count < 0.75 * case.sequences else 'off, and'} most so at their beginning: "
            f"the variance of their first {EARLY} tokens is {times:.3g} times that of the others, as where another prompt stood before them"
        )
    if not evidence:
        return None
    return Found(
        "token ids differ", variance, evidence,
        "hand the engine's token ids to the trainer; never tokenize the text again, and build the prompt once",
        "compare the ids of one sequence in both, prompt and special tokens included",
    )  # fmt: skip


def _other_prompts(case: Case) -> tuple[float, float, float] | None:
    """(Σ d² of it, sequences, ratio of variances): of those much louder than the others, or of all of them."""
    table = exact.value(case.evidence.loudness)
    count, fades, _, r2, noise = (table[:, LOUDNESS.index(name)] for name in LOUDNESS)
    total = count.sum()
    if total < 8:
        return None
    reach = np.cumsum(count)
    quarter, half = (int(np.searchsorted(reach, part * total)) for part in (0.25, 0.5))
    first = quarter + max(math.ceil(LOUDER * max(half - quarter, 1) / 0.67), math.ceil(LEAST / LOUDNESS_BIN))
    for start, certain in ((first, CERTAIN), (0, ALL_CERTAIN)):
        loud = count[start:].sum()
        if not loud:
            continue
        mean = fades[start:].sum() / loud
        if mean > FADES and mean * math.sqrt(loud) > certain * SPREAD:
            level = r2[: half + 1].sum() / max(noise[: half + 1].sum(), 1e-300) if start else 0.0
            return max(float(r2[half + 1 :].sum() - level * noise[half + 1 :].sum()), 0.0) if start else float(r2.sum()), float(loud), math.exp(mean)
    return None
