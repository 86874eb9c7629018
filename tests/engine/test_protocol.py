"""Requests: what is understood, what is refused by name, and that nothing malformed gets through."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.engine.protocol import Limits, RequestError, parse_generate

LIMITS = Limits(vocab_size=100, context_length=64, routed_experts=True)


@pytest.mark.parametrize(
    "name", ["min_p", "min_new_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty", "stop_regex", "json_schema", "regex", "ebnf", "logit_bias"]
)
def test_unsupported_sampling_parameters_are_refused_by_name(name):
    value = {"logit_bias": {"3": 1.0}, "stop_regex": "a", "json_schema": "{}", "regex": "a", "ebnf": "a"}.get(name, 0.5)
    with pytest.raises(ValueError, match=rf"sampling_params\.{name} is not supported"):
        parse_generate({"input_ids": [1], "sampling_params": {name: value}}, LIMITS)


@pytest.mark.parametrize(("name", "value"), [("stream", True), ("top_logprobs_num", 2), ("token_ids_logprob", [3]), ("lora_path", "x"), ("input_embeds", [[0.1]])])
def test_unsupported_fields_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        parse_generate({"input_ids": [1], name: value}, LIMITS)


def test_values_that_leave_an_option_unused_are_accepted():
    unused = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0, "logit_bias": None, "stop": None, "n": 1, "stream_interval": 4}
    (request,), is_list = parse_generate({"input_ids": [1], "sampling_params": unused, "stream": False, "top_logprobs_num": 0, "unknown": 1}, LIMITS)
    assert not is_list
    assert request.sampling.max_new_tokens == 63  # the default of 128 is cut to the context; a number that was given is not


def test_an_unknown_sampling_parameter_is_refused():
    with pytest.raises(ValueError, match="max_tokens is not a sampling parameter"):
        parse_generate({"input_ids": [1], "sampling_params": {"max_tokens": 4}}, LIMITS)


def test_a_tiny_temperature_is_greedy():
    (request,), _ = parse_generate({"input_ids": [1], "sampling_params": {"temperature": 1e-7, "max_new_tokens": 4}}, LIMITS)
    assert request.sampling.temperature == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["input_ids", "text", "sampling_params", "rid", "return_logprob", "logprob_start_len", "return_routed_experts", "routed_experts_start_len", "extra_key", "stream", "top_logprobs_num"]
)
SAMPLING = st.sampled_from(
    ["max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "n", "sampling_seed", "min_p", "logit_bias", "no_stop_trim"]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.dictionaries(SAMPLING, JSON, max_size=3), st.booleans())
def test_anything_is_understood_or_refused(fields, sampling, good):
    body = {**({"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, **sampling}} if good else {}), **fields}
    requests = []
    with contextlib.suppress(RequestError):  # BadRequest is one; anything else is a bug
        requests, _ = parse_generate(body, LIMITS)
    for request in requests:
        assert request.input_ids.dtype == np.int32
        assert 0 < len(request.input_ids) < 64
        assert 0 <= request.sampling.max_new_tokens <= 64 - len(request.input_ids)
        assert request.sampling.temperature >= 0
        assert 0 < request.sampling.top_p <= 1


@pytest.mark.parametrize("body", [None, 3, [], "x", {"input_ids": []}, {"input_ids": [[]]}, {"input_ids": [True]}, {"input_ids": [100]}, {"input_ids": [-1]}, {"input_ids": [2**70]}, {}, {"text": "no tokenizer"}])
def test_prompts_that_are_none(body):
    with pytest.raises(ValueError, match=r"\w"):
        parse_generate(body, LIMITS)
