"""Replies of /generate: routes are found wherever they stand and never in a text; the budget lets bytes in, in order, and none over."""

import asyncio
import base64
import json

import orjson
import pytest

from miles.engine.reply import ByteBudget, parse_reply


def reply(routes, text="", **more):
    return {"text": text, "output_ids": [1, 2], "meta_info": {"id": "a", "routed_experts": routes, "output_token_logprobs": [[-0.5, 1, None]], **more}}


@pytest.mark.parametrize("dump", [orjson.dumps, lambda value: json.dumps(value).encode(), lambda value: json.dumps(value, ensure_ascii=False, indent=2).encode()])
def test_a_reply_is_what_it_says_with_routes_as_base64(dump):
    bait = 'they say "routed_experts":"QUJD" \\" "routed_experts": "x" \u00e9'
    replies = [reply(base64.b64encode(bytes(range(200))).decode(), bait), reply(None), reply("", bait), {"text": bait, "output_ids": [], "meta_info": {}}]
    for value in (replies, *replies):
        found = parse_reply(dump(value))
        for each, expected in zip(found if isinstance(found, list) else [found], value if isinstance(value, list) else [value], strict=True):
            experts = each["meta_info"].get("routed_experts")
            if experts is not None:
                each["meta_info"]["routed_experts"] = experts if isinstance(experts, str) else bytes(experts).decode()
            assert each == expected


def test_escaped_base64_is_read_as_json():
    body = orjson.dumps(reply("AB/CD+==")).replace(b"/", b"\\/")
    assert parse_reply(body)["meta_info"]["routed_experts"] == "AB/CD+=="


def test_the_budget_is_kept_first_come_first_served():
    async def body():
        budget, order, most, now = ByteBudget(100), [], 0, 0

        async def use(name, size):
            nonlocal most, now
            await budget.take(size)
            now += size
            most = max(most, now)
            order.append(name)
            await asyncio.sleep(0)
            now -= size
            budget.give(size)

        waits = asyncio.create_task(use("a", 60))
        tasks = [asyncio.create_task(use(name, size)) for name, size in (("b", 40), ("c", 1000), ("d", 10), ("e", 100), ("f", 30))]
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(use("never", 5))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(waits, *tasks)
        return order, most, budget.used, cancelled.cancelled() or not cancelled.done()

    order, most, used, gone = asyncio.run(body())
    assert [name for name in order if name != "never"] == ["a", "b", "c", "d", "e", "f"]
    assert (most, used) == (1000, 0)  # what is larger than all of it passes alone
    assert gone or "never" in order


def test_a_cancelled_wait_takes_nothing():
    async def body():
        budget = ByteBudget(10)
        await budget.take(10)
        waiting, after = asyncio.create_task(budget.take(5)), asyncio.create_task(budget.take(10))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        budget.give(10)
        await asyncio.wait_for(after, 1)
        return budget.used

    assert asyncio.run(body()) == 10
