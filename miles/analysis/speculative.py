"""Speculative decoding: how many tokens a verification yields, by step, place in the response, weight version, engine and prompt source.

A verification ends with a token of the model's own (bonus, or resampled where a draft was refused); the accepted drafts before it are of
the same one. Drafts at the end of a response without such a token count as one more. Accept length = tokens / verifications.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.batches import Block, batches, blocks_of, parts_of, versions_of
from miles.analysis.slices import position_label
from miles.config.exits import UserError
from miles.data.sample import Flag
from miles.data.store.hdf5 import reading
from miles.data.store.shard import open_shard

SCHEMA = "miles.speculative/1"
MOST = 64  # accepted drafts of one verification that are told apart


@dataclass
class Rounds:
    """Verifications of a block: row of the sequence, place in the response, last token of the array, accepted drafts, ended by a token of the model's own."""

    row: NDArray[np.int64]
    position: NDArray[np.int64]
    last: NDArray[np.int64]
    accepted: NDArray[np.int64]
    ended: NDArray[np.bool_]


class Tally:
    """Verifications, accepted drafts, and tokens of the model's own."""

    def __init__(self) -> None:
        self.rounds, self.accepted, self.own = 0, 0, 0

    def add(self, accepted: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        self.rounds += len(accepted)
        self.accepted += int(accepted.sum())
        self.own += int(ended.sum())

    def figures(self) -> dict[str, Any]:
        tokens = self.accepted + self.own
        return {"verifications": self.rounds, "tokens": tokens, "accept_length": tokens / self.rounds, "accepted_drafts": self.accepted, "draft_share": self.accepted / tokens}


def speculative(path: Path, first: int | None = None, last: int | None = None) -> dict[str, Any]:
    """Accept lengths of rollout batches first to last (inclusive). UserError where no token was drafted: then there is nothing to say."""
    tallies: dict[str, dict[Any, Tally]] = {name: defaultdict(Tally) for name in ("step", "position", "weight_version", "engine", "source")}
    total, lengths, generated = Tally(), np.zeros(MOST + 1, np.int64), 0
    for step in batches(path, first, last):
        for part in parts_of(step):
            starts = versions_of(part)
            for block in blocks_of(part, ("flags",)):
                generated += int(((block.columns["flags"] & Flag.GENERATED) != 0).sum())
                found = rounds_of(block)
                total.add(found.accepted, found.ended)
                lengths += np.bincount(np.minimum(found.accepted, MOST), minlength=MOST + 1)
                numbers = part.numbers
                keys = {
                    "step": np.full(len(found.row), step.step),
                    "position": _bucket(found.position),
                    "weight_version": _version(found, block, starts),
                    "engine": np.array([*part.engines, "unknown"], object)[np.minimum(numbers["engine"][found.row], len(part.engines))],
                    "source": np.array([*part.sources, "unknown"], object)[np.minimum(numbers["source"][found.row], len(part.sources))],
                }
                for name, values in keys.items():
                    for value in np.unique(values).tolist():
                        tallies[name][value].add(found.accepted[values == value], found.ended[values == value])
    reported = [] if total.rounds else _reported(path, first, last)
    if not total.rounds and not reported:
        raise UserError(f"{path}: nothing to analyse: none of {generated} generated tokens was drafted, so no speculative decoding was recorded")
    result: dict[str, Any] = {"schema": SCHEMA, "run": str(path), "generated_tokens": generated, "total": total.figures() if total.rounds else None}
    for name, rows in tallies.items():
        shown = {key: position_label(key) if name == "position" else key for key in sorted(rows)}
        result[f"by_{name}"] = [{name: shown[key], **rows[key].figures()} for key in shown if rows[key].rounds]
    result["accepted_in_a_verification"] = _survival(lengths)
    result["reported_by_samples"] = reported
    return result


def rounds_of(block: Block) -> Rounds:
    """Verifications in order of their last token."""
    flags, start = block.columns["flags"], block.start
    accepted, own = (flags & Flag.DRAFT_ACCEPTED) != 0, (flags & Flag.DRAFT_RESAMPLED) != 0
    lengths = np.diff(start)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    # A run of accepted drafts that nothing of the model's own follows directly ends there: the response ended, or was cut.
    unfinished = accepted.copy()
    unfinished[:-1] &= ~((accepted[1:] | own[1:]) & (sequence[1:] == sequence[:-1]))
    last = np.flatnonzero(own | unfinished)
    reach = np.concatenate([[0], np.cumsum(accepted)])
    begin = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    begin = np.maximum(begin, start[sequence[last]])
    count = reach[last + 1] - reach[begin]
    row = block.first + sequence[last]
    prompt = block.part.numbers["prompt_length"].astype(np.int64)[row]
    ended = own[last]
    position = last - count + ~ended - start[sequence[last]] - prompt
    return Rounds(row, position, last, count, ended)


def _bucket(position: NDArray[np.int64]) -> NDArray[np.int64]:
    """slices.position_label's bucket."""
    position = np.maximum(position, 0)
    power = np.frexp(np.maximum(position, 1).astype(np.float64))[1] - 1
    return np.where(position < 8, position, power + 5)


def _version(found: Rounds, block: Block, starts: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Weight version of each verification's last token; −1 where none is recorded."""
    row, token, version = starts
    if not len(row):
        return np.full(len(found.row), -1)
    stride = int(max(token.max(), block.start[-1])) + 1
    at = found.row * stride + (found.last - block.start[found.row - block.first])
    place = np.searchsorted(row * stride + token, at, side="right") - 1
    known = (place >= 0) & (row[place] == found.row)
    return np.where(known, version[place], -1)


def _survival(lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Of verifications: how many accepted exactly k drafts, and the share that accepted k or more."""
    total = int(lengths.sum())
    reach = np.cumsum(lengths[::-1])[::-1]
    most = int(np.flatnonzero(lengths)[-1]) if total else -1
    return [{"drafts": k, "verifications": int(lengths[k]), "share_with_as_many": int(reach[k]) / total} for k in range(most + 1)]


def _reported(path: Path, first: int | None, last: int | None) -> list[dict[str, Any]]:
    """By step, what engines counted for whole samples (metadata `spec_info`, as slime's and miles' dumps have it), where tokens carry no flags."""
    names, found = ("completion_token_num", "spec_verify_ct", "spec_accept_token_num", "spec_draft_token_num"), []
    for step in batches(path, first, last):
        counts = np.zeros(len(names), np.int64)
        for part in parts_of(step):
            with reading(part.sheet.path), open_shard(part.sheet.path) as shard:
                for metadata in shard.metadata(0, len(shard)):
                    info = metadata.get("spec_info")
                    if isinstance(info, dict):
                        counts += [int(info.get(name) or 0) for name in names]
        tokens, verified, accepted, drafted = counts.tolist()
        if verified:
            share = accepted / drafted if drafted else None
            found.append({"step": step.step, "verifications": verified, "tokens": tokens, "accept_length": tokens / verified, "accepted_drafts": accepted, "accepted_share": share})
    return found
