"""The verdict in a few numbers, and the configuration in a few lines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from miles.report.figures import ACCURACY, MISMATCH_MAX, MISMATCH_MEAN, NOT_FINITE, REWARD, series_of, tokens_per_second
from miles.report.records import RunRecord
from miles.report.scales import number
from miles.report.summary import Summary

TIERS = {
    "exact": "an interrupted and resumed run has the bits of an undisturbed one",
    "replayed": "given the recorded batches, training has the same bits",
    "accounted": "no draw lost, none used twice",
}
BROKEN = 0.1  # |Δ| from which on training is not on the policy that generated the data, in any reading


@dataclass
class Tile:
    """before → value unit, and a note. tone: good, warn, bad or nothing."""

    name: str
    value: str
    note: str = ""
    before: str = ""
    unit: str = ""
    tone: str = ""


def tiles(record: RunRecord, summary: Summary) -> list[Tile]:
    """Accuracy, reward, mismatch, speed, guarantee, attempts: always all six."""
    return [_accuracy(record), _reward(record), _mismatch(record), _speed(record), _tier(summary), _attempts(record, summary)]


def _accuracy(record: RunRecord) -> Tile:
    evals = record.of_kind("eval")
    steps, values = series_of(evals, ACCURACY)
    if not values:
        return Tile("Evaluation accuracy", "–", "no evaluation yet")
    last = next(line for line in reversed(evals) if int(line["step"]) == steps[-1])
    sizes = [value for value in series_of([last], ["eval/n"])[1] if math.isfinite(value)]
    size = int(sizes[0]) if sizes else 0
    low, high = last.get("eval/accuracy_low"), last.get("eval/accuracy_high")
    interval = f"95 % interval {low:.3f} to {high:.3f}" if low is not None and high is not None else "no interval recorded"
    tone = ""
    if len(values) > 1 and low is not None and high is not None:
        tone = "good" if low > values[0] else "bad" if high < values[0] else ""
    return Tile("Evaluation accuracy", f"{values[-1]:.3f}", f"{interval}{f', n = {size}' if size else ''}", f"{values[0]:.3f}" if len(values) > 1 else "", tone=tone)


def _reward(record: RunRecord) -> Tile:
    steps, values = series_of(record.of_kind("rollout"), REWARD)
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not known:
        return Tile("Mean reward", "–", "no rollout yet")
    (first, before), (last, after) = known[0], known[-1]
    if first == last:
        return Tile("Mean reward", number(after), f"rollout at step {last}")
    return Tile("Mean reward", number(after), f"steps {first} and {last}; best {number(max(value for _, value in known))}", number(before))


def _mismatch(record: RunRecord) -> Tile:
    lines = record.of_kind("rollout")
    name, (steps, values) = "Mismatch, largest |Δ log-prob|", series_of(lines, MISMATCH_MAX)
    if not values:
        name, (steps, values) = "Mismatch, mean |Δ log-prob|", series_of(lines, MISMATCH_MEAN)
    if not values:
        return Tile("Mismatch, train − rollout", "–", "no log-probs recomputed yet")
    over = f"over {len(values)} step{'s' if len(values) != 1 else ''}"
    if any(not math.isfinite(value) for value in values):
        return Tile(name, "not finite", f"at step {next(step for step, value in zip(steps, values, strict=True) if not math.isfinite(value))}", tone="bad")
    lost = sum(series_of(lines, NOT_FINITE)[1])
    if lost:
        return Tile(name, "not finite", f"{number(lost)} log-probs {over}", tone="bad")
    worst = max(values)
    if worst == 0:
        return Tile(name, "exactly 0", f"trainer and engine agree to the bit {over}", tone="good")
    return Tile(name, number(worst), f"{over}, greatest at step {steps[values.index(worst)]}", tone="bad" if worst > BROKEN else "")


def _speed(record: RunRecord) -> Tile:
    values = sorted(value for value in tokens_per_second(record)[1] if math.isfinite(value))
    if not values:
        return Tile("Tokens per second", "–", "not recorded yet")
    note = f"median of {len(values)} steps; {number(values[0])} to {number(values[-1])}" if len(values) > 1 else "of one step"
    return Tile("Tokens per second", number(values[len(values) // 2]), note, unit="tok/s")


def _tier(summary: Summary) -> Tile:
    if summary.tier is None:
        return Tile("Guarantee", "–", "no tier recorded")
    since = f"; since attempt {summary.tier_since}: {summary.tier_why}" if summary.tier_since is not None else ""
    return Tile("Guarantee", summary.tier, TIERS.get(summary.tier, "not a tier that this version knows") + since)


def _attempts(record: RunRecord, summary: Summary) -> Tile:
    if not record.attempts:
        return Tile("Attempts", "0", "not started")
    resumes = summary.attempts - 1 - summary.restarts
    if summary.restarts == 0:
        return Tile("Attempts", str(summary.attempts), "no restart" + (f"; resumed by hand {resumes} time{'s' if resumes > 1 else ''}" if resumes > 0 else ""))
    earlier = [attempt.outcome for attempt in record.attempts[:-1]]
    why = next((str(outcome["reason"]) for outcome in reversed(earlier) if outcome and outcome.get("reason")), "the reason was not recorded")
    return Tile("Attempts", str(summary.attempts), f"{summary.restarts} restart{'s' if summary.restarts > 1 else ''}; last because: {why}")


def config_lines(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what a reader asks first. Only what the configuration holds."""
    get = record.setting
    if not record.config:
        return []
    prompts, samples = get("rollout.batch_size"), get("rollout.n_samples_per_prompt")
    model = get("model.hf_checkpoint") or get("model.name") or get("model.build")
    source = get("data.reasoning_gym") or get("data.prompt_data")
    estimator = get("algorithm.advantage_estimator")
    normalised = estimator == "grpo" and get("algorithm.grpo_std_normalization") is False
    ranks = (get("train.num_nodes") or 1) * (get("train.num_gpus_per_node") or 1)
    low, high = get("algorithm.eps_clip"), get("algorithm.eps_clip_high")
    recorded = get("debug.train_only") or get("debug.rescore")
    lines = [
        ("Mode", "rollouts alone" if get("debug.rollout_only") else f"{'training alone on' if get('debug.train_only') else 'scoring again'} {recorded}" if recorded else None),
        ("Model", model),
        ("Prompts", source),
        ("Algorithm", f"{estimator}{' without std' if normalised else ''}" if estimator else None),
        ("Rollout", f"{prompts} prompts × {samples} samples" if prompts and samples else None),
        ("Sampling", f"temperature {get('rollout.sampling.temperature')}, at most {get('rollout.sampling.max_response_len')} tokens" if get("rollout.sampling") else None),
        ("Steps", f"{get('warm_start.steps') or 0} warm start + {get('num_rollout') or 0} rollouts"),
        ("Learning rate", f"{get('train.optimizer.lr')} ({get('train.optimizer.lr_schedule')})" if get("train.optimizer.lr") is not None else None),
        ("Ratio clip", f"{low} / {high}" if high not in (None, low) else low),
        ("KL loss", f"{get('algorithm.kl_loss_type')} × {get('algorithm.kl_loss_coef')}" if get("algorithm.use_kl_loss") else "off"),
        ("Trainer", f"{get('train.backend')}, {ranks} rank{'s' if ranks != 1 else ''}, {get('model.dtype')}" if get("train.backend") else None),
        ("Engine", f"{get('rollout.engine')}{', batch-invariant' if get('rollout.batch_invariant') else ''}" if get("rollout.engine") else None),
        ("Device, seed", f"{get('cluster.device')}, {get('seed')}" if get("cluster.device") else None),
    ]
    return [(name, str(value)) for name, value in lines if value is not None]
