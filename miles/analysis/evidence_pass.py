"""A loaded chunk into the evidence: its sequences told apart, then counted by step, engine, rank, node, lag and route."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.evidence import (
    CELL,
    CLASSES,
    FOLD,
    FOLDS,
    LOUDNESS_BIN,
    OPENING,
    OPENING_FIELDS,
    QUIETEST,
    ROUNDING,
    TOTALS,
    WINDOWS,
    Evidence,
)  # fmt: skip
from miles.analysis.load import Loaded, numbers_of
from miles.analysis.sequence_kernels import FIRST, PART, PARTS, TERMS, first_look, second_look
from miles.analysis.sequences import group_hash, version_runs

SAMPLE = 1 << 15  # tokens of a chunk that are looked at, about: groups of siblings are drawn by their hash
LEAST_CLEAR = 8  # clear tokens without which a sequence's mean logarithm says too little
SHIFTS = 0.6  # a sequence is shifted where its neighbours' log-probs are nearer than that, relative to its own
EXPLODES = (3, 0.25)  # far tokens, and their share from the first one on
APART = 2.0  # of the log: how far from the chunk's median a run of one version counts in the comparison by lag
CERTAIN = 6.0  # standard errors of a chunk's slope, before its differences are corrected for it

Rows = NDArray[np.float64]


class EvidencePass:
    """windows: the stretch of each step. Chunks are taken one by one; what is added depends on the chunk alone."""

    def __init__(self, steps: list[int]) -> None:
        self._window = {step: place * min(WINDOWS, len(steps)) // len(steps) for place, step in enumerate(steps)}

    def add(self, evidence: Evidence, loaded: Loaded) -> None:
        """Add a chunk."""
        columns = loaded.columns
        chosen, key = _chosen(loaded)
        if not len(chosen):
            return
        where = (loaded.shard_start[chosen], loaded.train_start[chosen], loaded.length[chosen])
        tokens = (columns["rollout_logprob"], columns["loss_mask"], columns["train_logprob"])
        terms = np.empty((int(where[2].sum()), TERMS))
        first = np.zeros((len(chosen), len(FIRST)))
        first_look(*tokens, columns["entropy"], columns["kept_mass"].astype(np.float32), *where, first, evidence.zeros, terms)
        look = dict(zip(FIRST, first.T, strict=True))
        kind = _kinds(look)
        slopes = _slopes(first[kind == 0].sum(0))
        run_first, run_start, run_version = version_runs(loaded.rows, loaded.at[chosen])
        parts, by_run = np.zeros((len(chosen), len(PARTS), len(PART))), np.zeros((len(run_start), len(PART)))
        second_look(*tokens, columns["route_miss"], terms, *where, run_first, run_start, slopes, parts, by_run)
        logs, enough = _mean_logs(parts)
        versions = np.diff(run_first)
        otherwise = parts[:, PARTS.index("routed_otherwise"), 0] > 0
        kind[(kind == CLASSES.index("exploded")) & otherwise] = CLASSES.index("rerouted")
        paired = (kind == 0) & enough[:, 1] & enough[:, 2] & (versions <= 1) & ~otherwise
        fades = logs[:, 1] - logs[:, 2]
        _total(evidence, look, parts, kind)
        plain = kind == 0
        if plain.any():
            exact.add(evidence.rounding, np.array([look[name][plain].sum() for name in ROUNDING]))
            exact.add(evidence.parts, parts[plain].sum(0))
            fold = (key % np.uint64(FOLDS)).astype(np.int64)
            exact.add_rows(evidence.folds, fold[plain], np.stack([look[name][plain] for name in FOLD], 1))
        alike = np.where(parts[:, 3, PART.index("clear")] >= LEAST_CLEAR, logs[:, 3], logs[:, 5])
        known = (parts[:, 3, 3] >= LEAST_CLEAR) | (parts[:, 5, 3] >= LEAST_CLEAR)
        routes = known & (parts[:, 4, 3] > 0) & np.isin(kind, [0, 2])
        differ = (logs[:, 4] - alike)[routes]
        exact.add(evidence.pairs, np.array([len(differ), differ.sum(), (differ * differ).sum()]))
        loudness = np.stack([np.ones(len(kind)), fades, fades * fades, parts[:, 0, PART.index("r2")], parts[:, 0, PART.index("noise")]], 1)
        bins = np.clip((logs[:, 0] - QUIETEST) / LOUDNESS_BIN, 0, len(evidence.loudness) - 1).astype(np.int64)
        exact.add_rows(evidence.loudness, bins[paired], loudness[paired])
        self._cells(evidence, loaded, chosen, look, parts, by_run, (run_first, run_version), kind)
        _openings(evidence, loaded, chosen, key, run_first, run_version)

    def _cells(self, evidence: Evidence, loaded: Loaded, chosen: NDArray[np.int64], look: dict[str, Rows], parts: Rows, by_run: Rows, runs: Any, kind: NDArray[np.int64]) -> None:
        """Sequences by engine, rank and node, runs of one version by lag."""
        window, chunk = self._window[loaded.chunk.step.step], loaded.chunk
        logs, enough = _mean_logs(parts)
        use = enough[:, 0] & (kind != CLASSES.index("shifted"))
        whole, far = parts[:, 0], np.isin(kind, [CLASSES.index("exploded"), CLASSES.index("rerouted")])
        plain = kind == 0
        rows = np.stack(
            [use, np.where(use, logs[:, 0], 0), np.where(use, logs[:, 0] ** 2, 0), *whole[:, :3].T, look["xx"] * plain, look["xd"] * plain, look["d2"] * far], 1
        )[use]  # fmt: skip
        engine = numbers_of(loaded, "engine")
        engines = [loaded.rows.names["engine"][i] for i in engine[chosen[use]].tolist()]
        ranks = chunk.record.rank[chunk.first : chunk.last][chosen[use]].tolist()
        for name, values in (("engine", engines), ("rank", [f"{chunk.record.node}/{rank}" for rank in ranks]), ("node", [chunk.record.node] * len(rows))):
            labels = sorted(set(values))
            table = np.zeros((len(labels), len(CELL)))
            np.add.at(table, [labels.index(value) for value in values], rows)
            evidence.cells.add([(name, (window, label)) for label in labels], table)
        run_first, version = runs
        owner = np.repeat(np.arange(len(run_first) - 1), np.diff(run_first))
        clear = by_run[:, PART.index("clear")]
        good = (clear >= LEAST_CLEAR) & plain[owner]
        mean = _held(by_run[good, PART.index("log")] / clear[good])
        lag = chunk.step.manifest.policy.weight_version - version[good]
        for value in np.unique(lag).tolist():
            mine = lag == value
            sums = by_run[good][mine][:, :3].sum(0)
            slope = [look[name][owner[good]][mine].sum() for name in ("xx", "xd")]
            evidence.cells.add([("lag", (window, value))], np.array([[mine.sum(), mean[mine].sum(), (mean[mine] ** 2).sum(), *sums, *slope, 0.0]]))


def _chosen(loaded: Loaded) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Sequences that are looked at, and the hash of (step, draw) of each: all of them where they are few."""
    key = group_hash(loaded)
    share = SAMPLE / max(int(loaded.length.sum()), 1)
    inside = np.flatnonzero((key >> np.uint64(32)) < share * 2.0**32)
    return inside, key[inside]


