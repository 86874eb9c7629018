"""A planted run is a run directory as miles writes it: files agree with their manifest, records with the scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted import Planted, plant
from planted.model import LAYERS, TOP_K
from planted.scene import RANKS_A_NODE

from miles.data.sample import Flag
from miles.data.store.manifest import Manifest, read_manifest, verify_batch
from miles.data.store.run_dir import RunDir, read_run_yaml
from miles.data.store.shard import open_routes, open_shard
from miles.data.store.train_record import open_train_record

CAUSES, SIZES = ("lag", "routing", "top_p"), (1.0, 0.2, 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Planted]:
    folder = tmp_path_factory.mktemp("planted") / "run"
    return RunDir(folder), plant(folder, CAUSES, SIZES, 11, steps=3, sequences=32, response=48)


def rows_of(planted: Planted) -> dict[tuple[int, int], int]:
    """Row of the scene by draw and sample."""
    return {(int(draw), int(sample)): row for row, (draw, sample) in enumerate(zip(planted.scene.draw, planted.scene.sample, strict=True))}


def manifests(run: RunDir) -> list[Manifest]:
    return [read_manifest(run.batch(step)) for step in (1, 2, 3)]


def test_batches_verify_and_name_every_draw_once(made: tuple[RunDir, Planted]) -> None:
    run, _ = made
    draws: list[int] = []
    for manifest in manifests(run):
        verify_batch(run, manifest)
        assert manifest.sequences == 32
        draws += manifest.draws
    assert draws == list(range(3 * 8))
    assert read_run_yaml(run)["num_rollout"] == 3


def test_shards_hold_what_was_generated(made: tuple[RunDir, Planted]) -> None:
    run, planted = made
    rows, found = rows_of(planted), 0
    for manifest in manifests(run):
        for entry, routes_entry in zip(manifest.shards, manifest.routes, strict=True):
            with open_shard(run.batch(manifest.step) / entry.name) as shard, open_routes(run.batch(manifest.step) / routes_entry.name) as routes:
                experts = routes.experts(0, len(shard))
                for index, sample in enumerate(shard.samples()):
                    row = rows[sample.draw, sample.sample]
                    length = int(planted.generated.length[row])
                    found += 1
                    assert planted.scene.step[row] == manifest.step - 1
                    assert np.array_equal(sample.token_id, planted.generated.token[row, :length])
                    assert np.array_equal(sample.rollout_logprob, planted.generated.logprob[row, :length], equal_nan=True)
                    assert np.array_equal(np.isfinite(sample.rollout_logprob), sample.loss_mask == 1)
                    assert np.array_equal(sample.flags & Flag.GENERATED > 0, sample.loss_mask == 1)
                    assert not sample.loss_mask[: sample.prompt_length].any()
                    assert np.array_equal(experts[index], planted.generated.order[row, : length - 1, :, :TOP_K])
                    assert [version for _, version in sample.runs] == [manifest.policy.weight_version - lag for start, lag in planted.scene.lag[row // planted.scene.rows] if start < length]
                    drafted = sample.flags & (Flag.DRAFT_ACCEPTED | Flag.DRAFT_RESAMPLED) > 0
                    assert np.array_equal(drafted, (sample.loss_mask == 1) & planted.scene.drafts[row])
                    assert sample.engine.endswith(str(30000 + planted.scene.engine[row]))
                    mass = sample.kept_mass
                    assert mass is not None
                    assert np.nanmin(mass) >= 0.89
    assert found == 96


def test_siblings_share_their_prompt(made: tuple[RunDir, Planted]) -> None:
    _, planted = made
    for draw in range(24):
        group = np.flatnonzero(planted.scene.draw == draw)
        assert sorted(planted.scene.sample[group]) == [0, 1, 2, 3]
        assert len({planted.generated.token[row, : planted.scene.prompt_length[row]].tobytes() for row in group}) == 1


def test_records_of_all_nodes_hold_every_sequence_once(made: tuple[RunDir, Planted]) -> None:
    run, planted = made
    rows = rows_of(planted)
    for manifest in manifests(run):
        shards = [open_shard(run.batch(manifest.step) / entry.name) for entry in manifest.shards]
        numbers = [shard.sequences() for shard in shards]
        seen = set()
        for node in range(2):
            with open_train_record(run.train(manifest.step) / f"node_{node:04d}.h5") as record:
                sequences = record.sequences()
                for index, (shard, place, rank) in enumerate(zip(sequences["shard"], sequences["row"], sequences["rank"], strict=True)):
                    row = rows[int(numbers[shard]["draw"][place]), int(numbers[shard]["sample"][place])]
                    seen.add(row)
                    assert rank == planted.rank[row]
                    assert rank // RANKS_A_NODE == node
                    length = int(planted.generated.length[row])
                    values = record.tokens(index, index + 1, record.names)
                    assert np.array_equal(values["train_logprob"], planted.trained.logprob[row, :length], equal_nan=True)
                    assert np.array_equal(values["used"], planted.generated.generated[row, :length])
                    experts, order = planted.trained.experts[row], planted.generated.order[row]
                    missed = [0] + [sum(set(experts[t, layer]) != set(order[t, layer, :TOP_K]) for layer in range(LAYERS)) for t in range(length - 1)]
                    assert values["route_miss"].tolist() == missed
        for shard in shards:
            shard.close()
        assert seen == set(np.flatnonzero(planted.scene.step == manifest.step - 1))


def test_advantages_sum_to_zero_in_a_group(made: tuple[RunDir, Planted]) -> None:
    run, _ = made
    totals: dict[int, list[float]] = {}
    manifest = manifests(run)[0]
    with open_shard(run.batch(1) / manifest.shards[0].name) as first, open_shard(run.batch(1) / manifest.shards[1].name) as second:
        draws = [shard.sequences()["draw"] for shard in (first, second)]
    for node in range(2):
        with open_train_record(run.train(1) / f"node_{node:04d}.h5") as record:
            sequences = record.sequences()
            for index, (shard, row) in enumerate(zip(sequences["shard"], sequences["row"], strict=True)):
                values = record.tokens(index, index + 1, ["advantage"])["advantage"]
                totals.setdefault(int(draws[shard][row]), []).append(float(np.nanmax(values)))
    for values in totals.values():
        assert len(values) == 4
        assert sum(values) == pytest.approx(0, abs=1e-5)


def test_optional_data_can_be_left_out(tmp_path: Path) -> None:
    plant(tmp_path, "clean", 0.0, 1, steps=1, sequences=16, response=40, recorded=set())
    manifest = read_manifest(RunDir(tmp_path).batch(1))
    assert manifest.routes == []
    with open_shard(tmp_path / "batches/step_000001" / manifest.shards[0].name) as shard:
        assert "kept_mass" not in shard.names
        assert shard.texts("response", 0, 1) == [None]
    with open_train_record(tmp_path / "train/step_000001/node_0000.h5") as record:
        assert "route_miss" not in record.names
