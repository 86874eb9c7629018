"""The engine of a run takes its sizes from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config.schema import RunConfig
from miles.run.engine import context_length, options_of
from miles.run.role import Role


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, None),
        ({"rollout": {"sampling": {"max_prompt_len": 20, "max_response_len": 30}}}, 50),
        ({"rollout": {"sampling": {"max_context_len": 40, "max_prompt_len": 20, "max_response_len": 30}}}, 40),
        ({"rollout": {"sampling": {"max_context_len": 40}}, "eval": {"interval": 1, "sampling": {"max_context_len": 60}}}, 60),
        ({"rollout": {"sampling": {"max_context_len": 40}}, "eval": {"interval": 1}}, None),
    ],
)
def test_context_length_is_the_longest_that_the_run_bounds(sections, expected):
    assert context_length(RunConfig.model_validate(sections)) == expected


def test_options_follow_the_configuration():
    config = RunConfig.model_validate(
        {"seed": 5, "cluster": {"threads": 2}, "rollout": {"kv_cache_tokens": 99, "max_running_requests": 3, "batch_invariant": False, "sampling": {"stop": ["a"]}}}
    )
    options = options_of(Role("engine", Path("run"), 1, 2, 4, "secret", "http://127.0.0.1:1"), config, "folder")
    assert (options.folder, options.port, options.token, options.random_seed) == ("folder", 0, "secret", 7)
    assert (options.threads, options.kv_cache_tokens, options.max_running_requests, options.batch_invariant) == (2, 99, 3, False)
    assert not options.skip_tokenizer_init
