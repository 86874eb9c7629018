"""Batch-invariant mode: a request has the same tokens and log-probs, bit for bit, whatever else is in the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stepping import drain, submit
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM

from miles.models.context import PackedContext
from miles.models.forward import forward
from miles.models.load import load_model
from miles.precision.logprob import token_logprob

PROMPT = [7, 300, 12, 99, 45, 210, 8]


def others(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 384, int(rng.integers(1, 60))).tolist() for _ in range(count)]


def alone(make_engine, **options):
    engine, done = make_engine(**options), []
    submit(engine, done, PROMPT, max_new_tokens=40, sampling_seed=11, temperature=0.9, logprob_start_len=0, return_routed_experts=True)
    drain(engine)
    return done[0]


@pytest.mark.parametrize("arrival", [0, 3, 17])
@pytest.mark.parametrize("chunk", [2048, 5])
def test_alone_and_among_others_bits_agree(make_engine, arrival, chunk):
    expected = alone(make_engine)
    engine, done = make_engine(chunked_prefill_size=chunk, max_running_requests=9), []
    for index, prompt in enumerate(others(16, seed=arrival)):
        submit(engine, done, prompt, max_new_tokens=10 + 3 * index, sampling_seed=index)
        if index == arrival:
            submit(engine, done, PROMPT, "mine", max_new_tokens=40, sampling_seed=11, temperature=0.9, logprob_start_len=0, return_routed_experts=True)
        engine.step()
    if arrival == 17:
        submit(engine, done, PROMPT, "mine", max_new_tokens=40, sampling_seed=11, temperature=0.9, logprob_start_len=0, return_routed_experts=True)
    drain(engine)
    mine = next(sequence for sequence in done if sequence.request.rid == "mine")
    assert mine.output == expected.output
    assert mine.logprob == expected.logprob
    assert np.concatenate(mine.prompt_logprob).tobytes() == np.concatenate(expected.prompt_logprob).tobytes()
    assert np.array_equal(mine.routes, expected.routes)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "qwen2", "llama"])
def test_decoded_log_probs_are_those_of_the_packed_forward(make_engine, tmp_path, family):
    """What a trainer recomputes over whole sequences, bit for bit; the prompt's by prefill at temperature 1 too."""
    folder = write_tiny(tmp_path / family, family)
    engine, done = make_engine(folder=str(folder), max_running_requests=8), []
    for index, prompt in enumerate(others(12, seed=5)):
        submit(engine, done, prompt, max_new_tokens=5 + 4 * index, sampling_seed=index, temperature=0.7, logprob_start_len=0)
        engine.step()
    drain(engine)
    model = load_model(folder, batch_invariant=True)
    rows = [sequence.tokens() for sequence in done]
    token_id = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    position = torch.from_numpy(np.concatenate([np.arange(len(row)) for row in rows]))
    ends = torch.tensor(np.cumsum([0, *map(len, rows)]), dtype=torch.int32)
    with torch.no_grad():
        logits = forward(model, token_id, position, PackedContext(cu_seqlens=ends))
    for sequence, start, end in zip(done, ends.tolist(), ends.tolist()[1:], strict=False):
        warm = token_logprob(logits[start : end - 1], token_id[start + 1 : end], 0.7)[0].numpy()
        cold = token_logprob(logits[start : end - 1], token_id[start + 1 : end], 1.0)[0].numpy()
        drawn = len(sequence.prompt) - 1
        assert np.array(sequence.logprob, dtype=np.float32).tobytes() == warm[drawn:].tobytes()
        if drawn:
            assert np.concatenate(sequence.prompt_logprob).tobytes() == cold[:drawn].tobytes()


def test_a_cached_prefix_gives_the_same_bits(make_engine):
    expected = alone(make_engine)
    engine, done = make_engine(), []
    submit(engine, done, [*PROMPT, 50, 60], max_new_tokens=8)
    drain(engine)
    submit(engine, done, PROMPT, max_new_tokens=40, sampling_seed=11, temperature=0.9, return_routed_experts=True)
    drain(engine)
    assert done[1].cached_tokens == len(PROMPT) - 1
    assert (done[1].output, done[1].logprob) == (expected.output, expected.logprob)
    assert np.array_equal(done[1].routes, expected.routes)


def test_retraction_changes_nothing(make_engine):
    expected = alone(make_engine)
    engine, done = make_engine(chunked_prefill_size=4), []
    submit(engine, done, PROMPT, max_new_tokens=40, sampling_seed=11, temperature=0.9, logprob_start_len=0, return_routed_experts=True)
    for step in range(30):
        if step in (1, 9, 10, 25):
            engine.pause("retract")
            engine.resume()
        engine.step()
    drain(engine)
    assert done[0].retractions == 4
    assert (done[0].output, done[0].logprob) == (expected.output, expected.logprob)
    assert np.concatenate(done[0].prompt_logprob).tobytes() == np.concatenate(expected.prompt_logprob).tobytes()
    assert np.array_equal(done[0].routes, expected.routes)


def test_a_multi_turn_prompt_continues_from_its_first_turn(make_engine):
    engine, done = make_engine(), []
    submit(engine, done, PROMPT, max_new_tokens=20, sampling_seed=1)
    drain(engine)
    turn = [*PROMPT, *done[0].output, 100, 101, 102]
    submit(engine, done, turn, max_new_tokens=10, sampling_seed=2)
    drain(engine)
    assert done[1].cached_tokens == len(PROMPT) + 20 - 1  # the last token of the first turn was never fed
    fresh, again = make_engine(), []
    submit(fresh, again, turn, max_new_tokens=10, sampling_seed=2)
    drain(fresh)
    assert (done[1].output, done[1].logprob) == (again[0].output, again[0].logprob)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_mode_agrees_with_transformers(make_engine, tiny_folder, dtype):
    """Log-probs of what was drawn against transformers' own eager forward; bfloat16 runs transformers' modules in the engine too."""
    engine, done = make_engine(batch_invariant=False, dtype=dtype), []
    for index, prompt in enumerate(others(6, seed=9)):
        submit(engine, done, prompt, max_new_tokens=12, sampling_seed=index, return_routed_experts=True)
    drain(engine)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    for sequence in done:
        ids = torch.from_numpy(sequence.tokens().astype(np.int64))
        with torch.no_grad():
            scores = model(ids[None]).logits[0].double().log_softmax(-1)
        expected = scores[len(sequence.prompt) - 1 : -1].gather(1, torch.tensor(sequence.output)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(sequence.logprob, expected, atol=1e-4 if dtype == "float32" else 0.5)
        assert sequence.routes.shape == (len(ids) - 1, 2, 2)
        assert len(np.unique(sequence.routes)) > 1
