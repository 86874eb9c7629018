"""What the scheduler promises: everybody finishes, groups share a prefill, memory is bounded."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest
from stepping import drain, submit

from miles.engine.cache import Rows


def test_all_finish_in_a_cache_far_too_small_for_all(make_engine):
    engine, done = make_engine(kv_cache_tokens=192, context_length=64, max_running_requests=40, chunked_prefill_size=16), []
    assert engine.runner.rows == 3
    rng = np.random.default_rng(0)
    lengths = {}
    for index in range(40):
        prompt = rng.integers(3, 384, int(rng.integers(1, 40))).tolist()
        lengths[str(index)] = int(rng.integers(0, 64 - len(prompt) + 1))
        submit(engine, done, prompt, str(index), max_new_tokens=lengths[str(index)])
        if index % 3 == 0:
            engine.step()
            assert sum(engine.scheduler.counts()) + len(done) == index + 1
    drain(engine)
    assert {sequence.request.rid: len(sequence.output) for sequence in done} == lengths
    assert engine.scheduler.rows.free_rows == 3


def test_samples_of_a_group_share_one_prefill(make_engine):
    engine, done = make_engine(), []
    prompt = list(range(10, 60))
    for seed in range(8):
        submit(engine, done, prompt, max_new_tokens=4, sampling_seed=seed)
    prefilled = []
    while engine.scheduler.busy:
        batch = engine.scheduler.next_batch()
        prefilled.append(len(batch.token_id))
        engine.scheduler.accept(batch, *engine.runner.step(batch), engine.runner.routes)
    assert prefilled[0] == 50
    assert max(prefilled[1:]) <= 8
    assert sorted(sequence.cached_tokens for sequence in done) == [0] + [49] * 7


def test_extra_key_keeps_prefixes_apart(make_engine):
    engine, done = make_engine(), []
    for key in ("a", "b", "a"):
        submit(engine, done, [5] * 20, max_new_tokens=1, extra_key=key)
        drain(engine)
    assert [sequence.cached_tokens for sequence in done] == [0, 0, 19]


def test_abort_frees_its_row_in_every_state(make_engine):
    engine, done = make_engine(max_running_requests=2, chunked_prefill_size=8), []
    submit(engine, done, [3] * 30, "prefilling", max_new_tokens=5)
    submit(engine, done, [4] * 30, "waiting", max_new_tokens=5)
    submit(engine, done, [5] * 4, "later", max_new_tokens=5)
    engine.step()
    for rid in ("prefilling", "waiting", "later"):
        engine.scheduler.abort(rid)
    assert {sequence.request.rid for sequence in done} == {"prefilling", "waiting", "later"}
    assert all(sequence.finish["type"] == "abort" for sequence in done)
    assert not engine.scheduler.busy
    assert engine.scheduler.rows.free_rows == 2
    submit(engine, done, [5] * 4, max_new_tokens=5)
    drain(engine)
    assert len(done[-1].output) == 5


def test_context_is_filled_to_its_last_token(make_engine):
    engine, done = make_engine(context_length=32), []
    submit(engine, done, [9] * 12, max_new_tokens=None)
    drain(engine)
    assert len(done[0].output) == 20


@pytest.mark.parametrize("end", ["eos", "stop"])
def test_end_of_sequence_stops_unless_ignored(make_engine, end):
    engine, done = make_engine(), []
    submit(engine, done, [9] * 12, max_new_tokens=50, sampling_seed=3)
    drain(engine)
    token = done[0].output[20]
    first = done[0].output.index(token)
    if end == "eos":
        engine.scheduler._eos = (token,)
    submit(engine, done, [9] * 12, max_new_tokens=50, sampling_seed=3, ignore_eos=False, stop_token_ids=[] if end == "eos" else [1, 2, 4, 5, 6, 7, token])
    drain(engine)
    assert done[1].output == done[0].output[: first + 1] or done[1].finish["matched"] in (1, 2, 4, 5, 6, 7)
    assert done[1].finish["type"] == "stop"


def test_seeds_and_positions_alone_decide_the_noise(make_engine):
    engine, done = make_engine(batch_invariant=False), []
    for seed in (1, 1, 2, None, None):
        submit(engine, done, [9] * 12, max_new_tokens=30, **({} if seed is None else {"sampling_seed": seed}))
        drain(engine)
        engine.scheduler.flush()
    outputs = [tuple(sequence.output) for sequence in done]
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) == 4


def test_memory_stays_flat(make_engine):
    engine, done = make_engine(max_running_requests=8), []

    def rss() -> float:
        with open(f"/proc/{os.getpid()}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    rng = np.random.default_rng(0)
    for index in range(200):
        submit(engine, done, rng.integers(3, 384, 20).tolist(), max_new_tokens=6, return_routed_experts=True)
        if index % 20 == 19:
            drain(engine)
            done.clear()
        if index == 79:
            before = rss()
    assert rss() - before < 16


def test_rows_find_the_longest_common_prefix():
    rows = Rows(4, 10)
    first = rows.take(np.array([1, 2, 3, 4], dtype=np.int32), -1, 0, "")
    rows.length[first] = 4
    second = rows.take(np.array([1, 2, 9], dtype=np.int32), first, 2, "")
    rows.length[second] = 3
    assert first != second
    assert rows.match(np.array([1, 2, 3, 7], dtype=np.int32), "") == (first, 3)
    assert rows.match(np.array([1, 2, 9, 9, 9], dtype=np.int32), "") == (second, 3)
    assert rows.match(np.array([2], dtype=np.int32), "") == (-1, 0)
    assert rows.match(np.array([1, 2, 3], dtype=np.int32), "key") == (-1, 0)
    rows.give(first)
    rows.forget()
    assert rows.match(np.array([1, 2, 3], dtype=np.int32), "") == (-1, 0)
    rows.give(second)
    assert rows.length[second] == 0  # older weights wrote it
