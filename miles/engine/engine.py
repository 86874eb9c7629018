"""One engine: model, cache and scheduler, run step by step in its own thread, one model step at a time.

The HTTP side hands it requests and commands; both take effect between steps. A crash in the loop ends the process: a server
that answers but no longer generates would hang a run.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError

from miles.config.exits import UserError
from miles.engine.metrics import Metrics
from miles.engine.options import EngineOptions
from miles.engine.protocol import Limits, Request
from miles.engine.runner import Runner
from miles.engine.scheduler import Scheduler
from miles.engine.sequence import Sequence
from miles.engine.text import Text, load_tokenizer
from miles.engine.weights import Weights

Result = TypeVar("Result")
DETERMINISTIC_SEED = 42  # of a request that gives none in batch-invariant mode, as in SGLang's deterministic mode


class Engine:
    """Loads the model of `options.folder`. Raises UserError for an unknown family or a folder that can't be read."""

    def __init__(self, options: EngineOptions):
        self.options = options
        self.metrics = Metrics()
        self.updated: Callable[[float, str], None] | None = None  # told of every update: when it began [unix s], version
        try:
            self.runner = Runner(options)
            self.tokenizer = None if options.skip_tokenizer_init else load_tokenizer(options.folder)
        except (ValueError, OSError, SafetensorError) as error:  # what transformers and safetensors say of a bad folder
            raise UserError(" ".join(str(error).split())) from error
        self.text = None if self.tokenizer is None else Text(self.tokenizer)
        self.weights = Weights(self.runner, options.folder, options.weight_version)
        self.context_length = self.runner.context_length
        self.metrics.capacity = self.runner.rows * self.context_length
        self.scheduler = Scheduler(self.runner.rows, self.context_length, options.chunked_prefill_size, self.runner.eos_token_ids, self.metrics)
        if self.text is not None:
            self.scheduler.text_stop = self.text.stop_found
        self.limits = Limits(self.runner.vocab_size, self.context_length, self.runner.routed_experts, self.tokenizer)
        self.paused = False
        self._seeds = np.random.default_rng(options.random_seed)
        self._released: set[str] = set()

    # -- requests, called in the engine's thread ---------------------------------------------------------------------------

    def add(self, requests: list[Request], done: Callable[[Sequence], None]) -> None:
        """Queues requests; `done` gets each finished sequence, in the engine's thread."""
        for request in requests:
            sampling = request.sampling
            if sampling.seed is not None:
                seed = sampling.seed & 0xFFFFFFFFFFFFFFFF
            elif self.options.batch_invariant:
                seed = DETERMINISTIC_SEED
            else:
                seed = int(self._seeds.integers(1 << 63))
            assert sampling.max_new_tokens is not None, "parse_generate fills it in"
            self.scheduler.add(Sequence(request, done, seed, sampling.max_new_tokens))

    def step(self) -> bool:
        """Runs one model step; False when there was nothing to do."""
        batch = self.scheduler.next_batch()
        if batch is None:
            assert not self.scheduler.busy, "requests wait, but none can run"
            return False
        token, logprob, scores = self.runner.step(batch)
        self.scheduler.accept(batch, token, logprob, scores, self.runner.routes)
        self.metrics.steps += 1
        return True

    def why_not_ready(self) -> str | None:
        """Why nothing can be generated now, or None."""
        if self._released:
            return f"memory of {', '.join(sorted(self._released))} is released; resume it first"
        if self.weights.missing:
            return "the weights were released and have not been loaded again; update them first"
        return None

    # -- control, called in the engine's thread ----------------------------------------------------------------------------

    def pause(self, mode: str) -> None:
        """Stops stepping; retract drops the cache of what runs."""
        self.paused = True
        if mode == "retract":
            self.scheduler.retract_all()

    def resume(self) -> None:
        """Steps again."""
        self.paused = False

    def flush(self) -> bool:
        """Empties the prefix cache; False when requests are unfinished."""
        if self.scheduler.busy:
            return False
        self.scheduler.flush()
        return True

    def update(self, load: Callable[[], str], flush_cache: bool, version: str | None) -> tuple[bool, str]:
        """Changes weights by `load`, which checks before it changes anything. Returns (success, message)."""
        if "weights" in self._released:
            return False, "the weights are released; resume memory occupation (tag weights) before an update"
        if flush_cache and self.scheduler.busy:
            return False, "requests are unfinished, so the cache can't be flushed; pass flush_cache false, or pause with mode abort"
        began = time.time()
        try:
            message = load()
        except UserError as error:  # anything else is a bug, and ends the process
            return False, str(error)
        # Keys and values of older weights are never matched again, whether or not they may be dropped.
        self.scheduler.flush()
        self.metrics.weight_updates += 1
        if version is not None:
            self.weights.version = version
        if self.updated is not None:
            self.updated(began, self.weights.version)
        return True, message

    def checksums(self) -> tuple[dict[str, str], str] | None:
        """Weights.checksums, or None while the weights are released."""
        return None if "weights" in self._released else self.weights.checksums()

    def release(self, tags: list[str]) -> str | None:
        """Gives memory back; returns a message when it can't be."""
        if self.scheduler.busy:
            return "requests are unfinished; abort them or let them end before memory is released"
        if "kv_cache" in tags and "kv_cache" not in self._released:
            self.scheduler.flush()
            self.runner.release_cache()
        if "weights" in tags and "weights" not in self._released:
            self.weights.release()
        self._released |= set(tags)
        return None

    def resume_memory(self, tags: list[str]) -> str | None:
        """Takes memory again; returns a message for a tag that was not released."""
        foreign = [tag for tag in tags if tag not in self._released]
        if foreign:
            return f"memory of {', '.join(foreign)} was not released"
        if "weights" in tags:
            self.weights.resume()
        if "kv_cache" in tags:
            self.runner.make_cache()
        self._released -= set(tags)
        return None


