"""Continuous batching: who runs in the next model step, and what its result means for each.

A step decodes one token of every running sequence and prefills chunks of new ones, in one packed batch. Sequences wait in the
order they came. One whose prompt is just being prefilled by another waits for it, so that the samples of a group share one
prefill. A running sequence has a whole row of the cache, as long as a request may be, so nobody who runs can run out of room:
the engine can't deadlock.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.engine.cache import Rows
from miles.engine.metrics import Metrics
from miles.engine.sequence import Batch, Scores, Sequence

MOST_DEFERRED = 256  # requests looked past in one step because another prefills their prompt


class Scheduler:
    """Bookkeeping only: numpy arrays with one row for each running sequence; the runner does the arithmetic."""

    def __init__(self, rows: int, context_length: int, chunk: int, eos: tuple[int, ...], metrics: Metrics):
        self.rows = Rows(rows, context_length)
        self.metrics = metrics
        self._chunk = chunk
        self._eos = eos
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._prefilling: list[Sequence] = []
        self._prompts: set[bytes] = set()  # prompts being prefilled
        self._copies: list[tuple[int, int, int]] = []
        self._decoding: NDArray[np.int64] | None = None  # rows that decode, or None when they must be looked up again
        self._members: list[Sequence] = []
        self._last = np.zeros(rows, dtype=np.int64)
        self._remaining = np.zeros(rows, dtype=np.int64)
        self._temperature = np.ones(rows, dtype=np.float32)
        self._top_p = np.ones(rows, dtype=np.float32)
        self._top_k = np.full(rows, -1, dtype=np.int64)
        self._seed = np.zeros(rows, dtype=np.uint64)
        self._stops = np.full((rows, 4), -1, dtype=np.int64)
        self.text_stop: Any = None  # function(sequence) -> stop string found or None; set where there is a tokenizer

    # -- requests ---------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    def counts(self) -> tuple[int, int]:
        """Running and waiting requests."""
        return len(self._running), len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a request whose prompt was checked to fit."""
        assert len(sequence.prompt) + sequence.max_new_tokens <= self.rows.width, "requests are checked to fit"
        self._waiting.append(sequence)
        self.metrics.requests += 1

    def abort(self, rid: str | None) -> None:
        """Ends the request of this id, or all (None), with the tokens it has."""
        for sequence in [item for item in self._waiting if rid is None or item.request.rid == rid]:
            self._waiting.remove(sequence)
            self._end(sequence, {"type": "abort", "message": "Abort in waiting queue"})
        for sequence in [item for item in self._running if rid is None or item.request.rid == rid]:
            self._end(sequence, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})

    def retract_all(self) -> None:
        """Running sequences lose their rows and wait again, oldest first."""
        for sequence in reversed(self._running.copy()):
            self._retract(sequence)

    def flush(self) -> None:
        """Drops all cached prefixes; sequences that run keep theirs to themselves."""
        self.rows.forget()

    # -- one step ---------------------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch | None:
        """Decides the next step, or None when nothing can run."""
        if self._waiting:
            self._admit()
        rows = self._decode_rows()
        count = len(rows)
        if not count and not self._prefilling:
            return None
        position = self.rows.grow(rows, self._last[rows])
        batch = Batch(
            copies=self._copies, row=rows, token_id=self._last[rows], position=position, cu_seqlens=np.arange(count + 1, dtype=np.int32),
            kv_length=position + 1, last=np.arange(count, dtype=np.int64), temperature=self._temperature, top_k=self._top_k,
            top_p=self._top_p, seed=self._seed, place=position, scores=[], drawing=self._members,
        )  # fmt: skip
        self._copies = []
        drawing = rows
        if self._prefilling:
            self._add_chunks(batch)
            drawing = np.array([sequence.row for sequence in batch.drawing], dtype=np.int64)
        batch.temperature, batch.top_p = self._temperature[drawing], self._top_p[drawing]
        batch.top_k, batch.seed = self._top_k[drawing], self._seed[drawing]
        return batch

    def _add_chunks(self, batch: Batch) -> None:
        """Appends prompt tokens of new sequences to the batch, as many as one step may prefill."""
        budget, total = self._chunk, len(batch.row)
        tokens, positions = [batch.token_id], [batch.position]
        ends, lengths, last, place, members = [], [], [], [], []
        batch.drawing = list(batch.drawing)
        for sequence in self._prefilling:
            if budget == 0:
                break
            target, row = sequence.target, sequence.row
            assert target is not None
            start = int(self.rows.length[row])
            end = min(len(target), start + budget)
            budget -= end - start
            tokens.append(target[start:end].astype(np.int64))
            positions.append(np.arange(start, end, dtype=np.int64))
            first, stop = max(start, sequence.scored), min(end, len(sequence.prompt) - 1)
            if sequence.request.logprob_start_len >= 0 and first < stop:
                batch.scores.append(Scores(sequence, total + first - start, sequence.prompt[first + 1 : stop + 1].astype(np.int64)))
            total += end - start
            ends.append(total)
            lengths.append(end)
            members.append(row)
            self.rows.length[row] = end
            if end == len(target) and sequence.max_new_tokens > 0:
                last.append(total - 1)
                place.append(end - 1)
                batch.drawing.append(sequence)
        batch.row = np.concatenate((batch.row, np.array(members, dtype=np.int64)))
        batch.token_id, batch.position = np.concatenate(tokens), np.concatenate(positions)
        batch.cu_seqlens = np.concatenate((batch.cu_seqlens, np.array(ends, dtype=np.int32)))
        batch.kv_length = np.concatenate((batch.kv_length, np.array(lengths, dtype=np.int64)))
        batch.last = np.concatenate((batch.last, np.array(last, dtype=np.int64)))
        batch.place = np.concatenate((batch.place, np.array(place, dtype=np.int64)))

    def accept(self, batch: Batch, token: NDArray[np.int64], logprob: NDArray[np.float32], scores: list[NDArray[np.float32]], routes: Any) -> None:
        """Takes a step's result: token i64 [M], logprob f32 [M], prompt log-probs, and the experts
        of every row's tokens [rows, tokens, layers, top_k] (or None)."""
        for wanted, values in zip(batch.scores, scores, strict=True):
            wanted.sequence.prompt_logprob.append(values)
        if self._prefilling:
            self._finish_prefills(routes)
        drawing = batch.drawing
        if not drawing:
            return
        rows = np.array([sequence.row for sequence in drawing], dtype=np.int64) if self._decoding is None else self._decoding
        self._last[rows] = token
        self._remaining[rows] -= 1
        hit = (token[:, None] == self._stops[rows]).any(axis=1)
        over = hit | (self._remaining[rows] <= 0)
        now = time.perf_counter()
        for stopped, sequence, new, score in zip(hit.tolist(), drawing, token.tolist(), logprob.tolist(), strict=True):
            output = sequence.output
            if not output:
                sequence.first_token = now
                self.metrics.first_token.observe(now - sequence.arrived)
            output.append(new)
            sequence.logprob.append(score)
            if sequence.request.sampling.stop and not stopped:
                found = self.text_stop(sequence)
                if found is not None:
                    self._end(sequence, {"type": "stop", "matched": found}, routes)
        for index in np.flatnonzero(over).tolist():
            sequence = drawing[index]
            if sequence.finish is None:
                reason = {"type": "stop", "matched": sequence.output[-1]} if hit[index] else {"type": "length", "length": sequence.max_new_tokens}
                self._end(sequence, reason, routes)
        self.metrics.generation_tokens += len(drawing)
        self.metrics.used_tokens = self.rows.running_tokens

    def _finish_prefills(self, routes: Any) -> None:
        for sequence in [item for item in self._prefilling if item.target is not None and self.rows.length[item.row] == len(item.target)]:
            self._prefilling.remove(sequence)
            self._prompts.discard(self._prompt_key(sequence))
            self._decoding = None
            sequence.target = None
            if sequence.max_new_tokens == 0:
                self._end(sequence, {"type": "length", "length": 0}, routes)

    # -- rows -------------------------------------------------------------------------------------------------------------

    def _decode_rows(self) -> NDArray[np.int64]:
        if self._decoding is None:
            self._members = [sequence for sequence in self._running if sequence.target is None]
            self._decoding = np.array([sequence.row for sequence in self._members], dtype=np.int64)
        return self._decoding

    def _admit(self) -> None:
        budget = self._chunk - sum(len(item.target) - int(self.rows.length[item.row]) for item in self._prefilling if item.target is not None)
        deferred: list[Sequence] = []
        free = self.rows.free_rows
        while self._waiting and free and budget > 0 and len(deferred) < MOST_DEFERRED:
            sequence = self._waiting.popleft()
            key = self._prompt_key(sequence)
            if key in self._prompts:
                deferred.append(sequence)
                continue
            self._prompts.add(key)
            budget -= self._start(sequence)
            free -= 1
        self._waiting.extendleft(reversed(deferred))

    def _prompt_key(self, sequence: Sequence) -> bytes:
        return sequence.request.extra_key.encode() + b"\0" + sequence.prompt.tobytes()

    def _start(self, sequence: Sequence) -> int:
        """Gives the sequence a row. Returns the number of tokens to prefill."""
        target = sequence.tokens()
        limit = len(target) - 1  # the last token is always run: its logits draw the next one
        if sequence.request.logprob_start_len >= 0 and sequence.scored < len(sequence.prompt) - 1:
            limit = min(limit, sequence.scored)  # tokens whose log-probs are wanted must be run
        key = sequence.request.extra_key
        source, count = self.rows.match(target[:limit], key)
        sequence.row = row = self.rows.take(target, source, count, key)
        if source not in (row, -1) and count:
            self._copies.append((source, row, count))
        sequence.target = target
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached_tokens = count
            self.metrics.prompt_tokens += len(target)
            self.metrics.cached_tokens += count
        self._write_row(sequence)
        self._running.append(sequence)
        self._prefilling.append(sequence)
        return len(target) - count

    def _write_row(self, sequence: Sequence) -> None:
        row, sampling = sequence.row, sequence.request.sampling
        self._remaining[row] = sequence.max_new_tokens - len(sequence.output)
        self._temperature[row] = sampling.temperature
        self._top_p[row] = sampling.top_p
        self._top_k[row] = sampling.top_k
        self._seed[row] = sequence.seed
        stops = () if sampling.ignore_eos else tuple(dict.fromkeys((*self._eos, *sampling.stop_token_ids)))
        if len(stops) > self._stops.shape[1]:
            wider = np.full((len(self._stops), len(stops)), -1, dtype=np.int64)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[row] = -1
        self._stops[row, : len(stops)] = stops

    def _release(self, sequence: Sequence) -> None:
        """Takes the row back; its contents stay to be matched."""
        self.rows.give(sequence.row)
        self._running.remove(sequence)
        if sequence.target is not None:
            self._prefilling.remove(sequence)
            self._prompts.discard(self._prompt_key(sequence))
        sequence.row, sequence.target = -1, None
        self._decoding = None

    def _retract(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.retractions += 1
        self.metrics.retractions += 1
        self._waiting.appendleft(sequence)

    def _end(self, sequence: Sequence, reason: dict[str, Any], routes: Any = None) -> None:
        sequence.finish = reason
        sequence.finished = time.perf_counter()
        if sequence.row >= 0:
            if routes is not None and sequence.request.return_routed_experts and sequence.target is None:
                sequence.routes = routes[sequence.row, : self.rows.length[sequence.row]].copy()
            self._release(sequence)
        if reason["type"] == "abort":
            self.metrics.aborted += 1
        self.metrics.latency.observe(sequence.finished - sequence.arrived)
        sequence.done(sequence)
