"""Rewards by name. Each scores a whole group: `reward(samples, context) -> one number or object a sample`.

Synchronous ones run in a process of their own (reward_pool), where math-verify's alarms are in the main thread, as signals want.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from miles.config.exits import TryAgain, UserError
from miles.config.schema import Reward, RunConfig, Source
from miles.data.prompts import GYM_INDEX, gym_dataset
from miles.data.sample import Draw, Sample

Score = float | dict[str, Any]
RM_TRIES = 4
RM_PAUSE_SECONDS = 0.5


@dataclass
class RewardContext:
    """What a reward function may look at besides the samples: their draw, the reward's options, the run's configuration.

    `http` and `calls`, how many requests may be under way at a time, are set for asynchronous functions only.
    """

    draw: Draw
    options: Reward
    config: RunConfig
    http: httpx.AsyncClient | None = field(default=None, compare=False)
    calls: asyncio.Semaphore | None = field(default=None, compare=False)


def exact_match(samples: list[Sample], context: RewardContext) -> list[Score]:
    """1 where the response is the label, white space at the ends aside; else 0."""
    return [float((s.response or "").strip() == (s.label or "").strip()) for s in samples]


def math(samples: list[Sample], context: RewardContext) -> list[Score]:
    """1 where math-verify finds the response's answer equal to the label; else 0, also when it runs out of time.

    Policies do write what takes for ever (9^{9^{9^9}}), so that is no error; but how far math-verify comes in a second depends on the machine's
    load, and so a run with this reward is replayed, not exact (miles.plan.tier).
    """
    import math_verify

    seconds = max(1, int(context.options.timeout / (2 * max(1, len(samples)))))
    seconds = min(seconds, 10)
    label = samples[0].label or ""
    # A bare LaTeX label has no anchor that math-verify looks for.
    anchored = label if "$" in label or "\\boxed" in label else f"\\boxed{{{label}}}"
    gold = math_verify.parse(anchored, parsing_timeout=seconds)
    scores: list[Score] = []
    for sample in samples:
        answer = math_verify.parse(sample.response or "", parsing_timeout=seconds)
        scores.append(float(math_verify.verify(gold, answer, timeout_seconds=seconds)))
    return scores


def reasoning_gym(samples: list[Sample], context: RewardContext) -> list[Score]:
    """reasoning-gym's own score, 0 to 1, of the response (of what stands in <answer>…</answer>, where that is given)."""
    source: Source = getattr(context.config, context.draw.source)
    if source.reasoning_gym is None or GYM_INDEX not in context.draw.metadata:
        raise UserError(f"reward type reasoning_gym scores prompts of reasoning-gym only; {context.draw.source} comes from {source.prompt_data}")
    dataset = _dataset(context.draw.source, source.model_dump_json())
    entry = dataset[context.draw.metadata[GYM_INDEX]]
    return [float(dataset.score_answer(_answer(s.response or ""), entry)) for s in samples]


async def remote_rm(samples: list[Sample], context: RewardContext) -> list[Score]:
    """What a reward server answers to {prompt, response, label}, a sample a call: a number, or an object with `reward.key`."""
    assert context.http is not None, "asynchronous rewards get a client"
    assert context.calls is not None, "and its bound"
    assert context.options.url is not None, "checked when the run was configured"
    return list(await asyncio.gather(*(_ask(context.http, context.calls, context.options, sample) for sample in samples)))


async def _ask(http: httpx.AsyncClient, calls: asyncio.Semaphore, options: Reward, sample: Sample) -> Score:
    """The answer of one of RM_TRIES tries, each with the whole timeout from when its request may go out. Raises TryAgain after the last."""
    url = str(options.url)
    body = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    for again in range(RM_TRIES):
        why = ""
        try:
            async with calls, asyncio.timeout(options.timeout):
                reply = await http.post(url, json=body, timeout=None)
            if reply.status_code == 200:
                return _number_or_object(reply, url)
            why = f"{reply.status_code}: {' '.join(reply.text.split())[:200]}"
            if reply.status_code < 500:
                raise UserError(f"remote_rm: {url} answered {why}; check rollout.reward.url")
        except httpx.InvalidURL as error:
            raise UserError(f"rollout.reward.url: {url!r} is no address ({error})") from error
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"rollout.reward.url: {url!r}: {error}") from error
        except TimeoutError:
            why = f"no answer in {options.timeout:g} s"
        except httpx.TransportError as error:
            why = f"{type(error).__name__} {error}".strip()
        if again + 1 < RM_TRIES:
            await asyncio.sleep(RM_PAUSE_SECONDS * 2**again)
    raise TryAgain(f"remote_rm: {url} failed {RM_TRIES} times ({why})")


def _number_or_object(reply: httpx.Response, url: str) -> Score:
    try:
        score = reply.json()
    except ValueError:
        score = reply.text[:60]
    if isinstance(score, dict) or (isinstance(score, int | float) and not isinstance(score, bool)):
        return score
    raise UserError(f"remote_rm: {url} answered {score!r}; a number or an object is expected")


def boxed(text: str) -> str:
    """What stands in the last \\boxed{…} of a text, braces balanced; "" without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, first = 1, start + len("\\boxed{")
    for position in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[first:position]
    return ""


def _answer(response: str) -> str:
    tagged = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    return (tagged[-1] if tagged else response).strip()


@lru_cache(maxsize=4)
def _dataset(name: str, source: str) -> Any:
    return gym_dataset(name, Source.model_validate_json(source, extra="ignore"))


BY_NAME: dict[str, Callable[..., Any]] = {"exact_match": exact_match, "math": math, "reasoning_gym": reasoning_gym, "remote_rm": remote_rm}
