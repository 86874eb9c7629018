"""The curves of the report: which metrics are drawn, under which public names, in which plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles.data.store.metrics import as_float
from miles.report.records import RunRecord
from miles.report.scales import number
from miles.report.svg import WIDTH, Figure, Series, line_plot, stacked_bars

# Public names, in order of preference: the first that a run recorded is drawn.
REWARD = ("rollout/raw_reward", "rollout/reward_mean", "rollout/rewards", "rollout/reward")
ACCURACY = ("eval/accuracy",)
LENGTH = ("rollout/response_len/mean", "rollout/response_length", "rollout/response_lengths")
ENTROPY = ("train/entropy_loss", "train/entropy", "rollout/entropy")
MISMATCH_MAX = ("train/train_rollout_logprob_max_abs_diff",)
NOT_FINITE = ("train/mismatch_not_finite",)
MISMATCH_MEAN = ("train/train_rollout_logprob_abs_diff",)
GRAD_NORM = ("train/grad_norm",)
LOSS = ("train/loss",)
TOKENS_PER_SECOND = ("perf/tokens_per_second", "perf/rollout_tokens_per_second", "perf/tokens_per_gpu_per_sec", "rollout/tokens_per_second")
TOKENS = ("rollout/tokens",)
STEP_SECONDS = ("perf/step_time",)

# The trainer waits while rollout generates: that wait is the time of generation as far as the loop is concerned.
PHASE_LABELS = {"wait": "generate (wait for the batch)", "log_probs": "log-probs", "ref_log_probs": "reference log-probs"}
PHASE_COLOURS = {"wait": "c1", "generate": "c7", "train": "c2", "log_probs": "c3", "ref_log_probs": "c9", "sync": "c5", "eval": "c4", "save": "c6", "seal": "c8"}
OTHER = "c8"
ASIDE = frozenset({"eval", "save"})  # phases that are no part of a step's own time
MAX_BARS = 60


@dataclass
class Placed(Figure):
    """A figure of the page; wide ones take a row."""

    wide: bool = False


def series_of(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[int], list[float]]:
    """Steps and values of the first of these metrics that occurs in the lines."""
    for name in names:
        found = [(int(line["step"]), as_float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
        if found:
            return [step for step, _ in found], [value for _, value in found]
    return [], []


def tokens_per_second(record: RunRecord) -> tuple[list[int], list[float]]:
    """Steps and tokens/s of rollout steps: as recorded, else a batch's tokens by the seconds of its step (without evaluation and saving)."""
    lines = record.of_kind("rollout")
    steps, values = series_of(lines, TOKENS_PER_SECOND)
    if steps:
        return steps, values
    seconds = {step: sum(part for phase, part in stack.items() if phase not in ASIDE) for step, stack in record.phase_seconds.items()}
    pairs = [(step, tokens / seconds[step]) for step, tokens in zip(*series_of(lines, TOKENS), strict=True) if seconds.get(step, 0.0) > 0]
    return [step for step, _ in pairs], [value for _, value in pairs]


def figures(record: RunRecord) -> list[Placed]:
    """Every plot that the run has data for, in reading order."""
    rollout, sft, evals = record.of_kind("rollout"), record.of_kind("sft"), record.of_kind("eval")
    sft_steps = [int(line["step"]) for line in sft]
    shade = (min(sft_steps), max(sft_steps)) if sft_steps else None
    # A plot begins with what it shows: a long warm start must not squeeze the rollouts of plots that it is not part of.
    after = [int(line["step"]) for line in [*rollout, *evals]]

    def curve(name: str, title: str, unit: str, caption: str, series: list[Series], **how: Any) -> list[Placed]:
        series = [one for one in series if one.steps]
        if not series:
            return []
        extent = sft_steps if all(one.label.startswith("warm") for one in series) else after
        svg = line_plot(name, title, unit, series, warm_start=shade, steps=extent, **how)
        legend = [(one.colour, one.label) for one in series] if len(series) > 1 else []
        return [Placed(name, title, caption, svg, legend)]

    def both(names: Sequence[str], colour: str) -> list[Series]:
        return [Series("warm start", *series_of(sft, names), "c6"), Series("rollouts", *series_of(rollout, names), colour, smooth=True)]

    placed = curve("reward", "Reward", "mean reward", "Mean reward of a rollout's samples, as used for training." + _smooth_note(rollout), [Series("reward", *series_of(rollout, REWARD), "c1", smooth=True)])
    placed += curve(
        "accuracy",
        "Evaluation accuracy",
        "accuracy",
        "Share of evaluation prompts answered correctly; the band is the Wilson 95 % interval. " + _eval_size(evals),
        [_with_interval(evals)],
        bounds=(0.0, 1.0),
        points=True,
    )
    placed += curve("length", "Response length", "tokens", "Tokens of a response: mean, and the range from shortest to longest where recorded.", [_with_range(rollout)], bounds=(0.0, None))
    placed += curve("entropy", "Entropy", "nats per token", "Mean entropy of the trainer's distribution over the tokens trained on.", both(ENTROPY, "c4"))
    mismatch = [Series("largest |Δ|", *series_of(rollout, MISMATCH_MAX), "c2", dashed=True), Series("mean |Δ|", *series_of(rollout, MISMATCH_MEAN), "c1")]
    placed += curve("mismatch", "Train–inference mismatch", "|Δ log-prob|", _mismatch_caption(mismatch), mismatch, log=True)
    placed += curve("grad_norm", "Gradient norm", "norm", "Global norm of the gradient before clipping.", both(GRAD_NORM, "c3"))
    placed += curve("loss", "Policy loss", "loss", "Loss of the rollout steps. Near zero by construction; its size says little.", [Series("policy loss", *series_of(rollout, LOSS), "c5", smooth=True)])
    placed += curve("sft_loss", "Warm-start loss", "nats per token", "Cross-entropy of the supervised warm start.", [Series("warm start", *series_of(sft, LOSS), "c6")])
    return placed + phase_bars(record)


