"""Health, information, abort, pause and flush, with requests in flight."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from at_work import until_running

from miles.engine.client import EngineClient, EngineError

PROMPT = [5, 17, 200, 33, 9, 81, 120, 44]


def long_request(rid: str, tokens: int = 3000) -> dict[str, Any]:
    return {
        "input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}, "return_logprob": True, "rid": rid,
    }  # fmt: skip


async def in_flight(client: EngineClient, names: list[str], tokens: int = 3000) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(client.generate(long_request(name, tokens))) for name in names]
    await until_running(client, len(names))
    assert not any(task.done() for task in tasks), "the requests are still running"
    return tasks


def check_partial(reply: dict[str, Any]) -> None:
    assert len(reply["output_ids"]) < 3000
    assert [token for _, token, _ in reply["meta_info"].get("output_token_logprobs") or []] == reply["output_ids"]


def test_health_and_ping(engine):
    async def body(client: EngineClient) -> None:
        assert await client.health()
        assert await client.health(generate=True)

    engine.run(body)


def test_information(engine):
    async def body(client: EngineClient) -> Any:
        return await client.model_info(), await client.server_info()

    model, server = engine.run(body)
    assert model["is_generation"] is True
    assert model["model_type"] == "qwen3_moe"
    assert model["architectures"] == ["Qwen3MoeForCausalLM"]
    assert isinstance(model["weight_version"], str)
    assert server["status"] == "ready"
    assert server["max_total_num_tokens"] > 0
    assert server["weight_version"] == model["weight_version"]


def test_calls_without_the_token_are_refused(engine):
    if not engine.token:
        pytest.skip("this server was started without a token")
    with httpx.Client(base_url=engine.url, trust_env=False, timeout=60) as http:
        assert http.get("/health").status_code == 200
        for method, route in (("GET", "/model_info"), ("POST", "/generate"), ("POST", "/flush_cache"), ("POST", "/update_weights_from_disk")):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                reply = http.request(method, route, headers=headers, json={} if method == "POST" else None)
                assert reply.status_code == 401, route
                assert reply.json() == {"error": "Unauthorized"}


def test_abort_by_rid_ends_that_request_alone(engine):
    async def body(client: EngineClient) -> None:
        one, two = await in_flight(client, ["abort-one", "abort-two"])
        await client.abort("abort-one")
        reply = await asyncio.wait_for(one, 30)
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        check_partial(reply)
        assert not two.done()
        await client.abort()
        assert (await asyncio.wait_for(two, 30))["meta_info"]["finish_reason"]["type"] == "abort"

    engine.run(body)


def test_abort_of_an_unknown_rid_is_ignored(engine):
    async def body(client: EngineClient) -> None:
        await client.abort("nobody")

    engine.run(body)


def test_pause_abort_ends_what_runs_and_blocks_what_comes(engine):
    async def body(client: EngineClient) -> None:
        running = await in_flight(client, ["pa-0", "pa-1"])
        await client.pause("abort")
        for task in running:
            reply = await asyncio.wait_for(task, 60)
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
            check_partial(reply)
        late = asyncio.create_task(client.generate(long_request("pa-late", 4)))
        await asyncio.sleep(0.5)
        assert not late.done()
        await client.flush()
        await client.resume()
        assert len((await asyncio.wait_for(late, 60))["output_ids"]) == 4

    engine.run(body)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_that_keeps_requests_does_not_change_them(engine, mode):
    tokens = 600

    async def body(client: EngineClient) -> None:
        await client.flush()
        whole = await client.generate(long_request("undisturbed", tokens))
        await client.flush()
        tasks = [asyncio.create_task(client.generate(long_request(f"keep-{mode}", tokens)))]
        await until_running(client, 1)
        await client.pause(mode)
        late = asyncio.create_task(client.generate(long_request(f"late-{mode}", 4)))
        await asyncio.sleep(0.5)
        assert not late.done()
        held = not tasks[0].done()
        if held:
            with pytest.raises(EngineError) as caught:
                await client.flush(timeout=0)
            assert caught.value.status == 400
        await client.resume()
        reply = await asyncio.wait_for(tasks[0], 60)
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": tokens}
        if engine.kind == "embedded":
            assert held
            assert reply["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)
        if engine.exact:
            assert reply["output_ids"] == whole["output_ids"]
            assert reply["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"]
        assert len((await asyncio.wait_for(late, 60))["output_ids"]) == 4

    engine.run(body)


def test_an_unknown_pause_mode_is_refused(engine):
    async def body(client: EngineClient) -> None:
        with pytest.raises(EngineError) as caught:
            await client.pause("nap")  # type: ignore[arg-type]
        assert caught.value.status == 400
        await client.generate(long_request("after", 2))

    engine.run(body)


def test_continue_without_a_pause_is_harmless(engine):
    async def body(client: EngineClient) -> None:
        await client.resume()
        await client.resume()

    engine.run(body)


def test_flush_is_refused_while_requests_run_and_forgets_prefixes(engine):
    async def body(client: EngineClient) -> None:
        running = await in_flight(client, ["flush-0"])
        with pytest.raises(EngineError) as caught:
            await client.flush(timeout=0)
        assert caught.value.status == 400
        await client.abort("flush-0")
        await running[0]
        await client.flush()
        assert (await client.generate(long_request("flushed", 2)))["meta_info"]["cached_tokens"] == 0

    engine.run(body)


def test_a_client_that_leaves_aborts_its_request(engine):
    async def body(client: EngineClient) -> None:
        (task,) = await in_flight(client, ["leaver"])
        task.cancel()
        await client.flush(timeout=60)  # succeeds only once nothing runs

    engine.run(body)


def test_metrics_are_prometheus_text(engine):
    async def body(client: EngineClient) -> str:
        await client.generate(long_request("counted", 3))
        return await client.metrics()

    if engine.kind == "sglang" and httpx.get(f"{engine.url}/metrics", trust_env=False).status_code == 404:
        pytest.skip("this SGLang runs without --enable-metrics")
    text = engine.run(body)
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("sglang:")}
    assert values["sglang:generation_tokens_total"] > 0
    assert values["sglang:num_running_reqs"] >= 0
