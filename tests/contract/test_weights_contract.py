"""Updates from disk, checksums, and memory that is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from at_work import until_running

from miles.engine.client import EngineClient, EngineError

PROMPT = [5, 17, 200, 33, 9, 81, 120, 44]


async def output(client: EngineClient) -> tuple[list[int], str]:
    reply = await client.generate({"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}})
    return reply["output_ids"], reply["meta_info"]["weight_version"]


@pytest.fixture(autouse=True)
def _first_weights_afterwards(engine):
    yield
    engine.run(lambda client: client.update_from_disk(engine.folder, "default"))


def test_update_from_disk_changes_outputs_and_version(engine):
    async def body(client: EngineClient) -> None:
        before, _ = await output(client)
        await client.update_from_disk(engine.other, 7)
        changed, version = await output(client)
        assert version == "7"
        assert (await client.model_info())["weight_version"] == "7"
        assert changed != before
        await client.update_from_disk(engine.folder, 8)
        assert await output(client) == (before, "8")

    engine.run(body)


def test_an_update_without_a_version_keeps_the_old_one(engine):
    async def body(client: EngineClient) -> None:
        await client.update_from_disk(engine.other, "first")
        await client.update_from_disk(engine.folder)
        assert (await output(client))[1] == "first"

    engine.run(body)


def test_a_wrong_path_is_refused_and_old_weights_stay(engine, tmp_path):
    async def body(client: EngineClient) -> None:
        before = await output(client)
        with pytest.raises(EngineError) as caught:
            await client.update_from_disk(tmp_path / "nowhere", 9)
        assert caught.value.status == 400
        assert await output(client) == before

    engine.run(body)


def test_an_update_during_a_pause_happens_at_once(engine):
    async def body(client: EngineClient) -> None:
        before, _ = await output(client)
        await client.pause("abort")
        late = asyncio.create_task(output(client))
        await asyncio.sleep(0.2)
        await client.flush()
        await client.update_from_disk(engine.other, "paused")
        assert not late.done()
        await client.resume()
        changed, version = await asyncio.wait_for(late, 60)
        assert version == "paused"
        assert changed != before

    engine.run(body)


def test_an_update_in_place_keeps_running_requests(engine):
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(client.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}))
        await until_running(client, 1)
        await client.pause("in_place")
        await client.update_from_disk(engine.other, "in-place", flush_cache=False)
        await client.resume()
        reply = await asyncio.wait_for(running, 120)
        assert len(reply["output_ids"]) == 2000
        assert reply["meta_info"]["weight_version"] == "in-place"
        await client.flush()

    engine.run(body)


def test_an_update_without_pause_waits_for_running_requests(engine):
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(client.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}))
        await until_running(client, 1)
        await client.update_from_disk(engine.other, "after")
        assert running.done() or (await asyncio.wait_for(running, 60))
        assert (await running)["meta_info"]["finish_reason"]["type"] == "length"

    engine.run(body)


def test_checksums_follow_the_weights(engine):
    async def body(client: EngineClient) -> list[dict[str, Any]]:
        found = [await client.checksums()]
        for folder in (engine.other, engine.folder):
            await client.update_from_disk(folder)
            found.append(await client.checksums())
        return found

    first, other, again = engine.run(body)
    assert first["success"]
    assert first["per_engine_checksum"] == again["per_engine_checksum"] != other["per_engine_checksum"]
    each = first["ranks"][0]["checksums"]
    assert each == again["ranks"][0]["checksums"]
    assert all(len(value) == 16 for value in each.values())


def test_memory_goes_and_comes_back_with_an_update(engine):
    async def body(client: EngineClient) -> None:
        before, _ = await output(client)
        await client.pause("abort")
        await client.flush()
        await client.release_memory()
        await client.resume_memory(["weights"])
        await client.update_from_disk(engine.folder, "resumed")
        await client.resume_memory(["kv_cache", "cuda_graph"])
        await client.resume()
        assert await output(client) == (before, "resumed")

    engine.run(body)


def test_update_weight_version_renames(engine):
    async def body(client: EngineClient) -> None:
        await client.update_version("named")
        assert (await output(client))[1] == "named"

    engine.run(body)
