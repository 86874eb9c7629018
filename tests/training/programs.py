"""What the rank processes of the tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import add_routes, make_batch, make_config, make_samples
from torch.distributed.tensor import DTensor

from miles.data.store.train_record import open_train_record
from miles.training.checkpoint import newest_good
from miles.training.distributed import Ranks, seed_everything
from miles.training.fsdp import FsdpTrainer


def hexes(metrics: dict[str, float]) -> dict[str, str]:
    """Every bit of every metric."""
    return {name: float(value).hex() for name, value in metrics.items()}


def local(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def train(
    ranks: Ranks, model: str, work: str, steps: int = 1, first: int = 1, save_at: int | None = None, resume: bool = False,
    optimizer_steps: int = 1, sections: dict[str, Any] | None = None, max_tokens: int = 64, sft_until: int = 0, reference: str | None = None,
    load_from: str | None = None, routes: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train `steps` batches of a fixed series; returns metrics' bits of each, the final checksum and the optimizer's."""
    seed_everything(7, ranks.rank)
    config = make_config(**(sections or {}))
    trainer = FsdpTrainer(config, Path(model), ranks)
    folder = Path(work)
    said: list[str] = []
    progress = None
    if resume:
        found, said = newest_good(Path(load_from or work) / "checkpoints")
        assert found is not None, said
        progress = trainer.load(found)
    elif reference is not None:
        trainer.load_reference(Path(reference))
    lines = []
    for number in range(first, first + steps):
        kind = "sft" if number <= sft_until else "rollout"
        batch_folder = folder / f"batch.{ranks.world_size}.{ranks.rank}.{first}.{number}"
        samples = add_routes(make_samples(number), number) if routes else make_samples(number)
        manifest = make_batch(
            batch_folder, samples, world=ranks.world_size, steps=optimizer_steps, max_tokens=max_tokens, kind=kind, step=number
        )
        trainer.start_phase(kind)
        batch = trainer.open_batch(manifest, batch_folder)
        found_metrics = [trainer.train_step(batch, index) for index in range(batch.steps)]
        lines += [hexes(values | {"draw": float(torch.rand(()))}) for values in found_metrics]
        trainer.close_batch(batch, folder / f"train.{ranks.world_size}" / str(number))
        if number == save_at:
            trainer.save(folder / "checkpoints", number, {"next_draw": number * 10})
    optimizer = sum(float(local(value).double().abs().sum()) for name, value in trainer._optimizer_tensors().items() if "exp_avg" in name)
    return {"metrics": lines, "checksum": trainer.weight_checksum(), "optimizer": optimizer.hex(), "progress": progress, "said": said}


def several(ranks: Ranks, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several jobs of `train`, one after another, each with a trainer of its own."""
    return [train(ranks, **job) for job in jobs]


def by_sequence(folder: Path, name: str) -> dict[tuple[int, int], bytes]:
    """Bits of every sequence's values of a token array, from a node's record."""
    with open_train_record(folder / "node_0000.h5") as record:
        table = record.sequences()
        return {
            (int(shard), int(row)): record.tokens(index, index + 1, [name])[name].tobytes()
            for index, (shard, row) in enumerate(zip(table["shard"], table["row"], strict=True))
        }
