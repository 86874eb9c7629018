"""/generate as SGLang 0.5.15 answers it."""

from __future__ import annotations

import asyncio
import base64
import math
from typing import Any

import httpx
import numpy as np
import pytest
from at_work import until_running
from transformers import AutoConfig

from miles.engine.client import EngineClient, EngineError

PROMPT = [5, 17, 200, 33, 9, 81, 120, 44]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def payload(prompt: Any = PROMPT, sampling: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"input_ids": prompt, "sampling_params": GREEDY | (sampling or {}), "return_logprob": True, **fields}


def test_reply_has_sglang_s_fields(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate(payload(rid="one-request"))

    reply = engine.run(body)
    meta = reply["meta_info"]
    assert meta["id"] == "one-request"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (8, 8)
    assert isinstance(meta["cached_tokens"], int)
    assert isinstance(meta["weight_version"], str)
    assert meta["e2e_latency"] > 0
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs_length"] == 8
    assert "text" not in reply
    triples = meta["output_token_logprobs"]
    assert [token for _, token, _ in triples] == reply["output_ids"]
    assert all(score <= 0 and math.isfinite(score) and text is None for score, _, text in triples)


def test_log_probs_are_left_out_unless_asked_for(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate({"input_ids": PROMPT, "sampling_params": GREEDY})

    meta = engine.run(body)["meta_info"]
    assert "output_token_logprobs" not in meta
    assert meta["finish_reason"]["type"] == "length"


def test_default_is_128_new_tokens(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate({"input_ids": PROMPT, "sampling_params": {"ignore_eos": True}})

    assert len(engine.run(body)["output_ids"]) == 128


def test_stop_token_ends_the_response_and_stays_in_it(engine):
    async def body(client: EngineClient) -> Any:
        await client.flush()
        free = await client.generate(payload())
        stop = free["output_ids"][3]
        await client.flush()
        return free, await client.generate(payload(sampling={"ignore_eos": False, "stop_token_ids": [stop]}))

    free, stopped = engine.run(body)
    cut = free["output_ids"].index(free["output_ids"][3]) + 1
    assert stopped["output_ids"] == free["output_ids"][:cut]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": free["output_ids"][3]}
    assert stopped["meta_info"]["completion_tokens"] == cut


def test_ignore_eos_disables_stop_token_ids_too(engine):
    async def body(client: EngineClient) -> Any:
        free = await client.generate(payload())
        return await client.generate(payload(sampling={"stop_token_ids": [free["output_ids"][2]]}))

    assert len(engine.run(body)["output_ids"]) == 8


def test_greedy_is_deterministic(engine):
    async def body(client: EngineClient) -> Any:
        replies = []
        for _ in range(2):
            await client.flush()
            replies.append(await client.generate(payload()))
        return replies

    first, second = engine.run(body)
    assert first["output_ids"] == second["output_ids"]
    assert first["meta_info"]["output_token_logprobs"] == second["meta_info"]["output_token_logprobs"]


def test_batch_answers_in_order(engine):
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1]]

    async def body(client: EngineClient) -> Any:
        alone = [await client.generate(payload(prompt)) for prompt in prompts]
        together = await client.generate(payload(prompts, rid=["b0", "b1", "b2"], sampling_params=[GREEDY | {"max_new_tokens": n} for n in (2, 4, 6)]))
        return alone, together

    alone, together = engine.run(body)
    assert [reply["meta_info"]["id"] for reply in together] == ["b0", "b1", "b2"]
    assert [reply["meta_info"]["prompt_tokens"] for reply in together] == [8, 3, 8]
    assert [len(reply["output_ids"]) for reply in together] == [2, 4, 6]
    assert [reply["output_ids"][0] for reply in together] == [reply["output_ids"][0] for reply in alone]


def test_one_rid_names_a_batch(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate(payload([PROMPT, PROMPT[:4]], rid="batch"))

    assert [reply["meta_info"]["id"] for reply in engine.run(body)] == ["batch_0", "batch_1"]


def test_n_answers_prompt_major(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate(payload([PROMPT, PROMPT[:4]], {"n": 3}))

    replies = engine.run(body)
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [8, 8, 8, 4, 4, 4]
    assert len({reply["meta_info"]["id"] for reply in replies}) == 6


def test_identical_prompts_share_their_prefill(engine):
    prompt = list(range(10, 110))

    async def body(client: EngineClient) -> Any:
        await client.flush()
        return [(await client.generate(payload(prompt)))["meta_info"]["cached_tokens"] for _ in range(2)]

    assert engine.run(body) == [0, 99]


def test_prompt_log_probs_start_with_null(engine):
    async def body(client: EngineClient) -> Any:
        whole = await client.generate(payload(logprob_start_len=0))
        tail = await client.generate(payload(logprob_start_len=5))
        return whole["meta_info"]["input_token_logprobs"], tail["meta_info"]["input_token_logprobs"]

    whole, tail = engine.run(body)
    assert [token for _, token, _ in whole] == PROMPT
    assert whole[0][0] is None
    assert all(score < 0 for score, _, _ in whole[1:])
    assert [token for _, token, _ in tail] == PROMPT[5:]
    assert tail[0][0] is None
    np.testing.assert_allclose([score for score, _, _ in tail[1:]], [score for score, _, _ in whole[6:]], atol=0.02)


def test_rescoring_a_response_agrees_with_its_decoding(engine):
    """max_new_tokens 0 with logprob_start_len scores a sequence by prefill; at temperature 1 it must agree with decoding."""

    async def body(client: EngineClient) -> Any:
        reply = await client.generate(payload(sampling={"temperature": 1.0, "sampling_seed": 5}))
        full = PROMPT + reply["output_ids"]
        scored = await client.generate(payload(full, {"max_new_tokens": 0}, logprob_start_len=len(PROMPT) - 1))
        return reply, scored

    reply, scored = engine.run(body)
    decoded = [score for score, _, _ in reply["meta_info"]["output_token_logprobs"]]
    rescored = [score for score, _, _ in scored["meta_info"]["input_token_logprobs"][1:]]
    np.testing.assert_allclose(rescored, decoded, atol=0 if engine.exact else 0.05)
    if engine.kind == "embedded":
        assert scored["output_ids"] == []
        assert scored["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_routed_experts_cover_all_fed_tokens(engine):
    config = AutoConfig.from_pretrained(engine.folder)

    async def body(client: EngineClient) -> Any:
        return [await client.generate(payload(return_routed_experts=True, routed_experts_start_len=start)) for start in (0, 3)]

    for start, reply in zip((0, 3), engine.run(body), strict=True):
        routes = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), dtype=np.int32)
        routes = routes.reshape(8 + 8 - 1 - start, config.num_hidden_layers, config.num_experts_per_tok)
        assert routes.min() >= 0
        assert routes.max() < config.num_experts
        assert (routes[..., 0] != routes[..., 1]).all()
        assert len(np.unique(routes)) > 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": "text"}, "input_ids"),
        ({"input_ids": [1, 2.5]}, "input_ids"),
        ({"sampling_params": {"temperature": "hot"}}, ""),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"top_k": -2}}, "top_k"),
        ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"input_ids": [3] * 5000}, "context"),
        ({"sampling_params": {"max_new_tokens": 100000}}, "context"),
        ({"logprob_start_len": 9}, "logprob_start_len"),
    ],
)
def test_wrong_requests_get_400(engine, change, words):
    async def body(client: EngineClient) -> str:
        with pytest.raises(EngineError) as caught:
            await client.generate({**payload(), **change})
        assert caught.value.status >= 400
        if engine.kind == "embedded" or not isinstance(change.get("sampling_params", {}).get("temperature"), str):
            assert caught.value.status == 400
        return caught.value.message

    message = engine.run(body)
    if engine.kind == "embedded":
        assert words in message
    # Served as before, over a new connection: SGLang closes the one on which a handler failed.
    engine.run(lambda client: client.generate(payload()))


