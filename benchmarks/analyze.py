"""The analysis of log-prob mismatch against the same bytes merely read: in memory on one core and on two, out of sealed files, with all slices.

Sides take turns in one process, and a ratio is the median over turns of the ratio within a turn, so that neighbours on the machine meet both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Row, show
from miles.analysis.analyze import analyze
from miles.analysis.causes import attribute
from miles.analysis.chunk_pass import ChunkPass
from miles.analysis.compiled import kernel
from miles.analysis.core_pass import core
from miles.analysis.load import aligned, loaded
from miles.analysis.measure import standard_errors, token_metrics
from miles.analysis.ranks import Alone
from miles.analysis.recommend import recommend
from miles.analysis.result import result
from miles.analysis.source import chunks_of, open_step
from miles.analysis.state import State
from miles.analysis.terms import BINS, COUNTS, SUMS
from miles.analysis.verdict import judge
from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_shard
from miles.data.store.train_record import write_train_record

LENGTH, PROMPT, STEP_TOKENS = 8192, 512, 1 << 24
CORE_BYTES = 9  # a token: two log-probs and the mask
IN_MEMORY = 1 << 26  # tokens: 600 MB, far more than any cache holds
MEMORY_GOAL = 1e9
# The peak of the program alone: ru_maxrss of a child begins with what its parent held.
TELL_PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@kernel
def read(words):
    """Their sum: every byte is read, and nothing else is done."""
    total = np.int64(0)
    for i in range(len(words)):
        total += words[i]
    return total


class Arrays:
    """Log-probs and mask of some tokens in memory, as sequences of LENGTH."""

    def __init__(self, tokens: int) -> None:
        random = np.random.default_rng(0)
        block = 1 << 20
        self.mu, self.o, self.mask = aligned(tokens, np.float32), aligned(tokens, np.float32), aligned(tokens, np.uint8)
        self.mu[:] = np.resize(-random.exponential(1.0, block).astype(np.float32), tokens)
        self.o[:] = np.resize(self.mu[:block] + random.normal(0, 0.02, block).astype(np.float32), tokens)
        self.mask[:] = np.resize((np.arange(LENGTH) >= PROMPT).astype(np.uint8), tokens)
        self.start = np.arange(0, tokens, LENGTH)
        self.length = np.minimum(LENGTH, tokens - self.start)

    def analyse(self, part: int, parts: int) -> None:
        which = slice(len(self.start) * part // parts, len(self.start) * (part + 1) // parts)
        outputs = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
        core(self.mu, self.o, self.mask, self.start[which], self.start[which], self.length[which], *outputs)

    def read(self, part: int, parts: int) -> None:
        for array in (self.mu, self.o, self.mask):
            words = array.view(np.int64)
            read(words[len(words) * part // parts : len(words) * (part + 1) // parts])


def in_turns(sides: Sequence[Callable[[], Any]], turns: int, clock: Callable[[], float] = time.perf_counter) -> list[list[float]]:
    """Seconds of each side in each turn, after one that is not counted. Sides of one thread are measured in its own processor time."""
    found: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 1):
        for seconds, side in zip(found, sides, strict=True):
            began = clock()
            side()
            if turn:
                seconds.append(clock() - began)
    return found


def ratio(reference: list[float], ours: list[float]) -> float:
    """How fast ours is of the reference: the median within a turn."""
    return statistics.median(a / b for a, b in zip(reference, ours, strict=True))


def in_memory(tokens: int, turns: int) -> Iterator[Row]:
    """The core pass on one core and on two."""
    arrays = Arrays(tokens)
    with ThreadPoolExecutor(2) as pool:
        for cores in (1, 2):

            def all_parts(function: Callable[[int, int], None], cores: int = cores) -> None:
                list(pool.map(lambda part: function(part, cores), range(cores)))

            if cores == 1:
                reading, ours = in_turns([lambda: arrays.read(0, 1), lambda: arrays.analyse(0, 1)], turns, time.thread_time)
            else:
                reading, ours = in_turns([lambda: all_parts(arrays.read), lambda: all_parts(arrays.analyse)], turns)
            size = tokens * CORE_BYTES / 1e9
            yield Row(
                f"core pass in memory, {cores} core{'s' if cores > 1 else ''} / reading it", ratio(reading, ours), 0.8,
                note=f"{size / statistics.median(ours):.1f} and {size / statistics.median(reading):.1f} GB/s, {tokens / statistics.median(ours) / 1e6:.0f} M tokens/s",
                found={"seconds": ours, "reading": reading, "tokens": tokens},
            )  # fmt: skip


def make_run(folder: Path, tokens: int) -> None:
    """A run of that many tokens: steps of one shard and one train record, trained on in another order than the shard's."""
    random = np.random.default_rng(1)
    run, generated = RunDir(folder), np.arange(LENGTH) >= PROMPT
    # Token ids as in text: the k-th most frequent one has a share of about 1 / k.
    mu = np.where(generated, -random.exponential(1.0, (256, LENGTH)), np.nan).astype(np.float32)
    ids, flags = (150_000 ** random.random((256, LENGTH))).astype(np.int32), (generated * int(Flag.GENERATED)).astype(np.uint8)
    columns = {
        "train_logprob": (mu + random.normal(0, 0.02, mu.shape)).astype(np.float32),
        "entropy": np.where(generated, random.exponential(1.0, mu.shape), np.nan).astype(np.float32),
        "advantage": np.where(generated, random.normal(0, 1, (256, 1)), np.nan).astype(np.float32),
        "used": np.broadcast_to(generated, mu.shape).astype(np.uint8),
        "route_miss": random.integers(0, 4, mu.shape).astype(np.uint8),
    }
    for step in range(-(-tokens // STEP_TOKENS)):
        count = min(STEP_TOKENS, tokens - step * STEP_TOKENS) // LENGTH

        def sample(index: int, step: int = step) -> Sample:
            which = (index + step) % 256
            return Sample(
                draw=step * 4096 + index // 8, sample=index % 8, seed=0, token_id=ids[which], prompt_length=PROMPT, rollout_logprob=mu[which],
                loss_mask=generated.astype(np.uint8), flags=flags, status=Status.COMPLETED, reward=float(index % 2), runs=[(PROMPT, step)],
            )  # fmt: skip

        class Samples(Sequence[Sample]):
            def __len__(self, count: int = count) -> int:
                return count

            def __getitem__(self, index: Any, count: int = count, sample: Any = sample) -> Any:
                if index >= count:
                    raise IndexError(index)
                return sample(index)

        sealed = write_shard(run.batch(step) / "rollout.0.h5", Samples())
        entry = ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=count, tokens=count * LENGTH)
        policy = Policy(weight_version=step, weight_checksum=f"{step:016x}")
        seal_manifest(run.batch(step), Manifest(run_id="bench", epoch=1, step=step, kind="rollout", policy=policy, shards=[entry]))
        write_train_record(run.train(step) / "node_0000.h5", [Part(random.permutation(count), step, columns)], {"step": step})


class Part:
    """One rank's part of a train record."""

    rank = 0

    def __init__(self, rows: np.ndarray, step: int, columns: dict[str, np.ndarray]) -> None:
        self.names, self._which, self._columns = list(columns), (rows + step) % 256, columns
        self.layers: dict[str, np.ndarray] = {}
        self.shard, self.row = np.zeros(len(rows), np.uint16), rows.astype(np.uint32)
        self.offset = (np.arange(len(rows) + 1) * LENGTH).astype(np.uint64)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        for which in self._which:
            yield self._columns[name][which]


def of_files(folder: Path, tokens: int, turns: int) -> Iterator[Row]:
    """The core pass out of files against reading them; everything against reading all of their arrays in memory."""
    steps = range(-(-tokens // STEP_TOKENS))

    def reading() -> int:
        return sum(each.bytes for step in steps for each in loaded(chunks_of(open_step(folder, step)), core=True))

    seconds = in_turns([reading, lambda: analyze(folder, Alone(), core=True)], turns)
    size = tokens * CORE_BYTES / 1e9
    yield Row(
        "core pass out of sealed files / reading them", ratio(*seconds), 0.8,
        note=f"{size / statistics.median(seconds[1]):.1f} and {size / statistics.median(seconds[0]):.1f} GB/s, {tokens / 1e6:.0f} M tokens",
        found={"seconds": seconds[1], "reading": seconds[0]},
    )  # fmt: skip

    def reading_all() -> int:
        return sum(each.bytes for step in steps for each in loaded(chunks_of(open_step(folder, step))))

    def command() -> None:
        state = analyze(folder, Alone())
        tokens, causes = token_metrics(state), attribute(state.evidence)
        verdict = judge(tokens, standard_errors(state), causes)
        result(folder, state, tokens, verdict, recommend(state, tokens, verdict), causes)

    seconds = in_turns([reading_all, command], min(turns, 3))
    yield Row(
        "all that the tool computes, out of sealed files / reading them", ratio(*seconds), None,
        note=f"{tokens / statistics.median(seconds[1]) / 1e6:.0f} M tokens/s: slices, corrections, causes, intervals, worst tokens",
        found={"seconds": seconds[1], "reading": seconds[0]},
    )  # fmt: skip
    chunk = next(iter(loaded(chunks_of(open_step(folder, 0)))))
    whole, state = ChunkPass(), State()
    arrays = [array.view(np.uint8)[: array.nbytes // 8 * 8].view(np.int64) for array in chunk.columns.values()]
    large = [np.resize(array, len(array) * 8) for array in arrays]  # beyond the caches
    seconds = in_turns([lambda: [read(array) for array in large], lambda: [whole.add(state, chunk) for _ in range(8)]], turns, time.thread_time)
    size = 8 * chunk.bytes / 1e9
    yield Row(
        "all slices in memory / reading it", ratio(*seconds), 0.25,
        note=f"{size / statistics.median(seconds[1]):.1f} and {size / statistics.median(seconds[0]):.1f} GB/s at {chunk.bytes / chunk.chunk.tokens:.0f} bytes a token, "
        f"{8 * chunk.chunk.tokens / statistics.median(seconds[1]) / 1e6:.0f} M tokens/s",
        found={"seconds": seconds[1], "reading": seconds[0]},
    )  # fmt: skip


def memory(folder: Path, tokens: int) -> Row:
    """Peak memory of the tool, all slices, in a process of its own."""
    script = Path(__file__).resolve().parents[1] / "tools/analyze/logprob_mismatch.py"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", TELL_PEAK, script, folder, "--json"], capture_output=True, text=True)
    took = time.perf_counter() - began
    assert done.returncode in (0, 1), "it says what is wrong"
    assert json.loads(done.stdout)["tokens"]["tokens"] > 0.9 * tokens
    peak = int(done.stderr.split()[-1]) * 1024
    return Row(
        "all slices, whole tool: peak memory / 1 GB", peak / MEMORY_GOAL, 1.0, at_least=False,
        note=f"{peak / 1e6:.0f} MB, {tokens / 1e6:.0f} M tokens in {took:.1f} s", found={"bytes": peak, "seconds": took},
    )  # fmt: skip


def measure(say: Callable[[str], None], quick: bool = False) -> list[Row]:
    """All of it; quick: a little of each."""
    tokens, turns = (STEP_TOKENS // 4, 2) if quick else (100_000_000 // LENGTH * LENGTH, 15)
    say("analysis: in memory")
    rows = list(in_memory(IN_MEMORY // 16 if quick else IN_MEMORY, turns))
    with tempfile.TemporaryDirectory() as name:
        say(f"analysis: writing a run of {tokens / 1e6:.0f} M tokens")
        make_run(Path(name), tokens)
        say("analysis: out of files, all slices")
        rows += of_files(Path(name), tokens, min(turns, 7))
        say("analysis: memory")
        rows.append(memory(Path(name), tokens))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analyze", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that it runs, judges nothing")
    chosen = parser.parse_args()
    result = measure(lambda line: print(line, file=sys.stderr, flush=True), chosen.quick)
    show(result, judged=not chosen.quick)
    sys.exit(0 if chosen.quick or all(row.passed is not False for row in result) else 1)
