"""Samples of the first and the last batches, token by token, coloured by train − rollout log-prob. Reads only what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.data.sample import Flag, Sample, Status
from miles.data.store.hdf5 import reading
from miles.data.store.manifest import Manifest, read_manifest
from miles.data.store.run_dir import steps_in
from miles.data.store.shard import Shard, open_shard
from miles.data.store.train_record import open_train_record
from miles.report.records import RunRecord
from miles.report.scales import number
from miles.report.token_text import TokenText, load_token_text

SAMPLES = 4  # of one batch
HEAD_TOKENS = 220  # of a response, before the fold
SHOWN_TOKENS = 1200  # of a response, fold included
PROMPT_TOKENS = 600
NUMBERED = 1 << 40  # draws from here on are numbered apart (evaluation, warm start): their numbers tell a reader nothing

# Upper ends of |train − rollout| by class of colour; equal bits have no colour, and the last class is open.
DIFFERENCE_BOUNDS = (1e-6, 1e-4, 1e-2, 1e-1)
DIFFERENCE_KEY = [
    *(("< −0.1", "dn5"), ("< −0.01", "dn4"), ("< −10⁻⁴", "dn3"), ("< −10⁻⁶", "dn2"), ("< 0", "dn1")),
    ("exactly equal", ""),
    *(("> 0", "up1"), ("> 10⁻⁶", "up2"), ("> 10⁻⁴", "up3"), ("> 0.01", "up4"), ("> 0.1", "up5")),
]
# Lower ends of the sampled token's probability by class.
PROBABILITY_BOUNDS = (0.9, 0.5, 0.2, 0.05, 0.01)
PROBABILITY_KEY = [("≥ 0.9", ""), ("≥ 0.5", "pr1"), ("≥ 0.2", "pr2"), ("≥ 0.05", "pr3"), ("≥ 0.01", "pr4"), ("less", "pr5")]


@dataclass
class ShownSample:
    """One sample as the page shows it. prompt, head and tail are safe markup."""

    draw: int
    sample: int
    name: str
    reward: str
    status: str
    length: str
    label: str
    difference: str
    prompt: str
    head: str
    tail: str = ""
    tail_label: str = ""
    cut: str = ""


@dataclass
class ShownBatch:
    title: str
    samples: list[ShownSample] = field(default_factory=list)


@dataclass
class Transcripts:
    """What is shown, and over all shown tokens: how many were compared, how many had equal bits, the greatest |difference|."""

    batches: list[ShownBatch] = field(default_factory=list)
    token_note: str = ""
    compared: int = 0
    equal: int = 0
    greatest: float = 0.0

    @property
    def difference_note(self) -> str:
        if not self.compared:
            return "no shown token has been recomputed by the trainer"
        if self.equal == self.compared:
            return f"all {number(self.compared)} compared tokens here are exactly equal"
        return f"{number(self.equal)} of {number(self.compared)} compared tokens here are exactly equal; greatest |Δ| {number(self.greatest)}"


def transcripts(record: RunRecord) -> Transcripts:
    """The first and the last evaluation and rollout that are still on disk. What can't be read is told in record.damaged."""
    text = load_token_text(record)
    shown = Transcripts(token_note=text.note)
    for title, folder, step, kind in _chosen_batches(record):
        try:
            manifest = read_manifest(folder / "manifest.json")
            with reading(folder):
                batch = ShownBatch(title, [_show(one, train, text, shown) for one, train in _chosen_samples(record, manifest, folder, step, kind)])
        except (OSError, ValueError) as error:
            record.damaged.append(" ".join(str(error).split()))
            continue
        if batch.samples:
            shown.batches.append(batch)
    return shown


def _chosen_batches(record: RunRecord) -> Iterator[tuple[str, Path, int, str]]:
    """(title, folder, step, kind), last before first: the newest is what a reader wants. Steps count from 1, the warm start's first."""
    run_dir = record.run_dir
    sft = {int(line["step"]) for line in record.metrics if line.get("kind") == "sft"} | set(range(1, int(record.setting("warm_start.steps", 0) or 0) + 1))
    rollouts = [step for step in steps_in(run_dir.batches) if step not in sft]
    for kind, words, steps in (("rollout", "Rollout", rollouts), ("eval", "Evaluation", steps_in(run_dir.evals))):
        sealed = [step for step in steps if (run_dir.batch_of(kind, step) / "manifest.json").is_file()]
        if sealed:
            yield f"{words} {'after' if kind == 'eval' else 'of'} step {sealed[-1]}" + (", the last" if len(sealed) > 1 else ""), run_dir.batch_of(kind, sealed[-1]), sealed[-1], kind
        if len(sealed) > 1:
            yield f"{words} {'after' if kind == 'eval' else 'of'} step {sealed[0]}, the first", run_dir.batch_of(kind, sealed[0]), sealed[0], kind