def _kinds(look: dict[str, Rows]) -> NDArray[np.int64]:
    kind = np.zeros(len(look["tokens"]), np.int64)
    least, share = EXPLODES
    after = look["tokens"] - look["onset"]
    kind[(look["far"] >= least) & (look["far"] >= share * after) & (look["onset"] >= 0)] = CLASSES.index("exploded")
    for other in ("next", "previous"):
        nearer = (look[other] < SHIFTS * look["here"]) & (look[f"early_{other}"] < SHIFTS * look["early_here"]) & (look["tokens"] >= LEAST_CLEAR)
        kind[nearer & (look["here"] > 1)] = CLASSES.index("shifted")
    return kind


def _slopes(sums: Rows) -> Rows:
    """Of d on mu + entropy, and on the log of the kept mass; 0 where a chunk's differences don't follow them beyond doubt."""
    s = dict(zip(FIRST, sums.tolist(), strict=True))
    x, kept = (abs(s[name]) > CERTAIN * s[square] ** 0.5 for name, square in (("xd", "x2d2"), ("sd", "s2d2")))
    if not x and not kept:
        return np.zeros(2)
    left = np.array([[s["xx"], s["xs"]], [s["xs"], s["ss"]]])
    return np.linalg.solve(left + 1e-9 * np.trace(left) * np.eye(2), np.array([s["xd"], s["sd"]]))


def _mean_logs(parts: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """Of each sequence and part: the mean log r²/noise, and whether enough tokens are in it."""
    clear = parts[:, :, PART.index("clear")]
    return parts[:, :, PART.index("log")] / np.maximum(clear, 1), clear >= LEAST_CLEAR


def _held(logs: Rows) -> Rows:
    """Near the chunk's median, so that a few sequences with a trouble of their own don't hide what is common to many."""
    middle = float(np.median(logs)) if len(logs) else 0.0
    return np.clip(logs, middle - APART, middle + APART)


def _total(evidence: Evidence, look: dict[str, Rows], parts: Rows, kind: NDArray[np.int64]) -> None:
    extra = {"sequences": np.ones(len(kind)), "r2": parts[:, 0, PART.index("r2")], "after": np.where(look["onset"] >= 0, look["tokens"] - look["onset"], 0)}
    columns = np.stack([extra[name] if name in extra else look[name] for name in TOTALS], 1)
    exact.add_rows(evidence.totals, kind, columns)


def _openings(evidence: Evidence, loaded: Loaded, chosen: NDArray[np.int64], key: NDArray[np.uint64], run_first: NDArray[np.int64], run_version: NDArray[np.int64]) -> None:
    """The first generated tokens of each sequence, to be compared with its siblings'."""
    columns, prompt, sample = loaded.columns, numbers_of(loaded, "prompt_length"), numbers_of(loaded, "sample")
    made = np.zeros(len(chosen), OPENING_FIELDS)
    for place, i in enumerate(chosen.tolist()):
        a, b, length = loaded.shard_start[i], loaded.train_start[i], min(OPENING, int(loaded.length[i] - prompt[i]))
        here = slice(a + prompt[i], a + prompt[i] + length)
        mask = columns["loss_mask"][here]
        count = int(np.argmin(mask)) if length and not mask.all() else length
        row = made[place]
        row["key"], row["sample"], row["count"] = key[place], sample[i], count
        row["version"] = run_version[run_first[place]] if run_first[place] < run_first[place + 1] else -1
        row["prompt"] = xxhash.xxh3_64_intdigest(columns["token_id"][a : a + prompt[i]].tobytes())
        row["token"][:count] = columns["token_id"][here][:count]
        row["rollout"][:count] = columns["rollout_logprob"][here][:count]
        row["train"][:count] = columns["train_logprob"][b + prompt[i] : b + prompt[i] + count]
    evidence.add_openings(made)
