"""User functions of the tests, found by import path in worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np

from miles.data.sample import Draw, Flag, Sample, Status
from miles.rollout.generate import GenerateContext
from miles.rollout.rewards import RewardContext


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    """A response without an engine: a function of the seed. Leaves a line for each call in $CALLS; slower for lower draws."""
    if "CALLS" in os.environ:
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{draw.draw}.{sample}\n")
    await asyncio.sleep(float(os.environ.get("SLOW", "0")) / (1 + draw.draw))
    text, prompt = context.prompt(draw)
    seed = context.seed(draw, sample)
    output = [1 + seed % 50, 2 + seed // 64 % 50]
    start, total = len(prompt), len(prompt) + 2
    mask = np.array([0] * start + [1, 1], np.uint8)
    logprob = np.full(total, np.nan, np.float32)
    logprob[start:] = -0.5
    return Sample(
        draw.draw, sample, seed, np.array(prompt + output, np.int32), start, logprob, mask, mask * np.uint8(Flag.GENERATED), Status.COMPLETED,
        reward=float(seed % 2), runs=[(start, context.weight_version)], source=draw.source, metadata=draw.metadata, prompt=text,
        response=context.tokenizer.decode(output), label=draw.label,
    )  # fmt: skip


async def generate_until_gate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    """Like generate; from draw 2 on it waits until $GATE exists."""
    while draw.draw >= 2 and not Path(os.environ["GATE"]).exists():
        await asyncio.sleep(0.02)
    return await generate(draw, sample, context)


async def generate_badly(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    raise ZeroDivisionError("no tokens\nat all")


def keep_some(group: list[Sample]) -> bool | str:
    """Keeps every third draw."""
    return True if group[0].draw % 3 == 1 else f"draw_mod_{group[0].draw % 3}"


def keep_none(group: list[Sample]) -> bool:
    return False


def keep_by_number(group: list[Sample]) -> int:
    return 1


def keep_wrongly(group: list[Sample]) -> bool:
    raise LookupError("filter broke")


def reward_sum(samples: list[Sample], context: RewardContext) -> list[float]:
    """The group's size plus the index: shows that the group comes whole."""
    return [len(samples) + s.sample / 10 for s in samples]


async def reward_parts(samples: list[Sample], context: RewardContext) -> list[dict[str, float]]:
    await asyncio.sleep(0)
    return [{"score": 0.5, "style": 0.25, "draw": float(context.draw.draw)} for _ in samples]


def reward_raises(samples: list[Sample], context: RewardContext) -> list[float]:
    raise ValueError("gold\nanswer")


def reward_short(samples: list[Sample], context: RewardContext) -> list[float]:
    return [1.0]


def reward_nan(samples: list[Sample], context: RewardContext) -> list[float]:
    return [float("nan")] * len(samples)


def reward_slow(samples: list[Sample], context: RewardContext) -> list[float]:
    time.sleep(60)
    return [0.0 for _ in samples]


def reward_half_second(samples: list[Sample], context: RewardContext) -> list[float]:
    time.sleep(0.5)
    return [1.0 for _ in samples]


def reward_unpicklable(samples: list[Sample], context: RewardContext) -> list[object]:
    return [lambda: 1.0 for _ in samples]


async def reward_times_out_by_itself(samples: list[Sample], context: RewardContext) -> list[float]:
    raise TimeoutError("the judge's own clock")


def reward_killed(samples: list[Sample], context: RewardContext) -> list[float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return [0.0]


def reward_dies(samples: list[Sample], context: RewardContext) -> list[float]:
    os._exit(3)
