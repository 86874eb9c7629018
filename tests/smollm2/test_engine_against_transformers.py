"""The embedded engine, a real process over HTTP, against transformers' own eager forward pass of SmolLM2, both in fp32.

The reference shares no code with the engine: AutoModelForCausalLM as transformers ships it, attention "eager", whole sequences without a
cache, log-probs by log_softmax in fp64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from texts import PASSAGES

TOLERANCE = 1e-4
CONTEXT, CHUNK = 1024, 128  # tokens of a sequence, and of a chunk of a prompt: long prompts take several model steps
GENERATED = 48


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> dict[str, list[int]]:
    """Every passage, and all of them as one long text."""
    passages = PASSAGES | {"all": "\n\n".join(PASSAGES.values())}
    found = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in passages.items()}
    assert 4 * CHUNK < len(found["all"]) < CONTEXT - GENERATED
    return found


@pytest.fixture(scope="module", params=["batch_invariant", "plain"])
def engine(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an engine process in either mode."""
    options = [
        "--port", "0", "--skip-tokenizer-init", "--context-length", str(CONTEXT), "--kv-cache-tokens", str(16 * CONTEXT),
        "--chunked-prefill-size", str(CHUNK), "--batch-invariant" if request.param == "batch_invariant" else "--no-batch-invariant",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MILES_")} | {"OMP_NUM_THREADS": "1"}
    errors = tmp_path_factory.mktemp("engine") / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles.run.engine", str(model_folder), *options], stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "ready at" in line, errors.read_text()
    try:
        with httpx.Client(base_url=line.split()[-1], timeout=300, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        assert process.wait(60) == 0, errors.read_text()


def ask(engine: httpx.Client, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replies to bodies that are all in flight together, each a call of its own."""

    def one(body: dict[str, Any]) -> dict[str, Any]:
        reply = engine.post("/generate", json={**body, "return_logprob": True})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, bodies))


@torch.no_grad()
def logits(reference: Any, tokens: list[int]) -> torch.Tensor:
    """What transformers predicts after each token but the last: f32 [n - 1, V]."""
    return reference(torch.tensor([tokens])).logits[0, :-1]


def logprobs(reference: Any, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log P(tokens[i] | tokens[:i]) for i = 1 .. n - 1, by transformers: f64 [n - 1]."""
    predicted = (logits(reference, tokens).double() / temperature).log_softmax(-1)
    return predicted.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_prompt_logprobs(engine: httpx.Client, reference: Any, prompts: dict[str, list[int]]) -> None:
    """Of every token of every passage but the first, scored from the start (logprob_start_len 0)."""
    replies = ask(engine, [{"input_ids": ids, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}} for ids in prompts.values()])
    worst, count = 0.0, 0
    for name, ids, reply in zip(prompts, prompts.values(), replies, strict=True):
        found = reply["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in found] == ids
        assert found[0][0] is None, "nothing predicts the first token"
        difference = (torch.tensor([score for score, _, _ in found[1:]], dtype=torch.float64) - logprobs(reference, ids)).abs()
        assert difference.max() < TOLERANCE, f"{name}, token {int(difference.argmax()) + 1}"
        worst, count = max(worst, float(difference.max())), count + len(difference)
    print(f"\nprompt log-probs: {count} tokens, greatest difference {worst:.1e}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_the_decode_steps_that_sampled(engine: httpx.Client, reference: Any, prompts: dict[str, list[int]], temperature: float) -> None:
    """Continuations of the first half of every passage, two of each, all decoded together."""
    halves = [ids[: len(ids) // 2] for ids in prompts.values() for _ in range(2)]
    sampling = {"temperature": temperature, "max_new_tokens": GENERATED, "ignore_eos": True}
    replies = ask(engine, [{"input_ids": ids, "sampling_params": {**sampling, "sampling_seed": seed}} for seed, ids in enumerate(halves)])
    worst, count, texts = 0.0, 0, set()
    for ids, reply in zip(halves, replies, strict=True):
        output = reply["output_ids"]
        assert len(output) == GENERATED
        texts.add(tuple(output))
        found = torch.tensor([score for score, _, _ in reply["meta_info"]["output_token_logprobs"]], dtype=torch.float64)
        difference = (found - logprobs(reference, ids + output, temperature)[len(ids) - 1 :]).abs()
        assert difference.max() < TOLERANCE
        worst, count = max(worst, float(difference.max())), count + len(difference)
    assert len(texts) == len(halves), "seeds and prompts make different continuations"
    print(f"\ndecoded log-probs at temperature {temperature}: {count} tokens, greatest difference {worst:.1e}")


def test_greedy_continuations_are_those_of_transformers(engine: httpx.Client, reference: Any, prompts: dict[str, list[int]]) -> None:
    """Every token is the most probable one after all before it, and so, by induction, the continuation is transformers' own."""
    halves = [ids[: len(ids) // 2] for ids in prompts.values()]
    replies = ask(engine, [{"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": GENERATED}} for ids in halves])
    ends = {reference.generation_config.eos_token_id}
    for name, ids, reply in zip(prompts, halves, replies, strict=True):
        output = reply["output_ids"]
        assert len(output) == GENERATED or output[-1] in ends
        assert not ends & set(output[:-1])
        assert output == logits(reference, ids + output)[len(ids) - 1 :].argmax(-1).tolist(), name