def _chosen_samples(record: RunRecord, manifest: Manifest, folder: Path, step: int, kind: str) -> Iterator[tuple[Sample, NDArray[np.float32] | None]]:
    """Best, worst, longest, and others in order, of different prompts where the batch has them; with the trainer's log-probs."""
    with ExitStack() as stack:
        shards, tables = _shards(manifest, folder, stack)
        chosen = choose_rows(tables)
        trained: dict[tuple[int, int], NDArray[np.float32]] = {}
        if kind == "rollout":
            for index in sorted({index for index, _ in chosen}):
                found = _train_logprobs(record.run_dir.train(step), index, [row for shard, row in chosen if shard == index])
                trained |= {(index, row): values for row, values in found.items()}
        for index, row in chosen:
            (sample,) = shards[index].samples(row, row + 1)
            yield sample, trained.get((index, row))


def _shards(manifest: Manifest, folder: Path, stack: ExitStack) -> tuple[dict[int, Shard], dict[int, dict[str, NDArray[Any]]]]:
    """As many shards, by their index, as hold SAMPLES prompts together, open until the stack closes; and their sequences."""
    shards: dict[int, Shard] = {}
    tables: dict[int, dict[str, NDArray[Any]]] = {}
    draws: set[int] = set()
    for index, entry in enumerate(manifest.shards):
        if entry.sequences and len(draws) < SAMPLES:
            shards[index] = stack.enter_context(_opened(folder / entry.name))
            tables[index] = shards[index].sequences()
            draws |= set(tables[index]["draw"].tolist())
    return shards, tables


def _opened(path: Path) -> Shard:
    with reading(path):
        return open_shard(path)


def choose_rows(tables: dict[int, dict[str, NDArray[Any]]]) -> list[tuple[int, int]]:
    """(shard, row) of the samples to show: best, worst, longest, others. Of another prompt if there is one: siblings would show a reader the same question again."""
    if not tables:
        return []
    places = [(index, row) for index, table in tables.items() for row in range(len(table["draw"]))]
    draws = np.concatenate([table["draw"] for table in tables.values()]).tolist()
    reward = np.nan_to_num(np.concatenate([table["reward"] for table in tables.values()]).astype(np.float64), nan=-np.inf)
    lengths = np.concatenate([np.diff(table["offset"].astype(np.int64)) for table in tables.values()])
    in_order = np.arange(len(places))
    chosen: list[int] = []
    for order in [np.argsort(-lengths, kind="stable"), np.argsort(reward, kind="stable"), np.argsort(-reward, kind="stable"), *[in_order] * SAMPLES]:
        seen = {draws[place] for place in chosen}
        rest = [place for place in order.tolist() if place not in chosen]
        chosen += ([place for place in rest if draws[place] not in seen] or rest)[:1]
    return [places[place] for place in [*chosen[2::-1], *chosen[3:SAMPLES]]]


def _show(sample: Sample, train: NDArray[np.float32] | None, text: TokenText, shown: Transcripts) -> ShownSample:
    start, stop = sample.prompt_length, len(sample.token_id)
    end = min(stop, start + SHOWN_TOKENS)
    difference = None if train is None else train[start:end].astype(np.float64) - sample.rollout_logprob[start:end].astype(np.float64)
    pieces = text.pieces(sample.token_id[start:end].tolist())
    spans = [_token(sample, start + index, piece, None if train is None else float(train[start + index])) for index, piece in enumerate(pieces)]
    tail = spans[HEAD_TOKENS:]
    return ShownSample(
        draw=sample.draw,
        sample=sample.sample,
        name=f"draw {sample.draw}, sample {sample.sample}" if sample.draw < NUMBERED else f"sample {sample.sample}",
        reward=number(sample.reward),
        status=Status(sample.status).name.lower(),
        length=f"{sample.response_length} token{'s' if sample.response_length != 1 else ''} after {sample.prompt_length}",
        label=sample.label or "",
        difference=_count(difference, sample.loss_mask[start:end] > 0, shown),
        prompt=_prompt(sample, text),
        head="".join(spans[:HEAD_TOKENS]),
        tail="".join(tail),
        tail_label=f"{len(tail)} more tokens",
        cut=f"{stop - end} further tokens are in the batch file." if stop > end else "",
    )