def phase_bars(record: RunRecord) -> list[Placed]:
    """Seconds of every phase at every step (means of neighbouring steps when there are many)."""
    seconds = record.phase_seconds
    if not seconds:
        return []
    present = {phase for stack in seconds.values() for phase in stack}
    labels = [phase for phase in PHASE_COLOURS if phase in present] + sorted(present - set(PHASE_COLOURS))
    steps, stacks = sorted(seconds), []
    group = math.ceil(len(steps) / MAX_BARS)
    for first in range(0, len(steps), group):
        together = [seconds[step] for step in steps[first : first + group]]
        stacks.append([sum(stack.get(label, 0.0) for stack in together) / len(together) for label in labels])
    colours = [PHASE_COLOURS.get(label, OTHER) for label in labels]
    # Once for a wide page and once for a narrow one: scaled down, the words of the wide one could not be read.
    names = [PHASE_LABELS.get(label, label) for label in labels]
    svg = stacked_bars("phases-wide", "Time per phase", "seconds", names, steps[::group], stacks, colours, width=2 * WIDTH)
    svg += stacked_bars("phases-narrow", "Time per phase", "seconds", names, steps[::group], stacks, colours)
    totals = [sum(stack.get(label, 0.0) for stack in seconds.values()) for label in labels]
    whole = sum(totals) or 1.0
    shares = ", ".join(f"{label} {100 * total / whole:.0f} %" for label, total in sorted(zip(names, totals, strict=True), key=lambda pair: -pair[1]))
    means = f" Each bar is the mean of {group} steps." if group > 1 else ""
    caption = f"Seconds of each step as {record.phase_source} saw them.{means} Of all the time: {shares}."
    return [Placed("phases", "Time per phase", caption, svg, list(zip(colours, names, strict=True)), wide=True)]


def _with_interval(evals: Sequence[dict[str, Any]]) -> Series:
    steps, values = series_of(evals, ACCURACY)
    known = {int(line["step"]): line for line in evals}
    low = [float(known[step].get("eval/accuracy_low", math.nan)) for step in steps]
    high = [float(known[step].get("eval/accuracy_high", math.nan)) for step in steps]
    return Series("accuracy", steps, values, "c3", low=low, high=high)


def _with_range(rollout: Sequence[dict[str, Any]]) -> Series:
    steps, values = series_of(rollout, LENGTH)
    known = {int(line["step"]): line for line in rollout}
    low = [float(known[step].get("rollout/response_len/min", math.nan)) for step in steps]
    high = [float(known[step].get("rollout/response_len/max", math.nan)) for step in steps]
    recorded = any(math.isfinite(value) for value in [*low, *high])
    return Series("response length", steps, values, "c1", low=low if recorded else [], high=high if recorded else [], smooth=True)


def _eval_size(evals: Sequence[dict[str, Any]]) -> str:
    sizes = sorted({int(size) for size in series_of(evals, ["eval/n"])[1] if math.isfinite(size)})
    return f"{' or '.join(str(size) for size in sizes)} answers an evaluation." if sizes else ""


def _smooth_note(lines: Sequence[dict[str, Any]]) -> str:
    return " Thin: every step; thick: running mean of 9 steps." if len(lines) >= 40 else ""


def _mismatch_caption(series: Sequence[Series]) -> str:
    values = [value for one in series for value in one.values if math.isfinite(value)]
    told = "Difference between the log-probability that the trainer recomputes and the one the engine sampled with, over trained tokens."
    if values and max(values) == 0:
        return f"{told} Exactly 0 at every step."
    return f"{told} Exact zeros lie on the line marked 0; the greatest value is {number(max(values))}." if values else told
