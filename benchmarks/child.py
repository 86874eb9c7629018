"""A side that needs a process of its own: `python -m benchmarks.child generate|engine FOLDER ...`; one JSON order a line, one JSON answer a line.

generate: transformers.generate. engine: the embedded engine without HTTP (for information).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.workload import SPINS, THREADS, Workload

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """What every process of a benchmark starts with, as the roles of a run do."""
    threads = str(THREADS)
    pinned = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "GOMP_SPINCOUNT": SPINS}
    return {**os.environ, **pinned, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def start(*arguments: str) -> Iterator[Callable[..., Any]]:
    """A child; call what it yields with an order's fields."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.child", *arguments], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    source, sink = process.stdout, process.stdin

    def ask(**order: Any) -> Any:
        print(json.dumps(order), file=sink, flush=True)
        line = source.readline()
        if not line:
            raise RuntimeError(f"benchmarks.child {' '.join(arguments)} ended with code {process.wait()}")
        return json.loads(line)

    try:
        yield ask
    finally:
        sink.close()
        process.wait()


def generate_side(folder: str) -> Callable[[dict[str, Any]], float]:
    """Seconds of transformers.generate over a workload, in batches of batch_size, each run to its longest response.

    In its favour: prompts of one length (no padding), no end token to look for, no top-k, no log-probs, batches of similar
    lengths where `by_length`, and the attention and experts implementations that transformers chooses for itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = True, 1.0, 0, 1.0

    @torch.inference_mode()
    def run(order: dict[str, Any]) -> float:
        work, size = Workload(order["prompts"], order["lengths"]), order["batch_size"]
        indices = list(range(len(work.prompts)))
        if order["by_length"]:
            indices.sort(key=lambda index: work.lengths[index])
        torch.manual_seed(0)
        began = time.perf_counter()
        for at in range(0, len(indices), size):
            batch = indices[at : at + size]
            prompts, longest = torch.tensor([work.prompts[index] for index in batch]), max(work.lengths[index] for index in batch)
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=longest)
            assert out.shape == (len(batch), prompts.shape[1] + longest), "every row runs to the longest"
        return time.perf_counter() - began

    return run


def engine_side(folder: str, batch_invariant: bool, context_length: int) -> Callable[[dict[str, Any]], float]:
    """Seconds of the engine's own loop over a workload, without HTTP and without its thread."""
    from miles.engine.engine import Engine
    from miles.engine.options import EngineOptions
    from miles.engine.protocol import parse_generate
    from miles.engine.sequence import Sequence

    options = EngineOptions(folder, threads=THREADS, batch_invariant=batch_invariant, context_length=context_length, skip_tokenizer_init=True)
    engine = Engine(options)

    def run(order: dict[str, Any]) -> float:
        assert engine.flush(), "idle between orders"
        done: list[Sequence] = []
        began = time.perf_counter()
        body = {"input_ids": order["prompts"], "sampling_params": sampling(order["lengths"], 0), "return_logprob": True}
        engine.add(parse_generate(body, engine.limits)[0], done.append)
        while engine.scheduler.busy:
            engine.step()
        assert sum(len(sequence.output) for sequence in done) == sum(order["lengths"])
        return time.perf_counter() - began

    return run


def sampling(lengths: list[int], seed: int) -> list[dict[str, Any]]:
    """SGLang's sampling parameters of each request: temperature 1, a seed of its own, exactly so many tokens."""
    return [{"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True, "sampling_seed": seed + at} for at, length in enumerate(lengths)]


def main() -> None:
    """Answer orders until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["generate", "engine"])
    parser.add_argument("folder")
    parser.add_argument("--context-length", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    run = generate_side(given.folder) if given.side == "generate" else engine_side(given.folder, not given.plain, given.context_length)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