def _count(difference: NDArray[np.float64] | None, trained: NDArray[np.bool_], shown: Transcripts) -> str:
    if difference is None:
        return ""
    compared = difference[np.isfinite(difference) & trained]
    if not len(compared):
        return ""
    equal, greatest = int(np.count_nonzero(compared == 0)), float(np.abs(compared).max())
    shown.compared += len(compared)
    shown.equal += equal
    shown.greatest = max(shown.greatest, greatest)
    return "Δ exactly 0" if equal == len(compared) else f"greatest |Δ| {number(greatest)}"


def _prompt(sample: Sample, text: TokenText) -> str:
    ids = sample.token_id[: sample.prompt_length]
    left_out = max(0, len(ids) - PROMPT_TOKENS)
    words = "".join(text.pieces(ids[left_out:].tolist()))
    if text.tokenizer is None and sample.prompt is not None:
        words = sample.prompt
    before = f"[{left_out} tokens before] " if left_out else ""
    return f'<span class="prompt">{escape(before + words)}</span>'


def _token(sample: Sample, position: int, piece: str, train: float | None) -> str:
    """One token as markup: classes for both colourings, and a tooltip."""
    rollout = float(sample.rollout_logprob[position])
    generated = bool(sample.flags[position] & Flag.GENERATED)
    classes = ["t"]
    words = [f"{piece!r}  id {int(sample.token_id[position])}" if piece else f"id {int(sample.token_id[position])}, a part of a character"]
    if math.isfinite(rollout):
        classes.append(probability_class(math.exp(rollout)))
        words.append(f"rollout {rollout:.7g}  (p = {math.exp(rollout):.3g})")
    if train is not None and math.isfinite(train):
        words.append(f"train   {train:.7g}")
        if math.isfinite(rollout) and generated:
            difference = train - rollout
            classes.append(difference_class(difference))
            words.append(f"Δ {'exactly 0' if difference == 0 else f'{difference:+.3g}'}")
    if not sample.loss_mask[position]:
        classes.append("masked")
        words.append("not trained on")
    return f'<span class="{" ".join(filter(None, classes))}" title="{escape(chr(10).join(words))}">{visible(piece)}</span>'


def visible(piece: str) -> str:
    """A token's text as safe markup: line ends shown and kept, control characters by their pictures, a part of a character as a dot."""
    if not piece:
        return '<span class="ctl">·</span>'
    shown = []
    for character in piece:
        if character == "\n":
            shown.append('<span class="ctl">↵</span>\n')
        elif character == "\t":
            shown.append('<span class="ctl">→</span>\t')
        elif ord(character) < 32 or ord(character) == 127:
            shown.append(f'<span class="ctl">{chr(0x2400 + ord(character)) if ord(character) < 32 else chr(0x2421)}</span>')
        else:
            shown.append(escape(character))
    return "".join(shown)


def difference_class(difference: float) -> str:
    """CSS class of train − rollout: nothing for equal bits, u1 to u5 above, n1 to n5 below."""
    if difference == 0:
        return ""
    return ("u" if difference > 0 else "n") + str(1 + sum(abs(difference) > bound for bound in DIFFERENCE_BOUNDS))


def probability_class(probability: float) -> str:
    """CSS class of a sampled token's probability: nothing from 0.9, then p1 to p5 for less and less expected."""
    level = sum(probability < bound for bound in PROBABILITY_BOUNDS)
    return f"p{level}" if level else ""


def _train_logprobs(folder: Path, shard: int, rows: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """The trainer's log-probs of these rows of a shard, from whichever node's record holds them; none while training goes on."""
    found: dict[int, NDArray[np.float32]] = {}
    for path in sorted(folder.glob("*.h5")):
        with reading(path), open_train_record(path) as record:
            sequences = record.sequences()
            for row in rows:
                for index in np.flatnonzero((sequences["shard"] == shard) & (sequences["row"] == row))[:1]:
                    found[row] = record.tokens(int(index), int(index) + 1, ["train_logprob"])["train_logprob"]
    return found
