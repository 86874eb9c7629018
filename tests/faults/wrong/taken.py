"""For rollout.generate_path: takes what an engine generated, whichever weights made it, and writes down which they were."""

from __future__ import annotations

from dataclasses import replace

from miles.data.sample import Draw, Sample
from miles.rollout.generate import GenerateContext, from_reply


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    text, prompt = context.prompt(draw)
    seed = context.seed(draw, sample)
    reply = await context.engines.generate(draw.draw, prompt, context.sampling_params(seed, len(prompt)))
    made_by = replace(context, weight_version=int(reply["meta_info"]["weight_version"]))
    return from_reply(draw, sample, seed, text, prompt, reply, made_by)
