"""Roles that stand still in the middle of a phase, so that a kill meets it for certain.

`halt` beside the run directory says {"epoch", "phase", "step"}. Who stands still leaves `halted.ROLE.RANK`, and goes on once `released` is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from miles.data.sample import Draw, Sample
from miles.rollout.generate import GenerateContext
from miles.rollout.generate import generate as built_in

POLL_SECONDS = 0.05


def beside(name: str) -> Path:
    """A file beside the run directory."""
    return Path(os.environ["MILES_RUN_DIR"]).with_name(name)


def wanted(phase: str, step: int) -> bool:
    """Whether this attempt shall stand still here."""
    path = beside("halt")
    return path.exists() and json.loads(path.read_text()) == {"epoch": int(os.environ["MILES_EPOCH"]), "phase": phase, "step": step}


def arrive(role: str) -> Path:
    """Leave word; returns the file to wait for."""
    beside(f"halted.{role}.{os.environ['MILES_RANK']}").touch()
    return beside("released")


def stand_still() -> None:
    """In a trainer rank, if its phase is the one."""
    from miles.training.progress import HERE

    if wanted(HERE.phase, HERE.step):
        released = arrive("trainer")
        while not released.exists():
            time.sleep(POLL_SECONDS)


def install() -> None:
    """Training halts between two optimizer steps; the sync when the weights are written and no engine has them; a save when weights and optimizer are written and nothing says so."""
    from miles.sync.disk import DiskTransport
    from miles.training import fsdp

    train_step, end, save_rng = fsdp.FsdpTrainer.train_step, DiskTransport.end, fsdp.save_rng

    def halting_train_step(self: Any, batch: Any, step: int) -> dict[str, float]:
        if step == 1:
            stand_still()
        return train_step(self, batch, step)

    def halting_end(self: Any) -> None:
        stand_still()
        end(self)

    def halting_save_rng(path: Path) -> None:
        stand_still()
        save_rng(path)

    fsdp.FsdpTrainer.train_step, DiskTransport.end, fsdp.save_rng = halting_train_step, halting_end, halting_save_rng  # type: ignore[method-assign]


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    """The built-in generation; of every second group the samples stand still. All that is begun is written down."""
    with beside(f"generated.{os.environ['MILES_EPOCH']}").open("a") as log:
        log.write(json.dumps([context.kind, context.weight_version, draw.draw, sample]) + "\n")
    if context.kind == "rollout" and draw.draw % 2 and wanted("generate", context.weight_version + 1):
        released = arrive("worker")
        while not released.exists():
            await asyncio.sleep(POLL_SECONDS)
    return await built_in(draw, sample, context)