class EngineThread:
    """Runs an engine; `tell` and `ask` hand it functions to call between steps."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[Sequence] = []
        self.deliver: Callable[[list[Sequence]], None] = lambda finished: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to step."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current step."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def tell(self, what: Callable[[], None]) -> None:
        """Calls `what` between steps."""
        self._inbox.put(what)

    def ask(self, what: Callable[[], Result]) -> Future[Result]:
        """Calls `what` between steps; its result or exception arrives in the future."""
        future: Future[Result] = Future()

        def call() -> None:
            try:
                future.set_result(what())
            except Exception as error:
                future.set_exception(error)
                raise  # a bug: commands answer their user's mistakes by value

        self._inbox.put(call)
        return future

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; finished sequences are delivered in lists, in the engine's thread."""
        self._inbox.put(lambda: self.engine.add(requests, self._outbox.append))

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            traceback.print_exc()
            print("engine: the engine's loop crashed; the process ends", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)

    def _turn(self) -> bool:
        engine, metrics = self.engine, self.engine.metrics
        while True:
            if self._outbox:
                self._hand_out()
            if engine.scheduler.busy and not engine.paused and self._inbox.empty():
                break
            metrics.running, metrics.queued = engine.scheduler.counts()
            what = self._inbox.get()
            if what is None:
                return False
            what()
        began, before = time.perf_counter(), metrics.generation_tokens
        engine.step()
        speed = (metrics.generation_tokens - before) / (time.perf_counter() - began)
        metrics.gen_throughput += 0.05 * (speed - metrics.gen_throughput)  # smoothed over some 20 steps
        metrics.running, metrics.queued = engine.scheduler.counts()
        return True

    def _hand_out(self) -> None:
        finished, self._outbox[:] = self._outbox.copy(), []
        for sequence in finished:
            sequence.weight_version = self.engine.weights.version
        self.deliver(finished)