def test_error_bodies_have_sglang_s_shapes(engine):
    headers = {"Authorization": f"Bearer {engine.token}"}
    with httpx.Client(base_url=engine.url, headers=headers, trust_env=False, timeout=60) as http:
        value = http.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"top_p": 2.0}})
        kind = http.post("/generate", json={"input_ids": PROMPT, "return_logprob": {"no": 1}})
        broken = http.post("/generate", content=b'{"input_ids": [1, ', headers={"Content-Type": "application/json"})
    assert value.status_code == 400
    assert isinstance(value.json()["error"]["message"], str)
    for reply in (kind, broken):
        assert reply.status_code == 400
        body = reply.json()
        assert (body["object"], body["type"], body["param"], body["code"]) == ("error", "Bad Request", None, 400)
        assert isinstance(body["message"], str)


def test_a_live_rid_can_not_be_used_twice(engine):
    async def body(client: EngineClient) -> None:
        long = asyncio.create_task(client.generate(payload(sampling={"max_new_tokens": 3000}, rid="twice")))
        await until_running(client, 1)
        with pytest.raises(EngineError, match="twice") as caught:
            await client.generate(payload(rid="twice"))
        assert caught.value.status == 400
        await client.abort("twice")
        assert (await long)["meta_info"]["finish_reason"]["type"] == "abort"

    engine.run(body)


def test_prompt_token_ids_on_request(engine):
    async def body(client: EngineClient) -> Any:
        return await client.generate(payload(return_prompt_token_ids=True))

    assert engine.run(body)["prompt_token_ids"] == PROMPT
