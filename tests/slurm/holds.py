"""The built-in generation, which stands still where a test wants something to happen: `hold` beside the run directory says {attempt: version of the weights};
"pace" is how long each sample takes besides [s]."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from miles.data.sample import Draw, Sample
from miles.rollout.generate import GenerateContext
from miles.rollout.generate import generate as built_in


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    run_dir, epoch = Path(os.environ["MILES_RUN_DIR"]), os.environ["MILES_EPOCH"]
    hold = run_dir.with_name("hold")
    asked = json.loads(hold.read_text()) if hold.exists() and context.kind == "rollout" else {}
    if context.weight_version >= asked.get(epoch, 1 << 30):
        run_dir.with_name(f"held.{epoch}").touch()
        await asyncio.sleep(3600)
    await asyncio.sleep(asked.get("pace", 0.0))
    return await built_in(draw, sample, context)
