"""The built-in generation, counted: every sample that is begun leaves a line outside the run directory."""

from __future__ import annotations

import json
import os

from miles.data.sample import Draw, Sample
from miles.rollout.generate import GenerateContext
from miles.rollout.generate import generate as built_in


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    line = json.dumps([context.kind, context.weight_version, draw.draw, sample]) + "\n"
    handle = os.open(os.path.join(os.environ["FAULTS_GENERATED"], os.environ["MILES_EPOCH"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, line.encode())
    os.close(handle)
    return await built_in(draw, sample, context)
