"""Where the rollout's routes are recorded, training says in how many layers it routed each token otherwise, and in which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record
from miles.models.forward import PackedContext, forward
from miles.training.batch import open_batch
from miles.training.fsdp import FsdpTrainer

LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of the trainer's model, and of one with nearly its weights, which makes the rollouts."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    trainer = tiny.make_model(folder / "trainer")
    network = AutoModelForCausalLM.from_pretrained(trainer, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    network.save_pretrained(folder / "rollout")
    return trainer, folder / "rollout"


def routes_of(folder, samples):
    """Experts [T - 1, LAYERS, TOP_K] of each sample by transformers alone, a sequence at a time, in float64."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager")
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = network(input_ids=torch.from_numpy(sample.token_id.astype(np.int64))[None], output_router_logits=True).router_logits
        found.append(torch.stack([each.topk(TOP_K).indices for each in logits], 1)[:-1].numpy().astype(np.uint8))
    return found


def recorded(folder, manifest, batch_folder):
    """{(draw, sample): route_miss} of a train record, and its layers."""
    identity = []
    for entry in manifest.shards:
        with open_shard(batch_folder / entry.name) as shard:
            table = shard.sequences()
            identity.append(list(zip(table["draw"].tolist(), table["sample"].tolist(), strict=True)))
    with open_train_record(folder / "node_0000.h5") as record:
        table = record.sequences()
        misses = {}
        for index, (shard, row) in enumerate(zip(table["shard"], table["row"], strict=True)):
            misses[identity[shard][row]] = record.tokens(index, index + 1, ["route_miss"])["route_miss"]
        return misses, record.layers()


@pytest.mark.parametrize("way", ["one step", "checkpointed", "three steps", "score"])
def test_misses_are_those_of_the_two_models_routes(folders, way, ranks, tmp_path):
    mine, theirs = folders
    samples = tiny.make_samples(3)
    ours, rollouts = routes_of(mine, samples), routes_of(theirs, samples)
    for sample, routes in zip(samples, rollouts, strict=True):
        sample.routes = np.ascontiguousarray(routes[..., ::-1])  # the same sets in another order
    samples[7].routes = None
    steps = 3 if way == "three steps" else 1
    manifest = tiny.make_batch(tmp_path / "batch", samples, steps=steps)
    config: dict[str, Any] = {"num_steps_per_rollout": steps, "gradient_checkpointing": way == "checkpointed", "optimizer": {"lr": 0.1}}
    trainer = FsdpTrainer(tiny.make_config(train=config), mine, ranks)
    if way == "score":
        batch = open_batch(manifest, tmp_path / "batch", trainer.config.algorithm, ranks, trainer.experts)
        trainer.score(batch, 0)
    else:
        trainer.start_phase("rollout")
        batch = trainer.open_batch(manifest, tmp_path / "batch")
        for step in range(steps):  # those of the record's log-probs: of the weights before the first step
            trainer.train_step(batch, step)
    trainer.close_batch(batch, tmp_path / "train")
    found, layers = recorded(tmp_path / "train", manifest, tmp_path / "batch")
    differ, compared = np.zeros((2, LAYERS), int)
    for sample, a, b in zip(samples, ours, rollouts, strict=True):
        other = np.array([[set(x) != set(y) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]).reshape(-1, LAYERS)
        if sample.routes is None:
            other[:] = False
        assert found[sample.draw, sample.sample].tolist() == [0, *other.sum(-1)]
        trained = sample.loss_mask[1:] != 0
        differ += other[trained].sum(0)
        compared += 0 if sample.routes is None else trained.sum()
    assert len(found) == len(samples)
    assert {name: counts.tolist() for name, counts in layers.items()} == {"routed": compared.tolist(), "route_miss": differ.tolist()}
    assert 0 < differ.sum() < compared.sum()


def test_transformers_own_modules_are_compared_too(folders, ranks, tmp_path):
    """bf16: the routes are those of the very model, but for one expert of one layer in every fifth row."""
    samples, wrong = tiny.make_samples(4, odd=False), {}
    config = tiny.make_config(model={"dtype": "bfloat16"}, rollout={"batch_invariant": False})
    trainer = FsdpTrainer(config, folders[0], ranks)
    for sample in samples:
        routes = torch.zeros(len(sample.token_id), LAYERS, TOP_K, dtype=torch.int32)
        context = PackedContext(routes=routes, cu_seqlens=torch.tensor([0, len(routes)], dtype=torch.int32))
        with torch.no_grad():
            forward(trainer.model, torch.from_numpy(sample.token_id.astype(np.int64)), torch.arange(len(routes)), context)
        sample.routes = routes[:-1].numpy().astype(np.uint16)
        sample.routes[::5, 1, 0] = 300
        wrong[sample.draw, sample.sample] = [0, *(np.arange(len(routes) - 1) % 5 == 0)]
    manifest = tiny.make_batch(tmp_path / "batch", samples, max_tokens=1)  # a sequence a micro-batch: the same shapes
    trainer.start_phase("rollout")
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    trainer.train_step(batch, 0)
    trainer.close_batch(batch, tmp_path / "train")
    found, layers = recorded(tmp_path / "train", manifest, tmp_path / "batch")
    assert {key: misses.tolist() for key, misses in found.items()} == wrong
    trained = sum(int(sample.loss_mask.sum()) for sample in samples)
    assert layers["routed"].tolist() == [trained, trained]
    assert layers["route_miss"][0] == 0 < layers["route_miss"][1]


@pytest.mark.parametrize("why", ["gone", "another model's", "a dense model"])
def test_what_cannot_be_compared_is_not_recorded(folders, why, ranks, tmp_path):
    samples = tiny.add_routes(tiny.make_samples(3), 3)
    if why == "another model's":
        for sample in samples:
            sample.routes = sample.routes[:, :1]
    manifest = tiny.make_batch(tmp_path / "batch", samples)
    if why == "gone":
        for path in (tmp_path / "batch").glob("routes.*"):
            path.unlink()
    model = tiny.make_model(tmp_path / "hf", "llama") if why == "a dense model" else folders[0]
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    trainer.train_step(batch, 0)
    trainer.close_batch(batch, tmp_path / "train")
    with open_train_record(tmp_path / "train" / "node_0000.h5") as record:
        assert "route_miss" not in record.names
        assert record.layers() == {}
